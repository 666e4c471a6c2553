//! Directories that a layer's archive used without listing them. In the layer they have default metadata, and a union of
//! layers shows the uppermost: a layer that brings `tmp/x` alone would turn `/tmp` of its base into 0755. Layers are shared
//! between images with different bases, so it is put right per container: the writable directory gets the directory with the
//! metadata of the layer that does list it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::metadata;
use super::unpack::tree::OPAQUE;
use crate::model::error::{Act, Result};

/// One layer: its files and what its archive implied.
pub struct Layer<'a> {
    /// Its files, in any form.
    pub files: &'a Path,
    /// Paths without metadata of their own.
    pub implied: &'a [String],
}

/// Puts metadata of implied directories right in `writable`: below its root, which the backend has seen to. `layers` are lowest
/// first. Blocks.
///
/// # Errors
/// I/O failures.
pub fn put_right(layers: &[Layer<'_>], writable: &Path) -> Result<()> {
    // Parents first.
    let paths: BTreeSet<&str> = layers.iter().flat_map(|l| l.implied).map(String::as_str).filter(|path| !path.is_empty()).collect();
    if paths.is_empty() {
        return Ok(());
    }
    let roots = layers.iter().map(|l| open_root(l.files)).collect::<Result<Vec<_>>>()?;
    let target = open_root(writable)?;
    let times_of_root = metadata::times(&rustix::fs::fstat(&target).act("stat", writable.display())?);
    let mut right: BTreeMap<String, OwnedFd> = BTreeMap::new();
    for path in paths {
        let Some(source) = wanted(layers, &roots, path) else { continue };
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let above = &path[..end];
            if resolve(target.as_fd(), above, OFlags::PATH).is_ok() {
                continue;
            }
            rustix::fs::mkdirat(&target, above, Mode::from_raw_mode(0o700)).act("create directory", above)?;
            if let Some(source) = shown(layers, &roots, above) {
                right.insert(above.to_owned(), source);
            }
        }
        right.insert(path.to_owned(), source);
    }
    if right.is_empty() {
        return Ok(());
    }
    // When all are made, since making one changes the times of its parent.
    for (path, source) in &right {
        let to = resolve(target.as_fd(), path, OFlags::RDONLY).act("open directory", path)?;
        let stat = rustix::fs::fstat(source).act("stat", path)?;
        metadata::replace(source.as_fd(), to.as_fd(), &stat).act("copy metadata to", path)?;
    }
    let root = resolve(target.as_fd(), ".", OFlags::RDONLY).act("open directory", writable.display())?;
    rustix::fs::futimens(&root, &times_of_root).act("set times of", writable.display())
}

/// The directory whose metadata `path` should have, when what the union shows is an implied one and a lower layer knows better.
/// One that says nothing but the default is not worth a directory in every container.
fn wanted(layers: &[Layer<'_>], roots: &[OwnedFd], path: &str) -> Option<OwnedFd> {
    let mut below_implied = false;
    for (layer, root) in layers.iter().zip(roots).rev() {
        let dir = match resolve(root.as_fd(), path, OFlags::RDONLY) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => continue,
            // Not a directory here, or not by this way: it is something else from here down.
            Err(_) => return None,
        };
        if !layer.implied.iter().any(|i| i == path) {
            return Some(dir).filter(|dir| below_implied && !is_default(dir.as_fd()));
        }
        if is_opaque(dir.as_fd()) {
            return None;
        }
        below_implied = true;
    }
    None
}

fn is_default(dir: BorrowedFd<'_>) -> bool {
    let plain = rustix::fs::fstat(dir).is_ok_and(|s| (s.st_mode & 0o7777, s.st_uid, s.st_gid) == (0o755, 0, 0));
    plain && metadata::names(dir).is_ok_and(|names| names.is_empty())
}

/// What the union shows of a directory: the uppermost that lists it, else the uppermost.
fn shown(layers: &[Layer<'_>], roots: &[OwnedFd], path: &str) -> Option<OwnedFd> {
    wanted(layers, roots, path).or_else(|| roots.iter().rev().find_map(|root| resolve(root.as_fd(), path, OFlags::RDONLY).ok()))
}

fn open_root(path: &Path) -> Result<OwnedFd> {
    crate::disk::layer::root(path).act("open layer", path.display())
}

/// Directories only, through no link: layers are hostile and this runs on the host.
fn resolve(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat2(root, path, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

fn is_opaque(dir: BorrowedFd<'_>) -> bool {
    let mut value = [0u8; 4];
    rustix::fs::fgetxattr(dir, OPAQUE, value.as_mut_slice()).is_ok_and(|n| n == 1 && value[0] == b'y')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn takes_metadata_from_the_layer_that_lists_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let make = |layer: &str, path: &str, mode: u32| {
            let path = dir.path().join(layer).join(path);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        make("base", "tmp", 0o1777);
        make("base", "root", 0o700);
        make("base", "home/user", 0o750);
        make("base", "hidden", 0o700);
        make("base", "away", 0o700);
        make("mid", "root", 0o755);
        make("mid", "tmp", 0o755);
        make("mid", "home/user", 0o755);
        make("mid", "hidden", 0o755);
        rustix::fs::lsetxattr(dir.path().join("mid/hidden"), OPAQUE, b"y", rustix::fs::XattrFlags::empty()).unwrap();
        make("mid", "away", 0o755);
        make("top", "root", 0o711);
        std::os::unix::fs::symlink("/tmp", dir.path().join("top/away")).unwrap();
        make("upper", "", 0o755);
        let files: Vec<_> = ["base", "mid", "top"].iter().map(|l| dir.path().join(l)).collect();
        let implied: Vec<String> = ["root", "tmp", "home", "home/user", "hidden", "away"].map(str::to_owned).to_vec();
        let layers = [Layer { files: &files[0], implied: &[] }, Layer { files: &files[1], implied: &implied }, Layer { files: &files[2], implied: &[] }];
        put_right(&layers, &dir.path().join("upper")).unwrap();
        let mode = |path: &str| std::fs::symlink_metadata(dir.path().join("upper").join(path)).map(|m| m.mode() & 0o7777).ok();
        assert_eq!((mode("tmp"), mode("home/user"), mode("home")), (Some(0o1777), Some(0o750), Some(0o755)));
        assert_eq!((mode("root"), mode("hidden"), mode("away")), (None, None, None));
    }
}
