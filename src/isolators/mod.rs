//! F4: isolators. One aspect of isolation per file; each describes what it wants as a [`LaunchPatch`], the launcher acts.
//!
//! To add one: write `isolators/<name>.rs` with an [`Entry`], add its `mod` line and its row in [`ENTRIES`]. Row order is
//! prepare order, cleanup runs in reverse. The smallest example is `linux_nnp.rs`.

pub mod set;

mod parts;

mod appc_runtime;
mod cgroups;
mod docker_runtime;
mod filesystem_linux;
mod linux_apparmor;
mod linux_capabilities;
mod linux_devices;
mod linux_nnp;
mod linux_seccomp;
mod linux_selinux;
mod linux_sysctl;
mod namespaces_ipc;
mod namespaces_pid;
mod namespaces_uts;
mod network_cni;
mod pod_files;
mod posix_rlimits;
mod volume_host_path;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use async_trait::async_trait;

use crate::disk::Layout;
use crate::launcher::Sandbox;
use crate::model::error::Result;
use crate::model::image::{Image, RootFs};
use crate::model::plan::LaunchPatch;
use crate::model::resources::Resources;
use crate::model::stats::CgroupStats;
use crate::model::{ContainerId, ContainerSpec, PodId, PodSpec};

pub use set::Isolators;

/// A row of the registry.
pub struct Entry {
    /// Name, as in the configuration's `isolation` list and as its configuration table.
    pub name: &'static str,
    /// Names without which it makes no sense.
    pub requires: &'static [&'static str],
    /// Reads its configuration table, empty when there is none, and gives it back with every option in it. Touches nothing. Unknown
    /// keys are errors.
    pub options: fn(toml::Table) -> Result<toml::Table>,
    /// Makes it from its configuration table, empty when there is none. Unknown keys are errors.
    pub create: fn(&Deps, toml::Table) -> Result<Box<dyn Isolator>>,
}

/// All isolators. Order is prepare order, cleanup runs in reverse: first what the others mount into, then the process, its
/// limits and filters, then volumes (a volume replaces a default mount, so it comes after all that make some). The network
/// comes last: it costs the most, and nothing that fails before it has to be detached.
pub const ENTRIES: &[Entry] = &[
    filesystem_linux::ENTRY,
    namespaces_pid::ENTRY,
    namespaces_ipc::ENTRY,
    namespaces_uts::ENTRY,
    linux_sysctl::ENTRY,
    pod_files::ENTRY,
    docker_runtime::ENTRY,
    appc_runtime::ENTRY,
    posix_rlimits::ENTRY,
    cgroups::ENTRY,
    linux_capabilities::ENTRY,
    linux_nnp::ENTRY,
    linux_seccomp::ENTRY,
    linux_apparmor::ENTRY,
    linux_selinux::ENTRY,
    linux_devices::ENTRY,
    volume_host_path::ENTRY,
    network_cni::ENTRY,
];

/// Names for the configuration's `isolation` when it says nothing: everything there is.
pub fn default_isolation() -> Vec<String> {
    ENTRIES.iter().map(|entry| entry.name.to_owned()).collect()
}

/// What a container's preparation may look at beyond the pod.
#[derive(Clone, Copy)]
pub struct ContainerCx<'a> {
    /// Its id.
    pub id: &'a ContainerId,
    /// As asked for.
    pub spec: &'a ContainerSpec,
    /// Its image.
    pub image: &'a Image,
    /// Its root filesystem.
    pub rootfs: &'a RootFs,
    /// The running sandbox it goes into.
    pub sandbox: &'a Sandbox,
    /// First process of the container whose process namespace is shared (`NamespaceMode::Target`).
    pub target_pid: Option<u32>,
    /// Where its image volumes are to be bound from, in the order of the mounts that ask for them.
    pub image_volumes: &'a [std::path::PathBuf],
}

/// What an isolator may look at: a pod being made (`container` is `None`: prepare the sandbox) or a container in it.
#[derive(Clone, Copy)]
pub struct Cx<'a> {
    /// The pod's id.
    pub pod_id: &'a PodId,
    /// The pod as asked for.
    pub pod: &'a PodSpec,
    /// Set when a container is prepared, `None` for the pod's sandbox.
    pub container: Option<ContainerCx<'a>>,
}

/// One aspect of isolation. Every verb has a do-nothing default. All are called by the pod's actor, one at a time per pod,
/// in row order (cleanup in reverse); different pods run at once.
#[async_trait]
pub trait Isolator: Send + Sync {
    /// Name, as in the configuration's `isolation` list.
    fn name(&self) -> &'static str;

    /// Fills in what the image says of limits and privileges where the caller said nothing: before the container is recorded, so
    /// that status and updates know it too. Synchronous and cheap.
    ///
    /// # Errors
    /// Fail the creation; nothing has been acquired then.
    fn complete(&self, spec: &mut ContainerSpec, image: &Image) -> Result<()> {
        let _ = (spec, image);
        Ok(())
    }

    /// Describes what the sandbox or container needs. May acquire things outside the process (a mount, an address): then
    /// `cleanup` gives them back, and it is called even if this fails half-way.
    ///
    /// # Errors
    /// Fail the creation; earlier isolators are cleaned up.
    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let _ = cx;
        Ok(LaunchPatch::default())
    }

    /// The process exists, blocked before exec: what can only be done to a process (systemd scope). After every `prepare`.
    ///
    /// # Errors
    /// Fail the creation.
    async fn isolate(&self, cx: &Cx<'_>, pid: u32) -> Result<()> {
        let _ = (cx, pid);
        Ok(())
    }

    /// New limits for a created or running container; `merged` is what then holds in all. Whether the container's group has them
    /// now; else its shim is told to see to it.
    ///
    /// # Errors
    /// Fail the update; nothing is recorded then, and nothing of it may hold.
    async fn update(&self, cx: &Cx<'_>, merged: &Resources) -> Result<bool> {
        let _ = (cx, merged);
        Ok(false)
    }

    /// A sample of use of the pod (`container` is `None`) or container; only the cgroups isolator answers. Synchronous and
    /// cheap: it is called for every container of a list.
    fn usage(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Option<CgroupStats> {
        let _ = (pod_id, pod, container);
        None
    }

    /// Processes of the container that were killed for lack of memory so far; only the cgroups isolator answers. Synchronous and
    /// cheap.
    fn oom_kills(&self, pod_id: &PodId, pod: &PodSpec, container: &ContainerId) -> Option<u64> {
        let _ = (pod_id, pod, container);
        None
    }

    /// Gives back what `prepare` acquired for the pod (`container` is `None`) or container. Idempotent; may be called for an
    /// unknown id; always after `prepare` has ended and the processes are dead.
    ///
    /// # Errors
    /// Kept and reported; cleanup of the other isolators goes on.
    async fn cleanup(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Result<()> {
        let _ = (pod_id, pod, container);
        Ok(())
    }

    /// After a restart, before anything else: pods that exist. What belongs to any other pod is given back.
    ///
    /// # Errors
    /// Reported; the daemon starts all the same.
    async fn recover(&self, known: &[PodId]) -> Result<()> {
        let _ = known;
        Ok(())
    }
}

/// What isolators are built from, in place of many arguments.
pub struct Deps {
    /// The on-disk tree.
    pub layout: Layout,
    /// Pod networks.
    pub network: Arc<dyn crate::network::Network>,
}
