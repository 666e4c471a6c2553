//! Rot in the image store: found, kept away from containers, mended from where it came, without touching what runs.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod steps;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesocri::disk::Layout;
use mesocri::model::error::{Kind, Result};
use mesocri::model::image::{FsUsage, RootFs};
use mesocri::provisioner::scrub::{Fate, Report, Request};
use mesocri::provisioner::{Config, Images as _, Provisioner, PullRequest, Upkeep as _, usage};
use steps::Registry;
use tokio_util::sync::CancellationToken;

struct Bench {
    registry: Registry,
    layout: Layout,
    store: Arc<Provisioner>,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn new(backend: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        let store = open(&layout, backend).await;
        Self { registry: Registry::start(dir.path()), layout, store, _dir: dir }
    }

    async fn pull(&self, image: usize) {
        let request = PullRequest { reference: self.registry.reference(image), credentials: None, cached: false };
        self.store.pull(request, None, CancellationToken::new()).await.unwrap();
    }

    async fn create(&self, container: &str, image: usize) -> Result<RootFs> {
        let image = self.store.list().into_iter().find(|i| i.id.as_str() == self.registry.id(image)).unwrap();
        self.store.provision(container, &image).await
    }

    async fn scrub(&self, repair: bool) -> Report {
        self.store.scrub(Request { repair }).await.unwrap()
    }

    /// A file of the image's second layer, which no other image here has.
    fn file(&self, image: usize) -> PathBuf {
        let layer = self.layout.layer(&self.registry.layers(image)[1].parse().unwrap());
        let top = layer.join("fs");
        if !top.is_dir() {
            return layer.join("fs.erofs");
        }
        let dir = std::fs::read_dir(&top).unwrap().map(|e| e.unwrap().path()).find(|p| p.is_dir()).unwrap();
        dir.join("f0")
    }

    async fn check_df(&self) {
        let report = self.store.df().await.unwrap();
        assert_eq!((report.total, report.unexplained), (usage::count(&self.layout.store()).unwrap(), FsUsage::default()), "{:#?}", report.parts);
    }
}

async fn open(layout: &Layout, backend: &str) -> Arc<Provisioner> {
    Provisioner::open(Config { backend: backend.to_owned(), ..Config::default() }, layout.clone()).await.unwrap()
}

/// One bit, in the middle, and nothing else: the times stay.
fn rot(path: &Path) {
    let mtime = std::fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(path, bytes).unwrap();
    std::fs::File::options().write(true).open(path).unwrap().set_modified(mtime).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rot_is_found_kept_away_and_mended() {
    let mut bench = Bench::new("overlay").await;
    bench.pull(2).await;
    bench.pull(5).await;
    bench.create("before", 2).await.unwrap();
    bench.create("other", 5).await.unwrap();
    let clean = bench.scrub(false).await;
    assert!(clean.checked >= 5 && clean.bytes > 0 && clean.damaged.is_empty() && clean.unverifiable.is_empty(), "{clean:?}");
    let file = bench.file(2);
    // What a running container has: the layer's directory, by its inode and not by its name.
    let running = std::fs::File::open(file.parent().unwrap()).unwrap();
    let layer = bench.registry.layers(2)[1].clone();
    rot(&file);
    let report = bench.scrub(false).await;
    let [finding] = report.damaged.as_slice() else { panic!("{report:?}") };
    assert_eq!((finding.layer.as_str(), finding.fate.clone()), (layer.as_str(), Fate::Marked));
    assert_eq!(finding.images, [bench.registry.reference(2).to_string()]);
    assert_eq!(finding.containers, ["before"]);
    // Nothing starts from it, not even after a restart; everything else does.
    for restarted in [false, true] {
        if restarted {
            bench.store = open(&bench.layout, "overlay").await;
        }
        for error in [bench.create("new", 2).await.unwrap_err(), bench.store.check_container("before").unwrap_err()] {
            assert_eq!(error.kind, Kind::DataLoss);
            assert!(error.to_string().contains(&layer) && error.to_string().contains(&bench.registry.id(2)), "{error}");
        }
        bench.store.check_container("other").unwrap();
        bench.check_df().await;
    }
    // Just that layer is fetched.
    bench.registry.forget_requests();
    let report = bench.scrub(true).await;
    assert_eq!(report.damaged[0].fate, Fate::Repaired, "{report:?}");
    let fetched: Vec<String> = bench.registry.requests().into_iter().filter(|r| bench.registry.layers(2).iter().any(|l| r.ends_with(l.as_str()))).collect();
    assert_eq!(fetched, [format!("/v2/i2/blobs/{layer}")]);
    bench.create("new", 2).await.unwrap();
    assert!(bench.scrub(false).await.damaged.is_empty());
    // Who ran from the bad one still has its files, and must be made anew to start again.
    let inside = PathBuf::from(format!("/proc/self/fd/{}/f0", std::os::fd::AsRawFd::as_raw_fd(&running)));
    assert!(inside.exists());
    assert!(bench.store.check_container("before").unwrap_err().to_string().contains("made anew"));
    bench.check_df().await;
    bench.store = open(&bench.layout, "overlay").await;
    bench.store.recover(&["before", "other", "new"].map(str::to_owned)).await.unwrap();
    assert!(inside.exists(), "a restart took a running container's files");
    bench.store.check_container("new").unwrap();
    bench.store.release("before").await.unwrap();
    assert!(!inside.exists(), "nobody uses it any more");
    assert_eq!(std::fs::read_dir(bench.layout.damaged()).unwrap().count(), 0);
    bench.check_df().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_from_archives_are_mended_by_loading_them() {
    let bench = Bench::new("copy").await;
    bench.store.load(&bench.registry.archive(3)).await.unwrap();
    rot(&bench.file(3));
    let report = bench.scrub(true).await;
    assert!(matches!(&report.damaged[0].fate, Fate::Unrepaired(why) if why.contains("archives")), "{report:?}");
    assert!(bench.create("c", 3).await.is_err());
    bench.store.load(&bench.registry.archive(3)).await.unwrap();
    bench.create("c", 3).await.unwrap();
    assert!(bench.scrub(false).await.damaged.is_empty());
    // Nobody ran from the bad one.
    bench.store.remove(&bench.registry.id(3)).await.unwrap();
    assert_eq!(std::fs::read_dir(bench.layout.damaged()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_whole_again_is_used_again() {
    let bench = Bench::new("overlay").await;
    bench.pull(1).await;
    let file = bench.file(1);
    rot(&file);
    assert_eq!(bench.scrub(false).await.damaged.len(), 1);
    // The same bit once more.
    rot(&file);
    assert!(bench.scrub(false).await.damaged.is_empty());
    bench.create("c", 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_the_version_before_opens() {
    let bench = Bench::new("overlay").await;
    bench.pull(1).await;
    bench.create("c", 1).await.unwrap();
    // Its records lack what this version added.
    let strip = |path: &Path, keys: &[&str]| {
        let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for key in keys {
            assert!(value["record"].as_object_mut().unwrap().remove(*key).is_some(), "{key} in {value}");
        }
        std::fs::write(path, value.to_string()).unwrap();
    };
    for entry in std::fs::read_dir(bench.layout.layers()).unwrap() {
        strip(&entry.unwrap().path().join("layer.json"), &["content", "form", "marks"]);
    }
    strip(&bench.layout.leases().join("c.json"), &["made"]);
    let store = open(&bench.layout, "overlay").await;
    store.recover(&["c".to_owned()]).await.unwrap();
    let bench = Bench { store, ..bench };
    assert_eq!(bench.store.list().len(), 1);
    bench.store.check_container("c").unwrap();
    bench.create("d", 1).await.unwrap();
    let report = bench.scrub(false).await;
    assert_eq!((report.unverifiable.len(), report.damaged.len()), (report.checked, 0));
}
