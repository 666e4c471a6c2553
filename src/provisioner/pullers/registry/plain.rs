//! One file of a web server, as it is, by the connections, certificates, proxies, limits and patience of registries. What the
//! settings say of a registry of that host counts here too.
//!
//! A broken transfer goes on where it stopped if the server has a strong validator for the file (RFC 9110, `If-Range`), so that no
//! file is put together from two; else it starts over.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::sync::mpsc;

use super::answer::{broken, unavailable};
use super::exchange::Session;
use super::hosts::{self, Host, authority};
use super::retry::{Failure, Tries};
use super::transfer::{Pace, content_range};
use super::{Registries, Shared};
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::Credentials;
use crate::provisioner::pullers::auth::Keys;
use crate::provisioner::pullers::docker_config::DockerConfig;
use crate::provisioner::pullers::helper::{DEADLINE, Helpers};
use crate::stdx::blocking;

/// Pieces between network and disk.
const PIECES: usize = 4;
/// Progress that earns new patience.
const PROGRESS: u64 = 64 << 10;

impl Registries {
    /// Writes what lies at `url` to `to`, which is empty, and returns its length; at most `limit` bytes.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`]; `ResourceExhausted` beyond the limit.
    pub async fn file(&self, url: &Url, credentials: Option<&Credentials>, limit: u64, to: &File) -> Result<u64> {
        let (config, at) = (self.config.clone(), url.clone());
        let (host, keys) = blocking::run("read settings of web server", move || {
            let name = authority(&at);
            let mut host = Host { own: true, ..Host::new(&at.origin().ascii_serialization(), true)? };
            let known = hosts::find(&config, &name).map_err(|e| e.within(format!("find settings of {name}")))?.pop();
            if let Some(known) = known {
                (host.trust, host.headers) = (known.trust, known.headers);
            }
            let mut keys = DockerConfig::open(&config.docker_config.0)?;
            keys.run = Helpers { dirs: config.credential_helper_dirs.clone(), deadline: DEADLINE };
            Ok::<_, Error>((host, Arc::new(keys)))
        })
        .await?;
        let act = format!("fetch {} from {}", url.path(), host.name());
        let keys = Keys::new(&host, &authority(url), "", credentials, keys);
        let session = Session::new(host, "", keys);
        let stall = Duration::from_secs(self.config.stall_timeout_seconds.max(1));
        let _leave = self.shared.throttle.transfer().await?;

        let (pieces, mut arrived) = mpsc::channel::<(u64, Bytes)>(PIECES);
        let target = to.try_clone().act("duplicate", "temporary file")?;
        let writing = tokio::spawn(blocking::run("write fetched file", move || {
            while let Some((at, piece)) = arrived.blocking_recv() {
                target.write_all_at(&piece, at).act("write", "temporary file")?;
            }
            Ok::<_, Error>(target)
        }));
        let mut download = Download { shared: &self.shared, url, act: &act, stall, limit, pieces, done: 0, validator: None };
        let fetched = download.run(&session, Tries::new(vec![0], self.config.pull_retries)).await;
        drop(download);
        // A disk that is full ends the reading too; its word says more.
        let target = writing.await.map_err(|e| Error::with(Kind::Internal, "write fetched file", e))??;
        let length = fetched?;
        // An attempt that was given up may have been longer.
        target.set_len(length).act("cut off", "temporary file")?;
        Ok(length)
    }
}

/// A file under way.
struct Download<'a> {
    shared: &'a Shared,
    url: &'a Url,
    act: &'a str,
    stall: Duration,
    limit: u64,
    pieces: mpsc::Sender<(u64, Bytes)>,
    done: u64,
    /// Names the very bytes that are being fetched.
    validator: Option<HeaderValue>,
}

impl Download<'_> {
    async fn run(&mut self, session: &Session, mut tries: Tries) -> Result<u64> {
        let mut earned = 0;
        while tries.next().await.is_some() {
            match self.go_on(session).await {
                Ok(()) => return Ok(self.done),
                Err(failure) => {
                    tracing::debug!(error = %failure.error, again = ?failure.again, "a web server did not answer as hoped");
                    if self.done >= earned + PROGRESS {
                        earned = self.done;
                        tries.renew();
                    }
                    tries.failed(0, failure);
                }
            }
        }
        tries.give_up(self.act, |_| authority(self.url))
    }

    async fn go_on(&mut self, session: &Session) -> Result<(), Failure> {
        let mut headers = HeaderMap::new();
        match &self.validator {
            Some(validator) if self.done > 0 => {
                headers.extend(HeaderValue::try_from(format!("bytes={}-", self.done)).ok().map(|v| (RANGE, v)));
                headers.insert(IF_RANGE, validator.clone());
            }
            _ => self.done = 0,
        }
        let shared = (&self.shared.clients, &self.shared.tokens);
        let mut response = self.timed(session.ask_at(shared, Method::GET, self.url, headers, self.act)).await?;
        let expected = self.begin(&response)?;
        let mut pace = Pace::new(self.stall);
        loop {
            let began = Instant::now();
            let Some(piece) = self.timed(async { response.chunk().await.map_err(|e| broken(self.act, e)) }).await? else { break };
            pace.took(began.elapsed(), piece.len(), self.act)?;
            self.shared.throttle.took(piece.len()).await;
            let at = self.done;
            self.done += piece.len() as u64;
            self.check(self.done)?;
            if self.pieces.send((at, piece)).await.is_err() {
                return Err(Failure::lasting(Error::internal("the writer left")));
            }
        }
        match expected {
            Some(expected) if self.done < expected => {
                Err(unavailable(format!("{}: the answer ended after {} of {expected} bytes", self.act, self.done)).into())
            }
            _ => Ok(()),
        }
    }

    /// Finds out where the answer begins, and how long the file is, if that is said.
    fn begin(&mut self, response: &Response) -> Result<Option<u64>, Failure> {
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let start = response.headers().get(CONTENT_RANGE).and_then(content_range).map(|(start, _)| start);
            if start != Some(self.done) {
                self.validator = None;
                return Err(unavailable(format!("{}: the answer is another part than was asked for", self.act)).into());
            }
        } else {
            self.done = 0;
        }
        self.validator = response.headers().get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/")).cloned();
        let expected = response.content_length().map(|rest| self.done.saturating_add(rest));
        expected.map_or(Ok(()), |length| self.check(length))?;
        Ok(expected)
    }

    fn check(&self, length: u64) -> Result<(), Failure> {
        if length <= self.limit {
            return Ok(());
        }
        Err(Failure::lasting(Error::new(Kind::ResourceExhausted, format!("{}: longer than the {} bytes that are taken", self.act, self.limit))))
    }

    async fn timed<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        match tokio::time::timeout(self.stall, work).await {
            Ok(result) => result,
            Err(_) => Err(unavailable(format!("{}: nothing for {} s", self.act, self.stall.as_secs())).into()),
        }
    }
}
