//! The parent's side: forks stage 1, listens until the new process is ready or has failed, and cleans up after failures. It need
//! not wait while it listens: the steps of a process may hang in the kernel (a dead network file system), and whoever made it has
//! others to look after.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, waitpid};

use super::channel::{self, Heard, Message};
use super::fault::{Fault, On};
use super::{CREATE_CGROUP, CgroupRef, CreateRequest, ExecRequest, Gate, StepError, cgroup, stage1};
use crate::sys;

pub(super) fn begin_create(request: CreateRequest) -> Result<Birth, StepError> {
    begin(Until::Ready, |sync| stage1::create(request, sync))
}

pub(super) fn begin_exec(request: ExecRequest) -> Result<Birth, StepError> {
    begin(Until::Executed, |sync| stage1::exec(request, sync))
}

pub(super) fn let_go(gate: &Gate) -> Result<(), StepError> {
    channel::signal((*gate.sync).as_fd()).on("process is gone").map_err(|f| f.at("start"))
}

/// Whether execve has succeeded, which closes the children's end; `None` when that is not known yet.
pub(super) fn executed(sync: BorrowedFd<'_>) -> Option<Result<(), StepError>> {
    let heard = channel::receive(sync).on("children").map_err(|f| f.at("exec"));
    Some(match heard {
        Ok(Heard::Nothing) => return None,
        Ok(Heard::End) => Ok(()),
        Ok(Heard::Message(Message::Failed(e), _)) | Err(e) => Err(e),
        Ok(Heard::Message(..)) => Err(Fault::new("unexpected message", libc::EPROTO).at("exec")),
    })
}

/// When a process counts as born.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// It is set up and waits.
    Ready,
    /// Its execve has succeeded.
    Executed,
}

/// A process that is ready, and the line to it.
pub(super) struct Born {
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
    pub(super) console: Option<OwnedFd>,
    pub(super) cgroup: Option<CgroupRef>,
    pub(super) sync: Arc<OwnedFd>,
}

/// A process on its way through the steps, and what was heard of it.
#[derive(Debug)]
pub(super) struct Birth {
    until: Until,
    sync: Arc<OwnedFd>,
    /// There is an outcome.
    over: bool,
    stage1: Option<Pid>,
    pid: Option<u32>,
    cgroup: Option<String>,
    console: Option<OwnedFd>,
    ready: bool,
    failed: Option<StepError>,
}

fn begin(until: Until, stage1: impl FnOnce(&OwnedFd) -> i32) -> Result<Birth, StepError> {
    let (ours, theirs) = channel::pair().on("socket pair").map_err(|f| f.at("fork"))?;
    // Found here once, every child finds it in its copy of our memory. Whoever needs it and cannot have it says so.
    let _ = crate::cgroups::Host::get();
    // A signal between here and the child's own reset would run the shim's handlers in the child.
    let mask = sys::process::block_signals();
    // Moved into the closure, the children's end is closed here when fork returns.
    let forked = sys::clone::fork(move || stage1(&theirs));
    sys::process::set_signal_mask(&mask);
    let stage1 = forked.on("stage 1").map_err(|f| f.at("fork"))?;
    Ok(Birth { until, sync: Arc::new(ours), over: false, stage1: Some(stage1), pid: None, cgroup: None, console: None, ready: false, failed: None })
}

impl Birth {
    /// Where it is heard of.
    pub(super) fn line(&self) -> BorrowedFd<'_> {
        (*self.sync).as_fd()
    }

    /// Listens until it is born or nobody is left to speak; `None` when there is nothing more to hear yet.
    pub(super) fn hear(&mut self) -> Option<Result<Born, StepError>> {
        if self.listen() { Some(self.end()) } else { None }
    }

    /// Takes in what was said; whether that is all that had to be.
    fn listen(&mut self) -> bool {
        while !(self.ready && self.until == Until::Ready) {
            match channel::receive(self.line()) {
                Ok(Heard::Nothing) => return false,
                Ok(Heard::Message(Message::Spawned { pid, cgroup }, _)) => (self.pid, self.cgroup) = (Some(pid), cgroup),
                Ok(Heard::Message(Message::Ready, console)) => (self.console, self.ready) = (console, true),
                // The first failure is the cause; what follows from it is not told.
                Ok(Heard::Message(Message::Failed(e), _)) => drop(self.failed.get_or_insert(e)),
                Ok(Heard::End) => break,
                Err(e) => {
                    self.failed.get_or_insert(Fault::new("message", e.raw_os_error().unwrap_or(libc::EPROTO)).at("set up"));
                    break;
                }
            }
        }
        true
    }

    /// Everything was said: stage 1 has ended or is about to.
    fn end(&mut self) -> Result<Born, StepError> {
        self.over = true;
        if let Some(stage1) = self.stage1.take() {
            wait(stage1);
        }
        let born = match self.pid {
            Some(pid) if self.ready && self.failed.is_none() => open_pidfd(pid).map(|pidfd| (pid, pidfd)),
            _ => Err(silent()),
        };
        match born {
            Ok((pid, pidfd)) => {
                let cgroup = self.cgroup.take().map(|path| CgroupRef { path });
                Ok(Born { pid, pidfd, console: self.console.take(), cgroup, sync: self.sync.clone() })
            }
            Err(e) => Err(self.clear_away().unwrap_or(e)),
        }
    }

    /// Ends and reaps what is left and takes away its cgroup; what went wrong.
    fn clear_away(&mut self) -> Option<StepError> {
        let status = self.pid.take().and_then(reap);
        let failed = self.failed.take();
        if let Some(path) = self.cgroup.take() {
            // A group that could not be made may be somebody else's.
            cgroup::discard(&path, failed.as_ref().is_some_and(|e| e.step == CREATE_CGROUP));
        }
        failed.or_else(|| {
            let signal = status?.terminating_signal()?;
            Some(Fault::new(format_args!("the process was killed by signal {signal}"), libc::ECHILD).at("set up"))
        })
    }

    /// Gives up on it, wherever it is: it may hang in the kernel, so nothing is waited for. The children that were killed; more may
    /// be known of when these are dead.
    pub(super) fn abandon(&mut self) -> Vec<OwnedFd> {
        self.over = true;
        self.listen();
        let stage2 = self.pid.take().and_then(raw);
        let killed = [self.stage1.take(), stage2].into_iter().flatten().filter_map(|pid| {
            // They are our children and not waited for yet, so the numbers are still their own.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
        });
        killed.collect()
    }

    /// Takes away the cgroup of what was abandoned.
    pub(super) fn discard(&mut self) {
        if let Some(path) = self.cgroup.take() {
            cgroup::discard(&path, false);
        }
    }
}

/// Dropped before its end, nobody will reap it but whoever takes over the caller's children.
impl Drop for Birth {
    fn drop(&mut self) {
        if !self.over {
            self.abandon();
        }
    }
}

fn silent() -> StepError {
    Fault::new("the process ended before it was ready", libc::ECHILD).at("set up")
}

fn open_pidfd(pid: u32) -> Result<OwnedFd, StepError> {
    raw(pid).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()).ok_or_else(silent)
}

fn raw(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

fn reap(pid: u32) -> Option<rustix::process::WaitStatus> {
    let pid = raw(pid)?;
    // It is our child and not waited for yet, so the number is still its own. It may have ended.
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    wait(pid)
}

fn wait(pid: Pid) -> Option<rustix::process::WaitStatus> {
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.ok().flatten().map(|(_, status)| status),
        }
    }
}
