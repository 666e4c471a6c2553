//! F7: the operator's front: pulls with visible progress, imports, care of the image store. Holds no state of its own; the `mesocri` command speaks it.

mod store;
mod transfer;

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use crate::containerizer::Engine;
use crate::model::Reference;
use crate::model::error::{Error, Kind};
use crate::provisioner::{PullEvent, PullRequest, Upkeep};
use crate::wire::operator as api;
use api::operator_server::{Operator, OperatorServer};
use api::pull_progress::Event;

/// Longest message: plans and reports name every layer and container.
pub const MAX_MESSAGE: usize = 64 << 20;

/// The service, to be added beside the CRI's.
pub fn service(engine: Arc<dyn Engine>, upkeep: Arc<dyn Upkeep>) -> OperatorServer<impl Operator> {
    OperatorServer::new(Service { engine, upkeep }).max_decoding_message_size(MAX_MESSAGE)
}

struct Service {
    engine: Arc<dyn Engine>,
    upkeep: Arc<dyn Upkeep>,
}

#[tonic::async_trait]
impl Operator for Service {
    type PullStream = Pin<Box<dyn Stream<Item = Result<api::PullProgress, Status>> + Send>>;

    async fn pull(&self, request: Request<api::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let reference: Reference = request.into_inner().image.parse().map_err(|e| status(&e))?;
        let images = self.engine.images().clone();
        let (progress, events) = mpsc::unbounded_channel();
        let (done, result) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        // Dropped with the stream: a client that leaves cancels its pull.
        let guard = cancel.clone().drop_guard();
        tokio::spawn(async move {
            let pulled = images.pull(PullRequest { reference, credentials: None, cached: false }, Some(progress), cancel).await;
            // The client may have left; then nobody wants the result.
            let _ = done.send(pulled).await;
        });
        let steps = tokio_stream::wrappers::UnboundedReceiverStream::new(events).filter_map(|e| convert(e).map(Ok));
        let last = tokio_stream::wrappers::ReceiverStream::new(result).map(move |pulled| {
            let _ = &guard;
            match pulled {
                Ok(id) => Ok(Event::ImageId(id.to_string())),
                Err(e) => Err(status(&e)),
            }
        });
        let stream = steps.chain(last).map(|event: Result<Event, Status>| event.map(|event| api::PullProgress { event: Some(event) }));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn load(&self, request: Request<api::LoadRequest>) -> Result<Response<api::LoadResponse>, Status> {
        let path = std::path::PathBuf::from(request.into_inner().path);
        if !path.is_absolute() {
            return Err(Status::invalid_argument(format!("load {}: the path must be absolute", path.display())));
        }
        let ids = self.engine.images().load(&path).await.map_err(|e| status(&e))?;
        Ok(Response::new(api::LoadResponse { image_ids: ids.iter().map(ToString::to_string).collect() }))
    }

    async fn import(&self, request: Request<tonic::Streaming<api::Piece>>) -> Result<Response<api::LoadResponse>, Status> {
        let ids = transfer::import(&*self.upkeep, request.into_inner()).await?;
        Ok(Response::new(api::LoadResponse { image_ids: ids.iter().map(ToString::to_string).collect() }))
    }

    type SaveStream = transfer::Outgoing;

    async fn save(&self, request: Request<api::SaveRequest>) -> Result<Response<Self::SaveStream>, Status> {
        transfer::save(&self.upkeep, request.into_inner()).map(Response::new)
    }

    async fn plan_collection(&self, request: Request<api::Document>) -> Result<Response<api::Document>, Status> {
        store::plan(&*self.upkeep, request.into_inner()).await.map(Response::new).map_err(|e| status(&e))
    }

    async fn apply_plan(&self, request: Request<api::Document>) -> Result<Response<api::Document>, Status> {
        store::apply(&*self.upkeep, request.into_inner()).await.map(Response::new).map_err(|e| status(&e))
    }

    async fn collect(&self, request: Request<api::Document>) -> Result<Response<api::Document>, Status> {
        store::collect(&*self.upkeep, request.into_inner()).await.map(Response::new).map_err(|e| status(&e))
    }

    async fn disk_usage(&self, _: Request<api::DiskUsageRequest>) -> Result<Response<api::Document>, Status> {
        store::disk_usage(&*self.upkeep).await.map(Response::new).map_err(|e| status(&e))
    }

    async fn scrub(&self, request: Request<api::Document>) -> Result<Response<api::Document>, Status> {
        store::scrub(&*self.upkeep, request.into_inner()).await.map(Response::new).map_err(|e| status(&e))
    }

    async fn explain(&self, request: Request<api::ExplainRequest>) -> Result<Response<api::Document>, Status> {
        store::explain(&*self.upkeep, &request.into_inner().key).await.map(Response::new).map_err(|e| status(&e))
    }
}

fn convert(event: PullEvent) -> Option<Event> {
    let index = |layer: usize| u32::try_from(layer).unwrap_or(u32::MAX);
    Some(match event {
        PullEvent::Resolved { layers } => {
            Event::Resolved(api::Resolved { layers: layers.into_iter().map(|(digest, size)| api::Layer { digest, size }).collect() })
        }
        PullEvent::Exists { layer } => Event::Exists(index(layer)),
        PullEvent::Downloaded { layer, bytes } => Event::Downloaded(api::Downloaded { layer: index(layer), bytes }),
        PullEvent::Unpacked { layer } => Event::Unpacked(index(layer)),
        // The id says it.
        PullEvent::Committed => return None,
    })
}

/// This front's one error -> code table.
fn status(error: &Error) -> Status {
    let code = match error.kind {
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::Cancelled => Code::Cancelled,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::DataLoss => Code::DataLoss,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Internal => Code::Internal,
    };
    Status::new(code, error.to_string())
}
