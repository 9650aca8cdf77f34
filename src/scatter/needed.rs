//! Who must be asked for a list of all servers, so that it is whole.
//!
//! Few servers are all asked: what they say at this moment counts. Of many, nearly all say what others say, and to ask each of
//! them again and again would cost everybody more than the list is worth. So those are asked who, by what is known, have
//! together everything that there is. Agents tell of changes at once. Bare servers tell nothing by themselves: those who watch
//! them look at all of them before a list, if nobody has in the last two seconds. So what has come to one of them is in every list
//! that is asked two seconds later, if it answers within a quarter of a second; else in the next one.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use olol_middleware::cluster::{Bits, Held, State};
use olol_middleware::{Cluster, ModelName, Route, Server, Snapshot};
use rapidhash::{RapidHashMap, RapidHashSet};
use tokio::time::Instant;

use crate::status::in_order;

/// So many servers are all asked.
const FEW: usize = 64;
/// Time between two looks at all bare servers that lists call for.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// The longest that a list waits for such a look.
const LOOK_LIMIT: Duration = Duration::from_millis(250);

/// Knows who must be asked.
#[derive(Debug, Default)]
pub(super) struct Needed {
    /// Of the last snapshot that somebody wanted a list of.
    cover: ArcSwapOption<Cover>,
    looked: Mutex<Option<Instant>>,
}

/// Servers that have together every model that there is.
#[derive(Debug)]
pub(super) struct Cover {
    of: Weak<Snapshot>,
    servers: Bits,
    digests: RapidHashMap<ModelName, String>,
}

impl Cover {
    /// The digest that most servers have under a name.
    pub(super) fn digest(&self, name: &ModelName) -> Option<&str> {
        self.digests.get(name).map(String::as_str)
    }

    fn of(snapshot: &Arc<Snapshot>, left_out: &Bits) -> Self {
        let servers = || snapshot.servers.iter().filter(|server| !left_out.contains(server.index));
        let mut variants = Variants::default();
        for server in servers() {
            for model in server.report.models.iter() {
                variants.count(model);
            }
        }
        let mut wanted = variants.best();
        let digests = wanted.iter().map(|at| (variants.list[*at].name.clone(), variants.list[*at].digest.to_owned()));
        let digests = digests.collect();
        // Who takes calls comes first, then who has most.
        let mut order: Vec<&Arc<Server>> = servers().collect();
        order.sort_by_key(|server| (!server.is_usable(), std::cmp::Reverse(server.report.models.len())));
        let mut servers = Bits::default();
        for server in order {
            if wanted.is_empty() {
                break;
            }
            let before = wanted.len();
            for model in server.report.models.iter() {
                if let Some(at) = variants.at(model) {
                    wanted.remove(&at);
                }
            }
            if wanted.len() < before {
                servers.insert(server.index);
            }
        }
        Self { of: Arc::downgrade(snapshot), servers, digests }
    }
}

/// What servers have under the names, by name and digest.
#[derive(Default)]
struct Variants<'a> {
    list: Vec<Variant<'a>>,
    places: RapidHashMap<(&'a ModelName, &'a str), usize>,
    /// The same by what is shared of models.
    seen: RapidHashMap<*const olol_middleware::cluster::Model, usize>,
}

struct Variant<'a> {
    name: &'a ModelName,
    digest: &'a str,
    count: usize,
    /// When it was changed last, by those who have it.
    changed: &'a str,
}

impl<'a> Variant<'a> {
    /// What makes it the one that is meant by its name: the same as with [`Known::usual`](olol_middleware::cluster::Known), and
    /// the same whoever tells of it first.
    fn worth(&self) -> (bool, usize, &'a str, &'a str) {
        (!self.digest.is_empty(), self.count, self.changed, self.digest)
    }
}

impl<'a> Variants<'a> {
    fn count(&mut self, model: &'a Held) {
        let at = self.at(model).or_else(|| {
            let name = model.canonical()?;
            let next = self.list.len();
            let at = *self.places.entry((name, &model.digest)).or_insert(next);
            if at == next {
                self.list.push(Variant { name, digest: &model.digest, count: 0, changed: "" });
            }
            self.seen.insert(&raw const **model, at);
            Some(at)
        });
        let Some(variant) = at.and_then(|at| self.list.get_mut(at)) else { return };
        variant.count += 1;
        variant.changed = variant.changed.max(&*model.modified_at);
    }

    fn at(&self, model: &Held) -> Option<usize> {
        self.seen.get(&(&raw const **model)).copied()
    }

    /// Of each name the one that most servers have; of equals the newest.
    fn best(&self) -> RapidHashSet<usize> {
        let mut best: RapidHashMap<&ModelName, usize> = RapidHashMap::default();
        for (at, variant) in self.list.iter().enumerate() {
            let known = best.entry(variant.name).or_insert(at);
            if variant.worth() > self.list[*known].worth() {
                *known = at;
            }
        }
        best.into_values().collect()
    }
}

impl Needed {
    /// Those who must be asked beside those who are left out: who cannot be reached, was silent, or has answered already. For
    /// lists of models of many servers also what they are known to have.
    pub(super) fn of(&self, route: Route, snapshot: &Arc<Snapshot>, left_out: &Bits) -> (Bits, Option<Arc<Cover>>) {
        let servers = || snapshot.servers.iter().filter(|server| !left_out.contains(server.index));
        let mut asked = Bits::default();
        if snapshot.servers.len() <= FEW {
            servers().for_each(|server| asked.insert(server.index));
            return (asked, None);
        }
        let mut cover = None;
        match route {
            Route::Version => {
                let versions = servers().filter(|server| server.state == State::Up);
                let lowest = versions.min_by_key(|server| in_order(&server.report.version));
                asked.extend(lowest);
            }
            Route::Ps => asked.extend(servers().filter(|server| !server.report.loaded.is_empty())),
            _ => {
                let known = self.cover(snapshot, left_out);
                asked.add(&known.servers);
                cover = Some(known);
            }
        }
        // Of whom nothing is known, anything can be heard.
        asked.extend(servers().filter(|server| server.state == State::Unknown));
        if asked.is_empty() {
            asked.extend(servers().next());
        }
        (asked, cover)
    }

    fn cover(&self, snapshot: &Arc<Snapshot>, left_out: &Bits) -> Arc<Cover> {
        let known = self.cover.load_full().filter(|cover| std::ptr::eq(cover.of.as_ptr(), Arc::as_ptr(snapshot)));
        if let Some(known) = known.filter(|cover| !cover.servers.iter().any(|server| left_out.contains(server))) {
            return known;
        }
        let cover = Arc::new(Cover::of(snapshot, left_out));
        self.cover.store(Some(cover.clone()));
        cover
    }

    /// Has bare servers looked at, if there are many and it is some time since. Returns whether they were.
    pub(super) async fn look(&self, cluster: &Cluster, snapshot: &Snapshot) -> bool {
        let is_bare = |server: &Server| server.vitals.load().is_none();
        if snapshot.servers.len() <= FEW || !snapshot.servers.iter().any(|server| is_bare(server)) || !self.is_due() {
            return false;
        }
        cluster.refresh_those(LOOK_LIMIT, is_bare).await;
        true
    }

    /// Whether it is time to look, and nobody else does.
    fn is_due(&self) -> bool {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY);
        if is_due {
            *looked = Some(Instant::now());
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use olol_middleware::ServerId;
    use olol_middleware::cluster::{Loaded, Member, Model, Report, Source};

    use super::*;

    /// So many servers that are up, each with what is said of it: models as `name=digest`.
    async fn cluster(count: usize, models: impl Fn(usize) -> Vec<String>) -> Arc<Cluster> {
        let member =
            |at: usize| Member { id: ServerId::new(&at.to_string()), weight: NonZeroU32::MIN, source: Source::Static };
        let cluster = Cluster::new((0..count).map(member).collect());
        for at in 0..count {
            let models = models(at).into_iter().map(|text| {
                let (name, digest) = text.split_once('=').unwrap();
                Model { name: name.to_owned(), digest: digest.to_owned(), ..Model::default() }
            });
            let loaded = (at == 7).then(|| Loaded { name: "a".to_owned(), ..Loaded::default() });
            let loaded = loaded.into_iter().collect();
            let version = if at == 9 { "0.9.1" } else { "0.33.0" }.to_owned();
            cluster.report(at, Report { version, models: models.collect(), loaded });
        }
        cluster.refresh(Duration::ZERO).await;
        cluster
    }

    fn asked(needed: &Needed, route: Route, snapshot: &Arc<Snapshot>, left_out: &[usize]) -> Vec<usize> {
        let mut bits = Bits::default();
        for index in left_out {
            bits.insert(*index);
        }
        needed.of(route, snapshot, &bits).0.iter().collect()
    }

    #[tokio::test(start_paused = true)]
    async fn few_servers_are_all_asked() {
        let cluster = cluster(3, |_| vec!["a=1".to_owned()]).await;
        let needed = Needed::default();
        for route in [Route::Tags, Route::Ps, Route::Version] {
            assert_eq!(asked(&needed, route, &cluster.snapshot(), &[1]), [0, 2]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_only_those_are_asked_who_have_together_what_there_is() {
        let models = |at: usize| match at {
            3 => vec!["a=1".to_owned(), "b=1".to_owned(), "c=1".to_owned()],
            5 => vec!["rare=1".to_owned()],
            _ => vec!["A:latest=2".to_owned()],
        };
        let cluster = cluster(100, models).await;
        let snapshot = cluster.snapshot();
        let needed = Needed::default();
        // Server 0 has what most have under the name of `a`.
        assert_eq!(asked(&needed, Route::Tags, &snapshot, &[]), [0, 3, 5]);
        assert_eq!(asked(&needed, Route::V1Models, &snapshot, &[0]), [1, 3, 5]);
        let (_, cover) = needed.of(Route::Tags, &snapshot, &Bits::default());
        assert_eq!(cover.unwrap().digest(&ModelName::parse("a").unwrap()), Some("2"));
        assert_eq!(asked(&needed, Route::Ps, &snapshot, &[]), [7]);
        assert_eq!(asked(&needed, Route::Version, &snapshot, &[]), [9]);
        cluster.join(vec![Member { id: ServerId::new("new"), weight: NonZeroU32::MIN, source: Source::Static }]);
        assert_eq!(
            asked(&needed, Route::Ps, &cluster.snapshot(), &[]),
            [7, 100],
            "who has not spoken yet may have any"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn of_as_many_the_same_digest_is_meant_whoever_comes_first() {
        for turned in [0, 1] {
            let cluster = cluster(100, |at| vec![format!("a={}", (at + turned) % 2 + 1)]).await;
            let snapshot = cluster.snapshot();
            let (_, cover) = Needed::default().of(Route::Tags, &snapshot, &Bits::default());
            let name = ModelName::parse("a").unwrap();
            assert_eq!(cover.unwrap().digest(&name), Some("2"));
            assert_eq!(
                snapshot.known(&name).and_then(|known| known.usual()).map(olol_middleware::cluster::Variant::digest),
                Some("2")
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn before_a_list_of_many_the_bare_ones_are_looked_at_and_waited_for() {
        let cluster = cluster(100, |_| vec!["a=1".to_owned()]).await;
        let needed = Needed::default();
        let looking = {
            let cluster = cluster.clone();
            tokio::spawn(async move {
                for at in 0..100 {
                    cluster.news_wanted(at).await;
                    let round = cluster.round_begins(at);
                    if at == 65 {
                        let rare = Model { name: "rare".to_owned(), digest: "1".to_owned(), ..Model::default() };
                        cluster.report(at, Report { models: vec![rare], ..Report::default() });
                    }
                    cluster.round_ends(at, round);
                }
            })
        };
        assert!(needed.look(&cluster, &cluster.snapshot()).await);
        assert_eq!(asked(&needed, Route::Tags, &cluster.snapshot(), &[]), [0, 65], "what has come there is known");
        looking.await.unwrap();
        assert!(!needed.look(&cluster, &cluster.snapshot()).await, "not again at once");
        tokio::time::advance(LOOK_EVERY).await;
        let begun = Instant::now();
        assert!(needed.look(&cluster, &cluster.snapshot()).await);
        assert_eq!(begun.elapsed(), LOOK_LIMIT, "who is silent is not waited for longer");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_nothing_is_as_good_as_any_other() {
        let cluster = cluster(100, |_| Vec::new()).await;
        let snapshot = cluster.snapshot();
        assert_eq!(asked(&Needed::default(), Route::Tags, &snapshot, &[]), [0]);
        assert_eq!(asked(&Needed::default(), Route::Ps, &snapshot, &[7]), [0]);
    }
}
