//! A launcher in a directory of its own, a root filesystem, and proofs that nothing is left.
#![allow(dead_code)] // each test binary uses its part

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesocri::disk::Layout;
use mesocri::launcher::{Config, Launcher, Sandbox, ShimLauncher, TaskIo, TaskLaunch};
use mesocri::model::error::Result;
use mesocri::model::image::RootMount;
use mesocri::model::plan::LaunchPlan;
use mesocri::model::{ContainerId, PodId};

#[allow(dead_code)] // each test file uses its part
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub layout: Layout,
    pub config: Config,
    pub launcher: Arc<ShimLauncher>,
    pub pod: PodId,
    serial: AtomicU32,
}

#[allow(dead_code)] // each test file uses its part
impl Bench {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        let mut config = Config { shim: Some(env!("CARGO_BIN_EXE_containerd-shim-mesocri-v1").into()), ..Config::default() };
        change(&mut config);
        let launcher = ShimLauncher::new(config.clone(), layout.clone()).unwrap();
        let bench = Self { dir, layout, config, launcher, pod: PodId::random(), serial: AtomicU32::new(0) };
        bench.make_rootfs();
        bench
    }

    pub fn second_launcher(&self) -> Arc<ShimLauncher> {
        ShimLauncher::new(self.config.clone(), self.layout.clone()).unwrap()
    }

    fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// busybox with its shell and a link for every program that the tests call by path lookup.
    fn make_rootfs(&self) {
        let root = self.rootfs();
        for dir in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        // Debian's busybox is linked dynamically: its libraries come along.
        let listed = std::process::Command::new("ldd").arg("/bin/busybox").output().unwrap();
        for library in String::from_utf8_lossy(&listed.stdout).split_ascii_whitespace().filter(|word| word.starts_with('/')) {
            let inside = root.join(&library[1..]);
            std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
            std::fs::copy(library, inside).unwrap();
        }
        for name in ["sh", "sleep", "hostname", "ps", "grep", "yes", "head", "tty", "setsid", "cat", "echo", "id", "printf", "kill", "ls", "readlink"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
    }

    pub fn plan(&self, spec: serde_json::Value) -> LaunchPlan {
        let mut plan = LaunchPlan::default();
        plan.spec = serde_json::from_value(spec).unwrap();
        plan
    }

    pub fn sandbox_plan(&self, namespaces: &[&str]) -> LaunchPlan {
        let namespaces: Vec<_> = namespaces.iter().map(|kind| serde_json::json!({ "type": kind })).collect();
        self.plan(serde_json::json!({ "ociVersion": "1.1.0", "hostname": "mesocri-test", "linux": { "namespaces": namespaces } }))
    }

    pub async fn sandbox(&self, namespaces: &[&str]) -> Result<Sandbox> {
        self.launcher.create_sandbox(&self.pod, "", &self.sandbox_plan(namespaces)).await
    }

    pub async fn sandbox_with_sysctl(&self, name: &str, value: &str) -> Result<Sandbox> {
        let linux = serde_json::json!({ "namespaces": [{ "type": "ipc" }], "sysctl": { name: value } });
        self.launcher.create_sandbox(&self.pod, "", &self.plan(serde_json::json!({ "ociVersion": "1.1.0", "linux": linux }))).await
    }

    fn next_id(&self) -> ContainerId {
        // Ids end in cgroup names, which all tests of the machine share.
        ContainerId::from_string(format!("{}-{}", self.pod.as_str(), self.serial.fetch_add(1, Ordering::Relaxed)))
    }

    pub fn log(&self, id: &ContainerId) -> PathBuf {
        self.dir.path().join("logs").join(format!("{id}.log"))
    }

    pub fn cgroup(&self) -> String {
        format!("/mesocri-test-{}", self.pod.short())
    }

    pub fn container_plan(&self, sandbox: &Sandbox, id: &ContainerId, args: &[&str], terminal: bool) -> LaunchPlan {
        let mut namespaces: Vec<_> = sandbox.namespaces.iter().map(|(kind, path)| serde_json::json!({ "type": kind, "path": path })).collect();
        namespaces.push(serde_json::json!({ "type": "mount" }));
        if !sandbox.namespaces.contains_key("pid") {
            namespaces.push(serde_json::json!({ "type": "pid" }));
        }
        self.plan(serde_json::json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "process": {
                "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 }, "terminal": terminal,
                "capabilities": { "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"] },
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666", "mode=0620"] },
            ],
            "linux": { "namespaces": namespaces, "cgroupsPath": format!("{}/{id}", self.cgroup()) },
        }))
    }

    pub async fn create(&self, sandbox: &Sandbox, args: &[&str], io: TaskIo) -> Result<ContainerId> {
        self.create_in(sandbox, args, io, None).await
    }

    /// The same; with `placed` it is the caller who puts the process into that group.
    pub async fn create_in(&self, sandbox: &Sandbox, args: &[&str], io: TaskIo, placed: Option<String>) -> Result<ContainerId> {
        let id = self.next_id();
        let io = TaskIo { log: Some(self.log(&id)), ..io };
        let rootfs = vec![RootMount {
            fstype: "bind".to_owned(),
            source: self.rootfs().to_string_lossy().into_owned(),
            options: vec!["rbind".to_owned(), "rw".to_owned()],
        }];
        let mut plan = self.container_plan(sandbox, &id, args, io.terminal);
        plan.extras.foreign_cgroup = placed;
        let launch = TaskLaunch { plan, rootfs, io };
        self.launcher.create_task(&self.pod, &id, &launch).await?;
        Ok(id)
    }

    pub async fn run(&self, sandbox: &Sandbox, args: &[&str]) -> ContainerId {
        let id = self.create(sandbox, args, TaskIo::default()).await.unwrap();
        self.launcher.start_task(&self.pod, &id).await.unwrap();
        id
    }

    /// Waits until the log has a line with each of these endings.
    pub async fn log_has(&self, id: &ContainerId, endings: &[&str]) {
        let path = self.log(id);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            if endings.iter().all(|ending| text.lines().any(|line| line.ends_with(ending))) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "log lacks one of {endings:?}: {text}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Removes everything in the order the containerizer does.
    pub async fn remove(&self, sandbox: &Sandbox, handler: &str) {
        self.launcher.stop_sandbox(&self.pod).await.unwrap();
        self.launcher.delete_sandbox(&self.pod, handler, Some(sandbox)).await.unwrap();
        self.nothing_is_left(&[sandbox.pid, sandbox.shim_pid]);
    }

    pub fn nothing_is_left(&self, pids: &[u32]) {
        for pid in pids {
            assert!(!alive(*pid), "process {pid} lives on: {}", std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default());
        }
        assert!(!self.layout.shim_socket(&self.pod).exists(), "socket");
        assert!(!self.layout.sandbox_bundle(&self.pod).exists(), "sandbox bundle");
        let containers = self.layout.run_pod(&self.pod).join("containers");
        assert_eq!(std::fs::read_dir(&containers).map_or(0, Iterator::count), 0, "container bundles");
        assert!(!mesocri::cgroups::Manager::open(&self.cgroup()).unwrap().exists(), "cgroup");
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(!mounts.contains(&*self.dir.path().to_string_lossy()), "mounts");
    }
}

/// Whether a process lives; a zombie that somebody else must reap does not.
pub fn alive(pid: u32) -> bool {
    mesocri::disk::bundle::Recorded::of(pid).is_ok()
}

#[allow(dead_code)] // each test file uses its part
pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
