//! Stopping containers (cri-behaviour §7).
//!
//! The caller's own future keeps the grace time; the owner only sends signals. So the shortest time among the callers that are
//! still there decides, a caller that left takes its deadline along and escalates nothing, any number of calls may overlap,
//! and nothing else in the pod waits.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::Instrument;

use super::Container;
use super::admit::{self, Admit, Ask};
use super::owner::{Halt, Message, Note, Owner, ask};
use super::parts::{Parts, Reply};
use super::slot::{self, Life, Slot};
use super::spans::step_span;
use crate::model::ContainerId;
use crate::model::error::{Error, Kind, Result};

/// SIGKILL.
const SIGKILL: i32 = 9;

/// `StopContainer`, in the caller's future.
///
/// # Errors
/// When the container could not be signalled or killed.
pub(super) async fn stop(parts: &Parts, container: &Container, grace: Duration) -> Result<()> {
    let halt = async |how| match ask(parts, &container.pod, |reply| Message::Halt(container.id.clone(), how, reply)).await {
        Some(answer) => answer,
        None => Ok(None),
    };
    if !grace.is_zero() {
        let deadline = tokio::time::sleep(grace);
        let asked = async {
            let Some(mut life) = halt(Halt::Ask).await? else { return Ok(true) };
            tokio::select! {
                biased;
                result = slot::ended(&mut life) => result.map(|()| true),
                () = deadline => Ok(false),
            }
        };
        if asked.instrument(step_span!("grace", container.pod, container.id)).await? {
            return Ok(());
        }
    }
    match halt(Halt::Kill).await? {
        Some(mut life) => slot::ended(&mut life).await,
        None => Ok(()),
    }
}

impl Owner {
    /// Begins to end a container.
    pub(super) fn halt(&mut self, id: ContainerId, how: Halt, reply: Reply<Option<watch::Receiver<Life>>>) {
        let Some(slot) = self.slots.get_mut(&id) else { return drop(reply.send(Ok(None))) };
        match admit::container(slot.standing(), Ask::Stop) {
            Ok(Admit::Nothing) => drop(reply.send(Ok(None))),
            Ok(Admit::Later) => slot.parked.push(Message::Halt(id, how, reply)),
            Ok(Admit::Act) => {
                match how {
                    Halt::Ask => self.signal(&id),
                    Halt::Kill => self.kill(&id),
                }
                let _ = reply.send(Ok(self.slots.get(&id).map(|slot| slot.life.subscribe())));
            }
            Err(denied) => drop(reply.send(Err(denied.about("stop container", &id)))),
        }
    }

    /// Sends the stop signal, the first time.
    fn signal(&mut self, id: &ContainerId) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        // Before the early return: a stop with grace after a failed kill must wait, and then reach the kill.
        clear_failure(slot);
        if std::mem::replace(&mut slot.signalled, true) {
            return;
        }
        let (parts, container) = (self.parts.clone(), slot.container.clone());
        let me = self.me.clone();
        let span = step_span!("signal", container.pod, container.id);
        let work = async move {
            if let Err(error) = send(&parts, &container, container.stop_signal, false).await {
                let _ = me.send(Message::Note(Note::HaltFailed(container.id.clone(), Halt::Ask, error))).await;
            }
        };
        tokio::spawn(work.instrument(span));
    }

    /// Kills everything in the container and sees to it that it ends.
    pub(super) fn kill(&mut self, id: &ContainerId) {
        let limit = Duration::from_millis(self.parts.config.kill_timeout_ms);
        let Some(slot) = self.slots.get_mut(id) else { return };
        if slot.has_exited() || std::mem::replace(&mut slot.killing, true) {
            return;
        }
        clear_failure(slot);
        let (parts, container, mut life) = (self.parts.clone(), slot.container.clone(), slot.life.subscribe());
        let me = self.me.clone();
        let span = step_span!("kill", container.pod, container.id);
        let work = async move {
            let error = match send(&parts, &container, SIGKILL, true).await {
                Err(error) => error,
                // Until it has ended: that another attempt failed meanwhile (Stuck) says nothing of this one.
                Ok(()) => match tokio::time::timeout(limit, life.wait_for(|life| *life == Life::Ended)).await {
                    Ok(_) => return,
                    Err(_) => Error::new(Kind::DeadlineExceeded, format!("kill container {}: it has not ended within {} s", container.id, limit.as_secs())),
                },
            };
            let _ = me.send(Message::Note(Note::HaltFailed(container.id.clone(), Halt::Kill, error))).await;
        };
        tokio::spawn(work.instrument(span));
    }

    pub(super) fn halt_failed(&mut self, id: &ContainerId, how: Halt, error: Error) {
        let stopping = self.stage != super::remove::Stage::Idle;
        let Some(slot) = self.slots.get_mut(id) else { return };
        if slot.has_exited() {
            return;
        }
        match how {
            Halt::Ask => slot.signalled = false,
            Halt::Kill => {
                slot.killing = false;
                // The pod's stop goes on to end the sandbox, which needs no cooperation.
                slot.unkillable = stopping;
                for waiter in slot.removal.take().into_iter().flatten() {
                    let _ = waiter.send(Err(super::parts::copy(&error)));
                }
            }
        }
        slot.life.send_replace(Life::Stuck(error.kind, error.to_string()));
    }
}

/// A new attempt: who waits from now on must not see the last one's failure.
fn clear_failure(slot: &mut Slot) {
    slot.life.send_if_modified(|life| {
        let stuck = matches!(life, Life::Stuck(..));
        if stuck {
            *life = Life::Live;
        }
        stuck
    });
}

/// Signals. A process that has ended, or whose shim has, is no failure: the exit watch knows about both.
async fn send(parts: &Arc<Parts>, container: &Container, signal: i32, all: bool) -> Result<()> {
    match parts.limited("signal container", parts.launcher.kill_task(&container.pod, &container.id, signal, all)).await {
        Err(e) if matches!(e.kind, Kind::NotFound | Kind::Unavailable) && !unknown(container) => Ok(()),
        other => other,
    }
}

/// Nobody watches the exit of such a container, so a failed signal must be said.
fn unknown(container: &Container) -> bool {
    matches!(container.phase, crate::model::phase::ContainerPhase::Unknown { .. })
}
