//! The container's root: propagation of the copied host mounts, the root filesystem's own mounts, and the change of root.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::MountAttrFlags;

use super::fault::{Fault, On, Result};
use super::options::{self, Options};
use super::stage2::Child;
use super::{mounts, overlay};
use crate::model::image::RootMount;

/// The step: nothing mounted from here on reaches the host, unless the spec wants it (`rshared`, for bidirectional mounts).
pub(super) fn propagate(child: &mut Child<'_>) -> Result {
    let word = child.bundle.linux.rootfs_propagation().as_deref().filter(|w| !w.is_empty()).unwrap_or("rslave");
    let (kind, _) = options::propagation(word).ok_or_else(|| Fault::new(format_args!("rootfsPropagation {word}"), libc::EINVAL))?;
    change_propagation(Path::new("/"), kind | libc::MS_REC).on("/")?;
    if kind == libc::MS_SHARED {
        // Neither pivot_root nor the root filesystem's mounts may have a shared parent.
        let path = root_path(child);
        let path = std::fs::canonicalize(&path).on(path.display())?;
        for ancestor in path.ancestors() {
            match change_propagation(ancestor, libc::MS_PRIVATE) {
                // Not a mount's root: its mount begins further up.
                Err(nix::errno::Errno::EINVAL) => {}
                other => return other.on(ancestor.display()),
            }
        }
    }
    Ok(())
}

fn change_propagation(path: &Path, flags: u64) -> nix::Result<()> {
    nix::mount::mount(None::<&str>, path, None::<&str>, MsFlags::from_bits_retain(flags), None::<&str>)
}

fn root_path(child: &Child<'_>) -> PathBuf {
    let path = child.bundle.spec.root().as_ref().map_or(Path::new("rootfs"), |r| r.path());
    child.bundle.dir.join(path)
}

fn open_root(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).on(path.display())
}

/// The step: mounts the root filesystem; [`Child::root`] is the root's own descriptor afterwards.
pub(super) fn mount(child: &mut Child<'_>) -> Result {
    let path = root_path(child);
    let mut root = open_root(&path)?;
    for m in &child.rootfs {
        root = root_mount(&child.bundle.dir, &path, &root, m)?;
    }
    if child.rootfs.is_empty() {
        // pivot_root wants a mount's root.
        let tree = crate::sys::mount::clone_tree(root.as_fd(), true).on(path.display())?;
        crate::sys::mount::attach(tree.as_fd(), root.as_fd()).on(path.display())?;
        root = tree;
    }
    child.root = root;
    Ok(())
}

fn root_mount(bundle: &Path, path: &Path, target: &OwnedFd, m: &RootMount) -> Result<OwnedFd> {
    let mut options = Options::parse(&m.options)?;
    if read_only_later(m) {
        options.attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    let tree = if m.fstype == "bind" || options.bind.is_some() {
        mounts::copy(&bundle.join(&m.source), options.bind != Some(false))?
    } else {
        let attributes = std::mem::take(&mut options.attributes);
        match m.fstype.as_str() {
            "overlay" => match overlay::mount(path, &m.source, &options.data, attributes.set)? {
                Some(tree) => tree,
                None => return open_root(path),
            },
            "erofs" => {
                let attributes = MountAttrFlags::from_bits_retain(attributes.set as u32);
                crate::disk::layer::mount(&bundle.join(&m.source), attributes).on(&m.source)?
            }
            _ => mounts::file_system(&m.fstype, Path::new(&m.source), &options.data, attributes.set)?,
        }
    };
    mounts::place(&tree, target.as_fd(), &options, path)?;
    Ok(tree)
}

/// A read-only overlay with a writable layer stays writable until mount points that the image lacks have been made in that.
fn read_only_later(m: &RootMount) -> bool {
    m.fstype == "overlay" && m.options.iter().any(|o| o == "ro") && m.options.iter().any(|o| o.starts_with("upperdir="))
}

/// The step: `root.readonly`, or a root filesystem that is read-only by itself.
pub(super) fn read_only(child: &mut Child<'_>) -> Result {
    let wanted = child.bundle.spec.root().as_ref().and_then(|r| r.readonly()).unwrap_or(false);
    if wanted || child.rootfs.iter().any(read_only_later) { mounts::make_read_only(&child.root).on("/") } else { Ok(()) }
}

/// The step: the root filesystem becomes `/`, and the host's mounts go.
pub(super) fn change(child: &mut Child<'_>) -> Result {
    let word = child.bundle.linux.rootfs_propagation().as_deref().filter(|w| !w.is_empty());
    let propagation = word.and_then(options::propagation);
    let old = open_root(Path::new("/"))?;
    rustix::process::fchdir(&child.root).on("root filesystem")?;
    // Both names are the new root: the old one lands on top of it and is taken off again, with no directory needed for it.
    rustix::process::pivot_root(".", ".").on("root filesystem")?;
    rustix::process::fchdir(&old).on("old root")?;
    if propagation.is_some_and(|p| p.0 == libc::MS_SHARED) {
        // The detaching below must not reach the host.
        change_propagation(Path::new("."), libc::MS_SLAVE | libc::MS_REC).on("old root")?;
    }
    nix::mount::umount2(".", MntFlags::MNT_DETACH).on("old root")?;
    rustix::process::chdir("/").on("/")?;
    if let Some((kind, _)) = propagation {
        // The root alone: every other mount has what its own options say.
        change_propagation(Path::new("/"), kind).on("/")?;
    }
    Ok(())
}
