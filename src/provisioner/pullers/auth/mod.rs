//! Who we are to a registry: credentials turned into an `Authorization` header, by the challenge of the registry
//! (distribution specification, token authentication).

mod tokens;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::OnceCell;

pub use tokens::Tokens;
use tokens::{Fresh, Key};

use super::docker_config::{DockerConfig, canonical};
use super::registry::answer::{bounded, refusal};
use super::registry::client::{Clients, Trust, may_send};
use super::registry::exchange::{Outgoing, send};
use super::registry::hosts::{Host, authority};
use super::registry::retry::Failure;
use crate::model::error::{Error, Kind, Result};
use crate::provisioner::Credentials;

/// Bytes of a token answer. Tokens are a few kilobytes.
const MAX_TOKEN: u64 = 1 << 20;
/// Our name towards token servers.
const CLIENT_ID: &str = "mesocri";
/// Life of a token that does not say (token specification: no less than this).
const DEFAULT_LIFE: u64 = 60;

/// What a registry asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Challenge {
    /// A token from this URL.
    pub realm: Option<String>,
    /// For this service.
    pub service: String,
    /// The scope that the registry names, maybe empty.
    pub scope: String,
    /// User and password are taken directly.
    pub basic: bool,
}

/// Reads `WWW-Authenticate` headers.
pub fn challenge<'a>(headers: impl Iterator<Item = &'a HeaderValue>) -> Challenge {
    let mut found = Challenge::default();
    for challenge in headers.filter_map(|h| h.to_str().ok()).filter_map(|h| http_auth::parse_challenges(h).ok()).flatten() {
        let param = |name: &str| challenge.params.iter().find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v.to_unescaped());
        if challenge.scheme.eq_ignore_ascii_case("bearer") && found.realm.is_none() {
            found.realm = param("realm");
            found.service = param("service").unwrap_or_default();
            found.scope = param("scope").unwrap_or_default();
        } else if challenge.scheme.eq_ignore_ascii_case("basic") {
            found.basic = true;
        }
    }
    found
}

/// Credentials for one host, looked up when it first asks: a helper is not run for a registry that wants nothing.
pub struct Keys {
    given: Option<Credentials>,
    config: Arc<DockerConfig>,
    host: String,
    repository: String,
    found: OnceCell<Option<Credentials>>,
}

impl Keys {
    /// For `host`, reached on behalf of the registry `registry`. Credentials of a request win over the operator's. They go to
    /// the registry, unless they are addressed to another; a mirror gets them only if they are addressed to it.
    pub fn new(host: &Host, registry: &str, repository: &str, request: Option<&Credentials>, config: Arc<DockerConfig>) -> Self {
        let name = if host.own { registry.to_owned() } else { host.name() };
        let given = request.filter(|c| !is_empty(c) && may_use(c, &name) && (host.own || !c.server_address.is_empty())).cloned();
        Self { given, config, host: name, repository: repository.to_owned(), found: OnceCell::new() }
    }

    /// The credentials, if there are any.
    ///
    /// # Errors
    /// Those of [`DockerConfig::lookup`].
    pub async fn get(&self) -> Result<Option<&Credentials>> {
        if self.given.is_some() {
            return Ok(self.given.as_ref());
        }
        Ok(self.found.get_or_try_init(|| self.config.lookup(&self.host, &self.repository)).await?.as_ref())
    }
}

/// A request may bring credentials that are none.
fn is_empty(credentials: &Credentials) -> bool {
    [&credentials.username, &credentials.password, &credentials.identity_token, &credentials.registry_token].iter().all(|s| s.is_empty())
}

/// Whether `credentials` may be sent to the registry `host` (cri-behaviour §13.3: a server address restricts them to that host).
fn may_use(credentials: &Credentials, host: &str) -> bool {
    if credentials.server_address.is_empty() {
        return true;
    }
    let address = credentials.server_address.as_str();
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    let address = address.split('/').next().unwrap_or_default();
    canonical(address) == canonical(host)
}

/// User and password as a header.
fn basic(user: &str, password: &str) -> Option<HeaderValue> {
    if user.is_empty() && password.is_empty() {
        return None;
    }
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let mut value = HeaderValue::from_str(&format!("Basic {text}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn bearer(token: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| Error::new(Kind::Unauthenticated, "use registry token: it is not text"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// A host that asks who we are.
pub struct Asking<'a> {
    /// It.
    pub host: &'a Host,
    /// For which repository.
    pub repository: &'a str,
    /// What it asks for.
    pub challenge: Challenge,
    /// The answer that it did not take, if there was one.
    pub refused: Option<&'a HeaderValue>,
}

impl Asking<'_> {
    /// The header that answers; `None` when there is nothing (else) to answer with.
    ///
    /// # Errors
    /// `Unauthenticated` when the token server refuses, `Unavailable` when it cannot be reached.
    pub async fn answer(&self, keys: &Keys, clients: &Clients, tokens: &Tokens) -> Result<Option<HeaderValue>, Failure> {
        let credentials = keys.get().await?;
        let answer = if let Some(c) = credentials.filter(|c| !c.registry_token.is_empty()) {
            Some(bearer(&c.registry_token)?)
        } else if let Some(realm) = &self.challenge.realm {
            return self.token(realm, credentials, clients, tokens).await.map(Some);
        } else if self.challenge.basic {
            // An identity token without a token server can only be a password.
            credentials.and_then(|c| basic(&c.username, if c.password.is_empty() { &c.identity_token } else { &c.password }))
        } else {
            None
        };
        Ok(answer.filter(|value| Some(value) != self.refused))
    }

    async fn token(&self, realm: &str, credentials: Option<&Credentials>, clients: &Clients, tokens: &Tokens) -> Result<HeaderValue, Failure> {
        let url = Url::parse(realm).map_err(|e| Error::with(Kind::Unauthenticated, "read token server's address", e))?;
        if self.host.base.scheme() == "https" && url.scheme() != "https" {
            return Err(Error::new(
                Kind::Unauthenticated,
                format!("ask {} for a token: the registry speaks https, its token server does not", authority(&url)),
            )
            .into());
        }
        may_send(&self.host.base, &url)?;
        let Challenge { service, scope, .. } = &self.challenge;
        let scope = if scope.is_empty() { format!("repository:{}:pull", self.repository) } else { scope.clone() };
        let key = Key { realm: url.to_string(), service: service.clone(), scope: scope.clone(), credentials: credentials.cloned() };
        // Our certificate is shown to a token server beside the registry, not to one elsewhere.
        let trust = if url.host() == self.host.base.host() { self.host.trust.clone() } else { self.host.trust.elsewhere() };
        let request = Request { url, service, scope: &scope, trust: &trust, clients };
        tokens.get(key, self.refused, request.fetch(credentials)).await
    }
}

/// A question for a token.
struct Request<'a> {
    url: Url,
    service: &'a str,
    scope: &'a str,
    trust: &'a Trust,
    clients: &'a Clients,
}

impl Request<'_> {
    async fn fetch(&self, credentials: Option<&Credentials>) -> Result<Fresh, Failure> {
        let act = format!("ask {} for a token", authority(&self.url));
        let mut response = None;
        if let Some(c) = credentials.filter(|c| !c.identity_token.is_empty()) {
            let posted = self.post(&c.identity_token, &act).await?;
            // Servers that do not know the OAuth2 form.
            if !matches!(posted.status(), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED) {
                response = Some(posted);
            }
        }
        let response = match response {
            Some(response) => response,
            None => self.get(credentials, &act).await?,
        };
        if !response.status().is_success() {
            return Err(refusal(response, &act, credentials.is_some(), true).await);
        }
        let body = bounded(response, MAX_TOKEN, &act).await?;
        // What serde says may quote the token.
        let unreadable = || Failure::lasting(Error::new(Kind::Unauthenticated, format!("{act}: its answer has no token")));
        let token: Token = serde_json::from_slice(&body).map_err(|_| unreadable())?;
        let text = token.token.filter(|t| !t.is_empty()).or(token.access_token).filter(|t| !t.is_empty()).ok_or_else(unreadable)?;
        Ok(Fresh { value: bearer(&text)?, life: Duration::from_secs(token.expires_in.unwrap_or(DEFAULT_LIFE)) })
    }

    /// OAuth2: an identity token is a refresh token.
    async fn post(&self, identity: &str, act: &str) -> Result<reqwest::Response, Failure> {
        // The URL type escapes; the form is its query.
        let mut form = self.url.clone();
        form.query_pairs_mut()
            .clear()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", self.service)
            .append_pair("client_id", CLIENT_ID)
            .append_pair("scope", self.scope)
            .append_pair("refresh_token", identity);
        let body = form.query().unwrap_or_default().to_owned();
        let own = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"))]);
        let out = Outgoing {
            method: Method::POST,
            url: self.url.clone(),
            own,
            common: HeaderMap::new(),
            body: Some(body),
            client: self.clients.get(self.trust, &self.url)?,
            trust: self.trust,
        };
        Ok(send(self.clients, out, act).await?.response)
    }

    async fn get(&self, credentials: Option<&Credentials>, act: &str) -> Result<reqwest::Response, Failure> {
        let mut url = self.url.clone();
        {
            let mut query = url.query_pairs_mut();
            query.append_pair("scope", self.scope);
            if !self.service.is_empty() {
                query.append_pair("service", self.service);
            }
        }
        let value = credentials.and_then(|c| basic(&c.username, if c.password.is_empty() { &c.identity_token } else { &c.password }));
        let own = value.map(|value| (AUTHORIZATION, value)).into_iter().collect();
        let client = self.clients.get(self.trust, &url)?;
        let out = Outgoing { method: Method::GET, url, own, common: HeaderMap::new(), body: None, client, trust: self.trust };
        Ok(send(self.clients, out, act).await?.response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_challenges() {
        let header = HeaderValue::from_static(r#"Bearer realm="https://auth/token",service="reg",scope="repository:a/b:pull,push", Basic realm="x""#);
        let found = challenge([&header].into_iter());
        assert_eq!(found.realm.as_deref(), Some("https://auth/token"));
        assert_eq!((found.service.as_str(), found.scope.as_str(), found.basic), ("reg", "repository:a/b:pull,push", true));
        assert_eq!(challenge([&HeaderValue::from_static("nonsense \"")].into_iter()), Challenge::default());
    }

    #[test]
    fn credentials_stay_with_their_server() {
        let with = |address: &str| Credentials { server_address: address.into(), ..Credentials::default() };
        assert!(may_use(&with(""), "evil"));
        assert!(may_use(&with("https://index.docker.io/v1/"), "docker.io"));
        assert!(may_use(&with("a:5000"), "a:5000"));
        assert!(!may_use(&with("a:5000"), "a:5001"));
        assert!(!may_use(&with("https://quay.io"), "docker.io"));
    }

    #[tokio::test]
    async fn of_a_request_before_the_operators_and_mirrors_only_when_named() {
        let text = br#"{"auths": {"reg": {"auth": "b3A6MQ=="}, "mirror": {"auth": "bWlycm9yOjE="}}}"#;
        let config = Arc::new(DockerConfig::parse(text, crate::provisioner::pullers::docker_config::Origin::Operator).unwrap());
        let given = |address: &str| Credentials { username: "req".into(), server_address: address.into(), ..Credentials::default() };
        let own = Host { own: true, ..Host::new("https://reg", false).unwrap() };
        let mirror = Host::new("https://mirror", false).unwrap();
        for (host, request, expected) in [
            (&own, None, "op"),
            (&own, Some(given("")), "req"),
            (&own, Some(given("reg")), "req"),
            (&own, Some(given("other")), "op"),
            (&own, Some(Credentials::default()), "op"),
            (&mirror, None, "mirror"),
            (&mirror, Some(given("")), "mirror"),
            (&mirror, Some(given("reg")), "mirror"),
            (&mirror, Some(given("mirror")), "req"),
        ] {
            let keys = Keys::new(host, "reg", "a", request.as_ref(), config.clone());
            assert_eq!(keys.get().await.unwrap().unwrap().username, expected);
        }
    }
}
