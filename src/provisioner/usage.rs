//! Counts what directories occupy on disk: allocated blocks and inodes, hard links once, as `du` does.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::unpack::tree::blocks;
use crate::model::error::{Act, Result};
use crate::model::image::FsUsage;
use crate::stdx::clock::now_ns;

/// Levels counted.
const MAX_DEPTH: usize = 256;
/// A count older than this is made anew when someone asks (the kubelet asks every ten seconds).
const MAX_AGE_NS: i64 = 9_000_000_000;

/// Counts the tree at `path`; nothing there counts nothing.
///
/// # Errors
/// I/O errors.
pub fn count(path: &Path) -> Result<FsUsage> {
    match rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => count_at(fd.as_fd()),
        Err(Errno::NOENT) => Ok(FsUsage::default()),
        Err(e) => Err(e).act("open directory", path.display()),
    }
}

/// Counts the tree whose top directory is `top`. Files that vanish meanwhile are left out.
///
/// # Errors
/// I/O errors.
pub fn count_at(top: BorrowedFd<'_>) -> Result<FsUsage> {
    walk(top, &mut Seen::default()).act("count", "directory tree")
}

/// Files with several names that have been counted, by device and inode.
#[derive(Default)]
pub struct Seen {
    linked: HashSet<(u64, u64)>,
}

/// Counts whatever is at `path`, file or tree, without what was counted with `seen` before; nothing there counts nothing.
///
/// # Errors
/// I/O errors.
pub fn count_once(path: &Path, seen: &mut Seen) -> Result<FsUsage> {
    match rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => walk(fd.as_fd(), seen).act("count", path.display()),
        Err(Errno::NOENT) => Ok(FsUsage::default()),
        Err(Errno::NOTDIR | Errno::LOOP) => match rustix::fs::lstat(path) {
            Ok(stat) if stat.st_nlink > 1 && !seen.linked.insert((stat.st_dev, stat.st_ino)) => Ok(FsUsage::default()),
            Ok(stat) => Ok(FsUsage { bytes: blocks(&stat), inodes: 1 }),
            Err(Errno::NOENT) => Ok(FsUsage::default()),
            Err(e) => Err(e).act("stat", path.display()),
        },
        Err(e) => Err(e).act("open directory", path.display()),
    }
}

fn walk(top: BorrowedFd<'_>, seen: &mut Seen) -> rustix::io::Result<FsUsage> {
    let stat = rustix::fs::statat(top, ".", AtFlags::SYMLINK_NOFOLLOW)?;
    let device = stat.st_dev;
    let mut sum = FsUsage { bytes: blocks(&stat), inodes: 1 };
    // One descriptor a level; what a container hides deeper than this is not worth the daemon's descriptors.
    // Opened anew: `top` may be a bare path descriptor, which cannot be read from.
    let readable = rustix::fs::openat(top, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut stack = vec![Dir::read_from(&readable)?];
    loop {
        let depth = stack.len();
        let Some(dir) = stack.last_mut() else { break };
        let Some(entry) = dir.read() else {
            stack.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let at = dir.fd()?;
        let stat = match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(e),
        };
        // What is mounted here occupies another file system.
        if stat.st_dev != device {
            continue;
        }
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_dir && stat.st_nlink > 1 && !seen.linked.insert((stat.st_dev, stat.st_ino)) {
            continue;
        }
        sum.bytes += blocks(&stat);
        sum.inodes += 1;
        if is_dir && depth < MAX_DEPTH {
            match rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
                Ok(fd) => stack.push(Dir::read_from(&fd)?),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(sum)
}

/// What `path` itself occupies, without what is in it; nothing there counts nothing.
pub fn own(path: &Path) -> FsUsage {
    rustix::fs::lstat(path).map_or(FsUsage::default(), |stat| FsUsage { bytes: blocks(&stat), inodes: 1 })
}

/// Adds two counts.
pub fn add(a: FsUsage, b: FsUsage) -> FsUsage {
    FsUsage { bytes: a.bytes + b.bytes, inodes: a.inodes + b.inodes }
}

/// Counted directories by container: answers at once, counts in the background when an answer is old.
#[derive(Clone, Default)]
pub struct Counts {
    map: Arc<Mutex<HashMap<String, Counted>>>,
}

struct Counted {
    dir: PathBuf,
    usage: FsUsage,
    at: i64,
    running: bool,
}

impl Counts {
    /// Starts to watch `dir` for `id`; `usage` is what is known now.
    pub fn insert(&self, id: &str, dir: PathBuf, usage: FsUsage) {
        self.lock().insert(id.to_owned(), Counted { dir, usage, at: now_ns(), running: false });
    }

    /// Forgets `id`.
    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// The last count of `id`. If it is old, a new one is started.
    pub fn get(&self, id: &str) -> Option<(FsUsage, i64)> {
        let mut map = self.lock();
        let counted = map.get_mut(id)?;
        let answer = (counted.usage, counted.at);
        if !counted.running && now_ns() - counted.at > MAX_AGE_NS {
            counted.running = true;
            let (this, id, dir) = (self.clone(), id.to_owned(), counted.dir.clone());
            drop(map);
            // Without a runtime (a synchronous test) the old count stands.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn_blocking(move || this.refresh(&id, &dir));
            }
        }
        Some(answer)
    }

    /// Counts now. Blocks.
    pub fn refresh(&self, id: &str, dir: &Path) {
        let counted = count(dir);
        let mut map = self.lock();
        if let Some(entry) = map.get_mut(id) {
            entry.running = false;
            match counted {
                Ok(usage) => (entry.usage, entry.at) = (usage, now_ns()),
                Err(e) => tracing::debug!(container = id, error = %e, "count writable directory"),
            }
        }
    }

    /// The last counts of all, summed.
    pub fn sum(&self) -> FsUsage {
        self.lock().values().fold(FsUsage::default(), |sum, c| add(sum, c.usage))
    }

    /// Ids and directories.
    pub fn all(&self) -> Vec<(String, PathBuf)> {
        self.lock().iter().map(|(id, c)| (id.clone(), c.dir.clone())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Counted>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
