//! For tests: running code of ours in a child between fork and exec.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Runs `work` in the child before it executes the program.
pub fn before_exec(command: &mut Command, work: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: the test harness's other threads hold no lock that `work` needs: it opens and writes files, and allocates with an
    // allocator that glibc keeps usable after fork.
    unsafe { command.pre_exec(work) };
}
