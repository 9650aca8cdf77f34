//! What runs at each proxy: calls of whoever may have only so many at a time, and calls at bare Ollamas, of which no agent
//! tells. The proxies tell each other by a channel of the store whenever it has changed, and as a sign of life.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use olol_middleware::rate_limit::{Crowded, LEASE, Ledger};
use olol_middleware::{Cluster, Server, ServerId};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::State;

/// The name of the channel.
pub(super) const CHANNEL: &str = "running";
/// Time between two looks whether something has changed.
const EVERY: Duration = Duration::from_millis(25);
/// Time between two signs of life while something runs.
const BEAT: Duration = Duration::from_millis(500);
/// Proxies that are listened to.
const PROXIES: usize = 64;
/// Servers of one proxy that are told, and believed.
const SERVERS: usize = 1000;
/// Calls at one server from one proxy that are believed.
const CALLS: u32 = 1 << 16;

/// What a proxy tells: all of it, every time.
#[derive(Debug, Serialize, Deserialize)]
struct Message {
    /// Who tells.
    by: String,
    /// Whose calls run.
    crowds: Vec<Crowded>,
    /// Calls at bare servers.
    servers: Vec<(String, u32)>,
}

/// Tells what runs here.
pub(super) async fn tell(state: State, cluster: Arc<Cluster>, ledger: Arc<Ledger>, me: String) {
    let Some(mut crowds) = ledger.crowds() else { return };
    let channel = state.key(CHANNEL);
    let (mut last, mut at) = ((Vec::new(), Vec::new()), Instant::now());
    loop {
        tokio::time::sleep(EVERY).await;
        let now = (crowds.count(), busy(&cluster));
        let is_rest = now.0.is_empty() && now.1.is_empty();
        if now == last && (is_rest || at.elapsed() < BEAT) {
            continue;
        }
        let message = Message { by: me.clone(), crowds: now.0.clone(), servers: now.1.clone() };
        if let Ok(text) = serde_json::to_string(&message) {
            let publish = async |mut store| redis::cmd("PUBLISH").arg(&channel).arg(&text).exec_async(&mut store).await;
            // What cannot be told now is told with the next sign of life.
            let _ = state.ask(publish).await;
        }
        (last, at) = (now, Instant::now());
    }
}

/// The calls of this proxy at bare servers.
fn busy(cluster: &Cluster) -> Vec<(String, u32)> {
    let snapshot = cluster.snapshot();
    let calls = |server: &Arc<Server>| (server.load.in_flight() > 0).then(|| server.load.in_flight());
    let bare = snapshot.servers.iter().filter(|server| is_bare(server));
    bare.filter_map(|server| Some((server.id.to_string(), calls(server)?))).take(SERVERS).collect()
}

fn is_bare(server: &Server) -> bool {
    server.vitals.load().is_none()
}

/// What the other proxies have told of bare servers.
#[derive(Debug, Default)]
pub(super) struct Elsewhere(HashMap<String, (Instant, HashMap<ServerId, u32>)>);

impl Elsewhere {
    /// A proxy tells of its calls.
    fn hear(&mut self, by: String, servers: Vec<(String, u32)>, cluster: &Cluster) {
        let before = self.0.remove(&by).map(|(_, servers)| servers).unwrap_or_default();
        let told = servers.into_iter().take(SERVERS).map(|(server, calls)| (ServerId::new(&server), calls.min(CALLS)));
        let now: HashMap<ServerId, u32> = told.collect();
        let concerned: Vec<ServerId> = before.into_keys().chain(now.keys().cloned()).collect();
        if !now.is_empty() && self.0.len() < PROXIES {
            self.0.insert(by, (Instant::now(), now));
        }
        self.tell(cluster, &concerned);
    }

    /// What was told by proxies that are silent counts no more.
    pub(super) fn lapse(&mut self, cluster: &Cluster) {
        let silent = self.0.extract_if(|_, (at, _)| at.elapsed() > LEASE);
        let concerned: Vec<ServerId> = silent.flat_map(|(_, (_, servers))| servers.into_keys()).collect();
        self.tell(cluster, &concerned);
    }

    /// Nobody is heard any more.
    pub(super) fn clear(&mut self, cluster: &Cluster) {
        let concerned: Vec<ServerId> = self.0.drain().flat_map(|(_, (_, servers))| servers.into_keys()).collect();
        self.tell(cluster, &concerned);
    }

    fn tell(&self, cluster: &Cluster, concerned: &[ServerId]) {
        if concerned.is_empty() {
            return;
        }
        let snapshot = cluster.snapshot();
        for server in concerned.iter().filter_map(|id| snapshot.server(id)).filter(|server| is_bare(server)) {
            let calls = self.0.values().filter_map(|(_, servers)| servers.get(&server.id));
            server.load.tell_others(calls.fold(0, |sum, calls| sum.saturating_add(*calls)));
        }
    }
}

/// Takes in what another proxy has told.
pub(super) fn take(message: &[u8], cluster: &Cluster, ledger: &Ledger, elsewhere: &mut Elsewhere, me: &str) {
    let Ok(Message { by, crowds, servers }) = serde_json::from_slice(message) else { return };
    if by != me && by.len() <= LONGEST {
        ledger.hear_of_crowds(&by, crowds);
        elsewhere.hear(by, servers, cluster);
    }
}

/// The longest name by which a proxy signs.
const LONGEST: usize = 64;

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use olol_middleware::cluster::{Member, Source};

    #[tokio::test(start_paused = true)]
    async fn calls_of_others_at_bare_servers_count_until_they_end_or_nobody_tells_of_them() {
        let member = |id| Member { id: ServerId::new(id), weight: NonZeroU32::MIN, source: Source::Static };
        let cluster = Cluster::new(vec![member("a"), member("b")]);
        let ledger = Ledger::default();
        let mut elsewhere = Elsewhere::default();
        let mut tell = |by: &str, servers: &[(&str, u32)]| {
            let servers = servers.iter().map(|(server, calls)| ((*server).to_owned(), *calls)).collect();
            let message = Message { by: by.to_owned(), crowds: Vec::new(), servers };
            take(&serde_json::to_vec(&message).unwrap(), &cluster, &ledger, &mut elsewhere, "me");
        };
        let others = || {
            let snapshot = cluster.snapshot();
            [0, 1].map(|at| snapshot.servers[at].load.others())
        };
        tell("one", &[("a", 2), ("b", 1), ("unknown", 7)]);
        tell("two", &[("a", 3)]);
        tell("me", &[("a", 9)]);
        assert_eq!(others(), [5, 1]);
        tell("one", &[("b", 4)]);
        assert_eq!(others(), [3, 4]);
        tell("one", &[]);
        assert_eq!(others(), [3, 0]);
        tokio::time::advance(LEASE + EVERY).await;
        elsewhere.lapse(&cluster);
        assert_eq!(others(), [0, 0]);
    }
}
