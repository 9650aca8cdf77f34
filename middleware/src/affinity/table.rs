//! Which servers have what of which conversations: what `affinity` remembers.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quick_cache::sync::{Cache, DefaultLifecycle, EntryAction};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, UnitWeighter};
use tokio::time::Instant;

use crate::names::ServerId;

/// Servers that are remembered for one link: a beginning that many conversations share may be everywhere.
const HOLDERS: usize = 4;
/// Different ways in which conversations went on from one link, from which on it is no conversation's but what many begin
/// with: examples, a document, a greeting.
const SHARED: u16 = 8;

/// What is remembered of conversations, and for how long. Bounded; the links that nobody asked for go first.
#[derive(Debug)]
pub struct Table {
    links: Cache<u64, Seen>,
    born: Instant,
    /// Turns that were answered so far.
    turns: AtomicU64,
}

impl Default for Table {
    fn default() -> Self {
        let most = super::Config::default().max_entries.get();
        // What counts is how lately a link was of use, not how often: half of the room is for what is new. What has gone is
        // gone, so nothing is kept of it.
        let options = OptionsBuilder::new()
            .estimated_items_capacity(most as usize)
            .weight_capacity(most.into())
            .hot_allocation(0.5)
            .ghost_allocation(0.0)
            .build();
        let links = options.map_or_else(
            |_| Cache::new(most as usize),
            |options| {
                Cache::with_options(options, UnitWeighter, DefaultHashBuilder::default(), DefaultLifecycle::default())
            },
        );
        Self { links, born: Instant::now(), turns: AtomicU64::new(0) }
    }
}

/// What is remembered of one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Who has it in a cache, the last one first, by [`mark`]; 0: nobody more.
    holders: [u32; HOLDERS],
    /// Seconds from the birth of the table to when it was last of use.
    at: u32,
    /// How often a conversation went on from here in a new way.
    branches: u16,
}

impl Seen {
    /// Who has it in a cache, by [`mark`], the last one first.
    pub(super) fn holders(&self) -> impl Iterator<Item = u32> + '_ {
        self.holders.iter().copied().take_while(|mark| *mark != 0)
    }

    /// Whether so many conversations go on from here that it says nothing about any of them.
    pub(super) fn is_shared(&self) -> bool {
        self.branches >= SHARED
    }

    fn held_by(&mut self, mark: u32) {
        let at = self.holders.iter().position(|held| *held == mark).unwrap_or(HOLDERS - 1);
        self.holders.copy_within(..at, 1);
        self.holders[0] = mark;
    }
}

/// A server in few bits: made of its name, so that it means the same after a reload.
pub(super) fn mark(server: &ServerId) -> u32 {
    u32::try_from(server.number() >> 32).unwrap_or_default().max(1)
}

impl Table {
    /// Remembers so many links at most.
    pub(super) fn hold(&self, most: NonZeroU32) {
        let most = u64::from(most.get());
        // The shards round up.
        if self.links.capacity().abs_diff(most) > self.links.num_shards() as u64 {
            self.links.set_capacity(most);
        }
    }

    /// What is known of a link, if that is no older than `ttl`.
    pub(super) fn seen(&self, link: u64, ttl: Duration) -> Option<Seen> {
        let seen = self.links.get(&link)?;
        let age = u64::from(self.now().saturating_sub(seen.at));
        (age < ttl.as_secs()).then_some(seen)
    }

    /// A server was asked for a link that is new.
    pub(super) fn learn(&self, link: u64, server: &ServerId) {
        self.links.insert(link, Seen { holders: [mark(server), 0, 0, 0], at: self.now(), branches: 0 });
    }

    /// A server was asked for a link that is known, or for something that goes on from it in a new way.
    pub(super) fn learn_more(&self, link: u64, server: &ServerId, goes_on: bool) {
        let (mark, at) = (mark(server), self.now());
        // If it has gone in the meantime, it was of no use to anybody.
        let _ = self.links.entry(&link, Some(Duration::ZERO), |_, seen| {
            seen.held_by(mark);
            seen.at = at;
            seen.branches = seen.branches.saturating_add(u16::from(goes_on));
            EntryAction::Retain(())
        });
    }

    /// Links that are remembered.
    pub fn len(&self) -> usize {
        self.links.len()
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Another turn was answered.
    pub(super) fn count_turn(&self) -> u64 {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    /// Turns that were answered so far.
    pub(super) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    fn now(&self) -> u32 {
        u32::try_from(self.born.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);
    const NEARLY: Duration = Duration::from_secs(59);

    fn names(seen: Seen) -> Vec<u32> {
        seen.holders().collect()
    }

    fn server(name: &str) -> ServerId {
        ServerId::new(name)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_old_is_not_known_any_more() {
        let table = Table::default();
        table.learn(7, &server("a"));
        tokio::time::advance(NEARLY).await;
        assert!(table.seen(7, TTL).is_some());
        table.learn_more(7, &server("a"), true);
        tokio::time::advance(NEARLY).await;
        assert!(table.seen(7, TTL).is_some(), "a turn makes it young again");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(table.seen(7, TTL).is_none());
        assert!(table.seen(7, 2 * TTL).is_some(), "how long is for the configuration of the moment to say");
    }

    #[test]
    fn the_last_server_comes_first() {
        let table = Table::default();
        table.learn(7, &server("a"));
        for name in ["b", "c", "b", "d", "e"] {
            table.learn_more(7, &server(name), false);
        }
        let wanted: Vec<u32> = ["e", "d", "b", "c"].map(|name| mark(&server(name))).to_vec();
        assert_eq!(names(table.seen(7, TTL).unwrap()), wanted);
    }

    #[test]
    fn a_link_that_many_go_on_from_says_nothing() {
        let table = Table::default();
        table.learn(7, &server("a"));
        for _ in 1..SHARED {
            table.learn_more(7, &server("a"), true);
        }
        assert!(!table.seen(7, TTL).unwrap().is_shared());
        table.learn_more(7, &server("a"), true);
        assert!(table.seen(7, TTL).unwrap().is_shared());
    }

    #[test]
    fn it_never_holds_more_than_it_may() {
        let table = Table::default();
        let most = |count| NonZeroU32::new(count).unwrap();
        table.hold(most(1000));
        (0..50_000).for_each(|link| table.learn(link, &server("a")));
        assert!(table.len() <= 1000 + table.links.num_shards(), "{}", table.len());
        assert!(table.len() > 500, "{}", table.len());
        table.hold(most(100));
        assert!(table.len() <= 100 + table.links.num_shards(), "{}", table.len());
        table.hold(most(2000));
        (0..50_000).for_each(|link| table.learn(link, &server("a")));
        assert!((1000..2000 + table.links.num_shards()).contains(&table.len()), "{}", table.len());
    }
}
