//! What the proxy costs, beside bare relays, in one run: `cargo bench --bench proxy`.
//!
//! The load generator with its mock Ollamas and relays is a program of its own; `OLOL_BENCH_BIN` names it. Without it this
//! says so and measures nothing. All peers have one worker thread, take turns round by round, and share the machine with the
//! load; so only the ratios of one run mean something, and they are valid only while `relay-http` against itself stays near 1.
//! `OLOL_BENCH_ROUNDS` (7) and `OLOL_BENCH_SECONDS` (3) set how long it takes.

#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    reason = "a program for a terminal, which may end when it cannot go on"
)]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

/// The relay that everything is compared with, and the names of the two copies of it.
const YARDSTICK: &str = "relay-http";
const YARDSTICK_AGAIN: &str = "relay-http-again";

// What the proxy is measured with.
const FIRST: &str = "[stack]\norder = [\"metrics\", \"model-route\", \"retry\"]\n";
const FIRST_AND_LOG: &str = "[stack]\norder = [\"trace\", \"metrics\", \"model-route\", \"retry\"]\n";
const NO_LOG: &str = "[trace]\naccess-log = false\n";

fn main() {
    let Some(bench) = std::env::var_os("OLOL_BENCH_BIN").map(PathBuf::from) else {
        println!("proxy: OLOL_BENCH_BIN is not set; it names the load generator (ollama-bench). Nothing was measured.");
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let field = Field { bench, folder: folder.path().to_owned() };
    let seconds = setting("OLOL_BENCH_SECONDS", 3).to_string();
    field.phase(
        &[],
        "requests",
        &["--scenario", "generate-oneshot", "-c", "64", "-d", &seconds, "--warmup", "64", "--tokens", "1"],
    );
    let paced = [
        "--scenario",
        "generate-stream",
        "--rate",
        "256",
        "-d",
        &seconds,
        "-c",
        "20",
        "--warmup",
        "20",
        "--tokens",
        "100",
    ];
    field.phase(&["--inter-token-ms", "10"], "tokens", &paced);
    let hold = ["--scenario", "generate-stream", "-c", "1000", "-n", "1000", "--tokens", "20", "--timeout", "100"];
    field.phase(&["--inter-token-ms", "200"], "1000 open streams", &hold);
}

fn setting(name: &str, default: u32) -> u32 {
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

/// One thing to measure: where it listens, and its processes.
struct Peer {
    name: &'static str,
    address: SocketAddr,
    processes: Vec<Running>,
}

impl Peer {
    /// As the load generator wants to hear it.
    fn target(&self) -> String {
        let ids: Vec<String> = self.processes.iter().map(|process| process.0.id().to_string()).collect();
        format!("{}=http://{}@{}", self.name, self.address, ids.join(","))
    }
}

struct Field {
    bench: PathBuf,
    folder: PathBuf,
}

impl Field {
    /// Measures all peers under one load, and prints their ratios to the yardstick.
    fn phase(&self, mock: &[&str], title: &str, load: &[&str]) {
        let mocks = [free_address(), free_address()];
        let listen = mocks.map(|mock| mock.to_string()).join(",");
        let arguments = [&["mock", "--listen", &listen], mock].concat();
        let _mock = self.run(&self.bench, &arguments, mocks[1]);
        let peers = self.peers(mocks);
        let out = self.folder.join("out.json");
        let rounds = if title.contains("open") { 1 } else { setting("OLOL_BENCH_ROUNDS", 7) }.to_string();
        let mut compare = Command::new(&self.bench);
        compare.args(["compare", "--rounds", &rounds, "--json"]).arg(&out).args(load);
        for peer in &peers {
            compare.args(["--target", &peer.target()]);
        }
        let ended = compare.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("the load generator runs");
        assert!(ended.success(), "the load generator failed: {ended}");
        let report: Value = serde_json::from_str(&std::fs::read_to_string(&out).expect("its report")).expect("JSON");
        print(title, &peers, &report);
    }

    fn peers(&self, mocks: [SocketAddr; 2]) -> Vec<Peer> {
        let upstream = mocks.map(|mock| format!("http://{mock}")).join(",");
        let mut peers = vec![
            self.relay(YARDSTICK, "http", &upstream),
            self.relay(YARDSTICK_AGAIN, "http", &upstream),
            self.olol("first layers", &upstream, FIRST, Vec::new()),
            self.olol("first layers, log", &upstream, FIRST_AND_LOG, Vec::new()),
            self.olol("every layer", &upstream, NO_LOG, Vec::new()),
            self.olol("every layer, log", &upstream, "", Vec::new()),
        ];
        peers.extend(self.nginx(mocks));
        peers.push(self.relay_over_agents(mocks));
        let agents = mocks.map(|mock| {
            let address = free_address();
            let port = address.port().to_string();
            let ollama = format!("http://{mock}");
            let arguments = ["server", "--port", &port, "--ollama-host", &ollama, "--threads", "1"];
            (address, self.run(Path::new(env!("CARGO_BIN_EXE_olol")), &arguments, address))
        });
        let servers = agents.each_ref().map(|(address, _)| address.to_string()).join(",");
        peers.push(self.olol("first over agents", &servers, FIRST, agents.map(|(_, agent)| agent).into()));
        peers
    }

    fn relay(&self, name: &'static str, mode: &str, upstream: &str) -> Peer {
        let address = free_address();
        let listen = address.to_string();
        let process =
            self.run(&self.bench, &["relay", "--listen", &listen, "--mode", mode, "--upstream", upstream], address);
        Peer { name, address, processes: vec![process] }
    }

    fn relay_over_agents(&self, mocks: [SocketAddr; 2]) -> Peer {
        let agents = mocks.map(|mock| self.relay("agent", "http", &format!("http://{mock}")));
        let upstream = agents.each_ref().map(|agent| format!("http://{}", agent.address)).join(",");
        let mut front = self.relay("relay-h2-agents", "http-to-h2", &upstream);
        front.processes.extend(agents.into_iter().flat_map(|agent| agent.processes));
        front
    }

    fn olol(&self, name: &'static str, servers: &str, more: &str, mut processes: Vec<Running>) -> Peer {
        let address = free_address();
        let config = self.folder.join(format!("{}.toml", address.port()));
        std::fs::write(&config, format!("threads = 1\n{more}")).expect("a file");
        let port = address.port().to_string();
        let arguments = ["proxy", "--port", &port, "--servers", servers, "--config", &config.to_string_lossy()];
        processes.insert(0, self.run(Path::new(env!("CARGO_BIN_EXE_olol")), &arguments, address));
        Peer { name, address, processes }
    }

    /// nginx, where there is one.
    fn nginx(&self, mocks: [SocketAddr; 2]) -> Option<Peer> {
        let program = ["/usr/sbin/nginx", "/usr/bin/nginx", "/opt/homebrew/bin/nginx"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.exists())?;
        let address = free_address();
        let folder = self.folder.join(format!("nginx-{}", address.port()));
        std::fs::create_dir_all(folder.join("logs")).expect("a folder");
        let text = format!(
            "daemon off; worker_processes 1; pid nginx.pid; error_log stderr crit; events {{ worker_connections 8192; }}
             http {{ access_log off; keepalive_requests 1000000;
               client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
               upstream ollama {{ server {}; server {}; keepalive 1024; keepalive_requests 1000000; }}
               server {{ listen {address} backlog=4096; location / {{ proxy_pass http://ollama; proxy_http_version 1.1;
                 proxy_set_header Connection \"\"; proxy_buffering off; proxy_read_timeout 900s; }} }} }}",
            mocks[0], mocks[1]
        );
        std::fs::write(folder.join("nginx.conf"), text).expect("a file");
        let process = self.run(program, &["-p", &folder.to_string_lossy(), "-c", "nginx.conf"], address);
        Some(Peer { name: "nginx", address, processes: vec![process] })
    }

    /// Starts a program and waits until it listens.
    fn run(&self, program: &Path, arguments: &[&str], address: SocketAddr) -> Running {
        let mut command = Command::new(program);
        // What the user of this machine has configured counts for nothing.
        command.env("OLOL_TOKEN", "the-token-of-the-benchmark-and-of-nobody-else");
        command
            .args(arguments)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process =
            Running(command.spawn().unwrap_or_else(|error| panic!("{} does not start: {error}", program.display())));
        let patience = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(address).is_err() {
            assert!(Instant::now() < patience, "{} does not listen at {address}", program.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        process
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

/// The middle one of a figure's ratios to the yardstick, round by round.
fn ratio(report: &Value, peer: usize, figure: impl Fn(&Value) -> Option<f64>) -> Option<f64> {
    let runs = |peer: usize| report["runs"][peer].as_array();
    let mut ratios: Vec<f64> =
        runs(peer)?.iter().zip(runs(0)?).filter_map(|(ours, theirs)| Some(figure(ours)? / figure(theirs)?)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied().filter(|ratio| ratio.is_finite())
}

fn print(title: &str, peers: &[Peer], report: &Value) {
    println!("\n{title}: medians of ratios to {YARDSTICK}, round by round");
    println!(
        "{:<20} {:>14} {:>14} {:>12} {:>14} {:>10} {:>8}",
        "", "CPU/request", "CPU/token", "requests/s", "first token µs", "peak MB", "broken"
    );
    for (at, peer) in peers.iter().enumerate() {
        let text = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        let proxy = |key: &'static str| ratio(report, at, move |run| run["proxy"][key].as_f64());
        let (cpu, token) = (proxy("cpu_s_per_1k_requests"), proxy("cpu_s_per_1m_tokens"));
        let rate = ratio(report, at, |run| run["requests_per_s"].as_f64());
        let runs = report["runs"][at].as_array().map(Vec::as_slice).unwrap_or_default();
        let middle = |figure: &dyn Fn(&Value) -> Option<f64>| {
            let mut values: Vec<f64> = runs.iter().filter_map(figure).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let first = middle(&|run| run["ttft_us"]["p50"].as_f64());
        let peak = middle(&|run| run["proxy"]["rss_peak_mb"].as_f64());
        let summary = &report["summary"][at];
        let broken = summary["violations"].as_u64().unwrap_or(0) + summary["not_ok"].as_u64().unwrap_or(0);
        println!(
            "{:<20} {:>14} {:>14} {:>12} {:>14.0} {:>10.1} {:>8}",
            peer.name,
            text(cpu),
            text(token),
            text(rate),
            first,
            peak,
            broken
        );
    }
    let again = peers.iter().position(|peer| peer.name == YARDSTICK_AGAIN);
    let noise = again.and_then(|at| ratio(report, at, |run| run["proxy"]["cpu_s_per_1k_requests"].as_f64()));
    if noise.is_some_and(|noise| !(0.93..=1.07).contains(&noise)) {
        println!("the machine was too busy: the yardstick differs from itself, these figures mean nothing");
    }
}
