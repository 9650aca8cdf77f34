//! What Prometheus makes of the metrics: every panel of every dashboard has data, and `promtool` has nothing to say.
//!
//! Runs the real programs, of the distribution's package: `./dev test` unpacks it. Elsewhere `OLOL_PROMETHEUS` names their
//! folder, or they are on the path.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use harness::olol::{chat, chat_at_once, keep_alive, v1_chat};
use harness::redis::Store;
use harness::{Cluster, Connection, Gate, Olol, Request, patiently, until};
use olol::keys::{self, Order};
use olol_middleware::rate_limit::Limits;
use olol_middleware::vitals::{Gpu, Space, Vitals};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::Instant;

/// Panels that cannot have data here, each with the reason.
const WITHOUT_DATA: [(&str, &str); 8] = [
    ("olol/Certificates, and callers given up", "nothing is behind TLS here, and whoever calls asks for something"),
    ("olol/Servers that were woken", "no server is asleep here"),
    ("olol/Agents that dial in", "no agent is here"),
    ("olol/Servers that come and go", "all are named from the beginning"),
    ("olol/Proofs of agents that were found", "no agent is here"),
    ("olol/Leases that ended", "nobody was found who could go"),
    ("olol/Looks of scans", "nothing is scanned"),
    ("olol/Look-ups of names", "no name stands for servers"),
];

/// How long the load goes on until every panel has data.
const LONG_ENOUGH: Duration = Duration::from_secs(90);

/// All layers have something to do.
const CONFIG: &str = r#"
[pool]
check-interval-ms = 200

[sessions]
max-sessions = 1

[[models]]
name = "tiny"
replicas = 2

[[models]]
name = "nowhere"

[desired]
retry-s = 1
retry-max-s = 1

[pick]
slots = [{ slots = 1, models = ["solo"] }]

[timeout]
rules = [{ models = ["mute"], first-byte-s = 0.05 }]

[alias]
models = { mine = "tiny" }
rules = [{ name = "first", models = ["solo"], servers = ["2"] }]

[quant-fallback]
policy = "compatible"
make = true

[hedge]
on = ["embed"]
min-samples = 5
min-delay-ms = 20
budget = 1.0

[distribute]
rules = [{ models = ["cold"], policy = "always" }]

[retry]
budget = 0
reserve = 4
breaker-open-ms = 1
breaker-max-open-ms = 1
ramp-s = 0
resume-wait-s = 1
"#;

#[tokio::test]
async fn every_panel_has_data() {
    let world = World::new().await;
    let prometheus = Prometheus::start(&world).await;
    let panels = panels();
    assert!(panels.len() > 60, "{} queries", panels.len());
    let begun = Instant::now();
    loop {
        world.load().await;
        let mut empty = Vec::new();
        for panel in &panels {
            if !prometheus.has_data(&panel.query).await {
                empty.push(format!("{}: {}", panel.name, panel.query));
            }
        }
        empty.retain(|panel| !WITHOUT_DATA.iter().any(|(name, _)| panel.starts_with(&format!("{name}: "))));
        if empty.is_empty() {
            break;
        }
        assert!(begun.elapsed() < LONG_ENOUGH, "no data in {} queries:\n{}", empty.len(), empty.join("\n"));
    }
    prometheus.follows_its_rules().await;
}

#[tokio::test]
async fn promtool_finds_nothing_wrong_with_the_page() {
    let world = World::new().await;
    world.load().await;
    let page = world.page().await;
    assert!(page.contains("olol_requests_total{") && page.contains("\nprocess_"), "{page}");
    let (is_content, said) = run("promtool", &["check", "metrics"], &page).await;
    assert!(is_content && said.is_empty(), "{said}");
}

#[tokio::test]
async fn every_alert_is_raised_when_it_should_be() {
    for arguments in [["check", "rules", &file_of("rules.yaml")], ["test", "rules", &file_of("rules.test.yaml")]] {
        let (is_content, said) = run("promtool", &arguments, "").await;
        assert!(is_content, "{said}");
    }
}

/// A proxy with all its layers, and servers with all their troubles.
struct World {
    cluster: Cluster,
    olol: Olol,
    _config: TempDir,
    store: tokio::sync::Mutex<Store>,
    admin: String,
    ada: String,
    bob: String,
}

impl World {
    /// Two servers have `tiny`, the third has `solo` and `mute` alone, the fourth `cold`.
    async fn new() -> Self {
        let cluster = Cluster::of(4).await.weighing([1000, 1, 1, 1]);
        cluster.server(0).has_loaded("tiny");
        cluster.server(1).has_loaded("tiny");
        cluster.server(2).has_loaded("solo").has_loaded("mute");
        cluster.server(3).has("cold").has_loaded("other:q8_0").has("base:f16").says(["word "; 40]);
        for server in cluster.servers() {
            server.fails("POST", "/api/pull", 500, "pull model manifest: file does not exist");
        }
        let config = tempfile::tempdir().unwrap();
        let file = config.path().join("olol.toml");
        let store = Store::start().await;
        std::fs::write(&file, format!("{CONFIG}{}", store.toml())).unwrap();
        let olol = Olol::from_file(&cluster, &file).await;
        // No agent is there, and no graphics processor.
        let (memory, share) = (Space { used: 1, total: 2 }, Some(0.5));
        let gpus = vec![Gpu { memory, utilization: share, ..Gpu::default() }];
        let vitals = Vitals { cpu_usage: share, memory: Some(memory), gpus, disk_free: Some(1), ..Vitals::default() };
        olol.believes(0, vitals);
        let add = |name: &str, order: &Order| keys::add(&olol.keys(), &name.parse().unwrap(), order).unwrap();
        let once = Limits { requests_per_minute: std::num::NonZeroU32::new(1), ..Limits::default() };
        let admin = add("admin", &Order { admin: true, ..Order::default() });
        let ada = add("ada", &Order::default());
        let bob = add("bob", &Order { limits: once, ..Order::default() });
        let world = Self { cluster, olol, _config: config, store: store.into(), admin, ada, bob };
        let known = async {
            while world.ask(chat("tiny", "hi")).await != 200 {
                tokio::task::yield_now().await;
            }
        };
        patiently("the keys are known", known).await;
        world
    }

    /// Asks once of everything that a panel shows.
    async fn load(&self) {
        let Self { cluster, olol, .. } = self;
        for request in [chat("tiny", "hi"), chat_at_once("tiny", "hi"), v1_chat("tiny", "hi"), chat("mine", "hi")] {
            self.ask(request).await;
        }
        self.conversation().await;
        self.sessions().await;
        self.quantizations().await;
        self.late().await;
        // Keys: none, a wrong one, and one that is used too often.
        self.olol.ask(&chat("tiny", "hi")).await;
        for key in ["olol_no_key", &self.bob, &self.bob] {
            self.olol.ask(&with(chat("tiny", "hi"), key)).await;
        }
        // A model that is loaded.
        self.ask(keep_alive("cold", 0)).await;
        until("a server has unloaded its model", || !cluster.server(3).holds().1.contains(&"cold:latest".to_owned()))
            .await;
        olol.knows(cluster).await;
        self.ask(chat("cold", "hi")).await;
        // A server that dies in mid-answer, where another goes on, and where there is no other.
        cluster.server(0).dies_after(["Hello"]);
        self.ask(chat("tiny", "hi")).await;
        cluster.server(2).dies_after(["Hello"]);
        self.ask(chat("solo", "hi")).await;
        // Servers that die before it, more often than there are retries.
        cluster.server(0).dies_before_head();
        self.ask(chat("tiny", "hi")).await;
        cluster.server(1).dies_before_head();
        for _ in 0..8 {
            self.ask(chat("tiny", "hi")).await;
        }
        cluster.server(0).says(["Hello", " world"]);
        cluster.server(1).says(["Hello", " world"]);
        // A server that does not answer.
        cluster.server(2).stalls_before_head();
        self.ask(chat("mute", "hi")).await;
        self.queue().await;
        // A store that is lost: the proxy looks for it twice a second.
        let mut store = self.store.lock().await;
        store.dies().await;
        until("the store is missed", || !olol.shares()).await;
        store.comes_back().await;
        drop(store);
        olol.ask(&with(Request::post("/api/status/reload", ""), &self.admin)).await;
    }

    /// Sessions, of which one is kept: each makes the one before it leave.
    async fn sessions(&self) {
        for id in ["one", "two"] {
            let session = json!({"session_id": id, "model_name": "tiny"});
            self.ask(Request::post("/api/status/sessions", session)).await;
            self.ask(chat("tiny", "hi").header("X-Olol-Session", id)).await;
        }
    }

    /// Turns of a conversation.
    async fn conversation(&self) {
        let said = |role: &str, text: &str| json!({"role": role, "content": text});
        let mut messages = vec![said("user", "What is a proxy?")];
        for _ in 0..3 {
            self.ask(Request::post("/api/chat", json!({"model": "tiny", "messages": messages}))).await;
            messages.extend([said("assistant", "Hello world"), said("user", "And then?")]);
        }
    }

    /// A model that is served in another quantization, and one that is made for that.
    async fn quantizations(&self) {
        self.ask(chat("other:q5_0", "hi")).await;
        self.ask(Request::new("DELETE", "/api/delete").with_body(json!({"model": "base:q8_0"}))).await;
        self.ask(chat("base:q8_0", "hi")).await;
    }

    /// An embedding that is late.
    async fn late(&self) {
        let embed = || Request::post("/api/embed", json!({"model": "tiny", "input": "hi"}));
        for _ in 0..5 {
            self.ask(embed()).await;
        }
        self.cluster.server(0).stalls_before_head();
        self.ask(embed()).await;
        self.cluster.server(0).says(["Hello", " world"]);
    }

    /// Calls that wait for a slot, of which one is left by its client; and another in the middle of its answer.
    async fn queue(&self) {
        let Self { cluster, olol, ada, .. } = self;
        let (gate, request) = (Gate::closed(), with(chat("solo", "hi"), ada));
        cluster.server(2).says(["Hello", " world"]).is_paced_by(&gate);
        let before = cluster.server(2).work();
        let mut first = olol.begin(&request).await;
        cluster.server(2).asked(before + 1).await;
        let left = olol.begin(&request).await;
        let mut waits = olol.begin(&request).await;
        until("calls wait", || olol.waiting() == 2).await;
        drop(left);
        until("a client has left", || olol.waiting() == 1).await;
        gate.let_through(1);
        first.head().await;
        first.piece().await;
        drop(first);
        gate.open();
        waits.answer().await;
    }

    /// Asks with a good key; returns the status.
    async fn ask(&self, request: Request) -> u16 {
        self.olol.ask(&with(request, &self.ada)).await.status
    }

    /// What Prometheus reads.
    async fn page(&self) -> String {
        self.olol.ask(&with(Request::get("/metrics"), &self.admin)).await.text()
    }
}

fn with(request: Request, key: &str) -> Request {
    request.header("Authorization", &format!("Bearer {key}"))
}

/// A Prometheus that reads the metrics of a proxy every second.
struct Prometheus {
    address: SocketAddr,
    _process: Child,
    _folder: TempDir,
}

impl Prometheus {
    async fn start(world: &World) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [file_of("rules.yaml")],
            "scrape_configs": [{
                "job_name": "olol",
                "authorization": {"credentials": world.admin},
                "static_configs": [{"targets": [world.olol.address().to_string()]}],
            }],
        });
        // What is JSON is YAML.
        let file = folder.path().join("prometheus.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        let mut process = Command::new(program("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg("--web.listen-address=127.0.0.1:0")
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let listening = async {
            while let Some(line) = log.next_line().await.unwrap() {
                let address = line.contains("Listening on").then(|| line.split("address=").nth(1)).flatten();
                if let Some(address) = address.and_then(|rest| rest.split_whitespace().next()) {
                    return address.trim_matches('"').parse().unwrap();
                }
                said.push(line);
            }
            panic!("Prometheus ended:\n{}", said.join("\n"))
        };
        let address = patiently("Prometheus listens", listening).await;
        // Nobody who writes waits for a reader.
        tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
        Self { address, _process: process, _folder: folder }
    }

    /// Waits until every rule for alerts was followed, and none had an error.
    async fn follows_its_rules(&self) {
        let following = async {
            loop {
                let answer = Connection::open(self.address).await.ask(&Request::get("/api/v1/rules")).await.json();
                let groups = answer["data"]["groups"].as_array().cloned().unwrap_or_default();
                let rules: Vec<&Value> =
                    groups.iter().filter_map(|group| group["rules"].as_array()).flatten().collect();
                assert!(rules.iter().all(|rule| rule["health"] != "err"), "{answer}");
                if rules.len() > 10 && rules.iter().all(|rule| rule["health"] == "ok") {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        patiently("every rule is followed", following).await;
    }

    /// Whether a query returns a number; one of something that happens: a number above zero.
    async fn has_data(&self, query: &str) -> bool {
        let form = format!("query={}", encoded(query));
        let request = Request::post("/api/v1/query", form).header("Content-Type", "application/x-www-form-urlencoded");
        let answer = Connection::open(self.address).await.ask(&request).await.json();
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        let values = answer["data"]["result"].as_array().cloned().unwrap_or_default();
        let values = values.iter().filter_map(|series| series["value"][1].as_str()?.parse::<f64>().ok());
        let happens = ["rate(", "increase("].iter().any(|function| query.contains(function));
        values.filter(|value| value.is_finite()).any(|value| !happens || value > 0.0)
    }
}

/// A file of the folder with dashboards and rules.
fn file_of(name: &str) -> String {
    format!("{}/grafana/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// One query of a panel.
struct Panel {
    /// The file, and the title.
    name: String,
    query: String,
}

/// The queries of all dashboards, with what Grafana would put in the place of variables.
fn panels() -> Vec<Panel> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(file_of("dashboards")).unwrap().map(|file| file.unwrap().path()) {
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        let variables: Vec<String> = dashboard["templating"]["list"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|variable| variable["name"].as_str().map(|name| format!("${name}")))
            .collect();
        let name = file.file_stem().unwrap().to_string_lossy();
        collect(&dashboard["panels"], &name, &variables, &mut found);
    }
    found
}

fn collect(panels: &Value, file: &str, variables: &[String], found: &mut Vec<Panel>) {
    for panel in panels.as_array().into_iter().flatten() {
        let name = format!("{file}/{}", panel["title"].as_str().unwrap_or_default());
        for target in panel["targets"].as_array().into_iter().flatten() {
            let asked = target["expr"].as_str().unwrap().replace("$__rate_interval", "1m");
            let query = variables.iter().fold(asked, |query, variable| query.replace(variable, ".*"));
            assert!(!query.contains('$'), "{name} has a variable that nobody declares: {query}");
            found.push(Panel { name: name.clone(), query });
        }
        // Rows that are folded hold their panels.
        collect(&panel["panels"], file, variables, found);
    }
}

fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

/// Runs a program of Prometheus' package with an input; returns whether it was content, and what it said.
async fn run(name: &str, arguments: &[&str], input: &str) -> (bool, String) {
    let mut command = Command::new(program(name));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut process = command.spawn().unwrap();
    process.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
    let output = patiently(name, process.wait_with_output()).await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).trim().to_owned())
}

/// Where a program of Prometheus' package is.
fn program(name: &str) -> PathBuf {
    let named = std::env::var_os("OLOL_PROMETHEUS").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    let unpacked = cache.map(|cache| cache.join("olol/prometheus/usr/bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = named.into_iter().chain(unpacked).chain(std::env::split_paths(&path));
    folders.map(|folder| folder.join(name)).find(|program| program.is_file()).unwrap_or_else(|| {
        panic!(
            "there is no {name} here. `./dev setup` unpacks the distribution's package prometheus in your cache folder \
             (apt-get); elsewhere install Prometheus, or let OLOL_PROMETHEUS name the folder with prometheus and promtool"
        )
    })
}
