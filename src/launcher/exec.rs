//! Running a command to its end. Output comes through two fifos in the container's bundle, whose names are gone as soon as the
//! process runs; a caller that leaves, a time-out and a background child that keeps the output open all end the call.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::fs::{CWD, FileType, Mode};
use tokio::net::unix::pipe::{OpenOptions, Receiver};
use tokio::time::Instant;

use super::client::Client;
use super::output::{BUDGET, Room, Share};
use super::pod::Pod;
use super::shims::ShimLauncher;
use super::{ExecOutput, ExecSpec, bundle, task};
use crate::disk::bundle::CONFIG;
use crate::model::ContainerId;
use crate::model::error::{Act, Error, Kind, Result};

/// After the command has ended, output is waited for until nothing came for this long: a background child may hold the
/// stream for ever.
const IDLE: Duration = Duration::from_millis(500);
/// How long a killed command may take to be reaped (it may hang in the kernel).
const REAP_LIMIT: Duration = Duration::from_secs(10);
/// Bytes read at once.
const READ: usize = 32 * 1024;
/// Type name of an OCI process inside containerd's messages.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

impl ShimLauncher {
    pub(super) async fn exec(&self, pod: &Pod, id: &ContainerId, exec: &ExecSpec) -> Result<ExecOutput> {
        let dir = self.layout.bundle(&pod.id, id);
        let process = process(&dir, exec)?;
        let exec_id = exec_id();
        let fifos = Fifos::make(&dir, &exec_id, exec.terminal)?;
        let room = Room::new(&BUDGET, exec.output_limit, if exec.terminal { 1 } else { 2 });
        let started = Instant::now();
        let mut stdout = Capture::open(&fifos.stdout, &room, started)?;
        let mut stderr = match &fifos.stderr {
            Some(path) => Capture::open(path, &room, started)?,
            None => Capture::none(&room, started),
        };
        let timeout = exec.timeout.unwrap_or(Duration::MAX);
        let overdue = || Error::new(Kind::DeadlineExceeded, format!("exec in container {}: killed after {timeout:?}", id.short()));
        let mut running = Running { client: pod.client.clone(), id: id.as_str().to_owned(), exec_id, armed: true };
        // What hangs while it is being set up has run out of its time as well.
        match tokio::time::timeout(timeout, running.start(&fifos, exec.terminal, process)).await {
            Ok(started) => started?,
            Err(_) => {
                running.kill_and_reap().await?;
                return Err(overdue());
            }
        }
        // Both sides have them open now.
        drop(fifos);
        let activity = AtomicU64::new(0);
        let ended = {
            let both = async { tokio::join!(stdout.pump(&activity), stderr.pump(&activity)) };
            let mut both = std::pin::pin!(both);
            let exit = tokio::time::timeout(timeout.saturating_sub(started.elapsed()), running.wait());
            let mut exit = std::pin::pin!(exit);
            let (ended, drained) = tokio::select! {
                ended = &mut exit => (ended, false),
                _ = &mut both => ((&mut exit).await, true),
            };
            if ended.is_ok() && !drained {
                drain(&mut both, started, &activity).await;
            }
            ended
        };
        let Ok(code) = ended else {
            running.kill_and_reap().await?;
            return Err(overdue());
        };
        let code = code?;
        running.forget();
        if room.is_refused() {
            tracing::warn!(container = %id, "output of a command was cut: commands in other containers hold all memory there is for it");
        }
        Ok(ExecOutput { code, stdout: stdout.data, stderr: stderr.data })
    }
}

/// Waits for the end of the output, or for silence.
async fn drain(both: &mut (impl Future + Unpin), started: Instant, activity: &AtomicU64) {
    let mut until = Instant::now() + IDLE;
    while tokio::time::timeout_at(until, &mut *both).await.is_err() {
        let last = started + Duration::from_millis(activity.load(Ordering::Relaxed)) + IDLE;
        if last <= Instant::now() {
            return;
        }
        until = last;
    }
}

/// The container's own process with other words.
fn process(dir: &Path, exec: &ExecSpec) -> Result<Vec<u8>> {
    #[derive(serde::Deserialize)]
    struct Config {
        process: serde_json::Map<String, serde_json::Value>,
    }
    let path = dir.join(CONFIG);
    let config: Option<Config> = bundle::read(&path)?;
    let mut process = config.ok_or_else(|| Error::not_found(format!("container bundle {}", dir.display())))?.process;
    process.insert("args".to_owned(), exec.args.clone().into());
    process.insert("terminal".to_owned(), exec.terminal.into());
    if exec.terminal {
        let env = process.entry("env").or_insert_with(|| serde_json::Value::Array(Vec::new()));
        if let Some(env) = env.as_array_mut()
            && !env.iter().any(|e| e.as_str().is_some_and(|e| e.starts_with("TERM=")))
        {
            env.push("TERM=xterm".into());
        }
    }
    serde_json::to_vec(&process).act("encode", "process")
}

fn exec_id() -> String {
    let mut bytes = [0; 8];
    crate::sys::random::fill(&mut bytes);
    format!("exec-{:016x}", u64::from_ne_bytes(bytes))
}

/// Makes a fifo only its owner may open.
pub(super) fn make_fifo(path: &Path) -> Result<()> {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).act("make fifo", path.display())
}

/// Named ends of the streams; the names go with the value.
struct Fifos {
    stdout: PathBuf,
    stderr: Option<PathBuf>,
}

impl Fifos {
    fn make(dir: &Path, exec_id: &str, terminal: bool) -> Result<Self> {
        let stdout = dir.join(format!("{exec_id}-stdout"));
        make_fifo(&stdout)?;
        let mut fifos = Self { stdout, stderr: None };
        if !terminal {
            let stderr = dir.join(format!("{exec_id}-stderr"));
            make_fifo(&stderr)?;
            fifos.stderr = Some(stderr);
        }
        Ok(fifos)
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        // What remains goes with the bundle.
        let _ = std::fs::remove_file(&self.stdout);
        if let Some(stderr) = &self.stderr {
            let _ = std::fs::remove_file(stderr);
        }
    }
}

/// One stream being read: what fits is kept, the rest is read and forgotten.
struct Capture<'a> {
    pipe: Option<Receiver>,
    data: Vec<u8>,
    share: Share<'a>,
    started: Instant,
}

impl<'a> Capture<'a> {
    fn open(path: &Path, room: &'a Room<'a>, started: Instant) -> Result<Self> {
        let pipe = OpenOptions::new().open_receiver(path).act("open", path.display())?;
        Ok(Self { pipe: Some(pipe), data: Vec::new(), share: room.share(), started })
    }

    fn none(room: &'a Room<'a>, started: Instant) -> Self {
        Self { pipe: None, data: Vec::new(), share: room.share(), started }
    }

    /// Reads until the end. `activity` is told when bytes came, in milliseconds since the start.
    async fn pump(&mut self, activity: &AtomicU64) {
        let Some(pipe) = &self.pipe else { return };
        while pipe.readable().await.is_ok() {
            let mut buffer = vec![0; READ];
            match pipe.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    let take = self.share.take(n);
                    self.data.extend_from_slice(&buffer[..take]);
                    activity.store(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
    }
}

/// An exec known to the shim. If the caller goes away before its end, it is killed and forgotten in the background.
struct Running {
    client: Client,
    id: String,
    exec_id: String,
    armed: bool,
}

impl Running {
    /// Starts it. A caller that leaves meanwhile may leave a request behind; the kill goes the same way after it, and the shim starts
    /// nothing that was killed before.
    async fn start(&self, fifos: &Fifos, terminal: bool, process: Vec<u8>) -> Result<()> {
        let mut request = api::ExecProcessRequest::new();
        request.id = self.id.clone();
        request.exec_id = self.exec_id.clone();
        request.terminal = terminal;
        request.stdout = fifos.stdout.to_string_lossy().into_owned();
        request.stderr = fifos.stderr.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        let mut spec = Any::new();
        spec.type_url = PROCESS.to_owned();
        spec.value = process;
        request.spec = Some(spec).into();
        self.client.task::<api::Empty>("Exec", &request).await?;
        let mut request = api::StartRequest::new();
        request.id = self.id.clone();
        request.exec_id = self.exec_id.clone();
        self.client.task::<api::StartResponse>("Start", &request).await.map(drop)
    }

    async fn wait(&self) -> Result<i32> {
        let mut request = api::WaitRequest::new();
        request.id = self.id.clone();
        request.exec_id = self.exec_id.clone();
        self.client.task_unbounded::<api::WaitResponse>("Wait", &request).await.map(|answer| task::code(answer.exit_status))
    }

    async fn kill_and_reap(&mut self) -> Result<()> {
        self.armed = false;
        kill_and_reap(self.client.clone(), std::mem::take(&mut self.id), std::mem::take(&mut self.exec_id)).await
    }

    /// It has ended: the shim may forget it, which nobody needs to wait for.
    fn forget(mut self) {
        self.armed = false;
        let request = delete_request(&self.id, &self.exec_id);
        let client = self.client.clone();
        tokio::spawn(async move { client.task::<api::DeleteResponse>("Delete", &request).await });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.armed {
            tokio::spawn(kill_and_reap(self.client.clone(), std::mem::take(&mut self.id), std::mem::take(&mut self.exec_id)));
        }
    }
}

async fn kill_and_reap(client: Client, id: String, exec_id: String) -> Result<()> {
    let mut kill = api::KillRequest::new();
    kill.id = id.clone();
    kill.exec_id = exec_id.clone();
    kill.signal = libc::SIGKILL.unsigned_abs();
    // It may have ended by itself meanwhile, or never have run.
    let _ = client.task::<api::Empty>("Kill", &kill).await;
    let mut wait = api::WaitRequest::new();
    wait.id = id.clone();
    wait.exec_id = exec_id.clone();
    let reaped = tokio::time::timeout(REAP_LIMIT, client.task_unbounded::<api::WaitResponse>("Wait", &wait)).await;
    let _ = client.task::<api::DeleteResponse>("Delete", &delete_request(&id, &exec_id)).await;
    match reaped {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(Kind::DeadlineExceeded, format!("reap exec of container {id}"))),
    }
}

fn delete_request(id: &str, exec_id: &str) -> api::DeleteRequest {
    let mut request = api::DeleteRequest::new();
    request.id = id.to_owned();
    request.exec_id = exec_id.to_owned();
    request
}
