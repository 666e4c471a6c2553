//! A layer's root, in whatever form the layer is kept: a directory, or an EROFS image that the provisioner wrote.
//!
//! Images are mounted detached: nothing appears in any mount table, and the mount goes with its descriptor. Linux >= 6.12 mounts
//! the file; older kernels get a loop device that goes with the mount.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// What layer images are called; anything else is a directory.
pub const IMAGE_SUFFIX: &str = ".erofs";

/// Whether a layer at this path is an image.
pub fn is_image(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(IMAGE_SUFFIX.as_bytes())
}

/// The root of the layer at `path`, as a descriptor for looking names up. Nothing can be run from it.
///
/// # Errors
/// As open(2), and those of mounting.
pub fn root(path: &Path) -> rustix::io::Result<OwnedFd> {
    if is_image(path) {
        return mount(path, MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC);
    }
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A detached, read-only mount of an image.
///
/// # Errors
/// As fsconfig(2); `ENODEV` when the kernel has no EROFS.
pub fn mount(image: &Path, attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let file = File::from(rustix::fs::openat(CWD, image, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?);
    // By its descriptor: the kernel takes no more than 255 bytes here.
    match from(&format!("/proc/self/fd/{}", file.as_raw_fd()), attributes) {
        Err(Errno::NOTBLK) => mount_by_loop(&file, attributes),
        other => other,
    }
}

/// The same through a loop device, as before Linux 6.12.
///
/// # Errors
/// As [`mount`], and those of loop devices.
pub fn mount_by_loop(file: &File, attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    use std::os::fd::AsFd;
    let errno = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
    let (_device, path) = crate::sys::loopdev::attach(file.as_fd()).map_err(errno)?;
    from(&path.display().to_string(), attributes)
}

fn from(source: &str, attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen(c"erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&fs, c"source", source)?;
    rustix::mount::fsconfig_set_flag(&fs, c"ro")?;
    rustix::mount::fsconfig_create(&fs)?;
    rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY | attributes)
}
