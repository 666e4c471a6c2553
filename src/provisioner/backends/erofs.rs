//! EROFS: new layers are kept as one image each, and overlay stacks them as it stacks directories. The images are mounted by the
//! container's first process in its own mount namespace; nothing is mounted on the host, and removing a layer is one unlink.
//!
//! Off unless named. A layer of 20,000 small files (55 MB, ext4, two cores) is unpacked and synced in 0.4 s instead of 1.6 s, with
//! 53 MB written instead of 101, and removed in 10 ms instead of 800. Against that, each container mounts each image for itself:
//! ten layers add 2 ms to a start, thirty 4 to 12, and containers of one image do not share page cache as they do with
//! directories (Linux 6.18).

use std::path::Path;

use rustix::mount::MountAttrFlags;

use super::overlay::{self, Overlay};
use super::{Backend, Layer};
use crate::disk::{layer, layout::Layout};
use crate::model::error::{Act, Result};
use crate::model::image::RootFs;
use crate::provisioner::remove;
use crate::provisioner::unpack::Form;
use crate::provisioner::unpack::erofs::Erofs as Image;
use crate::provisioner::unpack::sink::{Place, Sink};

/// The EROFS backend, probed.
pub struct Erofs {
    overlay: Overlay,
}

impl Erofs {
    /// Writes an image, mounts it, and an overlay over it, as containers will.
    ///
    /// # Errors
    /// What did not work.
    pub fn probe(layout: &Layout) -> Result<Self> {
        let overlay = Overlay::probe(layout)?;
        let dir = overlay::probe_dir(layout);
        let tried = try_image(&dir);
        remove::tree(&dir)?;
        tried?;
        Ok(Self { overlay })
    }
}

fn try_image(dir: &Path) -> Result<()> {
    overlay::make_probe_layers(dir)?;
    let path = dir.join("lower2.erofs");
    let mut image = Box::new(Image::create(&path)?);
    image.opaque(b"d")?;
    image.whiteout(Place { path: b"gone", parent: b"", name: b"gone" })?;
    image.finish()?;
    layer::mount(&path, MountAttrFlags::empty()).act("mount", path.display())?;
    overlay::in_namespace(dir, |dir| overlay::try_mount(dir, "lower2.erofs"))
}

impl Backend for Erofs {
    fn name(&self) -> &'static str {
        "erofs"
    }

    fn form(&self) -> Form {
        Form::Erofs
    }

    fn provision(&self, dir: &Path, layers: &[Layer<'_>]) -> Result<RootFs> {
        let rootfs = self.overlay.provision(dir, layers)?;
        Ok(RootFs { backend: self.name().to_owned(), ..rootfs })
    }
}
