//! What the layers cost, without any network: `cargo bench --bench stack`.
//!
//! Calls go through the real stack in front of servers that answer at once. Stacks take turns, round by round: none but the
//! leaf, the first layers (`trace`, `metrics`, `model-route`, `retry`), and every layer there is, with keys, limits and rules
//! to look at. What is printed is the CPU time of a call: medians over the rounds, and of the differences within a round.
//! A second part times one decision among fifty holders in a cluster of a thousand servers and ten thousand models.
//! `OLOL_BENCH_ROUNDS` (15) sets how long it takes.

#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::cast_precision_loss,
    reason = "a program for a terminal, which may end when it cannot go on"
)]

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use olol_middleware::call::{Answer, Body, Call, Head, Payload, Reply};
use olol_middleware::cluster::{Loaded, Member, Model, Report, Source};
use olol_middleware::keys::{Digest, Key};
use olol_middleware::pick::{Fleet, Pick};
use olol_middleware::{
    Chunk, Cluster, Counters, Error, ModelName, Peek, Route, Server, ServerId, Shared, Stack, stack,
};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use tower::Service;

// As the program itself has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the first proxy had.
const FIRST: &str = r#"stack.order = ["trace", "metrics", "model-route", "retry"]"#;

/// Every layer, each with something to look at.
const ALL: &str = r#"
[[alias.rules]]
models = ["model-*"]
tiers = [["*"]]

[alias.models]
house = "model-0"

[rate-limit.key]
requests-per-minute = 4000000000
tokens-per-minute = 4000000000
concurrent = 100000

[rate-limit.models]
"model-*" = { concurrent = 100000 }

[timeout]
total-s = 3600
"#;

/// Calls that are timed together.
const BATCH: usize = 256;
/// Pieces of an answer.
const PIECES: usize = 4;
/// A key's text; its secret is of no use anywhere.
const KEY: &str = "olol_bench_0000000000000000000000000000000000000000000";

fn main() {
    // All in one thread, whose CPU time is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        layers().await;
        decision().await;
    });
}

fn rounds() -> usize {
    std::env::var("OLOL_BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(15)
}

/// What the layers cost, by the size of a body.
async fn layers() {
    println!("layers: microseconds of CPU a call, bodies of a chat with one message");
    println!(
        "{:>10} {:>10} {:>10} {:>10} {:>22} {:>14}",
        "body", "leaf", "first", "all", "all more than first", "ns a byte"
    );
    let cluster = cluster(4, 8, 4).await;
    let stacks = ["stack.order = []", FIRST, ALL].map(|text| proxy(&cluster, text));
    let mut least = None;
    for size in [1 << 10, 16 << 10, 256 << 10] {
        let (times, more) = compare(&cluster, &stacks, size).await;
        let (base, base_size) = *least.get_or_insert((more, size));
        let slope = if size > base_size { (more - base) * 1000.0 / (size - base_size) as f64 } else { f64::NAN };
        println!("{size:>10} {:>10.2} {:>10.2} {:>10.2} {more:>22.2} {slope:>14.3}", times[0], times[1], times[2]);
    }
}

/// What it costs to choose among fifty holders in a large cluster.
async fn decision() {
    let (servers, models, holders) = (1000, 10_000, 50);
    println!("\ndecision: microseconds of CPU a call, {holders} holders among {servers} servers with {models} models");
    let cluster = cluster(servers, models, holders).await;
    let stacks = [r#"stack.order = ["model-route"]"#, FIRST, ALL].map(|text| proxy(&cluster, text));
    let (times, _) = compare(&cluster, &stacks, 1 << 10).await;
    println!("{:>10} {:>10} {:>10}", "decision", "first", "all");
    println!("{:>10.2} {:>10.2} {:>10.2}", times[0], times[1], times[2]);
}

/// Medians of the CPU time of a call through each stack, and of the difference between the last two.
async fn compare(cluster: &Arc<Cluster>, stacks: &[Stack; 3], size: usize) -> ([f64; 3], f64) {
    let mut times: [Vec<f64>; 3] = Default::default();
    let mut more = Vec::new();
    let mut number = 0;
    for round in 0..=rounds() {
        let mut now = [0.0; 3];
        for (stack, now) in stacks.iter().zip(&mut now) {
            let calls: Vec<Call> = (0..BATCH)
                .map(|_| {
                    number += 1;
                    call(cluster, number, size)
                })
                .collect();
            *now = time(stack, calls).await;
        }
        // The first one warms up.
        if round > 0 {
            times.iter_mut().zip(now).for_each(|(times, now)| times.push(now));
            more.push(now[2] - now[1]);
        }
    }
    (times.map(median), median(more))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Microseconds of CPU that one of these calls takes, from the call to the end of its answer.
async fn time(stack: &Stack, calls: Vec<Call>) -> f64 {
    let count = calls.len() as f64;
    let before = cpu();
    for call in calls {
        let mut reply = stack.send(call).await.expect("an answer");
        let mut chunks = reply.body.take_chunks();
        while let Some(chunk) = chunks.next().await {
            chunk.expect("a whole answer");
        }
    }
    cpu().saturating_sub(before).as_secs_f64() * 1e6 / count
}

/// CPU time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The layers of a configuration, in front of servers that answer at once.
fn proxy(cluster: &Arc<Cluster>, config: &str) -> Stack {
    let shared = Shared::new(cluster.clone());
    let key = Key { id: "bench".into(), name: "bench".into(), ..Key::default() };
    shared.keys.replace([(Digest::of(KEY.as_bytes()), key)]);
    let config = toml::from_str(config).expect("a configuration");
    stack::build(&config, &shared, Stack::new(Pick::new(Instantly, shared.picking.clone())))
}

/// Servers of which each model is on so many, and in memory there.
async fn cluster(servers: usize, models: usize, holders: usize) -> Arc<Cluster> {
    let name = |server: usize| ServerId::new(&format!("server-{server}"));
    let members = (0..servers)
        .map(|server| Member { id: name(server), weight: NonZeroU32::MIN, source: Source::Static })
        .collect();
    let cluster = Cluster::new(members);
    let mut reports = vec![Report::default(); servers];
    for model in 0..models {
        let name = format!("model-{model}:latest");
        for holder in 0..holders {
            let report = &mut reports[(model * 37 + holder * 19) % servers];
            report.models.push(Model {
                name: name.clone(),
                digest: format!("{model:064}"),
                size: 1 << 30,
                ..Model::default()
            });
            report.loaded.push(Loaded { name: name.clone(), slots: 8, context_length: 4096, ..Loaded::default() });
        }
    }
    for (server, report) in reports.into_iter().enumerate() {
        cluster.report(server, report);
    }
    cluster.refresh(Duration::ZERO).await;
    cluster
}

/// A chat that is like no other, as the edge makes it.
fn call(cluster: &Arc<Cluster>, number: usize, size: usize) -> Call {
    let text = format!("{number:08} ") + &"How are you today? ".repeat(size / 19);
    let body = json!({"model": "model-0", "messages": [{"role": "user", "content": text}], "stream": true}).to_string();
    let body = Bytes::from(body);
    let mut head = Head::new(Route::Chat, Method::POST, PathAndQuery::from_static("/api/chat"));
    head.headers = HeaderMap::from_iter([
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::USER_AGENT, HeaderValue::from_static("bench")),
        (header::ACCEPT, HeaderValue::from_static("*/*")),
        (header::AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {KEY}")).expect("a header")),
    ]);
    head.client = Some(([127, 0, 0, 1], 50_000).into());
    head.peek = Peek::json(std::slice::from_ref(&body));
    head.model = head.peek.model.as_deref().and_then(ModelName::parse);
    Call::new(head, Payload::from_bytes(body), cluster.snapshot().all())
}

/// Servers that answer at once, in a few pieces, with counts.
#[derive(Clone)]
struct Instantly;

impl Fleet for Instantly {
    type Service = Answers;

    fn service(&self, server: &Server) -> Option<Answers> {
        Some(Answers(server.id.clone()))
    }
}

struct Answers(ServerId);

impl Service<Call> for Answers {
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, _cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _call: Call) -> Answer {
        let counters = Counters { prompt_tokens: 250, output_tokens: PIECES as u64, ..Counters::default() };
        let piece = move |at: usize| {
            let end = (at + 1 == PIECES).then_some(counters);
            Ok(Chunk { bytes: Bytes::from_static(b"{\"message\":{\"content\":\"x\"}}\n"), end })
        };
        let mut body = Body::new(futures_util::stream::iter((0..PIECES).map(piece)));
        body.outcome_mut().servers.push(self.0.clone());
        body.outcome_mut().attempts = 1;
        body.outcome_mut().counters = Some(counters);
        let kind = (header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
        let reply = Reply { status: StatusCode::OK, headers: HeaderMap::from_iter([kind]), body };
        Box::pin(std::future::ready(Ok(reply)))
    }
}
