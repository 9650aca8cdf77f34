//! The cluster over TLS: models that are copied, agents that are found or dial in, certificates, CAs and tokens that change
//! while all of it runs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::unnecessary_debug_formatting, reason = "TOML quotes paths as Rust does")]

mod harness;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use harness::cluster::{options, token};
use harness::{Ca, Cluster, Hub, Keeper, Olol, Process, patiently, until};
use olol::agent::{Agent, Options};
use olol::discovery::{self, Announcement};
use olol::models::Brought;
use olol::ollama::Endpoint;
use olol::security::tls::{Acceptor, Clients, Connector};
use olol::security::{Token, Tokens};
use olol_middleware::ServerId;
use olol_middleware::cluster::State;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;

/// How machines of a cluster know each other, over TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Certificate,
    Token,
    Both,
}

impl By {
    const ALL: [Self; 3] = [Self::Certificate, Self::Token, Self::Both];

    /// What an agent is told, and who else there is has told him no token where certificates are enough.
    fn agent(self, ca: &Ca, name: &str, base: Options) -> Options {
        let clients = if self == Self::Token { Clients::None } else { Clients::Optional };
        let tokens = if self == Self::Certificate { Token::make().unwrap() } else { token() };
        let dressed = ca.dress(name, clients, Options { tokens: tokens.into(), name: name.to_owned(), ..base });
        if self != Self::Token {
            return dressed;
        }
        // It shows nobody a certificate when it calls.
        let silent = olol::security::tls::Config { ca: ca.file("ca.pem"), ..Default::default() };
        let (join_tls, connector) = (Connector::to_proxies(&silent).unwrap(), Connector::start(&silent).unwrap());
        Options { join_tls, connector, ..dressed }
    }

    /// The lines of a proxy's configuration.
    fn toml(self, ca: &Ca) -> String {
        if self == Self::Token { ca.toml() } else { ca.showing("proxy") }
    }

    /// The same for one that agents dial.
    fn front(self, ca: &Ca) -> String {
        let asks = if self == Self::Token { "" } else { "clients = \"optional\"\n" };
        format!("{}ca = {:?}\n{asks}", ca.front("proxy"), ca.file("ca.pem"))
    }
}

/// A CA with certificates of the proxy and of two agents, on loopback.
fn ca() -> Ca {
    let ca = Ca::new();
    for name in ["proxy", "gpu0", "gpu1", "next"] {
        ca.issue(name, &["127.0.0.1"], false);
    }
    ca
}

fn beside(cluster: &Cluster, at: usize) -> Options {
    options(Endpoint::parse(&cluster.server(at).address().to_string(), 0).unwrap())
}

/// Weights that are no multiple of anything.
fn weights() -> Vec<u8> {
    (0..1_500_007_u32).map(|at| (at * 7).to_le_bytes()[0]).collect()
}

/// Brings a model to one of two agents from a registry, and to the other from the first.
async fn is_copied(olol: &Olol, hub: &Hub, keepers: &[Keeper], what: &str) {
    until(&format!("both are up: {what}"), || {
        olol.names().len() == 2 && (0..2).all(|at| olol.is_server_up(at) && olol.vitals(at).is_some())
    })
    .await;
    let digest = hub.has("tiny", &[&weights()]);
    let servers = olol.names();
    for (at, wanted) in [(0, Brought::Pulled), (1, Brought::Copied)] {
        let brought = olol.models().bring(&hub.name("tiny"), &ServerId::new(&servers[at]), &mut |_| {}).await;
        assert_eq!(brought.map_err(|error| error.to_string()), Ok(wanted), "{what}");
        let is_known = || olol.listed(at).iter().any(|model| model.digest == digest);
        until(&format!("it is known: {what}"), is_known).await;
    }
    let held: Vec<_> = keepers.iter().map(|keeper| keeper.digest(&hub.name("tiny"))).collect();
    assert_eq!(held, [Some(digest.clone()), Some(digest)], "{what}");
    assert_eq!(hub.gave(), weights().len() as u64, "{what}: the registry is asked once");
}

fn keeper_options(keeper: &Keeper) -> Options {
    options(Endpoint::parse(&keeper.address().to_string(), 0).unwrap())
}

#[tokio::test]
async fn a_model_is_copied_from_agent_to_agent_over_tls() {
    let ca = ca();
    for by in By::ALL {
        let (hub, keepers) = (Hub::start(), [Keeper::start(), Keeper::start()]);
        let mut agents = Vec::new();
        for (at, keeper) in keepers.iter().enumerate() {
            let name = format!("gpu{at}");
            agents.push(Agent::start(by.agent(&ca, &name, keeper_options(keeper))).await.unwrap());
        }
        let servers = agents.iter().enumerate().map(|(at, agent)| format!("{at}@{}", agent.address())).collect();
        let olol = Olol::at(servers, &by.toml(&ca)).await;
        is_copied(&olol, &hub, &keepers, &format!("{by:?}")).await;
    }
}

#[tokio::test]
async fn a_model_is_copied_over_the_proxy_where_agents_do_not_reach_each_other() {
    let ca = ca();
    for by in By::ALL {
        // They have dialled in: nobody knows an address of theirs.
        let (hub, keepers) = (Hub::start(), [Keeper::start(), Keeper::start()]);
        let olol = Olol::at(Vec::new(), &by.front(&ca)).await;
        let mut agents = Vec::new();
        for (at, keeper) in keepers.iter().enumerate() {
            let join = vec![format!("https://{}", olol.address()).parse().unwrap()];
            let options = Options { join, ..keeper_options(keeper) };
            agents.push(Agent::start(by.agent(&ca, &format!("gpu{at}"), options)).await.unwrap());
        }
        is_copied(&olol, &hub, &keepers, &format!("dialled in, {by:?}")).await;
    }
    // Or none of them trusts the other's certificate.
    let (hub, keepers) = (Hub::start(), [Keeper::start(), Keeper::start()]);
    let mut agents = Vec::new();
    for (at, keeper) in keepers.iter().enumerate() {
        let options = By::Both.agent(&ca, &format!("gpu{at}"), keeper_options(keeper));
        agents.push(Agent::start(Options { connector: None, ..options }).await.unwrap());
    }
    let servers = agents.iter().enumerate().map(|(at, agent)| format!("{at}@{}", agent.address())).collect();
    let olol = Olol::at(servers, &By::Both.toml(&ca)).await;
    is_copied(&olol, &hub, &keepers, "without a CA").await;
}

/// A port of mDNS that nobody uses.
fn mdns_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An agent that tells of itself on loopback.
async fn announced(options: Options, port: u16) -> (Agent, Announcement) {
    let agent = Agent::start(options).await.unwrap();
    let config = discovery::Config { mdns_port: port, ..Default::default() };
    let announcement = discovery::announce(agent.tells(), agent.address(), &config).unwrap();
    (agent, announcement)
}

/// A proxy that listens on loopback for agents.
async fn listening(port: u16, toml: &str) -> Olol {
    let discovery = format!("discovery = {{ mdns = true, mdns-port = {port}, interface = ['127.0.0.1'] }}\n");
    Olol::at(Vec::new(), &format!("{discovery}{toml}")).await
}

/// Waits until something was found that is not used, and says why.
async fn found(olol: &Olol) -> String {
    let looking = async {
        loop {
            let page = olol.get("/api/status?detail=servers").await.json();
            let reason = page["found"][0]["reason"].as_str().unwrap_or_default().to_owned();
            if !reason.is_empty() && !reason.contains("being asked") {
                return reason;
            }
            tokio::task::yield_now().await;
        }
    };
    patiently("something is found", looking).await
}

#[tokio::test]
async fn agents_that_announce_themselves_are_known_by_certificate_by_token_or_both() {
    let (ca, cluster) = (ca(), Cluster::of(1).await.all_have("tiny"));
    for by in By::ALL {
        let port = mdns_port();
        let _agent = announced(by.agent(&ca, "gpu0", beside(&cluster, 0)), port).await;
        let olol = listening(port, &by.toml(&ca)).await;
        until(&format!("it is used: {by:?}"), || olol.state_of("gpu0") == Some(State::Up)).await;
        assert_eq!(olol.chat("tiny", "hi").await.server(), "gpu0", "{by:?}");
    }
}

#[tokio::test]
async fn who_announces_itself_and_is_not_known_over_tls_is_shown_with_the_reason() {
    let (ca, other, cluster) = (ca(), ca(), Cluster::of(1).await.all_have("tiny"));
    other.issue_ended("old");
    let stranger = |options: Options| Options { tokens: Token::make().unwrap().into(), ..options };
    let of = |ca: &Ca, name: &str| stranger(By::Both.agent(ca, name, beside(&cluster, 0)));
    for (agent, toml, says) in [
        (of(&ca, "gpu0"), other.toml(), "its certificate is of a CA that is not trusted"),
        (of(&ca, "gpu0"), String::new(), "this proxy knows no CA"),
        (stranger(beside(&cluster, 0)), ca.toml(), "it has no TLS, and this proxy wants it"),
        (of(&other, "old"), other.toml(), "its certificate has ended"),
        // It has the right certificate, but we have neither one nor its token.
        (By::Certificate.agent(&ca, "gpu0", beside(&cluster, 0)), ca.toml(), "refuses our token"),
    ] {
        let port = mdns_port();
        let _agent = announced(agent, port).await;
        let olol = listening(port, &toml).await;
        let reason = found(&olol).await;
        assert!(reason.contains(says), "{says}: {reason}");
        assert!(olol.names().is_empty() && cluster.server(0).work() == 0);
    }
}

/// An address of loopback that nobody else uses, so that the usual ports are free there. Not every system has one.
fn own_loopback() -> Option<Ipv4Addr> {
    let byte = || fastrand::u8(1..255);
    let ip = Ipv4Addr::new(127, byte(), byte(), byte());
    std::net::TcpListener::bind((ip, 0)).ok().map(|_| ip)
}

#[tokio::test]
async fn a_scan_finds_agents_behind_tls() {
    let Some(ip) = own_loopback() else {
        eprintln!("skipped: this system has one address of loopback alone");
        return;
    };
    let (ca, other, cluster) = (ca(), Ca::new(), Cluster::of(1).await.all_have("tiny"));
    ca.issue("scanned", &[&ip.to_string()], false);
    let listen = SocketAddr::from((ip, olol::pool::AGENT_PORT));
    let scan = format!("discovery = {{ mdns = false, scan = ['{ip}'], scan-interval-s = 1 }}\n");
    for by in By::ALL {
        let options = by.agent(&ca, "scanned", Options { listen, ..beside(&cluster, 0) });
        let agent = Agent::start(options).await.unwrap();
        let olol = Olol::at(Vec::new(), &format!("{scan}{}", by.toml(&ca))).await;
        until(&format!("it is used: {by:?}"), || olol.state_of("scanned") == Some(State::Up)).await;
        for (toml, says) in [(other.toml(), "of a CA that is not trusted"), (String::new(), "this proxy knows no CA")] {
            let olol = Olol::at(Vec::new(), &format!("{scan}{toml}")).await;
            let reason = found(&olol).await;
            assert!(reason.contains(says), "{by:?}: {reason}");
        }
        drop(olol);
        agent.stop().await;
    }
}

#[tokio::test]
async fn who_cannot_join_over_tls_says_why() {
    let (ca, other, cluster) = (ca(), ca(), Cluster::of(1).await);
    let ollama = format!("http://{}", cluster.server(0).address());
    let required = format!("{}ca = {:?}\nclients = \"required\"\n", ca.front("proxy"), ca.file("ca.pem"));
    let secure = Olol::at(Vec::new(), &ca.front("proxy")).await;
    let strict = Olol::at(Vec::new(), &required).await;
    let plain = Olol::at(Vec::new(), "").await;
    let files = |of: &Ca, trusted: &Ca| -> Vec<String> {
        let file = |ca: &Ca, name: &str| ca.file(name).to_str().unwrap().to_owned();
        let pairs = [
            ("--tls-cert", file(of, "gpu0.pem")),
            ("--tls-key", file(of, "gpu0.key")),
            ("--tls-ca", file(trusted, "ca.pem")),
        ];
        pairs.into_iter().flat_map(|(flag, file)| [flag.to_owned(), file]).collect()
    };
    for (join, flags, says) in [
        (format!("https://{}", secure.address()), files(&other, &other), "of a CA that is not trusted"),
        (format!("https://{}", secure.address()), Vec::new(), "https:// needs the CA of the cluster: --tls-ca"),
        (format!("http://{}", secure.address()), Vec::new(), "say https://"),
        (format!("https://{}", plain.address()), files(&ca, &ca), "say http://"),
        (format!("https://localhost:{}", secure.address().port()), files(&ca, &ca), "--host localhost"),
        (format!("https://{}", strict.address()), files(&other, &ca), "our certificate is not of its CA"),
    ] {
        let fixed = ["server", "--port", "0", "--ollama-host", &ollama, "--join", &join];
        let arguments: Vec<&str> = fixed.into_iter().chain(flags.iter().map(String::as_str)).collect();
        let agent = Process::start(&arguments).await;
        until(&format!("it says: {says}"), || agent.log().contains(says)).await;
    }
    assert!(secure.names().is_empty() && strict.names().is_empty() && plain.names().is_empty());
}

#[tokio::test]
async fn an_agent_says_whom_it_has_refused() {
    let (ca, other, cluster) = (ca(), ca(), Cluster::of(1).await);
    let ollama = format!("http://{}", cluster.server(0).address());
    let file = |name: &str| ca.file(name).to_str().unwrap().to_owned();
    let (cert, key, authority) = (file("gpu0.pem"), file("gpu0.key"), file("ca.pem"));
    let fixed = ["server", "--port", "0", "--ollama-host", &ollama, "--tls-cert", &cert, "--tls-key", &key];
    let strict = ["--tls-ca", &authority, "--tls-clients", "required"];
    let mixed =
        other.showing("proxy").replace(other.file("ca.pem").to_str().unwrap(), ca.file("ca.pem").to_str().unwrap());
    for (toml, says) in [
        (ca.toml(), "it shows no certificate, and must"),
        (mixed, "its certificate is not of our CA"),
        (String::new(), "the caller does not speak TLS"),
        (other.toml(), "it does not take our certificate"),
    ] {
        // It says so once in a minute.
        let agent = Process::start(&[&fixed[..], &strict].concat()).await;
        let _olol = Olol::at(vec![agent.address().to_string()], &toml).await;
        until(&format!("it says: {says}"), || agent.log().contains(says)).await;
    }
}

/// The certificate that a server shows now.
async fn shown(address: SocketAddr, ca: &Ca) -> CertificateDer<'static> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(&ca.file("ca.pem"))).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let shaking = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config)).connect(name, stream);
    let stream = patiently("a handshake", shaking).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

fn certificate(path: &Path) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(path).unwrap()
}

/// Waits until a server shows this certificate.
async fn until_shown(address: SocketAddr, ca: &Ca, wanted: &str) {
    let wanted = certificate(&ca.file(wanted));
    let looking = async {
        while shown(address, ca).await != wanted {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    patiently("the certificate is shown", looking).await;
}

/// Puts the certificate of another in the place of one.
fn renews(ca: &Ca, name: &str) {
    for end in ["pem", "key"] {
        std::fs::copy(ca.file(&format!("next.{end}")), ca.file(&format!("{name}.{end}"))).unwrap();
    }
}

#[tokio::test]
async fn an_agent_takes_a_new_certificate_up() {
    let (ca, cluster) = (ca(), Cluster::of(1).await.all_have("tiny"));
    let acceptor = Acceptor::start(&ca.of("gpu0", Clients::Optional)).unwrap();
    let agent = Agent::start(Options { tls: acceptor.clone(), ..beside(&cluster, 0) }).await.unwrap();
    until_shown(agent.address(), &ca, "gpu0.pem").await;
    let fault = || acceptor.as_ref().unwrap().fault().unwrap_or_default();
    std::fs::write(ca.file("gpu0.pem"), "none").unwrap();
    until("it says that this is none", || fault().contains("has no certificate in it")).await;
    let olol = Olol::at(vec![format!("gpu0@{}", agent.address())], &ca.toml()).await;
    until("it is up all the same", || olol.state_of("gpu0") == Some(State::Up)).await;
    renews(&ca, "gpu0");
    until_shown(agent.address(), &ca, "next.pem").await;
    assert_eq!(fault(), "");
}

/// Adds the CA of another to the file of one.
fn trusts_too(ca: &Ca, other: &Ca) {
    let both = [ca, other].map(|ca| std::fs::read_to_string(ca.file("ca.pem")).unwrap()).concat();
    let new = ca.file("new.pem");
    std::fs::write(&new, both).unwrap();
    std::fs::rename(new, ca.file("ca.pem")).unwrap();
}

#[tokio::test]
async fn a_ca_is_changed_with_two_in_one_file_for_a_while() {
    let (ca, new, cluster) = (ca(), ca(), Cluster::of(2).await.all_have("tiny"));
    // The proxy and the first agent know the old CA alone, and have certificates of it; the second is of the new one.
    let first = By::Certificate.agent(&ca, "gpu0", beside(&cluster, 0));
    let second = By::Certificate.agent(&new, "gpu1", beside(&cluster, 1));
    let (first, second) = (Agent::start(first).await.unwrap(), Agent::start(second).await.unwrap());
    let servers = vec![format!("gpu0@{}", first.address()), format!("gpu1@{}", second.address())];
    let olol = Olol::at(servers, &ca.showing("proxy")).await;
    until("it knows the first", || olol.state_of("gpu0") == Some(State::Up)).await;
    until("it does not trust the second", || olol.reason("gpu1").contains("of a CA that is not trusted")).await;
    trusts_too(&ca, &new);
    until("the second does not trust it", || olol.reason("gpu1").contains("our certificate is not of its CA")).await;
    trusts_too(&new, &ca);
    until("both are up", || olol.state_of("gpu1") == Some(State::Up)).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    // The proxy's own certificate, which agents are shown, is changed, too: both take it.
    for end in ["pem", "key"] {
        std::fs::copy(new.file(&format!("proxy.{end}")), ca.file(&format!("proxy.{end}"))).unwrap();
    }
    // With the old CA gone from the second's file only the new certificate opens its door.
    std::fs::write(
        new.file("ca.pem"),
        std::fs::read_to_string(new.file("ca.pem"))
            .unwrap()
            .split_inclusive("-----END CERTIFICATE-----\n")
            .next()
            .unwrap(),
    )
    .unwrap();
    let address = second.address();
    assert!(second.stop().await);
    until("the second has gone", || olol.state_of("gpu1") == Some(State::Down)).await;
    let again = By::Certificate.agent(&new, "gpu1", beside(&cluster, 1));
    let _again = Agent::start(Options { listen: address, ..again }).await.unwrap();
    until("it is up again", || olol.state_of("gpu1") == Some(State::Up)).await;
}

#[tokio::test]
async fn who_dials_in_and_who_is_dialled_take_new_cas_up() {
    let (ca, new, cluster) = (ca(), ca(), Cluster::of(1).await.all_have("tiny"));
    let olol = Olol::at(Vec::new(), &By::Certificate.front(&new)).await;
    let join = vec![format!("https://{}", olol.address()).parse().unwrap()];
    let _agent =
        Agent::start(By::Certificate.agent(&ca, "gpu0", Options { join, ..beside(&cluster, 0) })).await.unwrap();
    trusts_too(&ca, &new);
    trusts_too(&new, &ca);
    until("it is up", || olol.state_of("gpu0") == Some(State::Up)).await;
}

#[tokio::test]
async fn a_copy_between_agents_takes_a_new_ca_up() {
    let (ca, new) = (ca(), ca());
    let (hub, keepers) = (Hub::start(), [Keeper::start(), Keeper::start()]);
    let one = Agent::start(By::Certificate.agent(&ca, "gpu0", keeper_options(&keepers[0]))).await.unwrap();
    let other = Agent::start(By::Certificate.agent(&new, "gpu1", keeper_options(&keepers[1]))).await.unwrap();
    let servers = vec![format!("0@{}", one.address()), format!("1@{}", other.address())];
    trusts_too(&ca, &new);
    trusts_too(&new, &ca);
    let olol = Olol::at(servers, &ca.showing("proxy")).await;
    is_copied(&olol, &hub, &keepers, "with two CAs").await;
}

#[tokio::test]
async fn olol_up_has_its_agent_behind_tls_for_others_and_takes_new_certificates_up() {
    let (ca, cluster) = (ca(), Cluster::of(1).await.all_have("tiny"));
    std::fs::write(ca.file("olol.toml"), By::Certificate.front(&ca)).unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_olol"));
    command.args(["up", "--port", "0", "--agent-port", "0", "--no-discovery", "--config"]).arg(ca.file("olol.toml"));
    command.env("OLLAMA_HOST", cluster.server(0).address().to_string()).env("OLOL_TOKEN", token().reveal());
    command.env("XDG_CONFIG_HOME", "/nowhere").env("XDG_STATE_HOME", "/nowhere").env_remove("OLOL_CONFIG");
    let mut up = command.stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(up.stdout.take().unwrap()).lines();
    let mut agent = None;
    while let Some(line) = patiently("it says where it is", lines.next_line()).await.unwrap() {
        agent = agent.or(line.split("agent on ").nth(1).and_then(|rest| rest.trim().parse::<SocketAddr>().ok()));
        if line.contains("Ctrl-C") {
            break;
        }
    }
    let agent = agent.expect("the address of its agent");
    until_shown(agent, &ca, "proxy.pem").await;
    // Another proxy of the cluster needs no token.
    let stranger = tempfile::tempdir().unwrap();
    let file = stranger.path().join("token");
    put(&file, &[&Token::make().unwrap()]);
    let toml = format!("{}[security]\ntoken-file = {file:?}\n", ca.showing("gpu1"));
    let olol = Olol::at(vec![format!("up@tls://{agent}")], &toml).await;
    until("another proxy has it", || olol.state_of("up") == Some(State::Up)).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    renews(&ca, "proxy");
    until_shown(agent, &ca, "next.pem").await;
}

/// Writes a file of tokens, as one would with an editor.
fn put(file: &Path, tokens: &[&Token]) {
    let lines: Vec<&str> = tokens.iter().map(|token| token.reveal()).collect();
    let new = file.with_extension("new");
    std::fs::write(&new, lines.join("\n")).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[tokio::test]
async fn a_token_is_changed_everywhere_and_nobody_is_refused_on_the_way() {
    let (cluster, folder) = (Cluster::of(1).await.all_have("tiny"), tempfile::tempdir().unwrap());
    let [at_agent, at_proxy] = ["agent", "proxy"].map(|name| folder.path().join(name));
    let (old, new) = (token(), Token::make().unwrap());
    put(&at_agent, &[&old]);
    put(&at_proxy, &[&old]);
    let olol = Olol::at(Vec::new(), &format!("[security]\ntoken-file = {at_proxy:?}\n")).await;
    let tokens = Tokens::follow(&at_agent).unwrap();
    let join = || vec![format!("http://{}", olol.address()).parse().unwrap()];
    let steps: [(&Path, &[&Token]); 6] = [
        (&at_agent, &[&old, &new]),
        (&at_proxy, &[&old, &new]),
        (&at_proxy, &[&new, &old]),
        (&at_agent, &[&new, &old]),
        (&at_agent, &[&new]),
        (&at_proxy, &[&new]),
    ];
    for (number, (file, step)) in steps.into_iter().enumerate() {
        let changed = tokens.changed();
        put(file, step);
        if file == at_agent {
            patiently("the agent takes it up", changed).await;
        }
        // Each time one that is new, and proves itself.
        let name = format!("gpu{number}");
        let options = Options { tokens: tokens.clone(), join: join(), name: name.clone(), ..beside(&cluster, 0) };
        let agent = Agent::start(options).await.unwrap();
        until(&format!("{name} is up"), || olol.state_of(&name) == Some(State::Up)).await;
        assert_eq!(olol.chat("tiny", "hi").await.status, 200);
        assert!(olol.refused().is_empty(), "{:?}", olol.refused());
        assert!(agent.stop().await);
    }
    // What was taken out of the file is nobody's token any more.
    let options = Options { tokens: old.into(), join: join(), name: "late".to_owned(), ..beside(&cluster, 0) };
    let _late = Agent::start(options).await.unwrap();
    until("it is refused in the end", || !olol.refused().is_empty()).await;
}
