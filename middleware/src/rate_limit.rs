//! Holds clients to what they may use.

use std::num::{NonZeroU32, NonZeroU64};

use serde::{Deserialize, Serialize};

/// What somebody may use; what is left out is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Requests a minute in the long run.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Requests at once after a rest; as many as a minute's if left out.
    pub burst: Option<NonZeroU32>,
    /// Requests that may be answered at the same time.
    pub concurrent: Option<NonZeroU32>,
    /// Tokens a minute, of prompts and answers together.
    pub tokens_per_minute: Option<NonZeroU64>,
    /// Tokens a day, of prompts and answers together.
    pub tokens_per_day: Option<NonZeroU64>,
}
