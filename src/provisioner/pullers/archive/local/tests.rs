//! Archives in every form on a shelf: found by name and tag, chosen by what is inside.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::model::Digest;
use crate::provisioner::engine::tests::{Store, config, layer};
use crate::provisioner::pullers::registry::tests::stub::{Answer, Stub};
use crate::provisioner::unpack::Hasher;
use crate::provisioner::{Images, PullRequest};

/// Members of an archive by name.
type Members = BTreeMap<String, Vec<u8>>;

fn docker(names: &[&str], file: &str) -> (Members, Digest) {
    let tar = layer(file);
    let document = config(&[Hasher::of(&tar, None).unwrap()], file);
    let id = Hasher::of(document.as_bytes(), None).unwrap();
    let manifest = serde_json::json!([{"Config": format!("{}.json", id.hex()), "RepoTags": names, "Layers": ["l/layer.tar"]}]);
    (
        [("l/layer.tar".into(), tar), (format!("{}.json", id.hex()), document.into_bytes()), ("manifest.json".into(), manifest.to_string().into_bytes())]
            .into(),
        id,
    )
}

/// Entries: annotations, file. Also gives the digest of each manifest.
fn oci(images: &[(serde_json::Value, &str)]) -> (Members, Vec<Digest>) {
    let mut members: Members = [("oci-layout".into(), b"{}".to_vec())].into();
    let mut blob = |bytes: &[u8]| {
        let digest = Hasher::of(bytes, None).unwrap();
        members.insert(format!("blobs/sha256/{}", digest.hex()), bytes.to_vec());
        serde_json::json!({"digest": digest.as_str(), "size": bytes.len()})
    };
    let mut entries = Vec::new();
    for (annotations, file) in images {
        let tar = layer(file);
        let document = config(&[Hasher::of(&tar, None).unwrap()], file);
        let manifest = serde_json::json!({"schemaVersion": 2, "config": blob(document.as_bytes()), "layers": [blob(&tar)]}).to_string();
        let mut entry = blob(manifest.as_bytes());
        entry["annotations"] = annotations.clone();
        entries.push(entry);
    }
    let digests = entries.iter().map(|e| e["digest"].as_str().unwrap().parse().unwrap()).collect();
    members.insert("index.json".into(), serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string().into_bytes());
    (members, digests)
}

/// Two layers with files, one without, as `docker save` wrote them in its first years.
fn legacy(repository: &str, tag: &str) -> Members {
    let layers = [("1", None, layer("x")), ("2", Some("1"), layer("y")), ("3", Some("2"), vec![0; 1024])];
    let mut members = Members::new();
    for (id, parent, tar) in layers {
        let mut v1 = serde_json::json!({"id": id, "created": format!("t{id}"), "os": "linux", "config": {"Cmd": ["sh"], "Labels": {"l": id}}});
        if let Some(parent) = parent {
            v1["parent"] = parent.into();
        }
        members.insert(format!("{id}/json"), v1.to_string().into_bytes());
        members.insert(format!("{id}/layer.tar"), tar);
        members.insert(format!("{id}/VERSION"), b"1.0".to_vec());
    }
    members.insert("repositories".into(), serde_json::json!({repository: {tag: "3"}}).to_string().into_bytes());
    members
}

fn tar(members: &Members) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (name, data) in members {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, data.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn put(path: PathBuf, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn put_dir(path: &Path, members: &Members) {
    for (name, bytes) in members {
        put(path.join(name), bytes);
    }
}

fn named(name: &str) -> serde_json::Value {
    serde_json::json!({"org.opencontainers.image.ref.name": name})
}

struct Bench {
    store: Store,
    shelf: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        let shelf = tempfile::tempdir().unwrap();
        let config = Config { docker_registry: shelf.path().display().to_string(), ..Config::default() };
        Self { store: Store::new(config).await, shelf }
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        put(self.shelf.path().join(name), bytes);
    }

    async fn ask(&self, name: &str, cached: bool) -> Result<Arc<crate::model::image::Image>> {
        let request = PullRequest { reference: name.parse()?, credentials: None, cached };
        let id = self.store.provisioner.pull(request, None, CancellationToken::new()).await?;
        Ok(self.store.provisioner.resolve(id.as_str()).unwrap())
    }

    async fn pull(&self, name: &str) -> Result<Arc<crate::model::image::Image>> {
        self.ask(name, false).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_under_every_name() {
    let gz = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, bytes).unwrap();
        encoder.finish().unwrap()
    };
    let (one, id) = docker(&["busybox:1"], "a");
    let layout = oci(&[(named("1"), "a")]).0;
    let full = oci(&[(serde_json::json!({"io.containerd.image.name": "docker.io/library/busybox:1"}), "a")]).0;
    type Put = fn(&Bench, &Members);
    let cases: Vec<(&str, &Members, Put)> = vec![
        ("busybox:1", &one, |b, m| b.put("busybox:1.tar", &tar(m))),
        ("busybox:1", &one, |b, m| b.put("busybox/1.tar", &tar(m))),
        ("busybox:1", &one, |b, m| b.put("busybox.tar", &tar(m))),
        ("busybox:1", &one, |b, m| b.put("busybox:1", &tar(m))),
        ("busybox:1", &one, |b, m| put_dir(&b.shelf.path().join("busybox"), m)),
        ("busybox:1", &layout, |b, m| put_dir(&b.shelf.path().join("busybox"), m)),
        ("busybox:1", &layout, |b, m| put_dir(&b.shelf.path().join("busybox/1"), m)),
        ("busybox:1", &layout, |b, m| b.put("busybox:1.tar", &tar(m))),
        ("busybox:1", &full, |b, m| b.put("busybox:1.tar", &tar(m))),
    ];
    for (n, (name, members, place)) in cases.into_iter().enumerate() {
        let bench = Bench::new().await;
        place(&bench, members);
        let image = bench.pull(name).await.unwrap_or_else(|e| panic!("case {n}: {e}"));
        assert_eq!((image.id.as_str(), image.repo_tags.as_slice()), (id.as_str(), ["docker.io/library/busybox:1".to_owned()].as_slice()), "case {n}");
        // As the kubelet asks for it afterwards.
        assert!(bench.store.provisioner.resolve("busybox:1").is_some());
    }
    let bench = Bench::new().await;
    bench.put("busybox:1.tar.gz", &gz(&tar(&one)));
    bench.pull("busybox:1").await.unwrap();
    // Names with slashes, and archives made elsewhere under another host.
    let bench = Bench::new().await;
    bench.put("corp/app/x:2.tar", &tar(&docker(&["quay.io/corp/app/x:2"], "a").0));
    assert_eq!(bench.pull("corp/app/x:2").await.unwrap().repo_tags, ["docker.io/corp/app/x:2"]);
    // Nothing is called latest.
    bench.put("plain:latest.tar", &tar(&docker(&["plain:latest"], "a").0));
    bench.pull("plain").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_form_with_a_chain_of_layers() {
    let bench = Bench::new().await;
    let members = legacy("corp/old", "3");
    bench.put("corp/old:3.tar", &tar(&members));
    let image = bench.pull("corp/old:3").await.unwrap();
    assert_eq!((image.layers.len(), image.config.cmd.as_slice()), (3, ["sh".to_owned()].as_slice()));
    let hashes: Vec<Digest> = ["1", "2", "3"].iter().map(|id| Hasher::of(&members[&format!("{id}/layer.tar")], None).unwrap()).collect();
    assert_eq!(image.layers.iter().map(|l| l.diff_id.clone()).collect::<Vec<_>>(), hashes);
    assert_eq!(image.config.labels["l"], "3");
    // `mesocri load` takes it too, under its own name.
    let other = Store::new(Config::default()).await;
    other.provisioner.load(&bench.shelf.path().join("corp/old:3.tar")).await.unwrap();
    assert_eq!(other.provisioner.list()[0].repo_tags, ["docker.io/corp/old:3"]);
    // A chain that bites its tail, and one that lacks a link.
    for (key, value) in [("1/json", r#"{"id":"1","parent":"3"}"#), ("2/json", r#"{"id":"2","parent":"gone"}"#)] {
        let mut bad = members.clone();
        bad.insert(key.into(), value.into());
        bench.put("corp/bad:3.tar", &tar(&bad));
        let kind = bench.pull("corp/bad:3").await.unwrap_err().kind;
        assert!(matches!(kind, Kind::ResourceExhausted | Kind::DataLoss), "{key}: {kind:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_inside_decides() {
    let bench = Bench::new().await;
    bench.put("busybox:2.tar", &tar(&docker(&["busybox:1", "other:7"], "a").0));
    let e = bench.pull("busybox:2").await.unwrap_err();
    assert_eq!(e.kind, Kind::NotFound);
    for word in ["busybox:2.tar", "docker.io/library/busybox:1", "docker.io/library/other:7"] {
        assert!(e.to_string().contains(word), "{e}");
    }
    // Of several the right one, and under no further name.
    let (members, digests) = oci(&[(named("1"), "a"), (named("2"), "b"), (named("quay.io/evil/x:1"), "c")]);
    bench.put("multi.tar", &tar(&members));
    assert_eq!(bench.pull("multi:2").await.unwrap().config.labels["l"], "b");
    assert_eq!(bench.store.provisioner.list().iter().map(|i| i.repo_tags.len()).sum::<usize>(), 1);
    assert!(bench.store.provisioner.resolve("quay.io/evil/x:1").is_none());
    let e = bench.pull("multi:3").await.unwrap_err();
    assert!(e.to_string().contains("tag \"1\", tag \"2\", quay.io/evil/x:1"), "{e}");
    // By digest: that of the manifest.
    let image = bench.pull(&format!("multi@{}", digests[0])).await.unwrap();
    assert_eq!((image.config.labels["l"].as_str(), image.repo_tags.len()), ("a", 0));
    assert_eq!(image.repo_digests, [format!("docker.io/library/multi@{}", digests[0])]);
    let missing = format!("multi@sha256:{}", "0".repeat(64));
    assert_eq!(bench.pull(&missing).await.unwrap_err().kind, Kind::NotFound);
    // An image without a name is what was asked for if it is alone.
    bench.put("nameless:5.tar", &tar(&docker(&[], "n").0));
    assert_eq!(bench.pull("nameless:5").await.unwrap().repo_tags, ["docker.io/library/nameless:5"]);
    // No archive at all, a broken one, one that lies about its layer.
    let e = bench.pull("nothing:1").await.unwrap_err();
    assert!(e.kind == Kind::NotFound && e.to_string().contains("nothing:1.tar"), "{e}");
    bench.put("broken:1.tar", b"not a tar file");
    assert_eq!(bench.pull("broken:1").await.unwrap_err().kind, Kind::InvalidArgument);
    let (mut lie, _) = docker(&["lie:1"], "honest");
    lie.insert("l/layer.tar".into(), layer("z"));
    bench.put("lie:1.tar", &tar(&lie));
    assert_eq!(bench.pull("lie:1").await.unwrap_err().kind, Kind::DataLoss);
    assert_eq!(std::fs::read_dir(bench.store.layout.staging()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_with_a_host_and_aliases_go_to_the_registry() {
    let asked = Stub::new(|_| Some(Answer::status(404)));
    let bench = Bench::new().await;
    let config = |n: &str| Config { docker_registry: n.to_owned(), ..Config::default() };
    bench.put("x:1.tar", &tar(&docker(&["x:1"], "a").0));
    let e = bench.pull(&format!("{}/x:1", asked.host)).await.unwrap_err();
    assert!(e.kind == Kind::NotFound && !asked.seen("/v2/x/manifests/1").is_empty(), "{e}");
    let short: Reference = "a/b:1".parse().unwrap();
    let mut aliased = config("/images");
    aliased.short_name_aliases.insert("a/b".into(), "quay.io/a/b".into());
    assert_eq!(aliased.shelf(&short), None);
    for (registry, directory) in [
        ("/images/", Some("/images")),
        ("file:///images", Some("/images")),
        ("hdfs://nn/images", Some("hdfs://nn/images")),
        ("https://registry", None),
        ("registry.corp:5000", None),
    ] {
        assert_eq!(config(registry).shelf(&short).map(|s| s.directory).as_deref(), directory, "{registry}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_is_enough_or_asks_again() {
    let bench = Bench::new().await;
    bench.put("x:1.tar", &tar(&docker(&["x:1"], "a").0));
    let first = bench.ask("x:1", true).await.unwrap();
    bench.put("x:1.tar", &tar(&docker(&["x:1"], "b").0));
    assert_eq!(bench.ask("x:1", true).await.unwrap().id, first.id);
    let second = bench.ask("x:1", false).await.unwrap();
    assert_ne!(second.id, first.id);
    assert_eq!(bench.ask("x:1", true).await.unwrap().id, second.id);
    // The source is gone: what is there is still enough, and asking again is an error.
    std::fs::remove_file(bench.shelf.path().join("x:1.tar")).unwrap();
    assert_eq!(bench.ask("x:1", true).await.unwrap().id, second.id);
    assert_eq!(bench.ask("x:1", false).await.unwrap_err().kind, Kind::NotFound);
    // A name that the store does not have is asked for whatever the wish.
    assert_eq!(bench.ask("y:1", true).await.unwrap_err().kind, Kind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shelf_in_hdfs_has_no_colons() {
    let archive = tar(&docker(&["corp/app:2"], "a").0);
    let stub = Stub::new(move |r| {
        let path = r.path.split('?').next().unwrap_or_default();
        Some(match (path, r.path.contains("op=OPEN")) {
            ("/webhdfs/v1/images/corp/app/2.tar", true) => Answer::ok(archive.clone()),
            ("/webhdfs/v1/images/corp/app/2.tar", false) => {
                Answer::ok(format!(r#"{{"FileStatus":{{"length":{},"type":"FILE","modificationTime":1}}}}"#, archive.len()))
            }
            (p, _) if p.contains(':') => {
                Answer { status: 400, ..Answer::ok(r#"{"RemoteException":{"exception":"InvalidPathException","message":"Invalid file name"}}"#) }
            }
            _ => Answer { status: 404, ..Answer::ok(r#"{"RemoteException":{"exception":"FileNotFoundException","message":"File does not exist"}}"#) },
        })
    });
    let mut config = Config { docker_registry: "hdfs://cluster/images".to_owned(), ..Config::default() };
    config.hdfs.webhdfs.insert("cluster".to_owned(), vec![stub.url()]);
    let store = Store::new(config).await;
    store.pull(&"corp/app:2".parse().unwrap()).await.unwrap();
    assert_eq!(store.provisioner.list()[0].repo_tags, ["docker.io/corp/app:2"]);
    let e = store.pull(&"corp/app:3".parse().unwrap()).await.unwrap_err();
    assert!(e.kind == Kind::NotFound && e.to_string().contains("hdfs://cluster/images/corp/app/3.tar"), "{e}");
    assert_eq!(std::fs::read_dir(store.layout.staging()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_of_an_archive_leaves_nothing() {
    let bench = Bench::new().await;
    let (members, _) = docker(&["x:1"], "a");
    bench.put("x:1.tar", &tar(&members));
    let cancel = CancellationToken::new();
    cancel.cancel();
    let request = PullRequest { reference: "x:1".parse().unwrap(), credentials: None, cached: false };
    assert_eq!(bench.store.provisioner.pull(request, None, cancel).await.unwrap_err().kind, Kind::Cancelled);
    bench.store.assert_empty();
}
