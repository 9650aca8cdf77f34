//! A client's request on its way down the stack, and a server's answer on its way up.
//!
//! Both are typed and free of transports: HTTP is left behind at the edge, gRPC begins in the pool. A reply ends when its
//! *body* ends: whoever holds something for a call, or wants to know how it went, puts it into the body.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::affinity::Turn;
use crate::circuit::Limits;
use crate::cluster::{Candidates, Known};
use crate::error::Error;
use crate::instruments::RunnerMeters;
use crate::json::Span;
use crate::keys::Key;
use crate::names::{ModelName, ServerId};
use crate::peek::Peek;
use crate::place::Named;
use crate::progress::Progress;
use crate::route::Route;
use crate::slots::{Lease, Ticket};
use crate::tiers::Tiers;
use crate::trail::{self, Trail};

/// One request of a client, on its way to a server.
#[derive(Debug)]
pub struct Call {
    /// What was asked, the same for every attempt.
    pub head: Arc<Head>,
    /// Its body.
    pub payload: Payload,
    /// What the cluster knows of the model, once `model-route` has looked.
    pub known: Option<Arc<Known>>,
    /// What it is for: the model that servers are asked for, which is not always the one that the client named.
    pub place: Place,
    /// The servers still in question.
    pub candidates: Candidates,
    /// Those of them where it should rather go, once `affinity` has looked.
    pub preferred: Option<Box<Preferred>>,
    /// What its server must get otherwise than its client sent it.
    pub edits: Option<Box<Edits>>,
    /// Which of the servers it would rather go to, or must.
    pub tiers: Option<Arc<Tiers>>,
    /// When its client stops waiting.
    pub deadline: Option<Instant>,
    /// How long a server may take to take a connection, if not as long as the pool lets it.
    pub connect_limit: Option<Duration>,
    /// Its right to a slot, once `queue` has given it one. Without one it is not held back: the server queues it.
    pub ticket: Option<Arc<Ticket>>,
    /// A slot that it has waited for.
    pub lease: Option<Lease>,
    /// Whether to keep away from pooled connections: the last attempt died on one.
    pub fresh: bool,
    /// Attempts before this one.
    pub attempts: u32,
    /// By which rules its server is judged, once `retry` has looked; without any it is not.
    pub limits: Option<Arc<Limits>>,
    /// Where it was sent, for whoever must know before there is an answer: `hedge`.
    pub asked: Option<Arc<Asked>>,
}

/// What a client asked, peeked at once at the edge and never changed.
#[derive(Debug)]
pub struct Head {
    /// Its id: the `X-Olol-Request` header of the answer.
    pub id: RequestId,
    /// What it asks for.
    pub route: Route,
    /// Its method: a route may take two.
    pub method: Method,
    /// Path and query, as the client sent them.
    pub path: PathAndQuery,
    /// Its end-to-end headers.
    pub headers: HeaderMap,
    /// What was seen of its body.
    pub peek: Peek,
    /// The model it names, if the name is one that Ollama would take. What is asked for is [`Call::place`].
    pub model: Option<ModelName>,
    /// Where it came from.
    pub client: Option<SocketAddr>,
    /// Whether it came as messages of gRPC.
    pub is_grpc: bool,
    /// The key that its client has shown, once `auth` has looked.
    pub key: OnceLock<Arc<Key>>,
    /// The time after which `timeout` gave up waiting for the first byte of its answer, if it did.
    pub given_up: OnceLock<Duration>,
    /// When it came.
    pub arrived: Instant,
    /// Whether it only asks what would be done: layers decide and write their notes, but count nothing, and nothing is sent.
    pub dry: bool,
    /// What was decided about it so far.
    pub trail: Trail,
    /// How far it has come.
    pub progress: Progress,
}

impl Head {
    /// A head that says nothing yet but where it goes.
    pub fn new(route: Route, method: Method, path: PathAndQuery) -> Self {
        Self {
            id: RequestId::random(),
            route,
            method,
            path,
            headers: HeaderMap::new(),
            peek: Peek::default(),
            model: None,
            client: None,
            is_grpc: false,
            key: OnceLock::new(),
            given_up: OnceLock::new(),
            arrived: Instant::now(),
            dry: false,
            trail: Trail::default(),
            progress: Progress::default(),
        }
    }
}

/// What a server is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The model, if there is one.
    pub model: Option<ModelName>,
    /// The load options that the call names, once `model-route` has looked.
    pub options: Option<Arc<Named>>,
}

/// Where a call should rather go, and why. Servers are told by their index; each counts only while it is a candidate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preferred {
    /// Where to go: the first of these that can take it.
    pub servers: SmallVec<[usize; 4]>,
    /// Whether that is worth less than a shorter wait: then only one will do that costs about as little as the cheapest.
    pub yields: bool,
    /// Who is believed to have the beginning of its prompt in a cache, whether it should go there or not.
    pub holders: SmallVec<[usize; 4]>,
    /// How much of the prompt that is, in bytes of the body.
    pub cached: u32,
    /// How long the prompt is, in bytes of the body; 0: not known.
    pub prompt: u32,
    /// What its server tells the other proxies of it.
    pub turn: Turn,
}

/// How what a server gets differs from what the client sent.
#[derive(Clone, Debug, Default)]
pub struct Edits {
    /// Another method.
    pub method: Option<Method>,
    /// Another path.
    pub path: Option<PathAndQuery>,
    /// Headers with what they are instead; without a value they are left out.
    pub headers: SmallVec<[(HeaderName, Option<HeaderValue>); 1]>,
    /// Parts of the body with what stands there instead, in any order, none over another.
    pub body: SmallVec<[(Span, Bytes); 1]>,
}

impl Call {
    /// A call that nobody has looked at yet: every server is in question.
    pub fn new(head: impl Into<Arc<Head>>, payload: Payload, candidates: Candidates) -> Self {
        let head = head.into();
        let place = Place { model: head.model.clone(), options: None };
        Self {
            head,
            payload,
            known: None,
            place,
            candidates,
            preferred: None,
            edits: None,
            tiers: None,
            deadline: None,
            connect_limit: None,
            ticket: None,
            lease: None,
            fresh: false,
            attempts: 0,
            limits: None,
            asked: None,
        }
    }

    /// What its server must get otherwise, to be told more.
    pub fn edits_mut(&mut self) -> &mut Edits {
        self.edits.get_or_insert_default()
    }

    /// Says in its trail what a layer decided, and why.
    pub fn note(&self, layer: &'static str, decision: &'static str, facts: impl IntoIterator<Item = trail::Named>) {
        self.head.trail.note(layer, decision, facts);
    }

    /// The same call once more, for another attempt; `None` if its body cannot be sent twice.
    pub fn again(&self) -> Option<Self> {
        Some(Self {
            head: self.head.clone(),
            payload: self.payload.again()?,
            known: self.known.clone(),
            place: self.place.clone(),
            candidates: self.candidates.clone(),
            preferred: self.preferred.clone(),
            edits: self.edits.clone(),
            tiers: self.tiers.clone(),
            deadline: self.deadline,
            connect_limit: self.connect_limit,
            ticket: self.ticket.clone(),
            lease: None,
            fresh: self.fresh,
            attempts: self.attempts,
            limits: self.limits.clone(),
            asked: self.asked.clone(),
        })
    }
}

/// The servers that a call was sent to, known as soon as it was.
#[derive(Debug, Default)]
pub struct Asked(Mutex<Sent>);

#[derive(Debug, Default)]
struct Sent {
    servers: SmallVec<[ServerId; 2]>,
    attempts: u32,
}

impl Asked {
    /// The call is about to be sent to a server; the how manieth attempt that is.
    pub fn sent(&self, server: &ServerId, attempts: u32) {
        let mut sent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // On a fresh connection the same server is asked once more.
        if sent.servers.last() != Some(server) {
            sent.servers.push(server.clone());
        }
        sent.attempts = attempts;
    }

    /// The servers, in turn.
    pub fn servers(&self) -> SmallVec<[ServerId; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).servers.clone()
    }

    /// How often it was tried; 0: it has not been sent yet.
    pub fn attempts(&self) -> u32 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).attempts
    }
}

impl Deref for Call {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

/// The id of a request: what the client may see and the logs tell. Kept as the value of a header, which it becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// The header that tells it to the client.
    pub const HEADER: HeaderName = HeaderName::from_static("x-olol-request");

    /// A new random id: 16 hexadecimal digits.
    pub fn random() -> Self {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut digits = [0; 16];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(fastrand::u64(..).to_be_bytes()) {
            pair.copy_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
        Self(HeaderValue::from_bytes(&digits).unwrap_or(HeaderValue::from_static("0")))
    }

    /// An id from elsewhere, if it is fit to be printed: at most 64 visible ASCII characters.
    pub fn from_text(text: &str) -> Option<Self> {
        let fit = !text.is_empty() && text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_graphic());
        fit.then(|| HeaderValue::from_str(text).ok())?.map(Self)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    /// The id as the value of a header.
    pub fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The answer of a server, a layer or the whole stack, on its way.
pub type Answer = BoxFuture<'static, Result<Reply, Error>>;

/// A stream of body pieces.
pub type Pieces = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>;

/// The body of a call.
pub enum Payload {
    /// All of it is here, in the pieces in which it came; may be sent again.
    Whole(SmallVec<[Bytes; 1]>),
    /// It is still coming, and can be sent once.
    Stream {
        /// What the client said of its length, in bytes.
        length: Option<u64>,
        /// The pieces.
        pieces: Pieces,
    },
}

impl Payload {
    /// No body.
    pub fn empty() -> Self {
        Self::Whole(SmallVec::new())
    }

    /// A body in one piece.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        Self::Whole(SmallVec::from_buf([bytes.into()]))
    }

    /// The same body once more, without copying its bytes; `None` if it is a stream.
    pub fn again(&self) -> Option<Self> {
        match self {
            Self::Whole(pieces) => Some(Self::Whole(pieces.clone())),
            Self::Stream { .. } => None,
        }
    }

    /// The body with some of its parts replaced, without copying the others. A stream passes as it is: nobody has looked
    /// into it, so nobody knows of parts.
    #[must_use]
    pub fn edited(self, edits: &[(Span, Bytes)]) -> Self {
        match self {
            Self::Whole(pieces) if !edits.is_empty() => Self::Whole(spliced(pieces, edits)),
            other => other,
        }
    }

    /// Its length in bytes, if that is known.
    pub fn length(&self) -> Option<u64> {
        match self {
            Self::Whole(pieces) => Some(pieces.iter().map(|piece| piece.len() as u64).sum()),
            Self::Stream { length, .. } => *length,
        }
    }
}

/// Pieces with some of their parts replaced.
fn spliced(pieces: SmallVec<[Bytes; 1]>, edits: &[(Span, Bytes)]) -> SmallVec<[Bytes; 1]> {
    let mut edits: SmallVec<[&(Span, Bytes); 4]> = edits.iter().collect();
    edits.sort_unstable_by_key(|(span, _)| span.start);
    let mut made = SmallVec::new();
    let mut next = edits.into_iter().peekable();
    // Up to where the body has been written or left out.
    let mut done = 0;
    let mut start = 0;
    for piece in pieces {
        let end = start + piece.len();
        while let Some((span, text)) = next.peek().filter(|(span, _)| span.start < end) {
            if span.start > done {
                made.push(piece.slice(done.max(start) - start..span.start - start));
            }
            made.push(text.clone());
            done = span.end;
            next.next();
        }
        if done < end {
            made.push(piece.slice(done.max(start) - start..));
            done = end;
        }
        start = end;
    }
    made
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(pieces) => write!(f, "Whole({} pieces)", pieces.len()),
            Self::Stream { length, .. } => write!(f, "Stream({length:?})"),
        }
    }
}

/// The answer to a call: a head, and a body that is still coming.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: StatusCode,
    /// End-to-end headers, as the server sent them.
    pub headers: HeaderMap,
    /// The body.
    pub body: Body,
}

impl Reply {
    /// An answer of which everything is known.
    pub fn full(status: StatusCode, headers: HeaderMap, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let length = bytes.len() as u64;
        let chunk = (!bytes.is_empty()).then(|| Ok(Chunk::from(bytes)));
        Self { status, headers, body: Body::new(futures_util::stream::iter(chunk)).with_length(Some(length)) }
    }

    /// Whether it comes piece by piece, as it is made.
    pub fn is_stream(&self) -> bool {
        let kind = self.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
        kind.is_some_and(|kind| kind.starts_with(b"application/x-ndjson") || kind.starts_with(b"text/event-stream"))
    }

    /// Keeps something until the body ends or is dropped.
    pub fn hold(mut self, guard: impl Send + 'static) -> Self {
        self.body.0.watchers.push(Box::new(Hold(Some(Box::new(guard)))));
        self
    }

    /// Lets somebody follow the body.
    pub fn watch(mut self, watcher: impl Watcher + 'static) -> Self {
        self.body.0.watchers.push(Box::new(watcher));
        self
    }
}

/// A piece of a body: one line of NDJSON, one SSE event, or just bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The bytes as the server made them.
    pub bytes: Bytes,
    /// The counts of the whole answer, if this piece tells them.
    pub end: Option<Counters>,
}

impl From<Bytes> for Chunk {
    fn from(bytes: Bytes) -> Self {
        Self { bytes, end: None }
    }
}

/// What a server says of an answer when it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens made.
    pub output_tokens: u64,
    /// Time for the tokens of the prompt; zero if the dialect does not tell.
    pub prompt_duration: Duration,
    /// Time for the tokens made; zero if the dialect does not tell.
    pub eval_duration: Duration,
    /// Time that the model took to load; zero if the dialect does not tell.
    pub load_duration: Duration,
}

impl Counters {
    /// No answer has more tokens than this, and none takes longer.
    const MOST_TOKENS: u64 = 1 << 32;
    const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

    /// As far as it can be true: sums of what a server says must not overflow, whatever that is.
    #[must_use]
    pub fn believed(self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.min(Self::MOST_TOKENS),
            output_tokens: self.output_tokens.min(Self::MOST_TOKENS),
            prompt_duration: self.prompt_duration.min(Self::LONGEST),
            eval_duration: self.eval_duration.min(Self::LONGEST),
            load_duration: self.load_duration.min(Self::LONGEST),
        }
    }
}

/// How an answer came about, known when its body ends.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The servers that were asked, in turn; the last one answered.
    pub servers: SmallVec<[ServerId; 1]>,
    /// How often it was tried.
    pub attempts: u32,
    /// What the answering server counted.
    pub counters: Option<Counters>,
    /// The metrics of the model on the server that answered, if it is one that a server has.
    pub meters: Option<Arc<RunnerMeters>>,
    /// Servers that should have taken part and did not.
    pub absent: Vec<ServerId>,
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All of it was delivered.
    Whole,
    /// It broke off; the word is [`Error::kind`].
    Broken(&'static str),
    /// Its reader went away.
    Dropped,
}

/// Follows a body: sees every chunk, and its end exactly once.
pub trait Watcher: Send {
    /// A chunk passes by.
    fn chunk(&mut self, _chunk: &Chunk) {}
    /// The body has ended, in whichever way.
    fn end(&mut self, _end: End, _outcome: &Outcome) {}
}

/// Keeps a value until the end.
struct Hold(Option<Box<dyn std::any::Any + Send>>);

impl Watcher for Hold {
    fn end(&mut self, _end: End, _outcome: &Outcome) {
        self.0 = None;
    }
}

/// Where the chunks of a body come from: any stream of them, or something that also knows what became of the answer since
/// its head.
pub trait Source: Send {
    /// The next chunk.
    fn poll_chunk(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, Error>>>;

    /// Adds to the outcome what has changed since the head. Asked once, when the body ends.
    fn tell(&self, _outcome: &mut Outcome) {}
}

impl<S: Stream<Item = Result<Chunk, Error>> + Send> Source for S {
    fn poll_chunk(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, Error>>> {
        self.poll_next(cx)
    }
}

/// A body of chunks, with those who follow it. No larger than a pointer, since it goes from layer to layer.
pub struct Body(Box<Inner>);

/// The chunks of a body, from whatever makes them.
pub struct Chunks(Pin<Box<dyn Source>>);

impl Chunks {
    /// Adds to an outcome what has changed since the head: for whoever puts itself before these chunks.
    pub fn tell(&self, outcome: &mut Outcome) {
        self.0.tell(outcome);
    }
}

impl Stream for Chunks {
    type Item = Result<Chunk, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_chunk(cx)
    }
}

struct Inner {
    chunks: Chunks,
    length: Option<u64>,
    delivered: u64,
    watchers: SmallVec<[Box<dyn Watcher>; 3]>,
    ended: bool,
    outcome: Outcome,
}

impl Body {
    /// A body of these chunks.
    pub fn new(chunks: impl Source + 'static) -> Self {
        Self(Box::new(Inner {
            chunks: Chunks(Box::pin(chunks)),
            length: None,
            delivered: 0,
            watchers: SmallVec::new(),
            ended: false,
            outcome: Outcome::default(),
        }))
    }

    /// How the answer came about so far.
    pub fn outcome(&self) -> &Outcome {
        &self.0.outcome
    }

    /// The same, to be told more.
    pub fn outcome_mut(&mut self) -> &mut Outcome {
        &mut self.0.outcome
    }

    /// Says how long the body is, in bytes, where that is known.
    #[must_use]
    pub fn with_length(mut self, length: Option<u64>) -> Self {
        self.0.length = length;
        self
    }

    /// Its length in bytes, if that is known.
    pub fn length(&self) -> Option<u64> {
        self.0.length
    }

    /// Lets its chunks come out of something that takes them. Who follows the body sees what comes out.
    #[must_use]
    pub fn through<S>(mut self, change: impl FnOnce(Chunks) -> S) -> Self
    where
        S: Source + 'static,
    {
        let chunks = self.take_chunks();
        self.0.chunks = Chunks(Box::pin(change(chunks)));
        self
    }

    /// Takes its chunks away, to put others in their place: see [`Body::through`].
    pub fn take_chunks(&mut self) -> Chunks {
        std::mem::replace(&mut self.0.chunks, Chunks(Box::pin(futures_util::stream::empty())))
    }

    /// A body of nothing.
    pub fn empty() -> Self {
        Self::new(futures_util::stream::empty()).with_length(Some(0))
    }

    /// Reads the next chunk.
    pub async fn next(&mut self) -> Option<Result<Chunk, Error>> {
        futures_util::StreamExt::next(self).await
    }

    /// Reads the whole body, up to a limit in bytes; what is longer is an error.
    pub async fn collect(mut self, limit: usize) -> Result<Bytes, Error> {
        let mut joined = bytes::BytesMut::new();
        let mut first = Bytes::new();
        while let Some(chunk) = self.next().await {
            let bytes = chunk?.bytes;
            if joined.len() + first.len() + bytes.len() > limit {
                return Err(Error::Internal(format!("an answer of a server is longer than {limit} bytes")));
            }
            if first.is_empty() && joined.is_empty() {
                first = bytes;
            } else {
                joined.extend_from_slice(&std::mem::take(&mut first));
                joined.extend_from_slice(&bytes);
            }
        }
        Ok(if joined.is_empty() { first } else { joined.freeze() })
    }
}

impl Inner {
    fn finish(&mut self, end: End) {
        if !std::mem::replace(&mut self.ended, true) {
            self.chunks.tell(&mut self.outcome);
            for watcher in &mut self.watchers {
                watcher.end(end, &self.outcome);
            }
        }
    }
}

impl Stream for Body {
    type Item = Result<Chunk, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self.get_mut().0;
        let next = ready!(this.chunks.0.as_mut().poll_chunk(cx));
        match &next {
            Some(Ok(chunk)) => {
                if let Some(counters) = chunk.end {
                    this.outcome.counters = Some(counters);
                }
                for watcher in &mut this.watchers {
                    watcher.chunk(chunk);
                }
                this.delivered += chunk.bytes.len() as u64;
                // Who has been given all the bytes that were promised need not ask for more.
                if this.length == Some(this.delivered) {
                    this.finish(End::Whole);
                }
            }
            Some(Err(error)) => this.finish(End::Broken(error.kind())),
            None => this.finish(End::Whole),
        }
        Poll::Ready(next)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Who was promised nothing need not ask for it.
        self.finish(if self.length == Some(self.delivered) { End::Whole } else { End::Dropped });
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("length", &self.0.length).field("outcome", &self.0.outcome).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ends(Arc<Mutex<Vec<End>>>);

    impl Watcher for Ends {
        fn end(&mut self, end: End, _outcome: &Outcome) {
            self.0.lock().unwrap().push(end);
        }
    }

    #[test]
    fn a_body_of_nothing_is_whole_when_it_is_dropped_unread() {
        for (text, wanted) in [("", End::Whole), ("hi", End::Dropped)] {
            let ends: Arc<Mutex<Vec<End>>> = Arc::default();
            drop(Reply::full(StatusCode::OK, HeaderMap::new(), text).watch(Ends(ends.clone())));
            assert_eq!(*ends.lock().unwrap(), [wanted]);
        }
    }
}
