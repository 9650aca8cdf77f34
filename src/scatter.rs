//! The leaf below the layers: calls for one server go on to [`Pick`], calls that concern several are sent to each of them.
//!
//! With a single server everything goes to it and its bytes pass unchanged. With several, lists are merged (`merge`), and
//! what changes models is told to everybody it concerns (`tell`, `pull`, `create`, `blobs`).

mod blobs;
mod create;
mod merge;
mod needed;
mod pull;
mod status;
mod tell;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt, stream};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use olol_middleware::call::{Answer, Chunks};
use olol_middleware::pick::{Fleet, Pick};
use olol_middleware::units::SomeSeconds;
use olol_middleware::{Call, Candidates, Chunk, Cluster, Error, ModelName, Reply, Route, Scope, Server, ServerId};
use serde::{Deserialize, Serialize};
use tower::Service;

use crate::models::Models;
use crate::models::pull::catch_up;
use crate::status::About;

/// How long silent servers are waited for when lists are merged.
const MERGE_LIMIT: Duration = Duration::from_secs(1);
/// What the last line of a pull says when the model is there.
const SUCCESS: &[u8] = b"\"success\"";
/// Ollama's content type for its own JSON.
const NATIVE: &str = "application/json; charset=utf-8";
/// The longest answer that is read as a whole, bytes.
const LONGEST: usize = 64 << 20;

/// The `[spool]` table: where blobs of a `create` wait when there are several servers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Folder; empty: `olol` in the system's folder for temporary files.
    pub dir: PathBuf,
    /// Bytes that may wait there.
    pub max_bytes: u64,
    /// Seconds after which a blob that nobody used is removed.
    pub ttl_s: SomeSeconds,
}

impl Default for Config {
    fn default() -> Self {
        Self { dir: PathBuf::new(), max_bytes: 64 << 30, ttl_s: SomeSeconds::new(3600) }
    }
}

/// Sends each call to one server, or to all that it concerns.
#[derive(Clone, Debug)]
pub struct Scatter<F> {
    pick: Pick<F>,
    shared: Arc<Common>,
}

/// What all clones share.
#[derive(Debug)]
struct Common {
    cluster: Arc<Cluster>,
    spool: blobs::Spool,
    models: Models,
    status: status::Status,
    needed: needed::Needed,
}

impl<F: Fleet> Scatter<F> {
    /// A leaf over a fleet.
    pub fn new(fleet: F, shared: &olol_middleware::Shared, config: &Config, about: About) -> Self {
        let (cluster, picking) = (shared.cluster.clone(), shared.picking.clone());
        let models = about.models.clone();
        let status = status::Status::new(shared.clone(), about);
        let (spool, needed) = (blobs::Spool::new(config), needed::Needed::default());
        let shared = Arc::new(Common { cluster, spool, models, status, needed });
        Self { pick: Pick::new(fleet, picking), shared }
    }
}

impl<F: Fleet> Service<Call> for Scatter<F> {
    type Response = Reply;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Reply, Error>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        let several = call.candidates.snapshot().servers.len() > 1;
        if call.dry && !matches!(call.route.scope(), Scope::One | Scope::Same) {
            let scope = if call.route.scope() == Scope::All { "every server that it concerns" } else { "every server" };
            call.note("scatter", scope, [("servers", call.candidates.count().into())]);
            return Box::pin(std::future::ready(Ok(Reply::full(StatusCode::OK, HeaderMap::new(), ""))));
        }
        match call.route.scope() {
            // Unloading concerns every server that has the model in memory.
            Scope::One if several && call.peek.unloads() && matches!(call.route, Route::Generate | Route::Chat) => {
                let targets = call.known.as_ref().map(|known| known.loaded.clone()).unwrap_or_default();
                match targets.iter().count() {
                    0 | 1 => self.pick.call(call),
                    _ => {
                        call.candidates.keep(&targets);
                        Box::pin(self.clone().tell(call))
                    }
                }
            }
            Scope::One | Scope::Local => self.pick.call(call),
            Scope::Same => {
                first_usable(&mut call.candidates);
                self.pick.call(call)
            }
            Scope::Merge if call.route == Route::Status => Box::pin(self.clone().status(call)),
            Scope::Merge if !several => Box::pin(self.clone().one_list(call)),
            Scope::Merge => Box::pin(self.clone().merged(call)),
            Scope::All if !several => Box::pin(self.clone().change_one(call)),
            Scope::All => match call.route {
                Route::Blob => Box::pin(self.clone().blob(call)),
                Route::Pull => Box::pin(self.clone().pull(call)),
                Route::Create => Box::pin(self.clone().create(call)),
                _ => Box::pin(self.clone().tell(call)),
            },
        }
    }
}

impl<F: Fleet> Scatter<F> {
    /// Sends a call to one certain server, and once more on a fresh connection if a pooled one had died.
    async fn to(&self, call: Call, server: &Server) -> Result<Reply, Error> {
        Self::sent(call, server, |call| self.pick.clone().call(call)).await
    }

    /// Sends a call meant for one server in this way, and once more on a fresh connection if a pooled one had died.
    async fn sent(mut call: Call, server: &Server, send: impl Fn(Call) -> Answer) -> Result<Reply, Error> {
        call.candidates.only(server.index);
        let spare = call.again();
        match (send(call).await, spare) {
            (Err(Error::Server { reused: true, .. }), Some(mut spare)) => {
                spare.fresh = true;
                send(spare).await
            }
            (answer, _) => answer,
        }
    }

    /// Sends the same call to one of several servers.
    fn same_to<'a>(
        &'a self,
        call: &Call,
        server: &'a Server,
    ) -> impl Future<Output = Result<Reply, Error>> + Send + use<'a, F> {
        let call = again(call);
        async move { self.to(call?, server).await }
    }

    /// A change at the only server: its bytes pass unchanged, and what is known of it is renewed when they are through.
    async fn change_one(self, call: Call) -> Result<Reply, Error> {
        let Some(server) = call.candidates.snapshot().servers.first().cloned() else {
            return self.pick.clone().call(call).await;
        };
        let pulled = call.place.model.clone().filter(|_| call.route == Route::Pull);
        let news = News { cluster: self.shared.cluster.clone(), servers: vec![server.clone()] };
        let reply = if matches!(call.payload, olol_middleware::Payload::Stream { .. }) {
            self.pick.clone().call(call).await?
        } else {
            self.to(call, &server).await?
        };
        if let Some(model) = pulled.filter(|_| reply.status.is_success()) {
            // The stream ends when it is known what has come: who reads to the end sees it in every list.
            let body = reply
                .body
                .through(|chunks| known_at_the_end(chunks, self.shared.cluster.clone(), server.id.clone(), model));
            return Ok(Reply { body, ..reply }.hold(news));
        }
        Ok(reply.hold(news))
    }

    /// A list of the only server.
    async fn one_list(self, call: Call) -> Result<Reply, Error> {
        let snapshot = call.candidates.snapshot().clone();
        let Some(server) = snapshot.servers.first() else { return self.pick.clone().call(call).await };
        let limit = Duration::from_secs(60);
        tokio::time::timeout(limit, self.to(call, server)).await.unwrap_or_else(|_| {
            Err(Error::NoServer(format!("server {} did not answer within {} s", server.id, limit.as_secs())))
        })
    }
}

/// A pull whose stream ends when it is known what has come to its server.
fn known_at_the_end(
    chunks: Chunks,
    cluster: Arc<Cluster>,
    server: ServerId,
    model: ModelName,
) -> impl Stream<Item = Result<Chunk, Error>> + Send {
    let is_there = Arc::new(AtomicBool::new(false));
    let sees = is_there.clone();
    let chunks = chunks.inspect(move |chunk| {
        let says_so = |chunk: &Chunk| chunk.bytes.windows(SUCCESS.len()).any(|part| part == SUCCESS);
        if chunk.as_ref().is_ok_and(says_so) {
            sees.store(true, Ordering::Relaxed);
        }
    });
    let known = stream::once(async move {
        let server = [server];
        let having: &[ServerId] = if is_there.load(Ordering::Relaxed) { &server } else { &[] };
        catch_up(&cluster, &server, having, &model).await;
    });
    chunks.chain(known.filter_map(|()| std::future::ready(None)))
}

/// The same call once more: for one of several servers.
fn again(call: &Call) -> Result<Call, Error> {
    call.again().ok_or_else(|| Error::Internal("the body cannot be sent to several servers".to_owned()))
}

/// Leaves the first server of the list that can be reached and is a candidate.
fn first_usable(candidates: &mut Candidates) {
    let first = candidates.iter().find(|server| server.is_reachable()).or_else(|| candidates.iter().next());
    if let Some(index) = first.map(|server| server.index) {
        candidates.only(index);
    }
}

/// Asks for news of servers when it is dropped: when an answer that changed something is through.
struct News {
    cluster: Arc<Cluster>,
    servers: Vec<Arc<Server>>,
}

impl Drop for News {
    fn drop(&mut self) {
        for server in &self.servers {
            self.cluster.want_news_of(&server.id);
        }
    }
}

/// A reply of JSON as Ollama's handlers write it.
fn json_reply(status: StatusCode, kind: &'static str, body: impl Into<bytes::Bytes>) -> Reply {
    Reply::full(status, HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]), body)
}

/// What a client has said is none; in Ollama's form.
pub(crate) fn bad_request(why: &str) -> Reply {
    json_reply(StatusCode::BAD_REQUEST, NATIVE, serde_json::json!({ "error": why }).to_string())
}

/// The servers that have a model.
fn holders(candidates: &Candidates, model: Option<&ModelName>) -> Vec<Arc<Server>> {
    let snapshot = candidates.snapshot();
    let Some(known) = model.and_then(|model| snapshot.known(model)) else { return Vec::new() };
    known.installed.iter().filter_map(|index| snapshot.servers.get(index)).cloned().collect()
}

/// Whether a call only looks, and no layer wants to see more.
fn is_head(call: &Call) -> bool {
    call.edits.as_ref().and_then(|edits| edits.method.as_ref()).unwrap_or(&call.method) == Method::HEAD
}
