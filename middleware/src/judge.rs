//! Judges servers by how the calls that they were given went, whatever their checks say.
//!
//! A circuit ([`crate::circuit`]) acts on failures in a row, at once and for seconds. This looks at a whole minute: a server
//! that fails every third call never opens a circuit, and should not get calls while others have room. It is *degraded*
//! then; one that fails nearly all of them is *down*. The calls themselves are the evidence, those that a model answers:
//! what a client got wrong, clients that leave, and servers that are busy count neither way.
//!
//! A model that alone fails is no fault of its server. So of several models that were asked for, the one with the most
//! failures is left out; and where a single one was asked for, its server is degraded for the calls of that model, and never
//! down. Nobody takes a lock here: counts and the verdict are atomics.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::call::{Call, End};
use crate::cluster::Server;
use crate::error::Error;
use crate::names::ServerId;
use crate::runner::Runner;
use crate::stats::Failed;
use crate::units::{Share, SomeSeconds, Whole};

/// Parts of the window; the oldest one leaves at once.
const SLOTS: u32 = 6;
/// Models of a server that are told apart.
const MODELS: usize = 8;
/// How fast the usual pace follows: so many answers until what has become slow is the new usual.
const USUAL: u32 = 256;
/// The logarithm of a pace is kept in thousandths.
const PRECISION: f32 = 1000.0;
/// Longest part of an error that is kept.
const LONGEST: usize = 300;

/// The `[judge]` table.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Seconds of calls that are looked at, and the shortest time for which a server is degraded or down.
    pub window_s: SomeSeconds,
    /// Calls in that time, without which no server is judged.
    pub least_calls: NonZeroU32,
    /// Share of its calls that a server must fail to be degraded: it is asked when the others have no room. It is well again
    /// below half of that.
    pub degraded_errors: Share,
    /// Share of its calls, of two models at least, that it must fail to be down: it is asked when nobody else is left.
    pub down_errors: Share,
    /// How many times as long as usual a server must take for its tokens to be shown as degraded; 0: never. It is asked all
    /// the same: what it costs is known from its pace.
    pub slow_factor: Whole<0, 1000>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            window_s: SomeSeconds::new(60),
            least_calls: NonZeroU32::MIN.saturating_add(9),
            degraded_errors: Share::of_thousand(200),
            down_errors: Share::of_thousand(800),
            slow_factor: Whole::new(4),
        }
    }
}

impl Config {
    /// What is wrong with it, and which key says so.
    pub fn fault(&self) -> Option<(&'static str, String)> {
        let (degraded, down) = (self.degraded_errors.get(), self.down_errors.get());
        if degraded <= 0.0 {
            return Some((
                "degraded-errors",
                "a server without failures cannot be degraded: at least 0.001".to_owned(),
            ));
        }
        (down < degraded).then(|| {
            let what =
                format!("{down} is below degraded-errors, {degraded}: who is down has failed more than who is not");
            ("down-errors", what)
        })
    }

    fn window(&self) -> Duration {
        self.window_s.time()
    }

    /// The logarithm of the slow factor, in the units of the window; `None`: nobody is slow.
    fn slow(&self) -> Option<i64> {
        (self.slow_factor.get() > 1)
            .then(|| logarithm(f32::from(u16::try_from(self.slow_factor.get()).unwrap_or(1000))))
    }
}

/// What a server's calls have made of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// All is well, or nobody knows otherwise.
    #[default]
    Well,
    /// It takes much longer than usual.
    Slow,
    /// It fails some of its calls.
    Degraded,
    /// It fails most of its calls.
    Down,
}

impl Verdict {
    fn of(number: u8) -> Self {
        [Self::Well, Self::Slow, Self::Degraded, Self::Down].get(usize::from(number)).copied().unwrap_or_default()
    }

    /// The word for logs.
    fn as_str(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Slow => "slow",
            Self::Degraded => "degraded",
            Self::Down => "down",
        }
    }
}

/// A verdict, since when and why.
#[derive(Clone, Debug)]
pub struct Ruling {
    /// When it was given.
    pub since: SystemTime,
    /// Why; empty if all is well.
    pub why: String,
    at: Instant,
}

/// The rules, for all servers of a cluster. A reload may change them.
pub(crate) type Rules = ArcSwap<Config>;

/// How the calls of one server went of late. Lives beside the snapshots, not in them.
#[derive(Debug)]
pub struct Record {
    id: ServerId,
    rules: Arc<Rules>,
    verdict: AtomicU8,
    /// The model that alone made it so, if one did.
    alone: AtomicUsize,
    ruling: ArcSwapOption<Ruling>,
    last: ArcSwapOption<Failed>,
    /// Made with the first call.
    window: OnceLock<Box<Window>>,
}

/// Calls that were looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// How many.
    pub calls: u32,
    /// Those that failed.
    pub failures: u32,
    /// The one model that they were for; 0: several, or none.
    alone: usize,
    /// Those whose pace is known.
    paced: u32,
    /// The mean of the logarithms of their paces.
    pace: i64,
}

impl Seen {
    /// The share that failed; `None` without any.
    pub fn error_rate(&self) -> Option<f64> {
        (self.calls > 0).then(|| f64::from(self.failures) / f64::from(self.calls))
    }

    fn share(&self) -> f64 {
        self.error_rate().unwrap_or(0.0)
    }
}

/// What tells models of a server apart; never 0.
pub(crate) fn key(runner: Option<&Arc<Runner>>) -> usize {
    runner.map_or(1, |runner| Arc::as_ptr(runner).addr())
}

impl Record {
    pub(crate) fn new(id: ServerId, rules: Arc<Rules>) -> Self {
        Self {
            id,
            rules,
            verdict: AtomicU8::new(Verdict::Well as u8),
            alone: AtomicUsize::new(0),
            ruling: ArcSwapOption::empty(),
            last: ArcSwapOption::empty(),
            window: OnceLock::new(),
        }
    }

    /// What its calls have made of it.
    pub fn verdict(&self) -> Verdict {
        Verdict::of(self.verdict.load(Ordering::Relaxed))
    }

    /// Since when and why; `None`: it was never otherwise.
    pub fn ruling(&self) -> Option<Arc<Ruling>> {
        self.ruling.load_full()
    }

    /// The last call that failed.
    pub fn last_failure(&self) -> Option<Arc<Failed>> {
        self.last.load_full()
    }

    /// The calls of the window, those of all models.
    pub fn seen(&self) -> Seen {
        let config = self.rules.load();
        self.window.get().map_or_else(Seen::default, |window| window.all(&config))
    }

    /// Whether calls for a model should go elsewhere while others have room.
    pub(crate) fn is_doubtful(&self, runner: Option<&Arc<Runner>>) -> bool {
        self.verdict() == Verdict::Degraded && {
            let alone = self.alone.load(Ordering::Relaxed);
            alone == 0 || alone == key(runner)
        }
    }

    /// A call for a model was answered, to the end.
    pub(crate) fn good(&self, runner: Option<&Arc<Runner>>) {
        self.window().add(&self.rules.load(), key(runner), false);
    }

    /// The server has failed a call for a model.
    pub(crate) fn bad(&self, runner: Option<&Arc<Runner>>, why: &dyn fmt::Display) {
        let mut reason = why.to_string();
        if let Some((cut, _)) = reason.char_indices().nth(LONGEST) {
            reason.truncate(cut);
        }
        self.last.store(Some(Arc::new(Failed { at: SystemTime::now(), reason })));
        self.window().add(&self.rules.load(), key(runner), true);
        self.look();
    }

    /// A call has had so many times the usual time for each token.
    pub(crate) fn paced(&self, times: f32) {
        self.window().pace(&self.rules.load(), logarithm(times));
    }

    /// It begins anew.
    pub(crate) fn clear(&self) {
        if let Some(window) = self.window.get() {
            window.clear();
            self.rule(self.verdict(), Verdict::Well, 0, String::new());
        }
    }

    /// Judges by what has been seen. Costs next to nothing as long as nobody has called.
    pub(crate) fn look(&self) {
        let Some(window) = self.window.get() else { return };
        let (now, config) = (self.verdict(), self.rules.load());
        let seen = window.seen(&config);
        let since = self.ruling.load().as_ref().map_or(Duration::MAX, |ruling| ruling.at.elapsed());
        let next = next(now, &seen, since, &config);
        if next == now {
            return;
        }
        let why = match next {
            Verdict::Well => String::new(),
            _ => self.told(next, &seen, &config),
        };
        if self.rule(now, next, seen.alone, why) && next == Verdict::Down {
            // Whether it is well again is told by what comes now.
            window.clear();
        }
    }

    fn told(&self, verdict: Verdict, seen: &Seen, config: &Config) -> String {
        let window = config.window_s;
        if verdict == Verdict::Slow {
            let times = 2_f64.powf(f64::from(i32::try_from(seen.pace).unwrap_or(0)) / f64::from(PRECISION));
            return format!("its tokens took {times:.1} times as long as usual in the last {window} s");
        }
        if seen.calls == 0 {
            return format!("no calls in the last {window} s show whether it is well again");
        }
        let Seen { calls, failures, alone, .. } = *seen;
        let of = if alone == 0 { "calls" } else { "calls for the one model that was asked for" };
        let last = self.last.load();
        let last = last.as_ref().map(|last| format!("; the last: {}", last.reason)).unwrap_or_default();
        format!("{failures} of {calls} {of} in the last {window} s failed{last}")
    }

    /// Gives a verdict, if nobody has given another. True if it is this one that holds.
    fn rule(&self, now: Verdict, next: Verdict, alone: usize, why: String) -> bool {
        if now == next
            || self.verdict.compare_exchange(now as u8, next as u8, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return false;
        }
        self.alone.store(alone, Ordering::Relaxed);
        let (server, verdict) = (&self.id, next.as_str());
        if next == Verdict::Well {
            tracing::info!(%server, "the calls of a server go well again");
        } else {
            tracing::warn!(%server, verdict, why, "a server is judged by how its calls went");
        }
        self.ruling.store(Some(Arc::new(Ruling { since: SystemTime::now(), why, at: Instant::now() })));
        true
    }

    fn window(&self) -> &Window {
        self.window.get_or_init(Box::default)
    }
}

/// A call at a server, as evidence: told how it goes.
#[derive(Debug)]
pub(crate) struct Witness {
    server: Arc<Server>,
    runner: Option<Arc<Runner>>,
    /// Whether how it ends is a word on the server.
    counts: bool,
}

impl Witness {
    /// A call is about to be sent. Only what a model answers shows how a server does.
    pub(crate) fn of(call: &Call, server: &Arc<Server>, runner: Option<&Arc<Runner>>) -> Self {
        Self { server: server.clone(), runner: runner.cloned(), counts: call.route.infers() }
    }

    fn bad(&self, why: &dyn fmt::Display) {
        self.server.record.bad(self.runner.as_ref(), why);
    }

    /// The head of an answer is here. What a server says of the request, and that it is busy, says nothing of the server; of
    /// its own trouble `retry` reads in the text.
    pub(crate) fn answered(&mut self, status: StatusCode) {
        if self.counts && matches!(status, StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT) {
            self.bad(&format_args!("it answered {status}"));
        }
        self.counts &= status.is_success();
    }

    /// There is no answer. A pooled connection that had died says nothing of its server.
    pub(crate) fn failed(&self, error: &Error) {
        if self.counts
            && let Error::Server { reused: false, .. } = error
        {
            self.bad(error);
        }
    }

    /// The answer is over. That a client leaves, or a limit of the operator's is reached, says nothing of the server.
    pub(crate) fn ended(&mut self, end: End) {
        match end {
            _ if !std::mem::take(&mut self.counts) => {}
            End::Whole => self.server.record.good(self.runner.as_ref()),
            End::Broken("timeout") | End::Dropped => {}
            End::Broken(kind) => self.bad(&format_args!("an answer broke off: {kind}")),
        }
    }
}

/// The verdict that follows on one that holds for so long.
fn next(now: Verdict, seen: &Seen, since: Duration, config: &Config) -> Verdict {
    let (degraded, down) = (config.degraded_errors.get(), config.down_errors.get());
    let is_enough = seen.calls >= config.least_calls.get();
    let share = seen.share();
    let is_over = since >= config.window();
    let is_slow = |limit: i64| seen.paced >= config.least_calls.get() && seen.pace >= limit;
    match now {
        Verdict::Down if is_enough && share < degraded => Verdict::Degraded,
        // Nobody has called, or not in vain.
        Verdict::Down if is_over && (seen.calls == 0 || share < down) => Verdict::Degraded,
        Verdict::Down => Verdict::Down,
        _ if is_enough && share >= down && seen.alone == 0 => Verdict::Down,
        _ if is_enough && share >= degraded => Verdict::Degraded,
        Verdict::Degraded if share >= degraded / 2.0 || !(is_enough || is_over) => Verdict::Degraded,
        Verdict::Slow if config.slow().is_some_and(|limit| is_slow(limit / 2)) => Verdict::Slow,
        _ if config.slow().is_some_and(is_slow) => Verdict::Slow,
        _ => Verdict::Well,
    }
}

/// Counts of the last while. Two that come at once when a part begins may lose a count: it is an estimate.
#[derive(Debug)]
struct Window {
    born: Instant,
    /// Whose the columns are; 0: nobody's.
    keys: [AtomicUsize; MODELS],
    slots: [Slot; SLOTS as usize],
}

#[derive(Debug, Default)]
struct Slot {
    number: AtomicU32,
    columns: [Column; MODELS],
    paced: AtomicU32,
    pace: AtomicI64,
}

#[derive(Debug, Default)]
struct Column {
    calls: AtomicU32,
    failures: AtomicU32,
}

impl Default for Window {
    fn default() -> Self {
        Self { born: Instant::now(), keys: Default::default(), slots: Default::default() }
    }
}

impl Slot {
    fn clear(&self) {
        for column in &self.columns {
            column.calls.store(0, Ordering::Relaxed);
            column.failures.store(0, Ordering::Relaxed);
        }
        self.paced.store(0, Ordering::Relaxed);
        self.pace.store(0, Ordering::Relaxed);
    }
}

impl Window {
    /// Which part it is now, the first being 1.
    fn number(&self, config: &Config) -> u32 {
        let part = (config.window() / SLOTS).as_millis().max(1);
        u32::try_from(self.born.elapsed().as_millis() / part).unwrap_or(u32::MAX - 1) + 1
    }

    fn slot(&self, config: &Config) -> &Slot {
        let number = self.number(config);
        let slot = &self.slots[(number % SLOTS) as usize];
        if slot.number.swap(number, Ordering::Relaxed) != number {
            slot.clear();
        }
        slot
    }

    fn add(&self, config: &Config, key: usize, is_failure: bool) {
        let column = &self.slot(config).columns[self.column(key)];
        column.calls.fetch_add(1, Ordering::Relaxed);
        column.failures.fetch_add(u32::from(is_failure), Ordering::Relaxed);
    }

    fn pace(&self, config: &Config, logarithm: i64) {
        let slot = self.slot(config);
        slot.paced.fetch_add(1, Ordering::Relaxed);
        slot.pace.fetch_add(logarithm, Ordering::Relaxed);
    }

    /// The column of a model. Where there are too many, some share one.
    fn column(&self, key: usize) -> usize {
        if let Some(at) = self.keys.iter().position(|known| known.load(Ordering::Relaxed) == key) {
            return at;
        }
        let takes = |at: &AtomicUsize| match at.compare_exchange(0, key, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => true,
            Err(other) => other == key,
        };
        // The addresses of runners are multiples of their size.
        self.keys.iter().position(takes).unwrap_or((key >> 6) % MODELS)
    }

    fn live(&self, config: &Config) -> impl Iterator<Item = &Slot> {
        let now = self.number(config);
        self.slots.iter().filter(move |slot| now - slot.number.load(Ordering::Relaxed).min(now) < SLOTS)
    }

    /// All that is in the window.
    fn all(&self, config: &Config) -> Seen {
        let mut seen = Seen::default();
        for slot in self.live(config) {
            for column in &slot.columns {
                seen.calls += column.calls.load(Ordering::Relaxed);
                seen.failures += column.failures.load(Ordering::Relaxed);
            }
            seen.paced += slot.paced.load(Ordering::Relaxed);
            seen.pace += slot.pace.load(Ordering::Relaxed);
        }
        seen.pace /= i64::from(seen.paced.max(1));
        seen
    }

    /// What a server is judged by: of several models all but the one that failed most.
    fn seen(&self, config: &Config) -> Seen {
        let mut seen = self.all(config);
        let columns = (0..MODELS).map(|at| {
            let counts = self.live(config).map(|slot| &slot.columns[at]);
            let (calls, failures) = counts.fold((0, 0), |(calls, failures), column| {
                (calls + column.calls.load(Ordering::Relaxed), failures + column.failures.load(Ordering::Relaxed))
            });
            (at, calls, failures)
        });
        let (mut models, mut worst) = (0, (0, 0, 0));
        for (at, calls, failures) in columns {
            if calls == 0 {
                // Another may have it.
                self.keys[at].store(0, Ordering::Relaxed);
                continue;
            }
            models += 1;
            if models == 1 || failures > worst.2 {
                worst = (at, calls, failures);
            }
        }
        match models {
            0 => {}
            1 => seen.alone = self.keys[worst.0].load(Ordering::Relaxed),
            _ => {
                seen.calls = seen.calls.saturating_sub(worst.1);
                seen.failures = seen.failures.saturating_sub(worst.2);
            }
        }
        seen
    }

    fn clear(&self) {
        self.slots.iter().for_each(Slot::clear);
    }
}

/// How long a model usually takes for a token on its server, alone and among others.
#[derive(Debug, Default)]
pub(crate) struct Usual([Pace; 2]);

/// A mean that follows slowly, and of how many it is.
#[derive(Debug, Default)]
struct Pace {
    mean: AtomicU32,
    count: AtomicU32,
}

impl Usual {
    /// An answer has taken so long for a token; returns how many times the usual, once that is known.
    pub(crate) fn times(&self, ms: f32, is_alone: bool) -> Option<f32> {
        let Pace { mean, count } = &self.0[usize::from(is_alone)];
        if !ms.is_finite() || ms <= 0.0 {
            return None;
        }
        let known = count.fetch_add(1, Ordering::Relaxed).min(USUAL);
        count.fetch_min(USUAL, Ordering::Relaxed);
        let usual = f32::from_bits(mean.load(Ordering::Relaxed));
        let part = 1.0 / f32::from(u16::try_from(known + 1).unwrap_or(u16::MAX));
        mean.store((usual + (ms - usual) * part).to_bits(), Ordering::Relaxed);
        (known >= 8 && usual > 0.0).then(|| ms / usual)
    }
}

/// The binary logarithm of a ratio, in thousandths.
#[expect(clippy::cast_possible_truncation, reason = "it is between -20000 and 20000")]
fn logarithm(times: f32) -> i64 {
    (times.clamp(1e-6, 1e6).log2() * PRECISION) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    async fn record() -> (Arc<crate::Cluster>, Arc<Record>, [Arc<Runner>; 3]) {
        let cluster = testing::cluster(&[&["a", "b", "c"]]).await;
        let snapshot = cluster.snapshot();
        let server = snapshot.servers[0].clone();
        let runner = |name| snapshot.known(&crate::ModelName::parse(name).unwrap()).unwrap().runners.at(&server);
        (cluster.clone(), server.record.clone(), ["a", "b", "c"].map(runner))
    }

    /// So many calls for a model, of which the first fail.
    fn calls(record: &Record, runner: &Arc<Runner>, calls: u32, failures: u32) {
        (failures..calls).for_each(|_| record.good(Some(runner)));
        (0..failures).for_each(|_| record.bad(Some(runner), &"cut"));
    }

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_fails_a_share_of_its_calls_is_degraded_and_well_again_below_half_of_that() {
        let (_cluster, record, [a, b, _]) = record().await;
        calls(&record, &a, 40, 12);
        assert_eq!(record.verdict(), Verdict::Degraded, "one model was asked for, and is all that is known");
        assert!(record.is_doubtful(Some(&a)) && !record.is_doubtful(Some(&b)), "others have failed nobody");
        let why = record.ruling().unwrap().why.clone();
        assert!(
            why.contains("7 of 35 calls for the one model that was asked for in the last 60 s failed; the last: cut"),
            "{why}"
        );
        pass(50).await;
        calls(&record, &a, 40, 5);
        record.look();
        assert_eq!(record.verdict(), Verdict::Degraded, "still a fifth");
        pass(30).await;
        record.look();
        assert_eq!(record.verdict(), Verdict::Degraded, "an eighth is not below half of that");
        calls(&record, &a, 20, 0);
        record.look();
        assert_eq!(record.verdict(), Verdict::Well);
        assert!(record.ruling().unwrap().why.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn few_calls_show_nothing() {
        let (_cluster, record, [a, ..]) = record().await;
        calls(&record, &a, 9, 9);
        assert_eq!(record.verdict(), Verdict::Well);
        pass(61).await;
        calls(&record, &a, 9, 9);
        assert_eq!(record.verdict(), Verdict::Well, "what is older than the window counts for nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_alone_fails_is_no_fault_of_its_server() {
        let (_cluster, record, [a, b, c]) = record().await;
        calls(&record, &b, 20, 0);
        calls(&record, &a, 50, 50);
        assert_eq!(record.verdict(), Verdict::Well);
        calls(&record, &c, 20, 20);
        assert_eq!(record.verdict(), Verdict::Degraded, "half of the calls for the others fail");
        assert!(record.is_doubtful(Some(&b)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_single_model_never_brings_its_server_down() {
        let (_cluster, record, [a, ..]) = record().await;
        calls(&record, &a, 100, 100);
        assert_eq!(record.verdict(), Verdict::Degraded);
    }

    #[tokio::test(start_paused = true)]
    async fn who_fails_all_is_down_for_a_window_and_then_on_trial_for_another() {
        let (cluster, record, [a, b, _]) = record().await;
        calls(&record, &a, 20, 20);
        calls(&record, &b, 20, 20);
        assert_eq!(record.verdict(), Verdict::Down);
        let server = cluster.snapshot().servers[0].clone();
        assert!(!server.is_usable() && server.why().contains("calls in the last 60 s failed"), "{}", server.why());
        pass(59).await;
        record.look();
        assert_eq!(record.verdict(), Verdict::Down);
        pass(1).await;
        record.look();
        assert_eq!(record.verdict(), Verdict::Degraded);
        assert!(server.is_usable());
        pass(61).await;
        record.look();
        assert_eq!(record.verdict(), Verdict::Well);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_down_and_asked_all_the_same_shows_by_that_how_it_is() {
        let (_cluster, record, [a, b, _]) = record().await;
        calls(&record, &a, 20, 20);
        calls(&record, &b, 20, 20);
        pass(90).await;
        calls(&record, &a, 5, 5);
        assert_eq!(record.verdict(), Verdict::Down);
        calls(&record, &a, 80, 0);
        calls(&record, &b, 80, 0);
        record.look();
        assert_eq!(record.verdict(), Verdict::Degraded);
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_back_begins_anew() {
        let (cluster, record, [a, ..]) = record().await;
        calls(&record, &a, 20, 20);
        cluster.check_failed(0, "gone".to_owned(), 1);
        cluster.report(0, crate::cluster::Report::default());
        assert_eq!((record.verdict(), record.seen()), (Verdict::Well, Seen::default()));
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_much_longer_than_usual_is_slow_until_it_does_not() {
        let (_cluster, record, _) = record().await;
        let usual = Usual::default();
        let answer = |ms: f32| usual.times(ms, true).into_iter().for_each(|times| record.paced(times));
        (0..100).for_each(|_| answer(20.0));
        record.look();
        assert_eq!(record.verdict(), Verdict::Well);
        pass(70).await;
        (0..10).for_each(|_| answer(200.0));
        record.look();
        assert_eq!(record.verdict(), Verdict::Slow);
        assert!(record.ruling().unwrap().why.starts_with("its tokens took"), "{:?}", record.ruling());
        assert!(!record.is_doubtful(None), "its pace is known");
        pass(70).await;
        (0..10).for_each(|_| answer(20.0));
        record.look();
        assert_eq!(record.verdict(), Verdict::Well);
    }

    #[tokio::test(start_paused = true)]
    async fn more_models_than_are_told_apart_are_counted_all_the_same() {
        let window = Window::default();
        let config = Config::default();
        (1..100).for_each(|key| window.add(&config, key << 6, key % 2 == 0));
        assert_eq!((window.all(&config).calls, window.all(&config).failures), (99, 49));
        pass(120).await;
        assert_eq!(window.seen(&config), Seen::default());
        window.add(&config, 5, true);
        assert_eq!(window.seen(&config), Seen { calls: 1, failures: 1, alone: 5, ..Seen::default() });
    }

    #[test]
    fn thresholds_that_contradict_each_other_are_refused() {
        assert_eq!(Config::default().fault(), None);
        let wrong = Config { down_errors: Share::of_thousand(100), ..Config::default() };
        assert_eq!(wrong.fault().unwrap().0, "down-errors");
        assert_eq!(Config { degraded_errors: Share::NONE, ..wrong }.fault().unwrap().0, "degraded-errors");
    }
}
