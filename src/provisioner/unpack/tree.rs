//! The sink that keeps a layer as a directory, in overlay's own form: whiteouts are character devices 0/0, opaque directories
//! carry `trusted.overlay.opaque`.
//!
//! # Confinement
//! Parents are resolved by `openat2` with `RESOLVE_IN_ROOT` and
//! `RESOLVE_NO_MAGICLINKS` on the layer's root, so that no `..` and no symbolic link leads out of it, whatever earlier entries
//! planted; the last component is never followed. Metadata go through descriptors of files that this entry made, never
//! through links to older ones (attack cases 1 to 5).
//!
//! # Cost
//! A file of root costs four system calls (open, write, utimensat, fstat) and a close: the descriptor of the last parent is
//! kept, and the calling thread has its own umask of 0, so that `open` sets the final mode.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::content::{self, FileSum, Sum};
use super::names::follow;
use super::sink::{Data, Finished, MAX_LINKS, Place, Sink, exhausted, show, xattrs};
use super::tar::{Entry, What};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::FsUsage;

/// Extended attribute that makes overlay hide what lower layers have in a directory.
pub const OPAQUE: &str = "trusted.overlay.opaque";
/// Bytes of directory names remembered until the end of a layer; 4 million entries could otherwise take gigabytes.
const MAX_NAMES: usize = 64 << 20;

/// What a directory gets at the end, when nothing is put into it any more.
struct DirMeta {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A directory as an entry named it.
struct Parent {
    text: Vec<u8>,
    /// The same without links.
    real: Vec<u8>,
    fd: OwnedFd,
}

/// A layer's directory being filled.
pub struct Tree {
    root: OwnedFd,
    /// Its path, for finding out where links led.
    root_path: Vec<u8>,
    /// The last parent used.
    parent: Option<Parent>,
    /// Metadata by the real path of a directory, whatever links its entries went through.
    dirs: BTreeMap<Vec<u8>, Option<DirMeta>>,
    names: usize,
    usage: FsUsage,
    /// Something was replaced: running sums are no longer right.
    recount: bool,
    /// Sums of what is on disk are taken, modes of new files are exact.
    own_umask: bool,
    opaque_root: bool,
    marks: bool,
    /// Of the first entry: what directories get that the archive does not list.
    time: Option<(i64, u32)>,
    /// Of all names but directories, as long as nothing was replaced.
    content: Sum,
}

impl Tree {
    /// Fills the existing empty directory at `root`. Gives the calling thread a umask of its own.
    ///
    /// # Errors
    /// I/O errors.
    pub fn new(root: &Path) -> Result<Self> {
        let fd = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open", root.display())?;
        // The umask belongs to the process unless the thread stops sharing it; without that, modes are set explicitly.
        let own_umask = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_ok();
        if own_umask {
            nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        }
        let mut dirs = BTreeMap::new();
        dirs.insert(Vec::new(), None);
        let root_path = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()).act("read link", root.display())?.into_bytes();
        Ok(Self {
            root: fd,
            root_path,
            parent: None,
            dirs,
            names: 0,
            usage: FsUsage::default(),
            recount: false,
            own_umask,
            opaque_root: false,
            marks: false,
            time: None,
            content: Sum::default(),
        })
    }

    /// Owner, mode, attributes and times of a regular file, in the order that keeps each of them; then its size on disk.
    fn finish_fd(&mut self, fd: BorrowedFd<'_>, path: &[u8], entry: &Entry) -> Result<Stat> {
        let owned = entry.uid != 0 || entry.gid != 0;
        if owned {
            rustix::fs::fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).act("change owner of", show(path))?;
        }
        // chown clears set-id bits, so the mode follows it.
        if entry.mode & 0o7000 != 0 || !self.own_umask {
            rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).act("change mode of", show(path))?;
        }
        set_xattrs(xattrs(entry), |name, value| rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()), path)?;
        rustix::fs::futimens(fd, &times(Some(entry.mtime))).act("set times of", show(path))?;
        let stat = rustix::fs::fstat(fd).act("stat", show(path))?;
        self.count(&stat);
        Ok(stat)
    }

    /// Metadata of what cannot be opened for writing: links and nodes. Never follows.
    fn finish_name(&mut self, path: &[u8], name: &[u8], entry: &Entry) -> Result<Stat> {
        let at = self.at();
        if entry.uid != 0 || entry.gid != 0 {
            rustix::fs::chownat(at, name, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)), AtFlags::SYMLINK_NOFOLLOW)
                .act("change owner of", show(path))?;
        }
        if !entry.xattrs.is_empty() {
            let mut magic = format!("/proc/self/fd/{}/", at.as_raw_fd()).into_bytes();
            magic.extend_from_slice(name);
            set_xattrs(xattrs(entry), |key, value| rustix::fs::lsetxattr(magic.as_slice(), key, value, XattrFlags::empty()), path)?;
        }
        rustix::fs::utimensat(at, name, &times(Some(entry.mtime)), AtFlags::SYMLINK_NOFOLLOW).act("set times of", show(path))?;
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(path))?;
        self.count(&stat);
        Ok(stat)
    }

    // --- names

    /// The parent of the entry at hand.
    fn at(&self) -> BorrowedFd<'_> {
        self.parent.as_ref().map_or(self.root.as_fd(), |p| p.fd.as_fd())
    }

    fn resolve(&self, dir: &[u8], more: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let dir = if dir.is_empty() { b".".as_slice() } else { dir };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
        rustix::fs::openat2(&self.root, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Makes `dir` the current parent, creating what is missing of it.
    fn open_parent(&mut self, dir: &[u8]) -> Result<()> {
        if self.parent.as_ref().is_some_and(|p| p.text == dir) {
            return Ok(());
        }
        let mut real = None;
        let fd = match self.resolve(dir, ResolveFlags::NO_SYMLINKS) {
            Ok(fd) => fd,
            // Through a link: the directory has another name of its own, and metadata are kept by that.
            Err(Errno::LOOP | Errno::NOENT | Errno::NOTDIR) => {
                let fd = match self.resolve(dir, ResolveFlags::empty()) {
                    Err(Errno::NOENT | Errno::NOTDIR) => {
                        let mut links = 0;
                        self.make_parents(dir, &mut links)?;
                        self.resolve(dir, ResolveFlags::empty())
                    }
                    other => other,
                }
                .act("resolve", show(dir))?;
                real = Some(self.real(fd.as_fd())?);
                fd
            }
            Err(e) => return Err(e).act("resolve", show(dir)),
        };
        self.parent = Some(Parent { real: real.unwrap_or_else(|| dir.to_vec()), text: dir.to_vec(), fd });
        Ok(())
    }

    /// The name of an open directory relative to the root.
    fn real(&self, dir: BorrowedFd<'_>) -> Result<Vec<u8>> {
        let path = rustix::fs::readlink(format!("/proc/self/fd/{}", dir.as_raw_fd()), Vec::new()).act("read link", "open directory")?;
        let inside =
            path.as_bytes().strip_prefix(self.root_path.as_slice()).and_then(|rest| if rest.is_empty() { Some(rest) } else { rest.strip_prefix(b"/") });
        inside.map(<[u8]>::to_vec).ok_or_else(|| Error::internal("resolve: the layer's directory was moved"))
    }

    /// The one name by which metadata of `name` in the current parent are kept.
    fn key(&self, name: &[u8]) -> Vec<u8> {
        join(self.parent.as_ref().map_or(&[], |p| &p.real), name)
    }

    /// Creates the missing directories of `dir`, one after the other, through links that this layer planted.
    fn make_parents(&mut self, dir: &[u8], links: &mut usize) -> Result<()> {
        let ends = dir.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| i).chain([dir.len()]);
        let mut above = self.resolve(b"", ResolveFlags::empty()).act("open", "the root")?;
        for end in ends {
            let path = &dir[..end];
            let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
            match self.resolve(path, ResolveFlags::empty()) {
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
                let target = follow(&join(&self.real(above.as_fd())?, name), target.as_bytes());
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
                self.remember(join(&self.real(above.as_fd())?, name), None)?;
            }
            above = self.resolve(path, ResolveFlags::empty()).act("resolve", show(path))?;
        }
        Ok(())
    }

    fn remember(&mut self, key: Vec<u8>, meta: Option<DirMeta>) -> Result<()> {
        if meta.is_some() || !self.dirs.contains_key(&key) {
            self.names += key.len() + meta.as_ref().map_or(0, |m| m.xattrs.iter().map(|(k, v)| k.len() + v.len()).sum());
            if self.names > MAX_NAMES {
                return Err(exhausted("too many directories"));
            }
            self.dirs.insert(key, meta);
        }
        Ok(())
    }

    /// Removes what an earlier entry of this layer left under the name. Tells whether it was a whiteout.
    fn clear(&mut self, path: &[u8], name: &[u8]) -> Result<bool> {
        let found = rustix::fs::statat(self.at(), name, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(path))?;
        self.recount = true;
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            crate::provisioner::remove::tree_at(self.at(), name)?;
            let key = self.key(name);
            let inside = |dir: &[u8]| dir.strip_prefix(key.as_slice()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"));
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
}

impl Sink for Tree {
    fn root(&mut self, entry: &Entry) -> Result<()> {
        self.remember(Vec::new(), Some(DirMeta::of(entry)))
    }

    fn directory(&mut self, Place { path, parent, name }: Place<'_>, entry: &Entry) -> Result<()> {
        self.time.get_or_insert(entry.mtime);
        self.open_parent(parent)?;
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
        self.remember(self.key(name), Some(DirMeta::of(entry)))
    }

    fn file(&mut self, Place { path, parent, name }: Place<'_>, entry: &Entry, data: &mut Data<'_>) -> Result<()> {
        self.time.get_or_insert(entry.mtime);
        self.open_parent(parent)?;
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
        let mut sum = FileSum::default();
        data(&mut |offset, piece| {
            sum.piece(offset, piece);
            write_all(fd.as_fd(), offset, piece).act("write", show(path))
        })?;
        if entry.sparse.is_some() {
            rustix::fs::ftruncate(&fd, entry.size).act("set size of", show(path))?;
        }
        let stat = self.finish_fd(fd.as_fd(), path, entry)?;
        let capability = xattrs(entry).find(|(key, _)| *key == content::CAPABILITY).map_or(b"".as_slice(), |(_, value)| value);
        let key = self.key(name);
        self.content.add(&key, &stat, &sum.finish(entry.size).to_le_bytes(), capability);
        Ok(())
    }

    fn symlink(&mut self, Place { path, parent, name }: Place<'_>, entry: &Entry) -> Result<()> {
        self.time.get_or_insert(entry.mtime);
        self.open_parent(parent)?;
        while let Err(e) = rustix::fs::symlinkat(entry.link.as_slice(), self.at(), name) {
            if e != Errno::EXIST {
                return Err(e).act("create symbolic link", show(path));
            }
            self.clear(path, name)?;
        }
        let stat = self.finish_name(path, name, entry)?;
        let key = self.key(name);
        self.content.add(&key, &stat, &entry.link, b"");
        Ok(())
    }

    fn node(&mut self, Place { path, parent, name }: Place<'_>, entry: &Entry) -> Result<()> {
        self.time.get_or_insert(entry.mtime);
        self.open_parent(parent)?;
        self.marks |= entry.what == What::Char && entry.device == (0, 0);
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
        let mut stat = self.finish_name(path, name, entry)?;
        if entry.mode & 0o7000 != 0 || !self.own_umask {
            // The name was made by this entry in a directory that only we write, and is no link.
            rustix::fs::chmodat(self.at(), name, Mode::from_raw_mode(entry.mode), AtFlags::empty()).act("change mode of", show(path))?;
            stat = rustix::fs::statat(self.at(), name, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(path))?;
        }
        let key = self.key(name);
        self.content.add(&key, &stat, b"", b"");
        Ok(())
    }

    fn hardlink(&mut self, Place { path, parent, name }: Place<'_>, target: Place<'_>) -> Result<()> {
        self.open_parent(parent)?;
        let from = self.resolve(target.parent, ResolveFlags::empty()).act("resolve", show(target.parent))?;
        loop {
            // No AT_SYMLINK_FOLLOW: a link to a link is a link.
            match rustix::fs::linkat(&from, target.name, self.at(), name, AtFlags::empty()) {
                Ok(()) => {
                    let (key, mut sum) = (self.key(name), self.content);
                    content::add_again(&mut sum, self.at(), name, &key).act("read", show(path))?;
                    self.content = sum;
                    return Ok(());
                }
                Err(Errno::EXIST) => {
                    self.clear(path, name)?;
                }
                Err(Errno::NOENT) => return Err(Error::new(Kind::DataLoss, format!("link to {}, which this layer does not have", show(target.path)))),
                Err(e) => return Err(e).act("link", show(path)),
            }
        }
    }

    fn whiteout(&mut self, Place { parent, name: hidden, .. }: Place<'_>) -> Result<()> {
        self.marks = true;
        self.open_parent(parent)?;
        match rustix::fs::mknodat(self.at(), hidden, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => {
                self.usage.inodes += 1;
                let stat = rustix::fs::statat(self.at(), hidden, AtFlags::SYMLINK_NOFOLLOW).act("stat", show(hidden))?;
                let key = self.key(hidden);
                self.content.add(&key, &stat, b"", b"");
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

    fn opaque(&mut self, dir: &[u8]) -> Result<()> {
        self.marks = true;
        self.open_parent(dir)?;
        // By what it is: links of the layer's own may lead to the root as well.
        let (here, root) = (rustix::fs::fstat(self.at()).act("stat", show(dir))?, rustix::fs::fstat(&self.root).act("stat", "root of the layer")?);
        self.opaque_root |= (here.st_dev, here.st_ino) == (root.st_dev, root.st_ino);
        set_opaque(self.at(), b".")
    }

    fn finish(mut self: Box<Self>) -> Result<Finished> {
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
                    rustix::fs::futimens(&fd, &times(Some(self.time.unwrap_or_default()))).act("set times of", show(&path))?;
                    implied.extend(String::from_utf8(path.clone()));
                }
            }
            let stat = rustix::fs::fstat(&fd).act("stat", "directory")?;
            self.content.add(&path, &stat, b"", content::opacity(fd.as_fd()));
            self.count(&stat);
        }
        let usage = if self.recount { crate::provisioner::usage::count_at(self.root.as_fd())? } else { self.usage };
        let content = if self.recount { content::of_dir(self.root.as_fd())? } else { self.content.text() };
        Ok(Finished { usage, opaque_root: self.opaque_root, implied, marks: self.marks, content: Some(content) })
    }
}

impl DirMeta {
    fn of(entry: &Entry) -> Self {
        Self {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: Some(entry.mtime),
            xattrs: xattrs(entry).map(|(k, v)| (k.to_vec(), v.to_vec())).collect(),
        }
    }

    fn set(&self, fd: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
        if self.uid != 0 || self.gid != 0 {
            rustix::fs::fchown(fd, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid))).act("change owner of", show(path))?;
        }
        rustix::fs::fchmod(fd, Mode::from_raw_mode(self.mode)).act("change mode of", show(path))?;
        set_xattrs(
            self.xattrs.iter().map(|(k, v)| (k.as_slice(), v.as_slice())),
            |name, value| rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()),
            path,
        )?;
        rustix::fs::futimens(fd, &times(self.mtime)).act("set times of", show(path))
    }
}

fn write_all(fd: BorrowedFd<'_>, mut offset: u64, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let n = rustix::io::retry_on_intr(|| rustix::io::pwrite(fd, bytes, offset))?;
        offset += n as u64;
        bytes = &bytes[n..];
    }
    Ok(())
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

fn set_xattrs<'a>(xattrs: impl Iterator<Item = (&'a [u8], &'a [u8])>, set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>, path: &[u8]) -> Result<()> {
    for (name, value) in xattrs {
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
