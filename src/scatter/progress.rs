//! Creates at several servers, told to the client as one.
//!
//! The client sees one valid stream: each status once all have reached it, each layer at the progress of the slowest, and at
//! the end `success`, or an error that names who failed. What has been said is never taken back. Servers that a layer has
//! taken out of the candidates are not asked.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use http::StatusCode;
use olol_middleware::call::Body;
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Candidates, Chunk, Cluster, Error, ModelName, Reply, Server, ServerId};
use serde::Deserialize;
use serde_json::json;

use super::{LONGEST, News, Scatter, holders, json_reply};
use crate::ollama::lines_of;

/// What one server said.
enum Said {
    Line(Bytes),
    Failed(Error),
    Over,
}

impl<F: Fleet> Scatter<F> {
    /// Lets every server concerned do it and follows them all.
    pub(super) async fn progress(self, call: Call) -> Result<Reply, Error> {
        let is_meant = |server: &Arc<Server>| call.candidates.get(server.index).is_some();
        let everybody: Vec<Arc<Server>> = call.candidates.iter().cloned().collect();
        let mut targets: Vec<Arc<Server>> = everybody.iter().filter(|server| server.is_reachable()).cloned().collect();
        if targets.is_empty() {
            targets.clone_from(&everybody);
        }
        let mut refused = Vec::new();
        let is_left_out = |server: &Arc<Server>| targets.iter().all(|target| target.id != server.id);
        let mut absent: Vec<ServerId> =
            everybody.iter().filter(|server| is_left_out(server)).map(|server| server.id.clone()).collect();
        let base = call.peek.from.as_deref().and_then(ModelName::parse);
        let mut with_base = holders(&call.candidates, base.as_ref());
        with_base.retain(is_meant);
        if !with_base.is_empty() {
            // Who has the base and does not answer is left out, as long as another has it.
            let (there, away): (Vec<_>, Vec<_>) = with_base.iter().cloned().partition(|server| server.is_reachable());
            let is_there = !there.is_empty();
            absent = if is_there { away.iter().map(|server| server.id.clone()).collect() } else { Vec::new() };
            targets = if is_there { there } else { with_base };
        }
        let (digests, candidates) = (call.peek.digests.clone(), call.candidates.clone());
        for (server, error) in self.give_blobs(&digests, &candidates, &targets).await {
            targets.retain(|target| target.id != server);
            refused.push((server, Err(error)));
        }
        let news = News { cluster: self.shared.cluster.clone(), servers: targets.clone() };
        let mut begun = Vec::new();
        let answers = futures_util::future::join_all(targets.iter().map(|server| {
            let call = call.again();
            let scatter = &self;
            async move {
                match call {
                    Some(call) => scatter.to(call, server).await,
                    None => Err(Error::Internal("the body cannot be sent to several servers".to_owned())),
                }
            }
        }))
        .await;
        for (server, answer) in targets.iter().zip(answers) {
            match answer {
                Ok(reply) if reply.status.is_success() => begun.push((server.id.clone(), reply)),
                other => refused.push((server.id.clone(), other)),
            }
        }
        if begun.is_empty() {
            // All refuse, and mostly for one reason: the first one's words.
            let none = || Err(Error::NoServer("the proxy has no servers".to_owned()));
            return refused.into_iter().next().map_or_else(none, |(_, answer)| answer);
        }
        let streams = call.peek.stream != Some(false);
        let begun_by: Vec<ServerId> = begun.iter().map(|(id, _)| id.clone()).collect();
        let made = Made { cluster: self.shared.cluster.clone(), model: call.place.model.clone(), servers: begun_by };
        let mut headers = begun[0].1.headers.clone();
        headers.remove(http::header::CONTENT_LENGTH);
        let concerned = begun.len() + refused.len();
        let mut told = Told::new(begun.iter().map(|(id, _)| id.clone()).collect(), concerned);
        for (id, answer) in refused {
            let why = match answer {
                Ok(reply) => error_text(&reply.body.collect(LONGEST).await.unwrap_or_default()),
                Err(error) => error.to_string(),
            };
            absent.push(id.clone());
            told.failures.push((id, why));
        }
        if !streams {
            return whole(begun, told, absent, &made, news).await;
        }
        let said = select(begun.into_iter().map(|(_, reply)| reply.body).enumerate());
        let lines = stream::unfold((said, told, Some(made)), |(mut said, mut told, mut made)| async move {
            // Gone with the last line.
            let _ = made.as_ref()?;
            loop {
                let line = if let Some((server, said)) = said.next().await {
                    told.hear(server, said)
                } else {
                    if let Some(made) = made.take() {
                        made.note(&told);
                    }
                    Some(told.last())
                };
                if let Some(line) = line {
                    return Some((Ok(Chunk::from(line)), (said, told, made)));
                }
            }
        });
        let mut reply = Reply { status: StatusCode::OK, headers, body: Body::new(lines) };
        reply.body.outcome_mut().absent = absent;
        Ok(reply.hold(news))
    }

    /// Gives the blobs that a create names to the servers that lack them, and tells to whom they could not be given.
    async fn give_blobs(
        &self,
        digests: &[String],
        candidates: &Candidates,
        targets: &[Arc<Server>],
    ) -> Vec<(ServerId, Error)> {
        let blobs: Vec<_> = digests.iter().filter_map(|digest| self.shared.spool.find(digest)).collect();
        let giving = targets.iter().map(|server| async {
            for blob in &blobs {
                if let Err(error) = self.give(candidates, blob, server).await {
                    return Some((server.id.clone(), error));
                }
            }
            None
        });
        futures_util::future::join_all(giving).await.into_iter().flatten().collect()
    }
}

/// What these servers are about to have.
struct Made {
    cluster: Arc<Cluster>,
    model: Option<ModelName>,
    servers: Vec<ServerId>,
}

impl Made {
    /// Makes known who has it now, before the client hears of it.
    fn note(&self, told: &Told) {
        let Some(model) = &self.model else { return };
        let failed = |id: &ServerId| told.failures.iter().any(|(failed, _)| failed == id);
        let servers: Vec<ServerId> = self.servers.iter().filter(|id| !failed(id)).cloned().collect();
        self.cluster.note_installed(&servers, model, None);
    }
}

/// All bodies at once, each chunk with the number of its server.
fn select(bodies: impl Iterator<Item = (usize, Body)>) -> SelectAll<BoxStream<'static, (usize, Said)>> {
    let one = |(server, body): (usize, Body)| {
        let lines = body.flat_map(|chunk| {
            stream::iter(match chunk {
                Ok(chunk) => lines_of(&chunk.bytes).into_iter().map(Said::Line).collect(),
                Err(error) => vec![Said::Failed(error)],
            })
        });
        lines.chain(stream::iter([Said::Over])).map(move |said| (server, said)).boxed()
    };
    stream::select_all(bodies.map(one))
}

/// The answers of all, when the client wants one object.
async fn whole(
    begun: Vec<(ServerId, Reply)>,
    mut told: Told,
    mut absent: Vec<ServerId>,
    made: &Made,
    news: News,
) -> Result<Reply, Error> {
    let answers = futures_util::future::join_all(
        begun.into_iter().map(|(id, reply)| async move { (id, reply.headers, reply.body.collect(LONGEST).await) }),
    )
    .await;
    let mut good = None;
    for (id, headers, body) in answers {
        match body {
            Ok(body) => good = good.or(Some((headers, body))),
            Err(error) => {
                absent.push(id.clone());
                told.failures.push((id, error.to_string()));
            }
        }
    }
    made.note(&told);
    let mut reply = match good {
        Some((headers, body)) if told.failures.is_empty() => Reply::full(StatusCode::OK, headers, body),
        _ => json_reply(StatusCode::INTERNAL_SERVER_ERROR, "application/json; charset=utf-8", told.failure()),
    };
    reply.body.outcome_mut().absent = absent;
    Ok(reply.hold(news))
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Line {
    status: String,
    digest: String,
    total: u64,
    completed: u64,
    error: Option<String>,
}

/// How far one server is.
#[derive(Default)]
struct Course {
    /// Steps it has reached, in its order: statuses, and layers with their bytes.
    steps: Vec<Step>,
    over: bool,
}

struct Step {
    line: Bytes,
    status: String,
    digest: String,
    total: u64,
    completed: u64,
}

/// What the client has been told so far, and what the servers have said.
struct Told {
    ids: Vec<ServerId>,
    /// How many servers it is about: those that are followed, and those that refused.
    concerned: usize,
    servers: Vec<Course>,
    failures: Vec<(ServerId, String)>,
    /// Statuses that were told, and bytes of layers.
    said: Vec<(String, String, u64)>,
    success: Option<Bytes>,
    finished: bool,
}

impl Told {
    fn new(ids: Vec<ServerId>, concerned: usize) -> Self {
        let servers = ids.iter().map(|_| Course::default()).collect();
        Self { ids, concerned, servers, failures: Vec::new(), said: Vec::new(), success: None, finished: false }
    }

    /// Takes what a server said; returns what the client is told now.
    fn hear(&mut self, server: usize, said: Said) -> Option<Bytes> {
        match said {
            Said::Over => self.servers[server].over = true,
            Said::Failed(error) => self.fail(server, error.to_string()),
            Said::Line(line) => {
                let parsed: Line = serde_json::from_slice(&line).unwrap_or_default();
                if let Some(error) = parsed.error {
                    self.fail(server, error);
                } else if parsed.status == "success" {
                    self.success = Some(line);
                } else {
                    self.servers[server].reach(parsed, line);
                }
            }
        }
        self.next()
    }

    fn fail(&mut self, server: usize, why: String) {
        self.failures.push((self.ids[server].clone(), why));
        self.servers[server].over = true;
        self.servers[server].steps.clear();
    }

    /// The servers that still count: those that have not failed.
    fn counting(&self) -> impl Iterator<Item = &Course> {
        let failed = |at: usize| self.failures.iter().any(|(id, _)| *id == self.ids[at]);
        self.servers.iter().enumerate().filter(move |(at, _)| !failed(*at)).map(|(_, server)| server)
    }

    /// The furthest line that is true of every server and was not told yet.
    fn next(&mut self) -> Option<Bytes> {
        let slowest = self.counting().filter(|server| !server.over).min_by_key(|server| server.score())?;
        let step = slowest.steps.last()?;
        let known = self.said.iter().position(|(status, digest, _)| *status == step.status && *digest == step.digest);
        let line = step.line.clone();
        let said = (step.status.clone(), step.digest.clone(), step.completed);
        match known {
            None => self.said.push(said),
            // Only forward, and only in the layer that was told last.
            Some(at) if at + 1 == self.said.len() && self.said[at].2 < said.2 => self.said[at].2 = said.2,
            Some(_) => return None,
        }
        Some(line)
    }

    /// The last line.
    fn last(&mut self) -> Bytes {
        self.finished = true;
        match self.success.take() {
            Some(line) if self.failures.is_empty() => line,
            _ => format!("{}\n", self.failure()).into(),
        }
    }

    /// Who failed and why; one server's own words where all of them failed.
    fn failure(&self) -> String {
        let all = self.failures.len() >= self.concerned;
        let text = match self.failures.first() {
            None => "a server ended without success".to_owned(),
            Some((id, why)) if all => {
                for (other, why) in &self.failures[1..] {
                    tracing::debug!(server = %other, why, told = %id, "all servers failed");
                }
                why.clone()
            }
            Some(_) => self.failures.iter().map(named).collect::<Vec<_>>().join("; "),
        };
        json!({"error": text}).to_string()
    }
}

/// What failed at a server, with its name; errors of ours have it in them.
fn named((id, why): &(ServerId, String)) -> String {
    if why.starts_with(&format!("server {id} ")) { why.clone() } else { format!("server {id}: {why}") }
}

impl Course {
    fn reach(&mut self, line: Line, bytes: Bytes) {
        let step = Step {
            line: bytes,
            status: line.status,
            digest: line.digest,
            total: line.total,
            completed: line.completed,
        };
        match self.steps.iter_mut().find(|known| known.status == step.status && known.digest == step.digest) {
            Some(known) => *known = step,
            None => self.steps.push(step),
        }
    }

    /// Steps done, then bytes of the step that runs: more is further.
    fn score(&self) -> (usize, u64) {
        let last = self.steps.last();
        let share = last.map_or(0, |step| step.completed.saturating_mul(1000) / step.total.max(1));
        (self.steps.len(), share)
    }
}

/// The text of an error's body.
fn error_text(body: &[u8]) -> String {
    let parsed: Line = serde_json::from_slice(body).unwrap_or_default();
    parsed.error.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(servers: usize, events: &[(usize, &str)]) -> Vec<String> {
        let mut told = Told::new((0..servers).map(|at| ServerId::new(&at.to_string())).collect(), servers);
        let mut out: Vec<String> = Vec::new();
        for (server, line) in events {
            let said = if *line == "over" { Said::Over } else { Said::Line(Bytes::copy_from_slice(line.as_bytes())) };
            out.extend(told.hear(*server, said).map(|line| String::from_utf8_lossy(&line).into_owned()));
        }
        out.push(String::from_utf8_lossy(&told.last()).into_owned());
        out
    }

    fn layer(completed: u64) -> String {
        format!(r#"{{"status":"pulling aa","digest":"sha256:aa","total":100,"completed":{completed}}}"#)
    }

    #[test]
    fn the_slowest_is_told_and_never_goes_back() {
        let (ten, fifty, all) = (layer(10), layer(50), layer(100));
        let manifest = r#"{"status":"pulling manifest"}"#;
        let success = r#"{"status":"success"}"#;
        let events = [
            (0, manifest),
            (1, manifest),
            (0, &fifty),
            (0, &all),
            (1, &ten),
            (1, &fifty),
            (1, &all),
            (0, success),
            (1, success),
            (0, "over"),
            (1, "over"),
        ];
        let out = run(2, &events);
        assert_eq!(out.first().map(String::as_str), Some(manifest));
        assert_eq!(out.last().map(String::as_str), Some(success));
        let completed: Vec<u64> = out
            .iter()
            .filter_map(|line| serde_json::from_str::<Line>(line).ok())
            .filter(|line| !line.digest.is_empty())
            .map(|line| line.completed)
            .collect();
        assert!(completed.is_sorted() && completed.last() == Some(&100), "{completed:?}");
        assert!(!completed.contains(&0));
    }

    #[test]
    fn who_failed_is_named() {
        let out = run(2, &[(0, r#"{"status":"success"}"#), (1, r#"{"error":"disk full"}"#), (0, "over")]);
        assert_eq!(out.last().map(String::as_str), Some("{\"error\":\"server 1: disk full\"}\n"));
    }

    #[test]
    fn when_all_fail_the_words_are_ollamas() {
        let missing = r#"{"error":"pull model manifest: file does not exist"}"#;
        assert_eq!(run(2, &[(0, missing), (1, missing)]).last().map(String::as_str), Some(&*format!("{missing}\n")));
        let elsewhere = r#"{"error":"another path"}"#;
        assert_eq!(run(2, &[(1, missing), (0, elsewhere)]).last().map(String::as_str), Some(&*format!("{missing}\n")));
    }
}
