//! A cluster on loopback, made of fakes that do what a test says, with OLOL in front of it.
//!
//! A test says what the servers have and do, asks through OLOL as any client would, and looks at what came back, and at
//! what the servers saw:
//!
//! ```ignore
//! let cluster = Cluster::of(2).await;
//! cluster.server(0).has("tiny").dies_after(["Hel"]);
//! let olol = Olol::start(&cluster, "").await;
//! let answer = olol.chat("tiny", "hi").await;
//! assert_eq!(answer.said(), "Hel");
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`cluster`] | the servers, and the way to them: over HTTP, or over agents |
//! | [`server`] | a fake Ollama: what it has, what it does, what it saw |
//! | [`script`] | the steps of its answers, and the gates where they wait for the test |
//! | `serving` | how it serves its connections |
//! | [`olol`] | a proxy in front of a cluster, in this process |
//! | [`process`] | the built program, where its process is what matters |
//! | [`answers`], [`store`] | what it answers by itself, and from what |
//! | [`client`] | a client that sees every byte: chunks, header case, how a connection ended |
//! | [`keeper`] | an Ollama whose models are files, and a registry |
//! | [`ca`] | a CA, and certificates |
//! | [`grpc`] | a client that speaks gRPC |
//! | [`wire`] | HTTP/1.1 as bytes, for both sides |
//!
//! Nothing sleeps to let something happen: tests wait for events, and every wait ends in a failure after [`PATIENCE`].
//! Ports are the system's choice, and nothing leaves loopback.

#![allow(dead_code, unused_imports, unreachable_pub, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

pub mod answers;
pub mod ca;
pub mod client;
pub mod cluster;
pub mod grpc;
pub mod keeper;
pub mod olol;
pub mod process;
pub mod redis;
pub mod script;
pub mod server;
mod serving;
pub mod store;
pub mod wire;

use std::time::Duration;

pub use ca::Ca;
pub use client::{Answer, Connection, Ending, Request};
pub use cluster::{Cluster, Way};
pub use keeper::{Hub, Keeper};
pub use olol::Olol;
pub use process::Process;
pub use script::{Gate, Seen, Step};
pub use server::Server;

/// The longest that a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something, and fails with its name when it does not happen.
pub async fn patiently<T>(what: &str, happens: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, happens).await;
    waited.unwrap_or_else(|_| panic!("{what}: not within {} s", PATIENCE.as_secs()))
}

/// Waits until something is true that nobody tells us of.
pub async fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let looking = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    patiently(what, looking).await;
}
