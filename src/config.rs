//! The configuration of a proxy: a file, then the environment, then flags.
//!
//! What is wrong with it is said with its place (`document`) and in words that its author knows (`words`); where each value
//! comes from is told by `source`.

mod document;
mod key;
mod source;
#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use olol_middleware::auth;
use olol_middleware::pattern::Pattern;
use olol_middleware::units::{Seconds, SomeSeconds, Whole};
use olol_middleware::{alias, distribute, stack};
use serde::{Deserialize, Serialize};

use crate::api::{Network, Origins};
use crate::discovery::{self, Listed};
use crate::models::{self, desired, wake};
use crate::{pool, scatter, security, sessions, state};

pub use document::Complaint;
use document::Document;
pub use key::Key;
pub(crate) use key::differences;
pub use source::{Effective, Origin, Override, Set, Setting, Source};

/// The `[limits]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Bytes of request bodies that are held for all requests together. What is beyond is streamed, and tried once.
    pub body_memory: u64,
    /// Seconds between two pieces of a request body after which its sender counts as gone.
    pub body_pause_s: SomeSeconds,
    /// Seconds that running answers may take after a stop was asked for.
    pub grace_s: Seconds,
}

impl Default for Limits {
    fn default() -> Self {
        Self { body_memory: 1 << 30, body_pause_s: SomeSeconds::new(60), grace_s: Seconds::new(30) }
    }
}

/// The `[proxy]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Proxy {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 takes any.
    pub port: u16,
    /// The servers, each as in `--servers`.
    pub servers: Vec<String>,
    /// Worker threads; 0: one for two processors.
    pub threads: Threads,
    /// Further origins that may ask from a browser, as in `OLLAMA_ORIGINS`.
    pub origins: Vec<String>,
    /// Networks of the proxies that are believed what they say in `X-Forwarded-For`.
    pub trusted_proxies: Vec<Network>,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            servers: Vec::new(),
            threads: Threads::new(0),
            origins: Vec::new(),
            trusted_proxies: Vec::new(),
        }
    }
}

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Worker threads; 0: one for two processors. Stands before the tables.
    pub threads: Threads,
    /// Where to listen, and the servers.
    pub proxy: Proxy,
    /// Limits of every request.
    pub limits: Limits,
    /// How servers are reached and checked.
    pub pool: pool::Config,
    /// Who the servers are, where a name stands for them.
    pub discovery: discovery::Config,
    /// What makes a machine one of the cluster.
    pub security: security::Config,
    /// TLS with clients and agents.
    pub tls: security::tls::Config,
    /// How models are pulled, and copied from server to server.
    pub pull: models::Config,
    /// Where blobs wait.
    pub spool: scatter::Config,
    /// Where histories of sessions are kept, and how many.
    pub sessions: sessions::Config,
    /// What proxies share.
    pub state: state::Config,
    /// Which models should be where.
    pub models: Vec<desired::Wanted>,
    /// How that is kept true.
    pub desired: desired::Config,
    /// How servers that sleep are woken.
    pub wake: wake::Config,
    /// Which layers are on.
    pub stack: stack::Table,
    /// How one of the candidates is picked.
    pub pick: olol_middleware::pick::Config,
    /// When a server that fails calls is degraded, and when down.
    pub judge: olol_middleware::judge::Config,
    /// The `trace` layer.
    pub trace: olol_middleware::trace::Config,
    /// The `metrics` layer.
    pub metrics: olol_middleware::metrics::Config,
    /// The `auth` layer.
    pub auth: olol_middleware::auth::Config,
    /// The `rate-limit` layer.
    pub rate_limit: olol_middleware::rate_limit::Config,
    /// The `timeout` layer.
    pub timeout: olol_middleware::timeout::Config,
    /// The `alias` layer.
    pub alias: olol_middleware::alias::Config,
    /// The `queue` layer.
    pub queue: olol_middleware::queue::Config,
    /// The `quant-fallback` layer.
    pub quant_fallback: olol_middleware::quant_fallback::Config,
    /// The `model-route` layer.
    pub model_route: olol_middleware::model_route::Config,
    /// The `affinity` layer.
    pub affinity: olol_middleware::affinity::Config,
    /// The `hedge` layer.
    pub hedge: olol_middleware::hedge::Config,
    /// The `retry` layer.
    pub retry: olol_middleware::retry::Config,
    /// The `distribute` layer.
    pub distribute: olol_middleware::distribute::Config,
}

/// Worker threads; 0: one for two processors.
pub type Threads = Whole<0, 1024>;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be: place and reason.
    #[error("{0}")]
    Wrong(Box<Complaint>),
    /// A value from elsewhere is not what it should be.
    #[error("{0}")]
    Invalid(String),
}

impl ConfigError {
    /// The error with what it comes from.
    pub fn told(&self) -> String {
        match self {
            Self::File { source, .. } => format!("{self}: {source}"),
            other => other.to_string(),
        }
    }
}

/// A value that is of the right type and wrong all the same.
#[derive(Debug)]
struct Wrong {
    key: Key,
    what: String,
}

impl Wrong {
    /// The error of a configuration that comes from no file.
    fn alone(self) -> ConfigError {
        ConfigError::Invalid(format!("{}: {}", self.key, self.what))
    }
}

impl Config {
    /// Reads a file, as it is: [`Source`] reads it with what goes before it.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let document = Document::read(path)?;
        let config = document.config()?;
        config.check().map_err(|wrong| document.blames(&wrong))?;
        Ok(config)
    }

    /// Checks what no type can hold.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check().map_err(Wrong::alone)
    }

    fn check(&self) -> Result<(), Wrong> {
        self.resolved_servers()?;
        self.checked_tls()?;
        self.state.url.check().map_err(|what| Wrong { key: Key::of(["state", "url"]), what })?;
        self.checked_origins()?;
        self.resolved_address()?;
        self.checked_layers()?;
        self.checked_models()
    }

    fn checked_layers(&self) -> Result<(), Wrong> {
        let alias = |fault: alias::Fault| match fault.at {
            alias::At::Name(name) => Wrong { key: Key::of(["alias", "models", &name]), what: fault.what },
            alias::At::Rule(at) => Wrong { key: Key::of(["alias", "rules"]).at(at), what: fault.what },
        };
        self.alias.check().map_err(alias)?;
        let rule =
            |(at, what): (usize, &str)| Wrong { key: Key::of(["timeout", "rules"]).at(at), what: what.to_owned() };
        self.timeout.check().map_err(rule)?;
        let distribute = |(at, what): distribute::Fault| {
            let key = at.map_or(Key::of(["distribute", "policy"]), |at| Key::of(["distribute", "rules"]).at(at));
            Wrong { key, what: what.to_owned() }
        };
        self.distribute.check().map_err(distribute)?;
        let judge = self.judge.fault();
        judge.map_or(Ok(()), |(key, what)| Err(Wrong { key: Key::of(["judge", key]), what }))
    }

    fn checked_models(&self) -> Result<(), Wrong> {
        if let Some((at, what)) = desired::fault(&self.models) {
            return Err(Wrong { key: Key::of(["models"]).at(at).child("name"), what });
        }
        let wake = self.wake.fault();
        wake.map_or(Ok(()), |(server, what)| {
            Err(Wrong { key: Key::of(["wake", "servers", server]), what: what.to_owned() })
        })
    }

    /// The servers that rules name and nobody is, with their places. None while nobody has said who there is.
    fn strangers(&self) -> Vec<(Key, Pattern)> {
        let Ok(Listed { servers, names }) = self.resolved_servers() else { return Vec::new() };
        if servers.is_empty() || !names.is_empty() || self.proxy.servers == [source::USUAL_SERVER] {
            return Vec::new();
        }
        let mut named: Vec<(Key, Pattern)> = Vec::new();
        for (at, rule) in self.alias.rules.iter().enumerate() {
            let key = Key::of(["alias", "rules"]).at(at);
            let at = |key: Key| move |(at, server): (usize, &Pattern)| (key.clone().at(at), server.clone());
            named.extend(rule.servers.iter().enumerate().map(at(key.child("servers"))));
            for (tier, servers) in rule.tiers.iter().enumerate() {
                named.extend(servers.iter().enumerate().map(at(key.child("tiers").at(tier))));
            }
            let weights = key.child("weights");
            named.extend(rule.weights.keys().map(|name| (weights.child(name.as_str()), name.clone())));
        }
        named.retain(|(_, server)| !servers.iter().any(|other| server.matches(other.id.as_str())));
        named
    }

    /// What is strange, but may be meant so: rules that name servers which nobody is now. Who dials in, or is found, may be
    /// one of them later.
    pub fn oddities(&self) -> Vec<String> {
        let servers = self.resolved_servers().map(|listed| listed.servers).unwrap_or_default();
        let known: Vec<&str> = servers.iter().map(|server| server.id.as_str()).collect();
        let strangers = self.strangers().into_iter().chain(self.absent());
        let told = |(key, server): (Key, Pattern)| {
            let near = words::nearest(server.as_str(), &known).filter(|_| server.is_plain());
            let hint = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
            format!("{key}: no server fits `{server}` now{hint}")
        };
        strangers.map(told).collect()
    }

    /// The servers that models are wanted on, that have slots, a CA or credentials, or that can be woken, and that nobody is. They
    /// may join later.
    fn absent(&self) -> Vec<(Key, Pattern)> {
        let Ok(Listed { servers, names }) = self.resolved_servers() else { return Vec::new() };
        if !names.is_empty() {
            return Vec::new();
        }
        let mut named: Vec<(Key, Pattern)> = Vec::new();
        for (at, wanted) in self.models.iter().enumerate() {
            let key = |number| Key::of(["models"]).at(at).child("servers").at(number);
            named.extend(wanted.servers.iter().enumerate().map(|(number, server)| (key(number), server.clone())));
        }
        for (at, rule) in self.pick.slots.iter().enumerate() {
            let key = |number| Key::of(["pick", "slots"]).at(at).child("servers").at(number);
            named.extend(rule.servers.iter().enumerate().map(|(number, server)| (key(number), server.clone())));
        }
        let sleepers = self.wake.servers.keys().filter_map(|name| Some((name, Pattern::parse(name).ok()?)));
        named.extend(sleepers.map(|(name, server)| (Key::of(["wake", "servers", name]), server)));
        let files = |table, key, files: &BTreeMap<Pattern, PathBuf>| {
            let named = |server: &Pattern| (Key::of([table, key, &server.to_string()]), server.clone());
            files.keys().map(named).collect::<Vec<_>>()
        };
        named.extend(files("tls", "server-ca", &self.tls.server_ca));
        named.extend(files("pool", "credentials", &self.pool.credentials));
        named.retain(|(_, server)| !servers.iter().any(|other| server.matches(other.id.as_str())));
        named
    }

    /// Address to listen on.
    pub fn address(&self) -> Result<SocketAddr, ConfigError> {
        self.resolved_address().map_err(Wrong::alone)
    }

    fn resolved_address(&self) -> Result<SocketAddr, Wrong> {
        listen_address(&self.proxy.host, self.proxy.port)
            .map_err(|what| Wrong { key: Key::of(["proxy", "host"]), what })
    }

    /// The servers that are named one by one.
    pub fn servers(&self) -> Result<Vec<pool::ServerSpec>, ConfigError> {
        Ok(self.listed()?.servers)
    }

    /// The servers, and the names that stand for some.
    pub fn listed(&self) -> Result<Listed, ConfigError> {
        if self.looks_for_usual() {
            return Ok(Listed::default());
        }
        self.resolved_servers().map_err(Wrong::alone)
    }

    /// Whether the agent of this machine is one of those that are found, if it is there: nobody has named a server.
    pub(crate) fn looks_for_usual(&self) -> bool {
        self.discovery.looks() && self.proxy.servers == [source::USUAL_SERVER]
    }

    fn resolved_servers(&self) -> Result<Listed, Wrong> {
        let mut listed = Listed::default();
        for (at, text) in self.proxy.servers.iter().enumerate() {
            let key = || Key::of(["proxy", "servers"]).at(at);
            listed.read(text).map_err(|error| Wrong { key: key(), what: error.to_string() })?;
        }
        Ok(listed)
    }

    fn checked_tls(&self) -> Result<(), Wrong> {
        self.tls.check().map_err(|(key, what)| Wrong { key: Key::of(["tls", key]), what: what.to_owned() })?;
        let secure = self.proxy.servers.iter().position(|text| text.contains("tls://"));
        match secure.filter(|_| self.tls.ca.as_os_str().is_empty()) {
            Some(at) => Err(Wrong {
                key: Key::of(["proxy", "servers"]).at(at),
                what: "an agent at tls:// is known by the CA of the cluster: name its file in `ca` of [tls]".to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// The origins of web pages that may ask.
    pub fn origins(&self) -> Result<Origins, ConfigError> {
        self.checked_origins().map_err(Wrong::alone)
    }

    fn checked_origins(&self) -> Result<Origins, Wrong> {
        for (at, origin) in self.proxy.origins.iter().enumerate() {
            Origins::new(origin).map_err(|what| Wrong { key: Key::of(["proxy", "origins"]).at(at), what })?;
        }
        let origins: Vec<&str> = self.proxy.origins.iter().map(String::as_str).filter(|o| !o.is_empty()).collect();
        Origins::new(&origins.join(",")).map_err(|what| Wrong { key: Key::of(["proxy", "origins"]), what })
    }

    /// Worker threads; 0: one for two processors.
    pub fn worker_threads(&self) -> usize {
        let threads = if self.threads == Threads::default() { self.proxy.threads } else { self.threads };
        usize::try_from(threads.get()).unwrap_or(0)
    }

    /// This configuration with the values of another where only a restart can change them.
    #[must_use]
    pub(crate) fn restarting_as(&self, other: &Self) -> Self {
        let (servers, origins) = (self.proxy.servers.clone(), self.proxy.origins.clone());
        let proxy = Proxy { servers, origins, ..other.proxy.clone() };
        Self {
            threads: other.threads,
            proxy,
            limits: other.limits.clone(),
            pool: other.pool.clone(),
            discovery: self.discovery.restarting_as(&other.discovery),
            security: other.security.clone(),
            tls: other.tls.clone(),
            spool: other.spool.clone(),
            sessions: other.sessions.clone(),
            state: other.state.clone(),
            auth: auth::Config { file: other.auth.file.clone(), ..self.auth.clone() },
            ..self.clone()
        }
    }

    /// The tables of the layers.
    pub fn layers(&self) -> stack::Config {
        stack::Config {
            stack: self.stack.clone(),
            pick: self.pick.clone(),
            judge: self.judge.clone(),
            trace: self.trace.clone(),
            metrics: self.metrics.clone(),
            auth: self.auth.clone(),
            rate_limit: self.rate_limit.clone(),
            timeout: self.timeout.clone(),
            alias: self.alias.clone(),
            queue: self.queue,
            quant_fallback: self.quant_fallback.clone(),
            model_route: self.model_route.clone(),
            affinity: self.affinity.clone(),
            hedge: self.hedge.clone(),
            retry: self.retry.clone(),
            distribute: self.distribute.clone(),
        }
    }
}

/// The user's folder for what OLOL keeps: `$XDG_CONFIG_HOME/olol`, else `~/.config/olol`.
pub fn folder() -> Option<PathBuf> {
    let named = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    let home = || std::env::home_dir().filter(|home| home.is_absolute()).map(|home| home.join(".config"));
    Some(named.or_else(home)?.join("olol"))
}

/// The user's folder for what OLOL must not forget: `$XDG_STATE_HOME/olol`, else `~/.local/state/olol`.
pub fn state_folder() -> Option<PathBuf> {
    let named = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    let home = || std::env::home_dir().filter(|home| home.is_absolute()).map(|home| home.join(".local/state"));
    Some(named.or_else(home)?.join("olol"))
}

/// A host as given to `--host`, with a port: an address, `localhost`, or a name that resolves.
pub fn listen_address(host: &str, port: u16) -> Result<SocketAddr, String> {
    use std::net::ToSocketAddrs;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut addresses =
        (bare, port).to_socket_addrs().map_err(|error| format!("cannot listen on '{host}': {error}"))?;
    addresses.next().ok_or_else(|| format!("cannot listen on '{host}': it has no address"))
}
