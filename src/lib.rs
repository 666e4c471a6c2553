//! mesocri: one node container engine, the *universal containerizer*, behind two fronts.
//!
//! # Floors
//!
//! A module names only lower floors, and siblings on one floor never name each other (`tests/tidy.rs` checks it):
//!
//! | floor | modules | what |
//! |---|---|---|
//! | F8 | [`daemon`] (with `daemon::cli`) | the only reader of file, flags and environment; builds everything else |
//! | F7 | [`cri`], [`operator`] | Kubernetes CRI v1: validates, converts, calls the containerizer, converts back; progress and imports for the operator |
//! | F5 | [`containerizer`] | the façade the fronts call: pod actors, recovery, publishing |
//! | F4 | [`isolators`] | one aspect of isolation per file; they describe, the launcher acts |
//! | F3 | [`provisioner`], [`launcher`], [`network`], [`shim`] | images and root filesystems; shims; pod networks; processes |
//! | F2½ | [`init`] | the child half between fork and exec; started by the shim |
//! | F2 | [`disk`], [`cgroups`] | the on-disk tree and its records; the control group file systems |
//! | F1 | [`model`] | plain data and errors |
//! | F0 | [`sys`], [`stdx`], [`wire`] | the only unsafe code; what std lacks; generated code |
//!
//! `shim` and `init` are built without the `daemon` feature, so nothing heavy can be linked into them.
//!
//! # Invariants
//!
//! - Nothing below F7 knows a front's protocol. `wire::cri` is named by `cri` and by the client in `daemon::cli` alone.
//! - `tokio` is not used in `sys`, `model`, `disk`, `cgroups` and `init`.
//! - Only `daemon` reads configuration and constructs components.
//! - State on disk is written before the act it describes, by atomic rename.

#![deny(unsafe_code)]

pub mod cgroups;
pub mod disk;
pub mod init;
pub mod model;
pub mod shim;
pub mod stdx;
pub mod sys;

#[cfg(feature = "daemon")]
pub mod containerizer;
#[cfg(feature = "daemon")]
pub mod cri;
#[cfg(feature = "daemon")]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod isolators;
#[cfg(feature = "daemon")]
pub mod launcher;
#[cfg(feature = "daemon")]
pub mod network;
#[cfg(feature = "daemon")]
pub mod operator;
#[cfg(feature = "daemon")]
pub mod provisioner;
#[cfg(feature = "daemon")]
pub mod wire;
