//! The visible state: what lists, status and events show. Written by pod owners through this module only, read by anyone
//! without waiting for them.
//!
//! Published values are immutable and shared; a list is a copy of pointers. Events leave under the write lock, so their order
//! is the order of the changes; a subscriber that is too slow loses the oldest ones and is told how many.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tokio::sync::broadcast;

use super::{Container, Event, EventKind, Pod};
use crate::model::error::{Error, Result};
use crate::model::{ContainerId, PodId};
use crate::stdx::clock;

/// Time stamps that never repeat and never go back, whatever the clock does.
#[derive(Default)]
pub(super) struct Stamps(AtomicI64);

impl Stamps {
    /// Now, but later than every stamp before.
    pub(super) fn next(&self) -> i64 {
        let now = clock::now_ns();
        let last = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(now.max(last.saturating_add(1))));
        last.map_or(now, |last| now.max(last.saturating_add(1)))
    }

    /// Every later stamp lies after `at`.
    pub(super) fn pass(&self, at: i64) {
        self.0.fetch_max(at, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct State {
    pods: BTreeMap<String, Arc<Pod>>,
    containers: BTreeMap<String, Arc<Container>>,
}

/// The visible state.
pub(super) struct Publisher {
    state: RwLock<State>,
    events: broadcast::Sender<Event>,
    stamps: Stamps,
}

impl Publisher {
    /// Empty; `backlog` events are kept for a slow subscriber.
    pub(super) fn new(backlog: usize) -> Self {
        Self { state: RwLock::default(), events: broadcast::Sender::new(backlog.max(1)), stamps: Stamps::default() }
    }

    /// Shows `pod` as it is now.
    pub(super) fn put_pod(&self, pod: &Arc<Pod>, events: &[EventKind]) {
        let mut state = self.write();
        state.pods.insert(pod.id.as_str().to_owned(), pod.clone());
        for kind in events {
            self.send(*kind, pod.clone(), None);
        }
    }

    /// Shows `container` as it is now.
    pub(super) fn put_container(&self, container: &Arc<Container>, event: Option<EventKind>) {
        let mut state = self.write();
        state.containers.insert(container.id.as_str().to_owned(), container.clone());
        if let (Some(kind), Some(pod)) = (event, state.pods.get(container.pod.as_str())) {
            self.send(kind, pod.clone(), Some(container.clone()));
        }
    }

    /// Shows the pod no longer.
    pub(super) fn drop_pod(&self, id: &PodId) {
        let mut state = self.write();
        if let Some(pod) = state.pods.remove(id.as_str()) {
            self.send(EventKind::Deleted, pod, None);
        }
    }

    /// Shows the container no longer.
    pub(super) fn drop_container(&self, id: &ContainerId) {
        let mut state = self.write();
        if let Some(container) = state.containers.remove(id.as_str())
            && let Some(pod) = state.pods.get(container.pod.as_str())
        {
            self.send(EventKind::Deleted, pod.clone(), Some(container));
        }
    }

    /// By id or unique prefix.
    pub(super) fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        find(&self.read().pods, id, "pod")
    }

    /// By id or unique prefix.
    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>> {
        find(&self.read().containers, id, "container")
    }

    /// All pods.
    pub(super) fn pods(&self) -> Vec<Arc<Pod>> {
        self.read().pods.values().cloned().collect()
    }

    /// All containers.
    pub(super) fn containers(&self) -> Vec<Arc<Container>> {
        self.read().containers.values().cloned().collect()
    }

    /// Events from now on.
    pub(super) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    fn send(&self, kind: EventKind, pod: Arc<Pod>, container: Option<Arc<Container>>) {
        // No subscriber is the normal case and no error.
        let _ = self.events.send(Event { kind, at: self.stamps.next(), pod, container });
    }

    // A panic between two inserts cannot leave the maps half-changed, so a poisoned lock is still good.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value of the only key that starts with `prefix`; a whole key wins over longer ones.
fn find<T>(map: &BTreeMap<String, Arc<T>>, prefix: &str, what: &str) -> Result<Arc<T>> {
    if let Some(exact) = map.get(prefix) {
        return Ok(exact.clone());
    }
    let mut matches = map.range::<str, _>((Bound::Included(prefix), Bound::Unbounded)).take_while(|(key, _)| key.starts_with(prefix));
    match (matches.next(), matches.next()) {
        _ if prefix.is_empty() => Err(Error::not_found(format!("find {what} without an id"))),
        (Some((_, value)), None) => Ok(value.clone()),
        (Some(_), Some(_)) => Err(Error::invalid(format!("find {what} {prefix}: several ids start with it"))),
        (None, _) => Err(Error::not_found(format!("find {what} {prefix}: no such {what}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    #[test]
    fn prefixes_find_one_none_or_too_many() {
        let map: BTreeMap<_, _> = ["abc", "abd", "b", "bcd"].map(|k| (k.to_owned(), Arc::new(k))).into();
        assert_eq!(*find(&map, "abc", "pod").unwrap(), "abc");
        assert_eq!(*find(&map, "bc", "pod").unwrap(), "bcd");
        assert_eq!(*find(&map, "b", "pod").unwrap(), "b", "a whole id is not ambiguous");
        assert_eq!(find(&map, "ab", "pod").unwrap_err().kind, Kind::InvalidArgument);
        assert_eq!(find(&map, "x", "pod").unwrap_err().kind, Kind::NotFound);
        assert_eq!(find(&map, "", "pod").unwrap_err().kind, Kind::NotFound);
    }

    #[test]
    fn stamps_rise_even_when_the_clock_stands_still_or_jumps_back() {
        let stamps = Stamps::default();
        let future = clock::now_ns() + 1_000_000_000_000;
        stamps.pass(future);
        let (first, second) = (stamps.next(), stamps.next());
        assert!(first > future && second > first);
    }
}
