//! Files in a bundle, beside the OCI `config.json`: what lets a container or pod be cleaned up when its shim was killed.
//!
//! A process is recorded with its start time, so that a number the kernel gave to somebody else meanwhile is never killed.

use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::error::{Act, Error, Kind, Result};

/// OCI runtime spec.
pub const CONFIG: &str = "config.json";
/// Socket address of the shim, as its `start` verb printed it (containerd reads it too).
pub const ADDRESS: &str = "address";
/// What our shim made for a container ([`Made`]).
const TASK: &str = "task.json";
/// What our shim made for a pod's sandbox ([`Made`]); of another runtime's, its pause container, by the daemon.
const SANDBOX: &str = "sandbox.json";
/// The shim itself ([`Made`]). Ours writes it before it leaves the bundle: found even when nobody heard its answer. For others the
/// daemon does.
const SHIM: &str = "shim.json";

/// A killed process is dead within this time unless it hangs in the kernel.
const KILL_LIMIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// A process that is still itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Number in the host's process namespace.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot.
    pub start_time: u64,
}

impl Recorded {
    /// The process that has this number now.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: u32) -> Result<Self> {
        Ok(Self { pid, start_time: start_time(pid)? })
    }

    /// Whether it still lives (a zombie does not).
    pub fn alive(&self) -> bool {
        start_time(self.pid).is_ok_and(|t| t == self.start_time)
    }

    /// Kills it and waits until it is dead (a zombie at most), within [`KILL_LIMIT`]. One that has ended is fine.
    ///
    /// # Errors
    /// `DeadlineExceeded` when it hangs in the kernel; `PermissionDenied`.
    pub fn kill(&self) -> Result<()> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        // Looked at after the descriptor is open: from here on the number cannot change hands.
        if !self.alive() {
            return Ok(());
        }
        match pidfd_send_signal(&pidfd, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            result => result.act("kill process", self.pid)?,
        }
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&KILL_LIMIT)) {
            Ok(0) => Err(Error::new(Kind::DeadlineExceeded, format!("kill process {}: it does not die", self.pid))),
            result => result.map(drop).act("wait for process", self.pid),
        }
    }
}

/// What to kill and remove when nobody else can.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// The container's first process, or the holder of the pod's process namespace.
    pub process: Option<Recorded>,
    /// Cgroup to empty and remove.
    pub cgroup: Option<String>,
}

/// Which record of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// A container.
    Task,
    /// A sandbox.
    Sandbox,
    /// The shim's own process.
    Shim,
}

impl Of {
    fn file(self) -> &'static str {
        match self {
            Self::Task => TASK,
            Self::Sandbox => SANDBOX,
            Self::Shim => SHIM,
        }
    }
}

/// Writes what was made. The bundle lies in memory (state directory), so no sync.
///
/// # Errors
/// I/O errors with the act and the path.
pub fn write(bundle: &Path, of: Of, made: &Made) -> Result<()> {
    let path = bundle.join(of.file());
    put(&path, &serde_json::to_vec(made).act("encode", path.display())?)
}

/// Writes a file of a bundle: whole or not at all, also when the writer is killed half-way; who cleans up after it reads it. No sync.
///
/// # Errors
/// I/O errors with the path.
pub fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).act("write", new.display())?;
    std::fs::rename(&new, path).act("rename into place", path.display())
}

/// Reads what was made; `None` when nothing was recorded.
///
/// # Errors
/// I/O errors and damaged records, with the path.
pub fn read(bundle: &Path, of: Of) -> Result<Option<Made>> {
    json(&bundle.join(of.file()))
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).act("decode", path.display()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(format!("read {}", path.display()), e)),
    }
}

fn start_time(pid: u32) -> Result<u64> {
    let stat = Stat::read(pid).ok_or_else(|| Error::not_found(format!("process {pid}")))?;
    if stat.state == 'Z' || stat.state == 'X' {
        return Err(Error::not_found(format!("process {pid}")));
    }
    Ok(stat.start_time)
}

/// The parts of `/proc/PID/stat` that cleaning up needs (`proc(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Field 3.
    pub state: char,
    /// Field 4.
    pub parent: u32,
    /// Field 6.
    pub session: u32,
    /// Field 22.
    pub start_time: u64,
}

impl Stat {
    /// `None` when there is no such process.
    pub fn read(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The name (field 2) may contain blanks and parentheses; the last `)` ends it.
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let start_time = fields.nth(15)?.parse().ok()?;
        Some(Self { state, parent, session, start_time })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_never_seen_half_written() {
        let dir = tempfile::tempdir().unwrap();
        let made = Made { process: None, cgroup: Some("/x".repeat(2000)) };
        write(dir.path(), Of::Task, &made).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..2000).for_each(|_| write(dir.path(), Of::Task, &made).unwrap()));
            while !writer.is_finished() {
                assert_eq!(read(dir.path(), Of::Task).unwrap().as_ref(), Some(&made));
            }
        });
    }

    #[test]
    fn stat_survives_hostile_names() {
        let text = "7 (a) R 1 (b) S 5 6 8 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1000 2";
        assert_eq!(Stat::parse(text), Some(Stat { state: 'S', parent: 5, session: 8, start_time: 4242 }));
        assert_eq!(Stat::parse("garbage"), None);
    }

    #[test]
    fn a_process_is_itself_until_it_ends() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let recorded = Recorded::of(child.id()).unwrap();
        assert!(recorded.alive());
        assert!(!Recorded { start_time: recorded.start_time + 1, ..recorded }.alive());
        recorded.kill().unwrap();
        child.wait().unwrap();
        recorded.kill().unwrap();
        assert!(!recorded.alive());
        assert!(Recorded::of(recorded.pid).is_err());
    }

    #[test]
    fn made_round_trips_and_absence_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path(), Of::Task).unwrap(), None);
        let made = Made { process: Some(Recorded { pid: 7, start_time: 8 }), cgroup: Some("/a/b".to_owned()) };
        write(dir.path(), Of::Task, &made).unwrap();
        assert_eq!(read(dir.path(), Of::Task).unwrap(), Some(made));
        assert_eq!(read(dir.path(), Of::Sandbox).unwrap(), None);
    }
}
