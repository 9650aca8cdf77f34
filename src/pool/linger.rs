//! A load outlives the client that caused it.
//!
//! Ollama binds a load to the request that began it: when that request goes away, minutes of loading are thrown away. So
//! when a client leaves before the head of its answer while its model loads, that same request is kept, alone, until the
//! load is done, and then dropped: nothing is generated for nobody. In every other phase a drop reaches the server at once.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use olol_middleware::{Call, Error, ModelName, Reply};
use serde::Deserialize;

use super::Backend;
use crate::ollama::Ask;

/// Time between two looks whether a load is done. While the weights load, Ollama's own answer to that question waits too.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How many loads may go on without a client, and for how long.
#[derive(Debug)]
pub struct Linger {
    limit: Duration,
    most: u32,
    now: AtomicU32,
}

impl Linger {
    /// Lets at most `most` loads go on, each no longer than `limit`.
    pub fn new(limit: Duration, most: u32) -> Self {
        Self { limit, most, now: AtomicU32::new(0) }
    }

    /// Loads that go on now.
    pub fn count(&self) -> u32 {
        self.now.load(Ordering::Relaxed)
    }

    fn enter(self: &Arc<Self>) -> Option<Place> {
        let entered =
            self.now.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < self.most).then_some(now + 1));
        entered.is_ok().then(|| Place(self.clone()))
    }
}

struct Place(Arc<Linger>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The model that a call makes this server load, as far as one can tell.
pub(super) fn loads(call: &Call, server: usize) -> Option<ModelName> {
    if !call.route.infers() || call.peek.unloads() {
        return None;
    }
    let known = call.known.as_ref().or_else(|| call.candidates.snapshot().known(call.place.model.as_ref()?))?;
    (known.installed.contains(server) && !known.loaded.contains(server)).then(|| known.name.clone())
}

/// An attempt that goes on by itself when it is dropped before it has its head.
pub(super) struct Outliving {
    answer: Option<BoxFuture<'static, Result<Reply, Error>>>,
    model: ModelName,
    backend: Arc<Backend>,
    linger: Arc<Linger>,
}

impl Outliving {
    pub(super) fn new(
        answer: BoxFuture<'static, Result<Reply, Error>>,
        model: ModelName,
        backend: Arc<Backend>,
        linger: Arc<Linger>,
    ) -> Self {
        Self { answer: Some(answer), model, backend, linger }
    }
}

impl Future for Outliving {
    type Output = Result<Reply, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Some(answer) = &mut this.answer else { return Poll::Pending };
        let polled = answer.as_mut().poll(cx);
        if polled.is_ready() {
            this.answer = None;
        }
        polled
    }
}

impl Drop for Outliving {
    fn drop(&mut self) {
        let Some(answer) = self.answer.take() else { return };
        let Some(place) = self.linger.enter() else { return };
        let (model, backend, limit) = (self.model.clone(), self.backend.clone(), self.linger.limit);
        tracing::debug!(%model, "the client left while the model loads; the load goes on");
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                _ = answer => {}
                () = until_loaded(&backend, &model) => {}
                () = tokio::time::sleep(limit) => {}
            }
        });
    }
}

#[derive(Deserialize)]
struct Ps {
    models: Option<Vec<Name>>,
}

#[derive(Deserialize)]
struct Name {
    name: String,
}

async fn until_loaded(backend: &Backend, model: &ModelName) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Ok(reply) = backend.ask(Ask::get("/api/ps"), super::Context::default()).await else { continue };
        let Ok(body) = reply.body.collect(1 << 20).await else { continue };
        let Ok(ps) = serde_json::from_slice::<Ps>(&body) else { continue };
        if ps.models.unwrap_or_default().iter().any(|loaded| ModelName::parse(&loaded.name).as_ref() == Some(model)) {
            return;
        }
    }
}
