//! Settings of the process itself: labels, limits, working directory, user, capabilities, system call filter. The order is
//! that of [`super::stage2::SETTINGS`].

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::personality::{self, Persona};
use oci_spec::runtime::{Capability, IOPriorityClass, LinuxPersonalityDomain, LinuxSeccompAction, LinuxSeccompFilterFlag, PosixRlimitType};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::bundle::Bundle;
use super::fault::{Fault, On, Result};
use super::procfs;
use super::resolve::{self, Kind};
use super::stage2::Child;
use crate::sys::process as sys;

/// A compiled system call filter and how to load it.
pub(super) struct Filter {
    program: Vec<sys::Instruction>,
    flags: u64,
    path: PathBuf,
}

impl Filter {
    /// The container's filter, read while the host's files are still there.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the spec describes a filter and nobody compiled it: running without it would be less than was asked.
    pub(super) fn load(bundle: &Bundle) -> Result<Option<Self>> {
        let described = bundle.linux.seccomp().as_ref();
        let Some(path) = &bundle.extras.seccomp_bpf else {
            return match described {
                Some(s) if s.default_action() != LinuxSeccompAction::ScmpActAllow || s.syscalls().as_ref().is_some_and(|s| !s.is_empty()) => {
                    Err(Fault::new("linux.seccomp without a compiled filter", libc::EOPNOTSUPP))
                }
                _ => Ok(None),
            };
        };
        let path = bundle.dir.join(path);
        let bytes = fs::read(&path).on(path.display())?;
        let (instructions, rest) = bytes.as_chunks::<{ size_of::<sys::Instruction>() }>();
        if !rest.is_empty() || instructions.is_empty() {
            return Err(Fault::new(path.display(), libc::EINVAL));
        }
        let program = instructions
            .iter()
            .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| sys::Instruction { code: u16::from_ne_bytes([c0, c1]), jt, jf, k: u32::from_ne_bytes([k0, k1, k2, k3]) })
            .collect();
        let flags = described.and_then(|s| s.flags().as_ref()).into_iter().flatten().fold(0, |flags, flag| {
            flags
                | match flag {
                    LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                    LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                    // One thread: nothing to synchronise. The other needs a listener, which we have not.
                    LinuxSeccompFilterFlag::SeccompFilterFlagTsync | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
                }
        });
        Ok(Some(Self { program, flags, path }))
    }

    fn enforce(&self) -> Result {
        sys::load_filter(&self.program, self.flags).on(self.path.display())
    }
}

/// The step: AppArmor profile and SELinux label of the program to come, when the kernel has the module.
pub(super) fn labels(child: &mut Child<'_>) -> Result {
    if let Some(profile) = child.process.apparmor_profile().as_deref().filter(|p| !p.is_empty() && *p != "unconfined") {
        procfs::exec_label(child, "apparmor", &format!("exec {profile}"))?;
    }
    if let Some(label) = child.process.selinux_label().as_deref().filter(|l| !l.is_empty()) {
        procfs::exec_label(child, "selinux", label)?;
    }
    Ok(())
}

/// The step: resource limits. A hard limit that may not be raised is left where it is.
pub(super) fn limits(child: &mut Child<'_>) -> Result {
    for limit in child.process.rlimits().iter().flatten() {
        let resource = match limit.typ() {
            PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
            PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
            PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
            PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
            PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
            PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
            PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
            PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
            PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
            PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
            PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
            PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
            PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
            PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
            PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
            PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
        };
        match sys::set_limit(resource, limit.soft(), limit.hard()) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                let hard = sys::hard_limit(resource).on(limit.typ())?.min(limit.hard());
                sys::set_limit(resource, limit.soft().min(hard), hard).on(limit.typ())?;
            }
            other => other.on(limit.typ())?,
        }
    }
    Ok(())
}

/// The step: execution domain, I/O priority; what we cannot set is refused.
pub(super) fn scheduling(child: &mut Child<'_>) -> Result {
    if child.process.scheduler().is_some() {
        return Err(Fault::new("process.scheduler", libc::EOPNOTSUPP));
    }
    if let Some(io) = child.process.io_priority() {
        let class = match io.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let level = i32::try_from(io.priority()).ok().filter(|p| (0..8).contains(p)).ok_or_else(|| Fault::new("process.ioPriority", libc::EINVAL))?;
        sys::set_io_priority(class << 13 | level).on("process.ioPriority")?;
    }
    if let Some(p) = child.bundle.linux.personality() {
        let domain = match p.domain() {
            LinuxPersonalityDomain::PerLinux => Persona::empty(),
            LinuxPersonalityDomain::PerLinux32 => Persona::from_bits_retain(0x0008),
        };
        personality::set(domain).on("linux.personality")?;
    }
    Ok(())
}

/// The step, before the root changes: a missing working directory is made.
pub(super) fn make_cwd(child: &mut Child<'_>) -> Result {
    use std::os::fd::AsFd;
    let cwd = child.process.cwd();
    if !cwd.is_absolute() {
        return Err(Fault::new(cwd.display(), libc::EINVAL));
    }
    if cwd != Path::new("/") {
        resolve::create(child.root.as_fd(), cwd, Kind::Directory).on(cwd.display())?;
    }
    Ok(())
}

/// The step: goes to the working directory and looks whether that is inside the root.
pub(super) fn enter_cwd(child: &mut Child<'_>) -> Result {
    match change_directory(child.process.cwd()) {
        // Maybe the user has rights there that root without capabilities has not (NFS): tried again as the user.
        Err(Errno::ACCESS) => child.cwd_later = true,
        other => other.on(child.process.cwd().display())?,
    }
    Ok(())
}

/// The step: [`enter_cwd`] again, as the user.
pub(super) fn enter_cwd_as_user(child: &mut Child<'_>) -> Result {
    if child.cwd_later { change_directory(child.process.cwd()).on(child.process.cwd().display()) } else { Ok(()) }
}

fn change_directory(path: &Path) -> rustix::io::Result<()> {
    rustix::process::chdir(path)?;
    // The kernel prefixes "(unreachable)" to a directory outside the root: one that somebody's descriptor let us reach.
    let real = rustix::process::getcwd(Vec::new())?;
    if real.to_bytes().starts_with(b"/") { Ok(()) } else { Err(Errno::XDEV) }
}

/// The step: the bounding set.
pub(super) fn bounding(child: &mut Child<'_>) -> Result {
    let caps = child.process.capabilities().as_ref();
    sys::limit_bounding_set(bits(caps.and_then(|c| c.bounding().as_ref()))).on("bounding set")
}

/// The step: groups, group, user, umask. Capabilities stay until [`capabilities`].
pub(super) fn user(child: &mut Child<'_>) -> Result {
    let user = child.process.user();
    rustix::thread::set_keep_capabilities(true).on("keep capabilities")?;
    let groups: Vec<_> = user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect();
    match rustix::thread::set_thread_groups(&groups) {
        // A user namespace may forbid the call; nothing is lost when there was nothing to set.
        Err(Errno::PERM) if groups.is_empty() => {}
        other => other.on("supplementary groups")?,
    }
    let (gid, uid) = (Gid::from_raw(user.gid()), Uid::from_raw(user.uid()));
    rustix::thread::set_thread_res_gid(gid, gid, gid).on(user.gid())?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).on(user.uid())?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(user.umask().unwrap_or(0o022)));
    // Leaving user 0 has emptied the effective set.
    let mut sets = rustix::thread::capabilities(None).on("capabilities")?;
    sets.effective = sets.permitted;
    rustix::thread::set_capabilities(None, sets).on("effective capabilities")
}

/// The step: the filter, when loading it needs a capability, because new privileges stay possible.
pub(super) fn early_filter(child: &mut Child<'_>) -> Result {
    match &child.filter {
        Some(filter) if child.process.no_new_privileges() != Some(true) => filter.enforce(),
        _ => Ok(()),
    }
}

/// The step: the capability sets, as far as we have them ourselves.
pub(super) fn capabilities(child: &mut Child<'_>) -> Result {
    let caps = child.process.capabilities().as_ref();
    let mine = rustix::thread::capabilities(None).on("capabilities")?.permitted.bits();
    let permitted = bits(caps.and_then(|c| c.permitted().as_ref())) & mine;
    let effective = bits(caps.and_then(|c| c.effective().as_ref())) & permitted;
    let inheritable = bits(caps.and_then(|c| c.inheritable().as_ref())) & mine;
    let ambient = bits(caps.and_then(|c| c.ambient().as_ref())) & permitted & inheritable;
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(effective),
        permitted: CapabilitySet::from_bits_retain(permitted),
        inheritable: CapabilitySet::from_bits_retain(inheritable),
    };
    rustix::thread::set_capabilities(None, sets).on("capabilities")?;
    sys::set_ambient(ambient).on("ambient capabilities")
}

/// The step: no new privileges.
pub(super) fn no_new_privileges(child: &mut Child<'_>) -> Result {
    if child.process.no_new_privileges() == Some(true) { rustix::thread::set_no_new_privs(true).on("no_new_privs") } else { Ok(()) }
}

/// The step: the filter, as late as it can be.
pub(super) fn late_filter(child: &mut Child<'_>) -> Result {
    match &child.filter {
        Some(filter) if child.process.no_new_privileges() == Some(true) => filter.enforce(),
        _ => Ok(()),
    }
}

fn bits(set: Option<&HashSet<Capability>>) -> u64 {
    set.into_iter().flatten().fold(0, |bits, cap| bits | 1 << number(*cap))
}

/// Numbers of `linux/capability.h`.
fn number(cap: Capability) -> u32 {
    match cap {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}
