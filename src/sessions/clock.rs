//! The clock by which sessions grow old: the time of day, but it does not jump.
//!
//! A machine's time of day is set now and then: after a start without a battery, by hand, in a virtual machine that was held.
//! Who was there a minute ago has then neither been away for years nor is he young for years. So this clock goes on as it went,
//! until the store has moved the times of all its sessions by as much as the time of day was set. Sleep of the machine counts as
//! such a jump.

#![expect(clippy::disallowed_types, reason = "the time of day cannot be paused in tests, and nor can this")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use olol_middleware::time::unix_ms_now;

/// Milliseconds by which two clocks differ that tell the same time: nobody cares.
pub(super) const SAME: u64 = 5_000;

/// A clock that goes on as it went.
#[derive(Debug)]
pub(super) struct Clock {
    begun: Instant,
    /// Milliseconds since 1970 at that moment, as far as is known now.
    base: AtomicU64,
}

impl Clock {
    /// One that shows the time of day.
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), base: AtomicU64::new(unix_ms_now()) }
    }

    /// Milliseconds since 1970.
    pub(super) fn now(&self) -> u64 {
        let since = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.base.load(Ordering::Relaxed).saturating_add(since)
    }

    /// How long it has gone, which nobody can set.
    pub(super) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// By how many milliseconds the time of day was set since then; 0: it was not.
    pub(super) fn jump(&self) -> i64 {
        jump(self.now(), unix_ms_now())
    }

    /// It shows the time of day again.
    pub(super) fn follow(&self, by: i64) {
        self.base.store(moved(self.base.load(Ordering::Relaxed), by), Ordering::Relaxed);
    }
}

/// By how much another clock is ahead of one, if they do not tell the same time.
pub(super) fn jump(here: u64, there: u64) -> i64 {
    if here.abs_diff(there) <= SAME {
        return 0;
    }
    i64::try_from(i128::from(there) - i128::from(here)).unwrap_or(0)
}

/// A moment by a clock that is ahead by so much.
pub(super) fn moved(at: u64, by: i64) -> u64 {
    at.saturating_add_signed(by)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_only_corrected_has_not_jumped() {
        assert_eq!((jump(1_000_000, 1_000_000 + SAME), jump(1_000_000, 1_000_000 - SAME)), (0, 0));
        assert_eq!((jump(1_000_000, 1_006_000), jump(1_006_000, 1_000_000)), (6_000, -6_000));
        assert_eq!(jump(0, u64::MAX), 0, "no such time");
    }

    #[test]
    fn a_clock_goes_on_as_it_went_until_it_follows() {
        let clock = Clock::new();
        assert_eq!(clock.jump(), 0);
        let day = 24 * 3600 * 1000;
        clock.follow(-day);
        assert!(clock.jump().abs_diff(day) <= SAME, "as if the day had been set forwards: {}", clock.jump());
        clock.follow(clock.jump());
        assert_eq!(clock.jump(), 0);
    }
}
