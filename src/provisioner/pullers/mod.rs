//! Pullers bring images in: from registries, from archives. Each ends in the same verified layers in staging.

pub mod archive;
mod auth;
pub mod docker_config;
mod helper;
pub mod manifest;
pub mod registry;
pub mod schema1;
pub mod settings;
