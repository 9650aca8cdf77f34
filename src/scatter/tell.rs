//! Deletes, copies and unloads: told to every server that they concern.
//!
//! 200 if every holder did it; 404 only if nobody has the model; else the body of the first failure, and who failed.

use futures_util::future::join_all;
use http::StatusCode;
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Error, Reply, Route, ServerId};

use super::{LONGEST, News, Scatter, holders};

impl<F: Fleet> Scatter<F> {
    /// Tells everybody concerned and makes one answer of theirs.
    pub(super) async fn tell(self, call: Call) -> Result<Reply, Error> {
        let is_unload = !matches!(call.route, Route::Delete | Route::Copy);
        let mut targets = if is_unload {
            call.candidates.iter().cloned().collect()
        } else {
            holders(&call.candidates, call.model.as_ref())
        };
        if targets.is_empty() {
            // Nobody is known to have it: everybody is asked, since what is known may be old.
            targets.clone_from(&call.candidates.snapshot().servers);
        }
        let news = News { cluster: self.shared.cluster.clone(), servers: targets.clone() };
        let answers = join_all(targets.iter().map(|server| {
            let call = call.again();
            let scatter = &self;
            async move {
                let Some(call) = call else { return Err(Error::Internal("the body cannot be sent to several servers".to_owned())) };
                let mut reply = scatter.to(call, server).await?;
                // Short answers: read now, so that one which breaks off counts as failed.
                let body = std::mem::replace(&mut reply.body, olol_middleware::call::Body::empty());
                let outcome = body.outcome.clone();
                let bytes = body.collect(LONGEST).await?;
                let mut whole = Reply::full(reply.status, reply.headers, bytes);
                whole.body.outcome = outcome;
                Ok(whole)
            }
        }))
        .await;
        if let (Some(model), true) = (&call.model, is_unload) {
            targets.iter().for_each(|server| self.shared.cluster.note_loaded(&server.id, model, false));
        }
        let answers: Vec<(ServerId, Result<Reply, Error>)> = targets.iter().map(|server| server.id.clone()).zip(answers).collect();
        Ok(judge(answers)?.hold(news))
    }
}

/// One answer of many.
fn judge(answers: Vec<(ServerId, Result<Reply, Error>)>) -> Result<Reply, Error> {
    let mut done = None;
    let mut missing = None;
    let mut failed = None;
    let mut absent = Vec::new();
    for (server, answer) in answers {
        match answer {
            Ok(reply) if reply.status.is_success() => done = done.or(Some(reply)),
            Ok(reply) if reply.status == StatusCode::NOT_FOUND => missing = missing.or(Some(Ok(reply))),
            other => {
                absent.push(server);
                failed = failed.or(Some(other));
            }
        }
    }
    let none = || Err(Error::NoServer("the proxy has no servers".to_owned()));
    let mut reply = match (failed, done, missing) {
        (Some(failed), ..) => failed,
        (None, Some(done), _) => Ok(done),
        (None, None, missing) => missing.unwrap_or_else(none),
    }?;
    reply.body.outcome.absent = absent;
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderMap;

    fn status(answers: &[u16]) -> (u16, usize) {
        let answers = answers.iter().enumerate().map(|(at, status)| {
            let reply = Reply::full(StatusCode::from_u16(*status).unwrap(), HeaderMap::new(), "");
            (ServerId::new(&at.to_string()), Ok(reply))
        });
        let reply = judge(answers.collect()).unwrap();
        (reply.status.as_u16(), reply.body.outcome.absent.len())
    }

    #[test]
    fn one_answer_stands_for_all() {
        assert_eq!(status(&[200, 200]), (200, 0));
        assert_eq!(status(&[404, 200]), (200, 0));
        assert_eq!(status(&[404, 404]), (404, 0));
        assert_eq!(status(&[200, 500, 400]), (500, 2));
    }
}
