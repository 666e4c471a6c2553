//! The container's root: propagation of the copied host mounts, the root filesystem's own mounts, and the change of root.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::FsOpenFlags;

use super::fault::{Fault, On, Result};
use super::mounts;
use super::options::{self, Options};
use super::stage2::Child;
use crate::model::image::RootMount;
use crate::stdx::kernel;

/// Longest string value that fsconfig takes.
const FSCONFIG_MAX: usize = 255;
/// Bytes of options that mount(2) takes: one page with its end.
const MOUNT_DATA_MAX: usize = 4095;

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
    let tree = if m.fstype == "bind" || options.bind.is_some() {
        mounts::copy(&bundle.join(&m.source), options.bind != Some(false))?
    } else {
        let attributes = std::mem::take(&mut options.attributes);
        let made = if m.fstype == "overlay" { overlay(&m.source, &options.data, attributes.set)? } else { None };
        match made {
            Some(tree) => tree,
            None if m.fstype == "overlay" => {
                classic_overlay(path, &options.data, attributes.set)?;
                return open_root(path);
            }
            None => mounts::file_system(&m.fstype, Path::new(&m.source), &options.data, attributes.set)?,
        }
    };
    mounts::place(&tree, target.as_fd(), &options, path)?;
    Ok(tree)
}

/// An overlay by the new mount interface, one layer a call, so that their number and the length of their names do not matter.
/// `None` when this kernel (before 6.5) or these options need the classic call.
fn overlay(source: &str, data: &[String], attributes: u64) -> Result<Option<OwnedFd>> {
    if !kernel::overlay_knows_its_options() {
        return Ok(None);
    }
    let fs = match rustix::mount::fsopen(c"overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Err(Errno::NOSYS) => return Ok(None),
        other => other.on("overlay")?,
    };
    rustix::mount::fsconfig_set_string(&fs, c"source", source).on(source)?;
    for option in data {
        let set = match option.split_once('=') {
            // Data-only layers ("::") have a key of their own; rare, and the classic call knows them.
            Some((_, value)) if value.contains("::") => return Ok(None),
            Some(("lowerdir", layers)) => {
                let layers = split_layers(layers);
                if layers.iter().any(|l| l.len() > FSCONFIG_MAX) {
                    return Ok(None);
                }
                layers.iter().try_for_each(|l| rustix::mount::fsconfig_set_string(&fs, c"lowerdir+", l.as_str()))
            }
            Some((_, value)) if value.len() > FSCONFIG_MAX => return Ok(None),
            Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value),
            None => rustix::mount::fsconfig_set_flag(&fs, option.as_str()),
        };
        match set {
            Err(Errno::INVAL) if option.starts_with("lowerdir=") => return Ok(None),
            other => other.on(format_args!("overlay option {option}"))?,
        }
    }
    mounts::finish(&fs, "overlay", attributes).map(Some)
}

/// Overlay by mount(2). Options longer than a page are shortened: the layers relative to the directory they share.
fn classic_overlay(target: &Path, data: &[String], attributes: u64) -> Result {
    let mut text = data.join(",");
    let mut moved = false;
    if text.len() > MOUNT_DATA_MAX {
        let (base, short) = shorten(data).ok_or_else(|| Fault::new("overlay options longer than a page", libc::E2BIG))?;
        rustix::process::chdir(&base).on(base.display())?;
        (text, moved) = (short, true);
    }
    // The four lowest bits mean the same in both interfaces.
    let flags = MsFlags::from_bits_retain(attributes & 0xf);
    let mounted = nix::mount::mount(Some("overlay"), target, Some("overlay"), flags, Some(text.as_str())).on(target.display());
    if moved {
        rustix::process::chdir("/").on("/")?;
    }
    mounted
}

/// The options with `lowerdir` relative to the layers' common directory, which comes first.
fn shorten(data: &[String]) -> Option<(PathBuf, String)> {
    let lower = data.iter().find_map(|o| o.strip_prefix("lowerdir="))?;
    let layers = split_layers(lower);
    let mut base = PathBuf::from(layers.first()?);
    while !layers.iter().all(|l| Path::new(l) != base && Path::new(l).starts_with(&base)) {
        if !base.pop() {
            return None;
        }
    }
    let short: Option<Vec<_>> = layers.iter().map(|l| Path::new(l).strip_prefix(&base).ok()?.to_str().map(|s| s.replace(':', "\\:"))).collect();
    let short = format!("lowerdir={}", short?.join(":"));
    let text = data.iter().map(|o| if o.starts_with("lowerdir=") { short.as_str() } else { o.as_str() }).collect::<Vec<_>>().join(",");
    (text.len() <= MOUNT_DATA_MAX).then_some((base, text))
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

/// The step: `root.readonly`.
pub(super) fn read_only(child: &mut Child<'_>) -> Result {
    match child.bundle.spec.root().as_ref().and_then(|r| r.readonly()) {
        Some(true) => mounts::make_read_only(&child.root).on("/"),
        _ => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_split_at_bare_colons() {
        assert_eq!(split_layers(r"/a:/b\:c:/d\\e"), ["/a", "/b:c", r"/d\e"]);
    }

    #[test]
    fn long_options_become_relative() {
        let lower: Vec<_> = (0..100).map(|i| format!("/var/lib/some/quite/long/store/layers/{i:04}/fs")).collect();
        let data = [format!("lowerdir={}", lower.join(":")), "upperdir=/u".to_owned()];
        let (base, text) = shorten(&data).unwrap();
        assert_eq!(base, Path::new("/var/lib/some/quite/long/store/layers"));
        assert!(text.starts_with("lowerdir=0000/fs:0001/fs:") && text.ends_with("0099/fs,upperdir=/u"), "{text}");
    }
}
