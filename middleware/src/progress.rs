//! How far a call has come, and when: told by those who move it on, for those who measure it.
//!
//! Times are nanoseconds since the call came; 0: not yet. Calls that are sent to several servers tell of the last of them.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// Where a call is while nothing of its answer has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// In the layers.
    #[default]
    Deciding,
    /// In the queue.
    Queued,
    /// At a server that loads its model.
    Loading,
    /// At a server.
    Waiting,
}

impl Stage {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deciding => "deciding",
            Self::Queued => "queued",
            Self::Loading => "loading",
            Self::Waiting => "waiting",
        }
    }
}

/// How far a call has come.
#[derive(Debug, Default)]
pub struct Progress {
    stage: AtomicU8,
    read: AtomicU64,
    queued: AtomicU64,
    sent: AtomicU64,
    came: AtomicU64,
}

impl Progress {
    /// Its body is here, after its client took so long to send it.
    pub fn is_read(&self, after: Duration) {
        self.read.store(nanos(after), Ordering::Relaxed);
    }

    /// It waits for a slot.
    pub fn is_queued(&self) {
        self.moves(Stage::Queued);
    }

    /// It has waited so long for a slot, altogether.
    pub fn has_waited(&self, long: Duration) {
        self.moves(Stage::Deciding);
        if self.sent.load(Ordering::Relaxed) == 0 {
            self.queued.store(nanos(long), Ordering::Relaxed);
        }
    }

    /// It is sent to a server. What counts is when that was first done: what comes later waits for servers.
    pub fn is_sent(&self, after: Duration, loads: bool) {
        self.moves(if loads { Stage::Loading } else { Stage::Waiting });
        if self.sent.load(Ordering::Relaxed) == 0 {
            self.sent.store(nanos(after), Ordering::Relaxed);
        }
    }

    /// The first piece of an answer has come from a server.
    pub fn has_come(&self, after: Duration) {
        self.came.store(nanos(after), Ordering::Relaxed);
    }

    /// Where it is.
    pub fn stage(&self) -> Stage {
        let is = |stage: &Stage| *stage as u8 == self.stage.load(Ordering::Relaxed);
        [Stage::Queued, Stage::Loading, Stage::Waiting].into_iter().find(is).unwrap_or_default()
    }

    /// How long it took to decide where it goes, what it waited for left out; `None`: it was not sent.
    pub fn deciding(&self) -> Option<Duration> {
        let sent = self.sent.load(Ordering::Relaxed);
        let waited = self.read.load(Ordering::Relaxed) + self.queued.load(Ordering::Relaxed);
        (sent != 0).then(|| Duration::from_nanos(sent.saturating_sub(waited)))
    }

    /// When the first piece of its answer came from a server.
    pub fn came(&self) -> Option<Duration> {
        let came = self.came.load(Ordering::Relaxed);
        (came != 0).then(|| Duration::from_nanos(came))
    }

    fn moves(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_call_waits_for_is_not_our_doing() {
        let (ms, progress) = (Duration::from_millis, Progress::default());
        assert_eq!((progress.deciding(), progress.stage()), (None, Stage::Deciding));
        progress.is_read(ms(5));
        progress.is_queued();
        assert_eq!(progress.stage(), Stage::Queued);
        progress.has_waited(ms(100));
        progress.is_sent(ms(107), true);
        assert_eq!((progress.deciding(), progress.stage()), (Some(ms(2)), Stage::Loading));
        progress.has_waited(ms(900));
        progress.is_sent(ms(1000), false);
        assert_eq!((progress.deciding(), progress.stage()), (Some(ms(2)), Stage::Waiting));
    }
}
