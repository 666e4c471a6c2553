//! Reading and writing the files of a group. Every error names file and value.

use std::io;
use std::path::{Path, PathBuf};

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
}

impl Group {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A group below.
    pub(super) fn child(&self, name: &str) -> Self {
        Self { dir: self.dir.join(name) }
    }

    /// Writes `value` in one system call, as the kernel wants it.
    pub(super) fn try_write(&self, file: &str, value: &str) -> io::Result<()> {
        let fd = rustix::fs::open(self.dir.join(file), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::retry_on_intr(|| rustix::io::write(&fd, value.as_bytes()))?;
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
        let shown: String = value.trim_end().chars().take(SHOWN_VALUE).collect();
        Error::io(format!("write {shown} to {}", self.dir.join(file).display()), e)
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
