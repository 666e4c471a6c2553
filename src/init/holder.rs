//! First process of a process namespace that containers share: it only reaps.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::PidfdFlags;

use super::StepError;
use super::fault::On;
use crate::sys;

/// Name of the process in `ps`.
const NAME: &std::ffi::CStr = c"mesocri-pod";

/// The process, which ends with this value unless it is told to stay: a maker that dies before the process is recorded leaves
/// nothing that nobody knows of.
#[derive(Debug)]
pub struct Holder {
    /// In the caller's process namespace.
    pub pid: u32,
    pidfd: OwnedFd,
    leave: OwnedFd,
}

impl Holder {
    /// From now on it lives until it is killed; its number and pidfd.
    ///
    /// # Errors
    /// When it is gone.
    pub fn stay(self) -> Result<(u32, OwnedFd), StepError> {
        rustix::io::write(&self.leave, &[1]).on("first process").map_err(|f| f.at("keep process namespace"))?;
        Ok((self.pid, self.pidfd))
    }
}

/// Starts a child in a new process namespace that reaps whatever is left to it, for ever, once it is told to stay.
///
/// # Errors
/// When it cannot be cloned.
pub fn spawn_pid_holder() -> Result<Holder, StepError> {
    let (told, leave) = pipe_with(PipeFlags::CLOEXEC).on("pipe").map_err(|f| f.at("clone process namespace"))?;
    // The child has both ends; without one of its own it hears of our end.
    let leave_copied = leave.as_raw_fd();
    let mask = sys::process::block_signals();
    let cloned = sys::clone::child_in(libc::CLONE_NEWPID, || {
        sys::process::reset_signals();
        let ready = sys::process::close_range(leave_copied, leave_copied, false).is_ok() && rustix::thread::set_name(NAME).is_ok();
        if !ready || rustix::process::setsid().is_err() || rustix::io::read(&told, &mut [0; 1]) != Ok(1) {
            return 1;
        }
        // The shim's sockets and files are not for a process that lives as long as the pod.
        if sys::process::close_range(0, i32::MAX, false).is_err() {
            return 1;
        }
        // The kernel then reaps what is left to this process, without waking it.
        sys::process::reap_children_unseen();
        loop {
            nix::unistd::pause();
        }
    });
    sys::process::set_signal_mask(&mask);
    let at = |f: super::fault::Fault| f.at("clone process namespace");
    let pid = cloned.on("first process").map_err(at)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).on("first process").map_err(at)?;
    Ok(Holder { pid: pid.as_raw_nonzero().get().unsigned_abs(), pidfd, leave })
}

/// Waits until `SIGTERM` or `SIGINT` comes; children that end meanwhile are reaped unseen. For a process of its own.
///
/// # Errors
/// When signals cannot be waited for.
pub fn pause() -> Result<(), StepError> {
    use nix::sys::signal::{SigSet, Signal};
    let ends = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    // Blocked and waited for: process 1 gets no signal that it has not asked for.
    ends.thread_block().on("signals").map_err(|f| f.at("pause"))?;
    sys::process::reap_children_unseen();
    ends.wait().on("signals").map_err(|f| f.at("pause"))?;
    Ok(())
}
