//! Programs that speak gRPC: the typed calls on an agent's port and on the proxy's, and the relay that loses nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::SocketAddr;

use harness::cluster::agent;
use harness::grpc::{Client, client};
use harness::{Cluster, Olol, Request, Server, Way, patiently, until};
use olol::ollama::Endpoint;
use olol_proto::v1::{
    ChatMessageRequest, ChatRequest, CreateSessionRequest, DescribeRequest, EmbedRequest, GenerateRequest, Header,
    ListModelsRequest, Message, PullModelRequest, RelayHead, RelayRequest, RelayResponse, ShowModelRequest,
    WatchRequest,
};
use serde_json::json;
use tonic::{Code, Status, Streaming};

#[tokio::test]
async fn generate_streams_what_the_model_says() {
    for client in &mut Places::start().await.clients().await {
        let request = GenerateRequest {
            model: "tiny".into(),
            prompt: "hi".into(),
            options_json: r#"{"seed":1}"#.into(),
            ..Default::default()
        };
        let messages = all(client.generate(request).await.unwrap().into_inner()).await.unwrap();
        let said: String = messages.iter().map(|message| message.response.as_str()).collect();
        let last = messages.last().unwrap();
        assert_eq!((said.as_str(), last.done, last.done_reason.as_str()), ("Hello world", true, "stop"));
        assert_eq!(
            last.usage.map(|usage| (usage.prompt_eval_count, usage.eval_count, usage.eval_duration_ns)),
            Some((5, 2, 4))
        );
    }
}

#[tokio::test]
async fn chat_streams_what_the_model_says() {
    for client in &mut Places::start().await.clients().await {
        let messages = all(client.chat(chat_request("tiny")).await.unwrap().into_inner()).await.unwrap();
        let said: String = messages
            .iter()
            .filter_map(|message| message.message.as_ref())
            .map(|message| message.content.as_str())
            .collect();
        assert_eq!((said.as_str(), messages.last().unwrap().done), ("Hello world", true));
    }
}

#[tokio::test]
async fn what_is_asked_reaches_the_server_as_json() {
    let places = Places::start().await;
    for client in &mut places.clients().await {
        let mut request = chat_request("tiny");
        request.think = "false".into();
        request.keep_alive = "5".into();
        request.options_json = r#"{"num_ctx":64}"#.into();
        request.messages[0].images = vec![vec![1, 2, 3].into()];
        all(client.chat(request).await.unwrap().into_inner()).await.unwrap();
        let body = places.cluster.server(0).seen("/api/chat").pop().unwrap().json();
        assert_eq!(
            (&body["think"], &body["keep_alive"], &body["options"]["num_ctx"]),
            (&json!(false), &json!(5.0), &json!(64))
        );
        assert_eq!(body["messages"], json!([{"role": "user", "content": "hi", "images": ["AQID"]}]));
    }
}

#[tokio::test]
async fn embed_returns_vectors() {
    for client in &mut Places::start().await.clients().await {
        let request = EmbedRequest { model: "tiny".into(), input: vec!["hi".into()], ..Default::default() };
        let embedded = client.embed(request).await.unwrap().into_inner();
        assert_eq!((embedded.embeddings[0].values.as_slice(), embedded.prompt_eval_count), (&[0.6, 0.8][..], 2));
    }
}

#[tokio::test]
async fn models_are_listed_with_what_is_in_memory() {
    let cluster = Cluster::of(1).await.over(Way::Agents);
    cluster.server(0).has_loaded("tiny").has_like("poet", "tiny").says_at_most(9);
    let olol = Olol::start(&cluster, "").await;
    let places = Places { cluster, olol };
    for client in &mut places.clients().await {
        // What its runner is started with is asked of the Ollama where models look alike, when there is time.
        let listing = async {
            loop {
                let mut listed = client.list_models(ListModelsRequest {}).await.unwrap().into_inner();
                listed.models.retain(|model| model.name == "tiny:latest");
                if !listed.models[0].weights.is_empty() {
                    return listed;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        let listed = patiently("all is known of the model", listing).await;
        let model = &listed.models[0];
        assert_eq!(
            (model.name.as_str(), model.tag.as_str(), model.family.as_str()),
            ("tiny:latest", "latest", "llama")
        );
        assert_eq!((model.size_bytes, model.context_length, model.digest.len()), (1000, 2048, 64));
        assert_eq!((listed.loaded[0].name.as_str(), listed.loaded[0].context_length), ("tiny:latest", 2048));
        assert_eq!(model.architecture, "llama");
        assert!(model.bits_per_weight > 0.0 && model.parameters_json.starts_with('{'), "{model:?}");
    }
}

#[tokio::test]
async fn a_model_is_shown() {
    for client in &mut Places::start().await.clients().await {
        let shown =
            client.show_model(ShowModelRequest { model: "tiny".into(), verbose: false }).await.unwrap().into_inner();
        let details = shown.details.unwrap();
        assert_eq!(
            (details.name.as_str(), details.architecture.as_str(), shown.license.as_str()),
            ("tiny:latest", "llama", "MIT")
        );
        assert_eq!(details.capabilities, ["completion"]);
        assert_eq!((details.tag.as_str(), details.size_bytes, details.digest.len()), ("latest", 1000, 64));
        assert!(details.bits_per_weight > 0.0, "{details:?}");
    }
}

#[tokio::test]
async fn a_session_with_a_model_that_nobody_has_is_not_made() {
    for client in &mut Places::start().await.clients().await {
        for preload in [false, true] {
            let session_id = format!("talk-{preload}");
            let wanted = CreateSessionRequest { session_id, model: "nosuch".into(), preload, ..Default::default() };
            let refused = client.create_session(wanted).await.unwrap_err();
            assert_eq!(refused.code(), Code::NotFound, "{refused:?}");
            assert!(refused.message().contains("nosuch"), "{refused:?}");
        }
    }
}

#[tokio::test]
async fn a_session_that_there_is_not_is_not_active() {
    let places = Places::start().await;
    let [mut agent, _] = places.clients().await;
    let message = Some(Message { role: "user".into(), content: "hi".into(), ..Default::default() });
    for (session_id, is_active) in [("nosuch", false), ("talk", true)] {
        let wanted = CreateSessionRequest { session_id: "talk".into(), model: "tiny".into(), ..Default::default() };
        let turn = ChatMessageRequest { session_id: session_id.into(), message: message.clone(), ..Default::default() };
        if is_active {
            agent.create_session(wanted).await.unwrap();
            all(agent.chat_message(turn).await.unwrap().into_inner()).await.unwrap();
        } else {
            assert_eq!(agent.chat_message(turn).await.unwrap_err().code(), Code::NotFound);
        }
    }
    let mut states = agent.watch(WatchRequest::default()).await.unwrap().into_inner();
    let hearing = async {
        loop {
            let state = states.message().await.unwrap().unwrap();
            if !state.active_sessions.is_empty() {
                return state.active_sessions;
            }
        }
    };
    assert_eq!(patiently("a session is active", hearing).await, ["talk"]);
}

#[tokio::test]
async fn a_model_is_pulled_with_its_progress() {
    let places = Places::start().await;
    for (client, model) in places.clients().await.iter_mut().zip(["one", "two"]) {
        let request = PullModelRequest { model: model.into(), insecure: false };
        let messages = all(client.pull_model(request).await.unwrap().into_inner()).await.unwrap();
        assert!(messages.iter().any(|message| (message.completed, message.total) == (60, 100)));
        assert_eq!(messages.last().unwrap().status, "success");
        assert!(places.cluster.server(0).still_has(model));
    }
}

#[tokio::test]
async fn a_refusal_has_ollamas_words_and_the_code_for_its_status() {
    for client in &mut Places::start().await.clients().await {
        let refused = client.chat(chat_request("nosuch")).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::NotFound, "model 'nosuch' not found"));
        let refused = client.show_model(ShowModelRequest { model: "nosuch".into(), verbose: false }).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::NotFound, "model 'nosuch:latest' not found"));
    }
}

#[tokio::test]
async fn a_field_that_is_no_json_is_named() {
    for client in &mut Places::start().await.clients().await {
        let refused = client.chat(ChatRequest { options_json: "{".into(), ..chat_request("tiny") }).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with("options_json is no JSON"), "{}", refused.message());
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_an_error() {
    let places = Places::start().await;
    places.cluster.server(0).dies_after(["Hel"]);
    for client in &mut places.clients().await {
        let broken = all(client.chat(chat_request("tiny")).await.unwrap().into_inner()).await.unwrap_err();
        assert_eq!(broken.code(), Code::Unavailable, "{broken:?}");
    }
}

#[tokio::test]
async fn a_program_that_leaves_ends_the_work() {
    let places = Places::start().await;
    places.cluster.server(0).stalls_after(["Hel"]);
    for (client, times) in places.clients().await.iter_mut().zip(1..) {
        let mut stream = client.chat(chat_request("tiny")).await.unwrap().into_inner();
        patiently("the first word", stream.message()).await.unwrap().unwrap();
        drop(stream);
        places.cluster.server(0).saw_cancels(times).await;
    }
}

#[tokio::test]
async fn an_agent_describes_itself() {
    let places = Places::start().await;
    let [mut agent, mut proxy] = places.clients().await;
    let described = agent.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (described.name.as_str(), described.engine.as_str(), described.host.as_str()),
        ("agent", "ollama", "127.0.0.1")
    );
    assert!(described.cpu_count > 0 && described.started_at_ms > 0 && described.instance_id.len() == 16);
    assert_eq!(proxy.describe(DescribeRequest {}).await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn an_agent_tells_its_state_and_every_change_of_it() {
    let places = Places::start().await;
    let [mut agent, _] = places.clients().await;
    let mut states =
        agent.watch(WatchRequest { interval_ms: 60_000, ..Default::default() }).await.unwrap().into_inner();
    let first = patiently("a state", states.message()).await.unwrap().unwrap();
    assert!(first.online && first.ollama_version == "0.33.0" && first.models[0].name == "tiny:latest");
    places.cluster.server(0).has("more");
    // What the proxy has it do meanwhile is told, too.
    let mut next = patiently("the next state", states.message()).await.unwrap().unwrap();
    while next.models.len() != 2 {
        next = patiently("a state with both models", states.message()).await.unwrap().unwrap();
    }
    assert!(next.generation > first.generation, "{first:?} {next:?}");
    places.cluster.server(0).dies();
    while patiently("a state that tells of it", states.message()).await.unwrap().unwrap().online {}
}

#[tokio::test]
async fn the_relay_loses_nothing() {
    let places = Places::start().await;
    let raw = b"HTTP/1.1 418 Teapot\r\nContent-Type: application/x-ndjson\r\nX-Bytes: \xe9\xff\r\nX-Twice: 1\r\nX-Twice: 2\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunks =
        [harness::wire::chunk(b"\"\xff\"\n"), harness::wire::chunk(b"{\"b\":1}\n"), harness::wire::LAST_CHUNK.to_vec()];
    let steps = std::iter::once(raw.to_vec()).chain(chunks).map(harness::Step::Write).collect();
    places.cluster.server(0).on("POST", "/api/chat", steps);
    for client in &mut places.clients().await {
        let (status, headers, pieces) = relay(client, relayed("/api/chat", br#"{"model":"tiny"}"#)).await.unwrap();
        assert_eq!(status, 418);
        assert_eq!(values(&headers, "x-bytes"), [b"\xe9\xff".to_vec()]);
        assert_eq!(values(&headers, "x-twice"), [b"1".to_vec(), b"2".to_vec()]);
        assert_eq!(pieces, [b"\"\xff\"\n".to_vec(), b"{\"b\":1}\n".to_vec()], "a line a message");
    }
}

#[tokio::test]
async fn a_relayed_body_in_pieces_arrives_whole() {
    let places = Places::start().await;
    for client in &mut places.clients().await {
        let body = json!({"model": "tiny", "prompt": "x".repeat(3000)}).to_string().into_bytes();
        let mut messages: Vec<RelayRequest> =
            body.chunks(1000).map(|piece| RelayRequest { body: piece.to_vec().into(), ..Default::default() }).collect();
        messages[0].head = relayed("/api/generate", b"")[0].head.clone();
        messages.last_mut().unwrap().last = true;
        let (status, ..) = relay(client, messages).await.unwrap();
        assert_eq!((status, places.cluster.server(0).seen("/api/generate").pop().unwrap().body), (200, body));
    }
}

#[tokio::test]
async fn a_relayed_call_that_is_cancelled_ends_the_work() {
    let places = Places::start().await;
    places.cluster.server(0).stalls_before_head();
    for (client, times) in places.clients().await.iter_mut().zip(1..) {
        let call = tokio::spawn({
            let mut client = client.clone();
            async move { relay(&mut client, relayed("/api/chat", &chat_body())).await }
        });
        places.cluster.server(0).asked(times).await;
        call.abort();
        places.cluster.server(0).saw_cancels(times).await;
    }
}

#[tokio::test]
async fn a_relayed_call_has_a_deadline() {
    let places = Places::start().await;
    places.cluster.server(0).stalls_before_head();
    let [mut agent, _] = places.clients().await;
    let mut messages = relayed("/api/chat", &chat_body());
    messages[0].head.as_mut().unwrap().deadline_ms = 50;
    assert_eq!(relay(&mut agent, messages).await.unwrap_err().code(), Code::DeadlineExceeded);
    places.cluster.server(0).saw_cancel().await;
}

#[tokio::test]
async fn a_relay_without_a_head_is_refused() {
    for client in &mut Places::start().await.clients().await {
        let refused = relay(client, vec![RelayRequest { last: true, ..Default::default() }]).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn a_failure_before_the_head_tells_how_far_the_call_had_come() {
    let places = Places::start().await;
    let [mut agent, _] = places.clients().await;
    places.cluster.server(0).dies_before_head();
    let failed = relay(&mut agent, relayed("/api/chat", &chat_body())).await.unwrap_err();
    assert_eq!(
        (failed.code(), failed.metadata().get("olol-phase").unwrap().to_str().unwrap()),
        (Code::Unavailable, "waiting")
    );
    places.cluster.server(0).dies();
    let failed = relay(&mut agent, relayed("/api/chat", &chat_body())).await.unwrap_err();
    assert_eq!(failed.metadata().get("olol-phase").unwrap().to_str().unwrap(), "connecting");
}

#[tokio::test]
async fn with_agents_the_proxy_needs_no_way_to_an_ollama() {
    // The Ollama listens on a Unix socket that only the agent knows: what arrives there came through the agent.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("ollama.sock");
    let hidden = Server::start_at(&socket);
    hidden.has("tiny");
    let agent = agent(Endpoint::Unix(socket)).await;
    let olol = Olol::at(vec![format!("0@{}", agent.address())], "").await;
    olol.is_up().await;
    assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world");
    assert_eq!(olol.get("/api/tags").await.names(), ["tiny:latest"]);
    let deleted = olol.ask(&Request::new("DELETE", "/api/delete").with_body(r#"{"model":"tiny"}"#)).await;
    assert_eq!((deleted.status, hidden.still_has("tiny")), (200, false));
}

#[tokio::test]
async fn an_agent_tells_an_http_client_what_it_is() {
    let places = Places::start().await;
    let answer = harness::Connection::open(places.agent()).await.ask(&Request::get("/api/tags")).await;
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("this is an OLOL agent"), "{}", answer.text());
}

#[tokio::test]
async fn an_agent_whose_ollama_is_gone_is_a_server_that_is_down() {
    let cluster = Cluster::of(2).await.over(Way::Agents).all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    cluster.server(0).dies();
    until("the proxy knows", || !olol.is_server_up(0)).await;
    for _ in 0..4 {
        assert_eq!(olol.chat("tiny", "hi").await.server(), "1");
    }
}

/// A server with a model in memory, an agent beside it, and a proxy before that: two places that speak gRPC.
struct Places {
    cluster: Cluster,
    olol: Olol,
}

impl Places {
    async fn start() -> Self {
        let cluster = Cluster::of(1).await.over(Way::Agents);
        cluster.server(0).has_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        Self { cluster, olol }
    }

    fn agent(&self) -> SocketAddr {
        self.olol.agents()[0].address()
    }

    /// A client of the agent and one of the proxy.
    async fn clients(&self) -> [Client; 2] {
        [client(self.agent()).await, client(self.olol.address()).await]
    }
}

fn chat_request(model: &str) -> ChatRequest {
    let message = Message { role: "user".into(), content: "hi".into(), ..Default::default() };
    ChatRequest { model: model.into(), messages: vec![message], ..Default::default() }
}

fn chat_body() -> Vec<u8> {
    json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).to_string().into_bytes()
}

/// Every message of a stream, or its error.
async fn all<T>(mut stream: Streaming<T>) -> Result<Vec<T>, Status> {
    let mut messages = Vec::new();
    while let Some(message) = patiently("a message", stream.message()).await? {
        messages.push(message);
    }
    Ok(messages)
}

/// A call in one message.
fn relayed(path: &str, body: &[u8]) -> Vec<RelayRequest> {
    let head = RelayHead { method: "POST".into(), path: path.into(), ..Default::default() };
    vec![RelayRequest { head: Some(head), body: body.to_vec().into(), last: true }]
}

/// Relays a call: its status, headers, and the pieces of its body.
async fn relay(client: &mut Client, messages: Vec<RelayRequest>) -> Result<(u32, Vec<Header>, Vec<Vec<u8>>), Status> {
    let stream = patiently("an answer", client.relay(futures_util::stream::iter(messages))).await?.into_inner();
    let messages: Vec<RelayResponse> = all(stream).await?;
    let head = messages[0].head.clone().expect("a head in the first message");
    let pieces = messages.iter().map(|message| message.body.to_vec()).filter(|piece| !piece.is_empty());
    Ok((head.status, head.headers, pieces.collect()))
}

fn values(headers: &[Header], name: &str) -> Vec<Vec<u8>> {
    headers.iter().filter(|header| header.name == name).map(|header| header.value.to_vec()).collect()
}
