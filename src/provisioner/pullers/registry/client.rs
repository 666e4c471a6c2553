//! HTTP clients, one for each way to trust and to be trusted, made when first needed and shared by all pulls.
//!
//! Clients follow no redirects: that is done in [`super::exchange`], where it is known what may go along.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::{Client, Url};

use crate::model::error::{Error, Kind, Result};
use crate::provisioner::config::Proxy;

/// Time to connect to one address of a registry.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Idle connections are closed after this, so that an idle daemon holds none.
const IDLE: Duration = Duration::from_secs(10);
/// Clients kept. Settings change rarely; certificates that are renewed leave their old client behind.
const MAX_CLIENTS: usize = 32;

/// Whom to trust and as whom to come: with the kind of target, all that a connection depends on.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Trust {
    /// Further authorities, PEM.
    pub ca: Vec<Vec<u8>>,
    /// Our certificate and key, PEM.
    pub identity: Option<Vec<u8>>,
    /// Take any certificate.
    pub skip_verify: bool,
    /// Time to connect, if not the usual.
    pub dial_timeout: Option<Duration>,
}

impl Trust {
    /// The same towards another host, to which the first one sent us: it must be as trustworthy, but does not get to see our
    /// certificate. `skip_verify` stays: whoever could be in between decides about the target anyway.
    pub fn elsewhere(&self) -> Self {
        Self { identity: None, ..self.clone() }
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    trust: Trust,
    /// On this machine: no proxy.
    local: bool,
    /// Without TLS: reading the system's authorities costs milliseconds and is of no use.
    plain: bool,
}

/// All clients.
pub struct Clients {
    proxy: Proxy,
    made: Mutex<HashMap<Key, Client>>,
}

impl Clients {
    /// With these proxies. Installs the process's TLS provider.
    pub fn new(proxy: &Proxy) -> Self {
        // Fails if one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { proxy: proxy.clone(), made: Mutex::default() }
    }

    /// The client for `url`.
    ///
    /// # Errors
    /// `InvalidArgument` for certificates or proxies that cannot be read.
    pub fn get(&self, trust: &Trust, url: &Url) -> Result<Client> {
        let key = Key { trust: trust.clone(), local: is_local(url), plain: url.scheme() == "http" };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&key) {
            return Ok(client.clone());
        }
        let client = self.make(&key)?;
        if made.len() >= MAX_CLIENTS {
            made.clear();
        }
        made.insert(key, client.clone());
        Ok(client)
    }

    fn make(&self, key: &Key) -> Result<Client> {
        let trust = &key.trust;
        let mut builder = Client::builder()
            .user_agent(concat!("mesocri/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(trust.dial_timeout.unwrap_or(CONNECT_TIMEOUT))
            .pool_idle_timeout(IDLE)
            .redirect(reqwest::redirect::Policy::none())
            .tls_danger_accept_invalid_certs(trust.skip_verify);
        if key.plain {
            builder = builder.tls_certs_only([]);
        } else {
            for pem in &trust.ca {
                let certificates = reqwest::Certificate::from_pem_bundle(pem)
                    .map_err(|e| Error::with(Kind::InvalidArgument, "read certificates of registry authorities", e))?;
                if certificates.is_empty() {
                    return Err(Error::invalid("read certificates of registry authorities: no PEM certificate in the file"));
                }
                builder = builder.tls_certs_merge(certificates);
            }
            if let Some(pem) = &trust.identity {
                let identity = reqwest::Identity::from_pem(pem).map_err(|e| Error::with(Kind::InvalidArgument, "read client certificate and key", e))?;
                builder = builder.identity(identity);
            }
        }
        if key.local {
            builder = builder.no_proxy();
        } else if !self.proxy.is_empty() {
            for proxy in proxies(&self.proxy)? {
                builder = builder.proxy(proxy);
            }
        }
        builder.build().map_err(|e| Error::with(Kind::InvalidArgument, "make HTTP client", e))
    }
}

/// What the settings say; the environment is left aside once they say anything.
fn proxies(settings: &Proxy) -> Result<Vec<reqwest::Proxy>> {
    // The URL may hold a password: the error does not show it.
    let bad = |_| Error::invalid("read proxy settings: not the URL of a proxy");
    let mut proxies = Vec::new();
    if !settings.http.0.is_empty() {
        proxies.push(reqwest::Proxy::http(&settings.http.0).map_err(bad)?);
    }
    if !settings.https.0.is_empty() {
        proxies.push(reqwest::Proxy::https(&settings.https.0).map_err(bad)?);
    }
    Ok(proxies.into_iter().map(|p| p.no_proxy(reqwest::NoProxy::from_string(&settings.no_proxy))).collect())
}

/// Whether `host[:port]` is this machine.
pub fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// The same for a URL.
fn is_local(url: &Url) -> bool {
    url.host_str().is_some_and(is_loopback)
}

/// Whether a server may send us from `from` to `to`: never from https to http, and never from outside to this machine or to
/// link-local addresses, where clouds keep their credentials. Names that resolve to such addresses are not seen here; what is
/// fetched from them is neither shown nor, its digest being wrong, kept.
///
/// # Errors
/// `PermissionDenied` says why not.
pub fn may_send(from: &Url, to: &Url) -> Result<()> {
    let denied =
        |why: &str| Err(Error::new(Kind::PermissionDenied, format!("follow {} to {}: {why}", super::hosts::authority(from), super::hosts::authority(to))));
    if !matches!(to.scheme(), "http" | "https") {
        return denied("it is neither http nor https");
    }
    if from.scheme() == "https" && to.scheme() != "https" {
        return denied("it leads from https to http");
    }
    if is_local(from) || from.host() == to.host() {
        return Ok(());
    }
    let link_local = to.host_str().is_some_and(|host| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        bare.parse::<std::net::IpAddr>().is_ok_and(|ip| match ip.to_canonical() {
            std::net::IpAddr::V4(ip) => ip.is_link_local() || ip.is_unspecified(),
            std::net::IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_unspecified(),
        })
    });
    if is_local(to) || link_local { denied("it leads to an address of this machine or its link") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts() {
        for (host, is) in [
            ("localhost:5000", true),
            ("127.0.0.1:1", true),
            ("127.9.9.9", true),
            ("[::1]:5000", true),
            ("[::ffff:127.0.0.1]", true),
            ("localhost.evil", false),
            ("10.0.0.1", false),
        ] {
            assert_eq!(is_loopback(host), is, "{host}");
        }
    }

    #[test]
    fn servers_cannot_send_us_everywhere() {
        let url = |s: &str| Url::parse(s).unwrap();
        for (from, to, may) in [
            ("https://a/x", "https://b/y", true),
            ("http://a/x", "https://b/y", true),
            ("http://a/x", "http://b/y", true),
            ("https://a/x", "http://b/y", false),
            ("https://a/x", "http://a/y", false),
            ("http://a/x", "file:///etc/shadow", false),
            ("http://a/x", "ftp://b/", false),
            ("http://a/x", "http://127.0.0.1/y", false),
            ("http://a/x", "http://localhost:8080/y", false),
            ("http://a/x", "http://[::1]/y", false),
            ("http://a/x", "http://[::ffff:127.0.0.1]/y", false),
            ("http://a/x", "http://169.254.169.254/latest/meta-data", false),
            ("http://a/x", "http://[fe80::1]/y", false),
            ("http://a/x", "http://0.0.0.0/y", false),
            ("http://127.0.0.1:5000/x", "http://127.0.0.1:6000/y", true),
            ("http://127.0.0.1:5000/x", "https://storage/y", true),
            ("http://169.254.1.1/x", "http://169.254.1.1/y", true),
        ] {
            assert_eq!(may_send(&url(from), &url(to)).is_ok(), may, "{from} -> {to}");
        }
    }

    #[test]
    fn one_client_for_one_way_to_trust() {
        let clients = Clients::new(&Proxy::default());
        let url = Url::parse("http://127.0.0.1:1").unwrap();
        for n in 0..2 * MAX_CLIENTS {
            clients.get(&Trust { dial_timeout: Some(Duration::from_secs(1 + n as u64 / 2)), ..Trust::default() }, &url).unwrap();
        }
        assert!(clients.made.lock().unwrap().len() <= MAX_CLIENTS);
        let https = Url::parse("https://127.0.0.1:1").unwrap();
        let bad = [Trust { ca: vec![b"nonsense".to_vec()], ..Trust::default() }, Trust { identity: Some(b"nonsense".to_vec()), ..Trust::default() }];
        for trust in &bad {
            assert_eq!(clients.get(trust, &https).unwrap_err().kind, Kind::InvalidArgument);
        }
        let secret = Clients::new(&Proxy { http: "http://u:hunter2@ /".into(), ..Proxy::default() });
        let error = secret.get(&Trust::default(), &Url::parse("http://elsewhere").unwrap()).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
