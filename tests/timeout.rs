//! What takes too long is given up, the server is told, and the client learns it as it learns of a server that died.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::time::Duration;

use harness::olol::{chat, chat_at_once, v1_chat};
use harness::{Cluster, Ending, Gate, Olol, Request, Way};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// What Ollama says in a stream when its runner dies.
const BROKEN: &str = "an error was encountered while running the model: unexpected EOF";

#[tokio::test]
async fn an_answer_that_does_not_begin_is_a_gateway_timeout() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have_loaded("tiny");
        cluster.server(0).stalls_before_head();
        let olol = Olol::start(&cluster, "timeout.first-byte-s = 0.2").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.header("x-olol-reason")), (504, "timeout"), "{way:?}");
        assert_eq!(answer.error(), "timed out: the first byte of the answer took longer than 0.2 s");
        cluster.server(0).saw_cancel().await;
        assert_eq!(cluster.server(1).work(), 0, "nobody else begins from the start");
    }
}

#[tokio::test]
async fn an_answer_in_one_piece_has_a_limit_of_its_own() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    cluster.server(0).stalls_before_head();
    let olol = Olol::start(&cluster, "timeout.unstreamed-s = 0.2").await;
    assert_eq!(olol.ask(&chat_at_once("tiny", "hi")).await.status, 504);
    let answer = olol.ask(&Request::post("/v1/embeddings", json!({"model": "tiny", "input": "hi"}))).await;
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (504, &json!("api_error")));
}

#[tokio::test]
async fn a_stream_that_stalls_breaks_off() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        cluster.server(0).stalls_after(["Hel"]);
        let olol = Olol::start(&cluster, "timeout.idle-s = 0.2").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.said().as_str(), answer.error().as_str()), ("Hel", BROKEN), "{way:?}");
        assert_eq!(answer.ending, Ending::LastChunk);
        cluster.server(0).saw_cancel().await;
        let answer = olol.ask(&v1_chat("tiny", "hi")).await;
        assert_eq!((answer.said().as_str(), answer.ending), ("Hel", Ending::Cut), "{way:?}");
        cluster.server(0).saw_cancels(2).await;
    }
}

#[tokio::test]
async fn a_reader_who_takes_a_break_is_not_given_up() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        cluster.server(0).floods();
        let olol = Olol::start(&cluster, "timeout.idle-s = 0.1").await;
        let mut reader = olol.begin(&chat("tiny", "hi")).await;
        reader.head().await;
        // Nothing moves for longer than a pause may be.
        cluster.server(0).is_stuck().await;
        for _ in 0..500 {
            assert!(!reader.line().await["message"]["content"].as_str().unwrap().is_empty(), "{way:?}");
        }
    }
}

#[tokio::test]
async fn the_whole_answer_has_its_limit() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        cluster.server(0).floods();
        let rules = "[[timeout.rules]]\nroutes = [\"chat\"]\nmodels = [\"tiny\"]\ntotal-s = 0.3";
        let olol = Olol::start(&cluster, rules).await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.error().as_str()), (200, BROKEN), "{way:?}");
        cluster.server(0).saw_cancel().await;
        cluster.server(0).stalls_before_head();
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.header("x-olol-reason")), (504, "timeout"), "{way:?}");
        assert_eq!(answer.error(), "timed out: the whole answer took longer than 0.3 s");
        // Other routes have no such limit, and the server is no worse for it.
        cluster.server(0).says(["Hello"]);
        let answer = olol.ask(&Request::post("/api/generate", json!({"model": "tiny", "prompt": "hi"}))).await;
        assert_eq!((answer.status, answer.said().as_str()), (200, "Hello"), "{way:?}");
    }
}

#[tokio::test]
async fn who_answers_questions_about_itself_and_no_chat_is_left_alone() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have_loaded("tiny");
        cluster.server(0).stalls_before_head();
        let olol = Olol::start(&cluster, "timeout.first-byte-s = 0.2\nretry.breaker-open-ms = 600000").await;
        for _ in 0..3 {
            assert_eq!(olol.chat("tiny", "hi").await.status, 504, "{way:?}");
        }
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.server()), (200, "1"), "{way:?}");
        assert!(olol.is_server_up(0), "it still says how it is");
        // Only the model that fails is left alone.
        cluster.server(0).has_loaded("other").says(["Hello"]);
        olol.knows(&cluster).await;
        assert_eq!(olol.chat("other", "hi").await.server(), "0", "{way:?}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_no_failure_of_its_server() {
    let cluster = Cluster::of(2).await.weighing([1000, 1]).all_have_loaded("tiny");
    cluster.server(0).stalls_before_head();
    let olol = Olol::start(&cluster, "retry.breaker-open-ms = 600000").await;
    for asked in 1..=4 {
        let client = olol.begin(&chat("tiny", "hi")).await;
        cluster.server(0).asked(asked).await;
        drop(client);
        cluster.server(0).saw_cancels(asked).await;
    }
    assert_eq!(cluster.server(1).work(), 0);
}

#[tokio::test]
async fn who_waits_for_a_slot_for_too_long_is_told_so_and_not_that_the_server_is_busy() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    cluster.server(0).stalls_before_head();
    let rules = "pick.slots = [{ slots = 1 }]\n[[timeout.rules]]\nroutes = [\"chat\"]\ntotal-s = 0.3";
    let olol = Olol::start(&cluster, rules).await;
    let _holds = olol.begin(&Request::post("/api/generate", json!({"model": "tiny", "prompt": "hi"}))).await;
    cluster.server(0).asked(1).await;
    let mut waiting = Vec::new();
    for _ in 0..20 {
        waiting.push(olol.begin(&chat("tiny", "hi")).await);
    }
    for client in &mut waiting {
        let answer = client.answer().await;
        assert_eq!((answer.status, answer.header("x-olol-reason")), (504, "timeout"));
        assert_eq!(answer.error(), "timed out: the whole answer took longer than 0.3 s");
    }
}

#[tokio::test]
async fn a_load_goes_on_when_its_call_is_given_up() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).loads_until(&gate);
    let olol = Olol::start(&cluster, "timeout.first-byte-s = 0.2").await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 504);
    gate.open();
    cluster.server(0).has_in_memory("tiny").await;
}

#[tokio::test]
async fn a_server_that_takes_no_connection_is_left_soon() {
    // A socket whose queue of connections is full: the kernel answers no more of them.
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = Vec::new();
    while let Ok(Ok(connection)) = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        waiting.push(connection);
    }
    let cluster = Cluster::of(1).await.all_have("tiny");
    for scheme in ["http://", ""] {
        let servers =
            vec![format!("full@{scheme}{address}=1000"), format!("good@http://{}", cluster.server(0).address())];
        let toml = "timeout.connect-s = 0.2\npool.connect-timeout-ms = 60000\npool.check-timeout-ms = 60000";
        let olol = Olol::at(servers, toml).await;
        let began = Instant::now();
        // Nobody is known to have it, so each may be asked.
        let answer = olol.ask(&Request::post("/api/show", json!({"model": "nobodys"}))).await;
        assert_eq!((answer.status, answer.server(), answer.header("x-olol-attempts")), (404, "good", "2"), "{scheme}");
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
