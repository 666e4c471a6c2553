//! First process of shared process namespaces, and small jobs beside the shim.

fn main() {}
