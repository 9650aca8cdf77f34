//! Narrows the candidates to the servers that have the model. Which of them has it in memory is part of what each would cost.
//!
//! Belongs outside `retry`, which then stays among them. When nobody is known to have the model every server stays in
//! question, so that the refusal is Ollama's own. A server that says 404 although it was believed to have the model (or
//! nobody was) makes the cluster look again at once, and the call goes where the model turns out to be.

use std::sync::Arc;
use std::task::{Context, Poll};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use tower::{Layer, Service, ServiceExt};

use crate::call::{Answer, Call, Head, Reply};
use crate::cluster::{Candidates, Cluster, Known, Snapshot};
use crate::error::Error;
use crate::names::ModelName;
use crate::place::LoadOptions;
use crate::route::Scope;
use crate::trail::Fact;
use crate::units::Ms;

/// The `[model-route]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Milliseconds that a call waits for news of the servers when one says 404 to a model.
    pub refresh_ms: Ms,
    /// What becomes of the load options of calls (`num_ctx` and the others that make a runner load anew).
    pub load_options: Options,
}

/// What becomes of the load options of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Options {
    /// A call that does not name them, or needs less context, goes with what is loaded.
    #[default]
    AsLoaded,
    /// Every call is sent as it came, whatever it makes a server load.
    AsSent,
}

impl Default for Config {
    fn default() -> Self {
        Self { refresh_ms: Ms::new(1000), load_options: Options::default() }
    }
}

/// Puts [`ModelRoute`] around a service.
#[derive(Clone, Debug)]
pub struct ModelRouteLayer {
    route: Arc<Router>,
}

impl ModelRouteLayer {
    /// Routes by what the cluster knows.
    pub fn new(config: Config, cluster: Arc<Cluster>) -> Self {
        Self { route: Arc::new(Router { config, cluster }) }
    }
}

impl<S> Layer<S> for ModelRouteLayer {
    type Service = ModelRoute<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ModelRoute { inner, router: self.route.clone() }
    }
}

/// Sends calls on to those who have the model.
#[derive(Clone, Debug)]
pub struct ModelRoute<S> {
    inner: S,
    router: Arc<Router>,
}

#[derive(Debug)]
struct Router {
    config: Config,
    cluster: Arc<Cluster>,
}

impl<S> Service<Call> for ModelRoute<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        if call.place.model.is_none() || !matches!(call.route.scope(), Scope::One | Scope::Same) {
            return Box::pin(self.inner.call(call));
        }
        let mut call = call;
        let question = call.candidates.clone();
        Router::narrow(&mut call);
        if call.route.infers() && self.router.config.load_options == Options::AsLoaded {
            let named = LoadOptions::of(&call);
            let defaults = call.known.as_ref().and_then(|known| known.defaults.as_deref());
            call.place.options = Some(Arc::new(match defaults {
                Some(defaults) => named.or(defaults),
                None => named,
            }));
        }
        if call.dry {
            return Box::pin(self.inner.call(call));
        }
        let asked = Asked {
            believed: (call.candidates.snapshot().clone(), call.known.clone()),
            // With a single server there is nobody else to ask.
            spare: if question.snapshot().servers.len() > 1 {
                call.again().map(|spare| (spare, question))
            } else {
                None
            },
            model: call.place.model.clone(),
            head: call.head.clone(),
        };
        let answer = self.inner.call(call);
        Box::pin(route(self.router.clone(), self.inner.clone(), asked, answer))
    }
}

/// A call that is on its way, as it was.
struct Asked {
    /// What was believed of the model.
    believed: (Arc<Snapshot>, Option<Arc<Known>>),
    /// The call, and who was in question before it was narrowed.
    spare: Option<(Call, Candidates)>,
    /// What servers were asked for.
    model: Option<ModelName>,
    head: Arc<Head>,
}

async fn route<S>(
    router: Arc<Router>,
    service: S,
    asked: Asked,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error>
where
    S: Service<Call, Response = Reply, Error = Error>,
{
    let reply = answer.await?;
    if reply.status != StatusCode::NOT_FOUND {
        router.learn(&asked.head, asked.model.as_ref(), &reply, asked.believed);
        return Ok(reply);
    }
    match asked.spare {
        // Boxed: seldom, and larger than all the rest.
        Some((spare, question)) => Box::pin(router.look_again(service, spare, question, reply)).await,
        None => Ok(reply),
    }
}

impl Router {
    /// Leaves only those who have the model, if anybody has.
    fn narrow(call: &mut Call) {
        let snapshot = call.candidates.snapshot();
        let Some(known) = call.place.model.as_ref().and_then(|model| snapshot.known(model)).cloned() else {
            call.note(
                "model-route",
                "nobody is known to have the model",
                [("candidates", call.candidates.count().into())],
            );
            return;
        };
        call.candidates.keep(&known.installed);
        let facts = [("model", Fact::from(&known.name)), ("candidates", call.candidates.count().into())];
        call.note("model-route", "those that have it", facts);
        call.known = Some(known);
    }

    /// Remembers what a good answer shows about the model, unless that was `believed` when it was asked.
    fn learn(
        &self,
        head: &Head,
        model: Option<&ModelName>,
        reply: &Reply,
        believed: (Arc<Snapshot>, Option<Arc<Known>>),
    ) {
        let (Some(model), Some(server)) = (model, reply.body.outcome().servers.last()) else { return };
        if !head.route.infers() || !reply.status.is_success() {
            return;
        }
        let is_loaded = !head.peek.unloads();
        let is_known = |snapshot: &Snapshot, known: &Known| was_loaded(snapshot, known, server) == is_loaded;
        if believed.1.is_some_and(|known| is_known(&believed.0, &known)) {
            return;
        }
        // Another call may have shown it in the meantime.
        let snapshot = self.cluster.snapshot();
        if snapshot.known(model).is_some_and(|known| !is_known(&snapshot, known)) {
            self.cluster.note_loaded(server, model, is_loaded);
        }
    }

    /// A server said that it does not have the model: forgets that it had, and asks the others, the likeliest first.
    async fn look_again<S>(
        &self,
        mut next: S,
        mut spare: Call,
        question: Candidates,
        mut refusal: Reply,
    ) -> Result<Reply, Error>
    where
        S: Service<Call, Response = Reply, Error = Error>,
    {
        let mut asked = Vec::new();
        let mut refreshed = false;
        loop {
            let Some(model) = spare.place.model.clone() else { return Ok(refusal) };
            if let Some(server) = refusal.body.outcome().servers.last() {
                spare.note("model-route", "a server does not have it after all", [("server", server.into())]);
                self.cluster.forget(server, &model);
                asked.push(server.clone());
            }
            loop {
                spare.candidates.clone_from(&question);
                spare.candidates.renew(self.cluster.snapshot());
                Self::narrow(&mut spare);
                for server in &asked {
                    spare.candidates.drop_server(server);
                }
                let somebody = !spare.candidates.is_empty()
                    && spare.candidates.snapshot().known(&model).is_some_and(|known| !known.installed.is_empty());
                if somebody {
                    break;
                }
                if std::mem::replace(&mut refreshed, true) {
                    return Ok(refusal);
                }
                self.cluster.refresh(self.config.refresh_ms.time()).await;
            }
            let Some(call) = spare.again() else { return Ok(refusal) };
            let reply = next.ready().await?.call(call).await?;
            if reply.status != StatusCode::NOT_FOUND {
                let believed = (spare.candidates.snapshot().clone(), spare.known.clone());
                self.learn(&spare.head, Some(&model), &reply, believed);
                return Ok(reply);
            }
            refusal = reply;
        }
    }
}

fn was_loaded(snapshot: &Snapshot, known: &Known, server: &crate::ServerId) -> bool {
    snapshot.server(server).is_some_and(|found| known.loaded.contains(found.index))
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::testing::{self, ask};

    fn names(call: &Call) -> Vec<String> {
        call.candidates.iter().map(|server| server.id.to_string()).collect()
    }

    async fn candidates_for(cluster: &Arc<Cluster>, model: &str) -> Vec<String> {
        let (mut service, mut inner) = testing::spawn(&ModelRouteLayer::new(Config::default(), cluster.clone()));
        let answer = ask(&mut service, testing::call_in(cluster, model));
        let (call, respond) = inner.next_request().await.unwrap();
        respond.send_response(testing::reply("hi"));
        answer.await.unwrap();
        names(&call)
    }

    #[tokio::test]
    async fn only_those_that_have_the_model_are_left() {
        let cluster = testing::cluster(&[&["tiny"], &["big"], &["tiny", "big"]]).await;
        assert_eq!(candidates_for(&cluster, "tiny").await, ["0", "2"]);
        assert_eq!(candidates_for(&cluster, "BIG:latest").await, ["1", "2"]);
        assert_eq!(candidates_for(&cluster, "nobodys").await, ["0", "1", "2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_404_sends_the_call_where_the_model_is() {
        let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&ModelRouteLayer::new(Config::default(), cluster.clone()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!(names(&call), ["0", "1"]);
        respond.send_response(testing::refusal("0"));
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!(names(&call), ["1"]);
        respond.send_response(testing::reply("hi"));
        assert_eq!(answer.await.unwrap().status, StatusCode::OK);
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_answer_shows_is_learnt_of_the_model_that_was_asked_for() {
        let cluster = testing::cluster(&[&["tiny", "mine"], &["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&ModelRouteLayer::new(Config::default(), cluster.clone()));
        let mut call = testing::call_in(&cluster, "mine");
        call.place.model = ModelName::parse("tiny");
        let answer = ask(&mut service, call);
        let mut reply = testing::reply("hi");
        reply.body.outcome_mut().servers.push(crate::ServerId::new("1"));
        inner.next_request().await.unwrap().1.send_response(reply);
        answer.await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        let snapshot = cluster.snapshot();
        let loaded = |name| snapshot.known(&ModelName::parse(name).unwrap()).unwrap().loaded.iter().collect::<Vec<_>>();
        assert_eq!([loaded("tiny"), loaded("mine")], [vec![1], vec![]]);
    }

    #[tokio::test(start_paused = true)]
    async fn when_nobody_has_it_the_refusal_is_the_servers_own() {
        let cluster = testing::cluster(&[&["big"], &["big"]]).await;
        let (mut service, mut inner) = testing::spawn(&ModelRouteLayer::new(Config::default(), cluster.clone()));
        let answer = ask(&mut service, testing::call_in(&cluster, "tiny"));
        inner.next_request().await.unwrap().1.send_response(testing::refusal("0"));
        assert_eq!(answer.await.unwrap().status, StatusCode::NOT_FOUND);
    }
}
