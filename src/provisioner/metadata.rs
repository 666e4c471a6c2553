//! Metadata of files, carried from one to another: owner, extended attributes, mode, times.

use std::os::fd::BorrowedFd;

use rustix::fs::{Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

/// Longest list of attribute names and longest value that the kernel gives.
pub const XATTR_MAX: usize = 64 << 10;

/// Gives the open file `to` all metadata of `from`, whose `stat` is at hand, in the order in which none of them undoes another.
/// Attributes that `to` has besides stay.
///
/// # Errors
/// The kernel's.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat) -> rustix::io::Result<()> {
    rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    for key in names(from)? {
        let mut value = vec![0u8; XATTR_MAX];
        let n = rustix::fs::fgetxattr(from, key.as_slice(), value.as_mut_slice())?;
        rustix::fs::fsetxattr(to, key.as_slice(), &value[..n], XattrFlags::empty())?;
    }
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    rustix::fs::futimens(to, &times(stat))
}

/// The same where `to` is an older file that may have attributes which `from` lacks: those go.
///
/// # Errors
/// The kernel's.
pub fn replace(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat) -> rustix::io::Result<()> {
    let old = names(to)?;
    if !old.is_empty() {
        let new = names(from)?;
        for key in old.iter().filter(|key| !new.contains(key)) {
            rustix::fs::fremovexattr(to, key.as_slice())?;
        }
    }
    copy(from, to, stat)
}

/// Names of the extended attributes of an open file that are its own: overlay's marks and the host's labels are not.
///
/// # Errors
/// The kernel's; a file system without attributes has none.
pub fn names(of: BorrowedFd<'_>) -> rustix::io::Result<Vec<Vec<u8>>> {
    let own = |list: &[u8]| list.split(|b| *b == 0).filter(|key| is_own(key)).map(<[u8]>::to_vec).collect();
    // Most files have none or one.
    let mut short = [0u8; 256];
    match rustix::fs::flistxattr(of, short.as_mut_slice()) {
        Ok(n) => Ok(own(short.get(..n).unwrap_or_default())),
        Err(Errno::NOTSUP) => Ok(Vec::new()),
        Err(Errno::RANGE) => {
            let mut long = vec![0u8; XATTR_MAX];
            let n = rustix::fs::flistxattr(of, long.as_mut_slice())?;
            Ok(own(long.get(..n).unwrap_or_default()))
        }
        Err(e) => Err(e),
    }
}

/// Whether the attribute belongs to the file, not to the union of layers or to the host's policy.
pub fn is_own(key: &[u8]) -> bool {
    !key.is_empty() && !key.starts_with(b"trusted.overlay.") && key != b"security.selinux"
}

/// Access and modification times.
pub fn times(stat: &Stat) -> Timestamps {
    let time = |s, n: u64| Timespec { tv_sec: s, tv_nsec: i64::try_from(n).unwrap_or(0) };
    Timestamps { last_access: time(stat.st_atime, stat.st_atime_nsec), last_modification: time(stat.st_mtime, stat.st_mtime_nsec) }
}
