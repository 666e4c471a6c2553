//! Old clients ask for `runtime.v1alpha2`. Its messages are those of v1, so only the path of the call is rewritten.

use std::task::{Context, Poll};

use http::Uri;
use http::uri::PathAndQuery;
use tower::{Layer, Service};

const OLD: &str = "/runtime.v1alpha2.";
const NEW: &str = "/runtime.v1.";

/// Layer that renames old paths.
#[derive(Clone, Copy)]
pub struct Rename;

impl<S> Layer<S> for Rename {
    type Service = Renamed<S>;

    fn layer(&self, inner: S) -> Renamed<S> {
        Renamed { inner }
    }
}

/// A service behind [`Rename`].
#[derive(Clone)]
pub struct Renamed<S> {
    inner: S,
}

impl<S, B> Service<http::Request<B>> for Renamed<S>
where
    S: Service<http::Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> S::Future {
        if let Some(uri) = renamed(request.uri()) {
            *request.uri_mut() = uri;
        }
        self.inner.call(request)
    }
}

fn renamed(uri: &Uri) -> Option<Uri> {
    let method = uri.path().strip_prefix(OLD)?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(format!("{NEW}{method}")).ok()?);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_paths_are_renamed() {
        let uri = |s: &str| s.parse::<Uri>().unwrap();
        assert_eq!(
            renamed(&uri("http://localhost/runtime.v1alpha2.ImageService/ListImages")).unwrap(),
            uri("http://localhost/runtime.v1.ImageService/ListImages")
        );
        assert_eq!(renamed(&uri("http://localhost/runtime.v1.ImageService/ListImages")), None);
        assert_eq!(renamed(&uri("http://localhost/x/runtime.v1alpha2.A/B")), None);
    }
}
