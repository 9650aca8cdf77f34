//! What can go wrong on the way of a call: one enum, and what each of its variants means to the outside.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::names::ServerId;
use crate::runner::Runner;

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

/// Where a client stands with one limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// What it may use in a period; of requests, what it may use at once.
    pub limit: u64,
    /// What is left of that.
    pub remaining: u64,
    /// When all of it is there again.
    pub reset: Duration,
}

impl Standing {
    /// Writes it into the headers of an answer: `X-RateLimit-Limit`, `-Remaining`, and `-Reset` in seconds.
    pub fn write(&self, headers: &mut HeaderMap) {
        const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
        const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
        const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
        headers.insert(LIMIT, number(self.limit));
        headers.insert(REMAINING, number(self.remaining));
        headers.insert(RESET, number(self.reset_seconds()));
    }

    /// Whole seconds until all of it is there again, rounded up.
    pub fn reset_seconds(&self) -> u64 {
        self.reset.as_secs() + u64::from(self.reset.subsec_nanos() > 0)
    }
}

/// A number as the value of a header. Small ones are made once: a value is an allocation, and http's own conversion two.
pub(crate) fn number(number: u64) -> HeaderValue {
    static SMALL: LazyLock<Box<[HeaderValue]>> = LazyLock::new(|| (0..1024).map(made).collect());
    fn made(number: u64) -> HeaderValue {
        HeaderValue::from_str(itoa::Buffer::new().format(number)).unwrap_or(HeaderValue::from_static("0"))
    }
    let small = usize::try_from(number).ok().and_then(|number| SMALL.get(number));
    small.cloned().unwrap_or_else(|| made(number))
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
    /// Every server that could answer has all its slots taken, in the words of an Ollama whose queue is full.
    #[error("server busy, please try again.  maximum pending requests exceeded")]
    Busy {
        /// The runners that are worth waiting for: `queue` waits for one of them. Empty if nobody may wait any longer.
        runners: Vec<Arc<Runner>>,
        /// When the client should ask again, as far as that is known.
        retry_after: Option<Duration>,
    },
    /// The client has shown no key, or one that is not known.
    #[error("{0}")]
    Unauthorized(String),
    /// The client's key does not allow this.
    #[error("{0}")]
    Forbidden(String),
    /// The client has used what it may use for now.
    #[error("rate limit reached: {what}; try again in {} s", retry_after.as_secs_f64().ceil())]
    RateLimited {
        /// Which limit: "60 requests a minute for key ada".
        what: String,
        /// When it may ask again.
        retry_after: Duration,
        /// The limit, what is left of it, and when it is whole again: the `X-RateLimit-*` headers.
        standing: Standing,
    },
    /// Something took longer than it may.
    #[error("timed out: {what} took longer than {} s", after.as_secs_f64())]
    Timeout {
        /// What took too long: "the first byte of the answer".
        what: &'static str,
        /// How long it might have taken.
        after: Duration,
    },
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
    /// Busy, and nothing is known of when that will be over.
    pub fn busy() -> Self {
        Self::Busy { runners: Vec::new(), retry_after: None }
    }

    /// The status of an answer that tells of this error.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Server { .. } => StatusCode::BAD_GATEWAY,
            Self::NoServer(_) | Self::Busy { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::RateLimited { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
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
            Self::Busy { .. } => "busy",
            Self::Unauthorized(_) => "unauthorized",
            Self::Forbidden(_) => "forbidden",
            Self::RateLimited { .. } => "rate-limited",
            Self::Timeout { .. } => "timeout",
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

    /// When the client should ask again: the `Retry-After` header.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } => Some(*retry_after),
            Self::Busy { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The server that failed, if one did.
    pub fn server(&self) -> Option<&ServerId> {
        match self {
            Self::Server { server, .. } => Some(server),
            _ => None,
        }
    }
}
