//! A fake Ollama: it has the models that a test gives it, does what the test says, and remembers what it saw.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::either::Either;

use super::store::Store;
use super::wire::{self, Head, Headers};
use super::{answers, patiently};

/// The most of a body that is remembered; of longer ones only the length is.
const REMEMBERED: u64 = 4 << 20;

/// A fake Ollama that listens.
#[derive(Debug)]
pub struct Server {
    address: Option<SocketAddr>,
    state: Arc<watch::Sender<State>>,
    tasks: Mutex<JoinSet<()>>,
}

/// All that is known of a server; whoever waits for something watches it.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) store: Store,
    pub(super) behaviour: Behaviour,
    pub(super) words: Vec<String>,
    scripts: HashMap<(String, String), Vec<Step>>,
    is_silent: bool,
    is_dead: bool,
    takes_no_blobs: bool,
    written: u64,
    seen: Vec<Seen>,
    work: usize,
    running: usize,
    cancelled: usize,
    connections: usize,
}

/// What a server does when a model is asked something.
#[derive(Clone, Debug, Default)]
pub(super) enum Behaviour {
    #[default]
    Answers,
    DiesBeforeHead,
    DiesAfter,
    DiesOnReuse,
    StallsBeforeHead,
    StallsAfter,
    LoadsUntil(Gate),
    Paced(Gate),
    Floods,
    Refuses(u16, String),
}

/// One step of an answer.
#[derive(Clone, Debug)]
pub enum Step {
    /// Writes these bytes, in one write.
    Write(Vec<u8>),
    /// Writes these bytes for as long as somebody takes them.
    Repeat(Vec<u8>),
    /// Waits at a gate.
    Wait(Gate),
    /// Has a model in memory from now on.
    Load(String),
    /// Has a model on the disk from now on.
    Add(String),
    /// Does nothing, until the other side goes.
    Stall,
    /// Closes the connection.
    HangUp,
}

/// Something that waits until a test lets it go on.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Semaphore>);

impl Gate {
    /// A gate that is closed.
    pub fn closed() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    /// Lets so many go on, of those who wait now or come later.
    pub fn let_through(&self, count: usize) {
        self.0.add_permits(count);
    }

    /// Lets all go on.
    pub fn open(&self) {
        self.0.close();
    }

    async fn pass(&self) {
        if let Ok(permit) = self.0.acquire().await {
            permit.forget();
        }
    }
}

/// A request as a server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its method.
    pub method: String,
    /// Its path.
    pub path: String,
    /// Its headers.
    pub headers: Headers,
    /// Its body; empty if it was too long to be remembered.
    pub body: Vec<u8>,
    /// Bytes of its body.
    pub length: u64,
    /// Whether its connection had carried a request before.
    pub is_reused: bool,
}

impl Seen {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A text of the body; empty if it is not there.
    pub fn text(&self, key: &str) -> String {
        self.json()[key].as_str().unwrap_or_default().to_owned()
    }

    /// The model that is asked for.
    pub fn model(&self) -> String {
        let model = self.text("model");
        if model.is_empty() { self.text("name") } else { model }
    }

    pub(super) fn streams(&self) -> bool {
        self.json()["stream"]
            .as_bool()
            .unwrap_or(self.path.starts_with("/api/"))
    }

    pub(super) fn unloads(&self) -> bool {
        let body = self.json();
        let asks =
            !self.text("prompt").is_empty() || body["messages"].as_array().is_some_and(|messages| !messages.is_empty());
        !asks && (body["keep_alive"] == 0 || body["keep_alive"] == "0s")
    }
}

impl Server {
    /// A server on a port of its own.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self::listen(Some(address), Listener::Tcp(listener))
    }

    /// A server on a Unix socket: only who knows the path can reach it.
    pub fn start_at(path: &Path) -> Self {
        Self::listen(None, Listener::Unix(UnixListener::bind(path).unwrap()))
    }

    fn listen(address: Option<SocketAddr>, listener: Listener) -> Self {
        let state = State {
            words: words(["Hello", " world"]),
            ..State::default()
        };
        let state = Arc::new(watch::Sender::new(state));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, state.clone()));
        Self {
            address,
            state,
            tasks: Mutex::new(tasks),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address.expect("a server on TCP")
    }

    /// Ends: takes no connection any more, and closes those that it has.
    pub fn dies(&self) {
        self.state.send_modify(|state| state.is_dead = true);
        self.tasks.lock().unwrap().abort_all();
    }

    // What it has.

    /// Has models on its disk.
    pub fn has(&self, model: &str) -> &Self {
        self.change(|state| state.store.add(model, None))
    }

    /// Has a model that was last changed at a certain time.
    pub fn has_since(&self, model: &str, modified_at: &str) -> &Self {
        self.change(|state| state.store.add(model, Some(modified_at)))
    }

    /// Has a model on its disk and in its memory.
    pub fn has_loaded(&self, model: &str) -> &Self {
        self.has(model).change(|state| state.store.load(model))
    }

    /// Has one of its models in its memory, too.
    pub fn keeps_loaded(&self, model: &str) -> &Self {
        self.change(|state| state.store.load(model))
    }

    /// Lost a model, and told nobody.
    pub fn lost(&self, model: &str) -> &Self {
        self.change(|state| {
            state.store.remove(model);
            state.store.unload(model);
        })
    }

    /// Reports a version.
    pub fn is_version(&self, version: &str) -> &Self {
        self.change(|state| version.clone_into(&mut state.store.version))
    }

    /// Whether a model is on its disk.
    pub fn still_has(&self, model: &str) -> bool {
        self.state.borrow().store.has(model)
    }

    /// The models on its disk and in its memory.
    pub fn holds(&self) -> (Vec<String>, Vec<String>) {
        let state = self.state.borrow();
        (state.store.names(), state.store.loaded())
    }

    // What it does when a model is asked something.

    /// Says these words, a line each.
    pub fn says<const N: usize>(&self, said: [&str; N]) -> &Self {
        self.behaves(Behaviour::Answers)
            .change(|state| state.words = words(said))
    }

    /// Says its words again, after it did something else.
    pub fn recovers(&self) -> &Self {
        self.behaves(Behaviour::Answers)
    }

    /// Closes the connection instead of answering.
    pub fn dies_before_head(&self) -> &Self {
        self.behaves(Behaviour::DiesBeforeHead)
    }

    /// Closes the connection after these words.
    pub fn dies_after<const N: usize>(&self, said: [&str; N]) -> &Self {
        self.says(said).behaves(Behaviour::DiesAfter)
    }

    /// Closes a connection that is used a second time, instead of answering.
    pub fn dies_on_reuse(&self) -> &Self {
        self.behaves(Behaviour::DiesOnReuse)
    }

    /// Never answers.
    pub fn stalls_before_head(&self) -> &Self {
        self.behaves(Behaviour::StallsBeforeHead)
    }

    /// Says these words and never another.
    pub fn stalls_after<const N: usize>(&self, said: [&str; N]) -> &Self {
        self.says(said).behaves(Behaviour::StallsAfter)
    }

    /// Loads a model that is not in memory until the gate lets it; gives the load up when its client goes.
    pub fn loads_until(&self, gate: &Gate) -> &Self {
        self.behaves(Behaviour::LoadsUntil(gate.clone()))
    }

    /// Says each word, and the end, when the gate lets it.
    pub fn is_paced_by(&self, gate: &Gate) -> &Self {
        self.behaves(Behaviour::Paced(gate.clone()))
    }

    /// Talks without end, as fast as it is read.
    pub fn floods(&self) -> &Self {
        self.behaves(Behaviour::Floods)
    }

    /// Refuses.
    pub fn refuses(&self, status: u16, text: &str) -> &Self {
        self.behaves(Behaviour::Refuses(status, text.to_owned()))
    }

    /// Has its queue full.
    pub fn is_busy(&self) -> &Self {
        self.refuses(503, "server busy, please try again.  maximum pending requests exceeded")
    }

    /// Takes connections and requests, and answers none of them.
    pub fn is_silent(&self) -> &Self {
        self.change(|state| state.is_silent = true)
    }

    /// Leaves the bodies of uploads unread.
    pub fn takes_no_blobs(&self) -> &Self {
        self.change(|state| state.takes_no_blobs = true)
    }

    /// Takes these steps for a certain request, whatever else it would do.
    pub fn on(&self, method: &str, path: &str, steps: Vec<Step>) -> &Self {
        self.change(|state| drop(state.scripts.insert((method.to_owned(), path.to_owned()), steps)))
    }

    /// Answers a certain request with an error.
    pub fn fails(&self, method: &str, path: &str, status: u16, text: &str) -> &Self {
        let body = serde_json::json!({"error": text}).to_string();
        self.on(
            method,
            path,
            answers::whole(status, "application/json; charset=utf-8", body),
        )
    }

    fn behaves(&self, behaviour: Behaviour) -> &Self {
        self.change(|state| state.behaviour = behaviour)
    }

    fn change(&self, change: impl FnOnce(&mut State)) -> &Self {
        self.state.send_modify(change);
        self
    }

    // What it saw.

    /// The requests for a path, so far.
    pub fn seen(&self, path: &str) -> Vec<Seen> {
        self.state
            .borrow()
            .seen
            .iter()
            .filter(|seen| seen.path == path)
            .cloned()
            .collect()
    }

    /// Requests to models, so far.
    pub fn work(&self) -> usize {
        self.state.borrow().work
    }

    /// Connections that it ever took.
    pub fn connections(&self) -> usize {
        self.state.borrow().connections
    }

    /// Answers that it is giving.
    pub fn running(&self) -> usize {
        self.state.borrow().running
    }

    /// Whether it will ever answer a question about its state.
    pub fn answers(&self) -> bool {
        let state = self.state.borrow();
        !state.is_silent && !state.is_dead
    }

    /// Waits until models were asked so many times, since it started.
    pub async fn asked(&self, times: usize) {
        self.sees(&format!("{times} requests to models"), |state| state.work >= times)
            .await;
    }

    /// Waits until there was such a request.
    pub async fn saw(&self, path: &str) {
        self.sees(path, |state| state.seen.iter().any(|seen| seen.path == path))
            .await;
    }

    /// Waits until a client went away before its answer was whole.
    pub async fn saw_cancel(&self) {
        self.saw_cancels(1).await;
    }

    /// Waits until so many clients went away before their answers were whole.
    pub async fn saw_cancels(&self, count: usize) {
        self.sees(&format!("{count} cancelled requests"), |state| state.cancelled >= count)
            .await;
    }

    /// Answers that nobody waited for, so far.
    pub fn cancelled(&self) -> usize {
        self.state.borrow().cancelled
    }

    /// Waits until it has a model in memory.
    pub async fn has_in_memory(&self, model: &str) {
        let name = super::store::full(model);
        self.sees(&format!("{model} in memory"), |state| {
            state.store.loaded().contains(&name)
        })
        .await;
    }

    /// Waits until nobody takes any more of what it writes: all that is between it and its clients is full.
    pub async fn is_stuck(&self) {
        let pause = Duration::from_millis(200);
        let stuck = async {
            loop {
                let before = self.state.borrow().written;
                tokio::time::sleep(pause).await;
                if before == self.state.borrow().written {
                    return;
                }
            }
        };
        patiently("a server is stuck", stuck).await;
    }

    async fn sees(&self, what: &str, is_there: impl FnMut(&State) -> bool) {
        let mut watch = self.state.subscribe();
        patiently(&format!("a server sees {what}"), watch.wait_for(is_there))
            .await
            .unwrap();
    }
}

impl State {
    fn steps(&mut self, request: &Seen) -> Vec<Step> {
        if self.is_silent {
            return vec![Step::Stall];
        }
        match self.scripts.get(&(request.method.clone(), request.path.clone())) {
            Some(steps) => steps.clone(),
            None => answers::steps(self, request),
        }
    }
}

fn words<const N: usize>(said: [&str; N]) -> Vec<String> {
    said.map(str::to_owned).to_vec()
}

enum Listener {
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

type Shared = Arc<watch::Sender<State>>;

/// Takes connections until it is dropped, and with it all of them.
async fn accept(listener: Listener, state: Shared) {
    let mut connections = JoinSet::new();
    while let Ok(stream) = listener.accept().await {
        state.send_modify(|state| state.connections += 1);
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
        if state.borrow().takes_no_blobs && head.line.starts_with("POST /api/blobs/") {
            return std::future::pending().await;
        }
        let request = read_request(head, &mut read, is_reused).await?;
        let steps = steps(&state, request);
        let goes_on = tokio::select! {
            taken = take(steps, &mut write, &state) => taken?,
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
        Self {
            state: state.clone(),
            counts,
            is_whole: false,
        }
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
    Ok(Seen {
        method,
        path,
        headers: head.headers,
        body,
        length,
        is_reused,
    })
}

/// Remembers a request and decides what it gets.
fn steps(state: &Shared, request: Seen) -> Vec<Step> {
    let mut steps = Vec::new();
    state.send_modify(|state| {
        steps = state.steps(&request);
        state.work += usize::from(answers::is_work(&request.path));
        state.seen.push(request);
    });
    steps
}

/// Takes the steps of an answer. False if the connection is to be closed behind it.
async fn take(steps: Vec<Step>, write: &mut (impl AsyncWrite + Unpin), state: &Shared) -> io::Result<bool> {
    for step in steps {
        match step {
            Step::Write(bytes) => write_through(write, &bytes).await?,
            Step::Repeat(bytes) => loop {
                write_through(write, &bytes).await?;
                state.send_modify(|state| state.written += bytes.len() as u64);
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

async fn write_through(write: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    write.write_all(bytes).await?;
    write.flush().await
}

/// Waits until the client has closed.
async fn gone(read: &mut (impl AsyncBufRead + Unpin)) {
    match read.fill_buf().await {
        Ok([]) | Err(_) => {}
        // The next request is waiting already; this client is not gone.
        Ok(_) => std::future::pending().await,
    }
}
