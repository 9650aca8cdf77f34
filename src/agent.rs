//! The agent, `olol server`: a gRPC server beside an Ollama, which it talks to over HTTP.
//!
//! It relays calls byte for byte, ends them when their caller goes, and tells the proxies that watch it how its Ollama is.

mod calls;
pub mod door;
mod folder;
mod join;
mod machine;
mod processes;
mod runners;
mod state;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use olol_middleware::{Route, ServerId};
use olol_proto::v1::DescribeResponse;
use olol_proto::v1::server_server::ServerServer;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::Service;

use crate::discovery::{self, Badge, Tells};
use crate::models::copy::Copier;
use crate::models::local::{self, Local};
use crate::ollama::{Endpoint, Ollama};
use crate::rpc::{self, Face, SelfDescription};
use crate::security::proof::Purpose;
use crate::security::tls::{Acceptor, Connector};
use crate::security::{Tokens, Trust};
use crate::serve::{self, Answers, Bounds, Peer, Room};
use crate::sessions::{self, Sessions};
use door::{Door, Doorkeeper};
use join::Joining;

pub use join::ProxyAddress;

/// The file of an agent's sessions.
const FILE: &str = "agent-sessions.redb";

/// How long proxies have to hear that an agent goes, before it takes nothing more.
const GOODBYE: Duration = Duration::from_millis(150);
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
    /// The token of the cluster: who does not know it is not served.
    pub tokens: Tokens,
    /// TLS, if callers are met with it. A machine with a certificate of the cluster's CA needs no token.
    pub tls: Option<Acceptor>,
    /// Proxies to dial, which then call over the connections that we have made.
    pub join: Vec<ProxyAddress>,
    /// How those at `https://` are dialled.
    pub join_tls: Option<Connector>,
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
    tells: Tells,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<bool>,
    grace: Duration,
    watch: state::Watch,
    // End with the agent.
    joining: JoinSet<()>,
    _watching: JoinSet<()>,
}

impl Agent {
    /// Starts an agent.
    #[expect(clippy::unused_async, reason = "it begins tasks, so it must be called where tasks can run")]
    pub async fn start(options: Options) -> std::io::Result<Self> {
        let listener = crate::serve::listen(options.listen)?;
        let address = listener.local_addr()?;
        let host = || gethostname::gethostname().to_string_lossy().into_owned();
        let is_named = !options.name.is_empty();
        let name = if is_named { options.name } else { host() };
        // Several agents on one machine are told apart.
        let joins_as = if is_named { name.clone() } else { format!("{name}:{}", address.port()) };
        let ollama = Ollama::maybe_over_tls(ServerId::new(&name), options.ollama, CONNECT);
        let ollama = ollama.map_err(std::io::Error::other)?;
        let mut watching = JoinSet::new();
        let watch = state::Watch::start(ollama.clone(), &mut watching);
        let stop = CancellationToken::new();
        let kept = watch.clone();
        let description = describe(&name, address, options.engine);
        let trust = Trust { tls: options.connector, tokens: Some(options.tokens.clone()), ..Trust::default() };
        let badge = Badge {
            name: name.clone(),
            instance: description.instance_id.clone(),
            cluster: String::new(),
            is_tls: options.tls.is_some(),
            version: description.olol_version.clone(),
        };
        let tokens = options.tokens.clone();
        let tells = Tells::new(move || {
            let cluster = discovery::clusters(&tokens.all());
            Badge { cluster, ..badge.clone() }
        });
        let instance = description.instance_id.clone();
        let keeper = Arc::new(Doorkeeper::new(options.tokens, instance.clone()));
        let copier = {
            let (watch, pulling) = (watch.clone(), watch.clone());
            Copier::new(ollama.clone(), trust, CONNECT, move || watch.look(), move |model| pulling.pulling(model))
        };
        watching.spawn(copier.clone().keep_clean());
        let about = SelfDescription {
            description,
            state: watch.state(),
            callers: watch.callers(),
            active: watch.active(),
            stop: stop.clone(),
            models: Some(Local::new(folder_of(ollama.clone(), watch.clone()), copier)),
        };
        let send: rpc::Send = Arc::new(move |ask| {
            let (ollama, watch) = (ollama.clone(), watch.clone());
            Box::pin(async move {
                let route = Route::find(ask.path.path());
                let lists =
                    matches!(route, Some(Route::Tags | Route::Ps | Route::V1Models)) && ask.method == Method::GET;
                let reply = watch.follow(ask, &ollama).await?;
                if lists { local::without_copies(reply).await } else { Ok(reply) }
            })
        });
        if !address.ip().is_loopback() && options.tls.is_none() {
            tracing::warn!(
                %address,
                "the agent listens beyond this machine without TLS: whoever can read on the network reads all that is said; keep \
                 it on a network that you trust"
            );
        }
        let sessions = Sessions::new(options.sessions, FILE);
        let inner = rpc::service(send, Some(about), sessions, None);
        let answers = Grpc::new(inner, keeper, tells.clone());
        let mut joining = JoinSet::new();
        if !options.join.is_empty() {
            let header = |text: &str| HeaderValue::from_str(text).map_err(std::io::Error::other);
            let dialling = Arc::new(Joining {
                grpc: answers.clone(),
                name: header(&joins_as.replace(|c: char| !c.is_ascii_alphanumeric() && !"-_.:".contains(c), "-"))?,
                instance: header(&instance)?,
                tls: options.join_tls,
                stop: stop.clone(),
            });
            for proxy in options.join {
                if proxy.is_open_to_others() {
                    tracing::warn!(
                        %proxy,
                        "a proxy is joined without TLS: whoever can read on the network reads all that is said; keep it on a \
                         network that you trust, or say https:// with --tls-ca"
                    );
                }
                joining.spawn(dialling.clone().keep(proxy));
            }
        }
        let tls = options.tls.map(Acceptor::of_agent);
        let running = tokio::spawn(serve::serve(listener, answers, tls, stop.clone(), options.grace));
        let grace = options.grace;
        Ok(Self { address, tells, stop, running, grace, watch: kept, joining, _watching: watching })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it says of itself to whoever looks for one.
    pub fn tells(&self) -> Tells {
        self.tells.clone()
    }

    /// Says goodbye to those who watch it, takes nothing new, lets what runs finish, and returns whether all of it did in time.
    pub async fn stop(mut self) -> bool {
        if self.watch.says_goodbye() {
            // What is said is on its way now; who has it sends nothing more.
            tokio::time::sleep(GOODBYE).await;
        }
        self.stop.cancel();
        let joined = async { while self.joining.join_next().await.is_some() {} };
        let (finished, joined) = tokio::join!(self.running, tokio::time::timeout(self.grace, joined));
        finished.unwrap_or(false) && joined.is_ok()
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
pub struct Grpc {
    inner: ServerServer<Face>,
    keeper: Arc<Doorkeeper>,
    /// What it says of itself to whoever asks in plain HTTP.
    tells: Tells,
}

impl Grpc {
    /// This face, for whom `keeper` lets in.
    pub fn new(inner: ServerServer<Face>, keeper: Arc<Doorkeeper>, tells: Tells) -> Self {
        Self { inner, keeper, tells }
    }
}

/// The same for whoever is at the other end of one connection.
#[derive(Clone)]
pub struct Visit {
    inner: ServerServer<Face>,
    door: Arc<Door>,
    tells: Tells,
}

/// What is said to who begins many proofs at once.
const TOO_MANY: &str = "too many proofs are being made on this connection; one is enough";
/// The time within which a caller must have shown that it is of the cluster: who has not only takes up room.
const INTRODUCTION: Duration = Duration::from_secs(10);

impl Answers for Grpc {
    type Body = tonic::body::Body;
    type Service = Visit;
    const INTRODUCTION: Option<Duration> = Some(INTRODUCTION);
    const BOUNDS: Bounds = Bounds::CLUSTER;
    const ROOM: Room = Room { all: 2048, one: 256 };
    // There is nothing to ask of it in HTTP/1.
    const LONGEST_HEAD: usize = 16 << 10;

    fn service(&self, peer: Peer) -> Visit {
        let door = Arc::new(Door::new(self.keeper.clone(), peer, Purpose::Call));
        Visit { inner: self.inner.clone(), door, tells: self.tells.clone() }
    }
}

impl Service<Request<Incoming>> for Visit {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        if request.version() == http::Version::HTTP_2 {
            if Door::leads_to_proofs(request.uri().path()) {
                return match self.door.proofs() {
                    Some(mut proofs) => proofs.call(request),
                    None => Box::pin(std::future::ready(Ok(Status::resource_exhausted(TOO_MANY).into_http()))),
                };
            }
            return match self.door.refuses(request.headers()) {
                None => self.inner.call(request),
                Some(reason) => Box::pin(std::future::ready(Ok(Status::unauthenticated(reason).into_http()))),
            };
        }
        let words = b"this is an OLOL agent: it speaks gRPC; give its address to `olol proxy --servers`\n";
        let mut answer = Response::new(tonic::body::Body::new(Full::new(Bytes::from_static(words))));
        *answer.status_mut() = http::StatusCode::BAD_REQUEST;
        answer.headers_mut().insert(discovery::BADGE, self.tells.now().header());
        Box::pin(std::future::ready(Ok(answer)))
    }
}
