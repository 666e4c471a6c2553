//! End to end: pods whose runtime handler is another shim, with a daemon restart in the middle. Needs Debian's packages
//! `containerd`, `runc` and `crun`.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::Node;
use common::cri::{code, pod, shell};
use mesocri::wire::cri as api;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

/// A mount namespace of the test's own, in which crun works.
fn own_mounts_for_crun() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    common::host::v1_alone();
}

/// A program that waits and needs no library: the test build of `mesocri-init` is linked dynamically.
fn static_pause(node: &Node) -> std::path::PathBuf {
    let (source, program) = (node.dir.path().join("pause.c"), node.dir.path().join("pause"));
    std::fs::write(&source, "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n").unwrap();
    assert!(std::process::Command::new("cc").arg("-static").arg("-o").arg(&program).arg(&source).status().unwrap().success());
    program
}

/// A node whose daemon knows `handler`, with the image.
async fn node_with(handler: &str) -> Node {
    let mut node = Node::prepare("");
    node.extra_config = format!(
        "[launcher]\npause = {:?}\n[launcher.handlers.{handler}]\nruntime = 'io.containerd.runc.v2'\n[launcher.handlers.{handler}.options]\nBinaryName = '{handler}'\nRoot = '/run/mesocri-e2e-{handler}'\n",
        static_pause(&node)
    );
    node.start_registry();
    node.start_daemon(&[]);
    node.pull().await;
    node
}

async fn a_pod_lives_under(handler: &str) {
    let mut node = node_with(handler).await;
    let handlers = node.runtime().status(api::StatusRequest::default()).await.unwrap().into_inner().runtime_handlers;
    assert!(handlers.iter().any(|h| h.name == handler), "{handlers:?}");

    let config = pod(&node, handler);
    let id = node.run_pod_on(handler, &config).await.unwrap();
    let status = node.pod_status(&id).await.unwrap();
    assert_eq!((status.runtime_handler.as_str(), status.state), (handler, api::PodSandboxState::SandboxReady as i32));
    let ip = status.network.unwrap().ip;
    let script = "trap 'exit 7' TERM; echo err >&2; echo out; n=0; while :; do n=$((n+1)); sleep 0.05; done";
    let mut limited = shell("c", script);
    limited.linux.as_mut().unwrap().resources = Some(api::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() });
    let container = node.launch(&id, &config, &limited).await;
    let request = api::ContainerStatusRequest { container_id: container.clone(), verbose: true };
    let info = node.runtime().container_status(request).await.unwrap().into_inner().info.remove("info").unwrap();
    let annotations = serde_json::from_str::<serde_json::Value>(&info).unwrap()["runtimeSpec"]["annotations"].clone();
    let said = |key: &str| annotations[format!("io.kubernetes.cri.{key}")].as_str().unwrap_or_default().to_owned();
    assert_eq!([said("container-type"), said("sandbox-id"), said("container-name"), said("sandbox-name")], ["container", &id, "c", handler], "{annotations}");
    assert!(said("image-name").contains("busybox"), "{annotations}");
    let seen = format!("{handler}\ninet {ip}\n");
    let look = "hostname; ip addr show eth0 | grep -o 'inet [0-9.]*'; echo oops >&2; exit 3";
    assert_eq!(node.exec(&container, look, 20).await.unwrap(), (3, seen.clone(), "oops\n".to_owned()));
    assert_eq!(code(node.exec(&container, "sleep 4321", 1).await), Code::DeadlineExceeded);
    let other = node.launch(&id, &config, &shell("other", "exit 5")).await;
    assert_eq!(node.wait_exit(&other).await.exit_code, 5);

    node.kill_daemon();
    node.start_daemon(&[]);
    assert_eq!(node.pod_status(&id).await.unwrap().network.unwrap().ip, ip);
    let status = node.status(&container).await.unwrap();
    assert_eq!(status.state, api::ContainerState::ContainerRunning as i32);
    assert_eq!(node.exec(&container, look, 20).await.unwrap(), (3, seen, "oops\n".to_owned()));
    let stats = node.runtime().container_stats(api::ContainerStatsRequest { container_id: container.clone() }).await.unwrap().into_inner().stats.unwrap();
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);
    node.until_printed(&container, "out").await;
    node.stop_container(&container, 30).await.unwrap();
    let status = node.status(&container).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
    assert_eq!(node.log(&container).await, ("out\n".to_owned(), "err\n".to_owned()));
    node.remove_container(&container).await.unwrap();
    assert_eq!(code(node.status(&container).await), Code::NotFound);
    assert_eq!(node.status(&other).await.unwrap().exit_code, 5);
    // One runs on when its pod goes.
    node.launch(&id, &config, &shell("late", "exec sleep 1000")).await;
    node.remove_all_pods().await;
    node.finish();
}

/// Processes of another runtime's shim for the pod.
fn shims_of(pod: &str) -> Vec<i32> {
    let pids = common::entries(Path::new("/proc")).into_iter().filter_map(|name| name.parse().ok());
    let named = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.starts_with("/usr/bin/containerd-shim") && c.contains(pod));
    pids.filter(named).collect()
}

/// A pod under runc whose only container has ended; with its shim.
async fn pod_with_ended_container(node: &Node, name: &str) -> (String, i32) {
    let config = pod(node, name);
    let id = node.run_pod_on("runc", &config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "exit 5")).await;
    assert_eq!(node.wait_exit(&container).await.exit_code, 5);
    let shims = shims_of(&id);
    assert_eq!(shims.len(), 1, "{shims:?}");
    (id, shims[0])
}

#[tokio::test(flavor = "current_thread")]
async fn a_hung_shim_of_runc_is_ended_with_its_pod() {
    let mut node = node_with("runc").await;
    for restart in [false, true] {
        let (id, shim) = pod_with_ended_container(&node, if restart { "late" } else { "soon" }).await;
        kill(Pid::from_raw(shim), Signal::SIGSTOP).unwrap();
        if restart {
            node.kill_daemon();
            node.start_daemon(&[]);
        }
        node.stop_pod(&id).await.unwrap();
        node.remove_pod(&id).await.unwrap();
        assert!(shims_of(&id).is_empty());
    }
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn a_pod_outlives_its_handler_and_is_removed_completely() {
    let mut node = node_with("runc").await;
    let mut shims = Vec::new();
    let mut ids = Vec::new();
    for name in ["kept", "damaged"] {
        let config = pod(&node, name);
        let id = node.run_pod_on("runc", &config).await.unwrap();
        let container = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
        shims.extend(shims_of(&id));
        ids.push((id, container));
    }
    assert_eq!(shims.len(), 2, "{shims:?}");
    node.kill_daemon();
    let [(kept, container), (damaged, _)] = &ids[..] else { unreachable!() };
    std::fs::write(node.root().join("pods").join(damaged).join("pod.json"), "{").unwrap();
    node.extra_config.clear();
    node.start_daemon(&[]);
    let handlers = node.runtime().status(api::StatusRequest::default()).await.unwrap().into_inner().runtime_handlers;
    assert!(handlers.iter().all(|h| h.name != "runc"), "{handlers:?}");
    assert!(shims_of(damaged).is_empty(), "the record is in quarantine, nothing of the pod may run");
    assert_eq!(node.status(container).await.unwrap().state, api::ContainerState::ContainerRunning as i32);
    node.stop_pod(kept).await.unwrap();
    node.remove_pod(kept).await.unwrap();
    assert!(node.pods().await.is_empty());
    assert!(shims_of(kept).is_empty() && shims_of(damaged).is_empty());
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn a_pod_lives_under_runc() {
    a_pod_lives_under("runc").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_pod_lives_under_crun() {
    own_mounts_for_crun();
    a_pod_lives_under("crun").await;
}
