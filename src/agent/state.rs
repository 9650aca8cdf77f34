//! What an agent tells of its Ollama: asked every second, and at once when a call may have changed it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use olol_middleware::cluster::{Loaded, Report};
use olol_middleware::{Error, ModelName, Reply, Route};
use olol_proto::v1::health_check::Status;
use olol_proto::v1::{HealthCheck, LoadedModel, Model, ServerState};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::runners;
use crate::ollama::{Ask, Ollama};

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// A look that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(3);

/// Keeps the state.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: watch::Sender<Option<ServerState>>,
    in_flight: AtomicU32,
    look: Notify,
}

impl Watch {
    /// Starts to look, until the set of tasks is dropped.
    pub(super) fn start(ollama: Ollama, tasks: &mut JoinSet<()>) -> Self {
        let shared =
            Arc::new(Shared { state: watch::Sender::new(None), in_flight: AtomicU32::new(0), look: Notify::new() });
        tasks.spawn(keep(shared.clone(), ollama));
        Self { shared }
    }

    /// The state, to be watched.
    pub(super) fn state(&self) -> watch::Receiver<Option<ServerState>> {
        self.shared.state.subscribe()
    }

    /// Sends a call on, counts it while it runs, and looks again after it if it may have changed something.
    pub(super) async fn follow(&self, ask: Ask, ollama: &Ollama) -> Result<Reply, Error> {
        let changes = self.may_change(&ask);
        let running = Running::begin(self.shared.clone(), changes);
        let spare = ask.again();
        let reply = match (ollama.send(ask).await, spare) {
            // A pooled connection had died: the proxy cannot know, and the Ollama has not been asked yet.
            (Err(Error::Server { reused: true, .. }), Some(spare)) => ollama.send(Ask { fresh: true, ..spare }).await?,
            (answer, _) => answer?,
        };
        // What was loaded for this call is there when the head is.
        if changes {
            self.shared.look.notify_one();
        }
        Ok(reply.hold(running))
    }

    fn may_change(&self, ask: &Ask) -> bool {
        match Route::find(ask.path.path()) {
            Some(Route::Pull | Route::Push | Route::Create | Route::Copy | Route::Delete) => true,
            // A model that is not in memory is about to be; one that is may be unloaded by this call.
            Some(route) if route.infers() => {
                self.shared.state.borrow().as_ref().is_none_or(|state| state.loaded.is_empty())
            }
            _ => false,
        }
    }
}

/// A call on its way.
struct Running {
    shared: Arc<Shared>,
    changes: bool,
}

impl Running {
    fn begin(shared: Arc<Shared>, changes: bool) -> Self {
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { shared, changes }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.changes {
            self.shared.look.notify_one();
        }
    }
}

async fn keep(shared: Arc<Shared>, ollama: Ollama) {
    let mut last = Report::default();
    let mut failures = 0;
    let mut generation = 0;
    let mut runners = runners::Runners::default();
    loop {
        let looked = tokio::time::timeout(LIMIT, ollama.report(&last.loaded, LIMIT / 2)).await;
        let error = match looked {
            Ok(Ok(mut report)) => {
                runners.amend(&ollama, &mut report.loaded).await;
                failures = 0;
                generation += u64::from(report != last);
                last = report;
                String::new()
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer after {} ms", LIMIT.as_millis()),
        };
        failures += u32::from(!error.is_empty());
        // One look that failed may be chance; two in a row are not.
        let online = error.is_empty() || (failures < 2 && generation > 0);
        let state = state(&last, online, &error, failures, generation, shared.in_flight.load(Ordering::Relaxed));
        let news =
            shared.state.borrow().as_ref().is_none_or(|old| old.generation != generation || old.online != online);
        shared.state.send_if_modified(|old| {
            *old = Some(state);
            news
        });
        ollama.sweep();
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = shared.look.notified() => {}
        }
    }
}

fn state(report: &Report, online: bool, error: &str, failures: u32, generation: u64, in_flight: u32) -> ServerState {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(0);
    let check = HealthCheck {
        check_id: "engine".to_owned(),
        status: (if error.is_empty() { Status::Pass } else { Status::Fail }).into(),
        interval_ms: u32::try_from(EVERY.as_millis()).unwrap_or(0),
        last_check_ms: now_ms,
        error: error.to_owned(),
        consecutive_failures: failures,
    };
    ServerState {
        online,
        in_flight,
        models: report.models.iter().map(model).collect(),
        loaded: report.loaded.iter().map(loaded).collect(),
        cpu_usage: -1.0,
        memory_usage: -1.0,
        ollama_version: report.version.clone(),
        heartbeat_ms: now_ms,
        generation,
        checks: vec![check],
        ..ServerState::default()
    }
}

fn model(model: &olol_middleware::cluster::Model) -> Model {
    Model {
        tag: ModelName::parse(&model.name).map(|name| name.tag().to_owned()).unwrap_or_default(),
        name: model.name.clone(),
        digest: model.digest.clone(),
        size_bytes: model.size,
        family: model.family.clone(),
        parameter_size: model.parameter_size.clone(),
        quantization: model.quantization.clone(),
        context_length: model.context_length,
        capabilities: model.capabilities.clone(),
        modified_at: model.modified_at.clone(),
        parameters_json: model.parameters.clone(),
        weights: model.weights.clone(),
        ..Model::default()
    }
}

fn loaded(loaded: &Loaded) -> LoadedModel {
    LoadedModel {
        name: loaded.name.clone(),
        digest: loaded.digest.clone(),
        size_bytes: loaded.size,
        size_vram_bytes: loaded.size_vram,
        expires_at: loaded.expires_at.clone(),
        context_length: loaded.context_length,
        slots: loaded.slots,
    }
}
