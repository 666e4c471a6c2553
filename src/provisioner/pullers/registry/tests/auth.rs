//! Challenges, tokens that run out, token servers of every age, and where credentials come from.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::*;
use crate::provisioner::config::Secret;

const MANIFEST: &str = r#"{"schemaVersion":2}"#;

/// A registry whose token server answers `token`; the tokens good for the registry are those that `good` takes.
fn guarded(token: impl Fn(&Request) -> Answer + Send + Sync + 'static, good: impl Fn(&Request, &str) -> bool + Send + Sync + 'static) -> Stub {
    let host = Arc::new(OnceLock::<String>::new());
    let own = host.clone();
    let stub = Stub::new(move |r| {
        if r.path.starts_with("/token") {
            return Some(token(r));
        }
        let bearer = r.headers.get("authorization").and_then(|a| a.strip_prefix("Bearer "));
        if bearer.is_some_and(|b| good(r, b)) {
            return None;
        }
        let challenge = format!("Bearer realm=\"http://{}/token?x=1\",service=\"a service\",scope=\"repository:a:pull\"", own.get().unwrap());
        Some(Answer::error(401, "UNAUTHORIZED").header("WWW-Authenticate", challenge))
    });
    host.set(stub.host.clone()).unwrap();
    stub.put("/v2/a/manifests/1", "x", MANIFEST.as_bytes());
    stub
}

async fn manifest(endpoint: &Endpoint) -> Result<Served> {
    endpoint.manifest("1", None, 1000).await
}

#[tokio::test]
async fn a_token_is_shared_by_pulls_and_got_anew_when_it_is_refused() {
    let issued = Arc::new(AtomicUsize::new(0));
    let (counter, newest) = (issued.clone(), issued.clone());
    // Only the newest token is good, and the third manifest makes all old ones bad.
    let revoked = Arc::new(AtomicUsize::new(0));
    let least = revoked.clone();
    let stub = guarded(
        move |_| Answer::ok(format!(r#"{{"token":"t{}","expires_in":300}}"#, counter.fetch_add(1, Ordering::SeqCst) + 1)),
        move |_, bearer| bearer[1..].parse::<usize>().unwrap() > least.load(Ordering::SeqCst),
    );
    let bytes = noise(100_000);
    let blob = stub.blob("a", &bytes);
    let registries = Registries::new(&Config::default());
    let one = endpoint_of(&registries, &stub, "a", None).await;
    manifest(&one).await.unwrap();
    assert_eq!(newest.load(Ordering::SeqCst), 1);
    // In one pull the token goes with every request at once; another pull asks the registry, not the token server.
    manifest(&one).await.unwrap();
    let two = endpoint_of(&registries, &stub, "a", None).await;
    manifest(&two).await.unwrap();
    assert_eq!((newest.load(Ordering::SeqCst), stub.seen("/manifests").len()), (1, 5));
    // The token is revoked in the middle of two pulls; many layers notice, one token is fetched.
    revoked.store(1, Ordering::SeqCst);
    let all = futures_util::future::join_all((0..10).map(|n| fetch(if n % 2 == 0 { &one } else { &two }, &blob))).await;
    assert!(all.iter().all(|(got, result)| result.is_ok() && *got == bytes));
    assert_eq!(newest.load(Ordering::SeqCst), 2);
    // Another user is somebody else.
    manifest(&endpoint_of(&registries, &stub, "a", Some(&user("u", "p"))).await).await.unwrap();
    assert_eq!(newest.load(Ordering::SeqCst), 3);
    let asked = &stub.seen("/token");
    assert!(asked[0].path.contains("x=1") && asked[0].path.contains("scope=repository%3Aa%3Apull") && asked[0].path.contains("service=a+service"));
    assert_eq!(asked.iter().map(|r| r.headers.contains_key("authorization")).collect::<Vec<_>>(), [false, false, true]);
}

#[tokio::test]
async fn a_token_that_runs_out_in_the_middle_of_a_layer() {
    let issued = Arc::new(AtomicUsize::new(0));
    let counter = issued.clone();
    let bytes = noise(300_000);
    let body = bytes.clone();
    let stub = guarded(
        move |_| Answer::ok(format!(r#"{{"access_token":"t{}","expires_in":300}}"#, counter.fetch_add(1, Ordering::SeqCst))),
        // The first token is good for the beginning of the layer only.
        |r, bearer| bearer == "t1" || r.from().is_none(),
    );
    let blob = descriptor(&bytes);
    // Half of it, then the connection breaks.
    stub.blob("a", &bytes);
    let broken = Stub::new(move |_| Some(Answer::ok(&body[..]).cut(100_000)));
    let endpoint = endpoint(&stub, "a", &mirrored(&stub, &[&broken]), None).await;
    let (got, result) = fetch(&endpoint, &blob).await;
    result.unwrap();
    assert!(got == bytes);
    assert_eq!(issued.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn identity_tokens_by_post_and_where_that_is_unknown_by_get() {
    let good = |_: &Request, bearer: &str| bearer == "t";
    let identity = Credentials { username: "u".into(), identity_token: "the id&token".into(), ..Credentials::default() };
    for status in [200, 404, 405] {
        let stub = guarded(
            move |r| match r.method.as_str() {
                "POST" if status == 200 => Answer::ok(r#"{"access_token":"t"}"#),
                "POST" => Answer::status(status),
                _ => Answer::ok(r#"{"token":"t"}"#),
            },
            good,
        );
        manifest(&endpoint(&stub, "a", &Config::default(), Some(&identity)).await).await.unwrap();
        let asked = stub.seen("/token");
        assert_eq!(asked.len(), if status == 200 { 1 } else { 2 });
        assert!(asked[0].has("content-type", "application/x-www-form-urlencoded") && !asked[0].path.contains("token=") && !asked[0].path.contains("scope"));
        for part in ["grant_type=refresh_token", "refresh_token=the+id%26token", "service=a+service", "scope=repository%3Aa%3Apull", "client_id=mesocri"] {
            assert!(asked[0].body.contains(part), "{}", asked[0].body);
        }
        if let Some(fallback) = asked.get(1) {
            // "u:the id&token"
            assert!(fallback.method == "GET" && fallback.has("authorization", "Basic dTp0aGUgaWQmdG9rZW4="), "{fallback:?}");
        }
    }
    // A refusal is one, and is not tried in another way.
    let stub = guarded(|_| Answer { body: br#"{"error":"invalid_grant"}"#.to_vec(), send: 25, ..Answer::status(400) }, good);
    let error = manifest(&endpoint(&stub, "a", &Config::default(), Some(&identity)).await).await.err().unwrap();
    assert_eq!((error.kind, stub.seen("/token").len()), (Kind::Unauthenticated, 1));
    assert!(error.to_string().contains("for a token: it refuses these credentials (400 Bad Request, invalid_grant)"), "{error}");
}

#[tokio::test]
async fn token_servers_that_fail_lie_or_go_on_for_ever() {
    for (answer, kind) in [
        (Answer::status(401), Kind::Unauthenticated),
        (Answer::status(403), Kind::Unauthenticated),
        (Answer::status(404), Kind::Unauthenticated),
        (Answer::status(500), Kind::Unavailable),
        (Answer::ok("{}"), Kind::Unauthenticated),
        (Answer::ok(r#"{"token":"bad"}"#), Kind::Unauthenticated),
        (Answer::ok("{\"token\":\"a\\nb\"}"), Kind::Unauthenticated),
        (Answer::ok(r#"["hunter2"]"#), Kind::Unauthenticated),
        (Answer::ok(vec![b' '; 2 << 20]), Kind::ResourceExhausted),
    ] {
        let said = answer.clone();
        let stub = guarded(move |_| said.clone(), |_, bearer| bearer == "good");
        let config = Config { pull_retries: 0, ..Config::default() };
        let error = manifest(&endpoint(&stub, "a", &config, None).await).await.err().unwrap();
        assert_eq!(error.kind, kind, "{} {error}", answer.status);
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
    // One that fails for a moment is asked again.
    let stub = guarded(|r| if r.n < 2 { Answer::status(503) } else { Answer::ok(r#"{"token":"good"}"#) }, |_, bearer| bearer == "good");
    manifest(&endpoint(&stub, "a", &Config::default(), None).await).await.unwrap();
}

#[tokio::test]
async fn credentials_from_the_request_the_document_and_a_helper() {
    let dir = tempfile::tempdir().unwrap();
    let helper = dir.path().join("docker-credential-test");
    std::fs::write(&helper, "#!/bin/sh\nread server; echo \"$server\" >> \"$(dirname \"$0\")/ran\"; echo '{\"Username\":\"helped\",\"Secret\":\"p\"}'\n")
        .unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let asks = |r: &Request| (!r.headers.contains_key("authorization")).then(|| Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""));
    let stub = Stub::new(asks);
    let open = Stub::honest();
    for server in [&stub, &open] {
        server.put("/v2/a/manifests/1", "x", MANIFEST.as_bytes());
    }
    let config = |text: String| Config { docker_config: Secret(text), credential_helper_dirs: vec![dir.path().to_owned()], ..Config::default() };
    let basic = |name: &str| format!("Basic {}", base64::Engine::encode(&base64::engine::general_purpose::STANDARD, name));
    let last = || stub.seen("").last().unwrap().headers.get("authorization").cloned().unwrap();

    let inline = format!(r#"{{"auths":{{"{}":{{"username":"inline","password":"p"}}}}}}"#, stub.host);
    manifest(&endpoint(&stub, "a", &config(inline.clone()), None).await).await.unwrap();
    assert_eq!(last(), basic("inline:p"));
    manifest(&endpoint(&stub, "a", &config(inline), Some(&user("request", "p"))).await).await.unwrap();
    assert_eq!(last(), basic("request:p"));
    // A path is read at each pull.
    let path = dir.path().join("dockercfg");
    let registries = Registries::new(&config(path.display().to_string()));
    for name in ["first", "second"] {
        std::fs::write(&path, format!(r#"{{"{}":{{"username":"{name}","password":"p"}}}}"#, stub.host)).unwrap();
        manifest(&endpoint_of(&registries, &stub, "a", None).await).await.unwrap();
        assert_eq!(last(), basic(&format!("{name}:p")));
    }
    // A helper runs when a registry asks, and only then.
    let helped = config(format!(r#"{{"credHelpers":{{"{}":"test","{}":"test"}}}}"#, stub.host, open.host));
    manifest(&endpoint(&open, "a", &helped, None).await).await.unwrap();
    assert!(!dir.path().join("ran").exists());
    manifest(&endpoint(&stub, "a", &helped, None).await).await.unwrap();
    assert_eq!((last(), std::fs::read_to_string(dir.path().join("ran")).unwrap()), (basic("helped:p"), format!("{}\n", stub.host)));
    let missing = config(r#"{"credsStore":"nowhere"}"#.to_owned());
    let error = manifest(&endpoint(&stub, "a", &missing, None).await).await.err().unwrap();
    assert!(error.kind == Kind::FailedPrecondition && error.to_string().contains("docker-credential-nowhere"), "{error}");
}

#[tokio::test]
async fn mirrors_get_what_is_meant_for_them() {
    let asks = |r: &Request| (!r.headers.contains_key("authorization")).then(|| Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""));
    let (mirror, stub) = (Stub::new(asks), Stub::new(asks));
    stub.put("/v2/a/manifests/1", "x", MANIFEST.as_bytes());
    let mut config = mirrored(&stub, &[&mirror]);
    let request = user("u", "p");
    manifest(&endpoint(&stub, "a", &config, Some(&request)).await).await.unwrap();
    assert!(mirror.seen("").iter().all(|r| !r.headers.contains_key("authorization")));
    assert!(stub.seen("").iter().any(|r| r.has("authorization", "Basic dTpw")));
    // The control: credentials of its own it does get.
    config.docker_config = Secret(format!(r#"{{"auths":{{"{}":{{"username":"m","password":"p"}}}}}}"#, mirror.host));
    manifest(&endpoint(&stub, "a", &config, Some(&request)).await).await.unwrap();
    assert!(mirror.seen("").iter().any(|r| r.has("authorization", "Basic bTpw")));
    assert!(mirror.seen("").iter().all(|r| !r.has("authorization", "Basic dTpw")));
}
