//! After a restart of the daemon, and after the death of a shim.

use std::path::Path;
use std::time::Duration;

use super::client::Client;
use super::foreign::Streams;
use super::pod::{Pod, Whose};
use super::shims::{END_LIMIT, Resolved, ShimLauncher, shim_pid};
use super::start::Program;
use super::{Sandbox, bundle, start};
use crate::disk::bundle::{ADDRESS, Of, read};
use crate::model::error::{Error, Kind, Result};
use crate::model::shim::{SANDBOX_SERVICE, TASK_V2, TASK_V3};
use crate::model::{ContainerId, PodId};
use crate::stdx::blocking;

/// Bound of the `delete` verb of a foreign shim, together with [`END_LIMIT`] less than the containerizer's patience: a runtime that
/// hangs must not keep its pod.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(5);

impl ShimLauncher {
    /// Connects to the shim of a recorded pod, asks whether it is alive, and goes on where the last daemon stopped.
    pub(super) async fn find_again(&self, id: &PodId, handler: &str, sandbox: &Sandbox) -> Result<()> {
        if self.known(id).is_some() {
            return Ok(());
        }
        let (whose, tasks) = self.kind(id, handler);
        let limit = self.config.reattach_limit();
        let mut refused = Error::internal("ask shim: no version of its service is known");
        for task in tasks {
            let probe = Client::connect(&sandbox.address, task, limit).await?;
            let pid = match shim_pid(&probe, id).await {
                // Silence is no matter of versions.
                Err(e) if matches!(e.kind, Kind::DeadlineExceeded | Kind::Unavailable) => return Err(e),
                Err(e) => {
                    refused = e;
                    continue;
                }
                Ok(pid) => pid,
            };
            if whose == Whose::Ours {
                let mut ping = containerd_shim_protos::sandbox_api::PingRequest::new();
                ping.sandbox_id = id.as_str().to_owned();
                probe.call::<containerd_shim_protos::sandbox_api::PingResponse>(SANDBOX_SERVICE, "PingSandbox", &ping, Some(limit)).await?;
            }
            return self.adopt(id, whose, handler, sandbox, task, pid).await;
        }
        Err(refused)
    }

    /// Whose shim a pod has, and the task services it may speak. Its bundle knows best: a handler may have been removed from the
    /// configuration, or its name lost with the pod's record.
    fn kind(&self, id: &PodId, handler: &str) -> (Whose, &'static [&'static str]) {
        let dir = self.layout.sandbox_bundle(id);
        if !bundle::Noted::exists(&dir) && matches!(self.resolve(handler), Ok(Resolved::Ours)) {
            return (Whose::Ours, &[TASK_V3]);
        }
        let tasks: &[&str] = match bundle::Noted::read(&dir) {
            Ok(Some(bundle::Noted { said: Some((_, task)), .. })) if task == TASK_V3 => &[TASK_V3],
            Ok(Some(bundle::Noted { said: Some(_), .. })) => &[TASK_V2],
            // An unknown version is refused with an error that says so.
            _ => &[TASK_V2, TASK_V3],
        };
        (Whose::Foreign, tasks)
    }

    /// Finds the shim of a pod that is being deleted, when nobody has asked for it since the daemon started. One that does not answer is
    /// killed: nothing needs it any more, and nothing must come from it while the pod is cleaned up.
    pub(super) async fn find_or_kill(&self, id: &PodId, handler: &str, sandbox: Option<&Sandbox>) {
        if self.known(id).is_some() {
            return;
        }
        if let Some(sandbox) = sandbox.cloned().or_else(|| self.started(id))
            && matches!(tokio::time::timeout(END_LIMIT, self.find_again(id, handler, &sandbox)).await, Ok(Ok(())))
        {
            return;
        }
        let dir = self.layout.sandbox_bundle(id);
        let killing = move || match read(&dir, Of::Shim)? {
            Some(made) => super::task::end_made(&made),
            None => Ok(()),
        };
        if let Err(error) = blocking::run("kill lost shim", killing).await {
            // Tried again when everything else is cleaned up, and a failure then.
            tracing::warn!(pod = %id, %error, "a shim that does not answer cannot be killed");
        }
    }

    /// What is in the bundle of a shim that started while the daemon died: where it listens.
    fn started(&self, id: &PodId) -> Option<Sandbox> {
        let dir = self.layout.sandbox_bundle(id);
        let noted = bundle::Noted::read(&dir).ok().flatten().and_then(|noted| noted.said);
        let address = noted.map(|(address, _)| address).or_else(|| std::fs::read_to_string(dir.join(ADDRESS)).ok())?;
        Some(Sandbox { address, ..Sandbox::default() })
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

    /// What a shim that was killed left of the pod itself. Does nothing when it ended in order and its runtime has `forgotten` the pod.
    pub(super) async fn clean_up_lost(&self, id: &PodId, handler: &str, forgotten: bool) -> Result<()> {
        let dir = self.layout.sandbox_bundle(id);
        if !dir.exists() {
            return Ok(());
        }
        let foreign = self.kind(id, handler).0 == Whose::Foreign;
        if foreign && !forgotten {
            self.forget_lost(id, id.as_str(), &dir).await;
        }
        blocking::run("clean up lost sandbox", move || {
            // The shim itself: started, and the daemon died before it heard so.
            for of in [Of::Shim, Of::Sandbox] {
                if let Some(made) = read(&dir, of)? {
                    super::task::end_made(&made)?;
                }
            }
            // The pause container's group. A sandbox of ours has none; what its spec may name is its parent's.
            if foreign { super::task::end_made(&bundle::made(&dir)?) } else { Ok(()) }
        })
        .await
    }

    /// Has the runtime of a lost shim forget a container, the pause container too: it kills it and removes its own state, which lies
    /// where only it knows. Nothing for our own shim, which keeps none.
    pub(super) async fn forget_lost(&self, pod: &PodId, id: &str, dir: &Path) {
        let Ok(Some(noted)) = bundle::Noted::read(&self.layout.sandbox_bundle(pod)) else { return };
        if !dir.exists() {
            return;
        }
        if let Err(error) = start::delete(&Program::Path(noted.program), id, dir, CLEAN_UP_LIMIT).await {
            // Its processes are killed without it as well.
            tracing::warn!(pod = %pod, container = id, %error, "the runtime of a lost shim could not clean up after it");
        }
    }
}
