//! Starting a container.
//!
//! The record says `Running` before the first process is let go: after a crash in between, the shim's answer (still
//! created, running, or ended already) decides, and no second write is needed when all goes well.

use std::sync::Arc;

use tracing::Instrument;

use super::admit::{self, Ask};
use super::owner::{Note, Owner};
use super::parts::Reply;
use super::slot::{Slot, Task};
use super::spans::{act_span, step_span};
use super::{Container, EventKind};
use crate::model::ContainerId;
use crate::model::error::{Error, Result};
use crate::model::phase::{ContainerPhase, Exit};
use crate::stdx::{clock, failpoint};

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
        let (parts, pod) = (self.parts.clone(), self.pod.id.clone());
        let work = async move {
            let result = parts.launcher.start_task(&pod, &id).instrument(step_span!("start_task", pod, id)).await;
            failpoint::hit("start_container.started");
            if result.is_err()
                && let undo = parts.limited("delete task", parts.launcher.delete_task(&pod, &id))
                && let Err(error) = undo.instrument(step_span!("delete_task", pod, id)).await
            {
                tracing::warn!(container = %id, %error, "task of a container that failed to start could not be deleted, its removal tries again");
            }
            Note::Started(id, result, reply)
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

    /// A start has ended.
    pub(super) async fn started(&mut self, id: ContainerId, result: Result<()>, reply: Reply<()>) {
        let Some(running) = self.slots.get_mut(&id).and_then(|slot| slot.starting.take()) else {
            return drop(reply.send(Err(Error::not_found(format!("start container {id}: no such container")))));
        };
        match &result {
            Ok(()) => {
                failpoint::hit("start_container.running");
                self.show(Container::clone(&running), Some(EventKind::Started));
                self.watch(&id);
            }
            Err(error) => {
                let message = error.to_string();
                let exit = Exit::start_error(clock::now_ns(), message.clone());
                let failed = Container { phase: ContainerPhase::Exited { started_at: 0, exit }, message, ..Container::clone(&running) };
                self.note_down(&failed).await;
                self.show(failed, Some(EventKind::Stopped));
            }
        }
        if let Some(slot) = self.slots.get_mut(&id) {
            self.again.extend(slot.parked.drain(..));
        }
        let _ = reply.send(result);
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
