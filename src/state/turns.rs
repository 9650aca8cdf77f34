//! Which bare Ollama has which conversation: no agent tells of their turns, so the proxies tell each other, by a channel of the store.
//!
//! Nothing of it is kept there. What gets lost costs a hint, and no more.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use olol_middleware::affinity::Turn;
use olol_middleware::{Cluster, ServerId};
use redis::aio::PubSub;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{CONNECT, State};

/// Turns that wait to be told.
pub(super) const WAITING: usize = 1024;
/// Turns in one message.
const TOGETHER: usize = 256;
/// Time between two messages.
const EVERY: Duration = Duration::from_millis(20);
/// Time until a channel that broke is opened again.
const AGAIN: Duration = Duration::from_secs(1);

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
    let channel = state.key("turns");
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

/// Hears of those that were answered elsewhere.
pub(super) async fn hear(state: State, cluster: Arc<Cluster>, me: String) {
    let mut up = state.changes();
    while up.wait_for(|is_up| *is_up).await.is_ok() {
        if let Some(mut channel) = open(&state).await {
            let mut messages = channel.on_message();
            loop {
                let message = tokio::select! {
                    message = messages.next() => message,
                    // A connection that is cut says nothing.
                    _ = up.wait_for(|is_up| !is_up) => None,
                };
                let Some(message) = message else { break };
                take(message.get_payload_bytes(), &cluster, &me);
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn open(state: &State) -> Option<PubSub> {
    let opening = async {
        let mut channel = state.0.client.get_async_pubsub().await?;
        channel.subscribe(state.key("turns")).await?;
        Ok::<_, redis::RedisError>(channel)
    };
    tokio::time::timeout(CONNECT, opening).await.ok()?.ok()
}

fn take(message: &[u8], cluster: &Cluster, me: &str) {
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
