//! GetContainerEvents (cri-behaviour §17): every change with the state right after it, to any number of listeners.

use futures_util::{StreamExt, stream};
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;

use super::Front;
use super::convert::status as show;
use super::rpc::Streamed;
use crate::containerizer::{Engine, Event, EventKind};
use crate::model::error::Result;
use crate::model::phase::ContainerPhase;
use crate::wire::cri as wire;

/// Ends with the daemon only. A listener too slow for the engine's bounded queue misses events and is told nothing: it lists anyway.
pub(super) async fn subscribe(front: &Front, _: wire::GetEventsRequest) -> Result<Streamed<wire::ContainerEventResponse>> {
    let events = stream::unfold((front.engine.events(), front.engine.clone()), |(mut receiver, engine)| async move {
        loop {
            match receiver.recv().await {
                Ok(event) => return Some((Ok::<_, Status>(shown(engine.as_ref(), &event)), (receiver, engine))),
                Err(RecvError::Lagged(missed)) => tracing::warn!(missed, "a listener was too slow for container events"),
                Err(RecvError::Closed) => return None,
            }
        }
    });
    Ok(Box::pin(events.take_until(front.closing.clone().cancelled_owned())))
}

fn shown(engine: &dyn Engine, event: &Event) -> wire::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => wire::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => wire::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => wire::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => wire::ContainerEventType::ContainerDeletedEvent,
    };
    // The container of the event as it was then, the others of the pod as they are now.
    let subject = event.container.as_ref().map(|c| &c.id);
    let others = engine.containers().into_iter().filter(|c| c.pod == event.pod.id && c.phase != ContainerPhase::Creating && Some(&c.id) != subject);
    let mut containers_statuses: Vec<_> = others.map(|c| show::container_status(&c)).collect();
    if event.kind != EventKind::Deleted {
        containers_statuses.extend(event.container.iter().map(|c| show::container_status(c)));
    }
    wire::ContainerEventResponse {
        container_id: subject.map_or_else(|| event.pod.id.to_string(), ToString::to_string),
        container_event_type: kind.into(),
        created_at: event.at,
        pod_sandbox_status: Some(show::pod_status(&event.pod)),
        containers_statuses,
    }
}
