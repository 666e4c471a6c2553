//! A host for tests: a thread with network and mount namespaces of its own, and a tree in a scratch directory.

use std::future::Future;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::rtnl::{Rtnl, loopback_up};
use super::switch::Switch;
use super::{Config, Network};
use crate::disk::Layout;
use crate::model::{PodId, PodSpec};

/// What a test gets.
pub struct Bed {
    pub layout: Layout,
    pub dir: PathBuf,
}

/// Runs `test` on a host of its own. Threads and processes that it starts are on that host too.
pub fn host<F: Future<Output = ()>>(test: impl FnOnce(Arc<Bed>) -> F + Send + 'static) {
    let body = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        loopback_up(&mut Rtnl::open().unwrap()).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let mut layout = Layout::new(scratch.path().join("root"), scratch.path().join("state"));
        layout.netns = scratch.path().join("netns");
        let bed = Arc::new(Bed { layout, dir: scratch.path().to_owned() });
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test(bed));
    };
    std::thread::spawn(body).join().unwrap();
}

impl Bed {
    pub async fn open(&self, mut config: Config) -> Arc<Switch> {
        config.cni.conf_dir = self.dir.join("net.d");
        Arc::new(Switch::open(config, self.layout.clone()).await.unwrap())
    }

    /// Output of a program on this host; panics when it fails.
    pub fn run(&self, command: &str) -> String {
        let out = Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Everything a pod can leave behind.
    pub fn traces(&self) -> String {
        let list = |dir: PathBuf| -> Vec<String> {
            let entries = std::fs::read_dir(dir).into_iter().flatten();
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
        };
        format!(
            "{:?} {:?} {:?}\n{}{}",
            list(self.layout.netns.clone()),
            list(self.layout.network_records()),
            std::fs::read_to_string("/proc/thread-self/mounts")
                .unwrap()
                .lines()
                .filter(|l| l.contains("nsfs") && l.contains(self.dir.to_str().unwrap()))
                .count(),
            self.run("ip -br link | grep -v ^lo || true"),
            self.run("nft list ruleset"),
        )
    }

    /// Waits until the host looks like `before`: the kernel takes namespaces down in its own time.
    pub async fn settle(&self, before: &str) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let now = self.traces();
            if now == before {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "left behind: {now}\nbefore: {before}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    /// Runs `work` inside the pod's namespace.
    pub async fn inside<T: Send + 'static>(&self, pod: &PodId, work: impl FnOnce() -> T + Send + 'static) -> T {
        super::netns::inside(&self.layout.netns(pod), move || Ok(work())).await.unwrap()
    }
}

/// A pod with nothing special about it.
pub fn spec() -> PodSpec {
    PodSpec::default()
}

/// Attaches pods one after the other and returns each with its first address.
pub async fn attach(network: &Switch, count: usize) -> Vec<(PodId, String)> {
    let mut pods = Vec::new();
    for _ in 0..count {
        let pod = PodId::random();
        let attachment = network.attach(&pod, &spec()).await.unwrap();
        pods.push((pod, attachment.ips[0].clone()));
    }
    pods
}
