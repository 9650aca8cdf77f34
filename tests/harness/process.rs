//! The built program as a process: for signals, exit codes, flags, and memory.

use std::net::SocketAddr;
use std::process::{ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::task::JoinHandle;

use super::client::{Connection, Request};
use super::cluster::token;
use super::patiently;

/// A running `olol` that listens. It is killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    address: SocketAddr,
    /// The most memory that it had until it listened, bytes.
    at_start: u64,
    log: Arc<Mutex<String>>,
    reading: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `olol` with these arguments and waits until it listens.
    pub async fn start(arguments: &[&str]) -> Self {
        Self::start_with(&[], arguments).await
    }

    /// The same with these variables in its environment.
    pub async fn start_with(environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let mut child = olol(arguments).envs(environment.iter().copied()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (found, address) = tokio::sync::oneshot::channel();
        let reading = Some(tokio::spawn(read_log(child.stderr.take().unwrap(), log.clone(), found)));
        let address = patiently("the program listens", address).await;
        let address = address.unwrap_or_else(|_| panic!("the program ended: {}", log.lock().unwrap()));
        let at_start = peak_memory(&child);
        Self { child, address, at_start, log, reading }
    }

    /// Starts a proxy.
    pub async fn proxy(servers: &str, more: &[&str]) -> Self {
        Self::start(&[&["proxy", "--port", "0", "--servers", servers], more].concat()).await
    }

    /// Starts an agent.
    pub async fn agent(ollama: SocketAddr) -> Self {
        Self::start(&["server", "--port", "0", "--ollama-host", &format!("http://{ollama}")]).await
    }

    /// Runs `olol` to its end, which comes by itself.
    pub async fn run(arguments: &[&str]) -> Output {
        patiently("the program ends", olol(arguments).output()).await.unwrap()
    }

    /// The same with these variables in its environment.
    pub async fn run_with(environment: &[(&str, &str)], arguments: &[&str]) -> Output {
        let mut command = olol(arguments);
        patiently("the program ends", command.envs(environment.iter().copied()).output()).await.unwrap()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it, a proxy, knows that so many servers are up.
    pub async fn has_up(&self, servers: usize) {
        let mut client = self.connect().await;
        let knowing = async {
            while !client.ask(&Request::get("/readyz")).await.text().starts_with(&format!("{servers} of ")) {
                tokio::task::yield_now().await;
            }
        };
        patiently("the proxy knows its servers", knowing).await;
    }

    /// A new connection to it.
    pub async fn connect(&self) -> Connection {
        Connection::open(self.address).await
    }

    /// Asks it to stop.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends it at once, whatever it is at.
    pub async fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.ends().await;
    }

    /// Asks it to read its configuration again.
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|id| Pid::from_raw(id.try_into().unwrap())).expect("a running process");
        kill_process(pid, signal).unwrap();
    }

    /// Waits for its end, and for the last line of its log.
    pub async fn ends(&mut self) -> ExitStatus {
        let status = patiently("the program ends", self.child.wait()).await.unwrap();
        if let Some(reading) = self.reading.take() {
            patiently("its log ends", reading).await.unwrap();
        }
        status
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// How much its memory has grown, at the most, since it listens; bytes. The program's own pages are not in it: a build
    /// for debugging has many.
    pub fn peak_growth(&self) -> u64 {
        peak_memory(&self.child) - self.at_start
    }
}

/// The most memory that a process ever had, bytes.
fn peak_memory(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id().unwrap())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The program, without what the environment of the tests may say to it.
fn olol(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_olol"));
    let ours = [
        "OLLAMA_HOST",
        "OLLAMA_ORIGINS",
        "OLLAMA_SERVERS",
        "OLOL_PORT",
        "OLOL_CONFIG",
        "OLOL_JOIN",
        "OLOL_KEY",
        "OLOL_LOG_LEVEL",
    ];
    // To print a backtrace takes a hundred megabytes: the names of everything in a build for debugging.
    for name in ours.into_iter().chain(["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"]) {
        command.env_remove(name);
    }
    // What the user of this machine has configured counts for nothing.
    command.env("XDG_CONFIG_HOME", "/nowhere").env("XDG_STATE_HOME", "/nowhere").env("OLOL_TOKEN", token().reveal());
    // Nor do the servers that are on its network.
    command.env("OLOL_DISCOVERY", "false");
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Keeps the log, and tells the address when it stands there.
async fn read_log(from: ChildStderr, log: Arc<Mutex<String>>, found: tokio::sync::oneshot::Sender<SocketAddr>) {
    let mut lines = BufReader::new(from).lines();
    let mut found = Some(found);
    while let Ok(Some(line)) = lines.next_line().await {
        let address = line.split("address=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        if let (Some(address), Some(found)) = (address, found.take_if(|_| address.is_some())) {
            let _ = found.send(address);
        }
        let mut log = log.lock().unwrap();
        log.push_str(&line);
        log.push('\n');
    }
}
