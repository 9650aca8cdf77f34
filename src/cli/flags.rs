//! The flags of a proxy, and what they and the environment put before its file.

use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use crate::config::{Origin, Set, Source, Threads};
use crate::security::{Token, TokenError, token};

/// The flags of a proxy.
#[derive(Debug, Args)]
pub(super) struct Flags {
    /// Address to listen on; 0.0.0.0 serves other machines too [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on; 0 takes any [default: 8000]
    #[arg(long, env = "OLOL_PORT")]
    port: Option<u16>,
    /// Servers: agents as HOST:PORT, bare Ollamas as http://HOST:PORT, each with =WEIGHT behind it and NAME@ before it if
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
        self.token.onto(with_origins(source).with_store())
    }
}

/// The flag that names the token of the cluster.
#[derive(Debug, Args)]
pub(super) struct TokenFlag {
    /// File with the token that the machines of a cluster share; OLOL_TOKEN may hold the token itself [default: token in
    /// ~/.config/olol, made at the first start]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl TokenFlag {
    /// A configuration with the token that the flag names, else with that of the environment.
    pub(super) fn onto(&self, source: Source) -> Result<Source, TokenError> {
        Ok(match (&self.token_file, token::of_environment()?) {
            (Some(file), _) => source.with(Set::TokenFile(file.clone()), Origin::Flag("--token-file")),
            (None, Some(token)) => source.with(Set::Token(token), Origin::Environment(token::VARIABLE)),
            (None, None) => source,
        })
    }

    /// The token itself.
    pub(super) fn token(&self) -> Result<Token, TokenError> {
        match (&self.token_file, token::of_environment()?) {
            (Some(file), _) => token::read(file),
            (None, Some(token)) => Ok(token),
            (None, None) => token::of_folder(),
        }
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
