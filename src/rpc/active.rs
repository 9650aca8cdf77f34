//! The sessions that had a turn here lately.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Time after its last turn in which a session is active.
const LATELY: Duration = Duration::from_secs(10 * 60);
/// Sessions that are remembered; of more the last.
const MOST: usize = 256;
/// The longest id, bytes: what a header of a client may have, and anybody of the cluster may say.
const LONGEST: usize = 1024;

/// Sessions, that with the last turn last.
#[derive(Debug, Default)]
pub struct Active(Mutex<VecDeque<(String, Instant)>>);

impl Active {
    /// A session has a turn now; calls without one have no id, and what is too long is none.
    pub fn saw(&self, session: &str) {
        if session.is_empty() || session.len() > LONGEST {
            return;
        }
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|(other, _)| other != session);
        if seen.len() >= MOST {
            seen.pop_front();
        }
        seen.push_back((session.to_owned(), Instant::now()));
    }

    /// Those that are active.
    pub fn list(&self) -> Vec<String> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|(_, at)| at.elapsed() < LATELY);
        seen.iter().map(|(session, _)| session.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn sessions_are_active_for_a_while_and_not_too_many() {
        let active = Active::default();
        active.saw("");
        active.saw("one");
        tokio::time::advance(LATELY / 2).await;
        active.saw("two");
        active.saw("one");
        active.saw("two");
        assert_eq!(active.list(), ["one", "two"]);
        tokio::time::advance(LATELY).await;
        assert!(active.list().is_empty());
        active.saw(&"x".repeat(LONGEST + 1));
        assert!(active.list().is_empty());
        (0..1000).for_each(|number| active.saw(&number.to_string()));
        assert_eq!((active.list().len(), active.list().last().unwrap().as_str()), (MOST, "999"));
    }
}
