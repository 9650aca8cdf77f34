//! Conversations whose history is kept here: over gRPC, over HTTP, and what is left of them when something dies.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use harness::grpc::{Client, client};
use harness::olol::{chat, chat_at_once, v1_chat};
use harness::{Answer, Cluster, Connection, Ending, Olol, Process, Request, Way, patiently, until};
use olol_proto::v1::session::Status as Is;
use olol_proto::v1::{
    ChatMessageRequest, CreateSessionRequest, EndSessionRequest, GetSessionRequest, Message, Session,
};
use serde_json::{Value, json};
use tonic::{Code, Status};

const PAGE: &str = "/api/status/sessions";

/// An agent and a proxy in front of it, and a server that says back what it is asked.
async fn start() -> (Cluster, Olol) {
    let cluster = Cluster::of(1).await.over(Way::Agents);
    cluster.server(0).has("tiny").echoes();
    let olol = Olol::start(&cluster, "").await;
    (cluster, olol)
}

async fn clients(olol: &Olol) -> [Client; 2] {
    [client(olol.agents()[0].address()).await, client(olol.address()).await]
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into(), ..Default::default() }
}

fn wanted(id: &str) -> CreateSessionRequest {
    CreateSessionRequest { session_id: id.into(), model: "tiny".into(), ..Default::default() }
}

/// What a session says to a message.
async fn say(client: &mut Client, id: &str, text: &str) -> Result<String, Status> {
    let request = ChatMessageRequest {
        session_id: id.into(),
        message: Some(message("user", text)),
        options_json: r#"{"temperature":0.5}"#.into(),
        ..Default::default()
    };
    let mut stream = client.chat_message(request).await?.into_inner();
    let (mut said, mut is_done) = (String::new(), false);
    while let Some(message) = patiently("a message", stream.message()).await? {
        said += &message.message.unwrap().content;
        is_done = message.done;
    }
    assert!(is_done);
    Ok(said)
}

async fn get(client: &mut Client, id: &str) -> Session {
    client.get_session(GetSessionRequest { session_id: id.into(), last: 0 }).await.unwrap().into_inner()
}

fn said(session: &Session) -> Vec<(String, String)> {
    let one = |entry: &olol_proto::v1::ChatHistory| {
        let message = entry.message.clone().unwrap();
        (message.role, message.content)
    };
    session.messages.iter().map(one).collect()
}

/// The messages that a server got with its last chat, as `role: content`.
fn asked(cluster: &Cluster, server: usize) -> Vec<String> {
    let body = cluster.server(server).seen("/api/chat").pop().expect("a chat").json();
    let line =
        |message: &Value| format!("{}: {}", message["role"].as_str().unwrap(), message["content"].as_str().unwrap());
    body["messages"].as_array().unwrap().iter().map(line).collect()
}

fn make(id: &str) -> Request {
    Request::post(PAGE, json!({"session_id": id, "model_name": "tiny"}))
}

fn page(id: &str) -> String {
    format!("{PAGE}/{id}")
}

/// The texts that a session remembers.
fn texts(page: &Answer) -> Vec<String> {
    let page = page.json();
    let messages = page["messages"].as_array().unwrap_or_else(|| panic!("{page}"));
    messages.iter().map(|message| message["content"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_session_over_grpc_is_asked_with_its_history() {
    let (cluster, olol) = start().await;
    for (client, place) in clients(&olol).await.iter_mut().zip(["agent", "proxy"]) {
        let request = CreateSessionRequest {
            messages: vec![message("system", "be kind")],
            model_parameters_json: r#"{"seed":7,"temperature":0.9}"#.into(),
            timeout_seconds: 60.0,
            preload: true,
            ..wanted("talk")
        };
        let made = client.create_session(request).await.unwrap().into_inner();
        assert_eq!((made.session_id.as_str(), made.model.as_str(), made.status()), ("talk", "tiny", Is::Active));
        assert_eq!((made.timeout_seconds, made.message_count, made.messages.len()), (60.0, 1, 0));
        let load = cluster.server(0).seen("/api/generate").pop().unwrap().json();
        assert_eq!((&load["prompt"], &load["options"]["seed"]), (&Value::Null, &json!(7)), "an empty prompt loads it");
        assert_eq!(say(client, "talk", "one").await.unwrap(), "one");
        assert_eq!(say(client, "talk", "two").await.unwrap(), "two");
        assert_eq!(asked(&cluster, 0), ["system: be kind", "user: one", "assistant: one", "user: two"], "{place}");
        let body = cluster.server(0).seen("/api/chat").pop().unwrap().json();
        assert_eq!(body["options"], json!({"seed": 7, "temperature": 0.5}), "what a turn says goes before its session");
        let session = get(client, "talk").await;
        let pairs = said(&session);
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(role, text)| (role.as_str(), text.as_str())).collect();
        let wanted =
            [("system", "be kind"), ("user", "one"), ("assistant", "one"), ("user", "two"), ("assistant", "two")];
        assert_eq!(pairs, wanted);
        let last = session.messages.last().unwrap();
        assert!(last.tokens_used > 0 && last.completion_time_seconds > 0.0 && last.timestamp_ms > 0);
        assert!((last.temperature - 0.5).abs() < 1e-6 && last.metadata["done_reason"] == "stop");
        assert_eq!((session.turns, session.message_count), (2, 5));
        if place == "proxy" {
            assert_eq!((session.server.as_str(), last.metadata["server"].as_str()), ("0", "0"));
        }
        assert!(session.bytes > 0 && session.last_active_ms >= session.created_at_ms);
        let part = GetSessionRequest { session_id: "talk".into(), last: 1 };
        let part = client.get_session(part).await.unwrap().into_inner();
        assert_eq!(said(&part), [("assistant".to_owned(), "two".to_owned())]);
        let ended = client.end_session(EndSessionRequest { session_id: "talk".into() }).await.unwrap().into_inner();
        assert_eq!(ended.turns, 2);
        assert_eq!(say(client, "talk", "three").await.unwrap_err().code(), Code::NotFound);
    }
    assert!(cluster.server(0).seen("/api/pull").is_empty(), "nothing is ever pulled");
}

#[tokio::test]
async fn a_session_is_made_once() {
    let (_cluster, olol) = start().await;
    for client in &mut clients(&olol).await {
        let first = client.create_session(wanted("talk")).await.unwrap().into_inner();
        say(client, "talk", "one").await.unwrap();
        let second = client.create_session(wanted("talk")).await.unwrap().into_inner();
        assert_eq!((second.created_at_ms, second.turns), (first.created_at_ms, 1));
        let other = CreateSessionRequest { model: "other".into(), ..wanted("talk") };
        assert_eq!(client.create_session(other).await.unwrap_err().code(), Code::AlreadyExists);
        let unnamed = client.create_session(wanted("")).await.unwrap().into_inner();
        assert_eq!(unnamed.session_id.len(), 32);
    }
}

#[tokio::test]
async fn what_cannot_be_a_session_is_said() {
    let (_cluster, olol) = start().await;
    for client in &mut clients(&olol).await {
        let requests = [
            wanted("a/b"),
            wanted(&"a".repeat(129)),
            CreateSessionRequest { model: String::new(), ..wanted("a") },
            CreateSessionRequest { timeout_seconds: -1.0, ..wanted("a") },
            CreateSessionRequest { timeout_seconds: f64::NAN, ..wanted("a") },
            CreateSessionRequest { model_parameters_json: "[]".into(), ..wanted("a") },
            CreateSessionRequest { messages: vec![message("", "hi")], ..wanted("a") },
        ];
        for request in requests {
            let refused = client.create_session(request.clone()).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{request:?}: {refused}");
        }
        let missing = CreateSessionRequest { model: "nosuch".into(), preload: true, ..wanted("a") };
        assert_eq!(client.create_session(missing).await.unwrap_err().code(), Code::NotFound);
        let unknown = client.get_session(GetSessionRequest { session_id: "a".into(), last: 0 }).await.unwrap_err();
        assert_eq!(unknown.code(), Code::NotFound, "what could not be loaded was not made");
    }
}

#[tokio::test]
async fn a_chat_that_names_a_session_is_asked_with_its_history() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have_loaded("tiny");
        cluster.servers().iter().for_each(|server| {
            server.echoes();
        });
        let olol = Olol::start(&cluster, "").await;
        let made = olol.ask(&make("talk")).await;
        assert_eq!((made.status, made.json()["status"].as_str()), (201, Some("active")), "{}", made.text());
        assert_eq!(olol.ask(&make("talk")).await.status, 200);
        let plain = olol.chat("tiny", "one").await;
        let first = olol.ask(&chat("tiny", "one").header("X-Olol-Session", "talk")).await;
        assert_eq!((first.chunks, first.ending), (plain.chunks, plain.ending), "the bytes are a server's");
        assert_eq!(
            (first.headers.get("x-olol-session"), first.headers.get("x-olol-session-turn")),
            (Some("talk"), Some("1"))
        );
        let second = olol.ask(&chat_at_once("tiny", "two").header("X-Olol-Session", "talk")).await;
        assert_eq!((second.header("x-olol-session-turn"), second.said().as_str()), ("2", "two"));
        let at = second.server().parse().unwrap();
        assert_eq!(asked(&cluster, at), ["user: one", "assistant: one", "user: two"]);
        assert_eq!(
            first.headers.get("x-olol-server"),
            second.headers.get("x-olol-server"),
            "it stays where it is cached"
        );
        let shown = olol.get(&page("talk")).await;
        assert_eq!(texts(&shown), ["one", "one", "two", "two"]);
        assert_eq!(texts(&olol.get(&format!("{}?last=3", page("talk"))).await), ["one", "two", "two"]);
        let shown = shown.json();
        assert_eq!((shown["server_host"].as_str(), shown["turns"].as_u64()), (Some(second.server()), Some(2)));
        for field in ["session_id", "model_name", "created_at", "last_active", "model_parameters", "timeout"] {
            assert!(!shown[field].is_null(), "{field}: {shown}");
        }
        for field in ["role", "content", "timestamp", "tokens_used", "completion_time", "metadata"] {
            assert!(!shown["messages"][3][field].is_null(), "{field}: {shown}");
        }
        assert_eq!(olol.ask(&Request::new("DELETE", &page("talk"))).await.json(), json!({"ended": true, "turns": 2}));
        assert_eq!(olol.get(&page("talk")).await.status, 404);
    }
}

#[tokio::test]
async fn a_name_without_a_session_is_only_a_name() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    olol.ask(&make("other")).await;
    for _ in 0..2 {
        let answer = olol.ask(&chat("tiny", "hi").header("X-Olol-Session", "talk")).await;
        assert_eq!((answer.status, answer.header("x-olol-session-turn")), (200, ""));
        assert_eq!(asked(&cluster, answer.server().parse().unwrap()), ["user: hi"]);
    }
    assert_eq!(olol.get(PAGE).await.json()["sessions"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn options_of_a_session_are_those_of_its_chats() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let body = json!({"session_id": "talk", "model": "tiny", "model_parameters": {"seed": 7, "top_k": 3}});
    olol.ask(&Request::post(PAGE, body)).await;
    for (asked, wanted) in [
        (json!({}), json!({"seed": 7, "top_k": 3})),
        (json!({"options": {"seed": 8}}), json!({"seed": 8, "top_k": 3})),
        (json!({"options": null}), json!({"seed": 7, "top_k": 3})),
    ] {
        let mut body = asked;
        body["model"] = json!("tiny");
        body["messages"] = json!([{"role": "user", "content": "hi"}]);
        olol.ask(&Request::post("/api/chat", body).header("X-Olol-Session", "talk").chunked()).await;
        assert_eq!(cluster.server(0).seen("/api/chat").pop().unwrap().json()["options"], wanted);
    }
}

#[tokio::test]
async fn a_turn_that_breaks_off_leaves_nothing() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "stack.order = ['model-route']").await;
    let server = cluster.server(0);
    olol.ask(&make("talk")).await;
    let request = chat("tiny", "hi").header("X-Olol-Session", "talk");
    server.dies_after(["Hel"]);
    assert!(!olol.ask(&request).await.error().is_empty());
    server.breaks_after(["Hel"], "out of memory");
    assert_eq!(olol.ask(&request).await.error(), "out of memory");
    server.refuses(500, "no");
    assert_eq!(olol.ask(&request).await.status, 500);
    server.stalls_after(["Hel"]);
    let mut leaving = olol.begin(&request).await;
    leaving.head().await;
    leaving.piece().await;
    let busy = olol.get(&page("talk")).await.json();
    assert_eq!((busy["status"].as_str(), busy["turns"].as_u64()), (Some("active"), Some(0)));
    drop(leaving);
    server.saw_cancel().await;
    assert!(texts(&olol.get(&page("talk")).await).is_empty());
    server.says(["Hello"]);
    assert_eq!(olol.ask(&request).await.said(), "Hello");
    assert_eq!(texts(&olol.get(&page("talk")).await), ["hi", "Hello"]);
}

#[tokio::test]
async fn a_session_moves_when_its_server_dies() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        let mut client = client(olol.address()).await;
        client.create_session(wanted("talk")).await.unwrap();
        say(&mut client, "talk", "one").await.unwrap();
        let home = get(&mut client, "talk").await.server;
        cluster.server(home.parse().unwrap()).dies_before_head();
        let answer = olol.ask(&chat("tiny", "two").header("X-Olol-Session", "talk")).await;
        assert_eq!((answer.status, answer.header("x-olol-session-moved")), (200, home.as_str()), "{way:?}");
        let session = get(&mut client, "talk").await;
        assert_eq!(
            (session.status(), session.moved_from.as_str(), session.server.as_str()),
            (Is::Moved, home.as_str(), answer.server())
        );
        assert_eq!(asked(&cluster, answer.server().parse().unwrap()).len(), 3, "with all that was said before");
        say(&mut client, "talk", "three").await.unwrap();
        let session = get(&mut client, "talk").await;
        assert_eq!((session.status(), session.server.as_str()), (Is::Active, answer.server()));
    }
}

#[tokio::test]
async fn each_key_has_its_own_sessions() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let keys = olol.keys();
    let path = keys.to_str().unwrap();
    let mut texts_of = Vec::new();
    for arguments in [&["ada"][..], &["bob"], &["root", "--admin"], &["poor", "--models", "other"]] {
        let output = Process::run(&[&["keys", "add"], arguments, &["--file", path]].concat()).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let word = told.split_whitespace().find(|word| word.starts_with("olol_")).unwrap_or_else(|| panic!("{told}"));
        texts_of.push(format!("Bearer {word}"));
    }
    let [ada, bob, root, poor] = &texts_of[..] else { panic!("four keys") };
    patiently("the keys are known", async {
        while olol.get(PAGE).await.status != 401
            || olol.ask(&Request::get(PAGE).header("Authorization", poor)).await.status != 200
        {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let as_key = |request: Request, key: &str| request.header("Authorization", key);
    for key in [ada, bob] {
        assert_eq!(olol.ask(&as_key(make("talk"), key)).await.status, 201, "each has its own names");
    }
    assert_eq!(olol.ask(&as_key(make("talk"), poor)).await.status, 403);
    let request = |text| chat("tiny", text).header("X-Olol-Session", "talk");
    assert_eq!(olol.ask(&as_key(request("mine"), ada)).await.status, 200);
    let shown = olol.ask(&as_key(Request::get(&page("talk")), bob)).await;
    assert!(texts(&shown).is_empty());
    let ada_s = olol.ask(&as_key(Request::get(PAGE), ada)).await.json();
    assert_eq!(ada_s["sessions"].as_array().unwrap().len(), 1);
    let owner = ada_s["sessions"][0]["owner"].as_str().unwrap().to_owned();
    let name = format!("talk@{owner}");
    assert_eq!(olol.ask(&as_key(Request::get(&page(&name)), bob)).await.status, 404);
    assert_eq!(olol.ask(&as_key(Request::new("DELETE", &page(&name)), bob)).await.status, 404);
    let all = olol.ask(&as_key(Request::get(PAGE), root)).await.json();
    assert_eq!(all["sessions"].as_array().unwrap().len(), 2);
    assert_eq!(olol.ask(&as_key(Request::get(&page("talk")), root)).await.status, 409, "whose is not said");
    assert_eq!(texts(&olol.ask(&as_key(Request::get(&page(&name)), root)).await)[0], "mine");
    assert_eq!(olol.ask(&as_key(Request::new("DELETE", &page(&name)), root)).await.status, 200);
    let mut client = client(olol.address()).await;
    assert_eq!(client.create_session(wanted("talk")).await.unwrap_err().code(), Code::Unauthenticated);
    let mut get = tonic::Request::new(GetSessionRequest { session_id: "talk".into(), last: 0 });
    get.metadata_mut().insert("authorization", bob.parse().unwrap());
    assert_eq!(client.get_session(get).await.unwrap().into_inner().session_id, "talk");
}

#[tokio::test]
async fn sessions_are_listed_page_by_page_and_counted() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    assert_eq!(olol.get(PAGE).await.json(), json!({"sessions": [], "next": null}));
    for id in ["c", "a", "b"] {
        olol.ask(&make(id)).await;
    }
    olol.ask(&chat("tiny", "hi").header("X-Olol-Session", "a")).await;
    let ids = |page: &Value| -> Vec<String> {
        page["sessions"].as_array().unwrap().iter().map(|one| one["session_id"].as_str().unwrap().to_owned()).collect()
    };
    let first = olol.get(&format!("{PAGE}?limit=2")).await.json();
    assert_eq!((ids(&first), first["next"].as_str()), (vec!["a".to_owned(), "b".to_owned()], Some("b")));
    let second = olol.get(&format!("{PAGE}?limit=2&after=b")).await.json();
    assert_eq!((ids(&second), &second["next"]), (vec!["c".to_owned()], &Value::Null));
    let metrics = olol.get("/metrics").await.text();
    assert!(metrics.contains("\nolol_sessions 3\n"), "{metrics}");
    assert!(metrics.contains("olol_session_turns_total{result=\"stored\"}"), "{metrics}");
    for (request, status) in [
        (Request::get(&format!("{PAGE}?limit=0")), 400),
        (Request::get(&format!("{PAGE}?limit=x")), 400),
        (Request::get(&page("no such")), 400),
        (Request::get(&page("a%2Fb")), 400),
        (Request::get(&page("nosuch")), 404),
        (Request::post(PAGE, "{"), 400),
        (Request::post(PAGE, json!({"model_name": "tiny", "mesages": []})), 400),
        (Request::post(PAGE, json!({"model_name": "nosuch", "preload": true})), 404),
        (Request::new("DELETE", PAGE), 405),
        (Request::post(&page("a"), "{}"), 405),
    ] {
        let answer = olol.ask(&request).await;
        assert_eq!(answer.status, status, "{request:?}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_second_proxy_says_who_has_the_file() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let folder = tempfile::tempdir().unwrap();
    let toml = format!("sessions.dir = '{}'", folder.path().display());
    let first = Olol::start(&cluster, &toml).await;
    first.ask(&make("talk")).await;
    let second = Olol::start(&cluster, &toml).await;
    let refused = second.ask(&make("talk")).await;
    assert!(refused.status == 507 && refused.error().contains("another process has it open"), "{}", refused.text());
    let request = chat("tiny", "hi").header("X-Olol-Session", "talk");
    assert_eq!(second.ask(&request).await.status, 200, "everything else is served");
    first.stop().await;
    until("the file is free", || is_free(folder.path())).await;
    assert_eq!(second.ask(&make("talk")).await.status, 200, "it takes over when the first has ended");
    assert_eq!(second.ask(&request).await.header("x-olol-session-turn"), "1");
}

#[tokio::test]
async fn a_session_goes_on_in_the_form_of_either_chat() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        let server = cluster.server(0);
        server.echoes();
        let olol = Olol::start(&cluster, "").await;
        let body = json!({"session_id": "talk", "model": "tiny", "model_parameters": {"temperature": 0.25, "num_ctx": 2048},
            "messages": [{"role": "user", "content": "look", "images": ["iVBORw0KGgo="]}]});
        assert_eq!(olol.ask(&Request::post(PAGE, body)).await.status, 201);
        let plain = olol.ask(&v1_chat("tiny", "one")).await;
        let first = olol.ask(&v1_chat("tiny", "one").header("X-Olol-Session", "talk")).await;
        assert_eq!((&first.chunks, first.ending), (&plain.chunks, plain.ending), "the bytes are a server's");
        assert_eq!((first.header("x-olol-session"), first.header("x-olol-session-turn")), ("talk", "1"));
        let seen = server.seen("/v1/chat/completions").pop().unwrap().json();
        let image = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}});
        assert_eq!(seen["messages"][0]["content"], json!([{"type": "text", "text": "look"}, image]));
        assert_eq!((&seen["temperature"], seen["messages"].as_array().unwrap().len()), (&json!(0.25), 2));
        let second = olol.ask(&chat("tiny", "two").header("X-Olol-Session", "talk")).await;
        assert_eq!(second.header("x-olol-session-turn"), "2");
        assert_eq!(asked(&cluster, 0), ["user: look", "user: one", "assistant: one", "user: two"]);
        let body = json!({"model": "tiny", "temperature": 1, "messages": [{"role": "user", "content": "three"}]});
        let third = olol.ask(&Request::post("/v1/chat/completions", body).header("X-Olol-Session", "talk")).await;
        assert_eq!(third.json()["choices"][0]["message"]["content"], "three", "{}", third.text());
        let seen = server.seen("/v1/chat/completions").pop().unwrap().json();
        assert_eq!((&seen["temperature"], &seen["messages"][4]["content"]), (&json!(1), &json!("two")));
        let shown = olol.get(&page("talk")).await;
        assert_eq!(texts(&shown), ["look", "one", "one", "two", "two", "three", "three"]);
        let shown = shown.json();
        assert_eq!((&shown["messages"][6]["temperature"], &shown["turns"]), (&json!(1.0), &json!(3)));
        assert!(shown["messages"][6]["tokens_used"].as_u64().unwrap() > 0, "{shown}");
        server.dies_after(["Hel"]);
        olol.ask(&v1_chat("tiny", "lost").header("X-Olol-Session", "talk")).await;
        server.echoes();
        assert_eq!(texts(&olol.get(&page("talk")).await).len(), 7, "what breaks off leaves nothing");
    }
}

/// Whether nobody has the file of sessions in a folder.
fn is_free(folder: &std::path::Path) -> bool {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(folder.join("proxy-sessions.redb")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// A conversation and what its client has been told.
struct Talk {
    id: String,
    told: Arc<Mutex<Vec<String>>>,
}

/// Talks until the other side is gone; what was answered to the end is told.
async fn talk(address: SocketAddr, id: String, told: Arc<Mutex<Vec<String>>>, round: usize) {
    for turn in 0.. {
        let text = format!("{id}-{round}-{turn}");
        let asking = async {
            let mut connection = Connection::try_open(address).await?;
            let request = if turn % 3 == 2 { v1_chat("tiny", &text) } else { chat("tiny", &text) };
            connection.try_ask(&request.header("X-Olol-Session", &id)).await
        };
        match asking.await {
            Some(answer) if answer.ending == Ending::LastChunk && answer.error().is_empty() => {
                assert_eq!((answer.status, answer.header("x-olol-session-turn").is_empty()), (200, false));
                told.lock().unwrap().push(text);
            }
            _ => return,
        }
    }
}

/// Makes sessions and ends every other one, until the other side is gone; what was told of them.
async fn come_and_go(address: SocketAddr, round: usize) -> Vec<(String, bool)> {
    let mut told = Vec::new();
    for number in 0.. {
        let id = format!("brief{round}-{number}");
        let ends = number % 2 == 1;
        let doing = async {
            let mut connection = Connection::try_open(address).await?;
            let made = connection.try_ask(&make(&id)).await.filter(|made| made.status == 201)?;
            if ends {
                let delete = Request::new("DELETE", &page(&id));
                return connection.try_ask(&delete).await.filter(|ended| ended.status == 200);
            }
            Some(made)
        };
        if doing.await.is_none() {
            break;
        }
        told.push((id, !ends));
    }
    told
}

#[tokio::test]
async fn a_kill_at_any_moment_loses_no_turn_whose_end_was_told() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    cluster.server(0).echoes();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("olol.toml");
    std::fs::write(&config, format!("sessions.dir = '{}'\nsessions.max-messages = 100000\n", folder.path().display()))
        .unwrap();
    let servers = format!("http://{}", cluster.server(0).address());
    let mut brief: Vec<(String, bool)> = Vec::new();
    let talks: Vec<Talk> = (0..6).map(|at| Talk { id: format!("talk{at}"), told: Arc::default() }).collect();
    for round in 0..12 {
        let mut proxy = Process::proxy(&servers, &["--config", config.to_str().unwrap()]).await;
        proxy.has_up(1).await;
        let mut connection = proxy.connect().await;
        for talk in &talks {
            let made = connection.ask(&make(&talk.id)).await;
            assert_eq!(made.status, if round == 0 { 201 } else { 200 }, "{}", made.text());
        }
        check(&mut connection, &talks).await;
        for (id, is_there) in &brief {
            let status = connection.ask(&Request::get(&page(id))).await.status;
            assert_eq!(status, if *is_there { 200 } else { 404 }, "{id}");
        }
        let coming = tokio::spawn(come_and_go(proxy.address(), round));
        let talking: Vec<_> = talks
            .iter()
            .map(|one| tokio::spawn(talk(proxy.address(), one.id.clone(), one.told.clone(), round)))
            .collect();
        let count = || talks.iter().map(|talk| talk.told.lock().unwrap().len()).sum::<usize>();
        let enough = count() + 5 + 7 * round;
        until("enough turns", || count() >= enough).await;
        // At any moment, and not just behind the end of a turn.
        tokio::time::sleep(Duration::from_micros(fastrand::u64(..20_000))).await;
        proxy.kill().await;
        brief = patiently("a client notices", coming).await.unwrap();
        for talking in talking {
            patiently("a client notices", talking).await.unwrap();
        }
    }
    let proxy = Process::proxy(&servers, &["--config", config.to_str().unwrap()]).await;
    check(&mut proxy.connect().await, &talks).await;
}

/// Sessions with the turns that they had, until the other side is gone; those of which all was told, in that order.
async fn make_many(address: SocketAddr, key: String, told: Arc<Mutex<Vec<String>>>, round: usize) {
    for number in 0.. {
        let id = format!("{round}-{number:04}");
        let doing = async {
            let mut connection = Connection::try_open(address).await?;
            let as_key = |request: Request| request.header("Authorization", &key);
            connection.try_ask(&as_key(make(&id))).await.filter(|made| made.status == 201)?;
            let answer = connection.try_ask(&as_key(chat("tiny", &id).header("X-Olol-Session", &id))).await?;
            // It may have had to leave in between: then it was a conversation without a history.
            let is_turn = !answer.header("x-olol-session-turn").is_empty();
            Some(is_turn && answer.ending == Ending::LastChunk && answer.error().is_empty())
        };
        match doing.await {
            Some(true) => told.lock().unwrap().push(id),
            Some(false) => {}
            None => return,
        }
    }
}

#[tokio::test]
async fn a_kill_at_the_bound_loses_nothing_but_what_had_to_leave_and_each_key_keeps_its_own() {
    const MOST: usize = 24;
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    cluster.server(0).echoes();
    let folder = tempfile::tempdir().unwrap();
    let (config, keys) = (folder.path().join("olol.toml"), folder.path().join("keys.toml"));
    let mut bearers = Vec::new();
    for name in ["ada", "eve"] {
        let output = Process::run(&["keys", "add", name, "--file", keys.to_str().unwrap()]).await;
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let word = told.split_whitespace().find(|word| word.starts_with("olol_")).unwrap();
        bearers.push(format!("Bearer {word}"));
    }
    let [ada, eve] = &bearers[..] else { panic!("two keys") };
    let dir = folder.path().display();
    let text = format!("sessions.dir = '{dir}'\nsessions.max-sessions = {MOST}\nauth.file = '{}'\n", keys.display());
    std::fs::write(&config, text).unwrap();
    let servers = format!("http://{}", cluster.server(0).address());
    let started = async || {
        let proxy = Process::proxy(&servers, &["--config", config.to_str().unwrap()]).await;
        proxy.has_up(1).await;
        proxy
    };
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    for round in 0..5 {
        let mut proxy = started().await;
        let mut connection = proxy.connect().await;
        let made = connection.ask(&make("hers").header("Authorization", ada)).await;
        assert_eq!(made.status, if round == 0 { 201 } else { 200 }, "that of ada is the oldest, and stays");
        let making: Vec<_> = (0..4)
            .map(|at| tokio::spawn(make_many(proxy.address(), eve.clone(), told.clone(), round * 10 + at)))
            .collect();
        let enough = told.lock().unwrap().len() + MOST + 10 * round;
        until("enough sessions", || told.lock().unwrap().len() >= enough).await;
        tokio::time::sleep(Duration::from_micros(fastrand::u64(..20_000))).await;
        proxy.kill().await;
        for making in making {
            patiently("a client notices", making).await.unwrap();
        }
        let proxy = started().await;
        let mut connection = proxy.connect().await;
        let page_of = async |connection: &mut Connection, key: &str| {
            let page = connection.ask(&Request::get(PAGE).header("Authorization", key)).await.json();
            let sessions = page["sessions"].as_array().unwrap().clone();
            let ids = sessions.iter().map(|session| session["session_id"].as_str().unwrap().to_owned());
            ids.collect::<Vec<_>>()
        };
        assert_eq!(page_of(&mut connection, ada).await, ["hers"]);
        let kept = page_of(&mut connection, eve).await;
        // At most those of the last transaction are more.
        assert!((MOST / 2..=MOST + 8).contains(&kept.len()), "{kept:?}");
        // The last of which all was told; whoever was at it at the same time may have taken a place or two of theirs.
        let told = told.lock().unwrap().clone();
        for id in told.iter().rev().take(MOST / 2) {
            let shown = connection.ask(&Request::get(&page(id)).header("Authorization", eve)).await;
            assert_eq!(texts(&shown), [id.as_str(), id], "{id} of {kept:?}");
        }
    }
}

/// Whether each session has all that was told, in its order, and no half turn.
async fn check(connection: &mut Connection, talks: &[Talk]) {
    for talk in talks {
        let kept = texts(&connection.ask(&Request::get(&page(&talk.id))).await);
        let turns: Vec<&str> = kept
            .chunks(2)
            .map(|turn| {
                assert!(turn.len() == 2 && turn[0] == turn[1], "a half turn: {turn:?}");
                turn[0].as_str()
            })
            .collect();
        let told = talk.told.lock().unwrap();
        let mut rest = turns.iter();
        for text in told.iter() {
            assert!(rest.any(|kept| kept == text), "{text} was told and is lost: {turns:?}");
        }
    }
}
