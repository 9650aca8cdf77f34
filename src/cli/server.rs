//! `olol server`: the agent beside an Ollama.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Stop;
use super::flags::{DiscoveryFlags, TokenFlag};
use crate::agent::{Agent, Options, ProxyAddress};
use crate::config::listen_address;
use crate::discovery;
use crate::ollama::Endpoint;
use crate::pool::{AGENT_PORT, OLLAMA_PORT};
use crate::security::tls::{self, Acceptor, Clients, Connector};
use crate::sessions;

/// Run the agent beside an Ollama.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Address to listen on; 0.0.0.0 serves other machines too
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes any
    #[arg(long, default_value_t = AGENT_PORT)]
    port: u16,
    /// The Ollama to serve
    #[arg(long, default_value = "http://127.0.0.1:11434", value_name = "URL")]
    ollama_host: String,
    /// Name of this server [default: the machine's]
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// Proxies to dial, which then send calls over these connections: nothing has to reach this machine from outside.
    /// http://HOST:PORT, or https://HOST:PORT with --tls-ca; several with commas
    #[arg(long, env = "OLOL_JOIN", value_name = "LIST")]
    join: Option<String>,
    #[command(flatten)]
    token: TokenFlag,
    #[command(flatten)]
    discovery: DiscoveryFlags,
    /// UDP port of mDNS: that of `mdns-port` of the proxies
    #[arg(long, default_value_t = discovery::MDNS_PORT, hide_default_value = true, value_name = "PORT")]
    mdns_port: u16,
    /// Certificate that callers are shown: TLS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// CA of the cluster: a machine that shows a certificate of it needs no token
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
    /// Whether callers must show a certificate: none, optional, or required [default: optional with --tls-ca]
    #[arg(long, value_name = "WORD", requires = "tls_ca", value_parser = clients)]
    tls_clients: Option<Clients>,
    /// Worker threads; 0: one for two processors
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Seconds that running answers may take after a stop was asked for
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    grace: u64,
    /// Folder for sessions of programs that talk with it over gRPC; one agent's each [default: ~/.local/state/olol]
    #[arg(long, value_name = "DIR")]
    sessions_dir: Option<PathBuf>,
    /// Accepted for compatibility: the server is always asynchronous
    #[arg(long = "async", hide = true)]
    _async: bool,
}

impl Arguments {
    fn tls(&self) -> tls::Config {
        let usual = if self.tls_ca.is_some() { Clients::Optional } else { Clients::None };
        tls::Config {
            cert: self.tls_cert.clone().unwrap_or_default(),
            key: self.tls_key.clone().unwrap_or_default(),
            ca: self.tls_ca.clone().unwrap_or_default(),
            clients: self.tls_clients.unwrap_or(usual),
            ..tls::Config::default()
        }
    }

    pub(super) fn run(self) -> anyhow::Result<()> {
        let (tls, token, discovery) = (self.tls(), self.token.config()?, self.discovery.config());
        let discovery = discovery::Config { mdns_port: self.mdns_port, ..discovery };
        discovery.check_interfaces().map_err(anyhow::Error::msg)?;
        let join = self.join.as_deref().unwrap_or_default();
        let join = join.split(',').filter(|part| !part.trim().is_empty()).map(str::parse::<ProxyAddress>);
        let join = join.collect::<Result<Vec<_>, _>>().map_err(|what| anyhow::anyhow!("--join: {what}"))?;
        let options = Options {
            listen: listen_address(&self.host, self.port).map_err(anyhow::Error::msg)?,
            ollama: Endpoint::parse(&self.ollama_host, OLLAMA_PORT)?,
            name: self.name,
            engine: "ollama",
            tokens: token.token()?.into(),
            tls: None,
            join,
            join_tls: None,
            connector: None,
            grace: Duration::from_secs(self.grace),
            sessions: sessions::Config { dir: self.sessions_dir.unwrap_or_default(), ..sessions::Config::default() },
        };
        super::runtime(self.threads)?.block_on(async {
            let (accepts, dials) = (Acceptor::start(&tls)?, Connector::to_proxies(&tls)?);
            let options = Options {
                tls: accepts,
                join_tls: dials,
                connector: Connector::start(&tls)?,
                tokens: token.tokens()?,
                ..options
            };
            let (listen, ollama) = (options.listen, options.ollama.clone());
            let mut stop = Stop::listen()?;
            let Some(started) = stop.unless_asked(Agent::start(options)).await else { return Ok(()) };
            let agent = started.map_err(|error| anyhow::anyhow!("cannot listen on {listen}: {error}"))?;
            tracing::info!(address = %agent.address(), %ollama, "the agent listens");
            let announcement = super::announce(&agent, &discovery);
            stop.asked().await;
            if let Some(announcement) = announcement {
                announcement.end().await;
            }
            stop.gently(agent.stop()).await;
            Ok(())
        })
    }
}

fn clients(text: &str) -> Result<Clients, &'static str> {
    match text {
        "none" => Ok(Clients::None),
        "optional" => Ok(Clients::Optional),
        "required" => Ok(Clients::Required),
        _ => Err("say none, optional or required"),
    }
}
