//! What an operator may set.

use std::num::NonZeroU32;

use http::HeaderName;
use serde::{Deserialize, Serialize};

/// The `[affinity]` table.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Headers by which clients name their conversations; the first that is there counts.
    pub headers: HeaderNames,
    /// Seconds after its last turn that a conversation is remembered.
    pub ttl_s: NonZeroU32,
    /// Links of conversations that are remembered: about two a turn, some 80 bytes each.
    pub max_entries: NonZeroU32,
    /// How much of the calls a server may have, compared with the mean, before conversations go elsewhere.
    pub load_factor: LoadFactor,
    /// Calls that a server may have in any case.
    pub floor: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        let number = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        Self {
            headers: HeaderNames(vec![
                super::SESSION,
                HeaderName::from_static("x-session-id"),
                HeaderName::from_static("x-olla-session-id"),
                HeaderName::from_static("x-smg-routing-key"),
            ]),
            ttl_s: number(3600),
            max_entries: number(100_000),
            load_factor: LoadFactor(1.25),
            floor: number(2),
        }
    }
}

/// Names of headers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct HeaderNames(Vec<HeaderName>);

impl HeaderNames {
    pub(super) fn iter(&self) -> impl Iterator<Item = &HeaderName> {
        self.0.iter()
    }
}

impl TryFrom<Vec<String>> for HeaderNames {
    type Error = String;

    fn try_from(names: Vec<String>) -> Result<Self, String> {
        let parse = |name: String| name.parse().map_err(|_| format!("{name:?} cannot be the name of a header"));
        names.into_iter().map(parse).collect::<Result<_, _>>().map(Self)
    }
}

impl From<HeaderNames> for Vec<String> {
    fn from(names: HeaderNames) -> Self {
        names.0.iter().map(ToString::to_string).collect()
    }
}

/// A share of the load, compared with the mean: at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct LoadFactor(f64);

impl LoadFactor {
    pub(super) fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for LoadFactor {
    type Error = String;

    fn try_from(factor: f64) -> Result<Self, String> {
        if factor >= 1.0 && factor.is_finite() {
            return Ok(Self(factor));
        }
        Err(format!("a load factor of {factor} cannot be kept: it must be 1 (all the same) or more, such as 1.25"))
    }
}

impl From<LoadFactor> for f64 {
    fn from(factor: LoadFactor) -> Self {
        factor.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        toml::from_str::<Config>(text).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (text, wanted) in [
            ("load-factor = 0.9", "it must be 1 (all the same) or more, such as 1.25"),
            ("load-factor = nan", "cannot be kept"),
            ("headers = [\"x y\"]", "\"x y\" cannot be the name of a header"),
            ("ttl-s = 0", "nonzero"),
            ("max-entries = 0", "nonzero"),
            ("ttl = 1", "unknown field `ttl`"),
        ] {
            let error = error(text);
            assert!(error.contains("line 1") && error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), Config::default());
        let one: Config = toml::from_str("headers = [\"X-Mine\"]").unwrap();
        assert_eq!(one.headers.iter().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-mine"]);
    }
}
