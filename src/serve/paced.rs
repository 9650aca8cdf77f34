//! The body of an answer on its way into an HTTP/1 connection.
//!
//! hyper copies small pieces into one buffer and writes them at once, which for a token is a good deal less work than a list
//! of pieces. It would let that buffer grow to the longest head that it takes, for every client that does not read, and
//! never shrink: so a body hands out nothing while enough is waiting, and pieces of a bounded size.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// Bytes of bodies from which on no more of them is asked for, until the client has read.
const WAITING: usize = 64 << 10;
/// The longest piece: more than the longest line that is joined (see `ollama::lines`).
const LONGEST: usize = 2 << 20;

/// What the body of an answer and its connection tell each other. Both are polled by one task, so nothing is contended.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// Bytes that hyper has and the kernel has not.
    waiting: AtomicUsize,
    /// Whether a body was not asked for more because of them.
    is_held: AtomicBool,
}

impl Line {
    /// Tells that after a write so many bytes are left.
    pub(super) fn left(&self, bytes: usize, waker: &Waker) {
        self.waiting.store(bytes, Ordering::Relaxed);
        if bytes < WAITING && self.is_held.load(Ordering::Relaxed) {
            self.is_held.store(false, Ordering::Relaxed);
            // hyper asks a body once, then writes: without this it would wait for the body.
            waker.wake_by_ref();
        }
    }
}

/// A body that waits for its connection, and holds until its end what is to end with it.
pub(super) struct Paced<B, H> {
    body: B,
    /// What is left of a piece that was too long.
    rest: Bytes,
    line: Arc<Line>,
    _held: H,
}

impl<B, H> Paced<B, H> {
    pub(super) fn new(body: B, line: Arc<Line>, held: H) -> Self {
        Self { body, rest: Bytes::new(), line, _held: held }
    }
}

impl<B: Body<Data = Bytes> + Unpin, H: Unpin> Body for Paced<B, H> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let waiting = this.line.waiting.load(Ordering::Relaxed);
        if waiting >= WAITING {
            this.line.is_held.store(true, Ordering::Relaxed);
            return Poll::Pending;
        }
        let mut data = std::mem::take(&mut this.rest);
        if data.is_empty() {
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => data = piece,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                other => return Poll::Ready(other),
            }
        }
        if data.len() > LONGEST {
            this.rest = data.split_off(LONGEST);
        }
        this.line.waiting.store(waiting + data.len(), Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut whole = SizeHint::new();
        whole.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            whole.set_upper(upper + rest);
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::task::noop_waker;
    use http_body_util::Full;

    #[test]
    fn a_body_comes_in_pieces_that_wait_for_the_connection_and_none_is_lost() {
        let (line, waker) = (Arc::new(Line::default()), noop_waker());
        let whole: Bytes = (0..251).cycle().take(3 * LONGEST + 1).collect();
        let mut body = Paced::new(Full::new(whole.clone()), line.clone(), ());
        let mut cx = Context::from_waker(&waker);
        let mut read = Vec::new();
        while !body.is_end_stream() {
            assert_eq!(body.size_hint().exact(), Some((whole.len() - read.len()) as u64));
            let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut body).poll_frame(&mut cx) else { panic!("no piece") };
            let piece = frame.into_data().unwrap();
            assert!(piece.len() <= LONGEST);
            read.extend_from_slice(&piece);
            assert_eq!(Pin::new(&mut body).poll_frame(&mut cx).is_pending(), piece.len() == LONGEST);
            line.left(0, &waker);
        }
        assert!(read == whole);
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_body_that_waited_is_woken_by_the_write() {
        let (line, woken) = (Arc::new(Line::default()), Arc::new(Woken::default()));
        let mut body = Paced::new(Full::new(Bytes::from(vec![1; LONGEST + 1])), line.clone(), ());
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        assert!(Pin::new(&mut body).poll_frame(&mut cx).is_ready());
        line.left(0, &waker);
        line.left(WAITING, &waker);
        assert!(Pin::new(&mut body).poll_frame(&mut cx).is_pending());
        line.left(WAITING, &waker);
        assert!(!woken.0.load(Ordering::Relaxed));
        line.left(WAITING - 1, &waker);
        assert!(woken.0.load(Ordering::Relaxed));
        assert!(Pin::new(&mut body).poll_frame(&mut cx).is_ready());
    }
}
