//! The page of the servers: what they have, what they do, and how they are.

use std::collections::HashMap;

use olol_middleware::cluster::{Condition, Loaded, State};
use olol_middleware::judge::Verdict;
use olol_middleware::runner::Runner;
use olol_middleware::vitals::Vitals;
use olol_middleware::{Server, ServerId, Snapshot};
use serde::Serialize;

use super::page::Wanted;
use super::pulls::Pulls;
use super::time::{Figures, rfc3339, share, some};
use crate::config::Config;
use crate::ollama::Endpoint;
use crate::pool::{ServerSpec, Way};

/// One server.
#[derive(Debug, Serialize)]
pub(super) struct Entry<'a> {
    pub(super) server: &'a str,
    /// Where it is reached, and how: "agent" or "ollama".
    host: Option<String>,
    port: Option<u16>,
    kind: Option<&'static str>,
    /// Who named it: "static" is the configuration.
    source: &'static str,
    /// One word: unknown, up, degraded, draining, down; since when, and why (below).
    state: &'static str,
    since: String,
    draining: bool,
    online: bool,
    usable: bool,
    circuit: &'static str,
    reason: String,
    weight: u32,
    /// What it works on: our calls, those of others as far as its agent sees them, and what waits there.
    current_load: u32,
    in_flight: u32,
    others_in_flight: Option<u32>,
    queued: Option<u32>,
    runners: Vec<Running<'a>>,
    version: Option<&'a str>,
    models: Vec<&'a str>,
    loaded_models: Vec<InMemory<'a>>,
    active_sessions: Option<Vec<String>>,
    /// Of a bare Ollama those of this proxy.
    pending_pulls: Vec<Pull>,
    /// Shares of 1; bytes.
    cpu_usage: Option<f64>,
    cpu_count: Option<u32>,
    memory_usage: Option<f64>,
    memory: Option<Space>,
    /// Bytes of all graphics memory.
    gpu_memory: Option<u64>,
    gpus: Option<Vec<Gpu>>,
    disk_free: Option<u64>,
    os: Option<String>,
    arch: Option<String>,
    olol_version: Option<String>,
    /// When it last told how it is.
    last_heartbeat: Option<String>,
    /// Milliseconds that the clock of its machine is ahead of ours.
    clock_ahead_ms: Option<i64>,
    metrics: Metrics<'a>,
    health: Check<'a>,
}

/// A model on it that calls were sent to.
#[derive(Debug, Serialize)]
pub(super) struct Running<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) model: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server: Option<&'a str>,
    in_flight: u32,
    waiting: usize,
    slots: u32,
    slots_from: &'static str,
    loading: bool,
    circuit: &'static str,
    /// Decayed averages, milliseconds.
    prefill_ms_per_token: Option<f32>,
    decode_ms_per_token: Option<f32>,
    load_ms: Option<f32>,
}

impl<'a> Running<'a> {
    pub(super) fn of(runner: &Runner, model: Option<&'a str>, server: Option<&'a str>) -> Self {
        let speeds = &runner.speeds;
        Self {
            model,
            server,
            in_flight: runner.in_flight(),
            waiting: runner.waiting(),
            slots: runner.slots(),
            slots_from: runner.source(),
            loading: runner.is_loading(),
            circuit: circuit(runner.circuit_state()),
            prefill_ms_per_token: speeds.prefill.get(),
            decode_ms_per_token: speeds.decode.get(),
            load_ms: speeds.load.get(),
        }
    }
}

#[derive(Debug, Serialize)]
struct InMemory<'a> {
    name: &'a str,
    size: u64,
    size_vram: u64,
    expires_at: Option<&'a str>,
    context_length: u32,
    slots: u32,
}

impl<'a> From<&'a Loaded> for InMemory<'a> {
    fn from(loaded: &'a Loaded) -> Self {
        Self {
            name: &loaded.name,
            size: loaded.size,
            size_vram: loaded.size_vram,
            expires_at: some(&loaded.expires_at),
            context_length: loaded.context_length,
            slots: loaded.slots,
        }
    }
}

#[derive(Debug, Serialize)]
struct Pull {
    model: String,
    /// A share of 1.
    done: f64,
}

#[derive(Debug, Serialize)]
struct Space {
    used: u64,
    total: u64,
}

#[derive(Debug, Serialize)]
struct Gpu {
    name: String,
    kind: String,
    memory_total: u64,
    memory_free: u64,
    utilization: Option<f64>,
}

/// How it has done.
#[derive(Debug, Serialize)]
struct Metrics<'a> {
    server_id: &'a str,
    #[serde(flatten)]
    figures: Figures,
    resource_usage: Usage,
    /// How its calls went in the last minute from whomever they came, as its agent counts them.
    from_everybody: Option<Everybody>,
    collected_at: String,
}

/// Shares of 1; of several graphics processors the mean.
#[derive(Debug, Serialize)]
struct Usage {
    cpu: Option<f64>,
    memory: Option<f64>,
    gpu: Option<f64>,
    gpu_memory: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Everybody {
    requests_per_second: f64,
    response_time: f64,
    error_rate: f64,
}

/// How it is looked at.
#[derive(Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "they are the names of what is told")]
struct Check<'a> {
    check_id: String,
    /// "pass", "warn", "fail"; nothing yet.
    status: Option<&'static str>,
    interval_seconds: f64,
    last_check: Option<String>,
    last_pass: Option<String>,
    checks: u64,
    consecutive_failures: u32,
    failures_to_be_down: u32,
    /// Those of the window of `[judge]`: what makes a server degraded or down whatever its checks say.
    calls: u32,
    failed_calls: u32,
    last_failed_call: Option<Call>,
    error_details: Option<Problem<'a>>,
}

/// A call that failed.
#[derive(Debug, Serialize)]
struct Call {
    at: String,
    reason: String,
}

#[derive(Debug, Serialize)]
struct Problem<'a> {
    /// What has failed: "check", "calls", or "circuit".
    class: &'static str,
    message: String,
    at: Option<String>,
    /// Why it is down, if it is.
    down: Option<&'a str>,
    circuit: &'static str,
    consecutive_failures: u32,
}

/// The servers of a page, by name, and whether there are more.
pub(super) fn page<'a>(
    snapshot: &'a Snapshot,
    wanted: &Wanted,
    config: &Config,
    specs: &[ServerSpec],
    pulls: &Pulls,
) -> (Vec<Entry<'a>>, bool) {
    let all: Vec<&Server> = snapshot.servers.iter().map(AsRef::as_ref).collect();
    let order = |one: &&Server, other: &&Server| one.id.as_str().cmp(other.id.as_str());
    let (chosen, has_more) = wanted.cut(all, order, |server, cursor| server.id.as_str() > cursor);
    let specs: HashMap<&str, &ServerSpec> = specs.iter().map(|spec| (spec.id.as_str(), spec)).collect();
    let mut runners = runners(snapshot);
    let entries = chosen.into_iter().map(|server| {
        let runners = runners.remove(&server.index).unwrap_or_default();
        entry(server, specs.get(server.id.as_str()).copied(), runners, pulls, config)
    });
    (entries.collect(), has_more)
}

/// One server, if there is one of that name.
pub(super) fn one<'a>(
    snapshot: &'a Snapshot,
    name: &ServerId,
    config: &Config,
    specs: &[ServerSpec],
    pulls: &Pulls,
) -> Option<Entry<'a>> {
    let server = snapshot.server(name)?;
    let runners = runners(snapshot).remove(&server.index).unwrap_or_default();
    let spec = specs.iter().find(|spec| spec.id == *name);
    Some(entry(server, spec, runners, pulls, config))
}

/// The runners that were needed so far, by server. Names of the same weights share theirs, which stands under the first.
fn runners(snapshot: &Snapshot) -> HashMap<usize, Vec<Running<'_>>> {
    let mut by_server: HashMap<usize, Vec<Running<'_>>> = HashMap::new();
    for known in snapshot.with_runners() {
        for runner in known.runners.all().iter() {
            let running = Running::of(runner, Some(known.name.as_str()), None);
            by_server.entry(runner.server).or_default().push(running);
        }
    }
    for running in by_server.values_mut() {
        running.sort_unstable_by_key(|running| running.model);
    }
    by_server
}

fn entry<'a>(
    server: &'a Server,
    spec: Option<&ServerSpec>,
    runners: Vec<Running<'a>>,
    pulls: &Pulls,
    config: &Config,
) -> Entry<'a> {
    let report = &server.report;
    let vitals = server.vitals.load_full();
    let vitals = vitals.as_deref();
    // What changes from moment to moment is told only of who answers; what its machine is stays.
    let live = vitals.filter(|_| is_heard(server));
    let (kind, endpoint) = match spec.map(|spec| &spec.way) {
        Some(Way::Agent(endpoint)) => (Some("agent"), Some(endpoint)),
        Some(Way::Ollama(endpoint)) => (Some("ollama"), Some(endpoint)),
        Some(Way::Joined(_)) | None => (vitals.map(|_| "agent"), None),
    };
    let (kind, guest) = match spec.map(|spec| &spec.way) {
        Some(Way::Joined(lobby)) => (Some("agent"), Some(lobby.address())),
        _ => (kind, None),
    };
    let (host, port) = match endpoint {
        None if guest.is_some() => (guest.map(|at| at.ip().to_canonical().to_string()), guest.map(|at| at.port())),
        Some(Endpoint::Tcp { host, port } | Endpoint::Tls { host, port }) => (Some(host.clone()), Some(*port)),
        Some(other @ Endpoint::Unix(_)) => (Some(other.to_string()), None),
        None => (None, None),
    };
    let in_flight = server.load.in_flight();
    let others = live.map(|vitals| vitals.others);
    let usage = usage(live);
    let mut models: Vec<&str> = report.models.iter().map(|model| model.name.as_str()).collect();
    models.sort_unstable();
    let health = &server.meters.health;
    Entry {
        server: server.id.as_str(),
        host,
        port,
        kind,
        source: server.source.as_str(),
        state: server.condition().as_str(),
        since: rfc3339(server.condition_since()),
        draining: server.draining,
        online: is_online(server),
        usable: server.is_usable(),
        circuit: circuit(server.circuits.server_state()),
        reason: server.why(),
        weight: server.weight.get(),
        current_load: in_flight.saturating_add(others.unwrap_or(0)),
        in_flight,
        others_in_flight: others,
        queued: live.map(|vitals| vitals.queued),
        runners,
        version: some(&report.version),
        models,
        loaded_models: in_memory(server).iter().map(InMemory::from).collect(),
        active_sessions: live.map(|vitals| vitals.active_sessions.clone()),
        pending_pulls: pulls.at(server).into_iter().map(|(model, done)| Pull { model, done: share(done) }).collect(),
        cpu_usage: usage.cpu,
        cpu_count: vitals.map(|vitals| vitals.cpu_count).filter(|count| *count > 0),
        memory_usage: usage.memory,
        memory: live.and_then(|vitals| vitals.memory).map(|space| Space { used: space.used, total: space.total }),
        gpu_memory: live.map(|vitals| vitals.gpus.iter().map(|gpu| gpu.memory.total).sum()),
        gpus: live.map(gpus),
        disk_free: live.and_then(|vitals| vitals.disk_free),
        os: vitals.and_then(|vitals| some(&vitals.os)).map(str::to_owned),
        arch: vitals.and_then(|vitals| some(&vitals.arch)).map(str::to_owned),
        olol_version: vitals.and_then(|vitals| some(&vitals.olol_version)).map(str::to_owned),
        clock_ahead_ms: vitals.and_then(|vitals| vitals.clock_ahead),
        last_heartbeat: vitals.and_then(|vitals| vitals.told).or_else(|| health.last_good()).map(rfc3339),
        metrics: Metrics {
            server_id: server.id.as_str(),
            figures: Figures::of(&server.meters.stats),
            resource_usage: usage,
            from_everybody: live.and_then(|vitals| vitals.figures).map(|figures| Everybody {
                requests_per_second: share(figures.requests_per_second),
                response_time: share(figures.response_time),
                error_rate: share(figures.error_rate),
            }),
            collected_at: rfc3339(std::time::SystemTime::now()),
        },
        health: check(server, kind, config),
    }
}

/// Whether what a server says of itself is of now.
pub(super) fn is_heard(server: &Server) -> bool {
    server.state == State::Up
}

/// What is in a server's memory, as far as it is heard.
pub(super) fn in_memory(server: &Server) -> &[Loaded] {
    if is_heard(server) { &server.report.loaded } else { &[] }
}

/// Whether a server answers.
pub(super) fn is_online(server: &Server) -> bool {
    !matches!(server.state, State::Unknown | State::Down) && server.record.verdict() != Verdict::Down
}

fn gpus(vitals: &Vitals) -> Vec<Gpu> {
    let gpus = vitals.gpus.iter().map(|gpu| Gpu {
        name: gpu.name.clone(),
        kind: gpu.kind.clone(),
        memory_total: gpu.memory.total,
        memory_free: gpu.memory.total.saturating_sub(gpu.memory.used),
        utilization: gpu.utilization.map(share),
    });
    gpus.collect()
}

#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a share of bytes")]
fn usage(vitals: Option<&Vitals>) -> Usage {
    let part = |used: u64, total: u64| (total > 0).then(|| share((used as f64 / total as f64) as f32));
    let gpus = vitals.map(|vitals| vitals.gpus.as_slice()).unwrap_or_default();
    let busy: Vec<f32> = gpus.iter().filter_map(|gpu| gpu.utilization).collect();
    let sum = |of: fn(&olol_middleware::vitals::Space) -> u64| gpus.iter().map(|gpu| of(&gpu.memory)).sum();
    Usage {
        cpu: vitals.and_then(|vitals| vitals.cpu_usage).map(share),
        memory: vitals.and_then(|vitals| vitals.memory).and_then(|space| part(space.used, space.total)),
        gpu: (!busy.is_empty()).then(|| share(busy.iter().sum::<f32>() / busy.len() as f32)),
        gpu_memory: part(sum(|space| space.used), sum(|space| space.total)),
    }
}

fn check<'a>(server: &'a Server, kind: Option<&'static str>, config: &Config) -> Check<'a> {
    let health = &server.meters.health;
    let failures = health.failures();
    let circuit = circuit(server.circuits.server_state());
    let verdict = server.record.verdict();
    let is_well = is_online(server) && failures == 0 && circuit == "closed" && verdict == Verdict::Well;
    let status = match server.condition() {
        _ if server.state == State::Unknown && failures == 0 => None,
        Condition::Down => Some("fail"),
        _ if server.state == State::Down => Some("fail"),
        _ if is_well => Some("pass"),
        _ => Some("warn"),
    };
    let error = health.last_error().filter(|_| !is_well);
    let message = match &error {
        _ if is_well || status.is_none() => None,
        Some(error) if failures > 0 || server.state == State::Down => Some(error.reason.clone()),
        _ => Some(server.why()).filter(|why| !why.is_empty()),
    };
    let (class, error) = match verdict {
        _ if failures > 0 || server.state == State::Down => ("check", error),
        Verdict::Well => ("circuit", server.record.last_failure()),
        _ => ("calls", server.record.last_failure()),
    };
    let seen = server.record.seen();
    Check {
        // An agent speaks by itself; others are asked.
        check_id: format!("{}/{}", server.id.as_str(), if kind == Some("agent") { "watch" } else { "poll" }),
        status,
        interval_seconds: if kind == Some("agent") { 1.0 } else { config.pool.check_interval_ms.time().as_secs_f64() },
        last_check: health.last_check().map(rfc3339),
        last_pass: health.last_good().map(rfc3339),
        checks: health.checks(),
        consecutive_failures: failures,
        failures_to_be_down: config.pool.check_failures.get(),
        calls: seen.calls,
        failed_calls: seen.failures,
        last_failed_call: server
            .record
            .last_failure()
            .map(|failed| Call { at: rfc3339(failed.at), reason: failed.reason.clone() }),
        error_details: message.map(|message| Problem {
            class,
            message,
            at: error.map(|error| rfc3339(error.at)),
            down: some(&server.reason),
            circuit,
            consecutive_failures: failures,
        }),
    }
}

/// The word for the state of a circuit.
fn circuit(state: u8) -> &'static str {
    match state {
        0 => "closed",
        1 => "open",
        _ => "half-open",
    }
}
