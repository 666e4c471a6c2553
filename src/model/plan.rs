//! The launch plan: an OCI runtime spec plus the few things it cannot say, merged from the patches of the isolators.
//!
//! Isolators describe, the launcher acts. Each isolator's `prepare` returns a [`LaunchPatch`]; [`LaunchPlan::apply`] merges it and
//! remembers who set each scalar, so two isolators that disagree are an error which names both (design §1.2).

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime as oci;
use serde::{Deserialize, Serialize};

use super::error::{Error, Kind};

/// File in a bundle that carries [`Extras`]; absent in bundles that other software wrote.
pub const EXTRAS_FILE: &str = "mesocri.json";
/// Version of the OCI runtime specification that the plan keeps to; the oldest one that knows `rro` mounts.
const OCI_VERSION: &str = "1.0.2";

/// What the OCI spec cannot say. Written beside `config.json`, read by `init` and the shim only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Extras {
    /// Compiled filter (array of `sock_filter`, host byte order) loaded instead of compiling `linux.seccomp`.
    pub seccomp_bpf: Option<PathBuf>,
    /// Environment entries `NAME=value` that are not UTF-8 and so cannot stand in `process.env`; appended after it.
    pub env_bytes: Vec<Vec<u8>>,
    /// The daemon places the process after the fork (systemd driver) into the group with this path below the hierarchies' roots:
    /// the shim must not create it. Afterwards it is like one of the shim's own: execs join it, and it is emptied and removed.
    pub foreign_cgroup: Option<String>,
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
    /// Destinations at and below which earlier isolators' mounts are taken out again, before `mounts` of this patch go in.
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
    pub foreign_cgroup: Option<String>,
    /// Signal that asks the process to stop (not part of the spec; kept in the container's record).
    pub stop_signal: Option<i32>,
    /// Facts for status: addresses of the pod, primary first.
    pub ips: Vec<String>,
    /// Facts for verbose status: what the pod's network was made of.
    pub network: Option<serde_json::Value>,
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
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// The OCI runtime spec; what any runtime can execute. [`LaunchPlan::finish`] writes its environment.
    pub spec: oci::Spec,
    /// The rest, for our own init.
    pub extras: Extras,
    /// Stop signal number, if an isolator named one.
    pub stop_signal: Option<i32>,
    /// Addresses of the pod, primary first.
    pub ips: Vec<String>,
    /// What the pod's network was made of, for verbose status.
    pub network: Option<serde_json::Value>,
    /// Environment in order, one entry per name.
    env: Vec<(String, Vec<u8>)>,
    owners: Owners,
}

impl Default for LaunchPlan {
    /// A container's empty plan.
    fn default() -> Self {
        Self::for_cx(true)
    }
}

/// Sets an optional scalar of the plan from one of the patch, unless another isolator set it to something else.
macro_rules! scalar {
    ($owners:expr, $by:expr, $name:literal, $have:expr, $wanted:expr, $value:ident => $set:expr) => {
        if let Some($value) = $wanted {
            $owners.claim($name, $by, $have == Some(&$value))?;
            $set;
        }
    };
}

impl LaunchPlan {
    /// The starting point: a container's plan has a root, a process and mounts, a sandbox's has none of them.
    pub fn for_cx(container: bool) -> Self {
        let mut spec = oci::Spec::default();
        spec.set_version(OCI_VERSION.to_owned()).set_hostname(None).set_annotations(None).set_linux(Some(empty_linux()));
        if container {
            let mut root = oci::Root::default();
            root.set_path(PathBuf::from("rootfs")).set_readonly(Some(false));
            spec.set_root(Some(root)).set_process(Some(empty_process())).set_mounts(Some(Vec::new()));
        } else {
            spec.set_root(None).set_process(None).set_mounts(None);
        }
        Self { spec, extras: Extras::default(), stop_signal: None, ips: Vec::new(), network: None, env: Vec::new(), owners: Owners::default() }
    }

    /// Merges the patch of isolator `by`.
    ///
    /// # Errors
    /// [`Conflict`] when another isolator set a scalar, a map's key or a namespace to a different value. The plan is of no
    /// use then.
    pub fn apply(&mut self, by: &str, mut patch: LaunchPatch) -> Result<(), Conflict> {
        if patch.wants_process() {
            self.apply_process(by, &mut patch)?;
        }
        self.apply_mounts(by, &mut patch)?;
        self.apply_linux(by, &mut patch)?;
        self.apply_rest(by, patch)
    }

    /// Last step: writes the environment, and sorts mounts so that a parent comes before what lies in it. Mounts of one
    /// depth stay in the order of the isolators.
    pub fn finish(&mut self) {
        if let Some(mounts) = self.spec.mounts_mut() {
            mounts.sort_by_key(|m| m.destination().components().count());
        }
        self.extras.env_bytes.clear();
        let mut text = Vec::with_capacity(self.env.len());
        for (name, value) in &self.env {
            match std::str::from_utf8(value) {
                Ok(value) => text.push(format!("{name}={value}")),
                Err(_) => self.extras.env_bytes.push([name.as_bytes(), b"=", value].concat()),
            }
        }
        if let Some(process) = self.spec.process_mut() {
            process.set_env(Some(text));
        }
    }

    fn apply_process(&mut self, by: &str, patch: &mut LaunchPatch) -> Result<(), Conflict> {
        let owners = &mut self.owners;
        let p = self.spec.process_mut().get_or_insert_with(empty_process);
        for (name, value) in patch.env.drain(..) {
            match self.env.iter_mut().find(|(have, _)| *have == name) {
                Some((_, have)) => *have = value,
                None => self.env.push((name, value)),
            }
        }
        scalar!(owners, by, "process.args", p.args().as_ref(), patch.args.take(), v => p.set_args(Some(v)));
        scalar!(owners, by, "process.cwd", Some(p.cwd()), patch.cwd.take().map(PathBuf::from), v => p.set_cwd(v));
        scalar!(owners, by, "process.user", Some(p.user()), patch.user.take(), v => p.set_user(v));
        scalar!(owners, by, "process.terminal", p.terminal().as_ref(), patch.terminal.take(), v => p.set_terminal(Some(v)));
        scalar!(owners, by, "process.noNewPrivileges", p.no_new_privileges().as_ref(), patch.no_new_privileges.take(), v => p.set_no_new_privileges(Some(v)));
        scalar!(owners, by, "process.capabilities", p.capabilities().as_ref(), patch.capabilities.take(), v => p.set_capabilities(Some(v)));
        scalar!(owners, by, "process.oomScoreAdj", p.oom_score_adj().as_ref(), patch.oom_score_adj.take(), v => p.set_oom_score_adj(Some(v)));
        scalar!(owners, by, "process.apparmorProfile", p.apparmor_profile().as_ref(), patch.apparmor_profile.take(), v => p.set_apparmor_profile(Some(v)));
        scalar!(owners, by, "process.selinuxLabel", p.selinux_label().as_ref(), patch.selinux_label.take(), v => p.set_selinux_label(Some(v)));
        if !patch.rlimits.is_empty() {
            let mut rlimits = p.rlimits().clone().unwrap_or_default();
            rlimits.append(&mut patch.rlimits);
            p.set_rlimits(Some(rlimits));
        }
        Ok(())
    }

    fn apply_mounts(&mut self, by: &str, patch: &mut LaunchPatch) -> Result<(), Conflict> {
        if let Some(readonly) = patch.root_readonly.take() {
            let root = self.spec.root_mut().get_or_insert_with(oci::Root::default);
            self.owners.claim("root.readonly", by, root.readonly() == Some(readonly))?;
            root.set_readonly(Some(readonly));
        }
        if let Some(mounts) = self.spec.mounts_mut() {
            mounts.retain(|m| !patch.remove_mounts.iter().any(|gone| below(m.destination(), Path::new(gone))));
        }
        for mount in patch.mounts.drain(..) {
            let mounts = self.spec.mounts_mut().get_or_insert_default();
            match mounts.iter_mut().find(|m| below(m.destination(), mount.destination()) && below(mount.destination(), m.destination())) {
                Some(have) => *have = mount,
                None => mounts.push(mount),
            }
        }
        Ok(())
    }

    fn apply_linux(&mut self, by: &str, patch: &mut LaunchPatch) -> Result<(), Conflict> {
        let owners = &mut self.owners;
        let l = self.spec.linux_mut().get_or_insert_with(empty_linux);
        for namespace in patch.namespaces.drain(..) {
            let all = l.namespaces_mut().get_or_insert_default();
            let have = all.iter().find(|n| n.typ() == namespace.typ());
            owners.claim(&format!("linux.namespaces[{}]", namespace.typ()), by, have == Some(&namespace))?;
            if have.is_none() {
                all.push(namespace);
            }
        }
        if !patch.devices.is_empty() {
            l.devices_mut().get_or_insert_default().append(&mut patch.devices);
        }
        if let Some(mut wanted) = patch.resources.take() {
            // Device rules are a list of many isolators, the rest is one isolator's scalar.
            patch.device_rules.extend(wanted.devices_mut().take().unwrap_or_default());
            let resources = l.resources_mut().get_or_insert_default();
            let rules = resources.devices_mut().take();
            owners.claim("linux.resources", by, *resources == wanted)?;
            wanted.set_devices(rules);
            *resources = wanted;
        }
        if !patch.device_rules.is_empty() {
            l.resources_mut().get_or_insert_default().devices_mut().get_or_insert_default().append(&mut patch.device_rules);
        }
        merge(owners, "linux.sysctl", by, l.sysctl_mut(), std::mem::take(&mut patch.sysctl))?;
        scalar!(owners, by, "linux.cgroupsPath", l.cgroups_path().as_ref(), patch.cgroups_path.take().map(PathBuf::from), v => l.set_cgroups_path(Some(v)));
        scalar!(owners, by, "linux.seccomp", l.seccomp().as_ref(), patch.seccomp.take(), v => l.set_seccomp(Some(v)));
        scalar!(owners, by, "linux.rootfsPropagation", l.rootfs_propagation().as_ref(), patch.rootfs_propagation.take(), v => l.set_rootfs_propagation(Some(v)));
        scalar!(owners, by, "linux.mountLabel", l.mount_label().as_ref(), patch.mount_label.take(), v => l.set_mount_label(Some(v)));
        scalar!(owners, by, "linux.maskedPaths", l.masked_paths().as_ref(), patch.masked_paths.take(), v => l.set_masked_paths(Some(v)));
        scalar!(owners, by, "linux.readonlyPaths", l.readonly_paths().as_ref(), patch.readonly_paths.take(), v => l.set_readonly_paths(Some(v)));
        Ok(())
    }

    fn apply_rest(&mut self, by: &str, mut patch: LaunchPatch) -> Result<(), Conflict> {
        let owners = &mut self.owners;
        merge(owners, "annotations", by, self.spec.annotations_mut(), patch.annotations)?;
        scalar!(owners, by, "hostname", self.spec.hostname().as_ref(), patch.hostname, v => self.spec.set_hostname(Some(v)));
        scalar!(owners, by, "seccompBpf", self.extras.seccomp_bpf.as_ref(), patch.seccomp_bpf, v => self.extras.seccomp_bpf = Some(v));
        scalar!(owners, by, "foreignCgroup", self.extras.foreign_cgroup.as_ref(), patch.foreign_cgroup, v => self.extras.foreign_cgroup = Some(v));
        scalar!(owners, by, "stopSignal", self.stop_signal.as_ref(), patch.stop_signal, v => self.stop_signal = Some(v));
        scalar!(owners, by, "network", self.network.as_ref(), patch.network, v => self.network = Some(v));
        self.ips.append(&mut patch.ips);
        Ok(())
    }
}

impl LaunchPatch {
    /// Whether anything in it belongs to a process.
    fn wants_process(&self) -> bool {
        self.args.is_some()
            || self.cwd.is_some()
            || self.user.is_some()
            || self.terminal.is_some()
            || self.no_new_privileges.is_some()
            || self.capabilities.is_some()
            || self.oom_score_adj.is_some()
            || self.apparmor_profile.is_some()
            || self.selinux_label.is_some()
            || !self.rlimits.is_empty()
            || !self.env.is_empty()
    }
}

/// Who set which field.
#[derive(Clone, Debug, Default)]
struct Owners(BTreeMap<String, String>);

impl Owners {
    /// `by` sets `field`; `same`: the plan holds that value already. The first to set a field stays its owner.
    fn claim(&mut self, field: &str, by: &str, same: bool) -> Result<(), Conflict> {
        match self.0.get(field) {
            Some(first) if !same => Err(Conflict { field: field.to_owned(), first: first.clone(), second: by.to_owned() }),
            Some(_) => Ok(()),
            None => {
                self.0.insert(field.to_owned(), by.to_owned());
                Ok(())
            }
        }
    }
}

/// Adds `more` to an optional map, one owner per key.
fn merge(owners: &mut Owners, field: &str, by: &str, map: &mut Option<HashMap<String, String>>, more: BTreeMap<String, String>) -> Result<(), Conflict> {
    for (key, value) in more {
        let map = map.get_or_insert_default();
        owners.claim(&format!("{field}[{key}]"), by, map.get(&key) == Some(&value))?;
        map.insert(key, value);
    }
    Ok(())
}

/// Whether `path` is `base` or lies in it; `.` and doubled or trailing slashes do not count.
fn below(path: &Path, base: &Path) -> bool {
    let plain = |c: &Component<'_>| !matches!(c, Component::CurDir);
    let mut path = path.components().filter(plain);
    base.components().filter(plain).all(|c| path.next() == Some(c))
}

/// A process with nothing in it: the crate's own default is a shell with capabilities and limits.
fn empty_process() -> oci::Process {
    let mut process = oci::Process::default();
    process
        .set_terminal(None)
        .set_console_size(None)
        .set_user(oci::User::default())
        .set_args(None)
        .set_env(None)
        .set_cwd(PathBuf::from("/"))
        .set_capabilities(None)
        .set_rlimits(None)
        .set_no_new_privileges(None);
    process
}

/// A `linux` part with nothing in it: the crate's own default has namespaces and masks.
fn empty_linux() -> oci::Linux {
    let mut linux = oci::Linux::default();
    linux.set_resources(None).set_namespaces(Some(Vec::new())).set_masked_paths(None).set_readonly_paths(None);
    linux
}

#[cfg(test)]
mod tests;
