//! Bundles: the directory a shim is given for a sandbox or container, with the OCI spec and what it cannot say.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::disk::bundle::{self, CONFIG, Made, Of};
use crate::model::error::{Act, Error, Result};
use crate::model::plan::{EXTRAS_FILE, Extras, LaunchPlan};

/// What the daemon notes of another runtime's shim in the sandbox's bundle ([`Noted`]).
const FOREIGN: &str = "foreign.json";

/// Makes the directory and writes the plan into it. No sync: a restart of the machine ends all that a bundle is for.
///
/// # Errors
/// I/O errors with the path; nothing is left behind.
pub fn write(dir: &Path, plan: &LaunchPlan) -> Result<()> {
    let result = write_into(dir, plan);
    if result.is_err() {
        let _ = std::fs::remove_dir_all(dir);
    }
    result
}

/// Makes the directory alone, unless it is there.
///
/// # Errors
/// I/O errors with the path.
pub fn make_dir(dir: &Path) -> Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).act("create bundle", dir.display())
}

fn write_into(dir: &Path, plan: &LaunchPlan) -> Result<()> {
    make_dir(dir)?;
    let config = dir.join(CONFIG);
    bundle::put(&config, &serde_json::to_vec(&plan.spec).act("encode", config.display())?)?;
    if plan.extras != Extras::default() {
        let extras = dir.join(EXTRAS_FILE);
        bundle::put(&extras, &serde_json::to_vec(&plan.extras).act("encode", extras.display())?)?;
    }
    // Where foreign runtimes mount the root filesystem; ours mounts inside the container's own mount namespace.
    let rootfs = dir.join("rootfs");
    match std::fs::create_dir(&rootfs) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(Error::io(format!("create {}", rootfs.display()), e)),
        _ => Ok(()),
    }
}

/// Removes the directory, and what a foreign runtime left mounted in it. A bundle that is gone is fine.
///
/// # Errors
/// What could not be removed.
pub fn remove(dir: &Path) -> Result<()> {
    let rootfs = dir.join("rootfs");
    // Nothing mounted is the rule (EINVAL); a leftover mount must go first, or its content would be removed with the directory.
    let flags = rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW;
    while rustix::mount::unmount(&rootfs, flags).is_ok() {}
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("remove bundle {}", dir.display()), e)),
        _ => Ok(()),
    }
}

/// What to kill and remove for a container whose shim is gone: what the shim recorded, else the cgroup its spec names.
///
/// # Errors
/// I/O errors and damaged files, with the path.
pub fn made(dir: &Path) -> Result<Made> {
    if let Some(made) = bundle::read(dir, Of::Task)? {
        return Ok(made);
    }
    let extras: Extras = read(&dir.join(EXTRAS_FILE))?.unwrap_or_default();
    if extras.foreign_cgroup.is_some() {
        return Ok(Made { process: None, cgroup: extras.foreign_cgroup });
    }
    let spec: Option<Cgroups> = read(&dir.join(CONFIG))?;
    let path = spec.and_then(|spec| spec.linux).map(|linux| linux.cgroups_path).filter(|path| path.starts_with('/'));
    Ok(Made { process: None, cgroup: path })
}

#[derive(serde::Deserialize)]
struct Cgroups {
    linux: Option<LinuxCgroups>,
}

#[derive(serde::Deserialize)]
struct LinuxCgroups {
    #[serde(default, rename = "cgroupsPath")]
    cgroups_path: String,
}

/// Another runtime's shim, noted before and after its start: the pod can be found and ended by it also when its record is damaged or
/// the configuration does not know its handler any more.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Noted {
    /// The program it was started from; its `delete` verb cleans up after it.
    pub program: PathBuf,
    /// Where it listens and the task service it speaks; `None` when nobody heard it.
    pub said: Option<(String, String)>,
}

impl Noted {
    /// Writes it into the bundle.
    ///
    /// # Errors
    /// I/O errors with the path.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FOREIGN);
        bundle::put(&path, &serde_json::to_vec(self).act("encode", path.display())?)
    }

    /// Whether the sandbox is another runtime's, also where the note itself cannot be read.
    pub fn exists(dir: &Path) -> bool {
        dir.join(FOREIGN).exists()
    }

    /// Reads it; `None` for a sandbox of our own shim.
    ///
    /// # Errors
    /// I/O errors and a damaged file, with the path.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        read(&dir.join(FOREIGN))
    }
}

/// A JSON file; `None` when it is not there.
///
/// # Errors
/// I/O errors and damaged files, with the path.
pub fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).act("decode", path.display()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(format!("read {}", path.display()), e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("b");
        let mut plan = LaunchPlan::default();
        let linux = oci_spec::runtime::LinuxBuilder::default().cgroups_path("/m/x").build().unwrap();
        plan.spec.set_linux(Some(linux));
        write(&bundle, &plan).unwrap();
        assert!(!bundle.join(EXTRAS_FILE).exists(), "empty extras are not written");
        assert_eq!(made(&bundle).unwrap().cgroup.as_deref(), Some("/m/x"));
        plan.extras.foreign_cgroup = Some("/a.slice/x.scope".to_owned());
        write(&bundle, &plan).unwrap();
        assert_eq!(made(&bundle).unwrap().cgroup.as_deref(), Some("/a.slice/x.scope"));
        remove(&bundle).unwrap();
        remove(&bundle).unwrap();
        assert!(!bundle.exists());
    }
}
