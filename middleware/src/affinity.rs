//! Has a conversation go on where its history is cached: on the server that answered its last turn.
//!
//! Reading a long history again takes seconds, going on from it milliseconds. Clients give their conversations no names, so
//! they are known by a chain of hashes of their messages (`chain`); those that a client does name, by the name. A first
//! turn goes to the first server in an order that every proxy finds by itself (`rendezvous`), unless another would be
//! cheaper by far; a later one to where the longest known part of it went (`table`); and none to a server that has more
//! than its share (`balance`).
//!
//! Belongs inside `model-route`, whose candidates have the model, and outside `retry`, which keeps to the order of servers
//! that is set here. With a single candidate it does nothing at all.

mod balance;
mod chain;
mod config;
mod context;
mod placed;
mod rendezvous;
mod table;
#[cfg(test)]
mod tests;
mod turn;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use smallvec::SmallVec;
use tower::{Layer, Service};

use self::balance::Balance;
pub use self::balance::Share;
use self::chain::{Chain, Clues, Link};
pub use self::config::{Config, HeaderNames, LoadFactor};
pub use self::placed::{Placed, Source};
pub use self::rendezvous::suits;
pub use self::table::Table;
use self::table::{Seen, mark};
pub use self::turn::Turn;
use crate::call::{Answer, Call, Preferred, Reply};
use crate::cluster::{Server, Snapshot};
use crate::error::Error;
use crate::instruments::Instruments;
use crate::route::Route;
use crate::trail::Fact;

/// Servers that a call is told to prefer: enough for every retry.
const CHOICES: usize = 4;
/// Bytes of a question up to which it is not worth a wait to have it answered where the same was asked before.
const SHORT: u32 = 4096;

/// The header that repeats to the client how it named its conversation.
const SESSION: HeaderName = HeaderName::from_static("x-olol-session");
/// The header that tells what was decided.
const DECISION: HeaderName = HeaderName::from_static("x-olol-decision");

/// Puts [`Affinity`] around a service.
#[derive(Clone, Debug)]
pub struct AffinityLayer {
    rules: Arc<Rules>,
}

#[derive(Debug)]
struct Rules {
    config: Config,
    ttl: Duration,
    table: Arc<Table>,
    instruments: Arc<Instruments>,
}

impl AffinityLayer {
    /// Remembers in a table that outlives this stack.
    pub fn new(config: Config, table: Arc<Table>, instruments: Arc<Instruments>) -> Self {
        table.hold(config.max_entries);
        let ttl = Duration::from_secs(config.ttl_s.get().into());
        Self { rules: Arc::new(Rules { config, ttl, table, instruments }) }
    }
}

impl<S> Layer<S> for AffinityLayer {
    type Service = Affinity<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Affinity { inner, rules: self.rules.clone() }
    }
}

/// Sends conversations where their history is.
#[derive(Clone, Debug)]
pub struct Affinity<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for Affinity<S>
where
    S: Service<Call, Response = Reply, Error = Error>,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        if !is_talk(call.route) || !call.peek.asks || call.candidates.count() < 2 {
            return Box::pin(self.inner.call(call));
        }
        let course = self.rules.look(&mut call);
        if call.dry {
            return Box::pin(self.inner.call(call));
        }
        let answer = self.inner.call(call);
        Box::pin(follow(self.rules.clone(), course, answer))
    }
}

/// Whether a route's calls have a history that a server may have cached.
fn is_talk(route: Route) -> bool {
    matches!(
        route,
        Route::Generate | Route::Chat | Route::V1Chat | Route::V1Completions | Route::V1Responses | Route::V1Messages
    )
}

/// What was decided about a call, and what is to be remembered when it is answered.
struct Course {
    snapshot: Arc<Snapshot>,
    source: Source,
    decided: Placed,
    /// What is known of the longest link that is.
    known: Option<(Link, Seen)>,
    /// Where it goes on from, and the links that are not known yet.
    turn: Turn,
    /// How its client named it.
    session: Option<HeaderValue>,
    /// Where the tokens of its answer are remembered, if it is of a kind that gives them.
    answers_under: Option<u64>,
}

async fn follow(
    rules: Arc<Rules>,
    course: Course,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error> {
    let mut reply = answer.await?;
    let server = course.server(&reply).cloned();
    let placed = course.placed(&reply, server.as_deref());
    rules.instruments.placed(course.source, placed);
    reply.headers.insert(DECISION, placed.header());
    if let Some(session) = &course.session {
        reply.headers.insert(SESSION, session.clone());
    }
    let Some(server) = server.filter(|_| reply.status.is_success()) else { return Ok(reply) };
    rules.learn(&course, &server);
    Ok(match course.answers_under {
        Some(place) => reply.watch(context::Listener::new(place, rules.table.clone(), server)),
        None => reply,
    })
}

impl Course {
    /// Who answered.
    fn server(&self, reply: &Reply) -> Option<&Arc<Server>> {
        let id = reply.body.outcome().servers.last()?;
        self.snapshot.server(id)
    }

    /// What became of the call in the end: who was to take it may have failed.
    fn placed(&self, reply: &Reply, server: Option<&Server>) -> Placed {
        let (Some((_, seen)), Some(server)) = (&self.known, server) else { return self.decided };
        let is_holder = seen.holders().any(|held| held == mark(&server.id));
        match self.decided {
            Placed::Hit | Placed::Spill | Placed::Repin if is_holder => Placed::Hit,
            Placed::Hit if reply.body.outcome().attempts > 1 => Placed::Repin,
            Placed::Hit => Placed::Spill,
            decided => decided,
        }
    }
}

impl Rules {
    /// Says where a call should rather go.
    fn look(&self, call: &mut Call) -> Course {
        let place = chain::place(call);
        let session = self.named(call).cloned();
        let Clues { source, chain, person } = match &session {
            Some(session) => Clues::named(place, session.as_bytes()),
            None => Clues::of(call, place),
        };
        let known = chain.tip_first().find_map(|link| Some((link, self.table.seen(link.hash, self.ttl)?)));
        let after = known.and_then(|(link, _)| chain.after(link));
        let decided = match (chain.root(), known) {
            (None, _) => Placed::None,
            (Some(root), Some((link, seen))) if after.is_none() || !seen.is_shared() => {
                let is_asked_again = after.is_none() && source == Source::Chain;
                self.go_on(call, person.unwrap_or(root), &chain, link, &seen, is_asked_again)
            }
            (Some(root), _) => self.begin(call, person.or(after).unwrap_or(root), &chain),
        };
        let turn = Turn {
            known: known.map(|(link, _)| self.table.keyed(link.hash)),
            goes_on: after.is_some(),
            news: chain.news(known.map(|(link, _)| link)).map(|link| self.table.keyed(link)).collect(),
        };
        if let Some(preferred) = &mut call.preferred {
            preferred.turn = turn.clone();
        }
        note(call, source, decided);
        Course {
            snapshot: call.candidates.snapshot().clone(),
            source,
            decided,
            known,
            turn,
            session,
            answers_under: (call.route == Route::Generate).then_some(place),
        }
    }

    /// How the client has named its conversation: by the first of the headers that is there. The headers of a call are fewer
    /// than what it costs to look for several among them.
    fn named<'a>(&self, call: &'a Call) -> Option<&'a HeaderValue> {
        let headers = call.headers.iter().filter(|(_, value)| !value.is_empty());
        let named = headers
            .filter_map(|(name, value)| Some((self.config.headers.iter().position(|wanted| wanted == name)?, value)));
        named.min_by_key(|(place, _)| *place).map(|(_, value)| value)
    }

    /// A conversation that begins: to the first in the order of its key that has room, if that costs no more than others.
    fn begin(&self, call: &mut Call, key: u64, chain: &Chain) -> Placed {
        let balance = Balance::of(&call.candidates, &self.table, &self.config);
        let roomy = call
            .candidates
            .iter()
            .map(|server| &**server)
            .filter(|server| server.is_usable() && !balance.is_full(server));
        let servers = rendezvous::first(key, roomy, CHOICES);
        call.preferred =
            Some(Box::new(Preferred { servers, yields: true, prompt: chain.bytes(), ..Preferred::default() }));
        Placed::Miss
    }

    /// A conversation that goes on: to who has its history, else to the next in the order of its key.
    fn go_on(&self, call: &mut Call, key: u64, chain: &Chain, link: Link, seen: &Seen, is_asked_again: bool) -> Placed {
        let balance = Balance::of(&call.candidates, &self.table, &self.config);
        let holds = |server: &Server, held| mark(&server.id) == held && !server.share.has_forgotten(seen);
        let candidate = |held| call.candidates.iter().find(|server| holds(server, held) && server.is_usable());
        let holders: SmallVec<[&Arc<Server>; CHOICES]> = seen.holders().filter_map(candidate).collect();
        if let (Some(home), false) = (holders.first(), call.dry) {
            balance.find(home);
        }
        let mut servers: SmallVec<[usize; CHOICES]> =
            holders.iter().filter(|server| !balance.is_over(server)).map(|server| server.index).collect();
        let decided = match (servers.is_empty(), holders.is_empty()) {
            (false, _) => Placed::Hit,
            (true, false) => Placed::Spill,
            (true, true) => Placed::Repin,
        };
        let others = call.candidates.iter().map(|server| &**server).filter(|server| {
            server.is_usable() && !holders.iter().any(|held| held.index == server.index) && !balance.is_full(server)
        });
        servers.extend(rendezvous::first(key, others, CHOICES - servers.len()));
        // When everybody has more than enough, a history is worth most where it is.
        let stays = servers.is_empty() && !holders.is_empty();
        if stays {
            servers.extend(holders.iter().map(|server| server.index));
        }
        call.preferred = Some(Box::new(Preferred {
            servers,
            yields: is_asked_again && link.bytes <= SHORT,
            holders: holders.iter().map(|server| server.index).collect(),
            cached: link.bytes,
            prompt: chain.bytes(),
            turn: Turn::default(),
        }));
        if stays { Placed::Hit } else { decided }
    }

    /// Remembers who has the history of a conversation now.
    fn learn(&self, course: &Course, server: &Server) {
        if course.decided == Placed::None {
            return;
        }
        self.table.answered(&course.turn, server, course.snapshot.servers.len());
        self.table.tell_others(&course.turn, server);
    }
}

/// Says in the call's trail what was decided.
fn note(call: &Call, source: Source, decided: Placed) {
    let source = ("known by", Fact::Word(source.as_str()));
    let preferred = call.preferred.as_deref();
    let first = preferred.and_then(|preferred| call.candidates.get(*preferred.servers.first()?));
    match (first, preferred) {
        (Some(server), Some(preferred)) => {
            let cached = ("cached", preferred.cached.into());
            let facts = [source, ("server", Fact::from(&server.id)), cached, ("prompt", preferred.prompt.into())];
            call.note("affinity", decided.as_str(), facts);
        }
        _ => call.note("affinity", decided.as_str(), [source]),
    }
}
