//! Where models are, and how they come there: from a registry, or from a server of the cluster that has them.
//!
//! A registry is asked once. Whoever else is to have a model gets it from an agent beside an Ollama that has it, so that it
//! is the same model everywhere, byte for byte. A bare Ollama, without an agent, can only ask the registry itself.
//!
//! | module | what it does |
//! |---|---|
//! | [`pull`] | one pull at several servers: who asks the registry, who copies, what the client is told |
//! | [`told`] | the progress of all of them as that of one Ollama |
//! | [`replicas`] | at how many servers, and at which |
//! | [`local`] | what an agent answers when models are copied |
//! | [`copy`] | how an agent has its Ollama copy a model |
//! | [`registry`] | the registry for one Ollama that it copies from |
//! | [`store`] | the files of an Ollama's models |
//! | [`desired`] | which models should be where, and what keeps that true |
//! | [`wake`] | wakes servers that sleep |

pub mod copy;
pub mod desired;
pub mod local;
pub mod pull;
pub mod registry;
pub mod replicas;
pub mod store;
pub mod told;
pub mod wake;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use olol_middleware::call::Body;
use olol_middleware::cluster::{Cluster, Model, State, Variant};
use olol_middleware::instruments::{Arrival, arrived};
use olol_middleware::units::Whole;
use olol_middleware::{ModelName, Reply, Server, ServerId};
use olol_proto::v1::{CopyModelRequest, CopyOrder, CopyPiece, CopySource, CopyWant, PullModelResponse};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::mpsc;

use crate::ollama::{Ask, ON_DISK, every_on_disk};
use crate::pool::{Peer, Pool};
pub use replicas::Replicas;

/// The longest list of models that is read, bytes.
const LONGEST: usize = 64 << 20;
/// Pieces that are passed on at a time, for one copy whose source cannot be reached directly: an agent asks for no more at
/// once, and each is a mebibyte at most.
const RELAYED: usize = 16;

/// Silence after which it counts that a server is down.
const SILENCE: Duration = Duration::from_secs(20);
/// What is said of one that was given up.
const GONE: &str = "it is down, and says nothing more";

/// The `[pull]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// How many servers a pull is for, unless it says so itself.
    pub replicas: Replicas,
    /// Room that must be left on a server's disk, MiB.
    pub margin_mib: Whole<0, 1_073_741_824>,
    /// The most that one copy from server to server takes, MiB a second; 0: no limit.
    pub copy_mib_s: Whole<0, 1_048_576>,
}

impl Default for Config {
    fn default() -> Self {
        Self { replicas: Replicas::All, margin_mib: Whole::new(1024), copy_mib_s: Whole::new(0) }
    }
}

impl Config {
    fn margin(&self) -> u64 {
        self.margin_mib.get() << 20
    }

    fn rate(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.copy_mib_s.get() << 20)
    }
}

/// A line of what an Ollama says of a pull.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Line {
    /// What it does.
    pub status: String,
    /// The layer that it is about; empty: none.
    pub digest: String,
    /// Bytes of that layer.
    pub total: u64,
    /// Bytes of it that are there.
    pub completed: u64,
    /// Why it has failed.
    pub error: Option<String>,
}

impl Line {
    /// The lines of a piece of a body.
    pub fn all(bytes: &[u8]) -> impl Iterator<Item = Self> + '_ {
        let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).unwrap_or_default())
    }

    fn of(progress: PullModelResponse) -> Self {
        let PullModelResponse { status, digest, total, completed } = progress;
        Self { status, digest, total, completed, error: None }
    }
}

/// Why a model did not come to a server.
#[derive(Debug, thiserror::Error)]
pub enum BringError {
    /// There is no such server.
    #[error("there is no server '{0}'")]
    NoServer(ServerId),
    /// Its disk has too little room.
    #[error("no room: it needs {} MiB, {} MiB of them to stay free, and {} MiB are free", needed >> 20, margin >> 20, free >> 20)]
    Full {
        /// Bytes of the model, and the margin.
        needed: u64,
        /// The margin.
        margin: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// Its Ollama says that its disk is full.
    #[error("no room: {0}")]
    NoSpace(String),
    /// It could not be copied.
    #[error("{0}")]
    Copy(String),
    /// Ollama's own words, or those of the way there.
    #[error("{0}")]
    Pull(String),
}

/// What systems call a disk that is full, in the words that Ollama passes on: it ends a pull at once then
/// (`server/download.go`), and tells the error of its system. Of a bare Ollama this is all that is ever known of its disk.
const FULL: [&str; 3] = ["no space left on device", "not enough space on the disk", "disk quota exceeded"];

/// Whether an error of an Ollama tells that its disk is full.
fn tells_of_full_disk(why: &str) -> bool {
    let why = why.to_ascii_lowercase();
    FULL.iter().any(|words| why.contains(words))
}

impl BringError {
    /// What an Ollama says of a pull that it has ended.
    fn of_pull(why: String) -> Self {
        if tells_of_full_disk(&why) { Self::NoSpace(why) } else { Self::Pull(why) }
    }

    /// Whether the server has no room, so that it is no fault of anybody's.
    fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::NoSpace(_))
    }
}

/// A model on one server's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The name under which the server lists it.
    pub name: String,
    /// Its digest, 64 hex digits.
    pub digest: String,
    /// Its bytes.
    pub size: u64,
}

impl Held {
    fn of(model: &Model) -> Self {
        Self { name: model.name.clone(), digest: model.digest.clone(), size: model.size }
    }
}

/// A server, and what it has of a model.
type Holder = (Arc<Server>, Held);

/// How a model has come to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Brought {
    /// It was there.
    Here,
    /// It was copied from others of the cluster.
    Copied,
    /// The registry gave it.
    Pulled,
}

/// What brings models to servers. Clones are one.
#[derive(Clone, Debug)]
pub struct Models {
    pool: Pool,
    running: Arc<crate::reload::Running>,
    pulls: Arc<pull::Running>,
}

impl Models {
    /// Brings models to these servers, by the `[pull]` table that is in use.
    pub fn new(pool: Pool, running: Arc<crate::reload::Running>) -> Self {
        Self { pool, running, pulls: Arc::default() }
    }

    /// The `[pull]` table.
    pub fn config(&self) -> Config {
        self.running.state().config.pull.clone()
    }

    fn cluster(&self) -> &Arc<Cluster> {
        self.pool.cluster()
    }

    /// Brings a model to a server, as it is on most of those who have it: copied from them where that can be done, else from
    /// the registry that its name leads to. `tell` hears how far it is. Dropping the future ends it, and what has come so
    /// far is kept for the next time. Disks are looked at before.
    pub async fn bring(
        &self,
        model: &str,
        to: &ServerId,
        tell: &mut (dyn FnMut(Line) + Send),
    ) -> Result<Brought, BringError> {
        let snapshot = self.cluster().snapshot();
        let server = snapshot.server(to).ok_or_else(|| BringError::NoServer(to.clone()))?;
        let Some(name) = ModelName::parse(model) else {
            return Err(BringError::Pull(format!("'{model}' is no name of a model")));
        };
        let holders = self.holders(&name);
        if let Some((held, sources)) = most_held(&holders, snapshot.known(&name).and_then(|known| known.usual())) {
            if holders.iter().any(|(holder, held_there)| holder.id == *to && held_there.digest == held.digest) {
                return Ok(Brought::Here);
            }
            let sources: Vec<_> = sources.into_iter().filter(|(source, _)| source.id != *to).collect();
            if !sources.is_empty() && self.pool.peer(server).is_some() {
                self.room(server, held.size)?;
                match self.copy(&held.name, &held, server, &sources, tell).await {
                    Ok(()) => {
                        arrived(Arrival::Copied);
                        self.has_now(server, &name);
                        return Ok(Brought::Copied);
                    }
                    // The registry's would have no more room.
                    Err(error) if error.is_full() => return Err(error),
                    Err(error) => {
                        arrived(Arrival::CopyFailed);
                        tracing::warn!(model, server = %to, %error, "no copy: the registry is asked");
                    }
                }
            }
        }
        let body = json!({"model": model, "stream": true}).to_string();
        let ask = Ask { infers: false, ..Ask::post("/api/pull", body) };
        let pulled = match self.pool.ask(server, ask).await {
            Ok(reply) => self.follow(server, reply, tell).await,
            Err(error) => Err(BringError::Pull(error.to_string())),
        };
        arrived(if pulled.is_ok() { Arrival::Pulled } else { Arrival::PullFailed });
        pulled?;
        self.has_now(server, &name);
        Ok(Brought::Pulled)
    }

    /// Servers with an agent that gives models away, and what they have of one.
    fn holders(&self, model: &ModelName) -> Vec<Holder> {
        let snapshot = self.cluster().snapshot();
        let Some(known) = snapshot.known(model) else { return Vec::new() };
        let servers = known.installed.iter().filter_map(|index| snapshot.servers.get(index));
        servers.filter_map(|server| Some((server.clone(), held_by(server, model)?))).collect()
    }

    /// Copies a model to a server's Ollama, by its agent, from those who have it.
    async fn copy(
        &self,
        model: &str,
        held: &Held,
        to: &Server,
        sources: &[Holder],
        tell: &mut (dyn FnMut(Line) + Send),
    ) -> Result<(), BringError> {
        let failed = |error: olol_middleware::BoxError| BringError::Copy(error.to_string());
        let peer = self.pool.peer(to).ok_or_else(|| BringError::Copy("it has no agent".to_owned()))?;
        let (mut given, mut peers) = (Vec::new(), Vec::new());
        for (source, held) in sources {
            let Some(peer) = self.pool.peer(source) else { continue };
            given.push(CopySource {
                address: self.pool.address_of(&source.id).unwrap_or_default(),
                model: held.name.clone(),
            });
            peers.push((peer, held.name.clone()));
        }
        let order = CopyOrder {
            model: model.to_owned(),
            digest: held.digest.clone(),
            sources: given,
            bytes_per_second: self.config().rate().map_or(0, NonZeroU64::get),
            relays: true,
            margin_bytes: self.config().margin(),
        };
        let (orders, requests) = mpsc::channel(RELAYED);
        let first = CopyModelRequest { order: Some(order), piece: None };
        orders.send(first).await.map_err(|error| failed(error.into()))?;
        let requests =
            futures_util::stream::unfold(
                requests,
                |mut requests| async move { Some((requests.recv().await?, requests)) },
            );
        let mut said = peer.copy_model(requests).await.map_err(failed)?;
        let mut wants = FuturesUnordered::new();
        let mut is_done = false;
        loop {
            tokio::select! {
                message = said.message() => match message {
                    Ok(Some(message)) => {
                        if let Some(want) = message.want {
                            if wants.len() >= RELAYED * 2 {
                                return Err(BringError::Copy("the agent wants too much at once".to_owned()));
                            }
                            wants.push(relayed(&peers, &held.digest, want));
                        }
                        match message.progress {
                            Some(progress) if progress.status == "success" => is_done = true,
                            Some(progress) => tell(Line::of(progress)),
                            None => {}
                        }
                    }
                    Ok(None) if is_done => return Ok(()),
                    Ok(None) => return Err(BringError::Copy("the agent ended without success".to_owned())),
                    Err(status) if tells_of_full_disk(status.message()) => {
                        return Err(BringError::NoSpace(status.message().to_owned()));
                    }
                    Err(status) => return Err(BringError::Copy(status.message().to_owned())),
                },
                () = gone(self.cluster(), &to.id) => return Err(BringError::Copy(GONE.to_owned())),
                Some(piece) = wants.next() => {
                    let piece = CopyModelRequest { order: None, piece: Some(piece) };
                    orders.send(piece).await.map_err(|error| failed(error.into()))?;
                }
            }
        }
    }

    /// Follows a pull at a server to its end.
    async fn follow(
        &self,
        server: &Server,
        reply: Reply,
        tell: &mut (dyn FnMut(Line) + Send),
    ) -> Result<(), BringError> {
        let failed = |error: olol_middleware::Error| BringError::Pull(error.to_string());
        if !reply.status.is_success() {
            let status = reply.status.as_u16();
            let body = reply.body.collect(LONGEST).await.map_err(failed)?;
            let line = Line::all(&body).next().unwrap_or_default();
            return Err(BringError::of_pull(line.error.unwrap_or_else(|| format!("status {status}"))));
        }
        let mut body: Body = reply.body;
        let mut room = Room::of(server, self.config().margin());
        let mut is_done = false;
        loop {
            let chunk = tokio::select! {
                chunk = body.next() => chunk,
                () = gone(self.cluster(), &server.id) => return Err(BringError::Pull(GONE.to_owned())),
            };
            let Some(chunk) = chunk else { break };
            for line in Line::all(&chunk.map_err(failed)?.bytes) {
                if let Some(why) = line.error {
                    return Err(BringError::of_pull(why));
                }
                is_done |= line.status == "success";
                room.sees(&line)?;
                tell(line);
            }
        }
        if is_done { Ok(()) } else { Err(BringError::Pull("it ended without success".to_owned())) }
    }

    /// Whether a model of so many bytes has room on a server's disk. Of a bare Ollama that is not known; and what has begun to
    /// come there may be of this one, which its agent finds out.
    fn room(&self, server: &Server, size: u64) -> Result<(), BringError> {
        Room::of(server, self.config().margin()).takes(size.saturating_sub(begun(server)))
    }

    /// A server has a model now: the next call may need it.
    fn has_now(&self, server: &Server, model: &ModelName) {
        self.cluster().note_installed(std::slice::from_ref(&server.id), model, None);
        self.cluster().want_news_of(&server.id);
    }

    /// What a server has of a model, asked of itself.
    async fn ask_for(&self, server: &Server, model: &ModelName) -> Result<Held, BringError> {
        let failed = |error: olol_middleware::Error| BringError::Pull(error.to_string());
        let reply = self.pool.ask(server, Ask::get(ON_DISK)).await.map_err(failed)?;
        let answer = reply.body.collect(LONGEST).await.map_err(failed)?;
        let models = every_on_disk(&answer).map_err(|error| BringError::Pull(error.to_string()))?;
        let found = models.iter().find(|listed| ModelName::parse(&listed.name).as_ref() == Some(model));
        found.map(Held::of).ok_or_else(|| BringError::Pull(format!("{model} is not there after the pull")))
    }
}

/// Waits until nothing more is to be expected of a server: it is silent, and whoever looks after it has given it up. Whoever
/// hears of it begins to wait anew. A process that hangs keeps its connections.
async fn gone(cluster: &Cluster, server: &ServerId) {
    loop {
        tokio::time::sleep(SILENCE).await;
        if cluster.snapshot().server(server).is_none_or(|server| server.state == State::Down) {
            return;
        }
    }
}

/// What a server is known to have of a model, if its agent gives models away.
fn held_by(server: &Server, model: &ModelName) -> Option<Held> {
    let held = server.report.models.iter().find(|held| !held.digest.is_empty() && held.canonical() == Some(model))?;
    Some(Held::of(held))
}

/// Whether a server has an agent that gives models away, as far as one knows: one that has none yet does not know itself.
fn shares(server: &Server) -> bool {
    server.vitals.load().as_ref().is_some_and(|vitals| !vitals.hides_models)
}

/// Bytes on a server's disk of models that have begun to come there, and do not come at the moment.
fn begun(server: &Server) -> u64 {
    let vitals = server.vitals.load();
    vitals.as_ref().filter(|vitals| vitals.pending_pulls.is_empty()).map_or(0, |vitals| vitals.disk_begun)
}

/// The model that is meant by its name, and those of them who give it away.
fn most_held(holders: &[Holder], usual: Option<&Variant>) -> Option<(Held, Vec<Holder>)> {
    let usual = usual?.digest();
    let most = holders.iter().map(|(_, held)| held).find(|held| held.digest == usual)?;
    let same =
        holders.iter().filter(|(server, held)| held.digest == most.digest && server.is_reachable() && shares(server));
    Some((most.clone(), same.cloned().collect()))
}

/// What an agent wants of those who have it, asked by us in its place.
async fn relayed(peers: &[(Peer, String)], digest: &str, want: CopyWant) -> CopyPiece {
    let mut whys = Vec::new();
    for (peer, model) in peers {
        let read = async {
            if want.digest.is_empty() {
                return peer.read_model(model, digest).await;
            }
            let length = want.length.clamp(1, 1 << 20);
            let mut stream = peer.read_blob(&want.digest, want.offset, length).await?;
            let mut data = bytes::BytesMut::new();
            while let Some(message) = stream.message().await? {
                data.extend_from_slice(&message.data);
                if data.len() as u64 > length {
                    return Err("it gives more than it was asked for".into());
                }
            }
            Ok(data.freeze())
        };
        match read.await {
            Ok(data) => return CopyPiece { id: want.id, data, error: String::new() },
            Err(error) => whys.push(error.to_string()),
        }
    }
    CopyPiece { id: want.id, data: bytes::Bytes::new(), error: format!("nor by the proxy: {}", whys.join("; ")) }
}

/// The room on a server's disk, as it was when something began.
#[derive(Clone, Debug)]
struct Room {
    /// Bytes that are free; `None`: not known.
    free: Option<u64>,
    margin: u64,
    /// The layers that were heard of, and what each of them still needed then.
    needed: Vec<(String, u64)>,
}

impl Room {
    fn of(server: &Server, margin: u64) -> Self {
        let free = server.vitals.load().as_ref().and_then(|vitals| vitals.disk_free);
        Self { free, margin, needed: Vec::new() }
    }

    fn takes(&self, size: u64) -> Result<(), BringError> {
        let Some(free) = self.free else { return Ok(()) };
        let needed = size.saturating_add(self.margin);
        if needed <= free { Ok(()) } else { Err(BringError::Full { needed, margin: self.margin, free }) }
    }

    /// A line tells of a layer: whether all that were heard of have room.
    fn sees(&mut self, line: &Line) -> Result<(), BringError> {
        if line.digest.is_empty() || self.needed.iter().any(|(digest, _)| *digest == line.digest) {
            return Ok(());
        }
        self.needed.push((line.digest.clone(), line.total.saturating_sub(line.completed)));
        let sum = self.needed.iter().fold(0, |sum: u64, (_, needed)| sum.saturating_add(*needed));
        if sum == 0 { Ok(()) } else { self.takes(sum) }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use olol_middleware::cluster::{Member, Report, Source};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_silent_is_given_up_when_it_is_down() {
        let id = ServerId::new("a");
        let cluster = Cluster::new(vec![Member { id: id.clone(), weight: NonZeroU32::MIN, source: Source::Static }]);
        cluster.report(0, Report::default());
        cluster.refresh(Duration::ZERO).await;
        assert!(tokio::time::timeout(SILENCE * 10, gone(&cluster, &id)).await.is_err(), "it may take its time");
        cluster.check_failed(0, "no answer".into(), 1);
        assert!(tokio::time::timeout(SILENCE / 2, gone(&cluster, &id)).await.is_err(), "it may be about to speak");
        assert!(tokio::time::timeout(SILENCE * 2, gone(&cluster, &id)).await.is_ok());
    }
}
