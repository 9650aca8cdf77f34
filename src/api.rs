//! The face towards clients: one Ollama, byte for byte, and a few routes of our own.
//!
//! A request meets, in this order and as in Ollama: the cleaning of its path, the router's redirect, CORS, the check of its
//! host, and then its route. What is left becomes a [`Call`] and goes down the stack; the [`Reply`] that comes back is
//! written as it is.

mod body;
mod counted;
mod error;
mod explain;
mod forwarded;
mod gate;
mod own;
mod path;
mod request;
mod response;
mod sessions;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use olol_middleware::call::Answer;
use olol_middleware::{Call, Error, Head, Payload, Reply, RequestId, Route, Scope, Shared, Stack};

pub use body::{HttpBody, Room};
pub use counted::{Holds, counted};
#[cfg(feature = "engine")]
pub(crate) use error::body as error_body;
pub use forwarded::{Network, Trusted};
pub use gate::{Gate, Origins};
pub use own::Own;

use body::{Arrived, Taken};
use gate::Pass;
use request::Facts;

use crate::ollama::{Ask, HOP};
use crate::sessions::Sessions;

/// The routes of gRPC begin with this.
const GRPC: &str = "/olol.v1.";

/// An answer on its way to a client.
pub type Answering = BoxFuture<'static, Result<Response<HttpBody>, Infallible>>;

/// Everything that answers requests.
pub struct Api {
    stack: Arc<ArcSwap<Stack>>,
    shared: Shared,
    gate: Gate,
    trusted: Trusted,
    room: Arc<Room>,
    own: Own,
    hop: HeaderValue,
    sessions: Sessions,
}

impl Api {
    /// An API in front of a stack that may be exchanged. `hop` is how this proxy marks its requests.
    #[expect(clippy::too_many_arguments, reason = "it is made in one place, of what the proxy is made of")]
    pub fn new(
        stack: Arc<ArcSwap<Stack>>,
        shared: Shared,
        gate: Gate,
        trusted: Trusted,
        room: Arc<Room>,
        own: Own,
        hop: HeaderValue,
        sessions: Sessions,
    ) -> Self {
        Self { stack, shared, gate, trusted, room, own, hop, sessions }
    }

    /// Whether a request is for gRPC.
    pub fn is_grpc<B>(request: &Request<B>) -> bool {
        request.version() == Version::HTTP_2 && request.uri().path().starts_with(GRPC)
    }

    /// Whether Ollama answers a request even to a client that has shut down its sending side: all but what works for long.
    pub fn is_brief<B>(request: &Request<B>) -> bool {
        let takes_long =
            |route: Route| route.infers() || matches!(route, Route::Pull | Route::Push | Route::Create | Route::Blob);
        !Route::find(request.uri().path()).is_some_and(takes_long)
    }

    /// Answers one request.
    pub fn handle(self: Arc<Self>, request: Request<Incoming>, client: Option<SocketAddr>) -> Answering {
        let manner = Manner::of(&request);
        match self.find(&request) {
            Ok((Some(Route::Root), _, pass)) => {
                let answer = pass.marked(response::text(StatusCode::OK, "Ollama is running"));
                Box::pin(async move { Ok(manner.applied(answer).await) })
            }
            Ok((Some(route), subject, pass)) => {
                let (parts, incoming) = request.into_parts();
                let client = client.map(|peer| self.client(peer, &parts.headers));
                let head = Arc::new(request::head(route, subject, parts, client));
                Box::pin(self.relay(head, incoming, pass, manner))
            }
            Ok((None, _, pass)) => Box::pin(async move {
                let answer = match request.uri().path() {
                    explain::PATH => self.explain(request, client).await,
                    path if sessions::named(path).is_some() => self.sessions_page(request, client).await,
                    _ => self.own.answer(request).await,
                };
                Ok(manner.applied(pass.marked(answer)).await)
            }),
            Err(answer) => Box::pin(async move { Ok(manner.applied(self.refuse(request, *answer).await).await) }),
        }
    }

    /// Refuses a request; what it still sends is read, as far as Go's server would, so that its connection can be kept.
    async fn refuse(&self, request: Request<Incoming>, mut answer: Response<HttpBody>) -> Response<HttpBody> {
        if !answer.headers().contains_key(header::CONNECTION) && !body::drain(request, &self.room).await {
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }

    /// The route of a request (none: one of our own), what its path names, and what its answer must carry; or the answer
    /// to what reaches no route.
    fn find(&self, request: &Request<Incoming>) -> Result<Found, Box<Response<HttpBody>>> {
        let facts = Facts::of(request.headers());
        if let Some(refusal) = facts.refusal(request) {
            return Err(Box::new(refusal));
        }
        let uri = request.uri();
        let path = path::read(request.method(), uri)?;
        let own = Own::takes(&path, uri.query());
        let route = Route::find(&path);
        if !own && let Some(redirect) = path::trailing_slash(request.method(), &path, uri) {
            return Err(Box::new(redirect));
        }
        let allow = route.filter(|route| !route.takes(request.method())).map(Route::allow);
        let pass = self.gate.check(request.method(), &facts, uri, allow)?;
        match (route, allow) {
            _ if own => Ok((None, None, pass)),
            (Some(_), Some(allow)) => Err(Box::new(pass.marked(response::not_allowed(allow)))),
            (Some(route), None) if facts.hop == Some(&self.hop) => {
                Err(Box::new(pass.marked(response::refused(route, &Error::Loop))))
            }
            (Some(route), None) => Ok((Some(route), request::subject(route, &path), pass)),
            (None, _) => Err(Box::new(pass.marked(response::plain(StatusCode::NOT_FOUND, "404 page not found")))),
        }
    }

    /// Sends a request down the stack. Its body is looked at when the future is first polled: hyper gives it a moment after
    /// the head, and what has come whole by then needs no more waiting.
    async fn relay(
        self: Arc<Self>,
        mut head: Arc<Head>,
        incoming: Incoming,
        pass: Pass,
        manner: Manner,
    ) -> Result<Response<HttpBody>, Infallible> {
        let whole = match body::arrived(incoming, &head.headers, head.route == Route::Blob, &self.room) {
            Ok(Arrived::Whole(payload, taken)) => Ok((payload, taken)),
            Ok(Arrived::Partly(partly)) => {
                let whole = Box::pin(partly.rest(&head.headers)).await;
                head.progress.is_read(head.arrived.elapsed());
                whole
            }
            Err(error) => Err(error),
        };
        let mut answer = match whole {
            Ok((mut payload, mut taken)) => {
                request::put_together(&mut head, &mut payload);
                request::look(&mut head, &payload);
                let answer = if self.may_be_a_turn(&head) {
                    Box::pin(self.take_turn(&mut head, payload, &mut taken)).await
                } else {
                    self.send(head.clone(), payload).await
                };
                written(answer, &head, taken)
            }
            Err(error) => response::refused(head.route, &error),
        };
        pass.mark(answer.headers_mut());
        Ok(if manner.is_plain() { answer } else { Box::pin(manner.applied(answer)).await })
    }

    fn send(&self, head: Arc<Head>, payload: Payload) -> Answer {
        self.stack.load().send(Call::new(head, payload, self.shared.cluster.snapshot().all()))
    }

    /// The memory for bodies of clients.
    pub fn room(&self) -> &Arc<Room> {
        &self.room
    }

    /// Where a request comes from that a peer has brought.
    pub fn client(&self, peer: SocketAddr, headers: &HeaderMap) -> SocketAddr {
        self.trusted.client(peer, headers)
    }

    /// Sends a call that came as messages down the stack: the same way as one that came as HTTP. Its own headers do not say
    /// where it comes from: whoever wrote the messages wrote them, too.
    pub async fn ask(&self, ask: Ask, client: Option<SocketAddr>) -> Result<Reply, Error> {
        let path = ask.path.path().to_owned();
        let Some(route) = Route::find(&path).filter(|route| route.takes(&ask.method)) else {
            let allow = Route::find(&path).map(Route::allow);
            return Ok(response::router_reply(allow));
        };
        if route.scope() == Scope::Local {
            return Ok(Reply::full(StatusCode::OK, response::text_headers(), "Ollama is running"));
        }
        if ask.headers.get(HOP) == Some(&self.hop) {
            return Err(Error::Loop);
        }
        let mut request = Request::new(());
        *request.method_mut() = ask.method;
        *request.uri_mut() = ask.path;
        *request.headers_mut() = ask.headers;
        let subject = request::subject(route, &path);
        let head = request::head(route, subject, request.into_parts().0, client);
        let mut head = Arc::new(Head { is_grpc: true, ..head });
        request::look(&mut head, &ask.payload);
        self.send(head, ask.payload).await
    }
}

/// The route of a request, what its path names, and what its answer must carry.
type Found = (Option<Route>, Option<String>, Pass);

/// Writes the answer of the stack. A stream keeps what its request takes of the room: its body is needed to go on elsewhere.
fn written(answer: Result<Reply, Error>, head: &Head, taken: Taken) -> Response<HttpBody> {
    let is_cut = taken.is_cut();
    let mut answer = match answer {
        Ok(reply) => response::written(reply.hold(taken), response::breaks_with_a_line(head.route)),
        Err(error) => {
            let mut answer = response::refused(head.route, &error);
            answer.headers_mut().insert(RequestId::HEADER, head.id.header());
            answer
        }
    };
    // As Go does it: who is answered early is not read to the end.
    if is_cut {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// What the version and the method of a request ask of the form of its answer.
#[derive(Clone, Copy)]
struct Manner {
    version: Version,
    is_head: bool,
}

impl Manner {
    fn of<B>(request: &Request<B>) -> Self {
        Self { version: request.version(), is_head: request.method() == Method::HEAD }
    }

    fn is_plain(self) -> bool {
        self.version == Version::HTTP_11 && !self.is_head
    }

    async fn applied(self, mut answer: Response<HttpBody>) -> Response<HttpBody> {
        if self.is_head {
            response::without_body(&mut answer).await;
        }
        match self.version {
            Version::HTTP_2 => crate::ollama::strip_hop_by_hop(answer.headers_mut()),
            Version::HTTP_10 if ends_with_the_connection(&answer) => *answer.version_mut() = Version::HTTP_10,
            _ => {}
        }
        answer
    }
}

/// Whether an answer of HTTP/1.0 ends with its connection: a body without a length does, since nothing else would tell the
/// client. An answer of that version without a word on it is one after which hyper closes.
fn ends_with_the_connection(answer: &Response<HttpBody>) -> bool {
    let headers = answer.headers();
    let has_length = headers.contains_key(header::CONTENT_LENGTH) || answer.body().size_hint().exact().is_some();
    !has_length || headers.get(header::CONNECTION).is_some_and(|value| value == "close")
}
