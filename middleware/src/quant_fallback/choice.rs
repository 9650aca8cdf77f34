//! What a call for a model is sent to: that model, or the same one in another quantization.
//!
//! A pure look at one snapshot: nothing is changed, counted or sent.

use std::sync::{Arc, Weak};

use quick_cache::sync::Cache;
use smallvec::SmallVec;

use super::level::{Level, Parts};
use super::{Policy, Rules};
use crate::call::Call;
use crate::cluster::{Bits, Candidates, Known, Make, Snapshot};
use crate::names::ModelName;
use crate::slots::Line;
use crate::trail::Fact;

/// Of how many names the siblings are remembered.
const REMEMBERED: usize = 1024;

/// The same model in some quantization, as some servers have it.
#[derive(Debug)]
pub(super) struct Offer<'a> {
    pub(super) known: &'a Arc<Known>,
    pub(super) make: &'a Make,
    /// As its servers report it; what its tag says, where they do not know.
    pub(super) level: Option<Level>,
    /// Those of its servers that can be asked.
    pub(super) servers: Bits,
    /// Those of them that have it in memory.
    pub(super) loaded: Bits,
    /// Why it is out of the question, if it is.
    pub(super) refusal: Option<&'static str>,
}

/// What becomes of a call.
#[derive(Debug)]
pub(super) enum Choice<'a> {
    /// It goes on as it is, and why.
    AsAsked(&'static str),
    /// Another quantization is asked for, and why.
    Instead(&'a Offer<'a>, &'static str),
}

/// All that a choice is made from.
#[derive(Debug)]
pub(super) struct Look<'a> {
    /// The model that is asked for, if any server has it.
    pub(super) known: Option<&'a Arc<Known>>,
    /// Its level: as servers report it, else what its tag says.
    pub(super) level: Option<Level>,
    /// Whether a server that can be asked has it.
    pub(super) is_installed: bool,
    /// Whether there is no telling what it is.
    is_unclear: bool,
    /// The same model in other quantizations, and what only looks like it.
    pub(super) offers: SmallVec<[Offer<'a>; 8]>,
    policy: Policy,
    snapshot: &'a Snapshot,
}

/// Which models are called like one, found once for a snapshot: that takes some microseconds.
#[derive(Debug)]
pub(super) struct Siblings(Cache<ModelName, (Weak<Snapshot>, Arc<[ModelName]>)>);

impl Default for Siblings {
    fn default() -> Self {
        Self(Cache::new(REMEMBERED))
    }
}

impl Siblings {
    fn of(&self, snapshot: &Arc<Snapshot>, name: &ModelName) -> Arc<[ModelName]> {
        let is_current = |of: &Weak<Snapshot>| std::ptr::eq(of.as_ptr(), Arc::as_ptr(snapshot));
        if let Some((_, found)) = self.0.get(name).filter(|(of, _)| is_current(of)) {
            return found;
        }
        let mut found = Vec::new();
        Parts::of(name).names(|other| found.extend(snapshot.models.get(other).map(|other| other.name.clone())));
        found.retain(|other| other != name);
        let found: Arc<[ModelName]> = found.into();
        self.0.insert(name.clone(), (Arc::downgrade(snapshot), found.clone()));
        found
    }
}

/// Family and number of parameters.
type Kind<'a> = (&'a str, &'a str);

/// Whether one of these servers is a candidate that takes calls.
pub(super) fn is_there(servers: &Bits, candidates: &Candidates) -> bool {
    servers.iter().any(|index| candidates.get(index).is_some_and(|server| server.is_usable()))
}

fn those_there(servers: &Bits, candidates: &Candidates) -> Bits {
    let mut there = Bits::default();
    servers
        .iter()
        .filter(|index| candidates.get(*index).is_some_and(|server| server.is_usable()))
        .for_each(|index| there.insert(index));
    there
}

/// What servers say; `None` where they say nothing.
fn kind(make: &Make) -> Option<Kind<'_>> {
    let model = make.model();
    (!model.family.is_empty() && !model.parameter_size.is_empty()).then_some((&model.family, &model.parameter_size))
}

fn level(make: &Make, by_tag: Option<Level>) -> Option<Level> {
    Level::parse(&make.model().quantization).or(by_tag)
}

/// What all of them are, if they are the same.
fn agreed<T: PartialEq>(mut all: impl Iterator<Item = T>) -> Result<Option<T>, ()> {
    let Some(first) = all.next() else { return Ok(None) };
    if all.all(|other| other == first) { Ok(Some(first)) } else { Err(()) }
}

impl<'a> Look<'a> {
    /// Looks for all that could be meant by a call for `name`.
    pub(super) fn new(
        rules: &Rules,
        call: &Call,
        snapshot: &'a Arc<Snapshot>,
        name: &ModelName,
        policy: Policy,
    ) -> Self {
        let parts = Parts::of(name);
        let known = snapshot.known(name);
        let own = || known.into_iter().flat_map(|known| known.makes.iter()).filter(|make| kind(make).is_some());
        let own_kind = agreed(own().filter_map(kind));
        let own_level = agreed(own().map(|make| level(make, parts.level)));
        let is_unclear = own_kind.is_err() || own_level.is_err();
        let mut look = Self {
            known,
            level: own_level.ok().flatten().unwrap_or(parts.level),
            is_installed: known.is_some_and(|known| is_there(&known.installed, &call.candidates)),
            is_unclear,
            offers: SmallVec::new(),
            policy,
            snapshot,
        };
        for other in rules.siblings.of(snapshot, name).iter() {
            if let Some(other) = snapshot.known(other) {
                look.offer(other, call);
            }
        }
        let wanted = match own_kind {
            Ok(Some(kind)) => Ok(Some(kind)),
            // Nobody says what it is: that of all that are called like it, if there is no doubt.
            _ => agreed(look.offers.iter().filter_map(|offer| kind(offer.make))),
        };
        for offer in &mut look.offers {
            offer.refusal = match (kind(offer.make), wanted) {
                _ if is_unclear => Some("servers disagree about what is asked for"),
                (_, Err(())) => Some("servers disagree about what is called so"),
                (None, _) => Some("its servers do not say what it is"),
                (kind, Ok(wanted)) if kind != wanted => Some("another family or size"),
                _ if !rules.may_use(call, offer.known) => Some("the key does not allow it"),
                _ if offer.servers.is_empty() => Some("no server that has it can be asked"),
                _ => None,
            };
        }
        look
    }

    fn offer(&mut self, known: &'a Arc<Known>, call: &Call) {
        let by_tag = Parts::of(&known.name).level;
        for make in &known.makes {
            let servers = those_there(&make.servers, &call.candidates);
            let mut loaded = servers.clone();
            loaded.keep(&known.loaded);
            self.offers.push(Offer { known, make, level: level(make, by_tag), servers, loaded, refusal: None });
        }
    }

    /// Those that are not out of the question.
    fn good(&self) -> impl Iterator<Item = &Offer<'a>> {
        self.offers.iter().filter(|offer| offer.refusal.is_none())
    }

    /// Those that may stand for the level that is asked for, the best first.
    fn compatible<'s>(&'s self, rules: &'s Rules) -> impl Iterator<Item = &'s Offer<'a>> {
        let row = self.level.map_or(&[][..], |level| rules.lattice.row(level));
        row.iter().flat_map(|level| self.good().filter(move |offer| offer.level == Some(*level)))
    }

    /// Chooses in the order of the first OLOL: what is in memory and good enough; the very one that is asked for; what
    /// suits the hardware.
    ///
    /// `waited` is where the call has waited for a slot: that decides, so that it has not waited in vain.
    pub(super) fn choose<'s>(&'s self, rules: &'s Rules, takes_loaded: bool, waited: Option<&Arc<Line>>) -> Choice<'s> {
        if self.policy == Policy::Off {
            return Choice::AsAsked("strict: nothing else will do");
        }
        let has_waited = |known: &Arc<Known>| waited.is_some_and(|line| Arc::ptr_eq(line, known.runners.line()));
        if self.known.is_some_and(has_waited) {
            return Choice::AsAsked("has waited for a slot of the model itself");
        }
        if let Some(offer) = self.compatible(rules).find(|offer| has_waited(offer.known)) {
            return Choice::Instead(offer, "has waited for a slot of it");
        }
        if takes_loaded && let Some(offer) = self.compatible(rules).find(|offer| !offer.loaded.is_empty()) {
            return Choice::Instead(offer, "in memory, and as good or better");
        }
        if self.is_installed {
            return Choice::AsAsked("nothing that would do is in memory: the model itself is loaded");
        }
        if self.is_unclear {
            return Choice::AsAsked("servers disagree about what it is");
        }
        self.best(rules)
    }

    /// What there is instead of a model that nobody has.
    fn best<'s>(&'s self, rules: &'s Rules) -> Choice<'s> {
        let fits = |offer: &Offer<'_>| rules.fits(offer, self.snapshot);
        // What is not known to be too large is taken to fit.
        if let Some(offer) = self.compatible(rules).find(|offer| fits(offer) != Some(false)) {
            return Choice::Instead(offer, "nobody has the model itself; as good or better");
        }
        if self.policy == Policy::Any {
            let size = |offer: &&Offer<'_>| offer.make.model().size;
            if let Some(offer) = self.good().filter(|offer| fits(offer) == Some(true)).max_by_key(size) {
                return Choice::Instead(offer, "nobody has the model itself; the largest that fits");
            }
            if let Some(offer) = self.good().min_by_key(size) {
                return Choice::Instead(offer, "nobody has the model itself; the smallest");
            }
        } else if let Some(offer) = self.compatible(rules).next() {
            return Choice::Instead(offer, "nobody has the model itself; as good or better, and perhaps too large");
        }
        Choice::AsAsked("nobody has the model, or what could stand for it")
    }

    /// What `explain` shows: all that was looked at.
    pub(super) fn rows(&self, rules: &Rules) -> Fact {
        let row = |offer: &Offer<'_>| {
            let is_compatible = self.compatible(rules).any(|other| std::ptr::eq(other, offer));
            Fact::Row(vec![
                ("model", Fact::from(&offer.known.name)),
                ("quantization", word(offer.level).into()),
                ("servers", offer.servers.count().into()),
                ("in-memory", offer.loaded.count().into()),
                (
                    "verdict",
                    offer
                        .refusal
                        .unwrap_or(if is_compatible { "compatible" } else { "not accepted for this level" })
                        .into(),
                ),
            ])
        };
        Fact::List(self.offers.iter().map(row).collect())
    }
}

/// The word for a level, in notes and labels.
pub(super) fn word(level: Option<Level>) -> &'static str {
    level.map_or("unknown", Level::as_str)
}
