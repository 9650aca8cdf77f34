//! What an agent tells, as the cluster takes it: messages become reports and vitals here.

use std::sync::Arc;
use std::time::SystemTime;

use olol_middleware::Cluster;
use olol_middleware::cluster::{Kept, Loaded, Model};
use olol_middleware::time::unix_ms_now;
use olol_middleware::vitals::{Figures, Gpu, Space, Vitals};
use olol_proto::v1::{self, DescribeResponse, ServerState};
use tokio::time::Instant;

use crate::ollama::{MOST_CAPABILITIES, MOST_MODELS, MOST_SIZE};

/// Graphics processors that are believed of one machine.
const MOST_GPUS: usize = 64;

/// Bytes of text that are believed of the models of one machine.
const MOST_BYTES: usize = 64 << 20;
/// Models in memory, sessions and pulls that are believed of one machine.
const MOST_LOADED: usize = 1024;
const MOST_SESSIONS: usize = 256;
const MOST_PULLS: usize = 256;
/// Calls at one machine, and bytes of anything there, that are believed: sums of them must not overflow, whatever is told.
pub(super) const MOST_CALLS: u32 = 1_000_000;
/// Bytes of memory, and on a disk.
const MOST_ROOM: u64 = 1 << 50;
/// The longest text that is believed where a word is expected, and where a sentence is, bytes.
const WORD: usize = 512;
const SENTENCE: usize = 2048;

/// What an agent has told so far, on one stream.
#[derive(Debug, Default)]
pub(super) struct Told {
    kept: Arc<Kept>,
    /// The beginning of a list that goes on, and the bytes of text in it.
    models: Vec<Model>,
    bytes: usize,
}

impl Told {
    /// Tells the cluster what a state says; what it leaves out is as it was. An agent without its engine is no server. False
    /// if more is to come before there is anything to tell.
    pub(super) fn take(
        &mut self,
        mut state: ServerState,
        cluster: &Cluster,
        index: usize,
        since: Instant,
        failures: u32,
    ) -> bool {
        for model in std::mem::take(&mut state.models).into_iter().map(model) {
            self.bytes = self.bytes.saturating_add(length(&model));
            if self.models.len() >= MOST_MODELS || self.bytes > MOST_BYTES {
                break;
            }
            self.models.push(model);
        }
        if state.more_models {
            return false;
        }
        cluster.leaving(index, state.draining);
        match self.read(state, cluster) {
            Err(reason) => cluster.check_failed(index, reason, failures),
            // Mostly nothing has changed, neither there nor, by what calls have shown, here.
            Ok(()) => cluster.keep_since(index, &self.kept, since),
        }
        true
    }

    fn read(&mut self, state: ServerState, cluster: &Cluster) -> Result<(), String> {
        let models = std::mem::take(&mut self.models);
        self.bytes = 0;
        if !(state.same_models && state.same_loaded && state.ollama_version == self.kept.version) {
            let models = if state.same_models { self.kept.models.clone() } else { cluster.hold(models) };
            let loaded = if state.same_loaded {
                self.kept.loaded.clone()
            } else {
                state.loaded.into_iter().take(MOST_LOADED).map(loaded).collect()
            };
            self.kept = Arc::new(Kept { version: cut(state.ollama_version, WORD), models, loaded });
        }
        if state.online {
            return Ok(());
        }
        let error = state.checks.into_iter().map(|check| check.error).find(|error| !error.is_empty());
        Err(error.map_or_else(|| "the agent's engine does not answer".to_owned(), |error| cut(error, SENTENCE)))
    }
}

/// How an agent's machine is.
pub(super) fn vitals(about: Option<&DescribeResponse>, state: &ServerState) -> Vitals {
    let text = |text: fn(&DescribeResponse) -> &String| {
        about.map(text).cloned().map(|text| cut(text, WORD)).unwrap_or_default()
    };
    let memory = Space { used: room(state.memory_used_bytes), total: room(state.memory_total_bytes) };
    Vitals {
        olol_version: text(|about| &about.olol_version),
        instance: text(|about| &about.instance_id),
        os: text(|about| &about.os),
        arch: text(|about| &about.arch),
        cpu_count: about.map_or(0, |about| about.cpu_count),
        cpu_usage: share(state.cpu_usage),
        memory: (memory.total > 0).then_some(memory),
        gpus: state.gpus.iter().take(MOST_GPUS).map(gpu).collect(),
        disk_free: (state.disk_free_bytes > 0).then_some(room(state.disk_free_bytes)),
        disk_begun: room(state.disk_begun_bytes),
        in_flight: state.in_flight.min(MOST_CALLS),
        queued: state.queued.min(MOST_CALLS),
        others: state.others.min(MOST_CALLS),
        hides_models: state.hides_models,
        figures: state.metrics.as_ref().map(|metrics| Figures {
            requests_per_second: metrics.requests_per_second,
            response_time: metrics.response_time_seconds,
            error_rate: metrics.error_rate,
        }),
        active_sessions: some(state.active_sessions.iter().cloned(), MOST_SESSIONS),
        pending_pulls: {
            let pulls = state.pending_pulls.iter().filter(|(model, _)| model.len() <= WORD);
            pulls.take(MOST_PULLS).map(|(model, share)| (model.clone(), *share)).collect()
        },
        told: Some(SystemTime::now()),
        clock_ahead: clock_ahead(state.heartbeat_ms, unix_ms_now()),
    }
}

fn room(bytes: u64) -> u64 {
    bytes.min(MOST_ROOM)
}

/// So many of these texts, as far as they are words.
fn some(texts: impl Iterator<Item = String>, most: usize) -> Vec<String> {
    texts.filter(|text| text.len() <= WORD).take(most).collect()
}

/// A text that is no longer than this.
fn cut(mut text: String, longest: usize) -> String {
    if text.len() > longest {
        text.truncate((0..=longest).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
        text.shrink_to_fit();
    }
    text
}

/// Bytes of text of a model.
fn length(model: &Model) -> usize {
    let texts = [
        &model.name,
        &model.digest,
        &model.family,
        &model.parameter_size,
        &model.quantization,
        &model.architecture,
        &model.modified_at,
        &model.weights,
        &model.parameters,
    ];
    texts.into_iter().chain(&model.capabilities).fold(0, |sum: usize, text| sum.saturating_add(text.len()))
}

/// No clock shows a later time: the year 9999.
const LATEST_MS: u64 = 253_402_300_799_000;

/// Milliseconds that another clock is ahead of ours, by what it says now. 0 is of one who does not say.
pub(super) fn clock_ahead(theirs: u64, ours: u64) -> Option<i64> {
    let theirs = i64::try_from(theirs.min(LATEST_MS)).ok().filter(|theirs| *theirs > 0)?;
    Some(theirs - i64::try_from(ours.min(LATEST_MS)).ok()?)
}

/// A share from 0 to 1; negative is unknown.
fn share(value: f32) -> Option<f32> {
    (value >= 0.0).then(|| value.min(1.0))
}

fn gpu(gpu: &v1::Gpu) -> Gpu {
    let total = room(gpu.memory_total_bytes);
    let used = total.saturating_sub(gpu.memory_free_bytes);
    Gpu {
        name: cut(gpu.name.clone(), WORD),
        kind: cut(gpu.kind.clone(), WORD),
        memory: Space { used, total },
        utilization: share(gpu.utilization),
    }
}

fn model(model: v1::Model) -> Model {
    Model {
        name: model.name,
        digest: model.digest,
        size: model.size_bytes.min(MOST_SIZE),
        family: model.family,
        parameter_size: model.parameter_size,
        quantization: model.quantization,
        architecture: model.architecture,
        context_length: model.context_length,
        capabilities: some(model.capabilities.into_iter(), MOST_CAPABILITIES),
        modified_at: model.modified_at,
        weights: model.weights,
        parameters: model.parameters_json,
    }
}

fn loaded(loaded: v1::LoadedModel) -> Loaded {
    Loaded {
        name: loaded.name,
        digest: loaded.digest,
        size: loaded.size_bytes.min(MOST_SIZE),
        size_vram: loaded.size_vram_bytes.min(MOST_SIZE),
        expires_at: loaded.expires_at,
        context_length: loaded.context_length,
        slots: loaded.slots.min(MOST_CALLS),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use super::*;
    use olol_middleware::cluster::{Member, Source, State};
    use olol_middleware::{ModelName, ServerId};

    fn cluster() -> Arc<Cluster> {
        Cluster::new(vec![Member { id: ServerId::new("0"), weight: NonZeroU32::MIN, source: Source::Static }])
    }

    fn models(names: &[&str]) -> Vec<v1::Model> {
        names.iter().map(|name| v1::Model { name: (*name).to_owned(), ..v1::Model::default() }).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_state_leaves_out_is_as_it_was() {
        let (mut told, cluster) = (Told::default(), cluster());
        let mut take = |state| told.take(state, &cluster, 0, Instant::now(), 1);
        let holds = async || {
            cluster.refresh(Duration::ZERO).await;
            let server = cluster.snapshot().servers[0].clone();
            (server.report.models.iter().map(|model| model.name.clone()).collect::<Vec<_>>(), server.reason.clone())
        };
        take(ServerState { online: true, models: models(&["tiny"]), ..ServerState::default() });
        let same = || ServerState { online: true, same_models: true, same_loaded: true, ..ServerState::default() };
        take(same());
        assert_eq!(holds().await, (vec!["tiny".to_owned()], String::new()));
        take(ServerState { online: false, ..same() });
        assert_eq!(holds().await.1, "the agent's engine does not answer");
        take(ServerState { same_models: false, ..same() });
        assert_eq!(holds().await, (Vec::new(), String::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_in_parts_is_one_list() {
        let (mut told, cluster) = (Told::default(), cluster());
        let first = ServerState { online: true, models: models(&["a"]), more_models: true, ..ServerState::default() };
        assert!(!told.take(first, &cluster, 0, Instant::now(), 1));
        assert_eq!(cluster.snapshot().servers[0].state, State::Unknown);
        let last = ServerState { online: true, models: models(&["b"]), same_loaded: true, ..ServerState::default() };
        assert!(told.take(last, &cluster, 0, Instant::now(), 1));
        cluster.refresh(Duration::ZERO).await;
        let report = cluster.snapshot().servers[0].report.clone();
        assert_eq!(report.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_again_mends_what_calls_have_changed_wrongly() {
        let (mut told, cluster, server) = (Told::default(), cluster(), ServerId::new("0"));
        let first = ServerState { online: true, models: models(&["tiny"]), ..ServerState::default() };
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

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_never_comes_to_an_end_is_heard_so_far_and_no_further() {
        let (mut told, cluster) = (Told::default(), cluster());
        let long = || v1::Model { name: "a".repeat(3 << 20), ..v1::Model::default() };
        for _ in 0..60 {
            let state = ServerState { models: vec![long()], more_models: true, ..ServerState::default() };
            assert!(!told.take(state, &cluster, 0, Instant::now(), 1));
        }
        assert_eq!(told.models.len(), MOST_BYTES / (3 << 20));
        let names: Vec<String> = (0..70_000).map(|number| number.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut told = Told::default();
        told.take(
            ServerState { models: models(&names), more_models: true, ..ServerState::default() },
            &cluster,
            0,
            Instant::now(),
            1,
        );
        assert_eq!(told.models.len(), MOST_MODELS);
    }

    #[test]
    fn what_an_agent_tells_of_itself_is_no_longer_than_it_need_be() {
        let long = || "\u{e4}".repeat(1 << 20);
        let about = DescribeResponse { os: long(), ..DescribeResponse::default() };
        let state = ServerState {
            active_sessions: (0..1000).map(|number| number.to_string()).chain([long()]).collect(),
            pending_pulls: (0..1000).map(|number| (number.to_string(), f32::NAN)).collect(),
            gpus: vec![v1::Gpu { name: long(), ..v1::Gpu::default() }; 100],
            ..ServerState::default()
        };
        let vitals = vitals(Some(&about), &state);
        let counts = (vitals.active_sessions.len(), vitals.pending_pulls.len(), vitals.gpus.len());
        assert_eq!(counts, (MOST_SESSIONS, MOST_PULLS, MOST_GPUS));
        assert!(vitals.os.len() <= WORD && vitals.gpus[0].name.len() <= WORD);
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
    fn a_clock_that_differs_is_noticed_and_believed_in_nothing() {
        let day = 24 * 3600 * 1000;
        assert_eq!(clock_ahead(100 * day, 98 * day), Some(2 * 24 * 3600 * 1000));
        assert_eq!(clock_ahead(98 * day, 100 * day), Some(-2 * 24 * 3600 * 1000));
        assert_eq!((clock_ahead(0, day), clock_ahead(u64::MAX, 0)), (None, Some(253_402_300_799_000)));
        let before = SystemTime::now();
        let state = ServerState { heartbeat_ms: 1, ..ServerState::default() };
        assert!(vitals(None, &state).told.is_some_and(|told| told >= before));
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
