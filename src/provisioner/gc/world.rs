//! A picture of the store, as a plan sees it: taken from memory, except for debris, which is looked for on disk.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use crate::model::Digest;
use crate::model::error::{Act, Result};
use crate::model::image::{FsUsage, Image};
use crate::provisioner::engine::Inner;
use crate::provisioner::leases::Lease;
use crate::provisioner::usage;
use crate::stdx::clock::now_ns;

/// Everything that decides what may go.
pub struct World {
    /// Directory of the store.
    pub store: PathBuf,
    /// When it was taken, in nanoseconds since the epoch.
    pub now: i64,
    /// All images.
    pub images: Vec<Entry>,
    /// All layers, with what they occupy.
    pub layers: HashMap<Digest, FsUsage>,
    /// Layers held by work that is under way.
    pub held: HashSet<Digest>,
    /// What containers hold.
    pub leases: Vec<Arc<Lease>>,
    /// What crashes left, by path below the store.
    pub debris: Vec<(PathBuf, FsUsage)>,
    /// Patterns of the configuration: never collected, and said so to the kubelet.
    pub pinned: Vec<String>,
    /// Patterns of the configuration: never collected.
    pub excluded: Vec<String>,
}

/// One image.
pub struct Entry {
    /// As recorded.
    pub image: Arc<Image>,
    /// What its record occupies.
    pub record: FsUsage,
    /// Last use in nanoseconds since the epoch.
    pub used: i64,
    /// Last time somebody looked it up by name or used it.
    pub wanted: i64,
}

impl World {
    /// An image's record and all its layers, shared or not.
    pub fn usage_of(&self, entry: &Entry) -> FsUsage {
        let layers: HashSet<&Digest> = entry.image.layers.iter().map(|l| &l.diff_id).collect();
        layers.into_iter().filter_map(|id| self.layers.get(id)).fold(entry.record, |sum, u| usage::add(sum, *u))
    }

    /// The image with this id.
    pub fn image(&self, id: &crate::model::ImageId) -> Option<&Entry> {
        self.images.iter().find(|e| e.image.id == *id)
    }
}

impl Inner {
    /// Takes a picture. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub(in crate::provisioner) fn world(&self, with_debris: bool) -> Result<World> {
        let now = now_ns();
        let entry = |(image, stamps): (Arc<Image>, Arc<crate::provisioner::images::Stamps>)| Entry {
            record: usage::own(&self.layout.image(&image.id)),
            used: stamps.used(),
            wanted: stamps.wanted(),
            image,
        };
        Ok(World {
            store: self.layout.store(),
            now,
            images: self.images.stamped().into_iter().map(entry).collect(),
            layers: self.layers.sizes(),
            held: self.layers.held(),
            leases: self.leases.all(),
            debris: if with_debris { self.debris()? } else { Vec::new() },
            pinned: self.config.pinned.clone(),
            excluded: self.policy.excluded.clone(),
        })
    }

    /// What nobody works on in staging, and root filesystems without a container.
    fn debris(&self) -> Result<Vec<(PathBuf, FsUsage)>> {
        let store = self.layout.store();
        let mut debris = Vec::new();
        for dir in [self.layout.staging(), self.layout.rootfs_all(), self.layout.damaged()] {
            // Nothing was ever replaced: the last of them does not exist.
            if !dir.exists() {
                continue;
            }
            for entry in std::fs::read_dir(&dir).act("list", dir.display())? {
                let path = entry.act("list", dir.display())?.path();
                if self.is_debris(&path)
                    && let Ok(below) = path.strip_prefix(&store)
                {
                    debris.push((below.to_owned(), usage::count_once(&path, &mut usage::Seen::default())?));
                }
            }
        }
        debris.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(debris)
    }

    /// Whether the path, directly in staging, among the root filesystems or the replaced layers, belongs to nobody.
    pub(in crate::provisioner) fn is_debris(&self, path: &std::path::Path) -> bool {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return true };
        match path.parent() {
            Some(dir) if dir == self.layout.staging() => !self.layers.is_claimed(name),
            Some(dir) if dir == self.layout.rootfs_all() => self.leases.get(name).is_none() && !self.is_building(name),
            Some(dir) if dir == self.layout.damaged() => self.layers.replaced().iter().any(|r| r.name == name && !self.leases.use_layer(&r.layer, r.at)),
            _ => false,
        }
    }
}
