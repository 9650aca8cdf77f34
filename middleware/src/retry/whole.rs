//! Answers in one piece: nothing of them is passed on before all of it is here, so that a server that dies while it sends
//! one has died before the first byte.

use bytes::Bytes;
use futures_util::StreamExt;
use smallvec::SmallVec;

use crate::call::{Body, Chunk, Reply};
use crate::error::Error;

/// The longest answer that is held back, bytes; of longer ones this much.
pub(super) const LONGEST: usize = 256 << 10;

/// An answer that has begun to come.
pub(super) struct Begun {
    /// The answer as it was.
    pub(super) reply: Reply,
    /// Its first piece.
    pub(super) first: Bytes,
    /// The word for the error by which it broke off.
    pub(super) broken: Option<&'static str>,
}

/// Waits for the whole answer, or for as much of it as may be held.
pub(super) async fn begin(mut reply: Reply) -> Begun {
    let mut chunks: SmallVec<[Result<Chunk, Error>; 2]> = SmallVec::new();
    let (length, mut come) = (reply.body.length(), 0);
    let mut broken = None;
    while Some(come as u64) != length && come < LONGEST && broken.is_none() {
        let Some(next) = reply.body.next().await else { break };
        match &next {
            Ok(chunk) => come += chunk.bytes.len(),
            Err(error) => broken = Some(error.kind()),
        }
        chunks.push(next);
    }
    let first = chunks.first().and_then(|chunk| Some(chunk.as_ref().ok()?.bytes.clone())).unwrap_or_default();
    let outcome = reply.body.outcome().clone();
    let chunks = futures_util::stream::iter(chunks);
    let mut body =
        if broken.is_some() { Body::new(chunks) } else { Body::new(chunks.chain(reply.body)) }.with_length(length);
    *body.outcome_mut() = outcome;
    Begun { reply: Reply { body, ..reply }, first, broken }
}
