//! A shim's client: typed calls on one connection per pod, and the one table from ttrpc status codes to our errors.
//!
//! A request that is handed over is sent to its end, whoever leaves: half of one on the line would cost all others their connection.
//! When the connection breaks all the same, the calls under way fail with `Unavailable`, and the next call makes a new one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::asynchronous::Client as Connection;
use containerd_shim_protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim_protos::ttrpc::proto::{KeyValue, MESSAGE_LENGTH_MAX, Request};
use containerd_shim_protos::ttrpc::{self, Code};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};

use crate::model::error::{Act, Error, Kind, Result};

/// containerd namespace under which our pods run in shims that know namespaces.
pub const NAMESPACE: &str = "mesocri";
/// Metadata key by which containerd's shims are told the namespace of a request.
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";
/// Bytes of requests that a shim may owe answers to. More wait with their callers: what a stalled shim costs has an end.
const ROOM: u32 = 8 << 20;

/// A connected shim.
#[derive(Clone)]
pub struct Client(Arc<Shared>);

struct Shared {
    /// Of the socket.
    path: String,
    link: Mutex<Link>,
    /// Held by the one who makes a new connection.
    renewing: tokio::sync::Mutex<()>,
    room: Arc<Semaphore>,
    /// Goes with the last client: what is still on its way then is for nobody, and must not hold the connection.
    held: watch::Sender<()>,
    /// Name of the task service: version 2 or 3.
    task: &'static str,
    /// Bound of calls that do not wait for a process.
    limit: Duration,
    /// Process that opened the socket.
    listener: Option<u32>,
}

/// A connection, and whether it is known to be of no more use.
#[derive(Clone)]
struct Link {
    connection: Connection,
    broken: Arc<AtomicBool>,
}

/// What came of a request.
enum Answer {
    Told(ttrpc::Result<ttrpc::Response>),
    Overdue,
}

impl Link {
    fn new(stream: UnixStream) -> Self {
        Self { connection: Connection::new(Socket::from(stream)), broken: Arc::default() }
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}

impl Client {
    /// Connects to `unix://PATH`.
    ///
    /// # Errors
    /// `NotFound` when nobody listens there, `DeadlineExceeded`.
    pub async fn connect(address: &str, task: &'static str, limit: Duration) -> Result<Self> {
        let path = address.strip_prefix("unix://").ok_or_else(|| Error::invalid(format!("shim address {address:?} is not a unix socket")))?;
        let (stream, listener) = open(path, limit).await?;
        Ok(Self(Arc::new(Shared {
            path: path.to_owned(),
            link: Mutex::new(Link::new(stream)),
            renewing: tokio::sync::Mutex::default(),
            room: Arc::new(Semaphore::new(ROOM as usize)),
            held: watch::Sender::default(),
            task,
            limit,
            listener,
        })))
    }

    /// The process that opened the socket, as the kernel says (`SO_PEERCRED`): the shim itself where it does not fork to serve.
    ///
    /// # Errors
    /// When it is not in a process namespace that we see.
    pub fn listener(&self) -> Result<u32> {
        self.0.listener.filter(|pid| *pid != 0).ok_or_else(|| Error::internal("find shim process: the socket names none"))
    }

    /// Calls a method of the task service that does not wait for a process.
    ///
    /// # Errors
    /// What the shim says; `Unavailable` when the connection broke, and nobody knows what the shim made of the request; `DeadlineExceeded`.
    pub async fn task<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        self.call(self.0.task, method, request, Some(self.0.limit)).await
    }

    /// Calls a method of the task service that takes as long as a process lives.
    ///
    /// # Errors
    /// As [`Client::task`].
    pub async fn task_unbounded<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        self.call(self.0.task, method, request, None).await
    }

    /// Calls any method.
    ///
    /// # Errors
    /// As [`Client::task`].
    pub async fn call<A: Message>(&self, service: &str, method: &str, request: &impl Message, limit: Option<Duration>) -> Result<A> {
        let what = || format!("shim {method}");
        let mut message = Request::new();
        message.service = service.to_owned();
        message.method = method.to_owned();
        message.timeout_nano = limit.map_or(0, |limit| i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX));
        message.payload = request.write_to_bytes().map_err(|e| Error::with(Kind::Internal, what(), e))?;
        let mut namespace = KeyValue::new();
        namespace.key = NAMESPACE_KEY.to_owned();
        namespace.value = NAMESPACE.to_owned();
        message.metadata.push(namespace);
        let size = message.compute_size();
        if size > MESSAGE_LENGTH_MAX as u64 {
            return Err(Error::invalid(format!("{}: the request has {size} bytes, {MESSAGE_LENGTH_MAX} are the most that a shim takes", what())));
        }
        let overdue = |limit: Duration| Error::new(Kind::DeadlineExceeded, format!("{}: the shim did not answer within {} s", what(), limit.as_secs()));
        let sent = self.send(message, u32::try_from(size).map_or(ROOM, |size| size.min(ROOM)), limit);
        let answer = match limit {
            Some(limit) => tokio::time::timeout(limit, sent).await.map_err(|_| overdue(limit))?,
            None => sent.await,
        };
        let answer = match (answer?, limit) {
            (Answer::Told(answer), _) => answer.map_err(|e| failed(what(), e))?,
            (Answer::Overdue, limit) => return Err(overdue(limit.unwrap_or_default())),
        };
        A::parse_from_bytes(&answer.payload).map_err(|e| Error::with(Kind::Internal, what(), e))
    }

    /// Hands a request over and waits for the answer. Once handed over it goes to the shim as a whole, also when the caller leaves.
    async fn send(&self, message: Request, size: u32, limit: Option<Duration>) -> Result<Answer> {
        let room = self.0.room.clone().acquire_many_owned(size).await.map_err(|e| Error::with(Kind::Internal, "send to shim", e))?;
        let Link { connection, broken } = self.link().await?;
        let mut held = self.0.held.subscribe();
        let sending = tokio::spawn(async move {
            let begun = Instant::now();
            let answer = tokio::select! {
                answer = connection.request(message) => answer,
                // Nobody is left to hear this.
                _ = held.changed() => return Answer::Overdue,
            };
            drop(room);
            match &answer {
                Ok(_) | Err(ttrpc::Error::RpcStatus(_)) => Answer::Told(answer),
                // If that was in the middle of sending, whoever else waits on this connection hears of its end.
                Err(_) if limit.is_some_and(|limit| begun.elapsed() >= limit) => Answer::Overdue,
                Err(_) => {
                    broken.store(true, Ordering::Relaxed);
                    Answer::Told(answer)
                }
            }
        });
        sending.await.map_err(|e| Error::with(Kind::Internal, "send to shim", e))
    }

    /// The connection; a new one if it is known to be broken. One caller makes it for all.
    async fn link(&self) -> Result<Link> {
        let current = || self.0.link.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let link = current();
        if !link.is_broken() {
            return Ok(link);
        }
        let _alone = self.0.renewing.lock().await;
        let link = current();
        if !link.is_broken() {
            return Ok(link);
        }
        let gone = |e: Error| Error::with(Kind::Unavailable, "connect to shim again: it may have been killed", e);
        let (stream, listener) = open(&self.0.path, self.0.limit).await.map_err(gone)?;
        if listener != self.0.listener {
            return Err(Error::new(Kind::Unavailable, format!("connect to shim again: another process listens on {}", self.0.path)));
        }
        tracing::info!(shim = listener, "connection to a shim was made again after it broke");
        let link = Link::new(stream);
        *self.0.link.lock().unwrap_or_else(PoisonError::into_inner) = link.clone();
        Ok(link)
    }
}

/// Connects; also the process that listens.
async fn open(path: &str, limit: Duration) -> Result<(UnixStream, Option<u32>)> {
    let stream = match tokio::time::timeout(limit, UnixStream::connect(path)).await {
        Ok(Err(e)) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
            return Err(Error::with(Kind::NotFound, format!("connect to shim {path}"), e));
        }
        Ok(stream) => stream.act("connect to shim", path)?,
        Err(_) => return Err(Error::new(Kind::DeadlineExceeded, format!("connect to shim {path}"))),
    };
    let listener = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
    Ok((stream, listener))
}

fn failed(what: String, error: ttrpc::Error) -> Error {
    let ttrpc::Error::RpcStatus(status) = error else {
        // Whatever else happens to a connection: the shim cannot be asked.
        return Error::with(Kind::Unavailable, format!("{what}: the connection broke, the shim may have been killed"), error);
    };
    let kind = match status.code.enum_value_or_default() {
        Code::NOT_FOUND => Kind::NotFound,
        Code::ALREADY_EXISTS => Kind::AlreadyExists,
        Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => Kind::InvalidArgument,
        Code::FAILED_PRECONDITION | Code::ABORTED => Kind::FailedPrecondition,
        Code::RESOURCE_EXHAUSTED => Kind::ResourceExhausted,
        Code::UNAVAILABLE => Kind::Unavailable,
        Code::DEADLINE_EXCEEDED => Kind::DeadlineExceeded,
        Code::CANCELLED => Kind::Cancelled,
        Code::UNAUTHENTICATED => Kind::Unauthenticated,
        Code::PERMISSION_DENIED => Kind::PermissionDenied,
        Code::DATA_LOSS => Kind::DataLoss,
        Code::UNIMPLEMENTED => Kind::Unimplemented,
        Code::OK | Code::UNKNOWN | Code::INTERNAL => Kind::Internal,
    };
    Error::new(kind, format!("{what}: {}", status.message))
}

#[cfg(test)]
mod tests;
