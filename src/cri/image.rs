//! Images (cri-behaviour §13).

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::Front;
use super::convert::{filled, image as show, required, stats};
use crate::model::Reference;
use crate::model::error::Result;
use crate::model::image::Image;
use crate::provisioner::PullRequest;
use crate::stdx::clock::now_ns;
use crate::wire::cri as wire;

pub(super) async fn list(front: &Front, request: wire::ListImagesRequest) -> Result<wire::ListImagesResponse> {
    Ok(wire::ListImagesResponse { images: matching(front, request.filter) })
}

/// Images that a filter asks for: all, or the one it names.
pub(super) fn matching(front: &Front, filter: Option<wire::ImageFilter>) -> Vec<wire::Image> {
    let name = filter.and_then(|f| f.image).map(|i| i.image).unwrap_or_default();
    let images: Vec<Arc<Image>> = if name.is_empty() { front.engine.images().list() } else { front.engine.images().resolve(&name).into_iter().collect() };
    images.iter().map(|image| show::to_wire(image)).collect()
}

/// Unknown and malformed names alike are answered without an image: that is how clients learn they must pull.
pub(super) async fn status(front: &Front, request: wire::ImageStatusRequest) -> Result<wire::ImageStatusResponse> {
    let name = required(request.image, "image")?.image;
    let Some(image) = find(front, &name) else { return Ok(wire::ImageStatusResponse::default()) };
    let info = if request.verbose { [("info".to_owned(), show::info(&image).to_string())].into() } else { Default::default() };
    Ok(wire::ImageStatusResponse { image: Some(show::to_wire(&image)), info })
}

fn find(front: &Front, name: &str) -> Option<Arc<Image>> {
    if name.is_empty() { None } else { front.engine.images().resolve(name) }
}

pub(super) async fn pull(front: &Front, request: wire::PullImageRequest) -> Result<wire::PullImageResponse> {
    let name = filled(required(request.image, "image")?.image, "image.image")?;
    let reference: Reference = name.parse()?;
    let credentials = request.auth.map(show::credentials).transpose()?.flatten();
    // Pulls end with their caller: a dropped call drops the guard, which cancels.
    let cancel = CancellationToken::new();
    let _guard = cancel.clone().drop_guard();
    let what = format!("pull image {reference}");
    let id = front.engine.images().pull(PullRequest { reference, credentials, cached: false }, None, cancel).await.map_err(|e| e.within(what))?;
    Ok(wire::PullImageResponse { image_ref: id.to_string() })
}

pub(super) async fn remove(front: &Front, request: wire::RemoveImageRequest) -> Result<wire::RemoveImageResponse> {
    let name = required(request.image, "image")?.image;
    if let Some(image) = find(front, &name) {
        front.engine.images().remove(image.id.as_str()).await?;
    }
    Ok(wire::RemoveImageResponse {})
}

/// Images and writable layers share one store, so both lists say the same.
pub(super) async fn fs_info(front: &Front, _: wire::ImageFsInfoRequest) -> Result<wire::ImageFsInfoResponse> {
    let (dir, usage) = front.engine.images().fs_info().await?;
    let store = stats::filesystem(&dir, usage, now_ns());
    Ok(wire::ImageFsInfoResponse { image_filesystems: vec![store.clone()], container_filesystems: vec![store] })
}
