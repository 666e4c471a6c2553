//! Where to look for a reference: mirrors first, the registry itself last. From the settings, or from a directory in
//! containerd's form, which is read at each pull, so that nothing need be restarted.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderMap;

use super::client::Trust;
use super::hosts_file;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::config::{Config, Registry};
use crate::provisioner::pullers::settings::{HUB, is_hub};

/// Largest file of certificates or hosts that is read; bundles of all authorities have some 250 KB.
const MAX_FILE: u64 = 4 << 20;

/// One server that may have what a reference names.
#[derive(Clone)]
pub struct Host {
    /// What stands before `/<repository>/manifests/…`, without a slash at the end.
    pub base: Url,
    /// Manifests by digest, and blobs, may be fetched here.
    pub pull: bool,
    /// Tags may be resolved here.
    pub resolve: bool,
    /// It is the registry that the reference names, not a mirror.
    pub own: bool,
    /// Whom to trust, and with which certificate to come.
    pub trust: Trust,
    /// Headers for this server alone.
    pub headers: HeaderMap,
}

impl Host {
    /// A server at `url`. `exact`: its path is all that comes before the repository; otherwise `/v2` follows it.
    pub fn new(url: &str, exact: bool) -> Result<Self> {
        let bad = |e: &dyn std::fmt::Display| Error::invalid(format!("read registry URL {:?}: {e}", url.chars().take(200).collect::<String>()));
        let with_scheme = if url.contains("://") { url.to_owned() } else { format!("{}://{url}", default_scheme(url)) };
        let mut base = Url::parse(&with_scheme).map_err(|e| bad(&e))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(bad(&"neither http nor https"));
        }
        base.set_query(None);
        base.set_fragment(None);
        let path = base.path().trim_end_matches('/').to_owned();
        base.set_path(&if exact || path.ends_with("/v2") { path } else { format!("{path}/v2") });
        Ok(Self { base, pull: true, resolve: true, own: false, trust: Trust::default(), headers: HeaderMap::new() })
    }

    /// `host[:port]`, for messages and credentials.
    pub fn name(&self) -> String {
        authority(&self.base)
    }
}

/// `host[:port]` of a URL.
pub fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The servers for `registry` (`host[:port]` of a reference), in the order to ask them. Reads files; blocks.
///
/// # Errors
/// `InvalidArgument` for settings that cannot be used, I/O errors.
pub fn find(config: &Config, registry: &str) -> Result<Vec<Host>> {
    if let Some(settings) = config.registries.get(registry) {
        return from_settings(config, registry, settings);
    }
    if !config.registry_config_dir.as_os_str().is_empty() {
        for dir in directories(&config.registry_config_dir, registry) {
            if let Some(hosts) = from_directory(config, registry, &dir)? {
                return Ok(hosts);
            }
        }
    }
    from_settings(config, registry, &Registry::default())
}

/// The registry itself, as it is reached when nothing else is said.
fn itself(config: &Config, registry: &str, scheme: Option<&str>) -> Result<Host> {
    let url = match (scheme, config.default_url(registry)) {
        (Some(scheme), _) => format!("{scheme}://{registry}"),
        (None, Some(url)) => url.to_owned(),
        (None, None) if is_hub(registry) => HUB.to_owned(),
        (None, None) => format!("{}://{registry}", default_scheme(registry)),
    };
    Ok(Host { own: true, ..Host::new(&url, false)? })
}

/// Loopback registries and port 80 speak HTTP, all others HTTPS.
fn default_scheme(registry: &str) -> &'static str {
    let port = registry.rsplit_once(':').map_or("", |(_, port)| port);
    if port == "80" || (super::client::is_loopback(registry) && port != "443") { "http" } else { "https" }
}

fn from_settings(config: &Config, registry: &str, settings: &Registry) -> Result<Vec<Host>> {
    let secured = !settings.ca_files.is_empty() || settings.insecure_skip_verify || !settings.client_cert.as_os_str().is_empty();
    let scheme = match (settings.plain_http, secured) {
        (true, _) => Some("http"),
        (false, true) if config.default_url(registry).is_none() && !is_hub(registry) => Some("https"),
        _ => None,
    };
    let trust = Trust { ca: settings.ca_files.iter().map(|f| read(f)).collect::<Result<_>>()?, skip_verify: settings.insecure_skip_verify, ..Trust::default() };
    let mut hosts = Vec::new();
    for mirror in &settings.mirrors {
        hosts.push(Host { trust: trust.clone(), ..Host::new(mirror, false)? });
    }
    let mut own = itself(config, registry, scheme)?;
    own.trust = Trust { identity: identity(&settings.client_cert, &settings.client_key)?, ..trust };
    hosts.push(own);
    Ok(hosts)
}

/// Directories that may speak of `registry`, the most special first: with the port, with the port as file systems without
/// colons have it, for all.
fn directories(root: &Path, registry: &str) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    // A host name is safe as a file name: references allow no slashes in it, and none begins with a dot.
    if let Some((host, port)) = registry.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())) {
        dirs.push(root.join(format!("{host}_{port}_")));
    }
    dirs.push(root.join(registry));
    dirs.push(root.join("_default"));
    dirs
}

fn from_directory(config: &Config, registry: &str, dir: &Path) -> Result<Option<Vec<Host>>> {
    let file = dir.join("hosts.toml");
    match std::fs::metadata(&file) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return from_certificates(config, registry, dir),
        Err(e) => return Err(Error::io(format!("open {}", file.display()), e)),
    }
    let text = String::from_utf8(read(&file)?).map_err(|e| Error::with(Kind::InvalidArgument, format!("read {}", file.display()), e))?;
    let parsed = hosts_file::parse(&text).map_err(|e| e.within(format!("read {}", file.display())))?;
    let mut hosts = Vec::new();
    for (url, settings) in &parsed.hosts {
        hosts.push(from_file(Host::new(url, settings.override_path)?, settings, dir)?);
    }
    let own = match &parsed.server {
        Some(url) => Host { own: true, ..Host::new(url, parsed.settings.override_path)? },
        None => itself(config, registry, None)?,
    };
    hosts.push(from_file(own, &parsed.settings, dir)?);
    Ok(Some(hosts))
}

fn from_file(mut host: Host, settings: &hosts_file::Settings, dir: &Path) -> Result<Host> {
    host.pull = settings.pull;
    host.resolve = settings.resolve;
    host.headers = settings.headers.clone();
    host.trust.skip_verify = settings.skip_verify;
    host.trust.dial_timeout = settings.dial_timeout.map(|t| t.max(Duration::from_millis(1)));
    host.trust.ca = settings.ca.iter().map(|f| read(&dir.join(f))).collect::<Result<_>>()?;
    host.trust.identity = match &settings.client {
        Some((cert, key)) => identity(&dir.join(cert), &key.as_ref().map(|k| dir.join(k)).unwrap_or_default())?,
        None => None,
    };
    Ok(host)
}

/// Docker's older form: `*.crt` are authorities, `x.cert` with `x.key` is our certificate.
fn from_certificates(config: &Config, registry: &str, dir: &Path) -> Result<Option<Vec<Host>>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(Error::io(format!("list {}", dir.display()), e)),
    };
    let mut paths = entries.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>().act("list", dir.display())?;
    paths.sort();
    let with = |ending: &str| paths.iter().filter(|p| p.extension().is_some_and(|e| e == ending)).collect::<Vec<_>>();
    let (ca, certs) = (with("crt"), with("cert"));
    if ca.is_empty() && certs.is_empty() {
        return Ok(None);
    }
    if certs.len() > 1 {
        return Err(Error::invalid(format!("read {}: more than one client certificate", dir.display())));
    }
    let mut own = itself(config, registry, (config.default_url(registry).is_none() && !is_hub(registry)).then_some("https"))?;
    own.trust.ca = ca.into_iter().map(|f| read(f)).collect::<Result<_>>()?;
    if let Some(cert) = certs.first() {
        own.trust.identity = identity(cert, &cert.with_extension("key"))?;
    }
    Ok(Some(vec![own]))
}

/// Certificate and key as one PEM text.
fn identity(cert: &Path, key: &Path) -> Result<Option<Vec<u8>>> {
    if cert.as_os_str().is_empty() {
        return Ok(None);
    }
    let mut pem = read(cert)?;
    if !key.as_os_str().is_empty() {
        pem.push(b'\n');
        pem.extend(read(key)?);
    }
    Ok(Some(pem))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path).act("open", path.display())?.take(MAX_FILE + 1).read_to_end(&mut bytes).act("read", path.display())?;
    if bytes.len() as u64 > MAX_FILE { Err(Error::invalid(format!("read {}: longer than {MAX_FILE} bytes", path.display()))) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(hosts: &[Host]) -> Vec<String> {
        hosts.iter().map(|h| format!("{}{}{}", h.base, if h.resolve { "" } else { " no-tags" }, if h.own { " own" } else { "" })).collect()
    }

    #[test]
    fn schemes_by_host_and_port() {
        let config = Config::default();
        for (registry, url) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("quay.io", "https://quay.io/v2"),
            ("a:80", "http://a/v2"),
            ("a:443", "https://a/v2"),
            ("a:5000", "https://a:5000/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("localhost:443", "https://localhost/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("localhost.evil:5000", "https://localhost.evil:5000/v2"),
        ] {
            assert_eq!(urls(&find(&config, registry).unwrap()), [format!("{url} own")], "{registry}");
        }
        let own = Config { docker_registry: "http://reg:5000/prefix/".into(), ..Config::default() };
        assert_eq!(urls(&find(&own, "reg:5000").unwrap()), ["http://reg:5000/prefix/v2 own"]);
        assert_eq!(urls(&find(&own, "docker.io").unwrap()), ["https://registry-1.docker.io/v2 own"]);
        assert!(Host::new("ftp://x", false).is_err());
        assert!(Host::new("https://", false).is_err());
    }

    #[test]
    fn directories_are_read_each_time_the_special_before_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let mut config = Config { registry_config_dir: dir.path().to_owned(), ..Config::default() };
        let find = |config: &Config, name: &str| super::find(config, name);
        assert_eq!(urls(&find(&config, "a:5000").unwrap()), ["https://a:5000/v2 own"]);
        put("_default/hosts.toml", "[host.'http://mirror']\ncapabilities = ['pull']\n");
        assert_eq!(urls(&find(&config, "a:5000").unwrap()), ["http://mirror/v2 no-tags", "https://a:5000/v2 own"]);
        put("a:5000/hosts.toml", "server = 'https://b/x'\n[host.'https://z']\n[host.'https://m/path']\noverride_path = true\n");
        assert_eq!(urls(&find(&config, "a:5000").unwrap()), ["https://z/v2", "https://m/path", "https://b/x/v2 own"]);
        put("a_5000_/hosts.toml", "server = 'http://c'\nca = 'ca.pem'\nclient = ['c.pem', 'k.pem']\ndial_timeout = '2s'\n[header]\nX-A = ['1', '2']");
        assert!(find(&config, "a:5000").is_err());
        for name in ["ca.pem", "c.pem", "k.pem"] {
            put(&format!("a_5000_/{name}"), name);
        }
        let hosts = find(&config, "a:5000").unwrap();
        assert_eq!(urls(&hosts), ["http://c/v2 own"]);
        let trust = &hosts[0].trust;
        assert_eq!((trust.ca.as_slice(), trust.identity.as_deref()), ([b"ca.pem".to_vec()].as_slice(), Some(b"c.pem\nk.pem".as_slice())));
        assert_eq!((trust.dial_timeout, hosts[0].headers.get_all("x-a").iter().count()), (Some(Duration::from_secs(2)), 2));
        // Docker's form, and settings before files.
        put("d/x.crt", "authority");
        put("d/x.cert", "cert");
        assert!(find(&config, "d").is_err());
        put("d/x.key", "key");
        assert_eq!(find(&config, "d").unwrap()[0].trust.identity.as_deref(), Some(b"cert\nkey".as_slice()));
        config.registries.insert("a:5000".into(), Registry { mirrors: vec!["http://n/".into()], ..Registry::default() });
        assert_eq!(urls(&find(&config, "a:5000").unwrap()), ["http://n/v2", "https://a:5000/v2 own"]);
        put("e/hosts.toml", "server = 3");
        assert_eq!(find(&config, "e").err().unwrap().kind, Kind::InvalidArgument);
    }
}
