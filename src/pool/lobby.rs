//! Connections of agents that have dialled in. They wait here until a line to the agent needs one: nobody can be dialled who
//! is behind a router.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use olol_middleware::BoxError;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::grpc::{self, Channel};
use crate::security::Tokens;
use crate::security::proof::{Dialled, Known};

/// Connections that wait. An agent keeps one ready; one more is there while another takes its place.
const MOST: usize = 2;

/// The connections of one agent that wait to be used. Clones are the same.
#[derive(Clone)]
pub struct Lobby(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    arrives: Notify,
}

struct State {
    /// Where the last of them came from.
    address: SocketAddr,
    waiting: VecDeque<Channel>,
}

/// A connection to an agent that has proved itself, and knows us.
pub struct Arrival {
    channel: Channel,
    /// Who it is.
    pub known: Known,
    /// Ends with the connection.
    pub ends: JoinHandle<()>,
}

/// Makes a connection for calls of one that was made by the agent: both prove themselves. `probe`: silence after which it is
/// probed, and after which a probe counts as lost.
pub async fn meet<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    dialled: Dialled,
    tokens: Option<&Tokens>,
    probe: Duration,
) -> Result<Arrival, BoxError> {
    let (channel, ends) = grpc::shake(stream, probe).await?;
    let known = grpc::introduce(&channel, dialled, tokens).await?;
    Ok(Arrival { channel, known, ends })
}

impl Lobby {
    /// An empty one, of an agent at this address.
    pub fn new(address: SocketAddr) -> Self {
        let state = State { address, waiting: VecDeque::new() };
        Self(Arc::new(Inner { state: Mutex::new(state), arrives: Notify::new() }))
    }

    /// Where its agent dialled in from last.
    pub fn address(&self) -> SocketAddr {
        self.state().address
    }

    /// Another connection waits here from now on. Of too many the one leaves that has waited longest.
    pub fn put(&self, arrival: Arrival, address: SocketAddr) -> JoinHandle<()> {
        let mut state = self.state();
        state.address = address;
        state.waiting.retain(|channel| !channel.is_closed());
        if state.waiting.len() >= MOST {
            state.waiting.pop_front();
        }
        state.waiting.push_back(arrival.channel);
        drop(state);
        self.0.arrives.notify_waiters();
        arrival.ends
    }

    /// Nobody waits here any more.
    pub fn close(&self) {
        self.state().waiting.clear();
    }

    /// One of those that wait, or the next that comes.
    pub(super) async fn take(&self) -> Channel {
        loop {
            let arrives = self.0.arrives.notified();
            tokio::pin!(arrives);
            arrives.as_mut().enable();
            if let Some(channel) = self.waiting() {
                return channel;
            }
            arrives.await;
        }
    }

    fn waiting(&self) -> Option<Channel> {
        let mut state = self.state();
        state.waiting.retain(|channel| !channel.is_closed());
        state.waiting.pop_front()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for Lobby {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Lobby {}

impl std::fmt::Debug for Lobby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lobby").field(&self.address()).finish()
    }
}
