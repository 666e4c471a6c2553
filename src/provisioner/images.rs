//! The image index: records on disk, everything in memory. Reading never touches the disk; one writer at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::disk::layout::Layout;
use crate::disk::record::{self, Durability};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::image::Image;
use crate::model::{Digest, ImageId, Reference};

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
}

impl Maps {
    fn put(&mut self, image: Arc<Image>) {
        let hex = hex(&image.id).to_owned();
        self.names.retain(|_, h| *h != hex);
        for name in image.repo_tags.iter().chain(&image.repo_digests) {
            self.names.insert(name.clone(), hex.clone());
        }
        self.images.insert(hex, image);
    }

    fn forget(&mut self, id: &ImageId) {
        self.images.remove(hex(id));
        self.names.retain(|_, h| h != hex(id));
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
                    maps.put(Arc::new(image));
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
    pub fn resolve(&self, key: &str) -> Option<Arc<Image>> {
        let maps = self.read();
        let bare = key.strip_prefix("sha256:").unwrap_or(key);
        if let Some(image) = maps.images.get(bare) {
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
        let mut found = maps.images.range(bare.to_owned()..).take_while(|(id, _)| id.starts_with(bare));
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
    pub fn add(&self, mut image: Image, pinned: impl Fn(&Image) -> bool) -> Result<Arc<Image>> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (present, losers) = {
            let maps = self.read();
            let losers: Vec<Arc<Image>> = image.repo_tags.iter().filter_map(|t| maps.named(t)).filter(|i| i.id != image.id).collect();
            (maps.images.get(hex(&image.id)).cloned(), losers)
        };
        if let Some(present) = &present {
            merge(&mut image.repo_tags, &present.repo_tags);
            merge(&mut image.repo_digests, &present.repo_digests);
        }
        image.pinned = pinned(&image);
        let image = Arc::new(image);
        if present.as_ref() != Some(&image) {
            record::write(&self.layout.image(&image.id), &*image, Durability::Synced)?;
        }
        crate::stdx::failpoint::hit("pull.committed");
        // After the new record: a crash between the two leaves the tag on both, and loading gives it to one of them.
        let mut changed = Vec::new();
        for loser in losers {
            let mut loser = (*loser).clone();
            loser.repo_tags.retain(|t| !image.repo_tags.contains(t));
            loser.pinned = pinned(&loser);
            record::write(&self.layout.image(&loser.id), &loser, Durability::Atomic)?;
            changed.push(Arc::new(loser));
        }
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        for loser in changed {
            maps.put(loser);
        }
        maps.put(image.clone());
        Ok(image)
    }

    /// Removes the image that `key` names, with all its names. Unknown is fine and `false`. Blocks.
    ///
    /// # Errors
    /// I/O failures.
    pub fn remove(&self, key: &str) -> Result<bool> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = self.resolve(key) else { return Ok(false) };
        let path = self.layout.image(&image.id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(format!("remove {}", path.display()), e)),
            _ => {}
        }
        self.maps.write().unwrap_or_else(PoisonError::into_inner).forget(&image.id);
        // Before the layers go: a record that came back after a power cut would name layers that are gone.
        record::sync_dir(&self.layout.images())?;
        Ok(true)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn merge(into: &mut Vec<String>, from: &[String]) {
    let mut all: Vec<String> = from.to_vec();
    all.extend(into.iter().filter(|n| !from.contains(n)).cloned());
    *into = all;
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
        assert!(images.remove("a").unwrap());
        assert!(!images.remove("a").unwrap());
        assert_eq!(open(dir.path()).list().len(), 1);
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
