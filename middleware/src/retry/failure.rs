//! Which answers are failures of their server, so that another may do better, and which stand.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;

use super::Rules;
use super::whole::{self, Begun};
use crate::call::{Call, Reply};
use crate::circuit::Limits;
use crate::cluster::Server;
use crate::error::{Error, Phase};
use crate::names::ServerId;
use crate::runner::Runner;

/// What Ollama says with status 500, or in a stream, when it is not the request that is wrong but its own runner, its
/// memory or its file: `llm/llama_server.go`, `llm/server.go`, and in the last two llama.cpp.
const TROUBLE: [&str; 13] = [
    "an error was encountered while running the model",
    "model runner has unexpectedly stopped",
    "llama-server process has terminated",
    "llama-server process no longer running",
    "llama runner process has terminated",
    "error reading llama-server",
    "llama-server reported out-of-memory",
    "unexpected server status",
    "timed out waiting for llama",
    "model requires more system memory",
    "cudaMalloc failed",
    "exceeds file size",
    "invalid file magic",
];

/// A server failed to answer.
#[derive(Debug)]
pub(super) struct Failure {
    /// Which.
    pub(super) server: ServerId,
    /// The word for it.
    pub(super) cause: &'static str,
    /// Whether it failed on a connection that had been used before.
    pub(super) reused: bool,
    /// Whether the same server may be reached on a fresh connection.
    pub(super) may_be_reached: bool,
}

/// Whether an error text tells of the server's own trouble.
pub(super) fn is_trouble(text: &[u8]) -> bool {
    TROUBLE.iter().any(|words| memchr::memmem::find(text, words.as_bytes()).is_some())
}

/// What a server that says nothing for too long has done.
pub(super) fn silent(server: ServerId, limits: &Limits) -> Error {
    let source = format!("no answer after {} s", limits.hang.as_secs()).into();
    Error::Server { server, phase: Phase::Waiting, reused: false, source }
}

impl Rules {
    /// Looks whether an answer is a failure. One that comes in one piece is waited for. (The call is borrowed for writing
    /// since it may not be shared between threads.)
    pub(super) async fn look(
        &self,
        answer: Result<Reply, Error>,
        call: &mut Call,
    ) -> (Result<Reply, Error>, Option<Failure>) {
        match answer {
            Ok(reply) if is_elsewhere(reply.status) => {
                let failure = of_reply(&reply, "busy");
                (Ok(reply), failure)
            }
            Ok(reply) if reply.status == StatusCode::INTERNAL_SERVER_ERROR && call.route.infers() => {
                let Begun { reply, first, .. } = whole::begin(reply).await;
                if !is_trouble(&first) {
                    return (Ok(reply), None);
                }
                let failure = of_reply(&reply, "server-error");
                self.note_trouble(call, failure.as_ref().map(|failure| &failure.server));
                (Ok(reply), failure)
            }
            Ok(reply) if reply.status.is_success() && call.route.infers() && !reply.is_stream() => {
                let Begun { reply, broken, .. } = whole::begin(reply).await;
                let failure = broken.and_then(|kind| of_reply(&reply, kind));
                (Ok(reply), failure)
            }
            Err(error) => {
                let failure = of_error(&error, call);
                (Err(error), failure)
            }
            reply => (reply, None),
        }
    }

    /// Tells the circuit of a model that its server has failed it, by its own words.
    pub(super) fn note_trouble(&self, call: &Call, server: Option<&ServerId>) {
        let index = server.and_then(|server| call.candidates.index_of(server));
        if let Some(server) = index.and_then(|index| call.candidates.snapshot().servers.get(index)) {
            let runner = runner(call, server);
            let name = call.known.as_ref().map(|known| &known.name);
            server.record.bad(runner.as_ref(), &"the server tells of trouble with the model");
            server.circuits.failed(name.zip(runner.as_deref()), &self.limits);
        }
    }
}

/// The runner on a server that a call is about, if it was ever needed.
pub(super) fn runner(call: &Call, server: &Server) -> Option<Arc<Runner>> {
    call.known.as_ref().filter(|_| call.route.infers())?.runners.used(server)
}

fn of_reply(reply: &Reply, cause: &'static str) -> Option<Failure> {
    let server = reply.body.outcome().servers.last()?.clone();
    Some(Failure { server, cause, reused: false, may_be_reached: false })
}

fn of_error(error: &Error, call: &Call) -> Option<Failure> {
    let Error::Server { server, phase, reused, .. } = error else { return None };
    // What may have been done already is done again only if that does no harm.
    let may_be_done = *phase == Phase::Waiting && !reused;
    if !error.is_retryable() || (may_be_done && !call.route.is_idempotent()) {
        return None;
    }
    let may_be_reached = *phase == Phase::Connecting || *reused;
    Some(Failure { server: server.clone(), cause: error.kind(), reused: *reused, may_be_reached })
}

/// Whether a status says that another server may do better. What a server says of the request itself stands.
fn is_elsewhere(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
}

/// An error line of a server in trouble.
pub(super) fn is_error_line(line: &Bytes) -> bool {
    line.starts_with(b"{\"error\":") && is_trouble(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_request_itself_got_wrong_is_no_trouble_of_the_server() {
        for text in [
            "option \"num_predict\" must be of type integer",
            "template: :1: unclosed action",
            "tools param requires --jinja flag",
        ] {
            assert!(!is_trouble(text.as_bytes()), "{text}");
        }
        let died = "{\"error\":\"an error was encountered while running the model: unexpected EOF\"}\n";
        assert!(is_error_line(&Bytes::from_static(died.as_bytes())));
    }
}
