//! Several proxies over the same servers: what one of them has sent where, the others know.

mod harness;

use harness::redis::Store;
use harness::{Cluster, Olol, Request, Way, until};
use serde_json::{Value, json};

#[tokio::test]
async fn a_conversation_goes_on_at_any_proxy() {
    let cluster = Cluster::of(3).await.over(Way::Agents).all_have_loaded("tiny");
    let one = Olol::start(&cluster, "").await;
    let other = beside(&one, &cluster, "").await;
    let mut talks: Vec<Vec<Value>> = (0..8).map(|number| vec![user(&format!("talk {number}"))]).collect();
    let homes = turn(&one, &mut talks, "affinity-miss").await;
    until("the other proxy knows of them", || other.links() == 8).await;
    assert_eq!(turn(&other, &mut talks, "affinity-hit").await, homes);
    until("the first proxy knows of that", || one.links() == 24).await;
    assert_eq!(turn(&one, &mut talks, "affinity-hit").await, homes);
}

#[tokio::test]
async fn a_proxy_that_starts_anew_knows_of_the_conversations_that_were_before() {
    let cluster = Cluster::of(3).await.over(Way::Agents).all_have_loaded("tiny");
    let first = Olol::start(&cluster, "").await;
    let mut talks: Vec<Vec<Value>> = (0..8).map(|number| vec![user(&format!("talk {number}"))]).collect();
    let homes = turn(&first, &mut talks, "affinity-miss").await;
    let second = beside(&first, &cluster, "").await;
    until("it was told", || second.links() >= 8).await;
    assert_eq!(turn(&second, &mut talks, "affinity-hit").await, homes);
}

#[tokio::test]
async fn at_bare_servers_proxies_that_share_a_store_tell_each_other() {
    let (cluster, store) = (Cluster::of(3).await.over(Way::Http).all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [Olol::start(&cluster, &store.toml()).await, Olol::start(&cluster, &store.toml()).await];
    until("both share", || one.shares() && other.shares()).await;
    store.has_listeners(2).await;
    let mut talks: Vec<Vec<Value>> = (0..8).map(|number| vec![user(&format!("talk {number}"))]).collect();
    let homes = turn(&one, &mut talks, "affinity-miss").await;
    until("the other proxy knows of them", || other.links() == 8).await;
    assert_eq!(turn(&other, &mut talks, "affinity-hit").await, homes);
}

#[tokio::test]
async fn an_answers_context_is_known_at_the_other_proxy() {
    for way in Way::BOTH {
        let (cluster, store) = (Cluster::of(3).await.over(way).all_have_loaded("tiny"), Store::start().await);
        let toml = if way == Way::Http { store.toml() } else { String::new() };
        let one = Olol::start(&cluster, &toml).await;
        let other =
            if way == Way::Http { Olol::start(&cluster, &toml).await } else { beside(&one, &cluster, "").await };
        if way == Way::Http {
            until("both share", || one.shares() && other.shares()).await;
            store.has_listeners(2).await;
        }
        let generate = |body: Value| {
            let mut whole = json!({"model": "tiny"});
            whole.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
            Request::post("/api/generate", whole)
        };
        let first = one.ask(&generate(json!({"prompt": "how are you"}))).await;
        let context = first.lines().pop().unwrap()["context"].clone();
        assert!(context.is_array(), "{}", first.text());
        until("the other proxy knows of it", || other.links() >= 2).await;
        let second = other.ask(&generate(json!({"prompt": "and now", "context": context}))).await;
        assert_eq!((second.header("x-olol-decision"), second.server()), ("affinity-hit", first.server()), "{way:?}");
    }
}

/// Another proxy over the agents of one.
async fn beside(olol: &Olol, cluster: &Cluster, toml: &str) -> Olol {
    let named = olol.names().into_iter().zip(olol.agents());
    let servers = named.map(|(name, agent)| format!("{name}@{}", agent.address())).collect();
    let other = Olol::at(servers, toml).await;
    other.knows(cluster).await;
    other
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

/// Takes a turn of each conversation, one after the other; who answered.
async fn turn(olol: &Olol, talks: &mut [Vec<Value>], decision: &str) -> Vec<String> {
    let mut servers = Vec::new();
    for messages in talks {
        let body = json!({"model": "tiny", "messages": messages, "stream": true});
        let answer = olol.ask(&Request::post("/api/chat", body)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.header("x-olol-decision"), decision);
        messages.push(json!({"role": "assistant", "content": answer.said()}));
        messages.push(user("go on"));
        servers.push(answer.server().to_owned());
    }
    servers
}
