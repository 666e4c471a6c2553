//! Redirects: what goes along and what does not, and where they may not lead.

use super::*;

fn secret_headers(request: &Request) -> Vec<&str> {
    ["authorization", "x-secret", "cookie"].into_iter().filter(|h| request.headers.contains_key(*h)).collect()
}

#[tokio::test]
async fn secrets_do_not_follow_and_strangers_are_not_answered() {
    // The thief demands credentials, in both ways.
    for challenge in ["Basic realm=\"x\"", "Bearer realm=\"http://THIEF/token\",service=\"s\""] {
        let bytes = noise(10_000);
        let blob = descriptor(&bytes);
        for demands in [true, false] {
            let thief = {
                let (challenge, body) = (challenge.to_owned(), bytes.clone());
                Stub::new(move |r| {
                    let host = r.headers.get("host").cloned().unwrap_or_default();
                    Some(if demands { Answer::status(401).header("WWW-Authenticate", challenge.replace("THIEF", &host)) } else { Answer::part(r, &body) })
                })
            };
            let target = thief.url();
            let stub = Stub::new(move |r| {
                Some(if r.headers.contains_key("authorization") {
                    Answer::status(307).header("Location", format!("{target}{}?signature=abc", r.path))
                } else {
                    Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\"")
                })
            });
            let dir = tempfile::tempdir().unwrap();
            let hosts = dir.path().join(&stub.host).join("hosts.toml");
            std::fs::create_dir_all(hosts.parent().unwrap()).unwrap();
            std::fs::write(&hosts, "[header]\nX-Secret = \"s\"\nCookie = \"c\"").unwrap();
            let config = Config { registry_config_dir: dir.path().to_owned(), ..Config::default() };
            let (got, result) = fetch(&endpoint(&stub, "a", &config, Some(&user("u", "p"))).await, &blob).await;
            assert!(!thief.seen("").is_empty() && thief.seen("").iter().all(|r| secret_headers(r).is_empty()), "{:?}", thief.seen(""));
            assert!(thief.seen("/token").is_empty());
            if demands {
                let error = result.unwrap_err();
                assert!(error.kind == Kind::Unauthenticated && !error.to_string().contains("signature"), "{error}");
            } else {
                result.unwrap();
                assert_eq!(got, bytes);
            }
            // The control: the registry itself got them all.
            assert!(stub.seen("").iter().any(|r| secret_headers(r).len() == 3));
        }
    }
}

#[tokio::test]
async fn a_way_back_is_not_trusted() {
    // The registry sends us away, the stranger sends us back: what it makes us ask there is asked without credentials.
    let stub = std::sync::Arc::new(std::sync::OnceLock::<String>::new());
    let home = stub.clone();
    let stranger = Stub::new(move |_| Some(Answer::status(302).header("Location", format!("http://{}/v2/a/private", home.get().unwrap()))));
    let away = stranger.url();
    let registry = Stub::new(move |r| {
        Some(match (r.headers.contains_key("authorization"), r.path.ends_with("/private")) {
            (true, true) => Answer::ok("{}"),
            (true, false) => Answer::status(302).header("Location", away.clone()),
            (false, _) => Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""),
        })
    });
    stub.set(registry.host.clone()).unwrap();
    let error = endpoint(&registry, "a", &Config::default(), Some(&user("u", "p"))).await.manifest("1", None, 1000).await.err().unwrap();
    assert_eq!(error.kind, Kind::Unauthenticated, "{error}");
    assert!(registry.seen("/private").iter().all(|r| secret_headers(r).is_empty()) && !registry.seen("/private").is_empty());
}

#[tokio::test]
async fn within_the_registry_they_are_followed_with_credentials() {
    let stub = Stub::new(|r| {
        if !r.headers.contains_key("authorization") {
            return Some(Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""));
        }
        Some(if r.path.starts_with("/elsewhere") { Answer::ok("{}") } else { Answer::status(308).header("Location", "/elsewhere") })
    });
    endpoint(&stub, "a", &Config::default(), Some(&user("u", "p"))).await.manifest("1", None, 1000).await.unwrap();
    assert!(stub.seen("/elsewhere").iter().all(|r| r.headers.contains_key("authorization")));
}

#[tokio::test]
async fn loops_dead_ends_and_other_protocols() {
    for (location, kind) in [
        (Some("/again"), Kind::PermissionDenied),
        (Some("file:///etc/passwd"), Kind::PermissionDenied),
        (Some("http://["), Kind::PermissionDenied),
        (None, Kind::PermissionDenied),
    ] {
        let stub = Stub::new(move |_| Some(location.into_iter().fold(Answer::status(302), |a, l| a.header("Location", l))));
        let error = endpoint(&stub, "a", &Config::default(), None).await.manifest("1", None, 1000).await.err().unwrap();
        assert_eq!(error.kind, kind, "{error}");
        assert!(stub.seen("").len() <= 6);
    }
    let gone = Stub::new(|_| Some(Answer::status(302).header("Location", "http://127.0.0.1:1/x?signature=abc")));
    let error = endpoint(&gone, "a", &Config { pull_retries: 0, ..Config::default() }, None).await.manifest("1", None, 1000).await.err().unwrap();
    assert!(error.kind == Kind::Unavailable && error.to_string().contains("sent on to 127.0.0.1:1") && !error.to_string().contains("signature"), "{error}");
}

#[tokio::test]
async fn secrets_in_a_body_are_not_sent_on() {
    let thief = Stub::honest();
    let target = thief.url();
    let host = std::sync::Arc::new(std::sync::OnceLock::<String>::new());
    let own = host.clone();
    let stub = Stub::new(move |r| {
        Some(if r.path.starts_with("/token") {
            Answer::status(307).header("Location", target.clone())
        } else {
            Answer::status(401).header("WWW-Authenticate", format!("Bearer realm=\"http://{}/token\"", own.get().unwrap()))
        })
    });
    host.set(stub.host.clone()).unwrap();
    let identity = Credentials { identity_token: "i".into(), ..Credentials::default() };
    let error = endpoint(&stub, "a", &Config::default(), Some(&identity)).await.manifest("1", None, 1000).await.err().unwrap();
    assert_eq!((error.kind, thief.seen("").len()), (Kind::PermissionDenied, 0), "{error}");
}
