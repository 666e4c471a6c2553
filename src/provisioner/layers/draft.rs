//! An image's record before its image is there: written to staging beforehand, so that the one sync of a commit covers it too, and
//! renamed into place when its layers are in.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Weak;

use super::{Layers, Shared, random_name};
use crate::disk::record;
use crate::model::error::{Act, Result};

/// A file in staging; it goes with its owner unless it was put into place.
pub struct Draft {
    name: String,
    path: PathBuf,
    bytes: Vec<u8>,
    store: Weak<Shared>,
}

impl Layers {
    /// Writes a draft. It is durable after the next [`Layers::commit`] that brings a layer. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub fn draft(&self, bytes: Vec<u8>) -> Result<Draft> {
        let name = random_name();
        self.shared.lock().staging.insert(name.clone());
        let path = self.shared.layout.staging().join(&name);
        // From here on dropping it gives the name up.
        let draft = Draft { name, path, bytes, store: std::sync::Arc::downgrade(&self.shared) };
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft.path).act("create", draft.path.display())?;
        file.write_all(&draft.bytes).act("write", draft.path.display())?;
        Ok(draft)
    }
}

impl Draft {
    /// Whether it says just this.
    pub fn says(&self, bytes: &[u8]) -> bool {
        self.bytes == bytes
    }

    /// Makes it the record at `target`, durably. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub fn put(self, target: &Path) -> Result<()> {
        std::fs::rename(&self.path, target).act("rename into place", target.display())?;
        record::sync_dir(target.parent().unwrap_or(target))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Not there when it was put into place. One that cannot be removed goes with the next sweep.
        let _ = std::fs::remove_file(&self.path);
        if let Some(store) = self.store.upgrade() {
            store.lock().staging.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Layout;

    #[test]
    fn a_draft_becomes_the_record_or_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        let layers = Layers::open(&layout).unwrap();
        let staged = || std::fs::read_dir(layout.staging()).unwrap().count();
        let (kept, given_up) = (layers.draft(b"kept".to_vec()).unwrap(), layers.draft(b"given up".to_vec()).unwrap());
        layers.sweep_staging().unwrap();
        assert_eq!(staged(), 2, "somebody works on them");
        assert!(kept.says(b"kept") && !given_up.says(b"kept"));
        drop(given_up);
        let target = dir.path().join("root/store/record.json");
        kept.put(&target).unwrap();
        assert_eq!((std::fs::read(&target).unwrap(), staged()), (b"kept".to_vec(), 0));
        // After a crash nobody works on it any more.
        std::mem::forget(layers.draft(b"crashed".to_vec()).unwrap());
        drop(Layers::open(&layout).unwrap());
        assert_eq!(staged(), 0);
    }
}
