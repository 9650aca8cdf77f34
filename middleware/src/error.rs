//! What can go wrong on the way of a call: one enum, and what each of its variants means to the outside.

use http::StatusCode;

use crate::names::ServerId;

/// Any error, boxed.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How far a call had come at a server when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No connection could be made: the server has seen nothing.
    Connecting,
    /// The call was on its way or delivered, but no head of an answer has come.
    Waiting,
    /// The answer broke off.
    Streaming,
}

impl Phase {
    /// The word for logs, labels and the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Waiting => "waiting",
            Self::Streaming => "streaming",
        }
    }

    /// Reads the word back.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Connecting, Self::Waiting, Self::Streaming].into_iter().find(|phase| phase.as_str() == word)
    }
}

/// Why a call has no answer of a server, or only a part of one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server could not be reached, or it broke off.
    #[error("server {server} failed while {}: {source}", phase.as_str())]
    Server {
        /// Who failed.
        server: ServerId,
        /// How far the call had come.
        phase: Phase,
        /// Whether it failed on a connection that had been used before.
        reused: bool,
        /// The transport's own words.
        source: BoxError,
    },
    /// Nobody is left who could be asked.
    #[error("no server can answer now: {0}")]
    NoServer(String),
    /// Every server that could answer has all its slots taken.
    #[error("server busy, please try again.  maximum pending requests exceeded")]
    Busy,
    /// The call came back to us over a server that is this very proxy.
    #[error("the request has passed through this proxy before: a server in --servers leads back to it")]
    Loop,
    /// The client's own body broke off or came too slowly.
    #[error("the request body ended early: {0}")]
    Body(BoxError),
    /// There is no room to keep what the client sends.
    #[error("{0}")]
    Storage(String),
    /// Nobody here can do what was asked; the text says who could.
    #[error("{0}")]
    Unsupported(String),
    /// A defect of ours, caught.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// The status of an answer that tells of this error.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Server { .. } => StatusCode::BAD_GATEWAY,
            Self::NoServer(_) | Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::Loop => StatusCode::LOOP_DETECTED,
            Self::Body(_) => StatusCode::BAD_REQUEST,
            Self::Storage(_) => StatusCode::INSUFFICIENT_STORAGE,
            Self::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The machine code of this error: the `X-Olol-Reason` header and the metrics label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Server { phase: Phase::Connecting, .. } => "server-unreachable",
            Self::Server { phase: Phase::Waiting, .. } => "server-failed",
            Self::Server { phase: Phase::Streaming, .. } => "stream-broken",
            Self::NoServer(_) => "no-server",
            Self::Busy => "busy",
            Self::Loop => "loop",
            Self::Body(_) => "client-body",
            Self::Storage(_) => "storage",
            Self::Unsupported(_) => "unsupported",
            Self::Internal(_) => "internal",
        }
    }

    /// Whether the same call may be sent again: only before the first byte of an answer.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Server { phase: Phase::Connecting | Phase::Waiting, .. })
    }

    /// The server that failed, if one did.
    pub fn server(&self) -> Option<&ServerId> {
        match self {
            Self::Server { server, .. } => Some(server),
            _ => None,
        }
    }
}
