//! The table of calls. Each row names the handler of a call and the id that its span carries; the code around all of them (span,
//! panic, log, code) is [`answer`].

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;

use futures_util::{FutureExt, Stream};
use tonic::{Request, Response, Status};
use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::{Front, container, events, exec, image, lists, runtime, sandbox, stats, status};
use crate::model::error::{Error, Result};
use crate::wire::cri as wire;
use crate::wire::cri::image_service_server::ImageService;
use crate::wire::cri::runtime_service_server::RuntimeService;

/// What streaming calls answer with.
pub type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// `name(Request) -> Answer = handler, pod = field of the request;` and, for streams, `name(Request) -> Stream: Answer = handler;`.
macro_rules! calls {
    (
        $service:ident,
        unary { $($name:ident($request:ident) -> $answer:ident = $handler:path $(, $subject:ident = $field:ident)?;)* }
        stream { $($stream_name:ident($stream_request:ident) -> $stream:ident: $item:ident = $stream_handler:path;)* }
    ) => {
        #[tonic::async_trait]
        impl $service for Front {
            $(
                async fn $name(&self, request: Request<wire::$request>) -> Result<Response<wire::$answer>, Status> {
                    let request = request.into_inner();
                    // The ids that the request does not name are filled in by the engine as soon as there are any.
                    let span = tracing::info_span!(stringify!($name), pod = Empty, container = Empty);
                    $(span.record(stringify!($subject), request.$field.as_str());)?
                    answer(stringify!($name), span, $handler(self, request)).await
                }
            )*
            $(
                type $stream = Streamed<wire::$item>;

                async fn $stream_name(&self, request: Request<wire::$stream_request>) -> Result<Response<Self::$stream>, Status> {
                    let span = tracing::info_span!(stringify!($stream_name));
                    answer(stringify!($stream_name), span, $stream_handler(self, request.into_inner())).await
                }
            )*
        }
    };
}

calls! {
    RuntimeService,
    unary {
        version(VersionRequest) -> VersionResponse = runtime::version;
        status(StatusRequest) -> StatusResponse = runtime::status;
        runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse = runtime::config;
        update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse = runtime::update_config;

        run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse = sandbox::run;
        stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse = sandbox::stop, pod = pod_sandbox_id;
        remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse = sandbox::remove, pod = pod_sandbox_id;
        pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse = sandbox::status, pod = pod_sandbox_id;
        list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse = sandbox::list;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse = sandbox::update_resources, pod = pod_sandbox_id;

        create_container(CreateContainerRequest) -> CreateContainerResponse = container::create, pod = pod_sandbox_id;
        start_container(StartContainerRequest) -> StartContainerResponse = container::start, container = container_id;
        stop_container(StopContainerRequest) -> StopContainerResponse = container::stop, container = container_id;
        remove_container(RemoveContainerRequest) -> RemoveContainerResponse = container::remove, container = container_id;
        container_status(ContainerStatusRequest) -> ContainerStatusResponse = container::status, container = container_id;
        list_containers(ListContainersRequest) -> ListContainersResponse = container::list;
        update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse = container::update_resources, container = container_id;
        reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse = container::reopen_log, container = container_id;
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse = unsupported, container = container_id;

        exec_sync(ExecSyncRequest) -> ExecSyncResponse = exec::sync, container = container_id;
        exec(ExecRequest) -> ExecResponse = unsupported, container = container_id;
        attach(AttachRequest) -> AttachResponse = unsupported, container = container_id;
        port_forward(PortForwardRequest) -> PortForwardResponse = unsupported, pod = pod_sandbox_id;

        container_stats(ContainerStatsRequest) -> ContainerStatsResponse = stats::container, container = container_id;
        list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse = stats::containers;
        pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse = stats::pod, pod = pod_sandbox_id;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse = stats::pods;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse = unsupported;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse = unsupported;
    }
    stream {
        get_container_events(GetEventsRequest) -> GetContainerEventsStream: ContainerEventResponse = events::subscribe;
        stream_pod_sandboxes(StreamPodSandboxesRequest) -> StreamPodSandboxesStream: StreamPodSandboxesResponse = lists::pods;
        stream_containers(StreamContainersRequest) -> StreamContainersStream: StreamContainersResponse = lists::containers;
        stream_container_stats(StreamContainerStatsRequest) -> StreamContainerStatsStream: StreamContainerStatsResponse = lists::container_stats;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> StreamPodSandboxStatsStream: StreamPodSandboxStatsResponse = lists::pod_stats;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> StreamPodSandboxMetricsStream: StreamPodSandboxMetricsResponse = unsupported;
    }
}

calls! {
    ImageService,
    unary {
        list_images(ListImagesRequest) -> ListImagesResponse = image::list;
        image_status(ImageStatusRequest) -> ImageStatusResponse = image::status;
        pull_image(PullImageRequest) -> PullImageResponse = image::pull;
        remove_image(RemoveImageRequest) -> RemoveImageResponse = image::remove;
        image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse = image::fs_info;
    }
    stream {
        stream_images(StreamImagesRequest) -> StreamImagesStream: StreamImagesResponse = lists::images;
    }
}

/// Runs a handler inside its span. Its failure is logged here and nowhere else; a panic costs this call, not the daemon.
async fn answer<T>(rpc: &str, span: Span, work: impl Future<Output = Result<T>>) -> Result<Response<T>, Status> {
    let guarded = async {
        let result = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
            Err(Error::internal(format!("panic while answering: {text}")))
        });
        result.map(Response::new).map_err(|e| {
            status::log(rpc, &e);
            status::of(&e)
        })
    };
    guarded.instrument(span).await
}

/// The answer to calls that are not built: exactly `Unimplemented`, so that clients take their other way (cri-behaviour §1).
async fn unsupported<Q, A>(_: &Front, _: Q) -> Result<A> {
    Err(Error::new(crate::model::Kind::Unimplemented, "this call is not supported"))
}
