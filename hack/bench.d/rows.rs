//! The rows: what each measures, in the words of the design's table.

use std::time::Instant;

use mesocri::wire::cri as api;

use crate::Samples;
use crate::common::BUSYBOX;
use crate::engines::{Engine, pss};

/// One row of the table.
pub struct Row {
    /// What is measured.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The design's figure for mesocri.
    pub budget: Option<f64>,
    /// Rates: more is better.
    pub more_is_better: bool,
}

const fn row(name: &'static str, unit: &'static str, budget: Option<f64>) -> Row {
    Row { name, unit, budget, more_is_better: false }
}

const RUN_HOST: &str = "RunPodSandbox, host network";
const RUN_BRIDGE: &str = "RunPodSandbox, bridge";
const CREATE_START: &str = "CreateContainer + StartContainer";
const TO_RUNNING: &str = "RunPodSandbox to RUNNING, bridge";
const RATE: &str = "the same, 10 callers, 100 pods";
const CPU: &str = "CPU a pod costs the machine, creation";
const EXEC: &str = "ExecSync true";
const STOP_SIGNAL: &str = "StopContainer by signal";
const STOP_KILL: &str = "StopContainer by kill";
const STOP_REMOVE: &str = "stop + remove, one running container, bridge";
const STOP_REMOVE_HOST: &str = "stop + remove pod, host network";
const MEMORY_POD: &str = "memory a pod with one container adds";
const MEMORY_SECOND: &str = "memory a second container adds";
const DAEMON_IDLE: &str = "daemon, idle (PSS)";
const DAEMON_100: &str = "daemon at 100 pods (PSS)";
const LIST: &str = "ListContainers at 100";
const STATUS: &str = "ContainerStatus at 100";
const STATS: &str = "ListContainerStats at 100";

/// All rows in the order of the design's table.
pub const ROWS: &[Row] = &[
    row(RUN_HOST, "ms", Some(4.0)),
    row(RUN_BRIDGE, "ms", Some(10.0)),
    row(CREATE_START, "ms", Some(7.0)),
    row(TO_RUNNING, "ms", Some(18.0)),
    Row { name: RATE, unit: "pods/s", budget: Some(80.0), more_is_better: true },
    row(CPU, "s", Some(0.02)),
    row(EXEC, "ms", Some(3.5)),
    row(STOP_SIGNAL, "ms", Some(5.0)),
    row(STOP_KILL, "ms", Some(5.0)),
    row(STOP_REMOVE, "ms", Some(20.0)),
    row(STOP_REMOVE_HOST, "ms", Some(4.0)),
    row(MEMORY_POD, "MiB", Some(0.2)),
    row(MEMORY_SECOND, "MiB", Some(0.02)),
    row(DAEMON_IDLE, "MiB", Some(12.0)),
    row(DAEMON_100, "MiB", Some(20.0)),
    row(LIST, "ms", Some(0.25)),
    row(STATUS, "ms", Some(0.15)),
    row(STATS, "ms", Some(10.0)),
    row("cold pull, 1 MB, one layer", "ms", Some(30.0)),
    row("– its bytes written", "MiB", None),
    row("– the daemon's peak", "MiB", None),
    row("– disk used afterwards", "MiB", None),
    row("cold pull, 230 MB, 30 layers, 59,000 files", "ms", Some(4_000.0)),
    row("– 30 layers, bytes written", "MiB", None),
    row("– 30 layers, the daemon's peak", "MiB", None),
    row("– 30 layers, disk used afterwards", "MiB", None),
    row("– 30 layers, 20 callers at once", "ms", None),
    row("cold pull, 1.2 GB (640 MB gzip), 3 layers, 55,000 files", "ms", Some(7_000.0)),
    row("– gzip, bytes written", "MiB", None),
    row("– gzip, the daemon's peak", "MiB", None),
    row("– gzip, disk used afterwards", "MiB", None),
    row("the same as zstd", "ms", Some(5_000.0)),
    row("– zstd, bytes written", "MiB", None),
    row("– zstd, the daemon's peak", "MiB", None),
    row("– zstd, disk used afterwards", "MiB", None),
];

/// Notes a sample.
pub fn put(samples: &mut Samples, row: &'static str, engine: &Engine, value: f64) {
    samples.entry(row).or_default().entry(engine.name.clone()).or_default().push(value);
}

async fn ms<T>(work: impl Future<Output = T>) -> (T, f64) {
    let start = Instant::now();
    let result = work.await;
    (result, start.elapsed().as_secs_f64() * 1e3)
}

fn pod_config(name: &str, host: bool) -> api::PodSandboxConfig {
    let network = if host { api::NamespaceMode::Node } else { api::NamespaceMode::Pod };
    let context = api::LinuxSandboxSecurityContext {
        namespace_options: Some(api::NamespaceOption { network: network.into(), pid: api::NamespaceMode::Container.into(), ..Default::default() }),
        ..Default::default()
    };
    api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata { name: name.to_owned(), uid: name.to_owned(), namespace: "bench".to_owned(), attempt: 0 }),
        hostname: if host { String::new() } else { "bench".to_owned() },
        log_directory: format!("/run/bench-logs/{name}"),
        linux: Some(api::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() }),
        ..Default::default()
    }
}

fn container_config(name: &str) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(api::ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() }),
        command: vec!["/bin/sh".to_owned(), "-c".to_owned(), "trap 'exit 0' TERM; sleep 100000 & wait".to_owned()],
        log_path: format!("{name}.log"),
        linux: Some(api::LinuxContainerConfig {
            security_context: Some(api::LinuxContainerSecurityContext {
                namespace_options: Some(api::NamespaceOption { pid: api::NamespaceMode::Container.into(), ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn run_pod(engine: &Engine, config: &api::PodSandboxConfig) -> String {
    let request = api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    engine.runtime().run_pod_sandbox(request).await.unwrap_or_else(|e| panic!("{}: {e}", engine.name)).into_inner().pod_sandbox_id
}

async fn launch(engine: &Engine, pod: &str, pod_config: &api::PodSandboxConfig, name: &str) -> String {
    let mut runtime = engine.runtime();
    let request =
        api::CreateContainerRequest { pod_sandbox_id: pod.to_owned(), config: Some(container_config(name)), sandbox_config: Some(pod_config.clone()) };
    let id = runtime.create_container(request).await.unwrap_or_else(|e| panic!("{}: {e}", engine.name)).into_inner().container_id;
    runtime.start_container(api::StartContainerRequest { container_id: id.clone() }).await.unwrap_or_else(|e| panic!("{}: {e}", engine.name));
    id
}

async fn stop(engine: &Engine, container: &str, timeout: i64) {
    engine.runtime().stop_container(api::StopContainerRequest { container_id: container.to_owned(), timeout }).await.unwrap();
}

async fn remove_pod(engine: &Engine, pod: &str) {
    let mut runtime = engine.runtime();
    runtime.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() }).await.unwrap_or_else(|e| panic!("{}: {e}", engine.name));
    runtime.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() }).await.unwrap_or_else(|e| panic!("{}: {e}", engine.name));
}

/// Pulls the image and takes one pod through its life, so that no first-time cost is measured.
pub async fn warm_up(engine: &Engine) {
    let image = api::ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() };
    engine.images().pull_image(api::PullImageRequest { image: Some(image), ..Default::default() }).await.unwrap_or_else(|e| panic!("{}: {e}", engine.name));
    for host in [true, false] {
        let config = pod_config("warm", host);
        let pod = run_pod(engine, &config).await;
        launch(engine, &pod, &config, "c").await;
        remove_pod(engine, &pod).await;
    }
}

/// One pod's life, step by step.
pub async fn single_pod(engine: &Engine, round: usize, samples: &mut Samples) {
    let config = pod_config(&format!("host-{round}"), true);
    let (pod, t) = ms(run_pod(engine, &config)).await;
    put(samples, RUN_HOST, engine, t);
    let ((), t) = ms(remove_pod(engine, &pod)).await;
    put(samples, STOP_REMOVE_HOST, engine, t);

    let config = pod_config(&format!("bridge-{round}"), false);
    let (pod, t_pod) = ms(run_pod(engine, &config)).await;
    put(samples, RUN_BRIDGE, engine, t_pod);
    let (first, t_container) = ms(launch(engine, &pod, &config, "a")).await;
    put(samples, CREATE_START, engine, t_container);
    put(samples, TO_RUNNING, engine, t_pod + t_container);
    let one = engine.helpers_pss();
    let second = launch(engine, &pod, &config, "b").await;
    put(samples, MEMORY_SECOND, engine, (engine.helpers_pss() - one) / 1024.0);

    let mut runtime = engine.runtime();
    for _ in 0..5 {
        let request = api::ExecSyncRequest { container_id: first.clone(), cmd: vec!["/bin/true".to_owned()], timeout: 10 };
        let (answer, t) = ms(runtime.exec_sync(request)).await;
        assert_eq!(answer.unwrap().into_inner().exit_code, 0);
        put(samples, EXEC, engine, t);
    }
    let ((), t) = ms(stop(engine, &first, 30)).await;
    put(samples, STOP_SIGNAL, engine, t);
    let ((), t) = ms(stop(engine, &second, 0)).await;
    put(samples, STOP_KILL, engine, t);
    remove_pod(engine, &pod).await;

    let config = pod_config(&format!("gone-{round}"), false);
    let pod = run_pod(engine, &config).await;
    launch(engine, &pod, &config, "a").await;
    let ((), t) = ms(remove_pod(engine, &pod)).await;
    put(samples, STOP_REMOVE, engine, t);
}

/// The daemon with nothing to do.
pub async fn idle(engine: &Engine, samples: &mut Samples) {
    // Idle is what has had nothing to do for a while.
    tokio::time::sleep(std::time::Duration::from_secs(25)).await;
    put(samples, DAEMON_IDLE, engine, pss(engine.pid()) / 1024.0);
}

/// 100 pods by 10 callers, what they cost, and lists over them.
pub async fn many_pods(engine: &Engine, samples: &mut Samples) {
    const PODS: usize = 100;
    const CALLERS: usize = 10;
    let cpu = machine_cpu();
    let start = Instant::now();
    let callers = (0..CALLERS).map(|caller| async move {
        let mut made = Vec::new();
        for n in 0..PODS / CALLERS {
            let config = pod_config(&format!("many-{caller}-{n}"), false);
            let pod = run_pod(engine, &config).await;
            let container = launch(engine, &pod, &config, "c").await;
            made.push((pod, container));
        }
        made
    });
    let pods: Vec<_> = futures_util::future::join_all(callers).await.into_iter().flatten().collect();
    put(samples, RATE, engine, PODS as f64 / start.elapsed().as_secs_f64());
    put(samples, CPU, engine, (machine_cpu() - cpu) / PODS as f64);
    // Over many pods: what one alone maps, a hundred share.
    put(samples, MEMORY_POD, engine, engine.helpers_pss() / 1024.0 / PODS as f64);
    put(samples, DAEMON_100, engine, pss(engine.pid()) / 1024.0);

    let mut runtime = engine.runtime();
    for _ in 0..20 {
        let (answer, t) = ms(runtime.list_containers(api::ListContainersRequest { filter: None })).await;
        assert!(answer.unwrap().into_inner().containers.len() >= PODS);
        put(samples, LIST, engine, t);
        let (answer, t) = ms(runtime.container_status(api::ContainerStatusRequest { container_id: pods[0].1.clone(), verbose: false })).await;
        answer.unwrap();
        put(samples, STATUS, engine, t);
    }
    for _ in 0..5 {
        let (answer, t) = ms(runtime.list_container_stats(api::ListContainerStatsRequest { filter: None })).await;
        assert!(answer.unwrap().into_inner().stats.len() >= PODS);
        put(samples, STATS, engine, t);
    }
    for (pod, _) in pods {
        remove_pod(engine, &pod).await;
    }
}

/// Busy time of all cores since boot, seconds.
fn machine_cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap();
    let fields: Vec<f64> = text.lines().next().unwrap().split_whitespace().skip(1).map(|f| f.parse().unwrap()).collect();
    // user, nice, system, (idle, iowait), irq, softirq
    (fields[0] + fields[1] + fields[2] + fields[5] + fields[6]) / 100.0
}
