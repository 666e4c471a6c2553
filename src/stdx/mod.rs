//! F0: what std lacks. Small, general, no knowledge of containers.

#[cfg(feature = "daemon")]
pub mod blocking;
pub mod clock;
pub mod crilog;
pub mod failpoint;
pub mod kernel;
#[cfg(test)]
pub mod testing;
pub mod undo;
