//! Those who mean harm at a port of TLS, of the proxy and of an agent; and an honest client that is served beside all of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::unnecessary_debug_formatting, reason = "TOML quotes paths as Rust does")]

mod harness;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use harness::cluster::options;
use harness::{Ca, Cluster, Gate, Olol, Process, patiently, until};
use olol::agent::{Agent, Options};
use olol::ollama::Endpoint;
use olol::security::tls::Clients;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How a client goes about it.
#[derive(Default)]
struct Manner {
    protocols: Vec<&'static str>,
    /// Certificates that it shows, and the key of the first.
    shows: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    /// TLS 1.2, and nothing newer.
    is_old: bool,
}

/// Shakes hands with a server whose CA is known.
async fn try_shake(address: SocketAddr, ca: &Ca, manner: Manner) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca.file("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let versions = if manner.is_old { &[&rustls::version::TLS12][..] } else { rustls::ALL_VERSIONS };
    let builder = builder.with_protocol_versions(versions).unwrap().with_root_certificates(roots);
    let mut config = match manner.shows {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
    };
    config.alpn_protocols = manner.protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    patiently("a handshake", TlsConnector::from(Arc::new(config)).connect(name, stream)).await
}

async fn shake(address: SocketAddr, ca: &Ca) -> TlsStream<TcpStream> {
    try_shake(address, ca, Manner::default()).await.unwrap()
}

/// What one gets over such a connection: an answer, or the reason why there is none.
async fn asks(mut stream: TlsStream<TcpStream>) -> Result<String, String> {
    let request = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let mut answer = String::new();
    let asking = async {
        stream.write_all(request).await?;
        stream.read_to_string(&mut answer).await
    };
    match patiently("an answer", asking).await {
        Ok(_) if answer.starts_with("HTTP/1.1 200") => Ok(answer),
        Ok(_) => Err(answer),
        Err(error) => Err(error.to_string()),
    }
}

/// A proxy behind TLS with one server, and these further lines in its `[tls]`.
async fn front(more: &str) -> (Ca, Cluster, Olol) {
    let (ca, cluster) = (Ca::with("proxy"), Cluster::of(1).await.all_have("tiny"));
    let toml = format!("{}ca = {:?}\n{more}", ca.front("proxy"), ca.file("ca.pem"));
    let olol = Olol::at(vec![format!("0@http://{}", cluster.server(0).address())], &toml).await;
    until("the server is up", || olol.is_server_up(0)).await;
    (ca, cluster, olol)
}

/// One that began a chat before anything happened, and is at its first word.
async fn served(olol: &Olol, ca: &Ca, cluster: &Cluster) -> (TlsStream<TcpStream>, Gate) {
    let gate = Gate::closed();
    cluster.server(0).says(["Hel", "lo"]).is_paced_by(&gate);
    gate.let_through(1);
    let mut stream = shake(olol.address(), ca).await;
    let body = r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}]}"#;
    let head = format!(
        "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut got = Vec::new();
    while !String::from_utf8_lossy(&got).contains("Hel") {
        assert!(patiently("the first word", stream.read_buf(&mut got)).await.unwrap() > 0);
    }
    (stream, gate)
}

/// It goes on as if nothing had happened.
async fn goes_on((mut stream, gate): (TlsStream<TcpStream>, Gate)) {
    gate.open();
    let mut rest = String::new();
    patiently("the rest", stream.read_to_string(&mut rest)).await.unwrap();
    assert!(rest.contains("\"lo\"") && rest.contains("\"done\":true"), "{rest}");
}

/// A client's hello of so many bytes, in records of so many.
fn hello(version: u8, length: usize, record: usize) -> Vec<u8> {
    // Version, random, no session, one cipher, no compression.
    let mut body = vec![3, version];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2f, 1, 0]);
    if let Some(padding) = length.checked_sub(body.len() + 4 + 6) {
        // One extension that pads it, or as much of one as a length can say.
        let padding = u16::try_from(padding).unwrap_or(u16::MAX - 4);
        body.extend((padding + 4).to_be_bytes());
        body.extend([0, 21]);
        body.extend(padding.to_be_bytes());
        body.extend(vec![0; usize::from(padding)]);
    }
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let message = [&[1], &length[1..], &body].concat();
    message.chunks(record).flat_map(|piece| records(&[piece])).collect()
}

/// Records of a handshake.
fn records(pieces: &[&[u8]]) -> Vec<u8> {
    let record =
        |piece: &&[u8]| [&[0x16, 3, 1], &u16::try_from(piece.len()).unwrap().to_be_bytes()[..], piece].concat();
    pieces.iter().flat_map(record).collect()
}

/// What a port says to bytes until it closes; nothing if it waits for more.
async fn says(address: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let mut answer = Vec::new();
    // It may be closed while we still write.
    let (_, read) = tokio::join!(writer.write_all(bytes), async {
        tokio::time::timeout(Duration::from_millis(500), reader.read_to_end(&mut answer)).await
    });
    read.is_ok().then_some(answer)
}

#[tokio::test]
async fn who_only_takes_up_room_makes_room() {
    let (ca, cluster, olol) = front("").await;
    let before = served(&olol, &ca, &cluster).await;
    let begun = hello(3, 500, 500);
    let mut open = Vec::new();
    let is_first_gone = async |open: &mut Vec<TcpStream>| {
        matches!(tokio::time::timeout(Duration::from_millis(1), open[0].read(&mut [0])).await, Ok(Ok(0) | Err(_)))
    };
    let filling = async {
        loop {
            let mut stream = TcpStream::connect(olol.address()).await.unwrap();
            // Some say nothing, some begin to, and some say that they are about to say much.
            match open.len() % 3 {
                0 => {}
                1 => stream.write_all(&begun[..begun.len() / 2]).await.unwrap(),
                _ => stream.write_all(&[0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff]).await.unwrap(),
            }
            open.push(stream);
            if open.len() % 16 == 0 && is_first_gone(&mut open).await {
                return open.len();
            }
        }
    };
    let count = patiently("the first makes room", filling).await;
    // As many as there is room for, of one network.
    assert!(count <= 1024 + 16, "{count}");
    for _ in 0..8 {
        assert!(asks(shake(olol.address(), &ca).await).await.is_ok(), "whoever means it finds a place");
    }
    goes_on(before).await;
}

#[tokio::test]
async fn who_shakes_hands_and_asks_nothing_makes_room() {
    let (ca, cluster, olol) = front("").await;
    let before = served(&olol, &ca, &cluster).await;
    let mut asked = shake(olol.address(), &ca).await;
    asked.write_all(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert!(patiently("an answer", asked.read(&mut [0; 512])).await.unwrap() > 0);
    let mut first = shake(olol.address(), &ca).await;
    let mut http2 =
        try_shake(olol.address(), &ca, Manner { protocols: vec!["h2"], ..Manner::default() }).await.unwrap();
    http2.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut open = Vec::new();
    let filling = async {
        loop {
            open.push(TcpStream::connect(olol.address()).await.unwrap());
            let is_gone = async |stream: &mut TlsStream<TcpStream>| {
                let mut bytes = [0; 512];
                let reading = async { while stream.read(&mut bytes).await.is_ok_and(|length| length > 0) {} };
                tokio::time::timeout(Duration::from_millis(1), reading).await.is_ok()
            };
            if open.len() % 32 == 0 && is_gone(&mut first).await && is_gone(&mut http2).await {
                return open.len();
            }
        }
    };
    let count = patiently("both make room", filling).await;
    assert!(count <= 1024 + 64, "{count}");
    // Who has asked something may be silent for as long as he likes.
    assert!(asks(asked).await.is_ok());
    goes_on(before).await;
}

#[tokio::test]
async fn what_is_no_handshake_ends_at_once_and_in_words_where_there_are_any() {
    let (ca, cluster, olol) = front("").await;
    let before = served(&olol, &ca, &cluster).await;
    let alert = |answer: &[u8]| answer.first() == Some(&0x15);
    let whole = 16 << 10;
    let endless = [&[1, 0xff, 0xff, 0xff], &vec![0; whole - 4][..]].concat();
    let zeros = vec![0; whole];
    for (what, bytes) in [
        ("a version that nobody speaks any more", hello(1, 0, whole)),
        ("a hello without what it needs", hello(3, 0, whole)),
        ("a hello of 60 KB", hello(3, 60_000, whole)),
        ("a hello, byte by byte", hello(3, 200, 1)),
        ("a hello of 16 MB", [records(&[&endless]), records(&[&zeros[..]; 8])].concat()),
        ("a record that is too long", [&[0x16, 3, 1, 0xff, 0xff][..], &vec![0; 65_535]].concat()),
        ("another message than a hello", records(&[&[11, 0, 0, 3, 0, 0, 0]])),
        ("empty records", records(&[&[][..]; 200])),
        (
            "the data of somebody who has shaken hands",
            [&[0x16, 3, 1, 0, 0][..], &[0x17, 3, 3, 0, 5, 1, 2, 3, 4, 5]].concat(),
        ),
    ] {
        let answer = says(olol.address(), &bytes).await.unwrap_or_else(|| panic!("{what}: it waits"));
        assert!(answer.is_empty() || alert(&answer), "{what}: {}", answer.escape_ascii());
        assert!(answer.len() < 100, "{what}: {} bytes", answer.len());
    }
    // Other protocols: a word where they have one for it.
    for (bytes, word) in [
        (&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], &b"HTTP/1.0 400 Bad Request"[..]),
        (b"SSH-2.0-x\r\n", b""),
        (b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10", b""),
    ] {
        let answer = says(olol.address(), bytes).await.expect("it ends");
        assert!(answer.starts_with(word), "{}", answer.escape_ascii());
    }
    let wrong = Manner { protocols: vec!["spdy/3"], ..Manner::default() };
    let error = try_shake(olol.address(), &ca, wrong).await.unwrap_err().to_string();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
    for is_old in [true, false] {
        let manner = Manner { is_old, ..Manner::default() };
        assert!(asks(try_shake(olol.address(), &ca, manner).await.unwrap()).await.is_ok());
    }
    goes_on(before).await;
}

#[tokio::test]
async fn tls_at_a_port_without_it_is_refused_as_go_does_it() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let ca = Ca::new();
    let shaking = try_shake(olol.address(), &ca, Manner::default()).await;
    assert!(shaking.is_err());
    // A line that ends tells it; who sends none is not waited for.
    let answer = says(olol.address(), b"\x16\x03\x01\x02\x00\n\r\n").await.expect("it ends");
    assert!(answer.starts_with(b"HTTP/1.1 400 Bad Request"), "{}", answer.escape_ascii());
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
}

#[tokio::test]
async fn keys_are_not_renewed_without_end() {
    let (ca, cluster, olol) = front("").await;
    let before = served(&olol, &ca, &cluster).await;
    let mut stream = shake(olol.address(), &ca).await;
    let mut renewed = 0;
    let renewing = async {
        loop {
            let (tcp, tls) = stream.get_mut();
            if tls.refresh_traffic_keys().is_err() {
                return;
            }
            while tls.wants_write() {
                let mut bytes = Vec::new();
                tls.write_tls(&mut bytes).unwrap();
                if tcp.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            renewed += 1;
            let mut answer = [0; 512];
            if renewed > 1000
                || matches!(
                    tokio::time::timeout(Duration::from_millis(1), stream.read(&mut answer)).await,
                    Ok(Ok(0) | Err(_))
                )
            {
                return;
            }
        }
    };
    patiently("the end of it", renewing).await;
    assert!(renewed < 1000, "{renewed}");
    goes_on(before).await;
}

#[tokio::test]
async fn certificates_of_clients_are_looked_at_and_not_for_long() {
    let (ca, cluster, olol) = front("clients = \"required\"\n").await;
    let other = Ca::with("proxy");
    ca.issue("ada", &[], true);
    ca.issue_ended("old");
    other.issue("ada", &[], true);
    let of = |ca: &Ca, name: &str| {
        let chain = vec![CertificateDer::from_pem_file(ca.file(&format!("{name}.pem"))).unwrap()];
        (chain, PrivateKeyDer::from_pem_file(ca.file(&format!("{name}.key"))).unwrap())
    };
    let showing = |shows| Manner { shows, ..Manner::default() };
    let authority = |ca: &Ca| CertificateDer::from_pem_file(ca.file("ca.pem")).unwrap();
    // Of a CA that calls itself as ours does, as often as it fits a message, and more often than that.
    let long = |count: usize| {
        let (mut chain, key) = of(&other, "ada");
        chain.extend(std::iter::repeat_n(authority(&other), count));
        (chain, key)
    };
    let good = || Some(of(&ca, "ada"));
    let asked = async |shows, is_old| {
        let begun = tokio::time::Instant::now();
        let manner = Manner { is_old, ..showing(shows) };
        // In the older version it is known in the handshake, in the newer one when one asks.
        let result = match try_shake(olol.address(), &ca, manner).await {
            Ok(stream) => asks(stream).await,
            Err(error) => Err(error.to_string()),
        };
        (result, begun.elapsed())
    };
    assert!(asked(good(), false).await.0.is_ok());
    let stream = try_shake(olol.address(), &ca, showing(good())).await.unwrap();
    for is_old in [false, true] {
        for (what, shows) in [
            ("none", None),
            ("of another CA", Some(of(&other, "ada"))),
            ("ended", Some(of(&ca, "old"))),
            ("a chain of 100", Some(long(100))),
            ("a chain of 400", Some(long(400))),
        ] {
            let (result, took) = asked(shows, is_old).await;
            assert!(result.is_err(), "{what}");
            assert!(took < Duration::from_secs(5), "{what}: {took:?}");
        }
    }
    assert!(asks(stream).await.is_ok(), "whoever is good and came before does not notice");
    assert!(asked(good(), false).await.0.is_ok());
    assert_eq!(cluster.server(0).work(), 0);
}

#[tokio::test]
async fn an_agent_lets_in_its_proxy_beside_any_number_of_strangers() {
    let (ca, cluster) = (Ca::with("gpu1"), Cluster::of(1).await.all_have("tiny"));
    let ollama = Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap();
    let agent =
        Agent::start(ca.dress("gpu1", Clients::Optional, Options { name: "gpu1".to_owned(), ..options(ollama) }));
    let agent = agent.await.unwrap();
    let mut open = Vec::new();
    let crowding = async {
        loop {
            let mut stream = TcpStream::connect(agent.address()).await.unwrap();
            let _ = stream.write_all(&[0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff]).await;
            open.push(stream);
            if open.len() == 300 {
                return;
            }
        }
    };
    patiently("a crowd", crowding).await;
    // It comes while they are all here.
    let olol = Olol::at(vec![format!("0@{}", agent.address())], &ca.toml()).await;
    olol.knows(&cluster).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    // And stays while more come.
    for _ in 0..300 {
        open.push(TcpStream::connect(agent.address()).await.unwrap());
    }
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
}

#[tokio::test]
async fn handshakes_that_stall_take_little_memory() {
    let (ca, cluster) = (Ca::with("proxy"), Cluster::of(1).await.all_have("tiny"));
    std::fs::write(ca.file("olol.toml"), ca.front("proxy")).unwrap();
    let server = format!("http://{}", cluster.server(0).address());
    let olol = Process::proxy(&server, &["--config", ca.file("olol.toml").to_str().unwrap()]).await;
    // All but the end of a hello that is as long as one may be.
    let almost = hello(3, 65_000, 16 << 10);
    let mut open = Vec::new();
    for _ in 0..400 {
        let mut stream = TcpStream::connect(olol.address()).await.unwrap();
        stream.write_all(&almost[..almost.len() - 10]).await.unwrap();
        open.push(stream);
    }
    assert!(asks(shake(olol.address(), &ca).await).await.is_ok());
    let grown = olol.peak_growth() >> 20;
    eprintln!("400 stalled handshakes: {grown} MiB");
    assert!(grown < 150, "{grown} MiB");
}
