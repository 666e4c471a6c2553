//! Ending more than one process: an exec with all it started, a list, or what a bundle recorded.
//!
//! While the shim serves, nothing here waits for a process with the thread: signals are sent, and [`until_gone`] looks for what
//! became of it between other work. Only [`recorded`] waits; it is for a program that has nothing else to do.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::time::Instant;

use super::io::watched;
use super::process::{Process, reap};
use crate::cgroups::Manager;
use crate::disk::bundle::{Made, Stat};
use crate::init::CgroupRef;
use crate::model::error::{Act, Error, Kind, Result};

/// A process may start others while they are being killed; each round catches those. A program that outruns this many
/// rounds is a fork bomb, and the container's process limit is the defence against that.
const ROUNDS: usize = 16;

/// A killed process is gone within this time unless it hangs in the kernel, or has very much memory to give back. The daemon asks
/// twice, and twice this is less than it waits for an answer: so it hears which process it is.
pub const DEATH_LIMIT: Duration = Duration::from_secs(4);
/// Pauses between two looks at a group whose processes die; the first is as long as a death nearly always takes. Not all groups
/// tell when they are empty (v1 does not), and where nothing dies for seconds some looks cost less than knowing at once is worth.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(64);

/// Repeats `step` until nothing is in its way. It must not wait; what is still in the way after [`DEATH_LIMIT`] is the error.
///
/// # Errors
/// From `step`.
pub async fn until_gone(mut step: impl FnMut() -> Result<Option<Error>>) -> Result<()> {
    let deadline = Instant::now() + DEATH_LIMIT;
    let mut pause = FIRST_PAUSE;
    loop {
        match step()? {
            None => return Ok(()),
            Some(e) if Instant::now() >= deadline => return Err(e),
            Some(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Kills a child that nobody watches, and reaps it whenever the kernel lets go of it.
pub async fn stray(pidfd: OwnedFd) {
    let _ = crate::sys::daemon::signal(pidfd.as_fd(), libc::SIGKILL);
    if let Ok(pidfd) = watched(pidfd, Interest::READABLE, "process") {
        reap(&pidfd).await;
    }
}

/// Kills an exec and all it started: its session, and the descendants that made sessions of their own, found inside the
/// container's cgroup.
///
/// # Errors
/// From the kernel.
pub fn session(leader: &Process, cgroup: Option<&CgroupRef>) -> Result<()> {
    let Some(cgroup) = cgroup else {
        // Without a cgroup of ours: at least the process group it leads.
        if let Some(pid) = i32::try_from(leader.pid).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
        return leader.signal(libc::SIGKILL);
    };
    let manager = Manager::open(&cgroup.path)?;
    let mut killed = BTreeSet::new();
    for _ in 0..ROUNDS {
        // The tree is read before its root dies: orphans lose their parent and with it their way to be found.
        let members = family(leader.pid, &manager.procs()?, &killed);
        let new: Vec<u32> = members.iter().copied().filter(|pid| !killed.contains(pid)).collect();
        if new.is_empty() {
            break;
        }
        each(&new, libc::SIGKILL)?;
        killed.extend(new);
    }
    leader.signal(libc::SIGKILL)
}

/// `leader` and everybody in `all` who is of its session, or a child of the family, or of the session of one.
fn family(leader: u32, all: &[u32], known: &BTreeSet<u32>) -> BTreeSet<u32> {
    let stats: Vec<(u32, Stat)> = all.iter().filter_map(|pid| Some((*pid, Stat::read(*pid)?))).collect();
    let mut members = known.clone();
    members.insert(leader);
    loop {
        let before = members.len();
        let more: Vec<u32> = stats.iter().filter(|(_, s)| members.contains(&s.parent) || members.contains(&s.session)).map(|(pid, _)| *pid).collect();
        members.extend(more);
        if members.len() == before {
            // Only those that are there: the leader may be gone or elsewhere.
            members.retain(|pid| stats.iter().any(|(p, _)| p == pid));
            return members;
        }
    }
}

/// Signals every process of a list; those that have ended are fine.
///
/// # Errors
/// From the kernel.
pub fn each(pids: &[u32], signal: i32) -> Result<()> {
    for pid in pids {
        let Some(raw) = i32::try_from(*pid).ok().and_then(Pid::from_raw) else { continue };
        match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => crate::sys::daemon::signal(pidfd.as_fd(), signal).act("signal process", pid)?,
            Err(rustix::io::Errno::SRCH) => {}
            Err(e) => return Err(Error::with(Kind::Internal, format!("open process {pid}"), e)),
        }
    }
    Ok(())
}

/// Kills and removes what a bundle recorded, as far as possible: for shims that cannot be asked any more. Waits, for seconds where
/// something does not die.
pub fn recorded(made: &Made) {
    if let Some(process) = &made.process {
        let _ = process.kill();
    }
    if let Some(manager) = made.cgroup.as_deref().and_then(|path| Manager::open(path).ok()) {
        let _ = manager.kill().and_then(|()| manager.delete());
    }
}
