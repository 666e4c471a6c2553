//! The provisioner put together: what the containerizer and the fronts call.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::backends::{self, Backend};
use super::config::{Config, Platform};
use super::gc::Policy;
use super::images::Images as Index;
use super::layers::{LayerRecord, Layers};
use super::leases::{Lease, Leases};
use super::pull::{self, Pulls};
use super::pullers::{archive, fetch::Fetcher, registry::Registries};
use super::usage::{self, Counts};
use super::{Images, PullEvent, PullRequest, implied, remove, volumes};
use crate::disk::layout::Layout;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::{FsUsage, Image, RootFs};
use crate::model::{Digest, ImageId};
use crate::stdx::clock::now_ns;
use crate::stdx::{blocking, failpoint};

/// Layers unpacked at once over all pulls, as a multiple of what one pull may do: a registry that stalls holds up to its share.
const LAYER_SHARES: usize = 3;

/// The only owner of the store.
pub struct Provisioner {
    pub(super) inner: Arc<Inner>,
}

/// Shared by the running work.
pub(super) struct Inner {
    pub(super) config: Config,
    pub(super) platform: Platform,
    pub(super) layout: Layout,
    pub(super) layers: Layers,
    pub(super) images: Index,
    pub(super) leases: Leases,
    pub(super) registries: Registries,
    pub(super) fetcher: Fetcher,
    pub(super) pulls: Pulls,
    pub(super) pull_permits: Semaphore,
    pub(super) layer_permits: Semaphore,
    pub(super) policy: Policy,
    backend: Box<dyn Backend>,
    counts: Counts,
    /// Containers whose root filesystem is being made or cleared away: their directory has no lease and is no debris.
    building: Mutex<HashSet<String>>,
}

/// The directory of a root filesystem that has no lease, for as long as somebody works on it.
pub(super) struct Building<'a> {
    inner: &'a Inner,
    name: String,
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        self.inner.building().remove(&self.name);
    }
}

impl Provisioner {
    /// Opens the store, making it if it is not there.
    ///
    /// # Errors
    /// When its directories cannot be used or the configured backend cannot work here.
    pub async fn open(config: Config, layout: Layout) -> Result<Arc<Self>> {
        if !config.appc_store_dir.as_os_str().is_empty() {
            tracing::warn!("appc_store_dir is not used: images of all formats share the store in {}", layout.store().display());
        }
        blocking::run("open image store", move || {
            let policy = Policy::new(&config)?;
            let layers = Layers::open(&layout)?;
            let pinned = |image: &Image| config.is_pinned(&image.repo_tags) || config.is_pinned(&image.repo_digests);
            let images = Index::open(&layout, |d| layers.has(d), pinned)?;
            let leases = Leases::open(&layout)?;
            let backend = backends::choose(&config.backend, config.backend_by_probe, &layout)?;
            layers.keep_as(backend.form());
            let counts = Counts::default();
            for lease in leases.all() {
                if let Some(dir) = &lease.rootfs.writable {
                    // A directory that cannot be read is this container's trouble, not the node's: counted again when somebody asks.
                    let counted = usage::count(dir).inspect_err(|error| tracing::warn!(container = lease.container, %error, "writable layer is not counted"));
                    counts.insert(&lease.container, dir.clone(), counted.ok());
                }
            }
            let registries = Registries::new(&config);
            let inner = Inner {
                platform: config.platform(),
                fetcher: Fetcher::new(&config, &registries),
                registries,
                pulls: Pulls::default(),
                pull_permits: Semaphore::new(config.max_parallel_pulls.max(1)),
                layer_permits: Semaphore::new(config.max_parallel_layers.max(1) * LAYER_SHARES),
                config,
                layout,
                layers,
                images,
                leases,
                policy,
                backend,
                counts,
                building: Mutex::default(),
            };
            Ok(Arc::new(Self { inner: Arc::new(inner) }))
        })
        .await
    }
}

impl Inner {
    pub(super) fn is_pinned(&self, image: &Image) -> bool {
        self.config.is_pinned(&image.repo_tags) || self.config.is_pinned(&image.repo_digests)
    }

    /// Counts a container's writable part now, instead of some seconds ago.
    #[cfg(test)]
    pub(super) fn recount_writable(&self, container: &str) {
        if let Some(writable) = self.leases.get(container).and_then(|l| l.rootfs.writable.clone()) {
            self.counts.refresh(container, &writable);
        }
    }

    fn building(&self) -> MutexGuard<'_, HashSet<String>> {
        self.building.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody works on the directory of this root filesystem.
    pub(super) fn is_building(&self, name: &str) -> bool {
        self.building().contains(name)
    }

    /// Takes the directory of a root filesystem to work on; `None` when somebody has it.
    pub(super) fn claim_rootfs(&self, name: &str) -> Option<Building<'_>> {
        self.building().insert(name.to_owned()).then(|| Building { inner: self, name: name.to_owned() })
    }

    /// What an image is asked for by, as the index has it: a short name means here what it means in a pull. What may also be the
    /// beginning of an id stays one unless there is an image of that name.
    pub(super) fn key<'a>(&self, key: &'a str) -> Cow<'a, str> {
        let hex = key.bytes().all(|b| b.is_ascii_hexdigit());
        if ["sha256:", "sha512:", "sha512-"].iter().any(|a| key.starts_with(a)) || (hex && matches!(key.len(), 64 | 128)) {
            return Cow::Borrowed(key);
        }
        match self.config.qualify_key(key) {
            Some(full) if !hex || self.images.look_up(&full).is_some() => Cow::Owned(full),
            _ => Cow::Borrowed(key),
        }
    }

    /// Counts new layers again when the disk has them: allocation may have changed since the files were closed.
    pub(super) fn recount_later(self: &Arc<Self>, made: Vec<Digest>) {
        if made.is_empty() {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let inner = self.clone();
            runtime.spawn_blocking(move || inner.layers.recount(&made));
        }
    }

    /// Files of the layers that show, lowest first: a root that hides everything below ends the list.
    fn visible(&self, layers: &[Digest]) -> Vec<(PathBuf, Arc<LayerRecord>)> {
        let records: Vec<_> = layers.iter().filter_map(|d| self.layers.get(d).map(|r| (self.layers.files(d), r))).collect();
        let start = records.iter().rposition(|(_, r)| r.opaque_root).unwrap_or(0);
        records.into_iter().skip(start).collect()
    }

    /// Has the backend build it, or the copy if these layers are beyond the backend.
    fn build(&self, dir: &Path, layers: &[Digest]) -> Result<RootFs> {
        let visible = self.visible(layers);
        let stack: Vec<_> = visible.iter().map(|(path, record)| backends::Layer { path, marks: record.marks, lists_root: record.lists_root() }).collect();
        let rootfs = match self.backend.provision(dir, &stack) {
            Err(e) if e.kind == Kind::Unimplemented => {
                tracing::info!(directory = %dir.display(), error = %e, "falling back to a copy");
                backends::fallback().provision(dir, &stack)
            }
            other => other,
        }?;
        if let Some(writable) = &rootfs.writable {
            let layers: Vec<_> = visible.iter().map(|(files, record)| implied::Layer { files, implied: &record.implied }).collect();
            implied::put_right(&layers, writable)?;
        }
        Ok(rootfs)
    }

    pub(super) fn provision(&self, container: &str, image: &Image) -> Result<RootFs> {
        let mut layers: Vec<Digest> = Vec::new();
        for layer in &image.layers {
            // The same layer twice adds nothing the second time, unless something between changed it; overlay refuses duplicates.
            layers.retain(|d| *d != layer.diff_id);
            layers.push(layer.diff_id.clone());
        }
        // Held before it is looked for, so that no collection comes between.
        let _hold = self.layers.hold(layers.iter().cloned());
        self.check_layers(&layers, &image.id, None).map_err(|e| e.within(format!("provision {container}")))?;
        if let Some(missing) = layers.iter().find(|d| !self.layers.contains(d)) {
            return Err(Error::not_found(format!("provision {container}: image {} is gone (layer {missing})", image.id)));
        }
        let Some(_building) = self.claim_rootfs(container) else {
            return Err(Error::new(Kind::Unavailable, format!("provision {container}: its directory is being worked on")));
        };
        let dir = self.layout.rootfs(container);
        // What an earlier attempt left has no lease and is of no use.
        remove::tree(&dir)?;
        super::layers::make_private(&dir)?;
        let rootfs = match self.build(&dir, &layers) {
            Ok(rootfs) => rootfs,
            Err(e) => {
                if let Err(left) = remove::tree(&dir) {
                    tracing::warn!(error = %left, "left behind until recovery");
                }
                return Err(e.within(format!("provision {container}")));
            }
        };
        failpoint::hit("provision.built");
        if let Some(writable) = &rootfs.writable {
            self.counts.insert(container, writable.clone(), Some(usage::count(writable)?));
        }
        self.leases.put(Lease { container: container.to_owned(), image: image.id.clone(), layers, rootfs: rootfs.clone(), made: now_ns() })?;
        self.images.touch(&image.id);
        Ok(rootfs)
    }

    /// The root filesystem of a container with all its volumes.
    fn release_all(&self, container: &str) -> Result<()> {
        self.unmount_volumes(Some(container))?;
        for volume in self.volumes_of(container) {
            self.release(&volume)?;
        }
        self.release(container)
    }

    fn release(&self, container: &str) -> Result<()> {
        self.counts.remove(container);
        remove::tree(&self.layout.rootfs(container))?;
        failpoint::hit("release.files-gone");
        let Some(lease) = self.leases.get(container) else { return Ok(()) };
        self.leases.remove(container)?;
        self.images.touch(&lease.image);
        self.bury()?;
        // Layers outlive their image only by leases; as long as the image is there, nothing can have become free.
        if self.images.look_up(lease.image.as_str()).is_none() {
            self.collect()?;
        }
        Ok(())
    }

    fn recover(&self, known: &[String]) -> Result<()> {
        let known: HashSet<&str> = known.iter().map(String::as_str).collect();
        let mut first = Ok(());
        let mut keep = |result: Result<()>| {
            if first.is_ok() {
                first = result;
            }
        };
        keep(self.unmount_volumes(None));
        for lease in self.leases.all().iter().filter(|l| !known.contains(volumes::container_of(&l.container))) {
            keep(self.release(&lease.container));
        }
        // Directories without a lease: provisioning was cut short.
        let all = self.layout.rootfs_all();
        for entry in std::fs::read_dir(&all).act("list", all.display())? {
            let entry = entry.act("list", all.display())?;
            if entry.file_name().to_str().is_none_or(|name| self.leases.get(name).is_none()) {
                keep(remove::tree(&entry.path()));
            }
        }
        keep(self.collect().map(|_| ()));
        first
    }

    /// The store on disk: counted parts, and what lies beside them one by one.
    fn fs_info(&self) -> Result<FsUsage> {
        let layout = &self.layout;
        let mut sum = usage::add(self.layers.usage(), self.counts.sum());
        sum = usage::add(sum, usage::count(&layout.damaged())?);
        for dir in [layout.store(), layout.layers(), layout.images(), layout.leases(), layout.rootfs_all(), layout.staging()] {
            sum = usage::add(sum, usage::own(&dir));
        }
        for dir in [layout.images(), layout.leases()] {
            for entry in std::fs::read_dir(&dir).act("list", dir.display())? {
                sum = usage::add(sum, usage::own(&entry.act("list", dir.display())?.path()));
            }
        }
        for (_, writable) in self.counts.all() {
            // Beside the writable directory: the container's own, and overlay's work directory with its one child.
            if let Some(dir) = writable.parent() {
                sum = [dir.to_owned(), dir.join("work"), dir.join("work/work")].iter().fold(sum, |sum, path| usage::add(sum, usage::own(path)));
            }
        }
        Ok(sum)
    }
}

/// A container id that may become a file name.
fn check_name(container: &str) -> Result<()> {
    let ok = !container.is_empty() && container.len() <= 200 && container.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if ok && !container.starts_with('.') { Ok(()) } else { Err(Error::invalid(format!("container id {container:?} cannot be a file name"))) }
}

#[async_trait]
impl Images for Provisioner {
    async fn pull(&self, request: PullRequest, progress: Option<mpsc::UnboundedSender<PullEvent>>, cancel: CancellationToken) -> Result<ImageId> {
        pull::pull(&self.inner, request, progress, cancel).await
    }

    async fn load(&self, archive: &Path) -> Result<Vec<ImageId>> {
        archive::load(&self.inner, archive).await
    }

    fn list(&self) -> Vec<Arc<Image>> {
        self.inner.images.list()
    }

    fn resolve(&self, key: &str) -> Option<Arc<Image>> {
        self.inner.images.resolve(&self.inner.key(key))
    }

    async fn remove(&self, key: &str) -> Result<()> {
        let (inner, key) = (self.inner.clone(), self.inner.key(key).into_owned());
        blocking::run("remove image", move || inner.remove_image(&key)).await
    }

    async fn fs_info(&self) -> Result<(PathBuf, FsUsage)> {
        let inner = self.inner.clone();
        let usage = blocking::run("count image store", move || inner.fs_info()).await?;
        Ok((self.inner.layout.store(), usage))
    }

    async fn unexplained(&self) -> Result<FsUsage> {
        let inner = self.inner.clone();
        blocking::run("look for unexplained files", move || inner.unexplained()).await
    }

    async fn provision(&self, container: &str, image: &Image) -> Result<RootFs> {
        check_name(container)?;
        if let Some(lease) = self.inner.leases.get(container) {
            return if lease.image == image.id {
                Ok(lease.rootfs.clone())
            } else {
                Err(Error::new(Kind::AlreadyExists, format!("provision {container}: it has a root filesystem from image {}", lease.image)))
            };
        }
        let (inner, container, image) = (self.inner.clone(), container.to_owned(), image.clone());
        blocking::run("provision root filesystem", move || inner.provision(&container, &image)).await
    }

    async fn provision_volume(&self, container: &str, number: usize, image: &Image, sub_path: &str) -> Result<PathBuf> {
        check_name(container)?;
        let (inner, name, image, sub_path) = (self.inner.clone(), Self::volume_name(container, number), image.clone(), sub_path.to_owned());
        blocking::run("mount image volume", move || inner.mount_volume(&name, &image, &sub_path)).await
    }

    async fn settle_volumes(&self, container: &str) -> Result<()> {
        let (inner, container) = (self.inner.clone(), container.to_owned());
        blocking::run("unmount image volumes", move || inner.unmount_volumes(Some(&container))).await
    }

    fn check_container(&self, container: &str) -> Result<()> {
        self.inner.check_container(container)
    }

    async fn release(&self, container: &str) -> Result<()> {
        check_name(container)?;
        let (inner, container) = (self.inner.clone(), container.to_owned());
        blocking::run("release root filesystem", move || inner.release_all(&container)).await
    }

    fn usage(&self, container: &str) -> Option<(FsUsage, i64)> {
        self.inner.counts.get(container)
    }

    async fn recover(&self, known: &[String]) -> Result<()> {
        let (inner, known) = (self.inner.clone(), known.to_vec());
        blocking::run("recover image store", move || inner.recover(&known)).await
    }
}

#[cfg(test)]
pub(in crate::provisioner) mod tests;
