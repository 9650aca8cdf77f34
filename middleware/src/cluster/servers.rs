//! The servers of a snapshot: each keeps its place as long as the process lives, also while it is away.

use std::ops::Index;
use std::sync::Arc;

use super::Server;

/// The servers that are members now, by their places. Places of those who have left stay empty: calls on their way, runners
/// and sets of servers go by places, and none of them may come to mean somebody else.
#[derive(Debug, Default)]
pub struct Servers {
    places: Vec<Option<Arc<Server>>>,
    count: usize,
}

impl Servers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is nobody.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many places there are: more than the greatest [`Server::index`].
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// The one at a place, if somebody is there.
    pub fn get(&self, index: usize) -> Option<&Arc<Server>> {
        self.places.get(index)?.as_ref()
    }

    /// The first of them.
    pub fn first(&self) -> Option<&Arc<Server>> {
        self.iter().next()
    }

    /// All of them, by their places.
    pub fn iter(&self) -> Iter<'_> {
        self.places.iter().flatten()
    }
}

/// The servers one after the other.
pub type Iter<'a> = std::iter::Flatten<std::slice::Iter<'a, Option<Arc<Server>>>>;

impl<'a> IntoIterator for &'a Servers {
    type Item = &'a Arc<Server>;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl FromIterator<Option<Arc<Server>>> for Servers {
    fn from_iter<I: IntoIterator<Item = Option<Arc<Server>>>>(places: I) -> Self {
        let places: Vec<_> = places.into_iter().collect();
        let count = places.iter().flatten().count();
        Self { places, count }
    }
}

/// For who knows that somebody is there; panics otherwise.
impl Index<usize> for Servers {
    type Output = Arc<Server>;

    #[expect(clippy::expect_used, reason = "as with every index")]
    fn index(&self, index: usize) -> &Arc<Server> {
        self.get(index).expect("a server at this place")
    }
}
