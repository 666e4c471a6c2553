//! Overlay: layers are lower directories, the container writes to an upper one. Nothing is mounted here; the plan says what
//! to mount, inside the container's own mount namespace.
//!
//! Options besides the directories: none. `index`, `metacopy` and `redirect_dir` stay off as the kernel has them by default: layers
//! are shared between containers (`index` binds an upper directory to one set of lower ones), and redirects would let what a
//! container wrote into its upper directory choose lower files.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, XattrFlags};

use super::{Backend, Layer};
use crate::disk::{layer, layout::Layout};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::{RootFs, RootMount};
use crate::provisioner::unpack::tree::OPAQUE;
use crate::provisioner::{metadata, remove};

/// Lower directories that overlay takes.
const MAX_LOWER: usize = 500;

/// The overlay backend, probed.
pub struct Overlay(());

impl Overlay {
    /// Tries overlay on the store's file system by a real mount in a mount namespace that ends with its thread.
    ///
    /// # Errors
    /// What did not work.
    pub fn probe(layout: &Layout) -> Result<Self> {
        let dir = probe_dir(layout);
        let probed = make_probe_layers(&dir).and_then(|()| in_namespace(&dir, |dir| try_mount(dir, "lower2")));
        remove::tree(&dir)?;
        match probed {
            // A full disk says nothing about overlay: it is taken to work until the next start.
            Err(e) if e.kind == Kind::ResourceExhausted => Ok(Self(())),
            probed => probed.map(Self),
        }
    }
}

impl Backend for Overlay {
    fn name(&self) -> &'static str {
        "overlay"
    }

    fn provision(&self, dir: &Path, layers: &[Layer<'_>]) -> Result<RootFs> {
        let lower: Vec<String> = layers.iter().rev().map(|l| l.path.display().to_string()).collect();
        if lower.is_empty() || lower.iter().any(|l| l.contains([':', ',', '\\'])) {
            return Err(Error::new(Kind::Unimplemented, "mount overlay: no layers, or a path with characters that its options cannot carry"));
        }
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        let options = vec![format!("lowerdir={}", lower.join(":")), format!("upperdir={}", upper.display()), format!("workdir={}", work.display())];
        if lower.len() > MAX_LOWER {
            return Err(Error::new(Kind::Unimplemented, format!("mount overlay: {} layers are more than the {MAX_LOWER} it takes", lower.len())));
        }
        std::fs::create_dir(&upper).act("create directory", upper.display())?;
        std::fs::create_dir(&work).act("create directory", work.display())?;
        if let Some(root) = super::root_of(layers) {
            // The upper directory's root is the container's `/`.
            copy_root(root, &upper)?;
        }
        let mut lookup = vec![upper.clone()];
        lookup.extend(layers.iter().rev().map(|l| l.path.to_owned()));
        Ok(RootFs {
            backend: self.name().to_owned(),
            mounts: vec![RootMount { fstype: "overlay".to_owned(), source: "overlay".to_owned(), options }],
            lookup,
            writable: Some(upper),
        })
    }
}

/// Gives the directory `to` the metadata of the root of the layer `from`.
pub fn copy_root(from: &Path, to: &Path) -> Result<()> {
    let root = layer::root(from).act("open layer", from.display())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(&root, ".", flags, Mode::empty()).act("open layer", from.display())?;
    let to_fd = rustix::fs::open(to, flags, Mode::empty()).act("open directory", to.display())?;
    let stat = rustix::fs::fstat(&root).act("stat", from.display())?;
    metadata::copy(root.as_fd(), to_fd.as_fd(), &stat).act("copy metadata to", to.display())
}

/// A name in staging for a probe.
pub fn probe_dir(layout: &Layout) -> PathBuf {
    layout.staging().join(format!("probe-{}-{:?}", std::process::id(), std::thread::current().id()))
}

/// Layers with everything that layers have, to try a mount on.
pub fn make_probe_layers(dir: &Path) -> Result<()> {
    for name in ["lower/d", "lower2/d", "upper", "work", "merged"] {
        let sub = dir.join(name);
        std::fs::create_dir_all(&sub).act("create directory", sub.display())?;
    }
    for name in ["lower/d/hidden", "lower/gone"] {
        let file = dir.join(name);
        std::fs::write(&file, "").act("write", file.display())?;
    }
    let gone = dir.join("lower2/gone");
    rustix::fs::mknodat(rustix::fs::CWD, &gone, rustix::fs::FileType::CharacterDevice, Mode::empty(), 0).act("create whiteout", gone.display())?;
    let opaque = dir.join("lower2/d");
    let fd = rustix::fs::open(&opaque, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open", opaque.display())?;
    rustix::fs::fsetxattr(fd.as_fd(), OPAQUE, b"y", XattrFlags::empty()).act("mark opaque", opaque.display())
}

/// Runs `try_it` in a thread with a mount namespace that ends with it.
pub fn in_namespace(dir: &Path, try_it: impl FnOnce(&Path) -> Result<()> + Send) -> Result<()> {
    let private = || -> nix::Result<()> {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
    };
    let work = || {
        private().act("enter", "a mount namespace")?;
        try_it(dir)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("backend-probe".to_owned()).spawn_scoped(scope, work).act("start", "thread")?;
        thread.join().unwrap_or_else(|_| Err(Error::internal("probe backend: panicked")))
    })
}

/// An overlay of the probe's layers, `top` being the upper of the two, mounted as containers will have it.
pub fn try_mount(dir: &Path, top: &str) -> Result<()> {
    let path = |name: &str| dir.join(name).display().to_string();
    let options = [format!("lowerdir={}:{}", path(top), path("lower")), format!("upperdir={}", path("upper")), format!("workdir={}", path("work"))];
    crate::init::overlay::mount_on(&dir.join("merged"), &options, false).act("mount overlay on", dir.display())?;
    if dir.join("merged/d/hidden").exists() {
        return Err(Error::new(Kind::Unimplemented, "probe overlay: opaque directories do not hide"));
    }
    // A deletion needs whiteouts, and shows whether directories tell file types.
    let gone = dir.join("merged/d");
    std::fs::remove_dir(&gone).act("remove", gone.display())?;
    if gone.exists() || dir.join("merged/gone").exists() || std::fs::symlink_metadata(dir.join("upper/d")).is_err() {
        return Err(Error::new(Kind::Unimplemented, "probe overlay: whiteouts do not work"));
    }
    Ok(())
}
