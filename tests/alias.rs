//! Names of the operator's own for models, and rules that say which servers a model goes to.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::{chat, chat_at_once, keep_alive, v1_chat};
use harness::{Cluster, Connection, Olol, Request, Server, Way, answers};
use serde_json::{Value, json};

/// What every name here stands for.
const NAMES: &str = "[alias.models]\nmine = \"tiny\"\n";

#[tokio::test]
async fn servers_see_the_model_and_clients_the_name() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have("other");
        cluster.server(1).has("tiny");
        let olol = Olol::start(&cluster, NAMES).await;
        for request in [
            chat("Mine", "hi"),
            chat_at_once("Mine", "hi"),
            v1_chat("Mine", "hi"),
            Request::post("/api/generate", json!({"prompt": "hi", "model": "Mine"})).chunked(),
            Request::post("/api/embed", r#"{"MODEL":"x","input":"hi","model":"Mine"}"#),
            Request::post("/v1/chat/completions", json!({"model": "Mine", "messages": [{"role": "user"}]})),
        ] {
            let answer = olol.ask(&request).await;
            let told: Vec<Value> = answer.lines().iter().map(|line| line["model"].clone()).collect();
            assert_eq!((answer.status, answer.server(), answer.header("x-olol-model")), (200, "1", "tiny"), "{way:?}");
            assert!(!told.is_empty() && told.iter().all(|name| name == "Mine"), "{}", answer.text());
        }
        let seen = cluster.server(1).seen("/api/embed").pop().unwrap().body;
        assert_eq!(String::from_utf8_lossy(&seen), r#"{"MODEL":"x","input":"hi","model":"tiny"}"#);
    }
}

#[tokio::test]
async fn every_dialect_names_the_model_as_its_client_did() {
    let started = r#"{"type":"message_start","message":{"id":"m","model":"tiny","content":[]}}"#;
    let delta = r#"{"type":"content_block_delta","delta":{"text":"\"model\":\"tiny\""}}"#;
    let created = r#"{"response":{"model":"tiny","output":[]},"type":"response.created"}"#;
    let piece =
        r#"{"model":"tiny","choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{\"model\":\"tiny\"}"}}]}}]}"#;
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let server = cluster.server(0);
        let olol = Olol::start(&cluster, NAMES).await;
        for (path, events, wanted) in [
            ("/v1/messages", [started, delta], started.replacen("tiny", "mine", 1) + delta),
            ("/v1/responses", [created, created], created.replacen("tiny", "mine", 1).repeat(2)),
            ("/v1/chat/completions", [piece, piece], piece.replacen("tiny", "mine", 1).repeat(2)),
            ("/v1/completions", [piece, piece], piece.replacen("tiny", "mine", 1).repeat(2)),
        ] {
            let chunks = events.map(|event| format!("event: x\ndata: {event}\n\n").into_bytes());
            server.on("POST", path, answers::chunked("text/event-stream", chunks));
            let answer = olol.ask(&Request::post(path, r#"{"stream":true,"model":"mine"}"#)).await;
            let data: String = answer.text().lines().filter_map(|line| line.strip_prefix("data: ")).collect();
            assert_eq!((data, answer.chunks.len()), (wanted, 2), "{path} over {way:?}");
            assert_eq!(server.seen(path).pop().unwrap().body, br#"{"stream":true,"model":"tiny"}"#);
        }
    }
}

#[tokio::test]
async fn a_long_answer_in_one_piece_keeps_the_name_at_its_end() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let numbers = vec!["-0.123456789"; 200_000].join(",");
        let body = |name: &str| format!(r#"{{"object":"list","data":[{{"embedding":[{numbers}]}}],"model":"{name}"}}"#);
        cluster.server(0).on("POST", "/v1/embeddings", answers::whole(200, "application/json", body("tiny")));
        let olol = Olol::start(&cluster, NAMES).await;
        let answer = olol.ask(&Request::post("/v1/embeddings", r#"{"model":"mine","input":"hi"}"#)).await;
        assert!(answer.text() == body("mine"), "{way:?}");
    }
}

#[tokio::test]
async fn a_model_is_shown_by_its_name() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    for server in cluster.servers() {
        let entry = "{\"id\":\"tiny\",\"object\":\"model\",\"created\":7,\"owned_by\":\"library\"}\n";
        server.on("GET", "/v1/models/tiny", answers::whole(200, "application/json", entry));
    }
    let olol = Olol::start(&cluster, NAMES).await;
    let shown = olol.ask(&Request::post("/api/show", json!({"name": "mine"}))).await;
    assert_eq!((shown.status, shown.header("x-olol-model")), (200, "tiny"));
    assert_eq!(shown.text(), olol.ask(&Request::post("/api/show", json!({"name": "tiny"}))).await.text());
    let entry = olol.get("/v1/models/mine").await;
    assert_eq!(entry.text(), "{\"id\":\"mine\",\"object\":\"model\",\"created\":7,\"owned_by\":\"library\"}\n");
    assert_eq!(entry.headers.length(), Some(entry.text().len() as u64));
}

#[tokio::test]
async fn lists_show_the_names_once_with_the_entry_of_their_model() {
    let names =
        "[alias.models]\nmine = \"tiny\"\nlost = \"nobodys\"\nbest = [\"nobodys\", \"big:70b\"]\n\"x-*\" = \"tiny\"";
    for servers in [1, 2] {
        let cluster = Cluster::of(servers).await;
        cluster.server(0).has_since("tiny", "2026-01-02T00:00:00Z");
        cluster.server(servers - 1).has_since("big:70b", "2026-01-01T00:00:00Z");
        let olol = Olol::start(&cluster, names).await;
        for path in ["/api/tags", "/v1/models"] {
            let list = olol.get(path).await;
            assert_eq!(list.names(), ["tiny:latest", "mine", "big:70b", "best"], "{path} of {servers}");
        }
        let list = olol.get("/api/tags").await.json();
        let (tiny, mine) = (&list["models"][0], &list["models"][1]);
        assert_eq!((&mine["model"], &mine["digest"]), (&json!("mine"), &tiny["digest"]));
        assert_eq!(olol.ask(&Request::new("HEAD", "/api/tags")).await.status, 200);
    }
}

#[tokio::test]
async fn what_changes_models_means_what_it_says() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let olol = Olol::start(&cluster, NAMES).await;
    assert_eq!(olol.ask(&Request::new("DELETE", "/api/delete").with_body(json!({"model": "mine"}))).await.status, 404);
    assert!(cluster.servers().iter().all(|server| server.still_has("tiny")));
    let copied = olol.ask(&Request::post("/api/copy", json!({"source": "tiny", "destination": "mine"}))).await;
    assert_eq!((copied.status, cluster.server(0).still_has("mine")), (200, true));
    // There is a model of that name now, and the operator's word counts all the same.
    assert_eq!(olol.chat("mine", "hi").await.header("x-olol-model"), "tiny");
}

#[tokio::test]
async fn who_has_no_such_model_says_so() {
    let cluster = Cluster::of(2).await.all_have("other");
    let olol = Olol::start(&cluster, NAMES).await;
    let answer = olol.chat("mine", "hi").await;
    assert_eq!((answer.status, answer.error().as_str()), (404, "model 'tiny' not found"));
    assert_eq!(answer.header("x-olol-model"), "tiny");
}

#[tokio::test]
async fn a_name_can_be_unloaded_everywhere() {
    let cluster = Cluster::of(3).await.all_have_loaded("tiny");
    let rule = "[[alias.rules]]\nservers = [\"0\"]\nmode = \"demand\"";
    let olol = Olol::start(&cluster, &format!("{NAMES}{rule}")).await;
    let answer = olol.ask(&keep_alive("mine", 0)).await;
    assert_eq!((answer.status, &answer.json()["model"]), (200, &json!("mine")));
    assert!(cluster.servers().iter().all(|server| server.holds().1.is_empty()));
}

#[tokio::test]
async fn what_a_name_loaded_is_known_to_the_next_call() {
    let cluster = Cluster::of(3).await.all_have("tiny");
    let olol = Olol::start(&cluster, NAMES).await;
    let first = olol.chat("mine", "hi").await.server().to_owned();
    olol.knows(&cluster).await;
    for _ in 0..4 {
        assert_eq!(olol.chat("mine", "hi").await.server(), first);
    }
}

#[tokio::test]
async fn a_later_tier_helps_out_when_those_before_it_have_no_room() {
    let rule = "pick.slots = [{ slots = 2 }]\n[[alias.rules]]\nmodels = [\"*:70b\"]\ntiers = [[\"2\"], [\"1\"]]";
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have("big:70b");
        // Where it is loaded already counts less than what the rule says.
        cluster.server(0).has_loaded("big:70b");
        let olol = Olol::start(&cluster, rule).await;
        let _streams = running(&cluster, &olol, "big:70b", 5).await;
        assert_eq!(work(&cluster), [1, 2, 2], "{way:?}");
    }
}

#[tokio::test]
async fn a_tier_that_dies_is_replaced_by_the_next() {
    let rule = "[[alias.rules]]\ntiers = [[\"1\"], [\"0\"]]";
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have("tiny");
        cluster.server(1).dies_before_head();
        let olol = Olol::start(&cluster, rule).await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.server(), answer.header("x-olol-attempts")), (200, "0", "2"), "{way:?}");
    }
}

#[tokio::test]
async fn what_is_demanded_is_asked_of_nobody_else() {
    let rule = "[[alias.rules]]\nname = \"big ones\"\nmodels = [\"tiny\"]\nservers = [\"1\"]\nmode = \"demand\"";
    let cluster = Cluster::of(2).await.all_have("tiny");
    cluster.server(1).dies_before_head();
    let olol = Olol::start(&cluster, rule).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 502);
    cluster.server(1).only_lists("tiny").says(["Hello"]);
    assert_eq!(olol.chat("tiny", "hi").await.status, 404, "the word of the one that was asked");
    cluster.server(1).lost("tiny");
    olol.knows(&cluster).await;
    let answer = olol.chat("tiny", "hi").await;
    assert_eq!((answer.status, answer.header("x-olol-reason")), (503, "no-server"));
    let text =
        "no server can answer now: rule 'big ones' demands 1 for tiny:latest, and none of those has it or is left";
    assert_eq!((answer.error().as_str(), cluster.server(0).work()), (text, 0));
}

#[tokio::test]
async fn a_rule_may_weigh_servers_otherwise() {
    // Of weights alone: a conversation that begins somewhere by `affinity` is another question.
    let rule = "stack.order = ['alias', 'model-route', 'retry']\npick.slots = [{ slots = 99 }]\n[[alias.rules]]\nweights = { 0 = 3 }";
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, rule).await;
    let _streams = running(&cluster, &olol, "tiny", 8).await;
    assert_eq!(work(&cluster), [6, 2]);
}

/// So many answers that have begun and will not end.
async fn running(cluster: &Cluster, olol: &Olol, model: &str, count: usize) -> Vec<Connection> {
    for server in cluster.servers() {
        server.stalls_after(["Hel"]);
    }
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = olol.begin(&chat(model, "hi")).await;
        stream.head().await;
        streams.push(stream);
    }
    streams
}

/// How often each server was asked.
fn work(cluster: &Cluster) -> Vec<usize> {
    cluster.servers().iter().map(Server::work).collect()
}
