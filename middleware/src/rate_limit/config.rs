//! The `[rate-limit]` table.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::pattern::Pattern;

/// What somebody may use; what is left out is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case", remote = "Self")]
pub struct Limits {
    /// Requests a minute in the long run.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Requests at once after a rest; as many as a minute's if left out.
    pub burst: Option<NonZeroU32>,
    /// Requests that may be answered at the same time.
    pub concurrent: Option<NonZeroU32>,
    /// Tokens a minute, of prompts and answers together.
    pub tokens_per_minute: Option<NonZeroU64>,
    /// Tokens a day, of prompts and answers together.
    pub tokens_per_day: Option<NonZeroU64>,
}

impl Limits {
    /// Whether tokens are limited.
    pub(super) fn counts_tokens(&self) -> bool {
        self.tokens_per_minute.is_some() || self.tokens_per_day.is_some()
    }

    /// Whether a call is limited at all.
    pub(super) fn concern(&self, runs: bool) -> bool {
        self.requests_per_minute.is_some() || runs && (self.concurrent.is_some() || self.counts_tokens())
    }
}

impl<'de> Deserialize<'de> for Limits {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let limits = Self::deserialize(from)?;
        if limits.burst.is_some() && limits.requests_per_minute.is_none() {
            return Err(de::Error::custom("`burst` is nothing without `requests-per-minute`: say how many come back"));
        }
        Ok(limits)
    }
}

impl Serialize for Limits {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, to)
    }
}

/// The `[rate-limit]` table. Nothing is limited unless it says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// For each key that has no limits of its own.
    pub key: Limits,
    /// For each address without a key: one of IPv4, or a /64 of IPv6.
    pub client: Limits,
    /// For models, by name or pattern: shared by all clients, and by all models that a pattern fits. Every pattern that fits
    /// holds.
    pub models: Models,
}

/// Limits by patterns of models.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "BTreeMap<String, Limits>", into = "BTreeMap<String, Limits>")]
pub struct Models(Vec<(Pattern, Limits)>);

impl TryFrom<BTreeMap<String, Limits>> for Models {
    type Error = String;

    fn try_from(tables: BTreeMap<String, Limits>) -> Result<Self, String> {
        let mut models: Vec<(Pattern, Limits)> = Vec::new();
        for (text, limits) in tables {
            let pattern = Pattern::of_models(&text).map_err(|error| error.to_string())?;
            if models.iter().any(|(other, _)| *other == pattern) {
                return Err(format!("'{text}' is '{pattern}', which has limits already: write one table for both"));
            }
            models.push((pattern, limits));
        }
        Ok(Self(models))
    }
}

impl Models {
    pub(super) fn iter(&self) -> impl Iterator<Item = &(Pattern, Limits)> {
        self.0.iter()
    }
}

impl From<Models> for BTreeMap<String, Limits> {
    fn from(models: Models) -> Self {
        models.0.into_iter().map(|(pattern, limits)| (pattern.to_string(), limits)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_limited_by_default() {
        assert_eq!(toml::from_str::<Config>("").unwrap(), Config::default());
        assert!(!Config::default().key.concern(true) && !Config::default().client.concern(true));
    }

    #[test]
    fn a_table_reads_and_writes() {
        let text = "[key]\nrequests-per-minute = 60\nburst = 5\n[models.\"llama3*\"]\nconcurrent = 2\n[models.tiny]\ntokens-per-day = 9";
        let config: Config = toml::from_str(text).unwrap();
        assert_eq!(config.key.burst, NonZeroU32::new(5));
        assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        for (text, wanted) in [
            ("[key]\nburst = 5", "`burst` is nothing without `requests-per-minute`"),
            ("[key]\nrequests-per-minute = 0", "nonzero"),
            ("[client]\nrequest-per-minute = 1", "unknown field `request-per-minute`"),
            ("[clients]", "unknown field `clients`"),
            ("[models.a]\n[models.\"A:latest\"]", "'a' is 'a:latest', which has limits already"),
            ("[models.\"\"]", "must not be empty"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            assert!(error.contains("line ") && error.contains(wanted), "{error}");
        }
    }
}
