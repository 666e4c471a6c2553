//! What a kept layer comes to: a digest of its files that can be taken again later, to find what has rotted. The diff id
//! cannot serve: it covers the archive, which is not kept.
//!
//! Every name in the tree gives a number: the first 16 bytes of a SHA-256 over its path, type, mode, owner, size, time (not of
//! directories), link target, capabilities or opacity, and the CRC-32 of its data. The sum of all numbers is the digest, so the
//! order does not matter and unpacking takes it on the way, at the price of a CRC and one small hash per name. This finds
//! accidents, not forgers: who can write into the store can write its records.

use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use flate2::Crc;
use rustix::fs::{Advice, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::sink::show;
use super::tree::{OPAQUE, is_whiteout};
use crate::model::error::{Act, Result};

/// Extended attribute with the capabilities of a program; the only one that is looked at: without it the program fails.
pub const CAPABILITY: &[u8] = b"security.capability";
/// Digests of trees begin with this, those of single files with the other.
const TREE: &str = "tree1:";
const FILE: &str = "file1:";
/// Bytes read at a time.
const BUFFER: usize = 128 << 10;
/// Zeros fed for holes at a time.
static ZEROS: [u8; 16 << 10] = [0; 16 << 10];

/// The sum so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u128);

impl Sum {
    /// Adds one name. `data` is the CRC of a file or the target of a link, `more` capabilities or opacity.
    pub fn add(&mut self, path: &[u8], stat: &Stat, data: &[u8], more: &[u8]) {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut hash = Sha256::new();
        let mut put = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        put(path);
        if is_whiteout(stat) {
            put(b"whiteout");
        } else {
            let mut fixed = Vec::with_capacity(64);
            for number in [stat.st_mode, stat.st_uid, stat.st_gid] {
                fixed.extend_from_slice(&number.to_le_bytes());
            }
            if matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) {
                fixed.extend_from_slice(&stat.st_rdev.to_le_bytes());
            }
            if kind == FileType::RegularFile {
                fixed.extend_from_slice(&stat.st_size.to_le_bytes());
            }
            if kind != FileType::Directory {
                fixed.extend_from_slice(&stat.st_mtime.to_le_bytes());
                fixed.extend_from_slice(&stat.st_mtime_nsec.to_le_bytes());
            }
            put(&fixed);
            put(data);
            put(more);
        }
        let digest = hash.finalize();
        let mut first = [0; 16];
        first.copy_from_slice(&digest[..16]);
        self.0 = self.0.wrapping_add(u128::from_le_bytes(first));
    }

    /// As recorded.
    pub fn text(self) -> String {
        format!("{TREE}{:032x}", self.0)
    }
}

/// The CRC of a file that comes in pieces, holes left out.
#[derive(Default)]
pub struct FileSum {
    crc: Crc,
    at: u64,
}

impl FileSum {
    /// The next piece; offsets ascend.
    pub fn piece(&mut self, offset: u64, bytes: &[u8]) {
        self.zeros(offset);
        self.crc.update(bytes);
        self.at = offset + bytes.len() as u64;
    }

    /// The CRC of a file of this size.
    pub fn finish(mut self, size: u64) -> u32 {
        self.zeros(size);
        self.crc.sum()
    }

    fn zeros(&mut self, until: u64) {
        while self.at < until {
            let n = usize::try_from(until - self.at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.crc.update(&ZEROS[..n]);
            self.at += n as u64;
        }
    }
}

/// Takes the digest of what is at `path`: a layer's directory, or the one file it is kept in. `from_disk` drops what the page cache has of
/// each file, where no one else needs it, so that the disk is asked. Blocks.
///
/// # Errors
/// I/O failures: what cannot be read is damaged.
pub fn of(path: &Path, from_disk: bool) -> Result<String> {
    let mut reader = Reader { buffer: vec![0; BUFFER], from_disk };
    match rustix::fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).act("open", path.display())? {
        fd if rustix::fs::fstat(&fd).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory) => of_tree(fd.as_fd(), &mut reader),
        fd => {
            let size = rustix::fs::fstat(&fd).act("stat", path.display())?.st_size;
            let crc = reader.crc(fd.as_fd()).act("read", path.display())?;
            Ok(format!("{FILE}{crc:08x}-{size}"))
        }
    }
}

/// The digest of the tree below a directory, from the page cache.
///
/// # Errors
/// I/O failures.
pub fn of_dir(root: BorrowedFd<'_>) -> Result<String> {
    of_tree(root, &mut Reader { buffer: vec![0; BUFFER], from_disk: false })
}

/// Every directory is opened by its path from the root, so that depth costs no descriptors.
fn of_tree(root: BorrowedFd<'_>, reader: &mut Reader) -> Result<String> {
    let mut sum = Sum::default();
    let mut pending = vec![Vec::new()];
    while let Some(dir) = pending.pop() {
        of_directory(root, &dir, reader, &mut sum, &mut pending).act("read layer directory", show(&dir))?;
    }
    Ok(sum.text())
}

fn of_directory(root: BorrowedFd<'_>, dir: &[u8], reader: &mut Reader, sum: &mut Sum, pending: &mut Vec<Vec<u8>>) -> rustix::io::Result<()> {
    let name = if dir.is_empty() { b".".as_slice() } else { dir };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat2(root, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?;
    sum.add(dir, &rustix::fs::fstat(&fd)?, b"", opacity(fd.as_fd()));
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let mut path = dir.to_vec();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.to_bytes());
        let stat = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            pending.push(path);
        } else {
            add_name(sum, fd.as_fd(), name.to_bytes(), &path, &stat, reader)?;
        }
    }
    Ok(())
}

/// Adds a name that is no directory, from what is on disk.
fn add_name(sum: &mut Sum, at: BorrowedFd<'_>, name: &[u8], path: &[u8], stat: &Stat, reader: &mut Reader) -> rustix::io::Result<()> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let fd = rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
            let crc = reader.crc(fd.as_fd())?;
            let mut value = [0; 64];
            let n = match rustix::fs::fgetxattr(&fd, CAPABILITY, value.as_mut_slice()) {
                Ok(n) => n,
                Err(Errno::NODATA | Errno::NOTSUP) => 0,
                Err(e) => return Err(e),
            };
            sum.add(path, stat, &crc.to_le_bytes(), &value[..n]);
        }
        FileType::Symlink => sum.add(path, stat, rustix::fs::readlinkat(at, name, Vec::new())?.as_bytes(), b""),
        _ => sum.add(path, stat, b"", b""),
    }
    Ok(())
}

/// Adds a further name of a file that was added before, by reading it again.
///
/// # Errors
/// I/O failures.
pub fn add_again(sum: &mut Sum, at: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> rustix::io::Result<()> {
    let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
    add_name(sum, at, name, path, &stat, &mut Reader { buffer: vec![0; BUFFER], from_disk: false })
}

/// What a directory adds besides its metadata.
pub fn opacity(dir: BorrowedFd<'_>) -> &'static [u8] {
    let mut value = [0u8; 4];
    if matches!(rustix::fs::fgetxattr(dir, OPAQUE, value.as_mut_slice()), Ok(1)) && value[0] == b'y' { b"opaque" } else { b"" }
}

struct Reader {
    buffer: Vec<u8>,
    from_disk: bool,
}

impl Reader {
    fn crc(&mut self, fd: BorrowedFd<'_>) -> rustix::io::Result<u32> {
        if self.from_disk {
            // Advice; a file system without a cache to drop does not mind.
            let _ = rustix::fs::fadvise(fd, 0, None, Advice::DontNeed);
        }
        let mut crc = Crc::new();
        let mut file = std::fs::File::from(rustix::io::dup(fd)?);
        loop {
            match file.read(&mut self.buffer) {
                Ok(0) => return Ok(crc.sum()),
                Ok(n) => crc.update(&self.buffer[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
            }
        }
    }
}
