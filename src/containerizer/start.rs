//! Starting a container.
//!
//! The record says `Running` before the first process is let go: after a crash in between, the shim's answer (still
//! created, running, or ended already) decides, and no second write is needed when all goes well. When the start fails, the
//! record says so before the shim forgets the task.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tracing::Instrument;

use super::admit::{self, Ask};
use super::owner::{Message, Note, Owner};
use super::parts::{Parts, Reply};
use super::slot::{Slot, Task};
use super::spans::{act_span, step_span};
use super::{Container, EventKind};
use crate::launcher::TaskState;
use crate::model::error::{Error, Result};
use crate::model::phase::{ContainerPhase, Exit};
use crate::model::{ContainerId, PodId};
use crate::stdx::{clock, failpoint};

/// Why a container was not started, and what is left of it.
pub(super) type NotStarted = (Error, Remains);

/// What is left of a container whose start failed.
#[derive(Debug)]
pub(super) enum Remains {
    /// Its task is deleted.
    Nothing,
    /// A task that could not be deleted, in this state. The start may have worked after all, its answer being late.
    Task(TaskState),
    /// Nobody can say.
    Unknown,
}

/// Deletes the task of a container whose start failed; if that fails too, asks what it is.
async fn end(parts: &Parts, pod: &PodId, id: &ContainerId) -> Remains {
    let Err(error) = parts.limited("delete task", parts.launcher.delete_task(pod, id)).await else { return Remains::Nothing };
    tracing::warn!(container = %id, %error, "task of a container that failed to start could not be deleted");
    match parts.limited("ask for task state", parts.launcher.task_state(pod, id)).await {
        Ok(TaskState::Gone) => Remains::Nothing,
        Ok(state) => Remains::Task(state),
        Err(_) => Remains::Unknown,
    }
}

/// What a container is whose start failed and of which nothing is left.
fn failed(container: &Container, why: String) -> Container {
    let exit = Exit::start_error(clock::now_ns(), why.clone());
    Container { phase: ContainerPhase::Exited { started_at: 0, exit }, message: why, ..container.clone() }
}

impl Owner {
    /// `StartContainer`.
    pub(super) async fn start(&mut self, id: ContainerId, reply: Reply<()>) {
        let span = act_span!("container.start", self.pod.id, id);
        self.begin_start(id, reply).instrument(span).await;
    }

    async fn begin_start(&mut self, id: ContainerId, reply: Reply<()>) {
        let running = match self.startable(&id) {
            Ok(running) => running,
            Err(e) => return drop(reply.send(Err(e))),
        };
        failpoint::hit("start_container.admitted");
        if let Err(e) = self.record(&running).await {
            return drop(reply.send(Err(e)));
        }
        failpoint::hit("start_container.recorded");
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.starting = Some(Arc::new(running));
        }
        let (parts, pod, me) = (self.parts.clone(), self.pod.id.clone(), self.me.clone());
        let work = async move {
            let started = parts.launcher.start_task(&pod, &id).instrument(step_span!("start_task", pod, id)).await;
            failpoint::hit("start_container.started");
            let Err(error) = started else { return Note::Started(id, Ok(()), reply) };
            // When the task is deleted nobody else knows why it failed, so that is recorded first, by the only one who writes there.
            let (recorded, done) = oneshot::channel();
            let _ = me.send(Message::Note(Note::StartFails(id.clone(), error.to_string(), recorded))).await;
            let _ = done.await;
            failpoint::hit("start_container.failed");
            let remains = end(&parts, &pod, &id).instrument(step_span!("delete_task", pod, id)).await;
            failpoint::hit("start_container.ended");
            Note::Started(id, Err((error, remains)), reply)
        };
        self.spawn(work.in_current_span());
    }

    /// What the container becomes, if it may be started now.
    fn startable(&self, id: &ContainerId) -> Result<Container> {
        let slot = self.slot(id)?;
        admit::container(slot.standing(), Ask::Start).map_err(|e| e.about("start container", id))?;
        admit::create_container(self.pod.phase, !self.is_serving()).map_err(|e| e.about("start container", id))?;
        // The process whose namespace was promised may have ended since: its number could be somebody else's by now.
        self.target_pid(&slot.container.spec)?;
        let ContainerPhase::Created { pid } = slot.container.phase else {
            return Err(Error::internal(format!("start container {id}: it is not created")));
        };
        self.parts.images.check_container(id.as_str()).map_err(|e| e.within(format!("start container {id}")))?;
        let started_at = clock::now_ns();
        Ok(Container { phase: ContainerPhase::Running { pid, started_at }, ..Container::clone(&slot.container) })
    }

    /// A start has failed, and what is left of it is deleted next.
    pub(super) async fn start_fails(&mut self, id: &ContainerId, why: String) {
        let Some(starting) = self.slots.get(id).and_then(|slot| slot.starting.as_deref()) else { return };
        let failed = failed(starting, why);
        self.note_down(&failed).await;
        // What the record says while the start is under way (an update of limits writes it too).
        if let Some(slot) = self.slots.get_mut(id) {
            slot.starting = Some(Arc::new(failed));
        }
    }

    /// A start has ended.
    pub(super) async fn started(&mut self, id: ContainerId, result: Result<(), NotStarted>, reply: Reply<()>) {
        let Some(started) = self.slots.get_mut(&id).and_then(|slot| slot.starting.take()) else {
            return drop(reply.send(Err(Error::not_found(format!("start container {id}: no such container")))));
        };
        let started = Arc::unwrap_or_clone(started);
        let answer = match result {
            Ok(()) => {
                failpoint::hit("start_container.running");
                self.show(started, Some(EventKind::Started));
                self.watch(&id);
                Ok(())
            }
            Err((error, remains)) => {
                self.not_started(started, &error, remains).await;
                Err(error)
            }
        };
        if let Some(slot) = self.slots.get_mut(&id) {
            self.again.extend(slot.parked.drain(..));
        }
        let _ = reply.send(answer);
    }

    async fn not_started(&mut self, failed: Container, error: &Error, remains: Remains) {
        match remains {
            Remains::Nothing => self.show(failed, Some(EventKind::Stopped)),
            Remains::Task(state) => {
                tracing::warn!(container = %failed.id, %error, ?state, "start failed, but the container could not be ended: it is what its shim says");
                let Some(created) = self.slots.get(&failed.id).map(|slot| slot.container.clone()) else { return };
                let (ContainerPhase::Created { pid }, ContainerPhase::Exited { exit, .. }) = (&created.phase, &failed.phase) else { return };
                // As after a restart of the daemon that found it recorded as running.
                let phase = ContainerPhase::Running { pid: *pid, started_at: exit.at };
                let running = Container { phase, message: created.message.clone(), ..failed.clone() };
                self.note_down(&running).await;
                let id = running.id.clone();
                self.show(running, None);
                self.apply_state(&id, &state).await;
            }
            Remains::Unknown => {
                let ContainerPhase::Exited { exit, .. } = &failed.phase else { return };
                let phase = ContainerPhase::Unknown { started_at: exit.at };
                let id = failed.id.clone();
                self.show(Container { phase, ..failed }, None);
                self.end_later(id);
            }
        }
    }

    /// Goes on to end a container that could neither be started nor ended, until its shim says what it is.
    fn end_later(&self, id: ContainerId) {
        let (parts, pod) = (self.parts.clone(), self.pod.id.clone());
        self.spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(parts.config.reattach_interval_ms)).await;
                match end(&parts, &pod, &id).await {
                    Remains::Unknown => {}
                    remains => return Note::Ended(id, remains),
                }
            }
        });
    }

    /// What became of a container that was unknown after its start.
    pub(super) async fn ended_later(&mut self, id: &ContainerId, remains: Remains) {
        let Some(container) = self.slots.get(id).filter(|s| !s.has_exited()).map(|s| Container::clone(&s.container)) else { return };
        match remains {
            Remains::Task(state) => self.apply_state(id, &state).await,
            Remains::Nothing => {
                let failed = failed(&container, container.message.clone());
                self.note_down(&failed).await;
                self.show(failed, Some(EventKind::Stopped));
            }
            Remains::Unknown => {}
        }
    }

    /// Waits for the exit of a running container from now on.
    pub(super) fn watch(&mut self, id: &ContainerId) {
        let work = super::exit::watch(self.parts.clone(), self.pod.clone(), id.clone());
        let key = id.clone();
        let watcher = self.spawn(async move { Note::Exited(key, work.await) });
        if let Some(Slot { watcher: current, task, .. }) = self.slots.get_mut(id) {
            *task = Task::Held;
            *current = Some(watcher);
        }
    }
}
