//! Imports images from archives: what `docker save` writes (of any age) and OCI image layouts, as a tar file, maybe
//! compressed, or as a directory. Layers go through the same verified unpacking as those of a registry.
//!
//! Members of a tar file are found by one pass that notes where each begins; their bytes are then read in place. A compressed
//! archive is first decompressed into staging: its members cannot be sought. Nothing in an archive is trusted to be where or
//! what another part says: sizes and digests are checked as they are read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::manifest::{self, Descriptor, Document};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::{Image, Layer};
use crate::model::{Digest, ImageId, Reference};
use crate::provisioner::engine::Inner;
use crate::provisioner::pull;
use crate::provisioner::unpack::tar::{Reader, What};
use crate::provisioner::unpack::{Expected, Hasher, Source, file_source};
use crate::stdx::blocking;

/// Members of one archive; the largest real ones have some thousands.
const MAX_MEMBERS: usize = 100_000;
/// Nested indexes followed.
const MAX_INDEX_DEPTH: usize = 3;
/// Annotation under which `docker save`, `ctr export` and `buildah push` put the full name.
const NAME: &str = "io.containerd.image.name";
/// Annotation under which OCI tools put a name or a tag alone.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Imports every image at `path`.
///
/// # Errors
/// As [`crate::provisioner::Images::load`].
pub(in crate::provisioner) async fn load(inner: &Arc<Inner>, path: &Path) -> Result<Vec<ImageId>> {
    let (opened, shown) = (inner.clone(), path.to_owned());
    let path = path.to_owned();
    let (files, wanted) = blocking::run("read image archive", move || {
        let files = Files::open(&opened, &path)?;
        let wanted = find(&opened, &files).map_err(|e| e.within(format!("load {}", path.display())))?;
        Ok::<_, Error>((Arc::new(files), wanted))
    })
    .await?;
    let mut ids = Vec::new();
    for image in wanted {
        let result = import(inner, files.clone(), image).await;
        if result.is_err() {
            let inner = inner.clone();
            if let Err(e) = blocking::run("collect garbage", move || inner.collect()).await {
                tracing::warn!(error = %e, "cleaning up after a failed import");
            }
        }
        ids.push(result.map_err(|e| e.within(format!("load {}", shown.display())))?);
    }
    Ok(ids)
}

/// An image to import.
struct Wanted {
    names: Vec<Reference>,
    /// Digest of its manifest, if the archive has one.
    manifest: Option<Digest>,
    config: Vec<u8>,
    config_digest: Digest,
    /// Member and what its bytes must be, lowest layer first.
    layers: Vec<(String, Expected)>,
}

async fn import(inner: &Arc<Inner>, files: Arc<Files>, wanted: Wanted) -> Result<ImageId> {
    let parsed = manifest::configuration(&wanted.config, wanted.layers.len(), &inner.platform)?;
    let hold = inner.layers.hold(parsed.diff_ids.iter().cloned());
    let mut flights = Vec::new();
    let mut layers = Vec::new();
    for ((member, expected), diff_id) in wanted.layers.into_iter().zip(&parsed.diff_ids) {
        let size = files.size(&member).unwrap_or(0);
        layers.push(Layer { diff_id: diff_id.clone(), blob: expected.blob.clone(), blob_size: size });
        if inner.layers.contains(diff_id) {
            continue;
        }
        let flight = inner.layers.flight(diff_id);
        flight
            .get_or_try_init(|| async {
                let _permit = inner.layer_permits.acquire().await.map_err(|_| Error::internal("load layer: shutting down"))?;
                let expected = Expected { diff_id: Some(diff_id.clone()), ..expected };
                let (store, files, limits) = (inner.layers.clone(), files.clone(), inner.config.limits);
                blocking::run("unpack layer", move || store.stage(files.source(&member)?, &expected, limits).map(Arc::new)).await
            })
            .await?;
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
    Ok(Wanted { names, manifest: None, config, config_digest, layers })
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

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

// --- where the bytes are

/// Files of an archive by name.
enum Files {
    /// A directory; names are checked before they are joined.
    Directory(PathBuf),
    /// A tar file: where each member begins and how long it is. The file may be an unnamed temporary.
    Tar { file: File, members: HashMap<String, (u64, u64)> },
}

impl Files {
    fn open(inner: &Inner, path: &Path) -> Result<Self> {
        let meta = match std::fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(Error::not_found(format!("open {}", path.display()))),
            other => other.act("open", path.display())?,
        };
        if meta.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        if !meta.is_file() {
            return Err(Error::invalid(format!("open {}: neither a file nor a directory", path.display())));
        }
        let mut file = File::open(path).act("open", path.display())?;
        let mut magic = [0u8; 4];
        let n = file.read(&mut magic).act("read", path.display())?;
        file.seek(SeekFrom::Start(0)).act("seek in", path.display())?;
        let file = match magic.get(..n) {
            Some([0x1f, 0x8b, ..]) => spool(inner, flate2::read::MultiGzDecoder::new(file))?,
            Some([0x28, 0xb5, 0x2f, 0xfd]) => spool(inner, zstd::Decoder::new(file).act("decompress", path.display())?)?,
            _ => file,
        };
        let members =
            index(&file).map_err(|e| if e.kind == Kind::DataLoss { Error::with(Kind::InvalidArgument, format!("read {}", path.display()), e) } else { e })?;
        Ok(Self::Tar { file, members })
    }

    fn has(&self, name: &str) -> bool {
        self.size(name).is_some()
    }

    fn size(&self, name: &str) -> Option<u64> {
        match self {
            Self::Directory(dir) => {
                std::fs::symlink_metadata(crate::disk::layout::below(dir, Path::new(name))?).ok().filter(std::fs::Metadata::is_file).map(|m| m.len())
            }
            Self::Tar { members, .. } => members.get(name).map(|(_, size)| *size),
        }
    }

    fn reader(&self, name: &str) -> Result<Box<dyn Read + Send + '_>> {
        let missing = || Error::new(Kind::DataLoss, format!("read {name:?}: the archive does not have it"));
        match self {
            Self::Directory(dir) => {
                let path = crate::disk::layout::below(dir, Path::new(name)).filter(|_| self.has(name)).ok_or_else(missing)?;
                Ok(Box::new(File::open(&path).act("open", path.display())?))
            }
            Self::Tar { file, members } => {
                let (at, left) = *members.get(name).ok_or_else(missing)?;
                Ok(Box::new(Member { file, at, left }))
            }
        }
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader(name)?.take(limit + 1).read_to_end(&mut bytes).act("read", name)?;
        if bytes.len() as u64 > limit { Err(Error::new(Kind::ResourceExhausted, format!("read {name}: longer than {limit} bytes"))) } else { Ok(bytes) }
    }

    fn blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>> {
        let bytes = self.read(&blob_path(&descriptor.digest), limit)?;
        let digest = Hasher::of(&bytes, Some(&descriptor.digest))?;
        if digest != descriptor.digest || bytes.len() as u64 != descriptor.size {
            return Err(Error::new(Kind::DataLoss, format!("verify {}: its bytes are {digest}", descriptor.digest)));
        }
        Ok(bytes)
    }

    fn source(&self, name: &str) -> Result<Source<'_>> {
        Ok(file_source(self.reader(name)?))
    }
}

/// A member read in place, so that several can be read at once.
struct Member<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Member<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(out.len());
        let n = std::os::unix::fs::FileExt::read_at(self.file, &mut out[..most], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// Decompresses into a temporary without a name on the store's file system.
fn spool(inner: &Inner, mut from: impl Read) -> Result<File> {
    let dir = inner.layout.staging();
    let mut file = tempfile::tempfile_in(&dir).act("create temporary in", dir.display())?;
    let limit = inner.config.limits.layer_bytes;
    let n = std::io::copy(&mut (&mut from).take(limit + 1), &mut file).act("decompress into", dir.display())?;
    if n > limit { Err(Error::new(Kind::ResourceExhausted, format!("decompress archive: more than {limit} bytes"))) } else { Ok(file) }
}

/// Notes where members begin. Old docker archives link layers that several images share; the link then stands for its target.
fn index(file: &File) -> Result<HashMap<String, (u64, u64)>> {
    let mut archive = Reader::new(Counted { inner: BufReader::with_capacity(64 << 10, Member { file, at: 0, left: u64::MAX }), at: 0 });
    let mut members = HashMap::new();
    let mut links = Vec::new();
    while let Some(entry) = archive.next_entry()? {
        let Ok(name) = String::from_utf8(entry.path) else { continue };
        let name = name.trim_start_matches("./").to_owned();
        match entry.what {
            What::File if entry.sparse.is_none() => {
                members.insert(name, (archive.input().at, entry.size));
            }
            What::Symlink | What::Hardlink => links.push((name, String::from_utf8_lossy(&entry.link).into_owned(), entry.what)),
            _ => {}
        }
        if members.len() + links.len() > MAX_MEMBERS {
            return Err(Error::new(Kind::ResourceExhausted, format!("read archive: more than {MAX_MEMBERS} members")));
        }
    }
    for (name, target, what) in links {
        let base = if what == What::Symlink { name.rsplit_once('/').map_or("", |(dir, _)| dir) } else { "" };
        let mut parts: Vec<&str> = base.split('/').filter(|p| !p.is_empty()).collect();
        for part in target.split('/').filter(|p| !p.is_empty() && *p != ".") {
            if part == ".." {
                parts.pop();
            } else {
                parts.push(part);
            }
        }
        if let Some(place) = members.get(&parts.join("/")).copied() {
            members.insert(name, place);
        }
    }
    Ok(members)
}

/// Knows how far it has read.
struct Counted<R> {
    inner: R,
    at: u64,
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(out)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        self.at += n as u64;
        self.inner.consume(n);
    }
}
