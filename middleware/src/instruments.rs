//! Every metric: name, labels, help, buckets, and a function to record it. Layers call these, never the macros.
//!
//! Labels are closed sets: routes, status codes, models that a server has, servers. Nothing that a client typed.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use metrics::{
    Counter, Histogram, Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::affinity::{Placed, Source};
use crate::call::Counters;
use crate::cluster::State;
use crate::error::Error;
use crate::keys::Keys;
use crate::names::{ModelName, ServerId};
use crate::rate_limit;
use crate::route::Route;
use crate::runner::Cause;
use crate::shared::Shared;
use crate::slots::Priority;

const REQUESTS: &str = "olol_requests_total";
const DURATION: &str = "olol_request_duration_seconds";
const FIRST_TOKEN: &str = "olol_time_to_first_token_seconds";
const TOKENS: &str = "olol_tokens_total";
const ENDED: &str = "olol_answers_ended_total";
const ERRORS: &str = "olol_errors_total";
const RETRIES: &str = "olol_retries_total";
const HEDGES: &str = "olol_hedges_total";
const DISTRIBUTED: &str = "olol_distributed_total";
const TIMEOUTS: &str = "olol_timeouts_total";
const ALIASED: &str = "olol_aliased_total";
const ALIAS_RULES: &str = "olol_alias_rules_total";
const QUANT_SUBSTITUTIONS: &str = "olol_quant_substitutions_total";
const QUANT_FETCHES: &str = "olol_quant_fetches_total";
const PREDICTION_ERROR: &str = "olol_prediction_error_seconds";
const QUEUE_DEPTH: &str = "olol_queue_depth";
const QUEUE_WAIT: &str = "olol_queue_wait_seconds";
const LOADS: &str = "olol_model_loads_total";
const AUTH: &str = "olol_auth_total";
const KEYS: &str = "olol_keys";
const KEYS_READ: &str = "olol_keys_last_read_successful";
const RATE_LIMITED: &str = "olol_rate_limited_total";
const RATE_LIMIT_ENTRIES: &str = "olol_rate_limit_entries";
const AFFINITY: &str = "olol_affinity_total";
const AFFINITY_ENTRIES: &str = "olol_affinity_entries";
const SERVER_REQUESTS: &str = "olol_server_requests_total";
const SERVER_IN_FLIGHT: &str = "olol_server_in_flight";
const SERVER_UP: &str = "olol_server_up";
const SERVER_MODELS: &str = "olol_server_models";
const SERVER_LOADED: &str = "olol_server_loaded_models";
const RESUMES: &str = "olol_resumes_total";
const CIRCUIT_STATE: &str = "olol_server_circuit_state";
const CIRCUIT_OPENED: &str = "olol_circuit_opened_total";

const RELOADS: &str = "olol_config_reloads_total";
const RELOAD_OK: &str = "olol_config_last_reload_successful";
const RELOADED_AT: &str = "olol_config_last_reload_success_timestamp_seconds";

/// The names of all metrics, for checks of dashboards.
pub const NAMES: &[&str] = &[
    REQUESTS,
    DURATION,
    FIRST_TOKEN,
    TOKENS,
    ENDED,
    ERRORS,
    RETRIES,
    HEDGES,
    DISTRIBUTED,
    TIMEOUTS,
    ALIASED,
    ALIAS_RULES,
    QUANT_SUBSTITUTIONS,
    QUANT_FETCHES,
    PREDICTION_ERROR,
    QUEUE_DEPTH,
    QUEUE_WAIT,
    LOADS,
    AUTH,
    KEYS,
    KEYS_READ,
    RATE_LIMITED,
    RATE_LIMIT_ENTRIES,
    AFFINITY,
    AFFINITY_ENTRIES,
    SERVER_REQUESTS,
    SERVER_IN_FLIGHT,
    SERVER_UP,
    SERVER_MODELS,
    SERVER_LOADED,
    RESUMES,
    CIRCUIT_STATE,
    CIRCUIT_OPENED,
    RELOADS,
    RELOAD_OK,
    RELOADED_AT,
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
    describe_counter!(
        HEDGES,
        Unit::Count,
        "Second tries of late calls: first to answer (won), beaten (lost), in vain (failed), for a client that left \
         (left), and those that were not made (no_budget, no_server, no_slot)"
    );
    describe_counter!(
        DISTRIBUTED,
        Unit::Count,
        "Calls for models that belong on a group of workers, by what became of them (no_group: sent to a server)"
    );
    describe_counter!(
        ALIASED,
        Unit::Count,
        "Calls that asked for another model than they named, by the name or pattern"
    );
    describe_counter!(ALIAS_RULES, Unit::Count, "Calls that a rule has sent to certain servers, by rule");
    describe_counter!(
        QUANT_SUBSTITUTIONS,
        Unit::Count,
        "Calls that were served by another quantization, by the one that was asked for and the one that answered"
    );
    describe_counter!(
        QUANT_FETCHES,
        Unit::Count,
        "Quantizations that nobody had and that were fetched, by how (make, pull) and result (ok, failed)"
    );
    describe_counter!(
        TIMEOUTS,
        Unit::Count,
        "Calls that were given up, by what took too long (first-byte, idle, total)"
    );
    describe_histogram!(
        PREDICTION_ERROR,
        Unit::Seconds,
        "How far the first piece of an answer was from its prediction"
    );
    describe_gauge!(QUEUE_DEPTH, Unit::Count, "Calls that wait for a slot");
    describe_histogram!(QUEUE_WAIT, Unit::Seconds, "How long calls waited for a slot, by priority and outcome");
    describe_counter!(LOADS, Unit::Count, "Calls that made a server load a model, by cause (cold, options)");
    describe_counter!(AUTH, Unit::Count, "Requests by what was found of their keys");
    describe_gauge!(KEYS, Unit::Count, "Keys that are known");
    describe_gauge!(KEYS_READ, Unit::Count, "0 if the file of keys has changed and could not be read, else 1");
    describe_counter!(
        RATE_LIMITED,
        Unit::Count,
        "Requests refused by a limit, by whose it is (key, client, model) and what it limits"
    );
    describe_gauge!(RATE_LIMIT_ENTRIES, Unit::Count, "Accounts that limits are reckoned with, by whose they are");
    describe_counter!(
        AFFINITY,
        Unit::Count,
        "Turns of conversations, by what they were known by (header, body, chain) and what became of them (hit, miss, \
         spill: its server had enough, repin: its server could not be asked, none: no history)"
    );
    describe_gauge!(AFFINITY_ENTRIES, Unit::Count, "Links of conversations that are remembered");
    describe_counter!(SERVER_REQUESTS, Unit::Count, "Attempts at a server, by result (ok, failed)");
    describe_gauge!(SERVER_IN_FLIGHT, Unit::Count, "Calls that a server is answering now");
    describe_gauge!(SERVER_UP, Unit::Count, "1 if the server takes calls, 0 if not");
    describe_gauge!(SERVER_MODELS, Unit::Count, "Models on the server's disk");
    describe_gauge!(SERVER_LOADED, Unit::Count, "Models in the server's memory");
    describe_counter!(
        RESUMES,
        Unit::Count,
        "Streams whose server died: gone on elsewhere (ok), not fit for that (refused), tried in vain (failed), nobody there (nobody)"
    );
    describe_gauge!(CIRCUIT_STATE, Unit::Count, "Circuit of a server: 0 closed, 1 open (left alone), 2 half-open");
    describe_counter!(CIRCUIT_OPENED, Unit::Count, "Circuits that opened, by server and scope (server, model)");
    describe_counter!(RELOADS, Unit::Count, "Times that the configuration was read again, by result (ok, failed)");
    describe_gauge!(RELOAD_OK, Unit::Count, "1 if the configuration was good when it was last read, 0 if not");
    describe_gauge!(RELOADED_AT, Unit::Seconds, "When the configuration that is in use was read, seconds since 1970");
}

/// The metrics that are not of one server or one model. Handles are made once, at first use.
#[derive(Debug, Default)]
pub struct Instruments {
    requests: [[OnceLock<Counter>; CODES.len() + 1]; Route::ALL.len()],
    durations: [OnceLock<Histogram>; Route::ALL.len()],
    ended: [OnceLock<Counter>; 3],
    knocks: [OnceLock<Counter>; Knock::ALL.len()],
    placed: [[OnceLock<Counter>; Placed::ALL.len()]; Source::ALL.len()],
    hedged: [OnceLock<Counter>; Hedged::ALL.len()],
    distributed: OnceLock<Counter>,
}

/// What became of a second try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hedged {
    /// It was the first to answer.
    Won,
    /// The first try was.
    Lost,
    /// It failed.
    Failed,
    /// The client left before either had answered.
    Left,
    /// It was not made: there had been too many.
    NoBudget,
    /// It was not made: nobody else could answer.
    NoServer,
    /// It was not made: those who could were busy.
    NoSlot,
}

impl Hedged {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Won, Self::Lost, Self::Failed, Self::Left, Self::NoBudget, Self::NoServer, Self::NoSlot];

    /// The word for the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Won => "won",
            Self::Lost => "lost",
            Self::Failed => "failed",
            Self::Left => "left",
            Self::NoBudget => "no_budget",
            Self::NoServer => "no_server",
            Self::NoSlot => "no_slot",
        }
    }
}

/// What `auth` found of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knock {
    /// No key, and none is needed.
    Anonymous,
    /// A key that allows what is asked.
    Known,
    /// No key where one is needed.
    Missing,
    /// A key that is not known.
    Unknown,
    /// A key whose time is over.
    Expired,
    /// A key that does not allow what is asked.
    Forbidden,
}

impl Knock {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Anonymous, Self::Known, Self::Missing, Self::Unknown, Self::Expired, Self::Forbidden];

    /// The word for the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Known => "known",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Forbidden => "forbidden",
        }
    }
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

    /// A request was looked at by `auth`.
    pub fn knocked(&self, knock: Knock) {
        self.knocks[knock as usize].get_or_init(|| counter!(AUTH, "result" => knock.as_str())).increment(1);
    }

    /// A limit was reached: whose (`key`, `client`, `model`), and which.
    pub fn rate_limited(&self, scope: &'static str, kind: rate_limit::Kind) {
        counter!(RATE_LIMITED, "scope" => scope, "kind" => kind.as_str()).increment(1);
    }

    /// A turn of a conversation was answered.
    pub fn placed(&self, source: Source, placed: Placed) {
        self.placed[source as usize][placed as usize]
            .get_or_init(|| counter!(AFFINITY, "source" => source.as_str(), "result" => placed.as_str()))
            .increment(1);
    }

    /// Another attempt is made.
    pub fn retried(&self, cause: &'static str) {
        counter!(RETRIES, "cause" => cause).increment(1);
    }

    /// A second try is over, or was not made.
    pub fn hedged(&self, how: Hedged) {
        self.hedge_counter(how).increment(1);
    }

    fn hedge_counter(&self, how: Hedged) -> &Counter {
        self.hedged[how as usize].get_or_init(|| counter!(HEDGES, "result" => how.as_str()))
    }

    /// A call belongs to a group of workers, and there is none.
    pub fn found_no_group(&self) {
        self.no_group_counter().increment(1);
    }

    fn no_group_counter(&self) -> &Counter {
        self.distributed.get_or_init(|| counter!(DISTRIBUTED, "result" => "no_group"))
    }

    /// Makes known what is counted seldom, before it ever was: so that it can be seen that it was not.
    fn begin_at_zero(&self) {
        for how in Hedged::ALL {
            self.hedge_counter(how).increment(0);
        }
        self.no_group_counter().increment(0);
    }

    /// A stream broke off; what came of it.
    pub fn resumed(&self, result: &'static str) {
        counter!(RESUMES, "result" => result).increment(1);
    }
}

/// The first piece of an answer came so much earlier or later than it was predicted.
pub fn predicted(error: Duration) {
    static ERRORS: OnceLock<Histogram> = OnceLock::new();
    ERRORS.get_or_init(|| histogram!(PREDICTION_ERROR)).record(error.as_secs_f64());
}

/// What came of a wait for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The call was sent.
    Served,
    /// The queue was full.
    Full,
    /// It took longer than it may.
    TooLong,
    /// The client left.
    Left,
}

/// A call has waited for a slot.
pub fn queued(priority: Priority, how: Waited, after: Duration) {
    let outcome = match how {
        Waited::Served => "served",
        Waited::Full => "full",
        Waited::TooLong => "too-long",
        Waited::Left => "left",
    };
    histogram!(QUEUE_WAIT, "priority" => priority.as_str(), "outcome" => outcome).record(after.as_secs_f64());
}

/// Counts how often a name or a rule of the configuration was used.
#[derive(Debug)]
pub struct UseMeter {
    metric: &'static str,
    label: Label,
    counter: OnceLock<Counter>,
}

impl UseMeter {
    /// For a name that stands for a model.
    pub fn alias(name: Arc<str>) -> Self {
        Self { metric: ALIASED, label: Label::new("name", name), counter: OnceLock::new() }
    }

    /// For a rule that says which servers come first.
    pub fn rule(rule: Arc<str>) -> Self {
        Self { metric: ALIAS_RULES, label: Label::new("rule", rule), counter: OnceLock::new() }
    }

    /// It was used.
    pub fn used(&self) {
        self.counter.get_or_init(|| counter!(self.metric, vec![self.label.clone()])).increment(1);
    }
}

/// A call was served by another quantization than it asked for. Both are of the levels that are known.
pub fn quant_substituted(from: &'static str, to: &'static str) {
    counter!(QUANT_SUBSTITUTIONS, "from" => from, "to" => to).increment(1);
}

/// A quantization that nobody had was made or pulled, or could not be.
pub fn quant_fetched(how: &'static str, is_good: bool) {
    counter!(QUANT_FETCHES, "how" => how, "result" => if is_good { "ok" } else { "failed" }).increment(1);
}

/// A call is given up, since something took too long.
pub fn timed_out(phase: &'static str) {
    counter!(TIMEOUTS, "phase" => phase).increment(1);
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

    /// A call makes a server load the model.
    pub fn load(&self, cause: Cause) {
        counter!(LOADS, vec![Label::new("model", self.label.clone()), Label::new("cause", cause.as_str())])
            .increment(1);
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
pub fn observe(shared: &Shared) {
    let snapshot = shared.cluster.snapshot();
    shared.instruments.begin_at_zero();
    gauge!(QUEUE_DEPTH).set(shared.queue.len() as f64);
    observe_keys(&shared.keys);
    observe_limits(&shared.limits);
    gauge!(AFFINITY_ENTRIES).set(shared.affinity.len() as f64);
    for server in &snapshot.servers {
        let label = || vec![Label::new("server", server.id.shared())];
        gauge!(SERVER_IN_FLIGHT, label()).set(f64::from(server.load.in_flight()));
        gauge!(SERVER_UP, label()).set(f64::from(u8::from(server.state == State::Up)));
        gauge!(SERVER_MODELS, label()).set(server.report.models.len() as f64);
        gauge!(SERVER_LOADED, label()).set(server.report.loaded.len() as f64);
        gauge!(CIRCUIT_STATE, label()).set(f64::from(server.circuits.server_state()));
    }
}

/// The configuration was read again, and is good or not.
pub fn reloaded(is_good: bool) {
    counter!(RELOADS, "result" => if is_good { "ok" } else { "failed" }).increment(1);
}

/// Sets what is known of the configuration: whether it was good when it was last read, and when the one in use was read.
/// Call before a scrape.
pub fn observe_config(is_good: bool, read_at: SystemTime) {
    let since = read_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    gauge!(RELOAD_OK).set(f64::from(u8::from(is_good)));
    gauge!(RELOADED_AT).set(since.as_secs_f64());
}

/// The same of the keys of clients.
#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 keys")]
fn observe_keys(keys: &Keys) {
    gauge!(KEYS).set(keys.count() as f64);
    gauge!(KEYS_READ).set(f64::from(u8::from(keys.are_current())));
}

/// The same of the accounts of `rate-limit`.
#[expect(clippy::cast_precision_loss, reason = "their number is bounded far below 2^52")]
fn observe_limits(ledger: &rate_limit::Ledger) {
    for (scope, accounts) in ledger.accounts() {
        gauge!(RATE_LIMIT_ENTRIES, "scope" => scope).set(accounts as f64);
    }
}
