//! A whole life on one pod, and a ledger of what the daemon has acknowledged in it: after any death of the daemon, the next one
//! is held to that.
//!
//! The facts come from outside the daemon where that is possible: processes by number and birth, the moment of an end by when the
//! process was gone, the log by what a loop in the container counted.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesocri::disk::bundle::Stat;
use mesocri::wire::cri as api;
use tonic::{Code, Status};

use super::cri::{code, host_pod, parse_log, pod, shell};
use super::{BUSYBOX, Node, host};

/// Prints 1, 2, 3 ... some fifty a second without a fork, until it is asked to end.
pub const COUNTS: &str = "trap 'exit 3' TERM; mkfifo /tmp/f; exec 3<>/tmp/f; n=0; while :; do n=$((n+1)); echo $n; read -t 0.02 x <&3; done";
/// Ends when `/tmp/go` appears.
const WAITS: &str = "mkfifo /tmp/f; exec 3<>/tmp/f; until [ -e /tmp/go ]; do read -t 0.005 x <&3; done; exit 6";

/// A living process, which no other of the same number can be taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Living {
    /// Number.
    pub pid: u32,
    born: u64,
    /// Its parent: the shim.
    pub shim: u32,
}

impl Living {
    /// `None` when it has ended.
    pub fn of(pid: u32) -> Option<Self> {
        Stat::read(pid).filter(|stat| stat.state != 'Z').map(|stat| Self::from(pid, &stat))
    }

    /// Also one that has ended and is yet to be reaped: that can be waited for.
    fn unreaped(pid: u32) -> Option<Self> {
        Stat::read(pid).map(|stat| Self::from(pid, &stat))
    }

    fn from(pid: u32, stat: &Stat) -> Self {
        Self { pid, born: stat.start_time, shim: stat.parent }
    }

    /// Whether it still runs.
    pub fn lives(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.born == self.born)
    }

    /// Waits until it has been reaped and its shim, which has one thread, rests again: so it has read the clock.
    fn end(&self) -> i64 {
        host::wait_until("the process has been reaped", || Stat::read(self.pid).is_none_or(|now| now.start_time != self.born));
        host::wait_until("the shim rests", || Stat::read(self.shim).is_none_or(|shim| shim.state == 'S'));
        now()
    }
}

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos().try_into().unwrap()
}

/// How far a container has come, by the daemon's own word.
#[derive(Clone, Debug)]
enum Stage {
    /// CreateContainer was answered.
    Created,
    /// StartContainer was called at this time.
    Starting(i64),
    /// StartContainer was answered; who runs, unless it was reaped already, and its status.
    Running(i64, Option<Living>, Box<api::ContainerStatus>),
    /// Ended with this code between these times, while nobody could ask.
    Ended(i32, (i64, i64), Box<api::ContainerStatus>),
    /// The end is known to us by the daemon: it must not change.
    Told(Box<api::ContainerStatus>),
    /// StopContainer was called at this time and has not been answered.
    Stopping(i64, Box<api::ContainerStatus>),
    /// StopContainer was called and answered at these times.
    Stopped((i64, i64), Box<api::ContainerStatus>),
    /// RemoveContainer was called.
    Removing,
    /// It was answered.
    Removed,
}

#[derive(Debug)]
struct Kept {
    name: &'static str,
    pod: String,
    log: PathBuf,
    stage: Stage,
}

#[derive(Clone, Debug)]
enum PodStage {
    Ready(Box<api::PodSandboxStatus>),
    Ending,
    Removed,
}

/// What was acknowledged.
#[derive(Debug, Default)]
pub struct Ledger {
    pods: RefCell<BTreeMap<String, PodStage>>,
    containers: RefCell<BTreeMap<String, Kept>>,
}

/// How long a life takes here and now, when nobody dies.
pub async fn measured(node: &Node) -> Duration {
    let start = Instant::now();
    life(node, "measured", true, &Ledger::default()).await.unwrap();
    start.elapsed()
}

/// Waits until a container that [`COUNTS`] has begun to: before, it takes no notice of what asks it to end. One that is killed never does.
pub async fn counts(log: &Path, process: Option<Living>) {
    let has_text = |path: &Path| std::fs::metadata(path).is_ok_and(|m| m.len() > 0);
    let start = Instant::now();
    while process.is_some_and(|p| p.lives()) && !has_text(log) && !has_text(&rotated(log)) {
        assert!(start.elapsed() < Duration::from_secs(20), "{} stays empty", log.display());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The life, as far as the daemon lives; each step may fail because the daemon just died.
pub async fn life(node: &Node, name: &str, own_network: bool, ledger: &Ledger) -> Result<(), Status> {
    let image = api::ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() };
    node.images().pull_image(api::PullImageRequest { image: Some(image.clone()), ..Default::default() }).await?;
    let config = if own_network { pod(node, name) } else { host_pod(node, name) };
    let id = ledger.run_pod(node, &config).await?;
    let stays = ledger.launch(node, &id, &config, "stays", COUNTS).await?;
    ledger.launch(node, &id, &config, "later", WAITS).await?;
    let ends = ledger.launch(node, &id, &config, "ends", "exit 5").await?;
    ledger.launch_in_vain(node, &id, &config).await?;
    node.exec(&stays, "echo x", 5).await?;
    ledger.look(node, &ends).await?;
    ledger.rotate(node, &stays).await?;
    let resources = api::LinuxContainerResources { cpu_shares: 512, ..Default::default() };
    node.runtime()
        .update_container_resources(api::UpdateContainerResourcesRequest { container_id: stays.clone(), linux: Some(resources), ..Default::default() })
        .await?;
    ledger.stop(node, &stays).await?;
    ledger.remove(node, &stays).await?;
    ledger.remove_pod(node, &id).await?;
    node.images().remove_image(api::RemoveImageRequest { image: Some(image) }).await?;
    Ok(())
}

// ---- the acts, noted

impl Ledger {
    fn set(&self, id: &str, stage: Stage) {
        self.containers.borrow_mut().get_mut(id).unwrap().stage = stage;
    }

    fn stage(&self, id: &str) -> Stage {
        self.containers.borrow()[id].stage.clone()
    }

    async fn run_pod(&self, node: &Node, config: &api::PodSandboxConfig) -> Result<String, Status> {
        let id = node.run_pod(config).await?;
        let status = node.pod_status(&id).await?;
        self.pods.borrow_mut().insert(id.clone(), PodStage::Ready(Box::new(status)));
        Ok(id)
    }

    /// CreateContainer, and that StartContainer is asked for, when.
    async fn create(
        &self,
        node: &Node,
        pod: &str,
        config: &api::PodSandboxConfig,
        name: &'static str,
        what: &api::ContainerConfig,
    ) -> Result<(String, i64), Status> {
        let id = node.create(pod, config, what).await?;
        let log = PathBuf::from(&config.log_directory).join(format!("{name}.log"));
        self.containers.borrow_mut().insert(id.clone(), Kept { name, pod: pod.to_owned(), log, stage: Stage::Created });
        let asked = now();
        self.set(&id, Stage::Starting(asked));
        Ok((id, asked))
    }

    /// A container whose program is missing: its start fails.
    async fn launch_in_vain(&self, node: &Node, pod: &str, config: &api::PodSandboxConfig) -> Result<(), Status> {
        let absent = api::ContainerConfig { command: vec!["/absent".to_owned()], ..shell("absent", "") };
        let (id, _) = self.create(node, pod, config, "absent", &absent).await?;
        let failed = node.start_container(&id).await.expect_err("there is no such program");
        self.look(node, &id).await.map_err(|_| failed)
    }

    /// CreateContainer and StartContainer.
    async fn launch(&self, node: &Node, pod: &str, config: &api::PodSandboxConfig, name: &'static str, script: &str) -> Result<String, Status> {
        let (id, asked) = self.create(node, pod, config, name, &shell(name, script)).await?;
        node.start_container(&id).await?;
        let (pid, status) = node.process_of(&id).await?;
        self.set(&id, if exited(&status) { Stage::Told(Box::new(status)) } else { Stage::Running(asked, Living::unreaped(pid), Box::new(status)) });
        Ok(id)
    }

    /// Whether it has ended meanwhile.
    async fn look(&self, node: &Node, id: &str) -> Result<(), Status> {
        let status = node.status(id).await?;
        if exited(&status) {
            self.set(id, Stage::Told(Box::new(status)));
        }
        Ok(())
    }

    async fn rotate(&self, node: &Node, id: &str) -> Result<(), Status> {
        let log = self.containers.borrow()[id].log.clone();
        std::fs::rename(&log, rotated(&log)).unwrap();
        node.runtime().reopen_container_log(api::ReopenContainerLogRequest { container_id: id.to_owned() }).await?;
        assert!(log.exists(), "ReopenContainerLog made no file");
        Ok(())
    }

    async fn stop(&self, node: &Node, id: &str) -> Result<(), Status> {
        let status = match self.stage(id) {
            Stage::Running(_, process, status) => {
                let log = self.containers.borrow()[id].log.clone();
                counts(&log, process).await;
                status
            }
            Stage::Told(status) => status,
            other => panic!("{id} was not started: {other:?}"),
        };
        let asked = now();
        self.set(id, Stage::Stopping(asked, status.clone()));
        node.stop_container(id, 5).await?;
        self.set(id, Stage::Stopped((asked, now()), status));
        Ok(())
    }

    async fn remove(&self, node: &Node, id: &str) -> Result<(), Status> {
        self.set(id, Stage::Removing);
        node.remove_container(id).await?;
        self.set(id, Stage::Removed);
        Ok(())
    }

    async fn remove_pod(&self, node: &Node, id: &str) -> Result<(), Status> {
        self.pods.borrow_mut().insert(id.to_owned(), PodStage::Ending);
        node.remove_pod(id).await?;
        self.pods.borrow_mut().insert(id.to_owned(), PodStage::Removed);
        Ok(())
    }
}

// ---- what happens while no daemon runs

impl Ledger {
    /// Ends the containers that wait, and waits for those that end by themselves: between now and then nobody asks.
    pub fn meanwhile(&self) {
        for kept in self.containers.borrow_mut().values_mut() {
            let Stage::Running(asked, process, status) = &kept.stage else { continue };
            if !matches!(self.pods.borrow().get(&kept.pod), Some(PodStage::Ready(_))) {
                continue;
            }
            let (mut from, status) = (*asked, status.clone());
            let code = match (kept.name, process) {
                ("later", Some(process)) if process.lives() => {
                    from = now();
                    std::fs::write(format!("/proc/{}/root/tmp/go", process.pid), "").unwrap();
                    6
                }
                ("ends", _) => 5,
                _ => continue,
            };
            // Without a process: it was gone before we could look at it.
            let to = process.as_ref().map_or_else(now, Living::end);
            kept.stage = Stage::Ended(code, (from, to), status);
        }
    }
}

// ---- what must hold afterwards

impl Ledger {
    /// Holds a daemon that was just started to everything acknowledged, and notes which kinds of promises that were.
    pub async fn verify(&self, node: &Node, what: &str, checked: &mut BTreeSet<&'static str>) {
        let pods = self.pods.borrow().clone();
        for (id, stage) in &pods {
            let now = node.pod_status(id).await;
            match stage {
                PodStage::Ready(before) => {
                    let now = now.unwrap_or_else(|e| panic!("{what}: an acknowledged pod is lost: {e}"));
                    assert_eq!((now.state, now.created_at, &now.network), (before.state, before.created_at, &before.network), "{what}: the pod is another");
                }
                PodStage::Removed => assert_eq!(code(now), Code::NotFound, "{what}: a removed pod is back"),
                PodStage::Ending => {}
            }
        }
        let kept: Vec<_> = self.containers.borrow().iter().map(|(id, k)| (id.clone(), k.name, k.pod.clone(), k.log.clone(), k.stage.clone())).collect();
        for (id, name, pod, log, stage) in kept {
            let what = format!("{what}: container {name}, {stage:?}");
            match &pods[&pod] {
                PodStage::Ready(_) => {
                    checked.insert(match stage {
                        Stage::Running(..) => "runs on",
                        Stage::Ended(..) => "ended meanwhile",
                        Stage::Stopped(..) => "stopped",
                        _ => "other",
                    });
                    self.verify_container(node, &what, &id, name, stage).await;
                }
                // Its end is under way, or done: what is still shown must at least be true.
                PodStage::Ending => {
                    if let Ok(status) = node.status(&id).await {
                        plausible(&what, name, &status);
                    }
                }
                PodStage::Removed => assert_eq!(code(node.status(&id).await), Code::NotFound, "{what}: is back"),
            }
            if name == "stays" {
                counted(&what, &log);
            }
        }
    }

    async fn verify_container(&self, node: &Node, what: &str, id: &str, name: &str, stage: Stage) {
        if matches!(stage, Stage::Removed) {
            return assert_eq!(code(node.status(id).await), Code::NotFound, "{what}: is back");
        }
        let found = node.process_of(id).await;
        if matches!((&stage, &found), (Stage::Removing, Err(e)) if e.code() == Code::NotFound) {
            return;
        }
        let (pid, status) = found.unwrap_or_else(|e| panic!("{what}: an acknowledged container is lost: {e}"));
        let state = status.state();
        match stage {
            Stage::Created => assert_eq!(state, api::ContainerState::ContainerCreated, "{what}: {status:?}"),
            Stage::Starting(asked) => {
                plausible(what, name, &status);
                assert!(status.started_at == 0 || status.started_at >= asked, "{what}: {status:?}");
            }
            Stage::Running(_, process, before) => {
                assert_eq!((name, state), ("stays", api::ContainerState::ContainerRunning), "{what}: {status:?}");
                assert_eq!((status.started_at, status.created_at), (before.started_at, before.created_at), "{what}");
                let process = process.expect("it counts");
                assert!(process.lives() && process.pid == pid, "{what}: another process is said to run: {pid}");
                let exec = node.exec(id, "echo alive", 5).await.unwrap_or_else(|e| panic!("{what}: a running container takes no exec: {e}"));
                assert_eq!(exec.1, "alive\n", "{what}");
                self.goes_on(node, what, id).await;
            }
            Stage::Ended(code, (from, to), before) => {
                let status = if exited(&status) { status } else { node.wait_exit(id).await };
                ended(what, &status, &before, code);
                assert!((from..=to).contains(&status.finished_at), "{what}: not within {from}..={to}: {status:?}");
            }
            Stage::Told(before) => assert_eq!(status, *before, "{what}: what was told has changed"),
            Stage::Stopping(asked, before) => {
                plausible(what, name, &status);
                if exited(&status) {
                    ended(what, &status, &before, 3);
                    assert!(status.finished_at >= asked, "{what}: {status:?}");
                }
            }
            Stage::Stopped((from, to), before) => {
                ended(what, &status, &before, 3);
                assert!((from..=to).contains(&status.finished_at), "{what}: not within {from}..={to}: {status:?}");
            }
            Stage::Removing => plausible(what, name, &status),
            Stage::Removed => {}
        }
    }

    /// The log of a running container gets new lines, also where a rotation was cut short.
    async fn goes_on(&self, node: &Node, what: &str, id: &str) {
        let log = self.containers.borrow()[id].log.clone();
        if !log.exists() {
            node.runtime().reopen_container_log(api::ReopenContainerLogRequest { container_id: id.to_owned() }).await.unwrap();
            assert!(log.exists(), "{what}: no log after it was opened again");
        }
        let seen = std::fs::metadata(&log).unwrap().len();
        host::wait_until(&format!("{what}: the log goes on"), || std::fs::metadata(&log).unwrap().len() > seen);
    }
}

fn exited(status: &api::ContainerStatus) -> bool {
    status.state() == api::ContainerState::ContainerExited
}

/// The real code and the real start.
fn ended(what: &str, status: &api::ContainerStatus, before: &api::ContainerStatus, code: i32) {
    assert_eq!((status.state(), status.exit_code, status.reason.as_str()), (api::ContainerState::ContainerExited, code, "Error"), "{what}: {status:?}");
    assert_eq!((status.started_at, status.created_at), (before.started_at, before.created_at), "{what}: {status:?}");
}

/// What is said of a container under way: it is there, or it ended in a way that it can end in.
fn plausible(what: &str, name: &str, status: &api::ContainerStatus) {
    let codes: &[i32] = match name {
        "stays" => &[3, 137],
        "later" => &[137],
        // The daemon died after its shim knew why, and before it had heard: the child's own code is left.
        "absent" => &[1],
        _ => &[5],
    };
    // 128: the pod was stopped before the start.
    let fine = codes.contains(&status.exit_code) || status.exit_code == 128 && status.started_at == 0 && status.reason == "StartError";
    assert!(!exited(status) || fine && status.finished_at > 0, "{what}: {status:?}");
    assert_ne!(status.state(), api::ContainerState::ContainerUnknown, "{what}: {status:?}");
}

fn rotated(log: &std::path::Path) -> PathBuf {
    log.with_extension("log.1")
}

/// 1, 2, 3 ... over the rotated file and the new one.
fn counted(what: &str, log: &std::path::Path) {
    let mut text = std::fs::read_to_string(rotated(log)).unwrap_or_default();
    text += &std::fs::read_to_string(log).unwrap_or_default();
    // The last line may be half written at this moment.
    text.truncate(text.rfind('\n').map_or(0, |at| at + 1));
    let numbers: Vec<u64> = parse_log(&text).0.lines().map(|line| line.parse().unwrap()).collect();
    let wrong = numbers.iter().zip(1..).find(|(n, expected)| *n != expected);
    assert!(wrong.is_none(), "{what}: the log has a hole or a double line at (found, expected) {wrong:?} of {}", numbers.len());
}
