//! Inside the machine: a node, and the checks on it one after the other, each with a report of its own.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use mesocri::wire::cri as api;

use crate::common::cri::{host_pod, shell};
use crate::common::{Node, host};
use crate::{image, machine};

/// One check. It panics when the node does not do what it must.
pub type Check = for<'a> fn(&'a mut Bench) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

/// What one check may take; then it counts as failed and the next begins.
const CHECK_LIMIT: Duration = Duration::from_secs(60);
/// Root of the one hierarchy.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// The node under test.
pub struct Bench {
    /// Daemon and client.
    pub node: Node,
    /// Which driver its configuration names.
    pub systemd: bool,
}

/// A pod of one check.
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What it was made of.
    pub config: api::PodSandboxConfig,
}

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

impl Bench {
    /// Does the checks and reports each; at the end, that nothing is left on the machine.
    pub fn run(systemd: bool, checks: &[(&'static str, Check)]) {
        std::panic::set_hook(Box::new(|info| {
            eprintln!("{info}");
            PANIC.with_borrow_mut(|text| *text = info.to_string());
        }));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            host::make_uplink();
            let mut node = Node::here(if systemd { "driver = \"systemd\"\n" } else { "" });
            node.start_daemon(&[]);
            node.load(Path::new(image::ARCHIVE));
            let mut bench = Self { node, systemd };
            for (name, check) in checks {
                report(name, check(&mut bench)).await;
                bench.sweep().await;
            }
            report("nothing_left", async { bench.finish() }).await;
        });
    }

    /// Removes what a failed check left, so that it is one failure.
    async fn sweep(&self) {
        if let Ok(pods) = self.node.runtime().list_pod_sandbox(api::ListPodSandboxRequest { filter: None }).await {
            for pod in pods.into_inner().items {
                if let Err(e) = self.node.remove_pod(&pod.id).await {
                    eprintln!("remove pod of a failed check: {e}");
                }
            }
        }
    }

    fn finish(self) {
        let leftovers = crate::checks::leftovers();
        self.node.finish();
        assert!(leftovers.is_empty(), "{leftovers:?}");
    }

    /// A pod on the machine's network in a parent group as the kubelet names them.
    pub async fn pod(&self, name: &str) -> Pod {
        let mut config = host_pod(&self.node, name);
        config.linux.as_mut().unwrap().cgroup_parent = self.parent(name);
        Pod { id: self.node.run_pod(&config).await.unwrap(), config }
    }

    /// What the kubelet sends as parent of a burstable pod.
    fn parent(&self, name: &str) -> String {
        let pod = format!("pod{}", name.replace('-', "_"));
        if self.systemd { format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-{pod}.slice") } else { format!("/kubepods/burstable/{pod}") }
    }

    /// Directory of a container's group.
    pub fn group(&self, pod: &Pod, container: &str) -> PathBuf {
        let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
        let name = if self.systemd { format!("mesocri-{container}.scope") } else { container.to_owned() };
        Path::new(CGROUPS).join(parent.trim_start_matches('/')).join(name)
    }

    /// Starts a shell script with limits.
    pub async fn launch(&self, pod: &Pod, name: &str, script: &str, resources: api::LinuxContainerResources) -> String {
        let mut config = shell(name, script);
        config.linux.as_mut().unwrap().resources = Some(resources);
        self.node.launch(&pod.id, &pod.config, &config).await
    }

    /// Removes a pod; then nothing of it is left in the tree.
    pub async fn remove(&self, pod: Pod) {
        let parent = Path::new(CGROUPS).join(pod.config.linux.as_ref().unwrap().cgroup_parent.trim_start_matches('/'));
        self.node.remove_pod(&pod.id).await.unwrap();
        let left: Vec<_> = std::fs::read_dir(&parent).into_iter().flatten().flatten().filter(|e| e.path().is_dir()).map(|e| e.path()).collect();
        assert!(left.is_empty(), "groups of a removed pod: {left:?}");
    }
}

/// A file of a group without the last new line.
pub fn read(group: &Path, file: &str) -> String {
    let path = group.join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display())).trim_end().to_owned()
}

/// Runs one check and writes its line.
async fn report(name: &str, check: impl Future<Output = ()>) {
    eprintln!("--- {name}");
    let start = Instant::now();
    let outcome = tokio::time::timeout(CHECK_LIMIT, AssertUnwindSafe(check).catch_unwind()).await;
    let mut line = format!("CHECK {name} ");
    match outcome {
        Ok(Ok(())) => write!(line, "ok \"{}\"", start.elapsed().as_millis()).unwrap(),
        Ok(Err(_)) => write!(line, "FAILED {}", serde_json::json!(PANIC.with_borrow(Clone::clone))).unwrap(),
        Err(_) => write!(line, "FAILED \"not over after {} s\"", CHECK_LIMIT.as_secs()).unwrap(),
    }
    let mut reports = std::fs::OpenOptions::new().append(true).open(machine::REPORTS).unwrap();
    writeln!(reports, "{line}").unwrap();
}
