//! Against this machine's real hierarchies (root), and v2 against plain files in a scratch directory.

use std::collections::HashMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::*;
use crate::cgroups::to_oci;

/// A group on the real hierarchies with a name of its own, killed and removed at the end whatever happens.
struct Scratch(Manager);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(Manager::create(&format!("/mesocri-test-{}-{name}/leaf", std::process::id())).unwrap())
    }

    fn dirs(&self) -> Vec<PathBuf> {
        self.0.host.hierarchies().iter().map(|h| h.dir(&self.0.path)).collect()
    }

    fn file(&self, controller: Controller, file: &str) -> String {
        let h = self.0.host.locate(controller).unwrap();
        std::fs::read_to_string(h.dir(&self.0.path).join(file)).unwrap().trim().to_owned()
    }

    /// Runs a shell that joins the group before it runs `script`.
    fn run(&self, script: &str) -> Child {
        let join: String = self.dirs().iter().map(|d| format!("echo $$ > {}/cgroup.procs && ", d.display())).collect();
        Command::new("sh").arg("-c").arg(format!("{join} {script}")).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// A process that sleeps in the group, added by us.
    fn sleeper(&self) -> Child {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        self.0.add(child.id()).unwrap();
        child
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.delete();
    }
}

/// Looks again and again at what nothing announces.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        nix::poll::poll(&mut [], nix::poll::PollTimeout::from(1u8)).unwrap();
    }
}

fn resources() -> Resources {
    Resources {
        cpu_period: Some(50_000),
        cpu_quota: Some(25_000),
        cpu_shares: Some(512),
        memory_limit: Some(64 << 20),
        pids_limit: Some(17),
        cpuset_cpus: Some("0".to_owned()),
        ..Resources::default()
    }
}

#[test]
fn create_on_every_hierarchy_and_delete_leaves_nothing() {
    let scratch = Scratch::new("create");
    assert!(scratch.0.host.hierarchies().len() > 1 || scratch.0.host.is_pure_v2());
    for dir in scratch.dirs() {
        assert!(dir.is_dir(), "{}", dir.display());
    }
    // Again is no error, and neither is deleting twice.
    Manager::create(scratch.0.path()).unwrap();
    scratch.0.delete().unwrap();
    scratch.0.delete().unwrap();
    for dir in scratch.dirs() {
        assert!(!dir.exists(), "{}", dir.display());
        assert!(!dir.parent().unwrap().exists(), "the parent we had to make stays: {}", dir.display());
    }
}

#[test]
fn a_parent_of_someone_else_stays() {
    let scratch = Scratch::new("parent");
    let parent = Manager::open(scratch.0.path.parent().unwrap().as_str()).unwrap();
    // Take our mark away: now it is as if the kubelet had made it.
    for h in scratch.0.host.hierarchies() {
        rustix::fs::removexattr(h.dir(&parent.path), MARK).unwrap();
    }
    scratch.0.delete().unwrap();
    assert!(parent.exists());
    parent.delete().unwrap();
    assert!(!parent.exists());
}

#[test]
fn v1_limits_are_readable() {
    let scratch = Scratch::new("limits");
    if scratch.0.host.is_pure_v2() {
        return;
    }
    scratch.0.apply(&to_oci(&resources())).unwrap();
    assert_eq!(scratch.file(Controller::Cpu, "cpu.shares"), "512");
    assert_eq!(scratch.file(Controller::Cpu, "cpu.cfs_period_us"), "50000");
    assert_eq!(scratch.file(Controller::Cpu, "cpu.cfs_quota_us"), "25000");
    assert_eq!(scratch.file(Controller::Memory, "memory.limit_in_bytes"), (64 << 20).to_string());
    assert_eq!(scratch.file(Controller::Memory, "memory.memsw.limit_in_bytes"), (64 << 20).to_string());
    assert_eq!(scratch.file(Controller::Pids, "pids.max"), "17");
    assert_eq!(scratch.file(Controller::Cpuset, "cpuset.cpus"), "0");
    // Up past the present memsw, and down again: both need the right order.
    for mib in [128i64, 32] {
        scratch.0.update(&Resources { memory_limit: Some(mib << 20), ..Resources::default() }).unwrap();
        assert_eq!(scratch.file(Controller::Memory, "memory.memsw.limit_in_bytes"), (mib << 20).to_string());
    }
    assert_eq!(scratch.file(Controller::Cpu, "cpu.shares"), "512", "what an update does not say stays");
    scratch.0.update(&Resources { memory_limit: Some(-1), memory_swap: Some(-1), cpu_quota: Some(-1), pids_limit: Some(-1), ..Resources::default() }).unwrap();
    assert_eq!(scratch.file(Controller::Pids, "pids.max"), "max");
    assert_eq!(scratch.file(Controller::Cpu, "cpu.cfs_quota_us"), "-1");
    let stats = scratch.0.stats(Detail::Full).unwrap();
    assert_eq!((stats.memory_limit, stats.pids_limit), (None, None));
}

/// Every file that an update may write, with what it holds.
fn limits(scratch: &Scratch) -> Vec<(String, String)> {
    let mut held = Vec::new();
    for dir in scratch.dirs() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let limits = ["shares", "weight", "quota_us", "period_us", "cpu.max", "limit_in_bytes", "cpuset.cpus", "pids.max", "memory.max", "memory.swap.max"];
            if limits.iter().any(|l| name.ends_with(l)) {
                held.push((name, std::fs::read_to_string(entry.path()).unwrap_or_default()));
            }
        }
    }
    held.sort();
    held
}

#[test]
fn an_update_that_is_refused_half_way_changes_nothing() {
    let scratch = Scratch::new("whole");
    // From limits to others, and from none: what was not limited must be unlimited again.
    for first in [Some(resources()), None] {
        if let Some(first) = first {
            scratch.0.update(&first).unwrap();
        } else {
            scratch
                .0
                .update(&Resources { memory_limit: Some(-1), memory_swap: Some(-1), cpu_quota: Some(-1), pids_limit: Some(-1), ..Resources::default() })
                .unwrap();
        }
        let before = limits(&scratch);
        assert!(before.len() > 4, "{before:?}");
        let others =
            Resources { cpu_shares: Some(700), cpu_quota: Some(9_000), cpu_period: Some(20_000), memory_limit: Some(32 << 20), ..Resources::default() };
        // Refused by cpuset after cpu was written; by memory+swap after memory was; by a page size after all of them.
        let refusals = [
            Resources { cpuset_cpus: Some("4095".to_owned()), ..others.clone() },
            Resources { memory_swap: Some(16 << 20), ..others.clone() },
            Resources { pids_limit: Some(5), hugepage_limits: [("2XB".to_owned(), 1)].into(), ..others.clone() },
        ];
        for refused in refusals {
            scratch.0.update(&refused).unwrap_err();
            assert_eq!(limits(&scratch), before, "{refused:?}");
        }
        scratch.0.update(&others).unwrap();
        assert_ne!(limits(&scratch), before, "the same limits without the refused one are taken");
    }
}

#[test]
fn errors_name_file_and_value() {
    let scratch = Scratch::new("errors");
    if scratch.0.host.is_pure_v2() {
        return;
    }
    let e = scratch.0.update(&Resources { cpuset_cpus: Some("4095".to_owned()), ..Resources::default() }).unwrap_err().to_string();
    assert!(e.starts_with("write 4095 to ") && e.contains("leaf/cpuset.cpus: "), "{e}");
}

#[test]
fn add_kill_delete() {
    let scratch = Scratch::new("kill");
    let mut one = scratch.sleeper();
    let mut many = scratch.run("for i in 1 2 3; do sleep 1000 & done; wait");
    wait_until("all are in", || scratch.0.procs().unwrap().len() >= 5);
    assert!(scratch.0.procs().unwrap().contains(&one.id()));
    assert!(scratch.0.stats(Detail::Full).unwrap().pids.unwrap() >= 5);
    let e = scratch.0.delete().unwrap_err();
    assert_eq!(e.kind, Kind::FailedPrecondition, "{e}");
    scratch.0.kill().unwrap();
    assert_eq!(scratch.0.procs_anywhere().unwrap(), Vec::<u32>::new());
    // Zombies, not yet reaped by us, do not keep the group.
    scratch.0.delete().unwrap();
    assert!(!scratch.0.exists());
    one.wait().unwrap();
    many.wait().unwrap();
    scratch.0.kill().unwrap();
}

/// Who leaves the v2 group and stays in those of v1 is not struck, and yet does not keep the group.
#[test]
fn a_process_that_left_one_hierarchy_is_found_at_removal() {
    let scratch = Scratch::new("escaped");
    let host = scratch.0.host.clone();
    let (Some(v2), Some(v1)) = (host.v2(), host.locate(Controller::Pids).filter(|h| h.version == Version::V1)) else { return };
    let (mut inside, mut escaped) = (scratch.sleeper(), scratch.sleeper());
    std::fs::write(v2.root.join("cgroup.procs"), escaped.id().to_string()).unwrap();
    scratch.0.strike().unwrap();
    inside.wait().unwrap();
    assert!(escaped.try_wait().unwrap().is_none());
    assert!(scratch.0.group(v1).dir().exists());
    assert!(scratch.0.remove_step().unwrap().is_some());
    escaped.wait().unwrap();
    removed(&scratch.0);
    assert!(!scratch.0.exists());
}

/// Steps until the group is gone, whose processes die.
fn removed(manager: &Manager) {
    wait_until("the group is gone", || manager.remove_step().unwrap().is_none());
}

/// The group on the v1 hierarchies alone: there is no `cgroup.kill` then.
fn v1_only(scratch: &Scratch) -> Option<Manager> {
    let v1: Vec<_> = scratch.0.host.hierarchies().iter().filter(|h| h.version == Version::V1).cloned().collect();
    (!v1.is_empty()).then(|| Manager::open_on(Arc::new(Host::from_hierarchies(v1)), scratch.0.path()).unwrap())
}

/// A process that does not die: v1 lets nobody go while a group above is frozen.
#[test]
fn nobody_waits_for_a_process_that_does_not_die() {
    let scratch = Scratch::new("undying");
    let Some(manager) = v1_only(&scratch).filter(|m| m.host.locate(Controller::Freezer).is_some()) else { return };
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    manager.add(child.id()).unwrap();
    let above = Manager { host: manager.host.clone(), path: manager.path.parent().unwrap() };
    above.freeze().unwrap();
    let begun = Instant::now();
    manager.strike().unwrap();
    let used = manager.remove_step().unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let text = used.to_string();
    assert!(used.kind == Kind::FailedPrecondition && text.contains(manager.path()) && text.ends_with(&format!(" {}", child.id())), "{text}");
    assert!(child.try_wait().unwrap().is_none(), "it was to live");
    above.thaw().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
    removed(&manager);
    assert!(!manager.exists());
}

#[test]
fn kill_without_v2_reaches_sub_groups_and_outruns_a_fork_loop() {
    let scratch = Scratch::new("bomb");
    let Some(manager) = v1_only(&scratch) else { return };
    let inner = Manager::create_on(manager.host.clone(), &format!("{}/inner", scratch.0.path())).unwrap();
    manager.update(&Resources { pids_limit: Some(200), ..Resources::default() }).unwrap();
    let mut child = scratch.run("while :; do (sleep 0.01; sleep 0.01) & done");
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    inner.add(sleeper.id()).unwrap();
    assert!(manager.procs().unwrap().contains(&sleeper.id()));
    // Before the shell has joined there is no loop to outrun, and nobody would ever end it.
    wait_until("the loop is under way", || manager.procs().unwrap().len() >= 10);
    manager.kill().unwrap();
    child.wait().unwrap();
    sleeper.wait().unwrap();
    assert!(manager.procs_anywhere().unwrap().is_empty());
    manager.delete().unwrap();
    assert!(!inner.exists());
    // The same by steps that do not wait.
    Manager::create_on(manager.host.clone(), manager.path()).unwrap();
    manager.update(&Resources { pids_limit: Some(200), ..Resources::default() }).unwrap();
    let mut child = scratch.run("while :; do (sleep 0.01; sleep 0.01) & done");
    wait_until("the loop is under way", || manager.procs().unwrap().len() >= 10);
    manager.strike().unwrap();
    removed(&manager);
    child.wait().unwrap();
}

#[test]
fn frozen_processes_stand_still_and_can_be_killed() {
    let scratch = Scratch::new("freeze");
    let mut child = scratch.sleeper();
    scratch.0.freeze().unwrap();
    assert!(scratch.0.is_frozen());
    scratch.0.thaw().unwrap();
    assert!(!scratch.0.is_frozen());
    scratch.0.freeze().unwrap();
    scratch.0.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn out_of_memory_is_counted_and_announced() {
    let scratch = Scratch::new("oom");
    scratch.0.update(&Resources { memory_limit: Some(8 << 20), ..Resources::default() }).unwrap();
    let watch = scratch.0.watch_oom().unwrap();
    assert_eq!(scratch.0.oom_kills(), Some(0));
    // dd fills a buffer of that size.
    let mut child = scratch.run("exec dd if=/dev/zero of=/dev/null bs=64M count=1");
    let mut fds = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1, "no notice");
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    assert_eq!(scratch.0.oom_kills(), Some(1));
    assert_eq!(scratch.0.stats(Detail::Full).unwrap().oom_kills, Some(1));
    watch.clear();
}

#[test]
fn a_forked_child_joins_by_itself() {
    let scratch = Scratch::new("self");
    let manager = scratch.0.clone();
    let mut command = Command::new("sleep");
    command.arg("1000");
    let join = move || {
        manager.entrance()?.enter()?;
        manager.add_v2(std::process::id())
    };
    crate::sys::testing::before_exec(&mut command, move || join().map_err(std::io::Error::other));
    let mut child = command.spawn().unwrap();
    assert_eq!(scratch.0.procs_anywhere().unwrap(), [child.id()]);
    for h in scratch.0.host.hierarchies() {
        let group = scratch.0.group(h);
        assert_eq!(Reader::default().must(&group, "cgroup.procs").unwrap().trim(), child.id().to_string());
    }
    scratch.0.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn stats_have_numbers() {
    let scratch = Scratch::new("stats");
    let mut child = scratch.run("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 1000");
    wait_until("the shell, alone in the group, has used the processor", || {
        let s = scratch.0.stats(Detail::Full).unwrap();
        s.cpu_usage.unwrap() >= 5_000_000 && s.pids == Some(1)
    });
    let s = scratch.0.stats(Detail::Full).unwrap();
    assert!(s.at > 0 && s.memory_usage.unwrap() > 0 && s.memory_working_set.unwrap() <= s.memory_usage.unwrap());
    assert!(s.page_faults.is_some() && s.memory_rss.is_some() && s.pids == Some(1) && s.cpu_user.is_some());
    scratch.0.kill().unwrap();
    child.wait().unwrap();
    let unknown = Manager::open("/mesocri-test-nothing/here").unwrap();
    assert_eq!(unknown.stats(Detail::Full).unwrap_err().kind, Kind::NotFound);
    assert_eq!(unknown.oom_kills(), None);
}

fn device(allow: bool, number: Option<(i64, i64)>) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_access(Some("rwm".to_owned()));
    if let Some((major, minor)) = number {
        rule.set_typ(Some(LinuxDeviceType::C)).set_major(Some(major)).set_minor(Some(minor));
    }
    rule
}

/// Opens /dev/null and /dev/zero inside the group: exit codes 0 and 0, or which one failed.
fn try_devices(scratch: &Scratch) -> i32 {
    // The shell's own redirections happen after it joined.
    scratch.run("(: < /dev/null) 2>&- || exit 10; (: < /dev/zero) 2>&- || exit 20; exit 0").wait().unwrap().code().unwrap()
}

fn check_devices(scratch: &Scratch, manager: &Manager) {
    let apply = |rules: Vec<LinuxDeviceCgroup>| {
        let mut r = LinuxResources::default();
        r.set_devices(Some(rules));
        manager.apply(&r).unwrap();
    };
    assert_eq!(try_devices(scratch), 0, "control: all is open before");
    apply(vec![device(false, None), device(true, Some((1, 3)))]);
    assert_eq!(try_devices(scratch), 20, "null is allowed, zero is not");
    apply(vec![device(false, None), device(true, Some((1, 5)))]);
    assert_eq!(try_devices(scratch), 10, "new rules replace the old ones");
    apply(vec![device(false, None), device(true, Some((1, 5))), device(true, Some((1, 3)))]);
    assert_eq!(try_devices(scratch), 0);
}

#[test]
fn device_rules_hold() {
    let scratch = Scratch::new("devices");
    check_devices(&scratch, &scratch.0.clone());
}

#[test]
fn device_rules_hold_as_a_bpf_program_on_v2() {
    let scratch = Scratch::new("bpf");
    let Some(v2) = scratch.0.host.v2().cloned() else { return };
    let manager = Manager::open_on(Arc::new(Host::from_hierarchies(vec![v2])), scratch.0.path()).unwrap();
    check_devices(&scratch, &manager);
}

/// A pure v2 host on plain files: what is written can be read back, the kernel's reactions are missing.
struct Fake {
    _dir: tempfile::TempDir,
    manager: Manager,
}

impl Fake {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let controllers = "cpuset cpu io memory hugetlb pids\n";
        for level in ["", "a", "a/b"] {
            let at = dir.path().join(level);
            std::fs::create_dir_all(&at).unwrap();
            std::fs::write(at.join("cgroup.controllers"), controllers).unwrap();
            std::fs::write(at.join("cgroup.subtree_control"), "").unwrap();
        }
        let root = Hierarchy { root: dir.path().to_owned(), version: Version::V2, controllers: super::super::host::parse_v2_controllers(controllers) };
        let manager = Manager::create_on(Arc::new(Host::from_hierarchies(vec![root])), "/a/b/c").unwrap();
        for (file, text) in files {
            std::fs::write(dir.path().join("a/b/c").join(file), text).unwrap();
        }
        Self { _dir: dir, manager }
    }

    fn text(&self, file: &str) -> String {
        std::fs::read_to_string(self.manager.host.hierarchies()[0].dir(&self.manager.path).join(file)).unwrap()
    }
}

#[test]
fn v2_enables_controllers_top_down() {
    let fake = Fake::new(&[]);
    let root = &fake.manager.host.hierarchies()[0].root;
    for level in ["", "a", "a/b"] {
        let text = std::fs::read_to_string(root.join(level).join("cgroup.subtree_control")).unwrap();
        assert_eq!(text, "+cpuset +cpu +io +memory +hugetlb +pids", "{level:?}");
    }
}

#[test]
fn v2_limits() {
    let files =
        ["cpu.weight", "memory.max", "memory.swap.max", "pids.max", "cpuset.cpus", "hugetlb.2MB.max", "memory.oom.group", "memory.high"].map(|f| (f, ""));
    let fake = Fake::new(&files);
    std::fs::write(fake.manager.host.hierarchies()[0].dir(&fake.manager.path).join("cpu.max"), "max 100000\n").unwrap();
    let mut r = resources();
    r.memory_swap = Some(80 << 20);
    r.hugepage_limits.insert("2MB".to_owned(), 0);
    r.hugepage_limits.insert("1GB".to_owned(), 0);
    r.unified.insert("memory.oom.group".to_owned(), "1".to_owned());
    fake.manager.update(&r).unwrap();
    let texts = ["cpu.weight", "cpu.max", "memory.max", "memory.swap.max", "pids.max", "cpuset.cpus", "hugetlb.2MB.max", "memory.oom.group"];
    let expected = ["59", "25000 50000", "67108864", "16777216", "17", "0", "0", "1"];
    for (file, value) in texts.iter().zip(expected) {
        // A plain file keeps the tail of a longer old text; the kernel does not.
        assert!(fake.text(file).starts_with(value), "{file}: {}", fake.text(file));
    }
    let unified = |name: &str| {
        let mut r = LinuxResources::default();
        r.set_devices(None).set_unified(Some(HashMap::from([(name.to_owned(), "1".to_owned())])));
        fake.manager.apply(&r).unwrap_err().kind
    };
    assert_eq!(unified("../../x.y"), Kind::InvalidArgument);
    assert_eq!(unified("cgroup.kill"), Kind::InvalidArgument);
    assert_eq!(unified("memory.nothing"), Kind::Internal);
}

#[test]
fn v2_statistics() {
    let fake = Fake::new(&[
        ("cpu.stat", "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 3\nnr_throttled 1\nthrottled_usec 9\n"),
        ("memory.current", "1000\n"),
        ("memory.max", "max\n"),
        ("memory.peak", "2000\n"),
        ("memory.swap.current", "10\n"),
        ("memory.swap.max", "30\n"),
        ("memory.stat", "anon 100\nfile 200\ninactive_file 300\npgfault 7\npgmajfault 1\nkernel 50\nfile_mapped 5\n"),
        ("memory.events", "low 0\nhigh 0\nmax 4\noom 1\noom_kill 2\n"),
        ("pids.current", "3\n"),
        ("pids.max", "5\n"),
        ("cpu.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n"),
    ]);
    let s = fake.manager.stats(Detail::Full).unwrap();
    assert_eq!((s.cpu_usage, s.cpu_user, s.cpu_system), (Some(1_500_000), Some(1_000_000), Some(500_000)));
    assert_eq!(s.cpu_throttling, Some((3, 1, 9000)));
    assert_eq!((s.memory_usage, s.memory_limit, s.memory_peak, s.memory_working_set), (Some(1000), None, Some(2000), Some(700)));
    assert_eq!((s.memory_rss, s.memory_cache, s.memory_kernel, s.memory_mapped_file), (Some(100), Some(200), Some(50), Some(5)));
    assert_eq!((s.page_faults, s.major_page_faults, s.memory_failcnt, s.oom_kills), (Some(7), Some(1), Some(4), Some(2)));
    assert_eq!((s.swap_usage, s.swap_available, s.pids, s.pids_limit), (Some(10), Some(20), Some(3), Some(5)));
    assert_eq!(s.cpu_pressure.unwrap().some.total, 5000);
    assert!(s.io_pressure.is_none());
    assert_eq!(fake.manager.oom_kills(), Some(2));
}
