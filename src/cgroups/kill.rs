//! Ending and suspending all processes of a group.
//!
//! v2 does both itself (`cgroup.kill`, `cgroup.freeze`), and a hybrid host's v2 hierarchy is used too. v1 sends SIGKILL to all
//! until none is left, and freezes the group from the second round on, so that a fork bomb cannot outrun the loop.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::file::{Group, Reader};
use super::host::{Controller, Version};
use super::manager::{Manager, collect, still_used};
use crate::model::error::{Error, Kind, Result};

/// A killed process is gone within this time unless it hangs in the kernel (a dead NFS server).
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// After `cgroup.kill` the group is empty within this time; else one of the processes is elsewhere or stuck, and the loop looks.
const EVENT_LIMIT: Duration = Duration::from_secs(2);
/// A group is frozen within this time, for the same reason.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);
/// The longest a removed process keeps its group busy.
const REMOVE_LIMIT: Duration = Duration::from_secs(5);
/// Waits without an event to wait for are cut into pieces of this length (v1 tells neither "frozen" nor "empty").
const V1_STEP: Duration = Duration::from_millis(1);
/// Processes waited for at once; more wait for the next round.
const POLLED: usize = 64;

impl Manager {
    /// Kills every process of the group and its sub-groups and returns when none is left. They may still be zombies of their
    /// parent. A group that does not exist is fine.
    ///
    /// # Errors
    /// `DeadlineExceeded` after ten seconds, naming processes that do not die.
    pub fn kill(&self) -> Result<()> {
        let deadline = Instant::now() + KILL_LIMIT;
        if let Some(group) = self.struck_by_kernel() {
            wait_event(&group, "populated", 0, Instant::now() + EVENT_LIMIT);
        }
        for round in 0.. {
            let pids = self.procs_anywhere()?;
            if pids.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                let some: Vec<String> = pids.iter().take(5).map(u32::to_string).collect();
                return Err(Error::new(
                    Kind::DeadlineExceeded,
                    format!("kill cgroup {}: {} processes do not die, among them {}", self.path, pids.len(), some.join(" ")),
                ));
            }
            if round == 1 {
                let _ = self.freeze();
            }
            let killed = kill_all(&pids);
            self.thaw_v1();
            if self.host.locate(Controller::Freezer).is_some_and(|h| h.version == Version::V2) {
                let _ = self.thaw();
            }
            wait_gone(&killed, deadline);
        }
        Ok(())
    }

    /// Kills every process as [`Manager::kill`] does, but without waiting where the kernel kills a whole group at once (v2 since
    /// 5.14, also beside v1). A process that has left that group and stayed in one of v1 is found by [`Manager::remove`].
    ///
    /// # Errors
    /// As [`Manager::kill`].
    pub fn strike(&self) -> Result<()> {
        match self.struck_by_kernel() {
            Some(_) => Ok(()),
            None => self.kill(),
        }
    }

    /// [`Manager::delete`] for a group in which processes may be left: they are looked for, and killed, only if it is in use.
    ///
    /// # Errors
    /// As [`Manager::kill`] and [`Manager::delete`].
    pub fn remove(&self) -> Result<()> {
        match self.delete() {
            Err(e) if e.kind == Kind::FailedPrecondition => {
                self.kill()?;
                self.delete()
            }
            result => result,
        }
    }

    /// The v2 group if the kernel has killed all in it (and below): kernels before 5.14 have no `cgroup.kill`.
    fn struck_by_kernel(&self) -> Option<Group> {
        let group = self.group(self.host.v2()?);
        if !matches!(group.write_if_there("cgroup.kill", "1"), Ok(true)) {
            return None;
        }
        self.thaw_v1();
        Some(group)
    }

    /// Suspends all processes; returns when they stand still.
    ///
    /// # Errors
    /// `Unimplemented` without a freezer, `DeadlineExceeded` when they do not come to a stop.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// As [`Manager::freeze`].
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    /// Whether the group is suspended.
    pub fn is_frozen(&self) -> bool {
        let mut reader = Reader::default();
        self.freezer().is_ok_and(|(group, version)| match version {
            Version::V1 => reader.read(&group, "freezer.state").ok().flatten().is_some_and(|s| s.trim() == "FROZEN"),
            Version::V2 => reader.keyed(&group, "cgroup.events", "frozen") == Some(1),
        })
    }

    /// SIGKILL ends a process that v1 has frozen only when it is thawed. Costs one write; a missing freezer is fine.
    fn thaw_v1(&self) {
        if let Some(freezer) = self.host.locate(Controller::Freezer).filter(|h| h.version == Version::V1) {
            let _ = self.group(freezer).try_write("freezer.state", "THAWED");
        }
    }

    fn freezer(&self) -> Result<(Group, Version)> {
        // v1 first: on a hybrid host that is where other tools look for the state.
        let hierarchy = self
            .host
            .locate(Controller::Freezer)
            .ok_or_else(|| Error::new(Kind::Unimplemented, format!("freeze cgroup {}: this host has no freezer", self.path)))?;
        Ok((self.group(hierarchy), hierarchy.version))
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let (group, version) = self.freezer()?;
        let deadline = Instant::now() + FREEZE_LIMIT;
        match version {
            Version::V2 => {
                group.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
                if wait_event(&group, "frozen", u64::from(frozen), deadline) {
                    return Ok(());
                }
            }
            Version::V1 => {
                let state = if frozen { "FROZEN" } else { "THAWED" };
                let mut reader = Reader::default();
                loop {
                    group.write("freezer.state", state)?;
                    if reader.must(&group, "freezer.state")?.trim() == state {
                        return Ok(());
                    }
                    if Instant::now() >= deadline {
                        break;
                    }
                    pause();
                }
                if frozen {
                    let _ = group.try_write("freezer.state", "THAWED");
                }
            }
        }
        Err(Error::new(Kind::DeadlineExceeded, format!("{} cgroup {}", if frozen { "freeze" } else { "thaw" }, self.path)))
    }
}

/// SIGKILL to all, by pidfd, so that a number used again is never hit after the wait began. Those that could be opened come back.
fn kill_all(pids: &[u32]) -> Vec<OwnedFd> {
    let mut killed = Vec::new();
    for pid in pids {
        let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) else { continue };
        if let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) {
            let _ = pidfd_send_signal(&fd, Signal::KILL);
            if killed.len() < POLLED {
                killed.push(fd);
            }
        }
    }
    killed
}

/// Waits until the processes have ended, or a little while when there is nothing to wait for.
fn wait_gone(killed: &[OwnedFd], deadline: Instant) {
    if killed.is_empty() {
        pause();
        return;
    }
    for fd in killed {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        let _ = poll(&mut fds, Timespec::try_from(left).ok().as_ref());
    }
}

/// Waits until `key` of the v2 group's `cgroup.events` is `wanted`; the kernel wakes pollers of that file at every change. Says
/// whether it came true (also when the group is gone).
fn wait_event(group: &Group, key: &str, wanted: u64, deadline: Instant) -> bool {
    let path = group.dir().join("cgroup.events");
    let fd = match rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return true,
        Err(_) => return false,
    };
    let mut buf = [0u8; 256];
    loop {
        // Read from the start, then poll: a change after the read is not missed.
        let n = match rustix::io::pread(&fd, &mut buf, 0) {
            Ok(n) => n,
            Err(Errno::INTR) => continue,
            Err(Errno::NODEV) => return true,
            Err(_) => return false,
        };
        let text = std::str::from_utf8(&buf[..n]).unwrap_or("");
        if super::file::keys(text).any(|(k, v)| k == key && v == wanted) {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::PRI)];
        let _ = poll(&mut fds, Timespec::try_from(left).ok().as_ref());
    }
}

/// Calls `remove` until it succeeds. Between two tries it waits for the processes that keep the group busy.
pub(super) fn until_removed(group: &Group, version: Version, remove: impl Fn() -> io::Result<()>) -> Result<()> {
    let deadline = Instant::now() + REMOVE_LIMIT;
    loop {
        let e = match remove() {
            Ok(()) => return Ok(()),
            Err(e) => e,
        };
        // Live processes do not go away by waiting: only those that are exiting already are waited for.
        if e.raw_os_error() != Some(libc::EBUSY) || Instant::now() >= deadline || has_live(group) {
            return Err(still_used(group, "remove cgroup", e));
        }
        match version {
            Version::V2 if !wait_event(group, "populated", 0, deadline) => return Err(still_used(group, "remove cgroup", e)),
            _ => pause(),
        }
    }
}

/// Whether a process in the group or below is neither a zombie nor dying.
fn has_live(group: &Group) -> bool {
    let mut pids = Vec::new();
    let _ = collect(group, &mut Reader::default(), &mut pids, 0);
    pids.iter().any(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The state follows the name, which is in brackets and may hold anything.
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']) && !is_exiting(rest))
    })
}

/// `PF_EXITING` in the flags word of `/proc/PID/stat` (field 9, the seventh after the name).
fn is_exiting(after_name: &str) -> bool {
    const PF_EXITING: u64 = 4;
    after_name.split(' ').nth(6).and_then(|f| f.parse::<u64>().ok()).is_some_and(|flags| flags & PF_EXITING != 0)
}

/// The kernel has no event for this: give the processor away for a moment.
fn pause() {
    let _ = rustix::thread::nanosleep(&Timespec { tv_sec: 0, tv_nsec: V1_STEP.subsec_nanos().into() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exiting_flag_is_field_nine() {
        assert!(is_exiting("R 1 2 3 0 -1 4194308 0"));
        assert!(!is_exiting("S 1 2 3 0 -1 4194304 0"));
        assert!(!is_exiting(""));
    }
}
