//! Reads tar entries from a stream of decompressed chunks, without copying file data and with a bound on every length.
//!
//! The `tar` crate parses the header blocks. Its own iterator is not used because it reads extended headers of any
//! announced size into memory (attack case 5) and copies file data once more.

use std::io::{BufRead, ErrorKind};

use crate::model::error::{Error, Kind, Result};

/// Size of a tar block.
const BLOCK: usize = 512;
/// Longest extended header (PAX records, GNU long names): room for many extended attributes of 64 KiB, the kernel's bound.
const MAX_EXTENDED: u64 = 1 << 20;
/// Longest path or link target: the kernel's `PATH_MAX`.
pub const MAX_PATH: usize = 4096;
/// Most fragments of a sparse file.
const MAX_FRAGMENTS: usize = 65_536;

/// What kind of file an entry makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Hard link to an earlier entry.
    Hardlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
}

/// One entry, before its data.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name as written.
    pub path: Vec<u8>,
    /// Link target as written.
    pub link: Vec<u8>,
    /// Kind.
    pub what: What,
    /// Permission bits with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds, nanoseconds.
    pub mtime: (i64, u32),
    /// Apparent size.
    pub size: u64,
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Offset and length of each piece of data, for sparse files.
    pub sparse: Option<Vec<(u64, u64)>>,
}

/// What extended headers said about the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_version_1: bool,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse: Vec<(u64, u64)>,
    has_sparse: bool,
    sparse_offset: Option<u64>,
}

/// Iterates over the entries of an archive.
pub struct Reader<R> {
    input: R,
    /// Data bytes of the current entry that have not been read.
    left: u64,
    /// Padding after them.
    padding: u64,
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::DataLoss, format!("read layer archive: {why}"))
}

impl<R: BufRead> Reader<R> {
    /// Reads from `input`.
    pub fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0 }
    }

    /// The input; after [`Reader::next_entry`] it stands at the entry's data.
    pub fn input(&self) -> &R {
        &self.input
    }

    /// The input, for its digest.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; `None` at the end, when all input has been read (the digest covers what follows the archive too).
    ///
    /// # Errors
    /// `DataLoss` for what is not a tar archive, or beyond the limits; I/O errors of the input.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.skip(self.left + self.padding)?;
        (self.left, self.padding) = (0, 0);
        let mut extended = Extended::default();
        loop {
            let mut block = [0u8; BLOCK];
            if !self.block(&mut block)? || block.iter().all(|b| *b == 0) {
                self.drain()?;
                return Ok(None);
            }
            let header = tar::Header::from_byte_slice(&block);
            verify_checksum(header, &block)?;
            let size = header.entry_size().map_err(bad)?;
            match header.entry_type() {
                tar::EntryType::GNULongName => extended.path = Some(self.long_name(size)?),
                tar::EntryType::GNULongLink => extended.link = Some(self.long_name(size)?),
                tar::EntryType::XHeader => {
                    let records = self.extended(size)?;
                    parse_pax(&records, &mut extended)?;
                }
                // Defaults for all entries; no image tool writes anything but comments there.
                tar::EntryType::XGlobalHeader => self.skip(padded(size)?)?,
                _ => return self.entry(header, size, extended).map(Some),
            }
        }
    }

    /// Passes the data of the current entry to `sink`, piece by piece.
    ///
    /// # Errors
    /// Those of the input and of `sink`.
    pub fn data(&mut self, mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        while self.left > 0 {
            let chunk = fill(&mut self.input)?;
            if chunk.is_empty() {
                return Err(bad("ends inside a file"));
            }
            let n = chunk.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            sink(chunk.get(..n).unwrap_or_default())?;
            self.input.consume(n);
            self.left -= n as u64;
        }
        Ok(())
    }

    fn entry(&mut self, header: &tar::Header, size: u64, extended: Extended) -> Result<Entry> {
        let stored = extended.size.unwrap_or(size);
        let path = extended.sparse_name.or(extended.path).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extended.link.unwrap_or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default());
        if path.len() > MAX_PATH || link.len() > MAX_PATH {
            return Err(bad("name longer than PATH_MAX"));
        }
        let kind = header.entry_type();
        let what = match kind {
            // Archives older than POSIX mark directories by a trailing slash alone.
            tar::EntryType::Regular | tar::EntryType::Continuous if path.ends_with(b"/") => What::Directory,
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => What::File,
            tar::EntryType::Directory => What::Directory,
            tar::EntryType::Symlink => What::Symlink,
            tar::EntryType::Link => What::Hardlink,
            tar::EntryType::Char => What::Char,
            tar::EntryType::Block => What::Block,
            tar::EntryType::Fifo => What::Fifo,
            other => return Err(bad(format!("entry type {:?} of {:?}", char::from(other.as_byte()), String::from_utf8_lossy(&path)))),
        };
        self.padding = padded(stored)? - stored;
        self.left = stored;
        let mut entry = Entry {
            what,
            mode: field(&header.as_old().mode, || header.mode())? & 0o7777,
            uid: owner(extended.uid, || field(&header.as_old().uid, || header.uid()))?,
            gid: owner(extended.gid, || field(&header.as_old().gid, || header.gid()))?,
            mtime: extended.mtime.unwrap_or((header.mtime().ok().and_then(|t| i64::try_from(t).ok()).unwrap_or(0), 0)),
            size: stored,
            device: (header.device_major().ok().flatten().unwrap_or(0), header.device_minor().ok().flatten().unwrap_or(0)),
            xattrs: extended.xattrs,
            sparse: None,
            path,
            link,
        };
        if kind == tar::EntryType::GNUSparse {
            self.gnu_sparse(header, &mut entry)?;
        } else if extended.sparse_version_1 {
            entry.sparse = Some(self.sparse_map_1()?);
            entry.size = extended.sparse_size.ok_or_else(|| bad("sparse file without a size"))?;
        } else if extended.has_sparse {
            entry.sparse = Some(extended.sparse);
            entry.size = extended.sparse_size.ok_or_else(|| bad("sparse file without a size"))?;
        }
        if let Some(map) = &entry.sparse {
            check_sparse(map, entry.size, self.left)?;
        }
        Ok(entry)
    }

    /// Old GNU sparse format: four fragments in the header, twenty-one in each following block.
    fn gnu_sparse(&mut self, header: &tar::Header, entry: &mut Entry) -> Result<()> {
        let gnu = header.as_gnu().ok_or_else(|| bad("sparse entry without a GNU header"))?;
        entry.size = gnu.real_size().map_err(bad)?;
        let mut map = Vec::new();
        let mut add = |fragments: &[tar::GnuSparseHeader]| -> Result<()> {
            for f in fragments.iter().filter(|f| !f.is_empty()) {
                map.push((f.offset().map_err(bad)?, f.length().map_err(bad)?));
            }
            if map.len() > MAX_FRAGMENTS { Err(bad("too many fragments of a sparse file")) } else { Ok(()) }
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut extension = tar::GnuExtSparseHeader::new();
            let mut block = [0u8; BLOCK];
            if !self.block(&mut block)? {
                return Err(bad("ends inside a sparse map"));
            }
            extension.as_mut_bytes().copy_from_slice(&block);
            add(&extension.sparse)?;
            more = extension.is_extended();
        }
        entry.sparse = Some(map);
        Ok(())
    }

    /// PAX sparse format 1.0: the map precedes the data as decimal lines, padded to a block.
    fn sparse_map_1(&mut self) -> Result<Vec<(u64, u64)>> {
        let (mut numbers, mut current, mut wanted) = (Vec::new(), None::<u64>, None::<usize>);
        while wanted.is_none_or(|w| numbers.len() < w) {
            let mut block = [0u8; BLOCK];
            if self.left < BLOCK as u64 || !self.block(&mut block)? {
                return Err(bad("ends inside a sparse map"));
            }
            self.left -= BLOCK as u64;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        let digit = u64::from(byte - b'0');
                        let next = current.unwrap_or(0).checked_mul(10).and_then(|n| n.checked_add(digit));
                        current = Some(next.ok_or_else(|| bad("malformed sparse map"))?);
                    }
                    b'\n' => {
                        let number = current.take().ok_or_else(|| bad("malformed sparse map"))?;
                        if wanted.is_none() {
                            let count = usize::try_from(number).ok().filter(|n| *n <= MAX_FRAGMENTS);
                            wanted = Some(count.ok_or_else(|| bad("too many fragments of a sparse file"))? * 2);
                        } else {
                            numbers.push(number);
                        }
                    }
                    _ => break,
                }
                if wanted == Some(numbers.len()) {
                    break;
                }
            }
        }
        Ok(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut name = self.extended(size)?;
        while name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > MAX_EXTENDED {
            return Err(bad(format!("extended header of {size} bytes")));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        self.left = size;
        self.data_into(&mut bytes)?;
        self.skip(padded(size)? - size)?;
        Ok(bytes)
    }

    fn data_into(&mut self, bytes: &mut Vec<u8>) -> Result<()> {
        self.data(|chunk| {
            bytes.extend_from_slice(chunk);
            Ok(())
        })
    }

    /// Fills one block; `false` at the end of input.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut done = 0;
        while done < BLOCK {
            let chunk = fill(&mut self.input)?;
            if chunk.is_empty() {
                return if done == 0 { Ok(false) } else { Err(bad("ends inside a block")) };
            }
            let n = chunk.len().min(BLOCK - done);
            block[done..done + n].copy_from_slice(&chunk[..n]);
            self.input.consume(n);
            done += n;
        }
        Ok(true)
    }

    fn skip(&mut self, mut n: u64) -> Result<()> {
        while n > 0 {
            let chunk = fill(&mut self.input)?;
            if chunk.is_empty() {
                return Err(bad("ends inside a file"));
            }
            let step = chunk.len().min(usize::try_from(n).unwrap_or(usize::MAX));
            self.input.consume(step);
            n -= step as u64;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        loop {
            let n = fill(&mut self.input)?.len();
            if n == 0 {
                return Ok(());
            }
            self.input.consume(n);
        }
    }
}

fn fill<R: BufRead>(input: &mut R) -> Result<&[u8]> {
    // `fill_buf` in a retry loop does not pass the borrow checker; the inputs here never report an interrupt.
    input.fill_buf().map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::InvalidData | ErrorKind::InvalidInput => Error::with(Kind::DataLoss, "read layer archive", e),
        _ => Error::io("read layer archive", e),
    })
}

fn padded(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| bad("entry of absurd size"))
}

/// A number of the header. Some writers leave fields empty, which everyone reads as 0.
fn field<T: Default>(raw: &[u8], parse: impl FnOnce() -> std::io::Result<T>) -> Result<T> {
    if raw.iter().all(|b| matches!(b, 0 | b' ')) { Ok(T::default()) } else { parse().map_err(bad) }
}

fn owner(extended: Option<u32>, header: impl FnOnce() -> Result<u64>) -> Result<u32> {
    match extended {
        Some(id) => Ok(id),
        None => u32::try_from(header()?).map_err(|_| bad("owner beyond 32 bits")),
    }
}

/// Whether a header is whole.
///
/// # Errors
/// `DataLoss` when its checksum is wrong.
pub fn verify_checksum(header: &tar::Header, block: &[u8; BLOCK]) -> Result<()> {
    let sum: u32 = block.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { u32::from(b' ') } else { u32::from(*b) }).sum();
    if header.cksum().map_err(bad)? == sum { Ok(()) } else { Err(bad("header checksum is wrong")) }
}

fn check_sparse(map: &[(u64, u64)], size: u64, stored: u64) -> Result<()> {
    let (mut end, mut total) = (0u64, 0u64);
    for (offset, length) in map {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= size);
        end = next.ok_or_else(|| bad("malformed sparse map"))?;
        total += length;
    }
    if total == stored { Ok(()) } else { Err(bad("sparse map and stored size disagree")) }
}

/// Records `<length> <key>=<value>\n`; the length counts itself.
fn parse_pax(mut records: &[u8], out: &mut Extended) -> Result<()> {
    let malformed = || bad("malformed PAX record");
    while !records.is_empty() {
        let space = records.iter().take(20).position(|b| *b == b' ').ok_or_else(malformed)?;
        let length: usize = text(&records[..space])?.parse().map_err(|_| malformed())?;
        let record = records.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(malformed)?;
        records = &records[length..];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(malformed)?;
        pax_record(&record[..equals], &record[equals + 1..], out)?;
    }
    Ok(())
}

fn pax_record(key: &[u8], value: &[u8], out: &mut Extended) -> Result<()> {
    match key {
        b"path" => out.path = Some(value.to_vec()),
        b"linkpath" => out.link = Some(value.to_vec()),
        b"size" => out.size = Some(number(value)?),
        b"uid" => out.uid = Some(u32::try_from(number(value)?).map_err(|_| bad("owner beyond 32 bits"))?),
        b"gid" => out.gid = Some(u32::try_from(number(value)?).map_err(|_| bad("owner beyond 32 bits"))?),
        b"mtime" => out.mtime = Some(timestamp(value)?),
        b"GNU.sparse.major" => out.sparse_version_1 = value == b"1",
        b"GNU.sparse.name" => out.sparse_name = Some(value.to_vec()),
        b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
            out.sparse_size = Some(number(value)?);
        }
        b"GNU.sparse.numblocks" => out.has_sparse = true,
        b"GNU.sparse.offset" => out.sparse_offset = Some(number(value)?),
        b"GNU.sparse.numbytes" => out.sparse.push((out.sparse_offset.take().ok_or_else(|| bad("malformed sparse map"))?, number(value)?)),
        b"GNU.sparse.map" => {
            let numbers = value.split(|b| *b == b',').filter(|n| !n.is_empty()).map(number).collect::<Result<Vec<_>>>()?;
            out.sparse = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            out.has_sparse = true;
        }
        _ => {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.").or_else(|| key.strip_prefix(b"LIBARCHIVE.xattr-raw.")) {
                out.xattrs.push((name.to_vec(), value.to_vec()));
            }
        }
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(bad)
}

fn number(bytes: &[u8]) -> Result<u64> {
    text(bytes)?.parse().map_err(|_| bad("malformed number in a PAX record"))
}

/// Decimal seconds with an optional fraction, maybe negative.
fn timestamp(bytes: &[u8]) -> Result<(i64, u32)> {
    let text = text(bytes)?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let malformed = || bad("malformed time in a PAX record");
    let seconds: i64 = whole.parse().map_err(|_| malformed())?;
    let mut nanos = 0u32;
    for (i, digit) in fraction.bytes().take(9).enumerate() {
        let digit = digit.checked_sub(b'0').filter(|d| *d < 10).ok_or_else(malformed)?;
        nanos += u32::from(digit) * 10u32.pow(8 - u32::try_from(i).unwrap_or(8));
    }
    // A negative time with a fraction counts the fraction downwards.
    if text.starts_with('-') && nanos > 0 { Ok((seconds - 1, 1_000_000_000 - nanos)) } else { Ok((seconds, nanos)) }
}
