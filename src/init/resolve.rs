//! Paths inside the container's root: resolved by the kernel with the root as `/` (openat2), created when missing, and always
//! handed on as descriptors, so that nobody who moves links about can redirect what follows.

use std::ffi::OsString;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::{Errno, Result};

/// Symbolic links that one path may go through; the kernel's own number.
const LINKS_MAX: u32 = 40;
/// Times to repeat when somebody else renames or creates on the way.
const RACES_MAX: u32 = 64;

/// What to create when nothing is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
}

/// Opens what exists at `path` below `root`, with `flags`; links are followed inside the root only, magic links never.
pub(super) fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    resolve(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// As [`open`] for a path that must have no links at all.
fn open_plain(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    resolve(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS)
}

fn resolve(root: BorrowedFd<'_>, path: &Path, flags: OFlags, how: ResolveFlags) -> Result<OwnedFd> {
    for _ in 0..RACES_MAX {
        match openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
            // A rename somewhere while `..` was resolved.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

/// An `O_PATH` descriptor of what is at `path`, made first (directories 0755, file 0644, empty) when missing. A link to nothing
/// is followed inside the root and its target made.
pub(super) fn create(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<OwnedFd> {
    match open(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut todo = names(path);
    let mut done = PathBuf::new();
    let (mut links, mut races) = (0, 0);
    while let Some(name) = todo.pop() {
        if name == ".." {
            done.pop();
            continue;
        }
        let parent = open_plain(root, &done, OFlags::PATH | OFlags::DIRECTORY)?;
        match openat(&parent, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) == FileType::Symlink => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::LOOP);
                }
                let target = rustix::fs::readlinkat(&fd, c"", Vec::new())?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.is_absolute() {
                    done.clear();
                }
                todo.append(&mut names(&target));
            }
            Ok(_) => done.push(name),
            Err(Errno::NOENT) => {
                let made = match kind {
                    Kind::File if todo.is_empty() => {
                        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
                        openat(&parent, &name, flags, Mode::from_raw_mode(0o644)).map(drop)
                    }
                    _ => rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)),
                };
                match made {
                    Ok(()) => done.push(name),
                    Err(Errno::EXIST) if races < RACES_MAX => {
                        races += 1;
                        todo.push(name);
                    }
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        }
    }
    open_plain(root, &done, OFlags::PATH)
}

/// Components of `path`, last first, without `/` and `.`.
fn names(path: &Path) -> Vec<OsString> {
    path.components()
        .rev()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// `path` with `.` and `..` taken out textually, always absolute.
pub(super) fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for c in path.components() {
        match c {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// An `O_PATH` descriptor of the host's `/dev/null`, verified to be the null device.
pub(super) fn host_null() -> Result<OwnedFd> {
    let fd = openat(CWD, c"/dev/null", OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if is_device(&fd, FileType::CharacterDevice, 1, 3)? { Ok(fd) } else { Err(Errno::NODEV) }
}

/// Whether `fd` is that device node.
pub(super) fn is_device(fd: &OwnedFd, kind: FileType, major: u32, minor: u32) -> Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == kind && stat.st_rdev == rustix::fs::makedev(major, minor))
}
