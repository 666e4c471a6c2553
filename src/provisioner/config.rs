//! Settings of the provisioner: platform, limits, registries.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The provisioner's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `os/architecture[/variant]` to choose from multi-platform images; empty is this host's.
    pub platform: String,
    /// Layers of one image fetched and unpacked at once. Each costs about 2 MiB of buffers; two threads work on it.
    pub max_parallel_layers: usize,
    /// Images pulled at once; further pulls wait.
    pub max_parallel_pulls: usize,
    /// Seconds without a byte from a registry after which a transfer is given up (and resumed, a few times).
    pub stall_timeout_seconds: u64,
    /// Registry that stands for `docker.io`.
    pub docker_registry: String,
    /// Per registry host (as in image references, with port) how to reach it.
    pub registries: BTreeMap<String, Registry>,
    /// Images never collected automatically: full references, or prefixes ending in `*`.
    pub pinned: Vec<String>,
    /// Backend for root filesystems: `overlay`, `copy`; empty chooses the first that works here.
    pub backend: String,
    /// Bounds on what an image may ask of this machine.
    pub limits: Limits,
}

/// How to reach one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// Base URLs tried in order before the host itself, with the same repository path. Credentials are not sent to them.
    pub mirrors: Vec<String>,
    /// Speak HTTP to the host. Loopback hosts are tried with HTTP without this.
    pub plain_http: bool,
    /// PEM files with further certificate authorities.
    pub ca_files: Vec<PathBuf>,
    /// Accept any certificate. For laboratories.
    pub insecure_skip_verify: bool,
}

/// Bounds against hostile images. A pull that hits one fails with `ResourceExhausted` and leaves nothing behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of one manifest, index or configuration.
    pub manifest_bytes: u64,
    /// Layers of one image.
    pub layers: usize,
    /// Unpacked bytes of one layer.
    pub layer_bytes: u64,
    /// Files, directories and links of one layer.
    pub layer_entries: u64,
    /// Unpacked bytes per fetched byte, looked at once a layer has grown past 256 MiB. Deflate cannot exceed 1032.
    pub ratio: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            platform: String::new(),
            max_parallel_layers: 4,
            max_parallel_pulls: 8,
            stall_timeout_seconds: 60,
            docker_registry: "https://registry-1.docker.io".to_owned(),
            registries: BTreeMap::new(),
            pinned: Vec::new(),
            backend: String::new(),
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // The distribution specification asks registries to take manifests of up to 4 MiB.
            manifest_bytes: 4 << 20,
            // Overlay takes 500 lower directories; the rest of the world stops at 127.
            layers: 500,
            layer_bytes: 128 << 30,
            layer_entries: 4_000_000,
            ratio: 1100,
        }
    }
}

impl Config {
    /// Whether any of these names matches a pinned pattern.
    pub fn is_pinned<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> bool {
        names.into_iter().any(|name| {
            self.pinned.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == pattern,
            })
        })
    }

    /// The platform to choose: operating system, architecture, variant (maybe empty).
    pub fn platform(&self) -> Platform {
        let mut parts = self.platform.split('/').filter(|p| !p.is_empty());
        let mut next = || parts.next().map(str::to_owned);
        let os = next().unwrap_or_else(|| "linux".to_owned());
        let architecture = next().unwrap_or_else(|| host_architecture().to_owned());
        Platform { os, architecture, variant: next().unwrap_or_default() }
    }
}

/// A platform in the words of OCI (GOOS, GOARCH, variant).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`.
    pub architecture: String,
    /// `v7`, or empty.
    pub variant: String,
}

/// Rust's name of this machine's architecture in Go's words.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_errors_and_defaults_fill_the_rest() {
        let config: Config =
            toml::from_str("platform = \"linux/arm/v7\"\npinned = [\"registry.k8s.io/pause*\"]\n[registries.\"a:5000\"]\nplain_http = true").unwrap();
        assert_eq!(config.platform(), Platform { os: "linux".into(), architecture: "arm".into(), variant: "v7".into() });
        assert!(config.registries["a:5000"].plain_http);
        assert!(config.is_pinned(&["registry.k8s.io/pause:3.9".to_owned()]));
        assert!(!config.is_pinned(&["registry.k8s.io/paus:3.9".to_owned()]));
        assert!(toml::from_str::<Config>("typo = 1").is_err());
        assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
    }
}
