//! Asks another server when one fails: before the first byte with the same call, after it from the text already sent.
//!
//! Belongs inside `model-route`, so that it chooses among the servers that have the model. Before the first byte of an
//! answer a call is simply sent again: to another server, or once on a fresh connection to the only one. A stream that
//! breaks off later goes on elsewhere where that can be done faithfully ([`resume`]). Servers whose circuit is open are left
//! alone while there are others ([`narrow`], [`crate::circuit`]). A budget keeps second tries to a share of the traffic, so that
//! servers in trouble are not buried under them.

mod ask;
mod border;
mod delivered;
mod failure;
mod mould;
mod narrow;
mod openai;
mod request;
mod resume;
mod whole;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tower::{Layer, Service, ServiceExt};

use crate::budget::{Allowance, Budget};
use crate::call::{Answer, Call, Payload, Reply};
use crate::circuit::Limits;
use crate::cluster::{Cluster, Server};
use crate::error::Error;
use crate::instruments::Instruments;
use crate::route::Scope;
use crate::runner::Runner;
use crate::trail::Fact;
use crate::units::{Seconds, Share, SomeMs, SomeSeconds};

use failure::Failure;

/// The `[retry]` table.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Attempts that one call may take, the first included. A stream that breaks off may take as many again.
    pub attempts: NonZeroU32,
    /// Retries per request that the budget gains; 0.2 keeps retries to a fifth of the traffic.
    pub budget: Share,
    /// Retries that the budget gains each second besides: a server that dies takes a third of a small cluster's calls with it.
    pub per_second: u32,
    /// Retries that are there from the beginning, and the most that the budget saves up.
    pub reserve: u32,
    /// Whether a stream whose server dies goes on elsewhere from the text already sent.
    pub resume: Resume,
    /// Seconds for which a stream waits, while nobody is there who could go on with it.
    pub resume_wait_s: Seconds,
    /// Failures in a row after which a server, or one model on it, is left alone for a while.
    pub breaker_failures: NonZeroU32,
    /// Milliseconds for which it is left alone at first; twice as long after each try that fails.
    pub breaker_open_ms: SomeMs,
    /// The longest that it is left alone, milliseconds.
    pub breaker_max_open_ms: SomeMs,
    /// Seconds after which a server that is well again has its full share of calls.
    pub ramp_s: Seconds,
    /// Seconds for which a loaded model may be silent towards everybody who asks for a stream, before it has failed.
    pub hang_s: SomeSeconds,
}

/// When a stream goes on elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resume {
    /// Whenever its text is the same as if nothing had happened.
    #[default]
    Auto,
    /// Never.
    Off,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            attempts: NonZeroU32::MIN.saturating_add(2),
            budget: Share::of_thousand(200),
            per_second: 10,
            reserve: 100,
            resume: Resume::Auto,
            resume_wait_s: Seconds::new(15),
            breaker_failures: NonZeroU32::MIN.saturating_add(2),
            breaker_open_ms: SomeMs::new(1000),
            breaker_max_open_ms: SomeMs::new(60_000),
            ramp_s: Seconds::new(10),
            hang_s: SomeSeconds::new(60),
        }
    }
}

impl Config {
    /// By which rules servers are judged.
    fn limits(&self) -> Limits {
        Limits {
            failures: self.breaker_failures.get(),
            open: self.breaker_open_ms.time(),
            longest: self.breaker_max_open_ms.time(),
            ramp: self.ramp_s.time(),
            hang: self.hang_s.time(),
        }
    }
}

/// Puts [`Retry`] around a service.
#[derive(Clone, Debug)]
pub struct RetryLayer {
    rules: Arc<Rules>,
}

#[derive(Debug)]
struct Rules {
    config: Config,
    limits: Arc<Limits>,
    allowance: Allowance,
    budget: Arc<Budget>,
    cluster: Arc<Cluster>,
    instruments: Arc<Instruments>,
}

impl RetryLayer {
    /// Retries within a budget, and among servers, that outlive this stack.
    pub fn new(config: Config, budget: Arc<Budget>, cluster: Arc<Cluster>, instruments: Arc<Instruments>) -> Self {
        let limits = Arc::new(config.limits());
        let allowance = Allowance { share: config.budget, per_second: config.per_second, reserve: config.reserve };
        Self { rules: Arc::new(Rules { config, limits, allowance, budget, cluster, instruments }) }
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Retry { inner, rules: self.rules.clone() }
    }
}

/// Tries calls again, and goes on with streams.
#[derive(Clone, Debug)]
pub struct Retry<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for Retry<S>
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

    fn call(&mut self, call: Call) -> Self::Future {
        let mut call = call;
        call.limits = Some(self.rules.limits.clone());
        // Calls to several servers at once are retried server by server, where they are sent.
        if !matches!(call.route.scope(), Scope::One | Scope::Same) {
            return Box::pin(self.inner.call(call));
        }
        if call.dry {
            let may_probe = matches!(call.payload, Payload::Whole(_));
            self.rules.leave_alone(&mut call, may_probe);
            return Box::pin(self.inner.call(call));
        }
        self.rules.budget.deposit(&self.rules.allowance);
        let spare = call.again();
        let probed = self.rules.leave_alone(&mut call, spare.is_some());
        let answer = self.inner.call(call);
        match spare {
            Some(spare) => Box::pin(attempt(self.rules.clone(), self.inner.clone(), spare, probed, answer)),
            None => Box::pin(answer),
        }
    }
}

async fn attempt<S>(
    rules: Arc<Rules>,
    service: S,
    spare: Call,
    probed: Option<Arc<Server>>,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let answer = match probed {
        None => answer.await,
        Some(server) => {
            let runner = failure::runner(&spare, &server);
            rules.probe(&server, runner, answer).await
        }
    };
    match answer {
        Ok(reply) if reply.status.is_success() && (reply.is_stream() || !spare.route.infers()) => {
            Ok(resume::follow(rules, service, spare, reply))
        }
        // Boxed: seldom, or an answer in one piece, and larger than all the rest.
        answer => Box::pin(rules.go_on(service, spare, answer)).await,
    }
}

impl Rules {
    /// Waits for a call that finds out about a server; no longer than it may be silent, since there are others.
    async fn probe(
        &self,
        server: &Server,
        runner: Option<Arc<Runner>>,
        answer: impl Future<Output = Result<Reply, Error>>,
    ) -> Result<Reply, Error> {
        let answer = tokio::time::timeout(self.limits.hang, answer).await;
        let answer = answer.unwrap_or_else(|_| Err(failure::silent(server.id.clone(), &self.limits)));
        if let Err(Error::Busy { .. } | Error::NoServer(_)) = &answer {
            // It was not sent.
            server.circuits.give_back(runner.as_deref());
        }
        answer
    }

    /// Tries again for as long as that may help.
    async fn go_on<S>(
        self: Arc<Self>,
        mut service: S,
        mut spare: Call,
        mut answer: Result<Reply, Error>,
    ) -> Result<Reply, Error>
    where
        S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        loop {
            let failure;
            (answer, failure) = self.look(answer, &mut spare).await;
            let Some(failure) = failure else {
                return answer.map(|reply| resume::follow(self, service, spare, reply));
            };
            let Some((mut call, cause)) = self.next(&mut spare, &failure) else { return answer };
            if !self.budget.withdraw(&self.allowance) {
                self.instruments.spared();
                spare.note("retry", "the budget is spent", [("cause", Fact::Word(cause))]);
                return answer;
            }
            self.instruments.retried(cause);
            if !call.candidates.contains(&failure.server) {
                self.instruments.failed_over();
            }
            spare.note("retry", "again", [("cause", Fact::Word(cause)), ("attempts", spare.attempts.into())]);
            tracing::debug!(id = %spare.id, cause, attempt = spare.attempts + 1, "trying again");
            self.leave_alone(&mut call, false);
            answer = service.ready().await?.call(call).await;
        }
    }

    /// The next attempt, and why it is needed; `None` if the answer stands. The spare call keeps who may be asked after it.
    fn next(&self, spare: &mut Call, failure: &Failure) -> Option<(Call, &'static str)> {
        // A pooled connection that had died was no attempt: the server has not been asked yet.
        if failure.reused && !spare.fresh {
            spare.fresh = true;
            let index = spare.candidates.index_of(&failure.server)?;
            let mut again = spare.again()?;
            again.candidates.only(index);
            return Some((again, "stale-connection"));
        }
        spare.attempts += 1;
        if spare.attempts >= self.config.attempts.get() {
            return None;
        }
        if spare.candidates.has_other_than(&failure.server) {
            spare.candidates.drop_server(&failure.server);
        } else if failure.may_be_reached && !spare.fresh {
            spare.fresh = true;
        } else {
            return None;
        }
        Some((spare.again()?, failure.cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Phase;
    use crate::testing::{self, ask};
    use http::StatusCode;
    use std::time::Duration;

    fn layer(config: Config, cluster: &Arc<Cluster>) -> RetryLayer {
        RetryLayer::new(config, Arc::default(), cluster.clone(), Arc::default())
    }

    fn names(call: &Call) -> Vec<String> {
        call.candidates.iter().map(|server| server.id.to_string()).collect()
    }

    #[tokio::test]
    async fn a_server_that_failed_is_not_asked_again() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Waiting, false));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!((names(&call), call.attempts), (vec!["1".to_owned()], 1));
        respond.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok());
    }

    #[tokio::test]
    async fn a_dead_pooled_connection_is_replaced_on_the_same_server() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Waiting, true));
        let (call, respond) = inner.next_request().await.unwrap();
        assert!(call.fresh && names(&call) == ["0"]);
        respond.send_error(testing::failure("0", Phase::Waiting, false));
        assert!(answer.await.is_err());
    }

    #[tokio::test]
    async fn a_server_that_fails_on_a_fresh_connection_too_is_left_for_another() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Waiting, true));
        inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Waiting, false));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!((names(&call), call.attempts), (vec!["1".to_owned()], 1));
        respond.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok());
    }

    #[tokio::test]
    async fn a_broken_stream_is_not_begun_again() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Streaming, false));
        assert!(answer.await.is_err());
    }

    #[tokio::test]
    async fn a_busy_server_hands_over_to_the_next_and_the_last_word_stands() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_response(testing::busy("0"));
        inner.next_request().await.unwrap().1.send_response(testing::busy("1"));
        assert_eq!(answer.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test]
    async fn a_spent_budget_ends_the_tries() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let config = Config { budget: Share::NONE, per_second: 0, reserve: 0, ..Config::default() };
        let (mut service, mut inner) = testing::spawn(&layer(config, &cluster));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Connecting, false));
        assert!(answer.await.is_err());
    }

    /// A cluster whose first server has failed a model so often that it is left alone with it.
    async fn troubled() -> Arc<Cluster> {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        fail(&cluster, 0);
        cluster
    }

    fn fail(cluster: &Arc<Cluster>, server: usize) {
        let (known, limits) = (known_call(cluster).known.unwrap(), Config::default().limits());
        let server = cluster.snapshot().servers[server].clone();
        let runner = known.runners.at(&server);
        (0..3).for_each(|_| server.circuits.failed(Some((&known.name, &runner)), &limits));
    }

    /// A call that has been through `model-route`.
    fn known_call(cluster: &Arc<Cluster>) -> Call {
        let mut call = testing::call_in(cluster, "tiny");
        call.known = call.place.model.as_ref().and_then(|model| cluster.snapshot().known(model).cloned());
        call
    }

    async fn asked(cluster: &Arc<Cluster>, call: Call) -> Vec<String> {
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), cluster));
        let answer = ask(&mut service, call);
        let (call, respond) = inner.next_request().await.unwrap();
        respond.send_response(testing::reply("hi"));
        answer.await.unwrap();
        names(&call)
    }

    #[tokio::test(start_paused = true)]
    async fn who_fails_a_model_is_left_alone_with_it_while_there_are_others() {
        let cluster = troubled().await;
        assert_eq!(asked(&cluster, known_call(&cluster)).await, ["1"]);
        let mut only = known_call(&cluster);
        only.candidates.only(0);
        assert_eq!(asked(&cluster, only).await, ["0"], "nobody else is left");
        fail(&cluster, 1);
        assert_eq!(asked(&cluster, known_call(&cluster)).await, ["0", "1"], "all are asked all the same");
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_finds_out_and_is_sent_elsewhere_if_it_fails() {
        let cluster = troubled().await;
        tokio::time::advance(Duration::from_secs(2)).await;
        let mut dry = known_call(&cluster);
        Arc::get_mut(&mut dry.head).unwrap().dry = true;
        assert_eq!(asked(&cluster, dry).await, ["0"], "whoever asks what would be done is told, and takes no turn");
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
        let probe = ask(&mut service, known_call(&cluster));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!(names(&call), ["0"]);
        assert_eq!(asked(&cluster, known_call(&cluster)).await, ["1"], "one is enough");
        respond.send_error(testing::failure("0", Phase::Waiting, false));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!(names(&call), ["1"]);
        respond.send_response(testing::reply("hi"));
        assert!(probe.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_silent_when_asked_to_show_that_it_is_well_is_not_waited_for() {
        let cluster = troubled().await;
        tokio::time::advance(Duration::from_secs(2)).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
        let probe = ask(&mut service, known_call(&cluster));
        let _silent = inner.next_request().await.unwrap();
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!(names(&call), ["1"]);
        respond.send_response(testing::reply("hi"));
        assert!(probe.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_says_its_runner_died_hands_over_and_the_request_that_is_wrong_does_not() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        for (text, asked) in
            [("llama-server process has terminated: exit status 1", 2), ("template: unclosed action", 1)]
        {
            let (mut service, mut inner) = testing::spawn(&layer(Config::default(), &cluster));
            let answer = ask(&mut service, known_call(&cluster));
            let mut reply = testing::json("0", text);
            reply.status = StatusCode::INTERNAL_SERVER_ERROR;
            inner.next_request().await.unwrap().1.send_response(reply);
            if asked == 2 {
                inner.next_request().await.unwrap().1.send_response(testing::reply("hi"));
            }
            let wanted = if asked == 2 { "hi" } else { text };
            assert_eq!(answer.await.unwrap().body.collect(99).await.unwrap(), wanted);
        }
    }
}
