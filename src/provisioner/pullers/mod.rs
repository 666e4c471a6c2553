//! Pullers bring images in: from registries, from archives. Each ends in the same verified layers in staging.

pub mod appc;
pub mod archive;
pub mod artifact;
mod auth;
mod child;
pub mod docker_config;
pub mod fetch;
mod helper;
pub mod manifest;
pub mod registry;
pub mod schema1;
pub mod settings;
