//! What proxies share in a store: a real Redis or Valkey, which comes and goes.
//!
//! `./dev test` unpacks the distribution's package. Elsewhere `OLOL_REDIS` names the program, or one is on the path.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::chat;
use harness::redis::Store;
use harness::{Cluster, Gate, Olol, Process, Request, patiently, until};
use olol::keys::{self, Order};

#[tokio::test]
async fn a_server_that_one_proxy_drains_is_drained_at_all() {
    let (cluster, store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    say(&one, "drain").await;
    until("the other proxy drains it", || other.drains("0")).await;
    say(&other, "undrain").await;
    until("the first one takes it back", || !one.drains("0")).await;
    say(&other, "drain").await;
    let late = Olol::start(&cluster, &store.toml()).await;
    until("who starts later drains it, too", || late.drains("0")).await;
}

#[tokio::test]
async fn while_the_store_is_away_each_goes_by_what_it_has_and_all_is_told_when_it_is_back() {
    let (cluster, mut store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    store.dies().await;
    until("both have noticed", || !one.shares() && !other.shares()).await;
    say(&one, "drain").await;
    assert!(one.drains("0"), "it holds at once where it was said");
    for olol in [&one, &other] {
        assert_eq!(olol.chat("tiny", "hi").await.status, 200);
        let status = olol.get("/api/status").await.json();
        assert_eq!(status["olol"]["state"]["state"], "degraded", "{status}");
    }
    assert!(!other.drains("0"));
    store.comes_back().await;
    until("the other proxy hears of it", || other.drains("0")).await;
    until("both share again", || one.shares() && other.shares()).await;
    assert_eq!(one.get("/api/status").await.json()["olol"]["state"]["state"], "up");
}

#[tokio::test]
async fn a_store_that_has_forgotten_all_is_told_again() {
    let (cluster, mut store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    say(&one, "drain").await;
    until("the other proxy drains it", || other.drains("0")).await;
    store.dies().await;
    until("both have noticed", || !one.shares() && !other.shares()).await;
    store.comes_back().await;
    until("both share again", || one.shares() && other.shares()).await;
    let late = Olol::start(&cluster, &store.toml()).await;
    until("who starts later drains it, too", || late.drains("0")).await;
    assert!(one.drains("0") && other.drains("0"));
}

#[tokio::test]
async fn a_store_that_was_never_there_is_in_nobodys_way() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let toml = "[state]\nurl = \"redis://ada:open-sesame@127.0.0.1:1\"";
    let olol = Olol::start(&cluster, toml).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let status = olol.get("/api/status").await.text();
    assert!(status.contains("redis://ada:***@127.0.0.1:1") && !status.contains("open-sesame"), "{status}");
}

async fn both_share(one: &Olol, other: &Olol) {
    until("both share", || one.shares() && other.shares()).await;
}

async fn say(olol: &Olol, what: &str) {
    let path = format!("/api/status/servers/0/{what}");
    let answer = olol.ask(&Request::post(&path, "")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn a_store_that_does_not_answer_holds_nobody_up() {
    let (cluster, store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let olol = Olol::start(&cluster, &store.toml().replace("5000", "300")).await;
    until("it shares", || olol.shares()).await;
    make(&olol, "a").await;
    store.freezes(true).await;
    assert_eq!(turn(&olol, "a").await, 1, "by the copy here");
    until("it has noticed", || !olol.shares()).await;
    let begun = tokio::time::Instant::now();
    assert_eq!(turn(&olol, "a").await, 2);
    assert!(begun.elapsed() < std::time::Duration::from_secs(2), "nobody waits any more: {:?}", begun.elapsed());
    store.freezes(false).await;
    until("it shares again", || olol.shares()).await;
    assert_eq!(turn(&olol, "a").await, 3);
}

#[tokio::test]
async fn a_session_goes_on_at_any_proxy() {
    let (cluster, store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    make(&one, "a").await;
    for (count, olol) in [&other, &one, &one, &other].into_iter().enumerate() {
        assert_eq!(turn(olol, "a").await, count + 1);
        for olol in [&one, &other] {
            assert_eq!(turns(olol, "a").await, Some(count as u64 + 1));
        }
    }
    let late = Olol::start(&cluster, &store.toml()).await;
    until("it shares", || late.shares()).await;
    let listed = late.get("/api/status/sessions").await.json();
    assert_eq!(listed["sessions"][0]["session_id"], "a", "{listed}");
    assert_eq!(turns(&late, "a").await, Some(4));
    let ended = late.ask(&Request::new("DELETE", "/api/status/sessions/a")).await;
    assert_eq!(ended.json()["turns"], 4);
    for olol in [&one, &other, &late] {
        assert_eq!(turns(olol, "a").await, None);
        assert_eq!(olol.get("/api/status/sessions").await.json()["sessions"], serde_json::json!([]));
    }
}

#[tokio::test]
async fn each_key_sees_its_own_sessions_at_every_proxy() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let add = |name: &str, admin: bool| {
        let key = keys::add(&file, &name.parse().unwrap(), &Order { admin, ..Order::default() }).unwrap();
        format!("Bearer {key}")
    };
    let (ada, bob, root) = (add("ada", false), add("bob", false), add("root", true));
    let toml = format!("{}\n[auth]\nfile = {:?}\n", store.toml(), file.display().to_string());
    let [one, other] = [Olol::start(&cluster, &toml).await, Olol::start(&cluster, &toml).await];
    both_share(&one, &other).await;
    let body = serde_json::json!({"session_id": "talk", "model": "tiny"});
    let made = one.ask(&Request::post("/api/status/sessions", body).header("Authorization", &ada)).await;
    assert_eq!(made.status, 201, "{}", made.text());
    for (key, sees) in [(&bob, 404), (&root, 200), (&ada, 200)] {
        let shown = other.ask(&Request::get("/api/status/sessions/talk").header("Authorization", key)).await;
        assert_eq!(shown.status, sees, "{}", shown.text());
        let listed = other.ask(&Request::get("/api/status/sessions").header("Authorization", key)).await.json();
        assert_eq!(listed["sessions"].as_array().unwrap().len(), usize::from(sees == 200), "{listed}");
    }
}

#[tokio::test]
async fn a_session_goes_on_without_the_store_and_nothing_is_lost() {
    let (cluster, mut store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    for id in ["a", "b", "c"] {
        make(&one, id).await;
        turn(&one, id).await;
        assert_eq!(turn(&other, id).await, 2);
    }
    store.dies().await;
    until("both have noticed", || !one.shares() && !other.shares()).await;
    assert_eq!(turn(&other, "a").await, 3, "the copy at the other proxy is whole");
    assert_eq!(turn(&other, "a").await, 4);
    assert_eq!(turn(&one, "b").await, 2, "what the other has added since is there, and will be here");
    let ended = one.ask(&Request::new("DELETE", "/api/status/sessions/c")).await;
    assert_eq!(ended.status, 200, "{}", ended.text());
    store.comes_back().await;
    until("both share again", || one.shares() && other.shares()).await;
    // What was said alone is told when the store is back, a little later.
    patiently("all is told", async {
        while turns(&one, "a").await != Some(4) || turns(&other, "c").await.is_some() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(turn(&one, "a").await, 5);
    assert_eq!(turns(&other, "a").await, Some(5));
}

#[tokio::test]
async fn a_session_of_a_proxy_whose_clock_differs_is_as_old_as_it_is() {
    const DAYS: i64 = 2 * 24 * 3600 * 1000;
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    for (id, by) in [("behind", -DAYS), ("ahead", DAYS)] {
        make(&one, id).await;
        turn(&one, id).await;
        written_by_a_clock(&store, id, by).await;
        assert_eq!(turn(&other, id).await, 2, "{id}");
        assert_eq!(turn(&one, id).await, 3, "{id}");
        written_by_a_clock(&store, id, by).await;
        // Who only looks gets it from there, too.
        let late = Olol::start(&cluster, &store.toml()).await;
        until("it shares", || late.shares()).await;
        let listed = late.get("/api/status/sessions").await.json();
        let entry = listed["sessions"].as_array().unwrap().iter().find(|entry| entry["session_id"] == id).unwrap();
        let last: jiff::Timestamp = entry["last_active"].as_str().unwrap().parse().unwrap();
        let age = jiff::Timestamp::now().as_second() - last.as_second();
        assert!(entry["status"] == "active" && (0..60).contains(&age), "{id}: {entry}");
    }
}

/// A session in the store is now as a proxy has written it whose clock is so many milliseconds ahead.
async fn written_by_a_clock(store: &Store, id: &str, ahead: i64) {
    let (mut there, key) = (store.connection().await, format!("olol:session:{id}"));
    let record: String = redis::cmd("HGET").arg(&key).arg("session").query_async(&mut there).await.unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&record).unwrap();
    for time in ["created_at", "last_active", "stamp"] {
        record[time] = (record[time].as_i64().unwrap() + ahead).into();
    }
    let at = record["stamp"].as_i64().unwrap();
    let mut put = redis::cmd("HSET");
    put.arg(&key).arg("session").arg(record.to_string()).arg("at").arg(at);
    let _: i64 = put.query_async(&mut there).await.unwrap();
}

#[tokio::test]
async fn turns_at_two_proxies_at_once_are_both_kept() {
    let (cluster, store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    make(&one, "a").await;
    for _ in 0..5 {
        tokio::join!(turn(&one, "a"), turn(&other, "a"));
    }
    for olol in [&one, &other] {
        assert_eq!(turns(olol, "a").await, Some(10));
        let shown = olol.get("/api/status/sessions/a").await.json();
        assert_eq!(shown["messages"].as_array().unwrap().len(), 20, "{shown}");
    }
}

#[tokio::test]
async fn what_was_used_at_one_proxy_counts_at_the_other() {
    let (cluster, mut store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let toml = format!("{}{LIMITS}", store.toml());
    let [one, other] = [Olol::start(&cluster, &toml).await, Olol::start(&cluster, &toml).await];
    both_share(&one, &other).await;
    for _ in 0..3 {
        assert_eq!(one.chat("tiny", "hi").await.status, 200);
    }
    patiently("the other proxy hears of it", async {
        // Looking costs nothing.
        let look = Request::post(
            "/api/status/explain?route=/api/chat",
            serde_json::json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}),
        );
        while !other.ask(&look).await.text().contains("would be refused") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(other.chat("tiny", "hi").await.status, 429);
    store.dies().await;
    until("both have noticed", || !one.shares() && !other.shares()).await;
    assert_eq!(one.chat("tiny", "hi").await.status, 429, "what was told before still holds");
}

/// Two calls at the same time.
const TWO: &str = "
[stack]
order = [\"rate-limit\", \"model-route\"]

[rate-limit.client]
concurrent = 2
";

/// Waits until a proxy would let another call pass, or would not. Looking costs nothing.
async fn would(olol: &Olol, passes: bool) {
    let body = serde_json::json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    let look = Request::post("/api/status/explain?route=/api/chat", body);
    patiently("it would let a call pass, or would not", async {
        while olol.ask(&look).await.text().contains("would be refused") == passes {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn calls_that_run_at_one_proxy_count_at_the_other_until_they_end() {
    let (cluster, mut store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let toml = format!("{}{TWO}", store.toml());
    let [one, other] = [Olol::start(&cluster, &toml).await, Olol::start(&cluster, &toml).await];
    both_share(&one, &other).await;
    store.has_listeners(2).await;
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut running = [one.begin(&chat("tiny", "hi")).await, one.begin(&chat("tiny", "hi")).await];
    would(&other, false).await;
    let refused = other.chat("tiny", "hi").await;
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert!(refused.error().contains("2 requests at the same time"), "{}", refused.text());
    until("it is seen that a bare server is at work for the other proxy", || other.others(0) == 2).await;
    gate.open();
    for connection in &mut running {
        assert_eq!(connection.answer().await.status, 200);
    }
    would(&other, true).await;
    assert_eq!(other.chat("tiny", "hi").await.status, 200);
    until("nothing runs any more", || one.others(0) == 0 && other.others(0) == 0).await;

    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let _running = [one.begin(&chat("tiny", "hi")).await, one.begin(&chat("tiny", "hi")).await];
    would(&other, false).await;
    store.dies().await;
    until("both have noticed", || !one.shares() && !other.shares()).await;
    would(&other, true).await;
    would(&one, false).await;
}

#[tokio::test]
async fn the_calls_of_a_proxy_that_has_died_count_no_more() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let toml = format!("{}{TWO}", store.toml());
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("olol.toml");
    std::fs::write(&config, format!("sessions.dir = '{}'\n{toml}", folder.path().display())).unwrap();
    let server = format!("http://{}", cluster.server(0).address());
    let mut one = Process::proxy(&server, &["--config", config.to_str().unwrap()]).await;
    one.has_up(1).await;
    let other = Olol::start(&cluster, &toml).await;
    until("it shares", || other.shares()).await;
    store.has_listeners(2).await;
    cluster.server(0).stalls_after(["Hel"]);
    let mut running = [one.connect().await, one.connect().await];
    for connection in &mut running {
        connection.send(&chat("tiny", "hi")).await;
    }
    would(&other, false).await;
    one.kill().await;
    would(&other, true).await;
    until("nothing runs any more", || other.others(0) == 0).await;
}

#[tokio::test]
async fn a_session_that_was_ended_and_made_again_alone_is_the_new_one_for_all() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let folder = tempfile::tempdir().unwrap();
    let toml = format!("sessions.dir = '{}'\n{}", folder.path().display(), store.toml());
    let [one, other] = [Olol::start(&cluster, &toml).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    for id in ["again", "ended"] {
        make(&one, id).await;
        for _ in 0..2 {
            turn(&one, id).await;
            turn(&other, id).await;
        }
    }
    // The store keeps what it has.
    store.freezes(true).await;
    until("both have noticed", || !one.shares() && !other.shares()).await;
    for id in ["again", "ended"] {
        let ended = one.ask(&Request::new("DELETE", &format!("/api/status/sessions/{id}"))).await;
        assert_eq!(ended.status, 200, "{}", ended.text());
    }
    make(&one, "again").await;
    assert_eq!(turn(&one, "again").await, 1);
    // What was ended is known after a restart.
    assert!(one.stop().await);
    let one = Olol::start(&cluster, &toml).await;
    assert_eq!((turns(&one, "again").await, turns(&one, "ended").await), (Some(1), None));
    store.freezes(false).await;
    both_share(&one, &other).await;
    patiently("all is told", async {
        while turns(&other, "again").await != Some(1) || turns(&other, "ended").await.is_some() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!((turns(&one, "again").await, turns(&one, "ended").await), (Some(1), None));
    assert_eq!(turn(&other, "again").await, 2);
    assert_eq!(turn(&one, "again").await, 3);
    make(&other, "ended").await;
    assert_eq!(turn(&one, "ended").await, 1);
}

#[tokio::test]
async fn a_session_that_was_ended_elsewhere_and_made_here_alone_is_not_taken_for_the_old_one() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let one = Olol::start(&cluster, &store.toml()).await;
    until("it shares", || one.shares()).await;
    make(&one, "a").await;
    turn(&one, "a").await;
    assert_eq!(one.ask(&Request::new("DELETE", "/api/status/sessions/a")).await.status, 200);
    store.freezes(true).await;
    let late = Olol::start(&cluster, &store.toml()).await;
    make(&late, "a").await;
    assert_eq!(turn(&late, "a").await, 1);
    store.freezes(false).await;
    both_share(&one, &late).await;
    patiently("it is told", async {
        while turns(&one, "a").await != Some(1) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!((turn(&one, "a").await, turn(&late, "a").await), (2, 3));
}

/// The pins of a proxy that runs, by model: how many are wanted.
async fn pins(olol: &Olol) -> Vec<(String, serde_json::Value)> {
    let page = olol.get("/api/status?detail=models&limit=1000").await.json();
    let models = page["models"].as_array().unwrap().iter();
    let pinned = models.filter(|model| model["desired"]["source"] == "pin");
    pinned.map(|model| (model["name"].as_str().unwrap().to_owned(), model["desired"]["replicas"].clone())).collect()
}

async fn have_pins(proxies: &[&Olol], wanted: &[(&str, u32)]) {
    let wanted: Vec<_> = wanted.iter().map(|(name, count)| ((*name).to_owned(), serde_json::json!(count))).collect();
    patiently(&format!("all have {wanted:?}"), async {
        for olol in proxies {
            while pins(olol).await != wanted {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    })
    .await;
}

async fn pin(olol: &Olol, model: &str, replicas: u32) {
    let path = format!("/api/status/models/{model}");
    let answer = olol.ask(&Request::new("PUT", &path).with_body(serde_json::json!({"replicas": replicas}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

async fn unpin(olol: &Olol, model: &str) {
    let answer = olol.ask(&Request::new("DELETE", &format!("/api/status/models/{model}"))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn what_is_pinned_at_one_proxy_is_pinned_at_all() {
    let (cluster, mut store) = (Cluster::of(2).await.all_have_loaded("tiny").all_have("small"), Store::start().await);
    let folder = tempfile::tempdir().unwrap();
    let dir = format!("sessions.dir = '{}'\n", folder.path().display());
    // What was pinned before anything was shared is not lost.
    let alone = Olol::start(&cluster, &dir).await;
    pin(&alone, "small", 1).await;
    assert!(alone.stop().await);
    let [one, other] =
        [Olol::start(&cluster, &format!("{dir}{}", store.toml())).await, Olol::start(&cluster, &store.toml()).await];
    both_share(&one, &other).await;
    have_pins(&[&one, &other], &[("small:latest", 1)]).await;
    pin(&other, "tiny", 2).await;
    have_pins(&[&one, &other], &[("small:latest", 1), ("tiny:latest", 2)]).await;
    unpin(&one, "small").await;
    have_pins(&[&one, &other], &[("tiny:latest", 2)]).await;
    // Each goes on alone, and the store forgets all.
    store.dies().await;
    until("both have noticed", || !one.shares() && !other.shares()).await;
    pin(&one, "tiny", 1).await;
    pin(&other, "small", 2).await;
    have_pins(&[&one], &[("tiny:latest", 1)]).await;
    assert!(one.stop().await);
    let one = Olol::start(&cluster, &format!("{dir}{}", store.toml())).await;
    store.comes_back().await;
    both_share(&one, &other).await;
    have_pins(&[&one, &other], &[("small:latest", 2), ("tiny:latest", 1)]).await;
    let late = Olol::start(&cluster, &store.toml()).await;
    have_pins(&[&late], &[("small:latest", 2), ("tiny:latest", 1)]).await;
}

/// Three requests, and another one after a minute.
const LIMITS: &str = "
[stack]
order = [\"rate-limit\", \"model-route\"]

[rate-limit.client]
requests-per-minute = 1
burst = 3
";

async fn make(olol: &Olol, id: &str) {
    let body = serde_json::json!({"session_id": id, "model": "tiny"});
    let answer = olol.ask(&Request::post("/api/status/sessions", body)).await;
    assert!((200..300).contains(&answer.status), "{}", answer.text());
}

/// Takes a turn; which one it was.
async fn turn(olol: &Olol, id: &str) -> usize {
    let answer = olol.ask(&chat("tiny", "more").header("x-olol-session", id)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.header("x-olol-session-turn").parse().unwrap_or_else(|_| panic!("no turn of a session: {:?}", answer.text()))
}

/// The turns that a session has had, if there is one.
async fn turns(olol: &Olol, id: &str) -> Option<u64> {
    let answer = olol.get(&format!("/api/status/sessions/{id}")).await;
    (answer.status == 200).then(|| answer.json()["turns"].as_u64().unwrap())
}
