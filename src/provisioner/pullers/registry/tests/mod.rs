//! Registries that misbehave on cue, in this process.

mod auth;
mod images;
mod proxy;
mod redirect;
pub(in crate::provisioner) mod stub;
mod transfer;

use super::*;
use crate::provisioner::config::Registry;
use stub::{Answer, Request, Stub, descriptor, noise};

/// The endpoint of `repository` at `stub`.
async fn endpoint(stub: &Stub, repository: &str, config: &Config, credentials: Option<&Credentials>) -> Endpoint {
    let registries = Registries::new(config);
    endpoint_of(&registries, stub, repository, credentials).await
}

async fn endpoint_of(registries: &Registries, stub: &Stub, repository: &str, credentials: Option<&Credentials>) -> Endpoint {
    registries.endpoint(&format!("{}/{repository}:1", stub.host).parse().unwrap(), credentials).await.unwrap()
}

/// `stub` with `mirrors` before it.
fn mirrored(stub: &Stub, mirrors: &[&Stub]) -> Config {
    let mut config = Config::default();
    let settings = Registry { mirrors: mirrors.iter().map(|m| m.url()).collect(), ..Registry::default() };
    config.registries.insert(stub.host.clone(), settings);
    config
}

/// All bytes that `endpoint` gives for `blob`, and how it ended.
async fn fetch(endpoint: &Endpoint, blob: &Descriptor) -> (Vec<u8>, Result<()>) {
    let (to, mut pieces) = mpsc::channel::<Bytes>(4);
    let collect = async {
        let mut all = Vec::new();
        while let Some(piece) = pieces.recv().await {
            all.extend_from_slice(&piece);
        }
        all
    };
    let (result, all) = tokio::join!(endpoint.blob(blob, to, |_| ()), collect);
    (all, result)
}

fn user(name: &str, password: &str) -> Credentials {
    Credentials { username: name.into(), password: password.into(), ..Credentials::default() }
}

#[tokio::test]
async fn a_failing_server_is_asked_again_and_not_for_ever() {
    let manifest = r#"{"schemaVersion":2}"#;
    for status in [429, 500, 502, 503, 504] {
        let stub = Stub::new(move |r| Some(if r.n < 2 { Answer::status(status) } else { Answer::ok(manifest) }));
        let served = endpoint(&stub, "a", &Config::default(), None).await.manifest("1", None, 1000).await.unwrap();
        assert_eq!((served.bytes.as_ref(), stub.seen("").len()), (manifest.as_bytes(), 3), "{status}");
        let broken = Stub::new(move |_| Some(Answer::status(status)));
        let error = endpoint(&broken, "a", &Config { pull_retries: 1, ..Config::default() }, None).await.manifest("1", None, 1000).await.err().unwrap();
        assert_eq!((error.kind, broken.seen("").len()), (Kind::Unavailable, 2), "{error}");
        assert!(error.to_string().starts_with("RegistryUnavailable: fetch manifest 1 of a from 127.0.0.1"), "{error}");
    }
    // What will be the same next time is not asked again.
    for status in [400, 401, 403, 404, 418, 501] {
        let stub = Stub::new(move |_| Some(Answer::status(status)));
        endpoint(&stub, "a", &Config::default(), None).await.manifest("1", None, 1000).await.err().unwrap();
        assert_eq!(stub.seen("").len(), 1, "{status}");
    }
}

#[tokio::test]
async fn retry_after_is_honoured_or_reported() {
    let stub = Stub::new(|r| Some(if r.n == 0 { Answer::status(429).header("Retry-After", "1") } else { Answer::ok("x") }));
    let began = std::time::Instant::now();
    endpoint(&stub, "a", &Config::default(), None).await.manifest("1", None, 1000).await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1));
    let stub = Stub::new(|_| Some(Answer::error(429, "TOOMANYREQUESTS").header("Retry-After", "3600")));
    let error = endpoint(&stub, "a", &Config::default(), None).await.manifest("1", None, 1000).await.err().unwrap();
    assert_eq!((error.kind, stub.seen("").len()), (Kind::Unavailable, 1));
    assert!(error.to_string().contains("too many requests, try again in 3600 s (429") && error.to_string().contains("TOOMANYREQUESTS: said so"), "{error}");
}

#[tokio::test]
async fn errors_say_what_was_missing() {
    for (status, code, identified, kind, words) in [
        (401, "UNAUTHORIZED", false, Kind::Unauthenticated, "there are none for it"),
        (401, "UNAUTHORIZED", true, Kind::Unauthenticated, "these credentials are refused"),
        (403, "DENIED", false, Kind::PermissionDenied, "not allowed without credentials"),
        (403, "DENIED", true, Kind::PermissionDenied, "not allowed to read it"),
        (404, "MANIFEST_UNKNOWN", false, Kind::NotFound, "no such tag or digest"),
        (404, "NAME_UNKNOWN", false, Kind::NotFound, "no such repository"),
        (404, "", false, Kind::NotFound, "does not have it"),
    ] {
        let stub = Stub::new(move |r| {
            let asks = identified && !r.headers.contains_key("authorization");
            Some(if asks { Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\"") } else { Answer::error(status, code) })
        });
        let credentials = user("u", "hunter2");
        let error = endpoint(&stub, "a/b", &Config::default(), identified.then_some(&credentials)).await.manifest("1", None, 1000).await.err().unwrap();
        let text = error.to_string();
        assert_eq!(error.kind, kind, "{text}");
        assert!(text.contains(&format!("fetch manifest 1 of a/b from {}", stub.host)) && text.contains(words) && !text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn answers_are_bounded() {
    let blob = descriptor(&[b'x'; 2000]);
    let stub = Stub::new(|_| Some(Answer::ok(vec![b'x'; 2000])));
    let endpoint = endpoint(&stub, "a", &Config::default(), None).await;
    assert_eq!(endpoint.manifest("1", None, 1999).await.err().unwrap().kind, Kind::ResourceExhausted);
    assert_eq!(endpoint.small_blob(&blob, 1999).await.unwrap_err().kind, Kind::ResourceExhausted);
    endpoint.small_blob(&blob, 2000).await.unwrap();
    endpoint.manifest("1", None, 2000).await.unwrap();
}

#[tokio::test]
async fn a_mirror_that_lies_fails_or_lacks_is_passed_over() {
    let text = r#"{"schemaVersion":2}"#;
    let digest = descriptor(text.as_bytes()).digest;
    for mirror in [
        Stub::new(|_| Some(Answer::ok("{\"schemaVersion\":3}"))),
        Stub::new(|_| Some(Answer::status(503))),
        Stub::new(|_| Some(Answer::status(404))),
        Stub::new(|_| Some(Answer::ok("{\"schemaVersion\":2}").cut(5))),
    ] {
        let stub = Stub::honest();
        stub.put(&format!("/v2/a/manifests/{digest}"), "x", text.as_bytes());
        let endpoint = endpoint(&stub, "a", &mirrored(&stub, &[&mirror]), None).await;
        let served = endpoint.manifest(digest.as_str(), Some(&digest), 1000).await.unwrap();
        assert_eq!((served.bytes.as_ref(), mirror.seen("").len()), (text.as_bytes(), 1));
        // Whoever answered is asked first from now on.
        endpoint.manifest(digest.as_str(), Some(&digest), 1000).await.unwrap();
        assert_eq!(mirror.seen("").len(), 1);
    }
    // The control: an honest mirror is enough.
    let (mirror, stub) = (Stub::honest(), Stub::honest());
    mirror.put(&format!("/v2/a/manifests/{digest}"), "x", text.as_bytes());
    endpoint(&stub, "a", &mirrored(&stub, &[&mirror]), None).await.manifest(digest.as_str(), Some(&digest), 1000).await.unwrap();
    assert!(stub.seen("").is_empty());
    // When nobody has it, everybody's words are told and the registry's class counts.
    let broken = Stub::new(|_| Some(Answer::status(403)));
    let error = endpoint(&stub, "a", &mirrored(&stub, &[&broken]), None).await.manifest("1", None, 1000).await.err().unwrap();
    assert!(error.kind == Kind::NotFound && error.to_string().contains(&format!("mirror {}: ", broken.host)), "{error}");
}

#[tokio::test]
async fn tags_are_resolved_only_where_that_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let (mirror, stub) = (Stub::honest(), Stub::honest());
    let text = r#"{"schemaVersion":2}"#;
    let digest = descriptor(text.as_bytes()).digest;
    for server in [&mirror, &stub] {
        for name in ["1", digest.as_str()] {
            server.put(&format!("/v2/a/manifests/{name}"), "x", text.as_bytes());
        }
    }
    let blob = mirror.blob("a", b"layer");
    let config = Config { registry_config_dir: dir.path().to_owned(), ..Config::default() };
    let hosts = dir.path().join(&stub.host).join("hosts.toml");
    std::fs::create_dir_all(hosts.parent().unwrap()).unwrap();
    std::fs::write(&hosts, format!("[host.\"{}\"]\ncapabilities = [\"pull\"]\n[host.\"{}\".header]\nX-Mirror = \"yes\"", mirror.url(), mirror.url())).unwrap();
    let registries = Registries::new(&config);
    let one = endpoint_of(&registries, &stub, "a", None).await;
    one.manifest("1", None, 1000).await.unwrap();
    assert_eq!((mirror.seen("").len(), stub.seen("/manifests/1").len()), (0, 1));
    assert_eq!(fetch(&one, &blob).await.0, b"layer");
    assert!(mirror.seen("/blobs/").iter().all(|r| r.has("x-mirror", "yes")) && stub.seen("").iter().all(|r| !r.headers.contains_key("x-mirror")));
    // The file is read at each pull.
    std::fs::write(&hosts, format!("[host.\"{}\"]\n", mirror.url())).unwrap();
    endpoint_of(&registries, &stub, "a", None).await.manifest("1", None, 1000).await.unwrap();
    assert_eq!((mirror.seen("/manifests/1").len(), stub.seen("/manifests/1").len()), (1, 1));
    std::fs::write(&hosts, "capabilities = ['pull']").unwrap();
    let error = endpoint_of(&registries, &stub, "a", None).await.manifest("1", None, 1000).await.err().unwrap();
    assert_eq!(error.kind, Kind::FailedPrecondition, "{error}");
}
