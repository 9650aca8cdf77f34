//! Where logs go, and how many files may be open.

mod batches;

use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::io::{IsTerminal, Stderr, stderr};
use std::time::{SystemTime, UNIX_EPOCH};

use olol_middleware::trace::ACCESS;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// What was started: keeps the log going, and writes the last lines when it is dropped.
#[must_use]
pub struct Log(#[expect(dead_code, reason = "is dropped")] batches::Flush<Stderr>);

/// Starts to log to stderr. `level` is a word (`info`) or a filter (`olol=debug,olol::access=off`).
pub fn start(level: &str) -> anyhow::Result<Log> {
    let terminal = stderr().is_terminal();
    let (batches, flush) = batches::Batches::new(stderr(), !terminal)?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter(level)?)
        .with_writer(batches)
        .with_ansi(terminal)
        .map_event_format(|format| Lines(format.with_ansi(terminal)))
        .finish();
    // A test or an embedder may have set one before.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(Log(flush))
}

/// Writes events as tracing-subscriber does. Lines of the access log, of which there is one for every request, are written
/// without colours, and so for a quarter of the work.
struct Lines(Format);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if event.metadata().target() != ACCESS {
            let mut line = String::new();
            self.0.format_event(context, Writer::new(&mut line), event)?;
            return write_line(&mut out, &line);
        }
        // Made as one text, and then handed on: `out` finds out anew for each piece where that goes.
        thread_local! {
            static LINE: RefCell<String> = const { RefCell::new(String::new()) };
        }
        LINE.with_borrow_mut(|line| {
            line.clear();
            push_now(line)?;
            line.push_str("  INFO ");
            line.push_str(ACCESS);
            line.push(':');
            event.record(&mut Fields(line));
            line.push('\n');
            out.write_str(line)
        })
    }
}

/// Writes what stands for one event so that no part of it can be taken for another: errors repeat what others have said, in
/// as many lines as they like. What could change a terminal is made harmless by tracing-subscriber.
fn write_line(out: &mut Writer<'_>, line: &str) -> fmt::Result {
    let line = line.trim_end_matches('\n');
    let mut rest = line;
    while let Some(end) = rest.find(['\n', '\r']) {
        out.write_str(&rest[..end])?;
        rest = rest[end..].strip_prefix("\r\n").unwrap_or(&rest[end + 1..]);
        out.write_str("\n    | ")?;
    }
    out.write_str(rest)?;
    out.write_char('\n')
}

/// Writes fields as tracing-subscriber does.
struct Fields<'a>(&'a mut String);

impl Fields<'_> {
    fn begin(&mut self, field: &Field) -> &mut String {
        self.0.push(' ');
        self.0.push_str(field.name());
        self.0.push('=');
        self.0
    }
}

impl Visit for Fields<'_> {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.begin(field).push_str(itoa::Buffer::new().format(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let line = self.begin(field);
        // What a client wrote may hold anything; what needs no escape is written at once.
        if value.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\') {
            line.push('"');
            line.push_str(value);
            line.push('"');
        } else {
            let _ = write!(line, "{value:?}");
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = write!(self.begin(field), "{value:?}");
    }
}

/// Writes the time as tracing-subscriber does: its calendar is asked once a second.
fn push_now(line: &mut String) -> fmt::Result {
    thread_local! {
        static LAST: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    LAST.with_borrow_mut(|(second, text)| {
        let mut at = now();
        while *second != at.as_secs() || text.is_empty() {
            text.clear();
            tracing_subscriber::fmt::time::SystemTime.format_time(&mut Writer::new(text))?;
            text.truncate("2026-11-24T21:14:05".len());
            *second = at.as_secs();
            // The text may be of the next second already: then once more.
            at = now();
        }
        line.push_str(text);
        line.push('.');
        // Six digits, whatever they are: behind a million.
        let digits = 1_000_000 + at.subsec_micros();
        line.push_str(itoa::Buffer::new().format(digits).get(1..).unwrap_or_default());
        line.push('Z');
        Ok(())
    })
}

/// Reads a filter. A lone word must be a level: to the filter itself it is the name of a module, and nothing would be logged.
fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    let level = level.to_lowercase();
    let mut words = level.split(',').map(str::trim).filter(|word| !word.contains('='));
    if let Some(word) = words.find(|word| word.parse::<LevelFilter>().is_err()) {
        anyhow::bail!(
            "'{word}' is no log level: say error, warn, info, debug, trace or off, or a filter such as olol=debug"
        );
    }
    EnvFilter::builder().parse(&level).map_err(|error| anyhow::anyhow!("'{level}' is no log filter: {error}"))
}

/// Raises the limit of open files as far as the system lets us: every stream needs two.
pub fn raise_open_files() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        if limit.current != limit.maximum
            && setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_err()
        {
            tracing::warn!(?limit, "the limit of open files could not be raised");
        }
    }
}

/// How many files this process may open, if there is a limit.
pub(crate) fn open_files() -> Option<usize> {
    #[cfg(unix)]
    return usize::try_from(rustix::process::getrlimit(rustix::process::Resource::Nofile).current?).ok();
    #[cfg(not(unix))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_has_six_digits_behind_its_seconds() {
        for _ in 0..1000 {
            let mut line = String::new();
            push_now(&mut line).unwrap();
            assert!(
                line.parse::<jiff::Timestamp>().is_ok() && line.len() == "2026-11-24T21:14:05.012345Z".len(),
                "{line}"
            );
        }
    }

    #[test]
    fn nobody_writes_a_line_of_his_own_into_the_log() {
        let written = |text: &str| {
            let mut line = String::new();
            write_line(&mut Writer::new(&mut line), text).unwrap();
            line
        };
        assert_eq!(written("INFO all is well error=no\n"), "INFO all is well error=no\n");
        assert_eq!(
            written("WARN it fails error=no\n2026-01-01T00:00:00Z INFO fake\r\nmore\rand\n\n"),
            "WARN it fails error=no\n    | 2026-01-01T00:00:00Z INFO fake\n    | more\n    | and\n"
        );
    }
}
