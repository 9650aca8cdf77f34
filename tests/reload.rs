//! A new configuration without a restart: what triggers it, what it changes, and what it leaves alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::olol::chat;
use harness::{Answer, Cluster, Connection, Ending, Gate, Olol, Process, Request, patiently, until};
use serde_json::{Value, json};
use tempfile::TempDir;

const ALL: &str = "stack.order = [\"trace\", \"metrics\", \"model-route\", \"retry\"]\n";
const FEW: &str = "stack.order = [\"trace\", \"retry\"]\n";
const NONE: &str = "stack.order = []\n";

#[tokio::test]
async fn reloads_under_load_fail_no_request() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let file = File::with(ALL);
    let olol = Arc::new(Olol::from_file(&cluster, &file.path).await);
    let is_over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (olol, is_over) = (olol.clone(), is_over.clone());
            tokio::spawn(async move {
                let mut connection = olol.connect().await;
                let mut answers = 0;
                while !is_over.load(Ordering::Relaxed) {
                    let answer = connection.ask(&chat("tiny", "hi")).await;
                    assert_eq!((answer.status, answer.said().as_str()), (200, "Hello world"));
                    answers += 1;
                }
                answers
            })
        })
        .collect();
    for round in 0..50 {
        file.is_replaced_by(&format!("{}[retry]\nattempts = {}\n", [ALL, FEW, NONE][round % 3], round + 3));
        assert_eq!(reload(&olol).await.status, 200);
    }
    is_over.store(true, Ordering::Relaxed);
    for client in clients {
        assert!(patiently("a client ends", client).await.unwrap() > 0);
    }
}

#[tokio::test]
async fn a_file_that_is_written_or_replaced_is_read_again() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with(ALL);
    let olol = Olol::from_file(&cluster, &file.path).await;
    file.is_written(FEW);
    runs(&olol, &["trace", "retry"]).await;
    file.is_replaced_by(NONE);
    runs(&olol, &[]).await;
    assert_eq!(config_of(&olol).await["last_reload"]["trigger"], "file");
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_behind_links_as_in_kubernetes_is_read_again() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let put = |data: &str, text: &str| {
        std::fs::create_dir(at(data)).unwrap();
        std::fs::write(at(data).join("olol.toml"), text).unwrap();
        std::os::unix::fs::symlink(data, at("..new")).unwrap();
        std::fs::rename(at("..new"), at("..data")).unwrap();
    };
    put("..1", ALL);
    std::os::unix::fs::symlink("..data/olol.toml", at("olol.toml")).unwrap();
    let olol = Olol::from_file(&cluster, &at("olol.toml")).await;
    put("..2", FEW);
    runs(&olol, &["trace", "retry"]).await;
}

#[cfg(unix)]
#[tokio::test]
async fn a_hangup_reads_the_file_again() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with(ALL);
    let proxy = Process::proxy(&servers(&cluster), &["--config", file.path.to_str().unwrap()]).await;
    proxy.hang_up();
    until("the log tells of it", || has(&proxy, &["the configuration was read again", "trigger=\"signal\""])).await;
    assert_eq!(proxy.connect().await.ask(&chat("tiny", "hi")).await.status, 200);
}

#[cfg(unix)]
#[tokio::test]
async fn a_hangup_without_a_file_kills_nobody() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let mut proxy = Process::proxy(&servers(&cluster), &[]).await;
    proxy.hang_up();
    until("the log tells of it", || has(&proxy, &["there is no configuration file to read again"])).await;
    assert_eq!(proxy.connect().await.ask(&chat("tiny", "hi")).await.status, 200);
    assert!(proxy.is_running());
}

#[tokio::test]
async fn a_post_tells_what_changed_and_what_waits_for_a_restart() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with(ALL);
    let olol = Olol::from_file(&cluster, &file.path).await;
    file.is_replaced_by(
        "stack.order = [\"trace\", \"retry\"]\nthreads = 3\n[retry]\nattempts = 5\n[limits]\ngrace-s = 1\n[proxy]\nport = 1\n",
    );
    // The file is watched, too: who comes second finds nothing to do.
    let told = reload(&olol).await;
    assert_eq!((told.status, &told.json()["reloaded"]), (200, &json!(true)));
    assert_eq!(told.json()["layers"], json!(["trace", "retry"]));
    assert_eq!(told.json()["needs_restart"], json!(["threads", "limits.grace-s"]), "the port is given by a flag");
    let config = config_of(&olol).await;
    assert_eq!(config["needs_restart"], json!(["threads", "limits.grace-s"]));
    assert_eq!(config["file"], json!(file.path));
}

#[tokio::test]
async fn what_changed_is_told_by_its_keys() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with(ALL);
    let process = Process::proxy(&servers(&cluster), &["--config", file.path.to_str().unwrap()]).await;
    file.is_replaced_by(&format!("{FEW}[retry]\nattempts = 5\n"));
    until("the log tells of it", || has(&process, &["changed=\"stack.order,retry.attempts\""])).await;
}

#[tokio::test]
async fn a_post_without_a_file_says_what_is_missing() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let told = reload(&olol).await;
    assert_eq!(told.status, 422);
    assert_eq!(told.error(), "there is no configuration file to read again: start with --config FILE");
    assert_eq!(olol.get("/api/status/reload").await.status, 405);
    let page = Request::post("/api/status/reload", "").header("Origin", "https://elsewhere.example");
    assert_eq!(olol.ask(&page).await.status, 403, "no page of the web may ask for it");
}

#[tokio::test]
async fn a_bad_file_changes_nothing_and_says_so_everywhere() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with(ALL);
    let proxy = Process::proxy(&servers(&cluster), &["--config", file.path.to_str().unwrap()]).await;
    let mut client = proxy.connect().await;
    assert!(metric(&mut client, "olol_config_last_reload_successful").await == "1");
    let read_at = metric(&mut client, "olol_config_last_reload_success_timestamp_seconds").await;
    file.is_replaced_by("[stack]\norder = [\"retyr\"]\n");
    until("the log tells of it", || has(&proxy, &["the configuration stays as it was", "did you mean `retry`?"])).await;
    let told = client.ask(&Request::post("/api/status/reload", "")).await;
    assert_eq!(told.status, 422);
    let error = told.error();
    assert!(error.starts_with(file.path.to_str().unwrap()) && error.contains("line 2"), "{error}");
    let status = client.ask(&Request::get("/api/status")).await.json();
    assert_eq!(status["olol"]["stack"], json!(["trace", "metrics", "model-route", "retry"]));
    assert_eq!(status["olol"]["config"]["last_reload"]["error"], json!(error.lines().next()));
    assert_eq!(metric(&mut client, "olol_config_last_reload_successful").await, "0");
    assert_eq!(metric(&mut client, "olol_config_last_reload_success_timestamp_seconds").await, read_at);
    assert!(metric(&mut client, "olol_config_reloads_total{result=\"failed\"}").await != "0");
    assert_eq!(client.ask(&chat("tiny", "hi")).await.said(), "Hello world");
    file.is_replaced_by(FEW);
    assert_eq!(client.ask(&Request::post("/api/status/reload", "")).await.status, 200);
    assert_eq!(metric(&mut client, "olol_config_last_reload_successful").await, "1");
    let status = client.ask(&Request::get("/api/status")).await.json();
    assert_eq!(status["olol"]["config"]["last_reload"]["error"], Value::Null);
}

#[tokio::test]
async fn a_file_that_is_gone_is_no_new_configuration() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with(FEW);
    let olol = Olol::from_file(&cluster, &file.path).await;
    std::fs::remove_file(&file.path).unwrap();
    let told = reload(&olol).await;
    assert!(told.status == 422 && told.error().contains("cannot read"), "{}", told.text());
    runs(&olol, &["trace", "retry"]).await;
}

#[tokio::test]
async fn a_request_in_flight_ends_on_the_stack_that_it_began_on() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).loads_until(&gate);
    let file = File::with(ALL);
    let olol = Olol::from_file(&cluster, &file.path).await;
    let mut waiting = olol.begin(&chat("tiny", "hi")).await;
    cluster.server(0).asked(1).await;
    file.is_replaced_by(NONE);
    assert_eq!(reload(&olol).await.json()["layers"], json!([]));
    gate.open();
    let answer = waiting.answer().await;
    assert_eq!((answer.said().as_str(), answer.ending), ("Hello world", Ending::LastChunk));
    assert!(!answer.header("x-olol-request").is_empty(), "the old stack has `trace`, which names requests");
    assert_eq!(olol.chat("tiny", "hi").await.header("x-olol-request"), "", "the new one has not");
}

#[tokio::test]
async fn a_stream_goes_on_over_reloads() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let file = File::with(ALL);
    let olol = Olol::from_file(&cluster, &file.path).await;
    let mut stream = olol.begin(&chat("tiny", "hi")).await;
    for text in [NONE, FEW, ALL] {
        gate.let_through(1);
        if text == NONE {
            stream.head().await;
        }
        stream.piece().await.unwrap();
        file.is_replaced_by(text);
        assert_eq!(reload(&olol).await.status, 200);
    }
    let (_, ending) = stream.rest().await;
    assert_eq!(ending, Ending::LastChunk);
}

#[tokio::test]
async fn what_is_remembered_outlives_a_reload() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with(ALL);
    let olol = Olol::from_file(&cluster, &file.path).await;
    let answer = olol.chat("tiny", "hi").await;
    file.is_replaced_by(FEW);
    reload(&olol).await;
    let told = olol.get(&format!("/api/status/requests/{}", answer.header("x-olol-request"))).await;
    assert_eq!((told.status, &told.json()["end"]), (200, &json!("whole")));
}

#[tokio::test]
async fn pages_that_may_ask_are_known_at_once() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::with("");
    let olol = Olol::from_file(&cluster, &file.path).await;
    let page = Request::get("/api/tags").header("Origin", "https://chat.example");
    assert_eq!(olol.ask(&page).await.status, 403);
    file.is_replaced_by("proxy.origins = [\"https://chat.example\"]\n");
    reload(&olol).await;
    assert_eq!(olol.ask(&page).await.status, 200);
}

/// A configuration file in a folder of its own.
struct File {
    folder: TempDir,
    path: PathBuf,
}

impl File {
    fn with(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("olol.toml");
        std::fs::write(&path, text).unwrap();
        Self { folder, path }
    }

    fn is_written(&self, text: &str) {
        std::fs::write(&self.path, text).unwrap();
    }

    /// As editors do it.
    fn is_replaced_by(&self, text: &str) {
        let new: &Path = &self.folder.path().join("olol.toml.new");
        std::fs::write(new, text).unwrap();
        std::fs::rename(new, &self.path).unwrap();
    }
}

async fn reload(olol: &Olol) -> Answer {
    olol.ask(&Request::post("/api/status/reload", "")).await
}

/// Waits until these layers run.
async fn runs(olol: &Olol, layers: &[&str]) {
    let running = async {
        while olol.get("/api/status").await.json()["olol"]["stack"] != json!(layers) {
            tokio::task::yield_now().await;
        }
    };
    patiently(&format!("{layers:?} run"), running).await;
}

async fn config_of(olol: &Olol) -> Value {
    olol.get("/api/status").await.json()["olol"]["config"].clone()
}

fn servers(cluster: &Cluster) -> String {
    let urls: Vec<String> = cluster.servers().iter().map(|server| format!("http://{}", server.address())).collect();
    urls.join(",")
}

/// Whether a line of the log has all these words.
fn has(proxy: &Process, words: &[&str]) -> bool {
    proxy.log().lines().any(|line| words.iter().all(|word| line.contains(word)))
}

/// The value of a metric; "0" if it is not there.
async fn metric(client: &mut Connection, name: &str) -> String {
    let page = client.ask(&Request::get("/metrics")).await.text();
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or("0").to_owned()
}
