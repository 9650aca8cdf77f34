//! What a call has taken of its limits, until its answer is over.

use std::cmp::Reverse;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

use super::account::{Account, Bill, Need, Standings, Taken};
use super::ledger::Ledger;
use super::tokens::Estimate;
use super::{Limits, Place, Refusal, Whose};
use crate::call::{Chunk, End, Outcome, Watcher};
use crate::error::{Standing, number};

/// So many pieces of an answer are counted together: a piece is a token, and counting takes a lock.
const TOGETHER: u64 = 32;

/// What a call holds.
pub(super) struct Ticket {
    ledger: Arc<Ledger>,
    claims: SmallVec<[Claim; 2]>,
    standings: Standings,
    /// Tokens of the prompt, as estimated.
    prompt: u64,
    /// Whether the pieces of its answer are tokens: numbers of an embedding are none.
    speaks: bool,
    /// Pieces of the answer so far, if they are tokens.
    pieces: u64,
    /// Whether anything of the answer was seen.
    begun: bool,
    /// Whether its tokens are counted.
    counts: bool,
    /// Tokens that were counted as used so far.
    charged: u64,
}

/// What a call holds of one account.
struct Claim {
    account: Arc<Account>,
    limits: Limits,
    taken: Taken,
}

impl Ticket {
    /// Takes what a call needs of all limits that hold for it, or nothing: then it says whose limit is in the way.
    pub(super) fn take(
        ledger: &Arc<Ledger>,
        places: &[Place],
        need: &Need,
        now: u64,
    ) -> Result<Box<Self>, (Whose, Limits, Refusal)> {
        // Boxed at once: it goes into a future and from there into a body.
        let mut ticket = Box::new(Self {
            ledger: ledger.clone(),
            claims: SmallVec::new(),
            standings: Standings::default(),
            prompt: need.tokens.map_or(0, Estimate::prompt),
            speaks: need.tokens.is_some_and(Estimate::expects_text),
            pieces: 0,
            begun: false,
            counts: false,
            charged: 0,
        });
        for Place { whose, limits, account, .. } in places {
            match account.take(limits, need, now) {
                Ok((taken, standings)) => {
                    ticket.standings = ticket.standings.tighter(standings);
                    ticket.counts |= taken.reserved.is_some();
                    ticket.claims.push(Claim { account: account.clone(), limits: *limits, taken });
                }
                Err(refusal) => {
                    ticket.claims.drain(..).for_each(|claim| claim.account.give_back(&claim.limits, &claim.taken));
                    return Err((whose.clone(), *limits, refusal));
                }
            }
        }
        for (place, claim) in places.iter().zip(&ticket.claims).filter(|(_, claim)| claim.taken.runs) {
            ledger.begins(&place.who, &claim.account);
        }
        Ok(ticket)
    }

    /// Where the client stands: with the limit of which the least is left.
    pub(super) fn standings(&self) -> &Standings {
        &self.standings
    }

    /// Lets go of what is spent already. False if nothing is left to hold.
    pub(super) fn holds(&mut self) -> bool {
        self.claims.retain(|claim| claim.taken.runs || claim.taken.reserved.is_some());
        !self.claims.is_empty()
    }

    /// Does not count tokens any more: the answer is a refusal.
    pub(super) fn count_nothing(&mut self) {
        for claim in &mut self.claims {
            claim.account.leave(&Taken { runs: false, ..claim.taken });
            claim.taken.reserved = None;
        }
        self.counts = false;
    }

    /// Counts tokens as used now.
    fn charge(&mut self, tokens: u64) {
        let now = self.ledger.now();
        for Claim { account, limits, taken } in &mut self.claims {
            account.charge(limits, taken, tokens, now);
        }
        self.charged += tokens;
    }

    /// What was used, as far as it is known now that the answer is over.
    fn used(&self, outcome: &Outcome) -> u64 {
        match &outcome.counters {
            Some(counters) => counters.prompt_tokens.saturating_add(counters.output_tokens),
            // No less than this.
            None if self.begun => self.prompt + self.pieces,
            None => 0,
        }
    }

    /// Makes what was counted so far what was used.
    fn settle(&mut self, outcome: &Outcome) {
        let used = self.used(outcome);
        let bill = Bill {
            missing: used.saturating_sub(self.charged),
            too_much: self.charged.saturating_sub(used),
            answer: outcome.counters.map_or(self.pieces, |counters| counters.output_tokens),
        };
        let now = self.ledger.now();
        for Claim { account, limits, taken } in &mut self.claims {
            account.settle(limits, taken, &bill, now);
        }
    }
}

impl Watcher for Box<Ticket> {
    fn chunk(&mut self, _chunk: &Chunk) {
        self.pieces += u64::from(self.speaks);
        self.begun = true;
        if self.counts && self.pieces - self.charged >= TOGETHER {
            self.charge(TOGETHER);
        }
    }

    fn end(&mut self, _end: End, outcome: &Outcome) {
        if self.counts {
            self.settle(outcome);
        }
        self.claims.drain(..).for_each(|claim| claim.account.leave(&claim.taken));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // There was no answer: the call failed, or its client left before.
        self.claims.drain(..).for_each(|claim| claim.account.leave(&claim.taken));
    }
}

impl Standings {
    /// Of two standings with each kind of limit, the one of which less is left.
    pub(super) fn tighter(self, other: Self) -> Self {
        let tighter = |one: Option<_>, other: Option<_>| {
            let both = [one, other].into_iter().flatten();
            both.min_by_key(|standing: &Standing| (standing.remaining, Reverse(standing.reset)))
        };
        Self { requests: tighter(self.requests, other.requests), tokens: tighter(self.tokens, other.tokens) }
    }

    /// Writes them into the headers of an answer: requests as every 429 has them, tokens under OpenAI's names and in its form
    /// (`17s`).
    pub(super) fn write(&self, headers: &mut HeaderMap) {
        const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-tokens");
        const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-tokens");
        const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-tokens");
        if let Some(requests) = &self.requests {
            requests.write(headers);
        }
        if let Some(tokens) = &self.tokens {
            headers.insert(LIMIT, number(tokens.limit));
            headers.insert(REMAINING, number(tokens.remaining));
            let mut reset: SmallVec<[u8; 24]> = itoa::Buffer::new().format(tokens.reset_seconds()).bytes().collect();
            reset.push(b's');
            headers.insert(RESET, HeaderValue::from_bytes(&reset).unwrap_or(HeaderValue::from_static("1s")));
        }
    }
}
