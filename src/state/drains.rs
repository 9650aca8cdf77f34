//! Drains: a server that one proxy is told to drain is drained at all of them.
//!
//! The store holds the names of those that are. What an operator says goes there first and holds here at once; what stands there
//! is true for everybody else. A store that has lost its memory is told anew what is drained here.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use olol_middleware::{Cluster, ServerId};

use super::{Gone, State};

/// What was said here and is not in the store yet.
#[derive(Debug, Default)]
pub(super) struct Drains(Mutex<HashMap<ServerId, bool>>);

impl Drains {
    /// Something was said here. Bounded by the servers that there are.
    pub(super) fn say(&self, server: &ServerId, draining: bool) {
        self.unsaid().insert(server.clone(), draining);
    }

    fn unsaid(&self) -> MutexGuard<'_, HashMap<ServerId, bool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the store what was said here, and does what it says.
pub(super) async fn share(state: &State, drains: &Drains, cluster: &Cluster) -> Result<(), Gone> {
    let (names, mark) = (state.key("drains"), state.key("mark"));
    let is_known: bool =
        state.try_ask(async |mut store| redis::cmd("EXISTS").arg(&mark).query_async(&mut store).await).await?;
    if !is_known {
        let snapshot = cluster.snapshot();
        let mut unsaid = drains.unsaid();
        for server in snapshot.servers.iter().filter(|server| server.draining) {
            unsaid.entry(server.id.clone()).or_insert(true);
        }
    }
    let said = drains.unsaid().clone();
    let drained: HashSet<String> = state
        .try_ask(async |mut store| {
            // All at once: who sees the mark sees what belongs to it.
            let mut pipe = redis::pipe();
            pipe.atomic().cmd("SET").arg(&mark).arg(1).ignore();
            for (server, draining) in &said {
                pipe.cmd(if *draining { "SADD" } else { "SREM" }).arg(&names).arg(server.as_str()).ignore();
            }
            let (drained,): (HashSet<String>,) = pipe.cmd("SMEMBERS").arg(&names).query_async(&mut store).await?;
            Ok(drained)
        })
        .await?;
    // What was said in the meantime is told the next time, and holds until then.
    let unsaid = {
        let mut unsaid = drains.unsaid();
        unsaid.retain(|server, draining| said.get(server) != Some(draining));
        unsaid.clone()
    };
    for server in &cluster.snapshot().servers {
        let is_drained = drained.contains(server.id.as_str());
        if server.draining != is_drained && !unsaid.contains_key(&server.id) {
            cluster.drain(&server.id, is_drained);
        }
    }
    Ok(())
}
