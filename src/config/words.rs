//! What serde says of a value that does not fit, in the words of who writes the file, with the nearest word that would.

use std::sync::LazyLock;

use toml::Value;

use super::Config;
use super::key::{Key, Step};

/// How near a word must be to be what was meant; 1 is the same.
const NEAR: f64 = 0.8;

/// What is wrong, and all that would be right.
pub(super) struct Told {
    pub(super) what: String,
    pub(super) help: Option<String>,
}

/// The words of serde, as far as they are known; `key` is where they belong.
pub(super) fn told(message: &str, key: Option<&Key>) -> Told {
    let message = message.trim_end();
    let is_layer = key.is_some_and(|key| key.is_within("stack.order"));
    let table = key.map(Key::table).unwrap_or_default();
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let (wrong, right) = quoted(rest);
        let place = if table.is_empty() { String::new() } else { format!(" in [{table}]") };
        let what = format!("unknown key `{wrong}`{place}{}", meant(wrong, &right, &table));
        if right.is_empty() {
            return Told { what, help: Some(format!("[{table}] has no keys")) };
        }
        let kind = if table.is_empty() { "what may stand here".to_owned() } else { format!("the keys of [{table}]") };
        return Told { what, help: all(&kind, &right) };
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let (wrong, right) = quoted(rest);
        let (kind, kinds) = if is_layer { ("layer", "the layers") } else { ("word", "the words that may stand here") };
        let nearest = nearest(wrong, &right).map(did_you_mean).unwrap_or_default();
        let what = match key.filter(|_| !is_layer) {
            Some(key) => format!("{key}: unknown {kind} `{wrong}`{nearest}"),
            None => format!("unknown {kind} `{wrong}`{nearest}"),
        };
        return Told { what, help: all(kinds, &right) };
    }
    let what = plain(message);
    let what = match key {
        // A message that begins with its key already.
        Some(key) if !what.starts_with(&key.to_string()) => format!("{key}: {what}"),
        _ => what,
    };
    Told { what, help: None }
}

/// The word that is wrong and those that would be right, out of "`x`, expected one of `a`, `b`".
fn quoted(text: &str) -> (&str, Vec<&str>) {
    let mut words = text.split('`').skip(1).step_by(2);
    (words.next().unwrap_or_default(), words.collect())
}

fn all(kind: &str, right: &[&str]) -> Option<String> {
    (!right.is_empty()).then(|| format!("{kind}: {}", right.join(", ")))
}

/// What was meant by a key that is not there: one with nearly its name, or one of its very name in another table.
fn meant(wrong: &str, right: &[&str], table: &Key) -> String {
    if let Some(nearest) = nearest(wrong, right) {
        return did_you_mean(nearest);
    }
    match elsewhere(wrong, table) {
        Some(table) if table.is_empty() => format!("; `{wrong}` stands before all tables"),
        Some(table) => format!("; `{wrong}` is a key of [{table}]"),
        None => String::new(),
    }
}

fn did_you_mean(word: &str) -> String {
    format!("; did you mean `{word}`?")
}

/// The word that is nearest, if any is near: a slip of a letter or two, another hyphen, a word too many.
pub(super) fn nearest<'a>(wrong: &str, right: &[&'a str]) -> Option<&'a str> {
    let bare = |word: &str| word.to_lowercase().replace(['-', '_', ' ', '.'], "");
    let wrong = bare(wrong);
    let likeness = |word: &str| {
        let word = bare(word);
        let contains = wrong.len().min(word.len()) >= 4 && (wrong.contains(&word) || word.contains(&wrong));
        strsim::jaro_winkler(&wrong, &word).max(if contains { NEAR } else { 0.0 })
    };
    let scored = right.iter().map(|word| (*word, likeness(word))).filter(|(_, likeness)| *likeness >= NEAR);
    scored.max_by(|(_, one), (_, other)| one.total_cmp(other)).map(|(word, _)| word)
}

/// All keys, as the default configuration has them.
static DEFAULTS: LazyLock<Value> =
    LazyLock::new(|| Value::try_from(Config::default()).unwrap_or(Value::Boolean(false)));

/// Whether a table has this name.
pub(super) fn is_table(name: &str) -> bool {
    DEFAULTS.get(name).is_some_and(Value::is_table)
}

/// Another table that has a key of this name.
fn elsewhere(name: &str, not_in: &Key) -> Option<Key> {
    let tables = DEFAULTS.as_table()?;
    let in_table = tables.iter().find_map(|(table, value)| {
        let key = Key(vec![Step::Name(table.clone())]);
        (key != *not_in && value.as_table()?.contains_key(name)).then_some(key)
    });
    in_table.or_else(|| (!not_in.is_empty() && tables.contains_key(name)).then(Key::default))
}

/// Names of Rust's types in the words of TOML.
fn plain(message: &str) -> String {
    let (begin, expected) = match message.split_once("expected ") {
        Some((begin, expected)) if begin.starts_with("invalid ") => (begin, expected),
        _ => return message.to_owned(),
    };
    let expected = match expected {
        "a nonzero u32" => "a whole number from 1 to 4294967295",
        "a nonzero u64" => "a whole number from 1",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number from 0",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "a text in quotes",
        "a sequence" => "a list in brackets",
        "a map" => "a table",
        "variant identifier" => "a word in quotes",
        other if other.starts_with("struct ") => "a table",
        other => other,
    };
    let begin = begin
        .replace("floating point", "number")
        .replace(": sequence,", ": a list,")
        .replace(": map,", ": a table,")
        .replace("integer ", "number ")
        .replace("boolean ", "")
        .replace("string ", "text ");
    format!("{begin}expected {expected}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_found_if_it_is_near() {
        let layers = ["trace", "metrics", "auth", "rate-limit", "timeout", "quant-fallback", "model-route", "retry"];
        for (wrong, right) in [
            ("retyr", Some("retry")),
            ("retries", Some("retry")),
            ("rate_limit", Some("rate-limit")),
            ("RateLimit", Some("rate-limit")),
            ("modelroute", Some("model-route")),
            ("route", Some("model-route")),
            ("timeouts", Some("timeout")),
            ("authentication", Some("auth")),
            ("metric", Some("metrics")),
            ("banana", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(wrong, &layers), right, "{wrong}");
        }
    }
}
