//! Imports images from archives: what `docker save` writes (of any age) and OCI image layouts, as a tar file, maybe
//! compressed, or as a directory. Layers go through the same verified unpacking as those of a registry.
//!
//! Members of a tar file are found by one pass over their headers; their bytes are then read in place ([`files`]). A compressed
//! archive is first decompressed into staging: its members cannot be sought. Nothing in an archive is trusted to be where or
//! what another part says: sizes and digests are checked as they are read.
//!
//! `mesocri load` imports every image under the names that the archive gives ([`load`], [`Incoming`]); a `docker_registry` that is
//! a directory or lies in HDFS gives one image under the name it was asked for ([`local`]).

mod files;
mod legacy;
pub mod local;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::manifest::{self, Descriptor, Document};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::{Image, Layer};
use crate::model::{Digest, ImageId, Reference};
use crate::provisioner::engine::Inner;
use crate::provisioner::unpack::{Expected, Hasher};
use crate::provisioner::{PullEvent, pull};
use crate::stdx::blocking;
use files::Files;

/// Nested indexes followed.
const MAX_INDEX_DEPTH: usize = 3;
/// Annotation under which `docker save`, `ctr export` and `buildah push` put the full name.
const NAME: &str = "io.containerd.image.name";
/// Annotation under which OCI tools put a name or a tag alone.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Imports every image at `path`. Whoever drops this stops the work and leaves nothing behind.
///
/// # Errors
/// As [`crate::provisioner::Images::load`].
pub(in crate::provisioner) async fn load(inner: &Arc<Inner>, path: &Path) -> Result<Vec<ImageId>> {
    let owned = path.to_owned();
    load_all(inner, path.to_owned(), move |inner, cancel| Files::open(inner, &owned, cancel)).await
}

async fn load_all(
    inner: &Arc<Inner>,
    shown: std::path::PathBuf,
    open: impl FnOnce(&Inner, &CancellationToken) -> Result<Files> + Send + 'static,
) -> Result<Vec<ImageId>> {
    let cancel = CancellationToken::new();
    let _leave = cancel.clone().drop_guard();
    let inner = inner.clone();
    // In a task of its own, so that it can clean up after a caller who left.
    let work = tokio::spawn(async move {
        let (opener, stop) = (inner.clone(), cancel.clone());
        let (files, wanted) = blocking::run("read image archive", move || {
            let files = open(&opener, &stop)?;
            let wanted = find(&opener, &files)?;
            Ok::<_, Error>((Arc::new(files), wanted))
        })
        .await?;
        let mut ids = Vec::new();
        for image in wanted {
            let threads = TaskTracker::new();
            let result = import(&inner, files.clone(), image, &threads, &|_| ()).await;
            if result.is_err() {
                threads.close();
                threads.wait().await;
                let inner = inner.clone();
                if let Err(e) = blocking::run("collect garbage", move || inner.collect()).await {
                    tracing::warn!(error = %e, "cleaning up after a failed import");
                }
            }
            ids.push(result?);
        }
        Ok(ids)
    });
    let result = work.await.map_err(|e| Error::with(Kind::Internal, "load archive", e))?;
    result.map_err(|e: Error| e.within(format!("load {}", shown.display())))
}

/// An archive that is being sent to us: kept in a file without a name until all of it is there. Dropping it forgets it.
pub struct Incoming {
    inner: Arc<Inner>,
    file: tokio::fs::File,
    bytes: u64,
}

impl Incoming {
    /// Nothing has come yet.
    ///
    /// # Errors
    /// When the store's file system takes no file.
    pub(in crate::provisioner) async fn begin(inner: &Arc<Inner>) -> Result<Self> {
        let dir = inner.layout.staging();
        let file = blocking::run("make temporary file", move || tempfile::tempfile_in(&dir).act("create temporary in", dir.display())).await?;
        Ok(Self { inner: inner.clone(), file: tokio::fs::File::from_std(file), bytes: 0 })
    }

    /// The next bytes.
    ///
    /// # Errors
    /// `ResourceExhausted` when the disk or `limits.layer_bytes` has no room for them.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.bytes += bytes.len() as u64;
        let limit = self.inner.config.limits.layer_bytes;
        if self.bytes > limit {
            return Err(Error::new(Kind::ResourceExhausted, format!("receive archive: more than {limit} bytes (limits.layer_bytes)")));
        }
        self.file.write_all(&bytes).await.act("write", "received archive")
    }

    /// That was all: imports every image in it.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::load`].
    pub async fn finish(mut self) -> Result<Vec<ImageId>> {
        self.file.flush().await.act("write", "received archive")?;
        let file: File = self.file.into_std().await;
        load_all(&self.inner, "what was sent".into(), move |inner, cancel| Files::of_file(inner, file, Path::new("what was sent"), cancel)).await
    }
}

/// An image to import.
struct Wanted {
    names: Vec<Reference>,
    /// What the archive calls it if that is a tag alone.
    tag: Option<String>,
    /// Digest of its manifest, if the archive has one.
    manifest: Option<Digest>,
    config: Vec<u8>,
    config_digest: Digest,
    /// Member and what its bytes must be, lowest layer first.
    layers: Vec<(String, Expected)>,
}

/// Unpacks and commits one image. `threads` counts what works for it in the background.
async fn import(inner: &Arc<Inner>, files: Arc<Files>, wanted: Wanted, threads: &TaskTracker, tell: &(dyn Fn(PullEvent) + Sync)) -> Result<ImageId> {
    let parsed = manifest::configuration(&wanted.config, wanted.layers.len(), &inner.platform)?;
    let layer = |((member, expected), diff_id): (&(String, Expected), &Digest)| {
        let shown = expected.blob.as_ref().unwrap_or(diff_id);
        (shown.to_string(), files.size(member).unwrap_or(0))
    };
    tell(PullEvent::Resolved { layers: wanted.layers.iter().zip(&parsed.diff_ids).map(layer).collect() });
    let hold = inner.layers.hold(parsed.diff_ids.iter().cloned());
    let mut flights = Vec::new();
    let mut layers = Vec::new();
    for (index, ((member, expected), diff_id)) in wanted.layers.into_iter().zip(&parsed.diff_ids).enumerate() {
        let size = files.size(&member).unwrap_or(0);
        layers.push(Layer { diff_id: diff_id.clone(), blob: expected.blob.clone(), blob_size: size });
        if inner.layers.contains(diff_id) {
            tell(PullEvent::Exists { layer: index });
            continue;
        }
        let flight = inner.layers.flight(diff_id);
        flight
            .get_or_try_init(|| async {
                let _permit = inner.layer_permits.acquire().await.map_err(|_| Error::internal("load layer: shutting down"))?;
                let expected = Expected { diff_id: Some(diff_id.clone()), ..expected };
                let (store, files, limits, token) = (inner.layers.clone(), files.clone(), inner.config.limits, threads.token());
                let unpack = move || {
                    let _token = token;
                    store.stage(files.source(&member)?, &expected, limits).map(Arc::new)
                };
                blocking::run("unpack layer", unpack).await
            })
            .await?;
        tell(PullEvent::Unpacked { layer: index });
        flights.push(flight);
    }
    let config_json = String::from_utf8(wanted.config).map_err(|e| Error::with(Kind::DataLoss, "read image configuration", e))?;
    let mut digests: Vec<String> = wanted.names.iter().filter_map(|n| wanted.manifest.as_ref().map(|m| n.repo_digest(m))).collect();
    digests.dedup();
    let image = Image {
        id: ImageId::from_string(wanted.config_digest.as_str()),
        repo_tags: wanted.names.iter().filter_map(Reference::repo_tag).collect(),
        repo_digests: digests,
        layers,
        config: parsed.config,
        config_json,
        size: 0,
        pinned: false,
    };
    pull::commit(inner, image, flights, hold).await
}

// --- what an archive says

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// All images in the archive, with their documents verified.
fn find(inner: &Inner, files: &Files) -> Result<Vec<Wanted>> {
    let limit = inner.config.limits.manifest_bytes;
    // Newer `docker save` writes both forms; the OCI one carries digests of everything.
    if files.has("index.json") && files.has("oci-layout") {
        let mut wanted = Vec::new();
        let Document::Index(entries) = manifest::parse(&files.read("index.json", limit)?, None, &inner.config.limits)? else {
            return Err(Error::invalid("read image layout: index.json is no index"));
        };
        for entry in &entries {
            if let Some(image) = oci_image(inner, files, entry)? {
                wanted.push(image);
            }
        }
        return if wanted.is_empty() { Err(Error::not_found("read image layout: no image for this platform")) } else { Ok(wanted) };
    }
    if files.has("manifest.json") {
        let entries: Vec<DockerEntry> =
            serde_json::from_slice(&files.read("manifest.json", limit)?).map_err(|e| Error::with(Kind::DataLoss, "read manifest.json", e))?;
        return entries.into_iter().map(|entry| docker_image(inner, files, entry)).collect();
    }
    if files.has("repositories") {
        return legacy::find(inner, files);
    }
    Err(Error::invalid("it is neither an OCI image layout nor a docker archive"))
}

fn docker_image(inner: &Inner, files: &Files, entry: DockerEntry) -> Result<Wanted> {
    if entry.layers.len() > inner.config.limits.layers {
        return Err(Error::new(Kind::ResourceExhausted, format!("read manifest.json: {} layers", entry.layers.len())));
    }
    let config = files.read(&entry.config, inner.config.limits.manifest_bytes)?;
    let config_digest = Hasher::of(&config, None)?;
    // Old archives name the file by the digest, new ones lie in `blobs/sha256/`; either promises what it contains.
    let stem = entry.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
    if let Ok(promised) = Digest::sha256(stem)
        && promised != config_digest
    {
        return Err(Error::new(Kind::DataLoss, format!("read {}: digest is {config_digest}", entry.config)));
    }
    let names = entry.repo_tags.unwrap_or_default().iter().map(|t| t.parse().map(|name| inner.config.qualify_or_keep(name))).collect::<Result<_>>()?;
    let layers = entry.layers.into_iter().map(|member| (member, Expected::default())).collect();
    Ok(Wanted { names, tag: None, manifest: None, config, config_digest, layers })
}

fn oci_image(inner: &Inner, files: &Files, top: &Descriptor) -> Result<Option<Wanted>> {
    let limits = &inner.config.limits;
    let mut entry = top.clone();
    for _ in 0..MAX_INDEX_DEPTH {
        let bytes = files.blob(&entry, limits.manifest_bytes)?;
        let served = (!entry.media_type.is_empty()).then_some(entry.media_type.as_str());
        match manifest::parse(&bytes, served, limits)? {
            Document::Index(entries) => match manifest::choose(&entries, &inner.platform) {
                Ok(chosen) => entry = chosen.clone(),
                Err(e) if e.kind == Kind::NotFound => return Ok(None),
                Err(e) => return Err(e),
            },
            Document::Legacy(_) => return Err(Error::new(Kind::DataLoss, "read image layout: layouts have no schema 1 manifests")),
            Document::Manifest { config, layers } => {
                let expected = |d: &Descriptor| Expected { blob: Some(d.digest.clone()), size: Some(d.size), diff_id: None };
                return Ok(Some(Wanted {
                    names: name_of(top).map(|name| inner.config.qualify_or_keep(name)).into_iter().collect(),
                    tag: tag_of(top),
                    manifest: Some(top.digest.clone()),
                    config: files.blob(&config, limits.manifest_bytes)?,
                    config_digest: config.digest,
                    layers: layers.iter().map(|d| (blob_path(&d.digest), expected(d))).collect(),
                }));
            }
        }
    }
    Err(Error::new(Kind::DataLoss, "read image layout: indexes nested too deeply"))
}

/// The image's name, if the archive gives a full one. A tag alone names nothing.
fn name_of(entry: &Descriptor) -> Option<Reference> {
    let annotations = entry.annotations.as_ref()?;
    let full = annotations.get(NAME).or_else(|| annotations.get(REF_NAME).filter(|n| n.contains([':', '/'])))?;
    full.parse().ok()
}

/// The tag, if the archive gives that alone.
fn tag_of(entry: &Descriptor) -> Option<String> {
    entry.annotations.as_ref()?.get(REF_NAME).filter(|n| !n.contains([':', '/'])).cloned()
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}
