//! Where the groups of a pod and its containers are: from `cgroup_parent` and the driver to paths. Pure.

use serde::{Deserialize, Serialize};

use crate::cgroups::CgroupPath;
use crate::model::error::{Error, Result};
use crate::model::{ContainerId, PodId};

/// Who makes the groups of containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The shim, directly in the file system.
    #[default]
    Cgroupfs,
    /// systemd, as transient scopes.
    Systemd,
}

/// First part of a scope's name. Tools that map groups to containers take the text after the last `-`.
const SCOPE_PREFIX: &str = "mesocri";

/// Where a pod's groups are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlace {
    /// The pod's own group.
    pub path: CgroupPath,
    /// Made and removed by us; otherwise it belongs to the caller.
    pub ours: bool,
    /// The slice's name with the systemd driver.
    pub slice: Option<String>,
}

impl PodPlace {
    /// From what the caller gave, `default_parent` when that is empty.
    ///
    /// # Errors
    /// `InvalidArgument` for a parent that is not of the driver's kind, has `..` components, `:` or control characters.
    pub fn new(driver: Driver, default_parent: &str, pod: &PodId, cgroup_parent: &str) -> Result<Self> {
        let ours = cgroup_parent.is_empty();
        match driver {
            Driver::Cgroupfs => {
                let path = if ours { CgroupPath::new(default_parent)?.join(pod.as_str())? } else { CgroupPath::new(cgroup_parent)? };
                Ok(Self { path, ours, slice: None })
            }
            Driver::Systemd => {
                let slice = if ours { slice_below(default_parent, pod) } else { slice_of(cgroup_parent)? };
                Ok(Self { path: CgroupPath::new(&slice_path(&slice)?)?, ours, slice: Some(slice) })
            }
        }
    }

    /// The group of a container in it.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that is no name.
    pub fn container(&self, id: &ContainerId) -> Result<CgroupPath> {
        self.path.join(&if self.slice.is_some() { scope(id) } else { id.to_string() })
    }

    /// `linux.cgroupsPath` of a container: a path, or `slice:prefix:name` for runtimes that talk to systemd.
    ///
    /// # Errors
    /// As [`PodPlace::container`].
    pub fn cgroups_path(&self, id: &ContainerId) -> Result<String> {
        match &self.slice {
            Some(slice) => Ok(format!("{slice}:{SCOPE_PREFIX}:{id}")),
            None => self.container(id).map(|path| path.as_str().to_owned()),
        }
    }
}

/// Name of a container's scope.
pub fn scope(id: &ContainerId) -> String {
    format!("{SCOPE_PREFIX}-{id}.scope")
}

/// The slice for a pod without a parent: `/mesocri` becomes `mesocri-<pod>.slice`, which lies in `mesocri.slice`.
fn slice_below(default_parent: &str, pod: &PodId) -> String {
    let name: Vec<&str> = default_parent.split('/').filter(|p| !p.is_empty()).map(|p| p.trim_end_matches(".slice")).collect();
    format!("{}-{pod}.slice", name.join("-"))
}

/// The slice that `cgroup_parent` names: its last element, which must be one (the kubelet sends the whole expanded path).
fn slice_of(cgroup_parent: &str) -> Result<String> {
    let bad = |why: &str| Error::invalid(format!("check cgroup parent {cgroup_parent:?} for the systemd driver: {why}"));
    let path = CgroupPath::new(cgroup_parent)?;
    let name = path.as_str().rsplit('/').next().unwrap_or_default();
    if !name.ends_with(".slice") {
        return Err(bad("its last element must be a slice (name.slice)"));
    }
    slice_path(name)?;
    Ok(name.to_owned())
}

/// Where systemd puts a slice: every `-` in its name is a level, `a-b.slice` is `/a.slice/a-b.slice`.
///
/// # Errors
/// `InvalidArgument` for names that systemd does not allow.
fn slice_path(slice: &str) -> Result<String> {
    let name = slice.strip_suffix(".slice").unwrap_or_default();
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '\\' | '@');
    if name.is_empty() || name.split('-').any(str::is_empty) || !name.chars().all(valid) || slice.len() > 255 {
        return Err(Error::invalid(format!("check slice {slice:?}: not a name that systemd takes")));
    }
    let mut path = String::new();
    for (at, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push('/');
        path.push_str(&name[..at]);
        path.push_str(".slice");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(driver: Driver, parent: &str) -> Result<(String, String, String)> {
        let (pod, id) = (PodId::from_string("p0d"), ContainerId::from_string("c1"));
        let p = PodPlace::new(driver, "/mesocri", &pod, parent)?;
        Ok((p.path.as_str().to_owned(), p.container(&id)?.as_str().to_owned(), p.cgroups_path(&id)?))
    }

    #[test]
    fn cgroupfs() {
        let paths = |parent| place(Driver::Cgroupfs, parent).unwrap();
        assert_eq!(paths(""), ("/mesocri/p0d".into(), "/mesocri/p0d/c1".into(), "/mesocri/p0d/c1".into()));
        assert_eq!(paths("/kubepods/pod1").1, "/kubepods/pod1/c1");
        assert_eq!(paths("x.slice").1, "/x.slice/c1");
        for bad in ["a.slice:x:y", "/a/../b", "/", "a\nb"] {
            assert!(place(Driver::Cgroupfs, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn systemd() {
        let paths = |parent| place(Driver::Systemd, parent).unwrap();
        let (pod, container, oci) = paths("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice");
        assert_eq!(pod, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice");
        assert_eq!(container, format!("{pod}/mesocri-c1.scope"));
        assert_eq!(oci, "kubepods-burstable-pod1_2.slice:mesocri:c1");
        assert_eq!(paths("kubepods-burstable.slice").0, "/kubepods.slice/kubepods-burstable.slice");
        assert_eq!(paths("/test.slice").0, "/test.slice");
        assert_eq!(paths("").0, "/mesocri.slice/mesocri-p0d.slice");
        for bad in ["/kubepods/pod1", "-.slice", "a--b.slice", ".slice", "a b.slice", "x.slice/..", "a:b:c.slice"] {
            assert!(place(Driver::Systemd, bad).is_err(), "{bad:?}");
        }
    }
}
