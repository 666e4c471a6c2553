//! Images out and in again: by way of the archive everything stays but the digests, and the second time those too.

use std::collections::BTreeMap;
use std::io::Read as _;

use super::*;
use crate::model::error::Kind;
use crate::provisioner::engine::tests::{Store, config, layer};
use crate::provisioner::{Config, Images, Upkeep};

/// What `keys` are saved as.
async fn saved(store: &Store, keys: &[&str], format: Format) -> Result<Vec<u8>> {
    let (to, mut pieces) = mpsc::channel::<Bytes>(2);
    let keys = keys.iter().map(|k| (*k).to_owned()).collect();
    let collect = async {
        let mut all = Vec::new();
        while let Some(piece) = pieces.recv().await {
            all.extend_from_slice(&piece);
        }
        all
    };
    let (result, all) = tokio::join!(store.provisioner.save(keys, format, to), collect);
    result.map(|()| all)
}

async fn import(store: &Store, bytes: &[u8]) -> Result<Vec<crate::model::ImageId>> {
    let mut incoming = store.provisioner.import().await?;
    for piece in bytes.chunks(100_000) {
        incoming.write(Bytes::copy_from_slice(piece)).await?;
    }
    incoming.finish().await
}

fn members(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut archive = ::tar::Archive::new(archive);
    let read = |e: std::io::Result<::tar::Entry<'_, &[u8]>>| {
        let mut entry = e.unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (entry.path().unwrap().display().to_string(), bytes)
    };
    archive.entries().unwrap().map(read).collect()
}

/// A store with `a:1` and `a:2`, which share a layer, and `b:1`.
async fn filled(config_of_store: Config) -> Store {
    let store = Store::new(config_of_store).await;
    let archive = store.dir.path().join("in.tar");
    let mut builder = ::tar::Builder::new(std::fs::File::create(&archive).unwrap());
    let mut add = |name: &str, data: &[u8]| {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, data).unwrap();
    };
    let mut entries = Vec::new();
    for (name, files) in [("a:1", ["x", "y"].as_slice()), ("a:2", &["x", "y", "z"]), ("b:1", &["x", "x"])] {
        let tars: Vec<Vec<u8>> = files.iter().map(|f| layer(f)).collect();
        let ids: Vec<Digest> = tars.iter().map(|t| Hasher::of(t, None).unwrap()).collect();
        let document = config(&ids, name);
        add(&format!("{name}.json"), document.as_bytes());
        for (file, tar) in files.iter().zip(&tars) {
            add(&format!("{file}.tar"), tar);
        }
        entries.push(json!({"Config": format!("{name}.json"), "RepoTags": [name], "Layers": files.iter().map(|f| format!("{f}.tar")).collect::<Vec<_>>()}));
    }
    add("manifest.json", Value::from(entries).to_string().as_bytes());
    builder.into_inner().unwrap();
    store.provisioner.load(&archive).await.unwrap();
    store
}

#[tokio::test(flavor = "multi_thread")]
async fn out_and_in_and_out_again() {
    for backend in ["", "erofs"] {
        let store = filled(Config { backend: backend.to_owned(), ..Config::default() }).await;
        for format in [Format::Oci, Format::Docker] {
            let first = saved(&store, &["a:1", "a:2", "b:1"], format).await.unwrap();
            let other = Store::new(Config::default()).await;
            let ids = import(&other, &first).await.unwrap();
            assert_eq!(ids.len(), 3);
            for name in ["a:1", "a:2", "b:1"] {
                let (before, after) = (store.provisioner.resolve(name).unwrap(), other.provisioner.resolve(name).unwrap());
                assert_eq!((&before.repo_tags, &before.config, before.layers.len()), (&after.repo_tags, &after.config, after.layers.len()));
            }
            assert!(saved(&other, &["a:1", "a:2", "b:1"], format).await.unwrap() == first, "{backend} {format}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archive_says_what_tools_look_for() {
    let store = filled(Config::default()).await;
    let archive = members(&saved(&store, &["a:1"], Format::Docker).await.unwrap());
    let index: Value = serde_json::from_slice(&archive["index.json"]).unwrap();
    let annotations = &index["manifests"][0]["annotations"];
    assert_eq!(annotations["io.containerd.image.name"], "docker.io/library/a:1");
    assert_eq!(annotations["org.opencontainers.image.ref.name"], "1");
    let entries: Value = serde_json::from_slice(&archive["manifest.json"]).unwrap();
    assert_eq!(entries[0]["RepoTags"], json!(["docker.io/library/a:1"]));
    assert!(archive.contains_key(entries[0]["Config"].as_str().unwrap()));
    // Every blob is what it is called.
    for (name, bytes) in archive.iter().filter(|(n, b)| n.starts_with("blobs/sha256/") && !b.is_empty()) {
        assert!(name.ends_with(Hasher::of(bytes, None).unwrap().hex()), "{name}");
    }
    // Images that share a tag are told apart by full names; shared layers are there once.
    let archive = members(&saved(&store, &["a:1", "b:1"], Format::Oci).await.unwrap());
    let index: Value = serde_json::from_slice(&archive["index.json"]).unwrap();
    assert_eq!(index["manifests"][1]["annotations"]["org.opencontainers.image.ref.name"], "docker.io/library/b:1");
    assert!(!archive.contains_key("manifest.json"));
    // Layers x and y, two configurations, two manifests.
    assert_eq!(archive.keys().filter(|n| n.starts_with("blobs/sha256/") && n.len() > 20).count(), 6);
    // By id: all its names.
    let id = store.provisioner.resolve("a:1").unwrap().id.to_string();
    let archive = members(&saved(&store, &[&id], Format::Oci).await.unwrap());
    let index: Value = serde_json::from_slice(&archive["index.json"]).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_saved_is_said_and_who_leaves_is_no_error_of_the_store() {
    let store = filled(Config::default()).await;
    assert_eq!(saved(&store, &["nothing:1"], Format::Oci).await.unwrap_err().kind, Kind::NotFound);
    assert_eq!(saved(&store, &[], Format::Oci).await.unwrap_err().kind, Kind::InvalidArgument);
    let (to, pieces) = mpsc::channel(1);
    drop(pieces);
    assert!(store.provisioner.save(vec!["a:1".to_owned()], Format::Oci, to).await.is_err());
    // Nothing is held any more.
    for name in ["a:1", "a:2", "b:1"] {
        store.provisioner.remove(name).await.unwrap();
    }
    store.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_is_bounded_and_forgotten_when_it_breaks_off() {
    let store = filled(Config::default()).await;
    let archive = saved(&store, &["a:1"], Format::Oci).await.unwrap();
    let mut small = Config::default();
    small.limits.layer_bytes = archive.len() as u64 - 1;
    let other = Store::new(small).await;
    assert_eq!(import(&other, &archive).await.unwrap_err().kind, Kind::ResourceExhausted);
    let mut incoming = other.provisioner.import().await.unwrap();
    incoming.write(Bytes::copy_from_slice(&archive[..1000])).await.unwrap();
    drop(incoming);
    assert!(import(&other, &archive[..archive.len() / 2]).await.is_err());
    assert!(import(&other, b"").await.is_err());
    other.assert_empty();
}
