//! F3: the launcher. Writes bundles, starts shims and speaks containerd's shim protocol to them: ours by default, any other
//! (runc's, crun through runc's, Kata, gVisor) by the pod's runtime handler.

mod bundle;
mod client;
pub mod config;
mod exec;
mod foreign;
mod output;
mod pod;
mod recover;
mod shims;
mod start;
mod task;

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::model::error::Result;
use crate::model::image::RootMount;
use crate::model::plan::LaunchPlan;
use crate::model::resources::Resources;
use crate::model::{ContainerId, PodId};

pub use config::Config;
pub use shims::ShimLauncher;

/// A running sandbox. Kept in the pod's record: with it a restarted daemon finds the shim again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Process that holds the pod's namespaces, in the host's process namespace (our shim itself, its process namespace's
    /// first process, or a foreign runtime's pause).
    pub pid: u32,
    /// The shim's own process.
    pub shim_pid: u32,
    /// Socket address of the shim, as its `start` verb printed it.
    pub address: String,
    /// Namespace type (`ipc`, `uts`, `pid`, `network`) to a path that joins it, for those that belong to the pod.
    pub namespaces: BTreeMap<String, PathBuf>,
}

/// Where a container's streams go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskIo {
    /// CRI log file; `None` discards output.
    pub log: Option<PathBuf>,
    /// Keep stdin open.
    pub stdin: bool,
    /// One terminal.
    pub terminal: bool,
}

/// A container to create in a pod's shim.
#[derive(Clone, Debug)]
pub struct TaskLaunch {
    /// Its plan; written to the bundle as `config.json` and `mesocri.json`.
    pub plan: LaunchPlan,
    /// Root filesystem.
    pub rootfs: Vec<RootMount>,
    /// Streams.
    pub io: TaskIo,
}

/// What a shim says of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Created, not started.
    Created {
        /// Blocked first process.
        pid: u32,
    },
    /// Running (or paused).
    Running {
        /// First process.
        pid: u32,
    },
    /// Ended, its record still held by the shim.
    Exited {
        /// 0..=255, 128+n for signals.
        code: i32,
        /// Nanoseconds since the epoch.
        at: i64,
    },
    /// The shim does not know it.
    Gone,
}

/// Result of a bounded synchronous exec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit code.
    pub code: i32,
    /// Its beginning; with `stderr` at most [`ExecSpec::output_limit`].
    pub stdout: Vec<u8>,
    /// Its beginning.
    pub stderr: Vec<u8>,
}

/// A command to run in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecSpec {
    /// Words.
    pub args: Vec<String>,
    /// One terminal.
    pub terminal: bool,
    /// Kill after this long; `None` never.
    pub timeout: Option<std::time::Duration>,
    /// Bytes kept of both streams together, a sixteenth of them set aside for each; more is read and dropped. So is what exceeds
    /// the memory that all running commands share for their output (64 MiB and 16 KiB for each).
    pub output_limit: usize,
}

/// What the containerizer needs of shims. Implementations: the real one ([`crate::launcher`]) and fakes in tests.
#[async_trait]
pub trait Launcher: Send + Sync {
    /// Handler names that can be used, the default first.
    fn handlers(&self) -> Vec<String>;

    /// Whether `handler` (empty: the default) exists.
    fn has_handler(&self, handler: &str) -> bool {
        handler.is_empty() || self.handlers().iter().any(|h| h == handler)
    }

    /// Whether `handler` is another runtime's shim: it goes by annotations, and keeps a record of limits that must be told of new ones.
    fn is_foreign(&self, handler: &str) -> bool {
        !handler.is_empty() && handler != config::DEFAULT_HANDLER
    }

    /// Starts the pod's shim ahead of its sandbox, so that it is up when the plan is ready. Does nothing where a shim needs the plan
    /// to start. Also after a failure, [`Launcher::delete_sandbox`] takes back what was started.
    ///
    /// # Errors
    /// As [`Launcher::create_sandbox`].
    async fn start_shim(&self, pod: &PodId, handler: &str) -> Result<()>;

    /// Starts the pod's sandbox, and its shim unless that was started ahead. Nothing is left behind on failure.
    ///
    /// # Errors
    /// Typed, naming the step that failed in shim or init.
    async fn create_sandbox(&self, pod: &PodId, handler: &str, plan: &LaunchPlan) -> Result<Sandbox>;

    /// Finds the shim of a recorded pod again after a restart of the daemon.
    ///
    /// # Errors
    /// `Unavailable` when the shim does not answer within its time-out, `NotFound` when it is dead.
    async fn reattach(&self, pod: &PodId, handler: &str, sandbox: &Sandbox) -> Result<()>;

    /// Resolves when the pod's sandbox has ended, for whatever reason (stop, shim killed). Safe to call many times.
    async fn wait_sandbox(&self, pod: &PodId);

    /// Ends the sandbox: everything in it dies. Idempotent.
    ///
    /// # Errors
    /// When something could not be ended.
    async fn stop_sandbox(&self, pod: &PodId) -> Result<()>;

    /// Ends the shim and removes its socket, bundle and cgroup, also when the shim is dead already. Idempotent, safe for unknown ids.
    ///
    /// # Errors
    /// What could not be removed.
    async fn delete_sandbox(&self, pod: &PodId, handler: &str, sandbox: Option<&Sandbox>) -> Result<()>;

    /// Writes the bundle and makes the container, its first process blocked before exec. Returns its pid.
    ///
    /// # Errors
    /// Typed, naming the step that failed in init; nothing is left behind.
    async fn create_task(&self, pod: &PodId, id: &ContainerId, launch: &TaskLaunch) -> Result<u32>;

    /// Lets the first process go.
    ///
    /// # Errors
    /// The failed step (exec of a missing binary is one).
    async fn start_task(&self, pod: &PodId, id: &ContainerId) -> Result<()>;

    /// Sends a signal to the first process, or to every process of the container. Ended processes are fine.
    ///
    /// # Errors
    /// `NotFound` when the shim does not know the container.
    async fn kill_task(&self, pod: &PodId, id: &ContainerId, signal: i32, all: bool) -> Result<()>;

    /// Resolves when the first process has ended, its output is drained (bounded) and the log is complete: code and time. Survives
    /// connections that break.
    ///
    /// # Errors
    /// `Unavailable` when the shim has ended first, and only then.
    async fn wait_task(&self, pod: &PodId, id: &ContainerId) -> Result<(i32, i64)>;

    /// State as the shim sees it.
    ///
    /// # Errors
    /// `Unavailable` when the shim has ended, `DeadlineExceeded` when it does not answer.
    async fn task_state(&self, pod: &PodId, id: &ContainerId) -> Result<TaskState>;

    /// Forgets an ended task: kills what is left in it, removes its cgroup and bundle. Idempotent.
    ///
    /// # Errors
    /// What could not be removed.
    async fn delete_task(&self, pod: &PodId, id: &ContainerId) -> Result<()>;

    /// Applies limits to a created or running container.
    ///
    /// # Errors
    /// The file that refused the value.
    async fn update_task(&self, pod: &PodId, id: &ContainerId, resources: &Resources) -> Result<()>;

    /// Starts a new log file at the same path.
    ///
    /// # Errors
    /// When it cannot be made.
    async fn reopen_log(&self, pod: &PodId, id: &ContainerId) -> Result<()>;

    /// Runs a command to its end inside a running container with the container's own process settings. Dropping the future kills
    /// the command and all it started.
    ///
    /// # Errors
    /// `DeadlineExceeded` after the time-out: its processes are dead and reaped then, unless that takes more than a moment (the shim
    /// stalls, the kernel keeps them) and goes on in the background. The failed step when it cannot start.
    async fn exec_sync(&self, pod: &PodId, id: &ContainerId, exec: &ExecSpec) -> Result<ExecOutput>;
}
