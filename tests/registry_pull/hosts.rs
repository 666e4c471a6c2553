//! `hosts.toml` against real TLS: authorities, client certificates, mirrors that go; credentials from documents and helpers;
//! manifests of schema 1 as a registry serves them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use mesocri::model::Kind;
use mesocri::provisioner::Images;
use mesocri::provisioner::config::{Config, Secret};

use crate::fixture::{Compression, OciLayout, Options, Registry, Store, certificate, layer, run, user};

/// A directory as containerd has it, and settings that name it.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, host: &str, text: &str) {
        let dir = self.0.path().join(host);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    fn config(&self) -> Config {
        Config { registry_config_dir: self.0.path().to_owned(), pull_retries: 0, ..Config::default() }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn authorities_and_client_certificates_are_read_at_each_pull() {
    let ours = tempfile::tempdir().unwrap();
    let file = |name: &str| ours.path().join(name);
    certificate(&file("c.pem"), &file("k.pem"));
    let registry = Registry::start(&Options { tls: true, client_ca: Some(&file("c.pem")), ..Options::default() });
    let certs = tempfile::tempdir().unwrap();
    for (from, to) in [(file("c.pem"), "client.cert"), (file("k.pem"), "client.key")] {
        std::fs::copy(from, certs.path().join(to)).unwrap();
    }
    registry.push(OciLayout::simple("a").path(), "a:1", &["--dest-cert-dir", &certs.path().display().to_string()]);
    let name = format!("{}/a:1", registry.host);
    let (ca, client) = (registry.cert().display().to_string(), format!("client = [[\"{}\", \"{}\"]]", file("c.pem").display(), file("k.pem").display()));
    let server = format!("server = \"https://{}\"\n", registry.host);
    let dir = Dir::new();
    let store = Store::new(dir.config()).await;
    for (settings, good) in [
        // Neither may be missing; the last two are the controls.
        (server.clone(), false),
        (format!("{server}ca = \"{ca}\"\n"), false),
        (format!("{server}{client}\n"), false),
        (format!("{server}skip_verify = true\n"), false),
        (format!("{server}ca = \"{ca}\"\n{client}\n"), true),
        (format!("{server}skip_verify = true\n{client}\n"), true),
    ] {
        dir.write(&registry.host, &settings);
        let result = store.pull(&name, None).await;
        match &result {
            Ok(_) => assert!(good, "{settings}"),
            Err(e) => assert!(!good && e.kind == Kind::Unavailable && e.to_string().starts_with("RegistryUnavailable: "), "{settings}{e}"),
        }
    }
    // Docker's form of the same.
    let own = dir.0.path().join(&registry.host);
    std::fs::remove_file(own.join("hosts.toml")).unwrap();
    for (from, to) in [(registry.cert(), "ca.crt"), (file("c.pem"), "client.cert"), (file("k.pem"), "client.key")] {
        std::fs::copy(from, own.join(to)).unwrap();
    }
    store.pull(&name, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untrusted_certificate_is_named_and_not_tried_again() {
    let registry = Registry::start(&Options { tls: true, ..Options::default() });
    let dir = Dir::new();
    dir.write("_default", &format!("server = \"https://{}\"\n", registry.host));
    // With a hundred retries it would take minutes if it were tried again.
    let store = Store::new(Config { pull_retries: 100, ..dir.config() }).await;
    let error = store.pull("registry.invalid/a:1", None).await.unwrap_err();
    assert!(error.kind == Kind::Unavailable && error.to_string().contains("certificate"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_by_file_and_the_origin_when_they_are_gone() {
    let (mirror, origin) = (Registry::open(), Registry::open());
    let image = OciLayout::simple("a");
    mirror.push(image.path(), "a:1", &[]);
    origin.push(image.path(), "a:1", &[]);
    mirror.push(image.path(), "only/mirrored:1", &[]);
    let dir = Dir::new();
    dir.write(&origin.host, &format!("server = \"http://{}\"\n[host.\"http://{}/v2\"]\n  override_path = true\n", origin.host, mirror.host));
    let store = Store::new(dir.config()).await;
    let (a, mirrored) = (format!("{}/a:1", origin.host), format!("{}/only/mirrored:1", origin.host));
    let id = store.pull(&mirrored, None).await.unwrap();
    drop(mirror);
    assert_eq!(store.pull(&a, None).await.unwrap(), id);
    let error = store.pull(&mirrored, None).await.unwrap_err();
    assert!(error.kind == Kind::NotFound && error.to_string().contains("(mirror 127.0.0.1:"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_by_document_and_helper() {
    let registry = Registry::start(&Options { htpasswd: true, ..Options::default() });
    registry.push(OciLayout::simple("a").path(), "a:1", &["--dest-creds", "user:secret"]);
    let name = format!("{}/a:1", registry.host);
    let dir = tempfile::tempdir().unwrap();
    let document = dir.path().join("config.json");
    // As `docker login` writes it.
    std::fs::write(&document, format!(r#"{{"auths":{{"{}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#, registry.host)).unwrap();
    let config = |setting: &str| Config { docker_config: Secret(setting.to_owned()), credential_helper_dirs: vec![dir.path().to_owned()], ..Config::default() };
    Store::new(config(&document.display().to_string())).await.pull(&name, None).await.unwrap();
    // What comes with the request wins, for better or worse.
    let error = Store::new(config(&document.display().to_string())).await.pull(&name, user("wrong")).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unauthenticated, "{error}");
    let helper = dir.path().join("docker-credential-test");
    std::fs::write(
        &helper,
        "#!/bin/sh\nread server\necho \"{\\\"ServerURL\\\":\\\"$server\\\",\\\"Username\\\":\\\"user\\\",\\\"Secret\\\":\\\"secret\\\"}\"\n",
    )
    .unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    Store::new(config(r#"{"credsStore":"test"}"#)).await.pull(&name, None).await.unwrap();
    // The control: without any of them the registry gives nothing.
    assert_eq!(Store::new(Config::default()).await.pull(&name, None).await.unwrap_err().kind, Kind::Unauthenticated);
}

/// Where a registry keeps the document that a tag names.
fn stored_manifests(registry: &Registry) -> Vec<u8> {
    run(std::process::Command::new("grep").args(["-rl", "fsLayers"]).arg(Path::new(registry.dir.path()).join("data")))
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_1_as_skopeo_signs_it_and_the_registry_serves_it() {
    let registry = Registry::start(&Options { schema1: true, ..Options::default() });
    let oci = OciLayout::new();
    let layers = [(layer("low", 100), Compression::Gzip), (layer("high", 50_000), Compression::Gzip)];
    let image = oci.image("amd64", &layers);
    registry.copy(oci.finish(&[image]), "old:1", &["--format", "v2s1"], &[]);
    assert!(!stored_manifests(&registry).is_empty());
    let store = Store::new(Config { platform: "linux/amd64".into(), ..Config::default() }).await;
    let id = store.pull(&format!("{}/old:1", registry.host), None).await.unwrap();
    let image = store.provisioner.resolve(id.as_str()).unwrap();
    assert_eq!((image.layers.len(), image.user().0, image.config.env.as_slice()), (2, Some(7), ["A=b".to_owned()].as_slice()));
    for ((tar, _), layer) in layers.iter().zip(&image.layers) {
        assert_eq!(layer.diff_id.hex(), crate::fixture::sha(tar));
    }
    // The digest that we computed is the one under which the registry has it.
    let other = Store::new(Config { platform: "linux/amd64".into(), ..Config::default() }).await;
    assert_eq!(other.pull(&image.repo_digests[0], None).await.unwrap(), id);
    let rootfs = other.provisioner.provision("c", &other.provisioner.resolve(id.as_str()).unwrap()).await.unwrap();
    assert!(["low/file", "high/link"].iter().all(|f| rootfs.lookup.iter().any(|dir| dir.join(f).exists())));
    other.provisioner.release("c").await.unwrap();
}
