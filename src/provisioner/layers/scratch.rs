//! Room in staging for files that are on their way to become layers: nobody sweeps it while it is in use, and it goes with its
//! owner, or with the next sweep after a crash.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use super::{Layers, Shared, make_private, random_name, remove};
use crate::model::error::Result;

/// A private directory in staging.
pub struct Scratch {
    name: String,
    dir: PathBuf,
    store: Weak<Shared>,
}

impl Layers {
    /// A new directory in staging. Makes one directory; blocks for no longer than that.
    ///
    /// # Errors
    /// I/O failures.
    pub fn scratch(&self) -> Result<Scratch> {
        let name = random_name();
        self.shared.lock().staging.insert(name.clone());
        let scratch = Scratch { dir: self.shared.layout.staging().join(&name), name, store: Arc::downgrade(&self.shared) };
        make_private(&scratch.dir)?;
        Ok(scratch)
    }
}

impl Scratch {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = remove::tree(&self.dir) {
            tracing::warn!(error = %e, "staging is left behind until the next sweep");
        }
        if let Some(store) = self.store.upgrade() {
            store.lock().staging.remove(&self.name);
        }
    }
}
