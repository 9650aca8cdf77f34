//! Sends a short call to a second server when the first one is unusually late, and gives the answer that comes first.
//!
//! Off by default, and only for what is short and does no harm twice: embeddings, and questions about a model. (An answer of
//! `/api/chat` or `/api/generate` is neither: the second try would be as much work again.) How late is late is learned: a
//! second try goes out when 95 of 100 answers to this route, about this model, would be there. It goes to another server
//! that has the model in memory and a free slot, and the budget allows it; otherwise the first is waited for as ever. The
//! loser is dropped, which ends its work. A try that fails leaves the other alone.
//!
//! Belongs inside whatever decides where a call may go (`queue`, `model-route`, `affinity`), since that holds for both tries,
//! and outside `retry`, so that each of them is tried again by itself. Elsewhere it works, too, and less well: outside `queue`
//! a wait for a slot looks like a late answer.

mod times;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{Either, select};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tower::{Layer, Service, ServiceExt};

use crate::budget::{Allowance, Budget};
use crate::call::{Answer, Asked, Call, Payload, Reply};
use crate::cluster::Known;
use crate::error::Error;
use crate::instruments::{Hedged, Instruments};
use crate::route::Route;
use crate::slots::{Owner, Priority, Ticket};
use crate::trail::Fact;
use crate::units::{Share, SomeMs, Whole};

pub use times::Times;

/// The `[hedge]` table.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// The routes whose calls may have a second try; without any the layer is off.
    pub on: Vec<Short>,
    /// Of how many of a hundred answers the time must be over before a second try goes out.
    pub percentile: Whole<50, 99>,
    /// The least time that must be over, milliseconds.
    pub min_delay_ms: SomeMs,
    /// Answers to a route, about a model, that must be known before any second try.
    pub min_samples: Whole<1, 256>,
    /// Second tries per call that may have one.
    pub budget: Share,
    /// Second tries that each second adds to that.
    pub per_second: u32,
    /// Second tries that are there from the beginning, and the most that is saved up.
    pub reserve: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            on: Vec::new(),
            percentile: Whole::new(95),
            min_delay_ms: SomeMs::new(20),
            min_samples: Whole::new(30),
            budget: Share::of_thousand(50),
            per_second: 1,
            reserve: 10,
        }
    }
}

impl Config {
    /// Whether no call has a second try.
    pub fn is_off(&self) -> bool {
        self.on.is_empty()
    }

    fn allowance(&self) -> Allowance {
        Allowance { share: self.budget, per_second: self.per_second, reserve: self.reserve }
    }
}

/// A route whose calls are short, and do no harm when they are sent twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Short {
    /// `/api/embed`
    Embed,
    /// `/api/embeddings`
    Embeddings,
    /// `/v1/embeddings`
    V1Embeddings,
    /// `/api/show`
    Show,
    /// `/v1/models/:model`
    V1Model,
}

impl Short {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Embed, Self::Embeddings, Self::V1Embeddings, Self::Show, Self::V1Model];

    /// What a route is, if it is one of these.
    pub fn of(route: Route) -> Option<Self> {
        Some(match route {
            Route::Embed => Self::Embed,
            Route::Embeddings => Self::Embeddings,
            Route::V1Embeddings => Self::V1Embeddings,
            Route::Show => Self::Show,
            Route::V1Model => Self::V1Model,
            _ => return None,
        })
    }
}

/// Puts [`Hedge`] around a service.
#[derive(Clone, Debug)]
pub struct HedgeLayer {
    rules: Arc<Rules>,
}

#[derive(Debug)]
struct Rules {
    config: Config,
    budget: Arc<Budget>,
    instruments: Arc<Instruments>,
}

impl HedgeLayer {
    /// Sends second tries within a budget that outlives this stack.
    pub fn new(config: Config, budget: Arc<Budget>, instruments: Arc<Instruments>) -> Self {
        Self { rules: Arc::new(Rules { config, budget, instruments }) }
    }
}

impl<S> Layer<S> for HedgeLayer {
    type Service = Hedge<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Hedge { inner, rules: self.rules.clone() }
    }
}

/// Sends late calls a second time.
#[derive(Clone, Debug)]
pub struct Hedge<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for Hedge<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        let Some(watch) = self.rules.watch(&call) else { return Box::pin(self.inner.call(call)) };
        if call.dry {
            if let Some(delay) = watch.delay {
                call.note("hedge", "would send a second try", [("after-ms", Fact::ms(millis(delay)))]);
            }
            return Box::pin(self.inner.call(call));
        }
        let Some(spare) = call.again() else { return Box::pin(self.inner.call(call)) };
        self.rules.budget.deposit(&self.rules.config.allowance());
        let asked = Arc::new(Asked::default());
        call.asked = Some(asked.clone());
        let first = self.inner.call(call);
        Box::pin(hedge(self.rules.clone(), self.inner.clone(), spare, asked, watch, first))
    }
}

/// A call whose time is taken.
struct Watch {
    short: Short,
    known: Arc<Known>,
    /// After which time it is late, if that is known, and if there is anybody else.
    delay: Option<Duration>,
    began: Instant,
}

impl Watch {
    /// The first try was answered, or was beaten: then it would have taken even longer, which is all that a percentile below
    /// that must know.
    fn learn(&self) {
        self.known.runners.times.of(self.short).add(self.began.elapsed());
    }
}

/// Waits for the first try, and if it is late for whichever answers first.
async fn hedge<S>(
    rules: Arc<Rules>,
    service: S,
    spare: Call,
    asked: Arc<Asked>,
    watch: Watch,
    first: impl Future<Output = Result<Reply, Error>> + Send,
) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let mut first = std::pin::pin!(first);
    let in_time = match watch.delay {
        Some(delay) => tokio::time::timeout(delay, first.as_mut()).await.ok(),
        None => Some(first.as_mut().await),
    };
    let answer = match in_time {
        Some(answer) => answer,
        None => match rules.second(&spare, &asked, &watch) {
            // Boxed: seldom, and larger than all the rest.
            Some(second) => return Box::pin(rules.race(service, second, asked, watch, first)).await,
            None => first.await,
        },
    };
    if is_good(&answer) {
        watch.learn();
    }
    answer
}

impl Rules {
    /// Whether a call may have a second try, and when.
    fn watch(&self, call: &Call) -> Option<Watch> {
        let short = Short::of(call.route).filter(|short| self.config.on.contains(short))?;
        if !matches!(call.payload, Payload::Whole(_)) || call.peek.unloads() {
            return None;
        }
        let found = || call.candidates.snapshot().known(call.place.model.as_ref()?).cloned();
        let known = call.known.clone().or_else(found)?;
        let delay = if call.candidates.count() > 1 {
            let (percent, least) = (self.config.percentile.get(), self.config.min_samples.get());
            let late = known.runners.times.of(short).percentile(percent, least);
            late.map(|late| late.max(self.config.min_delay_ms.time()))
        } else {
            None
        };
        Some(Watch { short, known, delay, began: Instant::now() })
    }

    /// The second try, if it may and can be made.
    fn second(&self, spare: &Call, asked: &Asked, watch: &Watch) -> Option<Second> {
        let Some(call) = second(spare, asked, &watch.known) else {
            return self.none(spare, Hedged::NoServer, "no second try: nobody else has the model in memory");
        };
        if !self.budget.withdraw(&self.config.allowance()) {
            return self.none(spare, Hedged::NoBudget, "no second try: the budget is spent");
        }
        let late = [("after-ms", Fact::ms(millis(watch.began.elapsed())))];
        spare.note("hedge", "the first try is late: sends a second one", late);
        Some(Second {
            call,
            before: asked.attempts(),
            fate: Fate { instruments: self.instruments.clone(), how: Hedged::Left },
        })
    }

    fn none(&self, spare: &Call, how: Hedged, why: &'static str) -> Option<Second> {
        spare.note("hedge", why, []);
        self.instruments.hedged(how);
        None
    }

    /// Waits for both tries until one has an answer.
    async fn race<S>(
        &self,
        service: S,
        second: Second,
        asked: Arc<Asked>,
        watch: Watch,
        first: impl Future<Output = Result<Reply, Error>> + Send + Unpin,
    ) -> Result<Reply, Error>
    where
        S: Service<Call, Response = Reply, Error = Error> + Send + 'static,
        S::Future: Send + 'static,
    {
        let Second { mut call, before, mut fate } = second;
        let (head, also_asked) = (call.head.clone(), Arc::new(Asked::default()));
        call.asked = Some(also_asked.clone());
        let (note, tries) =
            (|how: &'static str| head.trail.note("hedge", how, []), Tries { before, asked, also_asked });
        // The loser is dropped when this returns.
        match select(first, Box::pin(service.oneshot(call))).await {
            Either::Left((first, second)) if !stands(&first) => {
                note("the first try failed");
                let second = second.await;
                if stands(&second) {
                    fate.how = Hedged::Won;
                    return tries.told(second, &tries.asked);
                }
                fate.how = Hedged::Failed;
                tries.told(first, &tries.also_asked)
            }
            Either::Left((first, _)) => {
                fate.how = Hedged::Lost;
                watch.learn();
                note("the first try has answered after all");
                tries.told(first, &tries.also_asked)
            }
            Either::Right((second, first)) if !stands(&second) => {
                let is_unsent = matches!(second, Err(Error::Busy { .. } | Error::NoServer(_)));
                if is_unsent {
                    self.budget.give_back(&self.config.allowance());
                    note("no second try: no slot is free");
                } else {
                    note("the second try failed");
                }
                fate.how = if is_unsent { Hedged::NoSlot } else { Hedged::Failed };
                drop(fate);
                let first = first.await;
                if is_good(&first) {
                    watch.learn();
                }
                tries.told(first, &tries.also_asked)
            }
            Either::Right((second, _)) => {
                fate.how = Hedged::Won;
                watch.learn();
                note("the second try has answered first");
                tries.told(second, &tries.asked)
            }
        }
    }
}

/// A second try that is about to be made.
struct Second {
    call: Call,
    /// Attempts that the first had taken by then.
    before: u32,
    fate: Fate,
}

/// What comes of a second try: counted at the end, also when its client leaves.
struct Fate {
    instruments: Arc<Instruments>,
    how: Hedged,
}

impl Drop for Fate {
    fn drop(&mut self) {
        self.instruments.hedged(self.how);
    }
}

/// Where both tries were sent.
struct Tries {
    before: u32,
    asked: Arc<Asked>,
    also_asked: Arc<Asked>,
}

impl Tries {
    /// An answer, which tells of the other try too.
    fn told(&self, answer: Result<Reply, Error>, other: &Asked) -> Result<Reply, Error> {
        let mut reply = answer?;
        let outcome = reply.body.outcome_mut();
        outcome.servers.insert_many(0, other.servers());
        // The second try counts on from where the first was; so what that was is in both.
        outcome.attempts = match self.also_asked.attempts() {
            0 => self.asked.attempts(),
            second => self.asked.attempts() + (second - self.before.min(second)),
        };
        Ok(reply)
    }
}

/// The call once more, for those whom the first has not asked, and who can answer at once.
fn second(spare: &Call, asked: &Asked, known: &Known) -> Option<Call> {
    let servers = asked.servers();
    if servers.is_empty() {
        return None;
    }
    let mut second = spare.again()?;
    servers.iter().for_each(|server| second.candidates.drop_server(server));
    if second.route.infers() {
        // A second try is to save time, and a load takes more of it than it could save.
        second.candidates.keep(&known.loaded);
        // Nor may it wait for a slot, or wait inside a server that is full: with a ticket it is told instead.
        second.ticket.get_or_insert_with(|| Arc::new(ticket()));
    }
    second.attempts = asked.attempts();
    let is_there = second.candidates.iter().any(|server| server.is_usable());
    is_there.then_some(second)
}

fn ticket() -> Ticket {
    let (owner, ages_after) = (Owner::Nobody, Duration::ZERO);
    Ticket { arrived: Instant::now(), priority: Priority::Low, owner, cost: 0, ages_after }
}

/// Whether an answer is one to give: a good one, or one that says what is wrong with the request itself.
fn stands(answer: &Result<Reply, Error>) -> bool {
    let Ok(reply) = answer else { return false };
    let of_server =
        [http::StatusCode::NOT_FOUND, http::StatusCode::REQUEST_TIMEOUT, http::StatusCode::TOO_MANY_REQUESTS];
    reply.status.is_success() || (reply.status.is_client_error() && !of_server.contains(&reply.status))
}

fn is_good(answer: &Result<Reply, Error>) -> bool {
    answer.as_ref().is_ok_and(|reply| reply.status.is_success())
}

fn millis(time: Duration) -> f32 {
    time.as_secs_f32() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Cluster;
    use crate::error::Phase;
    use crate::names::{ModelName, ServerId};
    use crate::testing::{self, ask};
    use http::StatusCode;
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};
    use tower_test::mock::{Handle, SendResponse};

    /// After this time a call is late: the end of the bucket of 50 ms.
    const LATE: Duration = Duration::from_millis(52);

    fn config() -> Config {
        Config { on: Short::ALL.to_vec(), ..Config::default() }
    }

    fn layer(config: Config) -> HedgeLayer {
        HedgeLayer::new(config, Arc::default(), Arc::default())
    }

    /// Servers that have a model in memory, of which it is known how long embeddings take.
    async fn cluster(servers: usize) -> Arc<Cluster> {
        let cluster = testing::cluster(&vec![&["tiny"][..]; servers]).await;
        for server in 0..servers {
            cluster.note_loaded(&ServerId::new(&server.to_string()), &tiny(), true);
        }
        cluster.catch_up().await;
        learn(&cluster, Short::Embed, 30);
        cluster
    }

    fn tiny() -> ModelName {
        ModelName::parse("tiny").unwrap()
    }

    fn known(cluster: &Cluster) -> Arc<Known> {
        cluster.snapshot().known(&tiny()).unwrap().clone()
    }

    /// How long embeddings take.
    fn late(cluster: &Cluster, least: u64) -> Option<Duration> {
        known(cluster).runners.times.of(Short::Embed).percentile(95, least)
    }

    /// So many answers took 50 ms.
    fn learn(cluster: &Cluster, short: Short, answers: usize) {
        (0..answers).for_each(|_| known(cluster).runners.times.of(short).add(Duration::from_millis(50)));
    }

    fn embed(cluster: &Arc<Cluster>) -> Call {
        testing::call_with(cluster, Route::Embed, r#"{"model":"tiny","input":"hi"}"#)
    }

    fn names(call: &Call) -> Vec<String> {
        call.candidates.iter().map(|server| server.id.to_string()).collect()
    }

    /// Takes the next call, as its server would.
    async fn next(inner: &mut Handle<Call, Reply>, server: &str) -> (Call, SendResponse<Reply>) {
        let (call, respond) = inner.next_request().await.unwrap();
        if let Some(asked) = &call.asked {
            asked.sent(&ServerId::new(server), call.attempts + 1);
        }
        (call, respond)
    }

    /// Whether nothing more is sent for a while.
    async fn is_quiet(inner: &mut Handle<Call, Reply>) -> bool {
        tokio::time::timeout(Duration::from_secs(60), inner.next_request()).await.is_err()
    }

    fn decisions(call: &Call) -> Vec<&'static str> {
        call.trail.take().iter().map(|note| note.decision).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_call_is_sent_to_another_server_and_the_first_answer_counts() {
        let cluster = cluster(3).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let began = Instant::now();
        let answer = ask(&mut service, embed(&cluster));
        let (first, _slow) = next(&mut inner, "1").await;
        let (second, respond) = next(&mut inner, "2").await;
        assert_eq!((began.elapsed(), names(&second)), (LATE, vec!["0".to_owned(), "2".to_owned()]));
        respond.send_response(testing::reply_of("2", "hi"));
        let reply = answer.await.unwrap();
        let outcome = reply.body.outcome();
        let servers: Vec<_> = outcome.servers.iter().map(ServerId::as_str).collect();
        assert_eq!((servers, outcome.attempts), (vec!["1", "2"], 2));
        let said = ["the first try is late: sends a second one", "the second try has answered first"];
        assert_eq!(decisions(&first), said);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_try_may_still_be_the_first_to_answer() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let answer = ask(&mut service, embed(&cluster));
        let (_call, first) = next(&mut inner, "0").await;
        let _second = next(&mut inner, "1").await;
        first.send_response(testing::reply_of("0", "hi"));
        let reply = answer.await.unwrap();
        let outcome = reply.body.outcome();
        assert_eq!((outcome.servers.last().unwrap().as_str(), outcome.attempts), ("0", 2));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_in_time_is_asked_alone() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let answer = ask(&mut service, embed(&cluster));
        let (_call, first) = next(&mut inner, "0").await;
        tokio::time::advance(Duration::from_millis(51)).await;
        first.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok() && is_quiet(&mut inner).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_try_that_fails_lets_the_other_go_on() {
        let cluster = cluster(2).await;
        for failing in [0, 1] {
            let (mut service, mut inner) = testing::spawn(&layer(config()));
            let answer = ask(&mut service, embed(&cluster));
            let first = next(&mut inner, "0").await.1;
            let second = next(&mut inner, "1").await.1;
            let (fails, works) = if failing == 0 { (first, second) } else { (second, first) };
            fails.send_error(testing::failure(&failing.to_string(), Phase::Waiting, false));
            tokio::time::sleep(Duration::from_secs(1)).await;
            works.send_response(testing::reply_of("x", "hi"));
            assert_eq!(answer.await.unwrap().body.collect(9).await.unwrap(), "hi", "{failing}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn when_both_fail_the_first_word_stands() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let answer = ask(&mut service, embed(&cluster));
        let first = next(&mut inner, "0").await.1;
        let second = next(&mut inner, "1").await.1;
        second.send_response(testing::busy("1"));
        first.send_error(testing::failure("0", Phase::Waiting, false));
        assert_eq!(answer.await.unwrap_err().server().unwrap().as_str(), "0");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wrong_with_the_request_is_an_answer() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let answer = ask(&mut service, embed(&cluster));
        let _slow = next(&mut inner, "0").await;
        let mut wrong = testing::reply_of("1", "no");
        wrong.status = StatusCode::BAD_REQUEST;
        next(&mut inner, "1").await.1.send_response(wrong);
        assert_eq!(answer.await.unwrap().status, StatusCode::BAD_REQUEST);
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_keeps_second_tries_to_a_share() {
        let cluster = cluster(2).await;
        let budget = Config { budget: Share::of_thousand(100), per_second: 0, reserve: 1, ..config() };
        let (mut service, mut inner) = testing::spawn(&layer(budget));
        let mut seconds = 0;
        for _ in 0..41 {
            let answer = ask(&mut service, embed(&cluster));
            let (call, first) = next(&mut inner, "0").await;
            // The second try, or none for as long as a late answer takes.
            if let Ok(second) = tokio::time::timeout(LATE * 2, next(&mut inner, "1")).await {
                seconds += 1;
                second.1.send_response(testing::reply("hi"));
            } else {
                assert!(decisions(&call).contains(&"no second try: the budget is spent"));
                first.send_response(testing::reply("hi"));
            }
            answer.await.unwrap();
            // Late answers move what is late; this test is about the budget.
            learn(&cluster, Short::Embed, 256);
        }
        assert_eq!(seconds, 5, "one that was there, and a tenth of forty");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_asked_who_would_have_to_load_the_model() {
        let cluster = cluster(2).await;
        cluster.note_loaded(&ServerId::new("1"), &tiny(), false);
        cluster.catch_up().await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let answer = ask(&mut service, embed(&cluster));
        let (call, first) = next(&mut inner, "0").await;
        assert!(is_quiet(&mut inner).await);
        assert_eq!(decisions(&call), ["no second try: nobody else has the model in memory"]);
        first.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_try_waits_for_no_slot() {
        let cluster = cluster(2).await;
        let config = Config { budget: Share::NONE, per_second: 0, reserve: 1, ..config() };
        let (mut service, mut inner) = testing::spawn(&layer(config));
        for _ in 0..3 {
            let answer = ask(&mut service, embed(&cluster));
            let (first, respond) = next(&mut inner, "0").await;
            let (second, refuse) = inner.next_request().await.unwrap();
            assert!(first.ticket.is_none() && second.ticket.is_some(), "without one it would wait at its server");
            refuse.send_error(Error::busy());
            tokio::time::sleep(Duration::from_millis(1)).await;
            respond.send_response(testing::reply("hi"));
            assert!(answer.await.is_ok());
            assert!(decisions(&first).contains(&"no second try: no slot is free"), "and nothing was spent");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_late_as_long_as_too_little_is_known() {
        let cluster = cluster(2).await;
        let config = Config { min_samples: Whole::new(31), ..config() };
        let (mut service, mut inner) = testing::spawn(&layer(config));
        for late in [false, true] {
            let answer = ask(&mut service, embed(&cluster));
            let first = next(&mut inner, "0").await.1;
            assert_eq!(is_quiet(&mut inner).await, !late);
            first.send_response(testing::reply("hi"));
            assert!(answer.await.is_ok());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_late_stays_so_when_second_tries_win() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        learn(&cluster, Short::Embed, 66);
        for _ in 0..4 {
            let answer = ask(&mut service, embed(&cluster));
            let _slow = next(&mut inner, "0").await;
            next(&mut inner, "1").await.1.send_response(testing::reply("hi"));
            assert!(answer.await.is_ok());
        }
        assert_eq!(late(&cluster, 100), Some(LATE), "four of a hundred were later");
    }

    #[tokio::test(start_paused = true)]
    async fn chats_and_other_routes_are_sent_once() {
        let cluster = cluster(2).await;
        for short in Short::ALL {
            learn(&cluster, short, 30);
        }
        let body = r#"{"model":"tiny"}"#;
        for (on, route) in [
            (config().on, Route::Chat),
            (config().on, Route::Generate),
            (config().on, Route::V1Chat),
            (config().on, Route::Pull),
            (vec![Short::Show], Route::Embed),
        ] {
            let (mut service, mut inner) = testing::spawn(&layer(Config { on, ..config() }));
            let answer = ask(&mut service, testing::call_with(&cluster, route, body));
            let first = inner.next_request().await.unwrap().1;
            assert!(is_quiet(&mut inner).await, "{route:?}");
            first.send_response(testing::reply("hi"));
            assert!(answer.await.is_ok());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_is_told_and_never_sent_twice() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let mut call = embed(&cluster);
        Arc::get_mut(&mut call.head).unwrap().dry = true;
        let answer = ask(&mut service, call);
        let (call, respond) = inner.next_request().await.unwrap();
        assert!(is_quiet(&mut inner).await && call.asked.is_none());
        respond.send_response(testing::reply(""));
        assert!(answer.await.is_ok());
        let note = serde_json::to_value(call.trail.take()).unwrap();
        assert_eq!(note[0]["facts"], serde_json::json!({"after-ms": 52.0}));
        assert!(late(&cluster, 31).is_none(), "and nothing is learned of it");
    }

    #[tokio::test(start_paused = true, flavor = "current_thread")]
    async fn what_came_of_second_tries_is_counted() {
        let recorder = DebuggingRecorder::new();
        let _guard = metrics::set_default_local_recorder(&recorder);
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(config()));
        let answer = ask(&mut service, embed(&cluster));
        let _slow = next(&mut inner, "0").await;
        next(&mut inner, "1").await.1.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok());
        // One whose client leaves while both are asked.
        let leaving = tokio::spawn(service.clone().oneshot(embed(&cluster)));
        let _both = (next(&mut inner, "0").await, next(&mut inner, "1").await);
        leaving.abort();
        assert!(leaving.await.is_err());
        let counted = recorder.snapshotter().snapshot().into_vec();
        let of = |result: &str| {
            let is_it = |key: &metrics::Key| {
                key.name() == "olol_hedges_total" && key.labels().any(|label| label.value() == result)
            };
            counted.iter().find(|(key, ..)| is_it(key.key())).map(|(.., value)| match value {
                DebugValue::Counter(count) => *count,
                other => panic!("{other:?}"),
            })
        };
        assert_eq!((of("won"), of("left"), of("lost")), (Some(1), Some(1), None));
    }

    #[test]
    fn only_what_is_short_can_be_named() {
        let error = toml::from_str::<Config>("on = [\"chat\"]").unwrap_err().to_string();
        assert!(error.contains("unknown variant `chat`, expected one of `embed`, `embeddings`"), "{error}");
        for route in Route::ALL {
            assert!(Short::of(route).is_none() || (route.is_idempotent() && !route.streams()), "{route:?}");
        }
        assert!(Config::default().is_off() && !config().is_off());
    }
}
