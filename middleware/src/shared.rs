//! What outlives a stack: a reload builds new layers over the same state.

use std::sync::Arc;

use crate::affinity;
use crate::budget::Budget;
use crate::clients::Clients;
use crate::cluster::Cluster;
use crate::instruments::Instruments;
use crate::keys::Keys;
use crate::pick::Picking;
use crate::quant_fallback::Works;
use crate::queue::Queue;
use crate::rate_limit::Ledger;
use crate::trace::Ring;

/// The state that layers are views of, by layer.
#[derive(Clone, Debug)]
pub struct Shared {
    /// What is known of the servers: everybody's.
    pub cluster: Arc<Cluster>,
    /// The metrics that belong to no server and no model: everybody's.
    pub instruments: Arc<Instruments>,
    /// The keys of clients: `auth`'s, and the proxy's own pages'.
    pub keys: Arc<Keys>,
    /// Who asks: `metrics` feeds it.
    pub clients: Arc<Clients>,
    /// The last requests and what was decided about them: `trace`'s.
    pub requests: Arc<Ring>,
    /// How servers are picked: the leaf's.
    pub picking: Arc<Picking>,
    /// What waits for a slot: `queue`'s.
    pub queue: Arc<Queue>,
    /// What everybody has used: `rate-limit`'s.
    pub limits: Arc<Ledger>,
    /// Who has which conversations: `affinity`'s.
    pub affinity: Arc<affinity::Table>,
    /// Which quantizations are being made or pulled: `quant-fallback`'s.
    pub works: Arc<Works>,
    /// How many retries are left: `retry`'s.
    pub budget: Arc<Budget>,
    /// How many second tries are left: `hedge`'s.
    pub hedges: Arc<Budget>,
}

impl Shared {
    /// Fresh state around a cluster.
    pub fn new(cluster: Arc<Cluster>) -> Self {
        let affinity: Arc<affinity::Table> = Arc::default();
        cluster.remember_in(affinity.clone());
        Self {
            cluster,
            instruments: Arc::default(),
            keys: Arc::default(),
            clients: Arc::default(),
            requests: Arc::default(),
            limits: Arc::default(),
            picking: Arc::default(),
            queue: Arc::default(),
            affinity,
            works: Arc::default(),
            budget: Arc::default(),
            hedges: Arc::default(),
        }
    }
}
