//! Those who mean harm: at the ports of proxy and agent, as an Ollama, as an agent that has the token, and as a name server.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;
#[path = "hostile/liar.rs"]
mod liar;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use harness::cluster::agent;
use harness::olol::chat;
use harness::{Cluster, Olol, Request, Way, patiently, until};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use olol::ollama::Endpoint;
use olol_middleware::cluster::State;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Every method of every service, as the path of its calls.
fn methods() -> Vec<String> {
    let mut methods = Vec::new();
    for text in [include_str!("../proto/olol/v1/server.proto"), include_str!("../proto/olol/v1/membership.proto")] {
        let mut service = "";
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("service ") {
                service = name.trim_end_matches(" {");
            } else if let Some(rest) = line.strip_prefix("rpc ") {
                methods.push(format!("/olol.v1.{service}/{}", rest.split_once('(').unwrap().0));
            }
        }
    }
    methods
}

/// A connection of HTTP/2 that shows nothing.
async fn stranger(address: SocketAddr) -> (http2::SendRequest<Full<Bytes>>, JoinSet<()>) {
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move { drop(connection.await) });
    (sender, task)
}

/// The status of a gRPC call with this message, as its answer or its end tells it.
async fn call(sender: &mut http2::SendRequest<Full<Bytes>>, path: &str, message: Bytes) -> String {
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(&message);
    let request = http::Request::post(format!("http://olol{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::from(framed))
        .unwrap();
    let answer = patiently(path, sender.send_request(request)).await.unwrap();
    let (head, body) = answer.into_parts();
    let body = patiently(path, body.collect()).await.unwrap();
    let status = head.headers.get("grpc-status").or(body.trailers().and_then(|trailers| trailers.get("grpc-status")));
    status.unwrap().to_str().unwrap().to_owned()
}

const UNIMPLEMENTED: &str = "12";
const RESOURCE_EXHAUSTED: &str = "8";
const UNAUTHENTICATED: &str = "16";

#[tokio::test]
async fn an_agent_answers_no_method_to_a_stranger() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = agent(Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap()).await;
    let (mut sender, _task) = stranger(agent.address()).await;
    let methods = methods();
    assert!(methods.len() >= 18 && methods.iter().any(|path| path.ends_with("/CopyModel")), "{methods:?}");
    for path in methods.iter().filter(|path| !path.ends_with("Membership/Hello")) {
        assert_eq!(call(&mut sender, path, Bytes::new()).await, UNAUTHENTICATED, "{path}");
    }
    for path in [
        "/olol.v1.Server/Other",
        "/olol.v1.Other/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/",
    ] {
        assert_eq!(call(&mut sender, path, Bytes::new()).await, UNAUTHENTICATED, "{path}");
    }
    assert_eq!(cluster.server(0).work(), 0);
}

#[tokio::test]
async fn a_proxy_with_keys_answers_no_method_to_a_stranger() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "[auth]\nanonymous = \"deny\"\n").await;
    let (mut sender, _task) = stranger(olol.address()).await;
    for path in methods() {
        let status = call(&mut sender, &path, message_for(&path)).await;
        // What only agents answer, nobody is answered here.
        let is_agents = ["Describe", "Watch", "ReadModel", "ReadBlob", "CopyModel", "Hello", "Prove"];
        let wanted = if is_agents.iter().any(|name| path.ends_with(name)) {
            &[UNIMPLEMENTED][..]
        } else if message_for(&path).is_empty() && !path.ends_with("ListModels") {
            &[UNIMPLEMENTED, UNAUTHENTICATED][..]
        } else {
            &[UNAUTHENTICATED][..]
        };
        assert!(wanted.contains(&status.as_str()), "{path}: {status}");
    }
    assert_eq!(cluster.server(0).work(), 0);
}

/// A message that is good enough for a method to come to the question who asks.
fn message_for(path: &str) -> Bytes {
    // Field 1 is the model or the session almost everywhere, and the text "tiny" fits both.
    let text = |field: u8, text: &[u8]| [&[field << 3 | 2, u8::try_from(text.len()).unwrap()], text].concat();
    let message = text(1, b"tiny");
    let bytes = match path.rsplit_once('/').unwrap().1 {
        "Relay" => {
            let head = [text(1, b"GET"), text(2, b"/api/tags")].concat();
            // The head, and that nothing follows.
            [text(1, &head), vec![3 << 3, 1]].concat()
        }
        // A message of the user.
        "ChatMessage" => [message, text(2, &[text(1, b"user"), text(2, b"hi")].concat())].concat(),
        "CreateSession" => [message, text(2, b"tiny")].concat(),
        "Generate" | "Chat" | "Embed" | "ShowModel" | "PullModel" | "EndSession" | "GetSession" => message,
        _ => Vec::new(),
    };
    Bytes::from(bytes)
}

#[tokio::test]
async fn a_client_cannot_take_off_what_is_put_on_its_calls() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        let request = chat("tiny", "hi").header("Connection", "x-olol-hop, content-length, host, content-type");
        assert_eq!(olol.ask(&request.header("X-Olol-Hop", "mine")).await.status, 200);
        let seen = format!("{:?}", cluster.server(0).seen("/api/chat"));
        assert!(seen.to_lowercase().contains("x-olol-hop") && !seen.contains("mine"), "{seen}");
    }
}

/// Ends of streams of HTTP/2 by hand, so that messages stay unfinished.
struct Raw(TcpStream);

impl Raw {
    async fn open(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut raw = Self(stream);
        raw.send(4, 0, 0, b"").await;
        raw
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()[..]].concat();
        self.0.write_all(&[&head[..], payload].concat()).await.unwrap();
    }

    /// Kind, stream and payload of the next frame.
    async fn read(&mut self) -> (u8, u32, Vec<u8>) {
        let mut head = [0; 9];
        patiently("a frame", self.0.read_exact(&mut head)).await.unwrap();
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        patiently("a frame", self.0.read_exact(&mut payload)).await.unwrap();
        (head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload)
    }
}

#[tokio::test]
async fn one_connection_of_a_stranger_carries_so_much_and_no_more() {
    let cluster = Cluster::of(1).await;
    let olol = Olol::start(&cluster, "").await;
    let mut raw = Raw::open(olol.address()).await;
    let (mut streams, mut unread) = (0, 65_535);
    // Its settings, and more room for the connection.
    while streams == 0 || unread == 65_535 {
        let (kind, stream, payload) = raw.read().await;
        if kind == 4 {
            let settings =
                payload.chunks(6).map(|pair| (pair[1], u32::from_be_bytes([pair[2], pair[3], pair[4], pair[5]])));
            streams = settings.filter(|(id, _)| *id == 3).map(|(_, value)| value).sum::<u32>().max(streams);
        } else if kind == 8 && stream == 0 {
            unread += u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]);
        }
    }
    assert!((1..=4096).contains(&streams) && unread <= 64 << 20, "{streams} streams, {unread} bytes");
}

#[tokio::test]
async fn messages_that_nobody_finishes_take_no_more_memory_than_there_is_for_bodies() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "[limits]\nbody-memory = 8388608\n").await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", olol.address())).unwrap();
    let channel = patiently("a connection", endpoint.connect()).await.unwrap();
    // Each says that it sends four megabytes, and sends all but the end of them.
    let unfinished = |channel: tonic::transport::Channel| async move {
        let mut begun = vec![0];
        begun.extend_from_slice(&(4_u32 << 20).to_be_bytes());
        begun.extend_from_slice(&vec![b'a'; 3 << 20]);
        let pieces = futures_util::stream::iter([Ok::<_, tonic::Status>(http_body::Frame::data(Bytes::from(begun)))]);
        let pieces = futures_util::StreamExt::chain(pieces, futures_util::stream::pending());
        let request = http::Request::post("http://olol/olol.v1.Server/Chat")
            .header("content-type", "application/grpc")
            .body(tonic::body::Body::new(http_body_util::StreamBody::new(pieces)))
            .unwrap();
        let mut channel = channel;
        std::future::poll_fn(|cx| tower::Service::poll_ready(&mut channel, cx)).await.unwrap();
        tower::Service::call(&mut channel, request).await.unwrap().headers()["grpc-status"].clone()
    };
    let mut calls = JoinSet::new();
    for _ in 0..4 {
        calls.spawn(unfinished(channel.clone()));
    }
    for _ in 0..2 {
        let status = patiently("a refusal", calls.join_next()).await.unwrap().unwrap();
        assert_eq!(status, RESOURCE_EXHAUSTED);
    }
    assert!(calls.try_join_next().is_none(), "those that fit wait for the rest");
    calls.abort_all();
    // Then there is room again, for messages and for bodies.
    let mut client = harness::grpc::client(olol.address()).await;
    let long = olol_proto::v1::ChatRequest {
        model: "tiny".to_owned(),
        messages: vec![olol_proto::v1::Message {
            role: "user".to_owned(),
            content: "a".repeat(3 << 20),
            ..Default::default()
        }],
        ..Default::default()
    };
    let finishing = async {
        while client.chat(long.clone()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    patiently("there is room again", finishing).await;
}

#[tokio::test]
async fn only_so_many_long_heads_are_under_way_at_a_time() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    // One has been answered before, the others begin so.
    let mut asked = olol.connect().await;
    assert_eq!(asked.ask(&Request::get("/api/version")).await.status, 200);
    let long = [&b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nA: "[..], &vec![b'a'; 200 << 10]].concat();
    let mut under_way = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(olol.address()).await.unwrap();
        stream.write_all(&long).await.unwrap();
        under_way.push(stream);
    }
    let refused = async {
        loop {
            let mut stream = TcpStream::connect(olol.address()).await.unwrap();
            let _ = stream.write_all(&long).await;
            let mut answer = Vec::new();
            let reading = stream.read_to_end(&mut answer);
            // It has one of the places if the others have not come so far yet.
            if tokio::time::timeout(Duration::from_millis(200), reading).await.is_ok() {
                return answer;
            }
        }
    };
    let answer = patiently("one more is refused", refused).await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", answer.escape_ascii());
    // Many short ones are no long one.
    for _ in 0..100 {
        assert_eq!(asked.ask(&Request::get("/").header("A", &"a".repeat(1000))).await.status, 200);
    }
    asked.write_until_stuck(&long).await;
    assert!(asked.is_closed().await);
    assert_eq!(olol.chat("tiny", "hi").await.status, 200, "others do not notice");
    under_way.clear();
    let whole = [&long[..], b"\r\n\r\n"].concat();
    let taken = async {
        loop {
            let mut stream = TcpStream::connect(olol.address()).await.unwrap();
            let _ = stream.write_all(&whole).await;
            let mut answer = [0; 12];
            if stream.read_exact(&mut answer).await.is_ok() && answer == *b"HTTP/1.1 200" {
                return;
            }
        }
    };
    patiently("a long head is taken again", taken).await;
}

#[tokio::test]
async fn a_stranger_gets_little_room_at_an_agent() {
    let cluster = Cluster::of(1).await.over(Way::Agents).all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let agent = olol.agents()[0].address();
    let mut long = TcpStream::connect(agent).await.unwrap();
    let _ = long.write_all(&[&b"GET / HTTP/1.1\r\nA: "[..], &vec![b'a'; 20 << 10]].concat()).await;
    let mut answer = [0; 12];
    patiently("a refusal", long.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 431");
    // One who begins many proofs, and ends none.
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{agent}")).unwrap();
    let channel = patiently("a connection", endpoint.connect()).await.unwrap();
    let mut proofs = JoinSet::new();
    for _ in 0..10 {
        let mut channel = channel.clone();
        proofs.spawn(async move {
            let request = http::Request::post("http://olol/olol.v1.Membership/Hello")
                .header("content-type", "application/grpc")
                .body(tonic::body::Body::new(http_body_util::StreamBody::new(futures_util::stream::pending::<
                    Result<http_body::Frame<Bytes>, tonic::Status>,
                >())))
                .unwrap();
            std::future::poll_fn(|cx| tower::Service::poll_ready(&mut channel, cx)).await.unwrap();
            tower::Service::call(&mut channel, request).await.unwrap().headers()["grpc-status"].clone()
        });
    }
    for _ in 0..6 {
        assert_eq!(patiently("a refusal", proofs.join_next()).await.unwrap().unwrap(), RESOURCE_EXHAUSTED);
    }
    assert!(proofs.try_join_next().is_none());
    // One who opens ever more connections: from some number on the oldest of them makes room for the next.
    let mut open = Vec::new();
    let is_full = async {
        loop {
            open.push(TcpStream::connect(agent).await.unwrap());
            let count = open.len();
            if count > 200 && tokio::time::timeout(Duration::from_millis(1), open[0].read(&mut [0])).await.is_ok() {
                return count;
            }
        }
    };
    let count = patiently("there is no more room", is_full).await;
    assert!(count <= 257 + 16, "{count}");
    assert_eq!(olol.chat("tiny", "hi").await.status, 200, "who is known does not notice");
}

/// An address at which nobody should ever come.
struct Trap {
    address: SocketAddr,
    caught: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Trap {
    async fn set() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let caught = Arc::<AtomicUsize>::default();
        let count = caught.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            while listener.accept().await.is_ok() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { address, caught, _task: task }
    }
}

#[tokio::test]
async fn no_request_leads_us_to_an_address_of_its_own() {
    for way in Way::BOTH {
        let trap = Trap::set().await;
        let to = trap.address;
        let cluster = Cluster::of(2).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        let url = format!("http://{to}/x.png");
        let picture = json!({"model": "tiny", "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hi"}]}]});
        let name = format!("{to}/library/tiny:latest");
        let hidden = format!("{to}/olol-copy-0123/tiny:latest");
        let requests = [
            Request::get(&format!("http://{to}/api/tags")),
            Request::new("CONNECT", &to.to_string()),
            Request::get("/api/tags").header("Forwarded", &format!("host={to};for={to}")),
            Request::get("/api/tags")
                .header("X-Forwarded-Host", &to.to_string())
                .header("X-Forwarded-For", &to.to_string()),
            Request::get("/api/tags").header("Connection", "Upgrade").header("Upgrade", "h2c"),
            Request::post("/api/pull", json!({"model": name, "insecure": true, "stream": false})),
            Request::post("/api/pull", json!({"model": format!("http://{name}"), "stream": false})),
            Request::post("/api/pull", json!({"model": "tiny", "stream": false}))
                .header("X-Olol-Servers", &to.to_string()),
            Request::post("/api/push", json!({"model": name, "stream": false})),
            Request::post("/api/copy", json!({"source": "tiny", "destination": name})),
            Request::post("/api/copy", json!({"source": "tiny", "destination": hidden})),
            Request::post("/api/show", json!({"model": name})),
            Request::post("/api/create", json!({"model": "new", "from": name, "stream": false})),
            Request::post("/api/create", json!({"model": "new", "remote_host": url, "from": "tiny", "stream": false})),
            Request::post("/api/generate", json!({"model": "tiny", "prompt": "hi", "images": [url], "stream": false})),
            Request::post("/v1/chat/completions", &picture),
            Request::post(
                "/v1/responses",
                json!({"model": "tiny", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}),
            ),
            Request::post(
                "/v1/messages",
                json!({"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}]}),
            ),
            Request::post("/olol/join", "")
                .header("olol-name", &to.to_string())
                .header("olol-instance", &to.to_string()),
            Request::post("/olol/explain", json!({"model": name, "messages": []})),
            Request::new("PUT", &format!("/api/status/models/{name}"))
                .with_body(json!({"replicas": 1, "servers": [to.to_string()]})),
        ];
        for request in &requests {
            let mut connection = olol.connect().await;
            let _ = connection.try_ask(request).await;
        }
        let mut client = harness::grpc::client(olol.address()).await;
        let order = olol_proto::v1::CopyOrder {
            model: "tiny".to_owned(),
            digest: "a".repeat(64),
            sources: vec![olol_proto::v1::CopySource { address: to.to_string(), model: "tiny".to_owned() }],
            ..Default::default()
        };
        let order = olol_proto::v1::CopyModelRequest { order: Some(order), piece: None };
        let refused = client.copy_model(futures_util::stream::iter([order])).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unimplemented);
        let head = olol_proto::v1::RelayHead { method: "GET".to_owned(), path: url.clone(), ..Default::default() };
        let relay = olol_proto::v1::RelayRequest { head: Some(head), last: true, ..Default::default() };
        let _ = client.relay(futures_util::stream::iter([relay])).await;
        assert_eq!(trap.caught.load(Ordering::SeqCst), 0);
        assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    }
}

#[tokio::test]
async fn no_name_writes_into_the_head_of_an_answer_or_a_path() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    for name in [
        "tiny\r\nX-Evil: 1",
        "tiny\nX-Evil: 1",
        "tiny\u{0}X-Evil: 1",
        "\u{1b}]0;x\u{7}",
        "../../../etc/passwd",
        "tiny:../../x",
    ] {
        for path in ["/api/chat", "/api/show", "/api/delete", "/v1/chat/completions", "/api/pull"] {
            let mut connection = olol.connect().await;
            let method = if path == "/api/delete" { "DELETE" } else { "POST" };
            let body = json!({"model": name, "messages": [], "stream": false});
            connection.send(&Request::new(method, path).with_body(body)).await;
            let head = connection.head().await;
            let text = format!("{head:?}");
            assert!(
                !text.to_lowercase().contains("x-evil: ") && !text.to_lowercase().contains("(\"x-evil\""),
                "{text}"
            );
        }
    }
    for digest in [
        "sha256:../../../etc/passwd",
        "sha256:..%2f..%2fetc%2fpasswd",
        "sha256-",
        "../x",
        "sha256:%00",
        &format!("sha256:{}%2f..", "a".repeat(64)),
    ] {
        let answer = olol.ask(&Request::post(&format!("/api/blobs/{digest}"), "x")).await;
        assert!([307, 400, 404].contains(&answer.status), "{digest}: {}", answer.status);
    }
    assert!(olol.spooled().is_empty());
}

/// What answers as an Ollama to whoever looks at it, with a list of models of its own.
async fn rogue(tags: String) -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tags = Arc::new(tags);
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let tags = tags.clone();
            connections.spawn(async move {
                let mut head = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    head.push(byte);
                    if !head.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let text = String::from_utf8_lossy(&std::mem::take(&mut head)).into_owned();
                    let body = match text.split(' ').nth(1) {
                        Some("/api/tags") => tags.as_str(),
                        Some("/api/version") => r#"{"version":"0.13.0"}"#,
                        Some("/api/ps") => r#"{"models":[]}"#,
                        Some("/v1/models") => r#"{"object":"list","data":[]}"#,
                        // A question with a body: that ends the connection.
                        _ => return,
                    };
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, task)
}

#[tokio::test]
async fn a_server_that_lists_no_end_of_models_is_believed_so_far() {
    let entries = "{},".repeat(300_000);
    let (address, _task) = rogue(format!(r#"{{"models":[{entries}{{}}]}}"#)).await;
    let toml = "[pool]\ncheck-timeout-ms = 20000\n";
    let olol = Olol::at(vec![format!("rogue@http://{address}")], toml).await;
    until("it is up", || olol.state_of("rogue") == Some(State::Up)).await;
    assert_eq!(olol.listed(0).len(), 65_536);
}

#[tokio::test]
async fn a_server_whose_names_are_none_does_no_harm() {
    let names = ["\u{1b}[2J", "a\nb", "../../x", "tiny:latest", "", "\u{202e}x"];
    let entries: Vec<_> = names
        .iter()
        .map(|name| json!({"name": name, "model": name, "digest": "../../x", "capabilities": ["completion"]}))
        .collect();
    let (address, _task) = rogue(json!({"models": entries}).to_string()).await;
    let olol = Olol::at(vec![format!("rogue@http://{address}")], "").await;
    until("it is up", || olol.state_of("rogue") == Some(State::Up)).await;
    for path in ["/api/tags", "/v1/models", "/api/status?detail=models", "/api/status?detail=servers", "/metrics"] {
        let answer = olol.get(path).await;
        let has_control = answer.text().chars().any(|c| c.is_control() && c != '\n');
        assert!(answer.status == 200 && !has_control, "{path}: {}", answer.text());
    }
    assert_eq!(olol.get("/metrics").await.text().lines().filter(|line| *line == "b").count(), 0);
}

#[tokio::test]
async fn an_agent_that_lies_costs_no_more_than_its_lies() {
    let (address, _task) = liar::start().await;
    let cluster = Cluster::of(1).await.all_have("tiny");
    let servers = vec![format!("liar@{address}"), format!("1@http://{}", cluster.server(0).address())];
    let olol = Olol::at(servers, "").await;
    until("the liar is up", || olol.state_of("liar") == Some(State::Up)).await;
    until("the other is up", || olol.state_of("1") == Some(State::Up)).await;
    for path in ["/api/status", "/api/status?detail=servers", "/api/status?detail=models", "/api/tags", "/metrics"] {
        assert_eq!(olol.get(path).await.status, 200, "{path}");
    }
    let page = olol.get("/api/status?detail=servers").await.json();
    let liar = page["servers"].as_array().unwrap().iter().find(|server| server["server"] == "liar").unwrap();
    assert!(liar.to_string().len() < 4 << 20, "{}", liar.to_string().len());
    assert_eq!(olol.chat("tiny", "hi").await.server(), "1");
}

#[tokio::test]
async fn a_page_of_ours_reads_no_long_body() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let mut pin = Request::new("PUT", "/api/status/models/tiny");
    assert_eq!(olol.ask(&pin.clone().with_body(json!({"replicas": 1}))).await.status, 200);
    pin = pin.with_body(json!({"replicas": 1, "servers": vec!["a"; 100_000]}));
    assert_eq!(olol.ask(&pin).await.status, 413);
}
