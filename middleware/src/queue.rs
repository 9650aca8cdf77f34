//! Lets calls wait until a slot of their model is free, in an order that is fair, instead of sending them to servers that
//! are full.
//!
//! Belongs outside everything that decides where a call goes: when a slot is free, or when the servers have changed, that is
//! decided again. [`crate::slots`] owns the slots and the lines in front of them; this layer says who may wait, for how
//! long, and how urgent a call is. Without it nothing is held back, and calls wait inside Ollama.
//!
//! What waits is bounded in number and in bytes. Who finds the queue full, or has waited too long, is told so in the words
//! of an Ollama whose queue is full, with the time after which there should be room again.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use tokio::time::{Instant, timeout_at};
use tower::{Layer, Service, ServiceExt};

use crate::call::{Answer, Call, Payload, Reply};
use crate::cluster::Cluster;
use crate::error::Error;
use crate::instruments::{self, Waited};
use crate::runner::{Average, Runner};
use crate::slots::{Lease, Owner, Ticket, Wait};
use crate::trail::Fact;
use crate::units::{Seconds, SomeSeconds};

/// The header that tells how long a call has waited for its slot, in milliseconds.
pub const HEADER: HeaderName = HeaderName::from_static("x-olol-queue-ms");
/// How long a call waits before it is decided anew where it could go.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Tokens of an answer of which nothing is known.
const ANSWER: u64 = 256;

/// The `[queue]` table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Calls that may wait at the same time.
    pub max_requests: usize,
    /// Bytes of their bodies together.
    pub max_bytes: u64,
    /// Seconds that a call may wait.
    pub max_wait_s: SomeSeconds,
    /// Seconds after which a call that waits is one step more urgent; 0: never.
    pub age_s: Seconds,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_requests: 4096, max_bytes: 256 << 20, max_wait_s: SomeSeconds::new(300), age_s: Seconds::new(30) }
    }
}

/// What waits now, over all lines; outlives every stack.
#[derive(Debug)]
pub struct Queue {
    requests: AtomicUsize,
    bytes: AtomicU64,
    /// Milliseconds between two calls that leave with a slot.
    pace: Average,
    born: Instant,
    /// When the last one left, milliseconds since `born`.
    last: AtomicU64,
}

impl Default for Queue {
    fn default() -> Self {
        let (requests, bytes, last) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
        Self { requests, bytes, pace: Average::default(), born: Instant::now(), last }
    }
}

impl Queue {
    /// Calls that wait.
    pub fn len(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn enter(self: &Arc<Self>, bytes: u64, config: &Config) -> Option<Inside> {
        let requests = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let all = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // Counted before it is judged: leaves again if there is no room.
        let inside = Inside { queue: self.clone(), bytes, is_counted: true };
        (requests <= config.max_requests && all <= config.max_bytes).then_some(inside)
    }

    /// A call leaves with a slot.
    #[expect(clippy::cast_precision_loss, reason = "milliseconds between two events")]
    fn left(&self) {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = self.last.swap(now, Ordering::Relaxed);
        if last != 0 {
            self.pace.add((now - last.min(now)).max(1) as f32);
        }
    }

    /// When there should be room for one more.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn room_after(&self, config: &Config) -> Duration {
        let pace = self.pace.get().unwrap_or(1000.0);
        let after = Duration::from_secs_f32(pace * self.len().max(1) as f32 / 1000.0);
        after.clamp(Duration::from_secs(1), config.max_wait_s.time())
    }
}

/// A call that waits, counted until this is dropped.
struct Inside {
    queue: Arc<Queue>,
    bytes: u64,
    is_counted: bool,
}

impl Inside {
    /// It is sent.
    fn goes(&mut self) {
        if std::mem::take(&mut self.is_counted) {
            self.queue.requests.fetch_sub(1, Ordering::Relaxed);
            self.queue.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }

    /// It waits again: who has been let in is not turned away.
    fn comes_back(&mut self) {
        self.queue.requests.fetch_add(1, Ordering::Relaxed);
        self.queue.bytes.fetch_add(self.bytes, Ordering::Relaxed);
        self.is_counted = true;
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.goes();
    }
}

/// Puts [`Queued`] around a service.
#[derive(Clone, Debug)]
pub struct QueueLayer {
    rules: Arc<Rules>,
}

#[derive(Debug)]
struct Rules {
    config: Config,
    queue: Arc<Queue>,
    cluster: Arc<Cluster>,
}

impl QueueLayer {
    /// Lets calls wait in a queue that outlives this stack.
    pub fn new(config: Config, queue: Arc<Queue>, cluster: Arc<Cluster>) -> Self {
        Self { rules: Arc::new(Rules { config, queue, cluster }) }
    }
}

impl<S> Layer<S> for QueueLayer {
    type Service = Queued<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Queued { inner, rules: self.rules.clone() }
    }
}

/// Lets calls wait for a slot.
#[derive(Clone, Debug)]
pub struct Queued<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for Queued<S>
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
        // A body that can be sent only once cannot wait: nobody could ask a second time where it goes.
        let may_wait = call.route.infers() && !call.peek.unloads() && matches!(call.payload, Payload::Whole(_));
        if !may_wait {
            return Box::pin(self.inner.call(call));
        }
        call.ticket = Some(Arc::new(self.rules.ticket(&call)));
        if call.dry {
            return Box::pin(self.inner.call(call));
        }
        let spare = call.again();
        let answer = self.inner.call(call);
        match spare {
            Some(spare) => Box::pin(queue(self.rules.clone(), self.inner.clone(), spare, answer)),
            None => Box::pin(answer),
        }
    }
}

async fn queue<S>(
    rules: Arc<Rules>,
    service: S,
    spare: Call,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error>,
{
    match answer.await {
        // Boxed: seldom, and larger than all the rest.
        Err(Error::Busy { runners, .. }) if !runners.is_empty() => Box::pin(rules.wait(service, spare, runners)).await,
        answer => answer,
    }
}

impl Rules {
    fn ticket(&self, call: &Call) -> Ticket {
        let owner = match (call.key.get(), call.client) {
            (Some(key), _) => Owner::Key(key.name.clone()),
            (None, Some(client)) => Owner::Address(client.ip()),
            (None, None) => Owner::Nobody,
        };
        Ticket {
            arrived: Instant::now(),
            priority: call.key.get().map(|key| key.priority).unwrap_or_default(),
            owner,
            cost: call.payload.length().unwrap_or(0) / 4 + ANSWER,
            ages_after: self.config.age_s.time(),
        }
    }

    /// Waits for a slot of one of the runners, and tries again with it; as often as it takes.
    async fn wait<S>(&self, mut service: S, spare: Call, runners: Vec<Arc<Runner>>) -> Result<Reply, Error>
    where
        S: Service<Call, Response = Reply, Error = Error>,
    {
        let Some(ticket) = spare.ticket.clone() else { return Err(Error::busy()) };
        let Some(mut inside) = self.queue.enter(spare.payload.length().unwrap_or(0), &self.config) else {
            spare.note("queue", "full", [("waiting", self.queue.len().into())]);
            instruments::queued(ticket.priority, Waited::Full, Duration::ZERO);
            return Err(self.full());
        };
        let mut left = Left { ticket: ticket.clone(), how: Waited::Left, waited: None };
        let patience = ticket.arrived + self.config.max_wait_s.time();
        let limit = spare.deadline.map_or(patience, |deadline| deadline.min(patience));
        spare.progress.is_queued();
        let mut runners = runners;
        loop {
            let slot = match wait_for(&ticket, &runners, limit).await {
                Next::Slot(lease) => Some(lease),
                Next::LookAgain => None,
                Next::TooLong => {
                    spare.note("queue", "waited too long", [("ms", Fact::ms(waited_ms(&ticket)))]);
                    left.how = Waited::TooLong;
                    // Who gave the call no more time says so in its own words; the queue would have waited on.
                    let is_due = spare.deadline.is_some_and(|deadline| deadline <= patience);
                    let due = || Error::Timeout { what: "the wait for a slot", after: ticket.arrived.elapsed() };
                    return Err(if is_due { due() } else { self.full() });
                }
            };
            let Some(mut call) = spare.again() else { return Err(Error::busy()) };
            call.candidates.renew(self.cluster.snapshot());
            call.lease = slot;
            // What its server takes for the answer is no wait for a slot.
            let ms = waited_ms(&ticket);
            (left.how, left.waited) = (Waited::Served, Some(ticket.arrived.elapsed()));
            inside.goes();
            spare.progress.has_waited(ticket.arrived.elapsed());
            match service.ready().await?.call(call).await {
                Err(Error::Busy { runners: others, .. }) if !others.is_empty() => {
                    runners = others;
                    inside.comes_back();
                    spare.progress.is_queued();
                    (left.how, left.waited) = (Waited::Left, None);
                }
                answer => {
                    self.queue.left();
                    spare.note("queue", "waited", [("ms", Fact::ms(ms))]);
                    return answer.map(|reply| marked(reply, ms));
                }
            }
        }
    }

    fn full(&self) -> Error {
        Error::Busy { runners: Vec::new(), retry_after: Some(self.queue.room_after(&self.config)) }
    }
}

/// Counts how a wait ended, also when its client left.
struct Left {
    ticket: Arc<Ticket>,
    how: Waited,
    /// How long it was, once it is over.
    waited: Option<Duration>,
}

impl Drop for Left {
    fn drop(&mut self) {
        let waited = self.waited.unwrap_or_else(|| self.ticket.arrived.elapsed());
        instruments::queued(self.ticket.priority, self.how, waited);
    }
}

fn waited_ms(ticket: &Ticket) -> f32 {
    ticket.arrived.elapsed().as_secs_f32() * 1000.0
}

fn marked(mut reply: Reply, ms: f32) -> Reply {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "never negative, and no century")]
    reply.headers.insert(HEADER, HeaderValue::from(ms as u64));
    reply
}

/// What comes of a wait.
enum Next {
    Slot(Lease),
    LookAgain,
    TooLong,
}

/// Waits in the lines of all these runners, until one of them has a free slot.
async fn wait_for(ticket: &Arc<Ticket>, runners: &[Arc<Runner>], limit: Instant) -> Next {
    let mut waits: SmallVec<[Wait; 1]> = SmallVec::new();
    // Runners of one model share one line.
    for (at, runner) in runners.iter().enumerate() {
        let is_its = |other: &&Arc<Runner>| Arc::ptr_eq(&other.line, &runner.line);
        if runners.iter().position(|other| is_its(&other)) == Some(at) {
            let own: Vec<_> = runners.iter().filter(is_its).cloned().collect();
            waits.push(runner.line.join(ticket.clone(), &own));
        }
    }
    let slot = poll_fn(|cx| {
        let ready = waits.iter_mut().find_map(|wait| match wait.poll_slot(cx) {
            Poll::Ready(slot) => Some(slot),
            Poll::Pending => None,
        });
        ready.map_or(Poll::Pending, Poll::Ready)
    });
    match timeout_at(limit.min(Instant::now() + LOOK_AGAIN), slot).await {
        Ok(Some(lease)) => Next::Slot(lease),
        Err(_) if limit <= Instant::now() => Next::TooLong,
        Ok(None) | Err(_) => Next::LookAgain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelName;
    use crate::pick::{Pick, Picking};
    use crate::testing::{self, ask};

    struct Setting {
        cluster: Arc<Cluster>,
        queue: Arc<Queue>,
        service: Queued<Pick<testing::Always>>,
    }

    /// Two servers with one slot each, behind a queue.
    async fn setting(config: Config) -> Setting {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&ModelName::parse("tiny").unwrap()).unwrap();
        snapshot.servers.iter().for_each(|server| known.runners.at(server).reported(1));
        let queue = Arc::new(Queue::default());
        let pick = Pick::new(testing::Always, Arc::new(Picking::default()));
        let service = QueueLayer::new(config, queue.clone(), cluster.clone()).layer(pick);
        Setting { cluster, queue, service }
    }

    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_until_a_slot_is_free() {
        let mut set = setting(Config::default()).await;
        let one = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let two = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let three = ask(&mut set.service, testing::call_in(&set.cluster, "tiny"));
        settle().await;
        assert_eq!(set.queue.len(), 1);
        tokio::time::advance(Duration::from_millis(250)).await;
        drop(one);
        let three = three.await.unwrap();
        assert_eq!(three.headers[HEADER], "250");
        assert!(set.queue.is_empty() && !two.headers.contains_key(HEADER));
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_is_over_when_the_call_is_sent() {
        let set = setting(Config::default()).await;
        let known = set.cluster.snapshot().known(&ModelName::parse("tiny").unwrap()).unwrap().clone();
        let runner = known.runners.at(&set.cluster.snapshot().servers[0]);
        let busy = Lease::take(&runner).unwrap();
        let layer = QueueLayer::new(Config::default(), set.queue.clone(), set.cluster.clone());
        let (mut service, mut inner) = testing::spawn(&layer);
        let answer = ask(&mut service, testing::call_in(&set.cluster, "tiny"));
        let full = Error::Busy { runners: vec![runner], retry_after: None };
        inner.next_request().await.unwrap().1.send_error(full);
        settle().await;
        assert_eq!(set.queue.len(), 1);
        tokio::time::advance(Duration::from_millis(250)).await;
        drop(busy);
        let (_call, slow) = inner.next_request().await.unwrap();
        assert!(set.queue.is_empty(), "it has its slot");
        tokio::time::advance(Duration::from_secs(9)).await;
        slow.send_response(testing::reply("hi"));
        assert_eq!(answer.await.unwrap().headers[HEADER], "250");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_says_when_to_come_back() {
        let mut set = setting(Config { max_requests: 1, ..Config::default() }).await;
        let _one = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let _two = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let waits = ask(&mut set.service, testing::call_in(&set.cluster, "tiny"));
        settle().await;
        let refused = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap_err();
        assert!(refused.to_string().starts_with("server busy, please try again.") && refused.retry_after().is_some());
        drop(waits);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let mut set = setting(Config { max_wait_s: SomeSeconds::new(12), ..Config::default() }).await;
        let _one = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let _two = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let begun = Instant::now();
        let refused = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap_err();
        assert!(matches!(refused, Error::Busy { .. }) && begun.elapsed() == Duration::from_secs(12));
        assert!(set.queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_more_time_is_not_told_that_the_queue_is_full() {
        for (total, wait) in [(7, 12), (12, 12)] {
            let mut set = setting(Config { max_wait_s: SomeSeconds::new(wait), ..Config::default() }).await;
            let _one = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
            let _two = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
            let mut call = testing::call_in(&set.cluster, "tiny");
            call.deadline = Some(Instant::now() + Duration::from_secs(total));
            let error = ask(&mut set.service, call).await.unwrap_err();
            assert!(matches!(error, Error::Timeout { after, .. } if after == Duration::from_secs(total)), "{error}");
            // The same behind the layer that knows the limit, which tells it in its own words, whoever notices first.
            let config = toml::from_str(&format!("total-s = {total}")).unwrap();
            let mut service = crate::timeout::TimeoutLayer::new(config).layer(set.service.clone());
            let error = ask(&mut service, testing::call_in(&set.cluster, "tiny")).await.unwrap_err();
            assert_eq!(error.to_string(), format!("timed out: the whole answer took longer than {total} s"));
            assert!(set.queue.is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_takes_no_slot_and_waits_for_none() {
        let mut set = setting(Config::default()).await;
        let _one = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let _two = ask(&mut set.service, testing::call_in(&set.cluster, "tiny")).await.unwrap();
        let mut call = testing::call_in(&set.cluster, "tiny");
        Arc::get_mut(&mut call.head).unwrap().dry = true;
        let head = call.head.clone();
        assert!(ask(&mut set.service, call).await.is_ok());
        assert!(set.queue.is_empty());
        assert!(head.trail.take().iter().any(|note| note.decision == "would wait for a slot"));
    }
}
