//! The page of the sessions, all of them: it is for admins. Each key sees its own at `/api/status/sessions`.

use http::StatusCode;
use serde_json::Value;

use super::page::Wanted;
use crate::sessions::{Sessions, Visitor};

/// The sessions of a page, by name, and the cursor of the next.
pub(super) async fn page(
    sessions: &Sessions,
    wanted: &Wanted,
) -> Result<(Vec<Value>, Option<String>), (StatusCode, String)> {
    let after = wanted.after.as_deref().unwrap_or_default();
    let page = sessions.list(&Visitor::anybody(), after, wanted.limit).await;
    let page = page.map_err(|error| (error.status(), error.to_string()))?;
    let shown = page.sessions.iter().map(|(session, is_busy)| session.shown(*is_busy));
    Ok((shown.collect(), page.next))
}
