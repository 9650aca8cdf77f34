//! The body of a gRPC call: what comes of a message counts as memory for bodies until the call is over.
//!
//! A message is put together before anything looks at it. Without this, whoever opens many calls and sends all but the end of
//! a message in each would have us keep all of that.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use olol_middleware::BoxError;
use tonic::Status;
use tower_http::timeout::TimeoutBody;

use super::body::{Room, Taken};
use crate::pool::LARGEST_MESSAGE;

/// What the room holds for one call: taken by its body, given back when both its body and its answer are gone.
type Held = Arc<Mutex<Taken>>;

/// A request that takes of the room, and what its answer must hold.
pub fn counted(request: Request<Incoming>, room: &Arc<Room>) -> (Request<Incomplete>, Holds) {
    let held: Held = Arc::new(Mutex::new(Taken::nothing(room)));
    let holds = Holds(held.clone());
    let request = request.map(|body| Counted { body: Box::pin(TimeoutBody::new(room.pause(), body)), held, taken: 0 });
    (request, holds)
}

/// A body of which more may come, with a limit for the pauses of its sender.
pub(super) type Incomplete = Counted<Pin<Box<TimeoutBody<Incoming>>>>;

/// What the answer of a call holds.
#[derive(Debug)]
pub struct Holds(Held);

impl Holds {
    /// The answer that holds it until it is over.
    pub fn by(self, answer: Response<tonic::body::Body>) -> Response<tonic::body::Body> {
        answer.map(|body| tonic::body::Body::new(Holding { body, _held: self.0 }))
    }
}

/// A body that takes of the room as it comes.
#[derive(Debug)]
pub struct Counted<B> {
    body: B,
    held: Held,
    /// No message is longer than the longest, and what was a message before has gone on: so no more is taken than that.
    taken: usize,
}

impl<B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin> Body for Counted<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other.map(|failed| failed.map_err(Into::into))),
        };
        let more = frame.data_ref().map_or(0, Bytes::len).min(LARGEST_MESSAGE - this.taken);
        if more > 0 && !this.held.lock().unwrap_or_else(PoisonError::into_inner).grow(more) {
            let full = "there is no memory for more bodies now, see body-memory in [limits]; ask again later";
            return Poll::Ready(Some(Err(Status::resource_exhausted(full).into())));
        }
        this.taken += more;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer that holds what its request has taken.
struct Holding {
    body: tonic::body::Body,
    _held: Held,
}

impl Body for Holding {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, StreamBody};
    use std::time::Duration;

    fn body(pieces: usize, room: &Arc<Room>) -> (Counted<impl Body<Data = Bytes, Error = BoxError> + Unpin>, Held) {
        let piece = Bytes::from(vec![0; 1 << 20]);
        let frames = (0..pieces).map(move |_| Ok(Frame::data(piece.clone())));
        let held: Held = Arc::new(Mutex::new(Taken::nothing(room)));
        (Counted { body: StreamBody::new(futures_util::stream::iter(frames)), held: held.clone(), taken: 0 }, held)
    }

    #[tokio::test]
    async fn a_call_takes_of_the_room_what_a_message_may_take_until_its_answer_is_over() {
        let room = Room::new(6 << 20, Duration::from_secs(1));
        let (long, held) = body(20, &room);
        assert_eq!(long.collect().await.unwrap().to_bytes().len(), 20 << 20);
        let (fits, _) = body(2, &room);
        fits.collect().await.unwrap();
        let (other, _) = body(3, &room);
        let error = other.collect().await.unwrap_err();
        assert_eq!(error.downcast::<Status>().unwrap().code(), tonic::Code::ResourceExhausted);
        drop(held);
        body(6, &room).0.collect().await.unwrap();
    }
}
