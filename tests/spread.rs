//! Each call goes to a server that has its model, and among those to the one with the least to do.

mod harness;

use harness::olol::chat;
use harness::{Cluster, Connection, Olol, Request, Way};
use serde_json::json;

/// Without `affinity`: where calls go is a question of load alone.
const BY_LOAD: &str = "stack.order = [\"model-route\", \"retry\"]";

#[tokio::test]
async fn calls_go_to_the_least_loaded_server() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, BY_LOAD).await;
        let _streams = running(&cluster, &olol, "tiny", 9).await;
        assert_eq!(work(&cluster), [3, 3, 3], "{way:?}");
    }
}

#[tokio::test]
async fn a_heavier_server_gets_more() {
    let cluster = Cluster::of(2).await.weighing([1, 3]).all_have_loaded("tiny");
    let olol = Olol::start(&cluster, BY_LOAD).await;
    let _streams = running(&cluster, &olol, "tiny", 8).await;
    assert_eq!(work(&cluster), [2, 6]);
}

#[tokio::test]
async fn a_place_is_free_again_when_the_answer_is_over() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    for _ in 0..4 {
        olol.chat("tiny", "hi").await;
        assert_eq!((olol.in_flight(0), olol.in_flight(1)), (0, 0));
    }
}

#[tokio::test]
async fn names_of_the_same_weights_are_in_memory_together() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have("tiny");
        for index in 0..3 {
            cluster.server(index).has_like("poet", "tiny").has("other");
        }
        cluster.server(2).keeps_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        assert_eq!(olol.chat("poet", "hi").await.server(), "2", "{way:?}: what Ollama has loaded as tiny is poet, too");
        let shown = cluster.server(2).seen("/api/show");
        let asked: Vec<_> = shown.iter().map(|seen| seen.json()["model"].clone()).collect();
        assert!(
            !asked.contains(&json!("other:latest")),
            "nobody asks what a model is made of that is like no other: {asked:?}"
        );
    }
}

#[tokio::test]
async fn a_model_on_one_server_is_asked_there_only() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("other");
        cluster.server(1).has("tiny");
        let olol = Olol::start(&cluster, "").await;
        let _streams = running(&cluster, &olol, "tiny", 4).await;
        assert_eq!(work(&cluster), [0, 4, 0], "{way:?}");
    }
}

#[tokio::test]
async fn every_spelling_of_a_name_leads_to_the_model() {
    let cluster = Cluster::of(2).await;
    cluster.server(1).has("tiny");
    let olol = Olol::start(&cluster, "").await;
    for name in ["tiny", "Tiny", "TINY:latest", "tiny:latest"] {
        let answer = olol.chat(name, "hi").await;
        assert_eq!((answer.status, answer.server()), (200, "1"), "{name}");
        assert_eq!(answer.lines()[0]["model"], name, "the answer repeats what was asked");
    }
}

#[tokio::test]
async fn a_server_that_has_the_model_in_memory_comes_first() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have("tiny");
        cluster.server(2).has_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        let _streams = running(&cluster, &olol, "tiny", 4).await;
        assert_eq!(work(&cluster), [0, 0, 4], "{way:?}");
    }
}

#[tokio::test]
async fn a_server_that_would_have_to_load_is_asked_when_the_others_are_busy() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    cluster.server(0).has_loaded("tiny");
    let olol = Olol::start(&cluster, "pick.slots = [{ slots = 2 }]").await;
    let _streams = running(&cluster, &olol, "tiny", 3).await;
    assert_eq!(work(&cluster), [2, 1]);
}

#[tokio::test]
async fn what_one_call_loaded_is_known_to_the_next() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        let first = olol.chat("tiny", "hi").await.server().to_owned();
        olol.knows(&cluster).await;
        for _ in 0..4 {
            assert_eq!(olol.chat("tiny", "hi").await.server(), first, "{way:?}");
        }
    }
}

#[tokio::test]
async fn a_body_reaches_the_server_as_it_is() {
    let body = "{ \"MODEL\":\"nosuch\",\"model\" : \"tiny\", \"prompt\":\"\\u00e9 \u{1F980}\",\n\"future\":{\"n\":1e400} } trailing";
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have("other");
        cluster.server(1).has("tiny");
        let olol = Olol::start(&cluster, "").await;
        for request in [Request::post("/api/embed?a=b%20c", body), Request::post("/api/embed?a=b%20c", body).chunked()]
        {
            olol.ask(&request).await;
            let seen = cluster.server(1).seen("/api/embed?a=b%20c").pop().expect("the call");
            assert_eq!(String::from_utf8_lossy(&seen.body), body, "{way:?}");
        }
    }
}

#[tokio::test]
async fn headers_reach_the_server_but_for_those_of_the_connection() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        let request =
            chat("tiny", "hi").header("Authorization", "Bearer x").header("X-Mine", "1").header("X-Mine", "2");
        let request = request.header("Connection", "X-Hop").header("X-Hop", "1").header("Host", "localhost:9");
        olol.ask(&request.header("Origin", "http://localhost")).await;
        let seen = cluster.server(0).seen("/api/chat").pop().expect("the call");
        let mine: Vec<&str> =
            seen.headers.0.iter().filter(|(name, _)| name == "x-mine").map(|(_, value)| value.as_str()).collect();
        assert_eq!((seen.headers.get("authorization"), mine), (Some("Bearer x"), vec!["1", "2"]), "{way:?}");
        assert_eq!((seen.headers.get("x-hop"), seen.headers.get("origin")), (None, None));
        assert_eq!(seen.headers.get("host"), Some(cluster.server(0).address().to_string().as_str()));
    }
}

#[tokio::test]
async fn calls_that_belong_to_a_servers_key_go_to_the_same_server_every_time() {
    let cluster = Cluster::of(3).await.all_have("tiny");
    for server in cluster.servers() {
        server.fails("POST", "/api/me", 401, "unauthorized");
    }
    let olol = Olol::start(&cluster, "").await;
    for _ in 0..6 {
        assert_eq!(olol.ask(&Request::post("/api/me", "")).await.status, 401);
    }
    let asked: Vec<usize> = cluster.servers().iter().map(|server| server.seen("/api/me").len()).collect();
    assert_eq!(asked, [6, 0, 0]);
}

/// So many answers that have begun and will not end.
async fn running(cluster: &Cluster, olol: &Olol, model: &str, count: usize) -> Vec<Connection> {
    for server in cluster.servers() {
        server.stalls_after(["Hel"]);
    }
    let mut streams = Vec::new();
    for _ in 0..count {
        let request = Request::post("/api/generate", json!({"model": model, "prompt": "hi"}));
        let mut stream = olol.begin(&request).await;
        stream.head().await;
        streams.push(stream);
    }
    streams
}

/// How often each server was asked.
fn work(cluster: &Cluster) -> Vec<usize> {
    cluster.servers().iter().map(harness::Server::work).collect()
}
