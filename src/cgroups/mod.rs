//! F2: control groups. v1, v2 and hybrid hosts behind one interface; used by the shim (create, apply, kill, delete) and the
//! daemon (update, statistics).
//!
//! | file | what |
//! |---|---|
//! | `host.rs` | which hierarchies are mounted where, and which controller lives on which |
//! | `path.rs` | names of groups: what a caller may ask for |
//! | `manager.rs` | one group on all hierarchies: create, add, list, delete |
//! | `kill.rs` | kill, freeze, thaw |
//! | `controllers/` | one file per controller, one row each: apply, statistics |
//! | `oom.rs` | out-of-memory kills: the counter and the descriptor that says when to look |
//! | `file.rs` | reading and writing the files |
//!
//! Invariants:
//! - synchronous, no tokio, no threads, no lock is ever waited for: it also runs in a forked child;
//! - never changes or removes a group that it did not create. Parents that had to be made on the way are marked with an
//!   extended attribute (`trusted.mesocri`) and only those are removed again when the last group below them goes.

pub mod controllers;
mod file;
pub mod host;
mod kill;
pub mod manager;
pub mod notes;
pub mod oom;
pub mod path;

pub use controllers::{Detail, to_oci};
pub use host::Host;
pub use manager::{Entrance, Manager};
pub use oom::OomWatch;
pub use path::CgroupPath;
