//! `namespaces/ipc`: the pod's System V objects, message queues and `/dev/shm`, all shared by its containers.
//!
//! The pod's shared memory is a tmpfs mounted on the host, because it must be one file system for all containers and outlive
//! each of them. It is unmounted by `cleanup`, and after a crash by `recover`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use oci_spec::runtime::LinuxNamespaceType::Ipc;
use serde::{Deserialize, Serialize};

use super::parts::{config, mount, namespace, options};
use super::{Cx, Entry, Isolator};
use crate::disk::Layout;
use crate::model::error::{Act, Error, Result};
use crate::model::plan::LaunchPatch;
use crate::model::pod::NamespaceMode;
use crate::model::{ContainerId, PodId, PodSpec};

const NAME: &str = "namespaces/ipc";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["filesystem/linux"],
    options: |table| options::<Config>(NAME, table),
    create: |deps, table| Ok(Box::new(IpcNamespace { config: config(NAME, table)?, layout: deps.layout.clone() })),
};

/// Options of `namespaces/ipc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes that a pod's `/dev/shm` may hold; 64 MiB by default.
    pub shm_size: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { shm_size: 64 << 20 }
    }
}

struct IpcNamespace {
    config: Config,
    layout: Layout,
}

#[async_trait]
impl Isolator for IpcNamespace {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let own = cx.pod.namespaces.ipc != NamespaceMode::Node;
        let shm = self.layout.shm(cx.pod_id);
        let mut patch = LaunchPatch::default();
        match &cx.container {
            None if own => {
                self.mount_shm(&shm)?;
                patch.namespaces.push(namespace(Ipc, None));
            }
            None => {}
            Some(container) => {
                if own {
                    let path = container.sandbox.namespaces.get("ipc");
                    let path = path.ok_or_else(|| Error::internal("join the pod's IPC namespace: the sandbox names none"))?;
                    patch.namespaces.push(namespace(Ipc, Some(path.clone())));
                }
                let source = if own { shm.as_path() } else { Path::new("/dev/shm") };
                patch.mounts.push(mount("/dev/shm", "bind", source, &["rbind", "rprivate", "rw"]));
            }
        }
        Ok(patch)
    }

    async fn cleanup(&self, pod_id: &PodId, _: &PodSpec, container: Option<&ContainerId>) -> Result<()> {
        if container.is_some() { Ok(()) } else { unmount(&self.layout.shm(pod_id)) }
    }

    async fn recover(&self, known: &[PodId]) -> Result<()> {
        let entries = match std::fs::read_dir(self.layout.run_pods()) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(format!("read directory {}", self.layout.run_pods().display()), e)),
        };
        for entry in entries {
            let entry = entry.act("read directory", self.layout.run_pods().display())?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !known.iter().any(|id| id.as_str() == name) {
                unmount(&self.layout.shm(&PodId::from_string(name)))?;
            }
        }
        Ok(())
    }
}

impl IpcNamespace {
    /// Mounts the pod's tmpfs unless it is there already.
    fn mount_shm(&self, path: &Path) -> Result<()> {
        std::fs::create_dir_all(path).act("create", path.display())?;
        let device = |p: &Path| std::fs::metadata(p).map(|m| m.dev()).act("stat", p.display());
        if device(path)? != device(path.parent().unwrap_or(path))? {
            return Ok(());
        }
        let options = format!("mode=1777,size={}", self.config.shm_size);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        nix::mount::mount(Some("shm"), path, Some("tmpfs"), flags, Some(options.as_str())).act("mount tmpfs", path.display())
    }
}

/// Unmounts and removes `path`; what is not mounted or not there is fine. Detached: a process that still uses it does not
/// hold up the pod's removal.
fn unmount(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(e).act("unmount", path.display()),
    }
    match std::fs::remove_dir(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("remove {}", path.display()), e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;

    fn isolator(bench: &Bench) -> Box<dyn Isolator> {
        (ENTRY.create)(&bench.deps, "shm_size = 1048576".parse().unwrap()).unwrap()
    }

    fn mounted(path: &Path) -> bool {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        text.lines().any(|l| l.split(' ').nth(4) == Some(path.to_str().unwrap()))
    }

    #[tokio::test]
    async fn one_tmpfs_per_pod_shared_by_containers_gone_after_cleanup() {
        let mut bench = Bench::new();
        bench.sandbox.namespaces.insert("ipc".into(), "/proc/7/ns/ipc".into());
        let isolator = isolator(&bench);
        let shm = bench.deps.layout.shm(&bench.pod_id);
        for _ in 0..2 {
            assert_eq!(bench.prepare_sandbox(&*isolator).await.unwrap().namespaces, [namespace(Ipc, None)]);
        }
        let stat = nix::sys::statvfs::statvfs(&shm).unwrap();
        assert_eq!(stat.blocks() * stat.fragment_size(), 1 << 20);
        assert_eq!(std::fs::metadata(&shm).unwrap().mode() & 0o7777, 0o1777);
        let patch = bench.prepare(&*isolator).await.unwrap();
        assert_eq!(patch.mounts[0].source().as_deref(), Some(shm.as_path()));
        assert_eq!(patch.namespaces, [namespace(Ipc, Some("/proc/7/ns/ipc".into()))]);

        isolator.cleanup(&bench.pod_id, &bench.pod, Some(&bench.id)).await.unwrap();
        assert!(mounted(&shm));
        for _ in 0..2 {
            isolator.cleanup(&bench.pod_id, &bench.pod, None).await.unwrap();
        }
        assert!(!mounted(&shm) && !shm.exists());
    }

    #[tokio::test]
    async fn recovery_unmounts_what_no_known_pod_owns() {
        let mut bench = Bench::new();
        let isolator = isolator(&bench);
        bench.prepare_sandbox(&*isolator).await.unwrap();
        let (kept, kept_id) = (bench.deps.layout.shm(&bench.pod_id), bench.pod_id.clone());
        bench.pod_id = PodId::random();
        bench.prepare_sandbox(&*isolator).await.unwrap();
        let orphan = bench.deps.layout.shm(&bench.pod_id);
        isolator.recover(std::slice::from_ref(&kept_id)).await.unwrap();
        assert!(mounted(&kept) && !mounted(&orphan));
        isolator.recover(&[]).await.unwrap();
        assert!(!mounted(&kept));
    }

    #[tokio::test]
    async fn host_ipc_binds_the_hosts_shm() {
        let mut bench = Bench::new();
        bench.pod.namespaces.ipc = NamespaceMode::Node;
        let isolator = isolator(&bench);
        assert_eq!(bench.prepare_sandbox(&*isolator).await.unwrap(), LaunchPatch::default());
        let patch = bench.prepare(&*isolator).await.unwrap();
        assert!(patch.namespaces.is_empty());
        assert_eq!(patch.mounts[0].source().as_deref(), Some(Path::new("/dev/shm")));
    }
}
