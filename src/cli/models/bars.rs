//! How far a pull is: a bar for each layer on a terminal, a line for each step elsewhere.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::bail;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

/// The most layers that are shown.
const MOST: usize = 64;

/// The bars of one pull.
pub(super) struct Bars {
    all: MultiProgress,
    layers: HashMap<String, ProgressBar>,
    /// What is done between the layers.
    step: Option<ProgressBar>,
    status: String,
    is_silent: bool,
    is_done: bool,
}

impl Bars {
    pub(super) fn new(is_silent: bool) -> Self {
        Self {
            all: MultiProgress::new(),
            layers: HashMap::new(),
            step: None,
            status: String::new(),
            is_silent,
            is_done: false,
        }
    }

    /// A line of the proxy.
    pub(super) fn hear(&mut self, line: &Value) -> anyhow::Result<()> {
        if let Some(error) = line["error"].as_str() {
            self.all.clear()?;
            bail!("{}", clean(error));
        }
        let status = clean(line["status"].as_str().unwrap_or_default());
        self.is_done = status == "success";
        if self.is_silent {
            return Ok(());
        }
        let (digest, total) = (line["digest"].as_str().unwrap_or_default(), line["total"].as_u64().unwrap_or_default());
        let is_new = status != self.status;
        if is_new && self.all.is_hidden() {
            // Nobody sees bars.
            super::super::say(&format!("{status}\n"));
        }
        self.status.clone_from(&status);
        if digest.is_empty() || total == 0 {
            if is_new {
                if let Some(step) = self.step.take() {
                    step.finish();
                }
                let step = self.all.add(ProgressBar::new_spinner().with_message(status));
                step.enable_steady_tick(Duration::from_millis(100));
                self.step = Some(step);
            }
            return Ok(());
        }
        if !self.layers.contains_key(digest) && self.layers.len() < MOST {
            let style = ProgressStyle::with_template(
                "{msg:20} {wide_bar} {percent:>3}% {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>4}",
            )?;
            let bar = self.all.add(ProgressBar::new(total).with_style(style).with_message(status));
            self.layers.insert(digest.to_owned(), bar);
        }
        if let Some(bar) = self.layers.get(digest) {
            let completed = line["completed"].as_u64().unwrap_or_default();
            bar.set_position(completed);
            if completed >= total {
                bar.finish();
            }
        }
        Ok(())
    }

    /// The proxy says nothing more.
    pub(super) fn end(self) -> anyhow::Result<()> {
        if let Some(step) = self.step {
            step.finish();
        }
        self.layers.values().for_each(ProgressBar::abandon);
        if self.is_done { Ok(()) } else { bail!("the proxy ended without success") }
    }
}

/// Nothing that a terminal would obey.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
