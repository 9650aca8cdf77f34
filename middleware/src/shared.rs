//! What outlives a stack: a reload builds new layers over the same state.

use std::sync::Arc;

use crate::affinity;
use crate::cluster::Cluster;
use crate::instruments::Instruments;
use crate::retry::Budget;
use crate::trace::Ring;

/// The state that layers are views of, by layer.
#[derive(Clone, Debug)]
pub struct Shared {
    /// What is known of the servers: everybody's.
    pub cluster: Arc<Cluster>,
    /// The metrics that belong to no server and no model: everybody's.
    pub instruments: Arc<Instruments>,
    /// The last requests and what was decided about them: `trace`'s.
    pub requests: Arc<Ring>,
    /// Who has which conversations: `affinity`'s.
    pub affinity: Arc<affinity::Table>,
    /// How many retries are left: `retry`'s.
    pub budget: Arc<Budget>,
}

impl Shared {
    /// Fresh state around a cluster.
    pub fn new(cluster: Arc<Cluster>) -> Self {
        Self {
            cluster,
            instruments: Arc::default(),
            requests: Arc::default(),
            affinity: Arc::default(),
            budget: Arc::default(),
        }
    }
}
