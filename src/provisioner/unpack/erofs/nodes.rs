//! The tree of a layer while it is written: names and where their inodes lie, in memory, because directories come last.
//!
//! An entry costs about 45 bytes and its name, a directory 100 more, all within [`MAX_TREE`].

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use crate::model::error::Result;
use crate::provisioner::unpack::names::follow;
use crate::provisioner::unpack::sink::{MAX_LINKS, bad, exhausted};

/// Bytes that the tree of one layer may take: room for the four million entries that a layer may have by default.
const MAX_TREE: usize = 256 << 20;
/// No node.
const NONE: u32 = u32::MAX;
/// The root's directory.
pub const ROOT_DIR: u32 = 0;

/// What a name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Removed.
    Gone,
    /// A directory, by its number.
    Directory(u32),
    /// A link, with the place of its target among the names.
    Symlink {
        /// Offset.
        at: u32,
        /// Length.
        length: u16,
    },
    /// Overlay's whiteout.
    Whiteout,
    /// Anything else, by its type as directory entries have it.
    Other(u8),
}

/// A name.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    dir: u32,
    next: u32,
    name: u32,
    length: u8,
    /// Its inode is of the small form.
    pub compact: bool,
    /// What it is.
    pub what: What,
    /// Its inode, unless a directory.
    pub nid: u64,
}

/// Metadata of a directory that the archive lists.
#[derive(Clone, Debug)]
pub struct Meta {
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: (i64, u32),
    /// Encoded attributes.
    pub xattrs: Vec<u8>,
}

/// A directory.
#[derive(Clone, Debug)]
pub struct Dir {
    /// The directory it is in; the root is in itself.
    pub parent: u32,
    /// Its name in that.
    pub node: u32,
    first: u32,
    /// Still part of the tree.
    pub live: bool,
    /// Hides what lower layers have in it.
    pub opaque: bool,
    /// What the archive says of it; `None` when it only uses it.
    pub meta: Option<Box<Meta>>,
}

/// The tree.
pub struct Nodes {
    names: Vec<u8>,
    nodes: Vec<Node>,
    /// All directories ever made, the root first.
    pub dirs: Vec<Dir>,
    index: HashTable<u32>,
    hasher: RandomState,
    /// Bytes of attributes.
    xattrs: usize,
}

/// Why a path leads to no directory.
enum Miss {
    Absent,
    Loop,
}

impl Nodes {
    /// A tree with a root.
    pub fn new() -> Self {
        let root = Dir { parent: ROOT_DIR, node: NONE, first: NONE, live: true, opaque: false, meta: None };
        Self { names: Vec::new(), nodes: Vec::new(), dirs: vec![root], index: HashTable::new(), hasher: RandomState::new(), xattrs: 0 }
    }

    /// A directory by its number.
    ///
    /// # Errors
    /// Never for a number that this tree gave.
    pub fn dir(&mut self, dir: u32) -> Result<&mut Dir> {
        self.dirs.get_mut(dir as usize).ok_or_else(|| bad("no such directory"))
    }

    /// The node of a number that [`Nodes::find`] or [`Nodes::enter`] gave.
    pub fn node(&self, node: u32) -> Option<&Node> {
        self.nodes.get(node as usize)
    }

    /// The same, to change.
    pub fn node_mut(&mut self, node: u32) -> Option<&mut Node> {
        self.nodes.get_mut(node as usize)
    }

    /// The name in a directory, if there is something.
    pub fn find(&self, dir: u32, name: &[u8]) -> Option<(u32, Node)> {
        let number = self.lookup(dir, name)?;
        self.node(number).filter(|n| n.what != What::Gone).map(|n| (number, *n))
    }

    fn lookup(&self, dir: u32, name: &[u8]) -> Option<u32> {
        let same = |n: &u32| self.node(*n).is_some_and(|node| node.dir == dir && self.name(node) == name);
        self.index.find(self.hasher.hash_one((dir, name)), same).copied()
    }

    /// The name of a node.
    pub fn name(&self, node: &Node) -> &[u8] {
        let at = node.name as usize;
        self.names.get(at..at + usize::from(node.length)).unwrap_or_default()
    }

    /// Names in a directory.
    pub fn children(&self, dir: u32) -> impl Iterator<Item = (u32, &Node)> {
        let mut next = self.dirs.get(dir as usize).map_or(NONE, |d| d.first);
        std::iter::from_fn(move || {
            let number = next;
            let node = self.node(number)?;
            next = node.next;
            Some((number, node))
        })
        .filter(|(_, n)| n.what != What::Gone)
    }

    /// Makes the name in the directory say `what`; there must be nothing, or what was [removed](Nodes::remove).
    ///
    /// # Errors
    /// `ResourceExhausted` when the tree is too large.
    pub fn enter(&mut self, dir: u32, name: &[u8], what: What, nid: u64) -> Result<u32> {
        if let Some(number) = self.lookup(dir, name) {
            if let Some(node) = self.node_mut(number) {
                (node.what, node.nid, node.compact) = (what, nid, false);
            }
            return Ok(number);
        }
        let length = u8::try_from(name.len()).map_err(|_| bad("name longer than NAME_MAX"))?;
        let at = self.keep(name)?;
        let number = u32::try_from(self.nodes.len()).map_err(|_| exhausted("too many names"))?;
        let next = std::mem::replace(&mut self.dir(dir)?.first, number);
        self.nodes.push(Node { dir, next, name: at, length, compact: false, what, nid });
        let (names, nodes, hasher) = (&self.names, &self.nodes, &self.hasher);
        let rehash = |n: &u32| {
            let node = nodes.get(*n as usize);
            node.map_or(0, |n| hasher.hash_one((n.dir, names.get(n.name as usize..n.name as usize + usize::from(n.length)).unwrap_or_default())))
        };
        self.index.insert_unique(hasher.hash_one((dir, name)), number, rehash);
        Ok(number)
    }

    /// Keeps bytes among the names.
    ///
    /// # Errors
    /// `ResourceExhausted` when the tree is too large.
    pub fn keep(&mut self, bytes: &[u8]) -> Result<u32> {
        let at = u32::try_from(self.names.len()).map_err(|_| exhausted("too many names"))?;
        self.names.extend_from_slice(bytes);
        self.check()?;
        Ok(at)
    }

    /// Counts attributes of directories, which stay in memory too.
    ///
    /// # Errors
    /// As [`Nodes::keep`].
    pub fn keep_xattrs(&mut self, bytes: usize) -> Result<()> {
        self.xattrs += bytes;
        self.check()
    }

    fn check(&self) -> Result<()> {
        let sizes = self.nodes.len() * (size_of::<Node>() + 8) + self.dirs.len() * (size_of::<Dir>() + size_of::<Meta>());
        if self.names.len() + self.xattrs + sizes > MAX_TREE { Err(exhausted("its names and attributes take more than 256 MiB")) } else { Ok(()) }
    }

    /// Makes a directory; there must be nothing of that name.
    ///
    /// # Errors
    /// As [`Nodes::enter`].
    pub fn make(&mut self, parent: u32, name: &[u8]) -> Result<u32> {
        let dir = u32::try_from(self.dirs.len()).map_err(|_| exhausted("too many directories"))?;
        let node = self.enter(parent, name, What::Directory(dir), 0)?;
        self.dirs.push(Dir { parent, node, first: NONE, live: true, opaque: false, meta: None });
        Ok(dir)
    }

    /// Removes a name and all below it; tells `lost` each name that is no directory.
    pub fn remove(&mut self, node: u32, mut lost: impl FnMut(&Node)) {
        let mut todo = vec![node];
        while let Some(number) = todo.pop() {
            let Some(node) = self.node_mut(number) else { continue };
            match std::mem::replace(&mut node.what, What::Gone) {
                What::Directory(dir) => {
                    todo.extend(self.children(dir).map(|(n, _)| n));
                    if let Some(dir) = self.dirs.get_mut(dir as usize) {
                        dir.live = false;
                    }
                }
                What::Gone => {}
                _ => lost(node),
            }
        }
    }

    /// The path of a directory from the root.
    pub fn path(&self, mut dir: u32) -> Vec<u8> {
        let mut parts = Vec::new();
        while let Some(found) = self.dirs.get(dir as usize)
            && dir != ROOT_DIR
        {
            parts.push(self.node(found.node).map_or(&[][..], |n| self.name(n)));
            dir = found.parent;
        }
        parts.reverse();
        parts.join(&b'/')
    }

    fn target(&self, at: u32, length: u16) -> &[u8] {
        self.names.get(at as usize..at as usize + usize::from(length)).unwrap_or_default()
    }

    /// Where a path leads, through links, as the kernel does it with this root.
    fn walk(&self, path: &[u8]) -> Result<u32, Miss> {
        let (mut todo, mut dir, mut links) = (Cow::Borrowed(path), ROOT_DIR, 0);
        let mut at = 0;
        while at < todo.len() {
            let end = todo[at..].iter().position(|b| *b == b'/').map_or(todo.len(), |n| at + n);
            let part = &todo[at..end];
            at = end + 1;
            match part {
                b"" | b"." => continue,
                b".." => {
                    dir = self.dirs.get(dir as usize).map_or(ROOT_DIR, |d| d.parent);
                    continue;
                }
                _ => {}
            }
            match self.find(dir, part).map(|(_, node)| node.what) {
                Some(What::Directory(next)) => dir = next,
                Some(What::Symlink { at: target, length }) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Miss::Loop);
                    }
                    let target = self.target(target, length);
                    if target.starts_with(b"/") {
                        dir = ROOT_DIR;
                    }
                    todo = Cow::Owned([target, b"/", todo.get(at..).unwrap_or_default()].concat());
                    at = 0;
                }
                _ => return Err(Miss::Absent),
            }
        }
        Ok(dir)
    }

    /// Where a path leads; it must be there.
    ///
    /// # Errors
    /// `DataLoss` when it is not.
    pub fn existing(&self, path: &[u8]) -> Result<u32> {
        self.walk(path).map_err(|_| bad("no such directory in this layer"))
    }

    /// Where a path leads; what is missing of it is made, through links that this layer planted. Tells `lost` each whiteout that gives
    /// way to a directory.
    ///
    /// # Errors
    /// `DataLoss` when a file is in the way or links go in circles, `ResourceExhausted` when the tree is too large.
    pub fn parents(&mut self, path: &[u8], lost: &mut dyn FnMut(&Node)) -> Result<u32> {
        let mut links = 0;
        self.make_parents(path, &mut links, lost)
    }

    fn make_parents(&mut self, path: &[u8], links: &mut usize, lost: &mut dyn FnMut(&Node)) -> Result<u32> {
        match self.walk(path) {
            Ok(dir) => return Ok(dir),
            Err(Miss::Loop) => return Err(bad("too many symbolic links")),
            Err(Miss::Absent) => {}
        }
        let mut above = ROOT_DIR;
        let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| i).chain([path.len()]);
        for end in ends {
            let here = path.get(..end).unwrap_or_default();
            let name = here.rsplit(|b| *b == b'/').next().unwrap_or_default();
            match self.walk(here) {
                Ok(dir) => {
                    above = dir;
                    continue;
                }
                Err(Miss::Loop) => return Err(bad("too many symbolic links")),
                Err(Miss::Absent) => {}
            }
            above = match self.find(above, name) {
                None => self.make(above, name)?,
                // It dangles within this layer; the directory it names may come from a lower one.
                Some((_, Node { what: What::Symlink { at, length }, .. })) => {
                    *links += 1;
                    if *links > MAX_LINKS {
                        return Err(bad("too many symbolic links"));
                    }
                    let link = [&self.path(above), b"/".as_slice(), name].concat();
                    let target = follow(&link, self.target(at, length));
                    self.make_parents(&target, links, lost)?;
                    self.existing(here)?
                }
                Some((node, Node { what: What::Whiteout, .. })) => {
                    self.remove(node, &mut *lost);
                    let dir = self.make(above, name)?;
                    self.dir(dir)?.opaque = true;
                    dir
                }
                Some(_) => return Err(bad("a parent is not a directory")),
            };
        }
        Ok(above)
    }
}
