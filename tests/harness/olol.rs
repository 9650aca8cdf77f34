//! A proxy in front of a cluster, in the process of the test.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use olol::agent::Agent;
use olol::config::{Config, Origin, Set, Source};
use olol::discovery::join::Refusal;
use olol::pool::ServerSpec;
use olol::proxy::Proxy;
use olol_middleware::cluster::State;
use olol_middleware::vitals::Vitals;
use olol_middleware::{ModelName, ServerId, Snapshot};
use serde_json::json;
use tempfile::TempDir;

use super::client::{Answer, Connection, Request};
use super::cluster::{Cluster, token};
use super::server::Server;
use super::{patiently, until};

/// A proxy, the agents between it and its servers, and where it keeps blobs.
#[derive(Debug)]
pub struct Olol {
    proxy: Proxy,
    agents: Vec<Agent>,
    spool: TempDir,
    /// Stands for the folder where a user keeps configuration: what the machine of the test has there counts for nothing.
    home: TempDir,
}

impl Olol {
    /// Starts a proxy with this configuration, and waits until it knows what its servers have.
    pub async fn start(cluster: &Cluster, toml: &str) -> Self {
        let olol = Self::launch(cluster, toml).await;
        olol.knows(cluster).await;
        olol
    }

    /// Starts a proxy, and waits for nothing.
    pub async fn launch(cluster: &Cluster, toml: &str) -> Self {
        let (agents, servers) = cluster.reach().await;
        Self { agents, ..Self::at(servers, toml).await }
    }

    /// Starts a proxy with the configuration in a file, which it reads again when that changes. Servers are called as the
    /// file calls them.
    pub async fn from_file(cluster: &Cluster, file: &Path) -> Self {
        let (agents, mut servers) = cluster.reach().await;
        for (server, name) in servers.iter_mut().zip(servers_in(file)) {
            let (_, way) = server.split_once('@').unwrap();
            *server = format!("{name}@{way}");
        }
        let home = tempfile::tempdir().unwrap();
        let keys = Set::Keys(home.path().join("keys.toml"));
        let sessions = Set::Sessions(home.path().join("state"));
        let token = Set::Tokens(vec![token()]);
        let alone = Set::Discovery(false);
        let here =
            [Set::Host("127.0.0.1".to_owned()), Set::Port(0), Set::Servers(servers), keys, sessions, token, alone];
        let source = here.into_iter().fold(Source::of(file), |source, set| source.with(set, Origin::Program));
        let config = source.read().unwrap_or_else(|error| panic!("{error}")).config;
        let proxy = Proxy::start_from(&config, Some(source)).await.unwrap();
        let olol = Self { proxy, agents, spool: tempfile::tempdir().unwrap(), home };
        olol.knows(cluster).await;
        olol
    }

    /// Starts a proxy for servers that are given as in `--servers`.
    pub async fn at(servers: Vec<String>, toml: &str) -> Self {
        let (spool, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut config: Config = toml::from_str(toml).unwrap_or_else(|error| panic!("{error}"));
        config.proxy.port = 0;
        // Unless a test is about that, nobody on the network of this machine is found.
        config.discovery.mdns &= toml.contains("mdns");
        config.proxy.servers = servers;
        config.spool.dir = spool.path().to_owned();
        if config.sessions.dir.as_os_str().is_empty() {
            config.sessions.dir = home.path().join("state");
        }
        if config.security.token_file.as_os_str().is_empty() {
            config.security.given = vec![token()];
        }
        if config.auth.file.as_os_str().is_empty() {
            config.auth.file = home.path().join("keys.toml");
        }
        Self { proxy: Proxy::start(&config).await.unwrap(), agents: Vec::new(), spool, home }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.proxy.address()
    }

    /// Its file of keys, unless the test named another.
    pub fn keys(&self) -> PathBuf {
        self.home.path().join("keys.toml")
    }

    /// The agents, in the order of their servers.
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// The models that a server lists, in the books of the proxy.
    pub fn listed(&self, server: usize) -> Vec<olol_middleware::cluster::Model> {
        let snapshot = self.proxy.cluster().snapshot();
        snapshot.servers[server].report.models.iter().map(|held| olol_middleware::cluster::Model::clone(held)).collect()
    }

    /// What brings models to servers.
    pub fn models(&self) -> &olol::models::Models {
        self.proxy.models()
    }

    /// Blobs that wait in the spool, and their parts.
    pub fn spooled(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.spool.path()).unwrap();
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// What the proxy calls its servers.
    pub fn names(&self) -> Vec<String> {
        self.proxy.cluster().snapshot().servers.iter().map(|server| server.id.to_string()).collect()
    }

    /// Calls that are at a server now, in the books of the proxy.
    pub fn in_flight(&self, server: usize) -> u32 {
        self.proxy.cluster().snapshot().servers[server].load.in_flight()
    }

    /// Links of conversations that it remembers.
    pub fn links(&self) -> usize {
        self.proxy.shared().affinity.len()
    }

    /// Whether the store that it shares with others answers.
    pub fn shares(&self) -> bool {
        self.proxy.state().is_some_and(olol::state::State::is_up)
    }

    /// Whether a server is drained.
    pub fn drains(&self, server: &str) -> bool {
        self.proxy.cluster().snapshot().servers.iter().any(|known| known.id.as_str() == server && known.draining)
    }

    /// Calls that wait for a slot.
    pub fn waiting(&self) -> usize {
        self.proxy.shared().queue.len()
    }

    /// How a server is, in the books of the proxy, by its name.
    pub fn state_of(&self, name: &str) -> Option<State> {
        self.named(name).map(|server| server.state)
    }

    /// Why it is down.
    pub fn reason(&self, name: &str) -> String {
        self.named(name).map(|server| server.reason.clone()).unwrap_or_default()
    }

    /// Whether it is to get nothing new.
    pub fn is_draining(&self, name: &str) -> bool {
        self.named(name).is_some_and(|server| server.draining)
    }

    /// Its place among the servers.
    pub fn place_of(&self, name: &str) -> Option<usize> {
        self.named(name).map(|server| server.index)
    }

    fn named(&self, name: &str) -> Option<Arc<olol_middleware::Server>> {
        self.proxy.cluster().snapshot().server(&ServerId::new(name)).cloned()
    }

    /// Lets the proxy find servers that nobody has named: from now on these.
    pub fn finds(&self, source: olol_middleware::cluster::Source, servers: &[ServerSpec]) {
        self.proxy.pool().set(source, servers);
    }

    /// The agents that dialled in and were refused.
    pub fn refused(&self) -> Vec<Refusal> {
        self.proxy.guests().refused()
    }

    /// Whether a server is up, in the books of the proxy.
    pub fn is_server_up(&self, server: usize) -> bool {
        self.proxy.cluster().snapshot().servers[server].state == State::Up
    }

    /// What the agent of a server has told of its machine, so far.
    pub fn vitals(&self, server: usize) -> Option<Arc<Vitals>> {
        self.proxy.cluster().snapshot().servers[server].vitals.load_full()
    }

    /// Lets the proxy believe that an agent has told this of a server.
    pub fn believes(&self, server: usize, vitals: Vitals) {
        self.proxy.cluster().tell_vitals(server, vitals);
    }

    /// What the proxy tells of a model that it knows, or that somebody wants.
    pub async fn model(&self, name: &str) -> serde_json::Value {
        let page = self.get("/api/status?detail=models&limit=1000").await.json();
        let models = page["models"].as_array().unwrap();
        models.iter().find(|model| model["name"] == name).cloned().unwrap_or_default()
    }

    /// Calls that are at a server and not of this proxy, in its books.
    pub fn others(&self, server: usize) -> u32 {
        self.proxy.cluster().snapshot().servers[server].load.others()
    }

    /// Whether the proxy knows that a server has a model on its disk, and in its memory.
    pub fn knows_of(&self, server: usize, model: &str) -> (bool, bool) {
        let snapshot = self.proxy.cluster().snapshot();
        let known = ModelName::parse(model).and_then(|name| snapshot.known(&name).cloned());
        known.map_or((false, false), |known| (known.installed.contains(server), known.loaded.contains(server)))
    }

    /// Waits until the proxy knows what the servers have; those that do not answer are left out.
    pub async fn knows(&self, cluster: &Cluster) {
        let learning = async {
            loop {
                self.proxy.cluster().refresh(Duration::from_secs(1)).await;
                let snapshot = self.proxy.cluster().snapshot();
                let answering = cluster.servers().iter().enumerate().filter(|(_, server)| server.answers());
                if answering.into_iter().all(|(at, server)| is_known(&snapshot, at, server)) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        patiently("the proxy knows its servers", learning).await;
    }

    /// Waits until every server is up.
    pub async fn is_up(&self) {
        let are_up = || self.proxy.cluster().snapshot().servers.iter().all(|server| server.state == State::Up);
        until("every server is up", are_up).await;
    }

    /// A new connection.
    pub async fn connect(&self) -> Connection {
        Connection::open(self.address()).await
    }

    /// Sends a request on a connection of its own, and reads nothing yet.
    pub async fn begin(&self, request: &Request) -> Connection {
        let mut connection = self.connect().await;
        connection.send(request).await;
        connection
    }

    /// Sends a request on a connection of its own and reads the whole answer.
    pub async fn ask(&self, request: &Request) -> Answer {
        self.begin(request).await.answer().await
    }

    /// Asks for a path.
    pub async fn get(&self, path: &str) -> Answer {
        self.ask(&Request::get(path)).await
    }

    /// Chats with a model, as a stream.
    pub async fn chat(&self, model: &str, text: &str) -> Answer {
        self.ask(&chat(model, text)).await
    }

    /// Takes nothing new and lets what runs finish. True if all of it did in time.
    pub async fn stop(self) -> bool {
        patiently("the proxy stops", self.proxy.stop()).await
    }
}

/// The names of the servers in a file of configuration.
pub fn servers_in(file: &Path) -> Vec<String> {
    let servers = Config::read(file).unwrap_or_else(|error| panic!("{error}")).servers().unwrap();
    servers.iter().map(|server| server.id.to_string()).collect()
}

/// A chat as a stream.
pub fn chat(model: &str, text: &str) -> Request {
    Request::post("/api/chat", json!({"model": model, "messages": [{"role": "user", "content": text}]}))
}

/// The same in one piece.
pub fn chat_at_once(model: &str, text: &str) -> Request {
    Request::post(
        "/api/chat",
        json!({"model": model, "messages": [{"role": "user", "content": text}], "stream": false}),
    )
}

/// A chat in OpenAI's form, as a stream.
pub fn v1_chat(model: &str, text: &str) -> Request {
    let body = json!({"model": model, "messages": [{"role": "user", "content": text}], "stream": true});
    Request::post("/v1/chat/completions", body)
}

/// A request that only loads, or unloads, a model.
pub fn keep_alive(model: &str, seconds: i32) -> Request {
    Request::post("/api/generate", json!({"model": model, "keep_alive": seconds}))
}

/// Whether the books of the proxy are true of a server.
fn is_known(snapshot: &Snapshot, at: usize, server: &Server) -> bool {
    let report = &snapshot.servers[at].report;
    let (models, loaded) = server.holds();
    snapshot.servers[at].state == State::Up
        && are_same(&models, report.models.iter().map(|model| &model.name))
        && are_same(&loaded, report.loaded.iter().map(|model| &model.name))
}

fn are_same<'a>(names: &[String], others: impl Iterator<Item = &'a String>) -> bool {
    let sorted = |mut names: Vec<Option<ModelName>>| {
        names.sort();
        names
    };
    sorted(names.iter().map(|name| ModelName::parse(name)).collect())
        == sorted(others.map(|name| ModelName::parse(name)).collect())
}
