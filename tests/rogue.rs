//! A rogue proxy at an agent: one that does not know the token, one that has listened to who does, and one that has it and does
//! what no proxy would; and the proxy of the cluster, which is served beside it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use harness::cluster::{agent, token};
use harness::grpc::client;
use harness::{Cluster, Olol, Process, patiently, until};
use olol::ollama::Endpoint;
use olol::security::proof::{Purpose, Side, Transcript};
use olol_proto::v1::membership_client::MembershipClient;
use olol_proto::v1::server_client::ServerClient;
use olol_proto::v1::{
    CopyModelRequest, CopyOrder, CopySource, DescribeRequest, Header, HelloRequest, ProveRequest, RelayHead,
    RelayRequest, TellTurnsRequest, Turn, WatchRequest,
};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::{Channel, Endpoint as To};

async fn channel(address: SocketAddr) -> Channel {
    let to = To::from_shared(format!("http://{address}")).unwrap();
    patiently("a connection", to.connect()).await.unwrap()
}

/// Says Hello as one who has dialled this address with this nonce; all that a proof is about.
async fn hello(at: &mut MembershipClient<Channel>, address: SocketAddr, caller: [u8; 32]) -> Transcript {
    let hello = HelloRequest { nonce: caller.to_vec().into(), address: address.to_string(), bound: false };
    let answer = patiently("an answer", at.hello(hello)).await.unwrap().into_inner();
    let agent = answer.nonce.as_ref().try_into().unwrap();
    Transcript { purpose: Purpose::Call, address: address.to_string(), bound: false, caller, agent }
}

async fn proves(at: &mut MembershipClient<Channel>, proof: Vec<u8>) -> Code {
    let proved = patiently("an answer", at.prove(ProveRequest { proof: proof.into() })).await;
    proved.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn a_proof_is_good_once_and_for_whom_it_was_made() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = agent(Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap()).await;
    let address = agent.address();
    let describes = async |channel: &Channel| {
        let asked = ServerClient::new(channel.clone()).describe(DescribeRequest::default()).await;
        asked.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    // One of the cluster, and somebody who has read all of it.
    let honest = channel(address).await;
    let mut at = MembershipClient::new(honest.clone());
    let transcript = hello(&mut at, address, [1; 32]).await;
    let recorded = transcript.proof(&token(), Side::Caller);
    assert_eq!(proves(&mut at, recorded.clone()).await, Code::Ok);
    assert_eq!(describes(&honest).await, Code::Ok);
    let rogue = channel(address).await;
    let mut at = MembershipClient::new(rogue.clone());
    assert_eq!(proves(&mut at, recorded.clone()).await, Code::Unauthenticated, "nobody has said Hello");
    let again = hello(&mut at, address, [1; 32]).await;
    assert_ne!(again.agent, transcript.agent, "the agent never says the same");
    assert_eq!(proves(&mut at, recorded.clone()).await, Code::Unauthenticated, "it was for another Hello");
    // What the agent has proved of itself is no proof of the other's, and that of another purpose is none.
    let hello_of = hello(&mut at, address, [2; 32]).await;
    assert_eq!(proves(&mut at, hello_of.proof(&token(), Side::Agent)).await, Code::Unauthenticated);
    let joins = Transcript { purpose: Purpose::Join, ..hello(&mut at, address, [3; 32]).await };
    assert_eq!(proves(&mut at, joins.proof(&token(), Side::Caller)).await, Code::Unauthenticated);
    let other = "another-token-of-some-other-cluster-0123".parse().unwrap();
    let wrong = hello(&mut at, address, [4; 32]).await;
    assert_eq!(proves(&mut at, wrong.proof(&other, Side::Caller)).await, Code::Unauthenticated);
    assert_eq!(proves(&mut at, wrong.proof(&token(), Side::Caller)).await, Code::Unauthenticated, "one attempt each");
    for proof in [Vec::new(), vec![0; 32], vec![0; 31], recorded.repeat(20)] {
        hello(&mut at, address, [5; 32]).await;
        assert_eq!(proves(&mut at, proof).await, Code::Unauthenticated);
    }
    assert_eq!(describes(&rogue).await, Code::Unauthenticated);
    assert_eq!(describes(&honest).await, Code::Ok);
    assert_eq!(cluster.server(0).work(), 0);
}

#[tokio::test]
async fn one_that_watches_without_end_takes_room_from_nobody() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = Process::agent(cluster.server(0).address()).await;
    let proxy = Process::proxy(&agent.address().to_string(), &[]).await;
    proxy.has_up(1).await;
    let mut rogue = client(agent.address()).await;
    let mut open = Vec::new();
    let full = loop {
        // Names as long as a message may have them, and nobody reads what is told.
        let caller = format!("{}{}", open.len(), "x".repeat(1 << 20));
        match patiently("an answer", rogue.watch(WatchRequest { interval_ms: 50, caller, ..WatchRequest::default() }))
            .await
        {
            Ok(stream) => open.push(stream),
            Err(status) => break status,
        }
        assert!(open.len() <= 1024);
    };
    assert!(full.code() == Code::ResourceExhausted && full.message().contains("1024 watch"), "{full}");
    let chat = harness::olol::chat("tiny", "hi");
    assert_eq!(proxy.connect().await.ask(&chat).await.status, 200);
    let grown = agent.peak_growth() >> 20;
    eprintln!("{} watch: {grown} MiB", open.len());
    assert!(grown < 200, "{grown} MiB");
    // And there is room again.
    drop(open);
    let again = async {
        while rogue.watch(WatchRequest::default()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    patiently("there is room again", again).await;
}

fn relay(head: RelayHead) -> impl futures_util::Stream<Item = RelayRequest> {
    futures_util::stream::iter([RelayRequest { head: Some(head), body: Bytes::new(), last: true }])
}

#[tokio::test]
async fn absurd_calls_take_little_and_are_remembered_not_at_all() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = Process::agent(cluster.server(0).address()).await;
    let proxy = Process::proxy(&agent.address().to_string(), &[]).await;
    proxy.has_up(1).await;
    let mut rogue = client(agent.address()).await;
    let usual = RelayHead { method: "GET".to_owned(), path: "/api/version".to_owned(), ..RelayHead::default() };
    for number in 0..120 {
        // Sessions and callers with names of megabytes.
        let name = format!("{number}{}", "s".repeat(1 << 20));
        let caller = Header { name: "x-olol-hop".to_owned(), value: Bytes::from(name.clone()) };
        let head = RelayHead { session: name, headers: vec![caller], ..usual.clone() };
        let _ = patiently("an answer", rogue.relay(relay(head))).await;
    }
    let line = |name: &str, value: &'static [u8]| Header { name: name.to_owned(), value: Bytes::from_static(value) };
    for head in [
        RelayHead { deadline_ms: u64::MAX, ..usual.clone() },
        RelayHead { request_id: "\n".repeat(1 << 20), ..usual.clone() },
        RelayHead { path: format!("/{}", "x".repeat(1 << 20)), ..usual.clone() },
        RelayHead { method: "X".repeat(1 << 20), ..usual.clone() },
        RelayHead { headers: vec![line("a", b"b\r\nX-Evil: 1")], ..usual.clone() },
        RelayHead { headers: vec![line("a\r\nX-Evil", b"1")], ..usual.clone() },
        RelayHead { headers: vec![line("content-length", b"18446744073709551615")], ..usual.clone() },
        RelayHead { headers: vec![line("a", b"b"); 100_000], ..usual.clone() },
        RelayHead {
            turn: Some(Turn { known: u64::MAX, goes_on: true, news: vec![u64::MAX; 100_000] }),
            ..usual.clone()
        },
    ] {
        let _ = patiently("an answer", rogue.relay(relay(head))).await;
    }
    for _ in 0..4 {
        let turns = vec![Turn { known: u64::MAX, goes_on: true, news: vec![1; 100] }; 4000];
        let _ = patiently("an answer", rogue.tell_turns(TellTurnsRequest { caller: "x".repeat(100_000), turns })).await;
    }
    // More metadata than anybody has.
    let mut watch = tonic::Request::new(WatchRequest::default());
    watch.metadata_mut().insert("x-much", "x".repeat(1 << 20).parse().unwrap());
    assert!(patiently("an answer", rogue.watch(watch)).await.is_err());
    assert!(
        !cluster
            .server(0)
            .seen("/api/version")
            .iter()
            .any(|seen| format!("{seen:?}").to_lowercase().contains("x-evil: "))
    );
    let chat = harness::olol::chat("tiny", "hi");
    assert_eq!(proxy.connect().await.ask(&chat).await.status, 200);
    let grown = agent.peak_growth() >> 20;
    eprintln!("absurd calls: {grown} MiB");
    assert!(grown < 100, "{grown} MiB");
}

fn order(addresses: &[&str]) -> CopyOrder {
    let source = |address: &&str| CopySource { address: (*address).to_owned(), model: "tiny:latest".to_owned() };
    CopyOrder {
        model: "tiny:latest".to_owned(),
        digest: "a".repeat(64),
        sources: addresses.iter().map(source).collect(),
        ..CopyOrder::default()
    }
}

#[tokio::test]
async fn an_order_to_copy_leads_to_no_place_where_no_server_is_and_tells_nothing_there() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = agent(Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap()).await;
    let trap = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = trap.local_addr().unwrap().port();
    let mut rogue = client(agent.address()).await;
    let mut why = async |order: CopyOrder| {
        let order = CopyModelRequest { order: Some(order), piece: None };
        let mut said =
            patiently("an answer", rogue.copy_model(futures_util::stream::iter([order]))).await.unwrap().into_inner();
        loop {
            match patiently("the end", said.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => return "it has copied".to_owned(),
                Err(status) => return status.message().to_owned(),
            }
        }
    };
    for (address, says) in [
        (format!("http://127.0.0.1:{port}"), "is no agent"),
        (format!("https://127.0.0.1:{port}"), "is no agent"),
        (format!("0.0.0.0:{port}"), "no server can be at"),
        (format!("[::]:{port}"), "no server can be at"),
        ("169.254.169.254:80".to_owned(), "no server can be at"),
        ("[::ffff:169.254.169.254]:80".to_owned(), "no server can be at"),
        ("255.255.255.255:9".to_owned(), "no server can be at"),
        ("224.0.0.251:5353".to_owned(), "no server can be at"),
        (format!("127.0.0.1:{port}/etc/passwd"), "is not an address"),
        ("unix:///var/run/docker.sock".to_owned(), "is not an address"),
        ("a\r\nb:1".to_owned(), "is no"),
        ("x".repeat(1 << 20), "is no address"),
        (String::new(), "names nobody"),
    ] {
        let said = why(order(&[&address])).await;
        assert!(said.contains(says) && said.len() < 2000, "{}: {said}", &address[..address.len().min(80)]);
    }
    for (model, digest) in [
        ("../../x", "a".repeat(64)),
        ("", "a".repeat(64)),
        ("tiny", "../../etc/passwd".to_owned()),
        ("127.0.0.1:1/olol-copy-0/tiny:latest", "a".repeat(64)),
        (&"x".repeat(1 << 20), "a".repeat(64)),
    ] {
        let address = format!("127.0.0.1:{port}");
        let said = why(CopyOrder { model: model.to_owned(), digest, ..order(&[&address]) }).await;
        assert!(!said.contains("copied") && said.len() < 2000, "{said}");
    }
    let nobody = tokio::time::timeout(Duration::from_millis(50), trap.accept()).await;
    assert!(nobody.is_err(), "nobody came there");
    // To what may be an agent it goes, and hears that it is none; what it says there is of no use to anybody.
    let caught = tokio::spawn(async move {
        let (mut stream, _) = trap.accept().await.unwrap();
        let mut said = Vec::new();
        let _ = tokio::time::timeout(Duration::from_millis(500), stream.read_to_end(&mut said)).await;
        said
    });
    let said = why(order(&[&format!("127.0.0.1:{port}")])).await;
    assert!(said.contains("no server gives it"), "{said}");
    let caught = patiently("a caller", caught).await.unwrap();
    assert!(memchr::memmem::find(&caught, token().reveal().as_bytes()).is_none());
    assert!(cluster.server(0).seen("/api/pull").is_empty());
}

#[tokio::test]
async fn orders_without_end_wait_in_no_line_without_end() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = agent(Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap()).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let rogue = client(agent.address()).await;
    let mut orders = JoinSet::new();
    let mut refused = 0;
    for _ in 0..100 {
        let (mut rogue, address) = (rogue.clone(), address.clone());
        orders.spawn(async move {
            let order = CopyModelRequest { order: Some(order(&[address.as_str(); 64])), piece: None };
            let mut said = rogue.copy_model(futures_util::stream::iter([order])).await.unwrap().into_inner();
            said.message().await.unwrap_err().message().to_owned()
        });
    }
    while refused < 100 - 64 {
        let why = patiently("a refusal", orders.join_next()).await.unwrap().unwrap();
        assert!(why.contains("64 copies wait here already"), "{why}");
        refused += 1;
    }
    assert!(orders.try_join_next().is_none());
    // Who orders something and leaves takes no place.
    orders.abort_all();
    while orders.join_next().await.is_some() {}
    let mut rogue = rogue;
    let again = async {
        loop {
            let order = CopyModelRequest { order: Some(order(&["0.0.0.0:1"])), piece: None };
            let mut said = rogue.copy_model(futures_util::stream::iter([order])).await.unwrap().into_inner();
            if said.message().await.unwrap_err().message().contains("no server can be at") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    patiently("there is room again", again).await;
    let olol = Olol::at(vec![format!("0@{}", agent.address())], "").await;
    until("the proxy of the cluster knows it", || olol.is_server_up(0)).await;
    olol.knows(&cluster).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
}
