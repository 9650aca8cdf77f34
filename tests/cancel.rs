//! A client that leaves ends the work at the server, in every phase; only a load outlives it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::SocketAddr;

use harness::olol::{chat, chat_at_once, v1_chat};
use harness::{Cluster, Connection, Ending, Gate, Olol, Request, Step, Way, patiently, until};
use tokio::net::{TcpSocket, TcpStream};

#[tokio::test]
async fn before_the_first_byte_of_a_stream() {
    for way in Way::BOTH {
        let (cluster, olol) = loaded(way).await;
        cluster.server(0).stalls_before_head();
        let client = olol.begin(&chat("tiny", "hi")).await;
        cluster.server(0).asked(1).await;
        leaves(client, &cluster, &olol).await;
    }
}

#[tokio::test]
async fn in_mid_stream() {
    for way in Way::BOTH {
        let (cluster, olol) = loaded(way).await;
        cluster.server(0).stalls_after(["Hel"]);
        let mut client = olol.begin(&chat("tiny", "hi")).await;
        client.head().await;
        client.line().await;
        leaves(client, &cluster, &olol).await;
    }
}

#[tokio::test]
async fn who_closes_only_the_sending_side_has_left_too() {
    for way in Way::BOTH {
        let (cluster, olol) = loaded(way).await;
        cluster.server(0).stalls_after(["Hel"]);
        let mut client = olol.begin(&chat("tiny", "hi")).await;
        client.head().await;
        client.half_close().await;
        cluster.server(0).saw_cancel().await;
        assert!(client.rest().await.1 != Ending::LastChunk, "{way:?}: half an answer is not called whole");
    }
}

#[tokio::test]
async fn in_the_middle_of_an_event_stream() {
    for way in Way::BOTH {
        let (cluster, olol) = loaded(way).await;
        cluster.server(0).stalls_after(["Hel"]);
        let mut client = olol.begin(&v1_chat("tiny", "hi")).await;
        client.head().await;
        client.piece().await;
        leaves(client, &cluster, &olol).await;
    }
}

#[tokio::test]
async fn while_a_stream_comes_faster_than_it_is_read() {
    for way in Way::BOTH {
        let (cluster, olol) = loaded(way).await;
        cluster.server(0).floods();
        let mut client = olol.begin(&chat("tiny", "hi")).await;
        client.head().await;
        leaves(client, &cluster, &olol).await;
    }
}

#[tokio::test]
async fn while_an_answer_in_one_piece_is_made() {
    for way in Way::BOTH {
        let (cluster, olol) = loaded(way).await;
        cluster.server(0).stalls_before_head();
        let client = olol.begin(&chat_at_once("tiny", "hi")).await;
        cluster.server(0).asked(1).await;
        leaves(client, &cluster, &olol).await;
    }
}

#[tokio::test]
async fn in_the_middle_of_an_upload() {
    for way in Way::BOTH {
        let (cluster, olol) = loaded(way).await;
        let mut client = olol.connect().await;
        client
            .write(b"POST /api/blobs/sha256:00 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
            .await;
        until("the upload reaches the server", || cluster.server(0).running() == 1).await;
        leaves(client, &cluster, &olol).await;
        assert!(cluster.server(0).seen("/api/blobs/sha256:00").is_empty(), "half a blob is no blob");
    }
}

#[tokio::test]
async fn in_the_middle_of_a_pull_at_several_servers() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way);
        for server in cluster.servers() {
            server.on("POST", "/api/pull", begun_and_stalled());
        }
        let olol = Olol::start(&cluster, "").await;
        let mut client = olol.begin(&Request::post("/api/pull", r#"{"model":"tiny"}"#)).await;
        client.head().await;
        client.line().await;
        drop(client);
        // Agents copy from the one that pulls.
        let asked = |server: &&harness::Server| way == Way::Http || !server.seen("/api/pull").is_empty();
        assert!(cluster.servers().iter().any(|server| asked(&server)));
        for server in cluster.servers().iter().filter(asked) {
            server.saw_cancel().await;
        }
    }
}

#[tokio::test]
async fn while_the_proxy_still_connects() {
    let (address, _full) = nobody_home().await;
    let toml = "pool.connect-timeout-ms = 600000\npool.check-timeout-ms = 600000";
    let olol = Olol::at(vec![format!("0@http://{address}")], toml).await;
    let client = olol.begin(&chat("tiny", "hi")).await;
    until("the call waits", || olol.in_flight(0) == 1).await;
    drop(client);
    until("the place is free", || olol.in_flight(0) == 0).await;
}

#[tokio::test]
async fn a_load_outlives_the_client_that_caused_it() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let gate = Gate::closed();
        cluster.server(0).loads_until(&gate);
        let olol = Olol::start(&cluster, "").await;
        let client = olol.begin(&chat("tiny", "hi")).await;
        cluster.server(0).asked(1).await;
        drop(client);
        until("the place is free", || olol.in_flight(0) == 0).await;
        gate.open();
        cluster.server(0).has_in_memory("tiny").await;
    }
}

#[tokio::test]
async fn nothing_is_generated_for_nobody_when_the_load_is_done() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let gate = Gate::closed();
        let loads = [Step::Wait(gate.clone()), Step::Load("tiny".to_owned())];
        cluster.server(0).on("POST", "/api/chat", loads.into_iter().chain(begun_and_stalled()).collect());
        let olol = Olol::start(&cluster, "").await;
        let client = olol.begin(&chat("tiny", "hi")).await;
        cluster.server(0).asked(1).await;
        drop(client);
        until("the place is free", || olol.in_flight(0) == 0).await;
        gate.open();
        cluster.server(0).saw_cancel().await;
        assert_eq!(cluster.server(0).holds().1, ["tiny:latest"]);
    }
}

#[tokio::test]
async fn loads_that_go_on_without_a_client_are_limited() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        cluster.server(0).loads_until(&Gate::closed());
        let olol = Olol::start(&cluster, "pool.load-linger-max = 1").await;
        let clients = [olol.begin(&chat("tiny", "1")).await, olol.begin(&chat("tiny", "2")).await];
        cluster.server(0).asked(2).await;
        drop(clients);
        cluster.server(0).saw_cancel().await;
        assert_eq!(cluster.server(0).running(), 1, "{way:?}");
    }
}

/// One server with a model in memory: no load is in the way.
async fn loaded(way: Way) -> (Cluster, Olol) {
    let cluster = Cluster::of(1).await.over(way);
    cluster.server(0).has_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    (cluster, olol)
}

/// The client leaves; the server sees it, and the proxy's books are clear.
async fn leaves(client: Connection, cluster: &Cluster, olol: &Olol) {
    drop(client);
    cluster.server(0).saw_cancel().await;
    until("the place is free", || olol.in_flight(0) == 0).await;
}

/// An answer of one line, and no other.
fn begun_and_stalled() -> Vec<Step> {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n";
    let line = harness::wire::chunk(b"{\"status\":\"pulling manifest\"}\n");
    vec![Step::Write([head.as_bytes(), &line].concat()), Step::Stall]
}

/// An address at which connections are neither taken nor refused, and what keeps it so.
async fn nobody_home() -> (SocketAddr, impl Sized) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    let short = std::time::Duration::from_millis(100);
    while let Ok(stream) = patiently("a full queue", tokio::time::timeout(short, TcpStream::connect(address))).await {
        waiting.push(stream);
    }
    (address, (listener, waiting))
}
