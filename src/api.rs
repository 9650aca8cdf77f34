//! The face towards clients: one Ollama, byte for byte, and a few routes of our own.
//!
//! A request meets, in this order and as in Ollama: the cleaning of its path, the router's redirect, CORS, the check of its
//! host, and then its route. What is left becomes a [`Call`] and goes down the stack; the [`Reply`] that comes back is
//! written as it is.

mod body;
mod error;
mod gate;
mod own;
mod path;
mod request;
mod response;

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;

use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use olol_middleware::{Call, Error, Payload, Reply, Route, Scope, Shared, Stack};
use tower::Service;

pub use body::{HttpBody, Room};
#[cfg(feature = "engine")]
pub(crate) use error::body as error_body;
pub use gate::{Gate, Origins};
pub use own::Own;

use gate::Pass;

use crate::ollama::{Ask, HOP};

/// The routes of gRPC begin with this.
const GRPC: &str = "/olol.v1.";

/// Everything that answers requests.
pub struct Api {
    stack: Stack,
    shared: Shared,
    gate: Gate,
    room: Arc<Room>,
    own: Own,
    hop: HeaderValue,
}

impl Api {
    /// An API in front of a stack. `hop` is how this proxy marks its requests.
    pub fn new(stack: Stack, shared: Shared, gate: Gate, room: Arc<Room>, own: Own, hop: HeaderValue) -> Self {
        Self { stack, shared, gate, room, own, hop }
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
    pub async fn handle(&self, request: Request<Incoming>, client: Option<SocketAddr>) -> Response<HttpBody> {
        let is_close_delimited = request.version() == Version::HTTP_10;
        let is_head = request.method() == Method::HEAD;
        let is_h2 = request.version() == Version::HTTP_2;
        let mut answer = self.answer(request, client).await;
        if is_head {
            response::without_body(&mut answer).await;
        }
        if is_h2 {
            crate::ollama::strip_hop_by_hop(answer.headers_mut());
        }
        // A body without a length ends with the connection there; nothing else would tell the client. An answer of that
        // version without a word on it is one after which hyper closes.
        let has_length =
            answer.headers().contains_key(header::CONTENT_LENGTH) || answer.body().size_hint().exact().is_some();
        if is_close_delimited
            && (!has_length || answer.headers().get(header::CONNECTION).is_some_and(|value| value == "close"))
        {
            *answer.version_mut() = Version::HTTP_10;
        }
        answer
    }

    async fn answer(&self, request: Request<Incoming>, client: Option<SocketAddr>) -> Response<HttpBody> {
        let uri = request.uri().clone();
        let (route, path, pass) = match self.find(&request, &uri) {
            Ok(found) => found,
            Err(mut answer) => {
                if !answer.headers().contains_key(header::CONNECTION) && !body::drain(request, &self.room).await {
                    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                return answer;
            }
        };
        let mut answer = match route {
            None => self.own.answer(request).await,
            Some(Route::Root) => response::text(StatusCode::OK, "Ollama is running"),
            Some(route) => self.relay(route, &path, request, client).await,
        };
        pass.mark(answer.headers_mut());
        answer
    }

    /// The route of a request (none: one of our own), its path, and what its answer must carry; or the answer to what
    /// reaches no route.
    fn find<'a>(
        &self,
        request: &Request<Incoming>,
        uri: &'a Uri,
    ) -> Result<(Option<Route>, Cow<'a, str>, Pass), Response<HttpBody>> {
        if let Some(refusal) = request::refuse(request) {
            return Err(refusal);
        }
        let path = path::read(request.method(), uri)?;
        let own = self.own.takes(&path);
        let route = Route::find(&path);
        if !own && let Some(redirect) = path::trailing_slash(request.method(), &path, uri) {
            return Err(redirect);
        }
        let allow = route.filter(|route| !route.takes(request.method())).map(Route::allow);
        let pass = self.gate.check(request.method(), request.headers(), uri, allow)?;
        let mut refusal = match (route, allow) {
            _ if own => return Ok((None, path, pass)),
            (Some(_), Some(allow)) => response::not_allowed(allow),
            (Some(route), None) => return Ok((Some(route), path, pass)),
            (None, _) => response::plain(StatusCode::NOT_FOUND, "404 page not found"),
        };
        pass.mark(refusal.headers_mut());
        Err(refusal)
    }

    /// Sends a request down the stack.
    async fn relay(
        &self,
        route: Route,
        path: &str,
        request: Request<Incoming>,
        client: Option<SocketAddr>,
    ) -> Response<HttpBody> {
        if request.headers().get(HOP) == Some(&self.hop) {
            return response::refused(route, &Error::Loop);
        }
        let streams = route == Route::Blob;
        let (parts, incoming) = request.into_parts();
        let (payload, taken) = match body::read(incoming, &parts.headers, streams, &self.room).await {
            Ok(read) => read,
            Err(error) => return response::refused(route, &error),
        };
        let call = self.call(route, path, parts, payload, client);
        let id = call.id.clone();
        let wants_lines = response::breaks_with_a_line(route);
        match self.stack.clone().call(call).await {
            Ok(reply) => {
                let mut answer = response::written(reply, wants_lines);
                // As Go does it: who is answered early is not read to the end.
                if taken.is_cut() {
                    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                answer
            }
            Err(error) => {
                let mut answer = response::refused(route, &error);
                if let Ok(id) = HeaderValue::from_str(id.as_str()) {
                    answer.headers_mut().insert("x-olol-request", id);
                }
                answer
            }
        }
    }

    fn call(
        &self,
        route: Route,
        path: &str,
        parts: http::request::Parts,
        payload: Payload,
        client: Option<SocketAddr>,
    ) -> Call {
        let head = request::head(route, path, parts, &payload, client);
        Call::new(head, payload, self.shared.cluster.snapshot().all())
    }

    /// Sends a call that came as messages down the stack: the same way as one that came as HTTP.
    pub async fn ask(&self, ask: Ask) -> Result<Reply, Error> {
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
        let call = self.call(route, &path, request.into_parts().0, ask.payload, None);
        self.stack.clone().call(call).await
    }
}

/// Header values that are text.
pub(crate) fn header_text<'a>(headers: &'a HeaderMap, name: &header::HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}
