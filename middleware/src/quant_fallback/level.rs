//! Levels of quantization: their names, and where a model's name tells one.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use smallvec::SmallVec;

use crate::names::ModelName;

/// A level of quantization that is known: one of a closed set, so that it may be a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Level(&'static str);

/// Every level, in the words of Ollama and llama.cpp. Those up to [`LADDER`] stand in the order of their quality.
const NAMES: [&str; 40] = [
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k_s", "q2_k", "iq2_m", "q3_k_s", "iq3_xxs", "iq3_xs", "iq3_s",
    "iq3_m", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "iq4_xs", "iq4_nl", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s",
    "q5_k_m", "q6_k", "q8_0", "f16", "bf16", "f32", "mxfp4", "mxfp8", "nvfp4", "int4", "int8", "fp8", "tq1_0", "tq2_0",
    "q4_0_4_4", "q4_0_8_8",
];

/// How many of them can be told from one another by their quality alone.
const LADDER: usize = 27;

/// Other spellings that tags use.
const SPELLINGS: [(&str, &str); 13] = [
    ("fp16", "f16"),
    ("fp32", "f32"),
    ("q3_k", "q3_k_m"),
    ("q4_k", "q4_k_m"),
    ("q5_k", "q5_k_m"),
    // With some parts in more bits; servers report the level of the rest.
    ("q2_k_l", "q2_k"),
    ("q2_k_xl", "q2_k"),
    ("q3_k_xl", "q3_k_l"),
    ("q4_k_l", "q4_k_m"),
    ("q4_k_xl", "q4_k_m"),
    ("q5_k_xl", "q5_k_m"),
    ("q6_k_xl", "q6_k"),
    ("q8_k_xl", "q8_0"),
];

/// What some tags have before their level: another way of making it.
const DYNAMIC: &str = "ud";

impl Level {
    /// Not quantized, in 16 bits.
    pub const F16: Self = Self("f16");
    /// Not quantized, in 16 bits of the range of 32.
    pub const BF16: Self = Self("bf16");
    /// Not quantized, in 32 bits.
    pub const F32: Self = Self("f32");

    /// Every level.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.into_iter().map(Self)
    }

    /// Those that can be told from one another by their quality alone, the lowest first.
    ///
    /// In the order of how far from the unquantized model they were measured to be, by the Kullback-Leibler divergence in
    /// llama.cpp's `tools/perplexity/README.md` (Llama 3 8B; like with like, where importance matrices make a difference).
    pub fn by_quality() -> impl Iterator<Item = Self> {
        Self::all().take(LADDER)
    }

    /// Reads a level, in either case and any spelling.
    pub fn parse(text: &str) -> Option<Self> {
        let is_it = |name: &str| name.eq_ignore_ascii_case(text);
        let spelt = || SPELLINGS.iter().find(|(spelling, _)| is_it(spelling)).map(|(_, name)| *name);
        NAMES.into_iter().find(|name| is_it(name)).or_else(spelt).map(Self)
    }

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        self.0
    }

    /// Whether nothing was lost: quantizations can be made of it.
    pub fn is_unquantized(self) -> bool {
        [Self::F16, Self::BF16, Self::F32].contains(&self)
    }

    /// The bits that a weight takes on average, with scales and what is kept in more bits: llama.cpp's own figures
    /// (`tools/quantize/README.md`, Llama 3.1 8B), or those of the blocks.
    pub fn bits_per_weight(self) -> Option<f32> {
        Some(match self.0 {
            "iq1_s" => 2.0,
            "iq1_m" => 2.15,
            "iq2_xxs" => 2.38,
            "iq2_xs" => 2.59,
            "iq2_s" => 2.74,
            "iq2_m" => 2.93,
            "q2_k_s" => 2.97,
            "q2_k" => 3.16,
            "iq3_xxs" => 3.25,
            "iq3_xs" => 3.5,
            "iq3_s" => 3.66,
            "q3_k_s" => 3.64,
            "iq3_m" => 3.76,
            "q3_k_m" | "int4" => 4.0,
            "q3_k_l" => 4.3,
            "iq4_xs" => 4.46,
            "iq4_nl" => 4.68,
            "q4_0" | "q4_0_4_4" | "q4_0_8_8" => 4.66,
            "q4_k_s" => 4.67,
            "q4_k_m" => 4.89,
            "q4_1" => 5.14,
            "q5_0" => 5.59,
            "q5_k_s" => 5.57,
            "q5_k_m" => 5.70,
            "q5_1" => 6.07,
            "q6_k" => 6.56,
            "q8_0" => 8.5,
            "f16" | "bf16" => 16.0,
            "f32" => 32.0,
            "mxfp4" => 4.25,
            "nvfp4" => 4.5,
            "mxfp8" => 8.25,
            "fp8" | "int8" => 8.0,
            "tq1_0" => 1.69,
            "tq2_0" => 2.06,
            _ => return None,
        })
    }

    /// The word by which an Ollama makes it of an unquantized model, if it can.
    pub fn made_by(self) -> Option<&'static str> {
        match self.0 {
            "f16" => Some("F16"),
            "q4_k_s" => Some("Q4_K_S"),
            "q4_k_m" => Some("Q4_K_M"),
            "q8_0" => Some("Q8_0"),
            _ => None,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Serialize for Level {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0)
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).ok_or_else(|| de::Error::unknown_variant(&text, &NAMES))
    }
}

/// A model's name, taken apart: the same model in another quantization has the same stem. The tag `latest` is one like
/// others: that it is another name of `q4_0` nobody says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parts<'a> {
    /// The name, with what is left of its tag: `llama3:8b-chat` of `llama3:8b-chat-q4_0`; `tiny:` of `tiny:q4_0`.
    pub(super) stem: &'a str,
    /// What the tag says of the quantization.
    pub(super) level: Option<Level>,
}

impl<'a> Parts<'a> {
    pub(super) fn of(name: &'a ModelName) -> Self {
        let (text, tag) = (name.as_str(), name.tag());
        let before = &text[..text.len() - tag.len()];
        let last = tag.rsplit('-').next().unwrap_or(tag);
        let Some(level) = Level::parse(last) else { return Self { stem: text, level: None } };
        let mut rest = tag.strip_suffix(last).unwrap_or(tag);
        rest = rest.strip_suffix('-').unwrap_or(rest);
        rest = match rest.strip_suffix(DYNAMIC) {
            Some(base) if base.is_empty() || base.ends_with('-') => base.strip_suffix('-').unwrap_or(base),
            _ => rest,
        };
        Self { stem: &text[..before.len() + rest.len()], level: Some(level) }
    }

    /// Calls back with every name that the same model may have in some quantization, until that returns false.
    pub(super) fn names(&self, mut each: impl FnMut(&str)) {
        let has_tag = !self.stem.ends_with(':');
        let mut name: SmallVec<[u8; 128]> = SmallVec::from_slice(self.stem.as_bytes());
        let mut with = |parts: &[&str]| {
            name.truncate(self.stem.len());
            for part in parts {
                name.extend_from_slice(part.as_bytes());
            }
            if let Ok(name) = std::str::from_utf8(&name) {
                each(name);
            }
        };
        if has_tag {
            with(&[]);
        }
        let hyphen = if has_tag { "-" } else { "" };
        // Ollama's own has no such tags.
        let is_of_a_registry = self.stem.contains('/');
        for spelling in NAMES.into_iter().chain(SPELLINGS.map(|(spelling, _)| spelling)) {
            with(&[hyphen, spelling]);
            if is_of_a_registry {
                with(&[hyphen, DYNAMIC, "-", spelling]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_in_either_case_and_any_spelling() {
        for (text, wanted) in
            [("Q4_K_M", "q4_k_m"), ("q4_0", "q4_0"), ("FP16", "f16"), ("MXFP4", "mxfp4"), ("Q4_K_XL", "q4_k_m")]
        {
            assert_eq!(Level::parse(text).unwrap().as_str(), wanted);
        }
        assert!(Level::parse("unknown").is_none() && Level::parse("").is_none() && Level::parse("8b").is_none());
    }

    #[test]
    fn the_ladder_ends_below_what_is_not_quantized() {
        assert_eq!(Level::by_quality().last().unwrap().as_str(), "q8_0");
        assert!(Level::by_quality().all(|level| !level.is_unquantized()));
        assert!(SPELLINGS.iter().all(|(_, name)| NAMES.contains(name)));
    }

    #[test]
    fn a_name_is_its_stem_and_its_level() {
        for (name, stem, level) in [
            ("llama3:8b-chat-q4_0", "llama3:8b-chat", Some("q4_0")),
            ("llama3:8b", "llama3:8b", None),
            ("tiny:Q4_0", "tiny:", Some("q4_0")),
            // What is called so may be anything of that name.
            ("tiny", "tiny:latest", None),
            ("a.b:5000/c/d:fp16", "a.b:5000/c/d:", Some("f16")),
            ("hf.co/x/y:UD-Q4_K_XL", "hf.co/x/y:", Some("q4_k_m")),
            ("x:it-ud-q4_k_m", "x:it", Some("q4_k_m")),
            ("x:cloud-q8_0", "x:cloud", Some("q8_0")),
            ("x:4b-it-qat", "x:4b-it-qat", None),
        ] {
            let name = ModelName::parse(name).unwrap();
            let parts = Parts::of(&name);
            assert_eq!((parts.stem, parts.level.map(Level::as_str)), (stem, level), "{name}");
        }
    }

    #[test]
    fn every_name_of_a_stem_has_that_stem() {
        for name in ["tiny:q4_0", "llama3:8b-q4_0", "a/b:x", "hf.co/a/b:ud-q4_k_xl", "tiny"] {
            let name = ModelName::parse(name).unwrap();
            let parts = Parts::of(&name);
            let mut found = Vec::new();
            parts.names(|other| found.push(other.to_owned()));
            assert!(found.contains(&name.to_string()), "{found:?}");
            for other in &found {
                assert_eq!(Parts::of(&ModelName::parse(other).unwrap()).stem, parts.stem, "{other}");
            }
        }
    }
    #[test]
    fn every_level_of_the_ladder_tells_its_bits() {
        assert!(
            Level::by_quality().all(|level| level.bits_per_weight().is_some_and(|bits| (1.0..9.0).contains(&bits)))
        );
        assert_eq!(Level::F16.bits_per_weight(), Some(16.0));
    }
}
