//! Overlay: layers are lower directories, the container writes to an upper one. Nothing is mounted here; the plan says what
//! to mount, inside the container's own mount namespace.
//!
//! Options besides the directories: none. `index`, `metacopy` and `redirect_dir` stay off as the kernel has them by default: layers
//! are shared between containers (`index` binds an upper directory to one set of lower ones), and redirects would let what a
//! container wrote into its upper directory choose lower files.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, XattrFlags};

use super::Backend;
use crate::disk::layout::Layout;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::{RootFs, RootMount};
use crate::provisioner::remove;
use crate::provisioner::unpack::tree::OPAQUE;
use crate::stdx::kernel;

/// Longest option string of mount(2): a page, with its end.
const MOUNT_OPTIONS: usize = 4095;
/// Lower directories that overlay takes.
const MAX_LOWER: usize = 500;

/// The overlay backend, probed.
pub struct Overlay {
    /// The kernel takes lower directories one by one (`lowerdir+`, Linux 6.8), so that their number is not bound by a page.
    one_by_one: bool,
}

impl Overlay {
    /// Tries overlay on the store's file system by a real mount in a mount namespace that ends with its thread.
    ///
    /// # Errors
    /// What did not work.
    pub fn probe(layout: &Layout) -> Result<Self> {
        let dir = layout.staging().join(format!("probe-{}", std::process::id()));
        let inside = dir.clone();
        let probed = std::thread::Builder::new().name("overlay-probe".to_owned()).spawn(move || try_mount(&inside)).act("start", "thread")?.join();
        remove::tree(&dir)?;
        let one_by_one = match probed.unwrap_or_else(|_| Err(Error::internal("probe overlay: panicked"))) {
            // A full disk says nothing about overlay: it is taken to work, in its oldest form, until the next start.
            Err(e) if e.kind == Kind::ResourceExhausted => false,
            probed => probed?,
        };
        Ok(Self { one_by_one })
    }
}

impl Backend for Overlay {
    fn name(&self) -> &'static str {
        "overlay"
    }

    fn provision(&self, dir: &Path, layers: &[PathBuf]) -> Result<RootFs> {
        let lower: Vec<String> = layers.iter().rev().map(|l| l.display().to_string()).collect();
        if lower.is_empty() || lower.iter().any(|l| l.contains([':', ',', '\\'])) {
            return Err(Error::new(Kind::Unimplemented, "mount overlay: no layers, or a path with characters that its options cannot carry"));
        }
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        let options = vec![format!("lowerdir={}", lower.join(":")), format!("upperdir={}", upper.display()), format!("workdir={}", work.display())];
        if lower.len() > MAX_LOWER || (!self.one_by_one && shortest(&lower) + options[1].len() + options[2].len() > MOUNT_OPTIONS) {
            return Err(Error::new(Kind::Unimplemented, format!("mount overlay: {} layers are too many for this kernel", lower.len())));
        }
        std::fs::create_dir(&upper).act("create directory", upper.display())?;
        std::fs::create_dir(&work).act("create directory", work.display())?;
        if let Some(top) = layers.last() {
            // The upper directory's root is the container's `/`.
            copy_root(top, &upper)?;
        }
        let mut lookup = vec![upper.clone()];
        lookup.extend(layers.iter().rev().cloned());
        Ok(RootFs {
            backend: self.name().to_owned(),
            mounts: vec![RootMount { fstype: "overlay".to_owned(), source: "overlay".to_owned(), options }],
            lookup,
            writable: Some(upper),
        })
    }
}

/// Length of the layers' option and two commas when each is named from the directory that they share, as whoever mounts them does
/// with a list that is too long.
fn shortest(lower: &[String]) -> usize {
    let common = Path::new(&lower[0]).ancestors().find(|base| lower.iter().all(|l| Path::new(l) != *base && Path::new(l).starts_with(base)));
    let common = common.map_or(0, |base| base.as_os_str().len());
    "lowerdir=,,".len() + lower.iter().map(|l| l.len() - common).sum::<usize>()
}

/// Gives `to` owner and mode of `from`.
pub fn copy_root(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let meta = std::fs::symlink_metadata(from).act("stat", from.display())?;
    if meta.uid() != 0 || meta.gid() != 0 {
        std::os::unix::fs::lchown(to, Some(meta.uid()), Some(meta.gid())).act("change owner of", to.display())?;
    }
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(meta.mode() & 0o7777)).act("change mode of", to.display())
}

/// In a thread of its own: a mount namespace, an overlay with everything that layers need.
fn try_mount(dir: &Path) -> Result<bool> {
    for name in ["lower/d", "lower2", "upper", "work", "merged"] {
        let sub = dir.join(name);
        std::fs::create_dir_all(&sub).act("create directory", sub.display())?;
    }
    std::fs::write(dir.join("lower/d/hidden"), "").act("write", dir.display())?;
    let opaque = dir.join("lower2/d");
    std::fs::create_dir(&opaque).act("create directory", opaque.display())?;
    let fd = rustix::fs::open(&opaque, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open", opaque.display())?;
    rustix::fs::fsetxattr(fd.as_fd(), OPAQUE, b"y", XattrFlags::empty()).act("mark opaque", opaque.display())?;
    let private = || -> nix::Result<()> {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
    };
    private().act("enter", "a mount namespace")?;
    let path = |name: &str| dir.join(name).display().to_string();
    let options = format!("lowerdir={}:{},upperdir={},workdir={}", path("lower2"), path("lower"), path("upper"), path("work"));
    nix::mount::mount(Some("overlay"), &dir.join("merged"), Some("overlay"), nix::mount::MsFlags::empty(), Some(options.as_str()))
        .act("mount overlay on", dir.display())?;
    if dir.join("merged/d/hidden").exists() {
        return Err(Error::new(Kind::Unimplemented, "probe overlay: opaque directories do not hide"));
    }
    // A deletion needs whiteouts, and shows whether directories tell file types.
    let gone = dir.join("merged/d");
    std::fs::remove_dir(&gone).act("remove", gone.display())?;
    if gone.exists() || std::fs::symlink_metadata(dir.join("upper/d")).is_err() {
        return Err(Error::new(Kind::Unimplemented, "probe overlay: whiteouts do not work"));
    }
    Ok(kernel::overlay_knows_its_options() && takes_one_by_one(dir))
}

fn takes_one_by_one(dir: &Path) -> bool {
    let attempt = || -> rustix::io::Result<()> {
        use rustix::mount::{FsOpenFlags, fsconfig_set_string, fsopen};
        let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(fs.as_fd(), "lowerdir+", dir.join("lower"))
    };
    attempt().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_count_from_the_directory_they_share() {
        let lower: Vec<_> = ["aa/fs", "bb/fs", "c"].iter().map(|l| format!("/a/quite/long/path/{l}")).collect();
        assert_eq!(shortest(&lower), "lowerdir=aa/fs:bb/fs:c,,".len() + 1);
        // Old kernels take a hundred, too.
        let lower: Vec<_> = (0..100).map(|n| format!("/var/lib/mesocri/store/layers/{n:032x}/fs")).collect();
        assert!(lower.join(":").len() > MOUNT_OPTIONS && shortest(&lower) < MOUNT_OPTIONS - 200);
        assert_eq!(shortest(&["/one".to_owned()]), "lowerdir=one,,".len());
    }
}
