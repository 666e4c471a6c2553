//! Configuration of the launcher: which shims there are and how long they may take.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::error::{Error, Result};

/// Name of the handler that our own shim answers; always there.
pub const DEFAULT_HANDLER: &str = "mesocri";
/// File name of our shim.
const SHIM: &str = "containerd-shim-mesocri-v1";
/// File name of the program that holds the namespaces of pods under foreign shims.
const PAUSE: &str = "mesocri-init";

/// Table `[launcher]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Our shim's program. Unset: `containerd-shim-mesocri-v1` beside the daemon's own program, else in `PATH`.
    pub shim: Option<PathBuf>,
    /// Statically linked program that waits for ever, run in pods of foreign shims. Unset: `mesocri-init` beside the daemon's own
    /// program, else in `PATH`.
    pub pause: Option<PathBuf>,
    /// Its arguments.
    pub pause_args: Vec<String>,
    /// Runtime handlers beyond `mesocri`, by the name that pods ask for.
    pub handlers: BTreeMap<String, Handler>,
    /// Seconds a shim may take to start or to answer a request that does not wait for a process.
    pub request_timeout: u64,
    /// Seconds a shim may take to answer after a restart of the daemon.
    pub reattach_timeout: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { shim: None, pause: None, pause_args: vec!["pause".to_owned()], handlers: BTreeMap::new(), request_timeout: 60, reattach_timeout: 5 }
    }
}

/// Table `[launcher.handlers.NAME]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Handler {
    /// Absolute path of a shim, or containerd's runtime type: `io.containerd.runc.v2` is `containerd-shim-runc-v2` in `PATH`.
    pub runtime: String,
    /// Options of runc's shim as containerd's configuration spells them: `BinaryName`, `Root`, `SystemdCgroup`, `NoPivotRoot`, `NoNewKeyring`.
    pub options: toml::Table,
}

impl Handler {
    /// The shim's program.
    ///
    /// # Errors
    /// `InvalidArgument` for something that is neither path nor type; `NotFound`.
    pub fn program(&self) -> Result<PathBuf> {
        if self.runtime.starts_with('/') {
            return Ok(PathBuf::from(&self.runtime));
        }
        let mut parts = self.runtime.rsplit('.');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(version), Some(name), Some(_)) if !version.is_empty() && !name.is_empty() && !self.runtime.contains('/') => {
                in_path(&format!("containerd-shim-{name}-{version}"))
            }
            _ => Err(Error::invalid(format!("runtime {:?}: neither an absolute path nor a type such as io.containerd.runc.v2", self.runtime))),
        }
    }
}

impl Config {
    /// Our shim's program.
    ///
    /// # Errors
    /// `NotFound`, naming where it was looked for.
    pub fn shim_program(&self) -> Result<PathBuf> {
        self.shim.clone().map_or_else(|| beside_or_in_path(SHIM), Ok)
    }

    /// The program of [`Config::pause`].
    ///
    /// # Errors
    /// `NotFound`.
    pub fn pause_program(&self) -> Result<PathBuf> {
        self.pause.clone().map_or_else(|| beside_or_in_path(PAUSE), Ok)
    }

    /// [`Config::request_timeout`] as a duration.
    pub fn request_limit(&self) -> Duration {
        Duration::from_secs(self.request_timeout)
    }

    /// [`Config::reattach_timeout`] as a duration.
    pub fn reattach_limit(&self) -> Duration {
        Duration::from_secs(self.reattach_timeout)
    }
}

fn beside_or_in_path(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    match own.map(|dir| dir.join(name)).filter(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => in_path(name),
    }
}

fn in_path(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| Error::not_found(format!("program {name} beside the daemon or in PATH")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_are_paths_or_types() {
        let handler = |runtime: &str| Handler { runtime: runtime.to_owned(), ..Handler::default() }.program();
        assert_eq!(handler("/opt/shim").unwrap(), PathBuf::from("/opt/shim"));
        for bad in ["", "runc", "io.containerd/../x.v2", "a..v2"] {
            assert!(handler(bad).is_err(), "{bad}");
        }
        let error = handler("io.containerd.no-such-thing.v9").unwrap_err();
        assert!(error.to_string().contains("containerd-shim-no-such-thing-v9"), "{error}");
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(toml::from_str::<Config>("shmi = '/x'").is_err());
        let config: Config = toml::from_str("[handlers.crun]\nruntime = 'io.containerd.runc.v2'\noptions = { BinaryName = 'crun' }").unwrap();
        assert_eq!(config.handlers["crun"].options["BinaryName"].as_str(), Some("crun"));
        assert_eq!(config.request_timeout, Config::default().request_timeout);
    }
}
