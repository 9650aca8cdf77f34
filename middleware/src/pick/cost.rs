//! The number that decides: the milliseconds until the first piece of an answer, as they are predicted for one candidate.

use std::sync::Arc;

use crate::call::Call;
use crate::cluster::{Known, Server};
use crate::place::LoadOptions;
use crate::runner::{self, Runner};

/// Milliseconds of a load of which nothing is known: for starting a runner.
const LOAD_BASE: f32 = 500.0;
/// Bytes of a model that are loaded in a millisecond, as long as nothing is known.
const LOAD_SPEED: f32 = 1e6;
/// Milliseconds that a call has its slot, as long as nothing is known.
const SERVICE: f32 = 3000.0;
/// Milliseconds for a token of a prompt, as long as nothing is known.
const PREFILL: f32 = 0.5;
/// What is within this share of the cheapest, or within so many milliseconds, is as good.
const NEAR: (f32, f32) = (0.2, 20.0);

/// The milliseconds until the first piece of an answer, and what they are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Until a slot is free.
    pub waiting: f32,
    /// Until the model is in memory.
    pub loading: f32,
    /// For the part of the prompt that is not cached there.
    pub prefill: f32,
    /// For the way, and for what we do not know.
    pub rest: f32,
}

impl Cost {
    /// All of it.
    pub fn total(&self) -> f32 {
        self.waiting + self.loading + self.prefill + self.rest
    }

    pub(super) fn is_near(&self, best: &Self) -> bool {
        let best = best.total();
        self.total() <= best + (best * NEAR.0).max(NEAR.1)
    }
}

/// So much of the tokens of a prompt as a server is not believed to have in a cache.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
pub(super) fn uncached(call: &Call, server: &Server, tokens: f32) -> f32 {
    match call.preferred.as_deref() {
        Some(preferred) if preferred.holders.contains(&server.index) && preferred.prompt > 0 => {
            tokens * (1.0 - preferred.cached as f32 / preferred.prompt as f32).clamp(0.0, 1.0)
        }
        _ => tokens,
    }
}

/// So many of the calls of others as a model in a server's memory has, as far as one can tell: its share of them.
pub(super) fn others(server: &Server) -> u32 {
    let models = u32::try_from(server.report.loaded.len()).unwrap_or(u32::MAX).max(1);
    server.load.others().div_ceil(models)
}

/// What an answer from a runner would cost, which has so many calls of others; `None`: one that was never needed.
pub(super) fn predict(
    call: &Call,
    known: &Known,
    runner: Option<&Arc<Runner>>,
    is_loaded: bool,
    others: u32,
    tokens: f32,
) -> Cost {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let load = || LOAD_BASE + known.size as f32 / LOAD_SPEED;
    let named = call.place.options.as_deref();
    let Some(runner) = runner else {
        let reloads = named.is_some_and(|named| named.reloads(&LoadOptions::default(), 0));
        let loading = if is_loaded && !reloads { 0.0 } else { load() };
        return Cost { waiting: queued(others, runner::GUESS, SERVICE), loading, prefill: tokens * PREFILL, rest: 0.0 };
    };
    let speeds = &runner.speeds;
    // Who waits for a load that goes on already waits as long, as far as one can tell.
    let loads = runner.is_loading() || runner.cause(named, is_loaded).is_some();
    Cost {
        waiting: waiting(call, runner, others),
        loading: if loads { speeds.load.get().unwrap_or_else(load) } else { 0.0 },
        prefill: tokens * speeds.prefill.get().unwrap_or(PREFILL),
        rest: speeds.rest.get().unwrap_or(0.0),
    }
}

/// Until a slot is free: those who are served, others' calls among them, and those who wait before this call, share the
/// slots.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn waiting(call: &Call, runner: &Runner, others: u32) -> f32 {
    let (slots, in_flight) = (runner.slots().max(1), runner.in_flight().saturating_add(others));
    if runner.has_room() && in_flight < slots {
        return 0.0;
    }
    let before = match &call.ticket {
        Some(ticket) => runner.line.before(runner.server, ticket),
        None => 0,
    };
    let over = f32::from(u16::try_from(in_flight.saturating_sub(slots)).unwrap_or(u16::MAX)) + before as f32 + 1.0;
    over / slots as f32 * runner.speeds.service.get().unwrap_or(SERVICE)
}

/// Until a slot is free of those that so many calls share.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn queued(calls: u32, slots: u32, service: f32) -> f32 {
    if calls < slots { 0.0 } else { (calls - slots + 1) as f32 / slots as f32 * service }
}
