//! Says which models belong on a group of workers that hold a part of it each, because no server alone can hold them.
//!
//! What is there: the rules, and what they decide about each call. What is not there yet: the groups. No worker can join a
//! proxy so far, so every call that belongs on a group is passed on to the servers that have its model, as if this layer were
//! not there, and its trail and a metric say so. A server that cannot hold the model says that itself.
//!
//! Belongs innermost: it decides who works on a call that has had its turn, and whatever tries a call again must find a group
//! among those who may fail.

use std::sync::Arc;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tower::{Layer, Service};

use crate::call::{Answer, Call, Reply};
use crate::error::Error;
use crate::instruments::Instruments;
use crate::names::ModelName;
use crate::pattern::Pattern;
use crate::trail::Fact;
use crate::units::Whole;

/// The most workers of a group: llama.cpp's RPC takes no more.
const MOST_WORKERS: u64 = 16;
/// The largest size that may be said, GiB: what is larger is a slip.
const LARGEST: u64 = 1 << 20;

/// The `[distribute]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Which models belong on a group of workers.
    pub policy: Policy,
    /// The size of a model's file beyond which it is too big for a server, GiB; 0: not said.
    pub too_big_gib: Whole<0, LARGEST>,
    /// Workers without which there is no group.
    pub min_workers: Whole<1, MOST_WORKERS>,
    /// Something else for some models; the first that fits counts.
    pub rules: Vec<Rule>,
}

impl Default for Config {
    fn default() -> Self {
        Self { policy: Policy::Off, too_big_gib: Whole::new(0), min_workers: Whole::new(2), rules: Vec::new() }
    }
}

/// Which models belong on a group of workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// None.
    #[default]
    Off,
    /// Those that are too big for a server.
    WhenTooBig,
    /// All.
    Always,
}

impl Policy {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::WhenTooBig => "when-too-big",
            Self::Always => "always",
        }
    }
}

/// Something else for some models. What it leaves out is as in the table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// The models, as servers are asked for them.
    pub models: Vec<Pattern>,
    /// Whether they belong on a group of workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// The size beyond which they are too big for a server, GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub too_big_gib: Option<Whole<1, LARGEST>>,
    /// Workers without which there is no group for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_workers: Option<Whole<1, MOST_WORKERS>>,
}

/// What is wrong with a table, and in which of its rules; `None`: in the table itself.
pub type Fault = (Option<usize>, &'static str);

const NO_SIZE: &str =
    "it needs too-big-gib, from which size on a model is too big: servers do not tell how much they can hold";

impl Config {
    /// Whether no model belongs on a group.
    pub fn is_off(&self) -> bool {
        self.policy == Policy::Off && self.rules.iter().all(|rule| rule.policy.unwrap_or_default() == Policy::Off)
    }

    /// Finds what no type can hold.
    pub fn check(&self) -> Result<(), Fault> {
        for (at, rule) in self.rules.iter().enumerate() {
            if rule.models.is_empty() {
                return Err((Some(at), "it must name models: models = [\"*\"] are all"));
            }
            if rule.policy.is_none() && rule.too_big_gib.is_none() && rule.min_workers.is_none() {
                return Err((Some(at), "it must say something of them: policy, too-big-gib or min-workers"));
            }
        }
        let lacks_size = |plan: &Plan| plan.policy == Policy::WhenTooBig && plan.too_big == u64::MAX;
        if let Some(at) = self.rules.iter().position(|rule| lacks_size(&self.plan(Some(rule)))) {
            return Err((Some(at), NO_SIZE));
        }
        if lacks_size(&self.plan(None)) { Err((None, NO_SIZE)) } else { Ok(()) }
    }

    fn plan(&self, rule: Option<&Rule>) -> Plan {
        let gib = rule.and_then(|rule| rule.too_big_gib).map_or(self.too_big_gib.get(), Whole::get);
        Plan {
            policy: rule.and_then(|rule| rule.policy).unwrap_or(self.policy),
            too_big: if gib == 0 { u64::MAX } else { gib << 30 },
            min_workers: rule.and_then(|rule| rule.min_workers).unwrap_or(self.min_workers).get(),
        }
    }

    fn plan_for(&self, model: &ModelName) -> Plan {
        let fits = |rule: &&Rule| rule.models.iter().any(|pattern| pattern.matches_model(model));
        self.plan(self.rules.iter().find(fits))
    }
}

/// What holds for one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    policy: Policy,
    /// Bytes beyond which it is too big for a server.
    too_big: u64,
    min_workers: u64,
}

/// Puts [`Distribute`] around a service.
#[derive(Clone, Debug)]
pub struct DistributeLayer {
    rules: Arc<Rules>,
}

#[derive(Debug)]
struct Rules {
    config: Config,
    instruments: Arc<Instruments>,
}

impl DistributeLayer {
    /// Decides by these rules.
    pub fn new(config: Config, instruments: Arc<Instruments>) -> Self {
        Self { rules: Arc::new(Rules { config, instruments }) }
    }
}

impl<S> Layer<S> for DistributeLayer {
    type Service = Distribute<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Distribute { inner, rules: self.rules.clone() }
    }
}

/// Finds the calls that belong on a group of workers.
#[derive(Clone, Debug)]
pub struct Distribute<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Call> for Distribute<S>
where
    S: Service<Call, Response = Reply, Error = Error, Future = Answer>,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        if let Some(plan) = self.rules.group_for(&call) {
            let facts = [
                ("policy", plan.policy.as_str().into()),
                ("workers", Fact::Count(0)),
                ("wanted", plan.min_workers.into()),
            ];
            call.note("distribute", "belongs on a group of workers, and there is none: goes to a server", facts);
            // A request counts once, however many attempts it takes.
            if !call.dry && call.attempts == 0 {
                self.rules.instruments.found_no_group();
            }
        }
        self.inner.call(call)
    }
}

impl Rules {
    /// What holds for the group that a call belongs on, if it does.
    fn group_for(&self, call: &Call) -> Option<Plan> {
        if !call.route.infers() || call.peek.unloads() {
            return None;
        }
        let model = call.place.model.as_ref()?;
        let plan = self.config.plan_for(model);
        let size =
            || call.known.as_ref().or_else(|| call.candidates.snapshot().known(model)).map_or(0, |known| known.size);
        let belongs = match plan.policy {
            Policy::Off => false,
            Policy::WhenTooBig => size() > plan.too_big,
            Policy::Always => true,
        };
        belongs.then_some(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Cluster, Model, Report};
    use crate::testing;
    use futures_util::FutureExt;
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    const NOTE: &str = "belongs on a group of workers, and there is none: goes to a server";

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Two servers with a small model and a big one, of 100 GiB.
    async fn cluster() -> Arc<Cluster> {
        let cluster = testing::cluster(&[&[], &[]]).await;
        for server in 0..2 {
            let model = |name: &str, gib: u64| Model { name: name.into(), size: gib << 30, ..Model::default() };
            cluster.report(
                server,
                Report { models: vec![model("small", 4), model("big:405b", 100)], ..Report::default() },
            );
        }
        cluster.catch_up().await;
        cluster
    }

    /// What the layer says of a call, which is answered as ever.
    async fn said(config: &Config, call: Call) -> Vec<crate::trail::Note> {
        let head = call.head.clone();
        let pick = crate::pick::Pick::new(testing::Always, Arc::default());
        let mut service = DistributeLayer::new(config.clone(), Arc::default()).layer(pick);
        assert_eq!(service.call(call).await.unwrap().status, http::StatusCode::OK);
        head.trail.take().into_iter().filter(|note| note.layer == "distribute").collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_belongs_on_a_group_goes_to_a_server_and_its_trail_says_so() {
        let cluster = cluster().await;
        let config = config("policy = \"always\"\nmin-workers = 3");
        let notes = said(&config, testing::call_in(&cluster, "small")).await;
        assert_eq!((notes.len(), notes[0].decision), (1, NOTE));
        let facts = serde_json::to_value(&notes[0]).unwrap()["facts"].clone();
        assert_eq!(facts, serde_json::json!({"policy": "always", "workers": 0, "wanted": 3}));
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_is_too_big_for_a_server_belongs_on_a_group_and_a_small_one_does_not() {
        let cluster = cluster().await;
        let config = config("policy = \"when-too-big\"\ntoo-big-gib = 64");
        assert_eq!(said(&config, testing::call_in(&cluster, "big:405b")).await.len(), 1);
        assert!(said(&config, testing::call_in(&cluster, "small")).await.is_empty());
        assert!(said(&config, testing::call_in(&cluster, "nobodys")).await.is_empty(), "nobody knows how big it is");
        let show = testing::call_with(&cluster, crate::Route::Show, r#"{"model":"big:405b"}"#);
        assert!(said(&config, show).await.is_empty(), "no model runs for that");
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_rule_that_fits_says_otherwise() {
        let cluster = cluster().await;
        let config = config(
            "policy = \"when-too-big\"\ntoo-big-gib = 64\n\
             [[rules]]\nmodels = [\"big*\"]\npolicy = \"off\"\n[[rules]]\nmodels = [\"*\"]\ntoo-big-gib = 2\n",
        );
        assert!(said(&config, testing::call_in(&cluster, "big:405b")).await.is_empty());
        assert_eq!(said(&config, testing::call_in(&cluster, "small")).await.len(), 1);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_belongs_on_a_group_is_counted_once_a_request_and_not_for_a_question() {
        let recorder = DebuggingRecorder::new();
        let _guard = metrics::set_default_local_recorder(&recorder);
        let cluster = cluster().await;
        let pick = crate::pick::Pick::new(testing::Always, Arc::default());
        let mut service = DistributeLayer::new(config("policy = \"always\""), Arc::default()).layer(pick);
        let mut dry = testing::call_in(&cluster, "small");
        Arc::get_mut(&mut dry.head).unwrap().dry = true;
        let mut again = testing::call_in(&cluster, "small");
        again.attempts = 1;
        for call in [dry, testing::call_in(&cluster, "small"), again] {
            service.call(call).now_or_never().unwrap().unwrap();
        }
        let counted = recorder.snapshotter().snapshot().into_vec();
        let value = counted.into_iter().find(|(key, ..)| key.key().name() == "olol_distributed_total").unwrap().3;
        assert_eq!(value, DebugValue::Counter(1));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, at, why) in [
            ("policy = \"when-too-big\"", None, "too-big-gib"),
            ("[[rules]]\nmodels = [\"a\"]\npolicy = \"when-too-big\"", Some(0), "too-big-gib"),
            ("[[rules]]\nmodels = []\npolicy = \"always\"", Some(0), "it must name models"),
            ("[[rules]]\nmodels = [\"a\"]", Some(0), "it must say something"),
        ] {
            let (found, what) = config(text).check().unwrap_err();
            assert!(found == at && what.contains(why), "{text}: {what}");
        }
        for (text, why) in [
            ("policy = \"allways\"", "unknown variant `allways`, expected one of `off`, `when-too-big`, `always`"),
            ("min-workers = 0", "expected a whole number from 1 to 16"),
            ("min-workers = 17", "expected a whole number from 1 to 16"),
            ("[[rules]]\npolicy = \"off\"", "missing field `models`"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn it_is_off_unless_a_policy_says_otherwise() {
        assert!(Config::default().is_off() && config("min-workers = 4").is_off());
        assert!(!config("[[rules]]\nmodels = [\"a\"]\npolicy = \"always\"").is_off());
        let config = config("policy = \"always\"\n[[rules]]\nmodels = [\"a*\"]\nmin-workers = 4");
        assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
    }
}
