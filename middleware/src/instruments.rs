//! Every metric: name, labels, help, buckets, and a function to record it. Layers call these, never the macros.
//!
//! Labels are closed sets: routes, status codes, models that a server has, servers, names of keys. Nothing that a client
//! typed; and of models and keys only so many are told apart ([`few`]). What is read rather than counted is written at the
//! moment of a scrape ([`observed`]).

mod few;
mod members;
mod observed;
mod page;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use metrics::{Counter, Histogram, Label, Unit, counter, describe_counter, describe_histogram, histogram};

pub use self::members::{LookUp, Probed, lease_ended, looked_up, member_changed, observe_members, probed, proved};
pub use self::observed::{
    Process, Wish, observe, observe_build, observe_config, observe_process, observe_sessions, observe_state,
    observe_wishes,
};
use crate::affinity::{Placed, Source};
use crate::call::{Counters, End};
use crate::cluster::Server;
use crate::error::Error;
use crate::names::{ModelName, ServerId};
use crate::progress::Stage;
use crate::rate_limit;
use crate::route::Route;
use crate::runner::Cause;
use crate::slots::Priority;
use crate::stats::{Health, Stats};

const REQUESTS: &str = "olol_requests_total";
const DURATION: &str = "olol_request_duration_seconds";
const FIRST_TOKEN: &str = "olol_time_to_first_token_seconds";
const PER_TOKEN: &str = "olol_time_per_output_token_seconds";
const GAPS: &str = "olol_inter_chunk_seconds";
const OVERHEAD: &str = "olol_overhead_seconds";
const PROMPT_TOKENS: &str = "olol_prompt_tokens_total";
const OUTPUT_TOKENS: &str = "olol_generation_tokens_total";
const PROMPT_SIZE: &str = "olol_request_prompt_tokens";
const OUTPUT_SIZE: &str = "olol_request_generation_tokens";
const CANCELLED: &str = "olol_cancellations_total";
const BROKEN: &str = "olol_stream_errors_total";
const ENDED: &str = "olol_answers_ended_total";
const ERRORS: &str = "olol_errors_total";
const RETRIES: &str = "olol_retries_total";
const RETRY_BUDGET: &str = "olol_retry_budget";
const NO_BUDGET: &str = "olol_retry_budget_exhausted_total";
const FAILOVERS: &str = "olol_failovers_total";
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
const LOAD_TIME: &str = "olol_model_load_seconds";
const ARRIVALS: &str = "olol_model_arrivals_total";
const AUTH: &str = "olol_auth_total";
const KEYS: &str = "olol_keys";
const CLIENTS: &str = "olol_clients";
const KEYS_READ: &str = "olol_keys_last_read_successful";
const RATE_LIMITED: &str = "olol_rate_limited_total";
const RATE_LIMIT_ENTRIES: &str = "olol_rate_limit_entries";
const AFFINITY: &str = "olol_affinity_total";
const AFFINITY_ENTRIES: &str = "olol_affinity_entries";
const SERVER_REQUESTS: &str = "olol_server_requests_total";
const SERVER_IN_FLIGHT: &str = "olol_server_in_flight";
const SERVER_UP: &str = "olol_server_up";
const SERVER_STATE: &str = "olol_server_state";
const SERVER_ERRORS: &str = "olol_server_error_ratio";
const SERVER_MODELS: &str = "olol_server_models";
const SERVER_LOADED: &str = "olol_server_loaded_models";
const SERVER_CHECKS: &str = "olol_server_health_checks_total";
const MODEL_SERVERS: &str = "olol_model_servers";
const MODEL_LOADED: &str = "olol_server_model_loaded";
const MODEL_VRAM: &str = "olol_server_vram_bytes";
const SLOTS: &str = "olol_server_slots";
const SLOTS_TAKEN: &str = "olol_server_slots_taken";
const SATURATION: &str = "olol_saturation_ratio";
const RESUMES: &str = "olol_resumes_total";
const CIRCUIT_STATE: &str = "olol_server_circuit_state";
const CIRCUIT_OPENED: &str = "olol_circuit_opened_total";

const SERVER_CPU: &str = "olol_server_cpu_ratio";
const SERVER_MEMORY: &str = "olol_server_memory_used_bytes";
const SERVER_MEMORY_TOTAL: &str = "olol_server_memory_total_bytes";
const SERVER_GPU: &str = "olol_server_gpu_ratio";
const SERVER_GPU_MEMORY: &str = "olol_server_gpu_memory_used_bytes";
const SERVER_GPU_MEMORY_TOTAL: &str = "olol_server_gpu_memory_total_bytes";
const SERVER_DISK_FREE: &str = "olol_server_disk_free_bytes";
const SERVER_OTHERS: &str = "olol_server_others_in_flight";
const SESSIONS: &str = "olol_sessions";
const SESSIONS_BYTES: &str = "olol_sessions_bytes";
const SESSION_TURNS: &str = "olol_session_turns_total";
const STATE_UP: &str = "olol_state_up";
const STATE_FAILURES: &str = "olol_state_failures_total";
const SESSION_EVICTIONS: &str = "olol_session_evictions_total";
const WISHED: &str = "olol_desired_replicas";
const WISHED_HELD: &str = "olol_desired_replicas_held";
const WISH_ACTIONS: &str = "olol_desired_actions_total";
const WAKES: &str = "olol_wakes_total";

const JOINS: &str = "olol_joins_total";
const MEMBERS: &str = "olol_servers";
const MEMBERSHIP: &str = "olol_server_membership_total";
const PROOFS: &str = "olol_discovery_proofs_total";
const LEASES: &str = "olol_discovery_leases_ended_total";
const PROBES: &str = "olol_discovery_probes_total";
const LOOK_UPS: &str = "olol_discovery_lookups_total";

const RELOADS: &str = "olol_config_reloads_total";
const RELOAD_OK: &str = "olol_config_last_reload_successful";
const CERTIFICATES: &str = "olol_tls_reloads_total";
const GIVEN_UP: &str = "olol_connections_given_up_total";
const RELOADED_AT: &str = "olol_config_last_reload_success_timestamp_seconds";
const BUILD: &str = "olol_build_info";

const CPU: &str = "process_cpu_seconds_total";
const MEMORY: &str = "process_resident_memory_bytes";
const ADDRESSES: &str = "process_virtual_memory_bytes";
const FILES: &str = "process_open_fds";
const MOST_FILES: &str = "process_max_fds";
const THREADS: &str = "process_threads";
const STARTED: &str = "process_start_time_seconds";

/// The names of all metrics, for checks of dashboards.
pub const NAMES: &[&str] = &[
    REQUESTS,
    DURATION,
    FIRST_TOKEN,
    PER_TOKEN,
    GAPS,
    OVERHEAD,
    PROMPT_TOKENS,
    OUTPUT_TOKENS,
    PROMPT_SIZE,
    OUTPUT_SIZE,
    ENDED,
    CANCELLED,
    BROKEN,
    ERRORS,
    RETRIES,
    RETRY_BUDGET,
    NO_BUDGET,
    FAILOVERS,
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
    LOAD_TIME,
    ARRIVALS,
    AUTH,
    KEYS,
    KEYS_READ,
    CLIENTS,
    RATE_LIMITED,
    RATE_LIMIT_ENTRIES,
    AFFINITY,
    AFFINITY_ENTRIES,
    SERVER_REQUESTS,
    SERVER_IN_FLIGHT,
    SERVER_UP,
    SERVER_STATE,
    SERVER_ERRORS,
    SERVER_MODELS,
    SERVER_LOADED,
    SERVER_CHECKS,
    MODEL_SERVERS,
    MODEL_LOADED,
    MODEL_VRAM,
    SLOTS,
    SLOTS_TAKEN,
    SATURATION,
    RESUMES,
    CIRCUIT_STATE,
    CIRCUIT_OPENED,
    SERVER_CPU,
    SERVER_MEMORY,
    SERVER_MEMORY_TOTAL,
    SERVER_GPU,
    SERVER_GPU_MEMORY,
    SERVER_GPU_MEMORY_TOTAL,
    SERVER_DISK_FREE,
    SERVER_OTHERS,
    JOINS,
    MEMBERS,
    MEMBERSHIP,
    PROOFS,
    LEASES,
    PROBES,
    LOOK_UPS,
    SESSIONS,
    SESSIONS_BYTES,
    SESSION_TURNS,
    SESSION_EVICTIONS,
    STATE_UP,
    STATE_FAILURES,
    WISHED,
    WISHED_HELD,
    WISH_ACTIONS,
    WAKES,
    CERTIFICATES,
    GIVEN_UP,
    RELOADS,
    RELOAD_OK,
    RELOADED_AT,
    BUILD,
    CPU,
    MEMORY,
    ADDRESSES,
    FILES,
    MOST_FILES,
    THREADS,
    STARTED,
];

/// Upper bounds of the buckets of histograms that have none of their own, seconds: up to answers that take hours.
pub const BUCKETS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0];
/// Until something begins: from a cache hit to a model that loads for minutes. vLLM's list.
const WAITS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Between two tokens: from a small model on a large card to a large one without any.
const PACES: &[f64] =
    &[0.0005, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const LOADING: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0];
/// What the proxy itself takes.
const OWN_TIME: &[f64] =
    &[0.000_01, 0.000_02, 0.000_05, 0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1];
/// Powers of four.
const SIZES: &[f64] = &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0];

/// The upper bounds of the buckets of those histograms that have some of their own.
pub const BUCKETS_OF: &[(&str, &[f64])] = &[
    (FIRST_TOKEN, WAITS),
    (QUEUE_WAIT, WAITS),
    (PREDICTION_ERROR, WAITS),
    (PER_TOKEN, PACES),
    (GAPS, PACES),
    (LOAD_TIME, LOADING),
    (OVERHEAD, OWN_TIME),
    (PROMPT_SIZE, SIZES),
    (OUTPUT_SIZE, SIZES),
];

/// Status codes that have a label of their own.
const CODES: [u16; 20] =
    [200, 201, 204, 301, 307, 400, 401, 403, 404, 405, 408, 413, 429, 499, 500, 502, 503, 504, 507, 508];

/// Hundreds of status codes.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// How a model was to come to a server, and whether it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// From a registry.
    Pulled,
    /// From another server.
    Copied,
    /// A registry did not give it, or the server did not take it.
    PullFailed,
    /// It was not copied.
    CopyFailed,
}

/// A model has come to a server, or has not.
pub fn arrived(arrival: Arrival) {
    let result = match arrival {
        Arrival::Pulled => "pulled",
        Arrival::Copied => "copied",
        Arrival::PullFailed => "pull_failed",
        Arrival::CopyFailed => "copy_failed",
    };
    counter!(ARRIVALS, "result" => result).increment(1);
}

/// What the metric of [`arrived`] means.
fn describe_arrivals() {
    describe_counter!(
        ARRIVALS,
        Unit::Count,
        "Models that were to come to a server: from a registry (pulled), from another server (copied), and those that did not \
         (pull_failed, copy_failed)"
    );
}

/// Tells the recorder what the metrics mean. Call once after it was installed.
pub fn describe() {
    describe_counter!(REQUESTS, Unit::Count, "Requests of clients, by route and status code");
    describe_histogram!(DURATION, Unit::Seconds, "Time from a request to the end of its answer, by route and status");
    describe_histogram!(FIRST_TOKEN, Unit::Seconds, "Time from a request to the first piece of a stream");
    describe_histogram!(
        PER_TOKEN,
        Unit::Seconds,
        "Time for a token of a stream after the first: the mean of each stream, by model and server"
    );
    describe_histogram!(GAPS, Unit::Seconds, "Time between two pieces of a stream, by model; one in 64 is measured");
    describe_histogram!(
        OVERHEAD,
        Unit::Seconds,
        "What the proxy itself takes: until a request is sent (request; without waits for the client and for a slot), and \
         for the first piece of a stream (answer)"
    );
    let tokens = "as servers counted them, by model, server and the name of the client's key";
    describe_counter!(PROMPT_TOKENS, Unit::Count, format!("Tokens of prompts {tokens}"));
    describe_counter!(OUTPUT_TOKENS, Unit::Count, format!("Tokens made {tokens}"));
    describe_histogram!(PROMPT_SIZE, Unit::Count, "Tokens of the prompt of a request, by route");
    describe_histogram!(OUTPUT_SIZE, Unit::Count, "Tokens of an answer, by route");
    describe_counter!(
        CANCELLED,
        Unit::Count,
        "Requests whose client left, by where they were (deciding, queued, loading, waiting, streaming)"
    );
    describe_counter!(
        BROKEN,
        Unit::Count,
        "Answers that broke off after their head, before (begun) or after (streaming) their first piece"
    );
    describe_counter!(ENDED, Unit::Count, "Answers by how they ended: whole, broken, dropped (the client left)");
    describe_counter!(ERRORS, Unit::Count, "Errors that the proxy answered itself, by reason");
    describe_counter!(RETRIES, Unit::Count, "Attempts after the first, by what made the one before fail");
    describe_counter!(NO_BUDGET, Unit::Count, "Failures that were passed on, since the budget for retries was spent");
    describe_counter!(FAILOVERS, Unit::Count, "Calls and streams that went on at another server, since theirs failed");
    describe_arrivals();
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
    describe_histogram!(QUEUE_WAIT, Unit::Seconds, "How long calls waited for a slot, by priority and outcome");
    describe_counter!(LOADS, Unit::Count, "Calls that made a server load a model, by cause (cold, options)");
    describe_histogram!(LOAD_TIME, Unit::Seconds, "Time that models took to load, as servers told it");
    describe_counter!(AUTH, Unit::Count, "Requests by what was found of their keys");
    describe_counter!(
        RATE_LIMITED,
        Unit::Count,
        "Requests refused by a limit, by whose it is (key, client, model) and what it limits"
    );
    describe_counter!(
        AFFINITY,
        Unit::Count,
        "Turns of conversations, by what they were known by (header, body, chain) and what became of them (hit, miss, \
         spill: its server had enough, repin: its server could not be asked, none: no history)"
    );
    describe_servers();
    members::describe();
    describe_sessions();
    describe_wishes();
    describe_reloads();
}

/// Who dials in, and what is read again: certificates and the configuration.
fn describe_reloads() {
    describe_counter!(JOINS, Unit::Count, "Connections of agents that dial in: taken, refused, or full at that moment");
    describe_counter!(
        CERTIFICATES,
        Unit::Count,
        "Times that changed certificates were read again, by result (ok, failed)"
    );
    describe_counter!(
        GIVEN_UP,
        Unit::Count,
        "Connections that were closed before anything was asked over them, by why: TLS failed (tls), took too long (slow), room for others or silence (stranger)"
    );
    describe_counter!(RELOADS, Unit::Count, "Times that the configuration was read again, by result (ok, failed)");
}

fn describe_servers() {
    describe_counter!(SERVER_REQUESTS, Unit::Count, "Attempts at a server, by result (ok, failed)");
    describe_counter!(SERVER_CHECKS, Unit::Count, "Times that a server was looked at, by result (ok, failed)");
    describe_counter!(CIRCUIT_OPENED, Unit::Count, "Circuits that opened, by server and scope (server, model)");
    describe_counter!(
        RESUMES,
        Unit::Count,
        "Streams whose server died: gone on elsewhere (ok), not fit for that (refused), tried in vain (failed), nobody there (nobody)"
    );
}

fn describe_sessions() {
    describe_counter!(
        SESSION_TURNS,
        Unit::Count,
        "Turns of sessions: on the disk (stored), of a session that had ended (ended), without an end (broken), not to be \
         written (failed)"
    );
    describe_counter!(
        SESSION_EVICTIONS,
        Unit::Count,
        "Sessions that had to leave, by why: idle for too long (expired), too many (sessions), too much (bytes)"
    );
    describe_counter!(
        STATE_FAILURES,
        Unit::Count,
        "Times that the store that proxies share did not answer, or not in time"
    );
}

fn describe_wishes() {
    describe_counter!(
        WISH_ACTIONS,
        Unit::Count,
        "What was done so that models are where they are wanted (bring, load), by result (ok, failed)"
    );
    describe_counter!(
        WAKES,
        Unit::Count,
        "Servers that were woken: the command or the packet was sent (sent), or could not be (failed)"
    );
}

/// Counters that are there from the beginning, at zero: who has seen none does not see the first.
const AT_ZERO: &[(&str, &str, &[&str])] = &[
    (ENDED, "end", &["whole", "broken", "dropped"]),
    (CANCELLED, "phase", &["deciding", "queued", "loading", "waiting", "streaming"]),
    (BROKEN, "phase", &["begun", "streaming"]),
    (RESUMES, "result", &["ok", "refused", "failed", "nobody"]),
    (TIMEOUTS, "phase", &["first-byte", "idle", "total"]),
    (SESSION_TURNS, "result", &["stored", "ended", "broken", "failed"]),
    (SESSION_EVICTIONS, "why", &["expired", "sessions", "bytes"]),
    (WAKES, "result", &["sent", "failed"]),
    (CERTIFICATES, "result", &["ok", "failed"]),
    (GIVEN_UP, "why", &["tls", "slow", "stranger"]),
    (JOINS, "outcome", &["taken", "refused", "full"]),
    (RELOADS, "result", &["ok", "failed"]),
];

/// Lets the counters that tell of trouble begin at zero. Call once after the recorder was installed.
pub fn begin() {
    for (name, label, values) in AT_ZERO {
        values.iter().for_each(|value| counter!(*name, *label => *value).increment(0));
    }
    for name in [FAILOVERS, NO_BUDGET, STATE_FAILURES] {
        counter!(name).increment(0);
    }
    members::begin();
    for action in ["bring", "load"] {
        for result in ["ok", "failed"] {
            counter!(WISH_ACTIONS, "action" => action, "result" => result).increment(0);
        }
    }
}

/// A model was brought to a server where it is wanted (`bring`), or into its memory (`load`); or could not be.
pub fn wish_action(action: &'static str, is_good: bool) {
    counter!(WISH_ACTIONS, "action" => action, "result" => if is_good { "ok" } else { "failed" }).increment(1);
}

/// A server was sent what wakes it, or that could not be sent.
pub fn woken(is_good: bool) {
    counter!(WAKES, "result" => if is_good { "sent" } else { "failed" }).increment(1);
}

/// A turn of a session is over: `stored`, `ended`, `broken` or `failed`.
pub fn session_turn(result: &'static str) {
    counter!(SESSION_TURNS, "result" => result).increment(1);
}

/// A connection was closed before anything was asked over it: `tls`, `slow` or `stranger`.
pub fn connection_given_up(why: &'static str) {
    counter!(GIVEN_UP, "why" => why).increment(1);
}

/// A session had to leave: `expired`, `sessions` or `bytes`.
pub fn session_evicted(why: &'static str) {
    counter!(SESSION_EVICTIONS, "why" => why).increment(1);
}

/// The store that proxies share did not answer.
pub fn state_failed() {
    counter!(STATE_FAILURES).increment(1);
}

/// The metrics that are not of one server or one model. Handles are made once, at first use.
#[derive(Debug, Default)]
pub struct Instruments {
    requests: [[OnceLock<Counter>; CODES.len() + 1]; Route::ALL.len()],
    durations: [[OnceLock<Histogram>; CLASSES.len()]; Route::ALL.len()],
    sizes: [OnceLock<[Histogram; 2]>; Route::ALL.len()],
    overhead: [OnceLock<Histogram>; 2],
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

    /// An answer with this status is over; how, and how long after the request.
    pub fn ended(&self, route: Route, status: u16, how: End, after: Duration) {
        let (at, word) = match how {
            End::Whole => (0, "whole"),
            End::Broken(_) => (1, "broken"),
            End::Dropped => (2, "dropped"),
        };
        self.ended[at].get_or_init(|| counter!(ENDED, "end" => word)).increment(1);
        let class = usize::from(status / 100).clamp(1, CLASSES.len()) - 1;
        self.durations[route as usize][class]
            .get_or_init(|| histogram!(DURATION, "route" => route.as_str(), "code_class" => CLASSES[class]))
            .record(after.as_secs_f64());
    }

    /// A server told how long prompt and answer were.
    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 tokens")]
    pub fn sized(&self, route: Route, counters: &Counters) {
        let [prompt, output] = self.sizes[route as usize]
            .get_or_init(|| [PROMPT_SIZE, OUTPUT_SIZE].map(|name| histogram!(name, "route" => route.as_str())));
        prompt.record(counters.prompt_tokens as f64);
        output.record(counters.output_tokens as f64);
    }

    /// A request has taken the proxy so long until it was sent.
    pub fn decided(&self, took: Duration) {
        self.overhead[0].get_or_init(|| histogram!(OVERHEAD, "stage" => "request")).record(took.as_secs_f64());
    }

    /// The first piece of a stream has taken the proxy so long.
    pub fn passed_on(&self, took: Duration) {
        self.overhead[1].get_or_init(|| histogram!(OVERHEAD, "stage" => "answer")).record(took.as_secs_f64());
    }

    /// A client left before there was anything of its answer.
    pub fn left(&self, stage: Stage) {
        counter!(CANCELLED, "phase" => stage.as_str()).increment(1);
    }

    /// A client left in the middle of its answer.
    pub fn left_stream(&self) {
        counter!(CANCELLED, "phase" => "streaming").increment(1);
    }

    /// An answer broke off after its head: before or after its first piece.
    pub fn broke(&self, had_begun: bool) {
        counter!(BROKEN, "phase" => if had_begun { "streaming" } else { "begun" }).increment(1);
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

    /// A failure is passed on, since there have been too many retries.
    pub fn spared(&self) {
        counter!(NO_BUDGET).increment(1);
    }

    /// A call or a stream goes on at another server.
    pub fn failed_over(&self) {
        counter!(FAILOVERS).increment(1);
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

/// What came of a connection by which an agent would join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joining {
    /// It is used.
    Taken,
    /// The agent has not proved that it is of the cluster.
    Refused,
    /// There were too many at this moment.
    Full,
}

/// An agent has dialled in.
pub fn dialled_in(outcome: Joining) {
    let outcome = match outcome {
        Joining::Taken => "taken",
        Joining::Refused => "refused",
        Joining::Full => "full",
    };
    counter!(JOINS, "outcome" => outcome).increment(1);
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
    /// How it has done, once somebody has asked for it.
    stats: OnceLock<Arc<Stats>>,
    /// By server, sorted.
    runners: ArcSwap<Vec<Arc<RunnerMeters>>>,
}

impl ModelMeters {
    /// For a model that a server has.
    pub fn new(model: &ModelName) -> Self {
        Self { label: few::MODELS.of(&model.as_str().into()), stats: OnceLock::new(), runners: ArcSwap::default() }
    }

    /// How the model has done on all servers, if it was asked for.
    pub fn stats(&self) -> Option<&Arc<Stats>> {
        self.stats.get()
    }

    /// The name of the model as labels tell it.
    pub fn label(&self) -> &Arc<str> {
        &self.label
    }

    /// The metrics of the model on a server.
    pub fn at(&self, server: &Server) -> Arc<RunnerMeters> {
        let known = self.runners.load();
        if let Ok(at) = known.binary_search_by_key(&server.index, |runner| runner.server) {
            return known[at].clone();
        }
        let fresh = Arc::new(RunnerMeters::new(&self.label, server, self.stats.get_or_init(Arc::default)));
        self.runners.rcu(|known| {
            let mut known = Vec::clone(known);
            if let Err(at) = known.binary_search_by_key(&server.index, |runner| runner.server) {
                known.insert(at, fresh.clone());
            }
            known
        });
        fresh
    }

    /// A call makes a server load the model.
    pub fn load(&self, cause: Cause) {
        counter!(LOADS, vec![Label::new("model", self.label.clone()), Label::new("cause", cause.as_str())])
            .increment(1);
    }
}

/// The metrics of one model on one server.
#[derive(Debug)]
pub struct RunnerMeters {
    /// The server's index.
    server: usize,
    model: Arc<str>,
    /// The server's name; "other" where there are too many models on servers.
    server_label: Arc<str>,
    /// How the model has done, and its server.
    stats: [Arc<Stats>; 2],
    first_token: OnceLock<Histogram>,
    per_token: OnceLock<Histogram>,
    gaps: OnceLock<Histogram>,
    load_time: OnceLock<Histogram>,
    /// Of clients without a key.
    tokens: OnceLock<[Counter; 2]>,
    /// Of those with one, by its name.
    tokens_by_key: RwLock<HashMap<Arc<str>, [Counter; 2]>>,
}

impl RunnerMeters {
    fn new(model: &Arc<str>, server: &Server, stats: &Arc<Stats>) -> Self {
        let has_room = few::RUNNERS.admits(&format!("{model} {}", server.id).into());
        Self {
            server: server.index,
            model: model.clone(),
            stats: [stats.clone(), server.meters.stats.clone()],
            server_label: if has_room { server.id.shared() } else { few::OTHER.into() },
            first_token: OnceLock::new(),
            per_token: OnceLock::new(),
            gaps: OnceLock::new(),
            load_time: OnceLock::new(),
            tokens: OnceLock::new(),
            tokens_by_key: RwLock::default(),
        }
    }

    /// An attempt had an answer, or not. The server counts its own.
    pub fn attempt(&self, answered: bool) {
        self.stats[0].attempt(answered);
    }

    /// An answer has ended, so long after its request.
    pub fn ended(&self, how: End, after: Duration) {
        for stats in &self.stats {
            match how {
                End::Whole => stats.ended(after),
                End::Broken(_) => stats.broke(),
                End::Dropped => {}
            }
        }
    }

    /// The first piece of a stream came.
    pub fn first_token(&self, after: Duration) {
        self.stats.iter().for_each(|stats| stats.first_token.add(after.as_secs_f32() * 1000.0));
        self.first_token.get_or_init(|| histogram!(FIRST_TOKEN, self.labels())).record(after.as_secs_f64());
    }

    /// The tokens of a stream came at this pace.
    pub fn per_token(&self, took: Duration) {
        self.stats.iter().for_each(|stats| stats.per_token.add(took.as_secs_f32() * 1000.0));
        self.per_token.get_or_init(|| histogram!(PER_TOKEN, self.labels())).record(took.as_secs_f64());
    }

    /// So long after a piece of a stream came the next one.
    pub fn gap(&self, took: Duration) {
        self.gaps.get_or_init(|| histogram!(GAPS, self.model_label())).record(took.as_secs_f64());
    }

    /// The model has taken so long to load.
    pub fn loaded(&self, took: Duration) {
        self.load_time.get_or_init(|| histogram!(LOAD_TIME, self.model_label())).record(took.as_secs_f64());
    }

    /// A server told its counts, for a client with a key of this name.
    pub fn tokens(&self, counters: &Counters, key: Option<&Arc<str>>) {
        self.stats.iter().for_each(|stats| stats.tokens(counters));
        let add = |[prompt, output]: &[Counter; 2]| {
            prompt.increment(counters.prompt_tokens);
            output.increment(counters.output_tokens);
        };
        let Some(key) = key else {
            return add(self.tokens.get_or_init(|| self.counters("none".into())));
        };
        if let Some(known) = self.tokens_by_key.read().unwrap_or_else(PoisonError::into_inner).get(key) {
            return add(known);
        }
        let label = few::KEYS.of(key);
        let mut by_key = self.tokens_by_key.write().unwrap_or_else(PoisonError::into_inner);
        add(by_key.entry(label.clone()).or_insert_with(|| self.counters(label)));
    }

    fn counters(&self, key: Arc<str>) -> [Counter; 2] {
        let labels: Vec<_> = self.labels().into_iter().chain([Label::new("key", key)]).collect();
        [PROMPT_TOKENS, OUTPUT_TOKENS].map(|name| counter!(name, labels.clone()))
    }

    fn labels(&self) -> Vec<Label> {
        vec![Label::new("model", self.model.clone()), Label::new("server", self.server_label.clone())]
    }

    fn model_label(&self) -> Vec<Label> {
        vec![Label::new("model", self.model.clone())]
    }
}

/// The metrics of one server.
#[derive(Debug)]
pub struct ServerMeters {
    label: Arc<str>,
    /// How it has done of late.
    pub stats: Arc<Stats>,
    /// How its checks went.
    pub health: Health,
    answered: OnceLock<Counter>,
    failed: OnceLock<Counter>,
    checked: [OnceLock<Counter>; 2],
}

impl ServerMeters {
    /// For a configured server.
    pub fn new(server: &ServerId) -> Self {
        Self {
            label: server.shared(),
            stats: Arc::default(),
            health: Health::default(),
            answered: OnceLock::new(),
            failed: OnceLock::new(),
            checked: Default::default(),
        }
    }

    /// An attempt had an answer, or not.
    pub fn attempt(&self, answered: bool) {
        self.stats.attempt(answered);
        let (cell, word) = if answered { (&self.answered, "ok") } else { (&self.failed, "failed") };
        cell.get_or_init(|| {
            counter!(SERVER_REQUESTS, vec![Label::new("server", self.label.clone()), Label::new("result", word)])
        })
        .increment(1);
    }
}

impl ServerMeters {
    /// The server was looked at, and is well or not.
    pub fn checked(&self, is_well: bool) {
        let word = if is_well { "ok" } else { "failed" };
        let labels = || vec![Label::new("server", self.label.clone()), Label::new("result", word)];
        self.checked[usize::from(is_well)].get_or_init(|| counter!(SERVER_CHECKS, labels())).increment(1);
    }

    /// A circuit has opened: that of the server, or that of one of its models.
    pub fn opened(&self, scope: &'static str) {
        counter!(CIRCUIT_OPENED, vec![Label::new("server", self.label.clone()), Label::new("scope", scope)])
            .increment(1);
    }
}

/// Changed certificates were read again; or they are no good, and those before stay.
pub fn certificates_read(is_good: bool) {
    counter!(CERTIFICATES, "result" => if is_good { "ok" } else { "failed" }).increment(1);
}

/// The configuration was read again, and is good or not.
pub fn reloaded(is_good: bool) {
    counter!(RELOADS, "result" => if is_good { "ok" } else { "failed" }).increment(1);
}
