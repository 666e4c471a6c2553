//! Removing trees that somebody else has filled: a container's volume, a bundle.
//!
//! `std::fs::remove_dir_all` recurses as deep as the tree does and walks into mounts. Here a mount stops the removal (what is
//! behind it is not ours), links are never followed, and depth costs neither stack nor descriptors: directories
//! below [`MAX_DEPTH`] are moved up and removed from there.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, renameat, unlinkat};
use rustix::io::Errno;

use crate::model::error::{Act, Result};

/// Descriptors held at once while walking; deeper directories are moved up first.
const MAX_DEPTH: usize = 24;

/// Removes the directory `path` and everything in it. Missing is fine.
///
/// # Errors
/// I/O errors naming the path; a mount point inside is `EXDEV`.
pub fn remove(path: &Path) -> Result<()> {
    let top = match open(rustix::fs::CWD, path.as_os_str(), false) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e).act("open for removal", path.display()),
    };
    let mut moved = 0u64;
    loop {
        let before = moved;
        empty(top.as_fd(), top.as_fd(), 0, &mut moved).act("remove content of", path.display())?;
        if moved == before {
            break;
        }
    }
    match unlinkat(rustix::fs::CWD, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e).act("remove directory", path.display()),
    }
}

fn open(dir: BorrowedFd<'_>, name: impl rustix::path::Arg, stay: bool) -> rustix::io::Result<OwnedFd> {
    // The top itself is named by us and may lie on any mount; below it no mount may be crossed.
    let resolve = if stay { ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH } else { ResolveFlags::empty() };
    openat2(dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Empties `dir`, which is `depth` below `top`.
fn empty(top: BorrowedFd<'_>, dir: BorrowedFd<'_>, depth: usize, moved: &mut u64) -> rustix::io::Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let directory = match entry.file_type() {
            FileType::Directory => true,
            FileType::Unknown => rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|s| FileType::from_raw_mode(s.st_mode).is_dir()),
            _ => false,
        };
        if !directory {
            gone(unlinkat(dir, name, AtFlags::empty()))?;
        } else if depth >= MAX_DEPTH {
            *moved += 1;
            hoist(top, dir, name)?;
        } else {
            let child = match open(dir, name, true) {
                Err(Errno::NOENT) => continue,
                other => other?,
            };
            empty(top, child.as_fd(), depth + 1, moved)?;
            gone(unlinkat(dir, name, AtFlags::REMOVEDIR))?;
        }
    }
    Ok(())
}

/// Moves a deep directory into `top` under a name that is free.
fn hoist(top: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<()> {
    let mut bytes = [0u8; 8];
    crate::sys::random::fill(&mut bytes);
    renameat(dir, name, top, format!(".deep-{:016x}", u64::from_ne_bytes(bytes)))
}

fn gone(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_files_links_and_directories_but_not_what_links_name() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "x").unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b")).unwrap();
        std::fs::write(tree.join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/link")).unwrap();
        remove(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("kept").exists());
        remove(&tree).unwrap();
    }

    #[test]
    fn depth_beyond_any_path_limit_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        let mut at = open(rustix::fs::CWD, tree.as_os_str(), false).unwrap();
        let name = "d".repeat(200);
        for _ in 0..200 {
            rustix::fs::mkdirat(&at, name.as_str(), Mode::RWXU).unwrap();
            at = open(at.as_fd(), name.as_str(), true).unwrap();
        }
        remove(&tree).unwrap();
        assert!(!tree.exists());
    }
}
