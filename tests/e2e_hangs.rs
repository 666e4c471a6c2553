//! End to end: what hangs, hangs alone. A shim that does not answer does not keep its pod, and a command that the kernel keeps does
//! not keep its shim.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::cri::{code, pod, shell};
use common::{Node, host};
use mesocri::wire::cri as api;
use nix::mount::{MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

/// Longer than any healthy answer here, shorter than what a hang would take.
const SOON: Duration = Duration::from_secs(20);

/// A file system whose server never answers.
struct DeadServer {
    at: PathBuf,
    /// Ended by the end of the other side.
    reader: Option<(JoinHandle<()>, UnixStream)>,
    /// With the last descriptor of it the kernel gives up all requests.
    _device: Arc<File>,
}

impl DeadServer {
    /// One that does not even read requests: whoever looks into it waits until he is killed.
    fn mount(at: &Path) -> Self {
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        nix::mount::mount(Some("dead"), at, Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Self { at: at.to_owned(), reader: None, _device: Arc::new(device) }
    }

    /// One that reads them: whoever looks into it cannot be killed either, until the server is dropped.
    fn mount_reading(at: &Path) -> Self {
        let mut server = Self::mount(at);
        let (end, seen) = UnixStream::pair().unwrap();
        let device = server._device.clone();
        server.reader = Some((std::thread::spawn(move || read_requests(&device, &seen)), end));
        server
    }
}

/// Answers the first request, without which the kernel hands out no other, and none of the others.
fn read_requests(device: &File, end: &UnixStream) {
    /// Smallest buffer that the kernel takes, and largest write it may send.
    const BUFFER: usize = 8192;
    let mut request = [0; BUFFER];
    let mut answered = false;
    loop {
        let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN), PollFd::new(end.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, PollTimeout::NONE).unwrap();
        if fds[1].any().unwrap() {
            return;
        }
        // The mount may be gone.
        if (&*device).read(&mut request).is_err() {
            return;
        }
        if !std::mem::replace(&mut answered, true) {
            // fuse_out_header: length, error, and the request's own number; then fuse_init_out: version 7.31, no features, largest write.
            let mut answer = [0u8; 16 + 64];
            answer[..4].copy_from_slice(&80u32.to_ne_bytes());
            answer[8..16].copy_from_slice(&request[8..16]);
            for (at, value) in [(16, 7u32), (20, 31), (36, 4096)] {
                answer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            }
            (&*device).write_all(&answer).unwrap();
        }
    }
}

impl Drop for DeadServer {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        if let Some((reader, end)) = self.reader.take() {
            drop(end);
            let _ = reader.join();
        }
    }
}

/// A directory that is shared with containers, with a place `work` in it where something can be mounted while they run.
struct Volume(PathBuf);

impl Volume {
    fn make(node: &Node) -> Self {
        let volume = node.root().join("volume");
        std::fs::create_dir_all(volume.join("work")).unwrap();
        host::run("mount", &["--bind", volume.to_str().unwrap(), volume.to_str().unwrap()]);
        host::run("mount", &["--make-shared", volume.to_str().unwrap()]);
        Self(volume)
    }

    fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    /// A container that works there.
    fn container(&self, name: &str, script: &str) -> api::ContainerConfig {
        let mut config = shell(name, script);
        config.working_dir = "/volume/work".to_owned();
        config.mounts.push(api::Mount {
            container_path: "/volume".to_owned(),
            host_path: self.0.to_string_lossy().into_owned(),
            propagation: api::MountPropagation::PropagationHostToContainer.into(),
            ..Default::default()
        });
        config
    }

    fn unmount(self) {
        host::run("umount", &[self.0.to_str().unwrap()]);
    }
}

/// An ExecSync without a time limit, in the background.
fn exec_true(node: &Node, container: &str) -> tokio::task::JoinHandle<Result<tonic::Response<api::ExecSyncResponse>, tonic::Status>> {
    exec_true_within(node, container, 0)
}

fn exec_true_within(node: &Node, container: &str, timeout: i64) -> tokio::task::JoinHandle<Result<tonic::Response<api::ExecSyncResponse>, tonic::Status>> {
    let (mut runtime, container_id) = (node.runtime(), container.to_owned());
    tokio::spawn(async move { runtime.exec_sync(api::ExecSyncRequest { container_id, cmd: vec!["true".to_owned()], timeout }).await })
}

/// The pod's containers see each other's processes.
fn share_processes(security: Option<&mut api::NamespaceOption>) {
    security.unwrap().pid = api::NamespaceMode::Pod.into();
}

fn shared_pod(node: &Node, name: &str) -> api::PodSandboxConfig {
    let mut config = pod(node, name);
    share_processes(config.linux.as_mut().and_then(|l| l.security_context.as_mut()).and_then(|s| s.namespace_options.as_mut()));
    config
}

fn shared(mut config: api::ContainerConfig) -> api::ContainerConfig {
    share_processes(config.linux.as_mut().and_then(|l| l.security_context.as_mut()).and_then(|s| s.namespace_options.as_mut()));
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_hangs_in_the_kernel_holds_up_nobody_else() {
    let node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "hang");
    let id = node.run_pod(&config).await.unwrap();
    let volume = Volume::make(&node);
    let stuck = node.launch(&id, &config, &volume.container("stuck", "exec sleep 1000")).await;
    let free = node.launch(&id, &config, &shell("free", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done")).await;
    assert_eq!(node.exec(&stuck, "pwd", 10).await.unwrap().1, "/volume/work\n");

    let dead = DeadServer::mount(&volume.work());
    let begun = Instant::now();
    let hanging = exec_true_within(&node, &stuck, 10);
    host::wait_until("a command hangs in the dead file system", waits_for_dead_server);
    let log = node.status(&free).await.unwrap().log_path;
    let lines = || std::fs::read_to_string(&log).unwrap().lines().count();
    let seen = lines();
    for n in 0..5 {
        assert_eq!(node.exec(&free, &format!("echo {n}"), 10).await.unwrap().1, format!("{n}\n"));
    }
    host::wait_until("the log of the other container grows", || lines() > seen + 3);
    assert!(!hanging.is_finished(), "it was to hang");
    let error = hanging.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    assert!(begun.elapsed() < SOON, "the time-out counts while the command is being started: {:?}", begun.elapsed());
    host::wait_until("the command is dead", || !waits_for_dead_server());

    // And with one under way everything can be stopped and removed.
    let hanging = exec_true(&node, &stuck);
    host::wait_until("a second command hangs", waits_for_dead_server);
    let begun = Instant::now();
    node.stop_container(&stuck, 1).await.unwrap();
    assert!(hanging.await.unwrap().is_err());
    node.remove_all_pods().await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    drop(dead);
    volume.unmount();
    node.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_does_not_die_holds_up_nobody_but_its_container() {
    let node = Node::start().await;
    node.pull().await;
    let config = shared_pod(&node, "undying");
    let id = node.run_pod(&config).await.unwrap();
    let volume = Volume::make(&node);
    let stuck = node.launch(&id, &config, &shared(volume.container("stuck", "exec sleep 1000"))).await;
    let free = node.launch(&id, &config, &shared(shell("free", "exec sleep 1000"))).await;
    let dead = DeadServer::mount_reading(&volume.work());
    let hanging = exec_true(&node, &stuck);
    host::wait_until("a command hangs in the dead file system", waits_for_dead_server);

    node.stop_container(&stuck, 1).await.unwrap();
    let removal = {
        let (mut runtime, container_id) = (node.runtime(), stuck.clone());
        tokio::spawn(async move { runtime.remove_container(api::RemoveContainerRequest { container_id }).await })
    };
    let mut answers = 0;
    while !removal.is_finished() {
        let begun = Instant::now();
        assert_eq!(node.exec(&free, "echo here", 10).await.unwrap().1, "here\n");
        assert!(begun.elapsed() < Duration::from_secs(2), "another container waited {:?}", begun.elapsed());
        answers += 1;
    }
    assert!(answers > 1, "the removal was to take a while");
    let refused = removal.await.unwrap().unwrap_err();
    assert!(refused.message().contains("do not die"), "{refused}");
    assert!(waits_for_dead_server(), "it was to hang");
    assert!(hanging.await.unwrap().is_err());
    // Nor does the pod pretend to be gone, and the next attempt finds all that is left.
    let refused = node.stop_pod(&id).await.unwrap_err();
    assert!(refused.message().contains("does not die"), "{refused}");

    drop(dead);
    host::wait_until("the command is dead", || !waits_for_dead_server());
    node.remove_container(&stuck).await.unwrap();
    node.remove_all_pods().await;
    volume.unmount();
    node.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_hangs_in_the_making_does_not_hold_up_the_end_of_its_pod() {
    let node = Node::start().await;
    node.pull().await;
    let volume = Volume::make(&node);
    // First while it is made (its working directory is made then), then at its start (where the program lies).
    for at_start in [false, true] {
        let config = pod(&node, if at_start { "start" } else { "create" });
        let id = node.run_pod(&config).await.unwrap();
        let mut container = volume.container("stuck", "exec sleep 1000");
        let mut created = None;
        if at_start {
            std::fs::write(volume.work().join("program"), "").unwrap();
            container.working_dir = String::new();
            container.command = vec!["/volume/work/program".to_owned()];
            created = Some(node.create(&id, &config, &container).await.unwrap());
        }
        let dead = DeadServer::mount(&volume.work());
        let (mut runtime, pod_sandbox_id, sandbox_config) = (node.runtime(), id.clone(), config.clone());
        let making = tokio::spawn(async move {
            match created {
                Some(container_id) => runtime.start_container(api::StartContainerRequest { container_id }).await.map(drop),
                None => {
                    let request = api::CreateContainerRequest { pod_sandbox_id, config: Some(container), sandbox_config: Some(sandbox_config) };
                    runtime.create_container(request).await.map(drop)
                }
            }
        });
        host::wait_until("a container hangs in the dead file system", waits_for_dead_server);
        let begun = Instant::now();
        node.stop_pod(&id).await.unwrap();
        assert!(begun.elapsed() < SOON, "at start: {at_start}; {:?}", begun.elapsed());
        // One that is killed on the way to its program counts as started, and has ended by that.
        assert!(making.await.unwrap().is_err() || at_start);
        let containers = node.containers().await;
        assert!(containers.iter().all(|c| c.state() == api::ContainerState::ContainerExited) && (containers.len() == 1) == at_start, "{containers:?}");
        host::wait_until("nothing hangs any more", || !waits_for_dead_server());
        node.remove_pod(&id).await.unwrap();
        drop(dead);
    }
    volume.unmount();
    node.finish();
}

/// On v1 a command joins the container's cgroups late: one that hangs before, looking for its user's home, is not found there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_in_the_making_ends_with_its_container_on_v1() {
    host::enter_private_namespaces();
    host::v1_alone();
    let mut node = Node::here("");
    node.start_registry();
    node.start_daemon(&[]);
    node.pull().await;
    let config = shared_pod(&node, "v1");
    let id = node.run_pod(&config).await.unwrap();
    let volume = Volume::make(&node);
    let mut container = shared(volume.container("stuck", "exec sleep 1000"));
    container.working_dir = String::new();
    (container.mounts[0].container_path, container.mounts[0].host_path) = ("/etc".to_owned(), volume.work().to_string_lossy().into_owned());
    let stuck = node.launch(&id, &config, &container).await;
    let dead = DeadServer::mount(&volume.work());
    let hanging = exec_true(&node, &stuck);
    host::wait_until("a command hangs in the dead file system", waits_for_dead_server);
    node.stop_container(&stuck, 1).await.unwrap();
    node.remove_container(&stuck).await.unwrap();
    host::wait_until("the command is dead", || !waits_for_dead_server());
    assert!(hanging.await.unwrap().is_err());
    assert_eq!(node.pod_status(&id).await.unwrap().state(), api::PodSandboxState::SandboxReady);
    node.remove_all_pods().await;
    drop(dead);
    volume.unmount();
    node.finish();
}

/// Whether a process that a shim of this node is making sleeps in FUSE.
fn waits_for_dead_server() -> bool {
    let shims = host::shims();
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        read("stack").contains("fuse_") && parent(&read("stat")).is_some_and(|parent| shims.contains(&parent))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_hangs_is_ended_with_its_pod() {
    let node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "frozen");
    let id = node.run_pod(&config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    let other_config = pod(&node, "other");
    let other = node.run_pod(&other_config).await.unwrap();
    let pid = node.process_of(&container).await.unwrap().0;
    let shim = parent_of(pid);
    kill(Pid::from_raw(shim), Signal::SIGSTOP).unwrap();

    let begun = Instant::now();
    // The first attempt may have to say that the container's processes could not be asked to end; the pod itself must go.
    let stopped = node.stop_pod(&id).await;
    assert!(stopped.is_ok() || node.stop_pod(&id).await.is_ok(), "{:?}", code(stopped));
    node.remove_pod(&id).await.unwrap();
    assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
    for gone in [pid, shim.unsigned_abs()] {
        host::wait_until("process is gone", || !Path::new(&format!("/proc/{gone}")).exists());
    }
    assert_eq!(node.pods().await.len(), 1);
    node.launch(&other, &other_config, &shell("works", "exec sleep 1000")).await;
    node.remove_all_pods().await;
    node.finish();
}

/// Requests larger than a socket's buffer, given up by those who sent them: nobody else's business.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_stalls_for_a_while_loses_nothing() {
    let node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "stalled");
    let id = node.run_pod(&config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "trap 'exit 7' TERM; while :; do sleep 0.05; done")).await;
    let before = node.process_of(&container).await.unwrap();
    let shim = parent_of(before.0);
    kill(Pid::from_raw(shim), Signal::SIGSTOP).unwrap();
    let probes: Vec<_> = (0..4)
        .map(|_| {
            let (mut runtime, container_id) = (node.runtime(), container.clone());
            let mut probe = tonic::Request::new(api::ExecSyncRequest { container_id, cmd: vec!["true".to_owned(), "x".repeat(120_000)], timeout: 1 });
            // A caller that leaves is what cuts a request off.
            probe.set_timeout(Duration::from_secs(4));
            tokio::spawn(async move { runtime.exec_sync(probe).await })
        })
        .collect();
    for probe in probes {
        assert!(probe.await.unwrap().is_err());
    }
    kill(Pid::from_raw(shim), Signal::SIGCONT).unwrap();

    assert_eq!(node.exec(&container, "echo works", 10).await.unwrap().1, "works\n");
    let second = node.launch(&id, &config, &shell("second", "exit 3")).await;
    assert_eq!(node.wait_exit(&second).await.exit_code, 3);
    assert_eq!(node.process_of(&container).await.unwrap(), before, "the container never noticed");
    node.stop_container(&container, 10).await.unwrap();
    assert_eq!(node.wait_exit(&container).await.exit_code, 7);
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_shim_delays_no_time_out_and_ends_the_command_later() {
    let node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "late");
    let id = node.run_pod(&config).await.unwrap();
    let container = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    let shim = parent_of(node.process_of(&container).await.unwrap().0);
    // Lengths of sleep that no other process has.
    let (running, unborn) = (40_000_000 + std::process::id(), 50_000_000 + std::process::id());
    let probe = |length: u32, timeout: i64| {
        let (mut runtime, container_id) = (node.runtime(), container.clone());
        let cmd = vec!["sleep".to_owned(), length.to_string()];
        tokio::spawn(async move { runtime.exec_sync(api::ExecSyncRequest { container_id, cmd, timeout }).await })
    };
    let begun = Instant::now();
    let first = probe(running, 3);
    host::wait_until("the first command runs", || host::has_process(&running.to_string()));
    kill(Pid::from_raw(shim), Signal::SIGSTOP).unwrap();
    let second = probe(unborn, 1);
    for overdue in [first, second] {
        let error = overdue.await.unwrap().unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    assert!(host::has_process(&running.to_string()), "nobody but the shim could have ended it");
    kill(Pid::from_raw(shim), Signal::SIGCONT).unwrap();
    host::wait_until("the first command is gone", || !host::has_process(&running.to_string()));
    host::wait_until("the shim has forgotten both", || host::run("find", &[node.state().to_str().unwrap(), "-name", "exec-*"]).is_empty());
    assert!(!host::has_process(&unborn.to_string()), "the second was to end before it began");
    assert_eq!(node.exec(&container, "echo works", 10).await.unwrap().1, "works\n");
    node.remove_all_pods().await;
    node.finish();
}

fn parent_of(pid: u32) -> i32 {
    parent(&std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap()).unwrap()
}

fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
