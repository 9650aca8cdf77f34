//! The pulls that go on: as agents tell them, and at bare servers as this proxy follows them.

use std::collections::HashMap;

use olol_middleware::{ModelName, Server, ServerId, Snapshot};
use serde::Serialize;

use super::servers::is_heard;
use super::time::share;

/// Pulls that a summary names.
const NAMED: usize = 16;

/// The pulls of this proxy, by server.
pub(super) struct Pulls(HashMap<ServerId, Vec<(ModelName, f32)>>);

/// A pull, for a summary.
#[derive(Debug, Serialize)]
pub(super) struct Named {
    model: String,
    server: String,
    /// A share of 1.
    done: f64,
}

impl Pulls {
    /// Those that go on through this proxy.
    pub(super) fn of(under_way: Vec<(ModelName, ServerId, f32)>) -> Self {
        let mut pulls: HashMap<ServerId, Vec<(ModelName, f32)>> = HashMap::new();
        for (model, server, done) in under_way {
            pulls.entry(server).or_default().push((model, done));
        }
        Self(pulls)
    }

    /// Those at a server, by name: its agent sees also those of others. What one told that went goes on no more.
    pub(super) fn at(&self, server: &Server) -> Vec<(String, f32)> {
        match server.vitals.load_full().filter(|_| is_heard(server)) {
            Some(vitals) => vitals.pending_pulls.clone(),
            None => {
                self.0.get(&server.id).into_iter().flatten().map(|(name, done)| (name.to_string(), *done)).collect()
            }
        }
    }

    /// How many there are, and the first of them.
    pub(super) fn all(&self, snapshot: &Snapshot) -> (usize, Vec<Named>) {
        let (mut count, mut named) = (0, Vec::new());
        for server in &snapshot.servers {
            for (model, done) in self.at(server) {
                count += 1;
                if named.len() < NAMED {
                    named.push(Named { model, server: server.id.to_string(), done: share(done) });
                }
            }
        }
        (count, named)
    }
}
