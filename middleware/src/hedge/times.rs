//! How long answers take: enough of it to say after which time one is unusually late.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use super::Short;

/// Answers after which the older half of what is known is forgotten.
pub(super) const WINDOW: u32 = 256;
/// Microseconds of the unit in which times are told apart.
const UNIT: u64 = 125;
/// Buckets for each doubling of a time, as a power of two: a quantile is at most an eighth too long.
const FINE: u32 = 3;
/// The longest time that is told from longer ones, in units: about 70 minutes.
const LONGEST: u64 = (1 << 25) - 1;
const BUCKETS: usize = bucket(LONGEST) + 1;

/// How long answers about one model take, by route. What was never asked for takes no room.
#[derive(Debug, Default)]
pub struct Times([OnceLock<Box<Histogram>>; Short::ALL.len()]);

impl Times {
    /// Those of a route.
    pub(super) fn of(&self, short: Short) -> &Histogram {
        self.0[short as usize].get_or_init(Box::default)
    }
}

/// The last 256 to 512 times, in buckets that grow with them.
///
/// Two halves, of which one is filled; when it is full the other, which is older, is emptied and filled. All of it are
/// atomics: additions at the moment of the change may be lost, which a quantile does not show.
#[derive(Debug)]
pub(super) struct Histogram {
    halves: [Half; 2],
    filled: AtomicUsize,
}

#[derive(Debug)]
struct Half {
    count: AtomicU32,
    buckets: [AtomicU32; BUCKETS],
}

impl Default for Half {
    fn default() -> Self {
        Self { count: AtomicU32::new(0), buckets: std::array::from_fn(|_| AtomicU32::new(0)) }
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { halves: [Half::default(), Half::default()], filled: AtomicUsize::new(0) }
    }
}

impl Half {
    fn empty(&self) {
        self.buckets.iter().for_each(|bucket| bucket.store(0, Ordering::Relaxed));
        self.count.store(0, Ordering::Relaxed);
    }
}

impl Histogram {
    /// An answer took this long, or longer.
    pub(super) fn add(&self, time: Duration) {
        let filled = self.filled.load(Ordering::Relaxed);
        let half = &self.halves[filled % 2];
        half.buckets[bucket(units(time))].fetch_add(1, Ordering::Relaxed);
        // Exactly one finds it full.
        if half.count.fetch_add(1, Ordering::Relaxed) + 1 == WINDOW {
            self.halves[(filled + 1) % 2].empty();
            self.filled.store(filled + 1, Ordering::Relaxed);
        }
    }

    /// The time within which so many of a hundred answers come; `None` while fewer than `least` are known.
    pub(super) fn percentile(&self, percent: u64, least: u64) -> Option<Duration> {
        let [one, other] = &self.halves;
        let count = |at: usize| {
            u64::from(one.buckets[at].load(Ordering::Relaxed)) + u64::from(other.buckets[at].load(Ordering::Relaxed))
        };
        let all: u64 = self.halves.iter().map(|half| u64::from(half.count.load(Ordering::Relaxed))).sum();
        if all < least.max(1) {
            return None;
        }
        let wanted = (all * percent).div_ceil(100);
        // Where additions were lost it is the last bucket that has any.
        let (mut come, mut found) = (0, 0);
        for at in 0..BUCKETS {
            let here = count(at);
            if here > 0 {
                (come, found) = (come + here, at);
            }
            if come >= wanted {
                break;
            }
        }
        Some(Duration::from_micros(end(found) * UNIT))
    }
}

fn units(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX) / UNIT
}

/// The bucket of a time: each unit has one up to eight, then every doubling has eight.
#[expect(clippy::cast_possible_truncation, reason = "at most 183")]
const fn bucket(units: u64) -> usize {
    let units = if units > LONGEST { LONGEST } else { units };
    if units < 1 << FINE {
        return units as usize;
    }
    let exponent = units.ilog2();
    ((((exponent - FINE + 1) as u64) << FINE) + ((units >> (exponent - FINE)) & ((1 << FINE) - 1))) as usize
}

/// Where a bucket ends, in units.
const fn end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 1 << FINE {
        return bucket + 1;
    }
    let (doubling, part) = ((bucket >> FINE) - 1, bucket & ((1 << FINE) - 1));
    ((1 << FINE) + part + 1) << doubling
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn every_time_is_in_the_bucket_that_ends_behind_it() {
        let mut before = 0;
        for at in 0..BUCKETS {
            assert_eq!((bucket(before), bucket(end(at) - 1)), (at, at));
            before = end(at);
        }
        assert_eq!((before, bucket(u64::MAX)), (LONGEST + 1, BUCKETS - 1));
    }

    #[test]
    fn a_percentile_is_hardly_longer_than_it_was() {
        let times = Histogram::default();
        (1..=200).for_each(|time| times.add(ms(time)));
        for (percent, exact) in [(50, 100), (95, 190), (99, 198)] {
            let found = times.percentile(percent, 200).unwrap();
            assert!(found > ms(exact) && found <= ms(exact) * 9 / 8 + ms(1), "{percent}: {found:?}");
        }
        assert_eq!(times.percentile(95, 201), None, "so many are not known");
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let times = Histogram::default();
        (0..1000).for_each(|_| times.add(ms(5)));
        (0..511).for_each(|_| times.add(ms(500)));
        let found = times.percentile(50, 1).unwrap();
        assert!((ms(500)..ms(570)).contains(&found), "{found:?}");
        assert!(times.percentile(99, 513).is_none(), "no more than two windows are known");
    }
}
