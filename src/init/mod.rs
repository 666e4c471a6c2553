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

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::image::RootMount;

pub use holder::{pause, spawn_pid_holder};

/// Step that may fail because the cgroup is not ours; a group that is in use is left alone then.
const CREATE_CGROUP: &str = "create cgroup";

/// Makes a container whose first process is set up and waits. Blocks for some milliseconds.
///
/// # Errors
/// The step that failed; everything made until then is gone again.
pub fn create(request: CreateRequest) -> Result<Blocked, StepError> {
    parent::create(request)
}

/// Runs a process in a container; returns when its execve has succeeded.
///
/// # Errors
/// The step that failed; the process is reaped.
pub fn exec(request: ExecRequest) -> Result<Executed, StepError> {
    parent::exec(request)
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

/// A container whose first process is set up and waits for [`Blocked::start`]. It is a direct child of the caller.
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

impl Blocked {
    /// Lets the process go on to execve; see [`Gate::open`].
    ///
    /// # Errors
    /// The step that failed.
    pub fn start(self) -> Result<(), StepError> {
        self.gate.open()
    }
}

/// The line to a process that waits for its start.
#[derive(Debug)]
pub struct Gate {
    sync: OwnedFd,
}

impl Gate {
    /// Lets the process go on and waits until its execve has succeeded.
    ///
    /// # Errors
    /// The step that failed, with the command's name for `exec`. The process has ended then and is the caller's to reap.
    pub fn open(self) -> Result<(), StepError> {
        parent::start(&self)
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
