//! Mounts and layers.
