//! Copy: a real copy of all layers, for file systems that cannot carry overlay. Slow and large, but it works anywhere; where the
//! file system can share extents, it does.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Uid, XattrFlags};
use rustix::io::Errno;

use super::overlay::{copy_root, make_probe_layers, probe_dir};
use super::{Backend, Layer};
use crate::disk::{layer, layout::Layout};
use crate::model::error::{Act, Kind, Result};
use crate::model::image::{RootFs, RootMount};
use crate::provisioner::unpack::Form;
use crate::provisioner::unpack::tree::{OPAQUE, is_whiteout};
use crate::provisioner::{metadata, remove};

/// Levels of directories copied; each takes three descriptors and some stack. Honest images have fewer than a hundred.
const MAX_DEPTH: usize = 400;

/// The copy backend.
pub struct Copy {
    form: Form,
}

impl Copy {
    /// Looks how layers can be kept: where whiteouts cannot be made (on another overlay), as images, which need only a file.
    ///
    /// # Errors
    /// I/O errors.
    pub fn probe(layout: &Layout) -> Result<Self> {
        let dir = probe_dir(layout);
        let form = match make_probe_layers(&dir) {
            Ok(()) => Form::Directory,
            Err(e) if e.kind == Kind::ResourceExhausted => Form::Directory,
            Err(e) => {
                tracing::info!(error = %e, "layers are kept as images");
                Form::Erofs
            }
        };
        remove::tree(&dir)?;
        Ok(Self { form })
    }

    /// For layers that are there already.
    pub fn fallback() -> Self {
        Self { form: Form::Directory }
    }
}

impl Backend for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn form(&self) -> Form {
        self.form
    }

    fn provision(&self, dir: &Path, layers: &[Layer<'_>]) -> Result<RootFs> {
        let root = dir.join("fs");
        std::fs::create_dir(&root).act("create directory", root.display())?;
        let to = open_dir_path(&root)?;
        for Layer { path, .. } in layers {
            let from = open_layer(path)?;
            // Hard links hold within a layer only, as in overlay.
            let mut linked = HashMap::new();
            merge(from.as_fd(), to.as_fd(), to.as_fd(), &mut linked, (Path::new(""), 0)).act("copy layer", path.display())?;
        }
        if let Some(from) = super::root_of(layers) {
            copy_root(from, &root)?;
        }
        Ok(RootFs {
            backend: self.name().to_owned(),
            mounts: vec![RootMount { fstype: "bind".to_owned(), source: root.display().to_string(), options: vec!["bind".to_owned(), "rw".to_owned()] }],
            lookup: vec![root.clone()],
            writable: Some(root),
        })
    }
}

type Linked = HashMap<(u64, u64), PathBuf>;

/// Applies the directory `from` of one layer to the directory `to`.
fn merge(from: BorrowedFd<'_>, to: BorrowedFd<'_>, root: BorrowedFd<'_>, linked: &mut Linked, (path, depth): (&Path, usize)) -> rustix::io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let there = rustix::fs::statat(to, name, AtFlags::SYMLINK_NOFOLLOW).ok();
        let stays = kind == FileType::Directory && there.as_ref().is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory);
        let opaque = kind == FileType::Directory && is_opaque(open_dir(from, name)?.as_fd());
        if there.is_some() && (!stays || opaque) {
            remove::tree_at(to, name.to_bytes()).map_err(|_| Errno::IO)?;
        }
        if is_whiteout(&stat) {
            continue;
        }
        let below = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        if kind == FileType::Directory {
            if !stays || opaque {
                rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
            }
            let (from, to) = (open_dir(from, name)?, open_dir(to, name)?);
            merge(from.as_fd(), to.as_fd(), root, linked, (&below, depth + 1))?;
            if stays {
                metadata::replace(from.as_fd(), to.as_fd(), &stat)?
            } else {
                metadata::copy(from.as_fd(), to.as_fd(), &stat)?
            }
            continue;
        }
        if stat.st_nlink > 1 {
            if let Some(first) = linked.get(&(stat.st_dev, stat.st_ino)) {
                rustix::fs::linkat(root, first, to, name, AtFlags::empty())?;
                continue;
            }
            linked.insert((stat.st_dev, stat.st_ino), below);
        }
        one(from, to, name, &stat, kind)?;
    }
    Ok(())
}

fn one(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &std::ffi::CStr, stat: &Stat, kind: FileType) -> rustix::io::Result<()> {
    match kind {
        FileType::RegularFile => {
            let source = rustix::fs::openat(from, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = rustix::fs::openat(to, name, flags, Mode::from_raw_mode(0o600))?;
            content(source.as_fd(), target.as_fd(), u64::try_from(stat.st_size).unwrap_or(0))?;
            return metadata::copy(source.as_fd(), target.as_fd(), stat);
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(&target, to, name)?;
        }
        _ => rustix::fs::mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode & 0o777), stat.st_rdev)?,
    }
    rustix::fs::chownat(to, name, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)), AtFlags::SYMLINK_NOFOLLOW)?;
    let path = |fd: BorrowedFd<'_>| [format!("/proc/self/fd/{}/", fd.as_raw_fd()).as_bytes(), name.to_bytes()].concat();
    let (source, target) = (path(from), path(to));
    let mut names = vec![0u8; metadata::XATTR_MAX];
    let n = rustix::fs::llistxattr(source.as_slice(), names.as_mut_slice()).or_else(unsupported)?;
    for key in names.get(..n).unwrap_or_default().split(|b| *b == 0).filter(|k| metadata::is_own(k)) {
        let mut value = vec![0u8; metadata::XATTR_MAX];
        let n = rustix::fs::lgetxattr(source.as_slice(), key, value.as_mut_slice())?;
        rustix::fs::lsetxattr(target.as_slice(), key, &value[..n], XattrFlags::empty())?;
    }
    if kind != FileType::Symlink {
        // Made by us a moment ago in a directory that nobody else enters; chown may have cleared set-id bits.
        rustix::fs::chmodat(to, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
    }
    rustix::fs::utimensat(to, name, &metadata::times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

/// Shares extents where the file system can, else copies inside the kernel. Holes stay holes.
fn content(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> rustix::io::Result<()> {
    if size == 0 || rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start)).unwrap_or(size).min(size);
        extent(from, to, start, end)?;
        at = end.max(start + 1);
    }
    rustix::fs::ftruncate(to, size)
}

fn extent(from: BorrowedFd<'_>, to: BorrowedFd<'_>, mut at: u64, end: u64) -> rustix::io::Result<()> {
    while at < end {
        let (mut source, mut target) = (at, at);
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), usize::try_from(end - at).unwrap_or(usize::MAX >> 1)) {
            Ok(0) => return Ok(()),
            Ok(n) => at += n as u64,
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::seek(to, SeekFrom::Start(at))?;
                let sent = rustix::fs::sendfile(to, from, Some(&mut source), usize::try_from((end - at).min(1 << 30)).unwrap_or(1 << 30))?;
                if sent == 0 {
                    return Ok(());
                }
                at += sent as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn unsupported(e: Errno) -> rustix::io::Result<usize> {
    if e == Errno::NOTSUP { Ok(0) } else { Err(e) }
}

fn is_opaque(dir: BorrowedFd<'_>) -> bool {
    let mut value = [0u8; 4];
    matches!(rustix::fs::fgetxattr(dir, OPAQUE, value.as_mut_slice()), Ok(1)) && value[0] == b'y'
}

fn open_dir(at: BorrowedFd<'_>, name: &std::ffi::CStr) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn open_dir_path(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open directory", path.display())
}

/// A layer's root, readable.
fn open_layer(path: &Path) -> Result<OwnedFd> {
    let root = layer::root(path).act("open layer", path.display())?;
    rustix::fs::openat(&root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open layer", path.display())
}
