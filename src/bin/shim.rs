//! The shim: see [`mesocri::shim`].

fn main() {}
