//! Says what something in the store is and who holds it: a path, a digest, an image, a container.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Goal;
use super::df::Owner;
use super::plan::{self, Holder, Request};
use super::world::World;
use crate::model::Digest;
use crate::model::error::{Error, Result};
use crate::model::image::FsUsage;
use crate::provisioner::engine::Inner;
use crate::provisioner::usage;

/// Shortest part of an id or digest that is looked for.
const MIN_PREFIX: usize = 6;

/// One thing that the question may have meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whose part of the store it is.
    pub what: Owner,
    /// In words: names of an image, how a container's layers are made up.
    pub about: Vec<String>,
    /// Who keeps it. Empty: the next collection may take it.
    pub holders: Vec<Holder>,
    /// What it occupies; of images all layers, shared or not.
    pub usage: FsUsage,
    /// What removing it alone would free; `None` where that makes no sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alone: Option<FsUsage>,
}

impl Inner {
    /// Everything that `key` may mean: an absolute path, a digest of a layer or blob, an image, a container. Blocks.
    ///
    /// # Errors
    /// `NotFound` when it means nothing here.
    pub(in crate::provisioner) fn why(&self, key: &str) -> Result<Vec<Answer>> {
        let world = self.world(false)?;
        if key.starts_with('/') {
            return self.why_path(&world, Path::new(key)).map(|a| vec![a]);
        }
        let bare = key.rsplit(':').next().unwrap_or(key);
        let matches = |id: &str| {
            let id = id.rsplit(':').next().unwrap_or(id);
            id == bare || bare.len() >= MIN_PREFIX && id.starts_with(bare)
        };
        let mut answers = Vec::new();
        if let Some(image) = self.images.look_up(&self.key(key)) {
            answers.extend(world.image(&image.id).map(|e| image_answer(&world, e, self.policy.min_age_seconds)));
        }
        for lease in world.leases.iter().filter(|l| matches(&l.container)) {
            answers.push(self.container_answer(&world, &lease.container)?);
        }
        let blobs = world.images.iter().flat_map(|e| &e.image.layers).filter(|l| l.blob.as_ref().is_some_and(|b| matches(b.as_str()))).map(|l| &l.diff_id);
        let layers: HashSet<&Digest> = world.layers.keys().filter(|id| matches(id.as_str())).chain(blobs).collect();
        let mut layers: Vec<&Digest> = layers.into_iter().collect();
        layers.sort();
        answers.extend(layers.into_iter().map(|id| self.layer_answer(&world, id)));
        if answers.is_empty() { Err(Error::not_found(format!("explain {key:?}: no image, layer or container of this store"))) } else { Ok(answers) }
    }

    fn why_path(&self, world: &World, path: &Path) -> Result<Answer> {
        let unknown = || Error::not_found(format!("explain {}: it is not below {}", path.display(), world.store.display()));
        let below = path.strip_prefix(&world.store).map_err(|_| unknown())?;
        if std::fs::symlink_metadata(path).is_err() {
            return Err(Error::not_found(format!("explain {}: there is nothing", path.display())));
        }
        let mut parts = below.components();
        let entry: std::path::PathBuf = parts.by_ref().take(2).collect();
        let top = world.store.join(&entry);
        if entry.components().count() < 2 && self.census_knows(&top) {
            return Ok(Answer {
                what: Owner::Store,
                about: vec!["a directory of the store itself".into()],
                holders: vec![],
                usage: usage::own(&top),
                alone: None,
            });
        }
        let owner = self.owner(&top, &self.layers.directories());
        let usage = usage::count_once(&top, &mut usage::Seen::default())?;
        let plain = |about: &str, holders| Answer { what: owner.clone(), about: vec![about.to_owned()], holders, usage, alone: None };
        Ok(match &owner {
            Owner::Layer(id) => self.layer_answer(world, id),
            Owner::Container(id) | Owner::Lease(id) if self.leases.get(id).is_some() => self.container_answer(world, id)?,
            Owner::Image(id) => match world.image(id) {
                Some(entry) => image_answer(world, entry, self.policy.min_age_seconds),
                None => plain("the record of an image that was removed this moment", vec![]),
            },
            Owner::Running | Owner::Container(_) | Owner::Lease(_) => plain("work in progress", vec![Holder::Running]),
            Owner::Debris => plain("left by a crash or being removed; the next collection takes it", vec![]),
            Owner::Damaged => plain("a damaged layer that was replaced while containers used it", vec![]),
            Owner::Store | Owner::Unexplained => plain("nothing here put this in the store, or knows of it; it is safe from collection", vec![]),
        })
    }

    fn census_knows(&self, path: &Path) -> bool {
        let l = &self.layout;
        [l.store(), l.layers(), l.images(), l.leases(), l.rootfs_all(), l.staging(), l.damaged()].iter().any(|p| p == path)
    }

    fn layer_answer(&self, world: &World, id: &Digest) -> Answer {
        let mut answer = layer_answer(world, id);
        answer.about.extend(self.layers.damage(id).map(|d| format!("damaged: {}", d.what)));
        answer
    }

    fn container_answer(&self, world: &World, id: &str) -> Result<Answer> {
        let lease = self.leases.get(id).ok_or_else(|| Error::not_found(format!("explain container {id}")))?;
        let image = world.image(&lease.image);
        let of = match image {
            Some(entry) => format!("root filesystem of image {} ({})", lease.image, plan::names(entry).join(", ")),
            None => format!("root filesystem of image {}, which was removed; {} layers live on for it", lease.image, lease.layers.len()),
        };
        let usage = usage::add(usage::count(&self.layout.rootfs(id))?, usage::own(&self.layout.leases().join(format!("{id}.json"))));
        Ok(Answer {
            what: Owner::Container(id.to_owned()),
            about: vec![of, format!("made by backend {}", lease.rootfs.backend)],
            holders: vec![Holder::Container(id.to_owned())],
            usage,
            alone: Some(usage),
        })
    }
}

fn image_answer(world: &World, entry: &super::world::Entry, min_age_seconds: u64) -> Answer {
    let request = Request { min_age_seconds, ..Request::new(Goal::Everything) };
    let alone = plan::References::count(world).drop_image(entry).iter().fold(entry.record, |sum, p| usage::add(sum, p.usage));
    Answer {
        what: Owner::Image(entry.image.id.clone()),
        about: plan::names(entry),
        holders: plan::holders(world, entry, &request),
        usage: world.usage_of(entry),
        alone: Some(alone),
    }
}

fn layer_answer(world: &World, id: &Digest) -> Answer {
    let images = world.images.iter().filter(|e| e.image.layers.iter().any(|l| l.diff_id == *id));
    let mut holders: Vec<Holder> = images.map(|e| Holder::Image(e.image.id.clone())).collect();
    holders.extend(world.leases.iter().filter(|l| l.layers.contains(id)).map(|l| Holder::Container(l.container.clone())));
    if world.held.contains(id) {
        holders.push(Holder::Running);
    }
    let usage = world.layers.get(id).copied().unwrap_or_default();
    Answer { what: Owner::Layer(id.clone()), about: vec![], holders, usage, alone: Some(usage) }
}
