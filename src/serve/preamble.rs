//! The first bytes of a connection: which protocol it speaks, and what Go's server refuses with another status than hyper.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// How HTTP/2 begins.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const VERSION: &[u8] = b"HTTP/1.1 505 HTTP Version Not Supported: unsupported protocol version\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n505 HTTP Version Not Supported: unsupported protocol version";
const ENCODING: &[u8] = b"HTTP/1.1 501 Not Implemented\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\nUnsupported transfer encoding";

/// What a connection began with.
pub(super) enum Preamble {
    /// Nothing: the client has left.
    Gone,
    /// A request, or something that hyper refuses.
    Http1(Prefixed<TcpStream>),
    /// The preface of HTTP/2.
    Http2(Prefixed<TcpStream>),
    /// Something that is answered with these bytes.
    Refused(Prefixed<TcpStream>, &'static [u8]),
}

/// Reads the first bytes and gives them back with the connection.
pub(super) async fn read(mut stream: TcpStream) -> Preamble {
    let mut first = BytesMut::with_capacity(4096);
    loop {
        match stream.read_buf(&mut first).await {
            Ok(0) | Err(_) => return Preamble::Gone,
            Ok(_) => {}
        }
        let could_be_h2 = HTTP2.starts_with(&first[..first.len().min(HTTP2.len())]);
        if !could_be_h2 || first.len() >= HTTP2.len() {
            let io = Prefixed { prefix: first.split().freeze(), inner: stream };
            return match (could_be_h2, refusal(&io.prefix)) {
                (true, _) => Preamble::Http2(io),
                (false, Some(answer)) => Preamble::Refused(io, answer),
                (false, None) => Preamble::Http1(io),
            };
        }
    }
}

/// The answer to a head that Go's server refuses in words of its own.
fn refusal(first: &[u8]) -> Option<&'static [u8]> {
    let end = memchr::memchr(b'\n', first)?;
    let line = first[..end].strip_suffix(b"\r").unwrap_or(&first[..end]);
    let version = line.rsplit(|byte| *byte == b' ').next()?.strip_prefix(b"HTTP/")?;
    let (major, minor) = match version {
        [major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => (major, minor),
        _ => return None,
    };
    if *major != b'1' {
        return Some(VERSION);
    }
    if *minor == b'0' {
        return None;
    }
    let head = &first[end + 1..];
    let foreign = head.split(|byte| *byte == b'\n').take_while(|line| !matches!(*line, b"" | b"\r")).any(|line| {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = line.split_at(colon);
        name.eq_ignore_ascii_case(b"transfer-encoding")
            && !value.get(1..).unwrap_or_default().trim_ascii().eq_ignore_ascii_case(b"chunked")
    });
    foreign.then_some(ENCODING)
}

/// A stream with bytes that were read before.
pub(super) struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.has_remaining() {
            let length = self.prefix.len().min(buffer.remaining());
            buffer.put_slice(&self.prefix[..length]);
            self.prefix.advance(length);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_refuses_in_other_words_is_seen() {
        assert_eq!(refusal(b"GET / HTTP/2.0\r\n\r\n"), Some(VERSION));
        assert_eq!(refusal(b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n"), Some(ENCODING));
        assert_eq!(refusal(b"POST / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n\r\n0\r\n\r\n"), None);
        assert_eq!(refusal(b"POST / HTTP/1.1\r\nHost: a\r\n\r\nTransfer-Encoding: gzip\r\n"), None);
        assert_eq!(refusal(b"garbage\r\n"), None);
        assert_eq!(refusal(b"GET / HTTP/1.1"), None);
    }
}
