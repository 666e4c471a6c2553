//! Anonymous volumes: for each `VOLUME` of the image that no mount of the request covers, a directory on the host that starts
//! with what the image has there: content, owner, mode.
//!
//! The copy reads through [`super::lookup`], one name at a time below open directories, and writes the same way into a
//! directory that nobody else knows, so neither side can be led elsewhere (attack case 13).

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timestamps, Uid};

use super::super::ContainerCx;
use super::super::parts::{container_path, mount};
use super::lookup::{self, Dir, Found, Target};
use crate::model::error::{Act, Error, Result};
use crate::stdx::blocking;

/// Deepest directory copied: an image with more is made to exhaust us.
const MAX_DEPTH: usize = 256;

/// Makes the volumes below `base` and returns their mounts. What is there already stays.
///
/// # Errors
/// `InvalidArgument` for a path with `..` and for the root; I/O failures.
pub async fn prepare(base: &Path, container: &ContainerCx<'_>) -> Result<Vec<Mount>> {
    let mut wanted = Vec::new();
    for volume in &container.image.config.volumes {
        let path = container_path("the image's volume", volume)?;
        let covered = container.spec.mounts.iter().any(|m| container_path("mount", &m.container_path).is_ok_and(|p| p == path));
        if !covered && !wanted.contains(&path) {
            wanted.push(path);
        }
    }
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let (base, layers) = (base.to_owned(), container.rootfs.lookup.clone());
    blocking::run("make the image's volumes", move || {
        let one = |(n, path): (usize, &PathBuf)| {
            let host = base.join(n.to_string());
            make(&base, n, path, &layers).map_err(|e| e.within(format!("make volume {}", path.display())))?;
            Ok(mount(path, "bind", host, &["rbind", "rprivate", "rw"]))
        };
        wanted.iter().enumerate().map(one).collect()
    })
    .await
}

/// Removes all volumes of a container; none is fine.
///
/// # Errors
/// I/O failures.
pub async fn remove(base: PathBuf) -> Result<()> {
    if !base.exists() {
        return Ok(());
    }
    blocking::run("remove the image's volumes", move || match std::fs::remove_dir_all(&base) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("remove {}", base.display()), e)),
        _ => Ok(()),
    })
    .await
}

/// Copies into a temporary name and renames: a volume is whole or not there.
fn make(base: &Path, n: usize, path: &Path, layers: &[PathBuf]) -> Result<()> {
    let (done, staging) = (base.join(n.to_string()), base.join(format!("{n}.new")));
    if done.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(base).act("create", base.display())?;
    match std::fs::remove_dir_all(&staging) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(format!("remove {}", staging.display()), e)),
        _ => {}
    }
    std::fs::create_dir(&staging).act("create", staging.display())?;
    let target = rustix::fs::open(&staging, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).act("open", staging.display())?;
    match lookup::resolve(layers, path)? {
        Some(Target::Dir(dir)) => copy_dir(&dir, &target, MAX_DEPTH)?,
        Some(Target::Other { .. }) => return Err(Error::invalid("the image has something there that is no directory")),
        None => rustix::fs::fchmod(&target, Mode::from_raw_mode(0o755)).act("change mode of", staging.display())?,
    }
    drop(target);
    std::fs::rename(&staging, &done).act("rename into place", done.display())
}

fn copy_dir(from: &Dir, to: &OwnedFd, depth: usize) -> Result<()> {
    if depth == 0 {
        return Err(Error::invalid(format!("directories nest deeper than {MAX_DEPTH}")));
    }
    for name in from.names()? {
        let copied = match from.find(&name)? {
            None => Ok(()),
            Some(Found::Dir(dir)) => copy_subdir(&dir, to, &name, depth),
            Some(Found::Other { part, stat }) => copy_other(from, part, &stat, to, &name),
        };
        copied.map_err(|e| e.within(format!("copy {}", name.display())))?;
    }
    // Last: writing into a directory changes its times.
    let stat = rustix::fs::fstat(from.top()?).act("stat", "directory")?;
    copy_xattrs(from.top()?, None, to)?;
    copy_owner_mode_times(&stat, to)
}

fn copy_subdir(from: &Dir, to: &OwnedFd, name: &OsStr, depth: usize) -> Result<()> {
    rustix::fs::mkdirat(to, name, Mode::RWXU).act("create", "directory")?;
    let target = rustix::fs::openat(to, name, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).act("open", "directory")?;
    copy_dir(from, &target, depth - 1)
}

fn copy_other(from: &Dir, part: usize, stat: &Stat, to: &OwnedFd, name: &OsStr) -> Result<()> {
    let owner = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
    let chown = || rustix::fs::chownat(to, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).act("change owner of", "copy");
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let mut source = from.open(part, name)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut target = std::fs::File::from(rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR).act("create", "copy")?);
            std::io::copy(&mut source, &mut target).act("copy", "content")?;
            let target = OwnedFd::from(target);
            copy_owner_mode_times(stat, &target)?;
            // After the owner: changing it clears file capabilities.
            copy_xattrs(from.part(part)?, Some(name), &target)
        }
        FileType::Symlink => {
            rustix::fs::symlinkat(from.link(part, name)?, to, name).act("create", "link")?;
            chown()
        }
        // Sockets mean nothing without their listener.
        FileType::Socket => Ok(()),
        kind => {
            rustix::fs::mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode & 0o7777), stat.st_rdev).act("create", "special file")?;
            chown()?;
            rustix::fs::chmodat(to, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty()).act("change mode of", "special file")
        }
    }
}

fn copy_owner_mode_times(stat: &Stat, to: &OwnedFd) -> Result<()> {
    rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid))).act("change owner of", "copy")?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777)).act("change mode of", "copy")?;
    let at = |sec, nsec: u64| rustix::fs::Timespec { tv_sec: sec, tv_nsec: nsec as i64 };
    let times = Timestamps { last_access: at(stat.st_atime, stat.st_atime_nsec), last_modification: at(stat.st_mtime, stat.st_mtime_nsec) };
    rustix::fs::futimens(to, &times).act("set times of", "copy")
}

/// Copies `security.*` and `user.*`, which belong to files; `trusted.*` belongs to overlay.
fn copy_xattrs(dir: &OwnedFd, name: Option<&OsStr>, to: &OwnedFd) -> Result<()> {
    use std::os::fd::AsRawFd;
    // Names below an open directory in /proc: there is no call for attributes relative to a directory before 6.13. `l`: the
    // last name is not followed.
    let mut source = PathBuf::from(format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd()));
    match name {
        Some(name) => source.push(name),
        None => source.push("."),
    }
    let mut list = vec![0u8; 64 << 10];
    let size = match rustix::fs::llistxattr(&source, &mut list) {
        Ok(size) => size,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
        Err(e) => return Err(e).act("list attributes of", source.display()),
    };
    for key in list.get(..size).unwrap_or_default().split(|b| *b == 0) {
        let Ok(key) = std::str::from_utf8(key) else { continue };
        if !(key.starts_with("security.") || key.starts_with("user.")) || key.starts_with("user.overlay.") || key == "security.selinux" {
            continue;
        }
        let mut value = vec![0u8; 64 << 10];
        let size = rustix::fs::lgetxattr(&source, key, &mut value).act("read attribute", key)?;
        rustix::fs::fsetxattr(to, key, value.get(..size).unwrap_or_default(), rustix::fs::XattrFlags::empty()).act("set attribute", key)?;
    }
    Ok(())
}
