//! Random steps on an image store: pulls, imports, root filesystems, removals, collections, plans, kills with SIGKILL at fail
//! points and at random moments, restarts. After every step no root filesystem has lost a file and nothing unreferenced is
//! left; after every hundred each byte on disk has a name.
//!
//! `GC_STEPS=10000` runs that many steps instead of some hundred, `GC_SEED=n` repeats a run.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod steps;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mesocri::disk::Layout;
use mesocri::model::error::Kind;
use mesocri::model::image::{FsUsage, RootFs};
use mesocri::provisioner::gc::{Gc, Goal, Request};
use mesocri::provisioner::{Config, Images as _, Provisioner, PullRequest, Upkeep as _};
use steps::{IMAGES, Registry};
use tokio_util::sync::CancellationToken;

/// Set for the child that dies: backend, step, argument, separated by blanks.
const CHILD: &str = "GC_CHILD";
/// Root of the child's store.
const CHILD_ROOT: &str = "GC_CHILD_ROOT";
/// More containers than this are not made.
const MAX_CONTAINERS: usize = 12;

/// xorshift64*: small, seeded, the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap() % n
    }
}

/// What changes the store; the numbers are images, or a container's.
#[derive(Clone, Debug)]
enum Act {
    Pull(usize),
    Load(usize),
    Create(String, usize),
    Release(String),
    Remove(usize),
    Prune,
    Free(u64),
}

impl Act {
    fn text(&self) -> String {
        match self {
            Self::Pull(i) => format!("pull {i}"),
            Self::Load(i) => format!("load {i}"),
            Self::Create(c, i) => format!("create {c} {i}"),
            Self::Release(c) => format!("release {c}"),
            Self::Remove(i) => format!("remove {i}"),
            Self::Prune => "prune".into(),
            Self::Free(n) => format!("free {n}"),
        }
    }

    /// Where it can die.
    fn points(&self) -> &'static [&'static str] {
        match self {
            Self::Pull(_) | Self::Load(_) => &["pull.unpacked", "pull.layers-synced", "pull.layers-in", "pull.committed"],
            Self::Create(..) => &["provision.built"],
            Self::Release(_) => &["release.files-gone", "gc.layers-moved"],
            Self::Remove(_) | Self::Prune | Self::Free(_) => &["remove.record-gone", "gc.records-synced", "gc.layers-moved"],
        }
    }

    fn parse(text: &str) -> Self {
        let words: Vec<&str> = text.split(' ').collect();
        match words.as_slice() {
            ["pull", i] => Self::Pull(i.parse().unwrap()),
            ["load", i] => Self::Load(i.parse().unwrap()),
            ["create", c, i] => Self::Create((*c).to_owned(), i.parse().unwrap()),
            ["release", c] => Self::Release((*c).to_owned()),
            ["remove", i] => Self::Remove(i.parse().unwrap()),
            ["prune"] => Self::Prune,
            ["free", n] => Self::Free(n.parse().unwrap()),
            other => panic!("{other:?}"),
        }
    }
}

async fn perform(store: &Provisioner, registry: &Registry, act: &Act) -> Result<Option<RootFs>, mesocri::model::Error> {
    match act {
        Act::Pull(i) => {
            let request = PullRequest { reference: registry.reference(*i), credentials: None, cached: false };
            store.pull(request, None, CancellationToken::new()).await?;
        }
        Act::Load(i) => {
            store.load(&registry.archive(*i)).await?;
        }
        Act::Create(container, i) => {
            let image = store.list().into_iter().find(|image| image.id.as_str() == registry.id(*i)).expect("the image is listed");
            return store.provision(container, &image).await.map(Some);
        }
        Act::Release(container) => store.release(container).await?,
        Act::Remove(i) => store.remove(&registry.id(*i)).await?,
        Act::Prune => drop(store.collect(Request::new(Goal::Everything)).await?),
        Act::Free(bytes) => drop(store.collect(Request::new(Goal::Free(FsUsage { bytes: *bytes, inodes: 0 }))).await?),
    }
    Ok(None)
}

async fn open(layout: &Layout, registry: &Registry, backend: &str) -> Arc<Provisioner> {
    let gc = Gc { excluded_images: vec![registry.reference(1).to_string()], min_age_seconds: 0, ..Gc::default() };
    let config = Config { backend: backend.to_owned(), gc, pinned: vec![registry.reference(0).to_string()], ..Config::default() };
    Provisioner::open(config, layout.clone()).await.unwrap()
}

struct Run {
    random: Random,
    registry: Registry,
    layout: Layout,
    store: Option<Arc<Provisioner>>,
    present: BTreeSet<usize>,
    containers: BTreeMap<String, (usize, RootFs)>,
    next: usize,
    deaths: usize,
    tally: BTreeMap<&'static str, usize>,
}

impl Run {
    async fn new(dir: &Path, seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        random.below(2);
        let registry = Registry::start(dir);
        let layout = Layout::new(dir.join("root"), dir.join("state"));
        let mut run =
            Self { random, registry, layout, store: None, present: BTreeSet::new(), containers: BTreeMap::new(), next: 0, deaths: 0, tally: BTreeMap::new() };
        run.reopen().await;
        run
    }

    fn store(&self) -> &Arc<Provisioner> {
        self.store.as_ref().unwrap()
    }

    fn backend(&mut self) -> &'static str {
        ["overlay", "overlay", "copy"][self.random.below(3)]
    }

    async fn reopen(&mut self) {
        self.store = None;
        let backend = self.backend();
        let store = open(&self.layout, &self.registry, backend).await;
        let known: Vec<String> = self.containers.keys().cloned().collect();
        store.recover(&known).await.unwrap();
        self.store = Some(store);
    }

    fn pick_container(&mut self) -> Option<String> {
        let n = self.containers.len().max(1);
        let n = self.random.below(n);
        self.containers.keys().nth(n).cloned()
    }

    fn act(&mut self) -> Act {
        let image = self.random.below(IMAGES);
        match self.random.below(20) {
            0..=4 => Act::Pull(image),
            5 => Act::Load(image),
            6..=10 if self.containers.len() < MAX_CONTAINERS && !self.present.is_empty() => {
                let n = self.random.below(self.present.len());
                self.next += 1;
                Act::Create(format!("c{}", self.next), *self.present.iter().nth(n).unwrap())
            }
            6..=13 => self.pick_container().map_or(Act::Pull(image), Act::Release),
            14..=16 => Act::Remove(image),
            17 => Act::Prune,
            _ => Act::Free(1 + self.random.below(200_000) as u64),
        }
    }

    /// What may be there after `act`: images that must be, images that must not.
    fn settle(&mut self, act: &Act, survived: bool, what: &str) {
        let listed: BTreeSet<usize> = (0..IMAGES).filter(|i| self.store().list().iter().any(|l| l.id.as_str() == self.registry.id(*i))).collect();
        assert_eq!(listed.len(), self.store().list().len(), "{what}: an image nobody asked for");
        let in_use: HashSet<usize> = self.containers.values().map(|(image, _)| *image).collect();
        for i in 0..IMAGES {
            let (was, is) = (self.present.contains(&i), listed.contains(&i));
            let changed_by_it = match act {
                Act::Pull(n) | Act::Load(n) => *n == i && is,
                Act::Remove(n) => *n == i && !is,
                // Pinned and excluded ones, and those that containers run from, are never collected.
                Act::Prune | Act::Free(_) => !is && i > 1 && !in_use.contains(&i),
                Act::Create(..) | Act::Release(_) => false,
            };
            assert!(was == is || changed_by_it, "{what}: image {i} was {was} is {is}");
        }
        if survived {
            match act {
                Act::Pull(i) | Act::Load(i) => assert!(listed.contains(i), "{what}: acknowledged and gone"),
                Act::Remove(i) => assert!(!listed.contains(i), "{what}: removed and there"),
                Act::Prune => {
                    let left: Vec<_> = listed.iter().filter(|i| **i > 1 && !in_use.contains(i)).collect();
                    assert!(left.is_empty(), "{what}: unused and there: {left:?}");
                }
                _ => {}
            }
        }
        self.present = listed;
    }

    async fn step(&mut self, n: usize) {
        let act = self.act();
        let what = format!("step {n} {act:?}");
        match self.random.below(10) {
            0 => {
                *self.tally.entry("restart").or_default() += 1;
                self.reopen().await;
            }
            1 => {
                *self.tally.entry("killed").or_default() += 1;
                self.killed(&act).await;
                self.settle(&act, false, &what);
            }
            2 => {
                *self.tally.entry("planned").or_default() += 1;
                self.planned(&act, &what).await;
            }
            3 => {
                *self.tally.entry("at once").or_default() += 1;
                self.at_once(&what).await;
            }
            _ => {
                *self.tally.entry("plain").or_default() += 1;
                self.plain(&act, &what).await;
            }
        }
        self.check(&what).await;
    }

    async fn plain(&mut self, act: &Act, what: &str) {
        let made = perform(self.store(), &self.registry, act).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        match (act, made) {
            (Act::Create(container, image), Some(rootfs)) => {
                // What the container writes must stay, too.
                std::fs::write(rootfs.writable.as_ref().unwrap().join("written"), container).unwrap();
                self.containers.insert(container.clone(), (*image, rootfs));
            }
            (Act::Release(container), _) => {
                self.containers.remove(container);
            }
            _ => {}
        }
        self.settle(act, true, what);
    }

    /// The step is done by a process that dies of SIGKILL in the middle; then a new start.
    async fn killed(&mut self, act: &Act) {
        self.store = None;
        let backend = self.backend();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "the_process_that_dies", "--nocapture"]).env(CHILD, format!("{backend} {} {}", self.registry.host, act.text()));
        command.env(CHILD_ROOT, self.layout.root.parent().unwrap()).stdout(Stdio::piped()).stderr(Stdio::null());
        let at_point = self.random.below(2) == 0;
        if at_point {
            let points = act.points();
            command.env("MESOCRI_FAILPOINT", points[self.random.below(points.len())]);
        }
        let mut child = command.spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        if at_point {
            let _ = out.read_to_end(&mut Vec::new());
        } else {
            // The byte says that the store is open; the kill falls somewhere after it.
            let mut seen = Vec::new();
            let mut byte = [0];
            while !seen.ends_with(b"READY") && matches!(out.read(&mut byte), Ok(1)) {
                seen.push(byte[0]);
            }
            // The moment of death is the test's input, not a wait for anything.
            std::thread::sleep(Duration::from_micros(self.random.below(6000) as u64));
            let _ = child.kill();
        }
        let status = child.wait().unwrap();
        self.deaths += usize::from(!status.success());
        if let Act::Release(container) = act {
            // Half released or not: the caller goes on until it is.
            self.containers.remove(container);
        }
        self.reopen().await;
    }

    /// Something happens between plan and apply: it does what it says, or says what changed.
    async fn planned(&mut self, between: &Act, what: &str) {
        let plan = self.store().plan(Request::new(Goal::Everything)).await.unwrap();
        let interfere = self.random.below(2) == 0;
        if interfere {
            self.plain(between, what).await;
        }
        let before = disk(&self.layout.store());
        match self.store().apply(plan.clone()).await {
            Ok(outcome) => {
                let after = disk(&self.layout.store());
                let freed = FsUsage { bytes: before.bytes - after.bytes, inodes: before.inodes - after.inodes };
                assert_eq!((outcome.steps, outcome.freed, freed), (plan.steps.len(), plan.frees, plan.frees), "{what}: {plan:?}");
                self.settle(&Act::Free(0), true, what);
            }
            Err(e) => {
                assert!(interfere && e.kind == Kind::FailedPrecondition, "{what}: {e}");
                assert_eq!(disk(&self.layout.store()), before, "{what}: refused, yet done");
            }
        }
    }

    /// Pulls, a create and a collection at the same time; any order is right as long as what is acknowledged holds.
    async fn at_once(&mut self, what: &str) {
        let store = self.store().clone();
        let (a, b) = (self.random.below(IMAGES), self.random.below(IMAGES));
        let cancel = CancellationToken::new();
        let request = PullRequest { reference: self.registry.reference(a), credentials: None, cached: false };
        let pulls = [Act::Pull(b), Act::Prune, Act::Free(1)];
        let (cancelled, pulled, pruned, freed) = tokio::join!(
            async {
                let pull = store.pull(request, None, cancel.clone());
                cancel.cancel();
                pull.await
            },
            perform(&store, &self.registry, &pulls[0]),
            perform(&store, &self.registry, &pulls[1]),
            perform(&store, &self.registry, &pulls[2]),
        );
        assert!(cancelled.is_ok() || cancelled.is_err_and(|e| e.kind == Kind::Cancelled), "{what}");
        for result in [pulled, pruned, freed] {
            result.unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        self.present = (0..IMAGES).filter(|i| store.list().iter().any(|l| l.id.as_str() == self.registry.id(*i))).collect();
    }

    async fn check(&self, what: &str) {
        for (container, (image, rootfs)) in &self.containers {
            for (path, content) in self.registry.files(*image).into_iter().chain([("written".to_owned(), container.clone())]) {
                let found = rootfs.lookup.iter().find_map(|dir| std::fs::read(dir.join(&path)).ok());
                // A container made by a process that died has not written yet.
                assert_eq!(found.as_deref(), Some(content.as_bytes()), "{what}: {path} of {container} (image {image})");
            }
        }
        let mut layers: BTreeSet<String> = self.present.iter().flat_map(|i| self.registry.layers(*i)).collect();
        layers.extend(self.containers.values().flat_map(|(image, _)| self.registry.layers(*image)));
        let expected: BTreeSet<String> = layers.into_iter().map(|id| id[7..39].to_owned()).collect();
        assert_eq!(names(&self.layout.layers()), expected, "{what}: layers");
        assert_eq!(names(&self.layout.staging()), BTreeSet::new(), "{what}: staging");
        assert_eq!(names(&self.layout.rootfs_all()), self.containers.keys().cloned().collect(), "{what}: root filesystems");
        assert_eq!(names(&self.layout.leases()), self.containers.keys().map(|c| format!("{c}.json")).collect(), "{what}: leases");
        assert_eq!(names(&self.layout.images()).len(), self.present.len(), "{what}: image records");
    }

    async fn check_df(&self, what: &str) {
        let report = self.store().df().await.unwrap();
        assert_eq!(report.total, disk(&self.layout.store()), "{what}: df is not what is on disk");
        assert_eq!(report.unexplained, FsUsage::default(), "{what}: {:#?}", report.parts);
        let sum = report.parts.iter().fold((0, 0), |(b, i), p| (b + p.usage.bytes, i + p.usage.inodes));
        assert_eq!(sum, (report.total.bytes, report.total.inodes), "{what}");
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// What `du` says; written anew so that it shares nothing with what it checks.
fn disk(top: &Path) -> FsUsage {
    fn walk(path: &Path, links: &mut HashSet<u64>, sum: &mut FsUsage) {
        let meta = std::fs::symlink_metadata(path).unwrap();
        if meta.is_dir() || meta.nlink() == 1 || links.insert(meta.ino()) {
            sum.bytes += meta.blocks() * 512;
            sum.inodes += 1;
        }
        if meta.is_dir() {
            std::fs::read_dir(path).unwrap().for_each(|e| walk(&e.unwrap().path(), links, sum));
        }
    }
    let mut sum = FsUsage::default();
    walk(top, &mut HashSet::new(), &mut sum);
    sum
}

/// In memory where possible: thousands of syncs of a shared disk would measure its other users.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let builder = &mut tempfile::Builder::new();
    builder.prefix("mesocri-gc-");
    if memory.is_dir() { builder.tempdir_in(memory).unwrap() } else { builder.tempdir().unwrap() }
}

async fn run(seed: u64, steps: usize) {
    println!("GC_SEED={seed} GC_STEPS={steps}");
    let dir = scratch();
    let mut run = Run::new(dir.path(), seed).await;
    for n in 1..=steps {
        run.step(n).await;
        if n % 100 == 0 {
            run.check_df(&format!("seed {seed} step {n}")).await;
        }
    }
    println!("seed {seed}: {steps} steps, {:?}, {} processes died in the middle", run.tally, run.deaths);
    assert!(steps < 200 || run.deaths > 0, "nobody died: the fail points are not reached");
}

fn steps_or(default: usize) -> usize {
    std::env::var("GC_STEPS").map_or(default, |n| n.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn known_steps() {
    run(1, steps_or(300)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_steps() {
    let seed = std::env::var("GC_SEED").map_or(2, |s| s.parse().unwrap());
    run(seed, steps_or(300)).await;
}

/// Does nothing in a test run; it is what [`Run::killed`] starts.
#[tokio::test(flavor = "multi_thread")]
async fn the_process_that_dies() {
    let (Ok(text), Ok(root)) = (std::env::var(CHILD), std::env::var(CHILD_ROOT)) else { return };
    let (backend, rest) = text.split_once(' ').unwrap();
    let (host, act) = rest.split_once(' ').unwrap();
    let root = Path::new(&root);
    let registry = Registry::at(root, host);
    let store = open(&Layout::new(root.join("root"), root.join("state")), &registry, backend).await;
    println!("READY");
    perform(&store, &registry, &Act::parse(act)).await.unwrap();
}
