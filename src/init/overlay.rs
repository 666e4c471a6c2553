//! Overlay as a root filesystem, from up to 500 layers, each a directory or an image that is mounted here: in the container's
//! own mount namespace, so that the host's mount table sees none of it.
//!
//! Layers go to the kernel one by one (`lowerdir+`, Linux >= 6.7), images as descriptors of detached mounts (Linux >= 6.15 takes
//! those). Older kernels take one page of options by mount(2); what does not fit, or is an image, gets a number for a name in a
//! scratch directory below the root filesystem: 500 numbers are 1,890 bytes.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::MsFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountAttrFlags};

use super::fault::{Fault, On, Result};
use super::mounts;
use crate::disk::layer;
use crate::stdx::kernel;

/// Longest string value that fsconfig takes.
const FSCONFIG_MAX: usize = 255;
/// Bytes of options that mount(2) takes: one page with its end.
const MOUNT_DATA_MAX: usize = 4095;

/// Makes the overlay. A detached mount, or `None` when it is on `target` already.
pub(super) fn mount(target: &Path, source: &str, data: &[String], attributes: u64) -> Result<Option<OwnedFd>> {
    match one_by_one(source, data, attributes)? {
        Some(tree) => Ok(Some(tree)),
        None => by_page(target, data, attributes).map(|()| None),
    }
}

/// The new mount interface, one layer a call. `None` when this kernel or these options need the classic call.
fn one_by_one(source: &str, data: &[String], attributes: u64) -> Result<Option<OwnedFd>> {
    if !kernel::overlay_knows_its_options() {
        return Ok(None);
    }
    let fs = match rustix::mount::fsopen(c"overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Err(Errno::NOSYS) => return Ok(None),
        other => other.on("overlay")?,
    };
    rustix::mount::fsconfig_set_string(&fs, c"source", source).on(source)?;
    // Until the overlay has its own references.
    let mut images = Vec::new();
    for option in data {
        let set = match option.split_once('=') {
            // Data-only layers ("::") have a key of their own; rare, and the classic call knows them.
            Some((_, value)) if value.contains("::") => return Ok(None),
            Some(("lowerdir", layers)) => match lower(&fs, &split_layers(layers), &mut images) {
                Err(e) if e.errno() == libc::EINVAL => return Ok(None),
                other => {
                    other?;
                    continue;
                }
            },
            Some((_, value)) if value.len() > FSCONFIG_MAX => return Ok(None),
            Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value),
            None => rustix::mount::fsconfig_set_flag(&fs, option.as_str()),
        };
        set.on(format_args!("overlay option {option}"))?;
    }
    match mounts::finish(&fs, "overlay", attributes) {
        // Linux < 6.15 wants layers that are mounted somewhere.
        Err(e) if e.errno() == libc::EINVAL && !images.is_empty() => Ok(None),
        other => other.map(Some),
    }
}

fn lower(fs: &OwnedFd, layers: &[String], images: &mut Vec<OwnedFd>) -> Result {
    for path in layers {
        if layer::is_image(Path::new(path)) {
            let image = layer::mount(Path::new(path), MountAttrFlags::empty()).on(path)?;
            // Kernels that do not know this answer in several ways.
            rustix::mount::fsconfig_set_fd(fs, c"lowerdir+", image.as_fd()).map_err(|_| Errno::INVAL).on(path)?;
            images.push(image);
        } else if path.len() > FSCONFIG_MAX {
            return Err(Fault::new(path, libc::EINVAL));
        } else {
            rustix::mount::fsconfig_set_string(fs, c"lowerdir+", path.as_str()).on(path)?;
        }
    }
    Ok(())
}

/// The classic call.
fn by_page(target: &Path, data: &[String], attributes: u64) -> Result {
    let layers = data.iter().find_map(|o| o.strip_prefix("lowerdir=")).map(split_layers).unwrap_or_default();
    let mut text = data.join(",");
    let scratch = text.len() > MOUNT_DATA_MAX || layers.iter().any(|l| layer::is_image(Path::new(l)));
    if scratch {
        text = numbered(data, layers.len());
        if text.len() > MOUNT_DATA_MAX {
            return Err(Fault::new(format_args!("overlay options of {} layers, longer than a page", layers.len()), libc::E2BIG));
        }
        let dir = make_scratch(target, &layers)?;
        rustix::process::fchdir(&dir).on(target.display())?;
    }
    // The four lowest bits mean the same in both interfaces.
    let flags = MsFlags::from_bits_retain(attributes & 0xf);
    let mounted = nix::mount::mount(Some("overlay"), target, Some("overlay"), flags, Some(text.as_str())).on(target.display());
    if scratch {
        rustix::process::chdir("/").on("/")?;
    }
    mounted
}

/// The options with numbers for layers.
fn numbered(data: &[String], layers: usize) -> String {
    let numbers = || (0..layers).map(|n| n.to_string()).collect::<Vec<_>>().join(":");
    data.iter().map(|o| if o.starts_with("lowerdir=") { format!("lowerdir={}", numbers()) } else { o.clone() }).collect::<Vec<_>>().join(",")
}

/// A directory in memory with the layers by number. It lies where the overlay will cover it, and goes with the old root.
fn make_scratch(target: &Path, layers: &[String]) -> Result<OwnedFd> {
    nix::mount::mount(Some("mesocri"), target, Some("tmpfs"), MsFlags::empty(), Some("mode=700")).on(target.display())?;
    let dir = rustix::fs::openat(CWD, target, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).on(target.display())?;
    for (number, path) in layers.iter().enumerate() {
        let number = number.to_string();
        if layer::is_image(Path::new(path)) {
            let image = layer::mount(Path::new(path), MountAttrFlags::empty()).on(path)?;
            rustix::fs::mkdirat(&dir, &number, Mode::RWXU).on(&number)?;
            let at = rustix::fs::openat(&dir, &number, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).on(&number)?;
            crate::sys::mount::attach(image.as_fd(), at.as_fd()).on(path)?;
        } else {
            let absolute = std::path::absolute(path).on(path)?;
            rustix::fs::symlinkat(&absolute, &dir, &number).on(&number)?;
        }
    }
    Ok(dir)
}

/// The layers of a `lowerdir=` value, topmost first; `\` takes the next character as it is.
fn split_layers(value: &str) -> Vec<String> {
    let mut layers = vec![String::new()];
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (c, layers.last_mut()) {
            (':', _) => layers.push(String::new()),
            ('\\', Some(layer)) => layer.extend(chars.next()),
            (c, Some(layer)) => layer.push(c),
            (_, None) => {}
        }
    }
    layers
}

/// Mounts on `target` in the caller's mount namespace as a container would have it; for probing what works here. `classic` takes
/// the way of older kernels.
///
/// # Errors
/// The cause.
pub fn mount_on(target: &Path, data: &[String], classic: bool) -> std::io::Result<()> {
    let made = if classic { by_page(target, data, 0).map(|()| None) } else { mount(target, "overlay", data, 0) };
    if let Some(tree) = made.map_err(|e| std::io::Error::from_raw_os_error(e.errno()))? {
        let at = rustix::fs::openat(CWD, target, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        crate::sys::mount::attach(tree.as_fd(), at.as_fd())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_split_at_bare_colons() {
        assert_eq!(split_layers(r"/a:/b\:c:/d\\e"), ["/a", "/b:c", r"/d\e"]);
    }

    #[test]
    fn numbers_for_layers_fit_a_page_of_options() {
        let data = ["lowerdir=/x:/y:/z".to_owned(), format!("upperdir=/{}", "u".repeat(255)), format!("workdir=/{}", "w".repeat(255)), "volatile".to_owned()];
        assert!(numbered(&data, 3).starts_with("lowerdir=0:1:2,upperdir=/u"));
        assert!(numbered(&data, 3).ends_with("w,volatile"));
        assert!(numbered(&data, 500).len() <= MOUNT_DATA_MAX);
    }
}
