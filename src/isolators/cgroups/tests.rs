//! Against this machine's hierarchies (root), each test below a parent of its own.

use std::process::{Child, Command};

use super::super::tests::Bench;
use super::*;
use crate::model::error::Kind;

/// An isolator with its own default parent, removed at the end.
struct Case {
    bench: Bench,
    isolator: Cgroups,
}

impl Case {
    fn new(name: &str) -> Self {
        Self::with(name, Driver::Cgroupfs)
    }

    fn with(name: &str, driver: Driver) -> Self {
        let mut bench = Bench::new();
        bench.pod_id = PodId::random();
        std::fs::create_dir_all(&bench.deps.layout.state).unwrap();
        let config = Config { driver, default_parent: format!("/mesocri-test-{}-{name}", std::process::id()) };
        let isolator = Cgroups::new(config, &bench.deps, Host::get().unwrap()).unwrap();
        Self { bench, isolator }
    }

    fn parent(&self) -> Manager {
        Manager::open(&self.isolator.config.default_parent).unwrap()
    }

    /// What the shim does: the group from the plan, a process in it.
    fn launch(&self, patch: &LaunchPatch) -> Child {
        let group = Manager::create(patch.cgroups_path.as_ref().unwrap()).unwrap();
        group.apply(patch.resources.as_ref().unwrap()).unwrap();
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        group.add(child.id()).unwrap();
        child
    }

    async fn cleanup(&self, container: bool) -> Result<()> {
        self.isolator.cleanup(&self.bench.pod_id, &self.bench.pod, container.then_some(&self.bench.id)).await
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = end(&self.parent());
    }
}

#[tokio::test]
async fn a_pod_from_prepare_to_cleanup() {
    let mut case = Case::new("life");
    case.bench.spec.resources = Resources { memory_limit: Some(32 << 20), cpu_shares: Some(512), pids_limit: Some(9), ..Resources::default() };
    case.bench.prepare_sandbox(&case.isolator).await.unwrap();
    let patch = case.bench.prepare(&case.isolator).await.unwrap();
    assert_eq!(patch.cgroups_path.as_deref().unwrap(), format!("{}/{}/{}", case.parent().path(), case.bench.pod_id, case.bench.id));
    assert_eq!(patch.foreign_cgroup, None);
    let mut child = case.launch(&patch);

    let usage = |c: Option<&ContainerId>| case.isolator.usage(&case.bench.pod_id, &case.bench.pod, c);
    let container = usage(Some(&case.bench.id)).unwrap();
    assert_eq!((container.pids, container.memory_limit), (Some(1), Some(32 << 20)));
    let all = Manager::open(patch.cgroups_path.as_deref().unwrap()).unwrap().stats(Detail::Full).unwrap();
    assert_eq!(all.pids_limit, Some(9));
    assert_eq!(case.isolator.oom_kills(&case.bench.pod_id, &case.bench.pod, &case.bench.id), Some(0));
    assert!(usage(None).unwrap().memory_usage.is_some());
    assert!(usage(Some(&ContainerId::from_string("unknown"))).is_none());

    let merged = case.bench.spec.resources.updated_by(&Resources { memory_limit: Some(64 << 20), ..Resources::default() });
    assert!(case.bench.update(&case.isolator, &merged).await.unwrap(), "written, nobody else needs to");
    assert_eq!(usage(Some(&case.bench.id)).unwrap().memory_limit, Some(64 << 20));

    case.cleanup(true).await.unwrap();
    child.wait().unwrap();
    assert!(usage(Some(&case.bench.id)).is_none());
    case.cleanup(true).await.unwrap();
    case.cleanup(false).await.unwrap();
    case.cleanup(false).await.unwrap();
    assert!(!case.parent().exists(), "the default parent goes with its last pod");
}

#[tokio::test]
async fn the_callers_parent_is_made_on_demand_and_otherwise_left_alone() {
    let mut case = Case::new("caller");
    case.bench.pod.cgroup_parent = format!("{}/their.slice", case.parent().path());
    let theirs = Manager::create(&case.bench.pod.cgroup_parent).unwrap();
    case.bench.prepare_sandbox(&case.isolator).await.unwrap();
    let patch = case.bench.prepare(&case.isolator).await.unwrap();
    let mut child = case.launch(&patch);
    case.cleanup(true).await.unwrap();
    child.wait().unwrap();
    case.cleanup(false).await.unwrap();
    assert!(theirs.exists(), "the pod's group belongs to the caller");
    theirs.delete().unwrap();

    // Nobody made it: it comes with the container and goes with it.
    let patch = case.bench.prepare(&case.isolator).await.unwrap();
    let mut child = case.launch(&patch);
    assert!(theirs.exists());
    case.cleanup(true).await.unwrap();
    child.wait().unwrap();
    assert!(!theirs.exists());
}

#[tokio::test]
async fn recovery_ends_only_our_own_unknown_pods() {
    let case = Case::new("recover");
    let mut children = Vec::new();
    let mut groups = Vec::new();
    for owner in [Some("us"), Some("us"), Some("another daemon"), None] {
        let group = Manager::create(&format!("{}/{}", case.parent().path(), PodId::random())).unwrap();
        let owner = owner.map(|o| if o == "us" { case.isolator.owner.clone() } else { o.to_owned() });
        if let Some(owner) = owner {
            group.set_owner(&owner).unwrap();
        }
        let inner = Manager::create(&format!("{}/c", group.path())).unwrap();
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        inner.add(child.id()).unwrap();
        children.push(child);
        groups.push(group);
    }
    let known = PodId::from_string(groups[0].path().rsplit('/').next().unwrap());
    case.isolator.recover(&[known]).await.unwrap();
    assert_eq!(groups.iter().map(Manager::exists).collect::<Vec<_>>(), [true, false, true, true]);
    end(&case.parent()).unwrap();
    for mut child in children {
        child.wait().unwrap();
    }
}

#[tokio::test]
async fn a_parent_made_before_a_crash_goes_with_its_last_pod() {
    let case = Case::new("crash");
    let note = case.bench.deps.layout.own_cgroup_parent();
    case.bench.prepare_sandbox(&case.isolator).await.unwrap();
    assert!(!note.exists());
    // The daemon died between making the parent on one hierarchy and marking it there.
    let host = Host::get().unwrap();
    let dir = host.hierarchies()[0].root.join(case.parent().path().trim_start_matches('/'));
    rustix::fs::removexattr(&dir, "trusted.mesocri").unwrap();
    std::fs::write(&note, case.parent().path()).unwrap();
    let again = Cgroups::new(case.isolator.config.clone(), &case.bench.deps, host).unwrap();
    again.recover(std::slice::from_ref(&case.bench.pod_id)).await.unwrap();
    assert!(dir.is_dir() && !note.exists(), "a pod is in it");
    again.cleanup(&case.bench.pod_id, &case.bench.pod, None).await.unwrap();
    assert!(!case.parent().exists());

    // One that an administrator makes later, maybe with limits, is not ours, though we made one of that name before.
    let admins = Manager::create(case.parent().path()).unwrap();
    again.recover(&[]).await.unwrap();
    case.bench.prepare_sandbox(&again).await.unwrap();
    again.cleanup(&case.bench.pod_id, &case.bench.pod, None).await.unwrap();
    assert!(admins.exists());
    admins.delete().unwrap();

    // A crash before it was made, and one that left half a note.
    for text in [case.parent().path(), "", "/.."] {
        std::fs::write(&note, text).unwrap();
        again.recover(&[]).await.unwrap();
        assert!(!note.exists() && !case.parent().exists(), "{text}");
    }
}

#[test]
fn pods_made_at_once_share_the_parent_and_its_note() {
    let case = Case::new("at-once");
    for _ in 0..20 {
        let paths = [0, 1, 2].map(|n| format!("{}/{n}", case.parent().path()));
        std::thread::scope(|scope| {
            for made in paths.iter().map(|path| scope.spawn(|| case.isolator.make_pod_group(path))).collect::<Vec<_>>() {
                made.join().unwrap().unwrap();
            }
        });
        assert!(!case.bench.deps.layout.own_cgroup_parent().exists());
        for path in &paths {
            Manager::open(path).unwrap().delete().unwrap();
        }
        assert!(!case.parent().exists());
    }
}

#[tokio::test]
async fn bad_parents_and_limits_are_refused() {
    let mut case = Case::new("bad");
    for parent in ["a.slice:b:c", "/../x", "/"] {
        case.bench.pod.cgroup_parent = parent.to_owned();
        assert_eq!(case.bench.prepare_sandbox(&case.isolator).await.unwrap_err().kind, Kind::InvalidArgument, "{parent}");
    }
    case.bench.pod.cgroup_parent = String::new();
    for (limit, swap) in [(Some(100), Some(50)), (Some(-5), None), (Some(-1), Some(100))] {
        case.bench.spec.resources = Resources { memory_limit: limit, memory_swap: swap, ..Resources::default() };
        assert_eq!(case.bench.prepare(&case.isolator).await.unwrap_err().kind, Kind::InvalidArgument, "{limit:?} {swap:?}");
    }
    let table = |text: &str| (ENTRY.create)(&case.bench.deps, text.parse().unwrap()).map(|_| ());
    table("driver = \"systemd\"\ndefault_parent = \"/x\"").unwrap();
    for bad in ["driver = \"x\"", "default_parent = \"/..\"", "nothing = 1"] {
        assert_eq!(table(bad).unwrap_err().kind, Kind::InvalidArgument, "{bad}");
    }
}

#[tokio::test]
async fn what_a_container_sees() {
    let mut case = Case::new("view");
    let v2 = case.isolator.host.is_pure_v2();
    for privileged in [false, true] {
        case.bench.spec.security.privileged = privileged;
        let patch = case.bench.prepare(&case.isolator).await.unwrap();
        let options = patch.mounts[0].options().clone().unwrap();
        assert_eq!(options.iter().any(|o| o == "ro"), !privileged);
        assert_eq!(patch.namespaces.len(), usize::from(v2 && !privileged));
    }
    // The same on a v2 host.
    let root = crate::cgroups::host::Hierarchy { root: "/sys/fs/cgroup".into(), version: crate::cgroups::host::Version::V2, controllers: Vec::new() };
    case.isolator.host = Arc::new(Host::from_hierarchies(vec![root]));
    case.bench.spec.security.privileged = false;
    case.bench.spec.resources.unified.insert("memory.oom.group".to_owned(), "1".to_owned());
    let patch = case.bench.prepare(&case.isolator).await.unwrap();
    assert_eq!(patch.namespaces[0].typ(), oci::LinuxNamespaceType::Cgroup);
    assert!(patch.resources.unwrap().unified().is_some());
}

#[test]
fn oom_score_is_one_we_can_set() {
    let own: i32 = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().parse().unwrap();
    assert!(oom_score(1000) == 1000 && oom_score(5000) == 1000);
    let low = oom_score(-997);
    assert!(low == -997 || low == own, "{low}");
}

#[tokio::test]
async fn systemd_paths_for_the_plan() {
    let mut case = Case::with("systemd", Driver::Systemd);
    case.bench.pod.cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".to_owned();
    let patch = case.bench.prepare(&case.isolator).await.unwrap();
    assert_eq!(patch.cgroups_path.unwrap(), format!("kubepods-pod1.slice:mesocri:{}", case.bench.id));
    let group = format!("/kubepods.slice/kubepods-pod1.slice/mesocri-{}.scope", case.bench.id);
    assert_eq!(patch.foreign_cgroup, Some(group), "the shim must know where the daemon puts the process");
    case.bench.pod.cgroup_parent = "/kubepods/pod1".to_owned();
    assert_eq!(case.bench.prepare(&case.isolator).await.unwrap_err().kind, Kind::InvalidArgument);
}
