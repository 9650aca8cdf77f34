//! Reads the configuration again, and puts a new stack in the place of the old one: when its file changes, on SIGHUP, and
//! when it is asked to over HTTP.
//!
//! What is read is checked first; if it is no good, all stays as it is, and the log, a metric and the status say so. New
//! requests meet the new layers, running ones finish on the old ones, and what layers know of clients and servers is in
//! [`Shared`] and stays. What only a restart can change is named and waits for one.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use olol_middleware::{Shared, Stack, instruments, stack};
use serde::Serialize;

use crate::api::Origins;
use crate::config::{Config, ConfigError, Source, differences};
use crate::discovery::{Finder, Names};
use crate::pool::Pool;
use crate::watch;

/// Reads the configuration again when it is asked to.
#[derive(Debug)]
pub struct Reloader {
    /// Where it is read; a proxy that was started without one has nothing to read again.
    source: Option<Source>,
    shared: Shared,
    leaf: Stack,
    stack: Arc<ArcSwap<Stack>>,
    origins: Arc<ArcSwap<Origins>>,
    members: Members,
    running: Arc<Running>,
    /// One at a time.
    turn: Mutex<()>,
}

/// Where servers join and leave, and who tells which they are.
#[derive(Debug)]
pub struct Members {
    /// The servers.
    pub pool: Pool,
    /// Names that stand for some.
    pub names: Arc<Names>,
    /// Finds those whom nobody has named.
    pub finder: Finder,
}

/// What runs now, for whoever tells of it.
#[derive(Debug)]
pub struct Running(ArcSwap<State>);

/// The configuration that is in use, and how it was last read.
#[derive(Clone, Debug)]
pub struct State {
    /// The configuration.
    pub config: Config,
    /// When it was read.
    pub since: SystemTime,
    /// The keys whose values in the file wait for a restart.
    pub needs_restart: Vec<String>,
    /// The last time that it was read again.
    pub last: Option<Attempt>,
}

/// One time that the configuration was read again.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// When.
    pub at: SystemTime,
    /// What called for it.
    pub trigger: Trigger,
    /// What was wrong with it; all stayed as it was.
    pub error: Option<String>,
}

/// What calls for a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The file has changed.
    File,
    /// SIGHUP.
    Signal,
    /// `POST /api/status/reload`.
    Request,
}

/// What a reload did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reloaded {
    /// The layers, outermost first.
    pub layers: Vec<&'static str>,
    /// The keys whose values are others now.
    pub changed: Vec<String>,
    /// The keys whose values in the file wait for a restart.
    pub needs_restart: Vec<String>,
}

/// Why nothing was reloaded.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// There is nothing to read.
    #[error("there is no configuration file to read again: start with --config FILE")]
    NoFile,
    /// What was read is no good.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl ReloadError {
    /// The error with what it comes from.
    pub fn told(&self) -> String {
        match self {
            Self::Config(error) => error.told(),
            Self::NoFile => self.to_string(),
        }
    }
}

impl Trigger {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Signal => "signal",
            Self::Request => "request",
        }
    }
}

impl Running {
    /// What runs from the start.
    pub fn new(config: Config) -> Arc<Self> {
        let state = State { config, since: SystemTime::now(), needs_restart: Vec::new(), last: None };
        Arc::new(Self(ArcSwap::from_pointee(state)))
    }

    /// What runs now.
    pub fn state(&self) -> Arc<State> {
        self.0.load_full()
    }
}

impl State {
    /// The layers, outermost first.
    pub fn layers(&self) -> Vec<&'static str> {
        self.config.stack.order.layers().iter().map(|layer| layer.as_str()).collect()
    }
}

impl Reloader {
    /// A stack of these parts, and the means to exchange it.
    pub fn new(
        source: Option<Source>,
        running: Arc<Running>,
        shared: Shared,
        leaf: Stack,
        origins: Arc<ArcSwap<Origins>>,
        members: Members,
    ) -> Self {
        let stack = stack::build(&running.state().config.layers(), &shared, leaf.clone());
        let stack = Arc::new(ArcSwap::from_pointee(stack));
        Self { source, shared, leaf, stack, origins, members, running, turn: Mutex::default() }
    }

    /// The stack that is in use, now and whenever it is looked at.
    pub fn stack(&self) -> &Arc<ArcSwap<Stack>> {
        &self.stack
    }

    /// What runs.
    pub fn running(&self) -> &Arc<Running> {
        &self.running
    }

    /// The file that is read.
    pub fn file(&self) -> Option<&Path> {
        self.source.as_ref()?.file.as_deref()
    }

    /// Reads the configuration again and puts it to use, on a thread where that may take its time.
    pub async fn reload(self: &Arc<Self>, trigger: Trigger) -> Result<Reloaded, ReloadError> {
        let reloader = self.clone();
        let reloading = tokio::task::spawn_blocking(move || reloader.reload_now(trigger));
        let failed = |error: tokio::task::JoinError| ConfigError::Invalid(error.to_string()).into();
        reloading.await.unwrap_or_else(|error| Err(failed(error)))
    }

    /// Reloads whenever the file changes, until it is dropped. There must be one.
    pub async fn follow_file(self: Arc<Self>) {
        let Some(file) = self.file().map(Path::to_owned) else { return };
        let mut changes = watch::watch(&file);
        // It may have changed between its first reading and the watching.
        let reloader = self.clone();
        if tokio::task::spawn_blocking(move || reloader.is_outdated()).await.unwrap_or(false) {
            let _ = self.reload(Trigger::File).await;
        }
        while changes.changed().await.is_ok() {
            let _ = self.reload(Trigger::File).await;
        }
    }

    fn is_outdated(&self) -> bool {
        let running = self.running.state();
        self.source.as_ref().is_some_and(|source| match source.read() {
            Ok(wanted) => wanted.config != running.config,
            Err(_) => true,
        })
    }

    fn reload_now(&self, trigger: Trigger) -> Result<Reloaded, ReloadError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(source) = self.source.as_ref().filter(|source| source.file.is_some()) else {
            tracing::warn!(
                trigger = trigger.as_str(),
                "there is no configuration file to read again: all stays as it is"
            );
            return Err(ReloadError::NoFile);
        };
        let result = self.exchange(source, trigger);
        instruments::reloaded(result.is_ok());
        match &result {
            Ok(done) => {
                let changed = done.changed.join(",");
                tracing::info!(trigger = trigger.as_str(), changed, "the configuration was read again");
                if !done.needs_restart.is_empty() {
                    let keys = done.needs_restart.join(",");
                    tracing::warn!(keys, "what the configuration says of these keys waits for a restart");
                }
            }
            Err(error) => {
                // Its first line: those below show what stands in the file, which is nobody's business but its owner's.
                let error = error.told().lines().next().unwrap_or_default().to_owned();
                tracing::error!(trigger = trigger.as_str(), error, "the configuration stays as it was");
                let attempt = Attempt { at: SystemTime::now(), trigger, error: Some(error) };
                let state = State { last: Some(attempt), ..State::clone(&self.running.state()) };
                self.running.0.store(Arc::new(state));
            }
        }
        Ok(result?)
    }

    /// Puts what is read in the place of what runs, or leaves all as it is.
    fn exchange(&self, source: &Source, trigger: Trigger) -> Result<Reloaded, ConfigError> {
        let old = self.running.state();
        let wanted = source.read()?.config;
        let config = wanted.restarting_as(&old.config);
        let differ = |one, other| differences(one, other).map_err(|error| ConfigError::Invalid(error.to_string()));
        let (changed, needs_restart) = (differ(&old.config, &config)?, differ(&config, &wanted)?);
        let (origins, listed) = (config.origins()?, config.listed()?);
        for strange in config.oddities() {
            tracing::warn!("{strange}");
        }
        config.discovery.check_interfaces().map_err(ConfigError::Invalid)?;
        let stack = stack::build(&config.layers(), &self.shared, self.leaf.clone());
        self.stack.store(Arc::new(stack));
        listed.put(&self.members.pool, &self.members.names);
        self.members.finder.set(&config.discovery);
        self.origins.store(Arc::new(origins));
        let now = SystemTime::now();
        let last = Some(Attempt { at: now, trigger, error: None });
        let state = State { config, since: now, needs_restart: needs_restart.clone(), last };
        let layers = state.layers();
        self.running.0.store(Arc::new(state));
        Ok(Reloaded { layers, changed, needs_restart })
    }
}
