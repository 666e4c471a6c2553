//! A layer of the store as a tar archive again. What is written depends on the files alone: the same layer gives the same bytes
//! each time and in either form in which layers are kept, and an archive that was written here and unpacked again is written the
//! same once more.
//!
//! It is not the archive that was fetched: the order of entries, the dialect and the padding of that are not kept, so the digest
//! is another one. Entries are sorted; what the fields of a plain header cannot hold (long names, large numbers, parts of seconds,
//! extended attributes) stands in PAX records.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::unpack::content::opacity;
use crate::provisioner::unpack::sink::show;
use crate::provisioner::unpack::tree::is_whiteout;

/// Bytes copied at a time; no less than an extended attribute, or the names of all, can have (64 KiB each).
const BUFFER: usize = 128 << 10;
/// Size of a tar block.
const BLOCK: u64 = 512;
/// Largest number in an eight byte octal field.
const MAX_OWNER: u32 = 0o7_777_777;
/// The same of a twelve byte field.
const MAX_LARGE: u64 = 0o77_777_777_777;
/// Extended attributes of overlay itself: whiteouts and opaque directories say the same.
const OWN: &[u8] = b"trusted.overlay.";

/// Writes the layer whose files are at `files` to `out`; `implied` are the directories that its archive did not list. Blocks.
///
/// # Errors
/// I/O failures of either side.
pub fn write(files: &Path, implied: &[String], out: &mut impl Write) -> Result<()> {
    let root = crate::disk::layer::root(files).act("open layer", files.display())?;
    let implied = implied.iter().map(String::as_bytes).collect();
    let mut writer = Writer { root, implied, links: HashMap::new(), buffer: vec![0; BUFFER], out };
    let mut pending = vec![Vec::new()];
    while let Some(dir) = pending.pop() {
        // The deepest first, in order: what is pushed last is taken next.
        let mut below = writer.directory(&dir).map_err(|e| e.within(format!("archive layer directory /{}", show(&dir))))?;
        below.reverse();
        pending.extend(below);
    }
    // Two empty blocks are the end.
    writer.put(&[0; 2 * BLOCK as usize])
}

struct Writer<'a, W> {
    root: OwnedFd,
    implied: HashSet<&'a [u8]>,
    /// First name of each file that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
    out: &'a mut W,
}

/// What stands in the header of an entry.
struct Head<'a> {
    path: &'a [u8],
    kind: tar::EntryType,
    stat: &'a Stat,
    size: u64,
    link: &'a [u8],
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<W: Write> Writer<'_, W> {
    /// Writes a directory and what is in it but for directories, whose paths are returned in order.
    fn directory(&mut self, dir: &[u8]) -> Result<Vec<Vec<u8>>> {
        let name = if dir.is_empty() { b".".as_slice() } else { dir };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(&self.root, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS);
        let fd = opened.act("open", show(name))?;
        let stat = rustix::fs::fstat(&fd).act("stat", show(name))?;
        let xattrs = xattrs(fd.as_fd(), &mut self.buffer).act("read extended attributes of", show(name))?;
        // A root that nobody described and a directory that the archive only implied say nothing about themselves.
        let plain_root = dir.is_empty() && (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) == (0o755, 0, 0) && xattrs.is_empty();
        if !plain_root && !self.implied.contains(dir) {
            let path = if dir.is_empty() { b"./".to_vec() } else { [dir, b"/"].concat() };
            self.head(&Head { path: &path, kind: tar::EntryType::Directory, stat: &stat, size: 0, link: b"", xattrs })?;
        }
        if !opacity(fd.as_fd()).is_empty() {
            self.mark(&join(dir, b".wh..wh..opq"))?;
        }
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd).act("list", show(name))? {
            let entry = entry.act("list", show(name))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_bytes().to_vec());
            }
        }
        names.sort_unstable();
        let mut below = Vec::new();
        for name in names {
            let path = join(dir, &name);
            let stat = rustix::fs::statat(&fd, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW).act("stat", show(&path))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                below.push(path);
            } else {
                self.entry(fd.as_fd(), &name, &path, dir, &stat)?;
            }
        }
        Ok(below)
    }

    fn entry(&mut self, at: BorrowedFd<'_>, name: &[u8], path: &[u8], dir: &[u8], stat: &Stat) -> Result<()> {
        if is_whiteout(stat) {
            return self.mark(&join(dir, &[b".wh.", name].concat()));
        }
        if stat.st_nlink > 1 {
            let key = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&key).cloned() {
                return self.head(&Head { path, kind: tar::EntryType::Link, stat, size: 0, link: &first, xattrs: Vec::new() });
            }
            self.links.insert(key, path.to_vec());
        }
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => return self.file(at, name, path, stat),
            FileType::Symlink => tar::EntryType::Symlink,
            FileType::CharacterDevice => tar::EntryType::Char,
            FileType::BlockDevice => tar::EntryType::Block,
            FileType::Fifo => tar::EntryType::Fifo,
            _ => return Err(Error::new(Kind::DataLoss, format!("{}: no kind of file that a layer has", show(path)))),
        };
        let link = match kind {
            tar::EntryType::Symlink => rustix::fs::readlinkat(at, name, Vec::new()).act("read link", show(path))?.into_bytes(),
            _ => Vec::new(),
        };
        let fd = rustix::fs::openat(at, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).act("open", show(path))?;
        let xattrs = xattrs(fd.as_fd(), &mut self.buffer).act("read extended attributes of", show(path))?;
        self.head(&Head { path, kind, stat, size: 0, link: &link, xattrs })
    }

    fn file(&mut self, at: BorrowedFd<'_>, name: &[u8], path: &[u8], stat: &Stat) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(at, name, flags, Mode::empty()).act("open", show(path))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let xattrs = xattrs(fd.as_fd(), &mut self.buffer).act("read extended attributes of", show(path))?;
        self.head(&Head { path, kind: tar::EntryType::Regular, stat, size, link: b"", xattrs })?;
        let mut file = std::fs::File::from(fd);
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(BUFFER);
            let n = match file.read(&mut self.buffer[..most]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other.act("read", show(path))?,
            };
            if n == 0 {
                return Err(Error::new(Kind::DataLoss, format!("read {}: shorter than its size", show(path))));
            }
            self.out.write_all(&self.buffer[..n]).act("write", "layer archive")?;
            left -= n as u64;
        }
        self.pad(size)
    }

    /// An empty file that hides what lower layers have.
    fn mark(&mut self, path: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        let mut records = Vec::new();
        set_name(&mut header, path, &mut records);
        self.finish(header, path, &records)
    }

    fn head(&mut self, head: &Head<'_>) -> Result<()> {
        let stat = head.stat;
        let mut header = tar::Header::new_ustar();
        let mut records = Vec::new();
        header.set_entry_type(head.kind);
        header.set_mode(stat.st_mode & 0o7777);
        for (key, id) in [("uid", stat.st_uid), ("gid", stat.st_gid)] {
            if id > MAX_OWNER {
                record(&mut records, key.as_bytes(), id.to_string().as_bytes());
            }
        }
        header.set_uid(u64::from(stat.st_uid.min(MAX_OWNER)));
        header.set_gid(u64::from(stat.st_gid.min(MAX_OWNER)));
        let seconds = u64::try_from(stat.st_mtime).ok().filter(|s| *s <= MAX_LARGE);
        if seconds.is_none() || stat.st_mtime_nsec != 0 {
            record(&mut records, b"mtime", time(stat.st_mtime, stat.st_mtime_nsec as u32).as_bytes());
        }
        header.set_mtime(seconds.unwrap_or(0));
        if head.size > MAX_LARGE {
            record(&mut records, b"size", head.size.to_string().as_bytes());
        }
        header.set_size(head.size.min(MAX_LARGE));
        if matches!(head.kind, tar::EntryType::Char | tar::EntryType::Block) {
            let numbers = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            let set = header.set_device_major(numbers.0).and_then(|()| header.set_device_minor(numbers.1));
            set.act("archive device", show(head.path))?;
        }
        if !head.link.is_empty() {
            // Octets as they are; what does not fit goes into a record.
            let field = header.as_ustar_mut().map(|h| &mut h.linkname);
            match field {
                Some(field) if head.link.len() <= field.len() => field[..head.link.len()].copy_from_slice(head.link),
                _ => record(&mut records, b"linkpath", head.link),
            }
        }
        for (name, value) in &head.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        set_name(&mut header, head.path, &mut records);
        self.finish(header, head.path, &records)
    }

    /// Writes the records, if there are any, and the header.
    fn finish(&mut self, mut header: tar::Header, path: &[u8], records: &[u8]) -> Result<()> {
        if !records.is_empty() {
            let mut extended = tar::Header::new_ustar();
            extended.set_entry_type(tar::EntryType::XHeader);
            extended.set_mode(0o644);
            extended.set_uid(0);
            extended.set_gid(0);
            extended.set_mtime(0);
            extended.set_size(records.len() as u64);
            let base = path.strip_suffix(b"/").unwrap_or(path).rsplit(|b| *b == b'/').next().unwrap_or_default();
            set_name(&mut extended, &[b"PaxHeaders/", base].concat(), &mut Vec::new());
            extended.set_cksum();
            self.put(extended.as_bytes())?;
            self.put(records)?;
            self.pad(records.len() as u64)?;
        }
        header.set_cksum();
        self.put(header.as_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).act("write", "layer archive")
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let rest = usize::try_from(size.next_multiple_of(BLOCK) - size).unwrap_or(0);
        self.put(&[0; BLOCK as usize][..rest])
    }
}

/// The name as it is where it fits, cut off with a record where it does not.
fn set_name(header: &mut tar::Header, path: &[u8], records: &mut Vec<u8>) {
    let field = &mut header.as_old_mut().name;
    let n = path.len().min(field.len());
    field[..n].copy_from_slice(&path[..n]);
    if path.len() > n {
        record(records, b"path", path);
    }
}

/// `LENGTH KEY=VALUE\n`, the length counting itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    if rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    for part in [b" ".as_slice(), key, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// Seconds with a fraction; before 1970 the fraction counts towards zero.
fn time(seconds: i64, nanos: u32) -> String {
    let (sign, whole, nanos) = match (seconds, nanos) {
        (s, 0) if s < 0 => ("-", s.unsigned_abs(), 0),
        (s, n) if s < 0 => ("-", s.unsigned_abs() - 1, 1_000_000_000 - n),
        (s, n) => ("", s.unsigned_abs(), n),
    };
    let fraction = format!("{nanos:09}");
    match fraction.trim_end_matches('0') {
        "" => format!("{sign}{whole}"),
        fraction => format!("{sign}{whole}.{fraction}"),
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

/// Extended attributes, sorted, without overlay's. By the descriptor's name in procfs: links and devices cannot be opened for reading.
fn xattrs(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let n = match rustix::fs::listxattr(path.as_str(), &mut *buffer) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    let names = buffer.get(..n).unwrap_or_default().to_vec();
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty() && !n.starts_with(OWN)) {
        let n = rustix::fs::getxattr(path.as_str(), name, &mut *buffer)?;
        found.push((name.to_vec(), buffer.get(..n).unwrap_or_default().to_vec()));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_themselves() {
        for (value, expected) in [(1, "9 k=1\n".len()), (90, 96), (92, 99), (93, 101), (990, 998), (991, 999)] {
            let mut records = Vec::new();
            record(&mut records, b"k", &vec![b'x'; value]);
            let text = String::from_utf8(records.clone()).unwrap();
            let said: usize = text.split(' ').next().unwrap().parse().unwrap();
            assert_eq!(said, records.len(), "{value} {expected}");
        }
    }

    #[test]
    fn times_before_and_after_1970() {
        for (seconds, nanos, text) in
            [(0, 0, "0"), (5, 500_000_000, "5.5"), (-1, 0, "-1"), (-1, 500_000_000, "-0.5"), (-3, 1, "-2.999999999"), (7, 1, "7.000000001")]
        {
            assert_eq!(time(seconds, nanos), text);
        }
    }
}
