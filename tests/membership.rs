//! Who the servers are while the proxy runs: some are let rest, some leave, some join.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use harness::olol::chat;
use harness::{Ca, Cluster, Ending, Gate, Olol, Process, Request, Way, until};
use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use olol::agent::{Agent, Options};
use olol::ollama::Endpoint;
use olol::security::tls::Clients;
use olol_middleware::cluster::State;
use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio_util::task::AbortOnDropHandle;

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

/// The records of a zone, by name and kind.
type Records = HashMap<(String, RecordType), Vec<RData>>;

/// A name server with a few names, none of whose records hold.
struct Zone {
    address: SocketAddr,
    records: Arc<Mutex<Records>>,
    /// Whether it answers at all.
    answers: Arc<AtomicBool>,
    _task: AbortOnDropHandle<()>,
}

impl Zone {
    async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (address, records) = (socket.local_addr().unwrap(), Arc::<Mutex<Records>>::default());
        let answers = Arc::new(AtomicBool::new(true));
        let (known, is_there) = (records.clone(), answers.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            let mut bytes = [0; 1500];
            loop {
                let (length, client) = socket.recv_from(&mut bytes).await.unwrap();
                let question = Message::from_vec(&bytes[..length]).unwrap();
                let query = question.queries[0].clone();
                let mut answer = Message::response(question.metadata.id, OpCode::Query);
                answer.metadata.response_code = ResponseCode::NXDomain;
                let key = (query.name().to_utf8().trim_end_matches('.').to_owned(), query.query_type());
                if let Some(found) = known.lock().unwrap().get(&key) {
                    answer.metadata.response_code = ResponseCode::NoError;
                    for data in found {
                        answer.add_answer(Record::from_rdata(query.name().clone(), 0, data.clone()));
                    }
                }
                answer.add_query(query);
                if is_there.load(Ordering::Relaxed) {
                    socket.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
                }
            }
        }));
        Self { address, records, answers, _task: task }
    }

    fn has(&self, name: &str, kind: RecordType, records: Vec<RData>) {
        self.records.lock().unwrap().insert((name.to_owned(), kind), records);
    }

    fn toml(&self) -> String {
        format!("[discovery]\ndns = [\"{}\"]\ndns-max-age-s = 1\n", self.address)
    }
}

fn a(ip: [u8; 4]) -> RData {
    RData::A(Ipv4Addr::from(ip).into())
}

/// An agent on each of these addresses of the loopback, all on the same port, before one Ollama.
async fn agents(cluster: &Cluster, ips: &[[u8; 4]]) -> (Vec<Agent>, u16) {
    let mut port = 0;
    let mut agents = Vec::new();
    for ip in ips {
        let ollama = Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap();
        let listen = SocketAddr::new(Ipv4Addr::from(*ip).into(), port);
        let options = Options { listen, ..harness::cluster::options(ollama) };
        agents.push(Agent::start(options).await.unwrap());
        port = agents[0].address().port();
    }
    (agents, port)
}

#[tokio::test]
async fn servers_come_and_go_with_the_addresses_of_a_name() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let ips = [[127, 0, 0, 21], [127, 0, 0, 22], [127, 0, 0, 23]];
    let (_agents, port) = agents(&cluster, &ips).await;
    let zone = Zone::start().await;
    zone.has("gpus.lab", RecordType::A, vec![a(ips[1]), a(ips[0])]);
    let olol = Olol::at(vec![format!("dns://gpus.lab:{port}=2")], &zone.toml()).await;
    // The first answer waits for the first look-up.
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let named = |at: &[usize]| at.iter().map(|at| format!("{}:{port}", Ipv4Addr::from(ips[*at]))).collect::<Vec<_>>();
    assert_eq!(olol.names(), named(&[0, 1]));
    zone.has("gpus.lab", RecordType::A, vec![a(ips[2]), a(ips[1])]);
    until("one has left and one has joined", || olol.names() == named(&[1, 2])).await;
    // A name server that is silent takes nobody away; a name that is gone does.
    zone.answers.store(false, Ordering::Relaxed);
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    zone.records.lock().unwrap().clear();
    assert_eq!(olol.names(), named(&[1, 2]));
    zone.answers.store(true, Ordering::Relaxed);
    until("all have left", || olol.names().is_empty()).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 503);
}

#[tokio::test]
async fn agents_behind_a_name_are_reached_over_tls_and_known_by_their_addresses() {
    let (ca, cluster) = (Ca::new(), Cluster::of(1).await.all_have("tiny"));
    // The first has a certificate for its address, the second one for another.
    ca.issue("right", &["127.0.0.24"], false);
    ca.issue("wrong", &["127.0.0.1"], false);
    let mut port = 0;
    let mut agents = Vec::new();
    for (ip, name) in [([127, 0, 0, 24], "right"), ([127, 0, 0, 25], "wrong")] {
        let ollama = Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap();
        let listen = SocketAddr::new(Ipv4Addr::from(ip).into(), port);
        let base = Options { listen, ..harness::cluster::options(ollama) };
        agents.push(Agent::start(ca.dress(name, Clients::Optional, base)).await.unwrap());
        port = agents[0].address().port();
    }
    let zone = Zone::start().await;
    zone.has("gpus.lab", RecordType::A, vec![a([127, 0, 0, 24]), a([127, 0, 0, 25])]);
    let toml = format!("{}{}[pool]\ncheck-failures = 1\n", zone.toml(), ca.toml());
    let olol = Olol::at(vec![format!("dns://gpus.lab:{port}")], &toml).await;
    let named = |end: u8| format!("127.0.0.{end}:{port}");
    until("the first is up", || olol.state_of(&named(24)) == Some(State::Up)).await;
    until("the second is not", || olol.reason(&named(25)).contains("issue one with --host 127.0.0.25")).await;
    assert_eq!(olol.chat("tiny", "hi").await.server(), named(24));
}

#[tokio::test]
async fn services_have_their_ports_and_weights_from_their_records() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let zone = Zone::start().await;
    let service = |at: usize, weight| {
        let target = Name::from_ascii(format!("box{at}.lab.")).unwrap();
        RData::SRV(SRV::new(0, weight, cluster.server(at).address().port(), target))
    };
    zone.has("_ollama._tcp.lab", RecordType::SRV, vec![service(1, 30), service(0, 10)]);
    zone.has("box0.lab", RecordType::A, vec![a([127, 0, 0, 1])]);
    zone.has("box1.lab", RecordType::A, vec![a([127, 0, 0, 1])]);
    let olol = Olol::at(vec!["srv+http://_ollama._tcp.lab".to_owned()], &zone.toml()).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let port = |at: usize| cluster.server(at).address().port();
    assert_eq!(olol.names(), [format!("box0.lab:{}", port(0)), format!("box1.lab:{}", port(1))]);
    let page = olol.get("/api/status/servers").await.json();
    let told: Vec<_> = page["servers"].as_array().unwrap().iter().map(|s| (&s["weight"], &s["source"])).collect();
    assert_eq!(told, [(&json!(10), &json!("dns")), (&json!(30), &json!("dns"))]);
}

#[tokio::test]
async fn who_names_an_ollama_as_an_agent_learns_how_to_name_it() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let named = cluster.server(0).address().to_string();
    let olol = Olol::at(vec![format!("gpu1@{named}")], "[pool]\ncheck-failures = 1\n").await;
    until("it is told", || olol.reason("gpu1").contains("name it as http://HOST:PORT")).await;
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
