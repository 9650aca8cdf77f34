//! Numbers of a configuration that cannot be out of their range: what is, is refused where it is read, with its line.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// A year in milliseconds: the longest time that anything here may take. What is longer is a slip, and adding it to the
/// time of day may overflow.
const YEAR_MS: u64 = 365 * 24 * 60 * 60 * 1000;
/// The same in seconds.
const YEAR_S: u64 = YEAR_MS / 1000;

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Whole<const MIN: u64, const MAX: u64>(u64);

/// Milliseconds, perhaps none.
pub type Ms = Whole<0, YEAR_MS>;
/// Milliseconds, at least one.
pub type SomeMs = Whole<1, YEAR_MS>;
/// Seconds, perhaps none.
pub type Seconds = Whole<0, YEAR_S>;
/// Seconds, at least one.
pub type SomeSeconds = Whole<1, YEAR_S>;

impl<const MIN: u64, const MAX: u64> Whole<MIN, MAX> {
    /// The number, or the nearest one in the range.
    pub const fn new(number: u64) -> Self {
        Self(if number < MIN {
            MIN
        } else if number > MAX {
            MAX
        } else {
            number
        })
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl Whole<0, YEAR_MS> {
    /// As a time.
    pub const fn time(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl Whole<1, YEAR_MS> {
    /// As a time.
    pub const fn time(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl Whole<0, YEAR_S> {
    /// As a time.
    pub const fn time(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

impl Whole<1, YEAR_S> {
    /// As a time.
    pub const fn time(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

impl<const MIN: u64, const MAX: u64> Default for Whole<MIN, MAX> {
    fn default() -> Self {
        Self(MIN)
    }
}

impl<const MIN: u64, const MAX: u64> fmt::Display for Whole<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<const MIN: u64, const MAX: u64> FromStr for Whole<MIN, MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse().ok().filter(|number| (MIN..=MAX).contains(number));
        number.map(Self).ok_or_else(|| format!("not a whole number from {MIN} to {MAX}"))
    }
}

struct Reading<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64> Visitor<'_> for Reading<MIN, MAX> {
    type Value = Whole<MIN, MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from {MIN} to {MAX}")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
        let fits = (MIN..=MAX).contains(&number);
        fits.then_some(Whole(number)).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &self)),
        }
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Whole<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_u64(Reading)
    }
}

/// A part of a whole: a number from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Deserialize, Serialize)]
#[serde(try_from = "f64")]
pub struct Share(f64);

impl Share {
    /// None of it.
    pub const NONE: Self = Self(0.0);

    /// So many thousandths, at most all of them.
    pub const fn of_thousand(thousandths: u16) -> Self {
        Self(if thousandths > 1000 { 1.0 } else { thousandths as f64 / 1000.0 })
    }

    /// The number.
    pub const fn get(self) -> f64 {
        self.0
    }

    /// In thousandths.
    #[expect(clippy::cast_possible_truncation, reason = "between 0 and 1000")]
    pub const fn thousandths(self) -> i64 {
        (self.0 * 1000.0) as i64
    }
}

impl TryFrom<f64> for Share {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        let fits = (0.0..=1.0).contains(&number);
        fits.then_some(Self(number)).ok_or_else(|| format!("invalid value: `{number}`, expected a number from 0 to 1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Numbers {
        ms: Option<SomeMs>,
        share: Option<Share>,
    }

    fn read(text: &str) -> Result<Numbers, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_number_in_its_range_is_read() {
        let numbers = read("ms = 1\nshare = 1").unwrap();
        assert_eq!((numbers.ms.unwrap().time(), numbers.share.unwrap().get()), (Duration::from_millis(1), 1.0));
        assert_eq!(read("share = 0.2").unwrap().share.unwrap().thousandths(), 200);
    }

    #[test]
    fn a_number_out_of_its_range_is_refused() {
        for (text, says) in [
            ("ms = 0", "integer `0`, expected a whole number from 1 to 31536000000"),
            ("ms = -1", "integer `-1`"),
            ("ms = 9223372036854775807", "expected a whole number from 1 to 31536000000"),
            ("ms = 1.5", "floating point `1.5`"),
            ("ms = \"5s\"", "string \"5s\""),
            ("share = 7.5", "`7.5`, expected a number from 0 to 1"),
            ("share = -0.1", "`-0.1`, expected a number from 0 to 1"),
            ("share = nan", "`NaN`, expected a number from 0 to 1"),
            ("share = inf", "`inf`, expected a number from 0 to 1"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!("7".parse::<Whole<0, 8>>().is_ok() && "9".parse::<Whole<0, 8>>().is_err());
    }
}
