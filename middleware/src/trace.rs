//! Tells the log what was asked and how it ended, and the client which id to quote.
//!
//! Belongs outermost: what other layers refuse is told too. The line is written when the *body* ends. The last requests are
//! remembered, with what each layer decided about them, so that one can be asked for by its id.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use http::{Method, StatusCode};
use serde::{Deserialize, Serialize, Serializer};
use smallvec::SmallVec;
use tower::{Layer, Service};

use crate::call::{Answer, Call, End, Head, Outcome, Reply, RequestId, Watcher};
use crate::error::Error;
use crate::names::ServerId;
use crate::time::unix_ms_now;
use crate::trail::Note;

/// The target of the lines of the access log: what a filter names, and what a formatter may treat apart.
pub const ACCESS: &str = "olol::access";

/// The `[trace]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Whether each request gets a line in the log when its answer is over.
    pub access_log: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { access_log: true }
    }
}

/// Puts [`Trace`] around a service.
#[derive(Clone, Debug)]
pub struct TraceLayer {
    access_log: bool,
    requests: Arc<Ring>,
}

impl TraceLayer {
    /// Logs as configured, and remembers the last requests.
    pub fn new(config: &Config, requests: Arc<Ring>) -> Self {
        Self { access_log: config.access_log, requests }
    }
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Trace { inner, access_log: self.access_log, requests: self.requests.clone() }
    }
}

/// Names every reply after its request, and logs it.
#[derive(Clone, Debug)]
pub struct Trace<S> {
    inner: S,
    access_log: bool,
    requests: Arc<Ring>,
}

impl<S> Service<Call> for Trace<S>
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
        let line = Line {
            head: call.head.clone(),
            status: StatusCode::OK,
            wanted: self.access_log,
            answered: false,
            requests: self.requests.clone(),
        };
        let reply = self.inner.call(call);
        Box::pin(follow(line, reply))
    }
}

async fn follow(mut line: Line, reply: impl Future<Output = Result<Reply, Error>>) -> Result<Reply, Error> {
    let answer = reply.await;
    line.answered = true;
    match answer {
        Ok(mut reply) => {
            reply.headers.insert(RequestId::HEADER, line.head.id.header());
            line.status = reply.status;
            Ok(reply.watch(line))
        }
        Err(error) => {
            line.status = error.status();
            line.over(error.kind(), &Outcome::default());
            tracing::warn!(id = %line.head.id, %error, "request failed");
            Err(error)
        }
    }
}

/// What the log will say.
struct Line {
    head: Arc<Head>,
    status: StatusCode,
    wanted: bool,
    answered: bool,
    requests: Arc<Ring>,
}

impl Line {
    fn over(&self, end: &'static str, outcome: &Outcome) {
        let ms = u64::try_from(self.head.arrived.elapsed().as_millis()).unwrap_or(u64::MAX);
        if self.wanted {
            self.write(end, ms, outcome);
        }
        self.requests.remember(|record| record.fill(&self.head, self.status, end, ms, outcome));
    }

    fn write(&self, end: &str, ms: u64, outcome: &Outcome) {
        let head = &self.head;
        let counters = outcome.counters.unwrap_or_default();
        tracing::info!(
            target: ACCESS,
            id = %head.id,
            client = head.client.map(|client| tracing::field::display(Shown(client))),
            method = %head.method,
            path = %head.path.as_str(),
            model = head.peek.model.as_deref(),
            key = head.key.get().map(|key| &*key.name),
            status = self.status.as_u16(),
            server = outcome.servers.last().map(tracing::field::display),
            attempts = outcome.attempts,
            ms,
            tokens = counters.output_tokens,
            end,
        );
    }
}

/// How many requests are remembered.
const REMEMBERED: usize = 1024;
/// How much of a text that a client chose is remembered, bytes.
const LONGEST: usize = 256;

/// A request that is over: what it was, how it ended, and what was decided on the way.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// When it came, milliseconds since 1970.
    pub at_ms: u64,
    /// Its method.
    #[serde(serialize_with = "as_text")]
    pub method: Method,
    /// Its path, without the query.
    pub path: String,
    /// The model that it named.
    pub model: Option<String>,
    /// Where it came from.
    pub client: Option<SocketAddr>,
    /// Whose key it showed.
    pub key: Option<Arc<str>>,
    /// The status of its answer; 499: its client left before.
    pub status: u16,
    /// How its answer ended: `whole`, `client-left`, or the reason of an error.
    pub end: &'static str,
    /// The servers that were asked, in turn.
    #[serde(serialize_with = "as_names")]
    pub servers: SmallVec<[ServerId; 1]>,
    /// How often it was tried.
    pub attempts: u32,
    /// From its first byte to the last one of its answer, milliseconds.
    pub ms: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens made.
    pub output_tokens: u64,
    /// What the layers decided.
    pub trail: Vec<Note>,
}

impl Record {
    /// Becomes that of this request. What it held is put to use again: for the allocator, a thousand records that are made and
    /// freed one after another are a thousand cold places.
    fn fill(&mut self, head: &Head, status: StatusCode, end: &'static str, ms: u64, outcome: &Outcome) {
        let counters = outcome.counters.unwrap_or_default();
        refill(&mut self.id, head.id.as_str());
        self.at_ms = unix_ms_now().saturating_sub(ms);
        self.method.clone_from(&head.method);
        refill(&mut self.path, head.path.path());
        match &head.peek.model {
            Some(model) => refill(self.model.get_or_insert_default(), model),
            None => self.model = None,
        }
        self.client = head.client;
        self.key = head.key.get().map(|key| key.name.clone());
        self.status = status.as_u16();
        self.end = end;
        self.servers.clone_from(&outcome.servers);
        self.attempts = outcome.attempts;
        self.ms = ms;
        self.prompt_tokens = counters.prompt_tokens;
        self.output_tokens = counters.output_tokens;
        self.trail = head.trail.take();
    }
}

/// Makes a text one of another, as far as that is remembered.
fn refill(text: &mut String, from: &str) {
    let mut end = from.len().min(LONGEST);
    while !from.is_char_boundary(end) {
        end -= 1;
    }
    text.clear();
    text.push_str(&from[..end]);
}

fn as_text<S: Serializer>(method: &Method, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(method.as_str())
}

fn as_names<S: Serializer>(servers: &[ServerId], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(servers.iter().map(ServerId::as_str))
}

/// The last requests. Who writes takes the next place, so that nobody waits for anybody else's; who reads looks through all.
#[derive(Debug)]
pub struct Ring {
    places: Box<[Mutex<Option<Record>>]>,
    next: AtomicUsize,
}

impl Default for Ring {
    fn default() -> Self {
        Self { places: (0..REMEMBERED).map(|_| Mutex::default()).collect(), next: AtomicUsize::new(0) }
    }
}

impl Ring {
    fn remember(&self, fill: impl FnOnce(&mut Record)) {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        fill(Self::lock(&self.places[next % self.places.len()]).get_or_insert_default());
    }

    /// The request with this id, if it is over and not yet forgotten.
    pub fn find(&self, id: &str) -> Option<Record> {
        self.places.iter().find_map(|place| Self::lock(place).as_ref().filter(|record| record.id == id).cloned())
    }

    fn lock(place: &Mutex<Option<Record>>) -> MutexGuard<'_, Option<Record>> {
        place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address, written without the padding that the standard library provides for and pays for.
struct Shown(SocketAddr);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SocketAddr::V4(address) = self.0 else { return self.0.fmt(f) };
        let mut buffer = itoa::Buffer::new();
        for (at, part) in address.ip().octets().into_iter().enumerate() {
            f.write_str(if at == 0 { "" } else { "." })?;
            f.write_str(buffer.format(part))?;
        }
        f.write_str(":")?;
        f.write_str(buffer.format(address.port()))
    }
}

impl Watcher for Line {
    fn end(&mut self, end: End, outcome: &Outcome) {
        let word = match end {
            End::Whole => "whole",
            End::Broken(kind) => kind,
            End::Dropped => "client-left",
        };
        self.over(word, outcome);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Dropped while nobody had answered: the client left.
        if !self.answered {
            self.status = StatusCode::from_u16(499).unwrap_or_default();
            self.over("client-left", &Outcome::default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, ask};

    #[tokio::test]
    async fn a_reply_carries_the_id_of_its_request() {
        let (mut service, mut inner) = testing::spawn(&TraceLayer::new(&Config::default(), Arc::default()));
        let call = testing::call("tiny").await;
        let id = call.id.clone();
        let answer = ask(&mut service, call);
        inner.next_request().await.unwrap().1.send_response(testing::reply("hi"));
        assert_eq!(answer.await.unwrap().headers["x-olol-request"], id.as_str());
    }

    #[tokio::test]
    async fn a_request_that_is_over_can_be_asked_for() {
        let requests = Arc::new(Ring::default());
        let layer = TraceLayer::new(&Config { access_log: false }, requests.clone());
        let (mut service, mut inner) = testing::spawn(&layer);
        let call = testing::call("tiny").await;
        let id = call.id.to_string();
        let answer = ask(&mut service, call);
        let (call, respond) = inner.next_request().await.unwrap();
        call.note("pick", "the least loaded", []);
        respond.send_response(testing::reply("hi"));
        let reply = answer.await.unwrap();
        assert!(requests.find(&id).is_none());
        reply.body.collect(9).await.unwrap();
        let record = requests.find(&id).unwrap();
        assert_eq!((record.status, record.end, record.trail[0].layer), (200, "whole", "pick"));
    }

    #[test]
    fn only_the_last_requests_are_remembered() {
        let ring = Ring::default();
        let head = Head::new(crate::Route::Chat, http::Method::POST, http::uri::PathAndQuery::from_static("/"));
        let first = head.id.to_string();
        ring.remember(|record| record.fill(&head, StatusCode::OK, "whole", 1, &Outcome::default()));
        assert!(ring.find(&first).is_some());
        let other = Head::new(crate::Route::Chat, http::Method::POST, http::uri::PathAndQuery::from_static("/"));
        for _ in 0..REMEMBERED {
            ring.remember(|record| record.fill(&other, StatusCode::OK, "whole", 1, &Outcome::default()));
        }
        assert!(ring.find(&first).is_none() && ring.find(other.id.as_str()).is_some());
    }

    #[tokio::test]
    async fn an_error_passes_unchanged() {
        let (mut service, mut inner) = testing::spawn(&TraceLayer::new(&Config::default(), Arc::default()));
        let answer = ask(&mut service, testing::call("tiny").await);
        inner.next_request().await.unwrap().1.send_error(Error::busy());
        assert!(matches!(answer.await, Err(Error::Busy { .. })));
    }
}
