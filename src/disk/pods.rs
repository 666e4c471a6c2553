//! Records of pods and containers: where they are written, and how all of them are loaded at start.
//!
//! What a record holds is the business of the floor above, so everything here is generic over it. A record that cannot be read
//! is moved to quarantine and its directory is reported as an orphan: the pod or container it described is cleaned up, nothing
//! else is touched and the daemon starts (attack case 50).

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::record::{self, Durability};
use super::{Layout, tree};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::{ContainerId, PodId};

/// Everything that was found below the directory of pods.
#[derive(Debug)]
pub struct Loaded<P, C> {
    /// Pods with a readable record.
    pub pods: Vec<LoadedPod<P, C>>,
    /// Pod directories (persistent or run time) without a readable record.
    pub orphans: Vec<PodId>,
    /// What was quarantined and why, for the log.
    pub quarantined: Vec<String>,
}

/// One pod and what was found below it.
#[derive(Debug)]
pub struct LoadedPod<P, C> {
    /// Its record.
    pub pod: P,
    /// Records of its containers.
    pub containers: Vec<C>,
    /// Container directories (persistent or run time) without a readable record.
    pub orphans: Vec<ContainerId>,
}

/// A record that knows which directory it belongs in: a flipped bit in an id must not make us remove somebody else's.
pub trait Recorded: Serialize + DeserializeOwned {
    /// Whether this record belongs to this pod and, for a container's, to this container.
    fn belongs(&self, pod: &PodId, container: Option<&ContainerId>) -> bool;
}

/// Makes a pod's directories (0700) and writes its first record.
///
/// # Errors
/// I/O errors.
pub fn begin_pod<P: Recorded>(layout: &Layout, id: &PodId, pod: &P) -> Result<()> {
    make_dir(&layout.pod(id))?;
    make_dir(&layout.run_pod(id))?;
    write_pod(layout, id, pod)
}

/// Replaces a pod's record.
///
/// # Errors
/// I/O errors.
pub fn write_pod<P: Recorded>(layout: &Layout, id: &PodId, pod: &P) -> Result<()> {
    record::write(&layout.pod_record(id), pod, Durability::Atomic)
}

/// Makes a container's directory (0700) and writes its first record.
///
/// # Errors
/// I/O errors.
pub fn begin_container<C: Recorded>(layout: &Layout, pod: &PodId, id: &ContainerId, container: &C) -> Result<()> {
    make_dir(&layout.container(pod, id))?;
    write_container(layout, pod, id, container)
}

/// Replaces a container's record.
///
/// # Errors
/// I/O errors.
pub fn write_container<C: Recorded>(layout: &Layout, pod: &PodId, id: &ContainerId, container: &C) -> Result<()> {
    record::write(&layout.container_record(pod, id), container, Durability::Atomic)
}

/// Removes a pod's directories; the one with the record last, so that a crash leaves something to go on from.
///
/// # Errors
/// I/O errors; a mount that is left below.
pub fn remove_pod(layout: &Layout, id: &PodId) -> Result<()> {
    tree::remove(&layout.run_pod(id))?;
    tree::remove(&layout.pod(id))
}

/// Removes a container's directories; the one with the record last.
///
/// # Errors
/// I/O errors; a mount that is left below.
pub fn remove_container(layout: &Layout, pod: &PodId, id: &ContainerId) -> Result<()> {
    tree::remove(&layout.bundle(pod, id))?;
    tree::remove(&layout.container(pod, id))
}

/// Loads every record. Damaged ones are quarantined; that is never an error.
///
/// # Errors
/// Only when a directory of pods exists and cannot be listed.
pub fn load<P: Recorded, C: Recorded>(layout: &Layout) -> Result<Loaded<P, C>> {
    let mut loaded = Loaded { pods: Vec::new(), orphans: Vec::new(), quarantined: Vec::new() };
    for name in names(&layout.pods())? {
        let id = PodId::from_string(name);
        match read::<P>(layout, &layout.pod_record(&id), &id, None, &mut loaded.quarantined) {
            None => loaded.orphans.push(id),
            Some(pod) => {
                let (containers, orphans) = load_containers(layout, &id, &mut loaded.quarantined)?;
                loaded.pods.push(LoadedPod { pod, containers, orphans });
            }
        }
    }
    for name in names(&layout.run_pods())? {
        let id = PodId::from_string(name);
        if !loaded.orphans.contains(&id) && !layout.pod_record(&id).exists() {
            loaded.orphans.push(id);
        }
    }
    Ok(loaded)
}

fn load_containers<C: Recorded>(layout: &Layout, pod: &PodId, quarantined: &mut Vec<String>) -> Result<(Vec<C>, Vec<ContainerId>)> {
    let (mut containers, mut orphans) = (Vec::new(), Vec::new());
    for name in names(&layout.containers(pod))? {
        let id = ContainerId::from_string(name);
        match read(layout, &layout.container_record(pod, &id), pod, Some(&id), quarantined) {
            Some(container) => containers.push(container),
            None => orphans.push(id),
        }
    }
    let bundles = layout.bundle(pod, &ContainerId::from_string("x"));
    for name in bundles.parent().map(names).transpose()?.unwrap_or_default() {
        let id = ContainerId::from_string(name);
        if !orphans.contains(&id) && !layout.container_record(pod, &id).exists() {
            orphans.push(id);
        }
    }
    Ok((containers, orphans))
}

/// Reads one record; a damaged one goes to quarantine. A missing one (crash before the first write) is just not there.
fn read<T: Recorded>(layout: &Layout, path: &Path, pod: &PodId, container: Option<&ContainerId>, quarantined: &mut Vec<String>) -> Option<T> {
    let reason = match record::read::<T>(path) {
        Ok(record) if record.belongs(pod, container) => return Some(record),
        Ok(_) => Error::new(Kind::DataLoss, format!("decode record {}: it carries the id of another object", path.display())),
        Err(e) if e.kind == Kind::NotFound => return None,
        Err(e) => e,
    };
    let moved = record::quarantine(&layout.quarantine(), path, &reason);
    quarantined.push(format!("{reason}; {moved}"));
    None
}

/// Names of the directories in `dir`, none when it does not exist.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).act("list", dir.display()),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.act("list", dir.display())?;
        if entry.file_type().is_ok_and(|t| t.is_dir())
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

fn make_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).act("create directory", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::os::unix::fs::PermissionsExt;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Fake(String);

    impl Recorded for Fake {
        fn belongs(&self, pod: &PodId, container: Option<&ContainerId>) -> bool {
            self.0 == container.map_or(pod.as_str(), ContainerId::as_str)
        }
    }

    #[test]
    fn good_records_load_and_damaged_ones_are_quarantined_alone() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        let [good, torn, strange] = ["good", "torn", "strange"].map(PodId::from_string);
        for id in [&good, &torn, &strange] {
            begin_pod(&layout, id, &Fake(id.as_str().to_owned())).unwrap();
        }
        let [kept, damaged, bare] = ["kept", "damaged", "bare"].map(ContainerId::from_string);
        for id in [&kept, &damaged] {
            begin_container(&layout, &good, id, &Fake(id.as_str().to_owned())).unwrap();
        }
        std::fs::create_dir_all(layout.bundle(&good, &bare)).unwrap();
        std::fs::write(layout.container_record(&good, &damaged), "{\"version\":").unwrap();
        std::fs::write(layout.pod_record(&torn), "").unwrap();
        write_pod(&layout, &strange, &Fake("good".to_owned())).unwrap();
        std::fs::create_dir_all(layout.run_pod(&PodId::from_string("stray"))).unwrap();

        let loaded: Loaded<Fake, Fake> = load(&layout).unwrap();
        assert_eq!(loaded.pods.len(), 1);
        assert_eq!(loaded.pods[0].containers, vec![Fake("kept".into())]);
        assert_eq!(loaded.pods[0].orphans, vec![damaged, bare]);
        let mut orphans: Vec<_> = loaded.orphans.iter().map(PodId::as_str).collect();
        orphans.sort_unstable();
        assert_eq!(orphans, ["strange", "stray", "torn"]);
        assert_eq!(loaded.quarantined.len(), 3, "{:?}", loaded.quarantined);
        // A second start finds nothing more to report.
        assert!(load::<Fake, Fake>(&layout).unwrap().quarantined.is_empty());
    }

    #[test]
    fn directories_are_private_and_removal_takes_all() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        let (pod, container) = (PodId::from_string("p"), ContainerId::from_string("c"));
        begin_pod(&layout, &pod, &Fake("p".into())).unwrap();
        begin_container(&layout, &pod, &container, &Fake("c".into())).unwrap();
        for path in [layout.pod(&pod), layout.run_pod(&pod), layout.container(&pod, &container)] {
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700, "{}", path.display());
        }
        remove_container(&layout, &pod, &container).unwrap();
        assert!(!layout.container(&pod, &container).exists());
        remove_pod(&layout, &pod).unwrap();
        remove_pod(&layout, &pod).unwrap();
        assert!(!layout.pod(&pod).exists() && !layout.run_pod(&pod).exists());
    }
}
