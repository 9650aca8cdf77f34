//! Does what the plan says, a few things at a time, and leaves alone for a while what has failed.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Method, header};
use olol_middleware::cluster::{Bits, Known, Loaded, State};
use olol_middleware::instruments::{self, Wish};
use olol_middleware::{
    Call, Cluster, Error, Head, ModelName, Pattern, Payload, Peek, Reply, Route, Server, ServerId, Snapshot,
};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, timeout};
use tower::{Service, ServiceExt};

use super::pins::{PinError, Pins, Store, Unsaid};
use super::plan::{Action, Deed, Held, Making, Place, Plan, Presence, Standing, View, plan};
use super::{Config, KeepLoaded, Name, Replicas, Wanted};
use crate::models::wake::Waker;
use crate::models::{Line, Models};
use crate::reload::{Running, State as Configured};

/// Time between two looks whether something has changed.
const TICK: Duration = Duration::from_secs(1);
/// Time after which it is planned anew though nothing has changed: time itself does, and the room on disks.
const ANYWAY: Duration = Duration::from_secs(5);
/// Models that are loaded at the same time.
const LOADS: usize = 8;
/// The longest that a load may take.
const LOADING: Duration = Duration::from_secs(1800);
/// A model that leaves the memory sooner than this after it was loaded has had to.
const SOON: Duration = Duration::from_secs(600);
/// How often a model that clients use is told to stay.
const AGAIN: Duration = Duration::from_secs(60);
/// The longest answer that is read, bytes.
const LONGEST: usize = 64 << 10;

/// What is wanted of models, and how far it is true.
#[derive(Clone, Debug)]
pub struct Desired(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    running: Arc<Running>,
    pub(super) pins: Store,
    standings: ArcSwap<Vec<Standing>>,
    /// Models that somebody has just asked for.
    asked: Mutex<HashSet<ModelName>>,
    stir: Notify,
    /// Something was said here that other proxies do not know.
    pub(super) said: Notify,
}

impl Desired {
    /// What the configuration that runs says, and the pins in a file, which may be shared with other proxies.
    pub fn open(running: Arc<Running>, pins: Option<PathBuf>, is_shared: bool) -> Result<Self, PinError> {
        let pins = Store::open(pins, is_shared)?;
        Ok(Self(Arc::new(Inner {
            running,
            pins,
            standings: ArcSwap::default(),
            asked: Mutex::default(),
            stir: Notify::new(),
            said: Notify::new(),
        })))
    }

    /// How all that is wanted stands.
    pub fn standings(&self) -> Arc<Vec<Standing>> {
        self.0.standings.load_full()
    }

    /// How far models are where they are wanted, for metrics.
    pub fn wishes(&self) -> Vec<Wish> {
        let wish = |standing: &Standing| Wish {
            model: standing.name.clone(),
            wanted: standing.wanted,
            held: standing.held.len(),
        };
        self.standings().iter().filter(|standing| standing.replicas != Replicas::Count(0)).map(wish).collect()
    }

    /// Wants a model, from now on and whatever the file says of it. Known on the disk when this returns.
    pub async fn pin(&self, wanted: Wanted) -> Result<(), PinError> {
        let (desired, model) = (self.clone(), wanted.name.model().clone());
        blocking(move || desired.0.pins.pin(wanted)).await?;
        self.0.said.notify_one();
        self.changed([model]);
        Ok(())
    }

    /// Wants a model no more than the file says; false if it was not pinned.
    pub async fn unpin(&self, model: &ModelName) -> Result<bool, PinError> {
        let (desired, name) = (self.clone(), model.clone());
        let was_pinned = blocking(move || desired.0.pins.unpin(&name)).await?;
        self.0.said.notify_one();
        self.changed([model.clone()]);
        Ok(was_pinned)
    }

    /// Takes over the pins that proxies share; `told`: what was told of those here.
    pub(super) async fn adopt(&self, there: Pins, told: Unsaid) {
        let desired = self.clone();
        match blocking(move || desired.0.pins.adopt(there, &told)).await {
            Ok(changed) if changed.is_empty() => {}
            Ok(changed) => self.changed(changed),
            Err(error) => tracing::warn!(%error, "pins of other proxies cannot be kept here"),
        }
    }

    /// What is wanted of these is another thing from now on.
    fn changed(&self, models: impl IntoIterator<Item = ModelName>) {
        self.0.asked.lock().unwrap_or_else(PoisonError::into_inner).extend(models);
        self.0.stir.notify_one();
    }

    /// A client has deleted a model: it does not come back by itself.
    async fn deleted(&self, name: &str) {
        let Some(name) = Name::parse(name) else { return };
        let is_wanted = |(wanted, _): &(Wanted, _)| wanted.name == name && wanted.is_wanted();
        if !wanted(&self.0.running.state(), &self.0.pins.all()).iter().any(is_wanted) {
            return;
        }
        let model = name.model().clone();
        let none = Wanted { name, replicas: Replicas::Count(0), servers: Vec::new(), keep_loaded: KeepLoaded::No };
        match self.pin(none).await {
            Ok(()) => {
                tracing::warn!(%model, "a wanted model was deleted: it is not wanted any more, until it is pinned again");
            }
            Err(error) => tracing::error!(%model, %error, "a wanted model was deleted, and will be made again"),
        }
    }
}

/// Runs what touches the disk where that may take its time.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PinError> + Send + 'static,
) -> Result<T, PinError> {
    let failed =
        |error: JoinError| PinError::File { path: PathBuf::new(), what: format!("it could not be written: {error}") };
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

/// All that is wanted, with who wants it: the file's models in its order, and those that are only pinned.
fn wanted(running: &Configured, pins: &Pins) -> Vec<(Wanted, &'static str)> {
    let named = &running.config.models;
    let of_file = named.iter().map(|wanted| match pins.get(wanted.name.model()) {
        Some(pin) => (pin.clone(), "pin"),
        None => (wanted.clone(), "file"),
    });
    let is_named = |model: &ModelName| named.iter().any(|wanted| wanted.name.model() == model);
    let others = pins.iter().filter(|(model, _)| !is_named(model)).map(|(_, pin)| (pin.clone(), "pin"));
    of_file.chain(others).collect()
}

/// What has failed, or was done a moment ago.
#[derive(Debug)]
struct Rest {
    until: Instant,
    failures: u32,
    why: String,
}

/// A model that was loaded to stay.
#[derive(Clone, Copy, Debug)]
struct Kept {
    at: Instant,
    /// Since when its server had been up.
    since: SystemTime,
    embeds: bool,
}

/// Something that goes on.
#[derive(Debug)]
struct Going {
    action: Action,
    abort: AbortHandle,
}

/// Brings a model to a server; dropping the future ends it.
pub type Bring = Arc<dyn Fn(Name, Arc<Server>) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Does what is to be done, for as long as it runs.
pub struct Driver<S> {
    desired: Desired,
    cluster: Arc<Cluster>,
    waker: Waker,
    bring: Bring,
    service: S,
    tasks: JoinSet<Result<(), String>>,
    going: HashMap<Id, Going>,
    rests: HashMap<Deed, Rest>,
    /// The models that were loaded to stay.
    loaded: HashMap<(ModelName, ServerId), Kept>,
    /// The servers that had each model and answered, and since when they did.
    holders: HashMap<ModelName, Vec<(ServerId, SystemTime)>>,
    gone: HashSet<ModelName>,
    last: Option<Last>,
}

/// What was looked at last.
#[derive(Debug)]
struct Last {
    /// When time itself may have changed something.
    due: Instant,
    seen: (Arc<Snapshot>, Arc<Configured>, Arc<Pins>),
}

impl<S> Driver<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    /// Brings models with `bring`, and loads them through a service that sends a call to the one server in question.
    pub fn new(desired: Desired, cluster: Arc<Cluster>, waker: Waker, bring: Bring, service: S) -> Self {
        Self {
            desired,
            cluster,
            waker,
            bring,
            service,
            tasks: JoinSet::new(),
            going: HashMap::new(),
            rests: HashMap::new(),
            loaded: HashMap::new(),
            holders: HashMap::new(),
            gone: HashSet::new(),
            last: None,
        }
    }

    /// Runs until it is dropped; what goes on then ends.
    pub async fn run(mut self) {
        let desired = self.desired.clone();
        loop {
            self.look();
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = desired.0.stir.notified() => self.last = None,
                Some(ended) = self.tasks.join_next_with_id() => {
                    let (id, result) = match ended {
                        Ok((id, result)) => (id, result),
                        Err(error) => (error.id(), Err(error.to_string())),
                    };
                    self.ended(id, result);
                    self.last = None;
                }
            }
        }
    }

    /// Plans, and begins what may begin.
    fn look(&mut self) {
        let seen = (self.cluster.snapshot(), self.desired.0.running.state(), self.desired.0.pins.all());
        let is_same = |last: &Last| {
            let (snapshot, running, pins) = &last.seen;
            Arc::ptr_eq(snapshot, &seen.0) && Arc::ptr_eq(running, &seen.1) && Arc::ptr_eq(pins, &seen.2)
        };
        if self.last.as_ref().is_some_and(|last| is_same(last) && Instant::now() < last.due) {
            return;
        }
        let (snapshot, running, pins) = &seen;
        let wanted = wanted(running, pins);
        let config = &running.config.desired;
        self.forget(&wanted, snapshot, config);
        self.notice(&wanted, snapshot);
        let view = self.view(&wanted, snapshot);
        let Plan { actions, mut standings } = plan(&wanted, &view, config, running.config.pull.margin());
        for action in actions {
            let waiting = match &action {
                Action::Bring { name, .. } => Some(name.model().clone()),
                _ => None,
            };
            if !self.begin(action, snapshot, config)
                && let Some(standing) = standings.iter_mut().find(|standing| Some(&standing.name) == waiting.as_ref())
            {
                standing.why.get_or_insert_with(|| "it waits for its turn ([desired] at-once)".to_owned());
            }
        }
        self.desired.0.standings.store(Arc::new(standings));
        self.last = Some(Last { due: self.due(&view, config), seen });
    }

    /// When it is to be planned anew though nothing has changed.
    fn due(&self, view: &View, config: &Config) -> Instant {
        let now = Instant::now();
        let rests = self.rests.values().map(|rest| rest.until).filter(|until| *until > now);
        let graces = view.places.iter().filter_map(|place| match place.presence {
            Presence::Away(since) => config.grace_s.time().checked_sub(since).map(|left| now + left),
            Presence::Here | Presence::Draining => None,
        });
        rests.chain(graces).min().map_or(now + ANYWAY, |due| due.min(now + ANYWAY))
    }

    /// Forgets, and ends, what is of no concern any more.
    fn forget(&mut self, wanted: &[(Wanted, &'static str)], snapshot: &Arc<Snapshot>, config: &Config) {
        let models: HashMap<&ModelName, &Wanted> = wanted
            .iter()
            .filter(|(wanted, _)| wanted.is_wanted())
            .map(|(wanted, _)| (wanted.name.model(), wanted))
            .collect();
        for going in self.going.values() {
            let (Action::Bring { name, server, .. } | Action::Load { name, server, .. }) = &going.action else {
                continue;
            };
            if models.get(name.model()).is_none_or(|wanted| !wanted.means(server)) {
                going.abort.abort();
            }
        }
        let asked = std::mem::take(&mut *self.desired.0.asked.lock().unwrap_or_else(PoisonError::into_inner));
        let is_about = |deed: &Deed| match deed {
            Deed::Bring(model, _) | Deed::BringAnywhere(model) | Deed::Load(model, _) => Some(model.clone()),
            Deed::Wake(_) => None,
        };
        let (now, longest) = (Instant::now(), config.retry_max_s.time());
        self.rests.retain(|deed, rest| {
            // How often it has failed is remembered for a while longer.
            let is_old = rest.until + longest < now;
            !is_old && is_about(deed).is_none_or(|model| models.contains_key(&model) && !asked.contains(&model))
        });
        self.gone.retain(|model| models.contains_key(model) && !asked.contains(model));
        self.holders.retain(|model, _| models.contains_key(model) && !asked.contains(model));
        let is_kept = |model: &ModelName, server: &ServerId| {
            models.get(model).is_some_and(|wanted| wanted.keep_loaded != KeepLoaded::No && wanted.means(server))
        };
        let released: Vec<_> = self.loaded.extract_if(|(model, server), _| !is_kept(model, server)).collect();
        for ((model, server), Kept { embeds, .. }) in released {
            // It leaves as usual from now on, which it would not by itself.
            if let (Some(name), Some(server)) = (Name::parse(model.as_str()), snapshot.server(&server).cloned())
                && server.state == State::Up
                && self.tasks.len() < LOADS * 2
            {
                tracing::info!(%model, server = %server.id, "a model is not kept in memory any more");
                let (service, cluster) = (self.service.clone(), self.cluster.clone());
                self.tasks.spawn(load(service, cluster, snapshot, name, server, embeds, &json!("5m")));
            }
        }
    }

    /// Finds out which models went from servers that stayed. A server that loses what it has was away; one that was not has
    /// done what somebody told it. One holder may have lost its disk; that all have at once is a delete, at another proxy
    /// perhaps.
    fn notice(&mut self, wanted: &[(Wanted, &'static str)], snapshot: &Snapshot) {
        for (wanted, _) in wanted.iter().filter(|(wanted, _)| wanted.is_wanted()) {
            let model = wanted.name.model();
            let is_up = |server: &&Arc<Server>| server.state == State::Up;
            if let Some(known) = snapshot.known(model) {
                self.gone.remove(model);
                let holders = known.installed.iter().filter_map(|at| snapshot.servers.get(at)).filter(is_up);
                self.holders.insert(model.clone(), holders.map(|server| (server.id.clone(), server.since)).collect());
                continue;
            }
            let stayed = |(id, since): &(ServerId, SystemTime)| {
                snapshot.server(id).is_some_and(|server| server.state == State::Up && server.since == *since)
            };
            let holders = self.holders.remove(model).unwrap_or_default();
            if !holders.is_empty() && holders.iter().all(stayed) {
                tracing::warn!(%model, "a wanted model went from all its servers: it was deleted, and is not made again");
                self.gone.insert(model.clone());
            }
        }
    }

    fn view(&self, wanted: &[(Wanted, &'static str)], snapshot: &Snapshot) -> View {
        let now = Instant::now();
        let mut places = Vec::with_capacity(snapshot.servers.len());
        let mut position = vec![usize::MAX; snapshot.servers.places()];
        let names: HashMap<&ModelName, u64> = wanted
            .iter()
            .map(|(wanted, _)| wanted.name.model())
            .map(|model| (model, snapshot.known(model).map_or(0, |known| known.size)))
            .collect();
        let mut making: HashMap<ModelName, Vec<Making>> = HashMap::new();
        for server in &snapshot.servers {
            position[server.index] = places.len();
            let vitals = server.vitals.load_full();
            places.push(self.place(server, vitals.as_ref().and_then(|vitals| vitals.disk_free)));
            let pulls = vitals.iter().flat_map(|vitals| &vitals.pending_pulls);
            for (name, done) in pulls.filter_map(|(name, done)| Some((ModelName::parse(name)?, *done))) {
                let Some(size) = names.get(&name) else { continue };
                let left = left_of(*size, done);
                making.entry(name).or_default().push(Making { server: server.id.clone(), left });
            }
        }
        let mut loading = HashSet::new();
        for going in self.going.values() {
            match &going.action {
                Action::Bring { name, server, size } => {
                    let known = making.entry(name.model().clone()).or_default();
                    if known.iter().all(|making| making.server != *server) {
                        known.push(Making { server: server.clone(), left: *size });
                    }
                }
                Action::Load { name, server, .. } => drop(loading.insert((name.model().clone(), server.clone()))),
                Action::Wake { .. } => {}
            }
        }
        let models = wanted.iter().filter_map(|(wanted, _)| {
            let known = snapshot.known(wanted.name.model())?;
            Some((wanted.name.model().clone(), held(known, wanted, snapshot, &position)))
        });
        let rests = self.rests.iter().filter(|(_, rest)| rest.until > now).map(|(deed, rest)| {
            let seconds = (rest.until - now).as_secs() + 1;
            (deed.clone(), format!("{}; it is tried again in {seconds} s", rest.why))
        });
        View { models: models.collect(), rests: rests.collect(), places, making, loading, gone: self.gone.clone() }
    }

    fn place(&self, server: &Server, disk_free: Option<u64>) -> Place {
        let presence = match server.state {
            State::Up if server.is_usable() => Presence::Here,
            State::Up => Presence::Draining,
            // However the time of day is set meanwhile.
            State::Down | State::Unknown => Presence::Away(server.entered.elapsed()),
        };
        let has_told = !server.report.version.is_empty() || !server.report.models.is_empty();
        Place {
            id: server.id.clone(),
            weight: server.weight,
            presence,
            is_known: server.state == State::Up || has_told,
            sleeps: self.waker.sleeps(server),
            disk_free,
        }
    }

    /// Begins something, unless enough goes on. True if it goes on now.
    fn begin(&mut self, action: Action, snapshot: &Arc<Snapshot>, config: &Config) -> bool {
        let is_bring = |action: &Action| matches!(action, Action::Bring { .. });
        let is_load = |action: &Action| matches!(action, Action::Load { .. });
        let count = |is: &dyn Fn(&Action) -> bool| self.going.values().filter(|going| is(&going.action)).count();
        let is_busy = |server: &ServerId, is: &dyn Fn(&Action) -> bool| {
            self.going.values().any(|going| is(&going.action) && going.action.server() == server)
        };
        let Some(server) = snapshot.server(action.server()).cloned() else { return false };
        let most = usize::try_from(config.at_once.get()).unwrap_or(usize::MAX);
        let may = match &action {
            Action::Bring { .. } => count(&is_bring) < most && !is_busy(&server.id, &is_bring),
            Action::Load { .. } => count(&is_load) < LOADS && !is_busy(&server.id, &is_load),
            Action::Wake { .. } => !is_busy(&server.id, &|action| matches!(action, Action::Wake { .. })),
        };
        if !may {
            return false;
        }
        let abort = match action.clone() {
            Action::Bring { name, .. } => {
                tracing::info!(model = %name.model(), server = %server.id, "a wanted model is brought to a server");
                self.tasks.spawn((self.bring)(name, server))
            }
            Action::Load { name, embeds, again, .. } => {
                if !again {
                    tracing::info!(model = %name.model(), server = %server.id, "a wanted model is loaded");
                }
                let (service, cluster) = (self.service.clone(), self.cluster.clone());
                self.tasks.spawn(load(service, cluster, snapshot, name, server, embeds, &json!(-1)))
            }
            Action::Wake { .. } => {
                let waker = self.waker.clone();
                self.tasks.spawn(async move { waker.wake(&server).await })
            }
        };
        self.going.insert(abort.id(), Going { action, abort });
        true
    }

    /// Something is over.
    fn ended(&mut self, id: Id, result: Result<(), String>) {
        let Some(Going { action, abort: _ }) = self.going.remove(&id) else { return };
        let running = self.desired.0.running.state();
        let config = &running.config.desired;
        match action {
            Action::Bring { name, server, .. } => {
                instruments::wish_action("bring", result.is_ok());
                let (anywhere, here) =
                    (Deed::BringAnywhere(name.model().clone()), Deed::Bring(name.model().clone(), server.clone()));
                match result {
                    Ok(()) => {
                        tracing::info!(model = %name.model(), %server, "a wanted model is there");
                        self.rests.remove(&anywhere);
                        self.rests.remove(&here);
                    }
                    Err(why) => {
                        tracing::warn!(model = %name.model(), %server, why, "a wanted model could not be brought to a server");
                        let why = format!("bringing it to {server} failed: {why}");
                        // The model as a whole waits less than the server that failed, so that another one is tried.
                        self.failed(anywhere, why.clone(), config, 1);
                        self.failed(here, why, config, 4);
                    }
                }
            }
            Action::Load { name, server, embeds, again } => {
                instruments::wish_action("load", result.is_ok());
                let key = (name.model().clone(), server.clone());
                let deed = Deed::Load(key.0.clone(), key.1.clone());
                let since = self.cluster.snapshot().server(&server).map(|server| server.since);
                match (result, since) {
                    (Err(why), _) => {
                        tracing::warn!(model = %name.model(), %server, why, "a wanted model could not be loaded");
                        self.failed(deed, format!("loading it failed: {why}"), config, 1);
                    }
                    (Ok(()), _) if again => self.rest(deed, AGAIN, "it was told to stay".to_owned()),
                    (Ok(()), since) => {
                        let now = Instant::now();
                        let before = since.and_then(|since| self.loaded.insert(key, Kept { at: now, since, embeds }));
                        let had_to_leave = before.is_some_and(|kept| now - kept.at < SOON && Some(kept.since) == since);
                        if had_to_leave {
                            let why = "it left the memory soon after it was loaded: something else needs the room";
                            self.failed(deed, why.to_owned(), config, 1);
                        } else {
                            self.rest(deed, config.retry_s.time(), "it was loaded a moment ago".to_owned());
                        }
                    }
                }
            }
            Action::Wake { server } => {
                let deed = Deed::Wake(server);
                match result {
                    Ok(()) => self.rest(deed, running.config.wake.pause_s.time(), "it was woken".to_owned()),
                    Err(why) => self.failed(deed, format!("waking it failed: {why}"), config, 1),
                }
            }
        }
    }

    /// It is left alone for a while, twice as long as the last time; and some times longer than usual.
    fn failed(&mut self, deed: Deed, why: String, config: &Config, times: u32) {
        let failures = self.rests.get(&deed).map_or(0, |rest| rest.failures).saturating_add(1);
        let longest = config.retry_max_s.time();
        let pause = config.retry_s.time().saturating_mul(times).saturating_mul(1 << (failures - 1).min(20));
        self.rests.insert(deed, Rest { until: Instant::now() + pause.min(longest), failures, why });
    }

    fn rest(&mut self, deed: Deed, pause: Duration, why: String) {
        self.rests.insert(deed, Rest { until: Instant::now() + pause, failures: 0, why });
    }
}

impl Action {
    /// Where it is done.
    fn server(&self) -> &ServerId {
        match self {
            Self::Bring { server, .. } | Self::Load { server, .. } | Self::Wake { server } => server,
        }
    }
}

/// Bytes that are left of a model of which this share is done.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "a share of it"
)]
fn left_of(size: u64, done: f32) -> u64 {
    (size as f64 * f64::from(1.0 - done.clamp(0.0, 1.0))) as u64
}

/// Where a model is, by places in the view.
fn held(known: &Known, wanted: &Wanted, snapshot: &Snapshot, position: &[usize]) -> Held {
    let at = |index: usize| position.get(index).copied().filter(|at| *at != usize::MAX);
    let usual = known.usual();
    let (differs, installed): (Vec<usize>, Vec<usize>) =
        known.installed.iter().partition(|index| known.differs(*index));
    let mut held = Held {
        installed: installed.into_iter().filter_map(at).collect(),
        differs: differs.into_iter().filter_map(at).collect(),
        digest: usual.map(|usual| usual.digest().to_owned()).unwrap_or_default(),
        size: known.size,
        ..Held::default()
    };
    if wanted.keep_loaded == KeepLoaded::No {
        return held;
    }
    let capabilities = known.makes.first().map(|make| make.model().capabilities.as_slice()).unwrap_or_default();
    let can = |what: &str| capabilities.iter().any(|capability| capability == what);
    held.embeds = can("embedding") && !can("completion");
    held.loaded = known
        .loaded
        .iter()
        .filter_map(|index| {
            let server = snapshot.servers.get(index)?;
            let is_it = |loaded: &&Loaded| ModelName::parse(&loaded.name).as_ref() == Some(&known.name);
            let stays = server.report.loaded.iter().find(is_it).is_some_and(|loaded| is_for_ever(&loaded.expires_at));
            Some((at(index)?, stays))
        })
        .collect();
    held
}

/// Whether a time is one of those that Ollama tells of models that stay: some centuries from now.
fn is_for_ever(expires_at: &str) -> bool {
    expires_at.get(..4).and_then(|year| year.parse().ok()).is_some_and(|year: u32| year >= 2200)
}

/// A call of ours to one server.
fn call(
    snapshot: &Arc<Snapshot>,
    server: &Server,
    route: Route,
    path: &'static str,
    name: &Name,
    body: &Value,
) -> Call {
    let body = Bytes::from(body.to_string());
    let mut head = Head::new(route, Method::POST, PathAndQuery::from_static(path));
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    head.peek = Peek::json(std::slice::from_ref(&body));
    head.model = Some(name.model().clone());
    let mut candidates = snapshot.all();
    candidates.only(server.index);
    Call::new(head, Payload::from_bytes(body), candidates)
}

/// Brings models as `models` does: by copies from other servers where it can, else from the registry.
pub fn by(models: Models) -> Bring {
    Arc::new(move |name, server| {
        let models = models.clone();
        Box::pin(async move {
            let brought = models.bring(name.text(), &server.id, &mut |_| {}).await;
            brought.map(drop).map_err(|error| error.to_string())
        })
    })
}

/// Has a model loaded, to stay so long.
fn load<S>(
    service: S,
    cluster: Arc<Cluster>,
    snapshot: &Arc<Snapshot>,
    name: Name,
    server: Arc<Server>,
    embeds: bool,
    keep_alive: &Value,
) -> impl Future<Output = Result<(), String>> + Send + 'static + use<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Send + 'static,
    S::Future: Send + 'static,
{
    // Without anything to answer, both only load.
    let (route, path, body) = if embeds {
        (Route::Embed, "/api/embed", json!({"model": name.text(), "input": "", "keep_alive": keep_alive}))
    } else {
        (Route::Generate, "/api/generate", json!({"model": name.text(), "keep_alive": keep_alive, "stream": false}))
    };
    let call = call(snapshot, &server, route, path, &name, &body);
    async move {
        let asking = async {
            let reply = service.oneshot(call).await.map_err(|error| match error {
                Error::Busy { .. } => "all its slots are taken".to_owned(),
                error => error.to_string(),
            })?;
            if !reply.status.is_success() {
                return Err(refusal(reply).await);
            }
            reply.body.collect(LONGEST).await.map(drop).map_err(|error| error.to_string())
        };
        let too_long = || Err(format!("it did not load within {} s", LOADING.as_secs()));
        timeout(LOADING, asking).await.unwrap_or_else(|_| too_long())?;
        cluster.note_loaded(&server.id, name.model(), true);
        cluster.want_news_of(&server.id);
        Ok(())
    }
}

/// What a refusal says.
async fn refusal(reply: Reply) -> String {
    let status = reply.status.as_u16();
    let body = reply.body.collect(LONGEST).await.unwrap_or_default();
    let line = Line::all(&body).next().unwrap_or_default();
    line.error.unwrap_or_else(|| format!("status {status}"))
}

/// The header by which a pull says at which servers alone it is to be, by name or pattern, with commas between.
pub const SERVERS: HeaderName = HeaderName::from_static("x-olol-servers");

/// Keeps a pull to the servers that it names.
fn narrow(call: &mut Call) -> Result<(), Error> {
    let Some(value) = call.headers.get(SERVERS) else { return Ok(()) };
    let text = value.to_str().unwrap_or_default();
    let patterns: Result<Vec<Pattern>, _> = text.split(',').map(|part| Pattern::parse(part.trim())).collect();
    let patterns = patterns.map_err(|error| Error::NoServer(format!("X-Olol-Servers: {error}")))?;
    let mut named = Bits::default();
    for pattern in &patterns {
        let fitting = call.candidates.iter().filter(|server| pattern.matches(server.id.as_str()));
        let before = named.count();
        fitting.for_each(|server| named.insert(server.index));
        if named.count() == before && pattern.is_plain() {
            return Err(Error::NoServer(format!("X-Olol-Servers: there is no server '{pattern}'")));
        }
    }
    if named.is_empty() {
        return Err(Error::NoServer(format!("X-Olol-Servers: no server fits '{text}'")));
    }
    call.candidates.keep(&named);
    Ok(())
}

/// What stands before the leaf: keeps pulls to the servers that they name, remembers which wanted models were deleted, and passes on all calls.
#[derive(Clone, Debug)]
pub struct Leaf<S> {
    inner: S,
    desired: Desired,
    cluster: Arc<Cluster>,
}

impl<S> Leaf<S> {
    /// In front of a leaf.
    pub fn new(inner: S, desired: Desired, cluster: Arc<Cluster>) -> Self {
        Self { inner, desired, cluster }
    }
}

/// How many servers have a model.
fn count(snapshot: &Snapshot, model: &ModelName) -> usize {
    snapshot.known(model).map_or(0, |known| known.installed.count())
}

impl<S> Service<Call> for Leaf<S>
where
    S: Service<Call, Response = Reply, Error = Error, Future = BoxFuture<'static, Result<Reply, Error>>>,
{
    type Response = Reply;
    type Error = Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        if call.route == Route::Pull
            && let Err(error) = narrow(&mut call)
        {
            return Box::pin(std::future::ready(Err(error)));
        }
        let model = call.place.model.as_ref().filter(|_| call.route == Route::Delete && !call.dry).cloned();
        let before = call.candidates.snapshot().clone();
        let answer = self.inner.call(call);
        let Some(model) = model else { return answer };
        let (desired, cluster) = (self.desired.clone(), self.cluster.clone());
        Box::pin(async move {
            let answer = answer.await;
            // Also where one of the servers could not do it: who asked for that does not want the others to make it again.
            let is_deleted = answer.as_ref().is_ok_and(|reply| reply.status.is_success());
            if is_deleted || count(&cluster.snapshot(), &model) < count(&before, &model) {
                desired.deleted(model.as_str()).await;
            }
            answer
        })
    }
}
