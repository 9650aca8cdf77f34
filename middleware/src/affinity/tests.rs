//! The layer as a whole: around a scripted service, and around the leaf with servers that answer at once.

use std::collections::VecDeque;

use bytes::Bytes;
use http::StatusCode;
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use serde_json::{Value, json};

use super::*;
use crate::call::{Body, Chunk};
use crate::cluster::Cluster;
use crate::pick::Pick;
use crate::testing::{self, Always, ask};

/// An affinity that remembers nothing yet.
fn layer() -> AffinityLayer {
    layer_with(Config::default())
}

fn layer_with(config: Config) -> AffinityLayer {
    AffinityLayer::new(config, Arc::default(), Arc::default())
}

async fn servers(count: usize) -> Arc<Cluster> {
    testing::weighted_cluster(&vec![1; count]).await
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn answer(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

fn chat(cluster: &Arc<Cluster>, messages: &[Value]) -> Call {
    testing::call_with(cluster, Route::Chat, &json!({"model": "tiny", "messages": messages}).to_string())
}

/// A conversation in which so many turns were taken.
fn turns(name: &str, count: usize) -> Vec<Value> {
    let more = (1..count).flat_map(|turn| [answer(&format!("{name}, {turn}")), user(&format!("more {turn}"))]);
    [user(name)].into_iter().chain(more).collect()
}

/// Sends a call, answers for a server, and gives back what the server was asked and what came back.
async fn answered(layer: &AffinityLayer, call: Call, by: &str) -> (Call, Reply) {
    let (mut service, mut inner) = testing::spawn(layer);
    let reply = ask(&mut service, call);
    let (call, respond) = inner.next_request().await.unwrap();
    respond.send_response(testing::reply_of(by, "hi"));
    (call, reply.await.unwrap())
}

fn decision(reply: &Reply) -> &str {
    reply.headers.get(DECISION).map_or("", |value| value.to_str().unwrap())
}

fn preferred(call: &Call) -> &Preferred {
    call.preferred.as_deref().unwrap()
}

/// The server that a lone call goes to.
async fn home(layer: &AffinityLayer, call: Call) -> (String, Placed) {
    let reply = layer.layer(Pick::new(Always, Arc::default())).call(call).await.unwrap();
    let placed = Placed::ALL.into_iter().find(|placed| decision(&reply).ends_with(placed.as_str())).unwrap();
    (reply.body.outcome().servers[0].to_string(), placed)
}

#[tokio::test(start_paused = true)]
async fn a_later_turn_goes_where_the_one_before_went() {
    let (cluster, layer) = (servers(4).await, layer());
    for name in ["ada", "bob", "eve"] {
        let (asked, reply) = answered(&layer, chat(&cluster, &turns(name, 1)), "2").await;
        assert!(preferred(&asked).yields && preferred(&asked).servers.len() == 4);
        assert_eq!(decision(&reply), "affinity-miss");
        for count in 2..5 {
            let (asked, reply) = answered(&layer, chat(&cluster, &turns(name, count)), "2").await;
            let Preferred { servers, yields, holders, cached, prompt, .. } = preferred(&asked);
            assert_eq!((servers[0], *yields, &holders[..]), (2, false, &[2][..]));
            assert!(*cached > 0 && cached < prompt);
            assert_eq!(decision(&reply), "affinity-hit");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_its_client_did_to_an_answer_a_conversation_goes_on() {
    let (cluster, layer) = (servers(4).await, layer());
    answered(&layer, chat(&cluster, &turns("ada", 3)), "1").await;
    let mut edited = turns("ada", 3);
    edited.truncate(4);
    edited.extend([user("something else"), answer("shortened"), user("and?")]);
    let (asked, _) = answered(&layer, chat(&cluster, &edited), "1").await;
    assert_eq!(preferred(&asked).servers[0], 1);
}

#[tokio::test(start_paused = true)]
async fn a_conversation_with_a_name_is_known_by_that_alone() {
    let (cluster, layer) = (servers(4).await, layer());
    let named = |header: &'static str, text: &str| {
        let mut call = chat(&cluster, &[user(text)]);
        Arc::get_mut(&mut call.head).unwrap().headers.insert(header, HeaderValue::from_static("ada-1"));
        call
    };
    let (_, reply) = answered(&layer, named("x-session-id", "hi"), "3").await;
    assert_eq!(reply.headers.get(SESSION).unwrap(), "ada-1");
    let (asked, reply) = answered(&layer, named("x-smg-routing-key", "something else"), "3").await;
    assert_eq!((preferred(&asked).servers[0], decision(&reply)), (3, "affinity-hit"));
    let with_key = |text: &str| json!({"model": "tiny", "messages": [user(text)], "prompt_cache_key": "k"}).to_string();
    answered(&layer, testing::call_with(&cluster, Route::V1Chat, &with_key("a")), "0").await;
    let (asked, reply) = answered(&layer, testing::call_with(&cluster, Route::V1Chat, &with_key("b")), "0").await;
    assert_eq!((preferred(&asked).servers[0], decision(&reply)), (0, "affinity-hit"));
    assert!(reply.headers.get(SESSION).is_none());
}

#[tokio::test(start_paused = true)]
async fn the_conversations_of_a_person_begin_at_one_server_and_stay_where_they_are() {
    let (cluster, layer) = (servers(4).await, layer());
    let body = |messages: &[Value]| json!({"model": "tiny", "messages": messages, "user": "ada"}).to_string();
    let call = |messages: &[Value]| testing::call_with(&cluster, Route::V1Chat, &body(messages));
    let first = home(&layer, call(&turns("a", 1))).await.0;
    for name in ["b", "c", "d", "e"] {
        assert_eq!(home(&layer, call(&turns(name, 1))).await, (first.clone(), Placed::Miss));
    }
    let other = (first.parse::<usize>().unwrap() + 1) % 4;
    answered(&layer, call(&turns("f", 1)), &other.to_string()).await;
    assert_eq!(home(&layer, call(&turns("f", 2))).await, (other.to_string(), Placed::Hit));
}

#[tokio::test(start_paused = true)]
async fn tokens_of_an_answer_are_known_when_they_come_back() {
    let cluster = servers(4).await;
    let generate = |body: Value| testing::call_with(&cluster, Route::Generate, &body.to_string());
    let last = r#"{"response":"[\"context\":[1]","done":true,"context":[101,102,103,104],"eval_count":3}"#;
    for cut in ["", "\":[101", "[101", "02,", "]", "}"].map(|after| last.rfind(after).unwrap()) {
        let layer = layer();
        let (mut service, mut inner) = testing::spawn(&layer);
        let reply = ask(&mut service, generate(json!({"model": "tiny", "prompt": "hi"})));
        let chunks = ["{\"response\":\"hi\",\"done\":false}\n", &last[..cut], &last[cut..]];
        let chunks = chunks.map(|text| Ok(Chunk::from(Bytes::copy_from_slice(text.as_bytes()))));
        let mut answer = testing::reply("");
        answer.body = Body::new(futures_util::stream::iter(chunks));
        answer.body.outcome_mut().servers.push(crate::ServerId::new("2"));
        inner.next_request().await.unwrap().1.send_response(answer);
        reply.await.unwrap().body.collect(999).await.unwrap();
        let next = json!({"model": "tiny", "prompt": "more", "context": [101, 102, 103, 104]});
        assert_eq!(decision(&answered(&layer, generate(next), "2").await.1), "affinity-hit", "cut at {cut}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_not_remembered() {
    let (cluster, layer) = (servers(2).await, layer());
    let (mut service, mut inner) = testing::spawn(&layer);
    let reply = ask(&mut service, chat(&cluster, &turns("ada", 1)));
    inner.next_request().await.unwrap().1.send_response(testing::refusal("1"));
    assert_eq!(reply.await.unwrap().status, StatusCode::NOT_FOUND);
    assert!(layer.rules.table.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_dry_call_says_what_would_be_done_and_changes_nothing() {
    let (cluster, layer) = (servers(4).await, layer());
    answered(&layer, chat(&cluster, &turns("ada", 1)), "1").await;
    let before = (layer.rules.table.len(), layer.rules.table.turns());
    let _busy = cluster.snapshot().servers[1].load.lease();
    for count in [2, 7] {
        let mut call = chat(&cluster, &turns("ada", count));
        Arc::get_mut(&mut call.head).unwrap().dry = true;
        let head = call.head.clone();
        let reply = layer.layer(Pick::new(Always, Arc::default())).call(call).await.unwrap();
        assert_eq!((reply.body.outcome().servers[0].as_str(), decision(&reply)), ("1", ""));
        let told = serde_json::to_value(head.trail.take()).unwrap();
        assert_eq!((&told[0]["layer"], &told[0]["decision"]), (&"affinity".into(), &"hit".into()));
        assert_eq!((&told[0]["facts"]["server"], &told[0]["facts"]["known by"]), (&"1".into(), &"chain".into()));
    }
    assert_eq!((layer.rules.table.len(), layer.rules.table.turns()), before);
}

#[tokio::test(start_paused = true)]
async fn a_call_with_one_candidate_passes_untouched() {
    let layer = layer();
    for (cluster, route) in [(servers(1).await, Route::Chat), (servers(3).await, Route::Embed)] {
        let body = json!({"model": "tiny", "messages": turns("ada", 2), "input": "x"}).to_string();
        let (asked, reply) = answered(&layer, testing::call_with(&cluster, route, &body), "0").await;
        assert!(asked.preferred.is_none() && decision(&reply).is_empty());
    }
    assert!(layer.rules.table.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_says_nothing_prefers_nobody() {
    let (cluster, layer) = (servers(2).await, layer());
    let (asked, reply) = answered(&layer, testing::call_in(&cluster, "tiny"), "0").await;
    assert!(asked.preferred.is_none());
    assert_eq!(decision(&reply), "affinity-none");
    assert!(layer.rules.table.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_conversation_is_forgotten_after_its_time() {
    let (cluster, layer) =
        (servers(4).await, layer_with(Config { ttl_s: 60.try_into().unwrap(), ..Config::default() }));
    answered(&layer, chat(&cluster, &turns("ada", 1)), "1").await;
    tokio::time::advance(Duration::from_secs(59)).await;
    assert_eq!(decision(&answered(&layer, chat(&cluster, &turns("ada", 2)), "1").await.1), "affinity-hit");
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(decision(&answered(&layer, chat(&cluster, &turns("ada", 3)), "1").await.1), "affinity-miss");
}

#[tokio::test(start_paused = true)]
async fn a_conversation_whose_server_is_gone_has_a_new_one_and_keeps_it() {
    let (cluster, layer, other) = (servers(4).await, layer(), layer());
    for number in 0..20 {
        let name = format!("talk {number}");
        let (first, _) = home(&layer, chat(&cluster, &turns(&name, 1))).await;
        let without = |count| {
            let mut call = chat(&cluster, &turns(&name, count));
            call.candidates.drop_server(&crate::ServerId::new(&first));
            call
        };
        let (second, placed) = home(&layer, without(2)).await;
        assert!(second != first && placed == Placed::Repin);
        assert_eq!(home(&layer, chat(&cluster, &turns(&name, 3))).await, (second.clone(), Placed::Hit));
        // A proxy that knows nothing of it comes to the same.
        assert_eq!(home(&other, without(2)).await.0, second);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_failed_the_call_hands_the_conversation_over() {
    let (cluster, layer) = (servers(3).await, layer());
    answered(&layer, chat(&cluster, &turns("ada", 1)), "0").await;
    let (mut service, mut inner) = testing::spawn(&layer);
    let reply = ask(&mut service, chat(&cluster, &turns("ada", 2)));
    let (asked, respond) = inner.next_request().await.unwrap();
    let second = preferred(&asked).servers[1];
    let mut answer = testing::reply("hi");
    answer.body.outcome_mut().servers.extend([crate::ServerId::new(&second.to_string())]);
    answer.body.outcome_mut().attempts = 2;
    respond.send_response(answer);
    assert_eq!(decision(&reply.await.unwrap()), "affinity-repin");
    let (asked, _) = answered(&layer, chat(&cluster, &turns("ada", 3)), &second.to_string()).await;
    assert_eq!(preferred(&asked).servers[0], second);
}

#[tokio::test(start_paused = true)]
async fn proxies_that_share_nothing_send_first_turns_to_the_same_servers() {
    let cluster = servers(4).await;
    let proxies = [layer(), layer()];
    let mut agreed = 0;
    for number in 0..500 {
        // Each has conversations that the other does not see.
        home(&proxies[number % 2], chat(&cluster, &turns(&format!("another {number}"), 1))).await;
        let call = || chat(&cluster, &turns(&format!("talk {number}"), 1));
        agreed += usize::from(home(&proxies[0], call()).await.0 == home(&proxies[1], call()).await.0);
    }
    assert!(agreed >= 475, "{agreed} of 500");
}

#[tokio::test(start_paused = true)]
async fn a_turn_that_comes_by_another_proxy_finds_its_server() {
    let cluster = servers(4).await;
    let proxies = [layer(), layer()];
    for number in 0..50 {
        let name = format!("talk {number}");
        let (first, _) = home(&proxies[0], chat(&cluster, &turns(&name, 1))).await;
        for count in 2..5 {
            assert_eq!(home(&proxies[count % 2], chat(&cluster, &turns(&name, count))).await.0, first);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_conversation_that_may_go_on_by_way_of_another_proxy_still_has_its_place() {
    // How many of 40 conversations begin where a call has ended so long before.
    let begun_there = async |others: u32, after: u64| {
        let (cluster, layer) = (servers(2).await, layer());
        let (snapshot, mut count) = (cluster.snapshot(), 0);
        for number in 0..40 {
            // What was before is over.
            tokio::time::advance(Duration::from_secs(60)).await;
            snapshot.servers.iter().for_each(|server| server.load.tell_others(others));
            drop(snapshot.servers[0].load.lease());
            tokio::time::advance(Duration::from_millis(after)).await;
            let begun = chat(&cluster, &turns(&number.to_string(), 1));
            count += u32::from(home(&layer, begun).await.0 == "0");
        }
        count
    };
    assert_eq!(begun_there(2, 10).await, 0, "it is between two turns, perhaps");
    assert!((5..=35).contains(&begun_there(2, 30).await), "it has ended");
    assert!((5..=35).contains(&begun_there(0, 10).await), "there is no other proxy");
}

#[tokio::test(start_paused = true)]
async fn what_another_proxy_has_sent_is_known_when_it_is_told() {
    let cluster = servers(4).await;
    let [one, other] = [7, 7].map(|key| {
        let layer = layer();
        layer.rules.table.set_key(key);
        layer
    });
    for count in 1..6 {
        let (here, there) = if count % 2 == 0 { (&one, &other) } else { (&other, &one) };
        let (asked, reply) = answered(here, chat(&cluster, &turns("ada", count)), "3").await;
        assert_eq!(decision(&reply), if count == 1 { "affinity-miss" } else { "affinity-hit" });
        let snapshot = cluster.snapshot();
        there.rules.table.told(&preferred(&asked).turn, &snapshot.servers[3], 4);
    }
    assert_eq!(one.rules.table.turns(), other.rules.table.turns());
    let stranger = layer();
    let (asked, _) = answered(&one, chat(&cluster, &turns("ada", 6)), "3").await;
    stranger.rules.table.told(&preferred(&asked).turn, &cluster.snapshot().servers[3], 4);
    let (_, reply) = answered(&stranger, chat(&cluster, &turns("ada", 7)), "3").await;
    assert_eq!(decision(&reply), "affinity-miss", "without the key they say nothing");
}

#[tokio::test(start_paused = true)]
async fn a_conversation_goes_on_when_the_key_changes() {
    let (cluster, layer) = (servers(4).await, layer());
    layer.rules.table.set_key(7);
    answered(&layer, chat(&cluster, &turns("ada", 1)), "3").await;
    layer.rules.table.set_key(8);
    layer.rules.table.set_key(8);
    for count in 2..4 {
        let (_, reply) = answered(&layer, chat(&cluster, &turns("ada", count)), "3").await;
        assert_eq!(decision(&reply), "affinity-hit", "turn {count}");
    }
    layer.rules.table.set_key(9);
    let (_, reply) = answered(&layer, chat(&cluster, &turns("ada", 4)), "3").await;
    assert_eq!(decision(&reply), "affinity-hit", "what came under the second key is known under the third");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_has_forgotten_has_no_history() {
    let (cluster, layer) = (servers(4).await, layer());
    answered(&layer, chat(&cluster, &turns("ada", 1)), "2").await;
    layer.rules.table.forget(&cluster.snapshot().servers[2]);
    let (asked, reply) = answered(&layer, chat(&cluster, &turns("ada", 2)), "1").await;
    assert!(preferred(&asked).holders.is_empty());
    assert_eq!(decision(&reply), "affinity-repin");
    tokio::time::advance(Duration::from_secs(2)).await;
    answered(&layer, chat(&cluster, &turns("bob", 1)), "2").await;
    assert_eq!(decision(&answered(&layer, chat(&cluster, &turns("bob", 2)), "2").await.1), "affinity-hit");
}

#[tokio::test(start_paused = true)]
async fn what_many_conversations_begin_with_makes_no_hot_spot() {
    let cluster = servers(4).await;
    let system = json!({"role": "system", "content": "x".repeat(4000)});
    let examples = [user("one"), answer("1"), user("two"), answer("2")];
    for beginning in [vec![system.clone()], [&[system][..], &examples].concat()] {
        let (layer, mut counts) = (layer(), [0; 4]);
        for number in 0..200 {
            let begun = [&beginning[..], &turns(&number.to_string(), 1)].concat();
            let (first, _) = home(&layer, chat(&cluster, &begun)).await;
            counts[first.parse::<usize>().unwrap()] += 1;
            let second = [&beginning[..], &turns(&number.to_string(), 2)].concat();
            assert_eq!(home(&layer, chat(&cluster, &second)).await.0, first, "it stays all the same");
        }
        assert!(counts.iter().all(|count| (25..=75).contains(count)), "{counts:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_short_question_that_many_ask_goes_to_whoever_is_idle() {
    let (cluster, layer) = (servers(3).await, layer());
    let mut running = Vec::new();
    for _ in 0..9 {
        running.push(layer.layer(Pick::new(Always, Arc::default())).call(chat(&cluster, &[user("hi")])).await.unwrap());
    }
    let loads: Vec<u32> = cluster.snapshot().servers.iter().map(|server| server.load.in_flight()).collect();
    assert_eq!(loads, [3, 3, 3]);
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn what_became_of_turns_is_counted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let (cluster, layer) = (servers(2).await, layer());
    for count in 1..4 {
        home(&layer, chat(&cluster, &turns("ada", count))).await;
    }
    let mut counted: Vec<(Vec<String>, DebugValue)> = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .filter(|(key, ..)| key.key().name() == "olol_affinity_total")
        .map(|(key, .., value)| (key.key().labels().map(|label| label.value().to_owned()).collect(), value))
        .collect();
    counted.sort_by(|one, two| one.0.cmp(&two.0));
    let labels = |result: &str| vec!["chain".to_owned(), result.to_owned()];
    assert_eq!(counted, [(labels("hit"), DebugValue::Counter(2)), (labels("miss"), DebugValue::Counter(1))]);
}

/// Servers that are kept at work: so many calls run at any time, and the oldest ends when the next one comes.
struct Bench {
    cluster: Arc<Cluster>,
    layer: AffinityLayer,
    running: VecDeque<Reply>,
    at_once: usize,
    answered: Vec<u32>,
    later: u32,
    hits: u32,
}

impl Bench {
    async fn of(count: usize, at_once: usize) -> Self {
        let cluster = servers(count).await;
        // What becomes of calls that find no slot is another question.
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&crate::ModelName::parse("tiny").unwrap()).unwrap();
        snapshot.servers.iter().for_each(|server| known.runners.at(server).reported(99));
        let (answered, running) = (vec![0; count], VecDeque::new());
        Self { cluster, layer: layer(), running, at_once, answered, later: 0, hits: 0 }
    }

    async fn ask(&mut self, call: Call) -> usize {
        if self.running.len() == self.at_once {
            self.running.pop_front();
        }
        let reply = self.layer.layer(Pick::new(Always, Arc::default())).call(call).await.unwrap();
        self.later += u32::from(decision(&reply) != "affinity-miss");
        self.hits += u32::from(decision(&reply) == "affinity-hit");
        let server: usize = reply.body.outcome().servers[0].as_str().parse().unwrap();
        self.answered[server] += 1;
        self.running.push_back(reply);
        server
    }

    /// Has conversations with so many turns each, so many of them at a time.
    async fn talks(&mut self, lengths: &[usize]) {
        let mut open: VecDeque<(usize, usize)> = VecDeque::new();
        let mut waiting = lengths.iter().copied().enumerate();
        loop {
            while open.len() < self.at_once
                && let Some((number, length)) = waiting.next()
            {
                open.push_back((number, length));
            }
            let Some((number, left)) = open.pop_front() else { return };
            let taken = lengths[number] - left + 1;
            let call = chat(&self.cluster, &turns(&format!("talk {number}"), taken));
            self.ask(call).await;
            if left > 1 {
                open.push_back((number, left - 1));
            }
        }
    }

    fn hit_rate(&self) -> f64 {
        f64::from(self.hits) / f64::from(self.later)
    }

    /// What the busiest server has answered, compared with the mean.
    fn busiest(&self) -> f64 {
        let (most, all) = (*self.answered.iter().max().unwrap(), self.answered.iter().sum::<u32>());
        f64::from(most) / f64::from(all) * f64::from(u32::try_from(self.answered.len()).unwrap())
    }
}

#[tokio::test(start_paused = true)]
async fn conversations_stay_and_no_server_has_much_more_than_another() {
    let mut bench = Bench::of(4, 12).await;
    bench.talks(&[12; 40]).await;
    assert!(bench.hit_rate() >= 0.95 && bench.busiest() <= 1.25, "{} {:?}", bench.hit_rate(), bench.answered);
}

#[tokio::test(start_paused = true)]
async fn a_few_conversations_that_are_much_longer_than_others_change_nothing() {
    let mut random = fastrand::Rng::with_seed(7);
    let lengths: Vec<usize> = (0..80).map(|_| (300 / random.usize(1..100)).clamp(2, 90)).collect();
    let mut bench = Bench::of(4, 12).await;
    bench.talks(&lengths).await;
    assert!(bench.hit_rate() >= 0.95 && bench.busiest() <= 1.25, "{} {:?}", bench.hit_rate(), bench.answered);
}

#[tokio::test(start_paused = true)]
async fn one_key_with_most_of_the_traffic_stays_under_the_bound() {
    for at_once in [8, 12, 40] {
        let mut random = fastrand::Rng::with_seed(7);
        let mut bench = Bench::of(4, at_once).await;
        for number in 0..2000 {
            let key = if random.f64() < 0.6 { "hot".to_owned() } else { format!("cold {}", random.usize(..50)) };
            let mut call = chat(&bench.cluster, &[user(&number.to_string())]);
            let headers = &mut Arc::get_mut(&mut call.head).unwrap().headers;
            headers.insert("x-session-id", HeaderValue::from_str(&key).unwrap());
            bench.ask(call).await;
        }
        assert!(bench.busiest() <= 1.25, "{at_once}: {:?}", bench.answered);
    }
}

#[tokio::test(start_paused = true)]
async fn conversations_of_which_few_are_used_most_stay_all_the_same() {
    let mut random = fastrand::Rng::with_seed(7);
    let mut bench = Bench::of(4, 12).await;
    let weights: Vec<f64> = (1..=40).map(|rank| 1.0 / f64::from(rank)).collect();
    let mut taken = [0; 40];
    let mut lately: VecDeque<usize> = VecDeque::new();
    for _ in 0..1500 {
        let talk = loop {
            let mut at = random.f64() * weights.iter().sum::<f64>();
            let talk = weights.iter().position(|weight| {
                at -= weight;
                at < 0.0
            });
            // A client waits for the answer before its next turn.
            if let Some(talk) = talk.filter(|talk| !lately.contains(talk)) {
                break talk;
            }
        };
        lately.push_back(talk);
        lately.drain(..lately.len().saturating_sub(12));
        taken[talk] += 1;
        let call = chat(&bench.cluster, &turns(&format!("talk {talk}"), taken[talk].min(50)));
        bench.ask(call).await;
    }
    assert!(bench.hit_rate() >= 0.95 && bench.busiest() <= 1.25, "{} {:?}", bench.hit_rate(), bench.answered);
}
