//! Name index: one name, one object. A second request with a name that is being made waits for the first one; one with a name
//! that is taken gets the id that has it. A failed attempt frees the name, and so does the end of the object's life
//! (a pod that is no longer ready, a container that has exited), so "name is reserved" never has to be said to anyone.
//!
//! A retry is recognised by its name alone: if its configuration differs from the first attempt's, it still gets that id.

use std::collections::HashMap;
use std::hash::Hash;

/// Who has a name.
enum Holder<I, W> {
    /// The first request is at work; these wait for it (it is one of them).
    Making(Vec<W>),
    /// A living object.
    Taken(I),
}

/// Names to ids; `W` is what waits for the outcome.
pub(super) struct Names<K, I, W>(HashMap<K, Holder<I, W>>);

/// Answer to a claim.
pub(super) enum Claim<I, W> {
    /// The name was free: the claimer makes the object and then settles.
    First,
    /// Somebody is making it; the waiter was queued.
    Joined,
    /// It lives; the waiter is given back.
    Exists(I, W),
}

impl<K, I, W> Default for Names<K, I, W> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq + Clone, I: Clone + PartialEq, W> Names<K, I, W> {
    /// Asks for `key`.
    pub(super) fn claim(&mut self, key: &K, waiter: W) -> Claim<I, W> {
        match self.0.get_mut(key) {
            None => {
                self.0.insert(key.clone(), Holder::Making(vec![waiter]));
                Claim::First
            }
            Some(Holder::Making(waiters)) => {
                waiters.push(waiter);
                Claim::Joined
            }
            Some(Holder::Taken(id)) => Claim::Exists(id.clone(), waiter),
        }
    }

    /// The making ended: with an object that takes the name, or without one, which frees it. Returns who waits.
    pub(super) fn settle(&mut self, key: &K, made: Option<I>) -> Vec<W> {
        let waiters = match self.0.remove(key) {
            Some(Holder::Making(waiters)) => waiters,
            Some(taken @ Holder::Taken(_)) => {
                self.0.insert(key.clone(), taken);
                return Vec::new();
            }
            None => Vec::new(),
        };
        if let Some(id) = made {
            self.0.insert(key.clone(), Holder::Taken(id));
        }
        waiters
    }

    /// `id` lives no longer. Does nothing if another object has the name by now.
    pub(super) fn release(&mut self, key: &K, id: &I) {
        if matches!(self.0.get(key), Some(Holder::Taken(holder)) if holder == id) {
            self.0.remove(key);
        }
    }

    /// Gives a free name to an object that was found at start.
    pub(super) fn adopt(&mut self, key: &K, id: I) {
        self.0.entry(key.clone()).or_insert(Holder::Taken(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_made_once_and_freed_by_failure_and_by_release() {
        let mut names = Names::<&str, u32, char>::default();
        assert!(matches!(names.claim(&"a", 'x'), Claim::First));
        assert!(matches!(names.claim(&"a", 'y'), Claim::Joined));
        assert_eq!(names.settle(&"a", None), vec!['x', 'y']);
        assert!(matches!(names.claim(&"a", 'z'), Claim::First));
        assert_eq!(names.settle(&"a", Some(7)), vec!['z']);
        assert!(matches!(names.claim(&"a", 'w'), Claim::Exists(7, 'w')));
        names.release(&"a", &8);
        assert!(matches!(names.claim(&"a", 'w'), Claim::Exists(7, 'w')));
        assert!(names.settle(&"a", None).is_empty(), "a late failure must not take a living object's name");
        assert!(matches!(names.claim(&"a", 'w'), Claim::Exists(7, 'w')));
        names.release(&"a", &7);
        assert!(matches!(names.claim(&"a", 'w'), Claim::First));
    }

    #[test]
    fn adoption_never_takes_a_name_away() {
        let mut names = Names::<&str, u32, ()>::default();
        names.adopt(&"a", 1);
        names.adopt(&"a", 2);
        assert!(matches!(names.claim(&"a", ()), Claim::Exists(1, ())));
    }
}
