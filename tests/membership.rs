//! Who the servers are while the proxy runs: some are let rest, some leave, some join.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::chat;
use harness::{Cluster, Ending, Gate, Olol, Process, Request, Way, until};
use serde_json::{Value, json};

async fn tells(olol: &Olol, server: &str, what: &str) -> (u16, Value) {
    let answer = olol.ask(&Request::post(&format!("/api/status/servers/{server}/{what}"), "")).await;
    (answer.status, answer.json())
}

#[tokio::test]
async fn a_server_that_is_drained_finishes_its_streams_and_gets_nothing_new() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have_loaded("tiny");
        let gate = Gate::closed();
        cluster.server(0).is_paced_by(&gate);
        let olol = Olol::start(&cluster, "stack.order = ['model-route', 'affinity', 'retry']").await;
        let name = |at: usize| olol_name(&olol, at);
        let mut stream = olol.connect().await;
        // Whoever answers it: the other is asked until it is the first.
        assert!(tells(&olol, &name(1), "drain").await.0 == 200);
        stream.send(&chat("tiny", "hi")).await;
        cluster.server(0).asked(1).await;
        assert_eq!(tells(&olol, &name(1), "undrain").await.0, 200);
        let (status, told) = tells(&olol, &name(0), "drain").await;
        assert_eq!((status, told), (200, json!({"server": name(0), "draining": true, "in_flight": 1})), "{way:?}");
        for turn in 0..8 {
            let answer = olol.chat("tiny", &format!("turn {turn}")).await;
            assert_eq!((answer.status, answer.server()), (200, &*name(1)), "{way:?}");
        }
        // Its conversation goes on elsewhere.
        assert_eq!(olol.chat("tiny", "hi").await.server(), name(1));
        gate.open();
        let answer = stream.answer().await;
        assert_eq!((answer.said().as_str(), answer.ending), ("Hello world", Ending::LastChunk), "{way:?}");
        let page = olol.get("/api/status/servers").await.json();
        assert_eq!((&page["servers"][0]["state"], &page["servers"][0]["online"]), (&json!("draining"), &json!(true)));
        // It still tells what it has.
        assert_eq!(olol.get("/api/tags").await.header("x-olol-partial"), "");
        tells(&olol, &name(1), "drain").await;
        let refusal = olol.chat("tiny", "hi").await;
        assert_eq!(refusal.status, 503);
        assert!(refusal.error().contains("being drained"), "{}", refusal.error());
        tells(&olol, &name(0), "undrain").await;
        assert_eq!(olol.chat("tiny", "hi").await.server(), name(0));
    }
}

fn olol_name(olol: &Olol, at: usize) -> String {
    olol.names()[at].clone()
}

#[tokio::test]
async fn what_cannot_be_drained_is_said() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let (status, told) = tells(&olol, "nobody", "drain").await;
    let name = olol_name(&olol, 0);
    assert_eq!(
        (status, told["error"].as_str().unwrap()),
        (404, &*format!("there is no server 'nobody'; the servers are {name}"))
    );
    assert_eq!(tells(&olol, &name, "restart").await.0, 404);
    let port = olol.address().port().to_string();
    let run = async |arguments: &[&str]| Process::run(&[arguments, &["--port", &port]].concat()).await;
    let output = run(&["drain", &name, "--wait"]).await;
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("{name} gets nothing new, and has nothing left to do\n")
    );
    let output = run(&["undrain", &name]).await;
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{name} takes calls again\n"));
    let output = run(&["drain", "nobody"]).await;
    assert!(
        !output.status.success() && String::from_utf8(output.stderr).unwrap().contains("there is no server 'nobody'")
    );
}

#[tokio::test]
async fn servers_join_and_leave_by_the_file_and_streams_go_on() {
    let cluster = Cluster::of(3).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("olol.toml");
    let names = |servers: &[usize]| {
        let servers = servers.iter().map(|at| format!("s{at}@http://{}", cluster.server(*at).address()));
        let text = format!("proxy.servers = {:?}\n", servers.collect::<Vec<_>>());
        let new = folder.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    names(&[0]);
    let proxy = Process::start(&["proxy", "--port", "0", "--config", file.to_str().unwrap()]).await;
    proxy.has_up(1).await;
    let mut stream = proxy.connect().await;
    stream.send(&chat("tiny", "hi")).await;
    cluster.server(0).asked(1).await;
    names(&[1, 2]);
    proxy.has_up(2).await;
    let mut asked = std::collections::HashSet::new();
    let mut connection = proxy.connect().await;
    until_known(&mut connection, 2).await;
    for turn in 0..20 {
        let answer = connection.ask(&chat("tiny", &format!("turn {turn}"))).await;
        asked.insert(answer.server().to_owned());
    }
    assert_eq!(asked, ["s1", "s2"].map(str::to_owned).into());
    gate.open();
    let answer = stream.answer().await;
    assert_eq!((answer.said().as_str(), answer.ending, answer.server()), ("Hello world", Ending::LastChunk, "s0"));
    names(&[0, 2]);
    until("the log tells who left", || proxy.log().contains("a server has left")).await;
}

/// Waits until the page shows just so many servers.
async fn until_known(connection: &mut harness::Connection, count: usize) {
    let known = async {
        loop {
            let page = connection.ask(&Request::get("/api/status/servers")).await.json();
            let servers = page["servers"].as_array().unwrap();
            if servers.len() == count && servers.iter().all(|server| server["state"] == "up") {
                return;
            }
        }
    };
    harness::patiently("the servers are known", known).await;
}
