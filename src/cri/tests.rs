//! The whole front over a unix socket, with a fake engine behind it: gate, paths, codes, lists, limits.

pub mod fake;
mod images;
mod lifecycle;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::{Config, MAX_MESSAGE_BYTES, serve};
use crate::model::Kind;
use crate::model::error::{Error, Result};
use crate::network::Readiness;
use crate::wire::cri as wire;
use crate::wire::cri::image_service_client::ImageServiceClient;
use crate::wire::cri::runtime_service_client::RuntimeServiceClient;
use fake::Fake;

/// A front at work on a socket of its own, and clients of it.
struct Bench {
    engine: Arc<Fake>,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    channel: Channel,
    shutdown: CancellationToken,
    served: JoinHandle<Result<()>>,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn start() -> Self {
        Self::with(Config::default()).await
    }

    async fn with(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cri.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (engine, shutdown) = (Arc::new(Fake::default()), CancellationToken::new());
        let served = tokio::spawn(serve(config, engine.clone(), listener, shutdown.clone(), |_| {}));
        let channel = Endpoint::from_shared(format!("unix://{}", path.display())).unwrap().connect().await.unwrap();
        // More than the server takes, so that its limits are what is tested.
        let runtime = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(2 * MAX_MESSAGE_BYTES);
        Self { engine, runtime, images: ImageServiceClient::new(channel.clone()), channel, shutdown, served, _dir: dir }
    }

    async fn run_pod(&mut self, name: &str) -> String {
        let request = wire::RunPodSandboxRequest { config: Some(pod_config(name)), runtime_handler: "runc".into() };
        self.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id
    }

    async fn create(&mut self, pod: &str, config: wire::ContainerConfig) -> Result<String, Status> {
        let request = wire::CreateContainerRequest { pod_sandbox_id: pod.into(), config: Some(config), sandbox_config: None };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }
}

fn pod_config(name: &str) -> wire::PodSandboxConfig {
    wire::PodSandboxConfig {
        metadata: Some(wire::PodSandboxMetadata { name: name.into(), uid: "u".into(), namespace: "ns".into(), attempt: 4 }),
        labels: [("app".to_owned(), name.to_owned())].into(),
        annotations: [("note".to_owned(), " as is\n".to_owned())].into(),
        ..Default::default()
    }
}

fn container_config(name: &str) -> wire::ContainerConfig {
    wire::ContainerConfig {
        metadata: Some(wire::ContainerMetadata { name: name.into(), attempt: 1 }),
        image: Some(wire::ImageSpec { image: "busybox".into(), ..Default::default() }),
        labels: [("ctr".to_owned(), name.to_owned())].into(),
        log_path: "0.log".into(),
        ..Default::default()
    }
}

#[track_caller]
fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn nobody_is_answered_before_the_engine_is_ready() {
    let mut bench = Bench::start().await;
    bench.engine.ready.store(false, Ordering::Relaxed);
    assert_eq!(code(bench.runtime.version(wire::VersionRequest::default()).await), Code::Unavailable);
    assert_eq!(code(bench.images.list_images(wire::ListImagesRequest::default()).await), Code::Unavailable);
    bench.engine.ready.store(true, Ordering::Relaxed);
    let version = bench.runtime.version(wire::VersionRequest::default()).await.unwrap().into_inner();
    let texts = (version.version.as_str(), version.runtime_name.as_str(), version.runtime_api_version.as_str());
    assert_eq!(texts, ("0.1.0", "mesocri", "v1"));
    assert_eq!(version.runtime_version, env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn old_clients_find_both_services() {
    let bench = Bench::start().await;
    let mut runtime = k8s_cri::v1alpha2::runtime_service_client::RuntimeServiceClient::new(bench.channel.clone());
    let version = runtime.version(k8s_cri::v1alpha2::VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!(version.runtime_name, "mesocri");
    let mut images = k8s_cri::v1alpha2::image_service_client::ImageServiceClient::new(bench.channel.clone());
    assert_eq!(images.list_images(k8s_cri::v1alpha2::ListImagesRequest::default()).await.unwrap().into_inner().images.len(), 1);
}

#[tokio::test]
async fn a_witness_is_answered() {
    let bench = Bench::start().await;
    let mut runtime = k8s_cri::v1::runtime_service_client::RuntimeServiceClient::new(bench.channel.clone());
    let status = runtime.status(k8s_cri::v1::StatusRequest { verbose: true }).await.unwrap().into_inner();
    assert_eq!(status.status.unwrap().conditions.len(), 2);
}

#[tokio::test]
async fn status_tells_conditions_handlers_and_features() {
    let mut bench = Bench::with(Config { recursive_read_only: false, ..Config::default() }).await;
    *bench.engine.network.lock().unwrap() = Readiness::NotReady("no CNI configuration".into());
    let status = bench.runtime.status(wire::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions: Vec<_> = status.status.unwrap().conditions.into_iter().map(|c| (c.r#type, c.status, c.reason, c.message)).collect();
    let expected = [("RuntimeReady", true, "", ""), ("NetworkReady", false, "NetworkPluginNotReady", "no CNI configuration")];
    assert_eq!(conditions, expected.map(|(a, b, c, d)| (a.to_owned(), b, c.to_owned(), d.to_owned())));
    assert_eq!(status.runtime_handlers.iter().map(|h| h.name.as_str()).collect::<Vec<_>>(), ["", "mesocri", "runc"]);
    assert!(status.runtime_handlers.iter().all(|h| h.features == Some(wire::RuntimeHandlerFeatures::default())));
    assert!(status.features.unwrap().supplemental_groups_policy);
    let config: serde_json::Value = serde_json::from_str(&status.info["config"]).unwrap();
    assert_eq!(config["stateDir"], "/run/mesocri");
    let driver = bench.runtime.runtime_config(wire::RuntimeConfigRequest::default()).await.unwrap().into_inner().linux.unwrap();
    assert_eq!(driver.cgroup_driver(), wire::CgroupDriver::Cgroupfs);
}

#[tokio::test]
async fn an_address_range_is_passed_on_and_nothing_is_fine() {
    let mut bench = Bench::start().await;
    bench.runtime.update_runtime_config(wire::UpdateRuntimeConfigRequest::default()).await.unwrap();
    let network_config = Some(wire::NetworkConfig { pod_cidr: "10.1.0.0/16,fd00::/64".into() });
    let request = wire::UpdateRuntimeConfigRequest { runtime_config: Some(wire::RuntimeConfig { network_config }) };
    bench.runtime.update_runtime_config(request).await.unwrap();
    assert_eq!(*bench.engine.calls.lock().unwrap(), ["cidr 10.1.0.0/16,fd00::/64"]);
}

#[tokio::test]
async fn what_is_not_built_is_unimplemented() {
    let mut bench = Bench::start().await;
    let mut other = bench.runtime.clone();
    for answer in [
        code(bench.runtime.exec(wire::ExecRequest::default()).await),
        code(bench.runtime.attach(wire::AttachRequest::default()).await),
        code(bench.runtime.port_forward(wire::PortForwardRequest::default()).await),
        code(bench.runtime.checkpoint_container(wire::CheckpointContainerRequest::default()).await),
        code(bench.runtime.list_metric_descriptors(wire::ListMetricDescriptorsRequest::default()).await),
        code(bench.runtime.list_pod_sandbox_metrics(wire::ListPodSandboxMetricsRequest::default()).await),
        code(other.stream_pod_sandbox_metrics(wire::StreamPodSandboxMetricsRequest::default()).await),
    ] {
        assert_eq!(answer, Code::Unimplemented);
    }
}

#[tokio::test]
async fn a_panic_costs_one_call() {
    let mut bench = Bench::start().await;
    let request = wire::RunPodSandboxRequest { config: Some(pod_config("panic")), ..Default::default() };
    let status = bench.runtime.run_pod_sandbox(request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Internal, "panic while answering: a bug"));
    bench.run_pod("after").await;
}

#[tokio::test]
async fn messages_of_16_mib_pass_and_larger_ones_do_not() {
    let mut bench = Bench::start().await;
    let with = |bytes: usize| {
        let mut config = pod_config("big");
        config.annotations.insert("big".into(), "x".repeat(bytes));
        wire::RunPodSandboxRequest { config: Some(config), ..Default::default() }
    };
    let id = bench.runtime.run_pod_sandbox(with(MAX_MESSAGE_BYTES - 1024)).await.unwrap().into_inner().pod_sandbox_id;
    // And back, which is about as long.
    let status = bench.runtime.pod_sandbox_status(wire::PodSandboxStatusRequest { pod_sandbox_id: id, verbose: false }).await.unwrap().into_inner();
    assert_eq!(status.status.unwrap().annotations["big"].len(), MAX_MESSAGE_BYTES - 1024);
    assert_eq!(code(bench.runtime.run_pod_sandbox(with(MAX_MESSAGE_BYTES)).await), Code::OutOfRange);
}

#[tokio::test]
async fn serving_ends_when_told_even_with_listeners() {
    let mut bench = Bench::start().await;
    let mut events = bench.runtime.get_container_events(wire::GetEventsRequest::default()).await.unwrap().into_inner();
    bench.shutdown.cancel();
    assert!(events.message().await.unwrap().is_none(), "the stream ends without an error");
    bench.served.await.unwrap().unwrap();
}

#[tokio::test]
async fn engine_errors_reach_the_wire_by_the_table() {
    let mut bench = Bench::start().await;
    let pod = bench.run_pod("a").await;
    let id = bench.create(&pod, container_config("c")).await.unwrap();
    for (kind, expected) in [
        (Kind::DeadlineExceeded, Code::DeadlineExceeded),
        (Kind::FailedPrecondition, Code::FailedPrecondition),
        (Kind::PermissionDenied, Code::PermissionDenied),
        (Kind::Internal, Code::Internal),
    ] {
        *bench.engine.exec.lock().unwrap() = Some(Err(Error::new(kind, "exec").within("run")));
        let request = wire::ExecSyncRequest { container_id: id.clone(), cmd: vec!["true".into()], timeout: 1 };
        let status = bench.runtime.exec_sync(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (expected, "run: exec"));
    }
}
