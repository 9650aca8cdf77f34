//! What is read rather than counted, written at the moment of a scrape: a series is there for as long as what it tells of.
//!
//! The recorder never forgets a series. A server that has left, or a model that is no longer in memory, would be shown for
//! ever with the last that was known of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// One gauge, or a counter that somebody else keeps: what it is called, what it means, and its value for each set of labels.
#[derive(Debug)]
pub(super) struct Gauge {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    labels: &'static [&'static str],
    rows: BTreeMap<Vec<String>, f64>,
}

impl Gauge {
    /// A gauge with these labels.
    pub(super) fn new(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Self {
        Self { name, help, kind: "gauge", labels, rows: BTreeMap::new() }
    }

    /// A gauge without labels.
    pub(super) fn of(name: &'static str, help: &'static str, value: f64) -> Self {
        let mut gauge = Self::new(name, help, &[]);
        gauge.add([], value);
        gauge
    }

    /// A value that only grows.
    pub(super) fn grows(self) -> Self {
        Self { kind: "counter", ..self }
    }

    /// Adds a value; what has the same labels counts together.
    pub(super) fn add<const N: usize>(&mut self, labels: [&str; N], value: f64) {
        debug_assert_eq!(N, self.labels.len(), "{}", self.name);
        *self.rows.entry(labels.map(str::to_owned).to_vec()).or_default() += value;
    }

    /// Writes it as Prometheus reads it; nothing if there is nothing to tell.
    pub(super) fn write(&self, page: &mut String) {
        if self.rows.is_empty() {
            return;
        }
        let Self { name, help, kind, .. } = self;
        // A string takes whatever is written to it.
        let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (values, value) in &self.rows {
            page.push_str(name);
            for (at, (label, text)) in self.labels.iter().zip(values).enumerate() {
                page.push(if at == 0 { '{' } else { ',' });
                let _ = write!(page, "{label}=\"{}\"", escaped(text));
            }
            page.push_str(if values.is_empty() { " " } else { "} " });
            let _ = writeln!(page, "{value}");
        }
        page.push('\n');
    }
}

/// A value of a label as it may stand between quotes.
fn escaped(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_is_written_as_prometheus_reads_it() {
        let mut page = String::new();
        let mut gauge = Gauge::new("olol_x", "What x is", &["server", "model"]);
        gauge.write(&mut page);
        assert_eq!(page, "");
        gauge.add(["b", "other"], 1.0);
        gauge.add(["a\"\\\n", "tiny"], 0.5);
        gauge.add(["b", "other"], 2.0);
        gauge.write(&mut page);
        Gauge::of("olol_y_total", "What y is", 3e9).grows().write(&mut page);
        let wanted = "# HELP olol_x What x is\n# TYPE olol_x gauge\n\
            olol_x{server=\"a\\\"\\\\\\n\",model=\"tiny\"} 0.5\nolol_x{server=\"b\",model=\"other\"} 3\n\n\
            # HELP olol_y_total What y is\n# TYPE olol_y_total counter\nolol_y_total 3000000000\n\n";
        assert_eq!(page, wanted);
    }
}
