//! Processes in the making: the shim hears of them while it looks after everything else. One whose steps hang in the kernel (a dead
//! network file system below its working directory, a device that does not answer) holds up nobody but its own caller, and can be
//! given up.

use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};

use super::failure::step;
use super::io::watched;
use super::process::reap;
use crate::init::{Line, Remains};
use crate::model::error::{Act, Error, Kind, Result};

/// A container in the making, as those see it who want its end.
pub struct Making {
    cancel: Notify,
    over: watch::Sender<bool>,
}

impl Making {
    /// Just begun.
    pub fn begin() -> Arc<Self> {
        Arc::new(Self { cancel: Notify::new(), over: watch::Sender::new(false) })
    }

    /// Told when nobody wants it any more.
    pub fn cancelled(&self) -> &Notify {
        &self.cancel
    }

    /// Gives it up; whoever makes it hears so.
    pub fn cancel(&self) {
        self.cancel.notify_one();
    }

    /// It is made, or not.
    pub fn end(&self) {
        self.over.send_replace(true);
    }

    /// Resolves when it is made, or not.
    pub async fn ended(&self) {
        // The sender is borrowed, so the channel cannot close.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }
}

/// Waits for the outcome of `line`. When `cancel` is told first, it is killed, and reaped whenever the kernel lets go of it.
///
/// # Errors
/// The step that failed; `Cancelled`.
#[expect(deprecated, reason = "deprecated for types whose AsRawFd may change its answer; a line's cannot, and a promise of that would have to be made in sys")]
pub async fn born<L: Line>(line: L, cancel: &Notify, what: &str) -> Result<L::Born> {
    let mut line = AsyncFd::with_interest(line, Interest::READABLE).act("watch", what)?;
    loop {
        tokio::select! {
            biased;
            ready = line.readable_mut() => {
                let mut ready = ready.act("watch", what)?;
                if let Some(outcome) = ready.get_inner_mut().hear() {
                    return outcome.map_err(step);
                }
                ready.clear_ready();
            }
            () = cancel.notified() => break,
        }
    }
    // One that is there is handed over, also to a caller who does not want it: he knows how to end it as a whole.
    let mut line = line.into_inner();
    if let Some(outcome) = line.hear() {
        return outcome.map_err(step);
    }
    tokio::spawn(bury(line.abandon()));
    Err(Error::new(Kind::Cancelled, format!("make {what}: it was ended meanwhile")))
}

async fn bury(mut remains: Remains) {
    loop {
        let killed = remains.kill();
        if killed.is_empty() {
            break;
        }
        for pidfd in killed {
            if let Ok(pidfd) = watched(pidfd, Interest::READABLE, "process") {
                reap(&pidfd).await;
            }
        }
    }
    remains.discard();
}
