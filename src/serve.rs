//! Takes connections, tells HTTP/1 from HTTP/2, and ends gracefully: what runs may finish, nothing new is taken.

mod heads;
mod paced;
mod preamble;
mod strangers;
mod wire;

use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::TryFutureExt;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use olol_middleware::{BoxError, instruments};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tower::Service;

use crate::pool::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::security::Seldom;
use crate::security::tls::{Accepted, Acceptor};
use paced::Paced;
use preamble::Preamble;
pub use strangers::Room;
use strangers::{Place, Strangers};
use wire::Brief;

/// The longest head of a request, bytes: Go's limit and its tolerance.
const LONGEST_HEAD: usize = (1 << 20) + 4096;
/// Header lines that hyper takes without being told.
const FEW_LINES: usize = 100;
/// Time between two warnings that connections cannot be taken.
const WARN_EVERY: Duration = Duration::from_secs(10);
/// Silence after which a connection that has not yet asked anything is closed. One that has is kept for as long as its
/// client is there, as Ollama does it.
const IDLE: Duration = Duration::from_secs(600);
/// Silence after which the kernel looks whether a client is still there, and again; Go's figure.
const ALIVE: Duration = Duration::from_secs(15);
/// Silence after which an HTTP/2 peer is probed, and after which a probe counts as lost.
const PROBE: Duration = Duration::from_secs(20);

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// The address of ours at which it has reached us, if that is known.
    pub here: Option<SocketAddr>,
    /// Whether it has shown the certificate of a machine of the cluster.
    pub is_machine: bool,
    /// Whether it has become known, by a certificate or by what it has said since. One who has not is not kept.
    pub is_known: Arc<AtomicBool>,
}

/// How much one HTTP/2 connection may carry at the same time.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Streams.
    pub streams: u32,
    /// Bytes of all of them together that were sent and not yet read.
    pub unread: u32,
}

impl Bounds {
    /// For a proxy of the cluster, whose streams must not wait for each other.
    pub const CLUSTER: Self = Self { streams: 16_384, unread: CONNECTION_WINDOW };
    /// For anybody: streams times the window of a stream would be gigabytes.
    pub const ANYBODY: Self = Self { streams: 4096, unread: 64 << 20 };
}

/// A connection, with TLS or without.
type Stream = Accepted;

/// Answers requests.
pub trait Answers: Clone + Send + 'static {
    /// The body of its answers.
    type Body: http_body::Body<Data = bytes::Bytes, Error: Into<BoxError>> + Send + Unpin + 'static;
    /// What answers the requests of one connection.
    type Service: Service<Request<Incoming>, Response = Response<Self::Body>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static;

    /// The time within which a client must have asked something, and have become known; `None`: it may take its time, and
    /// need not.
    const INTRODUCTION: Option<Duration> = None;

    /// The longest head of a request, bytes.
    const LONGEST_HEAD: usize = LONGEST_HEAD;
    /// How much one of its connections of HTTP/2 may carry.
    const BOUNDS: Bounds = Bounds::ANYBODY;
    /// How many may be here at a time who have not asked anything yet, or not become known where they must.
    const ROOM: Room = Room { all: 4096, one: 1024 };

    /// The service of the connection of a client.
    fn service(&self, peer: Peer) -> Self::Service;

    /// Whether the answer takes so little that it is given to a client, too, that has shut down its sending side. In all
    /// other cases such a client has left.
    fn is_brief(_request: &Request<Incoming>) -> bool {
        false
    }
}

/// Connections that may wait to be taken. As many as nginx and Go ask for: who comes when they are full tries again after a
/// whole second.
const BACKLOG: u32 = 4096;

/// Listens at an address, with room for many clients that come at the same moment.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // As the standard library does: a server that is started again need not wait for old connections to be forgotten.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until `stop`, over TLS if there is an acceptor, then lets what runs finish within `grace`. True if all of it did.
pub async fn serve<A: Answers>(
    listener: TcpListener,
    answers: A,
    tls: Option<Acceptor>,
    stop: CancellationToken,
    grace: Duration,
) -> bool {
    let (open, closing) = (TaskTracker::new(), Closing::default());
    let strangers = Strangers::new(A::ROOM);
    let warned = Seldom::every(WARN_EVERY);
    loop {
        let (stream, client) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Too many open files, mostly: connections that end make room.
                    if warned.may_speak() {
                        tracing::warn!(%error, "a connection could not be taken");
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let place = strangers.take(client.ip());
        let here = stream.local_addr().ok();
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(ALIVE).with_interval(ALIVE));
        let (answers, tls, closing) = (answers.clone(), tls.clone(), closing.clone());
        open.spawn(async move {
            let beginning = async {
                let (stream, is_machine) = match &tls {
                    None => (Stream::Left(stream), false),
                    // In a box: connections without TLS need no room for it.
                    Some(tls) => Box::pin(tls.accept(stream)).await?,
                };
                Ok::<_, std::io::Error>((
                    preamble::read(stream, A::INTRODUCTION.unwrap_or(IDLE), A::LONGEST_HEAD).await,
                    is_machine,
                ))
            };
            let begun = tokio::select! {
                () = closing.signal.cancelled() => return,
                () = place.must_go() => return made_room(client),
                begun = beginning => begun,
            };
            let (preamble, is_machine) = match begun {
                Ok(begun) => begun,
                Err(error) => {
                    instruments::connection_given_up(if error.kind() == ErrorKind::TimedOut { "slow" } else { "tls" });
                    return tracing::debug!(%client, %error, "no handshake");
                }
            };
            let is_known = Arc::new(AtomicBool::new(is_machine));
            let service = answers.service(Peer { address: client, here, is_machine, is_known: is_known.clone() });
            // Who has sent the whole head of a request has asked something.
            let has_asked = Arc::new(AtomicBool::new(matches!(preamble, Preamble::Http1(..))));
            let (limit, is_let_in) = match A::INTRODUCTION {
                None => (IDLE, has_asked.clone()),
                Some(limit) => (limit, is_known),
            };
            let place = (A::INTRODUCTION.is_some() || !has_asked.load(Ordering::Relaxed)).then_some(place);
            // Pinned where it is: awaited as it stands, it would be there once more for each place that awaits it.
            let mut connection = pin!(connection::<A>(preamble, service, has_asked, closing));
            let ended = match place {
                None => connection.await,
                Some(place) => tokio::select! {
                    ended = &mut connection => ended,
                    () = outstays(limit, &is_let_in, place) => {
                        return made_room(client);
                    }
                },
            };
            if let Err(error) = ended {
                tracing::debug!(%client, %error, "a connection ended early");
            }
        });
    }
    drop(listener);
    closing.tell();
    open.close();
    tokio::time::timeout(grace, open.wait()).await.is_ok()
}

/// Ends after this time if the client is not known by then.
pub(crate) async fn stays_unknown(limit: Duration, is_known: &AtomicBool) {
    tokio::time::sleep(limit).await;
    if is_known.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

/// Ends when a stranger has to go: he has not become known in time, or has to make room for another before that. His place is
/// free then, also where he is known by now and stays.
async fn outstays(limit: Duration, is_let_in: &AtomicBool, place: Place) {
    let _ = tokio::time::timeout(limit, place.must_go()).await;
    drop(place);
    if is_let_in.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

fn made_room(client: SocketAddr) {
    instruments::connection_given_up("stranger");
    tracing::debug!(%client, "nobody whom we know, or who has asked anything");
}

async fn connection<A: Answers>(
    preamble: Preamble,
    service: A::Service,
    has_asked: Arc<AtomicBool>,
    closing: Closing,
) -> Result<(), hyper::Error> {
    match preamble {
        Preamble::Gone => Ok(()),
        Preamble::Refused(mut io, answer) => {
            let _ = io.write_all(answer).await;
            let _ = io.shutdown().await;
            Ok(())
        }
        Preamble::Http1(io, lines) => {
            let (turn, line) = (io.turn(), io.line());
            let service = hyper::service::service_fn(move |request| {
                let brief = Brief::begin(&turn, A::is_brief(&request));
                let line = line.clone();
                service.clone().call(request).map_ok(|answer| answer.map(|body| Paced::new(body, line, brief)))
            });
            let mut builder = http1::Builder::new();
            if lines > FEW_LINES {
                // Only then: room for more than usual is no longer on the stack.
                builder.max_headers(lines);
            }
            let connection = builder
                .title_case_headers(true)
                .max_buf_size(A::LONGEST_HEAD)
                // A token is written as one piece: see `paced`.
                .writev(false)
                .serve_connection(TokioIo::new(io), service);
            // An agent that joins turns its connection round.
            let connection = connection.with_upgrades();
            Gentle::new(connection, closing, http1::UpgradeableConnection::graceful_shutdown).await
        }
        Preamble::Http2(io) => {
            let service = hyper::service::service_fn(move |request| {
                has_asked.store(true, Ordering::Relaxed);
                service.clone().call(request)
            });
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder.keep_alive_interval(PROBE).keep_alive_timeout(PROBE);
            let connection = with_room(&mut builder, A::BOUNDS).serve_connection(TokioIo::new(io), service);
            // In a box: connections of HTTP/1 need no room for it.
            Box::pin(Gentle::new(connection, closing, http2::Connection::graceful_shutdown)).await
        }
    }
}

/// Answers who was dialled and calls over that connection, until it leaves, or until `stop` and what runs then is done.
/// `probe`: silence after which it is probed, and after which a probe counts as lost.
pub(crate) async fn serve_dialled<I, S, B>(
    io: I,
    service: S,
    probe: Duration,
    stop: &CancellationToken,
) -> Result<(), hyper::Error>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible, Future: Send> + Clone + Send + 'static,
    B: http_body::Body<Data = bytes::Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let service = hyper::service::service_fn(move |request| service.clone().call(request));
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.keep_alive_interval(probe).keep_alive_timeout(probe);
    let mut connection = std::pin::pin!(with_room(&mut builder, Bounds::CLUSTER).serve_connection(io, service));
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// HTTP/2 whose streams do not wait for each other.
fn with_room(builder: &mut http2::Builder<TokioExecutor>, bounds: Bounds) -> &mut http2::Builder<TokioExecutor> {
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(bounds.unread)
        .max_concurrent_streams(bounds.streams)
        .max_send_buf_size(64 << 10)
}

/// Tells connections that it is time to end.
#[derive(Clone, Default)]
struct Closing {
    signal: CancellationToken,
    /// Whether the signal was given: asked without a lock.
    told: Arc<AtomicBool>,
}

impl Closing {
    fn tell(&self) {
        self.told.store(true, Ordering::Release);
        self.signal.cancel();
    }
}

pin_project_lite::pin_project! {
    /// A connection that ends gracefully when it is told to.
    ///
    /// What hyper-util's `GracefulShutdown` is, but that the signal is asked only twice: when the connection begins, to be
    /// woken by it, and when it has come. A connection is polled for every piece of an answer.
    struct Gentle<C> {
        #[pin]
        connection: C,
        signal: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
        is_listening: bool,
        told: Arc<AtomicBool>,
        end: fn(Pin<&mut C>),
    }
}

impl<C: Future> Gentle<C> {
    fn new(connection: C, closing: Closing, end: fn(Pin<&mut C>)) -> Self {
        let Closing { signal, told } = closing;
        Self { connection, signal: Some(Box::pin(signal.cancelled_owned())), is_listening: false, told, end }
    }
}

impl<C: Future> Future for Gentle<C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let mut this = self.project();
        if let Some(signal) = this.signal
            && (!std::mem::replace(this.is_listening, true) || this.told.load(Ordering::Acquire))
            && signal.as_mut().poll(cx).is_ready()
        {
            *this.signal = None;
            (this.end)(this.connection.as_mut());
        }
        this.connection.poll(cx)
    }
}
