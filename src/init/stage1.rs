//! Stage 1: a short-lived child of the shim. It reads the bundle, clones stage 2 into its namespaces as the shim's child, and
//! does for it what only the host's root can: cgroup, user mapping, OOM score. Stage 2 mounts meanwhile.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sched::CloneFlags;
use oci_spec::runtime::Process;
use rustix::fs::CWD;
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Signal};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::bundle::Bundle;
use super::channel::{self, Message};
use super::fault::{Fault, On, Result};
use super::namespaces::{Namespaces, id_map};
use super::settings::Filter;
use super::stage2::{self, Child};
use super::{CreateRequest, ExecRequest, Stdio, StepError, cgroup, mounts};
use crate::cgroups::Manager;
use crate::sys;

/// Body of the forked child for [`super::create`]; its exit code.
pub(super) fn create(request: CreateRequest, sync: &OwnedFd) -> i32 {
    report(sync, enter(&request.stdio, sync).and_then(|()| create_stage2(request, sync)))
}

/// The same for [`super::exec`].
pub(super) fn exec(request: ExecRequest, sync: &OwnedFd) -> i32 {
    report(sync, enter(&request.stdio, sync).and_then(|()| exec_stage2(request, sync)))
}

fn report(sync: &OwnedFd, done: Result<(), StepError>) -> i32 {
    match done {
        Ok(()) => 0,
        Err(e) => {
            // With the parent gone there is nobody to tell.
            let _ = channel::send(sync.as_fd(), &Message::Failed(e), None);
            1
        }
    }
}

/// Leaves the shim behind: its signal handlers, its descriptors, and the right of others to look into this process.
fn enter(stdio: &Stdio, sync: &OwnedFd) -> Result<(), StepError> {
    sys::process::reset_signals();
    let entered = close_others(stdio, sync).and_then(|()| {
        // A process of the container must not reach the shim's program through /proc/<us>/exe. Stage 2 inherits this.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).on("dumpable")?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).on("death signal")
    });
    entered.map_err(|f| f.at("leave the shim"))
}

fn close_others(stdio: &Stdio, sync: &OwnedFd) -> Result {
    let mut keep: Vec<RawFd> = vec![2, sync.as_raw_fd()];
    if let Stdio::Streams { stdin, stdout, stderr } = stdio {
        keep.extend([stdin, stdout, stderr].into_iter().flatten().map(AsRawFd::as_raw_fd));
    }
    keep.sort_unstable();
    let ends = keep.iter().skip(1).map(|fd| fd - 1).chain([i32::MAX]);
    for (kept, end) in keep.iter().zip(ends) {
        if kept < &end {
            sys::process::close_range(kept + 1, end, false).on("descriptors")?;
        }
    }
    Ok(())
}

fn create_stage2(request: CreateRequest, sync: &OwnedFd) -> Result<(), StepError> {
    let named = |step: &'static str| move |f: Fault| f.at(step);
    let bundle = Bundle::load(request.bundle).map_err(named("read bundle"))?;
    let process = bundle.process().map_err(named("read bundle"))?;
    let filter = Filter::load(&bundle).map_err(named("read system call filter"))?;
    let group = cgroup::path(&bundle).map_err(named("create cgroup"))?;
    let namespaces = Namespaces::open(&bundle).map_err(named("open namespace"))?;
    let new = namespaces.new;
    if let Some(pid) = &namespaces.pid {
        pid.enter().map_err(named("join namespace"))?;
    }
    let mut inherited_cgroups = Default::default();
    if bundle.spec.mounts().iter().flatten().any(mounts::is_cgroup) {
        let text = fs::read_to_string("/proc/self/cgroup").on("/proc/self/cgroup").map_err(named("create cgroup"))?;
        inherited_cgroups = cgroup::parse(&text);
    }
    let group = group.as_deref().map(Manager::open).transpose().map_err(|e| Fault::from(e).at(super::CREATE_CGROUP))?;
    // The rest is made while stage 2 mounts.
    let into = group.as_ref().map(Manager::create_v2).transpose().map_err(|e| Fault::from(e).at(super::CREATE_CGROUP))?.flatten();
    let mut request = Some((request.rootfs, request.stdio, namespaces.join, filter, inherited_cgroups));
    let spawned = spawn(new, into.as_ref(), |stage1, root| {
        let (rootfs, stdio, join, filter, inherited_cgroups) = request.take()?;
        let group = group.clone();
        Some(Child { rootfs, new, join, inherited_cgroups, group, ..child(&bundle, process, stdio, filter, sync.as_fd(), stage1, root, true) })
    });
    if let (Err(_), Some(group)) = (&spawned, &group) {
        group.remove_if_empty();
    }
    let spawned = spawned.map_err(named("clone"))?;
    let told = group.as_ref().map(|g| g.path().to_owned()).or_else(|| bundle.extras.foreign_cgroup.clone());
    announce(sync.as_fd(), spawned.pid, told).map_err(named("clone"))?;
    if new.contains(CloneFlags::CLONE_NEWUSER) {
        map_users(&bundle, &spawned).map_err(named("map users"))?;
    }
    adjust_oom(process, spawned.pid).map_err(named("set OOM score"))?;
    if let Some(group) = &group {
        let nodes_made = || channel::wait(spawned.line.as_fd()).on("stage 2");
        cgroup::complete(&bundle, group, nodes_made).map_err(named(super::CREATE_CGROUP))?;
        place(group, &spawned, cgroup::joins_itself(new)).map_err(named("enter cgroup"))?;
    }
    channel::signal(spawned.line.as_fd()).on("stage 2").map_err(named("enter cgroup"))
}

fn exec_stage2(request: ExecRequest, sync: &OwnedFd) -> Result<(), StepError> {
    let named = |step: &'static str| move |f: Fault| f.at(step);
    let bundle = Bundle::load(request.bundle).map_err(named("read bundle"))?;
    let process: Process = serde_json::from_slice(&request.process).map_err(|e| Fault::new(format_args!("process: {e}"), libc::EINVAL).at("read request"))?;
    let filter = Filter::load(&bundle).map_err(named("read system call filter"))?;
    let target = target(request.pid).map_err(named("join namespaces"))?;
    let group = request.cgroup.as_ref().map(|g| Manager::open(&g.path)).transpose().map_err(|e| Fault::from(e).at("enter cgroup"))?;
    let into = group.as_ref().and_then(Manager::open_v2);
    let mut request_parts = Some((request.stdio, target, filter));
    let spawned = spawn(CloneFlags::empty(), into.as_ref(), |stage1, root| {
        let (stdio, target, filter) = request_parts.take()?;
        let group = group.clone();
        Some(Child { target: Some(target), group, ..child(&bundle, &process, stdio, filter, sync.as_fd(), stage1, root, false) })
    })
    .map_err(named("clone"))?;
    announce(sync.as_fd(), spawned.pid, None).map_err(named("clone"))?;
    adjust_oom(&process, spawned.pid).map_err(named("set OOM score"))?;
    if let Some(group) = &group {
        place(group, &spawned, true).map_err(named("enter cgroup"))?;
    }
    channel::signal(spawned.line.as_fd()).on("stage 2").map_err(named("enter cgroup"))
}

/// A [`Child`] with nothing done yet.
#[expect(clippy::too_many_arguments, reason = "it only names the fields that have no default")]
fn child<'a>(
    bundle: &'a Bundle,
    process: &'a Process,
    stdio: Stdio,
    filter: Option<Filter>,
    sync: BorrowedFd<'a>,
    stage1: OwnedFd,
    root: OwnedFd,
    is_container: bool,
) -> Child<'a> {
    Child {
        bundle,
        process,
        rootfs: Vec::new(),
        stdio,
        is_container,
        new: CloneFlags::empty(),
        join: Vec::new(),
        target: None,
        sync,
        stage1,
        root,
        group: None,
        entrance: None,
        console: None,
        proc: None,
        cgroups: Default::default(),
        inherited_cgroups: Default::default(),
        filter,
        program: None,
        cwd_later: false,
        gated: false,
    }
}

/// Stage 2 as stage 1 sees it.
struct Spawned {
    pid: Pid,
    /// Written to go on; its closing tells stage 2 that stage 1 has failed.
    line: OwnedFd,
    /// It was born in its v2 group.
    in_v2: bool,
}

fn spawn<'a>(new: CloneFlags, into: Option<&OwnedFd>, make: impl FnOnce(OwnedFd, OwnedFd) -> Option<Child<'a>>) -> Result<Spawned> {
    let (ours, theirs) = channel::pair().on("socket pair")?;
    let root = stage2::open_root().on("/")?;
    // Taken by the child's copy only.
    let mut ours = Some(ours);
    let spawned = sys::clone::sibling(new.bits(), into.map(AsFd::as_fd), || {
        ours = None;
        make(theirs, root).map_or(1, stage2::main)
    });
    let (pid, in_v2) = spawned.on(format_args!("{new:?}"))?;
    Ok(Spawned { pid, line: ours.ok_or_else(|| Fault::new("socket pair", libc::EBADF))?, in_v2 })
}

fn announce(sync: BorrowedFd<'_>, pid: Pid, cgroup: Option<String>) -> Result {
    let pid = u32::try_from(pid.as_raw_nonzero().get()).map_err(|_| Fault::new("pid", libc::ERANGE))?;
    channel::send(sync, &Message::Spawned { pid, cgroup }, None).on("parent")
}

/// Stage 1's part of placing stage 2: what birth and its own joining leave over. Moving another process stops all forks of the
/// machine for a moment and costs milliseconds.
fn place(group: &Manager, spawned: &Spawned, joins_itself: bool) -> Result {
    let pid = spawned.pid.as_raw_nonzero().get().unsigned_abs();
    match (joins_itself, spawned.in_v2) {
        (true, true) => {}
        (true, false) => group.add_v2(pid)?,
        (false, _) => group.add(pid)?,
    }
    Ok(())
}

fn map_users(bundle: &Bundle, spawned: &Spawned) -> Result {
    let maps = [("uid_map", bundle.linux.uid_mappings()), ("gid_map", bundle.linux.gid_mappings())];
    for (file, mappings) in maps {
        let mappings = mappings.as_deref().unwrap_or_default();
        if mappings.is_empty() {
            return Err(Fault::new(format_args!("a user namespace without {file}"), libc::EINVAL));
        }
        let path = format!("/proc/{}/{file}", spawned.pid.as_raw_nonzero());
        fs::write(&path, id_map(mappings)).on(path)?;
    }
    channel::signal(spawned.line.as_fd()).on("stage 2")
}

/// Sets the OOM score; one lower than ours may need a capability that we lack: then it stays ours.
fn adjust_oom(process: &Process, pid: Pid) -> Result {
    let Some(score) = process.oom_score_adj() else { return Ok(()) };
    let path = format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero());
    match fs::write(&path, score.to_string()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => Ok(()),
        other => other.on(format_args!("{path} {score}")),
    }
}

/// The container's first process, whose process namespace is entered at once (it counts for children only), and whether its
/// user namespace is not ours.
fn target(pid: u32) -> Result<(OwnedFd, bool)> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| Fault::new(format_args!("process {pid}"), libc::ESRCH))?;
    let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty()).on(format_args!("process {pid}"))?;
    let path = format!("/proc/{pid}/ns/user");
    let theirs = rustix::fs::statat(CWD, path.as_str(), rustix::fs::AtFlags::empty()).on(&path)?;
    let ours = rustix::fs::statat(CWD, c"/proc/self/ns/user", rustix::fs::AtFlags::empty()).on("/proc/self/ns/user")?;
    move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::PROCESS_ID).on(format_args!("process {pid}"))?;
    Ok((pidfd, theirs.st_ino != ours.st_ino))
}
