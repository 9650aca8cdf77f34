//! What a real Ollama was recorded to answer comes through OLOL as it was recorded: status, headers, bytes, chunks.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::path::Path;

use harness::wire::{self, Headers};
use harness::{Answer, Cluster, Ending, Olol, Request, Server, Step, Way, answers};
use olol_middleware::{ModelName, Route};
use serde::Deserialize;
use serde_json::Value;

/// One recorded exchange; `golden/index.md` describes the files.
#[derive(Clone, Deserialize)]
struct Exchange {
    name: String,
    /// Its place in the recording; none: it needed a server of its own.
    seq: Option<u32>,
    /// What was special about that server.
    state: Option<String>,
    request: Asked,
    response: Answered,
}

#[derive(Clone, Deserialize)]
struct Asked {
    #[serde(default)]
    method: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    http: String,
    #[serde(default)]
    headers: Vec<(String, String)>,
    body: Option<String>,
    /// Bytes that are no request.
    raw: Option<String>,
}

#[derive(Clone, Deserialize)]
struct Answered {
    status: u16,
    reason: Option<String>,
    #[serde(default)]
    headers: Vec<(String, String)>,
    body: Option<String>,
    chunks: Option<Vec<String>>,
    #[serde(default)]
    framing: String,
    ended: Option<String>,
}

#[tokio::test]
async fn every_recorded_exchange_comes_through_over_http() {
    replay(Way::Http).await;
}

#[tokio::test]
async fn every_recorded_exchange_comes_through_over_an_agent() {
    replay(Way::Agents).await;
}

/// Asked for by a name of the operator's own, a model gets the request that was recorded, and the answer is the recorded
/// one with that name in it.
#[tokio::test]
async fn every_recorded_exchange_comes_through_under_another_name() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way);
        let server = cluster.server(0);
        let olol = Olol::launch(&cluster, "[alias.models]\n\"mine-*\" = \"$1\"").await;
        olol.is_up().await;
        let mut differing = Vec::new();
        let mut replayed = std::collections::BTreeMap::<String, usize>::new();
        for exchange in recorded().iter().filter(|exchange| exchange.is_replayable()) {
            let Some((model, mine)) = exchange.under_another_name() else { continue };
            let path = &exchange.request.path;
            let before = server.seen(path).len();
            plays(server, exchange);
            let answer = olol.ask(&mine.request.to_request()).await;
            let seen = server.seen(path).split_off(before).pop().map(|seen| String::from_utf8(seen.body).unwrap());
            let mut found = mine.differences(&answer, &[]);
            if seen.as_deref() != Some(exchange.request.body.as_deref().unwrap_or_default()) {
                found.push(format!("request body at the server: {seen:?}"));
            }
            if answer.header("x-olol-model") != model {
                found.push(format!("served: {}", answer.header("x-olol-model")));
            }
            differing.extend(found.into_iter().map(|what| format!("{}: {what}", exchange.name)));
            *replayed.entry(path.clone()).or_default() += 1;
        }
        assert!(differing.is_empty(), "over {way:?}:\n{}", differing.join("\n"));
        assert!(replayed.values().sum::<usize>() > 80 && replayed.len() >= 11, "only {replayed:?}");
    }
}

#[tokio::test]
async fn a_line_of_200_kb_in_writes_of_3_kb_comes_in_one_chunk() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let line = format!("{{\"response\":\"{}\",\"done\":false}}\n", "x".repeat(200_000));
        let last = "{\"response\":\"\",\"done\":true}\n";
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n";
        let body = [wire::chunk(line.as_bytes()), wire::chunk(last.as_bytes()), wire::LAST_CHUNK.to_vec()].concat();
        let steps =
            [head.as_bytes()].into_iter().chain(body.chunks(3000)).map(|part| Step::Write(part.to_vec())).collect();
        cluster.server(0).on("POST", "/api/generate", steps);
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.ask(&Request::post("/api/generate", r#"{"model":"tiny","prompt":"hi"}"#)).await;
        assert_eq!(answer.chunks.iter().map(Vec::len).collect::<Vec<_>>(), [line.len(), last.len()], "{way:?}");
        assert_eq!(answer.text(), [&line, last].concat());
    }
}

#[tokio::test]
async fn a_line_that_is_longer_than_what_is_joined_arrives_whole() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let line = format!("{{\"response\":\"{}\",\"done\":true}}\n", "x".repeat(5_000_000));
        cluster.server(0).on(
            "POST",
            "/api/generate",
            answers::chunked("application/x-ndjson", [line.clone().into_bytes()]),
        );
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.ask(&Request::post("/api/generate", r#"{"model":"tiny","prompt":"hi"}"#)).await;
        assert!(answer.text() == line && answer.ending == Ending::LastChunk, "{way:?}");
    }
}

/// Sends every exchange through a proxy and collects what differs.
async fn replay(way: Way) {
    let exchanges = recorded();
    let cluster = Cluster::of(1).await.over(way);
    let server = cluster.server(0);
    let usual: Vec<Exchange> = exchanges.iter().filter(|exchange| exchange.is_usual()).cloned().collect();
    for exchange in &usual {
        plays(server, exchange);
    }
    // Each exchange was recorded by itself: none goes with what another has loaded.
    let olol = Olol::launch(&cluster, "model-route.load-options = 'as-sent'").await;
    olol.is_up().await;
    let mut replayed = 0;
    let mut differing = Vec::new();
    for exchange in exchanges.iter().filter(|exchange| exchange.is_replayable()) {
        let before = server.seen(&exchange.request.path).len();
        plays(server, exchange);
        let answer = olol.ask(&exchange.request.to_request()).await;
        let seen = server.seen(&exchange.request.path).split_off(before);
        let bodies: Vec<String> = seen.iter().map(|seen| String::from_utf8_lossy(&seen.body).into_owned()).collect();
        differing.extend(
            exchange.differences(&answer, &bodies).into_iter().map(|what| format!("{}: {what}", exchange.name)),
        );
        if let Some(usual) = usual.iter().find(|usual| usual.request.path == exchange.request.path) {
            plays(server, usual);
        }
        replayed += 1;
    }
    assert!(differing.is_empty(), "over {way:?}:\n{}", differing.join("\n"));
    assert!(replayed > 200, "only {replayed} exchanges were replayed");
}

fn recorded() -> Vec<Exchange> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let texts = files
        .filter(|file| file.extension().is_some_and(|ending| ending == "json"))
        .map(|file| std::fs::read(file).unwrap());
    let mut exchanges: Vec<Exchange> = texts.map(|text| serde_json::from_slice(&text).unwrap()).collect();
    exchanges.sort_by_key(|exchange| (exchange.seq.is_none(), exchange.seq));
    exchanges
}

/// Lets a server answer a request as it was recorded.
fn plays(server: &Server, exchange: &Exchange) {
    server.on(&exchange.request.method, &exchange.request.path, exchange.response.steps(&exchange.request.method));
}

impl Exchange {
    /// Whether the server answers so all the time: what OLOL asks by itself, too.
    fn is_usual(&self) -> bool {
        matches!(self.name.as_str(), "tags-get" | "ps-empty" | "version-get" | "status-get" | "show")
    }

    /// Whether it needs nothing but the recorded server, and is a request.
    fn is_replayable(&self) -> bool {
        self.request.raw.is_none() && self.response.status != 0 && (self.seq.is_some() || self.state.is_none())
    }

    /// Its model, and the same exchange as it must be when the client calls that model `mine-…`; `None` if it is about no
    /// model, or if it is the answer to a name that would be written otherwise.
    fn under_another_name(&self) -> Option<(String, Self)> {
        let mut mine = self.clone();
        let route = Route::find(&self.request.path)?;
        let text = self.request.body.as_deref().unwrap_or_default();
        let (model, form) = match route {
            Route::V1Model => (self.request.path.rsplit('/').next()?.to_owned(), "/@"),
            Route::V1Audio => {
                (text.split("name=\"model\"\r\n\r\n").nth(1)?.split("\r\n").next()?.to_owned(), "\r\n@\r\n")
            }
            _ if route.infers() || route == Route::Show => {
                (serde_json::from_str::<Value>(text).ok()?["model"].as_str()?.to_owned(), "\"model\":\"@\"")
            }
            _ => return None,
        };
        let (old, new) = (form.replace('@', &model), form.replace('@', &format!("mine-{model}")));
        let is_canonical = ModelName::parse(&model)?.as_str().trim_end_matches(":latest") == model;
        if !is_canonical
            || self.response.body().contains("(cut here by the recorder)")
            || text.matches(&old).count() > 1
        {
            return None;
        }
        mine.request.path = self.request.path.replace(&old, &new);
        mine.request.body = self.request.body.as_ref().map(|body| body.replace(&old, &new));
        mine.request.headers.retain(|(name, _)| name != "Content-Length");
        if self.response.status == 200 && route != Route::Show {
            let key = if route == Route::V1Model { "id" } else { "model" };
            let (old, new) = (format!("\"{key}\":\"{model}\""), format!("\"{key}\":\"mine-{model}\""));
            let response = &mut mine.response;
            response
                .body
                .iter_mut()
                .chain(response.chunks.iter_mut().flatten())
                .for_each(|t| *t = t.replace(&old, &new));
            let length = response.body().len().to_string();
            let lengths = response.headers.iter_mut().filter(|(name, _)| name == "Content-Length");
            lengths.for_each(|(_, value)| value.clone_from(&length));
        }
        Some((model, mine))
    }

    fn differences(&self, answer: &Answer, bodies: &[String]) -> Vec<String> {
        let mut found = Vec::new();
        let mut same = |what: &str, got: &str, recorded: &str| {
            if got != recorded {
                found.push(format!("{what}\n  got      {got}\n  recorded {recorded}"));
            }
        };
        same("status", &answer.status.to_string(), &self.response.status.to_string());
        // What OLOL adds to the status page makes it longer.
        let is_status = self.request.path == "/api/status" && answer.status == 200;
        let headers = |headers: &Headers| {
            let mut lines = shown(headers);
            // The status page is longer by what OLOL adds.
            lines.retain(|line| !(is_status && line.starts_with("Content-Length")));
            lines.join(" | ")
        };
        same("headers", &headers(&answer.headers), &headers(&Headers(self.response.headers.clone())));
        let recorded = self.response.body();
        let got = answer.text();
        if is_status {
            same("status page", &without_ours(answer.json()), &recorded);
        } else if self.request.method != "HEAD" {
            // A stream that was cut may say so in a line of its own.
            let got = if self.response.is_cut() { got.get(..recorded.len()).unwrap_or(&got) } else { &got };
            same("body", got, &recorded);
        }
        if self.response.is_cut() {
            let told = got.get(recorded.len()..).is_some_and(|rest| rest.contains("\"error\""));
            same("end", &format!("{}", told || answer.ending == Ending::Cut), "true");
        } else if let Some(chunks) = self.response.chunks.as_ref().filter(|_| self.response.is_stream()) {
            let got: Vec<_> = answer.chunks.iter().map(|chunk| String::from_utf8_lossy(chunk)).collect();
            same("chunks", &format!("{got:#?}"), &format!("{chunks:#?}"));
        }
        if let Some(seen) = bodies.last() {
            same("request body at the server", seen, self.request.body.as_deref().unwrap_or_default());
        }
        found
    }
}

impl Asked {
    fn to_request(&self) -> Request {
        let mut request = Request::new(&self.method, &self.path).with_body(self.body.as_deref().unwrap_or_default());
        if self.http == "HTTP/1.0" {
            request = request.in_http_1_0();
        }
        for (name, value) in &self.headers {
            request = match name.to_lowercase().as_str() {
                "transfer-encoding" => request.chunked(),
                _ => request.header(name, value),
            };
        }
        request
    }
}

impl Answered {
    fn body(&self) -> String {
        self.chunks.as_ref().map_or_else(|| self.body.clone().unwrap_or_default(), |chunks| chunks.concat())
    }

    fn is_stream(&self) -> bool {
        let kind = Headers(self.headers.clone()).get("content-type").unwrap_or_default().to_owned();
        let is_whole = self.chunks.iter().flatten().all(|chunk| chunk.ends_with('\n'));
        is_whole && (kind.contains("ndjson") || kind.contains("event-stream"))
    }

    fn is_cut(&self) -> bool {
        self.ended.as_deref().is_some_and(|ended| ended != "terminating chunk")
    }

    /// The answer as the recorded server wrote it.
    fn steps(&self, method: &str) -> Vec<Step> {
        let is_bare = method == "HEAD" || matches!(self.status, 204 | 304);
        let body = self.body();
        // What was sent until close to HTTP/1.0 is chunked to OLOL, which speaks HTTP/1.1.
        let lines = || body.split_inclusive('\n').map(str::to_owned).collect();
        match self.chunks.clone().or_else(|| (self.framing == "until close").then(lines)) {
            _ if is_bare => vec![Step::Write(self.head(|_| true, None))],
            None => {
                let length = body.len().to_string();
                let head = self.head(is_no_framing, Some(("Content-Length", length.as_str())));
                vec![Step::Write([head, body.into_bytes()].concat())]
            }
            Some(chunks) => {
                let head = self.head(is_no_framing, Some(("Transfer-Encoding", "chunked")));
                let chunks = chunks.iter().map(|chunk| wire::chunk(chunk.as_bytes()));
                let end = if self.is_cut() { Step::HangUp } else { Step::Write(wire::LAST_CHUNK.to_vec()) };
                [head].into_iter().chain(chunks).map(Step::Write).chain([end]).collect()
            }
        }
    }

    fn head(&self, keeps: fn(&str) -> bool, framing: Option<(&str, &str)>) -> Vec<u8> {
        let line = format!("HTTP/1.1 {} {}", self.status, self.reason.as_deref().unwrap_or_default());
        let headers = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let kept = headers.filter(|header| *header != ("Connection", "close") && keeps(header.0));
        wire::head(&line, kept.chain(framing))
    }
}

fn is_no_framing(name: &str) -> bool {
    !matches!(name.to_lowercase().as_str(), "content-length" | "transfer-encoding")
}

/// Headers without ours, without what varies, and without their order, which means nothing to a client.
fn shown(headers: &Headers) -> Vec<String> {
    let kept = headers.0.iter().filter(|(name, value)| {
        let is_ours = name.to_lowercase().starts_with("x-olol-");
        // Said to clients of HTTP/1.0 only, whose connections close in any case.
        let is_close = (name.as_str(), value.as_str()) == ("Connection", "close");
        !is_ours && !is_close
    });
    let mut lines: Vec<String> =
        kept.map(|(name, value)| if name == "Date" { name.clone() } else { format!("{name}: {value}") }).collect();
    lines.sort();
    lines
}

/// The status page without the key that OLOL adds.
fn without_ours(mut page: Value) -> String {
    page.as_object_mut().unwrap().remove("olol");
    page.to_string()
}
