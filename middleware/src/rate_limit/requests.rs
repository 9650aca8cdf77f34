//! Requests a minute with room for a burst: governor's algorithm (GCRA) over state that outlives its quota.
//!
//! GCRA keeps one number, the time at which everything spent is there again. governor's own limiters hold that number
//! together with the quota; here a limiter is made for each question (it is two numbers and a reference) and the number stays
//! where it is when the quota changes.

use std::cell::Cell;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{NotKeyed, StateStore};
use governor::{Quota, RateLimiter};

use super::Limits;
use super::spent::Amount;
use crate::error::Standing;

/// A minute in nanoseconds.
const MINUTE: u64 = 60_000_000_000;
/// The longest that others may have somebody wait: a day.
const LONGEST_DEBT: u64 = 24 * 60 * MINUTE;
/// The largest burst: with one request a minute, refilling it takes 190 years, and no sum overflows.
const LARGEST_BURST: u32 = 100_000_000;

/// How fast requests are there again, and how many there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// Nanoseconds until a spent request is there again.
    cost: u64,
    burst: NonZeroU32,
}

impl Rate {
    /// The rate of some limits, if they have one.
    pub(super) fn of(limits: &Limits) -> Option<Self> {
        let per_minute = limits.requests_per_minute?;
        let burst = limits.burst.unwrap_or(per_minute).get().min(LARGEST_BURST);
        Some(Self { cost: MINUTE / u64::from(per_minute.get()), burst: NonZeroU32::new(burst)? })
    }

    /// Nanoseconds until everything is there again after all was spent.
    fn whole(self) -> u64 {
        self.cost * u64::from(self.burst.get())
    }

    /// Where somebody stands whose requests are all there again at this time.
    fn standing(self, full_at: u64, now: u64) -> Standing {
        let owed = full_at.saturating_sub(now);
        Standing {
            limit: self.burst.get().into(),
            remaining: self.whole().saturating_sub(owed) / self.cost,
            reset: Duration::from_nanos(owed),
        }
    }
}

/// The requests that somebody has spent.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// When all of them are there again, in nanoseconds of the ledger's clock.
    full_at: AtomicU64,
    /// What a request cost when that was reckoned.
    cost: AtomicU64,
}

impl Requests {
    /// Spends a request, or says when there will be one.
    pub(super) fn take(&self, rate: Rate, now: u64) -> Result<Standing, (Duration, Standing)> {
        self.adopt(rate, now);
        let taken = check(rate, now, Spending { full_at: &self.full_at, latest: now.saturating_add(rate.whole()) });
        let standing = rate.standing(self.full_at.load(Ordering::Relaxed), now);
        taken.map(|()| standing).map_err(|wait| (wait, standing))
    }

    /// Says the same, and spends nothing.
    pub(super) fn look(&self, rate: Rate, now: u64) -> Result<Standing, (Duration, Standing)> {
        let (full_at, cost) = (self.full_at.load(Ordering::Relaxed), self.cost.load(Ordering::Relaxed));
        let full_at = converted(full_at, cost, rate, now).min(now.saturating_add(rate.whole()));
        let standing = rate.standing(full_at, now);
        check(rate, now, Looking(full_at)).map(|()| standing).map_err(|wait| (wait, standing))
    }

    /// Gives a request back.
    pub(super) fn give_back(&self, rate: Rate) {
        let back = |full_at: u64| Some(full_at.saturating_sub(rate.cost));
        let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, back);
    }

    /// What a request costs here.
    pub(super) fn cost(&self) -> u64 {
        self.cost.load(Ordering::Relaxed)
    }

    /// Another proxy tells what was spent there. More than there can be is cut off by who spends next.
    pub(super) fn absorb(&self, amount: &Amount, now: u64) {
        if amount.requests == 0 || amount.cost == 0 {
            return;
        }
        // Who owes nothing here has the rate of where he asks: that of before may be another.
        let before = self.cost.load(Ordering::Relaxed);
        if self.full_at.load(Ordering::Relaxed) <= now {
            let _ = self.cost.compare_exchange(before, amount.cost, Ordering::Relaxed, Ordering::Relaxed);
        }
        let cost = self.cost.load(Ordering::Relaxed).min(MINUTE);
        let time = cost.saturating_mul(amount.requests.unsigned_abs()).min(LONGEST_DEBT);
        let spent = |full_at: u64| {
            if amount.requests < 0 {
                return full_at.saturating_sub(time);
            }
            full_at.max(now).saturating_add(time).min(now.saturating_add(LONGEST_DEBT))
        };
        let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| Some(spent(full_at)));
    }

    /// When all of them are there again.
    pub(super) fn full_at(&self) -> u64 {
        self.full_at.load(Ordering::Relaxed)
    }

    /// Takes over another rate: who has spent ten requests has spent ten requests of the new ones.
    fn adopt(&self, rate: Rate, now: u64) {
        let before = self.cost.load(Ordering::Relaxed);
        if before == rate.cost {
            return;
        }
        // Of several who see the change, one reckons anew.
        let is_mine = self.cost.compare_exchange(before, rate.cost, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if is_mine {
            let anew = |full_at| Some(converted(full_at, before, rate, now));
            let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, anew);
        }
    }
}

/// The time of a rate at which all is there again, from that of another rate with the same number of requests spent.
fn converted(full_at: u64, cost: u64, rate: Rate, now: u64) -> u64 {
    if cost == rate.cost || cost == 0 {
        return full_at;
    }
    let owed = u128::from(full_at.saturating_sub(now)) * u128::from(rate.cost) / u128::from(cost);
    now.saturating_add(u64::try_from(owed).unwrap_or(u64::MAX).min(rate.whole()))
}

/// Asks governor. `now` is counted from the same beginning as the state, whatever the limiter was made for and when.
fn check(rate: Rate, now: u64, state: impl StateStore<Key = NotKeyed>) -> Result<(), Duration> {
    let Some(quota) = Quota::with_period(Duration::from_nanos(rate.cost)) else { return Ok(()) };
    let hand = Hand(Cell::new(Nanos::default()));
    let limiter = RateLimiter::<_, _, _, NoOpMiddleware<Nanos>>::new(quota.allow_burst(rate.burst), state, hand);
    limiter.clock().0.set(Nanos::from(now));
    limiter.check().map_err(|until| until.wait_time_from(Nanos::from(now)))
}

/// A clock that is set by hand. A limiter counts from what its clock shows when it is made: from the ledger's beginning.
struct Hand(Cell<Nanos>);

impl Clock for Hand {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        self.0.get()
    }
}

/// State that is spent from.
struct Spending<'a> {
    full_at: &'a AtomicU64,
    /// The latest that it can be: a burst that became smaller is owed no more than it holds.
    latest: u64,
}

impl StateStore for Spending<'_> {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _key: &NotKeyed, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut before = self.full_at.load(Ordering::Relaxed);
        loop {
            let (told, after) = measure(Some(Nanos::from(before.min(self.latest))))?;
            match self.full_at.compare_exchange_weak(before, after.as_u64(), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(told),
                Err(other) => before = other,
            }
        }
    }
}

/// State that is only looked at.
struct Looking(u64);

impl StateStore for Looking {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _key: &NotKeyed, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        measure(Some(Nanos::from(self.0))).map(|(told, _)| told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn rate(per_minute: u32, burst: u32) -> Rate {
        let limits = Limits {
            requests_per_minute: NonZeroU32::new(per_minute),
            burst: NonZeroU32::new(burst),
            ..Limits::default()
        };
        Rate::of(&limits).unwrap()
    }

    fn take_all(requests: &Requests, rate: Rate, now: u64) -> u32 {
        (0..1000).take_while(|_| requests.take(rate, now).is_ok()).count().try_into().unwrap()
    }

    #[test]
    fn a_burst_passes_at_once_and_comes_back_by_and_by() {
        let (requests, rate) = (Requests::default(), rate(60, 10));
        assert_eq!(take_all(&requests, rate, 0), 10);
        let (wait, standing) = requests.take(rate, SECOND / 4).unwrap_err();
        assert_eq!(wait, Duration::from_millis(750));
        assert_eq!((standing.limit, standing.remaining, standing.reset), (10, 0, Duration::from_millis(9750)));
        assert_eq!(take_all(&requests, rate, 3 * SECOND), 3);
        assert_eq!(take_all(&requests, rate, 100 * SECOND), 10);
    }

    #[test]
    fn what_is_left_is_told() {
        let (requests, rate) = (Requests::default(), rate(60, 10));
        let standing = requests.take(rate, SECOND).unwrap();
        assert_eq!((standing.remaining, standing.reset), (9, Duration::from_secs(1)));
        assert_eq!(requests.take(rate, SECOND).unwrap().remaining, 8);
        requests.give_back(rate);
        assert_eq!(requests.take(rate, SECOND).unwrap().remaining, 8);
    }

    #[test]
    fn a_look_changes_nothing() {
        let (requests, rate) = (Requests::default(), rate(60, 1));
        (0..1000).for_each(|_| assert_eq!(requests.look(rate, 0).unwrap().remaining, 1));
        requests.take(rate, 0).unwrap();
        (0..1000).for_each(|_| assert_eq!(requests.look(rate, 0).unwrap_err().0, Duration::from_secs(1)));
        assert!(requests.take(rate, SECOND).is_ok());
    }

    #[test]
    fn what_is_spent_stays_spent_when_the_quota_changes() {
        for (before, after, left) in [
            (rate(60, 60), rate(60, 60), 20),
            (rate(60, 60), rate(600, 600), 560),
            (rate(600, 60), rate(60, 60), 20),
            (rate(60, 60), rate(60, 50), 10),
            (rate(60, 60), rate(60, 30), 0),
            (rate(60, 60), rate(30, 30), 0),
        ] {
            let requests = Requests::default();
            (0..40).for_each(|_| assert!(requests.take(before, SECOND).is_ok()));
            assert_eq!(take_all(&requests, after, SECOND), left, "{before:?} {after:?}");
            // Nobody waits for longer than the new quota takes.
            assert!(requests.look(after, SECOND).unwrap_err().0 <= Duration::from_nanos(after.cost));
        }
    }

    #[test]
    fn what_others_tell_by_a_new_rate_is_not_reckoned_by_that_of_before() {
        let (requests, before, after) = (Requests::default(), rate(60_000, 100), rate(1, 6));
        let told = |rate: Rate| Amount { requests: 3, cost: rate.cost, tokens: 0 };
        requests.absorb(&told(before), SECOND);
        requests.absorb(&told(after), 10 * SECOND);
        assert_eq!(take_all(&requests, after, 10 * SECOND), 3);
        // While something is owed, a request is a request.
        requests.absorb(&told(before), 400 * SECOND);
        assert_eq!(take_all(&requests, after, 400 * SECOND), 3);
    }

    #[test]
    fn the_largest_numbers_overflow_nothing() {
        let (most, least) = (rate(u32::MAX, u32::MAX), rate(1, u32::MAX));
        let requests = Requests::default();
        let now = 50 * 365 * 24 * 3600 * SECOND;
        for rate in [most, least, most, least] {
            assert!(requests.take(rate, now).is_ok() && requests.look(rate, now).is_ok());
        }
    }

    proptest::proptest! {
        #[test]
        fn never_more_than_a_burst_and_the_rate_pass(
            per_minute in 1_u32..1000,
            burst in 1_u32..100,
            pauses in proptest::collection::vec(0_u64..2 * SECOND, 1..300),
        ) {
            let (requests, rate) = (Requests::default(), rate(per_minute, burst));
            let mut now = 0;
            let mut passed = Vec::new();
            for pause in pauses {
                now += pause;
                let foretold = requests.look(rate, now).is_ok();
                let has_passed = requests.take(rate, now).is_ok();
                proptest::prop_assert_eq!(foretold, has_passed);
                passed.extend(has_passed.then_some(now));
            }
            // In every span of time, not only from the beginning.
            for (first, begin) in passed.iter().enumerate() {
                for (last, end) in passed.iter().enumerate().skip(first) {
                    let most = u64::from(burst) + (end - begin) / rate.cost;
                    proptest::prop_assert!((last - first + 1) as u64 <= most);
                }
            }
        }

        #[test]
        fn who_waits_as_long_as_told_passes(per_minute in 1_u32..5000, burst in 1_u32..50, now in 0_u64..100 * SECOND) {
            let (requests, rate) = (Requests::default(), rate(per_minute, burst));
            take_all(&requests, rate, now);
            let Err((wait, _)) = requests.look(rate, now) else { return Ok(()) };
            let then = now + u64::try_from(wait.as_nanos()).unwrap();
            proptest::prop_assert!(requests.look(rate, then - 1).is_err());
            proptest::prop_assert!(requests.take(rate, then).is_ok());
        }
    }
}
