//! Where sessions lie: one file of transactions, and an index of it in memory.
//!
//! One thread writes. What waits for it goes into one transaction, which is on the disk when it is told to be done: a kill
//! at any moment leaves either all of a turn or nothing of it. Histories are read beside that, from the last transaction.
//! The index is changed only when the disk has been; it is in parts, so that who asks for one session waits for few others.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use olol_middleware::instruments;
use redb::{Database, ReadableTable, Table, TableDefinition, TableError, WriteTransaction};
use tokio::sync::oneshot;

use super::clock::Clock;
use super::record::{Entry, Page, Session};
use super::{Config, Error};
use crate::files;

/// Sessions by their names, as JSON.
const SESSIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sessions");
/// Their turns, as lists of messages in JSON.
const TURNS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("turns");
/// The sessions that have ended and of which the store of several proxies is not told yet: generation and birth.
const ENDED: TableDefinition<'_, &str, (u64, u64)> = TableDefinition::new("ended");
/// The most of them; of more the end is forgotten.
const MOST_ENDED: usize = 10_000;
/// What is known of the file itself.
const ABOUT: TableDefinition<'_, &str, u64> = TableDefinition::new("about");
/// The version of what is in the tables.
const VERSION: u64 = 1;
/// Memory for pages of the file, bytes.
const CACHE: usize = 16 << 20;
/// Orders that may wait for the thread that writes.
const WAITING: usize = 1024;
/// The most orders that are done in one transaction.
const TOGETHER: usize = 256;
/// Time between two looks for sessions whose time is over.
const SWEEP: Duration = Duration::from_secs(30);
/// Parts of the index.
const PARTS: usize = 16;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    sessions: u64,
    bytes: u64,
    messages: u64,
}

impl Bounds {
    pub(super) fn of(config: &Config) -> Self {
        Self { sessions: config.max_sessions.get(), bytes: config.max_bytes.get(), messages: config.max_messages.get() }
    }
}

/// A file of sessions that is open.
#[derive(Debug)]
pub(super) struct Store {
    /// `None` only while it is dropped.
    orders: Option<SyncSender<Order>>,
    writer: Option<JoinHandle<()>>,
    file: Arc<Opened>,
    index: Arc<Index>,
    bounds: Bounds,
    clock: Arc<Clock>,
}

/// Something to be written, and where to say that it is.
#[derive(Debug)]
enum Order {
    Create(Box<Session>, Vec<Entry>, oneshot::Sender<Result<(Arc<Session>, bool), Error>>),
    Append(Box<Append>, oneshot::Sender<Result<Option<Arc<Session>>, Error>>),
    /// The flag: whether others are still to be told.
    End(String, bool, oneshot::Sender<Result<Option<u64>, Error>>),
    /// They were.
    Told(String, oneshot::Sender<Result<(), Error>>),
    Adopt(Box<Session>, Vec<Numbered>, oneshot::Sender<Result<(), Error>>),
}

/// A turn with its number, as it is written.
pub(super) type Numbered = (u64, Vec<u8>);

/// The generation of a session that has ended, and its birth.
pub(super) type Ended = (u64, u64);

/// A turn that is over.
#[derive(Clone, Debug)]
pub(super) struct Append {
    /// The name of its session.
    pub(super) key: String,
    /// Its messages.
    pub(super) entries: Vec<Entry>,
    /// The server that answered; empty: not known.
    pub(super) server: String,
}

impl Store {
    /// Opens a file, or makes it with its folder.
    pub(super) fn open(path: &Path, bounds: Bounds) -> Result<Self, Error> {
        let path = path.to_owned();
        Self::over(Box::new(move || open_file(&path)), bounds, SWEEP)
    }

    /// A store over whatever is opened so, which looks so often for sessions whose time is over.
    fn over(open: Open, bounds: Bounds, every: Duration) -> Result<Self, Error> {
        let clock = Arc::new(Clock::new());
        let file = Arc::new(Opened { database: RwLock::new(Some(open()?)), open });
        let mut book = file.with(Book::read).map_err(|error| broken(&error))?;
        let index = Arc::new(Index::default());
        index.fill(&book);
        let (orders, waiting) = sync_channel(WAITING);
        let mut writer =
            Writer { file: file.clone(), index: index.clone(), bounds, clock: clock.clone(), changes: Vec::new() };
        let work = move || {
            writer.sweep(&mut book);
            writer.write(&waiting, &mut book, every);
        };
        let named = std::thread::Builder::new().name("sessions".to_owned());
        let writer = named.spawn(work).map_err(|error| Error::Storage(error.to_string()))?;
        Ok(Self { orders: Some(orders), writer: Some(writer), file, index, bounds, clock })
    }

    /// Milliseconds since 1970, by the clock that all times of sessions here are of.
    pub(super) fn now(&self) -> u64 {
        self.clock.now()
    }

    /// How many sessions there are, and the bytes of their histories.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.index.sessions.load(Ordering::Relaxed), self.index.bytes.load(Ordering::Relaxed))
    }

    /// A session, and what tells whether it is in the midst of a turn.
    pub(super) fn find(&self, key: &str) -> Option<(Arc<Session>, Running)> {
        let part = self.index.part(key).read().unwrap_or_else(PoisonError::into_inner);
        part.get(key).cloned()
    }

    /// Some of the sessions, in the order of their names.
    pub(super) fn list(&self, wanted: impl Fn(&Session) -> bool, after: &str, limit: usize) -> Page {
        let mut found: Vec<(String, (Arc<Session>, bool))> = Vec::new();
        for part in &self.index.parts {
            let part = part.read().unwrap_or_else(PoisonError::into_inner);
            let fit = part.iter().filter(|(key, (session, _))| key.as_str() > after && wanted(session));
            found.extend(fit.map(|(key, (session, running))| (key.clone(), (session.clone(), running.is_busy()))));
        }
        found.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let next = found.get(limit).and_then(|_| Some(found.get(limit.checked_sub(1)?)?.0.clone()));
        found.truncate(limit);
        Page { sessions: found.into_iter().map(|(_, session)| session).collect(), next }
    }

    /// All that a session remembers, oldest first.
    pub(super) async fn history(&self, key: String) -> Result<Vec<Entry>, Error> {
        let file = self.file.clone();
        let read = move || file.with(|database| read_history(database, &key)).map_err(|error| broken(&error));
        let reading = tokio::task::spawn_blocking(read);
        reading.await.map_err(|error| Error::Storage(error.to_string()))?
    }

    /// Makes a session, or finds the one of that name.
    pub(super) async fn create(&self, session: Session, entries: Vec<Entry>) -> Result<(Arc<Session>, bool), Error> {
        self.fits(&entries, true)?;
        self.order(|told| Order::Create(Box::new(session), entries, told)).await
    }

    /// Adds a turn; `None` if its session has ended meanwhile. On the disk when this returns.
    pub(super) async fn append(&self, turn: Append) -> Result<Option<Arc<Session>>, Error> {
        self.fits(&turn.entries, false)?;
        self.order(|told| Order::Append(Box::new(turn), told)).await
    }

    /// Ends a session; the turns that it had. If others are still to be told, that is kept with it.
    pub(super) async fn end(&self, key: String, is_untold: bool) -> Result<Option<u64>, Error> {
        self.order(|told| Order::End(key, is_untold, told)).await
    }

    /// The sessions that have ended and of which others are still to be told.
    pub(super) fn ended(&self) -> HashMap<String, Ended> {
        self.index.ended.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a session is one of those.
    pub(super) fn has_ended(&self, key: &str) -> bool {
        self.index.ended.read().unwrap_or_else(PoisonError::into_inner).contains_key(key)
    }

    /// Others were told of the end of a session.
    pub(super) async fn told(&self, key: String) -> Result<(), Error> {
        self.order(|told| Order::Told(key, told)).await
    }

    /// Puts a session of another proxy, whole, in the place of what is here of it.
    pub(super) async fn adopt(&self, session: Session, turns: Vec<Numbered>) -> Result<(), Error> {
        if turns.iter().any(|(_, turn)| decoded(turn).is_err()) {
            return Err(Error::Storage("what the store has of it cannot be read".to_owned()));
        }
        self.order(|told| Order::Adopt(Box::new(session), turns, told)).await
    }

    /// The turns of a session, as they are written.
    pub(super) async fn turns(&self, key: String) -> Result<Vec<Numbered>, Error> {
        let file = self.file.clone();
        let read = move || file.with(|database| read_turns(database, &key)).map_err(|error| broken(&error));
        let reading = tokio::task::spawn_blocking(read);
        reading.await.map_err(|error| Error::Storage(error.to_string()))?
    }

    /// Whether messages are not more than may be kept at all.
    fn fits(&self, entries: &[Entry], is_beginning: bool) -> Result<(), Error> {
        let bytes = encoded(entries).map_err(|error| broken(&error))?.len() as u64;
        if bytes > self.bounds.bytes {
            let most = self.bounds.bytes;
            return Err(Error::TooLarge(format!("{bytes} bytes are more than [sessions] max-bytes allows ({most})")));
        }
        if is_beginning && entries.len() as u64 > self.bounds.messages {
            let (count, most) = (entries.len(), self.bounds.messages);
            return Err(Error::TooLarge(format!("{count} messages are more than [sessions] max-messages ({most})")));
        }
        Ok(())
    }

    async fn order<T>(&self, order: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Order) -> Result<T, Error> {
        let gone = || Error::Storage("the file of sessions cannot be written: the log says why".to_owned());
        let (tell, told) = oneshot::channel();
        match self.orders.as_ref().ok_or_else(gone)?.try_send(order(tell)) {
            Ok(()) => told.await.map_err(|_| gone())?,
            Err(TrySendError::Full(_)) => {
                Err(Error::Storage("the disk is too slow for the sessions that are to be written".to_owned()))
            }
            Err(TrySendError::Disconnected(_)) => Err(gone()),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Opens the file.
type Open = Box<dyn Fn() -> Result<Database, Error> + Send + Sync>;

/// The file while it can be used. After a disk has failed once it must be opened anew.
struct Opened {
    database: RwLock<Option<Database>>,
    open: Open,
}

impl Opened {
    /// Does something with the file. Not for threads that tasks run on.
    fn with<T>(&self, does: impl FnOnce(&Database) -> Result<T, Broken>) -> Result<T, Broken> {
        match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => does(database),
            None => Err(redb::Error::PreviousIo.into()),
        }
    }

    /// Closes the file and opens it again: what was not committed is forgotten.
    fn reopen(&self) -> Result<(), Error> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // It is one owner's, and that includes us.
        *database = None;
        *database = Some((self.open)()?);
        Ok(())
    }
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").finish_non_exhaustive()
    }
}

fn open_file(path: &Path) -> Result<Database, Error> {
    let told = |what: String| Error::Storage(format!("sessions cannot be kept in {}: {what}", path.display()));
    let file = private_file(path).map_err(|error| told(error.to_string()))?;
    builder().create_file(file).map_err(|error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => {
            told("another process has it open; give each its own [sessions] dir".to_owned())
        }
        other => told(format!("{other}; move the file away to begin anew")),
    })
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE).create_with_file_format_v3(true);
    builder
}

/// The file of histories is its user's alone, and its name is on the disk before anything is in it.
fn private_file(path: &Path) -> std::io::Result<std::fs::File> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let folder = files::folder_of(path);
    files::make_private(folder)?;
    let file = options.open(path)?;
    files::sync(folder)?;
    Ok(file)
}

/// What is wrong with the file; boxed, since it is large.
#[derive(Debug)]
struct Broken(Box<redb::Error>);

impl<E: Into<redb::Error>> From<E> for Broken {
    fn from(error: E) -> Self {
        Self(Box::new(error.into()))
    }
}

impl Broken {
    fn malformed(what: impl Into<Box<dyn std::error::Error>>) -> Self {
        Self(Box::new(redb::Error::Corrupted(what.into().to_string())))
    }
}

fn broken(error: &Broken) -> Error {
    Error::Storage(format!("the file of sessions cannot be used: {}", error.0))
}

fn encoded<T: serde::Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, Broken> {
    serde_json::to_vec(value).map_err(Broken::malformed)
}

fn decoded(bytes: &[u8]) -> Result<Vec<Entry>, Broken> {
    serde_json::from_slice(bytes).map_err(Broken::malformed)
}

fn read_history(database: &Database, key: &str) -> Result<Vec<Entry>, Broken> {
    let turns = match database.begin_read()?.open_table(TURNS) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        turns => turns?,
    };
    let mut entries = Vec::new();
    for turn in turns.range((key, 0)..=(key, u64::MAX))? {
        entries.extend(decoded(turn?.1.value())?);
    }
    Ok(entries)
}

fn read_turns(database: &Database, key: &str) -> Result<Vec<Numbered>, Broken> {
    let turns = match database.begin_read()?.open_table(TURNS) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        turns => turns?,
    };
    let mut found = Vec::new();
    for turn in turns.range((key, 0)..=(key, u64::MAX))? {
        let (at, bytes) = turn?;
        found.push((at.value().1, bytes.value().to_vec()));
    }
    Ok(found)
}

/// Counts the turns that a session is in the midst of.
#[derive(Clone, Debug, Default)]
pub(super) struct Running(Arc<AtomicU32>);

impl Running {
    pub(super) fn is_busy(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Counts until it is dropped.
    pub(super) fn begin(&self) -> Busy {
        self.0.fetch_add(1, Ordering::Relaxed);
        Busy(self.0.clone())
    }
}

/// One turn that a session is in the midst of.
#[derive(Debug)]
pub(super) struct Busy(Arc<AtomicU32>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

type Part = RwLock<HashMap<String, (Arc<Session>, Running)>>;

/// The sessions in memory, for whoever asks.
#[derive(Debug, Default)]
struct Index {
    parts: [Part; PARTS],
    ended: RwLock<HashMap<String, Ended>>,
    hasher: RandomState,
    sessions: AtomicU64,
    bytes: AtomicU64,
}

impl Index {
    fn part(&self, key: &str) -> &Part {
        let hash = usize::try_from(self.hasher.hash_one(key) % PARTS as u64).unwrap_or(0);
        &self.parts[hash]
    }

    fn fill(&self, book: &Book) {
        for session in book.sessions.values() {
            self.change(&session.key(), Some(session.clone()));
        }
        self.count(book);
    }

    fn change(&self, key: &str, session: Option<Arc<Session>>) {
        let mut part = self.part(key).write().unwrap_or_else(PoisonError::into_inner);
        match session {
            None => drop(part.remove(key)),
            Some(session) => match part.get_mut(key) {
                Some(known) => known.0 = session,
                None => drop(part.insert(key.to_owned(), (session, Running::default()))),
            },
        }
    }

    fn is_busy(&self, key: &str) -> bool {
        let part = self.part(key).read().unwrap_or_else(PoisonError::into_inner);
        part.get(key).is_some_and(|(_, running)| running.is_busy())
    }

    fn count(&self, book: &Book) {
        // Mostly there are none, before and after.
        if !book.ended.is_empty() || !self.ended.read().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.ended.write().unwrap_or_else(PoisonError::into_inner).clone_from(&book.ended);
        }
        self.sessions.store(book.sessions.len() as u64, Ordering::Relaxed);
        self.bytes.store(book.bytes, Ordering::Relaxed);
    }
}

/// The sessions of one key.
#[derive(Debug, Default)]
struct Owned {
    /// In the order in which they leave.
    order: BTreeSet<(u64, String)>,
    bytes: u64,
}

/// What the writer knows of all sessions: what is on the disk, and what the transaction that it is at will make of it.
#[derive(Debug, Default)]
struct Book {
    sessions: HashMap<String, Arc<Session>>,
    /// The same by whose they are.
    owners: HashMap<String, Owned>,
    bytes: u64,
    ended: HashMap<String, Ended>,
}

impl Book {
    /// Reads the file, and makes its tables if it is new.
    fn read(database: &Database) -> Result<Self, Broken> {
        let transaction = database.begin_write()?;
        let mut book = Self::default();
        {
            let mut about = transaction.open_table(ABOUT)?;
            let version = about.get("version")?.map(|version| version.value());
            if version.is_some_and(|version| version > VERSION) {
                return Err(Broken::malformed("a newer version of OLOL has written it"));
            }
            about.insert("version", VERSION)?;
            transaction.open_table(TURNS)?;
            for ended in transaction.open_table(ENDED)?.iter()? {
                let (key, ended) = ended?;
                book.ended.insert(key.value().to_owned(), ended.value());
            }
            for session in transaction.open_table(SESSIONS)?.iter()? {
                let (key, session) = session?;
                let session: Session = serde_json::from_slice(session.value())
                    .map_err(|error| Broken::malformed(format!("{}: {error}", key.value())))?;
                book.put(Arc::new(session));
            }
        }
        transaction.commit()?;
        Ok(book)
    }

    fn put(&mut self, session: Arc<Session>) {
        let key = session.key();
        self.take(&key);
        self.bytes += session.bytes;
        let owned = self.owners.entry(session.owner.clone()).or_default();
        owned.bytes += session.bytes;
        owned.order.insert((session.last_active, key.clone()));
        self.sessions.insert(key, session);
    }

    fn take(&mut self, key: &str) -> Option<Arc<Session>> {
        let session = self.sessions.remove(key)?;
        self.bytes -= session.bytes;
        if let Some(owned) = self.owners.get_mut(&session.owner) {
            owned.bytes -= session.bytes;
            owned.order.remove(&(session.last_active, key.to_owned()));
            if owned.order.is_empty() {
                self.owners.remove(&session.owner);
            }
        }
        Some(session)
    }

    /// The session that makes room: of the key that has the most, the one that was idle for longest. So nobody's sessions leave
    /// since somebody else makes many. `may`: whether one may leave at all.
    fn leaves(&self, is_by_bytes: bool, may: impl Fn(&str) -> bool) -> Option<String> {
        let most = |owned: &Owned| if is_by_bytes { owned.bytes } else { owned.order.len() as u64 };
        let fullness = |owned: &&Owned| (most(owned), std::cmp::Reverse(owned.order.first().cloned()));
        let fullest = self.owners.values().max_by_key(fullness);
        let all = fullest.into_iter().chain(self.owners.values());
        all.flat_map(|owned| owned.order.iter()).map(|(_, key)| key).find(|key| may(key)).cloned()
    }
}

/// Writes all sessions with their times moved, and returns them.
fn move_all(database: &Database, by: i64, book: &Book) -> Result<Vec<Arc<Session>>, Broken> {
    let moved: Vec<_> = book.sessions.values().map(|session| Arc::new(Session::clone(session).by_clock(by))).collect();
    let transaction = database.begin_write()?;
    let mut tables = Tables::of(&transaction)?;
    for session in &moved {
        tables.sessions.insert(session.key().as_str(), encoded(&**session)?.as_slice())?;
    }
    drop(tables);
    transaction.commit()?;
    Ok(moved)
}

/// The thread that writes.
struct Writer {
    file: Arc<Opened>,
    index: Arc<Index>,
    bounds: Bounds,
    clock: Arc<Clock>,
    /// The names of the sessions that the transaction changes.
    changes: Vec<String>,
}

/// Says how an order went, once that is on the disk.
type Told = Box<dyn FnOnce(Result<(), Error>)>;

/// The tables of a transaction.
struct Tables<'t> {
    sessions: Table<'t, &'static str, &'static [u8]>,
    turns: Table<'t, (&'static str, u64), &'static [u8]>,
    ended: Table<'t, &'static str, (u64, u64)>,
}

impl<'t> Tables<'t> {
    fn of(transaction: &'t WriteTransaction) -> Result<Self, Broken> {
        Ok(Self {
            sessions: transaction.open_table(SESSIONS)?,
            turns: transaction.open_table(TURNS)?,
            ended: transaction.open_table(ENDED)?,
        })
    }
}

impl Writer {
    fn write(&mut self, waiting: &Receiver<Order>, book: &mut Book, every: Duration) {
        let mut swept = self.clock.age();
        loop {
            let first = match waiting.recv_timeout((swept + every).saturating_sub(self.clock.age())) {
                Ok(order) => Some(order),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            self.follow_clock(book);
            if let Some(first) = first {
                let orders: Vec<Order> = std::iter::once(first).chain(waiting.try_iter().take(TOGETHER - 1)).collect();
                self.carry_out(orders, book);
            }
            // Also where orders never end.
            if self.clock.age() >= swept + every {
                self.sweep(book);
                swept = self.clock.age();
            }
        }
    }

    /// Moves the times of all sessions by as much as the time of day was set, if it was: nobody grows old or young by that.
    fn follow_clock(&self, book: &mut Book) {
        let by = self.clock.jump();
        if by == 0 {
            return;
        }
        tracing::warn!(seconds = by / 1000, "the time of day was set: the times of sessions are moved by as much");
        let file = self.file.clone();
        let moved = match file.with(|database| move_all(database, by, book)) {
            Ok(moved) => moved,
            // It is tried again the next time.
            Err(error) => {
                tracing::error!(error = %error.0, "the times of sessions could not be moved");
                return;
            }
        };
        // Whoever looks in between sees them used just now, and not long ago.
        if by < 0 {
            self.clock.follow(by);
        }
        for session in moved {
            self.index.change(&session.key(), Some(session.clone()));
            book.put(session);
        }
        if by > 0 {
            self.clock.follow(by);
        }
    }

    /// Removes the sessions whose time is over.
    fn sweep(&mut self, book: &mut Book) {
        let now = self.clock.now();
        if book.sessions.values().any(|session| session.has_expired(now)) {
            self.carry_out(Vec::new(), book);
        }
    }

    /// Carries out some orders in one transaction: all of them, or none.
    fn carry_out(&mut self, orders: Vec<Order>, book: &mut Book) {
        let mut tell: Vec<Told> = Vec::new();
        let file = self.file.clone();
        let result = file.with(|database| self.transact(database, orders, book, &mut tell));
        let changes = std::mem::take(&mut self.changes);
        if let Err(error) = &result {
            tracing::error!(error = %error.0, "what sessions said is not kept");
            // What the transaction would have made is not so.
            match self.file.reopen().and_then(|()| self.file.with(Book::read).map_err(|error| broken(&error))) {
                Ok(read) => *book = read,
                Err(error) => tracing::error!(%error, "the file of sessions cannot be opened again yet"),
            }
        }
        for key in changes {
            self.index.change(&key, book.sessions.get(&key).cloned());
        }
        self.index.count(book);
        let result = result.map_err(|error| broken(&error));
        for tell in tell {
            tell(result.clone());
        }
    }

    fn transact(
        &mut self,
        database: &Database,
        orders: Vec<Order>,
        book: &mut Book,
        tell: &mut Vec<Told>,
    ) -> Result<(), Broken> {
        let transaction = database.begin_write()?;
        let mut tables = Tables::of(&transaction)?;
        let mut kept: Vec<String> = Vec::new();
        for order in orders {
            match order {
                Order::Create(session, entries, told) => {
                    let key = session.key();
                    let made = self.create(*session, &entries, &mut tables, book)?;
                    kept.push(key);
                    tell.push(Box::new(|done| drop(told.send(done.map(|()| made)))));
                }
                Order::Append(turn, told) => {
                    let appended = self.append(&turn, &mut tables, book)?;
                    kept.push(turn.key);
                    tell.push(Box::new(|done| drop(told.send(done.map(|()| appended)))));
                }
                Order::Adopt(session, turns, told) => {
                    let key = session.key();
                    self.adopt(*session, &turns, &mut tables, book)?;
                    kept.push(key);
                    tell.push(Box::new(|done| drop(told.send(done))));
                }
                Order::End(key, is_untold, told) => {
                    let ended =
                        book.sessions.get(&key).map(|session| (session.turns, (session.generation, session.birth)));
                    self.remove(&key, &mut tables, book)?;
                    if let Some((_, ended)) = ended.filter(|_| is_untold && book.ended.len() < MOST_ENDED) {
                        tables.ended.insert(key.as_str(), ended)?;
                        book.ended.insert(key, ended);
                    }
                    tell.push(Box::new(move |done| drop(told.send(done.map(|()| ended.map(|(turns, _)| turns))))));
                }
                Order::Told(key, told) => {
                    tables.ended.remove(key.as_str())?;
                    book.ended.remove(&key);
                    tell.push(Box::new(move |done| drop(told.send(done))));
                }
            }
        }
        if kept.is_empty() {
            self.expire(&mut tables, book)?;
        }
        self.evict(&kept, &mut tables, book)?;
        drop(tables);
        transaction.commit()?;
        Ok(())
    }

    fn create(
        &mut self,
        mut session: Session,
        entries: &[Entry],
        tables: &mut Tables<'_>,
        book: &mut Book,
    ) -> Result<(Arc<Session>, bool), Broken> {
        let key = session.key();
        if let Some(known) = book.sessions.get(&key) {
            if self.index.is_busy(&key) || !known.has_expired(self.clock.now()) {
                return Ok((known.clone(), false));
            }
            session.generation = session.generation.max(known.generation + 1);
            self.remove(&key, tables, book)?;
        }
        if let Some((generation, _)) = book.ended.remove(&key) {
            tables.ended.remove(key.as_str())?;
            session.generation = session.generation.max(generation + 1);
        }
        if !entries.is_empty() {
            let bytes = encoded(entries)?;
            session.messages = entries.len() as u64;
            session.bytes = bytes.len() as u64;
            tables.turns.insert((key.as_str(), 0), bytes.as_slice())?;
        }
        Ok((self.put(session, tables, book)?, true))
    }

    fn append(
        &mut self,
        turn: &Append,
        tables: &mut Tables<'_>,
        book: &mut Book,
    ) -> Result<Option<Arc<Session>>, Broken> {
        let Some(known) = book.sessions.get(&turn.key) else { return Ok(None) };
        let mut session = Session::clone(known);
        let bytes = encoded(&turn.entries)?;
        tables.turns.insert((turn.key.as_str(), session.next), bytes.as_slice())?;
        session.next += 1;
        session.turns += 1;
        session.messages += turn.entries.len() as u64;
        session.bytes += bytes.len() as u64;
        let now = self.clock.now();
        session.stamp = now.max(session.version().2);
        session.last_active = now.max(session.last_active);
        if !turn.server.is_empty() {
            let has_moved = !session.server_host.is_empty() && session.server_host != turn.server;
            let before = std::mem::replace(&mut session.server_host, turn.server.clone());
            session.moved_from = if has_moved { before } else { String::new() };
        }
        self.shorten(&mut session, tables)?;
        self.put(session, tables, book).map(Some)
    }

    /// Puts a session as another proxy has it in the place of what is here.
    fn adopt(
        &mut self,
        mut session: Session,
        turns: &[Numbered],
        tables: &mut Tables<'_>,
        book: &mut Book,
    ) -> Result<(), Broken> {
        let key = session.key();
        self.remove(&key, tables, book)?;
        (session.messages, session.bytes) = (0, 0);
        for (number, turn) in turns.iter().filter(|(number, _)| *number < session.next) {
            tables.turns.insert((key.as_str(), *number), turn.as_slice())?;
            session.messages += decoded(turn)?.len() as u64;
            session.bytes += turn.len() as u64;
        }
        self.shorten(&mut session, tables)?;
        self.put(session, tables, book).map(drop)
    }

    /// Forgets the first turns of a session that is too long: never its last, nor what came before all turns.
    fn shorten(&self, session: &mut Session, tables: &mut Tables<'_>) -> Result<(), Broken> {
        let key = session.key();
        let is_long = |session: &Session| session.messages > self.bounds.messages || session.bytes > self.bounds.bytes;
        while is_long(session) && session.first + 1 < session.next {
            if let Some(turn) = tables.turns.remove((key.as_str(), session.first))? {
                session.bytes -= turn.value().len() as u64;
                session.messages -= decoded(turn.value())?.len() as u64;
            }
            session.first += 1;
        }
        Ok(())
    }

    fn put(&mut self, session: Session, tables: &mut Tables<'_>, book: &mut Book) -> Result<Arc<Session>, Broken> {
        let (key, bytes) = (session.key(), encoded(&session)?);
        tables.sessions.insert(key.as_str(), bytes.as_slice())?;
        let session = Arc::new(session);
        book.put(session.clone());
        self.changes.push(key);
        Ok(session)
    }

    fn remove(&mut self, key: &str, tables: &mut Tables<'_>, book: &mut Book) -> Result<(), Broken> {
        if book.take(key).is_some() {
            tables.sessions.remove(key)?;
            tables.turns.retain_in((key, 0)..=(key, u64::MAX), |_, _| false)?;
            self.changes.push(key.to_owned());
        }
        Ok(())
    }

    /// Removes the sessions whose time is over.
    fn expire(&mut self, tables: &mut Tables<'_>, book: &mut Book) -> Result<(), Broken> {
        let now = self.clock.now();
        let expired =
            book.sessions.iter().filter(|(key, session)| session.has_expired(now) && !self.index.is_busy(key));
        let expired: Vec<String> = expired.map(|(key, _)| key.clone()).collect();
        for key in expired {
            self.remove(&key, tables, book)?;
            instruments::session_evicted("expired");
        }
        Ok(())
    }

    /// Removes the sessions that were idle for longest while there are too many, of those who have the most: none that is in
    /// the midst of a turn, and none of those that were just written.
    fn evict(&mut self, kept: &[String], tables: &mut Tables<'_>, book: &mut Book) -> Result<(), Broken> {
        loop {
            let why = match () {
                () if book.sessions.len() as u64 > self.bounds.sessions => "sessions",
                () if book.bytes > self.bounds.bytes => "bytes",
                () => return Ok(()),
            };
            let may = |key: &str| !self.index.is_busy(key) && !kept.iter().any(|kept| kept == key);
            let Some(key) = book.leaves(why == "bytes", may) else { return Ok(()) };
            self.remove(&key, tables, book)?;
            instruments::session_evicted(why);
        }
    }
}

#[cfg(test)]
mod tests;
