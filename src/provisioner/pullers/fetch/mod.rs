//! Fetches one file by URI: `hdfs://` and its kin, `file:`, plain paths. What archives and Appc images lie at when they lie at no
//! registry.
//!
//! `hdfs://` is read by the `hadoop` command where there is one ([`hadoop`]): it knows the cluster's configuration, its Kerberos
//! and its high availability. Without it, and for clusters whose WebHDFS address is configured, by WebHDFS over HTTP
//! ([`webhdfs`]), which needs no Java and begins at once. Nothing is left at the target unless all of it is there.

mod hadoop;
mod webhdfs;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::registry::{Registries, Shared};
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::config::Config;
use crate::stdx::blocking;
use hadoop::Hadoop;
use webhdfs::WebHdfs;

/// Bytes copied between two looks at whether anybody still wants them.
const STEP: u64 = 16 << 20;
/// Schemes that the `hadoop` command alone can read.
const COMMAND_ONLY: &[&str] = &["hftp", "viewfs", "s3", "s3n", "s3a"];

/// How to read `hdfs://` URIs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hdfs {
    /// Hadoop installation whose `bin/hadoop` is run; empty: the `hadoop` of `PATH`, if there is one.
    pub hadoop_home: PathBuf,
    /// Base URLs of WebHDFS (or HttpFS) by authority of the URI, `*` for every other and for URIs without one: all name nodes of
    /// a cluster, in any order. A cluster that is listed by name is read so even where there is a `hadoop` command. One that is
    /// not listed is looked for at `http://HOST:9870`. Certificates are those of `registries` and `registry_config_dir`.
    pub webhdfs: BTreeMap<String, Vec<String>>,
    /// User to come as, where the cluster believes what it is told; empty: WebHDFS's own default, the command's own user.
    pub user: String,
}

/// Fetches files.
pub struct Fetcher {
    config: Arc<Config>,
    shared: Arc<Shared>,
    hadoop: Hadoop,
}

/// What a URI asks for.
enum Source<'a> {
    /// A file of this machine.
    File(PathBuf),
    /// A URI for Hadoop: authority and path, as WebHDFS wants them where it can serve it.
    Hadoop { webhdfs: Option<(Vec<String>, &'a str)>, first: bool },
}

impl Fetcher {
    /// With these settings. `registries` lends its connections and the node's limits.
    pub fn new(config: &Config, registries: &Registries) -> Self {
        let hadoop = Hadoop::new(&config.hdfs, Duration::from_secs(config.stall_timeout_seconds.max(1)));
        Self { config: Arc::new(config.clone()), shared: registries.shared(), hadoop }
    }

    /// Fetches what `uri` names into the file `to`, which is replaced if it is there; its directory must exist. Returns its length
    /// in bytes. Nothing is left behind on failure. At most `limits.layer_bytes` are taken.
    ///
    /// # Errors
    /// `NotFound` when there is no such file, `InvalidArgument` for a URI that names none, `ResourceExhausted` beyond the limit,
    /// `Unavailable`, `PermissionDenied`, `Unauthenticated`, `Cancelled`, I/O errors.
    pub async fn fetch(&self, uri: &str, to: &Path, cancel: &CancellationToken) -> Result<u64> {
        let act = || format!("fetch {}", shown(uri));
        let source = self.source(uri).map_err(|e| e.within(act()))?;
        let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        let private = blocking::run("make temporary directory", move || {
            tempfile::Builder::new().prefix(".fetch-").tempdir_in(&parent).act("create temporary in", parent.display())
        })
        .await?;
        let part = private.path().join("part");
        let fetched = tokio::select! {
            fetched = self.fetch_from(source, uri, &part, cancel) => fetched,
            () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, "cancelled")),
        };
        let to = to.to_owned();
        blocking::run("keep fetched file", move || {
            // Whatever happened, the temporary directory goes with what is in it.
            let private = private;
            let bytes = fetched?;
            std::fs::rename(&part, &to).act("rename to", to.display())?;
            private.close().act("remove", "temporary directory")?;
            Ok(bytes)
        })
        .await
        .map_err(|e: Error| e.within(act()))
    }

    async fn fetch_from(&self, source: Source<'_>, uri: &str, part: &Path, cancel: &CancellationToken) -> Result<u64> {
        let limit = self.config.limits.layer_bytes;
        match source {
            Source::File(path) => {
                let (part, cancel) = (part.to_owned(), cancel.clone());
                blocking::run("copy file", move || copy(&path, &part, limit, &cancel)).await
            }
            Source::Hadoop { webhdfs: Some((bases, path)), first: true } => self.webhdfs(&bases, path, part, limit).await,
            Source::Hadoop { webhdfs, .. } => match (self.hadoop.command().await?, webhdfs) {
                (Some(command), _) => command.fetch(uri, part, limit).await,
                (None, Some((bases, path))) => self.webhdfs(&bases, path, part, limit).await,
                (None, None) => {
                    Err(Error::precondition("there is no `hadoop` command, and nothing else reads this: set hadoop_home, or configure hdfs.webhdfs"))
                }
            },
        }
    }

    async fn webhdfs(&self, bases: &[String], path: &str, part: &Path, limit: u64) -> Result<u64> {
        WebHdfs::open(&self.config, &self.shared, bases, path).await?.fetch(part, limit).await
    }

    fn source<'a>(&self, uri: &'a str) -> Result<Source<'a>> {
        if uri.starts_with('/') {
            return Ok(Source::File(uri.into()));
        }
        if let Some(rest) = uri.strip_prefix("file:") {
            // `file:/x`, `file:///x`, `file://localhost/x`.
            let path = match rest.strip_prefix("//") {
                Some(rest) => rest.strip_prefix("localhost").filter(|p| p.starts_with('/')).unwrap_or(rest),
                None => rest,
            };
            return if path.starts_with('/') { Ok(Source::File(path.into())) } else { Err(Error::invalid("a file: URI has an absolute path and no host")) };
        }
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| Error::invalid("neither an absolute path nor a URI"))?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if path.len() < 2 || uri.contains(['\0', '\n']) {
            return Err(Error::invalid("the URI names no file"));
        }
        match scheme {
            "hdfs" => {
                let (bases, first) = self.name_nodes(authority);
                Ok(Source::Hadoop { webhdfs: (!bases.is_empty()).then_some((bases, path)), first })
            }
            "webhdfs" | "swebhdfs" if !authority.is_empty() => {
                let (scheme, port) = if scheme == "webhdfs" { ("http", 9870) } else { ("https", 9871) };
                Ok(Source::Hadoop { webhdfs: Some((vec![with_port(scheme, authority, port)], path)), first: true })
            }
            s if COMMAND_ONLY.contains(&s) => Ok(Source::Hadoop { webhdfs: None, first: false }),
            _ => Err(Error::invalid("files are fetched from paths and from file, hdfs, webhdfs and swebhdfs URIs")),
        }
    }

    /// Where WebHDFS of `authority` may be, and whether that comes before the command.
    fn name_nodes(&self, authority: &str) -> (Vec<String>, bool) {
        let known = &self.config.hdfs.webhdfs;
        if let Some(bases) = known.get(authority).filter(|_| authority != "*") {
            return (bases.clone(), true);
        }
        if let Some(bases) = known.get("*") {
            return (bases.clone(), false);
        }
        // The port in the URI is that of another protocol.
        let host = authority.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(authority, |(host, _)| host);
        (if host.is_empty() { Vec::new() } else { vec![format!("http://{host}:9870")] }, false)
    }
}

fn with_port(scheme: &str, authority: &str, port: u16) -> String {
    let has = authority.rsplit_once(':').is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    if has { format!("{scheme}://{authority}") } else { format!("{scheme}://{authority}:{port}") }
}

/// A URI for messages: short, on one line, without a password.
fn shown(uri: &str) -> String {
    let clean: String = uri.chars().filter(|c| !c.is_control()).take(300).collect();
    match (clean.find("://"), clean.find('@')) {
        (Some(scheme), Some(at)) if !clean[scheme + 3..at].contains('/') => format!("{}://{}", &clean[..scheme], &clean[at + 1..]),
        _ => clean,
    }
}

/// Copies a regular file, by the kernel where it can (and by reference where the file system can).
fn copy(from: &Path, to: &Path, limit: u64, cancel: &CancellationToken) -> Result<u64> {
    let mut source = match File::open(from) {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Err(Error::not_found(format!("{} does not exist", from.display())));
        }
        other => other.act("open", from.display())?,
    };
    let meta = source.metadata().act("look at", from.display())?;
    if !meta.is_file() {
        return Err(Error::invalid(format!("{} is no regular file", from.display())));
    }
    if meta.len() > limit {
        return Err(too_long(meta.len(), limit));
    }
    let mut target = File::create_new(to).act("create", to.display())?;
    let mut done = 0;
    while !cancel.is_cancelled() {
        let n = std::io::copy(&mut (&mut source).take(STEP.min(limit + 1 - done)), &mut target).act("copy", from.display())?;
        done += n;
        if n == 0 {
            return Ok(done);
        }
        if done > limit {
            return Err(too_long(done, limit));
        }
    }
    Err(Error::new(Kind::Cancelled, "cancelled"))
}

/// Some bytes came (or are promised) that are too many.
fn too_long(bytes: u64, limit: u64) -> Error {
    Error::new(Kind::ResourceExhausted, format!("{bytes} bytes, and at most {limit} are taken (limits.layer_bytes)"))
}

#[cfg(test)]
mod tests;
