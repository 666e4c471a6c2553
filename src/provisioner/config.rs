//! Settings of the provisioner: platform, limits, registries.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::gc::{Gc, ImageGcConfig, covering};
pub use super::pullers::fetch::Hdfs;
pub use super::pullers::settings::{Proxy, Registry, Secret, ShortNames};

/// The provisioner's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Layers fetched from registries at once, all pulls together; 0: as many as are unpacked.
    pub max_parallel_downloads: usize,
    /// Bytes a second that all pulls together may take from the network; 0 is no limit.
    pub max_bytes_per_second: u64,
    /// Times a request is tried again, with growing pauses, after a broken connection, an overload (429) or a failure of the
    /// server (5xx).
    pub pull_retries: u32,
    /// Registry of image names that do not say one.
    pub docker_registry: String,
    /// What image names without a host mean: `default` (they lie at `docker_registry`), `refuse`.
    pub short_names: ShortNames,
    /// Names without host and tag, and the full names they stand for.
    pub short_name_aliases: BTreeMap<String, String>,
    /// Credentials by registry, for pulls that bring none: the path of a `config.json` or `.dockercfg`, or such a document
    /// itself. A path is read at each pull. Its credential helpers are run.
    pub docker_config: Secret,
    /// Directories of the programs `docker-credential-*` that `docker_config` names; empty: `PATH`.
    pub credential_helper_dirs: Vec<PathBuf>,
    /// Per registry host (as in image references, with port) how to reach it. What stands here comes before
    /// `registry_config_dir`.
    pub registries: BTreeMap<String, Registry>,
    /// Directory with `<host[:port]>/hosts.toml` and `_default/hosts.toml` as containerd has them, read at each pull; empty: none.
    pub registry_config_dir: PathBuf,
    /// Proxies.
    pub proxy: Proxy,
    /// How to read `hdfs://` URIs.
    pub hdfs: Hdfs,
    /// What comes before `NAME-VERSION-OS-ARCH.aci` in the URI of an Appc image: `http://`, `https://host/path/`, a path
    /// (also `file://`), `hdfs://…`.
    pub appc_simple_discovery_uri_prefix: String,
    /// Keyring of GnuPG. If set, Appc images are taken only with a signature (`….aci.asc` beside the archive) by a key in it.
    pub appc_keyring: PathBuf,
    /// Mesos's directory of Appc images. Nothing is kept there: all images share one store, below `root`.
    pub appc_store_dir: PathBuf,
    /// Which formats may be pulled; from `image_providers`.
    #[serde(skip)]
    pub formats: Formats,
    /// Images never collected automatically: full references, or prefixes ending in `*`.
    pub pinned: Vec<String>,
    /// Backend for root filesystems: `overlay`, `aufs`, `copy`; `bind` (read-only); `erofs` (layers kept as one image each). Empty
    /// chooses the first of the former three that works here; one that is named must work, or the daemon does not start.
    pub backend: String,
    /// Let a real mount alone decide where Mesos's validation table forbids a backend for what kernels of its day lacked: overlay
    /// on btrfs and zfs.
    pub backend_by_probe: bool,
    /// Bounds on what an image may ask of this machine.
    pub limits: Limits,
    /// When to collect images without being asked.
    pub gc: Gc,
    /// The same in Mesos's form, instead of thresholds in `gc`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_gc_config: Option<ImageGcConfig>,
}

/// Formats of images that may be pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formats {
    /// Docker and OCI.
    pub docker: bool,
    /// Appc.
    pub appc: bool,
}

impl Default for Formats {
    fn default() -> Self {
        Self { docker: true, appc: true }
    }
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
            max_parallel_downloads: 0,
            max_bytes_per_second: 0,
            pull_retries: 3,
            docker_registry: super::pullers::settings::HUB.to_owned(),
            short_names: ShortNames::Default,
            short_name_aliases: BTreeMap::new(),
            docker_config: Secret::default(),
            credential_helper_dirs: Vec::new(),
            registries: BTreeMap::new(),
            registry_config_dir: PathBuf::new(),
            proxy: Proxy::default(),
            hdfs: Hdfs::default(),
            appc_simple_discovery_uri_prefix: "http://".to_owned(),
            appc_keyring: PathBuf::new(),
            appc_store_dir: PathBuf::new(),
            formats: Formats::default(),
            pinned: Vec::new(),
            backend: String::new(),
            backend_by_probe: false,
            limits: Limits::default(),
            gc: Gc::default(),
            image_gc_config: None,
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
    pub fn is_pinned(&self, names: &[String]) -> bool {
        covering(&self.pinned, names).is_some()
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

    #[test]
    fn a_printed_configuration_has_no_secret() {
        let config: Config =
            toml::from_str("docker_config = '{\"auths\":{\"a:5000\":{\"auth\":\"hidden\"}}}'\n[proxy]\nhttp = \"http://u:hidden@proxy:3128\"").unwrap();
        let printed = toml::to_string(&config).unwrap();
        assert!(!printed.contains("hidden"), "{printed}");
        assert_eq!(printed.matches("(not shown)").count(), 2);

        let config: Config = toml::from_str("docker_config = '/etc/mesocri/docker.json'").unwrap();
        assert!(toml::to_string(&config).unwrap().contains("/etc/mesocri/docker.json"));
    }
}
