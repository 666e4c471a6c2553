//! EROFS on disk, as far as we write it (Linux `fs/erofs/erofs_fs.h`, Documentation/filesystems/erofs.rst): numbers are
//! little-endian, blocks have 4096 bytes, node ids count 32-byte slots from the start of the image.

use crate::model::error::Result;
use crate::provisioner::unpack::sink::{bad, exhausted};
use crate::provisioner::unpack::tar::{Entry, What};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Bytes of a slot, the unit of node ids.
pub const SLOT: u64 = 32;
/// Where the superblock lies.
pub const SUPER: u64 = 1024;
/// Where the root's inode lies: behind the superblock, because its node id has 16 bits only.
pub const ROOT: u64 = SUPER + 128;
/// Bytes of a directory entry without its name.
const DIRENT: usize = 12;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Superblock checksum; times are modification times.
const COMPAT: u32 = 0x1 | 0x2;
/// Files by chunks.
const INCOMPAT_CHUNKED: u32 = 0x4;
/// A chunk that is a hole.
pub const HOLE: u32 = u32::MAX;

/// How the data of a file lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Blocks one after the other.
    Plain,
    /// The same, the last partial block right behind the inode.
    Inline,
    /// Chunks of `4096 << bits`, their first blocks listed behind the inode.
    Chunks(u16),
}

/// Everything of an inode but its extended attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Type and permissions as in `stat`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: (i64, u32),
    /// Names.
    pub links: u32,
    /// Bytes.
    pub size: u64,
    /// First block of data, or device number.
    pub data: u32,
    /// How they lie.
    pub layout: Layout,
}

impl Inode {
    /// Whether it fits the small form, which has the time of the whole image.
    pub fn is_compact(&self, time: (i64, u32)) -> bool {
        self.mtime == time && self.uid <= 0xffff && self.gid <= 0xffff && self.size <= u64::from(u32::MAX) && self.links <= 0xffff
    }

    /// Bytes of the form.
    pub fn bytes(compact: bool) -> u64 {
        if compact { 32 } else { 64 }
    }

    /// Offset and width of the number of names in the form.
    pub fn links_at(compact: bool) -> (u64, usize) {
        if compact { (6, 2) } else { (44, 4) }
    }

    /// The form. `xattrs` is the length of the attributes that follow.
    pub fn encode(&self, compact: bool, xattrs: usize) -> Vec<u8> {
        let (layout, data) = match self.layout {
            Layout::Plain => (0u16, self.data),
            Layout::Inline => (2, self.data),
            Layout::Chunks(bits) => (4, u32::from(bits)),
        };
        // Counted in units of 4 behind a header of 12, which counts as one.
        let xattrs = if xattrs == 0 { 0 } else { (xattrs - 12) / 4 + 1 };
        let mut out = Vec::with_capacity(64);
        put(&mut out, &(layout << 1 | u16::from(!compact)).to_le_bytes());
        put(&mut out, &low16(xattrs as u64).to_le_bytes());
        put(&mut out, &low16(u64::from(self.mode)).to_le_bytes());
        if compact {
            put(&mut out, &low16(u64::from(self.links)).to_le_bytes());
            put(&mut out, &low32(self.size).to_le_bytes());
            put(&mut out, &[0; 4]);
            put(&mut out, &data.to_le_bytes());
            put(&mut out, &[0; 4]);
            put(&mut out, &low16(u64::from(self.uid)).to_le_bytes());
            put(&mut out, &low16(u64::from(self.gid)).to_le_bytes());
            put(&mut out, &[0; 4]);
        } else {
            put(&mut out, &[0; 2]);
            put(&mut out, &self.size.to_le_bytes());
            put(&mut out, &data.to_le_bytes());
            put(&mut out, &[0; 4]);
            put(&mut out, &self.uid.to_le_bytes());
            put(&mut out, &self.gid.to_le_bytes());
            put(&mut out, &self.mtime.0.to_le_bytes());
            put(&mut out, &self.mtime.1.to_le_bytes());
            put(&mut out, &self.links.to_le_bytes());
            put(&mut out, &[0; 16]);
        }
        out
    }
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
}

fn low16(n: u64) -> u16 {
    (n & 0xffff) as u16
}

fn low32(n: u64) -> u32 {
    (n & 0xffff_ffff) as u32
}

/// A device number as inodes have it.
pub fn device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The first block of the image, checksum included. `inodes` and `blocks` are totals; `time` is that of compact inodes.
pub fn first_block(inodes: u64, blocks: u32, time: (i64, u32), chunked: bool, root: &[u8]) -> Vec<u8> {
    let mut block = vec![0u8; BLOCK as usize];
    let base = SUPER as usize;
    let mut set = |at: usize, bytes: &[u8]| block[base + at..base + at + bytes.len()].copy_from_slice(bytes);
    set(0, &MAGIC.to_le_bytes());
    set(8, &COMPAT.to_le_bytes());
    set(12, &[12]);
    set(14, &low16(ROOT / SLOT).to_le_bytes());
    set(16, &inodes.to_le_bytes());
    set(24, &time.0.to_le_bytes());
    set(32, &time.1.to_le_bytes());
    set(36, &blocks.to_le_bytes());
    set(64, b"mesocri layer");
    set(80, &if chunked { INCOMPAT_CHUNKED } else { 0 }.to_le_bytes());
    set(128, root);
    let checksum = crc32c(&block[base..]);
    block[base + 4..base + 8].copy_from_slice(&checksum.to_le_bytes());
    block
}

/// CRC-32C with initial ones and no final inversion, bit by bit: it sees 3 KiB a layer.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }))
}

/// One name of a directory.
#[derive(Clone, Copy, Debug)]
pub struct Dirent<'a> {
    /// Name.
    pub name: &'a [u8],
    /// Node id.
    pub nid: u64,
    /// Type, see [`file_type`].
    pub kind: u8,
}

/// Bytes of a directory whose sorted names have these lengths.
pub fn directory_size(names: impl Iterator<Item = usize>) -> u64 {
    let (mut blocks, mut used) = (0u64, 0usize);
    for name in names {
        let more = DIRENT + name;
        if used + more > BLOCK as usize {
            blocks += 1;
            used = 0;
        }
        used += more;
    }
    blocks * BLOCK + used as u64
}

/// A directory's content: `entries` are sorted by name. Each block has its entries, then their names; all blocks but the
/// last are padded.
pub fn directory(entries: &[Dirent<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let count = rest.iter().take_while(|e| (used + DIRENT + e.name.len() <= BLOCK as usize).then(|| used += DIRENT + e.name.len()).is_some()).count();
        let (here, more) = rest.split_at(count.max(1));
        let mut name_at = here.len() * DIRENT;
        for entry in here {
            put(&mut out, &entry.nid.to_le_bytes());
            put(&mut out, &low16(name_at as u64).to_le_bytes());
            put(&mut out, &[entry.kind, 0]);
            name_at += entry.name.len();
        }
        for entry in here {
            put(&mut out, entry.name);
        }
        if !more.is_empty() {
            out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        }
        rest = more;
    }
    out
}

/// The type of a mode as directory entries have it.
pub fn file_type(mode: u32) -> u8 {
    match mode & 0o170_000 {
        0o100_000 => 1,
        0o040_000 => 2,
        0o020_000 => 3,
        0o060_000 => 4,
        0o010_000 => 5,
        0o120_000 => 7,
        _ => 0,
    }
}

/// The type bits that an entry makes.
pub fn mode_of(what: What) -> u32 {
    match what {
        What::File | What::Hardlink => 0o100_000,
        What::Directory => 0o040_000,
        What::Symlink => 0o120_000,
        What::Char => 0o020_000,
        What::Block => 0o060_000,
        What::Fifo => 0o010_000,
    }
}

/// Namespaces of attributes that this format and the kernel know, with their numbers.
const PREFIXES: &[(&[u8], u8)] = &[(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
const ACLS: &[(&[u8], u8)] = &[(b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3)];

/// The attributes that follow an inode, empty for none. What the kernel would refuse on such a file of any file system is left
/// out or refused as the directory form does it.
///
/// # Errors
/// `DataLoss` for malformed capabilities and access lists, `ResourceExhausted` for more than the format carries.
pub fn xattrs(entry: &Entry) -> Result<Vec<u8>> {
    let mut kept: Vec<(u8, &[u8], &[u8])> = Vec::new();
    for (name, value) in super::super::sink::xattrs(entry) {
        let Some((index, rest)) = number(name, entry.what) else { continue };
        check(name, rest, index, value)?;
        // The last of one name counts, as with setxattr(2).
        kept.retain(|(i, n, _)| (*i, *n) != (index, rest));
        kept.push((index, rest, value));
    }
    encode(Vec::new(), &kept)
}

/// These attributes with the mark of a directory that hides what lower layers have in it.
///
/// # Errors
/// As [`xattrs`].
pub fn with_opaque(xattrs: Vec<u8>) -> Result<Vec<u8>> {
    encode(xattrs, &[(4, b"overlay.opaque", b"y")])
}

fn encode(mut out: Vec<u8>, more: &[(u8, &[u8], &[u8])]) -> Result<Vec<u8>> {
    if more.is_empty() {
        return Ok(out);
    }
    out.resize(out.len().max(12), 0);
    for (index, name, value) in more {
        let lengths = (u8::try_from(name.len()), u16::try_from(value.len()));
        let (Ok(name_length), Ok(value_length)) = lengths else { return Err(exhausted("an extended attribute of more than 65535 bytes")) };
        put(&mut out, &[name_length, *index]);
        put(&mut out, &value_length.to_le_bytes());
        put(&mut out, name);
        put(&mut out, value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    // The count of units has 16 bits.
    if (out.len() - 12) / 4 + 1 > 0xffff { Err(exhausted("more than 256 KiB of extended attributes")) } else { Ok(out) }
}

/// Number and rest of a name; `None` for what the kernel does not keep on such a file.
fn number(name: &[u8], what: What) -> Option<(u8, &[u8])> {
    if let Some((_, index)) = ACLS.iter().find(|(acl, _)| *acl == name) {
        let wanted = what != What::Symlink && (*index == 2 || what == What::Directory);
        return wanted.then_some((*index, &[]));
    }
    let (prefix, index) = PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix))?;
    if *index == 1 && !matches!(what, What::File | What::Directory) {
        return None;
    }
    Some((*index, name.get(prefix.len()..)?))
}

fn check(name: &[u8], rest: &[u8], index: u8, value: &[u8]) -> Result<()> {
    let revision = value.get(..4).map(|v| u32::from_le_bytes([v[0], v[1], v[2], v[3]]));
    let is_capability = |length, wanted| value.len() == length && revision.is_some_and(|r| r & !1 == wanted);
    if name == b"security.capability" && !is_capability(20, 0x0200_0000) && !is_capability(24, 0x0300_0000) {
        return Err(bad("malformed file capabilities"));
    }
    if index & !1 == 2 && (revision != Some(2) || value.len() % 8 != 4) {
        return Err(bad("malformed access control list"));
    }
    if index & !1 != 2 && rest.is_empty() || name.len() > 255 {
        return Err(bad("malformed name of an extended attribute"));
    }
    Ok(())
}
