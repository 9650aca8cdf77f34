//! Every file in `config/` is one that runs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::path::{Path, PathBuf};

use std::num::NonZeroU32;

use harness::olol::{chat, servers_in};
use harness::{Answer, Cluster, Connection, Olol, Process, Request, patiently, until};
use olol::keys::{self, Order};
use olol_middleware::rate_limit::Limits;
use olol_middleware::slots::Priority;
use serde_json::{Value, json};

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|ending| ending == "toml")).collect()
}

#[tokio::test]
async fn a_proxy_runs_with_each_file() {
    let files = files();
    assert!(files.len() > 1, "{files:?}");
    for file in files {
        let cluster = Cluster::of(servers_in(&file).len().max(2)).await.all_have_loaded("tiny");
        let olol = Olol::from_file(&cluster, &file).await;
        assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world", "{}", file.display());
        assert_eq!(olol.get("/api/tags").await.names(), ["tiny:latest"]);
        cluster.server(0).dies();
        for _ in 0..4 {
            assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world", "{}", file.display());
        }
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

/// The keys that `team.toml` tells how to make.
struct Team {
    ada: String,
    nightly: String,
    intern: String,
    ops: String,
}

impl Team {
    async fn of(olol: &Olol) -> Self {
        let user = Order { may: Some(vec!["infer".to_owned(), "list".to_owned()]), ..Order::default() };
        let few = Limits { requests_per_minute: NonZeroU32::new(10), ..Limits::default() };
        let add = |name: &str, order: &Order| keys::add(&olol.keys(), &name.parse().unwrap(), order).unwrap();
        let team = Self {
            ada: add("ada", &Order { priority: Priority::High, ..user.clone() }),
            nightly: add("nightly", &Order { priority: Priority::Low, ..user.clone() }),
            intern: add("intern", &Order { limits: few, ..user }),
            ops: add("ops", &Order { admin: true, ..Order::default() }),
        };
        let known = async {
            while olol.ask(&with(Request::get("/api/status"), &team.ops)).await.status != 200 {
                tokio::task::yield_now().await;
            }
        };
        patiently("the keys are known", known).await;
        team
    }
}

fn with(request: Request, key: &str) -> Request {
    request.header("Authorization", &format!("Bearer {key}"))
}

#[tokio::test]
async fn in_a_team_everybody_has_a_key_and_only_an_admin_deletes() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::from_file(&cluster, &file("team.toml")).await;
    let team = Team::of(&olol).await;
    let delete = || Request::new("DELETE", "/api/delete").with_body(json!({"model": "tiny"}));
    for (key, chats, deletes) in [(&team.ada, 200, 403), (&team.intern, 200, 403), (&team.ops, 200, 200)] {
        assert_eq!(olol.ask(&with(chat("tiny", "hi"), key)).await.status, chats);
        assert_eq!(olol.ask(&with(delete(), key)).await.status, deletes);
    }
    assert_eq!(olol.chat("tiny", "hi").await.status, 401, "nobody asks without one");
    assert!(cluster.servers().iter().all(|server| !server.still_has("tiny")));
}

#[tokio::test]
async fn in_a_team_nobody_takes_it_all() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::from_file(&cluster, &file("team.toml")).await;
    let team = Team::of(&olol).await;
    let mut asked = 0;
    let refused = loop {
        let answer = olol.ask(&with(chat("tiny", "hi"), &team.intern)).await;
        if answer.status != 200 {
            break answer;
        }
        asked += 1;
        assert!(asked < 20);
    };
    assert_eq!((refused.status, refused.header("x-olol-reason")), (429, "rate-limited"));
    assert!(asked >= 10 && refused.error().contains("10 requests a minute for key intern"), "{}", refused.text());
    assert!(!refused.header("retry-after").is_empty());
    let answer = olol.ask(&with(chat("tiny", "hi"), &team.ada)).await;
    assert_eq!((answer.status, answer.header("x-ratelimit-limit")), (200, "30"), "others are not held to that");
}

#[tokio::test]
async fn in_a_team_people_go_before_batch_jobs() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    for server in cluster.servers() {
        server.stalls_before_head();
    }
    let olol = Olol::from_file(&cluster, &file("team.toml")).await;
    let team = Team::of(&olol).await;
    let mut running: Vec<Connection> = Vec::new();
    for number in 0..4 {
        running.push(olol.begin(&with(chat("tiny", &number.to_string()), &team.ops)).await);
        until("it is asked", || cluster.servers().iter().map(harness::Server::work).sum::<usize>() == number + 1).await;
    }
    let _job = olol.begin(&with(chat("tiny", "job"), &team.nightly)).await;
    until("the job waits", || olol.waiting() == 1).await;
    let _person = olol.begin(&with(chat("tiny", "person"), &team.ada)).await;
    until("both wait", || olol.waiting() == 2).await;
    drop(running.pop());
    until("one is asked", || olol.waiting() == 1).await;
    let asked = || cluster.servers().iter().flat_map(|server| server.seen("/api/chat"));
    let said = |text: &str| asked().any(|seen| seen.json()["messages"][0]["content"] == text);
    until("the person is asked", || said("person")).await;
    assert!(!said("job"));
}

/// What a layer has said of a request that was served.
async fn said(olol: &Olol, answer: &Answer, layer: &str) -> Vec<Value> {
    let told = olol.get(&format!("/api/status/requests/{}", answer.header("x-olol-request"))).await.json();
    let notes = told["trail"].as_array().unwrap_or_else(|| panic!("{told}"));
    notes.iter().filter(|note| note["layer"] == layer).cloned().collect()
}

#[tokio::test]
async fn big_models_go_to_the_big_box_and_small_ones_keep_off_it() {
    let cluster = Cluster::of(3).await.all_have_loaded("llama3.3:70b").all_have_loaded("llama3.2");
    let olol = Olol::from_file(&cluster, &file("big-models.toml")).await;
    for (name, model, server) in [
        ("llama3.3:70b", "llama3.3:70b", "big"),
        ("best", "llama3.3:70b", "big"),
        ("gpt-4o", "llama3.3:70b", "big"),
        ("llama3.2", "llama3.2", "desk"),
        ("fast", "llama3.2", "desk"),
    ] {
        let answer = olol.chat(name, "hi").await;
        assert_eq!(answer.said(), "Hello world", "{name}: {}", answer.text());
        assert!(answer.server().starts_with(server), "{name} went to {}", answer.server());
        if name != model {
            assert_eq!(answer.header("x-olol-model"), model);
        }
        assert_eq!(answer.lines()[0]["model"], name, "the client's own name");
    }
    cluster.server(0).dies();
    let answer = olol.chat("best", "hi").await;
    assert_eq!((answer.said().as_str(), &answer.server()[..4]), ("Hello world", "desk"), "the desktops help out");
}

#[tokio::test]
async fn what_no_box_can_hold_belongs_on_a_group_and_goes_to_a_server_until_there_is_one() {
    let cluster = Cluster::of(3).await.all_have_loaded("llama3.1:405b").all_have_loaded("llama3.3:70b");
    let olol = Olol::from_file(&cluster, &file("big-models.toml")).await;
    let answer = olol.chat("llama3.1:405b", "hi").await;
    assert_eq!((answer.said().as_str(), answer.server()), ("Hello world", "big"));
    let notes = said(&olol, &answer, "distribute").await;
    assert_eq!(notes.len(), 1);
    assert_eq!(notes[0]["decision"], "belongs on a group of workers, and there is none: goes to a server");
    assert_eq!(notes[0]["facts"], json!({"policy": "always", "workers": 0, "wanted": 4}));
    let answer = olol.chat("llama3.3:70b", "hi").await;
    assert!(said(&olol, &answer, "distribute").await.is_empty());
    cluster.server(0).dies();
    assert_ne!(olol.chat("llama3.1:405b", "hi").await.status, 200, "no desktop is asked for it");
}

#[tokio::test]
async fn the_check_finds_each_file_good() {
    for file in files() {
        let ended = Process::run(&["check", file.to_str().unwrap()]).await;
        let text = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success() && text.contains("is good"), "{text}{}", String::from_utf8_lossy(&ended.stderr));
    }
}

#[tokio::test]
async fn the_check_tells_the_stack_and_where_values_come_from() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("olol.toml");
    std::fs::write(&file, "[stack]\norder = [\"trace\", \"retry\"]\n[proxy]\nport = 1\n").unwrap();
    let file = file.to_str().unwrap();
    for arguments in [&["check", file][..], &["check", "--config", file]] {
        let ended = Process::run(&[arguments, &["--servers", "gpu1"]].concat()).await;
        let text = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert_eq!(ended.status.code(), Some(0), "{text}");
        let line = |begin: &str| {
            let found = text.lines().find(|line| line.trim_start().starts_with(begin));
            found.unwrap_or_else(|| panic!("{begin}: {text}")).to_owned()
        };
        assert!(line("1  trace").contains("what was asked") && line("2  retry").contains("another server"));
        assert!(line("-  model-route").contains("off"));
        assert!(line("proxy.port").ends_with(&format!("{file}:4")));
        assert!(line("proxy.servers").contains("[\"gpu1\"]") && line("proxy.servers").ends_with("flag --servers"));
        assert!(line("proxy.host").ends_with("default"));
        assert!(!text.contains('\u{1b}'), "no colours");
    }
    let ended = Process::run(&["check", file, "--json"]).await;
    let told: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(told["layers"][1]["layer"], "retry");
}

#[tokio::test]
async fn the_check_of_a_bad_file_fails_with_what_is_wrong() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[stack]\norder = [\"retry\", \"model-route\"]\n").unwrap();
    let ended = Process::run(&["check", file.path().to_str().unwrap()]).await;
    let error = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(1) && error.contains("line 2") && error.contains("must come first"), "{error}");
    assert!(ended.stdout.is_empty());
}
