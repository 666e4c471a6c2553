//! Removes directory trees without ever leaving them: every step is relative to a descriptor, links are not followed.
//! Depth is bounded by the heap, not by the stack or by open descriptors of deep trees planted in images.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::model::error::{Act, Result};

/// Levels whose descriptors stay open at once; deeper directories are moved up first.
const MAX_DEPTH: usize = 64;

/// Removes whatever is at `path`; nothing there is fine.
///
/// # Errors
/// I/O errors.
pub fn tree(path: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    match rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => tree_at(fd.as_fd(), std::os::unix::ffi::OsStrExt::as_bytes(name)),
        Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e).act("open", parent.display()),
    }
}

/// Removes whatever `name` is in the directory `at`; nothing there is fine.
///
/// # Errors
/// I/O errors.
pub fn tree_at(at: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e).act("remove", name.escape_ascii()),
    }
    let top = open_dir(at, name).act("open directory", name.escape_ascii())?;
    empty(&top).act("empty directory", name.escape_ascii())?;
    drop(top);
    rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR).act("remove directory", name.escape_ascii())
}

fn open_dir(at: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn empty(top: &OwnedFd) -> rustix::io::Result<()> {
    // Each pass that had to move something brings the rest `MAX_DEPTH` levels nearer.
    let mut moved = 0;
    while pass(top, &mut moved)? {}
    Ok(())
}

/// Empties the directory depth first with a stack of open directories. Tells whether something was moved up to the top.
fn pass(top: &OwnedFd, moved: &mut u64) -> rustix::io::Result<bool> {
    let before = *moved;
    let mut stack: Vec<(Dir, Vec<u8>)> = vec![(Dir::read_from(top)?, Vec::new())];
    while let Some((dir, _)) = stack.last_mut() {
        let Some(entry) = dir.read() else {
            let done = stack.pop();
            if let (Some((_, name)), Some((above, _))) = (done, stack.last()) {
                rustix::fs::unlinkat(above.fd()?, name.as_slice(), AtFlags::REMOVEDIR)?;
            }
            continue;
        };
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let at = dir.fd()?;
        if entry.file_type() != FileType::Directory {
            match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
                // A file system without types in its directories.
                Err(Errno::ISDIR) => {}
                other => {
                    other?;
                    continue;
                }
            }
        }
        let name = name.to_vec();
        if stack.len() >= MAX_DEPTH {
            let Some((here, _)) = stack.last() else { break };
            *moved += 1;
            // Pulled up to the top, where the walk finds it again later.
            rustix::fs::renameat(here.fd()?, name.as_slice(), top, format!(".mesocri-deep-{moved}"))?;
            continue;
        }
        let Some((here, _)) = stack.last() else { break };
        let fd = open_dir(here.fd()?, &name)?;
        stack.push((Dir::read_from(&fd)?, name));
    }
    Ok(*moved > before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_deep_trees_and_spares_link_targets() {
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("keep");
        std::fs::write(&keep, "x").unwrap();
        let victim = dir.path().join("victim");
        let mut deep = victim.clone();
        for _ in 0..300 {
            deep.push("d");
        }
        std::fs::create_dir_all(&deep).unwrap();
        std::os::unix::fs::symlink(dir.path(), victim.join("out")).unwrap();
        tree(&victim).unwrap();
        tree(&victim).unwrap();
        assert!(!victim.exists());
        assert!(keep.exists());
    }
}
