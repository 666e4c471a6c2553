//! The one error type that crosses module borders: what class of failure, which act on which object, and the cause.
//!
//! Modules keep their own `thiserror` enums for what they branch on and convert into this by `From` or [`Error::new`].
//! Fronts map [`Kind`] to a code, exhaustively, in one file each (`cri/status.rs`).

use std::fmt;

/// Class of a failure. Closed on purpose: each front's table must name every one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The object does not exist.
    NotFound,
    /// An object of that name exists and is not the one asked for.
    AlreadyExists,
    /// The request itself is wrong, whatever the state.
    InvalidArgument,
    /// The request does not fit the object's present state.
    FailedPrecondition,
    /// A limit (bytes, counts, disk space) was hit.
    ResourceExhausted,
    /// Not now: starting, or a peer is unreachable.
    Unavailable,
    /// Time ran out.
    DeadlineExceeded,
    /// The caller left or asked to stop.
    Cancelled,
    /// Credentials are missing or refused.
    Unauthenticated,
    /// The kernel or a policy said no.
    PermissionDenied,
    /// Bytes are not what their digest or format promises.
    DataLoss,
    /// Not built, or this kernel cannot.
    Unimplemented,
    /// None of the above: a bug or an environment failure.
    Internal,
}

/// Act + object (`what`), class and cause. Text is lower case without a full stop.
#[derive(Debug)]
pub struct Error {
    /// Class, decides the code on the wire.
    pub kind: Kind,
    /// The attempted act and its object: `create cgroup /sys/fs/cgroup/cpu/x`.
    pub what: String,
    /// The cause, if something below failed.
    pub source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

/// Result with the crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with no cause below it.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), source: None }
    }

    /// An error caused by `source`.
    pub fn with(kind: Kind, what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { kind, what: what.into(), source: Some(source.into()) }
    }

    /// An I/O failure: the class follows from the errno (`ENOENT` is not `NotFound` here: a missing file is rarely the caller's object).
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Kind::ResourceExhausted,
            Some(libc::EPERM | libc::EACCES) => Kind::PermissionDenied,
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Kind::Unimplemented,
            Some(libc::ETIMEDOUT) => Kind::DeadlineExceeded,
            _ => Kind::Internal,
        };
        Self::with(kind, what, source)
    }

    /// The same failure seen from one act further up; the class stays.
    pub fn within(self, what: impl Into<String>) -> Self {
        let kind = self.kind;
        Self::with(kind, what, self)
    }

    /// `NotFound` for `what`.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, what)
    }

    /// `InvalidArgument` for `what`.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, what)
    }

    /// `FailedPrecondition` for `what`.
    pub fn precondition(what: impl Into<String>) -> Self {
        Self::new(Kind::FailedPrecondition, what)
    }

    /// `Internal` for `what`.
    pub fn internal(what: impl Into<String>) -> Self {
        Self::new(Kind::Internal, what)
    }
}

impl fmt::Display for Error {
    /// The whole chain, outermost first, joined by `: `.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
            // Our own errors print their chain themselves; foreign ones do not.
            let mut next = if source.is::<Error>() { None } else { source.source() };
            let mut told = source.to_string();
            while let Some(cause) = next {
                let text = cause.to_string();
                if !told.contains(&text) {
                    write!(f, ": {text}")?;
                    told += &text;
                }
                next = cause.source();
            }
        }
        Ok(())
    }
}

#[cfg(feature = "daemon")]
impl From<crate::stdx::blocking::Failed> for Error {
    fn from(failed: crate::stdx::blocking::Failed) -> Self {
        Self::with(Kind::Internal, "run in the background", failed)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}

/// `.act("read", &path)` on results of I/O: names act and object at the place that knows them.
pub trait Act<T> {
    /// Turns the error into ours, saying what was tried on what.
    fn act(self, act: &str, object: impl fmt::Display) -> Result<T>;
}

impl<T> Act<T> for std::io::Result<T> {
    fn act(self, act: &str, object: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::io(format!("{act} {object}"), e))
    }
}

impl<T> Act<T> for nix::Result<T> {
    fn act(self, act: &str, object: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::io(format!("{act} {object}"), e.into()))
    }
}

impl<T> Act<T> for rustix::io::Result<T> {
    fn act(self, act: &str, object: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::io(format!("{act} {object}"), e.into()))
    }
}

impl<T> Act<T> for serde_json::Result<T> {
    fn act(self, act: &str, object: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::with(Kind::Internal, format!("{act} {object}"), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_the_chain_outermost_first() {
        let e = Err::<(), _>(std::io::Error::from_raw_os_error(libc::ENOSPC)).act("write", "/x").unwrap_err().within("pull image a");
        assert_eq!(e.kind, Kind::ResourceExhausted);
        assert_eq!(e.to_string(), "pull image a: write /x: No space left on device (os error 28)");
    }

    /// As libraries do it: one says only what it is, another repeats what its cause says.
    #[derive(Debug)]
    struct Foreign(&'static str, Option<Box<Foreign>>);

    impl fmt::Display for Foreign {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl std::error::Error for Foreign {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            self.1.as_deref().map(|e| e as _)
        }
    }

    #[test]
    fn each_cause_is_told_once() {
        let chain = Foreign("transport error", Some(Box::new(Foreign("connect: no such file", Some(Box::new(Foreign("no such file", None)))))));
        assert_eq!(Error::with(Kind::Unavailable, "ask", chain).to_string(), "ask: transport error: connect: no such file");
    }
}
