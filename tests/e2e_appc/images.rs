//! Image archives, a real web server to have them from, keys to sign them with.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use mesocri::disk::Layout;
use mesocri::model::image::Image;
use mesocri::model::{ImageId, Result};
use mesocri::provisioner::config::Config;
use mesocri::provisioner::{Images as _, Provisioner, PullRequest};
use serde_json::{Value, json};
use sha2::Digest as _;
use tokio_util::sync::CancellationToken;

use crate::common::host;

/// Runs a program to its end; it must succeed.
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A manifest of `name` and `version` for this machine, with the members of `more`.
pub fn manifest(name: &str, version: &str, more: Value) -> Value {
    let mut manifest = json!({"acKind": "ImageManifest", "acVersion": "0.8.11", "name": name,
        "labels": [{"name": "version", "value": version}, {"name": "os", "value": "linux"}, {"name": "arch", "value": "amd64"}]});
    manifest.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    manifest
}

/// A plain image archive.
pub fn aci(manifest: &Value, build: impl FnOnce(&Path)) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("manifest"), manifest.to_string()).unwrap();
    std::fs::create_dir(dir.path().join("rootfs")).unwrap();
    build(&dir.path().join("rootfs"));
    run(Command::new("tar").args(["--sort=name", "--numeric-owner", "-C"]).arg(dir.path()).args(["-cf", "-", "manifest", "rootfs"]))
}

/// One with these files, each holding its own name.
pub fn aci_of(manifest: &Value, files: &[&str]) -> Vec<u8> {
    aci(manifest, |root| files.iter().for_each(|file| put(root, file, file)))
}

/// Writes a file with all directories above it.
pub fn put(root: &Path, file: &str, text: &str) {
    let path = root.join(file);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// The id of a plain archive.
pub fn id(plain: &[u8]) -> String {
    format!("sha512-{:x}", sha2::Sha512::digest(plain))
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("gzip").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = bytes.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    output.stdout
}

/// nginx on the loopback with a configuration of its own; nothing of the system's is read or touched.
pub struct Web {
    child: Child,
    pub dir: tempfile::TempDir,
    /// `127.0.0.1:port`.
    pub host: String,
    /// The same by TLS.
    pub secure: String,
}

impl Web {
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("mesocri-appc-web-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("www")).unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        run(Command::new("openssl").args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]).args([
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-keyout",
            &at("key.pem"),
            "-out",
            &at("cert.pem"),
        ]));
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].iter().map(|kind| format!("{kind}_temp_path {};\n", at(kind))).collect();
        let config = format!(
            "daemon off; master_process off; user root; pid {}; error_log {} info;\nevents {{}}\nhttp {{\naccess_log {};\n{temporary}\
             server {{ listen PLAIN; listen SECURE ssl; ssl_certificate {}; ssl_certificate_key {};\nroot {};\n\
             location /webhdfs/v1/ {{ if ($arg_op = GETFILESTATUS) {{ rewrite ^/webhdfs/v1/(.*)$ /status/$1 last; }} rewrite ^/webhdfs/v1/(.*)$ /$1 last; }}\n\
             }}\n}}\n",
            at("nginx.pid"),
            at("error.log"),
            at("access.log"),
            at("cert.pem"),
            at("key.pem"),
            at("www"),
        );
        // nginx cannot report ports that it chose itself, and another process may take those chosen for it: then it ends, and gets others.
        for _ in 0..20 {
            let held = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
            let [plain, secure] = held.each_ref().map(|listener| listener.local_addr().unwrap().to_string());
            drop(held);
            std::fs::write(dir.path().join("nginx.conf"), config.replace("PLAIN", &plain).replace("SECURE", &secure)).unwrap();
            let log = std::fs::File::create(dir.path().join("stderr")).unwrap();
            let mut child =
                Command::new("nginx").args(["-p", &at(""), "-c", &at("nginx.conf"), "-e", &at("error.log")]).stdin(Stdio::null()).stderr(log).spawn().unwrap();
            if host::listens(&mut child, &[&plain, &secure]) {
                return Self { child, dir, host: plain, secure };
            }
        }
        panic!("nginx does not listen: {}", std::fs::read_to_string(dir.path().join("error.log")).unwrap_or_default());
    }

    pub fn www(&self) -> PathBuf {
        self.dir.path().join("www")
    }

    pub fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.www().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// Serves an archive under the name that simple discovery gives it.
    pub fn serve(&self, name: &str, version: &str, bytes: &[u8]) {
        self.put(&format!("images/{name}-{version}-linux-amd64.aci"), bytes);
    }

    pub fn prefix(&self) -> String {
        format!("http://{}/images/", self.host)
    }

    /// Paths asked for since this was last called, with the status of the answer: at least `number`, because nginx notes a request after
    /// it has answered.
    pub fn asked(&self, number: usize) -> Vec<String> {
        let log = self.dir.path().join("access.log");
        let mut text = String::new();
        host::wait_until("nginx has noted the requests", || {
            text = std::fs::read_to_string(&log).unwrap_or_default();
            text.matches('\n').count() >= number
        });
        std::fs::File::options().write(true).open(&log).unwrap().set_len(0).unwrap();
        let asked = text.lines().filter_map(|line| line.split('"').nth(1).zip(line.split('"').nth(2)));
        asked
            .map(|(request, rest)| format!("{} {}", request.split(' ').nth(1).unwrap_or_default(), rest.split_whitespace().next().unwrap_or_default()))
            .collect()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A store of ours.
pub struct Store {
    pub provisioner: Arc<Provisioner>,
    pub layout: Layout,
    config: Config,
    _dir: tempfile::TempDir,
}

impl Store {
    pub async fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        Self { provisioner: Provisioner::open(config.clone(), layout.clone()).await.unwrap(), layout, config, _dir: dir }
    }

    pub async fn at(prefix: &str) -> Self {
        Self::new(Config { appc_simple_discovery_uri_prefix: prefix.to_owned(), pull_retries: 0, ..Config::default() }).await
    }

    /// The same store with other settings.
    pub async fn reopen(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
        self.provisioner = Provisioner::open(self.config.clone(), self.layout.clone()).await.unwrap();
    }

    pub async fn pull(&self, name: &str) -> Result<ImageId> {
        self.provisioner.pull(request(name), None, CancellationToken::new()).await
    }

    /// Pulls and looks up.
    pub async fn image(&self, name: &str) -> Arc<Image> {
        let id = self.pull(name).await.unwrap();
        self.provisioner.resolve(id.as_str()).unwrap()
    }

    pub fn layers(&self) -> usize {
        std::fs::read_dir(self.layout.layers()).unwrap().count()
    }

    /// Nothing half done lies about.
    pub fn assert_clean(&self) {
        let left: Vec<_> = std::fs::read_dir(self.layout.staging()).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

pub fn request(name: &str) -> PullRequest {
    PullRequest { reference: name.parse().unwrap(), credentials: None, cached: false }
}

/// A key pair in a home of its own.
pub struct Key {
    home: tempfile::TempDir,
    name: &'static str,
}

impl Key {
    pub fn new(name: &'static str) -> Self {
        let home = tempfile::Builder::new().prefix("gpg-").tempdir().unwrap();
        // gpg starts one itself, and gives up when that takes more than five seconds.
        let agent = Command::new("gpg-agent")
            .arg("--homedir")
            .arg(home.path())
            .arg("--daemon")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(agent.unwrap().success(), "gpg-agent does not start");
        let key = Self { home, name };
        key.gpg(&["--passphrase", "", "--quick-generate-key", name, "ed25519", "sign", "never"]);
        key
    }

    fn gpg(&self, args: &[&str]) -> Vec<u8> {
        run(Command::new("gpg").arg("--homedir").arg(self.home.path()).args(["--batch", "--quiet", "--no-tty", "--pinentry-mode", "loopback"]).args(args))
    }

    /// The public key as a keyring.
    pub fn export(&self, to: &Path) {
        std::fs::write(to, self.gpg(&["--export", self.name])).unwrap();
    }

    pub fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        let file = self.home.path().join("data");
        std::fs::write(&file, bytes).unwrap();
        self.gpg(&["--yes", "--armor", "--detach-sign", "--output", "-", file.to_str().unwrap()])
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // gpg leaves an agent behind that serves this home alone.
        let _ = Command::new("gpgconf").arg("--homedir").arg(self.home.path()).args(["--kill", "all"]).status();
    }
}
