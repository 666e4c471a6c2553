//! Path helpers: the only place where names of the tree in [`crate::disk`] are joined.

use std::path::{Path, PathBuf};

use crate::model::digest::Digest;
use crate::model::ids::{ContainerId, ImageId, PodId};

/// Hexadecimal digits of a diff id in a layer's directory name: 128 bits, short enough for long `lowerdir` options.
const LAYER_HEX: usize = 32;
/// Hexadecimal digits of a pod id in its network namespace's name.
const NETNS_HEX: usize = 20;

/// The two roots of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Persistent root.
    pub root: PathBuf,
    /// State root, gone after a reboot.
    pub state: PathBuf,
    /// Where network namespaces are pinned.
    pub netns: PathBuf,
}

impl Layout {
    /// A tree at these roots, network namespaces at `/run/netns`.
    pub fn new(root: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), state: state.into(), netns: PathBuf::from("/run/netns") }
    }

    /// Format number file.
    pub fn version(&self) -> PathBuf {
        self.root.join("version")
    }

    /// Image store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// All layers.
    pub fn layers(&self) -> PathBuf {
        self.store().join("layers")
    }

    /// One layer's directory.
    pub fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.layers().join(diff_id.hex().get(..LAYER_HEX).unwrap_or(diff_id.hex()))
    }

    /// Image records.
    pub fn images(&self) -> PathBuf {
        self.store().join("images")
    }

    /// One image's record.
    pub fn image(&self, id: &ImageId) -> PathBuf {
        let hex = id.as_str().rsplit(':').next().unwrap_or_default();
        self.images().join(format!("{hex}.json"))
    }

    /// Layers being unpacked.
    pub fn staging(&self) -> PathBuf {
        self.store().join("staging")
    }

    /// Damaged layers that were replaced and that containers still use.
    pub fn damaged(&self) -> PathBuf {
        self.store().join("damaged")
    }

    /// Leases on layers.
    pub fn leases(&self) -> PathBuf {
        self.store().join("leases")
    }

    /// Writable parts of root filesystems.
    pub fn rootfs_all(&self) -> PathBuf {
        self.store().join("rootfs")
    }

    /// One container's writable part.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        self.rootfs_all().join(id)
    }

    /// Image volumes that are mounted on the host while their container is being made.
    pub fn volumes_mounted(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// One of them.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.volumes_mounted().join(name)
    }

    /// Pod records.
    pub fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// One pod's persistent directory.
    pub fn pod(&self, id: &PodId) -> PathBuf {
        self.pods().join(id.as_str())
    }

    /// One pod's record.
    pub fn pod_record(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("pod.json")
    }

    /// Persistent directories of a pod's containers.
    pub fn containers(&self, pod: &PodId) -> PathBuf {
        self.pod(pod).join("containers")
    }

    /// One container's persistent directory.
    pub fn container(&self, pod: &PodId, id: &ContainerId) -> PathBuf {
        self.containers(pod).join(id.as_str())
    }

    /// One container's record.
    pub fn container_record(&self, pod: &PodId, id: &ContainerId) -> PathBuf {
        self.container(pod, id).join("container.json")
    }

    /// Anonymous volumes of a container.
    pub fn volumes(&self, pod: &PodId, id: &ContainerId) -> PathBuf {
        self.container(pod, id).join("volumes")
    }

    /// Kept facts of networks.
    pub fn networks(&self) -> PathBuf {
        self.root.join("networks")
    }

    /// Records of what pods got from their networks.
    pub fn network_records(&self) -> PathBuf {
        self.networks().join("pods")
    }

    /// What one pod got from its network.
    pub fn network_record(&self, id: &PodId) -> PathBuf {
        self.network_records().join(format!("{id}.json"))
    }

    /// The pod range that the front gave last.
    pub fn pod_cidr(&self) -> PathBuf {
        self.networks().join("pod-cidr.json")
    }

    /// Unreadable records.
    pub fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// CRI socket.
    pub fn cri_socket(&self) -> PathBuf {
        self.state.join("mesocri.sock")
    }

    /// Lock against a second daemon.
    pub fn lock(&self) -> PathBuf {
        self.state.join("lock")
    }

    /// Shim sockets.
    pub fn shims(&self) -> PathBuf {
        self.state.join("shims")
    }

    /// The socket of a pod's shim. Named by 20 hex digits: a unix socket path has 108 bytes at most.
    pub fn shim_socket(&self, pod: &PodId) -> PathBuf {
        self.shims().join(format!("{}.sock", pod.as_str().get(..NETNS_HEX).unwrap_or(pod.as_str())))
    }

    /// Run directories of all pods.
    pub fn run_pods(&self) -> PathBuf {
        self.state.join("pods")
    }

    /// One pod's run directory.
    pub fn run_pod(&self, id: &PodId) -> PathBuf {
        self.run_pods().join(id.as_str())
    }

    /// Bundle of the pod's sandbox.
    pub fn sandbox_bundle(&self, id: &PodId) -> PathBuf {
        self.run_pod(id).join("sandbox")
    }

    /// The pod's shared memory file system.
    pub fn shm(&self, id: &PodId) -> PathBuf {
        self.run_pod(id).join("shm")
    }

    /// A file that is bound into each container: `hosts`, `hostname`, `resolv.conf`.
    pub fn pod_file(&self, id: &PodId, name: &str) -> PathBuf {
        self.run_pod(id).join(name)
    }

    /// Bundle of a container.
    pub fn bundle(&self, pod: &PodId, id: &ContainerId) -> PathBuf {
        self.run_pod(pod).join("containers").join(id.as_str())
    }

    /// Names the parent cgroup that the daemon is making; not there at other times.
    pub fn own_cgroup_parent(&self) -> PathBuf {
        self.state.join("cgroup-parent")
    }

    /// Compiled system call filters.
    pub fn seccomp(&self) -> PathBuf {
        self.state.join("seccomp")
    }

    /// The pinned network namespace of a pod.
    pub fn netns(&self, id: &PodId) -> PathBuf {
        self.netns.join(format!("mesocri-{}", id.as_str().get(..NETNS_HEX).unwrap_or(id.as_str())))
    }
}

/// Joins a path from a caller below `base` without ever leaving it textually; for names, not for following links.
pub fn below(base: &Path, relative: &Path) -> Option<PathBuf> {
    use std::path::Component;
    relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)).then(|| base.join(relative))
}
