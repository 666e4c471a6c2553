//! The mount calls that `rustix` lacks: mount_setattr(2), and move_mount and open_tree on descriptors.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::mount::{MoveMountFlags, OpenTreeFlags};

/// What to change on a mount; bits are `MOUNT_ATTR_*`, `propagation` is one of `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`,
/// `MS_UNBINDABLE` or 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear.
    pub clear: u64,
    /// New propagation type, 0 to leave it.
    pub propagation: u64,
}

impl Attributes {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Changes the mount whose root `mount` is, and with `recursive` all below it. Linux >= 5.12.
///
/// # Errors
/// As mount_setattr(2).
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: Attributes, recursive: bool) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: attributes.set, attr_clr: attributes.clear, propagation: attributes.propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let empty: &CStr = c"";
    // SAFETY: the path and the structure live for the call and have the sizes given.
    let r =
        unsafe { libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), empty.as_ptr(), flags, std::ptr::from_ref(&attr), size_of::<libc::mount_attr>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether this kernel has mount_setattr(2). A sandbox that forbids it answers as a kernel that lacks it.
pub fn can_set_attributes() -> bool {
    // SAFETY: with a structure of no bytes the kernel refuses (EINVAL) before it reads anything.
    let r = unsafe { libc::syscall(libc::SYS_mount_setattr, -1, c"".as_ptr(), libc::AT_EMPTY_PATH, std::ptr::null::<libc::mount_attr>(), 0usize) };
    r >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// A detached copy of the mount at `at`, with `recursive` of the whole tree.
///
/// # Errors
/// As open_tree(2).
pub fn clone_tree(at: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(at, c"", flags)
}

/// Attaches the detached `mount` on `target`, whatever the target's path now is.
///
/// # Errors
/// As move_mount(2).
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount.as_fd(), c"", target.as_fd(), c"", flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_whether_it_can() {
        // Linux 5.12, and the machines that run tests are newer.
        assert!(can_set_attributes());
    }
}
