//! The path of a call, from the edge of the proxy to a server: each concern a tower layer, free of transports.
//!
//! What a call meets, in the default order:
//!
//! | layer | file | what it does |
//! |---|---|---|
//! | `trace` | [`trace`] | tells the log what was asked and how it ended |
//! | `metrics` | [`metrics`](mod@metrics) | counts and times |
//! | `auth` | [`auth`] | finds the client's key, and refuses what it may not do |
//! | `rate-limit` | [`rate_limit`] | holds clients to what they may use |
//! | `timeout` | [`timeout`] | gives up on what takes too long |
//! | `alias` | [`alias`] | puts models in the place of names, and follows the operator's rules for servers |
//! | `queue` | [`queue`] | lets calls wait for a slot, in a fair order |
//! | `quant-fallback` | [`quant_fallback`] | serves a model in another quantization where that one is not there |
//! | `model-route` | [`model_route`] | narrows the candidates to those that have the model |
//! | `affinity` | [`affinity`] | has a conversation go on where its history is cached |
//! | `hedge` | [`hedge`] | asks a second server when the first is late with a short answer |
//! | `retry` | [`retry`] | asks another server when one fails, and lets a stream go on there |
//! | `distribute` | [`distribute`] | finds the models that belong on a group of workers |
//! | | [`pick`] | the leaf: takes the cheapest of the candidates and a slot on it |
//!
//! What several of them use: [`rename`] asks for another model and lets the answer keep the client's name, [`tiers`] says
//! which servers come first, [`pattern`] is how the configuration names things, [`circuit`] tells whom to leave alone,
//! [`budget`] keeps second tries to a share of the traffic.
//!
//! Layers narrow, pick chooses. [`stack`] is the only file that knows all layers; [`shared`] holds what must outlive a stack.

pub mod affinity;
pub mod alias;
pub mod auth;
pub mod budget;
pub mod call;
pub mod circuit;
pub mod clients;
pub mod cluster;
pub mod distribute;
pub mod error;
mod form;
pub mod hedge;
pub mod instruments;
pub mod json;
pub mod judge;
pub mod keys;
pub mod listing;
pub mod metrics;
pub mod model_route;
pub mod modelfile;
pub mod names;
pub mod pattern;
pub mod peek;
pub mod pick;
pub mod place;
pub mod progress;
pub mod quant_fallback;
pub mod queue;
pub mod rate_limit;
pub mod rename;
pub mod retry;
pub mod route;
pub mod runner;
pub mod shared;
pub mod slots;
pub mod stack;
pub mod stats;
pub mod tiers;
pub mod time;
pub mod timeout;
pub mod trace;
pub mod trail;
pub mod units;
pub mod vitals;
pub mod window;

#[cfg(test)]
mod testing;

pub use call::{Call, Chunk, Counters, Edits, End, Head, Outcome, Payload, Place, Preferred, Reply, RequestId};
pub use cluster::{Candidates, Cluster, Server, Snapshot};
pub use error::{BoxError, Error, Phase};
pub use keys::{Key, Keys};
pub use names::{ModelName, ServerId};
pub use pattern::Pattern;
pub use peek::Peek;
pub use route::{Dialect, Route, Scope};
pub use shared::Shared;
pub use stack::Stack;
pub use trail::{Fact, Trail};

/// What a layer that has to wait returns.
pub type ReplyFuture = std::pin::Pin<Box<dyn Future<Output = Result<Reply, Error>> + Send>>;
