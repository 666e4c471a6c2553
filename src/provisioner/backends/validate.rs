//! Where a backend may not work, whatever a quick look says: the validation table of Mesos's provisioner, with rows of our own.
//!
//! Mesos documents the file system of the store; what matters is where layers lie and where containers write, so both are
//! looked at. A backend that passes is then probed by a real mount.

use std::path::Path;

use rustix::io::Errno;

use crate::disk::layout::Layout;
use crate::model::error::{Act, Error, Kind, Result};

/// One row: the backend does not go with the file system.
#[derive(Clone, Copy, Debug)]
pub struct Forbidden {
    /// Backend.
    pub backend: &'static str,
    /// File system, as people call it.
    pub on: &'static str,
    /// Its number in statfs(2).
    pub magic: u32,
    /// Why.
    pub why: &'static str,
    /// Mesos forbids it, but kernels of today may do it: with `backend_by_probe` the probe alone decides.
    pub dated: bool,
}

const AUFS: (&str, u32) = ("aufs", 0x6175_6673);
const BTRFS: (&str, u32) = ("btrfs", 0x9123_683e);
const ECRYPTFS: (&str, u32) = ("ecryptfs", 0xf15f);
const OVERLAY: (&str, u32) = ("overlay", 0x794c_7630);
const ZFS: (&str, u32) = ("zfs", 0x2fc1_2fc1);
const NFS: (&str, u32) = ("nfs", 0x6969);
const VFAT: (&str, u32) = ("vfat", 0x4d44);

const fn row(backend: &'static str, (on, magic): (&'static str, u32), why: &'static str) -> Forbidden {
    Forbidden { backend, on, magic, why, dated: false }
}

const fn dated(backend: &'static str, (on, magic): (&'static str, u32), why: &'static str) -> Forbidden {
    Forbidden { backend, on, magic, why, dated: true }
}

/// The table. `bind` and `copy` work anywhere.
pub const FORBIDDEN: &[Forbidden] = &[
    row("overlay", AUFS, "an upper directory needs whiteouts that aufs keeps for itself"),
    dated("overlay", BTRFS, "without rename-whiteout (kernels before 4.7) deletions fail"),
    row("overlay", ECRYPTFS, "names are longer on disk and attributes are missing"),
    row("overlay", OVERLAY, "an upper directory cannot be on another overlay"),
    dated("overlay", ZFS, "before 2.2 it cannot hold an upper directory"),
    row("overlay", NFS, "an upper directory needs whiteouts and trusted attributes"),
    row("overlay", VFAT, "it has neither owners nor attributes nor links"),
    row("aufs", AUFS, "a writable branch cannot be on another aufs"),
    row("aufs", BTRFS, "a writable branch there loses changes"),
    row("aufs", ECRYPTFS, "names are longer on disk"),
    // The images of layers may lie anywhere that holds a file, but containers write to an overlay's upper directory.
    row("erofs", AUFS, "an upper directory needs whiteouts that aufs keeps for itself"),
    dated("erofs", BTRFS, "without rename-whiteout (kernels before 4.7) deletions fail"),
    row("erofs", ECRYPTFS, "names are longer on disk and attributes are missing"),
    row("erofs", OVERLAY, "an upper directory cannot be on another overlay"),
    dated("erofs", ZFS, "before 2.2 it cannot hold an upper directory"),
    row("erofs", NFS, "an upper directory needs whiteouts and trusted attributes"),
    row("erofs", VFAT, "it has neither owners nor attributes nor links"),
];

/// Backends whose directories must tell file types, which XFS with `ftype=0` and ext4 without `filetype` do not.
pub const NEED_FILE_TYPES: &[&str] = &["overlay", "erofs"];

/// What the kernel must have for a backend.
pub const NEED_KERNEL: &[(&str, &[&str])] = &[("overlay", &["overlay"]), ("aufs", &["aufs"]), ("erofs", &["erofs", "overlay"])];

/// Checks a backend against the table. Blocks.
///
/// # Errors
/// `FailedPrecondition` with the row that forbids it; I/O errors.
pub fn check(backend: &str, layout: &Layout, by_probe: bool) -> Result<()> {
    for (_, kernels) in NEED_KERNEL.iter().filter(|(name, _)| *name == backend) {
        if let Some(missing) = kernels.iter().find(|name| !kernel_has(name)) {
            return Err(Error::precondition(format!("choose backend {backend}: this kernel has no file system {missing} (/proc/filesystems)")));
        }
    }
    for dir in [layout.layers(), layout.rootfs_all(), layout.staging()] {
        let magic = match rustix::fs::statfs(&dir) {
            // The types are small numbers, signed on some architectures.
            Ok(statfs) => (statfs.f_type as u64 & 0xffff_ffff) as u32,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(e).act("stat file system of", dir.display()),
        };
        if let Some(row) = forbidding(backend, magic, by_probe) {
            let Forbidden { backend, on, why, .. } = row;
            return Err(Error::precondition(format!(
                "choose backend {backend}: {} is on {on}, which the row {backend}/{on} of the validation table forbids: {why}",
                dir.display()
            )));
        }
    }
    if NEED_FILE_TYPES.contains(&backend) && !tells_file_types(&layout.staging())? {
        return Err(Error::precondition(format!(
            "choose backend {backend}: directories in {} do not tell file types, which the row {backend}/d_type of the validation table forbids (xfs: made with ftype=0)",
            layout.store().display()
        )));
    }
    Ok(())
}

/// The row that forbids a backend on a file system.
pub fn forbidding(backend: &str, magic: u32, by_probe: bool) -> Option<&'static Forbidden> {
    FORBIDDEN.iter().find(|row| row.backend == backend && row.magic == magic && !(by_probe && row.dated))
}

/// Whether the kernel knows a file system, now or by loading a module.
fn kernel_has(name: &str) -> bool {
    match rustix::mount::fsopen(name, rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(_) => true,
        Err(Errno::NODEV) => false,
        // Linux < 5.2, or not root; the list does not have what is a module still to be loaded.
        Err(_) => std::fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.lines().any(|line| line.rsplit('\t').next() == Some(name))),
    }
}

/// Whether reading a directory tells what its entries are.
fn tells_file_types(dir: &Path) -> Result<bool> {
    let probe = dir.join(format!(".probe-{}-{:?}", std::process::id(), std::thread::current().id()));
    let read = || -> Result<bool> {
        std::fs::create_dir_all(probe.join("entry")).act("create directory", probe.display())?;
        let fd = rustix::fs::open(&probe, rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())
            .act("open directory", probe.display())?;
        for entry in rustix::fs::Dir::new(fd).act("read directory", probe.display())? {
            let entry = entry.act("read directory", probe.display())?;
            if entry.file_name().to_bytes() == b"entry" {
                return Ok(entry.file_type() == rustix::fs::FileType::Directory);
            }
        }
        Ok(false)
    };
    let told = read();
    crate::provisioner::remove::tree(&probe)?;
    match told {
        // A full disk says nothing about file types.
        Err(e) if e.kind == Kind::ResourceExhausted => Ok(true),
        told => told,
    }
}
