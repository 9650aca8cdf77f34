//! Sessions that several proxies share: each has its copy on its own disk, and the store has the newest.
//!
//! Before a session is used its number of turns there is asked for, and what is newer comes here; a turn is in the store when
//! its end is told. While the store is away the copy here is what counts, and the turns that it gets go to the store when that is
//! back. If two proxies have gone on alone with one session, the history with more turns stays, and the later one of two that are
//! as long. One that was ended and made again goes before the old one, however long that was: it is of a later generation.
//!
//! Clocks of proxies differ, so none goes by a time that another one has written: how long a session stays is what the store
//! says, and when a turn ended only tells two copies apart.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Script};
use tokio::task::JoinSet;

use super::clock;
use super::record::{Session, Version};
use super::store::{Append, Ended, Store};
use super::{Error, Visitor};
use crate::state::{Gone, State};

/// Milliseconds that a session stays in the store after its time: its proxies look for it less often.
const GRACE: u64 = 60_000;
/// Milliseconds for which it is known there that a session has ended: proxies that were away have it still.
const KNOWN: u64 = 7 * 24 * 3600 * 1000;
/// Time until a store that has refused something is told again.
const AGAIN: Duration = Duration::from_secs(2);
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

/// What tells a script whether a session of a generation has ended, by its tombstone.
const BURIED: &str = r"
        local function buried(generation)
            local ended = redis.call('GET', KEYS[3])
            return ended ~= false and tonumber(string.match(ended, '^%d+')) >= tonumber(generation)
        end
        ";

/// A script of these parts.
fn script(parts: &[&str]) -> Script {
    Script::new(&parts.concat())
}

/// Puts a turn, if the store has all that was before it and not the turn itself. KEYS: the session, all names, its tombstone.
/// ARGV: the number of the turn, when it ended, the record, how long it stays, its name, the first turn that is kept, the turn,
/// the generation of its session.
static APPEND: LazyLock<Script> = LazyLock::new(|| {
    script(&[
        BURIED,
        r"
        local has = redis.call('HMGET', KEYS[1], 'next', 'gen')
        if has[1] == false then
            if buried(ARGV[8]) then return -2 end
            return -1
        end
        local newer = tonumber(has[2] or 0) - tonumber(ARGV[8])
        if newer > 0 then return -2 end
        if newer < 0 then return -1 end
        if tonumber(has[1]) ~= tonumber(ARGV[1]) then
            if redis.call('HGET', KEYS[1], 't' .. ARGV[1]) == ARGV[7] then return 0 end
            return tonumber(has[1])
        end
        redis.call('HSET', KEYS[1], 'next', ARGV[1] + 1, 'at', ARGV[2], 'session', ARGV[3], 't' .. ARGV[1], ARGV[7])
        local first = tonumber(ARGV[6]) - 1
        while first > 0 and redis.call('HDEL', KEYS[1], 't' .. first) == 1 do first = first - 1 end
        ",
        LISTED,
        "return 0",
    ])
});

/// Puts a whole session, unless the store has a newer one, or knows that it has ended. KEYS as above. ARGV: the number of its
/// next turn, when its last one ended, the record, how long it stays, its name, its generation; then the fields of its turns and
/// what is in them.
static PUT: LazyLock<Script> = LazyLock::new(|| {
    script(&[
        BURIED,
        r"
        local has = redis.call('HMGET', KEYS[1], 'gen', 'next', 'at')
        if has[2] ~= false then
            local newer = tonumber(has[1] or 0) - tonumber(ARGV[6])
            if newer == 0 then newer = tonumber(has[2]) - tonumber(ARGV[1]) end
            if newer == 0 then newer = tonumber(has[3]) - tonumber(ARGV[2]) end
            if newer > 0 then return 0 end
        elseif buried(ARGV[6]) then
            return -2
        end
        redis.call('DEL', KEYS[1], KEYS[3])
        redis.call('HSET', KEYS[1], 'next', ARGV[1], 'at', ARGV[2], 'session', ARGV[3], 'gen', ARGV[6])
        for at = 7, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1]) end
        ",
        LISTED,
        "return 1",
    ])
});

/// Ends a session, unless it was made again. KEYS as above. ARGV: its generation, its birth, for how long that is known, its name.
static END: LazyLock<Script> = LazyLock::new(|| {
    script(&[r"
        local has = redis.call('HMGET', KEYS[1], 'next', 'gen')
        if has[1] ~= false and tonumber(has[2] or 0) > tonumber(ARGV[1]) then return 0 end
        redis.call('DEL', KEYS[1])
        redis.call('ZREM', KEYS[2], ARGV[4])
        redis.call('SET', KEYS[3], ARGV[1] .. ':' .. ARGV[2], 'PX', ARGV[3])
        return 1
        "])
});

/// What is shared.
#[derive(Debug)]
pub(super) struct Shared {
    state: State,
    /// What is written here and there goes one after the other, as far as it is of one session: else what comes from there could
    /// take the place of a turn that is not there yet.
    turns: [Line; LINES],
    hasher: RandomState,
    /// Whether the store has refused something that is here: it may take it later, as when its memory was full.
    owes: AtomicBool,
}

/// Those who write one of some sessions, one after the other.
type Line = tokio::sync::Mutex<()>;

/// The record of a session, if there is one, and how many milliseconds it stays.
type Kept = (Option<Vec<u8>>, i64);

/// What the store has of a version, in its order.
type Fields = (Option<u64>, Option<u64>, Option<u64>);

/// The generation of a session that has ended, and its birth, if that is known.
type Buried = (u64, Option<u64>);

/// What the store has of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    /// A version of it.
    Has(Version),
    /// It has ended.
    Ended(Buried),
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
        Self { state, turns, hasher: RandomState::new(), owes: AtomicBool::new(false) }
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
        // Nobody else knows yet that it has ended.
        if store.has_ended(key) {
            return Ok(());
        }
        let _in_turn = self.line(key).lock().await;
        let here = store.find(key).map(|(session, _)| session);
        match (self.look(key).await?, here) {
            (There::Has(there), here) if here.as_ref().is_none_or(|here| here.version() < there) => {
                self.fetch(store, key).await
            }
            (There::Has(there), Some(here)) if here.version() > there => self.put(store, key).await.map(drop),
            (There::Nothing, Some(_)) => self.put(store, key).await.map(drop),
            (There::Ended(ended), Some(here)) => self.buried(store, &here, ended).await,
            _ => Ok(()),
        }
    }

    /// A session is here, and the store says that one of its name has ended: it, or one before it.
    async fn buried(&self, store: &Store, here: &Session, (generation, birth): Buried) -> Result<(), Gone> {
        let key = here.key();
        let is_it = birth.is_none_or(|birth| birth == here.birth);
        if here.generation < generation || here.generation == generation && is_it {
            // It goes on if it is just being used.
            let _ = store.end(key, false).await;
            return Ok(());
        }
        if here.generation <= generation {
            // It was made by somebody who could not know of the one before.
            let Ok(turns) = store.turns(key.clone()).await else { return Ok(()) };
            let again = Session { generation: generation + 1, ..here.clone() };
            if store.adopt(again, turns).await.is_err() {
                return Ok(());
            }
        }
        self.put(store, &key).await.map(drop)
    }

    /// The generation of a session that is made now.
    pub(super) async fn generation(&self, key: &str) -> u64 {
        match self.look(key).await {
            Ok(There::Ended((generation, _))) => generation + 1,
            _ => 0,
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
        matches!(self.look(key).await, Ok(There::Has(_)))
    }

    /// Adds a turn here and there. If others have added some in the meantime, it comes after those.
    pub(super) async fn append(&self, store: &Store, turn: Append) -> Result<Option<Arc<Session>>, Error> {
        let bytes = serde_json::to_vec(&turn.entries).map_err(|error| Error::Storage(error.to_string()))?;
        let _in_turn = self.line(&turn.key).lock().await;
        let mut stored = store.append(turn.clone()).await?;
        for _ in 0..TRIES {
            let Some(session) = &stored else { return Ok(None) };
            match self.tell(store, session, &bytes).await {
                Ok(Told::Stored) => break,
                // It is told of it when it is back.
                Err(_) => {
                    self.owes.store(true, Ordering::Relaxed);
                    break;
                }
                Ok(Told::Behind) => {}
                Ok(Told::Ended) => {
                    store.end(turn.key.clone(), false).await?;
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
        let (at, stays) = (session.version().2, stays(session, store.now()));
        let answer: i64 = self
            .state
            .ask(async |mut there| {
                let mut script = APPEND.prepare_invoke();
                script.key(&hash).key(&names).key(&tombstone);
                script.arg(number).arg(at).arg(&record).arg(stays).arg(&key).arg(session.first).arg(turn);
                script.arg(session.generation);
                script.invoke_async(&mut there).await
            })
            .await?;
        match answer {
            0 => Ok(Told::Stored),
            -2 => Ok(Told::Ended),
            next if u64::try_from(next).is_ok_and(|next| next > number) => Ok(Told::Behind),
            // It has less than we have: turns that were said while it was away.
            _ => self.put(store, &key).await,
        }
    }

    /// Ends a session there. False if that is away, and has to be told when it is back.
    pub(super) async fn end(&self, session: &Session) -> bool {
        let known = KNOWN.max(session.timeout_ms() + GRACE);
        let is_told = self.say_end(&session.key(), (session.generation, session.birth), known).await.is_ok();
        if !is_told {
            self.owes.store(true, Ordering::Relaxed);
        }
        is_told
    }

    async fn say_end(&self, key: &str, (generation, birth): Ended, known: u64) -> Result<(), Gone> {
        let [hash, names, tombstone] = self.keys(key);
        self.state
            .ask(async |mut there| {
                let mut script = END.prepare_invoke();
                script.key(&hash).key(&names).key(&tombstone);
                script.arg(generation).arg(birth).arg(known).arg(key);
                script.invoke_async(&mut there).await
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
        let ((generation, next, at), ended): (Fields, Option<String>) = self
            .state
            .ask(async |mut there| {
                let mut pipe = redis::pipe();
                pipe.cmd("HMGET").arg(&hash).arg("gen").arg("next").arg("at").get(&tombstone);
                pipe.query_async(&mut there).await
            })
            .await?;
        Ok(match (next, ended) {
            (Some(next), _) => There::Has((generation.unwrap_or(0), next, at.unwrap_or(0))),
            (None, Some(ended)) => There::Ended(read_tombstone(&ended)),
            (None, None) => There::Nothing,
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
    async fn put(&self, store: &Store, key: &str) -> Result<Told, Gone> {
        let Some((session, _)) = store.find(key) else { return Ok(Told::Stored) };
        let Ok(turns) = store.turns(key.to_owned()).await else { return Ok(Told::Stored) };
        let now = store.now();
        if session.has_expired(now) {
            return Ok(Told::Stored);
        }
        let [hash, names, tombstone] = self.keys(key);
        let answer: i64 = self
            .state
            .ask(async |mut there| {
                let mut script = PUT.prepare_invoke();
                script.key(&hash).key(&names).key(&tombstone);
                let (generation, next, at) = session.version();
                script.arg(next).arg(at).arg(record(&session)).arg(stays(&session, now)).arg(key).arg(generation);
                for (number, turn) in &turns {
                    script.arg(format!("t{number}")).arg(turn.as_slice());
                }
                script.invoke_async(&mut there).await
            })
            .await?;
        Ok(if answer == -2 { Told::Ended } else { Told::Stored })
    }

    /// A new session is put there.
    pub(super) async fn created(&self, store: &Store, key: &str) {
        if let Err(gone) = self.put(store, key).await {
            self.owes.store(true, Ordering::Relaxed);
            tracing::debug!(session = key, error = %gone, "a session is here alone for now");
        }
    }

    /// Tells the store, whenever it is there again, of what was done here alone.
    async fn catch_up(&self, store: &Store) -> Result<(), Gone> {
        for (key, ended) in store.ended() {
            self.say_end(&key, ended, KNOWN).await?;
            let _ = store.told(key).await;
        }
        let mut after = String::new();
        loop {
            let page = store.list(|_| true, &after, 100);
            for (session, _) in &page.sessions {
                let _in_turn = self.line(&session.key()).lock().await;
                match self.look(&session.key()).await? {
                    There::Has(there) if session.version() <= there => {}
                    There::Ended(ended) => self.buried(store, session, ended).await?,
                    _ => drop(self.put(store, &session.key()).await?),
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
            {
                shared.owes.store(false, Ordering::Relaxed);
                if let Err(gone) = shared.catch_up(store).await {
                    shared.owes.store(true, Ordering::Relaxed);
                    tracing::debug!(error = %gone, "the store does not take all that it is told of sessions");
                }
            }
            loop {
                tokio::select! {
                    changed = up.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    () = tokio::time::sleep(AGAIN) => {
                        if *up.borrow() && shared.owes.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                }
            }
        }
    });
    tasks
}

/// What a tombstone says. Earlier versions wrote no more than that there was one.
fn read_tombstone(text: &str) -> Buried {
    let (generation, birth) = text.split_once(':').unwrap_or((text, ""));
    (generation.parse().unwrap_or(0), birth.parse().ok())
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
