//! Every metric that a dashboard asks for is one that the program has.

use std::path::Path;

use olol_middleware::instruments;
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

/// The names of our metrics in a query.
fn names(query: &str) -> impl Iterator<Item = &str> {
    query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| word.starts_with("olol_"))
}

#[test]
fn dashboards_ask_only_for_metrics_that_exist() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana/dashboards/olol.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut found = Vec::new();
    queries(&dashboard, &mut found);
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
