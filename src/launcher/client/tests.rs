//! The client against shims that stall, and whose connections break.

use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use containerd_shim_protos::ttrpc::asynchronous::{Server, TtrpcContext};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::*;
use crate::disk::Layout;
use crate::launcher::pod::{Pod, Whose};
use crate::launcher::{Config, Launcher, ShimLauncher};
use crate::model::shim::TASK_V3;
use crate::model::{ContainerId, PodId};

const LIMIT: Duration = Duration::from_secs(20);

/// A shim with one container, behind a door that can be slammed.
struct FakeShim {
    exit: watch::Sender<Option<u32>>,
    waits: AtomicUsize,
    starts: watch::Sender<usize>,
    deletes: AtomicUsize,
    /// Connections so far.
    connections: watch::Sender<usize>,
    lines: tokio::sync::Mutex<JoinSet<()>>,
}

struct Service(Arc<FakeShim>);

#[async_trait]
impl Task for Service {
    async fn wait(&self, _: &TtrpcContext, _: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        self.0.waits.fetch_add(1, Ordering::Relaxed);
        let exited = *self.0.exit.subscribe().wait_for(Option::is_some).await.unwrap();
        let mut answer = api::WaitResponse::new();
        answer.exit_status = exited.unwrap();
        Ok(answer)
    }

    async fn start(&self, _: &TtrpcContext, _: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        self.0.starts.send_modify(|n| *n += 1);
        std::future::pending().await
    }

    async fn delete(&self, _: &TtrpcContext, _: api::DeleteRequest) -> ttrpc::Result<api::DeleteResponse> {
        self.0.deletes.fetch_add(1, Ordering::Relaxed);
        Ok(api::DeleteResponse::new())
    }
}

impl FakeShim {
    /// Listens on `path`.
    async fn listen(path: &std::path::Path) -> Arc<Self> {
        let shim = Arc::new(Self {
            exit: watch::Sender::new(None),
            waits: AtomicUsize::new(0),
            starts: watch::Sender::new(0),
            deletes: AtomicUsize::new(0),
            connections: watch::Sender::new(0),
            lines: tokio::sync::Mutex::default(),
        });
        let behind = path.with_extension("behind");
        let listener = Listener::try_from(std::os::unix::net::UnixListener::bind(&behind).unwrap()).unwrap();
        let services = create_task(Arc::new(Service(shim.clone()))).into_values().map(|service| (TASK_V3.to_owned(), service)).collect();
        let mut server = Server::new().add_listener(listener).register_service(services);
        server.start().await.unwrap();
        let (door, me) = (UnixListener::bind(path).unwrap(), shim.clone());
        tokio::spawn(async move {
            let _server = server;
            loop {
                let (mut outside, _) = door.accept().await.unwrap();
                let mut inside = UnixStream::connect(&behind).await.unwrap();
                me.lines.lock().await.spawn(async move {
                    let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
                });
                me.connections.send_modify(|n| *n += 1);
            }
        });
        shim
    }

    async fn break_connections(&self) {
        self.lines.lock().await.shutdown().await;
    }

    async fn connected(&self, times: usize) {
        tokio::time::timeout(LIMIT, self.connections.subscribe().wait_for(|n| *n >= times)).await.unwrap().unwrap();
    }
}

/// A launcher that knows the pod of such a shim, whose process is this test.
async fn launcher_of(dir: &std::path::Path) -> (Arc<FakeShim>, Arc<ShimLauncher>, Arc<Pod>) {
    let socket = dir.join("s");
    let shim = FakeShim::listen(&socket).await;
    let client = Client::connect(&format!("unix://{}", socket.display()), TASK_V3, LIMIT).await.unwrap();
    assert_eq!(client.listener().unwrap(), std::process::id());
    let config = Config { shim: Some("/bin/true".into()), ..Config::default() };
    let launcher = ShimLauncher::new(config, Layout::new(dir.join("root"), dir.join("state"))).unwrap();
    // Foreign: it has no sandbox service.
    let pod = Pod::new(PodId::random(), Whose::Foreign, String::new(), client, std::process::id()).unwrap();
    launcher.remember(pod.clone());
    (shim, launcher, pod)
}

#[tokio::test]
async fn a_connection_that_breaks_while_the_shim_lives_is_made_again_and_the_exit_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (shim, launcher, pod) = launcher_of(dir.path()).await;
    let id = ContainerId::from_string("c");
    let waiting = {
        let (launcher, pod, id) = (launcher.clone(), pod.id.clone(), id.clone());
        tokio::spawn(async move { launcher.wait_task(&pod, &id).await })
    };
    for n in 1..4 {
        shim.connected(n).await;
        shim.break_connections().await;
    }
    shim.connected(4).await;
    assert!(!waiting.is_finished(), "the container runs on");
    assert!(tokio::time::timeout(Duration::ZERO, pod.ended()).await.is_err(), "and so does its pod");
    // The container is left alone until it is deleted.
    assert_eq!(shim.deletes.load(Ordering::Relaxed), 0);
    launcher.delete_task(&pod.id, &id).await.unwrap();
    assert_eq!(shim.deletes.load(Ordering::Relaxed), 1);
    shim.exit.send_replace(Some(42));
    assert_eq!(tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap().unwrap().0, 42);
    assert_eq!(*shim.connections.borrow(), 4, "all callers share the new connection");
    assert!(shim.waits.load(Ordering::Relaxed) >= 2);
}

#[tokio::test]
async fn what_must_not_be_done_twice_is_not_asked_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (shim, launcher, pod) = launcher_of(dir.path()).await;
    let starting = {
        let (launcher, pod) = (launcher.clone(), pod.id.clone());
        tokio::spawn(async move { launcher.start_task(&pod, &ContainerId::from_string("c")).await })
    };
    shim.starts.subscribe().wait_for(|n| *n == 1).await.unwrap();
    shim.break_connections().await;
    let error = tokio::time::timeout(LIMIT, starting).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable, "{error}");
    shim.connected(2).await;
    assert_eq!(*shim.starts.borrow(), 1);
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_cut_its_request_off() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let door = UnixListener::bind(&socket).unwrap();
    let client = Client::connect(&format!("unix://{}", socket.display()), TASK_V3, LIMIT).await.unwrap();
    let (mut stalled, _) = door.accept().await.unwrap();
    let mut request = api::ExecProcessRequest::new();
    request.id = "x".repeat(1 << 20);
    let call = client.task::<api::Empty>("Exec", &request);
    // More than fits in the socket, so this leaves in the middle of it.
    assert!(tokio::time::timeout(Duration::from_millis(200), call).await.is_err());
    let mut header = [0; 10];
    stalled.read_exact(&mut header).await.unwrap();
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    assert!(length > 1 << 20);
    let mut body = vec![0; length];
    tokio::time::timeout(LIMIT, stalled.read_exact(&mut body)).await.unwrap().expect("the whole request");
    // And the line still holds.
    let again = client.clone();
    let next = tokio::spawn(async move { again.task::<api::Empty>("Kill", &api::KillRequest::new()).await });
    tokio::time::timeout(LIMIT, stalled.read_exact(&mut header)).await.unwrap().expect("the next request");
    next.abort();
}

#[tokio::test]
async fn what_a_stalled_shim_is_sent_has_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let door = UnixListener::bind(&socket).unwrap();
    let client = Client::connect(&format!("unix://{}", socket.display()), TASK_V3, LIMIT).await.unwrap();
    let _stalled = door.accept().await.unwrap();
    let mut request = api::ExecProcessRequest::new();
    request.id = "x".repeat(3 << 20);
    for _ in 0..8 {
        let call = client.task::<api::Empty>("Exec", &request);
        assert!(tokio::time::timeout(Duration::from_millis(50), call).await.is_err());
    }
    // Two are on their way, for the others there was no room.
    let left = client.0.room.available_permits();
    assert!((1 << 20..3 << 20).contains(&left), "{left}");
    request.id = "x".repeat(5 << 20);
    let error = client.task::<api::Empty>("Exec", &request).await.unwrap_err();
    assert_eq!(error.kind, Kind::InvalidArgument, "{error}");
}
