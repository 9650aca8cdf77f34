//! An order of servers that everybody finds alone: rendezvous hashing with weights.
//!
//! A server that leaves moves only what was on it; a server of weight two is first for twice as many keys.

use std::num::NonZeroU32;

use smallvec::SmallVec;

use super::chain::join;
use crate::cluster::Server;
use crate::names::ServerId;

/// The first servers for a key, by index: the best one first.
pub(super) fn first<'a>(
    key: u64,
    servers: impl Iterator<Item = &'a Server>,
    most: usize,
) -> SmallVec<[usize; super::CHOICES]> {
    let mut best: SmallVec<[(f64, usize); super::CHOICES + 1]> = SmallVec::new();
    for server in servers {
        let score = score(key, server);
        let at = best.iter().position(|(other, _)| *other < score).unwrap_or(best.len());
        if at < most {
            best.insert(at, (score, server.index));
            best.truncate(most);
        }
    }
    best.into_iter().map(|(_, index)| index).collect()
}

fn score(key: u64, server: &Server) -> f64 {
    weighed(key, &server.id, server.weight)
}

/// How well a server suits a text, of two the one with more suits better: the same number in every process.
pub fn suits(text: &str, server: &ServerId, weight: NonZeroU32) -> f64 {
    weighed(rapidhash::v3::rapidhash_v3(text.as_bytes()), server, weight)
}

fn weighed(key: u64, server: &ServerId, weight: NonZeroU32) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    let [number, all] = [join(key, server.number()) >> 11, 1 << 53].map(|bits| bits as f64);
    // Between 0 and 1, neither of them included.
    let uniform = (number + 0.5) / all;
    -f64::from(weight.get()) / uniform.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn homes(cluster: &crate::Cluster, without: Option<usize>) -> Vec<usize> {
        let snapshot = cluster.snapshot();
        let servers = || snapshot.servers.iter().filter(|server| Some(server.index) != without).map(|server| &**server);
        (0..4000).map(|key| first(key, servers(), 1)[0]).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_leaves_moves_only_what_was_on_it() {
        let cluster = testing::weighted_cluster(&[1, 1, 1, 1]).await;
        let (before, after) = (homes(&cluster, None), homes(&cluster, Some(2)));
        let moved = before.iter().zip(&after).filter(|(one, two)| one != two).count();
        assert!(moved * 100 <= 30 * before.len(), "{moved} of {}", before.len());
        assert!(before.iter().zip(&after).all(|(one, two)| one == two || *one == 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_heavier_server_has_more_keys() {
        let cluster = testing::weighted_cluster(&[1, 3]).await;
        let heavy = homes(&cluster, None).iter().filter(|home| **home == 1).count();
        assert!((2900..3100).contains(&heavy), "{heavy} of 4000");
    }

    #[tokio::test(start_paused = true)]
    async fn the_order_is_by_name_and_not_by_place() {
        let cluster = testing::weighted_cluster(&[1, 1, 1, 1]).await;
        let snapshot = cluster.snapshot();
        for key in 0..100 {
            let forth = first(key, snapshot.servers.iter().map(|server| &**server), 4);
            let back = first(key, snapshot.servers.iter().rev().map(|server| &**server), 4);
            assert_eq!(forth, back);
            assert_eq!(first(key, snapshot.servers.iter().map(|server| &**server), 2)[..], forth[..2]);
        }
    }
}
