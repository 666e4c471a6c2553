//! From an image archive (ACI: a tar file with `manifest` and `rootfs/`) to the archive of its layer, as a stream.
//!
//! # What the layer of an ACI is
//! The same archive with `rootfs/` taken off every name and hard link target, `manifest` and the entry of `rootfs` itself left
//! out (unless its owner or mode is worth keeping: then it is `./`), and ended as the writer of the ACI ended it. Everything else
//! of each header stays byte for byte, and a name that needed an extended header only for the length of the prefix loses
//! it. So an ACI that was made from the layer of a Docker or OCI image by prefixing its names gives the very bytes of that layer:
//! one diff id, one copy in the store, whoever asks for it.
//!
//! Whiteouts are no part of Appc, but of layers: a file `.wh.x` would hide `x` below, so it is refused.
//!
//! What comes out is read again by the unpacker of all layers, which is the one that judges names: a trick that this reader
//! misses gives other names inside of the layer, not names outside of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::header::{self, BLOCK, Pending};
use crate::model::Digest;
use crate::model::error::{Error, Kind, Result};
use crate::provisioner::config::Limits;
use crate::provisioner::unpack::sink::{RATIO_FROM, WHITEOUT, exhausted};
use crate::provisioner::unpack::{Hasher, Source};

/// Bytes passed on at a time.
const CHUNK: usize = 128 << 10;
/// Most bytes of one extended header, as in the reader of layers.
const MAX_EXTENDED: u64 = 1 << 20;
/// GNU and Python writers fill up records of this size, others end after two empty blocks.
const RECORD: u64 = 10_240;

/// An image archive being read.
pub struct Archive<'a> {
    input: Input<'a>,
    limits: Limits,
    state: State,
    manifest: Option<Vec<u8>>,
    rootfs: bool,
    emitted: u64,
    cancel: CancellationToken,
}

/// What an archive turned out to be.
pub struct Contents {
    /// SHA-512 of the uncompressed archive: the image's id.
    pub id: Digest,
    /// The manifest, not looked at yet.
    pub manifest: Vec<u8>,
    /// Bytes of the archive, compressed and not.
    pub sizes: (u64, u64),
}

enum State {
    /// At a header.
    Header,
    /// Bytes to pass on, padding included.
    Data(u64),
    Ended,
}

/// Where an entry belongs.
enum Place {
    Manifest,
    /// `rootfs` itself; the name that it would have.
    Root(&'static [u8]),
    /// Below it: the name without the prefix.
    Below(Vec<u8>),
    /// The directory that was packed.
    Top,
}

pub(super) fn bad(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::DataLoss, format!("read image archive: {why}"))
}

impl<'a> Archive<'a> {
    /// Of a file that stands at its beginning: plain, or compressed by gzip or zstd.
    ///
    /// # Errors
    /// `Unimplemented` for other compressions, I/O errors.
    pub fn open(file: &'a File, limits: Limits, cancel: CancellationToken) -> Result<Self> {
        let fetched = Arc::new(AtomicU64::new(0));
        let mut reader = BufReader::with_capacity(CHUNK, Counted { file, count: fetched.clone() });
        let magic = reader.fill_buf().map_err(|e| Error::io("read image archive", e))?;
        let inflated: Box<dyn Read + Send + 'a> = match magic {
            [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(reader).map_err(|e| Error::io("read image archive", e))?),
            [b'B', b'Z', b'h', ..] => return Err(unsupported("bzip2")),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return Err(unsupported("xz")),
            _ => Box::new(reader),
        };
        let input = Input { inflated, hasher: Hasher::new("sha512"), read: 0, fetched, limits };
        Ok(Self { input, limits, state: State::Header, manifest: None, rootfs: false, emitted: 0, cancel })
    }

    /// The archive of its layer, to be read once and to its end.
    pub fn layer(&mut self) -> Source<'_> {
        Box::new(|| self.next().map_err(std::io::Error::other))
    }

    /// What it was, once its layer has been read.
    ///
    /// # Errors
    /// `Internal` before that.
    pub fn contents(self) -> Result<Contents> {
        match (self.state, self.manifest) {
            (State::Ended, Some(manifest)) => {
                let sizes = (self.input.fetched.load(Ordering::Relaxed), self.input.read);
                Ok(Contents { id: self.input.hasher.finish()?, manifest, sizes })
            }
            _ => Err(Error::internal("read image archive: it was not read to its end")),
        }
    }

    fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "read image archive: cancelled"));
            }
            match self.state {
                State::Ended => return Ok(None),
                State::Data(0) => self.state = State::Header,
                State::Data(left) => {
                    let mut chunk = vec![0; usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)];
                    self.input.exact(&mut chunk)?;
                    self.state = State::Data(left - chunk.len() as u64);
                    return Ok(Some(self.emit(chunk)));
                }
                State::Header => {
                    if let Some(bytes) = self.entry()? {
                        return Ok(Some(self.emit(bytes)));
                    }
                }
            }
        }
    }

    fn emit(&mut self, bytes: Vec<u8>) -> Bytes {
        self.emitted += bytes.len() as u64;
        bytes.into()
    }

    /// Reads one entry with all its headers; what of it goes into the layer.
    fn entry(&mut self) -> Result<Option<Vec<u8>>> {
        let mut pending = Pending::default();
        loop {
            let mut block = [0; BLOCK];
            if !self.input.block(&mut block)? || block.iter().all(|b| *b == 0) {
                return self.end().map(Some);
            }
            let header = header::checked(block)?;
            let size = header.entry_size().map_err(bad)?;
            match header.entry_type() {
                tar::EntryType::GNULongName | tar::EntryType::GNULongLink | tar::EntryType::XHeader => {
                    let data = self.extended(size)?;
                    pending.add(header, data)?;
                }
                // Defaults for all entries: comments, in practice, and passed over by the reader of layers too.
                tar::EntryType::XGlobalHeader => {
                    self.extended(size)?;
                }
                _ => return self.place(&header, pending),
            }
        }
    }

    fn place(&mut self, header: &tar::Header, pending: Pending) -> Result<Option<Vec<u8>>> {
        let size = match pending.size()? {
            Some(size) => size,
            None => header.entry_size().map_err(bad)?,
        };
        let padded = padded(size)?;
        let kind = header.entry_type();
        let name = pending.name(header);
        let shown = || name.escape_ascii().to_string();
        let stripped = match place(&name)? {
            Place::Top if kind.is_dir() => {
                self.skip(padded)?;
                return Ok(None);
            }
            Place::Manifest if kind.is_file() && self.manifest.is_none() => {
                self.manifest = Some(self.small(size, self.limits.manifest_bytes)?);
                return Ok(None);
            }
            Place::Root(as_name) if header::is_directory(kind, &name) => {
                self.rootfs = true;
                if as_name.is_empty() && header::is_plain_directory(header) && !pending.has_attributes() {
                    self.skip(padded)?;
                    return Ok(None);
                }
                b"./".to_vec()
            }
            Place::Below(stripped) => stripped,
            _ => return Err(bad(format!("{} is there twice, or is not what its name says", shown()))),
        };
        let last = stripped.split(|b| *b == b'/').rfind(|part| !part.is_empty()).unwrap_or_default();
        if last.starts_with(WHITEOUT) {
            return Err(bad(format!("{}: names that begin with .wh. hide files in layers, so no image can have them", shown())));
        }
        let link = match kind {
            tar::EntryType::Link => match place(&pending.link(header))? {
                Place::Below(target) => Some(target),
                _ => return Err(bad(format!("{} is a hard link to what is not in rootfs", shown()))),
            },
            _ => None,
        };
        self.rootfs = true;
        let mut bytes = pending.write(header, &stripped, link.as_deref())?;
        // Old sparse files have more of their map between header and data.
        if kind == tar::EntryType::GNUSparse {
            self.sparse_maps(header, &mut bytes)?;
        }
        self.state = State::Data(padded);
        Ok(Some(bytes))
    }

    fn sparse_maps(&mut self, header: &tar::Header, bytes: &mut Vec<u8>) -> Result<()> {
        let mut more = header.as_gnu().is_some_and(tar::GnuHeader::is_extended);
        while more {
            let mut map = tar::GnuExtSparseHeader::new();
            self.input.exact(map.as_mut_bytes())?;
            bytes.extend_from_slice(map.as_bytes());
            more = map.is_extended();
            if bytes.len() as u64 > MAX_EXTENDED {
                return Err(bad("too many fragments of a sparse file"));
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<Vec<u8>> {
        self.input.drain()?;
        if self.manifest.is_none() {
            return Err(bad("it has no manifest"));
        }
        if !self.rootfs {
            return Err(bad("it has no rootfs"));
        }
        self.state = State::Ended;
        let mut end = self.emitted + 2 * BLOCK as u64;
        if self.input.read.is_multiple_of(RECORD) {
            end = end.next_multiple_of(RECORD);
        }
        Ok(vec![0; usize::try_from(end - self.emitted).unwrap_or_default()])
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>> {
        self.small(size, MAX_EXTENDED)
    }

    /// Reads data of at most `limit` bytes, and its padding.
    fn small(&mut self, size: u64, limit: u64) -> Result<Vec<u8>> {
        if size > limit {
            return Err(Error::new(Kind::ResourceExhausted, format!("read image archive: {size} bytes where at most {limit} are taken")));
        }
        let mut data = vec![0; usize::try_from(size).unwrap_or_default()];
        self.input.exact(&mut data)?;
        self.skip(padded(size)? - size)?;
        Ok(data)
    }

    fn skip(&mut self, mut n: u64) -> Result<()> {
        let mut chunk = vec![0; usize::try_from(n).unwrap_or(CHUNK).min(CHUNK)];
        while n > 0 {
            let step = chunk.len().min(usize::try_from(n).unwrap_or(CHUNK));
            self.input.exact(&mut chunk[..step])?;
            n -= step as u64;
        }
        Ok(())
    }
}

fn unsupported(what: &str) -> Error {
    Error::new(Kind::Unimplemented, format!("read image archive: it is compressed by {what}; plain archives, gzip and zstd are taken"))
}

fn padded(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| bad("entry of absurd size"))
}

/// Finds out where a name belongs. `./` in front is usual, and stays.
fn place(name: &[u8]) -> Result<Place> {
    let (lead, rest): (&'static [u8], _) = match name.strip_prefix(b"./") {
        Some(rest) => (b"./", rest),
        None => (b"", name),
    };
    let (first, below) = match rest.iter().position(|b| *b == b'/') {
        Some(slash) => (&rest[..slash], &rest[slash + 1..]),
        None => (rest, b"".as_slice()),
    };
    match first {
        b"" | b"." if below.is_empty() => Ok(Place::Top),
        b"manifest" if below.is_empty() => Ok(Place::Manifest),
        b"rootfs" if below.iter().all(|b| *b == b'/') => Ok(Place::Root(lead)),
        b"rootfs" => Ok(Place::Below([lead, &rest[b"rootfs/".len()..]].concat())),
        _ => Err(bad(format!("{} is neither the manifest nor in rootfs", name.escape_ascii()))),
    }
}

/// The compressed file, counted.
struct Counted<'a> {
    file: &'a File,
    count: Arc<AtomicU64>,
}

impl Read for Counted<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(out)?;
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The uncompressed archive: hashed, counted, bounded.
struct Input<'a> {
    inflated: Box<dyn Read + Send + 'a>,
    hasher: Hasher,
    read: u64,
    fetched: Arc<AtomicU64>,
    limits: Limits,
}

impl Input<'_> {
    fn some(&mut self, out: &mut [u8]) -> Result<usize> {
        let n = loop {
            match self.inflated.read(out) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error().is_some() => return Err(Error::io("read image archive", e)),
                Err(e) => return Err(Error::with(Kind::DataLoss, "decompress image archive", e)),
                Ok(n) => break n,
            }
        };
        self.hasher.update(&out[..n]);
        self.read += n as u64;
        if self.read > self.limits.layer_bytes {
            return Err(exhausted(format!("more than {} unpacked bytes", self.limits.layer_bytes)));
        }
        if self.read > RATIO_FROM && self.read > self.fetched.load(Ordering::Relaxed).saturating_mul(self.limits.ratio) {
            return Err(exhausted("unpacks to far more than any honest image"));
        }
        Ok(n)
    }

    fn exact(&mut self, out: &mut [u8]) -> Result<()> {
        if self.fill(out)? == out.len() { Ok(()) } else { Err(bad("it ends inside an entry")) }
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < out.len() {
            match self.some(&mut out[done..])? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    /// One block; `false` at the end.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        match self.fill(block)? {
            0 => Ok(false),
            BLOCK => Ok(true),
            _ => Err(bad("it ends inside a block")),
        }
    }

    fn drain(&mut self) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        while self.some(&mut chunk)? > 0 {}
        Ok(())
    }
}

#[cfg(test)]
mod tests;
