//! Those who have come and of whom it is not known who they are: so many at a time, and so many of one network, so that nobody
//! takes up all the room that there is for connections.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::discovery::join::network;

/// Strangers of all networks, and of one: an address of IPv4, or a /64.
const MOST: (usize, usize) = (2048, 256);

/// Who is here unknown. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Strangers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// The place of a stranger, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    strangers: Strangers,
    network: IpAddr,
}

impl Strangers {
    /// A place for one more, if there is one.
    pub(super) fn take(&self, address: IpAddr) -> Option<Place> {
        let network = network(address);
        let mut here = self.here();
        let of_it = here.get(&network).copied().unwrap_or(0);
        if of_it >= MOST.1 || here.values().sum::<usize>() >= MOST.0 {
            return None;
        }
        here.insert(network, of_it + 1);
        Some(Place { strangers: self.clone(), network })
    }

    fn here(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut here = self.strangers.here();
        if let Some(count) = here.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                here.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn no_network_and_not_all_together_take_every_place() {
        let strangers = Strangers::default();
        let at = |number: usize| IpAddr::V4(Ipv4Addr::from(u32::try_from(number).unwrap()));
        let mut places: Vec<Place> = (0..MOST.1).map(|_| strangers.take(at(1)).unwrap()).collect();
        assert!(strangers.take(at(1)).is_none());
        places.extend((2..2 + MOST.0 - MOST.1).map(|number| strangers.take(at(number)).unwrap()));
        assert!(strangers.take(at(9999)).is_none());
        places.clear();
        assert!(strangers.take(at(1)).is_some() && strangers.here().is_empty());
    }
}
