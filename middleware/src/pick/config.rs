//! How one of the candidates is chosen, and what the operator says of slots.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::cluster::Server;
use crate::names::ModelName;
use crate::pattern::Pattern;

/// The `[pick]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// How one of the candidates is chosen.
    pub policy: Policy,
    /// How many slots runners have, where that is neither read nor learned: the first rule that fits counts.
    pub slots: Vec<SlotRule>,
}

/// How many slots some runners have: `OLLAMA_NUM_PARALLEL` of their servers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SlotRule {
    /// On which servers; all if left out.
    #[serde(default = "any")]
    pub servers: Vec<Pattern>,
    /// Of which models; all if left out.
    #[serde(default = "any")]
    pub models: Vec<Pattern>,
    /// Calls that each of them answers side by side.
    pub slots: NonZeroU32,
}

fn any() -> Vec<Pattern> {
    Pattern::parse("*").into_iter().collect()
}

impl Config {
    /// What the operator said of a runner; 0: nothing.
    pub(super) fn slots(&self, server: &Server, model: &ModelName) -> u32 {
        let fits = |rule: &&SlotRule| {
            rule.servers.iter().any(|pattern| pattern.matches(server.id.as_str()))
                && rule.models.iter().any(|pattern| pattern.matches_model(model))
        };
        self.slots.iter().find(fits).map_or(0, |rule| rule.slots.get())
    }
}

/// How one of the candidates is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The one that is predicted to answer soonest.
    #[default]
    Predicted,
    /// One after the other.
    RoundRobin,
    /// The one with the fewest calls.
    LeastLoaded,
    /// The one with the fewest calls for its weight.
    Weighted,
    /// The less loaded of two taken at random.
    RandomTwoChoices,
    /// The same one for the same model and client, as long as the servers stay the same.
    ConsistentHash,
}

impl Policy {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Predicted => "predicted",
            Self::RoundRobin => "round_robin",
            Self::LeastLoaded => "least_loaded",
            Self::Weighted => "weighted",
            Self::RandomTwoChoices => "random_two_choices",
            Self::ConsistentHash => "consistent_hash",
        }
    }
}
