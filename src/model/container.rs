//! What a front asks for when it asks for a container, free of any wire protocol.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::pod::Namespaces;
use super::resources::Resources;

/// Name of a container, unique within its pod together with `attempt`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContainerMetadata {
    /// Name in the pod.
    pub name: String,
    /// How often the orchestrator made it before.
    pub attempt: u32,
}

/// How mounts below a volume travel (`mount_namespaces(7)`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// `rprivate`.
    #[default]
    Private,
    /// `rslave`: host mounts appear inside. The source must lie on a shared or slave mount.
    HostToContainer,
    /// `rshared`: both ways. The source must lie on a shared mount.
    Bidirectional,
}

/// An image mounted as a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// Reference as asked for.
    pub image: String,
    /// Relative directory inside the image; empty is its root.
    pub sub_path: String,
}

/// A volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where inside the container.
    pub container_path: String,
    /// What on the host; empty for image volumes. Symlinks in it are followed.
    pub host_path: String,
    /// Not writable (this mount only; see `recursive_read_only`).
    pub readonly: bool,
    /// All mounts below are read-only too; needs `readonly` and private propagation.
    pub recursive_read_only: bool,
    /// Relabel for SELinux.
    pub selinux_relabel: bool,
    /// Travel of mounts below it.
    pub propagation: Propagation,
    /// Set for image volumes.
    pub image: Option<ImageVolume>,
}

/// A device node made inside and allowed by the device cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Path on the host; a directory is walked.
    pub host_path: String,
    /// Path inside.
    pub container_path: String,
    /// Any of `r`, `w`, `m`.
    pub permissions: String,
}

/// Which system call filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecurityProfile {
    /// None.
    #[default]
    Unconfined,
    /// The runtime's own.
    RuntimeDefault,
    /// The profile in this file (seccomp) or of this name (AppArmor).
    Localhost(String),
}

/// First process's user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UserSpec {
    /// Numeric user; wins over `username`.
    pub uid: Option<u32>,
    /// Numeric group; needs a user.
    pub gid: Option<u32>,
    /// User name in the image's `/etc/passwd`.
    pub username: Option<String>,
    /// Further groups.
    pub supplemental_groups: Vec<u32>,
    /// `true`: ignore the image's `/etc/group` (CRI policy Strict).
    pub strict_groups: bool,
}

/// Capabilities to add and drop, without `CAP_`, any case; `ALL` allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CapabilityChange {
    /// Added to bounding, effective, permitted.
    pub add: Vec<String>,
    /// Removed; after `ALL` additions, before single ones (cri-behaviour §11).
    pub drop: Vec<String>,
    /// Also inheritable and ambient.
    pub add_ambient: Vec<String>,
}

/// SELinux label parts; empty parts take the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SelinuxOptions {
    /// User.
    pub user: String,
    /// Role.
    pub role: String,
    /// Type.
    pub r#type: String,
    /// Level, `s0:c1,c2`.
    pub level: String,
}

/// Security context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// All capabilities, all devices, no filters; the pod must allow it.
    pub privileged: bool,
    /// Capability changes.
    pub capabilities: CapabilityChange,
    /// System call filter.
    pub seccomp: SecurityProfile,
    /// AppArmor profile; `None` is "not said".
    pub apparmor: Option<SecurityProfile>,
    /// SELinux label; `None` is "not said".
    pub selinux: Option<SelinuxOptions>,
    /// User and groups.
    pub user: UserSpec,
    /// Root file system read-only.
    pub readonly_rootfs: bool,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Hidden paths, exactly these.
    pub masked_paths: Vec<String>,
    /// Read-only paths, exactly these.
    pub readonly_paths: Vec<String>,
}

/// An environment variable. Values are bytes (CRI 1.36), kept as given; NUL is refused by the front.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvVar {
    /// Name.
    pub name: String,
    /// Value.
    pub value: Vec<u8>,
}

/// A container, as asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    /// Name.
    pub metadata: ContainerMetadata,
    /// Image as asked for: id, tag, digest or short id.
    pub image: String,
    /// What the user wrote (CRI `user_specified_image`).
    pub user_specified_image: String,
    /// Annotations of the image reference, echoed.
    pub image_annotations: BTreeMap<String, String>,
    /// Runtime handler of the image reference, echoed.
    pub image_runtime_handler: String,
    /// Replaces the image's entrypoint, and then the image's arguments are dropped too.
    pub command: Vec<String>,
    /// Replaces the image's arguments.
    pub args: Vec<String>,
    /// Working directory; `None` is the image's.
    pub working_dir: Option<String>,
    /// Added after the image's variables; later wins.
    pub envs: Vec<EnvVar>,
    /// Volumes.
    pub mounts: Vec<Mount>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Labels, kept byte for byte.
    pub labels: BTreeMap<String, String>,
    /// Annotations, kept byte for byte.
    pub annotations: BTreeMap<String, String>,
    /// Below the pod's log directory; `None` turns the log off.
    pub log_path: Option<PathBuf>,
    /// Keeps stdin open.
    pub stdin: bool,
    /// Closes stdin when the first attached session ends it.
    pub stdin_once: bool,
    /// One terminal instead of three streams.
    pub tty: bool,
    /// Limits.
    pub resources: Resources,
    /// Security context.
    pub security: Security,
    /// Stop signal number; `None` takes the image's, else SIGTERM.
    pub stop_signal: Option<i32>,
}
