//! Reading an image's files without mounting it: several host directories seen as the one tree that overlay would show.
//!
//! Nothing in an image may lead out of it: each step opens one name below an open directory without following links; links
//! are resolved here, against the root of the tree, with a bound on their number.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::model::error::{Act, Error, Kind, Result};

/// Links followed in one lookup, as in the kernel (`path_resolution(7)`).
const MAX_LINKS: usize = 40;
/// Marks a directory that hides what lower layers have in it (overlayfs documentation).
const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];

/// A directory of the merged tree: its parts, topmost first.
pub struct Dir {
    parts: Vec<OwnedFd>,
}

/// One name in a [`Dir`].
pub enum Found {
    /// A directory, merged.
    Dir(Dir),
    /// Anything else, with the part of the directory that has it.
    Other {
        /// Index of that part.
        part: usize,
        /// What it is.
        stat: Stat,
    },
}

impl Dir {
    /// The root of the tree made of `layers`, topmost first.
    ///
    /// # Errors
    /// When a layer cannot be opened.
    pub fn root(layers: &[PathBuf]) -> Result<Self> {
        let open = |path: &PathBuf| crate::disk::layer::root(path).act("open layer", path.display());
        Ok(Self { parts: layers.iter().map(open).collect::<Result<_>>()? })
    }

    /// Looks one name up, without following it.
    ///
    /// # Errors
    /// I/O failures; an absent name is `None`.
    pub fn find(&self, name: &OsStr) -> Result<Option<Found>> {
        let mut parts = Vec::new();
        for (part, dir) in self.parts.iter().enumerate() {
            let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(e).act("look up", name.display()),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let fd = rustix::fs::openat(dir, name, DIRECTORY, Mode::empty()).act("open directory", name.display())?;
                    let opaque = is_opaque(&fd);
                    parts.push(fd);
                    if opaque {
                        break;
                    }
                }
                // A whiteout hides the name below; so does a file under a directory.
                FileType::CharacterDevice if stat.st_rdev == 0 => break,
                _ if parts.is_empty() => return Ok(Some(Found::Other { part, stat })),
                _ => break,
            }
        }
        Ok((!parts.is_empty()).then_some(Found::Dir(Self { parts })))
    }

    /// Target of the link `name` in part `part`.
    ///
    /// # Errors
    /// I/O failures.
    pub fn link(&self, part: usize, name: &OsStr) -> Result<PathBuf> {
        let target = rustix::fs::readlinkat(self.part(part)?, name, Vec::new()).act("read link", name.display())?;
        Ok(PathBuf::from(OsStr::from_bytes(target.to_bytes())))
    }

    /// Opens the regular file `name` in part `part` for reading. Anything else, such as a FIFO put there since, is an error.
    ///
    /// # Errors
    /// I/O failures.
    pub fn open(&self, part: usize, name: &OsStr) -> Result<std::fs::File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.part(part)?, name, flags, Mode::empty()).act("open", name.display())?;
        let stat = rustix::fs::fstat(&fd).act("stat", name.display())?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::invalid(format!("open {}: not a regular file", name.display())));
        }
        Ok(fd.into())
    }

    /// The part that gives a directory its owner and mode: the topmost.
    ///
    /// # Errors
    /// Never for a directory that was found.
    pub fn top(&self) -> Result<&OwnedFd> {
        self.part(0)
    }

    /// Part by index.
    ///
    /// # Errors
    /// When there is none.
    pub fn part(&self, part: usize) -> Result<&OwnedFd> {
        self.parts.get(part).ok_or_else(|| Error::internal("look up: no such part of a directory"))
    }

    /// Names in it, each once, whiteouts of it included (they resolve to nothing).
    ///
    /// # Errors
    /// I/O failures.
    pub fn names(&self) -> Result<std::collections::BTreeSet<OsString>> {
        let mut names = std::collections::BTreeSet::new();
        for part in &self.parts {
            let readable = rustix::fs::openat(part, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open", "directory")?;
            for entry in rustix::fs::Dir::new(readable).act("read", "directory")? {
                let entry = entry.act("read", "directory")?;
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                if name != "." && name != ".." {
                    names.insert(name.to_owned());
                }
            }
        }
        Ok(names)
    }

    fn reopen(&self) -> Result<Self> {
        let dup = |fd: &OwnedFd| fd.as_fd().try_clone_to_owned().act("duplicate", "directory");
        Ok(Self { parts: self.parts.iter().map(dup).collect::<Result<_>>()? })
    }
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn is_opaque(dir: &OwnedFd) -> bool {
    // O_PATH descriptors have no attributes of their own; their names in /proc do.
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
    let mut value = [0u8; 2];
    OPAQUE.iter().any(|name| matches!(rustix::fs::getxattr(path.as_str(), *name, &mut value), Ok(1) if value[0] == b'y'))
}

/// What a path leads to, links followed.
pub enum Target {
    /// A directory.
    Dir(Dir),
    /// Something else in `dir`.
    Other {
        /// Where it is.
        dir: Dir,
        /// Index of the part of `dir` that has it.
        part: usize,
        /// Its name there.
        name: OsString,
        /// What it is.
        stat: Stat,
    },
}

/// Follows `path` from the root of the tree. Links, absolute ones too, stay inside; `..` above the root is the root.
///
/// # Errors
/// `InvalidArgument` when there are too many links; I/O failures. What does not exist is `None`.
pub fn resolve(layers: &[PathBuf], path: &Path) -> Result<Option<Target>> {
    let mut stack = vec![Dir::root(layers)?];
    let mut todo: Vec<OsString> = components(path);
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == ".." {
            if stack.len() > 1 {
                stack.pop();
            }
            continue;
        }
        let Some(here) = stack.last() else { return Ok(None) };
        match here.find(&name)? {
            None => return Ok(None),
            Some(Found::Dir(dir)) => stack.push(dir),
            Some(Found::Other { part, stat }) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Error::invalid(format!("look up {} in the image: too many links", path.display())));
                }
                let target = here.link(part, &name)?;
                if target.is_absolute() {
                    stack.truncate(1);
                }
                todo.extend(components(&target));
            }
            Some(Found::Other { part, stat }) => {
                let Some(dir) = stack.pop().filter(|_| todo.is_empty()) else { return Ok(None) };
                return Ok(Some(Target::Other { dir, part, name, stat }));
            }
        }
    }
    stack.last().map(|dir| dir.reopen().map(Target::Dir)).transpose()
}

/// Reads a regular file of at most `limit` bytes. Absent: `None`.
///
/// # Errors
/// `InvalidArgument` when it is no regular file, `ResourceExhausted` when it is larger.
pub fn read(layers: &[PathBuf], path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let what = || format!("read {} of the image", path.display());
    let (dir, part, name) = match resolve(layers, path).map_err(|e| e.within(what()))? {
        None => return Ok(None),
        Some(Target::Dir(_)) => return Err(Error::invalid(format!("{}: a directory", what()))),
        // Looked at before it is opened: opening a device can act on the host.
        Some(Target::Other { stat, .. }) if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile => {
            return Err(Error::invalid(format!("{}: not a regular file", what())));
        }
        Some(Target::Other { dir, part, name, .. }) => (dir, part, name),
    };
    let file = dir.open(part, &name).map_err(|e| e.within(what()))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).act("read", path.display())?;
    if bytes.len() as u64 > limit {
        return Err(Error::new(Kind::ResourceExhausted, format!("{}: more than {limit} bytes", what())));
    }
    Ok(Some(bytes))
}

/// Names of `path`, last first, so that the next one is popped off the end.
fn components(path: &Path) -> Vec<OsString> {
    let name = |c: Component<'_>| match c {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    };
    path.components().rev().filter_map(name).collect()
}
