//! What proxies tell each other at once, by channels of the store. Nothing of it is kept there, and what gets lost costs little.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use olol_middleware::Cluster;
use olol_middleware::rate_limit::Ledger;
use redis::aio::PubSub;
use tokio::time::MissedTickBehavior;

use super::link::Heard;
use super::{CONNECT, State, running, turns};

/// Time until a channel that broke is opened again, and between two looks for proxies that are silent.
const AGAIN: Duration = Duration::from_secs(1);

/// Hears what the other proxies tell.
pub(super) async fn hear(state: State, cluster: Arc<Cluster>, ledger: Arc<Ledger>, me: String) {
    let mut elsewhere = running::Elsewhere::default();
    let mut look = tokio::time::interval(AGAIN);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut up = state.changes();
    while up.wait_for(|is_up| *is_up).await.is_ok() {
        let heard = Arc::<Heard>::default();
        if let Some(mut channel) = open(&state, heard.clone()).await {
            let (turns, running) = (state.key(turns::CHANNEL), state.key(running::CHANNEL));
            let mut messages = channel.on_message();
            loop {
                let message = tokio::select! {
                    message = messages.next() => message,
                    // A connection that is cut says nothing.
                    _ = up.wait_for(|is_up| !is_up) => None,
                    _ = look.tick() => {
                        ledger.forget_silent();
                        elsewhere.lapse(&cluster);
                        continue;
                    }
                };
                let Some(message) = message else { break };
                heard.one();
                let (name, text) = (message.get_channel_name(), message.get_payload_bytes());
                if name == turns {
                    turns::take(text, &cluster, &me);
                } else if name == running {
                    running::take(text, &cluster, &ledger, &mut elsewhere, &me);
                }
            }
            // Each goes by what it has itself.
            ledger.forget_crowds();
            elsewhere.clear(&cluster);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn open(state: &State, heard: Arc<Heard>) -> Option<PubSub> {
    let opening = async {
        let link = state.0.way.open(Some(heard)).await?;
        let mut channel = PubSub::new(state.0.way.settings(), link).await?;
        channel.subscribe(state.key(turns::CHANNEL)).await?;
        channel.subscribe(state.key(running::CHANNEL)).await?;
        Ok::<_, redis::RedisError>(channel)
    };
    tokio::time::timeout(CONNECT, opening).await.ok()?.ok()
}
