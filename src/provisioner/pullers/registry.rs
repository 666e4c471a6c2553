//! Fetches manifests and blobs from registries (OCI distribution specification; Docker Registry v2).
//!
//! It stands directly on `reqwest`: the ready-made client for this protocol reads manifests and token answers of any size into
//! memory (attack case 6), follows `urls` of foreign layers, knows no identity tokens and hashes blobs on the async threads.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, RANGE, WWW_AUTHENTICATE};
use tokio::sync::mpsc;

use super::auth;
use super::manifest::{DOCKER_LIST, DOCKER_MANIFEST, Descriptor, OCI_INDEX, OCI_MANIFEST};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::{Digest, Reference};
use crate::provisioner::Credentials;
use crate::provisioner::config::{Config, Registry};
use crate::provisioner::unpack::Hasher;

/// Time to connect to one address of a registry.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Redirects followed for one request: registries send blobs to one storage host, which may move once more.
const MAX_REDIRECTS: usize = 5;
/// Times a broken transfer is taken up again where it stopped.
const RESUMES: u32 = 5;
/// Bytes of an error answer that are read for its message.
const MAX_ERROR: u64 = 16 << 10;
/// Idle connections are closed after this, so that an idle daemon holds none.
const IDLE: Duration = Duration::from_secs(10);

/// All registries; connections are made when first needed.
pub struct Registries {
    config: Config,
    clients: Mutex<HashMap<String, reqwest::Client>>,
}

/// One place to ask for one repository.
pub struct Endpoint {
    client: reqwest::Client,
    /// `https://host`, without a slash at the end.
    base: String,
    repository: String,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<HeaderValue>>,
    stall: Duration,
}

/// A manifest as served.
pub struct Served {
    /// Verified bytes.
    pub bytes: Bytes,
    /// Their digest.
    pub digest: Digest,
    /// What the transport called them.
    pub media_type: Option<String>,
}

impl Registries {
    /// With these settings. Installs the process's TLS provider.
    pub fn new(config: &Config) -> Self {
        // Fails if one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { config: config.clone(), clients: Mutex::new(HashMap::new()) }
    }

    /// Where to look for `reference`, in order.
    ///
    /// # Errors
    /// `InvalidArgument` when the settings of this registry are wrong.
    pub fn endpoints(&self, reference: &Reference, credentials: Option<&Credentials>) -> Result<Vec<Endpoint>> {
        let host = reference.registry();
        let default = Registry::default();
        let settings = self.config.registries.get(host).unwrap_or(&default);
        let own = match host {
            "docker.io" => self.config.docker_registry.clone(),
            _ => format!(
                "{}://{host}",
                if settings.plain_http || (is_loopback(host) && settings.ca_files.is_empty() && !settings.insecure_skip_verify) { "http" } else { "https" }
            ),
        };
        let credentials = credentials.filter(|c| auth::may_use(c, host)).cloned();
        let mut endpoints = Vec::new();
        for (base, credentials) in settings.mirrors.iter().map(|m| (m.clone(), None)).chain([(own, credentials)]) {
            endpoints.push(Endpoint {
                client: self.client(host, settings)?,
                base: base.trim_end_matches('/').to_owned(),
                repository: reference.repository().to_owned(),
                credentials,
                authorization: Mutex::new(None),
                stall: Duration::from_secs(self.config.stall_timeout_seconds.max(1)),
            });
        }
        Ok(endpoints)
    }

    fn client(&self, host: &str, settings: &Registry) -> Result<reqwest::Client> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(host) {
            return Ok(client.clone());
        }
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("mesocri/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE)
            .redirect(redirects())
            .tls_danger_accept_invalid_certs(settings.insecure_skip_verify);
        for file in &settings.ca_files {
            let pem = std::fs::read(file).act("read", file.display())?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|e| Error::with(Kind::InvalidArgument, format!("read certificates in {}", file.display()), e))?;
            builder = builder.tls_certs_merge(certificates);
        }
        if is_loopback(host) {
            builder = builder.no_proxy();
            if settings.ca_files.is_empty() {
                // Reading the system's authorities costs milliseconds and is of no use for plain HTTP.
                builder = builder.tls_certs_only([]);
            }
        }
        let client = builder.build().map_err(|e| Error::with(Kind::Internal, format!("make HTTP client for {host}"), e))?;
        clients.insert(host.to_owned(), client.clone());
        Ok(client)
    }
}

/// Redirects stay on the protocol or go from http to https, never back; `reqwest` drops credentials when the host changes.
fn redirects() -> reqwest::redirect::Policy {
    reqwest::redirect::Policy::custom(|attempt| {
        let downgrade = attempt.previous().last().is_some_and(|from| from.scheme() == "https") && attempt.url().scheme() != "https";
        if downgrade || attempt.previous().len() > MAX_REDIRECTS { attempt.stop() } else { attempt.follow() }
    })
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A failure to reach a registry. Users see the prefix in their pod's events.
pub fn unavailable(act: &str, e: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::with(Kind::Unavailable, format!("RegistryUnavailable: {act}"), e)
}

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// `ResourceExhausted` beyond it, `Unavailable` when the connection breaks.
pub async fn bounded(mut response: reqwest::Response, limit: u64, act: &str) -> Result<Bytes> {
    let too_long = || Error::new(Kind::ResourceExhausted, format!("{act}: the answer is longer than {limit} bytes"));
    if response.content_length().is_some_and(|n| n > limit) {
        return Err(too_long());
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| unavailable(act, e))? {
        if (body.len() + chunk.len()) as u64 > limit {
            return Err(too_long());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.into())
}

impl Endpoint {
    /// The host, for messages.
    pub fn host(&self) -> &str {
        self.base.split_once("://").map_or(self.base.as_str(), |(_, rest)| rest)
    }

    /// Fetches a manifest or index by tag or digest and verifies it.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`].
    pub async fn manifest(&self, name: &str, wanted: Option<&Digest>, limit: u64) -> Result<Served> {
        let act = format!("fetch manifest {name} of {} from {}", self.repository, self.host());
        let accept = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST].join(", ");
        let (bytes, media_type, header) = self
            .timed(&act, async {
                let response = self.get(&format!("manifests/{name}"), Some(&accept), None, &act).await?;
                let media_type = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
                let header = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok()?.parse::<Digest>().ok());
                Ok((bounded(response, limit, &act).await?, media_type, header))
            })
            .await?;
        for promised in [wanted, header.as_ref()].into_iter().flatten() {
            let digest = Hasher::of(&bytes, Some(promised))?;
            if digest != *promised {
                return Err(Error::new(Kind::DataLoss, format!("{act}: digest is {digest}, not {promised}")));
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
        let act = format!("fetch {} of {} from {}", blob.digest, self.repository, self.host());
        if blob.size > limit {
            return Err(Error::new(Kind::ResourceExhausted, format!("{act}: {} bytes, more than {limit}", blob.size)));
        }
        let bytes = self.timed(&act, async { bounded(self.get(&format!("blobs/{}", blob.digest), None, None, &act).await?, limit, &act).await }).await?;
        let digest = Hasher::of(&bytes, Some(&blob.digest))?;
        if digest != blob.digest || bytes.len() as u64 != blob.size {
            return Err(Error::new(Kind::DataLoss, format!("{act}: digest is {digest} of {} bytes, its descriptor says {} bytes", bytes.len(), blob.size)));
        }
        Ok(bytes)
    }

    /// Sends the bytes of a blob to `to`, in pieces as they arrive, and takes broken transfers up again. Verifying is the
    /// receiver's part. Ends early and well when the receiver is gone.
    ///
    /// # Errors
    /// As [`crate::provisioner::Images::pull`].
    pub async fn blob(&self, blob: &Descriptor, to: mpsc::Sender<Bytes>, mut progress: impl FnMut(u64)) -> Result<()> {
        let act = format!("fetch {} of {} from {}", blob.digest, self.repository, self.host());
        let mut done = 0u64;
        let mut resumes = 0;
        loop {
            match self.stream(blob, &to, &mut done, &mut progress, &act).await {
                // A server that closes early without an error is caught here, or by the digest.
                Ok(true) if done < blob.size && resumes < RESUMES => resumes += 1,
                Ok(_) => return Ok(()),
                Err(e) if matches!(e.kind, Kind::Unavailable) && done > 0 && resumes < RESUMES => {
                    tracing::debug!(error = %e, at = done, "transfer broke, going on");
                    resumes += 1;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// One attempt from `done` on. `true`: the body ended; `false`: the receiver left.
    async fn stream(&self, blob: &Descriptor, to: &mpsc::Sender<Bytes>, done: &mut u64, progress: &mut impl FnMut(u64), act: &str) -> Result<bool> {
        let start = *done;
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let mut response = self.timed(act, self.get(&format!("blobs/{}", blob.digest), None, range.as_deref(), act)).await?;
        // A server without ranges starts over: what is there already is passed by.
        let mut skip = if start > 0 && response.status() != StatusCode::PARTIAL_CONTENT { start } else { 0 };
        while let Some(mut chunk) = self.timed(act, async { response.chunk().await.map_err(|e| unavailable(act, e)) }).await? {
            if skip > 0 {
                let passed = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
                skip -= passed as u64;
                chunk = chunk.slice(passed..);
            }
            if chunk.is_empty() {
                continue;
            }
            *done += chunk.len() as u64;
            if to.send(chunk).await.is_err() {
                return Ok(false);
            }
            progress(*done);
        }
        Ok(true)
    }

    /// `work`, unless the registry is silent for too long.
    async fn timed<T>(&self, act: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        match tokio::time::timeout(self.stall, work).await {
            Ok(result) => result,
            Err(_) => Err(Error::new(Kind::Unavailable, format!("RegistryUnavailable: {act}: nothing for {} s", self.stall.as_secs()))),
        }
    }

    /// One GET below `/v2/<repository>/`, with authorization when the registry asks for it.
    async fn get(&self, path: &str, accept: Option<&str>, range: Option<&str>, act: &str) -> Result<reqwest::Response> {
        let url = format!("{}/v2/{}/{path}", self.base, self.repository);
        let mut asked = false;
        loop {
            let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut request = self.client.get(&url);
            for (name, value) in [(ACCEPT, accept), (RANGE, range)] {
                if let Some(value) = value {
                    request = request.header(name, value);
                }
            }
            if let Some(value) = authorization {
                request = request.header(AUTHORIZATION, value);
            }
            let response = request.send().await.map_err(|e| unavailable(act, e))?;
            if response.status() != StatusCode::UNAUTHORIZED || asked {
                return checked(response, act).await;
            }
            // Tokens run out during long pulls; each request may ask once.
            asked = true;
            // Only the registry itself may ask, not where it redirected to.
            if reqwest::Url::parse(&self.base).is_ok_and(|base| base.origin() != response.url().origin()) {
                return checked(response, act).await;
            }
            let challenge = auth::challenge(response.headers().get_all(WWW_AUTHENTICATE).iter());
            let secure = self.base.starts_with("https://");
            match auth::answer(&self.client, &challenge, self.credentials.as_ref(), &self.repository, secure).await? {
                Some(value) => *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value),
                None => return checked(response, act).await,
            }
        }
    }
}

/// A good answer, or the error it is.
async fn checked(response: reqwest::Response, act: &str) -> Result<reqwest::Response> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let kind = match status {
        StatusCode::UNAUTHORIZED => Kind::Unauthenticated,
        StatusCode::FORBIDDEN => Kind::PermissionDenied,
        StatusCode::NOT_FOUND => Kind::NotFound,
        StatusCode::TOO_MANY_REQUESTS => Kind::Unavailable,
        s if s.is_server_error() => Kind::Unavailable,
        s if s.is_redirection() => Kind::PermissionDenied,
        _ => Kind::Internal,
    };
    let said = bounded(response, MAX_ERROR, act).await.ok().and_then(|body| message(&body)).map(|m| format!(" ({m})")).unwrap_or_default();
    let prefix = if kind == Kind::Unavailable { "RegistryUnavailable: " } else { "" };
    Err(Error::new(kind, format!("{prefix}{act}: it answers {status}{said}")))
}

/// The first message of an error document, on one line.
fn message(body: &[u8]) -> Option<String> {
    let document: serde_json::Value = serde_json::from_slice(body).ok()?;
    let text = document.get("errors")?.get(0)?.get("message")?.as_str()?;
    Some(text.chars().filter(|c| !c.is_control()).take(200).collect())
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn loopback_hosts() {
        for (host, is) in [("localhost:5000", true), ("127.0.0.1:1", true), ("[::1]:5000", true), ("localhost.evil", false), ("10.0.0.1", false)] {
            assert_eq!(is_loopback(host), is, "{host}");
        }
    }
}
