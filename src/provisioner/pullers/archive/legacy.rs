//! What `docker save` wrote before it had a manifest: a `repositories` file with the topmost layer of each tag, and a directory a
//! layer with its archive and a JSON document that names the layer below. It is the history of schema 1 in other clothes, and is
//! read as such. Diff ids are nowhere written: the archives are hashed once before they are unpacked.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;

use serde::Deserialize;
use serde_json::json;

use super::super::schema1;
use super::files::Files;
use super::{Wanted, manifest};
use crate::model::Reference;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::engine::Inner;
use crate::provisioner::unpack::{Expected, Hasher};

/// Layers with and without files below one tag: what one image may have of the former, and as many again.
const MAX_CHAIN: usize = 1000;

#[derive(Deserialize)]
struct Link {
    parent: Option<String>,
}

/// All images that `repositories` names.
pub(super) fn find(inner: &Inner, files: &Files) -> Result<Vec<Wanted>> {
    let limit = inner.config.limits.manifest_bytes;
    let bytes = files.read("repositories", limit)?;
    let repositories: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_slice(&bytes).map_err(|e| Error::with(Kind::DataLoss, "read repositories", e))?;
    // Tags of one image are one image.
    let mut tops: BTreeMap<&str, Vec<Reference>> = BTreeMap::new();
    for (repository, tags) in &repositories {
        for (tag, top) in tags {
            let name: Reference = format!("{repository}:{tag}").parse()?;
            tops.entry(top).or_default().push(inner.config.qualify_or_keep(name));
        }
    }
    tops.into_iter().map(|(top, names)| image(inner, files, top, names)).collect()
}

fn image(inner: &Inner, files: &Files, top: &str, names: Vec<Reference>) -> Result<Wanted> {
    let limits = &inner.config.limits;
    let mut next = Some(top.to_owned());
    let mut seen = HashSet::new();
    let (mut layers, mut fs_layers, mut history) = (Vec::new(), Vec::new(), Vec::new());
    let mut bytes = 0;
    while let Some(id) = next {
        let text = files.read(&format!("{id}/json"), limits.manifest_bytes)?;
        bytes += text.len() as u64;
        if !seen.insert(id.clone()) || seen.len() > MAX_CHAIN || bytes > limits.manifest_bytes {
            return Err(Error::new(Kind::ResourceExhausted, format!("read {id}/json: the layers below {top} do not end, or are too many")));
        }
        let link: Link = serde_json::from_slice(&text).map_err(|e| Error::with(Kind::DataLoss, format!("read {id}/json"), e))?;
        let member = format!("{id}/layer.tar");
        let digest = hash(files, &member)?;
        let text = String::from_utf8(text).map_err(|e| Error::with(Kind::DataLoss, format!("read {id}/json"), e))?;
        fs_layers.push(json!({"blobSum": digest.as_str()}));
        history.push(json!({"v1Compatibility": text}));
        layers.push((member, digest));
        next = link.parent.filter(|p| !p.is_empty());
    }
    // Both lists are from the top down, as the schema wants them.
    let document = json!({"schemaVersion": 1, "fsLayers": fs_layers, "history": history}).to_string();
    let legacy = schema1::parse(document.as_bytes(), limits)?;
    layers.reverse();
    // The schema drops layers that are said to be empty.
    let mut kept = legacy.layers.iter().peekable();
    layers.retain(|(_, digest)| kept.next_if(|k| *k == digest).is_some());
    if layers.len() != legacy.layers.len() {
        return Err(manifest::bad("its layers and its history disagree"));
    }
    let config = schema1::configuration(&legacy, &legacy.layers)?.into_bytes();
    let config_digest = Hasher::of(&config, None)?;
    let layers = layers.into_iter().map(|(member, digest)| (member, Expected { diff_id: Some(digest), ..Expected::default() })).collect();
    Ok(Wanted { names, tag: None, manifest: None, config, config_digest, layers })
}

fn hash(files: &Files, member: &str) -> Result<crate::model::Digest> {
    let mut reader = files.reader(member)?;
    let mut hasher = Hasher::new("sha256");
    let mut buffer = vec![0; 128 << 10];
    loop {
        match reader.read(&mut buffer).act("read", member)? {
            0 => return hasher.finish(),
            n => hasher.update(&buffer[..n]),
        }
    }
}
