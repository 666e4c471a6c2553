//! What a step returns when it fails; the table adds the step's name and makes a [`StepError`] of it.

use std::fmt::Display;
use std::io;

use super::StepError;

/// Longest object text that is sent to the parent, so that a message always fits its buffer.
const OBJECT_MAX: usize = 4096;

/// Result of a step.
pub(super) type Result<T = (), E = Fault> = std::result::Result<T, E>;

/// Object and cause of a failure.
#[derive(Debug)]
pub(super) struct Fault {
    object: String,
    errno: i32,
}

impl Fault {
    pub(super) fn new(object: impl Display, errno: i32) -> Self {
        let mut object = object.to_string();
        if object.len() > OBJECT_MAX {
            let end = (0..=OBJECT_MAX).rev().find(|i| object.is_char_boundary(*i)).unwrap_or(0);
            object.truncate(end);
        }
        Self { object, errno }
    }

    pub(super) fn errno(&self) -> i32 {
        self.errno
    }

    pub(super) fn at(self, step: &str) -> StepError {
        StepError { step: step.to_owned(), object: self.object, errno: self.errno }
    }
}

/// An error of a lower floor: its text is the object, its innermost errno the cause.
impl From<crate::model::error::Error> for Fault {
    fn from(e: crate::model::error::Error) -> Self {
        let mut errno = libc::EIO;
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&e);
        while let Some(c) = cause {
            if let Some(code) = c.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                errno = code;
            }
            cause = c.source();
        }
        Self::new(&e.what, errno)
    }
}

/// `.on(path)` on results of system calls names the object where it is known.
pub(super) trait On<T> {
    fn on(self, object: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> On<T> for std::result::Result<T, E> {
    fn on(self, object: impl Display) -> Result<T> {
        self.map_err(|e| Fault::new(object, e.into().raw_os_error().unwrap_or(libc::EIO)))
    }
}
