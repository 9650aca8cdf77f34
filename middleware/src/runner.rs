//! What is known of one model on one server: how many calls it answers side by side, and how fast.
//!
//! Ollama answers a call in a *slot* of the model's runner; who finds none waits inside Ollama, where nobody can see it,
//! change its mind or be fair. So we count what we send, and learn where a runner is full: an agent reads it from the runner
//! itself, the operator may say it, and otherwise [`learn`] finds it from how answers overlapped.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::call::{Call, Counters};
use crate::circuit::Circuit;
use crate::cluster::Server;
use crate::hedge::Times;
use crate::judge::Usual;
use crate::place::{LoadOptions, Named};
use crate::slots::{Line, Load};

/// Calls that are sent to a runner of which nothing is known. It doubles whenever all of them are being answered, so that a
/// large runner is filled within a few round trips.
pub(crate) const GUESS: u32 = 4;
/// More slots than any runner has.
const MOST: u32 = 1024;
/// Answers that learning looks at.
const WINDOW: usize = 64;
/// Answers after which a number of slots that is known is looked at again.
const LOOK_EVERY: usize = 8;
/// Answers that must have waited before a number of slots is believed.
const WAITED_ENOUGH: usize = 4;
/// A wait shorter than this shows nothing.
const WAIT_SHOWS: Duration = Duration::from_millis(20);
/// How long a learned number is believed without being tried again.
const BELIEVED: Duration = Duration::from_secs(600);

/// The runners of one model, by server; made when they are first needed.
#[derive(Debug, Default)]
pub struct Runners {
    /// Sorted by server.
    list: ArcSwap<Vec<Arc<Runner>>>,
    line: Arc<Line>,
    /// How long answers about the model take, on whichever server: what `hedge` learns.
    pub times: Times,
}

impl Runners {
    /// The runner on a server.
    pub fn at(&self, server: &Server) -> Arc<Runner> {
        if let Some(runner) = self.used(server) {
            return runner;
        }
        let fresh = Arc::new(Runner::new(server, self.line.clone()));
        self.list.rcu(|list| {
            let mut list = Vec::clone(list);
            if let Err(at) = list.binary_search_by_key(&server.index, |runner| runner.server) {
                list.insert(at, fresh.clone());
            }
            list
        });
        // Another may have been quicker.
        self.used(server).unwrap_or(fresh)
    }

    /// The runner on a server, if it was needed so far.
    pub fn used(&self, server: &Server) -> Option<Arc<Runner>> {
        find(&self.list.load(), server).cloned()
    }

    /// Those that were needed so far.
    pub fn all(&self) -> Arc<Vec<Arc<Runner>>> {
        self.list.load_full()
    }

    /// Who waits for one of them.
    pub fn line(&self) -> &Arc<Line> {
        &self.line
    }
}

/// One model on one server.
#[derive(Debug)]
pub struct Runner {
    /// The server's index.
    pub server: usize,
    /// What the server is doing for us.
    pub(crate) load: Arc<Load>,
    /// Who waits for a slot of this model, on whichever server.
    pub(crate) line: Arc<Line>,
    /// How fast it is.
    pub speeds: Speeds,
    /// Whether it is left alone, after how the last calls went.
    pub(crate) circuit: Circuit,
    in_flight: AtomicU32,
    /// Those of them of which a piece has come: they have a slot.
    begun: AtomicU32,
    /// Slots as the operator said; 0: nothing was said.
    configured: AtomicU32,
    /// For which version of the operator's words that holds.
    configured_in: AtomicU32,
    /// Slots as the server's agent reads them; 0: nobody can read them.
    reported: AtomicU32,
    /// Slots as they were learned or are guessed.
    learned: AtomicU32,
    /// Whether they were learned.
    is_learned: AtomicBool,
    /// Calls that are waiting for it to be loaded.
    loading: AtomicU32,
    /// The load options that calls have named for what is loaded, or is loading.
    options: ArcSwap<LoadOptions>,
    /// Context of a slot as the server tells it, tokens; 0: it does not, or nothing is loaded.
    context: AtomicU32,
    /// How long it usually takes for a token.
    usual: Usual,
    book: Mutex<Book>,
}

/// Why a call makes a runner load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The model was not in memory.
    Cold,
    /// It was, with other options.
    Options,
}

impl Cause {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Options => "options",
        }
    }
}

/// A load that a call has caused, or waits for: over when this is dropped.
#[derive(Debug)]
pub(crate) struct Loading(Arc<Runner>);

impl Drop for Loading {
    fn drop(&mut self) {
        self.0.loading.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What learning remembers.
#[derive(Debug)]
struct Book {
    samples: Vec<Sample>,
    next: usize,
    /// When the number was learned; `None`: it is a guess.
    known_since: Option<Instant>,
    born: Instant,
}

impl Runner {
    fn new(server: &Server, line: Arc<Line>) -> Self {
        Self {
            server: server.index,
            load: server.load.clone(),
            line,
            speeds: Speeds::default(),
            circuit: server.circuits.of_model(),
            in_flight: AtomicU32::new(0),
            begun: AtomicU32::new(0),
            configured: AtomicU32::new(0),
            configured_in: AtomicU32::new(0),
            reported: AtomicU32::new(0),
            learned: AtomicU32::new(GUESS),
            is_learned: AtomicBool::new(false),
            loading: AtomicU32::new(0),
            options: ArcSwap::default(),
            context: AtomicU32::new(0),
            usual: Usual::default(),
            book: Mutex::new(Book { samples: Vec::new(), next: 0, known_since: None, born: Instant::now() }),
        }
    }

    /// Calls that it is answering for us.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Calls of which a piece of the answer has come, and not all.
    pub fn answering(&self) -> u32 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Calls that wait for its model, here or on another server.
    pub fn waiting(&self) -> usize {
        self.line.len()
    }

    /// Calls that it may be given at the same time.
    pub fn slots(&self) -> u32 {
        let said = self.configured.load(Ordering::Relaxed);
        let read = self.reported.load(Ordering::Relaxed);
        match (said, read) {
            (0, 0) => self.learned.load(Ordering::Relaxed),
            (0, read) => read,
            (said, _) => said,
        }
    }

    /// Where the number of slots is from.
    pub fn source(&self) -> &'static str {
        if self.configured.load(Ordering::Relaxed) != 0 {
            "configured"
        } else if self.reported.load(Ordering::Relaxed) != 0 {
            "reported"
        } else if self.is_learned.load(Ordering::Relaxed) {
            "learned"
        } else {
            "guessed"
        }
    }

    /// Whether a call would find a free slot that nobody waits for.
    pub fn has_room(&self) -> bool {
        self.in_flight() < self.slots() && !self.line.waits_for(self.server)
    }

    /// The server's agent read how many slots there are; 0: it could not.
    pub fn reported(self: &Arc<Self>, slots: u32) {
        if self.reported.swap(slots.min(MOST), Ordering::Relaxed) < slots {
            self.line.serve(self);
        }
    }

    /// The server told what is in its memory: the context of this runner and the load options of the model that it is listed
    /// under, or that it is not there. Who loaded it may not have been us; then it has those options, as far as one can tell.
    pub fn told(&self, loaded: Option<(u32, Option<&LoadOptions>)>) {
        self.context.store(loaded.map_or(0, |(context, _)| context), Ordering::Relaxed);
        if self.is_loading() {
            return;
        }
        let is_empty = self.options.load().is_empty();
        match loaded {
            None if !is_empty => self.options.store(Arc::default()),
            Some((context, Some(named))) if is_empty && !named.is_empty() => {
                self.options.store(Arc::new(if context > 0 { named.without_context() } else { named.clone() }));
            }
            _ => {}
        }
    }

    /// Its circuit: 0 closed, 1 open, 2 half-open.
    pub fn circuit_state(&self) -> u8 {
        self.circuit.number()
    }

    /// Whether a load is going on.
    pub fn is_loading(&self) -> bool {
        self.loading.load(Ordering::Relaxed) > 0
    }

    /// Why a call would make it load, if it would.
    pub(crate) fn cause(&self, named: Option<&Named>, is_loaded: bool) -> Option<Cause> {
        if !is_loaded && !self.is_loading() {
            return Some(Cause::Cold);
        }
        let reloads = named?.reloads(&self.options.load(), self.context.load(Ordering::Relaxed));
        reloads.then_some(Cause::Options)
    }

    /// A call goes there: it takes the load options that are loaded as far as it can, or those that it names are loaded.
    pub(crate) fn takes(self: &Arc<Self>, call: &mut Call, is_loaded: bool) -> (Option<Cause>, Option<Loading>) {
        let named = call.place.options.clone();
        let cause = self.cause(named.as_deref(), is_loaded);
        let waits = cause.is_some() || self.is_loading();
        let loading = waits.then(|| {
            self.loading.fetch_add(1, Ordering::Relaxed);
            Loading(self.clone())
        });
        let Some(named) = named else { return (cause, loading) };
        let had = self.options.load();
        let has = match cause {
            Some(Cause::Cold) => named.options.clone(),
            Some(Cause::Options) if !named.takes_options() => named.options.clone(),
            _ => had.after(&named),
        };
        if cause != Some(Cause::Cold) {
            let edits = named.edits(&call.payload, &has, self.context.load(Ordering::Relaxed));
            if !edits.is_empty() {
                call.note("model-route", "goes with the options that are loaded", []);
                call.edits_mut().body.extend(edits);
            }
        }
        if has != **had {
            self.options.store(Arc::new(has));
        }
        (cause, loading)
    }

    /// Asks the operator's words once for each version of them.
    pub(crate) fn configure(self: &Arc<Self>, version: u32, said: impl FnOnce() -> u32) {
        if self.configured_in.load(Ordering::Acquire) == version {
            return;
        }
        let before = self.slots();
        self.configured.store(said().min(MOST), Ordering::Relaxed);
        self.configured_in.store(version, Ordering::Release);
        if self.slots() > before {
            self.line.serve(self);
        }
    }

    /// Takes a slot if one is free.
    pub(crate) fn enter(&self) -> bool {
        let slots = self.slots();
        let take = |taken: u32| (taken < slots).then(|| taken + 1);
        self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    /// Takes a slot even if none is free.
    pub(crate) fn enter_anyway(&self) {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
    }

    /// Gives a slot back, to whoever waits for one.
    pub(crate) fn leave(self: &Arc<Self>) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        if !self.line.is_empty() {
            self.line.serve(self);
        }
    }

    /// The first piece of an answer has come: so many have a slot for certain.
    pub(crate) fn begins(self: &Arc<Self>) {
        let begun = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let learned = self.learned.load(Ordering::Relaxed);
        if begun >= learned && !self.is_told() && !self.is_learned.load(Ordering::Relaxed) {
            self.learned.fetch_max(begun.saturating_mul(2).min(MOST), Ordering::Relaxed);
            self.line.serve(self);
        }
    }

    /// An answer of which a piece had come is over.
    pub(crate) fn ends(&self) {
        self.begun.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether somebody has told how many slots there are.
    fn is_told(&self) -> bool {
        self.configured.load(Ordering::Relaxed) != 0 || self.reported.load(Ordering::Relaxed) != 0
    }

    /// How many times as long as usual the tokens of an answer took, once that is known.
    pub(crate) fn pace(&self, seen: &Seen) -> Option<f32> {
        self.usual.times(seen.per_token()?, seen.others == 0)
    }

    /// An answer is over and whole: what it shows is learned.
    pub fn ended(self: &Arc<Self>, seen: &Seen) {
        self.speeds.learn(seen);
        // Who waits for a slot that others have learns nothing of how many there are.
        if self.is_told() || !seen.alone {
            return;
        }
        let was = self.learned.load(Ordering::Relaxed);
        let mut book = self.book();
        let sample = Sample::of(seen, book.born);
        if book.samples.len() < WINDOW {
            book.samples.push(sample);
        } else {
            let next = book.next;
            book.samples[next] = sample;
        }
        book.next = (book.next + 1) % WINDOW;
        // What is known is looked at now and then: it takes as long as a good part of a short call.
        let looks = book.known_since.is_none() || book.samples.len() < WINDOW || book.next.is_multiple_of(LOOK_EVERY);
        let slots = match looks.then(|| learn(&book.samples)).flatten() {
            Some(slots) => {
                book.known_since.get_or_insert_with(Instant::now);
                slots
            }
            // Nobody has had to wait: more may fit.
            None if book.known_since.is_none() && seen.others + 1 >= was => was + 1,
            None => was,
        };
        let slots = if book.known_since.is_some_and(|since| since.elapsed() > BELIEVED) {
            // It may have changed: it is tried with one more, and learned again.
            book.samples.clear();
            book.next = 0;
            book.known_since = None;
            slots + 1
        } else {
            slots
        };
        self.is_learned.store(book.known_since.is_some(), Ordering::Relaxed);
        drop(book);
        self.learned.store(slots.clamp(1, MOST), Ordering::Relaxed);
        if slots > was {
            self.line.serve(self);
        }
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What we saw of one answer.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// When the call was sent.
    pub sent: Instant,
    /// When the first piece of the body came.
    pub first: Instant,
    /// When the last one came.
    pub ended: Instant,
    /// Whether the answer came piece by piece, as it was made.
    pub streamed: bool,
    /// Calls that the runner was answering already when this one was sent.
    pub others: u32,
    /// Whether nobody but us had calls at the server.
    pub alone: bool,
    /// Tokens of the prompt that the runner is not believed to have had in its cache.
    pub uncached: u64,
    /// What the server counted.
    pub counters: Counters,
}

impl Seen {
    /// For how long the server says that it worked on the answer itself, without waiting and loading.
    fn work(&self) -> Duration {
        self.counters.prompt_duration + self.counters.eval_duration
    }

    /// Milliseconds for a token of the answer, if it has several.
    fn per_token(&self) -> Option<f32> {
        let told = self.counters.eval_duration;
        let making = if told > Duration::ZERO { told } else { self.ended - self.first };
        #[expect(clippy::cast_precision_loss, reason = "an average of thousands at most")]
        let tokens = self.counters.output_tokens as f32;
        (tokens > 1.0).then(|| making.as_secs_f32() * 1000.0 / tokens)
    }

    /// From the call to its first piece, without the load.
    fn until_first(&self) -> Duration {
        (self.first - self.sent).saturating_sub(self.counters.load_duration)
    }
}

/// One answer as learning sees it: times in microseconds since the runner was first needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When the call was sent.
    pub sent: u64,
    /// When it was over.
    pub ended: u64,
    /// Time that its model took to load, while it waited.
    pub loading: u64,
    /// For how long it certainly had a slot: what the server says, or how long it streamed.
    pub busy: u64,
    /// Tokens made; of the prompt if there are none.
    pub tokens: u64,
}

impl Sample {
    fn of(seen: &Seen, born: Instant) -> Self {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let streamed = if seen.streamed { seen.ended - seen.first } else { Duration::ZERO };
        let tokens = seen.counters.output_tokens;
        Self {
            sent: micros(seen.sent - born),
            ended: micros(seen.ended - born),
            loading: micros(seen.counters.load_duration),
            busy: micros(streamed.max(seen.work())),
            tokens: if tokens == 0 { seen.counters.prompt_tokens } else { tokens },
        }
    }

    fn took(&self) -> u64 {
        (self.ended - self.sent).saturating_sub(self.loading)
    }
}

/// The number of slots that these answers show, if they show one.
///
/// An answer has a slot for its last `busy` microseconds; where a server says nothing of that and does not stream, for at
/// least as long as the fastest of the others took for as many tokens. The most answers that had a slot at the same moment
/// are a lower bound; a tenth of each is left out, since what we see of an end and of the next begin may cross on the way. It is the number of
/// slots once several answers have visibly waited: they would have begun earlier if there had been more.
pub fn learn(samples: &[Sample]) -> Option<u32> {
    let shows = u64::try_from(WAIT_SHOWS.as_micros()).unwrap_or(u64::MAX);
    // Nearly always, and much less work: nobody was there long enough to have waited.
    if samples.iter().filter(|one| one.took() > shows).count() < WAITED_ENOUGH {
        return None;
    }
    let pace = samples.iter().filter(|one| one.tokens > 0).map(|one| one.took() / one.tokens).min().unwrap_or(0);
    let busy = |one: &Sample| one.busy.max(pace * one.tokens).min(one.took());
    let waited = |one: &&Sample| one.took() - busy(one) > shows.max(busy(one) / 4);
    if samples.iter().filter(waited).count() < WAITED_ENOUGH {
        return None;
    }
    let mut begins: SmallVec<[u64; WINDOW]> = samples.iter().map(|one| one.ended - busy(one) / 10 * 9).collect();
    let mut ends: SmallVec<[u64; WINDOW]> = samples.iter().map(|one| one.ended).collect();
    begins.sort_unstable();
    ends.sort_unstable();
    // The most that overlap do so where one of them begins.
    let mut over = 0;
    let most = begins.iter().zip(1..).map(|(begin, begun)| {
        over += ends[over..].iter().take_while(|end| *end <= begin).count();
        usize::saturating_sub(begun, over)
    });
    most.max().and_then(|most| u32::try_from(most.max(1)).ok())
}

/// How fast a runner is: averages in which what is old fades.
#[derive(Debug, Default)]
pub struct Speeds {
    /// Milliseconds for a token of a prompt.
    pub prefill: Average,
    /// Milliseconds for a token of an answer.
    pub decode: Average,
    /// Milliseconds that a call has its slot.
    pub service: Average,
    /// Milliseconds of a load.
    pub load: Average,
    /// Milliseconds to the first piece beyond what is explained: the network, and everything we do not know.
    pub rest: Average,
}

impl Speeds {
    fn learn(&self, seen: &Seen) {
        let ms = |time: Duration| time.as_secs_f32() * 1000.0;
        let counters = &seen.counters;
        #[expect(clippy::cast_precision_loss, reason = "an average of thousands at most")]
        let per = |time: Duration, tokens: u64| ms(time) / tokens as f32;
        if counters.load_duration > Duration::from_millis(100) {
            self.load.add(ms(counters.load_duration));
        }
        if counters.prompt_duration > Duration::ZERO && seen.uncached > 0 {
            self.prefill.add(per(counters.prompt_duration, seen.uncached));
            // Who was alone did not wait.
            if seen.streamed && seen.others == 0 {
                self.rest.add(ms(seen.until_first().saturating_sub(counters.prompt_duration)));
            }
        } else if seen.streamed && seen.others == 0 && seen.uncached > 0 {
            self.prefill.add(per(seen.until_first(), seen.uncached));
        }
        if let Some(pace) = seen.per_token() {
            self.decode.add(pace);
        }
        let took = (seen.ended - seen.sent).saturating_sub(counters.load_duration);
        self.service.add(if seen.work() > Duration::from_millis(1) { ms(seen.work()).min(ms(took)) } else { ms(took) });
    }
}

/// A decayed average that any thread may add to. Two additions at once may count as one: it is an estimate.
#[derive(Debug, Default)]
pub struct Average(AtomicU32);

impl Average {
    /// What a new value weighs.
    const WEIGHT: f32 = 0.2;

    /// The average; `None` if nothing was added yet.
    pub fn get(&self) -> Option<f32> {
        // An average of exactly zero is as good as none.
        Some(f32::from_bits(self.0.load(Ordering::Relaxed))).filter(|value| *value != 0.0)
    }

    /// Adds a value.
    pub fn add(&self, value: f32) {
        let next = self.get().map_or(value, |old| old + (value - old) * Self::WEIGHT);
        if next.is_finite() {
            self.0.store(next.to_bits(), Ordering::Relaxed);
        }
    }
}

/// The runner of a server in a list of them.
pub(crate) fn find<'a>(runners: &'a [Arc<Runner>], server: &Server) -> Option<&'a Arc<Runner>> {
    runners.binary_search_by_key(&server.index, |runner| runner.server).ok().map(|at| &runners[at])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BinaryHeap;

    /// A server with so many slots, asked by so many clients, each again as soon as it is answered: what we see of it.
    fn trace(slots: usize, clients: usize, how: fn(&mut Sample), calls: usize) -> Vec<Sample> {
        let mut random = fastrand::Rng::with_seed(7);
        let mut free: BinaryHeap<std::cmp::Reverse<u64>> = vec![std::cmp::Reverse(0); slots].into();
        let mut asking: BinaryHeap<std::cmp::Reverse<u64>> = (0..clients as u64).map(std::cmp::Reverse).collect();
        let mut samples = Vec::new();
        for _ in 0..calls {
            let sent = asking.pop().unwrap().0;
            let begins = free.pop().unwrap().0.max(sent);
            let tokens = random.u64(20..200);
            let ended = begins + tokens * 5_000;
            free.push(std::cmp::Reverse(ended));
            asking.push(std::cmp::Reverse(ended + random.u64(0..2_000)));
            let mut sample = Sample { sent, ended, loading: 0, busy: ended - begins, tokens };
            how(&mut sample);
            samples.push(sample);
        }
        samples
    }

    fn told(_: &mut Sample) {}

    fn untold(sample: &mut Sample) {
        sample.busy = 0;
    }

    #[test]
    fn the_slots_of_a_busy_runner_are_found() {
        for slots in [1, 2, 3, 4, 8, 16] {
            for (name, how) in [("told", told as fn(&mut Sample)), ("untold", untold)] {
                let samples = trace(slots, slots * 2 + 2, how, WINDOW);
                assert_eq!(learn(&samples), Some(u32::try_from(slots).unwrap()), "{slots} slots, {name}");
            }
        }
    }

    #[test]
    fn a_runner_that_is_never_full_shows_nothing() {
        assert_eq!(learn(&trace(8, 3, told, WINDOW)), None);
        assert_eq!(learn(&[]), None);
    }

    #[test]
    fn an_average_forgets_slowly() {
        let average = Average::default();
        assert_eq!(average.get(), None);
        average.add(10.0);
        average.add(20.0);
        assert_eq!(average.get(), Some(12.0));
        average.add(f32::NAN);
        assert_eq!(average.get(), Some(12.0));
    }
}
