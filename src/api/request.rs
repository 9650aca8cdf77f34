//! From an HTTP request to what the stack takes.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Version};
use olol_middleware::{Head, ModelName, Payload, Peek, Route};
use smallvec::SmallVec;

use super::body::HttpBody;
use super::response;
use crate::ollama::HOP;

/// The headers that decide whether a request is taken, found in one pass: a map of headers costs by the search.
#[derive(Debug, Default)]
pub(super) struct Facts<'a> {
    /// The host, if there is one.
    pub(super) host: Option<&'a HeaderValue>,
    /// Whether there is more than one, or one that is none.
    has_bad_host: bool,
    /// The page that asks, in a browser.
    pub(super) origin: Option<&'a HeaderValue>,
    length: Option<&'a HeaderValue>,
    expect: Option<&'a HeaderValue>,
    /// The proxy of ours that it has passed.
    pub(super) hop: Option<&'a HeaderValue>,
}

impl<'a> Facts<'a> {
    pub(super) fn of(headers: &'a HeaderMap) -> Self {
        let mut facts = Self::default();
        for (name, value) in headers {
            if name == header::HOST {
                facts.has_bad_host |= facts.host.is_some() || !is_valid_host(value);
                facts.host = Some(value);
            } else if name == header::ORIGIN {
                facts.origin = facts.origin.or(Some(value));
            } else if name == header::CONTENT_LENGTH {
                facts.length = facts.length.or(Some(value));
            } else if name == header::EXPECT {
                facts.expect = facts.expect.or(Some(value));
            } else if name == HOP {
                facts.hop = facts.hop.or(Some(value));
            }
        }
        facts
    }

    /// Answers what Go's server does not even hand to Ollama.
    pub(super) fn refusal<B>(&self, request: &Request<B>) -> Option<Response<HttpBody>> {
        if request.version() == Version::HTTP_11 && self.host.is_none() && request.method() != http::Method::CONNECT {
            return Some(response::bad_request(": missing required Host header"));
        }
        if self.has_bad_host {
            let is_one = request.headers().get_all(header::HOST).iter().count() == 1;
            return Some(response::bad_request(if is_one { ": malformed Host header" } else { "" }));
        }
        let text = |value: Option<&'a HeaderValue>| value.and_then(|value| value.to_str().ok());
        if text(self.length).is_some_and(|length| length.parse::<i64>().is_err()) {
            return Some(response::bad_request(""));
        }
        if let Some(expect) = text(self.expect)
            && !expect.is_empty()
            && !expect.split(',').any(|word| word.trim().eq_ignore_ascii_case("100-continue"))
        {
            return Some(response::closing(StatusCode::EXPECTATION_FAILED, "expectation"));
        }
        None
    }
}

/// The characters of Go's `httpguts.ValidHostHeader`.
fn is_valid_host(host: &HeaderValue) -> bool {
    host.as_bytes().iter().all(|byte| {
        matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b':' | b'A'..=b'Z' | b'-' | b'_' | b'[' | b']' | b'!' | b'$'
            | b'%' | b'&' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' | b'~' | b'\'')
    })
}

/// What a path names, where the path says it and not the body: a model, a blob's digest.
pub(super) fn subject(route: Route, path: &str) -> Option<String> {
    let last = || path.rsplit_once('/').map(|(_, last)| last.to_owned());
    if matches!(route, Route::V1Model | Route::Blob) { last() } else { None }
}

/// The head of a call. `subject` is what its path names.
pub(super) fn head(route: Route, subject: Option<String>, parts: Parts, client: Option<SocketAddr>) -> Head {
    let peek = match subject {
        Some(digest) if route == Route::Blob => Peek { digests: vec![digest], ..Peek::default() },
        model => Peek { model, ..Peek::default() },
    };
    let path = parts.uri.into_parts().path_and_query.unwrap_or(PathAndQuery::from_static("/"));
    Head { headers: parts.headers, peek, client, ..Head::new(route, parts.method, path) }
}

/// Bytes of a body up to which a request is put together: half of what hyper reads at once.
const SMALL: usize = 4 << 10;

/// Puts a small request into memory of its own. What hyper hands over lies in the buffer that it has read into, and while
/// that is held, here for as long as an answer streams, hyper takes another one of the same 8 KiB to read on.
pub(super) fn put_together(head: &mut Arc<Head>, payload: &mut Payload) {
    let (Some(head), Payload::Whole(pieces)) = (Arc::get_mut(head), payload) else { return };
    let body = pieces.iter().map(Bytes::len).sum();
    if body > SMALL {
        return;
    }
    let path = head.path.as_str().len();
    let mut room = BytesMut::with_capacity(body + path + head.headers.values().map(HeaderValue::len).sum::<usize>());
    pieces.iter().for_each(|piece| room.extend_from_slice(piece));
    room.extend_from_slice(head.path.as_str().as_bytes());
    head.headers.values().for_each(|value| room.extend_from_slice(value.as_bytes()));
    let mut room = room.freeze();
    if body > 0 {
        *pieces = SmallVec::from_buf([room.split_to(body)]);
    }
    // Neither can fail: it is what was there before.
    if let Ok(same) = PathAndQuery::from_maybe_shared(room.split_to(path)) {
        head.path = same;
    }
    for value in head.headers.values_mut() {
        if let Ok(same) = HeaderValue::from_maybe_shared(room.split_to(value.len())) {
            *value = same;
        }
    }
}

/// Looks into the body of a call for what routing needs, where the path did not tell it.
pub(super) fn look(head: &mut Arc<Head>, payload: &Payload) {
    let Some(head) = Arc::get_mut(head) else { return };
    match (head.route, payload) {
        (Route::V1Model | Route::Blob, _) | (_, Payload::Stream { .. }) => {}
        (Route::V1Audio, Payload::Whole(pieces)) => head.peek = Peek::multipart(pieces),
        (_, Payload::Whole(pieces)) => head.peek = Peek::json(pieces),
    }
    head.model = head.peek.model.as_deref().and_then(ModelName::parse);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(request: http::request::Builder) -> Option<u16> {
        let request = request.header("host", "a").body(()).unwrap();
        Facts::of(request.headers()).refusal(&request).map(|answer| answer.status().as_u16())
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
    fn a_small_request_holds_on_to_nothing_else() {
        let read = BytesMut::from(&b"/api/chat?a=%20bvalue\xfftwo{\"model\":1}"[..]).freeze();
        let part = |from: usize, to: usize| read.slice(from..to);
        let mut parts = Request::new(()).into_parts().0;
        parts.uri = http::Uri::from_maybe_shared(part(0, 16)).unwrap();
        parts.headers.append("x-a", HeaderValue::from_maybe_shared(part(16, 22)).unwrap());
        parts.headers.append("x-a", HeaderValue::from_maybe_shared(part(22, 25)).unwrap());
        let mut head = Arc::new(head(Route::Chat, None, parts, None));
        let mut payload = Payload::Whole([part(25, 30), part(30, read.len())].into_iter().collect());
        let before = (head.path.clone(), head.headers.clone());
        put_together(&mut head, &mut payload);
        assert_eq!((&head.path, &head.headers), (&before.0, &before.1));
        let Payload::Whole(pieces) = payload else { unreachable!() };
        assert_eq!(pieces.as_slice(), [&b"{\"model\":1}"[..]]);
        drop(before);
        assert!(read.is_unique());
    }

    #[test]
    fn a_path_may_name_what_is_meant() {
        let of = |route, path| {
            let parts = Request::new(()).into_parts().0;
            let mut head = Arc::new(head(route, subject(route, path), parts, None));
            look(&mut head, &Payload::empty());
            (head.peek.digests.clone(), head.model.as_ref().map(ToString::to_string))
        };
        assert_eq!(of(Route::Blob, "/api/blobs/sha256:ab"), (vec!["sha256:ab".to_owned()], None));
        assert_eq!(of(Route::V1Model, "/v1/models/tiny"), (vec![], Some("tiny:latest".to_owned())));
        assert_eq!(of(Route::Chat, "/api/chat"), (vec![], None));
    }
}
