//! Dials over networks that lose packets.
//!
//! The kernel sends the first packet of a connection again only after a second, then after two more, then after four: on a
//! network that loses one in ten, that alone takes longer than all the rest. A try that has not succeeded soon is therefore
//! joined by another, and whichever comes to an end first counts.
//!
//! A connection that came late all the same had to wait for something that was lost, an answer to ARP perhaps. The kernel takes
//! that for the time that it takes to go there and back, and would wait several times as long before it sends anything on it
//! again. A fresh one knows better.

use std::io;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::time::Instant;

/// When another try begins beside those that wait: each some time after the one before.
const AGAIN: [Duration; 2] = [Duration::from_millis(400), Duration::from_secs(1)];
/// A connection that took so long waited for something: the kernel asks again after a second, for an address as for a connection.
const LATE: Duration = Duration::from_secs(1);
/// So many times as quickly a fresh one must come that takes its place.
const MUCH: u32 = 5;

/// A connection to the first of these addresses that takes one, on which nothing waits to be sent together.
pub(crate) async fn connect(to: impl ToSocketAddrs + Copy) -> io::Result<TcpStream> {
    let stream = promptly(|| TcpStream::connect(to)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What the first of several same tries comes to, or, where that came late, another that does not.
async fn promptly<T, E, F: Future<Output = Result<T, E>>>(begin: impl Fn() -> F) -> Result<T, E> {
    let begun = Instant::now();
    let first = soonest(&begin, &AGAIN).await?;
    let took = begun.elapsed();
    if took < LATE {
        return Ok(first);
    }
    match tokio::time::timeout(took / MUCH, begin()).await {
        Ok(Ok(fresh)) => Ok(fresh),
        _ => Ok(first),
    }
}

/// How the first of several same tries ends. The next begins so long after the last one as `pauses` say.
async fn soonest<T, F: Future<Output = T>>(begin: impl Fn() -> F, pauses: &[Duration]) -> T {
    let mut tries = FuturesUnordered::from_iter([begin()]);
    let mut pauses = pauses.iter();
    loop {
        let pause = async {
            match pauses.next() {
                Some(pause) => tokio::time::sleep(*pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(ended) = tries.next() => return ended,
            () = pause => tries.push(begin()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_try_that_is_lost_is_overtaken_by_the_next() {
        let begun = Cell::new(0);
        let lost_at_first = || {
            let number = begun.replace(begun.get() + 1);
            let takes = if number == 0 { Duration::from_secs(60) } else { Duration::from_millis(50) };
            async move {
                tokio::time::sleep(takes).await;
                number
            }
        };
        let start = tokio::time::Instant::now();
        assert_eq!(soonest(lost_at_first, &AGAIN).await, 1);
        assert_eq!((start.elapsed(), begun.get()), (AGAIN[0] + Duration::from_millis(50), 2));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_came_late_gives_way_to_a_fresh_one_that_does_not() {
        // Nothing gets through until then, and all that has waited does so at once; from then on it takes so long.
        for (opens, takes, comes) in [(1200, 50, 1250), (100, 50, 0), (0, 1100, 0)] {
            let (begun, start) = (Cell::new(0), Instant::now());
            let (opens, takes) = (Duration::from_millis(opens), Duration::from_millis(takes));
            let late = || {
                let this = Instant::now();
                begun.set(begun.get() + 1);
                async move {
                    tokio::time::sleep_until(start + opens).await;
                    tokio::time::sleep(takes).await;
                    Ok::<_, ()>(this)
                }
            };
            assert_eq!(promptly(late).await, Ok(start + Duration::from_millis(comes)), "{opens:?} {takes:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_an_answer() {
        let begun = Cell::new(0);
        let refused = || {
            begun.set(begun.get() + 1);
            std::future::ready(Err::<(), _>("no"))
        };
        assert_eq!((soonest(refused, &AGAIN).await, begun.get()), (Err("no"), 1));
    }
}
