//! A server as somebody named it, and in which states it can be.

use std::num::NonZeroU32;

use super::MOST_SERVERS;
use crate::names::ServerId;

/// A server as somebody named it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub id: ServerId,
    /// How much more it gets than a server of weight one.
    pub weight: NonZeroU32,
    /// Who named it.
    pub source: Source,
}

/// How a server became a member: who counts more first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The configuration names it.
    #[default]
    Static,
    /// A name of the configuration stands for it.
    Dns,
    /// Its agent dialled in, and has proved that it knows the token of the cluster.
    Joined,
    /// It announced itself by multicast DNS.
    Mdns,
    /// It answered a scan of the network.
    Scan,
    /// An Ollama without an agent that answered a scan, where the operator wants those to be used.
    ScannedOllama,
    /// The agent of this machine, where nobody has named a server.
    Local,
}

impl Source {
    /// The word for status pages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Dns => "dns",
            Self::Joined => "joined",
            Self::Mdns => "mdns",
            Self::Scan | Self::ScannedOllama => "scan",
            Self::Local => "local",
        }
    }

    /// Whether nobody of ours has named it: it has found us, or we it. Such a server is used only once it has proved that it
    /// is of the cluster, at the very address at which it is reached.
    pub fn is_discovered(self) -> bool {
        matches!(self, Self::Mdns | Self::Scan)
    }
}

/// No more servers can become members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MOST_SERVERS} servers have been members of this process: no other can join before it is restarted")]
pub struct Full;

/// Whether a server takes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody has asked it yet.
    Unknown,
    /// It answers.
    Up,
    /// It does not answer.
    Down,
}

impl State {
    /// The word for status pages and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// How a server is, as people are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nobody has asked it yet.
    Unknown,
    /// All is well.
    Up,
    /// It answers, but checks or calls have failed lately.
    Degraded,
    /// It finishes what it has.
    Draining,
    /// It does not answer.
    Down,
}

impl Condition {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Degraded => "degraded",
            Self::Draining => "draining",
            Self::Down => "down",
        }
    }
}
