//! Conversations whose history the server side keeps, for programs that would rather not send it with every turn.
//!
//! A session is made by `CreateSession` or `POST /api/status/sessions`, goes on by `ChatMessage` or by `/api/chat` and
//! `/v1/chat/completions` with its id in `X-Olol-Session`, and ends by `EndSession`, `DELETE`, or because nobody asked for it for long. What is kept is
//! bounded, and lies in one file (`store`); a turn's last piece is passed on only when the turn is on the disk (`turn`).
//!
//! A session belongs to the key that made it. The file is not made before the first session, so who needs none has none; it
//! is one process's: another one that finds it taken says so to whoever asks for sessions, and serves everything else.

mod clock;
mod openai;
mod record;
mod shared;
mod store;
pub(crate) mod turn;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{HeaderMap, HeaderName, StatusCode};
use olol_middleware::keys::{Key, Keys, Rights};
use olol_middleware::time::unix_ms_now;
use olol_middleware::units::{SomeSeconds, Whole};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::state::State;

pub use record::{Entry, Page, Session, Status};
use shared::Shared;
use store::{Running, Store};
pub use turn::{Form, Turn};

/// The header that names a session.
pub const HEADER: HeaderName = HeaderName::from_static("x-olol-session");
/// The header that tells which server had a session before it moved.
pub(crate) const MOVED: HeaderName = HeaderName::from_static("x-olol-session-moved");
/// The header that tells that a history was there, and which turn of it this is.
pub(crate) const TURN: HeaderName = HeaderName::from_static("x-olol-session-turn");
/// The longest id, characters.
const LONGEST_ID: usize = 128;
/// The longest time that a session may be idle: ten years, in seconds.
const LONGEST_TIMEOUT: f64 = 315_360_000.0;

/// The `[sessions]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Folder of the file; empty: `olol` in the user's folder for state.
    pub dir: PathBuf,
    /// Sessions that are kept; beyond it one leaves of the key that has the most: that which was idle for longest.
    pub max_sessions: Whole<1, 1_000_000>,
    /// Bytes of all histories together; beyond it those leave of the key that has the most.
    pub max_bytes: Whole<1, { 1 << 40 }>,
    /// Messages of one session; beyond it its first turns leave.
    pub max_messages: Whole<1, 1_000_000>,
    /// Seconds without a turn after which a session leaves, unless it was given a time of its own.
    pub ttl_s: SomeSeconds,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dir: PathBuf::new(),
            max_sessions: Whole::new(10_000),
            max_bytes: Whole::new(256 << 20),
            max_messages: Whole::new(1000),
            ttl_s: SomeSeconds::new(7 * 24 * 3600),
        }
    }
}

impl Config {
    /// The folder of the file, if there is one.
    pub fn folder(&self) -> Option<PathBuf> {
        if self.dir.as_os_str().is_empty() { crate::config::state_folder() } else { Some(self.dir.clone()) }
    }
}

/// Why something cannot be done with a session.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// What was asked cannot be.
    #[error("{0}")]
    Bad(String),
    /// Nobody knows it, or it is another's.
    #[error(
        "session '{0}' not found: it has ended, was idle for too long, or was never made (CreateSession or POST \
         /api/status/sessions makes one)"
    )]
    NotFound(String),
    /// There is one of that id that is another.
    #[error("{0}")]
    Conflict(String),
    /// The key does not allow it.
    #[error("{0}")]
    Forbidden(String),
    /// What is to be kept is more than may be kept.
    #[error("{0}")]
    TooLarge(String),
    /// The file cannot be used.
    #[error("{0}")]
    Storage(String),
}

impl Error {
    /// The status that says it over HTTP.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Bad(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Storage(_) => StatusCode::INSUFFICIENT_STORAGE,
        }
    }
}

impl From<Error> for olol_middleware::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Forbidden(what) => Self::Forbidden(what),
            other => Self::Storage(other.to_string()),
        }
    }
}

/// Who asks for sessions: sees its own, and those of everybody if it may.
#[derive(Clone, Debug)]
pub struct Visitor {
    owner: Arc<str>,
    sees_all: bool,
    key: Option<Arc<Key>>,
}

impl Visitor {
    /// Whoever asks where there are no keys.
    pub fn anybody() -> Self {
        Self { owner: Arc::from(""), sees_all: true, key: None }
    }

    /// Who sends these headers, and may ask for sessions.
    pub fn of(keys: &Keys, headers: &HeaderMap) -> Result<Self, olol_middleware::Error> {
        let key = keys.admit(headers)?;
        Ok(key.map_or_else(Self::anybody, |key| Self { owner: key.id.clone(), sees_all: key.admin, key: Some(key) }))
    }

    /// Whether it may talk with a model.
    fn may_use(&self, model: &str) -> Result<(), Error> {
        match &self.key {
            Some(key) if !key.may.cover(Rights::INFER) || !key.may_use(model) => {
                Err(Error::Forbidden(format!("key '{}' may not use model '{model}'", key.name)))
            }
            _ => Ok(()),
        }
    }

    fn sees(&self, session: &Session) -> bool {
        self.sees_all || *session.owner == *self.owner
    }
}

/// A session to be made.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Its id; empty: one is made.
    pub id: String,
    /// Its model.
    pub model: String,
    /// What comes before its first turn, in Ollama's form.
    pub messages: Vec<Value>,
    /// Default options of its turns.
    pub parameters: Map<String, Value>,
    /// Seconds without a turn after which it leaves; 0: as configured.
    pub timeout: f64,
    /// The server that has loaded its model for it; empty: none.
    pub server: String,
}

/// The call that loads the model of a session, with the options that its turns will have. It never pulls.
pub(crate) fn preload(wanted: &Wanted) -> crate::ollama::Ask {
    let mut body = serde_json::json!({"model": wanted.model, "stream": false});
    if !wanted.parameters.is_empty() {
        body["options"] = wanted.parameters.clone().into();
    }
    crate::ollama::Ask::post("/api/generate", body.to_string())
}

/// The sessions of a proxy or of an agent.
#[derive(Clone, Debug)]
pub struct Sessions(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    file: &'static str,
    store: OnceCell<Arc<Store>>,
    /// What is shared with other proxies.
    shared: Option<Arc<Shared>>,
    /// Whether there is a file that could not be opened when this began: another process may have had it.
    is_missed: AtomicBool,
}

impl Sessions {
    /// Sessions in a file of this name. One that is there is opened; opening a large one that was not closed takes a while.
    pub fn new(config: Config, file: &'static str) -> Self {
        Self::shared(config, file, None)
    }

    /// The same sessions as those of other proxies that share this store, with a copy of each here.
    pub fn shared(config: Config, file: &'static str, state: Option<State>) -> Self {
        let shared = state.map(Shared::new).map(Arc::new);
        let inner = Inner { config, file, store: OnceCell::new(), shared, is_missed: AtomicBool::new(false) };
        let sessions = Self(Arc::new(inner));
        if sessions.0.path().is_ok_and(|path| path.exists()) {
            match sessions.0.open() {
                Ok(store) => drop(sessions.0.store.set(store)),
                Err(error) => {
                    sessions.0.is_missed.store(true, Ordering::Relaxed);
                    tracing::warn!(%error, "there are no sessions until that is mended; everything else is served");
                }
            }
        }
        sessions
    }

    /// Tells other proxies what they have missed, whenever the store is there again, until what is returned is dropped.
    pub fn keep_shared(&self) -> JoinSet<()> {
        shared::keep(self.clone())
    }

    /// How many sessions there are, and the bytes of their histories.
    pub fn counts(&self) -> (u64, u64) {
        self.0.store.get().map_or((0, 0), |store| store.counts())
    }

    /// Makes a session, or finds the one that was made so before. The flag: whether it is new.
    pub async fn create(&self, visitor: &Visitor, wanted: Wanted) -> Result<(Arc<Session>, bool), Error> {
        let mut session = self.prepared(visitor, &wanted)?;
        let store = self.store().await?;
        let key = session.key();
        if let Some(shared) = &self.0.shared {
            shared.refresh(&store, &key).await;
            session.generation = shared.generation(&key).await;
        }
        let entries = wanted.messages.into_iter().map(Entry::sent).collect();
        let (found, is_new) = store.create(session, entries).await?;
        if !is_new && found.model_name != wanted.model {
            return Err(Error::Conflict(format!(
                "session '{}' is there already, for model '{}': end it first, or take another id",
                found.session_id, found.model_name
            )));
        }
        if let Some(shared) = self.0.shared.as_ref().filter(|_| is_new) {
            shared.created(&store, &key).await;
        }
        Ok((found, is_new))
    }

    /// Whether a session could be made so; nothing is done yet.
    pub fn check(&self, visitor: &Visitor, wanted: &Wanted) -> Result<(), Error> {
        self.prepared(visitor, wanted).map(drop)
    }

    fn prepared(&self, visitor: &Visitor, wanted: &Wanted) -> Result<Session, Error> {
        if wanted.model.is_empty() {
            return Err(Error::Bad("a session needs a model (model_name): say which one it talks with".to_owned()));
        }
        visitor.may_use(&wanted.model)?;
        record::check_messages(&wanted.messages)?;
        if !wanted.timeout.is_finite() || !(0.0..=LONGEST_TIMEOUT).contains(&wanted.timeout) {
            return Err(Error::Bad(format!("timeout must be seconds from 0 to {LONGEST_TIMEOUT}")));
        }
        let id = if wanted.id.is_empty() { record::random_id()? } else { wanted.id.clone() };
        record::check_id(&id)?;
        let now = unix_ms_now();
        #[expect(clippy::cast_precision_loss, reason = "at most ten years")]
        let usual = self.0.config.ttl_s.get() as f64;
        Ok(Session {
            session_id: id,
            owner: visitor.owner.to_string(),
            model_name: wanted.model.clone(),
            created_at: now,
            last_active: now,
            server_host: wanted.server.clone(),
            moved_from: String::new(),
            model_parameters: wanted.parameters.clone(),
            timeout: if wanted.timeout > 0.0 { wanted.timeout } else { usual },
            turns: 0,
            messages: 0,
            bytes: 0,
            first: 1,
            next: 1,
            generation: 0,
            birth: fastrand::u64(..),
            stamp: now,
        })
    }

    /// A session, and whether it is in the midst of a turn.
    pub async fn find(&self, visitor: &Visitor, id: &str) -> Result<(Arc<Session>, bool), Error> {
        let store = self.fresh(visitor, id).await?;
        let (session, running) = resolve(&store, visitor, id)?;
        Ok((session, running.is_busy()))
    }

    /// A session with its history.
    pub async fn export(&self, visitor: &Visitor, id: &str) -> Result<(Arc<Session>, bool, Vec<Entry>), Error> {
        let store = self.fresh(visitor, id).await?;
        let (session, running) = resolve(&store, visitor, id)?;
        let entries = store.history(session.key()).await?;
        Ok((session, running.is_busy(), entries))
    }

    /// Some of the sessions that somebody may see, in the order of their names, from behind one of them on.
    pub async fn list(&self, visitor: &Visitor, after: &str, limit: usize) -> Result<Page, Error> {
        let (here, now) = match self.opened().await? {
            Some(store) => (store.list(|session| visitor.sees(session), after, limit), store.now()),
            None => (Page::default(), unix_ms_now()),
        };
        let Some(shared) = &self.0.shared else { return Ok(here) };
        let Ok((there, more)) = shared.list(visitor, after, limit, now).await else { return Ok(here) };
        Ok(here.joined(there, more, limit))
    }

    /// Ends a session and forgets its history; the turns that it had.
    pub async fn end(&self, visitor: &Visitor, id: &str) -> Result<u64, Error> {
        let store = self.fresh(visitor, id).await?;
        let (session, _) = resolve(&store, visitor, id)?;
        let is_told = match &self.0.shared {
            Some(shared) => shared.end(&session).await,
            None => true,
        };
        store.end(session.key(), !is_told).await?.ok_or_else(|| Error::NotFound(id.to_owned()))
    }

    /// Begins a turn of a session with the messages that its client sends.
    pub async fn turn(&self, visitor: &Visitor, id: &str, sent: Vec<Value>) -> Result<Turn, Error> {
        let store = self.fresh(visitor, id).await?;
        let (session, running) = resolve(&store, visitor, id)?;
        // From here on it does not leave.
        let busy = running.begin();
        let history = store.history(session.key()).await?;
        Ok(Turn::new((store, self.0.shared.clone()), session, busy, history, sent))
    }

    /// Whether it could be that there is such a session: what is asked of every request that names its conversation.
    pub fn may_know(&self) -> bool {
        let is_shared = || self.0.shared.as_ref().is_some_and(|shared| shared.is_up());
        self.0.is_missed.load(Ordering::Relaxed) || self.counts().0 > 0 || is_shared()
    }

    /// The store, with what is known elsewhere of the session that is meant.
    async fn fresh(&self, visitor: &Visitor, id: &str) -> Result<Arc<Store>, Error> {
        let not_found = || Error::NotFound(id.chars().take(LONGEST_ID).collect());
        let Some(shared) = self.0.shared.as_ref().filter(|shared| shared.is_up()) else {
            return self.opened().await?.ok_or_else(not_found);
        };
        let (bare, owner) = id.split_once('@').map_or((id, None), |(bare, owner)| (bare, Some(owner)));
        record::check_id(bare)?;
        let mut key = record::key(bare, owner.unwrap_or(&visitor.owner));
        let opened = self.opened().await?;
        let is_here = opened.as_ref().is_some_and(|store| store.find(&key).is_some());
        let mut others = Vec::new();
        // Who sees all may mean that of another.
        if owner.is_none() && visitor.sees_all && !is_here && !shared.knows(&key).await {
            others = shared.of_anybody(bare).await;
            key = others.pop().unwrap_or(key);
        }
        let store = match opened {
            Some(store) => store,
            // Nobody needs a file for what is nowhere.
            None if shared.knows(&key).await => self.store().await?,
            None => return Err(not_found()),
        };
        for key in others.iter().chain([&key]) {
            shared.refresh(&store, key).await;
        }
        Ok(store)
    }

    /// The store, made if there is none.
    async fn store(&self) -> Result<Arc<Store>, Error> {
        let inner = self.0.clone();
        let open = || async move {
            let opening = tokio::task::spawn_blocking(move || {
                let store = inner.open()?;
                inner.is_missed.store(false, Ordering::Relaxed);
                Ok(store)
            });
            opening.await.unwrap_or_else(|error| Err(Error::Storage(error.to_string())))
        };
        self.0.store.get_or_try_init(open).await.cloned()
    }

    /// The store, if there is one.
    async fn opened(&self) -> Result<Option<Arc<Store>>, Error> {
        if self.0.store.initialized() || self.0.is_missed.load(Ordering::Relaxed) {
            return self.store().await.map(Some);
        }
        Ok(None)
    }
}

impl Inner {
    fn path(&self) -> Result<PathBuf, Error> {
        let hint = "there is no folder for sessions: set [sessions] dir, or HOME";
        let dir = self.config.folder().ok_or_else(|| Error::Storage(hint.to_owned()))?;
        Ok(dir.join(self.file))
    }

    fn open(&self) -> Result<Arc<Store>, Error> {
        Ok(Arc::new(Store::open(&self.path()?, store::Bounds::of(&self.config))?))
    }
}

/// The last of some messages; 0: all of them.
pub(crate) fn last(entries: &[Entry], count: usize) -> &[Entry] {
    let skipped = if count == 0 { 0 } else { entries.len().saturating_sub(count) };
    &entries[skipped..]
}

/// The session that somebody means: `id` is its own, `id@key` that of a key. Who sees all may leave out whose it is while
/// there is only one.
fn resolve(store: &Store, visitor: &Visitor, id: &str) -> Result<(Arc<Session>, Running), Error> {
    let not_found = || Error::NotFound(id.chars().take(LONGEST_ID).collect());
    let (bare, owner) = id.split_once('@').map_or((id, None), |(bare, owner)| (bare, Some(owner)));
    record::check_id(bare)?;
    let owner_or_own = owner.unwrap_or(&visitor.owner);
    let found = store.find(&record::key(bare, owner_or_own)).filter(|(session, _)| visitor.sees(session));
    let found = match found {
        None if owner.is_none() && visitor.sees_all => {
            let page = store.list(|session| session.session_id == bare, "", 2);
            if page.sessions.len() > 1 {
                let hint = "several keys have a session of this id: say whose is meant, as in";
                return Err(Error::Conflict(format!("{hint} '{}'", page.sessions[0].0.key())));
            }
            page.sessions.first().and_then(|(session, _)| store.find(session.key().as_str()))
        }
        found => found,
    };
    found.filter(|(session, running)| running.is_busy() || !session.has_expired(store.now())).ok_or_else(not_found)
}
