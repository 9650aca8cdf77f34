//! What is kept of a session, and what is shown of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::clock::moved;
use super::{Error, LONGEST_ID};
use olol_middleware::time::unix_ms_now;

/// Milliseconds after its last turn during which a session counts as active.
const ACTIVE: u64 = 60_000;

/// A session without its history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Its id, one of its owner's.
    pub session_id: String,
    /// The id of the key that it belongs to; empty: nobody's.
    pub owner: String,
    /// The model that it talks with.
    pub model_name: String,
    /// When it was made, milliseconds since 1970.
    pub created_at: u64,
    /// When its last turn ended, milliseconds since 1970, by the clock here.
    pub last_active: u64,
    /// The server that answered its last turn; empty: none yet.
    pub server_host: String,
    /// The server of the turn before that, if that was another.
    pub moved_from: String,
    /// Default options of its turns.
    pub model_parameters: Map<String, Value>,
    /// Seconds without a turn after which it leaves.
    pub timeout: f64,
    /// Turns that it has had.
    pub turns: u64,
    /// Messages that are kept.
    pub messages: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// The first turn that is kept. What came before all turns is number 0.
    pub(super) first: u64,
    /// The number of the next turn.
    pub(super) next: u64,
    /// How many sessions of this name have ended before it, as far as one knew when it was made.
    #[serde(default)]
    pub(super) generation: u64,
    /// What tells it from others of its name that were made without knowing of it.
    #[serde(default)]
    pub(super) birth: u64,
    /// When its last turn ended, by the clock of the proxy that had it: tells two copies apart, and nothing else. 0: as it is here.
    #[serde(default)]
    pub(super) stamp: u64,
}

/// Which of two copies is newer, or of two sessions of one name the one that goes on.
pub(super) type Version = (u64, u64, u64);

/// How a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It is in the midst of a turn, or had one in the last minute.
    Active,
    /// Its last turn was longer ago.
    Idle,
    /// Its time is over; it is about to leave.
    Expired,
    /// Its last turn was answered by another server than the one before.
    Moved,
}

impl Status {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Expired => "expired",
            Self::Moved => "moved",
        }
    }
}

impl Session {
    /// The name under which it is kept: whose it is belongs to it.
    pub fn key(&self) -> String {
        key(&self.session_id, &self.owner)
    }

    /// Whether it was idle for too long.
    pub fn has_expired(&self, now: u64) -> bool {
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of some years")]
        let idle = now.saturating_sub(self.last_active) as f64;
        idle > self.timeout * 1000.0
    }

    /// Its version, whatever the clocks say where its copies are: the greatest one counts. One that was made again goes before
    /// all that the old one may have had.
    pub(super) fn version(&self) -> Version {
        (self.generation, self.next, if self.stamp == 0 { self.last_active } else { self.stamp })
    }

    /// Seconds without a turn after which it leaves, as milliseconds.
    pub(super) fn timeout_ms(&self) -> u64 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most ten years")]
        let timeout = (self.timeout.max(0.0) * 1000.0) as u64;
        timeout
    }

    /// It by a clock that is ahead by so many milliseconds.
    pub(super) fn by_clock(mut self, ahead: i64) -> Self {
        (_, _, self.stamp) = self.version();
        (self.created_at, self.last_active) = (moved(self.created_at, ahead), moved(self.last_active, ahead));
        self
    }

    /// How it is now.
    pub fn status(&self, is_busy: bool, now: u64) -> Status {
        let is_recent = now.saturating_sub(self.last_active) < ACTIVE;
        match () {
            () if is_busy => Status::Active,
            () if self.has_expired(now) => Status::Expired,
            () if !self.moved_from.is_empty() => Status::Moved,
            () if is_recent => Status::Active,
            () => Status::Idle,
        }
    }

    /// What people and programs see of it.
    pub fn shown(&self, is_busy: bool) -> Value {
        json!({
            "session_id": self.session_id,
            "owner": self.owner,
            "model_name": self.model_name,
            "created_at": time(self.created_at),
            "last_active": time(self.last_active),
            "server_host": self.server_host,
            "moved_from": self.moved_from,
            "model_parameters": self.model_parameters,
            "timeout": self.timeout,
            "status": self.status(is_busy, unix_ms_now()).as_str(),
            "turns": self.turns,
            "message_count": self.messages,
            "bytes": self.bytes,
        })
    }
}

/// A message that a session remembers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The message in Ollama's form.
    pub message: Value,
    /// When it came, or was whole, milliseconds since 1970.
    pub timestamp: u64,
    /// The temperature that its turn asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Tokens of the prompt and of the answer; 0 of what a client sent.
    #[serde(default)]
    pub tokens_used: u64,
    /// How long the answer took, seconds; 0 of what a client sent.
    #[serde(default)]
    pub completion_time: f64,
    /// What else is known: the server, the model, why the answer ended, the request.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

impl Entry {
    /// A message as a client sent it.
    pub(super) fn sent(message: Value) -> Self {
        Self {
            message,
            timestamp: unix_ms_now(),
            temperature: None,
            tokens_used: 0,
            completion_time: 0.0,
            metadata: BTreeMap::new(),
        }
    }

    /// What people and programs see of it: the message, and what is known of it.
    pub fn shown(&self) -> Value {
        let mut shown = self.message.as_object().cloned().unwrap_or_default();
        shown.insert("timestamp".to_owned(), time(self.timestamp).into());
        shown.insert("temperature".to_owned(), json!(self.temperature));
        shown.insert("tokens_used".to_owned(), self.tokens_used.into());
        shown.insert("completion_time".to_owned(), json!(self.completion_time));
        shown.insert("metadata".to_owned(), json!(self.metadata));
        Value::Object(shown)
    }
}

/// A part of a list of sessions.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The sessions, and whether each is in the midst of a turn.
    pub sessions: Vec<(Arc<Session>, bool)>,
    /// What to go on behind; `None`: these were the last.
    pub next: Option<String>,
}

impl Page {
    /// This page with sessions that another place has from the same name on; that goes on behind `more`.
    pub(super) fn joined(self, there: Vec<Session>, more: Option<String>, limit: usize) -> Self {
        let mut all: BTreeMap<String, (Arc<Session>, bool)> =
            there.into_iter().map(|session| (session.key(), (Arc::new(session), false))).collect();
        for (session, is_busy) in self.sessions {
            let newer = all.get(&session.key()).map(|(there, _)| there);
            let newer = newer.filter(|there| there.version() > session.version()).cloned();
            all.insert(session.key(), (newer.unwrap_or(session), is_busy));
        }
        // Nobody knows what comes behind the nearer of the two ends.
        let end = [self.next, more].into_iter().flatten().min();
        if let Some(end) = &end {
            all.retain(|key, _| key <= end);
        }
        let last = all.keys().nth(limit.saturating_sub(1)).filter(|_| all.len() > limit).cloned();
        let next = last.or(end);
        Self { sessions: all.into_values().take(limit).collect(), next }
    }
}

/// The name of a session of somebody.
pub(super) fn key(id: &str, owner: &str) -> String {
    if owner.is_empty() { id.to_owned() } else { format!("{id}@{owner}") }
}

/// Whether an id is one: it stands in headers, paths and names.
pub(super) fn check_id(id: &str) -> Result<(), Error> {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'-');
    if id.is_empty() || id.len() > LONGEST_ID || !id.bytes().all(is_fit) {
        return Err(Error::Bad(format!(
            "a session's id has 1 to {LONGEST_ID} letters, digits, '.', '_', ':' and '-', and no others"
        )));
    }
    Ok(())
}

/// An id that nobody guesses.
pub(super) fn random_id() -> Result<String, Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::Storage(format!("the system gives no random bytes: {error}")))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

/// Whether messages can be kept: objects with a role.
pub(super) fn check_messages(messages: &[Value]) -> Result<(), Error> {
    match messages.iter().position(|message| message["role"].as_str().is_none_or(str::is_empty)) {
        None => Ok(()),
        Some(at) => Err(Error::Bad(format!("messages[{at}] has no role: it is an object with a role and a content"))),
    }
}

/// A time as RFC 3339.
fn time(ms: u64) -> String {
    let at = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.map(|at| at.to_string()).unwrap_or_default()
}
