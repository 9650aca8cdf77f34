//! What the layers decided about a call and why: what `olol explain` and `GET /api/status/requests/{id}` tell.
//!
//! A note is words that are known in advance and values that are there already, so writing one formats nothing and, but for
//! its place in the list, allocates nothing. A trail belongs to a request, not to an attempt: it tells of all of them.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use smallvec::SmallVec;

use crate::names::{ModelName, ServerId};

/// The most notes that one request may have: an endless loop of attempts must not fill the memory.
const LONGEST: usize = 64;
/// Notes for which there is room from the first one on.
const USUAL: usize = 8;

/// The notes on one request, in the order in which they were made.
#[derive(Debug, Default)]
pub struct Trail(Mutex<Vec<Note>>);

/// One decision of one layer.
#[derive(Clone, Debug, Serialize)]
pub struct Note {
    /// The layer, by the word of its table.
    pub layer: &'static str,
    /// What it decided.
    pub decision: &'static str,
    /// What it knew, with a name each.
    #[serde(serialize_with = "as_object")]
    pub facts: Facts,
}

/// A value with its name.
pub type Named = (&'static str, Fact);

type Facts = SmallVec<[Named; 2]>;

/// Something that a layer knew when it decided.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Fact {
    /// A number of things.
    Count(u64),
    /// Milliseconds.
    Ms(f64),
    /// Yes or no.
    Flag(bool),
    /// A word of ours.
    Word(&'static str),
    /// A text from the configuration. Never anything secret.
    Text(Arc<str>),
    /// A server.
    #[serde(serialize_with = "server_name")]
    Server(ServerId),
    /// A model.
    #[serde(serialize_with = "model_name")]
    Model(ModelName),
    /// Several values.
    List(Vec<Fact>),
    /// Several values with a name each: a row of a table.
    #[serde(serialize_with = "as_object")]
    Row(Vec<Named>),
}

impl Trail {
    /// Writes a note.
    pub fn note(&self, layer: &'static str, decision: &'static str, facts: impl IntoIterator<Item = Named>) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.capacity() == 0 {
            notes.reserve_exact(USUAL);
        }
        if notes.len() < LONGEST {
            notes.push(Note { layer, decision, facts: facts.into_iter().collect() });
        }
    }

    /// Takes the notes out: for whoever tells them, when the request is over.
    pub fn take(&self) -> Vec<Note> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Fact {
    /// Milliseconds, to a thousandth.
    pub fn ms(value: f32) -> Self {
        Self::Ms((f64::from(value) * 1000.0).round() / 1000.0)
    }
}

impl From<usize> for Fact {
    fn from(count: usize) -> Self {
        Self::Count(count as u64)
    }
}

impl From<u32> for Fact {
    fn from(count: u32) -> Self {
        Self::Count(count.into())
    }
}

impl From<u64> for Fact {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<bool> for Fact {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<&'static str> for Fact {
    fn from(word: &'static str) -> Self {
        Self::Word(word)
    }
}

impl From<Arc<str>> for Fact {
    fn from(text: Arc<str>) -> Self {
        Self::Text(text)
    }
}

impl From<&ServerId> for Fact {
    fn from(server: &ServerId) -> Self {
        Self::Server(server.clone())
    }
}

impl From<&ModelName> for Fact {
    fn from(model: &ModelName) -> Self {
        Self::Model(model.clone())
    }
}

fn server_name<S: serde::Serializer>(server: &ServerId, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(server.as_str())
}

fn model_name<S: serde::Serializer>(model: &ModelName, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(model.as_str())
}

fn as_object<S: serde::Serializer>(facts: &[Named], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(facts.iter().map(|(name, fact)| (*name, fact)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_reads_as_json() {
        let trail = Trail::default();
        trail.note("retry", "again", [("server", Fact::from(&ServerId::new("gpu1"))), ("attempt", 2_u32.into())]);
        let told = serde_json::to_value(trail.take()).unwrap();
        let wanted =
            serde_json::json!([{"layer": "retry", "decision": "again", "facts": {"server": "gpu1", "attempt": 2}}]);
        assert_eq!(told, wanted);
        assert!(trail.take().is_empty());
    }

    #[test]
    fn a_trail_has_an_end() {
        let trail = Trail::default();
        (0..1000).for_each(|_| trail.note("retry", "again", []));
        assert_eq!(trail.take().len(), LONGEST);
    }
}
