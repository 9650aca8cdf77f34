//! Which servers have what of which conversations: what `affinity` remembers.

use std::num::NonZeroU32;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quick_cache::sync::{Cache, DefaultLifecycle, EntryAction, EntryResult};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, UnitWeighter};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Turn;
use super::balance::half_life;
use super::chain::join;
use crate::cluster::Server;
use crate::names::ServerId;

/// Servers that are remembered for one link: a beginning that many conversations share may be everywhere.
const HOLDERS: usize = 4;
/// Different ways in which conversations went on from one link, from which on it is no conversation's but what many begin
/// with: examples, a document, a greeting.
const SHARED: u16 = 8;

/// What is remembered of conversations, and for how long. Bounded; the links that nobody asked for go first.
#[derive(Debug)]
pub struct Table {
    /// By what [`Table::keyed`] makes of them.
    links: Cache<u64, Seen>,
    born: Instant,
    key: AtomicU64,
    /// The one before; 0: none.
    key_before: AtomicU64,
    /// Where turns go that no agent tells the other proxies of.
    others: OnceLock<mpsc::Sender<(ServerId, Turn)>>,
    /// Where turns go that an agent is to tell of, and that it was not told of with their calls.
    agents: OnceLock<mpsc::Sender<(ServerId, Turn)>>,
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
        Self {
            links,
            born: Instant::now(),
            key: AtomicU64::new(0),
            key_before: AtomicU64::new(0),
            others: OnceLock::new(),
            agents: OnceLock::new(),
            turns: AtomicU64::new(0),
        }
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

    /// When it was last of use, by the clock of the table.
    pub(super) fn at(&self) -> u32 {
        self.at
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

    /// From now on links are known by what this key makes of them. Those who tell each other of turns must have the same.
    /// What was known by the key before is found all the same.
    pub fn set_key(&self, key: u64) {
        let before = self.key.swap(key, Ordering::Relaxed);
        if before != key {
            self.key_before.store(before, Ordering::Relaxed);
        }
    }

    /// What a link is known by, here and wherever it is told.
    pub(super) fn keyed(&self, link: u64) -> u64 {
        join(self.key.load(Ordering::Relaxed), link).max(1)
    }

    /// What is known of a link, if that is no older than `ttl`.
    pub(super) fn seen(&self, link: u64, ttl: Duration) -> Option<Seen> {
        let before = || {
            let key = self.key_before.load(Ordering::Relaxed);
            if key == 0 { None } else { self.links.get(&join(key, link).max(1)) }
        };
        let seen = self.links.get(&self.keyed(link)).or_else(before)?;
        let age = u64::from(self.now().saturating_sub(seen.at));
        (age < ttl.as_secs()).then_some(seen)
    }

    /// A server, one of so many, has answered a turn that was sent from here.
    pub(super) fn answered(&self, turn: &Turn, server: &Server, servers: usize) {
        if let Some(known) = turn.known {
            self.learn_more(known, &server.id, turn.goes_on);
        }
        turn.news.iter().for_each(|link| self.insert(*link, &server.id));
        server.share.count_turn(half_life(self.count_turn(), servers));
    }

    /// From now on turns of servers without an agent go there. What finds no room is dropped.
    pub fn tell_others_by(&self, others: mpsc::Sender<(ServerId, Turn)>) {
        // A second one would be another proxy's: there is one for a table.
        let _ = self.others.set(others);
    }

    /// From now on what agents are to tell of goes there, if it was not said with a call. What finds no room is dropped.
    pub fn tell_agents_by(&self, agents: mpsc::Sender<(ServerId, Turn)>) {
        let _ = self.agents.set(agents);
    }

    /// Tells the other proxies of a turn that was sent with its links: the agent of its server, if it has one, has them.
    pub(super) fn tell_others(&self, turn: &Turn, server: &Server) {
        if server.vitals.load().is_none() {
            tell(&self.others, turn, server);
        }
    }

    /// A server has given an answer from which its client can go on in a way that nobody knew before. The other proxies are
    /// told, by the server's agent if it has one.
    pub(super) fn gave(&self, links: impl Iterator<Item = u64>, server: &Server) {
        let turn = Turn { news: links.map(|link| self.keyed(link)).collect(), ..Turn::default() };
        turn.news.iter().for_each(|link| self.insert(*link, &server.id));
        tell(if server.vitals.load().is_none() { &self.others } else { &self.agents }, &turn, server);
    }

    /// A server, one of so many, has answered a turn that another proxy has sent there. What that proxy took for new may be
    /// known here, and the other way round.
    pub fn told(&self, turn: &Turn, server: &Server, servers: usize) {
        let known = turn.known.map(|known| (known, turn.goes_on));
        for (link, goes_on) in known.into_iter().chain(turn.news.iter().map(|link| (*link, false))) {
            if !self.learn_more(link, &server.id, goes_on) {
                self.insert(link, &server.id);
            }
        }
        server.share.count_turn(half_life(self.count_turn(), servers));
    }

    /// A server has lost all that it had cached.
    pub fn forget(&self, server: &Server) {
        // What was learnt within this second may be older or younger: to take it for lost costs a hint, and no more.
        server.share.forget(self.now().saturating_add(1));
    }

    /// A server was asked for a link that is new.
    #[cfg(test)]
    fn learn(&self, link: u64, server: &ServerId) {
        self.insert(self.keyed(link), server);
    }

    fn insert(&self, keyed: u64, server: &ServerId) {
        self.links.insert(keyed, Seen { holders: [mark(server), 0, 0, 0], at: self.now(), branches: 0 });
    }

    /// A server was asked for a link that is known, or for something that goes on from it in a new way. False if it is not
    /// known: if it has gone in the meantime, it was of no use to anybody.
    fn learn_more(&self, keyed: u64, server: &ServerId, goes_on: bool) -> bool {
        let (mark, at) = (mark(server), self.now());
        let found = self.links.entry(&keyed, Some(Duration::ZERO), |_, seen| {
            seen.held_by(mark);
            seen.at = at;
            seen.branches = seen.branches.saturating_add(u16::from(goes_on));
            EntryAction::Retain(())
        });
        matches!(found, EntryResult::Retained(()))
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

fn tell(way: &OnceLock<mpsc::Sender<(ServerId, Turn)>>, turn: &Turn, server: &Server) {
    if let Some(way) = way.get()
        && !turn.is_empty()
    {
        let _ = way.try_send((server.id.clone(), turn.clone()));
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
        table.learn_more(table.keyed(7), &server("a"), true);
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
            table.learn_more(table.keyed(7), &server(name), false);
        }
        let wanted: Vec<u32> = ["e", "d", "b", "c"].map(|name| mark(&server(name))).to_vec();
        assert_eq!(names(table.seen(7, TTL).unwrap()), wanted);
    }

    #[test]
    fn a_link_that_many_go_on_from_says_nothing() {
        let table = Table::default();
        table.learn(7, &server("a"));
        for _ in 1..SHARED {
            table.learn_more(table.keyed(7), &server("a"), true);
        }
        assert!(!table.seen(7, TTL).unwrap().is_shared());
        table.learn_more(table.keyed(7), &server("a"), true);
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
