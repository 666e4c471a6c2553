//! Backends turn a list of layers into a root filesystem; they know nothing of images.
//!
//! Row order is preference: the first automatic one that the [table](validate::FORBIDDEN) allows and that works here is taken,
//! unless the configuration names another; that one must work, or the daemon does not start. Adding a backend is one file, one
//! `mod` line and one row; the conformance suite in `tests` runs over the rows, on several file systems.

mod aufs;
mod bind;
mod copy;
mod erofs;
mod overlay;
pub mod validate;

use std::path::Path;

use crate::disk::layout::Layout;
use crate::model::error::{Error, Result};
use crate::model::image::RootFs;
use crate::provisioner::unpack::Form;

/// One layer for a root filesystem.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Its files: a directory, or an image of one (see [`crate::disk::layer`]).
    pub path: &'a Path,
    /// It may have whiteouts or opaque directories, in overlay's form.
    pub marks: bool,
    /// Its root has metadata of its own: the archive listed it.
    pub lists_root: bool,
}

/// The layer whose root is that of the union: the uppermost that says something of it.
fn root_of<'a>(layers: &[Layer<'a>]) -> Option<&'a Path> {
    layers.iter().rfind(|l| l.lists_root).or(layers.last()).map(|l| l.path)
}

/// One backend.
pub trait Backend: Send + Sync {
    /// Its name in configuration and records.
    fn name(&self) -> &'static str;

    /// The form in which it wants new layers. Layers that are there in another form are used as they are.
    fn form(&self) -> Form {
        Form::Directory
    }

    /// Builds a root filesystem in the existing empty directory `dir` from `layers` (lowest first). Called once per container;
    /// whoever calls removes `dir` on failure and when the container goes. Blocks.
    ///
    /// # Errors
    /// `Unimplemented` when these layers are beyond it (a copy is made then), I/O failures.
    fn provision(&self, dir: &Path, layers: &[Layer<'_>]) -> Result<RootFs>;
}

/// A backend that can be chosen.
#[derive(Clone, Copy)]
pub struct Row {
    /// Name in the configuration.
    pub name: &'static str,
    /// Taken without being named, where it works.
    pub automatic: bool,
    /// Fails where the backend cannot work; tries it for real.
    pub make: fn(&Layout) -> Result<Box<dyn Backend>>,
}

/// All backends, best first.
pub const BACKENDS: &[Row] = &[
    Row { name: "overlay", automatic: true, make: |layout| overlay::Overlay::probe(layout).map(boxed) },
    Row { name: "aufs", automatic: true, make: |layout| aufs::Aufs::probe(layout).map(boxed) },
    Row { name: "copy", automatic: true, make: |layout| copy::Copy::probe(layout).map(boxed) },
    Row { name: "bind", automatic: false, make: |layout| Ok(boxed(bind::Bind::probe(layout))) },
    Row { name: "erofs", automatic: false, make: |layout| erofs::Erofs::probe(layout).map(boxed) },
];

fn boxed(backend: impl Backend + 'static) -> Box<dyn Backend> {
    Box::new(backend)
}

/// The backend named, or with an empty name the first that works. `by_probe` sets aside what only Mesos's table forbids. Blocks.
///
/// # Errors
/// `InvalidArgument` for unknown names; why the named one cannot work.
pub fn choose(name: &str, by_probe: bool, layout: &Layout) -> Result<Box<dyn Backend>> {
    let make = |row: &Row| validate::check(row.name, layout, by_probe).and_then(|()| (row.make)(layout));
    if !name.is_empty() {
        let unknown = || {
            let all: Vec<_> = BACKENDS.iter().map(|row| row.name).collect();
            Error::invalid(format!("choose backend {name:?}: there is none of that name, only {}", all.join(", ")))
        };
        return make(BACKENDS.iter().find(|row| row.name == name).ok_or_else(unknown)?);
    }
    let mut last = Error::internal("choose backend: none is built in");
    for row in BACKENDS.iter().filter(|row| row.automatic) {
        match make(row) {
            Ok(backend) => return Ok(backend),
            Err(e) => {
                tracing::info!(backend = row.name, error = %e, "backend does not work here");
                last = e;
            }
        }
    }
    Err(last)
}

/// The backend that takes what another cannot.
pub fn fallback() -> Box<dyn Backend> {
    boxed(copy::Copy::fallback())
}

#[cfg(test)]
mod tests;
