//! The leaf of the stack: takes the cheapest of the candidates, a slot on it, and sends the call there.
//!
//! One number decides: the milliseconds until the first piece of the answer, as [`cost`](Cost) predicts them. Near-ties go to
//! the least loaded, by weight, and of those to the better of two taken at random. Servers that failed or do not answer are
//! skipped while others are left; when nobody else is left they are asked all the same, since what is believed of them may
//! be old. The slot is free again when the reply's body ends.
//!
//! A call with a ticket (`queue` gives them) waits for a slot: if the cheapest candidate is full, the call comes back as
//! [`Error::Busy`] with the runners that are worth waiting for. Without a ticket it is sent, and waits inside Ollama.

mod config;
mod cost;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use smallvec::SmallVec;
use tokio::time::Instant;
use tower::Service;

use crate::call::{Answer, Call, Chunk, End, Head, Outcome, Reply, Watcher};
use crate::circuit::Trial;
use crate::cluster::{Known, Server};
use crate::error::Error;
use crate::instruments::{self, RunnerMeters};
use crate::judge::Witness;
use crate::names::ModelName;
use crate::runner::{self, Loading, Runner, Seen};
use crate::slots::Lease;
use crate::stack;
use crate::trail::Fact;
pub use config::{Config, Policy, SlotRule};
pub use cost::Cost;
use cost::{others, predict, uncached};

/// What picking remembers: outlives every stack.
#[derive(Debug, Default)]
pub struct Picking {
    config: ArcSwap<Config>,
    /// How often it was configured.
    version: AtomicU32,
    turn: AtomicUsize,
}

impl Picking {
    /// Picks by other rules from now on.
    pub fn configure(&self, config: Config) {
        self.config.store(Arc::new(config));
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// Bytes of a request's body for a token of its prompt.
const BYTES_PER_TOKEN: f32 = 4.0;
/// How much busier than the least busy candidate one may be that is preferred only as long as that costs nothing.
const BUSIER: f64 = 1.2;

/// Where the services of the servers come from.
pub trait Fleet: Clone + Send + Sync + 'static {
    /// The service of one server.
    type Service: Service<Call, Response = Reply, Error = Error, Future = Answer> + Send + 'static;

    /// The service of a server of the current snapshot, if it is still there.
    fn service(&self, server: &Server) -> Option<Self::Service>;
}

/// Sends each call to one of its candidates.
#[derive(Clone, Debug)]
pub struct Pick<F> {
    fleet: F,
    picking: Arc<Picking>,
}

impl<F: Fleet> Pick<F> {
    /// Picks from a fleet.
    pub fn new(fleet: F, picking: Arc<Picking>) -> Self {
        Self { fleet, picking }
    }

    /// Asks a server what the proxy itself wants to know. That is no call of a client: it takes no slot, no figures tell of it,
    /// and the server is not judged by it.
    pub fn look_up(&self, call: Call, server: &Server) -> Answer {
        match self.fleet.service(server) {
            Some(service) => stack::send(service, call),
            None => Box::pin(std::future::ready(Err(left(server)))),
        }
    }
}

/// Why nobody can be asked at a server of an older snapshot.
fn left(server: &Server) -> Error {
    Error::NoServer(format!("server {} has left", server.id))
}

impl<F: Fleet> Service<Call> for Pick<F> {
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        let picked = match self.picking.pick(&mut call) {
            Ok(picked) => picked,
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
        let Picked { server, cost, rows, .. } = &picked;
        let said = [("server", Fact::from(&server.id)), ("predicted-ms", Fact::ms(cost.total()))];
        let asked = rows.iter().flat_map(|(how, rows)| [("by", (*how).into()), ("candidates", rows.clone())]);
        call.note("pick", "picked", said.into_iter().chain(asked));
        if call.dry {
            let mut reply = Reply::full(StatusCode::OK, HeaderMap::new(), Bytes::new());
            reply.body.outcome_mut().servers.push(server.id.clone());
            return Box::pin(std::future::ready(Ok(reply)));
        }
        match self.fleet.service(server) {
            Some(service) => {
                let attempts = call.attempts + 1;
                let meters = picked.known.as_ref().map(|known| known.meters.at(server));
                if let Some(asked) = &call.asked {
                    asked.sent(&server.id, attempts);
                }
                let visit = picked.visit(&mut call);
                let answer = stack::send(service, call);
                Box::pin(follow(visit, attempts, meters, answer))
            }
            None => Box::pin(std::future::ready(Err(left(server)))),
        }
    }
}

/// A server, with a slot on it.
struct Picked {
    server: Arc<Server>,
    known: Option<Arc<Known>>,
    cost: Cost,
    lease: Option<Lease>,
    /// How it was chosen, and all candidates: for who only asks.
    rows: Option<(&'static str, Fact)>,
}

impl Picked {
    fn visit(self, call: &mut Call) -> Visit {
        let uncached = uncached(call, &self.server, 1.0);
        let runner = self.lease.as_ref().and_then(|lease| lease.runner().cloned());
        let is_loaded = self.known.as_ref().is_some_and(|known| known.loaded.contains(self.server.index));
        let (cause, loading) = runner.as_ref().map_or((None, None), |runner| runner.takes(call, is_loaded));
        if let (Some(cause), Some(known)) = (cause, &self.known) {
            known.meters.load(cause);
            call.note("pick", "makes the server load the model", [("cause", Fact::Word(cause.as_str()))]);
        }
        let others = runner.as_ref().map_or(0, |runner| runner.in_flight().saturating_sub(1));
        let alone = self.server.load.others() == 0;
        let trial = Trial::of(call, &self.server, self.known.as_deref().zip(runner.as_ref()));
        let witness = Witness::of(call, &self.server, runner.as_ref());
        let sent = Instant::now();
        call.progress.is_sent(sent - call.arrived, loading.is_some());
        Visit {
            head: call.head.clone(),
            trial,
            server: self.server,
            lease: self.lease,
            runner,
            loading,
            loads: cause.is_some(),
            sent,
            first: None,
            streamed: false,
            others,
            alone,
            predicted: self.cost,
            uncached,
            witness,
        }
    }
}

/// One candidate as a choice.
struct Choice<'a> {
    server: &'a Arc<Server>,
    runner: Option<&'a Arc<Runner>>,
    cost: Cost,
    /// Calls per unit of weight, this one included, from whomever they are.
    load: f64,
    is_loaded: bool,
    has_room: bool,
}

impl Choice<'_> {
    fn is_less_loaded(&self, other: &Self) -> bool {
        self.load < other.load
    }

    fn has_fewer_calls(&self, other: &Self) -> bool {
        self.server.load.total() < other.server.load.total()
    }

    /// What `explain` shows of it.
    fn row(&self) -> Fact {
        let Cost { waiting, loading, prefill, rest } = self.cost;
        let mut row = vec![
            ("server", Fact::from(&self.server.id)),
            ("predicted-ms", Fact::ms(self.cost.total())),
            ("waiting-ms", Fact::ms(waiting)),
            ("loading-ms", Fact::ms(loading)),
            ("prefill-ms", Fact::ms(prefill)),
            ("rest-ms", Fact::ms(rest)),
            ("in-flight", self.server.load.in_flight().into()),
        ];
        if self.server.load.others() > 0 {
            row.push(("others", self.server.load.others().into()));
        }
        if let Some(runner) = self.runner {
            row.extend([("slots", runner.slots().into()), ("slots-from", runner.source().into())]);
        }
        Fact::Row(row)
    }
}

type Choices<'a> = SmallVec<[Choice<'a>; 8]>;

impl Picking {
    /// Chooses a server and takes a slot there.
    fn pick(&self, call: &mut Call) -> Result<Picked, Error> {
        let known = known(call);
        let runners = known.as_ref().map(|known| known.runners.all());
        let lease = call.lease.take();
        let mut choices = self.choices(call, known.as_deref(), runners.as_ref().map_or(&[], |runners| runners));
        // What runs no model is no burden.
        choices.retain(|choice| !choice.server.draining || !call.route.infers());
        if choices.iter().any(|choice| choice.server.is_usable()) {
            choices.retain(|choice| choice.server.is_usable());
        }
        leave_doubtful(&mut choices, call);
        if choices.is_empty() {
            return Err(nobody(call));
        }
        let policy = self.config.load().policy;
        let rows = call.dry.then(|| Fact::List(choices.iter().map(Choice::row).collect()));
        // Who has waited for a slot takes it, as long as it is one of a candidate.
        if let Some(lease) = lease {
            let its = lease.runner().map(|runner| runner.server);
            if let Some(choice) = choices.iter().find(|choice| its == Some(choice.server.index)) {
                let cost = Cost { waiting: 0.0, ..choice.cost };
                return Ok(Picked {
                    server: choice.server.clone(),
                    known: known.clone(),
                    cost,
                    lease: Some(lease),
                    rows: None,
                });
            }
        }
        keep_tier(&mut choices, call);
        let preferred = preferred(&choices, call);
        let how = if preferred.is_some() { "preferred by affinity" } else { policy.as_str() };
        let at = preferred.unwrap_or_else(|| self.choose(policy, &choices, call));
        let (server, cost) = (choices[at].server.clone(), choices[at].cost);
        let lease = match &known {
            _ if call.dry => {
                if call.ticket.is_some() && !choices[at].has_room {
                    call.note("pick", "would wait for a slot", [("server", Fact::from(&server.id))]);
                }
                None
            }
            None => Some(server.load.lease()),
            Some(known) if call.ticket.is_none() => Some(Lease::take_anyway(&self.runner(known, &server))),
            Some(known) => {
                let lease = choices[at].has_room.then(|| Lease::take(&self.runner(known, &server))).flatten();
                Some(lease.ok_or_else(|| busy(&choices, at, known))?)
            }
        };
        Ok(Picked { server, known: known.clone(), cost, lease, rows: rows.map(|rows| (how, rows)) })
    }

    /// The candidates, each with what it would cost.
    fn choices<'a>(&self, call: &'a Call, known: Option<&Known>, runners: &'a [Arc<Runner>]) -> Choices<'a> {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let tokens = call.payload.length().unwrap_or(0) as f32 / BYTES_PER_TOKEN;
        let found = call.tiers.as_ref().map(|tiers| tiers.of(call.candidates.snapshot()));
        let choice = |server: &'a Arc<Server>| {
            let runner = runner::find(runners, server);
            if let (Some(runner), Some(known)) = (runner, known) {
                self.tell_slots(runner, server, known);
            }
            let weight = found.as_ref().map_or(server.weight, |found| found.weight(server));
            let is_loaded = known.is_none_or(|known| known.loaded.contains(server.index));
            let cost = match known {
                Some(known) => {
                    let others = if is_loaded { others(server) } else { 0 };
                    predict(call, known, runner, is_loaded, others, uncached(call, server, tokens))
                }
                None => Cost::default(),
            };
            let load = (server.load.lately() + 1.0) / f64::from(weight.get());
            Choice { server, runner, cost, load, is_loaded, has_room: runner.is_none_or(|runner| runner.has_room()) }
        };
        call.candidates.iter().map(choice).collect()
    }

    /// The runner of a model on a server, perhaps a new one, with the slots that the operator said.
    fn runner(&self, known: &Known, server: &Server) -> Arc<Runner> {
        let runner = known.runners.at(server);
        self.tell_slots(&runner, server, known);
        runner
    }

    /// Tells a runner what the operator says of its slots, once for each version of the configuration.
    fn tell_slots(&self, runner: &Arc<Runner>, server: &Server, known: &Known) {
        runner.configure(self.version.load(Ordering::Acquire), || self.config.load().slots(server, &known.name));
    }

    /// The place of the chosen one in the list.
    #[expect(
        clippy::redundant_closure_for_method_calls,
        reason = "the methods are of one lifetime, the pointer is of any"
    )]
    fn choose(&self, policy: Policy, choices: &Choices<'_>, call: &Call) -> usize {
        let near = match policy {
            Policy::Predicted => nearest(choices),
            // The others know nothing of loads: who has the model in memory comes first, as long as there is room.
            _ => best(choices, |choice| choice.is_loaded && choice.has_room),
        };
        let at = |place: usize| near[place % near.len()];
        let least = |is_less: fn(&Choice<'_>, &Choice<'_>) -> bool| {
            let least = near.iter().copied().reduce(|a, b| if is_less(&choices[b], &choices[a]) { b } else { a });
            least.unwrap_or(0)
        };
        let two = |of: &[usize]| {
            let random = || of[fastrand::usize(..of.len())];
            let (one, other) = (random(), random());
            if choices[other].is_less_loaded(&choices[one]) { other } else { one }
        };
        match policy {
            Policy::Predicted => {
                let least = &choices[least(|a, b| a.is_less_loaded(b))];
                let equals: Places = near.iter().copied().filter(|at| !least.is_less_loaded(&choices[*at])).collect();
                two(&equals)
            }
            Policy::RoundRobin if call.dry => at(self.turn.load(Ordering::Relaxed)),
            Policy::RoundRobin => at(self.turn.fetch_add(1, Ordering::Relaxed)),
            Policy::LeastLoaded => least(|a, b| a.has_fewer_calls(b)),
            Policy::Weighted => least(|a, b| a.is_less_loaded(b)),
            Policy::RandomTwoChoices => two(&near),
            Policy::ConsistentHash => consistent(choices, &near, call),
        }
    }
}

/// Places in a list of choices.
type Places = SmallVec<[usize; 8]>;

/// What is known of the model, if the call needs a slot of its runner.
fn known(call: &Call) -> Option<Arc<Known>> {
    if !call.route.infers() || call.peek.unloads() {
        return None;
    }
    let found = || call.candidates.snapshot().known(call.place.model.as_ref()?).cloned();
    call.known.clone().or_else(found)
}

fn nobody(call: &Call) -> Error {
    call.note("pick", "nobody is left", []);
    if call.candidates.snapshot().servers.is_empty() {
        return Error::NoServer(
            "the proxy has no servers: name some with --servers, or run `olol server` on its network".to_owned(),
        );
    }
    if let Some(server) = call.candidates.iter().find(|server| server.draining) {
        let more = if call.candidates.count() > 1 { " and others that could be asked are" } else { " is" };
        let how = "takes nothing new; `olol undrain` ends that";
        return Error::NoServer(format!("server {}{more} being drained and {how}", server.id));
    }
    let Some(tiers) = call.tiers.as_ref().filter(|tiers| tiers.is_demand()) else {
        return Error::NoServer("every server that could be asked has failed".to_owned());
    };
    let (rule, wanted) = (tiers.rule(), tiers.wanted());
    let model = call.place.model.as_ref().map_or("the model", ModelName::as_str);
    Error::NoServer(format!("rule '{rule}' demands {wanted} for {model}, and none of those has it or is left"))
}

/// Takes those out that fail calls of late, while somebody else has room.
fn leave_doubtful(choices: &mut Choices<'_>, call: &Call) {
    let is_doubtful = |choice: &Choice<'_>| choice.server.record.is_doubtful(choice.runner);
    if !choices.iter().any(is_doubtful) || !choices.iter().any(|choice| choice.has_room && !is_doubtful(choice)) {
        return;
    }
    let before = choices.len();
    choices.retain(|choice| !is_doubtful(choice));
    call.note("pick", "passes over those that are degraded", [("count", (before - choices.len()).into())]);
}

/// Keeps those of the first tier of a rule in which somebody has room. While nobody has, all stay.
fn keep_tier(choices: &mut Choices<'_>, call: &Call) {
    let Some(tiers) = call.tiers.as_ref().filter(|tiers| tiers.is_ordered()) else { return };
    let found = tiers.of(call.candidates.snapshot());
    let with_room = choices.iter().filter(|choice| choice.has_room);
    if let Some(first) = with_room.map(|choice| found.tier(choice.server)).min() {
        choices.retain(|choice| found.tier(choice.server) == first);
        call.note("pick", "a tier comes first", [("rule", tiers.rule().clone().into()), ("tier", (first + 1).into())]);
    }
}

/// The place of the one where `affinity` would have the call go, as far as that layer says it should: the first with room,
/// unless it is quicker to wait for the very first.
fn preferred(choices: &Choices<'_>, call: &Call) -> Option<usize> {
    let preferred = call.preferred.as_deref()?;
    let place = |index: &usize| choices.iter().position(|choice| choice.server.index == *index);
    let places: Places = preferred.servers.iter().filter_map(place).collect();
    let cost = |at: usize| choices[at].cost.total();
    let first = *places.first()?;
    let cheapest = cheapest(choices);
    let least = choices.iter().map(|choice| choice.load).reduce(f64::min).unwrap_or(f64::INFINITY);
    // Where a conversation begins is worth less than a shorter wait, and less than an even spread of the work to come.
    let is_worth_it = |choice: &Choice<'_>| choice.cost.is_near(&cheapest) && choice.load <= least * BUSIER;
    let will_do = |at: &usize| choices[*at].has_room && (!preferred.yields || is_worth_it(&choices[*at]));
    let found = places.iter().copied().find(will_do);
    if preferred.yields {
        return found;
    }
    Some(found.filter(|found| cost(*found) <= cost(first) || choices[first].has_room).unwrap_or(first))
}

fn cheapest(choices: &Choices<'_>) -> Cost {
    let costs = choices.iter().map(|choice| choice.cost);
    costs.min_by(|a, b| a.total().total_cmp(&b.total())).unwrap_or_default()
}

/// The places of those that are as good as the cheapest; of these, those with room, if any has.
fn nearest(choices: &Choices<'_>) -> Places {
    let cheapest = cheapest(choices);
    let near: Places = (0..choices.len()).filter(|at| choices[*at].cost.is_near(&cheapest)).collect();
    let free: Places = near.iter().copied().filter(|at| choices[*at].has_room).collect();
    if free.is_empty() { near } else { free }
}

/// The places of those that are as wanted; if none is, of those with room; if none has, of all.
fn best(choices: &Choices<'_>, is_wanted: impl Fn(&Choice<'_>) -> bool) -> Places {
    let wanted: Places = (0..choices.len()).filter(|at| is_wanted(&choices[*at])).collect();
    if !wanted.is_empty() {
        return wanted;
    }
    let free: Places = (0..choices.len()).filter(|at| choices[*at].has_room).collect();
    if free.is_empty() { (0..choices.len()).collect() } else { free }
}

/// The runners that are worth waiting for: the one that was chosen, and those that are full and cheaper than any that is free.
fn busy(choices: &Choices<'_>, chosen: usize, known: &Known) -> Error {
    let total = |choice: &Choice<'_>| choice.cost.total();
    let free = choices.iter().filter(|choice| choice.has_room).map(total).reduce(f32::min).unwrap_or(f32::INFINITY);
    let is_worth = |(at, choice): &(usize, &Choice<'_>)| *at == chosen || (!choice.has_room && total(choice) <= free);
    let worth = choices.iter().enumerate().filter(is_worth);
    Error::Busy { runners: worth.map(|(_, choice)| known.runners.at(choice.server)).collect(), retry_after: None }
}

/// The same place for the same model and client: the highest of the hashes of both with each server's name (rendezvous
/// hashing), so that a server that comes or goes moves only what is its own.
fn consistent(choices: &Choices<'_>, near: &Places, call: &Call) -> usize {
    let score = |at: &usize| {
        let mut hasher = std::hash::DefaultHasher::new();
        let model = call.place.model.as_ref().map(ModelName::as_str);
        let client = call.client.map(|client| client.ip());
        std::hash::Hash::hash(&(choices[*at].server.id.as_str(), model, client), &mut hasher);
        std::hash::Hasher::finish(&hasher)
    };
    near.iter().copied().max_by_key(score).unwrap_or(0)
}

/// Judges a server by its answer, and keeps the slot on it for as long as that lasts.
async fn follow(
    mut visit: Visit,
    attempts: u32,
    meters: Option<Arc<RunnerMeters>>,
    answer: Answer,
) -> Result<Reply, Error> {
    match answer.await {
        Ok(mut reply) => {
            visit.loading = None;
            visit.witness.answered(reply.status);
            visit.server.meters.attempt(true);
            if let Some(meters) = &meters {
                meters.attempt(true);
            }
            if let Some(trial) = &mut visit.trial {
                trial.answered(reply.status);
            }
            let outcome = reply.body.outcome_mut();
            outcome.servers.push(visit.server.id.clone());
            outcome.attempts = attempts;
            outcome.meters = meters;
            Ok(reply.watch(visit))
        }
        Err(error) => {
            visit.witness.failed(&error);
            visit.server.meters.attempt(false);
            if let Some(meters) = &meters {
                meters.attempt(false);
            }
            if let Some(trial) = visit.trial.take() {
                trial.failed(&error);
            }
            Err(error)
        }
    }
}

/// A call at a server while its answer lasts; then server and runner are judged by how that went, and the slot is free.
struct Visit {
    head: Arc<Head>,
    server: Arc<Server>,
    lease: Option<Lease>,
    runner: Option<Arc<Runner>>,
    /// The load that it waits for.
    loading: Option<Loading>,
    /// Whether it has caused that load.
    loads: bool,
    sent: Instant,
    first: Option<Instant>,
    /// Whether more than one piece came.
    streamed: bool,
    /// How it goes, for the circuits.
    trial: Option<Trial>,
    /// Calls that the runner was answering when this one came.
    others: u32,
    /// Whether nobody but us had calls at the server then.
    alone: bool,
    predicted: Cost,
    /// The share of the prompt that is not believed to be cached there.
    uncached: f32,
    /// By what the server is judged.
    witness: Witness,
}

impl Watcher for Visit {
    fn chunk(&mut self, _chunk: &Chunk) {
        if self.first.is_none() {
            let now = Instant::now();
            self.first = Some(now);
            self.head.progress.has_come(now - self.head.arrived);
            if let Some(runner) = &self.runner {
                runner.begins();
            }
        } else {
            self.streamed = true;
        }
    }

    fn end(&mut self, end: End, outcome: &Outcome) {
        if let (Some(_), Some(runner)) = (self.first, &self.runner) {
            runner.ends();
        }
        if let Some(trial) = &mut self.trial {
            // A limit of the operator's is no word on the server.
            trial.ended(if end == End::Broken("timeout") { End::Dropped } else { end });
        }
        self.witness.ended(end);
        if end == End::Whole {
            self.learn(outcome);
        }
        self.lease = None;
    }
}

impl Visit {
    /// Tells the runner how it went, if it answered.
    fn learn(&self, outcome: &Outcome) {
        let (Some(runner), Some(first), Some(counters)) = (&self.runner, self.first, outcome.counters) else { return };
        let ended = Instant::now();
        let Self { sent, streamed, others, .. } = *self;
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate"
        )]
        let uncached = (counters.prompt_tokens as f32 * self.uncached) as u64;
        let alone = self.alone && self.server.load.others() == 0;
        let seen = Seen { sent, first, ended, streamed, others, alone, uncached, counters };
        if streamed {
            let took = (first - sent).as_secs_f32() * 1000.0;
            instruments::predicted(Duration::from_secs_f32((took - self.predicted.total()).abs() / 1000.0));
        }
        if let Some(meters) = outcome.meters.as_ref().filter(|_| self.loads && !counters.load_duration.is_zero()) {
            meters.loaded(counters.load_duration);
        }
        if let Some(times) = runner.pace(&seen) {
            self.server.record.paced(times);
        }
        runner.ended(&seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pattern;
    use crate::call::Preferred;
    use crate::testing;
    use crate::tiers::Tiers;
    use std::collections::HashMap;
    use std::num::NonZeroU32;

    fn pick(cluster: &Arc<crate::Cluster>, model: &str) -> Picked {
        Picking::default().pick(&mut testing::call_in(cluster, model)).unwrap()
    }

    fn counts(cluster: &Arc<crate::Cluster>, calls: usize) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        let mut picked = Vec::new();
        for _ in 0..calls {
            let one = pick(cluster, "nobodys");
            *counts.entry(one.server.id.to_string()).or_default() += 1;
            picked.push(one);
        }
        counts
    }

    #[tokio::test]
    async fn calls_spread_evenly() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"], &["tiny"]]).await;
        assert_eq!(counts(&cluster, 30).into_values().collect::<Vec<_>>(), [10, 10, 10]);
    }

    #[tokio::test]
    async fn a_heavier_server_gets_more() {
        let cluster = testing::weighted_cluster(&[1, 3]).await;
        assert_eq!(counts(&cluster, 40)["1"], 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_down_is_skipped_while_another_is_left() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let falls = async |index| {
            cluster.check_failed(index, "no answer".into(), 1);
            tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        };
        falls(0).await;
        assert_eq!(counts(&cluster, 10)["1"], 10);
        falls(1).await;
        assert_eq!(counts(&cluster, 10).len(), 2);
    }

    /// A rule with one server in each of two tiers, the last one first.
    fn last_first(weights: Vec<(Pattern, NonZeroU32)>) -> Arc<Tiers> {
        let tier = |name: &str| vec![Pattern::parse(name).unwrap()];
        Arc::new(Tiers::new("r".into(), vec![tier("2"), tier("1")], weights, false))
    }

    fn picked(cluster: &Arc<crate::Cluster>, tiers: &Arc<Tiers>, calls: usize) -> (Vec<String>, Vec<Picked>) {
        let one = |_| {
            let mut call = testing::call_in(cluster, "tiny");
            call.tiers = Some(tiers.clone());
            let picked = Picking::default().pick(&mut call).unwrap();
            (picked.server.id.to_string(), picked)
        };
        (0..calls).map(one).unzip()
    }

    #[tokio::test]
    async fn a_tier_is_asked_when_those_before_it_have_no_room() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"], &["tiny"]]).await;
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&ModelName::parse("tiny").unwrap()).unwrap();
        snapshot.servers.iter().for_each(|server| known.runners.at(server).reported(2));
        // Where the model is in memory already counts less than what the rule says.
        cluster.note_loaded(&crate::ServerId::new("0"), &known.name, true);
        cluster.catch_up().await;
        let tiers = last_first(Vec::new());
        let (names, held) = picked(&cluster, &tiers, 6);
        assert_eq!(names, ["2", "2", "1", "1", "0", "0"]);
        assert_eq!(picked(&cluster, &tiers, 3).0.len(), 3, "all are asked when all are full");
        drop(held);
        assert_eq!(picked(&cluster, &tiers, 1).0, ["2"]);
        cluster.check_failed(2, "gone".to_owned(), 1);
        cluster.catch_up().await;
        assert_eq!(picked(&cluster, &tiers, 1).0, ["1"], "who fails is passed over");
    }

    #[tokio::test(start_paused = true)]
    async fn who_fails_calls_of_late_is_asked_when_the_others_have_no_room() {
        let cluster = testing::cluster(&[&["tiny", "other"], &["tiny", "other"]]).await;
        let snapshot = cluster.snapshot();
        let runners = |model| {
            let known = snapshot.known(&ModelName::parse(model).unwrap()).unwrap();
            [0, 1].map(|at| known.runners.at(&snapshot.servers[at]))
        };
        let (tiny, other) = (runners("tiny"), runners("other"));
        for runner in &tiny {
            runner.reported(2);
        }
        (0..10).for_each(|_| snapshot.servers[0].record.bad(Some(&tiny[0]), &"cut"));
        assert_eq!(snapshot.servers[0].condition(), crate::cluster::Condition::Degraded);
        let picked: Vec<_> = (0..3).map(|_| pick(&cluster, "tiny")).collect();
        assert_eq!(picked.iter().map(|picked| picked.server.index).collect::<Vec<_>>(), [1, 1, 0]);
        // Other models have done nothing.
        let others: Vec<_> = (0..2).map(|_| pick(&cluster, "other").server.index).collect();
        assert!(others.contains(&0), "{others:?}");
        (0..10).for_each(|_| snapshot.servers[0].record.bad(Some(&other[0]), &"cut"));
        assert_eq!(snapshot.servers[0].condition(), crate::cluster::Condition::Down);
        let full: Vec<_> = (0..3).map(|_| pick(&cluster, "tiny").server.index).collect();
        assert_eq!(full, [1, 1, 1], "who is down gets nothing, though the other is full");
    }

    type Answering = fn() -> Result<Reply, Error>;

    /// A fleet that answers everybody the same.
    #[derive(Clone)]
    struct Same(Answering);

    impl Fleet for Same {
        type Service = tower::util::BoxService<Call, Reply, Error>;

        fn service(&self, _server: &Server) -> Option<Self::Service> {
            let answer = self.0;
            Some(tower::util::BoxService::new(tower::service_fn(move |_call: Call| async move { answer() })))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_is_judged_by_its_own_failures_alone() {
        use crate::error::Phase;
        let answers: [(Answering, bool, u32, u32); 8] = [
            (|| Ok(testing::reply("{}")), true, 1, 0),
            (|| Ok(testing::reply("{}")), false, 0, 0),
            (|| Ok(testing::refusal("0")), true, 0, 0),
            (|| Ok(testing::busy("0")), true, 0, 0),
            (|| Ok(Reply { status: StatusCode::BAD_GATEWAY, ..testing::reply("{}") }), true, 1, 1),
            (|| Ok(testing::stream("0", &["{}\n"], true)), true, 1, 1),
            (|| Err(testing::failure("0", Phase::Waiting, false)), true, 1, 1),
            (|| Err(testing::failure("0", Phase::Waiting, true)), true, 0, 0),
        ];
        for (number, (answer, waits, calls, failures)) in answers.into_iter().enumerate() {
            let cluster = testing::cluster(&[&["tiny"]]).await;
            let reply = Pick::new(Same(answer), Arc::default()).call(testing::call_in(&cluster, "tiny")).await;
            if let (Ok(reply), true) = (reply, waits) {
                let _ = reply.body.collect(99).await;
            }
            let seen = cluster.snapshot().servers[0].record.seen();
            assert_eq!((seen.calls, seen.failures), (calls, failures), "{number}");
        }
    }

    #[tokio::test]
    async fn a_rule_may_weigh_servers_otherwise() {
        let cluster = testing::weighted_cluster(&[1, 3]).await;
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&ModelName::parse("tiny").unwrap()).unwrap();
        snapshot.servers.iter().for_each(|server| known.runners.at(server).reported(99));
        let weights = vec![(Pattern::parse("0").unwrap(), NonZeroU32::MIN.saturating_add(8))];
        let tiers = Arc::new(Tiers::new("r".into(), Vec::new(), weights, false));
        let (names, _held) = picked(&cluster, &tiers, 40);
        assert_eq!(names.iter().filter(|name| *name == "0").count(), 30);
    }

    #[tokio::test]
    async fn who_demands_servers_that_are_gone_is_told_of_the_rule() {
        let cluster = testing::cluster(&[&["tiny"], &["other"]]).await;
        let mut call = testing::call_in(&cluster, "tiny");
        let tier = vec![Pattern::parse("1").unwrap()];
        call.tiers = Some(Arc::new(Tiers::new("big ones".into(), vec![tier], Vec::new(), true)));
        call.candidates.keep(&crate::cluster::Bits::default());
        let error = Pick::new(testing::Always, Arc::default()).call(call).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "no server can answer now: rule 'big ones' demands 1 for tiny:latest, and none of those has it or is left"
        );
    }

    #[tokio::test]
    async fn a_preferred_server_is_taken_while_it_can_be() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"], &["tiny"]]).await;
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&ModelName::parse("tiny").unwrap()).unwrap();
        let runners: Vec<_> = snapshot.servers.iter().map(|server| known.runners.at(server)).collect();
        for runner in &runners {
            runner.reported(1);
        }
        let mut call = testing::call_in(&cluster, "tiny");
        let picking = Picking::default();
        let chosen = |call: &Call| preferred(&picking.choices(call, Some(known), &runners), call);
        assert_eq!(chosen(&call), None);
        call.preferred = Some(Box::new(Preferred { servers: smallvec::smallvec![2, 0], ..Preferred::default() }));
        assert_eq!(chosen(&call), Some(2));
        let busy = Lease::take(&runners[2]);
        assert_eq!(chosen(&call), Some(0), "a wait costs more than a prompt that is short");
        let preferred = call.preferred.as_mut().unwrap();
        (preferred.holders, preferred.cached, preferred.prompt) = (smallvec::smallvec![2], 80_000, 80_000);
        call.payload = crate::Payload::from_bytes(vec![b' '; 80_000]);
        assert_eq!(chosen(&call), Some(2), "it is quicker to wait for the cache");
        call.preferred.as_mut().unwrap().yields = true;
        assert_ne!(chosen(&call), Some(2), "it has no room");
        drop(busy);
        assert_eq!(chosen(&call), Some(2));
        call.candidates.drop_server(&snapshot.servers[2].id);
        assert_eq!(chosen(&call).map(|at| picking.choices(&call, Some(known), &runners)[at].server.index), Some(0));
    }

    /// A call that waits where there is no free slot.
    fn patient(cluster: &Arc<crate::Cluster>) -> Call {
        let mut call = testing::call_in(cluster, "tiny");
        let (owner, ages_after) = (crate::slots::Owner::Nobody, Duration::ZERO);
        let (arrived, priority) = (Instant::now(), crate::slots::Priority::Normal);
        call.ticket = Some(Arc::new(crate::slots::Ticket { arrived, priority, owner, cost: 1, ages_after }));
        call
    }

    #[tokio::test]
    async fn more_slots_are_there_at_once_also_where_none_is_free() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let any = Pattern::parse("*").into_iter().collect::<Vec<_>>();
        let rule = |slots| SlotRule { servers: any.clone(), models: any.clone(), slots };
        let slots = |slots| Config { slots: vec![rule(slots)], ..Config::default() };
        let picking = Picking::default();
        picking.configure(slots(NonZeroU32::MIN));
        let _first = picking.pick(&mut patient(&cluster)).unwrap();
        assert!(matches!(picking.pick(&mut patient(&cluster)), Err(Error::Busy { .. })));
        picking.configure(slots(NonZeroU32::MIN.saturating_add(1)));
        assert!(picking.pick(&mut patient(&cluster)).is_ok());
    }

    #[tokio::test]
    async fn those_who_wait_for_one_server_keep_nobody_from_another() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&ModelName::parse("tiny").unwrap()).unwrap();
        let runners: Vec<_> = snapshot.servers.iter().map(|server| known.runners.at(server)).collect();
        for runner in &runners {
            runner.reported(1);
        }
        let picking = Picking::default();
        let busy = Lease::take(&runners[0]);
        let _waits = runners[0].line.join(patient(&cluster).ticket.unwrap(), &runners[..1]);
        let picked = picking.pick(&mut patient(&cluster)).unwrap();
        assert_eq!((picked.server.index, picked.cost.waiting.to_bits()), (1, 0), "that slot is nobody's");
        // The slot of the first goes to who has waited for it, and not to who comes now.
        drop(busy);
        assert!(matches!(picking.pick(&mut patient(&cluster)), Err(Error::Busy { .. })));
    }

    #[tokio::test]
    async fn a_place_is_kept_until_the_body_ends() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let load = cluster.snapshot().servers[0].load.clone();
        let mut pick = Pick::new(testing::Always, Arc::default());
        let reply = pick.call(testing::call_in(&cluster, "tiny")).await.unwrap();
        assert_eq!(load.in_flight(), 1);
        drop(reply);
        assert_eq!(load.in_flight(), 0);
    }

    async fn ask(cluster: &Arc<crate::Cluster>, options: &str) -> Vec<crate::trail::Note> {
        let body = format!(r#"{{"model":"tiny","messages":[]{options}}}"#);
        let mut call = testing::call_in(cluster, "tiny");
        call.payload = crate::Payload::from_bytes(body.clone());
        Arc::get_mut(&mut call.head).unwrap().peek = crate::Peek::json(&[Bytes::from(body)]);
        call.place.options = Some(Arc::new(crate::place::LoadOptions::of(&call)));
        let head = call.head.clone();
        let reply = Pick::new(testing::Always, Arc::default()).call(call).await.unwrap();
        let server = reply.body.outcome().servers[0].clone();
        reply.body.collect(99).await.unwrap();
        cluster.note_loaded(&server, &ModelName::parse("tiny").unwrap(), true);
        tokio::time::sleep(Duration::from_millis(60)).await;
        head.trail.take()
    }

    #[tokio::test(start_paused = true)]
    async fn clients_that_name_other_contexts_do_not_make_a_server_load_again_and_again() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let mut loads: HashMap<crate::ServerId, usize> = HashMap::new();
        for round in 0..50 {
            let options = [r#","options":{"num_ctx":8192}"#, "", r#","options":{"num_ctx":2048}"#][round % 3];
            let notes = ask(&cluster, options).await;
            if notes.iter().any(|note| note.decision == "makes the server load the model") {
                let picked = notes.iter().find(|note| note.decision == "picked").unwrap();
                let Fact::Server(server) = &picked.facts[0].1 else { panic!("{picked:?}") };
                *loads.entry(server.clone()).or_default() += 1;
            }
        }
        assert!(loads.values().all(|loads| *loads <= 1), "{loads:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn work_of_others_is_waited_for_and_shown() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        for server in ["0", "1"] {
            cluster.note_loaded(&crate::ServerId::new(server), &ModelName::parse("tiny").unwrap(), true);
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
        // Fewer calls than slots: no wait, but still more work than nobody's.
        for (others, waits) in [(1, false), (runner::GUESS, true), (40, true)] {
            cluster.snapshot().servers[0].load.tell_others(others);
            for _ in 0..8 {
                let picked = {
                    let mut call = testing::call_in(&cluster, "tiny");
                    Arc::get_mut(&mut call.head).unwrap().dry = true;
                    Picking::default().pick(&mut call).unwrap()
                };
                assert_eq!(picked.server.id.as_str(), "1", "{others}");
                let Some((_, Fact::List(rows))) = &picked.rows else { panic!("no rows") };
                let Fact::Row(row) = &rows[0] else { panic!("no row") };
                assert!(row.contains(&("others", others.into())), "{row:?}");
                let waiting = row.iter().find(|(name, _)| *name == "waiting-ms").unwrap();
                assert_eq!(waiting.1 != Fact::Ms(0.0), waits, "{row:?}");
            }
        }
        cluster.snapshot().servers[0].load.tell_others(0);
        cluster.snapshot().servers[1].load.tell_others(9);
        assert_eq!(pick(&cluster, "tiny").server.id.as_str(), "0");
    }

    #[tokio::test(start_paused = true)]
    async fn a_big_context_goes_where_it_is_loaded() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        for server in ["0", "1"] {
            cluster.note_loaded(&crate::ServerId::new(server), &ModelName::parse("tiny").unwrap(), true);
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
        ask(&cluster, r#","options":{"num_ctx":8192}"#).await;
        let at =
            |notes: Vec<crate::trail::Note>| notes.into_iter().find(|note| note.decision == "picked").unwrap().facts;
        let first = at(ask(&cluster, r#","options":{"num_ctx":8192}"#).await)[0].clone();
        for _ in 0..10 {
            assert_eq!(at(ask(&cluster, r#","options":{"num_ctx":8000}"#).await)[0], first);
        }
    }
}
