//! The flags of a proxy, and what they and the environment put before its file.

use std::path::PathBuf;

use anyhow::bail;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use crate::config::{Origin, Set, Source, Threads};
use crate::discovery::{self, Interface};
use crate::security::tls::Connector;
use crate::security::{self, TokenError, certs, token};

/// The flags of a proxy.
#[derive(Debug, Args)]
pub(super) struct Flags {
    /// Address to listen on; 0.0.0.0 serves other machines too [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on; 0 takes any [default: 8000]
    #[arg(long, env = "OLOL_PORT")]
    port: Option<u16>,
    /// Servers: agents as HOST:PORT, bare Ollamas as http://HOST:PORT or https://HOST, each with =WEIGHT behind it and NAME@ before it if
    /// you like: gpu1:50051=2,attic@http://10.0.0.7:11434,[::1]:50051
    #[arg(long, env = "OLLAMA_SERVERS", value_name = "LIST")]
    servers: Option<String>,
    /// Configuration file (see config/olol.toml)
    #[arg(long, env = "OLOL_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Worker threads; 0: one for two processors [default: 0]
    #[arg(long)]
    threads: Option<Threads>,
    #[command(flatten)]
    token: TokenFlag,
    #[command(flatten)]
    discovery: DiscoveryFlags,
}

impl Flags {
    /// The configuration that they lead to; `matches` tells which of them the environment has set.
    pub(super) fn source(self, matches: &ArgMatches) -> Result<Source, TokenError> {
        let origin = |id, flag, variable| match matches.value_source(id) {
            Some(ValueSource::EnvVariable) => Origin::Environment(variable),
            _ => Origin::Flag(flag),
        };
        let mut source = Source { file: self.config, ..Source::default() };
        if let Some(host) = self.host {
            source = source.with(Set::Host(host), Origin::Flag("--host"));
        }
        if let Some(port) = self.port {
            source = source.with(Set::Port(port), origin("port", "--port", "OLOL_PORT"));
        }
        if let Some(servers) = self.servers.as_deref().map(listed).filter(|servers| !servers.is_empty()) {
            source = source.with(Set::Servers(servers), origin("servers", "--servers", "OLLAMA_SERVERS"));
        }
        if let Some(threads) = self.threads {
            source = source.with(Set::Threads(threads), Origin::Flag("--threads"));
        }
        self.token.onto(with_origins(self.discovery.onto(source, matches)).with_store())
    }
}

/// The flags that say whether and where machines find each other.
#[derive(Debug, Args)]
pub(super) struct DiscoveryFlags {
    /// Find agents on the local network, and be found [default]
    #[arg(long, env = "OLOL_DISCOVERY", value_name = "WORD", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", hide_possible_values = true, hide_env_values = true)]
    discovery: Option<bool>,
    /// Use only servers that are named, and tell nobody of this one
    #[arg(long, conflicts_with = "discovery")]
    no_discovery: bool,
    /// Interface of this machine on which others are found, by name or address; may be given more than once [default: all]
    #[arg(long, value_name = "NAME", value_parser = interface)]
    interface: Vec<Interface>,
}

impl DiscoveryFlags {
    /// A configuration with what they say.
    pub(super) fn onto(&self, mut source: Source, matches: &ArgMatches) -> Source {
        let is_flag = matches.value_source("discovery") == Some(ValueSource::CommandLine);
        match self.discovery {
            _ if self.no_discovery => source = source.with(Set::Discovery(false), Origin::Flag("--no-discovery")),
            Some(is_on) if is_flag => source = source.with(Set::Discovery(is_on), Origin::Flag("--discovery")),
            Some(is_on) => source = source.with(Set::Discovery(is_on), Origin::Environment("OLOL_DISCOVERY")),
            None => {}
        }
        if !self.interface.is_empty() {
            source = source.with(Set::Interfaces(self.interface.clone()), Origin::Flag("--interface"));
        }
        source
    }

    /// What an agent is told of it.
    pub(super) fn config(&self) -> discovery::Config {
        let mdns = !self.no_discovery && self.discovery.unwrap_or(true);
        discovery::Config { mdns, interface: self.interface.clone(), ..discovery::Config::default() }
    }
}

fn interface(text: &str) -> Result<Interface, &'static str> {
    Interface::try_from(text.to_owned())
}

/// The flag that names the token of the cluster.
#[derive(Debug, Args)]
pub(super) struct TokenFlag {
    /// File with the token that the machines of a cluster share, or several, a line each; OLOL_TOKEN may hold the token itself,
    /// or several with commas [default: token in ~/.config/olol, made at the first start]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl TokenFlag {
    /// A configuration with the token that the flag names, else with that of the environment.
    pub(super) fn onto(&self, source: Source) -> Result<Source, TokenError> {
        let given = token::of_environment()?;
        Ok(match &self.token_file {
            Some(file) => source.with(Set::TokenFile(file.clone()), Origin::Flag("--token-file")),
            None if given.is_empty() => source,
            None => source.with(Set::Tokens(given), Origin::Environment(token::VARIABLE)),
        })
    }

    /// What an agent is told of it.
    pub(super) fn config(&self) -> Result<security::Config, TokenError> {
        Ok(match &self.token_file {
            Some(file) => security::Config { token_file: file.clone(), given: Vec::new() },
            None => security::Config { given: token::of_environment()?, ..security::Config::default() },
        })
    }
}

/// The flags that say how a command meets a proxy over TLS.
#[derive(Debug, Args)]
pub(super) struct TlsFlags {
    /// Certificate to show to the proxy, if it wants one (`olol certs issue NAME --client` makes it)
    #[arg(long, env = "OLOL_TLS_CERT", value_name = "FILE", global = true)]
    tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, env = "OLOL_TLS_KEY", value_name = "FILE", global = true)]
    tls_key: Option<PathBuf>,
    /// CA of the proxy's certificate, besides those that the system trusts [default: ca.pem in ~/.config/olol/certs, if it is there]
    #[arg(long, env = "OLOL_TLS_CA", value_name = "FILE", global = true)]
    tls_ca: Option<PathBuf>,
}

impl TlsFlags {
    /// How a proxy is reached.
    pub(super) fn connector(&self) -> anyhow::Result<Connector> {
        let of_user = || certs::folder().map(|folder| folder.join("ca.pem")).filter(|file| file.is_file());
        let ca = self.tls_ca.clone().or_else(of_user);
        let own = match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => Some((cert.as_path(), key.as_path())),
            (None, None) => None,
            (Some(_), None) => bail!("a certificate needs its key: name its file with --tls-key, or OLOL_TLS_KEY"),
            (None, Some(_)) => bail!("a key needs its certificate: name its file with --tls-cert, or OLOL_TLS_CERT"),
        };
        Ok(Connector::of_command(ca.as_deref(), own)?)
    }
}

/// Adds the web pages of `OLLAMA_ORIGINS`.
pub(super) fn with_origins(source: Source) -> Source {
    let origins = listed(&std::env::var("OLLAMA_ORIGINS").unwrap_or_default());
    if origins.is_empty() { source } else { source.with(Set::Origins(origins), Origin::Environment("OLLAMA_ORIGINS")) }
}

/// The parts of a list with commas.
fn listed(text: &str) -> Vec<String> {
    text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}
