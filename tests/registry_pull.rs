//! Pulls from Debian's `docker-registry`, filled by `skopeo`: compressions, indexes, authentication, TLS. Skipped where the
//! programs are missing.
#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used)] // the lint looks away inside #[test] functions only, not in their helpers

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesocri::disk::Layout;
use mesocri::model::Kind;
use mesocri::provisioner::config::{Config, Registry as RegistryConfig};
use mesocri::provisioner::{Credentials, Images, Provisioner, PullEvent, PullRequest};
use sha2::Digest as _;
use tokio_util::sync::CancellationToken;

/// A registry process with its storage; both go with the value.
struct Registry {
    child: Child,
    host: String,
    dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn installed() -> bool {
    ["docker-registry", "skopeo", "openssl", "htpasswd"]
        .iter()
        .all(|p| Command::new(p).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok())
}

fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

impl Registry {
    fn start(auth: bool, tls: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The registry cannot report a port it chose itself; another process may take ours meanwhile, then the wait below fails.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let mut config = format!("version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n", path("data"));
        if tls {
            run(Command::new("openssl")
                .args([
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    "/CN=127.0.0.1",
                    "-addext",
                    "basicConstraints=critical,CA:FALSE",
                ])
                .args(["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", &path("key.pem"), "-out", &path("cert.pem")]));
            config += &format!("  tls:\n    certificate: {}\n    key: {}\n", path("cert.pem"), path("key.pem"));
        }
        if auth {
            run(Command::new("htpasswd").args(["-Bbc", &path("htpasswd"), "user", "secret"]));
            config += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path("htpasswd"));
        }
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("docker-registry").arg("serve").arg(path("config.yml")).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let this = Self { child, host, dir };
        let end = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&this.host).is_err() {
            assert!(Instant::now() < end, "registry does not listen: {}", std::fs::read_to_string(this.dir.path().join("log")).unwrap());
            std::thread::yield_now();
        }
        this
    }

    fn push(&self, layout: &Path, name: &str, more: &[&str]) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--all", "--preserve-digests", "--insecure-policy", "--dest-tls-verify=false"]).args(more);
        run(command.arg(format!("oci:{}", layout.display())).arg(format!("docker://{}/{name}", self.host)));
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// A directory as an uncompressed layer.
fn tar_of(build: impl FnOnce(&Path)) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    build(dir.path());
    let out = Command::new("tar").args(["--sort=name", "--numeric-owner", "--xattrs", "-C"]).arg(dir.path()).args(["-cf", "-", "."]).output().unwrap();
    assert!(out.status.success());
    out.stdout
}

fn filter(program: &str, input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program).args(["-c"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let out = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    out.stdout
}

fn sha(bytes: &[u8]) -> String {
    format!("{:x}", sha2::Sha256::digest(bytes))
}

/// An OCI layout under construction.
struct OciLayout {
    dir: tempfile::TempDir,
}

impl OciLayout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir }
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let hex = sha(bytes);
        std::fs::write(self.dir.path().join("blobs/sha256").join(&hex), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len()})
    }

    fn image(&self, arch: &str, layers: &[(Vec<u8>, Compression)]) -> serde_json::Value {
        let diff_ids: Vec<_> = layers.iter().map(|(tar, _)| format!("sha256:{}", sha(tar))).collect();
        let config = serde_json::json!({"os": "linux", "architecture": arch, "config": {"Env": ["A=b"], "User": "7:8"}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let layers: Vec<_> = layers
            .iter()
            .map(|(tar, compression)| match compression {
                Compression::None => self.blob("application/vnd.oci.image.layer.v1.tar", tar),
                Compression::Gzip => self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &filter("gzip", tar)),
                Compression::Zstd => self.blob("application/vnd.oci.image.layer.v1.tar+zstd", &filter("zstd", tar)),
            })
            .collect();
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        self.blob(media_type, manifest.to_string().as_bytes())
    }

    fn finish(&self, entries: &[serde_json::Value]) -> &Path {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": entries});
        std::fs::write(self.dir.path().join("index.json"), index.to_string()).unwrap();
        self.dir.path()
    }
}

struct Store {
    provisioner: Arc<Provisioner>,
    layout: Layout,
    _dir: tempfile::TempDir,
}

async fn store(config: Config) -> Store {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
    Store { provisioner: Provisioner::open(config, layout.clone()).await.unwrap(), layout, _dir: dir }
}

fn request(name: &str, credentials: Option<Credentials>) -> PullRequest {
    PullRequest { reference: name.parse().unwrap(), credentials }
}

fn layer(name: &str, size: usize) -> Vec<u8> {
    tar_of(|dir| {
        std::fs::create_dir(dir.join(name)).unwrap();
        std::fs::write(dir.join(name).join("file"), vec![b'x'; size]).unwrap();
        std::os::unix::fs::symlink("file", dir.join(name).join("link")).unwrap();
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_every_compression_and_provisions() {
    if !installed() {
        return;
    }
    let registry = Registry::start(false, false);
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

    let store = store(Config::default()).await;
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
    if !installed() {
        return;
    }
    let registry = Registry::start(false, false);
    let oci = OciLayout::new();
    let image = oci.image("amd64", &[(layer("a", 3_000_000), Compression::Gzip), (layer("b", 1), Compression::Gzip)]);
    registry.push(oci.finish(&[image]), "x:1", &[]);
    let store = store(Config::default()).await;
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
    if !installed() {
        return;
    }
    let registry = Registry::start(false, false);
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
        let store = store(Config { platform: platform.to_owned(), ..Config::default() }).await;
        store.provisioner.pull(request(&by_digest, None), None, CancellationToken::new()).await.unwrap();
        let image = store.provisioner.resolve(&by_digest).unwrap();
        assert_eq!((image.config.architecture.as_str(), image.repo_tags.len()), (arch, 0));
        assert_eq!(image.repo_digests, std::slice::from_ref(&by_digest));
    }
    let store = store(Config { platform: "linux/riscv64".to_owned(), ..Config::default() }).await;
    let error = store.provisioner.pull(request(&by_digest, None), None, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn authenticates_over_tls() {
    if !installed() {
        return;
    }
    let registry = Registry::start(true, true);
    let oci = OciLayout::new();
    let image = oci.image("amd64", &[(layer("a", 10), Compression::Gzip)]);
    registry.push(oci.finish(&[image]), "x:1", &["--dest-creds", "user:secret"]);
    let name = format!("{}/x:1", registry.host);
    let ca: PathBuf = registry.dir.path().join("cert.pem");
    let mut config = Config::default();
    config.registries.insert(registry.host.clone(), RegistryConfig { ca_files: vec![ca], ..RegistryConfig::default() });
    let store = store(config).await;
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
    let strict = self::store(config).await;
    let error = strict.provisioner.pull(request(&name, with("secret", "")), None, CancellationToken::new()).await.unwrap_err();
    assert!(strict.provisioner.list().is_empty(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_and_unknown() {
    if !installed() {
        return;
    }
    let registry = Registry::start(false, false);
    let store = store(Config::default()).await;
    let error = store.provisioner.pull(request(&format!("{}/nothing:1", registry.host), None), None, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound, "{error}");
    let host = registry.host.clone();
    drop(registry);
    let error = store.provisioner.pull(request(&format!("{host}/nothing:1"), None), None, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable);
    assert!(error.to_string().starts_with("RegistryUnavailable: "), "{error}");
}
