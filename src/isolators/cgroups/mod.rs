//! `cgroups`: control groups of pods and containers: where they are, what they limit, how much is used, and that nothing is
//! left of them.
//!
//! With the cgroupfs driver this isolator describes and the shim acts: it makes the container's group from the plan. With the
//! systemd driver the process is placed by [`Isolator::isolate`]: a scope needs a process to begin with. Device rules are in
//! the plan by others (`linux/devices`); they are only written here.
//!
//! A pod whose caller names a parent group (`cgroup_parent`) gets only container groups inside it: the parent is the caller's,
//! never limited and never removed. A pod without one gets a group of its own below `default_parent`.

mod oom;
mod place;
mod systemd;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use oci_spec::runtime as oci;
use serde::{Deserialize, Serialize};

use self::place::{PodPlace, scope};
use self::systemd::Systemd;
use super::parts::{config, mount, namespace, options};
use super::{ContainerCx, Cx, Deps, Entry, Isolator};
use crate::cgroups::{Detail, Host, Manager, to_oci};
use crate::disk::Layout;
use crate::model::error::{Act, Error, Result};
use crate::model::plan::LaunchPatch;
use crate::model::resources::Resources;
use crate::model::stats::CgroupStats;
use crate::model::{ContainerId, PodId, PodSpec};
use crate::stdx::{blocking, failpoint};

pub use self::place::Driver;

const NAME: &str = "cgroups";
/// Characters of the ids we give to pods; groups with other names are nobody's leftovers.
const ID_LEN: usize = 64;
/// `CAP_SYS_RESOURCE`, which allows to lower `oom_score_adj`.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| options::<Config>(NAME, table),
    create: |deps, table| {
        let config = config(NAME, table)?;
        Ok(Box::new(Cgroups::new(config, deps, Host::get()?)?))
    },
};

/// Table `[isolator.cgroups]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who makes the groups of containers: `cgroupfs` (default) or `systemd`. Must be the kubelet's choice too.
    pub driver: Driver,
    /// Where the groups of pods go whose caller names no parent. The systemd driver makes slices of that name.
    pub default_parent: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { driver: Driver::Cgroupfs, default_parent: "/mesocri".to_owned() }
    }
}

/// The isolator.
struct Cgroups {
    config: Config,
    host: Arc<Host>,
    layout: Layout,
    /// This daemon's name on groups: its state directory, of which there is one daemon at a time.
    owner: String,
    swap: bool,
    systemd: Mutex<Option<Systemd>>,
}

impl Cgroups {
    fn new(config: Config, deps: &Deps, host: Arc<Host>) -> Result<Self> {
        crate::cgroups::CgroupPath::new(&config.default_parent).map_err(|e| e.within("configuration of isolator cgroups: default_parent"))?;
        let owner = deps.layout.state.to_string_lossy().into_owned();
        Ok(Self { swap: host.accounts_swap(), config, host, layout: deps.layout.clone(), owner, systemd: Mutex::default() })
    }

    /// The group of a pod, with `default_parent` if that is missing. Noted before, so that a crash between making the parent on one
    /// hierarchy and marking it there leaves nothing that nobody owns ([`Cgroups::claim_parent`]).
    fn make_pod_group(&self, path: &str) -> Result<Manager> {
        let parent = self.manager(&self.config.default_parent)?;
        if parent.exists() {
            return Manager::create_on(self.host.clone(), path);
        }
        let note = self.layout.own_cgroup_parent();
        std::fs::write(&note, &self.config.default_parent).act("write", note.display())?;
        let made = Manager::create_on(self.host.clone(), path);
        failpoint::hit("cgroups.parent_made");
        // Another pod's call may have made it on some hierarchies, and not have marked it yet.
        parent.mark_removable();
        forget(&note)?;
        made
    }

    /// Sees to it that a parent that was being made in a crash goes with the last pod in it: now, or later by its mark.
    fn claim_parent(&self) -> Result<()> {
        let note = self.layout.own_cgroup_parent();
        let noted = match std::fs::read_to_string(&note) {
            Ok(noted) => noted,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e).act("read", note.display()),
        };
        // Half a note: the crash came before anything was made.
        if let Ok(parent) = self.manager(&noted) {
            parent.mark_removable();
            parent.remove_if_empty();
        }
        forget(&note)
    }

    fn place(&self, pod_id: &PodId, pod: &PodSpec) -> Result<PodPlace> {
        PodPlace::new(self.config.driver, &self.config.default_parent, pod_id, &pod.cgroup_parent)
    }

    fn manager(&self, path: &str) -> Result<Manager> {
        Manager::open_on(self.host.clone(), path)
    }

    async fn systemd(&self) -> Result<Systemd> {
        let kept = self.systemd.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(systemd) = kept.filter(|s| !s.is_closed()) {
            return Ok(systemd);
        }
        let systemd = Systemd::connect().await?;
        // Another caller may have done the same meanwhile; either connection is as good.
        *self.systemd.lock().unwrap_or_else(PoisonError::into_inner) = Some(systemd.clone());
        Ok(systemd)
    }

    /// The group of a container, or of the pod.
    fn group(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Result<Manager> {
        let place = self.place(pod_id, pod)?;
        match container {
            Some(id) => self.manager(place.container(id)?.as_str()),
            None => self.manager(place.path.as_str()),
        }
    }

    fn prepare_container(&self, cx: &Cx<'_>, container: &ContainerCx<'_>) -> Result<LaunchPatch> {
        let place = self.place(cx.pod_id, cx.pod)?;
        let wanted = &container.spec.resources;
        check(wanted)?;
        let mut resources = to_oci(wanted);
        if !self.swap
            && let Some(memory) = resources.memory_mut()
        {
            // Foreign runtimes fail on a swap limit that the host cannot keep.
            memory.set_swap(None);
        }
        if !self.host.is_pure_v2() {
            resources.set_unified(None);
        }
        let privileged = container.spec.security.privileged;
        let own_namespace = self.host.is_pure_v2() && !privileged;
        let access = if privileged { "rw" } else { "ro" };
        Ok(LaunchPatch {
            cgroups_path: Some(place.cgroups_path(container.id)?),
            foreign_cgroup: match self.config.driver {
                Driver::Systemd => Some(place.container(container.id)?.as_str().to_owned()),
                Driver::Cgroupfs => None,
            },
            resources: Some(resources),
            oom_score_adj: Some(oom_score(wanted.oom_score_adj.unwrap_or(0))),
            namespaces: if own_namespace { vec![namespace(oci::LinuxNamespaceType::Cgroup, None)] } else { Vec::new() },
            mounts: vec![mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access])],
            ..LaunchPatch::default()
        })
    }

    /// systemd driver: the scope, then what systemd does not know, written by us into the group it made.
    async fn place_by_systemd(&self, cx: &Cx<'_>, container: &ContainerCx<'_>, pid: u32) -> Result<()> {
        let place = self.place(cx.pod_id, cx.pod)?;
        let (Some(slice), name) = (&place.slice, scope(container.id)) else { return Ok(()) };
        let cgroups = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = std::fs::read_to_string(&cgroups).act("read", cgroups.display())?;
        // A foreign runtime may have spoken to systemd itself.
        if text.lines().any(|line| line.ends_with(&format!("/{name}"))) {
            return Ok(());
        }
        let description = self.description(container.id, cx.pod_id);
        let v2 = self.host.is_pure_v2();
        self.systemd().await?.start_scope(&name, slice, &description, pid, &container.spec.resources, v2).await?;
        let resources = self.planned(cx.pod_id, container)?;
        let (host, path, id) = (self.host.clone(), place.container(container.id)?, container.id.clone());
        let slice = self.manager(place.path.as_str())?;
        blocking::run("fill scope", move || {
            let manager = Manager::create_on(host, path.as_str())?;
            manager.apply(&resources)?;
            manager.add(pid)?;
            // Without the note the reason of an end may be missing; that is no reason to refuse containers.
            if let Err(error) = oom::begin(&slice, &id) {
                tracing::debug!(%error, "lack of memory may not be told");
            }
            Ok(())
        })
        .await
    }

    /// The resources of the bundle, which hold the device rules too; our own translation when there is no bundle.
    fn planned(&self, pod: &PodId, container: &ContainerCx<'_>) -> Result<oci::LinuxResources> {
        let path = self.layout.bundle(pod, container.id).join("config.json");
        if !path.exists() {
            return Ok(to_oci(&container.spec.resources));
        }
        let bytes = std::fs::read(&path).act("read", path.display())?;
        let spec: oci::Spec = serde_json::from_slice(&bytes).act("decode", path.display())?;
        Ok(spec.linux().as_ref().and_then(|l| l.resources().clone()).unwrap_or_else(|| to_oci(&container.spec.resources)))
    }

    /// Ties a scope to its pod and daemon, for [`Isolator::recover`].
    fn description(&self, container: &ContainerId, pod: &PodId) -> String {
        format!("mesocri container {container} of pod {pod} in {}", self.owner)
    }

    /// Groups below `default_parent` that this daemon made for pods it does not know any more.
    async fn recover_groups(&self, known: &[PodId]) -> Result<()> {
        let parent = self.manager(&self.config.default_parent)?;
        let known: Vec<String> = known.iter().map(ToString::to_string).collect();
        let owner = self.owner.clone();
        blocking::run("recover cgroups", move || {
            let mut first = None;
            for name in parent.children()? {
                let is_id = name.len() == ID_LEN && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                if !is_id || known.contains(&name) {
                    continue;
                }
                let group = parent.below(&name)?;
                if group.owner().as_deref() == Some(&*owner)
                    && let Err(e) = end(&group)
                {
                    first = first.or(Some(e));
                }
            }
            first.map_or(Ok(()), Err)
        })
        .await
    }

    /// The same for scopes.
    async fn recover_scopes(&self, known: &[PodId]) -> Result<()> {
        let systemd = self.systemd().await?;
        let suffix = format!(" in {}", self.owner);
        for (unit, description) in systemd.units("mesocri-*.scope").await? {
            let pod = description.strip_suffix(&suffix).and_then(|d| d.rsplit_once(" of pod ")).map(|(_, pod)| pod);
            if pod.is_some_and(|pod| !known.iter().any(|k| k.as_str() == pod)) {
                systemd.stop(&unit).await?;
            }
        }
        Ok(())
    }
}

/// Removes a note; the call of another pod may have done so.
fn forget(note: &Path) -> Result<()> {
    match std::fs::remove_file(note) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).act("remove", note.display()),
        _ => Ok(()),
    }
}

/// Kills what is left in a group and removes it.
fn end(group: &Manager) -> Result<()> {
    group.kill()?;
    group.delete()
}

/// What the kernel would refuse with a bare EINVAL.
fn check(r: &Resources) -> Result<()> {
    let bad = |what: String| Err(Error::invalid(what));
    if let Some(limit) = r.memory_limit.filter(|l| *l < -1) {
        return bad(format!("limit memory to {limit} bytes: negative"));
    }
    if let (Some(limit), Some(swap)) = (r.memory_limit, r.memory_swap)
        && swap >= 0
        && (limit < 0 || swap < limit)
    {
        return bad(format!("limit memory and swap to {swap} bytes: less than the memory limit of {limit}"));
    }
    Ok(())
}

/// The value the process can have: without `CAP_SYS_RESOURCE` nobody goes below the own one (the write would fail in init).
fn oom_score(wanted: i64) -> i32 {
    let read = |path: &str| std::fs::read_to_string(Path::new(path)).unwrap_or_default();
    let wanted = i32::try_from(wanted.clamp(-1000, 1000)).unwrap_or(0);
    let status = read("/proc/self/status");
    let effective = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok());
    if effective.is_none_or(|c| c & CAP_SYS_RESOURCE != 0) {
        return wanted;
    }
    let own: i32 = read("/proc/self/oom_score_adj").trim().parse().unwrap_or(0);
    if wanted < own {
        static SAID: std::sync::Once = std::sync::Once::new();
        SAID.call_once(|| tracing::warn!(own, "no CAP_SYS_RESOURCE: oom_score_adj of containers is never set below the daemon's own"));
    }
    wanted.max(own)
}

#[async_trait]
impl Isolator for Cgroups {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        if let Some(container) = &cx.container {
            return self.prepare_container(cx, container);
        }
        let place = self.place(cx.pod_id, cx.pod)?;
        if place.ours && place.slice.is_none() {
            let group = self.make_pod_group(place.path.as_str())?;
            // Without the mark a crash leaves an empty group behind; that is no reason to refuse pods.
            if let Err(e) = group.set_owner(&self.owner) {
                tracing::debug!(error = %e, "leftover groups will not be recognised");
            }
        }
        Ok(LaunchPatch::default())
    }

    async fn isolate(&self, cx: &Cx<'_>, pid: u32) -> Result<()> {
        match &cx.container {
            Some(container) if self.config.driver == Driver::Systemd => self.place_by_systemd(cx, container, pid).await,
            _ => Ok(()),
        }
    }

    async fn update(&self, cx: &Cx<'_>, merged: &Resources) -> Result<bool> {
        let Some(container) = &cx.container else { return Ok(false) };
        check(merged)?;
        let group = self.group(cx.pod_id, cx.pod, Some(container.id))?;
        // A virtual machine's runtime keeps the container elsewhere and is told by its shim.
        if !group.exists() {
            return Ok(false);
        }
        let (unit, v2) = (scope(container.id), self.host.is_pure_v2());
        if self.config.driver == Driver::Systemd {
            self.systemd().await?.set_limits(&unit, merged, v2).await?;
        }
        let mut wanted = merged.clone();
        if !self.swap {
            wanted.memory_swap = None;
        }
        // Lowering a memory limit may make the kernel reclaim for a while.
        let written = blocking::run("update cgroup", move || group.update(&wanted)).await;
        if written.is_err() && self.config.driver == Driver::Systemd {
            // The files have their former values again; systemd would write its own at the next chance.
            let former = container.spec.resources.taking_back(merged);
            let told = async { self.systemd().await?.set_limits(&unit, &former, v2).await };
            if let Err(error) = told.await {
                tracing::warn!(unit, %error, "systemd keeps limits that were refused");
            }
        }
        written.map(|()| true)
    }

    fn usage(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Option<CgroupStats> {
        self.group(pod_id, pod, container).ok()?.stats(Detail::Summary).ok()
    }

    fn oom_kills(&self, pod_id: &PodId, pod: &PodSpec, container: &ContainerId) -> Option<u64> {
        let group = self.group(pod_id, pod, Some(container)).ok()?;
        match self.config.driver {
            Driver::Cgroupfs => group.oom_kills(),
            Driver::Systemd => oom::kills(&self.group(pod_id, pod, None).ok()?, &group, container),
        }
    }

    async fn cleanup(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Result<()> {
        // A parent that was refused: nothing was made for it.
        let Ok(place) = self.place(pod_id, pod) else { return Ok(()) };
        if container.is_none() && !place.ours {
            return Ok(());
        }
        let group = self.group(pod_id, pod, container)?;
        if let (Some(id), Driver::Systemd) = (container, self.config.driver)
            && self.host.v2().is_some()
        {
            oom::end(&self.manager(place.path.as_str())?, id)?;
        }
        // The shim has removed a container's group nearly always.
        if !group.exists() {
            return Ok(());
        }
        if let Some(slice) = &place.slice {
            // systemd would ask processes to end and wait for them for a minute and a half.
            let left = group.clone();
            blocking::run("kill cgroup", move || left.kill()).await?;
            let unit = container.map_or_else(|| slice.clone(), scope);
            self.systemd().await?.stop(&unit).await?;
        }
        blocking::run("remove cgroup", move || end(&group)).await
    }

    async fn recover(&self, known: &[PodId]) -> Result<()> {
        self.recover_groups(known).await?;
        self.claim_parent()?;
        if self.config.driver == Driver::Systemd { self.recover_scopes(known).await } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
