//! The words for what was decided.

use http::HeaderValue;

/// What a conversation was known by: a label of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A header.
    Header,
    /// A name in the body.
    Body,
    /// Its messages.
    Chain,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Header, Self::Body, Self::Chain];

    /// The word for notes and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Body => "body",
            Self::Chain => "chain",
        }
    }
}

/// What became of a call: a label of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It went where its history is.
    Hit,
    /// Nobody was known to have its history.
    Miss,
    /// The server that has its history has more than its share, so it went elsewhere.
    Spill,
    /// The server that has its history could not be asked, so it went elsewhere.
    Repin,
    /// It has no history that can be known.
    None,
}

impl Placed {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Hit, Self::Miss, Self::Spill, Self::Repin, Self::None];

    /// The word for notes and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Spill => "spill",
            Self::Repin => "repin",
            Self::None => "none",
        }
    }

    /// The value of the `X-Olol-Decision` header.
    pub(super) fn header(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Hit => "affinity-hit",
            Self::Miss => "affinity-miss",
            Self::Spill => "affinity-spill",
            Self::Repin => "affinity-repin",
            Self::None => "affinity-none",
        })
    }
}
