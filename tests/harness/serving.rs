//! How a fake Ollama serves its connections: it reads requests, takes the steps of their answers, and notices who leaves.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::either::Either;

use super::script::{Seen, Step};
use super::server::{State, Uploads};
use super::wire::{self, Head};

/// The most of a body that is remembered; of longer ones only the length is.
const REMEMBERED: u64 = 4 << 20;

/// The state of a server; whoever waits for something watches it.
pub(super) type Shared = Arc<watch::Sender<State>>;

/// Where connections come from.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Either<TcpStream, UnixStream>> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Either::Left(stream)
            }
            Self::Unix(listener) => Either::Right(listener.accept().await?.0),
        })
    }
}

/// Takes connections until it is dropped, and with it all of them.
pub(super) async fn accept(listener: Listener, state: Shared) {
    let mut connections = JoinSet::new();
    while let Ok(stream) = listener.accept().await {
        connections.spawn(serve(stream, state.clone()));
        while connections.try_join_next().is_some() {}
    }
}

/// Answers the requests of one connection in turn.
async fn serve(stream: impl AsyncRead + AsyncWrite, state: Shared) -> io::Result<()> {
    let (read, mut write) = tokio::io::split(stream);
    let mut read = BufReader::with_capacity(64 << 10, read);
    let mut is_reused = false;
    while let Some(head) = wire::read_head(&mut read).await? {
        let mut running = Running::begin(&state, &head);
        if head.headers.get("expect").is_some() {
            write.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        let uploads = state.borrow().uploads(&head);
        if uploads == Uploads::Known {
            write.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").await?;
            write.shutdown().await?;
        }
        if uploads != Uploads::Read {
            return std::future::pending().await;
        }
        let request = read_request(head, &mut read, is_reused).await?;
        let steps = steps(&state, request);
        let goes_on = tokio::select! {
            taken = take(steps, &mut write, &running) => taken?,
            () = gone(&mut read) => return Ok(()),
        };
        running.is_whole = true;
        if !goes_on {
            return Ok(());
        }
        is_reused = true;
    }
    Ok(())
}

/// A request under way. One that is dropped before it is whole was cancelled.
struct Running {
    state: Shared,
    counts: bool,
    is_whole: bool,
}

impl Running {
    /// Questions about the state are no work.
    fn begin(state: &Shared, head: &Head) -> Self {
        let counts = !head.line.starts_with("GET");
        state.send_modify(|state| state.running += usize::from(counts));
        Self { state: state.clone(), counts, is_whole: false }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let counts = usize::from(self.counts);
        self.state.send_modify(|state| {
            state.running -= counts;
            state.cancelled += if self.is_whole { 0 } else { counts };
        });
    }
}

/// Reads the body of a request.
async fn read_request(head: Head, read: &mut (impl AsyncBufRead + Unpin), is_reused: bool) -> io::Result<Seen> {
    let mut words = head.line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut body = Vec::new();
    let mut length = 0;
    let mut keep = |piece: &[u8]| {
        length += piece.len() as u64;
        body.extend_from_slice(if length > REMEMBERED { &[] } else { piece });
    };
    if head.headers.are_chunked() {
        while let Some(chunk) = wire::read_chunk(read).await? {
            keep(&chunk);
        }
    }
    let mut left = usize::try_from(head.headers.length().unwrap_or(0)).unwrap_or(usize::MAX);
    while left > 0 {
        let piece = read.fill_buf().await?;
        let taken = piece.len().min(left);
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        keep(&piece[..taken]);
        read.consume(taken);
        left -= taken;
    }
    Ok(Seen { method, path, headers: head.headers, body, length, is_reused })
}

/// Tells the server of a request, and has the steps of its answer.
fn steps(state: &Shared, request: Seen) -> Vec<Step> {
    let mut steps = Vec::new();
    state.send_modify(|state| steps = state.sees(request));
    steps
}

/// Takes the steps of an answer. False if the connection is to be closed behind it.
async fn take(steps: Vec<Step>, write: &mut (impl AsyncWrite + Unpin), running: &Running) -> io::Result<bool> {
    let state = &running.state;
    for step in steps {
        match step {
            Step::Write(bytes) => write_through(write, &bytes, running).await?,
            Step::Repeat(bytes) => loop {
                write_through(write, &bytes, running).await?;
            },
            Step::Wait(gate) => gate.pass().await,
            Step::Load(model) => state.send_modify(|state| state.store.load(&model)),
            Step::Add(model) => state.send_modify(|state| state.store.add(&model, None)),
            Step::Stall => std::future::pending().await,
            Step::HangUp => return Ok(false),
        }
    }
    Ok(true)
}

async fn write_through(write: &mut (impl AsyncWrite + Unpin), bytes: &[u8], running: &Running) -> io::Result<()> {
    write.write_all(bytes).await?;
    write.flush().await?;
    // Answers about the state come all the time, also from who is stuck.
    if running.counts {
        running.state.send_modify(|state| state.written += bytes.len() as u64);
    }
    Ok(())
}

/// Waits until the client has closed.
async fn gone(read: &mut (impl AsyncBufRead + Unpin)) {
    match read.fill_buf().await {
        Ok([]) | Err(_) => {}
        // The next request is waiting already; this client is not gone.
        Ok(_) => std::future::pending().await,
    }
}
