//! What an agent tells, as the cluster takes it: messages become reports and vitals here.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use olol_middleware::Cluster;
use olol_middleware::cluster::{Loaded, Model, Report, State};
use olol_middleware::vitals::{Figures, Gpu, Space, Vitals};
use olol_proto::v1::{self, DescribeResponse, ServerState};
use tokio::time::Instant;

/// Graphics processors that are believed of one machine.
const MOST_GPUS: usize = 64;

/// What an agent has told so far, on one stream.
#[derive(Debug, Default)]
pub(super) struct Told {
    report: Report,
    /// The report as the cluster has it, once it has it.
    known: Option<Arc<Report>>,
}

impl Told {
    /// Tells the cluster what a state says; what it leaves out is as it was. An agent without its engine is no server.
    pub(super) fn take(&mut self, state: ServerState, cluster: &Cluster, index: usize, since: Instant, failures: u32) {
        let same = state.same_models && state.same_loaded && state.ollama_version == self.report.version;
        cluster.leaving(index, state.draining);
        if let Err(reason) = self.read(state) {
            cluster.check_failed(index, reason, failures);
            return;
        }
        let snapshot = cluster.snapshot();
        let Some(server) = snapshot.servers.get(index) else { return };
        // Mostly nothing has changed, neither there nor, by what calls have shown, here.
        let is_known = self.known.as_ref().is_some_and(|known| Arc::ptr_eq(known, &server.report));
        if same && is_known && server.state == State::Up {
            cluster.still_since(index, since);
            return;
        }
        self.known = (*server.report == self.report).then(|| server.report.clone());
        cluster.report_since(index, self.report.clone(), since);
    }

    fn read(&mut self, state: ServerState) -> Result<(), String> {
        if !state.same_models {
            self.report.models = state.models.into_iter().map(model).collect();
        }
        if !state.same_loaded {
            self.report.loaded = state.loaded.into_iter().map(loaded).collect();
        }
        self.report.version = state.ollama_version;
        if state.online {
            return Ok(());
        }
        let error = state.checks.into_iter().map(|check| check.error).find(|error| !error.is_empty());
        Err(error.unwrap_or_else(|| "the agent's engine does not answer".to_owned()))
    }
}

/// How an agent's machine is.
pub(super) fn vitals(about: Option<&DescribeResponse>, state: &ServerState) -> Vitals {
    let text = |text: fn(&DescribeResponse) -> &String| about.map(text).cloned().unwrap_or_default();
    let memory = Space { used: state.memory_used_bytes, total: state.memory_total_bytes };
    Vitals {
        olol_version: text(|about| &about.olol_version),
        instance: text(|about| &about.instance_id),
        os: text(|about| &about.os),
        arch: text(|about| &about.arch),
        cpu_count: about.map_or(0, |about| about.cpu_count),
        cpu_usage: share(state.cpu_usage),
        memory: (memory.total > 0).then_some(memory),
        gpus: state.gpus.iter().take(MOST_GPUS).map(gpu).collect(),
        disk_free: (state.disk_free_bytes > 0).then_some(state.disk_free_bytes),
        in_flight: state.in_flight,
        queued: state.queued,
        others: state.others,
        figures: state.metrics.as_ref().map(|metrics| Figures {
            requests_per_second: metrics.requests_per_second,
            response_time: metrics.response_time_seconds,
            error_rate: metrics.error_rate,
        }),
        active_sessions: state.active_sessions.clone(),
        pending_pulls: state.pending_pulls.iter().map(|(model, share)| (model.clone(), *share)).collect(),
        told: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(state.heartbeat_ms.min(LATEST_MS))),
    }
}

/// No clock shows a later time: the year 9999.
const LATEST_MS: u64 = 253_402_300_799_000;

/// A share from 0 to 1; negative is unknown.
fn share(value: f32) -> Option<f32> {
    (value >= 0.0).then(|| value.min(1.0))
}

fn gpu(gpu: &v1::Gpu) -> Gpu {
    let used = gpu.memory_total_bytes.saturating_sub(gpu.memory_free_bytes);
    Gpu {
        name: gpu.name.clone(),
        kind: gpu.kind.clone(),
        memory: Space { used, total: gpu.memory_total_bytes },
        utilization: share(gpu.utilization),
    }
}

fn model(model: v1::Model) -> Model {
    Model {
        name: model.name,
        digest: model.digest,
        size: model.size_bytes,
        family: model.family,
        parameter_size: model.parameter_size,
        quantization: model.quantization,
        architecture: model.architecture,
        context_length: model.context_length,
        capabilities: model.capabilities,
        modified_at: model.modified_at,
        weights: model.weights,
        parameters: model.parameters_json,
    }
}

fn loaded(loaded: v1::LoadedModel) -> Loaded {
    Loaded {
        name: loaded.name,
        digest: loaded.digest,
        size: loaded.size_bytes,
        size_vram: loaded.size_vram_bytes,
        expires_at: loaded.expires_at,
        context_length: loaded.context_length,
        slots: loaded.slots,
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use olol_middleware::cluster::{Member, Source};
    use olol_middleware::{ModelName, ServerId};

    #[test]
    fn what_a_state_leaves_out_is_as_it_was() {
        let mut told = Told::default();
        let models = vec![v1::Model { name: "tiny".into(), ..v1::Model::default() }];
        let first = ServerState { online: true, models, ..ServerState::default() };
        told.read(first).unwrap();
        let same = || ServerState { online: true, same_models: true, same_loaded: true, ..ServerState::default() };
        told.read(same()).unwrap();
        assert_eq!(told.report.models[0].name, "tiny");
        let gone = told.read(ServerState { online: false, ..same() });
        assert_eq!(gone.unwrap_err(), "the agent's engine does not answer");
        told.read(ServerState { same_models: false, ..same() }).unwrap();
        assert!(told.report.models.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_again_mends_what_calls_have_changed_wrongly() {
        let server = ServerId::new("0");
        let cluster =
            Cluster::new(vec![Member { id: server.clone(), weight: NonZeroU32::MIN, source: Source::Static }]);
        let mut told = Told::default();
        let models = vec![v1::Model { name: "tiny".into(), ..v1::Model::default() }];
        let first = ServerState { online: true, models, ..ServerState::default() };
        let same = || ServerState { online: true, same_models: true, same_loaded: true, ..ServerState::default() };
        let holds = || cluster.snapshot().servers[0].report.models.len();
        told.take(first, &cluster, 0, Instant::now(), 2);
        tokio::time::sleep(Duration::from_secs(1)).await;
        told.take(same(), &cluster, 0, Instant::now(), 2);
        let before = cluster.snapshot();
        told.take(same(), &cluster, 0, Instant::now(), 2);
        assert!(Arc::ptr_eq(&before, &cluster.snapshot()) && holds() == 1);
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.forget(&server, &ModelName::parse("tiny").unwrap());
        assert_eq!(holds(), 0);
        tokio::time::sleep(Duration::from_secs(1)).await;
        told.take(same(), &cluster, 0, Instant::now(), 2);
        assert_eq!(holds(), 1);
    }

    #[test]
    fn what_an_agent_does_not_know_is_unknown() {
        let state = ServerState { cpu_usage: -1.0, heartbeat_ms: u64::MAX, ..ServerState::default() };
        let vitals = vitals(None, &state);
        assert_eq!((vitals.cpu_usage, vitals.memory, vitals.disk_free, vitals.figures), (None, None, None, None));
        let nonsense = ServerState { cpu_usage: f32::NAN, ..ServerState::default() };
        assert_eq!(super::vitals(None, &nonsense).cpu_usage, None);
    }

    #[test]
    fn what_an_agent_knows_is_told() {
        let about = DescribeResponse { os: "linux".into(), cpu_count: 8, ..DescribeResponse::default() };
        let card = v1::Gpu { memory_total_bytes: 10, memory_free_bytes: 4, utilization: 0.5, ..v1::Gpu::default() };
        let state = ServerState {
            cpu_usage: 0.25,
            memory_used_bytes: 3,
            memory_total_bytes: 4,
            gpus: vec![card],
            disk_free_bytes: 5,
            pending_pulls: [("big".to_owned(), 0.5)].into(),
            ..ServerState::default()
        };
        let vitals = vitals(Some(&about), &state);
        assert_eq!((vitals.os.as_str(), vitals.cpu_count, vitals.cpu_usage), ("linux", 8, Some(0.25)));
        assert_eq!((vitals.memory, vitals.disk_free), (Some(Space { used: 3, total: 4 }), Some(5)));
        assert_eq!((vitals.gpus[0].memory, vitals.gpus[0].utilization), (Space { used: 6, total: 10 }, Some(0.5)));
        assert_eq!(vitals.pending_pulls, [("big".to_owned(), 0.5)]);
    }
}
