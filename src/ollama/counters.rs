//! Finds what an answer says of itself: counts and durations, in each dialect, without parsing its tokens.
//!
//! A quotation mark inside a JSON string is always escaped, so `"done":true` or `"usage":{` in the bytes is never text of a
//! model. Numbers stand behind the texts, so the last occurrence is the true one.

use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use memchr::memmem::Finder;
use olol_middleware::Counters;

use super::lines::Boundary;

/// How much of the end of an answer in one JSON object holds its counts.
const TAIL: usize = 640;
/// How Ollama ends a line that is not the last.
const NOT_DONE: &[u8] = b"\"done\":false}\n";

/// Watches an answer for its counts.
#[derive(Debug)]
pub(super) struct Count {
    boundary: Boundary,
    /// The last bytes of an answer that is one JSON object.
    tail: Bytes,
}

impl Count {
    pub(super) fn new(boundary: Boundary) -> Self {
        Self { boundary, tail: Bytes::new() }
    }

    /// Looks at a piece.
    pub(super) fn see(&mut self, piece: &Bytes) -> Option<Counters> {
        match self.boundary {
            // Nearly every line: its end tells that there are more.
            Boundary::Line if piece.ends_with(NOT_DONE) => None,
            Boundary::Line => KEYS.done.find(piece).and_then(|_| counters(piece)),
            Boundary::Event => KEYS.usage.find(piece).and_then(|_| counters(piece)),
            Boundary::None => {
                let end = piece.slice(piece.len().saturating_sub(TAIL)..);
                self.tail = if end.len() == TAIL || self.tail.is_empty() {
                    end
                } else {
                    let before = &self.tail[self.tail.len().saturating_sub(TAIL)..];
                    [before, &end].concat().into()
                };
                None
            }
        }
    }

    /// Looks at the end of an answer that was one JSON object.
    pub(super) fn finish(&mut self) -> Option<Counters> {
        counters(&self.tail)
    }
}

/// What is looked for, prepared once: most of the work of a search in so few bytes.
struct Keys {
    done: Finder<'static>,
    usage: Finder<'static>,
    /// Native, OpenAI's, Anthropic's.
    output: [Finder<'static>; 3],
    prompt: [Finder<'static>; 3],
    prompt_duration: Finder<'static>,
    eval_duration: Finder<'static>,
    load_duration: Finder<'static>,
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    done: Finder::new(b"\"done\":true"),
    usage: Finder::new(b"\"usage\":{"),
    output: ["\"eval_count\":", "\"completion_tokens\":", "\"output_tokens\":"].map(Finder::new),
    prompt: ["\"prompt_eval_count\":", "\"prompt_tokens\":", "\"input_tokens\":"].map(Finder::new),
    prompt_duration: Finder::new(b"\"prompt_eval_duration\":"),
    eval_duration: Finder::new(b"\"eval_duration\":"),
    load_duration: Finder::new(b"\"load_duration\":"),
});

/// The counts in the bytes, native or of a `usage`. Nearly always they are the last thing there.
fn counters(bytes: &[u8]) -> Option<Counters> {
    counters_at_the_end(bytes).or_else(|| counters_anywhere(bytes)).map(Counters::believed)
}

/// Reads `"key":number` after `"key":number` from the end of an object.
fn counters_at_the_end(bytes: &[u8]) -> Option<Counters> {
    let (mut prompt_tokens, mut output_tokens) = (None, None);
    let mut found = Counters::default();
    let mut rest = bytes.trim_ascii_end();
    while let Some(inner) = rest.strip_suffix(b"}") {
        rest = inner;
    }
    loop {
        let digits = rest.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
        let (before, digits) = rest.split_at(rest.len() - digits);
        let Some(before) = before.strip_suffix(b"\":") else { break };
        let Some(quote) = memchr::memrchr(b'"', before) else { break };
        let number = || value(digits);
        match &before[quote + 1..] {
            b"eval_count" | b"completion_tokens" | b"output_tokens" => output_tokens = Some(number()),
            b"prompt_eval_count" | b"prompt_tokens" | b"input_tokens" => prompt_tokens = Some(number()),
            b"prompt_eval_duration" => found.prompt_duration = Duration::from_nanos(number()),
            b"eval_duration" => found.eval_duration = Duration::from_nanos(number()),
            b"load_duration" => found.load_duration = Duration::from_nanos(number()),
            _ => {}
        }
        let Some(before) = before[..quote].strip_suffix(b",") else { break };
        rest = before;
    }
    // One of the two alone may have the other elsewhere.
    Some(Counters { prompt_tokens: prompt_tokens?, output_tokens: output_tokens?, ..found })
}

fn counters_anywhere(bytes: &[u8]) -> Option<Counters> {
    let number = |key| number_behind(bytes, key);
    let output_tokens = KEYS.output.iter().find_map(number);
    let prompt_tokens = KEYS.prompt.iter().find_map(number);
    if output_tokens.is_none() && prompt_tokens.is_none() {
        return None;
    }
    Some(Counters {
        prompt_tokens: prompt_tokens.unwrap_or(0),
        output_tokens: output_tokens.unwrap_or(0),
        prompt_duration: Duration::from_nanos(number(&KEYS.prompt_duration).unwrap_or(0)),
        eval_duration: Duration::from_nanos(number(&KEYS.eval_duration).unwrap_or(0)),
        load_duration: Duration::from_nanos(number(&KEYS.load_duration).unwrap_or(0)),
    })
}

fn number_behind(bytes: &[u8], key: &Finder<'_>) -> Option<u64> {
    let at = key.find_iter(bytes).last()? + key.needle().len();
    let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    (digits > 0).then(|| value(&bytes[at..at + digits]))
}

/// What digits are worth.
fn value(digits: &[u8]) -> u64 {
    digits.iter().fold(0, |sum: u64, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise;

    #[test]
    fn counts_are_none_or_such_as_can_be_whatever_is_said() {
        const PIECES: &[&str] = &[
            "\"eval_count\":",
            "\"prompt_eval_count\":",
            "\"eval_duration\":",
            "\"usage\":{",
            "\"done\":true",
            "9",
            "0",
            "99999999999999999999999",
            "18446744073709551615",
            "}",
            "}}",
            "{",
            ",",
            "\"",
            "\\",
            "-1",
            "1e9",
            "\n",
            "x",
            "\"output_tokens\":",
        ];
        for text in noise::texts(PIECES, noise::MANY) {
            let found = counters(text.as_bytes()).unwrap_or_default();
            assert!(found.prompt_tokens <= 1 << 32 && found.output_tokens <= 1 << 32, "{text}");
            let _ = [found.eval_duration, found.load_duration, found.prompt_duration].iter().sum::<Duration>() * 1000;
        }
    }

    fn tokens(boundary: Boundary, pieces: &[&'static str]) -> Option<(u64, u64)> {
        let mut count = Count::new(boundary);
        let seen: Vec<_> = pieces.iter().filter_map(|piece| count.see(&Bytes::from_static(piece.as_bytes()))).collect();
        let end = seen.last().copied().or_else(|| count.finish());
        end.map(|end| (end.prompt_tokens, end.output_tokens))
    }

    #[test]
    fn the_last_line_tells_the_counts() {
        let last =
            r#"{"response":"","done":true,"context":[1],"prompt_eval_count":15,"eval_count":12,"eval_duration":7}"#;
        assert_eq!(tokens(Boundary::Line, &[r#"{"response":"\"eval_count\":9","done":false}"#, last]), Some((15, 12)));
    }

    #[test]
    fn usage_is_read_in_every_dialect() {
        assert_eq!(
            tokens(Boundary::Event, &[r#"data: {"usage":{"prompt_tokens":3,"completion_tokens":4}}"#]),
            Some((3, 4))
        );
        let anthropic =
            [r#"{"usage":{"input_tokens":6,"output_tokens":0}}"#, r#"{"usage":{"input_tokens":15,"output_tokens":8}}"#];
        assert_eq!(tokens(Boundary::Event, &anthropic), Some((15, 8)));
    }

    #[test]
    fn counts_that_are_not_last_are_found_too() {
        let responses =
            r#"{"usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":0},"output_tokens":4},"user":null}"#;
        assert_eq!(tokens(Boundary::None, &[responses]), Some((3, 4)));
        let native = r#"{"message":{"tool_calls":[{"arguments":{"eval_count":9}}]},"done":true,"load_duration":5,"prompt_eval_count":3,"prompt_eval_duration":8,"eval_count":4,"eval_duration":7}"#;
        let sorted = r#"{"eval_count":2,"message":{"content":"x"},"prompt_eval_count":5}"#;
        assert_eq!(tokens(Boundary::None, &[sorted]), Some((5, 2)));
        let found = counters(native.as_bytes()).unwrap();
        assert_eq!((found.prompt_tokens, found.output_tokens), (3, 4));
        assert_eq!((found.eval_duration.as_nanos(), found.load_duration.as_nanos()), (7, 5));
    }

    #[test]
    fn one_object_may_come_in_pieces() {
        assert_eq!(
            tokens(Boundary::None, &[r#"{"response":"hi","prompt_eval_co"#, r#"unt":2,"eval_count":1}"#]),
            Some((2, 1))
        );
        assert_eq!(tokens(Boundary::None, &[r#"{"models":[]}"#]), None);
    }
}
