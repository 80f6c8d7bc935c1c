//! Pauses between attempts: doubled each time, bounded, and never in step with anybody else's.
//!
//! Owns the arithmetic. Never sleeps.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// The pauses between attempts.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// From `first` to `longest`.
    pub(crate) fn new((first, longest): (Duration, Duration)) -> Self {
        Self { first, longest, next: first }
    }

    /// The next pause: between half of the doubled pause and all of it.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next.min(self.longest);
        self.next = pause.saturating_mul(2).min(self.longest);
        // The standard library seeds each `RandomState` differently, which is random enough for this.
        let random = u32::try_from(RandomState::new().hash_one(()) >> 32).unwrap_or(u32::MAX);
        pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
    }

    /// An attempt succeeded.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_bound_and_starts_again() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(10));
        let mut backoff = Backoff::new((first, longest));
        for attempt in 0..40_u32 {
            let whole = first.saturating_mul(1 << attempt.min(20)).min(longest);
            let pause = backoff.pause();
            assert!(pause >= whole / 2 && pause <= whole, "attempt {attempt}: {pause:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= first);
    }
}
