//! One call over one connection: the body on its way out, and the answer on its way in.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use http::header::{self, HeaderMap};
use http_body::{Body as _, Frame, SizeHint};
use hyper::Response;
use hyper::body::Incoming;
use olol_middleware::call::{Body, Pieces};
use olol_middleware::{Chunk, Counters, Error, Payload, Phase, Reply};

use super::Ollama;
use super::connection::Link;
use super::counters::Count;
use super::lines::{Boundary, Lines};

/// A body on its way to a server.
pub(super) enum Outgoing {
    Whole(std::iter::Fuse<smallvec::IntoIter<[Bytes; 1]>>, u64),
    Stream(Pieces, Option<u64>),
}

impl From<Payload> for Outgoing {
    fn from(payload: Payload) -> Self {
        let length = payload.length();
        match payload {
            Payload::Whole(pieces) => Self::Whole(pieces.into_iter().fuse(), length.unwrap_or(0)),
            Payload::Stream { pieces, length } => Self::Stream(pieces, length),
        }
    }
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match self.get_mut() {
            Self::Whole(pieces, left) => Poll::Ready(pieces.next().map(|piece| {
                *left -= piece.len() as u64;
                Ok(Frame::data(piece))
            })),
            Self::Stream(pieces, _) => {
                pieces.as_mut().poll_next(cx).map(|next| next.map(|piece| piece.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(_, 0))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(_, left) => SizeHint::with_exact(*left),
            Self::Stream(_, Some(length)) => SizeHint::with_exact(*length),
            Self::Stream(_, None) => SizeHint::default(),
        }
    }
}

/// Turns a response into a reply whose body drives the connection, and gives it back when it is done.
pub(super) fn reply(ollama: Ollama, link: Box<Link>, response: Response<Incoming>, infers: bool) -> Reply {
    let (mut head, body) = response.into_parts();
    let length = body.size_hint().exact();
    let boundary = Boundary::of(&head.headers);
    strip(&mut head.headers);
    let answer = Answer {
        ollama,
        link: Some(link),
        body,
        lines: Lines::new(boundary),
        count: infers.then(|| Count::new(boundary)),
        last: None,
        end: None,
        over: false,
    };
    let is_plain = boundary == Boundary::None;
    Reply {
        status: head.status,
        headers: head.headers,
        body: Body::new(answer).with_length(length.filter(|_| is_plain)),
    }
}

/// Removes what belongs to the connection, but for the `Connection: keep-alive` that Ollama itself puts on some streams.
fn strip(headers: &mut HeaderMap) {
    if !headers.keys().any(|name| super::HOP_BY_HOP.contains(name)) {
        return;
    }
    let own = headers.remove(header::CONNECTION).filter(|value| value.as_bytes().eq_ignore_ascii_case(b"keep-alive"));
    super::strip_hop_by_hop(headers);
    if let Some(value) = own {
        headers.insert(header::CONNECTION, value);
    }
}

/// The body of an answer.
struct Answer {
    ollama: Ollama,
    link: Option<Box<Link>>,
    body: Incoming,
    lines: Lines,
    count: Option<Count>,
    /// What came with the end of the body: a piece without its end, and the counts.
    last: Option<Bytes>,
    end: Option<Counters>,
    over: bool,
}

impl Answer {
    /// The next frame; drives the connection when there is none yet.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if frame.is_ready() {
            return frame;
        }
        let moved = self.link.as_mut().is_some_and(|link| link.drive(cx));
        if moved { Pin::new(&mut self.body).poll_frame(cx) } else { frame }
    }

    fn chunk(&mut self, bytes: Bytes) -> Chunk {
        let end = self.count.as_mut().and_then(|count| count.see(&bytes));
        Chunk { bytes, end }
    }

    /// The body is complete: the connection may carry the next call.
    fn finish(&mut self, cx: &mut Context<'_>) {
        self.over = true;
        if let Some(link) = self.link.take() {
            self.ollama.0.links.put(link, cx);
        }
        self.last = self.lines.rest();
        let count = self.count.as_mut();
        self.end =
            count.and_then(|count| self.last.as_ref().and_then(|last| count.see(last)).or_else(|| count.finish()));
    }
}

impl Stream for Answer {
    type Item = Result<Chunk, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if this.over {
                let end = this.end.take();
                let last = this.last.take().or_else(|| end.map(|_| Bytes::new()));
                return Poll::Ready(last.map(|bytes| Ok(Chunk { bytes, end })));
            }
            match std::task::ready!(this.poll_frame(cx)) {
                None => this.finish(cx),
                Some(Ok(frame)) => {
                    let Ok(bytes) = frame.into_data() else { continue };
                    let Some(bytes) = this.lines.push(bytes) else { continue };
                    let mut chunk = this.chunk(bytes);
                    // A body of known length is over with its last byte: nobody may ask for more.
                    if this.body.is_end_stream() {
                        this.finish(cx);
                        if this.last.is_none() {
                            chunk.end = chunk.end.or(this.end.take());
                        }
                    }
                    return Poll::Ready(Some(Ok(chunk)));
                }
                Some(Err(error)) => {
                    this.over = true;
                    this.link = None;
                    return Poll::Ready(Some(Err(this.ollama.failed(Phase::Streaming, false, error))));
                }
            }
        }
    }
}
