//! What a collection would do, as data: made from a picture of the store by a pure function, shown to people, carried out or
//! compared with a later picture. One type for kubelet's RemoveImage, Mesos's PRUNE_IMAGES, the collector itself and operators.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::world::{Entry, World};
use crate::model::image::FsUsage;
use crate::model::{Digest, ImageId};
use crate::provisioner::usage;

/// Form of the document. Another one is refused.
pub const VERSION: u32 = 1;
/// An image that was wanted less than this ago is not collected unless it was named: somebody is about to use it.
pub const MIN_AGE_SECONDS: u64 = 120;

/// How much to collect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Everything that nothing keeps.
    Everything,
    /// The least recently used images, until this much is freed.
    Free(FsUsage),
    /// What crashes left, and layers that no image has.
    Debris,
    /// These images, whatever keeps them: somebody named them. Layers that containers hold stay until those go.
    Images(Vec<ImageId>),
}

/// What is asked of a collection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// How much.
    pub goal: Goal,
    /// Names to spare besides those of the configuration: full references, or prefixes ending in `*`.
    #[serde(default)]
    pub excluded: Vec<String>,
    /// Images wanted less than this ago stay.
    #[serde(default)]
    pub min_age_seconds: u64,
}

impl Request {
    /// This goal, nothing else excluded, nothing too young.
    pub fn new(goal: Goal) -> Self {
        Self { goal, excluded: Vec::new(), min_age_seconds: 0 }
    }
}

/// What goes, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`VERSION`].
    pub version: u32,
    /// Directory of the store it was made for.
    pub store: PathBuf,
    /// When, in nanoseconds since the epoch.
    pub made: i64,
    /// What was asked.
    pub request: Request,
    /// What goes, first to last.
    pub steps: Vec<Step>,
    /// What all steps free.
    pub frees: FsUsage,
    /// Whether that is as much as was asked for.
    pub enough: bool,
    /// What stays, and why.
    pub kept: Vec<Kept>,
}

/// One thing that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What.
    pub what: Subject,
    /// Layers that go with it because after the steps before nothing else has them.
    pub layers: Vec<Part>,
    /// Bytes and inodes of all that.
    pub frees: FsUsage,
}

/// A layer and what it occupies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Which.
    pub layer: Digest,
    /// Its directory on disk.
    #[serde(flatten)]
    pub usage: FsUsage,
}

/// A thing in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// An image: its record, and layers that only it has.
    Image {
        /// Which.
        id: ImageId,
        /// All its names.
        names: Vec<String>,
        /// Last use in nanoseconds since the epoch.
        used: i64,
    },
    /// Layers that no image has and no container uses.
    Orphans,
    /// Something half-made or half-removed.
    Debris {
        /// Path below the store.
        path: PathBuf,
    },
    /// What a container still holds of an image that was removed.
    Container {
        /// Its id.
        id: String,
        /// The image.
        image: ImageId,
    },
}

/// Who keeps something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holder {
    /// A container's root filesystem.
    Container(String),
    /// An image's record.
    Image(ImageId),
    /// The configuration's `pinned`, by this pattern.
    Pinned(String),
    /// The excluded images of the configuration or of the request, by this pattern.
    Excluded(String),
    /// A pull, import or create that is under way.
    Running,
    /// Somebody wanted it at this time (nanoseconds since the epoch), which is too short ago.
    Recent(i64),
    /// Nothing keeps it, but the goal is reached without it.
    Unneeded,
}

/// Something that stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// What.
    pub what: Subject,
    /// Because of these.
    pub holders: Vec<Holder>,
    /// All it refers to on disk, shared or not.
    pub usage: FsUsage,
}

/// The pattern that covers one of the names: equal, or a prefix when it ends in `*`.
pub fn covering<'a>(patterns: &'a [String], names: &[String]) -> Option<&'a String> {
    let covers = |pattern: &String, name: &String| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    };
    patterns.iter().find(|pattern| names.iter().any(|name| covers(pattern, name)))
}

impl Subject {
    /// An image as it is now.
    pub fn of(entry: &Entry) -> Self {
        Self::Image { id: entry.image.id.clone(), names: names(entry), used: entry.used }
    }
}

/// Tags and digests.
pub fn names(entry: &Entry) -> Vec<String> {
    entry.image.repo_tags.iter().chain(&entry.image.repo_digests).cloned().collect()
}

/// How many reasons each layer has to stay.
pub struct References<'a> {
    counts: HashMap<&'a Digest, usize>,
    world: &'a World,
}

impl<'a> References<'a> {
    /// Counts images, leases and holds.
    pub fn count(world: &'a World) -> Self {
        let mut counts: HashMap<&Digest, usize> = world.layers.keys().map(|id| (id, 0)).collect();
        let images = world.images.iter().flat_map(distinct);
        let leases = world.leases.iter().flat_map(|l| l.layers.iter().collect::<HashSet<_>>());
        for id in images.chain(leases).chain(&world.held) {
            if let Some(count) = counts.get_mut(id) {
                *count += 1;
            }
        }
        Self { counts, world }
    }

    /// Takes an image out; returns the layers that nothing else has, sorted.
    pub fn drop_image(&mut self, entry: &'a Entry) -> Vec<Part> {
        let mut free = Vec::new();
        for id in distinct(entry) {
            if let Some(count) = self.counts.get_mut(id) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    free.push(id);
                }
            }
        }
        self.parts(free)
    }

    /// Layers that nothing has, sorted.
    pub fn orphans(&self) -> Vec<Part> {
        self.parts(self.counts.iter().filter(|(_, count)| **count == 0).map(|(id, _)| *id).collect())
    }

    fn parts(&self, mut ids: Vec<&Digest>) -> Vec<Part> {
        ids.sort();
        ids.into_iter().map(|id| Part { layer: id.clone(), usage: self.world.layers.get(id).copied().unwrap_or_default() }).collect()
    }
}

fn distinct(entry: &Entry) -> HashSet<&Digest> {
    entry.image.layers.iter().map(|l| &l.diff_id).collect()
}

/// Plans for `world` what `request` asks. Pure.
pub fn plan(world: &World, request: Request) -> Plan {
    let mut references = References::count(world);
    let mut plan =
        Plan { version: VERSION, store: world.store.clone(), made: world.now, request, steps: vec![], frees: FsUsage::default(), enough: true, kept: vec![] };
    if !matches!(plan.request.goal, Goal::Images(_)) {
        for (path, usage) in &world.debris {
            plan.push(Subject::Debris { path: path.clone() }, vec![], *usage);
        }
        let orphans = references.orphans();
        if !orphans.is_empty() {
            plan.push(Subject::Orphans, orphans, FsUsage::default());
        }
    }
    // Least recently used first; among equals by id, so that the same picture gives the same plan.
    let mut entries: Vec<&Entry> = world.images.iter().collect();
    entries.sort_by(|a, b| (a.used, &a.image.id).cmp(&(b.used, &b.image.id)));
    for entry in entries {
        let mut holders = holders(world, entry, &plan.request);
        let goes = match &plan.request.goal {
            Goal::Images(ids) => ids.contains(&entry.image.id),
            Goal::Debris => false,
            Goal::Everything => holders.is_empty(),
            Goal::Free(wanted) => holders.is_empty() && !reached(plan.frees, *wanted),
        };
        if goes {
            let layers = references.drop_image(entry);
            plan.push(Subject::of(entry), layers, entry.record);
        } else if !matches!(plan.request.goal, Goal::Images(_)) {
            if holders.is_empty() {
                holders.push(Holder::Unneeded);
            }
            plan.kept.push(Kept { what: Subject::of(entry), holders, usage: world.usage_of(entry) });
        }
    }
    if !matches!(plan.request.goal, Goal::Images(_)) {
        plan.kept.extend(held_without_image(world));
    }
    if let Goal::Free(wanted) = plan.request.goal {
        plan.enough = reached(plan.frees, wanted);
    }
    plan
}

impl Plan {
    fn push(&mut self, what: Subject, layers: Vec<Part>, own: FsUsage) {
        let frees = layers.iter().fold(own, |sum, part| usage::add(sum, part.usage));
        self.frees = usage::add(self.frees, frees);
        self.steps.push(Step { what, layers, frees });
    }

    /// All layers that go.
    pub fn layers(&self) -> HashSet<Digest> {
        self.steps.iter().flat_map(|s| s.layers.iter().map(|p| p.layer.clone())).collect()
    }
}

fn reached(frees: FsUsage, wanted: FsUsage) -> bool {
    frees.bytes >= wanted.bytes && frees.inodes >= wanted.inodes
}

/// Everyone who keeps an image.
pub fn holders(world: &World, entry: &Entry, request: &Request) -> Vec<Holder> {
    let mut holders: Vec<Holder> = world.leases.iter().filter(|l| l.image == entry.image.id).map(|l| Holder::Container(l.container.clone())).collect();
    let names = names(entry);
    holders.extend(covering(&world.pinned, &names).map(|p| Holder::Pinned(p.clone())));
    holders.extend(covering(&world.excluded, &names).or_else(|| covering(&request.excluded, &names)).map(|p| Holder::Excluded(p.clone())));
    if distinct(entry).into_iter().any(|id| world.held.contains(id)) {
        holders.push(Holder::Running);
    }
    let youngest = world.now.saturating_sub(i64::try_from(request.min_age_seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000_000));
    if request.min_age_seconds > 0 && entry.wanted > youngest {
        holders.push(Holder::Recent(entry.wanted));
    }
    holders
}

/// Containers that outlive their image.
fn held_without_image(world: &World) -> Vec<Kept> {
    let gone = world.leases.iter().filter(|l| !world.images.iter().any(|e| e.image.id == l.image));
    gone.map(|lease| {
        let layers: HashSet<&Digest> = lease.layers.iter().collect();
        let usage = layers.into_iter().filter_map(|id| world.layers.get(id)).fold(FsUsage::default(), |sum, u| usage::add(sum, *u));
        let what = Subject::Container { id: lease.container.clone(), image: lease.image.clone() };
        Kept { what, holders: vec![Holder::Container(lease.container.clone())], usage }
    })
    .collect()
}
