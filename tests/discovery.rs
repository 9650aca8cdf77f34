//! Servers that nobody has named: found on the network of a machine, here on loopback.
//!
//! Each test has a port of mDNS of its own, so that none hears the agents of another.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use harness::cluster::options;
use harness::{Cluster, Olol, Process, patiently, until};
use olol::agent::{Agent, Options};
use olol::discovery::{self, Announcement, Config};
use olol::ollama::Endpoint;
use olol::security::Token;
use serde_json::Value;

/// A port of mDNS that nobody uses.
fn mdns_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An agent that tells of itself on loopback.
async fn announced(
    cluster: &Cluster,
    at: usize,
    port: u16,
    options: impl FnOnce(Options) -> Options,
) -> (Agent, Announcement) {
    let ollama = Endpoint::parse(&cluster.server(at).address().to_string(), 0).unwrap();
    let agent = Agent::start(options(harness::cluster::options(ollama))).await.unwrap();
    let config = Config { mdns_port: port, ..Config::default() };
    let announcement = discovery::announce(agent.tells(), agent.address(), &config).unwrap();
    (agent, announcement)
}

fn named(name: &str) -> impl FnOnce(Options) -> Options {
    move |options| Options { name: name.to_owned(), ..options }
}

/// A proxy that listens on loopback for agents.
async fn listening(port: u16, servers: Vec<String>, more: &str) -> Olol {
    let toml = format!("discovery = {{ mdns = true, mdns-port = {port}, interface = ['127.0.0.1'], {more} }}");
    Olol::at(servers, &toml).await
}

/// The names of the servers and their states, and what was found and is not used, with the reasons.
async fn told(olol: &Olol) -> (Vec<String>, Vec<String>) {
    let page = olol.get("/api/status?detail=servers").await.json();
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let list = |key: &str, of: &[&str]| -> Vec<String> {
        let all = page[key].as_array().unwrap();
        all.iter().map(|one| of.iter().map(|key| text(&one[*key])).collect::<Vec<_>>().join(" ")).collect()
    };
    (list("servers", &["server", "state", "source"]), list("found", &["name", "source", "reason"]))
}

/// Waits until they are as they should be.
async fn until_told(
    olol: &Olol,
    what: &str,
    is_so: impl Fn(&[String], &[String]) -> bool,
) -> (Vec<String>, Vec<String>) {
    let looking = async {
        loop {
            let (servers, found) = told(olol).await;
            if is_so(&servers, &found) {
                return (servers, found);
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    patiently(what, looking).await
}

#[tokio::test]
async fn an_agent_that_announces_itself_serves_and_leaves_when_it_takes_its_word_back() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let port = mdns_port();
    // One is there before the proxy, one comes after it.
    let (first, announcement) = announced(&cluster, 0, port, named("gpu1")).await;
    let olol = listening(port, Vec::new(), "").await;
    until_told(&olol, "the first is found", |servers, _| servers == ["gpu1 up mdns"]).await;
    assert_eq!(olol.chat("tiny", "hi").await.server(), "gpu1");
    let (_second, _announced) = announced(&cluster, 1, port, named("gpu2")).await;
    until_told(&olol, "the second is found", |servers, _| servers == ["gpu1 up mdns", "gpu2 up mdns"]).await;
    announcement.end().await;
    first.stop().await;
    let (_, found) = until_told(&olol, "the first leaves", |servers, _| servers == ["gpu2 up mdns"]).await;
    assert!(found.is_empty(), "{found:?}");
    assert_eq!(olol.chat("tiny", "hi").await.server(), "gpu2");
}

#[tokio::test]
async fn an_agent_of_another_cluster_is_shown_and_not_used() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let port = mdns_port();
    let strange = |options: Options| Options { tokens: Token::make().unwrap().into(), ..named("strange")(options) };
    let (_agent, _announcement) = announced(&cluster, 0, port, strange).await;
    // One that says that it is of our cluster, and is not.
    let (liar, _quiet) = {
        let ollama = Endpoint::parse(&cluster.server(1).address().to_string(), 0).unwrap();
        let liar = Agent::start(strange(options(ollama))).await.unwrap();
        let badge = discovery::Badge {
            name: "liar".to_owned(),
            cluster: discovery::cluster(&harness::cluster::token()),
            ..liar.tells().now()
        };
        let config = Config { mdns_port: port, ..Config::default() };
        let announcement =
            discovery::announce(discovery::Tells::new(move || badge.clone()), liar.address(), &config).unwrap();
        (liar, announcement)
    };
    let olol = listening(port, Vec::new(), "").await;
    let is_told =
        |_: &[String], found: &[String]| found.len() == 2 && found.iter().all(|one| !one.contains("being asked"));
    let (servers, mut found) = until_told(&olol, "both are found", is_told).await;
    found.sort();
    assert!(servers.is_empty(), "{servers:?}");
    assert!(found[0].starts_with("liar mdns refused: no proof of the cluster token"), "{found:?}");
    assert!(found[1].starts_with("strange mdns its token is not ours"), "{found:?}");
    let refusal = olol.chat("tiny", "hi").await;
    assert!(refusal.status >= 400 && cluster.servers().iter().all(|server| server.seen("/api/chat").is_empty()));
    drop(liar);
}

#[tokio::test]
async fn who_is_named_and_found_counts_once() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let port = mdns_port();
    let (first, _one) = announced(&cluster, 0, port, named("gpu1")).await;
    let (_second, _other) = announced(&cluster, 1, port, named("gpu2")).await;
    // By a name that leads to the same address.
    let named = format!("mine@localhost:{}", first.address().port());
    let olol = listening(port, vec![named], "").await;
    until_told(&olol, "both are there", |servers, found| {
        found.is_empty() && servers == ["gpu2 up mdns", "mine up static"]
    })
    .await;
}

#[tokio::test]
async fn two_of_one_name_are_two_servers() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let port = mdns_port();
    let (_first, _one) = announced(&cluster, 0, port, named("gpu")).await;
    let (_second, _other) = announced(&cluster, 1, port, named("gpu")).await;
    let olol = listening(port, Vec::new(), "").await;
    let (servers, _) = until_told(&olol, "both are there", |servers, _| {
        servers.len() == 2 && servers.iter().all(|one| one.contains(" up "))
    })
    .await;
    assert!(servers[0].starts_with("127.0.0.1:") && servers[1].starts_with("gpu "), "{servers:?}");
}

/// An agent called `gpu1` beside the first server, in a process of its own, that announces itself at this port of mDNS.
async fn announcing(cluster: &Cluster, port: u16) -> Process {
    let (ollama, mdns) = (format!("http://{}", cluster.server(0).address()), port.to_string());
    Process::start(&[
        "server",
        "--port",
        "0",
        "--ollama-host",
        &ollama,
        "--discovery",
        "--mdns-port",
        &mdns,
        "--name",
        "gpu1",
    ])
    .await
}

#[tokio::test]
async fn one_that_vanishes_without_a_word_leaves() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let port = mdns_port();
    let mut agent = announcing(&cluster, port).await;
    let olol = listening(port, Vec::new(), "").await;
    until_told(&olol, "it is found", |servers, _| servers == ["gpu1 up mdns"]).await;
    agent.kill().await;
    until_told(&olol, "it leaves", |servers, found| servers.is_empty() && found.is_empty()).await;
    // Another start, another port: it is there again.
    let agent = announcing(&cluster, port).await;
    until_told(&olol, "it is found again", |servers, _| servers == ["gpu1 up mdns"]).await;
    assert_eq!(olol.chat("tiny", "hi").await.server(), "gpu1");
    agent.terminate();
    until_told(&olol, "it leaves again", |servers, found| servers.is_empty() && found.is_empty()).await;
}

#[tokio::test]
async fn one_that_comes_back_elsewhere_before_it_is_missed_gets_its_name_back() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let port = mdns_port();
    let mut before = announcing(&cluster, port).await;
    let olol = listening(port, Vec::new(), "").await;
    until_told(&olol, "it is found", |servers, _| servers == ["gpu1 up mdns"]).await;
    let _now = announcing(&cluster, port).await;
    let (servers, _) = until_told(&olol, "both are there", |servers, _| {
        servers.len() == 2 && servers.iter().all(|one| one.contains(" up "))
    })
    .await;
    assert!(servers[0].starts_with("127.0.0.1:") && servers[1].starts_with("gpu1 "), "{servers:?}");
    before.kill().await;
    until_told(&olol, "the other has its name", |servers, _| servers == ["gpu1 up mdns"]).await;
    assert_eq!(olol.chat("tiny", "hi").await.server(), "gpu1");
}

/// An address of loopback that nobody else uses, so that the usual ports are free there. Not every system has one.
fn own_loopback() -> Option<Ipv4Addr> {
    let byte = || fastrand::u8(1..255);
    let ip = Ipv4Addr::new(127, byte(), byte(), byte());
    std::net::TcpListener::bind((ip, 0)).ok().map(|_| ip)
}

#[tokio::test]
async fn a_scan_finds_agents_and_shows_ollamas_which_the_operator_may_let_in() {
    let Some(ip) = own_loopback() else {
        eprintln!("skipped: this system has one address of loopback alone");
        return;
    };
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let ollama = Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap();
    let listen = SocketAddr::from((ip, olol::pool::AGENT_PORT));
    let _agent = Agent::start(Options { listen, ..named("gpu1")(options(ollama)) }).await.unwrap();
    let next = Ipv4Addr::from(u32::from(ip) ^ 1);
    let bare = tokio::net::TcpListener::bind((next, olol::pool::OLLAMA_PORT)).await.unwrap();
    let target = cluster.server(0).address();
    let _relay = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((mut client, _)) = bare.accept().await {
            tokio::spawn(async move {
                let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    }));
    let scan = format!("discovery = {{ mdns = false, scan = ['{ip}', '{next}'], scan-interval-s = 1");
    let olol = Olol::at(Vec::new(), &format!("{scan} }}")).await;
    let (_, found) =
        until_told(&olol, "both are found", |servers, found| servers == ["gpu1 up scan"] && found.len() == 1).await;
    assert!(found[0].contains("an Ollama without an agent, which proves nothing"), "{found:?}");
    let olol = Olol::at(Vec::new(), &format!("{scan}, scan-ollama = true }}")).await;
    let bare = format!("{next}:11434 up scan");
    until_told(&olol, "both are used", |servers, found| servers == [&bare, "gpu1 up scan"] && found.is_empty()).await;
}

#[tokio::test]
async fn who_names_an_interface_that_is_not_there_learns_what_there_is() {
    for command in ["proxy", "server"] {
        let output = Process::run(&[command, "--port", "0", "--interface", "nope0"]).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{said}");
        assert!(said.contains("no network interface 'nope0'") && said.contains("127.0.0.1"), "{said}");
    }
}

#[tokio::test]
async fn another_way_to_look_is_taken_without_a_restart() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let (port, other) = (mdns_port(), mdns_port());
    let (_agent, _announcement) = announced(&cluster, 0, port, named("gpu1")).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("olol.toml");
    let server = cluster.server(1).address();
    let write = |port: u16| {
        let discovery = format!("discovery = {{ mdns-port = {port}, interface = ['127.0.0.1'] }}");
        let new = folder.path().join("new");
        std::fs::write(&new, format!("proxy.servers = ['other@http://{server}']\n{discovery}\n")).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    write(port);
    let config = file.to_str().unwrap();
    let proxy = Process::start(&["proxy", "--port", "0", "--config", config, "--discovery"]).await;
    proxy.has_up(2).await;
    write(other);
    until("the one that was found leaves", || proxy.log().contains("a server has left")).await;
    proxy.has_up(1).await;
    write(port);
    proxy.has_up(2).await;
}
