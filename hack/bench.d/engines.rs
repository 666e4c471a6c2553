//! The engines under measurement, each a daemon with a CRI socket in the bench's namespaces.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mesocri::wire::cri::image_service_client::ImageServiceClient;
use mesocri::wire::cri::runtime_service_client::RuntimeServiceClient;
use tonic::transport::{Channel, Endpoint};

use crate::common::{Node, REGISTRY, host};

/// One engine.
pub struct Engine {
    /// Column name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Words that stand in the command line or executable path of its helper processes.
    pub helpers: &'static [&'static str],
    /// One connection for all calls, as a kubelet has.
    channel: Channel,
    command: Vec<String>,
    daemon: Option<Child>,
}

/// Namespaces, registry and engines.
pub struct Bench {
    /// The namespaces and the registry belong to it.
    pub node: Node,
    /// In the order of columns.
    pub engines: Vec<Engine>,
    /// Where the engines keep what must last: a file system of its own.
    pub store: PathBuf,
}

impl Bench {
    /// Sets up everything; engines are not started yet.
    pub async fn start(only: Option<&str>) -> Self {
        let mut node = Node::prepare("");
        // As on every node: what a reboot may lose is in memory.
        host::run("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
        node.start_registry();
        host::v1_alone();
        // A fresh journalled file system: the machine's own may be slow at reusing deleted inodes.
        let store = node.dir.path().join("store");
        std::fs::create_dir_all(&store).unwrap();
        let image = node.dir.path().join("store.img");
        host::run("truncate", &["-s", "12G", &image.display().to_string()]);
        host::run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", &image.display().to_string()]);
        // Past the page cache of the file system below, as a disk is. The device goes with its mount.
        let device = host::run("losetup", &["--direct-io=on", "--find", "--show", &image.display().to_string()]);
        host::run("mount", &["-o", "noatime", device.trim(), &store.display().to_string()]);
        host::run("losetup", &["-d", device.trim()]);
        let cni = store.join("cni");
        std::fs::create_dir_all(&cni).unwrap();
        std::fs::write(cni.join("10-bench.conflist"), CNI).unwrap();
        let mut engines = vec![mesocri(&store, &node.cgroup), containerd(&store, "runc", &cni), containerd(&store, "crun", &cni)];
        engines.retain(|e| only.is_none_or(|o| e.name == o));
        Self { node, engines, store }
    }

    /// Ends the engines and unmounts the store.
    pub async fn finish(mut self) {
        for engine in &mut self.engines {
            engine.stop();
        }
        host::run("umount", &["-l", &self.store.display().to_string()]);
        // containerd leaves its parent group, which would keep alive the hierarchy that was made for crun: every process of the machine
        // would see it from then on.
        if let Ok(groups) = std::fs::read_dir("/sys/fs/cgroup") {
            for hierarchy in groups.flatten() {
                let _ = std::fs::remove_dir(hierarchy.path().join("k8s.io"));
            }
        }
    }
}

impl Engine {
    /// Starts the daemon and waits until its CRI answers.
    pub async fn start(&mut self) {
        let log = std::fs::File::create(self.dir.join("daemon.log")).unwrap();
        let child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.command[0]));
        self.daemon = Some(child);
        let start = std::time::Instant::now();
        while self.runtime().status(mesocri::wire::cri::StatusRequest { verbose: false }).await.is_err() {
            assert!(
                start.elapsed().as_secs() < 30,
                "{} does not answer: {}",
                self.name,
                std::fs::read_to_string(self.dir.join("daemon.log")).unwrap_or_default()
            );
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// Ends the daemon and what helpers are left.
    pub fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id().cast_signed()), nix::sys::signal::Signal::SIGTERM);
            let _ = daemon.wait();
        }
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().map_or(0, Child::id)
    }

    /// Runtime service.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Image service.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// Proportional set size of all helper processes, KiB.
    pub fn helpers_pss(&self) -> f64 {
        let mut total = 0.0;
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let text = std::fs::read(entry.path().join("cmdline")).map(|c| String::from_utf8_lossy(&c).replace('\0', " ")).unwrap_or_default();
            if self.helpers.iter().any(|h| text.contains(h)) && pid != self.pid() {
                total += pss(pid);
            }
        }
        total
    }
}

fn channel_to(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    Endpoint::try_from("http://localhost").unwrap().connect_with_connector_lazy(connector)
}

/// Proportional set size of a process, KiB; 0 when it is gone.
pub fn pss(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    text.lines().find_map(|l| l.strip_prefix("Pss:")).and_then(|l| l.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0.0)
}

fn mesocri(store: &Path, cgroup: &str) -> Engine {
    let dir = store.join("mesocri");
    std::fs::create_dir_all(&dir).unwrap();
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/dist");
    let state = Path::new("/run/bench-mesocri");
    let config = dir.join("config.toml");
    std::fs::write(
        &config,
        format!(
            "root = {:?}\nstate = {state:?}\n[log]\nlevel = \"warn\"\n[launcher]\nshim = {:?}\n[isolator.cgroups]\ndefault_parent = {cgroup:?}\n",
            dir.join("root"),
            dist.join("containerd-shim-mesocri-v1")
        ),
    )
    .unwrap();
    let socket = state.join("mesocri.sock");
    let command = vec![dist.join("mesocri").display().to_string(), "daemon".to_owned(), "--config".to_owned(), config.display().to_string()];
    Engine { name: "mesocri".to_owned(), dir, channel: channel_to(&socket), helpers: &["containerd-shim-mesocri", "mesocri-pod"], command, daemon: None }
}

fn containerd(store: &Path, runtime: &str, cni: &Path) -> Engine {
    let dir = store.join(format!("containerd-{runtime}"));
    std::fs::create_dir_all(&dir).unwrap();
    let state = PathBuf::from(format!("/run/bench-{runtime}"));
    let socket = state.join("containerd.sock");
    let config = dir.join("config.toml");
    let text = format!(
        r#"version = 2
root = {root:?}
state = {state:?}
[grpc]
  address = {socket:?}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{REGISTRY}/library/pause:bench"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = {cni:?}
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "{runtime}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{runtime}]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{runtime}.options]
        BinaryName = "{runtime}"
"#,
        root = dir.join("root"),
    );
    std::fs::write(&config, text).unwrap();
    let command = vec!["containerd".to_owned(), "--config".to_owned(), config.display().to_string(), "--log-level".to_owned(), "error".to_owned()];
    let helpers: &[&str] = if runtime == "runc" { &["-address /run/bench-runc", "/pause"] } else { &["-address /run/bench-crun", "/pause"] };
    Engine { name: format!("containerd-{runtime}"), dir, channel: channel_to(&socket), helpers, command, daemon: None }
}

const CNI: &str = r#"{"cniVersion":"1.0.0","name":"bench","plugins":[
{"type":"bridge","bridge":"bench0","isGateway":true,"ipMasq":true,"hairpinMode":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}"#;
