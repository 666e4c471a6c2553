//! Docker's first manifest, schema 1: layers and their history from the top down, the configuration hidden in the topmost
//! history entry, and signatures inside the document that they sign. Old registries have no other form.
//!
//! Its digest covers the payload: the document as it was before the signatures were put in, which the signatures tell how to
//! restore. Only that payload is read, so nothing that the digest does not cover has a meaning. The signatures themselves are
//! made with keys that come along with them and prove nothing; what makes the content the right one is the digest, or trust in
//! the registry that resolves the tag.
//!
//! It tells neither sizes nor diff ids. Sizes are asked from the registry, diff ids are found while unpacking, and the
//! configuration, whose digest is the image's id, is made from both: the same layers and history give the same id everywhere.

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::manifest::bad;
use crate::model::Digest;
use crate::model::error::{Error, Kind, Result};
use crate::provisioner::config::Limits;

/// Unsigned.
pub const PLAIN: &str = "application/vnd.docker.distribution.manifest.v1+json";
/// Signed.
pub const SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// The blob of a layer without entries, gzip: what Docker stored for instructions that change no files.
const EMPTY: &str = "sha256:a3ed95caeb02ffe68cdd9fd84406680ae93d633cb16422d00e8a7c22955b46d4";
/// Keys of a history entry that say where it stood and are no part of a configuration.
const OF_THE_ENTRY: &[&str] = &["id", "parent", "Size", "parent_id", "layer_id", "throwaway"];
/// Base64 for URLs, as signatures have it.
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&base64::alphabet::URL_SAFE, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

/// What a manifest says, lowest layer first.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Blobs of the layers that have files.
    pub layers: Vec<Digest>,
    history: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    /// The whole entry, a JSON object.
    object: Map<String, Value>,
    /// It has no layer.
    empty: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outer {
    schema_version: Option<u32>,
    signatures: Option<Vec<Signature>>,
}

#[derive(Deserialize)]
struct Signature {
    protected: String,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
struct Protected {
    format_length: usize,
    format_tail: String,
}

/// The payload of a signed manifest; `None` when `bytes` are not one.
///
/// # Errors
/// `DataLoss` when the signatures do not say, or disagree on, what they sign.
pub fn payload(bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    // Whatever else it is, the caller's parser will say.
    let Ok(Outer { schema_version: Some(1), signatures: Some(signatures) }) = serde_json::from_slice(bytes) else { return Ok(None) };
    let mut found: Option<Protected> = None;
    for signature in signatures {
        let text = BASE64.decode(&signature.protected).map_err(|e| Error::with(Kind::DataLoss, "read manifest: protected header of a signature", e))?;
        let protected: Protected =
            serde_json::from_slice(&text).map_err(|e| Error::with(Kind::DataLoss, "read manifest: protected header of a signature", e))?;
        if found.as_ref().is_some_and(|first| *first != protected) {
            return Err(bad("its signatures disagree on what they sign"));
        }
        found = Some(protected);
    }
    let Some(protected) = found else { return Ok(None) };
    let tail = BASE64.decode(&protected.format_tail).map_err(|e| Error::with(Kind::DataLoss, "read manifest: tail of the signed text", e))?;
    let head = bytes.get(..protected.format_length).ok_or_else(|| bad("the signed text is longer than the document"))?;
    Ok(Some([head, &tail].concat()))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    fs_layers: Vec<FsLayer>,
    history: Vec<History>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FsLayer {
    blob_sum: Digest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct History {
    v1_compatibility: String,
}

/// Reads a payload.
///
/// # Errors
/// `DataLoss` when malformed, `ResourceExhausted` beyond the limits.
pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Manifest> {
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| Error::with(Kind::DataLoss, "read manifest of schema 1", e))?;
    if raw.schema_version != 1 || raw.fs_layers.len() != raw.history.len() || raw.history.is_empty() {
        return Err(bad("schema 1 wants as many history entries as layers, at least one"));
    }
    let mut manifest = Manifest { layers: Vec::new(), history: Vec::new() };
    let mut below: Option<Value> = None;
    for (layer, history) in raw.fs_layers.into_iter().zip(raw.history).rev() {
        let object: Map<String, Value> =
            serde_json::from_str(&history.v1_compatibility).map_err(|e| Error::with(Kind::DataLoss, "read manifest: history entry of schema 1", e))?;
        // Old pushes repeated entries; the same id is the same layer.
        let id = object.get("id").cloned();
        if id.is_some() && id == below {
            continue;
        }
        below = id;
        let empty = object.get("throwaway").and_then(Value::as_bool).unwrap_or(false) || layer.blob_sum.as_str() == EMPTY;
        if !empty {
            manifest.layers.push(layer.blob_sum);
        }
        manifest.history.push(Entry { object, empty });
    }
    if manifest.layers.len() > limits.layers {
        return Err(Error::new(Kind::ResourceExhausted, format!("read manifest: {} layers, more than {}", manifest.layers.len(), limits.layers)));
    }
    Ok(manifest)
}

/// The configuration that this image would have had in the later form.
///
/// # Errors
/// `Internal` when there is not one diff id a layer.
pub fn configuration(manifest: &Manifest, diff_ids: &[Digest]) -> Result<String> {
    let (Some(top), true) = (manifest.history.last(), diff_ids.len() == manifest.layers.len()) else {
        return Err(Error::internal("make image configuration: diff ids are missing"));
    };
    let mut config = top.object.clone();
    for key in OF_THE_ENTRY {
        config.remove(*key);
    }
    config.entry("os").or_insert_with(|| json!("linux"));
    config.insert("rootfs".to_owned(), json!({"type": "layers", "diff_ids": diff_ids.iter().map(Digest::as_str).collect::<Vec<_>>()}));
    config.insert("history".to_owned(), manifest.history.iter().map(Entry::history).collect());
    Ok(Value::Object(config).to_string())
}

impl Entry {
    fn history(&self) -> Value {
        let mut history = Map::new();
        for key in ["created", "author", "comment"] {
            history.extend(self.object.get(key).filter(|v| v.as_str().is_some_and(|s| !s.is_empty())).map(|v| (key.to_owned(), v.clone())));
        }
        let words = self.object.get("container_config").and_then(|c| c.get("Cmd")).and_then(Value::as_array);
        let command: Vec<&str> = words.into_iter().flatten().filter_map(Value::as_str).collect();
        if !command.is_empty() {
            history.insert("created_by".to_owned(), command.join(" ").into());
        }
        if self.empty {
            history.insert("empty_layer".to_owned(), true.into());
        }
        Value::Object(history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provisioner::config::Platform;
    use crate::provisioner::pullers::manifest::{self, Document, OCI_MANIFEST};
    use crate::provisioner::unpack::Hasher;

    fn digest(c: char) -> Digest {
        format!("sha256:{}", c.to_string().repeat(64)).parse().unwrap()
    }

    fn plain() -> String {
        let entry = |text: &str| json!({"v1Compatibility": text});
        json!({
            "schemaVersion": 1, "name": "a", "tag": "1", "architecture": "amd64",
            "fsLayers": [{"blobSum": EMPTY}, {"blobSum": digest('b').as_str()}, {"blobSum": digest('b').as_str()}, {"blobSum": digest('a').as_str()}],
            "history": [
                entry(r#"{"id":"3","parent":"2","throwaway":true,"created":"t3","os":"linux","architecture":"amd64","config":{"Cmd":["sh"],"User":"7"},"container_config":{"Cmd":["/bin/sh","-c","x"]}}"#),
                entry(r#"{"id":"2","parent":"1","created":"t2"}"#),
                entry(r#"{"id":"2","parent":"1","created":"t2"}"#),
                entry(r#"{"id":"1","created":"t1","author":"me","Size":5}"#),
            ]
        })
        .to_string()
    }

    /// Signs as the format says; the key and the signature itself mean nothing.
    fn sign(payload: &str, protected: &[Value]) -> String {
        let end = payload.rfind('}').unwrap();
        let signatures: Vec<Value> =
            protected.iter().map(|p| json!({"header": {"alg": "ES256"}, "signature": "x", "protected": BASE64.encode(p.to_string())})).collect();
        format!("{},\"signatures\":{}}}", &payload[..end], Value::from(signatures))
    }

    fn protected(payload: &str) -> Value {
        let end = payload.rfind('}').unwrap();
        json!({"formatLength": end, "formatTail": BASE64.encode(&payload[end..]), "time": "t"})
    }

    #[test]
    fn layers_and_history_from_the_lowest_up() {
        let limits = Limits::default();
        for served in [None, Some(PLAIN), Some(SIGNED), Some("application/json; charset=utf-8")] {
            let Document::Legacy(parsed) = manifest::parse(plain().as_bytes(), served, &limits).unwrap() else { panic!() };
            assert_eq!(parsed.layers, [digest('a'), digest('b')]);
            let config = configuration(&parsed, &[digest('c'), digest('d')]).unwrap();
            let value: Value = serde_json::from_str(&config).unwrap();
            assert_eq!(
                value["history"],
                json!([{"created": "t1", "author": "me"}, {"created": "t2"}, {"created": "t3", "created_by": "/bin/sh -c x", "empty_layer": true}])
            );
            assert!(value.get("id").is_none() && value.get("throwaway").is_none());
            let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
            let read = manifest::configuration(config.as_bytes(), 2, &platform).unwrap();
            assert_eq!((read.config.user.as_str(), read.config.cmd, read.diff_ids), ("7", vec!["sh".to_owned()], vec![digest('c'), digest('d')]));
            assert_eq!(configuration(&parsed, &[digest('c'), digest('d')]).unwrap(), config);
            assert!(configuration(&parsed, &[digest('c')]).is_err());
        }
    }

    #[test]
    fn the_digest_covers_the_payload_and_only_the_payload_counts() {
        let text = plain();
        let signed = sign(&text, &[protected(&text), protected(&text)]);
        assert_eq!(payload(signed.as_bytes()).unwrap().unwrap(), text.as_bytes());
        assert_ne!(Hasher::of(signed.as_bytes(), None).unwrap(), Hasher::of(text.as_bytes(), None).unwrap());
        // Not signed, or not of this schema.
        for other in [text.clone(), signed.replace("\"schemaVersion\":1", "\"schemaVersion\":2"), sign(&text, &[]), "nonsense".to_owned()] {
            assert!(payload(other.as_bytes()).unwrap().is_none());
        }
        // What is not covered is not read: a second list of layers behind the signed text.
        let smuggled = signed.replace("\"signatures\":", "\"fsLayers\":[],\"signatures\":");
        assert_eq!(payload(smuggled.as_bytes()).unwrap().unwrap(), text.as_bytes());
        let mut other = protected(&text);
        other["formatLength"] = json!(10);
        assert!(payload(sign(&text, &[protected(&text), other]).as_bytes()).is_err());
        let mut long = protected(&text);
        long["formatLength"] = json!(1 << 30);
        assert!(payload(sign(&text, &[long]).as_bytes()).is_err());
        let garbage = signed.replace("\"protected\":\"", "\"protected\":\"%");
        assert!(payload(garbage.as_bytes()).is_err());
    }

    #[test]
    fn refuses_what_is_two_things_or_malformed() {
        let limits = Limits::default();
        let good = plain();
        let parse = |text: &str, served: Option<&str>| manifest::parse(text.as_bytes(), served, &limits).map(|_| ()).map_err(|e| e.kind);
        assert_eq!(parse(&good, None), Ok(()));
        for (text, served) in [
            (good.clone(), Some(OCI_MANIFEST)),
            (good.replace("\"schemaVersion\":1", "\"schemaVersion\":2"), None),
            (good.replace("\"schemaVersion\":1", "\"schemaVersion\":3"), None),
            (good.replacen('{', "{\"layers\":[],", 1), None),
            (good.replacen('{', "{\"manifests\":[],", 1), None),
            (good.replacen('{', &format!("{{\"mediaType\":\"{OCI_MANIFEST}\","), 1), None),
            (good.replace("\"fsLayers\":[", "\"fsLayers\":[{\"blobSum\":\"sha256:../x\"},"), None),
            (good.replace("\"history\":[", "\"history\":[{\"v1Compatibility\":\"{}\"},"), None),
            (good.replace(r#"{\"id\":\"1\""#, "nonsense"), None),
            (r#"{"schemaVersion":1,"fsLayers":[],"history":[]}"#.to_owned(), None),
        ] {
            assert_ne!(text.as_str(), if served.is_none() { good.as_str() } else { "" });
            assert_eq!(parse(&text, served), Err(Kind::DataLoss), "{text}");
        }
        let modern = format!(r#"{{"schemaVersion":2,"fsLayers":[],"config":{{"digest":"{0}","size":1}},"layers":[]}}"#, digest('a'));
        assert_eq!(parse(&modern, None), Err(Kind::DataLoss));
        assert_eq!(parse(&modern.replace("\"fsLayers\":[],", ""), None), Ok(()));
        assert_eq!(parse(&modern.replace("\"fsLayers\":[],", ""), Some(SIGNED)), Err(Kind::DataLoss));
        assert_eq!(manifest::parse(good.as_bytes(), None, &Limits { layers: 1, ..limits }).unwrap_err().kind, Kind::ResourceExhausted);
    }
}
