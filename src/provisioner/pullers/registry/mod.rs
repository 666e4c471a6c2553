//! Fetches manifests and blobs from registries (OCI distribution specification; Docker Registry v2).
//!
//! [`Registries`] knows where a reference may be found ([`hosts`]) and keeps what pulls share: connections ([`client`]), tokens
//! ([`super::auth`]), limits ([`throttle`]). An [`Endpoint`] is one repository at all its hosts. Each question goes to one host
//! after the other, and again after a pause ([`retry`]), until one has the answer; layers go on where they stopped, also at
//! another host ([`transfer`]). Whoever answers, the digest decides.
//!
//! It stands directly on `reqwest`: the ready-made client for this protocol reads manifests and token answers of any size into
//! memory (attack case 6), follows `urls` of foreign layers, knows no identity tokens and hashes blobs on the async threads.

pub mod answer;
pub mod client;
pub mod exchange;
pub mod hosts;
mod hosts_file;
mod plain;
pub mod retry;
pub(in crate::provisioner::pullers) mod throttle;
pub(in crate::provisioner::pullers) mod transfer;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use tokio::sync::mpsc;

use super::auth::{Keys, Tokens};
use super::docker_config::DockerConfig;
use super::helper::{DEADLINE, Helpers};
use super::manifest::{DOCKER_LIST, DOCKER_MANIFEST, Descriptor, OCI_INDEX, OCI_MANIFEST};
use super::schema1;
use crate::model::error::{Error, Kind, Result};
use crate::model::{Digest, Reference};
use crate::provisioner::Credentials;
use crate::provisioner::config::Config;
use crate::provisioner::unpack::Hasher;
use crate::stdx::blocking;
use answer::{bounded, unavailable};
use client::Clients;
use exchange::{Session, media_type};
use retry::{Failure, Tries};
use throttle::Throttle;

/// All registries; connections are made when first needed.
pub struct Registries {
    config: Arc<Config>,
    shared: Arc<Shared>,
}

/// What pulls share.
pub(in crate::provisioner::pullers) struct Shared {
    pub(in crate::provisioner::pullers) clients: Clients,
    tokens: Tokens,
    pub(in crate::provisioner::pullers) throttle: Throttle,
}

/// One repository, at every host that may have it.
pub struct Endpoint {
    sessions: Vec<Session>,
    shared: Arc<Shared>,
    repository: String,
    /// The host that answered last is asked first: a mirror that lacks an image lacks its layers too.
    last: AtomicUsize,
    retries: u32,
    stall: Duration,
}

/// A manifest as served.
pub struct Served {
    /// Verified bytes. Of a signed schema 1 manifest its payload, which is what the digest covers.
    pub bytes: Bytes,
    /// Their digest.
    pub digest: Digest,
    /// What the transport called them.
    pub media_type: Option<String>,
}

/// What a host must be allowed to be asked.
#[derive(Clone, Copy)]
enum Need {
    Pull,
    Resolve,
}

impl Registries {
    /// With these settings. Installs the process's TLS provider.
    pub fn new(config: &Config) -> Self {
        let shared = Shared {
            clients: Clients::new(&config.proxy),
            tokens: Tokens::default(),
            throttle: Throttle::new(config.max_bytes_per_second, config.max_parallel_downloads),
        };
        Self { config: Arc::new(config.clone()), shared: Arc::new(shared) }
    }

    /// Connections and limits, for other transfers of this node.
    pub(in crate::provisioner::pullers) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Where `reference` lies. Reads the files that say so, now.
    ///
    /// # Errors
    /// `InvalidArgument` when the settings of this registry are wrong; I/O errors.
    pub async fn endpoint(&self, reference: &Reference, credentials: Option<&Credentials>) -> Result<Endpoint> {
        let (config, registry) = (self.config.clone(), reference.registry().to_owned());
        let (hosts, keys) = blocking::run("read registry settings", move || {
            let hosts = hosts::find(&config, &registry).map_err(|e| e.within(format!("find hosts of registry {registry}")))?;
            let mut keys = DockerConfig::open(&config.docker_config.0)?;
            keys.run = Helpers { dirs: config.credential_helper_dirs.clone(), deadline: DEADLINE };
            Ok::<_, Error>((hosts, Arc::new(keys)))
        })
        .await?;
        let repository = reference.repository();
        let session = |host: hosts::Host| {
            let keys = Keys::new(&host, reference.registry(), repository, credentials, keys.clone());
            Session::new(host, repository, keys)
        };
        Ok(Endpoint {
            sessions: hosts.into_iter().map(session).collect(),
            shared: self.shared.clone(),
            repository: repository.to_owned(),
            last: AtomicUsize::new(0),
            retries: self.config.pull_retries,
            stall: Duration::from_secs(self.config.stall_timeout_seconds.max(1)),
        })
    }
}

impl Endpoint {
    /// Fetches a manifest or index by tag or digest and verifies it.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`].
    pub async fn manifest(&self, name: &str, wanted: Option<&Digest>, limit: u64) -> Result<Served> {
        let mut tries = self.tries(if wanted.is_some() { Need::Pull } else { Need::Resolve });
        while let Some((n, session)) = self.next(&mut tries).await {
            let act = self.act(&format!("manifest {name}"), session);
            match self.timed(&act, self.manifest_at(session, name, wanted, limit, &act)).await {
                Ok(served) => return Ok(self.settle(n, served)),
                Err(failure) => self.failed(&mut tries, n, failure),
            }
        }
        self.give_up(tries, &format!("manifest {name}"))
    }

    async fn manifest_at(&self, session: &Session, name: &str, wanted: Option<&Digest>, limit: u64, act: &str) -> Result<Served, Failure> {
        // Registries that convert for old clients give the first form they can.
        let accept = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST, schema1::SIGNED, schema1::PLAIN].join(", ");
        let accept = HeaderMap::from_iter(HeaderValue::try_from(accept).ok().map(|v| (ACCEPT, v)));
        let response = session.ask(self.shared(), Method::GET, &format!("manifests/{name}"), accept, act).await?;
        let media_type = media_type(&response);
        let header = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok()?.parse::<Digest>().ok());
        let bytes = bounded(response, limit, act).await?;
        // The digest of a signed manifest covers what was signed, not the signatures.
        let bytes = schema1::payload(&bytes).map_err(|e| e.within(act))?.map_or(bytes, Bytes::from);
        for promised in [wanted, header.as_ref()].into_iter().flatten() {
            let digest = Hasher::of(&bytes, Some(promised))?;
            if digest != *promised {
                return Err(Failure::lasting(Error::new(Kind::DataLoss, format!("{act}: digest is {digest}, not {promised}"))));
            }
        }
        let digest = match wanted {
            Some(wanted) => wanted.clone(),
            None => Hasher::of(&bytes, None)?,
        };
        Ok(Served { bytes, digest, media_type })
    }

    /// Fetches a small blob and verifies it.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`].
    pub async fn small_blob(&self, blob: &Descriptor, limit: u64) -> Result<Bytes> {
        let what = blob.digest.to_string();
        let mut tries = self.tries(Need::Pull);
        while let Some((n, session)) = self.next(&mut tries).await {
            let act = self.act(&what, session);
            if blob.size > limit {
                return Err(Error::new(Kind::ResourceExhausted, format!("{act}: {} bytes, more than {limit}", blob.size)));
            }
            let fetch = async {
                let response = session.ask(self.shared(), Method::GET, &format!("blobs/{}", blob.digest), HeaderMap::new(), &act).await?;
                let bytes = bounded(response, limit, &act).await?;
                let digest = Hasher::of(&bytes, Some(&blob.digest))?;
                if digest != blob.digest || bytes.len() as u64 != blob.size {
                    let said = format!("{act}: digest is {digest} of {} bytes, its descriptor says {} bytes", bytes.len(), blob.size);
                    return Err(Failure::lasting(Error::new(Kind::DataLoss, said)));
                }
                Ok(bytes)
            };
            match self.timed(&act, fetch).await {
                Ok(bytes) => return Ok(self.settle(n, bytes)),
                Err(failure) => self.failed(&mut tries, n, failure),
            }
        }
        self.give_up(tries, &what)
    }

    /// Asks how long a blob is. Schema 1 manifests do not say.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`].
    pub async fn size(&self, digest: &Digest) -> Result<u64> {
        let what = format!("size of {digest}");
        let mut tries = self.tries(Need::Pull);
        while let Some((n, session)) = self.next(&mut tries).await {
            let act = self.act(&what, session);
            let ask = async {
                let response = session.ask(self.shared(), Method::HEAD, &format!("blobs/{digest}"), HeaderMap::new(), &act).await?;
                // Of an answer to HEAD the header counts; the body is empty.
                let length = response.headers().get(reqwest::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
                length.ok_or_else(|| Failure::lasting(Error::new(Kind::DataLoss, format!("{act}: the registry does not say"))))
            };
            match self.timed(&act, ask).await {
                Ok(size) => return Ok(self.settle(n, size)),
                Err(failure) => self.failed(&mut tries, n, failure),
            }
        }
        self.give_up(tries, &what)
    }

    /// Sends the bytes of a blob to `to`, in pieces as they arrive, and takes broken transfers up again where they stopped, at
    /// whichever host has the rest. Verifying is the receiver's part. Ends early and well when the receiver is gone.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`].
    pub async fn blob(&self, blob: &Descriptor, to: mpsc::Sender<Bytes>, progress: impl FnMut(u64)) -> Result<()> {
        let _leave = self.shared.throttle.transfer().await?;
        let what = blob.digest.to_string();
        let mut transfer = transfer::Transfer::new(blob, to, progress);
        let mut tries = self.tries(Need::Pull);
        while let Some((n, session)) = self.next(&mut tries).await {
            let act = self.act(&what, session);
            match transfer.go_on(self, session, &act).await {
                Ok(()) => {
                    self.last.store(n, Ordering::Relaxed);
                    return Ok(());
                }
                Err(failure) => {
                    if transfer.has_progressed() {
                        tries.renew();
                    }
                    self.failed(&mut tries, n, failure);
                }
            }
        }
        self.give_up(tries, &what)
    }

    fn shared(&self) -> (&Clients, &Tokens) {
        (&self.shared.clients, &self.shared.tokens)
    }

    fn act(&self, what: &str, session: &Session) -> String {
        format!("fetch {what} of {} from {}", self.repository, session.host.name())
    }

    fn tries(&self, need: Need) -> Tries {
        let last = self.last.load(Ordering::Relaxed);
        let may = |n: &usize| {
            self.sessions.get(*n).is_some_and(|s| match need {
                Need::Pull => s.host.pull,
                Need::Resolve => s.host.resolve,
            })
        };
        let mut order: Vec<usize> = (0..self.sessions.len()).filter(may).collect();
        order.sort_by_key(|n| *n != last);
        Tries::new(order, self.retries)
    }

    async fn next(&self, tries: &mut Tries) -> Option<(usize, &Session)> {
        let n = tries.next().await?;
        self.sessions.get(n).map(|session| (n, session))
    }

    /// `n` gave `value`: it is asked first from now on.
    fn settle<T>(&self, n: usize, value: T) -> T {
        self.last.store(n, Ordering::Relaxed);
        value
    }

    fn failed(&self, tries: &mut Tries, n: usize, failure: Failure) {
        tracing::debug!(error = %failure.error, again = ?failure.again, "a host did not answer as hoped");
        tries.failed(n, failure);
    }

    fn give_up<T>(&self, tries: Tries, what: &str) -> Result<T> {
        let name = |n: usize| self.sessions.get(n).map(|s| format!("mirror {}", s.host.name())).unwrap_or_default();
        tries.give_up(&format!("fetch {what} of {}", self.repository), name)
    }

    /// `work`, unless the registry is silent for too long.
    async fn timed<T>(&self, act: &str, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        match tokio::time::timeout(self.stall, work).await {
            Ok(result) => result,
            Err(_) => Err(unavailable(format!("{act}: nothing for {} s", self.stall.as_secs())).into()),
        }
    }
}

#[cfg(test)]
pub(in crate::provisioner) mod tests;
