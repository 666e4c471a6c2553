//! Compiles `protos/` into `OUT_DIR`: message types, server and client of the CRI, and the descriptor set that
//! `tests/cri_wire.rs` compares with the contract. Without the `daemon` feature nothing here is needed and nothing runs.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=protos");
    #[cfg(feature = "daemon")]
    {
        cri()?;
        operator()?;
    }
    Ok(())
}

/// protox instead of protoc: building needs nothing but cargo.
#[cfg(feature = "daemon")]
fn cri() -> Result<(), Box<dyn Error>> {
    let mut compiler = protox::Compiler::new(["protos/cri"])?;
    compiler.include_imports(true).include_source_info(true).open_files(["protos/cri/api.proto"])?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    // Encoded by the compiler: prost's own descriptor types would lose options they do not know (`debug_redact`).
    std::fs::write(out.join("cri.binpb"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        // Sorted maps: answers are the same bytes each time, and the engine's own maps are sorted too.
        .btree_map(".")
        // Printed by hand in `wire::cri`, without its secrets.
        .skip_debug([".runtime.v1.AuthConfig"])
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

#[cfg(feature = "daemon")]
fn operator() -> Result<(), Box<dyn Error>> {
    let mut compiler = protox::Compiler::new(["protos/operator"])?;
    compiler.include_imports(true).include_source_info(true).open_files(["protos/operator/operator.proto"])?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
