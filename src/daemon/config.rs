//! Configuration: defaults, then file, then environment, then flags; the later wins, key by key. Unknown keys are errors that
//! name where they stand. Every value remembers its origin (`mesocri config` prints them).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::flags::{ENV_PREFIX, FLAGS};
use crate::disk::Layout;
use crate::isolators::Isolators;
use crate::model::error::{Error, Result};

/// Read when no `--config` is given and it exists.
pub const DEFAULT_FILE: &str = "/etc/mesocri/config.toml";

/// Logs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Filter of `tracing`: a level or `module=level` pairs.
    pub level: String,
    /// `text` or `json`.
    pub format: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: "text".to_owned() }
    }
}

/// Traces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tracing {
    /// OTLP/gRPC collector; empty exports nothing.
    pub otlp_endpoint: String,
}

/// Everything that can be configured; each component's part is its own type.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Persistent directory.
    pub root: PathBuf,
    /// State that a reboot may lose.
    pub state: PathBuf,
    /// CRI socket; empty: `mesocri.sock` in the state directory.
    pub socket: String,
    /// Names of isolators.
    pub isolation: Vec<String>,
    /// Image formats served.
    pub image_providers: Vec<String>,
    /// Logs.
    pub log: Log,
    /// Traces.
    pub tracing: Tracing,
    /// Images and root filesystems.
    pub provisioner: crate::provisioner::Config,
    /// Shims.
    pub launcher: crate::launcher::Config,
    /// Pod networks.
    pub network: crate::network::Config,
    /// Pods.
    pub containerizer: crate::containerizer::Config,
    /// The CRI front.
    pub cri: crate::cri::Config,
    /// One table per isolator, by its name.
    pub isolator: toml::Table,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/mesocri"),
            state: PathBuf::from("/run/mesocri"),
            socket: String::new(),
            isolation: crate::isolators::default_isolation(),
            image_providers: vec!["docker".to_owned()],
            log: Log::default(),
            tracing: Tracing::default(),
            provisioner: crate::provisioner::Config::default(),
            launcher: crate::launcher::Config::default(),
            network: crate::network::Config::default(),
            containerizer: crate::containerizer::Config::default(),
            cri: crate::cri::Config::default(),
            isolator: toml::Table::new(),
        }
    }
}

impl Config {
    /// The on-disk tree.
    pub fn layout(&self) -> Layout {
        Layout::new(&self.root, &self.state)
    }

    /// Where the CRI listens.
    pub fn socket(&self) -> PathBuf {
        if self.socket.is_empty() { self.layout().cri_socket() } else { PathBuf::from(&self.socket) }
    }

    /// What can be refused before anything is made: start-up rules of Mesos agents that need more than one component's configuration
    /// (mesos.md §3.1), names of isolators and their options.
    ///
    /// # Errors
    /// Names the two settings that do not fit, or the isolator and what is wrong with it.
    pub fn check(&self) -> Result<()> {
        for provider in &self.image_providers {
            if !["docker", "appc"].contains(&provider.as_str()) {
                return Err(Error::invalid(format!("check configuration: image_providers names {provider:?}; there are docker and appc")));
            }
        }
        let has = |name: &str| self.isolation.iter().any(|i| i == name);
        if !self.image_providers.is_empty() && !has("filesystem/linux") {
            return Err(Error::invalid(
                "check configuration: image_providers is set but isolation lacks filesystem/linux, which mounts their root filesystems",
            ));
        }
        if self.image_providers.iter().any(|p| p == "docker") && !has("docker/runtime") {
            return Err(Error::invalid(
                "check configuration: image_providers contains docker but isolation lacks docker/runtime, without which entrypoint, user and environment of images would be ignored",
            ));
        }
        if self.image_providers.iter().any(|p| p == "appc") && !has("appc/runtime") {
            return Err(Error::invalid(
                "check configuration: image_providers contains appc but isolation lacks appc/runtime, without which exec, user and environment of images would be ignored",
            ));
        }
        Isolators::check(&self.isolation, &self.isolator)
    }

    /// Tells the provisioner what stands elsewhere.
    fn settle(mut self) -> Self {
        let has = |name: &str| self.image_providers.iter().any(|p| p == name);
        self.provisioner.formats = crate::provisioner::config::Formats { docker: has("docker"), appc: has("appc") };
        self
    }
}

/// Where values come from, in order of rising rank.
pub struct Sources {
    /// Text and path of the file, if any.
    pub file: Option<(PathBuf, String)>,
    /// Environment as `(name, value)`; other programs' variables are passed over.
    pub env: Vec<(String, String)>,
    /// `(origin, key, value)` from the command line.
    pub flags: Vec<(String, String, toml::Value)>,
}

/// A configuration and the origin of each value that is not a default, by dotted key.
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// Key to `file PATH`, `env NAME`, `flag --NAME`.
    pub origins: BTreeMap<String, String>,
}

/// Merges the sources.
///
/// # Errors
/// `InvalidArgument` naming source and key of what is unknown or of the wrong type.
pub fn load(sources: Sources) -> Result<Loaded> {
    let mut layers: Vec<(String, toml::Table)> = Vec::new();
    if let Some((path, text)) = sources.file {
        let table = text.parse::<toml::Table>().map_err(|e| Error::invalid(format!("read configuration {}: {e}", path.display())))?;
        layers.push((format!("file {}", path.display()), table));
    }
    for (name, text) in sources.env {
        let Some(rest) = name.strip_prefix(ENV_PREFIX) else { continue };
        // Not configuration: the test hook, the shim's private variables and the client's socket.
        if matches!(rest, "FAILPOINT" | "SHIM_SOCKET" | "CONFIG") {
            continue;
        }
        let flag = FLAGS.iter().find(|f| f.name.to_uppercase() == rest).ok_or_else(|| {
            let known: Vec<_> = FLAGS.iter().map(super::flags::Flag::variable).collect();
            Error::invalid(format!("read environment: {name} is unknown; known are {}", known.join(", ")))
        })?;
        let value = flag.value(&text).map_err(|e| Error::invalid(format!("read environment {name}: {e}")))?;
        layers.push((format!("env {name}"), nest(flag.key, value)?));
    }
    for (origin, key, value) in sources.flags {
        layers.push((origin, nest(&key, value)?));
    }

    let mut merged = toml::Table::new();
    let mut origins = BTreeMap::new();
    for (origin, table) in layers {
        // Each layer alone must be a valid configuration, so that an error names the layer it stands in.
        let alone: Result<Config, _> = table.clone().try_into();
        alone.map_err(|e| Error::invalid(format!("{origin}: {}", e.to_string().trim().replace('\n', " "))))?;
        merge(&mut merged, table, "", &origin, &mut origins);
    }
    let config: Config = merged.try_into().map_err(|e: toml::de::Error| Error::invalid(format!("merge configuration: {e}")))?;
    Ok(Loaded { config: config.settle(), origins })
}

/// Reads the file the user named, or the default one if it exists.
///
/// # Errors
/// When a named file cannot be read.
pub fn read_file(named: Option<&Path>) -> Result<Option<(PathBuf, String)>> {
    let (path, must_exist) = named.map_or((Path::new(DEFAULT_FILE), false), |p| (p, true));
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.to_owned(), text))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !must_exist => Ok(None),
        Err(e) => Err(Error::io(format!("read configuration {}", path.display()), e)),
    }
}

/// `a.b = v` as nested tables.
fn nest(key: &str, value: toml::Value) -> Result<toml::Table> {
    let parts = split_key(key)?;
    let mut value = value;
    for part in parts.into_iter().rev() {
        let mut table = toml::Table::new();
        table.insert(part, value);
        value = toml::Value::Table(table);
    }
    match value {
        toml::Value::Table(table) => Ok(table),
        _ => Err(Error::invalid(format!("set {key:?}: empty key"))),
    }
}

/// Splits a dotted key; parts with dots or slashes may be quoted: `isolator."linux/seccomp".x`.
fn split_key(key: &str) -> Result<Vec<String>> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    for c in key.chars() {
        match c {
            '"' => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            c => {
                if let Some(last) = parts.last_mut() {
                    last.push(c);
                }
            }
        }
    }
    if quoted || parts.iter().any(String::is_empty) {
        return Err(Error::invalid(format!("set {key:?}: malformed key")));
    }
    Ok(parts)
}

fn merge(into: &mut toml::Table, from: toml::Table, prefix: &str, origin: &str, origins: &mut BTreeMap<String, String>) {
    for (key, value) in from {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(value)) => merge(below, value, &path, origin, origins),
            (_, toml::Value::Table(value)) => {
                let mut below = toml::Table::new();
                merge(&mut below, value, &path, origin, origins);
                into.insert(key, toml::Value::Table(below));
            }
            (_, value) => {
                origins.insert(path, origin.to_owned());
                into.insert(key, value);
            }
        }
    }
}

/// The effective configuration as TOML with each value's origin behind it.
///
/// # Errors
/// When it cannot be written as TOML; what is wrong with the options of an isolator.
pub fn explain(loaded: &Loaded) -> Result<String> {
    let mut table = toml::Table::try_from(&loaded.config).map_err(|e| Error::internal(format!("print configuration: {e}")))?;
    let options = Isolators::options(&loaded.config.isolation, &loaded.config.isolator)?;
    table.insert("isolator".to_owned(), toml::Value::Table(options));
    let mut text = String::new();
    explain_table(&table, "", "", &loaded.origins, &mut text);
    Ok(text)
}

/// `prefix` is the table's name as origins have it, `header` as TOML writes it.
fn explain_table(table: &toml::Table, prefix: &str, header: &str, origins: &BTreeMap<String, String>, text: &mut String) {
    use std::fmt::Write;
    let join = |before: &str, key: &str| if before.is_empty() { key.to_owned() } else { format!("{before}.{key}") };
    let path = |key: &str| join(prefix, key);
    let quote = |key: &str| if key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') { key.to_owned() } else { format!("{key:?}") };
    for (key, value) in table.iter().filter(|(_, v)| !v.is_table()) {
        let origin = origins.get(&path(key)).map_or("default", String::as_str);
        let _ = writeln!(text, "{} = {value}  # {origin}", quote(key));
    }
    for (key, value) in table {
        if let toml::Value::Table(below) = value {
            let header = join(header, &quote(key));
            let _ = writeln!(text, "\n[{header}]");
            explain_table(below, &path(key), &header, origins, text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(file: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Sources {
        Sources {
            file: Some((PathBuf::from("/c.toml"), file.to_owned())),
            env: env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            flags: flags.iter().map(|(k, v)| ("flag --x".to_owned(), (*k).to_owned(), toml::Value::String((*v).to_owned()))).collect(),
        }
    }

    #[test]
    fn later_sources_win_and_origins_are_kept() {
        let loaded =
            load(sources("root = \"/a\"\nstate = \"/s\"\n[log]\nlevel = \"warn\"", &[("MESOCRI_WORK_DIR", "/b"), ("PATH", "x")], &[("log.level", "debug")]))
                .unwrap();
        assert_eq!(loaded.config.root, PathBuf::from("/b"));
        assert_eq!(loaded.config.log.level, "debug");
        assert_eq!(loaded.origins["root"], "env MESOCRI_WORK_DIR");
        assert_eq!(loaded.origins["state"], "file /c.toml");
        assert_eq!(loaded.origins["log.level"], "flag --x");
        let text = explain(&loaded).unwrap();
        assert!(text.contains("root = \"/b\"  # env MESOCRI_WORK_DIR"), "{text}");
        assert!(text.contains("format = \"text\"  # default"), "{text}");
        text.parse::<toml::Table>().unwrap();
    }

    #[test]
    fn unknown_keys_name_their_source() {
        let message = |s: Sources| load(s).err().unwrap().to_string();
        assert!(message(sources("rooot = 1", &[], &[])).contains("file /c.toml") && message(sources("rooot = 1", &[], &[])).contains("rooot"));
        assert!(message(sources("", &[("MESOCRI_ROOOT", "x")], &[])).contains("MESOCRI_ROOOT"));
        assert!(message(sources("", &[], &[("log.colour", "x")])).contains("colour"));
        assert!(message(sources("root = 1", &[], &[])).contains("file /c.toml"));
    }

    #[test]
    fn options_of_isolators_are_shown_with_their_defaults_and_origins() {
        let file = "isolation = ['cgroups', 'namespaces/ipc', 'linux/nnp']\n[isolator.cgroups]\ndefault_parent = '/pods'\n[isolator.\"linux/sysctl\"]\n[isolator.\"posix/rlimits\".limits.nofile]\nsoft = 1\nhard = 2\n";
        let text = explain(&load(sources(file, &[], &[("isolator.\"namespaces/ipc\".shm_size", "")])).unwrap());
        assert!(text.unwrap_err().to_string().contains("shm_size"), "a wrong value");
        let text = explain(&load(sources(file, &[], &[])).unwrap()).unwrap();
        let shown: toml::Table = text.parse().unwrap();
        let names: Vec<_> = shown["isolator"].as_table().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, ["cgroups", "linux/sysctl", "namespaces/ipc", "posix/rlimits"], "listed or configured, and with options");
        assert!(text.contains("\n[isolator.cgroups]\ndefault_parent = \"/pods\"  # file /c.toml\ndriver = \"cgroupfs\"  # default\n"), "{text}");
        assert!(text.contains("\n[isolator.\"namespaces/ipc\"]\nshm_size = 67108864  # default\n"), "{text}");
        assert!(text.contains("\n[isolator.\"posix/rlimits\".limits.nofile]\nhard = 2  # file /c.toml\n"), "{text}");
        // What is shown is itself a configuration, and the same one.
        let again = load(sources(&text, &[], &[])).unwrap();
        assert_eq!(explain(&again).unwrap().parse::<toml::Table>().unwrap(), shown);
    }

    #[test]
    fn mesos_start_up_rules() {
        let check = |isolation: &[&str], providers: &[&str]| {
            let mut config = Config { isolation: isolation.iter().map(|s| (*s).to_owned()).collect(), ..Config::default() };
            config.image_providers = providers.iter().map(|s| (*s).to_owned()).collect();
            config.check().map_err(|e| e.to_string())
        };
        assert!(check(&["filesystem/linux"], &["docker"]).unwrap_err().contains("docker/runtime"));
        assert!(check(&["docker/runtime"], &["docker"]).unwrap_err().contains("filesystem/linux"));
        assert!(check(&["filesystem/linux", "docker/runtime"], &["docker"]).is_ok());
        // Not a substring match: a name that merely contains the right one does not count.
        assert!(check(&["filesystem/linux", "my-docker/runtime"], &["docker"]).is_err());
        assert!(check(&["filesystem/linux", "docker/runtime"], &["tar"]).is_err());
        assert!(check(&["filesystem/linux", "docker/runtime"], &["docker", "appc"]).unwrap_err().contains("appc/runtime"));
        assert!(check(&["filesystem/linux", "appc/runtime"], &["appc"]).is_ok());
        // Isolators, with their requirements and options, are part of it.
        assert!(check(&["filesystem/linux", "docker/runtime", "linux/typo"], &["docker"]).unwrap_err().contains("linux/typo"));
        assert!(check(&["filesystem/linux", "docker/runtime", "linux/seccomp"], &["docker"]).unwrap_err().contains("linux/capabilities"));
        for (file, part) in [("[isolator.\"linux/nnp\"]\nx = 1", "x"), ("[isolator.cgroups]\ndriver = 'runc'", "runc"), ("[isolator.typo]", "typo")] {
            let error = load(sources(file, &[], &[])).unwrap().config.check().unwrap_err().to_string();
            assert!(error.contains(part), "{file}: {error}");
        }
        for (file, docker, appc) in [("", true, false), ("image_providers = ['appc']", false, true), ("image_providers = ['docker', 'appc']", true, true)] {
            let formats = load(sources(file, &[], &[])).unwrap().config.provisioner.formats;
            assert_eq!((formats.docker, formats.appc), (docker, appc), "{file}");
        }
    }
}
