//! What makes the proxy look like Ollama at the edge: framing, methods, hosts, origins, protocols.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use bytes::Bytes;
use harness::olol::{chat, chat_at_once};
use harness::{Cluster, Ending, Gate, Olol, Request, Way, patiently, until};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn a_connection_carries_one_request_after_the_other() {
    let (_cluster, olol) = tiny().await;
    let mut client = olol.connect().await;
    for _ in 0..3 {
        assert_eq!(client.ask(&chat("tiny", "hi")).await.ending, Ending::LastChunk);
        assert_eq!(client.ask(&Request::get("/api/version")).await.ending, Ending::Length);
    }
}

#[tokio::test]
async fn requests_sent_ahead_are_answered_in_their_order() {
    let (_cluster, olol) = tiny().await;
    let mut client = olol.connect().await;
    let requests = [chat("tiny", "hi"), Request::get("/api/tags"), Request::new("HEAD", "/"), Request::get("/")];
    for request in &requests {
        client.send(request).await;
    }
    assert_eq!(client.answer().await.said(), "Hello world");
    assert_eq!(client.answer().await.names(), ["tiny:latest"]);
    assert_eq!(client.answer().await.ending, Ending::NoBody);
    assert_eq!(client.answer().await.text(), "Ollama is running");
}

#[tokio::test]
async fn who_asks_for_the_end_of_the_connection_gets_it() {
    let (_cluster, olol) = tiny().await;
    let mut client = olol.connect().await;
    let answer = client.ask(&chat("tiny", "hi").header("Connection", "close")).await;
    assert_eq!((answer.header("connection"), answer.ending), ("close", Ending::LastChunk));
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn to_http_1_0_a_stream_goes_without_chunks_until_the_connection_ends() {
    let (_cluster, olol) = tiny().await;
    let answer = olol.ask(&chat("tiny", "hi").in_http_1_0()).await;
    assert_eq!(
        (answer.line.as_str(), answer.ending, answer.said().as_str()),
        ("HTTP/1.0 200 OK", Ending::Close, "Hello world")
    );
    assert_eq!(answer.header("transfer-encoding"), "");
}

#[tokio::test]
async fn http_1_0_needs_no_host() {
    let (_cluster, olol) = tiny().await;
    let mut client = olol.connect().await;
    client.write(b"GET /api/version HTTP/1.0\r\n\r\n").await;
    assert_eq!(client.answer().await.text(), r#"{"version":"0.33.0"}"#);
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn who_waits_to_be_told_to_go_on_is_told() {
    let (cluster, olol) = tiny().await;
    let mut client = olol.connect().await;
    let body = json!({"model": "tiny", "prompt": "hi", "stream": false}).to_string();
    let head = format!(
        "POST /api/generate HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    client.write(head.as_bytes()).await;
    assert!(client.head().await.line.starts_with("HTTP/1.1 100"));
    client.write(body.as_bytes()).await;
    assert_eq!(client.answer().await.said(), "Hello world");
    assert_eq!(cluster.server(0).seen("/api/generate")[0].headers.get("expect"), None);
}

#[tokio::test]
async fn who_expects_something_else_is_refused() {
    let (_cluster, olol) = tiny().await;
    assert_eq!(olol.ask(&Request::get("/").header("Expect", "miracles")).await.status, 417);
}

#[tokio::test]
async fn a_body_may_come_in_chunks() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        assert_eq!(olol.ask(&chat("tiny", "hi").chunked()).await.said(), "Hello world", "{way:?}");
        assert_eq!(cluster.server(0).seen("/api/chat")[0].json()["model"], "tiny");
    }
}

#[tokio::test]
async fn the_path_may_be_a_whole_address() {
    let (_cluster, olol) = tiny().await;
    assert_eq!(olol.get("http://localhost/api/tags").await.names(), ["tiny:latest"]);
}

#[tokio::test]
async fn head_tells_what_get_would_but_its_body() {
    let (_cluster, olol) = tiny().await;
    let mut client = olol.connect().await;
    for (path, length) in [("/", "17"), ("/api/version", "20")] {
        let answer = client.ask(&Request::new("HEAD", path)).await;
        assert_eq!(
            (answer.status, answer.header("content-length"), answer.ending),
            (200, length, Ending::NoBody),
            "{path}"
        );
    }
    assert_eq!(client.ask(&Request::new("HEAD", "/api/ps")).await.status, 405);
}

#[tokio::test]
async fn a_method_that_a_route_does_not_take_is_told_which_it_does() {
    let (_cluster, olol) = tiny().await;
    for (method, path, allow) in [
        ("POST", "/api/tags", "HEAD, GET"),
        ("GET", "/api/chat", "POST"),
        ("GET", "/api/delete", "DELETE"),
        ("PUT", "/api/blobs/sha256:00", "HEAD, POST"),
        ("BREW", "/api/ps", "GET"),
    ] {
        let answer = olol.ask(&Request::new(method, path)).await;
        assert_eq!((answer.status, answer.header("allow")), (405, allow), "{method} {path}");
        assert_eq!((answer.text().as_str(), answer.header("content-type")), ("405 method not allowed", "text/plain"));
    }
}

#[tokio::test]
async fn a_path_that_is_none_is_not_found_in_the_routers_words() {
    let (cluster, olol) = tiny().await;
    for path in ["/nope", "/API/tags", "/api/health", "/v1/models/a/b", "/api/blobs/"] {
        let answer = olol.get(path).await;
        assert_eq!(
            (answer.status, answer.text().as_str(), answer.header("content-type")),
            (404, "404 page not found", "text/plain"),
            "{path}"
        );
    }
    assert!(cluster.server(0).seen("/nope").is_empty());
}

#[tokio::test]
async fn a_path_that_is_not_clean_is_redirected_without_telling_of_a_backend() {
    let (_cluster, olol) = tiny().await;
    for (method, path, status, location) in [
        ("GET", "/api/tags/", 301, "/api/tags"),
        ("POST", "/api/chat/", 307, "/api/chat"),
        ("GET", "//api/tags", 307, "/api/tags"),
        ("GET", "/api/../api/tags?a=b", 307, "/api/tags?a=b"),
    ] {
        let answer = olol.ask(&Request::new(method, path)).await;
        assert_eq!((answer.status, answer.header("location")), (status, location), "{path}");
    }
}

#[tokio::test]
async fn a_foreign_host_is_refused_on_loopback() {
    let (_cluster, olol) = tiny().await;
    for (host, status) in
        [("localhost:1", 200), ("127.0.0.1", 200), ("box.local", 200), ("example.com", 403), ("8.8.8.8", 403)]
    {
        let answer = olol.ask(&Request::get("/api/version").header("Host", host)).await;
        assert_eq!((answer.status, answer.header("content-type").is_empty()), (status, status == 403), "{host}");
    }
}

#[tokio::test]
async fn a_browser_may_ask_from_the_origins_that_are_allowed() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, r#"proxy.origins = ["https://chat.example"]"#).await;
    for origin in ["http://localhost:3000", "https://chat.example"] {
        let answer = olol.ask(&chat("tiny", "hi").header("Origin", origin)).await;
        assert_eq!(
            (answer.status, answer.header("access-control-allow-origin"), answer.header("vary")),
            (200, origin, "Origin")
        );
    }
    let refused = olol.ask(&chat("tiny", "hi").header("Origin", "https://evil.example")).await;
    assert_eq!((refused.status, refused.text().as_str()), (403, ""));
    assert_eq!(cluster.server(0).work(), 2);
}

#[tokio::test]
async fn a_browser_that_asks_first_is_told_what_it_may() {
    let (_cluster, olol) = tiny().await;
    let answer = olol.ask(&Request::new("OPTIONS", "/api/chat").header("Origin", "http://localhost")).await;
    assert_eq!(
        (answer.status, answer.header("allow"), answer.header("access-control-max-age")),
        (204, "POST", "43200")
    );
    assert!(answer.header("access-control-allow-headers").contains("X-Stainless-Os"));
    assert_eq!(answer.headers.0.iter().filter(|(name, _)| name == "Vary").count(), 3);
}

#[tokio::test]
async fn header_names_have_ollamas_case() {
    let (_cluster, olol) = tiny().await;
    let answer = olol.chat("tiny", "hi").await;
    let names = answer.headers.names();
    for name in ["Content-Type", "Date", "Transfer-Encoding", "X-Olol-Server"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(!names.contains(&"Server") && !names.contains(&"Via"));
}

#[tokio::test]
async fn what_is_not_http_is_refused_and_the_connection_ends() {
    let (_cluster, olol) = tiny().await;
    for (bytes, status) in [
        (&b"nonsense\r\n\r\n"[..], 400),
        (b"GET /api/tags HTTP/1.1\r\n\r\n", 400),
        (b"GET /api/tags HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nbad line\r\n\r\n", 400),
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n", 505),
    ] {
        let mut client = olol.connect().await;
        client.write(bytes).await;
        assert_eq!(client.answer().await.status, status, "{}", String::from_utf8_lossy(bytes));
        assert!(client.is_closed().await);
    }
}

#[tokio::test]
async fn a_head_that_is_too_long_is_refused() {
    let (_cluster, olol) = tiny().await;
    let (mut reader, mut writer) = TcpStream::connect(olol.address()).await.unwrap().into_split();
    let writing = tokio::spawn(async move {
        let head = format!("GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\n\r\n", "x".repeat(2 << 20));
        let _ = tokio::io::AsyncWriteExt::write_all(&mut writer, head.as_bytes()).await;
        writer
    });
    let mut first = [0; 12];
    patiently("a refusal", tokio::io::AsyncReadExt::read_exact(&mut reader, &mut first)).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 431");
    drop(writing);
}

#[tokio::test]
async fn a_client_may_speak_http_2_without_tls() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        let mut client = Http2::open(&olol).await;
        let answer = client.chat().await;
        assert_eq!(
            (answer.status().as_u16(), answer.headers()["x-olol-server"].to_str().unwrap()),
            (200, "0"),
            "{way:?}"
        );
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(String::from_utf8_lossy(&body).lines().count(), 3);
    }
}

#[tokio::test]
async fn a_client_that_resets_its_http_2_stream_ends_the_work() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way);
        cluster.server(0).has_loaded("tiny").stalls_after(["Hel"]);
        let olol = Olol::start(&cluster, "").await;
        let mut client = Http2::open(&olol).await;
        let answer = client.chat().await;
        drop(answer);
        cluster.server(0).saw_cancel().await;
        until("the place is free", || olol.in_flight(0) == 0).await;
    }
}

#[tokio::test]
async fn a_proxy_that_leads_to_itself_says_so() {
    // What is taken for an agent would have to prove that it is one.
    for (way, status, says) in [("http://", 508, "leads back"), ("", 502, "it is a proxy")] {
        let detour = Detour::start().await;
        let olol = Olol::at(vec![format!("0@{way}{}", detour.address)], "").await;
        detour.leads_to(&olol);
        let answer = olol.chat("tiny", "hi").await;
        assert!(answer.status == status && answer.error().contains(says), "{way}: {} {}", answer.status, answer.text());
    }
}

#[tokio::test]
async fn a_proxy_does_not_serve_another_proxy() {
    let (_cluster, inner) = tiny().await;
    let outer = Olol::at(vec![format!("0@http://{}", inner.address())], "").await;
    let answer = outer.chat("tiny", "hi").await;
    assert_eq!((answer.status, answer.header("x-olol-reason")), (508, "loop"));
}

#[tokio::test]
async fn a_stop_lets_running_answers_finish() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let gate = Gate::closed();
        cluster.server(0).is_paced_by(&gate);
        let olol = Olol::start(&cluster, "").await;
        let mut stream = olol.begin(&chat("tiny", "hi")).await;
        stream.head().await;
        let stopping = tokio::spawn(olol.stop());
        gate.open();
        let (lines, ending) = stream.rest().await;
        assert_eq!((lines.len(), ending, stopping.await.unwrap()), (3, Ending::LastChunk, true), "{way:?}");
    }
}

#[tokio::test]
async fn metrics_count_what_was_asked() {
    let (_cluster, olol) = tiny().await;
    olol.chat("tiny", "hi").await;
    let page = olol.get("/metrics").await;
    assert_eq!(page.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    assert!(
        page.text().lines().any(|line| line.starts_with("olol_requests") && line.contains("/api/chat")),
        "{}",
        page.text()
    );
}

#[tokio::test]
async fn tokens_are_counted_of_answers_in_one_piece_too() {
    for (way, model) in [(Way::Http, "counted-http"), (Way::Agents, "counted-agent")] {
        let cluster = Cluster::of(1).await.over(way).all_have(model);
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.ask(&chat_at_once(model, "hi")).await;
        let made = answer.json()["eval_count"].as_u64().expect("a count");
        let wanted =
            format!("olol_generation_tokens_total{{model=\"{model}:latest\",server=\"0\",key=\"none\"}} {made}");
        let page = olol.get("/metrics").await.text();
        assert!(made > 0 && page.lines().any(|line| line == wanted), "no {wanted} in {page}");
    }
}

#[tokio::test]
async fn readiness_is_having_a_server_that_is_up() {
    let cluster = Cluster::of(1).await;
    cluster.server(0).is_silent();
    let olol = Olol::launch(&cluster, "").await;
    assert_eq!(olol.get("/readyz").await.status, 503);
    let (_cluster, olol) = tiny().await;
    assert_eq!((olol.get("/readyz").await.status, olol.get("/healthz").await.status), (200, 200));
}

/// A proxy in front of one server with one model.
async fn tiny() -> (Cluster, Olol) {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    (cluster, olol)
}

/// A client that speaks HTTP/2 from its first byte on.
struct Http2(hyper::client::conn::http2::SendRequest<Full<Bytes>>);

impl Http2 {
    async fn open(olol: &Olol) -> Self {
        let io = TokioIo::new(TcpStream::connect(olol.address()).await.unwrap());
        let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    async fn chat(&mut self) -> hyper::Response<hyper::body::Incoming> {
        let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).to_string();
        let request = hyper::Request::post("http://localhost/api/chat").body(Full::from(body)).unwrap();
        patiently("an answer", self.0.send_request(request)).await.unwrap()
    }
}

/// An address that passes bytes on to another, which is known later: so that a proxy can be its own server.
struct Detour {
    address: std::net::SocketAddr,
    target: tokio::sync::watch::Sender<Option<std::net::SocketAddr>>,
}

impl Detour {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = tokio::sync::watch::Sender::new(None);
        let mut known = target.subscribe();
        tokio::spawn(async move {
            let to = known.wait_for(Option::is_some).await.unwrap().unwrap();
            while let Ok((mut from, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut onward = TcpStream::connect(to).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut from, &mut onward).await;
                });
            }
        });
        Self { address, target }
    }

    fn leads_to(&self, olol: &Olol) {
        self.target.send_replace(Some(olol.address()));
    }
}
