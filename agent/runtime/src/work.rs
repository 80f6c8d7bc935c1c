//! Which containers to look at, and how many at once.
//!
//! Owns the order and the bound of questions to a runtime. Never asks them.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    hash::Hash,
};

/// Questions in flight at once: enough to overlap waiting, too few to load the runtime.
const AT_ONCE: usize = 8;

/// Containers to look at. Each is looked at by one question at a time, so that an older answer never follows a newer one.
#[derive(Debug)]
pub(crate) struct Work<Key> {
    order: VecDeque<Key>,
    queued: HashSet<Key>,
    running: HashSet<Key>,
    failed: BTreeSet<Key>,
}

impl<Key> Default for Work<Key> {
    fn default() -> Self {
        Self {
            order: VecDeque::new(),
            queued: HashSet::new(),
            running: HashSet::new(),
            failed: BTreeSet::new(),
        }
    }
}

impl<Key: Clone + Ord + Hash> Work<Key> {
    /// Asks for a look; at most one more of each container is remembered.
    pub(crate) fn look(&mut self, key: Key) {
        self.failed.remove(&key);
        if self.queued.insert(key.clone()) {
            self.order.push_back(key);
        }
    }

    /// The next container to look at, if one may be looked at now.
    pub(crate) fn start(&mut self) -> Option<Key> {
        if self.running.len() >= AT_ONCE {
            return None;
        }
        let position = self.order.iter().position(|key| !self.running.contains(key))?;
        let key = self.order.remove(position)?;
        self.queued.remove(&key);
        self.running.insert(key.clone());
        Some(key)
    }

    /// A look has ended. One without a result is remembered for [`Work::retry`].
    pub(crate) fn done(&mut self, key: Key, clear: bool) {
        self.running.remove(&key);
        if !clear && !self.queued.contains(&key) {
            self.failed.insert(key);
        }
    }

    /// Asks once more for all that had no result.
    pub(crate) fn retry(&mut self) {
        for key in std::mem::take(&mut self.failed) {
            self.look(key);
        }
    }

    /// How many containers wait to be looked at.
    pub(crate) fn waiting(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: impl std::fmt::Display) -> String {
        name.to_string()
    }

    #[test]
    fn one_look_at_a_time_and_never_a_lost_one() {
        let mut work = Work::default();
        work.look(key("a"));
        work.look(key("a"));
        work.look(key("b"));
        assert_eq!(work.start(), Some(key("a")));
        // An event while its look runs: the answer may be older than the event.
        work.look(key("a"));
        assert_eq!(work.start(), Some(key("b")));
        assert_eq!(work.start(), None);
        work.done(key("a"), true);
        assert_eq!(work.start(), Some(key("a")));
        work.done(key("a"), true);
        work.done(key("b"), true);
        assert_eq!((work.start(), work.waiting()), (None, 0));
    }

    #[test]
    fn bounded_in_flight() {
        let mut work = Work::default();
        (0..100).for_each(|n| work.look(key(n)));
        let running: Vec<_> = std::iter::from_fn(|| work.start()).collect();
        assert_eq!(running, (0..AT_ONCE).map(key).collect::<Vec<_>>());
        work.done(key(3), true);
        assert_eq!(work.start(), Some(key(AT_ONCE)));
    }

    #[test]
    fn failures_are_tried_again_once_asked_for() {
        let mut work = Work::default();
        work.look(key("a"));
        work.start();
        work.done(key("a"), false);
        assert_eq!(work.start(), None);
        work.retry();
        assert_eq!(work.start(), Some(key("a")));
        work.done(key("a"), false);
        work.look(key("a"));
        work.start();
        work.done(key("a"), true);
        work.retry();
        assert_eq!(work.start(), None);
    }
}
