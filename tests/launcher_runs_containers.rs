//! The launcher against the real shim: a pod with a container, from its creation to nothing being left. Needs root.

#![allow(clippy::unwrap_used, missing_docs)] // a test that cannot set itself up has failed

#[path = "common/launch.rs"]
mod common;

use std::time::Duration;

use common::Bench;
use mesocri::cgroups::{Detail, Manager};
use mesocri::launcher::{ExecSpec, Launcher, TaskIo, TaskState};
use mesocri::model::error::Kind;
use mesocri::model::resources::Resources;

fn exec(words: &[&str]) -> ExecSpec {
    ExecSpec { args: words.iter().map(|w| (*w).to_owned()).collect(), output_limit: 1 << 20, ..ExecSpec::default() }
}

#[tokio::test]
async fn a_container_lives_and_dies_and_nothing_is_left() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts", "pid"]).await.unwrap();
    assert_ne!(sandbox.pid, sandbox.shim_pid, "a shared process namespace has a first process of its own");
    let launcher = &bench.launcher;
    let script = "trap 'exit 7' TERM; echo out; echo err >&2; hostname; while :; do sleep 0.05; done";
    let id = bench.create(&sandbox, &["sh", "-c", script], TaskIo::default()).await.unwrap();
    assert!(matches!(launcher.task_state(&bench.pod, &id).await.unwrap(), TaskState::Created { .. }));
    launcher.start_task(&bench.pod, &id).await.unwrap();
    let TaskState::Running { pid } = launcher.task_state(&bench.pod, &id).await.unwrap() else { panic!("not running") };
    bench.log_has(&id, &["stdout F out", "stderr F err", "stdout F mesocri-test"]).await;

    let output = launcher.exec_sync(&bench.pod, &id, &exec(&["sh", "-c", "echo o; echo e >&2; exit 3"])).await.unwrap();
    assert_eq!((output.code, output.stdout.as_slice(), output.stderr.as_slice()), (3, b"o\n".as_slice(), b"e\n".as_slice()));

    launcher.kill_task(&bench.pod, &id, libc::SIGTERM, false).await.unwrap();
    let (code, at) = launcher.wait_task(&bench.pod, &id).await.unwrap();
    assert_eq!(code, 7);
    assert!(at > 0);
    assert_eq!(launcher.task_state(&bench.pod, &id).await.unwrap(), TaskState::Exited { code, at });
    assert_eq!(launcher.wait_task(&bench.pod, &id).await.unwrap(), (code, at), "the status is kept until it is deleted");
    launcher.delete_task(&bench.pod, &id).await.unwrap();
    assert_eq!(launcher.task_state(&bench.pod, &id).await.unwrap(), TaskState::Gone);
    launcher.delete_task(&bench.pod, &id).await.unwrap();
    assert!(!common::alive(pid));

    let waiting = launcher.clone();
    let pod = bench.pod.clone();
    let ended = tokio::spawn(async move { waiting.wait_sandbox(&pod).await });
    launcher.stop_sandbox(&bench.pod).await.unwrap();
    launcher.stop_sandbox(&bench.pod).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), ended).await.unwrap().unwrap();
    launcher.delete_sandbox(&bench.pod, "", Some(&sandbox)).await.unwrap();
    launcher.delete_sandbox(&bench.pod, "", Some(&sandbox)).await.unwrap();
    bench.nothing_is_left(&[sandbox.pid, sandbox.shim_pid, pid]);
}

#[tokio::test]
async fn a_container_that_the_daemon_places_is_like_any_other() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts", "pid"]).await.unwrap();
    let launcher = &bench.launcher;
    let path = format!("{}/placed", bench.cgroup());
    let id = bench.create_in(&sandbox, &["sleep", "1000"], TaskIo::default(), Some(path.clone())).await.unwrap();
    assert!(!Manager::open(&path).unwrap().exists(), "the shim must not make it");
    let TaskState::Created { pid } = launcher.task_state(&bench.pod, &id).await.unwrap() else { panic!("not created") };
    let group = Manager::create(&path).unwrap();
    group.add(pid).unwrap();
    launcher.start_task(&bench.pod, &id).await.unwrap();

    let output = launcher.exec_sync(&bench.pod, &id, &exec(&["sh", "-c", "cat /proc/self/cgroup; sleep 1000 >/dev/null 2>&1 &"])).await.unwrap();
    let groups = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(groups.lines().any(|line| line.ends_with(&path)), "{groups}");
    assert_eq!(group.procs().unwrap().len(), 2, "what an exec left behind");
    let limits = Resources { pids_limit: Some(77), ..Resources::default() };
    launcher.update_task(&bench.pod, &id, &limits).await.unwrap();
    assert_eq!(group.stats(Detail::Full).unwrap().pids_limit, Some(77));

    launcher.kill_task(&bench.pod, &id, libc::SIGKILL, true).await.unwrap();
    assert_eq!(launcher.wait_task(&bench.pod, &id).await.unwrap().0, 137);
    launcher.delete_task(&bench.pod, &id).await.unwrap();
    assert!(!group.exists());
    bench.remove(&sandbox, "").await;
}

#[tokio::test]
async fn execs_are_bounded_in_time_and_output() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts"]).await.unwrap();
    let id = bench.run(&sandbox, &["sleep", "1000"]).await;
    let launcher = &bench.launcher;

    // A tree of processes, one of them in a session of its own, dies with the time-out, and is reaped before the answer.
    let tree = ExecSpec { timeout: Some(Duration::from_millis(300)), ..exec(&["sh", "-c", "sleep 4242 & setsid sleep 4243 & sleep 4244"]) };
    let error = launcher.exec_sync(&bench.pod, &id, &tree).await.unwrap_err();
    assert_eq!(error.kind, Kind::DeadlineExceeded, "{error}");
    let found = launcher.exec_sync(&bench.pod, &id, &exec(&["sh", "-c", "ps | grep -c '[s]leep 424'"])).await.unwrap();
    assert_eq!(found.stdout, b"0\n");

    // A child that keeps the output open does not hold the call.
    let started = std::time::Instant::now();
    let left = launcher.exec_sync(&bench.pod, &id, &exec(&["sh", "-c", "echo before; sleep 30 & echo after"])).await.unwrap();
    assert_eq!(left.stdout, b"before\nafter\n");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());

    let much = ExecSpec { output_limit: 1600, ..exec(&["sh", "-c", "yes | head -c 300000; yes e | head -c 300000 >&2"]) };
    let output = launcher.exec_sync(&bench.pod, &id, &much).await.unwrap();
    assert_eq!((output.code, output.stdout.len() + output.stderr.len()), (0, 1600), "one limit for both");
    assert!(output.stdout.len() >= 100 && output.stderr.len() >= 100, "neither stream takes all");

    let terminal = ExecSpec { terminal: true, ..exec(&["sh", "-c", "tty; echo $TERM"]) };
    let output = launcher.exec_sync(&bench.pod, &id, &terminal).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with("/dev/pts/") && text.contains("xterm"), "{text:?}");

    let missing = launcher.exec_sync(&bench.pod, &id, &exec(&["/no/such/program"])).await.unwrap_err();
    assert!(missing.to_string().contains("/no/such/program"), "{missing}");
    // The names go when the shim has forgotten the last command, for which no call waits.
    let names =
        || std::fs::read_dir(bench.layout.bundle(&bench.pod, &id)).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().contains("exec-")).count();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while names() > 0 {
        assert!(tokio::time::Instant::now() < deadline, "{} names of fifos are left", names());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.remove(&sandbox, "").await;
}

/// Wherever in the call the caller leaves, nothing of the command is left soon after.
#[tokio::test]
async fn an_exec_whose_caller_left_is_killed_and_forgotten() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts"]).await.unwrap();
    let id = bench.run(&sandbox, &["sleep", "1000"]).await;
    let launcher = &bench.launcher;
    let cgroup =
        Manager::open(&mesocri::disk::bundle::read(&bench.layout.bundle(&bench.pod, &id), mesocri::disk::bundle::Of::Task).unwrap().unwrap().cgroup.unwrap())
            .unwrap();
    assert_eq!(cgroup.procs().unwrap().len(), 1);
    let command = exec(&["sh", "-c", "setsid sleep 4242 & sleep 4243"]);
    let mut ran = false;
    for polls in [1, 2, 3, 5, 1000] {
        {
            let call = launcher.exec_sync(&bench.pod, &id, &command);
            let mut call = std::pin::pin!(call);
            // So many steps of the call, or until both run: the shell becomes its last command.
            for _ in 0..polls {
                let step = tokio::time::timeout(Duration::from_millis(2), &mut call);
                assert!(step.await.is_err(), "ended by itself");
                ran = cgroup.procs().unwrap().len() == 3;
                if ran {
                    break;
                }
            }
        }
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while cgroup.procs().unwrap().len() > 1 {
            assert!(tokio::time::Instant::now() < deadline, "after {polls} steps still there: {:?}", cgroup.procs());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    assert!(ran, "the last one was to run");
    bench.remove(&sandbox, "").await;
}

#[tokio::test]
async fn a_lost_shim_is_noticed_and_cleaned_up() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts", "pid"]).await.unwrap();
    let id = bench.run(&sandbox, &["sleep", "1000"]).await;
    let TaskState::Running { pid } = bench.launcher.task_state(&bench.pod, &id).await.unwrap() else { panic!("not running") };
    let (waiting, pod, task) = (bench.launcher.clone(), bench.pod.clone(), id.clone());
    let waiter = tokio::spawn(async move { waiting.wait_task(&pod, &task).await });
    // The wait has reached the shim when a later request is answered.
    bench.launcher.task_state(&bench.pod, &id).await.unwrap();
    common::kill(sandbox.shim_pid);
    let error = tokio::time::timeout(Duration::from_secs(5), waiter).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable, "{error}");
    tokio::time::timeout(Duration::from_secs(5), bench.launcher.wait_sandbox(&bench.pod)).await.unwrap();
    assert!(common::alive(pid), "containers outlive their shim");
    bench.launcher.stop_sandbox(&bench.pod).await.unwrap();
    bench.launcher.delete_task(&bench.pod, &id).await.unwrap();
    bench.launcher.delete_sandbox(&bench.pod, "", Some(&sandbox)).await.unwrap();
    bench.nothing_is_left(&[sandbox.pid, pid]);
}

#[tokio::test]
async fn a_new_daemon_finds_pods_and_their_exits_again() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts"]).await.unwrap();
    let id = bench.run(&sandbox, &["sh", "-c", "read line < /dev/zero; exit 9"]).await;
    let second = bench.second_launcher();
    second.reattach(&bench.pod, "", &sandbox).await.unwrap();
    second.kill_task(&bench.pod, &id, libc::SIGKILL, false).await.unwrap();
    assert_eq!(second.wait_task(&bench.pod, &id).await.unwrap().0, 137);
    let third = bench.second_launcher();
    third.reattach(&bench.pod, "", &sandbox).await.unwrap();
    assert_eq!(third.wait_task(&bench.pod, &id).await.unwrap().0, 137, "told again, to whoever asks");
    third.delete_task(&bench.pod, &id).await.unwrap();
    third.delete_sandbox(&bench.pod, "", Some(&sandbox)).await.unwrap();
    let gone = bench.second_launcher().reattach(&bench.pod, "", &sandbox).await.unwrap_err();
    assert_eq!(gone.kind, Kind::NotFound, "{gone}");
    bench.nothing_is_left(&[sandbox.shim_pid]);
}

#[tokio::test]
async fn logs_rotate_and_flow_fast() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts"]).await.unwrap();
    let script = "while :; do echo tick; sleep 0.02; done";
    let id = bench.run(&sandbox, &["sh", "-c", script]).await;
    bench.log_has(&id, &["stdout F tick"]).await;
    let (log, old) = (bench.log(&id), bench.log(&id).with_extension("old"));
    std::fs::rename(&log, &old).unwrap();
    bench.launcher.reopen_log(&bench.pod, &id).await.unwrap();
    assert!(log.exists(), "the new file exists when the call returns");
    bench.log_has(&id, &["stdout F tick"]).await;
    assert!(std::fs::read_to_string(&old).unwrap().lines().all(|line| line.ends_with("stdout F tick")));

    let flood = bench.run(&sandbox, &["sh", "-c", "yes 0123456789 | head -n 200000; printf end >&2"]).await;
    assert_eq!(bench.launcher.wait_task(&bench.pod, &flood).await.unwrap().0, 0);
    // Complete when the wait returns, no line broken by another.
    let text = std::fs::read_to_string(bench.log(&flood)).unwrap();
    assert_eq!(text.lines().filter(|line| line.ends_with(" stdout F 0123456789")).count(), 200_000);
    assert_eq!(text.lines().filter(|line| line.ends_with(" stderr P end")).count(), 1);
    assert_eq!(text.lines().count(), 200_001);
    bench.remove(&sandbox, "").await;
}

#[tokio::test]
async fn failures_name_the_step_and_leave_nothing() {
    let bench = Bench::new().await;
    let sandbox = bench.sandbox(&["ipc", "uts"]).await.unwrap();
    let id = bench.create(&sandbox, &["/no/such/program"], TaskIo::default()).await.unwrap();
    let error = bench.launcher.start_task(&bench.pod, &id).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/program"), "{error}");
    bench.launcher.delete_task(&bench.pod, &id).await.unwrap();
    // Created and never started.
    let id = bench.create(&sandbox, &["sleep", "1"], TaskIo::default()).await.unwrap();
    let TaskState::Created { pid } = bench.launcher.task_state(&bench.pod, &id).await.unwrap() else { panic!("not created") };
    bench.launcher.delete_task(&bench.pod, &id).await.unwrap();
    assert!(!common::alive(pid));
    assert_eq!(bench.launcher.kill_task(&bench.pod, &id, libc::SIGTERM, false).await.unwrap_err().kind, Kind::NotFound);
    bench.remove(&sandbox, "").await;

    let refused = bench.sandbox_with_sysctl("kernel.core_pattern", "x").await.unwrap_err();
    assert!(refused.to_string().contains("kernel.core_pattern"), "{refused}");
    bench.nothing_is_left(&[]);
}

#[tokio::test]
async fn descriptors_of_the_daemon_reach_neither_shim_nor_container() {
    let bench = Bench::new().await;
    // What a careless library might leave open: it survives execve.
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let leaked = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader))).unwrap();
    let sandbox = bench.sandbox(&["ipc", "uts"]).await.unwrap();
    // One that it closes meanwhile is no concern of ours.
    let open: Vec<_> =
        std::fs::read_dir(format!("/proc/{}/fd", sandbox.shim_pid)).unwrap().flatten().filter_map(|e| std::fs::read_link(e.path()).ok()).collect();
    assert!(open.len() > 3, "{open:?}");
    assert!(!open.contains(&leaked), "{open:?}");
    let id = bench.run(&sandbox, &["sleep", "1000"]).await;
    let listed = bench.launcher.exec_sync(&bench.pod, &id, &exec(&["ls", "/proc/1/fd"])).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "0\n1\n2\n");
    // Of the exec'd process itself: its streams, and the directory that it reads.
    let listed = bench.launcher.exec_sync(&bench.pod, &id, &exec(&["ls", "/proc/self/fd"])).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "0\n1\n2\n3\n");
    bench.remove(&sandbox, "").await;
}
