//! The gRPC face of an agent and of the proxy: `olol.v1.Server`.
//!
//! Both faces are one: whatever comes in becomes an [`Ask`], and where it goes is the only difference: to the Ollama beside
//! an agent, or down the proxy's stack.

mod active;
mod known;
mod sessions;
mod turns;
mod typed;
mod watching;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, StreamExt};
use olol_middleware::call::{Body, Pieces};
use olol_middleware::keys::Keys;
use olol_middleware::{Chunk, Cluster, Error, Payload, Reply, Route, keys};
use olol_proto::v1::server_server::{Server, ServerServer};
use olol_proto::v1::{
    ChatMessageRequest, ChatRequest, ChatResponse, CopyModelRequest, CopyModelResponse, CreateSessionRequest,
    DescribeRequest, DescribeResponse, EmbedRequest, EmbedResponse, EndSessionRequest, EndSessionResponse,
    GenerateRequest, GenerateResponse, GetSessionRequest, ListModelsRequest, ListModelsResponse, PullModelRequest,
    PullModelResponse, ReadBlobRequest, ReadBlobResponse, ReadModelRequest, ReadModelResponse, RelayCounters,
    RelayHead, RelayRequest, RelayResponse, RelayResponseHead, ServerState, Session, ShowModelRequest,
    ShowModelResponse, TellTurnsRequest, TellTurnsResponse, WatchRequest,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::models::local::Local;
use crate::ollama::{Ask, HOP};
use crate::pool::{LARGEST_MESSAGE, PHASE, from_wire, to_wire};
use crate::sessions::Sessions;

use known::Known;

pub use active::Active;
pub use turns::{told, wire};
pub use watching::{Callers, Calling, Told};

/// The longest body that is held while a call runs, bytes; a longer one passes through, and is sent once.
const LARGEST_HELD: u64 = 64 << 10;

/// Turns of one message that are believed.
const TURNS: usize = 256;

/// Where calls go.
pub type Send = Arc<dyn Fn(Ask) -> BoxFuture<'static, Result<Reply, Error>> + std::marker::Send + Sync>;

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + std::marker::Send>>;

/// What an agent tells of itself. The proxy has no such face: its state is at `/api/status`.
#[derive(Clone, Debug)]
pub struct SelfDescription {
    /// What does not change.
    pub description: DescribeResponse,
    /// What does; `None` until the engine was asked for the first time.
    pub state: watch::Receiver<Option<Arc<Told>>>,
    /// Who has calls here, and who watches.
    pub callers: Arc<Callers>,
    /// The sessions that had a turn here lately.
    pub active: Arc<Active>,
    /// When nobody should go on watching: the agent stops.
    pub stop: CancellationToken,
    /// Its models, for others of the cluster; `None`: nobody can copy any.
    pub models: Option<Local>,
}

/// The service.
#[derive(Clone)]
pub struct Face {
    send: Send,
    about: Option<SelfDescription>,
    sessions: Sessions,
    /// The keys that sessions are told apart by; an agent has none.
    keys: Option<Arc<Keys>>,
    known: Known,
}

/// A face that sends calls there, ready to be served. `proxy` is what a proxy tells sessions apart by, and its servers; an
/// agent has `about`.
pub fn service(
    send: Send,
    about: Option<SelfDescription>,
    sessions: Sessions,
    proxy: Option<(Arc<Keys>, Arc<Cluster>)>,
) -> ServerServer<Face> {
    let (keys, known) = match proxy {
        Some((keys, cluster)) => (Some(keys), Known::Cluster(cluster)),
        None => (None, Known::Itself),
    };
    ServerServer::new(Face { send, about, sessions, keys, known }).max_decoding_message_size(LARGEST_MESSAGE)
}

#[tonic::async_trait]
impl Server for Face {
    type RelayStream = Answers<RelayResponse>;
    type WatchStream = Answers<ServerState>;
    type GenerateStream = Answers<GenerateResponse>;
    type ChatStream = Answers<ChatResponse>;
    type PullModelStream = Answers<PullModelResponse>;
    type ChatMessageStream = Answers<ChatResponse>;
    type ReadBlobStream = Answers<ReadBlobResponse>;
    type CopyModelStream = Answers<CopyModelResponse>;

    async fn relay(&self, request: Request<Streaming<RelayRequest>>) -> Result<Response<Self::RelayStream>, Status> {
        let (metadata, _, mut messages) = request.into_parts();
        let first = messages.message().await?.ok_or_else(|| Status::invalid_argument("the call has no message"))?;
        let mut head = first.head.ok_or_else(|| Status::invalid_argument("the first message has no head"))?;
        let turn =
            self.about.as_ref().zip(head.turn.take()).map(|(about, turn)| (about.callers.clone(), caller(&head), turn));
        let deadline = Duration::from_millis(head.deadline_ms);
        self.saw(&head.session);
        let length = length(&head);
        let is_upload = Route::find(&head.path) == Some(Route::Blob);
        let payload = match length {
            _ if first.last => whole(first.body),
            Some(length) if length <= LARGEST_HELD && !is_upload => held(first.body, messages).await?,
            _ => streamed(first.body, messages, length),
        };
        let sending = (self.send)(self.showing(&metadata, ask(head, payload)?));
        let reply = if deadline.is_zero() {
            sending.await
        } else {
            tokio::time::timeout(deadline, sending)
                .await
                .map_err(|_| Status::deadline_exceeded("the caller stopped waiting"))?
        };
        let Reply { status, headers, mut body } = reply.map_err(|error| failure(&error))?;
        if let Some((callers, caller, turn)) = turn.filter(|_| status.is_success()) {
            callers.turns().answered(&caller, turn);
        }
        // What came with the head goes with the head.
        let first = body.next().now_or_never().flatten();
        let (first, broken) = match first {
            Some(Ok(chunk)) => (chunk, None),
            Some(Err(error)) => (Chunk::from(Bytes::new()), Some(failure(&error))),
            None => (Chunk::from(Bytes::new()), None),
        };
        let head = RelayResponseHead { status: u32::from(status.as_u16()), headers: to_wire(&headers) };
        let first = RelayResponse { head: Some(head), ..piece(first) };
        let rest = Relayed { body, over: broken.is_some() };
        let head = futures_util::stream::iter(std::iter::once(Ok(first)).chain(broken.map(Err)));
        Ok(Response::new(Box::pin(head.chain(rest))))
    }

    async fn describe(&self, _request: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let about = self.about()?;
        let mut description = about.description.clone();
        if let Some(told) = about.state.borrow().as_deref() {
            let ServerState { ollama_version, memory_total_bytes, gpus, .. } = told.state.clone();
            description = DescribeResponse { ollama_version, memory_total_bytes, gpus, ..description };
        }
        Ok(Response::new(description))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let about = self.about()?;
        let stop = about.stop.clone();
        let states = watching::states(about.state.clone(), &about.callers, request.get_ref())?;
        // A watch never ends by itself, and a graceful stop waits for everything that runs.
        Ok(Response::new(Box::pin(states.take_until(stop.cancelled_owned()))))
    }

    async fn tell_turns(&self, request: Request<TellTurnsRequest>) -> Result<Response<TellTurnsResponse>, Status> {
        let TellTurnsRequest { caller, turns } = request.into_inner();
        let known = self.about()?.callers.turns();
        turns.into_iter().take(TURNS).for_each(|turn| known.answered(caller.as_bytes(), turn));
        Ok(Response::new(TellTurnsResponse {}))
    }

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let ask = self.showing(&metadata, typed::generate(request)?);
        Ok(Response::new(typed::lines(self.good(ask).await?, typed::generated)))
    }

    async fn chat(&self, request: Request<ChatRequest>) -> Result<Response<Self::ChatStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let ask = self.showing(&metadata, typed::chat(request)?);
        Ok(Response::new(typed::lines(self.good(ask).await?, typed::chatted)))
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let ask = self.showing(&metadata, typed::embed(request)?);
        Ok(Response::new(typed::embedded(&typed::object(self.good(ask).await?).await?)))
    }

    async fn list_models(&self, request: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let list = |path| self.good(self.showing(request.metadata(), Ask::get(path)));
        let (tags, ps) = tokio::try_join!(list("/api/tags"), list("/api/ps"))?;
        let (tags, ps) = tokio::try_join!(typed::object(tags), typed::object(ps))?;
        let mut listed = typed::listed(&tags, &ps);
        self.complete(&mut listed.models, &mut listed.loaded);
        Ok(Response::new(listed))
    }

    async fn show_model(&self, request: Request<ShowModelRequest>) -> Result<Response<ShowModelResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let shown = typed::object(self.good(self.showing(&metadata, typed::show(&request))).await?).await?;
        let mut shown = typed::shown(&request.model, &shown);
        if let Some(details) = &mut shown.details {
            self.complete_one(details);
        }
        Ok(Response::new(shown))
    }

    async fn pull_model(&self, request: Request<PullModelRequest>) -> Result<Response<Self::PullModelStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let ask = self.showing(&metadata, typed::pull(&request));
        Ok(Response::new(typed::lines(self.good(ask).await?, typed::pulled)))
    }

    async fn create_session(&self, request: Request<CreateSessionRequest>) -> Result<Response<Session>, Status> {
        let (metadata, _, request) = request.into_parts();
        self.created(&metadata, request).await.map(Response::new)
    }

    async fn chat_message(
        &self,
        request: Request<ChatMessageRequest>,
    ) -> Result<Response<Self::ChatMessageStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let id = request.session_id.clone();
        let reply = self.turn(&metadata, request).await?;
        self.saw(&id);
        Ok(Response::new(typed::lines(reply, typed::chatted)))
    }

    async fn end_session(&self, request: Request<EndSessionRequest>) -> Result<Response<EndSessionResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        self.ended(&metadata, &request.session_id).await.map(Response::new)
    }

    async fn get_session(&self, request: Request<GetSessionRequest>) -> Result<Response<Session>, Status> {
        let (metadata, _, request) = request.into_parts();
        self.exported(&metadata, request).await.map(Response::new)
    }

    async fn read_model(&self, request: Request<ReadModelRequest>) -> Result<Response<ReadModelResponse>, Status> {
        self.models()?.manifest(request.into_inner()).await.map(Response::new)
    }

    async fn read_blob(&self, request: Request<ReadBlobRequest>) -> Result<Response<Self::ReadBlobStream>, Status> {
        let blob = self.models()?.blob(request.into_inner()).await?;
        Ok(Response::new(blob))
    }

    async fn copy_model(
        &self,
        request: Request<Streaming<CopyModelRequest>>,
    ) -> Result<Response<Self::CopyModelStream>, Status> {
        let (about, models) = (self.about()?, self.models()?);
        let mut messages = request.into_inner();
        let first = messages.message().await?;
        let order = first.and_then(|first| first.order);
        let order = order.ok_or_else(|| Status::invalid_argument("the first message has no order"))?;
        let stop = about.stop.clone();
        // A graceful stop does not wait for gigabytes: what has come is kept.
        Ok(Response::new(Box::pin(models.copy(order, messages).take_until(stop.cancelled_owned()))))
    }
}

impl Face {
    fn models(&self) -> Result<&Local, Status> {
        let models = self.about()?.models.as_ref();
        models.ok_or_else(|| Status::unimplemented("this server gives no models away and copies none"))
    }

    fn about(&self) -> Result<&SelfDescription, Status> {
        let reason = "an agent describes itself; the state of the proxy is at GET /api/status";
        self.about.as_ref().ok_or_else(|| Status::unimplemented(reason))
    }

    /// An agent has a turn of a session.
    fn saw(&self, session: &str) {
        if let Some(about) = &self.about {
            about.active.saw(session);
        }
    }

    /// A call with the key that its caller shows. Keys are the proxy's: what an agent is shown is not for the Ollama beside it.
    fn showing(&self, metadata: &MetadataMap, mut ask: Ask) -> Ask {
        if self.about.is_none() {
            for name in &keys::HEADERS {
                for value in metadata.as_ref().get_all(name) {
                    ask.headers.append(name, value.clone());
                }
            }
        }
        ask
    }

    /// Sends a typed call and returns its answer if it is a good one; else the error as a status.
    async fn good(&self, ask: Ask) -> Result<Reply, Status> {
        let reply = (self.send)(ask).await.map_err(|error| failure(&error))?;
        if reply.status.is_success() { Ok(reply) } else { Err(typed::refusal(reply).await) }
    }
}

/// What a head says of the length of its body.
fn length(head: &RelayHead) -> Option<u64> {
    let length = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"))?;
    std::str::from_utf8(&length.value).ok()?.parse().ok()
}

/// Who sends a call, if it says.
fn caller(head: &RelayHead) -> Bytes {
    let hop = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(HOP.as_str()));
    hop.map(|header| header.value.clone()).unwrap_or_default()
}

fn whole(body: Bytes) -> Payload {
    if body.is_empty() { Payload::empty() } else { Payload::from_bytes(body) }
}

/// A short body that came in pieces, as a whole: such a one can be sent again.
async fn held(first: Bytes, mut messages: Streaming<RelayRequest>) -> Result<Payload, Status> {
    let mut pieces = smallvec::smallvec![first];
    let mut bytes = 0;
    loop {
        let message = messages.message().await?.ok_or_else(|| Status::invalid_argument("the body has no end"))?;
        bytes += message.body.len() as u64;
        if bytes > LARGEST_HELD {
            return Err(Status::invalid_argument("the body is longer than its head says"));
        }
        pieces.push(message.body);
        if message.last {
            return Ok(Payload::Whole(pieces));
        }
    }
}

/// A body that is still coming. A stream that ends without its last message is a client that went away.
fn streamed(first: Bytes, messages: Streaming<RelayRequest>, length: Option<u64>) -> Payload {
    let rest = futures_util::stream::unfold((messages, false), |(mut messages, over)| async move {
        if over {
            return None;
        }
        Some(match messages.message().await {
            Ok(Some(message)) => (Ok(message.body), (messages, message.last)),
            Ok(None) => (Err(Error::Body("the body has no end".into())), (messages, true)),
            Err(status) => (Err(Error::Body(status.message().to_owned().into())), (messages, true)),
        })
    });
    let first = futures_util::stream::iter((!first.is_empty()).then_some(Ok(first)));
    let filled = first.chain(rest).filter(|piece| std::future::ready(!matches!(piece, Ok(piece) if piece.is_empty())));
    let pieces: Pieces = Box::pin(filled);
    Payload::Stream { length, pieces }
}

fn ask(head: RelayHead, payload: Payload) -> Result<Ask, Status> {
    // Where a call goes is never its own choice: of a whole address only the path counts.
    let path = head.path.parse::<http::Uri>().ok().and_then(|uri| uri.into_parts().path_and_query);
    let path = path.map(http::Uri::from).filter(|path| path.path().starts_with('/'));
    let path = path.ok_or_else(|| Status::invalid_argument("the path is no path"))?;
    Ok(Ask {
        method: head.method.parse().map_err(|_| Status::invalid_argument("the method is no method"))?,
        infers: Route::find(path.path()).is_some_and(Route::infers),
        path,
        headers: from_wire(head.headers),
        payload,
        fresh: head.fresh,
        connect_limit: None,
    })
}

/// The rest of a relayed answer.
struct Relayed {
    body: Body,
    over: bool,
}

impl Stream for Relayed {
    type Item = Result<RelayResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<Self::Item>> {
        if self.over {
            return std::task::Poll::Ready(None);
        }
        let next = std::task::ready!(self.body.poll_next_unpin(cx));
        self.over = !matches!(next, Some(Ok(_)));
        std::task::Poll::Ready(next.map(|chunk| chunk.map(piece).map_err(|error| failure(&error))))
    }
}

fn piece(chunk: Chunk) -> RelayResponse {
    let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let counters = chunk.end.map(|end| RelayCounters {
        prompt_tokens: end.prompt_tokens,
        output_tokens: end.output_tokens,
        prompt_duration_ns: nanos(end.prompt_duration),
        eval_duration_ns: nanos(end.eval_duration),
        load_duration_ns: nanos(end.load_duration),
    });
    RelayResponse { head: None, body: chunk.bytes, counters }
}

/// An error as a status, with how far the call had come.
fn failure(error: &Error) -> Status {
    let mut status = match error {
        Error::Server { source, .. } => Status::unavailable(source.to_string()),
        Error::NoServer(_) => Status::unavailable(error.to_string()),
        Error::Busy { .. } | Error::RateLimited { .. } => Status::resource_exhausted(error.to_string()),
        Error::Body(_) => Status::invalid_argument(error.to_string()),
        Error::Loop => Status::failed_precondition(error.to_string()),
        Error::Unauthorized(_) => Status::unauthenticated(error.to_string()),
        Error::Forbidden(_) => Status::permission_denied(error.to_string()),
        Error::Timeout { .. } => Status::deadline_exceeded(error.to_string()),
        Error::Unsupported(_) => Status::unimplemented(error.to_string()),
        _ => Status::internal(error.to_string()),
    };
    if let Error::Server { phase, .. } = error {
        status.metadata_mut().insert(PHASE, tonic::metadata::MetadataValue::from_static(phase.as_str()));
    }
    status
}
