//! The shim: one small supervisor process per pod that speaks containerd's shim protocol (task service v2 and v3, sandbox
//! service) over ttrpc. It holds the pod's namespaces, forks containers and execs, writes container logs and reports exits.
//!
//! Invariant: built without the `daemon` feature; single-threaded (it forks), tokio's current-thread runtime only.
