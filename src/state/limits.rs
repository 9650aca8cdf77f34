//! Limits: what was used at one proxy is told to the others, by a list in the store that all of them read and write.
//!
//! Each decides by itself and at once, so nobody waits for the store. What was used is told twice a second, and may be told late
//! while the store is away.

use std::time::Duration;

use olol_middleware::rate_limit::{Ledger, Spent};
use redis::streams::{StreamRangeReply, StreamReadOptions, StreamReadReply};

use super::{Gone, State};

/// Entries that are kept, about: one for each time that a proxy has something to tell.
const KEPT: usize = 5_000;
/// Accounts in one entry.
const MOST: usize = 200;
/// Entries that are written at once.
const WRITTEN: usize = 20;
/// Entries that are read at once.
const AT_ONCE: usize = 200;

/// How far this proxy has read.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// The last entry that was read; `None`: none yet.
    last: Option<String>,
}

/// Tells what was used here, and reckons with what was used elsewhere. `me`: how this proxy signs.
pub(super) async fn share(state: &State, reading: &mut Reading, ledger: &Ledger, me: &str) -> Result<(), Gone> {
    let name = state.key("used");
    for _ in 0..WRITTEN {
        let spent = ledger.untold(MOST);
        if spent.is_empty() {
            break;
        }
        let text = serde_json::to_string(&spent).unwrap_or_default();
        let told = state
            .try_ask(async |mut store| {
                let mut entry = redis::cmd("XADD");
                entry.arg(&name).arg("MAXLEN").arg("~").arg(KEPT).arg("*").arg("by").arg(me).arg("used").arg(&text);
                entry.exec_async(&mut store).await
            })
            .await;
        if let Err(gone) = told {
            ledger.told_in_vain(&spent);
            return Err(gone);
        }
    }
    loop {
        let last = reading.last.clone().unwrap_or_else(|| "0".to_owned());
        let (now, read) = state
            .try_ask(async |mut store| {
                let (seconds, _): (u64, u64) = redis::cmd("TIME").query_async(&mut store).await?;
                let options = StreamReadOptions::default().count(AT_ONCE);
                let mut ask = redis::cmd("XREAD");
                ask.arg(&options).arg("STREAMS").arg(&name).arg(&last);
                let read: Option<StreamReadReply> = ask.query_async(&mut store).await?;
                Ok((seconds * 1000, read))
            })
            .await?;
        let entries: Vec<_> = read.into_iter().flat_map(|read| read.keys).flat_map(|key| key.ids).collect();
        if entries.is_empty() {
            // A store that has forgotten all begins to count anew, perhaps lower.
            return restart(state, reading, &name).await;
        }
        let is_more = entries.len() == AT_ONCE;
        for entry in entries {
            let at = entry.id.split('-').next().and_then(|ms| ms.parse().ok()).unwrap_or(now);
            let by: String = entry.get("by").unwrap_or_default();
            // What a proxy said before it was started anew is another's.
            if by != me {
                let used: String = entry.get("used").unwrap_or_default();
                let used: Vec<Spent> = serde_json::from_str(&used).unwrap_or_default();
                let age = Duration::from_millis(now.saturating_sub(at));
                used.iter().take(MOST).for_each(|spent| ledger.absorb(spent, age));
            }
            reading.last = Some(entry.id);
        }
        if !is_more {
            return Ok(());
        }
    }
}

/// Reads from the beginning again if the last entry there is before the last one that was read.
async fn restart(state: &State, reading: &mut Reading, name: &str) -> Result<(), Gone> {
    let Some(last) = &reading.last else { return Ok(()) };
    let newest: StreamRangeReply = state
        .try_ask(async |mut store| {
            redis::cmd("XREVRANGE").arg(name).arg("+").arg("-").arg("COUNT").arg(1).query_async(&mut store).await
        })
        .await?;
    let number = |id: &str| {
        let (ms, count) = id.split_once('-')?;
        Some((ms.parse::<u64>().ok()?, count.parse::<u64>().ok()?))
    };
    if newest.ids.first().is_none_or(|newest| number(&newest.id) < number(last)) {
        reading.last = None;
    }
    Ok(())
}
