//! Plans over pictures of stores, and over a store.

use std::collections::HashMap;
use std::sync::Arc;

use super::plan::{Holder, plan};
use super::world::Entry;
use super::*;
use crate::disk::Layout;
use crate::model::image::{Image, ImageConfig, Layer, RootFs};
use crate::provisioner::leases::Lease;
use crate::provisioner::{Config, Images as _, Provisioner, Upkeep as _};

const SECOND: i64 = 1_000_000_000;

fn digest(c: char) -> Digest {
    Digest::sha256(&c.to_string().repeat(64)).unwrap()
}

fn image(id: char, tag: &str, layers: &str) -> Image {
    Image {
        id: ImageId::from_string(digest(id).as_str()),
        repo_tags: vec![format!("docker.io/library/{tag}:1")],
        repo_digests: vec![],
        layers: layers.chars().map(|c| Layer { diff_id: digest(c), blob: None, blob_size: 1 }).collect(),
        config: ImageConfig::default(),
        config_json: "{}".into(),
        size: 1,
        pinned: false,
    }
}

fn entry(id: char, tag: &str, layers: &str, used: i64) -> Entry {
    Entry { image: Arc::new(image(id, tag, layers)), record: FsUsage { bytes: 1, inodes: 1 }, used: used * SECOND, wanted: used * SECOND }
}

fn lease(container: &str, image: char, layers: &str) -> Arc<Lease> {
    let rootfs = RootFs { backend: "x".into(), mounts: vec![], lookup: vec![], writable: None };
    let layers = layers.chars().map(digest).collect();
    Arc::new(Lease { container: container.into(), image: ImageId::from_string(digest(image).as_str()), layers, rootfs, made: 0 })
}

/// Layers a to f of 10, 20, … 60 bytes; images 1: a b, 2: a c, 3: a d.
fn world() -> World {
    let layers: HashMap<Digest, FsUsage> = "abcdef".chars().zip(1..).map(|(c, n)| (digest(c), FsUsage { bytes: n * 10, inodes: n })).collect();
    World {
        store: "/store".into(),
        now: 1000 * SECOND,
        images: vec![entry('1', "one", "ab", 30), entry('2', "two", "ac", 10), entry('3', "three", "ad", 20)],
        layers,
        held: HashSet::new(),
        leases: vec![],
        debris: vec![],
        pinned: vec![],
        excluded: vec![],
    }
}

/// What goes, by first digit of ids; orphans are `o`, debris `x`.
fn order(plan: &Plan) -> String {
    let of = |step: &Step| match &step.what {
        Subject::Image { id, .. } => id.as_str().chars().nth(7).unwrap(),
        Subject::Orphans => 'o',
        Subject::Debris { .. } => 'x',
        Subject::Container { .. } => '?',
    };
    plan.steps.iter().map(of).collect()
}

#[test]
fn least_recently_used_goes_first_and_shared_layers_with_the_last() {
    let mut world = world();
    world.debris.push(("staging/half".into(), FsUsage { bytes: 7, inodes: 1 }));
    let made = plan(&world, Request::new(Goal::Everything));
    assert_eq!(order(&made), "xo231");
    let freed: Vec<u64> = made.steps.iter().map(|s| s.frees.bytes).collect();
    // Debris; e and f; c and a record; d; b and a, which nothing has any more.
    assert_eq!(freed, [7, 110, 31, 41, 31]);
    assert_eq!(made.frees, FsUsage { bytes: 220, inodes: 1 + 11 + 4 + 5 + 4 });
    assert_eq!(made.steps[4].layers.iter().map(|p| p.layer.clone()).collect::<Vec<_>>(), [digest('a'), digest('b')]);
    // The sum is every byte there is.
    assert_eq!(made.frees.bytes, 7 + 3 + world.layers.values().map(|u| u.bytes).sum::<u64>());
    assert_eq!(order(&plan(&world, Request::new(Goal::Debris))), "xo");
    // No more than asked for.
    let free = |bytes| plan(&world, Request::new(Goal::Free(FsUsage { bytes, inodes: 0 })));
    assert_eq!((order(&free(117)).as_str(), order(&free(118)).as_str()), ("xo", "xo2"));
    assert!(free(220).enough && !free(221).enough);
    assert_eq!(free(117).kept[0].holders, [Holder::Unneeded]);
}

#[test]
fn holders_keep_and_are_named() {
    let mut world = world();
    world.leases = vec![lease("c1", '2', "ac"), lease("gone", '9', "e")];
    world.pinned = vec!["docker.io/library/th*".into()];
    let made = plan(&world, Request { excluded: vec!["docker.io/library/one:1".into()], ..Request::new(Goal::Everything) });
    assert_eq!(order(&made), "o");
    assert_eq!(made.frees.bytes, 60);
    let kept: Vec<_> = made.kept.iter().map(|k| (k.holders.clone(), k.usage.bytes)).collect();
    let expected = [
        (vec![Holder::Container("c1".into())], 41),
        (vec![Holder::Pinned("docker.io/library/th*".into())], 51),
        (vec![Holder::Excluded("docker.io/library/one:1".into())], 31),
        (vec![Holder::Container("gone".into())], 50),
    ];
    assert_eq!(kept, expected);
    // Named images go whoever keeps them; what a container uses of them stays.
    let two = world.images[1].image.id.clone();
    let made = plan(&world, Request::new(Goal::Images(vec![two])));
    assert_eq!((order(&made).as_str(), made.frees.bytes), ("2", 1));
    // Running work keeps what it holds.
    world.leases.clear();
    world.pinned.clear();
    world.held = HashSet::from([digest('b'), digest('f')]);
    let made = plan(&world, Request::new(Goal::Everything));
    assert_eq!((order(&made).as_str(), made.frees.bytes), ("o23", 50 + 31 + 41));
    // So does having been wanted a moment ago.
    world.held.clear();
    world.images[0].wanted = 990 * SECOND;
    let made = plan(&world, Request { min_age_seconds: 20, ..Request::new(Goal::Everything) });
    assert_eq!((order(&made).as_str(), made.kept[0].holders.clone()), ("o23", vec![Holder::Recent(990 * SECOND)]));
}

#[test]
fn a_plan_survives_its_own_text() {
    let mut world = world();
    world.debris.push(("staging/half".into(), FsUsage { bytes: 7, inodes: 1 }));
    world.leases = vec![lease("gone", '9', "e")];
    let made = plan(&world, Request::new(Goal::Free(FsUsage { bytes: 170, inodes: 0 })));
    let text = serde_json::to_string(&made).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), made);
    assert!(changes(&world, &made).is_empty());
    assert!(serde_json::from_str::<Plan>(&text.replacen("\"made\"", "\"mad\"", 1)).is_err());
}

#[test]
fn every_change_of_the_world_is_said() {
    let made = || plan(&world(), Request::new(Goal::Everything));
    let with = |change: &dyn Fn(&mut World)| {
        let mut world = world();
        change(&mut world);
        changes(&world, &made()).join("; ")
    };
    assert_eq!(with(&|_| ()), "");
    // What the plan does not touch may change.
    assert_eq!(with(&|w| w.layers.extend([(digest('9'), FsUsage::default())])), "");
    assert!(with(&|w| w.leases.push(lease("new", '2', "ac"))).contains("kept: container new"));
    assert!(with(&|w| w.leases.push(lease("new", '9', "e"))).contains("is gone or in use"));
    assert!(with(&|w| w.images[1].used += 1).contains("was used since"));
    assert!(with(&|w| drop(w.images.remove(1))).contains("is gone"));
    assert!(with(&|w| w.pinned.push("docker.io/library/two*".into())).contains("pinned"));
    assert!(with(&|w| w.held.extend([digest('c')])).contains("under way"));
    let shares = with(&|w| w.images.push(entry('4', "four", "ab", 99)));
    assert!(shares.contains("takes 0 layers with it instead of 2"), "{shares}");
    assert!(with(&|w| Arc::make_mut(&mut w.images[0].image).repo_tags.push("x".into())).contains("has the names"));
}

/// A store with two images that share layer a, one file each; made by hand, without a registry.
async fn store() -> (tempfile::TempDir, Layout, Arc<Provisioner>) {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
    let provisioner = reopen(&layout).await;
    add(&provisioner, "one", &["a", "b"]).await;
    add(&provisioner, "two", &["a", "c"]).await;
    (dir, layout, provisioner)
}

async fn reopen(layout: &Layout) -> Arc<Provisioner> {
    let provisioner = Provisioner::open(Config { backend: "overlay".into(), ..Config::default() }, layout.clone()).await.unwrap();
    provisioner.recover(&["c".to_owned()]).await.unwrap();
    provisioner
}

/// Loads a docker archive whose layers have one file each.
async fn add(provisioner: &Provisioner, name: &str, files: &[&str]) {
    let pack = |members: &[(String, Vec<u8>)]| {
        let mut builder = ::tar::Builder::new(Vec::new());
        for (name, data) in members {
            let mut header = ::tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append_data(&mut header, name, data.as_slice()).unwrap();
        }
        builder.into_inner().unwrap()
    };
    let layers: Vec<(String, Vec<u8>)> = files.iter().map(|f| (format!("{f}.tar"), pack(&[((*f).to_owned(), f.repeat(20_000).into_bytes())]))).collect();
    let ids: Vec<Digest> = layers.iter().map(|(_, tar)| crate::provisioner::unpack::Hasher::of(tar, None).unwrap()).collect();
    let config = serde_json::json!({"os": "linux", "config": {"Labels": {"l": name}}, "rootfs": {"type": "layers", "diff_ids": ids}}).to_string();
    let names: Vec<&String> = layers.iter().map(|(n, _)| n).collect();
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [format!("{name}:1")], "Layers": names}]).to_string();
    let mut members = layers.clone();
    members.extend([("config.json".to_owned(), config.into_bytes()), ("manifest.json".to_owned(), manifest.into_bytes())]);
    let archive = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(archive.path(), pack(&members)).unwrap();
    provisioner.load(archive.path()).await.unwrap();
}

fn layers_left(layout: &Layout) -> usize {
    std::fs::read_dir(layout.layers()).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_are_carried_out_or_refused() {
    let (_dir, layout, provisioner) = store().await;
    let everything = || provisioner.plan(Request::new(Goal::Everything));
    let image = provisioner.inner.images.look_up("one:1").unwrap();
    provisioner.provision("c", &image).await.unwrap();
    std::fs::create_dir_all(layout.staging().join("half/fs")).unwrap();
    let before = provisioner.df().await.unwrap();
    let made = everything().await.unwrap();
    assert_eq!(made.steps.len(), 2, "{made:?}");
    assert_eq!(made.kept[0].holders, [Holder::Container("c".into())]);
    // The world changes: refused, and nothing is done.
    let two = provisioner.inner.images.look_up("two:1").unwrap();
    provisioner.provision("d", &two).await.unwrap();
    let error = provisioner.apply(made).await.unwrap_err();
    assert_eq!(error.kind, crate::model::error::Kind::FailedPrecondition);
    assert!(error.to_string().contains("container d"), "{error}");
    assert!(layout.staging().join("half").exists());
    provisioner.release("d").await.unwrap();
    // It does what it says, to the byte.
    let made = everything().await.unwrap();
    let outcome = provisioner.apply(made.clone()).await.unwrap();
    assert_eq!((outcome.steps, outcome.freed, outcome.stopped), (2, made.frees, None));
    let after = provisioner.df().await.unwrap();
    assert_eq!(before.total.bytes - after.total.bytes, made.frees.bytes);
    assert_eq!(before.total.inodes - after.total.inodes, made.frees.inodes);
    assert_eq!((layers_left(&layout), provisioner.list().len()), (2, 1));
    // Done twice is refused; of another store too.
    assert!(provisioner.apply(made.clone()).await.unwrap_err().to_string().contains("is gone"));
    let elsewhere = Plan { store: "/elsewhere".into(), ..made };
    assert_eq!(provisioner.apply(elsewhere).await.unwrap_err().kind, crate::model::error::Kind::InvalidArgument);
    // The named image goes though a container runs from it; its layers go with the container.
    provisioner.remove("one:1").await.unwrap();
    assert_eq!((layers_left(&layout), provisioner.list().len()), (2, 0));
    let made = everything().await.unwrap();
    assert!(made.steps.is_empty() && matches!(&made.kept[0].what, Subject::Container { id, .. } if id == "c"), "{made:?}");
    provisioner.release("c").await.unwrap();
    assert_eq!(layers_left(&layout), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_looked_up_meanwhile_stays() {
    let (_dir, _, provisioner) = store().await;
    let inner = &provisioner.inner;
    let made = inner.plan(Request::new(Goal::Everything)).unwrap();
    // Between the picture and the act somebody asks for the image that goes second.
    let Subject::Image { id, .. } = made.steps[1].what.clone() else { panic!("{made:?}") };
    assert!(provisioner.resolve(id.as_str()).is_some());
    let outcome = inner.execute(&made, Mode::Idle, made.made).unwrap();
    assert!(outcome.steps == 1 && outcome.stopped.unwrap().contains(id.as_str()));
    assert_eq!(provisioner.list().len(), 1);
    // The control: nobody asks.
    let made = inner.plan(Request::new(Goal::Everything)).unwrap();
    assert_eq!(inner.execute(&made, Mode::Idle, made.made).unwrap().stopped, None);
    assert!(provisioner.list().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn thresholds_collect_as_much_as_needed() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
    let gc = Gc { high_percent: 90, low_percent: 50, min_age_seconds: 0, ..Gc::default() };
    let provisioner = Provisioner::open(Config { gc, ..Config::default() }, layout.clone()).await.unwrap();
    for name in ["one", "two", "three"] {
        add(&provisioner, name, &[name]).await;
    }
    provisioner.inner.images.touch(&provisioner.inner.images.look_up("one:1").unwrap().id);
    let fill = |bytes| auto::Fill { used: FsUsage { bytes, inodes: 0 }, size: FsUsage { bytes: 100_000, inodes: 0 } };
    assert_eq!(provisioner.inner.relieve(fill(90_000)).unwrap(), None);
    // 45,000 must go; a layer has over 40,000 and under 90,000.
    let outcome = provisioner.inner.relieve(fill(95_000)).unwrap().unwrap();
    assert_eq!(outcome.steps, 1 + usize::from(outcome.freed.bytes > 90_000));
    assert!(provisioner.inner.images.look_up("two:1").is_none(), "the least recently used stays");
    assert!(provisioner.inner.images.look_up("one:1").is_some(), "the last used goes");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_has_a_name_and_strangers_are_told() {
    let (_dir, layout, provisioner) = store().await;
    let image = provisioner.inner.images.look_up("one:1").unwrap();
    let rootfs = provisioner.provision("c", &image).await.unwrap();
    std::fs::write(rootfs.writable.unwrap().join("big"), vec![1; 100_000]).unwrap();
    std::fs::create_dir_all(layout.staging().join("half/fs")).unwrap();
    let check = |unexplained: u64| {
        let layout = layout.clone();
        let provisioner = provisioner.clone();
        async move {
            let report = provisioner.df().await.unwrap();
            assert_eq!(report.total, usage::count(&layout.store()).unwrap());
            let sum = report.parts.iter().fold(FsUsage::default(), |sum, p| usage::add(sum, p.usage));
            assert_eq!((report.total, report.unexplained.bytes), (sum, unexplained), "{report:#?}");
            assert_eq!(provisioner.unexplained().await.unwrap(), report.unexplained);
            report
        }
    };
    let report = check(0).await;
    provisioner.inner.recount_writable("c");
    // What the kubelet is told is the same, but for debris, which goes with the next collection.
    let debris = usage::count(&layout.staging().join("half")).unwrap();
    assert_eq!(usage::add(provisioner.fs_info().await.unwrap().1, debris), report.total);
    let of = |owner: df::Owner| report.parts.iter().find(|p| p.owner == owner).unwrap_or_else(|| panic!("{owner:?}")).usage.bytes;
    assert!(of(df::Owner::Container("c".into())) >= 100_000);
    assert!(of(df::Owner::Debris) > 0 && of(df::Owner::Lease("c".into())) > 0);
    assert_eq!(report.images.len(), 2);
    let shared = report.images[0].all.bytes - report.images[0].alone.bytes;
    assert!(shared >= 20_000, "layer a is shared: {:?}", report.images);
    // Somebody else's files, wherever they lie.
    let strangers = [layout.store().join("x"), layout.layers().join("x"), layout.images().join("x.json"), layout.leases().join("x.json")];
    for path in &strangers {
        std::fs::write(path, vec![1; 5000]).unwrap();
    }
    let bytes = strangers.iter().map(|p| usage::own(p).bytes).sum();
    check(bytes).await;
    // They are never collected.
    provisioner.remove("two:1").await.unwrap();
    provisioner.collect(Request::new(Goal::Everything)).await.unwrap();
    check(bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_can_be_explained() {
    let (_dir, layout, provisioner) = store().await;
    let image = provisioner.inner.images.look_up("one:1").unwrap();
    let rootfs = provisioner.provision("c", &image).await.unwrap();
    let one = async |key: &str| provisioner.why(key).await.unwrap().remove(0);
    let of_image = one("one:1").await;
    assert_eq!(of_image.what, df::Owner::Image(image.id.clone()));
    assert!(of_image.holders.contains(&Holder::Container("c".into())), "{of_image:?}");
    let shared = image.layers[0].diff_id.clone();
    let of_layer = one(&shared.as_str()[..20]).await;
    let two = provisioner.inner.images.look_up("two:1").unwrap().id.clone();
    assert_eq!(of_layer.what, df::Owner::Layer(shared.clone()));
    for holder in [Holder::Image(image.id.clone()), Holder::Image(two), Holder::Container("c".into())] {
        assert!(of_layer.holders.contains(&holder), "{of_layer:?}");
    }
    let file = layout.layer(&shared).join("fs/a");
    assert_eq!(one(&file.display().to_string()).await.what, df::Owner::Layer(shared));
    assert_eq!(one("c").await.what, df::Owner::Container("c".into()));
    assert_eq!(one(&rootfs.writable.unwrap().display().to_string()).await.holders, [Holder::Container("c".into())]);
    assert_eq!(one(&layout.layers().display().to_string()).await.what, df::Owner::Store);
    std::fs::write(layout.store().join("x"), "").unwrap();
    assert_eq!(one(&layout.store().join("x").display().to_string()).await.what, df::Owner::Unexplained);
    for nothing in ["/etc/passwd", "nope:1", "/", &layout.store().join("y").display().to_string()] {
        assert_eq!(provisioner.why(nothing).await.unwrap_err().kind, crate::model::error::Kind::NotFound, "{nothing}");
    }
}
