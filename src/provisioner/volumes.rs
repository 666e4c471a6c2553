//! Image volumes: the files of an image (or artifact) read-only inside a container that runs from another one.
//!
//! A volume is a root filesystem of its own under the name `CONTAINER.volume-N`: leased, counted and collected like any other. It is
//! mounted on the host for as long as the container's first process needs to bind it, below the state directory, and nowhere
//! after that: the container's own copy of the mount keeps it alive. That way every shim can use it, ours and foreign ones, and
//! a path inside the image can be looked up by the kernel, in the image and nowhere else.

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::MountAttrFlags;

use super::engine::{Inner, Provisioner};
use super::layers::make_private;
use crate::disk::layer;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::{Image, RootFs, RootMount};

/// What the kubelet looks for at the start of a message.
const FAILED: &str = "ImageVolumeMountFailed";
/// Between a container's name and the number of its volume.
const VOLUME: &str = ".volume-";
/// Mounts at one place: an overlay may have a file system with names for its layers below it.
const MAX_STACKED: usize = 4;

/// The container that a root filesystem or lease belongs to.
pub(super) fn container_of(name: &str) -> &str {
    name.split_once(VOLUME).map_or(name, |(container, _)| container)
}

impl Provisioner {
    pub(super) fn volume_name(container: &str, number: usize) -> String {
        format!("{container}{VOLUME}{number}")
    }
}

impl Inner {
    /// Mounts `image` for a volume and finds `sub_path` in it. Blocks.
    pub(super) fn mount_volume(&self, name: &str, image: &Image, sub_path: &str) -> Result<PathBuf> {
        let failed = |e: Error| {
            let kind = e.kind;
            Error::new(kind, format!("{FAILED}: mount image {}: {e}", image.repo_tags.first().map_or(image.id.as_str(), String::as_str)))
        };
        let rootfs = match self.leases.get(name).filter(|lease| lease.image == image.id) {
            Some(lease) => lease.rootfs.clone(),
            None => self.provision(name, image).map_err(failed)?,
        };
        let at = self.layout.volume(name);
        make_private(&at).map_err(failed)?;
        unmount(&at).and_then(|()| mount(&rootfs, &at)).and_then(|()| find(&at, sub_path)).map_err(failed)
    }

    /// Unmounts what the host sees of the volumes of `container`; of all containers when that is `None`. Blocks.
    pub(super) fn unmount_volumes(&self, container: Option<&str>) -> Result<()> {
        let all = self.layout.volumes_mounted();
        let entries = match std::fs::read_dir(&all) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.act("list", all.display())?,
        };
        for entry in entries {
            let entry = entry.act("list", all.display())?;
            let name = entry.file_name();
            if container.is_none_or(|c| name.to_str().is_some_and(|name| container_of(name) == c)) {
                unmount(&entry.path())?;
                std::fs::remove_dir(entry.path()).act("remove", entry.path().display())?;
            }
        }
        Ok(())
    }

    /// Names of the volumes that `container` holds.
    pub(super) fn volumes_of(&self, container: &str) -> Vec<String> {
        let own = |name: &String| name != container && container_of(name) == container;
        self.leases.all().iter().map(|l| l.container.clone()).filter(own).collect()
    }
}

/// Makes the mounts of `rootfs` at `at`, read-only before anybody can see them there.
fn mount(rootfs: &RootFs, at: &Path) -> Result<()> {
    for m in &rootfs.mounts {
        one(m, at)?;
    }
    // Nothing in an image gives rights to whoever runs it from a volume.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(None::<&str>, at, None::<&str>, flags, None::<&str>).act("make read-only", at.display())
}

fn one(m: &RootMount, at: &Path) -> Result<()> {
    let options: Vec<String> = m.options.iter().filter(|o| !matches!(o.as_str(), "ro" | "rw" | "bind" | "rbind")).cloned().collect();
    match m.fstype.as_str() {
        "overlay" => overlay(at.to_owned(), options),
        "bind" => nix::mount::mount(Some(m.source.as_str()), at, None::<&str>, MsFlags::MS_BIND, None::<&str>).act("bind on", at.display()),
        "erofs" => {
            let image = layer::mount(Path::new(&m.source), MountAttrFlags::empty()).act("mount", &m.source)?;
            let target = rustix::fs::openat(CWD, at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open", at.display())?;
            crate::sys::mount::attach(image.as_fd(), target.as_fd()).act("mount on", at.display())
        }
        other => {
            let data = options.join(",");
            nix::mount::mount(Some(m.source.as_str()), at, Some(other), MsFlags::empty(), Some(data.as_str())).act("mount on", at.display())
        }
    }
}

/// On a thread of its own: with many layers or an older kernel it goes by the working directory, which threads otherwise share.
fn overlay(at: PathBuf, options: Vec<String>) -> Result<()> {
    let work = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).act("leave", "the shared working directory")?;
        crate::init::overlay::mount_on(&at, &options, false).act("mount overlay on", at.display())
    };
    let thread = std::thread::Builder::new().name("volume-mount".to_owned()).spawn(work).act("start", "thread")?;
    thread.join().unwrap_or_else(|_| Err(Error::internal("mount overlay: panicked")))
}

/// Where `sub_path` really is below `at`; links lead nowhere else.
fn find(at: &Path, sub_path: &str) -> Result<PathBuf> {
    if sub_path.is_empty() {
        return Ok(at.to_owned());
    }
    let root = rustix::fs::openat(CWD, at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).act("open", at.display())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let found = rustix::fs::openat2(&root, sub_path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).map_err(|e| match e {
        rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => Error::not_found(format!("the image has no {sub_path:?}")),
        rustix::io::Errno::XDEV | rustix::io::Errno::LOOP => Error::invalid(format!("{sub_path:?} leads out of the image")),
        e => Error::io(format!("find {sub_path:?}"), e.into()),
    })?;
    std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).act("find", sub_path)
}

/// Takes every mount away from `at`; none is fine.
fn unmount(at: &Path) -> Result<()> {
    for _ in 0..MAX_STACKED {
        match nix::mount::umount2(at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(e).act("unmount", at.display()),
        }
    }
    Err(Error::new(Kind::Internal, format!("unmount {}: mounts upon mounts", at.display())))
}
