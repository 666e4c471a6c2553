//! Pods and containers: unknown ids, filters, what status shows, events, statistics.

use super::*;
use crate::launcher::ExecOutput;
use crate::model::phase::{ContainerPhase, PodPhase};

#[tokio::test]
async fn unknown_ids_are_not_found_or_fine() {
    let mut bench = Bench::start().await;
    let mut images = bench.images.clone();
    let r = &mut bench.runtime;
    macro_rules! codes {
        ($expected:expr, $field:ident: $($method:ident($request:ident)),*) => { $(
            let mut request = wire::$request::default();
            request.$field = "nonsense".into();
            assert_eq!(code(r.$method(request).await), $expected, stringify!($method));
        )* };
    }
    codes!(Code::Ok, pod_sandbox_id: stop_pod_sandbox(StopPodSandboxRequest), remove_pod_sandbox(RemovePodSandboxRequest));
    codes!(Code::Ok, container_id: stop_container(StopContainerRequest), remove_container(RemoveContainerRequest));
    codes!(Code::NotFound, pod_sandbox_id: pod_sandbox_status(PodSandboxStatusRequest), pod_sandbox_stats(PodSandboxStatsRequest),
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest));
    codes!(Code::NotFound, container_id: container_status(ContainerStatusRequest), start_container(StartContainerRequest),
        container_stats(ContainerStatsRequest), update_container_resources(UpdateContainerResourcesRequest),
        reopen_container_log(ReopenContainerLogRequest));
    let exec = wire::ExecSyncRequest { container_id: "nonsense".into(), cmd: vec!["true".into()], timeout: 0 };
    assert_eq!(code(r.exec_sync(exec).await), Code::NotFound);
    let create = wire::CreateContainerRequest { pod_sandbox_id: "nonsense".into(), config: Some(container_config("c")), sandbox_config: None };
    assert_eq!(code(r.create_container(create).await), Code::NotFound);
    let image = Some(wire::ImageSpec { image: "../:nonsense".into(), ..Default::default() });
    assert_eq!(code(images.remove_image(wire::RemoveImageRequest { image: image.clone() }).await), Code::Ok);
    assert_eq!(images.image_status(wire::ImageStatusRequest { image, verbose: true }).await.unwrap().into_inner(), wire::ImageStatusResponse::default());
}

#[tokio::test]
async fn empty_requests_are_refused_and_never_panic() {
    let mut bench = Bench::start().await;
    let pod = bench.run_pod("lonely").await;
    let id = bench.create(&pod, container_config("c")).await.unwrap();
    let mut images = bench.images.clone();
    let r = &mut bench.runtime;
    macro_rules! refused {
        ($client:ident: $($method:ident($request:ident)),* $(,)?) => { $(
            assert_eq!(code($client.$method(wire::$request::default()).await), Code::InvalidArgument, stringify!($method));
        )* };
    }
    // An empty id is a prefix of the only one there is: nothing may happen to it.
    refused!(r: run_pod_sandbox(RunPodSandboxRequest), stop_pod_sandbox(StopPodSandboxRequest), remove_pod_sandbox(RemovePodSandboxRequest),
        pod_sandbox_status(PodSandboxStatusRequest), create_container(CreateContainerRequest), start_container(StartContainerRequest),
        stop_container(StopContainerRequest), remove_container(RemoveContainerRequest), container_status(ContainerStatusRequest),
        update_container_resources(UpdateContainerResourcesRequest), reopen_container_log(ReopenContainerLogRequest),
        exec_sync(ExecSyncRequest), container_stats(ContainerStatsRequest), pod_sandbox_stats(PodSandboxStatsRequest),
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest));
    refused!(images: pull_image(PullImageRequest), remove_image(RemoveImageRequest), image_status(ImageStatusRequest));
    for config in [Some(wire::PodSandboxConfig::default()), None] {
        let request = wire::RunPodSandboxRequest { config, ..Default::default() };
        assert_eq!(code(bench.runtime.run_pod_sandbox(request).await), Code::InvalidArgument);
    }
    assert_eq!(code(bench.create(&pod, wire::ContainerConfig::default()).await), Code::InvalidArgument);
    let status = bench.runtime.container_status(wire::ContainerStatusRequest { container_id: id, verbose: false }).await.unwrap().into_inner();
    assert_eq!(status.status.unwrap().state(), wire::ContainerState::ContainerCreated);
    assert_eq!(bench.engine.pods.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_pod_is_shown_as_it_was_asked_for() {
    let mut bench = Bench::start().await;
    let id = bench.run_pod("a").await;
    let request = wire::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true };
    let answer = bench.runtime.pod_sandbox_status(request).await.unwrap().into_inner();
    let (status, asked) = (answer.status.unwrap(), pod_config("a"));
    assert_eq!((status.metadata, status.labels, status.annotations), (asked.metadata, asked.labels, asked.annotations));
    assert_eq!((status.id.as_str(), status.runtime_handler.as_str(), status.created_at), (id.as_str(), "runc", 1));
    let network = status.network.unwrap();
    assert_eq!((network.ip.as_str(), network.additional_ips[0].ip.as_str()), ("10.0.0.2", "fd00::2"));
    assert_eq!(status.linux.unwrap().namespaces.unwrap().options.unwrap(), wire::NamespaceOption::default());
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
    assert_eq!((&info["sandboxID"], &info["config"]["metadata"]["name"]), (&"pod1".into(), &"a".into()));
    // Whatever is in the making is not there yet.
    let pod = bench.engine.pods.lock().unwrap()[&id].clone();
    bench.engine.pods.lock().unwrap().insert(id.clone(), Arc::new(crate::containerizer::Pod { phase: PodPhase::Creating, ..(*pod).clone() }));
    let request = wire::PodSandboxStatusRequest { pod_sandbox_id: id, verbose: false };
    assert_eq!(code(bench.runtime.pod_sandbox_status(request).await), Code::NotFound);
    assert!(bench.runtime.list_pod_sandbox(wire::ListPodSandboxRequest::default()).await.unwrap().into_inner().items.is_empty());
}

#[tokio::test]
async fn pods_are_filtered_by_prefix_state_and_labels_together() {
    let mut bench = Bench::start().await;
    for name in ["a", "b", "b"] {
        bench.run_pod(name).await;
    }
    bench.runtime.stop_pod_sandbox(wire::StopPodSandboxRequest { pod_sandbox_id: "pod2".into() }).await.unwrap();
    let ready = Some(wire::PodSandboxStateValue { state: wire::PodSandboxState::SandboxReady.into() });
    let label = |value: &str| [("app".to_owned(), value.to_owned())].into();
    let filter = wire::PodSandboxFilter::default;
    for (filter, expected) in [
        (None, vec!["pod1", "pod2", "pod3"]),
        (Some(filter()), vec!["pod1", "pod2", "pod3"]),
        (Some(wire::PodSandboxFilter { id: "pod".into(), ..filter() }), vec!["pod1", "pod2", "pod3"]),
        (Some(wire::PodSandboxFilter { id: "pod2".into(), ..filter() }), vec!["pod2"]),
        (Some(wire::PodSandboxFilter { id: "x".into(), ..filter() }), vec![]),
        (Some(wire::PodSandboxFilter { state: ready, label_selector: label("b"), ..filter() }), vec!["pod3"]),
        (Some(wire::PodSandboxFilter { label_selector: label(""), ..filter() }), vec![]),
    ] {
        let unary = bench.runtime.list_pod_sandbox(wire::ListPodSandboxRequest { filter: filter.clone() }).await.unwrap().into_inner().items;
        assert_eq!(unary.iter().map(|p| p.id.as_str()).collect::<Vec<_>>(), expected, "{filter:?}");
        let mut stream = bench.runtime.stream_pod_sandboxes(wire::StreamPodSandboxesRequest { filter }).await.unwrap().into_inner();
        let mut streamed = Vec::new();
        while let Some(batch) = stream.message().await.unwrap() {
            streamed.extend(batch.pod_sandboxes);
        }
        assert_eq!(streamed, unary);
    }
    let nonsense = Some(wire::PodSandboxFilter { state: Some(wire::PodSandboxStateValue { state: 9 }), ..filter() });
    assert_eq!(code(bench.runtime.list_pod_sandbox(wire::ListPodSandboxRequest { filter: nonsense }).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_container_is_shown_from_creation_to_exit() {
    let mut bench = Bench::start().await;
    let pod = bench.run_pod("a").await;
    let mount = wire::Mount { container_path: "/log".into(), host_path: "/host".into(), ..Default::default() };
    let stop_signal = wire::Signal::Sigrtminplus3.into();
    let config = wire::ContainerConfig { mounts: vec![mount.clone()], stop_signal, ..container_config("c") };
    let id = bench.create(&pod, config).await.unwrap();
    let mut runtime = bench.runtime.clone();
    let mut status = async || {
        let request = wire::ContainerStatusRequest { container_id: "ctr".into(), verbose: true };
        runtime.container_status(request).await.unwrap().into_inner()
    };
    let answer = status().await;
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
    assert_eq!((&info["sandboxID"], &info["pid"], &info["runtimeSpec"]["ociVersion"]), (&"pod1".into(), &41.into(), &"1.2.0".into()));
    let created = answer.status.unwrap();
    assert_eq!((created.state(), created.started_at, created.finished_at), (wire::ContainerState::ContainerCreated, 0, 0));
    assert_eq!((created.mounts, created.stop_signal, created.log_path.as_str()), (vec![mount], stop_signal, "/logs/0.log"));
    assert_eq!((created.image.unwrap().image, created.image_id), (fake::image().repo_tags[0].clone(), fake::image().id.to_string()));
    let user = created.user.unwrap().linux.unwrap();
    assert_eq!((user.uid, user.gid, user.supplemental_groups), (1000, 5, vec![5, 6]));

    bench.runtime.start_container(wire::StartContainerRequest { container_id: id.clone() }).await.unwrap();
    assert_eq!(code(bench.runtime.start_container(wire::StartContainerRequest { container_id: id.clone() }).await), Code::FailedPrecondition);
    let linux = Some(wire::LinuxContainerResources { cpu_shares: 512, ..Default::default() });
    let update = wire::UpdateContainerResourcesRequest { container_id: id.clone(), linux, ..Default::default() };
    bench.runtime.update_container_resources(update).await.unwrap();
    let running = status().await.status.unwrap();
    assert_eq!((running.state(), running.started_at), (wire::ContainerState::ContainerRunning, 3));
    assert_eq!(running.resources.unwrap().linux.unwrap().cpu_shares, 512);

    bench.runtime.stop_container(wire::StopContainerRequest { container_id: id, timeout: -3 }).await.unwrap();
    assert_eq!(*bench.engine.calls.lock().unwrap(), ["stop ctr1 0"]);
    let exited = status().await.status.unwrap();
    assert_eq!((exited.state(), exited.started_at, exited.finished_at), (wire::ContainerState::ContainerExited, 3, 4));
    assert_eq!((exited.exit_code, exited.reason.as_str()), (137, "OOMKilled"));
}

#[tokio::test]
async fn containers_are_filtered_like_pods() {
    let mut bench = Bench::start().await;
    let (a, b) = (bench.run_pod("a").await, bench.run_pod("b").await);
    for (pod, name) in [(&a, "x"), (&b, "y"), (&b, "z")] {
        bench.create(pod, container_config(name)).await.unwrap();
    }
    bench.engine.set_phase("ctr3", ContainerPhase::Running { pid: 1, started_at: 1 });
    let filter = wire::ContainerFilter::default;
    let running = Some(wire::ContainerStateValue { state: wire::ContainerState::ContainerRunning.into() });
    for (filter, expected) in [
        (filter(), vec!["ctr1", "ctr2", "ctr3"]),
        (wire::ContainerFilter { pod_sandbox_id: "pod2".into(), ..filter() }, vec!["ctr2", "ctr3"]),
        (wire::ContainerFilter { pod_sandbox_id: "pod".into(), state: running, ..filter() }, vec!["ctr3"]),
        (wire::ContainerFilter { label_selector: [("ctr".to_owned(), "x".to_owned())].into(), id: "ctr".into(), ..filter() }, vec!["ctr1"]),
    ] {
        let answer = bench.runtime.list_containers(wire::ListContainersRequest { filter: Some(filter) }).await.unwrap().into_inner();
        assert_eq!(answer.containers.iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), expected);
        assert!(answer.containers.iter().all(|c| c.image.as_ref().is_some_and(|i| i.image == "busybox") && !c.image_id.is_empty()));
    }
}

#[tokio::test]
async fn a_process_namespace_is_shared_with_a_running_container_of_the_pod() {
    let mut bench = Bench::start().await;
    let (a, b) = (bench.run_pod("a").await, bench.run_pod("b").await);
    bench.create(&a, container_config("target")).await.unwrap();
    let options = wire::NamespaceOption { pid: wire::NamespaceMode::Target.into(), target_id: "ctr1".into(), ..Default::default() };
    let context = wire::LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = Some(wire::LinuxContainerConfig { security_context: Some(context), resources: None });
    let config = wire::ContainerConfig { linux, ..container_config("debug") };
    assert_eq!(code(bench.create(&a, config.clone()).await), Code::FailedPrecondition, "it does not run");
    bench.engine.set_phase("ctr1", ContainerPhase::Running { pid: 1, started_at: 1 });
    assert_eq!(code(bench.create(&b, config.clone()).await), Code::InvalidArgument, "another pod");
    bench.create(&a, config.clone()).await.unwrap();
    bench.runtime.stop_pod_sandbox(wire::StopPodSandboxRequest { pod_sandbox_id: a.clone() }).await.unwrap();
    assert_eq!(code(bench.create(&a, config).await), Code::FailedPrecondition, "the pod is not ready");
}

#[tokio::test]
async fn a_command_has_limits_and_its_answer_always_fits() {
    let mut bench = Bench::start().await;
    let pod = bench.run_pod("a").await;
    let id = bench.create(&pod, container_config("c")).await.unwrap();
    // All that is asked of the launcher for both streams together.
    let half = vec![b'x'; (MAX_MESSAGE_BYTES - 64) / 2];
    *bench.engine.exec.lock().unwrap() = Some(Ok(ExecOutput { code: 3, stdout: half.clone(), stderr: half }));
    let request = |cmd: &[&str], timeout| wire::ExecSyncRequest { container_id: id.clone(), cmd: cmd.iter().map(|s| (*s).to_owned()).collect(), timeout };
    let answer = bench.runtime.exec_sync(request(&["yes"], 2)).await.unwrap().into_inner();
    assert_eq!(answer.exit_code, 3);
    assert!(answer.stdout.len() + answer.stderr.len() > MAX_MESSAGE_BYTES - 1024);
    bench.runtime.exec_sync(request(&["true"], 0)).await.unwrap();
    assert_eq!(*bench.engine.calls.lock().unwrap(), ["exec [\"yes\"] Some(2s) 16777152", "exec [\"true\"] None 16777152"]);
    for bad in [request(&[], 0), request(&["a\0"], 0), request(&["true"], -1)] {
        assert_eq!(code(bench.runtime.exec_sync(bad).await), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn events_carry_the_state_of_their_pod() {
    let mut bench = Bench::start().await;
    let mut events = bench.runtime.get_container_events(wire::GetEventsRequest::default()).await.unwrap().into_inner();
    let pod = bench.run_pod("a").await;
    let ids = [bench.create(&pod, container_config("x")).await.unwrap(), bench.create(&pod, container_config("y")).await.unwrap()];
    bench.runtime.remove_container(wire::RemoveContainerRequest { container_id: ids[0].clone() }).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..4 {
        let event = events.message().await.unwrap().unwrap();
        let status = event.pod_sandbox_status.clone().unwrap();
        assert_eq!((status.id.as_str(), status.metadata.is_some(), event.created_at), (pod.as_str(), true, 7));
        seen.push((event.container_id.clone(), event.container_event_type()));
        if event.container_event_type() == wire::ContainerEventType::ContainerDeletedEvent {
            assert_eq!(event.containers_statuses.iter().map(|c| &c.id).collect::<Vec<_>>(), [&ids[1]], "without the deleted one");
        }
    }
    use wire::ContainerEventType::{ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted};
    assert_eq!(seen, [(pod, Created), (ids[0].clone(), Created), (ids[1].clone(), Created), (ids[0].clone(), Deleted)]);
}

#[tokio::test]
async fn statistics_are_complete_where_something_runs() {
    let mut bench = Bench::start().await;
    let pod = bench.run_pod("a").await;
    for name in ["runs", "waits"] {
        bench.create(&pod, container_config(name)).await.unwrap();
    }
    assert_eq!(code(bench.runtime.container_stats(wire::ContainerStatsRequest { container_id: "ctr1".into() }).await), Code::FailedPrecondition);
    bench.engine.set_phase("ctr1", ContainerPhase::Running { pid: 1, started_at: 1 });
    let value = |value| Some(wire::UInt64Value { value });

    let all = bench.runtime.list_container_stats(wire::ListContainerStatsRequest::default()).await.unwrap().into_inner().stats;
    assert!(all.iter().all(|s| s.attributes.as_ref().is_some_and(|a| a.metadata.is_some() && a.labels.len() == 1)));
    let layer = all[0].writable_layer.clone().unwrap();
    assert_eq!((layer.fs_id.unwrap().mountpoint.as_str(), layer.used_bytes, layer.inodes_used), ("/var", value(4096), value(1)));
    assert_eq!((all[0].cpu.as_ref().unwrap().usage_core_nano_seconds, all[1].cpu.is_none(), all[1].writable_layer.is_some()), (value(6), true, true));

    let stats = bench.runtime.pod_sandbox_stats(wire::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() }).await.unwrap().into_inner().stats.unwrap();
    let linux = stats.linux.unwrap();
    assert_eq!((linux.containers.len(), linux.process.unwrap().process_count, linux.cpu.unwrap().usage_nano_cores), (1, value(3), None));
    assert_eq!(linux.network.unwrap().default_interface.unwrap().rx_bytes, value(9));
    bench.runtime.stop_pod_sandbox(wire::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    assert_eq!(code(bench.runtime.pod_sandbox_stats(wire::PodSandboxStatsRequest { pod_sandbox_id: pod }).await), Code::Unavailable);
    assert!(bench.runtime.list_pod_sandbox_stats(wire::ListPodSandboxStatsRequest::default()).await.unwrap().into_inner().stats.is_empty());
}
