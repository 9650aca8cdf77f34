//! What agents tell of their servers: their machines, changes that nobody made through us, and the work of others.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::time::Duration;

use harness::cluster::agent;
use harness::olol::chat;
use harness::{Cluster, Gate, Olol, Request, Step, Way, until};
use olol::ollama::Endpoint;
use serde_json::json;
use tokio::time::Instant;

#[tokio::test]
async fn an_agent_tells_how_its_machine_is() {
    let cluster = Cluster::of(1).await.over(Way::Agents).all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    until("a share of the processors", || olol.vitals(0).is_some_and(|vitals| vitals.cpu_usage.is_some())).await;
    let vitals = olol.vitals(0).unwrap();
    let memory = vitals.memory.unwrap();
    assert!(memory.used > 0 && memory.used < memory.total, "{vitals:?}");
    assert_eq!((vitals.os.as_str(), vitals.arch.as_str()), (std::env::consts::OS, std::env::consts::ARCH));
    assert!(vitals.cpu_count > 0 && vitals.instance.len() == 16 && !vitals.olol_version.is_empty(), "{vitals:?}");
    assert!(vitals.told.unwrap().elapsed().unwrap_or_default() < Duration::from_secs(5));
    let page = olol.get("/metrics").await.text();
    assert!(page.contains(&format!("olol_server_memory_total_bytes{{server=\"0\"}} {}", memory.total)), "{page}");
}

#[tokio::test]
async fn a_bare_ollama_tells_nothing_of_its_machine() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    assert_eq!(olol.vitals(0), None);
    assert!(!olol.get("/metrics").await.text().contains("olol_server_cpu_ratio{"));
}

#[tokio::test]
async fn a_bare_ollama_is_looked_at_over_one_connection_and_tells_its_version_once() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "pool.check-interval-ms = 100").await;
    let server = cluster.server(0);
    until("it is looked at again and again", || server.seen("/api/ps").len() > 8).await;
    let seen = ["/api/tags", "/api/ps", "/api/version"].map(|path| server.seen(path));
    let connections = seen.iter().flatten().filter(|seen| !seen.is_reused).count();
    assert!(connections < 3 && seen[2].len() < 3, "{connections} connections, {} versions", seen[2].len());
    // What is not as before is read.
    server.has("new").keeps_loaded("tiny");
    until("it is known", || olol.knows_of(0, "new").0 && olol.knows_of(0, "tiny").1).await;
}

#[tokio::test]
async fn a_change_that_nobody_made_through_us_is_known_within_a_tenth_of_a_second() {
    let cluster = Cluster::of(1).await.over(Way::Agents).all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let server = cluster.server(0);
    let mut times = Vec::new();
    for number in 0..4 {
        let model = format!("new{number}");
        let begun = Instant::now();
        server.has(&model);
        until("the model is known", || olol.knows_of(0, &model).0).await;
        times.push(begun.elapsed());
        let begun = Instant::now();
        server.keeps_loaded(&model);
        until("it is known to be loaded", || olol.knows_of(0, &model).1).await;
        times.push(begun.elapsed());
    }
    // A busy machine may be late once or twice.
    times.sort();
    assert!(times[times.len() / 2] < Duration::from_millis(100), "{times:?}");
}

#[tokio::test]
async fn proxies_see_each_others_work_and_leave_each_other_room() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut agents = Vec::new();
    for server in cluster.servers() {
        agents.push(agent(Endpoint::parse(&server.address().to_string(), 0).unwrap()).await);
    }
    let at = |number: usize| format!("{number}@{}", agents[number].address());
    let one = Olol::at(vec![at(0)], "").await;
    let other = Olol::at(vec![at(0), at(1)], "").await;
    one.is_up().await;
    other.knows(&cluster).await;

    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(one.begin(&chat("tiny", "hi")).await);
    }
    until("the other proxy sees them", || other.others(0) == 3).await;
    assert_eq!((one.others(0), other.others(1), other.in_flight(0)), (0, 0, 0));
    // The number comes first, the whole state a moment later.
    until("it is told of all", || other.vitals(0).unwrap().in_flight == 3).await;
    for _ in 0..3 {
        assert_eq!(other.chat("tiny", "hi").await.server(), "1");
    }
    gate.open();
    for connection in &mut running {
        assert_eq!(connection.answer().await.said(), "Hello world");
    }
    until("the other proxy sees that they are over", || other.others(0) == 0).await;
    until("they are counted", || other.vitals(0).unwrap().figures.unwrap().requests_per_second > 0.0).await;
    assert_eq!(other.vitals(0).unwrap().figures.unwrap().error_rate.to_bits(), 0.0_f32.to_bits());
}

#[tokio::test]
async fn a_pull_that_passes_through_is_told_with_its_share() {
    let cluster = Cluster::of(1).await.over(Way::Agents).all_have("tiny");
    let gate = Gate::closed();
    let line = |value: serde_json::Value| Step::Write(harness::wire::chunk(format!("{value}\n").as_bytes()));
    let head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n";
    let steps = vec![
        Step::Write(head.to_vec()),
        line(json!({"status": "pulling a", "digest": "sha256:a", "total": 100, "completed": 25})),
        Step::Wait(gate.clone()),
        line(json!({"status": "success"})),
        Step::Write(harness::wire::LAST_CHUNK.to_vec()),
    ];
    cluster.server(0).on("POST", "/api/pull", steps);
    let olol = Olol::start(&cluster, "").await;
    let mut pull = olol.begin(&Request::post("/api/pull", json!({"model": "Big"}))).await;
    until("the pull is told", || {
        olol.vitals(0).is_some_and(|vitals| vitals.pending_pulls == [("big:latest".to_owned(), 0.25)])
    })
    .await;
    gate.open();
    pull.answer().await;
    until("it is over", || olol.vitals(0).unwrap().pending_pulls.is_empty()).await;
}
