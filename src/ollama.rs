//! How to talk to an Ollama over HTTP, on TCP or a Unix socket: relay a call, cancel it, ask for its state.
//!
//! Both the agent and the proxy's bare servers use this, so a call looks the same to an Ollama whichever way it came. Bytes
//! are relayed as they are; the only thing done to a body is to give each line or event a chunk of its own.

mod connection;
mod counters;
mod exchange;
mod few;
mod host;
mod lines;
mod state;
mod weights;

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryFutureExt;
use futures_util::future::Either;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, Uri};
use hyper::body::Incoming;
use olol_middleware::{Error, Payload, Phase, Reply, ServerId};

pub use connection::{Endpoint, EndpointError};
pub(crate) use lines::lines_of;
pub use state::StateError;
pub(crate) use state::{
    Heard, IN_MEMORY, MOST_CAPABILITIES, MOST_MODELS, MOST_SIZE, ON_DISK, every_on_disk, in_memory, on_disk,
};
pub(crate) use weights::{Lore, parameters};

use crate::pool::credentials::Shown;
use crate::security::tls::{Connector, TlsError};
use connection::{Link, Links};
use exchange::Outgoing;
use weights::Weights;

/// Marks a request that has passed through a proxy, with the proxy's instance id.
pub const HOP: HeaderName = HeaderName::from_static("x-olol-hop");

/// Headers that belong to one connection and never travel on.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    HeaderName::from_static("keep-alive"),
];

/// A call as an Ollama gets it.
#[derive(Debug)]
pub struct Ask {
    /// HTTP method.
    pub method: Method,
    /// Path and query.
    pub path: Uri,
    /// End-to-end headers.
    pub headers: HeaderMap,
    /// Body.
    pub payload: Payload,
    /// Whether to keep away from pooled connections.
    pub fresh: bool,
    /// How long a new connection may take, if not as long as usual.
    pub connect_limit: Option<Duration>,
    /// Whether the answer may tell counts of tokens.
    pub infers: bool,
}

impl Ask {
    /// A plain GET.
    pub fn get(path: &'static str) -> Self {
        Self {
            method: Method::GET,
            path: Uri::from_static(path),
            headers: HeaderMap::new(),
            payload: Payload::empty(),
            fresh: false,
            connect_limit: None,
            infers: false,
        }
    }

    /// A POST of JSON.
    pub fn post(path: &'static str, json: impl Into<bytes::Bytes>) -> Self {
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        Self { method: Method::POST, headers, payload: Payload::from_bytes(json), infers: true, ..Self::get(path) }
    }

    /// The same call once more, without copying its body; `None` if that is a stream.
    pub fn again(&self) -> Option<Self> {
        Some(Self {
            method: self.method.clone(),
            path: self.path.clone(),
            headers: self.headers.clone(),
            payload: self.payload.again()?,
            fresh: self.fresh,
            connect_limit: self.connect_limit,
            infers: self.infers,
        })
    }
}

/// One Ollama.
#[derive(Clone, Debug)]
pub struct Ollama(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: ServerId,
    links: Links,
    host: HeaderValue,
    /// What it is shown where a call shows it nothing.
    shown: Option<Shown>,
    weights: Arc<Weights>,
}

/// How an Ollama is met that is not on this machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Means {
    /// Whom to trust, where it is reached over TLS.
    pub(crate) tls: Option<Connector>,
    /// What it is shown by calls that show nothing themselves.
    pub(crate) shown: Option<Shown>,
}

impl Ollama {
    /// An Ollama at an address. Connects when it is first asked.
    pub fn new(id: ServerId, endpoint: Endpoint, connect_timeout: Duration) -> Self {
        Self::with(id, endpoint, Means::default(), connect_timeout, Lore::default())
    }

    /// The same, where `https://` may stand before its address: then it must have a certificate of a CA that the system trusts.
    pub fn maybe_over_tls(id: ServerId, endpoint: Endpoint, connect_timeout: Duration) -> Result<Self, TlsError> {
        let tls = if endpoint.is_tls() { Some(Connector::of_system()?) } else { None };
        Ok(Self::reached_by(id, endpoint, tls, connect_timeout))
    }

    /// The same, reached over TLS in this way, or without it.
    pub fn reached_by(id: ServerId, endpoint: Endpoint, tls: Option<Connector>, connect_timeout: Duration) -> Self {
        Self::with(id, endpoint, Means { tls, shown: None }, connect_timeout, Lore::default())
    }

    /// One of several, which share what they have learnt about models.
    pub(crate) fn with(id: ServerId, endpoint: Endpoint, means: Means, connect_timeout: Duration, lore: Lore) -> Self {
        let host = endpoint.host_header();
        let weights = Arc::new(Weights::new(lore));
        let Means { tls, shown } = means;
        Self(Arc::new(Inner { id, links: Links::new(endpoint, tls, connect_timeout), host, shown, weights }))
    }

    /// Whether it is shown credentials whoever asks.
    pub(crate) fn has_credentials(&self) -> bool {
        self.0.shown.is_some()
    }

    /// The same Ollama over a connection of its own that takes little room: for who asks for its state now and then, and
    /// keeps the connection.
    pub(crate) fn aside(&self) -> Self {
        let Inner { id, links, host, shown, weights } = &*self.0;
        let (id, host, shown, weights) = (id.clone(), host.clone(), shown.clone(), weights.clone());
        Self(Arc::new(Inner { id, links: links.small(), host, shown, weights }))
    }

    /// Its name.
    pub fn id(&self) -> &ServerId {
        &self.0.id
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        self.0.links.endpoint()
    }

    /// Sends a call and returns when the head of the answer is there. Dropping the future, or the reply's body, closes the
    /// connection, and with it ends the work at the server.
    pub fn send(&self, ask: Ask) -> impl Future<Output = Result<Reply, Error>> + Send + use<> {
        // What can be sent only once is not risked on a connection that may have died.
        let fresh = ask.fresh || matches!(ask.payload, Payload::Stream { .. });
        let (infers, limit) = (ask.infers, ask.connect_limit);
        let request = self.request(ask);
        let ollama = self.clone();
        let asking = match if fresh { None } else { self.0.links.pooled() } {
            Some(link) => {
                let ollama = self.clone();
                Either::Left(link.ask(request).map_err(move |error| ollama.lost(true, error)))
            }
            // Boxed: seldom, and larger than all the rest.
            None => Either::Right(Box::pin(self.clone().ask_anew(request, limit))),
        };
        asking.map_ok(move |(link, response)| exchange::reply(ollama, link, response, infers))
    }

    /// Sends a request over a new connection.
    async fn ask_anew(
        self,
        request: Request<Outgoing>,
        limit: Option<Duration>,
    ) -> Result<(Box<Link>, Response<Incoming>), Error> {
        let link = self.0.links.connect(limit).await.map_err(|error| self.failed(Phase::Connecting, false, error))?;
        link.ask(request).await.map_err(|error| self.lost(false, error))
    }

    /// Closes pooled connections that have died or were not used for long.
    pub fn sweep(&self) {
        self.0.links.sweep();
    }

    fn request(&self, ask: Ask) -> Request<Outgoing> {
        let Ask { method, path, mut headers, payload, .. } = ask;
        // Looked at in one pass, and touched where there is something to touch: a map costs by the search.
        let (mut is_marked, mut has_length) = (false, false);
        for name in headers.keys() {
            is_marked |= HOP_BY_HOP.contains(name) || name == header::EXPECT || name == header::ORIGIN;
            has_length |= name == header::CONTENT_LENGTH;
        }
        if is_marked {
            strip_hop_by_hop(&mut headers);
            headers.remove(header::EXPECT);
            headers.remove(header::ORIGIN);
        }
        headers.insert(header::HOST, self.0.host.clone());
        if let Some(shown) = &self.0.shown
            && !headers.contains_key(header::AUTHORIZATION)
        {
            headers.insert(header::AUTHORIZATION, shown.header());
        }
        let length = payload.length();
        let said = |headers: &HeaderMap| headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse::<u64>().ok();
        if has_length && (length.is_none() || said(&headers) != length) {
            headers.remove(header::CONTENT_LENGTH);
            has_length = false;
        }
        // hyper states the length itself, except of a body that is still coming, and of none.
        let must_state = match &payload {
            Payload::Stream { length, .. } => length.is_some(),
            Payload::Whole(_) => length == Some(0) && matches!(method, Method::POST | Method::PUT | Method::PATCH),
        };
        if let (true, false, Some(length)) = (must_state, has_length, length) {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        let mut request = Request::new(Outgoing::from(payload));
        *request.method_mut() = method;
        *request.uri_mut() = path;
        *request.headers_mut() = headers;
        request
    }

    /// A connection failed before there was an answer; or the client's body did.
    fn lost(&self, reused: bool, error: hyper::Error) -> Error {
        if error.is_user() { Error::Body(error.into()) } else { self.failed(Phase::Waiting, reused, error) }
    }

    fn failed(&self, phase: Phase, reused: bool, source: impl Into<olol_middleware::BoxError>) -> Error {
        Error::Server { server: self.0.id.clone(), phase, reused, source: source.into() }
    }
}

/// Removes what belongs to one connection only, and what `Connection` names besides.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(|name| HOP_BY_HOP.contains(name)) {
        return;
    }
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_any_line_of_connection_names_stays_here() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("connection", "close, x-a"), ("connection", "X-B ,, "), ("x-a", "1"), ("x-b", "2"), ("x-c", "3")]
        {
            headers.append(name, HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-c"]);
    }
}
