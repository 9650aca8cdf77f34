//! Bodies of clients on their way in, and bodies of answers on their way out.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, Stream, StreamExt};
use http::Request;
use http::header::{self, HeaderMap};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use olol_middleware::call::{Body, Pieces};
use olol_middleware::{BoxError, Error, Payload};
use smallvec::SmallVec;
use tower_http::timeout::TimeoutBody;

/// What a mid-stream failure becomes where a line may tell it: what Ollama says when its runner dies.
const BROKEN_LINE: &[u8] = b"{\"error\":\"an error was encountered while running the model: unexpected EOF\"}\n";

/// A piece of a body that is shorter than this is joined with what stands before it, up to that, bytes.
const SMALL: usize = 512;
const JOINED: usize = 4096;

/// Bytes of a body that are read although nobody wants them.
const DRAINED: u64 = 256 << 10;

/// Memory for bodies of clients, shared by all requests.
#[derive(Debug)]
pub struct Room {
    left: AtomicU64,
    /// Longest time between two pieces of a body.
    pause: Duration,
}

impl Room {
    /// So many bytes for all requests together, and a limit for the pause between two pieces of one.
    pub fn new(bytes: u64, pause: Duration) -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(bytes), pause })
    }

    /// The longest time between two pieces of a body.
    pub(super) fn pause(&self) -> Duration {
        self.pause
    }

    fn take(&self, bytes: u64) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }
}

/// What one request holds of the room.
#[derive(Debug)]
pub(super) struct Taken {
    room: Arc<Room>,
    bytes: u64,
    /// Whether a body that streams through has been read to its end.
    over: Option<Arc<AtomicBool>>,
}

impl Taken {
    /// Nothing so far.
    pub(super) fn nothing(room: &Arc<Room>) -> Self {
        Self { room: room.clone(), bytes: 0, over: None }
    }

    /// Whether a part of the body was not wanted so far: who answers now does not wait for it.
    pub(super) fn is_cut(&self) -> bool {
        self.over.as_ref().is_some_and(|over| !over.load(Ordering::Relaxed))
    }

    /// Takes more; false: there is no room.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        let grown = self.room.take(bytes as u64);
        if grown {
            self.bytes += bytes as u64;
        }
        grown
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if self.bytes != 0 {
            self.room.left.fetch_add(self.bytes, Ordering::Relaxed);
        }
    }
}

/// How much of a body is here.
pub(super) enum Arrived {
    /// All of it, or all that is held of it.
    Whole(Payload, Taken),
    /// Not all.
    Partly(Partly),
}

/// A body of which more is to come.
pub(super) struct Partly {
    pieces: SmallVec<[Bytes; 1]>,
    incoming: Incoming,
    taken: Taken,
}

/// Takes what has come of a body, without waiting for more. One that `streams` is not held at all.
pub(super) fn arrived(
    mut incoming: Incoming,
    headers: &HeaderMap,
    streams: bool,
    room: &Arc<Room>,
) -> Result<Arrived, Error> {
    let mut taken = Taken::nothing(room);
    let mut pieces = SmallVec::new();
    if incoming.is_end_stream() {
        return Ok(Arrived::Whole(Payload::Whole(pieces), taken));
    }
    if streams {
        let (length, over) = (length_of(headers), taken.over.insert(Arc::default()).clone());
        let pieces = Box::pin(Through { pieces: rest(incoming, room.pause), left: length, over });
        return Ok(Arrived::Whole(Payload::Stream { length, pieces }, taken));
    }
    let mut is_over = false;
    while !is_over && !incoming.is_end_stream() {
        let Some(frame) = incoming.frame().now_or_never() else { break };
        match frame {
            None => is_over = true,
            Some(frame) => keep(frame.map_err(|error| Error::Body(error.into()))?, &mut pieces),
        }
    }
    if !taken.grow(pieces.iter().map(Bytes::len).sum()) {
        return Ok(Arrived::Whole(spilt(pieces, rest(incoming, room.pause), length_of(headers)), taken));
    }
    if is_over || incoming.is_end_stream() {
        return Ok(Arrived::Whole(Payload::Whole(pieces), taken));
    }
    Ok(Arrived::Partly(Partly { pieces, incoming, taken }))
}

/// Takes a body to its end; as a stream, where there is no room for all of it.
pub(super) async fn whole(
    incoming: Incoming,
    headers: &HeaderMap,
    room: &Arc<Room>,
) -> Result<(Payload, Taken), Error> {
    match arrived(incoming, headers, false, room)? {
        Arrived::Whole(payload, taken) => Ok((payload, taken)),
        Arrived::Partly(partly) => partly.rest(headers).await,
    }
}

impl Partly {
    /// Reads the rest: to the end while there is room for it, else as a stream.
    pub(super) async fn rest(self, headers: &HeaderMap) -> Result<(Payload, Taken), Error> {
        let Self { mut pieces, incoming, mut taken } = self;
        let mut rest = rest(incoming, taken.room.pause);
        while let Some(piece) = rest.next().await {
            let piece = piece?;
            let has_room = taken.grow(piece.len());
            push(&mut pieces, piece);
            if !has_room {
                return Ok((spilt(pieces, rest, length_of(headers)), taken));
            }
        }
        Ok((Payload::Whole(pieces), taken))
    }
}

fn length_of(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn keep(frame: Frame<Bytes>, pieces: &mut SmallVec<[Bytes; 1]>) {
    if let Ok(piece) = frame.into_data()
        && !piece.is_empty()
    {
        push(pieces, piece);
    }
}

/// Adds a piece to others. Small ones are joined: whoever sends a body byte by byte would have us keep a hundred times of it.
fn push(pieces: &mut SmallVec<[Bytes; 1]>, piece: Bytes) {
    let Some(last) = pieces.last_mut().filter(|last| piece.len() < SMALL && last.len() < JOINED) else {
        pieces.push(piece);
        return;
    };
    let mut joined = std::mem::take(last).try_into_mut().unwrap_or_else(|last| {
        let mut joined = BytesMut::with_capacity(last.len() + piece.len());
        joined.extend_from_slice(&last);
        joined
    });
    joined.extend_from_slice(&piece);
    *last = joined.freeze();
}

/// What did not fit: sent once, as it comes.
fn spilt(pieces: SmallVec<[Bytes; 1]>, rest: Pieces, length: Option<u64>) -> Payload {
    Payload::Stream { length, pieces: Box::pin(futures_util::stream::iter(pieces.into_iter().map(Ok)).chain(rest)) }
}

/// The rest of a body, with a limit for the pauses of its sender.
fn rest(incoming: Incoming, pause: Duration) -> Pieces {
    let body = Box::pin(TimeoutBody::new(pause, incoming));
    Box::pin(Rest(Some(Box::pin(body.into_data_stream().map(|piece| piece.map_err(Error::Body))))))
}

/// What is still coming. When nobody wants it any more it is read to its end all the same: a server may answer an upload
/// before it is through, and a client that is cut off while it sends does not read its answer.
struct Rest(Option<Pieces>);

impl Stream for Rest {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(pieces) = &mut self.0 else { return Poll::Ready(None) };
        let next = std::task::ready!(pieces.poll_next_unpin(cx));
        if !matches!(next, Some(Ok(_))) {
            self.0 = None;
        }
        Poll::Ready(next)
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        if let (Some(mut pieces), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move { while let Some(Ok(_)) = pieces.next().await {} });
        }
    }
}

/// A body that streams through, and notes its end.
struct Through {
    pieces: Pieces,
    left: Option<u64>,
    over: Arc<AtomicBool>,
}

impl Stream for Through {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = std::task::ready!(self.pieces.as_mut().poll_next(cx));
        if let (Some(Ok(piece)), Some(left)) = (&next, self.left) {
            self.left = Some(left.saturating_sub(piece.len() as u64));
        }
        if next.is_none() || self.left == Some(0) {
            self.over.store(true, Ordering::Relaxed);
        }
        Poll::Ready(next)
    }
}

/// Reads the body of a request that is answered without it, so that its connection can be kept. False if it is longer than
/// Go's server would read for that, or if its client waits to be told to send it.
pub(super) async fn drain(request: Request<Incoming>, room: &Room) -> bool {
    let mut left = DRAINED;
    let is_long = request.body().size_hint().lower() > DRAINED;
    if !request.body().is_end_stream() && (is_long || request.headers().contains_key(header::EXPECT)) {
        return false;
    }
    let mut incoming = request.into_body();
    while !incoming.is_end_stream() {
        let Ok(Some(Ok(frame))) = tokio::time::timeout(room.pause, incoming.frame()).await else { break };
        let length = frame.data_ref().map_or(0, Bytes::len) as u64;
        let Some(fewer) = left.checked_sub(length) else { return false };
        left = fewer;
    }
    true
}

/// The body of an answer to a client.
#[derive(Debug)]
pub enum HttpBody {
    /// All of it.
    Full(Bytes),
    /// What a server sends. The flag: whether a failure is told by a line, or by cutting the connection.
    Chunks(Body, bool),
    /// An answer that broke off: the connection is cut.
    Cut(Option<BoxError>),
    /// What axum made.
    Axum(axum::body::Body),
    /// What tonic made.
    Grpc(tonic::body::Body),
}

impl http_body::Body for HttpBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match this {
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Self::Chunks(body, has_lines) => loop {
                match std::task::ready!(Pin::new(&mut *body).poll_next(cx)) {
                    // A chunk that only tells counts.
                    Some(Ok(chunk)) if chunk.bytes.is_empty() => {}
                    Some(Ok(chunk)) => return Poll::Ready(Some(Ok(Frame::data(chunk.bytes)))),
                    Some(Err(error)) if !*has_lines => {
                        // An error makes hyper drop what it has not written yet. Waiting once lets it write first what the
                        // server has said until then.
                        *this = Self::Cut(Some(error.into()));
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    Some(Err(error)) => {
                        tracing::debug!(%error, "an answer broke off");
                        *this = Self::Full(Bytes::new());
                        return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(BROKEN_LINE)))));
                    }
                    None => return Poll::Ready(None),
                }
            },
            Self::Cut(error) => Poll::Ready(error.take().map(Err)),
            Self::Axum(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Self::Grpc(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_empty(),
            Self::Chunks(body, _) => body.length() == Some(0),
            Self::Cut(error) => error.is_none(),
            Self::Axum(body) => body.is_end_stream(),
            Self::Grpc(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Chunks(body, _) => body.length().map_or_else(SizeHint::default, SizeHint::with_exact),
            Self::Cut(_) => SizeHint::default(),
            Self::Axum(body) => body.size_hint(),
            Self::Grpc(body) => body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_comes_byte_by_byte_is_kept_in_few_pieces() {
        let all: Vec<u8> = (0..100_000_u32).map(|number| u8::try_from(number % 251).unwrap()).collect();
        let sent = Bytes::from(all.clone());
        let mut pieces = SmallVec::new();
        for at in 0..all.len() {
            push(&mut pieces, sent.slice(at..=at));
        }
        assert!(pieces.len() <= all.len() / JOINED + 1, "{}", pieces.len());
        push(&mut pieces, Bytes::from(vec![0; SMALL]));
        push(&mut pieces, sent.slice(..1));
        assert_eq!(pieces.concat(), [&all[..], &[0; SMALL], &all[..1]].concat());
    }

    #[tokio::test]
    async fn the_end_of_what_streams_through_is_noted() {
        for (length, pieces_read) in [(Some(4), 2), (None, 3)] {
            let over: Arc<AtomicBool> = Arc::default();
            let pieces: Pieces =
                Box::pin(futures_util::stream::iter([Ok(Bytes::from_static(b"ab")), Ok(Bytes::from_static(b"cd"))]));
            let mut through = Through { pieces, left: length, over: over.clone() };
            for _ in 0..pieces_read {
                assert!(!over.load(Ordering::Relaxed));
                through.next().await;
            }
            assert!(over.load(Ordering::Relaxed));
        }
    }
}
