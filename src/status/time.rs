//! Times as pages tell them.

use std::time::SystemTime;

use olol_middleware::runner::Average;
use olol_middleware::stats::Stats;
use serde::Serialize;

/// A time in RFC 3339, to the millisecond.
pub(super) fn rfc3339(time: SystemTime) -> String {
    let time = jiff::Timestamp::try_from(time).unwrap_or_default();
    format!("{time:.3}")
}

/// How a server or a model has done: times in seconds, decayed averages; rates over the last minute.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    /// Attempts so far, and those of them that failed.
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
    /// To the end of an answer, to the first piece of a stream, for each token after that.
    pub(super) response_time: Option<f64>,
    pub(super) first_token_time: Option<f64>,
    pub(super) time_per_token: Option<f64>,
    pub(super) requests_per_second: f64,
    pub(super) error_rate: Option<f64>,
}

impl Figures {
    pub(super) fn of(stats: &Stats) -> Self {
        let ((requests, errors), (prompt_tokens, output_tokens)) = (stats.attempts(), stats.tokens_so_far());
        Self {
            requests,
            errors,
            prompt_tokens,
            output_tokens,
            response_time: seconds(&stats.response),
            first_token_time: seconds(&stats.first_token),
            time_per_token: seconds(&stats.per_token),
            requests_per_second: rounded(stats.per_second()),
            error_rate: stats.error_rate().map(rounded),
        }
    }
}

/// An average of milliseconds in seconds.
fn seconds(average: &Average) -> Option<f64> {
    Some(rounded(f64::from(average.get()?) / 1000.0))
}

/// To the millionth: what is beyond is noise, and long to read.
pub(super) fn rounded(number: f64) -> f64 {
    (number * 1e6).round() / 1e6
}

/// A share as it is told: to the thousandth.
pub(super) fn share(number: f32) -> f64 {
    (f64::from(number) * 1000.0).round() / 1000.0
}

/// A text that says something.
pub(super) fn some(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
