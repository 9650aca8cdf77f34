//! Calls wait at the proxy for a slot of their model, not inside a server that is full.

mod harness;

use harness::olol::chat;
use harness::{Cluster, Gate, Olol, Way, patiently, until};
use olol::keys::{self, Order};

const ONE_SLOT: &str = "pick.slots = [{ slots = 1 }]";

#[tokio::test]
async fn a_full_server_gets_the_next_call_when_it_has_a_slot() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        let gate = Gate::closed();
        cluster.server(0).echoes().is_paced_by(&gate);
        let olol = Olol::start(&cluster, ONE_SLOT).await;
        let mut first = olol.begin(&chat("tiny", "first")).await;
        cluster.server(0).asked(1).await;
        let mut second = olol.begin(&chat("tiny", "second")).await;
        until("a call waits", || olol.waiting() == 1).await;
        assert_eq!(cluster.server(0).work(), 1, "{way:?}");
        gate.open();
        assert_eq!(first.answer().await.said(), "first");
        let second = second.answer().await;
        assert_eq!(second.said(), "second");
        assert!(second.header("x-olol-queue-ms").parse::<u64>().is_ok(), "{way:?}");
        assert_eq!(olol.waiting(), 0);
    }
}

#[tokio::test]
async fn calls_by_names_of_the_same_weights_wait_for_the_same_slots() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        let gate = Gate::closed();
        cluster.server(0).has_like("poet", "tiny").echoes().is_paced_by(&gate);
        let olol = Olol::start(&cluster, ONE_SLOT).await;
        let mut first = olol.begin(&chat("tiny", "first")).await;
        cluster.server(0).asked(1).await;
        let mut second = olol.begin(&chat("poet", "second")).await;
        until("a call waits", || olol.waiting() == 1).await;
        gate.open();
        assert_eq!(first.answer().await.said(), "first");
        assert_eq!(second.answer().await.said(), "second", "{way:?}");
    }
}

#[tokio::test]
async fn who_leaves_the_queue_is_never_sent() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).echoes().is_paced_by(&gate);
    let olol = Olol::start(&cluster, ONE_SLOT).await;
    let mut first = olol.begin(&chat("tiny", "first")).await;
    cluster.server(0).asked(1).await;
    let gone = olol.begin(&chat("tiny", "gone")).await;
    until("a call waits", || olol.waiting() == 1).await;
    drop(gone);
    until("nobody waits", || olol.waiting() == 0).await;
    gate.open();
    assert_eq!(first.answer().await.said(), "first");
    assert_eq!(olol.chat("tiny", "third").await.said(), "third");
    assert_eq!(cluster.server(0).work(), 2);
}

#[tokio::test]
async fn a_full_queue_answers_as_a_full_ollama_and_says_when_to_come_back() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).echoes().is_paced_by(&gate);
    let olol = Olol::start(&cluster, &format!("{ONE_SLOT}\nqueue.max-requests = 1")).await;
    let _first = olol.begin(&chat("tiny", "first")).await;
    cluster.server(0).asked(1).await;
    let _second = olol.begin(&chat("tiny", "second")).await;
    until("a call waits", || olol.waiting() == 1).await;
    let third = olol.chat("tiny", "third").await;
    assert_eq!(third.status, 503);
    assert_eq!(third.error(), "server busy, please try again.  maximum pending requests exceeded");
    assert_eq!((third.header("x-olol-reason"), third.header("retry-after")), ("busy", "1"));
}

#[tokio::test]
async fn who_waits_goes_elsewhere_when_the_server_is_gone() {
    let cluster = Cluster::of(2).await;
    cluster.server(0).has_loaded("tiny");
    cluster.server(1).has("other");
    let gate = Gate::closed();
    cluster.server(0).echoes().is_paced_by(&gate);
    cluster.server(1).echoes();
    let config = format!("{ONE_SLOT}\n[pool]\ncheck-interval-ms = 50\ncheck-failures = 1");
    let olol = Olol::start(&cluster, &config).await;
    let _first = olol.begin(&chat("tiny", "first")).await;
    cluster.server(0).asked(1).await;
    let mut second = olol.begin(&chat("tiny", "second")).await;
    until("a call waits", || olol.waiting() == 1).await;
    cluster.server(1).has_loaded("tiny");
    let second = second.answer().await;
    assert_eq!((second.said().as_str(), second.server()), ("second", "1"));
}

#[tokio::test]
async fn slots_that_nobody_told_are_doubled_while_all_are_answered() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).says(["one", "two"]).is_paced_by(&gate);
    let olol = Olol::start(&cluster, "").await;
    let mut streams = Vec::new();
    for number in 0..40 {
        streams.push(olol.begin(&chat("tiny", &number.to_string())).await);
    }
    for begun in [4, 8] {
        cluster.server(0).asked(begun).await;
        assert_eq!(cluster.server(0).work(), begun);
        gate.let_through(begun);
    }
    cluster.server(0).asked(16).await;
    gate.open();
    for stream in &mut streams {
        assert_eq!(stream.answer().await.said(), "onetwo");
    }
}

#[tokio::test]
async fn beside_a_flood_of_one_key_a_single_request_of_another_is_soon_asked() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).echoes().is_paced_by(&gate);
    let olol = Olol::start(&cluster, ONE_SLOT).await;
    let add = |name: &str| keys::add(&olol.keys(), &name.parse().unwrap(), &Order::default()).unwrap();
    let [flooder, other] = ["flooder", "other"].map(add);
    let known = async { while olol.get("/api/tags").await.status != 401 {} };
    patiently("the keys are known", known).await;
    let by = |text: &str, key: &str| chat("tiny", text).header("authorization", &format!("Bearer {key}"));
    let mut flood = Vec::new();
    for number in 0..40 {
        flood.push(olol.begin(&by(&format!("flood {number}"), &flooder)).await);
        until("it is asked or waits", || cluster.server(0).work() + olol.waiting() == number + 1).await;
    }
    let mut single = olol.begin(&by("single", &other)).await;
    until("all wait", || olol.waiting() == 40).await;
    gate.open();
    assert_eq!(single.answer().await.said(), "single");
    for mut flooding in flood {
        assert!(flooding.answer().await.said().starts_with("flood"));
    }
    let asked: Vec<_> = cluster.server(0).seen("/api/chat").iter().map(harness::script::Seen::json).collect();
    let place = asked.iter().position(|body| body["messages"][0]["content"] == "single").unwrap();
    assert!(place <= 2, "asked after {place} of the flood: it must begin within two service times");
}
