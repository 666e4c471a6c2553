//! Where the bytes of an archive are: a directory, or a tar file whose members are found by reading their headers alone and
//! then read in place, several at once.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use super::super::manifest::Descriptor;
use super::blob_path;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::engine::Inner;
use crate::provisioner::unpack::tar::{Reader, What};
use crate::provisioner::unpack::{Hasher, Source, file_source};

/// Members of one archive; the largest real ones have some thousands.
const MAX_MEMBERS: usize = 100_000;
/// Bytes read at a time to find members: a header and what extends it.
const HEADERS: usize = 4 << 10;
/// Size of a tar block.
const BLOCK: u64 = 512;

/// Files of an archive by name.
pub struct Files {
    place: Place,
    /// Ends all reading.
    cancel: CancellationToken,
}

enum Place {
    /// A directory; names are checked before they are joined.
    Directory(PathBuf),
    /// A tar file: where each member begins and how long it is. The file may be an unnamed temporary.
    Tar { file: File, members: HashMap<String, (u64, u64)> },
}

impl Files {
    /// Opens what lies at `path`. Blocks.
    ///
    /// # Errors
    /// `NotFound` when nothing does, `InvalidArgument` when it is no archive.
    pub fn open(inner: &Inner, path: &Path, cancel: &CancellationToken) -> Result<Self> {
        let meta = match std::fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(Error::not_found(format!("open {}", path.display()))),
            other => other.act("open", path.display())?,
        };
        if meta.is_dir() {
            return Ok(Self { place: Place::Directory(path.to_owned()), cancel: cancel.clone() });
        }
        if !meta.is_file() {
            return Err(Error::invalid(format!("open {}: neither a file nor a directory", path.display())));
        }
        Self::of_file(inner, File::open(path).act("open", path.display())?, path, cancel)
    }

    /// The tar file `file`, maybe compressed; `path` is what to call it. Blocks.
    ///
    /// # Errors
    /// As [`Files::open`].
    pub fn of_file(inner: &Inner, mut file: File, path: &Path, cancel: &CancellationToken) -> Result<Self> {
        file.seek(SeekFrom::Start(0)).act("seek in", path.display())?;
        let mut magic = [0u8; 4];
        let n = file.read(&mut magic).act("read", path.display())?;
        file.seek(SeekFrom::Start(0)).act("seek in", path.display())?;
        let file = match magic.get(..n) {
            Some([0x1f, 0x8b, ..]) => spool(inner, flate2::read::MultiGzDecoder::new(Watched { inner: file, cancel }))?,
            Some([0x28, 0xb5, 0x2f, 0xfd]) => spool(inner, zstd::Decoder::new(Watched { inner: file, cancel }).act("decompress", path.display())?)?,
            _ => file,
        };
        let members =
            index(&file).map_err(|e| if e.kind == Kind::DataLoss { Error::with(Kind::InvalidArgument, format!("read {}", path.display()), e) } else { e })?;
        Ok(Self { place: Place::Tar { file, members }, cancel: cancel.clone() })
    }

    /// Whether there is such a file.
    pub fn has(&self, name: &str) -> bool {
        self.size(name).is_some()
    }

    /// Its length, if there is such a file.
    pub fn size(&self, name: &str) -> Option<u64> {
        match &self.place {
            Place::Directory(dir) => {
                std::fs::symlink_metadata(crate::disk::layout::below(dir, Path::new(name))?).ok().filter(std::fs::Metadata::is_file).map(|m| m.len())
            }
            Place::Tar { members, .. } => members.get(name).map(|(_, size)| *size),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// `DataLoss` when there is no such file, I/O errors.
    pub fn reader(&self, name: &str) -> Result<Box<dyn Read + Send + '_>> {
        let missing = || Error::new(Kind::DataLoss, format!("read {name:?}: the archive does not have it"));
        let reader: Box<dyn Read + Send + '_> = match &self.place {
            Place::Directory(dir) => {
                let path = crate::disk::layout::below(dir, Path::new(name)).filter(|_| self.has(name)).ok_or_else(missing)?;
                Box::new(File::open(&path).act("open", path.display())?)
            }
            Place::Tar { file, members } => {
                let (at, left) = *members.get(name).ok_or_else(missing)?;
                Box::new(Member { file, at, left })
            }
        };
        Ok(Box::new(Watched { inner: reader, cancel: &self.cancel }))
    }

    /// Reads all of it, of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Files::reader`], `ResourceExhausted` beyond the limit.
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader(name)?.take(limit + 1).read_to_end(&mut bytes).act("read", name)?;
        if bytes.len() as u64 > limit { Err(Error::new(Kind::ResourceExhausted, format!("read {name}: longer than {limit} bytes"))) } else { Ok(bytes) }
    }

    /// Reads and verifies a small blob of an OCI layout.
    ///
    /// # Errors
    /// As [`Files::read`], `DataLoss` when it is not what it should be.
    pub fn blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>> {
        let bytes = self.read(&blob_path(&descriptor.digest), limit)?;
        let digest = Hasher::of(&bytes, Some(&descriptor.digest))?;
        if digest != descriptor.digest || bytes.len() as u64 != descriptor.size {
            return Err(Error::new(Kind::DataLoss, format!("verify {}: its bytes are {digest}", descriptor.digest)));
        }
        Ok(bytes)
    }

    /// Its bytes, to be unpacked.
    ///
    /// # Errors
    /// As [`Files::reader`].
    pub fn source(&self, name: &str) -> Result<Source<'_>> {
        Ok(file_source(self.reader(name)?))
    }
}

/// Reads until it is cancelled.
struct Watched<'a, R> {
    inner: R,
    cancel: &'a CancellationToken,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(std::io::Error::other(Error::new(Kind::Cancelled, "read archive: given up")));
        }
        self.inner.read(out)
    }
}

/// A member read in place, so that several can be read at once.
struct Member<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Member<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(out.len());
        let n = std::os::unix::fs::FileExt::read_at(self.file, &mut out[..most], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// Decompresses into a temporary without a name on the store's file system.
fn spool(inner: &Inner, mut from: impl Read) -> Result<File> {
    let dir = inner.layout.staging();
    let mut file = tempfile::tempfile_in(&dir).act("create temporary in", dir.display())?;
    let limit = inner.config.limits.layer_bytes;
    let n = std::io::copy(&mut (&mut from).take(limit + 1), &mut file).act("decompress into", dir.display())?;
    if n > limit { Err(Error::new(Kind::ResourceExhausted, format!("decompress archive: more than {limit} bytes"))) } else { Ok(file) }
}

/// Notes where members begin, without reading what is in them. Old docker archives link layers that several images share; the
/// link then stands for its target.
fn index(file: &File) -> Result<HashMap<String, (u64, u64)>> {
    let length = file.metadata().act("look at", "archive")?.len();
    let from = |at| Reader::new(Counted { inner: BufReader::with_capacity(HEADERS, Member { file, at, left: u64::MAX }), at });
    let mut archive = from(0);
    let mut members = HashMap::new();
    let mut links = Vec::new();
    while let Some(entry) = archive.next_entry()? {
        let name = String::from_utf8(entry.path).map(|name| name.trim_start_matches("./").to_owned());
        match (entry.what, name) {
            (What::File, name) if entry.sparse.is_none() => {
                let at = archive.input().at;
                let next = entry.size.div_ceil(BLOCK).checked_mul(BLOCK).and_then(|n| n.checked_add(at));
                let Some(next) = next.filter(|_| entry.size <= length.saturating_sub(at)) else {
                    return Err(Error::new(Kind::DataLoss, "read archive: it ends inside a file"));
                };
                if let Ok(name) = name {
                    members.insert(name, (at, entry.size));
                }
                archive = from(next);
            }
            (What::Symlink | What::Hardlink, Ok(name)) => links.push((name, String::from_utf8_lossy(&entry.link).into_owned(), entry.what)),
            _ => {}
        }
        if members.len() + links.len() > MAX_MEMBERS {
            return Err(Error::new(Kind::ResourceExhausted, format!("read archive: more than {MAX_MEMBERS} members")));
        }
    }
    for (name, target, what) in links {
        let base = if what == What::Symlink { name.rsplit_once('/').map_or("", |(dir, _)| dir) } else { "" };
        let mut parts: Vec<&str> = base.split('/').filter(|p| !p.is_empty()).collect();
        for part in target.split('/').filter(|p| !p.is_empty() && *p != ".") {
            if part == ".." {
                parts.pop();
            } else {
                parts.push(part);
            }
        }
        if let Some(place) = members.get(&parts.join("/")).copied() {
            members.insert(name, place);
        }
    }
    Ok(members)
}

/// Knows how far it has read.
struct Counted<R> {
    inner: R,
    at: u64,
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(out)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        self.at += n as u64;
        self.inner.consume(n);
    }
}
