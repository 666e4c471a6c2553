//! New processes without exec: fork for a short-lived child, clone3 for one in new namespaces.

#![allow(unsafe_code)]

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::Pid;

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
/// # Errors
/// As clone3(2).
pub fn sibling(flags: i32, child: impl FnOnce() -> i32) -> io::Result<Pid> {
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
    raw_clone(&args, child)
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
    raw_clone(&args, child)
}

fn raw_clone(args: &libc::clone_args, child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: no CLONE_VM and no stack: this is fork with flags; `args` lives for the call and has the size given.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, std::ptr::from_ref(args), size_of::<libc::clone_args>()) };
    after(pid, child)
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
