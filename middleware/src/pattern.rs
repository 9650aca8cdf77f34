//! Names of models with a `*` in them, as an operator writes them: `llama3*`, `ada/*`, `*:70b`.

use serde::{Deserialize, Serialize};

use crate::names::{DEFAULT_TAG, ModelName};

/// Which models are meant. A `*` stands for any text. A pattern without one is a name, and means what the name means:
/// `llama3` is `llama3:latest` and no other tag. One that begins with a name is of models without a `/`: `llama3*` does not
/// mean what a stranger's registry `llama3.example` has.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    /// What stands between the stars: one part if there is no star.
    parts: Box<[Box<str>]>,
}

impl Pattern {
    /// Reads a pattern; `None` for a text of nothing.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        let name = if text.contains('*') { None } else { ModelName::parse(&text) };
        let text = name.map_or(text, |name| name.to_string());
        let parts = text.split('*').map(Into::into).collect();
        (!text.is_empty()).then_some(Self { parts })
    }

    /// Whether a model is meant: by its canonical name, with or without the tag that everybody leaves out. A text that is no
    /// name of a model is compared as it is.
    pub fn fits(&self, text: &str) -> bool {
        match ModelName::parse(text) {
            Some(name) => self.fits_name(&name),
            None => self.is(&text.to_ascii_lowercase()),
        }
    }

    /// The same of a name that was parsed before.
    pub fn fits_name(&self, name: &ModelName) -> bool {
        let text = name.as_str();
        let bare = text.strip_suffix(DEFAULT_TAG).and_then(|text| text.strip_suffix(':'));
        self.is(text) || bare.is_some_and(|bare| self.parts.len() > 1 && self.is(bare))
    }

    fn is(&self, text: &str) -> bool {
        let [first, between @ .., last] = &*self.parts else {
            return self.parts.first().is_some_and(|only| &**only == text);
        };
        let Some(mut rest) = text.strip_prefix(&**first) else { return false };
        if !first.is_empty() && !first.contains('/') && rest.contains('/') {
            return false;
        }
        for part in between {
            // The earliest place leaves the most to those behind it.
            let Some(at) = rest.find(&**part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(&**last)
    }
}

impl TryFrom<String> for Pattern {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::new(&text).ok_or("a name of a model must not be empty; \"*\" means every model")
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.parts.join("*"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, fits, others) in [
            (
                "llama3*",
                &["llama3", "Llama3:8b", "llama3.2:latest", "library/llama3"][..],
                &["codellama3", "ada/llama3"][..],
            ),
            ("*llama3", &["llama3", "codellama3", "ada/llama3:latest"], &["llama3:8b"]),
            ("ada/*:q4*k*", &["ada/tiny:q4_k_m", "Ada/Tiny:Q4_K"], &["ada/tiny:q8_0", "tiny:q4_k_m", "ada/tiny"]),
            ("*", &["anything", "no name at all!"], &[]),
            ("a*a", &["aa", "aba:latest"], &["a", "ab"]),
        ] {
            let pattern = Pattern::new(pattern).unwrap();
            for (names, wanted) in [(fits, true), (others, false)] {
                for name in names {
                    assert_eq!(pattern.fits(name), wanted, "{pattern} {name}");
                }
            }
        }
    }

    #[test]
    fn a_name_means_one_model_however_it_is_spelled() {
        let pattern = Pattern::new("registry.ollama.ai/library/Llama3").unwrap();
        assert_eq!(pattern.to_string(), "llama3:latest");
        assert!(pattern.fits("llama3") && pattern.fits("library/LLAMA3:latest") && !pattern.fits("llama3:8b"));
        assert!(Pattern::new("my model").unwrap().fits("My Model"));
    }

    #[test]
    fn a_foreign_host_does_not_pass_for_a_name() {
        let pattern = Pattern::new("tiny*").unwrap();
        assert!(
            !pattern.fits("tiny.example/library/other") && !pattern.fits("tiny://registry.ollama.ai/library/other")
        );
        assert!(Pattern::new("hf.co/*").unwrap().fits("hf.co/ada/tiny:q4_k_m"));
    }

    #[test]
    fn a_pattern_of_nothing_is_refused() {
        assert!(Pattern::new(" ").is_none() && Pattern::try_from(String::new()).is_err());
    }
}
