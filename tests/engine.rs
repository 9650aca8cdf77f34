//! The built-in engine: real llama.cpp with the model that comes with OLOL, in a real child process.
#![cfg(feature = "engine")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::time::Duration;

use http::StatusCode;
use olol::engine::{Engine, EngineError, Start};
use olol::ollama::{Ask, Endpoint, Ollama};
use olol_middleware::{Reply, ServerId};
use serde_json::{Value, json};

/// Nothing here takes longer, however busy the machine is.
const LIMIT: Duration = Duration::from_secs(60);

fn start(model: Option<PathBuf>) -> Start {
    Start { model, program: env!("CARGO_BIN_EXE_olol").into() }
}

/// An engine, and a way to ask it.
struct Running {
    engine: Engine,
    ollama: Ollama,
}

impl Running {
    async fn new() -> Self {
        let engine = within(Engine::start(start(None))).await.unwrap();
        let endpoint = Endpoint::Unix(engine.socket().to_owned());
        Self { engine, ollama: Ollama::new(ServerId::new("engine"), endpoint, LIMIT) }
    }

    async fn post(&self, path: &'static str, body: &Value) -> Reply {
        within(self.ollama.send(Ask::post(path, body.to_string()))).await.unwrap()
    }

    /// Asks, and returns status and JSON of an answer in one object.
    async fn object(&self, path: &'static str, body: &Value) -> (StatusCode, Value) {
        read(self.post(path, body).await).await
    }

    async fn get(&self, path: &'static str) -> Value {
        read(within(self.ollama.send(Ask::get(path))).await.unwrap()).await.1
    }

    async fn generate(&self, more: Value) -> Value {
        let mut body =
            json!({"model": "olol-tiny", "prompt": QUESTION, "stream": false, "options": {"temperature": 0}});
        merge(&mut body, more);
        let (status, answer) = self.object("/api/generate", &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }
}

const QUESTION: &str = "What is a load balancer?";
const ANSWER: &str =
    "A load balancer spreads requests over several servers, so that no single server has too much work.";

fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            more.into_iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, more) => *into = more,
    }
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("it took too long")
}

async fn read(reply: Reply) -> (StatusCode, Value) {
    let status = reply.status;
    let body = within(reply.body.collect(1 << 20)).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{error}: {body:?}")))
}

/// The lines of a stream, each of which must be a chunk of its own.
async fn lines(mut reply: Reply) -> Vec<Value> {
    assert_eq!(reply.headers["content-type"], "application/x-ndjson");
    let mut lines = Vec::new();
    while let Some(chunk) = within(reply.body.next()).await {
        let bytes = chunk.unwrap().bytes;
        if !bytes.is_empty() {
            assert_eq!(memchr::memchr_iter(b'\n', &bytes).count(), 1);
            lines.push(serde_json::from_slice(&bytes).unwrap());
        }
    }
    lines
}

#[tokio::test]
async fn it_knows_what_it_was_taught_and_counts_what_it_does() {
    let running = Running::new().await;
    let answer = running.generate(json!({})).await;
    assert_eq!((answer["response"].as_str(), answer["done_reason"].as_str()), (Some(ANSWER), Some("stop")));
    for count in
        ["total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"]
    {
        assert!(answer[count].as_u64().is_some_and(|count| count > 0), "{count}: {answer}");
    }
    let parts: u64 = ["load_duration", "prompt_eval_duration", "eval_duration"]
        .map(|part| answer[part].as_u64().unwrap())
        .iter()
        .sum();
    assert!(parts <= answer["total_duration"].as_u64().unwrap(), "{answer}");
    let again = running.generate(json!({})).await;
    assert_eq!(
        (&again["response"], &again["context"], &again["prompt_eval_count"]),
        (&answer["response"], &answer["context"], &answer["prompt_eval_count"])
    );
    assert_eq!(again["load_duration"], 0);
    running.engine.stop().await;
}

#[tokio::test]
async fn a_chat_streams_one_line_a_piece_and_remembers_its_turns() {
    let running = Running::new().await;
    let body = json!({"model": "Olol-Tiny:latest", "messages": [{"role": "user", "content": QUESTION}], "options": {"temperature": 0}});
    let lines = lines(running.post("/api/chat", &body).await).await;
    let text: String = lines.iter().map(|line| line["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(text, ANSWER);
    assert!(lines.len() > 5 && lines.iter().all(|line| line["model"] == "Olol-Tiny:latest"));
    let done: Vec<bool> = lines.iter().map(|line| line["done"] == true).collect();
    assert!(done.ends_with(&[true]) && done.iter().filter(|done| **done).count() == 1);
    let longer = json!({"model": "olol-tiny", "stream": false, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": QUESTION}]});
    let (_, longer) = running.object("/api/chat", &longer).await;
    assert!(longer["prompt_eval_count"].as_u64() > lines.last().unwrap()["prompt_eval_count"].as_u64());
}

#[tokio::test]
async fn answers_end_where_a_request_says() {
    let running = Running::new().await;
    let short = running.generate(json!({"options": {"num_predict": 3}})).await;
    assert_eq!((short["eval_count"].as_u64(), short["done_reason"].as_str()), (Some(3), Some("length")));
    assert!(ANSWER.starts_with(short["response"].as_str().unwrap()));
    let stopped = running.generate(json!({"options": {"stop": ["several"]}})).await;
    assert_eq!(
        (stopped["response"].as_str(), stopped["done_reason"].as_str()),
        (Some("A load balancer spreads requests over "), Some("stop"))
    );
    let full = running
        .generate(json!({"prompt": "Tell me a story.", "raw": true, "options": {"num_ctx": 32, "stop": []}}))
        .await;
    let used = full["prompt_eval_count"].as_u64().unwrap() + full["eval_count"].as_u64().unwrap();
    assert!(full["done_reason"] == "stop" || (full["done_reason"] == "length" && used >= 32), "{full}");
}

#[tokio::test]
async fn the_same_seed_gives_the_same_text() {
    let running = Running::new().await;
    let sample = |seed: u64| {
        running.generate(
            json!({"prompt": "Tell me a story.", "options": {"temperature": 1.5, "seed": seed, "num_predict": 24}}),
        )
    };
    let (one, same, other) = (sample(1).await, sample(1).await, sample(2).await);
    assert_eq!(one["response"], same["response"]);
    assert_ne!(one["response"], other["response"]);
}

#[tokio::test]
async fn an_answer_goes_on_from_the_context_of_the_last() {
    let running = Running::new().await;
    let first = running.generate(json!({})).await;
    let context = &first["context"];
    let second = running.generate(json!({"prompt": "Hello!", "context": context})).await;
    let before = context.as_array().unwrap();
    assert!(second["context"].as_array().unwrap().starts_with(before));
    assert!(second["prompt_eval_count"].as_u64().unwrap() > before.len() as u64);
    let foreign = json!({"model": "olol-tiny", "prompt": "Hello!", "context": [999_999_999]});
    assert_eq!(running.object("/api/generate", &foreign).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_cut_or_refused() {
    let running = Running::new().await;
    let long = "Hello there. ".repeat(200);
    let cut = running.generate(json!({"prompt": long, "options": {"num_ctx": 64, "num_predict": 1}})).await;
    assert!(cut["prompt_eval_count"].as_u64().unwrap() < 64, "{cut}");
    let strict = json!({"model": "olol-tiny", "prompt": long, "truncate": false, "options": {"num_ctx": 64}});
    let (status, refusal) = running.object("/api/generate", &strict).await;
    assert!(status == StatusCode::BAD_REQUEST && refusal["error"].as_str().unwrap().contains("64 fit"), "{refusal}");
    let messages: Vec<Value> = (0..50)
        .map(|turn| json!({"role": if turn % 2 == 0 { "user" } else { "assistant" }, "content": "Hello there."}))
        .collect();
    let chat = json!({"model": "olol-tiny", "messages": messages, "stream": false, "options": {"num_ctx": 64, "num_predict": 1}});
    let (status, chat) = running.object("/api/chat", &chat).await;
    assert!(status == StatusCode::OK && chat["prompt_eval_count"].as_u64().unwrap() < 64, "{chat}");
}

#[tokio::test]
async fn a_model_is_loaded_shown_and_unloaded() {
    let running = Running::new().await;
    assert_eq!(running.get("/api/ps").await, json!({"models": []}));
    let (_, loaded) =
        running.object("/api/generate", &json!({"model": "olol-tiny", "options": {"num_ctx": 256}})).await;
    assert_eq!((loaded["done_reason"].as_str(), loaded["done"].as_bool()), (Some("load"), Some(true)));
    let ps = running.get("/api/ps").await;
    assert_eq!(
        (ps["models"][0]["name"].as_str(), ps["models"][0]["context_length"].as_u64()),
        (Some("olol-tiny:latest"), Some(256))
    );
    // Who names no context takes what is loaded.
    running.generate(json!({})).await;
    assert_eq!(running.get("/api/ps").await["models"][0]["context_length"], 256);
    let (_, unloaded) =
        running.object("/api/chat", &json!({"model": "olol-tiny", "messages": [], "keep_alive": 0})).await;
    assert_eq!(unloaded["done_reason"], "unload");
    assert_eq!(running.get("/api/ps").await, json!({"models": []}));
    running.generate(json!({"keep_alive": 0})).await;
    // The answer is out before the model goes: the runner does one thing after another.
    running.object("/api/generate", &json!({"model": "olol-tiny", "keep_alive": 0})).await;
    assert_eq!(running.get("/api/ps").await, json!({"models": []}));
}

#[tokio::test]
async fn it_tells_of_its_model_what_ollama_tells() {
    let recorded = |name: &str| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.json"));
        let exchange: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let response = &exchange["response"];
        let body: String = response["chunks"].as_array().map_or_else(
            || response["body"].as_str().unwrap().to_owned(),
            |chunks| chunks.iter().map(|chunk| chunk.as_str().unwrap()).collect(),
        );
        serde_json::from_str::<Value>(&body).unwrap()
    };
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let running = Running::new().await;
    let (tags, theirs) = (running.get("/api/tags").await, recorded("tags-get"));
    assert_eq!(keys(&tags["models"][0]), keys(&theirs["models"][0]));
    assert_eq!(keys(&tags["models"][0]["details"]), keys(&theirs["models"][0]["details"]));
    assert_eq!(tags["models"][0]["details"]["parameter_size"], "1.61M");
    assert_eq!(tags["models"][0]["details"]["quantization_level"], "Q8_0");
    running.generate(json!({})).await;
    let (ps, theirs) = (running.get("/api/ps").await, recorded("ps-one-loaded"));
    assert_eq!(keys(&ps["models"][0]), keys(&theirs["models"][0]));
    let (_, show) = running.object("/api/show", &json!({"model": "", "name": "olol-tiny"})).await;
    assert_eq!(show["model_info"]["general.architecture"], "llama");
    assert_eq!(show["model_info"]["llama.block_count"], 8);
    assert_eq!(show["capabilities"], json!(["completion"]));
    assert!(show["template"].as_str().unwrap().contains("<|assistant|>"));
    let theirs = recorded("show");
    for key in keys(&show) {
        assert!(theirs.get(&key).is_some(), "Ollama has no '{key}'");
    }
}

#[tokio::test]
async fn what_it_cannot_do_is_refused_with_the_reason() {
    let running = Running::new().await;
    for (path, body, status, wanted) in [
        ("/api/generate", json!({"model": "nosuch", "prompt": "x"}), 404, "model 'nosuch' not found"),
        ("/api/generate", json!({"prompt": "x"}), 404, "model '' not found"),
        ("/api/chat", json!({"model": ""}), 400, "model is required"),
        ("/api/show", json!({"model": "nosuch"}), 404, "model 'nosuch:latest' not found"),
        (
            "/api/generate",
            json!({"model": "olol-tiny", "prompt": "x", "keep_alive": "soon"}),
            400,
            "time: invalid duration \"soon\"",
        ),
        (
            "/api/generate",
            json!({"model": "olol-tiny", "prompt": "x", "format": "json"}),
            400,
            "\"olol-tiny\" does not support structured outputs",
        ),
        (
            "/api/chat",
            json!({"model": "olol-tiny", "messages": [{"role": "user", "content": "x", "images": ["aa"]}]}),
            400,
            "does not support images",
        ),
        (
            "/api/embed",
            json!({"model": "olol-tiny", "input": "x"}),
            501,
            "the built-in engine of OLOL cannot answer /api/embed yet",
        ),
        ("/api/pull", json!({"model": "llama3.2"}), 501, "put an Ollama behind OLOL"),
    ] {
        let (got, refusal) = running.object(path, &body).await;
        let text = refusal["error"].as_str().unwrap_or_default();
        assert!(got.as_u16() == status && text.contains(wanted), "{path} {body}: {got} {refusal}");
    }
    let (status, refusal) = running.object("/v1/chat/completions", &json!({"model": "olol-tiny"})).await;
    assert_eq!((status.as_u16(), refusal["error"]["type"].as_str()), (501, Some("api_error")));
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_engine() {
    let running = Running::new().await;
    running.generate(json!({"options": {"num_predict": 1}})).await;
    // Each of these would go on for a thousand tokens; together they would take far longer than what follows may.
    let endless = json!({"model": "olol-tiny", "prompt": "once", "raw": true, "options": {"temperature": 2.0, "top_k": 0, "top_p": 1.0}});
    for _ in 0..50 {
        let mut reply = running.post("/api/generate", &endless).await;
        within(reply.body.next()).await.unwrap().unwrap();
        drop(reply);
    }
    // And these leave while they wait for their turn, or for the whole of their answer.
    let whole =
        json!({"model": "olol-tiny", "prompt": "once", "raw": true, "stream": false, "options": {"temperature": 2.0}});
    for _ in 0..20 {
        let asking = tokio::spawn({
            let (ollama, body) = (running.ollama.clone(), whole.to_string());
            async move { ollama.send(Ask::post("/api/generate", body)).await.is_ok() }
        });
        tokio::task::yield_now().await;
        asking.abort();
    }
    let answer = running.generate(json!({})).await;
    assert_eq!(answer["response"], ANSWER);
}

#[tokio::test]
async fn requests_at_once_are_answered_one_after_another() {
    let running = Running::new().await;
    let answers = futures_util::future::join_all((0..8).map(|_| running.generate(json!({})))).await;
    assert!(answers.iter().all(|answer| answer["response"] == ANSWER));
}

#[tokio::test]
async fn a_child_that_is_killed_is_started_again_and_calls_wait_for_it() {
    let running = Running::new().await;
    running.generate(json!({})).await;
    let first = running.engine.process_id().unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(first.cast_signed()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    // A pooled connection to the dead child may still look alive; a fresh one waits for the next child.
    let ask = Ask {
        fresh: true,
        ..Ask::post(
            "/api/generate",
            json!({"model": "olol-tiny", "prompt": QUESTION, "stream": false, "options": {"temperature": 0}})
                .to_string(),
        )
    };
    let (status, answer) = read(within(running.ollama.send(ask)).await.unwrap()).await;
    assert_eq!((status, answer["response"].as_str()), (StatusCode::OK, Some(ANSWER)));
    assert_ne!(running.engine.process_id(), Some(first));
}

#[tokio::test]
async fn a_file_that_is_no_model_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.gguf");
    std::fs::write(&text, "this is no model").unwrap();
    let refusal = |path: PathBuf| async move {
        match within(Engine::start(start(Some(path)))).await {
            Err(EngineError::Model(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    let why = refusal(text).await;
    assert!(why.contains("text.gguf is no GGUF file"), "{why}");
    let why = refusal(folder.path().join("nosuch.gguf")).await;
    assert!(why.contains("cannot read") && why.contains("nosuch.gguf"), "{why}");
    let why = refusal(folder.path().to_owned()).await;
    assert!(why.contains("is not a file"), "{why}");
}
