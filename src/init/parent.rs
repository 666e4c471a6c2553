//! The parent's side: forks stage 1, listens until the new process is ready or has failed, and cleans up after failures.

use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, waitpid};

use super::channel::{self, Message};
use super::fault::{Fault, On};
use super::{Blocked, CREATE_CGROUP, CgroupRef, CreateRequest, ExecRequest, Executed, Gate, StepError, cgroup, stage1};
use crate::sys;

pub(super) fn create(request: CreateRequest) -> Result<Blocked, StepError> {
    let born = supervise(|sync| stage1::create(request, sync))?;
    Ok(Blocked { pid: born.pid, pidfd: born.pidfd, console: born.console, cgroup: born.cgroup, gate: Gate { sync: born.sync } })
}

pub(super) fn exec(request: ExecRequest) -> Result<Executed, StepError> {
    let born = supervise(|sync| stage1::exec(request, sync))?;
    if let Err(e) = executed(&born.sync) {
        reap(born.pid);
        return Err(e);
    }
    Ok(Executed { pid: born.pid, pidfd: born.pidfd, console: born.console })
}

pub(super) fn start(gate: &Gate) -> Result<(), StepError> {
    channel::signal(gate.sync.as_fd()).on("process is gone").map_err(|f| f.at("start"))?;
    executed(&gate.sync)
}

/// Waits for the children's end to close, which execve does.
fn executed(sync: &OwnedFd) -> Result<(), StepError> {
    match channel::receive(sync.as_fd()).on("children").map_err(|f| f.at("exec"))? {
        None => Ok(()),
        Some((Message::Failed(e), _)) => Err(e),
        Some(_) => Err(Fault::new("unexpected message", libc::EPROTO).at("exec")),
    }
}

/// A process that is ready, and the line to it.
struct Born {
    pid: u32,
    pidfd: OwnedFd,
    console: Option<OwnedFd>,
    cgroup: Option<CgroupRef>,
    sync: OwnedFd,
}

/// What was heard of stage 2.
#[derive(Default)]
struct Heard {
    pid: Option<u32>,
    cgroup: Option<String>,
    console: Option<OwnedFd>,
    ready: bool,
    failed: Option<StepError>,
}

fn supervise(stage1: impl FnOnce(&OwnedFd) -> i32) -> Result<Born, StepError> {
    let (ours, theirs) = channel::pair().on("socket pair").map_err(|f| f.at("fork"))?;
    // Found here once, every child finds it in its copy of our memory. Whoever needs it and cannot have it says so.
    let _ = crate::cgroups::Host::get();
    // A signal between here and the child's own reset would run the shim's handlers in the child.
    let mask = sys::process::block_signals();
    // Moved into the closure, the children's end is closed here when fork returns.
    let forked = sys::clone::fork(move || stage1(&theirs));
    sys::process::set_signal_mask(&mask);
    let stage1 = forked.on("stage 1").map_err(|f| f.at("fork"))?;
    let mut heard = listen(&ours);
    wait(stage1);
    let ready = if heard.ready { heard.pid.ok_or_else(silent).and_then(|pid| Ok((pid, open_pidfd(pid)?))) } else { Err(silent()) };
    match ready {
        Ok((pid, pidfd)) => Ok(Born { pid, pidfd, console: heard.console, cgroup: heard.cgroup.map(|path| CgroupRef { path }), sync: ours }),
        Err(e) => Err(give_up(&mut heard).unwrap_or(e)),
    }
}

fn silent() -> StepError {
    Fault::new("the process ended before it was ready", libc::ECHILD).at("set up")
}

/// Listens until stage 2 is ready or nobody is left to speak.
fn listen(sync: &OwnedFd) -> Heard {
    let mut heard = Heard::default();
    while !heard.ready {
        match channel::receive(sync.as_fd()) {
            Ok(Some((Message::Spawned { pid, cgroup }, _))) => {
                heard.pid = Some(pid);
                heard.cgroup = cgroup;
            }
            Ok(Some((Message::Ready, console))) => {
                heard.console = console;
                heard.ready = true;
            }
            Ok(Some((Message::Failed(e), _))) => {
                // The first failure is the cause; what follows from it is not told.
                heard.failed.get_or_insert(e);
            }
            Ok(None) => break,
            Err(e) => {
                heard.failed.get_or_insert(Fault::new("message", e.raw_os_error().unwrap_or(libc::EPROTO)).at("set up"));
                break;
            }
        }
    }
    heard
}

/// Ends and reaps what is left and takes away its cgroup; what went wrong.
fn give_up(heard: &mut Heard) -> Option<StepError> {
    let status = heard.pid.and_then(reap);
    let failed = heard.failed.take();
    if let Some(path) = heard.cgroup.take() {
        // A group that could not be made may be somebody else's.
        cgroup::discard(&path, failed.as_ref().is_some_and(|e| e.step == CREATE_CGROUP));
    }
    failed.or_else(|| {
        let signal = status?.terminating_signal()?;
        Some(Fault::new(format_args!("the process was killed by signal {signal}"), libc::ECHILD).at("set up"))
    })
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
