//! Collection by itself: when the file system of the store is filled past a mark, images that nobody uses go.
//!
//! Two forms of configuration. Mesos's `image_gc_config`: past `1 - image_disk_headroom` everything unused goes. Ours: past
//! `high_percent` the least recently used go until `low_percent` is reached. Off by default: a kubelet collects by itself.
//! Inodes count as bytes do: a file system can run out of either.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{Goal, MIN_AGE_SECONDS, Outcome, Request};
use crate::model::Reference;
use crate::model::error::{Act, Error, Result};
use crate::model::image::FsUsage;
use crate::provisioner::Config;
use crate::provisioner::engine::{Inner, Provisioner};
use crate::stdx::blocking;

/// Thresholds of automatic collection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gc {
    /// Collect when the store's file system is filled beyond this (percent of bytes or inodes); 0: never.
    pub high_percent: u8,
    /// Stop collecting at this.
    pub low_percent: u8,
    /// Seconds between two looks.
    pub interval_seconds: u64,
    /// Images pulled, used or looked up less than this ago are not collected.
    pub min_age_seconds: u64,
    /// Images never collected by any collection that does not name them: full references, or prefixes ending in `*`.
    pub excluded_images: Vec<String>,
}

impl Default for Gc {
    fn default() -> Self {
        Self { high_percent: 0, low_percent: 80, interval_seconds: 300, min_age_seconds: MIN_AGE_SECONDS, excluded_images: Vec::new() }
    }
}

/// Mesos's form (`--image_gc_config`, mesos.md §4.8).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageGcConfig {
    /// Part of the file system to keep free, between 0 and 1.
    pub image_disk_headroom: f64,
    /// Time between two looks.
    pub image_disk_watch_interval: DurationInfo,
    /// Images to spare.
    #[serde(default)]
    pub excluded_images: Vec<ExcludedImage>,
}

/// Mesos's duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DurationInfo {
    /// Nanoseconds.
    pub nanoseconds: i64,
}

/// An image as Mesos's JSON names it, or just its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ExcludedImage {
    /// A pattern as in [`Gc::excluded_images`].
    Name(String),
    /// `Image` of Mesos.
    Image {
        /// `DOCKER` or `APPC`.
        #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
        kind: Option<String>,
        /// Set for `DOCKER`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        docker: Option<Named>,
        /// Set for `APPC`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        appc: Option<Named>,
        /// Has no meaning here.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cached: Option<bool>,
    },
}

/// The part of `Image.Docker` and `Image.Appc` that tells the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// Its name.
    pub name: String,
}

/// What the configuration comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// Patterns never collected.
    pub excluded: Vec<String>,
    /// Images wanted less than this ago stay.
    pub min_age_seconds: u64,
    /// When to collect by itself.
    trigger: Option<Trigger>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Trigger {
    /// Filled part beyond which to collect.
    high: f64,
    /// Filled part to reach; `None`: everything unused goes.
    low: Option<f64>,
    interval: Duration,
}

impl Policy {
    /// Checks the settings and puts both forms into one.
    ///
    /// # Errors
    /// `InvalidArgument` naming the setting.
    pub fn new(config: &Config) -> Result<Self> {
        let gc = &config.gc;
        let mut excluded = gc.excluded_images.iter().map(|p| pattern(p)).collect::<Result<Vec<_>>>()?;
        let trigger = match (&config.image_gc_config, gc.high_percent) {
            (None, 0) => None,
            (None, high) => Some(own(gc, high)?),
            (Some(_), 1..) => return Err(Error::invalid("configure collection: both image_gc_config and gc.high_percent are set; use one of them")),
            (Some(mesos), 0) => {
                for image in &mesos.excluded_images {
                    excluded.push(excluded_name(image)?);
                }
                Some(as_mesos(mesos)?)
            }
        };
        Ok(Self { excluded, min_age_seconds: gc.min_age_seconds, trigger })
    }
}

fn own(gc: &Gc, high: u8) -> Result<Trigger> {
    if high > 100 || gc.low_percent >= high || gc.interval_seconds == 0 {
        return Err(Error::invalid(format!(
            "configure collection: gc.low_percent ({}) must be below gc.high_percent ({high}), that at most 100, and gc.interval_seconds above 0",
            gc.low_percent
        )));
    }
    Ok(Trigger { high: f64::from(high) / 100.0, low: Some(f64::from(gc.low_percent) / 100.0), interval: Duration::from_secs(gc.interval_seconds) })
}

fn as_mesos(mesos: &ImageGcConfig) -> Result<Trigger> {
    let headroom = mesos.image_disk_headroom;
    if !(0.0..=1.0).contains(&headroom) {
        return Err(Error::invalid(format!("configure collection: image_disk_headroom is {headroom}, it must be between 0 and 1")));
    }
    let interval = u64::try_from(mesos.image_disk_watch_interval.nanoseconds).ok().filter(|n| *n > 0);
    let interval = interval.ok_or_else(|| Error::invalid("configure collection: image_disk_watch_interval must be above 0"))?;
    Ok(Trigger { high: 1.0 - headroom, low: None, interval: Duration::from_nanos(interval) })
}

fn excluded_name(image: &ExcludedImage) -> Result<String> {
    match image {
        ExcludedImage::Name(name) => pattern(name),
        ExcludedImage::Image { docker: Some(image), appc: None, .. } => pattern(&image.name),
        // All versions: which one is meant would be said by labels, which nobody can say here.
        ExcludedImage::Image { docker: None, appc: Some(image), .. } => pattern(&format!("{}{}", crate::model::appc::SCHEME, image.name)),
        ExcludedImage::Image { .. } => Err(Error::invalid("configure collection: an excluded image needs exactly one of docker and appc")),
    }
}

/// People write `busybox`; names in the store are full.
pub(super) fn pattern(text: &str) -> Result<String> {
    if text.ends_with('*') {
        return Ok(text.to_owned());
    }
    let reference: Reference = text.parse()?;
    if let Some(name) = reference.appc().filter(|name| name.id.is_none()) {
        // The store has all labels; those that are not said may be any.
        return Ok(match (name.labels.len(), name.labels.contains_key(crate::model::appc::VERSION)) {
            (0, _) => format!("{name}:*"),
            (1, true) => format!("{name}?*"),
            _ => name.to_string(),
        });
    }
    Ok(reference.digest().map_or_else(|| reference.to_string(), |digest| reference.repo_digest(digest)))
}

/// How full a file system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fill {
    /// Bytes and inodes in use.
    pub used: FsUsage,
    /// What can be in use at most, as `df` reckons: without what is reserved.
    pub size: FsUsage,
}

impl Fill {
    /// Asks the file system of `path`.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let s = rustix::fs::statvfs(path).act("ask the file system of", path.display())?;
        let used = s.f_blocks.saturating_sub(s.f_bfree);
        // btrfs tells of no inodes: then they never run out.
        let inodes = s.f_files.saturating_sub(s.f_ffree);
        Ok(Self { used: FsUsage { bytes: used * s.f_frsize, inodes }, size: FsUsage { bytes: (used + s.f_bavail) * s.f_frsize, inodes: s.f_files } })
    }

    /// The larger filled part of the two.
    fn part(&self) -> f64 {
        let part = |used: u64, size: u64| if size == 0 { 0.0 } else { used as f64 / size as f64 };
        part(self.used.bytes, self.size.bytes).max(part(self.used.inodes, self.size.inodes))
    }

    /// What must go until no more than `part` is filled.
    fn above(&self, part: f64) -> FsUsage {
        let over = |used: u64, size: u64| used.saturating_sub((size as f64 * part) as u64);
        FsUsage { bytes: over(self.used.bytes, self.size.bytes), inodes: if self.size.inodes == 0 { 0 } else { over(self.used.inodes, self.size.inodes) } }
    }
}

impl Inner {
    /// One look; collects if there is need. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub(super) fn relieve(&self, fill: Fill) -> Result<Option<Outcome>> {
        let Some(trigger) = self.policy.trigger.filter(|t| fill.part() > t.high) else { return Ok(None) };
        let goal = match trigger.low {
            None => Goal::Everything,
            Some(low) => Goal::Free(fill.above(low)),
        };
        let plan = self.plan(Request { goal, excluded: Vec::new(), min_age_seconds: self.policy.min_age_seconds })?;
        if !plan.enough {
            tracing::warn!(free_bytes = plan.frees.bytes, "collecting all unused images will not reach the low mark; `mesocri df` tells what fills the disk");
        }
        let outcome = self.execute(&plan, super::Mode::Idle, plan.made)?;
        if outcome.steps > 0 {
            tracing::info!(filled = fill.part(), steps = outcome.steps, bytes = outcome.freed.bytes, inodes = outcome.freed.inodes, "collected images");
        }
        Ok(Some(outcome))
    }
}

impl Provisioner {
    /// Collects by itself until `shutdown`, if so configured. The first look comes after one interval.
    pub async fn watch(self: Arc<Self>, shutdown: CancellationToken) {
        let Some(trigger) = self.inner.policy.trigger else { return };
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(trigger.interval) => {}
            }
            let inner = self.inner.clone();
            let round = blocking::run("collect images", move || inner.relieve(Fill::of(&inner.layout.store())?));
            if let Err(e) = round.await {
                tracing::warn!(error = %e, "collect images");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_configuration() {
        let json = r#"{"image_disk_headroom": 0.1, "image_disk_watch_interval": {"nanoseconds": 3600000000000},
            "excluded_images": ["a*", {"type": "DOCKER", "docker": {"name": "busybox"}, "cached": true}]}"#;
        let mesos: ImageGcConfig = serde_json::from_str(json).unwrap();
        let policy = Policy::new(&Config { image_gc_config: Some(mesos.clone()), ..Config::default() }).unwrap();
        assert_eq!(policy.excluded, ["a*", "docker.io/library/busybox:latest"]);
        assert_eq!(policy.trigger, Some(Trigger { high: 0.9, low: None, interval: Duration::from_secs(3600) }));
        assert_eq!(Policy::new(&Config::default()).unwrap().trigger, None);
        let gc = Gc { high_percent: 85, ..Gc::default() };
        let trigger = Policy::new(&Config { gc: gc.clone(), ..Config::default() }).unwrap().trigger.unwrap();
        assert_eq!((trigger.high, trigger.low), (0.85, Some(0.8)));
        let refused = [
            Config { gc: gc.clone(), image_gc_config: Some(mesos.clone()), ..Config::default() },
            Config { gc: Gc { low_percent: 85, ..gc }, ..Config::default() },
            Config { image_gc_config: Some(ImageGcConfig { image_disk_headroom: 1.5, ..mesos.clone() }), ..Config::default() },
            Config { image_gc_config: Some(ImageGcConfig { image_disk_watch_interval: DurationInfo { nanoseconds: 0 }, ..mesos }), ..Config::default() },
        ];
        for config in refused {
            assert!(Policy::new(&config).is_err(), "{config:?}");
        }
        for bad in [r#"{"image_disk_headroom": 0.1}"#, r#"{"image_disk_headroom": 0.1, "image_disk_watch_interval": {"nanoseconds": 1}, "typo": 1}"#] {
            assert!(serde_json::from_str::<ImageGcConfig>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn whichever_runs_out_first_counts() {
        let of = |bytes, inodes, files| Fill { used: FsUsage { bytes, inodes }, size: FsUsage { bytes: 1000, inodes: files } };
        assert_eq!(of(500, 90, 100).part(), 0.9);
        assert_eq!(of(500, 90, 100).above(0.8), FsUsage { bytes: 0, inodes: 10 });
        assert_eq!(of(900, 0, 0).part(), 0.9);
        assert_eq!(of(900, 7, 0).above(0.8), FsUsage { bytes: 100, inodes: 0 });
    }
}
