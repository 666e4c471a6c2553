//! Mounts inside the container: each is made detached, gets its flags there, and is then attached to a descriptor of its
//! destination. No path is walked twice, so a link that changes meanwhile redirects nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use rustix::fs::{CWD, FileType, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

use super::fault::{Fault, On, Result};
use super::options::Options;
use super::resolve::{self, Kind};
use super::stage2::Child;
use crate::sys::mount::{self, Attributes};

/// `statfs` type of procfs.
const PROC_MAGIC: u64 = 0x9fa0;
/// Files of procfs that may be mounted over: they only inform, and LXCFS stands in for them.
const PROC_ALLOWED: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// The step: every mount of the spec but the cgroup ones, in order.
pub(super) fn all(child: &mut Child<'_>) -> Result {
    for m in child.bundle.spec.mounts().iter().flatten().filter(|m| !is_cgroup(m)) {
        one(&child.bundle.dir, child.root.as_fd(), m)?;
    }
    Ok(())
}

/// Cgroup mounts wait until the process is in its cgroup.
pub(super) fn is_cgroup(m: &Mount) -> bool {
    matches!(m.typ().as_deref(), Some("cgroup" | "cgroup2"))
}

fn one(bundle: &Path, root: BorrowedFd<'_>, m: &Mount) -> Result {
    let dest = resolve::normal(m.destination());
    let mut options = Options::parse(m.options().as_deref().unwrap_or_default())?;
    let typ = m.typ().as_deref().unwrap_or("none");
    if m.uid_mappings().as_ref().is_some_and(|m| !m.is_empty()) || m.gid_mappings().as_ref().is_some_and(|m| !m.is_empty()) {
        return Err(Fault::new(format_args!("id-mapped mount on {}", dest.display()), libc::EOPNOTSUPP));
    }
    if options.bind.is_some() || typ == "bind" {
        let source = bundle.join(m.source().as_deref().unwrap_or(Path::new("")));
        // Flags that the source has by its own mount stay: a bind can only take away.
        options.attributes.clear &= libc::MOUNT_ATTR__ATIME;
        options.recursive.clear &= libc::MOUNT_ATTR__ATIME;
        let tree = copy(&source, options.bind == Some(true))?;
        let stat = rustix::fs::fstat(&tree).on(source.display())?;
        let kind = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory { Kind::Directory } else { Kind::File };
        let target = destination(root, &dest, typ, kind)?;
        return place(&tree, target.as_fd(), &options, &dest);
    }
    let target = destination(root, &dest, typ, Kind::Directory)?;
    if typ == "tmpfs" && !options.data.iter().any(|o| o.starts_with("mode=")) {
        // Unlike the default 1777 this keeps what the image says of the directory.
        let mode = rustix::fs::fstat(&target).on(dest.display())?.st_mode & 0o7777;
        options.data.push(format!("mode={mode:o}"));
    }
    let source = m.source().clone().unwrap_or_else(|| PathBuf::from(typ));
    let fs = file_system(typ, &source, &options.data, options.attributes.set)?;
    options.attributes = Attributes::default();
    place(&fs, target.as_fd(), &options, &dest)
}

/// Opens or makes the destination; procfs is not mounted over but for the allowed files.
fn destination(root: BorrowedFd<'_>, dest: &Path, typ: &str, kind: Kind) -> Result<OwnedFd> {
    let allowed = PROC_ALLOWED.iter().any(|p| dest == Path::new(p));
    if dest == Path::new("/") || (dest.starts_with("/proc") && !allowed && !(typ == "proc" && dest == Path::new("/proc"))) {
        return Err(Fault::new(format_args!("a mount on {}", dest.display()), libc::EPERM));
    }
    let target = resolve::create(root, dest, kind).on(dest.display())?;
    // The name may lead there by links.
    if !allowed && typ != "proc" && rustix::fs::fstatfs(&target).on(dest.display())?.f_type as u64 == PROC_MAGIC {
        return Err(Fault::new(format_args!("a mount on {} (in procfs)", dest.display()), libc::EPERM));
    }
    Ok(target)
}

/// A detached copy of what is at a host path.
pub(super) fn copy(source: &Path, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(CWD, source, flags).on(source.display())
}

/// A new detached file system with these options and `MOUNT_ATTR_*` flags.
pub(super) fn file_system(typ: &str, source: &Path, data: &[String], attributes: u64) -> Result<OwnedFd> {
    let fs = rustix::mount::fsopen(typ, FsOpenFlags::FSOPEN_CLOEXEC).on(typ)?;
    rustix::mount::fsconfig_set_string(&fs, c"source", source).on(source.display())?;
    for option in data {
        match option.split_once('=') {
            Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value),
            None => rustix::mount::fsconfig_set_flag(&fs, option.as_str()),
        }
        .on(format_args!("{typ} option {option}"))?;
    }
    finish(&fs, typ, attributes)
}

/// Creates the configured file system and its detached mount.
pub(super) fn finish(fs: &OwnedFd, typ: &str, attributes: u64) -> Result<OwnedFd> {
    rustix::mount::fsconfig_create(fs).map_err(|e| Fault::new(format_args!("{typ}{}", complaint(fs)), e.raw_os_error()))?;
    rustix::mount::fsmount(fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::from_bits_retain(attributes as u32)).on(typ)
}

/// What the kernel says beside the errno, in parentheses.
fn complaint(fs: &OwnedFd) -> String {
    let mut text = [0; 256];
    match rustix::io::read(fs, &mut text) {
        Ok(n) => format!(" ({})", String::from_utf8_lossy(text.get(..n).unwrap_or_default()).trim()),
        Err(_) => String::new(),
    }
}

/// Gives the detached `tree` its flags, attaches it and sets its propagation.
pub(super) fn place(tree: &OwnedFd, target: BorrowedFd<'_>, options: &Options, dest: &Path) -> Result {
    let mut later = None;
    for (attributes, recursive) in [(options.attributes, false), (options.recursive, true)] {
        if attributes.set != 0 {
            match mount::set_attributes(tree.as_fd(), attributes, recursive) {
                // Linux < 5.12: the flags of one mount can be set once it is attached, those of a tree not at all.
                Err(e) if e.raw_os_error() == Some(libc::ENOSYS) && !recursive => later = Some(attributes),
                other => other.on(dest.display())?,
            }
        }
    }
    mount::attach(tree.as_fd(), target).on(dest.display())?;
    if let Some(attributes) = later {
        remount(tree, attributes).on(dest.display())?;
    }
    for (propagation, recursive) in &options.propagation {
        set_propagation(tree, *propagation, *recursive).on(dest.display())?;
    }
    Ok(())
}

fn set_propagation(tree: &OwnedFd, propagation: u64, recursive: bool) -> std::io::Result<()> {
    match mount::set_attributes(tree.as_fd(), Attributes { propagation, ..Attributes::default() }, recursive) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
            let flags = nix::mount::MsFlags::from_bits_retain(propagation | if recursive { libc::MS_REC } else { 0 });
            Ok(nix::mount::mount(None::<&str>, proc_path(tree).as_path(), None::<&str>, flags, None::<&str>)?)
        }
        other => other,
    }
}

/// The classic way to set a mount's flags, through the descriptor's link in the host's procfs.
fn remount(tree: &OwnedFd, attributes: Attributes) -> nix::Result<()> {
    const MAP: &[(u64, u64)] = &[
        (libc::MOUNT_ATTR_RDONLY, libc::MS_RDONLY),
        (libc::MOUNT_ATTR_NOSUID, libc::MS_NOSUID),
        (libc::MOUNT_ATTR_NODEV, libc::MS_NODEV),
        (libc::MOUNT_ATTR_NOEXEC, libc::MS_NOEXEC),
        (libc::MOUNT_ATTR_NOATIME, libc::MS_NOATIME),
        (libc::MOUNT_ATTR_STRICTATIME, libc::MS_STRICTATIME),
        (libc::MOUNT_ATTR_NODIRATIME, libc::MS_NODIRATIME),
    ];
    // What a user namespace has locked must be repeated, or the call is refused; statfs has the same bits for the first four.
    let locked = rustix::fs::fstatvfs(tree).map_or(0, |s| s.f_flag.bits() & 0xf);
    let bits = MAP.iter().filter(|(attr, _)| attributes.set & attr != 0).fold(locked, |bits, (_, ms)| bits | ms);
    let flags = nix::mount::MsFlags::from_bits_retain(libc::MS_REMOUNT | libc::MS_BIND | bits);
    nix::mount::mount(None::<&str>, proc_path(tree).as_path(), None::<&str>, flags, None::<&str>)
}

/// The host's name of a descriptor of ours; valid until the root is changed.
pub(super) fn proc_path(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Makes the mount at `tree` (attached already) read-only.
pub(super) fn make_read_only(tree: &OwnedFd) -> std::io::Result<()> {
    let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
    match mount::set_attributes(tree.as_fd(), attributes, false) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(remount(tree, attributes)?),
        other => other,
    }
}

/// Opens an existing path of the container for reading its kind or mounting on it; `None` when it is not there.
pub(super) fn existing(root: BorrowedFd<'_>, path: &Path) -> Result<Option<OwnedFd>> {
    match resolve::open(root, path, OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e).on(path.display()),
    }
}
