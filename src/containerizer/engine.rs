//! [`Containerizer`]: the engine put together. Finds the owner of what a request names, asks it, waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast;
use tracing::{Instrument, Span};

use super::admit::Ask;
use super::owner::{Message, ask};
use super::parts::{Config, Parts, Reply};
use super::spans::act_span;
use super::{Container, Engine, Event, Pod, create, recover, slot, stop};
use crate::disk::Layout;
use crate::isolators::Isolators;
use crate::launcher::{ExecOutput, ExecSpec, Launcher};
use crate::model::error::{Error, Kind, Result};
use crate::model::phase::ContainerPhase;
use crate::model::resources::Resources;
use crate::model::stats::{CgroupStats, ContainerStats, InterfaceStats};
use crate::model::{ContainerId, ContainerSpec, PodId, PodSpec};
use crate::network::{Network, Readiness};
use crate::provisioner::Images;

/// File of a bundle that holds the OCI spec.
const SPEC_FILE: &str = "config.json";

/// The engine.
pub struct Containerizer {
    parts: Arc<Parts>,
    ready: AtomicBool,
}

impl Containerizer {
    /// Puts the engine together. [`Containerizer::recover`] comes next.
    pub fn new(
        config: Config,
        layout: Layout,
        images: Arc<dyn Images>,
        launcher: Arc<dyn Launcher>,
        isolators: Isolators,
        network: Arc<dyn Network>,
    ) -> Arc<Self> {
        Arc::new(Self { parts: Arc::new(Parts::new(config, layout, images, launcher, isolators, network)), ready: AtomicBool::new(false) })
    }

    /// Takes up where the last daemon ended: finds living pods again, ends and gives back everything else. Then
    /// [`Engine::ready`] holds.
    ///
    /// # Errors
    /// When the records cannot be listed. Damaged records and pods that cannot be reached are no errors.
    pub async fn recover(&self) -> Result<()> {
        recover::recover(&self.parts).await?;
        self.ready.store(true, Ordering::Release);
        Ok(())
    }

    /// Finds a container; `None` where unknown is fine.
    fn known_container(&self, id: &str) -> Result<Option<Arc<Container>>> {
        unless_missing(self.parts.visible.container(id))
    }

    fn known_pod(&self, id: &str) -> Result<Option<Arc<Pod>>> {
        unless_missing(self.parts.visible.pod(id))
    }

    /// Asks the owner of `container`; a container or pod that goes meanwhile is `NotFound`.
    async fn ask_about<T>(&self, container: &Container, message: impl FnOnce(Reply<T>) -> Message) -> Result<T> {
        Span::current().record("pod", container.pod.as_str());
        let gone = || Err(Error::not_found(format!("find container {}: it was removed meanwhile", container.id)));
        ask(&self.parts, &container.pod, message).await.unwrap_or_else(gone)
    }
}

fn unless_missing<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[async_trait]
impl Engine for Containerizer {
    fn ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    fn images(&self) -> &Arc<dyn Images> {
        &self.parts.images
    }

    fn handlers(&self) -> Vec<String> {
        self.parts.launcher.handlers()
    }

    async fn network_readiness(&self) -> Readiness {
        self.parts.network.readiness().await
    }

    async fn set_pod_cidr(&self, cidr: &str) -> Result<()> {
        self.parts.network.set_pod_cidr(cidr).await
    }

    async fn run_pod(&self, spec: PodSpec) -> Result<PodId> {
        if !self.parts.launcher.has_handler(&spec.runtime_handler) {
            let known = self.parts.launcher.handlers().join(", ");
            return Err(Error::invalid(format!("find runtime handler {:?}: no such handler, known are {known}", spec.runtime_handler)));
        }
        let (reply, answer) = Reply::channel();
        create::begin_pod(&self.parts, spec, reply);
        answer.await.unwrap_or_else(|_| Err(Error::internal("make pod: its owner ended unexpectedly")))
    }

    async fn stop_pod(&self, id: &str) -> Result<()> {
        match self.known_pod(id)? {
            Some(pod) => ask(&self.parts, &pod.id, Message::StopPod).await.unwrap_or(Ok(())),
            None => Ok(()),
        }
    }

    async fn remove_pod(&self, id: &str) -> Result<()> {
        match self.known_pod(id)? {
            Some(pod) => ask(&self.parts, &pod.id, Message::RemovePod).await.unwrap_or(Ok(())),
            None => Ok(()),
        }
    }

    async fn update_pod_resources(&self, id: &str, overhead: Option<Resources>, resources: Option<Resources>) -> Result<()> {
        let pod = self.parts.visible.pod(id)?;
        let gone = || Err(Error::not_found(format!("find pod {}: it was removed meanwhile", pod.id)));
        ask(&self.parts, &pod.id, |reply| Message::UpdatePod(Box::new((overhead, resources)), reply)).await.unwrap_or_else(gone)
    }

    async fn create_container(&self, pod: &str, spec: ContainerSpec) -> Result<ContainerId> {
        let pod = self.parts.visible.pod(pod)?;
        let gone = || Err(Error::not_found(format!("find pod {}: it was removed meanwhile", pod.id)));
        ask(&self.parts, &pod.id, |reply| Message::Create(Box::new(spec), reply)).await.unwrap_or_else(gone)
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.parts.visible.container(id)?;
        self.ask_about(&container, |reply| Message::Start(container.id.clone(), reply)).await
    }

    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        match self.known_container(id)? {
            Some(container) => {
                Span::current().record("pod", container.pod.as_str());
                stop::stop(&self.parts, &container, grace).instrument(act_span!("container.stop", container.pod, container.id)).await
            }
            None => Ok(()),
        }
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        match self.known_container(id)? {
            Some(container) => {
                Span::current().record("pod", container.pod.as_str());
                ask(&self.parts, &container.pod, |reply| Message::Remove(container.id.clone(), reply)).await.unwrap_or(Ok(()))
            }
            None => Ok(()),
        }
    }

    async fn update_container(&self, id: &str, resources: Resources) -> Result<()> {
        let container = self.parts.visible.container(id)?;
        self.ask_about(&container, |reply| Message::Update(container.id.clone(), Box::new(resources), reply)).await
    }

    async fn reopen_log(&self, id: &str) -> Result<()> {
        let container = self.parts.visible.container(id)?;
        let _life = self.ask_about(&container, |reply| Message::Enter(container.id.clone(), Ask::ReopenLog, reply)).await?;
        let parts = self.parts.clone();
        let span = act_span!("container.reopen_log", container.pod, container.id);
        run_to_end("reopen log", span, async move { parts.launcher.reopen_log(&container.pod, &container.id).await }).await
    }

    async fn exec_sync(&self, id: &str, exec: ExecSpec) -> Result<ExecOutput> {
        let container = self.parts.visible.container(id)?;
        let mut life = self.ask_about(&container, |reply| Message::Enter(container.id.clone(), Ask::Exec, reply)).await?;
        // In the caller's own future: a caller that leaves ends its command (cri-behaviour §1), for the launcher kills what nobody
        // waits for.
        let work = async {
            let mut run = std::pin::pin!(self.parts.launcher.exec_sync(&container.pod, &container.id, &exec));
            tokio::select! {
                biased;
                output = &mut run => return output,
                _ = life.wait_for(|life| *life == slot::Life::Ended) => {}
            }
            // The command died with the container; its own answer is better than ours, if it comes.
            let drain = Duration::from_millis(self.parts.config.exec_drain_ms);
            let ended = || Error::precondition(format!("exec in container {}: the container ended meanwhile", container.id));
            tokio::time::timeout(drain, run).await.unwrap_or_else(|_| Err(ended()))
        };
        work.instrument(act_span!("container.exec", container.pod, container.id)).await
    }

    fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        self.parts.visible.pod(id)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.parts.visible.container(id)
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        self.parts.visible.pods()
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        self.parts.visible.containers()
    }

    fn container_stats(&self, container: &Container) -> ContainerStats {
        let running = matches!(container.phase, ContainerPhase::Running { .. });
        let pod = running.then(|| self.parts.visible.pod(container.pod.as_str()).ok()).flatten();
        ContainerStats {
            cgroup: pod.and_then(|pod| self.parts.isolators.usage(&pod.id, &pod.spec, Some(&container.id))),
            writable: self.parts.images.usage(container.id.as_str()),
        }
    }

    fn pod_stats(&self, pod: &Pod) -> Option<CgroupStats> {
        self.parts.isolators.usage(&pod.id, &pod.spec, None)
    }

    async fn network_stats(&self, pod: &Pod) -> Vec<InterfaceStats> {
        if pod.netns.is_none() {
            return Vec::new();
        }
        // The namespace of a pod that is being stopped may go at any moment: no counters then, and no failure of a list.
        self.parts.network.stats(&pod.id).await.unwrap_or_else(|error| {
            tracing::debug!(pod = %pod.id, %error, "no interface counters");
            Vec::new()
        })
    }

    fn runtime_spec(&self, container: &Container) -> Option<serde_json::Value> {
        let bundle = self.parts.layout.bundle(&container.pod, &container.id);
        serde_json::from_slice(&std::fs::read(bundle.join(SPEC_FILE)).ok()?).ok()
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.parts.visible.subscribe()
    }
}

/// Runs `work` in a task of its own, so that a caller who leaves does not cut it short.
async fn run_to_end<T: Send + 'static>(what: &'static str, span: Span, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work.instrument(span)).await.unwrap_or_else(|e| Err(Error::with(Kind::Internal, what, e)))
}
