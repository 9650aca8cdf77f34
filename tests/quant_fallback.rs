//! A model is served by the same model in another quantization, in the name that its client uses, and never by anything else.

mod harness;

use harness::olol::{chat, chat_at_once, keep_alive, v1_chat};
use harness::{Answer, Cluster, Gate, Olol, Request, Server, Way, until};
use olol::keys::{self, Order};
use olol_middleware::Pattern;
use serde_json::{Value, json};

const COMPATIBLE: &str = "quant-fallback.policy = \"compatible\"\n";
const ANY: &str = "quant-fallback.policy = \"any\"\n";

/// A chat with a header.
fn strict(model: &str) -> Request {
    chat(model, "hi").header("X-Olol-Quant", "strict")
}

/// Status, and which model has answered if not the one that was asked for.
fn served(answer: &Answer) -> (u16, &str) {
    (answer.status, answer.header("x-olol-model"))
}

#[tokio::test]
async fn what_is_in_memory_answers_in_the_name_that_its_client_uses() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        cluster.server(0).has("tiny:q4_0");
        cluster.server(1).has_loaded("tiny:q8_0");
        let olol = Olol::start(&cluster, COMPATIBLE).await;
        for request in [
            chat("tiny:Q4_0", "hi"),
            chat_at_once("tiny:Q4_0", "hi"),
            v1_chat("tiny:Q4_0", "hi"),
            Request::post("/api/generate", json!({"prompt": "hi", "model": "tiny:Q4_0"})).chunked(),
            Request::post("/v1/chat/completions", json!({"model": "tiny:Q4_0", "messages": [{"role": "user"}]})),
            keep_alive("tiny:Q4_0", 60),
        ] {
            let answer = olol.ask(&request).await;
            let told: Vec<Value> = answer.lines().iter().map(|line| line["model"].clone()).collect();
            assert_eq!((served(&answer), answer.server()), ((200, "tiny:q8_0"), "1"), "{way:?}");
            assert!(!told.is_empty() && told.iter().all(|name| name == "tiny:Q4_0"), "{}", answer.text());
        }
        assert!(cluster.server(1).seen("/api/chat").iter().all(|seen| seen.model() == "tiny:q8_0"));
        assert_eq!(cluster.server(0).work(), 0);
        // What no client may have replaced.
        assert_eq!(served(&olol.ask(&strict("tiny:q4_0")).await), (200, ""));
        assert_eq!(cluster.server(0).work(), 1);
    }
}

#[tokio::test]
async fn without_a_word_in_the_configuration_nothing_is_replaced() {
    let cluster = Cluster::of(2).await;
    cluster.server(0).has("tiny:q4_0");
    cluster.server(1).has_loaded("tiny:q8_0");
    let olol = Olol::start(&cluster, "").await;
    let answer = olol.chat("tiny:q4_0", "hi").await;
    assert_eq!((served(&answer), answer.server()), ((200, ""), "0"));
    assert_eq!(olol.chat("tiny:q5_0", "hi").await.status, 404);
}

#[tokio::test]
async fn what_nobody_has_is_replaced_as_far_as_the_policy_goes_and_else_refused_in_ollamas_words() {
    let cluster = Cluster::of(2).await;
    cluster.server(0).has("tiny:8b-q5_0").has("other:8b-q8_0");
    cluster.server(1).has("tiny:70b-q8_0").has("tiny:8b-chat-q8_0");
    let missing = |answer: &Answer, model: &str| {
        assert_eq!(served(answer), (404, ""));
        assert_eq!(answer.error(), format!("model '{model}' not found"));
    };
    let olol = Olol::start(&cluster, COMPATIBLE).await;
    assert_eq!(served(&olol.chat("tiny:8b-q4_0", "hi").await), (200, "tiny:8b-q5_0"));
    let shown = olol.ask(&Request::post("/api/show", json!({"model": "tiny:8b-q4_0"}))).await;
    assert_eq!(
        (served(&shown), &shown.json()["details"]["quantization_level"]),
        ((200, "tiny:8b-q5_0"), &json!("Q5_0"))
    );
    missing(&olol.chat("tiny:8b-q8_0", "hi").await, "tiny:8b-q8_0");
    missing(&olol.ask(&strict("tiny:8b-q4_0")).await, "tiny:8b-q4_0");
    missing(&olol.chat("nobodys:q4_0", "hi").await, "nobodys:q4_0");
    let olol = Olol::start(&cluster, ANY).await;
    assert_eq!(served(&olol.chat("tiny:8b-q8_0", "hi").await), (200, "tiny:8b-q5_0"));
    missing(&olol.chat("tiny:13b-q4_0", "hi").await, "tiny:13b-q4_0");
    missing(&olol.ask(&strict("tiny:8b-q8_0")).await, "tiny:8b-q8_0");
}

#[tokio::test]
async fn what_servers_say_of_a_model_counts_more_than_its_name() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way);
        let server = cluster.server(0);
        server.has("tiny:q5_0").has_loaded("tiny:q8_0").describes("tiny:q8_0", "llama", "1.5M", "Q4_0");
        let olol = Olol::start(&cluster, COMPATIBLE).await;
        assert_eq!(served(&olol.chat("tiny:q5_0", "hi").await), (200, ""), "{way:?}");
        assert_eq!(served(&olol.chat("tiny:q4_0", "hi").await), (200, "tiny:q8_0"), "{way:?}");
        let cluster = Cluster::of(1).await.over(way);
        let server = cluster.server(0);
        server.has("tiny:q5_0").has_loaded("tiny:q8_0").describes("tiny:q8_0", "qwen2", "1.5M", "Q8_0");
        let olol = Olol::start(&cluster, ANY).await;
        assert_eq!(served(&olol.chat("tiny:q5_0", "hi").await), (200, ""), "{way:?}");
    }
}

#[tokio::test]
async fn who_finds_no_slot_waits_for_what_is_in_memory_and_gets_that() {
    let cluster = Cluster::of(1).await;
    let gate = Gate::closed();
    cluster.server(0).has("tiny:q4_0").has_loaded("tiny:q8_0").echoes().is_paced_by(&gate);
    let olol = Olol::start(&cluster, &format!("{COMPATIBLE}pick.slots = [{{ slots = 1 }}]")).await;
    let mut first = olol.begin(&chat("tiny:q8_0", "first")).await;
    cluster.server(0).asked(1).await;
    let mut second = olol.begin(&chat("tiny:q4_0", "second")).await;
    until("a call waits", || olol.waiting() == 1).await;
    gate.open();
    assert_eq!(first.answer().await.said(), "first");
    let second = second.answer().await;
    assert_eq!((second.said().as_str(), served(&second)), ("second", (200, "tiny:q8_0")));
    assert_eq!(cluster.server(0).holds().1, ["tiny:q8_0"], "nothing else was loaded");
    until("every place is free again", || olol.in_flight(0) == 0).await;
}

#[tokio::test]
async fn another_server_with_the_model_itself_is_asked_before_anybody_waits() {
    let cluster = Cluster::of(2).await;
    let gate = Gate::closed();
    cluster.server(0).has("tiny:q4_0").has_loaded("tiny:q8_0").is_paced_by(&gate);
    cluster.server(1).has("tiny:q4_0");
    let olol = Olol::start(&cluster, &format!("{COMPATIBLE}pick.slots = [{{ slots = 1 }}]")).await;
    let mut first = olol.begin(&chat("tiny:q4_0", "hi")).await;
    cluster.server(0).asked(1).await;
    let second = olol.chat("tiny:q4_0", "hi").await;
    assert_eq!((served(&second), second.server()), ((200, ""), "1"));
    gate.open();
    assert_eq!(served(&first.answer().await), (200, "tiny:q8_0"));
}

#[tokio::test]
async fn a_name_of_the_operators_own_may_lead_to_another_quantization() {
    let cluster = Cluster::of(1).await;
    cluster.server(0).has("tiny:q4_0").has_loaded("tiny:q8_0");
    let olol = Olol::start(&cluster, &format!("{COMPATIBLE}alias.models.mine = \"tiny:q4_0\"")).await;
    let answer = olol.chat("mine", "hi").await;
    assert_eq!(served(&answer), (200, "tiny:q8_0"));
    assert!(answer.lines().iter().all(|line| line["model"] == "mine"), "{}", answer.text());
}

#[tokio::test]
async fn a_model_that_is_gone_from_where_it_was_believed_to_be_is_not_missed() {
    let cluster = Cluster::of(1).await;
    cluster.server(0).has("tiny:q4_0").has_loaded("tiny:q8_0");
    let olol = Olol::start(&cluster, COMPATIBLE).await;
    cluster.server(0).lost("tiny:q8_0");
    let answer = olol.chat("tiny:q4_0", "hi").await;
    assert_eq!((served(&answer), answer.said().as_str()), ((200, ""), "Hello world"));
}

#[tokio::test]
async fn what_is_missing_is_made_of_what_is_not_quantized() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way);
        cluster.server(0).has("tiny:8b-f16");
        cluster.server(1).has("tiny:8b-f16");
        let olol = Olol::start(&cluster, &format!("{COMPATIBLE}quant-fallback.make = true")).await;
        let answer = olol.chat("tiny:8b-q8_0", "hi").await;
        assert_eq!((served(&answer), answer.said().as_str()), ((200, ""), "Hello world"), "{way:?}");
        let made: Vec<Value> =
            cluster.servers().iter().flat_map(|server| server.seen("/api/create")).map(|seen| seen.json()).collect();
        let wanted = json!({"model": "tiny:8b-q8_0", "from": "tiny:8b-f16", "quantize": "Q8_0", "stream": false});
        assert_eq!(made, [wanted], "one server is asked, once");
    }
}

#[tokio::test]
async fn what_is_missing_is_pulled_by_the_name_that_was_asked_for_and_by_no_other() {
    let cluster = Cluster::of(2).await.all_have("other");
    let olol = Olol::start(&cluster, &format!("{COMPATIBLE}quant-fallback.pull = true")).await;
    assert_eq!(olol.chat("nobodys", "hi").await.status, 404);
    assert_eq!(served(&olol.chat("tiny:8b-q4_K_M", "hi").await), (200, ""));
    let pulled: Vec<String> =
        cluster.servers().iter().flat_map(|server| server.seen("/api/pull")).map(|seen| seen.model()).collect();
    assert_eq!(pulled, ["tiny:8b-q4_K_M"]);
}

#[tokio::test]
async fn a_look_tells_what_was_looked_at_and_counts_nothing() {
    let cluster = Cluster::of(2).await;
    cluster.server(0).has("tiny:q4_0");
    cluster.server(1).has_loaded("tiny:q8_0");
    let olol = Olol::start(&cluster, COMPATIBLE).await;
    let body = json!({"model": "tiny:q4_0", "messages": [{"role": "user", "content": "hi"}]});
    let told = olol.ask(&Request::post("/api/status/explain?route=/api/chat", body)).await.json();
    let note = told["trail"].as_array().unwrap().iter().find(|note| note["layer"] == "quant-fallback").unwrap().clone();
    assert_eq!((&told["server"], &note["decision"]), (&json!("1"), &json!("in memory, and as good or better")));
    assert_eq!(note["facts"]["candidates"][0]["verdict"], "compatible");
    assert_eq!(cluster.servers().iter().map(Server::work).sum::<usize>(), 0);
    olol.chat("tiny:q4_0", "hi").await;
    let page = olol.get("/metrics").await.text();
    assert!(page.contains("olol_quant_substitutions_total{from=\"q4_0\",to=\"q8_0\"}"), "{page}");
}

#[tokio::test]
async fn a_key_may_be_strict_and_gets_nothing_that_it_may_not_use() {
    let cluster = Cluster::of(1).await;
    cluster.server(0).has("tiny:q4_0").has_loaded("tiny:q8_0");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let key = |name: &str, more: Order| keys::add(&file, &name.parse().unwrap(), &more).unwrap();
    let plain = key("plain", Order::default());
    let strict = key("strict", Order { strict_quant: true, ..Order::default() });
    let bound = key("bound", Order { models: vec![Pattern::parse("tiny:q4_0").unwrap()], ..Order::default() });
    let olol = Olol::start(&cluster, &format!("{COMPATIBLE}auth.file = {}", json!(file))).await;
    for (key, wanted) in [(plain, "tiny:q8_0"), (strict, ""), (bound, "")] {
        cluster.server(0).has("tiny:q4_0").has_loaded("tiny:q8_0");
        olol.ask(&keep_alive("tiny:q4_0", 0).header("x-api-key", &key)).await;
        olol.knows(&cluster).await;
        let answer = olol.ask(&chat("tiny:q4_0", "hi").header("x-api-key", &key)).await;
        assert_eq!(served(&answer), (200, wanted));
    }
}
