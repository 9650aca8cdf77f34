//! Keeps a log short that strangers could fill.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The usual time between two words, however much there is to say.
const EVERY: Duration = Duration::from_secs(60);

/// Lets something be said once in a while: once in a minute, if not told otherwise.
#[derive(Debug)]
pub struct Seldom {
    every: Duration,
    since: Instant,
    /// Milliseconds since then before which nothing is said.
    next: AtomicU64,
}

impl Default for Seldom {
    fn default() -> Self {
        Self::every(EVERY)
    }
}

impl Seldom {
    /// Once in this time.
    pub fn every(every: Duration) -> Self {
        Self { every, since: Instant::now(), next: AtomicU64::new(0) }
    }

    /// Whether it may be said now; who is told so says it.
    pub fn may_speak(&self) -> bool {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (now, next) = (millis(self.since.elapsed()), self.next.load(Ordering::Relaxed));
        let later = now.saturating_add(millis(self.every));
        now >= next && self.next.compare_exchange(next, later, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn much_is_said_once_in_a_minute() {
        let seldom = Seldom::default();
        assert!(seldom.may_speak() && !seldom.may_speak());
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(!seldom.may_speak());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(seldom.may_speak() && !seldom.may_speak());
    }
}
