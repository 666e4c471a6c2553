//! Power cuts. A disk that remembers every write and flush carries the store through some time of pulls, imports, removals and
//! collections; then the disk is taken back to one moment after the other, as a power cut would have left it, mounted, and the
//! store opened on it. Whatever was acknowledged before is whole; everything else is gone; nothing is fetched again.
//!
//! `CUT_COUNT=500` makes that many cuts on each file system instead of some dozen, `CUT_SEED=n` repeats a run.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cuts;
mod device;
#[path = "../steps/mod.rs"]
mod steps;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesocri::disk::Layout;
use mesocri::model::image::FsUsage;
use mesocri::provisioner::scrub::Request as Scrub;
use mesocri::provisioner::{Images as _, Provisioner, Upkeep as _, usage};

use cuts::{Random, Replay};
use device::{Content, Device, Entry};
use steps::{IMAGES, Registry};
use work::{Done, Promise};

/// Cuts without `CUT_COUNT`.
const CUTS: usize = 24;
/// Steps of the store while the disk is recorded.
const ACTS: usize = 60;
/// A start that takes longer than this does what no start should, however busy the machine is.
const START_WITHIN: Duration = Duration::from_secs(20);
/// Every so many cuts the file system's own checker looks, too: it would say if the cuts were ones that no disk makes.
const CHECK_EVERY: usize = 8;

/// A file system that nobody uses any more lets go of its device within this.
const RELEASE_WITHIN: Duration = Duration::from_secs(20);

/// A file system to try.
struct Fs {
    size: u64,
    mkfs: &'static [&'static str],
    options: &'static str,
    /// Says by its status whether the file system is consistent, without repairing anything.
    check: &'static [&'static str],
}

const EXT4: Fs = Fs { size: 256 << 20, mkfs: &["mkfs.ext4", "-q", "-F"], options: "loop", check: &["e2fsck", "-f", "-n"] };
const XFS: Fs = Fs { size: 300 << 20, mkfs: &["mkfs.xfs", "-q", "-f"], options: "loop,nouuid", check: &["xfs_repair", "-n"] };
const BTRFS: Fs = Fs { size: 256 << 20, mkfs: &["mkfs.btrfs", "-q", "-f"], options: "loop,nodiscard", check: &["btrfs", "check", "--readonly"] };

/// What happened on the disk.
struct Recording {
    size: u64,
    content: Content,
    log: Vec<Entry>,
    history: Vec<Done>,
}

/// Where everything of one test lies.
struct Bench {
    dir: PathBuf,
    on: PathBuf,
    registry: Registry,
    backend: &'static str,
    /// Every layer as it must be, by the name of its directory.
    layers: BTreeMap<String, String>,
}

fn run(command: &mut Command) {
    attempt(command).unwrap_or_else(|e| panic!("{e}"));
}

fn attempt(command: &mut Command) -> Result<(), String> {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure(out.status.success(), || format!("{command:?}: {}\n{}{}", out.status, text(&out.stdout), text(&out.stderr)))
}

/// Unmounts, and waits until the file system has let go of the loop device over `image`: overlays that are being cleared away hold it
/// a moment longer than the mount.
fn unmount(on: &Path, image: &Path) {
    nix::mount::umount2(on, nix::mount::MntFlags::empty()).unwrap();
    let image = image.to_str().unwrap();
    let held = || {
        let loops = std::fs::read_dir("/sys/block").unwrap().flatten().map(|e| e.path().join("loop/backing_file"));
        loops.filter_map(|file| std::fs::read_to_string(file).ok()).any(|backing| backing.trim_end() == image)
    };
    let began = Instant::now();
    while held() {
        assert!(began.elapsed() < RELEASE_WITHIN, "{image} is still in use");
        nix::poll::poll(&mut [], nix::poll::PollTimeout::from(1u8)).unwrap();
    }
}

/// Everything that can be said of a tree, in order of names.
fn describe(path: &Path, name: &str, out: &mut String) {
    use std::fmt::Write as _;
    let meta = std::fs::symlink_metadata(path).unwrap();
    let links = if meta.is_dir() { 0 } else { meta.nlink() };
    let content = match meta.file_type() {
        t if t.is_symlink() => std::fs::read_link(path).unwrap().display().to_string(),
        t if t.is_file() => mesocri::provisioner::unpack::Hasher::of(&std::fs::read(path).unwrap()[..], None).unwrap().to_string(),
        _ => String::new(),
    };
    let mtime = if name.is_empty() { 0 } else { meta.mtime() };
    writeln!(out, "{name} {:o} {}:{} {links} {mtime} {content}", meta.mode(), meta.uid(), meta.gid()).unwrap();
    if meta.is_dir() {
        let mut names: Vec<_> = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names.iter().for_each(|n| describe(&path.join(n), &format!("{name}/{n}"), out));
    }
}

/// The layers of a store.
fn describe_layers(layout: &Layout) -> BTreeMap<String, String> {
    names(&layout.layers())
        .into_iter()
        .map(|name| {
            let mut text = String::new();
            let dir = layout.layers().join(&name);
            // The record beside the files counts blocks, which is up to the file system.
            for files in names(&dir).iter().filter(|n| *n != "layer.json") {
                describe(&dir.join(files), "", &mut text);
            }
            (name, text)
        })
        .collect()
}

fn names(dir: &Path) -> BTreeSet<String> {
    std::fs::read_dir(dir).map(|d| d.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()).unwrap_or_default()
}

impl Bench {
    fn new(dir: &Path, backend: &'static str) -> Self {
        let registry = Registry::start(dir);
        let on = dir.join("on");
        std::fs::create_dir(&on).unwrap();
        let layout = Layout::new(dir.join("pristine/root"), dir.join("pristine/state"));
        let layers = runtime().block_on(async {
            let store = work::open(&layout, backend).await.unwrap();
            for image in 0..IMAGES {
                work::pull(&store, &registry, image).await.unwrap();
            }
            describe_layers(&layout)
        });
        Self { dir: dir.to_owned(), on, registry, backend, layers }
    }

    fn mount(&self, fs: &Fs, image: &Path) -> Result<(), String> {
        attempt(Command::new("mount").args(["-o", fs.options]).arg(image).arg(&self.on))
    }

    /// Works for a while on a fresh file system. The calls in `ignored` do nothing; with `noise`, a neighbour on the same file
    /// system makes it write out everything at moments of its own.
    fn record(&self, fs: &Fs, ignored: &'static [&'static str], noise: bool) -> Recording {
        let image = self.dir.join("image");
        std::fs::File::create(&image).unwrap().set_len(fs.size).unwrap();
        run(Command::new(fs.mkfs[0]).args(&fs.mkfs[1..]).arg(&image));
        let content = Content::of(&image);
        std::fs::remove_file(&image).unwrap();
        let device = Device::serve(&self.dir.join("device"), fs.size, content.clone());
        self.mount(fs, &device.path).unwrap();
        let (root, stop) = (self.on.join("root"), AtomicBool::new(false));
        let history = std::thread::scope(|scope| {
            scope.spawn(|| noise.then(|| neighbour(&self.on.join("neighbour"), &stop)));
            let worker = scope.spawn(|| {
                without(ignored);
                runtime().block_on(work::work(&root, &self.dir, &self.registry, self.backend, ACTS, || device.position()))
            });
            let history = worker.join();
            stop.store(true, Ordering::Relaxed);
            history.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        unmount(&self.on, &device.path);
        Recording { size: fs.size, content, log: device.finish(), history }
    }

    /// Cuts the power `count` times; gives the failures, and how long the starts took.
    fn cut(&self, fs: &Fs, recording: &Recording, count: usize, seed: u64) -> (Vec<String>, Vec<Duration>) {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let image = self.dir.join("image");
        let mut replay = Replay::new(&recording.log, recording.size, recording.content.clone());
        let (mut failures, mut starts) = (Vec::new(), Vec::new());
        let promised: Vec<usize> = recording.history.iter().map(|d| d.to).collect();
        let chosen = cuts::choose(&recording.log, recording.history[0].from + 1, &promised, count, &mut random);
        for (n, cut) in chosen.into_iter().enumerate() {
            replay.cut(cut, &image, &mut random);
            let promise = work::promise(&recording.history, cut.at);
            // What a file system does not survive says nothing of the store: then these are not the cuts of a disk.
            self.mount(fs, &image).unwrap_or_else(|e| panic!("{cut:?}: {e}"));
            match runtime().block_on(self.check(&promise, &mut random)) {
                Ok(start) => starts.push(start),
                Err(e) => failures.push(format!("{cut:?}, {}: {e}", promise.what)),
            }
            unmount(&self.on, &image);
            if n.is_multiple_of(CHECK_EVERY) {
                attempt(Command::new(fs.check[0]).args(&fs.check[1..]).arg(&image)).unwrap_or_else(|e| panic!("{cut:?}: {e}"));
            }
            std::fs::remove_file(&image).unwrap();
        }
        (failures, starts)
    }

    /// What a daemon finds after a cut. Tells how long its start took.
    async fn check(&self, promise: &Promise, random: &mut Random) -> Result<Duration, String> {
        let state = tempfile::tempdir_in(&self.dir).unwrap();
        let layout = Layout::new(self.on.join("root"), state.path());
        let began = Instant::now();
        let store = work::open(&layout, self.backend).await.map_err(|e| e.to_string())?;
        // Containers do not outlive the machine.
        store.recover(&[]).await.map_err(|e| e.to_string())?;
        let start = began.elapsed();
        ensure(start < START_WITHIN, || format!("the start took {start:?}"))?;
        let found = work::state(&store, &self.registry);
        let same = |what: &str, a: &BTreeSet<usize>, b: &BTreeSet<usize>| ensure(a.is_subset(b), || format!("{what}: {a:?} are not in {b:?}; {promise:?}"));
        same("acknowledged and gone", &promise.there, &found.present)?;
        same("gone and there", &found.present, &promise.possible)?;
        same("acknowledged and without its name", &promise.named, &found.named)?;
        let moving = store.resolve(&work::moving_name(&self.registry)).map(|i| i.id.to_string());
        let may: Vec<String> = promise.moving.iter().map(|i| self.registry.id(*i)).collect();
        ensure(may.is_empty() || moving.as_ref().is_some_and(|m| may.contains(m)), || format!("the name that moves finds {moving:?}; {promise:?}"))?;
        self.whole(&store, &layout, &found.present).await?;
        self.works(&store, &layout, &found.present, random).await?;
        Ok(start)
    }

    /// Nothing but these images is there, and of them everything.
    async fn whole(&self, store: &Provisioner, layout: &Layout, images: &BTreeSet<usize>) -> Result<(), String> {
        let expected: BTreeSet<String> = images.iter().flat_map(|i| self.registry.layers(*i)).map(|id| id[7..39].to_owned()).collect();
        let layers = describe_layers(layout);
        let there: BTreeSet<String> = layers.keys().cloned().collect();
        ensure(there == expected, || format!("layers {there:?} instead of {expected:?}"))?;
        for (name, text) in &layers {
            ensure(self.layers[name] == *text, || format!("layer {name} is\n{text}instead of\n{}", self.layers[name]))?;
        }
        for dir in [layout.staging(), layout.rootfs_all(), layout.leases(), layout.damaged()] {
            ensure(names(&dir).is_empty(), || format!("left in {}: {:?}", dir.display(), names(&dir)))?;
        }
        // What a container held is not promised; records of images and layers are never half written.
        let lost: Vec<String> =
            names(&layout.quarantine()).into_iter().filter(|n| !n.split('-').nth(1).is_some_and(|n| n.starts_with('c') && n.len() < 12)).collect();
        ensure(lost.is_empty(), || format!("quarantined: {lost:?}"))?;
        let scrub = store.scrub(Scrub::default()).await.map_err(|e| e.to_string())?;
        ensure(scrub.damaged.is_empty() && scrub.unverifiable.is_empty() && scrub.checked == expected.len(), || format!("{scrub:?}"))?;
        let report = store.df().await.map_err(|e| e.to_string())?;
        let disk = usage::count(&layout.store()).unwrap();
        ensure(report.total == disk && report.unexplained == FsUsage::default(), || format!("{disk:?} on disk, {report:#?}"))
    }

    /// What is there needs no fetching, and life goes on.
    async fn works(&self, store: &Provisioner, layout: &Layout, images: &BTreeSet<usize>, random: &mut Random) -> Result<(), String> {
        let told = |e: mesocri::model::Error| e.to_string();
        for image in images {
            self.registry.forget_requests();
            work::pull(store, &self.registry, *image).await.map_err(told)?;
            let fetched: Vec<_> = self.registry.requests().into_iter().filter(|r| self.registry.layers(*image).iter().any(|l| r.ends_with(l))).collect();
            ensure(fetched.is_empty(), || format!("fetched again: {fetched:?}"))?;
        }
        let image = random.below(IMAGES);
        work::pull(store, &self.registry, image).await.map_err(told)?;
        let listed = store.resolve(&self.registry.id(image)).ok_or("pulled and not there")?;
        let rootfs = store.provision("after", &listed).await.map_err(told)?;
        if self.backend != "erofs" {
            for (path, content) in self.registry.files(image) {
                let found = rootfs.lookup.iter().find_map(|dir| std::fs::read(dir.join(&path)).ok());
                ensure(found.as_deref() == Some(content.as_bytes()), || format!("{path} of image {image}"))?;
            }
        }
        store.release("after").await.map_err(told)?;
        store.remove(&self.registry.id(image)).await.map_err(told)?;
        let mut left = images.clone();
        left.remove(&image);
        self.whole(store, layout, &left).await
    }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// From here on these calls of this thread, and of those it starts, succeed without doing anything.
fn without(calls: &[&str]) {
    use libseccomp::{ScmpAction, ScmpFilterContext, ScmpSyscall};
    if calls.is_empty() {
        return;
    }
    let mut filter = ScmpFilterContext::new(ScmpAction::Allow).unwrap();
    for call in calls {
        filter.add_rule(ScmpAction::Errno(0), ScmpSyscall::from_name(call).unwrap()).unwrap();
    }
    filter.load().unwrap();
}

/// Somebody else on the same file system, whose syncs take along whatever happens to be half done.
fn neighbour(dir: &Path, stop: &AtomicBool) {
    use std::io::Write as _;
    let mut random = Random(7);
    std::fs::create_dir(dir).unwrap();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let mut file = std::fs::File::create(dir.join((n % 50).to_string())).unwrap();
        file.write_all(&vec![7; random.below(9000)]).unwrap();
        file.sync_all().unwrap();
        // When it comes is the test's input, not a wait for anything.
        std::thread::sleep(Duration::from_micros(random.below(8000) as u64));
    }
}

/// Runs in a thread with a mount namespace, in a directory in memory: the disk's content goes there and back many times.
fn private(work: impl FnOnce(&Path) + Send) {
    let memory = Path::new("/dev/shm");
    let builder = &mut tempfile::Builder::new();
    builder.prefix("mesocri-cut-");
    let dir = if memory.is_dir() { builder.tempdir_in(memory).unwrap() } else { builder.tempdir().unwrap() };
    std::thread::scope(|scope| {
        let run = || {
            use nix::mount::{MsFlags, mount};
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            work(dir.path());
        };
        scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |n| n.parse().unwrap())
}

/// Records, cuts, and expects no failure.
fn survives(fs: &Fs, backend: &'static str) {
    let seed = number("CUT_SEED", 1) as u64;
    println!("CUT_SEED={seed}");
    private(|dir| {
        let bench = Bench::new(dir, backend);
        let recording = bench.record(fs, &[], true);
        let flushes = recording.log.iter().filter(|e| matches!(e, Entry::Flush)).count();
        println!("{} writes and {flushes} flushes in {ACTS} acts", recording.log.len() - flushes);
        assert!(flushes > ACTS, "the recording is not one of a store that syncs");
        let began = Instant::now();
        let (failures, mut starts) = bench.cut(fs, &recording, number("CUT_COUNT", CUTS), seed);
        starts.sort();
        println!("{} cuts survived in {:?}; a start took {:?}, at most {:?}", starts.len(), began.elapsed(), starts.get(starts.len() / 2), starts.last());
        assert!(failures.is_empty(), "{} cuts were not survived:\n{}", failures.len(), failures.join("\n"));
    });
}

/// A store whose promises are empty must be found out, or the test proves nothing.
fn found_out(ignored: &'static [&'static str]) {
    private(|dir| {
        let bench = Bench::new(dir, "overlay");
        let recording = bench.record(&EXT4, ignored, false);
        let (failures, starts) = bench.cut(&EXT4, &recording, CUTS, 1);
        println!("without {ignored:?}: {} cuts fail, {} do not; the first: {:?}", failures.len(), starts.len(), failures.first());
        assert!(!failures.is_empty(), "{CUTS} cuts are survived without {ignored:?}");
    });
}

#[test]
fn ext4_with_overlay() {
    survives(&EXT4, "overlay");
}

#[test]
fn ext4_with_erofs() {
    survives(&EXT4, "erofs");
}

#[test]
fn xfs_with_overlay() {
    survives(&XFS, "overlay");
}

#[test]
fn btrfs_with_overlay() {
    survives(&BTRFS, "overlay");
}

#[test]
fn a_store_that_does_not_sync_its_file_system_is_found_out() {
    found_out(&["syncfs"]);
}

#[test]
fn a_store_that_does_not_sync_its_records_is_found_out() {
    found_out(&["fsync", "fdatasync"]);
}
