//! Garbage collection: a plan, then an act. Roots (image records, leases of root filesystems, pins, excluded images, holds of
//! running work) reach layers; the rest goes, least recently used images first.
//!
//! Kubelet's RemoveImage, the collector's own rounds, Mesos's PRUNE_IMAGES and the operator's `mesocri gc apply` all make a
//! [`Plan`] and end in `Inner::execute`. Releasing a container, failed pulls and recovery end in `Inner::collect`, the last part
//! of it.
//!
//! # Nobody waits
//! Pictures are taken from memory. An image is forgotten under the index's lock for the time of a map operation; a look-up either comes
//! before and keeps it (it counts as wanted), or after and does not find it. Layers leave by a rename outside of any lock;
//! files are removed where no lock is held at all.
//!
//! # Interruption
//! Records go first and are synced, then layers are moved to staging, then files are removed. After a crash between any two,
//! recovery sweeps layers that nothing reaches, and opening the store sweeps staging.

mod auto;
pub mod df;
mod plan;
#[cfg(test)]
mod tests;
pub mod why;
mod world;

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

pub use auto::{Gc, ImageGcConfig, Policy};
pub use plan::{Goal, Holder, Kept, MIN_AGE_SECONDS, Part, Plan, Request, Step, Subject, covering};

use super::engine::Inner;
use super::{remove, usage};
use crate::model::error::{Error, Result};
use crate::model::image::FsUsage;
use crate::model::{Digest, ImageId};
use crate::stdx::failpoint;
use plan::References;
use world::World;

/// What became of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Steps done, from the first.
    pub steps: usize,
    /// What these steps freed.
    pub freed: FsUsage,
    /// Why it ended before the last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
}

/// How firmly a plan is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Images go whoever wants them: they were named.
    Named,
    /// An image that is wanted meanwhile ends it.
    Idle,
    /// As `Idle`, and no layer goes that is not in the plan.
    Exact,
}

impl Inner {
    /// Sweeps layers that nothing reaches. Blocks.
    ///
    /// # Errors
    /// I/O failures; the next run tries again.
    pub(super) fn collect(&self) -> Result<usize> {
        let dead = self.layers.sweep(None, || self.reachable())?;
        self.bury()?;
        Ok(dead.len())
    }

    /// Removes replaced layers that no container uses any more. Blocks.
    ///
    /// # Errors
    /// I/O failures; the next run tries again.
    pub(super) fn bury(&self) -> Result<()> {
        self.layers.bury(|r| self.leases.use_layer(&r.layer, r.at))
    }

    fn reachable(&self) -> HashSet<Digest> {
        let mut roots = self.images.layers();
        roots.extend(self.leases.layers());
        roots
    }

    /// Plans. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub(super) fn plan(&self, request: Request) -> Result<Plan> {
        let named = matches!(request.goal, Goal::Images(_));
        Ok(plan::plan(&self.world(!named)?, request))
    }

    /// Plans and acts at once. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub(super) fn run(&self, request: Request) -> Result<Outcome> {
        let mode = if matches!(request.goal, Goal::Images(_)) { Mode::Named } else { Mode::Idle };
        let plan = self.plan(request)?;
        self.execute(&plan, mode, plan.made)
    }

    /// Removes an image that somebody named; unknown is fine. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub(super) fn remove_image(&self, key: &str) -> Result<()> {
        let Some(image) = self.images.look_up(key) else { return Ok(()) };
        self.run(Request::new(Goal::Images(vec![image.id.clone()]))).map(drop)
    }

    /// Carries out a plan made earlier, if it still describes the world. Blocks.
    ///
    /// # Errors
    /// `InvalidArgument` for the plan of another store or form, `FailedPrecondition` saying everything that changed, I/O failures.
    pub(super) fn apply(&self, plan: &Plan) -> Result<Outcome> {
        if plan.version != plan::VERSION {
            return Err(Error::invalid(format!("apply plan: its form is {}, this version knows {}", plan.version, plan::VERSION)));
        }
        if plan.store != self.layout.store() {
            return Err(Error::invalid(format!("apply plan: it was made for {}, this store is {}", plan.store.display(), self.layout.store().display())));
        }
        let world = self.world(true)?;
        let changes = changes(&world, plan);
        if !changes.is_empty() {
            return Err(Error::precondition(format!("apply plan: the store is not what it was when the plan was made: {}", changes.join("; "))));
        }
        let mode = if matches!(plan.request.goal, Goal::Images(_)) { Mode::Named } else { Mode::Exact };
        self.execute(plan, mode, world.now)
    }

    /// The one way in which images leave. `seen` is when the picture was taken: who is wanted after it stays. Blocks.
    fn execute(&self, plan: &Plan, mode: Mode, seen: i64) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut removed = false;
        for step in &plan.steps {
            match &step.what {
                Subject::Image { id, .. } => {
                    if self.forget(id, mode, seen)? {
                        removed = true;
                        failpoint::hit("remove.record-gone");
                    } else if mode != Mode::Named {
                        outcome.stopped = Some(format!("image {id} is wanted or gone since a moment"));
                        break;
                    }
                }
                Subject::Debris { path } => self.clear(path)?,
                Subject::Orphans | Subject::Container { .. } => {}
            }
            outcome.steps += 1;
            outcome.freed = usage::add(outcome.freed, step.frees);
        }
        if removed {
            self.images.sync()?;
            failpoint::hit("gc.records-synced");
        }
        let only = (mode == Mode::Exact).then(|| plan.layers());
        self.layers.sweep(only.as_ref(), || self.reachable())?;
        self.bury()?;
        Ok(outcome)
    }

    fn forget(&self, id: &ImageId, mode: Mode, seen: i64) -> Result<bool> {
        self.images.remove_if(id, |stamps| mode == Mode::Named || (stamps.wanted() <= seen && !self.leases.hold(id)))
    }

    /// Removes debris, unless somebody took the name meanwhile.
    fn clear(&self, below: &std::path::Path) -> Result<()> {
        let Some(path) = crate::disk::layout::below(&self.layout.store(), below).filter(|p| self.is_debris(p)) else { return Ok(()) };
        // Staging has its own way, in which two never meet.
        if path.parent() == Some(&*self.layout.staging()) {
            return self.layers.sweep_staging();
        }
        if path.parent() == Some(&*self.layout.damaged()) {
            return self.bury();
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let Some(_claim) = self.claim_rootfs(&name) else { return Ok(()) };
        remove::tree(&path)
    }
}

/// Everything that keeps `plan` from being what would happen in `world`.
fn changes(world: &World, plan: &Plan) -> Vec<String> {
    let mut references = References::count(world);
    let orphans: HashSet<Digest> = references.orphans().into_iter().map(|p| p.layer).collect();
    let named = matches!(plan.request.goal, Goal::Images(_));
    let mut changes = Vec::new();
    for step in &plan.steps {
        match &step.what {
            Subject::Debris { path } => match world.debris.iter().find(|(p, _)| p == path) {
                None => changes.push(format!("{} is gone or in use", path.display())),
                Some((_, now)) if *now != step.frees => changes.push(format!("{} has {} bytes instead of {}", path.display(), now.bytes, step.frees.bytes)),
                Some(_) => {}
            },
            Subject::Orphans => {
                let kept = step.layers.iter().filter(|p| !orphans.contains(&p.layer));
                changes.extend(kept.map(|p| format!("layer {} is gone or in use", p.layer)));
            }
            Subject::Container { id, .. } => changes.push(format!("container {id} cannot be collected")),
            Subject::Image { id, names, used } => {
                let Some(entry) = world.image(id) else {
                    changes.push(format!("image {id} is gone"));
                    continue;
                };
                let now = plan::names(entry);
                if now != *names {
                    changes.push(format!("image {id} has the names {now:?} instead of {names:?}"));
                }
                if entry.used != *used {
                    changes.push(format!("image {id} was used since"));
                }
                if !named {
                    changes.extend(plan::holders(world, entry, &plan.request).iter().map(|h| format!("image {id} is kept: {h}")));
                }
                let layers = references.drop_image(entry);
                if layers != step.layers {
                    changes.push(format!("image {id} takes {} layers with it instead of {}", layers.len(), step.layers.len()));
                }
            }
        }
    }
    changes
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Container(id) => write!(f, "container {id}"),
            Self::Image(id) => write!(f, "image {id}"),
            Self::Pinned(pattern) => write!(f, "pinned by {pattern:?}"),
            Self::Excluded(pattern) => write!(f, "excluded by {pattern:?}"),
            Self::Running => f.write_str("a pull, import or create is under way"),
            Self::Recent(_) => f.write_str("wanted a moment ago"),
            Self::Unneeded => f.write_str("the goal is reached without it"),
        }
    }
}

impl Request {
    /// What operators and Mesos may ask for, names made full.
    ///
    /// # Errors
    /// `InvalidArgument` for goals and names that make no sense.
    pub fn checked(mut self) -> Result<Self> {
        match &self.goal {
            Goal::Free(wanted) if wanted.bytes == 0 && wanted.inodes == 0 => return Err(Error::invalid("plan collection: nothing to free")),
            Goal::Images(ids) if ids.is_empty() => return Err(Error::invalid("plan collection: no image is named")),
            _ => {}
        }
        self.excluded = self.excluded.iter().map(|name| auto::pattern(name)).collect::<Result<_>>()?;
        Ok(self)
    }
}
