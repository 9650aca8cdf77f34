//! Quantizations that are being made or pulled: each once, however many calls want it, and few at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, header};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tower::{Service, ServiceExt};

use super::Config;
use super::choice::Look;
use super::level::{Level, Parts};
use crate::call::{Call, Head, Payload, Reply};
use crate::cluster::{Candidates, Cluster, Server};
use crate::error::Error;
use crate::instruments;
use crate::keys::Rights;
use crate::names::ModelName;
use crate::peek::Peek;
use crate::route::Route;

/// How many models are made or pulled at the same time.
const AT_ONCE: usize = 2;
/// The longest that one may take: the largest models over a slow line.
const LONGEST: Duration = Duration::from_secs(6 * 3600);
/// How long it is not tried again after it has failed.
const REST: Duration = Duration::from_secs(300);
/// How many failures are remembered.
const FAILURES: usize = 256;
/// The longest answer that is read, bytes: it is one line.
const ANSWER: usize = 64 << 10;
/// How long it may take until servers say that they have it.
const NEWS: Duration = Duration::from_secs(2);

/// Something that can be done so that a model is there.
#[derive(Debug)]
pub(super) struct Job {
    name: ModelName,
    /// The name as servers get it: the client's own.
    text: String,
    how: How,
    /// Where it is done.
    server: usize,
}

#[derive(Debug)]
enum How {
    /// Made of this model, in this quantization.
    Make(String, &'static str),
    Pull,
}

impl Job {
    /// What may be done for a model that nobody has.
    pub(super) fn find(config: &Config, call: &Call, look: &Look<'_>, name: &ModelName) -> Option<Self> {
        let may = |right: Rights| call.key.get().is_none_or(|key| key.may.cover(right));
        let typed = call.peek.model.as_ref().filter(|_| call.model.as_ref() == Some(name));
        let text = typed.cloned().unwrap_or_else(|| name.to_string());
        let word = look.level.and_then(Level::made_by).filter(|_| config.make && may(Rights::CREATE));
        if let Some(word) = word {
            let is_source = |level: Level| level.is_unquantized() && Some(level) != look.level;
            let sources = look.offers.iter().filter(|offer| offer.refusal.is_none());
            let made = sources.filter(|offer| offer.level.is_some_and(is_source)).find_map(|offer| {
                let server = idlest(&call.candidates, |server| offer.servers.contains(server.index))?;
                let how = How::Make(offer.make.model().name.clone(), word);
                Some(Self { name: name.clone(), text: text.clone(), how, server })
            });
            if made.is_some() {
                return made;
            }
        }
        // Only a quantization: what else is missing is not for this layer to fetch.
        if !config.pull || !may(Rights::PULL) || Parts::of(name).level.is_none() {
            return None;
        }
        let server = idlest(&call.candidates, |_| true)?;
        Some(Self { name: name.clone(), text, how: How::Pull, server })
    }

    /// What would be done, for who only asks.
    pub(super) fn would(&self) -> &'static str {
        match self.how {
            How::Make(..) => "would make the model itself of an unquantized one",
            How::Pull => "would pull the model itself",
        }
    }

    fn word(&self) -> &'static str {
        match self.how {
            How::Make(..) => "make",
            How::Pull => "pull",
        }
    }

    /// The call that does it, on behalf of whoever wants the model.
    fn call(&self, of: &Call) -> Call {
        let (route, path, body) = match &self.how {
            How::Make(from, word) => {
                let body = json!({"model": self.text, "from": from, "quantize": word, "stream": false});
                (Route::Create, "/api/create", body)
            }
            How::Pull => (Route::Pull, "/api/pull", json!({"model": self.text, "stream": false})),
        };
        let body = Bytes::from(body.to_string());
        let mut head = Head::new(route, Method::POST, PathAndQuery::from_static(path));
        head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        head.peek = Peek::json(std::slice::from_ref(&body));
        head.model = Some(self.name.clone());
        head.client = of.client;
        head.key.clone_from(&of.key);
        let mut candidates = of.candidates.clone();
        candidates.only(self.server);
        Call::new(head, Payload::from_bytes(body), candidates)
    }
}

/// The candidate that has the least to do for its weight.
fn idlest(candidates: &Candidates, has_it: impl Fn(&Server) -> bool) -> Option<usize> {
    let load = |server: &Server| f64::from(server.load.in_flight() + 1) / f64::from(server.weight.get());
    let usable = candidates.iter().filter(|server| server.is_usable() && has_it(server));
    usable.min_by(|one, other| load(one).total_cmp(&load(other))).map(|server| server.index)
}

/// What is being made or pulled now, and what could not be; outlives every stack.
#[derive(Debug, Default)]
pub struct Works(Mutex<HashMap<ModelName, State>>);

#[derive(Debug)]
enum State {
    Going(watch::Receiver<Option<bool>>),
    /// It is not tried again before this.
    Failed(Instant),
}

/// Something that goes on.
#[derive(Debug)]
pub(super) struct Work(watch::Receiver<Option<bool>>);

impl Work {
    /// Waits until it is done, at most so long. True if all went well.
    pub(super) async fn wait(mut self, limit: Duration) -> bool {
        let done = timeout(limit, self.0.wait_for(Option::is_some)).await;
        matches!(done, Ok(Ok(result)) if *result == Some(true))
    }
}

impl Works {
    /// Begins a job, unless it goes on already; `None` if it failed a while ago, or if there is enough to do. It goes on
    /// when the call is over.
    pub(super) fn begin<S>(self: &Arc<Self>, job: Job, of: &Call, cluster: &Arc<Cluster>, service: S) -> Option<Work>
    where
        S: Service<Call, Response = Reply, Error = Error> + Send + 'static,
        S::Future: Send + 'static,
    {
        let mut states = self.states();
        match states.get(&job.name) {
            Some(State::Going(done)) => return Some(Work(done.clone())),
            Some(State::Failed(until)) if *until > Instant::now() => {
                of.note("quant-fallback", "the model could not be fetched a while ago", []);
                return None;
            }
            _ => {}
        }
        if states.values().filter(|state| matches!(state, State::Going(_))).count() >= AT_ONCE {
            of.note("quant-fallback", "other models are being fetched", []);
            return None;
        }
        let (tell, done) = watch::channel(None);
        states.insert(job.name.clone(), State::Going(done.clone()));
        drop(states);
        of.note("quant-fallback", "fetches the model itself", [("how", job.word().into())]);
        let call = job.call(of);
        let (works, cluster) = (self.clone(), cluster.clone());
        tokio::spawn(async move {
            let mut going = Going { works, job, result: false, tell };
            tracing::info!(model = %going.job.name, how = going.job.word(), "a quantization is being fetched");
            match timeout(LONGEST, ask(service, call)).await.unwrap_or_else(|_| Err("it took too long".to_owned())) {
                Ok(()) => going.result = true,
                Err(why) => tracing::warn!(model = %going.job.name, why, "a quantization could not be fetched"),
            }
            cluster.refresh(NEWS).await;
        });
        Some(Work(done))
    }

    fn states(&self) -> MutexGuard<'_, HashMap<ModelName, State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self, name: &ModelName, is_good: bool) {
        let mut states = self.states();
        states.remove(name);
        if is_good {
            return;
        }
        let now = Instant::now();
        states.retain(|_, state| !matches!(state, State::Failed(until) if *until <= now));
        if states.len() < FAILURES {
            states.insert(name.clone(), State::Failed(now + REST));
        }
    }
}

/// A job that goes on; over when this is dropped, in whichever way.
struct Going {
    works: Arc<Works>,
    job: Job,
    result: bool,
    tell: watch::Sender<Option<bool>>,
}

impl Drop for Going {
    fn drop(&mut self) {
        self.works.ended(&self.job.name, self.result);
        instruments::quant_fetched(self.job.word(), self.result);
        self.tell.send_replace(Some(self.result));
    }
}

async fn ask<S>(service: S, call: Call) -> Result<(), String>
where
    S: Service<Call, Response = Reply, Error = Error>,
{
    let reply = service.oneshot(call).await.map_err(|error| error.to_string())?;
    let status = reply.status;
    let body = reply.body.collect(ANSWER).await.map_err(|error| error.to_string())?;
    // A failure may come with a good status, as the last line.
    let is_good = status.is_success() && memchr::memmem::find(&body, b"\"error\"").is_none();
    if is_good { Ok(()) } else { Err(String::from_utf8_lossy(&body).trim().to_owned()) }
}
