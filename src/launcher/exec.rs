//! Running a command to its end. Output comes through two fifos in the container's bundle; a caller that leaves, a time-out and a
//! background child that keeps the output open all end the call.
//!
//! The name of the first fifo stays until the shim has forgotten the command: a shim cannot list its commands, and a daemon that is
//! killed meanwhile leaves so the word that its successor needs to end them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::fs::{CWD, FileType, Mode};
use tokio::net::unix::pipe::{OpenOptions, Receiver};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::output::{BUDGET, Room, Share};
use super::pod::Pod;
use super::shims::ShimLauncher;
use super::{ExecOutput, ExecSpec, bundle, task};
use crate::disk::bundle::CONFIG;
use crate::model::ContainerId;
use crate::model::error::{Act, Error, Kind, Result};
use crate::stdx::blocking;

/// After the command has ended, output is waited for until nothing came for this long: a background child may hold the
/// stream for ever.
const IDLE: Duration = Duration::from_millis(500);
/// How long a call whose time has run out waits for its command to be dead and reaped, so that whoever tries again finds it gone. A
/// command that hangs in the kernel, or a shim that stalls, takes longer; then the caller hears first.
const REAP_LIMIT: Duration = Duration::from_secs(2);
/// How long a killed command may take to be reaped before the shim is asked to forget it all the same, and told again to kill it.
const KILL_AGAIN: Duration = Duration::from_secs(10);
/// What the names of an exec's fifos begin with, and those of nothing else in a bundle.
const PREFIX: &str = "exec-";
/// The end of the name that stays.
const STDOUT: &str = "-stdout";
/// The end of the other.
const STDERR: &str = "-stderr";
/// Bytes read at once.
const READ: usize = 32 * 1024;
/// Type name of an OCI process inside containerd's messages.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

impl ShimLauncher {
    pub(super) async fn exec(&self, pod: &Arc<Pod>, id: &ContainerId, exec: &ExecSpec) -> Result<ExecOutput> {
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
        let mut running = Running::new(pod, id, exec_id, fifos);
        // What hangs while it is being set up has run out of its time as well.
        match tokio::time::timeout(timeout, running.start(exec.terminal, process)).await {
            Ok(started) => started?,
            Err(_) => return Err(overdue(running, id, timeout).await),
        }
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
        let Ok(code) = ended else { return Err(overdue(running, id, timeout).await) };
        let code = code?;
        running.forget();
        if room.is_refused() {
            tracing::warn!(container = %id, "output of a command was cut: commands in other containers hold all memory there is for it");
        }
        Ok(ExecOutput { code, stdout: stdout.data, stderr: stderr.data })
    }

    /// Ends, in the background, the commands that a daemon before this one ran in a pod: nobody waits for them any more, nor minds
    /// their time. Those of this daemon must come later.
    pub(super) async fn end_left_execs(&self, pod: &Arc<Pod>) {
        let (layout, id) = (self.layout.clone(), pod.id.clone());
        let look = move || {
            let mut left = Vec::new();
            for container in Self::containers_with_bundle(&layout, &id)? {
                let dir = layout.bundle(&id, &container);
                left.extend(named_in(&dir).into_iter().map(|exec_id| (container.clone(), dir.clone(), exec_id)));
            }
            Ok::<_, Error>(left)
        };
        let left = match blocking::run("look for left commands", look).await {
            Ok(left) => left,
            Err(error) => return tracing::warn!(pod = %pod.id, %error, "commands of the daemon before cannot be ended"),
        };
        for (container, dir, exec_id) in left {
            tracing::info!(%container, exec = exec_id, "a command whose caller is gone is ended");
            let fifos = Fifos::of(&dir, &exec_id, false);
            drop(Running::new(pod, &container, exec_id, fifos));
        }
    }
}

/// The commands that have a name in a bundle; none if it is gone.
fn named_in(dir: &Path) -> BTreeSet<String> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let names = names.filter(|name| name.starts_with(PREFIX));
    names.filter_map(|name| Some(name.strip_suffix(STDOUT).or_else(|| name.strip_suffix(STDERR))?.to_owned())).collect()
}

/// Ends a command whose time has run out, and says so, soon.
async fn overdue(running: Running, id: &ContainerId, timeout: Duration) -> Error {
    let how = match tokio::time::timeout(REAP_LIMIT, running.end()).await {
        Ok(_) => format!("killed after {timeout:?}"),
        Err(_) => format!("given up after {timeout:?}, its shim has yet to end it"),
    };
    Error::new(Kind::DeadlineExceeded, format!("exec in container {}: {how}", id.short()))
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
    format!("{PREFIX}{:016x}", u64::from_ne_bytes(bytes))
}

/// Makes a fifo only its owner may open.
pub(super) fn make_fifo(path: &Path) -> Result<()> {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).act("make fifo", path.display())
}

/// Named ends of the streams. The names go with the value, until the shim may know of them.
struct Fifos {
    stdout: PathBuf,
    stderr: Option<PathBuf>,
    handed_over: bool,
}

impl Fifos {
    fn of(dir: &Path, exec_id: &str, terminal: bool) -> Self {
        let path = |end: &str| dir.join(format!("{exec_id}{end}"));
        Self { stdout: path(STDOUT), stderr: (!terminal).then(|| path(STDERR)), handed_over: false }
    }

    fn make(dir: &Path, exec_id: &str, terminal: bool) -> Result<Self> {
        let fifos = Self::of(dir, exec_id, terminal);
        make_fifo(&fifos.stdout)?;
        fifos.stderr.as_deref().map_or(Ok(()), make_fifo)?;
        Ok(fifos)
    }

    /// What remains goes with the bundle.
    fn remove(&self) {
        let _ = std::fs::remove_file(&self.stdout);
        if let Some(stderr) = &self.stderr {
            let _ = std::fs::remove_file(stderr);
        }
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        if !self.handed_over {
            self.remove();
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

/// An exec that the shim may know. If the caller goes away before its end, it is killed and forgotten in the background.
struct Running(Option<Command>);

/// What is needed to speak of an exec.
struct Command {
    pod: Arc<Pod>,
    id: String,
    exec_id: String,
    fifos: Fifos,
}

impl Running {
    fn new(pod: &Arc<Pod>, id: &ContainerId, exec_id: String, mut fifos: Fifos) -> Self {
        fifos.handed_over = true;
        Self(Some(Command { pod: pod.clone(), id: id.as_str().to_owned(), exec_id, fifos }))
    }

    fn command(&self) -> Result<&Command> {
        self.0.as_ref().ok_or_else(|| Error::internal("run command: it was ended"))
    }

    /// Starts it. A caller that leaves meanwhile may leave a request behind; the kill goes the same way after it, and the shim starts
    /// nothing that was killed before.
    async fn start(&mut self, terminal: bool, process: Vec<u8>) -> Result<()> {
        let Command { pod, id, exec_id, fifos } = self.command()?;
        let mut request = api::ExecProcessRequest::new();
        request.id = id.clone();
        request.exec_id = exec_id.clone();
        request.terminal = terminal;
        request.stdout = fifos.stdout.to_string_lossy().into_owned();
        request.stderr = fifos.stderr.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        let mut spec = Any::new();
        spec.type_url = PROCESS.to_owned();
        spec.value = process;
        request.spec = Some(spec).into();
        pod.client.task::<api::Empty>("Exec", &request).await?;
        let mut request = api::StartRequest::new();
        request.id = id.clone();
        request.exec_id = exec_id.clone();
        pod.client.task::<api::StartResponse>("Start", &request).await?;
        // Both sides have it open now.
        if let Some(stderr) = self.0.as_mut().and_then(|command| command.fifos.stderr.take()) {
            let _ = std::fs::remove_file(stderr);
        }
        Ok(())
    }

    async fn wait(&self) -> Result<i32> {
        self.command()?.wait().await
    }

    /// Kills it and has the shim forget it; resolves when that is done, and is done whether waited for or not.
    fn end(mut self) -> JoinHandle<()> {
        match self.0.take() {
            Some(command) => tokio::spawn(command.end()),
            None => tokio::spawn(async {}),
        }
    }

    /// It has ended: the shim may forget it, which nobody needs to wait for.
    fn forget(mut self) {
        if let Some(command) = self.0.take() {
            tokio::spawn(async move {
                let _ = command.delete().await;
                command.fifos.remove();
            });
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(command) = self.0.take() {
            tokio::spawn(command.end());
        }
    }
}

impl Command {
    async fn wait(&self) -> Result<i32> {
        let mut request = api::WaitRequest::new();
        request.id = self.id.clone();
        request.exec_id = self.exec_id.clone();
        let answer = self.pod.shim.ask(|| self.pod.client.task_unbounded::<api::WaitResponse>("Wait", &request)).await;
        answer.map(|answer| task::code(answer.exit_status))
    }

    async fn kill(&self) -> Result<()> {
        let mut request = api::KillRequest::new();
        request.id = self.id.clone();
        request.exec_id = self.exec_id.clone();
        request.signal = libc::SIGKILL.unsigned_abs();
        self.pod.shim.insist(|| self.pod.client.task::<api::Empty>("Kill", &request)).await.map(drop)
    }

    async fn delete(&self) -> Result<()> {
        let mut request = api::DeleteRequest::new();
        request.id = self.id.clone();
        request.exec_id = self.exec_id.clone();
        match self.pod.shim.insist(|| self.pod.client.task::<api::DeleteResponse>("Delete", &request)).await {
            // Forgotten already, with its container or its shim.
            Err(e) if matches!(e.kind, Kind::NotFound | Kind::Unavailable) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Kills it, and has the shim forget it once it is reaped, however long the shim or the kernel takes.
    async fn end(self) {
        let mut reaped = std::pin::pin!(self.wait());
        loop {
            // It may have ended by itself meanwhile, or never have run.
            let _ = self.kill().await;
            let waited = tokio::time::timeout(KILL_AGAIN, &mut reaped).await.is_ok();
            // One that never ran is never reaped by some shims, and yet can be deleted.
            match self.delete().await {
                Ok(()) => break,
                Err(error) if waited => {
                    tracing::warn!(container = self.id, exec = self.exec_id, %error, "a command that was killed stays in its shim's table");
                    break;
                }
                Err(error) => tracing::debug!(container = self.id, exec = self.exec_id, %error, "a command that was killed is not dead yet"),
            }
        }
        self.fifos.remove();
    }
}
