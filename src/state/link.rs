//! The way to a store, over which nothing comes that is longer than anything a store has to say.
//!
//! Whoever answers there may be ill, or no store at all, and an answer is held in memory until it is whole. So what comes is
//! looked at on its way: an answer that is too long, or of too many parts, is the end of the connection, before its bytes are
//! kept. And messages that nobody has asked for wait there until those before them are heard.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use futures_util::task::AtomicWaker;
use redis::{ConnectionAddr, ConnectionInfo};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::security::tls::Connector;

/// The longest answer, bytes: more than comes within the time that anybody waits for one, and than a session has.
const LONGEST: u64 = 64 << 20;
/// Parts of one answer: each takes more memory than bytes.
const MOST_PARTS: u64 = 1 << 20;
/// Messages that may wait to be heard.
const WAITING: usize = 1024;

/// How a store is reached.
pub(super) struct Way {
    info: ConnectionInfo,
    tls: Option<Connector>,
}

/// A connection to one.
pub(super) type Link = Bounded<Either<TcpStream, Box<TlsStream<TcpStream>>>>;

impl Way {
    /// To what this leads to. `ca`: the file with the CA of its certificate, if one is named.
    pub(super) fn new(info: ConnectionInfo, ca: Option<&Path>) -> anyhow::Result<Self> {
        let tls = match info.addr() {
            ConnectionAddr::TcpTls { insecure: true, .. } => {
                anyhow::bail!("state.url: a store whose certificate is not checked is not used: name its CA in `ca`")
            }
            ConnectionAddr::TcpTls { .. } => {
                Some(Connector::to_store(ca).map_err(|error| anyhow::anyhow!("state.ca: {error}"))?)
            }
            _ => None,
        };
        Ok(Self { info, tls })
    }

    /// What is said when one begins.
    pub(super) fn settings(&self) -> &redis::RedisConnectionInfo {
        self.info.redis_settings()
    }

    /// Opens a connection. With `heard`, messages that nobody has asked for come no faster than they are.
    pub(super) async fn open(&self, heard: Option<Arc<Heard>>) -> io::Result<Link> {
        let (ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. }) = self.info.addr() else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "that is no host"));
        };
        let stream = TcpStream::connect((host.as_str(), *port)).await?;
        stream.set_nodelay(true)?;
        let stream = match &self.tls {
            None => Either::Left(stream),
            Some(tls) => Either::Right(Box::new(tls.connect(host, stream).await?)),
        };
        Ok(Bounded { stream, replies: Replies::default(), heard })
    }
}

/// How many messages have come, and how many of them were heard.
#[derive(Debug, Default)]
pub(super) struct Heard {
    waiting: AtomicUsize,
    waker: AtomicWaker,
}

impl Heard {
    /// One more was heard.
    pub(super) fn one(&self) {
        let fewer = |waiting: usize| Some(waiting.saturating_sub(1));
        let _ = self.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, fewer);
        self.waker.wake();
    }

    /// Whether there is room for more; if not, the task is woken when there is.
    fn has_room(&self, cx: &Context<'_>) -> bool {
        if self.waiting.load(Ordering::Acquire) < WAITING {
            return true;
        }
        self.waker.register(cx.waker());
        self.waiting.load(Ordering::Acquire) < WAITING
    }
}

/// A connection that ends when an answer is too long.
#[derive(Debug)]
pub(super) struct Bounded<S> {
    stream: S,
    replies: Replies,
    heard: Option<Arc<Heard>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.heard.as_ref().is_some_and(|heard| !heard.has_room(cx)) {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let whole = self.replies.look(&buffer.filled()[before..])?;
        if let Some(heard) = &self.heard {
            heard.waiting.fetch_add(whole, Ordering::AcqRel);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Where one answer ends and the next begins, in RESP of either version; and how long the present one is so far.
#[derive(Debug, Default)]
struct Replies {
    at: At,
    /// Parts that are still to come of the present answer; 0: none has begun.
    left: u64,
    /// Parts that it has, those to come included.
    parts: u64,
    bytes: u64,
}

/// What the next byte is.
#[derive(Clone, Copy, Debug, Default)]
enum At {
    /// The kind of a part.
    #[default]
    Kind,
    /// Of the line of a part: its kind, and the number in it so far; `None`: it has none.
    Line(u8, Option<u64>),
    /// Of a text that is so much longer.
    Text(u64),
}

impl Replies {
    /// Looks at what has come, and returns how many answers end in it.
    fn look(&mut self, mut bytes: &[u8]) -> io::Result<usize> {
        let mut whole = 0;
        while let [first, rest @ ..] = bytes {
            match self.at {
                At::Kind => {
                    if self.left == 0 {
                        (self.left, self.parts, self.bytes) = (1, 1, 0);
                    }
                    self.at = At::Line(*first, Some(0));
                    bytes = rest;
                    self.grows(1)?;
                }
                At::Line(kind, number) => {
                    let end = memchr::memchr(b'\n', bytes);
                    let line = &bytes[..end.unwrap_or(bytes.len())];
                    let number = line.iter().filter(|byte| **byte != b'\r').fold(number, digit);
                    bytes = &bytes[end.map_or(bytes.len(), |end| end + 1)..];
                    self.grows(line.len() as u64 + 1)?;
                    self.at = At::Line(kind, number);
                    if end.is_some() {
                        self.ends(kind, number.unwrap_or(0), number.is_some())?;
                    }
                }
                At::Text(left) => {
                    let taken = left.min(bytes.len() as u64);
                    bytes = &bytes[usize::try_from(taken).unwrap_or(bytes.len())..];
                    self.grows(taken)?;
                    self.at = At::Text(left - taken);
                    if left == taken {
                        self.left = self.left.saturating_sub(1);
                        self.at = At::Kind;
                    }
                }
            }
            whole += usize::from(matches!(self.at, At::Kind) && self.left == 0);
        }
        Ok(whole)
    }

    /// A line has ended. `is_there`: it has a number that is none below zero, which is how what is not there is told.
    fn ends(&mut self, kind: u8, number: u64, is_there: bool) -> io::Result<()> {
        let inner = match kind {
            b'$' | b'=' | b'!' if is_there => {
                if number > LONGEST {
                    return Err(too_long());
                }
                // With the end of its line.
                self.at = At::Text(number + 2);
                return Ok(());
            }
            b'*' | b'~' | b'>' if is_there => number,
            b'%' if is_there => number.saturating_mul(2),
            // What stands before a part, and is none.
            b'|' if is_there => number.saturating_mul(2).saturating_add(1),
            _ => 0,
        };
        self.at = At::Kind;
        self.parts = self.parts.saturating_add(inner);
        if self.parts > MOST_PARTS {
            return Err(too_long());
        }
        self.left = (self.left + inner).saturating_sub(1);
        Ok(())
    }

    fn grows(&mut self, by: u64) -> io::Result<()> {
        self.bytes += by;
        if self.bytes > LONGEST { Err(too_long()) } else { Ok(()) }
    }
}

/// A number with one more digit.
fn digit(number: Option<u64>, byte: &u8) -> Option<u64> {
    let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
    Some(number?.saturating_mul(10).saturating_add(digit))
}

fn too_long() -> io::Error {
    let what = format!("it answers more than {} MiB, or {MOST_PARTS} parts, at once: that is not ours", LONGEST >> 20);
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    const EVERY_KIND: &str = "+OK\r\n-ERR no\r\n:-12\r\n$5\r\nhe\nlo\r\n$-1\r\n*-1\r\n*0\r\n*2\r\n*1\r\n$0\r\n\r\n:1\r\n%1\r\n+a\r\n*2\r\n:1\r\n:2\r\n\
        ~1\r\n,1.5\r\n|1\r\n+a\r\n+b\r\n_\r\n=3\r\ntxt\r\n>2\r\n+message\r\n#t\r\n";

    #[test]
    fn answers_are_told_apart_however_they_come() {
        let count = 13;
        for piece in [1, 2, 3, 7, EVERY_KIND.len()] {
            let mut replies = Replies::default();
            let found: usize = EVERY_KIND.as_bytes().chunks(piece).map(|bytes| replies.look(bytes).unwrap()).sum();
            assert_eq!((found, replies.left), (count, 0), "{piece}");
        }
    }

    #[test]
    fn what_is_too_long_is_found_as_soon_as_it_says_so_or_is() {
        for text in ["$67108865\r\n", "$99999999999999999999999\r\n", "*1048576\r\n", "*2147483647\r\n", "%600000\r\n"]
        {
            assert!(Replies::default().look(text.as_bytes()).is_err(), "{text}");
        }
        // A line that does not end, and many parts each of which is allowed.
        let (mut line, mut parts, mut texts) = (Replies::default(), Replies::default(), Replies::default());
        let piece = vec![b'a'; 1 << 20];
        line.look(b"+").unwrap();
        assert_eq!((0..100).position(|_| line.look(&piece).is_err()), Some(63));
        let nested = b"*1000\r\n".repeat(2000);
        assert!(parts.look(&nested).is_err());
        let begun = texts.look(b"*100\r\n").unwrap();
        let text = [&b"$1048576\r\n"[..], &piece, b"\r\n"].concat();
        assert_eq!((begun, (0..100).position(|_| texts.look(&text).is_err())), (0, Some(63)));
        // Many answers are no long one.
        let mut many = Replies::default();
        assert_eq!((0..100).map(|_| many.look(&text).unwrap()).sum::<usize>(), 100);
    }

    #[tokio::test]
    async fn messages_wait_until_those_before_them_are_heard() {
        let flood = std::io::Cursor::new(b"+hi\r\n".repeat(10_000));
        let heard = Arc::<Heard>::default();
        let mut link = Bounded { stream: flood, replies: Replies::default(), heard: Some(heard.clone()) };
        let mut read = [0; 500];
        let mut come = 0;
        while let Ok(Ok(length)) = tokio::time::timeout(std::time::Duration::ZERO, link.read(&mut read)).await {
            come += length / 5;
        }
        assert!((WAITING..WAITING + 100).contains(&come), "{come}");
        let reading = tokio::spawn(async move { link.read_exact(&mut [0; 500]).await });
        for _ in 0..200 {
            heard.one();
        }
        assert_eq!(reading.await.unwrap().unwrap(), 500);
    }
}
