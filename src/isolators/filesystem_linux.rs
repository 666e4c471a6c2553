//! `filesystem/linux`: a container's own mount namespace and root, the file systems every Linux program expects, and the
//! hidden and read-only paths (cri-behaviour §10, §11).
//!
//! Volumes, shared memory, the pod's files and control groups are other isolators' mounts.

use async_trait::async_trait;
use oci_spec::runtime as oci;

use super::parts::{NoConfig, config, mount, namespace, options};
use super::{Cx, Entry, Isolator};
use crate::model::ContainerSpec;
use crate::model::container::Propagation;
use crate::model::error::{Error, Kind, Result};
use crate::model::plan::LaunchPatch;

const NAME: &str = "filesystem/linux";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::new(Kind::PermissionDenied, format!("isolator {NAME} needs root")));
        }
        Ok(Box::new(FilesystemLinux))
    },
};

struct FilesystemLinux;

#[async_trait]
impl Isolator for FilesystemLinux {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = cx.container else { return Ok(LaunchPatch::default()) };
        let security = &container.spec.security;
        let paths = |asked: &Vec<String>| if security.privileged { Vec::new() } else { asked.clone() };
        Ok(LaunchPatch {
            root_readonly: Some(security.readonly_rootfs),
            rootfs_propagation: rootfs_propagation(container.spec).map(str::to_owned),
            mounts: default_mounts(security.privileged),
            namespaces: vec![namespace(oci::LinuxNamespaceType::Mount, None)],
            masked_paths: Some(paths(&security.masked_paths)),
            readonly_paths: Some(paths(&security.readonly_paths)),
            ..LaunchPatch::default()
        })
    }
}

fn default_mounts(privileged: bool) -> Vec<oci::Mount> {
    let sys = if privileged { "rw" } else { "ro" };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys]),
    ]
}

/// A volume can only receive or pass on mounts if the container's root does: the widest wish of all volumes wins.
fn rootfs_propagation(spec: &ContainerSpec) -> Option<&'static str> {
    let any = |wish| spec.mounts.iter().any(|m| m.propagation == wish);
    if any(Propagation::Bidirectional) {
        Some("rshared")
    } else if any(Propagation::HostToContainer) {
        Some("rslave")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, options};
    use super::*;
    use crate::model::container::Mount;

    #[tokio::test]
    async fn sys_is_read_only_and_paths_are_masked_unless_privileged() {
        let mut bench = Bench::new();
        bench.spec.security.masked_paths = vec!["/proc/kcore".into()];
        bench.spec.security.readonly_paths = vec!["/proc/sys".into()];
        let patch = bench.prepare(&FilesystemLinux).await.unwrap();
        assert!(options(&patch, "/sys").contains(&"ro".to_owned()));
        assert_eq!(patch.masked_paths, Some(vec!["/proc/kcore".to_owned()]));
        assert_eq!(patch.readonly_paths, Some(vec!["/proc/sys".to_owned()]));
        assert_eq!(patch.root_readonly, Some(false));

        bench.spec.security.privileged = true;
        bench.spec.security.readonly_rootfs = true;
        let patch = bench.prepare(&FilesystemLinux).await.unwrap();
        assert!(options(&patch, "/sys").contains(&"rw".to_owned()));
        assert_eq!((patch.masked_paths, patch.readonly_paths), (Some(Vec::new()), Some(Vec::new())));
        assert_eq!(patch.root_readonly, Some(true));
    }

    #[tokio::test]
    async fn the_widest_propagation_of_all_volumes_wins() {
        let mut bench = Bench::new();
        for (propagations, root) in [
            (vec![], None),
            (vec![Propagation::Private], None),
            (vec![Propagation::Private, Propagation::HostToContainer], Some("rslave")),
            (vec![Propagation::Bidirectional, Propagation::HostToContainer], Some("rshared")),
        ] {
            bench.spec.mounts = propagations.iter().map(|p| Mount { propagation: *p, ..Mount::default() }).collect();
            assert_eq!(bench.prepare(&FilesystemLinux).await.unwrap().rootfs_propagation.as_deref(), root);
        }
    }

    #[tokio::test]
    async fn a_sandbox_has_no_file_system() {
        assert_eq!(Bench::new().prepare_sandbox(&FilesystemLinux).await.unwrap(), LaunchPatch::default());
    }
}
