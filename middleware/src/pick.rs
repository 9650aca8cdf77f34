//! The leaf of the stack: takes the least loaded of the candidates, a place on it, and sends the call there.
//!
//! Servers that failed or do not answer are skipped while others are left; when nobody else is left they are asked all
//! the same, since what is believed of them may be old. The place is free again when the reply's body ends.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use smallvec::SmallVec;
use tower::Service;

use crate::call::{Answer, Call, End, Outcome, Reply, Watcher};
use crate::circuit::Trial;
use crate::cluster::{Candidates, Server};
use crate::error::Error;
use crate::instruments::ModelMeters;
use crate::slots::Lease;
use crate::stack;
use crate::trail::Fact;

/// Where the services of the servers come from.
pub trait Fleet: Clone + Send + Sync + 'static {
    /// The service of one server.
    type Service: Service<Call, Response = Reply, Error = Error, Future = Answer> + Send + 'static;

    /// The service of a server of the current snapshot, if it is still there.
    fn service(&self, server: &Server) -> Option<Self::Service>;
}

/// Sends each call to one of its candidates.
#[derive(Clone, Debug)]
pub struct Pick<F> {
    fleet: F,
}

impl<F: Fleet> Pick<F> {
    /// Picks from a fleet.
    pub fn new(fleet: F) -> Self {
        Self { fleet }
    }
}

impl<F: Fleet> Service<Call> for Pick<F> {
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let Some(server) = choose(&call.candidates) else {
            let why = if call.candidates.snapshot().servers.is_empty() {
                "the proxy has no servers; name some with --servers"
            } else {
                "every server that could be asked has failed"
            };
            call.note("pick", "nobody is left", []);
            return Box::pin(std::future::ready(Err(Error::NoServer(why.to_owned()))));
        };
        let facts = [("server", Fact::from(&server.id)), ("of", call.candidates.count().into())];
        call.note("pick", "the least loaded", facts);
        if call.dry {
            let mut reply = Reply::full(StatusCode::OK, HeaderMap::new(), Bytes::new());
            reply.body.outcome_mut().servers.push(server.id.clone());
            return Box::pin(std::future::ready(Ok(reply)));
        }
        match self.fleet.service(&server) {
            Some(service) => {
                let lease = server.load.lease();
                let trial = Trial::of(&call, &server);
                let attempts = call.attempts + 1;
                let model = call.known.as_ref().map(|known| known.meters.clone());
                let answer = stack::send(service, call);
                Box::pin(follow(server, Place { lease, trial }, attempts, model, answer))
            }
            None => Box::pin(std::future::ready(Err(Error::NoServer(format!("server {} has left", server.id))))),
        }
    }
}

/// The least loaded usable candidate; of equals the better of two taken at random.
fn choose(candidates: &Candidates) -> Option<Arc<Server>> {
    let mut servers: SmallVec<[&Arc<Server>; 16]> = candidates.iter().filter(|server| server.is_usable()).collect();
    if servers.is_empty() {
        servers = candidates.iter().collect();
    }
    // Calls per unit of weight, this one included, compared without dividing.
    let load = |server: &Server| u64::from(server.load.in_flight()) + 1;
    let is_less = |a: &Server, b: &Server| load(a) * u64::from(b.weight.get()) < load(b) * u64::from(a.weight.get());
    let best = *servers.iter().reduce(|best, next| if is_less(next, best) { next } else { best })?;
    servers.retain(|server| !is_less(best, server));
    let random = || servers.get(fastrand::usize(..servers.len().max(1))).copied().unwrap_or(best);
    let (one, other) = (random(), random());
    Some(if is_less(other, one) { other } else { one }.clone())
}

/// Keeps the place on a server for as long as its answer lasts, and tells how that goes.
async fn follow(
    server: Arc<Server>,
    mut place: Place,
    attempts: u32,
    model: Option<Arc<ModelMeters>>,
    answer: Answer,
) -> Result<Reply, Error> {
    match answer.await {
        Ok(mut reply) => {
            server.meters.attempt(true);
            if let Some(trial) = &mut place.trial {
                trial.answered(reply.status);
            }
            let outcome = reply.body.outcome_mut();
            outcome.servers.push(server.id.clone());
            outcome.attempts = attempts;
            outcome.model = model;
            Ok(reply.watch(Some(place)))
        }
        Err(error) => {
            server.meters.attempt(false);
            if let Some(trial) = place.trial {
                trial.failed(&error);
            }
            Err(error)
        }
    }
}

/// A place at a server while its answer lasts; then the server is judged by how that ended, and the place is free.
struct Place {
    #[expect(dead_code, reason = "held, not read")]
    lease: Lease,
    trial: Option<Trial>,
}

impl Watcher for Option<Place> {
    fn end(&mut self, end: End, _outcome: &Outcome) {
        if let Some(Place { trial: Some(mut trial), .. }) = self.take() {
            trial.ended(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use std::collections::HashMap;

    fn counts(cluster: &crate::Cluster, calls: usize) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        let mut leases = Vec::new();
        for _ in 0..calls {
            let server = choose(&cluster.snapshot().all()).unwrap();
            leases.push(server.load.lease());
            *counts.entry(server.id.to_string()).or_default() += 1;
        }
        counts
    }

    #[tokio::test]
    async fn calls_spread_evenly() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"], &["tiny"]]).await;
        assert_eq!(counts(&cluster, 30).into_values().collect::<Vec<_>>(), [10, 10, 10]);
    }

    #[tokio::test]
    async fn a_heavier_server_gets_more() {
        let cluster = testing::weighted_cluster(&[1, 3]).await;
        assert_eq!(counts(&cluster, 40)["1"], 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_down_is_skipped_while_another_is_left() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let falls = async |index| {
            cluster.check_failed(index, "no answer".into(), 1);
            tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        };
        falls(0).await;
        assert_eq!(counts(&cluster, 10)["1"], 10);
        falls(1).await;
        assert_eq!(counts(&cluster, 10).len(), 2);
    }

    #[tokio::test]
    async fn a_place_is_kept_until_the_body_ends() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let load = cluster.snapshot().servers[0].load.clone();
        let mut pick = Pick::new(testing::Always);
        let reply = pick.call(testing::call_in(&cluster, "tiny")).await.unwrap();
        assert_eq!(load.in_flight(), 1);
        drop(reply);
        assert_eq!(load.in_flight(), 0);
    }
}
