//! Holds clients to what they may use: requests a minute, requests at the same time, tokens a minute and a day.
//!
//! Three kinds of limits hold together. A client that has shown a key is held to the key's limits, one without a key to those
//! of its address; and a model has limits that all clients share. Calls that run a model count against all of them, other
//! calls only as requests of their client. What only unloads a model counts nothing, nor does a look at the status.
//!
//! Belongs inside `auth`, which finds the key, and outside `queue`, where who may not ask must not wait; outside `retry`, too:
//! a call costs its client one request, however many attempts it takes. The model is the one that the call is for when it comes
//! here: with `alias` outside, what an alias stands for.
//!
//! Requests and bursts are governor's, over accounts that outlive a reload. Tokens are counted as they are seen and settled
//! by what the server counted. All that is held for a call is free again when the *body* of its answer ends.

mod account;
mod config;
mod crowd;
mod ledger;
mod requests;
mod spent;
mod table;
mod ticket;
mod tokens;

use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use smallvec::SmallVec;
use tower::{Layer, Service};

use crate::call::{Answer, Call, Payload, Reply};
use crate::error::{Error, Standing};
use crate::instruments::Instruments;
use crate::pattern::Pattern;
use crate::route::Route;
use crate::trail::Fact;

use account::{Account, Need, Standings};
use ledger::{Address, Who};
use ticket::Ticket;
use tokens::Estimate;

pub use config::{Config, Limits, Models};
pub use crowd::{Crowded, Crowds, LEASE};
pub use ledger::Ledger;
pub use spent::Spent;

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Requests a minute.
    Requests,
    /// Requests at the same time.
    Concurrent,
    /// Tokens a minute.
    TokensMinute,
    /// Tokens a day.
    TokensDay,
}

impl Kind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Concurrent => "concurrent",
            Self::TokensMinute => "tokens-minute",
            Self::TokensDay => "tokens-day",
        }
    }
}

/// Whose limit it is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whose {
    /// Of the key with this name.
    Key(Arc<str>),
    /// Of the client's address.
    Client,
    /// Of the models that this pattern fits.
    Model(Arc<str>),
}

impl Whose {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Client => "client",
            Self::Model(_) => "model",
        }
    }
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(name) if name.is_empty() => f.write_str("this key"),
            Self::Key(name) => write!(f, "key {name}"),
            Self::Client => f.write_str("this address"),
            Self::Model(pattern) => write!(f, "model {pattern}"),
        }
    }
}

/// A limit that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal {
    /// Which one.
    kind: Kind,
    /// When to ask again.
    wait: Duration,
    /// Where the client stands with it.
    standing: Standing,
}

/// Limits that hold for a call, and the account that they are reckoned with.
struct Place {
    whose: Whose,
    who: Who,
    limits: Limits,
    account: Arc<Account>,
}

/// Puts [`RateLimit`] around a service.
#[derive(Clone, Debug)]
pub struct RateLimitLayer {
    rules: Arc<Rules>,
}

#[derive(Debug)]
struct Rules {
    key: Limits,
    client: Limits,
    models: Vec<Model>,
    /// Whether anything is limited for somebody.
    limits_some: bool,
    ledger: Arc<Ledger>,
    instruments: Arc<Instruments>,
}

/// The limits of a pattern. Its account is looked up once for a stack, not by every call.
#[derive(Debug)]
struct Model {
    pattern: Pattern,
    name: Arc<str>,
    limits: Limits,
    account: Arc<Account>,
}

impl RateLimitLayer {
    /// Limits as configured, reckoned with accounts that outlive this stack.
    pub fn new(config: &Config, ledger: Arc<Ledger>, instruments: Arc<Instruments>) -> Self {
        let now = ledger.now();
        let model = |(pattern, limits): &(Pattern, Limits)| {
            let name: Arc<str> = pattern.to_string().into();
            let account = ledger.models.account(&name, now);
            Model { pattern: pattern.clone(), name, limits: *limits, account }
        };
        let models: Vec<Model> = config.models.iter().map(model).collect();
        let Config { key, client, .. } = *config;
        let limits_some = key.concern(true) || client.concern(true) || !models.is_empty();
        Self { rules: Arc::new(Rules { key, client, models, limits_some, ledger, instruments }) }
    }
}

impl<S> Layer<S> for RateLimitLayer {
    type Service = RateLimit<S>;

    fn layer(&self, inner: S) -> Self::Service {
        RateLimit { inner, rules: self.rules.clone() }
    }
}

/// Answers for clients that have used what they may; passes every other call on.
#[derive(Clone, Debug)]
pub struct RateLimit<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for RateLimit<S>
where
    S: Service<Call, Response = Reply, Error = Error, Future = Answer>,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        match self.rules.admit(&call) {
            Ok(None) => self.inner.call(call),
            Ok(Some(ticket)) => Box::pin(follow(ticket, self.inner.call(call))),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

/// Tells the client where it stands, and keeps what the call has taken until its answer is over.
async fn follow(mut ticket: Box<Ticket>, answer: Answer) -> Result<Reply, Error> {
    let mut reply = answer.await?;
    ticket.standings().write(&mut reply.headers);
    if !reply.status.is_success() {
        ticket.count_nothing();
    }
    Ok(if ticket.holds() { reply.watch(ticket) } else { reply })
}

impl Rules {
    /// Lets a call pass, or not. `None`: it takes nothing.
    fn admit(&self, call: &Call) -> Result<Option<Box<Ticket>>, Error> {
        let is_open = !self.limits_some && call.key.get().is_none_or(|key| key.limits.is_none());
        if is_open || is_unload(call) || is_look(call) {
            return Ok(None);
        }
        let runs = call.route.infers();
        let now = self.ledger.now();
        let places = self.places(call, runs, now);
        if places.is_empty() {
            return Ok(None);
        }
        let counts = runs && places.iter().any(|place| place.limits.counts_tokens());
        let need = Need { runs, tokens: if counts { estimate(call) } else { None } };
        if call.dry {
            foretell(call, &places, &need, now);
            return Ok(None);
        }
        match Ticket::take(&self.ledger, &places, &need, now) {
            Ok(ticket) => {
                note(call, "within the limits", ticket.standings());
                Ok(Some(ticket))
            }
            Err(met) => {
                // Who is told to come back later is told of the limit that takes longest.
                let (whose, limits, refusal) = look(&places, &need, now).1.unwrap_or(met);
                self.instruments.rate_limited(whose.as_str(), refusal.kind);
                note_refusal(call, "refused", &whose, &refusal);
                Err(error(&whose, &limits, refusal))
            }
        }
    }

    /// Whose limits hold for a call. A call that only asks what would be done makes no accounts.
    fn places(&self, call: &Call, runs: bool, now: u64) -> SmallVec<[Place; 2]> {
        let mut places = SmallVec::new();
        let (clients, keys) = (&self.ledger.clients, &self.ledger.keys);
        if let Some(key) = call.key.get() {
            let limits = key.limits.unwrap_or(self.key);
            if limits.concern(runs) {
                let account =
                    if call.dry { keys.find(&key.id).unwrap_or_default() } else { keys.account(&key.id, now) };
                let whose = Whose::Key(key.name.clone());
                places.push(Place { whose, who: Who::Key(key.id.clone()), limits, account });
            }
        } else if self.client.concern(runs) {
            let address = Address::of(call.client);
            let account =
                if call.dry { clients.find(&address).unwrap_or_default() } else { clients.account(&address, now) };
            places.push(Place { whose: Whose::Client, who: Who::Client(address), limits: self.client, account });
        }
        if let Some(name) = call.place.model.as_ref().filter(|_| runs) {
            let fitting =
                self.models.iter().filter(|model| model.pattern.matches_model(name) && model.limits.concern(runs));
            places.extend(fitting.map(|model| Place {
                whose: Whose::Model(model.name.clone()),
                who: Who::Model(model.name.clone()),
                limits: model.limits,
                account: model.account.clone(),
            }));
        }
        places
    }
}

/// Whether a call only asks how the proxy is. Who watches that must not use up what the same address may ask of models, and at
/// servers it costs one question at the most, of which few go on at a time.
fn is_look(call: &Call) -> bool {
    call.route == Route::Status
}

fn is_unload(call: &Call) -> bool {
    matches!(call.route, Route::Generate | Route::Chat) && call.peek.unloads()
}

/// What a call will probably take; `None` if it makes a model do no more than load.
fn estimate(call: &Call) -> Option<Estimate> {
    let Payload::Whole(pieces) = &call.payload else {
        // Too long to be held, so nobody has looked into it.
        return Some(Estimate::new(call.payload.length().unwrap_or(u64::MAX), None));
    };
    if !call.peek.asks {
        return None;
    }
    let bytes = match call.route {
        // Sound is long, and few tokens.
        Route::V1Audio => 0,
        _ => pieces.iter().map(|piece| piece.len() as u64).sum(),
    };
    let answer = match call.route {
        Route::Embed | Route::Embeddings | Route::V1Embeddings => Some(0),
        _ => call.peek.most_tokens(pieces),
    };
    Some(Estimate::new(bytes, answer))
}

/// Where the client stands, and the limit that it meets: of several the one that takes longest.
fn look(places: &[Place], need: &Need, now: u64) -> (Standings, Option<(Whose, Limits, Refusal)>) {
    let mut standings = Standings::default();
    let mut worst: Option<(&Place, Refusal)> = None;
    for place in places {
        let (here, refusal) = place.account.look(&place.limits, need, now);
        standings = standings.tighter(here);
        if let Some(refusal) = refusal
            && worst.is_none_or(|(_, worst)| worst.wait < refusal.wait)
        {
            worst = Some((place, refusal));
        }
    }
    (standings, worst.map(|(place, refusal)| (place.whose.clone(), place.limits, refusal)))
}

/// Says in the trail what would be done.
fn foretell(call: &Call, places: &[Place], need: &Need, now: u64) {
    match look(places, need, now) {
        (_, Some((whose, _, refusal))) => note_refusal(call, "would be refused", &whose, &refusal),
        (standings, None) => note(call, "within the limits", &standings),
    }
}

fn note(call: &Call, decision: &'static str, standings: &Standings) {
    let left = |name, standing: Option<Standing>| Some((name, Fact::from(standing?.remaining)));
    let facts = [left("requests-left", standings.requests), left("tokens-left", standings.tokens)];
    call.note("rate-limit", decision, facts.into_iter().flatten());
}

fn note_refusal(call: &Call, decision: &'static str, whose: &Whose, refusal: &Refusal) {
    let who = match whose {
        Whose::Key(name) => Fact::Text(name.clone()),
        Whose::Client => Fact::Word("this address"),
        Whose::Model(pattern) => Fact::Text(pattern.clone()),
    };
    let wait = Fact::Ms(refusal.wait.as_secs_f64() * 1000.0);
    let facts =
        [("scope", whose.as_str().into()), ("of", who), ("limit", refusal.kind.as_str().into()), ("wait", wait)];
    call.note("rate-limit", decision, facts);
}

/// What the client is told.
fn error(whose: &Whose, limits: &Limits, refusal: Refusal) -> Error {
    let small = |limit: Option<NonZeroU32>| limit.map_or(0, |limit| u64::from(limit.get()));
    let large = |limit: Option<NonZeroU64>| limit.map_or(0, NonZeroU64::get);
    let (limit, thing, when) = match refusal.kind {
        Kind::Requests => (small(limits.requests_per_minute), "request", "a minute"),
        Kind::Concurrent => (small(limits.concurrent), "request", "at the same time"),
        Kind::TokensMinute => (large(limits.tokens_per_minute), "token", "a minute"),
        Kind::TokensDay => (large(limits.tokens_per_day), "token", "a day"),
    };
    let plural = if limit == 1 { "" } else { "s" };
    Error::RateLimited {
        what: format!("{limit} {thing}{plural} {when} for {whose}"),
        retry_after: refusal.wait,
        standing: refusal.standing,
    }
}

#[cfg(test)]
mod tests;
