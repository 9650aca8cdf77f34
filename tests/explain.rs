//! What would be done with a request, and what was done with one: the truth, and nothing but a look.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::chat;
use harness::{Answer, Cluster, Connection, Gate, Olol, Process, Request};
use olol_middleware::Route;
use serde_json::{Value, json};

#[tokio::test]
async fn every_decision_is_told_and_nothing_is_done() {
    let cluster = Cluster::of(3).await;
    cluster.server(1).has("tiny");
    cluster.server(2).has_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    let told = explain(&olol, "tiny").await.json();
    assert_eq!((&told["server"], &told["status"], &told["error"]), (&json!("2"), &json!(200), &Value::Null));
    assert_eq!(
        (&told["model"], &told["route"], &told["method"]),
        (&json!("tiny"), &json!("/api/chat"), &json!("POST"))
    );
    let trail = told["trail"].as_array().unwrap();
    let by =
        |layer: &str| trail.iter().find(|note| note["layer"] == layer).unwrap_or_else(|| panic!("{layer}: {told}"));
    assert_eq!(by("model-route")["decision"], "those that have it");
    assert_eq!(by("pick")["facts"]["server"], "2");
    assert!(cluster.servers().iter().all(|server| server.work() == 0 && server.seen("/api/chat").is_empty()));
}

#[tokio::test]
async fn a_thousand_looks_change_nothing() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let servers = format!("http://{},http://{}", cluster.server(0).address(), cluster.server(1).address());
    let proxy = Process::proxy(&servers, &[]).await;
    let mut client = proxy.connect().await;
    proxy.has_up(2).await;
    for _ in 0..4 {
        assert_eq!(client.ask(&chat("tiny", "hi")).await.status, 200);
    }
    let before = metrics(&mut client).await;
    for at in 0..1000 {
        let model = if at % 3 == 0 { "nobodys" } else { "tiny" };
        assert_eq!(client.ask(&question(model)).await.status, 200);
    }
    assert_eq!(metrics(&mut client).await, before);
    assert_eq!(cluster.server(0).work() + cluster.server(1).work(), 4);
}

#[tokio::test]
async fn the_server_that_is_told_is_the_one_that_is_used() {
    let cluster = Cluster::of(3).await.weighing([2, 1, 1]);
    let gate = Gate::closed();
    cluster.server(0).has("only-here").has("on-disk");
    cluster.server(1).has_loaded("on-disk").has_loaded("busy-elsewhere");
    cluster.server(2).has_loaded("busy-elsewhere").has_loaded("heavy");
    cluster.server(0).has_loaded("heavy");
    let olol = Olol::start(&cluster, "").await;
    // The second server has something to do, so the third is the quieter one.
    cluster.server(1).is_paced_by(&gate);
    let mut busy = olol.begin(&chat("on-disk", "hi")).await;
    cluster.server(1).asked(1).await;
    cluster.server(1).says(["Hello", " world"]);
    for round in 0..200 {
        let model = ["only-here", "on-disk", "busy-elsewhere", "heavy"][round % 4];
        let told = explain(&olol, model).await.json();
        let answer = olol.chat(model, "hi").await;
        assert_eq!((answer.status, told["server"].as_str()), (200, Some(answer.server())), "{round} {model}: {told}");
    }
    gate.open();
    assert_eq!(busy.answer().await.status, 200);
}

#[tokio::test]
async fn what_would_be_refused_is_told_with_the_reason() {
    let olol = Olol::at(Vec::new(), "").await;
    let told = explain(&olol, "tiny").await;
    assert_eq!((told.status, &told.json()["status"]), (200, &json!(503)));
    let told = told.json();
    assert_eq!((&told["error"]["reason"], &told["server"]), (&json!("no-server"), &Value::Null));
    assert!(told["error"]["message"].as_str().unwrap().contains("--servers"), "{told}");
}

#[tokio::test]
async fn every_route_can_be_asked_for() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    let blob = format!("/api/blobs/sha256:{}", "0".repeat(64));
    let paths = [
        "/",
        "/api/version",
        "/api/status",
        "/api/tags?a=1",
        "/api/ps",
        "/api/show",
        "/api/generate",
        "/api/chat",
        "/api/embed",
        "/api/embeddings",
        "/api/pull",
        "/api/push",
        "/api/create",
        &blob,
        "/api/copy",
        "/api/delete",
        "/api/me",
        "/api/signout",
        "/api/user/keys/1",
        "/api/experimental/web_search",
        "/api/experimental/web_fetch",
        "/api/experimental/model-recommendations",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/tiny",
        "/v1/responses",
        "/v1/audio/transcriptions",
        "/v1/messages",
    ];
    assert_eq!(paths.len(), Route::ALL.len());
    let mut connection = olol.connect().await;
    for path in paths {
        let asked = format!("/api/status/explain?route={}", path.replace('?', "%3F").replace('=', "%3D"));
        let told = connection.ask(&Request::post(&asked, r#"{"model":"tiny"}"#)).await;
        assert_eq!((told.status, told.json()["route"].as_str()), (200, Some(path)), "{}", told.text());
        assert!(!told.json()["trail"].as_array().unwrap().is_empty(), "{path}: {}", told.text());
    }
    assert!(cluster.servers().iter().all(|server| server.work() == 0));
}

#[tokio::test]
async fn what_cannot_be_explained_is_said() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    assert_eq!(olol.get("/api/status/explain").await.status, 405);
    for (query, says) in [
        ("route=/api/chta", "is no route of Ollama"),
        ("route=chat", "is no route of Ollama"),
        ("method=GET", "/api/chat takes POST"),
    ] {
        let told = olol.ask(&Request::post(&format!("/api/status/explain?{query}"), "{}")).await;
        assert!(told.status == 400 && told.error().contains(says), "{query}: {}", told.text());
    }
}

#[tokio::test]
async fn a_request_that_is_over_can_be_asked_for() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    cluster.server(0).dies_before_head();
    let olol = Olol::start(&cluster, "").await;
    let mut again = None;
    // Which of the two is asked first is a matter of chance, until it is one that dies.
    while again.is_none() {
        let answer = olol.chat("tiny", "hi").await;
        again = (answer.header("x-olol-attempts") == "2").then(|| answer.header("x-olol-request").to_owned());
    }
    let told = olol.get(&format!("/api/status/requests/{}", again.unwrap())).await.json();
    assert_eq!((&told["status"], &told["end"], &told["attempts"]), (&json!(200), &json!("whole"), &json!(2)));
    let trail = told["trail"].as_array().unwrap();
    assert!(trail.iter().any(|note| note["layer"] == "retry" && note["decision"] == "again"), "{told}");
    let unknown = olol.get("/api/status/requests/0123456789abcdef").await;
    assert!(unknown.status == 404 && unknown.error().contains("no request '0123456789abcdef'"), "{}", unknown.text());
}

#[tokio::test]
async fn the_command_prints_what_would_be_done_and_what_was_done() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    let told = command(&olol, &["--model", "tiny", "--prompt", "why?"]).await;
    assert!(told.contains("POST /api/chat, model tiny") && told.ends_with("would go to 0\n"), "{told}");
    let told = command(&olol, &["--model", "tiny", "--route", "/v1/embeddings", "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&told).unwrap()["route"], "/v1/embeddings");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), r#"{"model":"tiny","prompt":"hi"}"#).unwrap();
    let told = command(&olol, &["--body", file.path().to_str().unwrap(), "--route", "/api/generate"]).await;
    assert!(told.contains("POST /api/generate, model tiny"), "{told}");
    assert_eq!(cluster.server(0).work(), 0);
    let answer = olol.chat("tiny", "hi").await;
    let told = command(&olol, &["--request", answer.header("x-olol-request")]).await;
    assert!(told.contains("model-route") && told.contains("answered with status 200 by 0: whole"), "{told}");
}

#[tokio::test]
async fn the_command_fails_with_the_words_of_the_proxy() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let port = olol.address().port().to_string();
    let ended = Process::run(&["explain", "--port", &port, "--request", "nobodys"]).await;
    let error = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(1) && error.contains("no request 'nobodys' is remembered"), "{error}");
    let ended = Process::run(&["explain", "--port", &port]).await;
    assert_eq!(ended.status.code(), Some(2), "a model, a body or a request has to be named");
}

/// What would be done with a chat?
fn question(model: &str) -> Request {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
    Request::post("/api/status/explain?route=/api/chat", body)
}

async fn explain(olol: &Olol, model: &str) -> Answer {
    olol.ask(&question(model)).await
}

/// All metrics but those of time that passes, in an order that does not change.
async fn metrics(client: &mut Connection) -> Vec<String> {
    let page = client.ask(&Request::get("/metrics")).await.text();
    let passes = |line: &&str| line.starts_with("process_") || line.starts_with("olol_server_health_checks_total");
    let mut lines: Vec<String> = page.lines().filter(|line| !passes(line)).map(str::to_owned).collect();
    lines.sort();
    lines
}

/// What `olol explain` prints.
async fn command(olol: &Olol, arguments: &[&str]) -> String {
    let port = olol.address().port().to_string();
    let ended = Process::run(&[&["explain", "--port", &port], arguments].concat()).await;
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    String::from_utf8(ended.stdout).unwrap()
}
