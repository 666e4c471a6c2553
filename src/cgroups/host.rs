//! Which control group hierarchies this host has, where they are mounted and which controller lives on which.
//!
//! Decided once from `/proc/self/mountinfo` (the super block options name the controllers of a v1 mount) and the v2 root's
//! `cgroup.controllers`. `/proc/self/cgroup` is not looked at: it also lists hierarchies that are mounted elsewhere, and a
//! controller without a mount point cannot be used anyway.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::model::error::{Act, Error, Kind, Result};

/// `f_type` of a v1 hierarchy (`CGROUP_SUPER_MAGIC`).
const MAGIC_V1: i64 = 0x0027_e0eb;
/// `f_type` of the v2 hierarchy (`CGROUP2_SUPER_MAGIC`).
const MAGIC_V2: i64 = 0x6367_7270;

/// A controller, or a part of the core that plays one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Controller {
    /// CPU time by weight and quota.
    Cpu,
    /// CPU time used; part of the core on v2.
    Cpuacct,
    /// CPUs and memory nodes.
    Cpuset,
    /// Memory and swap.
    Memory,
    /// Number of processes and threads.
    Pids,
    /// Huge pages.
    Hugetlb,
    /// Block devices; `io` on v2.
    Blkio,
    /// Device nodes; a BPF program on v2.
    Devices,
    /// Suspending; part of the core on v2.
    Freezer,
}

impl Controller {
    /// All, in no particular order.
    const ALL: [(Controller, &'static str, Option<&'static str>); 9] = [
        (Controller::Cpu, "cpu", Some("cpu")),
        (Controller::Cpuacct, "cpuacct", None),
        (Controller::Cpuset, "cpuset", Some("cpuset")),
        (Controller::Memory, "memory", Some("memory")),
        (Controller::Pids, "pids", Some("pids")),
        (Controller::Hugetlb, "hugetlb", Some("hugetlb")),
        (Controller::Blkio, "blkio", Some("io")),
        (Controller::Devices, "devices", None),
        (Controller::Freezer, "freezer", None),
    ];

    /// Name on v1.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(c, ..)| *c == self).map_or("", |(_, name, _)| name)
    }

    /// Whether every v2 group has it without a controller being switched on.
    fn core_on_v2(self) -> bool {
        matches!(self, Self::Cpuacct | Self::Devices | Self::Freezer)
    }

    fn from_v1(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, v1, _)| *v1 == name).map(|(c, ..)| *c)
    }

    fn from_v2(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, _, v2)| *v2 == Some(name)).map(|(c, ..)| *c)
    }
}

/// Which interface a hierarchy has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One directory tree per controller (or few).
    V1,
    /// The one tree.
    V2,
}

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Mount point.
    pub root: PathBuf,
    /// Interface.
    pub version: Version,
    /// Controllers on it; none on `name=systemd`.
    pub controllers: Vec<Controller>,
}

/// All hierarchies that groups are made on: those with a controller, `name=systemd`, and v2 whatever it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    hierarchies: Vec<Hierarchy>,
}

impl Host {
    /// The hierarchies of this process's mount namespace, found at the first call.
    ///
    /// # Errors
    /// When `/proc/self/mountinfo` cannot be read, or nothing is mounted (`Unimplemented`).
    pub fn get() -> Result<Arc<Host>> {
        static HOST: OnceLock<Arc<Host>> = OnceLock::new();
        if let Some(host) = HOST.get() {
            return Ok(host.clone());
        }
        // Found before the cell is touched, so that no one ever waits on it (two finders come to the same result).
        let host = Arc::new(Self::detect()?);
        let _ = HOST.set(host.clone());
        Ok(host)
    }

    /// Looks again.
    ///
    /// # Errors
    /// As [`Host::get`].
    pub fn detect() -> Result<Host> {
        let text = std::fs::read_to_string("/proc/self/mountinfo").act("read", "/proc/self/mountinfo")?;
        let mut host = parse_mountinfo(&text);
        // An entry may be hidden by a later mount on the same directory; only the file system itself tells.
        host.hierarchies.retain(|h| {
            let magic = match h.version {
                Version::V1 => MAGIC_V1,
                Version::V2 => MAGIC_V2,
            };
            rustix::fs::statfs(&h.root).is_ok_and(|s| s.f_type == magic)
        });
        for v2 in host.hierarchies.iter_mut().filter(|h| h.version == Version::V2) {
            let path = v2.root.join("cgroup.controllers");
            v2.controllers = parse_v2_controllers(&std::fs::read_to_string(&path).act("read", path.display())?);
        }
        if host.hierarchies.is_empty() {
            return Err(Error::new(Kind::Unimplemented, "find control groups: no cgroup file system is mounted"));
        }
        Ok(host)
    }

    /// A host made by hand: tests, and trees mounted elsewhere.
    pub fn from_hierarchies(hierarchies: Vec<Hierarchy>) -> Self {
        Self { hierarchies }
    }

    /// All of them.
    pub fn hierarchies(&self) -> &[Hierarchy] {
        &self.hierarchies
    }

    /// v2 and nothing else.
    pub fn is_pure_v2(&self) -> bool {
        self.v2().is_some() && self.hierarchies.len() == 1
    }

    /// The v2 hierarchy, on pure and hybrid hosts.
    pub fn v2(&self) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|h| h.version == Version::V2)
    }

    /// Where `controller` can be used: its v1 hierarchy, else v2 when it has it.
    pub fn locate(&self, controller: Controller) -> Option<&Hierarchy> {
        let v1 = self.hierarchies.iter().find(|h| h.version == Version::V1 && h.controllers.contains(&controller));
        v1.or_else(|| self.v2().filter(|h| controller.core_on_v2() || h.controllers.contains(&controller)))
    }

    /// Whether swap can be limited (a kernel built or booted without swap accounting lacks the files).
    pub fn accounts_swap(&self) -> bool {
        match self.locate(Controller::Memory) {
            None => false,
            Some(h) if h.version == Version::V1 => h.root.join("memory.memsw.limit_in_bytes").exists(),
            // The v2 root has no limits; any group below it shows whether there is such a file.
            Some(h) => std::fs::read_dir(&h.root).is_ok_and(|entries| {
                let with_memory = entries.flatten().map(|e| e.path()).find(|p| p.join("memory.max").exists());
                with_memory.is_none_or(|p| p.join("memory.swap.max").exists())
            }),
        }
    }

    /// The hierarchy that is asked for the processes of a group: v2 when there is one (it can kill and tell when a group is
    /// empty), else freezer, else any.
    pub(super) fn tracking(&self) -> Option<&Hierarchy> {
        self.v2().or_else(|| self.locate(Controller::Freezer)).or_else(|| self.hierarchies.first())
    }
}

/// What one line of `/proc/self/mountinfo` says (`proc_pid_mountinfo(5)`).
struct MountLine {
    root: String,
    mount_point: String,
    kind: String,
    super_options: String,
}

fn parse_line(line: &str) -> Option<MountLine> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, mount_point) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, _source, super_options) = (right.next()?, right.next()?, right.next().unwrap_or(""));
    Some(MountLine { root: unescape(root), mount_point: unescape(mount_point), kind: kind.to_owned(), super_options: super_options.to_owned() })
}

/// Undoes the `\040` escapes of blanks, tabs, new lines and backslashes.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match code {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// The hierarchies in the text of a mountinfo file. v2 has no controllers yet: its own file tells. When a hierarchy is mounted
/// several times, the mount of its whole tree is taken before a bind mount of a part, and the first of equals.
pub fn parse_mountinfo(text: &str) -> Host {
    let mut found: Vec<(Hierarchy, bool)> = Vec::new();
    for line in text.lines().filter_map(parse_line) {
        let (version, controllers) = match line.kind.as_str() {
            "cgroup2" => (Version::V2, Vec::new()),
            "cgroup" => {
                let options = line.super_options.split(',');
                let controllers: Vec<_> = options.clone().filter_map(Controller::from_v1).collect();
                // perf_event, net_cls, rdma and other names: nothing here uses them.
                if controllers.is_empty() && !options.clone().any(|o| o == "name=systemd") {
                    continue;
                }
                (Version::V1, controllers)
            }
            _ => continue,
        };
        let whole = line.root == "/";
        let hierarchy = Hierarchy { root: PathBuf::from(line.mount_point), version, controllers };
        let same = |h: &Hierarchy| h.version == version && h.controllers == hierarchy.controllers;
        match found.iter_mut().find(|(h, _)| same(h)) {
            Some((old, old_whole)) if whole && !*old_whole => (*old, *old_whole) = (hierarchy, true),
            Some(_) => {}
            None => found.push((hierarchy, whole)),
        }
    }
    Host { hierarchies: found.into_iter().map(|(h, _)| h).collect() }
}

/// The controllers in the text of a `cgroup.controllers` file.
pub fn parse_v2_controllers(text: &str) -> Vec<Controller> {
    text.split_whitespace().filter_map(Controller::from_v2).collect()
}

impl Hierarchy {
    /// The directory of `path` on this hierarchy.
    pub(super) fn dir(&self, path: &super::path::CgroupPath) -> PathBuf {
        self.root.join(path.relative())
    }

    /// Whether `dir` lies below the root, for walks upwards.
    pub(super) fn holds(&self, dir: &Path) -> bool {
        dir != self.root && dir.starts_with(&self.root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn roots(host: &Host) -> Vec<&str> {
        host.hierarchies().iter().map(|h| h.root.to_str().unwrap()).collect()
    }

    #[test]
    fn hybrid_host() {
        let mut host = parse_mountinfo(HYBRID);
        assert_eq!(roots(&host), ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"]);
        assert!(!host.is_pure_v2());
        host.hierarchies.last_mut().unwrap().controllers = parse_v2_controllers("hugetlb\n");
        assert_eq!(host.locate(Controller::Memory).unwrap().version, Version::V1);
        assert_eq!(host.locate(Controller::Hugetlb).unwrap().version, Version::V2);
        assert_eq!(host.locate(Controller::Freezer).unwrap().version, Version::V2);
        assert!(host.locate(Controller::Pids).is_none());
        assert_eq!(host.tracking().unwrap().version, Version::V2);
    }

    #[test]
    fn pure_v1_with_joined_controllers_and_odd_mount_points() {
        let host = parse_mountinfo(
            "30 1 0:1 / /cg\\040roup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,xattr,cpu,cpuacct\n\
             31 1 0:2 / /dev/cpuset rw - cgroup none rw,cpuset,release_agent=/bin/x\n\
             32 1 0:3 / /sys/fs/cgroup/net_cls rw - cgroup cgroup rw,net_cls,net_prio\n\
             33 1 0:4 / /sys/fs/cgroup/mine rw - cgroup cgroup rw,name=mine\n",
        );
        assert_eq!(roots(&host), ["/cg roup/cpu,cpuacct", "/dev/cpuset"]);
        assert_eq!(host.locate(Controller::Cpuacct), host.locate(Controller::Cpu));
        assert!(host.v2().is_none());
        assert!(host.locate(Controller::Devices).is_none());
    }

    #[test]
    fn pure_v2_has_devices_and_freezer_in_its_core() {
        let mut host = parse_mountinfo("29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n");
        assert!(host.is_pure_v2());
        host.hierarchies[0].controllers = parse_v2_controllers("cpuset cpu io memory hugetlb pids rdma misc\n");
        for c in [Controller::Cpu, Controller::Blkio, Controller::Devices, Controller::Freezer, Controller::Cpuacct, Controller::Pids] {
            assert!(host.locate(c).is_some(), "{c:?}");
        }
        assert!(!host.v2().unwrap().controllers.contains(&Controller::Devices));
    }

    #[test]
    fn the_whole_tree_wins_over_a_bind_of_a_part() {
        let host =
            parse_mountinfo("1 0 0:1 /docker/x /a rw - cgroup c rw,memory\n2 0 0:1 / /b rw - cgroup c rw,memory\n3 0 0:1 / /c rw - cgroup c rw,memory\n");
        assert_eq!(roots(&host), ["/b"]);
    }

    #[test]
    fn garbage_is_no_host() {
        assert_eq!(parse_mountinfo("x\n\n1 2 3\n - cgroup\n1 1 0:1 / /\\9 rw - cgroup\n"), Host::default());
        assert_eq!(unescape("a\\134b\\"), "a\\b\\");
    }
}
