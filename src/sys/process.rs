//! Settings of the calling process for which `rustix` and `nix` have no safe call.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::RawFd;

/// One instruction of a system call filter (`struct sock_filter`).
pub use libc::sock_filter as Instruction;

/// Highest signal number.
const SIGNALS: i32 = 64;
/// Linux `PR_CAPBSET_DROP` knows at most this many capabilities (a 64-bit set).
const CAPABILITIES: u32 = 64;

fn check(r: i64) -> io::Result<()> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Every signal back to its default action and none blocked, `SIGPIPE` (which the Rust runtime ignores) included.
pub fn reset_signals() {
    for signal in 1..=SIGNALS {
        // SAFETY: the default action needs no handler; numbers that cannot be set are refused by the call.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_signal_mask(&empty_signals());
}

/// Children that end from now on leave no zombie and cannot be waited for.
pub fn reap_children_unseen() {
    // SAFETY: ignoring a signal needs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Blocks every signal; gives back the mask before.
pub fn block_signals() -> libc::sigset_t {
    let mut all = empty_signals();
    let mut old = empty_signals();
    // SAFETY: a plain out-parameter.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: both sets live for the call.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const all, &raw mut old) };
    old
}

/// Sets the mask of blocked signals.
pub fn set_signal_mask(mask: &libc::sigset_t) {
    // SAFETY: the set lives for the call.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, std::ptr::from_ref(mask), std::ptr::null_mut()) };
}

fn empty_signals() -> libc::sigset_t {
    // SAFETY: sigset_t is plain bits, all zero is the empty set.
    unsafe { std::mem::zeroed() }
}

/// Closes all descriptors from `first` to `last`; with `on_exec` they are only marked to be closed by execve (Linux >= 5.11).
///
/// # Errors
/// As close_range(2).
pub fn close_range(first: RawFd, last: RawFd, on_exec: bool) -> io::Result<()> {
    let flags = if on_exec { libc::CLOSE_RANGE_CLOEXEC as i32 } else { 0 };
    // SAFETY: callers are children after a fork, which name the descriptors they keep; nothing else in them uses the others.
    check(unsafe { libc::syscall(libc::SYS_close_range, first as u32, last as u32, flags) })
}

/// Drops from the bounding set all that is not in `keep` (bit n = capability n).
///
/// # Errors
/// As prctl(2) `PR_CAPBSET_DROP`, but capabilities the kernel does not know are gone already.
pub fn limit_bounding_set(keep: u64) -> io::Result<()> {
    for cap in (0..CAPABILITIES).filter(|cap| keep & (1 << cap) == 0) {
        // SAFETY: no pointers.
        let r = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(cap), 0, 0, 0) };
        if r < 0 {
            let e = io::Error::last_os_error();
            if e.raw_os_error() == Some(libc::EINVAL) {
                break;
            }
            return Err(e);
        }
    }
    Ok(())
}

/// The bounding set, bit n = capability n.
pub fn bounding_set() -> u64 {
    let mut set = 0;
    for cap in 0..CAPABILITIES {
        // SAFETY: no pointers.
        match unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(cap), 0, 0, 0) } {
            1 => set |= 1 << cap,
            0 => {}
            _ => break,
        }
    }
    set
}

/// Makes the ambient set exactly `set`; each member must be permitted and inheritable.
///
/// # Errors
/// As prctl(2) `PR_CAP_AMBIENT`.
pub fn set_ambient(set: u64) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0, 0, 0) }.into())?;
    for cap in (0..CAPABILITIES).filter(|cap| set & (1 << cap) != 0) {
        // SAFETY: no pointers.
        check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, libc::c_ulong::from(cap), 0, 0) }.into())?;
    }
    Ok(())
}

/// Loads a system call filter with `SECCOMP_FILTER_FLAG_*`.
///
/// # Errors
/// As seccomp(2); `E2BIG` for more instructions than a filter can have.
pub fn load_filter(program: &[Instruction], flags: u64) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let prog = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel only reads the program, which lives for the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&prog)) })
}

/// Sets a limit on a resource by number (`RLIMIT_*`).
///
/// # Errors
/// As setrlimit(2).
pub fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the limit lives for the call, no old one is asked for.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, std::ptr::from_ref(&limit), std::ptr::null_mut::<libc::rlimit64>()) })
}

/// The hard limit on a resource by number.
///
/// # Errors
/// As getrlimit(2).
pub fn hard_limit(resource: u32) -> io::Result<u64> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the out-parameter lives for the call, no new limit is given.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, std::ptr::null::<libc::rlimit64>(), &raw mut limit) })?;
    Ok(limit.rlim_max)
}

/// Sets the I/O priority (`class << 13 | level`).
///
/// # Errors
/// As ioprio_set(2).
pub fn set_io_priority(priority: i32) -> io::Result<()> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) })
}

/// Arguments and environment of execve in the form the kernel takes, made before the calls that may forbid allocating.
pub struct Image {
    strings: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

impl Image {
    /// Keeps `strings` and the table that points to them.
    pub fn new(strings: Vec<CString>) -> Self {
        // A CString's bytes stay where they are when the vector moves.
        let pointers = strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect();
        Self { strings, pointers }
    }

    /// The strings.
    pub fn strings(&self) -> &[CString] {
        &self.strings
    }
}

/// Replaces the process; comes back only with an error.
pub fn execute(path: &std::ffi::CStr, args: &Image, env: &Image) -> io::Error {
    // SAFETY: both tables end with a null pointer and their strings live as long as the tables.
    unsafe { libc::execve(path.as_ptr(), args.pointers.as_ptr(), env.pointers.as_ptr()) };
    io::Error::last_os_error()
}
