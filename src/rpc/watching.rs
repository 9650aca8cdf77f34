//! How the state of an agent gets to those who watch it.
//!
//! Lists of models are long and change seldom: who keeps what it was told is told them once. What others have this server do
//! is counted for each watcher by itself, so that several proxies see each other's work and never their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::Stream;
use olol_middleware::time::unix_ms_now;
use olol_proto::v1::{LoadedModel, Model, ServerState, WatchRequest};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tonic::Status;

use super::turns::{Followed, Turns};

/// The shortest time between two words on what others have this server do: where a conversation begins depends on it, and
/// what is not known yet is not counted.
const LOAD_EVERY: Duration = Duration::from_millis(5);
/// The shortest time between two whole states that are told for that.
const WHOLE_EVERY: Duration = Duration::from_millis(25);
/// Callers that are told apart; the calls of any more count as those of others, for everybody.
const MOST_CALLERS: usize = 256;
/// The longest name of a caller, bytes; one with a longer one has none.
const LONGEST_NAME: usize = 256;
/// Those who watch at the same time; more are refused.
const MOST_WATCHERS: usize = 1024;

/// Models in one message to who keeps what it was told.
const PART: usize = 32;

/// The last state, whole.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// All but the models.
    pub state: ServerState,
    /// The models on the disk.
    pub models: Arc<Vec<Model>>,
    /// The models in memory.
    pub loaded: Arc<Vec<LoadedModel>>,
}

impl Told {
    /// Calls that its engine answers side by side; 0: unknown.
    fn slots(&self) -> u32 {
        let of_each = self.loaded.iter().map(|loaded| loaded.slots);
        if of_each.clone().any(|slots| slots == 0) { 0 } else { of_each.fold(0, u32::saturating_add) }
    }
}

/// Who has calls here, and who watches.
#[derive(Debug)]
pub struct Callers {
    known: ArcSwap<Vec<Arc<Caller>>>,
    in_flight: AtomicU32,
    /// A call has come or gone.
    moves: Notify,
    watchers: watch::Sender<usize>,
    turns: Turns,
}

#[derive(Debug)]
struct Caller {
    name: Box<[u8]>,
    in_flight: AtomicU32,
    watching: AtomicU32,
}

impl Caller {
    fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) == 0 && self.watching.load(Ordering::Relaxed) == 0
    }
}

impl Default for Callers {
    fn default() -> Self {
        Self {
            known: ArcSwap::default(),
            in_flight: AtomicU32::new(0),
            moves: Notify::new(),
            watchers: watch::Sender::new(0),
            turns: Turns::default(),
        }
    }
}

impl Callers {
    /// Counts a call until what this returns is dropped. `name`: who sent it, if it says.
    pub fn enter(self: &Arc<Self>, name: Option<&[u8]>) -> Calling {
        let caller = name.and_then(|name| self.caller(name));
        if let Some(caller) = &caller {
            caller.in_flight.fetch_add(1, Ordering::SeqCst);
        }
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        self.moved(caller.as_ref());
        Calling { all: self.clone(), caller }
    }

    /// A call of somebody has come or gone. Who sends it knows that.
    fn moved(&self, caller: Option<&Arc<Caller>>) {
        let own = caller.map_or(0, |caller| caller.watching.load(Ordering::Relaxed));
        if *self.watchers.borrow() > own as usize {
            self.moves.notify_waiters();
        }
    }

    /// Calls that are on their way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// The turns of conversations that they have sent.
    pub fn turns(&self) -> &Turns {
        &self.turns
    }

    /// How many watch, to be followed.
    pub fn watchers(&self) -> watch::Receiver<usize> {
        self.watchers.subscribe()
    }

    /// Counts a watcher until what this returns is dropped; `None`: too many watch.
    fn watch(self: &Arc<Self>, name: &[u8]) -> Option<Watching> {
        let mut has_room = false;
        self.watchers.send_if_modified(|count| {
            has_room = *count < MOST_WATCHERS;
            *count += usize::from(has_room);
            has_room
        });
        if !has_room {
            return None;
        }
        let caller = if name.is_empty() { None } else { self.caller(name) };
        if let Some(caller) = &caller {
            caller.watching.fetch_add(1, Ordering::Relaxed);
        }
        Some(Watching { all: self.clone(), caller })
    }

    fn caller(&self, name: &[u8]) -> Option<Arc<Caller>> {
        let find = |list: &[Arc<Caller>]| list.iter().find(|caller| *caller.name == *name).cloned();
        if let Some(caller) = find(&self.known.load()) {
            return Some(caller);
        }
        if name.len() > LONGEST_NAME {
            return None;
        }
        let fresh = Arc::new(Caller { name: name.into(), in_flight: AtomicU32::new(0), watching: AtomicU32::new(0) });
        self.known.rcu(|list| {
            let mut list: Vec<_> = list.iter().filter(|caller| !caller.is_idle()).cloned().collect();
            if list.len() < MOST_CALLERS && find(&list).is_none() {
                list.push(fresh.clone());
            }
            list
        });
        // Another may have been quicker, or there may be no place.
        find(&self.known.load())
    }
}

/// A call that is counted.
#[derive(Debug)]
pub struct Calling {
    all: Arc<Callers>,
    caller: Option<Arc<Caller>>,
}

impl Drop for Calling {
    fn drop(&mut self) {
        self.all.in_flight.fetch_sub(1, Ordering::SeqCst);
        if let Some(caller) = &self.caller {
            caller.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
        self.all.moved(self.caller.as_ref());
    }
}

/// A watcher that is counted.
#[derive(Debug)]
struct Watching {
    all: Arc<Callers>,
    caller: Option<Arc<Caller>>,
}

impl Watching {
    /// Calls on their way that are not its own.
    fn others(&self) -> u32 {
        let own = || self.caller.as_ref().map_or(0, |caller| caller.in_flight.load(Ordering::SeqCst));
        // One of its own that comes or goes just now is nobody else's.
        let (before, all) = (own(), self.all.in_flight());
        all.saturating_sub(before.max(own()))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(caller) = &self.caller {
            caller.watching.fetch_sub(1, Ordering::Relaxed);
        }
        self.all.watchers.send_modify(|count| *count -= 1);
    }
}

/// One who watches.
struct Watcher {
    states: watch::Receiver<Option<Arc<Told>>>,
    watching: Watching,
    interval: Duration,
    deltas: bool,
    /// The last state that it was told whole, and when.
    last: Option<(Arc<Told>, Instant)>,
    /// When it was told anything.
    told: Instant,
    /// Whether that was no whole state.
    is_brief: bool,
    /// The models from here on it is still to be told.
    rest: Option<usize>,
    others: u32,
    /// How far it was told of the turns of others, if it wants that.
    turns: Option<Followed>,
}

/// The states for one who watches: the first at once, others when something changed, and at intervals as a sign of life;
/// unless too many watch.
pub(super) fn states(
    mut states: watch::Receiver<Option<Arc<Told>>>,
    callers: &Arc<Callers>,
    request: &WatchRequest,
) -> Result<impl Stream<Item = Result<ServerState, Status>> + Send + use<>, Status> {
    let interval = match request.interval_ms {
        0 => Duration::from_secs(1),
        given => Duration::from_millis(u64::from(given).clamp(50, 60_000)),
    };
    states.mark_changed();
    let watching = callers.watch(request.caller.as_bytes()).ok_or_else(|| {
        Status::resource_exhausted(format!("{MOST_WATCHERS} watch this server already: end some of these calls"))
    })?;
    let turns = (request.deltas && request.turns).then(|| callers.turns.follow(request.caller.as_bytes()));
    let deltas = request.deltas;
    let told = Instant::now();
    let (last, rest, is_brief, others) = (None, None, false, 0);
    let watcher = Watcher { states, watching, interval, deltas, last, told, is_brief, rest, others, turns };
    Ok(futures_util::stream::unfold(watcher, |mut watcher| async move {
        let state = watcher.next().await?;
        Some((Ok(state), watcher))
    }))
}

impl Watcher {
    async fn next(&mut self) -> Option<ServerState> {
        if let Some((told, at)) = self.last.as_ref().map(|(told, _)| told.clone()).zip(self.rest) {
            return Some(self.part(&told, at, true));
        }
        loop {
            let all = self.watching.all.clone();
            let moved = all.moves.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            let is_moved = self.watching.others() != self.others;
            let next = self.next_at(is_moved);
            let turns = async {
                match &mut self.turns {
                    // The first message is the whole state.
                    Some(turns) if self.last.is_some() => turns.changed().await,
                    _ => std::future::pending().await,
                }
            };
            let is_news = tokio::select! {
                changed = self.states.changed() => {
                    changed.ok()?;
                    true
                }
                () = tokio::time::sleep_until(next) => false,
                () = turns => false,
                // When it is told of that is known now.
                () = moved, if !is_moved => continue,
            };
            let is_moved = is_moved && self.watching.others() != self.others;
            let is_whole = is_news || self.whole_at(is_moved) <= Instant::now();
            let Some(told) = self.states.borrow_and_update().clone() else { continue };
            let (turns, forgets_turns) = match &mut self.turns {
                Some(turns) => turns.take(&all.turns),
                None => (Vec::new(), false),
            };
            if !is_whole && !is_moved && turns.is_empty() && !forgets_turns {
                continue;
            }
            self.others = self.watching.others();
            (self.told, self.is_brief) = (Instant::now(), !is_whole);
            let state = if is_whole { self.tell(told) } else { self.load(&told) };
            return Some(ServerState { turns, forgets_turns, only_turns: !is_whole, ..state });
        }
    }

    /// When it is told of something at the latest, if nothing more happens.
    fn next_at(&self, is_moved: bool) -> Instant {
        let whole = self.whole_at(is_moved);
        if is_moved && self.turns.is_some() { whole.min(self.told + LOAD_EVERY) } else { whole }
    }

    /// When it is told a whole state at the latest.
    fn whole_at(&self, is_moved: bool) -> Instant {
        let last = self.last.as_ref().map_or_else(Instant::now, |(_, at)| *at);
        last + if is_moved || self.is_brief { self.interval.min(WHOLE_EVERY) } else { self.interval }
    }

    /// What it is doing now, and nothing else.
    fn load(&self, told: &Told) -> ServerState {
        let (all, slots) = (self.watching.all.in_flight(), told.slots());
        let queued = if slots == 0 { 0 } else { all.saturating_sub(slots) };
        ServerState {
            in_flight: all - queued,
            queued,
            others: self.others,
            heartbeat_ms: unix_ms_now(),
            ..ServerState::default()
        }
    }

    fn tell(&mut self, told: Arc<Told>) -> ServerState {
        let last = self.last.as_ref().map(|(last, _)| last).filter(|_| self.deltas);
        let same_models = last.is_some_and(|last| Arc::ptr_eq(&last.models, &told.models));
        let same_loaded = last.is_some_and(|last| Arc::ptr_eq(&last.loaded, &told.loaded));
        let models = if same_models { told.models.len() } else { 0 };
        let state = self.part(&told, models, same_loaded);
        self.last = Some((told, Instant::now()));
        ServerState { same_models, ..state }
    }

    /// A message with the models from there on, as many as are told at once.
    fn part(&mut self, told: &Told, from: usize, same_loaded: bool) -> ServerState {
        let left = told.models.get(from..).unwrap_or_default();
        let models = if self.deltas { left.get(..PART).unwrap_or(left) } else { left };
        self.rest = (models.len() < left.len()).then_some(from + models.len());
        let ServerState { in_flight, queued, others, heartbeat_ms, .. } = self.load(told);
        ServerState {
            in_flight,
            queued,
            others,
            models: models.to_vec(),
            loaded: if same_loaded { Vec::new() } else { told.loaded.to_vec() },
            same_loaded,
            more_models: self.rest.is_some(),
            heartbeat_ms,
            ..told.state.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    fn told(models: &[&str]) -> Arc<Told> {
        let models = models.iter().map(|name| Model { name: (*name).to_owned(), ..Model::default() });
        Arc::new(Told { models: Arc::new(models.collect()), ..Told::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_is_the_same_is_told_once_to_who_keeps_it() {
        let (tell, receiver) = watch::channel(Some(told(&["tiny"])));
        let callers = Arc::default();
        let request = |deltas| WatchRequest { interval_ms: 1000, deltas, ..WatchRequest::default() };
        let mut keeps = Box::pin(states(receiver.clone(), &callers, &request(true)).unwrap());
        let mut forgets = Box::pin(states(receiver, &callers, &request(false)).unwrap());
        assert_eq!(*callers.watchers().borrow(), 2);
        for (number, wanted) in [(1, (1, false)), (2, (0, true))] {
            let state = keeps.next().await.unwrap().unwrap();
            assert_eq!((state.models.len(), state.same_models), wanted, "message {number}");
            assert_eq!(forgets.next().await.unwrap().unwrap().models.len(), 1);
        }
        tell.send_replace(Some(told(&["tiny", "more"])));
        assert_eq!(keeps.next().await.unwrap().unwrap().models.len(), 2);
        drop((keeps, forgets));
        assert_eq!(*callers.watchers().borrow(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_list_is_told_in_parts_to_who_keeps_it() {
        let names: Vec<String> = (0..=PART * 2).map(|number| number.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (_tell, receiver) = watch::channel(Some(told(&names)));
        let callers = Arc::default();
        let request = |deltas| WatchRequest { interval_ms: 1000, deltas, ..WatchRequest::default() };
        let mut keeps = Box::pin(states(receiver.clone(), &callers, &request(true)).unwrap());
        let mut forgets = Box::pin(states(receiver, &callers, &request(false)).unwrap());
        let begun = Instant::now();
        let mut heard = Vec::new();
        for more in [true, true, false] {
            let state = keeps.next().await.unwrap().unwrap();
            assert!(state.models.len() <= PART && !state.same_models && state.more_models == more);
            heard.extend(state.models.into_iter().map(|model| model.name));
        }
        assert!(heard == names && begun.elapsed().is_zero());
        let next = keeps.next().await.unwrap().unwrap();
        assert!(next.same_models && next.models.is_empty() && !next.more_models);
        assert_eq!(forgets.next().await.unwrap().unwrap().models.len(), names.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_watcher_is_told_of_the_calls_of_others_at_once_and_not_of_its_own() {
        let (_tell, receiver) = watch::channel(Some(told(&[])));
        let callers: Arc<Callers> = Arc::default();
        let before = callers.enter(Some(b"me"));
        let request = WatchRequest { interval_ms: 60_000, caller: "me".into(), ..WatchRequest::default() };
        let mut watch = Box::pin(states(receiver, &callers, &request).unwrap());
        let first = watch.next().await.unwrap().unwrap();
        assert_eq!((first.in_flight, first.others), (1, 0));
        let _mine = callers.enter(Some(b"me"));
        let (theirs, nobodys) = (callers.enter(Some(b"they")), callers.enter(None));
        let begun = Instant::now();
        let next = watch.next().await.unwrap().unwrap();
        assert_eq!((next.in_flight, next.others), (4, 2));
        assert!(begun.elapsed() <= WHOLE_EVERY);
        drop((before, theirs, nobodys));
        assert_eq!(watch.next().await.unwrap().unwrap().others, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_told_of_turns_is_told_of_every_call_of_others_within_a_moment() {
        let (_tell, receiver) = watch::channel(Some(told(&["tiny"])));
        let callers: Arc<Callers> = Arc::default();
        let request = WatchRequest { interval_ms: 60_000, caller: "me".into(), deltas: true, turns: true };
        let mut watch = Box::pin(states(receiver, &callers, &request).unwrap());
        watch.next().await.unwrap().unwrap();
        let begun = Instant::now();
        let mut calls = Vec::new();
        for number in 1..=2 {
            let before = Instant::now();
            calls.push(callers.enter(Some(b"they")));
            let state = watch.next().await.unwrap().unwrap();
            assert_eq!((state.others, state.only_turns), (number, true));
            assert!(before.elapsed() <= LOAD_EVERY);
        }
        drop(calls);
        assert_eq!(watch.next().await.unwrap().unwrap().others, 0);
        let whole = watch.next().await.unwrap().unwrap();
        assert!(!whole.only_turns && whole.same_models && begun.elapsed() <= 2 * WHOLE_EVERY, "and the rest follows");
        let nothing = tokio::time::timeout(Duration::from_secs(59), watch.next());
        assert!(nothing.await.is_err(), "nothing happens, and nothing is told");
    }

    #[tokio::test]
    async fn callers_that_have_gone_leave_their_place_to_others() {
        let callers: Arc<Callers> = Arc::default();
        for number in 0..1000 {
            drop(callers.enter(Some(format!("{number}").as_bytes())));
        }
        assert_eq!(callers.known.load().len(), 1);
        let calls: Vec<_> = (0..1000).map(|number| callers.enter(Some(format!("{number}").as_bytes()))).collect();
        assert_eq!((callers.known.load().len(), callers.in_flight()), (MOST_CALLERS, 1000));
        drop(calls);
        drop(callers.enter(Some(&[b'a'; LONGEST_NAME + 1])));
        assert!(callers.known.load().iter().all(|caller| caller.name.len() <= LONGEST_NAME));
        assert_eq!(callers.in_flight(), 0);
    }
}
