//! Moving bytes. One read buffer and one write buffer serve all streams of the shim: between a read and its write there is
//! no await, so nobody else can want them. After a burst their pages go back to the kernel.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Log;
use crate::model::error::{Act, Result};
use crate::stdx::clock::now_ns;
use crate::stdx::crilog::{Batch, Framer};
use crate::sys::pages::Pages;

/// Bytes read at once: all that a pipe holds by default.
const READ: usize = 64 * 1024;
/// Bytes written at once: a full read of lines of ordinary length with their frames.
const WRITE: usize = 128 * 1024;
/// Bytes copied at once between terminal and fifo; people type and read slowly.
const COPY: usize = 4096;
/// Use beyond which the buffers are worth giving back: two pages are the price of being ready.
const WORTH_RELEASING: usize = 2 * 4096;

struct Scratch {
    read: Pages,
    write: Pages,
    /// Most bytes one read brought since the last release.
    high: usize,
}

thread_local! {
    static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

/// What one attempt to move bytes came to.
enum Moved {
    Bytes(usize),
    NotNow,
    End,
}

/// Writes everything from `source` into the log until it ends.
pub async fn to_log(source: Arc<AsyncFd<OwnedFd>>, mut framer: Framer, log: Log) {
    while let Ok(mut ready) = source.ready(Interest::READABLE).await {
        match log_once(source.get_ref(), &mut framer, &log) {
            // A stream that fills the buffer each time must not starve the requests.
            Moved::Bytes(READ) => tokio::task::yield_now().await,
            Moved::Bytes(_) => {}
            Moved::NotNow => {
                ready.clear_ready();
                release();
            }
            Moved::End => break,
        }
    }
    release();
}

fn log_once(source: &OwnedFd, framer: &mut Framer, log: &Log) -> Moved {
    SCRATCH.with_borrow_mut(|scratch| {
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => match (Pages::map(READ), Pages::map(WRITE)) {
                (Ok(read), Ok(write)) => scratch.insert(Scratch { read, write, high: 0 }),
                // No memory: the pipe is left full until there is some, the process waits.
                _ => return Moved::NotNow,
            },
        };
        let moved = read(source, scratch.read.bytes());
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let mut batch = Batch::new(scratch.write.bytes(), &mut log, now_ns());
        match moved {
            Moved::Bytes(n) => {
                scratch.high = scratch.high.max(n);
                framer.push(&scratch.read.bytes()[..n], &mut batch);
            }
            Moved::End => framer.finish(&mut batch),
            Moved::NotNow => {}
        }
        moved
    })
}

fn release() {
    SCRATCH.with_borrow_mut(|scratch| {
        if let Some(scratch) = scratch
            && scratch.high > WORTH_RELEASING
        {
            scratch.read.release();
            scratch.write.release();
            scratch.high = 0;
        }
    });
}

fn read(source: &OwnedFd, buffer: &mut [u8]) -> Moved {
    loop {
        return match rustix::io::read(source.as_fd(), &mut *buffer) {
            Ok(0) => Moved::End,
            Ok(n) => Moved::Bytes(n),
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => Moved::NotNow,
            // A terminal whose last user has left says EIO.
            Err(_) => Moved::End,
        };
    }
}

/// Where copied bytes go.
pub enum Target {
    /// Something that can be full.
    Watched(Arc<AsyncFd<OwnedFd>>),
    /// A file, which never is.
    Plain(OwnedFd),
}

impl Target {
    /// Tells the two apart.
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let stat = rustix::fs::fstat(&fd).act("look at", "output")?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile {
            return Ok(Self::Plain(fd));
        }
        Ok(Self::Watched(Arc::new(super::watched(fd, Interest::WRITABLE, "output")?)))
    }

    async fn write_all(&self, mut bytes: &[u8]) -> std::io::Result<()> {
        while !bytes.is_empty() {
            let result = match self {
                Self::Plain(fd) => rustix::io::write(fd, bytes),
                Self::Watched(fd) => {
                    let mut ready = fd.ready(Interest::WRITABLE).await?;
                    let result = rustix::io::write(fd.get_ref(), bytes);
                    if result == Err(Errno::AGAIN) {
                        ready.clear_ready();
                        continue;
                    }
                    result
                }
            };
            match result {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Copies until the source ends or the target is gone. The buffer exists only while there are bytes.
pub async fn copy(source: Arc<AsyncFd<OwnedFd>>, target: Target) {
    while let Ok(mut ready) = source.ready(Interest::READABLE).await {
        let mut buffer = vec![0; COPY];
        match read(source.get_ref(), &mut buffer) {
            Moved::Bytes(n) => {
                drop(ready);
                if target.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
            Moved::NotNow => ready.clear_ready(),
            Moved::End => break,
        }
    }
}

/// Reads and forgets, so that the process never waits.
pub async fn discard(source: Arc<AsyncFd<OwnedFd>>) {
    while let Ok(mut ready) = source.ready(Interest::READABLE).await {
        let mut buffer = [0; 512];
        match read(source.get_ref(), &mut buffer) {
            Moved::Bytes(_) => {}
            Moved::NotNow => ready.clear_ready(),
            Moved::End => break,
        }
    }
}
