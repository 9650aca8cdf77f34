//! What an Ollama says of itself: version, models on its disk, models in its memory.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use olol_middleware::cluster::{Kept, Loaded, Model};
use olol_middleware::{BoxError, Cluster, ModelName};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::few::Few;
use super::{Ask, Ollama};

/// The most of a refusal that stands in a reason, characters.
const SHORT: usize = 120;
/// Models that are believed of one server, and what one of them is believed to be able to do.
pub(crate) const MOST_MODELS: usize = 65_536;
pub(crate) const MOST_CAPABILITIES: usize = 64;

/// Bytes that anything of a server is believed to take: sums of such must not overflow, whatever it says.
pub(crate) const MOST_SIZE: u64 = 1 << 44;

/// The longest answer to one question about its state, bytes.
const LONGEST: usize = 64 << 20;

/// A version is asked for again after this time even from who has not gone: something may stand before it.
const BELIEVED: Duration = Duration::from_secs(30);

/// Why there is no state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// No answer.
    #[error(transparent)]
    Silent(#[from] olol_middleware::Error),
    /// An answer that is not Ollama's.
    #[error("{path} is not answered as Ollama answers it: {source}")]
    Foreign {
        /// The question.
        path: &'static str,
        /// What is wrong with the answer.
        source: BoxError,
    },
}

/// What an Ollama has told of itself so far. What it says again is not read again.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    kept: Arc<Kept>,
    /// Fingerprints of the lists that were read.
    disk: Option<u64>,
    memory: Option<u64>,
    /// With which connection, and when, it told its version.
    version: Option<(u64, Instant)>,
}

impl Heard {
    /// Changes what is kept, if that is a change.
    fn changes(&mut self, change: impl FnOnce(&mut Kept)) {
        let mut kept = Kept::clone(&self.kept);
        change(&mut kept);
        if kept != *self.kept {
            self.kept = Arc::new(kept);
        }
    }

    /// A process does not change its version, nor does a connection its process.
    fn knows_version(&self, ollama: &Ollama) -> bool {
        self.version.is_some_and(|(made, at)| made == ollama.0.links.made() && at.elapsed() < BELIEVED)
    }
}

/// What stands for an answer.
fn print(answer: &[u8]) -> u64 {
    rapidhash::v3::rapidhash_v3(answer)
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
struct List<T> {
    models: Option<Few<T, MOST_MODELS>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    name: String,
    digest: String,
    size: u64,
    size_vram: u64,
    modified_at: String,
    expires_at: String,
    context_length: u32,
    capabilities: Option<Few<String, MOST_CAPABILITIES>>,
    details: Details,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    family: String,
    parameter_size: String,
    quantization_level: String,
    context_length: u32,
}

impl Ollama {
    /// Asks for everything, one thing after the other over one connection. While a model loads, Ollama does not say which
    /// models are in memory: after `patience` those of the last report stand.
    pub(crate) async fn hear(
        &self,
        heard: &mut Heard,
        cluster: &Cluster,
        last: &[Loaded],
        patience: Duration,
    ) -> Result<Arc<Kept>, StateError> {
        let disk = self.told(ON_DISK).await?;
        if heard.disk != Some(print(&disk)) {
            heard.disk = None;
            let mut models = on_disk(&disk)?;
            let is_whole = self.look_into(&mut models, patience / 2).await;
            let models = cluster.hold(models);
            heard.changes(|kept| kept.models = models);
            heard.disk = is_whole.then(|| print(&disk));
        }
        drop(disk);
        if !heard.knows_version(self) {
            let version = self.version().await?;
            heard.version = Some((self.0.links.made(), Instant::now()));
            heard.changes(|kept| kept.version = version);
        }
        if let Ok(memory) = tokio::time::timeout(patience, self.told(IN_MEMORY)).await {
            let memory = memory?;
            if heard.memory != Some(print(&memory)) {
                let loaded = in_memory(&memory)?;
                heard.memory = Some(print(&memory));
                heard.changes(|kept| kept.loaded = loaded);
            }
        } else {
            heard.memory = None;
            heard.changes(|kept| kept.loaded = last.to_vec());
        }
        Ok(heard.kept.clone())
    }

    /// Its version alone.
    pub async fn version(&self) -> Result<String, StateError> {
        Ok(parse::<Version>("/api/version", &self.told("/api/version").await?)?.version)
    }

    /// What it answers to one question about its state.
    pub(crate) async fn told(&self, path: &'static str) -> Result<Bytes, StateError> {
        // A pooled connection may just have died; the second try makes a new one.
        let reply = match self.send(Ask::get(path)).await {
            Err(error) if error.is_retryable() => self.send(Ask { fresh: true, ..Ask::get(path) }).await?,
            other => other?,
        };
        if !reply.status.is_success() {
            let status = reply.status.as_u16();
            let body = reply.body.collect(LONGEST).await.unwrap_or_default();
            let source = format!("status {status}{}", in_short(&body)).into();
            return Err(StateError::Foreign { path, source });
        }
        Ok(reply.body.collect(LONGEST).await?)
    }
}

/// The first words of a refusal, as they may stand in a reason.
fn in_short(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(4 * SHORT)]);
    let text: String = text.trim().chars().take_while(|c| !c.is_control()).take(SHORT).collect();
    if text.is_empty() || text.starts_with(['<', '{']) { String::new() } else { format!(": {text}") }
}

/// The question for the models on the disk.
pub(crate) const ON_DISK: &str = "/api/tags";
/// The question for those in memory.
pub(crate) const IN_MEMORY: &str = "/api/ps";

/// The models that an answer to [`ON_DISK`] names, but for copies that are not finished.
pub(crate) fn on_disk(answer: &[u8]) -> Result<Vec<Model>, StateError> {
    let mut models = every_on_disk(answer)?;
    models.retain(|model| !ModelName::is_unfinished(&model.name));
    Ok(models)
}

/// All the models that an answer to [`ON_DISK`] names.
pub(crate) fn every_on_disk(answer: &[u8]) -> Result<Vec<Model>, StateError> {
    let list: List<Entry> = parse(ON_DISK, answer)?;
    Ok(list.models.map(|models| models.0).unwrap_or_default().into_iter().map(Entry::into_model).collect())
}

/// The models that an answer to [`IN_MEMORY`] names.
pub(crate) fn in_memory(answer: &[u8]) -> Result<Vec<Loaded>, StateError> {
    let list: List<Entry> = parse(IN_MEMORY, answer)?;
    let mut loaded: Vec<Loaded> =
        list.models.map(|models| models.0).unwrap_or_default().into_iter().map(Entry::into_loaded).collect();
    loaded.retain(|loaded| !ModelName::is_unfinished(&loaded.name));
    Ok(loaded)
}

fn parse<T: DeserializeOwned>(path: &'static str, answer: &[u8]) -> Result<T, StateError> {
    serde_json::from_slice(answer).map_err(|error| StateError::Foreign { path, source: error.into() })
}

impl Entry {
    fn into_model(self) -> Model {
        Model {
            name: self.name,
            digest: self.digest,
            size: self.size.min(MOST_SIZE),
            family: self.details.family,
            parameter_size: self.details.parameter_size,
            quantization: self.details.quantization_level,
            context_length: self.details.context_length,
            capabilities: self.capabilities.map(|some| some.0).unwrap_or_default(),
            modified_at: self.modified_at,
            ..Model::default()
        }
    }

    fn into_loaded(self) -> Loaded {
        let name = ModelName::parse(&self.name).map_or(self.name, |name| name.to_string());
        Loaded {
            name,
            digest: self.digest,
            size: self.size.min(MOST_SIZE),
            size_vram: self.size_vram.min(MOST_SIZE),
            expires_at: self.expires_at,
            context_length: self.context_length,
            slots: 0,
        }
    }
}
