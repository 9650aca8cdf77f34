//! The text of a configuration file: where in it what stands, and what is wrong with it, said with its place.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::key::{Key, Step};
use super::words;
use super::{Config, ConfigError, Wrong};

/// A file that has been read, and perhaps understood.
#[derive(Clone, Debug)]
pub(super) struct Document {
    path: PathBuf,
    text: String,
}

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    path: PathBuf,
    place: Option<Place>,
    what: String,
    /// What else helps: all words that would be right.
    help: Option<String>,
}

/// A place in a text, with the line that it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Counted from one.
    line: usize,
    /// Counted from one, in characters.
    column: usize,
    content: String,
    /// Characters to be pointed at.
    length: usize,
}

impl Document {
    pub(super) fn new(path: &Path, text: String) -> Self {
        Self { path: path.to_owned(), text }
    }

    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
        Ok(Self::new(path, text))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says.
    pub(super) fn config(&self) -> Result<Config, ConfigError> {
        if let Some(complaint) = self.tables_are_tables() {
            return Err(complaint);
        }
        toml::from_str(&self.text).map_err(|error| {
            let span = error.span();
            let key = span.as_ref().and_then(|span| self.key_at(span));
            let words::Told { what, help } = words::told(error.message(), key.as_ref());
            let span = key.and_then(|key| self.misplaced(&key, &what)).or(span);
            self.complaint(span, what, help)
        })
    }

    /// What stands in the place of a table and is none: serde would take a list for one.
    fn tables_are_tables(&self) -> Option<ConfigError> {
        let document = DeTable::parse(&self.text).ok()?;
        let (name, value) = document
            .get_ref()
            .iter()
            .find(|(name, value)| words::is_table(name.get_ref()) && !value.get_ref().is_table())?;
        let name = name.get_ref();
        Some(self.complaint(Some(value.span()), format!("`{name}` is a table: its keys stand below [{name}]"), None))
    }

    /// The layer of an order that cannot work: the last one of those that the words are about.
    fn misplaced(&self, key: &Key, what: &str) -> Option<Range<usize>> {
        if *key != Key::of(["stack", "order"]) {
            return None;
        }
        let document = DeTable::parse(&self.text).ok()?;
        let order = document.get_ref().get("stack")?.get_ref().get("order")?.get_ref().as_array()?;
        let is_named =
            |layer: &&Spanned<DeValue<'_>>| layer.get_ref().as_str().is_some_and(|l| what.contains(&format!("'{l}'")));
        order.iter().rev().find(is_named).map(Spanned::span)
    }

    /// What is wrong with a value, with the place where that stands, if it stands in the file.
    pub(super) fn blames(&self, wrong: &Wrong) -> ConfigError {
        let span = self.find(&wrong.key).map(|(_, value)| value);
        self.complaint(span, format!("{}: {}", wrong.key, wrong.what), None)
    }

    /// The line that sets a key, counted from one.
    pub(super) fn line_of(&self, key: &Key) -> Option<usize> {
        self.find(key).map(|(name, _)| self.place(name).line)
    }

    fn complaint(&self, span: Option<Range<usize>>, what: String, help: Option<String>) -> ConfigError {
        let place = span.map(|span| self.place(span));
        ConfigError::Wrong(Box::new(Complaint { path: self.path.clone(), place, what, help }))
    }

    fn place(&self, span: Range<usize>) -> Place {
        let before = self.text.get(..span.start).unwrap_or(&self.text);
        let start = before.len();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let content = self.text[line_start..].lines().next().unwrap_or_default();
        let end = span.end.clamp(start, line_start + content.len().max(start - line_start));
        let marked = self.text.get(start..end).unwrap_or_default();
        Place {
            line: before.matches('\n').count() + 1,
            column: self.text[line_start..start].chars().count() + 1,
            content: crate::state::masked(content).replace('\t', " "),
            length: marked.chars().count().max(1),
        }
    }

    /// Where a key and its value stand.
    fn find(&self, key: &Key) -> Option<(Range<usize>, Range<usize>)> {
        let document = DeTable::parse(&self.text).ok()?;
        let mut found: Option<(Range<usize>, &Spanned<DeValue<'_>>)> = None;
        for step in &key.0 {
            found = Some(match step {
                Step::Name(name) => {
                    let table = match found {
                        None => document.get_ref(),
                        Some((_, value)) => value.get_ref().as_table()?,
                    };
                    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
                    (key.span(), value)
                }
                Step::At(at) => {
                    let value = found?.1.get_ref().as_array()?.get(*at)?;
                    (value.span(), value)
                }
            });
        }
        found.map(|(name, value)| (name, value.span()))
    }

    /// The key that stands at a place, or whose value does: the innermost one.
    fn key_at(&self, span: &Range<usize>) -> Option<Key> {
        let document = DeTable::parse(&self.text).ok()?;
        let mut key = Key::default();
        below(document.get_ref(), span, &mut key).then_some(key)
    }
}

/// Adds the steps from a table to what stands at a place in it.
fn below(table: &DeTable<'_>, span: &Range<usize>, key: &mut Key) -> bool {
    for (name, value) in table {
        key.0.push(Step::Name(name.get_ref().to_string()));
        if name.span() == *span || within(value, span, key) {
            return true;
        }
        key.0.pop();
    }
    false
}

fn within(value: &Spanned<DeValue<'_>>, span: &Range<usize>, key: &mut Key) -> bool {
    let is_here = value.span().contains(&span.start) && span.end <= value.span().end;
    match value.get_ref() {
        // The keys of a table may stand anywhere in a file, not only where it begins.
        DeValue::Table(table) => below(table, span, key) || is_here,
        DeValue::Array(list) => {
            for (at, value) in list.iter().enumerate() {
                key.0.push(Step::At(at));
                if within(value, span, key) {
                    return true;
                }
                key.0.pop();
            }
            is_here
        }
        _ => is_here,
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path.display())?;
        let Some(Place { line, column, content, length }) = &self.place else { return f.write_str(&self.what) };
        let gutter = " ".repeat(line.to_string().len());
        writeln!(f, "line {line}, column {column}: {}", self.what)?;
        writeln!(f, "{gutter} |")?;
        writeln!(f, "{line} | {content}")?;
        write!(f, "{gutter} | {}{}", " ".repeat(column - 1), "^".repeat(*length))?;
        if let Some(help) = &self.help {
            write!(f, "\n{help}")?;
        }
        Ok(())
    }
}
