//! Where models are, and where they should be.
//!
//! [`desired`] keeps true what an operator wants of models, [`wake`] wakes servers that sleep.

pub mod desired;
pub mod wake;
