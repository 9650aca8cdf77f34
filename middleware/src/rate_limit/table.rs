//! Accounts by key or address: bounded, and freed when they say no more than new ones would.
//!
//! Nothing runs beside the calls: one of them, at most once a second, looks through one shard. When a shard is full, the
//! accounts go that are nearest to being idle, so that somebody who comes from many addresses pushes out his own first and
//! never who is being answered. If nobody can go, all who are new share one account.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use hashbrown::HashTable;

use super::account::Account;

/// Parts that are locked by themselves.
const SHARDS: usize = 64;
/// The most accounts of one table.
const MOST: usize = 100_000;
/// Nanoseconds between two looks for idle accounts, each through one shard.
const PAUSE: u64 = 1_000_000_000;
/// The part of a full shard that goes, so that not every new account means looking through all.
const SHARE: usize = 16;

/// The accounts of everybody of one kind.
#[derive(Debug)]
pub(super) struct Table<K> {
    // Keyed with a secret of this process: who chooses addresses must not choose shards.
    hasher: RandomState,
    shards: Box<[Mutex<Shard<K>>]>,
    /// The most accounts of one shard.
    most: usize,
    next_look: AtomicU64,
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Shard<K> {
    accounts: HashTable<(K, Arc<Account>)>,
    /// Whose the calls are for whom there is no room.
    others: Arc<Account>,
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self::new(SHARDS, MOST)
    }
}

impl<K> Table<K> {
    fn new(shards: usize, most: usize) -> Self {
        let shard = || Mutex::new(Shard { accounts: HashTable::new(), others: Arc::default() });
        Self {
            hasher: RandomState::new(),
            shards: std::iter::repeat_with(shard).take(shards).collect(),
            most: most / shards,
            next_look: AtomicU64::new(PAUSE),
            turn: AtomicUsize::new(0),
        }
    }

    /// Accounts that there are.
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).accounts.len()).sum()
    }
}

impl<K: Hash + Eq + Clone> Table<K> {
    /// The account of somebody; a new one if there is none.
    pub(super) fn account(&self, key: &K, now: u64) -> Arc<Account> {
        self.look_after(now);
        let hash = self.hasher.hash_one(key);
        let mut shard = lock(self.shard(hash));
        if let Some((_, account)) = shard.accounts.find(hash, |(other, _)| other == key) {
            return account.clone();
        }
        if shard.accounts.len() >= self.most && !shard.make_room(self.most, now) {
            return shard.others.clone();
        }
        let account = Arc::<Account>::default();
        let entry = (key.clone(), account.clone());
        shard.accounts.insert_unique(hash, entry, |(key, _)| self.hasher.hash_one(key));
        account
    }

    /// The account of somebody, if there is one.
    pub(super) fn find(&self, key: &K) -> Option<Arc<Account>> {
        let hash = self.hasher.hash_one(key);
        let shard = lock(self.shard(hash));
        shard.accounts.find(hash, |(other, _)| other == key).map(|(_, account)| account.clone())
    }

    /// Visits all of them, a shard at a time.
    pub(super) fn each(&self, mut visit: impl FnMut(&K, &Account)) {
        for shard in &self.shards {
            lock(shard).accounts.iter().for_each(|(key, account)| visit(key, account));
        }
    }

    fn shard(&self, hash: u64) -> &Mutex<Shard<K>> {
        // The table below takes the low bits, and the highest seven.
        &self.shards[(hash >> 32) as usize % self.shards.len()]
    }

    /// Looks for idle accounts, if it is time.
    fn look_after(&self, now: u64) {
        let due = self.next_look.load(Ordering::Relaxed);
        if now < due || self.next_look.compare_exchange(due, now + PAUSE, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.shards.len();
        // Who is there has something to do; the next turn will come.
        let mut shard = match self.shards[turn].try_lock() {
            Ok(shard) => shard,
            Err(TryLockError::Poisoned(shard)) => shard.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        shard.drop_idle(now);
        let length = shard.accounts.len();
        if shard.accounts.capacity() > 64 + 4 * length {
            shard.accounts.shrink_to(2 * length, |(key, _)| self.hasher.hash_one(key));
        }
    }
}

impl<K> Shard<K> {
    fn drop_idle(&mut self, now: u64) {
        self.accounts.retain(|(_, account)| is_held(account) || account.idle_at() > now);
    }

    /// Makes room for another account; false if all are held.
    fn make_room(&mut self, most: usize, now: u64) -> bool {
        self.drop_idle(now);
        if self.accounts.len() < most {
            return true;
        }
        let free = self.accounts.iter().filter(|(_, account)| !is_held(account));
        let mut times: Vec<u64> = free.map(|(_, account)| account.idle_at()).collect();
        if times.is_empty() {
            return false;
        }
        let mut left = (most / SHARE).clamp(1, times.len());
        let (_, last, _) = times.select_nth_unstable(left - 1);
        let last = *last;
        self.accounts.retain(|(_, account)| {
            let goes = left > 0 && !is_held(account) && account.idle_at() <= last;
            left -= usize::from(goes);
            !goes
        });
        true
    }
}

/// Whether somebody else has it too: a call that is being answered, or a stack. Nobody can come by it while its shard is
/// locked.
fn is_held(account: &Arc<Account>) -> bool {
    Arc::strong_count(account) > 1
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limit::Limits;
    use crate::rate_limit::account::Need;

    const SECOND: u64 = 1_000_000_000;

    fn spend(account: &Account, requests: u32, now: u64) {
        let limits: Limits = toml::from_str("requests-per-minute = 60").unwrap();
        for _ in 0..requests {
            let _ = account.take(&limits, &Need::default(), now);
        }
    }

    fn spent(account: &Account) -> u64 {
        account.idle_at() / SECOND
    }

    #[test]
    fn the_same_key_has_the_same_account() {
        let table = Table::<u32>::default();
        spend(&table.account(&7, 0), 3, 0);
        assert_eq!((spent(&table.account(&7, 0)), spent(&table.account(&8, 0))), (3, 0));
        assert!(table.find(&7).is_some() && table.find(&9).is_none());
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn idle_accounts_are_freed_by_who_comes_later() {
        let table = Table::<u32>::default();
        (0..1000).for_each(|key| spend(&table.account(&key, 0), 5, 0));
        let held = table.account(&1000, 0);
        assert_eq!(table.len(), 1001);
        (0..SHARDS as u64).for_each(|turn| drop(table.account(&1001, (10 + turn) * SECOND)));
        assert_eq!(table.len(), 2);
        assert!(table.find(&1000).is_some());
        drop(held);
        assert!(table.shards.iter().all(|shard| lock(shard).accounts.capacity() <= 64));
    }

    #[test]
    fn many_addresses_take_bounded_room_and_push_out_nobody_who_matters() {
        let table = Table::<u32>::new(1, 160);
        let held = table.account(&1_000_000, 0);
        // One who has spent much, and one who is being answered.
        spend(&table.account(&1_000_001, 0), 50, 0);
        for key in 0..100_000 {
            spend(&table.account(&key, 0), 1, 0);
            assert!(table.len() <= 160);
        }
        assert_eq!(spent(&table.account(&1_000_001, 0)), 50);
        assert!(Arc::ptr_eq(&held, &table.account(&1_000_000, 0)));
    }

    #[test]
    fn who_finds_no_room_shares_an_account_with_others() {
        let table = Table::<u32>::new(1, 10);
        let held: Vec<_> = (0..10).map(|key| table.account(&key, 0)).collect();
        let (one, other) = (table.account(&10, 0), table.account(&11, 0));
        assert!(Arc::ptr_eq(&one, &other) && !held.iter().any(|account| Arc::ptr_eq(account, &one)));
        drop(held);
        assert!(!Arc::ptr_eq(&one, &table.account(&10, 0)));
    }

    proptest::proptest! {
        #[test]
        fn a_table_never_grows_over_its_bound(keys in proptest::collection::vec((0_u32..500, 0_u32..5, 0_u64..SECOND), 1..400)) {
            let table = Table::<u32>::new(4, 64);
            let mut now = 0;
            for (key, requests, pause) in keys {
                now += pause;
                spend(&table.account(&key, now), requests, now);
                proptest::prop_assert!(table.len() <= 64);
            }
        }
    }
}
