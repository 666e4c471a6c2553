//! F0: the only unsafe code. Thin, safe wrappers over system calls that `nix` and `rustix` lack.
//!
//! Invariant: every `unsafe` block has a SAFETY line; no policy, no logging, no allocation after a fork in the child paths.

pub mod bpf;
pub mod clone;
pub mod daemon;
pub mod loopdev;
pub mod mount;
pub mod pages;
pub mod process;
pub mod pty;
pub mod random;
#[cfg(test)]
pub mod testing;
