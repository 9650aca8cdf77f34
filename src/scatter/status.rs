//! `GET /api/status`: Ollama's own keys and our summary, at once, whatever the servers do.
//!
//! A server is asked for Ollama's keys as long as nobody notices. If it takes longer, what was heard last counts, and the
//! question goes on by itself, so that the next one is answered with what it brings.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Method, StatusCode};
use olol_middleware::cluster::State;
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Error, Head, Payload, Reply, Route, Server, ServerId, Shared};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{MERGE_LIMIT, NATIVE, Scatter, json_reply};
use crate::status::{self, About};

/// How long Ollama's keys are waited for: with all that we do ourselves the answer is there within 10 ms.
const PATIENCE: Duration = Duration::from_millis(3);
/// How long they are waited for before the first client is served.
const FIRST: Duration = Duration::from_millis(200);
/// Questions that may go on by themselves.
const QUESTIONS: usize = 8;
/// The longest status of an Ollama, bytes.
const LONGEST: usize = 64 << 10;

/// What is needed for a status.
#[derive(Debug)]
pub(super) struct Status {
    shared: Shared,
    about: About,
    heard: ArcSwapOption<Heard>,
    questions: Arc<Semaphore>,
}

/// The status of an Ollama, as it was told.
#[derive(Debug)]
struct Heard {
    server: ServerId,
    bytes: Bytes,
    at: Instant,
}

impl Status {
    pub(super) fn new(shared: Shared, about: About) -> Self {
        Self { shared, about, heard: ArcSwapOption::empty(), questions: Arc::new(Semaphore::new(QUESTIONS)) }
    }
}

impl<F: Fleet> Scatter<F> {
    /// Ollama's own status with our summary in it.
    pub(super) async fn status(self, call: Call) -> Result<Reply, Error> {
        let snapshot = call.candidates.snapshot().clone();
        let live = tokio::time::timeout(PATIENCE, self.clone().asked(call)).await.ok().flatten();
        let Status { shared, about, heard, .. } = &self.shared.status;
        let (source, heard) = match (live, heard.load_full()) {
            (Some(live), _) => ("live", Some(live)),
            (None, Some(heard)) => ("remembered", Some(heard)),
            (None, None) => ("none", None),
        };
        let mut ours = status::summary(shared, &snapshot, about);
        // Where the keys beside ours come from.
        ours["ollama"] = json!({
            "source": source,
            "server": heard.as_ref().map(|heard| heard.server.as_str()),
            "age_ms": heard.as_ref().map(|heard| u64::try_from(heard.at.elapsed().as_millis()).unwrap_or(u64::MAX)),
        });
        let theirs = heard.as_ref().and_then(|heard| std::str::from_utf8(&heard.bytes).ok()).unwrap_or_default();
        let body = match theirs.trim().strip_suffix('}') {
            Some(open) if open.trim_end() != "{" => format!("{open},\"olol\":{ours}}}"),
            _ => format!("{{\"olol\":{ours}}}"),
        };
        Ok(json_reply(StatusCode::OK, NATIVE, body))
    }

    /// Asks for Ollama's keys once, so that they are known when somebody wants them and no server answers any more. Takes
    /// no longer than a moment.
    pub(crate) async fn first_status(self) {
        if !self.shared.cluster.snapshot().servers.iter().any(|server| server.state == State::Up) {
            return;
        }
        let head = Head::new(Route::Status, Method::GET, PathAndQuery::from_static("/api/status"));
        let candidates = self.shared.cluster.snapshot().all();
        let _ = tokio::time::timeout(FIRST, self.asked(Call::new(head, Payload::empty(), candidates))).await;
    }

    /// What the first server that can be reached tells. The question goes on when nobody waits for it any more.
    async fn asked(self, call: Call) -> Option<Arc<Heard>> {
        let snapshot = call.candidates.snapshot().clone();
        let servers = || snapshot.servers.iter().filter(|server| server.is_reachable());
        let server = servers().find(|server| server.state == State::Up).or_else(|| servers().next())?.clone();
        let question = self.shared.status.questions.clone().try_acquire_owned().ok()?;
        let asking = async move {
            let _question = question;
            let answer = async {
                let reply = self.looked_up(call, &server).await.ok().filter(|reply| reply.status.is_success())?;
                reply.body.collect(LONGEST).await.ok()
            };
            let bytes = tokio::time::timeout(MERGE_LIMIT, answer).await.ok().flatten()?;
            let heard = Arc::new(Heard { server: server.id.clone(), bytes, at: Instant::now() });
            self.shared.status.heard.store(Some(heard.clone()));
            Some(heard)
        };
        tokio::spawn(asking).await.ok().flatten()
    }

    /// Asks a server for the proxy itself, which no figures tell of.
    async fn looked_up(&self, call: Call, server: &Server) -> Result<Reply, Error> {
        Self::sent(call, server, |call| self.pick.look_up(call, server)).await
    }
}
