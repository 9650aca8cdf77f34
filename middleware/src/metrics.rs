//! Counts requests, and times them to their first piece and to their end.
//!
//! Belongs outside whatever may answer or retry: a request counts once, as its client sees it.

use std::sync::Arc;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tower::{Layer, Service};

use crate::call::{Answer, Call, Chunk, End, Head, Outcome, Reply, Watcher};
use crate::error::Error;
use crate::instruments::{Instruments, ModelMeters};

/// The `[metrics]` table. It has no keys: what is measured is the same everywhere, so that dashboards work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {}

/// Puts [`Metrics`] around a service.
#[derive(Clone, Debug)]
pub struct MetricsLayer {
    instruments: Arc<Instruments>,
}

impl MetricsLayer {
    /// Records into these instruments.
    pub fn new(instruments: Arc<Instruments>) -> Self {
        Self { instruments }
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Metrics<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Metrics { inner, instruments: self.instruments.clone() }
    }
}

/// Counts and times every call.
#[derive(Clone, Debug)]
pub struct Metrics<S> {
    inner: S,
    instruments: Arc<Instruments>,
}

impl<S> Service<Call> for Metrics<S>
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

    fn call(&mut self, call: Call) -> Self::Future {
        if call.dry {
            return Box::pin(self.inner.call(call));
        }
        let mut measure =
            Measure { head: call.head.clone(), instruments: self.instruments.clone(), model: None, begun: false };
        let reply = self.inner.call(call);
        Box::pin(async move {
            // Dropping `measure` before there is an answer is a client that left.
            match reply.await {
                Ok(reply) => {
                    measure.instruments.answered(measure.head.route, reply.status.as_u16());
                    measure.model.clone_from(&reply.body.outcome().model);
                    measure.begun = true;
                    Ok(reply.watch(Following { measure, seen: false }))
                }
                Err(error) => {
                    measure.instruments.answered(measure.head.route, error.status().as_u16());
                    measure.instruments.refused(&error);
                    measure.begun = true;
                    measure.instruments.ended(
                        measure.head.route,
                        End::Broken(error.kind()),
                        measure.head.arrived.elapsed(),
                    );
                    Err(error)
                }
            }
        })
    }
}

/// What is known of a call while it runs.
struct Measure {
    head: Arc<Head>,
    instruments: Arc<Instruments>,
    model: Option<Arc<ModelMeters>>,
    /// Whether there was an answer, or an error instead of one.
    begun: bool,
}

impl Drop for Measure {
    fn drop(&mut self) {
        if !self.begun {
            self.instruments.answered(self.head.route, 499);
            self.instruments.ended(self.head.route, End::Dropped, self.head.arrived.elapsed());
        }
    }
}

/// Follows the body of an answer.
struct Following {
    measure: Measure,
    seen: bool,
}

impl Watcher for Following {
    fn chunk(&mut self, _chunk: &Chunk) {
        if !std::mem::replace(&mut self.seen, true)
            && let Some(model) = &self.measure.model
        {
            model.first_token(self.measure.head.arrived.elapsed());
        }
    }

    fn end(&mut self, end: End, outcome: &Outcome) {
        self.measure.instruments.ended(self.measure.head.route, end, self.measure.head.arrived.elapsed());
        if let (Some(model), Some(counters)) = (&self.measure.model, &outcome.counters) {
            model.tokens(counters);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, ask};
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    #[tokio::test(flavor = "current_thread")]
    async fn a_request_is_counted_once_and_timed_to_its_end() {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let (mut service, mut inner) = testing::spawn(&MetricsLayer::new(Arc::default()));
        let answer = ask(&mut service, testing::call("tiny").await);
        inner.next_request().await.unwrap().1.send_response(testing::reply("hi"));
        let reply = answer.await.unwrap();
        let names = |wanted: &str| {
            snapshotter
                .snapshot()
                .into_vec()
                .into_iter()
                .filter(|(key, ..)| key.key().name() == wanted)
                .map(|(.., value)| value)
                .collect::<Vec<_>>()
        };
        assert_eq!(names("olol_requests_total"), [DebugValue::Counter(1)]);
        reply.body.collect(9).await.unwrap();
        assert_eq!(names("olol_answers_ended_total"), [DebugValue::Counter(1)]);
    }
}
