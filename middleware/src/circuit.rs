//! Circuit breakers: who is left alone after failures, a whole server or one model on it, and for how long.
//!
//! The calls themselves are the evidence: `pick` tells a [`Trial`] how each of them went at its server. `retry` keeps calls
//! away from what is open, and lets one through when the time is over, to find out. A failure counts against the model that
//! was asked for, on that server; the server as a whole is left alone when it takes no connection, or when several of its
//! models fail and none answers. Who is slow to begin has not failed, since models load for minutes; only a model that is in
//! memory, asked for a stream, and silent towards everybody for as long as [`Limits::hang`], has.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::StatusCode;
use tokio::time::Instant;

use crate::call::{Call, End};
use crate::cluster::Server;
use crate::error::{Error, Phase};
use crate::instruments::ServerMeters;
use crate::names::{ModelName, ServerId};
use crate::route::Dialect;

/// Models of one server whose calls are followed; beyond them only the server is.
const MOST_MODELS: usize = 4096;
/// The share of its calls that the ramp begins with.
const FIRST_SHARE: f32 = 0.1;
/// Models of a server that must fail, while none of them answers, before it is the server that has failed.
const MODELS_TO_OPEN: u32 = 2;

/// By which rules servers are judged: a part of the `[retry]` table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Failures in a row that open a circuit.
    pub failures: u32,
    /// How long it is open at first; twice as long after each probe that fails.
    pub open: Duration,
    /// The longest that it is open.
    pub longest: Duration,
    /// How long it takes until it has its full share again.
    pub ramp: Duration,
    /// Silence of a loaded model after which it has failed.
    pub hang: Duration,
}

/// Whether a call may go somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Yes,
    /// It may not, while there are others.
    No,
    /// One call may, to find out whether all is well again.
    Probe,
}

/// The circuits of one server. Lives beside the snapshots of the cluster, not in them.
#[derive(Debug)]
pub struct Circuits {
    id: ServerId,
    meters: Arc<ServerMeters>,
    server: Circuit,
    models: ArcSwap<HashMap<ModelName, Arc<Circuit>>>,
    /// Circuits that are not closed.
    restless: AtomicU32,
    /// Circuits of models that opened since a model answered here.
    opened_models: AtomicU32,
}

/// One circuit. Its state is behind a lock that nobody takes while all is well.
#[derive(Debug, Default)]
struct Circuit {
    /// What the state is, to be read without the lock.
    mood: AtomicU8,
    state: Mutex<State>,
    /// Answers that have begun here.
    heard: AtomicU32,
    /// Answers that have begun, and are not over.
    answering: AtomicU32,
}

#[derive(Debug, Default)]
struct State {
    stage: Stage,
    /// Failures since the last success.
    failures: u32,
    /// How often it opened since it was last well.
    openings: u32,
    /// Whether it opened because nobody was there.
    is_unreachable: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    /// One call is finding out.
    Probing {
        since: Instant,
    },
    /// All is well again, and the share of calls grows.
    Ramping {
        since: Instant,
    },
}

/// No failure since the last success.
const WELL: u8 = 0;
/// Closed, with failures.
const SHAKEN: u8 = 1;
const OPEN: u8 = 2;
const PROBING: u8 = 3;
const RAMPING: u8 = 4;

impl State {
    fn mood(&self) -> u8 {
        match self.stage {
            Stage::Closed if self.failures == 0 => WELL,
            Stage::Closed => SHAKEN,
            Stage::Open { .. } => OPEN,
            Stage::Probing { .. } => PROBING,
            Stage::Ramping { .. } => RAMPING,
        }
    }

    /// Counts a failure; true if that opened the circuit. `outright`: one is enough.
    fn failed(&mut self, limits: &Limits, outright: bool) -> bool {
        let now = Instant::now();
        self.failures += 1;
        match self.stage {
            Stage::Closed if !outright && self.failures < limits.failures => return false,
            // What was under way when it opened tells nothing new.
            Stage::Open { until } if until > now => return false,
            _ => {}
        }
        let doubled = limits.open.saturating_mul(1 << self.openings.min(16)).min(limits.longest.max(limits.open));
        // Those that failed together do not come back together.
        self.stage = Stage::Open { until: now + doubled.mul_f32(0.8 + 0.4 * fastrand::f32()) };
        self.openings += 1;
        self.is_unreachable = outright;
        true
    }
}

impl Circuit {
    fn mood(&self) -> u8 {
        self.mood.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Circuits {
    /// The circuits of a server, all closed.
    pub fn new(id: ServerId, meters: Arc<ServerMeters>) -> Self {
        Self {
            id,
            meters,
            server: Circuit::default(),
            models: ArcSwap::default(),
            restless: AtomicU32::new(0),
            opened_models: AtomicU32::new(0),
        }
    }

    /// Whether any circuit here is not closed.
    pub fn are_restless(&self) -> bool {
        self.restless.load(Ordering::Relaxed) != 0
    }

    /// Whether the server as a whole is left alone now.
    pub fn is_server_open(&self) -> bool {
        match self.server.mood() {
            OPEN => matches!(self.server.lock().stage, Stage::Open { until } if until > Instant::now()),
            PROBING => true,
            _ => false,
        }
    }

    /// Whether the server is left alone because it could not be reached.
    pub fn is_server_unreachable(&self) -> bool {
        self.is_server_open() && self.server.lock().is_unreachable
    }

    /// The circuit of the server for its metric: 0 closed, 1 open, 2 half-open.
    pub fn server_state(&self) -> u8 {
        match self.server.mood() {
            OPEN if self.is_server_open() => 1,
            OPEN | PROBING => 2,
            _ => 0,
        }
    }

    /// Whether a call for a model may come here now.
    pub fn admit(&self, model: Option<&ModelName>, limits: &Limits) -> Admission {
        let server = self.admit_to(&self.server, limits);
        let models = self.models.load();
        let model = model.and_then(|model| models.get(model));
        match (server, model.map_or(Admission::Yes, |circuit| self.admit_to(circuit, limits))) {
            (Admission::No, _) | (_, Admission::No) => Admission::No,
            (Admission::Yes, Admission::Yes) => Admission::Yes,
            _ => Admission::Probe,
        }
    }

    /// Takes the one place of a call that finds out; false if another has it.
    pub fn begin_probe(&self, model: Option<&ModelName>, limits: &Limits) -> bool {
        let models = self.models.load();
        let model = model.and_then(|model| models.get(model)).map(|circuit| &**circuit);
        let mut begun = false;
        for circuit in [Some(&self.server), model].into_iter().flatten() {
            if self.admit_to(circuit, limits) == Admission::Probe {
                self.change(circuit, |state| {
                    // Another may have been quicker.
                    if is_due(state.stage, limits) {
                        state.stage = Stage::Probing { since: Instant::now() };
                        begun = true;
                    }
                });
            }
        }
        begun
    }

    fn admit_to(&self, circuit: &Circuit, limits: &Limits) -> Admission {
        match circuit.mood() {
            WELL | SHAKEN => return Admission::Yes,
            RAMPING => {}
            _ => return if is_due(circuit.lock().stage, limits) { Admission::Probe } else { Admission::No },
        }
        let mut share = 1.0;
        self.change(circuit, |state| {
            if let Stage::Ramping { since } = state.stage {
                let passed = since.elapsed();
                if passed >= limits.ramp {
                    *state = State { failures: state.failures, ..State::default() };
                } else {
                    share = FIRST_SHARE + (1.0 - FIRST_SHARE) * passed.as_secs_f32() / limits.ramp.as_secs_f32();
                }
            }
        });
        if fastrand::f32() < share { Admission::Yes } else { Admission::No }
    }

    /// A model on this server has failed, by what an answer of it says.
    pub fn failed(&self, model: Option<&ModelName>, limits: &Limits) {
        self.fail(model.and_then(|model| self.model(model)).as_deref(), model, limits);
    }

    /// The server was asked for its state, and told it. Who could not be reached is tried again at once; who says how it
    /// is, but does not do its work, is not.
    pub(crate) fn seen_well(&self) {
        if self.server.mood() == OPEN {
            self.change(&self.server, |state| {
                if state.is_unreachable && matches!(state.stage, Stage::Open { .. }) {
                    state.stage = Stage::Open { until: Instant::now() };
                }
            });
        }
    }

    /// The circuit of a model; `None` if there are too many.
    fn model(&self, name: &ModelName) -> Option<Arc<Circuit>> {
        if let Some(circuit) = self.models.load().get(name) {
            return Some(circuit.clone());
        }
        self.models.rcu(|models| {
            let mut models = HashMap::clone(models);
            if models.len() >= MOST_MODELS {
                models.retain(|_, circuit| circuit.mood() != WELL || circuit.answering.load(Ordering::Relaxed) > 0);
            }
            if models.len() < MOST_MODELS {
                models.entry(name.clone()).or_default();
            }
            models
        });
        self.models.load().get(name).cloned()
    }

    /// Counts a failure against a model, or against the server where no model was asked for.
    fn fail(&self, circuit: Option<&Circuit>, model: Option<&ModelName>, limits: &Limits) {
        let Some(circuit) = circuit else { return self.fail_server(limits, false) };
        if self.change(circuit, |state| state.failed(limits, false)) {
            self.meters.opened("model");
            let model = model.map(tracing::field::display);
            tracing::warn!(server = %self.id, model, "a model fails on a server: it is left alone there for a while");
            if self.opened_models.fetch_add(1, Ordering::Relaxed) + 1 >= MODELS_TO_OPEN {
                self.opened_models.store(0, Ordering::Relaxed);
                self.open_server(limits, false);
            }
        }
    }

    fn fail_server(&self, limits: &Limits, is_unreachable: bool) {
        if self.change(&self.server, |state| state.failed(limits, is_unreachable)) {
            self.told_open();
        }
    }

    fn open_server(&self, limits: &Limits, is_unreachable: bool) {
        let opened = self.change(&self.server, |state| {
            let opened = state.failed(limits, true);
            state.is_unreachable = is_unreachable;
            opened
        });
        if opened {
            self.told_open();
        }
    }

    fn told_open(&self) {
        self.meters.opened("server");
        tracing::warn!(server = %self.id, "a server fails: it is left alone for a while");
    }

    /// An answer has begun, or was whole.
    fn succeeded(&self, circuit: &Circuit, is_whole: bool) {
        match circuit.mood() {
            SHAKEN if is_whole => self.change(circuit, |state| state.failures = 0),
            PROBING => self.change(circuit, |state| {
                if let Stage::Probing { .. } = state.stage {
                    state.failures = 0;
                    state.stage = Stage::Ramping { since: Instant::now() };
                }
            }),
            _ => {}
        }
    }

    /// A call that found out nothing is over: another may find out.
    fn give_back(&self, circuit: &Circuit) {
        if circuit.mood() == PROBING {
            self.change(circuit, |state| {
                if let Stage::Probing { .. } = state.stage {
                    state.stage = Stage::Open { until: Instant::now() };
                }
            });
        }
    }

    /// Changes the state of a circuit: the only way to do so.
    fn change<T>(&self, circuit: &Circuit, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = circuit.lock();
        let was_closed = state.stage == Stage::Closed;
        let changed = change(&mut state);
        circuit.mood.store(state.mood(), Ordering::Relaxed);
        match (was_closed, state.stage == Stage::Closed) {
            (true, false) => drop(self.restless.fetch_add(1, Ordering::Relaxed)),
            (false, true) => drop(self.restless.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        changed
    }
}

/// Whether a call may find out. One that never told counts as lost after the longest time.
fn is_due(stage: Stage, limits: &Limits) -> bool {
    match stage {
        Stage::Open { until } => until <= Instant::now(),
        Stage::Probing { since } => since.elapsed() >= limits.longest,
        Stage::Closed | Stage::Ramping { .. } => false,
    }
}

/// One call at one server, followed to its end. Dropped before, it has told nothing, but perhaps by its silence.
#[derive(Debug)]
pub struct Trial {
    circuits: Arc<Circuits>,
    limits: Arc<Limits>,
    model: Option<(ModelName, Arc<Circuit>)>,
    infers: bool,
    asked: Instant,
    /// What had been heard of the model when it was asked; `None` where silence is no sign.
    heard: Option<u32>,
    course: Course,
}

/// How far a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    Asked,
    Answering,
    /// What it has said tells neither good nor bad.
    Vague,
    Over,
}

impl Trial {
    /// A call is about to be sent; `None` if nobody wants it judged.
    pub fn of(call: &Call, server: &Server) -> Option<Self> {
        let limits = call.limits.clone()?;
        let infers = call.route.infers();
        let known = call.known.as_ref().filter(|_| infers);
        let model = known.and_then(|known| Some((known.name.clone(), server.circuits.model(&known.name)?)));
        let streams = call.peek.stream.unwrap_or(call.route.dialect() == Dialect::Ollama) && call.route.streams();
        let is_loaded = known.is_some_and(|known| known.loaded.contains(server.index));
        let heard = model.as_ref().filter(|_| streams && is_loaded);
        let heard = heard.map(|(_, circuit)| circuit.heard.load(Ordering::Relaxed));
        let circuits = server.circuits.clone();
        Some(Self { circuits, limits, model, infers, asked: Instant::now(), heard, course: Course::Asked })
    }

    /// There is no answer.
    pub fn failed(mut self, error: &Error) {
        self.course = Course::Over;
        match error {
            Error::Server { phase: Phase::Connecting, .. } => self.circuits.fail_server(&self.limits, true),
            // A pooled connection that had died says nothing about its server.
            Error::Server { reused: false, .. } => self.fail(),
            _ => self.give_back(),
        }
    }

    /// The head of an answer is here.
    pub fn answered(&mut self, status: StatusCode) {
        match status {
            StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
                self.course = Course::Over;
                self.fail();
            }
            // The request itself may be the reason: `retry` looks into it.
            StatusCode::INTERNAL_SERVER_ERROR => self.course = Course::Vague,
            _ => {
                self.course = Course::Answering;
                if let Some((_, circuit)) = &self.model {
                    circuit.heard.fetch_add(1, Ordering::Relaxed);
                    circuit.answering.fetch_add(1, Ordering::Relaxed);
                }
                self.succeeded(false);
            }
        }
    }

    /// The answer is over.
    pub fn ended(&mut self, end: End) {
        let course = std::mem::replace(&mut self.course, Course::Over);
        if course == Course::Answering
            && let Some((_, circuit)) = &self.model
        {
            circuit.answering.fetch_sub(1, Ordering::Relaxed);
        }
        match (course, end) {
            (Course::Answering, End::Whole) => self.succeeded(true),
            (Course::Answering | Course::Vague, End::Broken(_)) => self.fail(),
            (Course::Answering | Course::Vague, _) => self.give_back(),
            (Course::Asked | Course::Over, _) => {}
        }
    }

    fn succeeded(&self, is_whole: bool) {
        if let Some((_, circuit)) = &self.model {
            self.circuits.succeeded(circuit, is_whole);
            if self.circuits.opened_models.load(Ordering::Relaxed) != 0 {
                self.circuits.opened_models.store(0, Ordering::Relaxed);
            }
        }
        // A server that answers questions about itself may still not do its work.
        let server = &self.circuits.server;
        if self.infers || (server.mood() != WELL && server.lock().is_unreachable) {
            self.circuits.succeeded(server, is_whole);
        }
    }

    fn fail(&self) {
        let (name, circuit) = self.model.as_ref().map(|(name, circuit)| (name, &**circuit)).unzip();
        self.circuits.fail(circuit, name, &self.limits);
        // Whoever was to find out about the server has found out.
        if circuit.is_some() && self.circuits.server.mood() == PROBING {
            self.circuits.fail_server(&self.limits, false);
        }
    }

    fn give_back(&self) {
        self.circuits.give_back(&self.circuits.server);
        if let Some((_, circuit)) = &self.model {
            self.circuits.give_back(circuit);
        }
    }

    /// Whether the model has been silent for too long, towards everybody.
    fn was_silence(&self) -> bool {
        let (Some(heard), Some((_, circuit))) = (self.heard, &self.model) else { return false };
        self.asked.elapsed() >= self.limits.hang
            && circuit.heard.load(Ordering::Relaxed) == heard
            && circuit.answering.load(Ordering::Relaxed) == 0
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        match self.course {
            Course::Asked if self.was_silence() => self.fail(),
            Course::Asked => self.give_back(),
            _ => self.ended(End::Dropped),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn limits() -> Limits {
        Limits {
            failures: 3,
            open: Duration::from_secs(1),
            longest: Duration::from_secs(60),
            ramp: Duration::from_secs(10),
            hang: Duration::from_secs(30),
        }
    }

    /// A call for a model on the first of two servers, which has it in memory, followed.
    async fn trial(cluster: &Arc<crate::Cluster>, model: &str) -> Trial {
        let name = ModelName::parse(model).unwrap();
        cluster.note_loaded(&ServerId::new("0"), &name, true);
        tokio::time::sleep(Duration::from_millis(60)).await;
        let mut call = testing::call_in(cluster, model);
        call.known = cluster.snapshot().known(&name).cloned();
        call.limits = Some(Arc::new(limits()));
        Trial::of(&call, &cluster.snapshot().servers[0]).unwrap()
    }

    fn cut() -> Error {
        testing::failure("0", Phase::Waiting, false)
    }

    fn circuits(cluster: &crate::Cluster) -> Arc<Circuits> {
        cluster.snapshot().servers[0].circuits.clone()
    }

    fn admit(circuits: &Circuits, model: &str) -> Admission {
        circuits.admit(ModelName::parse(model).as_ref(), &limits())
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_model_is_left_alone_and_its_server_is_not() {
        let cluster = testing::cluster(&[&["tiny", "big"], &[]]).await;
        let circuits = circuits(&cluster);
        for _ in 0..3 {
            assert_eq!(admit(&circuits, "tiny"), Admission::Yes);
            trial(&cluster, "tiny").await.failed(&cut());
        }
        assert_eq!((admit(&circuits, "tiny"), admit(&circuits, "big")), (Admission::No, Admission::Yes));
        assert!(!circuits.is_server_open() && circuits.are_restless());
        trial(&cluster, "big").await.answered(StatusCode::OK);
        assert_eq!(admit(&circuits, "big"), Admission::Yes);
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_between_failures_keeps_a_circuit_closed() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        for _ in 0..9 {
            trial(&cluster, "tiny").await.failed(&cut());
            trial(&cluster, "tiny").await.failed(&cut());
            let mut whole = trial(&cluster, "tiny").await;
            whole.answered(StatusCode::OK);
            whole.ended(End::Whole);
        }
        assert_eq!(admit(&circuits(&cluster), "tiny"), Admission::Yes);
    }

    #[tokio::test(start_paused = true)]
    async fn several_models_that_fail_while_none_answers_are_a_server_that_fails() {
        let cluster = testing::cluster(&[&["tiny", "big"], &[]]).await;
        for model in ["tiny", "big"] {
            for _ in 0..3 {
                trial(&cluster, model).await.failed(&cut());
            }
        }
        let circuits = circuits(&cluster);
        assert!(circuits.is_server_open() && !circuits.is_server_unreachable());
        // That it tells how it is changes nothing.
        circuits.seen_well();
        assert!(circuits.is_server_open());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_takes_no_connection_is_left_alone_until_it_tells_of_itself() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let circuits = circuits(&cluster);
        trial(&cluster, "tiny").await.failed(&testing::failure("0", Phase::Connecting, false));
        assert!(circuits.is_server_open());
        assert_eq!((admit(&circuits, "tiny"), circuits.server_state()), (Admission::No, 1));
        circuits.seen_well();
        assert_eq!((admit(&circuits, "tiny"), circuits.server_state()), (Admission::Probe, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_finds_out_and_then_the_share_grows() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let (circuits, tiny) = (circuits(&cluster), ModelName::parse("tiny"));
        for _ in 0..3 {
            trial(&cluster, "tiny").await.failed(&cut());
        }
        tokio::time::advance(Duration::from_millis(1300)).await;
        assert_eq!(admit(&circuits, "tiny"), Admission::Probe);
        assert!(circuits.begin_probe(tiny.as_ref(), &limits()));
        assert!(!circuits.begin_probe(tiny.as_ref(), &limits()));
        assert_eq!(admit(&circuits, "tiny"), Admission::No);
        let mut probe = trial(&cluster, "tiny").await;
        probe.answered(StatusCode::OK);
        let admitted = || (0..1000).filter(|_| admit(&circuits, "tiny") == Admission::Yes).count();
        let at_first = admitted();
        assert!((50..200).contains(&at_first), "{at_first}");
        tokio::time::advance(Duration::from_secs(5)).await;
        let later = admitted();
        assert!((450..650).contains(&later), "{later}");
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!((admitted(), circuits.are_restless()), (1000, false));
    }

    #[tokio::test(start_paused = true)]
    async fn each_probe_that_fails_doubles_the_time() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let (circuits, tiny) = (circuits(&cluster), ModelName::parse("tiny"));
        for _ in 0..3 {
            trial(&cluster, "tiny").await.failed(&cut());
        }
        for seconds in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0] {
            tokio::time::advance(Duration::from_secs_f32(seconds * 0.75)).await;
            assert_eq!(admit(&circuits, "tiny"), Admission::No, "{seconds} s");
            tokio::time::advance(Duration::from_secs_f32(seconds * 0.5)).await;
            assert!(circuits.begin_probe(tiny.as_ref(), &limits()), "{seconds} s");
            trial(&cluster, "tiny").await.failed(&cut());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_whose_client_leaves_lets_another_find_out() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let (circuits, tiny) = (circuits(&cluster), ModelName::parse("tiny"));
        for _ in 0..3 {
            trial(&cluster, "tiny").await.failed(&cut());
        }
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(circuits.begin_probe(tiny.as_ref(), &limits()));
        drop(trial(&cluster, "tiny").await);
        assert_eq!(admit(&circuits, "tiny"), Admission::Probe);
    }

    #[tokio::test(start_paused = true)]
    async fn a_loaded_model_that_is_silent_towards_everybody_has_failed() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let circuits = circuits(&cluster);
        let waits = [trial(&cluster, "tiny").await, trial(&cluster, "tiny").await, trial(&cluster, "tiny").await];
        tokio::time::advance(Duration::from_secs(30)).await;
        drop(waits);
        assert_eq!(admit(&circuits, "tiny"), Admission::No);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_answers_others_meanwhile_is_only_busy() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let circuits = circuits(&cluster);
        let mut busy_with = trial(&cluster, "tiny").await;
        busy_with.answered(StatusCode::OK);
        let waits = [trial(&cluster, "tiny").await, trial(&cluster, "tiny").await, trial(&cluster, "tiny").await];
        tokio::time::advance(Duration::from_secs(90)).await;
        drop(waits);
        assert_eq!(admit(&circuits, "tiny"), Admission::Yes);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_loads_may_take_its_time() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let mut call = testing::call_in(&cluster, "tiny");
        call.known = cluster.snapshot().known(&ModelName::parse("tiny").unwrap()).cloned();
        call.limits = Some(Arc::new(limits()));
        let server = cluster.snapshot().servers[0].clone();
        let loads: Vec<_> = (0..5).map(|_| Trial::of(&call, &server).unwrap()).collect();
        tokio::time::advance(Duration::from_secs(600)).await;
        drop(loads);
        assert!(!server.circuits.are_restless());
    }
}
