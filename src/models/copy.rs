//! How an agent has the Ollama beside it copy a model of another server: so that it is the same model there, byte for byte.
//!
//! Nothing writes into the Ollama's folder. It pulls from a [`Registry`] of our own under a name that nobody else can know,
//! which brings resuming, progress and the check of every digest; then the model gets its real name, and that one goes. What
//! goes wrong in between leaves no name behind: an agent that was killed clears up when it starts again.

use std::collections::HashMap;
use std::net::{SocketAddr, SocketAddrV4};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use http::{Method, StatusCode};
use olol_middleware::cluster::Model;
use olol_middleware::{BoxError, ModelName, Reply};
use olol_proto::v1::{
    CopyModelRequest, CopyModelResponse, CopyOrder, CopyPiece, CopyWant, PullModelResponse, ReadBlobResponse,
};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

use super::registry::{Registry, Source};
use super::store::{Digest, Manifest, StoreError};
use super::{Line, RELAYED};
use crate::discovery::networks;
use crate::ollama::{Ask, ON_DISK, Ollama, every_on_disk};
use crate::pool::{Peer, ServerSpec, Way};
use crate::security::Trust;

/// The longest answer to a change of names, bytes.
const LONGEST: usize = 1 << 20;
/// Sources of one copy; more are not tried.
const MOST_SOURCES: usize = 64;
/// Copies that may be here at the same time: one goes on, the others wait for it.
const MOST_COPIES: usize = 64;
/// The longest address of a source, bytes.
const LONGEST_ADDRESS: usize = 300;
/// The longest that all sources together may take to give the manifest: the next copy waits for that.
const MANIFEST: Duration = Duration::from_secs(120);
/// How often a pull is begun again that Ollama says was given up: it had not yet noticed the end of an earlier one.
const BEGINNINGS: u32 = 5;
/// The pause before that.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest that the caller may take for what is wanted of it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that are asked of the caller at once.
const WANT: u64 = 1 << 20;
/// Time between two looks for names that somebody left behind, and until the next try of one that failed.
const CLEAN: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(5));

/// Why a model was not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// What was ordered cannot be.
    #[error("the order is none: {0}")]
    Order(String),
    /// A file is not what it should be.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody gives it.
    #[error("no server gives it: {0}")]
    Sources(String),
    /// The Ollama did not take it.
    #[error("{0}")]
    Ollama(String),
}

/// Copies models to one Ollama, one at a time.
#[derive(Clone)]
pub struct Copier(Arc<Inner>);

struct Inner {
    ollama: Ollama,
    /// What is shown to other agents.
    trust: Trust,
    connect: Duration,
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Places of copies.
    places: Arc<Semaphore>,
    /// Called when names have changed.
    changed: Box<dyn Fn() + Send + Sync>,
    /// Called when a copy begins.
    begins: Box<dyn Fn(&str) -> Following + Send + Sync>,
}

/// What follows a copy.
pub type Following = Box<dyn FnMut(&Line) + Send>;

impl std::fmt::Debug for Copier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copier").field("ollama", &self.0.ollama).finish_non_exhaustive()
    }
}

/// What a copy says on its way.
type Tell = mpsc::Sender<Result<CopyModelResponse, Status>>;

impl Copier {
    /// Copies to this Ollama; other agents are shown `trust`, `changed` is called when names have changed, and what `begins`
    /// returns follows a copy of a model.
    pub fn new(
        ollama: Ollama,
        trust: Trust,
        connect: Duration,
        changed: impl Fn() + Send + Sync + 'static,
        begins: impl Fn(&str) -> Following + Send + Sync + 'static,
    ) -> Self {
        let turn = Arc::default();
        let (changed, begins) = (Box::new(changed), Box::new(begins));
        let places = Arc::new(Semaphore::new(MOST_COPIES));
        Self(Arc::new(Inner { ollama, trust, connect, turn, places, changed, begins }))
    }

    /// Copies a model, and tells how far it is; ends when what it returns is dropped. `answers` are those to its wants.
    pub fn copy(
        &self,
        order: CopyOrder,
        answers: Streaming<CopyModelRequest>,
    ) -> BoxStream<'static, Result<CopyModelResponse, Status>> {
        let (tell, said) = mpsc::channel(16);
        let copier = self.clone();
        let model: String = order.model.chars().take(200).collect();
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            let last = match copier.run(order, answers, &tell).await {
                Ok(()) => Ok(progress(Line { status: "success".to_owned(), ..Line::default() })),
                Err(error) => {
                    tracing::warn!(model, %error, "a model was not copied");
                    Err(Status::aborted(error.to_string()))
                }
            };
            let _ = tell.send(last).await;
        }));
        Box::pin(futures_util::stream::unfold((said, task), |(mut said, task)| async move {
            Some((said.recv().await?, (said, task)))
        }))
    }

    async fn run(&self, order: CopyOrder, answers: Streaming<CopyModelRequest>, tell: &Tell) -> Result<(), CopyError> {
        let wanted = Digest::parse(&order.digest)?;
        if ModelName::parts(&order.model).is_none() || ModelName::is_unfinished(&order.model) {
            return Err(CopyError::Order(format!("'{}' is no name of a model", shown(&order.model))));
        }
        let full = |_| CopyError::Order(format!("{MOST_COPIES} copies wait here already; order it again later"));
        let _place = self.0.places.clone().try_acquire_owned().map_err(full)?;
        let relay = order.relays.then(|| Relay::start(answers, tell.clone()));
        let sources = Arc::new(Sources::new(&order, relay, &self.0)?);
        let turn = self.0.turn.clone().lock_owned().await;
        let manifest = tokio::time::timeout(MANIFEST, sources.manifest(&wanted)).await;
        let manifest = manifest.map_err(|_| CopyError::Sources("they take too long for a word".to_owned()))??;
        let failed = |error: std::io::Error| CopyError::Ollama(format!("no registry can be opened: {error}"));
        let rate = NonZeroU64::new(order.bytes_per_second);
        let registry = Registry::open(manifest, sources, rate).await.map_err(failed)?;
        let name = registry.name(&order.model);
        let left = LeftOver::new(self, name.clone());
        let mut following = (self.0.begins)(&order.model);
        tokio::select! {
            pulled = pull(&self.0.ollama, &name, tell, &mut following) => pulled?,
            why = registry.fails() => return Err(CopyError::Sources(why)),
        }
        // Nothing stops it half-way from here on, also when whoever ordered it has gone: until it is over it is its turn, and
        // its registry shows that the name is no left-over.
        let (copier, model, held) = (self.clone(), order.model.clone(), (turn, registry));
        let finishing = tokio::spawn(async move {
            let done = finish(&copier, &name, &model, &wanted).await;
            left.clear().await;
            (copier.0.changed)();
            drop(held);
            done
        });
        finishing.await.map_err(|error| CopyError::Ollama(error.to_string()))??;
        tracing::info!(model = order.model, digest = order.digest, "a model was copied from another server");
        Ok(())
    }

    /// Removes the names that killed agents have left behind, again and again.
    pub async fn keep_clean(self) {
        loop {
            let pause = match self.clean().await {
                Ok(()) => CLEAN.0,
                Err(error) => {
                    tracing::debug!(%error, "left-over names of copies cannot be looked for");
                    CLEAN.1
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn clean(&self) -> Result<(), CopyError> {
        for model in listed(&self.0.ollama).await? {
            if ModelName::is_unfinished(&model.name) && !is_alive(&model.name).await {
                tracing::info!(model = model.name, "a copy that was never finished is removed");
                delete(&self.0.ollama, &model.name).await?;
                (self.0.changed)();
            }
        }
        Ok(())
    }
}

/// Whether the registry that a name leads to is still there: then somebody is at work.
async fn is_alive(name: &str) -> bool {
    // Anybody can give a model such a name: nothing but a port of this machine is looked at, and nothing is looked up.
    let address = name.split_once('/').and_then(|(address, _)| address.parse::<SocketAddrV4>().ok());
    let Some(address) = address.filter(|address| address.ip().is_loopback()) else { return false };
    let connecting = tokio::net::TcpStream::connect(address);
    matches!(tokio::time::timeout(Duration::from_secs(1), connecting).await, Ok(Ok(_)))
}

/// A name that must not stay.
struct LeftOver {
    copier: Copier,
    name: Option<String>,
}

impl LeftOver {
    fn new(copier: &Copier, name: String) -> Self {
        Self { copier: copier.clone(), name: Some(name) }
    }

    async fn clear(mut self) {
        let Some(name) = self.name.take() else { return };
        if let Err(error) = delete(&self.copier.0.ollama, &name).await {
            tracing::debug!(%error, name, "the name of a copy stays until the next look for such");
        }
    }
}

impl Drop for LeftOver {
    fn drop(&mut self) {
        let (Some(name), Ok(runtime)) = (self.name.take(), tokio::runtime::Handle::try_current()) else { return };
        let copier = self.copier.clone();
        runtime.spawn(async move { Self { copier, name: Some(name) }.clear().await });
    }
}

/// Gives a pulled model its real name, if it is the one that was wanted.
async fn finish(copier: &Copier, pulled: &str, model: &str, wanted: &Digest) -> Result<(), CopyError> {
    let ollama = &copier.0.ollama;
    let find = |models: &[Model], name: &str| {
        let name = ModelName::parse(name);
        models.iter().find(|model| ModelName::parse(&model.name) == name).map(|model| model.digest.clone())
    };
    let before = listed(ollama).await?;
    let found = find(&before, pulled).unwrap_or_default();
    if found != wanted.hex() {
        return Err(CopyError::Ollama(format!("the copy has the digest '{found}', and not {}", wanted.hex())));
    }
    let old = find(&before, model).filter(|digest| digest != wanted.hex());
    // Under a second name what was there stays whole until the new one is.
    let kept = old.map(|_| LeftOver::new(copier, format!("{pulled}-old")));
    let kept_as = kept.as_ref().and_then(|kept| kept.name.clone());
    if let Some(name) = &kept_as {
        copy(ollama, model, name).await?;
    }
    copy(ollama, pulled, model).await?;
    let found = find(&listed(ollama).await?, model).unwrap_or_default();
    let done = if found == wanted.hex() {
        Ok(())
    } else {
        let undone = match &kept_as {
            Some(name) => copy(ollama, name, model).await,
            None => delete(ollama, model).await,
        };
        if let Err(error) = undone {
            tracing::warn!(model, %error, "a copy that is another model could not be taken back");
        }
        Err(CopyError::Ollama(format!("after the copy {model} has the digest '{found}', and not {}", wanted.hex())))
    };
    if let Some(kept) = kept {
        kept.clear().await;
    }
    done
}

/// Pulls from our registry, and passes on what Ollama says.
async fn pull(ollama: &Ollama, name: &str, tell: &Tell, following: &mut Following) -> Result<(), CopyError> {
    for _ in 0..BEGINNINGS {
        match pull_once(ollama, name, tell, following).await {
            Err(CopyError::Ollama(why)) if why.contains("context canceled") => tokio::time::sleep(PAUSE).await,
            other => return other,
        }
    }
    pull_once(ollama, name, tell, following).await
}

async fn pull_once(ollama: &Ollama, name: &str, tell: &Tell, following: &mut Following) -> Result<(), CopyError> {
    let body = json!({"model": name, "insecure": true, "stream": true}).to_string();
    let ask = Ask { infers: false, fresh: true, ..Ask::post("/api/pull", body) };
    let reply = ollama.send(ask).await.map_err(|error| CopyError::Ollama(error.to_string()))?;
    let mut body = good(reply).await?.body;
    let mut is_done = false;
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|error| CopyError::Ollama(error.to_string()))?;
        for line in Line::all(&chunk.bytes) {
            match line {
                Line { error: Some(why), .. } => return Err(CopyError::Ollama(why)),
                Line { status, .. } if status == "success" => is_done = true,
                line => {
                    following(&line);
                    let _ = tell.send(Ok(progress(line))).await;
                }
            }
        }
    }
    if is_done { Ok(()) } else { Err(CopyError::Ollama("the pull of the copy ended without success".to_owned())) }
}

fn progress(line: Line) -> CopyModelResponse {
    let Line { status, digest, total, completed, .. } = line;
    CopyModelResponse { progress: Some(PullModelResponse { status, digest, total, completed }), want: None }
}

async fn listed(ollama: &Ollama) -> Result<Vec<Model>, CopyError> {
    let failed = |error: crate::ollama::StateError| CopyError::Ollama(error.to_string());
    every_on_disk(&ollama.told(ON_DISK).await.map_err(failed)?).map_err(failed)
}

async fn copy(ollama: &Ollama, source: &str, destination: &str) -> Result<(), CopyError> {
    let body = json!({"source": source, "destination": destination}).to_string();
    change(ollama, Ask::post("/api/copy", body)).await
}

/// Removes a name; that it is not there is as good.
async fn delete(ollama: &Ollama, name: &str) -> Result<(), CopyError> {
    let ask = Ask { method: Method::DELETE, ..Ask::post("/api/delete", json!({"model": name}).to_string()) };
    change(ollama, ask).await
}

async fn change(ollama: &Ollama, ask: Ask) -> Result<(), CopyError> {
    let is_delete = ask.method == Method::DELETE;
    let ask = Ask { infers: false, fresh: true, ..ask };
    let reply = ollama.send(ask).await.map_err(|error| CopyError::Ollama(error.to_string()))?;
    if is_delete && reply.status == StatusCode::NOT_FOUND {
        return Ok(());
    }
    good(reply).await.map(drop)
}

/// An answer, if it is a good one.
async fn good(reply: Reply) -> Result<Reply, CopyError> {
    if reply.status.is_success() {
        return Ok(reply);
    }
    let status = reply.status.as_u16();
    let body = reply.body.collect(LONGEST).await.unwrap_or_default();
    let line = Line::all(&body).next().unwrap_or_default();
    Err(CopyError::Ollama(line.error.unwrap_or_else(|| format!("status {status}"))))
}

fn shown(text: &str) -> String {
    text.chars().take(80).filter(|c| !c.is_control()).collect()
}

/// Those who have the model.
struct Sources {
    peers: Vec<(Peer, String, String)>,
    relay: Option<Relay>,
    /// The first of them that has not failed yet.
    first: Arc<AtomicUsize>,
}

impl Sources {
    fn new(order: &CopyOrder, relay: Option<Relay>, inner: &Inner) -> Result<Self, CopyError> {
        let mut peers = Vec::new();
        for source in order.sources.iter().filter(|source| !source.address.is_empty()).take(MOST_SOURCES) {
            if source.address.len() > LONGEST_ADDRESS {
                return Err(CopyError::Order(format!("{}… is no address", shown(&source.address))));
            }
            let spec = ServerSpec::parse(&source.address).map_err(|error| CopyError::Order(error.to_string()))?;
            if !is_of_a_server(&spec) {
                return Err(CopyError::Order(format!("no server can be at {}", shown(&source.address))));
            }
            let peer = Peer::at(&spec, inner.connect, &inner.trust);
            let peer = peer.ok_or_else(|| CopyError::Order(format!("{} is no agent", shown(&source.address))))?;
            peers.push((peer, source.address.clone(), source.model.clone()));
        }
        if peers.is_empty() && relay.is_none() {
            return Err(CopyError::Order("it names nobody who has the model".to_owned()));
        }
        Ok(Self { peers, relay, first: Arc::default() })
    }

    /// The manifest of that digest, from the first who gives it. Who does not is not asked for anything else.
    async fn manifest(&self, digest: &Digest) -> Result<Manifest, CopyError> {
        let mut whys = Vec::new();
        for (at, (peer, address, model)) in self.peers.iter().enumerate() {
            match peer.read_model(model, digest.hex()).await.map(checked(digest)) {
                Ok(Ok(manifest)) => return Ok(manifest),
                Ok(Err(error)) => whys.push(format!("{address}: {error}")),
                Err(error) => whys.push(format!("{address}: {error}")),
            }
            self.first.store(at + 1, Ordering::Relaxed);
        }
        if let Some(relay) = &self.relay {
            match relay.want(String::new(), 0, WANT).await.map(checked(digest)) {
                Ok(Ok(manifest)) => return Ok(manifest),
                Ok(Err(error)) => whys.push(error.to_string()),
                Err(error) => whys.push(error.to_string()),
            }
        }
        Err(CopyError::Sources(whys.join("; ")))
    }
}

/// Whether a server of the cluster can be there: whoever orders a copy says where the model is.
fn is_of_a_server(spec: &ServerSpec) -> bool {
    let Way::Agent(endpoint) = &spec.way else { return true };
    let address = endpoint.authority().parse::<SocketAddr>();
    address.map_or(true, |address| networks::is_of_one_server(address.ip()))
}

fn checked(wanted: &Digest) -> impl Fn(Bytes) -> Result<Manifest, StoreError> + '_ {
    |bytes| {
        let found = Digest::of(&bytes);
        if found != *wanted {
            let [found, wanted] = [&found, wanted].map(|digest| digest.hex().to_owned());
            return Err(StoreError::Another { model: "it".to_owned(), found, wanted });
        }
        Manifest::parse(bytes)
    }
}

/// A part of a blob that is being read.
struct Reading {
    sources: Vec<(Peer, String, String)>,
    relay: Option<Relay>,
    first: Arc<AtomicUsize>,
    digest: Digest,
    offset: u64,
    left: u64,
    /// Whom it is read from, and the answer, once there is one.
    at: usize,
    stream: Option<Streaming<ReadBlobResponse>>,
    whys: Vec<String>,
    is_over: bool,
}

impl Source for Sources {
    fn read(&self, digest: &Digest, offset: u64, length: u64) -> BoxStream<'static, Result<Bytes, BoxError>> {
        let reading = Reading {
            sources: self.peers.clone(),
            relay: self.relay.clone(),
            first: self.first.clone(),
            digest: digest.clone(),
            offset,
            left: length,
            at: 0,
            stream: None,
            whys: Vec::new(),
            is_over: false,
        };
        Box::pin(futures_util::stream::unfold(reading, |mut reading| async move {
            let piece = reading.next().await?;
            reading.is_over = piece.is_err();
            Some((piece, reading))
        }))
    }
}

impl Reading {
    async fn next(&mut self) -> Option<Result<Bytes, BoxError>> {
        while self.left > 0 && !self.is_over {
            if let Some(stream) = &mut self.stream {
                match stream.message().await {
                    Ok(Some(message)) if message.data.is_empty() => {}
                    Ok(Some(message)) => return Some(Ok(self.took(message.data))),
                    Ok(None) => self.failed("its file is shorter than the manifest says"),
                    Err(status) => self.failed(status.message()),
                }
                continue;
            }
            self.at = self.at.max(self.first.load(Ordering::Relaxed));
            if let Some((peer, ..)) = self.sources.get(self.at) {
                match peer.read_blob(&self.digest.to_string(), self.offset, self.left).await {
                    Ok(stream) => self.stream = Some(stream),
                    Err(error) => self.failed(&error.to_string()),
                }
                continue;
            }
            let Some(relay) = self.relay.clone() else {
                return Some(Err(self.whys.join("; ").into()));
            };
            return Some(match relay.want(self.digest.to_string(), self.offset, self.left.min(WANT)).await {
                Ok(data) if data.is_empty() => Err("the proxy gave nothing".into()),
                Ok(data) => Ok(self.took(data)),
                Err(error) => {
                    self.whys.push(error.to_string());
                    Err(self.whys.join("; ").into())
                }
            });
        }
        None
    }

    fn took(&mut self, mut data: Bytes) -> Bytes {
        data.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.offset += data.len() as u64;
        self.left -= data.len() as u64;
        data
    }

    /// Whoever is asked has failed: from now on the next is.
    fn failed(&mut self, why: &str) {
        self.stream = None;
        if let Some((_, address, _)) = self.sources.get(self.at) {
            tracing::debug!(address, why, "a source of a copy has failed");
            self.whys.push(format!("{address}: {why}"));
        }
        self.first.fetch_max(self.at + 1, Ordering::Relaxed);
        self.at += 1;
    }
}

/// Asks whoever ordered the copy for what nobody gives directly.
#[derive(Clone)]
struct Relay(Arc<Relaying>);

struct Relaying {
    tell: Tell,
    waiting: Arc<Waiting>,
    next: AtomicU32,
    places: Arc<Semaphore>,
    _reading: AbortOnDropHandle<()>,
}

type Waiting = Mutex<HashMap<u32, Asked>>;

/// What was asked of the caller. It takes a place until the answer is there, also when nobody waits for that any more.
struct Asked {
    answer: oneshot::Sender<CopyPiece>,
    _place: OwnedSemaphorePermit,
}

impl Relay {
    fn start(mut answers: Streaming<CopyModelRequest>, tell: Tell) -> Self {
        let waiting: Arc<Waiting> = Arc::default();
        let filled = waiting.clone();
        let reading = AbortOnDropHandle::new(tokio::spawn(async move {
            while let Ok(Some(message)) = answers.message().await {
                let Some(piece) = message.piece else { continue };
                if let Some(asked) = lock(&filled).remove(&piece.id) {
                    let _ = asked.answer.send(piece);
                }
            }
            // Who still waits is told by the end of its channel.
            lock(&filled).clear();
        }));
        let places = Arc::new(Semaphore::new(RELAYED));
        Self(Arc::new(Relaying { tell, waiting, next: AtomicU32::new(0), places, _reading: reading }))
    }

    async fn want(&self, digest: String, offset: u64, length: u64) -> Result<Bytes, BoxError> {
        let place = self.0.places.clone().acquire_owned().await?;
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (answer, receiver) = oneshot::channel();
        lock(&self.0.waiting).insert(id, Asked { answer, _place: place });
        let want = CopyModelResponse { progress: None, want: Some(CopyWant { id, digest, offset, length }) };
        self.0.tell.send(Ok(want)).await.map_err(|_| "the proxy has gone")?;
        let piece = tokio::time::timeout(PATIENCE, receiver).await;
        let piece =
            piece.map_err(|_| "the proxy was silent for too long")?.map_err(|_| "the proxy passes nothing on")?;
        if piece.error.is_empty() { Ok(piece.data) } else { Err(piece.error.into()) }
    }
}

fn lock(waiting: &Waiting) -> MutexGuard<'_, HashMap<u32, Asked>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_leads_to_nothing_but_a_port_of_this_machine() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_alive(&format!("127.0.0.1:{port}/olol-copy-0/m:latest")).await);
        let others = ["localhost", "0.0.0.0", "192.0.2.1", "127.0.0.1:some.example", "[::1]"];
        for host in others {
            assert!(!is_alive(&format!("{host}:{port}/olol-copy-0/m:latest")).await, "{host}");
        }
    }
}
