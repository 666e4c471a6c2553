//! Stage 2: the process that becomes the container's (or exec's) program. It goes through a table of named steps, tells the
//! parent that it is ready, waits for permission, and executes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::CloneFlags;
use oci_spec::runtime::Process;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::bundle::Bundle;
use super::channel::{self, Message};
use super::fault::{Fault, On, Result};
use super::launch::{self, Program};
use super::namespaces::Join;
use super::settings::{self, Filter};
use super::{Stdio, cgroup, devices, mounts, procfs, root};
use crate::cgroups::{Entrance, Manager};
use crate::model::image::RootMount;
use crate::sys;

/// Everything the steps work on.
pub(super) struct Child<'a> {
    pub(super) bundle: &'a Bundle,
    pub(super) process: &'a Process,
    pub(super) rootfs: Vec<RootMount>,
    pub(super) stdio: Stdio,
    /// Create (true) or exec.
    pub(super) is_container: bool,
    /// New namespaces that this process was cloned into.
    pub(super) new: CloneFlags,
    /// Namespaces to join by path (create).
    pub(super) join: Vec<Join>,
    /// The process whose namespaces to join (exec), and whether its user namespace is another.
    pub(super) target: Option<(OwnedFd, bool)>,
    /// To the parent.
    pub(super) sync: BorrowedFd<'a>,
    /// From stage 1: one byte when the user mapping is written (new user namespace only), one when the cgroup is ready to join.
    /// To it: one byte when the device nodes are made (v2 only).
    pub(super) stage1: OwnedFd,
    /// The container's root; before it is mounted, the host's.
    pub(super) root: OwnedFd,
    /// The container's cgroup, when it is ours to join; v2 we were born in.
    pub(super) group: Option<Manager>,
    /// The same, open (exec).
    pub(super) entrance: Option<Entrance>,
    /// Terminal master and its other side.
    pub(super) console: Option<(OwnedFd, OwnedFd)>,
    /// A procfs of our own, made when needed.
    pub(super) proc: Option<OwnedFd>,
    /// Lines of `/proc/self/cgroup`: in the container's place, and where stage 1 was.
    pub(super) cgroups: BTreeMap<String, String>,
    pub(super) inherited_cgroups: BTreeMap<String, String>,
    pub(super) filter: Option<Filter>,
    pub(super) program: Option<Program>,
    /// The working directory could not be entered as root.
    pub(super) cwd_later: bool,
    /// The parent's permission was awaited already.
    pub(super) gated: bool,
}

/// A step's name, as it stands in errors, and what it does.
type Step = (&'static str, fn(&mut Child<'_>) -> Result);

/// A new container, until its root is `/`. Order matters, see each step.
const CREATE: &[Step] = &[
    ("start session", session),
    ("map users", user_namespace),
    ("join namespace", join),
    ("set hostname", hostname),
    ("set propagation", root::propagate),
    ("mount root filesystem", root::mount),
    ("mount", mounts::all),
    ("make device", devices::all),
    ("open console", devices::console),
    ("make working directory", settings::make_cwd),
    ("set sysctl", procfs::sysctls),
    // Late: until here stage 1 makes the cgroup on another processor.
    ("enter cgroup", cgroup::enter),
    ("mount cgroup", cgroup::mount),
    ("mask", devices::mask),
    ("make read-only", devices::read_only_paths),
    ("prepare program", launch::prepare),
    ("set standard streams", devices::streams),
    ("set security label", settings::labels),
    ("make root read-only", root::read_only),
    ("change root", root::change),
];

/// A process in a container that runs.
const EXEC: &[Step] = &[
    ("start session", session),
    ("open cgroup", cgroup::open_entrance),
    ("join namespaces", join_target),
    ("open console", devices::console),
    ("prepare program", launch::prepare),
    ("set standard streams", devices::streams),
    ("set security label", settings::labels),
    ("enter cgroup", cgroup::enter_open),
];

/// Both: what the process itself is allowed. Each step needs rights that a later one takes.
pub(super) const SETTINGS: &[Step] = &[
    ("set resource limit", settings::limits),
    ("set scheduling", settings::scheduling),
    ("enter working directory", settings::enter_cwd),
    ("limit capabilities", settings::bounding),
    ("set user", settings::user),
    ("enter working directory", settings::enter_cwd_as_user),
    ("close descriptors", close),
    ("load system call filter", settings::early_filter),
    ("set capabilities", settings::capabilities),
    ("set no_new_privs", settings::no_new_privileges),
    ("load system call filter", settings::late_filter),
    ("wait for start", |child| child.gate()),
    ("exec", run),
];

/// Goes through the table; returns only on failure, with the exit code.
pub(super) fn main(mut child: Child<'_>) -> i32 {
    let first = if child.is_container { CREATE } else { EXEC };
    for (name, step) in first.iter().chain(SETTINGS) {
        if let Err(fault) = step(&mut child) {
            // With the parent gone there is nobody to tell.
            let _ = channel::send(child.sync, &Message::Failed(fault.at(name)), None);
            return 1;
        }
    }
    1
}

impl Child<'_> {
    /// Tells the parent that all is set up and waits for its permission (a container; an exec goes on at once).
    pub(super) fn gate(&mut self) -> Result {
        if std::mem::replace(&mut self.gated, true) {
            return Ok(());
        }
        let console = self.console.take();
        channel::send(self.sync, &Message::Ready, console.as_ref().map(|c| c.0.as_fd())).on("parent")?;
        if self.is_container { channel::wait(self.sync).on("parent") } else { Ok(()) }
    }
}

fn session(child: &mut Child<'_>) -> Result {
    // Until the gate is passed a dead shim takes us along; the container itself must outlive it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).on("death signal")?;
    rustix::process::setsid().on("session")?;
    if child.is_container {
        // Modes of nodes and directories are meant as they are written.
        rustix::process::umask(rustix::fs::Mode::empty());
    }
    Ok(())
}

fn user_namespace(child: &mut Child<'_>) -> Result {
    if child.new.contains(CloneFlags::CLONE_NEWUSER) {
        channel::wait(child.stage1.as_fd()).on("stage 1")?;
        let (uid, gid) = (rustix::process::Uid::ROOT, rustix::process::Gid::ROOT);
        rustix::thread::set_thread_groups(&[]).on("supplementary groups")?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).on("group 0")?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).on("user 0")?;
    }
    Ok(())
}

fn join(child: &mut Child<'_>) -> Result {
    child.join.iter().try_for_each(Join::enter)
}

fn join_target(child: &mut Child<'_>) -> Result {
    let Some((pidfd, user)) = &child.target else {
        return Err(Fault::new("no process to join", libc::EINVAL));
    };
    use ThreadNameSpaceType as Ns;
    let mut types = Ns::MOUNT | Ns::INTER_PROCESS_COMMUNICATION | Ns::HOST_NAME_AND_NIS_DOMAIN_NAME | Ns::NETWORK | Ns::CONTROL_GROUP;
    if *user {
        types |= Ns::USER;
    }
    move_into_thread_name_spaces(pidfd.as_fd(), types).on("container")?;
    child.root = open_root().on("/")?;
    Ok(())
}

fn hostname(child: &mut Child<'_>) -> Result {
    // Somebody else's hostname is not ours to change.
    if child.new.contains(CloneFlags::CLONE_NEWUTS) {
        if let Some(name) = child.bundle.spec.hostname().as_deref().filter(|n| !n.is_empty()) {
            rustix::system::sethostname(name.as_bytes()).on(name)?;
        }
        if let Some(name) = child.bundle.spec.domainname().as_deref().filter(|n| !n.is_empty()) {
            rustix::system::setdomainname(name.as_bytes()).on(name)?;
        }
    }
    Ok(())
}

/// Nothing but the three streams reaches the program. The rest is still in use and closed by execve.
fn close(child: &mut Child<'_>) -> Result {
    rustix::process::set_parent_process_death_signal(None).on("death signal")?;
    child.join.clear();
    child.proc = None;
    match sys::process::close_range(3, i32::MAX, true) {
        // Linux 5.10: every descriptor we open has the flag anyway, and stage 1 has closed the shim's.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other.on("descriptors"),
    }
}

fn run(child: &mut Child<'_>) -> Result {
    child.program.as_ref().map_or(Ok(()), |program| Err(program.run()))
}

/// The root of this process.
pub(super) fn open_root() -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    openat(CWD, c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}
