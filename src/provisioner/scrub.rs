//! Scrubbing: takes the digest of every layer again, marks what has rotted, and with `repair` fetches just those layers anew from where
//! their images came. Containers that run from a bad layer keep what they have; new ones are refused until it is mended.

use std::collections::HashSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::engine::Inner;
use super::{PullRequest, pull};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::Image;
use crate::model::{Digest, ImageId, Reference};
use crate::stdx::blocking;

/// Form of the document.
pub const VERSION: u32 = 1;

/// What is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    /// Fetch damaged layers again.
    pub repair: bool,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// Layers looked at.
    pub checked: usize,
    /// Bytes they occupy.
    pub bytes: u64,
    /// Layers of versions that recorded nothing to compare with; pulling their images into an empty store records it.
    pub unverifiable: Vec<Digest>,
    /// Layers that are not what they were.
    pub damaged: Vec<Finding>,
}

/// A damaged layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which.
    pub layer: Digest,
    /// What is wrong with it.
    pub what: String,
    /// Images that need it, by name, or id where they have none.
    pub images: Vec<String>,
    /// Containers made from it. They go on as they are; recreating them is the cure.
    pub containers: Vec<String>,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a damaged layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Marked: no container starts from it.
    Marked,
    /// Fetched again.
    Repaired,
    /// It could not be fetched, because of this.
    Unrepaired(String),
}

impl Inner {
    /// Refuses layers that are known to be bad, for an image or a container made from it.
    ///
    /// # Errors
    /// `DataLoss` naming layer and image.
    pub(super) fn check_layers(&self, layers: &[Digest], image: &ImageId, made: Option<i64>) -> Result<()> {
        let bad = |layer: &Digest, what: &str| {
            let cure = "pulling the image again or `mesocri store scrub --repair` mends it";
            Err(Error::new(Kind::DataLoss, format!("layer {layer} of image {image} is damaged ({what}); {cure}")))
        };
        for layer in layers {
            if let Some(damage) = self.layers.damage(layer) {
                return bad(layer, &damage.what);
            }
        }
        let Some(made) = made else { return Ok(()) };
        match self.layers.replaced().iter().find(|r| made < r.at && layers.contains(&r.layer)) {
            Some(old) => bad(&old.layer, "it was replaced after this container was made, which must be made anew"),
            None => Ok(()),
        }
    }

    /// Whether `container` may start: nothing it was made from is known to be bad.
    ///
    /// # Errors
    /// As [`Inner::check_layers`].
    pub(super) fn check_container(&self, container: &str) -> Result<()> {
        let Some(lease) = self.leases.get(container) else { return Ok(()) };
        self.check_layers(&lease.layers, &lease.image, Some(lease.made))
    }

    /// Looks at one layer and marks it if need be. Blocks.
    fn inspect(&self, id: &Digest, report: &mut Report) -> Result<()> {
        // Held, so that it is not collected while it is read.
        let _hold = self.layers.hold([id.clone()]);
        if !self.layers.has(id) {
            return Ok(());
        }
        report.checked += 1;
        report.bytes += self.layers.size(id).unwrap_or_default().bytes;
        match self.layers.verify(id)? {
            None => report.unverifiable.push(id.clone()),
            Some(Ok(())) => {
                if self.layers.damage(id).is_some() {
                    tracing::warn!(layer = %id, "a layer that was marked as damaged is whole");
                    self.layers.absolve(id)?;
                }
            }
            Some(Err(what)) => {
                tracing::error!(layer = %id, what, "damaged layer");
                self.layers.mark(id, what.clone())?;
                let name = |i: &Arc<Image>| i.repo_tags.first().or(i.repo_digests.first()).map_or_else(|| i.id.to_string(), Clone::clone);
                let images = self.with_layer(id).iter().map(name).collect();
                let containers = self.leases.all().iter().filter(|l| l.layers.contains(id)).map(|l| l.container.clone()).collect();
                report.damaged.push(Finding { layer: id.clone(), what, images, containers, fate: Fate::Marked });
            }
        }
        Ok(())
    }

    fn with_layer(&self, id: &Digest) -> Vec<Arc<Image>> {
        self.images.list().into_iter().filter(|image| image.layers.iter().any(|l| l.diff_id == *id)).collect()
    }
}

/// Scrubs the whole store, one layer after the other.
pub(super) async fn scrub(inner: &Arc<Inner>, request: Request) -> Result<Report> {
    let mut report = Report { version: VERSION, ..Report::default() };
    for id in inner.layers.all() {
        let inner = inner.clone();
        report = blocking::run("scrub layer", move || inner.inspect(&id, &mut report).map(|()| report)).await?;
    }
    if request.repair {
        for finding in &mut report.damaged {
            finding.fate = match repair(inner, &finding.layer).await {
                Ok(()) => Fate::Repaired,
                Err(e) => Fate::Unrepaired(e.to_string()),
            };
        }
        let inner = inner.clone();
        blocking::run("remove replaced layers", move || inner.bury()).await?;
    }
    Ok(report)
}

/// Pulls an image that needs the layer, by digest: everything else of it is here, so the layer alone is fetched.
async fn repair(inner: &Arc<Inner>, layer: &Digest) -> Result<()> {
    let images = inner.with_layer(layer);
    let mut tried = HashSet::new();
    let mut last = Error::precondition(format!("fetch layer {layer}: its images came from archives; load one of them again"));
    for name in images.iter().flat_map(|image| &image.repo_digests).filter(|name| tried.insert((*name).clone())) {
        let reference: Reference = name.parse()?;
        match pull::pull(inner, PullRequest { reference, credentials: None, cached: false }, None, CancellationToken::new()).await {
            // Mended already by the pull for another layer, or by this one.
            Ok(_) if inner.layers.damage(layer).is_none() => return Ok(()),
            Ok(_) => last = Error::internal(format!("fetch layer {layer}: {name} did not bring it")),
            Err(e) => last = e,
        }
    }
    if inner.layers.damage(layer).is_none() { Ok(()) } else { Err(last) }
}
