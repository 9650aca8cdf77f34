//! How a server or a model has done of late: what pages tell beside the metrics, which nobody can read back.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;

use crate::call::Counters;
use crate::runner::Average;
use crate::time::{unix_ms, unix_ms_now};
use crate::window::{LastMinute, Sums};

/// Counts, decayed averages, and the last minute. Whoever adds takes no lock.
#[derive(Debug, Default)]
pub struct Stats {
    window: LastMinute,
    attempts: AtomicU64,
    failures: AtomicU64,
    prompt_tokens: AtomicU64,
    output_tokens: AtomicU64,
    /// Milliseconds from a request to the end of its answer.
    pub response: Average,
    /// Milliseconds from a request to the first piece of a stream.
    pub first_token: Average,
    /// Milliseconds for each token of a stream after the first.
    pub per_token: Average,
}

impl Stats {
    /// An attempt had an answer, or not.
    pub fn attempt(&self, answered: bool) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        self.window.add(Sums { calls: 1, failures: u32::from(!answered), ..Sums::default() });
        if !answered {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An answer broke off after its head.
    pub fn broke(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.window.add(Sums { failures: 1, ..Sums::default() });
    }

    /// An answer was whole; so long after its request.
    pub fn ended(&self, after: Duration) {
        self.response.add(after.as_secs_f32() * 1000.0);
    }

    /// A server told its counts.
    pub fn tokens(&self, counters: &Counters) {
        self.prompt_tokens.fetch_add(counters.prompt_tokens, Ordering::Relaxed);
        self.output_tokens.fetch_add(counters.output_tokens, Ordering::Relaxed);
    }

    /// Attempts so far, and those that failed.
    pub fn attempts(&self) -> (u64, u64) {
        (self.attempts.load(Ordering::Relaxed), self.failures.load(Ordering::Relaxed))
    }

    /// Tokens of prompts and of answers so far.
    pub fn tokens_so_far(&self) -> (u64, u64) {
        (self.prompt_tokens.load(Ordering::Relaxed), self.output_tokens.load(Ordering::Relaxed))
    }

    /// Attempts a second over the last minute, or since there were any.
    pub fn per_second(&self) -> f64 {
        self.window.per_second()
    }

    /// The share of the attempts of the last minute that failed; `None` without any.
    pub fn error_rate(&self) -> Option<f64> {
        self.window.sums().error_rate()
    }
}

/// How the checks of a server went.
#[derive(Debug, Default)]
pub struct Health {
    checks: AtomicU64,
    failures: AtomicU32,
    /// Milliseconds since 1970; 0: never.
    last_check: AtomicU64,
    last_good: AtomicU64,
    last_error: ArcSwapOption<Failed>,
}

/// A check that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// When.
    pub at: SystemTime,
    /// Why.
    pub reason: String,
}

impl Health {
    /// The server told how it is.
    pub(crate) fn good(&self) {
        self.checks.fetch_add(1, Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
        let now = unix_ms_now();
        self.last_check.store(now, Ordering::Relaxed);
        self.last_good.store(now, Ordering::Relaxed);
    }

    /// It did not.
    pub(crate) fn bad(&self, reason: &str) {
        self.checks.fetch_add(1, Ordering::Relaxed);
        self.failures.fetch_add(1, Ordering::Relaxed);
        let at = SystemTime::now();
        self.last_check.store(unix_ms(at), Ordering::Relaxed);
        self.last_error.store(Some(Failed { at, reason: reason.to_owned() }.into()));
    }

    /// Checks so far.
    pub fn checks(&self) -> u64 {
        self.checks.load(Ordering::Relaxed)
    }

    /// Checks that failed since the last good one.
    pub fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    /// When it was last looked at.
    pub fn last_check(&self) -> Option<SystemTime> {
        time(self.last_check.load(Ordering::Relaxed))
    }

    /// When it last told how it is.
    pub fn last_good(&self) -> Option<SystemTime> {
        time(self.last_good.load(Ordering::Relaxed))
    }

    /// The last check that failed, however long ago.
    pub fn last_error(&self) -> Option<std::sync::Arc<Failed>> {
        self.last_error.load_full()
    }
}

fn time(ms: u64) -> Option<SystemTime> {
    (ms > 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_window_forgets_what_is_older_than_a_minute() {
        let stats = Stats::default();
        tokio::time::advance(Duration::from_secs(30)).await;
        for answered in [true, true, false, true] {
            stats.attempt(answered);
        }
        assert_eq!(stats.error_rate(), Some(0.25));
        assert!((stats.per_second() - 4.0 / 30.0).abs() < 1e-3, "{}", stats.per_second());
        tokio::time::advance(Duration::from_secs(61)).await;
        assert_eq!((stats.error_rate(), stats.attempts()), (None, (4, 1)));
        stats.attempt(true);
        assert_eq!(stats.error_rate(), Some(0.0));
    }

    #[test]
    fn failures_in_a_row_end_with_a_good_check_and_the_last_error_stays() {
        let health = Health::default();
        assert_eq!((health.last_check(), health.checks()), (None, 0));
        health.bad("refused");
        health.bad("silent");
        assert_eq!((health.failures(), health.last_good()), (2, None));
        health.good();
        assert_eq!((health.failures(), health.checks()), (0, 3));
        assert_eq!(health.last_error().unwrap().reason, "silent");
        assert!(health.last_good().is_some());
    }
}
