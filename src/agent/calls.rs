//! The calls that pass through an agent: how many there are, how the last minute's went, and how far pulls have come.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use olol_middleware::call::{Outcome, Watcher};
use olol_middleware::time::unix_ms_now;
use olol_middleware::window::{LastMinute, Sums};
use olol_middleware::{Chunk, End};
use olol_proto::v1::ServerMetrics;
use tokio::time::Instant;

use crate::models::Line;
use crate::rpc::Calling;

/// Layers of a pull whose progress is added up; more are in no model.
const MOST_LAYERS: usize = 64;

/// How the calls of the last minute went.
#[derive(Debug, Default)]
pub(super) struct Figures(LastMinute);

impl Figures {
    /// A call is over.
    fn count(&self, took: Duration, failed: bool) {
        self.0.add(Sums { calls: 1, failures: u32::from(failed), took });
    }

    /// The figures of the last minute, or of the time since the start if that is shorter.
    #[expect(clippy::cast_possible_truncation, reason = "figures for people")]
    pub(super) fn last_minute(&self) -> ServerMetrics {
        let sums = self.0.sums();
        ServerMetrics {
            response_time_seconds: (sums.took / sums.calls.max(1)).as_secs_f32(),
            requests_per_second: self.0.per_second() as f32,
            error_rate: sums.error_rate().unwrap_or(0.0) as f32,
            collected_at_ms: unix_ms_now(),
        }
    }
}

/// The pulls that pass through.
#[derive(Debug, Default)]
pub(super) struct Pulls(Mutex<Vec<Pull>>);

#[derive(Debug)]
struct Pull {
    number: u64,
    model: String,
    /// Digest, bytes in all, bytes that are there.
    layers: Vec<(String, u64, u64)>,
}

impl Pulls {
    pub(super) fn begin(self: &Arc<Self>, model: String) -> Pulling {
        let number = fastrand::u64(..);
        self.lock().push(Pull { number, model, layers: Vec::new() });
        Pulling { pulls: self.clone(), number }
    }

    /// The share that is done of each, 0 to 1. Of several pulls of a model the one that is furthest.
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub(super) fn shares(&self) -> std::collections::HashMap<String, f32> {
        let mut shares = std::collections::HashMap::new();
        for pull in self.lock().iter() {
            let (total, done) = pull.layers.iter().fold((0_u64, 0_u64), |(total, done), (_, all, there)| {
                (total.saturating_add(*all), done.saturating_add(*there))
            });
            let share = if total == 0 { 0.0 } else { (done as f32 / total as f32).clamp(0.0, 1.0) };
            let known = shares.entry(pull.model.clone()).or_insert(share);
            *known = known.max(share);
        }
        shares
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Pull>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pull that goes on.
pub(super) struct Pulling {
    pulls: Arc<Pulls>,
    number: u64,
}

impl Pulling {
    /// Lines of its progress.
    fn see(&self, lines: &[u8]) {
        for Line { digest, total, completed, .. } in Line::all(lines) {
            self.hear(digest, total, completed);
        }
    }

    /// A layer is so far.
    pub(super) fn hear(&self, digest: String, total: u64, completed: u64) {
        if digest.is_empty() {
            return;
        }
        let mut pulls = self.pulls.lock();
        let Some(pull) = pulls.iter_mut().find(|pull| pull.number == self.number) else { return };
        if let Some(layer) = pull.layers.iter_mut().find(|layer| layer.0 == digest) {
            (layer.1, layer.2) = (total, completed);
        } else if pull.layers.len() < MOST_LAYERS {
            pull.layers.push((digest, total, completed));
        }
    }
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.pulls.lock().retain(|pull| pull.number != self.number);
    }
}

/// A call on its way: counted until this is dropped.
pub(super) struct Running {
    _calling: Calling,
    begun: Instant,
    failed: bool,
    figures: Arc<Figures>,
    pulling: Option<Pulling>,
}

impl Running {
    /// A call comes in.
    pub(super) fn begin(calling: Calling, figures: &Arc<Figures>) -> Self {
        Self { _calling: calling, begun: Instant::now(), failed: false, figures: figures.clone(), pulling: None }
    }

    /// It pulls a model.
    pub(super) fn pulls(&mut self, pulls: &Arc<Pulls>, model: String) {
        self.pulling = Some(pulls.begin(model));
    }

    /// It has failed.
    pub(super) fn fails(&mut self) {
        self.failed = true;
    }
}

impl Watcher for Running {
    fn chunk(&mut self, chunk: &Chunk) {
        if let Some(pulling) = &self.pulling {
            pulling.see(&chunk.bytes);
        }
    }

    fn end(&mut self, end: End, _outcome: &Outcome) {
        self.failed |= matches!(end, End::Broken(_));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.figures.count(self.begun.elapsed(), self.failed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn figures_look_back_a_minute() {
        let figures = Figures::default();
        assert_eq!(figures.last_minute().requests_per_second.to_bits(), 0.0_f32.to_bits());
        for number in 0..4 {
            figures.count(Duration::from_millis(500), number == 0);
        }
        tokio::time::advance(Duration::from_secs(2)).await;
        let ServerMetrics { response_time_seconds, requests_per_second, error_rate, .. } = figures.last_minute();
        assert_eq!((response_time_seconds, requests_per_second, error_rate), (0.5, 2.0, 0.25));
        tokio::time::advance(Duration::from_secs(57)).await;
        assert!(figures.last_minute().requests_per_second > 0.06);
        tokio::time::advance(Duration::from_secs(2)).await;
        let last = figures.last_minute();
        assert!(last.requests_per_second < 0.001 && last.error_rate < 0.001, "{last:?}");
        figures.count(Duration::from_secs(1), false);
        assert!((figures.last_minute().requests_per_second - 1.0 / 60.0).abs() < 0.002);
    }

    #[test]
    fn a_pull_tells_the_share_of_all_its_layers() {
        let pulls = Arc::<Pulls>::default();
        let pulling = pulls.begin("big".to_owned());
        assert_eq!(pulls.shares()["big"].to_bits(), 0.0_f32.to_bits());
        for line in [
            &br#"{"status":"pulling manifest"}"#[..],
            br#"{"status":"pulling a","digest":"sha256:a","total":300,"completed":10}"#,
            b"no json",
            // Two that have come together.
            b"{\"status\":\"pulling a\",\"digest\":\"sha256:a\",\"total\":300,\"completed\":200}\n{\"digest\":\"sha256:b\",\"total\":100}\n",
        ] {
            pulling.see(line);
        }
        assert_eq!(pulls.shares()["big"].to_bits(), 0.5_f32.to_bits());
        drop(pulling);
        assert!(pulls.shares().is_empty());
    }
}
