//! `olol up`: a proxy and an agent in one process, in front of the Ollama of this machine or of the built-in engine.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};
use olol_middleware::cluster::State;
use olol_middleware::{Cluster, ServerId};

use super::flags::{DiscoveryFlags, TokenFlag, with_origins};
use super::{Hangups, Stop};
use crate::agent::{Agent, Options};
use crate::config::{Config, Origin, Set, Source, listen_address};
use crate::discovery::Announcement;
use crate::ollama::{Ask, Endpoint, Ollama};
use crate::pool::AGENT_PORT;
use crate::proxy::Proxy;
use crate::security::Tokens;
use crate::security::tls::{self, Acceptor, Clients, Connector};

/// How long an Ollama is waited for.
const PROBE: Duration = Duration::from_secs(2);

/// Run everything that one machine needs.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Address to listen on; 0.0.0.0 serves other machines too [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on; 0 takes any [default: 8000]
    #[arg(long, env = "OLOL_PORT")]
    port: Option<u16>,
    /// Port of the agent, for proxies on other machines; when it is taken, any
    #[arg(long, default_value_t = AGENT_PORT)]
    agent_port: u16,
    /// Use the built-in engine even if an Ollama is running
    #[arg(long)]
    embedded: bool,
    /// GGUF file that the built-in engine serves instead of olol-tiny
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Configuration file of the proxy (see config/olol.toml)
    #[arg(long, env = "OLOL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    token: TokenFlag,
    #[command(flatten)]
    discovery: DiscoveryFlags,
}

impl Arguments {
    pub(super) fn run(self, matches: &ArgMatches) -> anyhow::Result<()> {
        let source = self.source(matches)?;
        let threads = source.read()?.config.worker_threads();
        super::runtime(threads)?.block_on(async {
            let (mut stop, mut hangups) = (Stop::listen()?, Hangups::listen()?);
            let Some(running) = stop.unless_asked(self.start(source)).await else { return Ok(()) };
            let Running { proxy, agent, behind, announcement } = running?;
            let _ = stop.unless_asked(hangups.reload(&proxy)).await;
            if let Some(announcement) = announcement {
                announcement.end().await;
            }
            stop.gently(async {
                proxy.stop().await;
                agent.stop().await;
                behind.stop().await;
            })
            .await;
            Ok(())
        })
    }

    fn source(&self, matches: &ArgMatches) -> anyhow::Result<Source> {
        let mut source = Source { file: self.config.clone(), ..Source::default() };
        if let Some(host) = &self.host {
            source = source.with(Set::Host(host.clone()), Origin::Flag("--host"));
        }
        if let Some(port) = self.port {
            let is_flag = matches.value_source("port") == Some(ValueSource::CommandLine);
            source = source
                .with(Set::Port(port), if is_flag { Origin::Flag("--port") } else { Origin::Environment("OLOL_PORT") });
        }
        Ok(self.token.onto(with_origins(self.discovery.onto(source, matches)).with_store())?)
    }

    async fn start(self, source: Source) -> anyhow::Result<Running> {
        let config = source.read()?.config;
        let address = config.address()?;
        let tokens = config.security.tokens()?;
        let found = if self.embedded || self.model.is_some() { None } else { find_ollama(address).await? };
        let behind = match found {
            Some(endpoint) => Behind::ollama(endpoint),
            None => Behind::engine(self.model).await?,
        };
        let grace = config.limits.grace_s.time();
        let agent = start_agent(&config, self.agent_port, &behind, &tokens, grace).await?;
        // The agent may listen on every address; the proxy reaches it on this machine.
        let near = SocketAddr::new(near(agent.address().ip()), agent.address().port());
        let source = source.with(Set::Servers(vec![format!("local@grpc://{near}")]), Origin::Program);
        let config = source.read()?.config;
        let proxy = Proxy::start_from(&config, Some(source)).await?;
        until_up(proxy.cluster()).await;
        let announcement = super::announce(&agent, &config.discovery);
        announce(&proxy, &behind, agent.address(), &config);
        Ok(Running { proxy, agent, behind, announcement })
    }
}

/// All that runs, from the front to the back.
struct Running {
    proxy: Proxy,
    agent: Agent,
    behind: Behind,
    announcement: Option<Announcement>,
}

fn near(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) if v4.is_unspecified() => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V6(v6) if v6.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        other => other,
    }
}

async fn start_agent(
    config: &Config,
    port: u16,
    behind: &Behind,
    tokens: &Tokens,
    grace: Duration,
) -> anyhow::Result<Agent> {
    // As of `olol server`: a machine with a certificate needs no token, and one without may still come with it.
    let asked = match config.tls.clients {
        Clients::None if !config.tls.ca.as_os_str().is_empty() => Clients::Optional,
        asked => asked,
    };
    let tls = tls::Config { clients: asked, ..config.tls.clone() };
    let options = |port| -> anyhow::Result<Options> {
        Ok(Options {
            listen: listen_address(&config.proxy.host, port).map_err(anyhow::Error::msg)?,
            ollama: behind.endpoint.clone(),
            name: String::new(),
            engine: behind.kind,
            tokens: tokens.clone(),
            tls: Acceptor::start(&tls)?.map(Acceptor::sparing_own),
            join: Vec::new(),
            join_tls: None,
            connector: Connector::start(&config.tls)?,
            grace,
            sessions: config.sessions.clone(),
        })
    };
    match Agent::start(options(port)?).await {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(Agent::start(options(0)?).await?),
        other => Ok(other?),
    }
}

/// What answers behind the agent.
struct Behind {
    endpoint: Endpoint,
    kind: &'static str,
    shown: String,
    #[cfg(feature = "engine")]
    engine: Option<crate::engine::Engine>,
}

impl Behind {
    fn ollama(endpoint: Endpoint) -> Self {
        let shown = format!("Ollama at {endpoint}");
        Self {
            endpoint,
            kind: "ollama",
            shown,
            #[cfg(feature = "engine")]
            engine: None,
        }
    }

    #[cfg(feature = "engine")]
    async fn engine(model: Option<PathBuf>) -> anyhow::Result<Self> {
        let engine = crate::engine::Engine::start(crate::engine::Start::of(model)?).await?;
        let endpoint = Endpoint::Unix(engine.socket().to_owned());
        Ok(Self { endpoint, kind: "embedded", shown: "built-in engine (llama.cpp)".to_owned(), engine: Some(engine) })
    }

    #[cfg(not(feature = "engine"))]
    #[expect(clippy::unused_async, reason = "stands in for the one above")]
    async fn engine(_model: Option<PathBuf>) -> anyhow::Result<Self> {
        anyhow::bail!(
            "no Ollama answers at OLLAMA_HOST or 127.0.0.1:11434, and this build has no engine of its own; start one with \
             `ollama serve`, or build olol with its default features"
        )
    }

    #[cfg_attr(not(feature = "engine"), expect(clippy::unused_async, reason = "only an engine is waited for"))]
    async fn stop(self) {
        #[cfg(feature = "engine")]
        if let Some(engine) = self.engine {
            engine.stop().await;
        }
    }
}

/// The Ollama of this machine, if one answers: at `OLLAMA_HOST`, else at its usual address. Never the address that we are
/// about to serve, and never another OLOL.
async fn find_ollama(own: SocketAddr) -> anyhow::Result<Option<Endpoint>> {
    let given = std::env::var("OLLAMA_HOST").unwrap_or_default();
    let mut places = vec![Endpoint::from_ollama_host(&given)?];
    let usual = Endpoint::from_ollama_host("")?;
    if !places.contains(&usual) {
        places.push(usual);
    }
    for place in places {
        let (Endpoint::Tcp { host, port } | Endpoint::Tls { host, port }) = &place else { continue };
        let reached: Vec<SocketAddr> =
            tokio::net::lookup_host((host.as_str(), *port)).await.map(Iterator::collect).unwrap_or_default();
        let is_own = |address: &SocketAddr| address.port() == own.port() && near(address.ip()) == near(own.ip());
        if !reached.iter().any(is_own) && answers(&place).await {
            return Ok(Some(place));
        }
    }
    Ok(None)
}

async fn answers(place: &Endpoint) -> bool {
    let Ok(ollama) = Ollama::maybe_over_tls(ServerId::new("probe"), place.clone(), PROBE) else { return false };
    match tokio::time::timeout(PROBE, ollama.send(Ask::get("/api/version"))).await {
        Ok(Ok(reply)) => reply.status.is_success() && !reply.headers.contains_key(ServerId::HEADER),
        _ => false,
    }
}

/// Waits until the server behind has told what it has; it was there a moment ago.
async fn until_up(cluster: &Cluster) {
    for _ in 0..5 {
        cluster.refresh(Duration::from_secs(1)).await;
        if cluster.snapshot().servers.iter().all(|server| server.state == State::Up) {
            return;
        }
    }
}

/// One screenful: where we are, what answers, and what to try.
fn announce(proxy: &Proxy, behind: &Behind, agent: SocketAddr, config: &Config) {
    let address = SocketAddr::new(near(proxy.address().ip()), proxy.address().port());
    let snapshot = proxy.cluster().snapshot();
    let mut models: Vec<&str> = snapshot.models.keys().map(|name| name.as_str().trim_end_matches(":latest")).collect();
    models.sort_unstable();
    let first = models.first().copied().unwrap_or("MODEL");
    let shown = match models.len() {
        0 => "none yet; pull one: ollama pull llama3.2".to_owned(),
        1..=6 => models.join(", "),
        more => format!("{}, and {} more", models[..6].join(", "), more - 6),
    };
    let layers: Vec<String> = config.stack.order.layers().iter().map(ToString::to_string).collect();
    let mut out = std::io::stdout().lock();
    let _ = std::io::Write::write_fmt(
        &mut out,
        format_args!(
            "OLOL {version} answers at {scheme}://{address}\n\n\
             \x20 server   {server}, agent on {agent}\n\
             \x20 models   {shown}\n\
             \x20 layers   {layers}\n\n\
             Try it:\n\
             \x20 curl {scheme}://{address}/api/chat -d '{{\"model\":\"{first}\",\"messages\":[{{\"role\":\"user\",\"content\":\"What is a load balancer?\"}}]}}'\n\
             \x20 OLLAMA_HOST={host} ollama run {first}\n\n\
             Metrics: {scheme}://{address}/metrics   Status: {scheme}://{address}/api/status   Ctrl-C ends it.\n",
            version = env!("CARGO_PKG_VERSION"),
            host = if config.tls.serves() { format!("https://{address}") } else { address.to_string() },
            scheme = if config.tls.serves() { "https" } else { "http" },
            server = behind.shown,
            layers = layers.join(" > "),
        ),
    );
}
