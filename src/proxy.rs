//! The proxy as a whole: servers, layers, and the face towards clients, started and stopped together.

use std::any::Any;
use std::convert::Infallible;
use std::future::ready;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::TryFutureExt;
use http::{HeaderValue, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use olol_middleware::stack::Concern;
use olol_middleware::{BoxError, Cluster, Error, Shared, Stack, instruments};
use olol_proto::v1::server_server::ServerServer;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::Service;
use tower_http::body::UnsyncBoxBody;
use tower_http::catch_panic::CatchPanic;

use crate::api::{self, Answering, Api, Gate, HttpBody, Own, Room, Trusted};
use crate::config::{Config, Source};
use crate::discovery::join::{self, Guests};
use crate::discovery::{Finder, Listed, Names};
use crate::keys;
use crate::models::Models;
use crate::models::desired::{self, Desired, Driver};
use crate::models::wake::{Waker, Waking};
use crate::pool::credentials::Credentials;
use crate::pool::{Pool, Watching};
use crate::reload::{Members, ReloadError, Reloaded, Reloader, Running, Trigger};
use crate::rpc::{self, Face};
use crate::scatter::Scatter;
use crate::security::tls::{Acceptor, Connector, InUse, Web};
use crate::security::{Tokens, Trust};
use crate::serve::{self, Answers, Peer};
use crate::sessions::Sessions;
use crate::state::State;
use crate::status::About;

/// Time between two rounds of keeping histograms small.
const UPKEEP: Duration = Duration::from_secs(5);

/// The file of a proxy's sessions.
const SESSIONS: &str = "proxy-sessions.redb";
/// The file of a proxy's pins, beside it.
const PINS: &str = "proxy-models.toml";

/// A proxy that listens.
#[derive(Debug)]
pub struct Proxy {
    about: About,
    shared: Shared,
    reloader: Arc<Reloader>,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<bool>,
    // End with the proxy.
    _watching: Watching,
    _tasks: Vec<JoinSet<()>>,
}

/// The longest that the first clients wait until the servers have told what they have.
const FIRST_LOOK: Duration = Duration::from_secs(1);

impl Proxy {
    /// Starts a proxy whose configuration stays as it is.
    pub async fn start(config: &Config) -> anyhow::Result<Self> {
        Self::start_from(config, None).await
    }

    /// Starts a proxy with a configuration that was read from `source`, and is read again when that changes.
    #[expect(clippy::unused_async, reason = "it begins tasks, so it must be called where tasks can run")]
    pub async fn start_from(config: &Config, source: Option<Source>) -> anyhow::Result<Self> {
        config.validate()?;
        for strange in config.oddities() {
            tracing::warn!("{strange}");
        }
        let wanted = config.address()?;
        let tls = Acceptor::start(&config.tls)?;
        let listener = serve::listen(wanted).map_err(|error| anyhow::anyhow!("cannot listen on {wanted}: {error}"))?;
        let address = listener.local_addr()?;
        let instance = format!("{:016x}", fastrand::u64(..));
        let hop = HeaderValue::from_str(&instance)?;
        let listed = config.listed()?;
        let trust = trust(config, &listed)?;
        let state = State::of(&config.state)?;
        // Without agents nobody needs to have the same token, and what is told goes by the store.
        let has_no_token = state.is_some() && !listed.has_agents() && !trust.is_token_given;
        let pool = Pool::new(&listed.servers, &config.pool, &hop, &trust);
        let names = Arc::new(Names::start(pool.clone(), &config.discovery)?);
        let is_usual = config.looks_for_usual();
        let finder = Finder::start(pool.clone(), trust.clone(), &config.discovery, is_usual)?;
        let found = finder.settled();
        let cluster = pool.cluster().clone();
        let guests = Guests::new(pool.clone(), trust.tokens.clone(), &config.discovery);
        let file = source.as_ref().and_then(|source| source.file.clone());
        let running = Running::new(config.clone());
        let started = SystemTime::now();
        let sessions = Sessions::shared(config.sessions.clone(), SESSIONS, state.clone());
        let pins = config.sessions.folder().map(|folder| folder.join(PINS));
        let desired = Desired::open(running.clone(), pins, state.is_some())?;
        let about = About {
            instance,
            address,
            started,
            file,
            running: running.clone(),
            pool: pool.clone(),
            guests: guests.clone(),
            sessions: sessions.clone(),
            state: state.clone(),
            desired: desired.clone(),
            models: Models::new(pool.clone(), running.clone()),
            tls: InUse { acceptor: tls.clone(), connector: trust.tls.clone(), web: trust.web.clone() },
        };
        let shared = Shared::new(cluster.clone());
        let (tell_agents, telling) = pool.tell_agents();
        shared.affinity.tell_agents_by(tell_agents);
        let mut keying = JoinSet::new();
        if !has_no_token {
            keying.spawn(follow_token(trust.clone(), shared.clone()));
        }
        let keys = keys(config, &shared)?;
        let sharing = state
            .as_ref()
            .map(|state| [state.start(&shared), sessions.keep_shared(), desired::keep(desired.clone(), state.clone())]);
        let watching = pool.watch();
        names.set(listed.names);
        let settled = names.settled();
        let leaf = Scatter::new(pool.clone(), &shared, &config.spool, about.clone());
        let first_status = leaf.clone();
        let waker = Waker::new(running.clone(), cluster.clone());
        let mut tasks = JoinSet::new();
        let bring = desired::by(about.models.clone());
        tasks.spawn(Driver::new(desired.clone(), cluster.clone(), waker.clone(), bring, leaf.clone()).run());
        let leaf = Waking::new(desired::Leaf::new(leaf, desired, cluster.clone()), waker);
        let origins = Arc::new(ArcSwap::from_pointee(config.origins()?));
        let members = Members { pool, names, finder };
        let reloader =
            Arc::new(Reloader::new(source, running, shared.clone(), Stack::new(leaf), origins.clone(), members));
        let gate = Gate::new(origins, address.ip());
        let trusted = Trusted::new(&config.proxy.trusted_proxies);
        let room = Room::new(config.limits.body_memory, config.limits.body_pause_s.time());
        let metrics = recorder()?;
        let mut upkeep = JoinSet::new();
        upkeep.spawn(keep_up(metrics.clone()));
        upkeep.spawn(reloader.clone().follow_file());
        upkeep.spawn(guests.clone().keep());
        let own = Own::new(shared.clone(), about.clone(), metrics, reloader.clone(), sessions.clone());
        let stack = reloader.stack().clone();
        let api = Arc::new(Api::new(stack, shared.clone(), gate, trusted, room, own, hop, sessions));
        let stop = CancellationToken::new();
        let grace = config.limits.grace_s.time();
        let edge = Edge(Arc::new(Parts { api, guests }));
        let serving = serve::serve(listener, edge, tls, stop.clone(), grace);
        let running = tokio::spawn(async move {
            // Who comes now is answered when the servers have told what they have; but nobody waits long for a silent one.
            let _ = tokio::time::timeout(FIRST_LOOK, async { tokio::join!(settled, found) }).await;
            cluster.refresh(FIRST_LOOK).await;
            // Before anybody is served: it would count as load.
            first_status.first_status().await;
            serving.await
        });
        Ok(Self {
            about,
            shared,
            reloader,
            stop,
            running,
            _watching: watching,
            _tasks: [upkeep, keys, tasks, telling, keying].into_iter().chain(sharing.into_iter().flatten()).collect(),
        })
    }

    /// Reads its configuration again.
    pub async fn reload(&self, trigger: Trigger) -> Result<Reloaded, ReloadError> {
        self.reloader.reload(trigger).await
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.about.address
    }

    /// Where its servers join and leave.
    pub fn pool(&self) -> &Pool {
        &self.about.pool
    }

    /// The agents that dial in.
    pub fn guests(&self) -> &Guests {
        &self.about.guests
    }

    /// What it knows of its servers.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.shared.cluster
    }

    /// What brings models to its servers.
    pub fn models(&self) -> &Models {
        &self.about.models
    }

    /// The state of its layers.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// What it shares with other proxies, if it does.
    pub fn state(&self) -> Option<&State> {
        self.about.state.as_ref()
    }

    /// Takes nothing new, lets answers finish, and returns whether all of them did in time.
    pub async fn stop(self) -> bool {
        self.stop.cancel();
        self.running.await.unwrap_or(false)
    }
}

/// How servers and we know each other. Where none of them is an agent, no token has to be.
fn trust(config: &Config, listed: &Listed) -> anyhow::Result<Trust> {
    let tokens = match config.security.tokens() {
        Err(error) if !listed.has_agents() && !config.looks_for_usual() => {
            tracing::debug!(%error, "there is no token, and no agent that asks for it");
            None
        }
        tokens => Some(tokens?),
    };
    Ok(Trust {
        tls: Connector::start(&config.tls)?,
        web: Web::start(&config.tls)?,
        credentials: Credentials::start(&config.pool.credentials).map_err(anyhow::Error::msg)?,
        is_token_given: config.security.is_given(),
        tokens,
        ..Trust::default()
    })
}

/// Keeps what proxies tell each other of conversations under the key that comes of the token, for ever.
async fn follow_token(trust: Trust, shared: Shared) {
    loop {
        let changed = trust.tokens.as_ref().map(Tokens::changed);
        shared.affinity.set_key(trust.turn_key().unwrap_or_default());
        match changed {
            Some(changed) => changed.await,
            None => return,
        }
    }
}

/// The keys, followed from now on; also where nobody asks for them yet: a reload may bring `auth`.
fn keys(config: &Config, shared: &Shared) -> anyhow::Result<JoinSet<()>> {
    match keys::start(&config.auth, &shared.keys) {
        Err(error) if !config.stack.order.layers().contains(&Concern::Auth) => {
            tracing::warn!(%error, "there are no keys");
            Ok(JoinSet::new())
        }
        keys => Ok(keys?),
    }
}

/// The recorder of this process: one, however many proxies run in it.
fn recorder() -> anyhow::Result<PrometheusHandle> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    let mut builder = PrometheusBuilder::new().set_buckets(instruments::BUCKETS)?;
    for (name, buckets) in instruments::BUCKETS_OF {
        builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)?;
    }
    // One at a time: the handle that is kept must be that of the recorder that records.
    let handle = HANDLE.get_or_init(|| {
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_ok() {
            instruments::describe();
            instruments::begin();
        }
        handle
    });
    Ok(handle.clone())
}

async fn keep_up(metrics: PrometheusHandle) {
    loop {
        tokio::time::sleep(UPKEEP).await;
        metrics.run_upkeep();
    }
}

/// What clients talk to: Ollama's API and gRPC; and where agents dial in.
#[derive(Clone)]
struct Edge(Arc<Parts>);

struct Parts {
    api: Arc<Api>,
    guests: Guests,
}

impl Edge {
    /// The gRPC face towards a client.
    fn grpc(&self, client: SocketAddr) -> ServerServer<Face> {
        let api = self.0.api.clone();
        let send: rpc::Send = Arc::new(move |ask| {
            let api = api.clone();
            Box::pin(async move { api.ask(ask, Some(client)).await })
        });
        let proxy = (self.0.api.keys().clone(), self.0.api.cluster().clone());
        rpc::service(send, None, self.0.api.sessions().clone(), Some(proxy))
    }
}

impl Answers for Edge {
    type Body = UnsyncBoxBody<Bytes, BoxError>;
    type Service = CatchPanic<Visit, fn(Box<dyn Any + Send>) -> Response<Full<Bytes>>>;

    /// A panic of ours ends one request, not the process.
    fn service(&self, peer: Peer) -> Self::Service {
        CatchPanic::custom(
            Visit { edge: self.clone(), client: peer.address, here: peer.here, is_machine: peer.is_machine },
            panicked,
        )
    }

    fn is_brief(request: &Request<Incoming>) -> bool {
        Api::is_brief(request)
    }
}

/// One connection of a client.
#[derive(Clone)]
struct Visit {
    edge: Edge,
    client: SocketAddr,
    here: Option<SocketAddr>,
    is_machine: bool,
}

impl Service<Request<Incoming>> for Visit {
    type Response = Response<HttpBody>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        if Api::is_grpc(&request) {
            let client = self.edge.0.api.client(self.client, request.headers());
            let (request, holds) = api::counted(request, self.edge.0.api.room());
            let answering = self.edge.grpc(client).call(request);
            return Box::pin(answering.map_ok(|answer| holds.by(answer).map(HttpBody::Grpc)));
        }
        if request.uri().path() == join::PATH {
            let answer = self.edge.0.guests.answer(request, self.client, self.here, self.is_machine);
            return Box::pin(ready(Ok(answer.map(|text| HttpBody::Full(text.into())))));
        }
        self.edge.0.api.clone().handle(request, Some(self.client))
    }
}

/// The answer to a request on which our own code failed.
#[expect(clippy::needless_pass_by_value, reason = "`CatchPanic` gives it away")]
fn panicked(panic: Box<dyn Any + Send>) -> Response<Full<Bytes>> {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let error = Error::Internal(text.unwrap_or("panic").to_owned());
    tracing::error!(%error, "a defect of OLOL; please report it");
    let mut answer = Response::new(Full::from(serde_json::json!({"error": error.to_string()}).to_string()));
    *answer.status_mut() = error.status();
    answer
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8"));
    answer
}
