//! Keeps what the cluster knows of one server true: listens to its agent, or asks a bare Ollama again and again.

use std::sync::Arc;
use std::time::Duration;

use olol_middleware::Cluster;
use tokio::time::Instant;

use super::{Backend, Config, grpc};
use crate::ollama::Ollama;

/// Shortest time between two rounds that somebody asked for.
const SHORTEST: Duration = Duration::from_millis(20);

/// How old what an agent tells may be: the longest that its look at its engine takes.
const AGENT_LAG: Duration = Duration::from_secs(3);

/// The shortest time, and the usual one, until a server that has refused us is asked again: nothing but a person mends that.
const REFUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// Runs until it is dropped.
pub(super) async fn keep_true(cluster: Arc<Cluster>, index: usize, backend: Arc<Backend>, config: Config) {
    match &*backend {
        Backend::Ollama(ollama) => ask(&cluster, index, ollama, &config).await,
        Backend::Agent(agent) => listen(&cluster, index, agent, &config).await,
    }
}

/// Asks a bare Ollama, at intervals and whenever somebody wants news.
async fn ask(cluster: &Cluster, index: usize, ollama: &Ollama, config: &Config) {
    let limit = config.check_timeout_ms.time();
    loop {
        let round = cluster.round_begins(index);
        look(cluster, index, ollama, limit, config.check_failures.get()).await;
        cluster.round_ends(index, round);
        ollama.sweep();
        tokio::time::sleep(SHORTEST).await;
        tokio::select! {
            () = tokio::time::sleep(jittered(config)) => {}
            () = cluster.news_wanted(index) => {}
        }
    }
}

async fn look(cluster: &Cluster, index: usize, ollama: &Ollama, limit: Duration, failures: u32) {
    let last = cluster.snapshot().servers.get(index).map(|server| server.report.clone()).unwrap_or_default();
    let begun = Instant::now();
    match tokio::time::timeout(limit, ollama.report(&last.loaded, limit / 2)).await {
        Ok(Ok(report)) => cluster.report_since(index, report, begun),
        Ok(Err(error)) => cluster.check_failed(index, error.to_string(), failures),
        Err(_) => cluster.check_failed(index, format!("no answer after {} ms", limit.as_millis()), failures),
    }
}

/// Listens to an agent, which speaks whenever something changes, and at least every second.
async fn listen(cluster: &Cluster, index: usize, agent: &grpc::Agent, config: &Config) {
    let silence = config.check_interval_ms.time().max(Duration::from_secs(2));
    loop {
        let round = cluster.round_begins(index);
        let (mut told, mut refused) = (Some(round), false);
        let error = match agent.watch(config.check_timeout_ms.time()).await {
            Err(error) => {
                refused = error.is::<grpc::Refused>();
                error.to_string()
            }
            Ok(mut states) => loop {
                let wanted = tokio::select! {
                    state = tokio::time::timeout(silence, states.message()) => Some(state),
                    () = cluster.news_wanted(index), if told.is_none() => None,
                };
                match wanted {
                    // A new stream begins with a fresh state.
                    None => break String::new(),
                    Some(Err(_)) => break format!("the agent was silent for {} ms", silence.as_millis()),
                    Some(Ok(Err(refusal))) => break refusal.message().to_owned(),
                    Some(Ok(Ok(None))) => break "the agent ended".to_owned(),
                    Some(Ok(Ok(Some(state)))) => match grpc::report(state) {
                        Ok(report) => {
                            let now = Instant::now();
                            cluster.report_since(index, report, now.checked_sub(AGENT_LAG).unwrap_or(now));
                            if let Some(round) = told.take() {
                                cluster.round_ends(index, round);
                            }
                        }
                        Err(reason) => cluster.check_failed(index, reason, config.check_failures.get()),
                    },
                }
            },
        };
        if let Some(round) = told {
            cluster.round_ends(index, round);
        }
        if error.is_empty() {
            continue;
        }
        if refused {
            // Once is enough: it answers, and says no.
            cluster.check_failed(index, error, 1);
            let (shortest, usual) = REFUSED;
            tokio::time::sleep(shortest).await;
            let _ = tokio::time::timeout(usual, cluster.news_wanted(index)).await;
            continue;
        }
        cluster.check_failed(index, error, config.check_failures.get());
        tokio::select! {
            () = tokio::time::sleep(jittered(config) / 5) => {}
            () = cluster.news_wanted(index) => tokio::time::sleep(SHORTEST).await,
        }
    }
}

fn jittered(config: &Config) -> Duration {
    config.check_interval_ms.time().mul_f64(0.9 + 0.2 * fastrand::f64())
}
