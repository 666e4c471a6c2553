//! Making pods and containers: record, acquire step by step with an undo for each, record again. Only what is complete is
//! published. When a step fails, everything before it is undone in reverse; what cannot be undone stays recorded and
//! is shown (pod `NotReady`, container `Exited`), so that the caller's stop and remove can finish it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::LinuxNamespaceType;
use tokio::sync::watch;
use tracing::{Instrument, Span};

use super::lane::Job;
use super::names::Claim;
use super::owner::{Owner, record_container};
use super::parts::{Parts, Reply, copy, refuse_all};
use super::slot::{Basis, Slot};
use super::spans::{act_span, step_span};
use super::{Container, EventKind, Pod, admit, annotations};
use crate::disk::layout::below;
use crate::disk::pods;
use crate::isolators::{ContainerCx, Cx};
use crate::launcher::{Sandbox, TaskIo, TaskLaunch};
use crate::model::error::{Act, Error, Result};
use crate::model::phase::{ContainerPhase, Exit, PodPhase};
use crate::model::plan::LaunchPlan;
use crate::model::pod::NamespaceMode;
use crate::model::{ContainerId, ContainerSpec, PodId, PodSpec};
use crate::provisioner::pullers::artifact::is_artifact;
use crate::stdx::undo::Undo;
use crate::stdx::{blocking, clock, failpoint};

/// Stop signal when neither container nor image name one.
const SIGTERM: i32 = 15;
/// What ends a creation that hangs in the kernel.
const SIGKILL: i32 = 9;
/// Pause between two requests to give up a creation: it ends at once when the shim knows of it.
const GIVE_UP_PAUSE: Duration = Duration::from_millis(100);

/// Joined undo failures as a step's own failure.
fn all(failures: Vec<String>) -> Result<(), String> {
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

// ---- pods

/// Makes a pod, inside `span`, and then owns it. `spec.metadata` was claimed by the caller; every way out of here settles the claim.
async fn run_pod(parts: Arc<Parts>, id: PodId, spec: PodSpec, span: Span) {
    let mut claim = Claimed { parts: parts.clone(), spec: Some(spec.metadata.clone()) };
    let pod = Pod {
        id: id.clone(),
        spec,
        phase: PodPhase::Creating,
        created_at: parts.stamps.next(),
        ips: Vec::new(),
        sandbox: None,
        netns: None,
        network: None,
        leftovers: Vec::new(),
    };
    let made = acquire_pod(&parts, pod).instrument(span).await;
    match made {
        Ok(pod) => {
            let pod = Arc::new(pod);
            let mut owner = Owner::new(parts.clone(), pod.clone());
            owner.watch_sandbox();
            parts.visible.put_pod(&pod, &[EventKind::Created, EventKind::Started]);
            claim.settle(Ok(id));
            owner.run().await;
        }
        Err((error, None)) => claim.settle(Err(error)),
        Err((error, Some(remains))) => {
            let remains = Arc::new(*remains);
            let owner = Owner::new(parts.clone(), remains.clone());
            parts.visible.put_pod(&remains, &[]);
            claim.settle(Err(error));
            owner.run().await;
        }
    }
}

/// The claim on a pod's name; settled at the latest when dropped (a panic), so that nobody waits for ever.
struct Claimed {
    parts: Arc<Parts>,
    spec: Option<crate::model::pod::PodMetadata>,
}

impl Claimed {
    fn settle(&mut self, outcome: Result<PodId>) {
        let Some(name) = self.spec.take() else { return };
        let waiters = self.parts.names().settle(&name, outcome.as_ref().ok().cloned());
        for (nth, waiter) in waiters.into_iter().enumerate() {
            // The first one's span has had the id since there was one.
            if let (1.., Ok(id)) = (nth, &outcome) {
                waiter.cause().record("pod", id.as_str());
            }
            let _ = waiter.send(outcome.as_ref().map(Clone::clone).map_err(copy));
        }
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.settle(Err(Error::internal("make pod: its owner ended unexpectedly")));
    }
}

/// Acquires everything a pod needs. On failure everything is given back; if that fails too, what remains is returned, recorded.
async fn acquire_pod(parts: &Arc<Parts>, pod: Pod) -> Result<Pod, (Error, Option<Box<Pod>>)> {
    let mut undo = Undo::default();
    let created = Arc::new(pod);
    match pod_steps(parts, &created, &mut undo).await {
        Ok(pod) => {
            undo.commit();
            Ok(pod)
        }
        Err(error) => {
            let mut leftovers = undo.run().instrument(step_span!("undo", created.id)).await;
            let (layout, id) = (parts.layout.clone(), created.id.clone());
            if leftovers.is_empty() {
                // The record goes last: as long as anything is left, a restart must know of it.
                match blocking::run("remove pod directories", move || pods::remove_pod(&layout, &id)).await {
                    Ok(()) => return Err((error, None)),
                    Err(e) => leftovers.push(format!("remove directories: {e}")),
                }
            }
            let remains = Pod { phase: PodPhase::NotReady, leftovers, ..Pod::clone(&created) };
            tracing::warn!(pod = %remains.id, leftovers = ?remains.leftovers, "pod creation could not be undone completely");
            let (layout, record) = (parts.layout.clone(), remains.clone());
            let recording = blocking::run("record pod", move || pods::begin_pod(&layout, &record.id, &record));
            if let Err(e) = recording.instrument(step_span!("record", remains.id)).await {
                tracing::error!(pod = %remains.id, error = %e, "pod record could not be written");
            }
            Err((error, Some(Box::new(remains))))
        }
    }
}

async fn pod_steps(parts: &Arc<Parts>, pod: &Arc<Pod>, undo: &mut Undo) -> Result<Pod> {
    check_log_directory(pod.spec.log_directory.as_deref())?;
    let (layout, record) = (parts.layout.clone(), pod.clone());
    blocking::run("record pod", move || pods::begin_pod(&layout, &record.id, &*record)).instrument(step_span!("record", pod.id)).await?;
    failpoint::hit("run_pod.recorded");

    // Pushed before the act: cleanup is promised also to isolators that failed half-way.
    let (p, made) = (parts.clone(), pod.clone());
    undo.push("clean up isolators", move || async move { all(p.isolators.cleanup(&made.id, &made.spec, None).await) });
    let (p, made) = (parts.clone(), pod.clone());
    undo.push("end shim", move || async move { p.launcher.delete_sandbox(&made.id, &made.spec.runtime_handler, None).await.map_err(|e| e.to_string()) });
    // The shim's process comes up while the isolators work; spawning it is the first thing done, so that the other core has it.
    let cx = Cx { pod_id: &pod.id, pod: &pod.spec, container: None };
    let shim = async {
        let started = parts.launcher.start_shim(&pod.id, &pod.spec.runtime_handler).await;
        failpoint::hit("run_pod.shim_started");
        started
    };
    let shim = shim.instrument(step_span!("start_shim", pod.id));
    let (shim, plan) = tokio::join!(shim, parts.isolators.prepare(&cx).instrument(step_span!("prepare", pod.id)));
    let mut plan = plan?;
    shim?;
    if parts.launcher.is_foreign(&pod.spec.runtime_handler) {
        annotations::of_sandbox(&mut plan, pod);
    }
    failpoint::hit("run_pod.prepared");

    let making = parts.launcher.create_sandbox(&pod.id, &pod.spec.runtime_handler, &plan);
    let sandbox = making.instrument(step_span!("create_sandbox", pod.id)).await?;
    let (p, made, live) = (parts.clone(), pod.clone(), sandbox.clone());
    undo.push("delete sandbox", move || async move {
        p.launcher.delete_sandbox(&made.id, &made.spec.runtime_handler, Some(&live)).await.map_err(|e| e.to_string())
    });
    failpoint::hit("run_pod.launched");

    let netns = network_namespace(&plan, &sandbox);
    let ready = Pod { phase: PodPhase::Ready, ips: plan.ips, netns, network: plan.network, sandbox: Some(sandbox), ..Pod::clone(pod) };
    let (layout, record) = (parts.layout.clone(), ready.clone());
    blocking::run("record pod", move || pods::write_pod(&layout, &record.id, &record)).instrument(step_span!("record", pod.id)).await?;
    failpoint::hit("run_pod.ready");
    Ok(ready)
}

/// The pod's own network namespace: as planned, else as the sandbox says.
fn network_namespace(plan: &LaunchPlan, sandbox: &Sandbox) -> Option<PathBuf> {
    let planned = plan.spec.linux().as_ref().and_then(|l| l.namespaces().as_ref()).into_iter().flatten();
    let planned = planned.filter(|n| n.typ() == LinuxNamespaceType::Network).find_map(|n| n.path().clone());
    planned.or_else(|| sandbox.namespaces.get("network").cloned())
}

// ---- containers

/// A container to make, everything that can be checked without acting being checked.
pub(super) struct Order {
    pub(super) container: Container,
    pub(super) image: Arc<crate::model::image::Image>,
    pub(super) target_pid: Option<u32>,
    /// Images of its volumes with the path wanted of each, in the order of the mounts.
    pub(super) volumes: Vec<(Arc<crate::model::image::Image>, String)>,
}

/// A failed creation: why, and the container if something of it could not be undone.
pub(super) type Failed = (Error, Option<Box<Container>>);

impl Owner {
    /// `CreateContainer`: claims the name and queues the work.
    pub(super) fn create(&mut self, spec: Box<ContainerSpec>, reply: Reply<ContainerId>) {
        let name = spec.metadata.clone();
        match self.names.claim(&name, reply) {
            Claim::Joined => {}
            Claim::Exists(id, reply) => {
                reply.cause().record("container", id.as_str());
                drop(reply.send(Ok(id)));
            }
            Claim::First => match self.order(*spec) {
                Ok(order) => {
                    Span::current().record("container", order.container.id.as_str());
                    self.lane.push(Job::Create(Box::new(order)));
                }
                Err(error) => refuse_all(self.names.settle(&name, None), &error),
            },
        }
    }

    fn order(&self, mut spec: ContainerSpec) -> Result<Order> {
        let stopping = !self.is_serving();
        admit::create_container(self.pod.phase, stopping).map_err(|e| e.about("create container in pod", &self.pod.id))?;
        if spec.security.privileged && !self.pod.spec.privileged {
            return Err(Error::invalid(format!("create privileged container {}: its pod is not privileged", spec.metadata.name)));
        }
        let image = self.parts.images.resolve(&spec.image).ok_or_else(|| Error::not_found(format!("find image {:?}: it is not in the store", spec.image)))?;
        if is_artifact(&image) {
            return Err(Error::precondition(format!("run image {:?}: it is an artifact, files without a root filesystem; mount it as a volume", spec.image)));
        }
        let volumes = self.volumes(&spec)?;
        self.parts.isolators.complete(&mut spec, &image).map_err(|e| e.within(format!("create container {}", spec.metadata.name)))?;
        let log_path = log_path(self.pod.spec.log_directory.as_deref(), spec.log_path.as_deref())?;
        let target_pid = self.target_pid(&spec)?;
        let container = Container {
            id: ContainerId::random(),
            pod: self.pod.id.clone(),
            phase: ContainerPhase::Creating,
            created_at: self.parts.stamps.next(),
            image_id: image.id.clone(),
            image_ref: image_ref(&image),
            image_name: image.repo_tags.first().or(image.repo_digests.first()).unwrap_or(&spec.image).clone(),
            log_path,
            stop_signal: SIGTERM,
            user: (0, 0, Vec::new()),
            image_volumes: self.image_volumes(&spec),
            message: String::new(),
            spec,
        };
        Ok(Order { container, image, target_pid, volumes })
    }

    /// First process of the container whose process namespace `spec` wants to share; it must be running in this pod now.
    pub(super) fn target_pid(&self, spec: &ContainerSpec) -> Result<Option<u32>> {
        let NamespaceMode::Target(target) = &spec.security.namespaces.pid else { return Ok(None) };
        let missing = || Error::not_found(format!("share process namespace of container {target:?}: no such container in the pod"));
        if target.is_empty() {
            return Err(missing());
        }
        let mut found = self.slots.iter().filter(|(id, _)| id.as_str().starts_with(target.as_str())).map(|(_, slot)| slot);
        let (Some(slot), None) = (found.next(), found.next()) else { return Err(missing()) };
        match slot.container.phase {
            ContainerPhase::Running { pid, .. } => Ok(Some(pid)),
            _ => Err(Error::precondition(format!("share process namespace of container {target}: it is not running"))),
        }
    }

    /// The images of the volumes: like the container's own they must be there, nothing is pulled.
    fn volumes(&self, spec: &ContainerSpec) -> Result<Vec<(Arc<crate::model::image::Image>, String)>> {
        let missing = |name: &str| Error::not_found(format!("ImageVolumeMountFailed: find image {name:?}: it is not in the store"));
        let find = |v: &crate::model::container::ImageVolume| Ok((self.parts.images.resolve(&v.image).ok_or_else(|| missing(&v.image))?, v.sub_path.clone()));
        spec.mounts.iter().filter_map(|m| m.image.as_ref()).map(find).collect()
    }

    fn image_volumes(&self, spec: &ContainerSpec) -> BTreeMap<String, String> {
        let volumes = spec.mounts.iter().filter_map(|m| Some((m, m.image.as_ref()?)));
        volumes.filter_map(|(m, v)| Some((m.container_path.clone(), self.parts.images.resolve(&v.image)?.id.to_string()))).collect()
    }

    /// The lane has made a container, or not.
    pub(super) fn created(&mut self, name: &crate::model::container::ContainerMetadata, outcome: Result<(Container, Basis), Failed>) {
        let result = match outcome {
            Ok((container, basis)) => {
                let id = container.id.clone();
                self.slots.insert(id.clone(), Slot::new(Arc::new(container.clone()), Some(basis)));
                self.show(container, Some(EventKind::Created));
                // The sandbox may have ended while it was made; whoever looked after the others then could not see it.
                if self.pod.phase != PodPhase::Ready {
                    self.probe_created(id.clone());
                }
                Ok(id)
            }
            Err((error, None)) => Err(error),
            Err((error, Some(remains))) => {
                self.slots.insert(remains.id.clone(), Slot::new(Arc::new((*remains).clone()), None));
                self.show(*remains, Some(EventKind::Created));
                Err(error)
            }
        };
        for (nth, waiter) in self.names.settle(name, result.as_ref().ok().cloned()).into_iter().enumerate() {
            if let (1.., Ok(id)) = (nth, &result) {
                waiter.cause().record("container", id.as_str());
            }
            let _ = waiter.send(result.as_ref().map(Clone::clone).map_err(copy));
        }
    }
}

/// Acquires everything a container needs; the counterpart of `acquire_pod`. Runs in the pod's lane.
pub(super) async fn acquire_container(parts: Arc<Parts>, pod: Arc<Pod>, order: Order, given_up: watch::Receiver<bool>) -> Result<(Container, Basis), Failed> {
    let mut undo = Undo::default();
    match container_steps(&parts, &pod, &order, given_up, &mut undo).await {
        Ok(made) => {
            undo.commit();
            Ok(made)
        }
        Err(error) => {
            let mut leftovers = undo.run().instrument(step_span!("undo", pod.id, order.container.id)).await;
            let (layout, pod_id, id) = (parts.layout.clone(), pod.id.clone(), order.container.id.clone());
            if leftovers.is_empty() {
                match blocking::run("remove container directories", move || pods::remove_container(&layout, &pod_id, &id)).await {
                    Ok(()) => return Err((error, None)),
                    Err(e) => leftovers.push(format!("remove directories: {e}")),
                }
            }
            let message = format!("{error}; could not be undone: {}", leftovers.join("; "));
            tracing::warn!(container = %order.container.id, message, "container creation could not be undone completely");
            let exit = Exit::start_error(clock::now_ns(), message.clone());
            let remains = Container { phase: ContainerPhase::Exited { started_at: 0, exit }, message, ..order.container };
            if let Err(e) = record_container(&parts, &remains).await {
                tracing::error!(container = %remains.id, error = %e, "container record could not be written");
            }
            Err((error, Some(Box::new(remains))))
        }
    }
}

async fn container_steps(
    parts: &Arc<Parts>,
    pod: &Arc<Pod>,
    order: &Order,
    mut given_up: watch::Receiver<bool>,
    undo: &mut Undo,
) -> Result<(Container, Basis)> {
    let container = &order.container;
    let sandbox = pod.sandbox.as_ref().ok_or_else(|| Error::precondition(format!("create container in pod {}: it has no sandbox", pod.id)))?;
    let (layout, record) = (parts.layout.clone(), container.clone());
    blocking::run("record container", move || {
        pods::begin_container(&layout, &record.pod, &record.id, &record)?;
        // The shim only opens the file: directories are made with the daemon's view of the host.
        match record.log_path.as_deref().and_then(Path::parent) {
            Some(dir) => std::fs::create_dir_all(dir).act("create log directory", dir.display()),
            None => Ok(()),
        }
    })
    .instrument(step_span!("record", pod.id, container.id))
    .await?;
    failpoint::hit("create_container.recorded");

    let key = container.id.clone();
    let p = parts.clone();
    // Before the act, too: an interrupted provision may have left a directory or a lease.
    undo.push("release root filesystem", move || async move { p.images.release(key.as_str()).await.map_err(|e| e.to_string()) });
    let provisioning = async {
        let rootfs = parts.images.provision(container.id.as_str(), &order.image).await?;
        let mut volumes = Vec::new();
        for (number, (image, sub_path)) in order.volumes.iter().enumerate() {
            volumes.push(parts.images.provision_volume(container.id.as_str(), number, image, sub_path).await?);
        }
        Ok::<_, Error>((rootfs, volumes))
    };
    let (rootfs, image_volumes) = provisioning.instrument(step_span!("provision", pod.id, container.id)).await?;
    failpoint::hit("create_container.provisioned");

    let (p, in_pod, key) = (parts.clone(), pod.clone(), container.id.clone());
    undo.push("clean up isolators", move || async move { all(p.isolators.cleanup(&in_pod.id, &in_pod.spec, Some(&key)).await) });
    let inner = ContainerCx {
        id: &container.id,
        spec: &container.spec,
        image: &order.image,
        rootfs: &rootfs,
        sandbox,
        target_pid: order.target_pid,
        image_volumes: &image_volumes,
    };
    let cx = Cx { pod_id: &pod.id, pod: &pod.spec, container: Some(inner) };
    let mut plan = parts.isolators.prepare(&cx).instrument(step_span!("prepare", pod.id, container.id)).await?;
    if parts.launcher.is_foreign(&pod.spec.runtime_handler) {
        annotations::of_container(&mut plan, pod, &container.spec, &order.image);
    }
    failpoint::hit("create_container.prepared");

    let user = plan.spec.process().as_ref().map(|p| p.user().clone()).unwrap_or_default();
    let stop_signal = plan.stop_signal.or(container.spec.stop_signal).unwrap_or(SIGTERM);
    let io = TaskIo { log: container.log_path.clone(), stdin: container.spec.stdin, terminal: container.spec.tty };
    let launch = TaskLaunch { plan, rootfs: rootfs.mounts.clone(), io };
    let (p, pod_id, key) = (parts.clone(), pod.id.clone(), container.id.clone());
    // Before the act: a creation that timed out may go on in the shim.
    undo.push("delete task", move || async move {
        let deleted = p.limited("delete task", p.launcher.delete_task(&pod_id, &key)).await;
        deleted.map_err(|e| e.to_string())
    });
    let creating = parts.launcher.create_task(&pod.id, &container.id, &launch);
    let creating = creating.instrument(step_span!("create_task", pod.id, container.id));
    let pid = tokio::select! {
        biased;
        pid = creating => pid?,
        never = give_up(parts, container, &mut given_up) => match never {},
    };
    failpoint::hit("create_container.launched");
    if !image_volumes.is_empty() {
        // The container has bound them; a mount that stays goes with the container.
        parts.images.settle_volumes(container.id.as_str()).await?;
    }

    parts.isolators.isolate(&cx, pid).instrument(step_span!("isolate", pod.id, container.id)).await?;
    failpoint::hit("create_container.isolated");

    let user = (user.uid(), user.gid(), user.additional_gids().clone().unwrap_or_default());
    let created = Container { phase: ContainerPhase::Created { pid }, stop_signal, user, ..container.clone() };
    record_container(parts, &created).await?;
    failpoint::hit("create_container.created");
    Ok((created, Basis { image: order.image.clone(), rootfs: Arc::new(rootfs) }))
}

/// Ends the making of a container that is wanted no more; the making itself says what came of it. A request that comes before that of
/// the making finds nothing, so it is repeated.
async fn give_up(parts: &Parts, container: &Container, given_up: &mut watch::Receiver<bool>) -> Infallible {
    if given_up.wait_for(|given_up| *given_up).await.is_err() {
        // Nobody is left who could want its end.
        return std::future::pending().await;
    }
    loop {
        if let Err(error) = parts.limited("give up container", parts.launcher.kill_task(&container.pod, &container.id, SIGKILL, true)).await {
            tracing::debug!(container = %container.id, %error, "the shim does not make it yet, or not any more");
        }
        tokio::time::sleep(GIVE_UP_PAUSE).await;
    }
}

fn image_ref(image: &crate::model::image::Image) -> String {
    image.repo_digests.first().map_or(image.id.as_str(), String::as_str).to_owned()
}

// ---- logs

fn check_log_directory(directory: Option<&Path>) -> Result<()> {
    match directory {
        Some(dir) if !dir.is_absolute() || dir.components().any(|c| c == Component::ParentDir) => {
            Err(Error::invalid(format!("use log directory {}: it must be absolute and without \"..\"", dir.display())))
        }
        _ => Ok(()),
    }
}

/// `<log directory>/<log path>`, as the kubelet computes it; `None` when either is missing, which turns the log off.
///
/// # Errors
/// When the path leads out of the directory (attack case 43).
fn log_path(directory: Option<&Path>, path: Option<&Path>) -> Result<Option<PathBuf>> {
    check_log_directory(directory)?;
    let (Some(directory), Some(path)) = (directory, path) else { return Ok(None) };
    // A leading slash is joined, not obeyed, as every other runtime does.
    let relative = path.strip_prefix("/").unwrap_or(path);
    if relative.as_os_str().is_empty() {
        return Ok(None);
    }
    below(directory, relative)
        .map(Some)
        .ok_or_else(|| Error::invalid(format!("use log path {}: it leads out of the log directory {}", path.display(), directory.display())))
}

/// Answers requests that came too late.
pub(super) fn refuse(owner: &mut Owner, order: &Order) {
    let error = admit::create_container(owner.pod.phase, true).err().map_or_else(
        || Error::precondition(format!("create container in pod {}: it is being stopped", owner.pod.id)),
        |e| e.about("create container in pod", &owner.pod.id),
    );
    refuse_all(owner.names.settle(&order.container.spec.metadata, None), &error);
}

/// Claims the name of a pod and starts its making; the answer comes through the reply.
pub(super) fn begin_pod(parts: &Arc<Parts>, spec: PodSpec, reply: Reply<PodId>) {
    // The match is on a value, so that the lock is not held in its arms.
    let claim = parts.names().claim(&spec.metadata, reply);
    match claim {
        Claim::Joined => {}
        Claim::Exists(id, reply) => {
            reply.cause().record("pod", id.as_str());
            drop(reply.send(Ok(id)));
        }
        Claim::First => {
            let id = PodId::random();
            Span::current().record("pod", id.as_str());
            let span = act_span!("pod.make", id);
            drop(tokio::spawn(run_pod(parts.clone(), id, spec, span)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_paths_stay_below_the_log_directory() {
        let dir = Path::new("/var/log/pods/x");
        let path = |p: &str| log_path(Some(dir), Some(Path::new(p)));
        assert_eq!(path("c/0.log").unwrap(), Some(dir.join("c/0.log")));
        assert_eq!(path("/c/0.log").unwrap(), Some(dir.join("c/0.log")));
        assert_eq!(path("").unwrap(), None);
        for bad in ["../0.log", "c/../../0.log", "c/..", "/../x"] {
            assert!(path(bad).is_err(), "{bad}");
        }
        assert_eq!(log_path(None, Some(Path::new("x"))).unwrap(), None);
        assert_eq!(log_path(Some(dir), None).unwrap(), None);
        for bad in ["/var/log/../../etc", "relative"] {
            assert!(log_path(Some(Path::new(bad)), Some(Path::new("x"))).is_err(), "{bad}");
        }
    }
}
