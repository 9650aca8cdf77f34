//! Gives up on what takes too long: a connection, the first byte of an answer, the next piece of it, all of it.
//!
//! | limit | from | to |
//! |---|---|---|
//! | connect | an attempt | a connection to its server |
//! | first byte | the request | the head of its answer: waiting for a place and loading a model are part of that |
//! | unstreamed | the request | the head of an answer in one piece, which comes when all of it is made |
//! | idle | the moment from which its reader waits for more | the next piece of the answer |
//! | total | the request | the end of its answer |
//!
//! Who gives up drops the call, which ends the work at the server; a load in progress goes on for a while, as for a client
//! that leaves. Before the head the client is told with a 504; afterwards the stream breaks off as for a server that died.
//! Nothing is tried again after that: the server may well be loading the model, and another one would begin from the start.
//! But a server that keeps a model in memory and is silent for as long as a first byte may take has failed it, and is left
//! alone with it if it does so again and again ([`crate::circuit`]).
//! A reader who does not read is no reason to give up.
//!
//! Pull, push, create and blobs take as long as they take: for them only rules count that name their routes.
//!
//! Belongs outside whatever waits (`queue`, `retry`), so that all of it is one wait. Connections are the exception: each
//! attempt may take as long as the limit says, and one that takes longer may be tried elsewhere.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::time::{Instant, Sleep};
use tower::{Layer, Service};

use crate::call::{Answer, Call, Chunk, Chunks, Head, Outcome, Reply, Source};
use crate::error::Error;
use crate::instruments;
use crate::pattern::Pattern;
use crate::route::{Dialect, Route};
use crate::trail::Fact;

/// The `[timeout]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Until a server takes a connection; 0: as `[pool]` says.
    pub connect_s: Limit,
    /// Until the first byte of an answer.
    pub first_byte_s: Limit,
    /// Until an answer that is not streamed, and so comes when all of it is made.
    pub unstreamed_s: Limit,
    /// Until the next piece of an answer.
    pub idle_s: Limit,
    /// Until the end of an answer.
    pub total_s: Limit,
    /// Other limits for some routes and models; of each key the first that fits counts.
    pub rules: Vec<Rule>,
}

impl Config {
    /// Finds what no type can hold: the first rule that says nothing.
    pub fn check(&self) -> Result<(), (usize, &'static str)> {
        match self.rules.iter().position(Rule::says_nothing) {
            Some(at) => Err((at, "it must set a limit: connect-s, first-byte-s, unstreamed-s, idle-s or total-s")),
            None => Ok(()),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connect_s: Limit::NONE,
            first_byte_s: Limit::of_secs(900),
            unstreamed_s: Limit::of_secs(3600),
            idle_s: Limit::of_secs(300),
            total_s: Limit::NONE,
            rules: Vec::new(),
        }
    }
}

/// Other limits for some calls. What is left out of the first two fits every call, but for pull, push, create and blobs,
/// whose routes must be named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Routes, by their words: `chat`, `embed`, `v1-*`.
    pub routes: Vec<RoutePattern>,
    /// Models, as clients name them.
    pub models: Vec<Pattern>,
    /// Until a server takes a connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_s: Option<Limit>,
    /// Until the first byte of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_byte_s: Option<Limit>,
    /// Until an answer that is not streamed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unstreamed_s: Option<Limit>,
    /// Until the next piece of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_s: Option<Limit>,
    /// Until the end of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_s: Option<Limit>,
}

impl Rule {
    fn says_nothing(&self) -> bool {
        let limits = [self.connect_s, self.first_byte_s, self.unstreamed_s, self.idle_s, self.total_s];
        limits.iter().all(Option::is_none)
    }
}

/// A pattern that is the word of a route, or of several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct RoutePattern(Pattern);

/// The words of all routes.
static WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| Route::ALL.map(Route::word).to_vec());

impl<'de> Deserialize<'de> for RoutePattern {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Word;
        impl Visitor<'_> for Word {
            type Value = RoutePattern;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the word of a route")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RoutePattern, E> {
                let pattern =
                    Pattern::parse(text).ok().filter(|pattern| WORDS.iter().any(|word| pattern.matches(word)));
                pattern.map(RoutePattern).ok_or_else(|| E::unknown_variant(text, &WORDS))
            }
        }
        from.deserialize_str(Word)
    }
}

/// How long something may take: seconds, and parts of them; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit(Option<Duration>);

impl Limit {
    /// No limit.
    pub const NONE: Self = Self(None);
    /// A year: what is longer is a slip.
    const LONGEST: f64 = 31_536_000.0;

    /// So many seconds.
    pub const fn of_secs(seconds: u64) -> Self {
        Self(Some(Duration::from_secs(seconds)))
    }
}

impl Serialize for Limit {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(limit) if limit.subsec_nanos() > 0 => to.serialize_f64(limit.as_secs_f64()),
            limit => to.serialize_u64(limit.map_or(0, |limit| limit.as_secs())),
        }
    }
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Seconds;
        impl Visitor<'_> for Seconds {
            type Value = Limit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of seconds, a year at most, or 0 for no limit")
            }

            #[expect(clippy::cast_precision_loss, reason = "what is too large to be exact is refused")]
            fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Limit, E> {
                self.visit_f64(seconds as f64)
            }

            #[expect(clippy::cast_precision_loss, reason = "as above")]
            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Limit, E> {
                self.visit_f64(seconds as f64)
            }

            fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Limit, E> {
                if !(0.0..=Limit::LONGEST).contains(&seconds) {
                    return Err(E::invalid_value(de::Unexpected::Float(seconds), &self));
                }
                let limit = Duration::from_secs_f64(seconds);
                Ok(Limit((!limit.is_zero()).then_some(limit)))
            }
        }
        from.deserialize_any(Seconds)
    }
}

/// Puts [`Timeout`] around a service.
#[derive(Clone, Debug)]
pub struct TimeoutLayer {
    rules: Arc<Rules>,
}

impl TimeoutLayer {
    /// Limits as configured.
    pub fn new(config: Config) -> Self {
        let fits = config.rules.iter().map(Fit::new).collect();
        Self { rules: Arc::new(Rules { config, fits }) }
    }
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timeout<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Timeout { inner, rules: self.rules.clone() }
    }
}

/// Gives up on calls that take too long.
#[derive(Clone, Debug)]
pub struct Timeout<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for Timeout<S>
where
    S: Service<Call, Response = Reply, Error = Error>,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        let limits = self.rules.limits(&call);
        if limits.is_of_rule || call.dry {
            limits.note(&call);
        }
        call.connect_limit = limits.connect.or(call.connect_limit);
        if call.dry || !limits.need_a_clock() {
            return Box::pin(self.inner.call(call));
        }
        let clock = Clock::start(call.head.clone(), &limits);
        call.deadline = earlier(call.deadline, clock.due);
        Box::pin(clock.follow(limits.first_byte, self.inner.call(call)))
    }
}

#[derive(Debug)]
struct Rules {
    config: Config,
    fits: Vec<Fit>,
}

/// A rule, and the calls that it fits.
#[derive(Debug)]
struct Fit {
    /// A bit for each route.
    routes: u64,
    rule: Rule,
}

/// What one call may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Limits {
    connect: Option<Duration>,
    first_byte: Option<Duration>,
    idle: Option<Duration>,
    total: Option<Duration>,
    is_of_rule: bool,
}

impl Fit {
    fn new(rule: &Rule) -> Self {
        let is_meant = |route: &Route| {
            let is_named = rule.routes.iter().any(|pattern| pattern.0.matches(route.word()));
            is_named || (rule.routes.is_empty() && !takes_its_time(*route))
        };
        let routes = Route::ALL.into_iter().filter(is_meant).fold(0, |bits, route| bits | 1 << route as u64);
        Self { routes, rule: rule.clone() }
    }

    fn fits(&self, call: &Call) -> bool {
        let is_meant = |pattern: &Pattern| call.place.model.as_ref().is_some_and(|model| pattern.matches_model(model));
        self.routes & (1 << call.route as u64) != 0
            && (self.rule.models.is_empty() || self.rule.models.iter().any(is_meant))
    }
}

impl Rules {
    fn limits(&self, call: &Call) -> Limits {
        let mut given = Rule::default();
        let mut is_of_rule = false;
        for Fit { rule, .. } in self.fits.iter().filter(|fit| fit.fits(call)) {
            is_of_rule = true;
            given.connect_s = given.connect_s.or(rule.connect_s);
            given.first_byte_s = given.first_byte_s.or(rule.first_byte_s);
            given.unstreamed_s = given.unstreamed_s.or(rule.unstreamed_s);
            given.idle_s = given.idle_s.or(rule.idle_s);
            given.total_s = given.total_s.or(rule.total_s);
        }
        let usual = |limit: Limit| if takes_its_time(call.route) { Limit::NONE } else { limit };
        let config = &self.config;
        let first_byte = if streams(call) {
            given.first_byte_s.unwrap_or(usual(config.first_byte_s))
        } else {
            given.unstreamed_s.unwrap_or(usual(config.unstreamed_s))
        };
        Limits {
            connect: given.connect_s.unwrap_or(config.connect_s).0,
            first_byte: first_byte.0,
            idle: given.idle_s.unwrap_or(usual(config.idle_s)).0,
            total: given.total_s.unwrap_or(usual(config.total_s)).0,
            is_of_rule,
        }
    }
}

impl Limits {
    fn need_a_clock(&self) -> bool {
        self.first_byte.is_some() || self.idle.is_some() || self.total.is_some()
    }

    fn note(&self, call: &Call) {
        let named =
            [("connect", self.connect), ("first-byte", self.first_byte), ("idle", self.idle), ("total", self.total)];
        let facts = named.into_iter().filter_map(|(name, limit)| Some((name, in_ms(limit?))));
        call.note("timeout", if self.is_of_rule { "the limits of a rule" } else { "the usual limits" }, facts);
    }
}

fn in_ms(limit: Duration) -> Fact {
    Fact::Ms(limit.as_secs_f64() * 1000.0)
}

/// Whether a route has no limits but those of a rule that names it.
fn takes_its_time(route: Route) -> bool {
    matches!(route, Route::Pull | Route::Push | Route::Create | Route::Blob)
}

/// Whether the first byte of an answer comes long before its last: not if the client wants the answer of a model in one
/// piece.
fn streams(call: &Call) -> bool {
    if !call.route.infers() {
        return true;
    }
    match call.route {
        Route::Embed | Route::Embeddings | Route::V1Embeddings => false,
        route => call.peek.stream.unwrap_or(route.dialect() == Dialect::Ollama),
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    [one, other].into_iter().flatten().min()
}

/// What took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    FirstByte,
    Idle,
    Total,
}

/// The time that one call has taken.
struct Clock {
    head: Arc<Head>,
    began: Instant,
    idle: Option<Duration>,
    /// The limit for all of it, and when that is reached.
    total: Option<Duration>,
    due: Option<Instant>,
    /// One timer for all limits: set when somebody first waits, and put later only when it goes off too early.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Clock {
    fn start(head: Arc<Head>, limits: &Limits) -> Self {
        let began = Instant::now();
        let due = limits.total.map(|total| began + total);
        Self { head, began, idle: limits.idle, total: limits.total, due, timer: None }
    }

    /// Waits for an answer for as long as it may take, and goes with its body.
    async fn follow(
        mut self,
        first_byte: Option<Duration>,
        answer: impl Future<Output = Result<Reply, Error>>,
    ) -> Result<Reply, Error> {
        let first_due = first_byte.map(|limit| self.began + limit);
        let reply = match earlier(first_due, self.due) {
            None => answer.await?,
            Some(until) => {
                let timer = self.timer.insert(Box::pin(tokio::time::sleep_until(until)));
                // Dropped only after it has been said why: whoever judges the server by this call must know.
                let mut answer = std::pin::pin!(answer);
                tokio::select! {
                    biased;
                    answer = &mut answer => match answer {
                        // Whoever waits inside for as long as the call may take notices at the same moment.
                        Err(Error::Timeout { .. }) if self.due.is_some_and(|due| due <= Instant::now()) => {
                            return Err(self.give_up(Phase::Total, first_byte));
                        }
                        answer => answer?,
                    },
                    () = timer => {
                        let is_first = first_due.is_some_and(|first| first <= until);
                        return Err(self.give_up(if is_first { Phase::FirstByte } else { Phase::Total }, first_byte));
                    }
                }
            }
        };
        if (self.idle.is_none() && self.due.is_none()) || reply.body.length() == Some(0) {
            return Ok(reply);
        }
        let timed = |chunks| Timed { chunks: Some(chunks), clock: self, waiting_since: None };
        Ok(Reply { body: reply.body.through(timed), ..reply })
    }

    /// Makes known what took too long.
    fn give_up(&self, phase: Phase, first_byte: Option<Duration>) -> Error {
        let (word, what, limit) = match phase {
            Phase::FirstByte => ("first-byte", "the first byte of the answer", first_byte),
            Phase::Idle => ("idle", "the next piece of the answer", self.idle),
            Phase::Total => ("total", "the whole answer", self.total),
        };
        let after = limit.unwrap_or_default();
        if phase == Phase::FirstByte {
            let _ = self.head.given_up.set(after);
        }
        instruments::timed_out(word);
        self.head.trail.note("timeout", "gives up", [("waited-for", Fact::Word(what)), ("limit", in_ms(after))]);
        Error::Timeout { what, after }
    }
}

/// A body whose pieces must not be too far apart.
struct Timed {
    /// `None` when it is over: the work at the server ends.
    chunks: Option<Chunks>,
    clock: Clock,
    /// Since when somebody has waited for the next piece.
    waiting_since: Option<Instant>,
}

impl Timed {
    fn fail(&mut self, phase: Phase) -> Poll<Option<Result<Chunk, Error>>> {
        self.chunks = None;
        Poll::Ready(Some(Err(self.clock.give_up(phase, None))))
    }

    /// Nothing has come: whether it was waited for long enough.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Phase> {
        let clock = &mut self.clock;
        loop {
            let now = Instant::now();
            let since = *self.waiting_since.get_or_insert(now);
            let idle_due = clock.idle.map(|idle| since + idle);
            let Some(until) = earlier(idle_due, clock.due) else { return Poll::Pending };
            if now >= until {
                return Poll::Ready(if idle_due == Some(until) { Phase::Idle } else { Phase::Total });
            }
            let timer = clock.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
            // One that goes off earlier was set for a piece that has come since; it is left alone until then.
            if timer.deadline() > until || timer.is_elapsed() {
                timer.as_mut().reset(until);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl Source for Timed {
    fn tell(&self, outcome: &mut Outcome) {
        if let Some(chunks) = &self.chunks {
            chunks.tell(outcome);
        }
    }

    fn poll_chunk(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, Error>>> {
        let this = self.get_mut();
        let Some(chunks) = &mut this.chunks else { return Poll::Ready(None) };
        match Pin::new(chunks).poll_next(cx) {
            Poll::Ready(next) => {
                this.waiting_since = None;
                // Who talks without a pause is held to the total all the same.
                if matches!(next, Some(Ok(_))) && this.clock.due.is_some_and(|due| Instant::now() >= due) {
                    return this.fail(Phase::Total);
                }
                Poll::Ready(next)
            }
            Poll::Pending => match this.poll_clock(cx) {
                Poll::Ready(phase) => this.fail(phase),
                Poll::Pending => Poll::Pending,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{Body, Payload};
    use crate::names::ModelName;
    use crate::peek::Peek;
    use crate::testing::{self, ask};
    use bytes::Bytes;
    use http::uri::PathAndQuery;
    use http::{HeaderMap, Method, StatusCode};
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};
    use tokio::sync::mpsc;
    use tokio::time::advance;

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap_or_else(|error| panic!("{error}"))
    }

    fn call_of(route: Route, model: &str, stream: Option<bool>) -> Call {
        let peek = Peek { model: Some(model.to_owned()), stream, ..Peek::default() };
        let head = Head {
            peek,
            model: ModelName::parse(model),
            ..Head::new(route, Method::POST, PathAndQuery::from_static("/"))
        };
        Call::new(head, Payload::empty(), Arc::<crate::Snapshot>::default().all())
    }

    /// A reply whose chunks the test sends.
    fn open_reply() -> (mpsc::UnboundedSender<&'static str>, Reply) {
        let (send, mut receive) = mpsc::unbounded_channel::<&'static str>();
        let chunks = futures_util::stream::poll_fn(move |cx| {
            receive.poll_recv(cx).map(|text| text.map(|text| Ok(Chunk::from(Bytes::from_static(text.as_bytes())))))
        });
        (send, Reply { status: StatusCode::OK, headers: HeaderMap::new(), body: Body::new(chunks) })
    }

    /// The body of a chat with these limits, and what feeds it.
    async fn body(limits: &str) -> (mpsc::UnboundedSender<&'static str>, Body) {
        let (mut service, mut inner) = testing::spawn(&TimeoutLayer::new(config(limits)));
        let answer = ask(&mut service, call_of(Route::Chat, "tiny", None));
        let (send, reply) = open_reply();
        inner.next_request().await.unwrap().1.send_response(reply);
        (send, answer.await.unwrap().body)
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_begin_is_given_up() {
        let (mut service, mut inner) = testing::spawn(&TimeoutLayer::new(config("first-byte-s = 10")));
        let began = Instant::now();
        let answer = ask(&mut service, call_of(Route::Chat, "tiny", None));
        let (call, _respond) = inner.next_request().await.unwrap();
        let error = answer.await.unwrap_err();
        assert_eq!(began.elapsed(), secs(10));
        assert_eq!(
            (error.status(), error.kind(), error.is_retryable()),
            (StatusCode::GATEWAY_TIMEOUT, "timeout", false)
        );
        assert_eq!(error.to_string(), "timed out: the first byte of the answer took longer than 10 s");
        assert!(call.trail.take().iter().any(|note| note.decision == "gives up"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_drops_the_call() {
        let (guard, dropped) = tokio::sync::oneshot::channel::<()>();
        let clock = Clock::start(call_of(Route::Chat, "tiny", None).head, &Limits::default());
        let answer = async move {
            let _guard = guard;
            std::future::pending().await
        };
        assert!(clock.follow(Some(secs(1)), answer).await.is_err());
        assert!(dropped.await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_between_pieces_is_as_long_as_it_may_be() {
        let (send, mut body) = body("idle-s = 10").await;
        for _ in 0..9 {
            advance(secs(9)).await;
            send.send("x").unwrap();
            assert!(body.next().await.unwrap().is_ok());
        }
        let began = Instant::now();
        let error = body.next().await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "timed out: the next piece of the answer took longer than 10 s");
        assert_eq!(began.elapsed(), secs(10));
        assert!(send.is_closed(), "the work at the server has ended");
        assert!(body.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_of_the_reader_is_not_the_servers() {
        let (send, mut body) = body("idle-s = 10").await;
        assert!(tokio::time::timeout(Duration::ZERO, body.next()).await.is_err());
        send.send("x").unwrap();
        // The timer goes off meanwhile, and nobody looks.
        advance(secs(1000)).await;
        assert!(body.next().await.unwrap().is_ok());
        advance(secs(1000)).await;
        let began = Instant::now();
        assert!(body.next().await.unwrap().is_err());
        assert_eq!(began.elapsed(), secs(10), "counted from when the reader waits");
    }

    #[tokio::test(start_paused = true)]
    async fn the_whole_may_take_so_long_however_lively_it_is() {
        let (send, mut body) = body("idle-s = 10\ntotal-s = 25").await;
        for _ in 0..3 {
            advance(secs(8)).await;
            send.send("x").unwrap();
            assert!(body.next().await.unwrap().is_ok());
        }
        let error = body.next().await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "timed out: the whole answer took longer than 25 s");
        let (send, mut body) = self::body("total-s = 25").await;
        send.send("x").unwrap();
        send.send("x").unwrap();
        assert!(body.next().await.unwrap().is_ok());
        advance(secs(25)).await;
        assert!(body.next().await.unwrap().is_err(), "what never pauses, too");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_in_time_is_left_alone() {
        let (send, mut body) = body("").await;
        send.send("a").unwrap();
        drop(send);
        assert_eq!(body.next().await.unwrap().unwrap().bytes, "a");
        assert!(body.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_total_is_when_the_call_is_due() {
        let (mut service, mut inner) = testing::spawn(&TimeoutLayer::new(config("total-s = 7\nconnect-s = 0.5")));
        let _answer = ask(&mut service, call_of(Route::Chat, "tiny", None));
        let (call, _respond) = inner.next_request().await.unwrap();
        assert_eq!(call.deadline, Some(Instant::now() + secs(7)));
        assert_eq!(call.connect_limit, Some(Duration::from_millis(500)));
    }

    #[tokio::test(start_paused = true)]
    async fn without_limits_there_is_no_clock() {
        let none = "first-byte-s = 0\nunstreamed-s = 0\nidle-s = 0";
        let (send, mut body) = body(none).await;
        let waiting = tokio::spawn(async move { body.next().await.is_some() });
        advance(secs(1_000_000)).await;
        send.send("x").unwrap();
        assert!(waiting.await.unwrap());
        let rules = Rules { config: config(none), fits: Vec::new() };
        assert!(!rules.limits(&call_of(Route::Chat, "tiny", None)).need_a_clock());
        // What pulls and the like may take is nobody's business.
        let rules = Rules { config: Config::default(), fits: Vec::new() };
        for route in Route::ALL {
            assert_eq!(rules.limits(&call_of(route, "tiny", None)).need_a_clock(), !takes_its_time(route), "{route:?}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_counts_for_each_key() {
        let config = config(
            r#"
            idle-s = 1
            total-s = 2
            [[rules]]
            routes = ["embed", "v1-*"]
            unstreamed-s = 10
            [[rules]]
            models = ["big*"]
            first-byte-s = 20
            unstreamed-s = 21
            idle-s = 0
            [[rules]]
            routes = ["pull"]
            total-s = 30
            "#,
        );
        let rules = TimeoutLayer::new(config).rules;
        let limits = |route, model, stream| {
            let limits = rules.limits(&call_of(route, model, stream));
            [limits.first_byte, limits.idle, limits.total].map(|limit| limit.map_or(0, |limit| limit.as_secs()))
        };
        assert_eq!(limits(Route::Chat, "tiny", None), [900, 1, 2]);
        assert_eq!(limits(Route::Chat, "tiny", Some(false)), [3600, 1, 2]);
        assert_eq!(limits(Route::Embed, "tiny", None), [10, 1, 2]);
        assert_eq!(limits(Route::V1Chat, "BIG:70b", None), [10, 0, 2]);
        assert_eq!(limits(Route::V1Chat, "big:70b", Some(true)), [20, 0, 2]);
        assert_eq!(limits(Route::Chat, "big", Some(false)), [21, 0, 2]);
        assert_eq!(limits(Route::Pull, "big", None), [0, 0, 30]);
        assert_eq!(limits(Route::Push, "big", None), [0, 0, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dry_call_is_told_its_limits() {
        let (mut service, mut inner) = testing::spawn(&TimeoutLayer::new(config("first-byte-s = 1")));
        let mut call = call_of(Route::Chat, "tiny", None);
        Arc::get_mut(&mut call.head).unwrap().dry = true;
        let answer = ask(&mut service, call);
        let (call, respond) = inner.next_request().await.unwrap();
        let trail = serde_json::to_value(call.trail.take()).unwrap();
        let facts = serde_json::json!({"first-byte": 1000.0, "idle": 300_000.0});
        assert_eq!((&trail[0]["decision"], &trail[0]["facts"]), (&"the usual limits".into(), &facts));
        advance(secs(9)).await;
        respond.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok());
    }

    #[tokio::test(start_paused = true, flavor = "current_thread")]
    async fn what_took_too_long_is_counted() {
        let recorder = DebuggingRecorder::new();
        let _guard = metrics::set_default_local_recorder(&recorder);
        let (_send, mut body) = body("idle-s = 10").await;
        assert!(body.next().await.unwrap().is_err());
        let counted = recorder.snapshotter().snapshot().into_vec();
        let (key, .., value) = counted.into_iter().find(|(key, ..)| key.key().name() == "olol_timeouts_total").unwrap();
        let label = key.key().labels().next().unwrap();
        assert_eq!((label.key(), label.value(), value), ("phase", "idle", DebugValue::Counter(1)));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_line() {
        for (text, why) in [
            ("idle-s = -1", "a number of seconds"),
            ("idle-s = nan", "a number of seconds"),
            ("idle-s = 4e7", "a year at most"),
            ("idle-s = \"1m\"", "a number of seconds"),
            ("[[rules]]\nroutes = [\"caht\"]\nidle-s = 1", "unknown variant `caht`, expected one of `root`"),
            ("[[rules]]\nroutes = [\"v2-*\"]\nidle-s = 1", "unknown variant `v2-*`"),
            ("[[rules]]\nfirst-bite-s = 1", "unknown field `first-bite-s`"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("line"), "{text}\n{error}");
        }
        let rules = "[[rules]]\nidle-s = 1\n[[rules]]\nroutes = [\"chat\"]";
        assert!(config(rules).check().is_err_and(|(at, what)| at == 1 && what.starts_with("it must set a limit")));
    }

    #[test]
    fn a_configuration_reads_back_as_it_was() {
        let config = config("connect-s = 0.25\n[[rules]]\nroutes = [\"embed\"]\ntotal-s = 30");
        assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
    }
}
