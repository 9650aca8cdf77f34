//! Ollamas behind something that ends TLS for them, and commands that ask a proxy over TLS.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::unnecessary_debug_formatting, reason = "TOML quotes paths as Rust does")]

mod harness;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use harness::olol::chat;
use harness::{Ca, Cluster, Ending, Gate, Olol, Process, Request, patiently, until};
use olol::security::tls::{Acceptor, Clients};
use olol_middleware::cluster::State;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Ends TLS for a server, as nginx or Caddy would.
struct Terminator {
    address: SocketAddr,
    /// Connections that it has taken.
    taken: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Terminator {
    async fn before(server: SocketAddr, ca: &Ca) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = Acceptor::start(&ca.of("front", Clients::None)).unwrap().unwrap();
        let taken = Arc::<AtomicUsize>::default();
        let (counted, mut task) = (taken.clone(), JoinSet::new());
        task.spawn(async move {
            let mut pipes = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, counted) = (acceptor.clone(), counted.clone());
                pipes.spawn(async move {
                    let Ok((mut client, _)) = acceptor.accept(stream).await else { return };
                    counted.fetch_add(1, Ordering::Relaxed);
                    let mut server = TcpStream::connect(server).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { address, taken, _task: task }
    }
}

/// The lines that name the CA of a server.
fn trusting(ca: &Ca) -> String {
    format!("[tls]\nserver-ca = {{ \"gpu*\" = {:?} }}\n[pool]\ncheck-failures = 1\n", ca.file("ca.pem"))
}

#[tokio::test]
async fn an_ollama_behind_tls_is_a_server_like_any_other() {
    let (ca, cluster) = (Ca::with("front"), Cluster::of(1).await.all_have("tiny"));
    let front = Terminator::before(cluster.server(0).address(), &ca).await;
    let olol = Olol::at(vec![format!("gpu1@https://{}", front.address)], &trusting(&ca)).await;
    until("it is up", || olol.state_of("gpu1") == Some(State::Up)).await;
    let mut connection = olol.connect().await;
    let before = front.taken.load(Ordering::Relaxed);
    for turn in 0..20 {
        let answer = connection.ask(&chat("tiny", &format!("turn {turn}"))).await;
        let seen = (answer.status, answer.server(), answer.said(), answer.ending);
        assert_eq!(seen, (200, "gpu1", "Hello world".to_owned(), Ending::LastChunk));
    }
    // Its connections are kept for the next call.
    assert!(front.taken.load(Ordering::Relaxed) - before <= 4, "{}", front.taken.load(Ordering::Relaxed) - before);
    let seen = cluster.server(0).seen("/api/chat").pop().unwrap();
    assert_eq!(seen.headers.get("host"), Some(front.address.to_string().as_str()));
    let page = olol.get("/api/status/servers").await.json();
    let (kind, port) = (&page["servers"][0]["kind"], &page["servers"][0]["port"]);
    assert_eq!((kind.as_str(), port.as_u64()), (Some("ollama"), Some(front.address.port().into())));
    // A large body goes there, too, and one that leaves ends its work.
    let blob = "7".repeat(2 << 20);
    let digest = format!("sha256:{:x}", <sha2::Sha256 as sha2::Digest>::digest(blob.as_bytes()));
    assert!(olol.ask(&Request::post(&format!("/api/blobs/{digest}"), blob)).await.status < 300);
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut leaving = olol.begin(&chat("tiny", "bye")).await;
    leaving.head().await;
    drop(leaving);
    until("nothing is at work", || olol.in_flight(0) == 0).await;
    gate.open();
    assert_eq!(olol.chat("tiny", "again").await.status, 200);
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_is_told_and_a_new_ca_is_taken_up() {
    let (ca, other, cluster) = (Ca::with("front"), Ca::new(), Cluster::of(1).await.all_have("tiny"));
    let front = Terminator::before(cluster.server(0).address(), &ca).await;
    let server = format!("gpu1@https://{}", front.address);
    let olol = Olol::at(vec![server.clone()], &trusting(&other)).await;
    until("it is not trusted", || olol.reason("gpu1").contains("name its CA in `server-ca`")).await;
    assert_eq!(cluster.server(0).work(), 0);
    std::fs::copy(ca.file("ca.pem"), other.file("ca.pem")).unwrap();
    until("it is up", || olol.state_of("gpu1") == Some(State::Up)).await;
    // That of another server is not asked, and the system trusts nobody here.
    let olol = Olol::at(vec![server.replace("gpu1", "other")], &trusting(&ca)).await;
    until("it is not trusted", || olol.reason("other").contains("of a CA that is not trusted")).await;
    // One without TLS is not spoken to without.
    let plain = Olol::at(Vec::new(), "").await;
    let olol = Olol::at(vec![format!("gpu1@https://{}", plain.address())], &trusting(&ca)).await;
    until("it speaks no TLS", || olol.reason("gpu1").contains("speaks no TLS; say http://")).await;
    // And one with it says so to who comes without.
    let olol = Olol::at(vec![format!("gpu1@http://{}", front.address)], &trusting(&ca)).await;
    until("it speaks TLS", || olol.state_of("gpu1") == Some(State::Down)).await;
    assert!(olol.reason("gpu1").contains("HTTPS server"), "{}", olol.reason("gpu1"));
}

#[tokio::test]
async fn an_ollama_is_shown_its_credentials_by_every_call_and_by_the_proxy_itself() {
    let (cluster, folder) = (Cluster::of(1).await.all_have("tiny"), tempfile::tempdir().unwrap());
    let file = folder.path().join("token");
    std::fs::write(&file, "Bearer first\n").unwrap();
    let toml = format!("[pool]\ncredentials = {{ gpu1 = {file:?} }}\n");
    let olol = Olol::at(vec![format!("gpu1@http://{}", cluster.server(0).address())], &toml).await;
    until("it is up", || olol.state_of("gpu1") == Some(State::Up)).await;
    let shown = |path: &str| {
        let seen = cluster.server(0).seen(path).pop()?;
        seen.headers.get("authorization").map(str::to_owned)
    };
    assert_eq!(shown("/api/tags").as_deref(), Some("Bearer first"));
    // What clients show as SDKs do is not the server's.
    olol.ask(&chat("tiny", "hi").header("Authorization", "Bearer ollama")).await;
    assert_eq!(shown("/api/chat").as_deref(), Some("Bearer first"));
    std::fs::write(&file, "Bearer second\n").unwrap();
    let changed = async {
        while shown("/api/chat").as_deref() != Some("Bearer second") {
            assert_eq!(olol.chat("tiny", "hi").await.status, 200);
        }
    };
    patiently("the new one is shown", changed).await;
}

#[tokio::test]
async fn cas_that_the_system_trusts_count() {
    let (ca, cluster) = (Ca::with("front"), Cluster::of(1).await.all_have("tiny"));
    let front = Terminator::before(cluster.server(0).address(), &ca).await;
    let authority = ca.file("ca.pem");
    let trusted = [("SSL_CERT_FILE", authority.to_str().unwrap())];
    let server = format!("https://{}", front.address);
    let proxy = Process::start_with(&trusted, &["proxy", "--port", "0", "--servers", &server]).await;
    proxy.has_up(1).await;
    let answer = proxy.connect().await.ask(&chat("tiny", "hi")).await;
    assert_eq!((answer.status, answer.server()), (200, front.address.to_string().as_str()));
    // An agent may sit before it as well.
    let agent = Process::start_with(&trusted, &["server", "--port", "0", "--ollama-host", &server]).await;
    let proxy = Process::proxy(&agent.address().to_string(), &[]).await;
    proxy.has_up(1).await;
    assert_eq!(proxy.connect().await.ask(&chat("tiny", "hi")).await.status, 200);
}

#[tokio::test]
async fn commands_ask_a_proxy_over_tls_that_has_a_certificate_of_the_cluster() {
    let (ca, cluster) = (Ca::with("proxy"), Cluster::of(1).await.all_have("tiny"));
    let olol = Olol::at(vec![format!("gpu1@http://{}", cluster.server(0).address())], &ca.front("proxy")).await;
    until("it is up", || olol.state_of("gpu1") == Some(State::Up)).await;
    let url = format!("https://{}", olol.address());
    // As `olol certs init` leaves it.
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(home.path().join("olol/certs")).unwrap();
    std::fs::copy(ca.file("ca.pem"), home.path().join("olol/certs/ca.pem")).unwrap();
    let (home, authority) = (home.path().to_str().unwrap(), ca.file("ca.pem"));
    let port = olol.address().port().to_string();
    for trusted in [("XDG_CONFIG_HOME", home), ("SSL_CERT_FILE", authority.to_str().unwrap())] {
        for (arguments, says) in [
            (&["status", "--url", &url][..], "gpu1"),
            (&["models", "ls", "--url", &url], "tiny"),
            (&["drain", "gpu1", "--host", "https://127.0.0.1", "--port", &port], "gpu1"),
            (&["undrain", "gpu1", "--host", "https://127.0.0.1", "--port", &port], "gpu1"),
            (&["client", "--host", "https://127.0.0.1", "--port", &port, "--model", "tiny", "--prompt", "hi"], "Hello"),
        ] {
            let output = Process::run_with(&[trusted], arguments).await;
            let [out, error] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
            assert!(output.status.success() && format!("{out}{error}").contains(says), "{arguments:?}: {out}{error}");
        }
    }
    for (arguments, says) in [
        (&["status", "--url", &url][..], "of a CA that is not trusted"),
        (&["status", "--url", &url.replace("https", "http")], "speaks TLS: say https://"),
        (&["drain", "gpu1", "--port", &port], "speaks TLS: say https://"),
    ] {
        let output = Process::run(arguments).await;
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(says), "{arguments:?}: {error}");
    }
}

#[tokio::test]
async fn commands_show_a_certificate_to_a_proxy_that_wants_one() {
    let (ca, cluster) = (Ca::with("proxy"), Cluster::of(1).await.all_have("tiny"));
    ca.issue("ada", &[], true);
    let other = Ca::new();
    other.issue("ada", &[], true);
    let toml = format!("{}ca = {:?}\nclients = \"required\"\n", ca.front("proxy"), ca.file("ca.pem"));
    let olol = Olol::at(vec![format!("gpu1@http://{}", cluster.server(0).address())], &toml).await;
    until("it is up", || olol.state_of("gpu1") == Some(State::Up)).await;
    let (url, port) = (format!("https://{}", olol.address()), olol.address().port().to_string());
    let path = |ca: &Ca, name: &str| ca.file(name).to_str().unwrap().to_owned();
    let (cert, key, authority) = (path(&ca, "ada.pem"), path(&ca, "ada.key"), path(&ca, "ca.pem"));
    let flags = ["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &authority];
    let variables = [("OLOL_TLS_CERT", cert.as_str()), ("OLOL_TLS_KEY", &key), ("OLOL_TLS_CA", &authority)];
    let at = ["--host", "https://127.0.0.1", "--port", &port];
    let run = async |variables: &[(&str, &str)], arguments: &[&str], more: &[&str]| {
        let output = Process::run_with(variables, &[arguments, more].concat()).await;
        let [out, error] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.success(), format!("{out}{error}"))
    };
    for (arguments, says) in [
        (&["status", "--url", &url][..], "gpu1"),
        (&["models", "ls", "--url", &url], "tiny"),
        (&[&["drain", "gpu1"], &at[..]].concat(), "gpu1"),
        (&[&["undrain", "gpu1"], &at[..]].concat(), "gpu1"),
        (&[&["explain", "--model", "tiny"], &at[..]].concat(), "gpu1"),
        (&[&["client", "--model", "tiny", "--prompt", "hi"], &at[..]].concat(), "Hello"),
    ] {
        for (variables, more) in [(&[][..], &flags[..]), (&variables, &[])] {
            let (is_good, said) = run(variables, arguments, more).await;
            assert!(is_good && said.contains(says), "{arguments:?} {more:?}: {said}");
        }
        let (is_good, said) = run(&[], arguments, &["--tls-ca", &authority]).await;
        assert!(!is_good && said.contains("--tls-cert"), "{arguments:?}: {said}");
    }
    let (strange, strange_key) = (path(&other, "ada.pem"), path(&other, "ada.key"));
    for (more, says) in [
        (&["--tls-ca", &authority, "--tls-cert", &strange, "--tls-key", &strange_key][..], "not of its CA"),
        (&["--tls-ca", &authority, "--tls-cert", &cert], "name its file with --tls-key"),
        (&["--tls-ca", &authority, "--tls-key", &key], "name its file with --tls-cert"),
        (&["--tls-cert", &cert, "--tls-key", &key], "name its CA in --tls-ca"),
        (&["--tls-ca", "/nowhere/ca.pem"], "/nowhere/ca.pem: cannot be read"),
    ] {
        let (is_good, said) = run(&[], &["status", "--url", &url], more).await;
        // Of a refusal by the other end it is chance whether its words arrive before its end.
        let is_told = said.contains(says) || (says == "not of its CA" && said.contains("name yours in --tls-cert"));
        assert!(!is_good && is_told, "{more:?}: {said}");
    }
}
