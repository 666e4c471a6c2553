//! End to end: the collector as operators, the kubelet and the disk itself set it off. What runs keeps its files, what is pinned
//! or excluded stays, a plan is done as it was shown or refused, and a collection that is killed is finished by the next start.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
mod steps;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Output;

use common::cri::{host_pod, shell};
use common::{BUSYBOX, Node, host};
use mesocri::model::image::FsUsage;
use mesocri::provisioner::gc::{Holder, Outcome, Plan, Subject, df, why};
use mesocri::provisioner::usage;
use mesocri::wire::cri as api;
use steps::{IMAGES, Registry};

/// Writes a line for ever, so that its files are in use.
const RUNS: &str = "while :; do cat /etc/passwd >/dev/null; sleep 0.05; done";

/// A node with an image to run and a registry of others.
struct Bench {
    node: Node,
    registry: Registry,
}

impl Bench {
    /// `config` is made from the registry's host.
    fn start(config: impl FnOnce(&Registry) -> String) -> Self {
        let mut node = Node::prepare("");
        let registry = Registry::start(node.dir.path());
        node.extra_config = config(&registry);
        node.start_daemon(&[]);
        Self { node, registry }
    }

    fn load_busybox(&self) {
        let archive = self.node.dir.path().join("busybox.tar");
        mesocri::daemon::cli::sample::write_archive(&archive, BUSYBOX).unwrap();
        self.node.load(&archive);
    }

    /// A running container from the busybox.
    async fn run(&self) -> String {
        self.load_busybox();
        let config = host_pod(&self.node, "runs");
        let pod = self.node.run_pod(&config).await.unwrap();
        self.node.launch(&pod, &config, &shell("runs", RUNS)).await
    }

    async fn pull(&self, image: usize) {
        self.node.pull_named(&self.registry.reference(image).to_string()).await.unwrap();
    }

    async fn remove(&self, image: &str) {
        let image = Some(api::ImageSpec { image: image.to_owned(), ..Default::default() });
        self.node.images().remove_image(api::RemoveImageRequest { image }).await.unwrap();
    }

    /// Images by number; the busybox is none.
    async fn images(&self) -> BTreeSet<usize> {
        let list = self.node.images().list_images(api::ListImagesRequest::default()).await.unwrap().into_inner().images;
        (0..IMAGES).filter(|i| list.iter().any(|l| l.id == self.registry.id(*i))).collect()
    }

    /// Records on disk, whose images need not be asked for.
    fn records(&self) -> BTreeSet<usize> {
        let names = common::entries(&self.node.root().join("store/images"));
        (0..IMAGES).filter(|i| names.contains(&format!("{}.json", &self.registry.id(*i)[7..]))).collect()
    }

    /// Whether just these are left, and all that went is gone from the disk; beside them `more` with a layer each.
    fn is_down_to(&self, images: &BTreeSet<usize>, more: usize) -> bool {
        let entries = |dir: &str| common::entries(&self.node.root().join("store").join(dir)).len();
        let layers: BTreeSet<String> = images.iter().flat_map(|i| self.registry.layers(*i)).collect();
        self.records() == *images && entries("images") == images.len() + more && entries("layers") == layers.len() + more && entries("staging") == 0
    }

    fn command(&self, args: &[&str]) -> Output {
        let (command, rest) = args.split_at(args.len().min(2));
        let mut all: Vec<&str> = if matches!(command[0], "gc" | "store") { command.to_vec() } else { vec![command[0]] };
        let socket = self.node.socket().display().to_string();
        all.extend(["--address", &socket]);
        all.extend(if matches!(command[0], "gc" | "store") { rest } else { &args[1..] });
        std::process::Command::new(env!("CARGO_BIN_EXE_mesocri")).args(all).output().unwrap()
    }

    fn json<T: serde::de::DeserializeOwned>(&self, args: &[&str]) -> T {
        let out = self.command(args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
    }

    /// Writes a plan to a file.
    fn plan(&self, path: &Path) -> Plan {
        let out = self.command(&["gc", "plan", "--json", "--min-age", "0s"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        std::fs::write(path, &out.stdout).unwrap();
        serde_json::from_slice(&out.stdout).unwrap()
    }

    fn disk(&self) -> FsUsage {
        usage::count(&self.node.root().join("store")).unwrap()
    }

    /// Every byte has a name.
    fn check_df(&self) -> df::Report {
        let report: df::Report = self.json(&["df", "--json"]);
        assert_eq!((report.total, report.unexplained), (self.disk(), FsUsage::default()), "{:#?}", report.parts);
        assert!(!report.parts.iter().any(|p| matches!(p.owner, df::Owner::Debris | df::Owner::Running)), "{:#?}", report.parts);
        report
    }

    /// The container has all its files, and those that nobody read before.
    async fn runs_on(&self, container: &str) {
        let status = self.node.status(container).await.unwrap();
        assert_eq!(status.state, api::ContainerState::ContainerRunning as i32, "{status:?}");
        let (exit, out, err) = self.node.exec(container, "cat /etc/group && ls -l /bin/* | grep -c busybox", 10).await.unwrap();
        assert!(exit == 0 && out.starts_with("root:x:0:\n"), "{exit} {out} {err}");
    }

    async fn finish(self) {
        self.node.remove_all_pods().await;
        self.node.finish();
    }
}

fn numbers<const N: usize>(images: [usize; N]) -> BTreeSet<usize> {
    images.into()
}

/// Numbers of the images that a plan takes.
fn taken(bench: &Bench, plan: &Plan) -> BTreeSet<usize> {
    let ids = plan.steps.iter().filter_map(|s| if let Subject::Image { id, .. } = &s.what { Some(id.as_str()) } else { None });
    ids.map(|id| (0..IMAGES).find(|i| bench.registry.id(*i) == id).expect("an image that may not go")).collect()
}

#[tokio::test(flavor = "current_thread")]
async fn a_plan_is_done_as_it_was_shown_or_refused() {
    let bench = Bench::start(|registry| {
        format!(
            "[provisioner]\npinned = ['{}']\n[provisioner.gc]\nexcluded_images = ['{}*']\n",
            registry.reference(0),
            registry.reference(1).to_string().trim_end_matches(":1").to_owned() + ":"
        )
    });
    let container = bench.run().await;
    for image in 0..5 {
        bench.pull(image).await;
    }
    // What was wanted a moment ago stays unless the operator says otherwise.
    let young: Plan = bench.json(&["gc", "plan", "--json"]);
    assert!(young.steps.is_empty() && young.kept.iter().any(|k| k.holders.iter().any(|h| matches!(h, Holder::Recent(_)))), "{young:?}");

    let file = bench.node.dir.path().join("plan.json");
    let plan = bench.plan(&file);
    assert_eq!(taken(&bench, &plan), numbers([2, 3, 4]));
    let holds = |wanted: &dyn Fn(&Holder) -> bool| plan.kept.iter().any(|k| k.holders.iter().any(wanted));
    assert!(holds(&|h| matches!(h, Holder::Pinned(_))), "{plan:?}");
    assert!(holds(&|h| matches!(h, Holder::Excluded(_))), "{plan:?}");
    assert!(holds(&|h| *h == Holder::Container(container.clone())), "{plan:?}");

    // Who holds what: by path, by digest, by name; a layer that two images share names both.
    let shared = &bench.registry.layers(0)[0];
    let by_digest: Vec<why::Answer> = bench.json(&["why", "--json", shared]);
    let holders = |answers: &[why::Answer]| answers.iter().flat_map(|a| a.holders.clone()).filter(|h| matches!(h, Holder::Image(_))).count();
    assert_eq!(holders(&by_digest), 3, "images 0, 2 and 4: {by_digest:?}");
    let path = bench.node.root().join("store/layers").join(&shared[7..39]).join("fs/common");
    let by_path: Vec<why::Answer> = bench.json(&["why", "--json", &path.display().to_string()]);
    assert_eq!(holders(&by_path), 3, "{by_path:?}");
    assert!(bench.command(&["why", "--json", &container]).status.success());
    assert!(!bench.command(&["why", "sha256:00000000"]).status.success());

    // The world changes between plan and act: nothing is done, and it says what changed.
    bench.pull(3).await;
    bench.remove(&bench.registry.id(2)).await;
    let before = bench.disk();
    let refused = bench.command(&["gc", "apply", &file.display().to_string()]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains(&bench.registry.id(2)) && text.contains("is gone"), "{text}");
    assert_eq!((bench.disk(), bench.images().await), (before, numbers([0, 1, 3, 4])), "refused, yet done");
    bench.check_df();

    let plan = bench.plan(&file);
    let outcome: Outcome = bench.json(&["gc", "apply", "--json", &file.display().to_string()]);
    let after = bench.disk();
    let freed = FsUsage { bytes: before.bytes - after.bytes, inodes: before.inodes - after.inodes };
    assert_eq!((outcome.freed, freed), (plan.frees, plan.frees));
    assert_eq!(bench.images().await, numbers([0, 1]));
    bench.check_df();
    assert!(!bench.command(&["gc", "apply", &file.display().to_string()]).status.success(), "a plan is for once");
    bench.runs_on(&container).await;
    bench.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_removed_image_stays_for_the_container_that_runs_from_it() {
    let bench = Bench::start(|_| String::new());
    let container = bench.run().await;
    let layers = || common::entries(&bench.node.root().join("store/layers")).len();
    bench.remove(BUSYBOX).await;
    assert!(bench.node.images().list_images(api::ListImagesRequest::default()).await.unwrap().into_inner().images.is_empty());
    let out = bench.command(&["gc", "run", "--json", "--min-age", "0s"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(layers(), 1);
    bench.runs_on(&container).await;
    let report = bench.check_df();
    assert!(report.parts.iter().any(|p| p.owner == df::Owner::Lease(container.clone())), "{report:#?}");
    // A new start knows it, too.
    let Bench { mut node, registry } = bench;
    node.kill_daemon();
    node.start_daemon(&[]);
    let bench = Bench { node, registry };
    bench.runs_on(&container).await;
    bench.node.stop_container(&container, 0).await.unwrap();
    bench.node.remove_container(&container).await.unwrap();
    assert_eq!(common::entries(&bench.node.root().join("store/layers")).len(), 0, "with the last container the layer goes");
    bench.check_df();
    bench.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn mesos_headroom_collects_by_itself() {
    let mut bench = Bench::start(|registry| format!("[provisioner]\npinned = ['{}']\ngc.min_age_seconds = 0\n", registry.reference(0)));
    // Every file system is filled beyond nothing: each look collects everything that nobody keeps.
    let container = bench.run().await;
    let json = format!(
        r#"{{"image_disk_headroom": 1.0, "image_disk_watch_interval": {{"nanoseconds": 20000000}},
            "excluded_images": [{{"type": "DOCKER", "docker": {{"name": "{}"}}}}]}}"#,
        bench.registry.reference(1)
    );
    let file = bench.node.dir.path().join("gc.json");
    std::fs::write(&file, json).unwrap();
    bench.node.kill_daemon();
    bench.node.start_daemon(&[("MESOCRI_IMAGE_GC_CONFIG", &format!("file://{}", file.display()))]);
    for image in 0..4 {
        bench.pull(image).await;
    }
    host::wait_until("everything that nothing keeps is collected", || bench.is_down_to(&numbers([0, 1]), 1));
    // The image of a container is in use, though nobody excluded it.
    assert_eq!(bench.images().await, numbers([0, 1]));
    assert!(bench.node.images().list_images(api::ListImagesRequest::default()).await.unwrap().into_inner().images.len() == 3);
    bench.runs_on(&container).await;
    bench.pull(2).await;
    host::wait_until("one more look has come", || bench.is_down_to(&numbers([0, 1]), 1));
    bench.runs_on(&container).await;
    bench.check_df();
    bench.node.remove_all_pods().await;
    host::wait_until("the image follows its last container", || bench.is_down_to(&numbers([0, 1]), 0));
    bench.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn past_the_high_mark_the_least_recently_used_go_until_the_low_one() {
    let mut node = Node::prepare("");
    let registry = Registry::start(node.dir.path());
    // A small file system of its own, so that it is filled as the test says.
    std::fs::create_dir(node.root()).unwrap();
    let size: u64 = 4 << 20;
    nix::mount::mount(Some("tmpfs"), &node.root(), Some("tmpfs"), nix::mount::MsFlags::empty(), Some(format!("size={size}").as_str())).unwrap();
    node.extra_config = "[provisioner.gc]\nhigh_percent = 60\nlow_percent = 59\ninterval_seconds = 1\nmin_age_seconds = 0\n".to_owned();
    node.start_daemon(&[]);
    let bench = Bench { node, registry };
    let order = [1, 2, 4, 5, 7, 8, 10, 11];
    for image in order {
        bench.pull(image).await;
    }
    // Below the mark nothing happens, however often it looks: used again, the first is now the last to go.
    bench.pull(1).await;
    assert_eq!(bench.images().await.len(), order.len());
    let mark = size * 60 / 100;
    let filled = || rustix::fs::statvfs(bench.node.root()).map(|s| (s.f_blocks - s.f_bfree) * s.f_frsize).unwrap();
    let ballast = mark + 8192 - filled();
    std::fs::write(bench.node.root().join("ballast"), vec![1; usize::try_from(ballast).unwrap()]).unwrap();
    host::wait_until("the file system is below the low mark", || filled() <= size * 59 / 100);
    let left = bench.images().await;
    let by_use: Vec<usize> = order[1..].iter().copied().chain([1]).collect();
    let gone = by_use.len() - left.len();
    assert!(gone > 0 && left.contains(&1), "{left:?}");
    assert_eq!(left, by_use[gone..].iter().copied().collect(), "not by last use: {by_use:?}");
    // What was taken out is removed behind it.
    host::wait_until("the collection is at its end", || common::entries(&bench.node.root().join("store/staging")).is_empty());
    bench.check_df();
    nix::mount::umount2(&bench.node.root(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    bench.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_collection_that_is_killed_is_finished_by_the_next_start() {
    let mut bench = Bench::start(|_| String::new());
    let container = bench.run().await;
    // Every start collects what nobody reaches and so passes the last of these once.
    for point in ["remove.record-gone", "gc.records-synced", "gc.layers-moved:2"] {
        bench.node.kill_daemon();
        bench.node.start_daemon(&[("MESOCRI_FAILPOINT", point)]);
        for image in 2..6 {
            bench.pull(image).await;
        }
        let out = bench.command(&["gc", "run", "--min-age", "0s"]);
        assert!(!out.status.success(), "{point}: nobody died");
        host::wait_until(&format!("the daemon has died at {point}"), || bench.node.daemon_died());
        bench.node.start_daemon(&[]);
        bench.check_df();
        let left = bench.images().await;
        assert!(left.len() < 4, "{point}: {left:?}");
        // Each image is gone with its layers or there with all of them; the next collection ends the work.
        let layers: BTreeSet<String> = left.iter().flat_map(|i| bench.registry.layers(*i)).collect();
        assert_eq!(common::entries(&bench.node.root().join("store/layers")).len(), layers.len() + 1, "{point}");
        bench.runs_on(&container).await;
        assert!(bench.command(&["gc", "run", "--min-age", "0s"]).status.success());
        assert_eq!(bench.images().await, BTreeSet::new(), "{point}");
        bench.check_df();
        bench.runs_on(&container).await;
    }
    bench.finish().await;
}
