//! Tells the log what was asked and how it ended, and the client which id to quote.
//!
//! Belongs outermost: what other layers refuse is told too. The line is written when the *body* ends.

use std::fmt;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use http::StatusCode;
use serde::Deserialize;
use std::sync::Arc;
use tower::{Layer, Service};

use crate::call::{Answer, Call, End, Head, Outcome, Reply, RequestId, Watcher};
use crate::error::Error;

/// The target of the lines of the access log: what a filter names, and what a formatter may treat apart.
pub const ACCESS: &str = "olol::access";

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
        let head = &self.head;
        let counters = outcome.counters.unwrap_or_default();
        tracing::info!(
            target: ACCESS,
            id = %head.id,
            client = head.client.map(|client| tracing::field::display(Shown(client))),
            method = %head.method,
            path = %head.path.as_str(),
            model = head.peek.model.as_deref(),
            status = self.status.as_u16(),
            server = outcome.servers.last().map(tracing::field::display),
            attempts = outcome.attempts,
            ms = u64::try_from(head.arrived.elapsed().as_millis()).unwrap_or(u64::MAX),
            tokens = counters.output_tokens,
            end,
        );
    }
}

/// An address, written without the padding that the standard library provides for and pays for.
struct Shown(SocketAddr);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SocketAddr::V4(address) = self.0 else { return self.0.fmt(f) };
        let mut buffer = itoa::Buffer::new();
        for (at, part) in address.ip().octets().into_iter().enumerate() {
            f.write_str(if at == 0 { "" } else { "." })?;
            f.write_str(buffer.format(part))?;
        }
        f.write_str(":")?;
        f.write_str(buffer.format(address.port()))
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
