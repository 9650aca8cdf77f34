//! Sessions that several proxies share: each has its copy on its own disk, and the store has the newest.
//!
//! Before a session is used its number of turns there is asked for, and what is newer comes here; a turn is in the store when
//! its end is told. While the store is away the copy here is what counts, and the turns that it gets go to the store when that is
//! back. If two proxies have gone on alone with one session, the history with more turns stays, and the later one of two that are
//! as long.
//!
//! Clocks of proxies differ, so none goes by a time that another one has written: how long a session stays is what the store
//! says, and when a turn ended only tells two copies apart.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Script};
use tokio::task::JoinSet;

use super::clock;
use super::record::Session;
use super::store::{Append, Store};
use super::{Error, Visitor};
use crate::state::{Gone, State};

/// Milliseconds that a session stays in the store after its time: its proxies look for it less often.
const GRACE: u64 = 60_000;
/// Milliseconds for which it is known there that a session has ended: proxies that were away have it still.
const ENDED: u64 = 7 * 24 * 3600 * 1000;
/// Ends of sessions that wait for the store to come back.
const UNSAID: usize = 10_000;
/// Sessions that share a line.
const LINES: usize = 64;
/// How often a turn is put behind those of others before it is left to the copy here.
const TRIES: usize = 4;

/// How a script ends that has put something of a session: it stays for its time (ARGV 4), and its name (ARGV 5) is among all names.
/// Each time two of the names are looked at: those whose sessions have left by themselves go, however few ask for the list.
const LISTED: &str = r"
        redis.call('PEXPIRE', KEYS[1], ARGV[4])
        redis.call('ZADD', KEYS[2], 0, ARGV[5])
        local before = string.sub(KEYS[1], 1, #KEYS[1] - #ARGV[5])
        for _, name in ipairs(redis.call('ZRANDMEMBER', KEYS[2], 2)) do
            if redis.call('EXISTS', before .. name) == 0 then redis.call('ZREM', KEYS[2], name) end
        end
        ";

/// A script of these parts.
fn script(parts: &[&str]) -> Script {
    Script::new(&parts.concat())
}

/// Puts a turn, if the store has all that was before it and not the turn itself. KEYS: the session, all names, its tombstone. ARGV: the number of the turn,
/// when it ended, the record, how long it stays, its name, the first turn that is kept, the turn.
static APPEND: LazyLock<Script> = LazyLock::new(|| {
    script(&[
        r"
        local has = redis.call('HGET', KEYS[1], 'next')
        if has == false then
            if redis.call('EXISTS', KEYS[3]) == 1 then return -2 end
            return -1
        end
        if tonumber(has) ~= tonumber(ARGV[1]) then
            if redis.call('HGET', KEYS[1], 't' .. ARGV[1]) == ARGV[7] then return 0 end
            return tonumber(has)
        end
        redis.call('HSET', KEYS[1], 'next', ARGV[1] + 1, 'at', ARGV[2], 'session', ARGV[3], 't' .. ARGV[1], ARGV[7])
        local first = tonumber(ARGV[6]) - 1
        while first > 0 and redis.call('HDEL', KEYS[1], 't' .. first) == 1 do first = first - 1 end
        ",
        LISTED,
        "return 0",
    ])
});

/// Puts a whole session, unless the store has a newer one. KEYS as above. ARGV: the number of its next turn, when its last one
/// ended, the record, how long it stays, its name; then the fields of its turns and what is in them.
static PUT: LazyLock<Script> = LazyLock::new(|| {
    script(&[
        r"
        local has = redis.call('HMGET', KEYS[1], 'next', 'at')
        if has[1] ~= false then
            local newer = tonumber(has[1]) - tonumber(ARGV[1])
            if newer == 0 then newer = tonumber(has[2]) - tonumber(ARGV[2]) end
            if newer > 0 then return 0 end
        end
        redis.call('DEL', KEYS[1], KEYS[3])
        redis.call('HSET', KEYS[1], 'next', ARGV[1], 'at', ARGV[2], 'session', ARGV[3])
        for at = 6, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1]) end
        ",
        LISTED,
        "return 1",
    ])
});

/// What is shared.
#[derive(Debug)]
pub(super) struct Shared {
    state: State,
    /// The names of sessions that have ended here while the store was away.
    ended: Mutex<HashSet<String>>,
    /// What is written here and there goes one after the other, as far as it is of one session: else what comes from there could
    /// take the place of a turn that is not there yet.
    turns: [Line; LINES],
    hasher: RandomState,
}

/// Those who write one of some sessions, one after the other.
type Line = tokio::sync::Mutex<()>;

/// The record of a session, if there is one, and how many milliseconds it stays.
type Kept = (Option<Vec<u8>>, i64);

/// What the store has of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    /// A version of it.
    Version(u64, u64),
    /// It has ended.
    Ended,
    /// Nothing.
    Nothing,
}

/// What became of a turn there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// It is there.
    Stored,
    /// It has another one of that number.
    Behind,
    /// Its session has ended there.
    Ended,
}

impl Shared {
    pub(super) fn new(state: State) -> Self {
        let turns = std::array::from_fn(|_| Line::default());
        Self { state, ended: Mutex::default(), turns, hasher: RandomState::new() }
    }

    fn line(&self, key: &str) -> &Line {
        let hash = usize::try_from(self.hasher.hash_one(key) % LINES as u64).unwrap_or(0);
        &self.turns[hash]
    }

    /// Whether the store answers.
    pub(super) fn is_up(&self) -> bool {
        self.state.is_up()
    }

    /// Makes the copy here as new as that in the store. What the store does not tell in time is as it is here.
    pub(super) async fn refresh(&self, store: &Store, key: &str) {
        if let Err(gone) = self.try_refresh(store, key).await {
            tracing::debug!(session = key, error = %gone, "the copy of a session here is used");
        }
    }

    async fn try_refresh(&self, store: &Store, key: &str) -> Result<(), Gone> {
        if self.ended().contains(key) {
            return Ok(());
        }
        let _in_turn = self.line(key).lock().await;
        let here = store.find(key).map(|(session, _)| session.version());
        match (self.look(key).await?, here) {
            (There::Version(next, at), here) if here.is_none_or(|here| here < (next, at)) => {
                self.fetch(store, key).await
            }
            (There::Version(next, at), Some(here)) if here > (next, at) => self.put(store, key).await,
            (There::Nothing, Some(_)) => self.put(store, key).await,
            (There::Ended, Some(_)) => {
                // It goes on if it is just being used.
                let _ = store.end(key.to_owned()).await;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The names of sessions of one id, whosever they are: one or two of them.
    pub(super) async fn of_anybody(&self, id: &str) -> Vec<String> {
        let [_, names, _] = self.keys("");
        let (from, to) = (format!("[{id}@"), format!("({id}A"));
        let look = async |mut there| {
            let mut look = redis::cmd("ZRANGEBYLEX");
            look.arg(&names).arg(&from).arg(&to).arg("LIMIT").arg(0).arg(2).query_async(&mut there).await
        };
        self.state.ask(look).await.unwrap_or_default()
    }

    /// Whether the store has a session.
    pub(super) async fn knows(&self, key: &str) -> bool {
        matches!(self.look(key).await, Ok(There::Version(..)))
    }

    /// Adds a turn here and there. If others have added some in the meantime, it comes after those.
    pub(super) async fn append(&self, store: &Store, turn: Append) -> Result<Option<Arc<Session>>, Error> {
        let bytes = serde_json::to_vec(&turn.entries).map_err(|error| Error::Storage(error.to_string()))?;
        let _in_turn = self.line(&turn.key).lock().await;
        let mut stored = store.append(turn.clone()).await?;
        for _ in 0..TRIES {
            let Some(session) = &stored else { return Ok(None) };
            match self.tell(store, session, &bytes).await {
                // If it is away it is told of it when it is back.
                Ok(Told::Stored) | Err(_) => break,
                Ok(Told::Behind) => {}
                Ok(Told::Ended) => {
                    store.end(turn.key.clone()).await?;
                    return Ok(None);
                }
            }
            // Without our turn, which is then added once more.
            if self.fetch(store, &turn.key).await.is_err() {
                break;
            }
            stored = store.append(turn.clone()).await?;
        }
        Ok(stored)
    }

    /// Tells the store of the last turn of a session.
    async fn tell(&self, store: &Store, session: &Session, turn: &[u8]) -> Result<Told, Gone> {
        let number = session.next.saturating_sub(1);
        let key = session.key();
        let [hash, names, tombstone] = self.keys(&key);
        let record = record(session);
        let (at, stays) = (session.version().1, stays(session, store.now()));
        let answer: i64 = self
            .state
            .ask(async |mut there| {
                let mut script = APPEND.prepare_invoke();
                script.key(&hash).key(&names).key(&tombstone);
                script.arg(number).arg(at).arg(&record).arg(stays).arg(&key).arg(session.first).arg(turn);
                script.invoke_async(&mut there).await
            })
            .await?;
        match answer {
            0 => Ok(Told::Stored),
            -2 => Ok(Told::Ended),
            next if u64::try_from(next).is_ok_and(|next| next > number) => Ok(Told::Behind),
            // It has less than we have: turns that were said while it was away.
            _ => self.put(store, &key).await.map(|()| Told::Stored),
        }
    }

    /// Ends a session there; when that is back, if it is away.
    pub(super) async fn end(&self, key: &str) {
        if self.say_end(key).await.is_err() {
            let mut ended = self.ended();
            if ended.len() < UNSAID {
                ended.insert(key.to_owned());
            }
        }
    }

    async fn say_end(&self, key: &str) -> Result<(), Gone> {
        let [hash, names, tombstone] = self.keys(key);
        self.state
            .ask(async |mut there| {
                let mut pipe = redis::pipe();
                pipe.atomic().del(&hash).zrem(&names, key);
                pipe.cmd("SET").arg(&tombstone).arg(1).arg("PX").arg(ENDED);
                pipe.exec_async(&mut there).await
            })
            .await
    }

    /// Some of the sessions that somebody may see and that are not here, in the order of their names; and the last name that was
    /// looked at, if there may be more.
    pub(super) async fn list(
        &self,
        visitor: &Visitor,
        after: &str,
        limit: usize,
        now: u64,
    ) -> Result<(Vec<Session>, Option<String>), Gone> {
        let [_, names, _] = self.keys("");
        let from = if after.is_empty() { "-".to_owned() } else { format!("({after}") };
        let (keys, records) = self
            .state
            .ask(async |mut there| {
                let keys: Vec<String> = redis::cmd("ZRANGEBYLEX")
                    .arg(&names)
                    .arg(&from)
                    .arg("+")
                    .arg("LIMIT")
                    .arg(0)
                    .arg(limit)
                    .query_async(&mut there)
                    .await?;
                let records = self.records(&mut there, &keys).await?;
                let gone: Vec<&String> =
                    keys.iter().zip(&records).filter(|(_, (record, _))| record.is_none()).map(|(key, _)| key).collect();
                if !gone.is_empty() {
                    redis::cmd("ZREM").arg(&names).arg(gone).exec_async(&mut there).await?;
                }
                Ok((keys, records))
            })
            .await?;
        let next = keys.last().filter(|_| keys.len() == limit).cloned();
        let sessions = records.into_iter().filter_map(|(record, stays)| Some(here(read(&record?)?, stays, now)));
        Ok((sessions.filter(|session| visitor.sees(session)).collect(), next))
    }

    async fn records(&self, there: &mut MultiplexedConnection, keys: &[String]) -> RedisResult<Vec<Kept>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipe = redis::pipe();
        for key in keys {
            let [hash, ..] = self.keys(key);
            pipe.hget(&hash, "session").pttl(&hash);
        }
        pipe.query_async(there).await
    }

    async fn look(&self, key: &str) -> Result<There, Gone> {
        let [hash, _, tombstone] = self.keys(key);
        let (version, has_ended): ((Option<u64>, Option<u64>), bool) = self
            .state
            .ask(async |mut there| {
                redis::pipe()
                    .cmd("HMGET")
                    .arg(&hash)
                    .arg("next")
                    .arg("at")
                    .exists(&tombstone)
                    .query_async(&mut there)
                    .await
            })
            .await?;
        Ok(match version {
            (Some(next), at) => There::Version(next, at.unwrap_or(0)),
            _ if has_ended => There::Ended,
            _ => There::Nothing,
        })
    }

    /// Brings a session from there to here.
    async fn fetch(&self, store: &Store, key: &str) -> Result<(), Gone> {
        let [hash, ..] = self.keys(key);
        let (fields, stays): (Vec<(String, Vec<u8>)>, i64) = self
            .state
            .ask(async |mut there| redis::pipe().hgetall(&hash).pttl(&hash).query_async(&mut there).await)
            .await?;
        let mut session = None;
        let mut turns = Vec::new();
        for (field, value) in fields {
            match field.strip_prefix('t').and_then(|number| number.parse().ok()) {
                Some(number) => turns.push((number, value)),
                None if field == "session" => session = read(&value),
                None => {}
            }
        }
        let Some(session) = session.filter(|session: &Session| session.key() == key) else { return Ok(()) };
        let session = here(session, stays, store.now());
        turns.sort_unstable_by_key(|(number, _)| *number);
        if let Err(error) = store.adopt(session, turns).await {
            tracing::warn!(session = key, %error, "a session of another proxy cannot be kept here");
        }
        Ok(())
    }

    /// Brings a session from here to there.
    async fn put(&self, store: &Store, key: &str) -> Result<(), Gone> {
        let Some((session, _)) = store.find(key) else { return Ok(()) };
        let Ok(turns) = store.turns(key.to_owned()).await else { return Ok(()) };
        let now = store.now();
        if session.has_expired(now) {
            return Ok(());
        }
        let [hash, names, tombstone] = self.keys(key);
        self.state
            .ask(async |mut there| {
                let mut script = PUT.prepare_invoke();
                script.key(&hash).key(&names).key(&tombstone);
                let (next, at) = session.version();
                script.arg(next).arg(at).arg(record(&session)).arg(stays(&session, now)).arg(key);
                for (number, turn) in &turns {
                    script.arg(format!("t{number}")).arg(turn.as_slice());
                }
                script.invoke_async(&mut there).await
            })
            .await
    }

    /// A new session is put there.
    pub(super) async fn created(&self, store: &Store, key: &str) {
        self.ended().remove(key);
        if let Err(gone) = self.put(store, key).await {
            tracing::debug!(session = key, error = %gone, "a session is here alone for now");
        }
    }

    /// Tells the store, whenever it is there again, of what was done here alone.
    async fn catch_up(&self, store: &Store) -> Result<(), Gone> {
        let ended: Vec<String> = self.ended().iter().cloned().collect();
        for key in ended {
            self.say_end(&key).await?;
            self.ended().remove(&key);
        }
        let mut after = String::new();
        loop {
            let page = store.list(|_| true, &after, 100);
            for (session, _) in &page.sessions {
                match self.look(&session.key()).await? {
                    There::Version(next, at) if session.version() <= (next, at) => {}
                    There::Ended => {}
                    _ => self.put(store, &session.key()).await?,
                }
            }
            match page.next {
                Some(next) => after = next,
                None => return Ok(()),
            }
        }
    }

    fn keys(&self, key: &str) -> [String; 3] {
        [self.state.key(&format!("session:{key}")), self.state.key("sessions"), self.state.key(&format!("ended:{key}"))]
    }

    fn ended(&self) -> MutexGuard<'_, HashSet<String>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Catches up whenever the store is there again, until it is dropped.
pub(super) fn keep(sessions: super::Sessions) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let Some(shared) = sessions.0.shared.clone() else { return };
        let mut up = shared.state.changes();
        loop {
            if *up.borrow_and_update()
                && let Some(store) = sessions.0.store.get()
                && let Err(gone) = shared.catch_up(store).await
            {
                tracing::debug!(error = %gone, "the store left while it was told of sessions");
            }
            if up.changed().await.is_err() {
                return;
            }
        }
    });
    tasks
}

fn record(session: &Session) -> Vec<u8> {
    serde_json::to_vec(session).unwrap_or_default()
}

fn read(record: &[u8]) -> Option<Session> {
    serde_json::from_slice(record).ok()
}

/// Milliseconds for which the store keeps it.
fn stays(session: &Session, now: u64) -> u64 {
    (session.last_active + session.timeout_ms()).saturating_sub(now) + GRACE
}

/// A session of another proxy by the clock here, from how many milliseconds it stays there.
fn here(session: Session, stays: i64, now: u64) -> Session {
    // It stays for ever, or has just gone.
    let Ok(stays) = u64::try_from(stays) else { return session };
    let last_active = now.saturating_add(stays).saturating_sub(session.timeout_ms() + GRACE).min(now);
    let ahead = clock::jump(session.last_active, last_active);
    session.by_clock(ahead)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(last_active: u64) -> Session {
        let record = serde_json::json!({
            "session_id": "a", "owner": "", "model_name": "tiny", "created_at": last_active - 1000, "last_active": last_active,
            "server_host": "", "moved_from": "", "model_parameters": {}, "timeout": 600.0, "turns": 1, "messages": 2, "bytes": 9,
            "first": 1, "next": 2,
        });
        read(record.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_session_is_as_old_here_as_where_it_was_used_whatever_the_clocks_say() {
        let (now, day) = (1_700_000_000_000_u64, 24 * 3600 * 1000_u64);
        for theirs in [now, now - 2 * day, now + 2 * day, now - 365 * day] {
            // It was used a minute ago there, and is told of now.
            let there = session(theirs - 60_000);
            let stays = i64::try_from(stays(&there, theirs)).unwrap();
            let found = here(there.clone(), stays, now);
            assert_eq!((found.last_active, found.created_at), (now - 60_000, now - 61_000));
            assert!(!found.has_expired(now) && found.version() == there.version(), "the copies are the same");
            assert!(here(there, stays - 600_000, now + 600_000).has_expired(now + 600_000));
        }
    }

    #[test]
    fn clocks_that_tell_the_same_time_change_nothing() {
        let there = session(1_700_000_000_000);
        let stays = i64::try_from(stays(&there, 1_700_000_001_000)).unwrap();
        assert_eq!(here(there.clone(), stays, 1_700_000_002_500), there.clone().by_clock(0));
        assert_eq!(here(there.clone(), -1, 5), there);
    }
}
