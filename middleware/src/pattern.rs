//! Names with `*` in them, as operators write them: for models and for servers.

use std::fmt;

use serde::{Deserialize, Serialize};
use wildmatch::WildMatch;

use crate::names::ModelName;

/// A pattern for names of servers: `*` stands for any text, also none.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(from = "String", into = "String")]
pub struct Pattern {
    text: String,
    matcher: WildMatch,
}

impl From<String> for Pattern {
    fn from(text: String) -> Self {
        Self { matcher: WildMatch::new(&text), text }
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.text
    }
}

impl Pattern {
    /// Whether a name fits.
    pub fn fits(&self, name: &str) -> bool {
        self.matcher.matches(name)
    }

    /// Whether it names one thing.
    pub fn is_exact(&self) -> bool {
        !self.text.contains(['*', '?'])
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A pattern for names of models, compared with their canonical form: `llama3` is `llama3:latest` and no other, `llama3:*`
/// is every tag of it, `*:70b` every model with this tag.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(from = "String", into = "String")]
pub struct ModelPattern {
    text: String,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    One(ModelName),
    Many(WildMatch),
}

impl From<String> for ModelPattern {
    fn from(text: String) -> Self {
        let matcher = match ModelName::parse(&text) {
            Some(name) => Matcher::One(name),
            None => Matcher::Many(WildMatch::new(&text.to_lowercase())),
        };
        Self { text, matcher }
    }
}

impl From<ModelPattern> for String {
    fn from(pattern: ModelPattern) -> Self {
        pattern.text
    }
}

impl ModelPattern {
    /// Whether a model fits.
    pub fn fits(&self, model: &ModelName) -> bool {
        match &self.matcher {
            Matcher::One(name) => name == model,
            Matcher::Many(many) => many.matches(model.as_str()),
        }
    }

    /// The one model that it names, if it is no real pattern.
    pub fn exact(&self) -> Option<&ModelName> {
        match &self.matcher {
            Matcher::One(name) => Some(name),
            Matcher::Many(_) => None,
        }
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for ModelPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for ModelPattern {}

impl fmt::Display for ModelPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(pattern: &str, model: &str) -> bool {
        ModelPattern::from(pattern.to_owned()).fits(&ModelName::parse(model).unwrap())
    }

    #[test]
    fn a_name_is_itself_and_a_star_is_anything() {
        assert!(fits("Llama3", "llama3") && fits("llama3", "llama3:latest") && !fits("llama3", "llama3:70b"));
        assert!(fits("llama3:*", "llama3:70b") && !fits("llama3:*", "llama3.2:70b") && fits("llama3*", "llama3.2"));
        assert!(fits("*:70b", "ns/any:70b") && fits("*", "x") && !fits("a*b:latest", "ac"));
    }

    #[test]
    fn a_pattern_is_written_as_it_was_read() {
        let pattern = Pattern::from("GPU-*".to_owned());
        assert!(pattern.fits("GPU-1") && !pattern.fits("gpu-1") && !pattern.is_exact());
        assert_eq!(String::from(pattern), "GPU-*");
    }
}
