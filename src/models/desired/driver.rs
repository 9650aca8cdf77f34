//! Does what the plan says, a few things at a time, and leaves alone for a while what has failed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use olol_middleware::cluster::{Known, Loaded, State};
use olol_middleware::vitals::Vitals;
use olol_middleware::{Call, Cluster, Error, ModelName, Reply, Server, ServerId, Snapshot, instruments};
use serde_json::json;
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::Instant;
use tower::Service;

use super::load::{Bring, load};
use super::pins::Pins;
use super::plan::{Action, Agent, Deed, Held, Making, Place, Plan, Presence, View, plan};
use super::wishes::{Desired, wanted};
use super::{Config, KeepLoaded, Name, Wanted};
use crate::models::shares;
use crate::models::wake::Waker;
use crate::reload::State as Configured;

/// Time between two looks whether something has changed.
const TICK: Duration = Duration::from_secs(1);
/// Time after which it is planned anew though nothing has changed: time itself does, and the room on disks.
const ANYWAY: Duration = Duration::from_secs(5);
/// Models that are loaded at the same time.
const LOADS: usize = 8;
/// A model that leaves the memory sooner than this after it was loaded has had to.
const SOON: Duration = Duration::from_secs(600);
/// How often a model that clients use is told to stay.
const AGAIN: Duration = Duration::from_secs(60);

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
                () = desired.is_asked() => self.last = None,
                Some(ended) = self.tasks.join_next_with_id() => {
                    match ended {
                        Ok((id, result)) => self.ended(id, result),
                        // We ended it, so it has not failed.
                        Err(error) if error.is_cancelled() => drop(self.going.remove(&error.id())),
                        Err(error) => self.ended(error.id(), Err(error.to_string())),
                    }
                    self.last = None;
                }
            }
        }
    }

    /// Plans, and begins what may begin.
    fn look(&mut self) {
        let seen = (self.cluster.snapshot(), self.desired.running(), self.desired.pins());
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
        self.adopt(&wanted, &view, snapshot);
        let Plan { actions, mut standings } = plan(&wanted, &view, config, running.config.pull.margin());
        let mut has_begun = false;
        for action in actions {
            let waiting = match &action {
                Action::Bring { name, .. } => Some(name.model().clone()),
                _ => None,
            };
            let begins = self.begin(action, snapshot, config);
            has_begun |= begins;
            if !begins
                && let Some(standing) = standings.iter_mut().find(|standing| Some(&standing.name) == waiting.as_ref())
            {
                standing.why.get_or_insert_with(|| "it waits for its turn ([desired] at-once)".to_owned());
            }
        }
        self.desired.stand(standings);
        // What has begun is to be told, too.
        let due = if has_begun { Instant::now() } else { self.due(&view, config) };
        self.last = Some(Last { due, seen });
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
            // A load goes on without us, and what it has loaded is let go afterwards.
            let Action::Bring { name, server, .. } = &going.action else { continue };
            if models.get(name.model()).is_none_or(|wanted| !wanted.means(server)) {
                going.abort.abort();
            }
        }
        let asked = self.desired.take_asked();
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
        self.release(&models, snapshot);
    }

    /// What stays in memory as it is wanted to is let go when it need not any more, whoever has loaded it: another proxy, or
    /// this one before it was started anew.
    fn adopt(&mut self, wanted: &[(Wanted, &'static str)], view: &View, snapshot: &Snapshot) {
        for (wanted, _) in wanted.iter().filter(|(wanted, _)| wanted.keep_loaded != KeepLoaded::No) {
            let model = wanted.name.model();
            let Some(held) = view.models.get(model) else { continue };
            for (at, _) in held.loaded.iter().filter(|(_, stays)| *stays) {
                let Some(server) = view.places.get(*at).and_then(|place| snapshot.server(&place.id)) else { continue };
                // What we load is kept when that is over.
                if wanted.means(&server.id) && !view.loading.contains(&(model.clone(), server.id.clone())) {
                    self.kept(model, server, held.embeds);
                }
            }
        }
    }

    /// A model stays in a server's memory.
    fn kept(&mut self, model: &ModelName, server: &Server, embeds: bool) {
        let kept = Kept { at: Instant::now(), since: server.since, embeds };
        self.loaded.entry((model.clone(), server.id.clone())).or_insert(kept);
    }

    /// Lets models leave the memory as usual that need not stay there any more, which they would not by themselves.
    fn release(&mut self, wanted: &HashMap<&ModelName, &Wanted>, snapshot: &Arc<Snapshot>) {
        let is_kept = |model: &ModelName, server: &ServerId| {
            wanted.get(model).is_some_and(|wanted| wanted.keep_loaded != KeepLoaded::No && wanted.means(server))
        };
        let mut places = (LOADS * 2).saturating_sub(self.tasks.len());
        let released = self.loaded.extract_if(|(model, server), _| {
            if is_kept(model, server) {
                return false;
            }
            match snapshot.server(server) {
                // Who does not answer, and whose turn it is not, is told later.
                Some(server) if server.state != State::Up => false,
                Some(server) if is_in_memory(server, model) => {
                    let is_turn = places > 0;
                    places = places.saturating_sub(1);
                    is_turn
                }
                _ => true,
            }
        });
        for ((model, server), Kept { embeds, .. }) in released.collect::<Vec<_>>() {
            let (Some(name), Some(server)) = (Name::parse(model.as_str()), snapshot.server(&server).cloned()) else {
                continue;
            };
            // To tell it of one that is gone would load it again.
            if is_in_memory(&server, &model) {
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
            places.push(self.place(server, vitals.as_deref()));
            // What is on its way to one that went comes no more.
            let told = vitals.iter().filter(|_| server.state != State::Down);
            let pulls = told.flat_map(|vitals| &vitals.pending_pulls);
            for (name, done) in pulls.filter_map(|(name, done)| Some((ModelName::parse(name)?, *done))) {
                let Some(size) = names.get(&name) else { continue };
                let left = left_of(*size, done);
                making.entry(name).or_default().push(Making { server: server.id.clone(), left });
            }
        }
        let (mut loading, mut waking) = (HashSet::new(), HashSet::new());
        for going in self.going.values() {
            match &going.action {
                Action::Bring { name, server, size } => {
                    let known = making.entry(name.model().clone()).or_default();
                    if known.iter().all(|making| making.server != *server) {
                        known.push(Making { server: server.clone(), left: *size });
                    }
                }
                Action::Load { name, server, .. } => drop(loading.insert((name.model().clone(), server.clone()))),
                Action::Wake { server } => drop(waking.insert(server.clone())),
            }
        }
        for (deed, rest) in &self.rests {
            if let (Deed::Wake(server), true) = (deed, rest.failures == 0 && rest.until > now) {
                waking.insert(server.clone());
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
        let (models, rests) = (models.collect(), rests.collect());
        View { models, rests, places, making, loading, waking, gone: self.gone.clone() }
    }

    fn place(&self, server: &Server, vitals: Option<&Vitals>) -> Place {
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
            disk_free: vitals.and_then(|vitals| vitals.disk_free),
            disk_begun: vitals.map_or(0, |vitals| vitals.disk_begun),
            agent: match vitals {
                None => Agent::None,
                Some(vitals) if vitals.hides_models => Agent::Takes,
                Some(_) => Agent::Gives,
            },
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
        let running = self.desired.running();
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
                    (Ok(()), _) if again => {
                        if let Some(server) = self.cluster.snapshot().server(&server) {
                            self.kept(name.model(), server, embeds);
                        }
                        self.rest(deed, AGAIN, "it was told to stay".to_owned());
                    }
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
    let (sources, fresh) = givers(known, snapshot);
    let mut held = Held {
        installed: installed.into_iter().filter_map(at).collect(),
        sources: sources.into_iter().filter_map(at).collect(),
        fresh: fresh.into_iter().filter_map(at).collect(),
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

/// The servers that a model can be copied from, and those that it can be copied from when they have told its digest: it has
/// just come there.
fn givers(known: &Known, snapshot: &Snapshot) -> (Vec<usize>, Vec<usize>) {
    let usual = known.usual().map_or("", |usual| usual.digest());
    let (mut sources, mut fresh) = (Vec::new(), Vec::new());
    let servers = known.installed.iter().filter_map(|index| snapshot.servers.get(index));
    for server in servers.filter(|server| server.is_reachable() && shares(server)) {
        match server.report.models.iter().find(|held| held.canonical() == Some(&known.name)) {
            Some(held) if held.digest.is_empty() && held.size == 0 => fresh.push(server.index),
            Some(held) if !held.digest.is_empty() && held.digest == usual => sources.push(server.index),
            _ => {}
        }
    }
    (sources, fresh)
}

/// Whether a server has a model in memory, as far as is known.
fn is_in_memory(server: &Server, model: &ModelName) -> bool {
    server.report.loaded.iter().any(|loaded| ModelName::parse(&loaded.name).as_ref() == Some(model))
}

/// Whether a time is one of those that Ollama tells of models that stay: some centuries from now.
fn is_for_ever(expires_at: &str) -> bool {
    expires_at.get(..4).and_then(|year| year.parse().ok()).is_some_and(|year: u32| year >= 2200)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::sync::{Mutex, PoisonError};

    use olol_middleware::Payload;
    use olol_middleware::cluster::{Member, Model, Report, Source};

    use super::*;
    use crate::reload::Running;

    fn pin(text: &str) -> Wanted {
        toml::from_str(text).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wanted_elsewhere_now_is_brought_there_at_once() {
        let member = |id: &str| Member { id: ServerId::new(id), weight: NonZeroU32::MIN, source: Source::Static };
        let cluster = Cluster::new(vec![member("a"), member("b")]);
        for at in 0..2 {
            cluster.report(at, Report { version: "0.33.0".to_owned(), ..Report::default() });
        }
        cluster.refresh(Duration::ZERO).await;
        let folder = tempfile::tempdir().unwrap();
        let running = Running::new(crate::config::Config::default());
        let desired = Desired::open(running.clone(), Some(folder.path().join("pins.toml")), false).unwrap();
        let begun: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = begun.clone();
        let bring: Bring = Arc::new(move |_, server| {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(server.id.to_string());
            Box::pin(std::future::pending())
        });
        let service = tower::service_fn(|_: Call| std::future::ready(Err::<Reply, _>(Error::busy())));
        let waker = Waker::new(running, cluster.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(Driver::new(desired.clone(), cluster, waker, bring, service).run());
        for (server, wanted) in [("a", &["a"][..]), ("b", &["a", "b"])] {
            desired.pin(pin(&format!("name = \"tiny\"\nservers = [\"{server}\"]"))).await.unwrap();
            let asked = Instant::now();
            while *begun.lock().unwrap() != wanted {
                assert!(asked.elapsed() < Duration::from_secs(5), "what was ended counts as failed: {begun:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_somebody_else_has_loaded_to_stay_is_let_go_when_it_need_not_stay_any_more() {
        let member = Member { id: ServerId::new("a"), weight: NonZeroU32::MIN, source: Source::Static };
        let cluster = Cluster::new(vec![member]);
        let name = "tiny:latest".to_owned();
        let held = Model { name: name.clone(), digest: "1".to_owned(), ..Model::default() };
        let stays = Loaded { name, expires_at: "2319-01-01T00:00:00Z".to_owned(), ..Loaded::default() };
        cluster.report(0, Report { version: "0.33.0".to_owned(), models: vec![held], loaded: vec![stays] });
        cluster.refresh(Duration::ZERO).await;
        let folder = tempfile::tempdir().unwrap();
        let running = Running::new(crate::config::Config::default());
        let desired = Desired::open(running.clone(), Some(folder.path().join("pins.toml")), false).unwrap();
        let bring: Bring = Arc::new(|_, _| Box::pin(std::future::pending()));
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let hears = said.clone();
        let service = tower::service_fn(move |call: Call| {
            let Payload::Whole(pieces) = call.payload else { panic!("it is short") };
            let body = pieces.concat();
            hears.lock().unwrap_or_else(PoisonError::into_inner).push(String::from_utf8(body).unwrap());
            std::future::ready(Err::<Reply, _>(Error::busy()))
        });
        let waker = Waker::new(running, cluster.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(Driver::new(desired.clone(), cluster, waker, bring, service).run());
        desired.pin(pin("name = \"tiny\"\nkeep-loaded = true")).await.unwrap();
        tokio::time::sleep(TICK * 2).await;
        assert!(said.lock().unwrap().is_empty(), "it stays as it is: {said:?}");
        desired.unpin(&ModelName::parse("tiny").unwrap()).await.unwrap();
        tokio::time::sleep(TICK * 2).await;
        let said = said.lock().unwrap().clone();
        assert!(said.len() == 1 && said[0].contains("\"keep_alive\":\"5m\""), "{said:?}");
    }
}
