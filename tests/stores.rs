//! A store that is ill in one of the ways in which stores are: it never stops inference, each proxy goes by what it has itself and
//! says so, and all is shared again when the store is well.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::time::Duration;

use harness::olol::chat;
use harness::redis::{Middleman, Mood, Store};
use harness::{Cluster, Olol, Process, Request, patiently, until};
use olol::security::certs::{self, Order};
use serde_json::json;
use tokio::time::Instant;

/// What the proxy says of the store.
async fn shown(olol: &Olol) -> serde_json::Value {
    olol.get("/api/status").await.json()["olol"]["state"].clone()
}

/// Makes a session and has turns of it, chats, and drains: whatever the store does, all of it works, and nobody waits long.
async fn works(olol: &Olol, session: &str, turn: u64) {
    let begun = Instant::now();
    let request = Request::post("/api/status/sessions", json!({"session_id": session, "model": "tiny"}));
    let made = olol.ask(&request).await;
    assert!((200..300).contains(&made.status), "{}", made.text());
    let answer = olol.ask(&chat("tiny", "hi").header("x-olol-session", session)).await;
    assert_eq!((answer.status, answer.header("x-olol-session-turn")), (200, turn.to_string().as_str()));
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    assert!(begun.elapsed() < Duration::from_secs(10), "somebody waited for the store: {:?}", begun.elapsed());
}

/// A proxy over two servers that shares a store with this table, and gives up after 300 ms.
async fn proxy(cluster: &Cluster, toml: &str) -> Olol {
    Olol::start(cluster, &toml.replace("5000", "300")).await
}

#[tokio::test]
async fn a_store_that_one_may_not_use_is_told_and_used_when_one_may() {
    let (cluster, store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let ada = |rules: [&'static str; 3]| [&["ACL", "SETUSER", "ada", "on", ">open-sesame"], &rules[..]].concat();
    store.does(&ada(["nocommands", "resetkeys", "resetchannels"])).await;
    let toml = Store::toml_for(&format!("redis://ada:wrong-word@{}", store.address()));
    let wrong = proxy(&cluster, &toml).await;
    let toml = Store::toml_for(&format!("redis://ada:open-sesame@{}", store.address()));
    let denied = proxy(&cluster, &toml).await;
    for (olol, why) in [(&wrong, "AUTHENTICATION"), (&denied, "NOPERM")] {
        patiently("the reason is told", async {
            while !shown(olol).await["reason"].as_str().unwrap().to_uppercase().contains(why) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        assert_eq!(shown(olol).await["state"], "degraded");
        works(olol, "a", 1).await;
    }
    store.does(&ada(["allcommands", "allkeys", "allchannels"])).await;
    until("who may shares", || denied.shares()).await;
    assert!(!wrong.shares());
    works(&denied, "a", 2).await;
    let told = shown(&denied).await.to_string();
    assert!(told.contains("ada:***@") && !told.contains("sesame"), "{told}");
}

#[tokio::test]
async fn a_store_that_is_full_takes_what_was_said_when_there_is_room() {
    let (cluster, store) = (Cluster::of(2).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [proxy(&cluster, &store.toml()).await, proxy(&cluster, &store.toml()).await];
    until("both share", || one.shares() && other.shares()).await;
    works(&one, "a", 1).await;
    store.does(&["CONFIG", "SET", "maxmemory", "1"]).await;
    works(&one, "a", 2).await;
    until("it is noticed", || !one.shares()).await;
    works(&one, "b", 1).await;
    assert_eq!(one.ask(&Request::post("/api/status/servers/0/drain", "")).await.status, 200);
    assert!(one.drains("0") && !other.drains("0"));
    store.does(&["CONFIG", "SET", "maxmemory", "0"]).await;
    until("all is told", || other.drains("0")).await;
    for (session, turns) in [("a", 2), ("b", 1)] {
        patiently("the other proxy has all of it", async {
            let path = format!("/api/status/sessions/{session}");
            while other.get(&path).await.json()["turns"] != json!(turns) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_store_that_takes_no_scripts_takes_sessions_when_it_does() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let [one, other] = [proxy(&cluster, &store.toml()).await, proxy(&cluster, &store.toml()).await];
    until("both share", || one.shares() && other.shares()).await;
    store.does(&["ACL", "SETUSER", "default", "-evalsha", "-eval"]).await;
    works(&one, "a", 1).await;
    assert!(one.shares(), "all else is shared");
    let path = "/api/status/sessions/a";
    assert_eq!(other.get(path).await.status, 404);
    store.does(&["ACL", "SETUSER", "default", "+@all"]).await;
    patiently("the other proxy has it", async {
        while other.get(path).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_store_that_only_reads_is_none_until_it_writes() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let olol = proxy(&cluster, &store.toml()).await;
    until("it shares", || olol.shares()).await;
    // A replica of one that is not there; it has what it had.
    store.does(&["REPLICAOF", "127.0.0.1", "1"]).await;
    until("it is noticed", || !olol.shares()).await;
    works(&olol, "a", 1).await;
    assert!(shown(&olol).await["reason"].as_str().unwrap().to_uppercase().contains("READONLY"));
    store.does(&["REPLICAOF", "NO", "ONE"]).await;
    until("it shares again", || olol.shares()).await;
    works(&olol, "a", 2).await;
}

#[tokio::test]
async fn whatever_a_store_says_or_does_not_say_nobody_is_held_up() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let middleman = Middleman::before(store.address()).await;
    let olol = proxy(&cluster, &Store::toml_for(&format!("redis://{}", middleman.address()))).await;
    let ills = [
        Mood::Late(Duration::from_secs(2)),
        Mood::Silent,
        Mood::HangsUp,
        Mood::Babbles(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        Mood::Babbles(b"\x16\x03\x01\xff\xff\x00"),
        Mood::Babbles(b"*2147483647\r\n"),
        Mood::Babbles(b"$2147483647\r\nx"),
        Mood::Babbles(b"-LOADING it is not there yet\r\n"),
        Mood::Babbles(b"+OK\r\n"),
    ];
    for (round, ill) in ills.into_iter().enumerate() {
        until("it shares", || olol.shares()).await;
        middleman.is(ill);
        until("it is noticed", || !olol.shares()).await;
        works(&olol, &format!("s{round}"), 1).await;
        let told = shown(&olol).await;
        assert!(told["state"] == "degraded" && !told["reason"].as_str().unwrap().is_empty(), "{ill:?}: {told}");
        assert!(!olol.shares(), "{ill:?}");
        middleman.is(Mood::Passes);
    }
    until("it shares again", || olol.shares()).await;
    works(&olol, "s0", 2).await;
}

#[tokio::test]
async fn however_much_a_store_says_it_takes_no_memory() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let middleman = Middleman::before(store.address()).await;
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("olol.toml");
    let sessions = format!("sessions.dir = '{}'\n", folder.path().display());
    let shares = Store::toml_for(&format!("redis://{}", middleman.address())).replace("5000", "1000");
    std::fs::write(&config, sessions + &shares).unwrap();
    let server = format!("http://{}", cluster.server(0).address());
    let proxy = Process::proxy(&server, &["--config", config.to_str().unwrap()]).await;
    proxy.has_up(1).await;
    let times = |what: &str| proxy.log().matches(what).count();
    for (round, flood) in [
        Mood::Floods(b"$2000000000\r\n", b"x"),
        Mood::Floods(b"*1000000000\r\n", b":1\r\n"),
        // As much as there may be of it, or without an end.
        Mood::Floods(b"*1048575\r\n", b":1\r\n"),
        Mood::Floods(b"+", b"x"),
        Mood::Floods(b"*100000\r\n", b"$1000000\r\n"),
        Mood::Floods(b"", b"*1\r\n"),
        Mood::Floods(b"", b"+OK\r\n"),
    ]
    .into_iter()
    .enumerate()
    {
        until("it is found", || times("the store that proxies share is there") == round + 1).await;
        middleman.is(flood);
        until("it is lost", || times("the store that proxies share is away") == round + 1).await;
        assert_eq!(proxy.connect().await.ask(&chat("tiny", "hi")).await.status, 200);
        middleman.is(Mood::Passes);
    }
    let grown = proxy.peak_growth() >> 20;
    eprintln!("a store that floods: {grown} MiB");
    assert!(grown < 400, "{grown} MiB");
}

#[tokio::test]
async fn a_store_that_is_lost_and_found_is_told_once_each_time() {
    let (cluster, store) = (Cluster::of(1).await.all_have_loaded("tiny"), Store::start().await);
    let middleman = Middleman::before(store.address()).await;
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("olol.toml");
    let url = format!("redis://ada:open-sesame@{}", middleman.address());
    store.does(&["ACL", "SETUSER", "ada", "on", ">open-sesame", "allcommands", "allkeys", "allchannels"]).await;
    let sessions = format!("sessions.dir = '{}'\n", folder.path().display());
    std::fs::write(&config, sessions + &Store::toml_for(&url)).unwrap();
    let server = format!("http://{}", cluster.server(0).address());
    let proxy = Process::proxy(&server, &["--config", config.to_str().unwrap()]).await;
    let times = |what: &str| proxy.log().matches(what).count();
    for round in 1..4 {
        until("it is found", || times("the store that proxies share is there") == round).await;
        middleman.is(Mood::HangsUp);
        until("it is lost", || times("the store that proxies share is away") == round).await;
        middleman.is(Mood::Passes);
    }
    until("it is found", || times("the store that proxies share is there") == 4).await;
    assert_eq!((times("the store that proxies share is away"), times("open-sesame")), (3, 0), "{}", proxy.log());
}

#[tokio::test]
async fn a_store_behind_tls_is_used_by_who_knows_its_ca() {
    let folder = tempfile::tempdir().unwrap();
    let ca = |name: &str| {
        let folder = folder.path().join(name);
        certs::init(&folder, 10).unwrap();
        let hosts = vec!["127.0.0.1".to_owned()];
        certs::issue(&folder, &Order { name: "store".to_owned(), hosts, is_client: false, days: 5 }).unwrap();
        folder
    };
    let (ours, another) = (ca("ours"), ca("another"));
    let file = |name: &str| ours.join(name).display().to_string();
    let (cert, key, root) = (file("store.pem"), file("store.key"), file("ca.pem"));
    let options =
        ["--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-ca-cert-file", &root, "--tls-auth-clients", "no"];
    let store = Store::start_with(&options).await;
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let toml = |ca: &std::path::Path| {
        let ca = ca.join("ca.pem").display().to_string();
        format!("{}ca = '{ca}'\n", Store::toml_for(&format!("rediss://{}", store.address())))
    };
    let knows = proxy(&cluster, &toml(&ours)).await;
    let stranger = proxy(&cluster, &toml(&another)).await;
    let plain = proxy(&cluster, &store.toml()).await;
    until("who knows the CA shares", || knows.shares()).await;
    for olol in [&stranger, &plain] {
        works(olol, "a", 1).await;
        let told = shown(olol).await;
        assert!(told["state"] == "degraded" && !told["reason"].as_str().unwrap().is_empty(), "{told}");
    }
    works(&knows, "a", 1).await;
}
