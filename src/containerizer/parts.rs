//! What every pod's owner works with: the components below, the visible state, the names of pods and the owners' addresses.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use super::names::Names;
use super::owner::Message;
use super::publish::{Publisher, Stamps};
use super::{Container, Pod};
use crate::disk::Layout;
use crate::disk::pods::Recorded;
use crate::isolators::Isolators;
use crate::launcher::Launcher;
use crate::model::error::{Error, Kind, Result};
use crate::model::pod::PodMetadata;
use crate::model::{ContainerId, PodId};
use crate::network::Network;
use crate::provisioner::Images;

/// Where an answer goes, with the span of who asked: the work is part of it, also when the caller has left.
pub(super) struct Reply<T> {
    to: oneshot::Sender<Result<T>>,
    cause: Span,
}

impl<T> Reply<T> {
    /// One for a request of the current span.
    pub(super) fn channel() -> (Self, oneshot::Receiver<Result<T>>) {
        let (to, answer) = oneshot::channel();
        (Self { to, cause: Span::current() }, answer)
    }

    /// Answers; gives the answer back when nobody waits for it any more.
    pub(super) fn send(self, answer: Result<T>) -> Result<(), Result<T>> {
        self.to.send(answer)
    }

    /// The span of the request.
    pub(super) fn cause(&self) -> &Span {
        &self.cause
    }
}

/// Time limits and sizes of the containerizer. The defaults fit a loaded node; nothing here has to be set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How long a start waits for one pod's shim, milliseconds. Slower ones are tried again in the background while the
    /// containers of the pod are shown as unknown.
    pub reattach_timeout_ms: u64,
    /// Pause between two tries to reach such a shim, milliseconds.
    pub reattach_interval_ms: u64,
    /// How long a shim may take to answer a kill, a state question or the end of a sandbox, milliseconds.
    pub shim_timeout_ms: u64,
    /// How long a killed container may take to end before the call that wanted its end fails, milliseconds.
    pub kill_timeout_ms: u64,
    /// How long a synchronous exec may take to answer after its container has ended, milliseconds.
    pub exec_drain_ms: u64,
    /// Events kept for a subscriber that does not read; more are dropped, oldest first.
    pub event_backlog: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            reattach_timeout_ms: 2_000,
            reattach_interval_ms: 2_000,
            shim_timeout_ms: 10_000,
            kill_timeout_ms: 30_000,
            exec_drain_ms: 2_000,
            event_backlog: 1024,
        }
    }
}

/// Shared by all owners.
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) layout: Layout,
    pub(super) images: Arc<dyn Images>,
    pub(super) launcher: Arc<dyn Launcher>,
    pub(super) isolators: Isolators,
    pub(super) network: Arc<dyn Network>,
    /// What the outside sees.
    pub(super) visible: Publisher,
    /// Creation times.
    pub(super) stamps: Stamps,
    names: Mutex<Names<PodMetadata, PodId, Reply<PodId>>>,
    owners: RwLock<HashMap<PodId, mpsc::Sender<Message>>>,
}

impl Parts {
    pub(super) fn new(
        config: Config,
        layout: Layout,
        images: Arc<dyn Images>,
        launcher: Arc<dyn Launcher>,
        isolators: Isolators,
        network: Arc<dyn Network>,
    ) -> Self {
        let visible = Publisher::new(config.event_backlog);
        Self { config, layout, images, launcher, isolators, network, visible, stamps: Stamps::default(), names: Mutex::default(), owners: RwLock::default() }
    }

    /// Names of pods. Held for map operations only.
    pub(super) fn names(&self) -> MutexGuard<'_, Names<PodMetadata, PodId, Reply<PodId>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a pod's owner.
    pub(super) fn owner(&self, pod: &PodId) -> Option<mpsc::Sender<Message>> {
        self.owners.read().unwrap_or_else(PoisonError::into_inner).get(pod).cloned()
    }

    /// Makes an owner known.
    pub(super) fn add_owner(&self, pod: &PodId, owner: mpsc::Sender<Message>) {
        self.owners.write().unwrap_or_else(PoisonError::into_inner).insert(pod.clone(), owner);
    }

    /// Forgets an owner that has removed its pod.
    pub(super) fn drop_owner(&self, pod: &PodId) {
        self.owners.write().unwrap_or_else(PoisonError::into_inner).remove(pod);
    }

    /// Bounds an act of a shim: a hung one must not hold a pod's teardown.
    ///
    /// # Errors
    /// `DeadlineExceeded`, naming the act.
    pub(super) async fn limited<T>(&self, act: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = Duration::from_millis(self.config.shim_timeout_ms);
        tokio::time::timeout(limit, work)
            .await
            .unwrap_or_else(|_| Err(Error::new(Kind::DeadlineExceeded, format!("{act}: the shim did not answer within {} s", limit.as_secs()))))
    }
}

/// The same failure for a second listener.
pub(super) fn copy(error: &Error) -> Error {
    Error::new(error.kind, error.to_string())
}

/// Gives every listener the same failure.
pub(super) fn refuse_all<T>(waiters: impl IntoIterator<Item = Reply<T>>, error: &Error) {
    for waiter in waiters {
        // A listener that left is fine here and everywhere below: dropping a call never drops the work.
        let _ = waiter.send(Err(copy(error)));
    }
}

impl Recorded for Pod {
    fn belongs(&self, pod: &PodId, container: Option<&ContainerId>) -> bool {
        self.id == *pod && container.is_none()
    }
}

impl Recorded for Container {
    fn belongs(&self, pod: &PodId, container: Option<&ContainerId>) -> bool {
        self.pod == *pod && container == Some(&self.id)
    }
}
