//! Tells the log what was asked and how it ended, and the client which id to quote.
//!
//! Belongs outermost: what other layers refuse is told too. The line is written when the *body* ends.

use std::fmt;
use std::task::{Context, Poll};

use http::StatusCode;
use serde::Deserialize;
use std::sync::Arc;
use tower::{Layer, Service};

use crate::call::{Answer, Call, End, Head, Outcome, Reply, RequestId, Watcher};
use crate::error::Error;

/// The `[trace]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Whether each request gets a line in the log when its answer is over.
    pub access_log: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { access_log: true }
    }
}

/// Puts [`Trace`] around a service.
#[derive(Clone, Debug)]
pub struct TraceLayer {
    access_log: bool,
}

impl TraceLayer {
    /// Logs as configured.
    pub fn new(config: &Config) -> Self {
        Self { access_log: config.access_log }
    }
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Trace { inner, access_log: self.access_log }
    }
}

/// Names every reply after its request, and logs it.
#[derive(Clone, Debug)]
pub struct Trace<S> {
    inner: S,
    access_log: bool,
}

impl<S> Service<Call> for Trace<S>
where
    S: Service<Call, Response = Reply, Error = Error>,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let line = Line { head: call.head.clone(), status: StatusCode::OK, wanted: self.access_log, answered: false };
        let reply = self.inner.call(call);
        Box::pin(follow(line, reply))
    }
}

async fn follow(mut line: Line, reply: impl Future<Output = Result<Reply, Error>>) -> Result<Reply, Error> {
    let answer = reply.await;
    line.answered = true;
    match answer {
        Ok(mut reply) => {
            reply.headers.insert(RequestId::HEADER, line.head.id.header());
            line.status = reply.status;
            Ok(if line.wanted { reply.watch(line) } else { reply })
        }
        Err(error) => {
            line.status = error.status();
            line.write(error.kind(), &Outcome::default());
            tracing::warn!(id = %line.head.id, %error, "request failed");
            Err(error)
        }
    }
}

/// What the log will say.
struct Line {
    head: Arc<Head>,
    status: StatusCode,
    wanted: bool,
    answered: bool,
}

impl Line {
    fn write(&self, end: &str, outcome: &Outcome) {
        if !self.wanted {
            return;
        }
        // One message instead of a dozen fields: the same text for a third of the work.
        tracing::info!(target: "olol::access", "{}", Told { line: self, end, outcome });
    }
}

/// A line of the access log, in logfmt.
struct Told<'a> {
    line: &'a Line,
    end: &'a str,
    outcome: &'a Outcome,
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (head, outcome) = (&self.line.head, self.outcome);
        f.write_str("id=")?;
        f.write_str(head.id.as_str())?;
        if let Some(client) = head.client {
            write!(f, " client={client}")?;
        }
        f.write_str(" method=")?;
        f.write_str(head.method.as_str())?;
        f.write_str(" path=")?;
        f.write_str(head.path.as_str())?;
        if let Some(model) = &head.peek.model {
            // In quotes, and escaped: it is whatever the client wrote.
            write!(f, " model={model:?}")?;
        }
        write!(f, " status={}", self.line.status.as_str())?;
        if let Some(server) = outcome.servers.last() {
            f.write_str(" server=")?;
            f.write_str(server.as_str())?;
        }
        let (ms, tokens) = (head.arrived.elapsed().as_millis(), outcome.counters.unwrap_or_default().output_tokens);
        write!(f, " attempts={} ms={ms} tokens={tokens} end={:?}", outcome.attempts, self.end)
    }
}

impl Watcher for Line {
    fn end(&mut self, end: End, outcome: &Outcome) {
        let word = match end {
            End::Whole => "whole",
            End::Broken(kind) => kind,
            End::Dropped => "client-left",
        };
        self.write(word, outcome);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Dropped while nobody had answered: the client left.
        if !self.answered {
            self.status = StatusCode::from_u16(499).unwrap_or_default();
            self.write("client-left", &Outcome::default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, ask};

    #[tokio::test]
    async fn a_reply_carries_the_id_of_its_request() {
        let (mut service, mut inner) = testing::spawn(&TraceLayer::new(&Config::default()));
        let call = testing::call("tiny").await;
        let id = call.id.clone();
        let answer = ask(&mut service, call);
        inner.next_request().await.unwrap().1.send_response(testing::reply("hi"));
        assert_eq!(answer.await.unwrap().headers["x-olol-request"], id.as_str());
    }

    #[tokio::test]
    async fn an_error_passes_unchanged() {
        let (mut service, mut inner) = testing::spawn(&TraceLayer::new(&Config::default()));
        let answer = ask(&mut service, testing::call("tiny").await);
        inner.next_request().await.unwrap().1.send_error(Error::Busy);
        assert!(matches!(answer.await, Err(Error::Busy)));
    }
}
