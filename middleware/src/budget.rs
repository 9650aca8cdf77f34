//! A budget for second tries: a share of the traffic, and a few each second besides.
//!
//! What `retry` and `hedge` do for one call is work that nobody else gets; a budget keeps it to a small part of the whole, so
//! that servers in trouble are not buried under it.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use tokio::time::Instant;

use crate::units::Share;

/// What a budget gains.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowance {
    /// Tries per request.
    pub share: Share,
    /// Tries each second besides.
    pub per_second: u32,
    /// Tries that are there from the beginning, and the most that is saved up.
    pub reserve: u32,
}

/// How many tries are left, in thousandths. Every request adds a share of one, every second some, every try takes one.
///
/// tower's own budget takes a lock at every request; this one is an atomic, and looks at the clock only for a try. It outlives
/// a reload, and so is told what it gains whenever it is asked.
#[derive(Debug)]
pub struct Budget {
    left: AtomicI64,
    born: Instant,
    /// Milliseconds since `born` for which what time adds has been added.
    paid: AtomicU64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { left: AtomicI64::new(i64::MAX), born: Instant::now(), paid: AtomicU64::new(0) }
    }
}

impl Budget {
    /// Tries that may be made at once; `None`: there was no request so far.
    #[expect(clippy::cast_precision_loss, reason = "a gauge")]
    pub(crate) fn tries(&self) -> Option<f64> {
        let left = self.left.load(Ordering::Relaxed);
        (left != i64::MAX).then(|| left as f64 / 1000.0)
    }

    /// A request has come.
    pub fn deposit(&self, gains: &Allowance) {
        self.add(gains.share.thousandths(), gains);
    }

    /// Takes a try, if one is left.
    pub fn withdraw(&self, gains: &Allowance) -> bool {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        let passed = now.saturating_sub(self.paid.swap(now, Ordering::Relaxed));
        self.add(i64::try_from(passed.saturating_mul(gains.per_second.into())).unwrap_or(i64::MAX), gains);
        let take = |left: i64| (left >= 1000).then(|| left - 1000);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// Gives a try back that was not needed.
    pub fn give_back(&self, gains: &Allowance) {
        self.add(1000, gains);
    }

    fn add(&self, thousandths: i64, gains: &Allowance) {
        let full = i64::from(gains.reserve) * 1000;
        let now = self.left.load(Ordering::Relaxed);
        if now != full {
            // Two deposits at once may count as one: a budget is no ledger.
            self.left.store(now.saturating_add(thousandths).min(full), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_budget_grows_with_traffic_and_with_time() {
        let gains = Allowance { share: Share::of_thousand(500), per_second: 2, reserve: 3 };
        let budget = Budget::default();
        budget.deposit(&gains);
        let spent = |budget: &Budget| (0..9).filter(|_| budget.withdraw(&gains)).count();
        assert_eq!(spent(&budget), 3, "no more than the reserve is saved up");
        (0..4).for_each(|_| budget.deposit(&gains));
        assert_eq!(spent(&budget), 2);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(spent(&budget), 2);
        tokio::time::advance(Duration::from_secs(600)).await;
        assert_eq!(spent(&budget), 3);
        budget.give_back(&gains);
        assert_eq!(spent(&budget), 1);
    }
}
