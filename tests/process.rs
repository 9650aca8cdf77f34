//! The program as a process: flags and their errors, the way it stops, what it takes of memory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::chat;
use harness::{Cluster, Connection, Ending, Gate, Process, Request, patiently};
use serde_json::json;
use tempfile::NamedTempFile;

#[tokio::test]
async fn a_proxy_and_an_agent_serve_together() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = Process::agent(cluster.server(0).address()).await;
    let proxy = Process::proxy(&agent.address().to_string(), &[]).await;
    let answer = proxy.connect().await.ask(&chat("tiny", "hi")).await;
    assert_eq!((answer.status, answer.said().as_str()), (200, "Hello world"));
}

#[tokio::test]
async fn the_environment_says_what_flags_do_not() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let servers = format!("http://{}", cluster.server(0).address());
    let proxy = Process::start_with(&[("OLLAMA_SERVERS", &servers), ("OLOL_PORT", "0")], &["proxy"]).await;
    assert_eq!(proxy.connect().await.ask(&chat("tiny", "hi")).await.status, 200);
}

#[tokio::test]
async fn a_stop_lets_streams_finish_and_ends_with_0() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut proxy = Process::proxy(&format!("http://{}", cluster.server(0).address()), &[]).await;
    let (mut stream, mut idle) = (begin(&proxy, &gate).await, proxy.connect().await);
    idle.ask(&Request::get("/")).await;
    proxy.terminate();
    assert!(idle.is_closed().await, "a connection without a request is closed at once");
    assert!(proxy.is_running());
    gate.open();
    let (lines, ending) = stream.rest().await;
    assert_eq!((lines.len(), ending), (2, Ending::LastChunk));
    assert_eq!(proxy.ends().await.code(), Some(0), "{}", proxy.log());
}

#[tokio::test]
async fn a_stop_takes_nothing_new() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut proxy = Process::proxy(&format!("http://{}", cluster.server(0).address()), &[]).await;
    let (mut stream, mut idle) = (begin(&proxy, &gate).await, proxy.connect().await);
    proxy.terminate();
    assert!(idle.is_closed().await);
    patiently("nobody listens any more", async {
        while tokio::net::TcpStream::connect(proxy.address()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    gate.open();
    stream.rest().await;
    proxy.ends().await;
}

#[tokio::test]
async fn a_stop_does_not_wait_longer_than_it_is_told() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let config = file("[limits]\ngrace-s = 1\n");
    let servers = format!("http://{}", cluster.server(0).address());
    let mut proxy = Process::proxy(&servers, &["--config", config.path().to_str().unwrap()]).await;
    let mut stream = begin(&proxy, &gate).await;
    proxy.terminate();
    assert_eq!(stream.rest().await.1, Ending::Cut);
    assert_eq!(proxy.ends().await.code(), Some(0));
    assert!(proxy.log().contains("were cut"), "{}", proxy.log());
    cluster.server(0).saw_cancel().await;
}

#[tokio::test]
async fn a_stop_asked_for_twice_waits_for_nothing() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut proxy = Process::proxy(&format!("http://{}", cluster.server(0).address()), &[]).await;
    let (mut stream, mut idle) = (begin(&proxy, &gate).await, proxy.connect().await);
    proxy.terminate();
    assert!(idle.is_closed().await);
    proxy.terminate();
    assert_eq!(stream.rest().await.1, Ending::Cut);
    assert_eq!(proxy.ends().await.code(), Some(0), "{}", proxy.log());
}

#[tokio::test]
async fn an_agent_lets_streams_finish_too() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut agent = Process::agent(cluster.server(0).address()).await;
    let proxy = Process::proxy(&agent.address().to_string(), &[]).await;
    let mut stream = begin(&proxy, &gate).await;
    agent.terminate();
    gate.open();
    let (lines, ending) = stream.rest().await;
    assert_eq!((lines.len(), ending), (2, Ending::LastChunk));
    assert_eq!(agent.ends().await.code(), Some(0), "{}", agent.log());
}

#[tokio::test]
async fn an_agent_that_is_killed_ends_its_streams_and_no_others() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let gate = Gate::closed();
    cluster.server(0).stalls_after(["Hel"]);
    cluster.server(1).is_paced_by(&gate);
    let agents = [Process::agent(cluster.server(0).address()).await, Process::agent(cluster.server(1).address()).await];
    let servers = format!("0@{},1@{}", agents[0].address(), agents[1].address());
    // One that goes on elsewhere is another question.
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("olol.toml");
    std::fs::write(&config, "stack.order = ['model-route', 'retry']\nretry.resume = 'off'\n").unwrap();
    let proxy = Process::proxy(&servers, &["--config", config.to_str().unwrap()]).await;
    proxy.has_up(2).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = proxy.connect().await;
        stream.send(&chat("tiny", "hi")).await;
        let server = stream.head().await.headers.get("x-olol-server").map(str::to_owned);
        streams.push((server, stream));
    }
    streams.sort_by_key(|(server, _)| server.clone());
    let [killed, _other] = agents;
    drop(killed);
    let (lines, ending) = streams[0].1.rest().await;
    assert!(lines.last().unwrap().starts_with(b"{\"error\"") && ending == Ending::LastChunk);
    gate.open();
    let (lines, ending) = streams[1].1.rest().await;
    assert_eq!((lines.len(), ending), (3, Ending::LastChunk));
    let answer = proxy.connect().await.ask(&chat("tiny", "hi")).await;
    assert_eq!((answer.said().as_str(), answer.server()), ("Hello world", "1"));
}

#[tokio::test]
async fn the_client_prints_what_the_model_says() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let port = cluster.server(0).address().port().to_string();
    let asked = Process::run(&["client", "--port", &port, "--model", "tiny", "--prompt", "hi"]).await;
    assert_eq!((asked.status.code(), String::from_utf8_lossy(&asked.stdout).trim_end()), (Some(0), "Hello world"));
    assert_eq!(cluster.server(0).seen("/api/generate")[0].text("prompt"), "hi");
}

#[tokio::test]
async fn the_client_fails_with_the_servers_words() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let port = cluster.server(0).address().port().to_string();
    let (ended, error) = run(&["client", "--port", &port, "--model", "nosuch", "--prompt", "hi"]).await;
    assert!(ended == Some(1) && error.contains("model 'nosuch' not found"), "{error}");
    cluster.server(0).dies();
    let (ended, error) = run(&["client", "--port", &port, "--model", "tiny", "--prompt", "hi"]).await;
    assert!(ended == Some(1) && error.contains("no Ollama answers at"), "{error}");
}

#[tokio::test]
async fn what_is_wrong_on_the_command_line_is_said_with_its_remedy() {
    for (arguments, code, says) in [
        (&["proxy", "--port", "70000"][..], 2, "70000"),
        (&["proxy", "--servers", "gpu1:99999"], 1, "'99999' is no port (1 to 65535)"),
        (&["proxy", "--servers", "a:1=0"], 1, "must be a whole number from 1 to 1000"),
        (&["proxy", "--servers", "a:1,a:1"], 1, "stands twice"),
        (&["proxy", "--servers", "https://a/path"], 1, "remove the path"),
        (&["proxy", "--servers", "::1:50051"], 1, "in brackets"),
        (&["proxy", "--host", "no such host"], 1, "cannot listen on 'no such host'"),
        (&["proxy", "--config", "/nowhere/olol.toml"], 1, "cannot read /nowhere/olol.toml"),
        (&["proxy", "--sevrers", "a:1"], 2, "--servers"),
        (&["server", "--ollama-host", "http://a/path"], 1, "remove the path '/path'"),
        (&["--log-level", "loud", "proxy"], 1, "is no log level"),
        (&["nothing"], 2, "unrecognized subcommand"),
    ] {
        let (ended, error) = run(arguments).await;
        assert!(ended == Some(code) && error.contains(says), "{arguments:?}: {ended:?} {error}");
    }
}

#[tokio::test]
async fn what_is_wrong_in_the_file_is_said_with_its_place() {
    for (text, says) in [
        ("[proxy]\nprot = 1\n", "line 2"),
        ("[stack]\norder = [\"retyr\"]\n", "unknown layer `retyr`; did you mean `retry`?"),
        ("[stack]\norder = [\"retry\", \"model-route\"]\n", "must come first"),
        ("[proxy]\nservers = [\"a:b\"]\n", "'b' is no port"),
    ] {
        let config = file(text);
        let path = config.path().to_str().unwrap();
        let (ended, error) = run(&["proxy", "--config", path]).await;
        assert!(ended == Some(1) && error.contains(says), "{text}: {error}");
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for command in ["proxy", "server"] {
        let (ended, error) = run(&[command, "--port", &port]).await;
        assert!(ended == Some(1) && error.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{error}");
    }
}

#[tokio::test]
async fn a_blob_of_2_gb_goes_through_little_memory() {
    const LENGTH: u64 = 2 << 30;
    let cluster = Cluster::of(1).await;
    let agent = Process::agent(cluster.server(0).address()).await;
    let direct = Process::proxy(&format!("http://{}", cluster.server(0).address()), &[]).await;
    let over_agent = Process::proxy(&agent.address().to_string(), &[]).await;
    let path = format!("/api/blobs/sha256:{}", "0".repeat(64));
    for (proxy, length) in [(&direct, LENGTH), (&over_agent, LENGTH / 4)] {
        let mut client = proxy.connect().await;
        client
            .write(format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n").as_bytes())
            .await;
        let zeros = vec![0; 1 << 20];
        for _ in 0..length >> 20 {
            client.write(&zeros).await;
        }
        client.answer().await;
        assert_eq!(cluster.server(0).seen(&path).last().unwrap().length, length);
    }
    for process in [&direct, &over_agent, &agent] {
        assert!(process.peak_growth() < 40 << 20, "{} bytes", process.peak_growth());
    }
}

#[tokio::test]
async fn a_blob_for_several_servers_waits_on_disk_not_in_memory() {
    let cluster = Cluster::of(2).await;
    let spool = tempfile::tempdir().unwrap();
    let config = file(&format!("[spool]\ndir = \"{}\"\n", spool.path().display()));
    let servers: Vec<String> = cluster.servers().iter().map(|server| format!("http://{}", server.address())).collect();
    let proxy = Process::proxy(&servers.join(","), &["--config", config.path().to_str().unwrap()]).await;
    let (digest, length) = zeros(200);
    let mut client = proxy.connect().await;
    let head = format!("POST /api/blobs/{digest} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
    client.write(head.as_bytes()).await;
    for _ in 0..200 {
        client.write(&vec![0; 1 << 20]).await;
    }
    assert_eq!(client.answer().await.status, 201);
    let create = Request::post("/api/create", json!({"model": "mine", "files": {"a.gguf": digest}}));
    assert_eq!(client.ask(&create).await.error(), "");
    assert!(cluster.servers().iter().all(|server| server.still_has("mine")));
    assert!(proxy.peak_growth() < 40 << 20, "{} bytes", proxy.peak_growth());
}

#[tokio::test]
async fn a_thousand_open_streams_take_little_memory() {
    olol::telemetry::raise_open_files();
    let cluster = Cluster::of(1).await;
    cluster.server(0).has_loaded("tiny").stalls_after(["Hel"]);
    let proxy = Process::proxy(&format!("http://{}", cluster.server(0).address()), &[]).await;
    let mut streams = Vec::new();
    for _ in 0..1000 {
        let mut stream = proxy.connect().await;
        stream.send(&chat("tiny", "hi")).await;
        streams.push(stream);
    }
    for stream in &mut streams {
        stream.head().await;
        stream.line().await;
    }
    assert!(proxy.peak_growth() < 60 << 20, "{} bytes", proxy.peak_growth());
}

/// Begins a stream that has said its first word.
async fn begin(proxy: &Process, gate: &Gate) -> Connection {
    let mut stream = proxy.connect().await;
    stream.send(&chat("tiny", "hi")).await;
    stream.head().await;
    gate.let_through(1);
    stream.line().await;
    stream
}

/// Runs a command that must fail; its exit code and what it said.
async fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Process::run(arguments).await;
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn file(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

/// The digest and the length of so many MiB of zeros.
fn zeros(mebibytes: u64) -> (String, u64) {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    let one = vec![0; 1 << 20];
    for _ in 0..mebibytes {
        hash.update(&one);
    }
    (format!("sha256:{}", harness::store::hex(&hash.finalize())), mebibytes << 20)
}
