//! The one gate through which async code does blocking work: file system calls that may sleep on a slow disk must not
//! hold one of the few worker threads.

/// The work itself broke (a panic): which, and how.
#[derive(Debug, thiserror::Error)]
#[error("{what}: background work failed: {cause}")]
pub struct Failed {
    /// Name of the work.
    pub what: &'static str,
    /// What the runtime says of it.
    pub cause: String,
}

/// Runs `work` on the blocking pool. A panic inside becomes [`Failed`] naming `what`.
///
/// # Errors
/// Those of `work`, and [`Failed`].
pub async fn run<T, E>(what: &'static str, work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Failed> + Send + 'static,
{
    // What the work logs belongs to whoever has it done.
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result,
        Err(e) => Err(Failed { what, cause: e.to_string() }.into()),
    }
}
