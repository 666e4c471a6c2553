//! The one table from error class to gRPC code, and the one place where a failed call is logged.

use tonic::{Code, Status};
use tracing::Level;

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

/// Beginnings of the names of calls that are to change something. Their failure is seen at the default level, whatever its class.
const ACTS: &[&str] = &["run_", "stop_", "remove_", "create_", "start_", "update_", "exec", "pull_", "reopen_", "checkpoint_", "attach", "port_forward"];

/// Logs a failed call, once, with its chain and the call's name.
pub fn log(rpc: &str, error: &Error) {
    match level(rpc, error.kind) {
        Level::ERROR => tracing::error!(kind = ?error.kind, "{rpc} failed: {error}"),
        Level::WARN => tracing::warn!(kind = ?error.kind, "{rpc} failed: {error}"),
        _ => tracing::debug!(kind = ?error.kind, "{rpc} failed: {error}"),
    }
}

/// How loud the failure of a call is. Callers who left, or who ask about something that is gone, are everyday life.
fn level(rpc: &str, kind: Kind) -> Level {
    match kind {
        Kind::Internal | Kind::DataLoss => Level::ERROR,
        Kind::Cancelled => Level::DEBUG,
        Kind::NotFound | Kind::Unimplemented if !ACTS.iter().any(|act| rpc.starts_with(act)) => Level::DEBUG,
        _ => Level::WARN,
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
    fn failed_acts_are_seen_and_questions_about_what_is_gone_are_not() {
        for act in [
            "create_container",
            "start_container",
            "run_pod_sandbox",
            "stop_container",
            "remove_image",
            "update_container_resources",
            "exec_sync",
            "pull_image",
        ] {
            assert_eq!(level(act, Kind::NotFound), Level::WARN, "{act}");
            assert_eq!(level(act, Kind::Unimplemented), Level::WARN, "{act}");
            assert_eq!(level(act, Kind::Cancelled), Level::DEBUG, "{act}");
            assert_eq!(level(act, Kind::Internal), Level::ERROR, "{act}");
        }
        for question in ["container_status", "list_containers", "pod_sandbox_stats", "image_status", "status", "list_metric_descriptors", "runtime_config"] {
            assert_eq!(level(question, Kind::NotFound), Level::DEBUG, "{question}");
            assert_eq!(level(question, Kind::Unimplemented), Level::DEBUG, "{question}");
            assert_eq!(level(question, Kind::Unavailable), Level::WARN, "{question}");
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
