//! What `GET /api/status` adds to Ollama's own keys: who we are and how the servers are.

use olol_middleware::cluster::State;
use olol_middleware::{Server, Snapshot};
use serde_json::{Value, json};

/// What does not change while the proxy runs.
#[derive(Clone, Debug)]
pub struct About {
    /// Random id of this process.
    pub instance: String,
    /// The layers, outermost first.
    pub stack: Vec<String>,
    /// Address that the proxy listens on.
    pub address: String,
}

/// The summary below the key `olol`: small, and made of what is in memory.
pub fn summary(snapshot: &Snapshot, about: &About) -> Value {
    let up = snapshot.servers.iter().filter(|server| server.state == State::Up).count();
    let in_flight: u32 = snapshot.servers.iter().map(|server| server.load.in_flight()).sum();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "instance": about.instance,
        "address": about.address,
        "stack": about.stack,
        "async_mode": true,
        "servers": {"total": snapshot.servers.len(), "up": up},
        "models": snapshot.models.len(),
        "in_flight": in_flight,
    })
}

/// The page of `/api/status/servers`.
pub fn servers(snapshot: &Snapshot, about: &About) -> Value {
    json!({
        "instance": about.instance,
        "servers": snapshot.servers.iter().map(|server| one(server)).collect::<Vec<_>>(),
    })
}

fn one(server: &Server) -> Value {
    let report = &server.report;
    let circuit = match server.circuits.server_state() {
        0 => "closed",
        1 => "open",
        _ => "half-open",
    };
    json!({
        "server": server.id.as_str(),
        "state": server.state.as_str(),
        "online": server.state == State::Up,
        "usable": server.is_usable(),
        "circuit": circuit,
        "reason": server.reason,
        "weight": server.weight.get(),
        "in_flight": server.load.in_flight(),
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
