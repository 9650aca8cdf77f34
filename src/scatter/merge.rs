//! Lists of several servers as one: models, loaded models, versions, and the status.
//!
//! Entries are joined as the bytes that the servers sent, so that fields of tomorrow's Ollama come through. Servers are asked
//! live, all of a few and of many those who are [`needed`](super::needed); who is silent for a second is left out and named.

use std::collections::HashMap;

use bytes::Bytes;
use futures_util::future::join_all;
use http::StatusCode;
use olol_middleware::cluster::Bits;
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Error, ModelName, Reply, Route, Server};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::needed::Cover;
use super::{LONGEST, MERGE_LIMIT, NATIVE, Scatter, is_head, json_reply};
use crate::status::in_order;

/// So often servers are asked for a list: who is silent may have to be replaced.
const ROUNDS: usize = 2;

impl<F: Fleet> Scatter<F> {
    /// Asks the servers and joins what they say.
    pub(super) async fn merged(self, mut call: Call) -> Result<Reply, Error> {
        let needed = &self.shared.needed;
        if needed.look(&self.shared.cluster, call.candidates.snapshot()).await {
            call.candidates.renew(self.shared.cluster.snapshot());
        }
        let snapshot = call.candidates.snapshot().clone();
        let servers = &snapshot.servers;
        let mut absent = Bits::default();
        if servers.iter().any(|server| server.is_reachable()) {
            absent.extend(servers.iter().filter(|server| !server.is_reachable()));
        }
        let mut left_out = absent.clone();
        let mut bodies: Vec<(usize, Bytes)> = Vec::new();
        let mut cover = None;
        for _ in 0..ROUNDS {
            let (asked, known) = needed.of(call.route, &snapshot, &left_out);
            cover = cover.or(known);
            let answers = join_all(asked.iter().filter_map(|index| servers.get(index)).map(|server| {
                let call = call.again();
                let scatter = &self;
                let asking = async move { scatter.list(call?, server).await };
                async move { (server.index, tokio::time::timeout(MERGE_LIMIT, asking).await.ok().flatten()) }
            }));
            let mut is_whole = true;
            for (index, answer) in answers.await {
                left_out.insert(index);
                if let Some(body) = answer {
                    bodies.push((index, body));
                } else {
                    absent.insert(index);
                    is_whole = false;
                }
            }
            // What somebody was to tell who is silent, others may have.
            if is_whole {
                break;
            }
        }
        if bodies.is_empty() {
            return Err(Error::NoServer("no server answered within a second".to_owned()));
        }
        bodies.sort_unstable_by_key(|(index, _)| *index);
        let absent = absent.iter().filter_map(|index| Some(servers.get(index)?.id.clone())).collect();
        let parts: Vec<Bytes> = bodies.into_iter().map(|(_, body)| body).collect();
        let cover = cover.as_deref();
        let mut reply = match call.route {
            Route::Version => json_reply(StatusCode::OK, NATIVE, lowest_version(&parts)),
            Route::V1Models => json_reply(StatusCode::OK, "application/json", models_v1(&parts)),
            Route::Ps => json_reply(StatusCode::OK, NATIVE, list(&parts, Order::Expiry, None)),
            _ => json_reply(StatusCode::OK, NATIVE, list(&parts, Order::Modified, cover)),
        };
        reply.body.outcome_mut().absent = absent;
        if is_head(&call) {
            // As from a server: the length of a long list is not said.
            let length = reply.body.length().filter(|length| *length < 2048);
            reply.body = olol_middleware::call::Body::empty();
            if let Some(length) = length {
                reply.headers.insert(http::header::CONTENT_LENGTH, http::HeaderValue::from(length));
            }
        }
        Ok(reply)
    }

    /// The list of one server; `None` if it has none to give.
    async fn list(&self, call: Call, server: &Server) -> Option<Bytes> {
        let call = if is_head(&call) { as_get(call) } else { call };
        let reply = self.to(call, server).await.ok().filter(|reply| reply.status.is_success())?;
        reply.body.collect(LONGEST).await.ok()
    }
}

/// The same call as a GET: the length of a merged list cannot be known without the lists.
fn as_get(mut call: Call) -> Call {
    call.edits_mut().method = Some(http::Method::GET);
    call
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// Newest first.
    Modified,
    /// Latest expiry first.
    Expiry,
}

#[derive(Deserialize)]
struct Models<'a> {
    #[serde(borrow)]
    models: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct DataList<'a> {
    #[serde(borrow)]
    data: Option<Vec<&'a RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Key {
    name: String,
    id: String,
    digest: String,
    modified_at: String,
    expires_at: String,
    created: i64,
}

/// `/api/tags` and `/api/ps`: each model once, in Ollama's order.
fn list(bodies: &[Bytes], order: Order, cover: Option<&Cover>) -> String {
    let lists: Vec<Models<'_>> = bodies.iter().filter_map(|body| serde_json::from_slice(body).ok()).collect();
    let entries = lists.iter().flat_map(|list| list.models.iter().flatten()).copied();
    let mut kept = distinct(entries, |key| key.name.as_str(), cover);
    // Times are compared as text: one writer, one zone, and what differs in precision differs below a second.
    kept.sort_by(|(a, _), (b, _)| match order {
        Order::Modified => stamp(&b.modified_at).cmp(stamp(&a.modified_at)),
        Order::Expiry => stamp(&b.expires_at).cmp(stamp(&a.expires_at)),
    });
    let items: Vec<&str> = kept.iter().map(|(_, raw)| raw.get()).collect();
    format!("{{\"models\":[{}]}}", items.join(","))
}

/// `/v1/models`, with the line feed at its end.
fn models_v1(bodies: &[Bytes]) -> String {
    let lists: Vec<DataList<'_>> = bodies.iter().filter_map(|body| serde_json::from_slice(body).ok()).collect();
    let entries = lists.iter().flat_map(|list| list.data.iter().flatten()).copied();
    let mut kept = distinct(entries, |key| key.id.as_str(), None);
    kept.sort_by_key(|(key, _)| std::cmp::Reverse(key.created));
    let items: Vec<&str> = kept.iter().map(|(_, raw)| raw.get()).collect();
    let data = if items.is_empty() { "null".to_owned() } else { format!("[{}]", items.join(",")) };
    format!("{{\"object\":\"list\",\"data\":{data}}}\n")
}

/// Each model once. Of several with one name the one that most servers have, as far as that is known before or seen here, else
/// the first.
fn distinct<'a>(
    entries: impl Iterator<Item = &'a RawValue>,
    name: impl Fn(&Key) -> &str,
    cover: Option<&Cover>,
) -> Vec<(Key, &'a RawValue)> {
    let entries: Vec<(Key, &RawValue)> =
        entries.filter_map(|raw| Some((serde_json::from_str::<Key>(raw.get()).ok()?, raw))).collect();
    // What is being copied has no name yet.
    let entries: Vec<_> = entries.into_iter().filter(|(key, _)| !ModelName::is_unfinished(name(key))).collect();
    let mut counts: HashMap<(String, &str), usize> = HashMap::new();
    let canonical =
        |key: &Key| ModelName::parse(name(key)).map_or_else(|| name(key).to_owned(), |name| name.to_string());
    for (key, _) in &entries {
        *counts.entry((canonical(key), &key.digest)).or_default() += 1;
    }
    if let Some(cover) = cover {
        for ((name, digest), count) in &mut counts {
            let usual = ModelName::parse(name).and_then(|name| Some(cover.digest(&name)? == *digest));
            if usual == Some(true) {
                *count = usize::MAX;
            }
        }
    }
    let mut best: HashMap<String, (usize, usize)> = HashMap::new();
    for (at, (key, _)) in entries.iter().enumerate() {
        let count = counts[&(canonical(key), key.digest.as_str())];
        let entry = best.entry(canonical(key)).or_insert((at, count));
        if count > entry.1 {
            *entry = (at, count);
        }
    }
    let chosen: Vec<bool> = entries.iter().enumerate().map(|(at, (key, _))| best[&canonical(key)].0 == at).collect();
    entries.into_iter().zip(chosen).filter(|(_, chosen)| *chosen).map(|(entry, _)| entry).collect()
}

/// A time to the second, without its zone: enough to order what one clock wrote.
fn stamp(time: &str) -> &str {
    time.get(..19).unwrap_or(time)
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

/// The lowest version: what every server can do.
fn lowest_version(bodies: &[Bytes]) -> Bytes {
    let order = |body: &Bytes| {
        in_order(&serde_json::from_slice::<Version>(body).map(|version| version.version).unwrap_or_default())
    };
    bodies.iter().min_by_key(|body| order(body)).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(texts: &[&'static str]) -> Vec<Bytes> {
        texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect()
    }

    #[test]
    fn models_of_all_servers_are_listed_once_newest_first() {
        let merged = list(
            &bytes(&[
                r#"{"models":[{"name":"old","digest":"1","modified_at":"2026-01-01T00:00:00Z","new_field":7}]}"#,
                r#"{"models":[{"name":"New:latest","digest":"2","modified_at":"2026-02-01T00:00:00Z"},{"name":"old:latest","digest":"1","modified_at":"2025-01-01T00:00:00Z"}]}"#,
            ]),
            Order::Modified,
            None,
        );
        assert_eq!(
            merged,
            r#"{"models":[{"name":"New:latest","digest":"2","modified_at":"2026-02-01T00:00:00Z"},{"name":"old","digest":"1","modified_at":"2026-01-01T00:00:00Z","new_field":7}]}"#
        );
    }

    #[test]
    fn a_copy_that_is_not_finished_is_not_listed() {
        let one =
            r#"{"models":[{"name":"127.0.0.1:40000/olol-copy-0a/m:latest","digest":"1"},{"name":"m","digest":"1"}]}"#;
        assert_eq!(list(&bytes(&[one]), Order::Modified, None), r#"{"models":[{"name":"m","digest":"1"}]}"#);
    }

    #[test]
    fn of_two_digests_the_more_common_one_is_shown() {
        let one = r#"{"models":[{"name":"m","digest":"1"}]}"#;
        let two = r#"{"models":[{"name":"m","digest":"2"}]}"#;
        assert_eq!(list(&bytes(&[one, two, two]), Order::Modified, None), two);
    }

    #[test]
    fn empty_lists_look_like_ollamas() {
        assert_eq!(list(&bytes(&[r#"{"models":[]}"#, r#"{"models":null}"#]), Order::Expiry, None), r#"{"models":[]}"#);
        assert_eq!(models_v1(&bytes(&[r#"{"object":"list","data":null}"#])), "{\"object\":\"list\",\"data\":null}\n");
    }

    #[test]
    fn the_lowest_version_is_what_all_can_do() {
        let versions = bytes(&[r#"{"version":"0.33.0"}"#, r#"{"version":"0.9.10"}"#, r#"{"version":"0.33.0-rc2"}"#]);
        assert_eq!(lowest_version(&versions), versions[1]);
        assert_eq!(lowest_version(&[versions[0].clone(), versions[2].clone()]), versions[2]);
    }
}
