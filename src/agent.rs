//! The agent, `olol server`: a gRPC server beside an Ollama, which it talks to over HTTP.
//!
//! It relays calls byte for byte, ends them when their caller goes, and tells the proxies that watch it how its Ollama is.

mod calls;
mod folder;
mod machine;
mod processes;
mod runners;
mod state;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use olol_middleware::{Route, ServerId};
use olol_proto::v1::DescribeResponse;
use olol_proto::v1::server_server::ServerServer;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::Service;

use crate::models::copy::Copier;
use crate::models::local::{self, Local};
use crate::ollama::{Endpoint, Ollama};
use crate::rpc::{self, Face, SelfDescription};
use crate::security::tls::{Acceptor, Connector};
use crate::security::{Token, Trust, token};
use crate::serve::{self, Answers, Peer};
use crate::sessions::{self, Sessions};

/// The file of an agent's sessions.
const FILE: &str = "agent-sessions.redb";

/// The longest that a connection may take, to the Ollama and to other agents.
const CONNECT: Duration = Duration::from_secs(3);

/// What an agent needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address to listen on; port 0 takes any.
    pub listen: SocketAddr,
    /// Its Ollama.
    pub ollama: Endpoint,
    /// Name of this server; empty: the machine's.
    pub name: String,
    /// What runs behind it: `ollama` or `embedded`.
    pub engine: &'static str,
    /// The token of the cluster: who does not show it is not served.
    pub token: Token,
    /// TLS, if callers are met with it. A machine with a certificate of the cluster's CA needs no token.
    pub tls: Option<Acceptor>,
    /// TLS with other agents, when models are copied from them.
    pub connector: Option<Connector>,
    /// How long calls may go on after a stop was asked for.
    pub grace: Duration,
    /// Where the sessions of those lie who talk with it over gRPC.
    pub sessions: sessions::Config,
}

/// An agent that listens.
#[derive(Debug)]
pub struct Agent {
    address: SocketAddr,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<bool>,
    // Ends with the agent.
    _watching: JoinSet<()>,
}

impl Agent {
    /// Starts an agent.
    #[expect(clippy::unused_async, reason = "it begins tasks, so it must be called where tasks can run")]
    pub async fn start(options: Options) -> std::io::Result<Self> {
        let listener = crate::serve::listen(options.listen)?;
        let address = listener.local_addr()?;
        let name = if options.name.is_empty() {
            gethostname::gethostname().to_string_lossy().into_owned()
        } else {
            options.name
        };
        let ollama = Ollama::new(ServerId::new(&name), options.ollama, CONNECT);
        let mut watching = JoinSet::new();
        let watch = state::Watch::start(ollama.clone(), &mut watching);
        let stop = CancellationToken::new();
        let description = describe(&name, address, options.engine);
        let trust = Trust { tls: options.connector, token: Some(options.token.clone()), ..Trust::default() };
        let copier = {
            let (watch, pulling) = (watch.clone(), watch.clone());
            Copier::new(ollama.clone(), trust, CONNECT, move || watch.look(), move |model| pulling.pulling(model))
        };
        watching.spawn(copier.clone().keep_clean());
        let about = SelfDescription {
            description,
            state: watch.state(),
            callers: watch.callers(),
            stop: stop.clone(),
            models: Some(Local::new(folder_of(ollama.clone(), watch.clone()), copier.clone())),
        };
        let send: rpc::Send = Arc::new(move |ask| {
            let (ollama, watch, copier) = (ollama.clone(), watch.clone(), copier.clone());
            Box::pin(async move {
                let route = Route::find(ask.path.path());
                let reply = watch.follow(ask, &ollama).await?;
                match route {
                    Some(Route::Tags | Route::Ps | Route::V1Models) if copier.is_busy() => {
                        local::without_copies(reply).await
                    }
                    _ => Ok(reply),
                }
            })
        });
        if !address.ip().is_loopback() && options.tls.is_none() {
            tracing::warn!(
                %address,
                "the agent listens beyond this machine without TLS: whoever can read on the network reads the token and all that \
                 is said; keep it on a network that you trust"
            );
        }
        let doorkeeper =
            Arc::new(Doorkeeper { token: options.token, warned: AtomicU64::new(0), since: Instant::now() });
        let sessions = Sessions::new(options.sessions, FILE);
        let inner = rpc::service(send, Some(about), sessions, None);
        let answers = Grpc { inner, doorkeeper, peer: None };
        let running = tokio::spawn(serve::serve(listener, answers, options.tls, stop.clone(), options.grace));
        Ok(Self { address, stop, running, _watching: watching })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes nothing new, lets what runs finish, and returns whether all of it did in time.
    pub async fn stop(self) -> bool {
        self.stop.cancel();
        self.running.await.unwrap_or(false)
    }
}

/// Where an Ollama keeps its models, if that is on this machine and the Ollama says so.
fn folder_of(ollama: Ollama, watch: state::Watch) -> local::Folder {
    Arc::new(move |model| {
        let (ollama, known) = (ollama.clone(), watch.folder());
        Box::pin(async move {
            if known.is_some() {
                return known;
            }
            let found = folder::of(&ollama, Some(&model)).await;
            found.filter(|found| found.is_certain).map(|found| found.path)
        })
    })
}

fn describe(name: &str, address: SocketAddr, engine: &str) -> DescribeResponse {
    DescribeResponse {
        name: name.to_owned(),
        instance_id: format!("{:016x}", fastrand::u64(..)),
        olol_version: env!("CARGO_PKG_VERSION").to_owned(),
        engine: engine.to_owned(),
        host: address.ip().to_string(),
        port: u32::from(address.port()),
        os: std::env::consts::OS.to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        cpu_count: std::thread::available_parallelism().map_or(0, |count| u32::try_from(count.get()).unwrap_or(0)),
        started_at_ms: olol_middleware::time::unix_ms_now(),
        ..DescribeResponse::default()
    }
}

/// gRPC and nothing else, and for the cluster alone.
#[derive(Clone)]
struct Grpc {
    inner: ServerServer<Face>,
    doorkeeper: Arc<Doorkeeper>,
    peer: Option<Peer>,
}

/// Time between two warnings of refused callers, however many there are.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The time within which a caller must have shown that it is of the cluster: who has not only takes up room.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// Knows who belongs to the cluster.
struct Doorkeeper {
    token: Token,
    /// Milliseconds since `since` before which nothing is said in the log.
    warned: AtomicU64,
    since: Instant,
}

impl Doorkeeper {
    /// Why a call is refused, if it is.
    fn refuses(&self, headers: &HeaderMap, peer: Option<&Peer>) -> Option<&'static str> {
        if peer.is_some_and(|peer| peer.is_machine) || self.token.is_shown(headers) {
            if let Some(peer) = peer.filter(|peer| !peer.is_known.load(Ordering::Relaxed)) {
                peer.is_known.store(true, Ordering::Relaxed);
            }
            return None;
        }
        let reason = if headers.contains_key(token::HEADER) {
            "the token is not that of this agent's cluster; give both the same: `olol token` prints it where the agent runs, and \
             OLOL_TOKEN or --token-file give it to the proxy"
        } else {
            "this agent serves its cluster alone, and the call shows no token; `olol token` prints it where the agent runs, a \
             proxy takes it from OLOL_TOKEN or --token-file, and other programs send it as olol-token"
        };
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let wait = u64::try_from(WARN_EVERY.as_millis()).unwrap_or(u64::MAX);
        let next = self.warned.load(Ordering::Relaxed);
        let later = now.saturating_add(wait);
        let is_first = || self.warned.compare_exchange(next, later, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if now >= next && is_first() {
            let client = peer.map(|peer| peer.address.to_string());
            tracing::warn!(client, reason, "a call was refused");
        }
        Some(reason)
    }
}

impl Answers for Grpc {
    type Body = tonic::body::Body;
    type Service = Self;
    const INTRODUCTION: Option<Duration> = Some(INTRODUCTION);

    fn service(&self, peer: Peer) -> Self {
        Self { peer: Some(peer), ..self.clone() }
    }
}

impl Service<Request<Incoming>> for Grpc {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        if request.version() == http::Version::HTTP_2 {
            return match self.doorkeeper.refuses(request.headers(), self.peer.as_ref()) {
                None => self.inner.call(request),
                Some(reason) => Box::pin(std::future::ready(Ok(Status::unauthenticated(reason).into_http()))),
            };
        }
        let words = b"this is an OLOL agent: it speaks gRPC; give its address to `olol proxy --servers`\n";
        let mut answer = Response::new(tonic::body::Body::new(Full::new(Bytes::from_static(words))));
        *answer.status_mut() = http::StatusCode::BAD_REQUEST;
        Box::pin(std::future::ready(Ok(answer)))
    }
}
