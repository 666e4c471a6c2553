//! How containers and execs end, or stand still. Signals are sent at once; what becomes of them is looked at later, without the table: a process
//! that hangs in the kernel, or takes seconds to give back its memory, holds up nobody but who wants its container deleted.

use std::sync::Arc;

use super::super::kill;
use super::super::process::{Exit, Process};
use super::{Container, Exec, NEVER_RAN, Status, Supervisor, Table};
use crate::cgroups::Manager;
use crate::model::error::{Error, Kind, Result};
use crate::stdx::clock::now_ns;
use crate::stdx::failpoint;

impl Supervisor {
    /// Sends a signal to one process; to an exec's whole session with SIGKILL; to everything in the container with `all`.
    ///
    /// # Errors
    /// `NotFound`; from the kernel. Ended processes are fine.
    pub fn kill(&self, id: &str, exec: &str, signal: i32, all: bool) -> Result<()> {
        let mut table = self.table();
        if let Some(making) = table.making.get(id).filter(|_| signal == libc::SIGKILL) {
            making.cancel();
            return Ok(());
        }
        let process = match table.process(id, exec) {
            // An exec that does not run yet has no process to end.
            Err(e) if e.kind == Kind::FailedPrecondition && signal == libc::SIGKILL => {
                table.container(id)?.exec(id, exec)?.give_up();
                return Ok(());
            }
            process => process?,
        };
        let container = table.container(id)?;
        if !exec.is_empty() && signal == libc::SIGKILL {
            return kill::session(&process, container.cgroup.as_ref());
        }
        if !all || !exec.is_empty() {
            failpoint::hit("shim.signal.asked");
            let sent = process.signal(signal);
            failpoint::hit("shim.signal.sent");
            return sent;
        }
        failpoint::hit("shim.kill.asked");
        if signal == libc::SIGKILL {
            let killed = container.kill_everything();
            failpoint::hit("shim.kill.killed");
            return killed;
        }
        match &container.cgroup {
            Some(cgroup) => kill::each(&Manager::open(&cgroup.path)?.procs()?, signal),
            None => process.signal(signal),
        }
    }

    /// Forgets an ended container or exec: kills what is left, removes the cgroup. A container that was never started is
    /// ended first.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs, or when something of it does not die; what could not be killed or removed.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        if !exec.is_empty() {
            return self.delete_exec(id, exec);
        }
        let making = self.table().making.get(id).cloned();
        if let Some(making) = making {
            making.cancel();
            making.ended().await;
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
        let reaped = tokio::time::timeout(kill::DEATH_LIMIT, process.reaped()).await;
        let exit = reaped.map_err(|_| Error::precondition(format!("delete container {id}: its process {} does not die", process.pid)))?;
        failpoint::hit("shim.delete.reaped");
        kill::until_gone(|| self.table().remove(id, &process)).await?;
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
        found.abandon();
        let pid = found.process.as_ref().map_or(0, |process| process.pid);
        container.execs.remove(exec);
        Ok((pid, exit))
    }

    /// Freezes the container or lets it go on.
    ///
    /// # Errors
    /// As [`Supervisor::cgroup`]; from the freezer; `FailedPrecondition` when a process in it does not stop: it runs on then.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let (manager, process) = {
            let mut table = self.table();
            let container = table.container(id)?;
            (container.manager(id)?, container.process.clone())
        };
        let restless = || Error::precondition(format!("{} container {id}: a process in it does not obey", if paused { "pause" } else { "resume" }));
        let stood = kill::until_gone(|| Ok((!manager.freeze_step(paused)?).then(restless))).await;
        if stood.is_err() && paused {
            let _ = manager.freeze_step(false);
        }
        stood?;
        self.table().same(id, &process)?.paused = paused;
        Ok(())
    }

    /// Kills everything in every container; the records stay until they are deleted.
    ///
    /// # Errors
    /// The first container that could not be killed; the others are.
    pub fn kill_all(&self) -> Result<()> {
        let table = self.table();
        table.making.values().for_each(|making| making.cancel());
        let results: Vec<Result<()>> = table.containers.values().map(Container::kill_everything).collect();
        results.into_iter().collect()
    }
}

impl Table {
    /// The container that was there before a wait: `process` tells it from a later one of the same name.
    fn same(&mut self, id: &str, process: &Arc<Process>) -> Result<&mut Container> {
        let container = self.container(id)?;
        if Arc::ptr_eq(&container.process, process) { Ok(container) } else { Err(Error::not_found(format!("container {id}"))) }
    }

    /// A step of a deletion: forgets the container once its cgroup is gone; otherwise what is in the way.
    fn remove(&mut self, id: &str, process: &Arc<Process>) -> Result<Option<Error>> {
        let container = self.same(id, process)?;
        if let Some(cgroup) = &container.cgroup
            && let Some(used) = Manager::open(&cgroup.path)?.remove_step()?
        {
            return Ok(Some(used));
        }
        failpoint::hit("shim.delete.removed");
        if let Some(container) = self.containers.remove(id) {
            container.process.abandon_streams();
            container.execs.values().for_each(Exec::abandon);
        }
        Ok(None)
    }
}

impl Container {
    /// Sends SIGKILL to all processes: the first one, then whatever is left in the cgroup. Execs in the making are given up: they join
    /// the cgroups of v1 last.
    fn kill_everything(&self) -> Result<()> {
        self.execs.values().filter(|exec| exec.is_starting()).for_each(Exec::give_up);
        self.process.signal(libc::SIGKILL)?;
        match &self.cgroup {
            Some(cgroup) => Manager::open(&cgroup.path)?.strike(),
            None => Ok(()),
        }
    }
}

impl Exec {
    /// Whether its start is under way.
    fn is_starting(&self) -> bool {
        self.starting.is_some() && self.status() == Status::Created
    }

    /// Nobody will ask for it any more.
    fn abandon(&self) {
        match &self.process {
            Some(process) => process.abandon_streams(),
            None => self.give_up(),
        }
    }

    /// It is not to run any more; who waits for it is told.
    fn give_up(&self) {
        if self.status() == Status::Created {
            self.done.send_replace(Some(Exit { code: NEVER_RAN, at: now_ns() }));
        }
        if let Some(starting) = &self.starting {
            starting.notify_one();
        }
    }
}
