//! `docs/reference.md` tells of every header, route, variable and metric that there is, and of no other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use olol_middleware::instruments;

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn reference() -> String {
    read(&root().join("docs/reference.md"))
}

/// The code of the program, tests left out.
fn code() -> Vec<String> {
    fn gather(folder: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                gather(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
                let text = read(&path);
                found.push(text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned());
            }
        }
    }
    let mut found = Vec::new();
    gather(&root().join("src"), &mut found);
    gather(&root().join("middleware/src"), &mut found);
    found
}

/// The words of a text that begin so, as far as they are of these characters.
fn words(text: &str, begin: &str, is_part: fn(char) -> bool) -> BTreeSet<String> {
    let is_begun = |at: usize| !text[..at].chars().next_back().is_some_and(|before| is_part(before) || before == '-');
    let word = |at: usize| text[at..].chars().take_while(|c| is_part(*c)).collect::<String>();
    text.match_indices(begin).filter(|(at, _)| is_begun(*at)).map(|(at, _)| word(at)).collect()
}

/// The same of several texts; where there is nothing behind the beginning it is no word.
fn all_words(texts: &[String], begin: &str, is_part: fn(char) -> bool) -> BTreeSet<String> {
    texts.iter().flat_map(|text| words(text, begin, is_part)).filter(|word| word != begin).collect()
}

fn same(told: &BTreeSet<String>, there: &BTreeSet<String>, what: &str) {
    let (lacks, invents): (Vec<_>, Vec<_>) = (there.difference(told).collect(), told.difference(there).collect());
    assert!(lacks.is_empty(), "docs/reference.md does not tell of these {what}: {lacks:?}");
    assert!(invents.is_empty(), "docs/reference.md tells of {what} that are not there: {invents:?}");
}

#[test]
fn all_headers_are_told_of() {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '-';
    let there = all_words(&code(), "x-olol-", is_part);
    same(&words(&reference().to_lowercase(), "x-olol-", is_part), &there, "headers");
}

#[test]
fn all_metrics_are_told_of() {
    let section = reference().split_once("## Metrics").unwrap().1.to_owned();
    let told =
        section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`')).map(|(name, _)| name.to_owned());
    same(&told.collect(), &instruments::NAMES.iter().map(|name| (*name).to_owned()).collect(), "metrics");
}

/// Keeps what metrics are said to mean.
#[derive(Default)]
struct Meanings(Mutex<BTreeMap<String, String>>);

impl Meanings {
    fn keep(&self, name: &KeyName, meaning: &SharedString) {
        self.0.lock().unwrap().insert(name.as_str().to_owned(), meaning.to_string());
    }
}

impl Recorder for Meanings {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, meaning: SharedString) {
        self.keep(&name, &meaning);
    }

    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, meaning: SharedString) {
        self.keep(&name, &meaning);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, meaning: SharedString) {
        self.keep(&name, &meaning);
    }

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

#[test]
fn metrics_are_told_of_in_their_own_words() {
    let meanings = Meanings::default();
    metrics::with_local_recorder(&meanings, instruments::describe);
    let meanings = meanings.0.into_inner().unwrap();
    assert!(meanings.contains_key("olol_model_arrivals_total"));
    let reference = reference();
    for (name, meaning) in meanings {
        let row = format!("| `{name}` | {meaning} |");
        assert!(reference.contains(&row), "docs/reference.md does not say so:\n{row}");
    }
}

#[test]
fn all_variables_are_told_of() {
    let is_part = |c: char| c.is_ascii_uppercase() || c == '_';
    // Set when the program is built.
    let is_ours = |word: &String| !["OLOL_REVISION", "OLOL_TINY"].contains(&word.as_str());
    let there = all_words(&code(), "OLOL_", is_part).into_iter().filter(is_ours).collect();
    same(&words(&reference(), "OLOL_", is_part), &there, "variables");
}

#[test]
fn all_routes_are_told_of() {
    let reference = reference();
    let route = read(&root().join("middleware/src/route.rs"));
    let table = route.split_once("pub enum Route").unwrap().1.split_once("\n}").unwrap().0;
    for route in table.lines().filter_map(|line| line.trim().strip_prefix("/// ")) {
        assert!(reference.contains(route), "docs/reference.md does not tell of {route}");
    }
    let own = read(&root().join("src/api/own.rs"));
    for (_, rest) in own.match_indices(".route(\"").map(|(at, begin)| own.split_at(at + begin.len())) {
        let path = rest.split('"').next().unwrap();
        assert!(reference.contains(&format!("{path}`")), "docs/reference.md does not tell of {path}");
    }
}
