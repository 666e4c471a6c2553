//! One pass from a compressed blob to files: blob digest, decompression, diff-id digest, tar entries, files. No compressed
//! copy is kept, and memory is a few fixed buffers.
//!
//! Two threads share the work of a layer: one hashes the blob and inflates, the other hashes what came out and writes files.
//! Inflating and creating files cost about the same, so this nearly halves the time of a single large layer on two cores.

pub mod content;
pub mod erofs;
mod hash;
mod names;
pub mod sink;
pub mod tar;
pub mod tree;

use std::io::{self, BufRead, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

pub use hash::Hasher;

use crate::model::Digest;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::config::Limits;
use sink::{Finished, Sink};
use tree::Tree;

/// Bytes handed from the inflating to the writing thread at a time. Larger ones leave the second-level cache.
const CHUNK: usize = 128 << 10;
/// Chunks in flight between the two.
const CHUNKS: usize = 4;
/// Largest window a zstd frame may ask for (log2): what the reference decoder allows by default, 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 27;
/// Stack of the writing thread; it calls nothing deep.
const STACK: usize = 512 << 10;

/// A source of compressed bytes: `None` is the end.
pub type Source<'a> = Box<dyn FnMut() -> io::Result<Option<Bytes>> + Send + 'a>;

/// What a blob must turn out to be.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Digest of the compressed bytes.
    pub blob: Option<Digest>,
    /// Number of the compressed bytes.
    pub size: Option<u64>,
    /// Digest of the archive.
    pub diff_id: Option<Digest>,
}

/// The form in which a layer is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// A directory as overlay wants its lower ones.
    #[default]
    Directory,
    /// One EROFS image with such a tree.
    Erofs,
}

/// A verified layer on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// Digest of the archive.
    pub diff_id: Digest,
    /// Bytes of the blob.
    pub blob_size: u64,
    /// What is on disk.
    pub tree: Finished,
}

/// Unpacks the blob from `source` to `root`: into an existing empty directory, or into a new file, as `form` says. Blocks; the
/// caller removes `root` on failure.
///
/// # Errors
/// `DataLoss` when a digest or size differs or the archive is malformed, `ResourceExhausted` at limits, I/O errors.
pub fn unpack(source: Source<'_>, root: &Path, form: Form, expected: &Expected, limits: Limits) -> Result<Unpacked> {
    let fetched = Arc::new(AtomicU64::new(0));
    let mut blob = Blob::new(source, expected, fetched.clone());
    let (full, chunks) = sync_channel::<Chunk>(CHUNKS);
    let (recycle, empty) = sync_channel::<Vec<u8>>(CHUNKS + 1);
    let algorithm = expected.diff_id.as_ref().map_or("sha256", Digest::algorithm).to_owned();

    let (inflated, written) = std::thread::scope(|scope| {
        let writer = std::thread::Builder::new().name("layer-write".to_owned()).stack_size(STACK).spawn_scoped(scope, move || {
            let input = Chunks { chunks, recycle, current: Vec::new(), at: 0, ended: false, hasher: Hasher::new(&algorithm) };
            write(input, (root, form), limits, &|| fetched.load(Ordering::Relaxed))
        });
        let writer = match writer {
            Ok(writer) => writer,
            Err(e) => return (Err(Fault::Ours(Error::io("start thread", e))), Err(Error::internal("unpack layer"))),
        };
        // `full` is dropped at the end of the call, which ends the writer whatever happened here.
        let inflated = inflate(&mut blob, full, &empty);
        drop(empty);
        (inflated, writer.join().unwrap_or_else(|_| Err(Error::internal("unpack layer: the writing thread panicked"))))
    });
    let (tree, diff_id) = match (inflated, written) {
        (Ok(()) | Err(Fault::WriterLeft), written) => written?,
        // The cause is here; the writer only saw its input break off.
        (Err(Fault::Ours(e)), _) => return Err(e),
    };
    let blob_size = blob.verify(expected)?;
    if let Some(expected) = &expected.diff_id
        && *expected != diff_id
    {
        return Err(Error::new(Kind::DataLoss, format!("verify layer: diff id is {diff_id}, the configuration promises {expected}")));
    }
    Ok(Unpacked { diff_id, blob_size, tree })
}

/// Why inflating stopped early.
enum Fault {
    Ours(Error),
    WriterLeft,
}

enum Chunk {
    Data(Vec<u8>),
    End,
}

fn write(input: Chunks, (root, form): (&Path, Form), limits: Limits, fetched: &dyn Fn() -> u64) -> Result<(Finished, Digest)> {
    let mut sink: Box<dyn Sink> = match form {
        Form::Directory => Box::new(Tree::new(root)?),
        Form::Erofs => Box::new(erofs::Erofs::create(root)?),
    };
    let mut archive = tar::Reader::new(input);
    sink::apply(&mut archive, &mut *sink, limits, fetched)?;
    let digest = archive.into_inner().hasher.finish()?;
    Ok((sink.finish()?, digest))
}

/// Decompresses `blob` into chunks. What the bytes are decides, not what the manifest calls them: registries hold plain
/// archives under the name of gzip, and the digest covers the bytes either way.
fn inflate(blob: &mut Blob<'_>, full: SyncSender<Chunk>, empty: &Receiver<Vec<u8>>) -> std::result::Result<(), Fault> {
    let act = |e: io::Error| Fault::Ours(from_io("decompress layer", e));
    match blob.magic().map_err(act)? {
        [0x1f, 0x8b, ..] => pump(&mut flate2::bufread::MultiGzDecoder::new(&mut *blob), &full, empty)?,
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(&mut *blob).map_err(act)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(act)?;
            pump(&mut decoder, &full, empty)?;
        }
        _ => pump(&mut *blob, &full, empty)?,
    }
    // Whatever follows the compressed stream is covered by the blob's digest too.
    blob.drain().map_err(act)?;
    full.send(Chunk::End).map_err(|_| Fault::WriterLeft)
}

fn pump(from: &mut dyn Read, full: &SyncSender<Chunk>, empty: &Receiver<Vec<u8>>) -> std::result::Result<(), Fault> {
    loop {
        let mut buffer = empty.try_recv().unwrap_or_default();
        buffer.resize(CHUNK, 0);
        let mut filled = 0;
        while filled < CHUNK {
            match from.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Fault::Ours(from_io("decompress layer", e))),
            }
        }
        if filled == 0 {
            return Ok(());
        }
        buffer.truncate(filled);
        full.send(Chunk::Data(buffer)).map_err(|_| Fault::WriterLeft)?;
    }
}

/// An error that crossed a `Read`: our own if one is inside, `DataLoss` if the decoder complains.
fn from_io(what: &str, e: io::Error) -> Error {
    match e.downcast::<Error>() {
        Ok(ours) => ours,
        Err(e) if e.raw_os_error().is_some() => Error::io(what, e),
        Err(e) => Error::with(Kind::DataLoss, what, e),
    }
}

/// The compressed bytes, hashed and counted as they arrive.
struct Blob<'a> {
    source: Source<'a>,
    current: Bytes,
    hasher: Hasher,
    size: u64,
    bound: u64,
    fetched: Arc<AtomicU64>,
}

impl<'a> Blob<'a> {
    fn new(source: Source<'a>, expected: &Expected, fetched: Arc<AtomicU64>) -> Self {
        let algorithm = expected.blob.as_ref().map_or("sha256", Digest::algorithm);
        Self { source, current: Bytes::new(), hasher: Hasher::new(algorithm), size: 0, bound: expected.size.unwrap_or(u64::MAX), fetched }
    }

    fn next(&mut self) -> io::Result<Option<Bytes>> {
        let Some(chunk) = (self.source)()? else { return Ok(None) };
        self.size += chunk.len() as u64;
        if self.size > self.bound {
            return Err(io::Error::other(Error::new(Kind::DataLoss, format!("fetch layer: longer than the {} bytes of its descriptor", self.bound))));
        }
        self.fetched.store(self.size, Ordering::Relaxed);
        self.hasher.update(&chunk);
        Ok(Some(chunk))
    }

    /// The first four bytes, fewer if there are no more; they stay unread.
    fn magic(&mut self) -> io::Result<[u8; 4]> {
        while self.current.len() < 4 {
            let Some(more) = self.next()? else { break };
            self.current = if self.current.is_empty() { more } else { [&self.current[..], &more[..]].concat().into() };
        }
        let mut magic = [0; 4];
        for (to, from) in magic.iter_mut().zip(self.current.iter()) {
            *to = *from;
        }
        Ok(magic)
    }

    fn drain(&mut self) -> io::Result<()> {
        self.current = Bytes::new();
        while self.next()?.is_some() {}
        Ok(())
    }

    fn verify(self, expected: &Expected) -> Result<u64> {
        if let Some(size) = expected.size
            && size != self.size
        {
            return Err(Error::new(Kind::DataLoss, format!("verify layer: {} bytes, its descriptor says {size}", self.size)));
        }
        let digest = self.hasher.finish()?;
        match &expected.blob {
            Some(expected) if *expected != digest => Err(Error::new(Kind::DataLoss, format!("verify layer: digest is {digest}, not {expected}"))),
            _ => Ok(self.size),
        }
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let n = available.len().min(out.len());
        out[..n].copy_from_slice(&available[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Blob<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            let Some(chunk) = self.next()? else { break };
            self.current = chunk;
        }
        Ok(&self.current)
    }

    fn consume(&mut self, n: usize) {
        bytes::Buf::advance(&mut self.current, n);
    }
}

/// The decompressed chunks on the writing side, hashed as they arrive.
struct Chunks {
    chunks: Receiver<Chunk>,
    recycle: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
    hasher: Hasher,
}

impl Read for Chunks {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let n = available.len().min(out.len());
        out[..n].copy_from_slice(&available[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len() && !self.ended {
            match self.chunks.recv() {
                Ok(Chunk::Data(next)) => {
                    self.hasher.update(&next);
                    let used = std::mem::replace(&mut self.current, next);
                    self.at = 0;
                    // Full or closed: the buffer is simply freed.
                    let _ = self.recycle.try_send(used);
                }
                Ok(Chunk::End) => {
                    self.ended = true;
                    self.current.clear();
                    self.at = 0;
                }
                Err(_) => return Err(io::Error::other("the stream broke off")),
            }
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

/// A source that reads a file.
pub fn file_source<'a>(mut file: impl Read + Send + 'a) -> Source<'a> {
    Box::new(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(n) => {
                    buffer.truncate(n);
                    return Ok(Some(Bytes::from(buffer)));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    })
}

/// Makes the directory that [`unpack`] fills.
///
/// # Errors
/// I/O errors.
pub fn make_root(root: &Path) -> Result<()> {
    std::fs::create_dir_all(root).act("create directory", root.display())
}

#[cfg(test)]
pub(super) mod tests;
