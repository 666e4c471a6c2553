//! After a restart of the daemon, and after the death of a shim.

use std::time::Duration;

use super::client::Client;
use super::foreign::Streams;
use super::pod::{Pod, Whose};
use super::shims::{Resolved, ShimLauncher, shim_pid};
use super::start::Program;
use super::{Sandbox, bundle, start};
use crate::disk::bundle::{Of, read};
use crate::model::{ContainerId, PodId};
use crate::model::error::Result;
use crate::model::shim::{SANDBOX_SERVICE, TASK_V2, TASK_V3};
use crate::stdx::blocking;

/// Bound of the `delete` verb of a foreign shim.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(30);

impl ShimLauncher {
    /// Connects to the shim of a recorded pod, asks whether it is alive, and goes on where the last daemon stopped.
    pub(super) async fn find_again(&self, id: &PodId, handler: &str, sandbox: &Sandbox) -> Result<()> {
        if self.known(id).is_some() {
            return Ok(());
        }
        let limit = self.config.reattach_limit();
        let whose = match self.resolve(handler)? {
            Resolved::Ours => Whose::Ours,
            Resolved::Foreign(_) => Whose::Foreign,
        };
        // The version a foreign shim announced is not recorded; version 2 is what those on disk answer to, and an unknown
        // service is refused with an error that says so.
        let task = if whose == Whose::Ours { TASK_V3 } else { TASK_V2 };
        let probe = Client::connect(&sandbox.address, task, limit).await?;
        let pid = match shim_pid(&probe, id).await {
            Err(_) if whose == Whose::Foreign => return self.find_again_v3(id, handler, sandbox).await,
            pid => pid?,
        };
        if whose == Whose::Ours {
            let mut ping = containerd_shim_protos::sandbox_api::PingRequest::new();
            ping.sandbox_id = id.as_str().to_owned();
            probe.call::<containerd_shim_protos::sandbox_api::PingResponse>(SANDBOX_SERVICE, "PingSandbox", &ping, Some(limit)).await?;
        }
        self.adopt(id, whose, handler, sandbox, task, pid).await
    }

    async fn find_again_v3(&self, id: &PodId, handler: &str, sandbox: &Sandbox) -> Result<()> {
        let probe = Client::connect(&sandbox.address, TASK_V3, self.config.reattach_limit()).await?;
        let pid = shim_pid(&probe, id).await?;
        self.adopt(id, Whose::Foreign, handler, sandbox, TASK_V3, pid).await
    }

    async fn adopt(&self, id: &PodId, whose: Whose, handler: &str, sandbox: &Sandbox, task: &'static str, pid: u32) -> Result<()> {
        // A connection of its own: the probe's had the short limit of recovery.
        let client = Client::connect(&sandbox.address, task, self.config.request_limit()).await?;
        // All that can fail comes before the pod is made: every try that failed would leave its watchers behind.
        let streams = if whose == Whose::Foreign { self.open_logs(id)? } else { Vec::new() };
        let pod = Pod::new(id.clone(), whose, handler.to_owned(), client, pid)?;
        // Before anybody can run new ones.
        self.end_left_execs(&pod).await;
        self.remember_found(pod, streams);
        Ok(())
    }

    /// The output of all containers of a foreign shim. One whose files cannot be read costs its own log, not the pod.
    fn open_logs(&self, id: &PodId) -> Result<Vec<(ContainerId, Streams)>> {
        let open = |container: ContainerId| match Streams::open_again(&self.layout.bundle(id, &container)) {
            Ok(streams) => Some((container, streams?)),
            Err(error) => {
                tracing::warn!(pod = %id, %container, %error, "the log of a container cannot go on after the restart");
                None
            }
        };
        Ok(self.bundled_containers(id)?.into_iter().filter_map(open).collect())
    }

    /// What a shim that was killed left of the pod itself. Does nothing when it ended in order.
    pub(super) async fn clean_up_lost(&self, id: &PodId, handler: &str, sandbox: Option<&Sandbox>) -> Result<()> {
        let dir = self.layout.sandbox_bundle(id);
        if !dir.exists() {
            return Ok(());
        }
        let mut foreign = false;
        if let Ok(Resolved::Foreign(handler)) = self.resolve(handler) {
            foreign = true;
            // The runtime's own state of the pause container; an orderly end left none, and then this fails.
            if sandbox.is_some() && dir.join("address").exists() {
                let _ = start::delete(&Program::Path(handler.program()?), id, &dir, CLEAN_UP_LIMIT).await;
            }
        }
        blocking::run("clean up lost sandbox", move || {
            if let Some(made) = read(&dir, Of::Sandbox)? {
                super::task::end_made(&made)?;
            }
            // Started, and the daemon died before it heard so.
            if let Some(made) = read(&dir, Of::Shim)? {
                super::task::end_made(&made)?;
            }
            // The pause container's group. A sandbox of ours has none; what its spec may name is its parent's.
            if foreign { super::task::end_made(&bundle::made(&dir)?) } else { Ok(()) }
        })
        .await
    }
}
