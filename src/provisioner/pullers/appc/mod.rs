//! Appc images: discovered by name and labels, fetched, checked, unpacked through the same sinks into the same store as all others.
//!
//! One image is one archive ([`archive`]) and what its manifest ([`manifest`]) says lies below: its dependencies, fetched the same
//! way, each an image of its own in the store. The layers of an image are those of its dependencies in order, then its own, then,
//! if the manifest has a whitelist, one that hides everything else ([`whitelist`]).
//!
//! The id of an image is the SHA-512 of its uncompressed archive, which covers its manifest and files. Nobody promises it unless
//! the name or a dependency says it: what vouches for the rest is the transport, and a signature where `appc_keyring` is set
//! ([`signature`]).

pub mod archive;
pub mod discovery;
mod header;
pub mod manifest;
mod quantity;
mod signature;
mod source;
mod whitelist;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::model::appc::{LATEST, Name, VERSION};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::{Image, Layer};
use crate::model::{Digest, ImageId, Reference};
use crate::provisioner::engine::Inner;
use crate::provisioner::layers::{Flight, Hold, Staged};
use crate::provisioner::unpack::{Expected, file_source};
use crate::provisioner::{Credentials, PullEvent, pull};
use crate::stdx::blocking;
use archive::{Archive, Contents};
use manifest::Manifest;

/// Dependencies of dependencies followed.
const MAX_DEPTH: usize = 16;
/// Archives fetched for one image.
const MAX_ARCHIVES: usize = 64;

/// What a pull has at hand.
pub(in crate::provisioner) struct Order<'a> {
    pub inner: &'a Arc<Inner>,
    pub credentials: Option<&'a Credentials>,
    pub cancel: &'a CancellationToken,
    /// Counts threads that outlive the future that started them.
    pub threads: &'a TaskTracker,
    pub tell: &'a (dyn Fn(&PullEvent) + Sync),
}

/// Pulls `name`, whose labels are complete, with all that lies below it.
///
/// # Errors
/// As [`crate::provisioner::Images::pull`].
pub(in crate::provisioner) async fn pull(order: &Order<'_>, name: &Name) -> Result<ImageId> {
    let mut pull = Pull { order, above: Vec::new(), archives: 0, holds: Vec::new() };
    let image = pull.image(name, &name.labels, None).await?;
    let layers = image.layers.iter().filter_map(|l| l.blob.as_ref().map(|blob| (blob.to_string(), l.blob_size)));
    let layers: Vec<_> = layers.collect();
    let count = layers.len();
    (order.tell)(&PullEvent::Resolved { layers });
    (0..count).for_each(|layer| (order.tell)(&PullEvent::Unpacked { layer }));
    Ok(image.id.clone())
}

struct Pull<'a> {
    order: &'a Order<'a>,
    /// Images whose dependencies are being fetched: none of them may be its own.
    above: Vec<(Name, Digest)>,
    archives: usize,
    /// Layers of dependencies, until they are those of an image.
    holds: Vec<Hold>,
}

/// One archive, unpacked.
struct Unpacked {
    layer: Arc<Staged>,
    contents: Contents,
    manifest: Manifest,
    signer: Option<String>,
}

impl Pull<'_> {
    /// Makes sure of an image; `asked` are the labels that somebody really asked for.
    async fn image(&mut self, name: &Name, asked: &BTreeMap<String, String>, size: Option<u64>) -> Result<Arc<Image>> {
        let inner = self.order.inner;
        self.archives += 1;
        if self.archives > MAX_ARCHIVES {
            return Err(Error::new(Kind::ResourceExhausted, format!("it is made of more than {MAX_ARCHIVES} archives")));
        }
        let archive = self.unpack(name).await?;
        let id = archive.contents.id.clone();
        check(name, asked, size, &archive)?;
        if self.above.iter().any(|(_, above)| *above == id) {
            return Err(Error::new(Kind::DataLoss, format!("{name} depends on itself")));
        }
        self.above.push((name.without_id(), id.clone()));
        let mut layers = Vec::new();
        for dependency in &archive.manifest.dependencies {
            let below = self.dependency(dependency).await.map_err(|e| e.within(format!("dependency {}", dependency.name)))?;
            layers.extend(below.layers.iter().cloned());
        }
        self.above.pop();
        let mut flights = vec![landed(&archive.layer)];
        layers.push(Layer { diff_id: archive.layer.record.diff_id.clone(), blob: Some(id.clone()), blob_size: archive.contents.sizes.0 });
        if !archive.manifest.whitelist.is_empty() {
            let (layer, flight) = self.hide(&layers, &archive).await?;
            layers.extend(layer);
            flights.extend(flight);
        }
        if layers.len() > inner.config.limits.layers {
            return Err(Error::new(Kind::ResourceExhausted, format!("{} layers, more than {}", layers.len(), inner.config.limits.layers)));
        }
        let hold = inner.layers.hold(layers.iter().map(|l| l.diff_id.clone()));
        let image = record(inner, name, archive, layers)?;
        let id = pull::commit(inner, image, flights, hold).await?;
        inner.images.look_up(id.as_str()).ok_or_else(|| Error::internal(format!("commit image {id}: it vanished")))
    }

    /// An image of the store, or one that is fetched.
    async fn dependency(&mut self, dependency: &manifest::Dependency) -> Result<Arc<Image>> {
        let inner = self.order.inner;
        let (os, arch) = manifest::words(&inner.platform);
        let full = dependency.name.with_defaults(os, arch);
        let plain = full.without_id();
        if self.above.iter().any(|(above, _)| *above == plain) {
            return Err(Error::new(Kind::DataLoss, "it depends on itself"));
        }
        if self.above.len() >= MAX_DEPTH {
            return Err(Error::new(Kind::ResourceExhausted, format!("dependencies nest deeper than {MAX_DEPTH}")));
        }
        let key = full.id.as_ref().map_or_else(|| full.to_string(), Digest::to_string);
        let known = inner.images.look_up(&key).filter(|image| self.vouched_for(image));
        let image = match known {
            Some(image) => image,
            None => Box::pin(self.image(&full, &dependency.name.labels, dependency.size)).await?,
        };
        // Held before it is looked for, so that no collection comes between.
        self.holds.push(inner.layers.hold(image.layers.iter().map(|l| l.diff_id.clone())));
        match image.layers.iter().find(|l| !inner.layers.contains(&l.diff_id)) {
            Some(layer) => Err(Error::new(Kind::Unavailable, format!("layer {} was collected meanwhile", layer.diff_id))),
            None => Ok(image),
        }
    }

    /// Whether an image of the store is as good as one fetched now.
    fn vouched_for(&self, image: &Image) -> bool {
        let keyring = &self.order.inner.config.appc_keyring;
        let signed = image.config.appc.as_ref().is_some_and(|appc| appc.signer.is_some());
        image.config.appc.is_some() && (keyring.as_os_str().is_empty() || signed) && image.layers.iter().all(|l| self.order.inner.layers.contains(&l.diff_id))
    }

    /// Fetches an archive, checks its signature and unpacks it into staging.
    async fn unpack(&self, name: &Name) -> Result<Unpacked> {
        let Order { inner, cancel, threads, .. } = *self.order;
        let (file, signer) = self.fetch(name).await?;
        let _permit = inner.layer_permits.acquire().await.map_err(|_| Error::internal("unpack image archive: shutting down"))?;
        let (store, limits, cancel, token) = (inner.layers.clone(), inner.config.limits, cancel.clone(), threads.token());
        let platform = inner.platform.clone();
        blocking::run("unpack image archive", move || {
            let _token = token;
            let mut archive = Archive::open(&file, limits, cancel)?;
            let layer = Arc::new(store.stage(archive.layer(), &Expected::default(), limits)?);
            let contents = archive.contents()?;
            let manifest = manifest::parse(&contents.manifest, &platform)?;
            Ok(Unpacked { layer, contents, manifest, signer })
        })
        .await
    }

    /// The archive, and who signed it if that matters.
    async fn fetch(&self, name: &Name) -> Result<(File, Option<String>)> {
        let Order { inner, credentials, .. } = *self.order;
        let config = &inner.config;
        let place = |ending| discovery::place(&config.appc_simple_discovery_uri_prefix, name, ending);
        let signed = !config.appc_keyring.as_os_str().is_empty();
        let at = place("")?;
        let file = source::fetch(inner, &at, credentials, config.limits.layer_bytes, signed, self.order.cancel).await?;
        if !signed {
            return Ok((file, None));
        }
        let beside = place(".asc")?;
        let signature = source::fetch(inner, &beside, credentials, signature::MAX_SIGNATURE, true, self.order.cancel).await;
        let signature = signature.map_err(|e| match e.kind {
            Kind::NotFound => Error::with(Kind::PermissionDenied, format!("check signature: appc_keyring is set and there is none at {beside}"), e),
            _ => e.within("fetch signature"),
        })?;
        let signer = signature::verify(&config.appc_keyring, &file, &signature).await.map_err(|e| e.within(format!("{at}")))?;
        Ok((file, Some(signer)))
    }

    /// Makes the layer that hides what the whitelist does not name; none when it hides nothing.
    async fn hide(&mut self, layers: &[Layer], archive: &Unpacked) -> Result<(Option<Layer>, Option<Arc<Flight>>)> {
        let inner = self.order.inner;
        let ids: Vec<Digest> = layers.iter().map(|l| l.diff_id.clone()).collect();
        self.holds.push(inner.layers.hold(ids.iter().cloned()));
        let (store, limits, own, list) = (inner.layers.clone(), inner.config.limits, archive.layer.clone(), archive.manifest.whitelist.clone());
        let token = self.order.threads.token();
        blocking::run("apply path whitelist", move || {
            let _token = token;
            // It is looked at where it will stay; until an image names it, only our hold keeps it.
            store.commit(&[own])?;
            let files: Vec<_> = ids.iter().map(|id| store.files(id)).collect();
            let Some(tar) = whitelist::layer(&files, &list).map_err(|e| e.within("apply path whitelist"))? else { return Ok((None, None)) };
            let staged = Arc::new(store.stage(file_source(tar.as_slice()), &Expected::default(), limits)?);
            let layer = Layer { diff_id: staged.record.diff_id.clone(), blob: None, blob_size: 0 };
            Ok((Some(layer), Some(landed(&staged))))
        })
        .await
    }
}

/// A fetch that has ended.
fn landed(layer: &Arc<Staged>) -> Arc<Flight> {
    Arc::new(Flight::new_with(Some(layer.clone())))
}

/// Whether the archive is what was asked for.
fn check(name: &Name, asked: &BTreeMap<String, String>, size: Option<u64>, archive: &Unpacked) -> Result<()> {
    let (Contents { id, sizes, .. }, manifest) = (&archive.contents, &archive.manifest);
    let wrong = |why: String| Err(Error::new(Kind::DataLoss, format!("check image archive: {why}")));
    if let Some(promised) = name.id.as_ref().filter(|promised| *promised != id) {
        return wrong(format!("its id is sha512-{}, not sha512-{}", id.hex(), promised.hex()));
    }
    if let Some(size) = size.filter(|size| *size != sizes.0 && *size != sizes.1) {
        return wrong(format!("it has {} bytes, {} uncompressed, and {size} are promised", sizes.0, sizes.1));
    }
    if manifest.name != name.name {
        return wrong(format!("it is that of {}, not of {}", manifest.name, name.name));
    }
    for (label, value) in asked {
        let is = manifest.labels.get(label);
        // `latest` is a name for whichever version that is; an image that does not say its platform is for any.
        let any = (label == VERSION && value == LATEST) || (is.is_none() && [VERSION, "os", "arch"].contains(&label.as_str()));
        if !any && is != Some(value) {
            return wrong(format!("its label {label} is {is:?}, and {value:?} was asked for"));
        }
    }
    Ok(())
}

fn record(inner: &Inner, name: &Name, archive: Unpacked, layers: Vec<Layer>) -> Result<Image> {
    let Unpacked { contents, manifest, signer, .. } = archive;
    let Manifest { name: own, labels, mut config, .. } = manifest;
    if let Some(appc) = config.appc.as_mut() {
        appc.signer = signer;
    }
    let id = ImageId::from_string(contents.id.as_str());
    let asked = Reference::from(name.without_id());
    let mut tags: Vec<String> = asked.repo_tag().into_iter().collect();
    // What it calls itself is a name too, unless another image has it: nobody takes a name away that was pulled as such.
    let (os, arch) = manifest::words(&inner.platform);
    let own = Name::new(&own, labels, None)?.with_defaults(os, arch).to_string();
    if !tags.contains(&own) && inner.images.look_up(&own).is_none_or(|other| other.id == id) {
        tags.push(own);
    }
    Ok(Image {
        id,
        repo_tags: tags,
        repo_digests: vec![asked.repo_digest(&contents.id)],
        layers,
        config,
        config_json: String::from_utf8(contents.manifest).map_err(|e| Error::with(Kind::DataLoss, "read image manifest", e))?,
        size: 0,
        pinned: false,
    })
}
