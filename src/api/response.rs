//! Answers: a server's, written as they are, and those that Ollama's router or Go's server would give.

use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use olol_middleware::{Error, Reply, Route, ServerId};

use super::body::HttpBody;
use super::error;

/// Whether a stream of the route that breaks off says so in a last line.
pub(super) fn breaks_with_a_line(route: Route) -> bool {
    route.dialect() == olol_middleware::Dialect::Ollama
}

/// A reply as HTTP.
pub(super) fn written(reply: Reply, wants_lines: bool) -> Response<HttpBody> {
    let Reply { status, mut headers, body } = reply;
    let outcome = body.outcome();
    if let Some(server) = outcome.servers.last() {
        headers.insert(ServerId::HEADER, server.header());
    }
    if outcome.attempts > 1 {
        headers.insert("x-olol-attempts", HeaderValue::from(outcome.attempts));
    }
    if !outcome.absent.is_empty() {
        let names: Vec<&str> = outcome.absent.iter().map(ServerId::as_str).collect();
        if let Ok(names) = HeaderValue::from_str(&names.join(",")) {
            headers.insert("x-olol-partial", names);
        }
    }
    let has_lines = wants_lines
        && headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/x-ndjson"));
    let mut answer = Response::new(HttpBody::Chunks(body, has_lines));
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    answer
}

/// An error of ours, in the form of its route.
pub(super) fn refused(route: Route, error: &Error) -> Response<HttpBody> {
    let mut answer = full(error.status(), error::body(route.dialect(), error));
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8"));
    headers.insert("x-olol-reason", HeaderValue::from_static(error.kind()));
    if let Some(server) = error.server() {
        headers.insert(ServerId::HEADER, server.header());
    }
    if let Some(after) = error.retry_after() {
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    if let Error::RateLimited { standing, .. } = error {
        standing.write(headers);
    }
    if matches!(error, Error::Unauthorized(_)) {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if matches!(error, Error::Body(_)) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// A body and nothing else.
pub(super) fn full(status: StatusCode, body: impl Into<bytes::Bytes>) -> Response<HttpBody> {
    let mut answer = Response::new(HttpBody::Full(body.into()));
    *answer.status_mut() = status;
    answer
}

/// What the router says: plain text, without a line feed or a charset.
pub(super) fn plain(status: StatusCode, text: &'static str) -> Response<HttpBody> {
    let mut answer = full(status, text);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    answer
}

/// What the router says to a method that the route does not take.
pub(super) fn not_allowed(allow: &'static str) -> Response<HttpBody> {
    let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed");
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    answer
}

/// What the router says, as a reply.
pub(super) fn router_reply(allow: Option<&'static str>) -> Reply {
    let mut headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"))]);
    match allow {
        None => Reply::full(StatusCode::NOT_FOUND, headers, "404 page not found"),
        Some(allow) => {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
            Reply::full(StatusCode::METHOD_NOT_ALLOWED, headers, "405 method not allowed")
        }
    }
}

/// The headers of a text.
pub(super) fn text_headers() -> HeaderMap {
    HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"))])
}

/// Text of Ollama itself.
pub(super) fn text(status: StatusCode, text: &'static str) -> Response<HttpBody> {
    let mut answer = full(status, text);
    *answer.headers_mut() = text_headers();
    answer
}

/// What the router says to hosts and origins that may not ask.
pub(super) fn forbidden(allow: Option<&'static str>) -> Response<HttpBody> {
    let mut answer = no_content(allow);
    *answer.status_mut() = StatusCode::FORBIDDEN;
    answer
}

/// What Go's server says to a target that is no path.
pub(super) fn no_path() -> Response<HttpBody> {
    let mut answer = text(StatusCode::NOT_FOUND, "404 page not found\n");
    answer.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

/// No body at all, and perhaps the methods of the route.
pub(super) fn no_content(allow: Option<&'static str>) -> Response<HttpBody> {
    let mut answer = full(StatusCode::NO_CONTENT, "");
    if let Some(allow) = allow {
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    answer
}

/// A status after which the connection is closed. The reason tells it from what hyper says by itself.
pub(super) fn closing(status: StatusCode, reason: &'static str) -> Response<HttpBody> {
    let mut answer = full(status, "");
    answer.headers_mut().insert("x-olol-reason", HeaderValue::from_static(reason));
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// What Go's server says to what it cannot read.
pub(super) fn bad_request(why: &'static str) -> Response<HttpBody> {
    let mut answer = text(StatusCode::BAD_REQUEST, "");
    *answer.body_mut() = HttpBody::Full(format!("400 Bad Request{why}").into());
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Turns an answer into one for HEAD: the body is read to its end, and dropped.
pub(super) async fn without_body(answer: &mut Response<HttpBody>) {
    if let HttpBody::Chunks(body, _) = answer.body_mut() {
        while let Some(Ok(_)) = body.next().await {}
    }
    if let HttpBody::Full(bytes) = answer.body()
        && !bytes.is_empty()
    {
        let length = HeaderValue::from(bytes.len());
        answer.headers_mut().insert(header::CONTENT_LENGTH, length);
    }
    *answer.body_mut() = HttpBody::Full(bytes::Bytes::new());
}
