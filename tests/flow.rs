//! Streams side by side: who does not read, or does not write, is nobody else's trouble.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::time::Duration;

use harness::olol::chat;
use harness::{Cluster, Connection, Ending, Gate, Olol, Request, Step, Way, answers, wire};

/// Lines of the stream that must not notice anything.
const LINES: usize = 20;

#[tokio::test]
async fn twenty_readers_who_stall_do_not_hold_up_a_stream() {
    for way in Way::BOTH {
        let (cluster, olol, gate) = paced(way).await;
        cluster.server(0).on("POST", "/api/generate", flood());
        let mut stalled = Vec::new();
        for _ in 0..20 {
            let mut reader = olol.begin(&Request::post("/api/generate", r#"{"model":"tiny","prompt":"hi"}"#)).await;
            reader.head().await;
            stalled.push(reader);
        }
        cluster.server(0).is_stuck().await;
        streams_freely(&olol, &gate).await;
    }
}

#[tokio::test]
async fn an_upload_whose_client_stalls_does_not_hold_up_a_stream() {
    for way in Way::BOTH {
        let (_cluster, olol, gate) = paced(way).await;
        let mut upload = begin_upload(&olol).await;
        upload.write(&[0; 1000]).await;
        streams_freely(&olol, &gate).await;
    }
}

#[tokio::test]
async fn an_upload_that_its_server_does_not_read_does_not_hold_up_a_stream() {
    for way in Way::BOTH {
        let (cluster, olol, gate) = paced(way).await;
        cluster.server(0).ignores_uploads();
        let mut upload = begin_upload(&olol).await;
        upload.write_until_stuck(&[0; 8 << 10]).await;
        streams_freely(&olol, &gate).await;
    }
}

#[tokio::test]
async fn a_request_that_is_sent_slowly_does_not_hold_up_a_stream() {
    let (_cluster, olol, gate) = paced(Way::Http).await;
    let mut slow = olol.connect().await;
    slow.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{").await;
    streams_freely(&olol, &gate).await;
}

#[tokio::test]
async fn a_reader_who_comes_back_gets_the_rest() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let line = format!("{{\"response\":\"{}\"}}\n", "x".repeat(50_000));
        let lines = std::iter::repeat_n(line.clone().into_bytes(), 400);
        cluster.server(0).on("POST", "/api/generate", answers::chunked("application/x-ndjson", lines));
        let olol = Olol::start(&cluster, "").await;
        let mut reader = olol.begin(&Request::post("/api/generate", r#"{"model":"tiny","prompt":"hi"}"#)).await;
        reader.head().await;
        cluster.server(0).is_stuck().await;
        let (lines, ending) = reader.rest().await;
        assert_eq!((lines.len(), ending), (400, Ending::LastChunk), "{way:?}");
        assert!(lines.iter().all(|got| *got == line.as_bytes()));
    }
}

#[tokio::test]
async fn a_thousand_streams_at_a_time_are_all_whole() {
    olol::telemetry::raise_open_files();
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have_loaded("tiny");
        let gate = Gate::closed();
        for server in cluster.servers() {
            server.echoes().is_paced_by(&gate);
        }
        // Nobody begins before all have come: to a queue these are runners that are full.
        let olol = Olol::start(&cluster, "stack.order = ['trace', 'metrics', 'model-route', 'retry']").await;
        let mut streams = Vec::new();
        for number in 0..1000 {
            streams.push(olol.begin(&chat("tiny", &format!("stream number {number}"))).await);
        }
        for server in cluster.servers() {
            server.asked(500).await;
        }
        gate.open();
        for (number, stream) in streams.iter_mut().enumerate() {
            let answer = stream.answer().await;
            assert_eq!(
                (answer.said(), answer.ending),
                (format!("stream number {number}"), Ending::LastChunk),
                "{way:?}"
            );
        }
    }
}

#[tokio::test]
async fn answers_do_not_get_mixed_up_when_clients_and_servers_come_and_go() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("tiny");
        for server in cluster.servers() {
            server.echoes();
        }
        cluster.server(2).dies_on_reuse();
        let olol = Olol::start(&cluster, "").await;
        let mut clients = Vec::new();
        for _ in 0..8 {
            clients.push(olol.connect().await);
        }
        for round in 0..20 {
            for (number, client) in clients.iter_mut().enumerate() {
                client.send(&chat("tiny", &format!("client {number} round {round}"))).await;
            }
            // One leaves with its answer unread.
            drop(clients.remove(round % 8));
            clients.insert(round % 8, olol.connect().await);
            for (number, client) in clients.iter_mut().enumerate().filter(|(number, _)| *number != round % 8) {
                let answer = client.answer().await;
                assert_eq!(answer.said(), format!("client {number} round {round}"), "{way:?}: {}", answer.text());
            }
        }
    }
}

#[tokio::test]
async fn a_client_that_sends_no_more_of_its_request_is_given_up() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "limits.body-pause-s = 1").await;
    let mut client = olol.connect().await;
    client.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{").await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.header("x-olol-reason")), (400, "client-body"));
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn bodies_beyond_the_memory_for_them_are_streamed() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "limits.body-memory = 10000").await;
        let prompt = "x".repeat(3_000_000);
        let answer = olol.chat("tiny", &prompt).await;
        assert_eq!((answer.status, answer.said().as_str()), (200, "Hello world"), "{way:?}");
        let seen = cluster.server(0).seen("/api/chat").pop().unwrap();
        assert_eq!(seen.json()["messages"][0]["content"].as_str().map(str::len), Some(prompt.len()));
    }
}

#[tokio::test]
async fn a_client_reads_an_answer_that_comes_before_its_upload_is_through() {
    for way in Way::BOTH {
        for servers in [1, 2] {
            let cluster = Cluster::of(servers).await.over(way);
            cluster.server(0).knows_every_blob();
            let olol = Olol::start(&cluster, "").await;
            let (digest, bytes) = ("sha256:9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0", "aaa");
            let path = format!("/api/blobs/{digest}");
            olol.ask(&Request::post(&path, bytes)).await;
            let again = Request::post(&path, "x".repeat(50 << 20));
            let answer = olol.ask(&again).await;
            assert_eq!((answer.status, answer.ending), (200, Ending::Length), "{way:?}, {servers} servers");
        }
    }
}

/// A server whose chats say a word whenever the gate lets them.
async fn paced(way: Way) -> (Cluster, Olol, Gate) {
    let cluster = Cluster::of(1).await.over(way);
    let gate = Gate::closed();
    cluster.server(0).has_loaded("tiny").says([" word"; LINES]).is_paced_by(&gate);
    let olol = Olol::start(&cluster, "").await;
    (cluster, olol, gate)
}

/// Each line of a stream comes as soon as the server has said it, and so does a list of models.
async fn streams_freely(olol: &Olol, gate: &Gate) {
    let mut stream = olol.begin(&chat("tiny", "hi")).await;
    stream.head().await;
    for _ in 0..LINES {
        gate.let_through(1);
        let line = tokio::time::timeout(Duration::from_secs(2), stream.line()).await;
        assert_eq!(line.expect("the next line at once")["message"]["content"], " word");
    }
    gate.open();
    assert_eq!(stream.rest().await.1, Ending::LastChunk);
    assert_eq!(olol.get("/api/tags").await.status, 200);
}

async fn begin_upload(olol: &Olol) -> Connection {
    let mut upload = olol.connect().await;
    let head = format!(
        "POST /api/blobs/sha256:{} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n",
        "0".repeat(64)
    );
    upload.write(head.as_bytes()).await;
    upload
}

/// A stream without end.
fn flood() -> Vec<Step> {
    let line = format!("{{\"response\":\"{}\"}}\n", "flood ".repeat(10_000));
    let mut steps = answers::chunked("application/x-ndjson", []);
    steps.pop();
    steps.push(Step::Repeat(wire::chunk(line.as_bytes())));
    steps
}
