//! The shim: see [`mesocri::shim`].

fn main() -> std::process::ExitCode {
    mesocri::shim::main(std::env::args_os().skip(1))
}
