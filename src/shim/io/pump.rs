//! Moving bytes. One read buffer and one write buffer serve all streams of the shim: between a read and its write there is
//! no await, so nobody else can want them. After a burst their pages go back to the kernel.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Log;
use crate::model::error::{Act, Result};
use crate::stdx::clock::now_ns;
use crate::stdx::crilog::{Batch, Framer, Stream};
use crate::sys::pages::Pages;

/// Bytes read at once: all that a pipe holds by default.
const READ: usize = 64 * 1024;
/// Bytes written at once: a full read of lines of ordinary length with their frames.
const WRITE: usize = 128 * 1024;
/// Reads in which what was written before a death is taken: as much as the largest pipe holds that needs no privilege. Somebody
/// outside of the container who goes on writing is not waited for.
const LAST_READS: usize = 16;
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

/// One output on its way into the log. It belongs to its pump; whoever ends the process may take the last of it himself.
pub struct Tap {
    source: Arc<AsyncFd<OwnedFd>>,
    framer: Mutex<Framer>,
    log: Log,
}

impl Tap {
    /// Nothing has passed through it yet.
    pub fn new(source: Arc<AsyncFd<OwnedFd>>, stream: Stream, log: Log) -> Arc<Self> {
        Arc::new(Self { source, framer: Mutex::new(Framer::new(stream)), log })
    }

    /// Writes into the log what is there by now, and the unfinished line: those who wrote it are gone. Waits for nothing.
    pub fn last(&self) {
        for _ in 0..LAST_READS {
            if !matches!(self.once(), Moved::Bytes(_)) {
                break;
            }
        }
        with_scratch(|scratch| {
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            let mut batch = Batch::new(scratch.write.bytes(), &mut log, now_ns());
            self.framer.lock().unwrap_or_else(PoisonError::into_inner).finish(&mut batch);
        });
        release();
    }

    fn once(&self) -> Moved {
        let moved = with_scratch(|scratch| {
            let moved = read(self.source.get_ref(), scratch.read.bytes());
            let mut framer = self.framer.lock().unwrap_or_else(PoisonError::into_inner);
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
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
        });
        // No memory: the pipe is left full until there is some, the process waits.
        moved.unwrap_or(Moved::NotNow)
    }
}

/// Writes everything into the log until it ends.
pub async fn to_log(tap: Arc<Tap>) {
    while let Ok(mut ready) = tap.source.ready(Interest::READABLE).await {
        match tap.once() {
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

/// The buffers, made when they are first wanted; `None` without memory.
fn with_scratch<T>(work: impl FnOnce(&mut Scratch) -> T) -> Option<T> {
    SCRATCH.with_borrow_mut(|scratch| {
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => scratch.insert(Scratch { read: Pages::map(READ).ok()?, write: Pages::map(WRITE).ok()?, high: 0 }),
        };
        Some(work(scratch))
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
