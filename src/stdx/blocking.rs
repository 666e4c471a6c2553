//! The one gate through which async code does blocking work: file system calls that may sleep on a slow disk must not
//! hold one of the few worker threads.

use crate::model::error::{Error, Kind, Result};

/// Runs `work` on the blocking pool. A panic inside becomes an `Internal` error naming `what`.
pub async fn run<T: Send + 'static>(what: &'static str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::with(Kind::Internal, what, e)),
    }
}
