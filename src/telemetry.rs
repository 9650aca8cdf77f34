//! Where logs go, and how many files may be open.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts to log to stderr. `level` is a word (`info`) or a filter (`olol=debug,olol::access=off`).
pub fn start(level: &str) -> anyhow::Result<()> {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter(level)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .finish();
    // A test or an embedder may have set one before.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
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
