//! Aufs: a writable branch over read-only ones, on kernels that have it (a patch that few still carry).
//!
//! Written against aufs(5); the option strings are tested, but it has not run: no kernel at hand has it. Layers are kept in overlay's form, whose
//! whiteouts aufs does not understand, so images with such layers get a copy instead.

use std::path::{Path, PathBuf};

use super::{Backend, Layer, overlay};
use crate::disk::{layer, layout::Layout};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::{RootFs, RootMount};
use crate::provisioner::remove;

/// Longest option string of mount(2): a page, with its end.
const MOUNT_OPTIONS: usize = 4095;

/// The aufs backend, probed.
pub struct Aufs;

impl Aufs {
    /// Mounts one in a mount namespace of its own.
    ///
    /// # Errors
    /// What did not work.
    pub fn probe(layout: &Layout) -> Result<Self> {
        let dir = overlay::probe_dir(layout);
        let tried = overlay::make_probe_layers(&dir).and_then(|()| overlay::in_namespace(&dir, try_mount));
        remove::tree(&dir)?;
        tried.map(|()| Self)
    }
}

fn try_mount(dir: &Path) -> Result<()> {
    let options = options(&dir.join("upper"), &[dir.join("lower")], &dir.join("work"))?.join(",");
    let merged = dir.join("merged");
    nix::mount::mount(Some("aufs"), &merged, Some("aufs"), nix::mount::MsFlags::empty(), Some(options.as_str())).act("mount aufs on", dir.display())?;
    let gone = merged.join("d/hidden");
    std::fs::remove_file(&gone).act("remove", gone.display())?;
    if gone.exists() { Err(Error::new(Kind::Unimplemented, "probe aufs: whiteouts do not work")) } else { Ok(()) }
}

/// Options of aufs(5): the branches, topmost first; `wh` because layers may be replaced by ones with whiteouts of its own form;
/// `dio` so that direct I/O is not refused; the inode number tables in a directory beside, since the writable branch may not
/// hold them on every file system.
fn options(writable: &Path, layers: &[PathBuf], xino: &Path) -> Result<Vec<String>> {
    let paths = layers.iter().map(PathBuf::as_path).chain([writable]);
    if paths.clone().any(|p| p.to_str().is_none_or(|p| p.contains([':', ',', '=', '\\']))) {
        return Err(Error::new(Kind::Unimplemented, "mount aufs: a path with characters that its options cannot carry"));
    }
    let mut branches = format!("br:{}=rw", writable.display());
    for layer in layers.iter().rev() {
        branches.push_str(&format!(":{}=ro+wh", layer.display()));
    }
    let options = vec![branches, "dio".to_owned(), format!("xino={}", xino.join("xino").display())];
    if options.iter().map(|o| o.len() + 1).sum::<usize>() > MOUNT_OPTIONS {
        return Err(Error::new(Kind::Unimplemented, format!("mount aufs: the names of {} layers do not fit a page", layers.len())));
    }
    Ok(options)
}

impl Backend for Aufs {
    fn name(&self) -> &'static str {
        "aufs"
    }

    fn provision(&self, dir: &Path, layers: &[Layer<'_>]) -> Result<RootFs> {
        if layers.iter().any(|l| l.marks || layer::is_image(l.path)) {
            return Err(Error::new(Kind::Unimplemented, "mount aufs: a layer in a form that only overlay understands"));
        }
        let (writable, xino) = (dir.join("upper"), dir.join("work"));
        let paths: Vec<_> = layers.iter().map(|l| l.path.to_owned()).collect();
        let options = options(&writable, &paths, &xino)?;
        for made in [&writable, &xino] {
            std::fs::create_dir(made).act("create directory", made.display())?;
        }
        if let Some(root) = super::root_of(layers) {
            overlay::copy_root(root, &writable)?;
        }
        let lookup = [writable.clone()].into_iter().chain(paths.into_iter().rev()).collect();
        let mounts = vec![RootMount { fstype: "aufs".to_owned(), source: "aufs".to_owned(), options }];
        Ok(RootFs { backend: self.name().to_owned(), mounts, lookup, writable: Some(writable) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_the_manual() {
        let layers = [PathBuf::from("/s/0/fs"), PathBuf::from("/s/1/fs")];
        let options = options(Path::new("/c/upper"), &layers, Path::new("/c/work")).unwrap();
        assert_eq!(options, ["br:/c/upper=rw:/s/1/fs=ro+wh:/s/0/fs=ro+wh", "dio", "xino=/c/work/xino"]);
    }

    #[test]
    fn what_options_cannot_carry_is_left_to_the_copy() {
        for layers in [vec![PathBuf::from("/s/a:b")], vec![PathBuf::from("/s/a=b")], vec![PathBuf::from(format!("/{}", "x".repeat(40))); 100]] {
            assert_eq!(options(Path::new("/u"), &layers, Path::new("/w")).unwrap_err().kind, Kind::Unimplemented);
        }
        let dir = tempfile::tempdir().unwrap();
        let layer = Layer { path: dir.path(), marks: true, lists_root: true };
        assert_eq!(Aufs.provision(dir.path(), &[layer]).unwrap_err().kind, Kind::Unimplemented);
    }
}
