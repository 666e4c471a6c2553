//! Recovery: records x shims x kernel. Runs once, before anything is served; there is no clean shutdown to rely on.
//!
//! ```text
//! record     shim                 then
//! Creating   (any)                undone completely
//! Ready      answers              containers by its word; watches on
//! Ready      dead                 containers Exited 255 ShimLost, pod NotReady, remains killed
//! Ready      silent               containers Unknown, asked again in the background; nobody waits for it
//! NotReady   (any)                stays; what still runs is watched, what remains waits for stop and remove
//! damaged    (any)                quarantined; what it described is killed and given back
//! none       directory only       the same
//! ```

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::Instrument;

use super::exit::Ended;
use super::lane::Job;
use super::owner::{Note, Owner};
use super::parts::Parts;
use super::slot::{Slot, Task};
use super::spans::{act_span, step_span};
use super::{Container, EventKind, Pod, remove};
use crate::disk::pods::{self, Loaded, LoadedPod};
use crate::launcher::TaskState;
use crate::model::error::{Error, Kind, Result};
use crate::model::phase::{ContainerPhase, PodPhase};
use crate::model::{ContainerId, PodId};
use crate::stdx::{blocking, clock, failpoint};

/// What a recorded pod's shim says after a restart.
pub(super) enum Probe {
    /// It answers: its containers' states.
    Alive(Vec<(ContainerId, TaskState)>),
    /// It is dead, for this reason.
    Dead(String),
    /// It does not answer in time.
    Silent(String),
}

/// What a container's record and its shim together mean.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// In this phase, which the shim confirms.
    Is(ContainerPhase),
    /// It ended while nobody looked.
    Ended(i32, i64),
    /// Its shim does not know it.
    Lost,
    /// It had ended before; what the shim still holds can go.
    Over,
}

/// The table of recovery for one container.
pub(super) fn judge(recorded: &ContainerPhase, state: &TaskState, now: i64) -> Verdict {
    use ContainerPhase::{Created, Creating, Exited, Running, Unknown};
    match (recorded, state) {
        (Exited { .. }, _) => Verdict::Over,
        (_, TaskState::Gone) => Verdict::Lost,
        (_, TaskState::Exited { code, at }) => Verdict::Ended(*code, *at),
        // `Running` was recorded before the start, which then did not happen.
        (_, TaskState::Created { pid }) => Verdict::Is(Created { pid: *pid }),
        (Running { started_at, .. } | Unknown { started_at }, TaskState::Running { pid }) if *started_at != 0 => {
            Verdict::Is(Running { pid: *pid, started_at: *started_at })
        }
        (Creating | Created { .. } | Running { .. } | Unknown { .. }, TaskState::Running { pid }) => Verdict::Is(Running { pid: *pid, started_at: now }),
    }
}

/// Loads all records and takes up where the last daemon ended.
///
/// # Errors
/// When the records cannot be listed. Whatever fails for one pod is logged and left to its removal.
pub(super) async fn recover(parts: &Arc<Parts>) -> Result<()> {
    take_up(parts).instrument(tracing::info_span!("recover")).await
}

async fn take_up(parts: &Arc<Parts>) -> Result<()> {
    let layout = parts.layout.clone();
    let loaded: Loaded<Pod, Container> = blocking::run("load pod records", move || pods::load(&layout)).instrument(tracing::debug_span!("load")).await?;
    for report in &loaded.quarantined {
        tracing::error!(report, "damaged record was quarantined");
    }
    for pod in &loaded.pods {
        let stamps = pod.containers.iter().map(|c| c.created_at).chain([pod.pod.created_at]);
        stamps.for_each(|at| parts.stamps.pass(at));
    }
    sweep_unknown(parts, &loaded).instrument(tracing::debug_span!("sweep")).await;
    failpoint::hit("recover.swept");

    let mut pods = JoinSet::new();
    for pod in loaded.pods {
        let span = act_span!("pod.recover", pod.pod.id);
        pods.spawn(recover_pod(parts.clone(), pod).instrument(span));
    }
    while let Some(done) = pods.join_next().await {
        if let Err(error) = done {
            tracing::error!(%error, "recovery of a pod panicked");
        }
    }
    failpoint::hit("recover.done");
    Ok(())
}

/// Kills and gives back what belongs to no record.
async fn sweep_unknown(parts: &Arc<Parts>, loaded: &Loaded<Pod, Container>) {
    let kills = loaded.orphans.iter().map(async |id| {
        let deleting = parts.limited("delete sandbox", parts.launcher.delete_sandbox(id, "", None));
        (id, deleting.instrument(step_span!("delete_sandbox", id)).await)
    });
    let killed = join_all(kills).await;
    // Half-made pods count as known here: they are undone below, processes first.
    let known: Vec<PodId> = loaded.pods.iter().map(|p| p.pod.id.clone()).collect();
    let containers: Vec<String> = loaded.pods.iter().flat_map(|p| &p.containers).map(|c| c.id.as_str().to_owned()).collect();
    for failure in parts.isolators.recover(&known).await {
        tracing::warn!(failure, "isolator could not give back everything of unknown pods");
    }
    if let Err(error) = parts.network.recover(&known).await {
        tracing::warn!(%error, "network could not give back everything of unknown pods");
    }
    if let Err(error) = parts.images.recover(&containers).await {
        tracing::warn!(%error, "image store could not give back everything of unknown containers");
    }
    for (id, result) in killed {
        let (layout, key) = (parts.layout.clone(), id.clone());
        let result = match result {
            Ok(()) => blocking::run("remove orphan directories", move || pods::remove_pod(&layout, &key)).await,
            Err(e) => Err(e),
        };
        match result {
            Ok(()) => tracing::info!(pod = %id, "pod without a record was removed"),
            Err(error) => tracing::error!(pod = %id, %error, "pod without a record could not be removed, the next start tries again"),
        }
    }
}

async fn recover_pod(parts: Arc<Parts>, loaded: LoadedPod<Pod, Container>) {
    let LoadedPod { pod, containers, mut orphans } = loaded;
    let Some(pod) = finish_undo(&parts, pod).await else { return };
    let (kept, half): (Vec<_>, Vec<_>) = containers.into_iter().partition(|c| c.phase != ContainerPhase::Creating);
    orphans.extend(half.into_iter().map(|c| c.id));

    let pod = Arc::new(pod);
    if pod.phase == PodPhase::Ready {
        parts.names().adopt(&pod.spec.metadata, pod.id.clone());
    }
    let mut owner = Owner::new(parts.clone(), pod.clone());
    parts.visible.put_pod(&pod, &[]);
    owner.orphans = orphans;
    for container in kept {
        let container = Arc::new(container);
        let slot = Slot::new(container.clone(), None);
        if !slot.has_exited() {
            owner.names.adopt(&container.spec.metadata, container.id.clone());
        }
        owner.slots.insert(container.id.clone(), slot);
        parts.visible.put_container(&container, None);
    }
    let ids = owner.slots.keys().cloned().collect();
    let probe = probe(&parts, &pod, ids).await;
    let heard = !matches!(probe, Probe::Silent(_));
    owner.apply(probe).await;
    if heard {
        owner.settle(Instant::now() + Duration::from_millis(parts.config.reattach_timeout_ms)).await;
    }
    tokio::spawn(owner.run());
}

/// A pod that was being made is undone; it remains only if that fails. Others are returned as they are.
async fn finish_undo(parts: &Arc<Parts>, pod: Pod) -> Option<Pod> {
    if pod.phase != PodPhase::Creating {
        return Some(pod);
    }
    let torn = remove::tear_down(parts, &pod).instrument(step_span!("undo", pod.id)).await;
    let mut leftovers = torn.failures;
    if leftovers.is_empty() {
        match remove::erase(parts, &pod.id).await {
            Ok(()) => return None,
            Err(e) => leftovers.push(format!("remove directories: {e}")),
        }
    }
    tracing::error!(pod = %pod.id, ?leftovers, "half-made pod could not be undone completely");
    let remains = Pod { phase: PodPhase::NotReady, leftovers, ..pod };
    let (layout, record) = (parts.layout.clone(), remains.clone());
    if let Err(error) = blocking::run("record pod", move || pods::begin_pod(&layout, &record.id, &record)).await {
        tracing::error!(pod = %remains.id, %error, "pod record could not be written");
    }
    Some(remains)
}

/// Asks a pod's shim for itself and its containers, within the configured time.
pub(super) async fn probe(parts: &Parts, pod: &Pod, containers: Vec<ContainerId>) -> Probe {
    let Some(sandbox) = &pod.sandbox else { return Probe::Dead("the pod has no sandbox".to_owned()) };
    let limit = Duration::from_millis(parts.config.reattach_timeout_ms);
    let ask = async {
        parts.launcher.reattach(&pod.id, &pod.spec.runtime_handler, sandbox).await?;
        try_join_all(containers.into_iter().map(async |id| {
            let state = parts.launcher.task_state(&pod.id, &id).await?;
            Ok::<_, Error>((id, state))
        }))
        .await
    };
    match timeout(limit, ask).instrument(step_span!("probe", pod.id)).await {
        Ok(Ok(states)) => Probe::Alive(states),
        Ok(Err(e)) if e.kind == Kind::NotFound => Probe::Dead(e.to_string()),
        Ok(Err(e)) => Probe::Silent(e.to_string()),
        Err(_) => Probe::Silent(format!("the shim did not answer within {} ms", limit.as_millis())),
    }
}

impl Owner {
    /// Takes over what a shim said after a restart.
    pub(super) async fn apply(&mut self, probe: Probe) {
        match probe {
            Probe::Alive(states) => {
                for (id, state) in states {
                    self.apply_state(&id, &state).await;
                }
                if self.sandbox_watcher.is_none() {
                    self.watch_sandbox();
                }
                self.sweep_orphans();
            }
            Probe::Dead(why) => self.apply_death(why).await,
            Probe::Silent(why) => self.apply_silence(&why),
        }
    }

    /// Takes over what the shim says of one container.
    pub(super) async fn apply_state(&mut self, id: &ContainerId, state: &TaskState) {
        let Some(container) = self.slots.get(id).map(|s| s.container.clone()) else { return };
        match judge(&container.phase, state, clock::now_ns()) {
            Verdict::Is(phase) => {
                let changed = phase != container.phase;
                let container = Container { phase, ..Container::clone(&container) };
                if changed {
                    self.note_down(&container).await;
                }
                self.show(container, None);
                if self.slots.get(id).is_some_and(Slot::is_running) {
                    self.watch(id);
                }
            }
            Verdict::Ended(code, at) => self.exited(id.clone(), Ended::Process(code, at)).await,
            Verdict::Lost => self.exited(id.clone(), Ended::Lost("the shim does not know the container any more".to_owned())).await,
            Verdict::Over if *state == TaskState::Gone => {
                if let Some(slot) = self.slots.get_mut(id) {
                    slot.task = Task::Gone;
                }
            }
            Verdict::Over => self.delete_task(id),
        }
    }

    /// The shim is dead: nothing in the pod can be alive, or it is killed now.
    async fn apply_death(&mut self, why: String) {
        let open: Vec<_> = self.slots.iter().filter(|(_, s)| !s.has_exited()).map(|(id, _)| id.clone()).collect();
        for id in &open {
            // Before the end is published: whatever outlived its shim must not outlive that.
            let deleting = self.parts.limited("delete task", self.parts.launcher.delete_task(&self.pod.id, id));
            if let Err(error) = deleting.instrument(step_span!("delete_task", self.pod.id, id)).await {
                tracing::warn!(container = %id, %error, "remains of a container could not be deleted, its removal tries again");
            }
        }
        if let Some(sandbox) = &self.pod.sandbox {
            let (launcher, pod) = (&self.parts.launcher, &self.pod);
            let deleting = self.parts.limited("delete sandbox", launcher.delete_sandbox(&pod.id, &pod.spec.runtime_handler, Some(sandbox)));
            if let Err(error) = deleting.instrument(step_span!("delete_sandbox", pod.id)).await {
                tracing::warn!(pod = %pod.id, %error, "remains of a dead shim could not be removed, stopping the pod tries again");
            }
        }
        for id in open {
            self.exited(id, Ended::Lost(why.clone())).await;
        }
        if self.pod.phase == PodPhase::Ready {
            // The record keeps the sandbox: network and mounts are still there for the pod's stop to give back.
            self.not_ready().await;
        }
        self.sweep_orphans();
    }

    /// Nobody can say; ask again until somebody can.
    fn apply_silence(&mut self, why: &str) {
        tracing::warn!(pod = %self.pod.id, why, "shim does not answer, trying again in the background");
        let mut ids = Vec::new();
        for (id, slot) in &self.slots {
            ids.push((id.clone(), slot.container.clone()));
        }
        for (_, container) in ids.iter().filter(|(_, c)| !matches!(c.phase, ContainerPhase::Exited { .. })) {
            let started_at = match container.phase {
                ContainerPhase::Running { started_at, .. } | ContainerPhase::Unknown { started_at } => started_at,
                _ => 0,
            };
            self.show(Container { phase: ContainerPhase::Unknown { started_at }, ..Container::clone(container) }, None::<EventKind>);
        }
        let (parts, pod) = (self.parts.clone(), self.pod.clone());
        let ids: Vec<_> = ids.into_iter().map(|(id, _)| id).collect();
        self.spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(parts.config.reattach_interval_ms)).await;
                match probe(&parts, &pod, ids.clone()).await {
                    Probe::Silent(_) => {}
                    heard => return Note::Probed(heard),
                }
            }
        });
    }

    /// Gives back what is left of containers without a record.
    pub(super) fn sweep_orphans(&mut self) {
        for id in std::mem::take(&mut self.orphans) {
            self.lane.push(Job::Sweep(id));
        }
    }

    /// Handles its own work until it is done, or until `deadline`; then the pod goes on by itself.
    async fn settle(&mut self, deadline: Instant) {
        self.advance().await;
        while !self.lane.is_idle() || self.slots.values().any(|s| s.task == Task::Deleting) {
            let Ok(Some(message)) = timeout_at(deadline, self.mailbox.recv()).await else { return };
            self.handle(message).await;
            self.advance().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::phase::Exit;

    /// Every record against every answer.
    #[test]
    fn the_table() {
        let now = 99;
        let created = ContainerPhase::Created { pid: 1 };
        let running = ContainerPhase::Running { pid: 1, started_at: 5 };
        let was_running = ContainerPhase::Unknown { started_at: 5 };
        let was_created = ContainerPhase::Unknown { started_at: 0 };
        let exited = ContainerPhase::Exited { started_at: 5, exit: Exit::of_process(0, 6, false) };
        let (c, r, e, g) = (TaskState::Created { pid: 2 }, TaskState::Running { pid: 2 }, TaskState::Exited { code: 3, at: 7 }, TaskState::Gone);
        let is_created = || Verdict::Is(ContainerPhase::Created { pid: 2 });
        let is_running = |started_at| Verdict::Is(ContainerPhase::Running { pid: 2, started_at });
        for (recorded, answers) in [
            (&created, [is_created(), is_running(now), Verdict::Ended(3, 7), Verdict::Lost]),
            (&running, [is_created(), is_running(5), Verdict::Ended(3, 7), Verdict::Lost]),
            (&was_running, [is_created(), is_running(5), Verdict::Ended(3, 7), Verdict::Lost]),
            (&was_created, [is_created(), is_running(now), Verdict::Ended(3, 7), Verdict::Lost]),
            (&exited, [Verdict::Over, Verdict::Over, Verdict::Over, Verdict::Over]),
        ] {
            for (state, expected) in [&c, &r, &e, &g].into_iter().zip(answers) {
                assert_eq!(judge(recorded, state, now), expected, "{recorded:?} x {state:?}");
            }
        }
    }
}
