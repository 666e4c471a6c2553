//! One group on all hierarchies: create, apply, add, list, delete.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::LinuxResources;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::controllers::{self, Detail};
use super::file::{Group, Journal, Reader};
use super::host::{Controller, Hierarchy, Host, Version};
use super::path::CgroupPath;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::resources::Resources;
use crate::model::stats::CgroupStats;

/// Marks a parent that was made on the way to a group, so that it goes when it is empty again.
const MARK: &str = "trusted.mesocri";
/// Says which daemon a group belongs to ([`Manager::set_owner`]).
const OWNER: &str = "trusted.mesocri.owner";
/// Longest owner taken: a path.
const MAX_OWNER: usize = 4096;
/// Sub-groups nest no deeper than this when they are removed: each level holds a descriptor.
const MAX_DEPTH: usize = 128;
/// How often a directory is made again when a neighbour's `delete` took its parent away in between.
const CREATE_TRIES: usize = 8;

/// A group: the same path on every hierarchy. Holds no descriptor; cheap to make.
#[derive(Clone, Debug)]
pub struct Manager {
    pub(super) host: Arc<Host>,
    pub(super) path: CgroupPath,
}

impl Manager {
    /// Makes the group on every hierarchy, with its parents. A group that exists is taken over as it is.
    ///
    /// # Errors
    /// `InvalidArgument` for a path that is not allowed, I/O errors with the directory; nothing is left behind then.
    pub fn create(path: &str) -> Result<Self> {
        Self::create_on(Host::get()?, path)
    }

    /// As [`Manager::create`] on a given host.
    ///
    /// # Errors
    /// As [`Manager::create`].
    pub fn create_on(host: Arc<Host>, path: &str) -> Result<Self> {
        let manager = Self::open_on(host, path)?;
        manager.create_where(|_| true)?;
        Ok(manager)
    }

    /// The first half of [`Manager::create`], on v2 alone, and the directory there, open, for `CLONE_INTO_CGROUP`; `None`
    /// without v2.
    ///
    /// # Errors
    /// As [`Manager::create`].
    pub fn create_v2(&self) -> Result<Option<OwnedFd>> {
        self.create_where(|v| v == Version::V2)?;
        Ok(self.open_v2())
    }

    /// The second half of [`Manager::create`].
    ///
    /// # Errors
    /// As [`Manager::create`].
    pub fn create_v1(&self) -> Result<()> {
        self.create_where(|v| v == Version::V1)
    }

    fn create_where(&self, wanted: impl Fn(Version) -> bool) -> Result<()> {
        let mut made = Vec::new();
        for hierarchy in self.host.hierarchies().iter().filter(|h| wanted(h.version)) {
            if let Err(e) = self.create_in(hierarchy, &mut made) {
                for dir in made.iter().rev() {
                    let _ = std::fs::remove_dir(dir);
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// The group at `path`, whether it exists or not. Touches nothing.
    ///
    /// # Errors
    /// `InvalidArgument` for a path that is not allowed.
    pub fn open(path: &str) -> Result<Self> {
        Self::open_on(Host::get()?, path)
    }

    /// As [`Manager::open`] on a given host.
    ///
    /// # Errors
    /// As [`Manager::open`].
    pub fn open_on(host: Arc<Host>, path: &str) -> Result<Self> {
        Ok(Self { host, path: CgroupPath::new(path)? })
    }

    /// The group `name` below this one, whether it exists or not.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is not allowed.
    pub fn below(&self, name: &str) -> Result<Self> {
        Ok(Self { host: self.host.clone(), path: self.path.join(name)? })
    }

    /// Its path below the roots.
    pub fn path(&self) -> &str {
        self.path.as_str()
    }

    /// Whether the group exists on any hierarchy.
    pub fn exists(&self) -> bool {
        self.host.hierarchies().iter().any(|h| h.dir(&self.path).is_dir())
    }

    /// Applies the settings of an OCI spec, each controller in its own safe order of writes.
    ///
    /// # Errors
    /// The file and value that were refused; `Unimplemented` when a limit is asked for whose controller this host lacks
    /// (huge page limits are skipped then, as the kubelet always sends them).
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        controllers::apply(self, resources, None)
    }

    /// Applies new limits to a running group, all of them or none: when one is refused, those written before it get their former
    /// values back. A memory limit without a swap limit takes swap along (no swap).
    ///
    /// # Errors
    /// As [`Manager::apply`]; says so when a former value could not be put back.
    pub fn update(&self, resources: &Resources) -> Result<()> {
        let journal = Journal::default();
        let Err(error) = controllers::apply(self, &controllers::to_oci(resources), Some(&journal)) else { return Ok(()) };
        match journal.roll_back() {
            Ok(()) => Err(error),
            Err(stuck) => Err(error.within(format!("limit cgroup {}, where some of the new limits stay ({stuck})", self.path))),
        }
    }

    /// Moves process `pid`, with all its threads, into the group on every hierarchy.
    ///
    /// On v2 a container may have made sub-groups and switched controllers on for them; then its own group takes no process
    /// and `pid` goes into the first sub-group that has some.
    ///
    /// # Errors
    /// The file that refused it.
    pub fn add(&self, pid: u32) -> Result<()> {
        for hierarchy in self.host.hierarchies().iter().filter(|h| h.version == Version::V1) {
            self.group(hierarchy).write("cgroup.procs", &pid.to_string())?;
        }
        self.add_v2(pid)
    }

    /// [`Manager::add`] on v2 alone: for a process that was not born there and joins the others by [`Manager::entrance`].
    ///
    /// # Errors
    /// As [`Manager::add`].
    pub fn add_v2(&self, pid: u32) -> Result<()> {
        let Some(v2) = self.host.v2() else { return Ok(()) };
        let (group, pid) = (self.group(v2), pid.to_string());
        match group.try_write("cgroup.procs", &pid) {
            Ok(()) => Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EOPNOTSUPP)) => match populated_below(&group, 0) {
                Some(inner) => inner.write("cgroup.procs", &pid),
                None => Err(group.refused("cgroup.procs", &pid, e)),
            },
            Err(e) => Err(group.refused("cgroup.procs", &pid, e)),
        }
    }

    /// Opens the group on every v1 hierarchy for a process to join it by itself, maybe when it sees the host's files no more.
    ///
    /// # Errors
    /// The file that could not be opened.
    pub fn entrance(&self) -> Result<Entrance> {
        let v1 = self.host.hierarchies().iter().filter(|h| h.version == Version::V1);
        let open = |h: &Hierarchy| {
            let path = h.dir(&self.path).join("tasks");
            let fd = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).act("open", path.display())?;
            Ok((path, fd))
        };
        v1.map(open).collect::<Result<_>>().map(|files| Entrance { files })
    }

    /// All processes of the group and its sub-groups, without order. Empty when it does not exist.
    ///
    /// # Errors
    /// I/O errors other than a vanishing group.
    pub fn procs(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        let mut reader = Reader::default();
        if let Some(group) = self.tracking() {
            collect(&group, &mut reader, &mut pids, 0)?;
        }
        Ok(pids)
    }

    /// As [`Manager::procs`], asking every hierarchy: finds a process too that left one of them.
    ///
    /// # Errors
    /// As [`Manager::procs`].
    pub fn procs_anywhere(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        let mut reader = Reader::default();
        for hierarchy in self.host.hierarchies() {
            collect(&self.group(hierarchy), &mut reader, &mut pids, 0)?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// A sample of the counters this host has. `None` in a field means that it cannot say, or that less was asked for.
    ///
    /// # Errors
    /// `NotFound` when the group does not exist.
    pub fn stats(&self, detail: Detail) -> Result<CgroupStats> {
        controllers::stats(self, detail)
    }

    /// Processes killed for lack of memory since the group was made; `None` when there is no memory controller or no group.
    pub fn oom_kills(&self) -> Option<u64> {
        let memory = self.host.locate(Controller::Memory)?;
        controllers::memory::oom_kills(&self.group(memory), memory.version, &mut Reader::default())
    }

    /// Removes the group and its sub-groups from every hierarchy, and parents that [`Manager::create`] had to make if nothing
    /// else is in them. The processes must be gone ([`Manager::kill`]). A group that does not exist is fine.
    ///
    /// # Errors
    /// `FailedPrecondition` naming the directory and some of the processes in it. Goes on to the other hierarchies first.
    pub fn delete(&self) -> Result<()> {
        self.delete_by(|hierarchy| self.delete_in(hierarchy))
    }

    /// [`Manager::delete`] that waits for nobody: `None` when the group is gone, otherwise why it is still used.
    pub(super) fn try_delete(&self) -> Result<Option<Error>> {
        let mut used = None;
        self.delete_by(|hierarchy| {
            let group = self.group(hierarchy);
            match remove_group(group.dir()) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    used.get_or_insert_with(|| still_used(&group, "remove cgroup", e));
                    Ok(Removed::No)
                }
                result => result.act("remove cgroup", group.dir().display()).map(|()| Removed::Yes),
            }
        })?;
        Ok(used)
    }

    fn delete_by(&self, mut delete: impl FnMut(&Hierarchy) -> Result<Removed>) -> Result<()> {
        let mut first = None;
        for hierarchy in self.host.hierarchies() {
            match delete(hierarchy) {
                Ok(Removed::Yes) => remove_marked_parents(hierarchy, &hierarchy.dir(&self.path)),
                Ok(Removed::No) => {}
                Err(e) => first = first.or(Some(e)),
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// Removes the group wherever nothing is in it; where something is, it stays.
    pub fn remove_if_empty(&self) {
        for hierarchy in self.host.hierarchies() {
            let dir = hierarchy.dir(&self.path);
            // EBUSY is the answer of a group in use, ENOENT that of a hierarchy without it.
            if rustix::fs::rmdir(&dir).is_ok() {
                remove_marked_parents(hierarchy, &dir);
            }
        }
    }

    /// Lets the group go with the last group below it, as a parent that [`Manager::create`] had to make does.
    pub fn mark_removable(&self) {
        for hierarchy in self.host.hierarchies() {
            mark(&hierarchy.dir(&self.path));
        }
    }

    /// Names of the groups directly below, on any hierarchy.
    ///
    /// # Errors
    /// I/O errors other than a missing group.
    pub fn children(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for hierarchy in self.host.hierarchies() {
            for name in sub_groups(&hierarchy.dir(&self.path))? {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        Ok(names)
    }

    /// Writes down on the group who made it, so that a restarted daemon finds its own among those of others.
    ///
    /// # Errors
    /// `Unimplemented` when no hierarchy takes extended attributes.
    pub fn set_owner(&self, owner: &str) -> Result<()> {
        let set = |h: &Hierarchy| rustix::fs::setxattr(h.dir(&self.path), OWNER, owner.as_bytes(), XattrFlags::empty()).is_ok();
        // On all of them: which one is still there after a crash half-way through a delete is not known.
        if self.host.hierarchies().iter().filter(|h| set(h)).count() > 0 {
            return Ok(());
        }
        Err(Error::new(Kind::Unimplemented, format!("mark cgroup {} as ours: no extended attributes", self.path)))
    }

    /// What [`Manager::set_owner`] wrote, on whichever hierarchy has it.
    pub fn owner(&self) -> Option<String> {
        let mut value = vec![0u8; MAX_OWNER];
        self.host.hierarchies().iter().find_map(|h| {
            let n = rustix::fs::getxattr(h.dir(&self.path), OWNER, &mut value[..]).ok()?;
            String::from_utf8(value[..n].to_vec()).ok()
        })
    }

    /// The directory on v2, open, for `clone3` with `CLONE_INTO_CGROUP`; `None` without v2 or group.
    pub fn open_v2(&self) -> Option<OwnedFd> {
        let dir = self.host.v2()?.dir(&self.path);
        rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
    }

    /// Whether device rules are a program on the v2 group, in force for all that are born in it.
    pub fn has_v2_devices(&self) -> bool {
        self.host.locate(Controller::Devices).is_some_and(|h| h.version == Version::V2)
    }

    pub(super) fn group(&self, hierarchy: &Hierarchy) -> Group {
        Group::new(hierarchy.dir(&self.path))
    }

    pub(super) fn tracking(&self) -> Option<Group> {
        // A group that something else made (systemd on a hybrid host) may be missing on the hierarchy we like best.
        let preferred = self.host.tracking().map(|h| self.group(h)).filter(|g| g.dir().is_dir());
        preferred.or_else(|| self.host.hierarchies().iter().map(|h| self.group(h)).find(|g| g.dir().is_dir()))
    }

    fn create_in(&self, hierarchy: &Hierarchy, made: &mut Vec<PathBuf>) -> Result<()> {
        let dir = hierarchy.dir(&self.path);
        let mut tries = 0;
        loop {
            match self.make_dirs(hierarchy, made)? {
                Made::All => break,
                Made::ParentVanished if tries < CREATE_TRIES => tries += 1,
                Made::ParentVanished => return Err(Errno::NOENT).act("create cgroup", dir.display()),
            }
        }
        if hierarchy.version == Version::V1 && hierarchy.controllers.contains(&Controller::Cpuset) {
            controllers::cpuset::inherit(hierarchy, &dir, &mut Reader::default())?;
        }
        Ok(())
    }

    /// Makes what is missing, top down. On v2 every group above must have its controllers switched on first. On v1 the group
    /// itself is tried first: its parent is nearly always there.
    fn make_dirs(&self, hierarchy: &Hierarchy, made: &mut Vec<PathBuf>) -> Result<Made> {
        let dir = hierarchy.dir(&self.path);
        let enable = hierarchy.version == Version::V2 && !hierarchy.controllers.is_empty();
        if !enable {
            match make_dir(&dir, made)? {
                Made::All => return Ok(Made::All),
                Made::ParentVanished => {}
            }
        }
        let mut reader = Reader::default();
        let mut at = hierarchy.root.clone();
        for part in self.path.relative().split('/') {
            if enable {
                enable_controllers(&Group::new(at.clone()), &mut reader)?;
            }
            at.push(part);
            let before = made.len();
            if let Made::ParentVanished = make_dir(&at, made)? {
                return Ok(Made::ParentVanished);
            }
            if made.len() > before && at != dir {
                mark(&at);
            }
        }
        Ok(Made::All)
    }

    fn delete_in(&self, hierarchy: &Hierarchy) -> Result<Removed> {
        let group = self.group(hierarchy);
        super::kill::until_removed(&group, hierarchy.version, || remove_group(group.dir())).map(|()| Removed::Yes)
    }
}

/// Whether a group is gone from a hierarchy.
enum Removed {
    Yes,
    No,
}

/// A group on all v1 hierarchies, to be joined by the process itself.
#[derive(Debug)]
pub struct Entrance {
    files: Vec<(PathBuf, OwnedFd)>,
}

impl Entrance {
    /// Moves the calling process, which must have one thread only. For a single thread that moves itself the kernel does not
    /// stop all forks of the machine, which would cost milliseconds ([`Manager::add`]).
    ///
    /// # Errors
    /// The file that refused it.
    pub fn enter(&self) -> Result<()> {
        for (path, fd) in &self.files {
            rustix::io::retry_on_intr(|| rustix::io::write(fd, b"0")).act("join", path.display())?;
        }
        Ok(())
    }
}

/// What came of making directories.
enum Made {
    /// They are there.
    All,
    /// The directory above is missing (not made yet, or a neighbour's `delete` took it).
    ParentVanished,
}

/// Makes one directory, remembers it when it is new.
fn make_dir(dir: &Path, made: &mut Vec<PathBuf>) -> Result<Made> {
    match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
        Ok(()) => made.push(dir.to_owned()),
        Err(Errno::EXIST) => {}
        Err(Errno::NOENT) => return Ok(Made::ParentVanished),
        Err(e) => return Err(e).act("create cgroup", dir.display()),
    }
    Ok(Made::All)
}

/// Marks a group as one to remove when it is empty. Without extended attributes (a mount that lacks them) it just stays.
fn mark(dir: &Path) {
    let _ = rustix::fs::setxattr(dir, MARK, b"1", XattrFlags::empty());
}

/// Removes the groups above `dir` that we made on the way and that are empty now. A failure means: still used.
fn remove_marked_parents(hierarchy: &Hierarchy, dir: &Path) {
    let mut at = dir;
    while let Some(parent) = at.parent().filter(|p| hierarchy.holds(p)) {
        let mut value = [0u8; 4];
        if rustix::fs::getxattr(parent, MARK, &mut value).is_err() || rustix::fs::rmdir(parent).is_err() {
            return;
        }
        at = parent;
    }
}

/// Switches on, for the groups below `group`, every controller we know and that it has. One that cannot be switched on is left:
/// if a limit needs it, the write of the limit fails and names the file.
fn enable_controllers(group: &Group, reader: &mut Reader) -> Result<()> {
    let mut listed =
        |file| Ok::<_, Error>(super::host::parse_v2_controllers(reader.read(group, file).act("read", group.dir().join(file).display())?.unwrap_or("")));
    let available = listed("cgroup.controllers")?;
    if available.is_empty() {
        return Ok(());
    }
    let enabled = listed("cgroup.subtree_control")?;
    let name = |c: Controller| if c == Controller::Blkio { "io" } else { c.name() };
    let missing: Vec<String> = available.into_iter().filter(|c| !enabled.contains(c)).map(|c| format!("+{}", name(c))).collect();
    if missing.is_empty() || group.try_write("cgroup.subtree_control", &missing.join(" ")).is_ok() {
        return Ok(());
    }
    for one in &missing {
        let _ = group.try_write("cgroup.subtree_control", one);
    }
    Ok(())
}

/// Names of the directories in `dir`; none when it is gone.
fn sub_groups(dir: &Path) -> Result<Vec<String>> {
    let fd = match rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(Vec::new()),
        Err(e) => return Err(e).act("open cgroup", dir.display()),
    };
    names_in(&fd).act("list cgroup", dir.display()).map(|names| names.iter().map(|n| n.to_string_lossy().into_owned()).collect())
}

fn names_in(fd: &impl std::os::fd::AsFd) -> rustix::io::Result<Vec<std::ffi::CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        if entry.file_type() == FileType::Directory && !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Pids of `group` and of the groups below, appended.
pub(super) fn collect(group: &Group, reader: &mut Reader, pids: &mut Vec<u32>, depth: usize) -> Result<()> {
    match reader.read(group, "cgroup.procs") {
        // 0 stands for a process outside of our process namespace.
        Ok(Some(text)) => pids.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()).filter(|p| *p != 0)),
        Ok(None) => return Ok(()),
        // A threaded v2 group has no list of processes; they stand in the group above.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(Error::io(format!("read {}", group.dir().join("cgroup.procs").display()), e)),
    }
    if depth >= MAX_DEPTH {
        return Ok(());
    }
    for name in sub_groups(group.dir())? {
        collect(&group.child(&name), reader, pids, depth + 1)?;
    }
    Ok(())
}

/// The first group below that has processes.
fn populated_below(group: &Group, depth: usize) -> Option<Group> {
    if depth >= MAX_DEPTH {
        return None;
    }
    let mut reader = Reader::default();
    sub_groups(group.dir()).ok()?.iter().map(|name| group.child(name)).find_map(|child| {
        let has_some = reader.read(&child, "cgroup.procs").ok().flatten().is_some_and(|t| !t.is_empty());
        if has_some { Some(child) } else { populated_below(&child, depth + 1) }
    })
}

/// Removes a group and everything below. Nearly always it is a leaf without processes: one system call.
fn remove_group(dir: &Path) -> io::Result<()> {
    match rustix::fs::rmdir(dir) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(_) => remove_tree(dir),
    }
}

/// Removes a group and everything below, deepest first. Descriptors, not paths, so that a container cannot make it too long.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let parent = dir.parent().unwrap_or(Path::new("/"));
    let name = dir.file_name().unwrap_or_default();
    let parent = match rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let name = std::ffi::CString::new(name.as_encoded_bytes())?;
    Ok(remove_at(&parent, &name, 0)?)
}

fn remove_at(parent: &impl std::os::fd::AsFd, name: &std::ffi::CStr, depth: usize) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::BUSY | Errno::NOTEMPTY) if depth < MAX_DEPTH => {}
        Err(e) => return Err(e),
    }
    let fd = match rustix::fs::openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e),
    };
    for child in names_in(&fd)? {
        remove_at(&fd, &child, depth + 1)?;
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e),
    }
}

/// The error for a group that still has processes.
pub(super) fn still_used(group: &Group, act: &str, e: io::Error) -> Error {
    let pids =
        Reader::default().read(group, "cgroup.procs").ok().flatten().map(|t| t.split_whitespace().take(5).collect::<Vec<_>>().join(" ")).unwrap_or_default();
    let what = format!("{act} {}", group.dir().display());
    if pids.is_empty() {
        Error::with(Kind::FailedPrecondition, what, e)
    } else {
        Error::with(Kind::FailedPrecondition, format!("{what} with processes {pids}"), e)
    }
}

#[cfg(test)]
mod tests;
