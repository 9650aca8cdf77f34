//! Which servers a call would rather go to, or must: what a rule of `alias` says of servers, as `pick` asks for it.
//!
//! A rule names servers by patterns; which ones those are is found once for every snapshot, not once for every call.

use std::num::NonZeroU32;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use smallvec::SmallVec;

use crate::cluster::{Bits, Server, Snapshot};
use crate::pattern::Pattern;

/// Servers in the order in which a rule wants them asked.
#[derive(Debug)]
pub struct Tiers {
    rule: Arc<str>,
    servers: Vec<Vec<Pattern>>,
    weights: Vec<(Pattern, NonZeroU32)>,
    is_demand: bool,
    /// What was found in the last snapshot that somebody looked at.
    found: ArcSwapOption<Found>,
}

impl Tiers {
    /// The tiers of a rule, by their servers. On demand nobody is asked who is in none of them; else those come last.
    pub fn new(
        rule: Arc<str>,
        servers: Vec<Vec<Pattern>>,
        weights: Vec<(Pattern, NonZeroU32)>,
        is_demand: bool,
    ) -> Self {
        Self { rule, servers, weights, is_demand, found: ArcSwapOption::empty() }
    }

    /// How the rule is called.
    pub fn rule(&self) -> &Arc<str> {
        &self.rule
    }

    /// Whether servers differ at all, other than by their weight.
    pub fn is_ordered(&self) -> bool {
        !self.servers.is_empty()
    }

    /// Whether nobody may be asked who is in no tier.
    pub fn is_demand(&self) -> bool {
        self.is_demand && self.is_ordered()
    }

    /// The servers that are demanded, in the words of the rule.
    pub fn wanted(&self) -> String {
        self.servers.iter().flatten().map(Pattern::as_str).collect::<Vec<_>>().join(", ")
    }

    /// Which servers of a snapshot those are.
    pub fn of(&self, snapshot: &Arc<Snapshot>) -> Arc<Found> {
        if let Some(found) = self.found.load_full().filter(|found| found.is_of(snapshot)) {
            return found;
        }
        let found = Arc::new(self.find(snapshot));
        self.found.store(Some(found.clone()));
        found
    }

    fn find(&self, snapshot: &Arc<Snapshot>) -> Found {
        let is_meant = |server: &Server, patterns: &[Pattern]| patterns.iter().any(|p| p.matches(server.id.as_str()));
        let tier = |patterns: &Vec<Pattern>| {
            let mut bits = Bits::default();
            snapshot.servers.iter().filter(|server| is_meant(server, patterns)).for_each(|s| bits.insert(s.index));
            bits
        };
        let tiers: SmallVec<[Bits; 2]> = self.servers.iter().map(tier).collect();
        let mut every = Bits::default();
        tiers.iter().for_each(|tier| every.add(tier));
        let weight = |server: &Arc<Server>| {
            let given = self.weights.iter().find(|(pattern, _)| pattern.matches(server.id.as_str()));
            given.map_or(server.weight, |(_, weight)| *weight)
        };
        let mut weights = Vec::new();
        if !self.weights.is_empty() {
            weights.resize(snapshot.servers.places(), NonZeroU32::MIN);
            snapshot.servers.iter().for_each(|server| weights[server.index] = weight(server));
        }
        Found { snapshot: Arc::downgrade(snapshot), tiers, every, weights }
    }
}

/// The servers of a snapshot, by the tiers of a rule.
#[derive(Debug)]
pub struct Found {
    snapshot: Weak<Snapshot>,
    tiers: SmallVec<[Bits; 2]>,
    every: Bits,
    /// By index; empty if the rule says nothing of weights.
    weights: Vec<NonZeroU32>,
}

impl Found {
    fn is_of(&self, snapshot: &Arc<Snapshot>) -> bool {
        std::ptr::eq(self.snapshot.as_ptr(), Arc::as_ptr(snapshot))
    }

    /// The servers of all tiers.
    pub fn every(&self) -> &Bits {
        &self.every
    }

    /// The tier that a server is in, counted from the first; one more than there are, if it is in none.
    pub fn tier(&self, server: &Server) -> usize {
        self.tiers.iter().position(|tier| tier.contains(server.index)).unwrap_or(self.tiers.len())
    }

    /// What the rule says of a server's weight, else what the server says.
    pub fn weight(&self, server: &Server) -> NonZeroU32 {
        self.weights.get(server.index).copied().unwrap_or(server.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn tiers(tiers: &[&[&str]]) -> Tiers {
        let patterns = |names: &&[&str]| names.iter().map(|name| Pattern::parse(name).unwrap()).collect();
        Tiers::new("r".into(), tiers.iter().map(patterns).collect(), Vec::new(), true)
    }

    #[tokio::test]
    async fn servers_are_found_by_patterns_once_for_a_snapshot() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"], &["tiny"]]).await;
        let tiers = tiers(&[&["2"], &["0", "2*"]]);
        let snapshot = cluster.snapshot();
        let found = tiers.of(&snapshot);
        let places: Vec<usize> = snapshot.servers.iter().map(|server| found.tier(server)).collect();
        assert_eq!((places, found.every().iter().collect::<Vec<_>>()), (vec![1, 2, 0], vec![0, 2]));
        assert!(Arc::ptr_eq(&found, &tiers.of(&snapshot)));
        cluster.note_removed(&[crate::ServerId::new("0")], &crate::ModelName::parse("tiny").unwrap());
        assert!(!Arc::ptr_eq(&found, &tiers.of(&cluster.snapshot())));
    }
}
