//! Reading and writing the files of a group. Every error names file and value.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::model::error::{Error, Result};

/// More than any file read here has; a file beyond it is cut (lists of processes are read by [`Reader::whole`]).
const MAX_FILE: usize = 1 << 20;
/// Values in error messages are cut here.
const SHOWN_VALUE: usize = 80;

/// One group on one hierarchy: a directory.
#[derive(Clone, Debug)]
pub struct Group {
    dir: PathBuf,
    journal: Option<Journal>,
}

/// What files held before they were written, so that a change of many files can be taken back as a whole.
#[derive(Clone, Debug, Default)]
pub struct Journal(Arc<Mutex<Vec<(PathBuf, String)>>>);

impl Journal {
    /// Writes the former values back, the last change first: the order that was safe forwards is safe backwards. Goes on past
    /// failures.
    ///
    /// # Errors
    /// The first file that did not take its former value.
    pub(super) fn roll_back(&self) -> Result<()> {
        let mut first = None;
        let changes = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for (path, text) in changes.into_iter().rev() {
            // One entry a write, as the kernel wants it; an empty list is a bare newline, for nothing is no write at all.
            let entries = if text.trim().is_empty() { vec!["\n"] } else { text.lines().collect() };
            for entry in entries {
                if let Err(e) = write_path(&path, entry) {
                    first.get_or_insert_with(|| refused(&path, entry, e));
                }
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// What `path` holds now; `None` for what cannot be read, and so not be put back either.
    fn look(path: &Path) -> Option<String> {
        std::fs::read_to_string(path).ok()
    }

    fn note(&self, path: PathBuf, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((path, text));
    }
}

fn write_path(path: &Path, value: &str) -> io::Result<()> {
    let fd = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::retry_on_intr(|| rustix::io::write(&fd, value.as_bytes()))?;
    Ok(())
}

fn refused(path: &Path, value: &str, e: io::Error) -> Error {
    let shown: String = value.trim_end().chars().take(SHOWN_VALUE).collect();
    Error::io(format!("write {shown} to {}", path.display()), e)
}

impl Group {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, journal: None }
    }

    /// The same group; from now on every write is noted in `journal`.
    pub(super) fn noting(self, journal: Option<&Journal>) -> Self {
        Self { journal: journal.cloned(), ..self }
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A group below.
    pub(super) fn child(&self, name: &str) -> Self {
        Self { dir: self.dir.join(name), journal: self.journal.clone() }
    }

    /// Writes `value` in one system call, as the kernel wants it.
    pub(super) fn try_write(&self, file: &str, value: &str) -> io::Result<()> {
        let path = self.dir.join(file);
        let before = self.journal.as_ref().and_then(|journal| Some((journal, Journal::look(&path)?)));
        write_path(&path, value)?;
        if let Some((journal, text)) = before {
            journal.note(path, text);
        }
        Ok(())
    }

    /// As [`Group::try_write`], with the error the user sees: `write 5 to /sys/fs/cgroup/memory/x/memory.limit_in_bytes: …`.
    pub(super) fn write(&self, file: &str, value: &str) -> Result<()> {
        self.try_write(file, value).map_err(|e| self.refused(file, value, e))
    }

    /// Writes unless the file does not exist (a feature this kernel lacks). Says whether it was there.
    pub(super) fn write_if_there(&self, file: &str, value: &str) -> Result<bool> {
        match self.try_write(file, value) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(self.refused(file, value, e)),
        }
    }

    /// The error for a value that the kernel did not take.
    pub(super) fn refused(&self, file: &str, value: &str, e: io::Error) -> Error {
        refused(&self.dir.join(file), value, e)
    }
}

/// Reads small files into one buffer that is used again and again.
#[derive(Debug, Default)]
pub struct Reader {
    buf: Vec<u8>,
}

impl Reader {
    /// The text of `file`; `Ok(None)` when it, or the group, does not exist (any more).
    pub(super) fn read<'a>(&'a mut self, group: &Group, file: &str) -> io::Result<Option<&'a str>> {
        let fd = match rustix::fs::open(group.dir.join(file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if self.buf.len() < 4096 {
            self.buf.resize(4096, 0);
        }
        let mut done = 0;
        loop {
            if done == self.buf.len() {
                if done >= MAX_FILE {
                    break;
                }
                self.buf.resize(done * 2, 0);
            }
            match rustix::io::read(&fd, &mut self.buf[done..]) {
                Ok(0) => break,
                Ok(n) => {
                    done += n;
                    // These files are made whole at the first read: a short read is the end, and saves a system call.
                    if done < self.buf.len() && done < 4000 {
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                // ENODEV: the group was removed while it was read.
                Err(Errno::NODEV) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Some(std::str::from_utf8(&self.buf[..done]).unwrap_or("")))
    }

    /// A single number; `None` when the file is missing or does not hold one (`max`).
    pub(super) fn number(&mut self, group: &Group, file: &str) -> Option<u64> {
        self.read(group, file).ok().flatten()?.trim().parse().ok()
    }

    /// The value of `key` in a file of `key value` lines.
    pub(super) fn keyed(&mut self, group: &Group, file: &str, key: &str) -> Option<u64> {
        let text = self.read(group, file).ok().flatten()?;
        keys(text).find(|(k, _)| *k == key).map(|(_, v)| v)
    }

    /// Like [`Reader::read`], with an error that names the file, for callers that cannot do without it.
    pub(super) fn must<'a>(&'a mut self, group: &Group, file: &str) -> Result<&'a str> {
        let path = || format!("read {}", group.dir.join(file).display());
        match self.read(group, file) {
            Ok(Some(text)) => Ok(text),
            Ok(None) => Err(Error::io(path(), io::Error::from_raw_os_error(libc::ENOENT))),
            Err(e) => Err(Error::io(path(), e)),
        }
    }
}

/// `key value` lines with a number as value; others are left out.
pub(super) fn keys(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}
