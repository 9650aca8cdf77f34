//! The last turns of conversations that an engine has answered, for proxies that have not sent them.
//!
//! They come with the calls of proxies and go to those that watch. Bounded: what is dropped was answered long ago, and a proxy
//! that does not hear of it takes a conversation for a new one, no more.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use olol_middleware::affinity;
use olol_proto::v1::Turn;
use tokio::sync::watch;
use tokio::time::Instant;

/// Links that are kept, and as many of them as a turn costs besides: 256 KiB.
const KEPT: usize = 32 << 10;
/// What a turn counts for besides its links.
const A_TURN: usize = 8;
/// Links in one message, about.
const A_MESSAGE: usize = 4096;
/// Time between two messages that tell of nothing else.
const EVERY: Duration = Duration::from_millis(10);

/// What was answered.
#[derive(Debug)]
pub struct Turns {
    log: Mutex<Log>,
    /// How many were answered so far, to be followed.
    count: watch::Sender<u64>,
    names: RandomState,
}

#[derive(Debug, Default)]
struct Log {
    turns: VecDeque<Answered>,
    /// The number of the first one that is kept.
    first: u64,
    size: usize,
    /// How often the engine has lost all that it had cached.
    losses: u32,
}

#[derive(Debug)]
struct Answered {
    /// Who has sent it.
    caller: u64,
    turn: Turn,
}

impl Answered {
    fn size(&self) -> usize {
        self.turn.news.len() + A_TURN
    }
}

impl Default for Turns {
    fn default() -> Self {
        Self { log: Mutex::default(), count: watch::Sender::new(0), names: RandomState::default() }
    }
}

impl Turns {
    /// A turn that somebody has sent was answered.
    pub(super) fn answered(&self, caller: &[u8], turn: Turn) {
        let turn = told(turn);
        if turn.is_empty() {
            return;
        }
        let answered = Answered { caller: self.name(caller), turn: wire(turn) };
        // Held for as long as it takes to put it down.
        let mut log = self.log();
        log.size += answered.size();
        log.turns.push_back(answered);
        while log.size > KEPT
            && let Some(oldest) = log.turns.pop_front()
        {
            log.size -= oldest.size();
            log.first += 1;
        }
        let count = log.first + log.turns.len() as u64;
        drop(log);
        self.count.send_replace(count);
    }

    /// The engine has lost all that it had cached.
    pub fn forget(&self) {
        let mut log = self.log();
        if log.turns.is_empty() {
            return;
        }
        log.first += log.turns.len() as u64;
        log.turns.clear();
        log.size = 0;
        log.losses += 1;
        drop(log);
        self.count.send_modify(|_| {});
    }

    /// What one who watches has to be told.
    pub(super) fn follow(&self, caller: &[u8]) -> Followed {
        let losses = self.log().losses;
        let mut count = self.count.subscribe();
        count.mark_changed();
        Followed { caller: self.name(caller), next: 0, losses, count, told: None }
    }

    fn name(&self, caller: &[u8]) -> u64 {
        self.names.hash_one(caller)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far one who watches was told.
#[derive(Debug)]
pub(super) struct Followed {
    caller: u64,
    /// The number of the first turn that was not told.
    next: u64,
    losses: u32,
    count: watch::Receiver<u64>,
    /// When something was told last.
    told: Option<Instant>,
}

impl Followed {
    /// Waits until there may be something to tell, and a little since the last time: much is told at once where much happens.
    pub(super) async fn changed(&mut self) {
        if self.count.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        // Who is interrupted here will find it again.
        self.count.mark_changed();
        if let Some(told) = self.told {
            tokio::time::sleep_until(told + EVERY).await;
        }
    }

    /// What has to be told, and whether the engine has lost what was told before.
    pub(super) fn take(&mut self, turns: &Turns) -> (Vec<Turn>, bool) {
        self.count.mark_unchanged();
        let log = turns.log();
        let forgets = std::mem::replace(&mut self.losses, log.losses) != log.losses;
        let skipped = usize::try_from(self.next.saturating_sub(log.first)).unwrap_or(usize::MAX);
        self.next = self.next.max(log.first);
        let (mut news, mut links) = (Vec::new(), 0);
        for answered in log.turns.iter().skip(skipped) {
            if links >= A_MESSAGE {
                self.count.mark_changed();
                break;
            }
            self.next += 1;
            if answered.caller != self.caller {
                links += answered.size();
                news.push(answered.turn.clone());
            }
        }
        if !news.is_empty() {
            self.told = Some(Instant::now());
        }
        (news, forgets)
    }
}

/// A turn as it came.
pub fn told(turn: Turn) -> affinity::Turn {
    affinity::Turn::told(turn.known, turn.goes_on, turn.news)
}

/// A turn as it goes.
pub fn wire(turn: affinity::Turn) -> Turn {
    Turn { known: turn.known.unwrap_or(0), goes_on: turn.goes_on, news: turn.news.into_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(link: u64) -> Turn {
        Turn { known: 0, goes_on: false, news: vec![link] }
    }

    fn links(turns: &[Turn]) -> Vec<u64> {
        turns.iter().flat_map(|turn| turn.news.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn who_watches_is_told_once_and_only_what_others_have_sent() {
        let turns = Turns::default();
        turns.answered(b"they", turn(1));
        let mut mine = turns.follow(b"me");
        mine.changed().await;
        assert_eq!(links(&mine.take(&turns).0), [1], "what was answered before is told too");
        turns.answered(b"me", turn(2));
        turns.answered(b"they", turn(3));
        turns.answered(b"", turn(4));
        mine.changed().await;
        assert_eq!(links(&mine.take(&turns).0), [3, 4]);
        assert_eq!(mine.take(&turns), (vec![], false));
        let nothing = tokio::time::timeout(Duration::from_secs(60), mine.changed());
        assert!(nothing.await.is_err(), "nothing happens, and nothing is told");
    }

    #[tokio::test(start_paused = true)]
    async fn much_is_told_in_several_messages_and_the_oldest_is_dropped() {
        let turns = Turns::default();
        let many = u64::try_from(KEPT).unwrap();
        (1..=many).for_each(|link| turns.answered(b"they", turn(link)));
        let (mut mine, mut all, mut messages) = (turns.follow(b"me"), Vec::new(), 0);
        while let Ok(()) = tokio::time::timeout(Duration::from_secs(1), mine.changed()).await {
            let news = links(&mine.take(&turns).0);
            assert!(news.len() <= A_MESSAGE);
            all.extend(news);
            messages += 1;
        }
        assert_eq!((all.len(), all.last()), (KEPT / (A_TURN + 1), Some(&many)));
        assert!(messages > 1 && all.is_sorted());
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_engine_has_lost_is_told_once_and_never_again() {
        let turns = Turns::default();
        let mut mine = turns.follow(b"me");
        turns.forget();
        assert_eq!(mine.take(&turns), (vec![], false), "it had nothing");
        turns.answered(b"they", turn(1));
        assert_eq!(links(&mine.take(&turns).0), [1]);
        turns.forget();
        turns.answered(b"they", turn(2));
        mine.changed().await;
        assert_eq!(mine.take(&turns), (vec![turn(2)], true));
        assert_eq!(turns.follow(b"other").take(&turns), (vec![turn(2)], false));
    }

    #[test]
    fn a_turn_is_no_longer_than_one_can_be() {
        let turns = Turns::default();
        turns.answered(b"they", Turn { news: (1..=1_000_000).collect(), ..turn(0) });
        turns.answered(b"they", Turn::default());
        let told = turns.follow(b"me").take(&turns).0;
        assert_eq!((told.len(), told[0].news.len()), (1, 128));
    }
}
