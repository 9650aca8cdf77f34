//! A fake Ollama: it has the models that a test gives it, does what the test says, and remembers what it saw.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::script::{Gate, Seen, Step};
use super::serving::{self, Listener, Shared};
use super::store::Store;
use super::wire::Head;
use super::{answers, patiently};

/// A fake Ollama that listens.
#[derive(Debug)]
pub struct Server {
    address: Option<SocketAddr>,
    state: Shared,
    tasks: Mutex<JoinSet<()>>,
}

/// All that is known of a server; whoever waits for something watches it.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a trait of its own")]
pub(super) struct State {
    pub(super) store: Store,
    pub(super) behaviour: Behaviour,
    pub(super) words: Vec<String>,
    pub(super) echoes: bool,
    /// Whether it finishes prompts on request: an Ollama since 0.11.5 does.
    pub(super) renders: bool,
    /// What its models say of the length of their answers.
    pub(super) num_predict: Option<i64>,
    scripts: HashMap<(String, String), Vec<Step>>,
    is_silent: bool,
    is_dead: bool,
    uploads: Uploads,
    seen: Vec<Seen>,
    work: usize,
    /// Answers that it is giving.
    pub(super) running: usize,
    /// Answers whose clients went away.
    pub(super) cancelled: usize,
    /// Bytes of its answers that were taken.
    pub(super) written: u64,
}

/// What a server does with the body of an upload.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Uploads {
    #[default]
    Read,
    /// Reads nothing of it, and says nothing.
    Ignored,
    /// Says that it has the blob already, and reads nothing of it: what Go's server does.
    Known,
}

/// What a server does when a model is asked something.
#[derive(Clone, Debug, Default)]
pub(super) enum Behaviour {
    #[default]
    Answers,
    DiesBeforeHead,
    DiesAfter,
    DiesAfterBytes(usize),
    Breaks(String),
    DiesOnReuse,
    StallsBeforeHead,
    StallsAfter,
    LoadsUntil(Gate),
    Paced(Gate),
    Floods,
    Refuses(u16, String),
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
        let state = State { words: words(["Hello", " world"]), renders: true, ..State::default() };
        let state = Arc::new(watch::Sender::new(state));
        let mut tasks = JoinSet::new();
        tasks.spawn(serving::accept(listener, state.clone()));
        Self { address, state, tasks: Mutex::new(tasks) }
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

    /// Has a model on its disk.
    pub fn has(&self, model: &str) -> &Self {
        self.change(|state| state.store.add(model, None))
    }

    /// Has a model that was last changed at a certain time.
    pub fn has_since(&self, model: &str, modified_at: &str) -> &Self {
        self.change(|state| state.store.add(model, Some(modified_at)))
    }

    /// Has a model on its disk that differs from another in its template alone.
    pub fn has_like(&self, model: &str, other: &str) -> &Self {
        self.change(|state| state.store.add_like(model, other))
    }

    /// Has a model on its disk and in its memory.
    pub fn has_loaded(&self, model: &str) -> &Self {
        self.has(model).change(|state| state.store.load(model))
    }

    /// Has one of its models in its memory, too.
    pub fn keeps_loaded(&self, model: &str) -> &Self {
        self.change(|state| state.store.load(model))
    }

    /// Says of a model which family, number of parameters and quantization it is, instead of what its name says.
    pub fn describes(&self, model: &str, family: &str, parameter_size: &str, quantization: &str) -> &Self {
        self.change(|state| state.store.describe(model, family, parameter_size, quantization))
    }

    /// Lost a model, and told nobody.
    pub fn lost(&self, model: &str) -> &Self {
        self.change(|state| {
            state.store.remove(model);
            state.store.unload(model);
        })
    }

    /// Lost a model, and goes on listing it: whoever believes its lists believes that it has it.
    pub fn only_lists(&self, model: &str) -> &Self {
        self.change(|state| state.store.only_lists(model))
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
        self.behaves(Behaviour::Answers).change(|state| state.words = words(said))
    }

    /// Says back the last message that it is asked, a word a line.
    pub fn echoes(&self) -> &Self {
        self.change(|state| state.echoes = true)
    }

    /// Closes the connection instead of answering.
    pub fn dies_before_head(&self) -> &Self {
        self.behaves(Behaviour::DiesBeforeHead)
    }

    /// Closes the connection after these words.
    pub fn dies_after<const N: usize>(&self, said: [&str; N]) -> &Self {
        self.says(said).behaves(Behaviour::DiesAfter)
    }

    /// Closes the connection so many bytes behind the head of a stream, wherever that is.
    pub fn dies_after_bytes(&self, bytes: usize) -> &Self {
        self.behaves(Behaviour::DiesAfterBytes(bytes))
    }

    /// Ends its streams with an error line after these words.
    pub fn breaks_after<const N: usize>(&self, said: [&str; N], text: &str) -> &Self {
        self.says(said).behaves(Behaviour::Breaks(text.to_owned()))
    }

    /// Has models that say no more than this many tokens, unless they are asked for more.
    pub fn says_at_most(&self, tokens: i64) -> &Self {
        self.change(|state| state.num_predict = Some(tokens))
    }

    /// Does not know how to finish a prompt without answering it.
    pub fn renders_not(&self) -> &Self {
        self.change(|state| state.renders = false)
    }

    /// Has another model under the same name.
    pub fn has_another(&self, model: &str) -> &Self {
        self.change(|state| state.store.exchange(model))
    }

    /// Closes a connection that is used a second time, instead of answering what is asked on it.
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

    /// Answers again.
    pub fn speaks(&self) -> &Self {
        self.change(|state| state.is_silent = false)
    }

    /// Has been started again: nothing is in its memory.
    pub fn forgets_its_memory(&self) -> &Self {
        self.change(|state| state.store.loaded().iter().for_each(|model| state.store.unload(model)))
    }

    /// Leaves the bodies of uploads unread, and says nothing.
    pub fn ignores_uploads(&self) -> &Self {
        self.change(|state| state.uploads = Uploads::Ignored)
    }

    /// Answers uploads at once, and leaves their bodies unread.
    pub fn knows_every_blob(&self) -> &Self {
        self.change(|state| state.uploads = Uploads::Known)
    }

    /// Takes these steps for a certain request, whatever else it would do.
    pub fn on(&self, method: &str, path: &str, steps: Vec<Step>) -> &Self {
        self.change(|state| drop(state.scripts.insert((method.to_owned(), path.to_owned()), steps)))
    }

    /// Answers a certain request with an error.
    pub fn fails(&self, method: &str, path: &str, status: u16, text: &str) -> &Self {
        let body = serde_json::json!({"error": text}).to_string();
        self.on(method, path, answers::whole(status, "application/json; charset=utf-8", body))
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
        self.state.borrow().seen.iter().filter(|seen| seen.path == path).cloned().collect()
    }

    /// Requests to models, so far.
    pub fn work(&self) -> usize {
        self.state.borrow().work
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
        self.sees(&format!("{times} requests to models"), |state| state.work >= times).await;
    }

    /// Waits until a client went away before its answer was whole.
    pub async fn saw_cancel(&self) {
        self.saw_cancels(1).await;
    }

    /// Waits until so many clients went away before their answers were whole.
    pub async fn saw_cancels(&self, count: usize) {
        self.sees(&format!("{count} cancelled requests"), |state| state.cancelled >= count).await;
    }

    /// Waits until it has a model in memory.
    pub async fn has_in_memory(&self, model: &str) {
        let name = super::store::full(model);
        self.sees(&format!("{model} in memory"), |state| state.store.loaded().contains(&name)).await;
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
        patiently(&format!("a server sees {what}"), watch.wait_for(is_there)).await.unwrap();
    }
}

impl State {
    /// Remembers a request, and decides what it gets.
    pub(super) fn sees(&mut self, request: Seen) -> Vec<Step> {
        let script = self.scripts.get(&(request.method.clone(), request.path.clone())).cloned();
        let steps = match script {
            _ if self.is_silent => vec![Step::Stall],
            Some(steps) => steps,
            None => answers::steps(self, &request),
        };
        self.work += usize::from(answers::is_work(&request.path));
        self.seen.push(request);
        steps
    }

    /// What is done with the body of a request.
    pub(super) fn uploads(&self, head: &Head) -> Uploads {
        if head.line.starts_with("POST /api/blobs/") { self.uploads } else { Uploads::Read }
    }
}

fn words<const N: usize>(said: [&str; N]) -> Vec<String> {
    said.map(str::to_owned).to_vec()
}
