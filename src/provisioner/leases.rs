//! Leases: what a container's root filesystem holds of the store, on disk and in memory. A lease keeps the layers of an image
//! that was removed while a container still runs from it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::disk::layout::Layout;
use crate::disk::record::{self, Durability};
use crate::model::error::{Act, Error, Result};
use crate::model::image::RootFs;
use crate::model::{Digest, ImageId};

/// One lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Container.
    pub container: String,
    /// Image it came from.
    pub image: ImageId,
    /// Layers held.
    pub layers: Vec<Digest>,
    /// What was built.
    pub rootfs: RootFs,
    /// When, in nanoseconds since the epoch; 0 in records of older versions.
    #[serde(default)]
    pub made: i64,
}

/// All leases.
pub struct Leases {
    layout: Layout,
    map: Mutex<HashMap<String, Arc<Lease>>>,
}

impl Leases {
    /// Reads all leases; damaged ones go to quarantine. Blocks.
    ///
    /// # Errors
    /// When the directory cannot be made or listed.
    pub fn open(layout: &Layout) -> Result<Self> {
        let dir = layout.leases();
        super::layers::make_private(&dir)?;
        super::layers::make_private(&layout.rootfs_all())?;
        let mut map = HashMap::new();
        for entry in std::fs::read_dir(&dir).act("list", dir.display())? {
            let path = entry.act("list", dir.display())?.path();
            if path.extension().is_none_or(|e| e != "json") {
                std::fs::remove_file(&path).act("remove", path.display())?;
                continue;
            }
            match record::read::<Lease>(&path) {
                Ok(lease) => {
                    map.insert(lease.container.clone(), Arc::new(lease));
                }
                Err(e) => {
                    let moved = record::quarantine(&layout.quarantine(), &path, &e);
                    tracing::warn!(error = %e, "damaged lease: {moved}");
                }
            }
        }
        Ok(Self { layout: layout.clone(), map: Mutex::new(map) })
    }

    /// The lease of a container.
    pub fn get(&self, container: &str) -> Option<Arc<Lease>> {
        self.lock().get(container).cloned()
    }

    /// Writes a lease. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub fn put(&self, lease: Lease) -> Result<Arc<Lease>> {
        record::write(&self.path(&lease.container), &lease, Durability::Atomic)?;
        let lease = Arc::new(lease);
        self.lock().insert(lease.container.clone(), lease.clone());
        Ok(lease)
    }

    /// Ends a lease; unknown is fine. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub fn remove(&self, container: &str) -> Result<()> {
        let path = self.path(container);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(format!("remove {}", path.display()), e)),
            _ => {}
        }
        self.lock().remove(container);
        Ok(())
    }

    /// Whether any container holds this image.
    pub fn hold(&self, image: &ImageId) -> bool {
        self.lock().values().any(|l| l.image == *image)
    }

    /// Whether any container that was made before `at` runs from this layer.
    pub fn use_layer(&self, layer: &Digest, at: i64) -> bool {
        self.lock().values().any(|l| l.made < at && l.layers.contains(layer))
    }

    /// Layers that leases hold.
    pub fn layers(&self) -> HashSet<Digest> {
        self.lock().values().flat_map(|l| l.layers.iter().cloned()).collect()
    }

    /// All leases.
    pub fn all(&self) -> Vec<Arc<Lease>> {
        self.lock().values().cloned().collect()
    }

    fn path(&self, container: &str) -> std::path::PathBuf {
        self.layout.leases().join(format!("{container}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Lease>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
