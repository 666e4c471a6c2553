//! New processes without exec: fork for a short-lived child, clone3 for one in new namespaces.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::Pid;

/// `CLONE_INTO_CGROUP` of `linux/sched.h`; the `libc` crate's constant has too narrow a type.
const CLONE_INTO_CGROUP: u64 = 1 << 33;
/// Exit code of a child whose closure panicked.
const PANICKED: i32 = 101;

/// Forks; the child runs `child` and leaves with its result through `_exit`, never back into the caller's code.
///
/// The calling process should have one thread: locks that other threads hold stay locked in the child.
///
/// # Errors
/// As fork(2).
pub fn fork(child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: the child only runs the closure and `_exit`s; the contract above keeps foreign locks away.
    let pid = unsafe { libc::fork() };
    after(i64::from(pid), child)
}

/// A sibling (child of the caller's parent, `CLONE_PARENT`) in the new namespaces of `flags` (`CLONE_NEW*`). It runs `child`
/// and leaves with its result. Its memory is a copy, as after fork.
///
/// It is born in the v2 group `into`, if the kernel takes it there; whether it did comes back. It may not: before Linux 5.7, at
/// the group's limit of processes, or when the group has handed its controllers to groups below.
///
/// # Errors
/// As clone3(2).
pub fn sibling(flags: i32, into: Option<BorrowedFd<'_>>, child: impl FnOnce() -> i32) -> io::Result<(Pid, bool)> {
    // CLONE_PARENT takes over the caller's exit signal, so none may be given.
    let args = libc::clone_args {
        flags: (flags as u32 | libc::CLONE_PARENT as u32).into(),
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    if let Some(group) = into {
        let fd = group.as_raw_fd().unsigned_abs().into();
        let placed = libc::clone_args { flags: args.flags | CLONE_INTO_CGROUP, cgroup: fd, ..args };
        let pid = clone3(&placed);
        if pid >= 0 {
            return after(pid, child).map(|pid| (pid, true));
        }
    }
    after(clone3(&args), child).map(|pid| (pid, false))
}

/// A child in the new namespaces of `flags` (`CLONE_NEW*`); otherwise as [`fork`].
///
/// # Errors
/// As clone3(2).
pub fn child_in(flags: i32, child: impl FnOnce() -> i32) -> io::Result<Pid> {
    let args = libc::clone_args {
        flags: (flags as u32).into(),
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    after(clone3(&args), child)
}

fn clone3(args: &libc::clone_args) -> i64 {
    // SAFETY: no CLONE_VM and no stack: this is fork with flags; `args` lives for the call and has the size given.
    unsafe { libc::syscall(libc::SYS_clone3, std::ptr::from_ref(args), size_of::<libc::clone_args>()) }
}

fn after(pid: i64, child: impl FnOnce() -> i32) -> io::Result<Pid> {
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    match Pid::from_raw(pid as i32) {
        Some(pid) => Ok(pid),
        None => {
            let code = catch_unwind(AssertUnwindSafe(child)).unwrap_or(PANICKED);
            // SAFETY: ends this process at once, running no exit handlers of the parent's.
            unsafe { libc::_exit(code) }
        }
    }
}
