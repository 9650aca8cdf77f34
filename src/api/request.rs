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
    if request.version() == Version::HTTP_11
        && hosts.iter().next().is_none()
        && request.method() != http::Method::CONNECT
    {
        return Some(response::bad_request(": missing required Host header"));
    }
    if hosts.iter().count() > 1 {
        return Some(response::bad_request(""));
    }
    if !hosts.iter().all(is_valid_host) {
        return Some(response::bad_request(": malformed Host header"));
    }
    if header_text(request.headers(), &header::CONTENT_LENGTH).is_some_and(|length| length.parse::<i64>().is_err()) {
        return Some(response::bad_request(""));
    }
    if let Some(expect) = header_text(request.headers(), &header::EXPECT)
        && !expect.is_empty()
        && !expect.split(',').any(|word| word.trim().eq_ignore_ascii_case("100-continue"))
    {
        return Some(response::closing(StatusCode::EXPECTATION_FAILED, "expectation"));
    }
    None
}

/// The characters of Go's `httpguts.ValidHostHeader`.
fn is_valid_host(host: &HeaderValue) -> bool {
    host.as_bytes().iter().all(|byte| byte.is_ascii_alphanumeric() || b"!$%&()*+,-.:;=[]_~'".contains(byte))
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
        (Route::Blob, _) => Peek {
            digests: path.rsplit_once('/').map(|(_, digest)| digest.to_owned()).into_iter().collect(),
            ..Peek::default()
        },
        (Route::V1Audio, Payload::Whole(pieces)) => Peek::multipart(pieces),
        (_, Payload::Whole(pieces)) => Peek::json(pieces),
        (_, Payload::Stream { .. }) => Peek::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(request: http::request::Builder) -> Option<u16> {
        refuse(&request.header("host", "a").body(()).unwrap()).map(|answer| answer.status().as_u16())
    }

    #[test]
    fn what_go_refuses_is_refused() {
        assert_eq!(refusal(Request::builder()), None);
        assert_eq!(refusal(Request::builder().header("host", "a")), Some(400));
        assert_eq!(refusal(Request::builder().header("content-length", "9223372036854775808")), Some(400));
        for (expect, wanted) in [("100-continue", None), ("a, 100-Continue", None), ("", None), ("a", Some(417))] {
            assert_eq!(refusal(Request::builder().header("expect", expect)), wanted, "{expect}");
        }
    }

    #[test]
    fn the_digest_of_a_blob_is_the_decoded_one() {
        assert_eq!(peek(Route::Blob, "/api/blobs/sha256:ab", &Payload::empty()).digests, ["sha256:ab"]);
    }
}
