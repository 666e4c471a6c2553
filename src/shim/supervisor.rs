//! The table of containers and execs of this shim, and what may be done to them when.
//!
//! A container is Created (first process blocked) until `start`, then Running, then Stopped until `delete`. An exec has no
//! process before its `start`. Only this file and `ending.rs` change the table. There is one thread; whatever waits does so without
//! the table, and looks again afterwards.

mod ending;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::failure::step;
use super::io::{self, Addresses, Log};
use super::kill;
use super::making::{Making, born};
use super::process::{Exit, Outcome, Process, told};
use super::sandbox::Sandbox;
use crate::cgroups::Manager;
use crate::disk::bundle::{self, Made, Of, Recorded};
use crate::init::{self, CgroupRef, CreateRequest, ExecRequest, Gate};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::RootMount;
use crate::stdx::clock::now_ns;
use crate::stdx::failpoint;

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
    /// Containers in the making.
    making: BTreeMap<String, Arc<Making>>,
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
    /// Set by its start; told when it is to be given up before it runs.
    starting: Option<Arc<Notify>>,
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
        let idle = |table: &Table| table.containers.is_empty() && table.making.is_empty();
        if now || idle(&self.table()) {
            self.shutdown.notify_one();
        }
    }

    /// Makes a container, its first process blocked before exec; its pid.
    ///
    /// # Errors
    /// `AlreadyExists`; the failed step of init; `Cancelled` when it is deleted meanwhile. Nothing is left behind.
    pub async fn create(self: Arc<Self>, id: String, bundle: PathBuf, rootfs: Vec<RootMount>, addresses: Addresses) -> Result<u32> {
        let making = {
            let mut table = self.table();
            if table.containers.contains_key(&id) || table.making.contains_key(&id) {
                return Err(Error::new(Kind::AlreadyExists, format!("container {id}")));
            }
            let making = Making::begin();
            table.making.insert(id.clone(), making.clone());
            making
        };
        let made = make(&id, bundle, rootfs, addresses, &making).await;
        let mut table = self.table();
        table.making.remove(&id);
        making.end();
        let container = made?;
        let pid = container.process.pid;
        table.containers.insert(id, container);
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
        container.execs.insert(exec.to_owned(), Exec { spec, addresses, process: None, done: Arc::new(watch::Sender::new(None)), starting: None });
        Ok(())
    }

    /// Lets the container's first process or an exec run; its pid.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it waits to be started; the failed step (a missing program is one).
    pub async fn start(self: Arc<Self>, id: String, exec: String) -> Result<u32> {
        if !exec.is_empty() {
            return self.start_exec(&id, &exec).await;
        }
        let (gate, pid) = {
            let mut table = self.table();
            let container = table.container(&id)?;
            let gate = container.gate.take().ok_or_else(|| Error::precondition(format!("container {id} is started already")))?;
            (gate, container.process.pid)
        };
        failpoint::hit("shim.start.asked");
        // Whoever wants its end meanwhile kills the process, which is known already.
        let opened = match gate.open().map_err(step) {
            Ok(opening) => born(opening, &Notify::new(), "start").await,
            Err(e) => Err(e),
        };
        if let Err(e) = opened {
            if let Ok(container) = self.table().container(&id) {
                container.failed = true;
            }
            return Err(e);
        }
        failpoint::hit("shim.start.opened");
        Ok(pid)
    }

    async fn start_exec(&self, id: &str, exec: &str) -> Result<u32> {
        failpoint::hit("shim.exec.asked");
        let (execution, ends, cancel) = self.table().container(id)?.begin_exec(id, exec)?;
        failpoint::hit("shim.exec.begun");
        let executed = born(execution, &cancel, "exec").await;
        failpoint::hit("shim.exec.forked");
        let mut table = self.table();
        let (cgroup, exec) = match table.container(id).and_then(|container| Ok((container.cgroup.clone(), container.exec(id, exec)?))) {
            Ok(known) => known,
            // The container, or the exec, is gone by now, and nobody else knows of this process.
            Err(gone) => {
                return Err(executed.map_or_else(
                    |e| e,
                    |executed| {
                        tokio::spawn(kill::stray(executed.pidfd));
                        gone
                    },
                ));
            }
        };
        let started = executed.and_then(|mut executed| {
            let running = ends.run(executed.console.take())?;
            Process::watch(executed.pid, executed.pidfd, None, running, exec.done.clone())
        });
        match started {
            Ok(process) => {
                let pid = process.pid;
                exec.process = Some(process.clone());
                // It was killed before it was known.
                if exec.done.borrow().is_some() {
                    kill::session(&process, cgroup.as_ref())?;
                }
                Ok(pid)
            }
            Err(e) => {
                exec.done.send_replace(Some(Exit { code: NEVER_RAN, at: now_ns() }));
                Err(e)
            }
        }
    }

    /// Resolves when the first process of a container whose start failed is reaped: it is dying when its error arrives, and who
    /// is told of the failure deletes the container next.
    pub async fn failed_start_is_over(&self, id: &str) {
        let process = self.table().containers.get(id).filter(|c| c.failed).map(|c| c.process.clone());
        if let Some(process) = process {
            let _ = tokio::time::timeout(DYING, process.reaped()).await;
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
        failpoint::hit("shim.reopen.asked");
        match &self.table().container(id)?.log {
            Some(log) => io::reopen(log)?,
            None => return Ok(()),
        }
        failpoint::hit("shim.reopen.reopened");
        Ok(())
    }
}

/// A container whose first process is blocked before exec.
async fn make(id: &str, bundle: PathBuf, rootfs: Vec<RootMount>, addresses: Addresses, making: &Making) -> Result<Container> {
    let (stdio, ends) = io::open(&addresses)?;
    failpoint::hit("shim.create.opened");
    let creation = init::create(CreateRequest { bundle: bundle.clone(), rootfs, stdio }).map_err(step)?;
    failpoint::hit("shim.create.begun");
    let init::Blocked { pid, pidfd, console, cgroup, gate } = born(creation, making.cancelled(), &format!("container {id}")).await?;
    failpoint::hit("shim.create.blocked");
    let made = Made { process: Recorded::of(pid).ok(), cgroup: cgroup.as_ref().map(|c| c.path.clone()) };
    let done = Arc::new(watch::Sender::new(None));
    let watched = (|| {
        bundle::write(&bundle, Of::Task, &made)?;
        failpoint::hit("shim.create.recorded");
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
            discard(pid, cgroup.as_ref()).await;
            return Err(e);
        }
    };
    Ok(Container { bundle, addresses, process, done, gate: Some(gate), cgroup, log, paused: false, failed: false, execs: BTreeMap::new() })
}

/// Ends a blocked process that was not taken charge of, as far as possible; the failure that led here is what gets reported.
async fn discard(pid: u32, cgroup: Option<&CgroupRef>) {
    // Our child and not reaped yet, so the number is still its own.
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pidfd) = pid.and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()) {
        kill::stray(pidfd).await;
    }
    if let Some(manager) = cgroup.and_then(|cgroup| Manager::open(&cgroup.path).ok()) {
        let _ = kill::until_gone(|| manager.remove_step()).await;
    }
}

impl Container {
    /// Forks an exec; what tells of it, its streams, and how to give it up.
    fn begin_exec(&mut self, id: &str, exec: &str) -> Result<(init::Execution, io::Ends, Arc<Notify>)> {
        if !matches!(self.status(), Status::Running) {
            return Err(Error::precondition(format!("container {id} is not running")));
        }
        let (bundle, pid, cgroup) = (self.bundle.clone(), self.process.pid, self.cgroup.clone());
        let exec = self.exec(id, exec)?;
        if exec.status() != Status::Created || exec.starting.is_some() {
            return Err(Error::precondition(format!("an exec of container {id} is started already")));
        }
        let begun = io::open(&exec.addresses).and_then(|(stdio, ends)| {
            let process = std::mem::take(&mut exec.spec);
            let execution = init::exec(ExecRequest { bundle, process, pid, stdio, cgroup }).map_err(step)?;
            Ok((execution, ends))
        });
        match begun {
            Ok((execution, ends)) => Ok((execution, ends, exec.starting.insert(Arc::default()).clone())),
            Err(e) => {
                exec.done.send_replace(Some(Exit { code: NEVER_RAN, at: now_ns() }));
                Err(e)
            }
        }
    }
}
