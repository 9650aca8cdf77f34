//! Counts requests, and times them to their first piece and to their end.
//!
//! Belongs outside whatever may answer or retry: a request counts once, as its client sees it.

use std::sync::Arc;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tower::{Layer, Service};

use crate::call::{Answer, Call, Chunk, End, Head, Outcome, Reply, Watcher};
use crate::clients::{Clients, Visit};
use crate::error::Error;
use crate::instruments::{Instruments, RunnerMeters};

/// The `[metrics]` table. It has no keys: what is measured is the same everywhere, so that dashboards work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {}

/// Puts [`Metrics`] around a service.
#[derive(Clone, Debug)]
pub struct MetricsLayer {
    instruments: Arc<Instruments>,
    clients: Arc<Clients>,
}

impl MetricsLayer {
    /// Records into these instruments.
    pub fn new(instruments: Arc<Instruments>) -> Self {
        Self { instruments, clients: Arc::default() }
    }

    /// Keeps these clients.
    #[must_use]
    pub fn of(mut self, clients: Arc<Clients>) -> Self {
        self.clients = clients;
        self
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Metrics<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Metrics { inner, instruments: self.instruments.clone(), clients: self.clients.clone() }
    }
}

/// Counts and times every call.
#[derive(Clone, Debug)]
pub struct Metrics<S> {
    inner: S,
    instruments: Arc<Instruments>,
    clients: Arc<Clients>,
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
        let head = call.head.clone();
        let reply = self.inner.call(call);
        // By now `auth`, which decides at once, knows the key.
        let visit = Some(self.clients.enter(&head));
        let mut measure = Measure { head, instruments: self.instruments.clone(), visit, begun: false };
        Box::pin(async move {
            // Dropping `measure` before there is an answer is a client that left.
            let answer = reply.await;
            measure.begun = true;
            let Measure { head, instruments, .. } = &measure;
            if let Some(took) = head.progress.deciding() {
                instruments.decided(took);
            }
            match answer {
                Ok(reply) => {
                    instruments.answered(head.route, reply.status.as_u16());
                    let following = Following::new(&reply, measure);
                    Ok(reply.watch(following))
                }
                Err(error) => {
                    let status = error.status().as_u16();
                    instruments.answered(head.route, status);
                    instruments.refused(&error);
                    instruments.ended(head.route, status, End::Broken(error.kind()), head.arrived.elapsed());
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
    /// Until it is answered.
    visit: Option<Visit>,
    /// Whether there was an answer, or an error instead of one.
    begun: bool,
}

impl Drop for Measure {
    fn drop(&mut self) {
        if !self.begun {
            self.instruments.answered(self.head.route, LEFT);
            self.instruments.left(self.head.progress.stage());
            self.instruments.ended(self.head.route, LEFT, End::Dropped, self.head.arrived.elapsed());
        }
    }
}

/// Follows the body of an answer.
struct Following {
    measure: Measure,
    status: u16,
    /// Whether it comes piece by piece, as it is made.
    is_stream: bool,
    meters: Option<Arc<RunnerMeters>>,
    pieces: usize,
    /// When the first piece of a stream came.
    first: Option<Instant>,
    /// When a piece came before the one that will be measured.
    last: Option<Instant>,
}

impl Following {
    fn new(reply: &Reply, measure: Measure) -> Self {
        Self {
            measure,
            status: reply.status.as_u16(),
            is_stream: reply.status.is_success() && reply.is_stream(),
            meters: reply.body.outcome().meters.clone(),
            pieces: 0,
            first: None,
            last: None,
        }
    }

    /// A piece of a stream that is measured has come, or the one before it.
    fn look(&mut self, meters: &RunnerMeters) {
        let now = Instant::now();
        if self.pieces == 1 {
            let Measure { head, instruments, .. } = &self.measure;
            meters.first_token(now - head.arrived);
            if let Some(came) = head.progress.came() {
                instruments.passed_on((now - head.arrived).saturating_sub(came));
            }
            self.first = Some(now);
        } else if let Some(last) = self.last.take() {
            meters.gap(now - last);
        } else {
            self.last = Some(now);
        }
    }
}

impl Watcher for Following {
    fn chunk(&mut self, _chunk: &Chunk) {
        self.pieces += 1;
        // A look at the clock costs more than all the rest of a piece: two are enough for `EACH` pieces.
        if self.is_stream
            && (self.pieces == 1 || matches!(self.pieces % EACH, 31 | 32))
            && let Some(meters) = self.meters.take()
        {
            self.look(&meters);
            self.meters = Some(meters);
        }
    }

    fn end(&mut self, end: End, outcome: &Outcome) {
        let now = Instant::now();
        let visit = self.measure.visit.take();
        let Measure { head, instruments, .. } = &self.measure;
        instruments.ended(head.route, self.status, end, now - head.arrived);
        match end {
            End::Whole => {}
            End::Broken(_) => instruments.broke(self.pieces > 0),
            End::Dropped if self.pieces > 0 => instruments.left_stream(),
            End::Dropped => instruments.left(head.progress.stage()),
        }
        if let Some(meters) = &outcome.meters {
            meters.ended(end, now - head.arrived);
        }
        if let (Some(visit), Some(counters)) = (visit, &outcome.counters) {
            visit.used(counters);
        }
        let (Some(meters), Some(counters)) = (&outcome.meters, &outcome.counters) else { return };
        meters.tokens(counters, head.key.get().map(|key| &key.name));
        instruments.sized(head.route, counters);
        if let (Some(first), Some(more @ 1..)) = (self.first, counters.output_tokens.checked_sub(1)) {
            meters.per_token((now - first).div_f64(as_f64(more)));
        }
    }
}

/// Of so many pieces of a stream the time before one is measured.
const EACH: usize = 64;

/// The status of a request whose client left before there was one, as nginx has it.
const LEFT: u16 = 499;

#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 tokens")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::call::Counters;
    use crate::testing::{self, ask};
    use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

    /// What was recorded since the last look, as `name{label=value}`.
    fn seen(snapshotter: &Snapshotter) -> Vec<(String, DebugValue)> {
        let told = |key: &::metrics::Key| {
            let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
            format!("{}{{{}}}", key.name(), labels.join(","))
        };
        let all = snapshotter.snapshot().into_vec().into_iter();
        all.map(|(key, _, _, value)| (told(key.key()), value)).collect()
    }

    fn value<'a>(seen: &'a [(String, DebugValue)], name: &str) -> Option<&'a DebugValue> {
        seen.iter().find(|(other, _)| other == name).map(|(_, value)| value)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_request_is_counted_once_and_timed_to_its_end() {
        let recorder = DebuggingRecorder::new();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let (mut service, mut inner) = testing::spawn(&MetricsLayer::new(Arc::default()));
        let answer = ask(&mut service, testing::call("tiny").await);
        inner.next_request().await.unwrap().1.send_response(testing::reply("hi"));
        let reply = answer.await.unwrap();
        let now = seen(&recorder.snapshotter());
        assert_eq!(value(&now, "olol_requests_total{route=/api/chat,code=200}"), Some(&DebugValue::Counter(1)));
        reply.body.collect(9).await.unwrap();
        let now = seen(&recorder.snapshotter());
        assert_eq!(value(&now, "olol_answers_ended_total{end=whole}"), Some(&DebugValue::Counter(1)));
        let duration = value(&now, "olol_request_duration_seconds{route=/api/chat,code_class=2xx}");
        assert!(matches!(duration, Some(DebugValue::Histogram(times)) if times.len() == 1), "{now:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_timed_to_its_first_piece_and_from_token_to_token() {
        let recorder = DebuggingRecorder::new();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&MetricsLayer::new(Arc::default()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        let (call, respond) = inner.next_request().await.unwrap();
        call.progress.is_sent(Duration::from_millis(3), false);
        tokio::time::advance(Duration::from_millis(500)).await;
        let counters = Counters { prompt_tokens: 7, output_tokens: 40, ..Counters::default() };
        let mut reply = testing::stream("0", &["{}\n"; 40], false);
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&crate::ModelName::parse("tiny").unwrap()).unwrap();
        reply.body.outcome_mut().meters = Some(known.meters.at(&snapshot.servers[0]));
        reply.body.outcome_mut().counters = Some(counters);
        respond.send_response(reply);
        let mut body = answer.await.unwrap().body;
        while body.next().await.is_some() {
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        let now = seen(&recorder.snapshotter());
        for (name, wanted) in [
            ("olol_overhead_seconds{stage=request}", 0.003),
            ("olol_time_to_first_token_seconds{model=tiny:latest,server=0}", 0.5),
            ("olol_time_per_output_token_seconds{model=tiny:latest,server=0}", 0.4 / 39.0),
            ("olol_inter_chunk_seconds{model=tiny:latest}", 0.01),
            ("olol_request_prompt_tokens{route=/api/chat}", 7.0),
            ("olol_request_generation_tokens{route=/api/chat}", 40.0),
        ] {
            let Some(DebugValue::Histogram(values)) = value(&now, name) else { panic!("no {name}: {now:?}") };
            assert!(values.len() == 1 && (values[0].into_inner() - wanted).abs() < 1e-6, "{name}: {values:?}");
        }
        let tokens = value(&now, "olol_generation_tokens_total{model=tiny:latest,server=0,key=none}");
        assert_eq!(tokens, Some(&DebugValue::Counter(40)));
    }

    #[tokio::test]
    async fn who_leaves_is_counted_where_it_was() {
        let recorder = DebuggingRecorder::new();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let mut service = MetricsLayer::new(Arc::default()).layer(tower::service_fn(|call: Call| {
            call.progress.is_queued();
            Box::pin(std::future::pending()) as Answer
        }));
        drop(service.call(testing::call("tiny").await));
        let now = seen(&recorder.snapshotter());
        assert_eq!(value(&now, "olol_cancellations_total{phase=queued}"), Some(&DebugValue::Counter(1)), "{now:?}");
        assert_eq!(value(&now, "olol_requests_total{route=/api/chat,code=499}"), Some(&DebugValue::Counter(1)));
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_counted_by_what_there_was_of_it() {
        let recorder = DebuggingRecorder::new();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let mut seen_so_far = Vec::new();
        for lines in [&[][..], &["{}\n"]] {
            let (mut service, mut inner) = testing::spawn(&MetricsLayer::new(Arc::default()));
            let answer = ask(&mut service, testing::call("tiny").await);
            inner.next_request().await.unwrap().1.send_response(testing::stream("0", lines, true));
            assert!(answer.await.unwrap().body.collect(9).await.is_err());
            seen_so_far.extend(seen(&recorder.snapshotter()));
        }
        for phase in ["begun", "streaming"] {
            let name = format!("olol_stream_errors_total{{phase={phase}}}");
            assert_eq!(value(&seen_so_far, &name), Some(&DebugValue::Counter(1)), "{seen_so_far:?}");
        }
    }
}
