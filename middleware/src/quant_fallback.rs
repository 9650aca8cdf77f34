//! Serves a model in another quantization, where the one that is asked for would have to be loaded or is nowhere.
//!
//! The order is that of the first OLOL: what is in memory and at least as good; the very one that is asked for; what suits
//! the hardware. Which level may stand for which is a lattice in the configuration. Nothing but the same model is ever
//! taken: its name without the quantization, its family and its number of parameters must be the same, by what servers
//! report. Answers keep the client's own name, and the header `X-Olol-Model` tells the truth. A client that wants no
//! other says `X-Olol-Quant: strict`; a key may be strict for all its calls.
//!
//! What is missing can be made of an unquantized model on a server, or pulled, where the operator allows it.
//!
//! Belongs inside `queue`: when a slot is free it is decided again what is in memory. And outside whatever goes by the
//! model: those must know which one is really asked for.

mod choice;
mod lattice;
mod level;
#[cfg(test)]
mod tests;
mod works;

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{HeaderName, StatusCode};
use serde::{Deserialize, Serialize};
use tower::{Layer, Service, ServiceExt};

use crate::call::{Answer, Call, Head, Reply};
use crate::cluster::{Bits, Cluster, Known, Server, Snapshot};
use crate::error::Error;
use crate::instruments;
use crate::names::ModelName;
use crate::pattern::Pattern;
use crate::rename;
use crate::route::Route;
use crate::slots::Line;
use crate::trail::Fact;
use crate::units::Seconds;

use choice::{Choice, Look, Offer, Siblings, is_there, word};
use lattice::Lattice;
pub use lattice::{Accept, Ladder};
pub use level::Level;
pub use works::Works;

/// The header by which a client says that no other quantization will do. Its only word is `strict`; what else may stand
/// there is read as that, since it is the safe side.
pub const HEADER: HeaderName = HeaderName::from_static("x-olol-quant");
/// How often it is looked for another model when servers turn out not to have what they were believed to have.
const LOOKS: u32 = 3;

/// The `[quant-fallback]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// What may stand for a model.
    pub policy: Policy,
    /// Whether that holds for embeddings, too.
    pub embeddings: bool,
    /// Whether a quantization that is nowhere is made of an unquantized model.
    pub make: bool,
    /// Whether it is pulled.
    pub pull: bool,
    /// Seconds that a call waits for that, if nothing can stand for the model in the meantime.
    pub wait_s: Seconds,
    /// Levels from the lowest to the highest.
    pub ladder: Ladder,
    /// Levels, and what may stand for each; these go before the ladder.
    pub accept: Accept,
    /// What servers have for models, MiB.
    pub memory_mib: BTreeMap<Pattern, NonZeroU64>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policy: Policy::Off,
            embeddings: false,
            make: false,
            pull: false,
            wait_s: Seconds::new(600),
            ladder: Ladder::default(),
            accept: Accept::default(),
            memory_mib: BTreeMap::new(),
        }
    }
}

/// What may stand for a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Nothing else.
    #[default]
    Off,
    /// What the lattice allows.
    Compatible,
    /// That; and where nobody has it, any quantization of the model.
    Any,
}

/// Puts [`QuantFallback`] around a service.
#[derive(Clone, Debug)]
pub struct QuantFallbackLayer {
    rules: Arc<Rules>,
}

/// What all calls share.
#[derive(Debug)]
struct Rules {
    config: Config,
    lattice: Lattice,
    siblings: Siblings,
    cluster: Arc<Cluster>,
    works: Arc<Works>,
}

impl QuantFallbackLayer {
    /// Falls back as configured. What is being made outlives this stack.
    pub fn new(config: Config, cluster: Arc<Cluster>, works: Arc<Works>) -> Self {
        let lattice = Lattice::new(&config.accept, &config.ladder);
        Self { rules: Arc::new(Rules { config, lattice, siblings: Siblings::default(), cluster, works }) }
    }
}

impl<S> Layer<S> for QuantFallbackLayer {
    type Service = QuantFallback<S>;

    fn layer(&self, inner: S) -> Self::Service {
        QuantFallback { inner, rules: self.rules.clone() }
    }
}

/// Asks for another quantization of a model where that is better than what was asked for.
#[derive(Clone, Debug)]
pub struct QuantFallback<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for QuantFallback<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        if !self.rules.concerns(&call) || Rules::has_it(&call) {
            return Box::pin(self.inner.call(call));
        }
        let decided = self.rules.decide(&mut call, None);
        if let Some(job) = decided.job {
            let work = self.rules.works.begin(job, &call, &self.rules.cluster, self.inner.clone());
            if let (Some(work), None) = (work, &decided.swap) {
                let next = self.inner.clone();
                let ready = std::mem::replace(&mut self.inner, next);
                return Box::pin(later(self.rules.clone(), ready, call, work));
            }
        }
        match decided.swap {
            Some(swap) if !call.dry => {
                let head = call.head.clone();
                let answer = self.inner.call(call);
                Box::pin(swapped(self.rules.clone(), self.inner.clone(), head, swap, answer))
            }
            _ => Box::pin(self.inner.call(call)),
        }
    }
}

/// What was decided about a call, which has been changed already.
struct Decided {
    /// If something stands for the model: what, and the call as it was.
    swap: Option<Box<Swap>>,
    /// What may be done so that the model is there.
    job: Option<works::Job>,
}

/// Something that stands for a model.
struct Swap {
    /// The call as it was.
    spare: Option<Call>,
    /// The name that servers are asked for.
    served: Arc<str>,
    from: &'static str,
    to: &'static str,
    /// Who has it in memory.
    loaded: Bits,
}

impl Rules {
    /// Whether a call is one for a model in some quantization.
    fn concerns(&self, call: &Call) -> bool {
        let is_embedding = matches!(call.route, Route::Embed | Route::Embeddings | Route::V1Embeddings);
        // To unload a model is meant of that very one.
        let asks = call.route.infers() && !call.peek.unloads() && (self.config.embeddings || !is_embedding);
        call.place.model.is_some() && (asks || is_look(call.route))
    }

    /// Whether there is nothing to decide: nearly every call.
    fn has_it(call: &Call) -> bool {
        let snapshot = call.candidates.snapshot();
        let Some(known) = call.place.model.as_ref().and_then(|model| snapshot.known(model)) else { return false };
        let servers = if is_look(call.route) { &known.installed } else { &known.loaded };
        is_there(servers, &call.candidates) && waited(call).is_none()
    }

    /// Decides about a call, and changes it. `refused` is what servers turned out not to have.
    fn decide(&self, call: &mut Call, refused: Option<&str>) -> Decided {
        let mut decided = Decided { swap: None, job: None };
        let snapshot = call.candidates.snapshot().clone();
        let Some(name) = call.place.model.clone() else { return decided };
        let policy = if is_strict(call) { Policy::Off } else { self.config.policy };
        let look = Look::new(self, call, &snapshot, &name, policy);
        let line = waited(call).cloned();
        let choice = look.choose(self, !is_look(call.route), line.as_ref());
        let is_missing =
            !look.is_installed && !matches!(&choice, Choice::Instead(offer, _) if !offer.loaded.is_empty());
        if is_missing && call.route.infers() {
            decided.job = self.job(call, &look, &name);
        }
        let rows = call.dry.then(|| ("candidates", look.rows(self)));
        match choice {
            Choice::Instead(offer, why) if refused != Some(&*offer.make.model().name) => {
                let facts = [
                    ("model", Fact::from(&offer.known.name)),
                    ("from", word(look.level).into()),
                    ("to", word(offer.level).into()),
                ];
                let spare = if call.dry { None } else { call.again() };
                let served: Arc<str> = offer.make.model().name.as_str().into();
                if rename::request(call, &served) {
                    call.candidates.keep(&offer.make.servers);
                    call.note("quant-fallback", why, facts.into_iter().chain(rows));
                    let (from, to) = (word(look.level), word(offer.level));
                    decided.swap = Some(Box::new(Swap { spare, served, from, to, loaded: offer.loaded.clone() }));
                } else {
                    call.note("quant-fallback", "the body is too long to name another model", facts);
                }
            }
            Choice::Instead(..) => call.note("quant-fallback", "nobody has what could stand for the model", []),
            Choice::AsAsked(why) => {
                let facts = [("model", Fact::from(&name)), ("quantization", word(look.level).into())];
                call.note("quant-fallback", why, facts.into_iter().chain(rows));
            }
        }
        // A slot of something else is of no use.
        let is_its = |line| known_line(call).is_some_and(|own| Arc::ptr_eq(own, line));
        if line.as_ref().is_some_and(|line| !is_its(line)) {
            call.lease = None;
        }
        decided
    }

    /// What may be done so that a missing model is there.
    fn job(&self, call: &Call, look: &Look<'_>, name: &ModelName) -> Option<works::Job> {
        let job = works::Job::find(&self.config, call, look, name)?;
        if call.dry {
            call.note("quant-fallback", job.would(), [("model", Fact::from(name))]);
            return None;
        }
        Some(job)
    }

    /// Whether the client's key lets it use a model.
    #[expect(clippy::unused_self, reason = "a rule like the others")]
    fn may_use(&self, call: &Call, known: &Known) -> bool {
        call.key.get().is_none_or(|key| key.may_use(known.name.as_str()))
    }

    /// Whether a model fits some server that has it; `None` if nobody says so.
    fn fits(&self, offer: &Offer<'_>, snapshot: &Snapshot) -> Option<bool> {
        if !offer.loaded.is_empty() {
            return Some(true);
        }
        let size = offer.make.model().size;
        // Beside the weights there is the context, and what the runner needs to reckon.
        let needed = size.saturating_add(size / 5);
        let servers = offer.servers.iter().filter_map(|index| snapshot.servers.get(index));
        let known = servers.filter_map(|server| self.memory(server)).map(|memory| needed <= memory);
        known.reduce(|one, other| one || other)
    }

    /// What the operator says of a server's memory, bytes.
    fn memory(&self, server: &Server) -> Option<u64> {
        let fitting = self.config.memory_mib.iter().filter(|(pattern, _)| pattern.matches(server.id.as_str()));
        fitting.max_by_key(|(pattern, _)| (pattern.is_plain(), pattern.weight())).map(|(_, mib)| mib.get() << 20)
    }
}

/// Whether a call only asks what a model is: then the very one is told of, as long as there is one.
fn is_look(route: Route) -> bool {
    matches!(route, Route::Show | Route::V1Model)
}

/// Whether nothing else will do.
fn is_strict(call: &Call) -> bool {
    call.key.get().is_some_and(|key| key.strict_quant)
        || call.headers.get(HEADER).is_some_and(|value| !value.as_bytes().trim_ascii().is_empty())
}

/// The line in which a call has waited for the slot that it has.
fn waited(call: &Call) -> Option<&Arc<Line>> {
    Some(&call.lease.as_ref()?.runner()?.line)
}

/// The line for the model that a call is for.
fn known_line(call: &Call) -> Option<&Arc<Line>> {
    let known = call.candidates.snapshot().known(call.place.model.as_ref()?)?;
    Some(known.runners.line())
}

/// Waits until a model is there, and asks then.
async fn later<S>(rules: Arc<Rules>, mut service: S, mut call: Call, work: works::Work) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error>,
{
    let is_done = work.wait(rules.config.wait_s.time()).await;
    call.note("quant-fallback", if is_done { "the model was fetched" } else { "the model is not there yet" }, []);
    call.candidates.renew(rules.cluster.snapshot());
    service.ready().await?.call(call).await
}

/// Lets the answer of what stands for a model keep the name; asks for something else if nobody has it after all.
async fn swapped<S>(
    rules: Arc<Rules>,
    service: S,
    head: Arc<Head>,
    swap: Box<Swap>,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error>,
{
    match answer.await {
        Ok(reply) if reply.status != StatusCode::NOT_FOUND => Ok(swap.told(reply, &head).await),
        // Boxed: seldom, and larger than all the rest.
        Ok(reply) => Box::pin(rules.look_again(service, head, *swap, reply)).await,
        Err(Error::Busy { runners, retry_after }) if !runners.is_empty() => {
            Box::pin(elsewhere(service, *swap, Error::Busy { runners, retry_after })).await
        }
        Err(error) => Err(error),
    }
}

impl Swap {
    async fn told(self, reply: Reply, head: &Head) -> Reply {
        instruments::quant_substituted(self.from, self.to);
        rename::answer(reply, head, &self.served).await
    }
}

/// Where what stands for a model is in memory there is no slot: asks for the model itself on other servers, if those have
/// it, and waits for either otherwise.
async fn elsewhere<S>(mut service: S, swap: Swap, busy: Error) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error>,
{
    let Some(mut call) = swap.spare else { return Err(busy) };
    swap.loaded.iter().for_each(|index| call.candidates.drop_index(index));
    let snapshot = call.candidates.snapshot().clone();
    let known = call.place.model.as_ref().and_then(|model| snapshot.known(model));
    if !known.is_some_and(|known| is_there(&known.installed, &call.candidates)) {
        return Err(busy);
    }
    call.note("quant-fallback", "no slot where it is in memory: the model itself, elsewhere", []);
    match (service.ready().await?.call(call).await, busy) {
        (Err(Error::Busy { runners: more, retry_after }), Error::Busy { mut runners, .. }) => {
            runners.extend(more);
            Err(Error::Busy { runners, retry_after })
        }
        (answer, _) => answer,
    }
}

impl Rules {
    /// Servers do not have what should have stood for the model: decides again, by what is known now.
    async fn look_again<S>(&self, mut service: S, head: Arc<Head>, swap: Swap, refusal: Reply) -> Result<Reply, Error>
    where
        S: Service<Call, Response = Reply, Error = Error>,
    {
        let (mut spare, mut refused) = (swap.spare, swap.served);
        for _ in 0..LOOKS {
            let Some(mut call) = spare.take() else { break };
            call.candidates.renew(self.cluster.snapshot());
            let decided = self.decide(&mut call, Some(&refused));
            let reply = service.ready().await?.call(call).await?;
            match decided.swap {
                Some(swap) if reply.status == StatusCode::NOT_FOUND => (spare, refused) = (swap.spare, swap.served),
                Some(swap) => return Ok(swap.told(reply, &head).await),
                None => return Ok(reply),
            }
        }
        match spare {
            // In the words of a server that was asked for what the client has named.
            Some(mut call) => {
                call.candidates.renew(self.cluster.snapshot());
                service.ready().await?.call(call).await
            }
            None => Ok(refusal),
        }
    }
}
