//! Creates at several servers, told to the client as one.
//!
//! The client sees one valid stream, as of a pull (`told`), and at the end `success`, or an error that names who failed. Servers
//! that a layer has taken out of the candidates are not asked.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use http::StatusCode;
use olol_middleware::call::Body;
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Candidates, Chunk, Cluster, Error, ModelName, Reply, Server, ServerId};
use serde_json::json;

use super::{LONGEST, NATIVE, News, Scatter, holders, json_reply};
use crate::models::Line;
use crate::models::told::{Board, Telling, failure};
use crate::ollama::lines_of;

/// What one server said.
enum Said {
    Line(Bytes),
    Failed(Error),
    Over,
}

impl<F: Fleet> Scatter<F> {
    /// Lets every server concerned do it and follows them all.
    pub(super) async fn create(self, call: Call) -> Result<Reply, Error> {
        let (mut targets, mut absent) = concerned(&call);
        let mut refused = Vec::new();
        for (server, error) in self.give_blobs(&call.peek.digests, &call.candidates, &targets).await {
            targets.retain(|target| target.id != server);
            refused.push((server, Err(error)));
        }
        let news = News { cluster: self.shared.cluster.clone(), servers: targets.clone() };
        let mut begun = Vec::new();
        let answers = join_all(targets.iter().map(|server| self.same_to(&call, server))).await;
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
        let ids: Vec<ServerId> = begun.iter().map(|(id, _)| id.clone()).collect();
        let made = Made { cluster: self.shared.cluster.clone(), model: call.place.model.clone(), servers: ids.clone() };
        let mut told = Told::new(ids, begun.len() + refused.len());
        for (id, answer) in refused {
            let why = match answer {
                Ok(reply) => error_text(&reply.body.collect(LONGEST).await.unwrap_or_default()),
                Err(error) => error.to_string(),
            };
            absent.push(id.clone());
            told.failures.push((id, why));
        }
        if call.peek.stream == Some(false) {
            return whole(begun, told, absent, &made, news).await;
        }
        let mut reply = followed(begun, told, made);
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
        join_all(giving).await.into_iter().flatten().collect()
    }
}

/// The servers that are to do it: those with the base, if it has one that somebody has, else all. And those who are left out,
/// since they do not answer while others do.
fn concerned(call: &Call) -> (Vec<Arc<Server>>, Vec<ServerId>) {
    let base = call.peek.from.as_deref().and_then(ModelName::parse);
    let mut meant = holders(&call.candidates, base.as_ref());
    meant.retain(|server| call.candidates.get(server.index).is_some());
    if meant.is_empty() {
        meant = call.candidates.iter().cloned().collect();
    }
    let (there, away): (Vec<_>, Vec<_>) = meant.into_iter().partition(|server| server.is_reachable());
    if there.is_empty() { (away, Vec::new()) } else { (there, away.iter().map(|server| server.id.clone()).collect()) }
}

/// The answers of all as one stream.
fn followed(begun: Vec<(ServerId, Reply)>, told: Told, made: Made) -> Reply {
    let mut headers = begun[0].1.headers.clone();
    headers.remove(http::header::CONTENT_LENGTH);
    let said = select(begun.into_iter().map(|(_, reply)| reply.body).enumerate());
    let lines = stream::unfold((said, told, Some(made)), |(mut said, mut told, mut made)| async move {
        // Gone with the last line.
        made.as_ref()?;
        let lines = if let Some((server, said)) = said.next().await {
            told.hear(server, said)
        } else {
            if let Some(made) = made.take() {
                made.note(&told);
            }
            vec![told.last()]
        };
        let chunks = lines.into_iter().map(|line| Ok(Chunk::from(line)));
        Some((stream::iter(chunks), (said, told, made)))
    });
    Reply { status: StatusCode::OK, headers, body: Body::new(lines.flatten()) }
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
    let read = |(id, reply): (ServerId, Reply)| async move { (id, reply.headers, reply.body.collect(LONGEST).await) };
    let answers = join_all(begun.into_iter().map(read)).await;
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
        _ => json_reply(StatusCode::INTERNAL_SERVER_ERROR, NATIVE, told.failure()),
    };
    reply.body.outcome_mut().absent = absent;
    Ok(reply.hold(news))
}

/// What the client has been told so far, and what the servers have said.
struct Told {
    ids: Vec<ServerId>,
    /// How many servers it is about: those that are followed, and those that refused.
    concerned: usize,
    /// The servers in the order of `ids`.
    board: Board,
    telling: Telling,
    failures: Vec<(ServerId, String)>,
    /// Which of them have said their last word: `success`, or why they failed.
    have_ended: Vec<bool>,
    success: Option<Bytes>,
}

impl Told {
    fn new(ids: Vec<ServerId>, concerned: usize) -> Self {
        let mut board = Board::default();
        for _ in &ids {
            board.add();
        }
        let have_ended = vec![false; ids.len()];
        let (telling, failures) = (Telling::default(), Vec::new());
        Self { ids, concerned, board, telling, failures, have_ended, success: None }
    }

    /// Takes what a server said; returns what the client is told now.
    fn hear(&mut self, server: usize, said: Said) -> Vec<Bytes> {
        match said {
            Said::Over if self.have_ended[server] => {}
            Said::Over => self.fail(server, "it ended without success".to_owned()),
            Said::Failed(error) => self.fail(server, error.to_string()),
            Said::Line(raw) => {
                let line = Line::all(&raw).next().unwrap_or_default();
                if let Some(why) = line.error {
                    self.fail(server, why);
                } else if line.status == "success" {
                    self.success = Some(raw);
                    self.have_ended[server] = true;
                    self.board.finish(server);
                } else {
                    self.board.hear(server, &line, Some(&raw));
                }
            }
        }
        self.telling.news(&self.board)
    }

    fn fail(&mut self, server: usize, why: String) {
        self.have_ended[server] = true;
        self.failures.push((self.ids[server].clone(), why));
        self.board.drop_out(server);
    }

    /// The last line.
    fn last(&mut self) -> Bytes {
        match self.success.take() {
            Some(line) if self.failures.is_empty() => line,
            _ => format!("{}\n", self.failure()).into(),
        }
    }

    /// The body of an answer that tells who failed and why.
    fn failure(&self) -> String {
        let why = failure(&self.failures, self.failures.len() >= self.concerned);
        json!({ "error": why }).to_string()
    }
}

/// The text of an error's body.
fn error_text(body: &[u8]) -> String {
    let line = Line::all(body).next().unwrap_or_default();
    line.error.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(servers: usize, events: &[(usize, &str)]) -> Vec<String> {
        let mut told = Told::new((0..servers).map(|at| ServerId::new(&at.to_string())).collect(), servers);
        let mut out: Vec<String> = Vec::new();
        for (server, line) in events {
            let said = if *line == "over" { Said::Over } else { Said::Line(Bytes::copy_from_slice(line.as_bytes())) };
            out.extend(told.hear(*server, said).iter().map(|line| String::from_utf8_lossy(line).trim_end().to_owned()));
        }
        out.push(String::from_utf8_lossy(&told.last()).trim_end().to_owned());
        out
    }

    fn layer(completed: u64) -> String {
        format!(r#"{{"status":"pulling aa","digest":"sha256:aa","total":100,"completed":{completed}}}"#)
    }

    #[test]
    fn all_are_told_as_one_and_never_go_back() {
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
        let completed: Vec<u64> =
            out.iter().flat_map(|line| Line::all(line.as_bytes())).map(|line| line.completed).collect();
        assert_eq!(completed, [0, 25, 50, 55, 75, 100, 0], "{out:?}");
    }

    #[test]
    fn who_failed_is_named() {
        let out = run(2, &[(0, r#"{"status":"success"}"#), (1, r#"{"error":"disk full"}"#), (0, "over")]);
        assert_eq!(out.last().map(String::as_str), Some("{\"error\":\"server 1: disk full\"}"));
    }

    #[test]
    fn who_only_falls_silent_has_failed() {
        let out = run(
            2,
            &[(0, r#"{"status":"success"}"#), (1, r#"{"status":"writing manifest"}"#), (0, "over"), (1, "over")],
        );
        assert_eq!(out.last().map(String::as_str), Some("{\"error\":\"server 1: it ended without success\"}"));
    }

    #[test]
    fn when_all_fail_the_words_are_ollamas() {
        let missing = r#"{"error":"pull model manifest: file does not exist"}"#;
        assert_eq!(run(2, &[(0, missing), (1, missing)]).last().map(String::as_str), Some(missing));
        let elsewhere = r#"{"error":"another path"}"#;
        assert_eq!(run(2, &[(1, missing), (0, elsewhere)]).last().map(String::as_str), Some(missing));
    }
}
