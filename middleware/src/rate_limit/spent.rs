//! What was used at one proxy, as others reckon with it: proxies that share a store tell each other what was used, and each
//! decides by itself.
//!
//! Nothing waits for that, so a client that asks several proxies at once gets as much more as it manages before they have told
//! each other. Requests at the same time go another way (`crowd`): they are not used up, and come back by themselves.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::account::Account;
use super::ledger::{Ledger, Who};

/// Requests of others that are older than this are there again for the most part: they count no more.
const OLD_REQUESTS: Duration = Duration::from_secs(10);
/// The same of tokens: no budget looks back any longer.
const OLD_TOKENS: Duration = Duration::from_secs(24 * 60 * 60);

/// What was used of one account since it was told last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    who: Who,
    #[serde(flatten)]
    amount: Amount,
}

/// How much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Amount {
    /// Requests; fewer than none if some were given back.
    pub(super) requests: i64,
    /// Nanoseconds until one of them is there again.
    pub(super) cost: u64,
    /// Tokens, in the same way.
    pub(super) tokens: i64,
}

/// Counts what was used here and is not told yet.
#[derive(Debug, Default)]
pub(super) struct Untold {
    requests: AtomicI64,
    tokens: AtomicI64,
}

impl Untold {
    pub(super) fn requests(&self, count: i64) {
        self.requests.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn tokens(&self, count: i64) {
        self.tokens.fetch_add(count, Ordering::Relaxed);
    }

    /// What was counted, if anything was. From here on it counts as told.
    pub(super) fn take(&self, cost: u64) -> Option<Amount> {
        let take =
            |count: &AtomicI64| if count.load(Ordering::Relaxed) == 0 { 0 } else { count.swap(0, Ordering::Relaxed) };
        let amount = Amount { requests: take(&self.requests), cost, tokens: take(&self.tokens) };
        (amount.requests != 0 || amount.tokens != 0).then_some(amount)
    }
}

impl Ledger {
    /// What was used here since it was told last: at most so many accounts; the rest is told the next time.
    pub fn untold(&self, most: usize) -> Vec<Spent> {
        let mut all = Vec::new();
        let mut add = |who: Who, account: &Account| {
            if all.len() < most
                && let Some(amount) = account.untold()
            {
                all.push(Spent { who, amount });
            }
        };
        self.models.each(|name, account| add(Who::Model(name.clone()), account));
        self.keys.each(|key, account| add(Who::Key(key.clone()), account));
        self.clients.each(|address, account| add(Who::Client(*address), account));
        all
    }

    /// It could not be told: the next time, then.
    pub fn told_in_vain(&self, spent: &[Spent]) {
        for spent in spent {
            self.account(&spent.who).untell(&spent.amount);
        }
    }

    /// Reckons with what was used at another proxy so long ago.
    pub fn absorb(&self, spent: &Spent, age: Duration) {
        let mut amount = spent.amount;
        if age > OLD_REQUESTS {
            amount.requests = 0;
        }
        if age > OLD_TOKENS {
            amount.tokens = 0;
        }
        if amount.requests == 0 && amount.tokens == 0 {
            return;
        }
        let age = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
        self.account(&spent.who).absorb(&amount, self.now(), age);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::account::Need;
    use super::super::tokens::Estimate;
    use super::super::{Kind, Limits};
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn limits(text: &str) -> Limits {
        toml::from_str(text).unwrap()
    }

    fn uses(ledger: &Ledger, limits: &Limits, tokens: u64) -> Option<Kind> {
        let account = ledger.keys.account(&Arc::from("ada"), ledger.now());
        let need = Need { runs: true, tokens: Some(Estimate::new(0, Some(0))) };
        match account.take(limits, &need, ledger.now()) {
            Err(refusal) => Some(refusal.kind),
            Ok((mut taken, _)) => {
                account.charge(limits, &mut taken, tokens, ledger.now());
                account.leave(&taken);
                None
            }
        }
    }

    /// Each hears of what the other has told.
    fn tell(one: &Ledger, other: &Ledger, age: Duration) {
        for spent in one.untold(100) {
            let wire = serde_json::to_string(&spent).unwrap();
            other.absorb(&serde_json::from_str(&wire).unwrap(), age);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_used_at_one_proxy_is_used_at_the_other() {
        let (one, other) = (Ledger::default(), Ledger::default());
        let requests = limits("requests-per-minute = 4");
        for _ in 0..2 {
            assert_eq!((uses(&one, &requests, 0), uses(&other, &requests, 0)), (None, None));
        }
        tell(&one, &other, NOW);
        tell(&other, &one, NOW);
        for ledger in [&one, &other] {
            assert_eq!(uses(ledger, &requests, 0), Some(Kind::Requests));
            assert!(ledger.untold(100).is_empty(), "what others have told is not told again, nor what was refused");
        }
        tokio::time::advance(Duration::from_secs(15)).await;
        assert_eq!(uses(&one, &requests, 0), None);
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_are_told_too_and_old_ones_count_where_they_still_do() {
        let (one, other) = (Ledger::default(), Ledger::default());
        tokio::time::advance(Duration::from_secs(600)).await;
        let tokens = limits("tokens-per-minute = 100\ntokens-per-day = 150");
        assert_eq!(uses(&one, &tokens, 100), None);
        tell(&one, &other, Duration::from_secs(120));
        assert_eq!(uses(&other, &tokens, 60), None, "the minute is over");
        assert_eq!(uses(&other, &tokens, 1), Some(Kind::TokensDay));
        let unlimited = limits("concurrent = 9");
        assert_eq!(uses(&one, &unlimited, 7), None);
        assert!(one.untold(100).is_empty(), "nobody counts what is not limited");
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_told_is_told_later() {
        let (one, other) = (Ledger::default(), Ledger::default());
        let requests = limits("requests-per-minute = 1");
        assert_eq!(uses(&one, &requests, 0), None);
        let spent = one.untold(100);
        one.told_in_vain(&spent);
        tell(&one, &other, NOW);
        assert_eq!(uses(&other, &requests, 0), Some(Kind::Requests));
    }
}
