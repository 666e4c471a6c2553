//! The end of pods and containers, level-triggered: requests only note who wants what; [`Owner::advance`] looks at the whole
//! state after every message and takes every step that has become possible. A failed step answers all who wait; the next
//! request begins again at what is left. Every act here is idempotent.

use std::sync::Arc;

use tracing::{Instrument, Span};

use super::admit::{self, Ask};
use super::lane::Job;
use super::owner::Owner;
use super::parts::{Parts, Reply, copy, refuse_all};
use super::slot::Task;
use super::spans::step_span;
use super::{Container, Pod, create};
use crate::disk::pods;
use crate::model::error::{Error, Result};
use crate::model::phase::{ContainerPhase, Exit, PodPhase};
use crate::model::{ContainerId, PodId};
use crate::stdx::{blocking, clock, failpoint};

/// How far the end of the pod has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nobody wants its end (or the last attempt failed).
    Idle,
    /// Containers are being killed.
    Ending,
    /// The lane ends the sandbox and gives everything back.
    Tearing,
    /// Stopped; containers are being removed.
    Clearing,
    /// The lane removes directories and record.
    Erasing,
}

impl Stage {
    /// Whether the end of the sandbox is our own doing.
    pub(super) fn is_tearing_down(self) -> bool {
        self != Self::Idle && self != Self::Ending
    }
}

/// Outcome of tearing a pod down.
pub(super) struct Torn {
    /// Nothing of the sandbox runs any more.
    pub(super) ended: bool,
    /// What has to be tried again.
    pub(super) failures: Vec<String>,
}

impl Owner {
    /// `RemoveContainer`.
    pub(super) fn remove(&mut self, id: &ContainerId, reply: Reply<()>) {
        match self.slots.get_mut(id) {
            Some(slot) => match admit::container(slot.standing(), Ask::Remove) {
                Ok(_) => slot.removal.get_or_insert_default().push(reply),
                Err(denied) => drop(reply.send(Err(denied.about("remove container", id)))),
            },
            None => drop(reply.send(Ok(()))),
        }
    }

    /// `StopPodSandbox`.
    pub(super) fn stop_pod(&mut self, reply: Reply<()>) {
        match self.stage {
            Stage::Clearing | Stage::Erasing => drop(reply.send(Ok(()))),
            Stage::Idle if self.is_stopped() => drop(reply.send(Ok(()))),
            Stage::Idle => {
                self.stoppers.push(reply);
                self.begin_end();
            }
            Stage::Ending | Stage::Tearing => self.stoppers.push(reply),
        }
    }

    /// `RemovePodSandbox`.
    pub(super) fn remove_pod(&mut self, reply: Reply<()>) {
        self.removers.push(reply);
        if self.stage == Stage::Idle {
            if self.is_stopped() {
                self.stage = Stage::Clearing;
            } else {
                self.begin_end();
            }
        }
    }

    /// Stopped completely: nothing runs and nothing is left to give back.
    fn is_stopped(&self) -> bool {
        let quiet = self.slots.values().all(|s| s.has_exited() && s.starting.is_none());
        self.pod.phase == PodPhase::NotReady && self.pod.sandbox.is_none() && self.pod.leftovers.is_empty() && quiet
    }

    fn begin_end(&mut self) {
        self.stage = Stage::Ending;
        // A retry of RunPodSandbox from now on wants a new pod, not this one.
        self.free_name();
        for order in self.lane.drain_creations() {
            create::refuse(self, &order);
        }
        for slot in self.slots.values_mut() {
            slot.unkillable = false;
        }
        self.sweep_orphans();
    }

    /// Takes every step that is possible now.
    pub(super) async fn advance(&mut self) {
        match self.stage {
            Stage::Ending => {
                let cause = self.end_cause();
                self.advance_ending().instrument(cause).await;
            }
            Stage::Clearing => self.end_cause().in_scope(|| self.advance_clearing()),
            Stage::Idle | Stage::Tearing | Stage::Erasing => {}
        }
        self.advance_removals();
        self.advance_lane();
    }

    /// The span of who wants the end of the pod.
    fn end_cause(&self) -> Span {
        self.stoppers.first().or(self.removers.first()).map_or_else(Span::none, |reply| reply.cause().clone())
    }

    async fn advance_ending(&mut self) {
        // One that is being started may hang in that; the start then says what came of it.
        let alive = self.slots.iter().filter(|(_, s)| (s.is_running() || s.starting.is_some()) && !s.killing && !s.unkillable);
        for id in alive.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            self.kill(&id);
        }
        let quiet = self.slots.values().all(|s| (!s.is_running() || s.unkillable) && s.starting.is_none() && s.task != Task::Deleting);
        if !quiet || !self.lane.is_idle() {
            return;
        }
        failpoint::hit("stop_pod.containers_ended");
        if self.pod.phase == PodPhase::Ready {
            self.not_ready().await;
        }
        failpoint::hit("stop_pod.recorded");
        self.stage = Stage::Tearing;
        self.lane.push(Job::TearDown);
    }

    fn advance_clearing(&mut self) {
        for slot in self.slots.values_mut() {
            slot.removal.get_or_insert_default();
        }
        if self.slots.is_empty() && self.lane.is_idle() {
            self.stage = Stage::Erasing;
            self.lane.push(Job::Erase);
        }
    }

    /// Containers that somebody wants removed: kill, wait for the exit and the shim, then clean up in the lane.
    fn advance_removals(&mut self) {
        let pod = self.end_cause();
        let mut kill = Vec::new();
        for (id, slot) in &mut self.slots {
            if slot.removal.is_none() || slot.cleaning || slot.starting.is_some() || slot.task == Task::Deleting {
                continue;
            }
            if slot.is_running() && !slot.unkillable {
                kill.push(id.clone());
            } else {
                slot.cleaning = true;
                slot.removal_cause(&pod).in_scope(|| self.lane.push(Job::Clean(id.clone())));
            }
        }
        for id in kill {
            let cause = self.slots.get(&id).map_or_else(Span::none, |slot| slot.removal_cause(&pod));
            cause.in_scope(|| self.kill(&id));
        }
    }

    /// The sandbox has ended, or not.
    pub(super) async fn torn(&mut self, torn: Torn) {
        let cause = self.end_cause();
        if torn.ended {
            self.end_remaining().instrument(cause.clone()).await;
        }
        let sandbox = if torn.ended { None } else { self.pod.sandbox.clone() };
        let pod = Pod { sandbox, leftovers: torn.failures, ..Pod::clone(&self.pod) };
        if let Err(error) = self.record_pod(&pod).instrument(cause).await {
            // Harmless: a restart finds a dead sandbox in the record and tears it down once more.
            tracing::warn!(pod = %pod.id, %error, "pod record could not be written");
        }
        failpoint::hit("stop_pod.torn_down");
        let failures = pod.leftovers.clone();
        self.show_pod(pod, &[]);
        if failures.is_empty() {
            for waiter in self.stoppers.drain(..) {
                let _ = waiter.send(Ok(()));
            }
            self.stage = if self.removers.is_empty() { Stage::Idle } else { Stage::Clearing };
        } else {
            self.give_up(&Error::internal(format!("stop pod {}: {}", self.pod.id, failures.join("; "))));
        }
    }

    /// With the sandbox every process is gone, also those whose exit nobody could report.
    async fn end_remaining(&mut self) {
        let open: Vec<_> = self.slots.values().filter(|s| !s.has_exited()).map(|s| s.container.clone()).collect();
        for container in open {
            let now = clock::now_ns();
            let exit = match container.phase {
                ContainerPhase::Created { .. } | ContainerPhase::Creating => {
                    Exit::start_error(now, "the pod was stopped before the container was started".to_owned())
                }
                _ => Exit::lost(now, "the pod was stopped while the shim could not report an exit".to_owned()),
            };
            self.end(Container::clone(&container), exit).await;
        }
    }

    fn give_up(&mut self, error: &Error) {
        self.stage = Stage::Idle;
        refuse_all(self.stoppers.drain(..), error);
        refuse_all(self.removers.drain(..), error);
    }

    /// A container's clean-up has ended.
    pub(super) fn cleaned(&mut self, id: &ContainerId, result: Result<()>) {
        match result {
            Ok(()) => {
                let Some(mut slot) = self.slots.remove(id) else { return };
                self.names.release(&slot.container.spec.metadata, id);
                self.parts.visible.drop_container(id);
                slot.life.send_replace(super::slot::Life::Ended);
                for waiter in slot.removal.take().into_iter().flatten() {
                    let _ = waiter.send(Ok(()));
                }
            }
            Err(error) => {
                let Some(slot) = self.slots.get_mut(id) else { return };
                slot.cleaning = false;
                let waiters = slot.removal.take().unwrap_or_default();
                if self.stage == Stage::Clearing {
                    self.give_up(&copy(&error).within(format!("remove pod {}", self.pod.id)));
                    // Others that were only removed for the pod's sake must not be pursued for ever.
                    for slot in self.slots.values_mut().filter(|s| !s.cleaning && s.removal.as_ref().is_some_and(Vec::is_empty)) {
                        slot.removal = None;
                    }
                }
                refuse_all(waiters, &error);
            }
        }
    }

    /// The pod's directories are removed, or not.
    pub(super) fn erased(&mut self, result: Result<()>) {
        match result {
            Ok(()) => {
                self.parts.visible.drop_pod(&self.pod.id);
                self.parts.drop_owner(&self.pod.id);
                self.gone = true;
                for waiter in self.removers.drain(..).chain(self.stoppers.drain(..)) {
                    let _ = waiter.send(Ok(()));
                }
            }
            Err(error) => self.give_up(&error),
        }
    }
}

/// Gives back everything a container has. The directories with its record go last and only when nothing else is left.
pub(super) async fn clean(parts: &Arc<Parts>, pod: &Pod, id: &ContainerId, held: bool) -> Result<()> {
    let mut failures = Vec::new();
    if held {
        let deleting = parts.limited("delete task", parts.launcher.delete_task(&pod.id, id));
        failures.extend(deleting.instrument(step_span!("delete_task", pod.id, id)).await.err().map(|e| e.to_string()));
    }
    failpoint::hit("remove_container.task_deleted");
    failures.extend(parts.isolators.cleanup(&pod.id, &pod.spec, Some(id)).instrument(step_span!("cleanup", pod.id, id)).await);
    failpoint::hit("remove_container.cleaned");
    if let Err(e) = parts.images.release(id.as_str()).instrument(step_span!("release", pod.id, id)).await {
        failures.push(e.to_string());
    }
    failpoint::hit("remove_container.released");
    if !failures.is_empty() {
        return Err(Error::internal(format!("remove container {id}: {}", failures.join("; "))));
    }
    let span = step_span!("erase", pod.id, id);
    let (layout, pod, key) = (parts.layout.clone(), pod.id.clone(), id.clone());
    blocking::run("remove container directories", move || pods::remove_container(&layout, &pod, &key)).instrument(span).await?;
    failpoint::hit("remove_container.erased");
    Ok(())
}

/// Ends the sandbox and gives back everything the pod has. Processes first, network and mounts after them.
pub(super) async fn tear_down(parts: &Arc<Parts>, pod: &Pod) -> Torn {
    let mut failures = Vec::new();
    let stopped = parts.limited("stop sandbox", parts.launcher.stop_sandbox(&pod.id)).instrument(step_span!("stop_sandbox", pod.id)).await;
    failpoint::hit("stop_pod.sandbox_stopped");
    let deleting = parts.limited("delete sandbox", parts.launcher.delete_sandbox(&pod.id, &pod.spec.runtime_handler, pod.sandbox.as_ref()));
    let deleted = deleting.instrument(step_span!("delete_sandbox", pod.id)).await;
    failpoint::hit("stop_pod.sandbox_deleted");
    let ended = deleted.is_ok();
    if let Err(e) = deleted {
        // A stop that failed matters only if the deletion, which does the same by force, failed too.
        failures.extend(stopped.err().map(|e| format!("stop sandbox: {e}")));
        failures.push(format!("delete sandbox: {e}"));
    }
    failures.extend(parts.isolators.cleanup(&pod.id, &pod.spec, None).instrument(step_span!("cleanup", pod.id)).await);
    failpoint::hit("stop_pod.cleaned");
    Torn { ended, failures }
}

/// Removes a pod's directories and record.
pub(super) async fn erase(parts: &Arc<Parts>, id: &PodId) -> Result<()> {
    failpoint::hit("remove_pod.containers_removed");
    let (layout, key) = (parts.layout.clone(), id.clone());
    blocking::run("remove pod directories", move || pods::remove_pod(&layout, &key)).instrument(step_span!("erase", id)).await?;
    failpoint::hit("remove_pod.erased");
    Ok(())
}
