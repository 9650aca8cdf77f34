//! What is read rather than counted, as it is at the moment of a scrape.

use std::time::SystemTime;

use super::few;
use super::page::Gauge;
use super::{
    ADDRESSES, AFFINITY_ENTRIES, BUILD, CIRCUIT_STATE, CLIENTS, CPU, FILES, KEYS, KEYS_READ, MEMORY, MODEL_LOADED,
    MODEL_SERVERS, MODEL_VRAM, MOST_FILES, QUEUE_DEPTH, RATE_LIMIT_ENTRIES, RELOAD_OK, RELOADED_AT, RETRY_BUDGET,
    SATURATION, SERVER_CPU, SERVER_DISK_FREE, SERVER_ERRORS, SERVER_GPU, SERVER_GPU_MEMORY, SERVER_GPU_MEMORY_TOTAL,
    SERVER_IN_FLIGHT, SERVER_LOADED, SERVER_MEMORY, SERVER_MEMORY_TOTAL, SERVER_MODELS, SERVER_OTHERS, SERVER_STATE,
    SERVER_UP, SESSIONS, SESSIONS_BYTES, SLOTS, SLOTS_TAKEN, STARTED, STATE_UP, THREADS, WISHED, WISHED_HELD,
};
use crate::cluster::{Condition, Server, Snapshot};
use crate::names::ModelName;
use crate::shared::Shared;

/// What is read rather than counted, as a part of the page that is scraped.
pub fn observe(shared: &Shared) -> String {
    let snapshot = shared.cluster.snapshot();
    shared.instruments.begin_at_zero();
    let servers = of_servers(&snapshot).into_iter().chain(of_machines(&snapshot));
    let gauges = of_layers(shared).into_iter().chain(servers).chain(of_models(&snapshot));
    written(gauges)
}

/// What is known of the configuration: whether it was good when it was last read, and when the one in use was read.
pub fn observe_config(is_good: bool, read_at: SystemTime) -> String {
    let since = read_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    written([
        Gauge::of(RELOAD_OK, "1 if the configuration was good when it was last read, 0 if not", is(is_good)),
        Gauge::of(
            RELOADED_AT,
            "When the configuration that is in use was read, seconds since 1970",
            since.as_secs_f64(),
        ),
    ])
}

/// What is kept of sessions: how many, and the bytes of their histories.
#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 bytes")]
pub fn observe_sessions(sessions: u64, bytes: u64) -> String {
    written([
        Gauge::of(SESSIONS, "Sessions whose history is kept", sessions as f64),
        Gauge::of(SESSIONS_BYTES, "Bytes of the histories of all sessions", bytes as f64),
    ])
}

/// Whether the store that proxies share answers; nothing where there is none.
pub fn observe_state(is_up: Option<bool>) -> String {
    let gauge = |is_up| Gauge::of(STATE_UP, "Whether the store that proxies share answers", f64::from(u8::from(is_up)));
    is_up.map_or_else(String::new, |is_up| written([gauge(is_up)]))
}

/// A model that is wanted on some servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The model.
    pub model: ModelName,
    /// How many servers should have it.
    pub wanted: usize,
    /// How many do.
    pub held: usize,
}

/// Which models are wanted, and how far they are where they should be.
#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 servers")]
pub fn observe_wishes(wishes: &[Wish]) -> String {
    let mut wanted = Gauge::new(WISHED, "Servers that should have a model, by [[models]] or a pin", &["model"]);
    let mut held = Gauge::new(WISHED_HELD, "Servers that have it, of those that should", &["model"]);
    for wish in wishes {
        let label = few::MODELS.of(&wish.model.as_str().into());
        wanted.add([&*label], wish.wanted as f64);
        held.add([&*label], wish.held as f64);
    }
    written([wanted, held])
}

/// What this program is.
pub fn observe_build(version: &str, revision: &str) -> String {
    let mut build = Gauge::new(BUILD, "1, with what this program is as labels", &["version", "revision"]);
    build.add([version, revision], 1.0);
    written([build])
}

/// What the system says of this process; `None`: it does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Process {
    /// Seconds of processors that it has used.
    pub cpu_seconds: Option<f64>,
    /// Bytes of memory that it has.
    pub memory: Option<u64>,
    /// Bytes that it has addresses for.
    pub addresses: Option<u64>,
    /// Files and connections that are open.
    pub files: Option<u64>,
    /// The most that may be.
    pub most_files: Option<u64>,
    /// Threads.
    pub threads: Option<u64>,
    /// When it started, seconds since 1970.
    pub started: Option<u64>,
}

/// What the system says of this process, under the names that every program uses.
#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 bytes")]
pub fn observe_process(process: &Process) -> String {
    let Process { cpu_seconds, memory, addresses, files, most_files, threads, started } = *process;
    let cpu = cpu_seconds.map(|value| Gauge::of(CPU, "Seconds of processors that it has used", value).grows());
    let others = [
        (MEMORY, "Bytes of memory that it has", memory),
        (ADDRESSES, "Bytes that it has addresses for", addresses),
        (FILES, "Files and connections that are open", files),
        (MOST_FILES, "The most files and connections that may be open", most_files),
        (THREADS, "Its threads", threads),
        (STARTED, "When it started, seconds since 1970", started),
    ];
    let others = others.into_iter().filter_map(|(name, help, value)| Some(Gauge::of(name, help, value? as f64)));
    written(cpu.into_iter().chain(others))
}

pub(super) fn written(gauges: impl IntoIterator<Item = Gauge>) -> String {
    let mut page = String::new();
    gauges.into_iter().for_each(|gauge| gauge.write(&mut page));
    page
}

fn is(fact: bool) -> f64 {
    f64::from(u8::from(fact))
}

#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 keys, accounts or conversations")]
fn of_layers(shared: &Shared) -> Vec<Gauge> {
    let mut accounts =
        Gauge::new(RATE_LIMIT_ENTRIES, "Accounts that limits are reckoned with, by whose they are", &["scope"]);
    for (scope, count) in shared.limits.accounts() {
        accounts.add([scope], count as f64);
    }
    let keys = &shared.keys;
    let mut gauges = vec![
        Gauge::of(KEYS, "Keys that are known", keys.count() as f64),
        Gauge::of(KEYS_READ, "0 if the file of keys has changed and could not be read, else 1", is(keys.are_current())),
        accounts,
        Gauge::of(CLIENTS, "Clients that are remembered", shared.clients.len() as f64),
        Gauge::of(AFFINITY_ENTRIES, "Links of conversations that are remembered", shared.affinity.len() as f64),
    ];
    gauges.extend(shared.budget.tries().map(|left| Gauge::of(RETRY_BUDGET, "Retries that may be made at once", left)));
    gauges
}

/// Whether a server answers, and is to be asked.
fn takes_calls(server: &Server) -> bool {
    matches!(server.condition(), Condition::Up | Condition::Degraded)
}

#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 models")]
fn of_servers(snapshot: &Snapshot) -> Vec<Gauge> {
    const SERVER: &[&str] = &["server"];
    let mut in_flight = Gauge::new(SERVER_IN_FLIGHT, "Calls that a server is answering now", SERVER);
    let mut up = Gauge::new(SERVER_UP, "1 if the server takes calls, 0 if not", SERVER);
    let mut state =
        Gauge::new(SERVER_STATE, "How a server is: 0 unknown, 1 up, 2 degraded, 3 draining, 4 down", SERVER);
    let mut errors =
        Gauge::new(SERVER_ERRORS, "Share of the calls of the window of [judge] that a server failed", SERVER);
    let mut models = Gauge::new(SERVER_MODELS, "Models on the server's disk", SERVER);
    let mut loaded = Gauge::new(SERVER_LOADED, "Models in the server's memory", SERVER);
    let mut circuit = Gauge::new(
        CIRCUIT_STATE,
        "Circuit of a server: 0 closed, 1 open (left alone), 2 half-open (one call finds out)",
        SERVER,
    );
    for server in &snapshot.servers {
        let label = [server.id.as_str()];
        in_flight.add(label, f64::from(server.load.in_flight()));
        up.add(label, is(takes_calls(server)));
        state.add(label, f64::from(server.condition() as u8));
        server.record.seen().error_rate().iter().for_each(|share| errors.add(label, *share));
        models.add(label, server.report.models.len() as f64);
        loaded.add(label, server.report.loaded.len() as f64);
        circuit.add(label, f64::from(server.circuits.server_state()));
    }
    vec![in_flight, up, state, errors, models, loaded, circuit]
}

/// What agents tell of the machines of their servers.
#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 bytes")]
fn of_machines(snapshot: &Snapshot) -> Vec<Gauge> {
    const SERVER: &[&str] = &["server"];
    const GPU: &[&str] = &["server", "gpu"];
    let mut cpu = Gauge::new(SERVER_CPU, "Share of a server's processors in use, 0 to 1", SERVER);
    let mut used = Gauge::new(SERVER_MEMORY, "Bytes of a server's main memory in use", SERVER);
    let mut total = Gauge::new(SERVER_MEMORY_TOTAL, "Bytes of a server's main memory", SERVER);
    let mut disk = Gauge::new(SERVER_DISK_FREE, "Bytes free on the disk that holds a server's models", SERVER);
    let mut others = Gauge::new(SERVER_OTHERS, "Calls at a server that are not of this proxy", SERVER);
    let mut busy = Gauge::new(SERVER_GPU, "Share of time that a graphics processor is busy, 0 to 1", GPU);
    let mut gpu_used = Gauge::new(SERVER_GPU_MEMORY, "Bytes of a graphics processor's memory in use", GPU);
    let mut gpu_total = Gauge::new(SERVER_GPU_MEMORY_TOTAL, "Bytes of a graphics processor's memory", GPU);
    for server in &snapshot.servers {
        let Some(vitals) = server.vitals.load_full() else { continue };
        let label = [server.id.as_str()];
        others.add(label, f64::from(server.load.others()));
        vitals.cpu_usage.iter().for_each(|share| cpu.add(label, f64::from(*share)));
        vitals.disk_free.iter().for_each(|bytes| disk.add(label, *bytes as f64));
        if let Some(memory) = &vitals.memory {
            used.add(label, memory.used as f64);
            total.add(label, memory.total as f64);
        }
        for (number, gpu) in vitals.gpus.iter().enumerate() {
            let number = number.to_string();
            let labels = [server.id.as_str(), &number];
            gpu.utilization.iter().for_each(|share| busy.add(labels, f64::from(*share)));
            gpu_used.add(labels, gpu.memory.used as f64);
            gpu_total.add(labels, gpu.memory.total as f64);
        }
    }
    vec![cpu, used, total, disk, others, busy, gpu_used, gpu_total]
}

#[expect(clippy::cast_precision_loss, reason = "counts and bytes, and a gauge")]
fn of_models(snapshot: &Snapshot) -> Vec<Gauge> {
    const BOTH: &[&str] = &["server", "model"];
    let mut loaded = Gauge::new(MODEL_LOADED, "1 for each model in a server's memory", BOTH);
    let mut vram = Gauge::new(MODEL_VRAM, "Bytes of a server's graphics memory that a model takes", BOTH);
    for server in &snapshot.servers {
        for model in &server.report.loaded {
            let Some(known) = ModelName::parse(&model.name).and_then(|name| snapshot.known(&name)) else { continue };
            let labels = [server.id.as_str(), known.meters.label()];
            loaded.add(labels, 1.0);
            vram.add(labels, model.size_vram as f64);
        }
    }
    let mut depth =
        Gauge::new(QUEUE_DEPTH, "Calls that wait for a slot of a model, by priority", &["model", "priority"]);
    let mut slots = Gauge::new(SLOTS, "Calls that a model on a server may be given side by side", BOTH);
    let mut taken = Gauge::new(SLOTS_TAKEN, "Calls that a model on a server was given", BOTH);
    let mut holders = Gauge::new(MODEL_SERVERS, "Servers that have a model, and take calls", &["model"]);
    let mut busiest = vec![None; snapshot.servers.places()];
    for known in snapshot.models.values() {
        let is_up = |index: &usize| snapshot.servers.get(*index).is_some_and(|server| takes_calls(server));
        holders.add([known.meters.label()], known.installed.iter().filter(is_up).count() as f64);
    }
    for known in snapshot.with_runners() {
        let runners = known.runners.all();
        for (priority, count) in known.runners.line().by_priority() {
            depth.add([known.meters.label(), priority.as_str()], count as f64);
        }
        for runner in runners.iter() {
            let Some(server) = snapshot.servers.get(runner.server) else { continue };
            let labels = [server.id.as_str(), known.meters.label()];
            let (has, gives) = (f64::from(runner.slots()), f64::from(runner.in_flight()));
            slots.add(labels, has);
            taken.add(labels, gives);
            let most: &mut Option<f64> = &mut busiest[runner.server];
            *most = Some(most.unwrap_or_default().max(gives / has.max(1.0)));
        }
    }
    let mut saturation = Gauge::new(
        SATURATION,
        "Calls for each slot of the busiest model of a server; above 1 they wait there",
        &["server"],
    );
    for server in &snapshot.servers {
        saturation.add([server.id.as_str()], busiest[server.index].unwrap_or_default());
    }
    vec![holders, loaded, vram, depth, slots, taken, saturation]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Model, Report};
    use crate::testing;
    use crate::vitals::{Gpu, Space, Vitals};

    #[tokio::test(start_paused = true)]
    async fn a_runner_with_two_names_counts_once_and_goes_with_its_models() {
        let cluster = testing::cluster(&[&[]]).await;
        let model = |name: &str| Model { name: name.into(), digest: "same".into(), ..Model::default() };
        cluster.report(0, Report { models: vec![model("b"), model("a")], ..Report::default() });
        cluster.catch_up().await;
        let snapshot = cluster.snapshot();
        snapshot.known(&ModelName::parse("b").unwrap()).unwrap().runners.at(&snapshot.servers[0]).reported(3);
        let lines = || {
            let page = written(of_models(&cluster.snapshot()));
            page.lines().filter(|line| line.starts_with("olol_server_slots{")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(lines(), ["olol_server_slots{server=\"0\",model=\"a:latest\"} 3"]);
        cluster.report(0, Report::default());
        cluster.catch_up().await;
        assert!(lines().is_empty());
    }
    #[tokio::test(start_paused = true)]
    async fn a_machine_tells_what_its_agent_knows() {
        let cluster = testing::cluster(&[&[], &[]]).await;
        let gpu = Gpu { memory: Space { used: 6, total: 10 }, ..Gpu::default() };
        let vitals = Vitals { cpu_usage: Some(0.5), gpus: vec![gpu], ..Vitals::default() };
        cluster.tell_vitals(1, vitals);
        let page = written(of_machines(&cluster.snapshot()));
        let lines: Vec<_> = page.lines().filter(|line| line.starts_with("olol_")).collect();
        let wanted = [
            "olol_server_cpu_ratio{server=\"1\"} 0.5",
            "olol_server_others_in_flight{server=\"1\"} 0",
            "olol_server_gpu_memory_used_bytes{server=\"1\",gpu=\"0\"} 6",
            "olol_server_gpu_memory_total_bytes{server=\"1\",gpu=\"0\"} 10",
        ];
        assert_eq!(lines, wanted);
    }
}
