//! The child half: what runs between fork and exec. Single-threaded, synchronous, small; an ordered table of named steps.
//!
//! A failure comes back as step name + errno + path ([`StepError`]). The shim calls [`create`] and [`exec`]; nothing else
//! runs these. No tokio, no tracing, no heavy dependency.
//!
//! ```text
//! shim ── fork ──> stage 1: reads the bundle, clones stage 2 ──┬── cgroup, user mapping, OOM score ── exits
//!   │                                                          └─> stage 2 (the shim's child): STEPS ── ready ── waits ── execve
//!   └── listens on one socket pair; its end means execve has succeeded
//! ```
//!
//! The caller has one thread: the children are forks without exec, and go on in its memory's copy.

mod bundle;
mod cgroup;
mod channel;
mod devices;
mod fault;
mod holder;
mod launch;
mod mounts;
mod namespaces;
mod options;
pub mod overlay;
mod parent;
mod procfs;
mod resolve;
mod root;
mod settings;
mod stage1;
mod stage2;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::image::RootMount;

pub use holder::{Holder, pause, spawn_pid_holder};

/// Step that may fail because the cgroup is not ours; a group that is in use is left alone then.
const CREATE_CGROUP: &str = "create cgroup";

/// Begins to make a container. Returns when the first child is forked.
///
/// # Errors
/// When nothing can be forked.
pub fn create(request: CreateRequest) -> Result<Creation, StepError> {
    parent::begin_create(request).map(Creation)
}

/// Begins to run a process in a container. Returns when the first child is forked.
///
/// # Errors
/// When nothing can be forked.
pub fn exec(request: ExecRequest) -> Result<Execution, StepError> {
    parent::begin_exec(request).map(Execution)
}

/// Something under way that is heard of on a descriptor: readable means that [`Line::hear`] may have an answer.
pub trait Line: AsFd + AsRawFd {
    /// What is waited for.
    type Born;

    /// The outcome, or `None` when it is not known yet. Does not wait. After an outcome there is nothing more to hear.
    ///
    /// # Errors
    /// The step that failed; what was made until then is gone again, processes are reaped.
    fn hear(&mut self) -> Option<Result<Self::Born, StepError>>;

    /// Gives up on it; its processes are the caller's to end.
    fn abandon(self) -> Remains;
}

/// What is left of something abandoned.
#[derive(Debug)]
pub struct Remains(Option<parent::Birth>);

impl Remains {
    /// Kills what is known of; the children to reap (pidfds), which may hang in the kernel for a while. One that is dead by then may
    /// have had a child: to be called until none is left.
    pub fn kill(&mut self) -> Vec<OwnedFd> {
        self.0.as_mut().map(parent::Birth::abandon).unwrap_or_default()
    }

    /// Takes away the cgroup, once nobody is left. What cannot be removed is left to the cleaning up after the container.
    pub fn discard(mut self) {
        if let Some(birth) = &mut self.0 {
            birth.discard();
        }
    }
}

/// A container in the making.
#[derive(Debug)]
pub struct Creation(parent::Birth);

/// An exec in the making.
#[derive(Debug)]
pub struct Execution(parent::Birth);

impl AsFd for Creation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.line()
    }
}

impl AsRawFd for Creation {
    fn as_raw_fd(&self) -> RawFd {
        self.0.line().as_raw_fd()
    }
}

impl AsFd for Execution {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.line()
    }
}

impl AsRawFd for Execution {
    fn as_raw_fd(&self) -> RawFd {
        self.0.line().as_raw_fd()
    }
}

impl Line for Creation {
    type Born = Blocked;

    fn hear(&mut self) -> Option<Result<Blocked, StepError>> {
        self.0.hear().map(|born| born.map(Blocked::from))
    }

    fn abandon(self) -> Remains {
        Remains(Some(self.0))
    }
}

impl Line for Execution {
    type Born = Executed;

    fn hear(&mut self) -> Option<Result<Executed, StepError>> {
        self.0.hear().map(|born| born.map(Executed::from))
    }

    fn abandon(self) -> Remains {
        Remains(Some(self.0))
    }
}

impl From<parent::Born> for Blocked {
    fn from(born: parent::Born) -> Self {
        Self { pid: born.pid, pidfd: born.pidfd, console: born.console, cgroup: born.cgroup, gate: Gate { sync: born.sync } }
    }
}

impl From<parent::Born> for Executed {
    fn from(born: parent::Born) -> Self {
        Self { pid: born.pid, pidfd: born.pidfd, console: born.console }
    }
}

/// Where a process's standard streams go.
#[derive(Debug)]
pub enum Stdio {
    /// Three descriptors; `None` is `/dev/null`. They become 0, 1 and 2 of the child.
    Streams {
        /// Read by the child.
        stdin: Option<OwnedFd>,
        /// Written by the child.
        stdout: Option<OwnedFd>,
        /// Written by the child.
        stderr: Option<OwnedFd>,
    },
    /// A terminal made inside the container's devpts; its master comes back in [`Blocked::console`] or [`Executed::console`].
    Terminal {
        /// Columns and rows at start, 0 for the kernel's default.
        size: (u16, u16),
    },
}

/// A container to make. Everything else stands in the bundle's `config.json` and `mesocri.json`.
#[derive(Debug)]
pub struct CreateRequest {
    /// Directory with `config.json` (OCI runtime spec) and maybe `mesocri.json` ([`crate::model::plan::Extras`]).
    pub bundle: PathBuf,
    /// Mounts to make at the root filesystem inside the new mount namespace; empty: `root.path` is used as it is.
    pub rootfs: Vec<RootMount>,
    /// Standard streams.
    pub stdio: Stdio,
}

/// A container whose first process is set up and waits for its [`Gate`]. It is a direct child of the caller.
#[derive(Debug)]
pub struct Blocked {
    /// First process, in the caller's process namespace.
    pub pid: u32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
    /// Terminal master, when asked for.
    pub console: Option<OwnedFd>,
    /// Its cgroup, to be emptied and removed on delete. One that the daemon places it into may not exist yet.
    pub cgroup: Option<CgroupRef>,
    /// What the process waits for. Dropped unopened, the process ends.
    pub gate: Gate,
}

/// The line to a process that waits for its start.
#[derive(Debug)]
pub struct Gate {
    sync: Arc<OwnedFd>,
}

impl Gate {
    /// Lets the process go on. What is heard then is that its execve has succeeded.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn open(self) -> Result<Opening, StepError> {
        parent::let_go(&self)?;
        Ok(Opening { sync: self.sync })
    }
}

/// A start under way. A failure tells the step, with the command's name for `exec`; the process has ended then and is the caller's
/// to reap.
#[derive(Debug)]
pub struct Opening {
    sync: Arc<OwnedFd>,
}

impl AsFd for Opening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.sync).as_fd()
    }
}

impl AsRawFd for Opening {
    fn as_raw_fd(&self) -> RawFd {
        self.sync.as_raw_fd()
    }
}

impl Line for Opening {
    type Born = ();

    fn hear(&mut self) -> Option<Result<(), StepError>> {
        parent::executed(self.as_fd())
    }

    fn abandon(self) -> Remains {
        Remains(None)
    }
}

/// How to find a container's cgroup again: the path below the hierarchy roots, as `linux.cgroupsPath` resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupRef {
    /// Path relative to each hierarchy's root.
    pub path: String,
}

/// A process to add to a running container.
#[derive(Debug)]
pub struct ExecRequest {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// OCI `process` object, JSON.
    pub process: Vec<u8>,
    /// First process of the container.
    pub pid: u32,
    /// Standard streams.
    pub stdio: Stdio,
    /// The container's cgroup.
    pub cgroup: Option<CgroupRef>,
}

/// A process that [`exec`] started; its execve has succeeded.
#[derive(Debug)]
pub struct Executed {
    /// In the caller's process namespace.
    pub pid: u32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
    /// Terminal master, when asked for.
    pub console: Option<OwnedFd>,
}

/// A failed step: which, on what, and why. Text is made for the user: `mount /proc: operation not permitted`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{step} {object}: {}", std::io::Error::from_raw_os_error(*errno))]
pub struct StepError {
    /// Name of the step in the table.
    pub step: String,
    /// Path, id or value it worked on.
    pub object: String,
    /// Cause.
    pub errno: i32,
}
