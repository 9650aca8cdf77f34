//! What an agent tells of its Ollama and its machine.
//!
//! An Ollama tells nobody when something changes, and not every call comes through us. So as long as somebody watches, it is
//! asked for what is in its memory many times a second, and answers that are the same are not even read. A question costs it
//! half a millisecond, most of it for waking up; so where its processes are seen from here, it is let sleep as long as no
//! process begins or ends. For what is on its disk the folder of the manifests is watched, where that is on this machine.
//! When a call may have changed something it is asked at once, and in any case every second.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use olol_middleware::cluster::{Loaded, Model};
use olol_middleware::time::unix_ms_now;
use olol_middleware::{Error, ModelName, Payload, Peek, Reply, Route};
use olol_proto::v1::health_check::Status;
use olol_proto::v1::{self, HealthCheck, ServerState};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::calls::{Figures, Pulls, Running};
use super::machine::{Machine, Reading};
use super::processes::{self, Processes};
use super::{folder, machine, runners};
use crate::models::copy::{Disk, Following};
use crate::models::store::Store;
use crate::ollama::{self, Ask, HOP, IN_MEMORY, ON_DISK, Ollama, StateError};
use crate::rpc::{Active, Callers, Told};

/// Time between two looks while nobody watches, and between two readings of the machine.
const EVERY: Duration = Duration::from_secs(1);
/// Time between two looks at what is in memory while somebody watches: a change is to be known within 100 ms.
const OFTEN: Duration = Duration::from_millis(75);
/// Time between two looks whether a process has begun or ended.
const GLANCE: Duration = Duration::from_millis(60);
/// So long after that it is asked as often as if nobody could see its processes: its lists may change a little later.
const STIRRED: Duration = Duration::from_secs(2);
/// Looks at the disk while its manifests are watched, in seconds.
const WATCHED: u32 = 5;
/// Looks at the lists on the disk take no larger share of the time than one in so many, where nobody tells of changes.
const SELDOM: u32 = 100;
/// A look that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(3);
/// How long a look at the memory may take: while a model loads, Ollama does not answer that.
const PATIENCE: Duration = Duration::from_millis(1500);
/// An engine that does not answer has gone when it fails twice and for so long: one failure may be chance.
const GONE_AFTER: Duration = Duration::from_millis(250);

/// Keeps the state.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ollama: Ollama,
    /// Name of this server, for the ids of checks.
    name: String,
    told: watch::Sender<Option<Arc<Told>>>,
    callers: Arc<Callers>,
    active: Arc<Active>,
    figures: Arc<Figures>,
    pulls: Arc<Pulls>,
    /// Whether the agent is about to end.
    leaving: AtomicBool,
    /// Grows when a call may have changed something.
    look: watch::Sender<u64>,
    book: Mutex<Book>,
}

/// What is known.
#[derive(Debug, Default)]
struct Book {
    version: String,
    models: Arc<Vec<v1::Model>>,
    loaded: Arc<Vec<v1::LoadedModel>>,
    generation: u64,
    disk: Probe,
    memory: Probe,
    /// Whether the engine answered when the state was last told.
    online: bool,
    reading: Reading,
    /// The folder of the models, if it is on this machine.
    folder: Option<PathBuf>,
    /// Whether its Ollama has named that folder.
    is_certain: bool,
    /// Whether there are models, and it is not certain that they are in that folder.
    hides_models: bool,
    /// The processes of Ollamas, if this one's would be seen from here.
    servers: Vec<u32>,
}

/// How looks of one kind went.
#[derive(Debug, Default)]
struct Probe {
    /// Looks, so far.
    count: u64,
    error: String,
    failures: u32,
    since: Option<Instant>,
}

impl Probe {
    fn goes(&mut self, result: Result<(), &StateError>) {
        self.count += 1;
        match result {
            Ok(()) => *self = Self { count: self.count, ..Self::default() },
            Err(error) => {
                self.error = error.to_string();
                self.failures += 1;
                self.since.get_or_insert_with(Instant::now);
            }
        }
    }

    fn is_lost(&self) -> bool {
        self.failures >= 2 && self.since.is_some_and(|since| since.elapsed() >= GONE_AFTER)
    }

    /// Whether it has ever gone well: what fails from the beginning is not there.
    fn is_well(&self) -> bool {
        !self.is_lost() && self.count > u64::from(self.failures)
    }
}

impl Watch {
    /// Starts to look, until the set of tasks is dropped.
    pub(super) fn start(ollama: Ollama, tasks: &mut JoinSet<()>) -> Self {
        let shared = Arc::new(Shared {
            name: ollama.id().to_string(),
            ollama,
            told: watch::Sender::new(None),
            callers: Arc::default(),
            active: Arc::default(),
            figures: Arc::default(),
            pulls: Arc::default(),
            leaving: AtomicBool::new(false),
            look: watch::Sender::new(0),
            book: Mutex::default(),
        });
        tasks.spawn(keep_memory(shared.clone()));
        tasks.spawn(keep_disk(shared.clone()));
        tasks.spawn(keep_machine(shared.clone()));
        Self { shared }
    }

    /// The state, to be watched.
    pub(super) fn state(&self) -> watch::Receiver<Option<Arc<Told>>> {
        self.shared.told.subscribe()
    }

    /// Tells those who watch that the agent goes: nothing new is to be sent. Returns whether anybody watches.
    pub(super) fn says_goodbye(&self) -> bool {
        self.shared.leaving.store(true, Ordering::Relaxed);
        self.shared.write(|_| ((), true));
        *self.shared.callers.watchers().borrow() > 0
    }

    /// The sessions that had a turn here lately.
    pub(super) fn active(&self) -> Arc<Active> {
        self.shared.active.clone()
    }

    /// Who has calls here, and who watches.
    pub(super) fn callers(&self) -> Arc<Callers> {
        self.shared.callers.clone()
    }

    /// Sends a call on, counts it while it runs, and looks again after it if it may have changed something.
    pub(super) async fn follow(&self, ask: Ask, ollama: &Ollama) -> Result<Reply, Error> {
        let route = Route::find(ask.path.path());
        let changes = self.may_change(route).then(|| Looking(self.shared.clone()));
        // What proxies look up for themselves is no work.
        let mut running = (route != Some(Route::Status)).then(|| {
            let calling = self.shared.callers.enter(ask.headers.get(HOP).map(http::HeaderValue::as_bytes));
            Running::begin(calling, &self.shared.figures)
        });
        if route == Some(Route::Pull)
            && let (Some(model), Some(running)) = (model_of(&ask), &mut running)
        {
            running.pulls(&self.shared.pulls, model);
        }
        let spare = ask.again();
        let answer = match (ollama.send(ask).await, spare) {
            // A pooled connection had died: the proxy cannot know, and the Ollama has not been asked yet.
            (Err(Error::Server { reused: true, .. }), Some(spare)) => ollama.send(Ask { fresh: true, ..spare }).await,
            (answer, _) => answer,
        };
        if answer.as_ref().map_or(true, |reply| reply.status.is_server_error())
            && let Some(running) = &mut running
        {
            running.fails();
        }
        let reply = answer?;
        // What was loaded for this call is there when the head is.
        if changes.is_some() {
            self.shared.look();
        }
        let reply = match running {
            Some(running) => reply.watch(running),
            None => reply,
        };
        Ok(match changes {
            Some(looking) => reply.hold(looking),
            None => reply,
        })
    }

    /// The folder of the models, if it is certain where that is.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        let book = self.shared.book();
        book.folder.clone().filter(|_| book.is_certain)
    }

    /// The disk of the models, if it is on this machine. Waits for it.
    pub(super) fn disk(&self) -> Option<Disk> {
        let folder = self.shared.book().folder.clone()?;
        Some(Disk { free: machine::free(&folder)?, store: Store::at(&folder) })
    }

    /// A model is about to come to the Ollama, as long as what this returns is kept; it is told how far it is.
    pub(super) fn pulling(&self, model: &str) -> Following {
        let name = ModelName::parse(model).map_or_else(|| model.to_owned(), |name| name.to_string());
        let pulling = self.shared.pulls.begin(name);
        Box::new(move |line| pulling.hear(line.digest.clone(), line.total, line.completed))
    }

    /// Looks at the Ollama again: something has changed there.
    pub(super) fn look(&self) {
        self.shared.look();
    }

    fn may_change(&self, route: Option<Route>) -> bool {
        match route {
            Some(Route::Pull | Route::Push | Route::Create | Route::Copy | Route::Delete) => true,
            // A model that is not in memory is about to be; one that is may be unloaded by this call.
            Some(route) if route.infers() => {
                self.shared.told.borrow().as_ref().is_none_or(|told| told.loaded.is_empty())
            }
            _ => false,
        }
    }
}

/// The model that a call names, if its body is at hand.
fn model_of(ask: &Ask) -> Option<String> {
    let Payload::Whole(pieces) = &ask.payload else { return None };
    Some(ModelName::parse(&Peek::json(pieces).model?)?.to_string())
}

/// Looks again when it is dropped: a call that may have changed something is over.
struct Looking(Arc<Shared>);

impl Drop for Looking {
    fn drop(&mut self) {
        self.0.look();
    }
}

impl Shared {
    fn look(&self) {
        self.look.send_modify(|count| *count += 1);
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes something into the book and tells what stands there: at once if it is news, else with the next sign of life.
    fn write<T>(&self, change: impl FnOnce(&mut Book) -> (T, bool)) -> T {
        let mut book = self.book();
        let (result, mut news) = change(&mut book);
        // Half of the truth is none.
        if book.disk.count == 0 || book.memory.count == 0 {
            return result;
        }
        let online = book.disk.is_well() && book.memory.is_well();
        let was_online = std::mem::replace(&mut book.online, online);
        news |= online != was_online;
        if was_online && !online {
            // Whatever comes back has nothing cached.
            self.callers.turns().forget();
        }
        let told = Told { state: self.state(&book), models: book.models.clone(), loaded: book.loaded.clone() };
        drop(book);
        self.told.send_if_modified(|old| old.replace(Arc::new(told)).is_none() || news);
        result
    }

    fn state(&self, book: &Book) -> ServerState {
        let check = |probe: &Probe, kind: &str, interval: Duration| HealthCheck {
            check_id: format!("{}/{kind}", self.name),
            status: match probe {
                _ if probe.error.is_empty() => Status::Pass,
                _ if probe.is_lost() => Status::Fail,
                _ => Status::Warn,
            }
            .into(),
            interval_ms: u32::try_from(interval.as_millis()).unwrap_or(0),
            last_check_ms: unix_ms_now(),
            error: probe.error.clone(),
            consecutive_failures: probe.failures,
        };
        let Reading { cpu, memory_used, memory_total, gpus, disk_free, disk_begun } = book.reading.clone();
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let share = if memory_total == 0 { -1.0 } else { memory_used as f32 / memory_total as f32 };
        ServerState {
            online: book.online,
            cpu_usage: cpu.unwrap_or(-1.0),
            memory_usage: share,
            memory_used_bytes: memory_used,
            memory_total_bytes: memory_total,
            gpus,
            disk_free_bytes: disk_free,
            disk_begun_bytes: disk_begun,
            ollama_version: book.version.clone(),
            heartbeat_ms: unix_ms_now(),
            generation: book.generation,
            checks: vec![check(&book.memory, "memory", EVERY), check(&book.disk, "disk", EVERY)],
            metrics: Some(self.figures.last_minute()),
            pending_pulls: self.pulls.shares(),
            active_sessions: self.active.list(),
            draining: self.leaving.load(Ordering::Relaxed),
            hides_models: book.hides_models,
            ..ServerState::default()
        }
    }

    /// Waits until it is time for the next look: `pause` while somebody watches, else longer. True if it ended before that,
    /// after some call or for somebody who begins to watch.
    async fn pause(
        &self,
        pause: Duration,
        look: &mut watch::Receiver<u64>,
        watchers: &mut watch::Receiver<usize>,
    ) -> bool {
        let is_watched = *watchers.borrow_and_update() > 0;
        let pause = if is_watched { pause } else { pause.max(EVERY) };
        tokio::select! {
            () = tokio::time::sleep(pause) => false,
            _ = look.changed() => true,
            _ = watchers.changed(), if !is_watched => true,
        }
    }
}

/// Keeps what is in memory.
async fn keep_memory(shared: Arc<Shared>) {
    let (mut look, mut watchers) = (shared.look.subscribe(), shared.callers.watchers());
    let mut runners = runners::Runners::default();
    let mut processes = Processes::of_this_machine();
    let mut stirred = Instant::now();
    let mut last = Bytes::new();
    let mut is_whole = true;
    loop {
        look.mark_unchanged();
        let had_failed = shared.book().memory.failures > 0;
        match tokio::time::timeout(PATIENCE, shared.ollama.told(IN_MEMORY)).await {
            Ok(Ok(answer)) if answer == last && is_whole => {
                if had_failed {
                    shared.write(|book| (book.memory.goes(Ok(())), false));
                }
            }
            Ok(Ok(answer)) => match ollama::in_memory(&answer) {
                Ok(mut loaded) => {
                    is_whole = runners.amend(&shared.ollama, &mut loaded).await;
                    last = answer;
                    let servers = shared.book().servers.clone();
                    processes.follow([servers, runners.pids(&loaded)].concat());
                    shared.write(|book| {
                        book.memory.goes(Ok(()));
                        let loaded: Vec<_> = loaded.into_iter().map(in_memory).collect();
                        // Every call puts the expiry of its model off: that can wait for the next sign of life.
                        let news = !are_alike(&book.loaded, &loaded);
                        if *book.loaded != loaded {
                            book.loaded = Arc::new(loaded);
                            book.generation += 1;
                        }
                        ((), news)
                    });
                }
                Err(error) => shared.write(|book| (book.memory.goes(Err(&error)), false)),
            },
            Ok(Err(error)) => {
                last = Bytes::new();
                shared.write(|book| (book.memory.goes(Err(&error)), false));
            }
            // A model loads. What was in memory before it still is, as far as one can tell.
            Err(_) => {
                stirred = Instant::now();
                shared.write(|book| {
                    book.memory.count += 1;
                    ((), false)
                });
            }
        }
        // What has failed may be on its way out, or back; and who is back may have other models.
        let fails = shared.book().memory.failures > 0;
        if fails {
            stirred = Instant::now();
        } else if had_failed {
            shared.look();
        }
        let asked = Instant::now();
        loop {
            let is_calm = |stirred: Instant| !shared.book().servers.is_empty() && stirred.elapsed() >= STIRRED;
            let pause = if is_calm(stirred) { GLANCE } else { OFTEN };
            let is_woken = shared.pause(pause, &mut look, &mut watchers).await;
            if processes.stir() || is_woken {
                stirred = Instant::now();
            }
            if !is_calm(stirred) || asked.elapsed() >= EVERY {
                break;
            }
        }
    }
}

/// Keeps what is on the disk, and the version.
async fn keep_disk(shared: Arc<Shared>) {
    let (mut look, mut watchers) = (shared.look.subscribe(), shared.callers.watchers());
    let mut last = Bytes::new();
    let mut is_whole = true;
    let mut version_at: Option<Instant> = None;
    let mut manifests = Manifests::new(shared.look.clone());
    let mut cost = EVERY;
    loop {
        look.mark_unchanged();
        let begun = Instant::now();
        let answer = within(shared.ollama.told(ON_DISK)).await;
        // What it costs: an answer is often late for other reasons.
        cost = begun.elapsed().min(cost + cost / 8);
        let error = match answer {
            Ok(answer) if answer == last && is_whole => None,
            Ok(answer) => match ollama::on_disk(&answer) {
                Ok(mut models) => {
                    is_whole = shared.ollama.look_into(&mut models, LIMIT / 4).await;
                    last = answer;
                    if !manifests.are_watched() {
                        let first = models.first().map(|model| model.name.as_str());
                        let found = folder::of(&shared.ollama, first).await;
                        manifests.follow(found.as_ref());
                        let is_certain = found.as_ref().is_some_and(|found| found.is_certain);
                        let mut book = shared.book();
                        (book.is_certain, book.hides_models) = (is_certain, !is_certain && !models.is_empty());
                        book.folder = found.map(|found| found.path);
                    }
                    if manifests.are_watched() && version_at.is_none() {
                        let servers = tokio::task::spawn_blocking(processes::ollamas).await;
                        shared.book().servers = servers.unwrap_or_default();
                    }
                    shared.write(|book| {
                        let models: Vec<_> = models.iter().map(on_disk).collect();
                        let news = *book.models != models;
                        if news {
                            book.models = Arc::new(models);
                            book.generation += 1;
                        }
                        ((), news)
                    });
                    None
                }
                Err(error) => Some(error),
            },
            Err(error) => Some(error),
        };
        let version = match error {
            Some(error) => Err(error),
            // An Ollama changes its version only when it starts anew, and then it was away.
            None if version_at.is_some_and(|at| at.elapsed() < 5 * EVERY) => Ok(None),
            None => within(shared.ollama.version()).await.map(Some),
        };
        match version {
            Ok(version) => {
                version_at = version.as_ref().map(|_| Instant::now()).or(version_at);
                shared.write(|book| {
                    let is_new = version.as_ref().is_some_and(|version| *version != book.version);
                    book.version = version.unwrap_or_else(|| std::mem::take(&mut book.version));
                    (book.disk.goes(Ok(())), is_new)
                });
            }
            Err(error) => {
                // Who comes back may have another version, and its models elsewhere.
                (last, version_at) = (Bytes::new(), None);
                manifests.let_go();
                shared.write(|book| (book.disk.goes(Err(&error)), false));
            }
        }
        shared.ollama.sweep();
        let pause = if shared.book().disk.failures > 0 {
            GONE_AFTER
        } else if manifests.are_watched() {
            WATCHED * EVERY
        } else {
            (cost * SELDOM).clamp(OFTEN, EVERY)
        };
        shared.pause(pause, &mut look, &mut watchers).await;
    }
}

/// Reads the machine, beside the runtime.
async fn keep_machine(shared: Arc<Shared>) {
    let Ok(mut machine) = tokio::task::spawn_blocking(Machine::this).await else { return };
    loop {
        let folder = shared.book().folder.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let reading = machine.read(folder.as_deref());
            (machine, reading)
        });
        let Ok((same, reading)) = reading.await else { return };
        machine = same;
        shared.write(|book| {
            book.reading = reading;
            ((), false)
        });
        tokio::time::sleep(EVERY).await;
    }
}

async fn within<T>(asking: impl Future<Output = Result<T, StateError>>) -> Result<T, StateError> {
    let late = |_| {
        let source = format!("no answer after {} ms", LIMIT.as_millis()).into();
        StateError::Foreign { path: ON_DISK, source }
    };
    tokio::time::timeout(LIMIT, asking).await.map_err(late)?
}

/// The manifests of the models, as far as the system tells of their changes.
struct Manifests {
    look: watch::Sender<u64>,
    watcher: Option<RecommendedWatcher>,
}

impl Manifests {
    fn new(look: watch::Sender<u64>) -> Self {
        Self { look, watcher: None }
    }

    fn are_watched(&self) -> bool {
        self.watcher.is_some()
    }

    /// Watches them no more.
    fn let_go(&mut self) {
        self.watcher = None;
    }

    /// Watches them, if it is certain where they are.
    fn follow(&mut self, found: Option<&folder::Folder>) {
        let Some(found) = found.filter(|found| found.is_certain) else { return };
        self.watcher = watch(&found.path.join("manifests"), self.look.clone())
            .inspect_err(
                |error| tracing::debug!(%error, "manifests are not watched: the lists are looked at more often"),
            )
            .ok();
    }
}

fn watch(folder: &Path, look: watch::Sender<u64>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.map_or(true, |event| crate::watch::changes(event.kind)) {
            look.send_modify(|count| *count += 1);
        }
    })?;
    watcher.watch(folder, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// Whether two lists are the same but for the time until which the models stay.
fn are_alike(some: &[v1::LoadedModel], others: &[v1::LoadedModel]) -> bool {
    let is_alike = |(one, other): (&v1::LoadedModel, &v1::LoadedModel)| {
        *one == v1::LoadedModel { expires_at: one.expires_at.clone(), ..other.clone() }
    };
    some.len() == others.len() && some.iter().zip(others).all(is_alike)
}

fn on_disk(model: &Model) -> v1::Model {
    v1::Model {
        tag: ModelName::parse(&model.name).map(|name| name.tag().to_owned()).unwrap_or_default(),
        name: model.name.clone(),
        digest: model.digest.clone(),
        size_bytes: model.size,
        family: model.family.clone(),
        parameter_size: model.parameter_size.clone(),
        quantization: model.quantization.clone(),
        bits_per_weight: model.bits_per_weight().unwrap_or(0.0),
        architecture: model.architecture().to_owned(),
        context_length: model.context_length,
        capabilities: model.capabilities.clone(),
        modified_at: model.modified_at.clone(),
        parameters_json: model.parameters.clone(),
        weights: model.weights.clone(),
    }
}

fn in_memory(loaded: Loaded) -> v1::LoadedModel {
    v1::LoadedModel {
        name: loaded.name,
        digest: loaded.digest,
        size_bytes: loaded.size,
        size_vram_bytes: loaded.size_vram,
        expires_at: loaded.expires_at,
        context_length: loaded.context_length,
        slots: loaded.slots,
    }
}
