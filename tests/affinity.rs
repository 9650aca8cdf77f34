//! A conversation goes on where its history is, and goes elsewhere when that server is gone.

mod harness;

use harness::{Cluster, Olol, Request, Way};
use serde_json::{Value, json};

#[tokio::test]
async fn the_turns_of_a_conversation_stay_on_its_server() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        for path in ["/api/chat", "/v1/chat/completions"] {
            let mut talks: Vec<Talk> = (0..8).map(|number| Talk::new(path, &format!("{path} {number}"))).collect();
            let homes = turn(&olol, &mut talks, "affinity-miss").await;
            for _ in 0..3 {
                assert_eq!(turn(&olol, &mut talks, "affinity-hit").await, homes, "{way:?}: {path}");
            }
            assert!(homes.iter().any(|home| *home != homes[0]), "they are not all on one server: {homes:?}");
        }
    }
}

#[tokio::test]
async fn conversations_of_a_server_that_died_move_and_stay_where_they_moved() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        let mut talks: Vec<Talk> = (0..12).map(|number| Talk::new("/api/chat", &format!("talk {number}"))).collect();
        let homes = turn(&olol, &mut talks, "affinity-miss").await;
        let dead = homes[0].clone();
        cluster.server(dead.parse().unwrap()).dies_before_head();
        let moved = turn(&olol, &mut talks, "affinity-").await;
        for (home, new) in homes.iter().zip(&moved) {
            assert_eq!(home == new, *home != dead, "only its own moved: {homes:?} {moved:?}");
        }
        assert_eq!(turn(&olol, &mut talks, "affinity-hit").await, moved, "{way:?}");
    }
}

#[tokio::test]
async fn a_conversation_that_has_a_name_is_told_it_back() {
    let cluster = Cluster::of(3).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "affinity.headers = [\"X-Talk\"]").await;
    let mut homes = Vec::new();
    for text in ["one", "two", "three"] {
        let request = harness::olol::chat("tiny", text).header("X-Talk", "ada-1").header("X-Session-Id", text);
        let answer = olol.ask(&request).await;
        assert_eq!(answer.header("x-olol-session"), "ada-1");
        homes.push(answer.server().to_owned());
    }
    assert!(homes.iter().all(|home| *home == homes[0]), "{homes:?}");
}

#[tokio::test]
async fn what_is_remembered_can_be_scraped() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    olol.chat("tiny", "something to remember").await;
    let page = olol.get("/metrics").await.text();
    assert!(page.contains("olol_affinity_total{source=\"chain\",result=\"miss\"}"), "{page}");
    assert!(page.lines().any(|line| line.starts_with("olol_affinity_entries ")), "{page}");
}

/// A conversation as a client keeps it.
struct Talk {
    path: &'static str,
    messages: Vec<Value>,
}

impl Talk {
    fn new(path: &'static str, text: &str) -> Self {
        Self { path, messages: vec![json!({"role": "user", "content": text})] }
    }
}

/// Takes a turn of each conversation, one after the other; who answered.
async fn turn(olol: &Olol, talks: &mut [Talk], decision: &str) -> Vec<String> {
    let mut servers = Vec::new();
    for talk in talks {
        let body = json!({"model": "tiny", "messages": talk.messages, "stream": true});
        let answer = olol.ask(&Request::post(talk.path, body)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.header("x-olol-decision").starts_with(decision), "{}", answer.header("x-olol-decision"));
        talk.messages.push(json!({"role": "assistant", "content": answer.said()}));
        talk.messages.push(json!({"role": "user", "content": "go on"}));
        servers.push(answer.server().to_owned());
    }
    servers
}
