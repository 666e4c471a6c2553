//! Layers known to be bad. The mark lies in the layer's directory and survives restarts; a marked layer counts as missing when
//! images are pulled or loaded, so that just it is fetched again. The new one takes the place of the old in one exchange; the
//! old one is kept aside for as long as containers that were made from it hold a lease: their mounts are never touched.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};

use super::{Layers, Staged, Unpacked, disk_usage, make_private, remove};
use crate::disk::Layout;
use crate::disk::record::{self, Durability};
use crate::model::Digest;
use crate::model::error::{Act, Error, Result};
use crate::provisioner::unpack::content;
use crate::stdx::clock::now_ns;

/// Name of the mark in a layer's directory.
const MARK: &str = "damaged.json";

/// Why a layer may not be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// When that was found, in nanoseconds since the epoch.
    pub found: i64,
    /// What is wrong.
    pub what: String,
}

/// A damaged layer that was replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// Name of its directory among the damaged.
    pub name: String,
    /// Which layer it was.
    pub layer: Digest,
    /// When, in nanoseconds since the epoch. Containers made before run from it.
    pub at: i64,
}

impl Replaced {
    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.splitn(3, '-');
        let (algorithm, hex, at) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self { name: name.to_owned(), layer: format!("{algorithm}:{hex}").parse().ok()?, at: at.parse().ok()? })
    }
}

impl Layers {
    /// Whether the layer is in the store, good or bad.
    pub fn has(&self, id: &Digest) -> bool {
        self.shared.lock().known.contains_key(id)
    }

    /// What is wrong with a layer, if that is known.
    pub fn damage(&self, id: &Digest) -> Option<Arc<Damage>> {
        self.shared.lock().known.get(id)?.damage.clone()
    }

    /// Every layer in the store.
    pub fn all(&self) -> Vec<Digest> {
        let mut ids: Vec<Digest> = self.shared.lock().known.keys().cloned().collect();
        ids.sort();
        ids
    }

    /// Takes the digest of a layer's files again. `None` when nothing was recorded to compare with; an error says that they cannot be
    /// read. Blocks.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn verify(&self, id: &Digest) -> Result<Option<std::result::Result<(), String>>> {
        let record = self.get(id).ok_or_else(|| Error::not_found(format!("verify layer {id}")))?;
        let Some(expected) = &record.content else { return Ok(None) };
        Ok(Some(match content::of(&self.files(id), true) {
            Ok(found) if found == *expected => Ok(()),
            Ok(_) => Err("its files are not what was unpacked".to_owned()),
            Err(e) => Err(format!("its files cannot be read: {e}")),
        }))
    }

    /// Marks a layer as bad. Blocks.
    ///
    /// # Errors
    /// I/O failures; it counts as bad in memory even then.
    pub fn mark(&self, id: &Digest, what: String) -> Result<()> {
        let damage = Damage { found: now_ns(), what };
        let path = self.shared.layout.layer(id).join(MARK);
        if let Some(known) = self.shared.lock().known.get_mut(id) {
            known.damage = Some(Arc::new(damage.clone()));
        }
        record::write(&path, &damage, Durability::Synced)?;
        self.remeasure(id);
        Ok(())
    }

    /// Takes the mark off: it was found good again. Blocks.
    ///
    /// # Errors
    /// I/O failures; then it stays marked.
    pub fn absolve(&self, id: &Digest) -> Result<()> {
        let path = self.shared.layout.layer(id).join(MARK);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(format!("remove {}", path.display()), e)),
            _ => {}
        }
        if let Some(known) = self.shared.lock().known.get_mut(id) {
            known.damage = None;
        }
        self.remeasure(id);
        Ok(())
    }

    fn remeasure(&self, id: &Digest) {
        if let Some(known) = self.shared.lock().known.get_mut(id) {
            known.disk = disk_usage(&self.shared.layout.layer(id), &known.record);
        }
    }

    /// Damaged layers that were replaced and not removed yet.
    pub fn replaced(&self) -> Vec<Replaced> {
        self.shared.lock().replaced.clone()
    }

    /// Removes those replaced layers that nobody uses. Blocks.
    ///
    /// # Errors
    /// I/O failures; the next call tries again.
    pub fn bury(&self, used: impl Fn(&Replaced) -> bool) -> Result<()> {
        for replaced in self.replaced().iter().filter(|r| !used(r)) {
            remove::tree(&self.shared.layout.damaged().join(&replaced.name))?;
            self.shared.lock().replaced.retain(|r| r != replaced);
        }
        Ok(())
    }
}

/// The mark in a layer's directory. One that cannot be read is a mark all the same.
pub(super) fn read(dir: &Path) -> Option<Arc<Damage>> {
    match record::read(&dir.join(MARK)) {
        Ok(damage) => Some(Arc::new(damage)),
        Err(e) if e.kind == crate::model::error::Kind::NotFound => None,
        Err(e) => Some(Arc::new(Damage { found: 0, what: format!("its mark cannot be read: {e}") })),
    }
}

/// The mark's path, for counting.
pub(super) fn mark_path(dir: &Path) -> PathBuf {
    dir.join(MARK)
}

/// Layers that were put aside before.
pub(super) fn list(layout: &Layout) -> Result<Vec<Replaced>> {
    let dir = layout.damaged();
    match std::fs::read_dir(&dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(format!("list {}", dir.display()), e)),
        Ok(entries) => Ok(entries.flatten().filter_map(|e| Replaced::parse(&e.file_name().to_string_lossy())).collect()),
    }
}

/// Puts a staged layer in the place of the bad one at `target`. A crash leaves the place filled, with the one or the other.
pub(super) fn exchange(layout: &Layout, staged: &Staged, target: &Path) -> Result<Replaced> {
    let dir = layout.damaged();
    make_private(&dir)?;
    let id = &staged.record.diff_id;
    let at = now_ns();
    let name = format!("{}-{}-{at}", id.algorithm(), id.hex());
    let aside = dir.join(&name);
    // Out of staging first: what is in staging is removed without asking who uses it.
    std::fs::rename(&staged.dir, &aside).act("move", aside.display())?;
    crate::stdx::failpoint::hit("scrub.put-aside");
    renameat_with(CWD, &aside, CWD, target, RenameFlags::EXCHANGE).act("replace", target.display())?;
    record::sync_dir(&dir)?;
    Ok(Replaced { name, layer: id.clone(), at })
}

/// What a freshly unpacked layer comes to: taken on the way where the form allows it, else from what was just written.
pub(super) fn content_of(unpacked: &Unpacked, files: &Path) -> Result<String> {
    unpacked.tree.content.clone().map_or_else(|| content::of(files, false), Ok)
}
