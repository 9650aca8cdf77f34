//! A client's pull: at how many servers it is to be, and how it is told of it.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::stream;
use http::StatusCode;
use http::header::{self, HeaderMap};
use olol_middleware::call::Body;
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Chunk, Error, Reply, Server, ServerId};
use serde_json::json;
use tower::Service;

use super::{NATIVE, Scatter, again, bad_request, json_reply};
use crate::models::Replicas;
use crate::models::pull::{End, Order, Pull};

impl<F: Fleet> Scatter<F> {
    /// Has servers pull a model: as many as the call says, or else the configuration.
    pub(super) async fn pull(self, call: Call) -> Result<Reply, Error> {
        let replicas = match Replicas::asked(&call.headers) {
            Ok(asked) => asked.unwrap_or_else(|| self.shared.models.config().replicas),
            Err(why) => return Ok(bad_request(&why)),
        };
        let Some(model) = call.place.model.clone() else {
            // Nobody can pull what has no name: one server says so in its own words.
            return self.pick.clone().call(call).await;
        };
        let everybody: Vec<Arc<Server>> = call.candidates.iter().cloned().collect();
        let mut servers: Vec<Arc<Server>> = everybody.iter().filter(|server| server.is_reachable()).cloned().collect();
        if servers.is_empty() {
            servers.clone_from(&everybody);
        }
        let is_left_out = |server: &&Arc<Server>| servers.iter().all(|other| other.id != server.id);
        let mut absent: Vec<ServerId> = match replicas {
            Replicas::Some(_) => Vec::new(),
            Replicas::All | Replicas::Fits => {
                everybody.iter().filter(is_left_out).map(|server| server.id.clone()).collect()
            }
        };
        let streams = call.peek.stream != Some(false);
        let (scatter, call) = (self.clone(), Arc::new(Mutex::new(call)));
        let ask = Arc::new(move |server: Arc<Server>| -> futures_util::future::BoxFuture<'static, _> {
            let (scatter, call) = (scatter.clone(), call.clone());
            Box::pin(async move {
                let call = again(&call.lock().unwrap_or_else(PoisonError::into_inner));
                scatter.to(call?, &server).await
            })
        });
        let pull = self.shared.models.pull(Order { model, replicas, servers, ask });
        let (mut headers, missing, end) = pull.begun().await;
        absent.extend(missing);
        if let Some(End::Refused(refusal, why)) = end.as_deref() {
            let taken = refusal.lock().unwrap_or_else(PoisonError::into_inner).take();
            return taken.unwrap_or_else(|| Err(Error::NoServer(why.clone())));
        }
        headers.remove(header::CONTENT_LENGTH);
        let mut reply = if streams { told(pull, headers) } else { whole(&pull, headers, &mut absent).await };
        reply.body.outcome_mut().absent = absent;
        Ok(reply)
    }
}

/// The pull as a stream.
fn told(pull: Arc<Pull>, headers: HeaderMap) -> Reply {
    let lines = stream::unfold(pull.follow(), |mut following| async move {
        let line = following.next().await?;
        Some((Ok(Chunk::from(line)), following))
    });
    Reply { status: StatusCode::OK, headers, body: Body::new(lines) }
}

/// The pull as one object, when it is over.
async fn whole(pull: &Pull, headers: HeaderMap, absent: &mut Vec<ServerId>) -> Reply {
    let (end, missing) = pull.end().await;
    for id in missing {
        if !absent.contains(&id) {
            absent.push(id);
        }
    }
    match &*end {
        End::Success(line) => Reply::full(StatusCode::OK, headers, line.clone()),
        End::Failed(why) | End::Refused(_, why) => {
            json_reply(StatusCode::INTERNAL_SERVER_ERROR, NATIVE, json!({ "error": why }).to_string())
        }
    }
}
