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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt};

    use super::*;
    use crate::provisioner::config::Limits;
    use crate::provisioner::unpack::{Expected, Form, file_source, unpack};

    /// Entry type, name, data or link target, mode.
    type Member<'a> = (::tar::EntryType, &'a str, &'a str, u32);

    fn archive(members: &[Member<'_>]) -> Vec<u8> {
        let mut builder = ::tar::Builder::new(Vec::new());
        for (kind, name, text, mode) in members {
            let mut header = ::tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(*mode);
            header.set_mtime(1_600_000_000);
            header.set_uid(7);
            header.set_gid(8);
            header.set_size(0);
            if matches!(kind, ::tar::EntryType::Symlink | ::tar::EntryType::Link) {
                builder.append_link(&mut header, name, text).unwrap();
            } else {
                header.set_size(text.len() as u64);
                builder.append_data(&mut header, name, text.as_bytes()).unwrap();
            }
        }
        builder.into_inner().unwrap()
    }

    fn unpacked(dir: &Path, members: &[Member<'_>]) -> String {
        let root = dir.join("fs");
        std::fs::create_dir(&root).unwrap();
        let tar = archive(members);
        let done = unpack(file_source(tar.as_slice()), &root, Form::Directory, &Expected::default(), Limits::default()).unwrap();
        let taken = done.tree.content.unwrap();
        assert_eq!(taken, of(&root, true).unwrap(), "{members:?}");
        taken
    }

    #[test]
    fn what_is_taken_on_the_way_is_what_is_found_later() {
        use ::tar::EntryType::{Directory, Fifo, Link, Regular, Symlink};
        let plain: &[Member<'_>] = &[(Directory, "usr/", "", 0o755), (Regular, "usr/a", "alpha", 0o644), (Symlink, "l", "usr/a", 0o777)];
        let cases: &[&[Member<'_>]] = &[
            plain,
            // Special modes, pipes, nothing at all.
            &[(Regular, "su", "x", 0o4755), (Fifo, "pipe", "", 0o1600), (Regular, "empty", "", 0o600)],
            &[],
            // Directories that are only implied; whiteouts and opaque directories.
            &[(Regular, "a/b/c", "x", 0o644), (Regular, "a/.wh.gone", "", 0o644), (Regular, "a/b/.wh..wh..opq", "", 0o644)],
            // Further names, of files and of links.
            &[(Regular, "f", "data", 0o644), (Link, "g", "f", 0o644), (Symlink, "s", "f", 0o777), (Link, "t", "s", 0o777)],
            // Through links planted by the layer itself, and by names with dots.
            &[(Directory, "usr/lib/", "", 0o755), (Symlink, "lib", "usr/lib", 0o777), (Regular, "lib/x", "x", 0o644), (Regular, "./lib//y", "y", 0o644)],
            // Replaced: a file by a file, by a directory, a whiteout by a file, a directory by a link.
            &[(Regular, "f", "one", 0o644), (Regular, "f", "two", 0o600), (Regular, "d", "x", 0o644), (Directory, "d/", "", 0o700)],
            &[
                (Regular, ".wh.w", "", 0o644),
                (Regular, "w", "x", 0o644),
                (Directory, "e/", "", 0o755),
                (Regular, "e/x", "x", 0o644),
                (Symlink, "e", "d", 0o777),
            ],
        ];
        let mut seen = std::collections::HashSet::new();
        for members in cases {
            let dir = tempfile::tempdir().unwrap();
            assert!(seen.insert(unpacked(dir.path(), members)), "{members:?}");
        }
        // The order of entries does not matter.
        let dir = tempfile::tempdir().unwrap();
        let reversed: Vec<Member<'_>> = plain.iter().rev().copied().collect();
        assert!(seen.contains(&unpacked(dir.path(), &reversed)));
    }

    #[test]
    fn every_kind_of_damage_shows() {
        use ::tar::EntryType::{Directory, Regular, Symlink};
        let dir = tempfile::tempdir().unwrap();
        let members = [(Directory, "d/", "", 0o755), (Regular, "d/f", "content", 0o644), (Symlink, "l", "d", 0o777)];
        let whole = unpacked(dir.path(), &members);
        let root = dir.path().join("fs");
        let file = root.join("d/f");
        let mtime = std::fs::metadata(&file).unwrap().modified().unwrap();
        let restore = || std::fs::File::options().write(true).open(&file).unwrap().set_modified(mtime).unwrap();
        let check = |what: &str, differs: bool| assert_eq!(of(&root, false).unwrap() != whole, differs, "{what}");
        std::fs::write(&file, "Content").unwrap();
        restore();
        assert_eq!(std::fs::metadata(&file).unwrap().mtime(), 1_600_000_000);
        check("a flipped bit", true);
        std::fs::write(&file, "content").unwrap();
        check("another time", true);
        restore();
        check("all as it was", false);
        std::fs::set_permissions(root.join("d"), PermissionsExt::from_mode(0o700)).unwrap();
        check("another mode", true);
        std::fs::set_permissions(root.join("d"), PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::write(root.join("d/new"), "").unwrap();
        check("a further file", true);
        std::fs::remove_file(root.join("d/new")).unwrap();
        check("gone again", false);
        std::fs::rename(&file, root.join("d/g")).unwrap();
        check("another name", true);
        std::fs::rename(root.join("d/g"), &file).unwrap();
        std::fs::remove_file(root.join("l")).unwrap();
        check("a link less", true);
    }

    #[test]
    fn holes_count_as_zeros() {
        let mut whole = FileSum::default();
        whole.piece(0, &[0; 70_000]);
        whole.piece(70_000, b"x");
        let mut sparse = FileSum::default();
        sparse.piece(70_000, b"x");
        let (whole, sparse) = (whole.finish(100_000), sparse.finish(100_000));
        assert_eq!(whole, sparse);
        assert_ne!(whole, FileSum::default().finish(100_000));
    }
}
