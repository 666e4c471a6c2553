//! Tokens in hand: one for each realm, service, scope and credentials, shared by all pulls and fetched once however many wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::HeaderValue;

use crate::provisioner::Credentials;
use crate::provisioner::pullers::registry::retry::Failure;

/// Tokens kept; beyond, those that have run out go, then all. A node talks to a handful of registries, a scope for each image.
const MAX_TOKENS: usize = 1024;
/// A token is not used in its last moments: it must outlive the request and the difference of the clocks.
const MARGIN: Duration = Duration::from_secs(10);

/// What a token is for. No `Debug`: it holds secrets.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The server that gives it.
    pub realm: String,
    /// The registry's name for itself.
    pub service: String,
    /// What it allows.
    pub scope: String,
    /// Whom it is given to.
    pub credentials: Option<Credentials>,
}

/// A token as it came.
pub struct Fresh {
    /// The header.
    pub value: HeaderValue,
    /// How long it is good from now.
    pub life: Duration,
}

struct Kept {
    value: HeaderValue,
    until: Instant,
}

/// Locked while its token is being fetched.
type Slot = Arc<tokio::sync::Mutex<Option<Kept>>>;

/// All tokens.
#[derive(Default)]
pub struct Tokens {
    slots: Mutex<HashMap<Key, Slot>>,
}

impl Tokens {
    /// The token for `key`: the one in hand if it is good and not the one that was `refused`, else what `fetch` brings.
    ///
    /// # Errors
    /// Those of `fetch`.
    pub async fn get(&self, key: Key, refused: Option<&HeaderValue>, fetch: impl Future<Output = Result<Fresh, Failure>>) -> Result<HeaderValue, Failure> {
        let slot = self.slot(key);
        let mut kept = slot.lock().await;
        if let Some(token) = kept.as_ref().filter(|t| t.until > Instant::now() && Some(&t.value) != refused) {
            return Ok(token.value.clone());
        }
        *kept = None;
        let fresh = fetch.await?;
        let life = fresh.life.saturating_sub(MARGIN).max(fresh.life / 2);
        // A life beyond what the clock can hold is as good as a day.
        let until = Instant::now().checked_add(life).unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400));
        *kept = Some(Kept { value: fresh.value.clone(), until });
        Ok(fresh.value)
    }

    fn slot(&self, key: Key) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MAX_TOKENS && !slots.contains_key(&key) {
            let now = Instant::now();
            // A slot that is locked is in use.
            slots.retain(|_, slot| slot.try_lock().map_or(true, |kept| kept.as_ref().is_some_and(|t| t.until > now)));
            if slots.len() >= MAX_TOKENS {
                slots.clear();
            }
        }
        slots.entry(key).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::model::error::{Error, Kind};

    fn key(scope: &str, user: &str) -> Key {
        let credentials = Some(Credentials { username: user.into(), ..Credentials::default() });
        Key { realm: "r".into(), service: "s".into(), scope: scope.into(), credentials }
    }

    #[tokio::test]
    async fn one_fetch_for_all_who_ask_for_the_same() {
        let tokens = Tokens::default();
        let fetched = AtomicUsize::new(0);
        let get = |scope: &'static str, user: &'static str, life: u64, refused: Option<HeaderValue>| {
            let (tokens, fetched) = (&tokens, &fetched);
            async move {
                let fetch = async {
                    tokio::task::yield_now().await;
                    let n = fetched.fetch_add(1, Ordering::SeqCst);
                    Ok(Fresh { value: HeaderValue::from_str(&format!("t{n}")).unwrap(), life: Duration::from_secs(life) })
                };
                tokens.get(key(scope, user), refused.as_ref(), fetch).await.unwrap()
            }
        };
        let all = futures_util::future::join_all((0..20).map(|_| get("a", "u", 300, None))).await;
        assert!(all.iter().all(|t| t == "t0"));
        // Another scope, another user: another token.
        assert_eq!(get("b", "u", 300, None).await, "t1");
        assert_eq!(get("a", "v", 300, None).await, "t2");
        // A refused one is replaced, once, whoever else has it still.
        let refused = Some(HeaderValue::from_static("t0"));
        let all = futures_util::future::join_all((0..20).map(|_| get("a", "u", 300, refused.clone()))).await;
        assert!(all.iter().all(|t| t == "t3"));
        // One that has run out is not used.
        assert_eq!(get("c", "u", 0, None).await, "t4");
        assert_eq!(get("c", "u", 0, None).await, "t5");
        // An endless one is.
        assert_eq!(get("d", "u", u64::MAX, None).await, "t6");
        assert_eq!(get("d", "u", 0, None).await, "t6");
    }

    #[tokio::test]
    async fn failures_are_not_kept_and_the_number_is_bounded() {
        let tokens = Tokens::default();
        let fails = async { Err(Failure::lasting(Error::new(Kind::Unauthenticated, "no"))) };
        assert!(tokens.get(key("a", "u"), None, fails).await.is_err());
        let good = || async { Ok(Fresh { value: HeaderValue::from_static("t"), life: Duration::from_secs(60) }) };
        assert_eq!(tokens.get(key("a", "u"), None, good()).await.unwrap(), "t");
        for n in 0..2 * MAX_TOKENS {
            tokens.get(key(&n.to_string(), "u"), None, good()).await.unwrap();
        }
        assert!(tokens.slots.lock().unwrap().len() <= MAX_TOKENS);
    }
}
