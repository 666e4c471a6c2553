//! Credentials as Docker keeps them: `config.json` (`auths`, `credHelpers`, `credsStore`) and the older `.dockercfg`.
//!
//! The document may be the operator's, or come with a request (Mesos gives one per image as a secret). Only the operator's may
//! name helpers: they are programs, and whoever sends requests does not choose what runs on the host.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use super::helper::Helpers;
use super::settings::is_hub;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::Credentials;

/// Largest document. Those of clusters with hundreds of registries have some 100 KB.
const MAX_DOCUMENT: u64 = 1 << 20;
/// Docker's user name for "the password is an identity token".
const TOKEN_USER: &str = "<token>";
/// Base64 as people paste it, with or without padding.
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&base64::alphabet::STANDARD, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

/// A document. No `Debug`: it holds secrets.
#[derive(Default)]
pub struct DockerConfig {
    entries: Vec<Entry>,
    /// Helper by host.
    helpers: BTreeMap<String, String>,
    /// Helper for all others.
    store: Option<String>,
    /// How helpers are run.
    pub run: Helpers,
}

struct Entry {
    host: String,
    /// Repository or the beginning of one; empty is all.
    path: String,
    raw: RawEntry,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct RawEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    auths: Option<BTreeMap<String, RawEntry>>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: String,
}

/// Who may have written a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Whoever runs this node.
    Operator,
    /// Whoever sent a request.
    Request,
}

impl DockerConfig {
    /// The operator's setting: empty, a document, or the path of one. Blocks.
    ///
    /// # Errors
    /// `InvalidArgument` when it cannot be understood; I/O errors.
    pub fn open(setting: &str) -> Result<Self> {
        use std::io::Read;
        let setting = setting.trim();
        if setting.is_empty() {
            return Ok(Self::default());
        }
        if setting.starts_with('{') {
            return Self::parse(setting.as_bytes(), Origin::Operator).map_err(|e| e.within("read docker_config"));
        }
        let path = Path::new(setting.strip_prefix("file://").unwrap_or(setting));
        let mut text = Vec::new();
        std::fs::File::open(path).act("open docker_config", path.display())?.take(MAX_DOCUMENT + 1).read_to_end(&mut text).act("read", path.display())?;
        Self::parse(&text, Origin::Operator).map_err(|e| e.within(format!("read docker_config {}", path.display())))
    }

    /// Reads a document of either form.
    ///
    /// # Errors
    /// `InvalidArgument` when it is neither. The message shows nothing of its content.
    pub fn parse(text: &[u8], origin: Origin) -> Result<Self> {
        if text.len() as u64 > MAX_DOCUMENT {
            return Err(Error::invalid(format!("longer than {MAX_DOCUMENT} bytes")));
        }
        // What serde says may quote values.
        let bad = |e: serde_json::Error| Error::invalid(format!("neither config.json nor .dockercfg (line {}, column {})", e.line(), e.column()));
        let top: BTreeMap<String, serde_json::Value> = serde_json::from_slice(text).map_err(bad)?;
        let current = ["auths", "credHelpers", "credsStore"].iter().any(|key| top.contains_key(*key));
        let mut this = Self::default();
        let entries = if current {
            let raw: Raw = serde_json::from_slice(text).map_err(bad)?;
            if origin == Origin::Operator {
                this.helpers = raw.cred_helpers.into_iter().map(|(host, helper)| (split(&host).0, helper)).collect();
                this.store = Some(raw.creds_store).filter(|s| !s.is_empty());
            }
            raw.auths.unwrap_or_default()
        } else {
            serde_json::from_slice(text).map_err(bad)?
        };
        for (key, raw) in entries {
            let (host, path) = split(&key);
            this.entries.push(Entry { host, path, raw });
        }
        Ok(this)
    }

    /// Credentials for `repository` at `host` (`host[:port]`), asking a helper if one is set for it. The entry with the longest
    /// matching path wins.
    ///
    /// # Errors
    /// `InvalidArgument` for an entry that is no base64 of `user:password`, failures of helpers.
    pub async fn lookup(&self, host: &str, repository: &str) -> Result<Option<Credentials>> {
        let host = canonical(host);
        if let Some(name) = self.helpers.get(&host) {
            return self.run.get(name, server_of(&host)).await;
        }
        let fits = |e: &&Entry| {
            e.host == host
                && !e.raw.is_empty()
                && (e.path.is_empty() || repository.strip_prefix(&e.path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
        };
        if let Some(entry) = self.entries.iter().filter(fits).max_by_key(|e| e.path.len()) {
            return entry.raw.read().map(Some).map_err(|e| e.within(format!("read credentials for {host}")));
        }
        match &self.store {
            Some(name) => self.run.get(name, server_of(&host)).await,
            None => Ok(None),
        }
    }
}

impl RawEntry {
    fn is_empty(&self) -> bool {
        [&self.auth, &self.username, &self.password, &self.identitytoken, &self.registrytoken].iter().all(|s| s.is_empty())
    }

    fn read(&self) -> Result<Credentials> {
        let mut found = Credentials {
            username: self.username.clone(),
            password: self.password.clone(),
            identity_token: self.identitytoken.clone(),
            registry_token: self.registrytoken.clone(),
            server_address: String::new(),
        };
        if !self.auth.is_empty() {
            let bad = || Error::new(Kind::InvalidArgument, "auth is not the base64 of user:password");
            let text = BASE64.decode(self.auth.trim()).map_err(|_| bad())?;
            let text = String::from_utf8(text).map_err(|_| bad())?;
            let (user, password) = text.split_once(':').ok_or_else(bad)?;
            // Some writers pad with zero bytes.
            (found.username, found.password) = (user.to_owned(), password.trim_end_matches('\0').to_owned());
        }
        Ok(from_user(found))
    }
}

/// A password that is a token is taken for one.
pub fn from_user(mut credentials: Credentials) -> Credentials {
    if credentials.username == TOKEN_USER {
        credentials.identity_token = std::mem::take(&mut credentials.password);
        credentials.username = String::new();
    }
    credentials
}

/// Host and path of a key. A key with a scheme is an address of Docker's old form, whose path means nothing; without one the
/// path restricts it to repositories below.
fn split(key: &str) -> (String, String) {
    let (url, rest) = match key.split_once("://") {
        Some((_, rest)) => (true, rest),
        None => (false, key),
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.trim_matches('/');
    let path = if url || matches!(path, "v1" | "v2") { "" } else { path };
    (canonical(host), path.to_owned())
}

/// One name for each registry.
pub fn canonical(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    if is_hub(&host) { "docker.io".to_owned() } else { host }
}

/// The name under which helpers keep a registry.
fn server_of(host: &str) -> &str {
    if host == "docker.io" { "https://index.docker.io/v1/" } else { host }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn user(config: &DockerConfig, host: &str, repository: &str) -> Option<String> {
        config.lookup(host, repository).await.unwrap().map(|c| format!("{}:{}:{}:{}", c.username, c.password, c.identity_token, c.registry_token))
    }

    #[tokio::test]
    async fn both_forms_and_every_kind_of_secret() {
        let entries = r#"{
            "https://index.docker.io/v1/": {"auth": "aHViOnB3AAA=", "email": "x"},
            "a:5000": {"username": "u", "password": "p:q"},
            "b": {"identitytoken": "i"},
            "c": {"auth": "PHRva2VuPjppZA"},
            "d": {"registrytoken": "r"},
            "e": {},
            "quay.io/corp": {"auth": "Y29ycDox"},
            "quay.io/corp/team": {"auth": "dGVhbTox"},
            "quay.io": {"auth": "YWxsOjE="},
            "http://old/v2/": {"auth": "b2xkOjE="},
            "bad": {"auth": "%%%"}
        }"#;
        for text in [format!(r#"{{"auths": {entries}, "HttpHeaders": {{}}}}"#), entries.to_owned()] {
            let config = DockerConfig::parse(text.as_bytes(), Origin::Request).unwrap();
            for (host, repository, expected) in [
                ("docker.io", "library/x", Some("hub:pw::")),
                ("registry-1.docker.io", "library/x", Some("hub:pw::")),
                ("a:5000", "x", Some("u:p:q::")),
                ("a", "x", None),
                ("a:5001", "x", None),
                ("b", "x", Some("::i:")),
                ("c", "x", Some("::id:")),
                ("d", "x", Some(":::r")),
                ("e", "x", None),
                ("quay.io", "other/x", Some("all:1::")),
                ("quay.io", "corp/x", Some("corp:1::")),
                ("quay.io", "corp/team", Some("team:1::")),
                ("quay.io", "corporate/x", Some("all:1::")),
                ("QUAY.io", "corp/team/x", Some("team:1::")),
                ("old", "x", Some("old:1::")),
            ] {
                assert_eq!(user(&config, host, repository).await.as_deref(), expected, "{host}/{repository}");
            }
            assert_eq!(config.lookup("bad", "x").await.err().unwrap().kind, Kind::InvalidArgument);
        }
    }

    #[test]
    fn paths_documents_and_nonsense() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, r#"{"auths":{"a":{"auth":"dTpw"}}}"#).unwrap();
        for setting in [path.display().to_string(), format!("file://{}", path.display()), r#" {"auths":{"a":{"auth":"dTpw"}}}"#.to_owned()] {
            assert_eq!(DockerConfig::open(&setting).unwrap().entries.len(), 1);
        }
        assert!(DockerConfig::open("").unwrap().entries.is_empty());
        for bad in ["{", "[]", r#"{"a": "hunter2"}"#, r#"{"auths": {"a": {"auth": ["hunter2"]}}}"#, r#"{"auths": ["hunter2"]}"#] {
            let error = DockerConfig::parse(bad.as_bytes(), Origin::Operator).err().unwrap();
            assert_eq!(error.kind, Kind::InvalidArgument);
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        std::fs::write(&path, vec![b' '; MAX_DOCUMENT as usize + 1]).unwrap();
        assert!(DockerConfig::open(&path.display().to_string()).is_err());
        assert!(DockerConfig::open("/nonexistent/config.json").is_err());
    }

    #[test]
    fn requests_name_no_helpers() {
        let text = br#"{"credHelpers": {"a": "x"}, "credsStore": "y"}"#;
        let request = DockerConfig::parse(text, Origin::Request).unwrap();
        assert!(request.helpers.is_empty() && request.store.is_none());
        // The control: the operator's document does.
        let operator = DockerConfig::parse(text, Origin::Operator).unwrap();
        assert_eq!((operator.helpers["a"].as_str(), operator.store.as_deref()), ("x", Some("y")));
    }
}
