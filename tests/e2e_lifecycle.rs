//! End to end: a pod's whole life through the CRI on a real daemon, registry, shim and kernel.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use common::cri::{code, host_pod, pod, shell};
use common::{BUSYBOX, Node};
use mesocri::wire::cri as api;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tonic::Code;

#[tokio::test(flavor = "current_thread")]
async fn pull_run_log_exec_stop_remove() {
    let node = Node::start().await;
    let image = node.pull().await;
    let listed = node.images().list_images(api::ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, image);
    assert_eq!(listed[0].repo_tags, [BUSYBOX]);
    assert!(listed[0].size > 100_000);

    let config = pod(&node, "life");
    let id = node.run_pod(&config).await.unwrap();
    let status = node.pod_status(&id).await.unwrap();
    assert_eq!(status.state, api::PodSandboxState::SandboxReady as i32);
    let ip = status.network.unwrap().ip;
    assert!(ip.parse::<std::net::IpAddr>().is_ok(), "{ip:?}");

    let web = node.launch(&id, &config, &shell("web", "trap 'exit 7' TERM; echo out; echo err >&2; echo $HOSTNAME; while :; do sleep 0.1; done")).await;
    let status = node.status(&web).await.unwrap();
    assert_eq!(status.state, api::ContainerState::ContainerRunning as i32);
    assert_eq!(status.image_id, image);
    assert!(status.started_at >= status.created_at && status.created_at > 0);

    let (exit, out, err) = node.exec(&web, "echo hello; hostname; ip addr show eth0 | grep -o 'inet [0-9.]*'; echo oops >&2; exit 3", 10).await.unwrap();
    assert_eq!((exit, err.as_str()), (3, "oops\n"));
    assert_eq!(out, format!("hello\nlife\ninet {ip}\n"));
    assert_eq!(node.exec(&web, "ps | wc -l", 10).await.unwrap().0, 0);
    assert_eq!(code(node.exec(&web, "sleep 4321", 1).await), Code::DeadlineExceeded);
    let (_, ps, _) = node.exec(&web, "ps", 10).await.unwrap();
    assert!(!ps.contains("4321"), "a timed-out exec is dead when the call returns: {ps}");

    node.until_printed(&web, "life").await;
    let start = Instant::now();
    node.stop_container(&web, 60).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(30), "it ends at the signal and is not waited for: {:?}", start.elapsed());
    let status = node.status(&web).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
    assert_eq!(node.log(&web).await, ("out\nlife\n".to_owned(), "err\n".to_owned()));
    node.stop_container(&web, 30).await.unwrap();

    let done = node.launch(&id, &config, &shell("done", "exit 0")).await;
    let status = node.wait_exit(&done).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(status.finished_at >= status.started_at);

    node.remove_container(&done).await.unwrap();
    assert_eq!(code(node.status(&done).await), Code::NotFound);
    node.remove_pod(&id).await.unwrap();
    assert_eq!(code(node.pod_status(&id).await), Code::NotFound);
    node.remove_pod(&id).await.unwrap();
    node.images().remove_image(api::RemoveImageRequest { image: Some(api::ImageSpec { image, ..Default::default() }) }).await.unwrap();
    assert!(common::entries(&node.root().join("store/layers")).is_empty(), "layers of a removed image are gone");
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn start_errors_are_exits_with_the_cause() {
    let node = Node::start().await;
    node.pull().await;
    let config = host_pod(&node, "bad");
    let id = node.run_pod(&config).await.unwrap();
    let mut container = shell("missing", "");
    container.command = vec!["/no/such/program".to_owned()];
    let created = node.create(&id, &config, &container).await.unwrap();
    let error = node.start_container(&created).await.unwrap_err();
    assert!(error.message().contains("/no/such/program"), "{error}");
    let status = node.status(&created).await.unwrap();
    assert_eq!((status.state, status.exit_code, status.reason.as_str()), (api::ContainerState::ContainerExited as i32, 128, "StartError"));
    assert!(status.message.contains("/no/such/program") && status.finished_at > 0);
    assert_eq!(code(node.start_container(&created).await), Code::FailedPrecondition);
    node.remove_all_pods().await;
    node.finish();
}

/// The process whose command line begins with `words`, and the end of which can be waited for.
fn find_process(words: &str) -> Option<(i32, OwnedFd)> {
    let pids = common::entries(Path::new("/proc")).into_iter().filter_map(|name| name.parse::<i32>().ok());
    let found = pids.filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.replace('\0', " ").starts_with(words)));
    found.into_iter().find_map(|pid| {
        let pidfd = rustix::process::pidfd_open(rustix::process::Pid::from_raw(pid)?, rustix::process::PidfdFlags::empty()).ok()?;
        Some((pid, pidfd))
    })
}

#[tokio::test(flavor = "current_thread")]
async fn a_command_ends_when_its_caller_leaves() {
    let node = Node::start().await;
    node.pull().await;
    let config = host_pod(&node, "left");
    let id = node.run_pod(&config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    // A number that no other test sleeps for.
    let words = format!("sleep 7{:07}", std::process::id());
    let cmd = vec!["/bin/sh".to_owned(), "-c".to_owned(), format!("setsid {words} & {words}1")];
    let mut runtime = node.runtime();
    let request = api::ExecSyncRequest { container_id: container.clone(), cmd, timeout: 0 };
    let call = tokio::spawn(async move { runtime.exec_sync(request).await });
    let mut processes = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    // The shell becomes the last of its commands.
    for process in [words.clone() + "1 ", words.clone() + " "] {
        loop {
            if let Some(found) = find_process(&process) {
                processes.push(found);
                break;
            }
            assert!(!call.is_finished() && Instant::now() < deadline, "the command does not run");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    call.abort();
    let command = format!("/proc/{}", processes[0].0);
    for (pid, pidfd) in processes {
        let wait = move || poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000u16)).unwrap();
        assert_eq!(tokio::task::spawn_blocking(wait).await.unwrap(), 1, "process {pid} runs on without its caller");
    }
    // What it started is for the container's first process to reap, which does not.
    common::host::wait_until("the command is reaped", || !Path::new(&command).exists());
    assert_eq!(node.exec(&container, "echo still there", 10).await.unwrap(), (0, "still there\n".to_owned(), String::new()));
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn memory_limit_kills_and_says_oom() {
    let node = Node::start().await;
    node.pull().await;
    let config = host_pod(&node, "oom");
    let id = node.run_pod(&config).await.unwrap();
    let mut container = shell("hog", "a=x; while :; do a=$a$a; done");
    container.linux.as_mut().unwrap().resources = Some(api::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
    let created = node.launch(&id, &config, &container).await;
    let status = node.wait_exit(&created).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn containers_of_a_pod_share_what_the_pod_shares() {
    let node = Node::start().await;
    node.pull().await;
    let mut config = pod(&node, "share");
    let options = config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap();
    options.pid = api::NamespaceMode::Pod.into();
    let id = node.run_pod(&config).await.unwrap();
    let in_pod = |name: &str, script: &str| {
        let mut c = shell(name, script);
        c.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
        c
    };
    let a = node.launch(&id, &config, &in_pod("a", "echo shared >/dev/shm/x; exec sleep 1234")).await;
    let b = node.launch(&id, &config, &in_pod("b", "exec sleep 5678")).await;
    let script = "until [ -s /dev/shm/x ]; do sleep 0.02; done; cat /dev/shm/x; ps; for n in ipc net uts; do readlink /proc/self/ns/$n; done";
    let (code_b, seen, err) = node.exec(&b, script, 20).await.unwrap();
    assert_eq!(code_b, 0, "{err}");
    assert!(seen.starts_with("shared\n") && seen.contains("sleep 1234") && seen.contains("sleep 5678"), "{seen}");
    let (_, first, _) = node.exec(&a, "for n in ipc net uts; do readlink /proc/self/ns/$n; done", 10).await.unwrap();
    assert!(seen.ends_with(&first), "{seen} / {first}");
    let (_, init, _) = node.exec(&a, "tr '\\0' ' ' </proc/1/cmdline", 10).await.unwrap();
    assert!(!init.contains("sleep"), "process 1 of a shared namespace is the pod's, not a workload: {init}");
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn twenty_pods_at_once() {
    let node = Node::start().await;
    node.pull().await;
    let work = (0..20).map(|n| {
        let node = &node;
        async move {
            let config = pod(node, &format!("many-{n}"));
            let id = node.run_pod(&config).await.unwrap();
            let container = node.launch(&id, &config, &shell("c", "echo done; exec sleep 100")).await;
            let ip = node.pod_status(&id).await.unwrap().network.unwrap().ip;
            node.stop_container(&container, 0).await.unwrap();
            assert_eq!(node.status(&container).await.unwrap().exit_code, 137);
            (id, ip)
        }
    });
    let mut ips: Vec<_> = futures_util::future::join_all(work).await.into_iter().map(|(_, ip)| ip).collect();
    ips.sort();
    ips.dedup();
    assert_eq!(ips.len(), 20, "every pod has an address of its own");
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn the_run_command_shows_progress_output_and_exit_code() {
    let node = Node::start().await;
    let run = |network: &str, image: &str, script: &str| {
        std::process::Command::new(env!("CARGO_BIN_EXE_mesocri"))
            .args(["run", "--network", network, "--address"])
            .arg(node.socket())
            .args([image, "--", "/bin/sh", "-c", script])
            .output()
            .unwrap()
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let pulled = run("pod", BUSYBOX, "echo out; echo err >&2; exit 3");
    let shown = text(&pulled.stderr);
    assert_eq!((pulled.status.code(), text(&pulled.stdout).as_str()), (Some(3), "out\n"), "{shown}");
    for part in
        ["manifest: 1 layers", "layer 1/1", "unpacked and verified", "is ready at 10.", "is running", "err\n", "has ended: exit code 3, Error", "is removed"]
    {
        assert!(shown.contains(part), "{part:?} is missing in:\n{shown}");
    }
    // No registry there: the host's own busybox stands in, and the command says so.
    let stand_in = run("host", "127.0.0.1:1/none:x", "echo $0 ran");
    let shown = text(&stand_in.stderr);
    assert_eq!((stand_in.status.code(), text(&stand_in.stdout).as_str()), (Some(0), "/bin/sh ran\n"), "{shown}");
    assert!(shown.contains("RegistryUnavailable") && shown.contains("this host's busybox"), "{shown}");
    node.finish();
}
