//! Every metric: name, labels, help, buckets, and a function to record it. Layers call these, never the macros.
//!
//! Labels are closed sets: routes, status codes, models that a server has, servers. Nothing that a client typed.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics::{
    Counter, Histogram, Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::call::Counters;
use crate::cluster::{Snapshot, State};
use crate::error::Error;
use crate::names::{ModelName, ServerId};
use crate::route::Route;

const REQUESTS: &str = "olol_requests_total";
const DURATION: &str = "olol_request_duration_seconds";
const FIRST_TOKEN: &str = "olol_time_to_first_token_seconds";
const TOKENS: &str = "olol_tokens_total";
const ENDED: &str = "olol_answers_ended_total";
const ERRORS: &str = "olol_errors_total";
const RETRIES: &str = "olol_retries_total";
const SERVER_REQUESTS: &str = "olol_server_requests_total";
const SERVER_IN_FLIGHT: &str = "olol_server_in_flight";
const SERVER_UP: &str = "olol_server_up";
const SERVER_MODELS: &str = "olol_server_models";
const SERVER_LOADED: &str = "olol_server_loaded_models";
const RESUMES: &str = "olol_resumes_total";
const CIRCUIT_STATE: &str = "olol_server_circuit_state";
const CIRCUIT_OPENED: &str = "olol_circuit_opened_total";

/// The names of all metrics, for checks of dashboards.
pub const NAMES: [&str; 15] = [
    REQUESTS,
    DURATION,
    FIRST_TOKEN,
    TOKENS,
    ENDED,
    ERRORS,
    RETRIES,
    SERVER_REQUESTS,
    SERVER_IN_FLIGHT,
    SERVER_UP,
    SERVER_MODELS,
    SERVER_LOADED,
    RESUMES,
    CIRCUIT_STATE,
    CIRCUIT_OPENED,
];

/// Upper bounds of the buckets of every histogram, seconds: from a cache hit to a model that loads for minutes.
pub const BUCKETS: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0];

/// Status codes that have a label of their own.
const CODES: [u16; 20] =
    [200, 201, 204, 301, 307, 400, 401, 403, 404, 405, 408, 413, 429, 499, 500, 502, 503, 504, 507, 508];

/// Tells the recorder what the metrics mean. Call once after it was installed.
pub fn describe() {
    describe_counter!(REQUESTS, Unit::Count, "Requests of clients, by route and status code");
    describe_histogram!(DURATION, Unit::Seconds, "Time from a request to the end of its answer");
    describe_histogram!(FIRST_TOKEN, Unit::Seconds, "Time from a request to the first piece of its answer, by model");
    describe_counter!(TOKENS, Unit::Count, "Tokens as servers counted them, by model and kind (prompt, output)");
    describe_counter!(ENDED, Unit::Count, "Answers by how they ended: whole, broken, dropped (the client left)");
    describe_counter!(ERRORS, Unit::Count, "Errors that the proxy answered itself, by reason");
    describe_counter!(RETRIES, Unit::Count, "Attempts after the first, by what made the one before fail");
    describe_counter!(SERVER_REQUESTS, Unit::Count, "Attempts at a server, by result (ok, failed)");
    describe_gauge!(SERVER_IN_FLIGHT, Unit::Count, "Calls that a server is answering now");
    describe_gauge!(SERVER_UP, Unit::Count, "1 if the server takes calls, 0 if not");
    describe_gauge!(SERVER_MODELS, Unit::Count, "Models on the server's disk");
    describe_gauge!(SERVER_LOADED, Unit::Count, "Models in the server's memory");
    describe_counter!(
        RESUMES,
        Unit::Count,
        "Streams whose server died: gone on elsewhere (ok), not fit for that (refused), tried in vain (failed)"
    );
    describe_gauge!(CIRCUIT_STATE, Unit::Count, "Circuit of a server: 0 closed, 1 open (left alone), 2 half-open");
    describe_counter!(CIRCUIT_OPENED, Unit::Count, "Circuits that opened, by server and scope (server, model)");
}

/// The metrics that are not of one server or one model. Handles are made once, at first use.
#[derive(Debug, Default)]
pub struct Instruments {
    requests: [[OnceLock<Counter>; CODES.len() + 1]; Route::ALL.len()],
    durations: [OnceLock<Histogram>; Route::ALL.len()],
    ended: [OnceLock<Counter>; 3],
}

impl Instruments {
    /// A request has its status.
    pub fn answered(&self, route: Route, status: u16) {
        let code = CODES.iter().position(|code| *code == status);
        self.requests[route as usize][code.unwrap_or(CODES.len())]
            .get_or_init(|| {
                let code = code.map_or_else(|| "other".to_owned(), |code| CODES[code].to_string());
                counter!(REQUESTS, "route" => route.as_str(), "code" => code)
            })
            .increment(1);
    }

    /// An answer is over; how, and how long after the request.
    pub fn ended(&self, route: Route, how: crate::call::End, after: Duration) {
        use crate::call::End;
        let (at, word) = match how {
            End::Whole => (0, "whole"),
            End::Broken(_) => (1, "broken"),
            End::Dropped => (2, "dropped"),
        };
        self.ended[at].get_or_init(|| counter!(ENDED, "end" => word)).increment(1);
        self.durations[route as usize]
            .get_or_init(|| histogram!(DURATION, "route" => route.as_str()))
            .record(after.as_secs_f64());
    }

    /// The proxy answers with an error of its own.
    pub fn refused(&self, error: &Error) {
        counter!(ERRORS, "reason" => error.kind()).increment(1);
    }

    /// Another attempt is made.
    pub fn retried(&self, cause: &'static str) {
        counter!(RETRIES, "cause" => cause).increment(1);
    }

    /// A stream broke off; what came of it.
    pub fn resumed(&self, result: &'static str) {
        counter!(RESUMES, "result" => result).increment(1);
    }
}

/// The metrics of one model.
#[derive(Debug)]
pub struct ModelMeters {
    label: Arc<str>,
    first_token: OnceLock<Histogram>,
    prompt: OnceLock<Counter>,
    output: OnceLock<Counter>,
}

impl ModelMeters {
    /// For a model that a server has.
    pub fn new(model: &ModelName) -> Self {
        let label = model.as_str().into();
        Self { label, first_token: OnceLock::new(), prompt: OnceLock::new(), output: OnceLock::new() }
    }

    /// The first piece of an answer came.
    pub fn first_token(&self, after: Duration) {
        self.first_token
            .get_or_init(|| histogram!(FIRST_TOKEN, vec![Label::new("model", self.label.clone())]))
            .record(after.as_secs_f64());
    }

    /// A server told its counts.
    pub fn tokens(&self, counters: &Counters) {
        let handle = |kind| counter!(TOKENS, vec![Label::new("model", self.label.clone()), Label::new("kind", kind)]);
        self.prompt.get_or_init(|| handle("prompt")).increment(counters.prompt_tokens);
        self.output.get_or_init(|| handle("output")).increment(counters.output_tokens);
    }
}

/// The metrics of one server.
#[derive(Debug)]
pub struct ServerMeters {
    label: Arc<str>,
    answered: OnceLock<Counter>,
    failed: OnceLock<Counter>,
}

impl ServerMeters {
    /// For a configured server.
    pub fn new(server: &ServerId) -> Self {
        Self { label: server.shared(), answered: OnceLock::new(), failed: OnceLock::new() }
    }

    /// An attempt had an answer, or not.
    pub fn attempt(&self, answered: bool) {
        let (cell, word) = if answered { (&self.answered, "ok") } else { (&self.failed, "failed") };
        cell.get_or_init(|| {
            counter!(SERVER_REQUESTS, vec![Label::new("server", self.label.clone()), Label::new("result", word)])
        })
        .increment(1);
    }
}

impl ServerMeters {
    /// A circuit has opened: that of the server, or that of one of its models.
    pub fn opened(&self, scope: &'static str) {
        counter!(CIRCUIT_OPENED, vec![Label::new("server", self.label.clone()), Label::new("scope", scope)])
            .increment(1);
    }
}

/// Sets what is read rather than counted. Call before a scrape.
#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 models")]
pub fn observe(snapshot: &Snapshot) {
    for server in &snapshot.servers {
        let label = || vec![Label::new("server", server.id.shared())];
        gauge!(SERVER_IN_FLIGHT, label()).set(f64::from(server.load.in_flight()));
        gauge!(SERVER_UP, label()).set(f64::from(u8::from(server.state == State::Up)));
        gauge!(SERVER_MODELS, label()).set(server.report.models.len() as f64);
        gauge!(SERVER_LOADED, label()).set(server.report.loaded.len() as f64);
        gauge!(CIRCUIT_STATE, label()).set(f64::from(server.circuits.server_state()));
    }
}
