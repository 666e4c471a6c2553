//! F5: the containerizer, the façade both fronts call. A pod is a Mesos top-level container or a CRI sandbox; its containers
//! are nested containers.
//!
//! [`Engine`] is all that a front sees. Lists and status come from memory (one writer publishes them); nothing in a front
//! dials a shim or reads a record. [`Containerizer`] is the engine itself:
//!
//! | file | what |
//! |---|---|
//! | `engine` | finds the owner of what a request names, asks it, waits |
//! | `owner`, `slot`, `lane` | the task that owns a pod, a container in it, and its queue of work that calls isolators |
//! | `admit` | policy: which request fits which state |
//! | `names` | one name, one object |
//! | `create`, `start`, `exit`, `stop`, `remove` | the moves of pods and containers, one file each |
//! | `publish` | the visible state and its events |
//! | `recover` | taking up again after a restart |
//! | `spans` | how all of this shows in logs and traces |

mod admit;
mod annotations;
mod create;
mod engine;
mod exit;
mod lane;
mod names;
mod owner;
mod parts;
mod publish;
mod recover;
mod remove;
mod slot;
mod spans;
mod start;
mod stop;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::launcher::{ExecOutput, ExecSpec, Sandbox};
use crate::model::error::Result;
use crate::model::image::Image;
use crate::model::phase::{ContainerPhase, PodPhase};
use crate::model::resources::Resources;
use crate::model::stats::{CgroupStats, ContainerStats, InterfaceStats};
use crate::model::{ContainerId, ContainerSpec, ImageId, PodId, PodSpec};

pub use engine::Containerizer;
pub use parts::Config;

/// A pod as it is now. Published copies are immutable; a change publishes a new one. This is also what its record holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pod {
    /// Id.
    pub id: PodId,
    /// As asked for.
    pub spec: PodSpec,
    /// Phase.
    pub phase: PodPhase,
    /// Nanoseconds since the epoch, distinct and rising over all pods of the daemon.
    pub created_at: i64,
    /// Addresses, primary first; empty for the host's network.
    pub ips: Vec<String>,
    /// The running sandbox, while there is one.
    pub sandbox: Option<Sandbox>,
    /// Network namespace, when it has its own.
    pub netns: Option<PathBuf>,
    /// CNI result or the built-in network's description (verbose status).
    pub network: Option<serde_json::Value>,
    /// Undo or teardown steps that failed and must be tried again; empty is normal.
    pub leftovers: Vec<String>,
}

/// A container as it is now; also what its record holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Container {
    /// Id.
    pub id: ContainerId,
    /// Its pod.
    pub pod: PodId,
    /// As asked for, with `resources` as they are now.
    pub spec: ContainerSpec,
    /// Phase.
    pub phase: ContainerPhase,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// Image it runs.
    pub image_id: ImageId,
    /// First repo digest of the image, else its id (CRI `image_ref`).
    pub image_ref: String,
    /// First tag of the image, else digest, else what was asked for (CRI status `image.image`).
    pub image_name: String,
    /// Absolute log file; `None` when logs are off.
    pub log_path: Option<PathBuf>,
    /// Effective stop signal number.
    pub stop_signal: i32,
    /// Uid, gid and groups given to the first process.
    pub user: (u32, u32, Vec<u32>),
    /// Ids of the images of volumes, as PullImage gives them, by container path.
    pub image_volumes: BTreeMap<String, String>,
    /// Error text of the last failed operation; empty is normal.
    pub message: String,
}

/// What happened to a pod or container, in order of happening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It exists now.
    Created,
    /// It runs now (pod: is ready).
    Started,
    /// It ended.
    Stopped,
    /// It is gone.
    Deleted,
}

/// One event with the state right after it.
#[derive(Clone, Debug)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// When, nanoseconds since the epoch.
    pub at: i64,
    /// The pod it belongs to.
    pub pod: Arc<Pod>,
    /// Set for container events.
    pub container: Option<Arc<Container>>,
}

/// The engine as fronts see it. Calls that change a pod are messages to its one owner: dropping the future stops the
/// waiting, never the work; a retry joins or finds the first attempt. The work is below the caller's span, whose fields `pod`
/// and `container`, if it has them, get the ids that the call does not name.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Whether recovery is done; before it a front answers `Unavailable`.
    fn ready(&self) -> bool;

    /// The image side.
    fn images(&self) -> &Arc<dyn crate::provisioner::Images>;

    /// Handler names, the default first.
    fn handlers(&self) -> Vec<String>;

    /// Whether pods can be attached to the network, and why not.
    async fn network_readiness(&self) -> crate::network::Readiness;

    /// Gives the pod range to the network.
    ///
    /// # Errors
    /// `InvalidArgument`.
    async fn set_pod_cidr(&self, cidr: &str) -> Result<()>;

    /// Makes a pod and returns when it is ready. The same metadata again while the first attempt runs or lives: its id.
    ///
    /// # Errors
    /// Everything made so far is undone; the name is free again.
    async fn run_pod(&self, spec: PodSpec) -> Result<PodId>;

    /// Stops everything in the pod and detaches its network. `id` may be a unique prefix; unknown is fine. Idempotent.
    ///
    /// # Errors
    /// What could not be torn down; the caller retries.
    async fn stop_pod(&self, id: &str) -> Result<()>;

    /// Stops if need be, removes containers, directories and name. Unknown is fine.
    ///
    /// # Errors
    /// What could not be removed; the pod stays listed as NotReady.
    async fn remove_pod(&self, id: &str) -> Result<()>;

    /// Remembers pod level resources (informative).
    ///
    /// # Errors
    /// `NotFound`.
    async fn update_pod_resources(&self, id: &str, overhead: Option<Resources>, resources: Option<Resources>) -> Result<()>;

    /// Makes a container in a ready pod. The same metadata again while it lives: its id.
    ///
    /// # Errors
    /// `NotFound` (pod, image), `FailedPrecondition` (pod not ready), `InvalidArgument`; nothing is left behind.
    async fn create_container(&self, pod: &str, spec: ContainerSpec) -> Result<ContainerId>;

    /// Starts a created container.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it is Created. When exec fails: that error, and the container is Exited 128 `StartError`.
    async fn start_container(&self, id: &str) -> Result<()>;

    /// Stop signal, wait up to `grace`, SIGKILL, wait. Zero grace kills at once; a later call with less time shortens a
    /// pending stop; dropping the future never escalates. Unknown or ended is fine.
    ///
    /// # Errors
    /// When it cannot be killed.
    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()>;

    /// Kills if need be and removes; the log file stays. Unknown is fine.
    ///
    /// # Errors
    /// What could not be removed.
    async fn remove_container(&self, id: &str) -> Result<()>;

    /// New limits; unset fields stay.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it has ended; the file that refused the value.
    async fn update_container(&self, id: &str, resources: Resources) -> Result<()>;

    /// New log file at the same path; it exists when this returns.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition` unless running.
    async fn reopen_log(&self, id: &str) -> Result<()>;

    /// Runs a command inside.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition` unless running, `DeadlineExceeded`.
    async fn exec_sync(&self, id: &str, exec: ExecSpec) -> Result<ExecOutput>;

    /// Finds a pod by id or unique prefix.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` when the prefix is ambiguous.
    fn pod(&self, id: &str) -> Result<Arc<Pod>>;

    /// Finds a container by id or unique prefix.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` when the prefix is ambiguous.
    fn container(&self, id: &str) -> Result<Arc<Container>>;

    /// All pods.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// All containers.
    fn containers(&self) -> Vec<Arc<Container>>;

    /// A sample of the container's use.
    fn container_stats(&self, container: &Container) -> ContainerStats;

    /// A sample of the pod cgroup's use (`cgroup_parent`).
    fn pod_stats(&self, pod: &Pod) -> Option<CgroupStats>;

    /// Interface counters of a pod with its own network.
    async fn network_stats(&self, pod: &Pod) -> Vec<InterfaceStats>;

    /// The container's OCI spec as launched, for verbose status.
    fn runtime_spec(&self, container: &Container) -> Option<serde_json::Value>;

    /// Events from now on.
    fn events(&self) -> broadcast::Receiver<Event>;

    /// Short-cut for the image a container's spec names.
    fn image_of(&self, container: &Container) -> Option<Arc<Image>> {
        self.images().resolve(container.image_id.as_str())
    }
}
