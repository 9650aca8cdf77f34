//! OLOL: many Ollama servers behind one address that behaves exactly like one Ollama server.
//!
//! This is the program as a library: a [`proxy::Proxy`], the [`agent::Agent`] that stands beside an Ollama, and what they are
//! made of. The layers that a call passes are in the crate `olol-middleware`, the wire contract is in `olol-proto`.
//!
//! | module | what it does |
//! |---|---|
//! | [`serve`] | takes connections |
//! | [`api`] | HTTP to a call, a reply to HTTP |
//! | [`scatter`] | calls that concern several servers |
//! | [`keys`] | the file of keys |
//! | [`security`] | who belongs to the cluster |
//! | [`watch`] | tells when a file has changed |
//! | [`pool`] | the servers as services |
//! | [`discovery`] | who the servers are |
//! | [`models`] | where models are and should be, and how they come there |
//! | [`ollama`] | how to talk to an Ollama |
//! | [`rpc`] | the gRPC face |
//! | [`sessions`] | conversations whose history is kept here |
//! | [`state`] | what several proxies share in a Redis or a Valkey |
//! | [`config`] | what stands in the file, where it comes from, what is wrong with it |
//! | [`reload`] | a new configuration without a restart |
//! | `engine` | llama.cpp as a small Ollama, in a child process (feature `engine`) |

pub mod agent;
pub mod api;
pub mod cli;
pub mod config;
mod dial;
pub mod discovery;
#[cfg(feature = "engine")]
pub mod engine;
mod files;
pub mod keys;
pub mod models;
#[cfg(test)]
mod noise;
pub mod ollama;
pub mod pool;
pub mod proxy;
pub mod reload;
pub mod rpc;
pub mod scatter;
pub mod security;
pub mod serve;
pub mod sessions;
pub mod state;
pub mod status;
pub mod telemetry;
pub mod watch;
