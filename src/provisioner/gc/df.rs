//! Names every byte of the store: each inode below its directory is counted once and given to an owner; what no rule claims is
//! unexplained, and that is a fault. Sum of the named + unexplained = what `du -x` says of the directory.
//!
//! Owners are told by place and memory at the moment an entry is looked at, so running pulls and creates are named too.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::model::error::{Act, Result};
use crate::model::image::FsUsage;
use crate::model::{Digest, ImageId};
use crate::provisioner::engine::Inner;
use crate::provisioner::usage::{self, Seen};

/// Form of the document.
pub const VERSION: u32 = 1;

/// Who a part of the store belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// The store's own directories.
    Store,
    /// A layer.
    Layer(Digest),
    /// An image's record.
    Image(ImageId),
    /// A container's root filesystem.
    Container(String),
    /// The record of what a container holds.
    Lease(String),
    /// A pull, import or create that is under way.
    Running,
    /// Half-made or half-removed; the next collection takes it.
    Debris,
    /// A damaged layer that was replaced and that containers still use.
    Damaged,
    /// Nobody known. A fault of ours, or somebody else's file.
    Unexplained,
}

/// One part of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Path below the store's directory; empty is the directory itself.
    pub path: PathBuf,
    /// Whose.
    pub owner: Owner,
    /// What it occupies.
    #[serde(flatten)]
    pub usage: FsUsage,
    /// What it should occupy by its record, where that is something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recorded: Option<FsUsage>,
}

/// An image's share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Which.
    pub id: ImageId,
    /// Its names.
    pub names: Vec<String>,
    /// What removing it alone would free.
    pub alone: FsUsage,
    /// What it refers to, shared or not.
    pub all: FsUsage,
    /// Containers that run from it.
    pub containers: Vec<String>,
    /// Last use in nanoseconds since the epoch.
    pub used: i64,
}

/// The whole store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// The store's directory.
    pub store: PathBuf,
    /// All parts together.
    pub total: FsUsage,
    /// The part that no owner is known of. 0, or something is wrong.
    pub unexplained: FsUsage,
    /// Every part.
    pub parts: Vec<Part>,
    /// Images and how they share layers.
    pub images: Vec<Share>,
    /// Damaged records, beside the store and not counted in it.
    pub quarantine: FsUsage,
    /// Bytes that the file system has left for this.
    pub available: u64,
    /// Bytes of the file system.
    pub capacity: u64,
}

/// How deep to count.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Everything.
    All,
    /// Only what is unexplained: claimed parts are passed over.
    Unexplained,
}

impl Inner {
    /// Counts the whole store. Blocks, for as long as a walk over all its files takes.
    ///
    /// # Errors
    /// I/O failures.
    pub(in crate::provisioner) fn df(&self) -> Result<Report> {
        let parts = self.census(Depth::All)?;
        let sum = |of: &dyn Fn(&Part) -> bool| parts.iter().filter(|p| of(p)).fold(FsUsage::default(), |sum, p| usage::add(sum, p.usage));
        let store = self.layout.store();
        let fs = rustix::fs::statvfs(&store).act("ask the file system of", store.display())?;
        Ok(Report {
            version: VERSION,
            total: sum(&|_| true),
            unexplained: sum(&|p| p.owner == Owner::Unexplained),
            images: self.shares()?,
            quarantine: usage::count(&self.layout.quarantine())?,
            available: fs.f_bavail * fs.f_frsize,
            capacity: fs.f_blocks * fs.f_frsize,
            store,
            parts,
        })
    }

    /// Counts only what no owner is known of: a few directories are listed, no tree is walked. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub(in crate::provisioner) fn unexplained(&self) -> Result<FsUsage> {
        let parts = self.census(Depth::Unexplained)?;
        Ok(parts.iter().filter(|p| p.owner == Owner::Unexplained).fold(FsUsage::default(), |sum, p| usage::add(sum, p.usage)))
    }

    fn shares(&self) -> Result<Vec<Share>> {
        let world = self.world(false)?;
        let share = |entry: &super::world::Entry| Share {
            id: entry.image.id.clone(),
            names: super::plan::names(entry),
            alone: super::plan::References::count(&world).drop_image(entry).iter().fold(entry.record, |sum, p| usage::add(sum, p.usage)),
            all: world.usage_of(entry),
            containers: world.leases.iter().filter(|l| l.image == entry.image.id).map(|l| l.container.clone()).collect(),
            used: entry.used,
        };
        Ok(world.images.iter().map(share).collect())
    }

    fn census(&self, depth: Depth) -> Result<Vec<Part>> {
        let layout = &self.layout;
        let mut census = Census { inner: self, store: layout.store(), depth, seen: Seen::default(), parts: Vec::new(), layers: self.layers.directories() };
        census.own(&layout.store(), Owner::Store);
        let known = [layout.layers(), layout.images(), layout.leases(), layout.rootfs_all(), layout.staging(), layout.damaged()];
        for path in list(&layout.store())? {
            if known.contains(&path) {
                census.own(&path, Owner::Store);
                for path in list(&path)? {
                    census.whole(&path)?;
                }
            } else {
                census.whole(&path)?;
            }
        }
        Ok(census.parts)
    }

    /// Whom an entry of one of the store's directories belongs to.
    pub(super) fn owner(&self, path: &Path, layers: &HashMap<OsString, (Digest, bool)>) -> Owner {
        let layout = &self.layout;
        let name = path.file_name().unwrap_or_default();
        let text = name.to_str().unwrap_or_default();
        let stem = text.strip_suffix(".json");
        match path.parent() {
            Some(dir) if dir == layout.layers() => {
                let found = layers.get(name).cloned().or_else(|| self.layers.directories().remove(name));
                match found {
                    Some((_, true)) => Owner::Debris,
                    Some((id, false)) => Owner::Layer(id),
                    None => Owner::Unexplained,
                }
            }
            Some(dir) if dir == layout.images() => match stem.and_then(|hex| self.images.look_up(hex)) {
                Some(image) if layout.image(&image.id) == path => Owner::Image(image.id.clone()),
                _ if is_temporary(text) => Owner::Running,
                _ => Owner::Unexplained,
            },
            Some(dir) if dir == layout.leases() => match stem {
                Some(id) if self.leases.get(id).is_some() => Owner::Lease(id.to_owned()),
                _ if is_temporary(text) => Owner::Running,
                _ => Owner::Unexplained,
            },
            Some(dir) if dir == layout.rootfs_all() && !self.is_debris(path) => Owner::Container(text.to_owned()),
            Some(dir) if dir == layout.staging() && !self.is_debris(path) => Owner::Running,
            Some(dir) if dir == layout.rootfs_all() || dir == layout.staging() => Owner::Debris,
            Some(dir) if dir == layout.damaged() && self.is_debris(path) => Owner::Debris,
            Some(dir) if dir == layout.damaged() && self.layers.replaced().iter().any(|r| r.name == text) => Owner::Damaged,
            _ => Owner::Unexplained,
        }
    }
}

/// The name under which records are written before they are renamed into place.
fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".new")
}

/// Paths in a directory, sorted: hard links go to the first owner, always the same.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).act("list", dir.display())? {
        paths.push(entry.act("list", dir.display())?.path());
    }
    paths.sort();
    Ok(paths)
}

struct Census<'a> {
    inner: &'a Inner,
    store: PathBuf,
    depth: Depth,
    seen: Seen,
    parts: Vec<Part>,
    layers: HashMap<OsString, (Digest, bool)>,
}

impl Census<'_> {
    fn push(&mut self, path: &Path, owner: Owner, usage: FsUsage) {
        let recorded = match &owner {
            Owner::Layer(id) => self.inner.layers.size(id).filter(|r| *r != usage && self.depth == Depth::All),
            _ => None,
        };
        let path = path.strip_prefix(&self.store).unwrap_or(path).to_owned();
        self.parts.push(Part { path, owner, usage, recorded });
    }

    /// A directory without what is in it.
    fn own(&mut self, path: &Path, owner: Owner) {
        self.push(path, owner, usage::own(path));
    }

    /// A part with everything in it.
    fn whole(&mut self, path: &Path) -> Result<()> {
        let owner = self.inner.owner(path, &self.layers);
        if self.depth == Depth::Unexplained && owner != Owner::Unexplained {
            return Ok(());
        }
        let usage = usage::count_once(path, &mut self.seen)?;
        if usage == FsUsage::default() {
            // Gone between listing and looking.
            return Ok(());
        }
        // Looked at again: who was at work when it was listed may have ended before it was counted, and the other way round.
        let owner = if owner == Owner::Unexplained { self.inner.owner(path, &HashMap::new()) } else { owner };
        self.push(path, owner, usage);
        Ok(())
    }
}

/// Sum by kind of owner, in a fixed order: name, parts, usage.
pub fn summary(report: &Report) -> Vec<(&'static str, usize, FsUsage)> {
    let kind = |owner: &Owner| match owner {
        Owner::Layer(_) => "layers",
        Owner::Container(_) => "root filesystems",
        Owner::Image(_) | Owner::Lease(_) => "records",
        Owner::Store => "directories",
        Owner::Running => "running work",
        Owner::Damaged => "replaced layers in use",
        Owner::Debris => "debris",
        Owner::Unexplained => "unexplained",
    };
    let order = ["layers", "root filesystems", "records", "directories", "running work", "replaced layers in use", "debris", "unexplained"];
    let of = |name: &&'static str| {
        let parts: Vec<&Part> = report.parts.iter().filter(|p| kind(&p.owner) == *name).collect();
        (*name, parts.len(), parts.iter().fold(FsUsage::default(), |sum, p| usage::add(sum, p.usage)))
    };
    order.iter().map(of).collect()
}

/// Ids of the layers that the report names.
pub fn layers(report: &Report) -> HashSet<&Digest> {
    report.parts.iter().filter_map(|p| if let Owner::Layer(id) = &p.owner { Some(id) } else { None }).collect()
}
