//! What is told of the proxy itself: where it listens, how it picks servers, and how it looks after them. No secrets: of the
//! headers in rules only the names.

use std::collections::BTreeMap;

use olol_middleware::stack::Concern;
use olol_middleware::{Pattern, Snapshot};
use serde_json::{Value, json};

use super::About;
use crate::config::Config;

/// Rules and names that are listed, and servers with a weight.
const LISTED: usize = 1000;

/// Everything about the proxy that is not the servers', the models' or the clients'.
pub(super) fn all(snapshot: &Snapshot, about: &About) -> Value {
    let running = about.running.state();
    let config = &running.config;
    let mut proxy = super::identity(about);
    let balancer = json!({
        "server_weights": weights(snapshot),
        "routing_rules": rules(config),
        "timeout_rules": config.timeout.rules.len(),
        "slot_rules": config.pick.slots.len(),
    });
    let mut load_balancer = balancing(config);
    merge(&mut load_balancer, balancer);
    merge(
        &mut proxy,
        json!({
            "stack": running.layers(),
            "config": super::config(&running, about),
            "load_balancer": load_balancer,
            "health_check": checking(config),
            "joining": joining(about),
            "limits": {
                "body_memory": config.limits.body_memory,
                "queue_requests": config.queue.max_requests,
                "queue_wait_seconds": config.queue.max_wait_s,
            },
        }),
    );
    proxy
}

/// The agents that dialled in and were not let in, the last one last.
fn joining(about: &About) -> Value {
    let refused = about.guests.refused().into_iter().map(|refused| {
        json!({
            "name": refused.name,
            "host": refused.address.to_canonical().to_string(),
            "reason": refused.reason,
            "at": super::time::rfc3339(refused.at),
            "times": refused.times,
        })
    });
    json!({"refused": refused.collect::<Vec<_>>()})
}

/// How servers are picked, in short.
pub(super) fn balancing(config: &Config) -> Value {
    let has = |concern: Concern| config.stack.order.layers().contains(&concern);
    let timeouts = has(Concern::Timeout).then_some(&config.timeout);
    json!({
        "algorithm": config.pick.policy.as_str(),
        "max_retries": if has(Concern::Retry) { config.retry.attempts.get() - 1 } else { 0 },
        // Seconds; 0 is no limit.
        "timeout": {
            "connect": config.pool.connect_timeout_ms.time().as_secs_f64(),
            "first_byte": timeouts.map(|timeout| timeout.first_byte_s),
            "unstreamed": timeouts.map(|timeout| timeout.unstreamed_s),
            "idle": timeouts.map(|timeout| timeout.idle_s),
            "total": timeouts.map(|timeout| timeout.total_s),
        },
        "sticky_sessions": has(Concern::Affinity),
    })
}

/// How servers are looked at.
pub(super) fn checking(config: &Config) -> Value {
    json!({
        "interval_seconds": config.pool.check_interval_ms.time().as_secs_f64(),
        "timeout_seconds": config.pool.check_timeout_ms.time().as_secs_f64(),
        "failures_to_be_down": config.pool.check_failures,
        "passes_to_be_up": 1,
        // Whatever checks say, by how calls went.
        "window_seconds": config.judge.window_s,
        "least_calls": config.judge.least_calls,
        "degraded_errors": config.judge.degraded_errors,
        "down_errors": config.judge.down_errors,
        "slow_factor": config.judge.slow_factor,
    })
}

/// Those that differ from one.
fn weights(snapshot: &Snapshot) -> BTreeMap<&str, u32> {
    let weights = snapshot.servers.iter().map(|server| (server.id.as_str(), server.weight.get()));
    weights.filter(|(_, weight)| *weight != 1).take(LISTED).collect()
}

fn rules(config: &Config) -> Value {
    let layers = config.stack.order.layers();
    if !layers.contains(&Concern::Alias) {
        return json!([]);
    }
    let texts = |patterns: &[Pattern]| patterns.iter().map(ToString::to_string).collect::<Vec<_>>();
    let servers = config.alias.rules.iter().enumerate().map(|(at, rule)| {
        let tiers: Vec<_> = rule.tiers.iter().map(|tier| texts(tier)).collect();
        json!({
            "rule": rule.title(at),
            "models": texts(&rule.models),
            "keys": texts(&rule.keys),
            "headers": rule.headers.keys().collect::<Vec<_>>(),
            "tiers": if tiers.is_empty() { vec![texts(&rule.servers)] } else { tiers },
            "mode": rule.mode,
            "weights": rule.weights.iter().map(|(server, weight)| (server.to_string(), weight.get())).collect::<BTreeMap<_, _>>(),
        })
    });
    let aliases = json!({"aliases": config.alias.models});
    servers.take(LISTED).chain([aliases]).collect()
}

/// Adds the members of another object.
pub(super) fn merge(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}
