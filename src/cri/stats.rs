//! Statistics (cri-behaviour §15). A sample that cannot be taken is left out; it never fails a list.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::Front;
use super::convert::{selected, stats as show};
use crate::containerizer::{Container, Pod};
use crate::model::error::{Error, Kind, Result};
use crate::model::phase::{ContainerPhase, PodPhase};
use crate::model::pod::NamespaceMode;
use crate::model::stats::{CgroupStats, ContainerStats};
use crate::stdx::{blocking, clock};
use crate::wire::cri as wire;

/// Samples closer together than this give no rate worth the name: the last one is told again (nanoseconds).
const MIN_INTERVAL: i64 = 100_000_000;
/// Containers for which a thread more does not pay.
const MIN_SHARE: usize = 16;
/// Samples kept beyond those of live objects before the map is swept.
const SLACK: usize = 64;

pub(super) async fn container(front: &Front, request: wire::ContainerStatsRequest) -> Result<wire::ContainerStatsResponse> {
    let container = front.container(&request.container_id)?;
    if !matches!(container.phase, ContainerPhase::Running { .. }) {
        return Err(Error::precondition(format!("container {} does not run", container.id.short())));
    }
    let dir = image_dir(front).await?;
    let sample = sample(front, vec![container]).await?;
    Ok(wire::ContainerStatsResponse { stats: sample.iter().map(|(c, stats)| shown(front, c, stats, dir)).next() })
}

pub(super) async fn containers(front: &Front, request: wire::ListContainerStatsRequest) -> Result<wire::ListContainerStatsResponse> {
    Ok(wire::ListContainerStatsResponse { stats: matching_containers(front, request.filter).await? })
}

/// Samples of the containers that a filter asks for. Of those that do not run only the writable layer is told.
pub(super) async fn matching_containers(front: &Front, filter: Option<wire::ContainerStatsFilter>) -> Result<Vec<wire::ContainerStats>> {
    let filter = filter.unwrap_or_default();
    let wanted = front
        .containers()
        .filter(|c| selected(c.id.as_str(), &c.spec.labels, &filter.id, &filter.label_selector) && c.pod.as_str().starts_with(&filter.pod_sandbox_id));
    container_stats(front, wanted.collect()).await
}

async fn container_stats(front: &Front, containers: Vec<Arc<Container>>) -> Result<Vec<wire::ContainerStats>> {
    let dir = image_dir(front).await?;
    Ok(sample(front, containers).await?.iter().map(|(c, stats)| shown(front, c, stats, dir)).collect())
}

/// Samples are many small reads of the cgroup file systems, microseconds each: off the worker threads, and many at once on all
/// processors, because a kubelet waits for the last one.
async fn sample(front: &Front, containers: Vec<Arc<Container>>) -> Result<Vec<(Arc<Container>, ContainerStats)>> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let share = containers.len().div_ceil(processors).max(MIN_SHARE);
    let shares = containers.chunks(share).map(|share| {
        let (engine, share) = (front.engine.clone(), share.to_vec());
        let each = move |c: Arc<Container>| {
            let stats = engine.container_stats(&c);
            (c, stats)
        };
        blocking::run("sample containers", move || Ok::<_, Error>(share.into_iter().map(each).collect::<Vec<_>>()))
    });
    Ok(futures_util::future::try_join_all(shares).await?.into_iter().flatten().collect())
}

fn shown(front: &Front, container: &Container, stats: &ContainerStats, dir: &Path) -> wire::ContainerStats {
    let cgroup = stats.cgroup.as_ref();
    wire::ContainerStats {
        attributes: Some(show::container_attributes(container)),
        cpu: cgroup.map(|s| show::cpu(s, rate(front, container.id.as_str(), s))),
        memory: cgroup.map(show::memory),
        writable_layer: stats.writable.map(|(usage, at)| show::filesystem(dir, usage, at)),
        swap: cgroup.and_then(show::swap),
        io: cgroup.map(show::io),
    }
}

/// Where images and writable layers lie. Does not change while the daemon runs, so it is asked for once.
async fn image_dir(front: &Front) -> Result<&PathBuf> {
    front.image_dir.get_or_try_init(|| async { Ok(front.engine.images().fs_info().await?.0) }).await
}

pub(super) async fn pod(front: &Front, request: wire::PodSandboxStatsRequest) -> Result<wire::PodSandboxStatsResponse> {
    let pod = front.pod(&request.pod_sandbox_id)?;
    if pod.phase != PodPhase::Ready {
        return Err(Error::new(Kind::Unavailable, format!("pod {} is not ready", pod.id.short())));
    }
    let stats = pod_stats(front, vec![pod]).await?.pop();
    Ok(wire::PodSandboxStatsResponse { stats })
}

pub(super) async fn pods(front: &Front, request: wire::ListPodSandboxStatsRequest) -> Result<wire::ListPodSandboxStatsResponse> {
    Ok(wire::ListPodSandboxStatsResponse { stats: matching_pods(front, request.filter).await? })
}

/// Samples of the ready pods that a filter asks for.
pub(super) async fn matching_pods(front: &Front, filter: Option<wire::PodSandboxStatsFilter>) -> Result<Vec<wire::PodSandboxStats>> {
    let filter = filter.unwrap_or_default();
    let wanted = front.pods().filter(|p| p.phase == PodPhase::Ready && selected(p.id.as_str(), &p.spec.labels, &filter.id, &filter.label_selector));
    pod_stats(front, wanted.collect()).await
}

async fn pod_stats(front: &Front, pods: Vec<Arc<Pod>>) -> Result<Vec<wire::PodSandboxStats>> {
    let ids: HashSet<&str> = pods.iter().map(|p| p.id.as_str()).collect();
    let running = |c: &Arc<Container>| matches!(c.phase, ContainerPhase::Running { .. }) && ids.contains(c.pod.as_str());
    let containers: Vec<_> = front.containers().filter(running).collect();
    let of_pod: Vec<_> = containers.iter().map(|c| c.pod.clone()).collect();
    let mut by_pod: HashMap<_, Vec<wire::ContainerStats>> = HashMap::new();
    for (pod, stats) in of_pod.into_iter().zip(container_stats(front, containers).await?) {
        by_pod.entry(pod).or_default().push(stats);
    }
    let (engine, sampled) = (front.engine.clone(), pods.clone());
    let cgroups: Vec<Option<CgroupStats>> = blocking::run("sample pods", move || Ok::<_, Error>(sampled.iter().map(|p| engine.pod_stats(p)).collect())).await?;
    let mut answers = Vec::with_capacity(pods.len());
    for (pod, cgroup) in pods.iter().zip(cgroups) {
        let network =
            if pod.spec.namespaces.network == NamespaceMode::Node { None } else { show::network(&front.engine.network_stats(pod).await, clock::now_ns()) };
        let cgroup = cgroup.as_ref();
        answers.push(wire::PodSandboxStats {
            attributes: Some(show::pod_attributes(pod)),
            linux: Some(wire::LinuxPodSandboxStats {
                cpu: cgroup.map(|s| show::cpu(s, rate(front, pod.id.as_str(), s))),
                memory: cgroup.map(show::memory),
                network,
                process: cgroup.map(show::processes),
                containers: by_pod.remove(&pod.id).unwrap_or_default(),
                io: cgroup.map(show::io),
            }),
            windows: None,
        });
    }
    Ok(answers)
}

fn rate(front: &Front, id: &str, stats: &CgroupStats) -> Option<u64> {
    let usage = stats.cpu_usage?;
    front.rates.next(id, stats.at, usage, || {
        let containers = front.engine.containers().into_iter().map(|c| c.id.to_string());
        containers.chain(front.engine.pods().into_iter().map(|p| p.id.to_string())).collect()
    })
}

/// The last CPU sample of each container and pod, from which the next one makes a rate.
#[derive(Default)]
pub(super) struct Rates(Mutex<Samples>);

#[derive(Default)]
struct Samples {
    last: HashMap<String, Sample>,
    /// Size at which dead ids are swept out.
    sweep_at: usize,
}

struct Sample {
    at: i64,
    usage: u64,
    rate: Option<u64>,
}

impl Rates {
    /// Takes the sample of `id` and gives nanoseconds of CPU per second since the one before; `None` on the first. `live` names
    /// all that exist, when it is time to forget the others.
    fn next(&self, id: &str, at: i64, usage: u64, live: impl FnOnce() -> HashSet<String>) -> Option<u64> {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = samples.last.get_mut(id) {
            let elapsed = at - last.at;
            if elapsed >= MIN_INTERVAL {
                let rate = u128::from(usage.saturating_sub(last.usage)) * 1_000_000_000 / u128::from(elapsed.unsigned_abs());
                *last = Sample { at, usage, rate: u64::try_from(rate).ok() };
            }
            return last.rate;
        }
        if samples.last.len() >= samples.sweep_at {
            let live = live();
            samples.last.retain(|id, _| live.contains(id));
            samples.sweep_at = 2 * samples.last.len() + SLACK;
        }
        samples.last.insert(id.to_owned(), Sample { at, usage, rate: None });
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_rate_needs_two_samples_apart() {
        let rates = Rates::default();
        let next = |at, usage| rates.next("c", at, usage, HashSet::new);
        assert_eq!(next(SECOND, 1000), None);
        assert_eq!(next(SECOND + 1, 2000), None, "too close");
        assert_eq!(next(3 * SECOND, 1_000_001_000), Some(500_000_000));
        assert_eq!(next(3 * SECOND + 5, u64::MAX), Some(500_000_000), "too close: told again");
        assert_eq!(next(4 * SECOND, 0), Some(0), "a counter that fell back is no use");
    }

    #[test]
    fn the_dead_are_forgotten() {
        let rates = Rates::default();
        for n in 0..10_000 {
            rates.next(&n.to_string(), SECOND, 0, || (n - 5..n).map(|n: i32| n.to_string()).collect());
        }
        assert!(rates.0.lock().unwrap().last.len() <= 2 * 5 + 2 * SLACK);
    }
}
