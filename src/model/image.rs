//! Images as the engine knows them: configuration, names, layers. One record per image id.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::ids::ImageId;

/// What of the image's configuration the runtime uses (OCI image-spec config.md; Docker schema 2 has the same fields).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// First words of the command.
    pub entrypoint: Vec<String>,
    /// Default arguments, or the whole command without an entrypoint.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory, maybe empty.
    pub working_dir: String,
    /// `user[:group]`, names or numbers, maybe empty.
    pub user: String,
    /// Stop signal, name or number, maybe empty.
    pub stop_signal: String,
    /// Anonymous volumes.
    pub volumes: Vec<String>,
    /// Labels: data only, never control (attack case 14).
    pub labels: BTreeMap<String, String>,
    /// CPU architecture, `amd64`.
    pub architecture: String,
    /// Operating system, `linux`.
    pub os: String,
    /// RFC 3339 creation time, maybe empty.
    pub created: String,
    /// What only Appc images say; set for these and for no others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub appc: Option<Box<AppcConfig>>,
}

/// What an Appc manifest says beyond what all images do (App Container specification, `app` of the image manifest). Its mount points
/// are [`ImageConfig::volumes`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AppcConfig {
    /// The manifest has an `app`: without one the image is nothing to run, only to build upon.
    pub app: bool,
    /// Further groups of the first process.
    pub supplementary_gids: Vec<u32>,
    /// Those of the volumes that are read-only.
    pub read_only: Vec<String>,
    /// Limits, for containers that are given none.
    pub resources: AppcResources,
    /// All capabilities but these are to be dropped.
    pub retain_capabilities: Option<Vec<String>>,
    /// These are to be dropped.
    pub remove_capabilities: Vec<String>,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privileges: bool,
    /// Isolators and event handlers that are not acted upon, by name.
    pub ignored: Vec<String>,
    /// Fingerprint of the key whose signature was checked when it was pulled.
    pub signer: Option<String>,
}

/// The resource isolators of an Appc image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AppcResources {
    /// Thousandths of a processor that it should have.
    pub cpu_request: Option<u64>,
    /// Thousandths of a processor that it may have.
    pub cpu_limit: Option<u64>,
    /// Bytes of memory that it may have.
    pub memory_limit: Option<u64>,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of the uncompressed archive; the key in the store.
    pub diff_id: Digest,
    /// Digest of the blob it came from.
    pub blob: Option<Digest>,
    /// Bytes of the blob.
    pub blob_size: u64,
}

/// An image in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of the configuration.
    pub id: ImageId,
    /// Full names with a tag, `docker.io/library/busybox:1.36`.
    pub repo_tags: Vec<String>,
    /// Full names with the digest of what was pulled.
    pub repo_digests: Vec<String>,
    /// Lowest first.
    pub layers: Vec<Layer>,
    /// Parsed configuration.
    pub config: ImageConfig,
    /// The configuration document, verbatim (verbose status shows it).
    pub config_json: String,
    /// Unpacked bytes on disk, never 0.
    pub size: u64,
    /// Not collected automatically.
    pub pinned: bool,
}

impl Image {
    /// `uid` and `username` of the configuration's user, the group stripped; empty: neither (cri-behaviour §13.2).
    pub fn user(&self) -> (Option<i64>, String) {
        let user = self.config.user.split(':').next().unwrap_or_default();
        match user.parse::<i64>() {
            _ if user.is_empty() => (None, String::new()),
            Ok(uid) => (Some(uid), String::new()),
            Err(_) => (None, user.to_owned()),
        }
    }
}

/// Space of a file system part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsUsage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// One mount of a root filesystem, in the order to be made; same form as containerd's `Mount`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootMount {
    /// `overlay`, `bind`, `erofs` or `aufs`.
    pub fstype: String,
    /// Source, as in mount(2).
    pub source: String,
    /// Options; overlay's `lowerdir=` lists the topmost layer first, a name ending in `.erofs` being an image to mount.
    pub options: Vec<String>,
}

/// A provisioned root filesystem: how to mount it and where its parts lie on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Name of the backend that made it.
    pub backend: String,
    /// Mounts to make at the container's root.
    pub mounts: Vec<RootMount>,
    /// Host directories (or images, see `disk::layer`) that together show the image's files, topmost first; for reading `/etc/passwd` and the like
    /// without mounting. Includes the writable one.
    pub lookup: Vec<std::path::PathBuf>,
    /// The writable directory, whose usage is the container's.
    pub writable: Option<std::path::PathBuf>,
}
