//! Debian's `docker-registry` as a process, images for it, and a store of ours.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use mesocri::disk::Layout;
use mesocri::model::ImageId;
use mesocri::model::error::Result;
use mesocri::provisioner::config::Config;
use mesocri::provisioner::{Credentials, Images, Provisioner, PullRequest};
use sha2::Digest as _;
use tokio_util::sync::CancellationToken;

/// A registry process with its storage; both go with the value.
pub struct Registry {
    child: Child,
    pub host: String,
    pub dir: tempfile::TempDir,
}

/// How a registry guards itself.
#[derive(Default)]
pub struct Options<'a> {
    /// User `user` with password `secret`.
    pub htpasswd: bool,
    /// With the certificate `cert.pem` in its directory.
    pub tls: bool,
    /// Only clients whose certificate is signed by this.
    pub client_ca: Option<&'a Path>,
    /// URL of a token server, and the certificate it signs with.
    pub token: Option<(String, PathBuf)>,
    /// Takes manifests of schema 1.
    pub schema1: bool,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fails with the name of the package that has `program`.
fn missing(program: &str, error: &std::io::Error) -> ! {
    let package = if program == "htpasswd" { "apache2-utils" } else { program };
    panic!("run {program}: {error}; package {package} is needed (hack/dev deps test)")
}

pub fn run(command: &mut Command) -> Vec<u8> {
    let out = command.output().unwrap_or_else(|e| missing(&command.get_program().to_string_lossy(), &e));
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

/// A certificate for this machine that vouches for itself, and its key.
pub fn certificate(cert: &Path, key: &Path) {
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args([Path::new("-keyout"), key, Path::new("-out"), cert]));
}

impl Registry {
    pub fn open() -> Self {
        Self::start(&Options::default())
    }

    pub fn start(options: &Options<'_>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let mut config = format!("version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: ADDRESS\n", path("data"));
        if options.tls {
            certificate(&dir.path().join("cert.pem"), &dir.path().join("key.pem"));
            config += &format!("  tls:\n    certificate: {}\n    key: {}\n", path("cert.pem"), path("key.pem"));
            if let Some(ca) = options.client_ca {
                config += &format!("    clientcas: [{}]\n", ca.display());
            }
        }
        if options.htpasswd {
            run(Command::new("htpasswd").args(["-Bbc", &path("htpasswd"), "user", "secret"]));
            config += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path("htpasswd"));
        }
        if let Some((realm, cert)) = &options.token {
            config += &format!("auth:\n  token:\n    realm: {realm}\n    service: test\n    issuer: tester\n    rootcertbundle: {}\n", cert.display());
        }
        if options.schema1 {
            config += "compatibility:\n  schema1:\n    enabled: true\n";
        }
        // The registry cannot report a port it chose itself, and another process may take the one chosen for it: then it ends, and
        // gets another.
        for _ in 0..20 {
            let host = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
            std::fs::write(dir.path().join("config.yml"), config.replace("ADDRESS", &host)).unwrap();
            let log = std::fs::File::create(dir.path().join("log")).unwrap();
            let child = Command::new("docker-registry").arg("serve").arg(path("config.yml")).stdout(Stdio::null()).stderr(log).spawn();
            let mut child = child.unwrap_or_else(|e| missing("docker-registry", &e));
            if crate::common::host::listens(&mut child, &[&host]) {
                return Self { child, host, dir };
            }
        }
        panic!("registry does not listen: {}", std::fs::read_to_string(dir.path().join("log")).unwrap());
    }

    pub fn push(&self, layout: &Path, name: &str, more: &[&str]) {
        self.copy(layout, name, &["--all", "--preserve-digests"], more);
    }

    pub fn copy(&self, layout: &Path, name: &str, how: &[&str], more: &[&str]) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--insecure-policy", "--dest-tls-verify=false"]).args(how).args(more);
        run(command.arg(format!("oci:{}", layout.display())).arg(format!("docker://{}/{name}", self.host)));
    }

    pub fn cert(&self) -> PathBuf {
        self.dir.path().join("cert.pem")
    }
}

#[derive(Clone, Copy, PartialEq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// A directory as an uncompressed layer.
pub fn tar_of(build: impl FnOnce(&Path)) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    build(dir.path());
    run(Command::new("tar").args(["--sort=name", "--numeric-owner", "--xattrs", "-C"]).arg(dir.path()).args(["-cf", "-", "."]))
}

fn filter(program: &str, input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program).args(["-c"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap_or_else(|e| missing(program, &e));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let out = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    out.stdout
}

pub fn sha(bytes: &[u8]) -> String {
    format!("{:x}", sha2::Sha256::digest(bytes))
}

/// An OCI layout under construction.
pub struct OciLayout {
    dir: tempfile::TempDir,
}

impl OciLayout {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir }
    }

    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let hex = sha(bytes);
        std::fs::write(self.dir.path().join("blobs/sha256").join(&hex), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len()})
    }

    pub fn image(&self, arch: &str, layers: &[(Vec<u8>, Compression)]) -> serde_json::Value {
        let diff_ids: Vec<_> = layers.iter().map(|(tar, _)| format!("sha256:{}", sha(tar))).collect();
        let config = serde_json::json!({"os": "linux", "architecture": arch, "config": {"Env": ["A=b"], "User": "7:8"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": layers.iter().map(|_| serde_json::json!({"created": "2020-01-01T00:00:00Z"})).collect::<Vec<_>>()});
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

    pub fn finish(&self, entries: &[serde_json::Value]) -> &Path {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": entries});
        std::fs::write(self.dir.path().join("index.json"), index.to_string()).unwrap();
        self.dir.path()
    }

    /// An image of one layer with one file in it.
    pub fn simple(file: &str) -> Self {
        let this = Self::new();
        let image = this.image("amd64", &[(layer(file, 10), Compression::Gzip)]);
        this.finish(&[image]);
        this
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

pub struct Store {
    pub provisioner: Arc<Provisioner>,
    pub layout: Layout,
    _dir: tempfile::TempDir,
}

impl Store {
    pub async fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        Self { provisioner: Provisioner::open(config, layout.clone()).await.unwrap(), layout, _dir: dir }
    }

    pub async fn pull(&self, name: &str, credentials: Option<Credentials>) -> Result<ImageId> {
        self.provisioner.pull(request(name, credentials), None, CancellationToken::new()).await
    }
}

pub fn request(name: &str, credentials: Option<Credentials>) -> PullRequest {
    PullRequest { reference: name.parse().unwrap(), credentials, cached: false }
}

pub fn user(password: &str) -> Option<Credentials> {
    Some(Credentials { username: "user".into(), password: password.into(), ..Credentials::default() })
}

pub fn layer(name: &str, size: usize) -> Vec<u8> {
    tar_of(|dir| {
        std::fs::create_dir(dir.join(name)).unwrap();
        std::fs::write(dir.join(name).join("file"), vec![b'x'; size]).unwrap();
        std::os::unix::fs::symlink("file", dir.join(name).join("link")).unwrap();
    })
}
