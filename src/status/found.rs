//! What was found on the network and is not used, on the page of the servers.

use serde::Serialize;

use super::time::rfc3339;
use crate::discovery::Stranger;

/// The most that a page shows.
const MOST: usize = 200;

/// Something that was found.
#[derive(Debug, Serialize)]
pub(super) struct Found {
    name: String,
    address: String,
    /// "agent" or "ollama".
    kind: &'static str,
    /// How it was found: "mdns" or "scan".
    source: &'static str,
    since: String,
    /// Why it is not used.
    reason: String,
}

/// The first of them.
pub(super) fn all(strangers: &[Stranger]) -> Vec<Found> {
    let found = strangers.iter().take(MOST).map(|one| Found {
        name: one.name.clone(),
        address: one.address.clone(),
        kind: if one.is_agent { "agent" } else { "ollama" },
        source: one.source.as_str(),
        since: rfc3339(one.since),
        reason: one.reason.clone(),
    });
    found.collect()
}
