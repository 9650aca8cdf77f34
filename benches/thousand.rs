//! What a large cluster costs a proxy that has nothing to do: `cargo bench --bench thousand`.
//!
//! One process plays the servers, each with an address of its own and the same models, changed at other times: first bare
//! Ollamas, then agents, which speak every second. Beside them runs the proxy as it is, with nothing configured but the list
//! of servers. What is printed: how long until all are known, its memory, what it takes of a core at rest, how long its
//! pages and lists take (the median and the longest of several), and its memory after them.
//! `OLOL_BENCH_SERVERS` (1000), `OLOL_BENCH_MODELS` (200) and `OLOL_BENCH_SECONDS` (20) set the size and how long rest is.

#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    reason = "a program for a terminal, which may end when it cannot go on"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use olol::agent::Grpc;
use olol::agent::door::Doorkeeper;
use olol::discovery::{Badge, Tells};
use olol::rpc::{self, Callers, SelfDescription, Told};
use olol::security::Token;
use olol::serve;
use olol::sessions::{self, Sessions};
use olol_middleware::Reply;
use olol_proto::v1::{DescribeResponse, Model, ServerState};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What makes the agents and the proxy a cluster.
const TOKEN: &str = "the-token-of-the-benchmark-and-of-nobody-else";
/// Tells a copy of this program what it plays.
const ROLE: &str = "OLOL_BENCH_ROLE";
/// What is asked for, and how often.
const PAGES: [&str; 8] = [
    "/api/status",
    "/api/status?detail=servers",
    "/api/status?detail=servers&limit=1000",
    "/api/status?detail=models&limit=1000",
    "/api/tags",
    "/v1/models",
    "/api/ps",
    "/metrics",
];
const TIMES: usize = 5;

fn main() {
    let (servers, models) = (setting("OLOL_BENCH_SERVERS", 1000), setting("OLOL_BENCH_MODELS", 200));
    if let Ok(role) = std::env::var(ROLE) {
        return play(&role, servers, models);
    }
    println!("{servers} servers with {models} models each");
    for role in ["ollamas", "agents"] {
        measure(role, servers);
    }
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A process that ends with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures a proxy before servers of one kind.
fn measure(role: &str, count: usize) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let own = std::env::current_exe().expect("this program");
    let mut players = Command::new(own);
    let players = players.env(ROLE, role).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut players = Running(players.spawn().expect("the servers start"));
    let mut line = String::new();
    let told = players.0.stdout.take().expect("their words");
    BufReader::new(told).read_line(&mut line).expect("their addresses");
    let address = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port");
    let config = folder.path().join("olol.toml");
    std::fs::write(&config, format!("[proxy]\nservers = {line}")).expect("a file");
    let begun = Instant::now();
    let proxy = Command::new(env!("CARGO_BIN_EXE_olol"))
        .args(["proxy", "--log-level", "warn", "--port", &address.port().to_string(), "--config"])
        .arg(&config)
        .env("OLOL_TOKEN", TOKEN)
        .env("XDG_STATE_HOME", folder.path())
        .env("XDG_CONFIG_HOME", folder.path())
        .stdout(Stdio::null())
        .spawn();
    let proxy = Running(proxy.expect("the proxy starts"));
    let process = proxy.0.id();
    let all = format!("{count} of {count} servers up");
    while !get(address, "/readyz").is_ok_and(|(text, _)| text.contains(&all)) {
        assert!(begun.elapsed() < Duration::from_secs(120), "the proxy does not find its servers");
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("\n{role}: all are known after {:.1} s; {}", begun.elapsed().as_secs_f64(), memory(process));
    // Until the last looks after the start are over.
    std::thread::sleep(Duration::from_secs(15));
    let (before, since) = (cpu(process), Instant::now());
    std::thread::sleep(Duration::from_secs(setting("OLOL_BENCH_SECONDS", 20) as u64));
    let share = cpu(process).zip(before).map(|(after, before)| (after - before) / since.elapsed().as_secs_f64());
    match share {
        Some(share) => println!("at rest {:.2} % of a core; {}", 100.0 * share, memory(process)),
        None => println!("what it takes at rest cannot be seen here"),
    }
    for page in PAGES {
        let mut times = Vec::new();
        let mut length = 0;
        for _ in 0..TIMES {
            let begun = Instant::now();
            length = get(address, page).expect("an answer").1;
            times.push(begun.elapsed().as_secs_f64() * 1000.0);
        }
        times.sort_by(f64::total_cmp);
        println!("{page:<40} {:>8.1} ms {:>8.1} ms {length:>10} bytes", times[TIMES / 2], times[TIMES - 1]);
    }
    println!("after these: {}", memory(process));
}

/// An answer's text and its length with its head.
fn get(address: SocketAddr, path: &str) -> std::io::Result<(String, usize)> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok((String::from_utf8_lossy(&answer).into_owned(), answer.len()))
}

/// Resident memory of a process, now and at most.
fn memory(process: u32) -> String {
    let status = std::fs::read_to_string(Path::new("/proc").join(process.to_string()).join("status"));
    let status = status.unwrap_or_default();
    let value = |name: &str| {
        let kib = status.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix(" kB")?;
        Some(kib.parse::<u64>().ok()? / 1024)
    };
    match (value("VmRSS:"), value("VmHWM:")) {
        (Some(now), Some(most)) => format!("memory {now} MiB, at most {most} MiB"),
        _ => "its memory cannot be seen here".to_owned(),
    }
}

/// Seconds of processor time that a process has had.
fn cpu(process: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(process.to_string()).join("stat")).ok()?;
    let mut words = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = words.next()?.parse::<f64>().ok()? + words.next()?.parse::<f64>().ok()?;
    Some(ticks / 100.0)
}

/// Plays servers until somebody ends this process. Says where they are in one line.
fn play(role: &str, servers: usize, models: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    olol::telemetry::raise_open_files();
    runtime.block_on(async {
        let mut addresses = Vec::new();
        for number in 0..servers {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let address = listener.local_addr().expect("its address");
            if role == "agents" {
                addresses.push(address.to_string());
                agent(listener.into_std().expect("a socket"), number, models);
            } else {
                addresses.push(format!("http://{address}"));
                tokio::spawn(ollama(listener, number, models));
            }
        }
        println!("{}", json!(addresses));
        std::future::pending::<()>().await;
    });
}

fn name(model: usize) -> String {
    format!("model-{model}:7b")
}

fn digest(model: usize) -> String {
    format!("{model:064x}")
}

/// When a server got its models.
fn changed(server: usize) -> String {
    format!("2026-01-01T{:02}:{:02}:00.123456789Z", server / 60 % 24, server % 60)
}

fn size(model: usize) -> u64 {
    4_000_000_000 + ((model as u64) << 21)
}

fn listed(server: usize, models: usize) -> Value {
    let model = |model| {
        json!({
            "name": name(model), "model": name(model), "modified_at": changed(server), "size": size(model),
            "digest": digest(model), "capabilities": ["completion", "tools"],
            "details": {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"],
                "parameter_size": "7.2B", "quantization_level": "Q4_K_M", "context_length": 131_072},
        })
    };
    json!({ "models": (0..models).map(model).collect::<Vec<_>>() })
}

/// The answer to a question, as JSON.
fn answer(path: &str, tags: &Bytes) -> Bytes {
    match path {
        "/api/tags" => tags.clone(),
        "/api/version" => Bytes::from_static(br#"{"version":"0.33.0"}"#),
        "/api/ps" => Bytes::from_static(br#"{"models":[]}"#),
        "/v1/models" => Bytes::from_static(b"{\"object\":\"list\",\"data\":null}\n"),
        _ => Bytes::from_static(b"{}"),
    }
}

/// A bare Ollama.
async fn ollama(listener: tokio::net::TcpListener, number: usize, models: usize) {
    let tags = Bytes::from(listed(number, models).to_string());
    while let Ok((mut stream, _)) = listener.accept().await {
        let tags = tags.clone();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let mut read = Vec::with_capacity(1024);
            while let Ok(1..) = stream.read_buf(&mut read).await {
                let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
                let head = String::from_utf8_lossy(&read[..end]);
                let body = answer(head.split(' ').nth(1).unwrap_or_default(), &tags);
                read.clear();
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: {length}\r\n\r\n"
                );
                if stream.write_all(&[head.as_bytes(), &body].concat()).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// An agent as the program has it, before an Ollama that is made up.
fn agent(listener: std::net::TcpListener, number: usize, models: usize) {
    let model = |model| Model {
        name: name(model),
        tag: "7b".to_owned(),
        digest: digest(model),
        size_bytes: size(model),
        family: "llama".to_owned(),
        parameter_size: "7.2B".to_owned(),
        quantization: "Q4_K_M".to_owned(),
        architecture: "llama".to_owned(),
        context_length: 131_072,
        capabilities: vec!["completion".to_owned(), "tools".to_owned()],
        modified_at: changed(number),
        ..Model::default()
    };
    let models_told = Arc::new((0..models).map(model).collect::<Vec<_>>());
    let told = move || {
        let state = ServerState {
            online: true,
            cpu_usage: fastrand::f32(),
            memory_usage: fastrand::f32(),
            memory_used_bytes: fastrand::u64(..1 << 36),
            memory_total_bytes: 1 << 36,
            disk_free_bytes: 1 << 40,
            ollama_version: "0.33.0".to_owned(),
            ..ServerState::default()
        };
        Some(Arc::new(Told { state, models: models_told.clone(), loaded: Arc::default() }))
    };
    let (tell, state) = watch::channel(told());
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            // As an agent does: it goes with the next sign of life.
            tell.send_if_modified(|old| {
                *old = told();
                false
            });
        }
    });
    let description = DescribeResponse { os: "linux".to_owned(), cpu_count: 16, ..DescribeResponse::default() };
    let stop = CancellationToken::new();
    let about = SelfDescription {
        description,
        state,
        callers: Arc::<Callers>::default(),
        active: Arc::default(),
        stop: stop.clone(),
        models: None,
    };
    let send: rpc::Send = Arc::new(move |ask| {
        Box::pin(async move {
            let tags = if ask.path.path() == "/api/tags" { listed(number, models).to_string() } else { String::new() };
            Ok(Reply::full(StatusCode::OK, HeaderMap::new(), answer(ask.path.path(), &tags.into())))
        })
    });
    let sessions = Sessions::new(sessions::Config::default(), "none");
    let token: Token = TOKEN.parse().expect("a token");
    let keeper = Arc::new(Doorkeeper::new(token.into(), number.to_string()));
    let grpc = Grpc::new(rpc::service(send, Some(about), sessions, None), keeper, Tells::new(Badge::default));
    listener.set_nonblocking(true).expect("a socket that does not block");
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
    tokio::spawn(serve::serve(listener, grpc, None, stop, Duration::ZERO));
}
