//! Which bare Ollama has which conversation: no agent tells of their turns, so the proxies tell each other, by a channel of the store.
//!
//! Nothing of it is kept there. What gets lost costs a hint, and no more.

use std::time::Duration;

use olol_middleware::affinity::Turn;
use olol_middleware::{Cluster, ServerId};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::State;

/// The name of the channel.
pub(super) const CHANNEL: &str = "turns";
/// Turns that wait to be told.
pub(super) const WAITING: usize = 1024;
/// Turns in one message.
const TOGETHER: usize = 256;
/// Time between two messages.
const EVERY: Duration = Duration::from_millis(20);

/// What proxies tell each other.
#[derive(Debug, Serialize, Deserialize)]
struct Message {
    /// Who tells.
    by: String,
    turns: Vec<Told>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Told {
    server: String,
    known: u64,
    goes_on: bool,
    news: Vec<u64>,
}

/// Tells of turns that were answered here.
pub(super) async fn tell(state: State, mut news: mpsc::Receiver<(ServerId, Turn)>, me: String) {
    let channel = state.key(CHANNEL);
    let mut turns = Vec::new();
    while news.recv_many(&mut turns, TOGETHER).await > 0 {
        let told = turns.drain(..).map(|(server, turn)| Told {
            server: server.to_string(),
            known: turn.known.unwrap_or(0),
            goes_on: turn.goes_on,
            news: turn.news.into_vec(),
        });
        let message = Message { by: me.clone(), turns: told.collect() };
        if let Ok(text) = serde_json::to_string(&message) {
            let publish = async |mut store| redis::cmd("PUBLISH").arg(&channel).arg(&text).exec_async(&mut store).await;
            // What cannot be told now is old when it can.
            let _ = state.ask(publish).await;
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Takes in what another proxy has told.
pub(super) fn take(message: &[u8], cluster: &Cluster, me: &str) {
    let Ok(Message { by, turns }) = serde_json::from_slice(message) else { return };
    if by == me {
        return;
    }
    let snapshot = cluster.snapshot();
    for Told { server, known, goes_on, news } in turns.into_iter().take(TOGETHER) {
        if let Some(server) = snapshot.server(&ServerId::new(&server)) {
            cluster.tell_turns(server.index, false, &[Turn::told(known, goes_on, news)]);
        }
    }
}
