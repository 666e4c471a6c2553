//! [`ShimLauncher`]: the launcher that starts real shims. This file has the sandbox's life; containers are in `task.rs` and
//! `exec.rs`, restarts in `recover.rs`, shims without a sandbox service in `foreign.rs`.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::sandbox_api;

use super::client::Client;
use super::config::{Config, DEFAULT_HANDLER, Handler};
use super::foreign::Streams;
use super::pod::{Pod, Whose};
use super::start::{Program, Started, start};
use super::{ExecOutput, ExecSpec, Launcher, Sandbox, TaskLaunch, TaskState, bundle};
use crate::disk::Layout;
use crate::disk::bundle::{Made, Of, Recorded};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::plan::LaunchPlan;
use crate::model::resources::Resources;
use crate::model::shim::{SANDBOX_SERVICE, TASK_V3};
use crate::model::{ContainerId, PodId};
use crate::stdx::blocking;

/// How long a shim whose pod is being deleted may take for each answer, and then to be gone. A few of them are less than the
/// containerizer's patience with the whole deletion; past it the shim is killed, which needs no cooperation.
pub(super) const END_LIMIT: Duration = Duration::from_secs(3);
/// Namespaces a sandbox may own: spec's name, file below `/proc/PID/ns`.
const POD_NAMESPACES: [(&str, &str); 4] = [("ipc", "ipc"), ("uts", "uts"), ("network", "net"), ("pid", "pid")];

/// Starts shims and speaks to them.
pub struct ShimLauncher {
    pub(super) config: Config,
    pub(super) layout: Layout,
    ours: Program,
    pods: Mutex<HashMap<PodId, Arc<Pod>>>,
}

/// A handler, resolved.
pub(super) enum Resolved<'a> {
    Ours,
    Foreign(&'a Handler),
}

impl ShimLauncher {
    /// Copies our shim's program and checks the handlers. Starts nothing.
    ///
    /// # Errors
    /// `NotFound` when our shim's program is missing; `InvalidArgument` for a handler that cannot be understood.
    pub fn new(config: Config, layout: Layout) -> Result<Arc<Self>> {
        let ours = Program::seal(&config.shim_program()?)?;
        for (name, handler) in &config.handlers {
            super::foreign::options(handler).map_err(|e| e.within(format!("runtime handler {name}")))?;
        }
        Ok(Arc::new(Self { config, layout, ours, pods: Mutex::default() }))
    }

    pub(super) fn resolve(&self, handler: &str) -> Result<Resolved<'_>> {
        match self.config.handlers.get(handler) {
            Some(found) => Ok(Resolved::Foreign(found)),
            None if handler.is_empty() || handler == DEFAULT_HANDLER => Ok(Resolved::Ours),
            None => Err(Error::invalid(format!("runtime handler {handler} is not configured"))),
        }
    }

    pub(super) fn pod(&self, pod: &PodId) -> Result<Arc<Pod>> {
        self.known(pod).ok_or_else(|| Error::new(Kind::Unavailable, format!("pod {} has no shim", pod.short())))
    }

    pub(super) fn known(&self, pod: &PodId) -> Option<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).get(pod).cloned()
    }

    pub(super) fn remember(&self, pod: Arc<Pod>) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).insert(pod.id.clone(), pod);
    }

    /// Remembers a pod whose shim was found again, and begins to log for it, unless somebody was faster: two must not read the same
    /// output.
    pub(super) fn remember_found(&self, pod: Arc<Pod>, streams: Vec<(ContainerId, Streams)>) {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if !pods.contains_key(&pod.id) {
            pod.pumps().extend(streams.into_iter().map(|(id, streams)| (id, streams.log())));
            pods.insert(pod.id.clone(), pod);
        }
    }

    fn forget(&self, pod: &PodId) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(pod);
    }

    async fn sandbox(&self, id: &PodId, handler: &str, plan: &LaunchPlan) -> Result<Sandbox> {
        let dir = self.layout.sandbox_bundle(id);
        match self.resolve(handler)? {
            Resolved::Ours => {
                let pod = match self.known(id) {
                    Some(started) => started,
                    None => self.start_ours(id, handler).await?,
                };
                bundle::write(&dir, plan)?;
                let pid = start_sandbox(&pod, &dir, self.config.request_limit()).await?;
                let namespaces = namespaces(plan, Whose::Ours, pid, pod.shim_pid);
                Ok(Sandbox { pid, shim_pid: pod.shim_pid, address: self.address(id), namespaces })
            }
            Resolved::Foreign(foreign) => {
                let (pause, of, bundle_dir, written) = (self.config.clone(), id.clone(), dir.clone(), plan.clone());
                blocking::run("write sandbox bundle", move || super::foreign::write_pause(&pause, &of, &bundle_dir, written)).await?;
                let limit = self.config.request_limit();
                let program = foreign.program()?;
                note(&dir, &program, None).await?;
                let started = start(&Program::Path(program.clone()), id, &dir, &self.layout.shim_socket(id), limit).await?;
                note(&dir, &program, Some(&started)).await?;
                let client = Client::connect(&started.address, started.task, limit).await?;
                let shim_pid = shim_pid(&client, id).await?;
                record(&dir, Of::Shim, shim_pid).await?;
                let pod = Pod::new(id.clone(), Whose::Foreign, handler.to_owned(), client, shim_pid)?;
                // From here on the shim is found by its pod, also when a later step fails.
                self.remember(pod.clone());
                let pid = self.start_pause(&pod, &dir).await?;
                record(&dir, Of::Sandbox, pid).await?;
                let namespaces = namespaces(plan, Whose::Foreign, pid, shim_pid);
                Ok(Sandbox { pid, shim_pid, address: started.address, namespaces })
            }
        }
    }

    /// Starts our shim in the pod's bundle, which may be empty still: it reads the bundle when it makes the sandbox.
    async fn start_ours(&self, id: &PodId, handler: &str) -> Result<Arc<Pod>> {
        let dir = self.layout.sandbox_bundle(id);
        bundle::make_dir(&dir)?;
        let limit = self.config.request_limit();
        let started = start(&self.ours, id, &dir, &self.layout.shim_socket(id), limit).await?;
        let client = match Client::connect(&started.address, TASK_V3, limit).await {
            // Not for the caller, who asked for nothing that could be missing.
            Err(e) if e.kind == Kind::NotFound => {
                return Err(Error::with(Kind::Unavailable, format!("start shim of pod {}: it ended before it could be asked", id.short()), e));
            }
            client => client?,
        };
        let shim_pid = client.listener()?;
        let pod = Pod::new(id.clone(), Whose::Ours, handler.to_owned(), client, shim_pid)?;
        self.remember(pod.clone());
        Ok(pod)
    }

    /// Where our shim of a pod listens.
    fn address(&self, id: &PodId) -> String {
        format!("unix://{}", self.layout.shim_socket(id).display())
    }

    /// Ends the shim: asks it, and kills it when it does not go. Whether it left nothing of the sandbox to its runtime.
    async fn end_shim(&self, pod: &Pod) -> bool {
        let mut forgotten = pod.whose == Whose::Ours;
        let asked = match pod.whose {
            Whose::Ours => {
                let mut request = sandbox_api::ShutdownSandboxRequest::new();
                request.sandbox_id = pod.id.as_str().to_owned();
                pod.client.call::<sandbox_api::ShutdownSandboxResponse>(SANDBOX_SERVICE, "ShutdownSandbox", &request, Some(END_LIMIT)).await.map(drop)
            }
            Whose::Foreign => {
                let asking = async {
                    forgotten = match self.delete_pause(pod).await {
                        Err(e) => e.kind == Kind::NotFound,
                        Ok(()) => true,
                    };
                    let mut request = api::ShutdownRequest::new();
                    request.id = pod.id.as_str().to_owned();
                    request.now = true;
                    pod.client.task::<api::Empty>("Shutdown", &request).await.map(drop)
                };
                let silent = |_| Err(Error::new(Kind::DeadlineExceeded, format!("end shim of pod {}: it does not answer", pod.id.short())));
                tokio::time::timeout(END_LIMIT, asking).await.unwrap_or_else(silent)
            }
        };
        // A connection that broke while the shim went is the answer too.
        let refused = asked.err().filter(|e| e.kind != Kind::Unavailable);
        if let Some(error) = &refused {
            tracing::warn!(pod = %pod.id, shim = pod.shim_pid, %error, "the shim does not end itself, it is killed");
        }
        if refused.is_some() || tokio::time::timeout(END_LIMIT, pod.shim.ended()).await.is_err() {
            pod.shim.kill(END_LIMIT).await;
        }
        forgotten
    }
}

/// Notes another runtime's shim in its bundle.
async fn note(dir: &std::path::Path, program: &std::path::Path, started: Option<&Started>) -> Result<()> {
    let said = started.map(|started| (started.address.clone(), started.task.to_owned()));
    let (dir, noted) = (dir.to_owned(), bundle::Noted { program: program.to_owned(), said });
    blocking::run("note shim", move || noted.write(&dir)).await
}

/// Records a process of another runtime's in its bundle, as our shim does for itself: one that hangs can be killed by it.
async fn record(dir: &std::path::Path, of: Of, pid: u32) -> Result<()> {
    let dir = dir.to_owned();
    let write = move || match Recorded::of(pid) {
        Ok(process) => crate::disk::bundle::write(&dir, of, &Made { process: Some(process), cgroup: None }),
        // It has ended: nothing to kill.
        Err(_) => Ok(()),
    };
    blocking::run("record process", write).await
}

/// A failure with the name of the container, which the words of a shim or of a broken connection lack.
fn about<T>(act: &str, id: &ContainerId, result: Result<T>) -> Result<T> {
    result.map_err(|e| e.within(format!("{act} container {}", id.short())))
}

async fn start_sandbox(pod: &Pod, dir: &std::path::Path, limit: Duration) -> Result<u32> {
    let mut create = sandbox_api::CreateSandboxRequest::new();
    create.sandbox_id = pod.id.as_str().to_owned();
    create.bundle_path = dir.to_string_lossy().into_owned();
    pod.client.call::<sandbox_api::CreateSandboxResponse>(SANDBOX_SERVICE, "CreateSandbox", &create, Some(limit)).await?;
    let mut start = sandbox_api::StartSandboxRequest::new();
    start.sandbox_id = pod.id.as_str().to_owned();
    let started: sandbox_api::StartSandboxResponse = pod.client.call(SANDBOX_SERVICE, "StartSandbox", &start, Some(limit)).await?;
    Ok(started.pid)
}

pub(super) async fn shim_pid(client: &Client, pod: &PodId) -> Result<u32> {
    let mut request = api::ConnectRequest::new();
    request.id = pod.as_str().to_owned();
    client.task::<api::ConnectResponse>("Connect", &request).await.map(|answer| answer.shim_pid)
}

/// Paths that join the pod's namespaces: of those the plan lists, the plan's own path or the process that holds it.
fn namespaces(plan: &LaunchPlan, whose: Whose, pid: u32, shim_pid: u32) -> BTreeMap<String, PathBuf> {
    let listed = plan.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref()).map(Vec::as_slice).unwrap_or_default();
    let found = POD_NAMESPACES.iter().filter_map(|(kind, file)| {
        let namespace = listed.iter().find(|n| n.typ().to_string() == *kind)?;
        // Our shim lives in all of them but the process namespace, whose first process the sandbox's pid then is.
        let holder = if whose == Whose::Ours && *kind != "pid" { shim_pid } else { pid };
        let path = namespace.path().clone().unwrap_or_else(|| PathBuf::from(format!("/proc/{holder}/ns/{file}")));
        Some(((*kind).to_owned(), path))
    });
    found.collect()
}

#[async_trait]
impl Launcher for ShimLauncher {
    fn handlers(&self) -> Vec<String> {
        let named = self.config.handlers.keys().filter(|name| *name != DEFAULT_HANDLER);
        std::iter::once(DEFAULT_HANDLER).map(str::to_owned).chain(named.cloned()).collect()
    }

    async fn start_shim(&self, pod: &PodId, handler: &str) -> Result<()> {
        match self.resolve(handler)? {
            Resolved::Ours => self.start_ours(pod, handler).await.map(drop),
            // Others read the bundle when they start, and that needs the plan.
            Resolved::Foreign(_) => Ok(()),
        }
    }

    async fn create_sandbox(&self, pod: &PodId, handler: &str, plan: &LaunchPlan) -> Result<Sandbox> {
        let result = self.sandbox(pod, handler, plan).await;
        if result.is_err() {
            // The first error is what the caller must see.
            let _ = self.delete_sandbox(pod, handler, None).await;
        }
        result
    }

    async fn reattach(&self, pod: &PodId, handler: &str, sandbox: &Sandbox) -> Result<()> {
        self.find_again(pod, handler, sandbox).await
    }

    async fn wait_sandbox(&self, pod: &PodId) {
        // No shim: it has ended.
        if let Some(pod) = self.known(pod) {
            pod.ended().await;
        }
    }

    async fn stop_sandbox(&self, pod: &PodId) -> Result<()> {
        let Some(pod) = self.known(pod) else { return Ok(()) };
        let stopped = match pod.whose {
            Whose::Ours => {
                let mut request = sandbox_api::StopSandboxRequest::new();
                request.sandbox_id = pod.id.as_str().to_owned();
                let limit = Some(self.config.request_limit());
                let stop = || pod.client.call::<sandbox_api::StopSandboxResponse>(SANDBOX_SERVICE, "StopSandbox", &request, limit);
                pod.shim.ask(stop).await.map(drop)
            }
            Whose::Foreign => self.kill_foreign_pod(&pod).await,
        };
        match stopped {
            // The shim is dead; what it left is killed by the deletions that follow.
            Err(e) if matches!(e.kind, Kind::Unavailable | Kind::NotFound) => Ok(()),
            result => result,
        }
    }

    async fn delete_sandbox(&self, id: &PodId, handler: &str, sandbox: Option<&Sandbox>) -> Result<()> {
        self.find_or_kill(id, handler, sandbox).await;
        for container in self.bundled_containers(id)? {
            if let Some(pod) = self.known(id) {
                if let Ok(deleted) = tokio::time::timeout(END_LIMIT, self.delete_task(id, &container)).await {
                    deleted?;
                    continue;
                }
                tracing::warn!(pod = %id, shim = pod.shim_pid, container = %container, "the shim does not answer, it is killed with its pod");
                pod.shim.kill(END_LIMIT).await;
                self.forget(id);
            }
            // Nobody is left to ask now.
            self.delete_task(id, &container).await?;
        }
        let mut forgotten = false;
        if let Some(pod) = self.known(id) {
            forgotten = self.end_shim(&pod).await;
            self.forget(id);
        }
        self.clean_up_lost(id, handler, forgotten).await?;
        let socket = self.layout.shim_socket(id);
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).act("remove", socket.display())?,
            _ => {}
        }
        let dir = self.layout.sandbox_bundle(id);
        blocking::run("remove sandbox bundle", move || bundle::remove(&dir)).await
    }

    async fn create_task(&self, pod: &PodId, id: &ContainerId, launch: &TaskLaunch) -> Result<u32> {
        self.create(&*self.pod(pod)?, id, launch).await
    }

    async fn start_task(&self, pod: &PodId, id: &ContainerId) -> Result<()> {
        about("start", id, async { self.start(&*self.pod(pod)?, id).await }.await)
    }

    async fn kill_task(&self, pod: &PodId, id: &ContainerId, signal: i32, all: bool) -> Result<()> {
        about("signal", id, async { self.kill(&*self.pod(pod)?, id, signal, all).await }.await)
    }

    async fn wait_task(&self, pod: &PodId, id: &ContainerId) -> Result<(i32, i64)> {
        self.wait(&*self.pod(pod)?, id).await
    }

    async fn task_state(&self, pod: &PodId, id: &ContainerId) -> Result<TaskState> {
        self.state(&*self.pod(pod)?, id).await
    }

    async fn delete_task(&self, pod: &PodId, id: &ContainerId) -> Result<()> {
        self.delete(pod, id).await
    }

    async fn update_task(&self, pod: &PodId, id: &ContainerId, resources: &Resources) -> Result<()> {
        self.update(&*self.pod(pod)?, id, resources).await
    }

    async fn reopen_log(&self, pod: &PodId, id: &ContainerId) -> Result<()> {
        about("reopen the log of", id, async { self.reopen(&*self.pod(pod)?, id).await }.await)
    }

    async fn exec_sync(&self, pod: &PodId, id: &ContainerId, exec: &ExecSpec) -> Result<ExecOutput> {
        match async { self.exec(&self.pod(pod)?, id, exec).await }.await {
            // This one names it.
            Err(e) if e.kind == Kind::DeadlineExceeded => Err(e),
            result => about("run a command in", id, result),
        }
    }
}
