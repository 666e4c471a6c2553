//! The container's cgroup: where it is, putting the process there, and showing it inside the container.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Mount};
use rustix::fs::{CWD, Mode, OFlags};

use super::bundle::Bundle;
use super::fault::{Fault, On, Result};
use super::options::Options;
use super::resolve::{self, Kind};
use super::stage2::Child;
use super::{channel, mounts};
use crate::cgroups::{Entrance, Manager};
use crate::sys;

/// Where the hierarchies are mounted on every host we know.
const MOUNT: &str = "/sys/fs/cgroup";
/// `statfs` types of the hierarchies' file systems.
const MAGIC_V1: u64 = 0x0027_e0eb;
const MAGIC_V2: u64 = 0x6367_7270;

/// The cgroup path that the spec means; `None` when the daemon places the process.
pub(super) fn path(bundle: &Bundle) -> Result<Option<String>> {
    if bundle.extras.foreign_cgroup.is_some() {
        return Ok(None);
    }
    let path = match bundle.linux.cgroups_path() {
        Some(path) if !path.as_os_str().is_empty() => path.clone(),
        // The runtime may choose; limits need a group.
        _ => Path::new("/mesocri").join(bundle.dir.file_name().unwrap_or_default()),
    };
    let shown = path.display();
    let text = path.to_str().ok_or_else(|| Fault::new(&shown, libc::EINVAL))?;
    if !text.contains('/') && text.matches(':').count() == 2 {
        // `slice:prefix:name` is for the systemd driver, which is the daemon's.
        return Err(Fault::new(format_args!("cgroup path {shown} for systemd"), libc::EOPNOTSUPP));
    }
    if path.components().any(|c| matches!(c, Component::ParentDir)) || resolve::normal(&path) == Path::new("/") {
        return Err(Fault::new(format_args!("cgroup path {shown}"), libc::EINVAL));
    }
    Ok(Some(format!("/{}", text.trim_matches('/'))))
}

/// Makes the rest of the cgroup, whose v2 directory is there and has stage 2 in it, with the spec's limits.
///
/// Device rules take effect only once stage 2 has made the nodes, for which a spec need not give permission. On v1 that is so
/// because it joins afterwards; on v2 `nodes_made` waits for it.
pub(super) fn complete(bundle: &Bundle, group: &Manager, nodes_made: impl FnOnce() -> Result) -> Result {
    group.create_v1()?;
    let Some(resources) = bundle.linux.resources() else { return Ok(()) };
    if !group.has_v2_devices() {
        return Ok(group.apply(resources)?);
    }
    let (mut devices, mut others) = (LinuxResources::default(), resources.clone());
    devices.set_devices(resources.devices().clone());
    others.set_devices(None);
    group.apply(&others)?;
    nodes_made()?;
    Ok(group.apply(&devices)?)
}

/// Takes away what stage 1 made, after the processes have gone. A group in which somebody else is (`maybe_foreign`) stays.
pub(super) fn discard(path: &str, maybe_foreign: bool) {
    // The failure that led here is what gets reported; leftovers of the group are found by the daemon's recovery.
    match Manager::open(path) {
        Ok(manager) if maybe_foreign => manager.remove_if_empty(),
        Ok(manager) => drop(manager.delete()),
        Err(_) => {}
    }
}

/// The step: waits for stage 1 to place this process (or for the daemon to), then makes the cgroup namespace.
pub(super) fn enter(child: &mut Child<'_>) -> Result {
    if child.group.as_ref().is_some_and(Manager::has_v2_devices) {
        channel::signal(child.stage1.as_fd()).on("stage 1")?;
    }
    join(child)?;
    let own = child.bundle.namespace(LinuxNamespaceType::Cgroup) == Some(false);
    let shown = child.bundle.spec.mounts().iter().flatten().any(mounts::is_cgroup);
    if child.bundle.extras.foreign_cgroup.is_some() && (own || shown) {
        child.gate()?;
    }
    if shown {
        child.cgroups = parse(&fs::read_to_string("/proc/self/cgroup").on("/proc/self/cgroup")?);
    }
    if own {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP).on("cgroup namespace")?;
    }
    Ok(())
}

/// Waits until stage 1 is ready and joins the v1 hierarchies, unless that is stage 1's work (see [`joins_itself`]).
fn join(child: &mut Child<'_>) -> Result {
    channel::wait(child.stage1.as_fd()).on("stage 1")?;
    if let Some(group) = child.group.as_ref().filter(|_| joins_itself(child.new)) {
        group.entrance()?.enter()?;
    }
    Ok(())
}

/// Whether stage 2 may write to the cgroup's files. Root of a user namespace of its own may not: stage 1 moves it then.
pub(super) fn joins_itself(new: CloneFlags) -> bool {
    !new.contains(CloneFlags::CLONE_NEWUSER)
}

/// The step of an exec, while the host's files are in sight: opens the container's cgroup.
pub(super) fn open_entrance(child: &mut Child<'_>) -> Result {
    child.entrance = child.group.as_ref().map(Manager::entrance).transpose()?;
    Ok(())
}

/// The step of an exec: joins it, late, so that neither its processor nor its memory limit counts for the steps before.
pub(super) fn enter_open(child: &mut Child<'_>) -> Result {
    channel::wait(child.stage1.as_fd()).on("stage 1")?;
    Ok(child.entrance.take().as_ref().map_or(Ok(()), Entrance::enter)?)
}

/// Lines of `/proc/<pid>/cgroup` as controller names (or `name=x`, or nothing for v2) to path.
pub(super) fn parse(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            Some((parts.next()?.to_owned(), parts.next()?.to_owned()))
        })
        .collect()
}

/// The step: cgroup mounts of the spec.
pub(super) fn mount(child: &mut Child<'_>) -> Result {
    for m in child.bundle.spec.mounts().iter().flatten().filter(|m| mounts::is_cgroup(m)) {
        one(child, m)?;
    }
    Ok(())
}

fn one(child: &Child<'_>, m: &Mount) -> Result {
    let dest = resolve::normal(m.destination());
    let options = Options::parse(m.options().as_deref().unwrap_or_default())?;
    let target = resolve::create(child.root.as_fd(), &dest, Kind::Directory).on(dest.display())?;
    let host = open(Path::new(MOUNT))?;
    if rustix::fs::fstatfs(&host).on(MOUNT)?.f_type as u64 == MAGIC_V2 {
        return unified(child, &options, target.as_fd(), &dest);
    }
    // v1 or hybrid: a small file system with one directory for each hierarchy, writable only while it is filled.
    let tmpfs = mounts::file_system("tmpfs", Path::new("cgroup"), &["mode=755".to_owned()], options.attributes.set & !libc::MOUNT_ATTR_RDONLY)?;
    mounts::place(&tmpfs, target.as_fd(), &Options::default(), &dest)?;
    for entry in fs::read_dir(MOUNT).on(MOUNT)? {
        let entry = entry.on(MOUNT)?;
        let name = entry.file_name();
        if entry.file_type().on(MOUNT)?.is_symlink() {
            let link = fs::read_link(entry.path()).on(entry.path().display())?;
            rustix::fs::symlinkat(&link, &tmpfs, &name).on(dest.display())?;
        } else if let Some(own) = own_group(child, &entry.path())? {
            rustix::fs::mkdirat(&tmpfs, &name, Mode::from_raw_mode(0o755)).on(dest.display())?;
            let at = rustix::fs::openat(&tmpfs, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).on(dest.display())?;
            let tree = sys::mount::clone_tree(own.as_fd(), false).on(entry.path().display())?;
            let hierarchy = Options { attributes: options.attributes, ..Options::default() };
            mounts::place(&tree, at.as_fd(), &hierarchy, &dest)?;
        }
    }
    if options.attributes.set & libc::MOUNT_ATTR_RDONLY != 0 {
        mounts::make_read_only(&tmpfs).on(dest.display())?;
    }
    let after = Options { propagation: options.propagation, ..Options::default() };
    after.propagation.iter().try_for_each(|(kind, recursive)| {
        let attributes = sys::mount::Attributes { propagation: *kind, ..Default::default() };
        sys::mount::set_attributes(tmpfs.as_fd(), attributes, *recursive).on(dest.display())
    })
}

/// v2: the file system itself inside a cgroup namespace, otherwise the container's own sub-tree.
fn unified(child: &Child<'_>, options: &Options, target: BorrowedFd<'_>, dest: &Path) -> Result {
    if child.bundle.namespace(LinuxNamespaceType::Cgroup).is_some() {
        let attributes = options.attributes.set;
        if let Ok(fs) = mounts::file_system("cgroup2", Path::new("cgroup"), &[], attributes) {
            let rest = Options { propagation: options.propagation.clone(), ..Options::default() };
            return mounts::place(&fs, target, &rest, dest);
        }
        // Refused in a user namespace whose owner may not see the whole: the bind below shows the same.
    }
    let own = own_group(child, Path::new(MOUNT))?.ok_or_else(|| Fault::new(format_args!("{MOUNT}: no group of its own"), libc::ENOENT))?;
    let tree = sys::mount::clone_tree(own.as_fd(), false).on(dest.display())?;
    mounts::place(&tree, target, options, dest)
}

/// The container's directory in the hierarchy mounted at `mount`. `None` when that is no hierarchy, or the process is not placed
/// in it: then its group is shared with the host and none of the container's business.
fn own_group(child: &Child<'_>, mount: &Path) -> Result<Option<OwnedFd>> {
    let root = open(mount)?;
    let magic = rustix::fs::fstatfs(&root).on(mount.display())?.f_type as u64;
    let name = mount.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let own = child.cgroups.iter().find(|(controllers, _)| match magic {
        MAGIC_V2 => controllers.is_empty(),
        MAGIC_V1 => {
            let controllers = controllers.strip_prefix("name=").unwrap_or(controllers);
            controllers == name || controllers.split(',').all(|c| name.split(',').any(|n| n == c))
        }
        _ => false,
    });
    let Some((controllers, path)) = own else { return Ok(None) };
    if path == "/" || child.inherited_cgroups.get(controllers) == Some(path) {
        return Ok(None);
    }
    let relative = PathBuf::from(path.trim_start_matches('/'));
    match rustix::fs::openat(&root, &relative, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        // Mounted somewhere else in that hierarchy.
        Err(rustix::io::Errno::NOENT) => Ok(None),
        other => other.on(mount.display()).map(Some),
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).on(path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_cgroup_name_their_hierarchy() {
        let got = parse("9:name=systemd:/\n4:memory:/a:b\n1:cpu,cpuacct:/x\n0::/u\n");
        let got: Vec<_> = got.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(got, [("", "/u"), ("cpu,cpuacct", "/x"), ("memory", "/a:b"), ("name=systemd", "/")]);
    }
}
