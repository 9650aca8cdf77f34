//! The servers behind the proxy, each a service: agents over gRPC and bare Ollamas over HTTP, side by side.
//!
//! This is where a [`Call`] leaves the process. The pool also keeps the cluster's knowledge true (`health`), and keeps a
//! load alive when the client that caused it has gone (`linger`).

pub mod credentials;
mod grpc;
mod health;
mod linger;
mod lobby;
mod news;
mod peers;
mod told;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{self, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use http::HeaderValue;
use http::header;
use olol_middleware::affinity::Turn;
use olol_middleware::call::{Answer, Edits};
use olol_middleware::cluster::{Member, Source};
use olol_middleware::instruments;
use olol_middleware::keys;
use olol_middleware::pick::Fleet;
use olol_middleware::units::{Seconds, SomeMs};
use olol_middleware::{Call, Cluster, Error, Pattern, Payload, Phase, Reply, Server, ServerId};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tower::Service;

use crate::discovery::Stranger;
use crate::ollama::{Ask, Endpoint, EndpointError, HOP, Lore, Means, Ollama, strip_hop_by_hop};
use crate::security::proof::Refused;
use crate::security::{Trust, Wire, token};

pub use grpc::{CONNECTION_WINDOW, LARGEST_MESSAGE, LARGEST_PIECE, PHASE, STREAM_WINDOW, from_wire, to_wire};
pub(crate) use grpc::{Ready, prove, told};
pub use linger::Linger;
pub use lobby::{Arrival, Lobby, meet};
pub use peers::Peer;

/// Port of an agent when none is given.
pub const AGENT_PORT: u16 = 50051;
/// Port of an Ollama when none is given.
pub const OLLAMA_PORT: u16 = 11434;

/// The `[pool]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Milliseconds after which a server that takes no connection counts as failed.
    pub connect_timeout_ms: SomeMs,
    /// Milliseconds between two checks of a bare Ollama at rest (a tenth of it after a change and while it works for us;
    /// jittered by a tenth), and the longest silence of an agent.
    pub check_interval_ms: SomeMs,
    /// Milliseconds after which a check without an answer counts as failed.
    pub check_timeout_ms: SomeMs,
    /// Failed checks in a row after which a server is down.
    pub check_failures: NonZeroU32,
    /// Seconds that a load goes on after its client has left.
    pub load_linger_s: Seconds,
    /// Loads without a client that may go on at one server at the same time.
    pub load_linger_max: u32,
    /// Files with what Ollamas without an agent are shown as `Authorization`, by the names of the servers.
    pub credentials: BTreeMap<Pattern, PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connect_timeout_ms: SomeMs::new(3000),
            check_interval_ms: SomeMs::new(5000),
            check_timeout_ms: SomeMs::new(3000),
            check_failures: NonZeroU32::MIN.saturating_add(1),
            load_linger_s: Seconds::new(600),
            load_linger_max: 4,
            credentials: BTreeMap::new(),
        }
    }
}

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through its agent.
    Agent(Endpoint),
    /// Through its agent, which has dialled in.
    Joined(Lobby),
    /// Directly: an Ollama, or the built-in engine.
    Ollama(Endpoint),
}

/// One server as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSpec {
    /// Its name; the address if the operator gave none.
    pub id: ServerId,
    /// How it is reached.
    pub way: Way,
    /// Whether it, an agent, is reached over TLS.
    pub wire: Wire,
    /// How much more it gets than a server of weight one.
    pub weight: NonZeroU32,
}

impl ServerSpec {
    /// Reads `[NAME@]host:port[=WEIGHT]` (an agent; with `tls://` before the host over TLS alone, with `grpc://` without) or
    /// `[NAME@]http://host:port[=WEIGHT]` (a bare Ollama; with `https://` over TLS).
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let text = text.trim();
        let (rest, weight) = Self::weight(text, text)?;
        let (name, address) = rest.split_once('@').map_or((None, rest), |(name, address)| (Some(name), address));
        if name.is_some_and(|name| {
            name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        }) {
            return Err(EndpointError(format!("the name in '{text}' must be of letters, digits, '-', '_' and '.'")));
        }
        let (wire, address) = match (address.strip_prefix("tls://"), address.strip_prefix("grpc://")) {
            (Some(address), _) => (Wire::Tls, address),
            (_, Some(address)) => (Wire::Plain, address),
            _ => (Wire::Usual, address),
        };
        let way = if wire == Wire::Usual && is_http(address) {
            Way::Ollama(Endpoint::parse(address, OLLAMA_PORT)?)
        } else if is_http(address) {
            return Err(EndpointError(format!(
                "'{text}' is not an address: an agent is at tls://HOST:PORT or HOST:PORT"
            )));
        } else {
            Way::Agent(Endpoint::parse(address, AGENT_PORT)?)
        };
        let shown = match &way {
            Way::Agent(endpoint) | Way::Ollama(endpoint) => endpoint.authority(),
            Way::Joined(lobby) => lobby.address().to_string(),
        };
        Ok(Self { id: ServerId::new(name.unwrap_or(&shown)), way, wire, weight })
    }

    /// Reads the `[=WEIGHT]` at the end of `rest`, which is part of `text`; returns what is before it, too.
    pub(crate) fn weight<'a>(text: &str, rest: &'a str) -> Result<(&'a str, NonZeroU32), EndpointError> {
        let Some((rest, weight)) = rest.rsplit_once('=') else { return Ok((rest, NonZeroU32::MIN)) };
        let weight = weight.trim().parse().ok().filter(|weight: &NonZeroU32| weight.get() <= 1000);
        let error = || EndpointError(format!("the weight in '{text}' must be a whole number from 1 to 1000"));
        Ok((rest, weight.ok_or_else(error)?))
    }

    /// Reads a list with commas between the servers. Names and addresses must differ.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, EndpointError> {
        let mut servers = Vec::new();
        Self::parse_onto(&mut servers, text)?;
        Ok(servers)
    }

    /// Reads more of a list.
    pub fn parse_onto(servers: &mut Vec<Self>, text: &str) -> Result<(), EndpointError> {
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            let server = Self::parse(part)?;
            if let Some(twin) = servers.iter().find(|other| other.id == server.id || other.way == server.way) {
                return Err(EndpointError(format!("server '{}' stands twice in the list ('{}')", server.id, twin.id)));
            }
            servers.push(server);
        }
        Ok(())
    }
}

fn is_http(address: &str) -> bool {
    address.starts_with("http://") || address.starts_with("https://")
}

/// One server as a thing to send calls to.
#[derive(Debug)]
enum Backend {
    Agent(Arc<grpc::Agent>),
    Ollama(Ollama),
    /// An Ollama that nobody has named, and that can prove nothing: it is shown, and never used.
    Stranger(ServerId),
}

impl Backend {
    fn new(
        spec: &ServerSpec,
        source: Source,
        connect: Duration,
        trust: &Trust,
        hop: &HeaderValue,
        lore: &Lore,
        ready: Option<Ready>,
    ) -> Self {
        let id = spec.id.clone();
        match &spec.way {
            Way::Agent(endpoint) => {
                let to = grpc::To::Dial(endpoint.clone());
                let reach = grpc::Reach { to, timeout: connect, bound: source.is_discovered() };
                Self::Agent(Arc::new(grpc::Agent::new(id, &reach, &trust.over(spec.wire), hop).over(ready)))
            }
            Way::Joined(lobby) => {
                let reach = grpc::Reach { to: grpc::To::Take(lobby.clone()), timeout: connect, bound: false };
                Self::Agent(Arc::new(grpc::Agent::new(id, &reach, trust, hop)))
            }
            Way::Ollama(_) if source.is_discovered() => Self::Stranger(id),
            Way::Ollama(endpoint) => {
                let tls = if endpoint.is_tls() { trust.web.to(&id) } else { None };
                let means = Means { tls, shown: trust.credentials.of(&id) };
                Self::Ollama(Ollama::with(id, endpoint.clone(), means, connect, lore.clone()))
            }
        }
    }

    fn id(&self) -> &ServerId {
        match self {
            Self::Ollama(ollama) => ollama.id(),
            Self::Agent(agent) => agent.id(),
            Self::Stranger(id) => id,
        }
    }

    /// Whether it is shown credentials that are its own, whoever asks.
    fn has_credentials(&self) -> bool {
        matches!(self, Self::Ollama(ollama) if ollama.has_credentials())
    }

    /// Sends a call and returns when the head of the answer is there.
    fn ask(&self, ask: Ask, context: Context) -> Answer {
        match self {
            Self::Ollama(ollama) => Box::pin(ollama.send(ask).map(not_of_a_proxy)),
            Self::Agent(agent) => Box::pin(agent.clone().relay(ask, context).map(not_of_a_proxy)),
            Self::Stranger(id) => {
                let source = stranger().into();
                let error = Error::Server { server: id.clone(), phase: Phase::Connecting, reused: false, source };
                Box::pin(std::future::ready(Err(error)))
            }
        }
    }
}

/// Why a server that nobody has named is not used.
fn stranger() -> Refused {
    Refused::Unproved(
        "an Ollama without an agent knows none; run `olol server` beside it, or name it with --servers if you trust it"
            .to_owned(),
    )
}

/// Only a proxy of ours marks its answers: a server of ours that leads to one would go round in circles.
fn not_of_a_proxy(answer: Result<Reply, Error>) -> Result<Reply, Error> {
    match answer {
        Ok(reply) if reply.headers.keys().any(|name| name == ServerId::HEADER) => Err(Error::Loop),
        other => other,
    }
}

/// What an agent is told of a call besides the call.
#[derive(Debug, Default)]
struct Context {
    deadline: Option<Instant>,
    session: String,
    request_id: String,
    /// What its other proxies are to know of the conversation.
    turn: Option<Turn>,
}

impl Context {
    fn of(call: &Call) -> Self {
        let session = call.headers.get("x-olol-session").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let turn = call.preferred.as_deref().map(|preferred| preferred.turn.clone()).filter(|turn| !turn.is_empty());
        Self { deadline: call.deadline, session: session.to_owned(), request_id: call.id.to_string(), turn }
    }
}

/// All servers.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    /// How each server is reached, by its place in the cluster.
    backends: ArcSwap<Vec<Option<Arc<Backend>>>>,
    members: Mutex<Members>,
    cluster: Arc<Cluster>,
    linger: Arc<Linger>,
    hop: HeaderValue,
    trust: Trust,
    /// What was found and is not used.
    strangers: ArcSwap<Vec<Stranger>>,
    /// What the bare servers have told about models.
    lore: Lore,
    turns: Arc<health::Turns>,
}

/// Who is a member, and who watches it.
#[derive(Debug, Default)]
struct Members {
    list: Vec<Joined>,
    /// Whether members are watched: not before the proxy runs, nor after.
    watches: bool,
}

#[derive(Debug)]
struct Joined {
    spec: ServerSpec,
    source: Source,
    index: usize,
    watching: Option<AbortOnDropHandle<()>>,
}

impl Joined {
    /// Whether it is what is named there, at the same address.
    fn is_at(&self, spec: &ServerSpec) -> bool {
        self.spec.id == spec.id && self.spec.way == spec.way && self.spec.wire == spec.wire
    }
}

/// Ends the watching of all servers when it is dropped.
#[derive(Debug)]
pub struct Watching(Pool);

impl Drop for Watching {
    fn drop(&mut self) {
        let mut members = self.0.members();
        members.watches = false;
        members.list.iter_mut().for_each(|member| member.watching = None);
    }
}

impl Pool {
    /// A pool of these servers. `hop` marks what this proxy sends, so that it knows its own requests again.
    /// `trust` is what it shows to agents.
    pub fn new(servers: &[ServerSpec], config: &Config, hop: &HeaderValue, trust: &Trust) -> Self {
        let pool = Self(Arc::new(Inner {
            config: config.clone(),
            backends: ArcSwap::default(),
            members: Mutex::default(),
            cluster: Cluster::new(Vec::new()),
            linger: Arc::new(Linger::new(config.load_linger_s.time(), config.load_linger_max)),
            hop: hop.clone(),
            trust: trust.clone(),
            strangers: ArcSwap::default(),
            lore: Lore::default(),
            turns: Arc::default(),
        }));
        pool.set(Source::Static, servers);
        pool
    }

    /// The members, as they were named.
    pub fn specs(&self) -> Vec<ServerSpec> {
        self.members().list.iter().map(|member| member.spec.clone()).collect()
    }

    /// What was found on the network and is no member.
    pub fn strangers(&self) -> Arc<Vec<Stranger>> {
        self.0.strangers.load_full()
    }

    /// From now on it is these.
    pub(crate) fn show(&self, strangers: Vec<Stranger>) {
        if **self.0.strangers.load() != strangers {
            self.0.strangers.store(Arc::new(strangers));
        }
    }

    /// What is known of the servers.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.0.cluster
    }

    /// Starts to keep the cluster's knowledge true, until what is returned is dropped.
    pub fn watch(&self) -> Watching {
        let mut members = self.members();
        members.watches = true;
        for member in &mut members.list {
            member.watching = Some(self.keep_true(member.index));
        }
        Watching(self.clone())
    }

    /// From now on these are the servers of one source. Those who are new join; those who are not among them leave, and
    /// finish what they have. Who is there by an earlier source (in the order of [`Source`]) stays as that has it.
    pub fn set(&self, source: Source, servers: &[ServerSpec]) {
        self.set_ready(source, servers, HashMap::new());
    }

    /// The same where there are connections to some of them, by their names.
    pub(crate) fn set_ready(&self, source: Source, servers: &[ServerSpec], mut ready: HashMap<ServerId, Ready>) {
        let mut members = self.members();
        let is_twin = |member: &Joined, spec: &ServerSpec| member.spec.id == spec.id || member.spec.way == spec.way;
        let mut news: Vec<&ServerSpec> = Vec::new();
        for spec in servers {
            match members.list.iter_mut().find(|member| is_twin(member, spec)) {
                Some(member) if member.source < source => {}
                Some(member) if member.source == source && member.is_at(spec) => {
                    if member.spec.weight != spec.weight {
                        self.0.cluster.weigh(&spec.id, spec.weight);
                        member.spec.weight = spec.weight;
                    }
                }
                _ => news.push(spec),
            }
        }
        let stays = |member: &Joined| {
            let is_in_the_way = || news.iter().any(|spec| is_twin(member, spec));
            let is_gone = || member.source == source && !servers.iter().any(|spec| member.is_at(spec));
            !is_in_the_way() && !is_gone()
        };
        let (stay, leave): (Vec<_>, Vec<_>) = std::mem::take(&mut members.list).into_iter().partition(stays);
        members.list = stay;
        self.remove(leave);
        let watches = members.watches;
        members.list.extend(self.add(&news, source, watches, &mut ready));
    }

    /// Servers of a source join those who are there. Returns those that did: a name, or a way, that is another's is not taken.
    pub fn join(&self, source: Source, servers: &[ServerSpec]) -> Vec<ServerId> {
        let mut members = self.members();
        let is_new = |spec: &&ServerSpec| {
            !members.list.iter().any(|member| member.spec.id == spec.id || member.spec.way == spec.way)
        };
        let news: Vec<&ServerSpec> = servers.iter().filter(is_new).collect();
        let watches = members.watches;
        let added = self.add(&news, source, watches, &mut HashMap::new());
        let joined = added.iter().map(|member| member.spec.id.clone()).collect();
        members.list.extend(added);
        joined
    }

    /// Servers of a source leave, and finish what they have.
    pub fn leave(&self, source: Source, servers: &[ServerId]) {
        let mut members = self.members();
        let leaves = |member: &Joined| member.source == source && servers.contains(&member.spec.id);
        let (leave, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut members.list).into_iter().partition(leaves);
        members.list = stay;
        self.remove(leave);
    }

    /// Whether an agent that is a member still answers us within this time; `None` if it is no member.
    pub(crate) async fn is_there(&self, server: &ServerId, limit: Duration) -> Option<bool> {
        let index = self.members().list.iter().find(|member| member.spec.id == *server)?.index;
        match &*self.0.backend(index)? {
            Backend::Agent(agent) => Some(agent.is_there(limit).await),
            Backend::Ollama(_) | Backend::Stranger(_) => None,
        }
    }

    /// The servers that are there by this source.
    pub fn of(&self, source: Source) -> HashSet<ServerId> {
        let members = self.members();
        let of_it = members.list.iter().filter(|member| member.source == source);
        of_it.map(|member| member.spec.id.clone()).collect()
    }

    fn add(
        &self,
        servers: &[&ServerSpec],
        source: Source,
        watches: bool,
        ready: &mut HashMap<ServerId, Ready>,
    ) -> Vec<Joined> {
        let connect = self.0.config.connect_timeout_ms.time();
        let member = |spec: &&ServerSpec| Member { id: spec.id.clone(), weight: spec.weight, source };
        let places = self.0.cluster.join(servers.iter().map(member).collect());
        let mut joined = Vec::new();
        for (spec, place) in servers.iter().zip(places) {
            let index = match place {
                Ok(index) => index,
                Err(full) => {
                    tracing::error!(server = %spec.id, "{full}");
                    continue;
                }
            };
            if watches {
                tracing::info!(server = %spec.id, source = source.as_str(), "a server has joined");
            }
            instruments::member_changed(source, true);
            let inner = &self.0;
            let ready = ready.remove(&spec.id);
            let backend = Backend::new(spec, source, connect, &inner.trust, &inner.hop, &inner.lore, ready);
            self.put(index, Some(&Arc::new(backend)));
            let watching = watches.then(|| self.keep_true(index));
            joined.push(Joined { spec: ServerSpec::clone(spec), source, index, watching });
        }
        joined
    }

    fn remove(&self, members: Vec<Joined>) {
        let ids: Vec<ServerId> = members.iter().map(|member| member.spec.id.clone()).collect();
        self.0.cluster.leave(&ids);
        for member in members {
            tracing::info!(server = %member.spec.id, source = member.source.as_str(), "a server has left");
            instruments::member_changed(member.source, false);
            self.put(member.index, None);
        }
    }

    fn put(&self, index: usize, backend: Option<&Arc<Backend>>) {
        self.0.backends.rcu(|backends| {
            let mut backends = Vec::clone(backends);
            backends.resize(backends.len().max(index + 1), None);
            backends[index] = backend.cloned();
            backends
        });
    }

    /// Keeps true what is known of one server.
    fn keep_true(&self, index: usize) -> AbortOnDropHandle<()> {
        let (cluster, config, turns) = (self.0.cluster.clone(), self.0.config.clone(), self.0.turns.clone());
        let backend = self.0.backend(index);
        AbortOnDropHandle::new(tokio::spawn(async move {
            if let Some(backend) = backend {
                health::keep_true(cluster, index, backend, config, turns).await;
            }
        }))
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.0.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn backend(&self, index: usize) -> Option<Arc<Backend>> {
        self.backends.load().get(index)?.clone()
    }
}

impl Fleet for Pool {
    type Service = One;

    fn service(&self, server: &Server) -> Option<One> {
        let backend = self.0.backend(server.index)?;
        Some(One { pool: self.0.clone(), backend, index: server.index })
    }
}

/// One server as a service.
#[derive(Debug)]
pub struct One {
    pool: Arc<Inner>,
    backend: Arc<Backend>,
    index: usize,
}

impl Service<Call> for One {
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, _cx: &mut task::Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Call) -> Answer {
        let backend = &self.backend;
        let context = match **backend {
            Backend::Agent(_) => Context::of(&call),
            Backend::Ollama(_) | Backend::Stranger(_) => Context::default(),
        };
        let loading = linger::loads(&call, self.index);
        let answer = backend.ask(prepared(call, backend, &self.pool.hop), context);
        match loading {
            Some(model) => Box::pin(linger::Outliving::new(answer, model, backend.clone(), self.pool.linger.clone())),
            None => answer,
        }
    }
}

/// A call as its server gets it: with what its client may show there, and without what it has shown here.
fn prepared(call: Call, backend: &Backend, hop: &HeaderValue) -> Ask {
    let mut headers = call.headers.clone();
    // First: a client must not be able to name in `Connection` what is put in here, and so have it taken out again.
    strip_hop_by_hop(&mut headers);
    headers.insert(HOP, hop.clone());
    keys::strip(&mut headers);
    headers.remove(token::HEADER);
    if let Some(credentials) = call.key.get().and_then(|key| key.outbound(backend.id())) {
        headers.insert(header::AUTHORIZATION, credentials.clone());
    } else if backend.has_credentials() {
        headers.remove(header::AUTHORIZATION);
    }
    let mut ask = Ask {
        method: call.method.clone(),
        path: call.path.clone().into(),
        headers,
        fresh: call.fresh,
        connect_limit: call.connect_limit,
        infers: call.route.infers(),
        payload: call.payload,
    };
    if let Some(edits) = call.edits {
        edit(&mut ask, *edits);
    }
    ask
}

/// Makes of what the client sent what its server must get.
fn edit(ask: &mut Ask, edits: Edits) {
    if let Some(method) = edits.method {
        ask.method = method;
    }
    if let Some(path) = edits.path {
        ask.path = path.into();
    }
    for (name, value) in edits.headers {
        match value {
            Some(value) => drop(ask.headers.insert(name, value)),
            None => drop(ask.headers.remove(name)),
        }
    }
    if !edits.body.is_empty() {
        ask.payload = std::mem::replace(&mut ask.payload, Payload::empty()).edited(&edits.body);
        if ask.headers.contains_key(header::CONTENT_LENGTH)
            && let Some(length) = ask.payload.length()
        {
            ask.headers.insert(header::CONTENT_LENGTH, length.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pool: &Pool) -> Vec<String> {
        pool.cluster().snapshot().servers.iter().map(|server| format!("{}={}", server.id, server.weight)).collect()
    }

    #[tokio::test]
    async fn the_servers_of_a_source_are_exchanged_while_those_of_others_stay() {
        let list = |text| ServerSpec::parse_list(text).unwrap();
        let pool = Pool::new(&list("a:1,b:1"), &Config::default(), &HeaderValue::from_static("hop"), &Trust::default());
        let watching = pool.watch();
        pool.set(Source::Dns, &list("c:1,d:1,x@a:1=9"));
        assert_eq!(names(&pool), ["a:1=1", "b:1=1", "c:1=1", "d:1=1"], "who is named by the operator stays so");
        let load = pool.cluster().snapshot().server(&ServerId::new("c:1")).unwrap().load.clone();
        let lease = load.lease();
        pool.set(Source::Dns, &list("c:1=5,e:1"));
        pool.set(Source::Static, &list("b:1,f:1"));
        assert_eq!(names(&pool), ["b:1=1", "c:1=5", "e:1=1", "f:1=1"]);
        let snapshot = pool.cluster().snapshot();
        assert_eq!(snapshot.server(&ServerId::new("c:1")).unwrap().load.in_flight(), 1, "it is the same as before");
        assert!(snapshot.servers.iter().all(|server| pool.service(server).is_some()));
        drop((lease, watching));
    }

    #[test]
    fn a_list_of_servers_is_read() {
        let servers = ServerSpec::parse_list("a:50051=2, big@http://b:11434,[::1]:50051,http://c").unwrap();
        let shown: Vec<_> = servers.iter().map(|server| (server.id.as_str(), server.weight.get())).collect();
        assert_eq!(shown, [("a:50051", 2), ("big", 1), ("[::1]:50051", 1), ("c:11434", 1)]);
        assert!(matches!(servers[1].way, Way::Ollama(_)) && matches!(servers[2].way, Way::Agent(_)));
        let servers = ServerSpec::parse_list("a@tls://b:1=3,grpc://[::1],c").unwrap();
        assert_eq!(servers.iter().map(|server| server.wire).collect::<Vec<_>>(), [Wire::Tls, Wire::Plain, Wire::Usual]);
        assert_eq!(servers[1].id.as_str(), "[::1]:50051");
    }

    #[test]
    fn what_is_wrong_with_a_list_is_said() {
        for (text, why) in [
            ("a:1=0", "the weight in 'a:1=0'"),
            ("a:1=x", "the weight"),
            ("b c@a:1", "the name in"),
            ("a:1,a:1", "stands twice"),
            ("x@a:1,x@b:1", "stands twice"),
            ("a:70000", "is no port"),
            ("tls://http://a:1", "tls://HOST:PORT"),
        ] {
            let error = ServerSpec::parse_list(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
