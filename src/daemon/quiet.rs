//! Memory given back after a burst of work: making pods runs megabytes of text that nothing else needs, and it would stay charged to
//! the daemon until the machine runs short. A kubelet asks every second, so it is changes that count, not calls.

use std::time::Duration;

use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio_util::sync::CancellationToken;

/// Time without a change of any container.
const QUIET: Duration = Duration::from_secs(10);

/// Gives memory back each time that changes have come to rest, until `shutdown`.
pub async fn give_back<E: Clone>(changes: Receiver<E>, shutdown: CancellationToken) {
    // Best effort: it is only memory.
    let _ = shutdown.run_until_cancelled(at_rest(changes, QUIET, || drop(crate::sys::pages::forget_text()))).await;
}

/// Calls `act` when something has changed and then nothing for `quiet` to twice that. Nothing wakes up while nothing changes, and
/// a burst of changes wakes once for each `quiet`.
async fn at_rest<E: Clone>(mut changes: Receiver<E>, quiet: Duration, mut act: impl FnMut()) {
    loop {
        if matches!(changes.recv().await, Err(RecvError::Closed)) {
            return;
        }
        loop {
            // What is in the queue is old by the next look.
            changes = changes.resubscribe();
            tokio::time::sleep(quiet).await;
            if changes.is_empty() {
                break;
            }
        }
        act();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::{broadcast, mpsc};

    #[tokio::test]
    async fn acts_once_after_each_burst_and_ends_with_its_source() {
        let (sender, receiver) = broadcast::channel(2);
        let (acted, mut acts) = mpsc::unbounded_channel();
        let quiet = Duration::from_millis(100);
        let task = tokio::spawn(at_rest(receiver, quiet, move || acted.send(std::time::Instant::now()).unwrap()));
        for _ in 0..2 {
            let start = std::time::Instant::now();
            // More than the channel keeps.
            for _ in 0..5 {
                sender.send(()).unwrap();
            }
            assert!(acts.recv().await.unwrap() - start >= quiet);
            assert!(acts.try_recv().is_err());
        }
        drop(sender);
        task.await.unwrap();
    }
}
