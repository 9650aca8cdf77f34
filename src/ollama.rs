//! How to talk to an Ollama over HTTP, on TCP or a Unix socket: relay a call, cancel it, ask for its state.
//!
//! Both the agent and the proxy's bare servers use this, so a call looks the same to an Ollama whichever way it came. Bytes
//! are relayed as they are; the only thing done to a body is to give each line or event a chunk of its own.

mod connection;
mod counters;
mod exchange;
mod host;
mod lines;
mod state;

use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Uri};
use olol_middleware::{Error, Payload, Phase, Reply, ServerId};

pub use connection::{Endpoint, EndpointError};
pub use state::StateError;

use connection::Links;
use exchange::Outgoing;

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
            infers: self.infers,
        })
    }
}

/// One Ollama.
#[derive(Clone, Debug)]
pub struct Ollama {
    id: ServerId,
    links: Arc<Links>,
    host: HeaderValue,
}

impl Ollama {
    /// An Ollama at an address. Connects when it is first asked.
    pub fn new(id: ServerId, endpoint: Endpoint, connect_timeout: Duration) -> Self {
        let host = endpoint.host_header();
        Self { id, links: Arc::new(Links::new(endpoint, connect_timeout)), host }
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        self.links.endpoint()
    }

    /// Sends a call and returns when the head of the answer is there. Dropping the future, or the reply's body, closes the
    /// connection, and with it ends the work at the server.
    pub async fn send(&self, ask: Ask) -> Result<Reply, Error> {
        // What can be sent only once is not risked on a connection that may have died.
        let fresh = ask.fresh || matches!(ask.payload, Payload::Stream { .. });
        let mut link = match self.links.get(fresh).await {
            Ok(link) => link,
            Err(error) => return Err(self.failed(Phase::Connecting, false, error)),
        };
        let infers = ask.infers;
        let reused = link.is_reused();
        match link.ask(self.request(ask)).await {
            Ok(response) => Ok(exchange::reply(self.id.clone(), link, self.links.clone(), response, infers)),
            Err(error) if error.is_user() => Err(Error::Body(error.into())),
            Err(error) => Err(self.failed(Phase::Waiting, reused, error)),
        }
    }

    /// Closes pooled connections that have died or were not used for long.
    pub fn sweep(&self) {
        self.links.sweep();
    }

    fn request(&self, ask: Ask) -> Request<Outgoing> {
        let mut headers = ask.headers;
        strip_hop_by_hop(&mut headers);
        headers.remove(header::EXPECT);
        headers.remove(header::ORIGIN);
        headers.insert(header::HOST, self.host.clone());
        // hyper states the length itself, except where a client said one of a body that is still coming.
        headers.remove(header::CONTENT_LENGTH);
        if let Payload::Stream { length: Some(length), .. } = &ask.payload {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(*length));
        }
        let states_length = matches!(ask.method, Method::POST | Method::PUT | Method::PATCH);
        if states_length && ask.payload.length() == Some(0) {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        let mut request = Request::new(Outgoing::from(ask.payload));
        *request.method_mut() = ask.method;
        *request.uri_mut() = ask.path;
        *request.headers_mut() = headers;
        request
    }

    fn failed(&self, phase: Phase, reused: bool, source: impl Into<olol_middleware::BoxError>) -> Error {
        Error::Server { server: self.id.clone(), phase, reused, source: source.into() }
    }
}

/// Removes what belongs to one connection only, and what `Connection` names besides.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if let Some(named) = headers.get(header::CONNECTION).and_then(|value| value.to_str().ok()) {
        let named: Vec<HeaderName> = named.split(',').filter_map(|name| name.trim().parse().ok()).collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}
