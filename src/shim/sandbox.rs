//! The sandbox service: the pod itself. The shim enters the pod's namespaces and so holds them; there is no pause process.
//! Only a shared process namespace needs a first process of its own, forked from init.
//!
//! Sysctls are refused unless they belong to a namespace that the pod has for itself, whatever the caller asked for: a value
//! for the host must not be reachable through a pod (attack cases 28, 29).

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox as Service;
use containerd_shim_protos::ttrpc::Result as Answer;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use nix::sched::{CloneFlags, setns, unshare};
use serde::Deserialize;

use super::failure::{status, step};
use super::process::{Exit, Outcome, Process, told};
use super::supervisor::Supervisor;
use super::{io, kill, task};
use crate::disk::bundle::{self, Made, Of, Recorded};
use crate::init;
use crate::model::error::{Act, Error, Result};
use crate::stdx::clock::now_ns;
use crate::stdx::failpoint;

/// The pod this shim holds.
#[derive(Default)]
pub struct Sandbox {
    phase: Phase,
    created_at: i64,
    /// First process of the pod's process namespace.
    holder: Option<Arc<Process>>,
    /// Told when the pod ends.
    ended: Arc<Outcome>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    None,
    Created,
    Ready,
    Stopped,
}

impl Phase {
    /// As containerd spells it.
    fn name(self) -> &'static str {
        match self {
            Self::None => "SANDBOX_UNKNOWN",
            Self::Created => "SANDBOX_CREATED",
            Self::Ready => "SANDBOX_READY",
            Self::Stopped => "SANDBOX_NOTREADY",
        }
    }
}

impl Sandbox {
    /// Process whose `/proc/PID/ns` has the pod's namespaces.
    fn pid(&self) -> u32 {
        self.holder.as_ref().map_or_else(std::process::id, |holder| holder.pid)
    }
}

/// The parts of a sandbox's `config.json` that the shim acts on; the rest is skipped while reading, not kept.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    linux: Linux,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Linux {
    namespaces: Vec<Namespace>,
    sysctl: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Linux {
    /// Whether the pod has this namespace for itself.
    fn own(&self, kind: &str) -> bool {
        self.namespaces.iter().any(|n| n.kind == kind)
    }
}

/// Enters what the bundle's `config.json` lists and makes the holder of a process namespace.
fn enter(bundle: &Path) -> Result<Option<init::Holder>> {
    let path = bundle.join(bundle::CONFIG);
    let text = std::fs::read(&path).act("read", path.display())?;
    let config: Config = serde_json::from_slice(&text).act("decode", path.display())?;
    drop(text);
    // Refuse before anything is changed.
    for (name, value) in &config.linux.sysctl {
        check_sysctl(name, value, &config.linux)?;
    }
    for namespace in &config.linux.namespaces {
        let Some(flag) = flag(&namespace.kind) else { continue };
        if namespace.path.is_empty() {
            unshare(flag).act("make namespace", &namespace.kind)?;
        } else {
            let file = std::fs::File::open(&namespace.path).act("open", &namespace.path)?;
            setns(file.as_fd(), flag).act("enter namespace", &namespace.path)?;
        }
    }
    if !config.hostname.is_empty() && config.linux.own("uts") {
        nix::unistd::sethostname(&config.hostname).act("set host name", &config.hostname)?;
    }
    for (name, value) in &config.linux.sysctl {
        let path = format!("/proc/sys/{}", sysctl_path(name));
        std::fs::write(&path, value).act("write", &path)?;
    }
    let own_pid = config.linux.namespaces.iter().any(|n| n.kind == "pid" && n.path.is_empty());
    if own_pid { init::spawn_pid_holder().map(Some).map_err(step) } else { Ok(None) }
}

/// Namespaces the shim itself lives in. Its own process and mount namespace stay the host's: it must reach every process and path.
fn flag(kind: &str) -> Option<CloneFlags> {
    match kind {
        "network" => Some(CloneFlags::CLONE_NEWNET),
        "ipc" => Some(CloneFlags::CLONE_NEWIPC),
        "uts" => Some(CloneFlags::CLONE_NEWUTS),
        _ => None,
    }
}

/// `.` separates, and a `/` stands for a dot inside a part (`net.ipv4.conf.eth0/1.forwarding`), as sysctl(8) has it.
fn sysctl_path(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            c => c,
        })
        .collect()
}

fn check_sysctl(name: &str, value: &str, linux: &Linux) -> Result<()> {
    let clean = |part: &str| {
        let inside = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-/".contains(&b));
        inside && !part.is_empty() && !part.starts_with('/') && !part.ends_with('/') && !part.contains("//")
    };
    if !name.split('.').all(clean) || value.contains(['\0', '\n']) {
        return Err(Error::invalid(format!("sysctl {name}: not a name and value of one kernel parameter")));
    }
    let ipc = ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|prefix| name.starts_with(prefix)) || name == "kernel.sem";
    let namespace = if name.starts_with("net.") {
        "network"
    } else if ipc {
        "ipc"
    } else if matches!(name, "kernel.domainname") {
        "uts"
    } else {
        return Err(Error::invalid(format!("sysctl {name}: does not belong to a namespace, it would change the host")));
    };
    if linux.own(namespace) { Ok(()) } else { Err(Error::invalid(format!("sysctl {name}: the pod uses the host's {namespace} namespace"))) }
}

/// Answers for the pod.
pub struct SandboxService {
    supervisor: Arc<Supervisor>,
}

impl SandboxService {
    /// On this table.
    pub fn new(supervisor: Arc<Supervisor>) -> Self {
        Self { supervisor }
    }

    fn create(&self, bundle: &Path) -> Result<()> {
        let mut table = self.supervisor.table();
        if table.sandbox.phase != Phase::None {
            return Err(Error::precondition("the sandbox is made already"));
        }
        let holder = enter(bundle)?;
        failpoint::hit("shim.sandbox.entered");
        let process = holder.as_ref().and_then(|holder| Recorded::of(holder.pid).ok());
        bundle::write(bundle, Of::Sandbox, &Made { process, cgroup: None })?;
        failpoint::hit("shim.sandbox.recorded");
        if let Some(holder) = holder {
            let (pid, pidfd) = holder.stay().map_err(step)?;
            let (_, nothing) = io::open(&io::Addresses::default())?;
            table.sandbox.holder = Some(Process::watch(pid, pidfd, None, nothing.run(None)?, table.sandbox.ended.clone())?);
        }
        table.sandbox.phase = Phase::Created;
        table.sandbox.created_at = now_ns();
        Ok(())
    }

    /// Everything in the pod dies, the holder last: with it goes the process namespace.
    async fn stop(&self) -> Result<()> {
        let killed = self.supervisor.kill_all();
        let holder = {
            let mut table = self.supervisor.table();
            table.sandbox.phase = Phase::Stopped;
            table.sandbox.holder.clone()
        };
        if let Some(holder) = holder {
            holder.signal(libc::SIGKILL)?;
            // It outlives everybody in its namespace.
            let reaped = tokio::time::timeout(kill::DEATH_LIMIT, holder.reaped()).await;
            reaped.map_err(|_| Error::precondition("stop sandbox: a process in the pod's process namespace does not die"))?;
        }
        failpoint::hit("shim.stop_sandbox.killed");
        let ended = self.supervisor.table().sandbox.ended.clone();
        // Unless the holder's own end was told already.
        ended.send_if_modified(|exit| {
            let first = exit.is_none();
            exit.get_or_insert(Exit { code: 0, at: now_ns() });
            first
        });
        killed
    }
}

#[async_trait]
impl Service for SandboxService {
    async fn create_sandbox(&self, _ctx: &TtrpcContext, req: api::CreateSandboxRequest) -> Answer<api::CreateSandboxResponse> {
        self.create(Path::new(&req.bundle_path)).map_err(status)?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(&self, _ctx: &TtrpcContext, _req: api::StartSandboxRequest) -> Answer<api::StartSandboxResponse> {
        let mut table = self.supervisor.table();
        let sandbox = &mut table.sandbox;
        if sandbox.phase != Phase::Created {
            return Err(status(Error::precondition(format!("the sandbox is {}", sandbox.phase.name()))));
        }
        sandbox.phase = Phase::Ready;
        let mut answer = api::StartSandboxResponse::new();
        answer.pid = sandbox.pid();
        answer.created_at = MessageField::some(task::timestamp(sandbox.created_at));
        Ok(answer)
    }

    async fn platform(&self, _ctx: &TtrpcContext, _req: api::PlatformRequest) -> Answer<api::PlatformResponse> {
        let mut answer = api::PlatformResponse::new();
        let platform = answer.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        // As Go names them.
        platform.architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned();
        Ok(answer)
    }

    async fn stop_sandbox(&self, _ctx: &TtrpcContext, _req: api::StopSandboxRequest) -> Answer<api::StopSandboxResponse> {
        self.stop().await.map_err(status)?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _ctx: &TtrpcContext, _req: api::WaitSandboxRequest) -> Answer<api::WaitSandboxResponse> {
        let ended = self.supervisor.table().sandbox.ended.clone();
        let exit = told(&ended).await;
        let mut answer = api::WaitSandboxResponse::new();
        answer.exit_status = exit.code;
        answer.exited_at = MessageField::some(task::timestamp(exit.at));
        Ok(answer)
    }

    async fn sandbox_status(&self, _ctx: &TtrpcContext, req: api::SandboxStatusRequest) -> Answer<api::SandboxStatusResponse> {
        let table = self.supervisor.table();
        let mut answer = api::SandboxStatusResponse::new();
        answer.sandbox_id = req.sandbox_id;
        answer.pid = table.sandbox.pid();
        answer.state = table.sandbox.phase.name().to_owned();
        answer.created_at = MessageField::some(task::timestamp(table.sandbox.created_at));
        if let Some(exit) = *table.sandbox.ended.borrow() {
            answer.exited_at = MessageField::some(task::timestamp(exit.at));
        }
        Ok(answer)
    }

    async fn ping_sandbox(&self, _ctx: &TtrpcContext, _req: api::PingRequest) -> Answer<api::PingResponse> {
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(&self, _ctx: &TtrpcContext, _req: api::ShutdownSandboxRequest) -> Answer<api::ShutdownSandboxResponse> {
        self.stop().await.map_err(status)?;
        self.supervisor.shut_down(true);
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(&self, _ctx: &TtrpcContext, _req: api::SandboxMetricsRequest) -> Answer<api::SandboxMetricsResponse> {
        // The pod's cgroup is its parent's business, not the shim's.
        Err(status(Error::new(crate::model::error::Kind::Unimplemented, "sandbox metrics")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(kinds: &[&str]) -> Linux {
        Linux { namespaces: kinds.iter().map(|k| Namespace { kind: (*k).to_owned(), path: String::new() }).collect(), ..Linux::default() }
    }

    #[test]
    fn sysctls_of_the_pods_own_namespaces_pass_and_no_others() {
        let own = linux(&["network", "ipc", "uts"]);
        for name in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.sem", "net.ipv4.conf.eth0/1.forwarding"] {
            check_sysctl(name, "1", &own).unwrap();
            assert!(check_sysctl(name, "1", &linux(&[])).is_err(), "{name} with the host's namespaces");
        }
        for (name, value) in [
            ("kernel.core_pattern", "|/evil"),
            ("kernel.hostname", "h"),
            ("vm.overcommit_memory", "1"),
            ("net/../kernel.core_pattern", "x"),
            ("net.ipv4..x", "1"),
            ("net.ipv4.ip_forward", "1\nkernel.core_pattern=x"),
            ("net.//.kernel.core_pattern", "x"),
            ("net./.x", "1"),
            ("net.a+kernel.core_pattern", "x"),
            ("", "1"),
        ] {
            assert!(check_sysctl(name, value, &own).is_err(), "{name}={value:?}");
        }
    }

    #[test]
    fn a_slash_is_a_dot_inside_a_part() {
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.forwarding"), "net/ipv4/conf/eth0.1/forwarding");
    }

    #[test]
    fn only_what_is_needed_is_read() {
        let text = r#"{"ociVersion":"1.1.0","hostname":"h","process":{"args":["x"]},
            "linux":{"namespaces":[{"type":"ipc"},{"type":"network","path":"/n"}],"resources":{"memory":{"limit":1}}}}"#;
        let config: Config = serde_json::from_str(text).unwrap();
        assert_eq!(config.hostname, "h");
        assert!(config.linux.own("network") && config.linux.own("ipc") && !config.linux.own("uts"));
    }
}
