//! Connections to one Ollama: made, kept for the next call, and closed.
//!
//! A connection has no task of its own. Whoever uses it drives it, so that a piece of an answer wakes one task instead of
//! two, and dropping a call closes its connection there and then.

use std::fmt;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use olol_middleware::BoxError;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::exchange::Outgoing;
use crate::security::tls::Connector;

/// Idle connections that are kept for one server.
const KEEP_IDLE: usize = 512;
/// An idle connection is closed after this time.
const IDLE_FOR: Duration = Duration::from_secs(60);

/// What a small connection reads at once, bytes. Others take what comes, up to hundreds of kilobytes, and keep the room.
const SMALL: usize = 8 << 10;

/// An idle connection is not looked at again within this time.
const BELIEVED: Duration = Duration::from_millis(10);

/// Where an Ollama listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// Host name or address, and port.
    Tcp {
        /// Name or address; an IPv6 address without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// The same, over TLS.
    Tls {
        /// Name or address; an IPv6 address without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Port of HTTP over TLS when none is given.
const TLS_PORT: u16 = 443;

/// Text that is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EndpointError(pub String);

impl Endpoint {
    /// Reads `host:port`, `[v6]:port`, `http://host:port`, `https://host` or a lone host, with a port for when none is given.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, EndpointError> {
        let bad = |why: &str| EndpointError(format!("'{text}' is not an address: {why}"));
        let secure = text.strip_prefix("https://");
        let default_port = if secure.is_some() { TLS_PORT } else { default_port };
        let rest = secure.or(text.strip_prefix("http://")).unwrap_or(text).trim_end_matches('/');
        if let Some((scheme, _)) = rest.split_once("://") {
            return Err(bad(&format!("say http:// or https:// in place of '{scheme}://', or nothing")));
        }
        if let Some((_, after)) = rest.split_once('/') {
            return Err(bad(&format!("remove the path '/{after}'")));
        }
        let (host, port) = match rest.strip_prefix('[') {
            Some(v6) => {
                let (host, after) =
                    v6.split_once(']').ok_or_else(|| bad("the bracket of the IPv6 address is not closed"))?;
                // One that only its link knows comes with the name of the interface: fe80::1%eth0.
                let (bare, scope) = host.split_once('%').map_or((host, None), |(bare, scope)| (bare, Some(scope)));
                bare.parse::<std::net::Ipv6Addr>().map_err(|_| bad("what stands in brackets is no IPv6 address"))?;
                if scope.is_some_and(str::is_empty) {
                    return Err(bad("the name of an interface is missing behind '%'"));
                }
                (host, after.strip_prefix(':').or((!after.is_empty()).then_some(after)))
            }
            None if rest.matches(':').count() > 1 => return Err(bad("write an IPv6 address in brackets: [::1]:50051")),
            None => rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port))),
        };
        if host.is_empty() {
            return Err(bad("the host is missing"));
        }
        if host.chars().any(|c| c.is_whitespace() || c.is_control() || c == '@' || c == '?' || c == '#') {
            return Err(bad("a host name has no blanks, no control characters, no '@', '?' or '#'"));
        }
        let port = match port {
            None => default_port,
            Some(port) => match u16::from_str(port) {
                Ok(port) if port != 0 => port,
                _ => return Err(bad(&format!("'{port}' is no port (1 to 65535)"))),
            },
        };
        let host = host.to_owned();
        Ok(if secure.is_some() { Self::Tls { host, port } } else { Self::Tcp { host, port } })
    }

    /// Whether it is reached over TLS.
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls { .. })
    }

    /// Host and port, or the path of the socket.
    pub fn authority(&self) -> String {
        match self {
            Self::Tcp { host, port } | Self::Tls { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Tcp { host, port } | Self::Tls { host, port } => format!("{host}:{port}"),
            Self::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// What stands in the `Host` header of a request to it.
    pub(super) fn host_header(&self) -> HeaderValue {
        let host = match self {
            // The name of an interface is nobody else's business.
            Self::Tcp { host, port } | Self::Tls { host, port } if host.contains('%') => {
                format!("[{}]:{port}", host.split('%').next().unwrap_or_default())
            }
            // As browsers have it: who tells many hosts apart knows them so.
            Self::Tls { host, port: TLS_PORT } if !host.contains(':') => host.clone(),
            Self::Tcp { .. } | Self::Tls { .. } => self.authority(),
            Self::Unix(_) => "localhost".to_owned(),
        };
        HeaderValue::from_str(&host).unwrap_or(HeaderValue::from_static("localhost"))
    }

    async fn connect(&self, tls: Option<&Connector>) -> std::io::Result<Stream> {
        match self {
            Self::Tcp { host, port } => Ok(Either::Left(dial(host, *port).await?)),
            Self::Tls { host, port } => {
                let Some(tls) = tls else { return Err(std::io::Error::other("nobody here trusts any CA")) };
                let stream = tls.connect(host, dial(host, *port).await?).await?;
                Ok(Either::Right(Either::Right(Box::new(stream))))
            }
            Self::Unix(path) => Ok(Either::Right(Either::Left(UnixStream::connect(path).await?))),
        }
    }
}

async fn dial(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection in plain, over a socket of this machine, or, in a box since it is large and seldom, over TLS.
type Stream = Either<TcpStream, Either<UnixStream, Box<TlsStream<TcpStream>>>>;

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_tls() {
            f.write_str("https://")?;
        }
        f.write_str(&self.authority())
    }
}

/// One connection, driven by who holds it.
pub(super) struct Link {
    sender: http1::SendRequest<Outgoing>,
    connection: http1::Connection<TokioIo<Stream>, Outgoing>,
    /// Whether the connection is over.
    closed: bool,
    idle_since: Instant,
}

impl Link {
    /// Sends a request, and waits for the head of the answer.
    pub(super) fn ask(
        mut self: Box<Self>,
        request: Request<Outgoing>,
    ) -> impl Future<Output = hyper::Result<(Box<Self>, Response<Incoming>)>> + Send {
        Asking { answer: self.sender.send_request(request), link: Some(self) }
    }

    /// Moves bytes. True if that may have brought something for the reader of the body.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) -> bool {
        if self.closed {
            return false;
        }
        // An error reaches the reader through the body, with its reason.
        self.closed = Pin::new(&mut self.connection).poll(cx).is_ready();
        true
    }

    /// Whether another call can be sent over it, as far as the connection knows.
    fn is_ready(&self) -> bool {
        !self.closed && self.sender.is_ready()
    }

    /// Whether another call can be sent over it, after a look at what the server has sent meanwhile.
    fn is_alive(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx);
        self.is_ready()
    }
}

pin_project_lite::pin_project! {
    /// A request on its way. An own type, since an `async fn` would hold the request twice.
    struct Asking<F> {
        #[pin]
        answer: F,
        link: Option<Box<Link>>,
    }
}

impl<F: Future<Output = hyper::Result<Response<Incoming>>>> Future for Asking<F> {
    type Output = hyper::Result<(Box<Link>, Response<Incoming>)>;

    /// A server may answer and close before it has read the whole body: its word counts more than the failure to send the
    /// rest.
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(mut link) = this.link.take() else { return Poll::Pending };
        let moved = if link.closed { Poll::Pending } else { Pin::new(&mut link.connection).poll(cx) };
        link.closed |= moved.is_ready();
        match (moved, this.answer.as_mut().poll(cx)) {
            (_, Poll::Ready(Ok(response))) => Poll::Ready(Ok((link, response))),
            (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            (_, Poll::Pending) if link.closed => {
                // It ended before it took the request, and says so when it goes.
                drop(link);
                match ready!(this.answer.poll(cx)) {
                    Err(error) => Poll::Ready(Err(error)),
                    Ok(_) => Poll::Pending,
                }
            }
            (_, Poll::Pending) => {
                *this.link = Some(link);
                Poll::Pending
            }
        }
    }
}

/// The connections of one server.
pub(super) struct Links {
    endpoint: Endpoint,
    /// Who counts, where it is reached over TLS.
    tls: Option<Connector>,
    timeout: Duration,
    /// Whether connections take as little room as they can.
    are_small: bool,
    /// Connections that were made so far.
    made: AtomicU64,
    #[expect(clippy::vec_box, reason = "a link is more than a kilobyte, and goes from hand to hand with every call")]
    idle: Mutex<Vec<Box<Link>>>,
}

impl Links {
    pub(super) fn new(endpoint: Endpoint, tls: Option<Connector>, timeout: Duration) -> Self {
        Self { endpoint, tls, timeout, are_small: false, made: AtomicU64::new(0), idle: Mutex::new(Vec::new()) }
    }

    /// Others to the same server that take little room.
    pub(super) fn small(&self) -> Self {
        Self { are_small: true, ..Self::new(self.endpoint.clone(), self.tls.clone(), self.timeout) }
    }

    /// Connections that were made so far: whoever answers is the same process as long as there is none more.
    pub(super) fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The connection that was used last, if one is ready. One that was alive a moment ago is believed to be so still: if
    /// it is not, the call is sent again over a new one.
    pub(super) fn pooled(&self) -> Option<Box<Link>> {
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            let mut link = self.idle().pop()?;
            if link.idle_since.elapsed() < BELIEVED || link.is_alive(&mut cx) {
                return Some(link);
            }
        }
    }

    /// A new connection, within the usual time or another limit.
    pub(super) async fn connect(&self, limit: Option<Duration>) -> Result<Box<Link>, BoxError> {
        let limit = limit.unwrap_or(self.timeout);
        let connecting = async {
            let io = TokioIo::new(self.endpoint.connect(self.tls.as_ref()).await?);
            let (sender, connection) =
                http1::Builder::new().read_buf_exact_size(self.are_small.then_some(SMALL)).handshake(io).await?;
            self.made.fetch_add(1, Ordering::Relaxed);
            Ok(Box::new(Link { sender, connection, closed: false, idle_since: Instant::now() }))
        };
        match tokio::time::timeout(limit, connecting).await {
            Ok(link) => link,
            Err(_) => Err(format!("no connection after {} ms", limit.as_millis()).into()),
        }
    }

    /// Keeps a connection for the next call, if it can carry one.
    pub(super) fn put(&self, mut link: Box<Link>, cx: &mut Context<'_>) {
        // Mostly it has read the end of the answer already, and needs no turn for that.
        if link.is_ready() || link.is_alive(cx) {
            link.idle_since = Instant::now();
            let mut idle = self.idle();
            if idle.len() < KEEP_IDLE {
                idle.push(link);
            }
        }
    }

    /// Closes what has died or was idle for too long.
    pub(super) fn sweep(&self) {
        let mut cx = Context::from_waker(Waker::noop());
        self.idle().retain_mut(|link| link.idle_since.elapsed() < IDLE_FOR && link.is_alive(&mut cx));
    }

    #[expect(clippy::vec_box, reason = "as above")]
    fn idle(&self) -> MutexGuard<'_, Vec<Box<Link>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        for (text, shown) in [
            ("a:50051", "a:50051"),
            ("a", "a:11434"),
            ("http://b:1/", "b:1"),
            ("[::1]:50051", "[::1]:50051"),
            ("[::1]", "[::1]:11434"),
            ("http://[::1]:8", "[::1]:8"),
            ("[fe80::1%eth0]:8", "[fe80::1%eth0]:8"),
            ("https://a", "https://a:443"),
            ("https://[::1]:8/", "https://[::1]:8"),
        ] {
            assert_eq!(Endpoint::parse(text, 11434).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn a_host_is_told_as_browsers_tell_it() {
        for (text, host) in [
            ("https://a", "a"),
            ("https://a:8443", "a:8443"),
            ("http://a:443", "a:443"),
            ("https://[::1]", "[::1]:443"),
            ("[fe80::1%eth0]:8", "[fe80::1]:8"),
        ] {
            assert_eq!(Endpoint::parse(text, 11434).unwrap().host_header(), host);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_a_reason() {
        for (text, why) in [
            ("", "the host is missing"),
            (":80", "the host is missing"),
            ("a:b", "'b' is no port"),
            ("a:0", "'0' is no port"),
            ("a:99999", "is no port"),
            ("::1:80", "in brackets"),
            ("[::1:80", "not closed"),
            ("[xyz]:80", "no IPv6 address"),
            ("[fe80::1%]:80", "interface is missing"),
            ("http://a/path", "remove the path '/path'"),
            ("https://a/path", "remove the path '/path'"),
            ("ftp://a", "say http:// or https:// in place of 'ftp://'"),
            ("a b", "no blanks"),
            ("a\u{1b}[2Jb", "no control characters"),
        ] {
            let error = Endpoint::parse(text, 1).unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }
}
