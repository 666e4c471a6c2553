//! Tests of the containerizer against fakes of everything below it.

mod failure;
mod fake;
mod lifecycle;
mod recovery;
mod spans;
mod stopping;

use std::sync::Arc;
use std::time::Duration;

use super::{Config, Container, Containerizer, Engine};
use crate::disk::Layout;
use crate::isolators::Isolators;
use crate::model::container::ContainerMetadata;
use crate::model::phase::ContainerPhase;
use crate::model::pod::PodMetadata;
use crate::model::{ContainerId, ContainerSpec, PodId, PodSpec};
use fake::{FakeImages, FakeLauncher, FakeNetwork, Recorder, World};

/// An engine over fakes, in a directory of its own.
struct Bench {
    world: Arc<World>,
    engine: Arc<Containerizer>,
    layout: Layout,
    _dir: Arc<tempfile::TempDir>,
}

/// Short limits, so that a test of a limit does not take long; but for kills, which most tests expect to work.
fn config() -> Config {
    Config { reattach_timeout_ms: 200, reattach_interval_ms: 20, shim_timeout_ms: 1_000, kill_timeout_ms: 5_000, exec_drain_ms: 100, event_backlog: 64 }
}

impl Bench {
    fn new() -> Self {
        Self::with(config())
    }

    /// One that does not wait long for what has been killed and does not end.
    fn impatient() -> Self {
        Self::with(Config { kill_timeout_ms: 500, ..config() })
    }

    fn with(config: Config) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        Self::over(World::new(), layout, dir, config)
    }

    fn over(world: Arc<World>, layout: Layout, dir: Arc<tempfile::TempDir>, config: Config) -> Self {
        let isolators = Isolators::from_vec(vec![Arc::new(Recorder::new(world.clone()))]);
        let (images, launcher, network) = (Arc::new(FakeImages(world.clone())), Arc::new(FakeLauncher(world.clone())), Arc::new(FakeNetwork(world.clone())));
        let engine = Containerizer::new(config, layout.clone(), images, launcher, isolators, network);
        Self { world, engine, layout, _dir: dir }
    }

    /// A new daemon in the same world. The old one must be gone: its runtime dropped.
    fn restarted(&self) -> Self {
        Self::over(self.world.clone(), self.layout.clone(), self._dir.clone(), config())
    }

    async fn pod(&self, name: &str) -> PodId {
        self.engine.run_pod(pod_spec(name)).await.unwrap()
    }

    async fn created(&self, pod: &PodId, name: &str) -> ContainerId {
        self.engine.create_container(pod.as_str(), container_spec(name)).await.unwrap()
    }

    async fn running(&self, pod: &PodId, name: &str) -> ContainerId {
        let id = self.created(pod, name).await;
        self.engine.start_container(id.as_str()).await.unwrap();
        id
    }

    fn container(&self, id: &ContainerId) -> Arc<Container> {
        self.engine.container(id.as_str()).unwrap()
    }

    /// Waits until the container has exited: code and reason.
    async fn exited(&self, id: &ContainerId) -> (i32, String) {
        self.until(|| match &self.container(id).phase {
            ContainerPhase::Exited { exit, .. } => Some((exit.code, exit.reason.clone())),
            _ => None,
        })
        .await
    }

    /// Looks at the published state after every event until `look` finds what it wants.
    async fn until<T>(&self, look: impl Fn() -> Option<T>) -> T {
        let mut events = self.engine.events();
        let wait = async {
            loop {
                if let Some(found) = look() {
                    return found;
                }
                // Not every change has an event (Unknown to Running): look again at the latest after a moment.
                let _ = tokio::time::timeout(Duration::from_millis(5), events.recv()).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect("state was not reached")
    }

    /// Nothing is held and nothing is on disk.
    fn assert_empty(&self) {
        assert_eq!(self.world.held(), Vec::<String>::new());
        for dir in [self.layout.pods(), self.layout.run_pods()] {
            let left: Vec<_> = std::fs::read_dir(&dir).into_iter().flatten().map(|e| e.unwrap().file_name()).collect();
            assert!(left.is_empty(), "{}: {left:?}", dir.display());
        }
        assert!(self.engine.pods().is_empty() && self.engine.containers().is_empty());
    }
}

fn pod_spec(name: &str) -> PodSpec {
    PodSpec { metadata: PodMetadata { name: name.into(), uid: format!("uid-{name}"), namespace: "ns".into(), attempt: 0 }, ..PodSpec::default() }
}

fn container_spec(name: &str) -> ContainerSpec {
    ContainerSpec { metadata: ContainerMetadata { name: name.into(), attempt: 0 }, image: "busybox".into(), ..ContainerSpec::default() }
}
