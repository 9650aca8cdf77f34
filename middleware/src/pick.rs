//! The leaf of the stack: takes the least loaded of the candidates, a place on it, and sends the call there.
//!
//! Where `affinity` would have a call go counts more than the load, as far as that layer says it should.
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
use crate::cluster::{Candidates, Server};
use crate::error::{Error, Phase};
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
        let preferred = preferred(&call).cloned();
        let why = if preferred.is_some() { "preferred by affinity" } else { "the least loaded" };
        let Some(server) = preferred.or_else(|| choose(&call.candidates)) else {
            let why = if call.candidates.snapshot().servers.is_empty() {
                "the proxy has no servers; name some with --servers"
            } else {
                "every server that could be asked has failed"
            };
            call.note("pick", "nobody is left", []);
            return Box::pin(std::future::ready(Err(Error::NoServer(why.to_owned()))));
        };
        let facts = [("server", Fact::from(&server.id)), ("of", call.candidates.count().into())];
        call.note("pick", why, facts);
        if call.dry {
            let mut reply = Reply::full(StatusCode::OK, HeaderMap::new(), Bytes::new());
            reply.body.outcome_mut().servers.push(server.id.clone());
            return Box::pin(std::future::ready(Ok(reply)));
        }
        match self.fleet.service(&server) {
            Some(service) => {
                let lease = server.load.lease();
                let attempts = call.attempts + 1;
                let model = call.known.as_ref().map(|known| known.meters.clone());
                let answer = stack::send(service, call);
                Box::pin(follow(server, lease, attempts, model, answer))
            }
            None => Box::pin(std::future::ready(Err(Error::NoServer(format!("server {} has left", server.id))))),
        }
    }
}

/// How much busier than the least busy server one may be that is only preferred as long as that costs nothing.
const NEAR: f64 = 1.2;

/// The best of those that `affinity` prefers, if one is in question still, and well.
fn preferred(call: &Call) -> Option<&Arc<Server>> {
    let preferred = call.preferred.as_deref()?;
    let load = |server: &Server| f64::from(server.load.in_flight() + 1) / f64::from(server.weight.get());
    let most = if preferred.yields {
        NEAR * call.candidates.iter().filter(|server| server.is_usable()).map(|server| load(server)).reduce(f64::min)?
    } else {
        f64::INFINITY
    };
    let mut servers = preferred.servers.iter().filter_map(|index| call.candidates.get(*index));
    servers.find(|server| server.is_usable() && load(server) <= most)
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

/// Judges a server by its answer, and keeps the place on it for as long as that lasts.
async fn follow(
    server: Arc<Server>,
    lease: Lease,
    attempts: u32,
    model: Option<Arc<ModelMeters>>,
    answer: Answer,
) -> Result<Reply, Error> {
    match answer.await {
        Ok(mut reply) => {
            server.meters.attempt(true);
            let outcome = reply.body.outcome_mut();
            outcome.servers.push(server.id.clone());
            outcome.attempts = attempts;
            outcome.model = model;
            Ok(reply.watch(Place { server, lease: Some(lease) }))
        }
        Err(error) => {
            server.meters.attempt(false);
            if let Error::Server { phase, reused, .. } = &error
                // A pooled connection that had died says nothing about its server.
                && !reused
            {
                server.health.failed(*phase == Phase::Connecting);
            }
            Err(error)
        }
    }
}

/// A place at a server while its answer lasts; then the server is judged by how that ended, and the place is free.
struct Place {
    server: Arc<Server>,
    lease: Option<Lease>,
}

impl Watcher for Place {
    fn end(&mut self, end: End, _outcome: &Outcome) {
        match end {
            End::Whole => self.server.health.succeeded(),
            End::Broken(_) => self.server.health.failed(false),
            End::Dropped => {}
        }
        self.lease = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Preferred;
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

    #[tokio::test]
    async fn a_failing_server_is_skipped_while_another_is_left() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        cluster.snapshot().servers[0].health.failed(true);
        assert_eq!(counts(&cluster, 10)["1"], 10);
        cluster.snapshot().servers[1].health.failed(true);
        assert_eq!(counts(&cluster, 10).len(), 2);
    }

    #[tokio::test]
    async fn a_preferred_server_is_taken_while_it_can_be() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"], &["tiny"]]).await;
        let servers = cluster.snapshot().servers.clone();
        let mut call = testing::call_in(&cluster, "tiny");
        let chosen = |call: &Call| preferred(call).map(|server| server.index);
        assert_eq!(chosen(&call), None);
        call.preferred = Some(Box::new(Preferred { servers: smallvec::smallvec![2, 0], ..Preferred::default() }));
        let busy: Vec<_> = (0..9).map(|_| servers[2].load.lease()).collect();
        assert_eq!(chosen(&call), Some(2), "however busy");
        call.preferred.as_mut().unwrap().yields = true;
        assert_eq!(chosen(&call), Some(0), "a wait is not worth it");
        drop(busy);
        assert_eq!(chosen(&call), Some(2));
        servers[2].health.failed(true);
        assert_eq!(chosen(&call), Some(0));
        call.candidates.drop_server(&servers[0].id);
        assert_eq!(chosen(&call), None);
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
