//! A shim dies: at every named step of its own, and at random moments of random work, while the daemon lives on. The call under way
//! works or says what failed, on what and why; what the shim looked after is reported ended; everything can be removed and nothing
//! is left over.
//!
//! `SHIM_KILL_SEEDS=FROM..TO` chooses the random seeds (default 0..15).

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::cri::{pod, shell};
use common::faults::{Random, fail_points, seeds};
use common::ledger::{COUNTS, Ledger, Living, counts, life, measured};
use common::{BUSYBOX, Node, host};
use mesocri::wire::cri as api;
use tonic::{Code, Status};

/// Steps after which nobody is told anything but success: the pod was being stopped.
const SILENT: &[&str] = &["shim.stop_sandbox.killed"];

/// A call that failed: which, on what.
struct Failed(&'static str, String, Status);

/// Every kind of call that comes to the shim, on one pod that shares a process namespace; ends with the first that fails.
async fn acts(node: &Node, config: &api::PodSandboxConfig) -> Result<(), Failed> {
    let name = config.metadata.as_ref().unwrap().name.clone();
    let pod = node.run_pod(config).await.map_err(|e| Failed("RunPodSandbox", name, e))?;
    let create = async |name: &str, script: &str| {
        let mut container = shell(name, script);
        container.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
        node.create(&pod, config, &container).await.map_err(|e| Failed("CreateContainer", name.to_owned(), e))
    };
    let start = async |id: &str| node.start_container(id).await.map_err(|e| Failed("StartContainer", id.to_owned(), e));
    let stop = async |id: &str, seconds| node.stop_container(id, seconds).await.map_err(|e| Failed("StopContainer", id.to_owned(), e));
    create("idle", "exit 0").await?;
    let runs = create("runs", COUNTS).await?;
    start(&runs).await?;
    node.exec(&runs, "echo x", 5).await.map_err(|e| Failed("ExecSync", runs.clone(), e))?;
    let log = node.logs().join(&config.hostname).join("runs.log");
    let process = node.process_of(&runs).await.ok().and_then(|(pid, _)| Living::of(pid));
    counts(&log, process).await;
    std::fs::rename(&log, log.with_extension("log.1")).unwrap();
    let reopen = api::ReopenContainerLogRequest { container_id: runs.clone() };
    node.runtime().reopen_container_log(reopen).await.map_err(|e| Failed("ReopenContainerLog", runs.clone(), e))?;
    stop(&runs, 5).await?;
    let killed = create("killed", "exec sleep 1000").await?;
    start(&killed).await?;
    stop(&killed, 0).await?;
    for id in [runs, killed] {
        node.remove_container(&id).await.map_err(|e| Failed("RemoveContainer", id.clone(), e))?;
    }
    Ok(())
}

/// A failed call names its object and the cause; the act is the caller's own or the shim's.
fn named(what: &str, failed: &Failed) {
    let Failed(act, object, status) = failed;
    let text = status.message();
    let short = object.get(..12).unwrap_or(object);
    assert!(text.contains(short), "{what}: {act} failed and does not name {object}: {text}");
    // It was under way, or it came so late that the loss was known already.
    let cause = if status.code() == Code::FailedPrecondition { ["sandbox ended", "container is in exited state"].as_slice() } else { &["shim"] };
    assert!(cause.iter().any(|c| text.contains(c)), "{what}: {act} failed and does not say why: {status:?}");
    assert!(matches!(status.code(), Code::Unavailable | Code::FailedPrecondition | Code::Internal), "{what}: {act}: {status:?}");
}

/// The shim that looks after a pod, if it lives.
async fn shim_of(node: &Node, pod: &str) -> Option<Living> {
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: true };
    let info = node.runtime().pod_sandbox_status(request).await.unwrap().into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    Living::of(info["shimPid"].as_u64()?.try_into().unwrap())
}

/// Waits until everything in pods without a shim is reported ended, and holds the report against what can be true. Gives how many
/// containers were lost with their shim.
async fn reported(node: &Node, what: &str) -> usize {
    let mut lost = 0;
    for pod in node.pods().await {
        if shim_of(node, &pod.id).await.is_some() {
            continue;
        }
        for container in node.containers().await.into_iter().filter(|c| c.pod_sandbox_id == pod.id) {
            let status = node.wait_exit(&container.id).await;
            let name = &status.metadata.as_ref().unwrap().name;
            match (name.as_str(), status.exit_code) {
                (_, 255) => {
                    assert!(status.reason == "ShimLost" && !status.message.is_empty(), "{what}: {status:?}");
                    lost += 1;
                }
                ("absent", 128) => assert_eq!(status.reason, "StartError", "{what}"),
                // Its start was under way.
                (_, 128) => assert!(status.reason == "StartError" && status.message.contains("shim"), "{what}: {status:?}"),
                ("runs" | "stays", 3) | ("ends", 5) | ("killed", 137) => assert_eq!(status.reason, "Error", "{what}"),
                _ => panic!("{what}: nothing can have ended so: {status:?}"),
            }
            assert!(status.finished_at > 0, "{what}: {status:?}");
        }
        let start = std::time::Instant::now();
        while node.pod_status(&pod.id).await.unwrap().state() != api::PodSandboxState::SandboxNotready {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}: a pod without its shim stays ready");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    lost
}

/// Everything can be removed, and then nothing is left; the daemon serves on.
async fn settle(node: &Node, what: &str, before: &host::Snapshot) {
    node.remove_all_pods().await;
    let _ = std::fs::remove_dir_all(node.logs());
    let image = Some(api::ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() });
    node.images().remove_image(api::RemoveImageRequest { image }).await.unwrap();
    node.nothing_is_left(what, before);
}

#[tokio::test(flavor = "current_thread")]
async fn every_step_of_a_shim_is_survived() {
    let points = fail_points(true);
    assert!(points.len() >= 20, "too few fail points: {points:?}");
    let mut node = Node::prepare("");
    node.start_registry();
    let before = node.baseline().await;
    let mut passed = BTreeSet::new();
    let (mut lost, mut calls) = (0, BTreeSet::new());
    for point in &points {
        node.start_daemon(&[("MESOCRI_FAILPOINT", point)]);
        node.pull().await;
        let mut config = pod(&node, "victim");
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
        let outcome = acts(&node, &config).await;
        let pods = node.pods().await;
        let start = std::time::Instant::now();
        let alive = loop {
            let mut alive = false;
            for pod in &pods {
                alive |= shim_of(&node, &pod.id).await.is_some();
            }
            // One whose connection broke is about to be gone.
            if !alive || outcome.is_ok() || start.elapsed() > Duration::from_secs(5) {
                break alive;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        if !alive || SILENT.contains(&point.as_str()) {
            passed.insert(point.clone());
        }
        if let Err(failed) = outcome {
            named(point, &failed);
            calls.insert(failed.0);
        }
        lost += reported(&node, point).await;
        settle(&node, point, &before).await;
        node.kill_daemon();
    }
    let missed: Vec<_> = points.difference(&passed).collect();
    assert!(missed.is_empty(), "nothing here passes these fail points, so nobody knows what a death at them does: {missed:?}");
    let all = ["CreateContainer", "ExecSync", "ReopenContainerLog", "RunPodSandbox", "StartContainer"];
    assert!(all.iter().all(|call| calls.contains(call)), "these calls were hit: {calls:?}");
    assert!(lost > 10, "only {lost} containers were lost with their shims");
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn shims_killed_at_random_moments() {
    let mut node = Node::prepare("");
    node.start_registry();
    let before = node.baseline().await;
    node.start_daemon(&[]);
    let whole = measured(&node).await;
    let range = seeds("SHIM_KILL_SEEDS", "0..15");
    let (mut killed, mut lost) = (0, 0);
    for seed in range.clone() {
        let mut random = Random::of(seed);
        // Anywhere in a life, or a little later.
        let delay = whole.mul_f64(random.below(1200) as f64 / 1000.0);
        let networks: Vec<bool> = (0..=random.below(3)).map(|_| random.below(2) == 0).collect();
        let what = format!("seed {seed} (shims killed after {delay:?}, {} lives)", networks.len());
        let ledgers: Vec<_> = networks.iter().map(|_| Ledger::default()).collect();
        node.pull().await;
        let lives = futures_util::future::join_all(networks.iter().zip(&ledgers).enumerate().map(|(n, (own, ledger))| {
            let (node, name) = (&node, format!("pod{n}"));
            async move { life(node, &name, *own, ledger).await }
        }));
        // The moment of death is the test's input, not a wait for anything.
        let kill = async {
            tokio::time::sleep(delay).await;
            host::shims().into_iter().filter(|_| random.below(4) > 0).map(host::kill).count()
        };
        let (outcomes, n) = tokio::join!(lives, kill);
        killed += n;
        for error in outcomes.into_iter().filter_map(Result::err) {
            // Two lives share an image, and the one that ends first removes it.
            let of_image = error.code() == Code::NotFound && error.message().contains("image");
            assert!(of_image || matches!(error.code(), Code::Unavailable | Code::FailedPrecondition | Code::Internal), "{what}: {error:?}");
            assert!(["container", "run pod"].iter().any(|object| error.message().contains(object)), "{what}: {error:?}");
        }
        lost += reported(&node, &what).await;
        settle(&node, &what, &before).await;
    }
    assert!(range.end - range.start < 15 || killed > 5 && lost > 0, "{killed} shims were killed and {lost} containers lost: too few");
    node.finish();
}
