//! What a fake Ollama does step by step, and what it saw.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::Semaphore;

use super::wire::Headers;

/// One step of an answer.
#[derive(Clone, Debug)]
pub enum Step {
    /// Writes these bytes, in one write.
    Write(Vec<u8>),
    /// Writes these bytes for as long as somebody takes them.
    Repeat(Vec<u8>),
    /// Waits at a gate.
    Wait(Gate),
    /// Has a model in memory from now on.
    Load(String),
    /// Has a model on the disk from now on.
    Add(String),
    /// Does nothing, until the other side goes.
    Stall,
    /// Closes the connection.
    HangUp,
}

/// Something that waits until a test lets it go on.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Semaphore>);

impl Gate {
    /// A gate that is closed.
    pub fn closed() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    /// Lets so many go on, of those who wait now or come later.
    pub fn let_through(&self, count: usize) {
        self.0.add_permits(count);
    }

    /// Lets all go on.
    pub fn open(&self) {
        self.0.close();
    }

    /// Waits until it may go on.
    pub(super) async fn pass(&self) {
        if let Ok(permit) = self.0.acquire().await {
            permit.forget();
        }
    }
}

/// A request as a server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its method.
    pub method: String,
    /// Its path.
    pub path: String,
    /// Its headers.
    pub headers: Headers,
    /// Its body; empty if it was too long to be remembered.
    pub body: Vec<u8>,
    /// Bytes of its body.
    pub length: u64,
    /// Whether its connection had carried a request before.
    pub is_reused: bool,
}

impl Seen {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A text of the body; empty if it is not there.
    pub fn text(&self, key: &str) -> String {
        self.json()[key].as_str().unwrap_or_default().to_owned()
    }

    /// The model that is asked for.
    pub fn model(&self) -> String {
        let model = self.text("model");
        if model.is_empty() { self.text("name") } else { model }
    }

    pub(super) fn streams(&self) -> bool {
        self.json()["stream"].as_bool().unwrap_or(self.path.starts_with("/api/"))
    }

    pub(super) fn unloads(&self) -> bool {
        let body = self.json();
        let asks =
            !self.text("prompt").is_empty() || body["messages"].as_array().is_some_and(|messages| !messages.is_empty());
        !asks && (body["keep_alive"] == 0 || body["keep_alive"] == "0s")
    }
}
