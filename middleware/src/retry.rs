//! Tries again when a server fails before the first byte of its answer: on another server, or once on a fresh connection
//! to the only one.
//!
//! Belongs inside `model-route`. What reached a client is never begun again here. A budget keeps retries to a share of the
//! traffic, so that servers in trouble are not buried under second tries.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use tower::{Layer, Service, ServiceExt};

use crate::call::{Answer, Call, Reply};
use crate::error::{Error, Phase};
use crate::instruments::Instruments;
use crate::route::Scope;
use crate::trail::Fact;
use crate::units::Share;

/// The `[retry]` table.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Attempts that one call may take, the first included.
    pub attempts: NonZeroU32,
    /// Retries per request that the budget gains; 0.2 keeps retries to a fifth of the traffic.
    pub budget: Share,
    /// Retries that are always there for quiet times, and the most that the budget saves up.
    pub reserve: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { attempts: NonZeroU32::MIN.saturating_add(2), budget: Share::of_thousand(200), reserve: 100 }
    }
}

/// How many retries are left, in thousandths. Every request adds a share of one, every retry takes a whole one.
///
/// tower's own budget takes a lock at every request; this one is an atomic.
#[derive(Debug)]
pub struct Budget(AtomicI64);

impl Default for Budget {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MAX))
    }
}

impl Budget {
    fn deposit(&self, config: &Config) {
        let full = i64::from(config.reserve) * 1000;
        let now = self.0.load(Ordering::Relaxed);
        if now != full {
            // Two deposits at once may count as one: a budget is no ledger.
            self.0.store(now.saturating_add(config.budget.thousandths()).min(full), Ordering::Relaxed);
        }
    }

    fn withdraw(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| (left >= 1000).then(|| left - 1000)).is_ok()
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
    budget: Arc<Budget>,
    instruments: Arc<Instruments>,
}

impl RetryLayer {
    /// Retries within a budget that outlives this stack.
    pub fn new(config: Config, budget: Arc<Budget>, instruments: Arc<Instruments>) -> Self {
        Self { rules: Arc::new(Rules { config, budget, instruments }) }
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Retry { inner, rules: self.rules.clone() }
    }
}

/// Tries calls again.
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
        // Calls to several servers at once are retried server by server, where they are sent.
        if call.dry || !matches!(call.route.scope(), Scope::One | Scope::Same) {
            return Box::pin(self.inner.call(call));
        }
        self.rules.budget.deposit(&self.rules.config);
        let Some(spare) = call.again() else { return Box::pin(self.inner.call(call)) };
        let answer = self.inner.call(call);
        Box::pin(attempt(self.rules.clone(), self.inner.clone(), spare, answer))
    }
}

async fn attempt<S>(
    rules: Arc<Rules>,
    service: S,
    spare: Call,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error>,
{
    let answer = answer.await;
    if !has_failed(&answer) {
        return answer;
    }
    // Boxed: seldom, and larger than all the rest.
    Box::pin(rules.go_on(service, spare, answer)).await
}

impl Rules {
    /// Tries again for as long as that may help.
    async fn go_on<S>(&self, mut service: S, mut spare: Call, mut answer: Result<Reply, Error>) -> Result<Reply, Error>
    where
        S: Service<Call, Response = Reply, Error = Error>,
    {
        loop {
            let Some((call, cause)) = self.next(&mut spare, &answer) else { return answer };
            if !self.budget.withdraw() {
                spare.note("retry", "the budget is spent", [("cause", Fact::Word(cause))]);
                return answer;
            }
            self.instruments.retried(cause);
            spare.note("retry", "again", [("cause", Fact::Word(cause)), ("attempts", spare.attempts.into())]);
            tracing::debug!(id = %spare.id, cause, attempt = spare.attempts + 1, "trying again");
            answer = service.ready().await?.call(call).await;
        }
    }

    /// The next attempt, and why it is needed; `None` if the answer stands. The spare call keeps who may be asked after it.
    fn next(&self, spare: &mut Call, answer: &Result<Reply, Error>) -> Option<(Call, &'static str)> {
        let (failed, may_be_reached, reused, cause) = match answer {
            Ok(reply) if is_elsewhere(reply.status) => {
                (reply.body.outcome().servers.last()?.clone(), false, false, "busy")
            }
            Err(error @ Error::Server { server, phase, reused, .. }) if error.is_retryable() => {
                let reached = *phase == Phase::Waiting;
                // What may have been done already is done again only if that does no harm.
                if reached && !reused && !spare.route.is_idempotent() {
                    return None;
                }
                (server.clone(), *phase == Phase::Connecting || *reused, *reused, error.kind())
            }
            _ => return None,
        };
        // A pooled connection that had died was no attempt: the server has not been asked yet.
        if reused && !spare.fresh {
            spare.fresh = true;
            let index = spare.candidates.snapshot().servers.iter().find(|server| server.id == failed)?.index;
            let mut again = spare.again()?;
            again.candidates.only(index);
            return Some((again, "stale-connection"));
        }
        spare.attempts += 1;
        if spare.attempts >= self.config.attempts.get() {
            return None;
        }
        let only_one = spare.candidates.iter().count() <= 1;
        if only_one && (!may_be_reached || spare.fresh) {
            return None;
        }
        if only_one {
            spare.fresh = true;
        } else {
            spare.candidates.drop_server(&failed);
        }
        Some((spare.again()?, cause))
    }
}

/// Whether another attempt could be of use at all.
fn has_failed(answer: &Result<Reply, Error>) -> bool {
    match answer {
        Ok(reply) => is_elsewhere(reply.status),
        Err(error) => error.is_retryable(),
    }
}

/// Whether a status says that another server may do better. What a server says of the request itself stands.
fn is_elsewhere(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, ask, failure};

    fn layer(config: Config) -> RetryLayer {
        RetryLayer::new(config, Arc::default(), Arc::default())
    }

    fn names(call: &Call) -> Vec<String> {
        call.candidates.iter().map(|server| server.id.to_string()).collect()
    }

    #[tokio::test]
    async fn a_server_that_failed_is_not_asked_again() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(failure("0", Phase::Waiting, false));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!((names(&call), call.attempts), (vec!["1".to_owned()], 1));
        respond.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok());
    }

    #[tokio::test]
    async fn a_dead_pooled_connection_is_replaced_on_the_same_server() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(failure("0", Phase::Waiting, true));
        let (call, respond) = inner.next_request().await.unwrap();
        assert!(call.fresh && names(&call) == ["0"]);
        respond.send_error(failure("0", Phase::Waiting, false));
        assert!(answer.await.is_err());
    }

    #[tokio::test]
    async fn a_server_that_fails_on_a_fresh_connection_too_is_left_for_another() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(failure("0", Phase::Waiting, true));
        inner.next_request().await.unwrap().1.send_error(failure("0", Phase::Waiting, false));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!((names(&call), call.attempts), (vec!["1".to_owned()], 1));
        respond.send_response(testing::reply("hi"));
        assert!(answer.await.is_ok());
    }

    #[tokio::test]
    async fn a_broken_stream_is_not_begun_again() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(failure("0", Phase::Streaming, false));
        assert!(answer.await.is_err());
    }

    #[tokio::test]
    async fn a_busy_server_hands_over_to_the_next_and_the_last_word_stands() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&layer(Config::default()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_response(testing::busy("0"));
        inner.next_request().await.unwrap().1.send_response(testing::busy("1"));
        assert_eq!(answer.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test]
    async fn a_spent_budget_ends_the_tries() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) =
            testing::spawn(&layer(Config { budget: Share::NONE, reserve: 0, ..Config::default() }));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_error(failure("0", Phase::Connecting, false));
        assert!(answer.await.is_err());
    }
}
