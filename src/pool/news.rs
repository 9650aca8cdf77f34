//! What became known of a conversation only with its answer: the agent of its server is told, and tells the other proxies.

use std::collections::HashMap;
use std::time::Duration;

use olol_middleware::ServerId;
use olol_middleware::affinity::Turn;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Backend, Pool};
use crate::rpc;

/// Turns that wait to be told.
const WAITING: usize = 1024;
/// Turns in one message.
const TOGETHER: usize = 256;
/// Agents that are told at the same time.
const AT_ONCE: usize = 32;
/// The longest that an agent may take: later it is of no use.
const LIMIT: Duration = Duration::from_secs(2);
/// Time between two rounds.
const EVERY: Duration = Duration::from_millis(10);

impl Pool {
    /// Tells agents of turns, until what is returned is dropped. What one does not take is lost: it costs a hint, no more.
    pub fn tell_agents(&self) -> (mpsc::Sender<(ServerId, Turn)>, JoinSet<()>) {
        let (tell, mut news) = mpsc::channel(WAITING);
        let pool = self.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut turns: Vec<(ServerId, Turn)> = Vec::new();
            let mut telling = JoinSet::new();
            while news.recv_many(&mut turns, TOGETHER).await > 0 {
                let mut of_each: HashMap<ServerId, Vec<_>> = HashMap::new();
                for (server, turn) in turns.drain(..) {
                    of_each.entry(server).or_default().push(rpc::wire(turn));
                }
                let snapshot = pool.cluster().snapshot();
                for (server, turns) in of_each {
                    let backend = snapshot.server(&server).and_then(|server| pool.0.backend(server.index));
                    let Some(Backend::Agent(agent)) = backend.as_deref() else { continue };
                    while telling.len() >= AT_ONCE {
                        telling.join_next().await;
                    }
                    let agent = agent.clone();
                    telling.spawn(async move {
                        // Agents of earlier versions know no such thing.
                        let _ = tokio::time::timeout(LIMIT, agent.tell_turns(turns)).await;
                    });
                }
                while telling.try_join_next().is_some() {}
                tokio::time::sleep(EVERY).await;
            }
        });
        (tell, tasks)
    }
}
