use std::time::Duration;

use super::*;
use crate::cluster::{Loaded, Model, Report};
use crate::error::Phase;
use crate::keys::{Key, Rights};
use crate::names::ModelName;
use crate::testing::{self, Scripted, ask};
use proptest::prelude::*;
use serde_json::{Value, json};
use tower_test::mock::Handle;

/// A model as a test writes it: `NAME`, `NAME=LEVEL`, `NAME=LEVEL/FAMILY/SIZE/BYTES`; a `*` before it: in memory. What is
/// left out is what the tag says, `llama`, `1B` and a thousand bytes.
fn model(text: &str) -> (Model, bool) {
    let (text, is_loaded) = text.strip_prefix('*').map_or((text, false), |rest| (rest, true));
    let (name, details) = text.split_once('=').unwrap_or((text, ""));
    let mut details = details.split('/');
    let mut detail = |usual: &str| details.next().filter(|text| !text.is_empty()).unwrap_or(usual).to_owned();
    let by_tag = level::Parts::of(&ModelName::parse(name).unwrap()).level;
    let quantization = detail(&by_tag.map_or("unknown".to_owned(), |level| level.as_str().to_uppercase()));
    let (family, parameter_size, size) = (detail("llama"), detail("1B"), detail("1000").parse().unwrap());
    (Model { name: name.to_owned(), quantization, family, parameter_size, size, ..Model::default() }, is_loaded)
}

/// Servers "0", "1", … with these models, blanks between them.
async fn cluster(servers: &[&str]) -> Arc<Cluster> {
    let cluster = testing::cluster(&vec![&[][..]; servers.len()]).await;
    for (index, models) in servers.iter().enumerate() {
        tell(&cluster, index, models);
    }
    cluster.catch_up().await;
    cluster
}

fn tell(cluster: &Cluster, index: usize, models: &str) {
    let models: Vec<(Model, bool)> = models.split_whitespace().map(model).collect();
    let loaded = models.iter().filter(|(_, is_loaded)| *is_loaded);
    let loaded = loaded.map(|(model, _)| Loaded { name: model.name.clone(), ..Loaded::default() }).collect();
    let models = models.into_iter().map(|(model, _)| model).collect();
    cluster.report(index, Report { models, loaded, ..Report::default() });
}

fn compatible() -> Config {
    Config { policy: Policy::Compatible, ..Config::default() }
}

fn any() -> Config {
    Config { policy: Policy::Any, ..Config::default() }
}

fn layer(config: Config, cluster: &Arc<Cluster>) -> QuantFallbackLayer {
    QuantFallbackLayer::new(config, cluster.clone(), Arc::default())
}

type Spawned = (QuantFallback<Scripted>, Handle<Call, Reply>);

fn spawn(config: Config, cluster: &Arc<Cluster>) -> Spawned {
    testing::spawn(&layer(config, cluster))
}

fn chat(cluster: &Arc<Cluster>, model: &str) -> Call {
    testing::call_with(cluster, Route::Chat, &json!({"model": model, "messages": [{"role": "user"}]}).to_string())
}

/// What servers are asked for, which of them, and the header of the answer.
async fn sent(config: Config, cluster: &Arc<Cluster>, call: Call) -> (String, String, Option<String>) {
    let (mut service, mut inner) = spawn(config, cluster);
    let answer = ask(&mut service, call);
    let (call, respond) = inner.next_request().await.unwrap();
    let servers: Vec<&str> = call.candidates.iter().map(|server| server.id.as_str()).collect();
    let servers = servers.concat();
    respond.send_response(testing::reply(r#"{"model":"x"}"#));
    let reply = answer.await.unwrap();
    let header = reply.headers.get(rename::SERVED).map(|value| value.to_str().unwrap().to_owned());
    (call.place.model.as_ref().unwrap().to_string(), servers, header)
}

/// The model that a chat with one goes to.
async fn goes(config: &Config, servers: &[&str], asked: &str) -> String {
    let cluster = cluster(servers).await;
    sent(config.clone(), &cluster, chat(&cluster, asked)).await.0
}

#[tokio::test(start_paused = true)]
async fn what_is_in_memory_and_as_good_or_better_comes_first_and_the_nearest_before_others() {
    let config = compatible();
    for (servers, asked, wanted) in [
        // It is in memory itself.
        (&["*m:q4_0 *m:q8_0"][..], "m:q4_0", "m:q4_0"),
        (&["m:q4_0 *m:q8_0", "*m:q4_0"], "m:q4_0", "m:q4_0"),
        // D5, D6: higher serves lower, in the order of the table.
        (&["m:q4_0 *m:q8_0"], "m:q4_0", "m:q8_0"),
        (&["m:q4_0 *m:q8_0 *m:q5_1"], "m:q4_0", "m:q5_1"),
        (&["m:q4_0 *m:q8_0", "*m:q4_1"], "m:q4_0", "m:q4_1"),
        (&["m:q5_0 *m:q5_1 *m:q8_0"], "m:q5_0", "m:q5_1"),
        (&["m:q5_0 *m:q4_0 *m:q4_1 *m:q8_0"], "m:q5_0", "m:q8_0"),
        // D7, D8: 8 and 16 bits are served by themselves alone.
        (&["m:q8_0 *m:f16 *m:q4_0"], "m:q8_0", "m:q8_0"),
        (&["m:f16 *m:q8_0 *m:bf16"], "m:f16", "m:f16"),
        // K-quants.
        (&["m:q4_k_m *m:q4_k_s *m:q6_k"], "m:q4_k_m", "m:q6_k"),
        (&["m:q4_k_m *m:q4_0 *m:f16"], "m:q4_k_m", "m:q4_k_m"),
        // Nothing lower.
        (&["m:q5_0 *m:q4_0"], "m:q5_0", "m:q5_0"),
    ] {
        assert_eq!(goes(&config, servers, asked).await, wanted, "{asked} of {servers:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_model_itself_is_loaded_before_another_one_is() {
    let config = compatible();
    assert_eq!(goes(&config, &["m:q4_0 m:q8_0"], "m:q4_0").await, "m:q4_0");
    assert_eq!(goes(&config, &["m:q8_0", "m:q4_0"], "m:q4_0").await, "m:q4_0");
}

#[tokio::test(start_paused = true)]
async fn where_nobody_has_the_model_the_nearest_that_is_as_good_stands_for_it() {
    for (servers, asked, by_compatible, by_any) in [
        (&["m:q8_0 m:q5_0"][..], "m:q4_0", "m:q5_0", "m:q5_0"),
        (&["m:q4_0 m:q5_1=Q5_1/llama/1B/900"], "m:q8_0", "m:q8_0", "m:q5_1"),
        (&["m:q4_0 *m:q5_1"], "m:q8_0", "m:q8_0", "m:q5_1"),
        (&["m:f16"], "m:q8_0", "m:q8_0", "m:f16"),
        (&["other:q8_0"], "m:q4_0", "m:q4_0", "m:q4_0"),
        // Whoever names no quantization is content with any, but that is no promise of the lattice.
        (&["m:8b-q8_0"], "m:8b", "m:8b", "m:8b-q8_0"),
    ] {
        assert_eq!(goes(&compatible(), servers, asked).await, by_compatible, "{asked} of {servers:?}");
        assert_eq!(goes(&any(), servers, asked).await, by_any, "{asked} of {servers:?}, any");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_reported_counts_and_not_the_tag() {
    let config = compatible();
    for (servers, asked, wanted) in [
        (&["m:q4_0 *m:q8_0=Q3_K_S"][..], "m:q4_0", "m:q4_0"),
        (&["m:q4_0 *m:q2_k=Q8_0"], "m:q4_0", "m:q2_k"),
        (&["m:q4_0=Q8_0 *m:q5_0"], "m:q4_0", "m:q4_0"),
        (&["m:8b-q4_0 *m:8b=Q8_0"], "m:8b-q4_0", "m:8b"),
        (&["m:8b=Q4_K_M *m:8b-q8_0"], "m:8b", "m:8b-q8_0"),
        (&["m:q4_0 *m=Q4_0"], "m:q4_0", "m:q4_0"),
        (&["m:8b-q4_0 *m:8b=Q4_0"], "m:8b-q4_0", "m:8b"),
        // What an Ollama has no word for is what its tag says.
        (&["m:iq3_m=unknown *m:iq4_xs=unknown"], "m:iq3_m", "m:iq4_xs"),
    ] {
        assert_eq!(goes(&config, servers, asked).await, wanted, "{asked} of {servers:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_but_the_same_model_ever_stands_for_one() {
    for config in [compatible(), any()] {
        for servers in [
            ["m:8b-q4_0 *m:70b-q8_0"],
            ["m:8b-q4_0 *m:8b-chat-q8_0"],
            ["m:8b-q4_0 *mm:8b-q8_0"],
            ["m:8b-q4_0 *you/m:8b-q8_0"],
            ["m:8b-q4_0 *m:8b-q8_0=Q8_0/qwen"],
            ["m:8b-q4_0 *m:8b-q8_0=Q8_0/llama/2B"],
            ["*m:70b-q8_0"],
            ["*m:8b-chat-q8_0"],
            ["*m:q8_0"],
            // Which of the two would it be?
            ["*m:8b-q8_0=Q8_0/qwen *m:8b-q5_0"],
        ] {
            assert_eq!(goes(&config, &servers, "m:8b-q4_0").await, "m:8b-q4_0", "{servers:?}");
        }
    }
    // Servers disagree about what is asked for.
    let servers = ["m:8b-q4_0 *m:8b-q8_0", "m:8b-q4_0=Q4_0/qwen"];
    assert_eq!(goes(&compatible(), &servers, "m:8b-q4_0").await, "m:8b-q4_0");
}

#[tokio::test(start_paused = true)]
async fn only_servers_that_have_the_same_model_are_asked_for_it() {
    let cluster = cluster(&["*m:8b-q8_0", "m:8b-q8_0=Q8_0/qwen m:8b-q4_0", "m:8b-q8_0"]).await;
    let (model, servers, header) = sent(compatible(), &cluster, chat(&cluster, "m:8b-q4_0")).await;
    assert_eq!((&*model, &*servers, header.as_deref()), ("m:8b-q8_0", "02", Some("m:8b-q8_0")));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_changed_where_nothing_is_to_be_done() {
    let cluster = cluster(&["*m:q4_0 *m:q8_0"]).await;
    assert_eq!(
        sent(compatible(), &cluster, chat(&cluster, "m:q4_0")).await,
        ("m:q4_0".to_owned(), "0".to_owned(), None)
    );
    let call = chat(&cluster, "m:q4_0");
    let (mut service, mut inner) = spawn(compatible(), &cluster);
    let answer = ask(&mut service, call);
    let (call, respond) = inner.next_request().await.unwrap();
    assert!(call.edits.is_none() && call.head.trail.take().is_empty());
    respond.send_response(testing::reply("hi"));
    answer.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn servers_that_cannot_be_asked_count_for_nothing() {
    let cluster = cluster(&["*m:q4_0", "*m:q8_0", "m:q4_0"]).await;
    cluster.check_failed(0, "gone".to_owned(), 1);
    cluster.catch_up().await;
    let (model, servers, _) = sent(compatible(), &cluster, chat(&cluster, "m:q4_0")).await;
    assert_eq!((&*model, &*servers), ("m:q8_0", "1"));
    // Nor do those that a rule has taken out.
    let mut call = chat(&cluster, "m:q4_0");
    call.candidates.only(2);
    assert_eq!(sent(compatible(), &cluster, call).await.0, "m:q4_0");
    cluster.check_failed(2, "gone".to_owned(), 1);
    cluster.check_failed(1, "gone".to_owned(), 1);
    cluster.catch_up().await;
    assert_eq!(sent(compatible(), &cluster, chat(&cluster, "m:q4_0")).await.0, "m:q4_0");
}

#[tokio::test(start_paused = true)]
async fn of_what_fits_the_largest_is_taken_and_else_the_smallest() {
    let mib = |count: u64| (count << 20).to_string();
    let servers = [
        format!("m:q2_k=/llama/1B/{} m:q4_0=/llama/1B/{}", mib(20), mib(40)),
        format!("m:q5_0=/llama/1B/{} m:q4_0=/llama/1B/{}", mib(50), mib(40)),
    ];
    let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
    let with = |memory: &str| -> Config {
        let memory: BTreeMap<Pattern, NonZeroU64> = toml::from_str(memory).unwrap();
        Config { memory_mib: memory, ..any() }
    };
    for (memory, asked, wanted) in [
        ("", "m:q8_0", "m:q2_k"),
        ("'*' = 100", "m:q8_0", "m:q5_0"),
        ("'*' = 59", "m:q8_0", "m:q4_0"),
        ("'*' = 59\n1 = 60", "m:q8_0", "m:q5_0"),
        ("'*' = 10", "m:q8_0", "m:q2_k"),
        ("0 = 48\n1 = 10", "m:q8_0", "m:q4_0"),
        // What is as good comes before what fits better, unless it is known not to fit.
        ("", "m:q4_1", "m:q5_0"),
        ("'*' = 59", "m:q4_1", "m:q4_0"),
    ] {
        assert_eq!(goes(&with(memory), &servers, asked).await, wanted, "{asked}, {memory}");
    }
    let compatible = Config { policy: Policy::Compatible, ..with("'*' = 59") };
    assert_eq!(goes(&compatible, &servers, "m:q4_1").await, "m:q5_0");
}

#[tokio::test(start_paused = true)]
async fn who_is_strict_gets_what_is_asked_for() {
    let cluster = cluster(&["m:q4_0 *m:q8_0"]).await;
    for (word, wanted) in [("strict", "m:q4_0"), ("STRICT", "m:q4_0"), ("what?", "m:q4_0"), ("", "m:q8_0")] {
        let mut call = chat(&cluster, "m:q4_0");
        Arc::get_mut(&mut call.head).unwrap().headers.insert(HEADER, word.parse().unwrap());
        assert_eq!(sent(any(), &cluster, call).await.0, wanted, "{word}");
    }
    for (strict_quant, wanted) in [(true, "m:q4_0"), (false, "m:q8_0")] {
        let call = chat(&cluster, "m:q4_0");
        call.head.key.set(Arc::new(Key { strict_quant, ..Key::default() })).unwrap();
        assert_eq!(sent(any(), &cluster, call).await.0, wanted);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_is_not_given_what_it_may_not_use() {
    let cluster = cluster(&["m:q4_0 *m:q5_0 *m:q8_0"]).await;
    for (allowed, wanted) in [("*", "m:q5_0"), ("m:q8_0", "m:q8_0"), ("m:q4_0", "m:q4_0")] {
        let call = chat(&cluster, "m:q4_0");
        let models = Some([Pattern::parse(allowed).unwrap()].into());
        call.head.key.set(Arc::new(Key { models, ..Key::default() })).unwrap();
        assert_eq!(sent(any(), &cluster, call).await.0, wanted, "{allowed}");
    }
}

#[tokio::test(start_paused = true)]
async fn only_calls_that_run_a_model_are_concerned() {
    let cluster = cluster(&["m:q4_0 *m:q8_0"]).await;
    let body = |model: &str| json!({"model": model, "prompt": "hi", "input": "hi"}).to_string();
    for (route, wanted) in [
        (Route::Generate, "m:q8_0"),
        (Route::V1Chat, "m:q8_0"),
        (Route::V1Messages, "m:q8_0"),
        (Route::Embed, "m:q4_0"),
        (Route::V1Embeddings, "m:q4_0"),
        (Route::Show, "m:q4_0"),
        (Route::Pull, "m:q4_0"),
        (Route::Delete, "m:q4_0"),
        (Route::Push, "m:q4_0"),
    ] {
        let call = testing::call_with(&cluster, route, &body("m:q4_0"));
        assert_eq!(sent(compatible(), &cluster, call).await.0, wanted, "{route:?}");
    }
    let embeddings = Config { embeddings: true, ..compatible() };
    let call = testing::call_with(&cluster, Route::Embed, &body("m:q4_0"));
    assert_eq!(sent(embeddings, &cluster, call).await.0, "m:q8_0");
    // To unload a model is meant of that very one.
    let unload = testing::call_with(&cluster, Route::Generate, r#"{"model":"m:q4_0","keep_alive":0}"#);
    assert_eq!(sent(compatible(), &cluster, unload).await.0, "m:q4_0");
    // What nobody has is shown as what would stand for it.
    let show = testing::call_with(&cluster, Route::Show, r#"{"model":"m:q4_1"}"#);
    assert_eq!(sent(compatible(), &cluster, show).await.0, "m:q8_0");
}

#[tokio::test(start_paused = true)]
async fn who_only_asks_is_told_all_that_was_looked_at() {
    let cluster = cluster(&["m:q4_0 *m:q8_0 *m:q3_k_s", "m:q8_0 m:q5_0=Q5_0/qwen"]).await;
    let mut call = chat(&cluster, "m:q4_0");
    Arc::get_mut(&mut call.head).unwrap().dry = true;
    let head = call.head.clone();
    let (mut service, mut inner) = spawn(compatible(), &cluster);
    let answer = ask(&mut service, call);
    let (call, respond) = inner.next_request().await.unwrap();
    respond.send_response(testing::reply(""));
    assert!(!answer.await.unwrap().headers.contains_key(rename::SERVED));
    assert_eq!(call.place.model.as_ref().unwrap().as_str(), "m:q8_0");
    let told = serde_json::to_value(head.trail.take()).unwrap();
    assert_eq!(told[0]["decision"], "in memory, and as good or better");
    assert_eq!((&told[0]["facts"]["from"], &told[0]["facts"]["to"]), (&json!("q4_0"), &json!("q8_0")));
    let rows = told[0]["facts"]["candidates"].as_array().unwrap();
    let verdict = |model: &str| &rows.iter().find(|row| row["model"] == model).unwrap()["verdict"];
    assert_eq!(
        [verdict("m:q8_0"), verdict("m:q3_k_s"), verdict("m:q5_0")],
        [&json!("compatible"), &json!("not accepted for this level"), &json!("another family or size")]
    );
}

#[tokio::test(start_paused = true)]
async fn an_answer_keeps_the_name_and_the_header_tells_the_truth() {
    let cluster = cluster(&["m:q4_0 *m:Q8_0"]).await;
    let (mut service, mut inner) = spawn(compatible(), &cluster);
    let answer = ask(&mut service, chat(&cluster, "M:q4_0"));
    let (call, respond) = inner.next_request().await.unwrap();
    let edited = call.payload.again().unwrap().edited(&call.edits.as_ref().unwrap().body);
    let crate::call::Payload::Whole(pieces) = edited else { unreachable!() };
    // By the very name that its server lists.
    assert_eq!(serde_json::from_slice::<Value>(&pieces.concat()).unwrap()["model"], "m:Q8_0");
    respond.send_response(testing::stream("0", &["{\"model\":\"m:Q8_0\",\"done\":true}\n"], false));
    let reply = answer.await.unwrap();
    assert_eq!(reply.headers[rename::SERVED], "m:Q8_0");
    assert_eq!(reply.body.collect(99).await.unwrap(), "{\"model\":\"M:q4_0\",\"done\":true}\n");
}

#[tokio::test(start_paused = true)]
async fn what_turns_out_to_be_gone_is_replaced_by_the_next_and_at_last_by_the_model_itself() {
    let cluster = cluster(&["*m:q5_0 *m:q8_0", "m:q4_1"]).await;
    let (mut service, mut inner) = spawn(compatible(), &cluster);
    let answer = ask(&mut service, chat(&cluster, "m:q4_0"));
    for (gone, left) in [("m:q5_0", "*m:q8_0"), ("m:q8_0", "")] {
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!(call.place.model.as_ref().unwrap().as_str(), gone);
        tell(&cluster, 0, left);
        if left.is_empty() {
            tell(&cluster, 1, "");
        }
        cluster.catch_up().await;
        respond.send_response(testing::refusal("0"));
    }
    let (call, respond) = inner.next_request().await.unwrap();
    assert_eq!((call.place.model.as_ref().unwrap().as_str(), call.edits.is_none()), ("m:q4_0", true));
    respond.send_response(testing::refusal("0"));
    let reply = answer.await.unwrap();
    assert!(reply.status == StatusCode::NOT_FOUND && !reply.headers.contains_key(rename::SERVED));
}

#[tokio::test(start_paused = true)]
async fn without_a_slot_where_it_is_in_memory_the_model_itself_is_asked_for_elsewhere() {
    let cluster = cluster(&["m:q4_0 *m:q8_0", "m:q4_0"]).await;
    let runner = |name: &str, server: usize| {
        let snapshot = cluster.snapshot();
        snapshot.known(&ModelName::parse(name).unwrap()).unwrap().runners.at(&snapshot.servers[server])
    };
    let busy = |runner: &Arc<crate::runner::Runner>| Error::Busy { runners: vec![runner.clone()], retry_after: None };
    let (better, itself) = (runner("m:q8_0", 0), runner("m:q4_0", 1));
    let (mut service, mut inner) = spawn(compatible(), &cluster);
    let answer = ask(&mut service, chat(&cluster, "m:q4_0"));
    inner.next_request().await.unwrap().1.send_error(busy(&better));
    let (call, respond) = inner.next_request().await.unwrap();
    let servers: Vec<&str> = call.candidates.iter().map(|server| server.id.as_str()).collect();
    assert_eq!((call.place.model.as_ref().unwrap().as_str(), servers), ("m:q4_0", vec!["1"]));
    respond.send_error(busy(&itself));
    let Err(Error::Busy { runners, .. }) = answer.await else { panic!("not busy") };
    assert!(Arc::ptr_eq(&runners[0], &better) && Arc::ptr_eq(&runners[1], &itself));
    // Whoever has waited for a slot gets what it is of.
    for (runner, wanted) in [(better, "m:q8_0"), (itself, "m:q4_0")] {
        let mut call = chat(&cluster, "m:q4_0");
        call.lease = crate::slots::Lease::take(&runner);
        let (mut service, mut inner) = spawn(compatible(), &cluster);
        let _answer = ask(&mut service, call);
        let (call, _respond) = inner.next_request().await.unwrap();
        assert_eq!((call.place.model.as_ref().unwrap().as_str(), call.lease.is_some()), (wanted, true));
    }
    // A slot of something else is given back.
    let mut call = chat(&cluster, "m:q4_0");
    tell(&cluster, 1, "m:q4_0 x");
    cluster.catch_up().await;
    call.candidates.renew(cluster.snapshot());
    call.lease = crate::slots::Lease::take(&runner("x", 1));
    let (mut service, mut inner) = spawn(compatible(), &cluster);
    let _answer = ask(&mut service, call);
    assert!(inner.next_request().await.unwrap().0.lease.is_none());
}

#[tokio::test(start_paused = true)]
async fn other_errors_pass() {
    let cluster = cluster(&["m:q4_0 *m:q8_0"]).await;
    let (mut service, mut inner) = spawn(compatible(), &cluster);
    let answer = ask(&mut service, chat(&cluster, "m:q4_0"));
    inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Waiting, false));
    assert!(matches!(answer.await, Err(Error::Server { .. })));
}

/// The call that fetches something, as what its server gets.
fn fetched(call: &Call) -> (Route, Value, Vec<String>) {
    let crate::call::Payload::Whole(pieces) = call.payload.again().unwrap() else { unreachable!() };
    let servers = call.candidates.iter().map(|server| server.id.to_string()).collect();
    (call.route, serde_json::from_slice(&pieces.concat()).unwrap(), servers)
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_is_made_once_of_an_unquantized_one_and_whoever_has_nothing_waits_for_it() {
    let cluster = cluster(&["x", "m:8b-f16", "x"]).await;
    let (mut service, mut inner) = spawn(Config { make: true, pull: true, ..compatible() }, &cluster);
    let answers: Vec<_> = (0..3).map(|_| ask(&mut service, chat(&cluster, "m:8b-Q4_K_M"))).collect();
    let (call, respond) = inner.next_request().await.unwrap();
    let body = json!({"model": "m:8b-Q4_K_M", "from": "m:8b-f16", "quantize": "Q4_K_M", "stream": false});
    assert_eq!(fetched(&call), (Route::Create, body, vec!["1".to_owned()]));
    tokio::time::sleep(Duration::from_secs(60)).await;
    tell(&cluster, 1, "m:8b-f16 m:8b-q4_k_m");
    respond.send_response(testing::reply(r#"{"status":"success"}"#));
    for _ in &answers {
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!((call.route, call.place.model.as_ref().unwrap().as_str()), (Route::Chat, "m:8b-q4_k_m"));
        assert!(call.candidates.snapshot().known(call.place.model.as_ref().unwrap()).is_some());
        respond.send_response(testing::reply("hi"));
    }
    for answer in answers {
        assert!(!answer.await.unwrap().headers.contains_key(rename::SERVED));
    }
}

#[tokio::test(start_paused = true)]
async fn what_can_stand_for_it_does_so_while_the_model_is_pulled() {
    let cluster = cluster(&["m:q8_0"]).await;
    let (mut service, mut inner) = spawn(Config { make: true, pull: true, ..compatible() }, &cluster);
    let answer = ask(&mut service, chat(&cluster, "m:q4_0"));
    let mut seen = Vec::new();
    for _ in 0..2 {
        let (call, respond) = inner.next_request().await.unwrap();
        seen.push(fetched(&call).0);
        let body = if call.route == Route::Pull {
            assert_eq!(fetched(&call).1, json!({"model": "m:q4_0", "stream": false}));
            r#"{"error":"pull model manifest: file does not exist"}"#
        } else {
            assert_eq!(call.place.model.as_ref().unwrap().as_str(), "m:q8_0");
            "{}"
        };
        respond.send_response(testing::reply(body));
    }
    answer.await.unwrap();
    assert!(seen.contains(&Route::Pull) && seen.contains(&Route::Chat), "{seen:?}");
    tokio::time::sleep(Duration::from_secs(5)).await;
    // What has failed is not tried again at once.
    let answer = ask(&mut service, chat(&cluster, "m:q4_0"));
    let (call, respond) = inner.next_request().await.unwrap();
    assert_eq!(call.route, Route::Chat);
    respond.send_response(testing::reply("{}"));
    answer.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_what_is_fetched_has_an_end() {
    let cluster = cluster(&["x"]).await;
    let config = Config { pull: true, wait_s: Seconds::new(30), ..compatible() };
    let (mut service, mut inner) = spawn(config, &cluster);
    let answer = ask(&mut service, chat(&cluster, "m:q4_0"));
    let (_pull, _respond) = inner.next_request().await.unwrap();
    let before = tokio::time::Instant::now();
    let (call, respond) = inner.next_request().await.unwrap();
    assert_eq!((call.route, before.elapsed().as_secs()), (Route::Chat, 30));
    respond.send_response(testing::refusal("0"));
    assert_eq!(answer.await.unwrap().status, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_fetched_that_nobody_allows() {
    let cluster = cluster(&["m:f16=F16/llama/1B"]).await;
    let allowed = Config { make: true, pull: true, ..compatible() };
    let no_rights = Key { may: Rights::INFER, ..Key::default() };
    for (config, key, asked) in [
        (compatible(), None, "m:q4_k_m"),
        // Only quantizations are fetched, and only some can be made.
        (allowed.clone(), None, "nobodys"),
        (Config { pull: false, ..allowed.clone() }, None, "m:q5_k_m"),
        (allowed, Some(no_rights), "m:q4_k_m"),
    ] {
        let call = chat(&cluster, asked);
        if let Some(key) = key {
            call.head.key.set(Arc::new(key)).unwrap();
        }
        assert_eq!(sent(config, &cluster, call).await.0, ModelName::parse(asked).unwrap().to_string());
    }
}

#[test]
fn a_table_is_read() {
    let config: Config = toml::from_str("policy = \"any\"\n[accept]\nQ8_0 = [\"q8_0\", \"f16\"]").unwrap();
    assert_eq!(config.policy, Policy::Any);
    let error = toml::from_str::<Config>("policy = \"higher\"").unwrap_err().to_string();
    assert!(error.contains("unknown variant `higher`") && error.contains("`compatible`"), "{error}");
    assert!(toml::from_str::<Config>("[accept]\nq4_0 = [\"q9\"]").is_err());
    assert!(toml::from_str::<Config>("ladder = [\"q4_0\", \"q4_0\"]").is_err());
}

/// A model of a small world: few names, families, sizes and levels, so that there is much to confuse.
fn some_model() -> impl Strategy<Value = (String, bool)> {
    let name = prop::sample::select(vec!["m", "m:8b", "m:8b-chat", "m:70b", "n:8b", "you/m:8b"]);
    let level = prop::sample::select(vec!["", "q2_k", "q4_0", "q4_k_m", "q5_0", "q8_0", "f16"]);
    let reported = prop::sample::select(vec!["Q2_K", "Q4_0", "Q5_0", "Q8_0", "F16", "unknown"]);
    let family = prop::sample::select(vec!["llama", "qwen"]);
    let size = prop::sample::select(vec!["8B", "70B"]);
    (name, level, reported, family, size, any_bool()).prop_map(|(name, level, reported, family, size, is_loaded)| {
        let glue = if level.is_empty() {
            ""
        } else if name.contains(':') {
            "-"
        } else {
            ":"
        };
        (format!("{name}{glue}{level}={reported}/{family}/{size}"), is_loaded)
    })
}

fn any_bool() -> impl Strategy<Value = bool> {
    prop::bool::ANY
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever servers have and whatever is asked for: what stands for a model has its stem, and where it is known the same
    /// family and size, on every server that may be asked; under `compatible` it is never lower.
    #[test]
    fn what_stands_for_a_model_is_the_same_model(
        servers in prop::collection::vec(prop::collection::vec(some_model(), 0..8), 1..4),
        (asked, _) in some_model(),
        is_any in any_bool(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let asked = asked.split('=').next().unwrap().to_owned();
        runtime.block_on(async {
            let texts: Vec<String> = servers.iter().map(|models| {
                // A server has a name once.
                let mut names = std::collections::HashSet::new();
                let models = models.iter().filter(|(text, _)| names.insert(text.split('=').next().unwrap()));
                models.map(|(text, is_loaded)| [if *is_loaded { "*" } else { "" }, text, " "].concat()).collect()
            }).collect();
            let cluster = cluster(&texts.iter().map(String::as_str).collect::<Vec<_>>()).await;
            let config = if is_any { any() } else { compatible() };
            let lattice = Lattice::new(&config.accept, &config.ladder);
            let (model, asked_servers, _) = sent(config, &cluster, chat(&cluster, &asked)).await;
            let (model, wanted) = (ModelName::parse(&model).unwrap(), ModelName::parse(&asked).unwrap());
            if model == wanted {
                return;
            }
            let (parts, wanted_parts) = (level::Parts::of(&model), level::Parts::of(&wanted));
            assert_eq!(parts.stem, wanted_parts.stem);
            let snapshot = cluster.snapshot();
            let reports = |name: &ModelName| -> Vec<(Model, usize)> {
                snapshot.servers.iter().flat_map(|server| {
                    let models = server.report.models.iter();
                    models.filter(|held| held.canonical() == Some(name)).map(|held| (Model::clone(held), server.index))
                }).collect()
            };
            let served: Vec<Model> = reports(&model).into_iter()
                .filter(|(_, index)| asked_servers.contains(&index.to_string())).map(|(model, _)| model).collect();
            assert!(!served.is_empty());
            let kind = |model: &Model| (model.family.clone(), model.parameter_size.clone());
            assert!(served.iter().all(|model| kind(model) == kind(&served[0]) && model.quantization == served[0].quantization));
            let own = reports(&wanted);
            assert!(own.iter().all(|(own, _)| kind(own) == kind(&served[0])));
            if !is_any {
                let level = |model: &Model, tag| Level::parse(&model.quantization).or(tag).unwrap();
                let from = own.first().map_or_else(|| wanted_parts.level.unwrap(), |(own, _)| level(own, wanted_parts.level));
                assert!(lattice.row(from).contains(&level(&served[0], parts.level)));
            }
        });
    }
}
