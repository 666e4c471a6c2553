//! F3: pod networks. Pinned network namespaces, the loopback, the built-in bridge (netlink, addresses kept on disk, nftables) and
//! CNI plugins as the CNI specification says.
//!
//! [`build`] is the entry. `switch` chooses a network for each new pod and remembers on disk ([`record`]) which one it was, so
//! that a pod is detached by the network that attached it, whatever the configuration says by then.

pub mod bridge;
pub mod cni;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod record;
pub mod rtnl;
pub mod subnet;
mod switch;
#[cfg(test)]
mod testbed;

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::disk::Layout;
use crate::model::error::Result;
use crate::model::stats::InterfaceStats;
use crate::model::{PodId, PodSpec};

/// What a pod got from its network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Addresses without prefix length, primary first.
    pub ips: Vec<String>,
    /// Name of the network (CNI `name`, or `mesocri` for the built-in bridge).
    pub network: String,
    /// CNI result document, verbatim, when a plugin made it.
    pub result: Option<serde_json::Value>,
}

/// Why the network is (not) ready, for CRI Status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Pods can be attached.
    Ready,
    /// They cannot; the text says what is missing.
    NotReady(String),
}

/// Attaches pods. One implementation per kind (`bridge`, `cni`), chosen by configuration and by what is in the CNI directory.
#[async_trait]
pub trait Network: Send + Sync {
    /// Makes the pinned namespace at [`crate::disk::Layout::netns`], brings the loopback up, attaches the pod. On failure
    /// everything is undone. What `detach` needs is on disk before the act.
    ///
    /// # Errors
    /// The plugin's message in full, or the failed netlink act.
    async fn attach(&self, pod: &PodId, spec: &PodSpec) -> Result<Attachment>;

    /// Detaches and removes the namespace. Idempotent; safe for pods that were attached half or never, and when the
    /// namespace is gone already.
    ///
    /// # Errors
    /// When a plugin's DEL failed after its ADD had completed; the caller retries.
    async fn detach(&self, pod: &PodId, spec: &PodSpec) -> Result<()>;

    /// For Status.
    async fn readiness(&self) -> Readiness;

    /// Counters of the pod's interfaces, `lo` left out.
    ///
    /// # Errors
    /// When the namespace is gone.
    async fn stats(&self, pod: &PodId) -> Result<Vec<InterfaceStats>>;

    /// Gives the pod range to networks that are made from it (CRI UpdateRuntimeConfig); comma list for two families.
    ///
    /// # Errors
    /// `InvalidArgument` on malformed CIDRs.
    async fn set_pod_cidr(&self, cidr: &str) -> Result<()>;

    /// After a restart: frees addresses, rules, links and namespaces of pods that are not in `known`.
    ///
    /// # Errors
    /// What could not be freed.
    async fn recover(&self, known: &[PodId]) -> Result<()>;
}

/// Which network new pods get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// CNI if there is a file in its configuration directory (even an unusable one: then no pod is attached until it is
    /// repaired), else the built-in bridge.
    #[default]
    Auto,
    /// CNI plugins.
    Cni,
    /// The built-in bridge.
    Bridge,
    /// A loopback and nothing else.
    None,
}

/// Table `[network]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Which network new pods get.
    pub network: Choice,
    /// CNI networks.
    pub cni: cni::Config,
    /// The built-in bridge.
    pub bridge: bridge::Config,
}

/// Opens the networks and reads what they kept on disk. Touches no kernel state.
///
/// # Errors
/// `InvalidArgument` on a bad configuration, I/O errors on the records.
pub async fn build(config: Config, layout: Layout) -> Result<Arc<dyn Network>> {
    Ok(Arc::new(switch::Switch::open(config, layout).await?))
}

/// Removes what the built-in bridge leaves on the host when idle (`mesocri network prune`). Not while a daemon runs: the caller sees
/// to that.
///
/// # Errors
/// `FailedPrecondition` when pods are attached.
pub async fn prune(config: Config, layout: Layout) -> Result<()> {
    switch::Switch::open(config, layout).await?.teardown().await
}
