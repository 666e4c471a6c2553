//! Counts what directories occupy on disk: allocated blocks and inodes, hard links once, as `du` does.

use std::collections::{HashMap, HashSet, VecDeque};
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

/// Walks at once. The walks of a list of statistics must not fill the pool of blocking threads, behind which creations and exits
/// would wait, nor the disk's queue.
const MAX_WALKS: usize = 2;

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
#[derive(Clone)]
pub struct Counts {
    state: Arc<Mutex<State>>,
    count: fn(&Path) -> Result<FsUsage>,
}

#[derive(Default)]
struct State {
    map: HashMap<String, Counted>,
    /// Whose counts are old, in the order in which somebody asked.
    wanted: VecDeque<String>,
    /// Threads that walk.
    walks: usize,
}

struct Counted {
    dir: PathBuf,
    usage: FsUsage,
    /// When it was counted; `None` for never.
    at: Option<i64>,
    /// A new count is wanted or under way.
    running: bool,
}

impl Default for Counts {
    fn default() -> Self {
        Self { state: Arc::default(), count }
    }
}

impl Counts {
    /// Starts to watch `dir` for `id`; `usage` is what is known now, `None` if that is nothing.
    pub fn insert(&self, id: &str, dir: PathBuf, usage: Option<FsUsage>) {
        let counted = Counted { dir, usage: usage.unwrap_or_default(), at: usage.map(|_| now_ns()), running: false };
        self.lock().map.insert(id.to_owned(), counted);
    }

    /// Forgets `id`.
    pub fn remove(&self, id: &str) {
        self.lock().map.remove(id);
    }

    /// The last count of `id`. If it is old, or there is none, a new one is made in the background.
    pub fn get(&self, id: &str) -> Option<(FsUsage, i64)> {
        let mut state = self.lock();
        let counted = state.map.get_mut(id)?;
        let answer = counted.at.map(|at| (counted.usage, at));
        if !counted.running && counted.at.is_none_or(|at| now_ns() - at > MAX_AGE_NS) {
            // Without a runtime (a synchronous test) the old count stands.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                counted.running = true;
                state.wanted.push_back(id.to_owned());
                if state.walks < MAX_WALKS {
                    state.walks += 1;
                    let this = self.clone();
                    runtime.spawn_blocking(move || this.walk_wanted());
                }
            }
        }
        answer
    }

    /// Counts what is wanted until nothing is. Blocks.
    fn walk_wanted(&self) {
        loop {
            let mut state = self.lock();
            let Some(id) = state.wanted.pop_front() else {
                state.walks -= 1;
                return;
            };
            let Some(dir) = state.map.get(&id).map(|counted| counted.dir.clone()) else { continue };
            drop(state);
            self.refresh(&id, &dir);
        }
    }

    /// Counts now. Blocks.
    pub fn refresh(&self, id: &str, dir: &Path) {
        let counted = (self.count)(dir);
        let mut state = self.lock();
        // Another container may have come by that name meanwhile; its directory is another one then.
        if let Some(entry) = state.map.get_mut(id).filter(|entry| entry.dir == dir) {
            entry.running = false;
            match counted {
                Ok(usage) => (entry.usage, entry.at) = (usage, Some(now_ns())),
                Err(e) => tracing::debug!(container = id, error = %e, "count writable directory"),
            }
        }
    }

    /// The last counts of all, summed.
    pub fn sum(&self) -> FsUsage {
        self.lock().map.values().fold(FsUsage::default(), |sum, c| add(sum, c.usage))
    }

    /// Ids and directories.
    pub fn all(&self) -> Vec<(String, PathBuf)> {
        self.lock().map.iter().map(|(id, c)| (id.clone(), c.dir.clone())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, MutexGuard};

    use super::*;

    /// Walks that wait: how many there are, how many there were at once, how many may end.
    static WALKS: Mutex<(usize, usize, usize)> = Mutex::new((0, 0, 0));
    static CHANGED: Condvar = Condvar::new();

    fn wait(until: impl Fn(&(usize, usize, usize)) -> bool) -> MutexGuard<'static, (usize, usize, usize)> {
        CHANGED.wait_while(WALKS.lock().unwrap(), |walks| !until(walks)).unwrap()
    }

    fn slow_count(_: &Path) -> Result<FsUsage> {
        let mut walks = WALKS.lock().unwrap();
        walks.0 += 1;
        walks.1 = walks.1.max(walks.0);
        drop(walks);
        CHANGED.notify_all();
        let mut walks = wait(|walks| walks.2 > 0);
        walks.0 -= 1;
        walks.2 -= 1;
        drop(walks);
        CHANGED.notify_all();
        Ok(FsUsage { bytes: 7, inodes: 1 })
    }

    #[tokio::test]
    async fn a_list_of_old_counts_starts_few_walks_and_all_are_counted_in_the_end() {
        let counts = Counts { count: slow_count, ..Counts::default() };
        let ids: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        for id in &ids {
            counts.insert(id, PathBuf::from(id), None);
        }
        for _ in 0..3 {
            assert!(ids.iter().all(|id| counts.get(id).is_none()), "what was never counted is not said to be nothing");
        }
        drop(wait(|walks| walks.0 == MAX_WALKS));
        // Work of others finds a thread at once.
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        {
            let state = counts.lock();
            assert_eq!((state.walks, state.wanted.len()), (MAX_WALKS, ids.len() - MAX_WALKS), "each is wanted once");
        }
        WALKS.lock().unwrap().2 = ids.len();
        CHANGED.notify_all();
        let done = tokio::task::spawn_blocking(|| wait(|walks| walks.2 == 0).1);
        assert_eq!(done.await.unwrap(), MAX_WALKS);
        while counts.lock().walks > 0 {
            tokio::task::yield_now().await;
        }
        assert!(ids.iter().all(|id| counts.get(id).is_some_and(|(usage, _)| usage.bytes == 7)));
    }
}
