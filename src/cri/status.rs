//! The one table from error class to gRPC code, and the one place where a failed call is logged.

use tonic::{Code, Status};

use crate::model::error::{Error, Kind};

/// Names that the kubelet looks for at the start of a message, with code Unknown (cri-behaviour §1).
const NAMED: &[&str] = &["RegistryUnavailable", "SignatureValidationFailed", "RROUnsupported", "ImageVolumeMountFailed"];

/// Code of each class. No wildcard: a new class must be given its code here.
fn code(kind: Kind) -> Code {
    match kind {
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::Cancelled => Code::Cancelled,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::DataLoss => Code::DataLoss,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Internal => Code::Internal,
    }
}

/// The answer to a failed call: the chain as text, or, for the few failures with a name, the part that starts with it.
pub fn of(error: &Error) -> Status {
    match named(error) {
        Some(inner) => Status::new(Code::Unknown, inner.to_string()),
        None => Status::new(code(error.kind), error.to_string()),
    }
}

/// Logs a failed call, once, with its chain. Callers who asked for something that is gone, or left, are everyday life.
pub fn log(error: &Error) {
    match error.kind {
        Kind::NotFound | Kind::Cancelled | Kind::Unimplemented => tracing::debug!(kind = ?error.kind, "call failed: {error}"),
        Kind::Internal | Kind::DataLoss => tracing::error!(kind = ?error.kind, "call failed: {error}"),
        _ => tracing::warn!(kind = ?error.kind, "call failed: {error}"),
    }
}

/// The error in the chain whose message begins with one of [`NAMED`].
fn named(error: &Error) -> Option<&Error> {
    let mut next = Some(error);
    while let Some(e) = next {
        if NAMED.iter().any(|name| e.what.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))) {
            return Some(e);
        }
        next = e.source.as_ref().and_then(|s| s.downcast_ref());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_the_codes_of_their_names() {
        for (kind, expected) in [
            (Kind::NotFound, Code::NotFound),
            (Kind::InvalidArgument, Code::InvalidArgument),
            (Kind::FailedPrecondition, Code::FailedPrecondition),
            (Kind::DeadlineExceeded, Code::DeadlineExceeded),
            (Kind::Unimplemented, Code::Unimplemented),
            (Kind::Internal, Code::Internal),
        ] {
            let status = of(&Error::new(kind, "do x").within("do y"));
            assert_eq!((status.code(), status.message()), (expected, "do y: do x"));
        }
    }

    #[test]
    fn named_failures_start_with_their_name_and_are_unknown() {
        let e = Error::new(Kind::Unavailable, "RegistryUnavailable: connect to r:5000").within("pull image r:5000/x");
        let status = of(&e);
        assert_eq!((status.code(), status.message()), (Code::Unknown, "RegistryUnavailable: connect to r:5000"));
        // Only the name itself counts, not a word that begins alike.
        assert_eq!(of(&Error::new(Kind::Unavailable, "RegistryUnavailableX")).code(), Code::Unavailable);
    }
}
