//! Until recovery is done every call is answered `Unavailable`, which clients take as "ask again" (cri-behaviour §1).

use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::containerizer::Engine;

/// Layer that asks the engine before each call.
#[derive(Clone)]
pub struct Gate {
    engine: Arc<dyn Engine>,
}

impl Gate {
    /// A gate that opens when `engine` is ready.
    pub fn new(engine: Arc<dyn Engine>) -> Self {
        Self { engine }
    }
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { engine: self.engine.clone(), inner }
    }
}

/// A service behind a [`Gate`].
#[derive(Clone)]
pub struct Gated<S> {
    engine: Arc<dyn Engine>,
    inner: S,
}

impl<S> Service<http::Request<Body>> for Gated<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<Ready<Result<S::Response, S::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if self.engine.ready() {
            Either::Right(self.inner.call(request))
        } else {
            Either::Left(ready(Ok(Status::unavailable("the runtime is starting").into_http())))
        }
    }
}
