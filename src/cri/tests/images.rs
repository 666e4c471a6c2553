//! The image service.

use super::*;

fn spec(name: &str) -> Option<wire::ImageSpec> {
    Some(wire::ImageSpec { image: name.into(), ..Default::default() })
}

#[tokio::test]
async fn an_image_is_the_same_whichever_name_is_used() {
    let mut bench = Bench::start().await;
    let image = fake::image();
    let mut answers = Vec::new();
    for key in [image.id.as_str(), "busybox", &image.repo_tags[0], &image.repo_digests[0]] {
        let answer = bench.images.image_status(wire::ImageStatusRequest { image: spec(key), verbose: true }).await.unwrap().into_inner();
        assert!(answer.image.is_some(), "{key}");
        answers.push(answer);
    }
    answers.dedup();
    assert_eq!(answers.len(), 1);
    let shown = answers[0].image.clone().unwrap();
    assert_eq!((shown.id.as_str(), shown.size, shown.uid, shown.username.as_str()), (image.id.as_str(), 4096, Some(wire::Int64Value { value: 1000 }), ""));
    let info: serde_json::Value = serde_json::from_str(&answers[0].info["info"]).unwrap();
    assert_eq!(info["imageSpec"]["os"], "linux");
}

#[tokio::test]
async fn lists_are_filtered_by_name_and_an_empty_name_is_all() {
    let mut bench = Bench::start().await;
    for (filter, expected) in [(None, 1), (Some(""), 1), (Some("busybox"), 1), (Some("nginx"), 0)] {
        let filter = filter.map(|name| wire::ImageFilter { image: spec(name) });
        assert_eq!(bench.images.list_images(wire::ListImagesRequest { filter: filter.clone() }).await.unwrap().into_inner().images.len(), expected);
        let mut stream = bench.images.stream_images(wire::StreamImagesRequest { filter }).await.unwrap().into_inner();
        assert_eq!(stream.message().await.unwrap().map_or(0, |batch| batch.images.len()), expected);
    }
}

#[tokio::test]
async fn removal_is_idempotent() {
    let mut bench = Bench::start().await;
    for _ in 0..2 {
        bench.images.remove_image(wire::RemoveImageRequest { image: spec("busybox") }).await.unwrap();
        assert!(bench.engine.store.removed.load(Ordering::Relaxed));
    }
    assert!(bench.images.list_images(wire::ListImagesRequest::default()).await.unwrap().into_inner().images.is_empty());
}

#[tokio::test]
async fn a_pull_gives_the_id_or_says_why_not() {
    let mut bench = Bench::start().await;
    let pull = |name: &str| wire::PullImageRequest { image: spec(name), ..Default::default() };
    let answer = bench.images.pull_image(pull("busybox")).await.unwrap().into_inner();
    assert_eq!(answer.image_ref, fake::image().id.to_string());
    let status = bench.images.pull_image(pull("offline")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unknown, "RegistryUnavailable: no route"));
    for bad in ["", "UPPER/case", "a b"] {
        assert_eq!(code(bench.images.pull_image(pull(bad)).await), Code::InvalidArgument, "{bad:?}");
    }
}

#[tokio::test]
async fn a_pull_ends_with_its_caller() {
    let bench = Bench::start().await;
    let mut images = bench.images.clone();
    let call = tokio::spawn(async move { images.pull_image(wire::PullImageRequest { image: spec("slow"), ..Default::default() }).await });
    bench.engine.store.pulling.notified().await;
    call.abort();
    bench.engine.store.cancelled.notified().await;
}

#[tokio::test]
async fn the_store_is_told_for_images_and_layers() {
    let mut bench = Bench::start().await;
    let answer = bench.images.image_fs_info(wire::ImageFsInfoRequest::default()).await.unwrap().into_inner();
    let usage = &answer.image_filesystems[0];
    assert_eq!((usage.used_bytes, usage.fs_id.clone().unwrap().mountpoint), (Some(wire::UInt64Value { value: 8192 }), "/var".to_owned()));
    assert!(usage.timestamp > 0);
    assert_eq!(answer.container_filesystems, answer.image_filesystems);
}
