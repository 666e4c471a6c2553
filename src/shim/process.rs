//! A process the shim has forked: reaped by its pidfd, which existed before the process ran, so no exit can be missed.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};

use super::io::{Input, Running, Tap, watched};
use crate::model::error::{Act, Result};
use crate::stdx::clock::now_ns;
use crate::stdx::failpoint;

/// How long an exit waits for the output of processes that outlive the first one. Long enough for a pipe full of bytes to
/// be written to a slow disk, short enough for a stop.
const DRAIN: Duration = Duration::from_secs(2);
/// Exit code when the kernel cannot say (somebody else reaped the process).
const UNKNOWN: u32 = 255;

/// Turns of the event loop in which those who wait for an exit get their answer.
const TELLING_TURNS: usize = 16;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255, 128+n for signal n.
    pub code: u32,
    /// Nanoseconds since the epoch.
    pub at: i64,
}

/// Tells any number of waiters, before and after the fact.
pub type Outcome = watch::Sender<Option<Exit>>;

/// A forked process.
pub struct Process {
    /// In the host's process namespace.
    pub pid: u32,
    /// Terminal master.
    pub console: Option<Arc<AsyncFd<OwnedFd>>>,
    pidfd: AsyncFd<OwnedFd>,
    /// Set when it is reaped.
    exited: Outcome,
    /// Set when its output is drained as well (bounded).
    done: Arc<Outcome>,
    input: Mutex<Input>,
    pumps: Vec<AbortHandle>,
    taps: Vec<Weak<Tap>>,
}

impl Process {
    /// Starts to watch a process. `done` may have waiters already. `mounts` keeps the container's mount namespace alive until
    /// the exit is told: its end unmounts everything and waits for the kernel's grace period, milliseconds that would
    /// otherwise lie between the death of the process and the news of it.
    ///
    /// # Errors
    /// When the pidfd cannot be watched.
    pub fn watch(pid: u32, pidfd: OwnedFd, mounts: Option<OwnedFd>, running: Running, done: Arc<Outcome>) -> Result<Arc<Self>> {
        let Running { pumps, taps, keepers, input, console, log: _ } = running;
        let process = Arc::new(Self {
            pid,
            console,
            pidfd: watched(pidfd, Interest::READABLE, "process")?,
            exited: watch::Sender::new(None),
            done,
            input: Mutex::new(input),
            pumps: pumps.iter().map(JoinHandle::abort_handle).collect(),
            taps,
        });
        tokio::spawn(supervise(process.clone(), mounts, pumps, keepers));
        Ok(process)
    }

    /// How it ended, if it has been reaped.
    pub fn exit(&self) -> Option<Exit> {
        *self.exited.borrow()
    }

    /// Resolves when it has been reaped.
    pub async fn reaped(&self) -> Exit {
        told(&self.exited).await
    }

    /// Sends a signal; an ended process is fine.
    ///
    /// # Errors
    /// From the kernel.
    pub fn signal(&self, number: i32) -> Result<()> {
        crate::sys::daemon::signal(self.pidfd.get_ref().as_fd(), number).act("signal process", self.pid)
    }

    /// No more input.
    pub fn close_input(&self) {
        self.input.lock().unwrap_or_else(PoisonError::into_inner).close();
    }

    /// Nobody wants its streams any more. What it and those around it wrote into a log before they died is written down.
    pub fn abandon_streams(&self) {
        self.close_input();
        self.taps.iter().filter_map(Weak::upgrade).for_each(|tap| tap.last());
        self.pumps.iter().for_each(AbortHandle::abort);
    }
}

/// Waits for the word of `outcome`.
pub async fn told(outcome: &Outcome) -> Exit {
    let mut word = outcome.subscribe();
    // The sender is borrowed, so the channel cannot close; the fallback keeps this total.
    word.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).unwrap_or(Exit { code: UNKNOWN, at: now_ns() })
}

async fn supervise(process: Arc<Process>, mounts: Option<OwnedFd>, pumps: Vec<JoinHandle<()>>, keepers: Vec<OwnedFd>) {
    let code = reap(&process.pidfd).await;
    let exit = Exit { code, at: now_ns() };
    failpoint::hit("shim.exit.reaped");
    process.exited.send_replace(Some(exit));
    process.close_input();
    drop(keepers);
    let drained = async {
        for pump in pumps {
            // An aborted pump has nothing more to say either.
            let _ = pump.await;
        }
    };
    let _ = tokio::time::timeout(DRAIN, drained).await;
    process.done.send_replace(Some(exit));
    for _ in 0..TELLING_TURNS {
        tokio::task::yield_now().await;
    }
    drop(mounts);
}

/// Reaps a child when it has ended; its exit code, 128+n for signal n.
pub async fn reap(pidfd: &AsyncFd<OwnedFd>) -> u32 {
    loop {
        let Ok(mut ready) = pidfd.readable().await else { return UNKNOWN };
        match waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => {
                let code = status.exit_status().or_else(|| status.terminating_signal().map(|n| 128 + n));
                return code.and_then(|code| u32::try_from(code).ok()).unwrap_or(UNKNOWN);
            }
            Ok(None) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(_) => return UNKNOWN,
        }
    }
}
