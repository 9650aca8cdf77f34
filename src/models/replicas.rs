//! At how many servers a model is to be, and at which.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use olol_middleware::{ModelName, Server};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{held_by, shares};

/// The header by which a pull says how many servers it is for.
pub const HEADER: HeaderName = HeaderName::from_static("x-olol-replicas");

/// How many servers a model is to be at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replicas {
    /// All that can be reached.
    #[default]
    All,
    /// All whose disks have room for it.
    Fits,
    /// So many.
    Some(NonZeroU32),
}

impl Replicas {
    /// What a pull says, if it says something.
    pub fn asked(headers: &HeaderMap) -> Result<Option<Self>, String> {
        let Some(value) = headers.get(HEADER) else { return Ok(None) };
        value.to_str().unwrap_or_default().parse().map(Some).map_err(|why| format!("X-Olol-Replicas: {why}"))
    }
}

impl FromStr for Replicas {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "all" => Ok(Self::All),
            "fits" => Ok(Self::Fits),
            "one" => Ok(Self::Some(NonZeroU32::MIN)),
            number => number
                .parse()
                .map(Self::Some)
                .map_err(|_| "say all, fits (wherever there is room), one, or a number of servers".to_owned()),
        }
    }
}

impl fmt::Display for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Fits => f.write_str("fits"),
            Self::Some(NonZeroU32::MIN) => f.write_str("one"),
            Self::Some(number) => number.fmt(f),
        }
    }
}

impl Serialize for Replicas {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Some(number) if number.get() > 1 => number.serialize(serializer),
            word => serializer.collect_str(word),
        }
    }
}

impl<'de> Deserialize<'de> for Replicas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reading;
        impl serde::de::Visitor<'_> for Reading {
            type Value = Replicas;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"all\", \"fits\", \"one\" or a number of servers")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Replicas, E> {
                text.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Replicas, E> {
                let some = u32::try_from(number).ok().and_then(NonZeroU32::new);
                some.map(Replicas::Some).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Unsigned(number), &self))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Replicas, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::invalid_value(serde::de::Unexpected::Signed(number), &self)),
                }
            }
        }
        deserializer.deserialize_any(Reading)
    }
}

/// The servers in the order in which they are to have a model: who has it already; then who can give it to others, since the
/// registry is asked once; then who has the most room and the least to do.
pub fn ranked(model: &ModelName, servers: &[Arc<Server>]) -> Vec<Arc<Server>> {
    let mut ranked = servers.to_vec();
    ranked.sort_by_cached_key(|server| {
        let vitals = server.vitals.load();
        let free = vitals.as_ref().and_then(|vitals| vitals.disk_free).unwrap_or(0);
        let load = server.load.in_flight() + vitals.as_ref().map_or(0, |vitals| vitals.others);
        let is_pulling = vitals
            .as_ref()
            .is_some_and(|vitals| vitals.pending_pulls.iter().any(|(name, _)| name.as_str() == model.as_str()));
        let unlike = (!server.is_usable(), !is_pulling, held_by(server, model).is_none(), !shares(server));
        // Gibibytes: what differs by less is the same room.
        (unlike, std::cmp::Reverse(free >> 34), load, std::cmp::Reverse(free >> 30), server.index)
    });
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_many_is_said_in_a_word_or_a_number() {
        for text in ["all", "fits", "one", "3"] {
            assert_eq!(text.parse::<Replicas>().unwrap().to_string(), text);
        }
        assert_eq!("1".parse::<Replicas>(), Ok(Replicas::Some(NonZeroU32::MIN)));
        for text in ["", "0", "-1", "some", "all of them"] {
            assert!(text.parse::<Replicas>().is_err(), "{text}");
        }
        let headers = HeaderMap::from_iter([(HEADER, "many".parse().unwrap())]);
        assert!(Replicas::asked(&headers).unwrap_err().starts_with("X-Olol-Replicas: say all"));
        assert_eq!(Replicas::asked(&HeaderMap::new()), Ok(None));
    }
}
