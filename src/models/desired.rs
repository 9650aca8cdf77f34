//! Which models should be where, and what keeps that true.
//!
//! The operator says it in `[[models]]`, or in passing with `olol models pin` (`pins`). What that comes to for the servers as
//! they are is a pure function (`plan`): models to bring to servers, models to load, servers to wake. What does these things
//! (`driver`) does few at a time, and leaves alone for a while what has failed. Nothing is ever deleted.
//!
//! Several proxies over the same servers do no harm to each other: each comes to the same plan (servers in an order that
//! everybody finds alone), sees in the servers' news what another has begun, and a model that is brought twice is there once.

mod driver;
mod leaf;
mod load;
mod pins;
mod plan;
mod shared;
mod wishes;

use std::fmt;
use std::sync::Arc;

use olol_middleware::units::{Seconds, SomeSeconds, Whole};
use olol_middleware::{ModelName, Pattern, ServerId};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

pub use driver::Driver;
pub use leaf::{Leaf, SERVERS};
pub use load::{Bring, by};
pub use pins::PinError;
pub use plan::{Refusal, Standing};
pub(crate) use shared::keep;
pub use wishes::Desired;

/// The most models that may be wanted, in the file and by pins each.
pub const MOST: usize = 1000;

/// One of `[[models]]`: a model, and where it should be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Wanted {
    /// The model.
    pub name: Name,
    /// On how many servers it should be.
    #[serde(default)]
    pub replicas: Replicas,
    /// On which servers, by name or pattern; all if left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<Pattern>,
    /// Whether it stays in memory, and on how many of them.
    #[serde(default)]
    pub keep_loaded: KeepLoaded,
}

impl Wanted {
    /// Whether a server is one of those that are meant.
    pub fn means(&self, server: &ServerId) -> bool {
        self.servers.is_empty() || self.servers.iter().any(|pattern| pattern.matches(server.as_str()))
    }

    /// Whether it is wanted anywhere.
    pub fn is_wanted(&self) -> bool {
        self.replicas != Replicas::Count(0)
    }
}

/// The name of a model, as it was written, and as everybody knows it.
#[derive(Clone, Debug)]
pub struct Name {
    text: Arc<str>,
    model: ModelName,
}

impl Name {
    /// Reads a name; `None` if Ollama would not take it.
    pub fn parse(text: &str) -> Option<Self> {
        ModelName::parse(text).map(|model| Self { text: text.into(), model })
    }

    /// As it was written: servers are asked for it so.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The canonical name.
    pub fn model(&self) -> &ModelName {
        &self.model
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.model == other.model
    }
}

impl Eq for Name {}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom(format!("'{text}' is no name of a model")))
    }
}

/// On how many servers a model should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replicas {
    /// On all that are meant.
    All,
    /// On so many of them; 0: it is not wanted, whatever stands elsewhere.
    Count(u32),
}

impl Default for Replicas {
    fn default() -> Self {
        Self::Count(1)
    }
}

impl fmt::Display for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Count(count) => count.fmt(f),
        }
    }
}

impl Serialize for Replicas {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => to.serialize_str("all"),
            Self::Count(count) => to.serialize_u32(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Replicas {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reading;

        impl Visitor<'_> for Reading {
            type Value = Replicas;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of servers, or \"all\"")
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<Replicas, E> {
                let count = u32::try_from(count).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(count), &self));
                count.map(Replicas::Count)
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<Replicas, E> {
                let count = u32::try_from(count).map_err(|_| E::invalid_value(de::Unexpected::Signed(count), &self));
                count.map(Replicas::Count)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Replicas, E> {
                match text {
                    "all" => Ok(Replicas::All),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }

        from.deserialize_any(Reading)
    }
}

/// On how many servers a model stays in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeepLoaded {
    /// Wherever it is loaded, it leaves as usual.
    #[default]
    No,
    /// On all of its servers.
    All,
    /// On so many of them.
    Count(u32),
}

impl Serialize for KeepLoaded {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::No => to.serialize_bool(false),
            Self::All => to.serialize_bool(true),
            Self::Count(count) => to.serialize_u32(*count),
        }
    }
}

impl<'de> Deserialize<'de> for KeepLoaded {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reading;

        impl Visitor<'_> for Reading {
            type Value = KeepLoaded;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or a number of servers")
            }

            fn visit_bool<E: de::Error>(self, is_kept: bool) -> Result<KeepLoaded, E> {
                Ok(if is_kept { KeepLoaded::All } else { KeepLoaded::No })
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<KeepLoaded, E> {
                let count =
                    u32::try_from(count).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(count), &self))?;
                Ok(if count == 0 { KeepLoaded::No } else { KeepLoaded::Count(count) })
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<KeepLoaded, E> {
                let count = u64::try_from(count).map_err(|_| E::invalid_value(de::Unexpected::Signed(count), &self))?;
                self.visit_u64(count)
            }
        }

        from.deserialize_any(Reading)
    }
}

/// The `[desired]` table: how what is wanted of models is kept true.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Seconds that a server may be away until what it has counts as lost.
    pub grace_s: Seconds,
    /// Models that are brought to servers at the same time.
    pub at_once: Whole<1, 64>,
    /// Seconds until something that has failed is tried again; twice as long after each further failure.
    pub retry_s: SomeSeconds,
    /// The longest that it becomes.
    pub retry_max_s: SomeSeconds,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grace_s: Seconds::new(300),
            at_once: Whole::new(2),
            retry_s: SomeSeconds::new(30),
            retry_max_s: SomeSeconds::new(3600),
        }
    }
}

/// The first model that stands twice in a list, by its place; or the first beyond those that may be.
pub(crate) fn fault(wanted: &[Wanted]) -> Option<(usize, String)> {
    if wanted.len() > MOST {
        return Some((MOST, format!("no more than {MOST} models may be named")));
    }
    let mut seen = std::collections::HashSet::new();
    let twin = wanted.iter().position(|wanted| !seen.insert(wanted.name.model()))?;
    Some((twin, format!("model `{}` stands twice", wanted[twin].name.model())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_read_and_written_in_the_same_words() {
        for (text, replicas, keep_loaded) in [
            ("name = \"Tiny\"\nreplicas = \"all\"\nkeep-loaded = true\n", Replicas::All, KeepLoaded::All),
            ("name = \"Tiny\"\nreplicas = 3\nkeep-loaded = 2\n", Replicas::Count(3), KeepLoaded::Count(2)),
            ("name = \"Tiny\"\nreplicas = 0\nkeep-loaded = false\n", Replicas::Count(0), KeepLoaded::No),
        ] {
            let wanted: Wanted = toml::from_str(text).unwrap();
            assert_eq!((wanted.replicas, wanted.keep_loaded), (replicas, keep_loaded));
            assert_eq!((wanted.name.text(), wanted.name.model().as_str()), ("Tiny", "tiny:latest"));
            assert_eq!(toml::to_string(&wanted).unwrap(), text);
        }
        for (text, says) in [
            ("name = \"a b\"", "'a b' is no name of a model"),
            ("name = \"a\"\nreplicas = \"many\"", "a number of servers, or \"all\""),
            ("name = \"a\"\nreplicas = -1", "a number of servers"),
            ("name = \"a\"\nkeep-loaded = \"yes\"", "true, false, or a number"),
        ] {
            let error = toml::from_str::<Wanted>(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_model_stands_once() {
        let wanted = |name: &str| toml::from_str::<Wanted>(&format!("name = \"{name}\"")).unwrap();
        let (at, what) = fault(&[wanted("a"), wanted("b"), wanted("A:latest")]).unwrap();
        assert_eq!((at, what.as_str()), (2, "model `a:latest` stands twice"));
    }
}
