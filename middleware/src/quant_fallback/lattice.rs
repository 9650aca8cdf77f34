//! Which levels may stand for which: rows that say it exactly, and a ladder for those that have no row.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::level::Level;

/// Levels from the lowest to the highest: each is served by itself, or by one that stands further on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "Vec<Level>")]
pub struct Ladder(Vec<Level>);

impl Default for Ladder {
    fn default() -> Self {
        Self(Level::by_quality().collect())
    }
}

impl TryFrom<Vec<Level>> for Ladder {
    type Error = String;

    fn try_from(levels: Vec<Level>) -> Result<Self, String> {
        let twin = levels.iter().enumerate().find(|(at, level)| levels[..*at].contains(level));
        match twin {
            Some((_, level)) => Err(format!("{level} stands twice: a level has one place on the ladder")),
            None => Ok(Self(levels)),
        }
    }
}

/// Rows of a level and those that may stand for it, the best first. A file replaces single rows; the others stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Accept(BTreeMap<Level, Vec<Level>>);

/// The rows that hold where nobody says otherwise. They are those of the first OLOL: as an upgrade costs memory, the plain
/// levels go no further than to 8 bits, and 8 bits are not exchanged for 16.
const ROWS: [(&str, &[&str]); 6] = [
    ("q4_0", &["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]),
    ("q4_1", &["q4_1", "q5_0", "q5_1", "q8_0"]),
    ("q5_0", &["q5_0", "q5_1", "q8_0"]),
    ("q5_1", &["q5_1", "q8_0"]),
    ("q8_0", &["q8_0"]),
    ("f16", &["f16"]),
];

impl Default for Accept {
    fn default() -> Self {
        let row = |(level, others): (&str, &[&str])| {
            Some((Level::parse(level)?, others.iter().filter_map(|other| Level::parse(other)).collect()))
        };
        Self(ROWS.into_iter().filter_map(row).collect())
    }
}

impl<'de> Deserialize<'de> for Accept {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut rows = Self::default();
        rows.0.extend(BTreeMap::<Level, Vec<Level>>::deserialize(from)?);
        Ok(rows)
    }
}

/// Rows and ladder, ready to be asked.
#[derive(Debug)]
pub(super) struct Lattice {
    /// By what was asked for.
    rows: Vec<(Level, Box<[Level]>)>,
}

impl Lattice {
    pub(super) fn new(accept: &Accept, ladder: &Ladder) -> Self {
        let row = |level: Level| match (accept.0.get(&level), ladder.0.iter().position(|other| *other == level)) {
            (Some(row), _) => row.clone(),
            (None, Some(at)) => ladder.0[at..].to_vec(),
            (None, None) => vec![level],
        };
        Self { rows: Level::all().map(|level| (level, row(level).into())).collect() }
    }

    /// The levels that may stand for one, the best first.
    pub(super) fn row(&self, wanted: Level) -> &[Level] {
        self.rows.iter().find(|(level, _)| *level == wanted).map_or(&[], |(_, row)| row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(text: &str) -> Level {
        Level::parse(text).unwrap()
    }

    fn row(lattice: &Lattice, wanted: &str) -> String {
        let row: Vec<&str> = lattice.row(level(wanted)).iter().map(|level| level.as_str()).collect();
        row.join(" ")
    }

    #[test]
    fn the_rows_of_the_first_olol_hold_exactly() {
        let lattice = Lattice::new(&Accept::default(), &Ladder::default());
        for (wanted, accepted) in [
            ("q4_0", "q4_0 q4_1 q5_0 q5_1 q8_0"),
            ("q4_1", "q4_1 q5_0 q5_1 q8_0"),
            ("q5_0", "q5_0 q5_1 q8_0"),
            ("q5_1", "q5_1 q8_0"),
            ("q8_0", "q8_0"),
            ("f16", "f16"),
        ] {
            assert_eq!(row(&lattice, wanted), accepted);
        }
    }

    #[test]
    fn other_levels_are_served_by_the_same_or_a_better_one() {
        let lattice = Lattice::new(&Accept::default(), &Ladder::default());
        assert_eq!(row(&lattice, "q4_k_m"), "q4_k_m q5_0 q5_1 q5_k_s q5_k_m q6_k q8_0");
        assert_eq!(row(&lattice, "q6_k"), "q6_k q8_0");
        assert!(row(&lattice, "iq1_s").ends_with("q6_k q8_0"));
        for alone in ["bf16", "f32", "mxfp4", "nvfp4", "int8", "tq1_0"] {
            assert_eq!(row(&lattice, alone), alone);
        }
        let place = |level: &Level| Level::by_quality().position(|other| other == *level);
        for wanted in Level::all() {
            let row = lattice.row(wanted);
            assert_eq!(row[0], wanted);
            assert!(row.iter().all(|level| place(level) >= place(&wanted)) && row.is_sorted_by_key(place), "{wanted}");
        }
    }

    #[test]
    fn a_file_replaces_single_rows_and_the_ladder() {
        let accept: Accept = toml::from_str("Q4_0 = [\"q4_0\", \"q4_k_m\"]\nbf16 = [\"bf16\", \"f32\"]").unwrap();
        let ladder = Ladder::try_from(vec![level("q2_k"), level("q6_k")]).unwrap();
        let lattice = Lattice::new(&accept, &ladder);
        assert_eq!(row(&lattice, "q4_0"), "q4_0 q4_k_m");
        assert_eq!(row(&lattice, "bf16"), "bf16 f32");
        assert_eq!(row(&lattice, "q5_0"), "q5_0 q5_1 q8_0");
        assert_eq!((row(&lattice, "q2_k"), row(&lattice, "q4_k_m")), ("q2_k q6_k".to_owned(), "q4_k_m".to_owned()));
        assert!(Ladder::try_from(vec![level("q2_k"), level("q2_k")]).unwrap_err().contains("q2_k stands twice"));
        let error = toml::from_str::<Accept>("q4_9 = []").unwrap_err().to_string();
        assert!(error.contains("unknown variant `q4_9`") && error.contains("`q4_k_m`"), "{error}");
    }
}
