//! Names with `*` in them, as the configuration uses them for models, servers, routes and keys.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::names::ModelName;

/// A name in which each `*` stands for any text, even none. Letters of ASCII match in either case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    text: Arc<str>,
    /// Bytes before the first `*`; all of them, if there is none.
    begin: usize,
    /// Bytes behind the last `*`; none, if there is none.
    end: usize,
    /// The model that it names, if it is a plain name of one.
    model: Option<ModelName>,
}

/// A text that is no pattern.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no name: it must not be empty or have blanks in it; \"*\" is every name")]
pub struct PatternError(String);

impl Pattern {
    /// Reads a pattern.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() || text.chars().any(|char| char.is_whitespace() || char.is_control()) {
            return Err(PatternError(text.to_owned()));
        }
        let (first, last) = (text.find('*'), text.rfind('*'));
        let model = if first.is_some() { None } else { ModelName::parse(text) };
        let end = last.map_or(0, |at| text.len() - at - 1);
        Ok(Self { text: text.into(), begin: first.unwrap_or(text.len()), end, model })
    }

    /// Reads a pattern of models: a plain name is written as everybody else writes it, so that two spellings of it are one.
    pub fn of_models(text: &str) -> Result<Self, PatternError> {
        let pattern = Self::parse(text.trim())?;
        Ok(match &pattern.model {
            Some(model) => {
                let text: Arc<str> = model.as_str().into();
                Self { begin: text.len(), text, ..pattern.clone() }
            }
            None => pattern,
        })
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The same, without copying it.
    pub fn shared(&self) -> Arc<str> {
        self.text.clone()
    }

    /// How many `*` there are.
    pub fn stars(&self) -> usize {
        self.text.bytes().filter(|byte| *byte == b'*').count()
    }

    /// Whether it is a plain name.
    pub fn is_plain(&self) -> bool {
        self.begin == self.text.len()
    }

    /// How much of it is not left open, in bytes: of two that match, the one with more of it says more.
    pub fn weight(&self) -> usize {
        self.text.len() - self.stars()
    }

    /// Whether a text is one of those that are meant.
    pub fn matches(&self, text: &str) -> bool {
        self.walk(text, |_| {})
    }

    /// What each `*` stands for in a text, in turn, as little as possible but for the last; `None` if the text is not meant.
    pub fn captures<'a>(&self, text: &'a str) -> Option<SmallVec<[&'a str; 2]>> {
        let mut captured = SmallVec::new();
        self.walk(text, |part| captured.push(part)).then_some(captured)
    }

    /// Whether a model is meant. A name without a tag is the one with the tag `latest`; a pattern that begins with a name is
    /// of models without a `/`: `llama3*` does not mean what a stranger's registry `llama3.example` has.
    pub fn matches_model(&self, model: &ModelName) -> bool {
        if let Some(name) = &self.model {
            return name == model;
        }
        let begin = &self.text[..self.begin];
        spellings(model.as_str()).any(|text| self.matches(text))
            && (begin.is_empty() || begin.contains('/') || !model.as_str().contains('/'))
    }

    /// The same of a name as a client wrote it. A text that is no name of a model is compared as it is.
    pub fn matches_name(&self, text: &str) -> bool {
        ModelName::parse(text).map_or_else(|| self.matches(text), |model| self.matches_model(&model))
    }

    /// Whether a text is meant; tells each part that a `*` stands for.
    fn walk<'a>(&self, text: &'a str, mut open: impl FnMut(&'a str)) -> bool {
        if self.is_plain() {
            return text.eq_ignore_ascii_case(&self.text);
        }
        let (first, last) = (&self.text[..self.begin], &self.text[self.text.len() - self.end..]);
        if text.len() < first.len() + last.len() || !is_at(text, first, 0) {
            return false;
        }
        let end = text.len() - last.len();
        if !is_at(text, last, end) {
            return false;
        }
        let mut at = first.len();
        // What stands between the first star and the last, both left out.
        let middle = self.text.get(self.begin + 1..self.text.len() - self.end - 1);
        for part in middle.into_iter().flat_map(|middle| middle.split('*')) {
            let Some(found) = (at..(end + 1).saturating_sub(part.len())).find(|from| is_at(text, part, *from)) else {
                return false;
            };
            open(text.get(at..found).unwrap_or_default());
            at = found + part.len();
        }
        open(text.get(at..end).unwrap_or_default());
        true
    }
}

/// Whether a part stands at a place of a text.
fn is_at(text: &str, part: &str, at: usize) -> bool {
    text.as_bytes().get(at..at + part.len()).is_some_and(|found| found.eq_ignore_ascii_case(part.as_bytes()))
}

/// The ways to write a canonical name that a pattern may mean: without the tag `latest`, which need not be said, and with it.
pub fn spellings(canonical: &str) -> impl Iterator<Item = &str> {
    canonical.strip_suffix(":latest").into_iter().chain([canonical])
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        Self::parse(&text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.text.as_ref().to_owned()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(pattern: &str, text: &str) -> Option<Vec<String>> {
        let captures = Pattern::parse(pattern).unwrap().captures(text)?;
        Some(captures.into_iter().map(str::to_owned).collect())
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, text, wanted) in [
            ("gpt-4o", "GPT-4o", Some(vec![])),
            ("gpt-4o", "gpt-4o-mini", None),
            ("gpt-*", "gpt-4o", Some(vec!["4o"])),
            ("gpt-*", "gpt-", Some(vec![""])),
            ("gpt-*", "gpt", None),
            ("*", "", Some(vec![""])),
            ("*:70b", "llama3.3:70b", Some(vec!["llama3.3"])),
            ("a*a", "a", None),
            ("a*a", "aa", Some(vec![""])),
            ("*-of-*", "q4-of-llama", Some(vec!["q4", "llama"])),
            ("a*b*c", "abcbc", Some(vec!["", "cb"])),
            ("a*bb*b", "abb", None),
            ("é*", "éa", Some(vec!["a"])),
            ("é*", "èa", None),
        ] {
            let wanted = wanted.map(|parts: Vec<&str>| parts.into_iter().map(str::to_owned).collect());
            assert_eq!(captured(pattern, text), wanted, "{pattern} on {text}");
        }
    }

    #[test]
    fn a_model_is_meant_with_its_tag_or_without_the_usual_one() {
        let meant = |pattern: &str, model: &str| {
            Pattern::parse(pattern).unwrap().matches_model(&ModelName::parse(model).unwrap())
        };
        assert!(meant("qwen3", "Qwen3:latest") && meant("qwen3:latest", "qwen3") && meant("*-x", "big-x"));
        assert!(meant("*:latest", "qwen3") && !meant("qwen3", "qwen3:32b") && meant("qwen3*", "qwen3:32b"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        assert!(Pattern::parse("").is_err() && Pattern::parse("a b").is_err() && Pattern::parse("a\n").is_err());
    }

    #[test]
    fn a_foreign_host_does_not_pass_for_a_name() {
        let meant = |pattern: &str, model: &str| Pattern::parse(pattern).unwrap().matches_name(model);
        assert!(
            !meant("tiny*", "tiny.example/library/other") && !meant("tiny*", "tiny://registry.ollama.ai/library/other")
        );
        assert!(meant("hf.co/*", "hf.co/ada/tiny:q4_k_m") && meant("*", "ada/tiny") && meant("*:70b", "ada/tiny:70b"));
        assert!(meant("registry.ollama.ai/library/Llama3", "llama3") && !meant("llama3", "llama3:8b"));
    }

    proptest::proptest! {
        #[test]
        fn what_the_stars_stand_for_makes_the_text_again(pattern in "[ab*]{1,6}", text in "[ab]{0,9}") {
            if let Some(captures) = Pattern::parse(&pattern).unwrap().captures(&text) {
                let mut captures = captures.into_iter();
                let parts: Vec<&str> = pattern.split('*').collect();
                let last = parts.len() - 1;
                let made: String = parts
                    .iter()
                    .enumerate()
                    .flat_map(|(at, part)| [*part, if at < last { captures.next().unwrap() } else { "" }])
                    .collect();
                proptest::prop_assert_eq!(&made, &text);
            }
        }
    }
}
