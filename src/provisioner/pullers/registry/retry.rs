//! When to try again: what kinds of failure pass by themselves, how long to wait, and in which order to ask several hosts.

use std::time::{Duration, SystemTime};

use reqwest::header::HeaderValue;

use crate::model::error::{Error, Kind, Result};

/// The first pause; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause of our own choice.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The longest pause a server may ask for. Whoever wants more is answered with the failure: the caller has its own schedule.
const LONGEST_ASKED: Duration = Duration::from_secs(30);

/// What went wrong, and whether it may pass.
#[derive(Debug)]
pub struct Failure {
    /// The error to report if nothing else helps.
    pub error: Error,
    /// Whether and when to try again.
    pub again: Again,
}

/// Whether and when to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// It will be the same next time.
    Never,
    /// After our own pause.
    Soon,
    /// Not before this, the server says.
    After(Duration),
}

impl From<Error> for Failure {
    /// An unreachable peer may come back; everything else stays as it is.
    fn from(error: Error) -> Self {
        let again = if error.kind == Kind::Unavailable { Again::Soon } else { Again::Never };
        Self { error, again }
    }
}

impl Failure {
    /// One that stays.
    pub fn lasting(error: Error) -> Self {
        Self { error, again: Again::Never }
    }
}

/// Reads `Retry-After`: seconds, or a date.
pub fn retry_after(value: Option<&HeaderValue>, now: SystemTime) -> Option<Duration> {
    let text = value?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// The pause before round `round` (from 1): doubled each time, between half and all of it, so that nodes that failed together do
/// not come back together.
fn pause(round: u32, random: u8) -> Duration {
    let full = FIRST_PAUSE.saturating_mul(1 << round.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    full / 2 + full * u32::from(random) / 510
}

/// The order in which hosts are asked, over several rounds. In a round each host is asked once, so that a mirror that is down
/// costs nothing while another host answers; between rounds is a pause.
pub struct Tries {
    order: Vec<usize>,
    at: usize,
    round: u32,
    rounds: u32,
    /// Host and failure, of this round and lasting ones.
    failures: Vec<(usize, Failure)>,
}

impl Tries {
    /// Of hosts `order`, again at most `retries` times.
    pub fn new(order: Vec<usize>, retries: u32) -> Self {
        Self { order, at: 0, round: 0, rounds: retries, failures: Vec::new() }
    }

    /// The next host to ask, after a pause if need be; `None` when it is time to give up.
    pub async fn next(&mut self) -> Option<usize> {
        let (pause, host) = self.step()?;
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        Some(host)
    }

    /// The next host, and how long to wait before asking it.
    fn step(&mut self) -> Option<(Duration, usize)> {
        let mut pause = Duration::ZERO;
        if self.at == self.order.len() {
            pause = self.wait_for_round()?;
            // What lasts is not asked again, but stays to be told.
            self.order.retain(|host| self.failures.iter().any(|(failed, f)| failed == host && f.again != Again::Never));
            self.failures.retain(|(_, f)| f.again == Again::Never);
            self.round += 1;
            self.at = 0;
        }
        let host = self.order.get(self.at).copied()?;
        self.at += 1;
        Some((pause, host))
    }

    /// How long to wait for another round, if there is one.
    fn wait_for_round(&self) -> Option<Duration> {
        if self.round >= self.rounds || self.failures.iter().all(|(_, f)| f.again == Again::Never) {
            return None;
        }
        let mut random = [0];
        crate::sys::random::fill(&mut random);
        // The shortest time that some server asks for: others may be asked too early once, which they say again.
        let asked = self.failures.iter().filter_map(|(_, f)| match f.again {
            Again::Never => None,
            Again::Soon => Some(Duration::ZERO),
            Again::After(wait) => Some(wait),
        });
        let asked = asked.min().unwrap_or_default();
        (asked <= LONGEST_ASKED).then(|| asked.max(pause(self.round + 1, random[0])))
    }

    /// What became of asking `host`.
    pub fn failed(&mut self, host: usize, failure: Failure) {
        self.failures.push((host, failure));
    }

    /// Something was achieved: the patience begins anew.
    pub fn renew(&mut self) {
        self.round = 0;
    }

    /// The failure to report: that of the last host in the list (the registry itself), with what the others, as `name` calls them,
    /// said.
    ///
    /// # Errors
    /// Always.
    pub fn give_up<T>(mut self, act: &str, name: impl Fn(usize) -> String) -> Result<T> {
        let Some(main) = self.failures.iter().enumerate().max_by_key(|(_, (host, _))| *host).map(|(n, _)| n) else {
            return Err(Error::precondition(format!("{act}: no host is allowed to be asked for it")));
        };
        let (_, failure) = self.failures.swap_remove(main);
        if self.failures.is_empty() {
            return Err(failure.error);
        }
        let others: Vec<String> = self.failures.iter().map(|(host, f)| format!("{}: {}", name(*host), f.error)).collect();
        let kind = failure.error.kind;
        Err(Error::new(kind, format!("{} ({})", failure.error, others.join("; "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(again: Again) -> Failure {
        Failure { error: Error::new(Kind::Unavailable, format!("{again:?}")), again }
    }

    #[test]
    fn retry_after_in_both_forms() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let read = |text: &'static str| retry_after(Some(&HeaderValue::from_static(text)), now);
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:47 GMT"), Some(Duration::from_secs(10)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:27 GMT"), Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
        assert_eq!(read("-1"), None);
        assert_eq!(retry_after(None, now), None);
    }

    #[test]
    fn pauses_grow_and_scatter() {
        for round in 1..40 {
            let (low, high) = (pause(round, 0), pause(round, 255));
            assert!(low * 2 == high && high <= LONGEST_PAUSE, "{round}: {low:?} {high:?}");
            assert!(pause(round + 1, 0) >= low);
        }
        assert_eq!(pause(1, 255), FIRST_PAUSE);
        assert_eq!(pause(30, 255), LONGEST_PAUSE);
    }

    #[test]
    fn rounds_end_with_what_lasts_and_with_patience() {
        // Two hosts; what lasts is not asked again.
        let mut tries = Tries::new(vec![0, 1], 2);
        let mut asked = Vec::new();
        while let Some((pause, host)) = tries.step() {
            asked.push((pause.as_secs(), host));
            tries.failed(host, failure(if host == 0 { Again::Never } else { Again::After(Duration::from_secs(20)) }));
        }
        assert_eq!(asked, [(0, 0), (0, 1), (20, 1), (20, 1)]);
        // A server that wants too much is not waited for; progress renews the patience.
        let mut tries = Tries::new(vec![0], 2);
        assert!(tries.step().is_some());
        tries.failed(0, failure(Again::After(LONGEST_ASKED * 2)));
        assert!(tries.step().is_none());
        let mut tries = Tries::new(vec![0], 1);
        for n in 0..5 {
            let (pause, host) = tries.step().unwrap();
            assert_eq!((host, pause.is_zero()), (0, n == 0));
            assert!(pause <= FIRST_PAUSE);
            tries.failed(0, failure(Again::Soon));
            tries.renew();
        }
        assert!(tries.step().is_some());
        tries.failed(0, failure(Again::Soon));
        assert!(tries.step().is_none());
    }

    #[test]
    fn the_registry_itself_has_the_last_word() {
        let mut tries = Tries::new(vec![1, 0], 1);
        for (again, kind) in [(Again::Never, Kind::NotFound), (Again::Soon, Kind::Unavailable), (Again::Soon, Kind::DataLoss)] {
            let (_, host) = tries.step().unwrap();
            tries.failed(host, Failure { error: Error::new(kind, format!("host {host} {kind:?}")), again });
        }
        assert!(tries.step().is_none());
        let error = tries.give_up::<()>("fetch", |n| format!("mirror m{n}")).unwrap_err();
        assert_eq!((error.kind, error.to_string().as_str()), (Kind::NotFound, "host 1 NotFound (mirror m0: host 0 DataLoss)"));
        assert_eq!(Tries::new(vec![], 0).give_up::<()>("fetch", |n| n.to_string()).unwrap_err().kind, Kind::FailedPrecondition);
    }
}
