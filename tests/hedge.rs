//! A short call that is late is sent to a second server, and the first answer is given.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::chat;
use harness::{Cluster, Gate, Olol, Request, Way, patiently, until};
use serde_json::json;

/// What is late is known after five answers; no second try is spared.
const EAGER: &str =
    "[hedge]\non = [\"embed\", \"v1-embeddings\", \"show\"]\nmin-samples = 5\nmin-delay-ms = 50\nbudget = 1.0\n";

fn embed() -> Request {
    Request::post("/api/embed", json!({"model": "tiny", "input": "hi"}))
}

/// A cluster whose first server is always asked first, and a proxy that knows how long its embeddings take.
async fn learned(way: Way, toml: &str) -> (Cluster, Olol) {
    let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have_loaded("tiny");
    let olol = Olol::start(&cluster, toml).await;
    for _ in 0..5 {
        let answer = olol.ask(&embed()).await;
        assert_eq!((answer.status, answer.server()), (200, "0"), "{way:?}");
    }
    (cluster, olol)
}

/// Waits until a result was counted.
async fn is_counted(olol: &Olol, result: &str) {
    let begin = format!("olol_hedges_total{{result=\"{result}\"}} ");
    let counting = async {
        loop {
            let page = olol.get("/metrics").await.text();
            let count = page.lines().find_map(|line| line.strip_prefix(&begin)).unwrap_or("0").to_owned();
            if count != "0" {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    patiently("a second try is counted", counting).await;
}

#[tokio::test]
async fn a_late_embedding_comes_from_a_second_server_and_the_first_is_told() {
    for way in Way::BOTH {
        let (cluster, olol) = learned(way, EAGER).await;
        cluster.server(0).stalls_before_head();
        let answer = olol.ask(&embed()).await;
        assert_eq!((answer.status, answer.server(), answer.header("x-olol-attempts")), (200, "1", "2"), "{way:?}");
        assert_eq!(answer.json()["embeddings"], json!([[0.6, 0.8]]));
        cluster.server(0).saw_cancel().await;
        until("the books are empty", || olol.in_flight(0) + olol.in_flight(1) == 0).await;
        let told = olol.get(&format!("/api/status/requests/{}", answer.header("x-olol-request"))).await.json();
        let notes = told["trail"].as_array().unwrap().iter().filter(|note| note["layer"] == "hedge");
        let said: Vec<_> = notes.map(|note| note["decision"].as_str().unwrap()).collect();
        assert_eq!(said, ["the first try is late: sends a second one", "the second try has answered first"], "{told}");
        assert_eq!((&told["servers"], &told["attempts"]), (&json!(["0", "1"]), &json!(2)));
        is_counted(&olol, "won").await;
    }
}

#[tokio::test]
async fn a_second_try_that_is_beaten_is_dropped() {
    let (cluster, olol) = learned(Way::Http, EAGER).await;
    let gate = Gate::closed();
    let steps = [harness::Step::Wait(gate.clone())];
    let answer = harness::answers::whole(200, "application/json; charset=utf-8", r#"{"embeddings":[[1.0]]}"#);
    cluster.server(0).on("POST", "/api/embed", steps.into_iter().chain(answer).collect());
    cluster.server(1).stalls_before_head();
    let mut client = olol.begin(&embed()).await;
    cluster.server(1).asked(1).await;
    gate.open();
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.server(), answer.header("x-olol-attempts")), (200, "0", "2"));
    cluster.server(1).saw_cancel().await;
}

#[tokio::test]
async fn a_second_try_that_fails_changes_nothing() {
    let (cluster, olol) = learned(Way::Http, &format!("{EAGER}[retry]\nattempts = 1\n")).await;
    let gate = Gate::closed();
    let steps = [harness::Step::Wait(gate.clone())];
    let answer = harness::answers::whole(200, "application/json; charset=utf-8", r#"{"embeddings":[[1.0]]}"#);
    cluster.server(0).on("POST", "/api/embed", steps.into_iter().chain(answer).collect());
    cluster.server(1).dies_before_head();
    let mut client = olol.begin(&embed()).await;
    cluster.server(1).asked(1).await;
    gate.open();
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.server()), (200, "0"));
}

#[tokio::test]
async fn second_tries_have_a_budget() {
    let toml = EAGER.replace("budget = 1.0", "budget = 0.0\nper-second = 0\nreserve = 2");
    let (cluster, olol) = learned(Way::Http, &toml).await;
    cluster.server(0).stalls_before_head();
    for _ in 0..2 {
        assert_eq!(olol.ask(&embed()).await.server(), "1");
    }
    let asked = cluster.server(1).work();
    let mut third = olol.begin(&embed()).await;
    assert!(third.is_quiet().await, "it waits for the first server");
    assert_eq!(cluster.server(1).work(), asked);
    drop(third);
    cluster.server(0).saw_cancels(3).await;
    is_counted(&olol, "no_budget").await;
}

#[tokio::test]
async fn a_chat_is_never_sent_twice() {
    let (cluster, olol) = learned(Way::Http, EAGER).await;
    cluster.server(0).stalls_before_head();
    let mut client = olol.begin(&chat("tiny", "hi")).await;
    assert!(client.is_quiet().await);
    assert_eq!(cluster.server(1).work(), 0);
}

#[tokio::test]
async fn a_second_try_takes_no_slot_over_the_limit() {
    let (cluster, olol) = learned(Way::Http, &format!("pick.slots = [{{ slots = 1 }}]\n{EAGER}")).await;
    for server in cluster.servers() {
        server.stalls_before_head();
    }
    let gone = olol.begin(&chat("tiny", "fills the first server")).await;
    cluster.server(0).asked(6).await;
    let _stays = olol.begin(&chat("tiny", "fills the second")).await;
    cluster.server(1).asked(1).await;
    drop(gone);
    until("the first server has a slot", || olol.in_flight(0) == 0).await;
    let late = olol.begin(&embed()).await;
    cluster.server(0).asked(7).await;
    is_counted(&olol, "no_slot").await;
    assert_eq!(cluster.server(1).work(), 1);
    drop(late);
}

#[tokio::test]
async fn without_routes_the_layer_is_not_there() {
    let (cluster, olol) = learned(Way::Http, "").await;
    cluster.server(0).stalls_before_head();
    let mut client = olol.begin(&embed()).await;
    assert!(client.is_quiet().await);
    assert_eq!(cluster.server(1).work(), 0);
}
