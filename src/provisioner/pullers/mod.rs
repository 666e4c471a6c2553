//! Pullers bring images in: from registries, from archives. Each ends in the same verified layers in staging.

pub mod archive;
mod auth;
pub mod manifest;
pub mod registry;
