//! Ending and suspending all processes of a group.
//!
//! v2 does both itself (`cgroup.kill`, `cgroup.freeze`), and a hybrid host's v2 hierarchy is used too. v1 sends SIGKILL to all
//! until nobody new is found, and freezes the group from the second round on, so that a fork bomb cannot outrun the loop.
//!
//! Each act comes in two forms: steps that wait for nothing ([`Manager::strike`], [`Manager::remove_step`],
//! [`Manager::freeze_step`]), for a caller with one thread and others to look after, and the whole ([`Manager::kill`],
//! [`Manager::freeze`]), made of the same steps, for one that may wait.

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
/// Looks for new processes in one strike. From the second on the group is being frozen, so that a few are enough.
const LOOKS: usize = 16;
/// Processes that an error names.
const NAMED: usize = 5;

/// What a strike by list has found and killed.
struct Struck {
    pids: Vec<u32>,
    /// Of some of them, to wait for their ends.
    pidfds: Vec<OwnedFd>,
}

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
        loop {
            let Struck { pids, pidfds } = self.strike_each()?;
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.undying(Kind::DeadlineExceeded, "kill cgroup", &pids));
            }
            wait_gone(&pidfds, deadline);
        }
    }

    /// Sends SIGKILL to every process of the group and its sub-groups, and to those born meanwhile, and waits for none to end. Where
    /// the kernel kills a whole group at once (v2 since 5.14, also beside v1), a process that has left that group and stayed in one of
    /// v1 is found by [`Manager::remove_step`]. A group that does not exist is fine.
    ///
    /// # Errors
    /// I/O errors.
    pub fn strike(&self) -> Result<()> {
        match self.struck_by_kernel() {
            Some(_) => Ok(()),
            None => self.strike_each().map(drop),
        }
    }

    /// A step towards the end of the group that waits for nothing: removes it, and kills what is in the way. `None` when it is gone
    /// from every hierarchy; otherwise why not (`FailedPrecondition`), and the caller tries again a moment later.
    ///
    /// # Errors
    /// What trying again does not change.
    pub fn remove_step(&self) -> Result<Option<Error>> {
        let Some(used) = self.try_delete()? else { return Ok(None) };
        let _ = self.struck_by_kernel();
        let Struck { pids, .. } = self.strike_each()?;
        // Nobody to be named: they died just now.
        Ok(Some(if pids.is_empty() { used } else { self.undying(Kind::FailedPrecondition, "remove cgroup", &pids) }))
    }

    fn undying(&self, kind: Kind, act: &str, pids: &[u32]) -> Error {
        let some: Vec<String> = pids.iter().take(NAMED).map(u32::to_string).collect();
        Error::new(kind, format!("{act} {}: {} processes do not die, among them {}", self.path, pids.len(), some.join(" ")))
    }

    /// SIGKILL to all that any hierarchy lists, and to those born while the list was read.
    fn strike_each(&self) -> Result<Struck> {
        let mut struck = Struck { pids: Vec::new(), pidfds: Vec::new() };
        for look in 0..LOOKS {
            let listed = self.procs_anywhere()?;
            let new: Vec<u32> = listed.into_iter().filter(|pid| struck.pids.binary_search(pid).is_err()).collect();
            if new.is_empty() {
                break;
            }
            if look == 1 {
                self.ask_frozen(true);
            }
            kill_all(&new, &mut struck.pidfds);
            struck.pids.extend(new);
            struck.pids.sort_unstable();
        }
        if !struck.pids.is_empty() {
            // Also one that was frozen before: only then does v1 let it die.
            self.ask_frozen(false);
        }
        Ok(struck)
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

    /// A step towards standing still, or going on, that waits for nothing: asks for it, and says whether it is so by now.
    ///
    /// # Errors
    /// `Unimplemented` without a freezer; I/O errors.
    pub fn freeze_step(&self, frozen: bool) -> Result<bool> {
        let (group, version) = self.freezer()?;
        let (file, word) = freezer_word(version, frozen);
        group.write(file, word)?;
        let mut reader = Reader::default();
        Ok(match version {
            Version::V1 => reader.must(&group, file)?.trim() == word,
            Version::V2 => reader.keyed(&group, "cgroup.events", "frozen") == Some(u64::from(frozen)),
        })
    }

    /// Asks the freezer, if there is one, and does not wait until it has obeyed.
    fn ask_frozen(&self, frozen: bool) {
        if let Ok((group, version)) = self.freezer() {
            let (file, value) = freezer_word(version, frozen);
            let _ = group.try_write(file, value);
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
        while !self.freeze_step(frozen)? {
            let in_time = match version {
                Version::V2 => wait_event(&group, "frozen", u64::from(frozen), deadline),
                Version::V1 => {
                    pause();
                    Instant::now() < deadline
                }
            };
            if !in_time {
                if frozen {
                    self.ask_frozen(false);
                }
                return Err(Error::new(Kind::DeadlineExceeded, format!("{} cgroup {}", if frozen { "freeze" } else { "thaw" }, self.path)));
            }
        }
        Ok(())
    }
}

/// File of the freezer, and what to write there.
fn freezer_word(version: Version, frozen: bool) -> (&'static str, &'static str) {
    match (version, frozen) {
        (Version::V1, true) => ("freezer.state", "FROZEN"),
        (Version::V1, false) => ("freezer.state", "THAWED"),
        (Version::V2, true) => ("cgroup.freeze", "1"),
        (Version::V2, false) => ("cgroup.freeze", "0"),
    }
}

/// SIGKILL to all, by pidfd, so that a number used again is never hit after the wait began. Some of those that could be opened are
/// added to `killed`.
fn kill_all(pids: &[u32], killed: &mut Vec<OwnedFd>) {
    for pid in pids {
        let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) else { continue };
        if let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) {
            let _ = pidfd_send_signal(&fd, Signal::KILL);
            if killed.len() < POLLED {
                killed.push(fd);
            }
        }
    }
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
