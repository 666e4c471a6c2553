//! Pulls from a registry that misbehaves on cue, sharing, cancelling, recovery, imports.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use super::*;
use crate::model::Reference;
use crate::provisioner::Credentials;
use crate::provisioner::config::Limits;
use crate::provisioner::unpack::Hasher;

/// One request as it came.
#[derive(Clone, Debug, Default)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

/// What to answer: status, headers, body, and how much of the body is really sent.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    send: usize,
    /// After `send` bytes the connection stays open and silent until the stub goes.
    hang: bool,
}

impl Answer {
    fn ok(body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { status: 200, headers: vec![], send: body.len(), body, hang: false }
    }

    fn status(status: u16) -> Self {
        Self { status, ..Self::ok("") }
    }

    fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

type Handler = dyn Fn(&Request) -> Option<Answer> + Send + Sync;

/// A registry in this process: serves `files` by path unless `handler` answers first.
struct Stub {
    host: String,
    shared: Arc<Shared>,
}

struct Shared {
    files: Mutex<HashMap<String, (String, Vec<u8>)>>,
    handler: Box<Handler>,
    seen: Mutex<Vec<Request>>,
    arrived: Notify,
    ended: AtomicBool,
    hung: Mutex<Vec<TcpStream>>,
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.hung.lock().unwrap().clear();
        // Wakes the accepting thread.
        let _ = TcpStream::connect(&self.host);
    }
}

impl Stub {
    fn new(handler: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            files: Mutex::default(),
            handler: Box::new(handler),
            seen: Mutex::default(),
            arrived: Notify::new(),
            ended: AtomicBool::new(false),
            hung: Mutex::default(),
        });
        let server = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if server.ended.load(Ordering::SeqCst) {
                    return;
                }
                let server = server.clone();
                std::thread::spawn(move || server.serve(stream.unwrap()));
            }
        });
        Self { host, shared }
    }

    fn honest() -> Self {
        Self::new(|_| None)
    }

    fn blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Hasher::of(bytes, None).unwrap();
        let path = format!("/v2/{repository}/blobs/{digest}");
        self.shared.files.lock().unwrap().insert(path, ("application/octet-stream".into(), bytes.to_vec()));
        digest
    }

    /// An image of one plain layer for each file name; returns its reference and the blobs of its layers.
    fn image(&self, repository: &str, files: &[&str]) -> (Reference, Vec<Digest>) {
        let tars: Vec<Vec<u8>> = files.iter().map(|f| layer(f)).collect();
        let blobs: Vec<Digest> = tars.iter().map(|t| self.blob(repository, t)).collect();
        let config = config(&blobs, repository);
        let config_digest = self.blob(repository, config.as_bytes());
        let layers: Vec<_> = blobs.iter().zip(&tars).map(|(d, t)| serde_json::json!({"mediaType": "x", "digest": d.as_str(), "size": t.len()})).collect();
        let media_type = super::super::pullers::manifest::OCI_MANIFEST;
        let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "layers": layers,
            "config": {"mediaType": "x", "digest": config_digest.as_str(), "size": config.len()}})
        .to_string();
        let path = format!("/v2/{repository}/manifests/1");
        self.shared.files.lock().unwrap().insert(path, (media_type.into(), manifest.into_bytes()));
        (format!("{}/{repository}:1", self.host).parse().unwrap(), blobs)
    }

    fn seen(&self, part: &str) -> Vec<Request> {
        self.shared.seen.lock().unwrap().iter().filter(|r| r.path.contains(part)).cloned().collect()
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut lines = std::iter::from_fn(|| {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
            Some(line.trim_end().to_owned()).filter(|l| !l.is_empty())
        });
        let Some(first) = lines.next() else { return };
        let headers = lines.filter_map(|l| l.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned()))).collect();
        let request = Request { path: first.split(' ').nth(1).unwrap().to_owned(), headers };
        self.seen.lock().unwrap().push(request.clone());
        let answer = (self.handler)(&request).unwrap_or_else(|| match self.files.lock().unwrap().get(&request.path) {
            Some((media_type, body)) => Answer::ok(body.clone()).header("Content-Type", media_type.clone()),
            None => Answer::status(404),
        });
        let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let _ = stream.write_all(format!("{head}\r\n").as_bytes()).and_then(|()| stream.write_all(&answer.body[..answer.send]));
        if answer.hang {
            self.hung.lock().unwrap().push(stream);
        }
        self.arrived.notify_waiters();
    }
}

pub(in crate::provisioner) fn layer(file: &str) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_gnu();
    let data = file.repeat(50_000);
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    builder.append_data(&mut header, file, data.as_bytes()).unwrap();
    builder.into_inner().unwrap()
}

pub(in crate::provisioner) fn config(diff_ids: &[Digest], label: &str) -> String {
    let ids: Vec<_> = diff_ids.iter().map(Digest::as_str).collect();
    serde_json::json!({"os": "linux", "config": {"Labels": {"l": label}}, "rootfs": {"type": "layers", "diff_ids": ids}}).to_string()
}

pub(in crate::provisioner) struct Store {
    pub provisioner: Arc<Provisioner>,
    pub layout: Layout,
    pub dir: tempfile::TempDir,
}

impl Store {
    pub async fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("root"), dir.path().join("state"));
        Self { provisioner: Provisioner::open(config, layout.clone()).await.unwrap(), layout, dir }
    }

    pub async fn pull(&self, reference: &Reference) -> Result<ImageId> {
        self.pull_as(reference, None).await
    }

    async fn pull_as(&self, reference: &Reference, credentials: Option<Credentials>) -> Result<ImageId> {
        self.provisioner.pull(PullRequest { reference: reference.clone(), credentials, cached: false }, None, CancellationToken::new()).await
    }

    /// Nothing listed, nothing on disk.
    pub fn assert_empty(&self) {
        assert!(self.provisioner.list().is_empty());
        for dir in [self.layout.layers(), self.layout.staging(), self.layout.images()] {
            let left: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_are_found_and_leave_nothing() {
    type Lie = fn(&mut Vec<u8>);
    let cases: [(&str, Lie); 5] = [
        // The control: an honest relay.
        ("/blobs/", |_| ()),
        ("/blobs/", |b| {
            let n = b.len();
            b[n / 2] ^= 1;
        }),
        ("/blobs/", |b| b.push(0)),
        ("/manifests/", |b| b.push(b' ')),
        ("/manifests/", |b| *b = String::from_utf8(b.clone()).unwrap().replace("\"size\":", "\"size\":1").into_bytes()),
    ];
    for (n, (part, lie)) in cases.into_iter().enumerate() {
        let truth = Arc::new(Stub::honest());
        let (reference, _) = truth.image("a", &["x", "y"]);
        let origin = truth.clone();
        let liar = Stub::new(move |request| {
            let (media_type, mut body) = origin.shared.files.lock().unwrap().get(&request.path)?.clone();
            // Only what is long is a layer; the documents stay honest unless they are the lie.
            let promised = Hasher::of(&body, None).unwrap();
            if request.path.contains(part) && (part == "/manifests/" || body.len() > 10_000) {
                lie(&mut body);
            }
            Some(Answer::ok(body).header("Content-Type", media_type).header("Docker-Content-Digest", promised.as_str()))
        });
        let reference: Reference = reference.to_string().replace(&truth.host, &liar.host).parse().unwrap();
        let store = Store::new(Config::default()).await;
        let result = store.pull(&reference).await;
        if n == 0 {
            result.unwrap();
            continue;
        }
        let error = result.unwrap_err();
        assert_eq!(error.kind, Kind::DataLoss, "case {n}: {error}");
        store.assert_empty();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_transfers_go_on_where_they_stopped() {
    let files = Arc::new(Stub::honest());
    let (reference, _) = files.image("a", &["x"]);
    let origin = files.clone();
    let flaky = Stub::new(move |request| {
        let (media_type, body) = origin.shared.files.lock().unwrap().get(&request.path)?.clone();
        if body.len() < 10_000 {
            return Some(Answer::ok(body).header("Content-Type", media_type));
        }
        let from: usize = request.headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
        let rest = body[from..].to_vec();
        let send = rest.len().min(20_000);
        Some(Answer { status: if from > 0 { 206 } else { 200 }, headers: vec![], body: rest, send, hang: false })
    });
    let reference: Reference = reference.to_string().replace(&files.host, &flaky.host).parse().unwrap();
    let store = Store::new(Config::default()).await;
    store.pull(&reference).await.unwrap();
    assert!(flaky.seen("/blobs/").iter().filter(|r| r.headers.contains_key("range")).count() >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_are_bounded() {
    let stub = Stub::new(|request| request.path.contains("/manifests/").then(|| Answer::ok(vec![b' '; 5 << 20])));
    let store = Store::new(Config::default()).await;
    let error = store.pull(&format!("{}/a:1", stub.host).parse().unwrap()).await.unwrap_err();
    assert_eq!(error.kind, Kind::ResourceExhausted, "{error}");
    let stub = Stub::honest();
    let (reference, _) = stub.image("a", &["x", "y"]);
    let store = Store::new(Config { limits: Limits { layers: 1, ..Limits::default() }, ..Config::default() }).await;
    assert_eq!(store.pull(&reference).await.unwrap_err().kind, Kind::ResourceExhausted);
    store.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_follow_redirects() {
    let thief = Stub::honest();
    let target = thief.host.clone();
    let stub = Stub::new(move |request| {
        if !request.headers.contains_key("authorization") {
            return Some(Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""));
        }
        request.path.contains("/blobs/").then(|| Answer::status(307).header("Location", format!("http://{target}{}", request.path)))
    });
    let (reference, blobs) = stub.image("a", &["x"]);
    thief.shared.files.lock().unwrap().extend(stub.shared.files.lock().unwrap().clone());
    let credentials = Credentials { username: "u".into(), password: "secret".into(), ..Credentials::default() };
    let store = Store::new(Config::default()).await;
    assert_eq!(store.pull(&reference).await.unwrap_err().kind, Kind::Unauthenticated);
    store.pull_as(&reference, Some(credentials)).await.unwrap();
    let stolen = thief.seen("/blobs/");
    assert!(stolen.iter().any(|r| r.path.contains(blobs[0].hex())));
    assert!(stolen.iter().all(|r| !r.headers.contains_key("authorization")));
    // The control: the registry itself did get them.
    assert!(stub.seen("/blobs/").iter().any(|r| r.headers.contains_key("authorization")));
}

#[tokio::test(flavor = "multi_thread")]
async fn bearer_tokens() {
    let realm = Arc::new(Mutex::new(String::new()));
    let at = realm.clone();
    let stub = Stub::new(move |request| {
        if request.path.starts_with("/token") {
            let known = request.headers.get("authorization").is_some_and(|a| a == "Basic dTpw");
            return Some(if known { Answer::ok(r#"{"token":"t0"}"#) } else { Answer::status(401) });
        }
        let bearer = request.headers.get("authorization").is_some_and(|a| a == "Bearer t0");
        let challenge = format!("Bearer realm=\"{}/token\",service=\"s\",scope=\"repository:a:pull\"", at.lock().unwrap());
        (!bearer).then(|| Answer::status(401).header("WWW-Authenticate", challenge))
    });
    *realm.lock().unwrap() = format!("http://{}", stub.host);
    let (reference, _) = stub.image("a", &["x"]);
    let store = Store::new(Config::default()).await;
    let as_user = |password: &str| Some(Credentials { username: "u".into(), password: password.into(), ..Credentials::default() });
    assert_eq!(store.pull_as(&reference, as_user("wrong")).await.unwrap_err().kind, Kind::Unauthenticated);
    store.pull_as(&reference, as_user("p")).await.unwrap();
    assert!(stub.seen("/token").iter().any(|r| r.path.contains("scope=repository%3Aa%3Apull") && r.path.contains("service=s")));
    let registry_token = Credentials { registry_token: "t0".into(), ..Credentials::default() };
    store.pull_as(&reference, Some(registry_token)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_once_fetch_each_layer_once() {
    // No manifest is sent before all have asked: a pull that came when another was done would ask for it again.
    let all_asked = Arc::new(std::sync::OnceLock::new());
    let asked = all_asked.clone();
    let stub = Stub::new(move |request| {
        if request.path.contains("/manifests/") {
            asked.wait();
        }
        None
    });
    let (one, blobs) = stub.image("one", &["shared", "a"]);
    let (two, _) = stub.image("two", &["shared", "b"]);
    let store = Store::new(Config::default()).await;
    let pulls = (0..20).map(|n| store.pull(if n % 2 == 0 { &one } else { &two }));
    // The first look at a pull makes it join or start one, and all are looked at before what comes after them.
    let (results, ()) = tokio::join!(futures_util::future::join_all(pulls), async { all_asked.set(()).unwrap() });
    for result in results {
        result.unwrap();
    }
    assert_eq!(store.provisioner.list().len(), 2);
    assert_eq!(stub.seen(blobs[0].hex()).len(), 1);
    assert_eq!(stub.seen("one/manifests").len(), 1);
    assert_eq!(std::fs::read_dir(store.layout.layers()).unwrap().count(), 3);
    assert_eq!(std::fs::read_dir(store.layout.staging()).unwrap().count(), 0);
    // Present layers are not fetched again.
    store.provisioner.remove(&two.to_string()).await.unwrap();
    assert_eq!(std::fs::read_dir(store.layout.layers()).unwrap().count(), 2);
    store.pull(&two).await.unwrap();
    assert_eq!(stub.seen(blobs[0].hex()).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_and_leaving_leave_nothing() {
    let files = Arc::new(Stub::honest());
    let (reference, _) = files.image("a", &["x"]);
    let origin = files.clone();
    let slow = Stub::new(move |request| {
        let (media_type, body) = origin.shared.files.lock().unwrap().get(&request.path)?.clone();
        let hang = body.len() > 10_000;
        let send = if hang { 30_000 } else { body.len() };
        Some(Answer { status: 200, headers: vec![("Content-Type".into(), media_type)], body, send, hang })
    });
    let reference: Reference = reference.to_string().replace(&files.host, &slow.host).parse().unwrap();
    let store = Store::new(Config::default()).await;
    let request = || PullRequest { reference: reference.clone(), credentials: None, cached: false };
    let under_way = || async {
        loop {
            let arrived = slow.shared.arrived.notified();
            if !slow.shared.hung.lock().unwrap().is_empty() {
                return;
            }
            arrived.await;
        }
    };
    // By token.
    let cancel = CancellationToken::new();
    let (result, ()) = tokio::join!(store.provisioner.pull(request(), None, cancel.clone()), async {
        under_way().await;
        cancel.cancel();
    });
    assert_eq!(result.unwrap_err().kind, Kind::Cancelled);
    store.assert_empty();
    // By leaving: the second caller goes on when the first one leaves, and the work ends with the last.
    slow.shared.hung.lock().unwrap().clear();
    let (first, second) = (CancellationToken::new(), CancellationToken::new());
    let pulls = async { tokio::join!(store.provisioner.pull(request(), None, first.clone()), store.provisioner.pull(request(), None, second.clone())) };
    let ((a, b), ()) = tokio::join!(pulls, async {
        under_way().await;
        first.cancel();
        assert_eq!(store.provisioner.inner.layers.usage().inodes, 0);
        second.cancel();
    });
    assert_eq!((a.unwrap_err().kind, b.unwrap_err().kind), (Kind::Cancelled, Kind::Cancelled));
    store.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_registry_is_given_up() {
    let stub = Stub::new(|_| Some(Answer { hang: true, ..Answer { send: 0, ..Answer::ok("{}") } }));
    let store = Store::new(Config { stall_timeout_seconds: 1, ..Config::default() }).await;
    let error = store.pull(&format!("{}/a:1", stub.host).parse().unwrap()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable);
    assert!(error.to_string().starts_with("RegistryUnavailable: "), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_come_first_and_get_no_credentials() {
    let mirror = Stub::honest();
    let host = Stub::new(|r| (!r.headers.contains_key("authorization")).then(|| Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\"")));
    let (reference, _) = host.image("only/host", &["x"]);
    let (other, _) = mirror.image("on/mirror", &["y"]);
    let mut config = Config::default();
    let settings = crate::provisioner::config::Registry { mirrors: vec![format!("http://{}/", mirror.host)], ..Default::default() };
    config.registries.insert(host.host.clone(), settings);
    let store = Store::new(config).await;
    let credentials = Some(Credentials { username: "u".into(), password: "p".into(), ..Credentials::default() });
    store.pull_as(&reference, credentials.clone()).await.unwrap();
    let mirrored: Reference = other.to_string().replace(&mirror.host, &host.host).parse().unwrap();
    store.pull_as(&mirrored, credentials).await.unwrap();
    assert!(host.seen("on/mirror").is_empty());
    assert!(mirror.seen("").iter().all(|r| !r.headers.contains_key("authorization")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writable_layer_that_cannot_be_counted_does_not_stop_the_start() {
    let stub = Stub::honest();
    let (reference, _) = stub.image("a", &["x"]);
    let store = Store::new(Config::default()).await;
    store.pull(&reference).await.unwrap();
    let image = store.provisioner.list().remove(0);
    let writable = store.provisioner.provision("c", &image).await.unwrap().writable.unwrap();
    let aside = writable.with_extension("aside");
    std::fs::rename(&writable, &aside).unwrap();
    std::fs::write(&writable, "a file where the directory was").unwrap();
    let again = Provisioner::open(Config::default(), store.layout.clone()).await.unwrap();
    assert!(again.usage("c").is_none(), "not counted is not empty");
    std::fs::remove_file(&writable).unwrap();
    std::fs::rename(&aside, &writable).unwrap();
    let counted = async {
        while again.usage("c").is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), counted).await.expect("never counted again");
    again.release("c").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_drops_what_nobody_knows_and_keeps_the_rest() {
    let stub = Stub::honest();
    let (reference, _) = stub.image("a", &["x"]);
    let store = Store::new(Config::default()).await;
    store.pull(&reference).await.unwrap();
    let image = store.provisioner.list().remove(0);
    for container in ["keep", "drop"] {
        store.provisioner.provision(container, &image).await.unwrap();
    }
    store.provisioner.remove(image.id.as_str()).await.unwrap();
    std::fs::create_dir_all(store.layout.staging().join("half/fs")).unwrap();
    std::fs::create_dir_all(store.layout.rootfs("stray/upper")).unwrap();
    let again = Provisioner::open(Config::default(), store.layout.clone()).await.unwrap();
    assert_eq!(std::fs::read_dir(store.layout.staging()).unwrap().count(), 0);
    again.recover(&["keep".to_owned()]).await.unwrap();
    assert!(again.usage("keep").is_some() && again.usage("drop").is_none());
    let left: Vec<PathBuf> = std::fs::read_dir(store.layout.rootfs_all()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [store.layout.rootfs("keep")]);
    assert_eq!(std::fs::read_dir(store.layout.layers()).unwrap().count(), 1);
    assert_eq!(again.provision("new", &image).await.map(|_| ()).map_err(|e| e.kind), Ok(()));
    again.release("new").await.unwrap();
    again.release("keep").await.unwrap();
    again.release("keep").await.unwrap();
    assert_eq!(std::fs::read_dir(store.layout.layers()).unwrap().count(), 0);
    assert_eq!(again.provision("late", &image).await.unwrap_err().kind, Kind::NotFound);
    for bad in ["", "..", "a/b", "../x"] {
        assert_eq!(again.provision(bad, &image).await.unwrap_err().kind, Kind::InvalidArgument);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_docker_archives_and_layouts() {
    let store = Store::new(Config::default()).await;
    let tar = layer("x");
    let diff_id = Hasher::of(&tar, None).unwrap();
    let document = config(std::slice::from_ref(&diff_id), "l");
    let id = Hasher::of(document.as_bytes(), None).unwrap();
    let manifest = serde_json::json!([{"Config": format!("{}.json", id.hex()), "RepoTags": ["n:1"], "Layers": ["l/layer.tar"]}]).to_string();
    let mut builder = ::tar::Builder::new(Vec::new());
    let mut add = |name: &str, data: &[u8]| {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, name, data).unwrap();
    };
    add("l/layer.tar", &tar);
    add(&format!("{}.json", id.hex()), document.as_bytes());
    add("manifest.json", manifest.as_bytes());
    let archive = builder.into_inner().unwrap();
    let path = store.dir.path().join("docker.tar");
    std::fs::write(&path, &archive).unwrap();
    assert_eq!(store.provisioner.load(&path).await.unwrap(), [ImageId::from_string(id.as_str())]);
    assert_eq!(store.provisioner.resolve("n:1").unwrap().repo_tags, ["docker.io/library/n:1"]);
    store.provisioner.remove("n:1").await.unwrap();
    // The same, compressed.
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&archive).unwrap();
    std::fs::write(&path, encoder.finish().unwrap()).unwrap();
    store.provisioner.load(&path).await.unwrap();
    store.provisioner.remove("n:1").await.unwrap();

    // An OCI layout directory, then one whose layer is not what it should be.
    let layout = store.dir.path().join("oci");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let blob = |bytes: &[u8]| {
        let digest = Hasher::of(bytes, None).unwrap();
        std::fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        serde_json::json!({"digest": digest.as_str(), "size": bytes.len()})
    };
    let manifest = serde_json::json!({"schemaVersion": 2, "config": blob(document.as_bytes()), "layers": [blob(&tar)]}).to_string();
    let mut entry = blob(manifest.as_bytes());
    entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "localhost/o:2"});
    std::fs::write(layout.join("oci-layout"), "{}").unwrap();
    std::fs::write(layout.join("index.json"), serde_json::json!({"schemaVersion": 2, "manifests": [entry]}).to_string()).unwrap();
    store.provisioner.load(&layout).await.unwrap();
    assert_eq!(store.provisioner.resolve("localhost/o:2").unwrap().id.as_str(), id.as_str());
    store.provisioner.remove(id.as_str()).await.unwrap();
    std::fs::write(layout.join("blobs/sha256").join(diff_id.hex()), layer("y")).unwrap();
    assert_eq!(store.provisioner.load(&layout).await.unwrap_err().kind, Kind::DataLoss);
    store.assert_empty();

    std::fs::write(&path, "no archive at all").unwrap();
    assert_eq!(store.provisioner.load(&path).await.unwrap_err().kind, Kind::InvalidArgument);
    assert_eq!(store.provisioner.load(&store.dir.path().join("nothing")).await.unwrap_err().kind, Kind::NotFound);
}
