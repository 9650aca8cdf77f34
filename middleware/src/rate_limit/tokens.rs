//! Tokens a minute and a day: windows that slide, with a part of them reserved for answers that are still coming.
//!
//! A call passes while anything is left, and reserves what it will probably take, so that many calls at once are no way
//! around a budget. Tokens count when they are seen; when the answer is over, what its server counted is what was used.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Kind, Limits, Refusal};
use crate::error::Standing;

const SECOND: u64 = 1_000_000_000;
/// The most tokens that are reserved for a prompt: pictures are long bodies and few tokens.
const LONGEST_PROMPT: u64 = 32_768;
/// The most tokens that are reserved for an answer.
const LONGEST_ANSWER: u64 = 32_768;
/// How long an answer probably is when none was seen yet.
const USUAL_ANSWER: u64 = 256;
/// How long somebody is told to wait for an answer to end that holds the rest of the budget.
const A_MOMENT: Duration = Duration::from_secs(1);

/// What a call will probably take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Estimate {
    /// Tokens of its prompt.
    prompt: u64,
    /// The most tokens of its answer, if the request says that.
    answer: Option<u64>,
}

impl Estimate {
    /// By the length of its body, and by what it says of its answer.
    pub(super) fn new(bytes: u64, answer: Option<u64>) -> Self {
        Self { prompt: (bytes / 4).min(LONGEST_PROMPT), answer: answer.map(|answer| answer.min(LONGEST_ANSWER)) }
    }

    /// Tokens of its prompt.
    pub(super) fn prompt(self) -> u64 {
        self.prompt
    }

    /// Whether its answer is a text, which is made of tokens.
    pub(super) fn expects_text(self) -> bool {
        self.answer != Some(0)
    }
}

/// The tokens that somebody has used.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// For answers that are still coming.
    reserved: u64,
    minute: Window,
    day: Window,
    /// How long answers were, on a decaying average; zero before the first.
    answers: u64,
}

impl Tokens {
    /// Reserves what a call will probably take, and says how much that is; or says which budget is spent. If both are, the
    /// one that takes longer.
    pub(super) fn reserve(&mut self, limits: &Limits, estimate: Estimate, now: u64) -> Result<u64, Refusal> {
        self.minute.expire(now, MINUTE);
        self.day.expire(now, DAY);
        self.short(limits, now).map_or(Ok(()), Err)?;
        let usual = if self.answers == 0 { USUAL_ANSWER } else { self.answers };
        let amount = (estimate.prompt + estimate.answer.unwrap_or(usual)).max(1);
        self.reserved = self.reserved.saturating_add(amount);
        Ok(amount)
    }

    /// Which budget is spent, if one is.
    pub(super) fn short(&self, limits: &Limits, now: u64) -> Option<Refusal> {
        let short = self.budgets(limits).filter_map(|(kind, limit, window, span)| {
            // What may have been used for one more to pass.
            let wait = match limit.saturating_sub(self.reserved) {
                0 => A_MOMENT,
                below => Duration::from_nanos(window.falls_below(below, now, span)?),
            };
            Some(Refusal { kind, wait, standing: self.standing(limit, window, span, now) })
        });
        short.max_by_key(|short| short.wait)
    }

    /// Where somebody stands with the budget of which the least is left.
    pub(super) fn tightest(&self, limits: &Limits, now: u64) -> Option<Standing> {
        let all = self.budgets(limits).map(|(_, limit, window, span)| self.standing(limit, window, span, now));
        all.min_by_key(|standing| standing.remaining)
    }

    fn standing(&self, limit: u64, window: &Window, span: Span, now: u64) -> Standing {
        let used = window.used(now, span).saturating_add(self.reserved);
        Standing {
            limit,
            remaining: limit.saturating_sub(used),
            reset: Duration::from_nanos(window.full_at(span).saturating_sub(now)),
        }
    }

    fn budgets(&self, limits: &Limits) -> impl Iterator<Item = (Kind, u64, &Window, Span)> {
        let minute = limits.tokens_per_minute.map(|limit| (Kind::TokensMinute, limit.get(), &self.minute, MINUTE));
        let day = limits.tokens_per_day.map(|limit| (Kind::TokensDay, limit.get(), &self.day, DAY));
        minute.into_iter().chain(day)
    }

    /// Gives up a reservation, or a part of it.
    pub(super) fn release(&mut self, reserved: u64) {
        self.reserved = self.reserved.saturating_sub(reserved);
    }

    /// Counts tokens as used now.
    pub(super) fn charge(&mut self, limits: &Limits, tokens: u64, now: u64) {
        if limits.tokens_per_minute.is_some() {
            self.minute.add(tokens, now, MINUTE);
        }
        if limits.tokens_per_day.is_some() {
            self.day.add(tokens, now, DAY);
        }
    }

    /// Takes back what was counted too much, of what was counted last.
    pub(super) fn refund(&mut self, tokens: u64) {
        self.minute.take_back(tokens);
        self.day.take_back(tokens);
    }

    /// Another proxy tells what was used there so long ago; less than nothing: what was counted too much.
    pub(super) fn absorb(&mut self, tokens: i64, now: u64, age: u64) {
        if tokens < 0 {
            return self.refund(tokens.unsigned_abs());
        }
        let at = now.saturating_sub(age);
        // A process that has just begun has no time before itself.
        if age < MINUTE.length {
            self.minute.add(tokens.unsigned_abs(), at, MINUTE);
        }
        self.day.add(tokens.unsigned_abs(), at, DAY);
    }

    /// Remembers how long an answer was.
    pub(super) fn learn(&mut self, tokens: u64) {
        let tokens = tokens.clamp(1, LONGEST_ANSWER);
        self.answers = if self.answers == 0 { tokens } else { (self.answers * 7 + tokens).div_ceil(8) };
    }

    /// When all of it is there again; `u64::MAX` while answers are coming.
    pub(super) fn full_at(&self) -> u64 {
        if self.reserved > 0 { u64::MAX } else { self.minute.full_at(MINUTE).max(self.day.full_at(DAY)) }
    }
}

/// How long a window looks back, and in how fine parts.
#[derive(Clone, Copy, Debug)]
struct Span {
    length: u64,
    part: u64,
}

/// Thirty parts.
const MINUTE: Span = Span { length: 60 * SECOND, part: 2 * SECOND };
/// Forty-eight parts.
const DAY: Span = Span { length: 24 * 60 * 60 * SECOND, part: 30 * 60 * SECOND };

/// What was used in the last minute or day.
///
/// What was used in one part counts as used at the last moment of it that anything was: what is left is never told too high,
/// and of who asks seldom the times are exact.
#[derive(Debug, Default)]
struct Window {
    /// When and how much, the oldest first. Parts in which nothing was used are not there.
    parts: VecDeque<(u64, u64)>,
    sum: u64,
}

impl Window {
    fn add(&mut self, tokens: u64, now: u64, span: Span) {
        if tokens == 0 {
            return;
        }
        self.expire(now, span);
        match self.parts.back_mut() {
            // Of two who come at the same time the earlier may come here later.
            Some((last, sum)) if *last / span.part >= now / span.part => {
                *last = now.max(*last);
                *sum = sum.saturating_add(tokens);
            }
            _ => self.parts.push_back((now, tokens)),
        }
        self.sum = self.sum.saturating_add(tokens);
    }

    fn take_back(&mut self, mut tokens: u64) {
        while let Some((_, last)) = self.parts.back_mut() {
            let taken = tokens.min(*last);
            (*last, self.sum, tokens) = (*last - taken, self.sum.saturating_sub(taken), tokens - taken);
            if *last > 0 {
                return;
            }
            self.parts.pop_back();
        }
    }

    /// Forgets what is too long ago.
    fn expire(&mut self, now: u64, span: Span) {
        while let Some((_, tokens)) = self.parts.front().filter(|(at, _)| at + span.length <= now) {
            self.sum = self.sum.saturating_sub(*tokens);
            self.parts.pop_front();
        }
    }

    /// What was used, without forgetting anything.
    fn used(&self, now: u64, span: Span) -> u64 {
        let old = self.parts.iter().take_while(|(at, _)| at + span.length <= now);
        self.sum.saturating_sub(old.map(|(_, tokens)| tokens).sum())
    }

    /// Nanoseconds until less than this was used; `None` if that is so now.
    fn falls_below(&self, limit: u64, now: u64, span: Span) -> Option<u64> {
        let mut used = self.sum;
        let mut wait = 0;
        for (at, tokens) in &self.parts {
            if used < limit {
                break;
            }
            used = used.saturating_sub(*tokens);
            wait = (at + span.length).saturating_sub(now);
        }
        (wait > 0).then_some(wait)
    }

    /// When nothing of it counts any more.
    fn full_at(&self, span: Span) -> u64 {
        self.parts.back().map_or(0, |(at, _)| at + span.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU64;

    const HOUR: u64 = 3600 * SECOND;

    fn limits(minute: u64, day: u64) -> Limits {
        Limits { tokens_per_minute: NonZeroU64::new(minute), tokens_per_day: NonZeroU64::new(day), ..Limits::default() }
    }

    /// Reserves and settles at once.
    fn uses(tokens: &mut Tokens, limits: &Limits, count: u64, now: u64) -> bool {
        let Ok(reserved) = tokens.reserve(limits, Estimate::default(), now) else { return false };
        tokens.release(reserved);
        tokens.charge(limits, count, now);
        true
    }

    fn wait(tokens: &Tokens, limits: &Limits, now: u64) -> Option<(Kind, Duration)> {
        tokens.short(limits, now).map(|short| (short.kind, short.wait))
    }

    #[test]
    fn a_call_passes_while_anything_is_left() {
        let (mut tokens, limits) = (Tokens::default(), limits(100, 0));
        for _ in 0..10 {
            assert!(uses(&mut tokens, &limits, 10, SECOND));
        }
        assert!(!uses(&mut tokens, &limits, 10, SECOND));
    }

    #[test]
    fn what_was_overshot_stays_charged() {
        let (mut tokens, limits) = (Tokens::default(), limits(100, 0));
        assert!(uses(&mut tokens, &limits, 1000, 5 * SECOND));
        assert_eq!(wait(&tokens, &limits, 6 * SECOND), Some((Kind::TokensMinute, Duration::from_secs(59))));
        assert!(!uses(&mut tokens, &limits, 1, 65 * SECOND - 1));
        assert!(uses(&mut tokens, &limits, 1, 65 * SECOND));
    }

    #[test]
    fn the_window_slides() {
        let (mut tokens, limits) = (Tokens::default(), limits(100, 0));
        assert!(uses(&mut tokens, &limits, 60, SECOND));
        assert!(uses(&mut tokens, &limits, 60, 31 * SECOND));
        // The first sixty go after a minute, and then forty are left.
        assert_eq!(wait(&tokens, &limits, 41 * SECOND), Some((Kind::TokensMinute, Duration::from_secs(20))));
        let standing = tokens.tightest(&limits, 41 * SECOND).unwrap();
        assert_eq!((standing.limit, standing.remaining, standing.reset), (100, 0, Duration::from_secs(50)));
        let standing = tokens.tightest(&limits, 61 * SECOND).unwrap();
        assert_eq!((standing.remaining, standing.reset), (40, Duration::from_secs(30)));
    }

    #[test]
    fn a_day_is_a_window_too() {
        let (mut tokens, limits) = (Tokens::default(), limits(100, 150));
        assert!(uses(&mut tokens, &limits, 80, 0));
        assert!(uses(&mut tokens, &limits, 80, HOUR));
        assert_eq!(wait(&tokens, &limits, HOUR), Some((Kind::TokensDay, Duration::from_secs(23 * 3600))));
        assert!(!uses(&mut tokens, &limits, 1, 24 * HOUR - 1));
        assert!(uses(&mut tokens, &limits, 1, 24 * HOUR));
    }

    #[test]
    fn what_is_reserved_counts_until_it_is_settled() {
        let (mut tokens, limits) = (Tokens::default(), limits(100, 0));
        let one = tokens.reserve(&limits, Estimate::new(40, Some(50)), 0).unwrap();
        assert_eq!((one, tokens.tightest(&limits, 0).unwrap().remaining), (60, 40));
        let other = tokens.reserve(&limits, Estimate::new(40, Some(50)), 0).unwrap();
        assert_eq!(wait(&tokens, &limits, 0), Some((Kind::TokensMinute, A_MOMENT)));
        tokens.release(one);
        tokens.charge(&limits, 7, 0);
        assert_eq!(tokens.tightest(&limits, 0).unwrap().remaining, 33);
        tokens.release(other);
        assert_eq!(tokens.tightest(&limits, 0).unwrap().remaining, 93);
    }

    #[test]
    fn what_was_counted_too_much_is_given_back() {
        let (mut tokens, limits) = (Tokens::default(), limits(100, 0));
        tokens.charge(&limits, 30, 0);
        tokens.charge(&limits, 30, 10 * SECOND);
        tokens.refund(40);
        let standing = tokens.tightest(&limits, 10 * SECOND).unwrap();
        assert_eq!((standing.remaining, standing.reset), (80, Duration::from_secs(50)));
        tokens.refund(40);
        assert_eq!((tokens.tightest(&limits, 0).unwrap().remaining, tokens.full_at()), (100, 0));
    }

    #[test]
    fn the_usual_length_of_an_answer_is_learned() {
        let (mut tokens, limits) = (Tokens::default(), limits(100_000, 0));
        assert_eq!(tokens.reserve(&limits, Estimate::default(), 0), Ok(USUAL_ANSWER));
        tokens.learn(16);
        assert_eq!(tokens.reserve(&limits, Estimate::default(), 0), Ok(16));
        (0..50).for_each(|_| tokens.learn(800));
        assert!(matches!(tokens.reserve(&limits, Estimate::default(), 0), Ok(780..=800)));
        let most = Estimate::new(u64::MAX, Some(u64::MAX));
        assert_eq!(tokens.reserve(&limits, most, 0), Ok(LONGEST_PROMPT + LONGEST_ANSWER));
    }

    proptest::proptest! {
        #[test]
        fn no_window_is_ever_told_too_empty(uses in proptest::collection::vec((0_u64..10 * SECOND, 1_u64..100), 1..200)) {
            let limits = limits(u64::MAX, 0);
            let mut tokens = Tokens::default();
            let mut now = 0;
            let mut all = Vec::new();
            for (pause, count) in uses {
                now += pause;
                tokens.charge(&limits, count, now);
                all.push((now, count));
                let since = |length: u64| all.iter().filter(|(at, _)| at + length > now).map(|(_, count)| count).sum::<u64>();
                let told = u64::MAX - tokens.tightest(&limits, now).unwrap().remaining;
                proptest::prop_assert!(since(MINUTE.length) <= told && told <= since(MINUTE.length + MINUTE.part));
                proptest::prop_assert!(tokens.minute.parts.len() <= 32);
            }
        }

        #[test]
        fn who_waits_as_long_as_told_passes(uses in proptest::collection::vec((0_u64..10 * SECOND, 1_u64..100), 1..50)) {
            let limits = limits(150, 2000);
            let mut tokens = Tokens::default();
            let mut now = 0;
            for (pause, count) in uses {
                now += pause;
                tokens.charge(&limits, count, now);
            }
            if let Some((_, wait)) = wait(&tokens, &limits, now) {
                let then = now + u64::try_from(wait.as_nanos()).unwrap();
                proptest::prop_assert!(tokens.reserve(&limits, Estimate::default(), then - 1).is_err());
                proptest::prop_assert!(tokens.reserve(&limits, Estimate::default(), then).is_ok());
            }
        }
    }
}
