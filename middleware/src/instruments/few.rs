//! How many values a label may have: whoever scrapes pays for each.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

/// What all values become for which there is no room.
pub(super) const OTHER: &str = "other";

/// Models with a series of their own.
pub(super) static MODELS: LazyLock<Few> = LazyLock::new(|| Few::new(1000));
/// Keys with a series of their own.
pub(super) static KEYS: LazyLock<Few> = LazyLock::new(|| Few::new(100));
/// Models on servers with series of their own.
pub(super) static RUNNERS: LazyLock<Few> = LazyLock::new(|| Few::new(4000));

/// The first values of a label, up to a number; the same for as long as the process lives, since series are never forgotten.
#[derive(Debug)]
pub(super) struct Few {
    most: usize,
    known: RwLock<HashSet<Arc<str>>>,
}

impl Few {
    fn new(most: usize) -> Self {
        Self { most, known: RwLock::default() }
    }

    /// The value, or the one that stands for all others.
    pub(super) fn of(&self, value: &Arc<str>) -> Arc<str> {
        if self.has(value) || self.admits(value) { value.clone() } else { OTHER.into() }
    }

    /// Whether there is room for a value.
    pub(super) fn admits(&self, value: &Arc<str>) -> bool {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.contains(value) || (known.len() < self.most && known.insert(value.clone()))
    }

    fn has(&self, value: &str) -> bool {
        self.known.read().unwrap_or_else(PoisonError::into_inner).contains(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_has_no_more_values_than_it_may() {
        let few = Few::new(2);
        let label = |value: &str| few.of(&value.into()).to_string();
        assert_eq!(["a", "b", "a", "c", "b", "d"].map(label), ["a", "b", "a", "other", "b", "other"]);
    }
}
