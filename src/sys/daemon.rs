//! Processes: becoming a daemon, and signals by pidfd with any number (the safe wrappers know named signals only).

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

/// Which side of [`fork`] this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The caller; the child's number.
    Parent(u32),
    /// The new process.
    Child,
}

/// Copies the calling process.
///
/// # Errors
/// From fork(2); `EBUSY` when the process has more than one thread, whose locks the child could never take again.
pub fn fork() -> std::io::Result<Side> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(std::io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: the process has one thread (checked above), so the child's memory is consistent and it may go on as usual.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Child),
        pid if pid > 0 => Ok(Side::Parent(pid.unsigned_abs())),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Signal `number` to the process behind `pidfd`. An ended process is fine.
///
/// # Errors
/// `EINVAL` for a bad number, `EPERM`.
pub fn signal(pidfd: BorrowedFd<'_>, number: i32) -> std::io::Result<()> {
    // SAFETY: plain system call on a borrowed descriptor; no siginfo is passed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), number, std::ptr::null::<libc::siginfo_t>(), 0) };
    match result {
        0 => Ok(()),
        _ => match std::io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            e => Err(e),
        },
    }
}

/// Children become zombies until waited for, whatever the parent had set (an ignored SIGCHLD is inherited over execve).
///
/// # Errors
/// None that a kernel of our floor gives.
pub fn keep_zombies() -> std::io::Result<()> {
    // SAFETY: sets the default disposition; no handler function is involved.
    match unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) } {
        libc::SIG_ERR => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn real_time_signals_reach_the_process_and_ended_ones_are_fine() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let number = libc::SIGRTMIN() + 3;
        signal(pidfd.as_fd(), number).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(number));
        signal(pidfd.as_fd(), number).unwrap();
        assert!(signal(pidfd.as_fd(), 9999).is_err() || child.try_wait().unwrap().is_some());
    }
}
