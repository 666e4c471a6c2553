//! End to end: the daemon dies and comes back; shims die; nothing is lost, nothing is left.

#![allow(clippy::unwrap_used)]

mod common;

use common::cri::{code, host_pod, pod, shell};
use common::{Node, host};
use mesocri::wire::cri as api;
use tonic::Code;

#[tokio::test(flavor = "current_thread")]
async fn a_killed_daemon_loses_nothing() {
    let mut node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "keep");
    let id = node.run_pod(&config).await.unwrap();
    let before_pod = node.pod_status(&id).await.unwrap();
    let runs = node.launch(&id, &config, &shell("runs", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done")).await;
    let ends = node.launch(&id, &config, &shell("ends", "while [ ! -e /proc/1/root/tmp/go ]; do sleep 0.02; done; exit 42")).await;
    let created = node.create(&id, &config, &shell("created", "exit 0")).await.unwrap();
    let before = node.status(&runs).await.unwrap();

    // A process that lives in the container, so that it can end it while no daemon runs.
    let pid = pid_of(&node, &ends).await;
    node.kill_daemon();
    std::fs::write(format!("/proc/{pid}/root/tmp/go"), "").unwrap();
    host::wait_until("the container ends while no daemon runs", || std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |s| s.contains(") Z ")));
    let log = node.status_path("runs", "keep");
    let lines = || std::fs::read_to_string(&log).unwrap().lines().count();
    let seen = lines();
    host::wait_until("the log grows while no daemon runs", || lines() > seen + 3);
    node.start_daemon(&[]);

    let after = node.status(&runs).await.unwrap();
    assert_eq!((after.state, after.started_at, after.created_at), (before.state, before.started_at, before.created_at));
    assert_eq!(node.pod_status(&id).await.unwrap().network, before_pod.network);
    let ended = node.wait_exit(&ends).await;
    assert_eq!(ended.exit_code, 42);
    assert!(ended.finished_at > ended.started_at);
    assert_eq!(node.exec(&runs, "echo again", 10).await.unwrap().1, "again\n");
    node.start_container(&created).await.unwrap();
    assert_eq!(node.wait_exit(&created).await.exit_code, 0);
    node.stop_container(&runs, 0).await.unwrap();
    let numbers: Vec<u64> = node.log(&runs).await.0.lines().map(|l| l.parse().unwrap()).collect();
    assert!(numbers.iter().zip(1..).all(|(a, b)| *a == b), "the log has a hole");
    // A second start changes nothing.
    node.kill_daemon();
    node.start_daemon(&[]);
    assert_eq!(node.status(&ends).await.unwrap(), ended);
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn a_killed_shim_is_reported_and_cleaned() {
    let node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "shimless");
    let id = node.run_pod(&config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    let pid = pid_of(&node, &container).await;
    let shim = parent_of(pid);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).unwrap();
    let status = node.wait_exit(&container).await;
    assert_eq!(status.exit_code, 255);
    assert!(!status.reason.is_empty());
    host::wait_until("the container's process is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(node.pod_status(&id).await.unwrap().state, api::PodSandboxState::SandboxNotready as i32);
    assert_ne!(code(node.create(&id, &config, &shell("late", "true")).await), Code::Ok);
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn a_shim_killed_while_no_daemon_runs() {
    let mut node = Node::start().await;
    node.pull().await;
    let config = host_pod(&node, "both");
    let id = node.run_pod(&config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    let pid = pid_of(&node, &container).await;
    node.kill_daemon();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(parent_of(pid)), nix::sys::signal::Signal::SIGKILL).unwrap();
    node.start_daemon(&[]);
    assert_eq!(node.wait_exit(&container).await.exit_code, 255);
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_whose_daemon_was_killed_is_ended_by_the_next() {
    let mut node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "probed");
    let id = node.run_pod(&config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    let length = (40_000_000 + std::process::id()).to_string();
    let names = |node: &Node| host::run("find", &[node.state().to_str().unwrap(), "-name", "exec-*"]);
    let call = {
        let (mut runtime, container_id, cmd) = (node.runtime(), container.clone(), vec!["sleep".to_owned(), length.clone()]);
        tokio::spawn(async move { runtime.exec_sync(api::ExecSyncRequest { container_id, cmd, timeout: 2 }).await })
    };
    host::wait_until("the command runs", || host::has_process(&length));
    host::wait_until("one name of it is left", || names(&node).lines().count() == 1);
    node.kill_daemon();
    assert!(call.await.unwrap().is_err());
    assert!(host::has_process(&length), "it lives in the shim");
    node.start_daemon(&[]);
    host::wait_until("the command is gone", || !host::has_process(&length));
    host::wait_until("no name is left", || names(&node).is_empty());
    assert_eq!(node.exec(&container, "echo again", 10).await.unwrap().1, "again\n");
    node.remove_all_pods().await;
    node.finish();
}

async fn pid_of(node: &Node, id: &str) -> i32 {
    node.process_of(id).await.unwrap().0.cast_signed()
}

fn parent_of(pid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|l| l.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}

impl Node {
    fn status_path(&self, container: &str, pod: &str) -> std::path::PathBuf {
        self.logs().join(pod).join(format!("{container}.log"))
    }
}
