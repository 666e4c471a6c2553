//! Writes to procfs, through a procfs that nobody else can touch: mounted for this and never attached anywhere, so that neither
//! a link nor a mount of the container's can stand in a path's way.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::fault::{Fault, On, Result};
use super::mounts;
use super::stage2::Child;

/// Sysctls that belong to the ipc namespace.
const IPC: &[&str] =
    &["kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced"];

/// The step: `linux.sysctl`. Only those of a namespace that the spec lists: any other would change the host.
pub(super) fn sysctls(child: &mut Child<'_>) -> Result {
    let Some(sysctls) = child.bundle.linux.sysctl() else { return Ok(()) };
    for (name, value) in sysctls {
        // Both `net.core.x` and `net/core/x` are written; in the second a dot is part of an interface's name.
        let file: PathBuf = if name.contains('/') { name.into() } else { name.replace('.', "/").into() };
        // Such as `net/../kernel/core_pattern`, whose first word would speak for a file it does not name.
        if name.contains('\0') || !file.components().all(|c| matches!(c, Component::Normal(_))) || file.as_os_str().is_empty() {
            return Err(Fault::new(name, libc::EINVAL));
        }
        let dotted = name.replace('/', ".");
        let owner = match dotted.split('.').next() {
            Some("net") => Some(LinuxNamespaceType::Network),
            Some("fs") if dotted.starts_with("fs.mqueue.") => Some(LinuxNamespaceType::Ipc),
            Some("kernel") if IPC.contains(&dotted.as_str()) => Some(LinuxNamespaceType::Ipc),
            Some("kernel") if dotted == "kernel.domainname" || dotted == "kernel.hostname" => Some(LinuxNamespaceType::Uts),
            _ => None,
        };
        if owner.is_none_or(|ns| child.bundle.namespace(ns).is_none()) {
            return Err(Fault::new(format_args!("{name}: not in a namespace of the container"), libc::EPERM));
        }
        write(child, &Path::new("sys").join(file), value).map_err(|e| Fault::new(format_args!("{name}={value}"), e.raw_os_error()))?;
    }
    Ok(())
}

/// Tells the security module what the program to come runs as: the attribute file for the next execve.
pub(super) fn exec_label(child: &mut Child<'_>, module: &str, text: &str) -> Result {
    let own = PathBuf::from(format!("self/attr/{module}/exec"));
    match write(child, &own, text) {
        // Before Linux 5.8 all modules shared one file.
        Err(rustix::io::Errno::NOENT) => write(child, Path::new("self/attr/exec"), text).on(text),
        other => other.on(text),
    }
}

fn write(child: &mut Child<'_>, path: &Path, value: &str) -> rustix::io::Result<()> {
    let proc: &OwnedFd = match &child.proc {
        Some(proc) => proc,
        None => {
            let made = mounts::file_system("proc", Path::new("proc"), &[], libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC);
            child.proc.insert(made.map_err(|_| rustix::io::Errno::PERM)?)
        }
    };
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let file = rustix::fs::openat2(proc.as_fd(), path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), how)?;
    rustix::io::write(&file, value.as_bytes()).map(drop)
}
