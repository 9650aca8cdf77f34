//! The tokens that a generate's answer gives to whoever goes on from it: the next call sends them as its `context`.
//!
//! A prompt comes back as tokens, so a conversation of this kind has nothing in its second turn that was seen in its first,
//! but in the answer to that. They are read as they pass by; nothing is kept of them but hashes.

use std::sync::Arc;

use super::chain::Tokens;
use super::table::Table;
use crate::call::{Chunk, End, Outcome, Watcher};
use crate::cluster::Server;

/// What stands before them. It cannot occur inside a JSON string, where its quotes would be escaped.
const KEY: &[u8] = b"\"context\":[";

/// Reads the tokens in a body.
pub(super) struct Listener {
    place: u64,
    table: Arc<Table>,
    server: Arc<Server>,
    state: State,
}

enum State {
    /// None so far; the last bytes, if a chunk ended in the midst of a line.
    Before(Vec<u8>),
    /// In the midst of them.
    Within(Tokens),
    /// All were read.
    After,
}

impl Listener {
    pub(super) fn new(place: u64, table: Arc<Table>, server: Arc<Server>) -> Self {
        Self { place, table, server, state: State::Before(Vec::new()) }
    }

    /// Looks for the beginning of the list; what of the chunk is in it.
    fn begin<'a>(place: u64, tail: &mut Vec<u8>, chunk: &'a [u8]) -> Option<(Tokens, &'a [u8])> {
        let found = memchr::memchr_iter(b'[', chunk).find(|at| {
            let before = &chunk[..=*at];
            let kept = KEY.len().saturating_sub(before.len());
            before.ends_with(&KEY[kept..]) && (kept == 0 || tail.ends_with(&KEY[..kept]))
        });
        if let Some(at) = found {
            return Some((Tokens::of_an_answer(place), &chunk[at + 1..]));
        }
        if chunk.ends_with(b"\n") {
            tail.clear();
        } else {
            tail.extend_from_slice(&chunk[chunk.len().saturating_sub(KEY.len())..]);
            tail.drain(..tail.len().saturating_sub(KEY.len()));
        }
        None
    }
}

impl Watcher for Listener {
    fn chunk(&mut self, chunk: &Chunk) {
        let mut rest = &chunk.bytes[..];
        if let State::Before(tail) = &mut self.state {
            let Some((tokens, after)) = Self::begin(self.place, tail, rest) else { return };
            self.state = State::Within(tokens);
            rest = after;
        }
        let State::Within(tokens) = &mut self.state else { return };
        let end = memchr::memchr(b']', rest);
        tokens.read(&rest[..end.unwrap_or(rest.len())]);
        if end.is_some()
            && let State::Within(tokens) = std::mem::replace(&mut self.state, State::After)
        {
            self.table.gave(tokens.finish().news(None), &self.server);
        }
    }

    fn end(&mut self, _end: End, _outcome: &Outcome) {}
}
