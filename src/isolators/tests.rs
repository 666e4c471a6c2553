//! The conformance suite of isolators, run over the registry: a new isolator is tested by being listed. And [`Bench`], what
//! the isolators' own tests are made with.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use super::*;
use crate::model::image::ImageConfig;
use crate::model::stats::InterfaceStats;
use crate::network::{Attachment, Network, Readiness};

/// A network that only remembers what it was asked.
#[derive(Default)]
pub struct RecordedNetwork(Mutex<Vec<&'static str>>);

impl RecordedNetwork {
    /// Names of the verbs, in order.
    pub fn calls(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().clone()
    }
}

#[async_trait]
impl Network for RecordedNetwork {
    async fn attach(&self, _: &PodId, _: &PodSpec) -> Result<Attachment> {
        self.0.lock().unwrap().push("attach");
        Ok(Attachment { ips: vec!["10.1.2.3".into()], network: "test".into(), result: None })
    }

    async fn detach(&self, _: &PodId, _: &PodSpec) -> Result<()> {
        self.0.lock().unwrap().push("detach");
        Ok(())
    }

    async fn readiness(&self) -> Readiness {
        Readiness::Ready
    }

    async fn stats(&self, _: &PodId) -> Result<Vec<InterfaceStats>> {
        Ok(Vec::new())
    }

    async fn set_pod_cidr(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn recover(&self, _: &[PodId]) -> Result<()> {
        self.0.lock().unwrap().push("recover");
        Ok(())
    }
}

/// A pod and a container in it, in a tree of their own, to be changed at will. Mounts made by a test are undone on drop.
pub struct Bench {
    pub deps: Deps,
    pub network: Arc<RecordedNetwork>,
    pub pod_id: PodId,
    pub pod: PodSpec,
    pub id: ContainerId,
    pub spec: ContainerSpec,
    pub image: Image,
    pub rootfs: RootFs,
    pub sandbox: Sandbox,
    pub target_pid: Option<u32>,
    pub image_volumes: Vec<std::path::PathBuf>,
    dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        layout.netns = dir.path().join("netns");
        let upper = dir.path().join("upper");
        std::fs::create_dir(&upper).unwrap();
        let network = Arc::new(RecordedNetwork::default());
        Self {
            deps: Deps { layout, network: network.clone() },
            network,
            pod_id: PodId::random(),
            pod: PodSpec::default(),
            id: ContainerId::random(),
            spec: ContainerSpec::default(),
            image: Image {
                id: crate::model::ImageId::from_string("sha256:00"),
                repo_tags: Vec::new(),
                repo_digests: Vec::new(),
                layers: Vec::new(),
                config: ImageConfig::default(),
                config_json: String::new(),
                size: 1,
                pinned: false,
            },
            rootfs: RootFs { backend: "test".into(), mounts: Vec::new(), lookup: vec![upper.clone()], writable: Some(upper) },
            sandbox: Sandbox::default(),
            target_pid: None,
            image_volumes: Vec::new(),
            dir,
        }
    }

    /// A directory for the test's own files.
    pub fn path(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Prepares the pod's sandbox.
    pub async fn prepare_sandbox(&self, isolator: &dyn Isolator) -> Result<LaunchPatch> {
        isolator.prepare(&Cx { pod_id: &self.pod_id, pod: &self.pod, container: None }).await
    }

    /// Prepares the container.
    pub async fn prepare(&self, isolator: &dyn Isolator) -> Result<LaunchPatch> {
        isolator.prepare(&Cx { pod_id: &self.pod_id, pod: &self.pod, container: Some(self.cx()) }).await
    }

    /// Gives the container new limits.
    pub async fn update(&self, isolator: &dyn Isolator, merged: &crate::model::resources::Resources) -> Result<bool> {
        isolator.update(&Cx { pod_id: &self.pod_id, pod: &self.pod, container: Some(self.cx()) }, merged).await
    }

    fn cx(&self) -> ContainerCx<'_> {
        let Self { id, spec, image, rootfs, sandbox, target_pid, image_volumes, .. } = self;
        ContainerCx { id, spec, image, rootfs, sandbox, target_pid: *target_pid, image_volumes }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for pod in std::fs::read_dir(self.deps.layout.run_pods()).into_iter().flatten().flatten() {
            let _ = nix::mount::umount2(&pod.path().join("shm"), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// Options of the patch's mount at `destination`.
pub fn options(patch: &LaunchPatch, destination: &str) -> Vec<String> {
    let mount = patch.mounts.iter().find(|m| m.destination() == std::path::Path::new(destination)).unwrap();
    mount.options().clone().unwrap_or_default()
}

/// A pod and container that every isolator has something to say about.
fn ordinary() -> Bench {
    let mut bench = Bench::new();
    bench.pod.hostname = "web-0".into();
    bench.image.config.cmd = vec!["/bin/true".into()];
    for kind in ["pid", "ipc", "uts", "network"] {
        bench.sandbox.namespaces.insert(kind.into(), format!("/proc/7/ns/{kind}").into());
    }
    bench
}

fn every(deps: &Deps) -> Vec<Box<dyn Isolator>> {
    ENTRIES.iter().map(|entry| (entry.create)(deps, toml::Table::new()).unwrap()).collect()
}

#[test]
fn names_are_unique_and_requirements_exist_and_come_first() {
    for (i, entry) in ENTRIES.iter().enumerate() {
        assert!(ENTRIES.iter().skip(i + 1).all(|other| other.name != entry.name), "{}", entry.name);
        for required in entry.requires {
            assert!(ENTRIES[..i].iter().any(|before| before.name == *required), "{} requires {required}", entry.name);
        }
    }
}

#[test]
fn each_is_made_from_an_empty_table_under_its_own_name() {
    let bench = Bench::new();
    for (entry, isolator) in ENTRIES.iter().zip(every(&bench.deps)) {
        assert_eq!(isolator.name(), entry.name);
    }
}

#[test]
fn unknown_configuration_keys_are_refused_by_all() {
    let bench = Bench::new();
    for entry in ENTRIES {
        let table = toml::Table::from_iter([("no_such_key".to_owned(), toml::Value::Boolean(true))]);
        for error in [(entry.create)(&bench.deps, table.clone()).err().unwrap(), (entry.options)(table).unwrap_err()] {
            assert_eq!(error.kind, crate::model::Kind::InvalidArgument, "{}", entry.name);
            assert!(error.to_string().contains("no_such_key") && error.to_string().contains(entry.name), "{error}");
        }
    }
}

#[test]
fn each_takes_the_options_that_it_shows() {
    let bench = Bench::new();
    for entry in ENTRIES {
        let shown = (entry.options)(toml::Table::new()).unwrap();
        assert_eq!((entry.options)(shown.clone()).unwrap(), shown, "{}", entry.name);
        (entry.create)(&bench.deps, shown).unwrap_or_else(|e| panic!("{}: {e}", entry.name));
    }
    let cgroups = Isolators::options(&default_isolation(), &toml::Table::new()).unwrap()["cgroups"].clone();
    assert_eq!(cgroups["driver"].as_str(), Some("cgroupfs"), "defaults are written out");
}

#[tokio::test]
async fn cleanup_is_fine_for_the_unknown_and_twice() {
    let bench = ordinary();
    for isolator in every(&bench.deps) {
        for _ in 0..2 {
            isolator.cleanup(&bench.pod_id, &bench.pod, Some(&bench.id)).await.unwrap_or_else(|e| panic!("{}: {e}", isolator.name()));
            isolator.cleanup(&bench.pod_id, &bench.pod, None).await.unwrap_or_else(|e| panic!("{}: {e}", isolator.name()));
        }
    }
}

#[tokio::test]
async fn recovery_with_nothing_known_and_nothing_there_is_fine() {
    let bench = Bench::new();
    for isolator in every(&bench.deps) {
        isolator.recover(&[]).await.unwrap_or_else(|e| panic!("{}: {e}", isolator.name()));
    }
}

#[tokio::test]
async fn prepare_is_deterministic_and_leaves_nothing_after_cleanup() {
    let bench = ordinary();
    for isolator in every(&bench.deps) {
        let name = isolator.name();
        let first = bench.prepare_sandbox(&*isolator).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(bench.prepare_sandbox(&*isolator).await.unwrap(), first, "{name}");
        let first = bench.prepare(&*isolator).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(bench.prepare(&*isolator).await.unwrap(), first, "{name}");
        isolator.cleanup(&bench.pod_id, &bench.pod, Some(&bench.id)).await.unwrap();
        isolator.cleanup(&bench.pod_id, &bench.pod, None).await.unwrap();
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(bench.path().to_str().unwrap()), "{mounts}");
}

#[tokio::test]
async fn all_together_merge_into_one_plan() {
    let bench = ordinary();
    let all = Isolators::build(&default_isolation(), &toml::Table::new(), &bench.deps).unwrap();
    let sandbox = all.prepare(&Cx { pod_id: &bench.pod_id, pod: &bench.pod, container: None }).await.unwrap();
    assert_eq!(sandbox.spec.hostname().as_deref(), Some("web-0"));
    assert!(sandbox.spec.process().is_none() && sandbox.spec.mounts().is_none());
    let plan = all.prepare(&Cx { pod_id: &bench.pod_id, pod: &bench.pod, container: Some(bench.cx()) }).await.unwrap();
    assert_eq!(plan.spec.process().as_ref().unwrap().args().as_deref(), Some(&["/bin/true".to_owned()][..]));
    let json = serde_json::to_string(&plan.spec).unwrap();
    assert_eq!(serde_json::from_str::<oci_spec::runtime::Spec>(&json).unwrap(), plan.spec);
    assert!(all.cleanup(&bench.pod_id, &bench.pod, Some(&bench.id)).await.is_empty());
    assert!(all.cleanup(&bench.pod_id, &bench.pod, None).await.is_empty());
}

#[test]
fn build_says_what_is_wrong_with_a_list() {
    let bench = Bench::new();
    let build = |list: &[&str], config: &str| {
        let list: Vec<_> = list.iter().map(|n| (*n).to_owned()).collect();
        Isolators::build(&list, &config.parse().unwrap(), &bench.deps).map(|all| all.names()).map_err(|e| e.to_string())
    };
    // Whole names only: neither a part of one nor a longer one.
    for bad in ["linux", "filesystem/linux2", "", "linux/nnp "] {
        let error = build(&[bad], "").unwrap_err();
        assert!(error.contains(&format!("{bad:?}")) && error.contains("filesystem/linux,"), "{error}");
    }
    let error = build(&["docker/runtime"], "").unwrap_err();
    assert!(error.contains("docker/runtime") && error.contains("filesystem/linux"), "{error}");
    assert!(build(&["linux/nnp", "linux/nnp"], "").unwrap_err().contains("twice"));
    assert!(build(&["linux/nnp"], "[\"linux/nnp\"]\nx = 1").unwrap_err().contains('x'));
    assert!(build(&["linux/nnp"], "[\"linux/typo\"]\nx = 1").unwrap_err().contains("linux/typo"));
    assert!(build(&["linux/nnp"], "\"linux/nnp\" = 1").unwrap_err().contains("not a table"));
    assert_eq!(build(&["docker/runtime", "linux/nnp", "filesystem/linux"], "").unwrap(), ["filesystem/linux", "docker/runtime", "linux/nnp"]);
}
