//! Every metric that a dashboard asks for is one that the program has.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;

use olol_middleware::instruments;
use olol_middleware::stack::Config;
use serde_json::Value;

/// The queries of all panels, at any depth.
fn queries(panel: &Value, found: &mut Vec<String>) {
    match panel {
        Value::Object(members) => {
            found.extend(members.get("expr").and_then(Value::as_str).map(str::to_owned));
            members.values().for_each(|member| queries(member, found));
        }
        Value::Array(list) => list.iter().for_each(|entry| queries(entry, found)),
        _ => {}
    }
}

/// The names of metrics in a query: ours, and those that every process has.
fn names(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("olol_") || word.starts_with("process_"))
}

fn dashboard() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana/dashboards/olol.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn dashboards_ask_only_for_metrics_that_exist() {
    let mut found = Vec::new();
    queries(&dashboard(), &mut found);
    assert!(found.len() > 10, "{found:?}");
    for query in &found {
        let mut asked = names(query).peekable();
        assert!(asked.peek().is_some(), "{query}");
        for name in asked {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(instruments::NAMES.contains(&base), "{name} in {query}");
        }
    }
    for name in instruments::NAMES {
        assert!(found.iter().any(|query| query.contains(name)), "no panel shows {name}");
    }
}

#[test]
fn alerts_ask_only_for_metrics_that_exist_and_say_what_to_do() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let (rules, tests, runbook) = (read("rules.yaml"), read("rules.test.yaml"), read("RUNBOOK.md"));
    let all =
        |key: &str| -> Vec<&str> { rules.lines().filter_map(|line| Some(line.split_once(key)?.1.trim())).collect() };
    let alerts = all("- alert: ");
    assert!(alerts.len() > 10 && alerts.len() == all("runbook_url: ").len());
    for (alert, page) in alerts.into_iter().zip(all("runbook_url: ")) {
        assert!(runbook.contains(&format!("\n## {alert}\n")), "{alert} is not in the runbook");
        assert!(page.ends_with(&format!("RUNBOOK.md#{}", alert.to_lowercase())), "{alert} leads to {page}");
        assert!(tests.contains(&format!("alertname: {alert}\n")), "{alert} has no test");
    }
    // What the rules themselves record has a name that is none of ours.
    for name in names(&rules.replace("job:olol_", "job:")) {
        let base = ["_bucket", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(instruments::NAMES.contains(&base), "{name}");
    }
}

#[test]
fn every_layer_has_a_row_and_every_panel_says_what_it_shows() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let (rows, panels): (Vec<&Value>, Vec<&Value>) = panels.iter().partition(|panel| panel["type"] == "row");
    let below = |row: &Value| {
        let at = |panel: &Value| panel["gridPos"]["y"].as_u64().unwrap();
        let next = rows.iter().map(|other| at(other)).filter(|y| *y > at(row)).min().unwrap_or(u64::MAX);
        panels.iter().filter(|panel| (at(row)..next).contains(&at(panel))).count()
    };
    for layer in Config::default().stack.order.layers() {
        let row = rows.iter().find(|row| row["title"] == layer.as_str());
        assert!(row.is_some_and(|row| below(row) > 0), "no row, or no panel in the row, of {layer}");
    }
    let mut ids = Vec::new();
    for panel in &panels {
        let title = panel["title"].as_str().unwrap();
        for (what, at) in [("description", "/description"), ("unit", "/fieldConfig/defaults/unit")] {
            let said = panel.pointer(at).and_then(Value::as_str).unwrap_or_default();
            assert!(!said.is_empty(), "{title} has no {what}");
        }
        for target in panel["targets"].as_array().unwrap() {
            assert!(!target["legendFormat"].as_str().unwrap_or_default().is_empty(), "{title} has no legend");
        }
        ids.push(&panel["id"]);
    }
    for row in &rows {
        ids.push(&row["id"]);
    }
    let count = ids.len();
    ids.sort_by_key(|id| id.as_u64());
    ids.dedup();
    assert_eq!(ids.len(), count, "two panels have the same id");
}
