//! A pod's shim as the daemon holds it: the connection, and the news of its end.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::sandbox_api;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::client::Client;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::shim::SANDBOX_SERVICE;
use crate::model::{ContainerId, PodId};
use crate::stdx::crilog::LogFile;

/// Pause before a shim is asked again whose connection broke; it doubles.
const PAUSE: Duration = Duration::from_millis(20);
/// The longest of these pauses.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Who answers the pod's handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Our shim: sandbox service, CRI logs.
    Ours,
    /// Another: a pause container, and the daemon writes the logs.
    Foreign,
}

/// The shim's process.
pub struct ShimProcess {
    pidfd: AsyncFd<OwnedFd>,
}

impl ShimProcess {
    /// Watches process `pid`, which must be known to be the shim (it answers on its socket).
    ///
    /// # Errors
    /// When there is no such process.
    #[expect(
        deprecated,
        reason = "deprecated for types whose AsRawFd may change its answer; an OwnedFd's cannot, and the replacement needs a promise that it already keeps"
    )]
    pub fn open(pid: u32) -> Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| Error::internal(format!("shim has process number {pid}")))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).act("open shim process", pid)?;
        Ok(Self { pidfd: AsyncFd::with_interest(pidfd, Interest::READABLE).act("watch shim process", pid)? })
    }

    /// Resolves when it has ended.
    pub async fn ended(&self) {
        // An error here means that the runtime is shutting down; then nobody waits any more.
        let _ = self.pidfd.readable().await.map(|mut ready| ready.retain_ready());
    }

    /// Kills it and waits, within `limit`.
    pub async fn kill(&self, limit: Duration) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
        let _ = tokio::time::timeout(limit, self.ended()).await;
    }

    /// Asks what may be asked twice: again for as long as the connection breaks and the shim lives.
    ///
    /// # Errors
    /// `Unavailable` when the shim has ended, and only then; whatever else `request` fails with.
    pub async fn ask<A, F: Future<Output = Result<A>>>(&self, request: impl FnMut() -> F) -> Result<A> {
        self.again(&[Kind::Unavailable], request).await
    }

    /// The same, and also for as long as no answer comes in time: for work that nobody waits for and that must be done in the end.
    ///
    /// # Errors
    /// As [`ShimProcess::ask`], and never `DeadlineExceeded` while the shim lives.
    pub async fn insist<A, F: Future<Output = Result<A>>>(&self, request: impl FnMut() -> F) -> Result<A> {
        self.again(&[Kind::Unavailable, Kind::DeadlineExceeded], request).await
    }

    async fn again<A, F: Future<Output = Result<A>>>(&self, no_answer: &[Kind], mut request: impl FnMut() -> F) -> Result<A> {
        let mut pause = PAUSE;
        loop {
            match request().await {
                Err(e) if no_answer.contains(&e.kind) => {
                    if tokio::time::timeout(pause, self.ended()).await.is_ok() {
                        return Err(e);
                    }
                    tracing::debug!(error = %e, "the shim lives, it is asked again");
                }
                answer => return answer,
            }
            pause = LONGEST_PAUSE.min(2 * pause);
        }
    }
}

/// A pod with a living shim.
pub struct Pod {
    /// Id.
    pub id: PodId,
    /// Who answers.
    pub whose: Whose,
    /// Handler's name as resolved.
    pub handler: String,
    /// The connection.
    pub client: Client,
    /// The shim's process number.
    pub shim_pid: u32,
    /// The shim.
    pub shim: Arc<ShimProcess>,
    ended: watch::Receiver<bool>,
    watcher: JoinHandle<()>,
    /// Log pumps of foreign shims' containers.
    pumps: Mutex<HashMap<ContainerId, Logging>>,
}

/// The daemon's part in the logging of a foreign shim's container. Ends with the value: two readers would tear each other's lines.
pub struct Logging {
    /// One task per stream.
    pub pumps: Vec<JoinHandle<()>>,
    /// The file they share.
    pub file: Arc<Mutex<LogFile>>,
}

impl Drop for Logging {
    fn drop(&mut self) {
        self.pumps.iter().for_each(JoinHandle::abort);
    }
}

impl Pod {
    /// Takes charge of a connected shim, whose process `shim_pid` is.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn new(id: PodId, whose: Whose, handler: String, client: Client, shim_pid: u32) -> Result<Arc<Self>> {
        let (tell, ended) = watch::channel(false);
        let shim = Arc::new(ShimProcess::open(shim_pid)?);
        let watcher = tokio::spawn(watch_end(id.clone(), whose, client.clone(), shim.clone(), tell));
        Ok(Arc::new(Self { id, whose, handler, client, shim_pid, shim, ended, watcher, pumps: Mutex::default() }))
    }

    /// Resolves when the sandbox has ended.
    pub async fn ended(&self) {
        // An error means that the watcher ended without a word: the same news.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// The log pumps of foreign shims' containers.
    pub fn pumps(&self) -> MutexGuard<'_, HashMap<ContainerId, Logging>> {
        self.pumps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pod that nobody holds any more needs no connection and no descriptor either.
impl Drop for Pod {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

async fn watch_end(id: PodId, whose: Whose, client: Client, shim: Arc<ShimProcess>, tell: watch::Sender<bool>) {
    let told = async || match whose {
        Whose::Ours => {
            let mut request = sandbox_api::WaitSandboxRequest::new();
            request.sandbox_id = id.as_str().to_owned();
            client.call::<sandbox_api::WaitSandboxResponse>(SANDBOX_SERVICE, "WaitSandbox", &request, None).await.map(drop)
        }
        Whose::Foreign => {
            let mut request = api::WaitRequest::new();
            request.id = id.as_str().to_owned();
            client.task_unbounded::<api::WaitResponse>("Wait", &request).await.map(drop)
        }
    };
    let stopped = async {
        let mut pause = PAUSE;
        // A broken connection is not yet a dead shim, and one without a sandbox service does not know its pause container from the start.
        while told().await.is_err() {
            tokio::time::sleep(pause).await;
            pause = LONGEST_PAUSE.min(2 * pause);
        }
    };
    tokio::select! {
        () = stopped => {}
        () = shim.ended() => {}
    }
    tell.send_replace(true);
}
