//! One pull at several servers: who asks the registry, who copies from whom, and what becomes of it.
//!
//! Of those whose agents give models away one asks the registry, and the others copy from it when it has the model; each that
//! has it then gives it on. A server that others cannot copy from, or that cannot copy, asks the registry itself. When the one
//! that asks fails, the next takes its place; of a number of servers, one that was not meant at first does.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use http::HeaderMap;
use olol_middleware::cluster::{self, Cluster};
use olol_middleware::instruments::{Arrival, arrived};
use olol_middleware::{Error, ModelName, Reply, Server, ServerId};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::replicas::ranked;
use super::told::{Board, Telling, failure};
use super::{BringError, GONE, Held, Holder, Line, Models, Replicas, Room, gone, held_by, shares, tells_of_full_disk};
use crate::ollama::lines_of;

/// Copies that one server gives at a time.
const PER_SOURCE: usize = 3;
/// The longest refusal that is read, bytes.
const LONGEST: usize = 1 << 20;
/// How long a server may take to say what it has: the others wait for it.
const LOOK: Duration = Duration::from_secs(10);
/// How long the end of a pull waits for what the servers say of themselves then.
const NEWS: Duration = Duration::from_secs(2);
/// Time between two looks whether they have said it.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Ollama's word for what the registry does not have.
const NOT_THERE: &str = "file does not exist";

/// Sends the client's own request to one server.
pub type Asking = Arc<dyn Fn(Arc<Server>) -> BoxFuture<'static, Result<Reply, Error>> + Send + Sync>;

/// What is to be pulled, and where.
pub struct Order {
    /// The model.
    pub model: ModelName,
    /// At how many servers.
    pub replicas: Replicas,
    /// The servers that may be asked.
    pub servers: Vec<Arc<Server>>,
    /// How one of them is asked to pull.
    pub ask: Asking,
}

/// The pulls that go on.
#[derive(Debug, Default)]
pub struct Running(Mutex<HashMap<Key, Weak<Pull>>>);

/// What tells one pull from another.
type Key = (ModelName, String, Vec<ServerId>);

/// A pull, as long as somebody follows it.
#[derive(Debug)]
pub struct Pull {
    state: watch::Receiver<State>,
    _task: AbortOnDropHandle<()>,
}

/// How far a pull is.
#[derive(Debug, Default)]
pub struct State {
    board: Board,
    /// Who stands on the board, by number.
    servers: Vec<ServerId>,
    /// The headers of the first good answer.
    headers: Option<HeaderMap>,
    /// Servers whose first word is still waited for.
    silent: usize,
    /// Those who did not take part, as far as that is known.
    absent: Vec<ServerId>,
    end: Option<Arc<End>>,
}

/// How a pull has ended.
#[derive(Debug)]
pub enum End {
    /// It is where it should be; Ollama's word for that.
    Success(Bytes),
    /// It is not: who failed, and why.
    Failed(String),
    /// Nobody has begun: the first refusal, for the first who takes it.
    Refused(Mutex<Option<Result<Reply, Error>>>, String),
}

/// How one server's part has ended: the last word of its Ollama, or none after a copy; and what others can copy from it, if
/// they can.
enum Ended {
    Pulled(Result<(Bytes, Option<Held>), Failure>),
    Copied(Result<Held, BringError>),
}

/// Why a server has not pulled.
struct Failure {
    why: String,
    /// What it answered, if it refused from the beginning.
    refusal: Option<Result<Reply, Error>>,
    /// Whether no other server would fare better.
    is_final: bool,
    /// Whether its disk has no room.
    is_full: bool,
}

impl Models {
    /// The pulls that go on through this proxy: the model, the server, and the share of it that is there.
    pub fn under_way(&self) -> Vec<(ModelName, ServerId, f32)> {
        let running = self.pulls.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::new();
        for ((model, ..), pull) in running.iter() {
            let Some(pull) = pull.upgrade() else { continue };
            let state = pull.state.borrow();
            if state.end.is_none() {
                let of_it = state.board.under_way();
                all.extend(of_it.filter_map(|(at, done)| Some((model.clone(), state.servers.get(at)?.clone(), done))));
            }
        }
        all
    }

    /// Begins a pull, or joins one like it that goes on.
    pub fn pull(&self, order: Order) -> Arc<Pull> {
        let mut ids: Vec<ServerId> = order.servers.iter().map(|server| server.id.clone()).collect();
        ids.sort();
        let key = (order.model.clone(), order.replicas.to_string(), ids);
        let mut running = self.pulls.0.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|_, pull| pull.strong_count() > 0);
        let joined = running.get(&key).and_then(Weak::upgrade).filter(|pull| pull.state.borrow().end.is_none());
        if let Some(pull) = joined {
            return pull;
        }
        let (tell, state) = watch::channel(State::default());
        let work = Work::new(self.clone(), order, tell);
        let task = AbortOnDropHandle::new(tokio::spawn(work.run()));
        let pull = Arc::new(Pull { state, _task: task });
        running.insert(key, Arc::downgrade(&pull));
        pull
    }

    /// What others can copy from a server that has just pulled a model: asked of itself, since nobody else knows it yet.
    async fn given_by(&self, server: &Server, model: &ModelName) -> Option<Held> {
        if self.pool.peer(server).is_none() || !shares(server) {
            return None;
        }
        let asked = tokio::time::timeout(LOOK, self.ask_for(server, model)).await;
        let late = |_| Err(BringError::Copy(format!("it does not say what it has within {} s", LOOK.as_secs())));
        asked
            .unwrap_or_else(late)
            .inspect_err(|error| tracing::warn!(server = %server.id, %error, "nobody can copy from there"))
            .ok()
    }
}

impl Pull {
    /// Waits until there is something to tell a client: the headers of a good answer and who did not take part, or an end.
    pub async fn begun(&self) -> (HeaderMap, Vec<ServerId>, Option<Arc<End>>) {
        let mut state = self.state.clone();
        let is_known = |state: &State| state.end.is_some() || (state.headers.is_some() && state.silent == 0);
        match state.wait_for(is_known).await {
            Ok(state) => (state.headers.clone().unwrap_or_default(), state.absent.clone(), state.end.clone()),
            Err(_) => (HeaderMap::new(), Vec::new(), Some(Arc::new(End::broken()))),
        }
    }

    /// Waits for the end, and says who did not take part.
    pub async fn end(&self) -> (Arc<End>, Vec<ServerId>) {
        let mut state = self.state.clone();
        match state.wait_for(|state| state.end.is_some()).await {
            Ok(state) => (state.end.clone().unwrap_or_else(|| Arc::new(End::broken())), state.absent.clone()),
            Err(_) => (Arc::new(End::broken()), Vec::new()),
        }
    }

    /// Follows it from here on.
    pub fn follow(self: Arc<Self>) -> Following {
        let mut state = self.state.clone();
        state.mark_changed();
        Following { state, telling: Telling::default(), lines: VecDeque::new(), is_over: false, _pull: self }
    }
}

impl End {
    fn broken() -> Self {
        Self::Failed("the pull has ended without a word".to_owned())
    }

    /// The last line of the stream.
    pub fn line(&self) -> Bytes {
        match self {
            Self::Success(line) => line.clone(),
            Self::Failed(why) | Self::Refused(_, why) => format!("{}\n", serde_json::json!({ "error": why })).into(),
        }
    }
}

/// A client that follows a pull.
pub struct Following {
    state: watch::Receiver<State>,
    telling: Telling,
    lines: VecDeque<Bytes>,
    is_over: bool,
    _pull: Arc<Pull>,
}

impl Following {
    /// The next line of the stream.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            if self.is_over {
                return None;
            }
            let is_there = self.state.changed().await.is_ok();
            let state = self.state.borrow_and_update();
            self.lines.extend(self.telling.news(&state.board));
            if let Some(end) = state.end.as_deref() {
                self.lines.push_back(end.line());
                self.is_over = true;
            } else if !is_there {
                self.lines.push_back(End::broken().line());
                self.is_over = true;
            }
        }
    }
}

/// One server that is to have it.
struct Part {
    server: Arc<Server>,
    /// Its number on the board.
    course: usize,
}

type Task = BoxFuture<'static, (Part, Ended)>;

/// What makes a pull happen.
struct Work {
    models: Models,
    model: ModelName,
    ask: Asking,
    replicas: Replicas,
    tell: Arc<watch::Sender<State>>,
    /// Those who ask the registry at once.
    askers: Vec<Arc<Server>>,
    /// Those who wait for somebody to copy from, the best first.
    waiting: VecDeque<Part>,
    /// Those who take the place of one that fails.
    spares: VecDeque<Arc<Server>>,
    /// Who can be copied from, and the model as they have it.
    sources: Vec<Holder>,
    copying: usize,
    /// Who asks the registry for all who wait.
    leader: Option<usize>,
    done: usize,
    /// Those who have it now.
    having: Vec<ServerId>,
    wanted: usize,
    left_out: Vec<(ServerId, String)>,
    failures: Vec<(ServerId, String)>,
    refusals: Vec<Result<Reply, Error>>,
    success: Option<Bytes>,
}

impl Work {
    fn new(models: Models, order: Order, tell: watch::Sender<State>) -> Self {
        let Order { model, replicas, servers, ask } = order;
        let mut meant = ranked(&model, &servers);
        if let Some(known) = models.cluster().snapshot().known(&model) {
            // Who is known to have no room is asked last.
            let is_tight =
                |server: &Arc<Server>| held_by(server, &model).is_none() && models.room(server, known.size).is_err();
            meant.sort_by_key(is_tight);
        }
        let number = match replicas {
            Replicas::All | Replicas::Fits => meant.len(),
            Replicas::Some(number) => meant.len().min(usize::try_from(number.get()).unwrap_or(usize::MAX)),
        };
        let spares = meant.split_off(number).into();
        let has_agent = |server: &Arc<Server>| models.pool.peer(server).is_some();
        let (copiers, askers): (Vec<_>, Vec<_>) = meant.into_iter().partition(has_agent);
        let tell = Arc::new(tell);
        let waiting = copiers.into_iter().map(|server| Part { course: add(&tell, &server), server }).collect();
        Self {
            models,
            model,
            ask,
            replicas,
            tell,
            askers,
            waiting,
            spares,
            sources: Vec::new(),
            copying: 0,
            leader: None,
            done: 0,
            having: Vec::new(),
            wanted: number,
            left_out: Vec::new(),
            failures: Vec::new(),
            refusals: Vec::new(),
            success: None,
        }
    }

    async fn run(mut self) {
        let mut tasks: FuturesUnordered<Task> = FuturesUnordered::new();
        for server in std::mem::take(&mut self.askers) {
            let part = Part { course: add(&self.tell, &server), server };
            tasks.push(self.asks(part));
        }
        self.send_on(&mut tasks);
        while let Some((part, ended)) = tasks.next().await {
            match ended {
                Ended::Pulled(Ok((line, held))) => {
                    arrived(Arrival::Pulled);
                    self.success.get_or_insert(line);
                    self.leader = self.leader.filter(|leader| *leader != part.course);
                    self.has_it(&part);
                    // What the first of them has is what all others are to have.
                    if let Some(held) = held.filter(|_| self.sources.is_empty()) {
                        self.sources.push((part.server, held));
                    }
                }
                Ended::Pulled(Err(failure)) => {
                    arrived(Arrival::PullFailed);
                    self.failed(&part, failure, &mut tasks);
                }
                Ended::Copied(Ok(held)) => {
                    arrived(Arrival::Copied);
                    self.copying -= 1;
                    self.has_it(&part);
                    self.gives_on(part.server, held);
                }
                Ended::Copied(Err(error)) => {
                    arrived(Arrival::CopyFailed);
                    self.copying -= 1;
                    self.not_copied(part, &error, &mut tasks);
                }
            }
            self.send_on(&mut tasks);
        }
        // Those who took part say what they have now, so that who hears of the end sees it.
        let (servers, cluster) = (self.tell.borrow().servers.clone(), self.models.cluster().clone());
        catch_up(&cluster, &servers, &self.having, &self.model).await;
        let end = Arc::new(self.judge());
        self.tell.send_modify(|state| state.end = Some(end));
    }

    /// Lets those who wait go on: the first who can give it to others asks the registry, if nobody does, and the others copy
    /// when there is somebody. Where nobody could give it all ask.
    fn send_on(&mut self, tasks: &mut FuturesUnordered<Task>) {
        while !self.waiting.is_empty() {
            if self.sources.is_empty() {
                if self.leader.is_some() {
                    return;
                }
                let first = self.waiting.iter().position(|part| shares(&part.server));
                let Some(part) = self.waiting.remove(first.unwrap_or(0)) else { return };
                self.leader = first.map(|_| part.course);
                tasks.push(self.asks(part));
                continue;
            }
            if self.copying >= PER_SOURCE * self.sources.len() {
                return;
            }
            let Some(part) = self.waiting.pop_front() else { return };
            let wanted = &self.sources[0].1.digest;
            if let Some(held) = held_by(&part.server, &self.model).filter(|held| held.digest == *wanted) {
                self.has_it(&part);
                self.gives_on(part.server, held);
                continue;
            }
            self.copying += 1;
            tasks.push(self.copies(part));
        }
    }

    /// A server asks the registry.
    fn asks(&self, part: Part) -> Task {
        self.tell.send_modify(|state| state.silent += 1);
        let (ask, tell, models, model) = (self.ask.clone(), self.tell.clone(), self.models.clone(), self.model.clone());
        Box::pin(async move {
            let room = Room::of(&part.server, models.config().margin());
            let pulled = match pull_at(&ask, &part, room, &tell, models.cluster()).await {
                Ok(line) => Ok((line, models.given_by(&part.server, &model).await)),
                Err(failure) => Err(failure),
            };
            (part, Ended::Pulled(pulled))
        })
    }

    /// A server copies from those who have it.
    fn copies(&self, part: Part) -> Task {
        let (models, model, tell) = (self.models.clone(), self.model.clone(), self.tell.clone());
        let mut sources = self.sources.clone();
        // Each begins with another, so that none has all the work.
        let turn = self.copying % sources.len().max(1);
        sources.rotate_left(turn);
        Box::pin(async move {
            let copying = async {
                let (_, held) = sources.first().ok_or_else(|| BringError::Copy("nobody has it".to_owned()))?;
                models.room(&part.server, held.size)?;
                let name = held_by(&part.server, &model).map_or_else(|| held.name.clone(), |old| old.name);
                let mut hears = |line: Line| tell.send_modify(|state| state.board.hear(part.course, &line, None));
                models.copy(&name, held, &part.server, &sources, &mut hears).await?;
                Ok(Held { name, ..held.clone() })
            };
            let copied = copying.await;
            (part, Ended::Copied(copied))
        })
    }

    /// Others can copy from a server what it has, if its agent gives models away.
    fn gives_on(&mut self, server: Arc<Server>, held: Held) {
        if shares(&server) {
            self.sources.push((server, held));
        }
    }

    fn has_it(&mut self, part: &Part) {
        self.done += 1;
        self.having.push(part.server.id.clone());
        self.models.has_now(&part.server, &self.model);
        self.tell.send_modify(|state| state.board.finish(part.course));
    }

    /// A server could not copy: it asks the registry itself, if it has room.
    fn not_copied(&mut self, part: Part, error: &BringError, tasks: &mut FuturesUnordered<Task>) {
        if error.is_full() {
            let failure = Failure { why: error.to_string(), refusal: None, is_final: false, is_full: true };
            self.failed(&part, failure, tasks);
            return;
        }
        tracing::warn!(server = %part.server.id, model = %self.model, %error, "no copy: it asks the registry itself");
        self.tell.send_modify(|state| state.board.begin_again(part.course));
        tasks.push(self.asks(part));
    }

    fn failed(&mut self, part: &Part, failure: Failure, tasks: &mut FuturesUnordered<Task>) {
        let Failure { why, refusal, is_final, is_full } = failure;
        let id = part.server.id.clone();
        self.leader = self.leader.filter(|leader| *leader != part.course);
        self.tell.send_modify(|state| {
            state.board.drop_out(part.course);
            if refusal.is_some() {
                state.absent.push(id.clone());
            }
        });
        self.refusals.extend(refusal);
        if is_full && self.replicas == Replicas::Fits {
            tracing::info!(server = %id, model = %self.model, why, "a server is left out of a pull");
            self.left_out.push((id, why));
            return;
        }
        self.failures.push((id, why.clone()));
        if is_final {
            // The registry would say the same to everybody.
            for part in std::mem::take(&mut self.waiting) {
                self.failures.push((part.server.id.clone(), why.clone()));
                self.tell.send_modify(|state| state.board.drop_out(part.course));
            }
            self.spares.clear();
        }
        let Some(server) = self.spares.pop_front() else { return };
        tracing::info!(failed = %part.server.id, server = %server.id, model = %self.model, "another server takes its place");
        let part = Part { course: add(&self.tell, &server), server };
        if self.models.pool.peer(&part.server).is_some() {
            self.waiting.push_back(part);
        } else {
            tasks.push(self.asks(part));
        }
    }

    fn judge(&mut self) -> End {
        let is_enough = match self.replicas {
            Replicas::Some(_) => self.done >= self.wanted.max(1),
            Replicas::All | Replicas::Fits => self.failures.is_empty() && self.done > 0,
        };
        if is_enough {
            let line = self.success.take();
            return End::Success(line.unwrap_or_else(|| Bytes::from_static(b"{\"status\":\"success\"}\n")));
        }
        let failed = if self.failures.is_empty() { &self.left_out } else { &self.failures };
        let text = match failed.as_slice() {
            [] => "there is no server to pull it".to_owned(),
            // Who asked the registry says why.
            failed => failure(failed, self.done == 0),
        };
        let has_begun = self.tell.borrow().headers.is_some();
        match self.refusals.drain(..).next() {
            Some(refusal) if !has_begun => End::Refused(Mutex::new(Some(refusal)), text),
            _ => End::Failed(text),
        }
    }
}

/// Asks servers what they have now, and waits until those that have a model say so. No longer than [`NEWS`].
pub(crate) async fn catch_up(known: &Cluster, servers: &[ServerId], having: &[ServerId], model: &ModelName) {
    let until = Instant::now() + NEWS;
    known.refresh_those(NEWS, |server| servers.contains(&server.id)).await;
    // An agent looks at its disk when a pull is over, and tells what it has seen by itself.
    while Instant::now() < until {
        let snapshot = known.snapshot();
        let has_told = |id: &ServerId| {
            let is_it = |held: &cluster::Held| held.canonical() == Some(model) && !held.digest.is_empty();
            snapshot
                .server(id)
                .is_none_or(|server| server.state != cluster::State::Up || server.report.models.iter().any(is_it))
        };
        if having.iter().all(has_told) {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// One server more on the board.
fn add(tell: &watch::Sender<State>, server: &Server) -> usize {
    let mut course = 0;
    tell.send_modify(|state| {
        course = state.board.add();
        state.servers.push(server.id.clone());
    });
    course
}

/// Follows one server's pull to its end.
async fn pull_at(
    ask: &Asking,
    part: &Part,
    mut room: Room,
    tell: &watch::Sender<State>,
    cluster: &Cluster,
) -> Result<Bytes, Failure> {
    let asked = tokio::select! {
        asked = ask(part.server.clone()) => asked,
        () = gone(cluster, &part.server.id) => Err(Error::NoServer(format!("server {}: {GONE}", part.server.id))),
    };
    let mut body = match asked {
        Ok(reply) if reply.status.is_success() => {
            let Reply { headers, body, .. } = reply;
            tell.send_modify(|state| {
                state.silent -= 1;
                state.headers.get_or_insert(headers);
            });
            body
        }
        refused => {
            let failure = Failure::refused(refused).await;
            tell.send_modify(|state| state.silent -= 1);
            return Err(failure);
        }
    };
    let failed = Failure::of;
    let mut success = None;
    loop {
        let chunk = tokio::select! {
            chunk = body.next() => chunk,
            () = gone(cluster, &part.server.id) => return Err(failed(GONE.to_owned())),
        };
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(|error| failed(error.to_string()))?.bytes;
        for raw in lines_of(&chunk) {
            let line = Line::all(&raw).next().unwrap_or_default();
            if let Some(why) = line.error {
                return Err(failed(why));
            }
            if line.status == "success" {
                success = Some(raw);
                continue;
            }
            room.sees(&line).map_err(|error| Failure {
                why: error.to_string(),
                refusal: None,
                is_final: false,
                is_full: true,
            })?;
            tell.send_modify(|state| state.board.hear(part.course, &line, Some(&raw)));
        }
    }
    success.ok_or_else(|| failed("it ended without success".to_owned()))
}

impl Failure {
    /// What an Ollama, or the way there, says of a pull that has ended.
    fn of(why: String) -> Self {
        Self { is_final: why.contains(NOT_THERE), is_full: tells_of_full_disk(&why), why, refusal: None }
    }

    /// A server has refused from the beginning.
    async fn refused(refused: Result<Reply, Error>) -> Self {
        match refused {
            Err(error) => {
                let failure = Self::of(error.to_string());
                Self { refusal: Some(Err(error)), is_final: false, ..failure }
            }
            Ok(reply) => {
                let Reply { status, headers, body } = reply;
                let outcome = body.outcome().clone();
                let bytes = body.collect(LONGEST).await.unwrap_or_default();
                let line = Line::all(&bytes).next().unwrap_or_default();
                let why = line.error.unwrap_or_else(|| String::from_utf8_lossy(&bytes).into_owned());
                let failure = Self::of(why);
                let is_final = status.is_client_error() || failure.is_final;
                let mut reply = Reply::full(status, headers, bytes);
                *reply.body.outcome_mut() = outcome;
                Self { refusal: Some(Ok(reply)), is_final, ..failure }
            }
        }
    }
}
