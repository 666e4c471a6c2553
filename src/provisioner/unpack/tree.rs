//! Applies tar entries to a directory that becomes a layer, in overlay's own form: whiteouts are character devices 0/0,
//! opaque directories carry `trusted.overlay.opaque`.
//!
//! # Confinement
//! Every name is taken apart into parent and last component. Parents are resolved by `openat2` with `RESOLVE_IN_ROOT` and
//! `RESOLVE_NO_MAGICLINKS` on the layer's root, so that no `..` and no symbolic link leads out of it, whatever earlier entries
//! planted; the last component is never followed. Metadata go through descriptors of files that this entry made, never
//! through links to older ones (attack cases 1 to 5).
//!
//! # Cost
//! A file of root costs four system calls (open, write, utimensat, fstat) and a close: the descriptor of the last parent is
//! kept, and the calling thread has its own umask of 0, so that `open` sets the final mode.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::names::{clean, follow};
use super::tar::{Entry, Reader, What};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::FsUsage;
use crate::provisioner::config::Limits;

/// Extended attribute that makes overlay hide what lower layers have in a directory.
pub const OPAQUE: &str = "trusted.overlay.opaque";
/// Prefix of whiteouts in layer archives (OCI image-spec layer.md).
const WHITEOUT: &[u8] = b".wh.";
/// Name of the opaque marker.
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// Bytes of directory names remembered until the end of a layer; 4 million entries could otherwise take gigabytes.
const MAX_NAMES: usize = 64 << 20;
/// Links followed while making the target of a dangling one; the kernel's own bound.
const MAX_LINKS: usize = 40;
/// Ratio of unpacked to fetched bytes is looked at past this size only: small layers of zeros are common.
pub const RATIO_FROM: u64 = 256 << 20;

/// What a directory gets at the end, when nothing is put into it any more.
struct DirMeta {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A layer's directory being filled.
pub struct Tree {
    root: OwnedFd,
    /// The last parent used.
    parent: Option<(Vec<u8>, OwnedFd)>,
    dirs: BTreeMap<Vec<u8>, Option<DirMeta>>,
    names: usize,
    entries: u64,
    bytes: u64,
    usage: FsUsage,
    /// Something was replaced: running sums are no longer right.
    recount: bool,
    /// Sums of what is on disk are taken, modes of new files are exact.
    own_umask: bool,
    limits: Limits,
    opaque_root: bool,
}

/// What a finished tree says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Allocated bytes and inodes, the root directory included.
    pub usage: FsUsage,
    /// The root directory hides everything below. Overlay does not look at this attribute on roots.
    pub opaque_root: bool,
    /// Directories that the archive did not list: path relative to the root. They have default metadata.
    pub implied: Vec<String>,
}

impl Tree {
    /// Fills the existing empty directory at `root`. Gives the calling thread a umask of its own.
    ///
    /// # Errors
    /// I/O errors.
    pub fn new(root: &Path, limits: Limits) -> Result<Self> {
        let fd = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open", root.display())?;
        // The umask belongs to the process unless the thread stops sharing it; without that, modes are set explicitly.
        let own_umask = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_ok();
        if own_umask {
            nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        }
        let mut dirs = BTreeMap::new();
        dirs.insert(Vec::new(), None);
        Ok(Self {
            root: fd,
            parent: None,
            dirs,
            names: 0,
            entries: 0,
            bytes: 0,
            usage: FsUsage::default(),
            recount: false,
            own_umask,
            limits,
            opaque_root: false,
        })
    }

    /// Applies every entry of `archive`. `fetched` tells how many bytes have arrived, for the bound on the ratio.
    ///
    /// # Errors
    /// `DataLoss` for names that leave the root or malformed archives, `ResourceExhausted` at a limit, I/O errors.
    pub fn apply<R: BufRead>(&mut self, archive: &mut Reader<R>, fetched: &dyn Fn() -> u64) -> Result<()> {
        while let Some(entry) = archive.next_entry()? {
            self.entries += 1;
            if self.entries > self.limits.layer_entries {
                return Err(exhausted(format!("more than {} entries", self.limits.layer_entries)));
            }
            self.entry(&entry, archive, fetched).map_err(|e| e.within(format!("apply layer entry {:?}", String::from_utf8_lossy(&entry.path))))?;
        }
        Ok(())
    }

    fn entry<R: BufRead>(&mut self, entry: &Entry, archive: &mut Reader<R>, fetched: &dyn Fn() -> u64) -> Result<()> {
        let path = clean(&entry.path)?;
        let Some(name) = path.rsplit(|b| *b == b'/').next().filter(|n| !n.is_empty()) else {
            return self.root_entry(entry);
        };
        let parent = path[..path.len() - name.len()].strip_suffix(b"/").unwrap_or_default();
        if name == OPAQUE_MARKER {
            return self.mark_opaque(parent);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(parent, hidden);
        }
        self.open_parent(parent)?;
        match entry.what {
            What::Directory => self.directory(&path, name, entry),
            What::File => self.file(&path, name, entry, archive, fetched),
            What::Symlink => self.symlink(&path, name, entry),
            What::Hardlink => self.hardlink(&path, name, entry),
            What::Char | What::Block | What::Fifo => self.node(&path, name, entry),
        }
    }

    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.what != What::Directory {
            return Err(Error::new(Kind::DataLoss, "the root is not a directory"));
        }
        self.dirs.insert(Vec::new(), Some(DirMeta::of(entry)));
        Ok(())
    }

    // --- kinds of entries

    fn directory(&mut self, path: &[u8], name: &[u8], entry: &Entry) -> Result<()> {
        let mut was_whiteout = false;
        while let Err(e) = rustix::fs::mkdirat(self.at(), name, Mode::from_raw_mode(0o755)) {
            if e != Errno::EXIST {
                return Err(e).act("create directory", show(path));
            }
            let found = rustix::fs::statat(self.at(), name, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(path))?;
            if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
                break;
            }
            was_whiteout |= self.clear(path, name)?;
        }
        if was_whiteout {
            // Hidden and made anew by one layer: nothing of lower layers may shine through.
            set_opaque(self.at(), name)?;
        }
        self.remember(path, Some(DirMeta::of(entry)))
    }

    fn file<R: BufRead>(&mut self, path: &[u8], name: &[u8], entry: &Entry, archive: &mut Reader<R>, fetched: &dyn Fn() -> u64) -> Result<()> {
        self.bytes = self.bytes.saturating_add(entry.size);
        let ratio = fetched().saturating_mul(self.limits.ratio);
        if self.bytes > self.limits.layer_bytes {
            return Err(exhausted(format!("more than {} unpacked bytes", self.limits.layer_bytes)));
        }
        // A sparse or announced size costs nothing yet; what is really written is looked at below.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = loop {
            match rustix::fs::openat(self.at(), name, flags, Mode::from_raw_mode(entry.mode & 0o777)) {
                Ok(fd) => break fd,
                Err(Errno::EXIST) => {
                    self.clear(path, name)?;
                }
                Err(e) => return Err(e).act("create", show(path)),
            }
        };
        let base = self.bytes - entry.size;
        let mut written = 0u64;
        let mut check = |n: usize| {
            written += n as u64;
            let total = base + written;
            if total > RATIO_FROM && total > ratio.max(fetched().saturating_mul(self.limits.ratio)) {
                return Err(exhausted("unpacks to far more than any honest layer"));
            }
            Ok(())
        };
        match &entry.sparse {
            None => archive.data(|chunk| {
                check(chunk.len())?;
                write_all(fd.as_fd(), chunk).act("write", show(path))
            })?,
            Some(map) => {
                let mut sparse = SparseWriter { fd: fd.as_fd(), map, at: 0, done: 0 };
                archive.data(|chunk| {
                    check(chunk.len())?;
                    sparse.write(chunk).act("write", show(path))
                })?;
                rustix::fs::ftruncate(&fd, entry.size).act("set size of", show(path))?;
            }
        }
        self.finish_fd(fd.as_fd(), path, entry)?;
        Ok(())
    }

    /// Owner, mode, attributes and times of a regular file, in the order that keeps each of them; then its size on disk.
    fn finish_fd(&mut self, fd: BorrowedFd<'_>, path: &[u8], entry: &Entry) -> Result<()> {
        let owned = entry.uid != 0 || entry.gid != 0;
        if owned {
            rustix::fs::fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).act("change owner of", show(path))?;
        }
        // chown clears set-id bits, so the mode follows it.
        if entry.mode & 0o7000 != 0 || !self.own_umask {
            rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).act("change mode of", show(path))?;
        }
        set_xattrs(&entry.xattrs, |name, value| rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()), path)?;
        rustix::fs::futimens(fd, &times(Some(entry.mtime))).act("set times of", show(path))?;
        let stat = rustix::fs::fstat(fd).act("stat", show(path))?;
        self.count(&stat);
        Ok(())
    }

    fn symlink(&mut self, path: &[u8], name: &[u8], entry: &Entry) -> Result<()> {
        if entry.link.is_empty() || entry.link.contains(&0) {
            return Err(Error::new(Kind::DataLoss, "malformed link target"));
        }
        while let Err(e) = rustix::fs::symlinkat(entry.link.as_slice(), self.at(), name) {
            if e != Errno::EXIST {
                return Err(e).act("create symbolic link", show(path));
            }
            self.clear(path, name)?;
        }
        self.finish_name(path, name, entry)
    }

    fn node(&mut self, path: &[u8], name: &[u8], entry: &Entry) -> Result<()> {
        let kind = match entry.what {
            What::Char => FileType::CharacterDevice,
            What::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let device = rustix::fs::makedev(entry.device.0, entry.device.1);
        while let Err(e) = rustix::fs::mknodat(self.at(), name, kind, Mode::from_raw_mode(entry.mode & 0o777), device) {
            if e != Errno::EXIST {
                return Err(e).act("create node", show(path));
            }
            self.clear(path, name)?;
        }
        self.finish_name(path, name, entry)?;
        if entry.mode & 0o7000 != 0 || !self.own_umask {
            // The name was made by this entry in a directory that only we write, and is no link.
            rustix::fs::chmodat(self.at(), name, Mode::from_raw_mode(entry.mode), AtFlags::empty()).act("change mode of", show(path))?;
        }
        Ok(())
    }

    /// Metadata of what cannot be opened for writing: links and nodes. Never follows.
    fn finish_name(&mut self, path: &[u8], name: &[u8], entry: &Entry) -> Result<()> {
        let at = self.at();
        if entry.uid != 0 || entry.gid != 0 {
            rustix::fs::chownat(at, name, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)), AtFlags::SYMLINK_NOFOLLOW)
                .act("change owner of", show(path))?;
        }
        if !entry.xattrs.is_empty() {
            use std::os::fd::AsRawFd;
            let mut magic = format!("/proc/self/fd/{}/", at.as_raw_fd()).into_bytes();
            magic.extend_from_slice(name);
            set_xattrs(&entry.xattrs, |key, value| rustix::fs::lsetxattr(magic.as_slice(), key, value, XattrFlags::empty()), path)?;
        }
        rustix::fs::utimensat(at, name, &times(Some(entry.mtime)), AtFlags::SYMLINK_NOFOLLOW).act("set times of", show(path))?;
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(path))?;
        self.count(&stat);
        Ok(())
    }

    fn hardlink(&mut self, path: &[u8], name: &[u8], entry: &Entry) -> Result<()> {
        let target = clean(&entry.link)?;
        let target_name = target.rsplit(|b| *b == b'/').next().unwrap_or_default();
        if target_name.is_empty() || target == path {
            return Err(Error::new(Kind::DataLoss, "malformed link target"));
        }
        let target_parent = target[..target.len() - target_name.len()].strip_suffix(b"/").unwrap_or_default();
        let from = self.resolve(target_parent).act("resolve", show(target_parent))?;
        loop {
            // No AT_SYMLINK_FOLLOW: a link to a link is a link.
            match rustix::fs::linkat(&from, target_name, self.at(), name, AtFlags::empty()) {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => {
                    self.clear(path, name)?;
                }
                Err(Errno::NOENT) => return Err(Error::new(Kind::DataLoss, format!("link to {}, which this layer does not have", show(&target)))),
                Err(e) => return Err(e).act("link", show(path)),
            }
        }
    }

    // --- whiteouts

    fn whiteout(&mut self, parent: &[u8], hidden: &[u8]) -> Result<()> {
        if hidden.starts_with(WHITEOUT) {
            // Bookkeeping of aufs (`.wh..wh.plnk` and its like), which image-spec reserves and nobody needs.
            return Ok(());
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(Error::new(Kind::DataLoss, "malformed whiteout"));
        }
        self.open_parent(parent)?;
        match rustix::fs::mknodat(self.at(), hidden, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => {
                self.usage.inodes += 1;
                Ok(())
            }
            // A whiteout hides lower layers only: what this layer has itself stays, but alone.
            Err(Errno::EXIST) => {
                let found = rustix::fs::statat(self.at(), hidden, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(hidden))?;
                if FileType::from_raw_mode(found.st_mode) == FileType::Directory { set_opaque(self.at(), hidden) } else { Ok(()) }
            }
            Err(e) => Err(e).act("create whiteout", show(hidden)),
        }
    }

    fn mark_opaque(&mut self, dir: &[u8]) -> Result<()> {
        self.open_parent(dir)?;
        if dir.is_empty() {
            self.opaque_root = true;
        }
        set_opaque(self.at(), b".")
    }

    // --- names

    /// The parent of the entry at hand.
    fn at(&self) -> BorrowedFd<'_> {
        self.parent.as_ref().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd())
    }

    fn resolve(&self, dir: &[u8]) -> rustix::io::Result<OwnedFd> {
        let dir = if dir.is_empty() { b".".as_slice() } else { dir };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.root, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Makes `dir` the current parent, creating what is missing of it.
    fn open_parent(&mut self, dir: &[u8]) -> Result<()> {
        if self.parent.as_ref().is_some_and(|(path, _)| path == dir) {
            return Ok(());
        }
        let fd = match self.resolve(dir) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => {
                let mut links = 0;
                self.make_parents(dir, &mut links)?;
                self.resolve(dir).act("resolve", show(dir))?
            }
            Err(e) => return Err(e).act("resolve", show(dir)),
        };
        self.parent = Some((dir.to_vec(), fd));
        Ok(())
    }

    /// Creates the missing directories of `dir`, one after the other, through links that this layer planted.
    fn make_parents(&mut self, dir: &[u8], links: &mut usize) -> Result<()> {
        let ends = dir.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| i).chain([dir.len()]);
        let mut above = self.resolve(b"").act("open", "the root")?;
        for end in ends {
            let path = &dir[..end];
            let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
            match self.resolve(path) {
                Ok(fd) => {
                    above = fd;
                    continue;
                }
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(e) => return Err(e).act("resolve", show(path)),
            }
            let found = rustix::fs::statat(&above, name, AtFlags::SYMLINK_NOFOLLOW).ok();
            let is = |kind| found.as_ref().is_some_and(|s| FileType::from_raw_mode(s.st_mode) == kind);
            if is(FileType::Symlink) {
                // It dangles within this layer; the directory it names may come from a lower one.
                *links += 1;
                if *links > MAX_LINKS {
                    return Err(Error::new(Kind::DataLoss, "too many symbolic links"));
                }
                let target = rustix::fs::readlinkat(&above, name, Vec::new()).act("read link", show(path))?;
                let target = follow(path, target.as_bytes());
                self.make_parents(&target, links)?;
            } else {
                let was_whiteout = found.as_ref().is_some_and(is_whiteout);
                if was_whiteout {
                    rustix::fs::unlinkat(&above, name, AtFlags::empty()).act("remove", show(path))?;
                    self.recount = true;
                }
                rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o755)).act("create directory", show(path))?;
                if was_whiteout {
                    set_opaque(above.as_fd(), name)?;
                }
                self.remember(path, None)?;
            }
            above = self.resolve(path).act("resolve", show(path))?;
        }
        Ok(())
    }

    fn remember(&mut self, path: &[u8], meta: Option<DirMeta>) -> Result<()> {
        if meta.is_some() || !self.dirs.contains_key(path) {
            self.names += path.len() + meta.as_ref().map_or(0, |m| m.xattrs.iter().map(|(k, v)| k.len() + v.len()).sum());
            if self.names > MAX_NAMES {
                return Err(exhausted("too many directories"));
            }
            self.dirs.insert(path.to_vec(), meta);
        }
        Ok(())
    }

    /// Removes what an earlier entry of this layer left under the name. Tells whether it was a whiteout.
    fn clear(&mut self, path: &[u8], name: &[u8]) -> Result<bool> {
        let found = rustix::fs::statat(self.at(), name, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(path))?;
        self.recount = true;
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            crate::provisioner::remove::tree_at(self.at(), name)?;
            let inside = |dir: &[u8]| dir.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"));
            self.dirs.retain(|dir, _| !inside(dir));
        } else {
            rustix::fs::unlinkat(self.at(), name, AtFlags::empty()).act("remove", show(path))?;
        }
        Ok(is_whiteout(&found))
    }

    fn count(&mut self, stat: &rustix::fs::Stat) {
        self.usage.bytes += blocks(stat);
        self.usage.inodes += 1;
    }

    /// Gives the directories their metadata and says what came out.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(mut self) -> Result<Finished> {
        self.parent = None;
        let mut implied = Vec::new();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for (path, meta) in std::mem::take(&mut self.dirs) {
            let name = if path.is_empty() { b".".as_slice() } else { &path };
            let fd = match rustix::fs::openat2(&self.root, name, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS) {
                Ok(fd) => fd,
                // Replaced by something else under another spelling of its name.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                    self.recount = true;
                    continue;
                }
                Err(e) => return Err(e).act("open directory", show(&path)),
            };
            match meta {
                Some(meta) => meta.set(fd.as_fd(), &path)?,
                // Made a moment ago by us: 0755 whatever the umask, and no set-group-id bit from above.
                None => {
                    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).act("change mode of", show(&path))?;
                    if let Ok(text) = String::from_utf8(path)
                        && !text.is_empty()
                    {
                        implied.push(text);
                    }
                }
            }
            let stat = rustix::fs::fstat(&fd).act("stat", "directory")?;
            self.count(&stat);
        }
        let usage = if self.recount { crate::provisioner::usage::count_at(self.root.as_fd())? } else { self.usage };
        Ok(Finished { usage, opaque_root: self.opaque_root, implied })
    }
}

impl DirMeta {
    fn of(entry: &Entry) -> Self {
        Self { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: Some(entry.mtime), xattrs: entry.xattrs.clone() }
    }

    fn set(&self, fd: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
        if self.uid != 0 || self.gid != 0 {
            rustix::fs::fchown(fd, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid))).act("change owner of", show(path))?;
        }
        rustix::fs::fchmod(fd, Mode::from_raw_mode(self.mode)).act("change mode of", show(path))?;
        set_xattrs(&self.xattrs, |name, value| rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()), path)?;
        rustix::fs::futimens(fd, &times(self.mtime)).act("set times of", show(path))
    }
}

/// Writes the pieces of a sparse file at their offsets.
struct SparseWriter<'a> {
    fd: BorrowedFd<'a>,
    map: &'a [(u64, u64)],
    at: usize,
    done: u64,
}

impl SparseWriter<'_> {
    fn write(&mut self, mut chunk: &[u8]) -> rustix::io::Result<()> {
        while !chunk.is_empty() {
            let Some((offset, length)) = self.map.get(self.at) else { return Err(Errno::INVAL) };
            let n = chunk.len().min(usize::try_from(length - self.done).unwrap_or(usize::MAX));
            let mut piece = &chunk[..n];
            while !piece.is_empty() {
                let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(self.fd, piece, offset + self.done))?;
                piece = &piece[written..];
                self.done += written as u64;
            }
            chunk = &chunk[n..];
            if self.done == *length {
                self.at += 1;
                self.done = 0;
            }
        }
        Ok(())
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let n = rustix::io::retry_on_intr(|| rustix::io::write(fd, bytes))?;
        bytes = &bytes[n..];
    }
    Ok(())
}

/// Attributes from the archive. Overlay's own are dropped: a layer that brings `redirect` or `metacopy` would choose which
/// files of other layers it shows. So are those that mean something on this host's policy only.
fn set_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)], set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>, path: &[u8]) -> Result<()> {
    for (name, value) in xattrs {
        let dropped: [&[u8]; 5] = [b"trusted.overlay.", b"user.overlay.", b"security.selinux", b"security.ima", b"security.evm"];
        if dropped.iter().any(|prefix| name.starts_with(prefix)) || name.contains(&0) {
            continue;
        }
        match set(name, value) {
            // A file system without attributes, or a daemon without the right: the file works without them, except for capabilities.
            Err(Errno::NOTSUP | Errno::PERM) if name != b"security.capability" => {}
            result => result.act("set extended attribute of", show(path))?,
        }
    }
    Ok(())
}

fn set_opaque(at: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let fd = rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .act("open directory", show(name))?;
    rustix::fs::fsetxattr(&fd, OPAQUE, b"y", XattrFlags::empty()).act("mark opaque", show(name))
}

/// Whether this is how overlay writes a deletion.
pub fn is_whiteout(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Allocated bytes, as `du` counts them.
pub fn blocks(stat: &rustix::fs::Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

fn times(mtime: Option<(i64, u32)>) -> Timestamps {
    let time = mtime.map_or(Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT }, |(s, n)| Timespec { tv_sec: s, tv_nsec: n.into() });
    Timestamps { last_access: time, last_modification: time }
}

fn show(path: &[u8]) -> impl std::fmt::Display + '_ {
    path.escape_ascii()
}

fn exhausted(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::ResourceExhausted, format!("layer exceeds its limits: {why}"))
}
