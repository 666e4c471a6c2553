//! The bundle: `config.json` and `mesocri.json`, read in the forked child so that the shim's heap stays small.

use std::fs;
use std::io;
use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxNamespaceType, Process, Spec};

use super::fault::{Fault, On, Result};
use crate::model::plan::{EXTRAS_FILE, Extras};

/// A container's description.
pub(super) struct Bundle {
    pub(super) dir: PathBuf,
    pub(super) spec: Spec,
    pub(super) linux: Linux,
    pub(super) extras: Extras,
}

impl Bundle {
    pub(super) fn load(dir: PathBuf) -> Result<Self> {
        let path = dir.join("config.json");
        let bytes = fs::read(&path).on(path.display())?;
        let mut spec: Spec = serde_json::from_slice(&bytes).map_err(|e| Fault::new(format_args!("{}: {e}", path.display()), libc::EINVAL))?;
        let path = dir.join(EXTRAS_FILE);
        let extras = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Fault::new(format_args!("{}: {e}", path.display()), libc::EINVAL))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Extras::default(),
            Err(e) => return Err(e).on(path.display()),
        };
        let linux = spec.linux_mut().take().unwrap_or_default();
        Ok(Self { dir, spec, linux, extras })
    }

    pub(super) fn process(&self) -> Result<&Process> {
        self.spec.process().as_ref().ok_or_else(|| Fault::new("config.json without process", libc::EINVAL))
    }

    /// Whether the spec asks for a namespace of this type, new (`Some(false)`) or by path (`Some(true)`).
    pub(super) fn namespace(&self, typ: LinuxNamespaceType) -> Option<bool> {
        self.linux.namespaces().iter().flatten().find(|n| n.typ() == typ).map(|n| has_path(n.path()))
    }
}

/// Empty paths stand in some specs for "no path".
pub(super) fn has_path(path: &Option<PathBuf>) -> bool {
    path.as_ref().is_some_and(|p| !p.as_os_str().is_empty())
}
