//! Circuit breakers: who is left alone after failures, a whole server or one model on it, and for how long.
//!
//! The calls themselves are the evidence: `pick` tells a [`Trial`] how each of them went at its server. `retry` keeps calls
//! away from what is open, and lets one through when the time is over, to find out. A failure counts against the model that
//! was asked for, on that server; the server as a whole is left alone when it takes no connection, or when several of its
//! models fail and none answers. Who is slow to begin has not failed, since models load for minutes; only a model that is in
//! memory, asked for a stream, and silent towards everybody for as long as [`Limits::hang`], has. Where `timeout` gives a
//! first byte less time than that, it has failed when that time is over. That a client leaves earlier says nothing.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::StatusCode;
use tokio::time::Instant;

use crate::call::{Call, End, Head};
use crate::cluster::{Known, Server};
use crate::error::{Error, Phase};
use crate::instruments::ServerMeters;
use crate::names::{ModelName, ServerId};
use crate::route::Dialect;
use crate::runner::Runner;

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

/// The circuit of one server, and what is known of those of its models. Lives beside the snapshots of the cluster, not in
/// them; the circuits of the models are in their runners.
#[derive(Debug)]
pub struct Circuits {
    id: ServerId,
    meters: Arc<ServerMeters>,
    server: Circuit,
    /// Circuits that are not closed.
    restless: Arc<AtomicU32>,
    /// Circuits of models that opened since a model answered here.
    opened_models: AtomicU32,
}

/// One circuit. Its state is behind a lock that nobody takes while all is well.
#[derive(Debug)]
pub(crate) struct Circuit {
    /// What the state is, to be read without the lock.
    mood: AtomicU8,
    state: Mutex<State>,
    /// Answers that have begun here.
    heard: AtomicU32,
    /// Circuits of the same server that are not closed.
    restless: Arc<AtomicU32>,
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
    /// When it was last closed.
    left: Option<SystemTime>,
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
    fn new(restless: Arc<AtomicU32>) -> Self {
        Self { mood: AtomicU8::new(WELL), state: Mutex::default(), heard: AtomicU32::new(0), restless }
    }

    fn mood(&self) -> u8 {
        self.mood.load(Ordering::Relaxed)
    }

    /// Its state for pages and metrics: 0 closed, 1 open, 2 half-open.
    pub(crate) fn number(&self) -> u8 {
        match self.mood() {
            OPEN if matches!(self.lock().stage, Stage::Open { until } if until > Instant::now()) => 1,
            OPEN | PROBING => 2,
            _ => 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state: the only way to do so.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let was_closed = state.stage == Stage::Closed;
        let changed = change(&mut state);
        if was_closed && state.stage != Stage::Closed {
            state.left = Some(SystemTime::now());
        }
        self.mood.store(state.mood(), Ordering::Relaxed);
        match (was_closed, state.stage == Stage::Closed) {
            (true, false) => drop(self.restless.fetch_add(1, Ordering::Relaxed)),
            (false, true) => drop(self.restless.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        changed
    }

    fn admit(&self, limits: &Limits) -> Admission {
        match self.mood() {
            WELL | SHAKEN => return Admission::Yes,
            RAMPING => {}
            _ => return if is_due(self.lock().stage, limits) { Admission::Probe } else { Admission::No },
        }
        let mut share = 1.0;
        self.change(|state| {
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

    /// Takes the one place of a call that finds out; false if it is not time for that, or another has it.
    fn begin_probe(&self, limits: &Limits) -> bool {
        self.admit(limits) == Admission::Probe
            && self.change(|state| {
                // Another may have been quicker.
                let is_due = is_due(state.stage, limits);
                if is_due {
                    state.stage = Stage::Probing { since: Instant::now() };
                }
                is_due
            })
    }

    /// An answer has begun, or was whole.
    fn succeeded(&self, is_whole: bool) {
        match self.mood() {
            SHAKEN if is_whole => self.change(|state| state.failures = 0),
            PROBING => self.change(|state| {
                if let Stage::Probing { .. } = state.stage {
                    state.failures = 0;
                    state.stage = Stage::Ramping { since: Instant::now() };
                }
            }),
            _ => {}
        }
    }

    /// A call that found out nothing is over: another may find out.
    fn give_back(&self) {
        if self.mood() == PROBING {
            self.change(|state| {
                if let Stage::Probing { .. } = state.stage {
                    state.stage = Stage::Open { until: Instant::now() };
                }
            });
        }
    }
}

impl Drop for Circuit {
    fn drop(&mut self) {
        if self.mood() >= OPEN {
            self.restless.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Circuits {
    /// The circuits of a server, all closed.
    pub fn new(id: ServerId, meters: Arc<ServerMeters>) -> Self {
        let restless: Arc<AtomicU32> = Arc::default();
        Self { id, meters, server: Circuit::new(restless.clone()), restless, opened_models: AtomicU32::new(0) }
    }

    /// A circuit for a model on this server.
    pub(crate) fn of_model(&self) -> Circuit {
        Circuit::new(self.restless.clone())
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

    /// When the circuit of the server opened, if it is not closed.
    pub fn server_since(&self) -> Option<SystemTime> {
        if self.server.mood() <= SHAKEN {
            return None;
        }
        self.server.lock().left
    }

    /// The circuit of the server for its metric: 0 closed, 1 open, 2 half-open.
    pub fn server_state(&self) -> u8 {
        match self.server.mood() {
            OPEN if self.is_server_open() => 1,
            OPEN | PROBING => 2,
            _ => 0,
        }
    }

    /// Whether a call may come here now, perhaps for a model.
    pub fn admit(&self, runner: Option<&Runner>, limits: &Limits) -> Admission {
        let model = runner.map_or(Admission::Yes, |runner| runner.circuit.admit(limits));
        match (self.server.admit(limits), model) {
            (Admission::No, _) | (_, Admission::No) => Admission::No,
            (Admission::Yes, Admission::Yes) => Admission::Yes,
            _ => Admission::Probe,
        }
    }

    /// Takes the one place of a call that finds out; false if another has it.
    pub fn begin_probe(&self, runner: Option<&Runner>, limits: &Limits) -> bool {
        let server = self.server.begin_probe(limits);
        runner.is_some_and(|runner| runner.circuit.begin_probe(limits)) || server
    }

    /// The call that was to find out was not sent, or has found out nothing.
    pub fn give_back(&self, runner: Option<&Runner>) {
        self.server.give_back();
        if let Some(runner) = runner {
            runner.circuit.give_back();
        }
    }

    /// A model on this server has failed, or the server where no model was asked for.
    pub fn failed(&self, model: Option<(&ModelName, &Runner)>, limits: &Limits) {
        let Some((name, runner)) = model else { return self.server_failed(limits, false) };
        if runner.circuit.change(|state| state.failed(limits, false)) {
            self.meters.opened("model");
            tracing::warn!(server = %self.id, model = %name, "a model fails on a server: it is left alone there for a while");
            if self.opened_models.fetch_add(1, Ordering::Relaxed) + 1 >= MODELS_TO_OPEN {
                self.opened_models.store(0, Ordering::Relaxed);
                self.server_failed(limits, true);
                self.server.change(|state| state.is_unreachable = false);
            }
        }
    }

    /// The server itself has failed. `outright`: once is enough, since nobody is there.
    fn server_failed(&self, limits: &Limits, outright: bool) {
        if self.server.change(|state| state.failed(limits, outright)) {
            self.meters.opened("server");
            tracing::warn!(server = %self.id, "a server fails: it is left alone for a while");
        }
    }

    /// The server was asked for its state, and told it. Who could not be reached is tried again at once; who says how it
    /// is, but does not do its work, is not.
    pub(crate) fn seen_well(&self) {
        if self.server.mood() == OPEN {
            self.server.change(|state| {
                if state.is_unreachable && matches!(state.stage, Stage::Open { .. }) {
                    state.stage = Stage::Open { until: Instant::now() };
                }
            });
        }
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
pub(crate) struct Trial {
    head: Arc<Head>,
    server: Arc<Server>,
    limits: Arc<Limits>,
    model: Option<(ModelName, Arc<Runner>)>,
    infers: bool,
    asked: Instant,
    /// What had been heard of the model when it was asked; `None` where silence is no sign.
    heard: Option<u32>,
    /// Whether the first piece of its answer comes long before the last.
    streams: bool,
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
    /// A call is about to be sent, perhaps for a model; `None` if nobody wants it judged.
    pub(crate) fn of(call: &Call, server: &Arc<Server>, model: Option<(&Known, &Arc<Runner>)>) -> Option<Self> {
        let limits = call.limits.clone()?;
        let streams = call.peek.stream.unwrap_or(call.route.dialect() == Dialect::Ollama) && call.route.streams();
        // Who loads a model may be silent, and so may who makes a long answer in one piece. Embeddings are not long.
        let is_soon = streams || !call.route.streams();
        let tells = model.filter(|(known, _)| is_soon && known.loaded.contains(server.index));
        let heard = tells.map(|(_, runner)| runner.circuit.heard.load(Ordering::Relaxed));
        Some(Self {
            head: call.head.clone(),
            server: server.clone(),
            limits,
            model: model.map(|(known, runner)| (known.name.clone(), runner.clone())),
            infers: call.route.infers(),
            asked: Instant::now(),
            heard,
            streams,
            course: Course::Asked,
        })
    }

    /// There is no answer.
    pub(crate) fn failed(mut self, error: &Error) {
        self.course = Course::Over;
        match error {
            Error::Server { phase: Phase::Connecting, .. } => self.server.circuits.server_failed(&self.limits, true),
            // A pooled connection that had died says nothing about its server.
            Error::Server { reused: false, .. } => self.fail(),
            _ => self.give_back(),
        }
    }

    /// The head of an answer is here.
    pub(crate) fn answered(&mut self, status: StatusCode) {
        match status {
            StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
                self.course = Course::Over;
                self.fail();
            }
            // The request itself may be the reason: `retry` looks into it.
            StatusCode::INTERNAL_SERVER_ERROR => self.course = Course::Vague,
            _ => {
                self.course = Course::Answering;
                if let Some((_, runner)) = &self.model {
                    runner.circuit.heard.fetch_add(1, Ordering::Relaxed);
                }
                self.succeeded(false);
            }
        }
    }

    /// The answer is over.
    pub(crate) fn ended(&mut self, end: End) {
        match (std::mem::replace(&mut self.course, Course::Over), end) {
            (Course::Answering, End::Whole) => self.succeeded(true),
            (Course::Answering | Course::Vague, End::Broken(_)) => self.fail(),
            (Course::Answering | Course::Vague, _) => self.give_back(),
            (Course::Asked | Course::Over, _) => {}
        }
    }

    fn succeeded(&self, is_whole: bool) {
        let circuits = &self.server.circuits;
        if let Some((_, runner)) = &self.model {
            runner.circuit.succeeded(is_whole);
            if circuits.opened_models.load(Ordering::Relaxed) != 0 {
                circuits.opened_models.store(0, Ordering::Relaxed);
            }
        }
        // A server that answers questions about itself may still not do its work.
        if self.infers || (circuits.server.mood() != WELL && circuits.server.lock().is_unreachable) {
            circuits.server.succeeded(is_whole);
        }
    }

    fn fail(&self) {
        let circuits = &self.server.circuits;
        let model = self.model.as_ref().map(|(name, runner)| (name, &**runner));
        circuits.failed(model, &self.limits);
        // Whoever was to find out about the server has found out.
        if model.is_some() && circuits.server.mood() == PROBING {
            circuits.server_failed(&self.limits, false);
        }
    }

    fn give_back(&self) {
        self.server.circuits.give_back(self.model.as_ref().map(|(_, runner)| &**runner));
    }

    /// Whether the model has been silent for too long, towards everybody.
    fn was_silence(&self) -> bool {
        let (Some(heard), Some((_, runner))) = (self.heard, &self.model) else { return false };
        let given_up = self.head.given_up.get();
        // Of the time that is over, the server must have had the better part: the rest was a queue's, or another server's.
        let least = match (given_up, self.streams) {
            (Some(limit), true) => self.limits.hang.min(*limit / 2),
            (Some(limit), false) => *limit / 2,
            (None, true) => self.limits.hang,
            (None, false) => return false,
        };
        self.asked.elapsed() >= least
            && runner.circuit.heard.load(Ordering::Relaxed) == heard
            && runner.answering() == 0
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        match self.course {
            Course::Asked if self.was_silence() => {
                let runner = self.model.as_ref().map(|(_, runner)| runner);
                self.server.record.bad(runner, &"a model in memory said nothing to anybody");
                self.fail();
            }
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
        cluster.catch_up().await;
        followed(cluster, &name)
    }

    fn followed(cluster: &Arc<crate::Cluster>, name: &ModelName) -> Trial {
        let mut call = testing::call_in(cluster, name.as_str());
        call.limits = Some(Arc::new(limits()));
        let snapshot = cluster.snapshot();
        let (server, known) = (&snapshot.servers[0], snapshot.known(name).unwrap());
        Trial::of(&call, server, Some((known, &known.runners.at(server)))).unwrap()
    }

    fn runner(cluster: &crate::Cluster, model: &str) -> Arc<Runner> {
        let snapshot = cluster.snapshot();
        snapshot.known(&ModelName::parse(model).unwrap()).unwrap().runners.at(&snapshot.servers[0])
    }

    fn cut() -> Error {
        testing::failure("0", Phase::Waiting, false)
    }

    fn circuits(cluster: &crate::Cluster) -> Arc<Circuits> {
        cluster.snapshot().servers[0].circuits.clone()
    }

    fn admit(cluster: &crate::Cluster, model: &str) -> Admission {
        circuits(cluster).admit(Some(&runner(cluster, model)), &limits())
    }

    fn begin_probe(cluster: &crate::Cluster) -> bool {
        circuits(cluster).begin_probe(Some(&runner(cluster, "tiny")), &limits())
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_model_is_left_alone_and_its_server_is_not() {
        let cluster = testing::cluster(&[&["tiny", "big"], &[]]).await;
        let circuits = circuits(&cluster);
        for _ in 0..3 {
            assert_eq!(admit(&cluster, "tiny"), Admission::Yes);
            trial(&cluster, "tiny").await.failed(&cut());
        }
        assert_eq!((admit(&cluster, "tiny"), admit(&cluster, "big")), (Admission::No, Admission::Yes));
        assert!(!circuits.is_server_open() && circuits.are_restless());
        trial(&cluster, "big").await.answered(StatusCode::OK);
        assert_eq!(admit(&cluster, "big"), Admission::Yes);
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
        assert_eq!(admit(&cluster, "tiny"), Admission::Yes);
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
        assert_eq!((admit(&cluster, "tiny"), circuits.server_state()), (Admission::No, 1));
        circuits.seen_well();
        assert_eq!((admit(&cluster, "tiny"), circuits.server_state()), (Admission::Probe, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_finds_out_and_then_the_share_grows() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let circuits = circuits(&cluster);
        for _ in 0..3 {
            trial(&cluster, "tiny").await.failed(&cut());
        }
        tokio::time::advance(Duration::from_millis(1300)).await;
        assert_eq!(admit(&cluster, "tiny"), Admission::Probe);
        assert!(begin_probe(&cluster));
        assert!(!begin_probe(&cluster));
        assert_eq!(admit(&cluster, "tiny"), Admission::No);
        let mut probe = trial(&cluster, "tiny").await;
        probe.answered(StatusCode::OK);
        let admitted = || (0..1000).filter(|_| admit(&cluster, "tiny") == Admission::Yes).count();
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
        for _ in 0..3 {
            trial(&cluster, "tiny").await.failed(&cut());
        }
        for seconds in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0] {
            tokio::time::advance(Duration::from_secs_f32(seconds * 0.75)).await;
            assert_eq!(admit(&cluster, "tiny"), Admission::No, "{seconds} s");
            tokio::time::advance(Duration::from_secs_f32(seconds * 0.5)).await;
            assert!(begin_probe(&cluster), "{seconds} s");
            trial(&cluster, "tiny").await.failed(&cut());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_whose_client_leaves_lets_another_find_out() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        for _ in 0..3 {
            trial(&cluster, "tiny").await.failed(&cut());
        }
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(begin_probe(&cluster));
        drop(trial(&cluster, "tiny").await);
        assert_eq!(admit(&cluster, "tiny"), Admission::Probe);
    }

    #[tokio::test(start_paused = true)]
    async fn a_loaded_model_that_is_silent_towards_everybody_has_failed() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let waits = [trial(&cluster, "tiny").await, trial(&cluster, "tiny").await, trial(&cluster, "tiny").await];
        tokio::time::advance(Duration::from_secs(30)).await;
        drop(waits);
        assert_eq!(admit(&cluster, "tiny"), Admission::No);
    }

    /// Three calls for a model that is in memory, dropped after so many seconds; given up after ten of waiting, if wanted.
    async fn dropped_after(cluster: &Arc<crate::Cluster>, seconds: u64, given_up: bool) {
        let waits = [trial(cluster, "tiny").await, trial(cluster, "tiny").await, trial(cluster, "tiny").await];
        tokio::time::advance(Duration::from_secs(seconds)).await;
        for wait in waits.iter().filter(|_| given_up) {
            wait.head.given_up.set(Duration::from_secs(10)).unwrap();
        }
        drop(waits);
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_byte_that_does_not_come_in_time_is_a_failure_and_a_client_that_leaves_is_none() {
        for (seconds, given_up, wanted) in [
            (10, false, Admission::Yes),
            // It had waited elsewhere before.
            (4, true, Admission::Yes),
            (10, true, Admission::No),
        ] {
            let cluster = testing::cluster(&[&["tiny"], &[]]).await;
            dropped_after(&cluster, seconds, given_up).await;
            assert_eq!(admit(&cluster, "tiny"), wanted, "{seconds} s, {given_up}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_answers_others_meanwhile_is_only_busy() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let mut busy_with = trial(&cluster, "tiny").await;
        busy_with.answered(StatusCode::OK);
        runner(&cluster, "tiny").begins();
        let waits = [trial(&cluster, "tiny").await, trial(&cluster, "tiny").await, trial(&cluster, "tiny").await];
        tokio::time::advance(Duration::from_secs(90)).await;
        drop(waits);
        assert_eq!(admit(&cluster, "tiny"), Admission::Yes);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_loads_may_take_its_time() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let tiny = ModelName::parse("tiny").unwrap();
        let loads: Vec<_> = (0..5).map(|_| followed(&cluster, &tiny)).collect();
        tokio::time::advance(Duration::from_secs(600)).await;
        drop(loads);
        assert!(!circuits(&cluster).are_restless());
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_goes_takes_its_circuit_with_it() {
        let cluster = testing::cluster(&[&["tiny"], &[]]).await;
        let circuits = circuits(&cluster);
        for _ in 0..3 {
            trial(&cluster, "tiny").await.failed(&cut());
        }
        assert!(circuits.are_restless());
        cluster.note_removed(&[ServerId::new("0")], &ModelName::parse("tiny").unwrap());
        assert!(!circuits.are_restless());
    }
}
