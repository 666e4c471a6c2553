//! The streaming twins of the lists (cri-behaviour §18): the same answers in batches, for nodes whose lists outgrow a message.

use futures_util::stream;
use prost::Message;

use super::rpc::Streamed;
use super::{Front, container, image, sandbox, stats};
use crate::model::error::Result;
use crate::wire::cri as wire;

/// Encoded bytes of a batch, far below the message limit: one item may exceed it, and is then alone.
const BATCH_BYTES: usize = 1 << 20;

pub(super) async fn pods(front: &Front, request: wire::StreamPodSandboxesRequest) -> Result<Streamed<wire::StreamPodSandboxesResponse>> {
    let items = sandbox::matching(front, request.filter)?;
    Ok(batches(items, |pod_sandboxes| wire::StreamPodSandboxesResponse { pod_sandboxes }))
}

pub(super) async fn containers(front: &Front, request: wire::StreamContainersRequest) -> Result<Streamed<wire::StreamContainersResponse>> {
    let items = container::matching(front, request.filter)?;
    Ok(batches(items, |containers| wire::StreamContainersResponse { containers }))
}

pub(super) async fn container_stats(front: &Front, request: wire::StreamContainerStatsRequest) -> Result<Streamed<wire::StreamContainerStatsResponse>> {
    let items = stats::matching_containers(front, request.filter).await?;
    Ok(batches(items, |container_stats| wire::StreamContainerStatsResponse { container_stats }))
}

pub(super) async fn pod_stats(front: &Front, request: wire::StreamPodSandboxStatsRequest) -> Result<Streamed<wire::StreamPodSandboxStatsResponse>> {
    let items = stats::matching_pods(front, request.filter).await?;
    Ok(batches(items, |pod_sandbox_stats| wire::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
}

pub(super) async fn images(front: &Front, request: wire::StreamImagesRequest) -> Result<Streamed<wire::StreamImagesResponse>> {
    let items = image::matching(front, request.filter);
    Ok(batches(items, |images| wire::StreamImagesResponse { images }))
}

/// Every item once, no empty batch; no items are no message at all.
fn batches<I, T>(items: Vec<I>, message: fn(Vec<I>) -> T) -> Streamed<T>
where
    I: Message + 'static,
    T: Send + 'static,
{
    let mut batches = Vec::new();
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for item in items {
        let len = item.encoded_len();
        if bytes + len > BATCH_BYTES && !batch.is_empty() {
            batches.push(Ok(message(std::mem::take(&mut batch))));
            bytes = 0;
        }
        bytes += len;
        batch.push(item);
    }
    if !batch.is_empty() {
        batches.push(Ok(message(batch)));
    }
    Box::pin(stream::iter(batches))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    #[tokio::test]
    async fn every_item_once_and_batches_stay_small() {
        let image = |n: usize, bytes: usize| wire::Image { id: n.to_string(), username: "x".repeat(bytes), ..Default::default() };
        let items: Vec<_> = (0..100).map(|n| image(n, if n == 50 { 3 << 20 } else { 50_000 })).collect();
        let sent: Vec<_> = batches(items.clone(), |images| wire::StreamImagesResponse { images }).map(|r| r.unwrap()).collect().await;
        assert!(sent.len() > 5 && sent.iter().all(|b| b.encoded_len() < 2 << 20 || b.images.len() == 1));
        assert_eq!(sent.into_iter().flat_map(|b| b.images).collect::<Vec<_>>(), items);
        assert_eq!(batches(Vec::<wire::Image>::new(), |images| wire::StreamImagesResponse { images }).count().await, 0);
    }
}
