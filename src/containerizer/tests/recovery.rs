//! Crash and restart: a runtime with the old daemon is dropped, a new daemon starts in the same world.

use std::future::Future;

use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::containerizer::Pod;
use crate::disk::{pods, record};
use crate::model::error::Kind;
use crate::model::phase::PodPhase;
use crate::model::resources::Resources;

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Lives one life of a daemon and lets it crash.
fn life<T>(work: impl Future<Output = T>) -> T {
    runtime().block_on(work)
}

#[test]
fn living_pods_go_on_as_if_nothing_had_happened() {
    let old = Bench::new();
    let (pod, running, created, exited) = life(async {
        let pod = old.pod("a").await;
        let (running, created, exited) = (old.running(&pod, "running").await, old.created(&pod, "created").await, old.running(&pod, "exited").await);
        old.world.exit(&exited, 7);
        old.exited(&exited).await;
        (pod, running, created, exited)
    });
    let before: Vec<_> = [&running, &created, &exited].map(|id| old.container(id)).into();
    let bench = old.restarted();
    life(async {
        assert!(!bench.engine.ready());
        bench.engine.recover().await.unwrap();
        assert!(bench.engine.ready());
        assert_eq!(bench.world.count("network.recover"), 1);
        assert_eq!(bench.engine.pod(pod.as_str()).unwrap().network, Some(fake::network_of(&pod)), "the whole of it, in the record too");
        assert_eq!(bench.engine.pod(pod.as_str()).unwrap(), old.engine.pod(pod.as_str()).unwrap());
        for container in before {
            assert_eq!(bench.container(&container.id), container);
        }
        // Same names, same ids; later creation times; watches on; everything still possible.
        assert_eq!(bench.pod("a").await, pod);
        assert_eq!(bench.created(&pod, "running").await, running);
        let next = bench.pod("b").await;
        assert!(bench.engine.pod(next.as_str()).unwrap().created_at > bench.container(&exited).created_at);
        bench.engine.start_container(created.as_str()).await.unwrap();
        bench.engine.update_container(running.as_str(), Resources { cpu_shares: Some(3), ..Resources::default() }).await.unwrap();
        bench.world.exit(&running, 4);
        assert_eq!(bench.exited(&running).await, (4, "Error".to_owned()));
        bench.engine.remove_pod(pod.as_str()).await.unwrap();
        bench.engine.remove_pod(next.as_str()).await.unwrap();
        bench.assert_empty();
    });
}

#[test]
fn exits_that_nobody_saw_are_reported_with_their_code() {
    let old = Bench::new();
    let (pod, id, oom) = life(async {
        let pod = old.pod("a").await;
        let (id, gone) = (old.running(&pod, "c").await, old.running(&pod, "gone").await);
        (pod, id, gone)
    });
    old.world.exit(&id, 9);
    old.world.forget(&oom);
    let bench = old.restarted();
    life(async {
        bench.engine.recover().await.unwrap();
        assert_eq!(bench.exited(&id).await, (9, "Error".to_owned()));
        assert_eq!(bench.exited(&oom).await, (255, "ShimLost".to_owned()));
        assert_eq!(bench.engine.pod(pod.as_str()).unwrap().phase, PodPhase::Ready);
        let recorded: Container = record::read(&bench.layout.container_record(&pod, &id)).unwrap();
        assert_eq!(recorded, *bench.container(&id));
    });
}

#[test]
fn an_exit_that_cannot_be_recorded_stays_with_the_shim() {
    let old = Bench::new();
    let (pod, id) = life(async {
        let pod = old.pod("a").await;
        let id = old.running(&pod, "c").await;
        (pod, id)
    });
    old.world.exit(&id, 9);
    // What a record is written to before it takes the old one's place.
    let record = old.layout.container_record(&pod, &id);
    let temporary = record.with_file_name(format!(".{}.new", record.file_name().unwrap().display()));
    std::fs::create_dir(&temporary).unwrap();
    let full = old.restarted();
    life(async {
        full.engine.recover().await.unwrap();
        assert_eq!(full.exited(&id).await, (9, "Error".to_owned()));
    });
    std::fs::remove_dir(&temporary).unwrap();
    let bench = full.restarted();
    life(async {
        bench.engine.recover().await.unwrap();
        assert_eq!(bench.exited(&id).await, (9, "Error".to_owned()), "known to the shim alone, which must have kept it");
        bench.engine.remove_pod(pod.as_str()).await.unwrap();
        bench.assert_empty();
    });
}

#[test]
fn why_a_start_failed_outlives_a_crash_after_its_task_was_deleted() {
    let old = Bench::new();
    let id = life(async {
        let pod = old.pod("a").await;
        let id = old.created(&pod, "c").await;
        old.world.fail("start_task", Kind::Internal);
        old.world.hold("delete_task");
        let call = tokio::spawn({
            let (engine, id) = (old.engine.clone(), id.clone());
            async move { engine.start_container(id.as_str()).await }
        });
        old.world.reached("delete_task", 1).await;
        call.abort();
        id
    });
    // The deletion was on its way to the shim when the daemon died.
    old.world.forget(&id);
    old.world.heal("start_task");
    old.world.open("delete_task");
    let bench = old.restarted();
    life(async {
        bench.engine.recover().await.unwrap();
        assert_eq!(bench.exited(&id).await, (128, "StartError".to_owned()));
        assert!(bench.container(&id).message.contains("start_task fails on cue"), "{}", bench.container(&id).message);
    });
}

#[test]
fn a_crash_in_the_middle_of_a_start_is_decided_by_the_shim() {
    for (reaches_shim, expected) in [(false, "created"), (true, "running")] {
        let old = Bench::new();
        let (pod, id) = life(async {
            let pod = old.pod("a").await;
            let id = old.created(&pod, "c").await;
            old.world.hold("start_task");
            let call = tokio::spawn({
                let (engine, id) = (old.engine.clone(), id.clone());
                async move { engine.start_container(id.as_str()).await }
            });
            old.world.reached("start_task", 1).await;
            if reaches_shim {
                // The shim did start it, but nobody was left to hear so.
                old.world.open("start_task");
                call.await.unwrap().unwrap();
            }
            (pod, id)
        });
        old.world.open("start_task");
        let bench = old.restarted();
        life(async {
            bench.engine.recover().await.unwrap();
            let phase = bench.container(&id).phase.clone();
            assert_eq!(matches!(phase, ContainerPhase::Created { .. }), expected == "created", "{phase:?}");
            assert_eq!(matches!(phase, ContainerPhase::Running { .. }), expected == "running", "{phase:?}");
            let recorded: Container = record::read(&bench.layout.container_record(&pod, &id)).unwrap();
            assert_eq!(recorded.phase, phase);
            bench.engine.remove_pod(pod.as_str()).await.unwrap();
            bench.assert_empty();
        });
    }
}

#[test]
fn dead_shims_and_reboots_leave_pods_that_can_be_removed() {
    for reboot in [false, true] {
        let old = Bench::new();
        let (pod, running, created) = life(async {
            let pod = old.pod("a").await;
            let (running, created) = (old.running(&pod, "running").await, old.created(&pod, "created").await);
            (pod, running, created)
        });
        if reboot {
            old.world.reboot();
            std::fs::remove_dir_all(&old.layout.state).unwrap();
        } else {
            old.world.kill_shim(&pod);
        }
        let bench = old.restarted();
        life(async {
            bench.engine.recover().await.unwrap();
            assert_eq!(bench.engine.pod(pod.as_str()).unwrap().phase, PodPhase::NotReady);
            assert_eq!(bench.exited(&running).await, (255, "ShimLost".to_owned()));
            assert_eq!(bench.exited(&created).await, (255, "ShimLost".to_owned()));
            assert!(!bench.world.held().iter().any(|t| t.starts_with("task") || t.starts_with("sandbox")), "{:?}", bench.world.held());
            bench.engine.stop_pod(pod.as_str()).await.unwrap();
            bench.engine.remove_pod(pod.as_str()).await.unwrap();
            bench.assert_empty();
        });
    }
}

#[test]
fn half_made_pods_and_containers_are_undone_wherever_the_crash_came() {
    for step in ["start_shim", "prepare pod", "create_sandbox", "provision", "prepare container", "create_task", "isolate"] {
        let old = Bench::new();
        life(async {
            let engine = old.engine.clone();
            let work = tokio::spawn(async move {
                let pod = engine.run_pod(pod_spec("a")).await?;
                engine.create_container(pod.as_str(), container_spec("c")).await
            });
            old.world.hold(step);
            old.world.reached(step, 1).await;
            assert!(!work.is_finished());
        });
        old.world.open(step);
        assert!(!old.world.held().is_empty(), "{step}: something must be there to undo");
        let bench = old.restarted();
        life(async {
            bench.engine.recover().await.unwrap();
            assert!(bench.engine.containers().is_empty(), "{step}");
            for pod in bench.engine.pods() {
                assert_eq!(std::fs::read_dir(bench.layout.containers(&pod.id)).into_iter().flatten().count(), 0, "{step}");
                assert!(!bench.world.held().iter().any(|t| t.starts_with("task") || t.starts_with("rootfs") || t.contains("container")), "{step}");
                // The retry of the container works at once.
                bench.created(&pod.id, "c").await;
            }
            // And so does the retry of the pod.
            let pod = bench.pod("a").await;
            bench.engine.remove_pod(pod.as_str()).await.unwrap();
            bench.assert_empty();
        });
    }
}

#[test]
fn a_crash_in_the_middle_of_stop_or_removal_can_be_gone_on_from() {
    for step in ["kill_task", "stop_sandbox", "delete_sandbox", "cleanup pod", "cleanup container", "release"] {
        let old = Bench::new();
        let pod = life(async {
            let pod = old.pod("a").await;
            old.running(&pod, "c").await;
            old.world.hold(step);
            let (engine, id) = (old.engine.clone(), pod.clone());
            tokio::spawn(async move { engine.remove_pod(id.as_str()).await });
            old.world.reached(step, 1).await;
            pod
        });
        old.world.open(step);
        let bench = old.restarted();
        life(async {
            bench.engine.recover().await.unwrap();
            bench.engine.stop_pod(pod.as_str()).await.unwrap();
            bench.engine.remove_pod(pod.as_str()).await.unwrap();
            bench.assert_empty();
        });
    }
}

#[test]
fn a_silent_shim_holds_up_neither_the_start_nor_other_pods() {
    let old = Bench::new();
    let (silent, id, created, dead) = life(async {
        let silent = old.pod("silent").await;
        (silent.clone(), old.running(&silent, "c").await, old.created(&silent, "d").await, old.pod("dead").await)
    });
    let before = old.container(&id);
    old.world.kill_shim(&dead);
    old.world.hold("task_state");
    let bench = old.restarted();
    life(async {
        tokio::time::timeout(Duration::from_secs(5), bench.engine.recover()).await.expect("start was held up").unwrap();
        assert!(matches!(bench.container(&id).phase, ContainerPhase::Unknown { .. }));
        assert!(matches!(bench.container(&created).phase, ContainerPhase::Unknown { .. }));
        assert_eq!(bench.engine.pod(dead.as_str()).unwrap().phase, PodPhase::NotReady);
        let recorded: Container = record::read(&bench.layout.container_record(&silent, &id)).unwrap();
        assert_eq!(recorded.phase, before.phase, "not knowing is not recorded");
        assert_eq!(bench.engine.start_container(created.as_str()).await.unwrap_err().kind, Kind::FailedPrecondition);
        bench.world.open("task_state");
        bench.until(|| (bench.container(&id).phase == before.phase).then_some(())).await;
        bench.until(|| matches!(bench.container(&created).phase, ContainerPhase::Created { .. }).then_some(())).await;
        bench.world.exit(&id, 5);
        assert_eq!(bench.exited(&id).await.0, 5, "its watch is on again");
    });
}

#[test]
fn a_pod_whose_shim_stays_silent_can_be_removed() {
    let old = Bench::new();
    let pod = life(async {
        let pod = old.pod("a").await;
        old.running(&pod, "c").await;
        pod
    });
    for call in ["task_state", "kill_task", "stop_sandbox"] {
        old.world.hold(call);
    }
    let bench = old.restarted();
    life(async {
        bench.engine.recover().await.unwrap();
        bench.engine.stop_pod(pod.as_str()).await.unwrap();
        bench.engine.remove_pod(pod.as_str()).await.unwrap();
        bench.assert_empty();
    });
}

#[test]
fn damaged_records_are_quarantined_and_what_they_described_is_given_back() {
    let old = Bench::new();
    let (good, torn, kept, damaged) = life(async {
        let (good, torn) = (old.pod("good").await, old.pod("torn").await);
        old.running(&torn, "c").await;
        (good.clone(), torn, old.running(&good, "kept").await, old.running(&good, "damaged").await)
    });
    std::fs::write(old.layout.pod_record(&torn), "{\"version\":1,\"rec").unwrap();
    std::fs::write(old.layout.container_record(&good, &damaged), "").unwrap();
    let bench = old.restarted();
    life(async {
        bench.engine.recover().await.unwrap();
        assert_eq!(bench.engine.pods().iter().map(|p| &p.id).collect::<Vec<_>>(), [&good]);
        assert_eq!(bench.engine.containers().iter().map(|c| &c.id).collect::<Vec<_>>(), [&kept]);
        assert!(matches!(bench.container(&kept).phase, ContainerPhase::Running { .. }));
        assert!(!bench.world.shim_alive(&torn), "nothing of a pod without a record runs on");
        let held = bench.world.held();
        assert!(!held.iter().any(|t| t.contains(torn.as_str()) || t.contains(damaged.as_str())), "{held:?}");
        assert!(!bench.layout.pod(&torn).exists() && !bench.layout.run_pod(&torn).exists());
        // The record and its reason, twice.
        assert_eq!(std::fs::read_dir(bench.layout.quarantine()).unwrap().count(), 4);
        bench.created(&good, "damaged").await;
        bench.pod("torn").await;
    });
}

#[test]
fn failures_while_recovering_are_survived() {
    let old = Bench::new();
    let pod = life(async {
        let pod = old.pod("a").await;
        old.running(&pod, "c").await;
        pod
    });
    std::fs::create_dir_all(old.layout.run_pod(&PodId::from_string("stray"))).unwrap();
    for call in ["isolators.recover", "network.recover", "images.recover", "delete_sandbox", "delete_task", "cleanup pod"] {
        old.world.fail(call, Kind::Internal);
    }
    // A pod that was being made, whose undo fails too.
    let half = PodId::random();
    let record = Pod { id: half.clone(), phase: PodPhase::Creating, sandbox: None, ..Pod::clone(&old.engine.pod(pod.as_str()).unwrap()) };
    pods::begin_pod(&old.layout, &half, &record).unwrap();
    let bench = old.restarted();
    life(async {
        bench.engine.recover().await.unwrap();
        assert!(bench.engine.ready());
        assert_eq!(bench.engine.pod(pod.as_str()).unwrap().phase, PodPhase::Ready);
        let left = bench.engine.pod(half.as_str()).unwrap();
        assert_eq!(left.phase, PodPhase::NotReady);
        assert!(!left.leftovers.is_empty());
        for call in ["delete_sandbox", "delete_task", "cleanup pod"] {
            bench.world.heal(call);
        }
        bench.engine.stop_pod(half.as_str()).await.unwrap();
        bench.engine.remove_pod(half.as_str()).await.unwrap();
        assert!(!bench.layout.pod(&half).exists());
    });
}
