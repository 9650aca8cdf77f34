//! What a server says of itself: its models, on its disk and in its memory.

use crate::quant_fallback::Level;

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Version of its engine.
    pub version: String,
    /// Models on its disk.
    pub models: Vec<Model>,
    /// Models in its memory.
    pub loaded: Vec<Loaded>,
}

/// A model on a server's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Model {
    /// The name as the server lists it.
    pub name: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Bytes on the disk.
    pub size: u64,
    /// Family: "llama".
    pub family: String,
    /// Parameters as Ollama writes them: "3.2B".
    pub parameter_size: String,
    /// Quantization level: "`Q4_K_M`".
    pub quantization: String,
    /// `general.architecture` of its weights. Empty: nobody has asked; the family is the same word then.
    pub architecture: String,
    /// Context it was trained for, tokens; 0: unknown.
    pub context_length: u32,
    /// What it can do.
    pub capabilities: Vec<String>,
    /// RFC 3339 time of the last change.
    pub modified_at: String,
    /// What its runner is started with: the digests of its weights, projectors and adapters. Empty: nobody has asked.
    pub weights: String,
    /// Its own parameters, a JSON object. Empty: nobody has asked.
    pub parameters: String,
}

impl Model {
    /// What it is said to be: family, number of parameters, quantization.
    pub fn kind(&self) -> [&str; 3] {
        [&self.family, &self.parameter_size, &self.quantization]
    }

    /// `general.architecture` of its weights, as far as it is known; Ollama calls its models' family so, too.
    pub fn architecture(&self) -> &str {
        if self.architecture.is_empty() { &self.family } else { &self.architecture }
    }

    /// The bits that a weight of its quantization takes, if the level is a known one.
    pub fn bits_per_weight(&self) -> Option<f32> {
        Level::parse(&self.quantization)?.bits_per_weight()
    }

    /// What tells whether it shares a runner with another model of its server: Ollama keeps runners by the file of the
    /// weights, not by the name. Nothing if too little is known of it.
    pub(super) fn identity(&self) -> Option<&str> {
        [&self.weights, &self.digest].into_iter().map(String::as_str).find(|text| !text.is_empty())
    }
}

/// A model in a server's memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loaded {
    /// The name under which it was loaded.
    pub name: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Bytes in all memories.
    pub size: u64,
    /// Bytes of it in graphics memory.
    pub size_vram: u64,
    /// RFC 3339 time at which it goes when it stays idle.
    pub expires_at: String,
    /// Context of one slot, tokens; 0: unknown.
    pub context_length: u32,
    /// Calls that its runner answers side by side; 0: unknown.
    pub slots: u32,
}
