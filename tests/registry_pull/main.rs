//! Pulls from Debian's `docker-registry`, filled by `skopeo`: compressions, indexes, authentication, TLS; by the store alone, and by
//! a daemon.
#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used)] // the lint looks away inside #[test] functions only, not in their helpers

#[path = "../common/mod.rs"]
mod common;
mod daemon;
mod fixture;
mod hosts;
mod tokens;

use std::path::PathBuf;
use std::process::Command;

use mesocri::model::Kind;
use mesocri::provisioner::config::{Config, Registry as RegistryConfig};
use mesocri::provisioner::{Credentials, Images, Provisioner, PullEvent};
use tokio_util::sync::CancellationToken;

use fixture::{Compression, OciLayout, Options, Registry, Store, layer, request};

#[tokio::test(flavor = "multi_thread")]
async fn pulls_every_compression_and_provisions() {
    let registry = Registry::open();
    let oci = OciLayout::new();
    let layers = [
        (layer("gzip", 3_000_000), Compression::Gzip),
        (layer("zstd", 10), Compression::Zstd),
        (layer("plain", 100_000), Compression::None),
        (layer("gzip", 3_000_000), Compression::Gzip),
    ];
    let image = oci.image("amd64", &layers);
    registry.push(oci.finish(std::slice::from_ref(&image)), "a/b:1", &[]);
    let name = format!("{}/a/b:1", registry.host);

    let store = Store::new(Config::default()).await;
    let (events, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let id = store.provisioner.pull(request(&name, None), Some(events), CancellationToken::new()).await.unwrap();
    let found = store.provisioner.resolve(&name).unwrap();
    assert_eq!(found.id, id);
    assert_eq!(found.user().0, Some(7));
    assert!(found.size > 3_100_000);
    assert_eq!(found.repo_digests, [format!("{}/a/b@{}", registry.host, image["digest"].as_str().unwrap())]);
    let mut all = Vec::new();
    while let Ok(event) = seen.try_recv() {
        all.push(event);
    }
    assert!(matches!(&all[0], PullEvent::Resolved { layers } if layers.len() == 4));
    assert_eq!(all.last().unwrap(), &PullEvent::Committed);

    let rootfs = store.provisioner.provision("c1", &found).await.unwrap();
    assert_eq!(store.provisioner.provision("c1", &found).await.unwrap(), rootfs);
    let has = |file: &str| rootfs.lookup.iter().any(|dir| dir.join(file).exists());
    assert!(has("gzip/file") && has("zstd/file") && has("plain/link"));

    // The image goes, the container's layers stay until it goes too.
    store.provisioner.remove(&name).await.unwrap();
    assert!(store.provisioner.list().is_empty());
    assert!(has("gzip/file"));
    store.provisioner.release("c1").await.unwrap();
    assert_eq!(std::fs::read_dir(store.layout.layers()).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(store.layout.staging()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_equals_du_and_survives_a_restart() {
    let registry = Registry::open();
    let oci = OciLayout::new();
    let image = oci.image("amd64", &[(layer("a", 3_000_000), Compression::Gzip), (layer("b", 1), Compression::Gzip)]);
    registry.push(oci.finish(&[image]), "x:1", &[]);
    let store = Store::new(Config::default()).await;
    store.provisioner.pull(request(&format!("{}/x:1", registry.host), None), None, CancellationToken::new()).await.unwrap();
    let image = store.provisioner.list().remove(0);
    store.provisioner.provision("c1", &image).await.unwrap();
    let reopened = Provisioner::open(Config::default(), store.layout.clone()).await.unwrap();
    reopened.recover(&["c1".to_owned()]).await.unwrap();
    for provisioner in [&store.provisioner, &reopened] {
        let (dir, usage) = provisioner.fs_info().await.unwrap();
        let du = |args: &[&str]| {
            let out = Command::new("du").args(args).arg(&dir).output().unwrap();
            String::from_utf8(out.stdout).unwrap().split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        assert_eq!((usage.bytes, usage.inodes), (du(&["-s", "--block-size=1"]), du(&["-s", "--inodes"])));
    }
    reopened.recover(&[]).await.unwrap();
    assert_eq!(std::fs::read_dir(store.layout.rootfs_all()).unwrap().count(), 0);
    assert_eq!(reopened.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn chooses_from_an_index() {
    let registry = Registry::open();
    let oci = OciLayout::new();
    let entries: Vec<_> = ["arm64", "amd64"]
        .iter()
        .map(|arch| {
            let mut entry = oci.image(arch, &[(layer(arch, 10), Compression::Gzip)]);
            entry["platform"] = serde_json::json!({"os": "linux", "architecture": arch});
            entry
        })
        .collect();
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = oci.blob(media_type, serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).to_string().as_bytes());
    registry.push(oci.finish(std::slice::from_ref(&index)), "multi:1", &[]);
    let by_digest = format!("{}/multi@{}", registry.host, index["digest"].as_str().unwrap());
    for (platform, arch) in [("linux/arm64", "arm64"), ("linux/amd64", "amd64")] {
        let store = Store::new(Config { platform: platform.to_owned(), ..Config::default() }).await;
        store.provisioner.pull(request(&by_digest, None), None, CancellationToken::new()).await.unwrap();
        let image = store.provisioner.resolve(&by_digest).unwrap();
        assert_eq!((image.config.architecture.as_str(), image.repo_tags.len()), (arch, 0));
        assert_eq!(image.repo_digests, std::slice::from_ref(&by_digest));
    }
    let store = Store::new(Config { platform: "linux/riscv64".to_owned(), ..Config::default() }).await;
    let error = store.provisioner.pull(request(&by_digest, None), None, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn authenticates_over_tls() {
    let registry = Registry::start(&Options { htpasswd: true, tls: true, ..Options::default() });
    let oci = OciLayout::new();
    let image = oci.image("amd64", &[(layer("a", 10), Compression::Gzip)]);
    registry.push(oci.finish(&[image]), "x:1", &["--dest-creds", "user:secret"]);
    let name = format!("{}/x:1", registry.host);
    let ca: PathBuf = registry.dir.path().join("cert.pem");
    let mut config = Config::default();
    config.registries.insert(registry.host.clone(), RegistryConfig { ca_files: vec![ca], ..RegistryConfig::default() });
    let store = Store::new(config).await;
    let with = |password: &str, server: &str| {
        Some(Credentials { username: "user".into(), password: password.into(), server_address: server.into(), ..Credentials::default() })
    };
    for (credentials, kind) in
        [(None, Kind::Unauthenticated), (with("wrong", ""), Kind::Unauthenticated), (with("secret", "other:5000"), Kind::Unauthenticated)]
    {
        let error = store.provisioner.pull(request(&name, credentials), None, CancellationToken::new()).await.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
    }
    store.provisioner.pull(request(&name, with("secret", &registry.host)), None, CancellationToken::new()).await.unwrap();
    // The certificate is not one that the machine trusts.
    let mut config = Config::default();
    config.registries.insert(registry.host.clone(), RegistryConfig { mirrors: vec![format!("https://{}", registry.host)], ..RegistryConfig::default() });
    let strict = Store::new(config).await;
    let error = strict.provisioner.pull(request(&name, with("secret", "")), None, CancellationToken::new()).await.unwrap_err();
    assert!(strict.provisioner.list().is_empty(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_and_unknown() {
    let registry = Registry::open();
    let store = Store::new(Config::default()).await;
    let error = store.provisioner.pull(request(&format!("{}/nothing:1", registry.host), None), None, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound, "{error}");
    let host = registry.host.clone();
    drop(registry);
    let error = store.provisioner.pull(request(&format!("{host}/nothing:1"), None), None, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable);
    assert!(error.to_string().starts_with("RegistryUnavailable: "), "{error}");
}
