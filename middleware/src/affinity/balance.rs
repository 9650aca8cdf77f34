//! Who has more than its share: conversations stay where their history is, but not so that a server drowns in them.
//!
//! Three measures. Calls at this moment, against `load-factor` times the mean: it keeps new conversations away.
//! A moment passes, though, and a history costs seconds to read again, so a conversation leaves its server only for more than
//! a moment: when the calls that came for that server have found it over its share lately, or when it has twice the bound.
//! And turns that were answered, lately and by each, since a bound of a few calls is coarse: it may be a third over the mean.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::Config;
use super::table::{Seen, Table};
use crate::cluster::{Candidates, Server};

/// Turns, per server, after which those before count half.
const HALF_LIFE: u64 = 64;
/// Turns, per server, before their number says anything.
const ENOUGH: u64 = 4;
/// One, in fixed point: what a server has whose share is just the mean.
const EVEN: u32 = 1024;
/// A server that would have a hundred times its share has had enough long before.
const MOST: u32 = 16 * EVEN;
/// How much of what was found before stays when something new is found: 1 - 1/8.
const SMOOTHING: u32 = 8;

/// How much of the conversations one server has. Lives beside the snapshots of the cluster, as its load does.
#[derive(Debug)]
pub struct Share {
    /// Its share of the calls as calls have found it lately, in [`EVEN`]s.
    found: AtomicU32,
    /// Turns that it has answered lately, in 16ths, and in which half-life.
    turns: AtomicU64,
    /// When it has lost all that it had cached, by the clock of the table; 0: never.
    forgot: AtomicU32,
}

impl Default for Share {
    fn default() -> Self {
        Self { found: AtomicU32::new(EVEN), turns: AtomicU64::new(0), forgot: AtomicU32::new(0) }
    }
}

impl Share {
    /// A call came that would go there, and found it with so much of the calls.
    fn find(&self, share: f64) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and MOST")]
        let now = (share * f64::from(EVEN)).min(f64::from(MOST)) as u32;
        let before = self.found.load(Ordering::Relaxed);
        // Two at once may count as one: an average forgives it.
        self.found.store(before - before / SMOOTHING + now / SMOOTHING, Ordering::Relaxed);
    }

    fn found(&self) -> f64 {
        f64::from(self.found.load(Ordering::Relaxed)) / f64::from(EVEN)
    }

    /// Turns that it has answered lately, in 16ths.
    fn turns(&self, half_life: u32) -> u64 {
        let packed = self.turns.load(Ordering::Relaxed);
        let passed = half_life.saturating_sub(u32::try_from(packed >> 32).unwrap_or_default());
        (packed & u64::from(u32::MAX)).checked_shr(passed).unwrap_or(0)
    }

    /// Its engine has begun anew.
    pub(super) fn forget(&self, now: u32) {
        self.forgot.store(now, Ordering::Relaxed);
    }

    /// Whether it has lost what it had of some link.
    pub(super) fn has_forgotten(&self, seen: &Seen) -> bool {
        seen.at() < self.forgot.load(Ordering::Relaxed)
    }

    /// It has answered another turn.
    pub(super) fn count_turn(&self, half_life: u32) {
        let turns = (self.turns(half_life) + 16).min(u64::from(u32::MAX));
        self.turns.store(u64::from(half_life) << 32 | turns, Ordering::Relaxed);
    }
}

/// Which half-life a turn falls into.
pub(super) fn half_life(turns: u64, servers: usize) -> u32 {
    u32::try_from(turns / (HALF_LIFE * servers.max(1) as u64)).unwrap_or(u32::MAX)
}

/// What the candidates of a call are doing, all together.
#[derive(Debug)]
pub(super) struct Balance {
    half_life: u32,
    factor: f64,
    floor: u32,
    /// Calls per unit of weight, this one included.
    calls: f64,
    /// The same without this one.
    calls_before: f64,
    /// Turns that were answered lately per unit of weight, in 16ths; 0: too few to tell.
    turns: f64,
}

#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 calls")]
impl Balance {
    pub(super) fn of(candidates: &Candidates, table: &Table, config: &Config) -> Self {
        let half_life = half_life(table.turns(), candidates.snapshot().servers.len());
        let (mut servers, mut weight, mut calls, mut turns) = (0_u64, 0_u64, 0_u64, 0_u64);
        for server in candidates.iter().filter(|server| server.is_usable()) {
            servers += 1;
            weight += u64::from(server.weight.get());
            calls += u64::from(server.load.total());
            turns += server.share.turns(half_life);
        }
        let weight = weight.max(1) as f64;
        Self {
            half_life,
            factor: config.load_factor.get(),
            floor: config.floor.get(),
            calls: (calls + 1) as f64 / weight,
            calls_before: calls as f64 / weight,
            turns: if turns >= 16 * ENOUGH * servers { turns as f64 / weight } else { 0.0 },
        }
    }

    /// Whether a server should take no further conversation.
    pub(super) fn is_full(&self, server: &Server) -> bool {
        // Sooner than it has to give up others: a conversation that begins elsewhere costs nothing.
        lately(server) > self.room(server) || self.has_had_more(server, 1.0 + (self.factor - 1.0) / 4.0)
    }

    /// Whether a server should give up those that it has.
    pub(super) fn is_over(&self, server: &Server) -> bool {
        let calls = calls(server);
        calls > self.bound(server, 2.0 * self.factor)
            || calls > self.bound(server, self.factor) && server.share.found() > self.factor
            || self.has_had_more(server, self.factor)
    }

    /// Calls, this one included, up to which a server takes new conversations. Where few calls run, the bound is one of them
    /// more than the mean: who begins one there every time, as several proxies may that do not see each other's calls at once,
    /// has more conversations on a server than it caches.
    fn room(&self, server: &Server) -> f64 {
        let even = self.calls * weight(server);
        (self.factor * even).floor().max(even.ceil()).max(self.floor.into())
    }

    /// Calls, this one included, that a server may have at most.
    fn bound(&self, server: &Server, factor: f64) -> f64 {
        (factor * self.calls * weight(server)).ceil().max(self.floor.into())
    }

    /// Whether a server is busier than others now, when all are busy, and has had so much more than the mean lately.
    fn has_had_more(&self, server: &Server, factor: f64) -> bool {
        let all_are_busy = self.calls * weight(server) > 1.0;
        let turns = server.share.turns(self.half_life) as f64;
        all_are_busy
            && calls(server) > self.calls * weight(server)
            && self.turns > 0.0
            && turns > factor * self.turns * weight(server)
    }

    /// Remembers how much of the calls a server had when another one came for it.
    pub(super) fn find(&self, server: &Server) {
        if self.calls_before > 0.0 {
            let share = f64::from(server.load.total()) / (self.calls_before * weight(server));
            server.share.find(share);
        }
    }
}

/// Calls at a server, this one included.
fn calls(server: &Server) -> f64 {
    f64::from(server.load.total()) + 1.0
}

/// The same with those that have only just ended, as far as that matters.
fn lately(server: &Server) -> f64 {
    server.load.lately() + 1.0
}

fn weight(server: &Server) -> f64 {
    f64::from(server.weight.get())
}
