//! Keeps what the cluster knows of one server true: listens to its agent, or asks a bare Ollama again and again.

use std::sync::Arc;
use std::time::Duration;

use olol_middleware::Cluster;
use olol_middleware::cluster::State;
use olol_middleware::time::unix_ms_now;
use olol_middleware::vitals::Vitals;
use olol_proto::v1::{DescribeResponse, ServerState};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{Backend, Config, grpc, told};
use crate::ollama::{Heard, Ollama};
use crate::rpc;
use crate::security::proof::Refused;

/// Shortest time between two rounds that somebody asked for.
const SHORTEST: Duration = Duration::from_millis(20);

/// How old what an agent tells may be: the longest that its look at its engine takes.
const AGENT_LAG: Duration = Duration::from_secs(3);

/// Milliseconds by which clocks differ so that it is worth saying.
const CLOCKS_DIFFER: u64 = 60_000;

/// The shortest time, and the usual one, until a server that has refused us is asked again: nothing but a person mends that.
const REFUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// Looks at bare servers that should be under way at the same time: a thousand answers at once would take up more room and
/// time than one after the other.
const AT_ONCE: usize = 64;
/// The longest that a look waits for its turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest that a turn lasts: a server that does not answer is waited for beside the others.
const TURN: Duration = Duration::from_millis(250);

/// Lets not all look at once.
#[derive(Debug)]
pub(super) struct Turns(Semaphore);

impl Default for Turns {
    fn default() -> Self {
        Self(Semaphore::new(AT_ONCE))
    }
}

impl Turns {
    /// Looks when it is its turn.
    async fn run<T>(&self, looking: impl Future<Output = T>) -> T {
        let turn = tokio::time::timeout(PATIENCE, self.0.acquire()).await;
        tokio::pin!(looking);
        if let Ok(seen) = tokio::time::timeout(TURN, &mut looking).await {
            return seen;
        }
        drop(turn);
        looking.await
    }
}

/// Runs until it is dropped.
pub(super) async fn keep_true(
    cluster: Arc<Cluster>,
    index: usize,
    backend: Arc<Backend>,
    config: Config,
    turns: Arc<Turns>,
) {
    match &*backend {
        Backend::Ollama(ollama) => ask(&cluster, index, ollama, &config, &turns).await,
        Backend::Agent(agent) => listen(&cluster, index, agent, &config).await,
        Backend::Stranger(_) => cluster.check_failed(index, super::stranger().to_string(), 1),
    }
}

/// Asks a bare Ollama, at intervals and whenever somebody wants news: often after a change and while it works for us, ever
/// less often while nothing happens.
async fn ask(cluster: &Cluster, index: usize, ollama: &Ollama, config: &Config, turns: &Turns) {
    let limit = config.check_timeout_ms.time();
    let longest = config.check_interval_ms.time();
    let mut pause = longest / 10;
    let aside = ollama.aside();
    let mut heard = Heard::default();
    loop {
        let round = cluster.round_begins(index);
        let looking = look(cluster, index, &aside, &mut heard, limit, config.check_failures.get());
        let is_still = turns.run(looking).await;
        cluster.round_ends(index, round);
        ollama.sweep();
        aside.sweep();
        let is_idle = cluster.snapshot().servers.get(index).is_none_or(|server| server.load.in_flight() == 0);
        pause = next_pause(pause, is_still && is_idle, longest);
        tokio::time::sleep(SHORTEST).await;
        tokio::select! {
            () = tokio::time::sleep(jittered(pause)) => {}
            () = cluster.news_wanted(index) => {}
        }
    }
}

/// The pause before the next look: a tenth of the longest after something has happened, and doubled whenever nothing has.
fn next_pause(last: Duration, is_quiet: bool, longest: Duration) -> Duration {
    if is_quiet { (last * 2).min(longest) } else { longest / 10 }
}

/// Asks once. True if it says what it said before.
async fn look(
    cluster: &Cluster,
    index: usize,
    ollama: &Ollama,
    heard: &mut Heard,
    limit: Duration,
    failures: u32,
) -> bool {
    let last = cluster.snapshot().servers.get(index).map(|server| server.report.clone()).unwrap_or_default();
    let begun = Instant::now();
    match tokio::time::timeout(limit, ollama.hear(heard, cluster, &last.loaded, limit / 2)).await {
        Ok(Ok(kept)) => {
            let is_still = Arc::ptr_eq(&kept, &last) || kept == last;
            cluster.keep_since(index, &kept, begun);
            return is_still;
        }
        Ok(Err(error)) => cluster.check_failed(index, error.to_string(), failures),
        Err(_) => cluster.check_failed(index, format!("no answer after {} ms", limit.as_millis()), failures),
    }
    // What is down is looked at no more often than what is well; what may be is looked at soon.
    cluster.snapshot().servers.get(index).is_some_and(|server| server.state == State::Down)
}

/// Listens to an agent, which speaks whenever something changes, and at least every second.
async fn listen(cluster: &Cluster, index: usize, agent: &grpc::Agent, config: &Config) {
    let silence = config.check_interval_ms.time().max(Duration::from_secs(2));
    // Whoever has dialled in is gone with its connection.
    let failures = if agent.is_guest() { 1 } else { config.check_failures.get() };
    let mut about = None;
    loop {
        let round = cluster.round_begins(index);
        let (mut told, mut refused) = (Some(round), false);
        let mut known = told::Told::default();
        let (mut is_first, mut undescribed) = (about.is_none(), None);
        let error = match agent.watch(config.check_timeout_ms.time(), about.is_none()).await {
            Err(error) => {
                refused = error.is::<Refused>();
                error.to_string()
            }
            Ok((mut states, mut describing)) => loop {
                let wanted = tokio::select! {
                    biased;
                    described = described(&mut describing) => {
                        (about, describing) = (described, None);
                        // Else with the first state.
                        if let Some(state) = undescribed.take() {
                            tell(cluster, index, told::vitals(about.as_ref(), &state));
                        }
                        continue;
                    }
                    state = tokio::time::timeout(silence, states.message()) => Some(state),
                    () = cluster.news_wanted(index), if told.is_none() => None,
                };
                match wanted {
                    // A new stream begins with a fresh state.
                    None => break String::new(),
                    Some(Err(_)) => break format!("the agent was silent for {} ms", silence.as_millis()),
                    Some(Ok(Err(refusal))) => break grpc::told(&refusal),
                    Some(Ok(Ok(None))) => break "the agent ended".to_owned(),
                    Some(Ok(Ok(Some(mut state)))) => {
                        let turns: Vec<_> = std::mem::take(&mut state.turns).into_iter().map(rpc::told).collect();
                        cluster.tell_turns(index, state.forgets_turns, &turns);
                        if state.only_turns {
                            tell_others(cluster, index, state.others);
                            continue;
                        }
                        if std::mem::take(&mut is_first) {
                            compare_clocks(cluster, index, &state);
                        }
                        tell(cluster, index, told::vitals(about.as_ref(), &state));
                        undescribed = describing.is_some().then(|| figures(&state));
                        let is_online = state.online;
                        let now = Instant::now();
                        let since = now.checked_sub(AGENT_LAG).unwrap_or(now);
                        let is_whole = known.take(state, cluster, index, since, config.check_failures.get());
                        if let Some(round) = told.take_if(|_| is_online && is_whole) {
                            cluster.round_ends(index, round);
                        }
                    }
                }
            },
        };
        if let Some(round) = told {
            cluster.round_ends(index, round);
        }
        if error.is_empty() {
            continue;
        }
        // Whoever answers next may be another, or of another version.
        about = None;
        tell_others(cluster, index, 0);
        if refused {
            // Once is enough: it answers, and says no.
            cluster.check_failed(index, error, 1);
            let (shortest, usual) = REFUSED;
            tokio::time::sleep(shortest).await;
            let _ = tokio::time::timeout(usual, cluster.news_wanted(index)).await;
            continue;
        }
        cluster.check_failed(index, error, failures);
        // For one that dials in it is waited until it does.
        let pause = if agent.is_guest() { SHORTEST } else { jittered(config.check_interval_ms.time()) / 5 };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = cluster.news_wanted(index) => tokio::time::sleep(SHORTEST).await,
        }
    }
}

/// What an agent says of itself, when it says so; never, if it is not asked.
async fn described(describing: &mut Option<grpc::Describing>) -> Option<DescribeResponse> {
    match describing {
        Some(describing) => describing.await.ok().flatten(),
        None => std::future::pending().await,
    }
}

/// A state without its models.
fn figures(state: &ServerState) -> ServerState {
    let (models, loaded) = (Vec::new(), Vec::new());
    ServerState { models, loaded, ..state.clone() }
}

/// Says that the clock of another machine differs from ours. Nothing here goes by it; certificates and their ends do.
fn compare_clocks(cluster: &Cluster, index: usize, state: &ServerState) {
    let Some(ahead) = told::clock_ahead(state.heartbeat_ms, unix_ms_now()) else { return };
    if ahead.unsigned_abs() >= CLOCKS_DIFFER
        && let Some(server) = cluster.snapshot().servers.get(index)
    {
        tracing::warn!(
            server = %server.id, ahead_seconds = ahead / 1000,
            "the clocks of this machine and of a server's differ: certificates may be refused, and times in lists are not \
             comparable; set the clocks, by NTP for instance"
        );
    }
}

/// Takes in how a machine is, and what others have it do.
fn tell(cluster: &Cluster, index: usize, vitals: Vitals) {
    tell_others(cluster, index, vitals.others);
    cluster.tell_vitals(index, vitals);
}

fn tell_others(cluster: &Cluster, index: usize, others: u32) {
    if let Some(server) = cluster.snapshot().servers.get(index) {
        server.load.tell_others(others.min(told::MOST_CALLS));
    }
}

fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.9 + 0.2 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_quiet_is_asked_ever_less_often() {
        let longest = Duration::from_secs(5);
        let mut pause = next_pause(longest, false, longest);
        let mut pauses = vec![pause.as_millis()];
        for _ in 0..5 {
            pause = next_pause(pause, true, longest);
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 5000, 5000]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_answer_is_waited_for_beside_the_others() {
        let turns = Arc::new(Turns::default());
        let begun = Instant::now();
        for _ in 0..AT_ONCE {
            let turns = turns.clone();
            tokio::spawn(async move { turns.run(std::future::pending::<()>()).await });
        }
        while turns.0.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        turns.run(std::future::ready(())).await;
        assert!((TURN..PATIENCE).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }
}
