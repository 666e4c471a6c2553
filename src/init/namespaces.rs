//! Which namespaces a container gets: new ones by clone flags, others joined by path.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType};
use rustix::fs::{CWD, Mode, OFlags};

use super::bundle::{Bundle, has_path};
use super::fault::{Fault, On, Result};

/// A namespace to join.
pub(super) struct Join {
    pub(super) path: PathBuf,
    pub(super) fd: OwnedFd,
    pub(super) flag: CloneFlags,
}

/// The spec's namespaces, opened before anything is entered.
pub(super) struct Namespaces {
    /// For clone: all new ones but the cgroup namespace, which is unshared once the process is in its cgroup.
    pub(super) new: CloneFlags,
    /// Joined by stage 2, except [`Namespaces::pid`].
    pub(super) join: Vec<Join>,
    /// Joined by stage 1 before the clone: it takes effect for children only.
    pub(super) pid: Option<Join>,
}

impl Namespaces {
    pub(super) fn open(bundle: &Bundle) -> Result<Self> {
        let mut namespaces = Self { new: CloneFlags::empty(), join: Vec::new(), pid: None };
        for ns in bundle.linux.namespaces().iter().flatten() {
            let flag = match ns.typ() {
                LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
                LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
                LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
                LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
                LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
                LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
                LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
                LinuxNamespaceType::Time => return Err(Fault::new("time namespace", libc::EOPNOTSUPP)),
            };
            let path = ns.path().clone().unwrap_or_default();
            if !has_path(ns.path()) {
                // The cgroup namespace's root is the cgroup of whoever makes it, so it must wait.
                if flag != CloneFlags::CLONE_NEWCGROUP {
                    namespaces.new |= flag;
                }
                continue;
            }
            if flag == CloneFlags::CLONE_NEWNS || flag == CloneFlags::CLONE_NEWUSER {
                return Err(Fault::new(format_args!("{} namespace by path {}", ns.typ(), path.display()), libc::EOPNOTSUPP));
            }
            let fd = rustix::fs::openat(CWD, &path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).on(path.display())?;
            let join = Join { path, fd, flag };
            if flag == CloneFlags::CLONE_NEWPID {
                namespaces.pid = Some(join);
            } else {
                namespaces.join.push(join);
            }
        }
        if !namespaces.new.contains(CloneFlags::CLONE_NEWNS) {
            // Without one every mount below would be made on the host.
            return Err(Fault::new("a spec without mount namespace", libc::EOPNOTSUPP));
        }
        Ok(namespaces)
    }
}

impl Join {
    pub(super) fn enter(&self) -> Result {
        nix::sched::setns(self.fd.as_fd(), self.flag).on(self.path.display())
    }
}

/// Text of `/proc/<pid>/{u,g}id_map`.
pub(super) fn id_map(mappings: &[LinuxIdMapping]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for m in mappings {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{} {} {}", m.container_id(), m.host_id(), m.size());
    }
    text
}
