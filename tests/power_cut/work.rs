//! What the store does while the disk is recorded, and what it promised at every moment of it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use mesocri::disk::Layout;
use mesocri::model::Error;
use mesocri::model::image::FsUsage;
use mesocri::provisioner::gc::{Gc, Goal, Request};
use mesocri::provisioner::{Config, Images as _, Provisioner, PullRequest, Upkeep as _};
use tokio_util::sync::CancellationToken;

use super::cuts::Random;
use super::steps::{IMAGES, Registry};

/// Containers there are at most.
const MAX_CONTAINERS: usize = 4;

/// Images that are there, and what names find.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Images.
    pub present: BTreeSet<usize>,
    /// Those that their own name finds.
    pub named: BTreeSet<usize>,
    /// Which one has the name that moves.
    pub moving: Option<usize>,
}

/// Something that was asked of the store and acknowledged.
pub struct Done {
    /// Where the log was when it began and when it was acknowledged.
    pub from: usize,
    pub to: usize,
    pub what: String,
    pub before: State,
    pub after: State,
    /// What may appear, disappear and be named while it is under way.
    appears: BTreeSet<usize>,
    vanishes: BTreeSet<usize>,
    moves: Option<usize>,
}

/// What must hold after a cut.
#[derive(Clone, Debug)]
pub struct Promise {
    pub what: String,
    /// Images that must be there.
    pub there: BTreeSet<usize>,
    /// Images that may be there.
    pub possible: BTreeSet<usize>,
    /// Images that their own name must find.
    pub named: BTreeSet<usize>,
    /// Whom the name that moves may find; empty: no matter.
    pub moving: BTreeSet<usize>,
}

/// What holds when the log is cut at `at`.
pub fn promise(history: &[Done], at: usize) -> Promise {
    let Some(done) = history.iter().rev().find(|d| d.from < at) else { panic!("the cut at {at} is before everything") };
    if at >= done.to {
        let state = &done.after;
        let (there, named) = (state.present.clone(), state.named.clone());
        return Promise { what: format!("after {}", done.what), possible: there.clone(), there, named, moving: state.moving.into_iter().collect() };
    }
    let there: BTreeSet<usize> = &done.before.present - &done.vanishes;
    let moving = done.before.moving.filter(|m| there.contains(m)).map(|m| [m].into_iter().chain(done.moves).collect());
    Promise {
        what: format!("during {}", done.what),
        possible: &done.before.present | &done.appears,
        named: &done.before.named & &there,
        moving: moving.unwrap_or_default(),
        there,
    }
}

/// Opens a store, as a daemon does that keeps nothing longer than it must.
pub async fn open(layout: &Layout, backend: &str) -> Result<Arc<Provisioner>, Error> {
    let gc = Gc { min_age_seconds: 0, ..Gc::default() };
    Provisioner::open(Config { backend: backend.to_owned(), backend_by_probe: true, gc, ..Config::default() }, layout.clone()).await
}

/// Pulls an image from the registry.
pub async fn pull(store: &Provisioner, registry: &Registry, image: usize) -> Result<(), Error> {
    let request = PullRequest { reference: registry.reference(image), credentials: None, cached: false };
    store.pull(request, None, CancellationToken::new()).await.map(drop)
}

/// The name that several images have in turn.
pub fn moving_name(registry: &Registry) -> String {
    format!("{}/moving:1", registry.host)
}

/// What the store has.
pub fn state(store: &Provisioner, registry: &Registry) -> State {
    let list = store.list();
    let number = |id: &str| (0..IMAGES).find(|i| registry.id(*i) == id);
    let present: BTreeSet<usize> = list.iter().map(|i| number(i.id.as_str()).expect("an image nobody asked for")).collect();
    let has = |i: usize, name: &str| list.iter().any(|l| l.id.as_str() == registry.id(i) && l.repo_tags.iter().any(|t| t == name));
    let named = present.iter().copied().filter(|i| has(*i, &registry.reference(*i).to_string())).collect();
    let moving = present.iter().copied().find(|i| has(*i, &moving_name(registry)));
    State { present, named, moving }
}

/// Works on a store in `root` for `acts` steps and notes what was promised when; `position` tells where the log is.
pub async fn work(root: &Path, dir: &Path, registry: &Registry, backend: &str, acts: usize, position: impl Fn() -> usize) -> Vec<Done> {
    let layout = Layout::new(root, dir.join("state"));
    let store = open(&layout, backend).await.unwrap();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut containers: BTreeSet<String> = BTreeSet::new();
    let mut history: Vec<Done> = Vec::new();
    let (all, none) = ((0..IMAGES).collect::<BTreeSet<usize>>(), BTreeSet::new());
    for n in 0..acts {
        let (from, before) = (position(), history.last().map_or_else(State::default, |d| d.after.clone()));
        let image = random.below(IMAGES);
        let some = |set: &BTreeSet<usize>, random: &mut Random| set.iter().copied().nth(random.below(set.len()));
        let (what, appears, vanishes, moves) = match random.below(16) {
            0..=4 => {
                pull(&store, registry, image).await.unwrap();
                (format!("pull {image}"), [image].into(), none.clone(), None)
            }
            5 => {
                store.load(&registry.archive(image)).await.unwrap();
                (format!("load {image}"), [image].into(), none.clone(), None)
            }
            6..=7 => {
                store.load(&registry.archive_as(image, &moving_name(registry))).await.unwrap();
                (format!("give {image} the name that moves"), [image].into(), none.clone(), Some(image))
            }
            8..=9 if containers.len() < MAX_CONTAINERS && !before.present.is_empty() => {
                let image = some(&before.present, &mut random).unwrap();
                let name = format!("c{n}");
                let listed = store.list().into_iter().find(|i| i.id.as_str() == registry.id(image)).unwrap();
                let rootfs = store.provision(&name, &listed).await.unwrap();
                std::fs::write(rootfs.writable.unwrap().join("written"), &name).unwrap();
                containers.insert(name);
                (format!("create from {image}"), none.clone(), none.clone(), None)
            }
            8..=11 if !containers.is_empty() => {
                let name = containers.pop_first().unwrap();
                store.release(&name).await.unwrap();
                (format!("release {name}"), none.clone(), none.clone(), None)
            }
            10..=12 => {
                let image = some(&before.present, &mut random).unwrap_or(image);
                store.remove(&registry.id(image)).await.unwrap();
                (format!("remove {image}"), none.clone(), [image].into(), None)
            }
            13 => {
                let goal = Goal::Free(FsUsage { bytes: 1 + random.below(100_000) as u64, inodes: 0 });
                store.collect(Request::new(goal)).await.unwrap();
                ("collect some".to_owned(), none.clone(), all.clone(), None)
            }
            _ => {
                let others = [image, (image + 3) % IMAGES, (image + 5) % IMAGES];
                let (a, b, c, d) = tokio::join!(
                    pull(&store, registry, others[0]),
                    pull(&store, registry, others[1]),
                    pull(&store, registry, others[2]),
                    store.collect(Request::new(Goal::Everything))
                );
                a.and(b).and(c).and(d.map(drop)).unwrap();
                (format!("pull {others:?} and collect at once"), others.into(), all.clone(), None)
            }
        };
        let after = state(&store, registry);
        history.push(Done { from, to: position(), what, before, after, appears, vanishes, moves });
    }
    history
}
