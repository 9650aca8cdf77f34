//! Machines on networks of their own, made of network namespaces: what no loopback can show.
//!
//! It takes a Linux that lets us make such networks, with the command `ip`; elsewhere these tests say that they were skipped,
//! and why. Those in `discovery.rs` run everywhere.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::process::Child;

/// A token of these machines.
const TOKEN: &str = "the-token-of-the-tests-and-of-nobody-else";

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().map_err(|error| format!("no `ip`: {error}"))?;
    output.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// A machine: a namespace with what runs in it.
struct Machine {
    name: String,
    running: Vec<Child>,
    folder: tempfile::TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.running.clear();
        let _ = ip(&format!("netns del {}", self.name));
    }
}

impl Machine {
    fn new(name: &str) -> Result<Self, String> {
        let name = format!("olol-{name}-{:08x}", fastrand::u32(..));
        ip(&format!("netns add {name}"))?;
        let machine = Self { name, running: Vec::new(), folder: tempfile::tempdir().unwrap() };
        machine.ip("link set lo up")?;
        Ok(machine)
    }

    fn ip(&self, arguments: &str) -> Result<(), String> {
        ip(&format!("-n {} {arguments}", self.name))
    }

    /// Lays a cable to another; each has an interface with an address of its own.
    fn cable(&self, other: &Self, interfaces: [&str; 2], addresses: [&str; 2]) -> Result<(), String> {
        let [here, there] = interfaces;
        self.ip(&format!("link add {here} type veth peer name {there} netns {}", other.name))?;
        for (machine, interface, address) in [(self, here, addresses[0]), (other, there, addresses[1])] {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            machine.ip(&format!("addr add {address} dev {interface}{nodad}"))?;
            machine.ip(&format!("link set {interface} up"))?;
        }
        Ok(())
    }

    fn olol(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("ip");
        command.args(["netns", "exec", &self.name, env!("CARGO_BIN_EXE_olol")]).args(arguments);
        command.env("OLOL_TOKEN", TOKEN).env("OLOL_LOG_LEVEL", "warn");
        command.env("XDG_CONFIG_HOME", "/nowhere").env("XDG_STATE_HOME", self.folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Starts `olol` there.
    fn runs(&mut self, arguments: &[&str]) {
        let child = self.olol(arguments).spawn().unwrap();
        self.running.push(child);
    }

    /// Ends all that runs there, and waits for its end.
    async fn ends(&mut self) {
        for child in &mut self.running {
            child.kill().await.unwrap();
        }
        self.running.clear();
    }

    /// What its proxy knows: servers with how they were found, and what it found and does not use. An agent without an
    /// Ollama is down, and that is all that this needs.
    async fn knows(&self) -> (Vec<String>, Vec<String>) {
        let output = self.olol(&["status", "servers", "--json"]).output().await.unwrap();
        let page: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let list = |key: &str, name: &str| -> Vec<String> {
            let all = page[key].as_array().cloned().unwrap_or_default();
            all.iter()
                .map(|one| format!("{} {}", one[name].as_str().unwrap(), one["source"].as_str().unwrap()))
                .collect()
        };
        (list("servers", "server"), list("found", "name"))
    }

    /// Waits until it knows just these.
    async fn knows_of(&self, servers: &[&str], found: &[&str]) {
        let mut last = (Vec::new(), Vec::new());
        let knowing = async {
            loop {
                last = self.knows().await;
                if last.0 == servers && last.1 == found {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let is_so = tokio::time::timeout(harness::PATIENCE, knowing).await.is_ok();
        assert!(is_so, "{servers:?} and {found:?} are expected, and {last:?} are known");
    }
}

/// Machines of these names, if there can be any.
#[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
fn machines<const N: usize>(names: [&str; N]) -> Option<[Machine; N]> {
    let made: Result<Vec<Machine>, String> = names.iter().map(|name| Machine::new(name)).collect();
    match made {
        Ok(made) => made.try_into().ok(),
        Err(why) => {
            eprintln!("skipped: no networks can be made here: {why}");
            None
        }
    }
}

#[tokio::test]
async fn servers_are_found_on_the_networks_that_are_meant() {
    let Some([mut proxy, mut left, mut right, mut both]) = machines(["p", "l", "r", "b"]) else { return };
    proxy.cable(&left, ["west", "eth0"], ["10.78.1.1/24", "10.78.1.2/24"]).unwrap();
    proxy.cable(&right, ["east", "eth0"], ["fd78::1/64", "fd78::2/64"]).unwrap();
    proxy.cable(&both, ["north", "eth0"], ["10.78.3.1/24", "10.78.3.2/24"]).unwrap();
    proxy.cable(&both, ["south", "eth1"], ["fd78:3::1/64", "fd78:3::2/64"]).unwrap();
    left.runs(&["server", "--host", "0.0.0.0", "--name", "left"]);
    right.runs(&["server", "--host", "::", "--name", "right"]);
    both.runs(&["server", "--host", "::", "--name", "both"]);
    proxy.runs(&["proxy"]);
    // One server, however many addresses it has.
    proxy.knows_of(&["both mdns", "left mdns", "right mdns"], &[]).await;
    proxy.ends().await;
    proxy.runs(&["proxy", "--interface", "east"]);
    proxy.knows_of(&["right mdns"], &[]).await;
    proxy.ends().await;
    proxy.runs(&["proxy", "--interface", "10.78.1.1", "--interface", "south"]);
    proxy.knows_of(&["both mdns", "left mdns"], &[]).await;
}

#[tokio::test]
async fn machines_without_any_address_of_their_own_find_each_other() {
    let Some([mut proxy, mut server]) = machines(["p", "s"]) else { return };
    // Of IPv6 the link gives each an address that only the link knows.
    proxy.ip(&format!("link add eth0 type veth peer name eth0 netns {}", server.name)).unwrap();
    proxy.ip("link set eth0 up").unwrap();
    server.ip("link set eth0 up").unwrap();
    server.runs(&["server", "--host", "::", "--name", "gpu1"]);
    proxy.runs(&["proxy"]);
    proxy.knows_of(&["gpu1 mdns"], &[]).await;
}

#[tokio::test]
async fn an_agent_on_loopback_is_for_its_machine_alone_and_counts_once_there() {
    let Some([mut proxy, mut server]) = machines(["p", "s"]) else { return };
    proxy.cable(&server, ["eth0", "eth0"], ["10.78.1.1/24", "10.78.1.2/24"]).unwrap();
    server.runs(&["server", "--name", "alone"]);
    server.runs(&["proxy"]);
    proxy.runs(&["server", "--host", "0.0.0.0", "--name", "open"]);
    proxy.runs(&["proxy"]);
    server.knows_of(&["localhost:50051 local", "open mdns"], &[]).await;
    // And the other is told of none but its own.
    proxy.knows_of(&["localhost:50051 local"], &[]).await;
    proxy.ends().await;
    proxy.runs(&["proxy", "--no-discovery"]);
    proxy.knows_of(&["localhost:50051 static"], &[]).await;
}
