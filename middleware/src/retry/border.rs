//! Stop words across the border between what one server wrote and what another goes on with.
//!
//! An Ollama keeps a text back for as long as a stop word might begin in it, so what was delivered never ends in the
//! beginning of one. Engines that are not as careful may leave one half delivered; the other half must not follow.

/// Watches the beginning of what goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Border {
    stops: Vec<String>,
    /// The end of what was delivered, from where a stop word might begin, and behind it what is held back.
    text: String,
    /// Where what is held back begins.
    at: usize,
}

/// What to do with a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is held back: a stop word is not complete.
    Wait,
    /// A stop word is complete: all is over.
    Stop,
    /// This goes on to the client, and there is nothing left to watch.
    Go(String),
}

impl Border {
    /// A border behind a text; `None` if the text does not end in the beginning of a stop word.
    pub(super) fn behind(text: &str, stops: Vec<String>) -> Option<Self> {
        let start = text.char_indices().map(|(at, _)| at).find(|at| begins(&text[*at..], &stops))?;
        let text = text[start..].to_owned();
        Some(Self { stops, at: text.len(), text })
    }

    /// A text follows.
    pub(super) fn follow(&mut self, text: &str) -> Verdict {
        self.text.push_str(text);
        let starts = || self.text[..self.at].char_indices().map(|(at, _)| &self.text[at..]);
        if starts().any(|rest| self.stops.iter().any(|stop| !stop.is_empty() && rest.starts_with(stop.as_str()))) {
            return Verdict::Stop;
        }
        if starts().any(|rest| begins(rest, &self.stops)) {
            return Verdict::Wait;
        }
        Verdict::Go(self.rest())
    }

    /// What is held back.
    pub(super) fn rest(&mut self) -> String {
        self.text.split_off(self.at)
    }
}

/// Whether a text is the beginning of a stop word, and not all of it.
fn begins(text: &str, stops: &[String]) -> bool {
    stops.iter().any(|stop| stop.len() > text.len() && stop.starts_with(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn border(text: &str) -> Option<Border> {
        Border::behind(text, vec!["<|end|>".to_owned(), "STOP".to_owned()])
    }

    #[test]
    fn there_is_none_behind_a_text_that_ends_in_no_beginning() {
        assert_eq!(border("Hello"), None);
        assert_eq!(border("STOP"), None, "a whole one would have ended the answer");
        assert_eq!(Border::behind("Hello", vec![String::new()]), None);
        assert!(border("Hello S").is_some() && border("<|en").is_some());
    }

    #[test]
    fn the_other_half_of_a_stop_word_ends_the_answer() {
        assert_eq!(border("Hello ST").unwrap().follow("OP and more"), Verdict::Stop);
        let mut border = border("a <").unwrap();
        assert_eq!(
            [border.follow("|"), border.follow("end"), border.follow("|>x")],
            [Verdict::Wait, Verdict::Wait, Verdict::Stop]
        );
    }

    #[test]
    fn what_turns_out_to_be_none_is_not_lost() {
        let mut border = border("a <").unwrap();
        assert_eq!(border.follow("|e"), Verdict::Wait);
        assert_eq!(border.follow("f \u{e9}"), Verdict::Go("|ef \u{e9}".to_owned()));
        let mut other = Border::behind("x S", vec!["SS".to_owned()]).unwrap();
        assert_eq!(other.follow("T"), Verdict::Go("T".to_owned()));
    }
}
