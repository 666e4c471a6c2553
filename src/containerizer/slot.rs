//! A container inside its pod's owner: what is published of it plus what is under way.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::Span;

use super::Container;
use super::admit::Standing;
use super::owner::Message;
use super::parts::Reply;
use crate::model::error::{Error, Kind, Result};
use crate::model::image::{Image, RootFs};
use crate::model::phase::ContainerPhase;

/// What callers that wait for the end of a container see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// It has not ended.
    Live,
    /// It could not be killed, for this reason; it may end all the same.
    Stuck(Kind, String),
    /// It has ended, and the end is published.
    Ended,
}

/// Waits until the container has ended.
///
/// # Errors
/// When it turned out that it cannot be killed.
pub(super) async fn ended(life: &mut watch::Receiver<Life>) -> Result<()> {
    match life.wait_for(|life| *life != Life::Live).await.as_deref() {
        Ok(Life::Stuck(kind, why)) => Err(Error::new(*kind, why.clone())),
        // The sender goes with the container: removed is ended too.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The shim's part of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// The shim may hold it.
    Held,
    /// Being deleted.
    Deleting,
    /// Deleted: process tree, cgroup and bundle are gone.
    Gone,
}

/// What the isolators were shown when the container was made; needed again for updates.
#[derive(Clone)]
pub(super) struct Basis {
    pub(super) image: Arc<Image>,
    pub(super) rootfs: Arc<RootFs>,
}

/// One container.
pub(super) struct Slot {
    /// As published.
    pub(super) container: Arc<Container>,
    /// Unknown after a restart of the daemon, until it is needed.
    pub(super) basis: Option<Basis>,
    pub(super) life: watch::Sender<Life>,
    pub(super) task: Task,
    /// What it becomes when the start under way succeeds.
    pub(super) starting: Option<Arc<Container>>,
    /// The stop signal was sent; it is sent once.
    pub(super) signalled: bool,
    /// SIGKILL was sent and its effect is awaited.
    pub(super) killing: bool,
    /// A kill failed while the whole pod is being stopped: the end of the sandbox has to do.
    pub(super) unkillable: bool,
    /// Who waits for its removal; `None` when nobody wants it removed.
    pub(super) removal: Option<Vec<Reply<()>>>,
    /// Its clean-up is queued or running.
    pub(super) cleaning: bool,
    /// Requests to look at again when the start under way has ended.
    pub(super) parked: Vec<Message>,
    /// The task that waits for its exit.
    pub(super) watcher: Option<AbortHandle>,
}

impl Slot {
    pub(super) fn new(container: Arc<Container>, basis: Option<Basis>) -> Self {
        let ended = matches!(container.phase, ContainerPhase::Exited { .. });
        Self {
            container,
            basis,
            life: watch::Sender::new(if ended { Life::Ended } else { Life::Live }),
            task: Task::Held,
            starting: None,
            signalled: false,
            killing: false,
            unkillable: false,
            removal: None,
            cleaning: false,
            parked: Vec::new(),
            watcher: None,
        }
    }

    pub(super) fn standing(&self) -> Standing {
        Standing::of(&self.container.phase, self.starting.is_some(), self.removal.is_some())
    }

    /// The span of who wants it removed; who wants the whole `pod` removed may not have asked for the container.
    pub(super) fn removal_cause(&self, pod: &Span) -> Span {
        self.removal.iter().flatten().next().map_or(pod, Reply::cause).clone()
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.container.phase, ContainerPhase::Running { .. })
    }

    pub(super) fn has_exited(&self) -> bool {
        matches!(self.container.phase, ContainerPhase::Exited { .. })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            watcher.abort();
        }
    }
}
