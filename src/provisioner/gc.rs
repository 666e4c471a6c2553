//! Garbage collection: roots (image records, leases of root filesystems, holds of running work) reach layers, the rest is swept.
//! Removing an image, a failed pull and recovery all end here.

use std::collections::HashSet;

use super::engine::Inner;
use crate::model::error::Result;

impl Inner {
    /// Sweeps layers that nothing reaches. Blocks.
    ///
    /// # Errors
    /// I/O failures; the next run tries again.
    pub(super) fn collect(&self) -> Result<usize> {
        self.layers.sweep(|| {
            let mut roots: HashSet<_> = self.images.layers();
            roots.extend(self.leases.layers());
            roots
        })
    }
}
