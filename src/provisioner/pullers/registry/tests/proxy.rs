//! Proxies, by settings and by the environment.

use super::*;
use crate::provisioner::config::Proxy;

const MANIFEST: &str = r#"{"schemaVersion":2}"#;

/// Answers whatever it is asked for, as a proxy does.
fn proxy() -> Stub {
    Stub::new(|r| Some(if r.method == "CONNECT" { Answer::status(502) } else { Answer::ok(MANIFEST) }))
}

/// Registries that speak HTTP and are not there, except through a proxy.
fn config(hosts: &[&str]) -> Config {
    let mut config = Config { pull_retries: 0, stall_timeout_seconds: 2, ..Config::default() };
    for host in hosts {
        config.registries.insert((*host).to_owned(), Registry { plain_http: !host.starts_with("tls"), ..Registry::default() });
    }
    config
}

async fn manifest(config: &Config, host: &str) -> Result<Served> {
    let endpoint = Registries::new(config).endpoint(&format!("{host}/a:1").parse().unwrap(), None).await.unwrap();
    endpoint.manifest("1", None, 1000).await
}

#[tokio::test]
async fn by_settings_with_exceptions() {
    let (proxy, direct) = (proxy(), proxy());
    let hosts = ["registry.invalid", "sub.direct.invalid", "192.0.2.7:5000", "198.51.100.7:5000", "tls.invalid"];
    let mut config = config(&hosts);
    config.proxy = Proxy {
        http: format!("http://pu:pp@{}", proxy.host).as_str().into(),
        https: proxy.url().as_str().into(),
        no_proxy: "direct.invalid, 192.0.2.0/24".into(),
    };
    manifest(&config, "registry.invalid").await.unwrap();
    let asked = proxy.seen("http://registry.invalid/v2/a/manifests/1");
    assert!(asked.len() == 1 && asked[0].has("proxy-authorization", "Basic cHU6cHA="));
    manifest(&config, "198.51.100.7:5000").await.unwrap();
    // TLS goes through a tunnel; this proxy has none to give.
    assert_eq!(manifest(&config, "tls.invalid").await.err().unwrap().kind, Kind::Unavailable);
    assert_eq!(proxy.seen("tls.invalid:443").first().map(|r| r.method.clone()).as_deref(), Some("CONNECT"));
    // Names below an exception, and addresses in a network, are tried directly, in vain.
    for host in ["sub.direct.invalid", "192.0.2.7:5000"] {
        assert_eq!(manifest(&config, host).await.err().unwrap().kind, Kind::Unavailable, "{host}");
        assert!(proxy.seen(host).is_empty());
    }
    // This machine is never asked through a proxy.
    manifest(&config, &direct.host).await.unwrap();
    assert!(proxy.seen(&direct.host).is_empty() && direct.seen("").len() == 1);
}

/// Runs in a process of its own, with the environment set; does nothing in any other.
#[tokio::test]
async fn child_of_the_next_test() {
    if std::env::var("MESOCRI_TEST_PROXY").is_err() {
        return;
    }
    let config = config(&["registry.invalid", "direct.invalid"]);
    manifest(&config, "registry.invalid").await.unwrap();
    assert_eq!(manifest(&config, "direct.invalid").await.err().unwrap().kind, Kind::Unavailable);
    // Settings take the place of the environment.
    let mut other = config.clone();
    other.proxy.https = "http://127.0.0.1:1".into();
    assert_eq!(manifest(&other, "registry.invalid").await.err().unwrap().kind, Kind::Unavailable);
}

#[test]
fn by_the_environment() {
    let proxy = proxy();
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "provisioner::pullers::registry::tests::proxy::child_of_the_next_test", "--nocapture"])
        .env("MESOCRI_TEST_PROXY", "1")
        .env("HTTP_PROXY", proxy.url())
        .env("NO_PROXY", "direct.invalid,10.0.0.0/8")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(proxy.seen("registry.invalid").len(), 1);
    assert!(proxy.seen("direct.invalid").is_empty());
}
