//! The bytes of one blob, over as many connections and hosts as it takes. What was passed on is never fetched again if the
//! server can begin in the middle, and never passed on again if it cannot.

use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::mpsc;

use super::Endpoint;
use super::answer::{broken, unavailable};
use super::exchange::Session;
use super::retry::{Again, Failure};
use crate::model::error::{Error, Kind, Result};
use crate::provisioner::pullers::manifest::Descriptor;

/// Progress that earns new patience. Less is what a server gives that wants to hold us for ever.
const PROGRESS: u64 = 64 << 10;
/// Bytes a second, over the stall timeout, below which a server counts as silent.
const SLOWEST: u64 = 64;

/// A blob under way.
pub struct Transfer<'a, P> {
    blob: &'a Descriptor,
    to: mpsc::Sender<Bytes>,
    progress: P,
    /// Bytes passed on.
    done: u64,
    /// The same, when patience began.
    earned: u64,
    /// Some server refused the range: ask for all, pass by what is there.
    whole: bool,
}

impl<'a, P: FnMut(u64)> Transfer<'a, P> {
    /// Nothing is there yet.
    pub fn new(blob: &'a Descriptor, to: mpsc::Sender<Bytes>, progress: P) -> Self {
        Self { blob, to, progress, done: 0, earned: 0, whole: false }
    }

    /// Whether enough has come since this was last asked.
    pub fn has_progressed(&mut self) -> bool {
        let has = self.done >= self.earned + PROGRESS;
        if has {
            self.earned = self.done;
        }
        has
    }

    /// One attempt, from where the last one stopped. Ends well when all is passed on, or the receiver has left.
    ///
    /// # Errors
    /// Failures of the connection and of the server; wrong bytes are the receiver's to find.
    pub async fn go_on(&mut self, endpoint: &Endpoint, session: &Session, act: &str) -> Result<(), Failure> {
        let mut headers = HeaderMap::new();
        let ranged = self.done > 0 && !self.whole;
        if ranged {
            headers.extend(HeaderValue::try_from(format!("bytes={}-", self.done)).ok().map(|v| (RANGE, v)));
        }
        let path = format!("blobs/{}", self.blob.digest);
        let asked = endpoint.timed(act, session.ask(endpoint.shared(), Method::GET, &path, headers, act)).await;
        let begun = asked.and_then(|response| self.begin(&response, act).map(|skip| (response, skip)));
        let (mut response, mut skip) = match begun {
            Err(failure) if ranged && matches!(failure.error.kind, Kind::Internal | Kind::DataLoss) => {
                // 416, or another part than was asked for: this server cannot begin in the middle.
                self.whole = true;
                return Err(Failure { again: Again::Soon, ..failure });
            }
            other => other?,
        };
        let mut pace = Pace::new(endpoint.stall);
        loop {
            let began = Instant::now();
            let next = endpoint.timed(act, async { response.chunk().await.map_err(|e| broken(act, e)) }).await?;
            let Some(mut chunk) = next else { break };
            pace.took(began.elapsed(), chunk.len(), act)?;
            endpoint.shared.throttle.took(chunk.len()).await;
            if skip > 0 {
                let passed = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
                skip -= passed as u64;
                chunk = chunk.slice(passed..);
            }
            if chunk.is_empty() {
                continue;
            }
            self.done += chunk.len() as u64;
            if self.to.send(chunk).await.is_err() {
                return Ok(());
            }
            (self.progress)(self.done);
        }
        if self.done < self.blob.size {
            let text = format!("{act}: the answer ended after {} of {} bytes", self.done, self.blob.size);
            return Err(unavailable(text).into());
        }
        Ok(())
    }

    /// How many bytes of this answer are there already. An answer that cannot be of this blob is refused before any of it is
    /// passed on, so that another host can be asked.
    fn begin(&self, response: &Response, act: &str) -> Result<u64, Failure> {
        let wrong = |text: String| Failure::lasting(Error::new(Kind::DataLoss, format!("{act}: {text}")));
        if response.status() == StatusCode::PARTIAL_CONTENT {
            // Without the header there is nothing to go by but the digest.
            let Some((start, total)) = response.headers().get(CONTENT_RANGE).and_then(content_range) else { return Ok(0) };
            if total.is_some_and(|total| total != self.blob.size) {
                return Err(wrong(format!("the blob is said to have {} bytes, its descriptor says {}", total.unwrap_or(0), self.blob.size)));
            }
            return self.done.checked_sub(start).ok_or_else(|| wrong(format!("the answer begins at byte {start}, {} was asked for", self.done)));
        }
        match response.content_length() {
            Some(length) if length > self.blob.size => Err(wrong(format!("{length} bytes, its descriptor says {}", self.blob.size))),
            // A server without ranges starts over: what is there already is passed by.
            _ => Ok(self.done),
        }
    }
}

/// Start and total of `bytes 5-9/10`.
pub(super) fn content_range(value: &HeaderValue) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.to_str().ok()?.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = range.split_once('-')?.0.trim().parse().ok()?;
    Some((start, total.trim().parse().ok()))
}

/// Watches that bytes come at more than a trickle. Only waiting for the network counts, not waiting for the receiver.
pub struct Pace {
    stall: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Nothing has been waited for yet; `stall` is the timeout.
    pub fn new(stall: Duration) -> Self {
        Self { stall, waited: Duration::ZERO, bytes: 0 }
    }

    /// `bytes` came after a wait.
    ///
    /// # Errors
    /// `Unavailable` when it is a trickle.
    pub fn took(&mut self, waited: Duration, bytes: usize, act: &str) -> Result<(), Failure> {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.waited < self.stall {
            return Ok(());
        }
        if self.bytes < SLOWEST * self.stall.as_secs() {
            return Err(unavailable(format!("{act}: {} bytes in {} s", self.bytes, self.waited.as_secs())).into());
        }
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_as_servers_write_them() {
        for (text, expected) in [
            ("bytes 5-9/10", Some((5, Some(10)))),
            ("bytes 5-9/*", Some((5, None))),
            ("bytes */10", None),
            ("bytes 5", None),
            ("items 5-9/10", None),
            ("bytes -1-9/10", None),
        ] {
            assert_eq!(content_range(&HeaderValue::from_static(text)), expected, "{text}");
        }
    }

    #[test]
    fn a_trickle_is_silence() {
        let pace = |bytes| {
            let mut pace = Pace::new(Duration::from_secs(10));
            (0..100).try_for_each(|_| pace.took(Duration::from_secs(1), bytes, "x")).map_err(|f| f.error.kind)
        };
        assert_eq!(pace(1), Err(Kind::Unavailable));
        assert_eq!(pace(SLOWEST as usize), Ok(()));
    }
}
