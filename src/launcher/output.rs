//! How much of the output of commands is kept in memory while they run: per call, and in all.
//!
//! Both streams of a call share one limit, so that what is kept fits into one answer; a sixteenth is set aside for each, so that
//! a flood on one does not lose an error message on the other. All calls share one [`Budget`] on top of a little that
//! every call has of its own, so that probes are heard whatever else runs. What finds no room is read and dropped: the command
//! goes on as if it had been read, and the call answers with the beginning of its output.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Bytes of output that all running calls keep together: four answers of the largest size.
const TOTAL: usize = 64 << 20;
/// Bytes of output a call keeps whatever the others hold: more than the kubelet looks at of a probe (10 KiB), and no more than a
/// running call costs anyway.
const ALWAYS: usize = 16 << 10;
/// Part of a call's room that is set aside for each stream.
const ASIDE: usize = 16;

/// The daemon's budget: memory is the process's, so there is one.
pub static BUDGET: Budget = Budget::new(TOTAL);

/// Bytes that calls may still keep.
#[derive(Debug)]
pub struct Budget(AtomicUsize);

impl Budget {
    /// `bytes` in all.
    pub const fn new(bytes: usize) -> Self {
        Self(AtomicUsize::new(bytes))
    }
}

/// The room of one call. Goes back to the budget with the value, which is when the output is handed on to be sent.
#[derive(Debug)]
pub struct Room<'a> {
    budget: &'a Budget,
    /// Bytes set aside for each stream.
    aside: usize,
    /// Bytes for whoever comes first.
    shared: AtomicUsize,
    /// Bytes that need not come from the budget.
    always: AtomicUsize,
    /// Bytes that came from the budget.
    borrowed: AtomicUsize,
    refused: AtomicBool,
}

impl<'a> Room<'a> {
    /// Room for at most `limit` bytes of `streams` streams together.
    pub fn new(budget: &'a Budget, limit: usize, streams: usize) -> Self {
        let aside = if streams > 1 { limit / ASIDE } else { 0 };
        Self {
            budget,
            aside,
            shared: AtomicUsize::new(limit - aside * streams),
            always: AtomicUsize::new(ALWAYS),
            borrowed: AtomicUsize::new(0),
            refused: AtomicBool::new(false),
        }
    }

    /// The part of one stream.
    pub fn share(&'a self) -> Share<'a> {
        Share { room: self, own: self.aside, full: false }
    }

    /// Whether output was dropped because other calls held the budget.
    pub fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.budget.0.fetch_add(*self.borrowed.get_mut(), Ordering::Relaxed);
    }
}

/// What one stream may keep.
#[derive(Debug)]
pub struct Share<'a> {
    room: &'a Room<'a>,
    own: usize,
    /// Nothing more is kept: output has an end, but no hole.
    full: bool,
}

impl Share<'_> {
    /// How many of the next `wanted` bytes may be kept.
    pub fn take(&mut self, wanted: usize) -> usize {
        if self.full {
            return 0;
        }
        let own = self.own.min(wanted);
        self.own -= own;
        let fits = own + grab(&self.room.shared, wanted - own);
        let always = grab(&self.room.always, fits);
        let borrowed = grab(&self.room.budget.0, fits - always);
        self.room.borrowed.fetch_add(borrowed, Ordering::Relaxed);
        let granted = always + borrowed;
        if granted < fits {
            self.room.refused.store(true, Ordering::Relaxed);
        }
        self.full = granted < wanted;
        granted
    }
}

/// Takes up to `wanted` from a counter.
fn grab(counter: &AtomicUsize, wanted: usize) -> usize {
    let before = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left - left.min(wanted)));
    before.unwrap_or(0).min(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_share_one_limit_and_none_is_crowded_out() {
        let budget = Budget::new(1 << 30);
        let room = Room::new(&budget, 1600, 2);
        let (mut out, mut err) = (room.share(), room.share());
        assert_eq!((out.take(1000), out.take(5000), out.take(1)), (1000, 500, 0), "all but what is set aside for the other");
        assert_eq!((err.take(40), err.take(5000), err.take(1)), (40, 60, 0));
        assert!(!room.is_refused(), "the limit is no shortage");
        assert_eq!(Room::new(&budget, 1600, 1).share().take(5000), 1600, "a terminal has one stream");
    }

    #[test]
    fn all_calls_share_the_budget_and_give_it_back() {
        let budget = Budget::new(1000);
        let first = Room::new(&budget, 1 << 20, 2);
        let mut flood = first.share();
        assert_eq!(flood.take(ALWAYS + 600), ALWAYS + 600);
        {
            let second = Room::new(&budget, 1 << 20, 2);
            let mut late = second.share();
            assert_eq!(late.take(ALWAYS), ALWAYS, "a probe is heard while others flood");
            assert_eq!(late.take(600), 400);
            assert!(second.is_refused() && !first.is_refused());
            drop(first);
            assert_eq!(late.take(1), 0, "room that comes later would make a hole");
        }
        assert_eq!(budget.0.load(Ordering::Relaxed), 1000);
    }
}
