//! F1: plain data. What every floor above talks about: ids, references, specifications, phases, launch plans, statistics, errors.
//!
//! Invariant: no IO, no tokio, no wire type. Everything that is kept on disk derives `Serialize`/`Deserialize`.

pub mod appc;
pub mod container;
pub mod digest;
pub mod error;
pub mod ids;
pub mod image;
pub mod phase;
pub mod plan;
pub mod pod;
pub mod reference;
pub mod resources;
pub mod shim;
pub mod stats;

pub use container::ContainerSpec;
pub use digest::Digest;
pub use error::{Error, Kind, Result};
pub use ids::{ContainerId, ImageId, PodId};
pub use pod::PodSpec;
pub use reference::Reference;
