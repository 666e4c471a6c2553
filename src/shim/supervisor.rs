//! The table of containers and execs of this shim, and what may be done to them when.
//!
//! A container is Created (first process blocked) until `start`, then Running, then Stopped until `delete`. An exec has no
//! process before its `start`. Only this file changes the table; requests come one at a time because the thread is one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::failure::step;
use super::io::{self, Addresses, Log};
use super::kill;
use super::process::{Exit, Outcome, Process, told};
use super::sandbox::Sandbox;
use crate::cgroups::Manager;
use crate::disk::bundle::{self, Made, Of, Recorded};
use crate::init::{self, CgroupRef, CreateRequest, ExecRequest, Gate};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::RootMount;
use crate::stdx::clock::now_ns;

/// Exit code of what never ran.
const NEVER_RAN: u32 = 255;

/// A process that could not exec ends at once.
const DYING: Duration = Duration::from_secs(2);

/// Everything this shim knows.
#[derive(Default)]
pub struct Supervisor {
    table: Mutex<Table>,
    shutdown: Notify,
}

/// The state behind [`Supervisor`].
#[derive(Default)]
pub struct Table {
    containers: BTreeMap<String, Container>,
    /// The pod, when there is a sandbox.
    pub sandbox: Sandbox,
}

struct Container {
    bundle: PathBuf,
    addresses: Addresses,
    process: Arc<Process>,
    done: Arc<Outcome>,
    /// What the first process waits for, until it is started.
    gate: Option<Gate>,
    cgroup: Option<CgroupRef>,
    log: Option<Log>,
    paused: bool,
    /// Its start failed; the first process dies or is dead.
    failed: bool,
    execs: BTreeMap<String, Exec>,
}

struct Exec {
    spec: Vec<u8>,
    addresses: Addresses,
    process: Option<Arc<Process>>,
    done: Arc<Outcome>,
}

/// Where a process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not started.
    Created,
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Ended.
    Stopped(Exit),
}

/// What `State` tells.
pub struct State {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// 0 when there is no process yet.
    pub pid: u32,
    /// Where it stands.
    pub status: Status,
    /// Its streams.
    pub addresses: Addresses,
}

impl Table {
    fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Error::not_found(format!("container {id}")))
    }

    fn process(&mut self, id: &str, exec: &str) -> Result<Arc<Process>> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Ok(container.process.clone());
        }
        let exec_found = container.exec(id, exec)?;
        exec_found.process.clone().ok_or_else(|| Error::precondition(format!("exec {exec} of container {id} is not started")))
    }
}

impl Container {
    fn exec(&mut self, id: &str, exec: &str) -> Result<&mut Exec> {
        self.execs.get_mut(exec).ok_or_else(|| Error::not_found(format!("exec {exec} of container {id}")))
    }

    fn status(&self) -> Status {
        match self.process.exit() {
            Some(exit) => Status::Stopped(exit),
            None if self.gate.is_some() => Status::Created,
            None if self.paused => Status::Paused,
            None => Status::Running,
        }
    }

    fn manager(&self, id: &str) -> Result<Manager> {
        match &self.cgroup {
            Some(cgroup) => Manager::open(&cgroup.path),
            None => Err(Error::precondition(format!("container {id} has no cgroup of the shim's"))),
        }
    }

    /// Ends all processes: the first one, then whatever is left in the cgroup.
    fn kill_everything(&self) -> Result<()> {
        self.process.signal(libc::SIGKILL)?;
        match &self.cgroup {
            Some(cgroup) => Manager::open(&cgroup.path)?.strike(),
            None => Ok(()),
        }
    }
}

impl Exec {
    fn status(&self) -> Status {
        match (&self.process, *self.done.borrow()) {
            (_, Some(exit)) => Status::Stopped(exit),
            (Some(process), None) => process.exit().map_or(Status::Running, Status::Stopped),
            (None, None) => Status::Created,
        }
    }
}

impl Supervisor {
    /// The state; never held across an await.
    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when [`Supervisor::shut_down`] was called.
    pub async fn shutdown_requested(&self) {
        self.shutdown.notified().await;
    }

    /// Ends the shim if it has nothing to look after, or in any case with `now`.
    pub fn shut_down(&self, now: bool) {
        if now || self.table().containers.is_empty() {
            self.shutdown.notify_one();
        }
    }

    /// Makes a container, its first process blocked before exec; its pid.
    ///
    /// # Errors
    /// `AlreadyExists`; the failed step of init. Nothing is left behind.
    pub fn create(&self, id: &str, bundle: &Path, rootfs: Vec<RootMount>, addresses: Addresses) -> Result<u32> {
        let mut table = self.table();
        if table.containers.contains_key(id) {
            return Err(Error::new(Kind::AlreadyExists, format!("container {id}")));
        }
        let (stdio, ends) = io::open(&addresses)?;
        let init::Blocked { pid, pidfd, console, cgroup, gate } = init::create(CreateRequest { bundle: bundle.to_owned(), rootfs, stdio }).map_err(step)?;
        let made = Made { process: Recorded::of(pid).ok(), cgroup: cgroup.as_ref().map(|c| c.path.clone()) };
        let done = Arc::new(watch::Sender::new(None));
        let watched = (|| {
            bundle::write(bundle, Of::Task, &made)?;
            let running = ends.run(console)?;
            let log = running.log.clone();
            // Best effort: without it the news of the exit comes some milliseconds later.
            let mounts = std::fs::File::open(format!("/proc/{pid}/ns/mnt")).ok().map(Into::into);
            Ok((Process::watch(pid, pidfd, mounts, running, done.clone())?, log))
        })();
        let (process, log) = match watched {
            Ok(watched) => watched,
            Err(e) => {
                drop(gate);
                kill::recorded(&made);
                return Err(e);
            }
        };
        let (bundle, gate, execs) = (bundle.to_owned(), Some(gate), BTreeMap::new());
        let container = Container { bundle, addresses, process, done, gate, cgroup, log, paused: false, failed: false, execs };
        table.containers.insert(id.to_owned(), container);
        Ok(pid)
    }

    /// Registers an exec; it runs when it is started.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`.
    pub fn exec(&self, id: &str, exec: &str, spec: Vec<u8>, addresses: Addresses) -> Result<()> {
        let mut table = self.table();
        let container = table.container(id)?;
        if container.execs.contains_key(exec) {
            return Err(Error::new(Kind::AlreadyExists, format!("exec {exec} of container {id}")));
        }
        container.execs.insert(exec.to_owned(), Exec { spec, addresses, process: None, done: Arc::new(watch::Sender::new(None)) });
        Ok(())
    }

    /// Lets the container's first process or an exec run; its pid.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it waits to be started; the failed step (a missing program is one).
    pub fn start(&self, id: &str, exec: &str) -> Result<u32> {
        let mut table = self.table();
        let container = table.container(id)?;
        if !exec.is_empty() {
            return container.start_exec(id, exec);
        }
        let gate = container.gate.take().ok_or_else(|| Error::precondition(format!("container {id} is started already")))?;
        if let Err(e) = gate.open() {
            container.failed = true;
            return Err(step(e));
        }
        Ok(container.process.pid)
    }

    /// Resolves when the first process of a container whose start failed is reaped: it is dying when its error arrives, and who
    /// is told of the failure deletes the container next.
    pub async fn failed_start_is_over(&self, id: &str) {
        let process = self.table().containers.get(id).filter(|c| c.failed).map(|c| c.process.clone());
        if let Some(process) = process {
            let _ = tokio::time::timeout(DYING, process.reaped()).await;
        }
    }

    /// Sends a signal to one process; to an exec's whole session with SIGKILL; to everything in the container with `all`.
    ///
    /// # Errors
    /// `NotFound`; from the kernel. Ended processes are fine.
    pub fn kill(&self, id: &str, exec: &str, signal: i32, all: bool) -> Result<()> {
        let mut table = self.table();
        let process = match table.process(id, exec) {
            // An exec that never ran has no process to end; who waits for it is told.
            Err(e) if e.kind == Kind::FailedPrecondition && signal == libc::SIGKILL => {
                let never = Exit { code: NEVER_RAN, at: now_ns() };
                table.container(id)?.exec(id, exec)?.done.send_replace(Some(never));
                return Ok(());
            }
            process => process?,
        };
        let container = table.container(id)?;
        if !exec.is_empty() && signal == libc::SIGKILL {
            return kill::session(&process, container.cgroup.as_ref());
        }
        if !all || !exec.is_empty() {
            return process.signal(signal);
        }
        if signal == libc::SIGKILL {
            return container.kill_everything();
        }
        match &container.cgroup {
            Some(cgroup) => kill::each(&Manager::open(&cgroup.path)?.procs()?, signal),
            None => process.signal(signal),
        }
    }

    /// Resolves when the process has ended and its output is drained (bounded). Before its start is fine.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit> {
        let done = {
            let mut table = self.table();
            let container = table.container(id)?;
            if exec.is_empty() { container.done.clone() } else { container.exec(id, exec)?.done.clone() }
        };
        Ok(told(&done).await)
    }

    /// Forgets an ended container or exec: kills what is left, removes the cgroup. A container that was never started is
    /// ended first.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs; what could not be killed or removed.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        if !exec.is_empty() {
            return self.delete_exec(id, exec);
        }
        let process = {
            let mut table = self.table();
            let container = table.container(id)?;
            if matches!(container.status(), Status::Running | Status::Paused) {
                return Err(Error::precondition(format!("container {id} is running")));
            }
            container.kill_everything()?;
            container.gate = None;
            container.process.clone()
        };
        let exit = process.reaped().await;
        let mut table = self.table();
        let container = table.container(id)?;
        if let Some(cgroup) = &container.cgroup {
            Manager::open(&cgroup.path)?.remove()?;
        }
        if let Some(container) = table.containers.remove(id) {
            container.process.abandon_streams();
            container.execs.values().filter_map(|exec| exec.process.as_ref()).for_each(|process| process.abandon_streams());
        }
        Ok((process.pid, exit))
    }

    fn delete_exec(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let mut table = self.table();
        let container = table.container(id)?;
        let found = container.exec(id, exec)?;
        let exit = match found.status() {
            Status::Stopped(exit) => exit,
            Status::Created => Exit { code: NEVER_RAN, at: now_ns() },
            Status::Running | Status::Paused => return Err(Error::precondition(format!("exec {exec} of container {id} is running"))),
        };
        let process = container.execs.remove(exec).and_then(|exec| exec.process);
        if let Some(process) = &process {
            process.abandon_streams();
        }
        Ok((process.map_or(0, |p| p.pid), exit))
    }

    /// Where a container or exec stands.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn state(&self, id: &str, exec: &str) -> Result<State> {
        let mut table = self.table();
        let container = table.container(id)?;
        let bundle = container.bundle.clone();
        if exec.is_empty() {
            return Ok(State { bundle, pid: container.process.pid, status: container.status(), addresses: container.addresses.clone() });
        }
        let exec = container.exec(id, exec)?;
        let pid = exec.process.as_ref().map_or(0, |p| p.pid);
        Ok(State { bundle, pid, status: exec.status(), addresses: exec.addresses.clone() })
    }

    /// The container's cgroup.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when the daemon placed it.
    pub fn cgroup(&self, id: &str) -> Result<Manager> {
        self.table().container(id)?.manager(id)
    }

    /// Freezes the container or lets it go on.
    ///
    /// # Errors
    /// As [`Supervisor::cgroup`]; from the freezer.
    pub fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let mut table = self.table();
        let container = table.container(id)?;
        let manager = container.manager(id)?;
        if paused { manager.freeze() } else { manager.thaw() }?;
        container.paused = paused;
        Ok(())
    }

    /// Gives a terminal its size.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` without a terminal.
    pub fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Result<()> {
        let process = self.table().process(id, exec)?;
        let console = process.console.as_ref().ok_or_else(|| Error::precondition(format!("process {} has no terminal", process.pid)))?;
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        io::resize(console, size(columns), size(rows))
    }

    /// No more input.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn close_input(&self, id: &str, exec: &str) -> Result<()> {
        self.table().process(id, exec)?.close_input();
        Ok(())
    }

    /// A new log file at the same path. Without a log there is nothing to do.
    ///
    /// # Errors
    /// `NotFound`; when the file cannot be made.
    pub fn reopen_log(&self, id: &str) -> Result<()> {
        match &self.table().container(id)?.log {
            Some(log) => io::reopen(log),
            None => Ok(()),
        }
    }

    /// Kills everything in every container; the records stay until they are deleted.
    ///
    /// # Errors
    /// The first container that could not be killed; the others are.
    pub fn kill_all(&self) -> Result<()> {
        let table = self.table();
        let results: Vec<Result<()>> = table.containers.values().map(Container::kill_everything).collect();
        results.into_iter().collect()
    }
}

impl Container {
    fn start_exec(&mut self, id: &str, exec: &str) -> Result<u32> {
        if !matches!(self.status(), Status::Running) {
            return Err(Error::precondition(format!("container {id} is not running")));
        }
        let (bundle, pid, cgroup) = (self.bundle.clone(), self.process.pid, self.cgroup.clone());
        let exec = self.exec(id, exec)?;
        if exec.status() != Status::Created {
            return Err(Error::precondition(format!("an exec of container {id} is started already")));
        }
        let started = (|| {
            let (stdio, ends) = io::open(&exec.addresses)?;
            let process = std::mem::take(&mut exec.spec);
            let mut executed = init::exec(ExecRequest { bundle, process, pid, stdio, cgroup }).map_err(step)?;
            let running = ends.run(executed.console.take())?;
            Process::watch(executed.pid, executed.pidfd, None, running, exec.done.clone())
        })();
        match started {
            Ok(process) => {
                let pid = process.pid;
                exec.process = Some(process);
                Ok(pid)
            }
            Err(e) => {
                exec.done.send_replace(Some(Exit { code: NEVER_RAN, at: now_ns() }));
                Err(e)
            }
        }
    }
}
