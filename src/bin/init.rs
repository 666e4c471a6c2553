//! First process of shared process namespaces, and small jobs beside the shim.
//!
//! `mesocri-init pause` waits until it is told to end (`SIGTERM`, `SIGINT`); as process 1 of a namespace it reaps what is left to it.

use std::process::ExitCode;

/// Exit code for a wrong command line.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match (args.next(), args.next()) {
        (Some(verb), None) if verb == "pause" => pause(),
        _ => {
            eprintln!("usage: mesocri-init pause");
            ExitCode::from(USAGE)
        }
    }
}

fn pause() -> ExitCode {
    match mesocri::init::pause() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mesocri-init: {e}");
            ExitCode::FAILURE
        }
    }
}
