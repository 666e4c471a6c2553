//! Image manifests (App Container specification, image manifest schema): parsed, checked against the grammar, turned into what the
//! engine uses. Pure functions over bytes that nothing vouches for yet. Fields that the specification does not know are passed over, as it asks.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

use super::quantity;
use crate::model::Digest;
use crate::model::appc::{self, is_identifier, is_name, parse_id};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::{AppcConfig, ImageConfig};
use crate::provisioner::config::Platform;

/// `acKind` of image manifests.
const KIND: &str = "ImageManifest";
/// Largest user or group number: what fits a signed 32-bit number everywhere.
const MAX_ID: u64 = i32::MAX as u64;
/// Architectures in the words of OCI and of Appc (specification, labels); what is not listed is called the same.
const ARCHITECTURES: &[(&str, &str, &str)] =
    &[("amd64", "", "amd64"), ("386", "", "i386"), ("arm64", "", "aarch64"), ("arm", "v6", "armv6l"), ("arm", "", "armv7l")];

/// A manifest, checked.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// AC identifier.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Images below this one, lowest first.
    pub dependencies: Vec<Dependency>,
    /// The only paths that are to exist, clean and without a slash in front; one that ends in a slash is a directory. Empty is all.
    pub whitelist: BTreeSet<String>,
    /// What the engine uses.
    pub config: ImageConfig,
}

/// An image that lies below another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// Which: name, labels, maybe the very id.
    pub name: appc::Name,
    /// Bytes of its archive, if promised.
    pub size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    ac_kind: String,
    ac_version: String,
    name: String,
    #[serde(default)]
    labels: Option<Vec<Pair>>,
    #[serde(default)]
    annotations: Option<Vec<Pair>>,
    #[serde(default)]
    dependencies: Option<Vec<RawDependency>>,
    #[serde(default)]
    path_whitelist: Option<Vec<String>>,
    #[serde(default)]
    app: Option<RawApp>,
}

#[derive(Deserialize)]
struct Pair {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDependency {
    /// `app` in manifests before 0.6.
    #[serde(alias = "app")]
    image_name: String,
    #[serde(default, rename = "imageID")]
    image_id: Option<String>,
    #[serde(default)]
    labels: Option<Vec<Pair>>,
    #[serde(default)]
    size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct RawApp {
    exec: Option<Vec<String>>,
    user: Option<String>,
    group: Option<String>,
    #[serde(rename = "supplementaryGIDs")]
    supplementary_gids: Option<Vec<u64>>,
    event_handlers: Option<Vec<RawHandler>>,
    working_directory: Option<String>,
    environment: Option<Vec<Pair>>,
    mount_points: Option<Vec<RawMountPoint>>,
    ports: Option<Vec<RawPort>>,
    isolators: Option<Vec<RawIsolator>>,
}

#[derive(Deserialize)]
struct RawHandler {
    name: String,
    #[serde(default)]
    exec: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMountPoint {
    name: String,
    path: String,
    #[serde(default)]
    read_only: bool,
}

#[derive(Deserialize)]
struct RawPort {
    name: String,
    protocol: String,
    port: u32,
    #[serde(default = "one")]
    count: u32,
}

fn one() -> u32 {
    1
}

#[derive(Deserialize)]
struct RawIsolator {
    name: String,
    #[serde(default)]
    value: Value,
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::DataLoss, format!("read image manifest: {why}"))
}

/// A text for messages.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Parses and checks a manifest.
///
/// # Errors
/// `DataLoss` naming what is malformed, `NotFound` when the image is for other machines.
pub fn parse(bytes: &[u8], platform: &Platform) -> Result<Manifest> {
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| Error::with(Kind::DataLoss, "read image manifest", e))?;
    if raw.ac_kind != KIND {
        return Err(bad(format!("acKind is {:?}, not {KIND}", shown(&raw.ac_kind))));
    }
    if !is_version(&raw.ac_version) {
        return Err(bad(format!("acVersion {:?} is no semantic version", shown(&raw.ac_version))));
    }
    let labels = pairs("label", raw.labels.unwrap_or_default())?;
    // The grammar of names is checked with the labels.
    let name = appc::Name::new(&raw.name, labels, None).map_err(|e| Error::with(Kind::DataLoss, "read image manifest", e))?;
    check_platform(&name.labels, platform)?;
    let annotations = pairs("annotation", raw.annotations.unwrap_or_default())?;
    let dependencies = raw.dependencies.unwrap_or_default().into_iter().map(dependency).collect::<Result<_>>()?;
    let whitelist = raw.path_whitelist.unwrap_or_default().iter().map(|path| whitelisted(path)).collect::<Result<_>>()?;
    let mut config = match raw.app {
        Some(app) => app.config()?,
        None => ImageConfig { appc: Some(Box::default()), ..ImageConfig::default() },
    };
    config.os.clone_from(&platform.os);
    config.architecture.clone_from(&platform.architecture);
    config.created = annotations.get("created").cloned().unwrap_or_default();
    config.labels = name.labels.iter().chain(&annotations).map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok(Manifest { name: name.name, labels: name.labels, dependencies, whitelist, config })
}

/// What this machine asks for: operating system and architecture in the words of Appc.
pub fn words(platform: &Platform) -> (&str, &str) {
    let fits =
        |(architecture, variant, _): &&(&str, &str, &str)| *architecture == platform.architecture && (variant.is_empty() || *variant == platform.variant);
    (&platform.os, ARCHITECTURES.iter().find(fits).map_or(platform.architecture.as_str(), |(.., word)| *word))
}

fn check_platform(labels: &BTreeMap<String, String>, platform: &Platform) -> Result<()> {
    let (os, arch) = words(platform);
    for (label, here) in [("os", os), ("arch", arch)] {
        if let Some(for_) = labels.get(label).filter(|v| *v != here) {
            return Err(Error::not_found(format!("choose image: it is for {label} {:?}, this machine is {here}", shown(for_))));
        }
    }
    Ok(())
}

/// `MAJOR.MINOR.PATCH` with what semantic versions may have behind.
fn is_version(text: &str) -> bool {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let number = |part: &str| !part.is_empty() && part.len() < 10 && part.bytes().all(|b| b.is_ascii_digit());
    core.split('.').count() == 3 && core.split('.').all(number)
}

fn pairs(what: &str, list: Vec<Pair>) -> Result<BTreeMap<String, String>> {
    let mut map = BTreeMap::new();
    for Pair { name, value } in list {
        if !is_identifier(&name) {
            return Err(bad(format!("{what} {:?} is no AC identifier", shown(&name))));
        }
        if let Some(again) = map.insert(name.clone(), value) {
            return Err(bad(format!("{what} {name} is there twice ({:?})", shown(&again))));
        }
    }
    Ok(map)
}

fn dependency(raw: RawDependency) -> Result<Dependency> {
    let labels = pairs("label", raw.labels.unwrap_or_default())?;
    let within = |e: Error| Error::with(Kind::DataLoss, format!("read dependency {:?} of the image manifest", shown(&raw.image_name)), e);
    let id: Option<Digest> = raw.image_id.filter(|id| !id.is_empty()).map(|id| parse_id(&id)).transpose().map_err(within)?;
    Ok(Dependency { name: appc::Name::new(&raw.image_name, labels, id).map_err(within)?, size: raw.size })
}

/// An absolute path without `.` and `..`; returned without the slash in front.
fn absolute(what: &str, path: &str) -> Result<String> {
    let plain = path.strip_prefix('/').filter(|p| !p.contains('\0') && !p.split('/').any(|part| matches!(part, "." | "..")));
    plain.map(str::to_owned).ok_or_else(|| bad(format!("{what} {:?} is no absolute path, or has . or .. in it", shown(path))))
}

fn whitelisted(path: &str) -> Result<String> {
    let relative = absolute("path of the whitelist", path)?;
    let mut clean = relative.split('/').filter(|p| !p.is_empty()).collect::<Vec<_>>().join("/");
    if relative.ends_with('/') {
        clean.push('/');
    }
    Ok(clean)
}

impl RawApp {
    fn config(self) -> Result<ImageConfig> {
        let mut exec = self.exec.unwrap_or_default().into_iter();
        let volumes = self.mount_points.unwrap_or_default().into_iter().map(mount_point).collect::<Result<Vec<_>>>()?;
        self.ports.unwrap_or_default().iter().try_for_each(check_port)?;
        let working_dir = match self.working_directory.filter(|d| !d.is_empty()) {
            Some(dir) => format!("/{}", absolute("working directory", &dir)?),
            None => String::new(),
        };
        let mut appc = AppcConfig {
            app: true,
            supplementary_gids: self.supplementary_gids.unwrap_or_default().into_iter().map(gid).collect::<Result<_>>()?,
            read_only: volumes.iter().filter(|(_, read_only)| *read_only).map(|(path, _)| path.clone()).collect(),
            ..AppcConfig::default()
        };
        isolators(self.isolators.unwrap_or_default(), &mut appc)?;
        for handler in self.event_handlers.unwrap_or_default() {
            if !matches!(handler.name.as_str(), "pre-start" | "post-stop") || handler.exec.is_empty() {
                return Err(bad(format!("event handler {:?} is neither pre-start nor post-stop, or runs nothing", shown(&handler.name))));
            }
            appc.ignored.push(format!("event handler {}", handler.name));
        }
        Ok(ImageConfig {
            // The first word is the program, the others are its default arguments: a caller's arguments replace these.
            entrypoint: exec.next().into_iter().collect(),
            cmd: exec.collect(),
            env: self.environment.unwrap_or_default().into_iter().map(variable).collect::<Result<_>>()?,
            working_dir,
            user: who(self.user.as_deref(), self.group.as_deref())?,
            volumes: volumes.into_iter().map(|(path, _)| path).collect(),
            appc: Some(Box::new(appc)),
            ..ImageConfig::default()
        })
    }
}

/// `user:group`. Either may be a number, a name, or the path of a file whose owner it is.
fn who(user: Option<&str>, group: Option<&str>) -> Result<String> {
    let check = |what: &str, text: Option<&str>| {
        let text = text.filter(|t| !t.is_empty()).unwrap_or("0");
        let plain = !text.contains([':', '\0', '\n', '\r']) && text.len() <= 255;
        if plain { Ok(text.to_owned()) } else { Err(bad(format!("{what} {:?} is neither a name, a number nor a path", shown(text)))) }
    };
    Ok(format!("{}:{}", check("user", user)?, check("group", group)?))
}

fn gid(id: u64) -> Result<u32> {
    u32::try_from(id).ok().filter(|id| u64::from(*id) <= MAX_ID).ok_or_else(|| bad(format!("supplementary group {id} is larger than {MAX_ID}")))
}

fn variable(pair: Pair) -> Result<String> {
    let ok = !pair.name.is_empty() && !pair.name.contains(['=', '\0']) && !pair.value.contains('\0');
    if ok { Ok(format!("{}={}", pair.name, pair.value)) } else { Err(bad(format!("environment variable {:?} is malformed", shown(&pair.name)))) }
}

fn mount_point(raw: RawMountPoint) -> Result<(String, bool)> {
    if !is_name(&raw.name) {
        return Err(bad(format!("the name of mount point {:?} is no AC name", shown(&raw.name))));
    }
    let path = absolute("mount point", &raw.path)?;
    if path.split('/').all(str::is_empty) {
        return Err(bad(format!("mount point {} is the root directory", raw.name)));
    }
    Ok((format!("/{path}"), raw.read_only))
}

fn check_port(port: &RawPort) -> Result<()> {
    let fits = port.port >= 1 && port.count >= 1 && port.port.checked_add(port.count - 1).is_some_and(|last| last <= 65_535);
    if !is_name(&port.name) || port.protocol.is_empty() || !fits {
        return Err(bad(format!("port {:?} is malformed", shown(&port.name))));
    }
    Ok(())
}

fn isolators(list: Vec<RawIsolator>, appc: &mut AppcConfig) -> Result<()> {
    let mut seen = BTreeSet::new();
    for isolator in list {
        let name = isolator.name.as_str();
        if !is_identifier(name) || !seen.insert(isolator.name.clone()) {
            return Err(bad(format!("isolator {:?} is there twice, or its name is no AC identifier", shown(name))));
        }
        let number = |key: &str, scale| {
            let value = isolator.value.get(key).filter(|v| !v.is_null());
            value
                .map(|v| quantity::parse(v, scale).ok_or_else(|| bad(format!("{key} of isolator {name}: {:?} is no quantity", shown(&v.to_string())))))
                .transpose()
        };
        match name {
            "resource/cpu" => {
                (appc.resources.cpu_request, appc.resources.cpu_limit) =
                    (number("request", quantity::Scale::Thousandths)?, number("limit", quantity::Scale::Thousandths)?);
            }
            // There is no way to keep memory for one container: its request only guides those who place it.
            "resource/memory" => appc.resources.memory_limit = number("limit", quantity::Scale::Whole)?,
            "os/linux/capabilities-retain-set" => appc.retain_capabilities = Some(set(&isolator)?),
            // The second name is that of versions before 0.8.
            "os/linux/capabilities-revoke-set" | "os/linux/capabilities-remove-set" => appc.remove_capabilities.extend(set(&isolator)?),
            "os/linux/no-new-privileges" => {
                appc.no_new_privileges = isolator.value.as_bool().ok_or_else(|| bad(format!("isolator {name} is neither true nor false")))?;
            }
            _ => appc.ignored.push(format!("isolator {name}")),
        }
    }
    if appc.retain_capabilities.is_some() && !appc.remove_capabilities.is_empty() {
        return Err(bad("isolators retain and revoke capabilities at once"));
    }
    Ok(())
}

fn set(isolator: &RawIsolator) -> Result<Vec<String>> {
    let words = isolator.value.get("set").and_then(Value::as_array).map(|set| set.iter().map(|w| w.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>());
    match words.flatten() {
        Some(words) if !words.is_empty() && words.iter().all(|w| w.starts_with("CAP_")) => Ok(words),
        _ => Err(bad(format!("isolator {} has no set of capabilities", isolator.name))),
    }
}

#[cfg(test)]
mod tests;
