//! The keys of a configuration, with their tables, and the values that stand there.

use std::fmt;

use toml::Value;

use super::Config;

/// Where a value stands: the names of its tables and its own, and its number where it is one of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Key(pub(super) Vec<Step>);

/// A step from a table, or a list, to what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Name(String),
    At(usize),
}

impl Key {
    /// The key of these names.
    pub fn of<const N: usize>(names: [&str; N]) -> Self {
        Self(names.map(|name| Step::Name(name.to_owned())).to_vec())
    }

    /// One of the list that stands there.
    #[must_use]
    pub fn at(mut self, at: usize) -> Self {
        self.0.push(Step::At(at));
        self
    }

    pub(super) fn child(&self, name: &str) -> Self {
        Self(self.0.iter().cloned().chain([Step::Name(name.to_owned())]).collect())
    }

    /// The table that it stands in; empty for what stands before all tables.
    pub(super) fn table(&self) -> Self {
        Self(self.0[..self.0.len().saturating_sub(1)].to_vec())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it stands at this place or below it.
    pub(super) fn is_within(&self, place: &str) -> bool {
        let shown = self.to_string();
        shown.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    }
}

/// As it is written in TOML: `proxy.port`; one of a list as `proxy.servers[1]`.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_bare =
            |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        for (at, step) in self.0.iter().enumerate() {
            match step {
                Step::At(at) => write!(f, "[{at}]")?,
                Step::Name(name) => {
                    f.write_str(if at == 0 { "" } else { "." })?;
                    if is_bare(name) { f.write_str(name)? } else { write!(f, "{name:?}")? }
                }
            }
        }
        Ok(())
    }
}

/// Every value of a configuration, in the order of its tables. A list of tables is told table by table.
pub(super) fn values(config: &Config) -> Result<Vec<(Key, Value)>, toml::ser::Error> {
    let mut found = Vec::new();
    collect(Key::default(), Value::try_from(config)?, &mut found);
    Ok(found)
}

fn collect(key: Key, value: Value, found: &mut Vec<(Key, Value)>) {
    match value {
        Value::Table(table) if !table.is_empty() => {
            table.into_iter().for_each(|(name, value)| collect(key.child(&name), value, found));
        }
        // A layer without keys.
        Value::Table(_) if key.0.len() == 1 => {}
        Value::Array(list) if !list.is_empty() && list.iter().all(Value::is_table) => {
            found.extend(list.into_iter().enumerate().map(|(at, value)| (key.clone().at(at), value)));
        }
        value => found.push((key, value)),
    }
}

/// The keys whose values differ, or that only one of the two has.
pub(crate) fn differences(one: &Config, other: &Config) -> Result<Vec<String>, toml::ser::Error> {
    let (one, other) = (values(one)?, values(other)?);
    let mut keys: Vec<String> =
        one.iter().filter(|value| !other.contains(value)).map(|(key, _)| key.to_string()).collect();
    for (key, _) in other.iter().filter(|value| !one.contains(value)) {
        let key = key.to_string();
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_shown_as_it_is_written() {
        assert_eq!(Key::of(["proxy", "servers"]).at(1).to_string(), "proxy.servers[1]");
        assert_eq!(Key::of(["alias", "gpt-4.1"]).to_string(), "alias.\"gpt-4.1\"");
    }

    #[test]
    fn what_is_below_a_place_is_within_it() {
        let key = Key::of(["proxy", "servers"]).at(1);
        assert!(key.is_within("proxy") && key.is_within("proxy.servers"));
        assert!(!key.is_within("proxy.serve") && !key.is_within("servers"));
    }

    #[test]
    fn two_configurations_differ_by_their_keys() {
        let mut other = Config::default();
        other.proxy.port = 1;
        other.trace.access_log = false;
        assert_eq!(differences(&Config::default(), &other).unwrap(), ["proxy.port", "trace.access-log"]);
        assert!(differences(&other, &other).unwrap().is_empty());
    }
}
