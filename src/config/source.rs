//! Where a configuration comes from: a file, and what the environment and the flags put before it. It can be read again.

use std::fmt;
use std::path::PathBuf;

use toml::Value;

use super::document::Document;
use super::key::{self, Key};
use super::{Config, ConfigError, Threads};
use crate::discovery::{Interface, Scan};
use crate::security::Token;
use crate::state::{self, Url};

/// The server that is asked when none is named: an agent on this machine.
pub(super) const USUAL_SERVER: &str = "localhost:50051";

/// A file, and what goes before it.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// The file, if there is one.
    pub file: Option<PathBuf>,
    /// What goes before it; of two for one key the later holds.
    pub overrides: Vec<Override>,
}

/// A value that goes before what the file says.
#[derive(Clone, Debug)]
pub struct Override {
    /// The value.
    pub set: Set,
    /// Where it was given.
    pub origin: Origin,
}

/// The values that may be given outside of a file.
#[derive(Clone, Debug)]
pub enum Set {
    /// `proxy.host`
    Host(String),
    /// `proxy.port`
    Port(u16),
    /// `proxy.servers`
    Servers(Vec<String>),
    /// Further `proxy.origins`: they are added.
    Origins(Vec<String>),
    /// `threads`, wherever it may stand
    Threads(Threads),
    /// `auth.file`
    Keys(PathBuf),
    /// `sessions.dir`
    Sessions(PathBuf),
    /// `security.token-file`
    TokenFile(PathBuf),
    /// The token of the cluster itself.
    Tokens(Vec<Token>),
    /// Whether servers are found that nobody has named: `discovery.mdns`, and without it no scan either.
    Discovery(bool),
    /// `discovery.interface`
    Interfaces(Vec<Interface>),
    /// `state.url`
    State(Url),
}

impl Source {
    /// The same with the store that the environment names, if it does.
    #[must_use]
    pub fn with_store(self) -> Self {
        let url = std::env::var(state::VARIABLE).unwrap_or_default();
        if url.is_empty() { self } else { self.with(Set::State(Url::new(url)), Origin::Environment(state::VARIABLE)) }
    }
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody has said anything else.
    Default,
    /// The file and the line that sets it.
    File(PathBuf, usize),
    /// A variable of the environment.
    Environment(&'static str),
    /// A flag.
    Flag(&'static str),
    /// The program itself.
    Program,
}

/// A configuration, and where each of its values comes from.
#[derive(Clone, Debug)]
pub struct Effective {
    /// The configuration.
    pub config: Config,
    document: Option<Document>,
    overrides: Vec<Override>,
}

/// One value.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Its key.
    pub key: Key,
    /// Itself.
    pub value: Value,
    /// Where it comes from: several places, where one adds to another.
    pub origins: Vec<Origin>,
}

impl Source {
    /// A file, and nothing that goes before it.
    pub fn of(file: impl Into<PathBuf>) -> Self {
        Self { file: Some(file.into()), overrides: Vec::new() }
    }

    /// The same with a value that goes before the file and what was given so far.
    #[must_use]
    pub fn with(mut self, set: Set, origin: Origin) -> Self {
        self.overrides.push(Override { set, origin });
        self
    }

    /// Reads the file, puts before it what goes before it, and checks the whole.
    pub fn read(&self) -> Result<Effective, ConfigError> {
        let document = self.file.as_deref().map(Document::read).transpose()?;
        let mut config = document.as_ref().map_or_else(|| Ok(Config::default()), Document::config)?;
        for given in &self.overrides {
            given.set.apply(&mut config);
        }
        if config.proxy.servers.is_empty() {
            config.proxy.servers = vec![USUAL_SERVER.to_owned()];
        }
        let effective = Effective { config, document, overrides: self.overrides.clone() };
        effective.config.check().map_err(|wrong| match (effective.given(&wrong.key), &effective.document) {
            // One of those in the file, to which others are added.
            (Some(Override { set: Set::Origins(_), .. }), Some(document)) if document.line_of(&wrong.key).is_some() => {
                document.blames(&wrong)
            }
            (Some(given), _) => ConfigError::Invalid(format!("{}: {}", given.origin, wrong.what)),
            (None, Some(document)) => document.blames(&wrong),
            (None, None) => wrong.alone(),
        })?;
        Ok(effective)
    }
}

impl Set {
    /// The keys that it sets.
    fn keys(&self) -> &'static [&'static str] {
        match self {
            Self::Host(_) => &["proxy.host"],
            Self::Port(_) => &["proxy.port"],
            Self::Servers(_) => &["proxy.servers"],
            Self::Origins(_) => &["proxy.origins"],
            Self::Threads(_) => &["threads", "proxy.threads"],
            Self::Keys(_) => &["auth.file"],
            Self::Sessions(_) => &["sessions.dir"],
            Self::TokenFile(_) | Self::Tokens(_) => &["security.token-file"],
            Self::Discovery(true) => &["discovery.mdns"],
            Self::Discovery(false) => &["discovery.mdns", "discovery.scan"],
            Self::Interfaces(_) => &["discovery.interface"],
            Self::State(_) => &["state.url"],
        }
    }

    fn apply(&self, config: &mut Config) {
        match self {
            Self::Host(host) => config.proxy.host.clone_from(host),
            Self::Port(port) => config.proxy.port = *port,
            Self::Servers(servers) => config.proxy.servers.clone_from(servers),
            Self::Origins(origins) => config.proxy.origins.extend(origins.iter().cloned()),
            Self::Keys(file) => config.auth.file.clone_from(file),
            Self::Sessions(folder) => config.sessions.dir.clone_from(folder),
            Self::TokenFile(file) => {
                (config.security.token_file, config.security.given) = (file.clone(), Vec::new());
            }
            Self::Tokens(given) => config.security.given.clone_from(given),
            Self::Discovery(is_on) => {
                config.discovery.mdns = *is_on;
                if !is_on {
                    config.discovery.scan = Scan::Off;
                }
            }
            Self::Interfaces(interfaces) => config.discovery.interface.clone_from(interfaces),
            Self::State(url) => config.state.url.clone_from(url),
            Self::Threads(threads) => (config.threads, config.proxy.threads) = (*threads, *threads),
        }
    }
}

impl Effective {
    /// Every value with its origin, in the order of the tables.
    pub fn settings(&self) -> Result<Vec<Setting>, ConfigError> {
        let values = key::values(&self.config).map_err(|error| ConfigError::Invalid(error.to_string()))?;
        let setting = |(key, value)| Setting { origins: self.origins(&key), key, value };
        Ok(values.into_iter().map(setting).collect())
    }

    /// What was given outside of the file for a key.
    fn given(&self, key: &Key) -> Option<&Override> {
        self.overrides.iter().rev().find(|given| given.set.keys().iter().any(|place| key.is_within(place)))
    }

    fn origins(&self, key: &Key) -> Vec<Origin> {
        let given = self.given(key);
        let in_file = || {
            let document = self.document.as_ref()?;
            let line = document.line_of(key)?;
            // An empty list of servers stands for the usual one.
            let is_usual = key.is_within("proxy.servers") && self.config.proxy.servers == [USUAL_SERVER];
            (!is_usual || document.config().is_ok_and(|config| !config.proxy.servers.is_empty()))
                .then(|| Origin::File(document.path().to_owned(), line))
        };
        match given {
            Some(Override { set: Set::Origins(_), origin }) => in_file().into_iter().chain([origin.clone()]).collect(),
            Some(given) => vec![given.origin.clone()],
            None => vec![in_file().unwrap_or(Origin::Default)],
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
            Self::Program => f.write_str("the program"),
        }
    }
}
