//! Long heads of requests, of which only so many are under way at a time.
//!
//! A head may be as long as Go takes it, a megabyte, and may take as long as its client likes. Without this, whoever opens
//! many connections and sends all but the end of such a head on each would have us keep all of that.

use std::sync::atomic::{AtomicU32, Ordering};

/// A head up to this is not long, bytes.
pub(super) const SHORT: usize = 64 << 10;
/// Long heads that may be under way at a time: 64 MiB.
const MOST: u32 = 64;

static UNDER_WAY: AtomicU32 = AtomicU32::new(0);

/// A place for a long head, until it is dropped.
#[derive(Debug)]
pub(super) struct Place(());

impl Place {
    /// One of the places, if there is one left.
    pub(super) fn take() -> Option<Self> {
        let more = |count: u32| (count < MOST).then_some(count + 1);
        UNDER_WAY.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a head that is not yet whole has taken, and its place if it is long.
#[derive(Debug, Default)]
pub(super) struct Heading {
    bytes: usize,
    place: Option<Place>,
}

impl Heading {
    /// More of it may be read; false: it is long, and there is no place for another long one.
    pub(super) fn may_grow(&mut self) -> bool {
        if self.bytes > SHORT && self.place.is_none() {
            self.place = Place::take();
            return self.place.is_some();
        }
        true
    }

    /// So much of it has come.
    pub(super) fn grows(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// It is whole.
    pub(super) fn ends(&mut self) {
        self.bytes = 0;
        self.place = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_long_heads_are_under_way() {
        let long = || {
            let mut heading = Heading::default();
            heading.grows(SHORT + 1);
            heading
        };
        let mut all: Vec<Heading> = (0..MOST).map(|_| long()).collect();
        // Other tests may have some, too.
        assert!(all.iter_mut().filter_map(|heading| heading.may_grow().then_some(())).count() > 0);
        let mut short = Heading::default();
        short.grows(SHORT);
        assert!(short.may_grow() && short.place.is_none());
        let mut one_more = long();
        assert!(!one_more.may_grow());
        all.clear();
        assert!(one_more.may_grow());
        one_more.ends();
        assert!(one_more.place.is_none() && one_more.may_grow());
    }
}
