//! From archive entries to what they mean: the half of unpacking that does not depend on the form a layer is kept in.
//!
//! Limits, names, whiteouts, link targets and extended attributes are judged here, once; a [`Sink`] only has to keep what it is
//! told, within its root.

use std::io::BufRead;

use super::names::clean;
use super::tar::{Entry, Reader, What};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::FsUsage;
use crate::provisioner::config::Limits;

/// Prefix of whiteouts in layer archives (OCI image-spec layer.md).
pub const WHITEOUT: &[u8] = b".wh.";
/// Name of the opaque marker.
pub const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// Ratio of unpacked to fetched bytes is looked at past this size only: small layers of zeros are common.
pub const RATIO_FROM: u64 = 256 << 20;
/// Links followed while making the target of a dangling one; the kernel's own bound.
pub const MAX_LINKS: usize = 40;
/// Longest name of a file, longest target of a symbolic link (`NAME_MAX`, `PATH_MAX` less its end).
const MAX_NAME: usize = 255;
const MAX_TARGET: usize = 4095;
/// Largest device numbers that Linux keeps.
const MAX_DEVICE: (u32, u32) = (0xfff, 0xf_ffff);

/// Where an entry goes. Names are relative to the layer's root, without `.`, `..` and empty components.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Parent and name.
    pub path: &'a [u8],
    /// The directory part, empty for the root. It may lead through symbolic links of this layer.
    pub parent: &'a [u8],
    /// Last component, never followed.
    pub name: &'a [u8],
}

/// A file's data: calls back with the offset and content of each piece, in ascending order. Holes of sparse files are not told.
pub type Data<'a> = dyn FnMut(&mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> + 'a;

/// What a finished layer says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// Allocated bytes and inodes, the root directory included.
    pub usage: FsUsage,
    /// The root directory hides everything below. Overlay does not look at this attribute on roots.
    pub opaque_root: bool,
    /// Directories that the archive did not list: path relative to the root, which itself is the empty one. They have mode 0755
    /// of root and the time of the first entry.
    pub implied: Vec<String>,
    /// It has whiteouts or opaque directories.
    pub marks: bool,
    /// What its files come to ([`super::content`]), where that was taken on the way.
    pub content: Option<String>,
}

/// Keeps one layer. Missing parents are made with mode 0755 of root; whatever has the name already is replaced, except that a
/// directory stays when a directory comes.
pub trait Sink {
    /// Metadata of the root.
    fn root(&mut self, entry: &Entry) -> Result<()>;
    /// A directory.
    fn directory(&mut self, place: Place<'_>, entry: &Entry) -> Result<()>;
    /// A regular file of `entry.size` bytes.
    fn file(&mut self, place: Place<'_>, entry: &Entry, data: &mut Data<'_>) -> Result<()>;
    /// A symbolic link to `entry.link`.
    fn symlink(&mut self, place: Place<'_>, entry: &Entry) -> Result<()>;
    /// A device node or pipe.
    fn node(&mut self, place: Place<'_>, entry: &Entry) -> Result<()>;
    /// A further name of the file at `target` of this layer; a link to a link is a link.
    fn hardlink(&mut self, place: Place<'_>, target: Place<'_>) -> Result<()>;
    /// Hides the name in lower layers; if this layer has it as a directory, hides what lower layers have in that.
    fn whiteout(&mut self, place: Place<'_>) -> Result<()>;
    /// Hides what lower layers have in the directory; empty is the root.
    fn opaque(&mut self, dir: &[u8]) -> Result<()>;
    /// Completes the layer.
    fn finish(self: Box<Self>) -> Result<Finished>;
}

/// Gives every entry of `archive` to `sink`. `fetched` tells how many bytes have arrived, for the bound on the ratio.
///
/// # Errors
/// `DataLoss` for names that leave the root or malformed archives, `ResourceExhausted` at a limit, those of the sink.
pub fn apply<R: BufRead>(archive: &mut Reader<R>, sink: &mut dyn Sink, limits: Limits, fetched: &dyn Fn() -> u64) -> Result<()> {
    let mut front = Front { limits, entries: 0, bytes: 0, written: 0, fetched };
    while let Some(entry) = archive.next_entry()? {
        front.entries += 1;
        if front.entries > limits.layer_entries {
            return Err(exhausted(format!("more than {} entries", limits.layer_entries)));
        }
        front.entry(&entry, archive, sink).map_err(|e| e.within(format!("apply layer entry {:?}", String::from_utf8_lossy(&entry.path))))?;
    }
    Ok(())
}

struct Front<'a> {
    limits: Limits,
    entries: u64,
    /// Sizes as announced.
    bytes: u64,
    /// Data that really came: holes of sparse files are not in it.
    written: u64,
    fetched: &'a dyn Fn() -> u64,
}

impl Front<'_> {
    fn entry<R: BufRead>(&mut self, entry: &Entry, archive: &mut Reader<R>, sink: &mut dyn Sink) -> Result<()> {
        let path = clean(&entry.path)?;
        let place = split(&path);
        if place.name.is_empty() {
            return if entry.what == What::Directory { sink.root(entry) } else { Err(bad("the root is not a directory")) };
        }
        if place.path.split(|b| *b == b'/').any(|part| part.len() > MAX_NAME) {
            return Err(bad("name longer than NAME_MAX"));
        }
        if place.name == OPAQUE_MARKER {
            return sink.opaque(place.parent);
        }
        if let Some(hidden) = place.name.strip_prefix(WHITEOUT) {
            return whiteout(Place { name: hidden, ..place }, sink);
        }
        match entry.what {
            What::Directory => sink.directory(place, entry),
            What::File => self.file(place, entry, archive, sink),
            What::Symlink if entry.link.is_empty() || entry.link.len() > MAX_TARGET || entry.link.contains(&0) => Err(bad("malformed link target")),
            What::Symlink => sink.symlink(place, entry),
            What::Hardlink => {
                let target = clean(&entry.link)?;
                if target.is_empty() || target == path {
                    return Err(bad("malformed link target"));
                }
                sink.hardlink(place, split(&target))
            }
            What::Char | What::Block if entry.device.0 > MAX_DEVICE.0 || entry.device.1 > MAX_DEVICE.1 => Err(bad("device number beyond Linux's")),
            What::Char | What::Block | What::Fifo => sink.node(place, entry),
        }
    }

    fn file<R: BufRead>(&mut self, place: Place<'_>, entry: &Entry, archive: &mut Reader<R>, sink: &mut dyn Sink) -> Result<()> {
        self.bytes = self.bytes.saturating_add(entry.size);
        if self.bytes > self.limits.layer_bytes {
            return Err(exhausted(format!("more than {} unpacked bytes", self.limits.layer_bytes)));
        }
        // A sparse or announced size costs nothing yet; what is really written is looked at below.
        let (fetched, factor) = (self.fetched, self.limits.ratio);
        let ratio = fetched().saturating_mul(factor);
        let written = &mut self.written;
        let whole = [(0, u64::MAX)];
        let mut pieces = Pieces { map: entry.sparse.as_deref().unwrap_or(&whole), at: 0, done: 0 };
        let mut data = |to: &mut dyn FnMut(u64, &[u8]) -> Result<()>| {
            archive.data(|chunk| {
                *written += chunk.len() as u64;
                if *written > RATIO_FROM && *written > ratio.max(fetched().saturating_mul(factor)) {
                    return Err(exhausted("unpacks to far more than any honest layer"));
                }
                pieces.pass(chunk, to)
            })
        };
        sink.file(place, entry, &mut data)
    }
}

fn whiteout(place: Place<'_>, sink: &mut dyn Sink) -> Result<()> {
    if place.name.starts_with(WHITEOUT) {
        // Bookkeeping of aufs (`.wh..wh.plnk` and its like), which image-spec reserves and nobody needs.
        return Ok(());
    }
    if matches!(place.name, b"" | b"." | b"..") {
        return Err(bad("malformed whiteout"));
    }
    sink.whiteout(place)
}

/// Takes a clean path apart.
fn split(path: &[u8]) -> Place<'_> {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => Place { path, parent: &path[..slash], name: &path[slash + 1..] },
        None => Place { path, parent: b"", name: path },
    }
}

/// Tells where in a sparse file each byte of the archive belongs.
struct Pieces<'a> {
    map: &'a [(u64, u64)],
    at: usize,
    done: u64,
}

impl Pieces<'_> {
    fn pass(&mut self, mut chunk: &[u8], to: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        while !chunk.is_empty() {
            let Some((offset, length)) = self.map.get(self.at) else { return Err(bad("sparse map and data disagree")) };
            let n = chunk.len().min(usize::try_from(length - self.done).unwrap_or(usize::MAX));
            to(offset + self.done, &chunk[..n])?;
            self.done += n as u64;
            chunk = &chunk[n..];
            if self.done == *length {
                self.at += 1;
                self.done = 0;
            }
        }
        Ok(())
    }
}

/// The attributes of an entry that a layer keeps. Overlay's own are dropped: a layer that brings `redirect` or `metacopy` would
/// choose which files of other layers it shows. So are those that mean something on this host's policy only.
pub fn xattrs(entry: &Entry) -> impl Iterator<Item = (&[u8], &[u8])> {
    const DROPPED: [&[u8]; 5] = [b"trusted.overlay.", b"user.overlay.", b"security.selinux", b"security.ima", b"security.evm"];
    let kept = |name: &[u8]| !DROPPED.iter().any(|prefix| name.starts_with(prefix)) && !name.contains(&0);
    entry.xattrs.iter().filter(move |(name, _)| kept(name)).map(|(name, value)| (name.as_slice(), value.as_slice()))
}

/// A name for messages.
pub fn show(path: &[u8]) -> impl std::fmt::Display + '_ {
    path.escape_ascii()
}

/// The error of a layer beyond its limits.
pub fn exhausted(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::ResourceExhausted, format!("layer exceeds its limits: {why}"))
}

/// The error of a malformed layer.
pub fn bad(why: &str) -> Error {
    Error::new(Kind::DataLoss, why)
}
