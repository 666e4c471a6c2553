//! The shim: one small supervisor process per pod that speaks containerd's shim protocol (task service v2 and v3, sandbox
//! service) over ttrpc. It holds the pod's namespaces, forks containers and execs, writes container logs and reports exits.
//!
//! ```text
//! main ── start   makes the socket, forks; the child serves on it, the parent prints the address
//!      ├─ delete  cleans up after a shim that was killed
//!      └─ serve ── task ────── supervisor (table of containers and execs) ── process (reaping) ── io (pumps)
//!               ├─ sandbox ── (namespaces of the pod)
//!               └─ extra      (log rotation)
//! ```
//!
//! Invariants: built without the `daemon` feature; single-threaded (it forks), tokio's current-thread runtime only; changes
//! of the table happen between two awaits, so no request sees half of another. Creating a container blocks the shim for
//! the few milliseconds that init needs, and nothing else of the pod: each pod has a shim of its own.
//!
//! Build it statically at a fixed address (`-C target-feature=+crt-static -C relocation-model=static`, profile `shim`): 50 pods cost
//! 144 KiB PSS each empty, 191 KiB with one container, 10 KiB per further one. As static-pie it is 359, 406 and 10: the relocated
//! tables of 3 MB of code become private to each process. The price is a fixed address of a program whose only input is the
//! daemon's socket; libraries, heap and stack stay random.

pub mod args;
mod delete;
mod extra;
mod failure;
mod io;
mod kill;
mod making;
mod metrics;
mod process;
mod sandbox;
mod serve;
mod start;
mod supervisor;
mod task;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use crate::model::error::Result;

/// The program: runs the verb that `arguments` (without the program's name) ask for.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // containerd shows what a failed verb wrote to standard error; nobody is left to tell if that fails.
            let _ = writeln!(std::io::stderr(), "containerd-shim-mesocri-v1: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: impl IntoIterator<Item = OsString>) -> Result<()> {
    let args = args::Args::parse(arguments)?;
    match args.verb {
        args::Verb::Start => start::start(&args),
        args::Verb::Delete => delete::delete(&args),
        args::Verb::Serve => serve::foreground(&args),
        args::Verb::Version => {
            let _ = writeln!(std::io::stdout(), "containerd-shim-mesocri-v1 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}
