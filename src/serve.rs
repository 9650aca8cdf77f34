//! Takes connections, tells HTTP/1 from HTTP/2, and ends gracefully: what runs may finish, nothing new is taken.

mod preamble;
mod wire;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use olol_middleware::BoxError;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::pool::{CONNECTION_WINDOW, STREAM_WINDOW};
use preamble::Preamble;
use wire::Brief;

/// The longest head of a request, bytes: Go's limit and its tolerance.
const LONGEST_HEAD: usize = (1 << 20) + 4096;
/// Header lines that hyper takes without being told.
const FEW_LINES: usize = 100;
/// Silence after which an HTTP/1 connection without a request is closed.
const IDLE: Duration = Duration::from_secs(600);
/// Streams that one HTTP/2 connection may carry at the same time.
const STREAMS: u32 = 16_384;
/// Silence after which an HTTP/2 peer is probed, and after which a probe counts as lost.
const PROBE: Duration = Duration::from_secs(20);

/// Answers requests. One clone a connection.
pub trait Answers: Clone + Send + 'static {
    /// The body of its answers.
    type Body: http_body::Body<Data = bytes::Bytes, Error: Into<BoxError>> + Send + Unpin + 'static;

    /// Answers one request of a client.
    fn answer(
        &self,
        request: Request<Incoming>,
        client: SocketAddr,
    ) -> impl Future<Output = Response<Self::Body>> + Send;

    /// Whether the answer takes so little that it is given to a client, too, that has shut down its sending side. In all
    /// other cases such a client has left.
    fn is_brief(&self, _request: &Request<Incoming>) -> bool {
        false
    }
}

/// The body of an answer, with what ends with it.
struct Held<B> {
    body: B,
    _brief: Brief,
}

impl<B: http_body::Body + Unpin> http_body::Body for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves until `stop`, then lets what runs finish within `grace`. True if all of it did.
pub async fn serve<A: Answers>(listener: TcpListener, answers: A, stop: CancellationToken, grace: Duration) -> bool {
    let graceful = GracefulShutdown::new();
    loop {
        let (stream, client) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Too many open files, mostly: connections that end make room.
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let _ = stream.set_nodelay(true);
        let watcher = graceful.watcher();
        let answers = answers.clone();
        let stop = stop.clone();
        tokio::spawn(async move {
            let preamble = tokio::select! {
                () = stop.cancelled() => return,
                preamble = preamble::read(stream, IDLE) => preamble,
            };
            connection(preamble, answers, client, watcher).await;
        });
    }
    drop(listener);
    tokio::select! {
        () = graceful.shutdown() => true,
        () = tokio::time::sleep(grace) => false,
    }
}

async fn connection<A: Answers>(
    preamble: Preamble,
    answers: A,
    client: SocketAddr,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let ended: Result<(), hyper::Error> = match preamble {
        Preamble::Gone => Ok(()),
        Preamble::Refused(mut io, answer) => {
            let _ = io.write_all(answer).await;
            let _ = io.shutdown().await;
            Ok(())
        }
        Preamble::Http1(io, lines) => {
            let flag = io.brief();
            let service = hyper::service::service_fn(move |request| {
                let answers = answers.clone();
                let brief = Brief::begin(&flag, answers.is_brief(&request));
                async move {
                    let answer = answers.answer(request, client).await;
                    Ok::<_, Infallible>(answer.map(|body| Held { body, _brief: brief }))
                }
            });
            let mut builder = http1::Builder::new();
            if lines > FEW_LINES {
                // Only then: room for more than usual is no longer on the stack.
                builder.max_headers(lines);
            }
            let connection = builder
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE)
                .title_case_headers(true)
                .max_buf_size(LONGEST_HEAD)
                .serve_connection(TokioIo::new(io), service);
            watcher.watch(connection).await
        }
        Preamble::Http2(io) => {
            let service = hyper::service::service_fn(move |request| {
                let answers = answers.clone();
                async move { Ok::<_, Infallible>(answers.answer(request, client).await) }
            });
            let connection = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_concurrent_streams(STREAMS)
                .max_send_buf_size(64 << 10)
                .keep_alive_interval(PROBE)
                .keep_alive_timeout(PROBE)
                .serve_connection(TokioIo::new(io), service);
            watcher.watch(connection).await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%client, %error, "a connection ended early");
    }
}
