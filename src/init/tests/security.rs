//! What a container cannot reach.
