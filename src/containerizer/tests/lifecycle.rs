//! Lives of pods and containers when nothing fails: phases, names, events, records, reads.

use super::*;
use crate::containerizer::EventKind;
use crate::disk::record;
use crate::launcher::ExecSpec;
use crate::model::error::Kind;
use crate::model::phase::PodPhase;
use crate::model::pod::NamespaceMode;
use crate::model::resources::Resources;

#[tokio::test]
async fn a_whole_life_leaves_nothing_behind() {
    let bench = Bench::new();
    let mut events = bench.engine.events();
    let pod = bench.pod("a").await;
    assert_eq!(bench.engine.pod(pod.as_str()).unwrap().phase, PodPhase::Ready);
    let id = bench.created(&pod, "c").await;
    let created = bench.container(&id);
    assert!(matches!(created.phase, ContainerPhase::Created { pid: 20 }));
    assert_eq!(created.image_ref, "docker.io/library/busybox@sha256:bb");
    assert_eq!(created.image_name, "docker.io/library/busybox:1");
    assert_eq!(created.stop_signal, 15);
    bench.engine.start_container(id.as_str()).await.unwrap();
    let ContainerPhase::Running { started_at, .. } = bench.container(&id).phase else { panic!("not running") };
    assert!(started_at >= created.created_at);
    bench.world.exit(&id, 3);
    assert_eq!(bench.exited(&id).await, (3, "Error".to_owned()));
    let ContainerPhase::Exited { started_at: kept, ref exit } = bench.container(&id).phase else { panic!("not exited") };
    assert_eq!(kept, started_at, "times never change");
    assert!(exit.at >= started_at);
    bench.engine.remove_container(id.as_str()).await.unwrap();
    bench.engine.remove_container(id.as_str()).await.unwrap();
    bench.engine.stop_pod(pod.as_str()).await.unwrap();
    assert_eq!(bench.engine.pod(pod.as_str()).unwrap().phase, PodPhase::NotReady);
    bench.engine.stop_pod(pod.as_str()).await.unwrap();
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();

    let mut seen = Vec::new();
    let mut last = 0;
    while let Ok(event) = events.try_recv() {
        assert!(event.at > last, "event times rise");
        last = event.at;
        seen.push((event.container.is_some(), event.kind));
    }
    use EventKind::{Created, Deleted, Started, Stopped};
    let expected = [(false, Created), (false, Started), (true, Created), (true, Started), (true, Stopped), (true, Deleted), (false, Stopped), (false, Deleted)];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn removing_a_pod_takes_running_created_and_exited_containers_along() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let running = bench.running(&pod, "running").await;
    let exited = bench.running(&pod, "exited").await;
    bench.world.exit(&exited, 0);
    assert_eq!(bench.exited(&exited).await, (0, "Completed".to_owned()));
    let created = bench.created(&pod, "created").await;
    bench.engine.stop_pod(pod.as_str()).await.unwrap();
    assert_eq!(bench.exited(&running).await, (137, "Error".to_owned()));
    assert_eq!(bench.exited(&created).await, (128, "StartError".to_owned()));
    let killed = bench.world.signals.borrow().clone();
    assert_eq!(killed.len(), 1, "{killed:?}");
    assert!(killed[0].1 == 9 && killed[0].2, "one SIGKILL to all of the running one");
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn removing_a_ready_pod_stops_it_first() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    bench.running(&pod, "c").await;
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    bench.assert_empty();
}

#[tokio::test]
async fn names_are_idempotent_while_the_object_lives_and_free_afterwards() {
    let bench = Bench::new();
    bench.world.hold("create_sandbox");
    let first = tokio::spawn({
        let engine = bench.engine.clone();
        async move { engine.run_pod(pod_spec("a")).await.unwrap() }
    });
    bench.world.reached("create_sandbox", 1).await;
    // The first caller leaves; the work goes on and a retry joins it.
    first.abort();
    assert!(first.await.is_err());
    let retry = bench.engine.run_pod(pod_spec("a"));
    tokio::pin!(retry);
    tokio::select! {
        biased;
        r = &mut retry => panic!("answered early: {r:?}"),
        () = std::future::ready(()) => {}
    }
    bench.world.open("create_sandbox");
    let pod = retry.await.unwrap();
    assert_eq!(bench.pod("a").await, pod);
    assert_eq!(bench.world.count("create_sandbox"), 1);
    assert_ne!(bench.pod("b").await, pod);

    let id = bench.created(&pod, "c").await;
    let mut different = container_spec("c");
    different.args = vec!["other".into()];
    assert_eq!(bench.engine.create_container(pod.as_str(), different).await.unwrap(), id);
    bench.engine.start_container(id.as_str()).await.unwrap();
    bench.world.exit(&id, 0);
    bench.exited(&id).await;
    let again = bench.created(&pod, "c").await;
    assert_ne!(again, id, "an exited container has no claim on its name");

    bench.engine.stop_pod(pod.as_str()).await.unwrap();
    let next = bench.pod("a").await;
    assert_ne!(next, pod, "a stopped pod has no claim on its name");
    bench.engine.remove_pod(pod.as_str()).await.unwrap();
    assert_eq!(bench.pod("a").await, next, "removing the old one must not free the new one's name");
}

#[tokio::test]
async fn many_callers_of_one_name_make_one_container() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let calls = (0..20).map(|_| bench.created(&pod, "c"));
    let ids = futures_util::future::join_all(calls).await;
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(bench.world.count("create_task"), 1);
}

#[tokio::test]
async fn pods_do_not_wait_for_each_other() {
    let bench = Bench::new();
    let slow = bench.pod("slow").await;
    bench.world.hold("create_task");
    let blocked = tokio::spawn({
        let engine = bench.engine.clone();
        async move { engine.create_container(slow.as_str(), container_spec("c")).await }
    });
    bench.world.reached("create_task", 1).await;
    let other = bench.pod("other").await;
    bench.engine.remove_pod(other.as_str()).await.unwrap();
    bench.world.open("create_task");
    blocked.await.unwrap().unwrap();
}

#[tokio::test]
async fn creation_times_are_distinct_and_rise() {
    let bench = Bench::new();
    let mut last = 0;
    for name in ["a", "b", "c", "d"] {
        let pod = bench.pod(name).await;
        let at = bench.engine.pod(pod.as_str()).unwrap().created_at;
        assert!(at > last);
        last = at;
    }
}

#[tokio::test]
async fn requests_that_do_not_fit_are_refused_with_their_kind() {
    let bench = Bench::new();
    let mut unknown_handler = pod_spec("a");
    unknown_handler.runtime_handler = "nope".into();
    let error = bench.engine.run_pod(unknown_handler).await.unwrap_err();
    assert_eq!(error.kind, Kind::InvalidArgument);
    assert!(error.to_string().contains("mesocri, other"), "{error}");

    let mut crooked = pod_spec("a");
    crooked.log_directory = Some("/var/log/../../etc".into());
    assert_eq!(bench.engine.run_pod(crooked).await.unwrap_err().kind, Kind::InvalidArgument);
    bench.assert_empty();

    let mut spec = pod_spec("a");
    let logs = bench.layout.root.join("logs");
    spec.log_directory = Some(logs.clone());
    let pod = bench.engine.run_pod(spec).await.unwrap();
    let create = |change: fn(&mut ContainerSpec)| {
        let mut spec = container_spec("c");
        change(&mut spec);
        bench.engine.create_container(pod.as_str(), spec)
    };
    assert_eq!(create(|c| c.image = "missing".into()).await.unwrap_err().kind, Kind::NotFound);
    assert_eq!(create(|c| c.log_path = Some("../x".into())).await.unwrap_err().kind, Kind::InvalidArgument);
    assert_eq!(create(|c| c.security.privileged = true).await.unwrap_err().kind, Kind::InvalidArgument);
    assert_eq!(create(|c| c.security.namespaces.pid = NamespaceMode::Target("x".into())).await.unwrap_err().kind, Kind::NotFound);
    let id = create(|c| c.log_path = Some("c/0.log".into())).await.unwrap();
    assert_eq!(bench.container(&id).log_path, Some(logs.join("c/0.log")));
    assert!(logs.join("c").is_dir(), "the shim only opens the file");

    let exec = || bench.engine.exec_sync(id.as_str(), ExecSpec::default());
    assert_eq!(exec().await.unwrap_err().kind, Kind::FailedPrecondition);
    assert_eq!(bench.engine.reopen_log(id.as_str()).await.unwrap_err().kind, Kind::FailedPrecondition);
    bench.engine.start_container(id.as_str()).await.unwrap();
    assert_eq!(bench.engine.start_container(id.as_str()).await.unwrap_err().kind, Kind::FailedPrecondition);
    assert_eq!(exec().await.unwrap().stdout, b"out");
    bench.engine.reopen_log(id.as_str()).await.unwrap();
    bench.world.exit(&id, 0);
    bench.exited(&id).await;
    assert_eq!(exec().await.unwrap_err().kind, Kind::FailedPrecondition);
    assert_eq!(bench.engine.update_container(id.as_str(), Resources::default()).await.unwrap_err().kind, Kind::FailedPrecondition);
    for missing in ["nope", "../../etc", ""] {
        assert_eq!(bench.engine.start_container(missing).await.unwrap_err().kind, Kind::NotFound);
        bench.engine.stop_container(missing, Duration::ZERO).await.unwrap();
        bench.engine.remove_container(missing).await.unwrap();
        bench.engine.stop_pod(missing).await.unwrap();
        bench.engine.remove_pod(missing).await.unwrap();
    }
    bench.engine.stop_pod(pod.as_str()).await.unwrap();
    assert_eq!(create(|_| ()).await.unwrap_err().kind, Kind::FailedPrecondition);
}

#[tokio::test]
async fn a_shared_process_namespace_needs_its_target_at_create_and_at_start() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let target = bench.running(&pod, "target").await;
    let spec = |name: &str| {
        let mut spec = container_spec(name);
        spec.security.namespaces.pid = NamespaceMode::Target(target.as_str().to_owned());
        spec
    };
    let early = bench.engine.create_container(pod.as_str(), spec("early")).await.unwrap();
    let late = bench.engine.create_container(pod.as_str(), spec("late")).await.unwrap();
    bench.engine.start_container(early.as_str()).await.unwrap();
    bench.world.exit(&target, 0);
    bench.exited(&target).await;
    assert_eq!(bench.engine.start_container(late.as_str()).await.unwrap_err().kind, Kind::FailedPrecondition);
    assert!(matches!(bench.container(&late).phase, ContainerPhase::Created { .. }), "a refused start changes nothing");
    assert_eq!(bench.engine.create_container(pod.as_str(), spec("later")).await.unwrap_err().kind, Kind::FailedPrecondition);
}

#[tokio::test]
async fn updates_merge_are_recorded_and_work_before_the_start() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.created(&pod, "c").await;
    let first = Resources { cpu_shares: Some(512), memory_limit: Some(1 << 20), ..Resources::default() };
    bench.engine.update_container(id.as_str(), first).await.unwrap();
    bench.engine.start_container(id.as_str()).await.unwrap();
    let second = Resources { cpuset_cpus: Some("0".into()), ..Resources::default() };
    bench.engine.update_container(id.as_str(), second).await.unwrap();
    let merged = &bench.container(&id).spec.resources;
    assert_eq!((merged.cpu_shares, merged.memory_limit, merged.cpuset_cpus.as_deref()), (Some(512), Some(1 << 20), Some("0")));
    let recorded: Container = record::read(&bench.layout.container_record(&pod, &id)).unwrap();
    assert_eq!(recorded, *bench.container(&id));
    assert_eq!(bench.world.count("update_task"), 0, "our own shim has nothing to add");
    bench.world.fail("update", Kind::Internal);
    assert!(bench.engine.update_container(id.as_str(), Resources { cpu_shares: Some(2), ..Resources::default() }).await.is_err());
    assert_eq!(bench.container(&id).spec.resources.cpu_shares, Some(512), "a refused update changes nothing");

    bench.engine.update_pod_resources(pod.as_str(), Some(Resources::default()), None).await.unwrap();
    assert!(bench.engine.pod(pod.as_str()).unwrap().spec.overhead.is_some());
    assert_eq!(bench.engine.update_pod_resources("x", None, None).await.unwrap_err().kind, Kind::NotFound);
}

#[tokio::test]
async fn out_of_memory_is_seen_before_the_cgroup_goes() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    *bench.world.oom_kills.lock().unwrap() = 1;
    bench.world.exit(&id, 137);
    assert_eq!(bench.exited(&id).await, (137, "OOMKilled".to_owned()));
    bench.world.reached("delete_task", 1).await;
}

#[tokio::test]
async fn an_exec_ends_with_its_container() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    bench.world.hold("exec_sync");
    let exec = tokio::spawn({
        let (engine, id) = (bench.engine.clone(), id.clone());
        async move { engine.exec_sync(id.as_str(), ExecSpec::default()).await }
    });
    bench.world.reached("exec_sync", 1).await;
    bench.world.exit(&id, 0);
    let error = exec.await.unwrap().unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition, "{error}");
}

#[tokio::test]
async fn lists_of_a_hundred_are_answered_from_memory() {
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    for n in 0..100 {
        bench.created(&pod, &format!("c{n}")).await;
    }
    let best = (0..20).map(|_| {
        let start = std::time::Instant::now();
        assert_eq!(bench.engine.containers().len(), 100);
        start.elapsed()
    });
    let best = best.min().unwrap();
    // Budgets are for the benchmark. Here only what no busy machine does.
    assert!(best < Duration::from_millis(5), "{best:?}");
}

#[tokio::test]
async fn another_runtimes_shim_is_told_of_limits_and_its_refusal_takes_them_back() {
    let bench = Bench::new();
    let pod = bench.engine.run_pod(PodSpec { runtime_handler: "other".into(), ..pod_spec("a") }).await.unwrap();
    let id = bench.running(&pod, "c").await;
    let update = |limit| Resources { memory_limit: Some(limit), ..Resources::default() };
    bench.engine.update_container(id.as_str(), update(5)).await.unwrap();
    assert_eq!((bench.world.count("update"), bench.world.count("update_task")), (1, 1));
    bench.world.fail("update_task", Kind::InvalidArgument);
    bench.engine.update_container(id.as_str(), update(9)).await.unwrap_err();
    assert_eq!(bench.world.limits.lock().unwrap().as_ref().unwrap().memory_limit, Some(5));
    assert_eq!(bench.container(&id).spec.resources.memory_limit, Some(5));
}

#[tokio::test]
async fn other_runtimes_are_told_whose_pod_and_container_it_is() {
    let bench = Bench::new();
    for (handler, told) in [("other", true), ("", false), ("mesocri", false)] {
        bench.world.annotations.lock().unwrap().clear();
        let pod = bench.engine.run_pod(PodSpec { runtime_handler: handler.into(), ..pod_spec("a") }).await.unwrap();
        bench.created(&pod, "c").await;
        let made = bench.world.annotations.lock().unwrap().clone();
        let get = |n: usize, key: &str| made[n].get(&format!("io.kubernetes.cri.{key}")).cloned();
        if told {
            for (n, kind) in [(0, "sandbox"), (1, "container")] {
                assert_eq!(get(n, "container-type").as_deref(), Some(kind));
                assert_eq!(get(n, "sandbox-id").as_deref(), Some(pod.as_str()));
                let names = ["sandbox-name", "sandbox-namespace", "sandbox-uid"].map(|key| get(n, key).unwrap());
                assert_eq!(names, ["a", "ns", "uid-a"]);
            }
            assert_eq!(get(1, "container-name").as_deref(), Some("c"));
            assert_eq!(get(1, "image-name").as_deref(), Some("docker.io/library/busybox:1"));
            assert_eq!((get(0, "container-name"), get(0, "image-name")), (None, None));
        } else {
            assert!(made.iter().all(std::collections::HashMap::is_empty), "ours has no use for them: {made:?}");
        }
        bench.engine.remove_pod(pod.as_str()).await.unwrap();
    }
}
