//! The sink that keeps a layer as one EROFS image: unpacking is one nearly sequential write instead of a file each, removing a
//! layer is one unlink. The image is ours from the first byte to the last; nothing of a registry is ever mounted as it came.
//!
//! # Order in the file
//! Superblock and root inode, then data and inodes as entries arrive, then directories. Small files and the last partial
//! blocks of larger ones lie behind their inodes. Nothing is compressed. Holes of sparse files are holes.
//!
//! # Memory
//! File data pass through buffers of 256 KiB. Names stay in memory until the end, see [`nodes`] for the bound. Paths are
//! resolved there, by the rules that the directory sink has from the kernel: within this root, through links of this layer.

pub mod format;
mod image;
mod nodes;

use std::collections::BTreeMap;
use std::path::Path;

use format::{BLOCK, Dirent, HOLE, Inode, Layout, ROOT, SLOT};
use image::Image;
use nodes::{Dir, Meta, Node, Nodes, ROOT_DIR, What};

use super::sink::{Data, Finished, Place, Sink, bad, exhausted, show};
use super::tar::Entry;
use crate::model::error::{Error, Kind, Result};
use crate::model::image::FsUsage;

/// Chunks of a sparse file listed at most; larger files have larger chunks.
const CHUNKS: u64 = 1 << 16;

/// A layer image being written.
pub struct Erofs {
    image: Image,
    nodes: Nodes,
    /// The last parent used.
    parent: Option<(Vec<u8>, u32)>,
    /// Names of inodes that have, or had, more than one; and whether the inode is of the small form.
    links: BTreeMap<u64, (u32, bool)>,
    inodes: u64,
    chunked: bool,
    marks: bool,
    /// The time that small inodes share: that of the first entry.
    time: Option<(i64, u32)>,
}

/// Where a directory's parts lie.
struct Placed {
    at: u64,
    inode: Inode,
    compact: bool,
    xattrs: Vec<u8>,
}

impl Erofs {
    /// Writes to a new file at `path`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(path: &Path) -> Result<Self> {
        let image = Image::create(path)?;
        Ok(Self { image, nodes: Nodes::new(), parent: None, links: BTreeMap::new(), inodes: 0, chunked: false, marks: false, time: None })
    }

    /// The directory of an entry, made if it is missing.
    fn parent(&mut self, path: &[u8]) -> Result<u32> {
        match &self.parent {
            Some((text, dir)) if text == path => Ok(*dir),
            _ => {
                let links = &mut self.links;
                let dir = self.nodes.parents(path, &mut |lost| unname(links, lost))?;
                self.parent = Some((path.to_vec(), dir));
                Ok(dir)
            }
        }
    }

    fn meta(&mut self, dir: u32, entry: &Entry) -> Result<()> {
        let xattrs = format::xattrs(entry)?;
        self.nodes.keep_xattrs(xattrs.len())?;
        let meta = Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs };
        self.nodes.dir(dir)?.meta = Some(Box::new(meta));
        Ok(())
    }

    fn time(&mut self, entry: &Entry) -> (i64, u32) {
        *self.time.get_or_insert(entry.mtime)
    }

    /// Removes what an earlier entry left under the name.
    fn vacate(&mut self, dir: u32, name: &[u8]) {
        if let Some((node, _)) = self.nodes.find(dir, name) {
            let links = &mut self.links;
            self.nodes.remove(node, |lost| unname(links, lost));
        }
    }

    /// Writes the inode, its attributes and the last partial block of its data; then the name leads to it.
    fn put(&mut self, (dir, name): (u32, &[u8]), what: What, mut inode: Inode, xattrs: &[u8], tail: &[u8]) -> Result<()> {
        let compact = inode.is_compact(self.time.unwrap_or_default());
        let slot = self.image.slot(Inode::bytes(compact) + xattrs.len() as u64, tail.len() as u64)?;
        if slot.inline {
            inode.layout = Layout::Inline;
        } else if let Some(block) = slot.block {
            self.image.put_data(u64::from(block) * BLOCK, tail)?;
            if inode.size < BLOCK {
                inode.data = block;
            }
        }
        self.image.put_meta(slot.at, &inode.encode(compact, xattrs.len()))?;
        self.image.put_meta(slot.at + Inode::bytes(compact), xattrs)?;
        if slot.inline {
            self.image.put_meta(slot.at + Inode::bytes(compact) + xattrs.len() as u64, tail)?;
        }
        self.inodes += 1;
        self.name(dir, name, what, slot.at / SLOT, compact)
    }

    fn name(&mut self, dir: u32, name: &[u8], what: What, nid: u64, compact: bool) -> Result<()> {
        let number = self.nodes.enter(dir, name, what, nid)?;
        if let Some(node) = self.nodes.node_mut(number) {
            node.compact = compact;
        }
        Ok(())
    }

    fn sparse(&mut self, to: (u32, &[u8]), entry: &Entry, xattrs: &[u8], data: &mut Data<'_>) -> Result<()> {
        let mut bits = 0u16;
        while entry.size.div_ceil(BLOCK << bits) > CHUNKS {
            bits += 1;
        }
        let chunk = BLOCK << bits;
        let mut map = vec![HOLE; usize::try_from(entry.size.div_ceil(chunk)).map_err(|_| exhausted("a file of absurd size"))?];
        let image = &mut self.image;
        data(&mut |mut offset, mut piece| {
            while !piece.is_empty() {
                let number = offset / chunk;
                let n = piece.len().min(usize::try_from((number + 1) * chunk - offset).unwrap_or(usize::MAX));
                let slot = usize::try_from(number).ok().and_then(|n| map.get_mut(n)).ok_or_else(|| bad("sparse map and size disagree"))?;
                if *slot == HOLE {
                    *slot = image.blocks(chunk.min(entry.size - number * chunk))?;
                }
                image.put_data(u64::from(*slot) * BLOCK + offset % chunk, &piece[..n])?;
                offset += n as u64;
                piece = &piece[n..];
            }
            Ok(())
        })?;
        self.chunked = true;
        let mut list = xattrs.to_vec();
        list.extend(map.iter().flat_map(|block| block.to_le_bytes()));
        let inode = Inode { layout: Layout::Chunks(bits), size: entry.size, ..inode(entry) };
        let compact = inode.is_compact(self.time.unwrap_or_default());
        let slot = self.image.slot(Inode::bytes(compact) + list.len() as u64, 0)?;
        self.image.put_meta(slot.at, &inode.encode(compact, xattrs.len()))?;
        self.image.put_meta(slot.at + Inode::bytes(compact), &list)?;
        self.inodes += 1;
        self.name(to.0, to.1, What::Other(format::file_type(inode.mode)), slot.at / SLOT, compact)
    }

    // --- directories, when all names are known

    fn place(&mut self, dir: &Dir, size: u64, subdirs: u32, is_root: bool) -> Result<Placed> {
        let default = Meta { mode: 0o755, uid: 0, gid: 0, mtime: self.time.unwrap_or_default(), xattrs: Vec::new() };
        let meta = dir.meta.as_deref().unwrap_or(&default);
        let xattrs = if dir.opaque { format::with_opaque(meta.xattrs.clone())? } else { meta.xattrs.clone() };
        let mut inode = Inode {
            mode: format::mode_of(super::tar::What::Directory) | meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            mtime: meta.mtime,
            links: subdirs.saturating_add(2),
            size,
            data: 0,
            layout: Layout::Plain,
        };
        let compact = inode.is_compact(self.time.unwrap_or_default());
        let head = Inode::bytes(compact) + xattrs.len() as u64;
        if is_root {
            if ROOT + head > BLOCK {
                return Err(exhausted("more extended attributes on the root than 2 KiB"));
            }
            inode.data = self.image.blocks(size)?;
            return Ok(Placed { at: ROOT, inode, compact, xattrs });
        }
        let full = size - size % BLOCK;
        if full > 0 {
            inode.data = self.image.blocks(full)?;
        }
        let slot = self.image.slot(head, size - full)?;
        if slot.inline {
            inode.layout = Layout::Inline;
        } else if full == 0 {
            inode.data = slot.block.unwrap_or_default();
        }
        Ok(Placed { at: slot.at, inode, compact, xattrs })
    }

    /// Names of a directory in the order of the format.
    fn sorted(&self, dir: u32) -> Vec<u32> {
        let mut children: Vec<(&[u8], u32)> = self.nodes.children(dir).map(|(number, node)| (self.nodes.name(node), number)).collect();
        children.sort_unstable();
        children.into_iter().map(|(_, number)| number).collect()
    }

    fn place_all(&mut self) -> Result<Vec<Option<Placed>>> {
        let mut placed = Vec::with_capacity(self.nodes.dirs.len());
        for number in 0..self.nodes.dirs.len() {
            let Some(dir) = self.nodes.dirs.get(number).filter(|d| d.live).cloned() else {
                placed.push(None);
                continue;
            };
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let mut lengths: Vec<(&[u8], usize)> = self.nodes.children(number).map(|(_, node)| self.nodes.name(node)).map(|n| (n, n.len())).collect();
            lengths.extend([(b".".as_slice(), 1), (b"..".as_slice(), 2)]);
            lengths.sort_unstable();
            let size = format::directory_size(lengths.into_iter().map(|(_, n)| n));
            let subdirs = self.nodes.children(number).filter(|(_, n)| matches!(n.what, What::Directory(_))).count();
            placed.push(Some(self.place(&dir, size, u32::try_from(subdirs).unwrap_or(u32::MAX), number == ROOT_DIR)?));
            self.inodes += 1;
        }
        Ok(placed)
    }

    fn write_all(&mut self, placed: &[Option<Placed>]) -> Result<Vec<u8>> {
        let nid = |dir: u32| placed.get(dir as usize).and_then(Option::as_ref).map_or(0, |p| p.at / SLOT);
        let mut root = Vec::new();
        for (number, here) in placed.iter().enumerate() {
            let (Some(here), Some(dir)) = (here, self.nodes.dirs.get(number)) else { continue };
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let mut entries = vec![Dirent { name: b".", nid: nid(number), kind: 2 }, Dirent { name: b"..", nid: nid(dir.parent), kind: 2 }];
            for child in self.sorted(number) {
                let Some(node) = self.nodes.node(child) else { continue };
                let (nid, kind) = match node.what {
                    What::Directory(dir) => (nid(dir), 2),
                    What::Symlink { .. } => (node.nid, 7),
                    What::Whiteout => (node.nid, 3),
                    What::Other(kind) => (node.nid, kind),
                    What::Gone => continue,
                };
                entries.push(Dirent { name: self.nodes.name(node), nid, kind });
            }
            entries.sort_unstable_by_key(|e| e.name);
            let content = format::directory(&entries);
            let inline = here.inode.layout == Layout::Inline;
            let (blocks, tail) = content.split_at(if inline { content.len() - content.len() % BLOCK as usize } else { content.len() });
            if !blocks.is_empty() {
                self.image.put_data(u64::from(here.inode.data) * BLOCK, blocks)?;
            }
            let mut meta = here.inode.encode(here.compact, here.xattrs.len());
            meta.extend_from_slice(&here.xattrs);
            meta.extend_from_slice(tail);
            if number == ROOT_DIR { root = meta } else { self.image.put_meta(here.at, &meta)? }
        }
        Ok(root)
    }

    fn patch_links(&mut self) -> Result<()> {
        for (nid, (count, compact)) in std::mem::take(&mut self.links) {
            let (offset, width) = Inode::links_at(compact);
            if let Some(bytes) = count.to_le_bytes().get(..width) {
                self.image.patch(nid * SLOT + offset, bytes)?;
            }
        }
        Ok(())
    }
}

/// An inode has one name less.
fn unname(links: &mut BTreeMap<u64, (u32, bool)>, lost: &Node) {
    if let Some((count, _)) = links.get_mut(&lost.nid) {
        *count = count.saturating_sub(1);
    }
}

/// An inode with the metadata of an entry, one name and no data.
fn inode(entry: &Entry) -> Inode {
    let mode = format::mode_of(entry.what) | entry.mode;
    Inode { mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, links: 1, size: 0, data: 0, layout: Layout::Plain }
}

impl Sink for Erofs {
    fn root(&mut self, entry: &Entry) -> Result<()> {
        self.meta(ROOT_DIR, entry)
    }

    fn directory(&mut self, Place { parent, name, .. }: Place<'_>, entry: &Entry) -> Result<()> {
        self.time(entry);
        let above = self.parent(parent)?;
        let found = self.nodes.find(above, name).map(|(_, node)| node.what);
        if let Some(What::Directory(dir)) = found {
            return self.meta(dir, entry);
        }
        self.vacate(above, name);
        let dir = self.nodes.make(above, name)?;
        // Hidden and made anew by one layer: nothing of lower layers may shine through.
        self.nodes.dir(dir)?.opaque = found == Some(What::Whiteout);
        self.meta(dir, entry)
    }

    fn file(&mut self, Place { parent, name, .. }: Place<'_>, entry: &Entry, data: &mut Data<'_>) -> Result<()> {
        self.time(entry);
        let dir = self.parent(parent)?;
        self.vacate(dir, name);
        let xattrs = format::xattrs(entry)?;
        if entry.sparse.is_some() && entry.size > 0 {
            return self.sparse((dir, name), entry, &xattrs, data);
        }
        let full = entry.size - entry.size % BLOCK;
        let first = if full > 0 { self.image.blocks(full)? } else { 0 };
        let mut tail = Vec::new();
        let image = &mut self.image;
        data(&mut |offset, piece| {
            let (blocks, rest) = piece.split_at(piece.len().min(usize::try_from(full.saturating_sub(offset)).unwrap_or(usize::MAX)));
            tail.extend_from_slice(rest);
            if blocks.is_empty() { Ok(()) } else { image.put_data(u64::from(first) * BLOCK + offset, blocks) }
        })?;
        let inode = Inode { size: entry.size, data: first, ..inode(entry) };
        self.put((dir, name), What::Other(format::file_type(inode.mode)), inode, &xattrs, &tail)
    }

    fn symlink(&mut self, Place { parent, name, .. }: Place<'_>, entry: &Entry) -> Result<()> {
        self.time(entry);
        let dir = self.parent(parent)?;
        self.vacate(dir, name);
        let what = What::Symlink { at: self.nodes.keep(&entry.link)?, length: u16::try_from(entry.link.len()).map_err(|_| bad("malformed link target"))? };
        let inode = Inode { mode: 0o120_777, size: entry.link.len() as u64, ..inode(entry) };
        self.put((dir, name), what, inode, &format::xattrs(entry)?, &entry.link)
    }

    fn node(&mut self, Place { parent, name, .. }: Place<'_>, entry: &Entry) -> Result<()> {
        self.time(entry);
        let dir = self.parent(parent)?;
        self.vacate(dir, name);
        let data = if entry.what == super::tar::What::Fifo { 0 } else { format::device(entry.device) };
        let inode = Inode { data, ..inode(entry) };
        let is_whiteout = entry.what == super::tar::What::Char && data == 0;
        self.marks |= is_whiteout;
        let what = if is_whiteout { What::Whiteout } else { What::Other(format::file_type(inode.mode)) };
        self.put((dir, name), what, inode, &format::xattrs(entry)?, &[])
    }

    fn hardlink(&mut self, Place { parent, name, path }: Place<'_>, target: Place<'_>) -> Result<()> {
        let dir = self.parent(parent)?;
        let from = self.nodes.existing(target.parent)?;
        if self.nodes.find(from, target.name).is_some() {
            self.vacate(dir, name);
        }
        let missing = || Error::new(Kind::DataLoss, format!("link to {}, which this layer does not have", show(target.path)));
        let (_, node) = self.nodes.find(from, target.name).ok_or_else(missing)?;
        if matches!(node.what, What::Directory(_)) {
            return Err(Error::new(Kind::DataLoss, format!("link {} to a directory", show(path))));
        }
        let (count, _) = self.links.entry(node.nid).or_insert((1, node.compact));
        *count += 1;
        if node.compact && *count > 0xffff {
            return Err(exhausted("more than 65535 names of one file"));
        }
        self.name(dir, name, node.what, node.nid, node.compact)
    }

    fn whiteout(&mut self, Place { parent, name, .. }: Place<'_>) -> Result<()> {
        self.marks = true;
        let dir = self.parent(parent)?;
        match self.nodes.find(dir, name).map(|(_, node)| node.what) {
            None => {
                let mtime = self.time.unwrap_or_default();
                let inode = Inode { mode: 0o020_000, uid: 0, gid: 0, mtime, links: 1, size: 0, data: 0, layout: Layout::Plain };
                self.put((dir, name), What::Whiteout, inode, &[], &[])
            }
            // A whiteout hides lower layers only: what this layer has itself stays, but alone.
            Some(What::Directory(dir)) => {
                self.nodes.dir(dir)?.opaque = true;
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    fn opaque(&mut self, dir: &[u8]) -> Result<()> {
        self.marks = true;
        let dir = self.parent(dir)?;
        self.nodes.dir(dir)?.opaque = true;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Finished> {
        let placed = self.place_all()?;
        let root = self.write_all(&placed)?;
        self.patch_links()?;
        let blocks = u32::try_from(self.image.total()).map_err(|_| exhausted("an image of more than 16 TiB"))?;
        let first = format::first_block(self.inodes, blocks, self.time.unwrap_or_default(), self.chunked, &root);
        let bytes = self.image.finish(&first)?;
        let mut implied: Vec<String> = Vec::new();
        for (number, _) in self.nodes.dirs.iter().enumerate().filter(|(_, d)| d.live && d.meta.is_none()) {
            implied.extend(String::from_utf8(self.nodes.path(u32::try_from(number).unwrap_or(u32::MAX))));
        }
        implied.sort_unstable();
        let opaque_root = self.nodes.dirs.first().is_some_and(|d| d.opaque);
        Ok(Finished { usage: FsUsage { bytes, inodes: 1 }, opaque_root, implied, marks: self.marks, content: None })
    }
}

#[cfg(test)]
pub(super) mod tests;
