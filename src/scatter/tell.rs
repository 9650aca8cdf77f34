//! Deletes, copies and unloads: told to every server that they concern.
//!
//! 200 if every holder did it; 404 only if nobody has the model; else the body of the first failure, and who failed. A
//! delete or copy is told to those too that are not known to have the model: what is known may be old, and their 404 does
//! no harm.

use std::sync::Arc;

use futures_util::future::join_all;
use http::StatusCode;
use olol_middleware::call::Body;
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Error, ModelName, Reply, Route, Server, ServerId};

use super::{LONGEST, News, Scatter, holders};

/// What one server said, and whether it was known to have the model.
struct Said {
    server: ServerId,
    holds: bool,
    answer: Result<Reply, Error>,
}

impl<F: Fleet> Scatter<F> {
    /// Tells everybody concerned and makes one answer of theirs.
    pub(super) async fn tell(self, call: Call) -> Result<Reply, Error> {
        let is_unload = !matches!(call.route, Route::Delete | Route::Copy);
        let holders: Vec<Arc<Server>> = if is_unload {
            call.candidates.iter().cloned().collect()
        } else {
            holders(&call.candidates, call.place.model.as_ref())
        };
        let holds = |server: &Server| holders.iter().any(|holder| holder.index == server.index);
        let everybody = call.candidates.snapshot().servers.iter();
        let mut targets: Vec<Arc<Server>> =
            everybody.filter(|server| holds(server) || (!is_unload && server.is_reachable())).cloned().collect();
        if targets.is_empty() {
            // Nobody seems to be there: everybody is asked all the same.
            targets.extend(call.candidates.snapshot().servers.iter().cloned());
        }
        let news = News { cluster: self.shared.cluster.clone(), servers: targets.clone() };
        let answers = join_all(targets.iter().map(|server| {
            let asking = self.same_to(&call, server);
            async {
                let mut reply = asking.await?;
                // Short answers: read now, so that one which breaks off counts as failed.
                let body = std::mem::replace(&mut reply.body, Body::empty());
                let outcome = body.outcome().clone();
                let bytes = body.collect(LONGEST).await?;
                let mut whole = Reply::full(reply.status, reply.headers, bytes);
                *whole.body.outcome_mut() = outcome;
                Ok(whole)
            }
        }))
        .await;
        let said: Vec<Said> = targets
            .iter()
            .zip(answers)
            .map(|(server, answer)| Said { server: server.id.clone(), holds: holds(server), answer })
            .collect();
        self.note(&call, &said);
        Ok(judge(said)?.hold(news))
    }

    /// Makes known what has changed, before the client hears of it.
    fn note(&self, call: &Call, said: &[Said]) {
        let Some(model) = &call.place.model else { return };
        let cluster = &self.shared.cluster;
        let who = |fits: fn(StatusCode) -> bool| -> Vec<ServerId> {
            let fits = |said: &&Said| said.answer.as_ref().is_ok_and(|reply| fits(reply.status));
            said.iter().filter(fits).map(|said| said.server.clone()).collect()
        };
        match call.route {
            Route::Delete => {
                cluster.note_removed(&who(|status| status.is_success() || status == StatusCode::NOT_FOUND), model);
            }
            Route::Copy => {
                if let Some(copy) = call.peek.destination.as_deref().and_then(ModelName::parse) {
                    cluster.note_installed(&who(|status| status.is_success()), &copy, Some(model));
                }
            }
            _ => said.iter().for_each(|said| cluster.note_loaded(&said.server, model, false)),
        }
    }
}

/// One answer of many.
fn judge(answers: Vec<Said>) -> Result<Reply, Error> {
    let mut done = None;
    let mut missing = None;
    let mut failed = None;
    let mut stranger_failed = None;
    let mut absent = Vec::new();
    for Said { server, holds, answer } in answers {
        match answer {
            Ok(reply) if reply.status.is_success() => done = done.or(Some(Ok(reply))),
            Ok(reply) if reply.status == StatusCode::NOT_FOUND => missing = missing.or(Some(Ok(reply))),
            other => {
                absent.push(server);
                let place = if holds { &mut failed } else { &mut stranger_failed };
                *place = place.take().or(Some(other));
            }
        }
    }
    let none = || Err(Error::NoServer("the proxy has no servers".to_owned()));
    let mut reply = failed.or(done).or(stranger_failed).or(missing).unwrap_or_else(none)?;
    reply.body.outcome_mut().absent = absent;
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderMap;

    /// Judges statuses; one below zero is of a server that was not known to have the model.
    fn status(answers: &[i16]) -> (u16, usize) {
        let answers = answers.iter().enumerate().map(|(at, status)| {
            let code = StatusCode::from_u16(status.unsigned_abs()).unwrap();
            let answer = Ok(Reply::full(code, HeaderMap::new(), ""));
            Said { server: ServerId::new(&at.to_string()), holds: *status > 0, answer }
        });
        let reply = judge(answers.collect()).unwrap();
        (reply.status.as_u16(), reply.body.outcome().absent.len())
    }

    #[test]
    fn one_answer_stands_for_all() {
        assert_eq!(status(&[200, 200]), (200, 0));
        assert_eq!(status(&[404, 200]), (200, 0));
        assert_eq!(status(&[404, 404]), (404, 0));
        assert_eq!(status(&[200, 500, 400]), (500, 2));
    }

    #[test]
    fn who_was_not_known_to_have_the_model_does_not_spoil_it() {
        assert_eq!(status(&[200, -404]), (200, 0));
        assert_eq!(status(&[-500, 200]), (200, 1));
        assert_eq!(status(&[-404, -500]), (500, 1));
    }
}
