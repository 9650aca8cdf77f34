//! How a server's machine is right now: live figures beside the snapshot, told by its agent every second.
//!
//! They change all the time and decide little, so that a new one makes no new snapshot. A bare Ollama tells none of them.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwapOption;

/// The last vitals of a server: none if it has no agent, or has not spoken yet.
pub type Live = ArcSwapOption<Vitals>;

/// What an agent tells of itself and its machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vitals {
    /// Version of the agent.
    pub olol_version: String,
    /// Random id of the agent's process.
    pub instance: String,
    /// Operating system: "linux", "macos", …
    pub os: String,
    /// Processor architecture: "`x86_64`", "aarch64", …
    pub arch: String,
    /// Logical processors; 0: unknown.
    pub cpu_count: u32,
    /// Share of all processors in use, 0 to 1; none: unknown.
    pub cpu_usage: Option<f32>,
    /// Main memory in use and in all, bytes; none: unknown.
    pub memory: Option<Space>,
    /// Graphics processors.
    pub gpus: Vec<Gpu>,
    /// Bytes free on the disk that holds the models; none: unknown.
    pub disk_free: Option<u64>,
    /// Bytes on it of models that have begun to come and are not there yet: what comes next goes on from there.
    pub disk_begun: u64,
    /// Calls that the agent is answering, for whomever.
    pub in_flight: u32,
    /// Calls that wait at the agent.
    pub queued: u32,
    /// Those of both that are not of this proxy.
    pub others: u32,
    /// Whether its models are not to be seen from its agent, so that others cannot copy them.
    pub hides_models: bool,
    /// How its calls went in the last minute; none: unknown.
    pub figures: Option<Figures>,
    /// Ids of the sessions whose last turn this server answered.
    pub active_sessions: Vec<String>,
    /// Running pulls, and the share of each that is done, 0 to 1.
    pub pending_pulls: Vec<(String, f32)>,
    /// When this was told, by our clock.
    pub told: Option<SystemTime>,
    /// Milliseconds that its clock is ahead of ours, less the time that the message took; none: unknown.
    pub clock_ahead: Option<i64>,
}

/// How the calls of a server went in the last minute, from whomever they came.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Calls that ended, a second.
    pub requests_per_second: f32,
    /// Mean time from a call to the end of its answer, seconds.
    pub response_time: f32,
    /// Share of them that failed, 0 to 1.
    pub error_rate: f32,
}

/// How full something is, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// In use.
    pub used: u64,
    /// In all.
    pub total: u64,
}

/// A graphics processor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gpu {
    /// Name as its driver gives it.
    pub name: String,
    /// "cuda", "rocm", "metal".
    pub kind: String,
    /// Its memory.
    pub memory: Space,
    /// Share of time that it was busy lately, 0 to 1; none: unknown.
    pub utilization: Option<f32>,
}

/// Begins with nothing.
pub(crate) fn unknown() -> Arc<Live> {
    Arc::new(ArcSwapOption::empty())
}
