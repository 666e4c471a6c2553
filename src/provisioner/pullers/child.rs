//! Programs that pullers run: each in a process group of its own, killed with all it started when nobody waits for it any more.

use std::process::ExitStatus;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

/// A program at work; dropping it kills it and all it started.
pub struct Group {
    /// It.
    pub child: Child,
    ended: bool,
}

impl Group {
    /// Starts it.
    ///
    /// # Errors
    /// Those of fork and exec.
    pub fn start(command: &mut Command) -> std::io::Result<Self> {
        let child = command.process_group(0).kill_on_drop(true).spawn()?;
        Ok(Self { child, ended: false })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Those of wait.
    pub async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        self.ended = true;
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Not reaped yet, so the number is still its own.
        if !self.ended
            && let Some(group) = self.child.id().and_then(|id| i32::try_from(id).ok())
        {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}
