//! F2: control groups. v1, v2 and hybrid hosts behind one interface; used by the shim (create, apply, kill, delete) and the
//! daemon (update, statistics).
//!
//! Invariant: synchronous, no tokio, never touches a group that it did not create, except the documented parents.
