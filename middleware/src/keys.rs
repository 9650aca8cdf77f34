//! Who asks: the keys of clients, and what each of them may do.

use std::sync::Arc;

use crate::rate_limit::Limits;
use crate::slots::Priority;

/// A client that has shown a key.
#[derive(Clone, Debug, Default)]
pub struct Key {
    /// The public part of the key: what it is found by.
    pub id: Arc<str>,
    /// What its owner is called: the only thing of a key that logs, labels and pages may tell.
    pub name: Arc<str>,
    /// How urgent its calls are.
    pub priority: Priority,
    /// Its own limits, before those of `[rate-limit]`.
    pub limits: Option<Limits>,
}
