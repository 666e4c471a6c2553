//! The owner of a pod: one task, the only one that changes the pod, its containers, their records and what is published.
//!
//! Requests are messages. Handling one never waits for a shim, a plugin or a process: such work runs in tasks of its own that
//! report back by a [`Note`], so a slow stop or a hung mount holds up nothing else. Work that calls isolators goes through
//! the [`lane`](super::lane), one job at a time, as isolators are promised. After every message [`Owner::advance`] looks at
//! the whole state and pushes forward whatever can go on.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tracing::{Instrument, Span};

use super::admit::{self, Admit, Ask};
use super::exit::Ended;
use super::lane::{Done, Lane};
use super::names::Names;
use super::parts::{Parts, Reply};
use super::recover::Probe;
use super::remove::Stage;
use super::slot::{Life, Slot};
use super::spans::step_span;
use super::start::{NotStarted, Remains};
use super::{Container, EventKind, Pod};
use crate::disk::pods;
use crate::model::container::ContainerMetadata;
use crate::model::error::{Error, Result};
use crate::model::phase::PodPhase;
use crate::model::resources::Resources;
use crate::model::{ContainerId, ContainerSpec, PodId};
use crate::stdx::blocking;

/// Requests that may wait in a pod's mailbox before senders wait too.
const MAILBOX: usize = 64;

/// How a container is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Halt {
    /// Its stop signal, once.
    Ask,
    /// SIGKILL to everything in it.
    Kill,
}

/// What an owner is told.
pub(super) enum Message {
    /// Make a container.
    Create(Box<ContainerSpec>, Reply<ContainerId>),
    /// Start it.
    Start(ContainerId, Reply<()>),
    /// Begin to end it. Answers with what to wait on, or nothing when there is nothing to wait for.
    Halt(ContainerId, Halt, Reply<Option<watch::Receiver<Life>>>),
    /// May this be done now? Answers with the container's life.
    Enter(ContainerId, Ask, Reply<watch::Receiver<Life>>),
    /// New limits.
    Update(ContainerId, Box<Resources>, Reply<()>),
    /// Remove a container.
    Remove(ContainerId, Reply<()>),
    /// Stop the pod.
    StopPod(Reply<()>),
    /// Remove the pod.
    RemovePod(Reply<()>),
    /// Remember the pod's overhead and resources.
    UpdatePod(Box<(Option<Resources>, Option<Resources>)>, Reply<()>),
    /// Work of the owner's own has ended.
    Note(Note),
}

impl Message {
    /// The span of the request that this is, or belongs to.
    fn cause(&self) -> Span {
        match self {
            Self::Create(_, reply) => reply.cause(),
            Self::Halt(_, _, reply) => reply.cause(),
            Self::Enter(_, _, reply) => reply.cause(),
            Self::Start(_, reply) | Self::Update(_, _, reply) | Self::Remove(_, reply) | Self::UpdatePod(_, reply) => reply.cause(),
            Self::StopPod(reply) | Self::RemovePod(reply) | Self::Note(Note::Started(_, _, reply)) => reply.cause(),
            Self::Note(Note::Lane(done)) => return done.cause(),
            Self::Note(_) => return Span::none(),
        }
        .clone()
    }
}

/// What tasks of the owner report.
pub(super) enum Note {
    /// A start has ended; if it failed, with what is left of the container.
    Started(ContainerId, Result<(), NotStarted>, Reply<()>),
    /// A start has failed, for this reason; whoever waits goes on when that is recorded.
    StartFails(ContainerId, String, oneshot::Sender<()>),
    /// What a container is that could not be ended after its start failed.
    Ended(ContainerId, Remains),
    /// A process has ended.
    Exited(ContainerId, Ended),
    /// A stop signal or kill did not work.
    HaltFailed(ContainerId, Halt, Error),
    /// The shim's part of a container is deleted, or not.
    TaskDeleted(ContainerId, Result<()>),
    /// The sandbox is no more.
    SandboxEnded,
    /// The lane's job is done.
    Lane(Box<Done>),
    /// A shim that was silent at start has been asked again.
    Probed(Probe),
}

/// One pod.
pub(super) struct Owner {
    pub(super) parts: Arc<Parts>,
    /// Own address, for the tasks it starts.
    pub(super) me: mpsc::Sender<Message>,
    pub(super) mailbox: mpsc::Receiver<Message>,
    /// Messages to look at again before new ones.
    pub(super) again: VecDeque<Message>,
    /// As published.
    pub(super) pod: Arc<Pod>,
    pub(super) slots: HashMap<ContainerId, Slot>,
    pub(super) names: Names<ContainerMetadata, ContainerId, Reply<ContainerId>>,
    pub(super) lane: Lane,
    pub(super) stage: Stage,
    pub(super) stoppers: Vec<Reply<()>>,
    pub(super) removers: Vec<Reply<()>>,
    pub(super) sandbox_watcher: Option<AbortHandle>,
    /// Containers of which only remains were found at start.
    pub(super) orphans: Vec<ContainerId>,
    /// The pod is removed, the task ends.
    pub(super) gone: bool,
}

impl Owner {
    /// An owner of `pod`, reachable from now on.
    pub(super) fn new(parts: Arc<Parts>, pod: Arc<Pod>) -> Self {
        let (me, mailbox) = mpsc::channel(MAILBOX);
        parts.add_owner(&pod.id, me.clone());
        Self {
            parts,
            me,
            mailbox,
            again: VecDeque::new(),
            pod,
            slots: HashMap::new(),
            names: Names::default(),
            lane: Lane::default(),
            stage: Stage::Idle,
            stoppers: Vec::new(),
            removers: Vec::new(),
            sandbox_watcher: None,
            orphans: Vec::new(),
            gone: false,
        }
    }

    /// Runs until the pod is removed.
    pub(super) async fn run(mut self) {
        while !self.gone {
            let message = match self.again.pop_front() {
                Some(message) => message,
                None => match self.mailbox.recv().await {
                    Some(message) => message,
                    None => break,
                },
            };
            self.handle(message).await;
            self.advance().await;
        }
    }

    pub(super) async fn handle(&mut self, message: Message) {
        let cause = message.cause();
        self.take(message).instrument(cause).await;
    }

    async fn take(&mut self, message: Message) {
        match message {
            Message::Create(spec, reply) => self.create(spec, reply),
            Message::Start(id, reply) => self.start(id, reply).await,
            Message::Halt(id, how, reply) => self.halt(id, how, reply),
            Message::Enter(id, ask, reply) => {
                let _ = reply.send(self.enter(&id, ask));
            }
            Message::Update(id, resources, reply) => self.update(id, resources, reply),
            Message::Remove(id, reply) => self.remove(&id, reply),
            Message::StopPod(reply) => self.stop_pod(reply),
            Message::RemovePod(reply) => self.remove_pod(reply),
            Message::UpdatePod(update, reply) => {
                let (overhead, resources) = *update;
                let _ = reply.send(self.update_pod(overhead, resources).await);
            }
            Message::Note(note) => self.note(note).await,
        }
    }

    async fn note(&mut self, note: Note) {
        match note {
            Note::Started(id, result, reply) => self.started(id, result, reply).await,
            Note::StartFails(id, why, recorded) => {
                self.start_fails(&id, why).await;
                let _ = recorded.send(());
            }
            Note::Ended(id, remains) => self.ended_later(&id, remains).await,
            Note::Exited(id, ended) => self.exited(id, ended).await,
            Note::HaltFailed(id, how, error) => self.halt_failed(&id, how, error),
            Note::TaskDeleted(id, result) => self.task_deleted(&id, result),
            Note::SandboxEnded => self.sandbox_ended().await,
            Note::Lane(done) => self.lane_done(*done).await,
            Note::Probed(probe) => self.apply(probe).await,
        }
    }

    fn enter(&self, id: &ContainerId, ask: Ask) -> Result<watch::Receiver<Life>> {
        let slot = self.slot(id)?;
        admit::container(slot.standing(), ask).map_err(|e| e.about("enter container", id))?;
        Ok(slot.life.subscribe())
    }

    fn update(&mut self, id: ContainerId, resources: Box<Resources>, reply: Reply<()>) {
        let admitted = self.slot(&id).and_then(|slot| admit::container(slot.standing(), Ask::Update).map_err(|e| e.about("update container", &id)));
        match (admitted, self.slots.get_mut(&id)) {
            (Ok(Admit::Later), Some(slot)) => slot.parked.push(Message::Update(id, resources, reply)),
            (Ok(_), _) => self.lane.push(super::lane::Job::Update(id, resources, reply)),
            (Err(e), _) => drop(reply.send(Err(e))),
        }
    }

    async fn update_pod(&mut self, overhead: Option<Resources>, resources: Option<Resources>) -> Result<()> {
        let mut pod = Pod::clone(&self.pod);
        pod.spec.overhead = overhead.or(pod.spec.overhead);
        pod.spec.resources = resources.or(pod.spec.resources);
        self.record_pod(&pod).await?;
        self.show_pod(pod, &[]);
        Ok(())
    }

    /// # Errors
    /// `NotFound`.
    pub(super) fn slot(&self, id: &ContainerId) -> Result<&Slot> {
        self.slots.get(id).ok_or_else(|| Error::not_found(format!("find container {id}: no such container")))
    }

    /// Whether the pod takes new work.
    pub(super) fn is_serving(&self) -> bool {
        self.pod.phase == PodPhase::Ready && self.stage == Stage::Idle
    }

    /// Publishes the pod.
    pub(super) fn show_pod(&mut self, pod: Pod, events: &[EventKind]) {
        self.pod = Arc::new(pod);
        self.parts.visible.put_pod(&self.pod, events);
    }

    /// Publishes a container and wakes who waits for its end.
    pub(super) fn show(&mut self, container: Container, event: Option<EventKind>) {
        let container = Arc::new(container);
        let Some(slot) = self.slots.get_mut(&container.id) else { return };
        slot.container = container.clone();
        self.parts.visible.put_container(&container, event);
        if slot.has_exited() {
            slot.life.send_replace(Life::Ended);
            self.names.release(&container.spec.metadata, &container.id);
        }
    }

    /// # Errors
    /// I/O errors.
    pub(super) async fn record_pod(&self, pod: &Pod) -> Result<()> {
        let (layout, pod) = (self.parts.layout.clone(), pod.clone());
        let span = step_span!("record", pod.id);
        blocking::run("record pod", move || pods::write_pod(&layout, &pod.id, &pod)).instrument(span).await
    }

    /// # Errors
    /// I/O errors.
    pub(super) async fn record(&self, container: &Container) -> Result<()> {
        record_container(&self.parts, container).await
    }

    /// Records what has happened already: the world does not change back because a disk is full, so a failure is only said. Whether
    /// the record holds it now.
    pub(super) async fn note_down(&self, container: &Container) -> bool {
        let written = self.record(container).await;
        if let Err(error) = &written {
            tracing::error!(container = %container.id, %error, "container record could not be written, a restart will ask the shim");
        }
        written.is_ok()
    }

    /// Starts a task that reports to this owner when it ends. It is in no span but those it opens: many wait for long.
    pub(super) fn spawn(&self, work: impl Future<Output = Note> + Send + 'static) -> AbortHandle {
        let me = self.me.clone();
        tokio::spawn(async move {
            // The owner is gone only when the pod is removed: nobody to tell, nothing to do.
            let _ = me.send(Message::Note(work.await)).await;
        })
        .abort_handle()
    }

    /// Waits for the end of the sandbox from now on.
    pub(super) fn watch_sandbox(&mut self) {
        let (launcher, id) = (self.parts.launcher.clone(), self.pod.id.clone());
        self.sandbox_watcher = Some(self.spawn(async move {
            launcher.wait_sandbox(&id).await;
            Note::SandboxEnded
        }));
    }

    /// The pod serves no longer, so its name is free.
    pub(super) fn free_name(&self) {
        self.parts.names().release(&self.pod.spec.metadata, &self.pod.id);
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(watcher) = self.sandbox_watcher.take() {
            watcher.abort();
        }
    }
}

/// Writes a container's record.
///
/// # Errors
/// I/O errors.
pub(super) async fn record_container(parts: &Parts, container: &Container) -> Result<()> {
    let (layout, container) = (parts.layout.clone(), container.clone());
    let span = step_span!("record", container.pod, container.id);
    blocking::run("record container", move || pods::write_container(&layout, &container.pod, &container.id, &container)).instrument(span).await
}

/// Sends a request to the owner of `pod` and waits for its answer. `None` when the pod was removed before or meanwhile.
pub(super) async fn ask<T>(parts: &Parts, pod: &PodId, message: impl FnOnce(Reply<T>) -> Message) -> Option<Result<T>> {
    let owner = parts.owner(pod)?;
    let (reply, answer) = Reply::channel();
    if owner.send(message(reply)).await.is_ok()
        && let Ok(answer) = answer.await
    {
        return Some(answer);
    }
    // An owner that removed its pod has left the directory of owners; one that is still in it has panicked.
    parts.owner(pod).map(|_| Err(Error::internal(format!("reach the owner of pod {pod}: it ended unexpectedly"))))
}
