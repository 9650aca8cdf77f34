//! The bytes of a client's connection, with what Go's server does at its edges and hyper does not.
//!
//! A client that has shut down its sending side still gets a brief answer; a status that hyper sends by itself has Go's
//! words; and closing waits a moment for what the client was still sending, which would otherwise reset the connection
//! before it has read its answer.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::heads::Heading;
use super::paced::Line;

/// What Go's server says to what is no request.
pub(super) const BAD_REQUEST: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request";
/// What Go's server says to a head that is too long.
pub(super) const TOO_LARGE: &[u8] = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n431 Request Header Fields Too Large";

/// How the last answer of HTTP/1 begins on a connection that is turned round.
const TURNED: &[u8] = b"HTTP/1.1 101 ";

/// How long a client that sends no more is believed to wait for a brief answer.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long closing waits for a client that still sends; Go's figure.
const LINGER: Duration = Duration::from_millis(500);

/// A connection.
pub(super) struct Wire<S> {
    /// What was read before.
    prefix: Bytes,
    inner: S,
    turn: Arc<Turn>,
    /// The head that comes while nothing is answered, and how many requests had been answered when it began.
    heading: Heading,
    answered: u32,
    /// Tells bodies how much of them waits.
    line: Arc<Line>,
    /// Runs from the moment when the client was seen to send no more.
    patience: Option<Pin<Box<Sleep>>>,
    /// Whether what is written is not HTTP/1, and must not be taken for it: HTTP/2, or a connection that was turned round.
    is_raw: bool,
    /// What is written in place of what hyper writes.
    words: &'static [u8],
    linger: Option<Pin<Box<Sleep>>>,
}

/// Whose turn it is on a connection.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// A request is being answered.
    is_ours: AtomicBool,
    /// Its client may have shut down its sending side.
    is_brief: AtomicBool,
    /// How many were answered, this one included.
    count: AtomicU32,
}

/// Our turn, until this is dropped with the answer. The client of a brief request may stop sending then.
pub(super) struct Brief(Arc<Turn>);

impl Brief {
    pub(super) fn begin(turn: &Arc<Turn>, is_brief: bool) -> Self {
        turn.count.fetch_add(1, Ordering::Relaxed);
        turn.is_ours.store(true, Ordering::Relaxed);
        turn.is_brief.store(is_brief, Ordering::Relaxed);
        Self(turn.clone())
    }
}

impl Drop for Brief {
    fn drop(&mut self) {
        self.0.is_brief.store(false, Ordering::Relaxed);
        self.0.is_ours.store(false, Ordering::Relaxed);
    }
}

impl<S> Wire<S> {
    pub(super) fn new(prefix: Bytes, inner: S) -> Self {
        Self {
            prefix,
            inner,
            turn: Arc::default(),
            heading: Heading::default(),
            answered: 0,
            line: Arc::default(),
            patience: None,
            is_raw: false,
            words: b"",
            linger: None,
        }
    }

    /// One of HTTP/2.
    pub(super) fn raw(prefix: Bytes, inner: S) -> Self {
        Self { is_raw: true, ..Self::new(prefix, inner) }
    }

    /// Whose turn it is.
    pub(super) fn turn(&self) -> Arc<Turn> {
        self.turn.clone()
    }

    /// What it shares with the bodies that pass it.
    pub(super) fn line(&self) -> Arc<Line> {
        self.line.clone()
    }

    /// Whether the end of what the client sends is kept back for now.
    fn is_patient(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.turn.is_brief.load(Ordering::Relaxed) {
            self.patience = None;
            return false;
        }
        let patience = self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(PATIENCE)));
        patience.as_mut().poll(cx).is_pending()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.prefix.has_remaining() {
            let length = this.prefix.len().min(buffer.remaining());
            buffer.put_slice(&this.prefix[..length]);
            this.prefix.advance(length);
            if this.prefix.is_empty() {
                // An idle connection keeps nothing of its first request.
                this.prefix = Bytes::new();
            }
            return Poll::Ready(Ok(()));
        }
        let is_head = !this.is_raw && !this.turn.is_ours.load(Ordering::Relaxed);
        let answered = this.turn.count.load(Ordering::Relaxed);
        if answered != this.answered {
            this.answered = answered;
            this.heading.ends();
        }
        if is_head && !this.heading.may_grow() {
            return Poll::Ready(Err(io::Error::other("there are too many long heads of requests at this moment")));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
        if is_head {
            this.heading.grows(buffer.filled().len() - before);
        }
        if buffer.filled().len() == before && this.is_patient(cx) { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.words.is_empty() {
            match if this.is_raw { None } else { words_for(bytes) } {
                None => {
                    this.is_raw |= bytes.starts_with(TURNED);
                    let written = ready!(Pin::new(&mut this.inner).poll_write(cx, bytes))?;
                    this.line.left(bytes.len() - written, cx.waker());
                    return Poll::Ready(Ok(written));
                }
                Some(words) => this.words = words,
            }
        }
        while !this.words.is_empty() {
            let written = ready!(Pin::new(&mut this.inner).poll_write(cx, this.words))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            this.words = &this.words[written..];
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
        }
        let linger = this.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        if linger.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut scratch = [MaybeUninit::uninit(); 8192];
            let mut buffer = ReadBuf::uninit(&mut scratch);
            match ready!(Pin::new(&mut this.inner).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                // The client has closed too.
                _ => return Poll::Ready(Ok(())),
            }
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match pieces {
            [piece] => self.poll_write(cx, piece),
            _ => Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// What Go's server says where hyper sends a status and nothing else.
fn words_for(head: &[u8]) -> Option<&'static [u8]> {
    let status = head.strip_prefix(b"HTTP/1.")?.get(2..5)?;
    let words = match status {
        b"400" => BAD_REQUEST,
        b"431" => TOO_LARGE,
        _ => return None,
    };
    let has = |name: &[u8]| memchr::memmem::find(head, name).is_some();
    let is_bare = head.ends_with(b"\r\n\r\n") && has(b"\r\nContent-Length: 0\r\n") && !has(b"\r\nX-Olol-");
    is_bare.then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_bare_status_of_hyper_has_the_words_of_go() {
        for (written, wanted) in [
            (&b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"[..], BAD_REQUEST),
            (b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\n\r\n", TOO_LARGE),
            (b"HTTP/1.1 400 Bad Request\r\nX-Olol-Reason: a\r\nContent-Length: 0\r\n\r\n", b""),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        ] {
            let (near, mut far) = tokio::io::duplex(16);
            let writing = tokio::spawn(async move { Wire::new(Bytes::new(), near).write_all(written).await });
            let mut read = Vec::new();
            far.read_to_end(&mut read).await.unwrap();
            writing.await.unwrap().unwrap();
            assert_eq!(read, if wanted.is_empty() { written } else { wanted });
        }
    }

    #[tokio::test]
    async fn what_is_not_http_1_is_written_as_it_is() {
        const BARE: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
        const TURNS: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\n\r\n";
        for is_http2 in [true, false] {
            let (near, mut far) = tokio::io::duplex(1024);
            let mut wire = if is_http2 { Wire::raw(Bytes::new(), near) } else { Wire::new(Bytes::new(), near) };
            if !is_http2 {
                wire.write_all(TURNS).await.unwrap();
                far.read_exact(&mut [0; TURNS.len()]).await.unwrap();
            }
            wire.write_all(BARE).await.unwrap();
            let mut read = [0; BARE.len()];
            far.read_exact(&mut read).await.unwrap();
            assert_eq!(read, BARE);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_is_kept_back_while_a_brief_answer_is_made_and_not_for_long() {
        let (near, far) = tokio::io::duplex(16);
        drop(far);
        let mut wire = Wire::new(Bytes::from_static(b"a"), near);
        let turn = wire.turn();
        let brief = Brief::begin(&turn, true);
        assert_eq!(wire.read_u8().await.unwrap(), b'a');
        let begun = tokio::time::Instant::now();
        assert_eq!(wire.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(begun.elapsed().as_millis() / 10, PATIENCE.as_millis() / 10);
        drop(brief);
        let begun = tokio::time::Instant::now();
        assert_eq!(wire.read(&mut [0; 1]).await.unwrap(), 0);
        let _other = Brief::begin(&turn, false);
        assert_eq!(wire.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn closing_waits_a_moment_for_what_is_still_sent() {
        let (near, mut far) = tokio::io::duplex(16);
        let mut wire = Wire::new(Bytes::new(), near);
        let sending = tokio::spawn(async move {
            far.write_all(&[0; 1000]).await.unwrap();
            far
        });
        let begun = tokio::time::Instant::now();
        wire.shutdown().await.unwrap();
        assert!(begun.elapsed() >= LINGER);
        drop(sending.await.unwrap());
    }
}
