//! The lane: work of one pod that calls isolators, one job at a time, in order of arrival. Isolators are promised that, and
//! it is all they need to know about concurrency. Jobs work on copies; their outcome comes back to the owner as [`Done`].

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::watch;
use tracing::{Instrument, Span};

use super::create::{self, Failed, Order};
use super::owner::{Note, Owner};
use super::parts::{Parts, Reply};
use super::remove::{self, Torn};
use super::slot::{Basis, Task};
use super::spans::{act_span, step_span};
use super::{Container, Pod};
use crate::isolators::{ContainerCx, Cx};
use crate::model::ContainerId;
use crate::model::container::ContainerMetadata;
use crate::model::error::{Error, Result};
use crate::model::phase::ContainerPhase;
use crate::model::resources::Resources;
use crate::stdx::failpoint;

/// Something to do.
pub(super) enum Job {
    /// Make a container.
    Create(Box<Order>),
    /// Apply limits.
    Update(ContainerId, Box<Resources>, Reply<()>),
    /// Give back everything a container has.
    Clean(ContainerId),
    /// Give back the remains of a container that nobody knows by now.
    Sweep(ContainerId),
    /// End the sandbox and give back everything the pod has.
    TearDown,
    /// Remove the pod's directories and record.
    Erase,
}

/// What came of it.
pub(super) enum Done {
    /// Of `Create`.
    Created(ContainerMetadata, Box<Result<(Container, Basis), Failed>>),
    /// Of `Update`: the limits that hold now.
    Updated(ContainerId, Box<Result<(Resources, Option<Basis>)>>, Reply<()>),
    /// Of `Clean`.
    Cleaned(ContainerId, Result<()>),
    /// Of `Sweep`.
    Swept(ContainerId, Result<()>),
    /// Of `TearDown`.
    Torn(Torn),
    /// Of `Erase`.
    Erased(Result<()>),
}

impl Done {
    /// The span of who wanted it, where that is known from what came of it.
    pub(super) fn cause(&self) -> Span {
        match self {
            Self::Updated(_, _, reply) => reply.cause().clone(),
            _ => Span::none(),
        }
    }
}

/// The queue: jobs with the spans that they belong to.
#[derive(Default)]
pub(super) struct Lane {
    queue: VecDeque<(Span, Job)>,
    busy: bool,
    /// Whether the creation under way is wanted no more.
    given_up: watch::Sender<bool>,
}

impl Lane {
    /// Queues a job of the current span; it starts when the owner advances.
    pub(super) fn push(&mut self, job: Job) {
        self.queue.push_back((Span::current(), job));
    }

    /// Nothing queued, nothing running.
    pub(super) fn is_idle(&self) -> bool {
        !self.busy && self.queue.is_empty()
    }

    /// Takes queued creations out and gives up the one under way: the pod is being stopped.
    pub(super) fn drain_creations(&mut self) -> Vec<Order> {
        self.given_up.send_replace(true);
        let (mut orders, mut kept) = (Vec::new(), VecDeque::new());
        for (cause, job) in self.queue.drain(..) {
            match job {
                Job::Create(order) => orders.push(*order),
                other => kept.push_back((cause, other)),
            }
        }
        self.queue = kept;
        orders
    }
}

impl Owner {
    /// Starts the next job if none runs.
    pub(super) fn advance_lane(&mut self) {
        while !self.lane.busy {
            let Some((cause, job)) = self.lane.queue.pop_front() else { return };
            self.lane.busy = cause.in_scope(|| self.begin(job));
        }
    }

    /// Starts a job; `false` when there turned out to be nothing to do.
    fn begin(&mut self, job: Job) -> bool {
        let (parts, pod) = (self.parts.clone(), self.pod.clone());
        match job {
            Job::Create(order) => {
                let name = order.container.spec.metadata.clone();
                let broken = Done::Created(name.clone(), Box::new(Err((panicked("create container"), None))));
                let span = act_span!("container.make", pod.id, order.container.id);
                self.lane.given_up.send_replace(false);
                let given_up = self.lane.given_up.subscribe();
                self.spawn_job(async move { Done::Created(name, Box::new(create::acquire_container(parts, pod, *order, given_up).await)) }, span, broken);
            }
            Job::Update(id, resources, reply) => {
                let Some((container, basis)) = self.slots.get(&id).map(|s| (s.container.clone(), s.basis.clone())) else {
                    let _ = reply.send(Err(Error::not_found(format!("update container {id}: no such container"))));
                    return false;
                };
                let span = act_span!("container.update", pod.id, id);
                // A panic here drops the reply with the future; its caller then gets an internal error.
                self.spawn(async move {
                    let work = AssertUnwindSafe(update(&parts, &pod, &container, basis, &resources).instrument(span)).catch_unwind();
                    let result = work.await.unwrap_or_else(|_| Err(panicked("update container")));
                    Note::Lane(Box::new(Done::Updated(id, Box::new(result), reply)))
                });
            }
            Job::Clean(id) => {
                let Some((container, held)) = self.slots.get(&id).map(|s| (s.container.clone(), s.task != Task::Gone)) else { return false };
                let broken = Done::Cleaned(id.clone(), Err(panicked("remove container")));
                let span = act_span!("container.remove", pod.id, id);
                self.spawn_job(async move { Done::Cleaned(id, remove::clean(&parts, &pod, &container.id, held).await) }, span, broken);
            }
            Job::Sweep(id) => {
                let broken = Done::Swept(id.clone(), Err(panicked("sweep container")));
                let span = act_span!("container.sweep", pod.id, id);
                self.spawn_job(async move { Done::Swept(id.clone(), remove::clean(&parts, &pod, &id, true).await) }, span, broken);
            }
            Job::TearDown => {
                let broken = Done::Torn(Torn { ended: false, failures: vec![panicked("stop pod").to_string()] });
                let span = act_span!("pod.stop", pod.id);
                self.spawn_job(async move { Done::Torn(remove::tear_down(&parts, &pod).await) }, span, broken);
            }
            Job::Erase => {
                let broken = Done::Erased(Err(panicked("remove pod")));
                let span = act_span!("pod.remove", pod.id);
                self.spawn_job(async move { Done::Erased(remove::erase(&parts, &pod.id).await) }, span, broken);
            }
        }
        true
    }

    /// A job that panics must not leave the lane busy for ever: then `broken` is its outcome.
    fn spawn_job(&self, work: impl Future<Output = Done> + Send + 'static, span: Span, broken: Done) {
        self.spawn(async move { Note::Lane(Box::new(AssertUnwindSafe(work.instrument(span)).catch_unwind().await.unwrap_or(broken))) });
    }

    pub(super) async fn lane_done(&mut self, done: Done) {
        self.lane.busy = false;
        match done {
            Done::Created(name, outcome) => self.created(&name, *outcome),
            Done::Updated(id, result, reply) => {
                let _ = reply.send(self.updated(&id, *result).await);
            }
            Done::Cleaned(id, result) => self.cleaned(&id, result),
            Done::Swept(id, Err(error)) => tracing::error!(container = %id, %error, "remains of a container could not be removed, the next start tries again"),
            Done::Swept(_, Ok(())) => {}
            Done::Torn(torn) => self.torn(torn).await,
            Done::Erased(result) => self.erased(result),
        }
    }

    async fn updated(&mut self, id: &ContainerId, result: Result<(Resources, Option<Basis>)>) -> Result<()> {
        let (resources, basis) = result?;
        let slot = self.slots.get_mut(id).ok_or_else(|| Error::not_found(format!("update container {id}: no such container")))?;
        slot.basis = basis.or(slot.basis.take());
        let mut container = Container::clone(&slot.container);
        if !matches!(container.phase, ContainerPhase::Created { .. } | ContainerPhase::Running { .. }) {
            return Err(Error::precondition(format!("update container {id}: it ended meanwhile")));
        }
        container.spec.resources = resources.clone();
        // While a start is under way the record says Running already and must go on saying so.
        let recorded = match slot.starting.as_mut() {
            Some(starting) => {
                Arc::make_mut(starting).spec.resources = resources;
                Container::clone(starting)
            }
            None => container.clone(),
        };
        self.record(&recorded).await?;
        self.show(container, None);
        Ok(())
    }
}

fn panicked(act: &str) -> Error {
    Error::internal(format!("{act}: the work panicked"))
}

/// Applies limits: first whoever describes them, then the shim. Returns what holds in all.
async fn update(parts: &Arc<Parts>, pod: &Pod, container: &Container, basis: Option<Basis>, wanted: &Resources) -> Result<(Resources, Option<Basis>)> {
    let merged = container.spec.resources.updated_by(wanted);
    let basis = match basis {
        Some(basis) => Some(basis),
        // After a restart. Without its image a container still runs, and its limits can still be changed by the shim.
        None => match parts.images.resolve(container.image_id.as_str()) {
            Some(image) => {
                let rootfs = Arc::new(parts.images.provision(container.id.as_str(), &image).await?);
                Some(Basis { image, rootfs })
            }
            None => None,
        },
    };
    let inner = basis.as_ref().zip(pod.sandbox.as_ref()).map(|(basis, sandbox)| {
        let (spec, image, rootfs) = (&container.spec, &*basis.image, &*basis.rootfs);
        ContainerCx { id: &container.id, spec, image, rootfs, sandbox, target_pid: None, image_volumes: &[] }
    });
    let cx = Cx { pod_id: &pod.id, pod: &pod.spec, container: inner };
    let written = inner.is_some() && parts.isolators.update(&cx, &merged).instrument(step_span!("isolate", pod.id, container.id)).await?;
    // Our shim has nothing to add to what is in the group's files; others keep a record of their own.
    if !written || parts.launcher.is_foreign(&pod.spec.runtime_handler) {
        let telling = parts.launcher.update_task(&pod.id, &container.id, wanted);
        if let Err(error) = telling.instrument(step_span!("update_task", pod.id, container.id)).await {
            if written && let Err(stuck) = parts.isolators.update(&cx, &container.spec.resources.taking_back(wanted)).await {
                tracing::warn!(container = %container.id, error = %stuck, "limits that the shim refused could not be taken back");
            }
            return Err(error);
        }
    }
    failpoint::hit("update_container.applied");
    Ok((merged, basis))
}
