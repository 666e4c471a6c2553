//! The one table from our errors to ttrpc status codes.

use containerd_shim_protos::ttrpc::{self, Code, get_status};

use crate::init::StepError;
use crate::model::error::{Error, Kind};

/// Our error as the answer to a request.
pub fn status(error: impl Into<Error>) -> ttrpc::Error {
    let error = error.into();
    let code = match error.kind {
        Kind::NotFound => Code::NOT_FOUND,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::InvalidArgument => Code::INVALID_ARGUMENT,
        Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
        Kind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        Kind::Unavailable => Code::UNAVAILABLE,
        Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        Kind::Cancelled => Code::CANCELLED,
        Kind::Unauthenticated => Code::UNAUTHENTICATED,
        Kind::PermissionDenied => Code::PERMISSION_DENIED,
        Kind::DataLoss => Code::DATA_LOSS,
        Kind::Unimplemented => Code::UNIMPLEMENTED,
        Kind::Internal => Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
}

/// A failed step of init: its text says all, its errno decides the class. What this kernel or file system cannot do is a
/// precondition: `Unimplemented` tells a CRI client that the call itself is not built.
pub fn step(error: StepError) -> Error {
    let class = match error.errno {
        libc::ENOSYS | libc::EOPNOTSUPP => Kind::FailedPrecondition,
        errno => Error::io("", std::io::Error::from_raw_os_error(errno)).kind,
    };
    Error::new(class, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_failed_step_says_that_a_call_is_not_built() {
        let kind = |errno| step(StepError { step: "mount".to_owned(), object: "/x".to_owned(), errno }).kind;
        for errno in 1..134 {
            assert_ne!(kind(errno), Kind::Unimplemented, "{errno}");
        }
        assert_eq!(kind(libc::EOPNOTSUPP), Kind::FailedPrecondition);
        assert_eq!(kind(libc::ENOSYS), Kind::FailedPrecondition);
        assert_eq!((kind(libc::EPERM), kind(libc::ENOSPC), kind(libc::ENOENT)), (Kind::PermissionDenied, Kind::ResourceExhausted, Kind::Internal));
    }
}
