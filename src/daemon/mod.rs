//! F8: the daemon and the operator's commands: the only reader of file, flags and environment, and the only constructor of
//! components.

pub mod cli;
pub mod config;
pub mod flags;
mod quiet;
mod serve;
mod telemetry;
