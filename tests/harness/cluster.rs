//! The servers of a test, and the way that OLOL takes to them.

use std::path::Path;
use std::time::Duration;

use olol::agent::{Agent, Options};
use olol::ollama::Endpoint;
use olol::security::Token;
use tempfile::TempDir;

use super::server::Server;

/// How the proxy reaches its servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Directly, over HTTP.
    Http,
    /// Through an agent beside each of them, over gRPC.
    Agents,
}

impl Way {
    /// Both: what OLOL promises holds on either.
    pub const BOTH: [Self; 2] = [Self::Http, Self::Agents];
}

/// Some servers, named "0", "1", … by OLOL.
#[derive(Debug)]
pub struct Cluster {
    servers: Vec<Server>,
    way: Way,
    weights: Vec<u32>,
    /// Where agents keep what they must not forget.
    home: TempDir,
}

impl Cluster {
    /// So many servers, reached over HTTP, without any model.
    pub async fn of(count: usize) -> Self {
        let mut servers = Vec::new();
        for _ in 0..count {
            servers.push(Server::start().await);
        }
        Self { servers, way: Way::Http, weights: vec![1; count], home: tempfile::tempdir().unwrap() }
    }

    /// Reaches them another way.
    pub fn over(self, way: Way) -> Self {
        Self { way, ..self }
    }

    /// Gives some more work than others.
    pub fn weighing<const N: usize>(self, weights: [u32; N]) -> Self {
        Self { weights: weights.to_vec(), ..self }
    }

    /// Gives a model to every server.
    pub fn all_have(self, model: &str) -> Self {
        for server in &self.servers {
            server.has(model);
        }
        self
    }

    /// Gives a model to every server, and has it loaded there: which one answers is then a question of load alone.
    pub fn all_have_loaded(self, model: &str) -> Self {
        for server in &self.servers {
            server.has_loaded(model);
        }
        self
    }

    /// One of them.
    pub fn server(&self, at: usize) -> &Server {
        &self.servers[at]
    }

    /// All of them.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// Starts agents where the way leads over them, and says what stands in `--servers`.
    pub(super) async fn reach(&self) -> (Vec<Agent>, Vec<String>) {
        let mut agents = Vec::new();
        let mut list = Vec::new();
        for (at, (server, weight)) in self.servers.iter().zip(&self.weights).enumerate() {
            let address = server.address();
            let shown = match self.way {
                Way::Http => format!("http://{address}"),
                Way::Agents => {
                    let ollama = Endpoint::parse(&address.to_string(), 0).unwrap();
                    agents.push(agent_at(ollama, &self.home.path().join(at.to_string())).await);
                    agents[at].address().to_string()
                }
            };
            list.push(format!("{at}@{shown}={weight}"));
        }
        (agents, list)
    }
}

/// The token of every cluster on loopback, which is no user's.
pub fn token() -> Token {
    "the-token-of-the-tests-and-of-nobody-else".parse().unwrap()
}

/// An agent beside an Ollama.
pub async fn agent(ollama: Endpoint) -> Agent {
    agent_at(ollama, Path::new("/nowhere")).await
}

/// An agent that keeps its sessions in a folder.
pub async fn agent_at(ollama: Endpoint, folder: &Path) -> Agent {
    let sessions = olol::sessions::Config { dir: folder.to_owned(), ..olol::sessions::Config::default() };
    Agent::start(Options { sessions, ..options(ollama) }).await.unwrap()
}

/// What an agent of a test is told: it touches nothing of whoever runs it.
pub fn options(ollama: Endpoint) -> Options {
    Options {
        listen: "127.0.0.1:0".parse().unwrap(),
        ollama,
        name: "agent".to_owned(),
        engine: "ollama",
        tokens: token().into(),
        tls: None,
        join: Vec::new(),
        join_tls: None,
        connector: None,
        grace: Duration::from_secs(5),
        sessions: olol::sessions::Config { dir: "/nowhere".into(), ..olol::sessions::Config::default() },
    }
}
