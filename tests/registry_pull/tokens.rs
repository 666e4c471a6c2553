//! A token server that signs what `docker-registry` verifies, over TLS or not, and the pulls that need it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use mesocri::model::Kind;
use mesocri::provisioner::Credentials;
use mesocri::provisioner::config::{Config, Registry as RegistryConfig};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::fixture::{OciLayout, Options, Registry, Store, certificate, user};

/// What came in.
#[derive(Clone, Debug)]
struct Question {
    method: String,
    path: String,
    authorization: Option<String>,
    body: String,
}

struct TokenServer {
    host: String,
    scheme: &'static str,
    dir: tempfile::TempDir,
    seen: Arc<Mutex<Vec<Question>>>,
    ended: Arc<AtomicBool>,
}

impl Drop for TokenServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(&self.host);
    }
}

impl TokenServer {
    /// Gives `user` (by password `secret`, or by the identity token `me`) leave to pull and push everything, the anonymous to
    /// pull `open`. The first `stale` tokens have run out when they are given.
    fn start(tls: bool, stale: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        certificate(&dir.path().join("sign.pem"), &dir.path().join("sign-key.pem"));
        let config = tls.then(|| {
            certificate(&dir.path().join("tls.pem"), &dir.path().join("tls-key.pem"));
            let certs = CertificateDer::pem_file_iter(dir.path().join("tls.pem")).unwrap().map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_file(dir.path().join("tls-key.pem")).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
            Arc::new(builder.with_no_client_auth().with_single_cert(certs, key).unwrap())
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let (seen, ended) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (asked, end, keys) = (seen.clone(), ended.clone(), dir.path().to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if end.load(Ordering::SeqCst) {
                    return;
                }
                let stream = stream.unwrap();
                // One after the other is enough. Clients that do not trust us break off.
                match &config {
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                        serve(rustls::StreamOwned::new(connection, stream), &keys, stale, &asked)
                    }
                    None => serve(stream, &keys, stale, &asked),
                };
            }
        });
        Self { host, scheme: if tls { "https" } else { "http" }, dir, seen, ended }
    }

    fn realm(&self) -> String {
        format!("{}://{}/token", self.scheme, self.host)
    }

    fn options(&self, tls: bool) -> Options<'static> {
        Options { tls, token: Some((self.realm(), self.dir.path().join("sign.pem"))), ..Options::default() }
    }

    fn tls_cert(&self) -> PathBuf {
        self.dir.path().join("tls.pem")
    }

    /// Questions of ours, not of the tool that pushes.
    fn since(&self, n: usize) -> Vec<Question> {
        self.seen.lock().unwrap().get(n..).unwrap_or_default().to_vec()
    }

    fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

fn serve(stream: impl Read + Write, keys: &Path, stale: usize, asked: &Mutex<Vec<Question>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        Some(line.trim_end().to_owned())
    };
    let first = line()?;
    let mut headers = HashMap::new();
    while let Some(header) = line().filter(|l| !l.is_empty()) {
        let (name, value) = header.split_once(": ")?;
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let mut body = vec![0; headers.get("content-length").map_or(0, |n| n.parse().unwrap())];
    reader.read_exact(&mut body).ok()?;
    let mut words = first.split(' ').map(str::to_owned);
    let question = Question { method: words.next()?, path: words.next()?, authorization: headers.remove("authorization"), body: String::from_utf8(body).ok()? };
    let n = {
        let mut asked = asked.lock().unwrap();
        asked.push(question.clone());
        asked.len() - 1
    };
    let form = if question.method == "POST" { question.body.as_str() } else { question.path.split_once('?')?.1 };
    let form: Vec<(String, String)> = reqwest::Url::parse(&format!("x://x/?{form}")).ok()?.query_pairs().into_owned().collect();
    let value = |name: &str| form.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()).unwrap_or_default();
    let answer = match (question.authorization.as_deref(), value("refresh_token").as_str()) {
        (Some("Basic dXNlcjpzZWNyZXQ="), _) | (None, "me") => Some(vec!["pull", "push"]),
        (None, "") => Some(if value("scope").starts_with("repository:open:") { vec!["pull"] } else { vec![] }),
        _ => None,
    };
    let (status, text) = match answer {
        Some(actions) => {
            let token = token(keys, &value("scope"), &actions, n < stale);
            ("200 OK", serde_json::json!({"token": token, "access_token": token, "expires_in": 300}).to_string())
        }
        None => ("401 Unauthorized", r#"{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}"#.to_owned()),
    };
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", text.len());
    let stream = reader.get_mut();
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(text.as_bytes())).and_then(|()| stream.flush()).ok()
}

/// A JSON web token, RS256, with its certificate in it.
fn token(keys: &Path, scope: &str, actions: &[&str], stale: bool) -> String {
    let base64 = &base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let pem = std::fs::read_to_string(keys.join("sign.pem")).unwrap();
    let der: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let expires = if stale { now - 3600 } else { now + 300 };
    let access: Vec<_> = match scope.split(':').collect::<Vec<_>>().as_slice() {
        [kind, name, _] => vec![serde_json::json!({"type": kind, "name": name, "actions": actions})],
        _ => vec![],
    };
    let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
    let claims =
        serde_json::json!({"iss": "tester", "sub": "", "aud": "test", "exp": expires, "nbf": now - 7200, "iat": now - 7200, "jti": "1", "access": access});
    let signed = format!("{}.{}", base64.encode(header.to_string()), base64.encode(claims.to_string()));
    let mut child =
        Command::new("openssl").args(["dgst", "-sha256", "-sign"]).arg(keys.join("sign-key.pem")).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(signed.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    format!("{signed}.{}", base64.encode(out.stdout))
}

#[tokio::test(flavor = "multi_thread")]
async fn by_password_by_identity_token_and_anonymously() {
    let tokens = TokenServer::start(false, 0);
    let registry = Registry::start(&tokens.options(false));
    for name in ["open", "closed"] {
        registry.push(OciLayout::simple(name).path(), &format!("{name}:1"), &["--dest-creds", "user:secret"]);
    }
    let (open, closed) = (format!("{}/open:1", registry.host), format!("{}/closed:1", registry.host));
    let store = Store::new(Config::default()).await;
    let before = tokens.count();
    store.pull(&open, None).await.unwrap();
    // One token does for the manifest, the configuration and the layer.
    assert_eq!(tokens.since(before).len(), 1);
    for (credentials, name) in [(None, &closed), (user("wrong"), &open)] {
        let error = store.pull(name, credentials).await.unwrap_err();
        assert_eq!(error.kind, Kind::Unauthenticated, "{error}");
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
    let before = tokens.count();
    for _ in 0..3 {
        store.pull(&closed, user("secret")).await.unwrap();
    }
    assert_eq!(tokens.since(before).len(), 1);
    let before = tokens.count();
    let identity = |token: &str| Some(Credentials { identity_token: token.into(), ..Credentials::default() });
    store.pull(&closed, identity("me")).await.unwrap();
    let asked = tokens.since(before);
    assert!(asked.len() == 1 && asked[0].method == "POST" && !asked[0].path.contains("me"), "{asked:?}");
    assert_eq!(store.pull(&closed, identity("not me")).await.unwrap_err().kind, Kind::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_the_registry_finds_too_old_is_replaced() {
    let tokens = TokenServer::start(false, 1);
    let registry = Registry::start(&tokens.options(false));
    let store = Store::new(Config::default()).await;
    // Nothing was pushed: what is asked for is not there, which only a good token finds out.
    let error = store.pull(&format!("{}/open:1", registry.host), None).await.unwrap_err();
    assert_eq!((error.kind, tokens.count()), (Kind::NotFound, 2), "{error}");
    assert!(error.to_string().contains("MANIFEST_UNKNOWN") || error.to_string().contains("NAME_UNKNOWN"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_and_never_from_tls_to_plain() {
    let tokens = TokenServer::start(true, 0);
    let registry = Registry::start(&tokens.options(true));
    let name = format!("{}/open:1", registry.host);
    let with = |ca: Vec<PathBuf>| {
        let mut config = Config { pull_retries: 0, ..Config::default() };
        config.registries.insert(registry.host.clone(), RegistryConfig { ca_files: ca, ..RegistryConfig::default() });
        Store::new(config)
    };
    registry.push(OciLayout::simple("open").path(), "open:1", &["--dest-creds", "user:secret"]);
    with(vec![registry.cert(), tokens.tls_cert()]).await.pull(&name, user("secret")).await.unwrap();
    // A token server whose certificate nobody vouches for gets no password.
    let before = tokens.count();
    let error = with(vec![registry.cert()]).await.pull(&name, user("secret")).await.unwrap_err();
    assert_eq!((error.kind, tokens.count()), (Kind::Unavailable, before), "{error}");
    let plain = TokenServer::start(false, 0);
    let careless = Registry::start(&plain.options(true));
    let mut config = Config::default();
    config.registries.insert(careless.host.clone(), RegistryConfig { ca_files: vec![careless.cert()], ..RegistryConfig::default() });
    let error = Store::new(config).await.pull(&format!("{}/open:1", careless.host), user("secret")).await.unwrap_err();
    assert_eq!((error.kind, plain.count()), (Kind::Unauthenticated, 0), "{error}");
}
