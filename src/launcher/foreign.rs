//! Shims that are not ours: a pause container in place of the sandbox service, logs written by the daemon, runc's options.
//!
//! While the daemon is down such containers can fill their pipes and wait; what is in the pipes is logged after the restart.
//! Our own shim has no such gap, which is why it is the default.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options;
use oci_spec::runtime as oci;
use tokio::net::unix::pipe::{OpenOptions, Receiver};

use super::config::{Config, Handler};
use super::pod::{Logging, Pod};
use super::shims::{Resolved, ShimLauncher};
use super::{TaskIo, bundle, exec};
use crate::cgroups::Manager;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::plan::LaunchPlan;
use crate::model::resources::Resources;
use crate::model::{ContainerId, PodId};
use crate::stdx::clock::now_ns;
use crate::stdx::crilog::{Batch, Framer, LogFile, MIN_BATCH, Stream};

/// What the daemon must know of a container's streams after a restart.
const IO: &str = "io.json";
/// How long a wait goes on for output of processes that outlive the first one.
const DRAIN: Duration = Duration::from_secs(2);
/// Bytes read at once.
const READ: usize = 32 * 1024;
/// Type name of runc's options inside containerd's messages.
const OPTIONS: &str = "containerd.runc.v1.Options";
/// Type name of OCI resources inside containerd's messages.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// The options of a handler, checked.
///
/// # Errors
/// `InvalidArgument` naming the key.
pub fn options(handler: &Handler) -> Result<Option<Any>> {
    if handler.options.is_empty() {
        return Ok(None);
    }
    let mut options = Options::new();
    for (key, value) in &handler.options {
        let text = || value.as_str().map(str::to_owned).ok_or_else(|| Error::invalid(format!("option {key} is not a text")));
        let flag = || value.as_bool().ok_or_else(|| Error::invalid(format!("option {key} is not true or false")));
        match key.as_str() {
            "BinaryName" => options.binary_name = text()?,
            "Root" => options.root = text()?,
            "SystemdCgroup" => options.systemd_cgroup = flag()?,
            "NoPivotRoot" => options.no_pivot_root = flag()?,
            "NoNewKeyring" => options.no_new_keyring = flag()?,
            _ => return Err(Error::invalid(format!("option {key} is not known"))),
        }
    }
    let mut any = Any::new();
    any.type_url = OPTIONS.to_owned();
    any.value = options.write_to_bytes().map_err(|e| Error::with(Kind::Internal, "encode options", e))?;
    Ok(Some(any))
}

/// Writes the bundle of the pause container: the sandbox's plan with a process that waits for ever and nothing else.
///
/// # Errors
/// I/O errors; `NotFound` without the program.
pub fn write_pause(config: &Config, pod: &PodId, dir: &Path, mut plan: LaunchPlan) -> Result<()> {
    let failed = |e: oci_spec::OciSpecError| Error::with(Kind::Internal, "describe pause container", e);
    let args: Vec<String> = std::iter::once("/pause".to_owned()).chain(config.pause_args.clone()).collect();
    let process = oci::ProcessBuilder::default().args(args).cwd("/").no_new_privileges(true).capabilities(oci::LinuxCapabilities::default());
    plan.spec.set_process(Some(process.build().map_err(failed)?));
    plan.spec.set_root(Some(oci::RootBuilder::default().path("rootfs").readonly(true).build().map_err(failed)?));
    // Runtimes need /proc inside for their own work (sysctls, labels) and put device nodes into /dev.
    let mount = |to: &str, kind: &str, options: &[&str]| {
        let options = options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>();
        oci::MountBuilder::default().destination(to).typ(kind).source(kind).options(options).build().map_err(failed)
    };
    let proc = mount("/proc", "proc", &["nosuid", "noexec", "nodev"])?;
    let dev = mount("/dev", "tmpfs", &["nosuid", "noexec", "mode=755", "size=65536k"])?;
    plan.spec.set_mounts(Some(vec![proc, dev]));
    let mut linux = plan.spec.linux().clone().unwrap_or_default();
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for kind in [oci::LinuxNamespaceType::Mount, oci::LinuxNamespaceType::Pid] {
        if !namespaces.iter().any(|n| n.typ() == kind) {
            namespaces.push(oci::LinuxNamespaceBuilder::default().typ(kind).build().map_err(failed)?);
        }
    }
    linux.set_namespaces(Some(namespaces));
    if linux.cgroups_path().is_none() {
        linux.set_cgroups_path(Some(format!("/mesocri/{pod}/pause").into()));
    }
    plan.spec.set_linux(Some(linux));
    bundle::write(dir, &plan)?;
    make_cgroup(dir)?;
    let pause = config.pause_program()?;
    for point in ["proc", "dev"] {
        // Mount points: the root is read-only by the time the runtime looks for them.
        let point = dir.join("rootfs").join(point);
        std::fs::create_dir_all(&point).act("create", point.display())?;
    }
    let inside = dir.join("rootfs/pause");
    std::fs::copy(&pause, &inside).act("copy", pause.display())?;
    // containerd gives its shims a fifo to log into; a file does as well, and needs no reader.
    std::fs::write(dir.join("log"), "").act("create", "log of the shim")
}

/// Makes the cgroup of a bundle before the runtime does: runtimes make parents too but never remove them; ours are marked, and go
/// with the last group in them. Not for systemd's names, which are no paths.
///
/// # Errors
/// As [`Manager::create`].
pub fn make_cgroup(dir: &Path) -> Result<()> {
    match bundle::made(dir)?.cgroup {
        Some(path) => Manager::create(&path).map(drop),
        None => Ok(()),
    }
}

impl ShimLauncher {
    /// Creates and starts the pause container; its pid.
    pub(super) async fn start_pause(&self, pod: &Pod, dir: &Path) -> Result<u32> {
        let mut request = api::CreateTaskRequest::new();
        request.id = pod.id.as_str().to_owned();
        request.bundle = dir.to_string_lossy().into_owned();
        request.options = self.foreign_options(pod)?.into();
        let created: api::CreateTaskResponse = pod.client.task("Create", &request).await?;
        let mut request = api::StartRequest::new();
        request.id = pod.id.as_str().to_owned();
        pod.client.task::<api::StartResponse>("Start", &request).await?;
        Ok(created.pid)
    }

    /// Ends the pause container, and with it all that shares its process namespace.
    pub(super) async fn kill_foreign_pod(&self, pod: &Pod) -> Result<()> {
        for container in self.bundled_containers(&pod.id)? {
            match self.kill(pod, &container, libc::SIGKILL, true).await {
                Err(e) if e.kind != Kind::NotFound => return Err(e),
                _ => {}
            }
        }
        let pause = ContainerId::from_string(pod.id.as_str());
        self.kill(pod, &pause, libc::SIGKILL, true).await?;
        self.wait(pod, &pause).await.map(drop)
    }

    /// Ends the pause container and has the runtime forget it.
    pub(super) async fn delete_pause(&self, pod: &Pod) -> Result<()> {
        let pause = ContainerId::from_string(pod.id.as_str());
        // Ended already is fine; only what was killed is waited for.
        if self.kill(pod, &pause, libc::SIGKILL, true).await.is_ok() {
            let _ = self.wait(pod, &pause).await;
        }
        let mut request = api::DeleteRequest::new();
        request.id = pod.id.as_str().to_owned();
        pod.client.task::<api::DeleteResponse>("Delete", &request).await.map(drop)
    }

    pub(super) fn foreign_options(&self, pod: &Pod) -> Result<Option<Any>> {
        match self.resolve(&pod.handler)? {
            Resolved::Foreign(handler) => options(handler),
            Resolved::Ours => Ok(None),
        }
    }
}

/// Makes the fifos of a container and starts to log what comes out of them. Their paths for the shim.
///
/// # Errors
/// I/O errors; when the log cannot be opened.
pub fn attach_log(pod: &Pod, id: &ContainerId, dir: &Path, io: &TaskIo) -> Result<(String, String)> {
    if io.log.is_none() {
        return Ok((String::new(), String::new()));
    }
    let record = dir.join(IO);
    crate::disk::bundle::put(&record, &serde_json::to_vec(io).act("encode", "streams")?)?;
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    exec::make_fifo(&dir.join("stdout"))?;
    if !io.terminal {
        exec::make_fifo(&dir.join("stderr"))?;
    }
    if let Some(streams) = Streams::open(dir)? {
        pod.pumps().insert(id.clone(), streams.log());
    }
    Ok((path("stdout"), if io.terminal { String::new() } else { path("stderr") }))
}

/// A container's output: its fifos and its log, open, but not read yet.
pub struct Streams {
    pipes: Vec<(Receiver, Stream)>,
    file: LogFile,
}

impl Streams {
    /// Opens the fifos that a bundle has and the log. `None` when there is nothing to log. Fifos that are not there are none: they
    /// are made after the record, and may be removed before it.
    ///
    /// # Errors
    /// I/O errors; a damaged record; when the log cannot be opened.
    fn open(dir: &Path) -> Result<Option<Self>> {
        Self::open_with(dir, |log| LogFile::open(log).act("open log", log.display()))
    }

    /// The same for a container that runs already, and that must go on writing whatever becomes of its log.
    ///
    /// # Errors
    /// I/O errors; a damaged record.
    pub fn open_again(dir: &Path) -> Result<Option<Self>> {
        Self::open_with(dir, |log| {
            Ok(LogFile::open(log).unwrap_or_else(|error| {
                tracing::warn!(log = %log.display(), %error, "log cannot be opened; output is lost until it can be");
                LogFile::unopened(log)
            }))
        })
    }

    fn open_with(dir: &Path, open: impl FnOnce(&Path) -> Result<LogFile>) -> Result<Option<Self>> {
        let Some(TaskIo { log: Some(log), terminal, .. }) = bundle::read(&dir.join(IO))? else { return Ok(None) };
        let mut pipes = Vec::new();
        let names = [("stdout", Stream::Stdout), ("stderr", Stream::Stderr)];
        for (name, stream) in names.into_iter().take(if terminal { 1 } else { 2 }) {
            let path = dir.join(name);
            match OpenOptions::new().open_receiver(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                pipe => pipes.push((pipe.act("open", path.display())?, stream)),
            }
        }
        Ok(if pipes.is_empty() { None } else { Some(Self { pipes, file: open(&log)? }) })
    }

    /// Begins to log.
    pub fn log(self) -> Logging {
        let file = Arc::new(Mutex::new(self.file));
        let pumps = self.pipes.into_iter().map(|(pipe, stream)| tokio::spawn(pump(pipe, Framer::new(stream), file.clone()))).collect();
        Logging { pumps, file }
    }
}

async fn pump(pipe: Receiver, mut framer: Framer, file: Arc<Mutex<LogFile>>) {
    let mut lines = vec![0; MIN_BATCH.max(2 * READ)];
    while pipe.readable().await.is_ok() {
        let mut buffer = vec![0; READ];
        let n = match pipe.try_read(&mut buffer) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => 0,
        };
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut batch = Batch::new(&mut lines, &mut file, now_ns());
        if n == 0 {
            framer.finish(&mut batch);
            return;
        }
        framer.push(&buffer[..n], &mut batch);
    }
}

/// Waits for the output to end, within bounds.
pub async fn drain(pod: &Pod, id: &ContainerId) {
    let pumps = pod.pumps().get_mut(id).map(|logging| std::mem::take(&mut logging.pumps)).unwrap_or_default();
    let aborts: Vec<_> = pumps.iter().map(tokio::task::JoinHandle::abort_handle).collect();
    let all = async {
        for pump in pumps {
            // An aborted pump has nothing more to say either.
            let _ = pump.await;
        }
    };
    if tokio::time::timeout(DRAIN, all).await.is_err() {
        aborts.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

/// Stops logging.
pub fn end_pumps(pod: &Pod, id: &ContainerId) {
    pod.pumps().remove(id);
}

/// A new log file at the same path.
///
/// # Errors
/// When it cannot be made.
pub fn reopen(pod: &Pod, id: &ContainerId) -> Result<()> {
    let file = pod.pumps().get(id).map(|logging| logging.file.clone());
    match file {
        Some(file) => file.lock().unwrap_or_else(PoisonError::into_inner).reopen().act("reopen log of container", id.short()),
        None => Ok(()),
    }
}

/// Has the runtime apply limits: its own record of them must stay right.
///
/// # Errors
/// What the shim says.
pub async fn update(pod: &Pod, id: &ContainerId, resources: &Resources) -> Result<()> {
    let mut any = Any::new();
    any.type_url = RESOURCES.to_owned();
    any.value = serde_json::to_vec(&crate::cgroups::to_oci(resources)).act("encode", "resources")?;
    let mut request = api::UpdateTaskRequest::new();
    request.id = id.as_str().to_owned();
    request.resources = Some(any).into();
    pod.client.task::<api::Empty>("Update", &request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_checked_and_encoded() {
        let handler = |text: &str| Handler { runtime: "/x".to_owned(), options: toml::from_str(text).unwrap() };
        assert!(options(&handler("")).unwrap().is_none());
        let any = options(&handler("BinaryName = 'crun'\nSystemdCgroup = true")).unwrap().unwrap();
        let decoded = Options::parse_from_bytes(&any.value).unwrap();
        assert_eq!((decoded.binary_name.as_str(), decoded.systemd_cgroup), ("crun", true));
        for bad in ["BinaryNam = 'x'", "SystemdCgroup = 'yes'", "Root = 1"] {
            assert!(options(&handler(bad)).is_err(), "{bad}");
        }
    }
}
