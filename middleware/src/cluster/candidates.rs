//! Which servers are still in question for a call: a set of bits over one snapshot.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Server, Servers, Snapshot};
use crate::names::ServerId;

/// A set of servers, by their index.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Bits(SmallVec<[u64; 2]>);

impl Clone for Bits {
    fn clone(&self) -> Self {
        Self(SmallVec::from_slice(&self.0))
    }
}

impl<'a> Extend<&'a Arc<Server>> for Bits {
    fn extend<I: IntoIterator<Item = &'a Arc<Server>>>(&mut self, servers: I) {
        servers.into_iter().for_each(|server| self.insert(server.index));
    }
}

impl Bits {
    pub(super) fn of(servers: &Servers) -> Self {
        let mut bits = Self::default();
        servers.iter().for_each(|server| bits.insert(server.index));
        bits
    }

    /// Adds those of another set.
    pub fn add(&mut self, other: &Self) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word |= other);
    }

    /// Adds a server.
    pub fn insert(&mut self, index: usize) {
        if self.0.len() <= index / 64 {
            self.0.resize(index / 64 + 1, 0);
        }
        self.0[index / 64] |= 1 << (index % 64);
    }

    /// Takes a server out.
    pub fn remove(&mut self, index: usize) {
        if let Some(word) = self.0.get_mut(index / 64) {
            *word &= !(1 << (index % 64));
        }
    }

    /// Whether a server is in.
    pub fn contains(&self, index: usize) -> bool {
        self.0.get(index / 64).is_some_and(|word| word & (1 << (index % 64)) != 0)
    }

    /// Whether nobody is in.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// How many are in.
    pub fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Keeps only those that are in another set too.
    pub fn keep(&mut self, other: &Self) {
        self.0.truncate(other.0.len());
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word &= other);
    }

    /// The indices, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(at, word)| {
            let mut word = *word;
            std::iter::from_fn(move || {
                (word != 0).then(|| {
                    let bit = word.trailing_zeros() as usize;
                    word &= word - 1;
                    at * 64 + bit
                })
            })
        })
    }
}

/// The servers that are still in question for a call, and the snapshot they belong to.
#[derive(Clone, Debug)]
pub struct Candidates {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) bits: Bits,
}

impl Candidates {
    /// The snapshot.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// The same servers as they are now: all of them if all were in question.
    pub fn renew(&mut self, snapshot: Arc<Snapshot>) {
        if self.bits == self.snapshot.every {
            self.bits.clone_from(&snapshot.every);
        }
        self.snapshot = snapshot;
    }

    /// Keeps only those that are in a set.
    pub fn keep(&mut self, bits: &Bits) {
        self.bits.keep(bits);
    }

    /// Keeps only one, which may have been out before.
    pub fn only(&mut self, index: usize) {
        self.bits = Bits::default();
        self.bits.insert(index);
    }

    /// Takes a server out.
    pub fn drop_index(&mut self, index: usize) {
        self.bits.remove(index);
    }

    /// Takes a server out by its name.
    pub fn drop_server(&mut self, id: &ServerId) {
        if let Some(index) = self.index_of(id) {
            self.drop_index(index);
        }
    }

    /// Where a server stands in the snapshot.
    pub fn index_of(&self, id: &ServerId) -> Option<usize> {
        self.snapshot.server(id).map(|server| server.index)
    }

    /// Whether a server is in question.
    pub fn contains(&self, id: &ServerId) -> bool {
        self.index_of(id).is_some_and(|index| self.bits.contains(index))
    }

    /// Whether anybody but this server may still be asked.
    pub fn has_other_than(&self, id: &ServerId) -> bool {
        let index = self.index_of(id);
        self.bits.iter().any(|other| Some(other) != index)
    }

    /// Whether nobody is left.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }

    /// How many are left.
    pub fn count(&self) -> usize {
        self.bits.count()
    }

    /// One of them, if it is left.
    pub fn get(&self, index: usize) -> Option<&Arc<Server>> {
        self.snapshot.servers.get(index).filter(|_| self.bits.contains(index))
    }

    /// Those that are left.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Server>> {
        self.bits.iter().filter_map(|index| self.snapshot.servers.get(index))
    }
}
