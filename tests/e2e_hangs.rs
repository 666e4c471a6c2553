//! End to end: what hangs, hangs alone. A shim that does not answer does not keep its pod, and a command that the kernel keeps does
//! not keep its shim.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::cri::{code, pod, shell};
use common::{Node, host};
use mesocri::wire::cri as api;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

/// Longer than any healthy answer here, shorter than what a hang would take.
const SOON: Duration = Duration::from_secs(20);

/// A file system whose server never answers: whoever looks into it waits until he is killed.
struct DeadServer {
    at: PathBuf,
    _device: File,
}

impl DeadServer {
    fn mount(at: &Path) -> Self {
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        nix::mount::mount(Some("dead"), at, Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Self { at: at.to_owned(), _device: device }
    }
}

impl Drop for DeadServer {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_hangs_in_the_kernel_holds_up_nobody_else() {
    let node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "hang");
    let id = node.run_pod(&config).await.unwrap();
    let volume = node.root().join("volume");
    std::fs::create_dir_all(volume.join("work")).unwrap();
    host::run("mount", &["--bind", volume.to_str().unwrap(), volume.to_str().unwrap()]);
    host::run("mount", &["--make-shared", volume.to_str().unwrap()]);
    let mut stuck = shell("stuck", "exec sleep 1000");
    stuck.working_dir = "/volume/work".to_owned();
    stuck.mounts.push(api::Mount {
        container_path: "/volume".to_owned(),
        host_path: volume.to_string_lossy().into_owned(),
        propagation: api::MountPropagation::PropagationHostToContainer.into(),
        ..Default::default()
    });
    let stuck = node.launch(&id, &config, &stuck).await;
    let free = node.launch(&id, &config, &shell("free", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done")).await;
    assert_eq!(node.exec(&stuck, "pwd", 10).await.unwrap().1, "/volume/work\n");

    let dead = DeadServer::mount(&volume.join("work"));
    let begun = Instant::now();
    let hanging = {
        let (mut runtime, container_id) = (node.runtime(), stuck.clone());
        tokio::spawn(async move { runtime.exec_sync(api::ExecSyncRequest { container_id, cmd: vec!["true".to_owned()], timeout: 2 }).await })
    };
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
    let hanging = {
        let (mut runtime, container_id) = (node.runtime(), stuck.clone());
        tokio::spawn(async move { runtime.exec_sync(api::ExecSyncRequest { container_id, cmd: vec!["true".to_owned()], timeout: 0 }).await })
    };
    host::wait_until("a second command hangs", waits_for_dead_server);
    let begun = Instant::now();
    node.stop_container(&stuck, 1).await.unwrap();
    assert!(hanging.await.unwrap().is_err());
    node.remove_all_pods().await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    drop(dead);
    host::run("umount", &[volume.to_str().unwrap()]);
    node.finish();
}

/// Whether a process that is being made sleeps in FUSE.
fn waits_for_dead_server() -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let stack = std::fs::read_to_string(entry.path().join("stack")).unwrap_or_default();
        stack.contains("fuse_") && std::fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.contains("mesocri") || comm.contains("shim"))
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

fn parent_of(pid: u32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap()
}
