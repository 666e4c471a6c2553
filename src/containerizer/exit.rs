//! Exits: one task waits for each running container; what it reports becomes record, published state and event, in that
//! order, and then the shim's part is deleted, which frees the cgroup.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;

use super::owner::{Message, Note, Owner};
use super::parts::Parts;
use super::slot::{Slot, Task};
use super::spans::{act_span, step_span};
use super::{Container, EventKind, Pod};
use crate::launcher::TaskState;
use crate::model::ContainerId;
use crate::model::error::{Kind, Result};
use crate::model::phase::{ContainerPhase, Exit, PodPhase};
use crate::stdx::{clock, failpoint};

/// Pause before a shim is asked again that lives and could not say how a container ended; it doubles.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest of these pauses.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How a process ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The shim says: code and time.
    Process(i32, i64),
    /// Nobody can say any more.
    Lost(String),
}

/// Waits for the exit of a container. However often the shim fails to say: while it lives and knows the container, so may the
/// container, and it is left alone.
pub(super) async fn watch(parts: Arc<Parts>, pod: Arc<Pod>, id: ContainerId) -> Ended {
    let mut pause = PAUSE;
    let why = loop {
        let why = match parts.launcher.wait_task(&pod.id, &id).await {
            Ok((code, at)) => return Ended::Process(code, at),
            Err(error) if error.kind == Kind::Unavailable => break error.to_string(),
            Err(error) => error.to_string(),
        };
        match parts.limited("ask for task state", parts.launcher.task_state(&pod.id, &id)).await {
            Ok(TaskState::Exited { code, at }) => return Ended::Process(code, at),
            Ok(TaskState::Gone) => break why,
            Err(error) if error.kind == Kind::Unavailable => break why,
            Ok(TaskState::Created { .. } | TaskState::Running { .. }) | Err(_) => {}
        }
        tracing::warn!(container = %id, error = why, "the shim could not say how a container ended, it is asked again");
        tokio::time::sleep(pause).await;
        pause = LONGEST_PAUSE.min(2 * pause);
    };
    // First make sure that nothing of it is left, then say that it has ended.
    if let Err(error) = parts.limited("delete task", parts.launcher.delete_task(&pod.id, &id)).await {
        tracing::warn!(container = %id, %error, "task of a vanished shim could not be deleted, the removal tries again");
    }
    Ended::Lost(why)
}

/// How a process that ended with `code` is shown. Reads the cgroup, so it must come before the task is deleted.
pub(super) fn exit_of(parts: &Parts, pod: &Pod, id: &ContainerId, code: i32, at: i64) -> Exit {
    let oom = parts.isolators.oom_kills(&pod.id, &pod.spec, id).unwrap_or(0) > 0;
    Exit::of_process(code, at, oom)
}

impl Owner {
    /// A container's process has ended.
    pub(super) async fn exited(&mut self, id: ContainerId, ended: Ended) {
        if self.slots.get(&id).is_some_and(|slot| !slot.has_exited() && slot.starting.is_none()) {
            let span = act_span!("container.exit", self.pod.id, id);
            self.take_exit(id, ended).instrument(span).await;
        }
    }

    async fn take_exit(&mut self, id: ContainerId, ended: Ended) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.watcher = None;
        let exit = match ended {
            Ended::Process(code, at) => exit_of(&self.parts, &self.pod, &id, code, at),
            Ended::Lost(why) => Exit::lost(clock::now_ns(), why),
        };
        let container = Container::clone(&slot.container);
        if self.end(container, exit).await {
            self.delete_task(&id);
        } else if let Some(slot) = self.slots.get_mut(&id) {
            // What could not be written down is known to the shim alone: it must keep it until the container is removed.
            slot.task = Task::Held;
        }
    }

    /// Record, publish, event of a container's end. Whether it is recorded.
    pub(super) async fn end(&mut self, container: Container, exit: Exit) -> bool {
        let started_at = match container.phase {
            ContainerPhase::Running { started_at, .. } | ContainerPhase::Unknown { started_at } | ContainerPhase::Exited { started_at, .. } => started_at,
            ContainerPhase::Creating | ContainerPhase::Created { .. } => 0,
        };
        let message = exit.message.clone();
        let exited = Container { phase: ContainerPhase::Exited { started_at, exit }, message, ..container };
        let recorded = self.note_down(&exited).await;
        failpoint::hit("exit.recorded");
        self.show(exited, Some(EventKind::Stopped));
        recorded
    }

    /// Deletes the shim's part of an ended container in the background.
    pub(super) fn delete_task(&mut self, id: &ContainerId) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.task = Task::Deleting;
        let (parts, pod, id) = (self.parts.clone(), self.pod.id.clone(), id.clone());
        let span = step_span!("delete_task", pod, id);
        let work = async move {
            let result = parts.limited("delete task", parts.launcher.delete_task(&pod, &id)).await;
            Note::TaskDeleted(id, result)
        };
        self.spawn(work.instrument(span));
    }

    pub(super) fn task_deleted(&mut self, id: &ContainerId, result: Result<()>) {
        let Some(Slot { task, .. }) = self.slots.get_mut(id) else { return };
        *task = match result {
            Ok(()) => Task::Gone,
            Err(error) => {
                tracing::warn!(container = %id, %error, "task of an ended container could not be deleted, its removal tries again");
                Task::Held
            }
        };
    }

    /// The sandbox ended by itself: the pod is ready no more. Its containers may run on; their own watches tell.
    pub(super) async fn sandbox_ended(&mut self) {
        self.sandbox_watcher = None;
        if self.pod.phase != PodPhase::Ready || self.stage.is_tearing_down() {
            return;
        }
        self.not_ready().await;
        let idle = self.slots.iter().filter(|(_, s)| s.starting.is_none() && matches!(s.container.phase, ContainerPhase::Created { .. }));
        idle.for_each(|(id, _)| self.probe_created(id.clone()));
    }

    /// Asks for a created container whose sandbox has ended: it has no watch, and what held its blocked process may be gone.
    pub(super) fn probe_created(&self, id: ContainerId) {
        let (parts, pod, me) = (self.parts.clone(), self.pod.id.clone(), self.me.clone());
        let span = step_span!("probe", pod, id);
        let work = async move {
            let ended = match parts.limited("ask for task state", parts.launcher.task_state(&pod, &id)).await {
                Ok(TaskState::Created { .. } | TaskState::Running { .. }) => return,
                Ok(TaskState::Exited { code, at }) => Ended::Process(code, at),
                Ok(TaskState::Gone) | Err(_) => Ended::Lost("the sandbox ended before the container was started".to_owned()),
            };
            let _ = me.send(Message::Note(Note::Exited(id, ended))).await;
        };
        tokio::spawn(work.instrument(span));
    }

    /// Records and shows that the pod is ready no more, and frees its name.
    pub(super) async fn not_ready(&mut self) {
        self.free_name();
        let pod = Pod { phase: PodPhase::NotReady, ..Pod::clone(&self.pod) };
        if let Err(error) = self.record_pod(&pod).await {
            tracing::error!(pod = %pod.id, %error, "pod record could not be written, a restart will ask the shim");
        }
        self.show_pod(pod, &[EventKind::Stopped]);
    }
}
