//! What several proxies share by way of a store, a Redis or a Valkey: drains, pins, sessions, limits, and what they do at bare servers.
//!
//! One task of a proxy keeps the connection and looks into the store twice a second. Whoever else asks it waits for no longer
//! than `timeout-ms`; the first that waits in vain closes the way for all until that task has found the store again. While it is
//! away every proxy goes by what it has itself: nothing is refused, and nothing stands still.

mod drains;
mod limits;
mod link;
mod news;
mod running;
mod turns;
mod url;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use olol_middleware::rate_limit::Ledger;
use olol_middleware::units::SomeMs;
use olol_middleware::{Cluster, ServerId, Shared, instruments};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, RedisResult};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use drains::Drains;
use link::Way;
pub use url::{Url, masked};

/// The variable of the environment that may hold the address of the store, since that may hold a password.
pub const VARIABLE: &str = "OLOL_STATE_URL";
/// Time between two looks into the store.
const EVERY: Duration = Duration::from_millis(500);
/// The shortest and the longest time until a store that is away is tried again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// How long it may take to reach it: nobody waits for that.
const CONNECT: Duration = Duration::from_secs(2);
/// Time between two lines of the log about a store that refuses things.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// The `[state]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Where the store is; empty: there is none.
    pub url: Url,
    /// Milliseconds that anybody waits for it.
    pub timeout_ms: SomeMs,
    /// What the names of all that is kept there begin with.
    pub prefix: String,
    /// File with the CA of its certificate, for `rediss`; empty: those that the system trusts.
    pub ca: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self { url: Url::default(), timeout_ms: SomeMs::new(200), prefix: "olol:".to_owned(), ca: PathBuf::new() }
    }
}

/// The store is not there, or was too slow.
#[derive(Debug, thiserror::Error)]
pub enum Gone {
    /// It was found missing before.
    #[error("it is not connected")]
    Away,
    /// It took too long.
    #[error("no answer after {0} ms")]
    Late(u128),
    /// What it said.
    #[error("{0}")]
    Failed(#[from] redis::RedisError),
}

/// The store that a proxy shares with others.
#[derive(Clone, Debug)]
pub struct State(Arc<Inner>);

struct Inner {
    config: Config,
    way: Way,
    /// `None` while it is away.
    connection: ArcSwapOption<MultiplexedConnection>,
    is_up: watch::Sender<bool>,
    health: Mutex<Health>,
    /// There is something to be told.
    news: Notify,
    drains: Drains,
}

#[derive(Debug)]
struct Health {
    since: SystemTime,
    error: String,
    /// Whether the log says that it is away.
    is_told: bool,
    /// When the log was told last of something that it has refused.
    refused: Option<Instant>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("url", &self.config.url).finish_non_exhaustive()
    }
}

impl State {
    /// The store of a configuration that names one. Nothing is asked yet.
    pub fn of(config: &Config) -> anyhow::Result<Option<Self>> {
        if config.url.is_empty() {
            return Ok(None);
        }
        let info = config.url.info().map_err(|what| anyhow::anyhow!("state.url: {what}"))?;
        let ca = Some(config.ca.as_path()).filter(|ca| !ca.as_os_str().is_empty());
        let way = Way::new(info, ca)?;
        let health = Mutex::new(Health {
            since: SystemTime::now(),
            error: "it was not reached yet".to_owned(),
            is_told: false,
            refused: None,
        });
        Ok(Some(Self(Arc::new(Inner {
            config: config.clone(),
            way,
            connection: ArcSwapOption::empty(),
            is_up: watch::Sender::new(false),
            health,
            news: Notify::new(),
            drains: Drains::default(),
        }))))
    }

    /// Keeps the connection, and what is shared over it, until what is returned is dropped.
    pub fn start(&self, shared: &Shared) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        tasks.spawn(keep(self.clone(), shared.cluster.clone(), shared.limits.clone()));
        let me = format!("{:016x}", fastrand::u64(..));
        let (tell, told) = mpsc::channel(turns::WAITING);
        shared.affinity.tell_others_by(tell);
        tasks.spawn(turns::tell(self.clone(), told, me.clone()));
        tasks.spawn(running::tell(self.clone(), shared.cluster.clone(), shared.limits.clone(), me.clone()));
        tasks.spawn(news::hear(self.clone(), shared.cluster.clone(), shared.limits.clone(), me));
        tasks
    }

    /// Whether the store answers.
    pub fn is_up(&self) -> bool {
        *self.0.is_up.borrow()
    }

    /// Whether it does, to be followed.
    pub(crate) fn changes(&self) -> watch::Receiver<bool> {
        self.0.is_up.subscribe()
    }

    /// What a page of status shows of it.
    pub fn shown(&self) -> Value {
        let health = self.0.health();
        json!({
            "url": self.0.config.url.to_string(),
            "state": if self.is_up() { "up" } else { "degraded" },
            "since": jiff::Timestamp::try_from(health.since).map(|since| since.to_string()).ok(),
            "reason": health.error,
        })
    }

    /// From now on a server is drained, or is not, at all proxies. Returns at once.
    pub fn drain(&self, server: &ServerId, draining: bool) {
        self.0.drains.say(server, draining);
        self.0.news.notify_one();
    }

    /// The name of something that is kept there.
    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}{name}", self.0.config.prefix)
    }

    /// Asks the store. Who finds it missing is told so at once, and who waits too long closes the way for the others. Until it
    /// has done all that is asked of it twice a second, it counts as missing.
    pub(crate) async fn ask<T>(
        &self,
        what: impl AsyncFnOnce(MultiplexedConnection) -> RedisResult<T>,
    ) -> Result<T, Gone> {
        if self.is_up() { self.try_ask(what).await } else { Err(Gone::Away) }
    }

    /// Asks it though it may not have proved yet that it answers.
    async fn try_ask<T>(&self, what: impl AsyncFnOnce(MultiplexedConnection) -> RedisResult<T>) -> Result<T, Gone> {
        let Some(connection) = self.0.connection.load_full() else { return Err(Gone::Away) };
        let limit = self.0.config.timeout_ms.time();
        let asked = tokio::time::timeout(limit, what(MultiplexedConnection::clone(&connection))).await;
        let gone = match asked {
            Ok(Ok(answer)) => return Ok(answer),
            // It answers, and does not want to.
            Ok(Err(error)) if !is_loss(&error) => {
                self.refused(&error);
                return Err(Gone::Failed(error));
            }
            Ok(Err(error)) => Gone::Failed(error),
            Err(_) => Gone::Late(limit.as_millis()),
        };
        self.lost(&gone);
        Err(gone)
    }

    /// The store is away: until it is found again, nobody asks it.
    fn lost(&self, gone: &Gone) {
        self.0.connection.store(None);
        instruments::state_failed();
        let was_up = self.0.is_up.send_replace(false);
        let mut health = self.0.health();
        if was_up {
            health.since = SystemTime::now();
        }
        health.error = gone.to_string();
        let is_told = std::mem::replace(&mut health.is_told, true);
        drop(health);
        if !is_told {
            tracing::warn!(
                store = %self.0.config.url, error = %gone,
                "the store that proxies share is away: each goes by what it has itself until that is back"
            );
        }
        self.0.news.notify_one();
    }

    /// The store has refused something: its memory is full, or what is there is not ours.
    fn refused(&self, error: &redis::RedisError) {
        instruments::state_failed();
        let mut health = self.0.health();
        health.error = error.to_string();
        // One that never did what it was asked counts as away, which is told.
        if self.is_up() && health.refused.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY) {
            health.refused = Some(Instant::now());
            tracing::warn!(store = %self.0.config.url, %error, "the store that proxies share refuses something");
        }
    }

    fn found(&self) {
        self.0.health().error.clear();
        if self.0.is_up.send_replace(true) {
            return;
        }
        let mut health = self.0.health();
        (health.since, health.is_told) = (SystemTime::now(), false);
        drop(health);
        tracing::info!(store = %self.0.config.url, "the store that proxies share is there");
    }

    async fn connect(&self) -> Result<(), Gone> {
        if self.0.connection.load().is_some() {
            return Ok(());
        }
        // Who asks has a limit of his own.
        let config = AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(None);
        let connecting = async {
            let link = self.0.way.open(None).await?;
            MultiplexedConnection::new_with_config(self.0.way.settings(), link, config).await
        };
        let connected = tokio::time::timeout(2 * CONNECT, connecting).await;
        let (connection, driver) = connected.map_err(|_| Gone::Late(CONNECT.as_millis()))??;
        // Ends with the last clone of the connection.
        tokio::spawn(driver);
        self.0.connection.store(Some(Arc::new(connection)));
        Ok(())
    }
}

impl Inner {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn keep(state: State, cluster: Arc<Cluster>, ledger: Arc<Ledger>) {
    let mut pause = AGAIN.0;
    let mut reading = limits::Reading::default();
    let me = format!("{:016x}", fastrand::u64(..));
    loop {
        let round = async {
            if let Err(gone) = state.connect().await {
                state.lost(&gone);
                return Err(gone);
            }
            drains::share(&state, &state.0.drains, &cluster).await?;
            limits::share(&state, &mut reading, &ledger, &me).await
        };
        match round.await {
            Ok(()) => {
                state.found();
                pause = AGAIN.0;
                let _ = tokio::time::timeout(EVERY, state.0.news.notified()).await;
            }
            Err(gone) => {
                // It answers, but not as it should.
                if state.0.connection.load().is_some() {
                    state.lost(&gone);
                }
                tokio::time::sleep(pause.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
                pause = (pause * 2).min(AGAIN.1);
            }
        }
    }
}

/// Whether an error is the loss of a connection, and no answer.
fn is_loss(error: &redis::RedisError) -> bool {
    error.is_io_error() || error.is_connection_dropped() || error.is_timeout()
}
