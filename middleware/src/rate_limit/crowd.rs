//! Requests at the same time, over all proxies that share a store: each tells the others how many run there of whom, and
//! counts what it has heard beside its own.
//!
//! Nothing waits for that, and each decides at once: one who begins calls at several proxies within the time that news takes
//! gets more than his limit, at the most his limit at each. What a proxy has told holds until it tells otherwise. When it is
//! silent for longer than [`LEASE`] it has died, or cannot reach the others: its calls count no more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::account::Account;
use super::ledger::{Ledger, Who};

/// Silence after which what a proxy has told counts no more.
pub const LEASE: Duration = Duration::from_secs(3);
/// Proxies that are listened to.
const PROXIES: usize = 64;
/// Accounts of one proxy that are told, and believed.
const MOST: usize = 1000;
/// Calls of one account at one proxy that are believed.
const CALLS: u32 = 1 << 20;

/// How many calls of one account run at a proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crowded {
    who: Who,
    calls: u32,
}

/// An account of which a call has begun.
type Begun = (Who, Arc<Account>);

/// What is told, and what was heard.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    /// Where accounts go of which a call has begun; nowhere if nobody is told.
    begun: OnceLock<mpsc::Sender<Begun>>,
    /// What each of the other proxies has told last. No call waits for it.
    heard: Mutex<HashMap<Box<str>, Heard>>,
}

#[derive(Debug)]
struct Heard {
    at: Instant,
    accounts: HashMap<Who, (Arc<Account>, u32)>,
}

impl Heard {
    /// None of it counts any more.
    fn lapse(self) {
        for (account, calls) in self.accounts.into_values() {
            account.runs_elsewhere(-i64::from(calls));
        }
    }
}

impl Crowd {
    fn heard(&self) -> MutexGuard<'_, HashMap<Box<str>, Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The accounts of which calls run here, for who tells the other proxies.
#[derive(Debug)]
pub struct Crowds {
    begun: mpsc::Receiver<Begun>,
    running: HashMap<Who, Arc<Account>>,
}

impl Crowds {
    /// How many calls run of whom.
    pub fn count(&mut self) -> Vec<Crowded> {
        while let Ok((who, account)) = self.begun.try_recv() {
            self.running.insert(who, account);
        }
        let mut all = Vec::new();
        self.running.retain(|who, account| {
            let mut calls = account.running();
            if calls == 0 {
                // Who begins from here on tells of it again; who has begun in this moment may have relied on us.
                account.is_untold();
                calls = account.running();
            }
            if calls > 0 && all.len() < MOST {
                all.push(Crowded { who: who.clone(), calls });
            }
            calls > 0
        });
        all
    }
}

impl Ledger {
    /// From now on it is known of whom calls run, for who tells the other proxies: one for a ledger.
    pub fn crowds(&self) -> Option<Crowds> {
        let (tell, begun) = mpsc::channel(MOST);
        self.crowd.begun.set(tell).ok()?;
        Some(Crowds { begun, running: HashMap::new() })
    }

    /// A call of an account has begun. What finds no room is told when its next call begins.
    pub(super) fn begins(&self, who: &Who, account: &Arc<Account>) {
        if let Some(tell) = self.crowd.begun.get()
            && !account.was_told()
            && tell.try_send((who.clone(), account.clone())).is_err()
        {
            account.is_untold();
        }
    }

    /// Another proxy tells how many calls run there of whom.
    pub fn hear_of_crowds(&self, proxy: &str, told: Vec<Crowded>) {
        let mut all = self.crowd.heard();
        let mut before = all.remove(proxy).map(|heard| heard.accounts).unwrap_or_default();
        let mut accounts = HashMap::new();
        if all.len() < PROXIES {
            for Crowded { who, calls } in told.into_iter().take(MOST) {
                if accounts.contains_key(&who) {
                    continue;
                }
                let calls = calls.min(CALLS);
                let (account, last) = before.remove(&who).unwrap_or_else(|| (self.account(&who), 0));
                account.runs_elsewhere(i64::from(calls) - i64::from(last));
                accounts.insert(who, (account, calls));
            }
        }
        let at = Instant::now();
        Heard { at, accounts: before }.lapse();
        if !accounts.is_empty() {
            all.insert(proxy.into(), Heard { at, accounts });
        }
    }

    /// What all of them have told counts no more: nothing is heard of them.
    pub fn forget_crowds(&self) {
        self.crowd.heard().drain().for_each(|(_, heard)| heard.lapse());
    }

    /// What proxies have told that are silent counts no more.
    pub fn forget_silent(&self) {
        for (_, silent) in self.crowd.heard().extract_if(|_, heard| heard.at.elapsed() > LEASE) {
            silent.lapse();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::account::{Need, Taken};
    use super::super::{Kind, Limits};
    use super::*;

    const RUNS: Need = Need { runs: true, tokens: None };

    struct Proxy {
        ledger: Ledger,
        crowds: Crowds,
    }

    impl Proxy {
        fn new() -> Self {
            let ledger = Ledger::default();
            let crowds = ledger.crowds().unwrap();
            Self { ledger, crowds }
        }

        /// Begins a call of somebody who may have three of them.
        fn begins(&self, name: &str) -> Result<(Arc<Account>, Taken), Kind> {
            let limits: Limits = toml::from_str("concurrent = 3").unwrap();
            let who = Who::Key(name.into());
            let account = self.ledger.account(&who);
            let (taken, _) = account.take(&limits, &RUNS, self.ledger.now()).map_err(|refusal| refusal.kind)?;
            self.ledger.begins(&who, &account);
            Ok((account, taken))
        }

        fn tells(&mut self, name: &str, other: &Self) {
            let wire = serde_json::to_string(&self.crowds.count()).unwrap();
            other.ledger.hear_of_crowds(name, serde_json::from_str(&wire).unwrap());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn calls_at_one_proxy_count_at_the_others_while_they_run() {
        let (mut one, other) = (Proxy::new(), Proxy::new());
        let running = [one.begins("ada").unwrap(), one.begins("ada").unwrap()];
        one.tells("one", &other);
        let (account, last) = other.begins("ada").unwrap();
        assert_eq!(other.begins("ada").unwrap_err(), Kind::Concurrent);
        assert!(other.begins("bob").is_ok(), "another's are his own");
        assert!(one.begins("ada").is_ok(), "nobody has told of the other's yet");
        account.leave(&last);
        one.tells("one", &other);
        assert_eq!(other.begins("ada").unwrap_err(), Kind::Concurrent);
        for (account, taken) in &running {
            account.leave(taken);
        }
        one.tells("one", &other);
        assert!(other.begins("ada").is_ok() && other.begins("ada").is_ok());
        assert_eq!(other.begins("ada").unwrap_err(), Kind::Concurrent);
    }

    #[tokio::test(start_paused = true)]
    async fn the_calls_of_a_proxy_that_is_silent_count_no_more() {
        let (mut one, other) = (Proxy::new(), Proxy::new());
        let _running: Vec<_> = (0..3).map(|_| one.begins("ada").unwrap()).collect();
        one.tells("one", &other);
        tokio::time::advance(LEASE).await;
        other.ledger.forget_silent();
        assert_eq!(other.begins("ada").unwrap_err(), Kind::Concurrent);
        one.tells("one", &other);
        tokio::time::advance(LEASE).await;
        other.ledger.forget_silent();
        assert_eq!(other.begins("ada").unwrap_err(), Kind::Concurrent, "it has told again");
        tokio::time::advance(Duration::from_millis(1)).await;
        other.ledger.forget_silent();
        assert!(other.begins("ada").is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_over_is_told_no_more_and_what_begins_again_is() {
        let mut one = Proxy::new();
        for _ in 0..3 {
            let (account, taken) = one.begins("ada").unwrap();
            let told = one.crowds.count();
            assert_eq!(told, [Crowded { who: Who::Key("ada".into()), calls: 1 }]);
            account.leave(&taken);
            assert!(one.crowds.count().is_empty() && one.crowds.running.is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nonsense_of_others_is_bounded_and_taken_back_whole() {
        let other = Proxy::new();
        let ada = Crowded { who: Who::Key("ada".into()), calls: u32::MAX };
        for proxy in 0..2 * PROXIES {
            let many = (0..2 * MOST).map(|at| Crowded { who: Who::Key(at.to_string().into()), calls: 1 });
            other
                .ledger
                .hear_of_crowds(&proxy.to_string(), [ada.clone(), ada.clone()].into_iter().chain(many).collect());
        }
        assert!(other.ledger.crowd.heard().len() <= PROXIES && other.ledger.keys.len() <= MOST);
        assert!(other.begins("ada").is_err());
        (0..2 * PROXIES).for_each(|proxy| other.ledger.hear_of_crowds(&proxy.to_string(), Vec::new()));
        assert!(other.begins("ada").is_ok() && other.begins("ada").is_ok());
    }
}
