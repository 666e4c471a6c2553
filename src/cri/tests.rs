//! The whole front over a unix socket, with a fake engine behind it.

pub mod fake;
