//! A shim's client: one connection per pod, typed calls, and the one table from ttrpc status codes to our errors.

use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::asynchronous::Client as Connection;
use containerd_shim_protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim_protos::ttrpc::proto::{KeyValue, Request};
use containerd_shim_protos::ttrpc::{self, Code};

use crate::model::error::{Act, Error, Kind, Result};

/// containerd namespace under which our pods run in shims that know namespaces.
pub const NAMESPACE: &str = "mesocri";
/// Metadata key by which containerd's shims are told the namespace of a request.
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// A connected shim.
#[derive(Clone)]
pub struct Client {
    connection: Connection,
    /// Name of the task service: version 2 or 3.
    task: &'static str,
    /// Bound of calls that do not wait for a process.
    limit: Duration,
    /// Process that opened the socket.
    listener: Option<u32>,
}

impl Client {
    /// Connects to `unix://PATH`.
    ///
    /// # Errors
    /// `NotFound` when nobody listens there, `DeadlineExceeded`.
    pub async fn connect(address: &str, task: &'static str, limit: Duration) -> Result<Self> {
        let path = address.strip_prefix("unix://").ok_or_else(|| Error::invalid(format!("shim address {address:?} is not a unix socket")))?;
        let stream = match tokio::time::timeout(limit, tokio::net::UnixStream::connect(path)).await {
            Ok(Err(e)) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
                return Err(Error::with(Kind::NotFound, format!("connect to shim {path}"), e));
            }
            Ok(stream) => stream.act("connect to shim", path)?,
            Err(_) => return Err(Error::new(Kind::DeadlineExceeded, format!("connect to shim {path}"))),
        };
        let listener = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
        Ok(Self { connection: Connection::new(Socket::from(stream)), task, limit, listener })
    }

    /// The process that opened the socket, as the kernel says (`SO_PEERCRED`): the shim itself where it does not fork to serve.
    ///
    /// # Errors
    /// When it is not in a process namespace that we see.
    pub fn listener(&self) -> Result<u32> {
        self.listener.filter(|pid| *pid != 0).ok_or_else(|| Error::internal("find shim process: the socket names none"))
    }

    /// Calls a method of the task service that does not wait for a process.
    ///
    /// # Errors
    /// What the shim says; `Unavailable` when it is gone; `DeadlineExceeded`.
    pub async fn task<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        self.call(self.task, method, request, Some(self.limit)).await
    }

    /// Calls a method of the task service that takes as long as a process lives.
    ///
    /// # Errors
    /// As [`Client::task`].
    pub async fn task_unbounded<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        self.call(self.task, method, request, None).await
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
        let begun = Instant::now();
        let answer = self.connection.request(message).await.map_err(|e| match limit.filter(|limit| begun.elapsed() >= *limit) {
            Some(limit) => Error::new(Kind::DeadlineExceeded, format!("{}: the shim did not answer within {} s", what(), limit.as_secs())),
            None => failed(what(), e),
        })?;
        A::parse_from_bytes(&answer.payload).map_err(|e| Error::with(Kind::Internal, what(), e))
    }
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
