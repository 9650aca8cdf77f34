//! What a fake Ollama has: models on its disk, models in its memory, blobs.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The models and blobs of one server.
#[derive(Debug)]
pub struct Store {
    /// Version that it reports.
    pub version: String,
    models: Vec<Model>,
    /// Those of them that are only listed.
    gone: Vec<String>,
    loaded: Vec<String>,
    blobs: Vec<String>,
}

#[derive(Clone, Debug)]
struct Model {
    name: String,
    digest: String,
    /// Digest of its weights; models may have them in common.
    weights: String,
    size: u64,
    modified_at: String,
    family: String,
    parameter_size: String,
    quantization: String,
}

impl Default for Store {
    fn default() -> Self {
        let version = "0.33.0".to_owned();
        Self { version, models: Vec::new(), gone: Vec::new(), loaded: Vec::new(), blobs: Vec::new() }
    }
}

impl Store {
    /// Puts a model on the disk; each one later than the one before, if no time is given.
    pub fn add(&mut self, name: &str, modified_at: Option<&str>) {
        let name = full(name);
        self.models.retain(|model| model.name != name);
        let later = format!("2026-01-01T00:00:{:02}Z", self.models.len());
        let modified_at = modified_at.map_or(later, str::to_owned);
        let digest = hex(&Sha256::digest(&name));
        // Models of different weights differ in size.
        let size = 1000 + ((self.models.len() as u64) << 21);
        self.models.push(Model {
            weights: digest.clone(),
            digest,
            quantization: quantization(&name),
            family: "llama".to_owned(),
            parameter_size: "1.5M".to_owned(),
            name,
            size,
            modified_at,
        });
    }

    /// Says something else of a model than its name does.
    pub fn describe(&mut self, name: &str, family: &str, parameter_size: &str, quantization: &str) {
        for model in self.models.iter_mut().filter(|model| model.name == full(name)) {
            family.clone_into(&mut model.family);
            parameter_size.clone_into(&mut model.parameter_size);
            quantization.clone_into(&mut model.quantization);
        }
    }

    /// Puts a model on the disk that has the weights of another.
    pub fn add_like(&mut self, name: &str, other: &str) {
        self.add(name, None);
        let other = self.models.iter().find(|model| model.name == full(other)).expect("the other is there").clone();
        for model in self.models.iter_mut().filter(|model| model.name == full(name)) {
            model.weights.clone_from(&other.weights);
            model.size = other.size;
        }
    }

    /// Puts another model on the disk under the name of one.
    pub fn exchange(&mut self, name: &str) {
        self.add(name, None);
        let name = full(name);
        for model in self.models.iter_mut().filter(|model| model.name == name) {
            model.digest = hex(&Sha256::digest(format!("another {name}")));
            model.weights.clone_from(&model.digest);
        }
    }

    /// Removes a model; false if it is not there. One in memory stays there until it expires, as in Ollama.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.models.len();
        self.models.retain(|model| model.name != full(name));
        self.models.len() != before
    }

    /// Goes on listing a model, and has it no more.
    pub fn only_lists(&mut self, name: &str) {
        self.unload(name);
        self.gone.push(full(name));
    }

    /// Whether a model is on the disk.
    pub fn has(&self, name: &str) -> bool {
        let name = full(name);
        self.models.iter().any(|model| model.name == name) && !self.gone.contains(&name)
    }

    /// The names of the models on the disk.
    pub fn names(&self) -> Vec<String> {
        self.models.iter().map(|model| model.name.clone()).collect()
    }

    /// Takes a model into memory.
    pub fn load(&mut self, name: &str) {
        self.unload(name);
        self.loaded.push(full(name));
    }

    /// Takes a model out of memory.
    pub fn unload(&mut self, name: &str) {
        self.loaded.retain(|loaded| *loaded != full(name));
    }

    /// The names of the models in memory.
    pub fn loaded(&self) -> Vec<String> {
        self.loaded.clone()
    }

    /// Keeps a blob; false if it was there.
    pub fn keep_blob(&mut self, digest: &str) -> bool {
        let is_new = !self.has_blob(digest);
        if is_new {
            self.blobs.push(digest.to_owned());
        }
        is_new
    }

    /// Whether a blob is there.
    pub fn has_blob(&self, digest: &str) -> bool {
        self.blobs.iter().any(|blob| blob == digest)
    }

    /// `/api/tags`: newest first.
    pub fn tags(&self) -> Value {
        let mut models = self.models.clone();
        models.sort_by(|a, b| b.modified_at.cmp(&a.modified_at));
        json!({"models": models.iter().map(Model::listed).collect::<Vec<_>>()})
    }

    /// `/api/ps`: latest expiry first.
    pub fn ps(&self) -> Value {
        let entry = |(at, name): (usize, &String)| {
            json!({"name": name, "model": name, "size": 1000, "digest": hex(&Sha256::digest(name)), "details": Model::usual(),
                "expires_at": format!("2026-01-01T01:00:{at:02}Z"), "size_vram": 0, "context_length": 2048})
        };
        json!({"models": self.loaded.iter().enumerate().rev().map(entry).collect::<Vec<_>>()})
    }

    /// `/v1/models`.
    pub fn v1_models(&self) -> Value {
        let mut models = self.models.clone();
        models.sort_by(|a, b| b.modified_at.cmp(&a.modified_at));
        let entry = |model: &Model| json!({"id": model.name, "object": "model", "created": model.seconds(), "owned_by": "library"});
        let data: Vec<Value> = models.iter().map(entry).collect();
        json!({"object": "list", "data": if data.is_empty() { Value::Null } else { json!(data) }})
    }

    /// `/api/show`, with these parameters of the model.
    pub fn show(&self, name: &str, parameters: &str) -> Option<Value> {
        let model = self.models.iter().find(|model| model.name == full(name))?;
        Some(
            json!({"license": "MIT", "modelfile": format!("FROM /models/blobs/sha256-{}", model.weights), "parameters": parameters, "template": "{{ .Prompt }}",
            "details": model.details(), "model_info": {"general.architecture": "llama"}, "capabilities": ["completion"],
            "modified_at": model.modified_at}),
        )
    }
}

impl Model {
    fn listed(&self) -> Value {
        json!({"name": self.name, "model": self.name, "modified_at": self.modified_at, "size": self.size, "digest": self.digest,
            "details": self.details(), "capabilities": ["completion"]})
    }

    fn details(&self) -> Value {
        details(&self.family, &self.parameter_size, &self.quantization)
    }

    fn usual() -> Value {
        details("llama", "1.5M", "Q4_0")
    }

    /// The seconds of the minute: enough to tell which is newer.
    fn seconds(&self) -> u64 {
        self.modified_at.get(17..19).and_then(|seconds| seconds.parse().ok()).unwrap_or(0)
    }
}

fn details(family: &str, parameter_size: &str, quantization: &str) -> Value {
    json!({"parent_model": "", "format": "gguf", "family": family, "families": [family], "parameter_size": parameter_size,
        "quantization_level": quantization, "context_length": 2048})
}

/// What the tag of a model says of it; `Q4_0` if that is nothing.
fn quantization(name: &str) -> String {
    let last = name.rsplit([':', '-']).next().unwrap_or_default();
    let is_level = last == "f16" || last.starts_with('q') && last.contains('_');
    if is_level { last.to_uppercase() } else { "Q4_0".to_owned() }
}

/// A name with its tag, as Ollama stores it.
pub fn full(name: &str) -> String {
    let name = name.to_lowercase();
    if name.contains(':') { name } else { format!("{name}:latest") }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}
