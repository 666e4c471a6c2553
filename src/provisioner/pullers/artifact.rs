//! OCI artifacts: manifests whose layers are not archives of a root filesystem but files of any kind, a model, a chart, a web page.
//! They are kept like images, each file a layer of its own with that one file in it, so that the store, its sharing, its leases
//! and its collector need to know nothing of them; they are of use as volumes.
//!
//! What a file is called says its `title` annotation; one without it is called by its digest. Layers that are archives of a
//! directory and say that they are to be unpacked, are. The image's id is the digest of the manifest: artifacts have no
//! configuration of their own, most share the empty one.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use serde::Deserialize;

use super::manifest::Descriptor;
use crate::model::Digest;
use crate::model::error::{Error, Kind, Result};
use crate::model::image::{Image, ImageConfig};
use crate::provisioner::unpack::{Hasher, Source};

/// What the file is called, by the OCI image specification.
const TITLE: &str = "org.opencontainers.image.title";
/// Set to `true` on archives that are to be unpacked, by the tool that most artifacts are made with.
const UNPACK: &str = "io.deis.oras.content.unpack";
/// A layer that stands for nothing.
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Configurations of images. What is none of these is an artifact; registries of old leave the type out or say it is just bytes.
const IMAGE_CONFIGS: &[&str] = &["", "application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json", "application/octet-stream"];
/// Longest name, with its directories.
const MAX_NAME: usize = 4096;
/// Longest part of a name.
const MAX_PART: usize = 255;
/// Size of a tar block.
const BLOCK: usize = 512;
/// Longest name that a header holds.
const SHORT_NAME: usize = 100;
/// Largest file: what the twelve octal digits of a header hold, less one.
const MAX_FILE: u64 = 0o77_777_777_777;

/// Whether an image with this configuration is none.
pub fn is_config_of_artifact(config: &Descriptor) -> bool {
    // Test registries and hand-made images have types without a slash.
    config.media_type.contains('/') && !IMAGE_CONFIGS.contains(&config.media_type.as_str())
}

/// Whether an image of the store is an artifact: its document is then a manifest.
pub fn is_artifact(image: &Image) -> bool {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Manifest {
        schema_version: Option<u32>,
        layers: Option<serde::de::IgnoredAny>,
    }
    image.config_json.contains("\"schemaVersion\"")
        && serde_json::from_str::<Manifest>(&image.config_json).is_ok_and(|m| m.schema_version.is_some() && m.layers.is_some())
}

/// The layers that have something in them.
pub fn layers(layers: Vec<Descriptor>) -> Vec<Descriptor> {
    layers.into_iter().filter(|l| l.media_type != EMPTY).collect()
}

/// What of the manifest can be told of an artifact.
pub fn config(manifest: &[u8]) -> Result<ImageConfig> {
    #[derive(Deserialize)]
    struct Annotated {
        annotations: Option<BTreeMap<String, String>>,
    }
    let annotated: Annotated = serde_json::from_slice(manifest).map_err(|e| Error::with(Kind::DataLoss, "read manifest", e))?;
    let labels = annotated.annotations.unwrap_or_default();
    let created = labels.get("org.opencontainers.image.created").cloned().unwrap_or_default();
    Ok(ImageConfig { labels, created, ..ImageConfig::default() })
}

/// The name of the file that a layer is; `None`: an archive to unpack.
///
/// # Errors
/// `DataLoss` for names that lead out of the volume or that no file can have.
pub fn file_name(layer: &Descriptor) -> Result<Option<String>> {
    let annotation = |key: &str| layer.annotations.as_ref().and_then(|a| a.get(key)).map(String::as_str).filter(|v| !v.is_empty());
    let is_archive = layer.media_type.contains(".tar") && layer.media_type.contains("layer");
    if annotation(UNPACK) == Some("true") || (is_archive && annotation(TITLE).is_none()) {
        return Ok(None);
    }
    let Some(title) = annotation(TITLE) else {
        return Ok(Some(format!("{}-{}", layer.digest.algorithm(), layer.digest.hex())));
    };
    let bad =
        |part: &str| part.is_empty() || part == "." || part == ".." || part.len() > MAX_PART || part.starts_with(".wh.") || part.contains(char::is_control);
    if title.len() > MAX_NAME || title.split('/').any(bad) {
        let shown: String = title.chars().take(100).collect();
        return Err(Error::new(Kind::DataLoss, format!("read manifest: {shown:?} is no name for a file of an artifact")));
    }
    Ok(Some(title.to_owned()))
}

/// Names a layer that is not known by its diff id yet: the same bytes under two names are two layers.
///
/// # Errors
/// None in practice.
pub fn key(name: &str, blob: &Digest) -> Result<Digest> {
    Hasher::of(format!("file {name} {blob}").as_bytes(), None)
}

/// The file as an archive with nothing else in it. The bytes are verified as they pass, since what is unpacked is no longer they.
///
/// # Errors
/// `ResourceExhausted` for a file that no archive holds.
pub fn archive<'a>(name: &str, blob: &Descriptor, mut source: Source<'a>) -> Result<Source<'a>> {
    if blob.size > MAX_FILE {
        return Err(Error::new(Kind::ResourceExhausted, format!("fetch {name:?}: {} bytes", blob.size)));
    }
    let head = head(name, blob.size);
    let padding = usize::try_from(blob.size.next_multiple_of(BLOCK as u64) - blob.size).unwrap_or(0);
    let (digest, size) = (blob.digest.clone(), blob.size);
    let mut hasher = Some(Hasher::new(digest.algorithm()));
    let (mut head, mut done) = (Some(head), 0);
    Ok(Box::new(move || {
        if let Some(head) = head.take() {
            return Ok(Some(head.into()));
        }
        let Some(running) = hasher.as_mut() else { return Ok(None) };
        let wrong = |what: String| io::Error::other(Error::new(Kind::DataLoss, format!("verify {digest}: {what}")));
        if let Some(piece) = source()? {
            done += piece.len() as u64;
            if done > size {
                return Err(wrong(format!("more than the {size} bytes of its descriptor")));
            }
            running.update(&piece);
            return Ok(Some(piece));
        }
        let found = match hasher.take() {
            Some(hasher) => hasher.finish().map_err(io::Error::other)?,
            None => return Ok(None),
        };
        if found != digest || done != size {
            return Err(wrong(format!("{done} bytes with digest {found}, its descriptor says {size}")));
        }
        Ok(Some(Bytes::from(vec![0; padding + 2 * BLOCK])))
    }))
}

/// Header of a regular file that anybody may read, with what a long name needs before it.
fn head(name: &str, size: u64) -> Vec<u8> {
    // "./" keeps a name from looking like the beginning of something compressed.
    let name = format!("./{name}").into_bytes();
    let mut out = Vec::new();
    if name.len() > SHORT_NAME {
        out.extend_from_slice(header(tar::EntryType::GNULongName, b"././@LongLink", name.len() as u64).as_bytes());
        let at = out.len();
        out.extend_from_slice(&name);
        out.resize(at + name.len().next_multiple_of(BLOCK), 0);
    }
    out.extend_from_slice(header(tar::EntryType::Regular, &name[..name.len().min(SHORT_NAME)], size).as_bytes());
    out
}

fn header(kind: tar::EntryType, name: &[u8], size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provisioner::config::Limits;
    use crate::provisioner::unpack::{Expected, Form, file_source, unpack};

    fn layer(bytes: &[u8], media_type: &str, annotations: &[(&str, &str)]) -> Descriptor {
        let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Descriptor {
            media_type: media_type.to_owned(),
            digest: Hasher::of(bytes, None).unwrap(),
            size: bytes.len() as u64,
            platform: None,
            annotations: Some(annotations),
        }
    }

    #[test]
    fn names_of_files() {
        let named = |title: &str| file_name(&layer(b"x", "application/x", &[(TITLE, title)])).map_err(|e| e.kind);
        for good in ["model.bin", "a/b/c", "a b", ".hidden", "x..y", "ä"] {
            assert_eq!(named(good).unwrap().as_deref(), Some(good));
        }
        for bad in ["/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/", ".wh.x", "a/.wh..wh..opq", "a\nb", &"x".repeat(256), &"x/".repeat(3000)] {
            assert_eq!(named(bad).unwrap_err(), Kind::DataLoss, "{bad:?}");
        }
        let digest = layer(b"x", "application/x", &[]).digest;
        assert_eq!(named("").unwrap().unwrap(), format!("sha256-{}", digest.hex()));
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        for (annotations, unpacked) in
            [(&[][..], true), (&[(TITLE, "d"), (UNPACK, "true")][..], true), (&[(TITLE, "d.tgz")][..], false), (&[(TITLE, "d.tgz"), (UNPACK, "no")][..], false)]
        {
            assert_eq!(file_name(&layer(b"x", tar, annotations)).unwrap().is_none(), unpacked, "{annotations:?}");
        }
    }

    #[test]
    fn a_file_becomes_a_layer_and_a_lie_does_not() {
        for name in ["f".to_owned(), "a/b".to_owned(), "n".repeat(99), "n".repeat(200), format!("{}/{}", "d".repeat(200), "ä".repeat(100))] {
            for bytes in [&b""[..], b"x", &[7; 512], &[9; 100_000]] {
                let blob = layer(bytes, "application/x", &[]);
                let run = |blob: &Descriptor, bytes: &'static [u8]| {
                    let dir = tempfile::tempdir().unwrap();
                    let source = archive(&name, blob, file_source(bytes)).unwrap();
                    let done = unpack(source, dir.path(), Form::Directory, &Expected::default(), Limits::default());
                    done.map(|d| (d.diff_id, std::fs::read(dir.path().join(&name)).unwrap()))
                };
                let bytes: &'static [u8] = bytes.to_vec().leak();
                let (diff_id, read) = run(&blob, bytes).unwrap();
                assert_eq!(read, bytes);
                assert_eq!(run(&blob, bytes).unwrap().0, diff_id);
                let longer: &'static [u8] = [bytes, b"!"].concat().leak();
                assert_eq!(run(&blob, longer).unwrap_err().kind, Kind::DataLoss);
                let other = Descriptor { digest: Hasher::of(b"other", None).unwrap(), ..blob };
                assert_eq!(run(&other, bytes).unwrap_err().kind, Kind::DataLoss);
            }
        }
    }
}
