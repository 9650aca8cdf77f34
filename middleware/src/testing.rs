//! What the tests of layers share: a scripted inner service, samples of calls and replies, small clusters.

use std::num::NonZeroU32;
use std::sync::Arc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use tower::{Layer, Service, ServiceExt};
use tower_test::mock::{Handle, Mock};

use crate::call::{Body, Call, Chunk, Head, Payload, Reply};
use crate::cluster::{Cluster, Member, Model, Report, Server};
use crate::error::{BoxError, Error, Phase};
use crate::names::{ModelName, ServerId};
use crate::peek::Peek;
use crate::pick::Fleet;
use crate::route::Route;

/// An inner service that does what the test says, with errors of our own kind.
#[derive(Debug)]
pub(crate) struct Scripted(Mock<Call, Reply>);

impl Clone for Scripted {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl Service<Call> for Scripted {
    type Response = Reply;
    type Error = Error;
    type Future = futures_util::future::BoxFuture<'static, Result<Reply, Error>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Error>> {
        self.0.poll_ready(cx).map_err(own)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let answer = self.0.call(call);
        Box::pin(async move { answer.await.map_err(own) })
    }
}

fn own(error: BoxError) -> Error {
    error.downcast::<Error>().map_or_else(|other| Error::Internal(other.to_string()), |error| *error)
}

/// A layer around a scripted service, and the script's handle.
pub(crate) fn spawn<L: Layer<Scripted>>(layer: &L) -> (L::Service, Handle<Call, Reply>) {
    let (mock, mut handle) = tower_test::mock::pair();
    handle.allow(u64::MAX);
    (layer.layer(Scripted(mock)), handle)
}

/// Sends a call; the answer runs by itself.
pub(crate) fn ask<S>(service: &mut S, call: Call) -> impl Future<Output = Result<Reply, Error>> + use<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let running = tokio::spawn(service.clone().oneshot(call));
    async move { running.await.unwrap_or_else(|panic| Err(Error::Internal(panic.to_string()))) }
}

/// A cluster of servers "0", "1", … with these models.
pub(crate) async fn cluster(models: &[&[&str]]) -> Arc<Cluster> {
    let cluster = members(&vec![1; models.len()]);
    for (index, models) in models.iter().enumerate() {
        report(&cluster, index, models);
    }
    cluster.catch_up().await;
    cluster
}

/// A cluster of servers with these weights, all with the model `tiny`.
pub(crate) async fn weighted_cluster(weights: &[u32]) -> Arc<Cluster> {
    let cluster = members(weights);
    (0..weights.len()).for_each(|index| report(&cluster, index, &["tiny"]));
    cluster.catch_up().await;
    cluster
}

fn members(weights: &[u32]) -> Arc<Cluster> {
    let member = |(index, weight): (usize, &u32)| Member {
        id: ServerId::new(&index.to_string()),
        weight: NonZeroU32::new(*weight).unwrap_or(NonZeroU32::MIN),
        source: crate::cluster::Source::Static,
    };
    Cluster::new(weights.iter().enumerate().map(member).collect())
}

fn report(cluster: &Cluster, index: usize, models: &[&str]) {
    let models = models.iter().map(|name| Model { name: (*name).to_owned(), ..Model::default() }).collect();
    cluster.report(index, Report { models, ..Report::default() });
}

/// A chat call for a model, in a cluster of one.
pub(crate) async fn call(model: &str) -> Call {
    call_in(&cluster(&[&[model]]).await, model)
}

/// A chat call for a model.
pub(crate) fn call_in(cluster: &Arc<Cluster>, model: &str) -> Call {
    let head = Head {
        peek: Peek { model: Some(model.to_owned()), asks: true, ..Peek::default() },
        model: ModelName::parse(model),
        ..Head::new(Route::Chat, Method::POST, PathAndQuery::from_static("/api/chat"))
    };
    Call::new(head, Payload::from_bytes("{}"), cluster.snapshot().all())
}

/// A call with a body, as the edge makes it.
pub(crate) fn call_with(cluster: &Arc<Cluster>, route: Route, body: &str) -> Call {
    let pieces = [Bytes::copy_from_slice(body.as_bytes())];
    let mut head = Head::new(route, Method::POST, PathAndQuery::from_static("/"));
    head.peek = Peek::json(&pieces);
    head.model = head.peek.model.as_deref().and_then(ModelName::parse);
    Call::new(head, Payload::from_bytes(body.to_owned()), cluster.snapshot().all())
}

/// A good answer.
pub(crate) fn reply(text: &'static str) -> Reply {
    Reply::full(StatusCode::OK, HeaderMap::new(), text)
}

/// A good answer of some server.
pub(crate) fn reply_of(server: &str, text: &'static str) -> Reply {
    let mut reply = reply(text);
    reply.body.outcome_mut().servers.push(ServerId::new(server));
    reply
}

/// A server's word that it does not have the model.
pub(crate) fn refusal(server: &str) -> Reply {
    from(server, StatusCode::NOT_FOUND)
}

/// A server's word that its queue is full.
pub(crate) fn busy(server: &str) -> Reply {
    from(server, StatusCode::SERVICE_UNAVAILABLE)
}

fn from(server: &str, status: StatusCode) -> Reply {
    let mut body = Body::empty();
    body.outcome_mut().servers.push(ServerId::new(server));
    Reply { status, headers: HeaderMap::new(), body }
}

/// A stream of lines from a server, which perhaps dies behind them.
pub(crate) fn stream(server: &str, lines: &[&'static str], dies: bool) -> Reply {
    let lines: Vec<_> = lines.iter().map(|line| Ok(Chunk::from(Bytes::from_static(line.as_bytes())))).collect();
    let end = dies.then(|| Err(failure(server, Phase::Streaming, false)));
    let mut body = Body::new(futures_util::stream::iter(lines.into_iter().chain(end)));
    body.outcome_mut().servers.push(ServerId::new(server));
    body.outcome_mut().attempts = 1;
    let kind = (http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/x-ndjson"));
    Reply { status: StatusCode::OK, headers: HeaderMap::from_iter([kind]), body }
}

/// An answer of JSON from a server.
pub(crate) fn json(server: &str, text: &'static str) -> Reply {
    let mut reply = reply(text);
    reply.body.outcome_mut().servers.push(ServerId::new(server));
    reply
}

/// A server that fails.
pub(crate) fn failure(server: &str, phase: Phase, reused: bool) -> Error {
    Error::Server { server: ServerId::new(server), phase, reused, source: "cut".into() }
}

/// A fleet in which every server answers.
#[derive(Clone)]
pub(crate) struct Always;

impl Fleet for Always {
    type Service = tower::util::BoxService<Call, Reply, Error>;

    fn service(&self, _server: &Server) -> Option<Self::Service> {
        Some(tower::util::BoxService::new(tower::service_fn(|_call: Call| async { Ok(reply("hello")) })))
    }
}
