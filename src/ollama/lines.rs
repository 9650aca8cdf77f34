//! Gives each line of NDJSON and each event of SSE to the client in one piece.
//!
//! A reader of HTTP/1 sees no chunk borders: a chunk may come in parts. What is incomplete waits for its end, up to 1 MiB;
//! what is complete goes on as it came, without being copied.

use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap};

/// The most that waits for its end.
const LONGEST: usize = 1 << 20;

/// The lines of a piece of a body, each with its end.
pub(crate) fn lines_of(piece: &Bytes) -> Vec<Bytes> {
    let mut lines = Vec::new();
    let mut start = 0;
    for end in memchr::memchr_iter(b'\n', piece) {
        lines.push(piece.slice(start..=end));
        start = end + 1;
    }
    if start < piece.len() {
        lines.push(piece.slice(start..));
    }
    lines
}

/// Where a piece of a body may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Boundary {
    /// Anywhere.
    None,
    /// After a line feed: NDJSON.
    Line,
    /// After an empty line: server-sent events.
    Event,
}

impl Boundary {
    /// By the content type of an answer.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        match headers.get(header::CONTENT_TYPE).map(http::HeaderValue::as_bytes) {
            Some(kind) if kind.starts_with(b"application/x-ndjson") => Self::Line,
            Some(kind) if kind.starts_with(b"text/event-stream") => Self::Event,
            _ => Self::None,
        }
    }

    /// How many of these bytes are complete pieces. `from` is where the unseen bytes begin.
    fn complete(self, bytes: &[u8], from: usize) -> usize {
        match self {
            Self::None => bytes.len(),
            Self::Line => memchr::memrchr(b'\n', &bytes[from..]).map_or(0, |at| from + at + 1),
            Self::Event => {
                let from = from.saturating_sub(1);
                memchr::memmem::rfind(&bytes[from..], b"\n\n").map_or(0, |at| from + at + 2)
            }
        }
    }
}

/// Joins what belongs together.
#[derive(Debug)]
pub(super) struct Lines {
    boundary: Boundary,
    held: BytesMut,
}

impl Lines {
    pub(super) fn new(boundary: Boundary) -> Self {
        Self { boundary, held: BytesMut::new() }
    }

    /// Takes bytes as they come and returns what is complete.
    pub(super) fn push(&mut self, mut bytes: Bytes) -> Option<Bytes> {
        if self.held.is_empty() {
            let complete = self.boundary.complete(&bytes, 0);
            if complete < bytes.len() {
                self.held.extend_from_slice(&bytes.split_off(complete));
            }
            return self.bounded(bytes);
        }
        let from = self.held.len();
        self.held.extend_from_slice(&bytes);
        let complete = self.boundary.complete(&self.held, from);
        let complete = self.held.split_to(complete).freeze();
        self.bounded(complete)
    }

    /// What never came to its end.
    pub(super) fn rest(&mut self) -> Option<Bytes> {
        (!self.held.is_empty()).then(|| self.held.split().freeze())
    }

    fn bounded(&mut self, complete: Bytes) -> Option<Bytes> {
        if !complete.is_empty() {
            return Some(complete);
        }
        if self.held.len() > LONGEST { self.rest() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise;

    #[test]
    fn nothing_is_lost_and_nothing_is_made_up_however_it_is_cut() {
        const PIECES: &[&str] =
            &["\n", "\n\n", "\r\n", "data: ", "{}", "[DONE]", "\0", "ä", "long enough to be cut somewhere"];
        for (seed, text) in (0..).zip(noise::texts(PIECES, noise::MANY / 10)) {
            for boundary in [Boundary::None, Boundary::Line, Boundary::Event] {
                let mut lines = Lines::new(boundary);
                let pieces = noise::cut(text.as_bytes(), seed);
                let mut out: Vec<Bytes> =
                    pieces.iter().filter_map(|piece| lines.push(Bytes::copy_from_slice(piece))).collect();
                let end = match boundary {
                    Boundary::None => &b""[..],
                    Boundary::Line => b"\n",
                    Boundary::Event => b"\n\n",
                };
                assert!(out.iter().all(|piece| piece.ends_with(end)), "{text:?}");
                out.extend(lines.rest());
                assert_eq!(out.concat(), text.as_bytes());
            }
            assert_eq!(lines_of(&Bytes::from(text.clone())).concat(), text.as_bytes());
        }
    }

    fn run(boundary: Boundary, pieces: &[&str]) -> Vec<String> {
        let mut lines = Lines::new(boundary);
        let mut out: Vec<Bytes> =
            pieces.iter().filter_map(|piece| lines.push(Bytes::copy_from_slice(piece.as_bytes()))).collect();
        out.extend(lines.rest());
        out.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }

    #[test]
    fn a_line_in_parts_is_joined() {
        assert_eq!(run(Boundary::Line, &["{\"a\"", ":1}\n", "{}\n"]), ["{\"a\":1}\n", "{}\n"]);
        assert_eq!(run(Boundary::Line, &["{}\n{", "}", "\n"]), ["{}\n", "{}\n"]);
    }

    #[test]
    fn pieces_that_came_together_stay_together() {
        assert_eq!(run(Boundary::Event, &["data: a\n\ndata: [DONE]\n\n"]), ["data: a\n\ndata: [DONE]\n\n"]);
    }

    #[test]
    fn an_event_may_be_cut_within_its_end() {
        assert_eq!(run(Boundary::Event, &["data: a\n", "\ndata: b", "\n\n"]), ["data: a\n\n", "data: b\n\n"]);
    }

    #[test]
    fn what_has_no_end_is_not_lost() {
        assert_eq!(run(Boundary::Line, &["{}\n", "cut"]), ["{}\n", "cut"]);
    }

    #[test]
    fn other_bodies_pass_as_they_come() {
        assert_eq!(run(Boundary::None, &["a", "b\n", "c"]), ["a", "b\n", "c"]);
    }

    #[test]
    fn a_line_of_200_kb_in_small_writes_comes_in_one_piece() {
        let line = format!("{}\n", "x".repeat(200_000));
        let pieces: Vec<&str> = line.as_bytes().chunks(3000).map(|piece| std::str::from_utf8(piece).unwrap()).collect();
        assert_eq!(run(Boundary::Line, &pieces), [line]);
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut lines = Lines::new(Boundary::Line);
        let piece = Bytes::from(vec![b'x'; 700_000]);
        assert!(lines.push(piece.clone()).is_none());
        assert_eq!(lines.push(piece).map(|bytes| bytes.len()), Some(1_400_000));
    }
}
