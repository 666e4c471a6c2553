//! A `docker_registry` that is no registry: a directory of archives, on this machine or in HDFS. Image names without a host are
//! looked up there, by name and tag as Mesos does; names with a host still go to that registry.
//!
//! The name of the file only says where to look. What the archive says of itself decides: an archive with another image than the
//! one asked for is an error that says what is inside, whatever the file is called.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::files::Files;
use super::{Wanted, find, import};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::{ImageId, Reference};
use crate::provisioner::PullEvent;
use crate::provisioner::config::Config;
use crate::provisioner::engine::Inner;
use crate::stdx::blocking;

/// Schemes of a `docker_registry` that is fetched file by file.
const REMOTE: &[&str] = &["hdfs", "webhdfs", "swebhdfs", "viewfs", "hftp", "s3", "s3n", "s3a"];
/// Images named in an error.
const MAX_NAMED: usize = 20;

/// Where an image is looked for: the archives, and its name there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shelf {
    /// Absolute path, or URI, of the directory.
    pub directory: String,
    /// The repository as it was written.
    pub name: String,
}

impl Config {
    /// The archives among which `reference` is to be looked for; `None`: it lies at a registry.
    pub fn shelf(&self, reference: &Reference) -> Option<Shelf> {
        let name = reference.written_short().filter(|name| !self.short_name_aliases.contains_key(*name))?.to_owned();
        let registry = self.docker_registry.trim_end_matches('/');
        let path = registry.strip_prefix("file://").unwrap_or(registry);
        if path.starts_with('/') {
            return Some(Shelf { directory: path.to_owned(), name });
        }
        let (scheme, _) = registry.split_once("://")?;
        REMOTE.contains(&scheme).then(|| Shelf { directory: registry.to_owned(), name })
    }
}

impl Shelf {
    fn is_remote(&self) -> bool {
        !self.directory.starts_with('/')
    }

    /// Where the archive may be, the likeliest first.
    fn candidates(&self, reference: &Reference) -> Vec<String> {
        let name = &self.name;
        let mut stems = Vec::new();
        if let Some(digest) = reference.digest() {
            stems.push(format!("{name}@{digest}"));
        }
        if let Some(tag) = reference.tag() {
            stems.extend([format!("{name}:{tag}"), format!("{name}/{tag}")]);
        }
        stems.push(name.clone());
        if self.is_remote() {
            // Each costs a question, and HDFS has no colons in names.
            stems.sort_by_key(|stem| stem.contains(':'));
            return stems.iter().map(|stem| format!("{}/{stem}.tar", self.directory)).collect();
        }
        let endings = [".tar", "", ".tar.gz", ".tgz", ".tar.zst"];
        stems.iter().flat_map(|stem| endings.map(|ending| format!("{}/{stem}{ending}", self.directory))).collect()
    }
}

/// Finds `reference` on its shelf and brings it into the store, under this name and no other.
///
/// # Errors
/// As [`crate::provisioner::Images::pull`]; `NotFound` says where it was looked for, or what the archive has instead.
pub(in crate::provisioner) async fn pull(
    inner: &Arc<Inner>,
    (shelf, reference): (&Shelf, &Reference),
    (threads, cancel): (&TaskTracker, &CancellationToken),
    tell: &(dyn Fn(PullEvent) + Sync),
) -> Result<ImageId> {
    let candidates = shelf.candidates(reference);
    for place in &candidates {
        let Some(files) = open(inner, shelf, place, cancel).await? else { continue };
        let (finder, asked, shown) = (inner.clone(), reference.clone(), place.clone());
        let token = threads.token();
        let (files, wanted) = blocking::run("read image archive", move || {
            let _token = token;
            let found = find(&finder, &files).and_then(|wanted| choose(wanted, &asked));
            found.map(|wanted| (files, wanted)).map_err(|e| e.within(format!("read {shown}")))
        })
        .await?;
        // What the archive calls it besides is the archive's own affair.
        let wanted = Wanted { names: vec![reference.settled()], ..wanted };
        return import(inner, Arc::new(files), wanted, threads, tell).await.map_err(|e| e.within(format!("read {place}")));
    }
    Err(Error::not_found(format!("there is no archive of it in {}: neither {}", shelf.directory, candidates.join(" nor "))))
}

/// The archive at `place`, if there is one.
async fn open(inner: &Arc<Inner>, shelf: &Shelf, place: &str, cancel: &CancellationToken) -> Result<Option<Files>> {
    let stop = cancel.clone();
    let opener = inner.clone();
    if !shelf.is_remote() {
        let path = Path::new(place).to_owned();
        return blocking::run("open image archive", move || match Files::open(&opener, &path, &stop) {
            // A directory may hold the archives of its tags instead of being one.
            Ok(files) if path.is_dir() && !["index.json", "manifest.json", "repositories"].iter().any(|name| files.has(name)) => Ok(None),
            Ok(files) => Ok(Some(files)),
            Err(e) if e.kind == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        })
        .await;
    }
    let scratch = inner.layers.scratch()?;
    let to = scratch.path().join("archive");
    match inner.fetcher.fetch(place, &to, cancel).await {
        Ok(_) => {}
        // A name that the file system cannot have is not there either.
        Err(e) if matches!(e.kind, Kind::NotFound | Kind::InvalidArgument) => return Ok(None),
        Err(e) => return Err(e),
    }
    let shown = place.to_owned();
    let files = blocking::run("open image archive", move || {
        let file = std::fs::File::open(&to).act("open", to.display())?;
        // From here on it is there for as long as it is open.
        drop(scratch);
        Files::of_file(&opener, file, Path::new(&shown), &stop)
    });
    files.await.map(Some)
}

/// The image that `reference` means, of those in one archive.
fn choose(mut wanted: Vec<Wanted>, reference: &Reference) -> Result<Wanted> {
    let position = match reference.digest() {
        Some(digest) => wanted.iter().position(|w| w.manifest.as_ref() == Some(digest)),
        None => {
            let settled = reference.settled();
            let same_tag = |n: &Reference| n.tag() == reference.tag() && bare(n) == bare(reference);
            let unnamed = |w: &Wanted| w.names.is_empty() && w.tag.is_none();
            let by_name = wanted.iter().position(|w| w.names.contains(&settled));
            let by_path = || wanted.iter().position(|w| w.names.iter().any(same_tag));
            let by_tag = || wanted.iter().position(|w| w.names.is_empty() && w.tag.as_deref() == reference.tag());
            let only = || (wanted.len() == 1).then_some(0).filter(|n| wanted.get(*n).is_some_and(unnamed));
            by_name.or_else(by_path).or_else(by_tag).or_else(only)
        }
    };
    match position {
        Some(position) => Ok(wanted.swap_remove(position)),
        None => Err(Error::not_found(format!("it has no {reference}, but {}", inside(&wanted)))),
    }
}

/// A repository without what Docker puts before short names.
fn bare(name: &Reference) -> &str {
    name.repository().strip_prefix("library/").unwrap_or(name.repository())
}

/// What an archive has, for people.
fn inside(wanted: &[Wanted]) -> String {
    let mut names: Vec<String> = Vec::new();
    for w in wanted {
        names.extend(w.names.iter().map(ToString::to_string));
        match (&w.tag, &w.manifest) {
            (Some(tag), _) if w.names.is_empty() => names.push(format!("tag {tag:?}")),
            (None, Some(digest)) if w.names.is_empty() => names.push(digest.to_string()),
            (None, None) if w.names.is_empty() => names.push("an image without a name".to_owned()),
            _ => {}
        }
    }
    let more = names.len().saturating_sub(MAX_NAMED);
    names.truncate(MAX_NAMED);
    let mut text = names.join(", ");
    if more > 0 {
        let _ = write!(text, " and {more} more");
    }
    if text.is_empty() { "nothing".to_owned() } else { text }
}

#[cfg(test)]
mod tests;
