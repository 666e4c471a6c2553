//! The image index: records on disk, everything in memory. Reading never touches the disk; one writer at a time.
//!
//! # When an image was used
//! Collection goes by last use. An image is *used* when it is pulled, when a root filesystem is built from it and when that is
//! given back. The time is the modification time of the image's record: one `utimensat` without a sync, which a restart
//! of the daemon keeps and a power cut at worst sets back. An image is *asked for* whenever it is looked up by name; that lives in memory
//! and only keeps the collector's hands off what somebody is about to use.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::layers::Draft;
use crate::disk::layout::Layout;
use crate::disk::record::{self, Durability};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::Image;
use crate::model::{Digest, ImageId, Reference};
use crate::stdx::clock::now_ns;

/// Shortest prefix of an id that finds an image.
const MIN_PREFIX: usize = 3;

/// All images.
pub struct Images {
    layout: Layout,
    maps: RwLock<Maps>,
    /// Held over changes of records, so that memory and disk agree.
    writer: Mutex<()>,
}

#[derive(Default)]
struct Maps {
    /// By the hexadecimal part of the id, sorted, so that prefixes are ranges.
    images: BTreeMap<String, Arc<Image>>,
    /// Tags and digests, full, to the hexadecimal part of the id.
    names: HashMap<String, String>,
    /// By the hexadecimal part of the id.
    stamps: HashMap<String, Arc<Stamps>>,
}

/// When an image was last wanted; nanoseconds since the epoch.
#[derive(Debug, Default)]
pub struct Stamps {
    used: AtomicI64,
    asked: AtomicI64,
}

impl Stamps {
    /// Pulled, or a root filesystem of it made or given back.
    pub fn used(&self) -> i64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Used or looked up.
    pub fn wanted(&self) -> i64 {
        self.asked.load(Ordering::Relaxed).max(self.used())
    }
}

impl Maps {
    fn put(&mut self, image: Arc<Image>) {
        let hex = hex(&image.id).to_owned();
        self.names.retain(|_, h| *h != hex);
        for name in image.repo_tags.iter().chain(&image.repo_digests) {
            self.names.insert(name.clone(), hex.clone());
        }
        self.stamps.entry(hex.clone()).or_default();
        self.images.insert(hex, image);
    }

    fn forget(&mut self, id: &ImageId) {
        self.images.remove(hex(id));
        self.names.retain(|_, h| h != hex(id));
        self.stamps.remove(hex(id));
    }

    fn stamps(&self, id: &ImageId) -> Option<&Arc<Stamps>> {
        self.stamps.get(hex(id))
    }

    fn named(&self, name: &str) -> Option<Arc<Image>> {
        self.images.get(self.names.get(name)?).cloned()
    }
}

fn hex(id: &ImageId) -> &str {
    id.as_str().rsplit(':').next().unwrap_or_default()
}

impl Images {
    /// Reads all records; moves damaged ones, and those whose layers are gone, to quarantine. Blocks.
    ///
    /// # Errors
    /// When the directory cannot be made or listed.
    pub fn open(layout: &Layout, has_layer: impl Fn(&Digest) -> bool, pinned: impl Fn(&Image) -> bool) -> Result<Self> {
        let dir = layout.images();
        super::layers::make_private(&dir)?;
        let mut maps = Maps::default();
        for entry in std::fs::read_dir(&dir).act("list", dir.display())? {
            let path = entry.act("list", dir.display())?.path();
            if path.extension().is_none_or(|e| e != "json") {
                // A temporary of a write that a crash cut short.
                std::fs::remove_file(&path).act("remove", path.display())?;
                continue;
            }
            match load(layout, &path, &has_layer) {
                Ok(mut image) => {
                    // The patterns may have changed since.
                    image.pinned = pinned(&image);
                    let id = image.id.clone();
                    maps.put(Arc::new(image));
                    if let Some(stamps) = maps.stamps(&id) {
                        stamps.used.store(modified(&path), Ordering::Relaxed);
                    }
                }
                Err(e) => {
                    let moved = record::quarantine(&layout.quarantine(), &path, &e);
                    tracing::warn!(error = %e, "damaged image record: {moved}");
                }
            }
        }
        Ok(Self { layout: layout.clone(), maps: RwLock::new(maps), writer: Mutex::new(()) })
    }

    /// All images.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.read().images.values().cloned().collect()
    }

    /// Digests of all layers that images need.
    pub fn layers(&self) -> HashSet<Digest> {
        self.read().images.values().flat_map(|i| i.layers.iter().map(|l| l.diff_id.clone())).collect()
    }

    /// Finds by id, name or unique id prefix, in this order: a name may look like a prefix, and names are what people choose.
    /// Whoever finds it by this is about to use it.
    pub fn resolve(&self, key: &str) -> Option<Arc<Image>> {
        let maps = self.read();
        let found = Self::find(&maps, key)?;
        // Under the lock, so that whoever removes it sees either the mark or nobody.
        if let Some(stamps) = maps.stamps(&found.id) {
            stamps.asked.store(now_ns(), Ordering::Relaxed);
        }
        Some(found)
    }

    /// As [`Images::resolve`], for those who only look.
    pub fn look_up(&self, key: &str) -> Option<Arc<Image>> {
        Self::find(&self.read(), key)
    }

    /// All images with their stamps.
    pub fn stamped(&self) -> Vec<(Arc<Image>, Arc<Stamps>)> {
        let maps = self.read();
        maps.images.iter().filter_map(|(hex, image)| Some((image.clone(), maps.stamps.get(hex)?.clone()))).collect()
    }

    /// Notes that the image is used now. One system call, nothing is synced; failures cost only the order of collection. Blocks.
    pub fn touch(&self, id: &ImageId) {
        let Some(stamps) = self.read().stamps(id).cloned() else { return };
        stamps.used.store(now_ns(), Ordering::Relaxed);
        self.stamp_file(id, stamps.used());
    }

    fn stamp_file(&self, id: &ImageId, at: i64) {
        use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
        let time = Timespec { tv_sec: at.div_euclid(1_000_000_000), tv_nsec: at.rem_euclid(1_000_000_000) };
        let times = Timestamps { last_access: time, last_modification: time };
        if let Err(e) = utimensat(CWD, self.layout.image(id), &times, AtFlags::SYMLINK_NOFOLLOW) {
            tracing::debug!(image = %id, error = %e, "note the use of an image");
        }
    }

    fn find(maps: &Maps, key: &str) -> Option<Arc<Image>> {
        // Appc writes a hyphen behind the algorithm.
        let algorithms = ["sha256:", "sha512:", "sha512-"];
        let (algorithm, bare) = algorithms.iter().find_map(|a| Some((&a[..6], key.strip_prefix(a)?))).unwrap_or(("", key));
        let fits = |image: &&Arc<Image>| image.id.as_str().starts_with(algorithm);
        if let Some(image) = maps.images.get(bare).filter(fits) {
            return Some(image.clone());
        }
        if let Ok(reference) = key.parse::<Reference>() {
            let name = match reference.digest() {
                Some(digest) => reference.repo_digest(digest),
                None => reference.to_string(),
            };
            if let Some(image) = maps.named(&name) {
                return Some(image);
            }
        }
        if bare.len() < MIN_PREFIX || !bare.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut found = maps.images.range(bare.to_owned()..).take_while(|(id, _)| id.starts_with(bare)).filter(|(_, image)| fits(image));
        match (found.next(), found.next()) {
            (Some((_, image)), None) => Some(image.clone()),
            _ => None,
        }
    }

    /// Adds an image, or names to one: its tags move here from wherever they were. Returns what is stored. The write of the
    /// record is the commit point of a pull. Blocks.
    ///
    /// # Errors
    /// I/O failures; then nothing has changed.
    pub fn add(&self, image: Image, pinned: impl Fn(&Image) -> bool) -> Result<Arc<Image>> {
        self.add_drafted(image, None, pinned)
    }

    /// What the record of this image will be, unless its names change meanwhile.
    ///
    /// # Errors
    /// Those of encoding it.
    pub fn encode(&self, image: &Image, pinned: impl Fn(&Image) -> bool) -> Result<Vec<u8>> {
        let present = self.read().images.get(hex(&image.id)).cloned();
        record::encode(&merged(image.clone(), present.as_deref(), pinned)).act("encode image", &image.id)
    }

    /// As [`Images::add`], with a record that is durable already under another name; taken if it says what must be said.
    ///
    /// # Errors
    /// As [`Images::add`].
    pub fn add_drafted(&self, image: Image, draft: Option<Draft>, pinned: impl Fn(&Image) -> bool) -> Result<Arc<Image>> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (present, losers) = {
            let maps = self.read();
            let losers: Vec<Arc<Image>> = image.repo_tags.iter().filter_map(|t| maps.named(t)).filter(|i| i.id != image.id).collect();
            (maps.images.get(hex(&image.id)).cloned(), losers)
        };
        let image = Arc::new(merged(image, present.as_deref(), &pinned));
        if present.as_ref() != Some(&image) {
            let path = self.layout.image(&image.id);
            let bytes = record::encode(&*image).act("encode image", &image.id)?;
            match draft.filter(|d| d.says(&bytes)) {
                Some(draft) => draft.put(&path)?,
                None => record::write_bytes(&path, &bytes, Durability::Synced)?,
            }
        }
        crate::stdx::failpoint::hit("pull.committed");
        // After the new record: a crash between the two leaves the tag on both, and loading gives it to one of them.
        let mut changed = Vec::new();
        for loser in losers {
            let used = self.read().stamps(&loser.id).map(|s| s.used());
            let mut loser = (*loser).clone();
            loser.repo_tags.retain(|t| !image.repo_tags.contains(t));
            loser.pinned = pinned(&loser);
            // Synced, as the first: not every file system writes data out before a rename, and this image was acknowledged long ago.
            record::write(&self.layout.image(&loser.id), &loser, Durability::Synced)?;
            // Losing a name is no use.
            if let Some(used) = used {
                self.stamp_file(&loser.id, used);
            }
            changed.push(Arc::new(loser));
        }
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        for loser in changed {
            maps.put(loser);
        }
        maps.put(image.clone());
        drop(maps);
        self.touch(&image.id);
        Ok(image)
    }

    /// Removes the image with all its names if `may` agrees, which is asked while nobody can look the image up. `false` when
    /// it is not there or must stay. Not durable before [`Images::sync`]. Blocks.
    ///
    /// # Errors
    /// I/O failures; then the image is still there.
    pub fn remove_if(&self, id: &ImageId, may: impl FnOnce(&Stamps) -> bool) -> Result<bool> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (image, stamps) = {
            let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
            let (Some(image), Some(stamps)) = (maps.images.get(hex(id)).cloned(), maps.stamps(id).cloned()) else { return Ok(false) };
            if !may(&stamps) {
                return Ok(false);
            }
            maps.forget(id);
            (image, stamps)
        };
        let path = self.layout.image(id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
                maps.stamps.insert(hex(id).to_owned(), stamps);
                maps.put(image);
                Err(Error::io(format!("remove {}", path.display()), e))
            }
            _ => Ok(true),
        }
    }

    /// Makes removals durable. Before any layer goes: a record that came back after a power cut would name layers that are
    /// gone. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub fn sync(&self) -> Result<()> {
        record::sync_dir(&self.layout.images())
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The image with the names that it has already.
fn merged(mut image: Image, present: Option<&Image>, pinned: impl Fn(&Image) -> bool) -> Image {
    if let Some(present) = present {
        merge(&mut image.repo_tags, &present.repo_tags);
        merge(&mut image.repo_digests, &present.repo_digests);
    }
    image.pinned = pinned(&image);
    image
}

fn merge(into: &mut Vec<String>, from: &[String]) {
    let mut all: Vec<String> = from.to_vec();
    all.extend(into.iter().filter(|n| !from.contains(n)).cloned());
    *into = all;
}

/// Modification time in nanoseconds; 0 when it cannot be told.
fn modified(path: &std::path::Path) -> i64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).map_or(0, |m| m.mtime().saturating_mul(1_000_000_000).saturating_add(m.mtime_nsec()))
}

fn load(layout: &Layout, path: &std::path::Path, has_layer: &impl Fn(&Digest) -> bool) -> Result<Image> {
    let image: Image = record::read(path)?;
    // The id becomes part of a path: it must be a digest, and this record's.
    image.id.as_str().parse::<Digest>()?;
    if layout.image(&image.id) != path {
        return Err(Error::new(Kind::DataLoss, format!("check record {}: it is that of {}", path.display(), image.id)));
    }
    match image.layers.iter().find(|l| !has_layer(&l.diff_id)) {
        Some(layer) => Err(Error::new(Kind::DataLoss, format!("check image {}: layer {} is missing", image.id, layer.diff_id))),
        None => Ok(image),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: char, tags: &[&str], digests: &[&str]) -> Image {
        Image {
            id: ImageId::from_string(format!("sha256:{}", id.to_string().repeat(64))),
            repo_tags: tags.iter().map(ToString::to_string).collect(),
            repo_digests: digests.iter().map(ToString::to_string).collect(),
            layers: vec![],
            config: crate::model::image::ImageConfig::default(),
            config_json: "{}".into(),
            size: 1,
            pinned: false,
        }
    }

    fn open(dir: &std::path::Path) -> Images {
        Images::open(&Layout::new(dir.join("root"), dir.join("state")), |_| true, |_| false).unwrap()
    }

    #[test]
    fn tags_move_and_everything_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let digest = format!("docker.io/library/a@sha256:{}", "1".repeat(64));
        let images = open(dir.path());
        images.add(image('a', &["docker.io/library/a:latest"], &[&digest]), |_| false).unwrap();
        images.add(image('b', &["docker.io/library/a:latest"], &[]), |_| false).unwrap();
        images.add(image('b', &["docker.io/library/b:1"], &[]), |_| false).unwrap();
        for images in [images, open(dir.path())] {
            assert_eq!(images.list().len(), 2);
            assert_eq!(images.resolve("a").unwrap().id.as_str(), format!("sha256:{}", "b".repeat(64)));
            assert_eq!(images.resolve("b:1").unwrap().repo_tags.len(), 2);
            assert!(images.resolve("b").is_none());
            assert_eq!(images.resolve(&digest).unwrap().id.short(), "sha256:aaaaa");
            for key in ["aaa", "sha256:aaaa", &"a".repeat(64)] {
                assert_eq!(images.resolve(key).unwrap().repo_tags.len(), 0, "{key}");
            }
            assert!(images.resolve("aa").is_none());
        }
        let images = open(dir.path());
        let id = images.look_up("a").unwrap().id.clone();
        assert!(!images.remove_if(&id, |_| false).unwrap());
        assert!(images.look_up("a").is_some());
        assert!(images.remove_if(&id, |_| true).unwrap());
        assert!(!images.remove_if(&id, |_| true).unwrap());
        images.sync().unwrap();
        assert_eq!(open(dir.path()).list().len(), 1);
    }

    #[test]
    fn use_survives_a_restart_and_asking_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let images = open(dir.path());
        for id in ['a', 'b'] {
            images.add(image(id, &[&format!("docker.io/library/{id}:1")], &[]), |_| false).unwrap();
        }
        let stamps = |images: &Images, key: &str| {
            let id = images.look_up(key).unwrap().id.clone();
            let (_, stamps) = images.stamped().into_iter().find(|(i, _)| i.id == id).unwrap();
            (stamps.used(), stamps.wanted())
        };
        let pulled = stamps(&images, "b:1");
        assert_eq!(pulled.0, pulled.1, "looking is not asking");
        images.touch(&images.look_up("a:1").unwrap().id);
        let used = stamps(&images, "a:1").0;
        assert!(used > pulled.0);
        images.resolve("b:1").unwrap();
        assert!(stamps(&images, "b:1").1 > used && stamps(&images, "b:1").0 == pulled.0);
        // The loser of a tag is not used by losing it.
        images.add(image('c', &["docker.io/library/b:1"], &[]), |_| false).unwrap();
        let again = open(dir.path());
        assert_eq!(stamps(&again, "a:1"), (used, used));
        assert_eq!(stamps(&again, &"b".repeat(64)), (pulled.0, pulled.0));
    }

    #[test]
    fn damaged_records_are_quarantined_alone() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).add(image('a', &[], &[]), |_| false).unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        for (name, text) in [("b", "{"), ("c", "{\"version\":9,\"record\":{}}")] {
            std::fs::write(layout.images().join(format!("{name}.json")), text).unwrap();
        }
        std::fs::copy(layout.image(&ImageId::from_string("a".repeat(64))), layout.images().join("d.json")).unwrap();
        assert_eq!(open(dir.path()).list().len(), 1);
        assert_eq!(std::fs::read_dir(layout.quarantine()).unwrap().filter(|e| e.as_ref().unwrap().path().extension().unwrap() == "json").count(), 3);
    }
}
