//! Network configurations as the CNI specification writes them: `.conflist` files, and `.conf`/`.json` files with one plugin.
//!
//! Parsing takes text; [`Directory`] reads files, and only when something in the directory changed.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::model::error::{Act, Error, Result};

/// Longest configuration file that is read: real ones have a few KiB, and this one is held in memory and in records.
const LONGEST: u64 = 1 << 20;
/// Version that a configuration without one has, says the specification.
const UNVERSIONED: &str = "0.1.0";
/// Versions of the specification that we follow, oldest first.
const VERSIONS: [&str; 7] = [UNVERSIONED, "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A network: plugins that are run one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct List {
    /// Name of the network.
    pub name: String,
    /// Version that all plugins are spoken to in.
    pub version: Version,
    /// CHECK must not be called.
    pub disable_check: bool,
    /// GC must not be called: others use the same network.
    pub disable_gc: bool,
    /// Configuration of each plugin; `type` is a non-empty file name.
    pub plugins: Vec<Map<String, Value>>,
}

impl List {
    /// The `type` of a plugin: the name of its program.
    pub fn kind(plugin: &Map<String, Value>) -> &str {
        plugin.get("type").and_then(Value::as_str).unwrap_or_default()
    }
}

/// A version of the CNI specification, one of [`VERSIONS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(usize);

impl Version {
    /// The first with CHECK, and with a `prevResult` for DEL.
    pub const CHECK: Self = Self(4);
    /// The first with STATUS and GC.
    pub const STATUS: Self = Self(6);

    /// As written.
    pub fn as_str(self) -> &'static str {
        VERSIONS.get(self.0).copied().unwrap_or(UNVERSIONED)
    }
}

impl TryFrom<String> for Version {
    type Error = BadConf;

    fn try_from(text: String) -> Result<Self, BadConf> {
        let known = VERSIONS.iter().position(|v| *v == text);
        known.map(Self).ok_or_else(|| BadConf::new("cniVersion", format!("{text:?} is none of {}", VERSIONS.join(", "))))
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.as_str().to_owned()
    }
}

/// What is wrong with a configuration, and where in it.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {why}")]
pub struct BadConf {
    field: String,
    why: String,
}

impl BadConf {
    fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }
}

/// Reads a configuration; `single` is the form of one plugin without a list.
///
/// # Errors
/// The field that is wrong and why.
pub fn parse(text: &str, single: bool) -> Result<List, BadConf> {
    let mut top: Map<String, Value> = serde_json::from_str(text).map_err(|e| BadConf::new("json", e.to_string()))?;
    let name = match top.get("name") {
        Some(Value::String(name)) if is_name(name) => name.clone(),
        Some(other) => return Err(BadConf::new("name", format!("{other} is no network name (letters, digits and _ . - after a letter or digit)"))),
        None => return Err(BadConf::new("name", "missing")),
    };
    let version = version(&top)?;
    let (disable_check, disable_gc) = (flag(&top, "disableCheck")?, flag(&top, "disableGC")?);
    let plugins = if single {
        vec![check_plugin(top, "")?]
    } else {
        let Some(Value::Array(plugins)) = top.remove("plugins") else { return Err(BadConf::new("plugins", "missing, or no list")) };
        let plugins = plugins.into_iter().enumerate().map(|(n, plugin)| match plugin {
            Value::Object(plugin) => check_plugin(plugin, &format!("plugins[{n}].")),
            _ => Err(BadConf::new(format!("plugins[{n}]"), "no object")),
        });
        plugins.collect::<Result<Vec<_>, _>>()?
    };
    if plugins.is_empty() {
        return Err(BadConf::new("plugins", "empty"));
    }
    Ok(List { name, version, disable_check, disable_gc, plugins })
}

/// The highest version of `cniVersions` (1.1) that we know, else `cniVersion`.
fn version(top: &Map<String, Value>) -> Result<Version, BadConf> {
    let one = match top.get("cniVersion") {
        None => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(Value::String(text)) => Some(Version::try_from(text.clone())),
        Some(_) => return Err(BadConf::new("cniVersion", "no string")),
    };
    let many = match top.get("cniVersions") {
        None => Vec::new(),
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).filter_map(|v| Version::try_from(v.to_owned()).ok()).collect(),
        Some(_) => return Err(BadConf::new("cniVersions", "no list")),
    };
    match (many.into_iter().max(), one) {
        (Some(best), Some(Ok(one))) => Ok(best.max(one)),
        (Some(best), _) => Ok(best),
        (None, Some(one)) => one,
        (None, None) => Version::try_from(UNVERSIONED.to_owned()),
    }
}

fn check_plugin(plugin: Map<String, Value>, at: &str) -> Result<Map<String, Value>, BadConf> {
    let field = format!("{at}type");
    match plugin.get("type") {
        // A name and not a path: it is looked for in the plugin directories and nowhere else.
        Some(Value::String(kind)) if !kind.is_empty() && !kind.contains('/') && kind != "." && kind != ".." => {}
        Some(other) => return Err(BadConf::new(field, format!("{other} is no plugin name"))),
        None => return Err(BadConf::new(field, "missing")),
    }
    match plugin.get("capabilities") {
        None | Some(Value::Object(_)) => Ok(plugin),
        Some(_) => Err(BadConf::new(format!("{at}capabilities"), "no object")),
    }
}

/// A truth value; older configurations write it as a string.
fn flag(top: &Map<String, Value>, name: &str) -> Result<bool, BadConf> {
    match top.get(name) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(text)) if text == "true" || text == "false" => Ok(text == "true"),
        Some(other) => Err(BadConf::new(name, format!("{other} is neither true nor false"))),
    }
}

fn is_name(name: &str) -> bool {
    name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// What is in the configuration directory.
#[derive(Clone, Debug)]
pub enum Found {
    /// No configuration file at all.
    Nothing,
    /// The first usable one, by file name.
    Network(std::sync::Arc<List>),
    /// There are files, and none is usable; why not.
    Bad(String),
}

/// The configuration directory. Asked on each use; files are read again only if a name, size or time changed.
pub struct Directory {
    path: PathBuf,
    last: Mutex<Option<(Vec<Stamp>, Found)>>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stamp {
    name: String,
    size: u64,
    time: Option<SystemTime>,
}

impl Directory {
    /// Reads nothing yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, last: Mutex::new(None) }
    }

    /// The network that new pods get.
    ///
    /// # Errors
    /// When the directory cannot be listed; a missing one holds nothing.
    pub fn network(&self) -> Result<Found> {
        let stamps = self.stamps()?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((then, found)) = &*last
            && *then == stamps
        {
            return Ok(found.clone());
        }
        let found = self.load(&stamps);
        *last = Some((stamps, found.clone()));
        Ok(found)
    }

    fn stamps(&self) -> Result<Vec<Stamp>> {
        let entries = match std::fs::read_dir(&self.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.act("list", self.path.display())?,
        };
        let mut stamps = Vec::new();
        for entry in entries {
            let entry = entry.act("list", self.path.display())?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if matches!(Path::new(&name).extension().and_then(|e| e.to_str()), Some("conflist" | "conf" | "json"))
                // Followed, because configurations are often links; one that dangles is not there yet.
                && let Ok(data) = std::fs::metadata(entry.path())
                && data.is_file()
            {
                stamps.push(Stamp { name, size: data.len(), time: data.modified().ok() });
            }
        }
        stamps.sort();
        Ok(stamps)
    }

    fn load(&self, stamps: &[Stamp]) -> Found {
        let mut bad = Vec::new();
        for stamp in stamps {
            match self.load_one(stamp) {
                Ok(list) => {
                    for text in bad {
                        tracing::warn!("CNI configuration not usable: {text}");
                    }
                    tracing::info!(network = list.name, file = stamp.name, "CNI network loaded");
                    return Found::Network(std::sync::Arc::new(list));
                }
                Err(e) => bad.push(e.to_string()),
            }
        }
        if bad.is_empty() { Found::Nothing } else { Found::Bad(bad.join("; ")) }
    }

    fn load_one(&self, stamp: &Stamp) -> Result<List> {
        let path = self.path.join(&stamp.name);
        if stamp.size > LONGEST {
            return Err(Error::invalid(format!("{}: longer than {LONGEST} bytes", path.display())));
        }
        let text = std::fs::read_to_string(&path).act("read", path.display())?;
        parse(&text, !stamp.name.ends_with(".conflist")).map_err(|e| Error::with(crate::model::Kind::InvalidArgument, path.display().to_string(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lists_and_single_plugins() {
        let list = parse(r#"{"cniVersion":"0.4.0","cniVersions":["1.0.0","9.9.9","0.3.1"],"name":"a.b-c","disableCheck":"true","plugins":[{"type":"x"},{"type":"y","capabilities":{"z":true}}]}"#, false).unwrap();
        assert_eq!((list.name.as_str(), list.version.as_str(), list.plugins.len(), list.disable_check), ("a.b-c", "1.0.0", 2, true));
        let single = parse(r#"{"name":"n","type":"loopback"}"#, true).unwrap();
        assert_eq!((single.version.as_str(), List::kind(&single.plugins[0])), ("0.1.0", "loopback"));
        let kept: List = serde_json::from_str(&serde_json::to_string(&list).unwrap()).unwrap();
        assert_eq!(kept, list);
    }

    #[test]
    fn says_which_field_is_wrong() {
        for (text, want) in [
            ("", "json: EOF"),
            ("[]", "json: invalid type"),
            ("{}", "name: missing"),
            (r#"{"name":"../x"}"#, "name: \"../x\" is no network name"),
            (r#"{"name":"n","cniVersion":"2.0.0","plugins":[]}"#, "cniVersion: \"2.0.0\" is none of 0.1.0"),
            (r#"{"name":"n","cniVersion":1}"#, "cniVersion: no string"),
            (r#"{"name":"n"}"#, "plugins: missing, or no list"),
            (r#"{"name":"n","plugins":[]}"#, "plugins: empty"),
            (r#"{"name":"n","plugins":[{"type":"a"},{}]}"#, "plugins[1].type: missing"),
            (r#"{"name":"n","plugins":[{"type":"../sh"}]}"#, "plugins[0].type: \"../sh\" is no plugin name"),
            (r#"{"name":"n","plugins":[7]}"#, "plugins[0]: no object"),
            (r#"{"name":"n","plugins":[{"type":"a","capabilities":[]}]}"#, "plugins[0].capabilities: no object"),
            (r#"{"name":"n","disableGC":3,"plugins":[{"type":"a"}]}"#, "disableGC: 3 is neither"),
        ] {
            let error = parse(text, false).unwrap_err().to_string();
            assert!(error.starts_with(want), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_usable_file_wins_and_changes_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path().join("net.d"));
        assert!(matches!(directory.network().unwrap(), Found::Nothing));
        std::fs::create_dir(dir.path().join("net.d")).unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join("net.d").join(name), text).unwrap();
        let name = || match directory.network().unwrap() {
            Found::Network(list) => list.name.clone(),
            other => format!("{other:?}"),
        };
        put("readme.txt", "x");
        assert!(matches!(directory.network().unwrap(), Found::Nothing));
        put("10-bad.conflist", r#"{"name":"n"}"#);
        assert!(name().contains("10-bad.conflist: plugins: missing"), "{}", name());
        put("30-c.conf", r#"{"name":"third","type":"t"}"#);
        assert_eq!(name(), "third");
        put("20-b.conflist", r#"{"name":"second","plugins":[{"type":"t"}]}"#);
        assert_eq!(name(), "second");
        // In place, without a change of the directory.
        put("20-b.conflist", r#"{"name":"changed","plugins":[{"type":"t"}]}"#);
        assert_eq!(name(), "changed");
        std::fs::remove_file(dir.path().join("net.d/20-b.conflist")).unwrap();
        assert_eq!(name(), "third");
    }
}
