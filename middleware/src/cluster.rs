//! What is known of the servers: an immutable snapshot that calls read, and those who keep it true.
//!
//! Topology and load are two things. Models and states change seldom and are rebuilt into a new snapshot, at most 20 times
//! a second; what a server is doing right now is a handful of atomics beside it. Reading takes no lock.

mod candidates;
mod found;
mod held;
mod member;
mod said;
mod servers;
#[cfg(test)]
mod tests;

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rapidhash::RapidHashMap;
use smallvec::SmallVec;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::affinity::{Share, Table, Turn};
use crate::circuit::Circuits;
use crate::instruments::{ModelMeters, ServerMeters};
use crate::judge::{self, Record, Verdict};
use crate::names::{ModelName, ServerId};
use crate::place::LoadOptions;
use crate::runner::Runners;
use crate::slots::Load;
use crate::vitals::{self, Vitals};

use found::{Finding, Found};

pub use candidates::{Bits, Candidates};
pub use held::{Held, Kept};
pub use member::{Condition, Full, Member, Source, State};
pub use said::{Loaded, Model, Report};
pub use servers::{Iter, Servers};

/// Shortest time between two snapshots.
const REBUILD_PAUSE: Duration = Duration::from_millis(50);
/// The same where nothing has changed that decides anything.
const REBUILD_LATER: Duration = Duration::from_secs(1);

/// The most servers that a process ever knows: each keeps its place, also when it has left.
pub const MOST_SERVERS: usize = 8192;

/// A server, as it was when the snapshot was made, and its live figures.
#[derive(Debug)]
pub struct Server {
    /// Its name.
    pub id: ServerId,
    /// Its place in [`Snapshot::servers`].
    pub index: usize,
    /// How much more it gets than a server of weight one.
    pub weight: NonZeroU32,
    /// Whether it takes calls.
    pub state: State,
    /// Why it is down; empty otherwise.
    pub reason: String,
    /// Since when it is in that state.
    pub since: SystemTime,
    /// The same by the clock that nobody sets: for how long it is.
    pub entered: Instant,
    /// Checks that failed since the last good one, or were silent.
    pub failures: u32,
    /// Since when checks fail, or are silent, if they do.
    pub failing_since: SystemTime,
    /// Whether it finishes what it has, and gets nothing new.
    pub draining: bool,
    /// Since when, if it does.
    pub draining_since: SystemTime,
    /// Whether that is because it has said that it is about to go.
    pub leaving: bool,
    /// Who named it.
    pub source: Source,
    /// What it said last.
    pub report: Arc<Kept>,
    /// Live: what it is doing for us.
    pub load: Arc<Load>,
    /// Live: whether it is left alone, after how the last calls went.
    pub circuits: Arc<Circuits>,
    /// Live: what its calls have made of it.
    pub record: Arc<Record>,
    /// Live: how much of the conversations it has.
    pub share: Arc<Share>,
    /// Its metrics.
    pub meters: Arc<ServerMeters>,
    /// Live: how its machine is.
    pub vitals: Arc<vitals::Live>,
    refresh: Arc<Refresh>,
}

impl Server {
    /// Whether calls should go there while others can take them.
    pub fn is_usable(&self) -> bool {
        self.state != State::Down
            && !self.draining
            && !self.circuits.is_server_open()
            && self.record.verdict() != Verdict::Down
    }

    /// How it is, in one word.
    pub fn condition(&self) -> Condition {
        match self.state {
            _ if self.draining => Condition::Draining,
            State::Down => Condition::Down,
            State::Unknown => Condition::Unknown,
            State::Up if self.record.verdict() == Verdict::Down => Condition::Down,
            State::Up if self.failures > 0 || self.circuits.server_state() != 0 => Condition::Degraded,
            State::Up if self.record.verdict() != Verdict::Well => Condition::Degraded,
            State::Up => Condition::Up,
        }
    }

    /// Since when it is in that condition.
    pub fn condition_since(&self) -> SystemTime {
        match self.condition() {
            Condition::Draining => self.draining_since,
            _ if self.state != State::Up => self.since,
            _ if self.record.verdict() != Verdict::Well => {
                self.record.ruling().map_or(self.since, |ruling| ruling.since)
            }
            Condition::Degraded if self.failures > 0 => self.failing_since,
            Condition::Degraded => self.circuits.server_since().unwrap_or(self.since),
            // It may have been degraded before.
            _ => self.record.ruling().map_or(self.since, |ruling| ruling.since.max(self.since)),
        }
    }

    /// Why it is in that condition; empty if all is well.
    pub fn why(&self) -> String {
        let ruling = || self.record.ruling().map(|ruling| ruling.why.clone()).unwrap_or_default();
        match self.condition() {
            Condition::Draining if self.leaving => "it says that it is about to go".to_owned(),
            Condition::Draining => "an operator drains it".to_owned(),
            _ if self.state != State::Up => self.reason.clone(),
            _ if self.record.verdict() != Verdict::Well => ruling(),
            Condition::Degraded if self.failures > 0 => {
                let last = self.meters.health.last_error();
                last.map(|last| format!("the last check failed: {}", last.reason)).unwrap_or_default()
            }
            Condition::Degraded => "calls to it have failed: it is left alone, or being tried again".to_owned(),
            _ => String::new(),
        }
    }

    /// Whether it answers at all, as far as is known. One whose models fail can still list them.
    pub fn is_reachable(&self) -> bool {
        self.state != State::Down && !self.circuits.is_server_unreachable()
    }
}

/// Where a model is.
#[derive(Debug)]
pub struct Known {
    /// Its canonical name.
    pub name: ModelName,
    /// The servers that have it on disk.
    pub installed: Bits,
    /// Those of them that have it in memory.
    pub loaded: Bits,
    /// Bytes of it on a disk; the most that a server says.
    pub size: u64,
    /// What the servers say it is: one entry, as long as they agree.
    pub makes: SmallVec<[Make; 1]>,
    /// The digests that it has on the servers: one entry, as long as they agree.
    pub variants: SmallVec<[Variant; 1]>,
    /// Its runners on the servers; shared with the other names of the same weights.
    pub runners: Arc<Runners>,
    /// The load options that it names by itself, for calls that name none.
    pub defaults: Option<Arc<LoadOptions>>,
    /// Its metrics.
    pub meters: Arc<ModelMeters>,
}

impl Known {
    /// The digest that is meant by the name: that of most servers; of equals the newest, by what the servers say of it.
    pub fn usual(&self) -> Option<&Variant> {
        let worth = |variant: &&Variant| {
            let held = &variant.held;
            (!held.digest.is_empty(), variant.servers.count(), held.modified_at.clone(), held.digest.clone())
        };
        // Nearly always there is one.
        if self.variants.len() < 2 { self.variants.first() } else { self.variants.iter().max_by_key(worth) }
    }

    /// Whether a server has another model under the name. One that has told no digest yet has what is meant.
    pub fn differs(&self, server: usize) -> bool {
        let other = self.variants.iter().find(|variant| variant.servers.contains(server));
        let (Some(usual), Some(other)) = (self.usual(), other) else { return false };
        !other.digest().is_empty() && other.digest() != usual.digest()
    }
}

/// The servers that have a model with the same digest.
#[derive(Clone, Debug)]
pub struct Variant {
    /// They.
    pub servers: Bits,
    /// As the one lists it that changed it last.
    held: Held,
}

impl Variant {
    /// The digest.
    pub fn digest(&self) -> &str {
        &self.held.digest
    }

    /// The model, as one of them lists it.
    pub fn model(&self) -> &Model {
        &self.held
    }
}

/// What some servers say a model is: those that say it of the same family, size and quantization.
#[derive(Clone, Debug)]
pub struct Make {
    /// Who says so.
    pub servers: Bits,
    held: Held,
}

impl Make {
    /// The model, as one of them lists it.
    pub fn model(&self) -> &Model {
        &self.held
    }

    fn is_of(&self, model: &Held) -> bool {
        self.held.number() == model.number() || self.held.kind() == model.kind()
    }
}

/// Everything that is known at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The servers; a [`Server::index`] is a place among them.
    pub servers: Servers,
    /// The models by canonical name.
    pub models: RapidHashMap<ModelName, Arc<Known>>,
    every: Bits,
    /// Where a server stands in the list.
    places: RapidHashMap<ServerId, usize>,
}

impl Snapshot {
    /// A server by its name.
    pub fn server(&self, id: &ServerId) -> Option<&Arc<Server>> {
        self.servers.get(*self.places.get(id)?)
    }

    /// What is known of a model.
    pub fn known(&self, model: &ModelName) -> Option<&Arc<Known>> {
        self.models.get(model)
    }

    /// The models of which a runner was needed so far. Names of the same weights share their runners, which count once: under
    /// the first of these names.
    pub fn with_runners(&self) -> impl Iterator<Item = &Known> {
        let mut first: RapidHashMap<*const Runners, &Known> = RapidHashMap::default();
        for known in self.models.values().filter(|known| !known.runners.all().is_empty()) {
            let other = first.entry(Arc::as_ptr(&known.runners)).or_insert(known);
            if known.name < other.name {
                *other = known;
            }
        }
        first.into_values()
    }

    /// Every server.
    pub fn all(self: &Arc<Self>) -> Candidates {
        Candidates { bits: self.every.clone(), snapshot: self.clone() }
    }
}

/// Keeps the snapshot: told by the pool what servers say, read by every call.
#[derive(Debug)]
pub struct Cluster {
    snapshot: ArcSwap<Snapshot>,
    book: Mutex<Book>,
    /// Taken after the book, if both are.
    shelf: Mutex<held::Shelf>,
    /// Who has which conversations, where that is remembered.
    conversations: OnceLock<Arc<Table>>,
    /// By which servers are judged.
    rules: Arc<judge::Rules>,
    /// To go on with from a task that must not keep the cluster alive.
    this: Weak<Self>,
}

/// What snapshots are made from.
#[derive(Debug)]
struct Book {
    entries: Vec<Entry>,
    models: found::Before,
    rebuilt: Option<Instant>,
    /// When the next snapshot is due, if one is.
    due: Option<Instant>,
}

impl Book {
    /// The member at a place.
    fn member(&mut self, index: usize) -> Option<&mut Entry> {
        self.entries.get_mut(index).filter(|entry| !entry.has_left)
    }

    /// The member of a name.
    fn named(&mut self, server: &ServerId) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.member.id == *server && !entry.has_left)
    }
}

#[derive(Debug)]
struct Entry {
    member: Member,
    has_left: bool,
    draining: bool,
    /// Whether it has said that it is about to go.
    leaving: bool,
    draining_since: SystemTime,
    state: State,
    reason: String,
    since: SystemTime,
    entered: Instant,
    failures: u32,
    failing_since: SystemTime,
    refresh: Arc<Refresh>,
    report: Arc<Kept>,
    load: Arc<Load>,
    circuits: Arc<Circuits>,
    record: Arc<Record>,
    share: Arc<Share>,
    meters: Arc<ServerMeters>,
    vitals: Arc<vitals::Live>,
    /// What calls have changed there, until a report that was begun later.
    changes: Vec<Change>,
}

/// A model that came to a server, or went, by a call that the server has answered.
#[derive(Debug)]
struct Change {
    at: Instant,
    name: ModelName,
    /// What is there now; `None`: nothing.
    model: Option<Held>,
}

impl Change {
    /// Whether a server tells what there is now.
    fn is_told(&self, report: &Kept) -> bool {
        report.models.iter().any(|held| held.is(&self.name)) == self.model.is_some()
    }

    fn apply(&self, report: &mut Kept) {
        match &self.model {
            // What a server says of a model is better than what is guessed of it.
            Some(_) if report.models.iter().any(|held| held.is(&self.name)) => {}
            Some(model) => Arc::make_mut(&mut report.models).push(model.clone()),
            None => remove(report, &self.name),
        }
    }
}

/// Takes a model out of what a server is said to have.
fn remove(report: &mut Kept, name: &ModelName) {
    if report.models.iter().any(|held| held.is(name)) {
        Arc::make_mut(&mut report.models).retain(|held| !held.is(name));
    }
    report.loaded.retain(|loaded| ModelName::parse(&loaded.name).as_ref() != Some(name));
}

impl Entry {
    /// A member of which nothing is known.
    fn new(member: Member, rules: &Arc<judge::Rules>) -> Self {
        let meters = Arc::new(ServerMeters::new(&member.id));
        let now = SystemTime::now();
        Self {
            record: Arc::new(Record::new(member.id.clone(), rules.clone())),
            circuits: Arc::new(Circuits::new(member.id.clone(), meters.clone())),
            meters,
            changes: Vec::new(),
            member,
            has_left: false,
            draining: false,
            leaving: false,
            state: State::Unknown,
            reason: String::new(),
            since: now,
            entered: Instant::now(),
            draining_since: now,
            failures: 0,
            failing_since: now,
            refresh: Arc::default(),
            report: Arc::default(),
            load: Arc::default(),
            share: Arc::default(),
            vitals: vitals::unknown(),
        }
    }

    fn is_now(&mut self, state: State, reason: String) {
        if self.state != state {
            (self.since, self.entered) = (SystemTime::now(), Instant::now());
        }
        (self.state, self.reason) = (state, reason);
    }

    /// It as it is now, at its place; nobody, if it has left.
    fn server(&self, index: usize) -> Option<Arc<Server>> {
        let server = || Server {
            id: self.member.id.clone(),
            index,
            weight: self.member.weight,
            state: self.state,
            reason: self.reason.clone(),
            since: self.since,
            entered: self.entered,
            failures: self.failures,
            failing_since: self.failing_since,
            draining: self.draining || self.leaving,
            draining_since: self.draining_since,
            leaving: self.leaving,
            source: self.member.source,
            report: self.report.clone(),
            load: self.load.clone(),
            circuits: self.circuits.clone(),
            record: self.record.clone(),
            share: self.share.clone(),
            meters: self.meters.clone(),
            vitals: self.vitals.clone(),
            refresh: self.refresh.clone(),
        };
        (!self.has_left).then(server).map(Arc::new)
    }
}

/// How to ask for news of a server, and to hear that they came.
#[derive(Debug)]
struct Refresh {
    wanted: Notify,
    begun: AtomicU64,
    done: watch::Sender<u64>,
}

impl Default for Refresh {
    fn default() -> Self {
        Self { wanted: Notify::new(), begun: AtomicU64::new(0), done: watch::Sender::new(0) }
    }
}

impl Cluster {
    /// Begins with servers of which nothing is known.
    pub fn new(members: Vec<Member>) -> Arc<Self> {
        let rules = Arc::<judge::Rules>::default();
        let entries = members.into_iter().map(|member| Entry::new(member, &rules)).collect();
        let book = Book { entries, models: found::Before::new(), rebuilt: None, due: None };
        let cluster = Arc::new_cyclic(|this| Self {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            book: Mutex::new(book),
            shelf: Mutex::default(),
            conversations: OnceLock::new(),
            rules,
            this: this.clone(),
        });
        cluster.rebuild(&mut cluster.book());
        cluster
    }

    /// By which rules servers are judged from now on.
    pub fn judge_by(&self, rules: judge::Config) {
        self.rules.store(Arc::new(rules));
    }

    /// What is known now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Servers become members; of one that is there, or was, nothing is known then. Returns their places.
    pub fn join(&self, members: Vec<Member>) -> Vec<Result<usize, Full>> {
        if members.is_empty() {
            return Vec::new();
        }
        let mut book = self.book();
        let known: RapidHashMap<ServerId, usize> =
            book.entries.iter().enumerate().map(|(index, entry)| (entry.member.id.clone(), index)).collect();
        let places = members.into_iter().map(|member| match known.get(&member.id) {
            Some(index) => {
                let entry = &mut book.entries[*index];
                let (meters, load, draining) = (entry.meters.clone(), entry.load.clone(), entry.draining);
                let since = entry.draining_since;
                let fresh = Entry::new(member, &self.rules);
                *entry = Entry { draining, draining_since: since, load, meters, ..fresh };
                Ok(*index)
            }
            None if book.entries.len() >= MOST_SERVERS => Err(Full),
            None => {
                book.entries.push(Entry::new(member, &self.rules));
                Ok(book.entries.len() - 1)
            }
        });
        let places = places.collect();
        // Who brings them in goes on with their places at once.
        self.rebuild(&mut book);
        places
    }

    /// Servers are no members any more: they get nothing new. What they are answering goes on.
    pub fn leave(&self, servers: &[ServerId]) {
        if servers.is_empty() {
            return;
        }
        let mut book = self.book();
        for entry in book.entries.iter_mut().filter(|entry| servers.contains(&entry.member.id)) {
            entry.has_left = true;
            entry.report = Arc::default();
            entry.changes.clear();
        }
        self.rebuild(&mut book);
    }

    /// A server gets more or less from now on.
    pub fn weigh(&self, server: &ServerId, weight: NonZeroU32) {
        let mut book = self.book();
        if let Some(entry) = book.named(server) {
            entry.member.weight = weight;
            self.rebuild(&mut book);
        }
    }

    /// From now on a server finishes what it has and gets nothing new, or takes calls again. Of one that has left it holds
    /// when it comes back. Returns whether it is or was a member.
    pub fn drain(&self, server: &ServerId, draining: bool) -> bool {
        let mut book = self.book();
        let Some(entry) = book.entries.iter_mut().find(|entry| entry.member.id == *server) else { return false };
        if entry.draining != draining {
            entry.draining = draining;
            entry.draining_since = SystemTime::now();
            tracing::info!(%server, draining, "the operator says whether a server takes calls");
            self.rebuild(&mut book);
        }
        true
    }

    /// A server says that it is about to go, and is to get nothing new; or that it is there again.
    pub fn leaving(&self, index: usize, leaving: bool) {
        if self.snapshot.load().servers.get(index).is_none_or(|server| server.leaving == leaving) {
            return;
        }
        let mut book = self.book();
        let Some(entry) = book.member(index) else { return };
        entry.leaving = leaving;
        if leaving {
            entry.draining_since = SystemTime::now();
            tracing::info!(server = %entry.member.id, "a server says that it goes");
        }
        // The next call is not to go there.
        self.rebuild(&mut book);
    }

    /// A server said what it is.
    pub fn report(&self, index: usize, report: Report) {
        self.report_since(index, report, Instant::now());
    }

    /// A server said what it was at some moment after `since`: what calls have changed later still holds.
    pub fn report_since(&self, index: usize, report: Report, since: Instant) {
        let Report { version, models, loaded } = report;
        self.keep_since(index, &Arc::new(Kept { version, models: self.hold(models), loaded }), since);
    }

    /// Models, as they are kept.
    pub fn hold(&self, models: Vec<Model>) -> Arc<Vec<Held>> {
        let mut known = self.shelf();
        // Collected, they would keep the room of what they are made from, which is ten times theirs.
        let mut list = Vec::with_capacity(models.len());
        list.extend(models.into_iter().map(|model| known.hold(model)));
        Arc::new(list)
    }

    /// The same as [`Cluster::report_since`] of what is held already. Costs next to nothing if it is what is known.
    pub fn keep_since(&self, index: usize, kept: &Arc<Kept>, since: Instant) {
        let mut book = self.book();
        let Some(entry) = book.member(index) else { return };
        // Once it tells of a change itself it is believed again: what comes after that somebody has done there.
        entry.changes.retain(|change| change.at >= since && !change.is_told(kept));
        let mut kept = kept.clone();
        for change in &entry.changes {
            change.apply(Arc::make_mut(&mut kept));
        }
        entry.meters.checked(true);
        entry.meters.health.good();
        entry.circuits.seen_well();
        if entry.state == State::Down {
            entry.record.clear();
        }
        entry.record.look();
        let was_well = entry.state == State::Up && entry.failures == 0;
        if was_well && (Arc::ptr_eq(&entry.report, &kept) || *entry.report == *kept) {
            return;
        }
        // Every call puts off when its model goes.
        let pause = if was_well && entry.report.is_alike(&kept) { REBUILD_LATER } else { REBUILD_PAUSE };
        if entry.state != State::Up {
            tracing::info!(server = %entry.member.id, "server is up");
        }
        entry.failures = 0;
        entry.is_now(State::Up, String::new());
        entry.report = kept;
        self.changed_for(book, pause);
    }

    /// A server's agent told how its machine is.
    pub fn tell_vitals(&self, index: usize, vitals: Vitals) {
        if let Some(server) = self.snapshot().servers.get(index) {
            server.vitals.store(Some(Arc::new(vitals)));
        }
    }

    /// Where it is remembered who has which conversations: of use only before anything is told.
    pub(crate) fn remember_in(&self, conversations: Arc<Table>) {
        // A second one would be another proxy's: there is one for a cluster.
        let _ = self.conversations.set(conversations);
    }

    /// A server's agent told of turns that others have sent there, perhaps after its engine has lost all that it had cached.
    pub fn tell_turns(&self, index: usize, forgets: bool, turns: &[Turn]) {
        let snapshot = self.snapshot();
        let (Some(server), Some(table)) = (snapshot.servers.get(index), self.conversations.get()) else { return };
        if forgets {
            table.forget(server);
        }
        for turn in turns {
            table.told(turn, server, snapshot.servers.len());
        }
    }

    /// A check of a server failed; after `threshold` in a row it is down.
    pub fn check_failed(&self, index: usize, reason: String, threshold: u32) {
        let mut book = self.book();
        let Some(entry) = book.member(index) else { return };
        if entry.failures == 0 {
            entry.failing_since = SystemTime::now();
        }
        entry.failures += 1;
        entry.meters.checked(false);
        entry.meters.health.bad(&reason);
        if entry.state == State::Down && entry.reason != reason {
            // Still down, but for another reason now: that is what has to be mended.
            entry.reason = reason;
            return self.changed(book);
        }
        if entry.state == State::Down {
            return;
        }
        if entry.failures >= threshold {
            tracing::warn!(server = %entry.member.id, reason, "server is down");
            entry.leaving = false;
            entry.is_now(State::Down, reason);
        }
        self.changed(book);
    }

    /// A server was seen to have a model in memory, or not any more.
    pub fn note_loaded(&self, server: &ServerId, model: &ModelName, is_loaded: bool) {
        self.amend(server, |report| {
            report.loaded.retain(|loaded| ModelName::parse(&loaded.name).as_ref() != Some(model));
            if is_loaded {
                report.loaded.push(Loaded { name: model.to_string(), ..Loaded::default() });
            }
        });
    }

    /// A server said that it does not have a model that it was believed to have.
    pub fn forget(&self, server: &ServerId, model: &ModelName) {
        self.amend(server, |report| remove(report, model));
    }

    /// A call has brought a model to these servers. Known at once: the next call of the same client may need it.
    pub fn note_installed(&self, servers: &[ServerId], name: &ModelName, like: Option<&ModelName>) {
        self.note(servers, name, |report| {
            let twin = like.and_then(|like| report.models.iter().find(|held| held.is(like)));
            let twin = twin.map(Held::told).unwrap_or_default();
            Some(self.shelf().hold(Model { name: name.to_string(), ..twin }))
        });
    }

    /// A call has removed a model from these servers. Known at once, as with [`Cluster::note_installed`].
    pub fn note_removed(&self, servers: &[ServerId], name: &ModelName) {
        self.note(servers, name, |_| None);
    }

    fn note(&self, servers: &[ServerId], name: &ModelName, model: impl Fn(&Kept) -> Option<Held>) {
        if servers.is_empty() {
            return;
        }
        let mut book = self.book();
        for entry in book.entries.iter_mut().filter(|entry| servers.contains(&entry.member.id)) {
            let change = Change { at: Instant::now(), name: name.clone(), model: model(&entry.report) };
            let mut report = Kept::clone(&entry.report);
            change.apply(&mut report);
            entry.report = Arc::new(report);
            entry.changes.retain(|known| known.name != *name);
            entry.changes.push(change);
        }
        // These are seldom, and cannot wait for the pause between snapshots.
        self.rebuild(&mut book);
    }

    fn amend(&self, server: &ServerId, change: impl FnOnce(&mut Kept)) {
        let mut book = self.book();
        let Some(entry) = book.named(server) else { return };
        let mut report = Kept::clone(&entry.report);
        change(&mut report);
        if report != *entry.report {
            entry.report = Arc::new(report);
            self.changed(book);
        }
    }

    /// Asks for fresh news of one server, without waiting for them.
    pub fn want_news_of(&self, server: &ServerId) {
        let snapshot = self.snapshot();
        if let Some(server) = snapshot.server(server) {
            server.refresh.wanted.notify_one();
        }
    }

    /// Asks for fresh news of every server and waits until those that are up have told them, or the time is over. The
    /// snapshot then shows what they told.
    pub async fn refresh(&self, limit: Duration) {
        self.refresh_those(limit, |_| true).await;
    }

    /// The same of some servers.
    pub async fn refresh_those(&self, limit: Duration, is_meant: impl Fn(&Server) -> bool) {
        let deadline = Instant::now() + limit;
        let snapshot = self.snapshot();
        let waits: Vec<_> = snapshot
            .servers
            .iter()
            .filter(|server| is_meant(server))
            .filter_map(|server| {
                let refresh = &server.refresh;
                let round = refresh.begun.load(Ordering::SeqCst) + 1;
                refresh.wanted.notify_one();
                (server.state != State::Down).then(|| (refresh.done.subscribe(), round))
            })
            .collect();
        for (mut done, round) in waits {
            let _ = tokio::time::timeout_at(deadline, done.wait_for(|done| *done >= round)).await;
        }
        self.catch_up().await;
    }

    /// Waits until the snapshot shows what is in the book.
    pub(crate) async fn catch_up(&self) {
        let due = {
            let book = self.book();
            if book.due.is_none() {
                return;
            }
            book.rebuilt.map(|last| last + REBUILD_PAUSE)
        };
        if let Some(due) = due {
            tokio::time::sleep_until(due).await;
        }
        self.rebuild(&mut self.book());
    }

    /// Waits until somebody wants news of a server.
    pub async fn news_wanted(&self, index: usize) {
        let snapshot = self.snapshot();
        match snapshot.servers.get(index).map(|server| server.refresh.clone()) {
            Some(refresh) => refresh.wanted.notified().await,
            None => std::future::pending().await,
        }
    }

    /// A round of asking a server begins; give what this returns to [`Cluster::round_ends`].
    pub fn round_begins(&self, index: usize) -> u64 {
        let snapshot = self.snapshot();
        snapshot.servers.get(index).map_or(0, |server| server.refresh.begun.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// That round is over, whatever came of it.
    pub fn round_ends(&self, index: usize, round: u64) {
        if let Some(server) = self.snapshot().servers.get(index) {
            server.refresh.done.send_replace(round);
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shelf(&self) -> MutexGuard<'_, held::Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a new snapshot now, or as soon as the pause after the last one is over.
    fn changed(&self, book: MutexGuard<'_, Book>) {
        self.changed_for(book, REBUILD_PAUSE);
    }

    fn changed_for(&self, mut book: MutexGuard<'_, Book>, pause: Duration) {
        let now = Instant::now();
        let due = book.rebuilt.map_or(now, |last| last + pause);
        if book.due.is_some_and(|sooner| sooner <= due) {
            return;
        }
        if due <= now {
            self.rebuild(&mut book);
            return;
        }
        book.due = Some(due);
        let this = self.this.clone();
        tokio::spawn(async move {
            tokio::time::sleep_until(due).await;
            if let Some(cluster) = this.upgrade() {
                let mut book = cluster.book();
                // Somebody who could not wait may have done it in the meantime.
                if book.due.is_some_and(|due| due <= Instant::now()) {
                    cluster.rebuild(&mut book);
                }
            }
        });
    }

    fn rebuild(&self, book: &mut Book) {
        let servers: Servers = book.entries.iter().enumerate().map(|(index, entry)| entry.server(index)).collect();
        let found = Found::on(&servers);
        book.models.retain(|name, (_, runners)| found.has(name) || !runners.line().is_empty());
        let (findings, left) = found.settle(&book.models, &servers);
        let models = findings
            .into_iter()
            .map(|Finding { name, installed, loaded, size, makes, variants, defaults, runners }| {
                let entry = book.models.entry(name.clone());
                let entry = entry.or_insert_with(|| (Arc::new(ModelMeters::new(&name)), runners.clone()));
                entry.1 = runners.clone();
                let meters = entry.0.clone();
                (
                    name.clone(),
                    Arc::new(Known { name, installed, loaded, size, makes, variants, runners, defaults, meters }),
                )
            })
            .collect();
        let every = Bits::of(&servers);
        let places = servers.iter().map(|server| (server.id.clone(), server.index)).collect();
        self.snapshot.store(Arc::new(Snapshot { servers, models, every, places }));
        book.rebuilt = Some(Instant::now());
        book.due = None;
        // Who waits decides anew, now that the servers have changed.
        let all = book.models.values().map(|(_, runners)| runners).chain(&left);
        for runners in all.filter(|runners| !runners.line().is_empty()) {
            runners.line().look_again();
        }
    }
}
