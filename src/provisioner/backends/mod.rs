//! Backends turn a list of layers into a root filesystem; they know nothing of images.
//!
//! Row order is preference: the first one that works on this machine is taken unless the configuration names another.
//! Adding a backend is one file, one `mod` line and one row; the conformance suite in `tests` runs over the rows.

mod copy;
mod overlay;

use std::path::{Path, PathBuf};

use crate::disk::layout::Layout;
use crate::model::error::{Error, Result};
use crate::model::image::RootFs;

/// One backend.
pub trait Backend: Send + Sync {
    /// Its name in configuration and records.
    fn name(&self) -> &'static str;

    /// Builds a root filesystem in the existing empty directory `dir` from `layers` (their files, lowest first). Called once
    /// per container; whoever calls removes `dir` on failure and when the container goes. Blocks.
    ///
    /// # Errors
    /// `Unimplemented` when these layers are beyond it (another backend is taken then), I/O failures.
    fn provision(&self, dir: &Path, layers: &[PathBuf]) -> Result<RootFs>;
}

/// Name and constructor; the constructor fails where the backend cannot work.
type Row = (&'static str, fn(&Layout) -> Result<Box<dyn Backend>>);

/// All backends, best first.
pub const BACKENDS: &[Row] = &[("overlay", |layout| overlay::Overlay::probe(layout).map(boxed)), ("copy", |_| Ok(boxed(copy::Copy)))];

fn boxed(backend: impl Backend + 'static) -> Box<dyn Backend> {
    Box::new(backend)
}

/// The backend named, or the first that works. Blocks.
///
/// # Errors
/// `InvalidArgument` for unknown names; why the named one cannot work.
pub fn choose(name: &str, layout: &Layout) -> Result<Box<dyn Backend>> {
    if !name.is_empty() {
        let (_, make) =
            BACKENDS.iter().find(|(n, _)| *n == name).ok_or_else(|| Error::invalid(format!("choose backend {name:?}: there is none of that name")))?;
        return make(layout);
    }
    let mut last = Error::internal("choose backend: none is built in");
    for (name, make) in BACKENDS {
        match make(layout) {
            Ok(backend) => return Ok(backend),
            Err(e) => {
                tracing::warn!(backend = name, error = %e, "backend does not work here");
                last = e;
            }
        }
    }
    Err(last)
}

/// The backend that takes what another cannot.
pub fn fallback() -> Box<dyn Backend> {
    boxed(copy::Copy)
}

#[cfg(test)]
mod tests;
