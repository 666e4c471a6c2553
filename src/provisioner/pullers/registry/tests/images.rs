//! Whole pulls: schema 1, names short and long, digests and tags.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::disk::Layout;
use crate::model::ImageId;
use crate::provisioner::pullers::schema1::{PLAIN, SIGNED};
use crate::provisioner::{Images, Provisioner, PullRequest};

struct Store {
    provisioner: Arc<Provisioner>,
    layout: Layout,
    _dir: tempfile::TempDir,
}

impl Store {
    async fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        Self { provisioner: Provisioner::open(config, layout.clone()).await.unwrap(), layout, _dir: dir }
    }

    async fn pull(&self, name: &str) -> Result<ImageId> {
        self.provisioner.pull(PullRequest { reference: name.parse()?, credentials: None, cached: false }, None, CancellationToken::new()).await
    }
}

fn layer(file: &str) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o644);
    header.set_cksum();
    builder.append_data(&mut header, file, &b"abc"[..]).unwrap();
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A schema 1 manifest of these layers, lowest first, and what of it is signed.
fn schema1(stub: &Stub, repository: &str, arch: &str, files: &[&str]) -> String {
    let mut layers: Vec<Value> = files.iter().map(|f| json!({"blobSum": stub.blob(repository, &gzip(&layer(f))).digest.as_str()})).collect();
    let mut history: Vec<Value> = files.iter().map(|f| json!({"v1Compatibility": json!({"id": f, "created": "2015-01-01T00:00:00Z"}).to_string()})).collect();
    let top = json!({"id": "top", "throwaway": true, "architecture": arch, "os": "linux", "config": {"Cmd": ["sh"], "User": "7"}});
    layers.push(json!({"blobSum": format!("sha256:{}", "0".repeat(64))}));
    history.push(json!({"v1Compatibility": top.to_string()}));
    layers.reverse();
    history.reverse();
    serde_json::to_string_pretty(&json!({"schemaVersion": 1, "name": repository, "tag": "1", "fsLayers": layers, "history": history})).unwrap()
}

fn sign(text: &str) -> String {
    let base64 = |bytes: &[u8]| base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, bytes);
    let end = text.rfind("\n}").unwrap();
    let protected = json!({"formatLength": end, "formatTail": base64(&text.as_bytes()[end..])}).to_string();
    format!(
        "{},\n\"signatures\": [{{\"header\": {{}}, \"signature\": \"\", \"protected\": \"{}\"}}]{}",
        &text[..end],
        base64(protected.as_bytes()),
        &text[end..]
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_1_signed_and_not() {
    let stub = Stub::honest();
    let text = schema1(&stub, "old", "amd64", &["x", "y"]);
    let digest = descriptor(text.as_bytes()).digest;
    let signed = sign(&text);
    for (tag, media_type, body) in [("plain", PLAIN, &text), ("signed", SIGNED, &signed), ("json", "application/json", &signed)] {
        stub.put(&format!("/v2/old/manifests/{tag}"), media_type, body.as_bytes());
    }
    stub.put(&format!("/v2/old/manifests/{digest}"), SIGNED, signed.as_bytes());
    let store = Store::new(Config { platform: "linux/amd64".into(), ..Config::default() }).await;
    let id = store.pull(&format!("{}/old:signed", stub.host)).await.unwrap();
    let image = store.provisioner.resolve(id.as_str()).unwrap();
    assert_eq!(image.repo_digests, [format!("{}/old@{digest}", stub.host)]);
    assert_eq!(image.layers.iter().map(|l| l.diff_id.clone()).collect::<Vec<_>>(), [descriptor(&layer("x")).digest, descriptor(&layer("y")).digest]);
    assert_eq!(
        (image.user().0, image.config.cmd.as_slice(), descriptor(image.config_json.as_bytes()).digest.as_str()),
        (Some(7), ["sh".to_owned()].as_slice(), id.as_str())
    );
    let rootfs = store.provisioner.provision("c", &image).await.unwrap();
    assert!(["x", "y"].iter().all(|f| rootfs.lookup.iter().any(|dir| dir.join(f).exists())));
    // However it is served it is one image, and its blobs are known by now.
    let fetched = || stub.seen("/blobs/").iter().filter(|r| r.method == "GET").count();
    assert_eq!(fetched(), 2);
    for name in ["old:plain".to_owned(), "old:json".to_owned(), format!("old@{digest}"), format!("old:gone@{digest}")] {
        assert_eq!(store.pull(&format!("{}/{name}", stub.host)).await.unwrap(), id);
    }
    assert_eq!((fetched(), store.provisioner.list().len()), (2, 1));
    store.provisioner.release("c").await.unwrap();
    store.provisioner.remove(id.as_str()).await.unwrap();
    assert_eq!(std::fs::read_dir(store.layout.layers()).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(store.layout.staging()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_1_that_lies_or_is_for_others() {
    let stub = Stub::honest();
    let text = schema1(&stub, "old", "amd64", &["x"]);
    let digest = descriptor(text.as_bytes()).digest;
    let store = Store::new(Config { platform: "linux/amd64".into(), ..Config::default() }).await;
    let put = |name: &str, body: &str| stub.put(&format!("/v2/old/manifests/{name}"), SIGNED, body.as_bytes());
    // Another payload under the digest; the right payload with other bytes in front.
    put(digest.as_str(), &sign(&text.replace("\"old\"", "\"new\"")));
    assert_eq!(store.pull(&format!("{}/old@{digest}", stub.host)).await.unwrap_err().kind, Kind::DataLoss);
    put(digest.as_str(), &sign(&text).replacen("{\n", "{ \n", 1));
    assert_eq!(store.pull(&format!("{}/old@{digest}", stub.host)).await.unwrap_err().kind, Kind::DataLoss);
    // Another machine: known before a layer is fetched.
    put("arm", &schema1(&stub, "old", "arm64", &["x"]));
    assert_eq!(store.pull(&format!("{}/old:arm", stub.host)).await.unwrap_err().kind, Kind::NotFound);
    assert!(stub.seen("/blobs/").is_empty());
    // A blob that is not what it is called.
    put("1", &sign(&text));
    let blob = descriptor(&gzip(&layer("x"))).digest;
    stub.put(&format!("/v2/old/blobs/{blob}"), "x", &gzip(&layer("z")));
    assert_eq!(store.pull(&format!("{}/old:1", stub.host)).await.unwrap_err().kind, Kind::DataLoss);
    assert!(store.provisioner.list().is_empty());
    assert_eq!(std::fs::read_dir(store.layout.staging()).unwrap().count(), 0);
    // The control.
    stub.blob("old", &gzip(&layer("x")));
    store.pull(&format!("{}/old:1", stub.host)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn short_names_lie_at_docker_registry() {
    let (own, other) = (Stub::honest(), Stub::honest());
    for (stub, repository, file) in [(&own, "busybox", "own"), (&own, "team/app", "app"), (&other, "busybox", "other")] {
        stub.put(&format!("/v2/{repository}/manifests/latest"), SIGNED, sign(&schema1(stub, repository, "amd64", &[file])).as_bytes());
    }
    let config = Config { platform: "linux/amd64".into(), docker_registry: own.url(), ..Config::default() };
    let store = Store::new(config.clone()).await;
    let id = store.pull("busybox").await.unwrap();
    let image = store.provisioner.resolve("busybox").unwrap();
    assert_eq!((&image.id, image.repo_tags.as_slice()), (&id, [format!("{}/busybox:latest", own.host)].as_slice()));
    // An explicit host wins; and the hub's image of that name is another one.
    let explicit = store.pull(&format!("{}/busybox", other.host)).await.unwrap();
    assert_ne!(explicit, id);
    assert!(store.provisioner.resolve("docker.io/library/busybox").is_none());
    assert_eq!(store.provisioner.resolve("busybox").unwrap().id, id);
    assert_eq!(store.provisioner.resolve(id.as_str()).unwrap().id, id);
    assert_eq!(store.provisioner.resolve(&id.as_str()[7..17]).unwrap().id, id);
    store.pull("team/app").await.unwrap();
    store.provisioner.remove("busybox").await.unwrap();
    assert!(store.provisioner.resolve("busybox").is_none() && store.provisioner.resolve(explicit.as_str()).is_some());
    let refusing = Store::new(Config { short_names: crate::provisioner::config::ShortNames::Refuse, ..config }).await;
    assert_eq!(refusing.pull("busybox").await.unwrap_err().kind, Kind::InvalidArgument);
    refusing.pull(&format!("{}/busybox", own.host)).await.unwrap();
}
