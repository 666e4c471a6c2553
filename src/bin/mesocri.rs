//! The daemon and the operator's commands: see [`mesocri::daemon`].

fn main() -> std::process::ExitCode {
    mesocri::daemon::cli::main()
}
