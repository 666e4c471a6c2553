//! The task service: turns messages into calls of the [`Supervisor`] and back. Versions 2 and 3 differ in name only.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{self, Empty, Mount, Status as WireStatus};
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField, well_known_types::timestamp::Timestamp};
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Result as Answer};
use oci_spec::runtime::LinuxResources;

use super::failure::status;
use super::io::Addresses;
use super::metrics;
use super::process::Exit;
use super::supervisor::{Status, Supervisor};
use crate::cgroups::Detail;
use crate::model::error::{Error, Kind, Result};
use crate::model::image::RootMount;

/// Answers for all containers of the shim.
pub struct TaskService {
    supervisor: Arc<Supervisor>,
}

impl TaskService {
    /// On this table.
    pub fn new(supervisor: Arc<Supervisor>) -> Self {
        Self { supervisor }
    }
}

/// Nanoseconds since the epoch as a protobuf time.
pub fn timestamp(ns: i64) -> Timestamp {
    let mut time = Timestamp::new();
    time.seconds = ns.div_euclid(1_000_000_000);
    time.nanos = i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or_default();
    time
}

fn mount(mount: Mount) -> RootMount {
    RootMount { fstype: mount.type_, source: mount.source, options: mount.options }
}

fn empty(result: Result<()>) -> Answer<Empty> {
    result.map(|()| Empty::new()).map_err(status)
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _ctx: &TtrpcContext, req: api::CreateTaskRequest) -> Answer<api::CreateTaskResponse> {
        if !req.checkpoint.is_empty() {
            return Err(unimplemented("restore from a checkpoint"));
        }
        let addresses = Addresses { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal };
        let rootfs = req.rootfs.into_iter().map(mount).collect();
        let mut answer = api::CreateTaskResponse::new();
        answer.pid = to_end(self.supervisor.clone().create(req.id, req.bundle.into(), rootfs, addresses)).await.map_err(status)?;
        Ok(answer)
    }

    async fn start(&self, _ctx: &TtrpcContext, req: api::StartRequest) -> Answer<api::StartResponse> {
        let mut answer = api::StartResponse::new();
        let started = to_end(self.supervisor.clone().start(req.id.clone(), req.exec_id.clone())).await;
        if started.is_err() && req.exec_id.is_empty() {
            self.supervisor.failed_start_is_over(&req.id).await;
        }
        answer.pid = started.map_err(status)?;
        Ok(answer)
    }

    async fn exec(&self, _ctx: &TtrpcContext, req: api::ExecProcessRequest) -> Answer<Empty> {
        let addresses = Addresses { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal };
        let spec = req.spec.into_option().map(|any| any.value).unwrap_or_default();
        empty(self.supervisor.exec(&req.id, &req.exec_id, spec, addresses))
    }

    async fn kill(&self, _ctx: &TtrpcContext, req: api::KillRequest) -> Answer<Empty> {
        let signal = i32::try_from(req.signal).map_err(|_| status(Error::invalid(format!("signal {}", req.signal))))?;
        empty(self.supervisor.kill(&req.id, &req.exec_id, signal, req.all))
    }

    async fn wait(&self, _ctx: &TtrpcContext, req: api::WaitRequest) -> Answer<api::WaitResponse> {
        let exit = self.supervisor.wait(&req.id, &req.exec_id).await.map_err(status)?;
        let mut answer = api::WaitResponse::new();
        answer.exit_status = exit.code;
        answer.exited_at = MessageField::some(timestamp(exit.at));
        Ok(answer)
    }

    async fn delete(&self, _ctx: &TtrpcContext, req: api::DeleteRequest) -> Answer<api::DeleteResponse> {
        let (pid, exit) = self.supervisor.delete(&req.id, &req.exec_id).await.map_err(status)?;
        let mut answer = api::DeleteResponse::new();
        answer.pid = pid;
        answer.exit_status = exit.code;
        answer.exited_at = MessageField::some(timestamp(exit.at));
        Ok(answer)
    }

    async fn state(&self, _ctx: &TtrpcContext, req: api::StateRequest) -> Answer<api::StateResponse> {
        let state = self.supervisor.state(&req.id, &req.exec_id).map_err(status)?;
        let mut answer = api::StateResponse::new();
        let (wire, exit) = match state.status {
            Status::Created => (WireStatus::CREATED, None),
            Status::Running => (WireStatus::RUNNING, None),
            Status::Paused => (WireStatus::PAUSED, None),
            Status::Stopped(exit) => (WireStatus::STOPPED, Some(exit)),
        };
        answer.id = req.id;
        answer.exec_id = req.exec_id;
        answer.bundle = state.bundle.to_string_lossy().into_owned();
        answer.pid = state.pid;
        answer.status = EnumOrUnknown::new(wire);
        answer.stdin = state.addresses.stdin;
        answer.stdout = state.addresses.stdout;
        answer.stderr = state.addresses.stderr;
        answer.terminal = state.addresses.terminal;
        if let Some(Exit { code, at }) = exit {
            answer.exit_status = code;
            answer.exited_at = MessageField::some(timestamp(at));
        }
        Ok(answer)
    }

    async fn pids(&self, _ctx: &TtrpcContext, req: api::PidsRequest) -> Answer<api::PidsResponse> {
        let pids = self.supervisor.cgroup(&req.id).and_then(|cgroup| cgroup.procs()).map_err(status)?;
        let mut answer = api::PidsResponse::new();
        for pid in pids {
            let mut process = api::ProcessInfo::new();
            process.pid = pid;
            answer.processes.push(process);
        }
        Ok(answer)
    }

    async fn pause(&self, _ctx: &TtrpcContext, req: api::PauseRequest) -> Answer<Empty> {
        empty(self.supervisor.pause(&req.id, true).await)
    }

    async fn resume(&self, _ctx: &TtrpcContext, req: api::ResumeRequest) -> Answer<Empty> {
        empty(self.supervisor.pause(&req.id, false).await)
    }

    async fn checkpoint(&self, _ctx: &TtrpcContext, _req: api::CheckpointTaskRequest) -> Answer<Empty> {
        Err(unimplemented("checkpoint"))
    }

    async fn resize_pty(&self, _ctx: &TtrpcContext, req: api::ResizePtyRequest) -> Answer<Empty> {
        empty(self.supervisor.resize(&req.id, &req.exec_id, req.width, req.height))
    }

    async fn close_io(&self, _ctx: &TtrpcContext, req: api::CloseIORequest) -> Answer<Empty> {
        if !req.stdin {
            return Ok(Empty::new());
        }
        empty(self.supervisor.close_input(&req.id, &req.exec_id))
    }

    async fn update(&self, _ctx: &TtrpcContext, req: api::UpdateTaskRequest) -> Answer<Empty> {
        let json = req.resources.into_option().map(|any| any.value).unwrap_or_default();
        let resources: LinuxResources = serde_json::from_slice(&json).map_err(|e| status(Error::invalid(format!("decode resources: {e}"))))?;
        empty(self.supervisor.cgroup(&req.id).and_then(|cgroup| cgroup.apply(&resources)))
    }

    async fn stats(&self, _ctx: &TtrpcContext, req: api::StatsRequest) -> Answer<api::StatsResponse> {
        let stats = self.supervisor.cgroup(&req.id).and_then(|cgroup| cgroup.stats(Detail::Full)).and_then(|stats| metrics::any(&stats));
        let mut answer = api::StatsResponse::new();
        answer.stats = MessageField::some(stats.map_err(status)?);
        Ok(answer)
    }

    async fn connect(&self, _ctx: &TtrpcContext, req: api::ConnectRequest) -> Answer<api::ConnectResponse> {
        let mut answer = api::ConnectResponse::new();
        answer.shim_pid = std::process::id();
        answer.task_pid = self.supervisor.state(&req.id, "").map_or(0, |state| state.pid);
        answer.version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(answer)
    }

    async fn shutdown(&self, _ctx: &TtrpcContext, req: api::ShutdownRequest) -> Answer<Empty> {
        self.supervisor.shut_down(req.now);
        Ok(Empty::new())
    }
}

/// In a task of its own: a caller who leaves (or dies) does not cut it short half-way. Whoever wants its end says so by a request.
async fn to_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|e| Err(Error::with(Kind::Internal, "answer", e)))
}

fn unimplemented(what: &str) -> ttrpc::Error {
    status(Error::new(Kind::Unimplemented, what))
}
