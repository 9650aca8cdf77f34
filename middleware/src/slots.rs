//! The one owner of places at servers: who works on what, and who waits for it, is known here and nowhere else.
//!
//! A [`Lease`] is taken when a server is picked and lives in the reply's body, so a slot is free when the last byte is out or
//! the client has gone, not when the head was sent. A slot that becomes free while somebody waits is handed to exactly one
//! of those who wait; nobody else can take it in between, and nobody else is woken.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::runner::Runner;

/// How long it may take until one hears of a call that others have sent.
const UNHEARD: Duration = Duration::from_millis(20);
/// What a call counts for that has ended within that time: perhaps its conversation goes on by way of others.
const GOES_ON: f64 = 0.5;
/// How long after their last call others are reckoned with.
const REMEMBERED: Duration = Duration::from_secs(10);
/// Calls that have ended just now which are counted, at most.
const ENDS: usize = 8;

/// What one server is doing, for us and for others. Lives beside the snapshots of the cluster, not in them.
#[derive(Debug)]
pub struct Load {
    in_flight: AtomicU32,
    others: AtomicU32,
    born: Instant,
    /// When others had calls there, in milliseconds since its birth; 0: never.
    others_at: AtomicU64,
    /// When the last calls ended, in the same way.
    ends: [AtomicU64; ENDS],
    next_end: AtomicUsize,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            others: AtomicU32::new(0),
            born: Instant::now(),
            others_at: AtomicU64::new(0),
            ends: [const { AtomicU64::new(0) }; ENDS],
            next_end: AtomicUsize::new(0),
        }
    }
}

impl Load {
    /// Calls that this server is answering for us.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Calls that it is answering for others, or has waiting, as far as its agent tells, or the proxies that share a store.
    pub fn others(&self) -> u32 {
        self.others.load(Ordering::Relaxed)
    }

    /// Somebody told how many calls of others there are: its agent, or those others.
    pub fn tell_others(&self, calls: u32) {
        if calls > 0 {
            self.others_at.store(self.now(), Ordering::Relaxed);
        }
        self.others.store(calls, Ordering::Relaxed);
    }

    /// All calls that it is answering, as far as one can tell.
    pub fn total(&self) -> u32 {
        self.in_flight().saturating_add(self.others())
    }

    /// All calls that it is answering and, where others send some too, a part of those of ours that have ended a moment ago.
    /// A conversation that goes on by way of another proxy seems to have gone until the server's agent tells of that, and who
    /// looks for the least busy server finds just the one that is taken for less busy than it is.
    pub fn lately(&self) -> f64 {
        let total = f64::from(self.total());
        if !self.is_shared() {
            return total;
        }
        let now = self.now();
        let has_just_ended = |at: &&AtomicU64| is_within(at.load(Ordering::Relaxed), UNHEARD, now);
        total + self.ends.iter().filter(has_just_ended).map(|_| GOES_ON).sum::<f64>()
    }

    /// Whether others send calls there.
    fn is_shared(&self) -> bool {
        let last = self.others_at.load(Ordering::Relaxed);
        self.others() > 0 || last > 0 && is_within(last, REMEMBERED, self.now())
    }

    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// A call has ended.
    fn end(&self) {
        if self.is_shared() {
            let at = self.next_end.fetch_add(1, Ordering::Relaxed) % ENDS;
            self.ends[at].store(self.now(), Ordering::Relaxed);
        }
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Takes a place that has no slot: for calls that are not about a model.
    pub fn lease(self: &Arc<Self>) -> Lease {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Lease { load: self.clone(), runner: None }
    }
}

/// Whether something was, and no longer ago than that.
fn is_within(at: u64, time: Duration, now: u64) -> bool {
    at > 0 && u128::from(now.saturating_sub(at)) < time.as_millis()
}

/// A place at a server: a slot of one of its runners, if the call is one for a model.
#[derive(Debug)]
pub struct Lease {
    load: Arc<Load>,
    runner: Option<Arc<Runner>>,
}

impl Lease {
    /// Takes a slot if one is free and nobody waits for it.
    pub fn take(runner: &Arc<Runner>) -> Option<Self> {
        (!runner.line.waits_for(runner.server) && runner.enter()).then(|| Self::entered(runner))
    }

    /// Takes a slot whether one is free or not: for calls that no queue looks after, and for an answer that goes on elsewhere.
    pub fn take_anyway(runner: &Arc<Runner>) -> Self {
        runner.enter_anyway();
        Self::entered(runner)
    }

    fn entered(runner: &Arc<Runner>) -> Self {
        runner.load.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { load: runner.load.clone(), runner: Some(runner.clone()) }
    }

    /// Whose slot it is, if it is one.
    pub fn runner(&self) -> Option<&Arc<Runner>> {
        self.runner.as_ref()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.load.end();
        if let Some(runner) = &self.runner {
            runner.leave();
        }
    }
}

/// How urgent a call is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Priority {
    /// Before all others.
    High,
    /// As most are.
    #[default]
    Normal,
    /// When there is nothing else to do.
    Low,
}

impl Priority {
    const COUNT: usize = 3;
    const ALL: [Self; Self::COUNT] = [Self::High, Self::Normal, Self::Low];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }
}

/// A call's right to a slot: kept over all its attempts, so that who has waited has not waited in vain.
#[derive(Debug)]
pub struct Ticket {
    /// Since when it waits.
    pub arrived: Instant,
    /// How urgent it is.
    pub priority: Priority,
    /// Whose it is: calls of different owners take turns.
    pub owner: Owner,
    /// What it will cost, in tokens, as far as one can tell before.
    pub cost: u64,
    /// How long it must wait to be one step more urgent.
    pub ages_after: Duration,
}

/// Whose calls take turns with those of others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The owner of a key, by name.
    Key(Arc<str>),
    /// Somebody without a key, by address.
    Address(IpAddr),
    /// Somebody of whom nothing is known.
    Nobody,
}

impl Ticket {
    /// How urgent it has become.
    fn urgency(&self, now: Instant) -> usize {
        let aged = (now - self.arrived).as_millis().checked_div(self.ages_after.as_millis()).unwrap_or(0);
        (self.priority as usize).saturating_sub(usize::try_from(aged).unwrap_or(usize::MAX))
    }
}

/// Tokens that every owner gains in a turn. About one short answer: smaller is fairer, larger is less work.
const QUANTUM: u64 = 256;

/// Those who wait for a slot of one model, on whichever server: by urgency, and within it owner after owner, so that each
/// gets the same share of tokens (deficit round robin: Shreedhar and Varghese, SIGCOMM 1995).
///
/// Only who finds no free slot comes here, so its lock is not on the way of a call that need not wait.
#[derive(Debug, Default)]
pub struct Line {
    waiting: Mutex<Waiting>,
    length: AtomicUsize,
}

#[derive(Debug, Default)]
struct Waiting {
    classes: [Class; Priority::COUNT],
    next: u64,
}

#[derive(Debug, Default)]
struct Class {
    owners: HashMap<Owner, Queue>,
    /// Whose turn it is, first.
    turns: VecDeque<Owner>,
}

/// The calls of one owner.
#[derive(Debug, Default)]
struct Queue {
    calls: VecDeque<Waiter>,
    /// Tokens that it may still spend in its turn.
    deficit: u64,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    ticket: Arc<Ticket>,
    /// The servers that it would take a slot of.
    servers: Vec<usize>,
    give: oneshot::Sender<Lease>,
}

/// A place in a line. Dropping it leaves the line.
#[derive(Debug)]
pub struct Wait {
    line: Arc<Line>,
    number: u64,
    taken: oneshot::Receiver<Lease>,
    over: bool,
}

impl Wait {
    /// Waits for a slot; `None` if whoever waits should look again where it could be answered.
    pub fn poll_slot(&mut self, cx: &mut Context<'_>) -> Poll<Option<Lease>> {
        let lease = ready!(Pin::new(&mut self.taken).poll(cx)).ok();
        self.over = true;
        Poll::Ready(lease)
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        // A lease that was given in this very moment is dropped with the receiver, and goes to the next.
        self.taken.close();
        if self.taken.try_recv().is_err() {
            self.line.remove(self.number);
        }
    }
}

impl Line {
    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.length.load(Ordering::SeqCst) == 0
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.length.load(Ordering::SeqCst)
    }

    /// Whether somebody waits for a slot of this server: those who wait for others have no right to it.
    pub fn waits_for(&self, server: usize) -> bool {
        !self.is_empty() && self.lock().all().any(|waiter| waiter.servers.contains(&server))
    }

    /// Joins the line for a slot of one of these runners.
    pub fn join(self: &Arc<Self>, ticket: Arc<Ticket>, runners: &[Arc<Runner>]) -> Wait {
        let (give, taken) = oneshot::channel();
        let servers = runners.iter().map(|runner| runner.server).collect();
        let number = {
            let mut waiting = self.lock();
            waiting.next += 1;
            let number = waiting.next;
            waiting.classes[ticket.priority as usize].join(Waiter { number, ticket, servers, give });
            self.length.fetch_add(1, Ordering::SeqCst);
            number
        };
        // A slot may have become free between the look that found none and now.
        for runner in runners {
            self.serve(runner);
        }
        Wait { line: self.clone(), number, taken, over: false }
    }

    /// Hands the free slots of a runner to those whose turn it is.
    pub fn serve(&self, runner: &Arc<Runner>) {
        while !self.is_empty() {
            let mut waiting = self.lock();
            let Some(class) = waiting.first_class(runner.server).filter(|_| runner.enter()) else { return };
            let lease = Lease::entered(runner);
            let Some(waiter) = waiting.classes[class].next(runner.server) else {
                // Not while the lock is held: a lease that is dropped takes it.
                drop(waiting);
                return;
            };
            self.length.fetch_sub(1, Ordering::SeqCst);
            drop(waiting);
            // Who has gone in the meantime gives the lease back by dropping it; then it is the next one's.
            let _ = waiter.give.send(lease);
        }
    }

    /// Sends everybody who waits to look again: what is known of the servers has changed.
    pub fn look_again(&self) {
        let everybody: Vec<Waiter> = {
            let mut waiting = self.lock();
            let all = waiting.classes.iter_mut().flat_map(|class| std::mem::take(class).owners.into_values());
            let all: Vec<Waiter> = all.flat_map(|owner| owner.calls).collect();
            self.length.fetch_sub(all.len(), Ordering::SeqCst);
            all
        };
        drop(everybody);
    }

    /// How many wait for a slot of this server who will have theirs before a call, as far as one can tell.
    pub fn before(&self, server: usize, ticket: &Ticket) -> usize {
        if self.is_empty() {
            return 0;
        }
        let waiting = self.lock();
        let before = waiting.classes.iter().take(ticket.priority as usize + 1).flat_map(|class| class.owners.values());
        before
            .flat_map(|owner| &owner.calls)
            .filter(|waiter| waiter.ticket.arrived < ticket.arrived && waiter.servers.contains(&server))
            .count()
    }

    /// How many wait, by how urgent they came.
    pub fn by_priority(&self) -> [(Priority, usize); Priority::COUNT] {
        let waiting = self.lock();
        Priority::ALL.map(|priority| {
            let owners = waiting.classes[priority as usize].owners.values();
            (priority, owners.map(|owner| owner.calls.len()).sum())
        })
    }

    fn remove(&self, number: u64) {
        let mut waiting = self.lock();
        let removed = waiting.classes.iter_mut().any(|class| class.remove(number));
        if removed {
            self.length.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn all(&self) -> impl Iterator<Item = &Waiter> {
        self.classes.iter().flat_map(|class| class.owners.values()).flat_map(|owner| &owner.calls)
    }

    /// The class that comes first among those with somebody for this server: by urgency, age counted.
    fn first_class(&self, server: usize) -> Option<usize> {
        let now = Instant::now();
        let urgency = |class: &Class| class.oldest(server).map(|ticket| (ticket.urgency(now), ticket.arrived));
        let classes = self.classes.iter().enumerate().filter_map(|(at, class)| Some((urgency(class)?, at)));
        // Of the same urgency, who has aged into it comes first: it has waited longer than any who were born to it.
        classes.min_by_key(|((urgency, arrived), _)| (*urgency, *arrived)).map(|(_, at)| at)
    }
}

impl Class {
    fn join(&mut self, waiter: Waiter) {
        let owner = &waiter.ticket.owner;
        if !self.owners.contains_key(owner) {
            self.turns.push_back(owner.clone());
        }
        let calls = &mut self.owners.entry(owner.clone()).or_default().calls;
        // Who comes back with an old ticket stands where it stood.
        let at = calls.partition_point(|other| other.ticket.arrived <= waiter.ticket.arrived);
        calls.insert(at, waiter);
    }

    /// The ticket of whoever has waited longest for this server.
    fn oldest(&self, server: usize) -> Option<&Arc<Ticket>> {
        let first = |owner: &Queue| owner.calls.iter().position(|waiter| waiter.servers.contains(&server));
        self.owners
            .values()
            .filter_map(|owner| first(owner).map(|at| &owner.calls[at].ticket))
            .min_by_key(|ticket| ticket.arrived)
    }

    fn next(&mut self, server: usize) -> Option<Waiter> {
        // Ends: somebody wants this server, and every round gives everybody more to spend.
        for _ in 0..self.rounds(server)? {
            let name = self.turns.front()?.clone();
            let owner = self.owners.get_mut(&name)?;
            if let Some(at) = owner.calls.iter().position(|waiter| waiter.servers.contains(&server)) {
                let cost = owner.calls[at].ticket.cost;
                if owner.deficit >= cost {
                    owner.deficit -= cost;
                    let waiter = owner.calls.remove(at);
                    if owner.calls.is_empty() {
                        self.owners.remove(&name);
                        self.turns.pop_front();
                    }
                    return waiter;
                }
                owner.deficit += QUANTUM;
            }
            self.turns.rotate_left(1);
        }
        None
    }

    /// A number of turns after which somebody has enough to spend.
    fn rounds(&self, server: usize) -> Option<usize> {
        let wants = self.owners.values().flat_map(|owner| &owner.calls).filter(|call| call.servers.contains(&server));
        let dearest = wants.map(|waiter| waiter.ticket.cost).max()?;
        let turns = usize::try_from(dearest / QUANTUM).unwrap_or(usize::MAX).saturating_add(2);
        Some(turns.saturating_mul(self.turns.len()))
    }

    fn remove(&mut self, number: u64) -> bool {
        let find = |(name, owner): (&Owner, &Queue)| {
            owner.calls.iter().position(|waiter| waiter.number == number).map(|at| (name.clone(), at))
        };
        let Some((name, at)) = self.owners.iter().find_map(find) else { return false };
        if let Some(owner) = self.owners.get_mut(&name) {
            owner.calls.remove(at);
            if owner.calls.is_empty() {
                self.owners.remove(&name);
                self.turns.retain(|turn| *turn != name);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Cluster;
    use crate::testing;
    use futures_util::FutureExt;

    async fn runner(slots: u32) -> (Arc<Cluster>, Arc<Runner>) {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let snapshot = cluster.snapshot();
        let known = snapshot.known(&crate::ModelName::parse("tiny").unwrap()).unwrap();
        let runner = known.runners.at(&snapshot.servers[0]);
        runner.reported(slots);
        (cluster, runner)
    }

    fn ticket(owner: &str, priority: Priority, cost: u64) -> Arc<Ticket> {
        let (owner, ages_after) = (Owner::Key(owner.into()), Duration::from_secs(30));
        Arc::new(Ticket { arrived: Instant::now(), priority, owner, cost, ages_after })
    }

    fn slot(wait: &mut Wait) -> Option<Lease> {
        std::future::poll_fn(|cx| wait.poll_slot(cx)).now_or_never().flatten()
    }

    fn join(runner: &Arc<Runner>, ticket: Arc<Ticket>) -> Wait {
        runner.line.join(ticket, std::slice::from_ref(runner))
    }

    /// The owners of all who wait, in the order in which they are served.
    fn order(runner: &Arc<Runner>, waits: Vec<(&'static str, Wait)>, busy: Lease) -> Vec<&'static str> {
        let mut waits = waits;
        let mut order = Vec::new();
        let mut held = busy;
        while !waits.is_empty() {
            drop(held);
            let found = waits.iter_mut().enumerate().find_map(|(at, (_, wait))| slot(wait).map(|lease| (at, lease)));
            let (at, lease) = found.expect("a free slot is handed on");
            assert_eq!(runner.in_flight(), 1);
            order.push(waits.remove(at).0);
            held = lease;
        }
        order
    }

    #[tokio::test]
    async fn a_free_slot_goes_to_exactly_one_who_waits() {
        let (_cluster, runner) = runner(1).await;
        let busy = Lease::take(&runner).unwrap();
        assert!(Lease::take(&runner).is_none());
        let mut first = join(&runner, ticket("a", Priority::Normal, 1));
        let mut second = join(&runner, ticket("a", Priority::Normal, 1));
        assert!(slot(&mut first).is_none());
        drop(busy);
        // Nobody who comes now is before those who wait.
        assert!(Lease::take(&runner).is_none());
        let lease = slot(&mut first).unwrap();
        assert!(slot(&mut second).is_none());
        drop(lease);
        assert!(slot(&mut second).is_some());
        assert_eq!((runner.in_flight(), runner.line.len()), (0, 0));
    }

    #[tokio::test]
    async fn who_has_left_never_takes_a_slot() {
        let (_cluster, runner) = runner(1).await;
        let busy = Lease::take(&runner).unwrap();
        let gone = join(&runner, ticket("a", Priority::Normal, 1));
        let mut stays = join(&runner, ticket("a", Priority::Normal, 1));
        drop(gone);
        assert_eq!(runner.line.len(), 1);
        drop(busy);
        // One that leaves in the moment in which it is given a slot hands it on.
        let late = join(&runner, ticket("a", Priority::Normal, 1));
        drop(slot(&mut stays).unwrap());
        drop(late);
        assert_eq!((runner.in_flight(), runner.line.len()), (0, 0));
    }

    #[tokio::test]
    async fn owners_take_turns_by_tokens() {
        let (_cluster, runner) = runner(1).await;
        let busy = Lease::take(&runner).unwrap();
        let mut waits: Vec<_> =
            (0..6).map(|_| ("flood", join(&runner, ticket("flood", Priority::Normal, 256)))).collect();
        waits.push(("one", join(&runner, ticket("one", Priority::Normal, 256))));
        let order = order(&runner, waits, busy);
        assert!(order.iter().position(|owner| *owner == "one").unwrap() <= 1, "{order:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn urgent_calls_come_first_and_old_ones_become_urgent() {
        let (_cluster, runner) = runner(1).await;
        let busy = Lease::take(&runner).unwrap();
        let low = join(&runner, ticket("low", Priority::Low, 1));
        let normal = join(&runner, ticket("normal", Priority::Normal, 1));
        let high = join(&runner, ticket("high", Priority::High, 1));
        let waits = vec![("low", low), ("normal", normal), ("high", high)];
        assert_eq!(order(&runner, waits, busy), ["high", "normal", "low"]);

        let busy = Lease::take(&runner).unwrap();
        let low = join(&runner, ticket("low", Priority::Low, 1));
        tokio::time::advance(Duration::from_secs(61)).await;
        let waits = vec![("low", low), ("high", join(&runner, ticket("high", Priority::High, 1)))];
        assert_eq!(order(&runner, waits, busy), ["low", "high"]);
    }

    #[tokio::test]
    async fn more_slots_serve_those_who_wait() {
        let (_cluster, runner) = runner(1).await;
        let _busy = Lease::take(&runner).unwrap();
        let mut wait = join(&runner, ticket("a", Priority::Normal, 1));
        runner.reported(2);
        assert!(slot(&mut wait).is_some());
    }

    #[tokio::test]
    async fn those_who_wait_can_be_sent_to_look_again() {
        let (_cluster, runner) = runner(1).await;
        let _busy = Lease::take(&runner).unwrap();
        let mut wait = join(&runner, ticket("a", Priority::Normal, 1));
        runner.line.look_again();
        assert!(matches!(std::future::poll_fn(|cx| wait.poll_slot(cx)).now_or_never(), Some(None)));
        assert!(runner.line.is_empty());
    }

    proptest::proptest! {
        /// Whatever comes and goes in whichever order: slots are never exceeded, none is lost, and nobody waits beside one.
        #[test]
        fn slots_are_never_exceeded(slots in 1_u32..4, steps in proptest::collection::vec((0_u8..4, 0_usize..8, 0_u64..2000), 1..120)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async move {
                let (_cluster, runner) = runner(slots).await;
                let mut held: Vec<Lease> = Vec::new();
                let mut waits: Vec<Wait> = Vec::new();
                for (step, at, cost) in steps {
                    match step {
                        0 => held.extend(Lease::take(&runner)),
                        1 => waits.push(join(&runner, ticket(["a", "b", "c"][at % 3], [Priority::High, Priority::Low][at % 2], cost))),
                        2 if !held.is_empty() => drop(held.swap_remove(at % held.len())),
                        3 if !waits.is_empty() => drop(waits.swap_remove(at % waits.len())),
                        _ => {}
                    }
                    waits.retain_mut(|wait| slot(wait).map(|lease| held.push(lease)).is_none());
                    assert!(runner.in_flight() <= slots);
                    assert_eq!(runner.in_flight() as usize, held.len());
                    assert_eq!(runner.line.len(), waits.len());
                    assert!(waits.is_empty() || runner.in_flight() == slots, "somebody waits beside a free slot");
                }
            });
        }
    }
}
