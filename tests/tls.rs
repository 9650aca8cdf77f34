//! TLS: in front of the proxy, and between it and its agents; whose certificates count, and how they are changed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::unnecessary_debug_formatting, reason = "TOML quotes paths as Rust does")]

mod harness;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use harness::cluster::options;
use harness::{Ca, Cluster, Olol, Process, patiently, until};
use olol::agent::{Agent, Options};
use olol::ollama::Endpoint;
use olol::security::tls::{Acceptor, Clients, Config, Connector};
use olol_middleware::cluster::State;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A server, and an agent beside it.
struct Place {
    cluster: Cluster,
    agent: Agent,
}

impl Place {
    async fn with(tls: Config) -> Self {
        let cluster = Cluster::of(1).await.all_have("tiny");
        let ollama = Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap();
        let options = Options { tls: Acceptor::start(&tls).unwrap(), ..options(ollama) };
        Self { cluster, agent: Agent::start(options).await.unwrap() }
    }

    /// A proxy before it, with these lines in its configuration.
    async fn proxy(&self, before: &str, toml: &str) -> Olol {
        Olol::at(vec![format!("0@{before}{}", self.agent.address())], toml).await
    }

    async fn is_used(&self, toml: &str) {
        let olol = self.proxy("", toml).await;
        olol.knows(&self.cluster).await;
        assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    }

    /// Waits until a proxy has given it up, and says why.
    async fn is_given_up(&self, before: &str, toml: &str) -> String {
        let worked = self.cluster.server(0).work();
        let olol = self.proxy(before, toml).await;
        let reason = async {
            loop {
                let page = olol.get("/api/status/servers").await.json();
                if page["servers"][0]["state"] == "down" {
                    return page["servers"][0]["reason"].as_str().unwrap().to_owned();
                }
                tokio::task::yield_now().await;
            }
        };
        let reason = patiently("the agent is given up", reason).await;
        assert_ne!(olol.chat("tiny", "hi").await.status, 200);
        assert_eq!(self.cluster.server(0).work(), worked);
        reason
    }
}

/// Failing checks come soon, and one is enough.
const SOON: &str = "[pool]\ncheck-failures = 1\n";

/// A token that is not that of the agents.
fn stranger(folder: &TempDir) -> String {
    let file = folder.path().join("token");
    std::fs::write(&file, "another-token-of-some-other-cluster-0123").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    format!("[security]\ntoken-file = {file:?}\n")
}

#[tokio::test]
async fn an_agent_with_a_certificate_is_reached_with_the_token_alone() {
    let ca = Ca::with("gpu1");
    let place = Place::with(ca.of("gpu1", Clients::None)).await;
    place.is_used(&ca.toml()).await;
    let olol = place.proxy("tls://", &ca.toml()).await;
    olol.knows(&place.cluster).await;
}

#[tokio::test]
async fn a_machine_with_a_certificate_of_the_cluster_needs_no_token() {
    let (ca, folder) = (Ca::with("gpu1"), tempfile::tempdir().unwrap());
    ca.issue("proxy", &[], false);
    ca.issue("ada", &[], true);
    for asked in [Clients::Optional, Clients::Required] {
        let place = Place::with(ca.of("gpu1", asked)).await;
        place.is_used(&format!("{}{}", ca.showing("proxy"), stranger(&folder))).await;
        // That of a client makes no machine of it.
        let reason = place.is_given_up("", &format!("{}{}", ca.showing("ada"), stranger(&folder))).await;
        assert!(reason.starts_with("refuses our token"), "{reason}");
    }
    let place = Place::with(ca.of("gpu1", Clients::Optional)).await;
    let reason = place.is_given_up("", &format!("{}{}", ca.toml(), stranger(&folder))).await;
    assert!(reason.starts_with("refuses our token"), "{reason}");
}

#[tokio::test]
async fn an_agent_that_requires_certificates_takes_no_others() {
    let (ca, other) = (Ca::with("gpu1"), Ca::with("proxy"));
    ca.issue_ended("old");
    ca.issue_early("early");
    let place = Place::with(ca.of("gpu1", Clients::Required)).await;
    let mixed =
        other.showing("proxy").replace(other.file("ca.pem").to_str().unwrap(), ca.file("ca.pem").to_str().unwrap());
    for (toml, says) in [
        (ca.toml(), "name ours in `client-cert`"),
        (mixed, "not of its CA"),
        (ca.showing("old"), "by its clock our certificate has ended or not begun: look at the clocks"),
        (ca.showing("early"), "by its clock our certificate has ended or not begun: look at the clocks"),
    ] {
        let reason = place.is_given_up("", &format!("{toml}{SOON}")).await;
        assert!(reason.contains(says), "{toml}: {reason}");
    }
}

#[tokio::test]
async fn an_agent_whose_certificate_is_not_the_right_one_is_not_used() {
    let (ca, other) = (Ca::with("gpu1"), Ca::new());
    ca.issue("elsewhere", &["gpu1"], false);
    ca.issue_ended("old");
    ca.issue_early("early");
    for (name, trusts, says) in [
        ("gpu1", &other, "of a CA that is not trusted"),
        ("elsewhere", &ca, "issue one with --host 127.0.0.1"),
        ("old", &ca, "has ended"),
        ("early", &ca, "its certificate has not begun: look at the clocks of both machines"),
    ] {
        let place = Place::with(ca.of(name, Clients::None)).await;
        let reason = place.is_given_up("", &format!("{}{SOON}", trusts.toml())).await;
        assert!(reason.contains("TLS: ") && reason.contains(says), "{name}: {reason}");
        // What fails again says the same again.
        assert!(!reason.contains("UNIX"), "{reason}");
    }
}

#[tokio::test]
async fn tls_is_not_given_up_for_who_has_none() {
    let ca = Ca::with("gpu1");
    let secure = Place::with(ca.of("gpu1", Clients::None)).await;
    for (before, toml) in [("grpc://", format!("{}{SOON}", ca.toml())), ("", SOON.to_owned())] {
        let reason = secure.is_given_up(before, &toml).await;
        assert!(reason.contains("this port speaks TLS, and was called without it"), "{reason}");
    }
    let plain = Place::with(Config::default()).await;
    let reason = plain.is_given_up("tls://", &format!("{}{SOON}", ca.toml())).await;
    assert!(reason.contains("speaks no TLS") && reason.contains("grpc://HOST:PORT"), "{reason}");
    // It may be written so where the way is safe otherwise.
    let olol = plain.proxy("grpc://", &ca.toml()).await;
    olol.knows(&plain.cluster).await;
}

/// Shakes hands with a server as one that knows its CA.
async fn shake(address: SocketAddr, ca: &Ca, protocols: &[&str]) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&ca.file("ca.pem"))).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    patiently("a handshake", TlsConnector::from(Arc::new(config)).connect(name, stream)).await.unwrap()
}

fn certificate(path: &Path) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(path).unwrap()
}

/// The certificate that a server shows now.
async fn shown(address: SocketAddr, ca: &Ca) -> CertificateDer<'static> {
    let stream = shake(address, ca, &[]).await;
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

#[tokio::test]
async fn a_proxy_answers_over_tls_in_both_versions_of_http() {
    let ca = Ca::with("proxy");
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::at(vec![format!("0@http://{}", cluster.server(0).address())], &ca.front("proxy")).await;
    until("the server is up", || olol.is_server_up(0)).await;
    for (offered, taken) in [(&["h2", "http/1.1"][..], "h2"), (&["http/1.1"], "http/1.1")] {
        let stream = shake(olol.address(), &ca, offered).await;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(taken.as_bytes()));
    }
    let mut stream = shake(olol.address(), &ca, &[]).await;
    stream.write_all(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    patiently("an answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("tiny:latest"), "{answer}");
    let stream = shake(olol.address(), &ca, &["h2"]).await;
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let _connection = tokio::spawn(connection);
    let request =
        http::Request::get("https://localhost/api/version").body(http_body_util::Empty::<bytes::Bytes>::new());
    let answer = patiently("an answer", sender.send_request(request.unwrap())).await.unwrap();
    assert_eq!((answer.status(), answer.version()), (http::StatusCode::OK, http::Version::HTTP_2));
    // Who speaks plain HTTP is told so, and who says nothing holds up nobody.
    let plain = olol.get("/api/tags").await;
    assert!(plain.status == 400 && plain.text().contains("HTTP request to an HTTPS server"), "{}", plain.text());
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(TcpStream::connect(olol.address()).await.unwrap());
    }
    shown(olol.address(), &ca).await;
}

/// What it says at a path.
async fn told(olol: &Process, ca: &Ca, path: &str) -> String {
    let mut stream = shake(olol.address(), ca, &[]).await;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    patiently("an answer", stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn certificates_are_changed_without_a_restart() {
    let ca = Ca::with("proxy");
    ca.issue("next", &["127.0.0.1"], false);
    let cluster = Cluster::of(1).await;
    let servers = format!("http://{}", cluster.server(0).address());
    std::fs::write(ca.file("olol.toml"), ca.front("proxy")).unwrap();
    let olol = Process::proxy(&servers, &["--config", ca.file("olol.toml").to_str().unwrap()]).await;
    let [first, next] = ["proxy.pem", "next.pem"].map(|name| certificate(&ca.file(name)));
    assert_eq!(shown(olol.address(), &ca).await, first);
    let mut open = shake(olol.address(), &ca, &[]).await;
    // One without the other is no pair: all stays as it is.
    std::fs::copy(ca.file("next.pem"), ca.file("proxy.pem")).unwrap();
    until("the proxy says that it is no pair", || olol.log().contains("the certificates stay as they were")).await;
    assert_eq!(shown(olol.address(), &ca).await, first);
    assert!(told(&olol, &ca, "/api/status").await.contains("proxy.pem: the certificate and its key cannot be used"));
    assert!(!told(&olol, &ca, "/metrics").await.contains("olol_tls_reloads_total{result=\"failed\"} 0"));
    std::fs::copy(ca.file("next.key"), ca.file("proxy.key")).unwrap();
    let changing = async {
        while shown(olol.address(), &ca).await != next {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    patiently("the new certificate is shown", changing).await;
    assert!(told(&olol, &ca, "/api/status").await.contains("\"faults\":[]"));
    assert!(told(&olol, &ca, "/metrics").await.contains("olol_tls_reloads_total{result=\"ok\"} 1"));
    // What was open goes on.
    open.write_all(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    patiently("an answer", open.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
}

#[tokio::test]
async fn certificates_are_made_by_commands() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("certs");
    let dir = dir.to_str().unwrap();
    let run = async |arguments: &[&str]| {
        let output = Process::run(&[&["certs"], arguments, &["--dir", dir]].concat()).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, _, error) = run(&["issue", "gpu1"]).await;
    assert!(code == Some(1) && error.contains("`olol certs init` makes one"), "{error}");
    assert_eq!(run(&["init"]).await.0, Some(0));
    let (code, out, error) = run(&["issue", "gpu1", "--host", "127.0.0.1", "--host", "gpu1.lan"]).await;
    assert_eq!((code, out), (Some(0), format!("{dir}/gpu1.pem\n{dir}/gpu1.key\n")), "{error}");
    assert_eq!(run(&["issue", "ada", "--client"]).await.0, Some(0));
    for file in std::fs::read_dir(dir).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{}", file.path().display());
    }
    for (arguments, says) in [
        (&["init"][..], "there is a"),
        (&["issue", "gpu1"], "there is a"),
        (&["issue", "ca"], "the CA itself"),
        (&["issue", "../gpu2"], "must be 1 to 64 letters"),
        (&["issue", "gpu2", "--host", "a:1"], "without port"),
    ] {
        let (code, _, error) = run(arguments).await;
        assert!(code == Some(1) && error.contains(says), "{arguments:?}: {error}");
    }
    // A key that is not that of the CA makes nothing.
    std::fs::copy(format!("{dir}/gpu1.key"), format!("{dir}/ca.key")).unwrap();
    let (code, _, error) = run(&["issue", "gpu2"]).await;
    assert!(code == Some(1) && error.contains("do not belong together"), "{error}");
    assert!(!Path::new(&format!("{dir}/gpu2.pem")).exists());
    // And an agent with it.
    let cluster = Cluster::of(1).await;
    let ollama = format!("http://{}", cluster.server(0).address());
    let [cert, key] = ["pem", "key"].map(|end| format!("{dir}/gpu1.{end}"));
    let agent = ["server", "--host", "0.0.0.0", "--port", "0", "--ollama-host", &ollama];
    let agent = Process::start(&[&agent[..], &["--tls-cert", &cert, "--tls-key", &key]].concat()).await;
    assert!(!agent.log().contains("without TLS"), "{}", agent.log());
}

#[tokio::test]
async fn what_is_wrong_with_certificates_is_said() {
    let ca = Ca::with("proxy");
    let write = |toml: &str| {
        std::fs::write(ca.file("olol.toml"), toml).unwrap();
        ca.file("olol.toml")
    };
    let (cert, key, other) = (ca.file("proxy.pem"), ca.file("proxy.key"), ca.file("ca.key"));
    for (toml, says) in [
        (format!("[tls]\ncert = {cert:?}\n"), "a certificate needs its key"),
        ("[tls]\nclients = \"required\"\n".to_owned(), "name its file in `ca`"),
        (format!("[tls]\ncert = {cert:?}\nkey = {other:?}\n"), "cannot be used"),
        (format!("[tls]\ncert = {key:?}\nkey = {key:?}\n"), "has no certificate in it"),
        (format!("[tls]\ncert = {cert:?}\nkey = {cert:?}\n"), "has no key in it"),
        ("[tls]\nca = \"/nowhere/ca.pem\"\n".to_owned(), "/nowhere/ca.pem: cannot be read"),
        ("[proxy]\nservers = [\"tls://a:1\"]\n".to_owned(), "known by the CA of the cluster"),
    ] {
        let file = write(&toml);
        for command in [&["check"][..], &["proxy", "--port", "0", "--config"]] {
            let output = Process::run(&[command, &[file.to_str().unwrap()]].concat()).await;
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.code() == Some(1) && error.contains(says), "{command:?} {toml}: {error}");
        }
    }
}

#[tokio::test]
async fn an_agent_dials_in_over_tls_with_its_certificate_or_with_the_token() {
    let ca = Ca::with("gpu1");
    ca.issue("proxy", &["127.0.0.1"], false);
    let another: olol::security::Token = "another-token-of-some-other-cluster-0123".parse().unwrap();
    for (clients, tokens, is_let_in) in [
        (Clients::Optional, another.clone(), true),
        (Clients::None, options_token(), true),
        (Clients::None, another, false),
    ] {
        let asked = if clients == Clients::None { "none" } else { "optional" };
        let (cert, key) = (ca.file("proxy.pem"), ca.file("proxy.key"));
        let toml = format!("{}cert = {cert:?}\nkey = {key:?}\nclients = \"{asked}\"\n", ca.toml());
        let olol = Olol::at(Vec::new(), &toml).await;
        let cluster = Cluster::of(1).await.all_have("tiny");
        let ollama = Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap();
        let join = vec![format!("https://{}", olol.address()).parse().unwrap()];
        let join_tls = Connector::to_proxies(&ca.of("gpu1", Clients::Optional)).unwrap();
        let options = Options { tokens: tokens.into(), join, join_tls, name: "gpu1".to_owned(), ..options(ollama) };
        let _agent = Agent::start(options).await.unwrap();
        if is_let_in {
            until("it is used", || olol.state_of("gpu1") == Some(State::Up)).await;
        } else {
            until("it is refused", || !olol.refused().is_empty()).await;
            assert!(olol.names().is_empty());
        }
    }
}

fn options_token() -> olol::security::Token {
    harness::cluster::token()
}
