//! What stands before the leaf: what clients do with models, as far as it concerns what is wanted of them.

use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http::HeaderName;
use olol_middleware::cluster::Bits;
use olol_middleware::{Call, Cluster, Error, ModelName, Pattern, Reply, Route, Snapshot};
use tower::Service;

use super::Desired;
use crate::scatter::bad_request;

/// The header by which a pull says at which servers alone it is to be, by name or pattern, with commas between.
pub const SERVERS: HeaderName = HeaderName::from_static("x-olol-servers");

/// Keeps pulls to the servers that they name, remembers which wanted models were deleted, and passes on all calls.
#[derive(Clone, Debug)]
pub struct Leaf<S> {
    inner: S,
    desired: Desired,
    cluster: Arc<Cluster>,
}

impl<S> Leaf<S> {
    /// In front of a leaf.
    pub fn new(inner: S, desired: Desired, cluster: Arc<Cluster>) -> Self {
        Self { inner, desired, cluster }
    }
}

impl<S> Service<Call> for Leaf<S>
where
    S: Service<Call, Response = Reply, Error = Error, Future = BoxFuture<'static, Result<Reply, Error>>>,
{
    type Response = Reply;
    type Error = Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        if call.route == Route::Pull
            && let Err(why) = narrow(&mut call)
        {
            return Box::pin(std::future::ready(Ok(bad_request(&format!("X-Olol-Servers: {why}")))));
        }
        let model = call.place.model.as_ref().filter(|_| call.route == Route::Delete && !call.dry).cloned();
        let before = call.candidates.snapshot().clone();
        let answer = self.inner.call(call);
        let Some(model) = model else { return answer };
        let (desired, cluster) = (self.desired.clone(), self.cluster.clone());
        Box::pin(async move {
            let answer = answer.await;
            // Also where one of the servers could not do it: who asked for that does not want the others to make it again.
            let is_deleted = answer.as_ref().is_ok_and(|reply| reply.status.is_success());
            if is_deleted || count(&cluster.snapshot(), &model) < count(&before, &model) {
                desired.deleted(model.as_str()).await;
            }
            answer
        })
    }
}

/// Keeps a pull to the servers that it names.
fn narrow(call: &mut Call) -> Result<(), String> {
    let Some(value) = call.headers.get(SERVERS) else { return Ok(()) };
    let text = value.to_str().unwrap_or_default();
    let patterns: Result<Vec<Pattern>, _> = text.split(',').map(|part| Pattern::parse(part.trim())).collect();
    let patterns = patterns.map_err(|error| error.to_string())?;
    let mut named = Bits::default();
    for pattern in &patterns {
        let mut fitting = call.candidates.iter().filter(|server| pattern.matches(server.id.as_str())).peekable();
        if fitting.peek().is_none() && pattern.is_plain() {
            return Err(format!("there is no server '{pattern}'"));
        }
        fitting.for_each(|server| named.insert(server.index));
    }
    if named.is_empty() {
        return Err(format!("no server fits '{text}'"));
    }
    call.candidates.keep(&named);
    Ok(())
}

/// How many servers have a model.
fn count(snapshot: &Snapshot, model: &ModelName) -> usize {
    snapshot.known(model).map_or(0, |known| known.installed.count())
}
