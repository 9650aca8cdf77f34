//! From an HTTP request to what the stack takes.

use std::net::SocketAddr;

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Version};
use olol_middleware::{Head, ModelName, Payload, Peek, RequestId, Route};
use tokio::time::Instant;

use super::body::HttpBody;
use super::{header_text, response};

/// Answers what Go's server does not even hand to Ollama.
pub(super) fn refuse<B>(request: &Request<B>) -> Option<Response<HttpBody>> {
    let hosts = request.headers().get_all(header::HOST);
    if request.version() == Version::HTTP_11 && hosts.iter().next().is_none() && request.method() != http::Method::CONNECT {
        return Some(response::bad_request(": missing required Host header"));
    }
    if hosts.iter().count() > 1 {
        return Some(response::bad_request(": too many Host headers"));
    }
    if !hosts.iter().all(is_valid_host) {
        return Some(response::bad_request(": malformed Host header"));
    }
    if let Some(expect) = header_text(request.headers(), &header::EXPECT)
        && !expect.eq_ignore_ascii_case("100-continue")
    {
        return Some(response::closing(StatusCode::EXPECTATION_FAILED));
    }
    None
}

/// The characters of Go's `httpguts.ValidHostHeader`.
fn is_valid_host(host: &HeaderValue) -> bool {
    host.as_bytes().iter().all(|byte| byte.is_ascii_alphanumeric() || b"!$%&()*+,-.:;=@[]_~'".contains(byte))
}

/// The head of a call, with what can be seen of its body.
pub(super) fn head(route: Route, path: &str, parts: Parts, payload: &Payload, client: Option<SocketAddr>) -> Head {
    let peek = peek(route, path, payload);
    let model = peek.model.as_deref().and_then(ModelName::parse);
    Head {
        id: RequestId::random(),
        route,
        method: parts.method,
        path: parts.uri.into_parts().path_and_query.unwrap_or(PathAndQuery::from_static("/")),
        headers: parts.headers,
        peek,
        model,
        client,
        arrived: Instant::now(),
        deadline: None,
    }
}

fn peek(route: Route, path: &str, payload: &Payload) -> Peek {
    match (route, payload) {
        (Route::V1Model, _) => {
            Peek { model: path.rsplit_once('/').map(|(_, model)| model.to_owned()), ..Peek::default() }
        }
        (Route::V1Audio, Payload::Whole(pieces)) => Peek::multipart(pieces),
        (_, Payload::Whole(pieces)) => Peek::json(pieces),
        (_, Payload::Stream { .. }) => Peek::default(),
    }
}
