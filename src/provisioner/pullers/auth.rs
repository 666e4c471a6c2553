//! Who we are to a registry: credentials of one request turned into an `Authorization` header, by the challenge of the
//! registry (distribution specification, token authentication).

use base64::Engine;
use reqwest::header::HeaderValue;
use serde::Deserialize;

use super::registry::{bounded, unavailable};
use crate::model::error::{Error, Kind, Result};
use crate::provisioner::Credentials;

/// Bytes of a token answer. Tokens are a few kilobytes.
const MAX_TOKEN: u64 = 1 << 20;
/// Our name towards token servers.
const CLIENT_ID: &str = "mesocri";

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

/// Whether `credentials` may be sent to the registry `host` (cri-behaviour §13.3: a server address restricts them to that host).
pub fn may_use(credentials: &Credentials, host: &str) -> bool {
    if credentials.server_address.is_empty() {
        return true;
    }
    let address = credentials.server_address.as_str();
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    let address = address.split('/').next().unwrap_or_default();
    let canonical = |h: &str| match h {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_ascii_lowercase(),
    };
    canonical(address) == canonical(host)
}

/// Basic authorization, if there is a user.
fn basic(credentials: &Credentials) -> Option<HeaderValue> {
    if credentials.username.is_empty() && credentials.password.is_empty() {
        return None;
    }
    let text = format!("{}:{}", credentials.username, credentials.password);
    let mut value = HeaderValue::from_str(&format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn bearer(token: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| Error::new(Kind::Unauthenticated, "use registry token: it is not text"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

/// The header that answers `challenge`; `None` when there is nothing to answer with.
///
/// # Errors
/// `Unauthenticated` when the token server refuses, `Unavailable` when it cannot be reached.
pub async fn answer(
    client: &reqwest::Client,
    challenge: &Challenge,
    credentials: Option<&Credentials>,
    repository: &str,
    secure: bool,
) -> Result<Option<HeaderValue>> {
    if let Some(c) = credentials.filter(|c| !c.registry_token.is_empty()) {
        return bearer(&c.registry_token).map(Some);
    }
    let Some(realm) = &challenge.realm else {
        return Ok(if challenge.basic { credentials.and_then(basic) } else { None });
    };
    let url = reqwest::Url::parse(realm).map_err(|e| Error::with(Kind::Unauthenticated, "read token server's address", e))?;
    if secure && url.scheme() != "https" {
        return Err(Error::new(Kind::Unauthenticated, format!("ask {url} for a token: the registry speaks https, its token server does not")));
    }
    let scope = if challenge.scope.is_empty() { format!("repository:{repository}:pull") } else { challenge.scope.clone() };
    let request = match credentials.filter(|c| !c.identity_token.is_empty()) {
        Some(c) => {
            // OAuth2 refresh token grant; the form is small and all values are escaped by the URL type.
            let mut form = url.clone();
            form.set_query(None);
            form.query_pairs_mut()
                .append_pair("grant_type", "refresh_token")
                .append_pair("service", &challenge.service)
                .append_pair("client_id", CLIENT_ID)
                .append_pair("scope", &scope)
                .append_pair("refresh_token", &c.identity_token);
            let body = form.query().unwrap_or_default().to_owned();
            client.post(url.clone()).header("content-type", "application/x-www-form-urlencoded").body(body)
        }
        None => {
            let mut query = vec![("scope", scope.as_str())];
            if !challenge.service.is_empty() {
                query.push(("service", &challenge.service));
            }
            let request = client.get(url.clone()).query(&query);
            match credentials.and_then(basic) {
                Some(value) => request.header("authorization", value),
                None => request,
            }
        }
    };
    let response = request.send().await.map_err(|e| unavailable(&format!("ask {} for a token", url.host_str().unwrap_or_default()), e))?;
    let status = response.status();
    let act = format!("ask {} for a token", url.host_str().unwrap_or_default());
    if !status.is_success() {
        let kind = if status.is_server_error() { Kind::Unavailable } else { Kind::Unauthenticated };
        let prefix = if kind == Kind::Unavailable { "RegistryUnavailable: " } else { "" };
        return Err(Error::new(kind, format!("{prefix}{act}: it answers {status}")));
    }
    let body = bounded(response, MAX_TOKEN, &act).await?;
    let token: Token = serde_json::from_slice(&body).map_err(|e| Error::with(Kind::Unauthenticated, act, e))?;
    bearer(if token.token.is_empty() { &token.access_token } else { &token.token }).map(Some)
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
}
