//! Fakes of images, launcher, network and an isolator over one [`World`], which keeps book of everything that is held, of every
//! call, and fails or holds up calls on cue.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::isolators::{Cx, Isolator};
use crate::launcher::{ExecOutput, ExecSpec, Launcher, Sandbox, TaskLaunch, TaskState};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::{FsUsage, Image, ImageConfig, RootFs};
use crate::model::plan::{LaunchPatch, LaunchPlan};
use crate::model::resources::Resources;
use crate::model::stats::{CgroupStats, InterfaceStats};
use crate::model::{ContainerId, ImageId, PodId, PodSpec};
use crate::network::{Attachment, Network, Readiness};
use crate::provisioner::{Images, PullEvent, PullRequest};
use crate::stdx::clock;

/// Everything outside the containerizer. Survives its crashes.
pub struct World {
    held: Mutex<BTreeSet<String>>,
    calls: watch::Sender<Vec<String>>,
    cues: Mutex<HashMap<String, Kind>>,
    late: Mutex<HashMap<String, Kind>>,
    /// What the isolator was last told to limit.
    pub limits: Mutex<Option<Resources>>,
    /// Annotations of the sandboxes and tasks made, in order.
    pub annotations: Mutex<Vec<HashMap<String, String>>>,
    fail_at: Mutex<Option<usize>>,
    panics: Mutex<Option<String>>,
    gates: Mutex<HashMap<String, watch::Sender<bool>>>,
    sandboxes: Mutex<HashMap<PodId, watch::Sender<bool>>>,
    tasks: Mutex<HashMap<ContainerId, FakeTask>>,
    /// Signals sent: container, number, to all, when.
    pub signals: watch::Sender<Vec<(ContainerId, i32, bool, std::time::Instant)>>,
    /// Kills for lack of memory.
    pub oom_kills: Mutex<u64>,
}

struct FakeTask {
    pod: PodId,
    state: watch::Sender<TaskState>,
    deaf: bool,
    immortal: bool,
}

impl World {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            held: Mutex::default(),
            calls: watch::Sender::new(Vec::new()),
            cues: Mutex::default(),
            late: Mutex::default(),
            limits: Mutex::default(),
            annotations: Mutex::default(),
            fail_at: Mutex::default(),
            panics: Mutex::default(),
            gates: Mutex::default(),
            sandboxes: Mutex::default(),
            tasks: Mutex::default(),
            signals: watch::Sender::new(Vec::new()),
            oom_kills: Mutex::default(),
        })
    }

    /// What is held now.
    pub fn held(&self) -> Vec<String> {
        self.held.lock().unwrap().iter().cloned().collect()
    }

    /// Calls so far.
    pub fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    pub fn count(&self, call: &str) -> usize {
        self.calls.borrow().iter().filter(|c| *c == call).count()
    }

    /// Waits until `call` has been made `n` times.
    pub async fn reached(&self, call: &str, n: usize) {
        self.calls.subscribe().wait_for(|calls| calls.iter().filter(|c| *c == call).count() >= n).await.unwrap();
    }

    /// Every further `call` fails.
    pub fn fail(&self, call: &str, kind: Kind) {
        self.cues.lock().unwrap().insert(call.to_owned(), kind);
    }

    /// Every further `call` is done and fails all the same: its answer did not come in time.
    pub fn fail_late(&self, call: &str, kind: Kind) {
        self.late.lock().unwrap().insert(call.to_owned(), kind);
    }

    pub fn heal(&self, call: &str) {
        self.cues.lock().unwrap().remove(call);
        self.late.lock().unwrap().remove(call);
    }

    fn answer(&self, call: &str) -> Result<()> {
        match self.late.lock().unwrap().get(call) {
            Some(kind) => Err(Error::new(*kind, format!("{call} answers too late, on cue"))),
            None => Ok(()),
        }
    }

    /// The `n`-th call from now on fails, whatever it is; `None` none does. Says whether the last cue was used.
    pub fn fail_nth(&self, n: Option<usize>) -> bool {
        let next = n.map(|n| self.calls.borrow().len() + n);
        std::mem::replace(&mut *self.fail_at.lock().unwrap(), next).is_none()
    }

    /// The next `call` panics.
    pub fn panic_at(&self, call: &str) {
        *self.panics.lock().unwrap() = Some(call.to_owned());
    }

    /// Holds up every further `call` until the gate is opened.
    pub fn hold(&self, call: &str) {
        self.gates.lock().unwrap().insert(call.to_owned(), watch::Sender::new(false));
    }

    pub fn open(&self, call: &str) {
        if let Some(gate) = self.gates.lock().unwrap().remove(call) {
            gate.send_replace(true);
        }
    }

    async fn pass(&self, call: &str) -> Result<()> {
        let mut number = 0;
        self.calls.send_modify(|calls| {
            number = calls.len();
            calls.push(call.to_owned());
        });
        let gate = self.gates.lock().unwrap().get(call).map(watch::Sender::subscribe);
        if let Some(mut gate) = gate {
            let _ = gate.wait_for(|open| *open).await;
        }
        let panics = self.panics.lock().unwrap().take_if(|name| name == call).is_some();
        assert!(!panics, "panic on cue at {call}");
        let nth = self.fail_at.lock().unwrap().take_if(|at| *at == number).is_some();
        match self.cues.lock().unwrap().get(call) {
            Some(kind) => Err(Error::new(*kind, format!("{call} fails on cue"))),
            None if nth => Err(Error::internal(format!("{call} fails on cue"))),
            None => Ok(()),
        }
    }

    fn hold_thing(&self, thing: String) {
        self.held.lock().unwrap().insert(thing);
    }

    fn drop_thing(&self, thing: &str) {
        self.held.lock().unwrap().remove(thing);
    }

    // ---- processes

    /// The container's process ends by itself.
    pub fn exit(&self, id: &ContainerId, code: i32) {
        self.tasks.lock().unwrap()[id].state.send_replace(TaskState::Exited { code, at: clock::now_ns() });
    }

    /// The container ignores its stop signal.
    pub fn deafen(&self, id: &ContainerId) {
        self.tasks.lock().unwrap().get_mut(id).unwrap().deaf = true;
    }

    /// The container does not even die of SIGKILL (uninterruptible sleep).
    pub fn immortalise(&self, id: &ContainerId) {
        self.tasks.lock().unwrap().get_mut(id).unwrap().immortal = true;
    }

    /// It can be killed again.
    pub fn mortalise(&self, id: &ContainerId) {
        self.tasks.lock().unwrap().get_mut(id).unwrap().immortal = false;
    }

    /// The shim forgets a task.
    pub fn forget(&self, id: &ContainerId) {
        self.tasks.lock().unwrap().remove(id);
    }

    /// The shim of a pod is killed; its containers live on as orphans until somebody deletes them.
    pub fn kill_shim(&self, pod: &PodId) {
        if let Some(alive) = self.sandboxes.lock().unwrap().remove(pod) {
            alive.send_replace(false);
        }
    }

    /// What happens to every process and mount when the machine restarts.
    pub fn reboot(&self) {
        self.sandboxes.lock().unwrap().clear();
        self.tasks.lock().unwrap().clear();
        self.held.lock().unwrap().retain(|thing| thing.starts_with("rootfs"));
    }

    pub fn shim_alive(&self, pod: &PodId) -> bool {
        self.sandboxes.lock().unwrap().contains_key(pod)
    }

    fn sandbox(&self, pod: &PodId) -> Option<watch::Receiver<bool>> {
        self.sandboxes.lock().unwrap().get(pod).map(watch::Sender::subscribe)
    }

    fn task(&self, id: &ContainerId) -> Option<watch::Receiver<TaskState>> {
        self.tasks.lock().unwrap().get(id).map(|t| t.state.subscribe())
    }
}

pub struct FakeLauncher(pub Arc<World>);

impl FakeLauncher {
    fn shim(&self, pod: &PodId) -> Result<watch::Receiver<bool>> {
        self.0.sandbox(pod).ok_or_else(|| Error::new(Kind::Unavailable, "shim is dead"))
    }
}

#[async_trait]
impl Launcher for FakeLauncher {
    fn handlers(&self) -> Vec<String> {
        vec!["mesocri".into(), "other".into()]
    }

    async fn start_shim(&self, pod: &PodId, _: &str) -> Result<()> {
        self.0.pass("start_shim").await?;
        self.0.hold_thing(format!("shim {pod}"));
        Ok(())
    }

    async fn create_sandbox(&self, pod: &PodId, _: &str, plan: &LaunchPlan) -> Result<Sandbox> {
        self.0.pass("create_sandbox").await?;
        self.0.annotations.lock().unwrap().push(plan.spec.annotations().clone().unwrap_or_default());
        self.0.sandboxes.lock().unwrap().insert(pod.clone(), watch::Sender::new(true));
        self.0.hold_thing(format!("sandbox {pod}"));
        Ok(Sandbox { pid: 10, shim_pid: 10, address: "unix:///x".into(), namespaces: BTreeMap::new() })
    }

    async fn reattach(&self, pod: &PodId, _: &str, _: &Sandbox) -> Result<()> {
        self.0.pass("reattach").await?;
        self.0.sandbox(pod).map(drop).ok_or_else(|| Error::not_found("shim is dead"))
    }

    async fn wait_sandbox(&self, pod: &PodId) {
        if let Some(mut alive) = self.0.sandbox(pod) {
            let _ = alive.wait_for(|alive| !alive).await;
        }
    }

    async fn stop_sandbox(&self, pod: &PodId) -> Result<()> {
        self.0.pass("stop_sandbox").await?;
        self.0.kill_shim(pod);
        Ok(())
    }

    async fn delete_sandbox(&self, pod: &PodId, _: &str, _: Option<&Sandbox>) -> Result<()> {
        self.0.pass("delete_sandbox").await?;
        self.0.kill_shim(pod);
        let tasks: Vec<_> = self.0.tasks.lock().unwrap().iter().filter(|(_, t)| t.pod == *pod).map(|(id, _)| id.clone()).collect();
        for id in tasks {
            self.0.forget(&id);
            self.0.drop_thing(&format!("task {id}"));
        }
        self.0.drop_thing(&format!("sandbox {pod}"));
        self.0.drop_thing(&format!("shim {pod}"));
        Ok(())
    }

    async fn create_task(&self, pod: &PodId, id: &ContainerId, launch: &TaskLaunch) -> Result<u32> {
        self.0.pass("create_task").await?;
        self.0.annotations.lock().unwrap().push(launch.plan.spec.annotations().clone().unwrap_or_default());
        self.shim(pod)?;
        let task = FakeTask { pod: pod.clone(), state: watch::Sender::new(TaskState::Created { pid: 20 }), deaf: false, immortal: false };
        self.0.tasks.lock().unwrap().insert(id.clone(), task);
        self.0.hold_thing(format!("task {id}"));
        self.0.answer("create_task")?;
        Ok(20)
    }

    async fn start_task(&self, pod: &PodId, id: &ContainerId) -> Result<()> {
        self.0.pass("start_task").await?;
        self.shim(pod)?;
        self.0.tasks.lock().unwrap()[id].state.send_replace(TaskState::Running { pid: 20 });
        self.0.answer("start_task")
    }

    async fn kill_task(&self, pod: &PodId, id: &ContainerId, signal: i32, all: bool) -> Result<()> {
        self.0.pass("kill_task").await?;
        self.shim(pod)?;
        {
            let tasks = self.0.tasks.lock().unwrap();
            let task = tasks.get(id).ok_or_else(|| Error::not_found("no such task"))?;
            if !task.immortal && (signal == 9 || !task.deaf) {
                task.state.send_replace(TaskState::Exited { code: 128 + signal, at: clock::now_ns() });
            }
        }
        self.0.signals.send_modify(|s| s.push((id.clone(), signal, all, std::time::Instant::now())));
        Ok(())
    }

    async fn wait_task(&self, pod: &PodId, id: &ContainerId) -> Result<(i32, i64)> {
        let mut alive = self.shim(pod)?;
        self.0.answer("wait_task")?;
        let mut state = self.0.task(id).ok_or_else(|| Error::not_found("no such task"))?;
        tokio::select! {
            biased;
            ended = state.wait_for(|s| matches!(s, TaskState::Exited { .. })) => match ended.as_deref() {
                Ok(TaskState::Exited { code, at }) => Ok((*code, *at)),
                _ => Err(Error::new(Kind::Unavailable, "task was forgotten")),
            },
            _ = alive.wait_for(|alive| !alive) => Err(Error::new(Kind::Unavailable, "shim vanished")),
        }
    }

    async fn task_state(&self, pod: &PodId, id: &ContainerId) -> Result<TaskState> {
        self.0.pass("task_state").await?;
        self.shim(pod)?;
        Ok(self.0.task(id).map_or(TaskState::Gone, |s| s.borrow().clone()))
    }

    async fn delete_task(&self, _: &PodId, id: &ContainerId) -> Result<()> {
        self.0.pass("delete_task").await?;
        self.0.forget(id);
        self.0.drop_thing(&format!("task {id}"));
        Ok(())
    }

    async fn update_task(&self, _: &PodId, _: &ContainerId, _: &Resources) -> Result<()> {
        self.0.pass("update_task").await
    }

    async fn reopen_log(&self, _: &PodId, _: &ContainerId) -> Result<()> {
        self.0.pass("reopen_log").await
    }

    async fn exec_sync(&self, _: &PodId, id: &ContainerId, _: &ExecSpec) -> Result<ExecOutput> {
        // Like the real one: the command ends with the future, whoever drops it.
        let _running = Running::new(&self.0, format!("exec in {id}"));
        self.0.pass("exec_sync").await?;
        Ok(ExecOutput { code: 0, stdout: b"out".to_vec(), stderr: Vec::new() })
    }
}

/// Something held for as long as this lives.
struct Running(Arc<World>, String);

impl Running {
    fn new(world: &Arc<World>, thing: String) -> Self {
        world.hold_thing(thing.clone());
        Self(world.clone(), thing)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.drop_thing(&self.1);
    }
}

pub struct FakeImages(pub Arc<World>);

pub fn image() -> Image {
    Image {
        id: ImageId::from_string("sha256:aa"),
        repo_tags: vec!["docker.io/library/busybox:1".into()],
        repo_digests: vec!["docker.io/library/busybox@sha256:bb".into()],
        layers: Vec::new(),
        config: ImageConfig::default(),
        config_json: "{}".into(),
        size: 1,
        pinned: false,
    }
}

#[async_trait]
impl Images for FakeImages {
    async fn pull(&self, _: PullRequest, _: Option<mpsc::UnboundedSender<PullEvent>>, _: CancellationToken) -> Result<ImageId> {
        Err(Error::internal("not used here"))
    }

    async fn load(&self, _: &Path) -> Result<Vec<ImageId>> {
        Err(Error::internal("not used here"))
    }

    fn list(&self) -> Vec<Arc<Image>> {
        vec![Arc::new(image())]
    }

    fn resolve(&self, key: &str) -> Option<Arc<Image>> {
        (key == "busybox" || key == "sha256:aa").then(|| Arc::new(image()))
    }

    async fn remove(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn fs_info(&self) -> Result<(PathBuf, FsUsage)> {
        Ok((PathBuf::from("/"), FsUsage::default()))
    }

    async fn unexplained(&self) -> Result<FsUsage> {
        Ok(FsUsage { bytes: 4096, inodes: 1 })
    }

    async fn provision(&self, container: &str, _: &Image) -> Result<RootFs> {
        // Acquired before it can fail: an interrupted provision leaves something to release.
        self.0.hold_thing(format!("rootfs {container}"));
        self.0.pass("provision").await?;
        Ok(RootFs { backend: "fake".into(), mounts: Vec::new(), lookup: Vec::new(), writable: None })
    }

    fn check_container(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn release(&self, container: &str) -> Result<()> {
        self.0.pass("release").await?;
        self.0.drop_thing(&format!("rootfs {container}"));
        Ok(())
    }

    fn usage(&self, _: &str) -> Option<(FsUsage, i64)> {
        Some((FsUsage { bytes: 1, inodes: 1 }, 1))
    }

    async fn recover(&self, known: &[String]) -> Result<()> {
        self.0.pass("images.recover").await?;
        self.0.held.lock().unwrap().retain(|t| t.strip_prefix("rootfs ").is_none_or(|id| known.iter().any(|k| k == id)));
        Ok(())
    }
}

pub struct FakeNetwork(pub Arc<World>);

#[async_trait]
impl Network for FakeNetwork {
    async fn attach(&self, _: &PodId, _: &PodSpec) -> Result<Attachment> {
        Ok(Attachment::default())
    }

    async fn detach(&self, _: &PodId, _: &PodSpec) -> Result<()> {
        Ok(())
    }

    async fn readiness(&self) -> Readiness {
        Readiness::Ready
    }

    async fn stats(&self, _: &PodId) -> Result<Vec<InterfaceStats>> {
        Ok(Vec::new())
    }

    async fn set_pod_cidr(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn recover(&self, _: &[PodId]) -> Result<()> {
        self.0.pass("network.recover").await
    }
}

/// Holds one thing per pod and per container, and checks that it is called by one caller at a time per pod.
pub struct Recorder {
    pub world: Arc<World>,
    inside: Mutex<BTreeSet<PodId>>,
}

impl Recorder {
    pub fn new(world: Arc<World>) -> Self {
        Self { world, inside: Mutex::default() }
    }

    async fn alone(&self, pod: &PodId, call: &str) -> Result<()> {
        assert!(self.inside.lock().unwrap().insert(pod.clone()), "{call}: isolator was called twice at once for one pod");
        let result = self.world.pass(call).await;
        self.inside.lock().unwrap().remove(pod);
        result
    }
}

/// What a CNI plugin answered for a pod.
pub fn network_of(pod: &PodId) -> serde_json::Value {
    serde_json::json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": pod }], "routes": [] })
}

fn thing(pod: &PodId, container: Option<&ContainerId>) -> String {
    container.map_or_else(|| format!("isolated pod {pod}"), |id| format!("isolated container {id}"))
}

#[async_trait]
impl Isolator for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        self.world.hold_thing(thing(cx.pod_id, cx.container.map(|c| c.id)));
        let call = if cx.container.is_some() { "prepare container" } else { "prepare pod" };
        self.alone(cx.pod_id, call).await?;
        let network = cx.container.is_none().then(|| network_of(cx.pod_id));
        Ok(LaunchPatch { network, ..LaunchPatch::default() })
    }

    async fn isolate(&self, cx: &Cx<'_>, _: u32) -> Result<()> {
        self.alone(cx.pod_id, "isolate").await
    }

    async fn update(&self, cx: &Cx<'_>, merged: &Resources) -> Result<bool> {
        self.alone(cx.pod_id, "update").await?;
        *self.world.limits.lock().unwrap() = Some(merged.clone());
        Ok(true)
    }

    fn usage(&self, _: &PodId, _: &PodSpec, container: Option<&ContainerId>) -> Option<CgroupStats> {
        let held = container.is_none_or(|id| self.world.held.lock().unwrap().contains(&format!("task {id}")));
        held.then(CgroupStats::default)
    }

    fn oom_kills(&self, _: &PodId, _: &PodSpec, container: &ContainerId) -> Option<u64> {
        // Nobody can tell once the task is deleted.
        let held = self.world.held.lock().unwrap().contains(&format!("task {container}"));
        held.then(|| *self.world.oom_kills.lock().unwrap())
    }

    async fn cleanup(&self, pod: &PodId, _: &PodSpec, container: Option<&ContainerId>) -> Result<()> {
        let call = if container.is_some() { "cleanup container" } else { "cleanup pod" };
        self.alone(pod, call).await?;
        self.world.drop_thing(&thing(pod, container));
        Ok(())
    }

    async fn recover(&self, known: &[PodId]) -> Result<()> {
        self.world.pass("isolators.recover").await?;
        self.world.held.lock().unwrap().retain(|t| t.strip_prefix("isolated pod ").is_none_or(|id| known.iter().any(|k| k.as_str() == id)));
        Ok(())
    }
}
