//! A turn of a conversation as proxies tell each other of it, by way of the agents that answer.
//!
//! An agent keeps what comes with the calls and tells it to whoever watches it, so that every proxy knows which server has
//! which history, whoever has sent it there. It is nothing but numbers: hashes of what was said, made with a key that the
//! members of a cluster share, so that nobody else can try guesses on them.

use smallvec::SmallVec;

/// The links of one turn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// The longest link that was known before.
    pub known: Option<u64>,
    /// Whether the conversation went on from there.
    pub goes_on: bool,
    /// The links that are new, the longest first.
    pub news: SmallVec<[u64; 4]>,
}

/// The most links of one turn that are believed: no chain that we make has more.
const MOST: usize = 128;

impl Turn {
    /// A turn that somebody has told of, cut to what one can be.
    pub fn told(known: u64, goes_on: bool, news: impl IntoIterator<Item = u64>) -> Self {
        Self { known: (known != 0).then_some(known), goes_on, news: news.into_iter().take(MOST).collect() }
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.known.is_none() && self.news.is_empty()
    }

    /// How many links it has.
    pub fn len(&self) -> usize {
        self.news.len() + usize::from(self.known.is_some())
    }
}
