//! A stream survives its server: whatever the byte at which it breaks off, its client reads one whole answer; or, where that
//! would not be the answer, what Ollama itself says when its runner dies.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::answers::whole;
use harness::olol::{chat, chat_at_once, v1_chat};
use harness::{Answer, Cluster, Ending, Olol, Request, Seen, Server, Way};
use serde_json::{Value, json};

/// What Ollama says in a stream when its runner dies.
const BROKEN: &str = "an error was encountered while running the model: unexpected EOF";

/// An answer with characters of two, three and four bytes, of which every escape that Ollama writes is one.
const WORDS: [&str; 4] = ["Gr\u{fc}n\u{2192}", " \"\\\n", " \u{1f600}", " Ende."];

/// For streams that nobody can go on with.
const IMPATIENT: &str = "retry.resume-wait-s = 0";
/// No circuit opens, no budget ends, and nobody is judged, however often a server dies.
const PATIENT: &str =
    "judge.least-calls = 1000000\n[retry]\nbreaker-failures = 1000000\nbudget = 1.0\nreserve = 100000";

/// Weights alone decide who is asked: neither what was measured of servers, which on a busy machine may be anything, nor where a
/// conversation began.
const BY_WEIGHT: &str = "pick.policy = 'weighted'\nstack.order = ['trace', 'metrics', 'auth', 'rate-limit', 'timeout', 'alias', \
    'queue', 'quant-fallback', 'model-route', 'hedge', 'retry', 'distribute']\n";

/// A proxy that asks the first server first.
async fn proxy(cluster: &Cluster, toml: &str) -> Olol {
    Olol::start(cluster, &format!("{BY_WEIGHT}{toml}")).await
}

/// A cluster whose first server is always asked first, and which all have the model in memory.
async fn cluster(count: usize, way: Way) -> Cluster {
    let cluster = match count {
        2 => Cluster::of(2).await.weighing([1000, 1]),
        _ => Cluster::of(3).await.weighing([1000, 900, 1]),
    };
    cluster.over(way).all_have_loaded("tiny")
}

fn generate(prompt: &str) -> Request {
    Request::post("/api/generate", json!({"model": "tiny", "prompt": prompt}))
}

fn chat_with(members: &Value) -> Request {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in members.as_object().unwrap() {
        body[key] = value.clone();
    }
    Request::post("/api/chat", body)
}

/// An answer is as whole as one that nothing happened to.
fn assert_like(answer: &Answer, unbroken: &Answer, what: &str) {
    assert_eq!((answer.status, answer.ending), (200, unbroken.ending), "{what}: {}", answer.text());
    assert_eq!(answer.said(), unbroken.said(), "{what}: {}", answer.text());
    let ends = |answer: &Answer| answer.lines().iter().filter(|line| line["done"] == true).count();
    assert_eq!(ends(answer), ends(unbroken), "{what}: {}", answer.text());
    let (mut last, mut wanted) = (answer.lines().pop().unwrap(), unbroken.lines().pop().unwrap());
    for end in [&mut last, &mut wanted] {
        for key in ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "context", "created_at"]
        {
            end.as_object_mut().unwrap().remove(key);
        }
    }
    assert_eq!(last, wanted, "{what}");
}

/// A request, asked of a server that dies at every byte of its answer in turn.
async fn at_every_byte(way: Way, request: &Request) {
    let cluster = cluster(2, way).await;
    for server in cluster.servers() {
        server.says(WORDS);
    }
    let olol = proxy(&cluster, PATIENT).await;
    let unbroken = olol.ask(request).await;
    assert_eq!((unbroken.said(), unbroken.server()), (WORDS.concat(), "0"));
    let bytes: usize =
        unbroken.chunks.iter().map(|chunk| format!("{:x}\r\n\r\n", chunk.len()).len() + chunk.len()).sum();
    for at in 0..bytes + 5 {
        cluster.server(0).dies_after_bytes(at);
        let answer = olol.ask(request).await;
        assert_eq!(answer.server(), "0", "{way:?}, cut after {at} of {bytes} bytes");
        assert_like(&answer, &unbroken, &format!("{way:?}, cut after {at} of {bytes} bytes"));
    }
    assert!(cluster.server(1).work() > bytes / 2, "nobody went on");
}

#[tokio::test]
async fn a_chat_goes_on_wherever_it_is_cut() {
    at_every_byte(Way::Http, &chat("tiny", "hi")).await;
}

#[tokio::test]
async fn a_chat_goes_on_wherever_it_is_cut_behind_agents() {
    at_every_byte(Way::Agents, &chat("tiny", "hi")).await;
}

#[tokio::test]
async fn a_generate_goes_on_wherever_it_is_cut() {
    at_every_byte(Way::Http, &generate("hi")).await;
}

#[tokio::test]
async fn a_chat_of_openai_goes_on_wherever_it_is_cut() {
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": true,
        "stream_options": {"include_usage": true}});
    at_every_byte(Way::Http, &Request::post("/v1/chat/completions", body)).await;
}

#[tokio::test]
async fn what_goes_on_is_written_as_what_came_before() {
    for (request, path) in [
        (chat("tiny", "hi"), "/api/chat"),
        (generate("hi"), "/api/generate"),
        (v1_chat("tiny", "hi"), "/v1/chat/completions"),
    ] {
        let cluster = cluster(2, Way::Http).await;
        for server in cluster.servers() {
            server.says(WORDS);
        }
        let olol = proxy(&cluster, "").await;
        let unbroken = olol.ask(&request).await;
        cluster.server(0).dies_after(["Gr\u{fc}n\u{2192}", " \"\\\n"]);
        let answer = olol.ask(&request).await;
        let pieces = |answer: &Answer| answer.chunks[..answer.chunks.len() - 1].to_vec();
        assert_eq!(pieces(&answer), pieces(&unbroken), "{path}");
    }
}

#[tokio::test]
async fn the_server_that_goes_on_is_asked_for_the_same_and_no_more() {
    let cluster = cluster(2, Way::Http).await;
    cluster.server(0).dies_after(["Hello", " big"]);
    cluster.server(1).says(["Hello", " big", " wide", " world"]);
    let olol = proxy(&cluster, "").await;
    let options = json!({"num_predict": 3, "seed": 7, "num_ctx": 1024, "temperature": 0.5});
    let answer = olol.ask(&chat_with(&json!({"options": options, "keep_alive": "9m", "shift": false}))).await;
    assert_eq!(
        (answer.said().as_str(), answer.lines().pop().unwrap()["done_reason"].as_str()),
        ("Hello big wide", Some("length"))
    );
    let rendered = &cluster.server(1).seen("/api/chat")[0].json();
    assert_eq!((&rendered["_debug_render_only"], &rendered["stream"]), (&json!(true), &json!(false)));
    assert_eq!((&rendered["options"], &rendered["messages"][0]["content"]), (&options, &json!("hi")));
    let before = "<|start|>user\nhi<|end|><|start|>assistant\n";
    let options = json!({"num_predict": 1, "seed": 7, "num_ctx": 1024, "temperature": 0.5});
    let counted = json!({"model": "tiny", "raw": true, "stream": false, "shift": false, "prompt": before,
        "options": options});
    let followed = json!({"model": "tiny", "raw": true, "stream": true, "keep_alive": "9m", "shift": false,
        "prompt": format!("{before}Hello big"), "options": options});
    let asked: Vec<Value> = cluster.server(1).seen("/api/generate").iter().map(Seen::json).collect();
    // How long the prompt is, which is to unload nothing; and then what follows.
    assert_eq!(asked, [counted, followed]);
}

#[tokio::test]
async fn a_model_that_bounds_its_answers_itself_does_so_on_the_whole() {
    let cluster = cluster(2, Way::Http).await;
    for server in cluster.servers() {
        server.says_at_most(3);
    }
    cluster.server(0).dies_after(["Hello", " big"]);
    cluster.server(1).says(["Hello", " big", " wide", " world"]);
    let olol = proxy(&cluster, "").await;
    let answer = olol.chat("tiny", "hi").await;
    let last = answer.lines().pop().unwrap();
    assert_eq!((answer.said().as_str(), &last["done_reason"]), ("Hello big wide", &json!("length")));
    assert_eq!((&last["prompt_eval_count"], &last["eval_count"]), (&json!(5), &json!(3)));
}

#[tokio::test]
async fn an_answer_that_had_its_last_token_is_over_and_only_its_prompt_is_counted() {
    for (request, path) in [
        (chat_with(&json!({"options": {"num_predict": 2}})), "/api/chat"),
        (
            Request::post("/api/generate", json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 2}})),
            "/api/generate",
        ),
        (
            Request::post(
                "/v1/chat/completions",
                json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 2}),
            ),
            "/v1/chat/completions",
        ),
    ] {
        let cluster = cluster(2, Way::Http).await;
        for server in cluster.servers() {
            server.says(["Hello", " big", " wide", " world"]);
        }
        let olol = proxy(&cluster, "").await;
        let unbroken = olol.ask(&request).await;
        cluster.server(0).dies_after(["Hello", " big"]);
        let answer = olol.ask(&request).await;
        assert_like(&answer, &unbroken, path);
        // It was asked how long the prompt is, and for nothing that a client could have.
        let asked: Vec<Value> = cluster.server(1).seen("/api/generate").iter().map(Seen::json).collect();
        let asked: Vec<&Value> = asked.iter().filter(|body| body["_debug_render_only"] != true).collect();
        assert!(asked.len() == 1 && asked[0]["options"]["num_predict"] == 1 && asked[0]["stream"] == false, "{path}");
        // Where nobody can tell, the answer is as whole as it is.
        cluster.server(1).renders_not();
        let answer = olol.ask(&request).await;
        assert_eq!((answer.said(), answer.ending), (unbroken.said(), Ending::LastChunk), "{path}");
        assert_eq!(answer.lines().pop().unwrap()["eval_count"], unbroken.lines().pop().unwrap()["eval_count"]);
    }
}

#[tokio::test]
async fn half_a_stop_word_that_was_delivered_is_the_last_of_the_text() {
    for way in Way::BOTH {
        let cluster = cluster(2, way).await;
        cluster.server(0).dies_after(["Hello", " ST"]);
        cluster.server(1).stalls_after(["Hello", " ST", "OP"]);
        let olol = proxy(&cluster, "").await;
        let answer = olol.ask(&chat_with(&json!({"options": {"stop": ["STOP"]}}))).await;
        let last = answer.lines().pop().unwrap();
        assert_eq!(
            (answer.said().as_str(), &last["done_reason"], answer.ending),
            ("Hello ST", &json!("stop"), Ending::LastChunk),
            "{way:?}"
        );
        cluster.server(1).saw_cancel().await;
        cluster.server(1).says(["Hello", " ST", "ONE", " wall"]);
        assert_eq!(
            olol.ask(&chat_with(&json!({"options": {"stop": ["STOP"]}}))).await.said(),
            "Hello STONE wall",
            "{way:?}"
        );
    }
}

#[tokio::test]
async fn a_stream_survives_two_servers() {
    for way in Way::BOTH {
        let cluster = cluster(3, way).await;
        for server in cluster.servers() {
            server.says(["Hello", " big", " wide", " world"]);
        }
        let olol = proxy(&cluster, "").await;
        let unbroken = olol.chat("tiny", "hi").await;
        cluster.server(0).dies_after(["Hello"]);
        cluster.server(1).dies_after(["Hello", " big", " wide"]);
        let answer = olol.chat("tiny", "hi").await;
        assert_like(&answer, &unbroken, &format!("{way:?}"));
        assert!(cluster.server(2).work() > 0);
    }
}

#[tokio::test]
async fn a_runner_that_dies_under_its_ollama_is_no_end_either() {
    for way in Way::BOTH {
        let cluster = cluster(2, way).await;
        cluster.server(0).breaks_after(["Hello"], BROKEN);
        let olol = proxy(&cluster, "").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!(
            (answer.said().as_str(), answer.error().as_str(), answer.ending),
            ("Hello world", "", Ending::LastChunk),
            "{way:?}"
        );
        // Without anybody else its own words stand.
        cluster.server(1).renders_not();
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!(
            (answer.said().as_str(), answer.error().as_str(), answer.ending),
            ("Hello", BROKEN, Ending::LastChunk),
            "{way:?}"
        );
    }
}

#[tokio::test]
async fn what_is_wrong_with_the_request_is_said_once() {
    let cluster = cluster(2, Way::Http).await;
    cluster.server(0).breaks_after(["Hello"], "the parser gave up");
    let olol = proxy(&cluster, "").await;
    assert_eq!(olol.chat("tiny", "hi").await.error(), "the parser gave up");
    assert_eq!(cluster.server(1).work(), 0);
}

#[tokio::test]
async fn where_it_would_not_be_the_same_answer_nobody_goes_on() {
    let cluster = cluster(2, Way::Http).await;
    cluster.server(0).dies_after(["Hel"]);
    let olol = proxy(&cluster, PATIENT).await;
    let suffix = Request::post("/api/generate", json!({"model": "tiny", "prompt": "hi", "suffix": "x"}));
    for (what, request) in [
        ("tools", chat_with(&json!({"tools": [{"type": "function"}]}))),
        ("format", chat_with(&json!({"format": "json"}))),
        ("think", chat_with(&json!({"think": true}))),
        ("logprobs", chat_with(&json!({"logprobs": true}))),
        ("suffix", suffix),
    ] {
        let answer = olol.ask(&request).await;
        assert_eq!(
            (answer.said().as_str(), answer.error().as_str(), answer.ending),
            ("Hel", BROKEN, Ending::LastChunk),
            "{what}"
        );
        assert_eq!(cluster.server(1).work(), 0, "{what}");
    }
    let images = chat_with(&json!({"messages": [{"role": "user", "content": "hi", "images": ["aGk="]}]}));
    assert_eq!(olol.ask(&images).await.error(), BROKEN, "images are seen by who finishes the prompt");
    assert_eq!(cluster.server(1).seen("/api/generate").len(), 0);
    let openai =
        Request::post("/v1/chat/completions", json!({"model": "tiny", "messages": [], "stream": true, "tools": [{}]}));
    assert_eq!(olol.ask(&openai).await.ending, Ending::Cut);
}

#[tokio::test]
async fn a_server_that_cannot_go_on_faithfully_is_not_asked_to() {
    type Unfit = fn(&Server) -> &Server;
    let unfit: [(&str, Unfit); 5] = [
        ("too old", |server| server.is_version("0.11.4")),
        ("another model under the name", |server| server.has_another("tiny")),
        ("does not finish prompts", |server| server.renders_not()),
        ("dies too", |server| server.dies_before_head()),
        ("thinks", |server| {
            server.on("POST", "/api/show", whole(200, "application/json", r#"{"capabilities":["thinking"]}"#))
        }),
    ];
    for (what, is_unfit) in unfit {
        let cluster = cluster(2, Way::Http).await;
        is_unfit(cluster.server(1));
        cluster.server(0).dies_after(["Hel"]);
        let olol = proxy(&cluster, IMPATIENT).await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!(
            (answer.said().as_str(), answer.error().as_str(), answer.ending),
            ("Hel", BROKEN, Ending::LastChunk),
            "{what}"
        );
    }
}

#[tokio::test]
async fn a_spare_server_that_fails_too_is_left_for_the_next() {
    for way in Way::BOTH {
        let cluster = cluster(3, way).await;
        cluster.server(0).dies_after(["Hel"]);
        cluster.server(1).dies_before_head();
        let olol = proxy(&cluster, "").await;
        assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world", "{way:?}");
    }
}

#[tokio::test]
async fn who_has_the_model_only_on_disk_goes_on_too() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    cluster.server(0).keeps_loaded("tiny").dies_after(["Hel"]);
    let olol = proxy(&cluster, "").await;
    assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world");
    cluster.server(0).dies_before_head();
    assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world");
}

#[tokio::test]
async fn resuming_can_be_switched_off_and_has_a_budget() {
    for toml in ["[retry]\nresume = \"off\"", "[retry]\nresume-wait-s = 0\nbudget = 0.0\nper-second = 0\nreserve = 0"] {
        let cluster = cluster(2, Way::Http).await;
        cluster.server(0).dies_after(["Hel"]);
        let olol = proxy(&cluster, toml).await;
        assert_eq!(olol.chat("tiny", "hi").await.error(), BROKEN, "{toml}");
        assert_eq!(cluster.server(1).work(), 0);
    }
}

#[tokio::test]
async fn before_the_first_line_any_stream_is_simply_begun_again() {
    for way in Way::BOTH {
        let cluster = cluster(2, way).await;
        cluster.server(0).dies_after([]);
        let olol = proxy(&cluster, "").await;
        let tools = chat_with(&json!({"tools": [{"type": "function"}]}));
        assert_eq!(olol.ask(&tools).await.said(), "Hello world", "{way:?}");
        let anthropic =
            Request::post("/v1/messages", json!({"model": "tiny", "max_tokens": 9, "stream": true, "messages": []}));
        let answer = olol.ask(&anthropic).await;
        assert!(
            answer.text().contains("message_stop") && answer.ending == Ending::LastChunk,
            "{way:?}: {}",
            answer.text()
        );
    }
}

#[tokio::test]
async fn an_answer_in_one_piece_is_asked_for_again() {
    for way in Way::BOTH {
        let cluster = cluster(2, way).await;
        cluster.server(0).dies_after(["Hel"]);
        let olol = proxy(&cluster, "").await;
        let answer = olol.ask(&chat_at_once("tiny", "hi")).await;
        assert_eq!(
            (answer.said().as_str(), answer.server(), answer.ending),
            ("Hello world", "1", Ending::Length),
            "{way:?}"
        );
    }
}

#[tokio::test]
async fn a_client_that_leaves_a_resumed_stream_ends_the_work() {
    for way in Way::BOTH {
        let cluster = cluster(2, way).await;
        cluster.server(0).dies_after(["Hello"]);
        cluster.server(1).stalls_after(["Hello", " world"]);
        let olol = proxy(&cluster, "").await;
        let mut client = olol.begin(&chat("tiny", "hi")).await;
        client.head().await;
        assert_eq!(client.line().await["message"]["content"], "Hello");
        assert_eq!(client.line().await["message"]["content"], " world", "{way:?}");
        drop(client);
        cluster.server(1).saw_cancel().await;
        harness::until("the books are empty", || olol.in_flight(0) + olol.in_flight(1) == 0).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_somebody_is_asked_to_go_on_ends_the_asking() {
    for way in Way::BOTH {
        let cluster = cluster(2, way).await;
        cluster.server(0).dies_after(["Hello"]);
        cluster.server(1).stalls_before_head();
        let olol = proxy(&cluster, "").await;
        let mut client = olol.begin(&chat("tiny", "hi")).await;
        client.head().await;
        client.line().await;
        cluster.server(1).asked(1).await;
        drop(client);
        cluster.server(1).saw_cancel().await;
        harness::until("the books are empty", || olol.in_flight(0) + olol.in_flight(1) == 0).await;
    }
}

#[tokio::test]
async fn a_model_that_fails_is_left_alone_and_its_server_is_not() {
    let cluster = Cluster::of(2).await.weighing([1000, 1]).all_have_loaded("tiny").all_have_loaded("other");
    cluster.server(0).fails("POST", "/api/chat", 500, "llama-server process has terminated: exit status 1");
    let olol = Olol::start(&cluster, "stack.order = ['metrics', 'model-route', 'retry']\n[retry]\nbreaker-open-ms = 600000\nbreaker-max-open-ms = 600000").await;
    for _ in 0..9 {
        assert_eq!(olol.chat("tiny", "hi").await.server(), "1");
    }
    assert_eq!(cluster.server(0).seen("/api/chat").len(), 3);
    let other = Request::post("/api/generate", json!({"model": "other", "prompt": "hi"}));
    assert_eq!(olol.ask(&other).await.server(), "0", "another model of the same server is asked for");
    let metrics = olol.get("/metrics").await.text();
    assert!(metrics.contains("olol_circuit_opened_total{server=\"0\",scope=\"model\"}"), "{metrics}");
}

#[tokio::test]
async fn a_server_that_comes_back_is_asked_again() {
    let cluster = cluster(2, Way::Http).await;
    cluster.server(0).dies_before_head();
    let olol = Olol::start(
        &cluster,
        "stack.order = ['model-route', 'retry']\n[retry]\nbreaker-open-ms = 1\nbreaker-max-open-ms = 1\nramp-s = 0",
    )
    .await;
    for _ in 0..4 {
        assert_eq!(olol.chat("tiny", "hi").await.server(), "1");
    }
    cluster.server(0).says(["Hello", " world"]);
    let is_back = async {
        while olol.chat("tiny", "hi").await.server() != "0" {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    harness::patiently("the server is asked again", is_back).await;
}
