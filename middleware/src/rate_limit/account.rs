//! What one client, one key or one model has used.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::requests::{Rate, Requests};
use super::spent::{Amount, Untold};
use super::tokens::{Estimate, Tokens};
use super::{Kind, Limits, Refusal};
use crate::error::Standing;

/// How long somebody is told to wait for another of his requests to end.
const A_MOMENT: Duration = Duration::from_secs(1);

/// What a call needs, besides being a request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Need {
    /// Whether it runs a model, and so counts among those that run at the same time.
    pub(super) runs: bool,
    /// The tokens that it will probably take, if it takes any.
    pub(super) tokens: Option<Estimate>,
}

/// What a call has taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    /// Whether it counts among those that run.
    pub(super) runs: bool,
    /// Tokens that are reserved for it; `None` if its tokens are not counted.
    pub(super) reserved: Option<u64>,
}

/// What an answer was, now that it is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bill {
    /// Tokens that were used and not yet counted.
    pub(super) missing: u64,
    /// Tokens that were counted and not used.
    pub(super) too_much: u64,
    /// Tokens of the answer alone.
    pub(super) answer: u64,
}

/// Where somebody stands, with what is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standings {
    /// With requests.
    pub(super) requests: Option<Standing>,
    /// With tokens: with the budget of which less is left.
    pub(super) tokens: Option<Standing>,
}

/// What somebody has used.
#[derive(Debug, Default)]
pub(super) struct Account {
    requests: Requests,
    running: AtomicU32,
    /// Those that run at other proxies, as far as they have told.
    elsewhere: AtomicI64,
    /// Whether those who tell other proxies know that something runs here.
    is_told: AtomicBool,
    /// Made when tokens are first counted: most accounts have none.
    tokens: Mutex<Option<Box<Tokens>>>,
    /// What other proxies are to be told.
    untold: Untold,
}

impl Account {
    /// Takes all that a call needs, or nothing.
    pub(super) fn take(&self, limits: &Limits, need: &Need, now: u64) -> Result<(Taken, Standings), Refusal> {
        let mut taken = Taken::default();
        let mut standings = Standings::default();
        if let Some(most) = limits.concurrent.filter(|_| need.runs) {
            self.enter(most)?;
            taken.runs = true;
        }
        if let Some(estimate) = need.tokens.filter(|_| limits.counts_tokens()) {
            let mut tokens = self.tokens();
            let tokens = tokens.get_or_insert_default();
            match tokens.reserve(limits, estimate, now) {
                Ok(reserved) => taken.reserved = Some(reserved),
                Err(short) => {
                    self.leave(&taken);
                    return Err(short);
                }
            }
            standings.tokens = tokens.tightest(limits, now);
        }
        if let Some(rate) = Rate::of(limits) {
            match self.requests.take(rate, now) {
                Ok(standing) => {
                    self.untold.requests(1);
                    standings.requests = Some(standing);
                }
                Err((wait, standing)) => {
                    self.leave(&taken);
                    return Err(Refusal { kind: Kind::Requests, wait, standing });
                }
            }
        }
        Ok((taken, standings))
    }

    /// Gives all of it back: another limit does not let the call pass.
    pub(super) fn give_back(&self, limits: &Limits, taken: &Taken) {
        self.leave(taken);
        if let Some(rate) = Rate::of(limits) {
            self.requests.give_back(rate);
            self.untold.requests(-1);
        }
    }

    /// Gives back what is only held while a call runs.
    pub(super) fn leave(&self, taken: &Taken) {
        if taken.runs {
            self.running.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some(reserved) = taken.reserved.filter(|reserved| *reserved > 0) {
            self.tokens().get_or_insert_default().release(reserved);
        }
    }

    /// Counts tokens as used now, out of what was reserved for them.
    pub(super) fn charge(&self, limits: &Limits, taken: &mut Taken, used: u64, now: u64) {
        let Some(reserved) = &mut taken.reserved else { return };
        let mut tokens = self.tokens();
        let tokens = tokens.get_or_insert_default();
        let part = used.min(*reserved);
        *reserved -= part;
        tokens.release(part);
        tokens.charge(limits, used, now);
        self.untold.tokens(signed(used));
    }

    /// Makes what was counted what was used, and gives up what is left of the reservation.
    pub(super) fn settle(&self, limits: &Limits, taken: &mut Taken, bill: &Bill, now: u64) {
        let Some(reserved) = taken.reserved.take() else { return };
        let mut tokens = self.tokens();
        let tokens = tokens.get_or_insert_default();
        tokens.release(reserved);
        tokens.charge(limits, bill.missing, now);
        tokens.refund(bill.too_much);
        self.untold.tokens(signed(bill.missing) - signed(bill.too_much));
        if bill.answer > 0 {
            tokens.learn(bill.answer);
        }
    }

    /// Where somebody stands, and the limit that a call would meet: of several the one that takes longest. Changes nothing.
    pub(super) fn look(&self, limits: &Limits, need: &Need, now: u64) -> (Standings, Option<Refusal>) {
        let concurrent = limits.concurrent.filter(|_| need.runs).and_then(|most| {
            let running = u64::from(self.running.load(Ordering::Relaxed)) + self.elsewhere();
            (running >= u64::from(most.get())).then(|| crowded(most))
        });
        let (mut tokens, mut short) = (None, None);
        if need.tokens.is_some() && limits.counts_tokens() {
            let used = self.tokens();
            let fresh = Tokens::default();
            let used = used.as_deref().unwrap_or(&fresh);
            (tokens, short) = (used.tightest(limits, now), used.short(limits, now));
        }
        let (mut requests, mut spent) = (None, None);
        match Rate::of(limits).map(|rate| self.requests.look(rate, now)) {
            None => {}
            Some(Ok(standing)) => requests = Some(standing),
            Some(Err((wait, standing))) => {
                requests = Some(standing);
                spent = Some(Refusal { kind: Kind::Requests, wait, standing });
            }
        }
        let refusal = [concurrent, short, spent].into_iter().flatten().max_by_key(|refusal| refusal.wait);
        (Standings { requests, tokens }, refusal)
    }

    /// What other proxies are to be told, if anything is.
    pub(super) fn untold(&self) -> Option<Amount> {
        self.untold.take(self.requests.cost())
    }

    /// They could not be told.
    pub(super) fn untell(&self, amount: &Amount) {
        self.untold.requests(amount.requests);
        self.untold.tokens(amount.tokens);
    }

    /// Another proxy tells what was used there so long ago.
    pub(super) fn absorb(&self, amount: &Amount, now: u64, age: u64) {
        self.requests.absorb(amount, now);
        if amount.tokens != 0 {
            self.tokens().get_or_insert_default().absorb(amount.tokens, now, age);
        }
    }

    /// Calls that run here.
    pub(super) fn running(&self) -> u32 {
        self.running.load(Ordering::SeqCst)
    }

    /// Calls that run at other proxies, as far as they have told.
    fn elsewhere(&self) -> u64 {
        u64::try_from(self.elsewhere.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// So many more run at other proxies, or fewer.
    pub(super) fn runs_elsewhere(&self, more: i64) {
        self.elsewhere.fetch_add(more, Ordering::Relaxed);
    }

    /// Whether it is told that something runs here; from here on it counts as told.
    pub(super) fn was_told(&self) -> bool {
        self.is_told.swap(true, Ordering::SeqCst)
    }

    /// It is told no more.
    pub(super) fn is_untold(&self) {
        self.is_told.store(false, Ordering::SeqCst);
    }

    /// When it says no more than a new one would: `u64::MAX` while a call holds a part of it.
    pub(super) fn idle_at(&self) -> u64 {
        if self.running.load(Ordering::Relaxed) > 0 {
            return u64::MAX;
        }
        let tokens = self.tokens().as_ref().map_or(0, |tokens| tokens.full_at());
        tokens.max(self.requests.full_at())
    }

    fn enter(&self, most: NonZeroU32) -> Result<(), Refusal> {
        let elsewhere = self.elsewhere();
        let one_more = |running: u32| (u64::from(running) + elsewhere < u64::from(most.get())).then_some(running + 1);
        // Before it is looked whether that is told, as others look before they stop telling.
        let entered = self.running.fetch_update(Ordering::SeqCst, Ordering::Relaxed, one_more);
        entered.map(drop).map_err(|_| crowded(most))
    }

    fn tokens(&self) -> MutexGuard<'_, Option<Box<Tokens>>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nobody uses 2^63 tokens.
fn signed(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}

/// As many run as may.
fn crowded(most: NonZeroU32) -> Refusal {
    let standing = Standing { limit: most.get().into(), remaining: 0, reset: A_MOMENT };
    Refusal { kind: Kind::Concurrent, wait: A_MOMENT, standing }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(text: &str) -> Limits {
        toml::from_str(text).unwrap()
    }

    const RUNS: Need = Need { runs: true, tokens: None };

    #[test]
    fn what_one_limit_refuses_costs_nothing_at_the_others() {
        let limits = limits("requests-per-minute = 2\nconcurrent = 1\ntokens-per-minute = 1000");
        let need = Need { tokens: Some(Estimate::new(400, Some(0))), ..RUNS };
        let account = Account::default();
        let (taken, _) = account.take(&limits, &need, 0).unwrap();
        for _ in 0..10 {
            assert_eq!(account.take(&limits, &need, 0).unwrap_err().kind, Kind::Concurrent);
        }
        account.leave(&taken);
        let (taken, standings) = account.take(&limits, &need, 0).unwrap();
        assert_eq!(standings.requests.unwrap().remaining, 0);
        assert_eq!(standings.tokens.unwrap().remaining, 900);
        account.leave(&taken);
        // Refused by the last limit: what the first two gave is given back.
        assert_eq!(account.take(&limits, &need, 0).unwrap_err().kind, Kind::Requests);
        assert_eq!(account.idle_at(), 60_000_000_000);
    }

    #[test]
    fn a_refusal_tells_of_the_limit_that_takes_longest() {
        let limits = limits("requests-per-minute = 60\nburst = 1\ntokens-per-day = 10");
        let need = Need { tokens: Some(Estimate::default()), ..RUNS };
        let account = Account::default();
        let (mut taken, _) = account.take(&limits, &need, 0).unwrap();
        account.charge(&limits, &mut taken, 11, 0);
        account.leave(&taken);
        let (standings, refusal) = account.look(&limits, &need, 0);
        assert_eq!(refusal.map(|refusal| refusal.kind), Some(Kind::TokensDay));
        assert_eq!(standings.requests.unwrap().remaining, 0);
    }

    #[test]
    fn an_account_is_idle_when_all_is_there_again() {
        let limits = limits("requests-per-minute = 60\nconcurrent = 3\ntokens-per-minute = 10");
        let account = Account::default();
        assert_eq!(account.idle_at(), 0);
        let need = Need { tokens: Some(Estimate::default()), ..RUNS };
        let (mut taken, _) = account.take(&limits, &need, 0).unwrap();
        assert_eq!(account.idle_at(), u64::MAX);
        account.charge(&limits, &mut taken, 5, 7);
        account.leave(&taken);
        assert_eq!(account.idle_at(), 60_000_000_007);
    }
}
