//! F3: the provisioner. Pulls images into one canonical layer store, builds root filesystems from layers, collects what
//! nobody uses. Whoever calls (CRI, Mesos), this is the only owner of the store directory.

pub mod backends;
pub mod config;
mod engine;
pub mod gc;
pub mod images;
mod implied;
pub mod layers;
mod leases;
mod metadata;
mod pull;
pub mod pullers;
pub mod remove;
pub mod save;
pub mod scrub;
pub mod unpack;
pub mod upkeep;
pub mod usage;
mod volumes;

pub use config::Config;
pub use engine::Provisioner;
pub use upkeep::Upkeep;

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::model::error::{Error, Kind, Result};
use crate::model::image::{FsUsage, Image, RootFs};
use crate::model::{ImageId, Reference};

/// Credentials of one request (CRI `AuthConfig`, cri-behaviour §13.3). Never logged: no `Debug`.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// OAuth2 refresh token.
    pub identity_token: String,
    /// Bearer token, sent as it is.
    pub registry_token: String,
    /// If set, the only registry host these may be sent to.
    pub server_address: String,
}

/// One image to pull.
#[derive(Clone)]
pub struct PullRequest {
    /// What.
    pub reference: Reference,
    /// With which credentials; `None` is anonymous.
    pub credentials: Option<Credentials>,
    /// What the store has under this name is enough (`Image.cached` of Mesos). Otherwise the source is asked, and only layers
    /// that are there already are not fetched; CRI's `PullImage` means that.
    pub cached: bool,
}

/// Progress of a pull, one event per change worth showing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullEvent {
    /// The manifest is known.
    Resolved {
        /// Blob digests in layer order, with their compressed bytes.
        layers: Vec<(String, u64)>,
    },
    /// A layer was in the store already.
    Exists {
        /// Index into the layers.
        layer: usize,
    },
    /// Compressed bytes of a layer have arrived.
    Downloaded {
        /// Index into the layers.
        layer: usize,
        /// Bytes so far.
        bytes: u64,
    },
    /// A layer is unpacked and verified.
    Unpacked {
        /// Index into the layers.
        layer: usize,
    },
    /// The image is committed.
    Committed,
}

/// What the containerizer and the fronts need of images.
#[async_trait]
pub trait Images: Send + Sync {
    /// Pulls an image; identical pulls that run at once share the work. Returns when the image is durable and listed.
    /// Cancelling (or dropping every waiter) stops the work and leaves nothing behind.
    ///
    /// # Errors
    /// `NotFound` (no such image, tag or platform), `Unauthenticated`, `PermissionDenied`, `Unavailable` (registry not
    /// reachable; message starts with `RegistryUnavailable: `), `DataLoss` (digest mismatch), `ResourceExhausted`, `Cancelled`.
    async fn pull(&self, request: PullRequest, progress: Option<mpsc::UnboundedSender<PullEvent>>, cancel: CancellationToken) -> Result<ImageId>;

    /// Imports every image of an archive (docker-archive or OCI layout, file or directory).
    ///
    /// # Errors
    /// `InvalidArgument` when it is neither, `DataLoss` on digest mismatches.
    async fn load(&self, archive: &std::path::Path) -> Result<Vec<ImageId>>;

    /// All images. From memory.
    fn list(&self) -> Vec<Arc<Image>>;

    /// Finds by id, unique id prefix (with or without `sha256:`), tag, digest or name without tag. From memory.
    fn resolve(&self, key: &str) -> Option<Arc<Image>>;

    /// Removes all references of the image that `key` names; unknown is fine. Its layers go as soon as nothing uses them.
    ///
    /// # Errors
    /// I/O failures.
    async fn remove(&self, key: &str) -> Result<()>;

    /// Bytes and inodes that the store occupies on disk, and the directory to name as its mount point.
    ///
    /// # Errors
    /// I/O failures.
    async fn fs_info(&self) -> Result<(std::path::PathBuf, FsUsage)>;

    /// What the store has on disk that no image, container or running work accounts for. Cheap. Not 0 is a fault.
    ///
    /// # Errors
    /// I/O failures.
    async fn unexplained(&self) -> Result<FsUsage>;

    /// Builds the root filesystem of `container` from `image`, which stays leased until [`Images::release`]. Idempotent.
    ///
    /// # Errors
    /// `NotFound` when the image vanished, `ResourceExhausted`.
    async fn provision(&self, container: &str, image: &Image) -> Result<RootFs>;

    /// Makes the files of `image`, or what `sub_path` names in it, readable at a path of the host, for volume `number` of
    /// `container`; the image stays leased until [`Images::release`]. The path is good until [`Images::settle_volumes`].
    ///
    /// # Errors
    /// Messages begin with `ImageVolumeMountFailed: `. `NotFound` for a sub-path that the image does not have, `InvalidArgument`
    /// for one that leads out of it.
    async fn provision_volume(&self, container: &str, number: usize, image: &Image, sub_path: &str) -> Result<std::path::PathBuf> {
        let _ = (number, image, sub_path);
        Err(Error::new(Kind::Unimplemented, format!("mount an image into {container}")))
    }

    /// The container has its volumes, or will never have them: the host sees them no longer.
    ///
    /// # Errors
    /// I/O failures.
    async fn settle_volumes(&self, container: &str) -> Result<()> {
        let _ = container;
        Ok(())
    }

    /// Whether `container` may start: nothing it was made from is known to be damaged. From memory.
    ///
    /// # Errors
    /// `DataLoss` naming the layer and the image.
    fn check_container(&self, container: &str) -> Result<()>;

    /// Removes the root filesystem of `container` and its image volumes; unknown is fine.
    ///
    /// # Errors
    /// I/O failures.
    async fn release(&self, container: &str) -> Result<()>;

    /// Bytes and inodes of the container's writable part, and when they were counted (ns since the epoch). May be some
    /// seconds old; counted in the background. `None` for unknown containers.
    fn usage(&self, container: &str) -> Option<(FsUsage, i64)>;

    /// After a restart: drops root filesystems and leases of containers that are not in `known`, sweeps staging.
    ///
    /// # Errors
    /// I/O failures.
    async fn recover(&self, known: &[String]) -> Result<()>;
}
