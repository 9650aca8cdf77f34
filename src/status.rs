//! What `GET /api/status` adds to Ollama's own keys, a summary, and the pages below it: everything that is known of the
//! proxy, its servers, the models, the clients and the sessions. All of it is made of what is in memory: nobody is asked.

mod clients;
mod found;
mod models;
mod page;
mod proxy;
mod pulls;
mod servers;
mod sessions;
mod time;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use http::StatusCode;
use olol_middleware::cluster::{Condition, State};
use olol_middleware::time::unix_ms;
use olol_middleware::{ServerId, Shared, Snapshot};
use serde::Serialize;
use serde_json::{Value, json};

use crate::discovery::join::Guests;
use crate::models::Models;
use crate::models::desired::Desired;
use crate::pool::Pool;
use crate::reload::{Attempt, Running, State as Config};
use crate::security::tls;
use crate::sessions::Sessions;
use time::rfc3339;

pub use page::{Detail, Page, Wanted};
use pulls::Pulls;

/// Versions of servers that are told apart.
const VERSIONS: usize = 16;

/// What is told of the proxy itself.
#[derive(Clone, Debug)]
pub struct About {
    /// Random id of this process.
    pub instance: String,
    /// Address that the proxy listens on.
    pub address: SocketAddr,
    /// When it was started.
    pub started: SystemTime,
    /// The file of its configuration.
    pub file: Option<PathBuf>,
    /// What runs now.
    pub running: Arc<Running>,
    /// The servers, as they were named.
    pub pool: Pool,
    /// The agents that dial in.
    pub guests: Guests,
    /// The sessions.
    pub sessions: Sessions,
    /// What is shared with other proxies, if anything is.
    pub state: Option<crate::state::State>,
    /// Which models should be where.
    pub desired: Desired,
    /// What brings models to servers.
    pub models: Models,
    /// Its certificates.
    pub tls: tls::InUse,
}

/// The summary below the key `olol`: small, and made of what is in memory.
pub fn summary(shared: &Shared, snapshot: &Snapshot, about: &About) -> Value {
    let servers = &snapshot.servers;
    let in_condition = |condition: Condition| servers.iter().filter(|server| server.condition() == condition).count();
    let usable = servers.iter().filter(|server| takes_calls(server)).count();
    let in_flight: u32 = servers.iter().map(|server| server.load.in_flight()).sum();
    let running = about.running.state();
    let mut summary = identity(about);
    proxy::merge(
        &mut summary,
        json!({
            "stack": running.layers(),
            "config": config(&running, about),
            "tls": {
                "clients": about.tls.acceptor.is_some(),
                "agents": about.tls.connector.is_some(),
                "faults": about.tls.faults(),
            },
            "servers": {
                "total": servers.len(),
                // Those that are degraded answer, too; those that are being drained finish what they have.
                "up": servers.iter().filter(|server| is_up(server)).count(),
                "degraded": in_condition(Condition::Degraded),
                "draining": in_condition(Condition::Draining),
                "down": in_condition(Condition::Down),
                "unknown": in_condition(Condition::Unknown),
                "taking_calls": usable,
            },
            "refused_agents": about.guests.refused().len(),
            "models": snapshot.models.len(),
            "loaded_models": servers.iter().map(|server| servers::in_memory(server).len()).sum::<usize>(),
            "in_flight": in_flight,
            "queued": shared.queue.len(),
            "clients": shared.clients.len(),
            "sessions": about.sessions.counts().0,
            "registry": registry(snapshot, about),
            "load_balancer": proxy::balancing(&running.config),
            "health_check": proxy::checking(&running.config),
            "details": Detail::ALL.map(|detail| format!("/api/status?detail={}", detail.as_str())),
            "collected_at": rfc3339(SystemTime::now()),
        }),
    );
    if let Some(state) = &about.state {
        summary["state"] = state.shown();
    }
    summary
}

/// Who and where the proxy is.
fn identity(about: &About) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "instance": about.instance,
        "address": about.address.to_string(),
        "host": about.address.ip().to_string(),
        "port": about.address.port(),
        "started_at": rfc3339(about.started),
        "async_mode": true,
        // Threads; each works on any number of requests.
        "max_workers": tokio::runtime::Handle::try_current().map(|runtime| runtime.metrics().num_workers()).ok(),
    })
}

/// What is known of the models as a whole.
fn registry(snapshot: &Snapshot, about: &About) -> Value {
    let servers = &snapshot.servers;
    let mut versions: BTreeMap<&str, usize> = BTreeMap::new();
    for server in servers.iter().filter(|server| !server.report.version.is_empty()) {
        *versions.entry(&server.report.version).or_default() += 1;
    }
    let lowest = versions.keys().min_by_key(|version| in_order(version)).copied();
    let updated = servers.iter().filter_map(|server| server.meters.health.last_good()).max();
    let (pulls, first) = Pulls::of(about.models.under_way()).all(snapshot);
    json!({
        "total_models": snapshot.models.len(),
        "last_updated": updated.map(rfc3339),
        "pending_pulls": first,
        "pending_pulls_total": pulls,
        "version_info": {
            "lowest": lowest,
            "servers": versions.iter().take(VERSIONS).collect::<BTreeMap<_, _>>(),
        },
    })
}

/// A version as something that can be put in order; a release candidate comes before its release.
pub(crate) fn in_order(version: &str) -> (Vec<u64>, bool) {
    let numbers = version.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect();
    (numbers, !version.contains('-'))
}

/// Where the configuration comes from, and how it was last read.
fn config(running: &Config, about: &About) -> Value {
    json!({
        "file": about.file,
        "since_ms": unix_ms(running.since),
        "needs_restart": running.needs_restart,
        "last_reload": running.last.as_ref().map(|Attempt { at, trigger, error }| json!({
            "at_ms": unix_ms(*at),
            "trigger": trigger.as_str(),
            "error": error,
        })),
    })
}

/// Whether a server is up: it answers, and is not being drained. `olol_server_up` says the same.
fn is_up(server: &olol_middleware::Server) -> bool {
    servers::is_online(server) && !server.draining
}

/// Whether calls are sent to a server.
fn takes_calls(server: &olol_middleware::Server) -> bool {
    servers::is_online(server) && server.is_usable()
}

/// Whether the proxy can do its work, and why not. For anybody: it names nobody.
pub fn readiness(snapshot: &Snapshot) -> (bool, String) {
    let count =
        |is: &dyn Fn(&olol_middleware::Server) -> bool| snapshot.servers.iter().filter(|server| is(server)).count();
    let (up, all) = (count(&is_up), snapshot.servers.len());
    let servers = if all == 1 { "server" } else { "servers" };
    let mut told = format!("{up} of {all} {servers} up\n");
    if count(&takes_calls) > 0 {
        return (true, told);
    }
    let why = [
        (count(&|server| server.state == State::Unknown), "not asked yet"),
        (count(&|server| server.state != State::Unknown && !servers::is_online(server)), "down"),
        (count(&|server| servers::is_online(server) && server.draining), "being drained"),
        (count(&|server| is_up(server) && !server.is_usable()), "left alone for a while after failed calls"),
    ];
    let why: Vec<String> =
        why.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    let why = if why.is_empty() { "no server is known".to_owned() } else { why.join(", ") };
    told.extend(["not ready: ", &why, "; GET /api/status?detail=servers tells more\n"]);
    (false, told)
}

/// A page as JSON; or why there is none, with the status that says it.
pub async fn page(shared: &Shared, about: &About, wanted: &Wanted) -> Result<Vec<u8>, (StatusCode, String)> {
    let snapshot = shared.cluster.snapshot();
    let running = about.running.state();
    let config = &running.config;
    let pulls = Pulls::of(about.models.under_way());
    match wanted.detail {
        Detail::Proxy => written(about, wanted, &[proxy::all(&snapshot, about)], 1, None),
        Detail::Servers => {
            let (entries, has_more) = servers::page(&snapshot, wanted, config, &about.pool.specs(), &pulls);
            let next = entries.last().filter(|_| has_more).map(|entry| entry.server);
            let found = wanted.after.is_none().then(|| found::all(&about.pool.strangers()));
            let page = Page { found, ..page_of(about, wanted, &entries, snapshot.servers.len(), next) };
            as_json(&page)
        }
        Detail::Models => {
            let standings = about.desired.standings();
            let absent = models::absent(&snapshot, &standings);
            let (entries, has_more) = models::page(&snapshot, wanted, &standings, &absent, &pulls)
                .map_err(|why| (StatusCode::BAD_REQUEST, why))?;
            let next = entries.last().filter(|_| has_more).map(|entry| entry.name);
            written(about, wanted, &entries, snapshot.models.len() + absent.len(), next)
        }
        Detail::Clients => {
            let (entries, total, has_more) = clients::page(&shared.clients, &shared.keys, wanted, config);
            let next = entries.last().filter(|_| has_more).map(|entry| entry.client_id.as_str());
            written(about, wanted, &entries, total, next)
        }
        Detail::Sessions => {
            let (entries, next) = sessions::page(&about.sessions, wanted).await?;
            let total = usize::try_from(about.sessions.counts().0).unwrap_or(usize::MAX);
            written(about, wanted, &entries, total, next.as_deref())
        }
    }
}

/// One server as JSON, as it stands in the page of the servers; `None`: there is none of that name.
pub fn server(shared: &Shared, about: &About, name: &ServerId) -> Option<serde_json::Result<Vec<u8>>> {
    let snapshot = shared.cluster.snapshot();
    let running = about.running.state();
    let pulls = Pulls::of(about.models.under_way());
    let entry = servers::one(&snapshot, name, &running.config, &about.pool.specs(), &pulls)?;
    Some(serde_json::to_vec(&entry))
}

fn written<T: Serialize>(
    about: &About,
    wanted: &Wanted,
    entries: &[T],
    total: usize,
    next: Option<&str>,
) -> Result<Vec<u8>, (StatusCode, String)> {
    as_json(&page_of(about, wanted, entries, total, next))
}

fn page_of<'a, T: Serialize>(
    about: &'a About,
    wanted: &Wanted,
    entries: &'a [T],
    total: usize,
    next: Option<&'a str>,
) -> Page<'a, T> {
    Page { detail: wanted.detail, instance: &about.instance, total, entries, next, found: None }
}

fn as_json<T: Serialize>(page: &Page<'_, T>) -> Result<Vec<u8>, (StatusCode, String)> {
    serde_json::to_vec(page).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::ServerSpec;
    use olol_middleware::cluster::{Model, Report};

    /// A proxy that knows so many servers with so many models each, the same everywhere.
    fn large(servers: usize, models: usize) -> (Shared, About) {
        let names: Vec<String> =
            (0..servers).map(|at| format!("s{at:04}@10.0.{}.{}:50051", at / 250, at % 250 + 1)).collect();
        let specs: Vec<ServerSpec> = names.iter().map(|name| ServerSpec::parse(name).unwrap()).collect();
        let (hop, config) = (http::HeaderValue::from_static("1"), crate::config::Config::default());
        let pool = Pool::new(&specs, &config.pool, &hop, &crate::security::Trust::default());
        let cluster = pool.cluster();
        let model =
            |at: usize| Model { name: format!("model{at:03}:7b"), digest: format!("sha256:{at}"), ..Model::default() };
        let report = Report { models: (0..models).map(model).collect(), ..Report::default() };
        for at in 0..servers {
            cluster.report(at, report.clone());
        }
        let running = Running::new(config);
        let about = About {
            instance: "1".to_owned(),
            address: "127.0.0.1:8000".parse().unwrap(),
            started: SystemTime::now(),
            file: None,
            desired: Desired::open(running.clone(), None, false).unwrap(),
            running: running.clone(),
            pool: pool.clone(),
            guests: crate::discovery::join::Guests::new(pool.clone(), None, &crate::discovery::Config::default()),
            sessions: Sessions::new(crate::sessions::Config { dir: "/nowhere".into(), ..Default::default() }, "none"),
            state: None,
            models: Models::new(pool.clone(), running),
            tls: tls::InUse::default(),
        };
        (Shared::new(pool.cluster().clone()), about)
    }

    #[tokio::test]
    async fn a_large_cluster_is_told_page_by_page() {
        let (shared, about) = large(1000, 200);
        // The last reports wait for the pause between two snapshots.
        shared.cluster.refresh(std::time::Duration::ZERO).await;
        for (detail, total, length) in [(Detail::Servers, 1000, 100), (Detail::Models, 200, 100)] {
            let wanted = Wanted { detail, after: None, limit: 100 };
            let page = page(&shared, &about, &wanted).await.unwrap();
            let page: Value = serde_json::from_slice(&page).unwrap();
            assert_eq!((&page["total"], page[detail.as_str()].as_array().unwrap().len()), (&json!(total), length));
            assert!(page["next"].is_string());
        }
        let summary = summary(&shared, &shared.cluster.snapshot(), &about).to_string();
        assert!(summary.len() < 4096, "it is small: {summary}");
    }

    #[test]
    fn versions_are_in_the_order_of_their_numbers() {
        let mut versions = ["0.33.0", "0.9.10", "0.33.0-rc2", "1.0"];
        versions.sort_by_key(|version| in_order(version));
        assert_eq!(versions, ["0.9.10", "0.33.0-rc2", "0.33.0", "1.0"]);
    }
}
