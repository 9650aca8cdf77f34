//! What `GET /api/status` adds to Ollama's own keys: who we are and how the servers are.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use olol_middleware::cluster::State;
use olol_middleware::{Server, Snapshot};
use serde_json::{Value, json};

use crate::reload::{Attempt, Running, State as Config};

/// What is told of the proxy itself.
#[derive(Clone, Debug)]
pub struct About {
    /// Random id of this process.
    pub instance: String,
    /// Address that the proxy listens on.
    pub address: String,
    /// The file of its configuration.
    pub file: Option<PathBuf>,
    /// What runs now.
    pub running: Arc<Running>,
}

/// The summary below the key `olol`: small, and made of what is in memory.
pub fn summary(snapshot: &Snapshot, about: &About) -> Value {
    let up = snapshot.servers.iter().filter(|server| server.state == State::Up).count();
    let in_flight: u32 = snapshot.servers.iter().map(|server| server.load.in_flight()).sum();
    let running = about.running.state();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "instance": about.instance,
        "address": about.address,
        "stack": running.layers(),
        "config": config(&running, about),
        "async_mode": true,
        "servers": {"total": snapshot.servers.len(), "up": up},
        "models": snapshot.models.len(),
        "in_flight": in_flight,
    })
}

/// Where the configuration comes from, and how it was last read.
fn config(running: &Config, about: &About) -> Value {
    json!({
        "file": about.file,
        "since_ms": ms(running.since),
        "needs_restart": running.needs_restart,
        "last_reload": running.last.as_ref().map(|Attempt { at, trigger, error }| json!({
            "at_ms": ms(*at),
            "trigger": trigger.as_str(),
            "error": error,
        })),
    })
}

/// Milliseconds since 1970.
fn ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The page of `/api/status/servers`.
pub fn servers(snapshot: &Snapshot, about: &About) -> Value {
    json!({
        "instance": about.instance,
        "servers": snapshot.servers.iter().map(|server| one(server, snapshot)).collect::<Vec<_>>(),
    })
}

fn one(server: &Server, snapshot: &Snapshot) -> Value {
    let report = &server.report;
    let circuit = match server.circuits.server_state() {
        0 => "closed",
        1 => "open",
        _ => "half-open",
    };
    let used = snapshot.models.values().filter_map(|known| Some((&known.name, known.runners.used(server)?)));
    let runners: Vec<Value> = used
        .map(|(model, runner)| {
            json!({
                "model": model.as_str(),
                "in_flight": runner.in_flight(),
                "waiting": runner.waiting(),
                "slots": runner.slots(),
                "slots_from": runner.source(),
            })
        })
        .collect();
    json!({
        "server": server.id.as_str(),
        "state": server.condition().as_str(),
        "since_ms": ms(server.since),
        "source": server.source.as_str(),
        "draining": server.draining,
        "failures": server.failures,
        "online": server.state == State::Up,
        "usable": server.is_usable(),
        "circuit": circuit,
        "reason": server.reason,
        "weight": server.weight.get(),
        "in_flight": server.load.in_flight(),
        "runners": runners,
        "version": report.version,
        "models": report.models.iter().map(|model| &model.name).collect::<Vec<_>>(),
        "loaded_models": report.loaded.iter().map(|loaded| json!({
            "name": loaded.name,
            "size": loaded.size,
            "size_vram": loaded.size_vram,
            "expires_at": loaded.expires_at,
            "context_length": loaded.context_length,
            "slots": loaded.slots,
        })).collect::<Vec<_>>(),
    })
}
