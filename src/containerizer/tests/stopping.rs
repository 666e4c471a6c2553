//! Stop semantics (cri-behaviour §7) and what may not wait behind a stop.

use std::time::Instant;

use super::*;
use crate::launcher::ExecSpec;
use crate::model::error::Kind;
use crate::model::resources::Resources;

const HOUR: Duration = Duration::from_secs(3600);

fn spawn_stop(bench: &Bench, id: &ContainerId, grace: Duration) -> tokio::task::JoinHandle<crate::model::Result<()>> {
    let (engine, id) = (bench.engine.clone(), id.clone());
    tokio::spawn(async move { engine.stop_container(id.as_str(), grace).await })
}

fn signals(bench: &Bench) -> Vec<(i32, bool)> {
    bench.world.signals.borrow().iter().map(|(_, signal, all, _)| (*signal, *all)).collect()
}

async fn signalled(bench: &Bench, n: usize) {
    bench.world.signals.subscribe().wait_for(|s| s.len() >= n).await.unwrap();
}

#[tokio::test]
async fn a_polite_container_gets_its_signal_once_and_no_kill() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.engine.stop_container(id.as_str(), HOUR).await.unwrap();
    assert_eq!(bench.exited(&id).await, (143, "Error".to_owned()), "published before the call returns");
    bench.engine.stop_container(id.as_str(), HOUR).await.unwrap();
    assert_eq!(signals(&bench), [(15, false)]);
}

#[tokio::test]
async fn a_created_container_gets_no_signal_and_stays_created() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.created(&pod, "c").await;
    bench.engine.stop_container(id.as_str(), Duration::ZERO).await.unwrap();
    assert!(signals(&bench).is_empty());
    assert!(matches!(bench.container(&id).phase, ContainerPhase::Created { .. }));
}

#[tokio::test]
async fn grace_is_given_and_then_everything_is_killed() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.deafen(&id);
    let start = Instant::now();
    bench.engine.stop_container(id.as_str(), Duration::from_millis(80)).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(80));
    assert_eq!(signals(&bench), [(15, false), (9, true)]);
    assert_eq!(bench.exited(&id).await.0, 137);
}

#[tokio::test]
async fn no_grace_kills_at_once_without_a_signal() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.engine.stop_container(id.as_str(), Duration::ZERO).await.unwrap();
    assert_eq!(signals(&bench), [(9, true)]);
}

#[tokio::test]
async fn a_later_shorter_stop_shortens_the_pending_one_and_all_of_150_return() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.deafen(&id);
    let calls: Vec<_> = (0..150).map(|n| spawn_stop(&bench, &id, HOUR + Duration::from_secs(n))).collect();
    signalled(&bench, 1).await;
    let last = spawn_stop(&bench, &id, Duration::from_millis(30));
    for call in calls.into_iter().chain([last]) {
        tokio::time::timeout(Duration::from_secs(10), call).await.expect("a stop did not return").unwrap().unwrap();
    }
    assert_eq!(signals(&bench), [(15, false), (9, true)], "one signal and one kill for all");
}

#[tokio::test]
async fn a_caller_that_left_escalates_nothing() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.deafen(&id);
    let start = Instant::now();
    let leaves = spawn_stop(&bench, &id, Duration::from_millis(500));
    signalled(&bench, 1).await;
    let stays = spawn_stop(&bench, &id, Duration::from_millis(800));
    leaves.abort();
    stays.await.unwrap().unwrap();
    let (_, signal, _, at) = bench.world.signals.borrow()[1].clone();
    assert_eq!(signal, 9);
    assert!(at.duration_since(start) >= Duration::from_millis(800), "killed at the deadline of the caller that left");
}

#[tokio::test]
async fn nothing_waits_behind_a_pending_stop() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.deafen(&id);
    let pending = spawn_stop(&bench, &id, HOUR);
    signalled(&bench, 1).await;
    bench.engine.reopen_log(id.as_str()).await.unwrap();
    bench.engine.exec_sync(id.as_str(), ExecSpec::default()).await.unwrap();
    bench.engine.update_container(id.as_str(), Resources::default()).await.unwrap();
    let other = bench.running(&pod, "other").await;
    bench.engine.remove_container(other.as_str()).await.unwrap();
    assert!(!pending.is_finished());
    // Removal kills what a stop still waits for, and the stop returns.
    bench.engine.remove_container(id.as_str()).await.unwrap();
    pending.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_hung_signal_holds_up_nobody_else() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.hold("kill_task");
    let pending = spawn_stop(&bench, &id, HOUR);
    bench.world.reached("kill_task", 1).await;
    bench.created(&pod, "other").await;
    bench.engine.reopen_log(id.as_str()).await.unwrap();
    bench.world.open("kill_task");
    pending.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_exit_by_itself_ends_a_pending_stop() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.deafen(&id);
    let pending = spawn_stop(&bench, &id, HOUR);
    signalled(&bench, 1).await;
    bench.world.exit(&id, 0);
    pending.await.unwrap().unwrap();
    assert_eq!(bench.exited(&id).await, (0, "Completed".to_owned()));
    assert_eq!(signals(&bench), [(15, false)]);
}

#[tokio::test]
async fn a_stop_during_a_start_acts_after_it() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.created(&pod, "c").await;
    bench.world.hold("start_task");
    let start = tokio::spawn({
        let (engine, id) = (bench.engine.clone(), id.clone());
        async move { engine.start_container(id.as_str()).await }
    });
    bench.world.reached("start_task", 1).await;
    let stop = spawn_stop(&bench, &id, Duration::ZERO);
    let (engine, key) = (bench.engine.clone(), id.clone());
    let update = tokio::spawn(async move { engine.update_container(key.as_str(), Resources { cpu_shares: Some(7), ..Resources::default() }).await });
    bench.world.open("start_task");
    start.await.unwrap().unwrap();
    stop.await.unwrap().unwrap();
    assert_eq!(bench.exited(&id).await.0, 137);
    // Whether the update came before the kill is open; that it is answered is not.
    let _ = update.await.unwrap();
}

#[tokio::test]
async fn the_end_of_a_pod_waits_for_no_start_and_no_creation_that_hangs() {
    for call in ["start_task", "create_task"] {
        let bench = Bench::new();
        let pod = bench.pod("a").await;
        bench.world.hold(call);
        let making = tokio::spawn({
            let id = if call == "start_task" { Some(bench.created(&pod, "c").await) } else { None };
            let (engine, spec) = (bench.engine.clone(), container_spec("c"));
            let pod = pod.clone();
            async move {
                match id {
                    Some(id) => engine.start_container(id.as_str()).await,
                    None => engine.create_container(pod.as_str(), spec).await.map(drop),
                }
            }
        });
        bench.world.reached(call, 1).await;
        let stop = tokio::spawn({
            let (engine, pod) = (bench.engine.clone(), pod.clone());
            async move { engine.remove_pod(pod.as_str()).await }
        });
        // A creation is given up again and again: the shim may hear of it later.
        bench.world.reached("kill_task", if call == "create_task" { 2 } else { 1 }).await;
        assert!(!making.is_finished() && !stop.is_finished());
        bench.world.open(call);
        let _ = making.await.unwrap();
        stop.await.unwrap().unwrap();
        bench.assert_empty();
    }
}

#[tokio::test]
async fn what_cannot_be_killed_is_an_error_and_can_be_tried_again() {
    let bench = Bench::impatient();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.immortalise(&id);
    let error = bench.engine.stop_container(id.as_str(), Duration::ZERO).await.unwrap_err();
    assert_eq!(error.kind, Kind::DeadlineExceeded);
    assert_eq!(bench.engine.remove_container(id.as_str()).await.unwrap_err().kind, Kind::DeadlineExceeded);
    // The pod's end does not depend on it: the sandbox takes everything along.
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_stop_with_grace_kills_again_after_a_kill_that_failed() {
    let bench = Bench::impatient();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    let grace = Duration::from_millis(20);
    bench.world.immortalise(&id);
    for attempt in 1..=2 {
        assert_eq!(bench.engine.stop_container(id.as_str(), grace).await.unwrap_err().kind, Kind::DeadlineExceeded);
        let kills = signals(&bench).into_iter().filter(|s| *s == (9, true)).count();
        assert_eq!(kills, attempt, "each call that ran out of patience kills");
    }
    bench.world.mortalise(&id);
    bench.engine.stop_container(id.as_str(), grace).await.unwrap();
    assert_eq!(signals(&bench), [(15, false), (9, true), (9, true), (9, true)]);
    assert_eq!(bench.exited(&id).await.0, 137);
}

#[tokio::test]
async fn a_caller_that_left_ends_its_command() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.hold("exec_sync");
    let call = tokio::spawn({
        let (engine, id) = (bench.engine.clone(), id.clone());
        async move { engine.exec_sync(id.as_str(), ExecSpec::default()).await }
    });
    bench.world.reached("exec_sync", 1).await;
    assert!(bench.world.held().iter().any(|t| t.starts_with("exec")));
    call.abort();
    // The launcher hears of it by the end of its own future, not some time later.
    assert!(call.await.unwrap_err().is_cancelled());
    assert!(!bench.world.held().iter().any(|t| t.starts_with("exec")), "the command runs on without a caller");
}

#[tokio::test]
async fn a_removal_whose_caller_left_is_finished_all_the_same() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.hold("cleanup container");
    let call = tokio::spawn({
        let (engine, id) = (bench.engine.clone(), id.clone());
        async move { engine.remove_container(id.as_str()).await }
    });
    bench.world.reached("cleanup container", 1).await;
    call.abort();
    bench.world.open("cleanup container");
    bench.until(|| bench.engine.containers().is_empty().then_some(())).await;
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_signal_that_fails_late_does_not_hide_that_a_kill_has_no_effect() {
    let bench = Bench::impatient();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.immortalise(&id);
    bench.world.hold("kill_task");
    // The stop signal fails, after the kill was sent; that is taken and changes nothing.
    bench.world.fail_nth(Some(0));
    let polite = spawn_stop(&bench, &id, HOUR);
    bench.world.reached("kill_task", 1).await;
    let now = spawn_stop(&bench, &id, Duration::ZERO);
    bench.world.reached("kill_task", 2).await;
    bench.world.open("kill_task");
    for call in [polite, now] {
        call.await.unwrap().unwrap_err();
    }
    tokio::time::timeout(Duration::from_secs(20), bench.engine.remove_pod(pod.as_str())).await.expect("the pod's end waits for a kill").unwrap();
    bench.assert_empty();
}
