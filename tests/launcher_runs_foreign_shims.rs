//! Pods whose runtime handler is not ours: containerd's shim for runc, with runc and with crun. Needs root and Debian's packages
//! `containerd`, `runc` and `crun`.

#![allow(clippy::unwrap_used, missing_docs)] // a test that cannot set itself up has failed

#[path = "common/launch.rs"]
mod common;

use std::path::{Path, PathBuf};

use common::Bench;
use mesocri::launcher::config::Handler;
use mesocri::launcher::{ExecSpec, Launcher, TaskIo, TaskState};
use mesocri::model::resources::Resources;

/// crun refuses a hybrid host whose v2 hierarchy has a controller. In a mount namespace of the test's own it sees a v1 host: a
/// fresh directory with the v1 hierarchies alone (crun makes plain directories for controllers that it misses; they go with it).
fn show_crun_v1_alone() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_bind_recursive, mount_change};
    let host = Path::new("/sys/fs/cgroup");
    if !host.join("unified").exists() {
        return;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let fresh = tempfile::tempdir().unwrap();
    mount("tmpfs", fresh.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    for hierarchy in std::fs::read_dir(host).unwrap().flatten() {
        let name = hierarchy.file_name();
        if name != "unified" && hierarchy.file_type().unwrap().is_dir() {
            std::fs::create_dir(fresh.path().join(&name)).unwrap();
            mount_bind(hierarchy.path(), fresh.path().join(&name)).unwrap();
        }
    }
    mount_bind_recursive(fresh.path(), host).unwrap();
    rustix::mount::unmount(fresh.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
}

async fn bench(name: &'static str, scratch: &Path) -> Bench {
    Bench::with(|config| {
        let mut options = toml::Table::new();
        options.insert("BinaryName".to_owned(), name.into());
        options.insert("Root".to_owned(), scratch.join("runtime").to_string_lossy().into_owned().into());
        config.handlers.insert(name.to_owned(), Handler { runtime: "io.containerd.runc.v2".to_owned(), options });
        config.pause = Some(static_pause(scratch));
        config.pause_args = vec!["sleep".to_owned(), "1000000".to_owned()];
    })
    .await
}

/// A program that waits and needs no library: compiled here, because the test build of `mesocri-init` is linked dynamically.
fn static_pause(dir: &Path) -> PathBuf {
    let (source, program) = (dir.join("pause.c"), dir.join("pause"));
    std::fs::write(&source, "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n").unwrap();
    assert!(std::process::Command::new("cc").arg("-static").arg("-o").arg(&program).arg(&source).status().unwrap().success());
    program
}

async fn a_pod_lives(name: &'static str) {
    let scratch = tempfile::tempdir().unwrap();
    let bench = bench(name, scratch.path()).await;
    assert_eq!(bench.launcher.handlers(), ["mesocri", name]);
    let plan = bench.sandbox_plan(&["ipc", "uts", "pid"]);
    let sandbox = bench.launcher.create_sandbox(&bench.pod, name, &plan).await.unwrap();
    assert_eq!(sandbox.namespaces["ipc"], PathBuf::from(format!("/proc/{}/ns/ipc", sandbox.pid)));
    let script = "trap 'exit 6' TERM; echo out; echo err >&2; hostname; while :; do sleep 0.05; done";
    let id = bench.create(&sandbox, &["sh", "-c", script], TaskIo::default()).await.unwrap();
    bench.launcher.start_task(&bench.pod, &id).await.unwrap();
    bench.log_has(&id, &["stdout F out", "stderr F err", "stdout F mesocri-test"]).await;
    let words = ["sh", "-c", "echo o; echo e >&2; exit 3"].map(str::to_owned).to_vec();
    let exec = ExecSpec { args: words, output_limit: 100, ..ExecSpec::default() };
    let output = bench.launcher.exec_sync(&bench.pod, &id, &exec).await.unwrap();
    assert_eq!((output.code, output.stdout.as_slice(), output.stderr.as_slice()), (3, b"o\n".as_slice(), b"e\n".as_slice()));
    let limits = Resources { pids_limit: Some(50), ..Resources::default() };
    bench.launcher.update_task(&bench.pod, &id, &limits).await.unwrap();

    // A new daemon finds it, and the log goes on.
    let second = bench.second_launcher();
    second.reattach(&bench.pod, name, &sandbox).await.unwrap();
    assert!(matches!(second.task_state(&bench.pod, &id).await.unwrap(), TaskState::Running { .. }));
    second.kill_task(&bench.pod, &id, libc::SIGTERM, false).await.unwrap();
    assert_eq!(second.wait_task(&bench.pod, &id).await.unwrap().0, 6);
    second.kill_task(&bench.pod, &id, libc::SIGTERM, false).await.unwrap();
    second.delete_task(&bench.pod, &id).await.unwrap();
    second.stop_sandbox(&bench.pod).await.unwrap();
    second.wait_sandbox(&bench.pod).await;
    second.delete_sandbox(&bench.pod, name, Some(&sandbox)).await.unwrap();
    bench.nothing_is_left(&[sandbox.pid, sandbox.shim_pid]);
}

#[tokio::test]
async fn pods_run_on_runc() {
    a_pod_lives("runc").await;
}

#[tokio::test]
async fn pods_run_on_crun() {
    show_crun_v1_alone();
    a_pod_lives("crun").await;
}
