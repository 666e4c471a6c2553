//! Bind: read-only root filesystems. Never chosen unless named, as in Mesos.
//!
//! Mesos binds one layer and needs every mount point to be in it. Where overlay works, ours merges any number of layers, makes
//! mount points that the image lacks in a directory of the container's own, and is read-only from then on. Where it does not,
//! Mesos's rules hold: exactly one layer, and its mount points must exist.

use std::path::Path;

use super::overlay::Overlay;
use super::{Backend, Layer};
use crate::disk::{layer, layout::Layout};
use crate::model::error::{Error, Result};
use crate::model::image::{RootFs, RootMount};

/// The bind backend.
pub struct Bind {
    /// Merges layers, where it works.
    overlay: Option<Overlay>,
}

impl Bind {
    /// Sees whether overlay may help.
    pub fn probe(layout: &Layout) -> Self {
        let allowed = super::validate::check("overlay", layout, true);
        let overlay = allowed.and_then(|()| Overlay::probe(layout));
        if let Err(e) = &overlay {
            tracing::info!(error = %e, "backend bind takes images of one layer only");
        }
        Self { overlay: overlay.ok() }
    }

    #[cfg(test)]
    pub(super) fn without_overlay() -> Self {
        Self { overlay: None }
    }
}

impl Backend for Bind {
    fn name(&self) -> &'static str {
        "bind"
    }

    fn provision(&self, dir: &Path, layers: &[Layer<'_>]) -> Result<RootFs> {
        if let Some(overlay) = &self.overlay {
            let mut rootfs = overlay.provision(dir, layers)?;
            for mount in &mut rootfs.mounts {
                mount.options.push("ro".to_owned());
            }
            return Ok(RootFs { backend: self.name().to_owned(), ..rootfs });
        }
        let [only] = layers else {
            return Err(Error::precondition(format!("bind {} layers: without overlay this backend takes images of exactly one", layers.len())));
        };
        let (fstype, options) = if layer::is_image(only.path) { ("erofs", vec!["ro"]) } else { ("bind", vec!["bind", "ro"]) };
        let options = options.into_iter().map(str::to_owned).collect();
        Ok(RootFs {
            backend: self.name().to_owned(),
            mounts: vec![RootMount { fstype: fstype.to_owned(), source: only.path.display().to_string(), options }],
            lookup: vec![only.path.to_owned()],
            writable: None,
        })
    }
}
