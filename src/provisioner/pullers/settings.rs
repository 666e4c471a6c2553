//! Settings of registries, as the operator writes them, and what they make of names without a host.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize, Serializer};

use crate::model::Reference;
use crate::model::error::{Error, Result};
use crate::provisioner::config::Config;

/// Docker Hub's registry, where `docker.io` really is.
pub const HUB: &str = "https://registry-1.docker.io";

/// How to reach one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// Base URLs tried in order before the host itself, with the same repository path. They get no credentials but those that
    /// `docker_config` has for them, or that a request addresses to them.
    pub mirrors: Vec<String>,
    /// Speak HTTP to the host. Loopback hosts are tried with HTTP without this.
    pub plain_http: bool,
    /// PEM files with further certificate authorities.
    pub ca_files: Vec<PathBuf>,
    /// PEM file with our certificate towards the host (not towards its mirrors); `client_key` may be in it too.
    pub client_cert: PathBuf,
    /// PEM file with its key.
    pub client_key: PathBuf,
    /// Accept any certificate. For laboratories.
    pub insecure_skip_verify: bool,
}

/// What an image name without a host means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShortNames {
    /// It is an alias, or lies at `docker_registry`.
    #[default]
    Default,
    /// It is an alias, or an error: nobody can be made to run somebody else's image of the same name.
    Refuse,
}

/// Proxies towards registries. When all is empty, `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` of the daemon's
/// environment count. Loopback registries are never asked through a proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Proxy {
    /// URL of the proxy for registries that speak HTTP; may hold user and password.
    pub http: Secret,
    /// URL of the proxy for registries that speak HTTPS.
    pub https: Secret,
    /// Hosts reached directly, comma separated: names (with all below them), addresses, networks (`10.0.0.0/8`), `*`.
    pub no_proxy: String,
}

impl Proxy {
    /// Whether the environment decides.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Text that may hold a password: shown neither by `Debug` nor by `Serialize`, so no log line, no error and no printed
/// configuration has it. A path is no secret and is written as it is.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let shown = self.0.is_empty() || self.0.starts_with('/');
        serializer.serialize_str(if shown { &self.0 } else { "(not shown)" })
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { "\"(not shown)\"" })
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Config {
    /// The reference that `reference` stands for: a name written without a host gets one (Mesos: an explicit host in the name
    /// wins over `docker_registry`). A `docker_registry` that is no URL of a registry leaves names as they are.
    ///
    /// # Errors
    /// `InvalidArgument` when short names are refused, or an alias is no name.
    pub fn qualify(&self, reference: &Reference) -> Result<Reference> {
        if let Some(name) = reference.appc() {
            let platform = self.platform();
            let (os, arch) = super::appc::manifest::words(&platform);
            return if self.formats.appc {
                Ok(name.with_defaults(os, arch).into())
            } else {
                Err(Error::invalid(format!("pull image {reference}: image_providers does not contain appc")))
            };
        }
        if !self.formats.docker {
            return Err(Error::invalid(format!("pull image {reference}: image_providers does not contain docker")));
        }
        let Some(written) = reference.written_short() else { return Ok(reference.settled()) };
        if let Some(alias) = self.short_name_aliases.get(written) {
            let target: Reference = alias.parse().map_err(|e: Error| e.within(format!("read alias of {written}")))?;
            return Ok(reference.renamed(target.registry(), target.repository()));
        }
        if self.short_names == ShortNames::Refuse {
            return Err(Error::invalid(format!(
                "pull image {written}: the name has no registry host, and short names are refused (docker.io/… is written out)"
            )));
        }
        match self.default_host() {
            Some(host) => Ok(reference.renamed(&host, written)),
            None => Ok(reference.settled()),
        }
    }

    /// The same for names that something in hand already has: where no host can be given to one, it stays as it is.
    pub fn qualify_or_keep(&self, reference: Reference) -> Reference {
        self.qualify(&reference).unwrap_or(reference)
    }

    /// The key under which the image that `key` names is found: as [`Config::qualify`] has it. Ids stay what they are.
    pub fn qualify_key(&self, key: &str) -> Option<String> {
        let reference: Reference = key.parse().ok()?;
        if reference.appc().is_none() {
            reference.written_short()?;
        }
        let full = self.qualify(&reference).ok()?;
        (full != reference).then(|| full.to_string())
    }

    /// `host[:port]` of `docker_registry`, if that is a registry other than Docker's.
    fn default_host(&self) -> Option<String> {
        let (scheme, rest) = self.docker_registry.split_once("://")?;
        let authority = rest.split('/').next().unwrap_or_default();
        if !matches!(scheme, "http" | "https") || authority.is_empty() || is_hub(authority) {
            return None;
        }
        // A host without dot and port would read as the first part of a repository.
        Some(if authority.contains(['.', ':']) || authority == "localhost" {
            authority.to_owned()
        } else {
            format!("{authority}:{}", if scheme == "http" { 80 } else { 443 })
        })
    }

    /// The URL of a registry when `docker_registry` says it.
    pub(super) fn default_url(&self, host: &str) -> Option<&str> {
        (self.default_host()? == host).then_some(self.docker_registry.as_str())
    }
}

/// Whether `host` is one of the names of Docker's own registry.
pub fn is_hub(host: &str) -> bool {
    matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn name(config: &Config, name: &str) -> String {
        config.qualify(&name.parse().unwrap()).unwrap().to_string()
    }

    #[test]
    fn an_explicit_host_wins_over_docker_registry() {
        let hub = Config::default();
        let own = Config { docker_registry: "http://reg.corp:5000/".into(), ..Config::default() };
        let bare = Config { docker_registry: "https://registry".into(), ..Config::default() };
        for (given, at_hub, at_own) in [
            ("busybox", "docker.io/library/busybox:latest", "reg.corp:5000/busybox:latest"),
            ("library/busybox:1", "docker.io/library/busybox:1", "reg.corp:5000/library/busybox:1"),
            ("a/b", "docker.io/a/b:latest", "reg.corp:5000/a/b:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest", "docker.io/library/busybox:latest"),
            ("quay.io/a/b:1", "quay.io/a/b:1", "quay.io/a/b:1"),
        ] {
            assert_eq!(name(&hub, given), at_hub);
            assert_eq!(name(&own, given), at_own);
        }
        assert_eq!(name(&bare, "x"), "registry:443/x:latest");
        // Sources that are no registries have their own way with names.
        for other in ["/var/archives", "hdfs://namenode/archives", "https://index.docker.io"] {
            let config = Config { docker_registry: other.into(), ..Config::default() };
            assert_eq!(name(&config, "x"), "docker.io/library/x:latest");
        }
        assert_eq!(own.default_url("reg.corp:5000"), Some("http://reg.corp:5000/"));
        assert_eq!(own.default_url("quay.io"), None);
        assert_eq!(own.qualify_key("busybox:1").as_deref(), Some("reg.corp:5000/busybox:1"));
        assert_eq!(own.qualify_key("quay.io/busybox"), None);
        assert_eq!(hub.qualify_key("busybox"), None);
    }

    #[test]
    fn short_names_by_alias_or_not_at_all() {
        let mut config = Config { short_names: ShortNames::Refuse, ..Config::default() };
        config.short_name_aliases.insert("busybox".into(), "quay.io/corp/busybox".into());
        config.short_name_aliases.insert("bad".into(), "A B".into());
        let digest = format!("sha256:{}", "a".repeat(64));
        assert_eq!(name(&config, "busybox:1"), "quay.io/corp/busybox:1");
        assert_eq!(name(&config, &format!("busybox:1@{digest}")), format!("quay.io/corp/busybox:1@{digest}"));
        assert_eq!(name(&config, "docker.io/alpine"), "docker.io/library/alpine:latest");
        for refused in ["alpine", "library/alpine", "bad"] {
            assert_eq!(config.qualify(&refused.parse().unwrap()).unwrap_err().kind, Kind::InvalidArgument, "{refused}");
        }
        // The control: the default policy takes the same name.
        config.short_names = ShortNames::Default;
        assert_eq!(name(&config, "alpine"), "docker.io/library/alpine:latest");
    }

    #[test]
    fn secrets_are_not_shown() {
        let proxy = Proxy { http: "http://u:hunter2@p".into(), ..Proxy::default() };
        assert!(!format!("{proxy:?}").contains("hunter2"));
        assert!(!serde_json::to_string(&proxy).unwrap().contains("hunter2"));
    }
}
