//! Wire types to plain data and back, by topic. Requests are judged here as far as they can be without looking at the machine
//! (cri-behaviour §10-§13); no function here does IO.

pub mod container;
pub mod image;
pub mod mounts;
pub mod pod;
pub mod resources;
pub mod security;
pub mod signal;
pub mod stats;
pub mod status;

use std::collections::BTreeMap;

use crate::model::error::{Error, Result};

/// The message `value`, which the contract makes optional and the runtime cannot do without.
///
/// # Errors
/// `InvalidArgument` naming `field`.
pub fn required<T>(value: Option<T>, field: &str) -> Result<T> {
    value.ok_or_else(|| Error::invalid(format!("the request lacks {field}")))
}

/// The text `value`, which must not be empty.
///
/// # Errors
/// `InvalidArgument` naming `field`.
pub fn filled(value: String, field: &str) -> Result<String> {
    if value.is_empty() { Err(Error::invalid(format!("{field} is empty"))) } else { Ok(value) }
}

/// A value of a closed enum; the wire lets any number through.
///
/// # Errors
/// `InvalidArgument` naming `field`.
pub fn choice<E: TryFrom<i32>>(value: i32, field: &str) -> Result<E> {
    E::try_from(value).map_err(|_| Error::invalid(format!("{field} has no value {value}")))
}

/// Text for one line of a file or one argument of a system call: no control characters, so no NUL and no line break.
///
/// # Errors
/// `InvalidArgument` naming `field`.
pub fn one_line(value: &str, field: &str) -> Result<()> {
    if value.chars().any(char::is_control) { Err(Error::invalid(format!("{field} has a control character"))) } else { Ok(()) }
}

/// Whether an object with this id and these labels is one that a filter asks for: the id by prefix, every label exactly.
pub fn selected(id: &str, labels: &BTreeMap<String, String>, wanted_id: &str, wanted_labels: &BTreeMap<String, String>) -> bool {
    id.starts_with(wanted_id) && wanted_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
}
