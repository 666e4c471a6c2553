//! What all pulls of the node together may take from the network: bytes a second, and transfers at once.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::model::error::{Error, Result};

/// Unused time that may be made up for in one go, so that small pulls are not slowed down.
const BURST: Duration = Duration::from_millis(250);

/// The limits.
pub struct Throttle {
    /// Bytes a second; `None` is no limit.
    rate: Option<u64>,
    /// When everything admitted so far has had its time.
    due: Mutex<Instant>,
    transfers: Option<Semaphore>,
}

impl Throttle {
    /// `rate` bytes a second, `transfers` at once; 0 is no limit.
    pub fn new(rate: u64, transfers: usize) -> Self {
        let transfers = (transfers > 0).then(|| Semaphore::new(transfers.min(Semaphore::MAX_PERMITS)));
        Self { rate: (rate > 0).then_some(rate), due: Mutex::new(Instant::now()), transfers }
    }

    /// Waits for leave to begin a transfer; it ends with the value.
    ///
    /// # Errors
    /// None in practice: the semaphore is never closed.
    pub async fn transfer(&self) -> Result<Option<SemaphorePermit<'_>>> {
        match &self.transfers {
            Some(transfers) => transfers.acquire().await.map(Some).map_err(|_| Error::internal("fetch layer: shutting down")),
            None => Ok(None),
        }
    }

    /// Waits until `bytes` that have arrived had their time. The next ones wait in the kernel's buffers, and so the sender waits.
    pub async fn took(&self, bytes: usize) {
        if let Some(until) = self.admit(bytes, Instant::now()) {
            tokio::time::sleep_until(until).await;
        }
    }

    /// When `bytes` will have had their time, if that is not yet.
    fn admit(&self, bytes: usize, now: Instant) -> Option<Instant> {
        let rate = self.rate?;
        let time = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        *due = (*due).max(earliest) + time;
        (*due > now).then_some(*due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admits_the_rate_whoever_asks() {
        let throttle = Throttle::new(1_000_000, 0);
        let start = Instant::now() + Duration::from_secs(1000);
        // A quiet time earns no more than the burst.
        let mut last = start;
        for n in 0..1000 {
            if let Some(until) = throttle.admit(10_000, start) {
                last = until;
            } else {
                assert!(n < 26, "{n}");
            }
        }
        // 10 MB at 1 MB/s, less the burst.
        assert_eq!((last - start).as_millis(), 9750);
        assert!(throttle.admit(1, last + BURST * 2).is_none());
        // The control: no limit, no waiting.
        assert!(Throttle::new(0, 0).admit(usize::MAX, start).is_none());
    }

    #[tokio::test]
    async fn transfers_wait_for_each_other() {
        let throttle = Throttle::new(0, 2);
        let (one, _two) = (throttle.transfer().await.unwrap(), throttle.transfer().await.unwrap());
        let mut third = Box::pin(throttle.transfer());
        assert!(futures_util::poll!(third.as_mut()).is_pending());
        drop(one);
        assert!(third.await.unwrap().is_some());
        assert!(Throttle::new(0, 0).transfer().await.unwrap().is_none());
    }
}
