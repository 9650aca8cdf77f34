//! What is to be done so that models are where they are wanted: a pure function of what is known.
//!
//! A replica counts while its server answers, also while it is drained. A server that is away keeps what it has for a time of
//! grace, and for as long as it only sleeps; then it counts as lost, and is made again elsewhere. Of the servers that fit, the
//! first ones in an order that every proxy finds by itself are chosen. Nothing is ever taken away.
//!
//! A registry is asked once: while nobody has a model that others could copy, one server brings it, and the others that can
//! copy wait for that one.
//!
//! What counts as a replica is decided by the digest: that which most servers have under the name, of equals the newest. A
//! server that has another model under it holds no replica. It is told, and left alone: bringing the model there would take
//! away what somebody has put there.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::time::Duration;

use olol_middleware::affinity::suits;
use olol_middleware::{ModelName, ServerId};
use serde::Serialize;

use super::{Config, KeepLoaded, Name, Replicas, Wanted};

/// Refusals of servers that are told for one model.
const TOLD: usize = 16;
const MIB: u64 = 1 << 20;

/// A server as it matters here.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) id: ServerId,
    pub(super) weight: NonZeroU32,
    pub(super) presence: Presence,
    /// Whether it has ever told what it has.
    pub(super) is_known: bool,
    /// Whether it is away and can be woken.
    pub(super) sleeps: bool,
    /// Bytes free on the disk of its models, if it tells.
    pub(super) disk_free: Option<u64>,
    /// Bytes there of models that have begun to come, of this one perhaps.
    pub(super) disk_begun: u64,
    /// How it comes by models.
    pub(super) agent: Agent,
}

/// Whether a server has an agent, which copies from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agent {
    /// None: it can only ask the registry.
    None,
    /// It copies, and nobody can copy from it.
    Takes,
    /// It copies, and gives on what it has.
    Gives,
}

/// Whether a server is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// It answers.
    Here,
    /// It answers, and gets nothing new.
    Draining,
    /// It has not answered for so long.
    Away(Duration),
}

/// Where a model is, by the places of servers in [`View::places`].
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    pub(super) installed: Vec<usize>,
    /// From whom it can be copied.
    pub(super) sources: Vec<usize>,
    /// From whom it can be copied in a moment: who has just got it has not told its digest yet.
    pub(super) fresh: Vec<usize>,
    /// Who has another model under the name.
    pub(super) differs: Vec<usize>,
    /// The digest that is meant; empty: nobody has told one.
    pub(super) digest: String,
    /// In whose memory it is, and whether it stays there.
    pub(super) loaded: Vec<(usize, bool)>,
    /// Bytes on a disk; 0: unknown.
    pub(super) size: u64,
    /// Whether it makes embeddings and nothing else.
    pub(super) embeds: bool,
}

/// A model that is being brought to a server.
#[derive(Clone, Debug)]
pub(super) struct Making {
    pub(super) server: ServerId,
    /// Bytes that are still to come; 0: unknown.
    pub(super) left: u64,
}

/// Something that can be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Deed {
    /// Bring a model to a server.
    Bring(ModelName, ServerId),
    /// Bring a model anywhere.
    BringAnywhere(ModelName),
    /// Load a model on a server.
    Load(ModelName, ServerId),
    /// Wake a server.
    Wake(ServerId),
}

/// All that is known.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) places: Vec<Place>,
    pub(super) models: HashMap<ModelName, Held>,
    /// What is on its way, by whomever.
    pub(super) making: HashMap<ModelName, Vec<Making>>,
    /// What is being loaded by us.
    pub(super) loading: HashSet<(ModelName, ServerId)>,
    /// What is left alone for a while, and why.
    pub(super) rests: HashMap<Deed, String>,
    /// The servers that are being woken, or were a moment ago.
    pub(super) waking: HashSet<ServerId>,
    /// The models that went from servers which stayed: somebody has deleted them.
    pub(super) gone: HashSet<ModelName>,
}

/// Something to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Bring a model of so many bytes to a server.
    Bring { name: Name, server: ServerId, size: u64 },
    /// Load a model, or tell a loaded one to stay (`again`).
    Load { name: Name, server: ServerId, embeds: bool, again: bool },
    /// Wake a server.
    Wake { server: ServerId },
}

/// How far a model is where it is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Standing {
    /// The model.
    #[serde(skip)]
    pub name: ModelName,
    /// Whether the file says so, or a pin.
    pub source: &'static str,
    /// What is wanted: a number, or "all".
    pub replicas: Replicas,
    /// On how many servers that is now.
    pub wanted: usize,
    /// On which servers it may be, as patterns; none: on all.
    pub servers: Vec<String>,
    /// The digest that is meant by the name; none: nobody has it.
    pub digest: Option<String>,
    /// The servers that have it.
    pub held: Vec<String>,
    /// Those that have another model under the name: they hold no replica, and are left alone.
    pub differs: Vec<String>,
    /// Those that have it and do not answer; they count for a while.
    pub away: Vec<String>,
    /// Those to which it is being brought.
    pub making: Vec<String>,
    /// Whether it stays in memory, and on how many servers.
    pub keep_loaded: KeepLoaded,
    /// The servers that have it in memory, of those that should.
    pub loaded: Vec<String>,
    /// Why more is not done at the moment; none: all is as it is wanted.
    pub why: Option<String>,
    /// Servers that fit but for a reason.
    pub refused: Vec<Refusal>,
}

/// Why a server is not given a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The server.
    pub server: String,
    /// Why.
    pub why: String,
}

/// What is to be done, and how all stands.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) actions: Vec<Action>,
    pub(super) standings: Vec<Standing>,
}

/// Plans for all that is wanted, each with who wants it; so many bytes stay free on each disk.
pub(super) fn plan(wanted: &[(Wanted, &'static str)], view: &View, config: &Config, reserve: u64) -> Plan {
    let places: HashMap<&ServerId, usize> = view.places.iter().enumerate().map(|(at, place)| (&place.id, at)).collect();
    let mut promised = vec![0_u64; view.places.len()];
    for making in view.making.values().flatten() {
        if let Some(at) = places.get(&making.server) {
            promised[*at] = promised[*at].saturating_add(making.left);
        }
    }
    let mut planner = Planner { view, config, reserve, places, promised, plan: Plan::default() };
    for (wanted, source) in wanted {
        planner.model(wanted, source);
    }
    planner.plan
}

struct Planner<'a> {
    view: &'a View,
    config: &'a Config,
    reserve: u64,
    places: HashMap<&'a ServerId, usize>,
    /// Bytes that are on their way to each server.
    promised: Vec<u64>,
    plan: Plan,
}

/// What is found of one model.
#[derive(Default)]
struct Found {
    /// The servers that are meant.
    meant: Vec<usize>,
    held: Vec<usize>,
    /// Those that have another model under the name.
    differs: Vec<usize>,
    /// Away, and still counted.
    away: Vec<usize>,
    making: Vec<usize>,
    /// Those that have not told yet what they have, and may have it.
    unheard: Vec<usize>,
}

impl Planner<'_> {
    fn model(&mut self, wanted: &Wanted, source: &'static str) {
        let unknown = Held::default();
        let held = self.view.models.get(wanted.name.model()).unwrap_or(&unknown);
        let found = self.find(wanted, held);
        let mut standing = self.standing(wanted, source, &found);
        standing.digest = Some(held.digest.clone()).filter(|digest| !digest.is_empty());
        if wanted.is_wanted() {
            self.replicas(wanted, held, &found, &mut standing);
            self.memory(wanted, held, &found, &mut standing);
        }
        self.plan.standings.push(standing);
    }

    fn find(&self, wanted: &Wanted, held: &Held) -> Found {
        let grace = self.config.grace_s.time();
        let is_installed: HashSet<usize> = held.installed.iter().copied().collect();
        let mut found = Found::default();
        for (at, place) in self.view.places.iter().enumerate().filter(|(_, place)| wanted.means(&place.id)) {
            found.meant.push(at);
            if held.differs.contains(&at) {
                found.differs.push(at);
                continue;
            }
            match place.presence {
                Presence::Here | Presence::Draining if is_installed.contains(&at) => found.held.push(at),
                Presence::Away(since) if is_installed.contains(&at) && (since < grace || place.sleeps) => {
                    found.away.push(at);
                }
                Presence::Away(since) if !place.is_known && since < grace => found.unheard.push(at),
                _ => {}
            }
        }
        found.making = self.making(wanted).filter(|at| found.meant.contains(at) && !found.held.contains(at)).collect();
        found
    }

    fn standing(&self, wanted: &Wanted, source: &'static str, found: &Found) -> Standing {
        let here = |at: &&usize| self.view.places[**at].presence == Presence::Here;
        let goal = match wanted.replicas {
            Replicas::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
            // Who is away, or drained, need not have it yet.
            Replicas::All => found.meant.iter().filter(|at| found.held.contains(at) || here(at)).count(),
        };
        Standing {
            name: wanted.name.model().clone(),
            source,
            replicas: wanted.replicas,
            wanted: goal,
            servers: wanted.servers.iter().map(ToString::to_string).collect(),
            digest: None,
            held: self.names(&found.held),
            differs: self.names(&found.differs),
            away: self.names(&found.away),
            making: self.names(&found.making),
            keep_loaded: wanted.keep_loaded,
            loaded: Vec::new(),
            why: None,
            refused: Vec::new(),
        }
    }

    /// Brings it to as many servers as are missing.
    fn replicas(&mut self, wanted: &Wanted, held: &Held, found: &Found, standing: &mut Standing) {
        let away = if wanted.replicas == Replicas::All { 0 } else { found.away.len() };
        let mut missing = standing.wanted.saturating_sub(found.held.len() + away + found.making.len());
        if missing == 0 {
            return;
        }
        if self.view.gone.contains(wanted.name.model()) {
            standing.why = Some(
                "it was deleted: it went from all its servers while they answered, so it is not made again; `olol models \
                 pin` asks for it"
                    .to_owned(),
            );
            return;
        }
        if matches!(wanted.replicas, Replicas::Count(_)) && !found.unheard.is_empty() {
            missing = missing.saturating_sub(found.unheard.len());
            let names = self.names(&found.unheard).join(", ");
            standing.why = Some(format!("it may be on {names}, which has not told yet what it has"));
        }
        if let Some(why) = self.view.rests.get(&Deed::BringAnywhere(wanted.name.model().clone())) {
            standing.why = Some(why.clone());
            return;
        }
        let is_candidate = |at: &usize| {
            self.view.places[*at].presence == Presence::Here
                && ![&found.held, &found.making, &found.differs].into_iter().any(|some| some.contains(at))
        };
        let candidates = self.in_order(wanted, found.meant.iter().copied().filter(is_candidate));
        let mut chosen = Vec::new();
        for at in candidates {
            if missing == 0 {
                break;
            }
            match self.refusal(wanted, held.size, at) {
                Some(why) if standing.refused.len() < TOLD => {
                    standing.refused.push(Refusal { server: self.view.places[at].id.to_string(), why });
                }
                Some(_) => {}
                None => {
                    self.promised[at] = self.promised[at].saturating_add(held.size);
                    chosen.push(at);
                    missing -= 1;
                }
            }
        }
        self.bring(wanted, held, &chosen, standing);
        if missing == 0 {
            return;
        }
        let holders = |at: &usize| [&found.held, &found.away, &found.differs].into_iter().any(|some| some.contains(at));
        let sleepers = found.meant.iter().copied().filter(|at| self.view.places[*at].sleeps && !holders(at));
        let sleepers = self.in_order(wanted, sleepers);
        if wanted.replicas != Replicas::All && !sleepers.is_empty() {
            self.wake(&sleepers, missing, standing);
            return;
        }
        let more = if missing == 1 { "one more is".to_owned() } else { format!("{missing} more are") };
        standing.why = Some(match standing.refused.first() {
            Some(Refusal { server, why }) => format!("{more} wanted, and no server can take it: {server}: {why}"),
            None if !found.differs.is_empty() => format!(
                "{more} wanted, and another model has the name on {}: `olol models pull` brings all to what the registry has",
                self.names(&found.differs).join(", ")
            ),
            None if found.meant.is_empty() => {
                "none of the servers that it is wanted on is a member of the cluster".to_owned()
            }
            None => format!("{more} wanted, and no other server is there that could take it"),
        });
    }

    /// Brings it to these servers. While there is nobody to copy from, one of those who can give it on asks the registry, and
    /// the others that can copy wait.
    fn bring(&mut self, wanted: &Wanted, held: &Held, chosen: &[usize], standing: &mut Standing) {
        let gives = |at: &usize| self.view.places[*at].agent == Agent::Gives;
        let copies = |at: &usize| self.view.places[*at].agent != Agent::None;
        let coming = self.making(wanted).find(gives).or_else(|| held.fresh.first().copied());
        let first = coming.or_else(|| chosen.iter().copied().find(gives)).filter(|_| held.sources.is_empty());
        for at in chosen {
            match first {
                Some(first) if first != *at && copies(at) => {
                    let first = &self.view.places[first].id;
                    standing.why.get_or_insert_with(|| format!("it comes to {first} first, and is copied from there"));
                }
                _ => {
                    let server = self.view.places[*at].id.clone();
                    self.plan.actions.push(Action::Bring { name: wanted.name.clone(), server, size: held.size });
                }
            }
        }
    }

    /// The servers to which a model is on its way.
    fn making(&self, wanted: &Wanted) -> impl Iterator<Item = usize> {
        let making = self.view.making.get(wanted.name.model()).into_iter().flatten();
        making.filter_map(|making| self.places.get(&making.server).copied())
    }

    /// Wakes some of those that sleep. One that was woken a moment ago may be about to come; one that could not be woken hides
    /// no other.
    fn wake(&mut self, sleepers: &[usize], count: usize, standing: &mut Standing) {
        let mut left = count;
        let mut why = None;
        for at in sleepers {
            if left == 0 {
                break;
            }
            let server = self.view.places[*at].id.clone();
            let is_waking = self.view.waking.contains(&server);
            if let (false, Some(failed)) = (is_waking, self.view.rests.get(&Deed::Wake(server.clone()))) {
                why.get_or_insert_with(|| format!("server {server} sleeps: {failed}"));
                continue;
            }
            left -= 1;
            standing.why = Some(format!("server {server} sleeps, and is woken"));
            let action = Action::Wake { server };
            if !is_waking && !self.plan.actions.contains(&action) {
                self.plan.actions.push(action);
            }
        }
        if left > 0 && why.is_some() {
            standing.why = why;
        }
    }

    /// Why a server cannot be given a model now.
    fn refusal(&self, wanted: &Wanted, size: u64, at: usize) -> Option<String> {
        let place = &self.view.places[at];
        if let Some(why) = self.view.rests.get(&Deed::Bring(wanted.name.model().clone(), place.id.clone())) {
            return Some(why.clone());
        }
        let free = place.disk_free?.saturating_sub(self.promised[at]);
        let begun = if self.promised[at] > 0 { 0 } else { place.disk_begun };
        if free >= size.saturating_sub(begun).saturating_add(self.reserve) {
            return None;
        }
        let is_promised = if self.promised[at] > 0 { " behind what is on its way there" } else { "" };
        Some(format!(
            "the disk is too small: {} MiB are free{is_promised}, the model takes {} MiB, and {} MiB stay free ([pull] \
             margin-mib)",
            free / MIB,
            size.div_ceil(MIB),
            self.reserve / MIB
        ))
    }

    /// Has it in memory where it should stay there.
    fn memory(&mut self, wanted: &Wanted, held: &Held, found: &Found, standing: &mut Standing) {
        let here: Vec<usize> =
            found.held.iter().copied().filter(|at| self.view.places[*at].presence == Presence::Here).collect();
        let loaded: HashMap<usize, bool> = held.loaded.iter().copied().collect();
        let goal = match wanted.keep_loaded {
            KeepLoaded::No => return,
            KeepLoaded::All => here.len(),
            KeepLoaded::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
        };
        // Where it is loaded it stays; the others in the order that everybody finds.
        let mut order = self.in_order(wanted, here.iter().copied());
        order.sort_by_key(|at| !loaded.contains_key(at));
        standing.loaded = self.names(&order.iter().copied().filter(|at| loaded.contains_key(at)).collect::<Vec<_>>());
        let (mut kept, mut why) = (0, None);
        for at in order {
            if kept == goal {
                break;
            }
            let server = self.view.places[at].id.clone();
            let is_loaded = loaded.get(&at);
            let rest = self.view.rests.get(&Deed::Load(wanted.name.model().clone(), server.clone()));
            let is_loading = self.view.loading.contains(&(wanted.name.model().clone(), server.clone()));
            let is_there = is_loaded.is_some() || is_loading;
            if let (false, Some(rest)) = (is_there, rest) {
                why = Some(format!("it is not loaded on server {server}: {rest}"));
                continue;
            }
            kept += 1;
            if rest.is_none() && !is_loading && is_loaded != Some(&true) {
                let (embeds, again) = (held.embeds, is_loaded.is_some());
                self.plan.actions.push(Action::Load { name: wanted.name.clone(), server, embeds, again });
            }
        }
        let sleepers: Vec<usize> = found.away.iter().copied().filter(|at| self.view.places[*at].sleeps).collect();
        if kept < goal && wanted.keep_loaded != KeepLoaded::All && !sleepers.is_empty() {
            let sleepers = self.in_order(wanted, sleepers.into_iter());
            self.wake(&sleepers, goal - kept, standing);
        } else if kept < goal && standing.why.is_none() {
            standing.why = why.or_else(|| {
                let more =
                    format!("it should stay in memory on {goal} servers, and {} that have it answer", here.len());
                (wanted.keep_loaded != KeepLoaded::All).then_some(more)
            });
        }
    }

    /// Servers in the order in which they come into question for a model.
    fn in_order(&self, wanted: &Wanted, places: impl Iterator<Item = usize>) -> Vec<usize> {
        let score = |at: usize| {
            let place = &self.view.places[at];
            suits(wanted.name.model().as_str(), &place.id, place.weight)
        };
        let mut scored: Vec<(f64, usize)> = places.map(|at| (score(at), at)).collect();
        scored.sort_by(|one, other| other.0.total_cmp(&one.0));
        scored.into_iter().map(|(_, at)| at).collect()
    }

    fn names(&self, places: &[usize]) -> Vec<String> {
        places.iter().map(|at| self.view.places[*at].id.to_string()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn wanted(text: &str) -> Wanted {
        toml::from_str(text).unwrap_or_else(|error| panic!("{error}"))
    }

    fn id(server: &str) -> ServerId {
        ServerId::new(server)
    }

    fn model(name: &str) -> ModelName {
        ModelName::parse(name).unwrap()
    }

    fn place(name: &str) -> Place {
        Place {
            id: id(name),
            weight: NonZeroU32::MIN,
            presence: Presence::Here,
            is_known: true,
            sleeps: false,
            disk_free: Some(100 * GIB),
            disk_begun: 0,
            agent: Agent::Gives,
        }
    }

    fn away(name: &str, seconds: u64) -> Place {
        Place { presence: Presence::Away(Duration::from_secs(seconds)), ..place(name) }
    }

    /// `tiny`, of a gibibyte, on some of these.
    fn view(places: Vec<Place>, installed: &[usize]) -> View {
        let (installed, sources) = (installed.to_vec(), installed.to_vec());
        let held = Held { installed, sources, size: GIB, ..Held::default() };
        View { places, models: HashMap::from([(model("tiny"), held)]), ..View::default() }
    }

    fn planned(text: &str, view: &View) -> Plan {
        plan(&[(wanted(text), "file")], view, &Config::default(), GIB)
    }

    /// Where it would be brought.
    fn targets(plan: &Plan) -> Vec<String> {
        let of = |action: &Action| match action {
            Action::Bring { server, .. } => Some(server.to_string()),
            _ => None,
        };
        plan.actions.iter().filter_map(of).collect()
    }

    fn woken(plan: &Plan) -> Vec<String> {
        let of = |action: &Action| match action {
            Action::Wake { server } => Some(server.to_string()),
            _ => None,
        };
        plan.actions.iter().filter_map(of).collect()
    }

    fn why(plan: &Plan) -> &str {
        plan.standings[0].why.as_deref().unwrap_or_default()
    }

    const TWO: &str = "name = \"tiny\"\nreplicas = 2";

    #[test]
    fn what_is_as_it_is_wanted_is_left_alone() {
        let view = view(["a", "b", "c"].map(place).to_vec(), &[0, 2]);
        let plan = planned(TWO, &view);
        assert!(plan.actions.is_empty() && plan.standings[0].why.is_none());
        assert_eq!(plan.standings[0].held, ["a", "c"]);
        assert!(planned("name = \"tiny\"\nreplicas = 1", &view).actions.is_empty(), "one too many stays");
    }

    #[test]
    fn what_is_missing_is_brought_to_the_same_servers_by_everybody() {
        let names = ["a", "b", "c", "d", "e"];
        let forth = view(names.map(place).to_vec(), &[]);
        let mut back = names.map(place).to_vec();
        back.reverse();
        let others = |view: &mut View| {
            // Somebody has it who is not meant, so that there is somebody to copy from.
            view.models.get_mut(&model("tiny")).unwrap().sources = vec![99];
            targets(&planned(TWO, view))
        };
        let mut back = view(back, &[]);
        let mut forth = forth;
        let (one, other) = (others(&mut forth), others(&mut back));
        assert_eq!((one.len(), &one), (2, &other));
    }

    #[test]
    fn a_registry_is_asked_by_one_and_the_others_wait_for_it() {
        let mut view = view(["a", "b", "c"].map(place).to_vec(), &[]);
        let all = "name = \"tiny\"\nreplicas = 3";
        let first = targets(&planned(all, &view));
        assert_eq!(first.len(), 1);
        view.making.insert(model("tiny"), vec![Making { server: id(&first[0]), left: 0 }]);
        let waits = planned(all, &view);
        assert!(waits.actions.is_empty());
        assert_eq!(why(&waits), format!("it comes to {} first, and is copied from there", first[0]));
        view.making.clear();
        let at = view.places.iter().position(|place| place.id == id(&first[0])).unwrap();
        view.models.insert(model("tiny"), Held { installed: vec![at], fresh: vec![at], ..Held::default() });
        assert!(planned(all, &view).actions.is_empty(), "it is about to tell what it has");
        view.models.insert(model("tiny"), Held { installed: vec![at], sources: vec![at], ..Held::default() });
        assert_eq!(targets(&planned(all, &view)).len(), 2);
        assert_eq!(why(&planned(all, &view)), "");
    }

    #[test]
    fn who_cannot_copy_does_not_wait_and_for_who_gives_nothing_nobody_does() {
        let with = |agents: [Agent; 3]| {
            let places = ["a", "b", "c"].into_iter().zip(agents);
            let places = places.map(|(name, agent)| Place { agent, ..place(name) }).collect();
            let mut targets = targets(&planned("name = \"tiny\"\nreplicas = 3", &view(places, &[])));
            targets.sort();
            targets
        };
        assert_eq!(with([Agent::None, Agent::Gives, Agent::None]), ["a", "b", "c"]);
        assert_eq!(with([Agent::Takes, Agent::Gives, Agent::None]), ["b", "c"]);
        assert_eq!(with([Agent::Takes, Agent::Takes, Agent::None]), ["a", "b", "c"]);
    }

    #[test]
    fn all_are_all_that_are_meant_and_there() {
        let places = vec![place("gpu1"), place("gpu2"), place("attic"), away("gpu3", 9999)];
        let plan = planned("name = \"tiny\"\nreplicas = \"all\"\nservers = [\"gpu*\"]", &view(places, &[0]));
        assert_eq!(targets(&plan), ["gpu2"]);
        assert_eq!((plan.standings[0].wanted, plan.standings[0].why.as_deref()), (2, None));
    }

    #[test]
    fn a_moment_away_costs_no_copy_and_longer_does() {
        let with = |seconds| planned(TWO, &view(vec![place("a"), away("b", seconds), place("c")], &[0, 1]));
        let soon = with(299);
        assert!(soon.actions.is_empty());
        assert_eq!((&soon.standings[0].held[..], &soon.standings[0].away[..]), (&["a".into()][..], &["b".into()][..]));
        assert_eq!(targets(&with(300)), ["c"]);
    }

    #[test]
    fn one_that_is_drained_keeps_what_it_has_and_gets_nothing() {
        let drained = Place { presence: Presence::Draining, ..place("b") };
        let has = planned(TWO, &view(vec![place("a"), drained.clone(), place("c")], &[0, 1]));
        assert!(has.actions.is_empty());
        let lacks = planned(TWO, &view(vec![place("a"), drained], &[0]));
        assert!(lacks.actions.is_empty());
        assert!(why(&lacks).contains("one more is wanted, and no other server"), "{}", why(&lacks));
    }

    #[test]
    fn who_has_not_told_yet_may_have_it() {
        let unheard = Place { is_known: false, ..away("b", 2) };
        let early = planned(TWO, &view(vec![place("a"), unheard, place("c")], &[0]));
        assert!(early.actions.is_empty());
        assert!(why(&early).contains("may be on b"), "{}", why(&early));
        let silent = Place { is_known: false, ..away("b", 400) };
        assert_eq!(targets(&planned(TWO, &view(vec![place("a"), silent, place("c")], &[0]))), ["c"]);
    }

    #[test]
    fn a_disk_that_is_too_small_is_refused_with_the_reason() {
        let small = |bytes| Place { disk_free: Some(bytes), ..place("b") };
        let refused = planned(TWO, &view(vec![place("a"), small(2 * GIB - 1)], &[0]));
        assert!(refused.actions.is_empty());
        let said = "b: the disk is too small: 2047 MiB are free, the model takes 1024 MiB, and 1024 MiB stay free";
        assert!(why(&refused).contains(said), "{}", why(&refused));
        assert_eq!(refused.standings[0].refused.len(), 1);
        assert_eq!(targets(&planned(TWO, &view(vec![place("a"), small(2 * GIB)], &[0]))), ["b"]);
        let begun = Place { disk_begun: 1, ..small(2 * GIB - 1) };
        assert_eq!(targets(&planned(TWO, &view(vec![place("a"), begun], &[0]))), ["b"], "it may go on there");
        let silent = Place { disk_free: None, ..place("b") };
        assert_eq!(targets(&planned(TWO, &view(vec![place("a"), silent], &[0]))), ["b"], "who tells nothing is asked");
    }

    #[test]
    fn another_model_under_the_name_is_no_replica_and_is_left_alone() {
        let mut spread = view(["a", "b", "c"].map(place).to_vec(), &[0]);
        let held = spread.models.get_mut(&model("tiny")).unwrap();
        (held.differs, held.digest) = (vec![1], "sha256:1".to_owned());
        let plan = planned(TWO, &spread);
        assert_eq!((targets(&plan), &plan.standings[0].held[..]), (vec!["c".to_owned()], &["a".to_owned()][..]));
        assert_eq!(
            (&plan.standings[0].differs[..], plan.standings[0].digest.as_deref()),
            (&["b".to_owned()][..], Some("sha256:1"))
        );
        let all = planned("name = \"tiny\"\nreplicas = 3", &spread);
        assert_eq!(targets(&all), ["c"]);
        assert!(why(&all).contains("another model has the name on b"), "{}", why(&all));
    }

    #[test]
    fn room_is_given_away_once() {
        let b = Place { disk_free: Some(3 * GIB - 1), ..place("b") };
        let mut view = view(vec![place("a"), b], &[0]);
        view.models.insert(model("other"), Held { installed: vec![0], size: GIB, ..Held::default() });
        let both = [(wanted(TWO), "file"), (wanted("name = \"other\"\nreplicas = 2"), "file")];
        let one = plan(&both, &view, &Config::default(), GIB);
        assert_eq!(targets(&one), ["b"]);
        assert!(one.standings[1].why.as_deref().unwrap().contains("behind what is on its way"));
        view.making.insert(model("third"), vec![Making { server: id("b"), left: GIB }]);
        let none = plan(&both[..1], &view, &Config::default(), GIB + MIB);
        assert!(none.actions.is_empty(), "what others bring takes room, too");
    }

    #[test]
    fn what_is_on_its_way_counts() {
        let mut view = view(["a", "b", "c"].map(place).to_vec(), &[0]);
        view.making.insert(model("tiny"), vec![Making { server: id("b"), left: 5 }]);
        let plan = planned(TWO, &view);
        assert!(plan.actions.is_empty());
        assert_eq!(plan.standings[0].making, ["b"]);
    }

    #[test]
    fn where_it_has_failed_another_server_is_tried_and_in_the_end_none() {
        let mut view = view(["a", "b", "c"].map(place).to_vec(), &[0]);
        let first = targets(&planned(TWO, &view)).remove(0);
        view.rests.insert(Deed::Bring(model("tiny"), id(&first)), "it failed: no route".to_owned());
        let second = targets(&planned(TWO, &view)).remove(0);
        assert_ne!(first, second);
        view.rests.insert(Deed::BringAnywhere(model("tiny")), "it failed: no such model".to_owned());
        let none = planned(TWO, &view);
        assert_eq!((none.actions.len(), why(&none)), (0, "it failed: no such model"));
    }

    #[test]
    fn what_somebody_has_deleted_does_not_come_back() {
        let mut view = view(["a", "b"].map(place).to_vec(), &[]);
        view.gone.insert(model("tiny"));
        let plan = planned(TWO, &view);
        assert!(plan.actions.is_empty() && why(&plan).contains("it was deleted"), "{}", why(&plan));
        let unwanted =
            planned("name = \"tiny\"\nreplicas = 0\nkeep-loaded = true", &super::tests::view(vec![place("a")], &[]));
        assert!(unwanted.actions.is_empty() && unwanted.standings[0].why.is_none());
    }

    #[test]
    fn one_that_sleeps_keeps_what_it_has_and_is_woken_only_where_nobody_else_fits() {
        let sleeper = |name| Place { sleeps: true, ..away(name, 99_999) };
        let holds = planned(TWO, &view(vec![place("a"), sleeper("b"), place("c")], &[0, 1]));
        assert!(holds.actions.is_empty());
        let others = planned(TWO, &view(vec![place("a"), sleeper("b"), place("c")], &[0]));
        assert_eq!((targets(&others), woken(&others)), (vec!["c".to_owned()], vec![]));
        let alone = planned(TWO, &view(vec![place("a"), sleeper("b")], &[0]));
        assert_eq!((targets(&alone), woken(&alone)), (vec![], vec!["b".to_owned()]));
        assert_eq!(why(&alone), "server b sleeps, and is woken");
    }

    #[test]
    fn a_sleeper_that_cannot_be_woken_hides_no_other_and_one_that_is_about_to_come_is_waited_for() {
        let sleeper = |name| Place { sleeps: true, ..away(name, 99_999) };
        let mut view = view(vec![place("a"), sleeper("b"), sleeper("c")], &[0]);
        let first = woken(&planned(TWO, &view)).remove(0);
        view.waking.insert(id(&first));
        view.rests.insert(Deed::Wake(id(&first)), "it was woken".to_owned());
        let waits = planned(TWO, &view);
        assert!(waits.actions.is_empty());
        assert_eq!(why(&waits), format!("server {first} sleeps, and is woken"));
        view.waking.clear();
        view.rests.insert(Deed::Wake(id(&first)), "waking it failed: no such program".to_owned());
        let second = woken(&planned(TWO, &view)).remove(0);
        assert_ne!(first, second);
        view.rests.insert(Deed::Wake(id(&second)), "waking it failed: no such program".to_owned());
        let none = planned(TWO, &view);
        assert!(none.actions.is_empty() && why(&none).contains("waking it failed"), "{}", why(&none));
    }

    /// What would be loaded, and what told to stay.
    fn loads(plan: &Plan) -> Vec<(String, bool)> {
        let of = |action: &Action| match action {
            Action::Load { server, again, .. } => Some((server.to_string(), *again)),
            _ => None,
        };
        plan.actions.iter().filter_map(of).collect()
    }

    #[test]
    fn what_should_stay_in_memory_is_loaded_and_told_to_stay() {
        let mut view = view(["a", "b", "c"].map(place).to_vec(), &[0, 1, 2]);
        let all = "name = \"tiny\"\nreplicas = 3\nkeep-loaded = true";
        assert_eq!(loads(&planned(all, &view)).len(), 3);
        view.models.get_mut(&model("tiny")).unwrap().loaded = vec![(0, true), (1, false)];
        view.loading.insert((model("tiny"), id("c")));
        assert_eq!(loads(&planned(all, &view)), [("b".to_owned(), true)]);
        view.loading.clear();
        let one = "name = \"tiny\"\nreplicas = 3\nkeep-loaded = 1";
        view.models.get_mut(&model("tiny")).unwrap().loaded = vec![(2, true)];
        let plan = planned(one, &view);
        assert!(loads(&plan).is_empty(), "where it is loaded it stays");
        assert_eq!(plan.standings[0].loaded, ["c"]);
    }

    #[test]
    fn where_it_cannot_be_loaded_another_server_loads_it() {
        let mut view = view(["a", "b"].map(place).to_vec(), &[0, 1]);
        let one = "name = \"tiny\"\nreplicas = 2\nkeep-loaded = 1";
        let (first, _) = loads(&planned(one, &view)).remove(0);
        view.rests.insert(Deed::Load(model("tiny"), id(&first)), "out of memory".to_owned());
        let (second, _) = loads(&planned(one, &view)).remove(0);
        assert_ne!(first, second);
        view.rests.insert(Deed::Load(model("tiny"), id(&second)), "out of memory".to_owned());
        let none = planned(one, &view);
        assert!(loads(&none).is_empty() && why(&none).contains("out of memory"), "{}", why(&none));
    }

    #[test]
    fn servers_that_nobody_knows_are_said_to_be() {
        let plan = planned("name = \"tiny\"\nservers = [\"gpu*\"]", &view(vec![place("a")], &[0]));
        assert!(plan.actions.is_empty() && why(&plan).contains("is a member"), "{}", why(&plan));
    }
}
