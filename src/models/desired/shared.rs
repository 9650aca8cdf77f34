//! Pins that several proxies share by way of their store: what is pinned at one of them is pinned at all.
//!
//! Each has its copy in its own file. What was said here is told to the store, and what stands there is true, but for what was
//! said here and could not be told yet; that is in the file, too. A proxy whose file never was in line with the store adds the
//! pins that the store lacks, and a store that has lost all that it had is told anew.

use std::collections::HashMap;
use std::time::Duration;

use olol_middleware::ModelName;
use tokio::task::JoinSet;

use super::pins::{Pins, Unsaid};
use super::{Desired, MOST, Wanted};
use crate::state::{Gone, State};

/// Time between two looks into the store.
const EVERY: Duration = Duration::from_millis(500);

/// Keeps the pins the same as those of the other proxies, until what is returned is dropped.
pub(crate) fn keep(desired: Desired, state: State) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut last = None;
        loop {
            if let Err(gone) = share(&desired, &state, &mut last).await {
                tracing::debug!(error = %gone, "pins are not shared now");
            }
            let _ = tokio::time::timeout(EVERY, desired.0.said.notified()).await;
        }
    });
    tasks
}

/// Tells what was said here, and takes over what the others have said. `last`: the version of what was taken over.
async fn share(desired: &Desired, state: &State, last: &mut Option<u64>) -> Result<(), Gone> {
    let (names, version) = (state.key("pins"), state.key("pins:version"));
    let Unsaid { pins, models, is_in_line } = desired.0.pins.unsaid();
    let there: Option<u64> =
        state.ask(async |mut store| redis::cmd("GET").arg(&version).query_async(&mut store).await).await?;
    let adds_all = there.is_none() || !is_in_line;
    if models.is_empty() && !adds_all && there == *last {
        return Ok(());
    }
    let text = |wanted: &Wanted| serde_json::to_string(wanted).unwrap_or_default();
    let (found, now): (HashMap<String, String>, Option<u64>) = state
        .ask(async |mut store| {
            let mut pipe = redis::pipe();
            pipe.atomic();
            for model in &models {
                match pins.get(model) {
                    Some(wanted) => pipe.hset(&names, model.as_str(), text(wanted)).ignore(),
                    None => pipe.hdel(&names, model.as_str()).ignore(),
                };
            }
            if adds_all {
                for (model, wanted) in pins.iter() {
                    pipe.hset_nx(&names, model.as_str(), text(wanted)).ignore();
                }
            }
            if adds_all || !models.is_empty() {
                pipe.incr(&version, 1).ignore();
            }
            pipe.hgetall(&names).get(&version).query_async(&mut store).await
        })
        .await?;
    let read = |(name, text): (String, String)| {
        let wanted: Wanted = serde_json::from_str(&text).ok()?;
        let model = ModelName::parse(&name).filter(|model| model == wanted.name.model())?;
        Some((model, wanted))
    };
    let there: Pins = found.into_iter().filter_map(read).take(MOST).collect();
    desired.adopt(there, Unsaid { pins, models, is_in_line }).await;
    *last = now;
    Ok(())
}
