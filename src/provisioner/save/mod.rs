//! Images of the store as archives: an OCI layout, or what `docker save` writes, in one stream.
//!
//! The store keeps files, not the blobs they came in, so layers are archived anew ([`layer`]), uncompressed. Their digests differ
//! from those that were pulled, and so do the configuration, which lists them, and the image's id. Saved again after it was
//! loaded, an image stays the same to the byte.
//!
//! A tar stream must say how long a member is, and a layout what its digest is, before the member begins: each layer is written
//! twice, once to nowhere. That reads the files twice, mostly from memory, and takes no room on disk.

pub mod layer;

use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::engine::Inner;
use super::pullers::artifact;
use super::pullers::manifest::{OCI_INDEX, OCI_MANIFEST};
use super::unpack::Hasher;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::Image;
use crate::model::{Digest, Reference};
use crate::stdx::blocking;

/// Media type of a configuration.
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of an uncompressed layer.
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Bytes handed over at a time.
const PIECE: usize = 256 << 10;
/// Images in one archive.
const MAX_IMAGES: usize = 1000;

/// The form of an archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// OCI image layout.
    #[default]
    Oci,
    /// The same with the `manifest.json` that Docker reads, as Docker itself writes it today.
    Docker,
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "oci" => Ok(Self::Oci),
            "docker" => Ok(Self::Docker),
            _ => Err(Error::invalid(format!("read format {text:?}: neither oci nor docker"))),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Oci => "oci",
            Self::Docker => "docker",
        })
    }
}

/// Sends the images that `keys` name to `to` as one archive. Ends early when nobody listens any more.
///
/// # Errors
/// `NotFound` for an image that is not in the store, `DataLoss` when a layer is known to be damaged, I/O failures.
pub(super) async fn save(inner: &Arc<Inner>, keys: Vec<String>, format: Format, to: mpsc::Sender<Bytes>) -> Result<()> {
    let inner = inner.clone();
    blocking::run("save images", move || {
        if keys.is_empty() || keys.len() > MAX_IMAGES {
            return Err(Error::invalid(format!("save {} images: between 1 and {MAX_IMAGES} are saved at once", keys.len())));
        }
        let mut images: Vec<(Arc<Image>, Vec<String>)> = Vec::new();
        for key in &keys {
            let image = inner.images.resolve(&inner.key(key)).ok_or_else(|| Error::not_found(format!("save {key}: it is not in the store")))?;
            if artifact::is_artifact(&image) {
                let why = "it is an artifact, whose files cannot be told from its manifest any more; copy it with a registry's tools";
                return Err(Error::new(Kind::Unimplemented, format!("save {key}: {why}")));
            }
            if image.config.appc.is_some() {
                let why = "it is an appc image, whose manifest no other tool takes for a configuration; copy its archives";
                return Err(Error::new(Kind::Unimplemented, format!("save {key}: {why}")));
            }
            let names = names(&inner, key, &image);
            match images.iter_mut().find(|(i, _)| i.id == image.id) {
                Some((_, known)) => known.extend(names.into_iter().filter(|n| !known.contains(n)).collect::<Vec<_>>()),
                None => images.push((image, names)),
            }
        }
        let _hold = inner.layers.hold(images.iter().flat_map(|(image, _)| image.layers.iter().map(|l| l.diff_id.clone())));
        let mut archive = Archive { inner: &inner, out: Tar::new(Pieces { to, piece: Vec::with_capacity(PIECE) }), layers: HashMap::new() };
        archive.write(&images, format).map_err(|e| e.within(format!("save {}", keys.join(" "))))
    })
    .await
}

/// Under which names `key` is saved: the one asked for, or all if it was asked for by id.
fn names(inner: &Inner, key: &str, image: &Image) -> Vec<String> {
    let full = inner.key(key);
    let asked = full.parse::<Reference>().ok().and_then(|r| r.repo_tag());
    match asked.filter(|name| image.repo_tags.contains(name)) {
        Some(name) => vec![name],
        None => image.repo_tags.clone(),
    }
}

struct Archive<'a> {
    inner: &'a Inner,
    out: Tar,
    /// New digest and length by diff id; those that are in the archive already.
    layers: HashMap<Digest, (Digest, u64)>,
}

impl Archive<'_> {
    fn write(&mut self, images: &[(Arc<Image>, Vec<String>)], format: Format) -> Result<()> {
        let several_of_a_tag = {
            let mut tags: Vec<&str> = images.iter().flat_map(|(_, names)| names).filter_map(|n| n.rsplit(':').next()).collect();
            let all = tags.len();
            tags.sort_unstable();
            tags.dedup();
            tags.len() < all
        };
        self.out.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        self.out.directory("blobs/")?;
        self.out.directory("blobs/sha256/")?;
        let (mut manifests, mut entries) = (Vec::new(), Vec::new());
        for (image, names) in images {
            let (descriptor, entry) = self.image(image, names)?;
            entries.push(entry);
            if names.is_empty() {
                manifests.push(descriptor.clone());
            }
            for name in names {
                let tag = name.rsplit(':').next().unwrap_or(name);
                // Tools find an image in a layout by this: by its tag where that is enough.
                let short = if several_of_a_tag { name } else { tag };
                let mut descriptor = descriptor.clone();
                descriptor["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": short});
                manifests.push(descriptor);
            }
        }
        if format == Format::Docker {
            self.out.file("manifest.json", Value::from(entries).to_string().as_bytes())?;
        }
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests});
        self.out.file("index.json", index.to_string().as_bytes())?;
        self.out.end()
    }

    /// Writes the blobs of one image; its descriptor, and its entry for Docker.
    fn image(&mut self, image: &Image, names: &[String]) -> Result<(Value, Value)> {
        let diff_ids: Vec<Digest> = image.layers.iter().map(|l| l.diff_id.clone()).collect();
        self.inner.check_layers(&diff_ids, &image.id, None)?;
        let mut layers = Vec::new();
        for diff_id in &diff_ids {
            layers.push(self.layer(diff_id)?);
        }
        let config = configuration(image, &diff_ids, &layers)?;
        let (config_digest, config_size) = self.blob(config.as_bytes())?;
        let described: Vec<Value> = layers.iter().map(|(digest, size)| json!({"mediaType": LAYER, "digest": digest.as_str(), "size": size})).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": CONFIG, "digest": config_digest.as_str(), "size": config_size},
            "layers": described,
        });
        let (digest, size) = self.blob(manifest.to_string().as_bytes())?;
        let descriptor = json!({"mediaType": OCI_MANIFEST, "digest": digest.as_str(), "size": size});
        let paths: Vec<String> = layers.iter().map(|(digest, _)| blob_path(digest)).collect();
        Ok((descriptor, json!({"Config": blob_path(&config_digest), "RepoTags": names, "Layers": paths})))
    }

    /// Writes a layer unless the archive has it; its digest and length.
    fn layer(&mut self, diff_id: &Digest) -> Result<(Digest, u64)> {
        if let Some(known) = self.layers.get(diff_id) {
            return Ok(known.clone());
        }
        let record = self.inner.layers.get(diff_id).ok_or_else(|| Error::not_found(format!("archive layer {diff_id}: it is gone")))?;
        let files = self.inner.layers.files(diff_id);
        let mut counted = Counted { hasher: Hasher::new("sha256"), bytes: 0 };
        layer::write(&files, &record.implied, &mut counted)?;
        let (digest, size) = (counted.hasher.finish()?, counted.bytes);
        if !self.layers.values().any(|(known, _)| *known == digest) {
            self.out.begin(&blob_path(&digest), size)?;
            let mut again = Both { counted: Counted { hasher: Hasher::new("sha256"), bytes: 0 }, out: &mut self.out };
            layer::write(&files, &record.implied, &mut again)?;
            // Nothing that lies in the store changes; if it does all the same, the archive is worthless.
            if (again.counted.hasher.finish()?, again.counted.bytes) != (digest.clone(), size) {
                return Err(Error::new(Kind::DataLoss, format!("archive layer {diff_id}: it changed while it was read")));
            }
            self.out.pad(size)?;
        }
        self.layers.insert(diff_id.clone(), (digest.clone(), size));
        Ok((digest, size))
    }

    fn blob(&mut self, bytes: &[u8]) -> Result<(Digest, u64)> {
        let digest = Hasher::of(bytes, None)?;
        self.out.file(&blob_path(&digest), bytes)?;
        Ok((digest, bytes.len() as u64))
    }
}

/// The configuration with the diff ids of the new archives; the very same if those are what they were.
fn configuration(image: &Image, before: &[Digest], layers: &[(Digest, u64)]) -> Result<String> {
    if before.iter().eq(layers.iter().map(|(digest, _)| digest)) {
        return Ok(image.config_json.clone());
    }
    let mut config: Value = serde_json::from_str(&image.config_json).map_err(|e| Error::with(Kind::DataLoss, "read image configuration", e))?;
    let ids: Vec<&str> = layers.iter().map(|(digest, _)| digest.as_str()).collect();
    let Some(object) = config.as_object_mut() else { return Err(Error::new(Kind::DataLoss, "read image configuration: no object")) };
    object.insert("rootfs".to_owned(), json!({"type": "layers", "diff_ids": ids}));
    Ok(config.to_string())
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// Knows digest and length of what goes by.
struct Counted {
    hasher: Hasher,
    bytes: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Both<'a> {
    counted: Counted,
    out: &'a mut Tar,
}

impl Write for Both<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.counted.write_all(bytes)?;
        self.out.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The outer archive. Members are as plain as can be: names are short, times and owners are zero.
struct Tar {
    out: Pieces,
}

impl Tar {
    fn new(out: Pieces) -> Self {
        Self { out }
    }

    fn header(&mut self, name: &str, kind: tar::EntryType, mode: u32, size: u64) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_path(name).act("archive", name)?;
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header.set_cksum();
        self.put(header.as_bytes())
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        self.header(name, tar::EntryType::Directory, 0o755, 0)
    }

    fn begin(&mut self, name: &str, size: u64) -> Result<()> {
        self.header(name, tar::EntryType::Regular, 0o644, size)
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.begin(name, bytes.len() as u64)?;
        self.put(bytes)?;
        self.pad(bytes.len() as u64)
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let rest = usize::try_from(size.next_multiple_of(512) - size).unwrap_or(0);
        self.put(&[0; 512][..rest])
    }

    fn end(&mut self) -> Result<()> {
        self.put(&[0; 1024])?;
        self.out.flush().act("send", "archive")
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).act("send", "archive")
    }
}

/// Hands over what is written piece by piece.
struct Pieces {
    to: mpsc::Sender<Bytes>,
    piece: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        if !piece.is_empty() {
            self.to.blocking_send(piece.into()).map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
