//! From the bytes of tokens to text that may be shown: whole characters only, and nothing of a stop sequence.

/// Holds back what may still become a character or a stop sequence.
#[derive(Debug)]
pub(super) struct Shown {
    stops: Vec<String>,
    /// Bytes of a character that is not complete.
    bytes: Vec<u8>,
    /// Text that may be the beginning of a stop sequence.
    held: String,
    stopped: bool,
}

impl Shown {
    /// Shows text up to the first of these sequences; empty ones never match.
    pub(super) fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, bytes: Vec::new(), held: String::new(), stopped: false }
    }

    /// Takes the bytes of a token, and returns the text that can be shown now.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.bytes.extend_from_slice(bytes);
        let text = take_characters(&mut self.bytes);
        self.held.push_str(&text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop sequence has come.
    pub(super) fn has_stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back, now that nothing more comes.
    pub(super) fn finish(mut self) -> String {
        if !self.stopped {
            self.held.push_str(&String::from_utf8_lossy(&self.bytes));
        }
        self.held
    }
}

/// Takes the whole characters; bytes that can never become one are replaced.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        if is_unfinished(invalid) && taken + invalid.len() == bytes.len() {
            break;
        }
        if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

/// Whether bytes that are no character yet may become one.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Bytes at the end of `text` that are the beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len() - 1);
    (1..=most)
        .rev()
        .find(|length| stop.is_char_boundary(*length) && text.as_bytes().ends_with(&stop.as_bytes()[..*length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(stops: &[&str], tokens: &[&[u8]]) -> (Vec<String>, String, bool) {
        let mut shown = Shown::new(&stops.iter().map(|stop| (*stop).to_owned()).collect::<Vec<_>>());
        let pieces = tokens.iter().map(|token| shown.push(token)).collect();
        let stopped = shown.has_stopped();
        (pieces, shown.finish(), stopped)
    }

    #[test]
    fn text_ends_before_a_stop_sequence_that_spans_tokens() {
        let (pieces, rest, stopped) = show(&["END"], &[b"one E", b"N", b"D two"]);
        assert_eq!((pieces.concat().as_str(), rest.as_str(), stopped), ("one ", "", true));
    }

    #[test]
    fn what_only_began_like_one_is_shown() {
        let (pieces, rest, stopped) = show(&["END", "<|x|>"], &[b"EN", b"TER", b" <|"]);
        assert_eq!((pieces.concat().as_str(), rest.as_str(), stopped), ("ENTER ", "<|", false));
    }

    #[test]
    fn the_earliest_stop_sequence_wins_and_an_empty_one_never_matches() {
        let (pieces, rest, _) = show(&["", "b", "a"], &[b"xab"]);
        assert_eq!((pieces.concat().as_str(), rest.as_str()), ("x", ""));
    }

    #[test]
    fn characters_are_shown_whole() {
        let euro = "€".as_bytes();
        let (pieces, rest, _) = show(&[], &[&euro[..1], &euro[1..2], &euro[2..], b"!"]);
        assert_eq!((pieces, rest.as_str()), (vec![String::new(), String::new(), "€".to_owned(), "!".to_owned()], ""));
    }

    #[test]
    fn bytes_that_are_no_character_are_replaced() {
        let (pieces, rest, _) = show(&[], &[b"a\xff", b"b\xe2"]);
        assert_eq!((pieces.concat().as_str(), rest.as_str()), ("a\u{fffd}b", "\u{fffd}"));
    }
}
