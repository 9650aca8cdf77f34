//! Agents that dial in, and proof of the token: who is let in, who is not, and what they get to see.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use harness::cluster::{options, token};
use harness::olol::chat;
use harness::{Cluster, Ending, Gate, Olol, Process, Request, patiently, until};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use olol::agent::{Agent, Options};
use olol::ollama::Endpoint;
use olol::pool::ServerSpec;
use olol::security::proof::{self, Side, Transcript};
use olol::security::{Token, Tokens};
use olol_middleware::cluster::{Source, State};
use olol_proto::v1::membership_server::{Membership, MembershipServer};
use olol_proto::v1::{HelloRequest, HelloResponse, ProveRequest, ProveResponse, RelayHead, RelayRequest, WatchRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tower::Service;

/// A token that is good, and not that of the cluster.
const ANOTHER: &str = "another-token-of-some-other-cluster-0123";

/// A proxy without servers.
async fn proxy(toml: &str) -> Olol {
    Olol::at(Vec::new(), toml).await
}

/// What an agent beside a server of a cluster is told that dials these proxies.
fn dialling(cluster: &Cluster, at: usize, name: &str, proxies: &[SocketAddr]) -> Options {
    let ollama = Endpoint::parse(&cluster.server(at).address().to_string(), 0).unwrap();
    let join = proxies.iter().map(|proxy| format!("http://{proxy}").parse().unwrap()).collect();
    Options { name: name.to_owned(), join, ..options(ollama) }
}

async fn agent(cluster: &Cluster, at: usize, name: &str, proxies: &[SocketAddr]) -> Agent {
    Agent::start(dialling(cluster, at, name, proxies)).await.unwrap()
}

async fn is(olol: &Olol, server: &str, state: State) {
    until(&format!("{server} is {state:?}"), || olol.state_of(server) == Some(state)).await;
}

#[tokio::test]
async fn an_agent_that_dials_in_serves() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = proxy("").await;
    let agent = agent(&cluster, 0, "gpu1", &[olol.address()]).await;
    is(&olol, "gpu1", State::Up).await;
    let answer = olol.chat("tiny", "hi").await;
    assert_eq!((answer.status, answer.server(), answer.said().as_str()), (200, "gpu1", "Hello world"));
    let page = olol.get("/api/status/servers").await.json();
    let told = &page["servers"][0];
    assert_eq!(
        (&told["source"], &told["kind"], &told["host"]),
        (&"joined".into(), &"agent".into(), &"127.0.0.1".into())
    );
    // A body that is still coming takes a connection of its own: the agent has one ready.
    let blob = "7".repeat(2 << 20);
    let digest = format!("sha256:{:x}", <sha2::Sha256 as sha2::Digest>::digest(blob.as_bytes()));
    let upload = Request::post(&format!("/api/blobs/{digest}"), blob);
    assert!(olol.ask(&upload).await.status < 300);
    assert!(olol.refused().is_empty());
    assert!(agent.stop().await);
    until("it is not used any more", || olol.state_of("gpu1") == Some(State::Down)).await;
}

#[tokio::test]
async fn a_rule_may_name_an_agent_that_dials_in_later() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let rules = "[discovery]\nmdns = false\n[[alias.rules]]\nservers = [\"gpu1\"]\nmode = \"demand\"";
    let olol = Olol::at(vec![format!("first@http://{}", cluster.server(0).address())], rules).await;
    until("the first is known", || olol.state_of("first") == Some(State::Up)).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 503, "who is demanded is not there yet");
    let _agent = agent(&cluster, 1, "gpu1", &[olol.address()]).await;
    is(&olol, "gpu1", State::Up).await;
    assert_eq!(olol.chat("tiny", "hi").await.server(), "gpu1");
    assert_eq!(cluster.server(0).work(), 0);
}

#[tokio::test]
async fn many_agents_that_dial_in_at_once_are_all_taken() {
    const MANY: usize = 40;
    let cluster = Cluster::of(MANY).await;
    let olol = proxy("").await;
    let names: Vec<String> = (0..MANY).map(|at| format!("gpu{at}")).collect();
    let proxies = [olol.address()];
    let starting = names.iter().enumerate().map(|(at, name)| agent(&cluster, at, name, &proxies));
    let agents = futures_util::future::join_all(starting).await;
    for name in &names {
        is(&olol, name, State::Up).await;
    }
    assert_eq!(agents.len(), olol.names().len());
}

#[tokio::test]
async fn an_agent_with_another_token_is_refused_and_said_to_be() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = proxy("").await;
    let stranger: Token = ANOTHER.parse().unwrap();
    let options = Options { tokens: stranger.into(), ..dialling(&cluster, 0, "gpu1", &[olol.address()]) };
    let _agent = Agent::start(options).await.unwrap();
    until("it is refused", || !olol.refused().is_empty()).await;
    let refused = &olol.refused()[0];
    assert!(refused.name == "gpu1" && refused.reason.contains("no proof of the cluster token"), "{refused:?}");
    assert!(olol.names().is_empty() && olol.chat("tiny", "hi").await.status == 503);
    let page = olol.get("/api/status?detail=proxy").await.json();
    assert_eq!(page["proxy"][0]["joining"]["refused"][0]["name"], "gpu1", "{page}");
    assert_eq!(cluster.server(0).work(), 0);
}

#[tokio::test]
async fn both_logs_tell_of_two_tokens() {
    let cluster = Cluster::of(1).await;
    let nobody = tempfile::tempdir().unwrap();
    let home = ("XDG_CONFIG_HOME", nobody.path().to_str().unwrap());
    let proxy = Process::start_with(
        &[home, ("OLOL_TOKEN", token().reveal())],
        &["proxy", "--port", "0", "--servers", "http://127.0.0.1:9"],
    )
    .await;
    let (ollama, join) = (format!("http://{}", cluster.server(0).address()), format!("http://{}", proxy.address()));
    let arguments = ["server", "--port", "0", "--ollama-host", &ollama, "--name", "gpu1", "--join", &join];
    let agent = Process::start_with(&[home, ("OLOL_TOKEN", ANOTHER)], &arguments).await;
    until("the proxy says it", || proxy.log().contains("no proof of the cluster token")).await;
    until("the agent says it", || agent.log().contains("a proxy cannot be joined now")).await;
    assert!(agent.log().contains("`olol token` prints it") && proxy.log().contains("gpu1"), "{}", agent.log());
    for log in [agent.log(), proxy.log()] {
        assert!(!log.contains(ANOTHER) && !log.contains(token().reveal()), "{log}");
    }
}

#[tokio::test]
async fn an_agent_that_comes_back_keeps_its_place_and_costs_no_request() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = proxy("").await;
    let _other = agent(&cluster, 1, "gpu2", &[olol.address()]).await;
    is(&olol, "gpu2", State::Up).await;
    let mut connection = olol.connect().await;
    let mut place = None;
    for round in 0..3 {
        let agent = agent(&cluster, 0, "gpu1", &[olol.address()]).await;
        is(&olol, "gpu1", State::Up).await;
        let now = olol.place_of("gpu1");
        assert_eq!(*place.get_or_insert(now), now);
        for turn in 0..10 {
            let answer = connection.ask(&chat("tiny", &format!("{round} {turn}"))).await;
            assert_eq!(answer.status, 200);
        }
        if round == 1 {
            // As if it was killed.
            drop(agent);
        } else {
            assert!(agent.stop().await);
        }
        for turn in 0..10 {
            let answer = connection.ask(&chat("tiny", &format!("{round} {turn} again"))).await;
            assert_eq!(answer.status, 200);
        }
        is(&olol, "gpu1", State::Down).await;
    }
}

#[tokio::test]
async fn an_agent_that_says_goodbye_finishes_its_streams_and_gets_nothing_new() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let olol = proxy("").await;
    let first = agent(&cluster, 0, "gpu1", &[olol.address()]).await;
    is(&olol, "gpu1", State::Up).await;
    let mut stream = olol.begin(&chat("tiny", "hi")).await;
    cluster.server(0).asked(1).await;
    let _second = agent(&cluster, 1, "gpu2", &[olol.address()]).await;
    is(&olol, "gpu2", State::Up).await;
    let ending = tokio::spawn(first.stop());
    until("it is let rest", || olol.is_draining("gpu1")).await;
    for turn in 0..8 {
        let answer = olol.chat("tiny", &format!("turn {turn}")).await;
        assert_eq!((answer.status, answer.server(), answer.header("x-olol-attempts")), (200, "gpu2", ""));
    }
    gate.open();
    let answer = stream.answer().await;
    assert_eq!((answer.said().as_str(), answer.ending, answer.server()), ("Hello world", Ending::LastChunk, "gpu1"));
    assert!(patiently("it ends", ending).await.unwrap());
    is(&olol, "gpu1", State::Down).await;
}

#[tokio::test]
async fn an_agent_that_does_not_come_back_leaves_after_its_lease() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = proxy("[discovery]\njoin-lease-s = 1\n").await;
    let agent = agent(&cluster, 0, "gpu1", &[olol.address()]).await;
    is(&olol, "gpu1", State::Up).await;
    drop(agent);
    is(&olol, "gpu1", State::Down).await;
    until("it has left", || olol.names().is_empty()).await;
}

#[tokio::test]
async fn agents_of_one_name_are_two_servers() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let olol = proxy("").await;
    let _one = agent(&cluster, 0, "gpu", &[olol.address()]).await;
    is(&olol, "gpu", State::Up).await;
    let other = agent(&cluster, 1, "gpu", &[olol.address()]).await;
    is(&olol, "gpu-2", State::Up).await;
    assert_eq!(olol.names(), ["gpu", "gpu-2"]);
    drop(other);
    is(&olol, "gpu-2", State::Down).await;
    assert_eq!(olol.state_of("gpu"), Some(State::Up));
}

#[tokio::test]
async fn an_agent_serves_two_proxies_and_finds_one_that_is_started_again() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let mut first = Process::start(&["proxy", "--port", "0", "--servers", "http://127.0.0.1:9"]).await;
    let second = proxy("").await;
    let _agent = agent(&cluster, 0, "gpu1", &[first.address(), second.address()]).await;
    is(&second, "gpu1", State::Up).await;
    first.has_up(1).await;
    let port = first.address().port().to_string();
    first.kill().await;
    assert_eq!(second.chat("tiny", "hi").await.status, 200);
    let again = Process::start(&["proxy", "--port", &port, "--servers", "http://127.0.0.1:9"]).await;
    again.has_up(1).await;
    assert_eq!(again.connect().await.ask(&chat("tiny", "hi")).await.server(), "gpu1");
}

#[tokio::test]
async fn an_agent_that_a_proxy_reaches_by_itself_does_not_join_it() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let olol = Olol::at(vec![format!("named@{address}")], "").await;
    let options = dialling(&cluster, 0, "gpu1", &[olol.address()]);
    let _agent = Agent::start(Options { listen: address, ..options }).await.unwrap();
    until("it is one server", || olol.state_of("named") == Some(State::Up) && olol.names() == ["named"]).await;
}

#[tokio::test]
async fn whoever_asks_to_join_in_another_way_is_told_how() {
    let olol = proxy("").await;
    let plain = olol.get("/olol/join").await;
    assert_eq!((plain.status, plain.header("upgrade")), (426, "olol-join"));
    assert!(plain.text().contains("olol server --join"));
    let mut stream = TcpStream::connect(olol.address()).await.unwrap();
    let head =
        "POST /olol/join HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: olol-join\r\nolol-name: a b\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 12];
    patiently("an answer", stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 400");
    // The port goes on as before.
    assert_eq!(olol.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn a_visitor_that_proves_nothing_is_not_kept() {
    let olol = proxy("").await;
    let mut stream = TcpStream::connect(olol.address()).await.unwrap();
    let head = "POST /olol/join HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: olol-join\r\nolol-name: a\r\nolol-instance: b\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    let _ = patiently("it is closed", stream.read_to_end(&mut all)).await;
    assert!(all.starts_with(b"HTTP/1.1 101"));
    until("it is remembered", || olol.refused().len() == 1).await;
    assert!(olol.refused()[0].reason.starts_with("refused: no proof of the cluster token"), "{:?}", olol.refused());
}

/// Hands everything on between whoever comes and another, as long as it is told to.
struct Relay {
    address: SocketAddr,
    flows: watch::Sender<bool>,
    /// What has passed, in both directions.
    seen: Arc<Mutex<Vec<u8>>>,
    _task: JoinSet<()>,
}

impl Relay {
    async fn to(other: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (flows, flowing) = watch::channel(true);
        let seen = Arc::<Mutex<Vec<u8>>>::default();
        let passed = seen.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut pipes = JoinSet::new();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let Ok(far) = TcpStream::connect(other).await else { continue };
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                pipes.spawn(pass(near_in, far_out, flowing.clone(), passed.clone()));
                pipes.spawn(pass(far_in, near_out, flowing.clone(), passed.clone()));
            }
        });
        Self { address, flows, seen, _task: task }
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut flows: watch::Receiver<bool>,
    seen: Arc<Mutex<Vec<u8>>>,
) {
    let mut bytes = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        if flows.wait_for(|flows| *flows).await.is_err() {
            return;
        }
        seen.lock().unwrap().extend_from_slice(&bytes[..length]);
        if to.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_cable_that_is_cut_is_noticed_on_both_ends() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = proxy("[discovery]\njoin-probe-s = 1\n[pool]\ncheck-interval-ms = 2000\n").await;
    let relay = Relay::to(olol.address()).await;
    let _agent = agent(&cluster, 0, "gpu1", &[relay.address]).await;
    is(&olol, "gpu1", State::Up).await;
    relay.flows.send_replace(false);
    is(&olol, "gpu1", State::Down).await;
    relay.flows.send_replace(true);
    is(&olol, "gpu1", State::Up).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
}

#[tokio::test]
async fn a_machine_that_lost_its_power_is_back_under_its_name_before_it_is_missed() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    cluster.server(1).has("since");
    let olol = proxy("").await;
    let relay = Relay::to(olol.address()).await;
    let _before = agent(&cluster, 0, "gpu1", &[relay.address]).await;
    is(&olol, "gpu1", State::Up).await;
    // Nothing comes from it any more, and nobody has closed anything.
    relay.flows.send_replace(false);
    let _back = agent(&cluster, 1, "gpu1", &[olol.address()]).await;
    until("the one that is back serves", || olol.names().len() == 2 || olol.knows_of(0, "since").0).await;
    assert_eq!((olol.names(), olol.state_of("gpu1")), (vec!["gpu1".to_owned()], Some(State::Up)));
    assert_eq!(olol.chat("since", "hi").await.status, 200);
}

fn found(address: SocketAddr) -> ServerSpec {
    ServerSpec::parse(&format!("found@{address}")).unwrap()
}

#[tokio::test]
async fn whoever_hands_everything_on_to_a_true_agent_is_found_out() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = agent(&cluster, 0, "gpu1", &[]).await;
    let relay = Relay::to(agent.address()).await;
    // A mapped port that the operator has named is fine.
    let olol = Olol::at(vec![format!("named@{}", relay.address)], "").await;
    is(&olol, "named", State::Up).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let seen = String::from_utf8_lossy(&relay.seen.lock().unwrap()).into_owned();
    assert!(seen.contains("Hello") && !seen.contains(token().reveal()));
    // One that announces itself is not.
    let other = proxy("").await;
    other.finds(Source::Mdns, &[found(relay.address)]);
    is(&other, "found", State::Down).await;
    assert!(other.reason("found").contains("not reached at the address that was dialled"), "{}", other.reason("found"));
    assert_ne!(other.chat("tiny", "hi").await.status, 200);
    other.finds(Source::Mdns, &[found(agent.address())]);
    is(&other, "found", State::Up).await;
    assert_eq!(other.chat("tiny", "hi").await.status, 200);
}

#[tokio::test]
async fn an_ollama_that_nobody_has_named_is_shown_and_not_used() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = proxy("").await;
    let spec = ServerSpec::parse(&format!("found@http://{}", cluster.server(0).address())).unwrap();
    olol.finds(Source::Scan, &[spec]);
    is(&olol, "found", State::Down).await;
    assert!(olol.reason("found").starts_with("refused: no proof of the cluster token"), "{}", olol.reason("found"));
    let answer = olol.chat("tiny", "hi").await;
    assert!(answer.status == 502 && answer.error().contains("found"), "{}", answer.error());
    assert_eq!(cluster.server(0).work(), 0);
}

/// Somebody who would like to be an agent, and does not know the token.
#[derive(Clone, Default)]
struct Impostor {
    /// The calls that came, whole.
    calls: Arc<Mutex<Vec<String>>>,
    /// Whether it repeats the proof that it was sent, or makes one up.
    begun: Arc<Mutex<Option<HelloRequest>>>,
}

impl Impostor {
    async fn start(&self) -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        let this = self.clone();
        task.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let this = this.clone();
                let service = hyper::service::service_fn(move |request| this.clone().answer(request));
                tokio::spawn(
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        (address, task)
    }

    async fn answer(
        self,
        request: hyper::Request<Incoming>,
    ) -> Result<hyper::Response<tonic::body::Body>, std::convert::Infallible> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        self.calls.lock().unwrap().push(format!("{} {:?} {}", head.uri.path(), head.headers, body.escape_ascii()));
        let request = hyper::Request::from_parts(head, http_body_util::Full::<Bytes>::new(body));
        MembershipServer::new(self).call(request).await
    }
}

#[tonic::async_trait]
impl Membership for Impostor {
    async fn hello(
        &self,
        request: tonic::Request<HelloRequest>,
    ) -> Result<tonic::Response<HelloResponse>, tonic::Status> {
        let hello = request.into_inner();
        *self.begun.lock().unwrap() = Some(hello.clone());
        let caller = hello.nonce.as_ref().try_into().unwrap();
        let transcript = Transcript {
            purpose: proof::Purpose::Call,
            address: hello.address,
            bound: hello.bound,
            caller,
            agent: caller,
        };
        // A proof under another token, and nonsense.
        let made_up = transcript.proof(&ANOTHER.parse().unwrap(), Side::Agent);
        let proofs = vec![made_up.into(), Bytes::from_static(&[0; 32]), Bytes::new()];
        Ok(tonic::Response::new(HelloResponse { nonce: hello.nonce, proofs }))
    }

    async fn prove(
        &self,
        _request: tonic::Request<ProveRequest>,
    ) -> Result<tonic::Response<ProveResponse>, tonic::Status> {
        Ok(tonic::Response::new(ProveResponse { instance_id: "impostor".to_owned() }))
    }
}

#[tokio::test]
async fn who_cannot_prove_to_be_an_agent_gets_nothing_of_the_user() {
    let impostor = Impostor::default();
    let (address, _task) = impostor.start().await;
    let named = Olol::at(vec![format!("found@{address}")], "").await;
    let discovered = proxy("").await;
    discovered.finds(Source::Mdns, &[found(address)]);
    for olol in [&named, &discovered] {
        is(olol, "found", State::Down).await;
        assert!(olol.reason("found").starts_with("refused: no proof of the cluster token"), "{}", olol.reason("found"));
        let answer = olol.ask(&chat("tiny", "a secret").header("Authorization", "Bearer mine")).await;
        assert_ne!(answer.status, 200);
    }
    let calls = impostor.calls.lock().unwrap().clone();
    assert!(calls.len() >= 4, "{calls:?}");
    for call in calls {
        assert!(call.starts_with("/olol.v1.Membership/"), "{call}");
        for word in ["secret", "mine", "olol-token", token().reveal()] {
            assert!(!call.contains(word), "{call}");
        }
        // What it was shown is no proof of ours either: it has not proved itself.
        assert!(!call.starts_with("/olol.v1.Membership/Prove") || call.ends_with(r"\x00\x00\x00\x00\x00"), "{call}");
    }
}

fn put(file: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[tokio::test]
async fn a_token_is_changed_while_everything_runs() {
    let cluster = Cluster::of(3).await.all_have("tiny");
    let folder = tempfile::tempdir().unwrap();
    let (of_proxy, of_agent) = (folder.path().join("proxy"), folder.path().join("agent"));
    put(&of_proxy, token().reveal());
    put(&of_agent, token().reveal());
    let olol = proxy(&format!("[security]\ntoken-file = {:?}\n", of_proxy.to_str().unwrap())).await;
    let with = |at: usize, name: &str, tokens: Tokens| {
        Agent::start(Options { tokens, ..dialling(&cluster, at, name, &[olol.address()]) })
    };
    let follows = Tokens::follow(&of_agent).unwrap();
    let _first = with(0, "gpu1", follows.clone()).await.unwrap();
    is(&olol, "gpu1", State::Up).await;
    put(&of_proxy, ANOTHER);
    // A machine that has the new one already, once the proxy has it, too.
    let _second = with(1, "gpu2", ANOTHER.parse::<Token>().unwrap().into()).await.unwrap();
    is(&olol, "gpu2", State::Up).await;
    // One that has the old one still.
    let _third = with(2, "gpu3", token().into()).await.unwrap();
    is(&olol, "gpu3", State::Up).await;
    put(&of_agent, ANOTHER);
    until("the agent has it", || follows.all().len() == 2).await;
    assert_eq!(olol.state_of("gpu1"), Some(State::Up));
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
}

#[tokio::test]
async fn connections_that_prove_nothing_are_few() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = proxy("").await;
    let mut answers = Vec::new();
    let mut kept = Vec::new();
    for number in 0..40 {
        let mut stream = TcpStream::connect(olol.address()).await.unwrap();
        let head = format!(
            "POST /olol/join HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: olol-join\r\nolol-name: n{number}\r\nolol-instance: b\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = vec![0; 12];
        patiently("an answer", stream.read_exact(&mut answer)).await.unwrap();
        answers.push(String::from_utf8(answer).unwrap());
        kept.push(stream);
    }
    assert_eq!(answers.iter().filter(|answer| answer.ends_with("101")).count(), 32, "{answers:?}");
    assert!(answers.last().unwrap().ends_with("429"));
    drop(kept);
    let _agent = agent(&cluster, 0, "gpu1", &[olol.address()]).await;
    is(&olol, "gpu1", State::Up).await;
    assert!(olol.refused().len() <= 32 && olol.names() == ["gpu1"]);
}

#[tokio::test]
async fn an_agent_tells_which_sessions_had_a_turn_there() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = agent(&cluster, 0, "gpu1", &[]).await;
    let mut client = harness::grpc::client(agent.address()).await;
    for session in ["one", "", "two"] {
        let head = RelayHead {
            method: "GET".to_owned(),
            path: "/api/version".to_owned(),
            session: session.to_owned(),
            ..RelayHead::default()
        };
        let request = RelayRequest { head: Some(head), last: true, ..RelayRequest::default() };
        client.relay(futures_util::stream::iter([request])).await.unwrap();
    }
    let mut states = client.watch(WatchRequest::default()).await.unwrap().into_inner();
    let told = async { while states.message().await.unwrap().unwrap().active_sessions != ["one", "two"] {} };
    patiently("it tells of both", told).await;
}

#[tokio::test]
async fn the_environment_may_name_the_proxies() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = proxy("").await;
    let ollama = format!("http://{}", cluster.server(0).address());
    let arguments = ["server", "--port", "0", "--ollama-host", &ollama, "--name", "gpu1"];
    let join = format!("{}, ", olol.address());
    let _idle = Process::start_with(&[("OLOL_JOIN", "")], &arguments).await;
    let _agent = Process::start_with(&[("OLOL_JOIN", &join)], &arguments).await;
    is(&olol, "gpu1", State::Up).await;
    let refused = Process::run(&[&arguments[..], &["--join", "ftp://proxy"]].concat()).await;
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("--join: 'ftp://proxy' is no address of a proxy"), "{said}");
}
