//! Agents: a call becomes messages here, and messages become a reply, and nowhere else in the proxy.
//!
//! Each agent has two HTTP/2 connections, so that a model on its way to the disk never stands before an answer: one for
//! calls, one for bodies that are still coming. Both are made when first needed and again when they were lost.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, future::BoxFuture};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use olol_middleware::call::Body;
use olol_middleware::{BoxError, Chunk, Counters, Error, Payload, Phase, Reply, ServerId};
use olol_proto::v1::membership_client::MembershipClient;
use olol_proto::v1::server_client::ServerClient;
use olol_proto::v1::{
    DescribeRequest, DescribeResponse, Header, RelayHead, RelayRequest, RelayResponse, ServerState, TellTurnsRequest,
    Turn, WatchRequest,
};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::either::Either;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Status, Streaming};

use super::lobby::Lobby;
use crate::dial;
use crate::ollama::{Ask, Endpoint};
use crate::rpc;
use crate::security::proof::{self, Dialled, Known, Purpose, Refused};
use crate::security::{Tokens, Trust, tls};

/// The largest message that either side takes: a line of an answer, joined, and its head.
pub const LARGEST_MESSAGE: usize = 4 << 20;
/// The largest piece of a body in one message.
pub const LARGEST_PIECE: usize = 1 << 20;
/// Bytes of one stream that may be on the way unread: one stalled reader holds no more than this.
pub const STREAM_WINDOW: u32 = 256 << 10;
/// Bytes of all streams of a connection together: never the limit, so that streams do not wait for each other.
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// The trailer that tells how far a call had come when it failed.
pub const PHASE: &str = "olol-phase";
/// What stands before the path of every call; nobody looks at it.
const ORIGIN: &str = "http://olol";
/// Silence after which a connection is probed, and after which a probe counts as lost.
const PROBE: Duration = Duration::from_secs(3);
/// How long a call that found no connection any more waits to hear why.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// What an agent waits beyond a deadline: who asked it ends the call there, and the agent only where nobody does.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// Which of its two connections a call takes.
#[derive(Clone, Copy)]
enum Way {
    Calls,
    Bulk,
}

/// One agent.
#[derive(Debug)]
pub(super) struct Agent {
    id: ServerId,
    calls: Line,
    bulk: Line,
    /// What this proxy writes into the hop of its calls.
    caller: String,
}

/// Where connections to an agent come from.
#[derive(Clone, Debug)]
pub(super) enum To {
    /// It is dialled.
    Dial(Endpoint),
    /// It has dialled in.
    Take(Lobby),
}

/// How an agent is reached.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// Where its connections come from.
    pub(super) to: To,
    /// How long a connection may take.
    pub(super) timeout: Duration,
    /// Whether it must prove that it is at that very address: nobody of ours has named it.
    pub(super) bound: bool,
}

impl Agent {
    pub(super) fn new(id: ServerId, reach: &Reach, trust: &Trust, hop: &HeaderValue) -> Self {
        let line = || Line::new(reach.clone(), trust.clone());
        Self { id, calls: line(), bulk: line(), caller: hop.to_str().unwrap_or_default().to_owned() }
    }

    /// The same over a connection that there is already, for calls.
    pub(super) fn over(self, ready: Option<Ready>) -> Self {
        self.calls.current.store(ready.map(|Ready(channel)| Arc::new(channel)));
        self
    }

    pub(super) fn id(&self) -> &ServerId {
        &self.id
    }

    /// Whether it has dialled in: nothing but its own connections leads to it.
    pub(super) fn is_guest(&self) -> bool {
        matches!(self.calls.reach.to, To::Take(_))
    }

    /// Relays a call and returns when the head of the answer is there.
    pub(super) fn relay(
        self: Arc<Self>,
        ask: Ask,
        context: super::Context,
    ) -> impl Future<Output = Result<Reply, Error>> + Send {
        let way = if matches!(ask.payload, Payload::Stream { .. }) { Way::Bulk } else { Way::Calls };
        let (fresh, limit) = (ask.fresh, ask.connect_limit);
        let mut request = Request::new(Messages(messages(ask, context)));
        request.metadata_mut().insert("te", tonic::metadata::MetadataValue::from_static("trailers"));
        self.exchange(way, fresh, limit, request)
    }

    async fn exchange(
        self: Arc<Self>,
        way: Way,
        fresh: bool,
        limit: Option<Duration>,
        request: Request<Messages>,
    ) -> Result<Reply, Error> {
        let line = match way {
            Way::Calls => &self.calls,
            Way::Bulk => &self.bulk,
        };
        let connected = line.get(fresh, limit).await;
        let (channel, reused) = connected.map_err(|error| self.failed(Phase::Connecting, false, error))?;
        let mut stream = match client(channel).relay(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return Err(self.error(&status, Phase::Waiting, reused)),
        };
        match stream.message().await {
            Ok(Some(mut first @ RelayResponse { head: Some(_), .. })) => {
                let head = first.head.take().unwrap_or_default();
                let status = u16::try_from(head.status).ok().and_then(|status| StatusCode::from_u16(status).ok());
                let status = status
                    .ok_or_else(|| self.failed(Phase::Waiting, false, "the agent sent no valid status".into()))?;
                let headers = from_wire(head.headers);
                let length =
                    headers.get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
                let body = Body::new(Answer { id: self.id.clone(), first: Some(chunk(first)), stream, over: false });
                Ok(Reply { status, headers, body: body.with_length(length) })
            }
            Ok(_) => Err(self.failed(Phase::Waiting, reused, "the agent's answer does not begin with a head".into())),
            Err(status) => Err(self.error(&status, Phase::Waiting, reused)),
        }
    }

    /// The agent's state, whenever it changes, and what it says of itself, if that is asked for: both at once, since an answer
    /// may be long on its way. There must be one within this time after there is a connection.
    pub(super) async fn watch(
        &self,
        limit: Duration,
        describes: bool,
    ) -> Result<(Streaming<ServerState>, Option<Describing>), BoxError> {
        let (channel, _) = self.calls.get(false, None).await?;
        let describing = describes.then(|| AbortOnDropHandle::new(tokio::spawn(describe(channel.clone(), limit))));
        let watching = async {
            let request = WatchRequest { interval_ms: 1000, deltas: true, caller: self.caller.clone(), turns: true };
            let states = client(channel).watch(request).await;
            states.map(tonic::Response::into_inner).map_err(|status| -> BoxError {
                match status.code() {
                    Code::Unauthenticated => Refused::Stranger(status.message().to_owned()).into(),
                    _ => told(&status).into(),
                }
            })
        };
        let watching = tokio::time::timeout(limit, watching).await;
        let states = watching.map_err(|_| format!("no answer after {} ms", limit.as_millis()))??;
        Ok((states, describing))
    }

    /// Whether it still answers on the connection that is used for calls, or on another that it has made.
    pub(super) async fn is_there(&self, limit: Duration) -> bool {
        let asking = async {
            let (channel, _) = self.calls.get(false, None).await.ok()?;
            describe(channel, limit).await
        };
        tokio::time::timeout(limit, asking).await.is_ok_and(|description| description.is_some())
    }

    /// Tells the agent of turns, for the other proxies.
    pub(super) async fn tell_turns(&self, turns: Vec<Turn>) -> Result<(), Status> {
        let channel = self.calls.get(false, None).await.map_err(|error| Status::unavailable(error.to_string()))?.0;
        client(channel).tell_turns(TellTurnsRequest { caller: self.caller.clone(), turns }).await.map(drop)
    }

    /// A client over the connection for what is large.
    pub(super) async fn bulk(&self) -> Result<ServerClient<Channel>, BoxError> {
        Ok(client(self.bulk.get(false, None).await?.0))
    }

    fn failed(&self, phase: Phase, reused: bool, source: BoxError) -> Error {
        Error::Server { server: self.id.clone(), phase, reused, source }
    }

    /// What a status means: the agent's own word on its Ollama, or the loss of the agent.
    fn error(&self, status: &Status, phase: Phase, reused: bool) -> Error {
        let told = status.metadata().get(PHASE).and_then(|phase| Phase::from_word(phase.to_str().ok()?));
        match status.code() {
            Code::InvalidArgument if told.is_none() => return Error::Body(status.message().to_owned().into()),
            // Nothing was done: another server may take it.
            Code::Unauthenticated if told.is_none() => {
                return self.failed(Phase::Connecting, false, Refused::Stranger(status.message().to_owned()).into());
            }
            Code::FailedPrecondition if told.is_none() => return Error::Loop,
            _ => {}
        }
        let source: BoxError = status.message().to_owned().into();
        Error::Server {
            server: self.id.clone(),
            phase: told.unwrap_or(phase),
            reused: told.is_none() && reused,
            source,
        }
    }
}

/// What HTTP/2 makes of an answer in HTTP/1: its first letters are the length of a frame.
const HTTP_1: &str = "frame with invalid size";
const NO_AGENT: &str = "an agent speaks HTTP/2, and this does not; is it an Ollama? then name it as http://HOST:PORT";

/// An agent is asked what it says of itself, until this is dropped.
pub(super) type Describing = AbortOnDropHandle<Option<DescribeResponse>>;

/// What an agent says of itself that does not change, if it says so in time.
async fn describe(channel: Channel, limit: Duration) -> Option<DescribeResponse> {
    let answer = tokio::time::timeout(limit, client(channel).describe(DescribeRequest {})).await;
    Some(answer.ok()?.ok()?.into_inner())
}

/// What a status says, with what it comes from where the connection has failed: a handshake is often refused only when the
/// first answer is waited for.
pub(crate) fn told(status: &Status) -> String {
    let text = tls::told(status.message().to_owned(), std::error::Error::source(status));
    if text.contains(HTTP_1) { format!("{text}: {NO_AGENT}") } else { text }
}

fn client(channel: Channel) -> ServerClient<Channel> {
    ServerClient::with_origin(channel, Uri::from_static(ORIGIN)).max_decoding_message_size(LARGEST_MESSAGE)
}

/// A call as messages: the head with the first piece, then the rest.
fn messages(ask: Ask, context: super::Context) -> BoxStream {
    let head = RelayHead {
        method: ask.method.as_str().to_owned(),
        path: ask.path.to_string(),
        headers: to_wire(&ask.headers),
        deadline_ms: context.deadline.map_or(0, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now()) + DEADLINE_GRACE;
            u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
        }),
        session: context.session,
        request_id: context.request_id,
        fresh: ask.fresh,
        turn: context.turn.map(rpc::wire),
    };
    match ask.payload {
        Payload::Whole(pieces) => {
            let mut pieces = pieces.into_iter().flat_map(cut).peekable();
            let first = pieces.next().unwrap_or_default();
            let first = RelayRequest { head: Some(head), body: first, last: pieces.peek().is_none() };
            let mut rest = pieces;
            let rest = std::iter::from_fn(move || {
                let body = rest.next()?;
                Some(RelayRequest { head: None, body, last: rest.peek().is_none() })
            });
            Box::pin(futures_util::stream::iter(std::iter::once(first).chain(rest)))
        }
        Payload::Stream { pieces, .. } => {
            let first = RelayRequest { head: Some(head), body: Bytes::new(), last: false };
            // A body that breaks off has no last message: the agent then knows that its client went away.
            let body = pieces
                .map(Some)
                .chain(futures_util::stream::iter([None]))
                .scan((), |(), piece| {
                    std::future::ready(match piece {
                        Some(Ok(piece)) => {
                            Some(cut(piece).map(|body| RelayRequest { head: None, body, last: false }).collect())
                        }
                        Some(Err(_)) => None,
                        None => Some(vec![RelayRequest { head: None, body: Bytes::new(), last: true }]),
                    })
                })
                .flat_map(futures_util::stream::iter);
            Box::pin(futures_util::stream::iter([first]).chain(body))
        }
    }
}

type BoxStream = Pin<Box<dyn Stream<Item = RelayRequest> + Send>>;

/// The messages of a call, under a name: the compiler cannot prove of the bare box that tonic may send it.
struct Messages(BoxStream);

impl Stream for Messages {
    type Item = RelayRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<RelayRequest>> {
        self.0.as_mut().poll_next(cx)
    }
}

/// A piece in pieces that fit a message, without copying.
fn cut(mut piece: Bytes) -> impl Iterator<Item = Bytes> + Send {
    std::iter::from_fn(move || {
        let next = piece.split_to(piece.len().min(LARGEST_PIECE));
        (!next.is_empty()).then_some(next)
    })
}

/// Headers as messages.
pub fn to_wire(headers: &HeaderMap) -> Vec<Header> {
    let header = |(name, value): (&HeaderName, &HeaderValue)| Header {
        name: name.as_str().to_owned(),
        value: Bytes::copy_from_slice(value.as_bytes()),
    };
    headers.iter().map(header).collect()
}

/// Messages as headers; what is no header is left out.
pub fn from_wire(headers: Vec<Header>) -> HeaderMap {
    headers
        .into_iter()
        .filter_map(|header| {
            Some((
                HeaderName::from_bytes(header.name.as_bytes()).ok()?,
                HeaderValue::from_maybe_shared(header.value).ok()?,
            ))
        })
        .fold(HeaderMap::new(), |mut headers, (name, value)| {
            headers.append(name, value);
            headers
        })
}

/// The body of an answer that an agent relays.
struct Answer {
    id: ServerId,
    first: Option<Chunk>,
    stream: Streaming<RelayResponse>,
    over: bool,
}

impl Stream for Answer {
    type Item = Result<Chunk, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        if let Some(first) = this.first.take().filter(|first| !first.bytes.is_empty()) {
            return Poll::Ready(Some(Ok(first)));
        }
        Poll::Ready(match std::task::ready!(this.stream.poll_next_unpin(cx)) {
            Some(Ok(message)) => Some(Ok(chunk(message))),
            Some(Err(status)) => {
                this.over = true;
                let source = status.message().to_owned().into();
                Some(Err(Error::Server { server: this.id.clone(), phase: Phase::Streaming, reused: false, source }))
            }
            None => {
                this.over = true;
                None
            }
        })
    }
}

fn chunk(message: RelayResponse) -> Chunk {
    let end = message.counters.map(|counters| Counters {
        prompt_tokens: counters.prompt_tokens,
        output_tokens: counters.output_tokens,
        prompt_duration: Duration::from_nanos(counters.prompt_duration_ns),
        eval_duration: Duration::from_nanos(counters.eval_duration_ns),
        load_duration: Duration::from_nanos(counters.load_duration_ns),
    });
    let end = end.map(Counters::believed);
    Chunk { bytes: message.body, end }
}

/// One HTTP/2 connection to an agent, made anew when it was lost.
struct Line {
    reach: Reach,
    trust: Trust,
    current: ArcSwapOption<Channel>,
    connecting: Mutex<()>,
}

impl Line {
    fn new(reach: Reach, trust: Trust) -> Self {
        Self { reach, trust, current: ArcSwapOption::empty(), connecting: Mutex::new(()) }
    }

    /// The connection, and whether it was there before. A new one comes within the usual time or another limit.
    async fn get(&self, fresh: bool, limit: Option<Duration>) -> Result<(Channel, bool), BoxError> {
        if let Some(channel) = self.ready(fresh) {
            return Ok((channel, true));
        }
        let limit = limit.unwrap_or(self.reach.timeout);
        let made = tokio::time::timeout(limit, self.make(fresh)).await;
        made.map_err(|_| match self.reach.to {
            To::Dial(_) => format!("no connection after {} ms", limit.as_millis()),
            To::Take(_) => "its agent has no connection to us now; it dials in again by itself".to_owned(),
        })?
    }

    /// A new connection, or one that another has made in the meantime.
    async fn make(&self, fresh: bool) -> Result<(Channel, bool), BoxError> {
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(channel) = self.ready(fresh) {
            return Ok((channel, true));
        }
        let channel = self.connect().await?;
        self.current.store(Some(Arc::new(channel.clone())));
        Ok((channel, false))
    }

    fn ready(&self, fresh: bool) -> Option<Channel> {
        let current = self.current.load();
        let channel = current.as_ref().filter(|channel| !fresh && !channel.is_closed())?;
        Some(Channel::clone(channel))
    }

    async fn connect(&self) -> Result<Channel, BoxError> {
        Ok(self.meet().await?.0)
    }

    /// A connection to an agent that has proved itself, and knows us; one that dialled in has done so before.
    async fn meet(&self) -> Result<(Channel, Option<Known>), BoxError> {
        let (host, port) = match &self.reach.to {
            To::Take(lobby) => return Ok((lobby.take().await, None)),
            To::Dial(Endpoint::Tcp { host, port }) => (host, port),
            To::Dial(Endpoint::Unix(_) | Endpoint::Tls { .. }) => return Err("an agent is at HOST:PORT".into()),
        };
        let stream = dial::connect((host.as_str(), *port)).await?;
        let address = stream.peer_addr()?;
        let stream = match &self.trust.tls {
            None if self.trust.insists => {
                return Err("it is to be reached over TLS: `ca` of [tls] waits for a restart".into());
            }
            None => Either::Left(stream),
            Some(tls) => Either::Right(tls.connect(host, stream).await?),
        };
        let is_certified = matches!(stream, Either::Right(_));
        let (channel, _) = shake(stream, PROBE).await?;
        let dialled = Dialled { purpose: Purpose::Call, address, bound: self.reach.bound, is_certified };
        let known = introduce(&channel, dialled, self.trust.tokens.as_ref()).await?;
        Ok((channel, Some(known)))
    }
}

/// A connection to an agent that has proved itself, and is about to be one of the servers: another would take three times as
/// long as it takes to go there and back.
pub(crate) struct Ready(Channel);

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ready")
    }
}

/// Has an agent that nobody has named prove itself, before it is one of the servers. Returns the id of its process, and the
/// connection.
pub(crate) async fn prove(endpoint: Endpoint, limit: Duration, trust: &Trust) -> Result<(String, Ready), BoxError> {
    let line = Line::new(Reach { to: To::Dial(endpoint), timeout: limit, bound: true }, trust.clone());
    let met = tokio::time::timeout(limit, line.meet()).await;
    let (channel, known) = met.map_err(|_| format!("no answer after {} ms", limit.as_millis()))??;
    Ok((known.map(|known| known.instance).unwrap_or_default(), Ready(channel)))
}

/// Proves ourselves on a new connection to an agent that has proved itself.
pub(super) async fn introduce(channel: &Channel, dialled: Dialled, tokens: Option<&Tokens>) -> Result<Known, BoxError> {
    let client = MembershipClient::with_origin(channel.clone(), Uri::from_static(ORIGIN));
    proof::introduce(client, dialled, tokens).await
}

/// Begins HTTP/2 as its client. Also returns what ends with the connection.
pub(super) async fn shake<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    probe: Duration,
) -> Result<(Channel, JoinHandle<()>), BoxError> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(64 << 10)
        .keep_alive_interval(probe)
        .keep_alive_timeout(probe)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await?;
    // Ends with the last handle to the connection.
    let (tell, ended) = watch::channel(None);
    let ends = tokio::spawn(async move {
        if let Err(error) = connection.await {
            let why = tls::told(error.to_string(), std::error::Error::source(&error));
            tracing::debug!(error = why, "connection to an agent ended");
            tell.send_replace(Some(why.into()));
        }
    });
    Ok((Channel { sender, ended }, ends))
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Line").field("reach", &self.reach).finish_non_exhaustive()
    }
}

/// A connection as tonic's client takes it: without the queue and the task that its own channel would add.
#[derive(Clone)]
pub(super) struct Channel {
    sender: http2::SendRequest<tonic::body::Body>,
    /// Why it has ended, when it has.
    ended: watch::Receiver<Option<Arc<str>>>,
}

impl Channel {
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// A call for which there was no connection any more.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
struct Lost {
    why: Arc<str>,
    source: hyper::Error,
}

/// What a call has failed of: one that waited for a connection knows only that it was closed.
async fn lost(error: hyper::Error, mut ended: watch::Receiver<Option<Arc<str>>>) -> BoxError {
    if !(error.is_canceled() || error.is_closed()) {
        return error.into();
    }
    let told = tokio::time::timeout(LAST_WORDS, ended.wait_for(Option::is_some)).await;
    let why = told.ok().and_then(|told| told.ok()?.clone());
    match why {
        Some(why) => Lost { why, source: error }.into(),
        None => error.into(),
    }
}

impl tower::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        // It takes as many as come, and says when one is sent that it has ended.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let (sending, ended) = (self.sender.send_request(request), self.ended.clone());
        Box::pin(async move {
            match sending.await {
                Ok(answer) => Ok(answer),
                Err(error) => Err(lost(error, ended).await),
            }
        })
    }
}
