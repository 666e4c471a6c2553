//! Pods whose runtime handler is not ours: containerd's shim for runc, with runc and with crun. Needs root and Debian's packages
//! `containerd`, `runc` and `crun`.

#![allow(clippy::unwrap_used, missing_docs)] // a test that cannot set itself up has failed

#[path = "common/launch.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::Bench;
use mesocri::disk::bundle::{Made, Of, Recorded};
use mesocri::launcher::config::Handler;
use mesocri::launcher::{ExecSpec, Launcher, Sandbox, TaskIo, TaskState};
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

/// What a crash leaves in the middle of a creation or a removal, a damaged record, and a log that cannot be opened.
#[tokio::test]
async fn a_bad_log_costs_itself_and_no_pod() {
    let scratch = tempfile::tempdir().unwrap();
    let mut bench = bench("runc", scratch.path()).await;
    let sandbox = bench.launcher.create_sandbox(&bench.pod, "runc", &bench.sandbox_plan(&["ipc", "uts", "pid"])).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(bench.run(&sandbox, &["sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"]).await);
    }
    for id in &ids {
        bench.log_has(id, &["stdout F 3"]).await;
    }
    let [no_fifo, damaged, no_log, well] = &ids[..] else { unreachable!() };
    std::fs::remove_file(bench.layout.bundle(&bench.pod, no_fifo).join("stdout")).unwrap();
    std::fs::write(bench.layout.bundle(&bench.pod, damaged).join("io.json"), "{").unwrap();
    std::fs::rename(bench.log(no_log), bench.log(no_log).with_extension("old")).unwrap();
    std::fs::create_dir(bench.log(no_log)).unwrap();

    // The first daemon ends, and with it all that reads for it.
    bench.launcher = bench.second_launcher();
    bench.launcher.reattach(&bench.pod, "runc", &sandbox).await.unwrap();
    for id in &ids {
        assert!(matches!(bench.launcher.task_state(&bench.pod, id).await.unwrap(), TaskState::Running { .. }), "{id}");
    }
    let numbers = |path: &Path| -> Vec<u64> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
    };
    let seen = numbers(&bench.log(well)).len();
    bench.log_has(well, &[&format!("stdout F {}", seen + 20)]).await;
    let logged = numbers(&bench.log(well));
    assert!(logged.iter().zip(1..).all(|(a, b)| *a == b), "the log of the other container has a hole or is torn: {logged:?}");
    let no_fifo_lines = numbers(&bench.log(no_fifo)).len();
    std::fs::remove_dir(bench.log(no_log)).unwrap();
    bench.log_has(no_log, &["0"]).await;
    bench.launcher.reopen_log(&bench.pod, no_log).await.unwrap();

    // Launchers that go take their descriptors along.
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for _ in 0..10 {
        bench.second_launcher().reattach(&bench.pod, "runc", &sandbox).await.unwrap();
    }
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while descriptors() > before {
        assert!(tokio::time::Instant::now() < deadline, "{before} descriptors became {}", descriptors());
        tokio::task::yield_now().await;
    }
    assert_eq!(numbers(&bench.log(no_fifo)).len(), no_fifo_lines, "nobody can read it any more");
    bench.remove(&sandbox, "runc").await;
}

/// The containerizer's patience with the deletion of a sandbox.
const PATIENCE: Duration = Duration::from_secs(10);

fn hang(pid: u32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::Signal::SIGSTOP).unwrap();
}

/// Neither the runtime's own state nor a process or file of ours.
fn nothing_is_left(bench: &Bench, sandbox: &Sandbox, scratch: &Path) {
    bench.nothing_is_left(&[sandbox.pid, sandbox.shim_pid]);
    let states: Vec<_> = std::fs::read_dir(scratch.join("runtime/mesocri")).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    assert!(states.is_empty(), "the runtime still knows {states:?}");
}

/// A pod under runc with a container that has ended, and with `running` one that has not.
async fn pod_of(bench: &Bench, running: bool) -> Sandbox {
    let sandbox = bench.launcher.create_sandbox(&bench.pod, "runc", &bench.sandbox_plan(&["ipc", "uts", "pid"])).await.unwrap();
    let ended = bench.run(&sandbox, &["sh", "-c", "exit 4"]).await;
    assert_eq!(bench.launcher.wait_task(&bench.pod, &ended).await.unwrap().0, 4);
    bench.launcher.delete_task(&bench.pod, &ended).await.unwrap();
    if running {
        bench.run(&sandbox, &["sleep", "1000"]).await;
    }
    sandbox
}

async fn a_hung_shim_ends_with_its_pod(running: bool, restart: bool) {
    let scratch = tempfile::tempdir().unwrap();
    let mut bench = bench("runc", scratch.path()).await;
    let sandbox = pod_of(&bench, running).await;
    hang(sandbox.shim_pid);
    if restart {
        bench.launcher = bench.second_launcher();
    }
    let deleting = bench.launcher.delete_sandbox(&bench.pod, "runc", Some(&sandbox));
    tokio::time::timeout(PATIENCE, deleting).await.expect("within the containerizer's patience").unwrap();
    nothing_is_left(&bench, &sandbox, scratch.path());
}

#[tokio::test]
async fn a_hung_shim_without_containers_ends_with_its_pod() {
    a_hung_shim_ends_with_its_pod(false, false).await;
}

#[tokio::test]
async fn a_hung_shim_ends_with_its_pod_and_containers() {
    a_hung_shim_ends_with_its_pod(true, false).await;
}

#[tokio::test]
async fn a_hung_shim_ends_with_its_pod_after_a_restart() {
    a_hung_shim_ends_with_its_pod(false, true).await;
    a_hung_shim_ends_with_its_pod(true, true).await;
}

/// The configuration has lost the handler; with a damaged record the pod's name for it is lost too.
#[tokio::test]
async fn a_pod_whose_handler_is_gone_can_be_found_and_removed() {
    for (handler, hung) in [("runc", false), ("runc", true), ("", false), ("", true)] {
        let scratch = tempfile::tempdir().unwrap();
        let mut bench = bench("runc", scratch.path()).await;
        let sandbox = pod_of(&bench, true).await;
        bench.config.handlers.clear();
        bench.launcher = bench.second_launcher();
        assert_eq!(bench.launcher.handlers(), ["mesocri"]);
        if hung {
            hang(sandbox.shim_pid);
        } else if !handler.is_empty() {
            bench.launcher.reattach(&bench.pod, handler, &sandbox).await.unwrap();
            bench.launcher.stop_sandbox(&bench.pod).await.unwrap();
        }
        let recorded = (!handler.is_empty()).then_some(&sandbox);
        let deleting = bench.launcher.delete_sandbox(&bench.pod, handler, recorded);
        tokio::time::timeout(PATIENCE, deleting).await.expect("within the containerizer's patience").unwrap();
        nothing_is_left(&bench, &sandbox, scratch.path());
    }
}

/// A number that the kernel gave to somebody else meanwhile.
#[tokio::test]
async fn a_process_that_is_not_the_shim_any_more_is_left_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let mut bench = bench("runc", scratch.path()).await;
    let sandbox = pod_of(&bench, true).await;
    common::kill(sandbox.shim_pid);
    let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let mut process = Recorded::of(other.id()).unwrap();
    process.start_time -= 1;
    let record = Made { process: Some(process), cgroup: None };
    mesocri::disk::bundle::write(&bench.layout.sandbox_bundle(&bench.pod), Of::Shim, &record).unwrap();
    bench.launcher = bench.second_launcher();
    bench.launcher.delete_sandbox(&bench.pod, "runc", Some(&sandbox)).await.unwrap();
    let spared = common::alive(other.id());
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(spared, "it was killed in the shim's place");
    nothing_is_left(&bench, &sandbox, scratch.path());
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
