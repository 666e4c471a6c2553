//! Every call below fails once, at every place: what was acquired is given back, the name is free, a retry works.

use super::*;
use crate::containerizer::EventKind;
use crate::model::error::Kind;
use crate::model::phase::PodPhase;

#[tokio::test]
async fn every_failure_of_making_a_pod_is_undone() {
    let bench = Bench::new();
    for n in 0.. {
        bench.world.fail_nth(Some(n));
        let result = bench.engine.run_pod(pod_spec("a")).await;
        if !bench.world.fail_nth(None) {
            result.unwrap();
            assert!(n >= 2, "only {n} calls were made");
            return;
        }
        let error = result.unwrap_err();
        assert!(error.to_string().contains("on cue"), "{error}");
        bench.assert_empty();
    }
}

#[tokio::test]
async fn every_failure_of_making_a_container_is_undone() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let before = bench.world.held();
    for n in 0.. {
        bench.world.fail_nth(Some(n));
        let result = bench.engine.create_container(pod.as_str(), container_spec("c")).await;
        if !bench.world.fail_nth(None) {
            result.unwrap();
            assert!(n >= 4, "only {n} calls were made");
            return;
        }
        let error = result.unwrap_err();
        assert!(error.to_string().contains("on cue"), "{error}");
        assert_eq!(bench.world.held(), before, "call {n}: {:?}", bench.world.calls().last());
        assert!(bench.engine.containers().is_empty());
        assert_eq!(std::fs::read_dir(bench.layout.containers(&pod)).into_iter().flatten().count(), 0);
    }
}

#[tokio::test]
async fn every_failure_of_stopping_and_removing_is_an_error_and_a_retry_finishes() {
    for n in 0.. {
        let bench = Bench::new();
        let pod = bench.pod("a").await;
        bench.running(&pod, "c").await;
        bench.created(&pod, "d").await;
        bench.world.fail_nth(Some(n));
        let stopped = bench.engine.stop_pod(pod.as_str()).await;
        let removed = bench.engine.remove_pod(pod.as_str()).await;
        let used = bench.world.fail_nth(None);
        if !used {
            assert!(n >= 7, "only {n} calls were made");
            stopped.unwrap();
            removed.unwrap();
        }
        for _ in 0..2 {
            bench.engine.stop_pod(pod.as_str()).await.unwrap();
            bench.engine.remove_pod(pod.as_str()).await.unwrap();
        }
        bench.assert_empty();
        if !used {
            return;
        }
    }
}

#[tokio::test]
async fn an_undo_that_fails_leaves_a_pod_that_stop_and_remove_can_finish() {
    let bench = Bench::new();
    bench.world.fail("create_sandbox", Kind::Internal);
    bench.world.fail("cleanup pod", Kind::Internal);
    let error = bench.engine.run_pod(pod_spec("a")).await.unwrap_err();
    assert!(error.to_string().contains("create_sandbox fails on cue"), "the first failure is the one to report: {error}");
    let pods = bench.engine.pods();
    assert_eq!(pods.len(), 1);
    assert_eq!(pods[0].phase, PodPhase::NotReady);
    assert!(pods[0].leftovers[0].contains("clean up isolators: recorder: cleanup pod fails on cue"), "{:?}", pods[0].leftovers);
    let left = pods[0].id.clone();

    bench.world.heal("create_sandbox");
    let next = bench.pod("a").await;
    assert_ne!(next, left, "the failed attempt has freed the name");
    assert!(bench.engine.stop_pod(left.as_str()).await.is_err());
    bench.world.heal("cleanup pod");
    bench.engine.stop_pod(left.as_str()).await.unwrap();
    bench.engine.remove_pod(left.as_str()).await.unwrap();
    bench.engine.remove_pod(next.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn an_undo_that_fails_leaves_a_container_that_remove_can_finish() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    bench.world.fail("isolate", Kind::ResourceExhausted);
    bench.world.fail("delete_task", Kind::Internal);
    let error = bench.engine.create_container(pod.as_str(), container_spec("c")).await.unwrap_err();
    assert_eq!(error.kind, Kind::ResourceExhausted);
    let left = bench.engine.containers();
    assert_eq!(left.len(), 1);
    assert!(left[0].message.contains("delete task"), "{}", left[0].message);
    assert!(bench.engine.remove_container(left[0].id.as_str()).await.is_err());
    bench.world.heal("isolate");
    bench.world.heal("delete_task");
    bench.engine.remove_container(left[0].id.as_str()).await.unwrap();
    bench.created(&pod, "c").await;
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_disk_that_takes_no_record_makes_nothing() {
    let bench = Bench::new();
    std::fs::create_dir_all(&bench.layout.root).unwrap();
    std::fs::write(bench.layout.pods(), "in the way").unwrap();
    bench.engine.run_pod(pod_spec("a")).await.unwrap_err();
    assert!(bench.world.calls().is_empty(), "nothing is acquired without a record");
    std::fs::remove_file(bench.layout.pods()).unwrap();
    let pod = bench.pod("a").await;
    let listed: Vec<_> = bench.engine.pods().iter().map(|p| p.id.clone()).filter(|id| *id != pod).collect();
    for id in listed {
        bench.engine.remove_pod(id.as_str()).await.unwrap();
    }
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_failed_start_ends_the_container_with_128() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.created(&pod, "c").await;
    let mut events = bench.engine.events();
    bench.world.fail("start_task", Kind::NotFound);
    let error = bench.engine.start_container(id.as_str()).await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound);
    assert_eq!(bench.exited(&id).await, (128, "StartError".to_owned()));
    let ContainerPhase::Exited { started_at: 0, ref exit } = bench.container(&id).phase else { panic!("not exited, or with a start time") };
    assert!(exit.at > 0 && exit.message.contains("on cue"));
    assert_eq!(events.try_recv().unwrap().kind, EventKind::Stopped);
    assert!(!bench.world.held().iter().any(|t| t.starts_with("task")), "its task is gone");
    assert_eq!(bench.engine.start_container(id.as_str()).await.unwrap_err().kind, Kind::FailedPrecondition);
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_creation_that_answers_too_late_is_undone() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let before = bench.world.held();
    bench.world.fail_late("create_task", Kind::DeadlineExceeded);
    let error = bench.engine.create_container(pod.as_str(), container_spec("c")).await.unwrap_err();
    assert_eq!(error.kind, Kind::DeadlineExceeded);
    assert_eq!(bench.world.held(), before, "the task that was made after all is deleted");
    bench.world.heal("create_task");
    bench.created(&pod, "c").await;
}

#[tokio::test]
async fn a_start_that_answers_too_late_is_taken_back() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.created(&pod, "c").await;
    bench.world.fail_late("start_task", Kind::DeadlineExceeded);
    assert_eq!(bench.engine.start_container(id.as_str()).await.unwrap_err().kind, Kind::DeadlineExceeded);
    assert_eq!(bench.exited(&id).await, (128, "StartError".to_owned()));
    assert!(!bench.world.held().iter().any(|t| t.starts_with("task")), "it does not run on");
}

#[tokio::test]
async fn what_started_too_late_and_cannot_be_ended_is_shown_running() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.created(&pod, "c").await;
    bench.world.fail_late("start_task", Kind::DeadlineExceeded);
    bench.world.fail("delete_task", Kind::Internal);
    bench.engine.start_container(id.as_str()).await.unwrap_err();
    assert!(matches!(bench.container(&id).phase, ContainerPhase::Running { .. }), "{:?}", bench.container(&id).phase);
    bench.world.heal("delete_task");
    bench.world.exit(&id, 3);
    assert_eq!(bench.exited(&id).await, (3, "Error".to_owned()), "its exit is watched");
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_start_of_which_nobody_knows_the_outcome_is_unknown_until_somebody_does() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.created(&pod, "c").await;
    bench.world.fail_late("start_task", Kind::DeadlineExceeded);
    for call in ["delete_task", "task_state"] {
        bench.world.fail(call, Kind::DeadlineExceeded);
    }
    bench.engine.start_container(id.as_str()).await.unwrap_err();
    assert!(matches!(bench.container(&id).phase, ContainerPhase::Unknown { .. }), "{:?}", bench.container(&id).phase);
    bench.world.reached("task_state", 3).await;
    assert!(matches!(bench.container(&id).phase, ContainerPhase::Unknown { .. }));
    for call in ["delete_task", "task_state"] {
        bench.world.heal(call);
    }
    assert_eq!(bench.exited(&id).await, (128, "StartError".to_owned()));
    assert!(!bench.world.held().iter().any(|t| t.starts_with("task")));
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_panic_below_is_an_error_and_is_undone() {
    let bench = Bench::new();
    bench.world.panic_at("create_sandbox");
    assert_eq!(bench.engine.run_pod(pod_spec("a")).await.unwrap_err().kind, Kind::Internal);
    bench.until(|| bench.world.held().is_empty().then_some(())).await;
    let pod = bench.pod("a").await;
    let before = bench.world.held();
    bench.world.panic_at("create_task");
    assert_eq!(bench.engine.create_container(pod.as_str(), container_spec("c")).await.unwrap_err().kind, Kind::Internal);
    bench.until(|| (bench.world.held() == before).then_some(())).await;
    bench.created(&pod, "c").await;
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    assert!(bench.world.held().is_empty());
}

#[tokio::test]
async fn a_shim_that_dies_ends_its_containers_and_the_pod() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let running = bench.running(&pod, "running").await;
    let created = bench.created(&pod, "created").await;
    bench.world.kill_shim(&pod);
    assert_eq!(bench.exited(&running).await, (255, "ShimLost".to_owned()));
    assert_eq!(bench.exited(&created).await, (255, "ShimLost".to_owned()));
    bench.until(|| (bench.engine.pod(pod.as_str()).unwrap().phase == PodPhase::NotReady).then_some(())).await;
    assert_eq!(bench.engine.create_container(pod.as_str(), container_spec("x")).await.unwrap_err().kind, Kind::FailedPrecondition);
    assert_ne!(bench.pod("a").await, pod, "its name is free");
    bench.engine.stop_pod(pod.as_str()).await.unwrap();
    assert!(!bench.world.held().iter().any(|t| t.contains(pod.as_str())), "stopping gives back the network of a pod that died");
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    assert_eq!(bench.engine.pods().len(), 1);
}

#[tokio::test]
async fn a_shim_that_cannot_say_how_a_container_ended_while_it_runs_costs_it_nothing() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    for kind in [Kind::Internal, Kind::DeadlineExceeded] {
        bench.world.fail_late("wait_task", kind);
        let id = bench.running(&pod, &format!("{kind:?}")).await;
        let (asked, deleted) = (bench.world.count("task_state"), bench.world.count("delete_task"));
        bench.world.reached("task_state", asked + 5).await;
        bench.world.fail("task_state", kind);
        bench.world.reached("task_state", asked + 6).await;
        assert!(matches!(bench.container(&id).phase, ContainerPhase::Running { .. }), "{:?}", bench.container(&id).phase);
        assert_eq!(bench.world.count("delete_task"), deleted);
        for call in ["wait_task", "task_state"] {
            bench.world.heal(call);
        }
        bench.world.exit(&id, 42);
        assert_eq!(bench.exited(&id).await.0, 42);
        bench.engine.remove_container(id.as_str()).await.unwrap();
    }
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_hung_shim_does_not_stop_the_pod_from_being_removed() {
    let bench = Bench::impatient();
    let pod = bench.pod("a").await;
    bench.running(&pod, "c").await;
    for call in ["kill_task", "task_state", "stop_sandbox"] {
        bench.world.hold(call);
    }
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn creations_queued_behind_a_slow_one_are_refused_when_the_pod_is_stopped() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    bench.world.hold("provision");
    let call = |name: &'static str| {
        let (engine, pod) = (bench.engine.clone(), pod.clone());
        tokio::spawn(async move { engine.create_container(pod.as_str(), container_spec(name)).await })
    };
    let slow = call("slow");
    bench.world.reached("provision", 1).await;
    let queued = call("queued");
    let stop = tokio::spawn({
        let (engine, pod) = (bench.engine.clone(), pod.clone());
        async move { engine.stop_pod(pod.as_str()).await }
    });
    assert_eq!(queued.await.unwrap().unwrap_err().kind, Kind::FailedPrecondition);
    bench.world.open("provision");
    let made = slow.await.unwrap().unwrap();
    stop.await.unwrap().unwrap();
    assert_eq!(bench.exited(&made).await.0, 128);
    assert_eq!(bench.world.count("provision"), 1);
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn a_container_that_is_made_while_its_sandbox_ends_is_reported_ended() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    bench.world.hold("isolate");
    let (engine, in_pod) = (bench.engine.clone(), pod.clone());
    let making = tokio::spawn(async move { engine.create_container(in_pod.as_str(), container_spec("c")).await });
    bench.world.reached("isolate", 1).await;
    bench.world.kill_shim(&pod);
    bench.until(|| (bench.engine.pod(pod.as_str()).unwrap().phase == PodPhase::NotReady).then_some(())).await;
    bench.world.open("isolate");
    let id = making.await.unwrap().unwrap();
    assert_eq!(bench.exited(&id).await, (255, "ShimLost".to_owned()));
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}
