//! `olol keys`: makes, lists and removes the keys of clients.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::Context;
use clap::{Args, Subcommand};
use olol_middleware::Pattern;
use olol_middleware::keys::{Key, Rights};
use olol_middleware::pattern::PatternError;
use olol_middleware::rate_limit::Limits;
use olol_middleware::slots::Priority;
use toml::value::{Datetime, DatetimeParseError};

use super::{print, say};
use crate::config::Config;
use crate::keys::{self, KeysError, Name, Order};

/// Make, list and remove keys.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// File of keys [default: the one of the configuration, else keys.toml in ~/.config/olol]
    #[arg(long, global = true, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Configuration file of the proxy, whose [auth] table names the file of keys
    #[arg(long, global = true, env = "OLOL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a key and print it: it is shown this once
    Add(Box<Add>),
    /// List the keys, without their secrets
    List,
    /// Remove a key: whoever has it is refused at once
    Remove {
        /// Name or id of the key
        key: String,
    },
}

#[derive(Debug, Args)]
struct Add {
    /// Name of who gets it; logs and metrics call it so
    name: Name,
    /// Models that it may use, with * for any text: llama3*,ada/* [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = pattern)]
    models: Vec<Pattern>,
    /// What it may do, some of: infer, list, pull, push, create, copy, delete, account; manage is pull to delete, none is nothing
    /// [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = right)]
    may: Option<Vec<String>>,
    /// Let it use the proxy's own pages: /metrics, and what is below /api/status/ and /olol/
    #[arg(long)]
    admin: bool,
    /// Who is served first when there is a queue: high, normal or low
    #[arg(long, value_name = "WORD", value_parser = priority, default_value = "normal")]
    priority: Priority,
    /// Give it no other quantization of a model than it asks for, whatever [quant-fallback] says
    #[arg(long)]
    strict_quant: bool,
    /// Requests a minute
    #[arg(long, value_name = "COUNT")]
    rpm: Option<NonZeroU32>,
    /// Requests at the same time
    #[arg(long, value_name = "COUNT")]
    concurrent: Option<NonZeroU32>,
    /// Tokens a minute, of prompts and answers
    #[arg(long, value_name = "COUNT")]
    tpm: Option<NonZeroU64>,
    /// Tokens a day, of prompts and answers
    #[arg(long, value_name = "COUNT")]
    tpd: Option<NonZeroU64>,
    /// Day, or time, at which it ends: 2027-01-31, 2027-01-31T18:00:00Z
    #[arg(long, value_name = "DATE", value_parser = ahead)]
    expires: Option<Datetime>,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let file = match (self.file, self.config) {
            (Some(file), _) => file,
            (None, Some(config)) => named(&Config::read(&config)?)?,
            (None, None) => named(&Config::default())?,
        };
        match self.action {
            Action::Add(add) => {
                let key = keys::add(&file, &add.name, &add.order())?;
                say(&format!(
                    "Key '{}' stands in {} as a hash; a running proxy takes it at once. It is shown only now:\n",
                    add.name,
                    file.display()
                ));
                if !keys::read(&file)?.iter().any(|(_, key)| key.admin) {
                    say(
                        "(No key is an admin's yet: /metrics and the pages below /api/status/ and /olol/ answer nobody; \
                         `olol keys add NAME --admin` makes one.)\n",
                    );
                }
                print(&format!("{key}\n"))
            }
            Action::List => match keys::read(&file) {
                Err(KeysError::File { why, .. }) if why.kind() == std::io::ErrorKind::NotFound => {
                    say(&format!("There are no keys in {}; `olol keys add NAME` makes one\n", file.display()));
                    Ok(())
                }
                read => print(&table(&read?.into_iter().map(|(_, key)| key).collect::<Vec<_>>())),
            },
            Action::Remove { key } => {
                let name = keys::remove(&file, &key)?;
                say(&format!("Key '{name}' is removed; a running proxy refuses it at once\n"));
                Ok(())
            }
        }
    }
}

fn named(config: &Config) -> anyhow::Result<PathBuf> {
    keys::path(&config.auth).context("there is no home folder to keep keys in; say --file FILE")
}

impl Add {
    fn order(&self) -> Order {
        Order {
            models: self.models.clone(),
            may: self.may.clone(),
            admin: self.admin,
            priority: self.priority,
            strict_quant: self.strict_quant,
            limits: Limits {
                requests_per_minute: self.rpm,
                concurrent: self.concurrent,
                tokens_per_minute: self.tpm,
                tokens_per_day: self.tpd,
                ..Limits::default()
            },
            expires: self.expires,
        }
    }
}

fn pattern(text: &str) -> Result<Pattern, PatternError> {
    Pattern::parse(text)
}

fn right(text: &str) -> Result<String, String> {
    Rights::try_from(text.to_owned()).map(|_| text.to_owned())
}

/// A time that is still to come.
fn ahead(text: &str) -> Result<Datetime, String> {
    let told: Datetime = text.parse().map_err(|error: DatetimeParseError| error.to_string())?;
    if keys::time_of(&told)? <= SystemTime::now() {
        return Err("that is over: nobody could use the key; say a day to come".to_owned());
    }
    Ok(told)
}

fn priority(text: &str) -> Result<Priority, &'static str> {
    let all = [Priority::High, Priority::Normal, Priority::Low];
    all.into_iter().find(|priority| priority.as_str() == text).ok_or("say high, normal or low")
}

/// A line a key, in columns.
fn table(keys: &[Key]) -> String {
    let mut rows = vec![["NAME", "ID", "MAY", "MODELS", "PRIORITY", "EXPIRES", ""].map(str::to_owned)];
    for key in keys {
        let models = key.models.iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        rows.push([
            key.name.to_string(),
            key.id.to_string(),
            key.may.to_string(),
            if models.is_empty() { "all".to_owned() } else { models },
            key.priority.as_str().to_owned(),
            key.expires.map_or_else(|| "never".to_owned(), day),
            [(key.admin, "admin"), (key.strict_quant, "strict-quant")]
                .into_iter()
                .filter_map(|(is_so, word)| is_so.then_some(word))
                .collect::<Vec<_>>()
                .join(", "),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    let line = |row: &[String; 7]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn day(time: SystemTime) -> String {
    let shown = jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default();
    if time <= SystemTime::now() { format!("{shown} (over)") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_ends_in_time_to_come() {
        assert!(ahead("9999-01-31").is_ok() && ahead("9999-01-31T18:00:00Z").is_ok());
        for (text, why) in [("2020-01-31", "is over"), ("12:00:00", "without a date"), ("soon", "")] {
            let error = ahead(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn keys_are_listed_in_columns() {
        let keys = [
            Key { name: "ada".into(), id: "1f".into(), admin: true, ..Key::default() },
            Key {
                name: "bob".into(),
                id: "2e".into(),
                models: Some([Pattern::parse("tiny*").unwrap()].into()),
                may: Rights::INFER.and(Rights::LIST),
                expires: Some(SystemTime::UNIX_EPOCH),
                strict_quant: true,
                ..Key::default()
            },
        ];
        assert_eq!(
            table(&keys),
            "NAME  ID  MAY          MODELS  PRIORITY  EXPIRES\n\
             ada   1f  all          all     normal    never                        admin\n\
             bob   2e  infer, list  tiny*   normal    1970-01-01T00:00:00Z (over)  strict-quant\n"
        );
    }
}
