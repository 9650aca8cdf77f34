//! What the servers say, gathered model by model: who has it, who has it in memory, and which names share runners.
//!
//! Ollama keeps a runner by the file of the weights and not by the name (`server/sched.go`, `schedulerModelKey`), and lists
//! it under the name that loaded it. So tags that differ in their template or their parameters alone are in memory
//! together, and their calls take the same slots.

use std::collections::HashMap;
use std::sync::Arc;

use rapidhash::RapidHashMap;
use smallvec::SmallVec;

use super::{Bits, Held, Loaded, Make, Server, Servers, Variant};
use crate::instruments::ModelMeters;
use crate::names::ModelName;
use crate::place::LoadOptions;
use crate::runner::Runners;

/// Everything that the servers say of models.
#[derive(Default)]
pub(super) struct Found<'a> {
    numbers: RapidHashMap<ModelName, usize>,
    /// Where that of which a server says the same is among the holdings, and among the makes and the variants there.
    seen: RapidHashMap<usize, (usize, usize, usize)>,
    /// By number, in the order in which they were met.
    holdings: Vec<Holding<'a>>,
}

/// One model.
struct Holding<'a> {
    name: ModelName,
    installed: Bits,
    loaded: Bits,
    size: u64,
    makes: SmallVec<[Make; 1]>,
    variants: SmallVec<[Variant; 1]>,
    defaults: Option<Arc<LoadOptions>>,
    /// What servers say of its runner in their memory.
    memory: Vec<(usize, &'a Loaded)>,
    /// Another model with the same weights; itself, if it is the first of them.
    like: usize,
}

impl Holding<'_> {
    /// A server says what it is. Returns the place among the makes.
    fn is_made(&mut self, model: &Held) -> usize {
        let known = self.makes.iter().position(|make| make.is_of(model));
        known.unwrap_or_else(|| {
            self.makes.push(Make { servers: Bits::default(), held: model.clone() });
            self.makes.len() - 1
        })
    }

    /// A server has it with some digest. Returns the place among the variants.
    fn is_variant(&mut self, model: &Held) -> usize {
        let known = self.variants.iter().position(|variant| variant.held.digest == model.digest);
        known.unwrap_or_else(|| {
            self.variants.push(Variant { servers: Bits::default(), held: model.clone() });
            self.variants.len() - 1
        })
    }
}

/// A runner on a server, and the load options of the model that it is listed under.
type InMemory<'a> = (usize, &'a Loaded, Option<Arc<LoadOptions>>);

/// What is known of a model after all servers were heard.
pub(super) struct Finding {
    pub(super) name: ModelName,
    pub(super) installed: Bits,
    pub(super) loaded: Bits,
    pub(super) size: u64,
    pub(super) makes: SmallVec<[Make; 1]>,
    pub(super) variants: SmallVec<[Variant; 1]>,
    pub(super) defaults: Option<Arc<LoadOptions>>,
    pub(super) runners: Arc<Runners>,
}

/// Metrics and runners of models, by name, as they were before.
pub(super) type Before = HashMap<ModelName, (Arc<ModelMeters>, Arc<Runners>)>;

impl<'a> Found<'a> {
    /// Hears every server.
    pub(super) fn on(servers: &'a Servers) -> Self {
        let mut found = Self::default();
        let mut families = RapidHashMap::default();
        for server in servers {
            found.hear(server, &mut families);
        }
        found
    }

    /// Hears one server. `families` knows the first model of each identity.
    fn hear(&mut self, server: &'a Server, families: &mut RapidHashMap<&'a str, usize>) {
        let mut here: Vec<(usize, &Held)> = Vec::with_capacity(server.report.models.len());
        for model in server.report.models.iter() {
            let Some((number, make, variant)) = self.place(model, families) else { continue };
            let holding = &mut self.holdings[number];
            holding.installed.insert(server.index);
            holding.makes[make].servers.insert(server.index);
            let variant = &mut holding.variants[variant];
            variant.servers.insert(server.index);
            if variant.held.modified_at < model.modified_at {
                variant.held = model.clone();
            }
            here.push((number, model));
        }
        for loaded in &server.report.loaded {
            // A runner may outlive the model on the disk; only what can be asked for by name counts.
            let number = ModelName::parse(&loaded.name).and_then(|name| self.numbers.get(&name).copied());
            let Some(&(number, model)) = here.iter().find(|(other, _)| Some(*other) == number) else { continue };
            self.holdings[number].memory.push((server.index, loaded));
            let identity = model.identity();
            for (other, model) in &here {
                if *other == number || identity.is_some() && model.identity() == identity {
                    self.holdings[*other].loaded.insert(server.index);
                }
            }
        }
    }

    /// Where a model is among the holdings and their makes. Of what many servers say alike, all is found out once.
    fn place(&mut self, model: &'a Held, families: &mut RapidHashMap<&'a str, usize>) -> Option<(usize, usize, usize)> {
        if let Some(place) = self.seen.get(&model.number()) {
            return Some(*place);
        }
        let number = self.number(model.canonical()?.clone());
        let holding = &mut self.holdings[number];
        holding.size = holding.size.max(model.size);
        let make = holding.is_made(model);
        let variant = holding.is_variant(model);
        if holding.defaults.is_none() && !model.parameters.is_empty() {
            holding.defaults = Some(Arc::new(LoadOptions::in_object(&model.parameters)));
        }
        if let Some(identity) = model.identity() {
            let first = *families.entry(identity).or_insert(number);
            self.unite(first, number);
        }
        self.seen.insert(model.number(), (number, make, variant));
        Some((number, make, variant))
    }

    fn number(&mut self, name: ModelName) -> usize {
        let next = self.holdings.len();
        let number = *self.numbers.entry(name.clone()).or_insert(next);
        if number == next {
            self.holdings.push(Holding {
                name,
                installed: Bits::default(),
                loaded: Bits::default(),
                size: 0,
                makes: SmallVec::new(),
                variants: SmallVec::new(),
                defaults: None,
                memory: Vec::new(),
                like: next,
            });
        }
        number
    }

    /// The first model of those with the same weights.
    fn first_of(&self, mut number: usize) -> usize {
        while self.holdings[number].like != number {
            number = self.holdings[number].like;
        }
        number
    }

    fn unite(&mut self, one: usize, other: usize) {
        let (one, other) = (self.first_of(one), self.first_of(other));
        self.holdings[one.max(other)].like = one.min(other);
    }

    /// Whether any server has a model.
    pub(super) fn has(&self, name: &ModelName) -> bool {
        self.numbers.contains_key(name)
    }

    /// Gives each model its runners, those of `before` where there are some, and tells them what is in memory. Runners
    /// that nobody has any more are returned too.
    pub(super) fn settle(self, before: &Before, servers: &Servers) -> (Vec<Finding>, Vec<Arc<Runners>>) {
        let firsts: Vec<usize> = (0..self.holdings.len()).map(|number| self.first_of(number)).collect();
        let mut chosen: Vec<Option<Arc<Runners>>> = vec![None; firsts.len()];
        // Of models that part, one keeps the runners.
        let mut owners: HashMap<*const Runners, usize> = HashMap::new();
        let mut left = Vec::new();
        for (holding, first) in self.holdings.iter().zip(&firsts) {
            let Some((_, runners)) = before.get(&holding.name) else { continue };
            let owner = *owners.entry(Arc::as_ptr(runners)).or_insert(*first);
            match &chosen[*first] {
                None if owner == *first => chosen[*first] = Some(runners.clone()),
                Some(kept) if Arc::ptr_eq(kept, runners) => {}
                _ => left.push(runners.clone()),
            }
        }
        let mut memory: Vec<Vec<InMemory<'_>>> = vec![Vec::new(); firsts.len()];
        let mut findings = Vec::with_capacity(firsts.len());
        for (holding, first) in self.holdings.into_iter().zip(&firsts) {
            let runners = chosen[*first].get_or_insert_default().clone();
            let defaults = &holding.defaults;
            memory[*first].extend(holding.memory.into_iter().map(|(at, loaded)| (at, loaded, defaults.clone())));
            let Holding { name, installed, loaded, size, makes, variants, defaults, .. } = holding;
            findings.push(Finding { name, installed, loaded, size, makes, variants, defaults, runners });
        }
        for (runners, memory) in chosen.iter().zip(&memory) {
            let Some(runners) = runners else { continue };
            for (server, loaded, _) in memory {
                if loaded.slots > 0 {
                    runners.at(&servers[*server]).reported(loaded.slots);
                }
            }
            for runner in runners.all().iter() {
                let loaded = memory.iter().find(|(server, ..)| *server == runner.server);
                runner.told(loaded.map(|(_, loaded, named)| (loaded.context_length, named.as_deref())));
            }
        }
        (findings, left)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Cluster, Known, Member, Model, Report};
    use super::*;
    use crate::ServerId;
    use crate::slots::Lease;

    /// A model that is known by what it is made of: `name=weights`.
    fn model(text: &str) -> Model {
        let (name, weights) = text.split_once('=').unwrap();
        let [name, weights] = [name, weights].map(str::to_owned);
        Model { digest: format!("manifest of {name}"), name, weights, ..Model::default() }
    }

    fn report(models: &[&str], loaded: &[&str]) -> Report {
        let loaded = loaded.iter().map(|name| Loaded { name: (*name).to_owned(), slots: 3, ..Loaded::default() });
        let models = models.iter().map(|text| model(text)).collect();
        Report { models, loaded: loaded.collect(), ..Report::default() }
    }

    fn cluster(reports: &[Report]) -> Arc<Cluster> {
        let members = (0..reports.len()).map(|at| Member {
            id: ServerId::new(&at.to_string()),
            weight: std::num::NonZeroU32::MIN,
            source: crate::cluster::Source::Static,
        });
        let cluster = Cluster::new(members.collect());
        for (at, report) in reports.iter().enumerate() {
            cluster.report(at, report.clone());
        }
        cluster
    }

    async fn known(cluster: &Arc<Cluster>, name: &str) -> Arc<Known> {
        cluster.catch_up().await;
        cluster.snapshot().known(&ModelName::parse(name).unwrap()).unwrap().clone()
    }

    #[tokio::test(start_paused = true)]
    async fn names_of_the_same_weights_share_runners_and_are_in_memory_together() {
        let models = ["plain=w", "templated=w", "other=v"];
        let cluster = cluster(&[report(&models, &["plain"]), report(&models, &[])]);
        let (plain, templated, other) =
            (known(&cluster, "plain").await, known(&cluster, "templated").await, known(&cluster, "other").await);
        assert!(Arc::ptr_eq(&plain.runners, &templated.runners) && !Arc::ptr_eq(&plain.runners, &other.runners));
        assert_eq!(templated.loaded.iter().collect::<Vec<_>>(), [0]);
        assert!(other.loaded.is_empty());
        let server = cluster.snapshot().servers[0].clone();
        let runner = templated.runners.at(&server);
        assert_eq!(runner.slots(), 3);
        let slots: Vec<_> = (0..3).map(|_| Lease::take(&plain.runners.at(&server)).unwrap()).collect();
        assert!(Lease::take(&runner).is_none(), "the other name's calls have taken them");
        drop(slots);
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_digests_that_of_most_servers_is_meant_and_of_equals_the_newest() {
        let said = |digest: &str, modified_at: &str| {
            let [digest, modified_at] = [digest, modified_at].map(str::to_owned);
            Report { models: vec![Model { digest, modified_at, ..model("tiny=w") }], ..Report::default() }
        };
        let cluster = cluster(&[said("old", "2026-01-01"), said("old", "2026-01-02"), said("new", "2026-02-01")]);
        let tiny = known(&cluster, "tiny").await;
        assert_eq!(tiny.usual().map(Variant::digest), Some("old"), "most have it");
        let differs = tiny.variants.iter().find(|variant| variant.digest() == "new").unwrap();
        assert_eq!(differs.servers.iter().collect::<Vec<_>>(), [2]);
        tokio::time::advance(Duration::from_secs(1)).await;
        cluster.report(0, said("new", "2026-01-01"));
        cluster.report(1, Report::default());
        assert_eq!(known(&cluster, "tiny").await.usual().map(Variant::digest), Some("new"));
        cluster.report(1, said("old", "2026-01-02"));
        cluster.report(0, Report::default());
        assert_eq!(known(&cluster, "tiny").await.usual().map(Variant::digest), Some("new"), "one each");
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_name_with_other_weights_elsewhere_is_not_in_memory_there() {
        let cluster = cluster(&[report(&["a=w", "b=v"], &["a"]), report(&["a=v", "b=v"], &["b"])]);
        let (a, b) = (known(&cluster, "a").await, known(&cluster, "b").await);
        let loaded = |known: &Known| known.loaded.iter().collect::<Vec<_>>();
        assert_eq!((loaded(&a), loaded(&b)), (vec![0, 1], vec![1]));
    }

    #[tokio::test(start_paused = true)]
    async fn runners_outlive_what_is_learnt_of_their_names() {
        let apart = report(&["a=w", "b=v"], &["a", "b"]);
        let cluster = cluster(std::slice::from_ref(&apart));
        let (a, b) = (known(&cluster, "a").await, known(&cluster, "b").await);
        assert!(!Arc::ptr_eq(&a.runners, &b.runners));
        tokio::time::advance(Duration::from_secs(1)).await;
        cluster.report(0, report(&["a=w", "b=w", "c=u"], &["a"]));
        let together = known(&cluster, "b").await;
        assert!(Arc::ptr_eq(&together.runners, &a.runners), "those of the first name are kept");
        tokio::time::advance(Duration::from_secs(1)).await;
        cluster.report(0, apart);
        let (first, second) = (known(&cluster, "a").await, known(&cluster, "b").await);
        assert!(Arc::ptr_eq(&first.runners, &a.runners) && !Arc::ptr_eq(&second.runners, &a.runners));
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_names_load_options_says_so() {
        let mut wide = report(&["wide=w", "plain=w"], &[]);
        wide.models[0].parameters = r#"{"num_ctx":8192,"stop":["x"]}"#.to_owned();
        let cluster = cluster(&[wide]);
        let wanted = LoadOptions::in_object(r#"{"num_ctx":8192}"#);
        assert_eq!(known(&cluster, "wide").await.defaults.as_deref(), Some(&wanted));
        assert_eq!(known(&cluster, "plain").await.defaults, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_runner_that_others_started_has_the_options_of_the_name_that_it_is_listed_under() {
        let mut said = report(&["plain=w", "poet=w", "odd=w"], &["plain"]);
        said.loaded[0].context_length = 2048;
        let parameters = [r#"{"num_thread":1}"#, r#"{"num_thread":1,"num_ctx":512}"#, r#"{"num_thread":8}"#];
        for (model, parameters) in said.models.iter_mut().zip(parameters) {
            parameters.clone_into(&mut model.parameters);
        }
        let cluster = cluster(&[said]);
        let server = cluster.snapshot().servers[0].clone();
        for (name, reloads) in [("plain", false), ("poet", false), ("odd", true)] {
            let known = known(&cluster, name).await;
            let named = LoadOptions::in_body(&[], &crate::peek::Peek::default()).or(known.defaults.as_deref().unwrap());
            assert_eq!(known.runners.at(&server).cause(Some(&named), true).is_some(), reloads, "{name}");
        }
    }
}
