//! Those who have come and have not yet said who they are, or what they want: so many at a time, and so many of one network, so
//! that nobody takes up all the room that there is for connections.
//!
//! Where there is no room, the one makes some that has been here for longest, of the network that has the most: who means it has
//! spoken within moments, and who only takes up room is the oldest soon. So an honest client finds a place beside those.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::discovery::join::network;

/// How many there may be: of all networks, and of one: an address of IPv4, or a /64.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Of all.
    pub all: usize,
    /// Of one network.
    pub one: usize,
}

impl Room {
    /// No more than half of the files that this process may open: those who are known need some, too.
    fn that_there_is(self) -> Self {
        let half = crate::telemetry::open_files().map_or(usize::MAX, |most| most / 2).max(2);
        Self { all: self.all.min(half), one: self.one.min(half.div_ceil(2)) }
    }
}

/// Who is here unknown. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Strangers {
    room: Room,
    here: Arc<Mutex<Here>>,
}

#[derive(Debug, Default)]
struct Here {
    /// By network, in the order in which they came: what tells each that it has to go.
    networks: HashMap<IpAddr, BTreeMap<u64, CancellationToken>>,
    count: usize,
    /// The number of the next one.
    next: u64,
}

/// The place of a stranger, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    strangers: Strangers,
    network: IpAddr,
    number: u64,
    goes: CancellationToken,
}

impl Strangers {
    pub(super) fn new(room: Room) -> Self {
        Self { room: room.that_there_is(), here: Arc::default() }
    }

    /// A place for one more; another may have to go for it.
    pub(super) fn take(&self, address: IpAddr) -> Place {
        let (network, goes) = (network(address), CancellationToken::new());
        let mut here = self.here();
        if here.of(network) >= self.room.one {
            here.dismiss(network);
        } else if here.count >= self.room.all
            && let Some(fullest) = here.fullest()
        {
            here.dismiss(fullest);
        }
        let number = here.next;
        here.next += 1;
        here.count += 1;
        here.networks.entry(network).or_default().insert(number, goes.clone());
        Place { strangers: self.clone(), network, number, goes }
    }

    fn here(&self) -> MutexGuard<'_, Here> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Here {
    fn of(&self, network: IpAddr) -> usize {
        self.networks.get(&network).map_or(0, BTreeMap::len)
    }

    /// The network that has the most; of several the one whose oldest is the oldest.
    fn fullest(&self) -> Option<IpAddr> {
        let oldest = |all: &BTreeMap<u64, _>| all.keys().next().copied().unwrap_or_default();
        let fullness = |all: &BTreeMap<u64, _>| (all.len(), std::cmp::Reverse(oldest(all)));
        self.networks.iter().max_by_key(|(_, all)| fullness(all)).map(|(network, _)| *network)
    }

    /// Sends the oldest of a network away.
    fn dismiss(&mut self, network: IpAddr) {
        let oldest = self.networks.get(&network).and_then(|all| all.keys().next().copied());
        if let Some(goes) = oldest.and_then(|number| self.remove(network, number)) {
            goes.cancel();
        }
    }

    fn remove(&mut self, network: IpAddr, number: u64) -> Option<CancellationToken> {
        let all = self.networks.get_mut(&network)?;
        let goes = all.remove(&number)?;
        if all.is_empty() {
            self.networks.remove(&network);
        }
        self.count -= 1;
        Some(goes)
    }
}

impl Place {
    /// Returns when this one has to make room for another.
    pub(super) async fn must_go(&self) {
        self.goes.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.strangers.here().remove(self.network, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn gone(places: &[Place]) -> Vec<usize> {
        places.iter().enumerate().filter(|(_, place)| place.goes.is_cancelled()).map(|(at, _)| at).collect()
    }

    #[test]
    fn the_oldest_of_a_network_makes_room_and_no_other_does() {
        let strangers = Strangers::new(Room { all: 10, one: 3 });
        let other = strangers.take(address("10.0.0.2"));
        let mut places: Vec<Place> = (0..5).map(|_| strangers.take(address("10.0.0.1"))).collect();
        assert_eq!(gone(&places), [0, 1]);
        assert!(!other.goes.is_cancelled());
        // One who has gone by itself makes room as well.
        places.remove(3);
        places.push(strangers.take(address("10.0.0.1")));
        assert_eq!(gone(&places), [0, 1]);
        drop((places, other));
        assert!(strangers.here().networks.is_empty() && strangers.here().count == 0);
    }

    #[test]
    fn when_all_is_full_the_network_with_the_most_makes_room() {
        let strangers = Strangers::new(Room { all: 6, one: 4 });
        let few = [strangers.take(address("2001:db8::1")), strangers.take(address("2001:db8:0:0:1::2"))];
        let many: Vec<Place> = (0..4).map(|_| strangers.take(address("10.0.0.1"))).collect();
        let news: Vec<Place> = (2..5).map(|last| strangers.take(address(&format!("10.0.0.{last}")))).collect();
        assert_eq!((gone(&few), gone(&many)), (vec![0], vec![0, 1]));
        assert!(gone(&news).is_empty());
        assert_eq!(strangers.here().count, 6);
    }
}
