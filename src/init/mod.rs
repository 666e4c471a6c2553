//! The child half: what runs between fork and exec. Single-threaded, synchronous, small; an ordered table of named steps.
//!
//! A failure comes back as step name + errno + path ([`StepError`]). The shim calls [`create`] and [`exec`]; nothing else
//! runs these. No tokio, no tracing, no heavy dependency.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::image::RootMount;

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
    /// Cgroup directories made for it, to be removed on delete; empty when the daemon places it.
    pub cgroup: Option<crate::init::CgroupRef>,
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
