//! Standard streams: what the child gets, and what the shim keeps of them.
//!
//! | address | child gets | shim keeps |
//! |---|---|---|
//! | empty | `/dev/null` | nothing |
//! | `cri-log://PATH` | a pipe | its other end, pumped into the log file |
//! | a fifo | the fifo itself | the fifo, so that a reader that comes and goes neither kills the child nor ends its input |
//! | a file | the file, for appending | nothing |
//! | terminal | its slave side | its master, pumped into log or fifo |
//!
//! Bytes pass through the shim only where it must look at them (log lines) or there is no other way (terminals).

mod pump;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{Mode, OFlags};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

pub use pump::Tap;

use crate::init;
use crate::model::error::{Act, Error, Result};
use crate::stdx::crilog::{self, LogFile, Stream};

/// A log file shared by the pumps of one container.
pub type Log = Arc<Mutex<LogFile>>;

/// Where the streams of a process go, as the request named it.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// Fifo or file; empty: none.
    pub stdin: String,
    /// Fifo, file, or `cri-log://`.
    pub stdout: String,
    /// The same; unused with a terminal.
    pub stderr: String,
    /// One terminal in place of the three.
    pub terminal: bool,
}

/// The shim's side of a process's streams, before the process exists.
pub struct Ends {
    pumps: Vec<(OwnedFd, Stream)>,
    log: Option<Log>,
    /// Held while the process lives.
    keepers: Vec<OwnedFd>,
    /// Held until the client closes the input.
    stdin: Option<OwnedFd>,
    /// The terminal's output, when it does not go into a log.
    screen: Option<OwnedFd>,
}

/// The same, while the process lives.
pub struct Running {
    /// End when the output has ended.
    pub pumps: Vec<JoinHandle<()>>,
    /// Those of them that go into a log, while they have not ended.
    pub taps: Vec<Weak<Tap>>,
    /// Dropped when the process has ended.
    pub keepers: Vec<OwnedFd>,
    /// What [`Input::close`] closes.
    pub input: Input,
    /// Terminal master.
    pub console: Option<Arc<AsyncFd<OwnedFd>>>,
    /// To be reopened after rotation.
    pub log: Option<Log>,
}

/// A process's input as long as it is open.
#[derive(Default)]
pub struct Input {
    keeper: Option<OwnedFd>,
    typist: Option<JoinHandle<()>>,
}

impl Input {
    /// No more input: the process reads end of file once the client's end is closed too.
    pub fn close(&mut self) {
        self.keeper = None;
        if let Some(typist) = self.typist.take() {
            typist.abort();
        }
    }
}

/// Opens what `addresses` name. Never blocks: fifos are opened for both directions first.
///
/// # Errors
/// Naming the stream's path.
pub fn open(addresses: &Addresses) -> Result<(init::Stdio, Ends)> {
    let log = match addresses.stdout.strip_prefix(crilog::SCHEME).or_else(|| addresses.stderr.strip_prefix(crilog::SCHEME)) {
        Some(path) => Some(Arc::new(Mutex::new(LogFile::open(Path::new(path)).act("open log", path)?))),
        None => None,
    };
    let mut ends = Ends { pumps: Vec::new(), log, keepers: Vec::new(), stdin: None, screen: None };
    if addresses.terminal {
        if !addresses.stdin.is_empty() {
            ends.stdin = Some(keep(&addresses.stdin)?);
        }
        if ends.log.is_none() && !addresses.stdout.is_empty() {
            ends.screen = Some(keep(&addresses.stdout)?);
        }
        return Ok((init::Stdio::Terminal { size: (0, 0) }, ends));
    }
    let stdin = if addresses.stdin.is_empty() { None } else { Some(ends.input(&addresses.stdin)?) };
    let stdout = ends.output(&addresses.stdout, Stream::Stdout)?;
    let stderr = ends.output(&addresses.stderr, Stream::Stderr)?;
    Ok((init::Stdio::Streams { stdin, stdout, stderr }, ends))
}

impl Ends {
    fn input(&mut self, path: &str) -> Result<OwnedFd> {
        if is_fifo(path)? {
            // With a writer of our own the child never sees an end of file before the client says so (CloseIO).
            self.stdin = Some(keep(path)?);
        }
        blocking(path, OFlags::RDONLY)
    }

    fn output(&mut self, address: &str, stream: Stream) -> Result<Option<OwnedFd>> {
        if address.is_empty() {
            return Ok(None);
        }
        if address.starts_with(crilog::SCHEME) {
            let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).act("make", "pipe")?;
            rustix::io::ioctl_fionbio(&ours, true).act("set non-blocking", "pipe")?;
            self.pumps.push((ours, stream));
            return Ok(Some(theirs));
        }
        let path = address.strip_prefix("file://").unwrap_or(address);
        if is_fifo(path)? {
            self.keepers.push(keep(path)?);
        }
        blocking(path, OFlags::WRONLY | OFlags::APPEND).map(Some)
    }

    /// The process exists: starts moving bytes.
    ///
    /// # Errors
    /// When a descriptor cannot be watched.
    pub fn run(self, console: Option<OwnedFd>) -> Result<Running> {
        let mut running = Running { pumps: Vec::new(), taps: Vec::new(), keepers: self.keepers, input: Input::default(), console: None, log: self.log.clone() };
        if let Some(log) = &self.log {
            for (source, stream) in self.pumps {
                let source = Arc::new(watched(source, Interest::READABLE, "pipe")?);
                running.tap(Tap::new(source, stream, log.clone()));
            }
        }
        let Some(console) = console else {
            running.input.keeper = self.stdin;
            return Ok(running);
        };
        rustix::io::ioctl_fionbio(&console, true).act("set non-blocking", "terminal")?;
        let console = Arc::new(watched(console, Interest::READABLE | Interest::WRITABLE, "terminal")?);
        match (self.log, self.screen) {
            (Some(log), _) => running.tap(Tap::new(console.clone(), Stream::Stdout, log)),
            (None, Some(screen)) => running.pumps.push(tokio::spawn(pump::copy(console.clone(), pump::Target::new(screen)?))),
            (None, None) => running.pumps.push(tokio::spawn(pump::discard(console.clone()))),
        }
        if let Some(stdin) = self.stdin {
            let stdin = Arc::new(watched(stdin, Interest::READABLE, "standard input")?);
            running.input.typist = Some(tokio::spawn(pump::copy(stdin, pump::Target::Watched(console.clone()))));
        }
        running.console = Some(console);
        Ok(running)
    }
}

impl Running {
    fn tap(&mut self, tap: Arc<Tap>) {
        self.taps.push(Arc::downgrade(&tap));
        self.pumps.push(tokio::spawn(pump::to_log(tap)));
    }
}

/// Registers a non-blocking descriptor (or a pidfd) with the runtime.
///
/// # Errors
/// From epoll.
#[expect(
    deprecated,
    reason = "deprecated for types whose AsRawFd may change its answer; an OwnedFd's cannot, and the replacement needs a promise that it already keeps"
)]
pub fn watched(fd: OwnedFd, interest: Interest, what: &str) -> Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest).act("watch", what)
}

/// Starts a new log file at the same path.
///
/// # Errors
/// When it cannot be made; the old one stays in use.
pub fn reopen(log: &Log) -> Result<()> {
    log.lock().unwrap_or_else(PoisonError::into_inner).reopen().act("reopen", "log")
}

/// Gives the terminal a size in characters.
///
/// # Errors
/// From the kernel.
pub fn resize(console: &AsyncFd<OwnedFd>, columns: u16, rows: u16) -> Result<()> {
    tcsetwinsize(console.get_ref(), Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).act("resize", "terminal")
}

fn is_fifo(path: &str) -> Result<bool> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.file_type().is_fifo()),
        // A file that is to be made.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io(format!("look at {path}"), e)),
    }
}

/// Opens a fifo for both directions: succeeds at once, and while it is held neither end ever closes.
fn keep(path: &str) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty()).act("open", path)
}

/// Opens one direction for the child, which expects blocking descriptors.
fn blocking(path: &str, direction: OFlags) -> Result<OwnedFd> {
    let create = if direction.contains(OFlags::WRONLY) { OFlags::CREATE } else { OFlags::empty() };
    let flags = direction | create | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file: File = rustix::fs::open(path, flags, Mode::from_raw_mode(0o640)).act("open", path)?.into();
    rustix::io::ioctl_fionbio(&file, false).act("set blocking", path)?;
    Ok(file.into())
}
