//! The daemon and the operator commands.

fn main() {}
