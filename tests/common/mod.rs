//! The end-to-end bench: a private mount and network namespace with a real daemon, a real registry and a CRI client in it.
//!
//! Everything runs on the test's own thread (current-thread runtime), because the namespaces belong to that thread; children
//! inherit them. [`Node::finish`] takes everything down and fails the test if anything outlived it.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)] // each test binary uses its part; a bench that fails is a failed test

pub mod cri;
pub mod faults;
pub mod host;
pub mod ledger;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mesocri::wire::cri::image_service_client::ImageServiceClient;
use mesocri::wire::cri::runtime_service_client::RuntimeServiceClient;
use tonic::transport::{Channel, Endpoint};

/// Registry of every bench; its network namespace is its own, so the port never clashes.
pub const REGISTRY: &str = "127.0.0.1:5000";
/// The image each bench has.
pub const BUSYBOX: &str = "127.0.0.1:5000/library/busybox:host";
/// How long the daemon may take to become ready; it takes some tens of milliseconds, in an emulated machine on a busy one many seconds.
const READY_WITHIN_SECONDS: &str = "60";

/// A node: daemon, registry, directories.
pub struct Node {
    /// Scratch directory; root, state and logs lie in it.
    pub dir: tempfile::TempDir,
    /// Name of the cgroup below which all containers of this node go, unique per node.
    pub cgroup: String,
    /// More lines of configuration.
    pub extra_config: String,
    daemon: Option<Child>,
    registry: Option<Child>,
    before: host::Snapshot,
}

impl Node {
    /// Namespaces, registry with the busybox image, daemon, all ready.
    pub async fn start() -> Self {
        let mut node = Self::prepare("");
        node.start_registry();
        node.start_daemon(&[]);
        node
    }

    /// Namespaces and directories only.
    pub fn prepare(extra_config: &str) -> Self {
        host::enter_private_namespaces();
        Self::here(extra_config)
    }

    /// Directories only: in the namespaces of the caller, which are the bench's own (a machine of its own).
    pub fn here(extra_config: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("mesocri-e2e-").tempdir().unwrap();
        let cgroup = format!("/mesocri-e2e-{}", dir.path().file_name().unwrap().to_string_lossy().rsplit('-').next().unwrap());
        let before = host::Snapshot::take(&cgroup);
        Self { dir, cgroup, extra_config: extra_config.to_owned(), daemon: None, registry: None, before }
    }

    /// Root of the persistent tree.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Root of the volatile tree.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.state().join("mesocri.sock")
    }

    /// Directory for pod logs.
    pub fn logs(&self) -> PathBuf {
        self.dir.path().join("logs")
    }

    /// The daemon's own log so far.
    pub fn daemon_log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    /// Debian's registry with the busybox image in it.
    pub fn start_registry(&mut self) {
        let data = self.dir.path().join("registry");
        let config = self.dir.path().join("registry.yml");
        std::fs::write(
            &config,
            format!("version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: {REGISTRY}}}\n", data.display()),
        )
        .unwrap();
        let log = std::fs::File::create(self.dir.path().join("registry.log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed (hack/dev deps test)");
        self.registry = Some(child);
        host::wait_until("the registry listens", || std::net::TcpStream::connect(REGISTRY).is_ok());
        let archive = self.dir.path().join("busybox.tar");
        mesocri::daemon::cli::sample::write_archive(&archive, "busybox:host").unwrap();
        host::run("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &format!("docker-archive:{}", archive.display()), &format!("docker://{BUSYBOX}")]);
    }

    /// Imports the images of an archive by the daemon's own command.
    pub fn load(&self, archive: &Path) {
        let socket = self.socket().display().to_string();
        host::run(env!("CARGO_BIN_EXE_mesocri"), &["load", "--address", &socket, &archive.display().to_string()]);
    }

    /// Starts the daemon and waits until it is ready.
    pub fn start_daemon(&mut self, env: &[(&str, &str)]) {
        self.spawn_daemon(env);
        let ping = Command::new(env!("CARGO_BIN_EXE_mesocri")).args(["ping", "--wait", READY_WITHIN_SECONDS, "--address"]).arg(self.socket()).output().unwrap();
        assert!(ping.status.success(), "the daemon did not become ready: {}\n{}", String::from_utf8_lossy(&ping.stderr), self.daemon_log());
    }

    /// Starts the daemon without waiting.
    pub fn spawn_daemon(&mut self, env: &[(&str, &str)]) {
        assert!(self.daemon.is_none(), "one daemon at a time");
        std::fs::create_dir_all(self.logs()).unwrap();
        let config = self.dir.path().join("config.toml");
        let text = format!(
            "root = {:?}\nstate = {:?}\n[log]\nlevel = \"info\"\n[isolator.cgroups]\ndefault_parent = {:?}\n{}",
            self.root(),
            self.state(),
            self.cgroup,
            self.extra_config
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("daemon.log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesocri"));
        command.arg("daemon").arg("--config").arg(&config).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command.envs(env.iter().copied());
        self.daemon = Some(command.spawn().unwrap());
    }

    /// SIGKILL, reaped.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            daemon.wait().unwrap();
        }
    }

    /// SIGTERM, as an upgrade does it; the daemon must leave by itself and without an error.
    pub fn terminate_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id().cast_signed()), nix::sys::signal::Signal::SIGTERM).unwrap();
        let mut status = None;
        host::wait_until("the daemon leaves", || {
            status = daemon.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success(), "{status:?}\n{}", self.daemon_log());
    }

    /// Starts one more daemon, which must refuse to run with this configuration file; gives what it says.
    pub fn refused_daemon(&self, config: &Path) -> String {
        let (out, err) = (self.dir.path().join("refused.out"), self.dir.path().join("refused.err"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_mesocri"))
            .arg("daemon")
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&out).unwrap())
            .stderr(std::fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if start.elapsed() > Duration::from_secs(20) => break None,
                None => host::pause(),
            }
        };
        if status.is_none() {
            let _ = child.kill();
            child.wait().unwrap();
        }
        let text = std::fs::read_to_string(&out).unwrap() + &std::fs::read_to_string(&err).unwrap();
        assert!(status.is_some_and(|s| !s.success()), "the daemon must not run: {status:?}\n{text}");
        text
    }

    /// Whether the daemon has died by itself (a fail point); reaps it.
    pub fn daemon_died(&mut self) -> bool {
        let died = self.daemon.as_mut().is_some_and(|d| d.try_wait().unwrap().is_some());
        if died {
            self.daemon = None;
        }
        died
    }

    /// A channel to the socket; connects at the first call.
    pub fn channel(&self) -> Channel {
        let socket = self.socket();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        });
        Endpoint::try_from("http://localhost").unwrap().connect_with_connector_lazy(connector)
    }

    /// Runtime service.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel()).max_decoding_message_size(16 << 20)
    }

    /// Image service.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel()).max_decoding_message_size(16 << 20)
    }

    /// Ends daemon and registry and compares the host with what it was. Pods must have been removed by the test.
    pub fn finish(mut self) {
        let log = self.daemon_log();
        self.kill_daemon();
        if let Some(mut registry) = self.registry.take() {
            let _ = registry.kill();
            registry.wait().unwrap();
        }
        assert!(!log.contains("panicked at"), "the daemon panicked:\n{log}");
        let left = self.before.left(&self.cgroup);
        assert!(left.is_empty(), "left behind: {left:#?}\ndaemon log:\n{log}");
        for dir in [
            self.root().join("pods"),
            self.root().join("store/rootfs"),
            self.root().join("store/staging"),
            self.state().join("pods"),
            self.state().join("shims"),
        ] {
            let names: Vec<_> = entries(&dir);
            assert!(names.is_empty(), "left in {}: {names:?}\ndaemon log:\n{log}", dir.display());
        }
    }
}

impl Drop for Node {
    /// A failed test still ends what it started: the daemon, the registry, what is in the node's cgroup, and every process that was
    /// given a path in the node's scratch directory (shims are).
    fn drop(&mut self) {
        self.kill_daemon();
        if let Some(mut registry) = self.registry.take() {
            let _ = registry.kill();
            let _ = registry.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- daemon log ---\n{}", self.daemon_log());
            host::kill_processes_of(&self.cgroup, self.dir.path());
        }
    }
}

/// Names in a directory; a missing one has none.
pub fn entries(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).map(|d| d.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()).unwrap_or_default()
}

/// How long something took.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed())
}
