//! How the calls of the last minute went. Whoever counts takes no lock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Slots of the sliding window.
const SLOTS: u32 = 12;
/// Seconds that each of them covers.
const SLOT_S: u32 = 5;

/// Counts of the last minute, or of the time since the beginning if that is shorter.
#[derive(Debug)]
pub struct LastMinute {
    born: Instant,
    slots: [Slot; SLOTS as usize],
}

#[derive(Debug, Default)]
struct Slot {
    /// Which slot since the beginning; what is older than the window counts for nothing.
    number: AtomicU32,
    calls: AtomicU32,
    failures: AtomicU32,
    micros: AtomicU64,
}

/// What was counted in a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Calls.
    pub calls: u32,
    /// Those that failed, or broke off.
    pub failures: u32,
    /// The time that they took together, as far as it was told.
    pub took: Duration,
}

impl Default for LastMinute {
    fn default() -> Self {
        Self { born: Instant::now(), slots: Default::default() }
    }
}

impl LastMinute {
    /// Adds to what is counted. Two that come at once when a slot begins may lose a count: it is an estimate.
    pub fn add(&self, sums: Sums) {
        let number = self.number();
        let slot = &self.slots[(number % SLOTS) as usize];
        if slot.number.swap(number, Ordering::Relaxed) != number {
            slot.calls.store(0, Ordering::Relaxed);
            slot.failures.store(0, Ordering::Relaxed);
            slot.micros.store(0, Ordering::Relaxed);
        }
        slot.calls.fetch_add(sums.calls, Ordering::Relaxed);
        slot.failures.fetch_add(sums.failures, Ordering::Relaxed);
        slot.micros.fetch_add(u64::try_from(sums.took.as_micros()).unwrap_or(0), Ordering::Relaxed);
    }

    /// What was counted.
    pub fn sums(&self) -> Sums {
        let now = self.number();
        let slots = self.slots.iter().filter(|slot| now - slot.number.load(Ordering::Relaxed).min(now) < SLOTS);
        slots.fold(Sums::default(), |sums, slot| Sums {
            calls: sums.calls + slot.calls.load(Ordering::Relaxed),
            failures: sums.failures + slot.failures.load(Ordering::Relaxed),
            took: sums.took + Duration::from_micros(slot.micros.load(Ordering::Relaxed)),
        })
    }

    /// Calls a second.
    pub fn per_second(&self) -> f64 {
        let lived = self.born.elapsed().as_secs_f64();
        // The slot that runs now is not full.
        let covered = f64::from((SLOTS - 1) * SLOT_S) + lived % f64::from(SLOT_S);
        f64::from(self.sums().calls) / covered.min(lived).max(1.0)
    }

    fn number(&self) -> u32 {
        u32::try_from(self.born.elapsed().as_secs()).unwrap_or(u32::MAX) / SLOT_S
    }
}

impl Sums {
    /// The share of the calls that failed; `None` without any.
    pub fn error_rate(&self) -> Option<f64> {
        (self.calls > 0).then(|| (f64::from(self.failures) / f64::from(self.calls)).min(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_older_than_a_minute_counts_for_nothing() {
        let window = LastMinute::default();
        let failed = Sums { calls: 1, failures: 1, took: Duration::from_millis(1500) };
        window.add(failed);
        window.add(Sums { failures: 0, ..failed });
        assert_eq!(window.sums(), Sums { calls: 2, failures: 1, took: Duration::from_secs(3) });
        assert_eq!(window.sums().error_rate(), Some(0.5));
        tokio::time::advance(Duration::from_secs(4)).await;
        assert!((window.per_second() - 0.5).abs() < 0.001);
        tokio::time::advance(Duration::from_secs(50)).await;
        assert_eq!(window.sums().calls, 2);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!((window.sums(), window.sums().error_rate()), (Sums::default(), None));
        window.add(failed);
        assert_eq!(window.sums().calls, 1, "the slot was emptied");
    }
}
