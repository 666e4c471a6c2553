//! Manifests, indexes and configurations: parsed leniently where peers differ, strictly where a wrong reading could be
//! exploited. Pure functions over bytes whose digest was verified before.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::schema1::{self, PLAIN, SIGNED};
use crate::model::Digest;
use crate::model::error::{Error, Kind, Result};
use crate::model::image::ImageConfig;
use crate::provisioner::config::{Limits, Platform};

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Points at a blob or manifest. `urls` of foreign layers are not even read.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is said to be.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// In indexes: for what machines.
    #[serde(default)]
    pub platform: Option<DescriptorPlatform>,
    /// Annotations; archives name images by them.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// Platform of an index entry.
#[derive(Clone, Debug, Deserialize)]
pub struct DescriptorPlatform {
    /// GOARCH.
    #[serde(default)]
    pub architecture: String,
    /// GOOS.
    #[serde(default)]
    pub os: String,
    /// `v7`.
    #[serde(default)]
    pub variant: Option<String>,
}

/// A manifest or an index.
#[derive(Clone, Debug)]
pub enum Document {
    /// One image.
    Manifest {
        /// Its configuration.
        config: Descriptor,
        /// Its layers, lowest first.
        layers: Vec<Descriptor>,
    },
    /// Several.
    Index(Vec<Descriptor>),
    /// One image in Docker's first form.
    Legacy(schema1::Manifest),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

pub(super) fn bad(why: impl Into<String>) -> Error {
    Error::new(Kind::DataLoss, format!("read manifest: {}", why.into()))
}

/// Parses a manifest or index. `served` is the media type that the transport claimed; it must not contradict what the body
/// says, and a body that could be read both ways is refused (the same bytes mean one thing only, attack case 7).
///
/// # Errors
/// `DataLoss` for anything ambiguous or malformed, `ResourceExhausted` beyond the limits.
pub fn parse(bytes: &[u8], served: Option<&str>, limits: &Limits) -> Result<Document> {
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| Error::with(Kind::DataLoss, "read manifest", e))?;
    let served = served.map(|s| s.split(';').next().unwrap_or_default().trim());
    let modern = raw.manifests.is_some() || raw.config.is_some() || raw.layers.is_some();
    match raw.schema_version {
        Some(1) if !modern => return legacy(bytes, &raw, served, limits),
        Some(2) if raw.fs_layers.is_none() => {}
        Some(1 | 2) => return Err(bad("it is of two schema versions at once")),
        _ => return Err(bad("schema version is neither 1 nor 2")),
    }
    let is_index = match (raw.manifests.is_some(), raw.config.is_some() || raw.layers.is_some()) {
        (true, false) => true,
        (false, true) => false,
        _ => return Err(bad("neither clearly an index nor clearly an image")),
    };
    // A transport may say nothing useful (a file, a proxy); what it does say about manifests must agree.
    for claim in [served, raw.media_type.as_deref()].into_iter().flatten() {
        match claim {
            OCI_INDEX | DOCKER_LIST if is_index => {}
            OCI_MANIFEST | DOCKER_MANIFEST if !is_index => {}
            OCI_INDEX | DOCKER_LIST | OCI_MANIFEST | DOCKER_MANIFEST | PLAIN | SIGNED => return Err(bad(format!("its content is not what {claim} means"))),
            _ if raw.media_type.as_deref() == Some(claim) => return Err(bad(format!("media type {claim} is not that of an image"))),
            _ => {}
        }
    }
    if let (Some(served), Some(said)) = (served, raw.media_type.as_deref())
        && [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST].contains(&served)
        && served != said
    {
        return Err(bad(format!("served as {served}, says it is {said}")));
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), ..) => Ok(Document::Index(manifests)),
        (None, Some(config), Some(layers)) if layers.len() <= limits.layers => Ok(Document::Manifest { config, layers }),
        (None, Some(_), Some(layers)) => {
            Err(Error::new(Kind::ResourceExhausted, format!("read manifest: {} layers, more than {}", layers.len(), limits.layers)))
        }
        _ => Err(bad("configuration or layers are missing")),
    }
}

/// The first form. It has no media type of its own; what the transport says must not be one of the later ones.
fn legacy(bytes: &[u8], raw: &Raw, served: Option<&str>, limits: &Limits) -> Result<Document> {
    for claim in [served, raw.media_type.as_deref()].into_iter().flatten() {
        let later = matches!(claim, OCI_INDEX | DOCKER_LIST | OCI_MANIFEST | DOCKER_MANIFEST);
        if later || (raw.media_type.as_deref() == Some(claim) && !matches!(claim, PLAIN | SIGNED)) {
            return Err(bad(format!("its content is not what {claim} means")));
        }
    }
    schema1::parse(bytes, limits).map(Document::Legacy)
}

/// The entry of an index for `platform`: the same variant if there is one, else the best that runs here.
///
/// # Errors
/// `NotFound` when there is none.
pub fn choose<'a>(entries: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let fit = |d: &&Descriptor| {
        let Some(p) = &d.platform else { return None };
        if p.os != platform.os || p.architecture != platform.architecture {
            return None;
        }
        rank(&p.architecture, p.variant.as_deref().unwrap_or_default(), &platform.variant)
    };
    let is_image = |d: &&Descriptor| matches!(d.media_type.as_str(), "" | OCI_MANIFEST | DOCKER_MANIFEST | OCI_INDEX | DOCKER_LIST);
    let best = entries.iter().filter(is_image).filter_map(|d| fit(&d).map(|r| (r, d))).min_by_key(|(r, _)| *r);
    match best {
        Some((_, entry)) => Ok(entry),
        // An index of one image that does not say for what is that image's.
        None => match entries {
            [only] if only.platform.is_none() => Ok(only),
            _ => Err(Error::not_found(format!("choose image: none for {}/{}", platform.os, platform.architecture))),
        },
    }
}

/// How well `offered` serves a machine of `wanted`; lower is better, `None` does not run.
fn rank(architecture: &str, offered: &str, wanted: &str) -> Option<u32> {
    let level = |v: &str| v.strip_prefix('v').and_then(|n| n.split('.').next()).and_then(|n| n.parse::<u32>().ok());
    let base = if architecture == "arm64" {
        8
    } else if architecture == "arm" {
        7
    } else {
        1
    };
    let wanted = level(wanted).unwrap_or(base);
    let offered = level(offered).unwrap_or(base.min(wanted));
    wanted.checked_sub(offered)
}

/// What of a configuration is used.
pub struct Configuration {
    /// For the engine.
    pub config: ImageConfig,
    /// One diff id a layer, lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawConfiguration {
    architecture: Option<String>,
    os: Option<String>,
    created: Option<String>,
    config: Option<RawConfig>,
    rootfs: Option<RawRootfs>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct RawConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, Option<String>>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawRootfs {
    diff_ids: Option<Vec<Digest>>,
}

/// Parses an image configuration for a manifest with `layers` layers.
///
/// # Errors
/// `DataLoss` when malformed, `NotFound` when it is for other machines.
pub fn configuration(bytes: &[u8], layers: usize, platform: &Platform) -> Result<Configuration> {
    let raw: RawConfiguration = serde_json::from_slice(bytes).map_err(|e| Error::with(Kind::DataLoss, "read image configuration", e))?;
    let (os, architecture) = (raw.os.unwrap_or_default(), raw.architecture.unwrap_or_default());
    let other = |have: &str, want: &str| !have.is_empty() && have != want;
    if other(&os, &platform.os) || other(&architecture, &platform.architecture) {
        return Err(Error::not_found(format!("choose image: it is for {os}/{architecture}, not {}/{}", platform.os, platform.architecture)));
    }
    let diff_ids = raw.rootfs.unwrap_or_default().diff_ids.unwrap_or_default();
    if diff_ids.len() != layers {
        return Err(Error::new(Kind::DataLoss, format!("read image configuration: {} diff ids for {layers} layers", diff_ids.len())));
    }
    let c = raw.config.unwrap_or_default();
    let config = ImageConfig {
        entrypoint: c.entrypoint.unwrap_or_default(),
        cmd: c.cmd.unwrap_or_default(),
        env: c.env.unwrap_or_default(),
        working_dir: c.working_dir.unwrap_or_default(),
        user: c.user.unwrap_or_default(),
        stop_signal: c.stop_signal.unwrap_or_default(),
        volumes: c.volumes.unwrap_or_default().into_keys().collect(),
        labels: c.labels.unwrap_or_default().into_iter().map(|(k, v)| (k, v.unwrap_or_default())).collect(),
        architecture,
        os,
        created: raw.created.unwrap_or_default(),
        appc: None,
    };
    Ok(Configuration { config, diff_ids })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(c: char) -> String {
        format!("sha256:{}", c.to_string().repeat(64))
    }

    fn manifest(media_type: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{media_type}","config":{{"digest":"{}","size":1}},"layers":[{{"digest":"{}","size":2,"urls":["http://evil/"]}}]}}"#,
            digest('a'),
            digest('b')
        )
    }

    #[test]
    fn same_bytes_mean_one_thing_only() {
        let limits = Limits::default();
        let good = manifest(OCI_MANIFEST);
        assert!(matches!(parse(good.as_bytes(), Some(OCI_MANIFEST), &limits).unwrap(), Document::Manifest { layers, .. } if layers.len() == 1));
        assert!(parse(good.as_bytes(), Some("application/octet-stream; charset=x"), &limits).is_ok());
        for served in [OCI_INDEX, DOCKER_LIST, DOCKER_MANIFEST] {
            assert_eq!(parse(good.as_bytes(), Some(served), &limits).unwrap_err().kind, Kind::DataLoss, "{served}");
        }
        let both = good.replace("\"config\"", "\"manifests\":[],\"config\"");
        assert_eq!(parse(both.as_bytes(), None, &limits).unwrap_err().kind, Kind::DataLoss);
        let duplicate = good.replace("\"config\"", "\"layers\":[],\"config\"");
        assert_eq!(parse(duplicate.as_bytes(), None, &limits).unwrap_err().kind, Kind::DataLoss);
        assert_eq!(parse(manifest(OCI_INDEX).as_bytes(), None, &limits).unwrap_err().kind, Kind::DataLoss);
        assert_eq!(parse(manifest("application/x").as_bytes(), None, &limits).unwrap_err().kind, Kind::DataLoss);
        let evil = good.replace(&digest('b'), "sha256:../../x");
        assert_eq!(parse(evil.as_bytes(), None, &limits).unwrap_err().kind, Kind::DataLoss);
        assert_eq!(parse(good.as_bytes(), None, &Limits { layers: 0, ..limits }).unwrap_err().kind, Kind::ResourceExhausted);
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(parse(deep.as_bytes(), None, &limits).unwrap_err().kind, Kind::DataLoss);
    }

    #[test]
    fn chooses_the_platform_and_the_nearest_variant() {
        let entry = |c: char, arch: &str, variant: &str| {
            format!(
                r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{}","size":1,"platform":{{"os":"linux","architecture":"{arch}","variant":"{variant}"}}}}"#,
                digest(c)
            )
        };
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{},{}]}}"#,
            entry('1', "arm", "v5"),
            entry('2', "arm", "v6"),
            entry('3', "amd64", ""),
            entry('4', "arm", "v7")
        );
        let Document::Index(entries) = parse(text.as_bytes(), None, &Limits::default()).unwrap() else { panic!() };
        let find = |arch: &str, variant: &str| {
            let platform = Platform { os: "linux".into(), architecture: arch.into(), variant: variant.into() };
            choose(&entries, &platform).map(|d| d.digest.hex()[..1].to_owned()).map_err(|e| e.kind)
        };
        assert_eq!(find("amd64", "").unwrap(), "3");
        assert_eq!(find("arm", "v7").unwrap(), "4");
        assert_eq!(find("arm", "v6").unwrap(), "2");
        assert_eq!(find("arm", "").unwrap(), "4");
        assert_eq!(find("arm64", "").unwrap_err(), Kind::NotFound);
    }

    #[test]
    fn configurations_tolerate_nulls_and_check_layers() {
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","config":{{"User":"1:2","Env":null,"Cmd":["sh"],"Volumes":{{"/v":{{}}}},"Labels":null}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            digest('c')
        );
        let parsed = configuration(text.as_bytes(), 1, &platform).unwrap();
        assert_eq!((parsed.config.user.as_str(), parsed.config.volumes.as_slice()), ("1:2", ["/v".to_owned()].as_slice()));
        assert_eq!(configuration(text.as_bytes(), 2, &platform).err().unwrap().kind, Kind::DataLoss);
        let other = Platform { architecture: "arm64".into(), ..platform };
        assert_eq!(configuration(text.as_bytes(), 1, &other).err().unwrap().kind, Kind::NotFound);
    }
}
