//! Brings archives and their signatures here, wherever they lie.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::discovery::Place;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::Credentials;
use crate::provisioner::engine::Inner;
use crate::stdx::blocking;

/// What lies at `place`, at most `limit` bytes, from its beginning. `private`: nobody else may be able to change it while it is read.
///
/// # Errors
/// `NotFound`, `ResourceExhausted`, those of the transport.
pub async fn fetch(
    inner: &Arc<Inner>,
    place: &Place,
    credentials: Option<&Credentials>,
    limit: u64,
    private: bool,
    cancel: &CancellationToken,
) -> Result<File> {
    let staging = inner.layout.staging();
    // Without a name: it goes with its descriptor, whatever happens.
    let spool = || tempfile::tempfile_in(&staging).act("create temporary in", staging.display());
    match place {
        Place::Web(url) => {
            let mut file = spool()?;
            inner.registries.file(url, credentials, limit, &file).await?;
            file.seek(SeekFrom::Start(0)).act("seek in", "temporary file")?;
            Ok(file)
        }
        Place::File(path) => {
            let (path, to) = (path.clone(), if private { Some(spool()?) } else { None });
            blocking::run("open image archive", move || local(&path, limit, to)).await
        }
        Place::Other(uri) => {
            let scratch = inner.layers.scratch()?;
            let to = scratch.path().join("archive");
            let length = inner.fetcher.fetch(uri, &to, cancel).await?;
            if length > limit {
                return Err(too_long(place, length, limit));
            }
            let file = blocking::run("open image archive", move || {
                let file = File::open(&to).act("open", to.display())?;
                // From here on it is there for as long as it is open.
                drop(scratch);
                Ok::<_, Error>(file)
            });
            file.await
        }
    }
}

fn too_long(what: impl std::fmt::Display, length: u64, limit: u64) -> Error {
    Error::new(Kind::ResourceExhausted, format!("fetch {what}: {length} bytes, and at most {limit} are taken"))
}

fn local(path: &Path, limit: u64, copy: Option<File>) -> Result<File> {
    let mut file = match File::open(path) {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Err(Error::not_found(format!("open {}: there is no such file", path.display())));
        }
        other => other.act("open", path.display())?,
    };
    let meta = file.metadata().act("look at", path.display())?;
    if !meta.is_file() {
        return Err(Error::invalid(format!("open {}: it is no regular file", path.display())));
    }
    if meta.len() > limit {
        return Err(too_long(path.display(), meta.len(), limit));
    }
    let Some(mut copy) = copy else { return Ok(file) };
    // By the kernel, and by reference where the file system can.
    std::io::copy(&mut std::io::Read::take(&mut file, limit), &mut copy).act("copy", path.display())?;
    copy.seek(SeekFrom::Start(0)).act("seek in", "temporary file")?;
    Ok(copy)
}
