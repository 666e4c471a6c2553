//! An engine of plain maps: pods and containers change state when told, nothing runs. What was asked of it can be read back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::containerizer::{Container, Engine, Event, EventKind, Pod};
use crate::launcher::{ExecOutput, ExecSpec};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::{FsUsage, Image, ImageConfig, RootFs};
use crate::model::phase::{ContainerPhase, Exit, PodPhase};
use crate::model::resources::Resources;
use crate::model::stats::{CgroupStats, ContainerStats, InterfaceStats};
use crate::model::{ContainerId, ContainerSpec, ImageId, PodId, PodSpec};
use crate::network::Readiness;
use crate::provisioner::{Images, PullEvent, PullRequest};

/// A ready pod.
pub fn pod(id: &str) -> Pod {
    Pod {
        id: PodId::from_string(id),
        spec: PodSpec::default(),
        phase: PodPhase::Ready,
        created_at: 1,
        ips: vec!["10.0.0.2".into(), "fd00::2".into()],
        sandbox: None,
        netns: None,
        network: None,
        leftovers: Vec::new(),
    }
}

/// Its only image.
pub fn image() -> Image {
    Image {
        id: ImageId::from_string(format!("sha256:{}", "1".repeat(64))),
        repo_tags: vec!["docker.io/library/busybox:latest".into()],
        repo_digests: vec![format!("docker.io/library/busybox@sha256:{}", "2".repeat(64))],
        layers: Vec::new(),
        config: ImageConfig { user: "1000:5".into(), ..ImageConfig::default() },
        config_json: "{\"os\":\"linux\"}".into(),
        size: 4096,
        pinned: false,
    }
}

/// The fake. Pods get the ids `pod1`, `pod2` …, containers `ctr1`, ….
pub struct Fake {
    pub ready: AtomicBool,
    pub network: Mutex<Readiness>,
    pub pods: Mutex<BTreeMap<String, Arc<Pod>>>,
    pub containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// Mutating calls, as text.
    pub calls: Mutex<Vec<String>>,
    /// Answer to the next ExecSync.
    pub exec: Mutex<Option<Result<ExecOutput>>>,
    pub store: Arc<FakeImages>,
    images: Arc<dyn Images>,
    events: broadcast::Sender<Event>,
}

/// The fake's image side.
#[derive(Default)]
pub struct FakeImages {
    pub removed: AtomicBool,
    /// Told when a pull of `slow` has begun, and when it was cancelled.
    pub pulling: Notify,
    pub cancelled: Arc<Notify>,
}

impl Default for Fake {
    fn default() -> Self {
        let store = Arc::new(FakeImages::default());
        Self {
            ready: AtomicBool::new(true),
            network: Mutex::new(Readiness::Ready),
            pods: Mutex::default(),
            containers: Mutex::default(),
            calls: Mutex::default(),
            exec: Mutex::default(),
            images: store.clone(),
            store,
            events: broadcast::channel(16).0,
        }
    }
}

fn find<T>(map: &Mutex<BTreeMap<String, Arc<T>>>, what: &str, id: &str) -> Result<Arc<T>> {
    let map = map.lock().unwrap();
    let mut found = map.iter().filter(|(key, _)| key.starts_with(id)).map(|(_, value)| value.clone());
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Error::not_found(format!("{what} {id}"))),
        _ => Err(Error::invalid(format!("{what} {id} is ambiguous"))),
    }
}

impl Fake {
    fn called(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    fn announce(&self, kind: EventKind, pod: Arc<Pod>, container: Option<Arc<Container>>) {
        let _ = self.events.send(Event { kind, at: 7, pod, container });
    }

    /// Puts a container into another phase.
    pub fn set_phase(&self, id: &str, phase: ContainerPhase) {
        let container = find(&self.containers, "container", id).unwrap();
        self.containers.lock().unwrap().insert(container.id.to_string(), Arc::new(Container { phase, ..(*container).clone() }));
    }

    fn forget_container(&self, id: &str) -> Option<Arc<Container>> {
        let container = find(&self.containers, "container", id).ok()?;
        self.containers.lock().unwrap().remove(container.id.as_str())
    }
}

#[async_trait]
impl Engine for Fake {
    fn ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    fn images(&self) -> &Arc<dyn Images> {
        &self.images
    }

    fn handlers(&self) -> Vec<String> {
        vec!["mesocri".into(), "runc".into()]
    }

    async fn network_readiness(&self) -> Readiness {
        self.network.lock().unwrap().clone()
    }

    async fn set_pod_cidr(&self, cidr: &str) -> Result<()> {
        self.called(format!("cidr {cidr}"));
        Ok(())
    }

    async fn run_pod(&self, spec: PodSpec) -> Result<PodId> {
        if spec.metadata.name == "panic" {
            panic!("a bug");
        }
        let id = format!("pod{}", self.pods.lock().unwrap().len() + 1);
        let made = Arc::new(Pod { spec, ..pod(&id) });
        self.pods.lock().unwrap().insert(id, made.clone());
        self.announce(EventKind::Created, made.clone(), None);
        Ok(made.id.clone())
    }

    async fn stop_pod(&self, id: &str) -> Result<()> {
        if let Ok(pod) = find(&self.pods, "pod", id) {
            self.pods.lock().unwrap().insert(pod.id.to_string(), Arc::new(Pod { phase: PodPhase::NotReady, ..(*pod).clone() }));
        }
        Ok(())
    }

    async fn remove_pod(&self, id: &str) -> Result<()> {
        if let Ok(pod) = find(&self.pods, "pod", id) {
            self.pods.lock().unwrap().remove(pod.id.as_str());
        }
        Ok(())
    }

    async fn update_pod_resources(&self, id: &str, overhead: Option<Resources>, resources: Option<Resources>) -> Result<()> {
        let pod = find(&self.pods, "pod", id)?;
        self.called(format!("pod resources {} {} {}", pod.id, overhead.is_some(), resources.is_some()));
        Ok(())
    }

    async fn create_container(&self, pod: &str, spec: ContainerSpec) -> Result<ContainerId> {
        let (pod, image) = (find(&self.pods, "pod", pod)?, image());
        let id = ContainerId::from_string(format!("ctr{}", self.containers.lock().unwrap().len() + 1));
        let container = Arc::new(Container {
            id: id.clone(),
            pod: pod.id.clone(),
            phase: ContainerPhase::Created { pid: 41 },
            created_at: 2,
            image_id: image.id,
            image_ref: image.repo_digests.concat(),
            image_name: image.repo_tags.concat(),
            log_path: spec.log_path.as_ref().map(|p| Path::new("/logs").join(p)),
            stop_signal: spec.stop_signal.unwrap_or(libc::SIGTERM),
            user: (1000, 5, vec![5, 6]),
            image_volumes: BTreeMap::new(),
            message: String::new(),
            spec,
        });
        self.containers.lock().unwrap().insert(id.to_string(), container.clone());
        self.announce(EventKind::Created, pod, Some(container));
        Ok(id)
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let container = find(&self.containers, "container", id)?;
        if !matches!(container.phase, ContainerPhase::Created { .. }) {
            return Err(Error::precondition(format!("start container {id}: it is not created")));
        }
        self.set_phase(id, ContainerPhase::Running { pid: 41, started_at: 3 });
        Ok(())
    }

    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        self.called(format!("stop {id} {}", grace.as_secs()));
        if find(&self.containers, "container", id).is_ok() {
            self.set_phase(id, ContainerPhase::Exited { started_at: 3, exit: Exit::of_process(137, 4, true) });
        }
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        if let Some(container) = self.forget_container(id)
            && let Ok(pod) = find(&self.pods, "pod", container.pod.as_str())
        {
            self.announce(EventKind::Deleted, pod, Some(container));
        }
        Ok(())
    }

    async fn update_container(&self, id: &str, resources: Resources) -> Result<()> {
        let container = find(&self.containers, "container", id)?;
        let spec = ContainerSpec { resources: container.spec.resources.updated_by(&resources), ..container.spec.clone() };
        self.containers.lock().unwrap().insert(container.id.to_string(), Arc::new(Container { spec, ..(*container).clone() }));
        Ok(())
    }

    async fn reopen_log(&self, id: &str) -> Result<()> {
        find(&self.containers, "container", id).map(|c| self.called(format!("reopen {}", c.id)))
    }

    async fn exec_sync(&self, id: &str, exec: ExecSpec) -> Result<ExecOutput> {
        find(&self.containers, "container", id)?;
        self.called(format!("exec {:?} {:?} {}", exec.args, exec.timeout, exec.output_limit));
        self.exec.lock().unwrap().take().unwrap_or_else(|| Ok(ExecOutput::default()))
    }

    fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        find(&self.pods, "pod", id)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        find(&self.containers, "container", id)
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.lock().unwrap().values().cloned().collect()
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.lock().unwrap().values().cloned().collect()
    }

    fn container_stats(&self, container: &Container) -> ContainerStats {
        let runs = matches!(container.phase, ContainerPhase::Running { .. });
        let cgroup = CgroupStats { at: 5, cpu_usage: Some(6), pids: Some(2), ..CgroupStats::default() };
        ContainerStats { cgroup: runs.then_some(cgroup), writable: Some((FsUsage { bytes: 4096, inodes: 1 }, 4)) }
    }

    fn pod_stats(&self, _: &Pod) -> Option<CgroupStats> {
        Some(CgroupStats { at: 5, cpu_usage: Some(60), pids: Some(3), ..CgroupStats::default() })
    }

    async fn network_stats(&self, _: &Pod) -> Vec<InterfaceStats> {
        vec![InterfaceStats { name: "eth0".into(), rx_bytes: 9, ..InterfaceStats::default() }]
    }

    fn runtime_spec(&self, _: &Container) -> Option<serde_json::Value> {
        Some(serde_json::json!({ "ociVersion": "1.2.0" }))
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}

#[async_trait]
impl Images for FakeImages {
    async fn pull(&self, request: PullRequest, _: Option<mpsc::UnboundedSender<PullEvent>>, cancel: CancellationToken) -> Result<ImageId> {
        match request.reference.repository() {
            "library/slow" => {
                // The work is a task of its own, as the real one's: dropping the caller alone does not end it.
                let cancelled = self.cancelled.clone();
                let work = tokio::spawn(async move {
                    cancel.cancelled().await;
                    cancelled.notify_one();
                });
                self.pulling.notify_one();
                let _ = work.await;
                Err(Error::new(Kind::Cancelled, "pull"))
            }
            "library/offline" => Err(Error::new(Kind::Unavailable, "RegistryUnavailable: no route").within("fetch manifest")),
            _ => Ok(image().id),
        }
    }

    async fn load(&self, _: &Path) -> Result<Vec<ImageId>> {
        Ok(Vec::new())
    }

    fn list(&self) -> Vec<Arc<Image>> {
        if self.removed.load(Ordering::Relaxed) { Vec::new() } else { vec![Arc::new(image())] }
    }

    fn resolve(&self, key: &str) -> Option<Arc<Image>> {
        self.list()
            .into_iter()
            .find(|i| i.id.as_str() == key || i.repo_tags.iter().chain(&i.repo_digests).any(|name| name == key || name.contains(&format!("/{key}:"))))
    }

    async fn remove(&self, key: &str) -> Result<()> {
        if self.resolve(key).is_some() {
            self.removed.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn fs_info(&self) -> Result<(PathBuf, FsUsage)> {
        Ok((PathBuf::from("/var"), FsUsage { bytes: 8192, inodes: 3 }))
    }

    async fn unexplained(&self) -> Result<FsUsage> {
        Ok(FsUsage { bytes: 4096, inodes: 1 })
    }

    async fn provision(&self, _: &str, _: &Image) -> Result<RootFs> {
        Err(Error::internal("the front provisions nothing"))
    }

    fn check_container(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn release(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn usage(&self, _: &str) -> Option<(FsUsage, i64)> {
        None
    }

    async fn recover(&self, _: &[String]) -> Result<()> {
        Ok(())
    }
}
