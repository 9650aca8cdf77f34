//! Builds the stack from its configuration: the only file that knows all layers.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use serde::{Deserialize, Serialize};
use tower::{Layer, Service, ServiceExt};

use crate::affinity::AffinityLayer;
use crate::alias::AliasLayer;
use crate::auth::AuthLayer;
use crate::call::{Answer, Call, Reply};
use crate::distribute::DistributeLayer;
use crate::error::Error;
use crate::hedge::HedgeLayer;
use crate::keys::Guard;
use crate::metrics::MetricsLayer;
use crate::model_route::ModelRouteLayer;
use crate::quant_fallback::{self, QuantFallbackLayer};
use crate::queue::QueueLayer;
use crate::rate_limit::RateLimitLayer;
use crate::retry::RetryLayer;
use crate::shared;
use crate::timeout::TimeoutLayer;
use crate::trace::TraceLayer;

/// A stack of layers, or a part of one: a service without a type of its own, shared by counting.
///
/// What tower's `BoxCloneSyncService` is, but that a clone copies no layer, and that an answer which is boxed already is
/// not boxed again: a stack is cloned for every request.
#[derive(Clone)]
pub struct Stack(Arc<dyn Shared>);

/// A service that is called through a shared reference.
trait Shared: Send + Sync {
    fn call(&self, call: Call) -> Answer;
}

impl<S> Shared for S
where
    S: Service<Call, Response = Reply, Error = Error, Future = Answer> + Clone + Send + Sync + 'static,
{
    fn call(&self, call: Call) -> Answer {
        send(self.clone(), call)
    }
}

/// Sends a call as soon as the service is ready; nearly every service is at once.
pub(crate) fn send<S>(mut service: S, call: Call) -> Answer
where
    S: Service<Call, Response = Reply, Error = Error, Future = Answer> + Send + 'static,
{
    match service.poll_ready(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(())) => service.call(call),
        Poll::Ready(Err(error)) => Box::pin(std::future::ready(Err(error))),
        Poll::Pending => Box::pin(async move { service.ready().await?.call(call).await }),
    }
}

impl Stack {
    /// A stack of this service alone.
    pub fn new<S>(service: S) -> Self
    where
        S: Service<Call, Response = Reply, Error = Error, Future = Answer> + Clone + Send + Sync + 'static,
    {
        Self(Arc::new(service))
    }

    /// Sends a call down the stack.
    pub fn send(&self, call: Call) -> Answer {
        self.0.call(call)
    }
}

impl Service<Call> for Stack {
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    /// Always ready: the layers wait, if they must, in the call.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Call) -> Answer {
        self.send(call)
    }
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stack").finish_non_exhaustive()
    }
}

/// A layer, by the word that the configuration uses for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Concern {
    /// [`crate::trace`]
    Trace,
    /// [`crate::metrics`]
    Metrics,
    /// [`crate::auth`]
    Auth,
    /// [`crate::rate_limit`]
    RateLimit,
    /// [`crate::timeout`]
    Timeout,
    /// [`crate::alias`]
    Alias,
    /// [`crate::queue`]
    Queue,
    /// [`crate::quant_fallback`]
    QuantFallback,
    /// [`crate::model_route`]
    ModelRoute,
    /// [`crate::affinity`]
    Affinity,
    /// [`crate::hedge`]
    Hedge,
    /// [`crate::retry`]
    Retry,
    /// [`crate::distribute`]
    Distribute,
}

impl Concern {
    /// Every layer, in the default order, the outermost first.
    pub const ALL: [Self; 13] = [
        Self::Trace,
        Self::Metrics,
        Self::Auth,
        Self::RateLimit,
        Self::Timeout,
        Self::Alias,
        Self::Queue,
        Self::QuantFallback,
        Self::ModelRoute,
        Self::Affinity,
        Self::Hedge,
        Self::Retry,
        Self::Distribute,
    ];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Metrics => "metrics",
            Self::Auth => "auth",
            Self::RateLimit => "rate-limit",
            Self::Timeout => "timeout",
            Self::Alias => "alias",
            Self::Queue => "queue",
            Self::QuantFallback => "quant-fallback",
            Self::ModelRoute => "model-route",
            Self::Affinity => "affinity",
            Self::Hedge => "hedge",
            Self::Retry => "retry",
            Self::Distribute => "distribute",
        }
    }

    /// What it does for a call, in a few words.
    pub fn does(self) -> &'static str {
        match self {
            Self::Trace => "tells the log what was asked and how it ended",
            Self::Metrics => "counts requests, and times them to their first piece and to their end",
            Self::Auth => "asks for a key, and holds its owner to what it allows",
            Self::RateLimit => "holds each client to the requests and tokens that it may use",
            Self::Timeout => "ends what takes too long",
            Self::Alias => "gives models other names, and prefers servers for them",
            Self::Queue => "lets calls wait for a free place at a server, in fair turns",
            Self::QuantFallback => "serves a model in another quantization, where that one is not there",
            Self::ModelRoute => "narrows the candidates to those that have the model",
            Self::Affinity => "leads a conversation back to the server that remembers it",
            Self::Hedge => "asks a second server when the first is late with a short answer",
            Self::Retry => "asks another server when one fails",
            Self::Distribute => "finds the models that belong on a group of workers",
        }
    }
}

impl fmt::Display for Concern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Layers in an order that can work, the outermost first.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "Vec<Concern>")]
pub struct Order(Vec<Concern>);

impl Order {
    /// The layers.
    pub fn layers(&self) -> &[Concern] {
        &self.0
    }
}

impl TryFrom<Vec<Concern>> for Order {
    type Error = OrderError;

    fn try_from(order: Vec<Concern>) -> Result<Self, OrderError> {
        check(&order)?;
        Ok(Self(order))
    }
}

/// The `[stack]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Table {
    /// The layers that are on, outermost first.
    pub order: Order,
}

impl Default for Table {
    fn default() -> Self {
        Self { order: Order(Concern::ALL.to_vec()) }
    }
}

/// The tables of all layers.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Which layers are on.
    pub stack: Table,
    /// The `[pick]` table.
    pub pick: crate::pick::Config,
    /// The `[judge]` table.
    pub judge: crate::judge::Config,
    /// The `[trace]` table.
    pub trace: crate::trace::Config,
    /// The `[metrics]` table.
    pub metrics: crate::metrics::Config,
    /// The `[auth]` table.
    pub auth: crate::auth::Config,
    /// The `[timeout]` table.
    pub timeout: crate::timeout::Config,
    /// The `[alias]` table.
    pub alias: crate::alias::Config,
    /// The `[queue]` table.
    pub queue: crate::queue::Config,
    /// The `[rate-limit]` table.
    pub rate_limit: crate::rate_limit::Config,
    /// The `[quant-fallback]` table.
    pub quant_fallback: quant_fallback::Config,
    /// The `[model-route]` table.
    pub model_route: crate::model_route::Config,
    /// The `[affinity]` table.
    pub affinity: crate::affinity::Config,
    /// The `[hedge]` table.
    pub hedge: crate::hedge::Config,
    /// The `[retry]` table.
    pub retry: crate::retry::Config,
    /// The `[distribute]` table.
    pub distribute: crate::distribute::Config,
}

/// An order that would do harm.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// A layer stands twice.
    #[error("stack.order names '{0}' twice: a layer can be in the stack once")]
    Twice(Concern),
    /// Two layers stand the wrong way round.
    #[error("stack.order has '{inner}' before '{outer}', but '{outer}' must come first: {why}")]
    Wrong {
        /// The layer that must come first.
        outer: Concern,
        /// The layer that must come later.
        inner: Concern,
        /// Why.
        why: &'static str,
    },
}

/// Two layers that work only one way round, and why.
struct Rule {
    outer: Concern,
    inner: Concern,
    why: &'static str,
}

const RULES: &[Rule] = &[
    Rule { outer: Concern::Auth, inner: Concern::RateLimit, why: "a key's limits cannot hold before its key is known" },
    Rule {
        outer: Concern::RateLimit,
        inner: Concern::Queue,
        why: "who may not ask now must not wait in the queue, and a wait must not cost a second request",
    },
    Rule {
        outer: Concern::Auth,
        inner: Concern::Queue,
        why: "who may not ask must not wait, and whose turn it is depends on the key",
    },
    Rule {
        outer: Concern::Alias,
        inner: Concern::Queue,
        why: "a call must wait for a slot of the model that is really asked for",
    },
    Rule {
        outer: Concern::Alias,
        inner: Concern::ModelRoute,
        why: "servers have the models that names stand for, not the names",
    },
    Rule { outer: Concern::Auth, inner: Concern::QuantFallback, why: "what may stand for a model depends on the key" },
    Rule {
        outer: Concern::Alias,
        inner: Concern::QuantFallback,
        why: "quantizations are of the models that names stand for",
    },
    Rule {
        outer: Concern::Queue,
        inner: Concern::QuantFallback,
        why: "when a slot is free it must be decided anew which quantization is in memory",
    },
    Rule {
        outer: Concern::QuantFallback,
        inner: Concern::ModelRoute,
        why: "servers are chosen by the quantization that is really asked for",
    },
    Rule {
        outer: Concern::QuantFallback,
        inner: Concern::Affinity,
        why: "a conversation goes on where the quantization that is really asked for has its history",
    },
    Rule {
        outer: Concern::QuantFallback,
        inner: Concern::Retry,
        why: "a retry must ask for the quantization that was chosen",
    },
    Rule {
        outer: Concern::QuantFallback,
        inner: Concern::Distribute,
        why: "whether a model is too big for a server depends on its quantization",
    },
    Rule {
        outer: Concern::Queue,
        inner: Concern::ModelRoute,
        why: "when a slot is free, or the servers have changed, it must be decided anew which servers have the model",
    },
    Rule {
        outer: Concern::Queue,
        inner: Concern::Affinity,
        why: "when a slot is free it must be decided anew where a conversation goes on",
    },
    Rule { outer: Concern::Queue, inner: Concern::Retry, why: "a call that waits for a slot is no failed attempt" },
    Rule {
        outer: Concern::ModelRoute,
        inner: Concern::Retry,
        why: "a retry must choose among the servers that have the model, and a server that says 404 is not a failed attempt",
    },
    Rule {
        outer: Concern::ModelRoute,
        inner: Concern::Affinity,
        why: "a conversation can only be kept on a server that has its model",
    },
    Rule {
        outer: Concern::Affinity,
        inner: Concern::Retry,
        why: "a retry must keep to the servers that a conversation prefers, and one that failed must not be preferred again",
    },
    Rule {
        outer: Concern::Alias,
        inner: Concern::Distribute,
        why: "whether a model is split depends on the model that is really asked for",
    },
    Rule {
        outer: Concern::Queue,
        inner: Concern::Distribute,
        why: "a call must have had its turn before a group of workers begins with it",
    },
    Rule {
        outer: Concern::ModelRoute,
        inner: Concern::Distribute,
        why: "whether a model is too big for a server is known only once it is known who has it",
    },
    Rule {
        outer: Concern::Affinity,
        inner: Concern::Distribute,
        why: "where a conversation goes on must be decided before its call is sent, to a group as to a server",
    },
    Rule {
        outer: Concern::Retry,
        inner: Concern::Distribute,
        why: "when a group of workers fails, the call must be tried again elsewhere",
    },
];

/// Whether an order can work.
fn check(order: &[Concern]) -> Result<(), OrderError> {
    let place = |concern: Concern| order.iter().position(|other| *other == concern);
    if let Some(twice) = order.iter().enumerate().find(|(at, concern)| place(**concern) != Some(*at)) {
        return Err(OrderError::Twice(*twice.1));
    }
    for &Rule { outer, inner, why } in RULES {
        if let (Some(outer_at), Some(inner_at)) = (place(outer), place(inner))
            && outer_at > inner_at
        {
            return Err(OrderError::Wrong { outer, inner, why });
        }
    }
    Ok(())
}

/// Wraps `leaf` in the configured layers, the innermost first.
pub fn build(config: &Config, shared: &shared::Shared, leaf: Stack) -> Stack {
    shared.picking.configure(config.pick.clone());
    shared.cluster.judge_by(config.judge.clone());
    // The proxy's own pages are beside the stack, and yet behind the same door.
    let has_door = config.stack.order.layers().contains(&Concern::Auth);
    shared.keys.guard(if has_door { config.auth.guard() } else { Guard::Never });
    config.stack.order.layers().iter().rev().fold(leaf, |inner, concern| match concern {
        Concern::Trace => push(inner, &TraceLayer::new(&config.trace, shared.requests.clone())),
        Concern::Metrics => push(inner, &MetricsLayer::new(shared.instruments.clone()).of(shared.clients.clone())),
        Concern::Auth => push(inner, &AuthLayer::new(&config.auth, shared.keys.clone(), shared.instruments.clone())),
        Concern::Timeout => push(inner, &TimeoutLayer::new(config.timeout.clone())),
        // Nearly every call would only pass through.
        Concern::Alias if config.alias.is_empty() => inner,
        Concern::Alias => push(inner, &AliasLayer::new(&config.alias)),
        Concern::Queue => push(inner, &QueueLayer::new(config.queue, shared.queue.clone(), shared.cluster.clone())),
        Concern::RateLimit => {
            push(inner, &RateLimitLayer::new(&config.rate_limit, shared.limits.clone(), shared.instruments.clone()))
        }
        // Nothing would be done.
        Concern::QuantFallback if config.quant_fallback.policy == quant_fallback::Policy::Off => inner,
        Concern::QuantFallback => {
            let (cluster, works) = (shared.cluster.clone(), shared.works.clone());
            push(inner, &QuantFallbackLayer::new(config.quant_fallback.clone(), cluster, works))
        }
        Concern::ModelRoute => push(inner, &ModelRouteLayer::new(config.model_route.clone(), shared.cluster.clone())),
        Concern::Affinity => push(
            inner,
            &AffinityLayer::new(config.affinity.clone(), shared.affinity.clone(), shared.instruments.clone()),
        ),
        Concern::Hedge if config.hedge.is_off() => inner,
        Concern::Hedge => {
            push(inner, &HedgeLayer::new(config.hedge.clone(), shared.hedges.clone(), shared.instruments.clone()))
        }
        Concern::Distribute if config.distribute.is_off() => inner,
        Concern::Distribute => {
            push(inner, &DistributeLayer::new(config.distribute.clone(), shared.instruments.clone()))
        }
        Concern::Retry => {
            let (budget, cluster) = (shared.budget.clone(), shared.cluster.clone());
            push(inner, &RetryLayer::new(config.retry.clone(), budget, cluster, shared.instruments.clone()))
        }
    })
}

fn push<L>(inner: Stack, layer: &L) -> Stack
where
    L: Layer<Stack>,
    L::Service: Service<Call, Response = Reply, Error = Error, Future = Answer> + Clone + Send + Sync + 'static,
{
    Stack::new(layer.layer(inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_order_is_allowed() {
        assert_eq!(check(Table::default().order.layers()), Ok(()));
    }

    #[test]
    fn every_layer_says_what_it_does() {
        assert!(Concern::ALL.iter().all(|layer| !layer.does().is_empty()));
    }

    #[test]
    fn a_harmful_order_is_refused_with_its_reason() {
        let error = check(&[Concern::Retry, Concern::ModelRoute]).unwrap_err();
        assert!(error.to_string().contains("'model-route' must come first: a retry must choose"), "{error}");
        assert_eq!(check(&[Concern::Retry, Concern::Retry]), Err(OrderError::Twice(Concern::Retry)));
    }

    #[test]
    fn affinity_stands_between_who_has_the_model_and_who_is_asked_next() {
        use Concern::{Affinity, ModelRoute, Retry};
        assert_eq!(check(&[ModelRoute, Affinity, Retry]), Ok(()));
        let error = check(&[Affinity, ModelRoute]).unwrap_err().to_string();
        assert!(error.contains("'model-route' must come first: a conversation can only be kept"), "{error}");
        let error = check(&[Retry, Affinity]).unwrap_err().to_string();
        assert!(error.contains("'affinity' must come first: a retry must keep"), "{error}");
    }

    #[test]
    fn a_harmful_order_is_shown_where_it_stands() {
        let error = toml::from_str::<Config>("[stack]\norder = [\"retry\", \"model-route\"]").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("must come first: a retry must choose"), "{error}");
    }

    #[test]
    fn a_misspelt_layer_is_named_with_its_line() {
        let error = toml::from_str::<Config>("[stack]\norder = [\"retyr\"]").unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("unknown variant `retyr`") && error.contains("`retry`"),
            "{error}"
        );
    }
}
