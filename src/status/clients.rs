//! The page of the clients: who asks, with which program, how much, and what their keys allow.

use std::sync::Arc;

use olol_middleware::clients::{Client, Clients, Who};
use olol_middleware::rate_limit::Limits;
use olol_middleware::{Key, Keys};
use serde::Serialize;

use super::page::Wanted;
use super::time::rfc3339;
use crate::config::Config;

/// One client.
#[derive(Debug, Serialize)]
pub(super) struct Entry {
    /// The name of its key, or a hash of its address.
    pub(super) client_id: String,
    /// How it is known: "key", "address".
    known_by: &'static str,
    /// What its last program calls itself, and the ones before.
    application_type: Option<Arc<str>>,
    applications: Vec<Arc<str>>,
    /// The family of its last request, and all that it has used.
    api_version: &'static str,
    api_versions: Vec<&'static str>,
    /// Since when it is remembered.
    connected_at: String,
    last_seen: String,
    requests: u64,
    in_flight: u32,
    prompt_tokens: u64,
    output_tokens: u64,
    preferences: Option<Policy>,
}

/// What a key allows, and what the configuration says of it.
#[derive(Debug, Serialize)]
struct Policy {
    /// Patterns of models; nothing: all.
    models: Option<Vec<String>>,
    may: String,
    admin: bool,
    priority: &'static str,
    strict_quant: bool,
    /// Its own, or those of every key.
    limits: Limits,
    expires: Option<String>,
    /// The rules that name it.
    routes: Vec<String>,
    /// The servers that get credentials of its own.
    credentials_for: Vec<String>,
}

/// The clients of a page, by id, and whether there are more.
pub(super) fn page(clients: &Clients, keys: &Keys, wanted: &Wanted, config: &Config) -> (Vec<Entry>, usize, bool) {
    let all: Vec<(String, Arc<Client>)> =
        clients.all().into_iter().map(|client| (client.who().to_string(), client)).collect();
    let total = all.len();
    let (chosen, has_more) = wanted.cut(all, |(one, _), (other, _)| one.cmp(other), |(id, _), cursor| **id > *cursor);
    (chosen.into_iter().map(|(id, client)| entry(id, &client, keys, config)).collect(), total, has_more)
}

fn entry(id: String, client: &Client, keys: &Keys, config: &Config) -> Entry {
    let applications = client.applications().to_vec();
    let (prompt_tokens, output_tokens) = client.tokens();
    let key = match client.who() {
        Who::Key(name) => keys.named(name),
        Who::Address(_) | Who::Nowhere => None,
    };
    Entry {
        client_id: id,
        known_by: if matches!(client.who(), Who::Key(_)) { "key" } else { "address" },
        application_type: applications.first().cloned(),
        applications,
        api_version: client.family().as_str(),
        api_versions: client.families().map(olol_middleware::clients::Family::as_str).collect(),
        connected_at: rfc3339(client.first_seen()),
        last_seen: rfc3339(client.last_seen()),
        requests: client.requests(),
        in_flight: client.in_flight(),
        prompt_tokens,
        output_tokens,
        preferences: key.map(|key| policy(&key, config)),
    }
}

fn policy(key: &Key, config: &Config) -> Policy {
    let names_it = |rule: &&olol_middleware::alias::Rule| rule.keys.iter().any(|pattern| pattern.matches(&key.name));
    let routes = config.alias.rules.iter().enumerate().filter(|(_, rule)| names_it(rule));
    let mut credentials_for: Vec<String> = key.outbound.keys().map(ToString::to_string).collect();
    credentials_for.sort_unstable();
    Policy {
        models: key.models.as_ref().map(|models| models.iter().map(ToString::to_string).collect()),
        may: key.may.to_string(),
        admin: key.admin,
        priority: key.priority.as_str(),
        strict_quant: key.strict_quant,
        limits: key.limits.unwrap_or(config.rate_limit.key),
        expires: key.expires.map(rfc3339),
        routes: routes.map(|(at, rule)| rule.title(at)).collect(),
        credentials_for,
    }
}
