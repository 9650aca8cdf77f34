//! Where logs go, and how many files may be open.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts to log to stderr. `level` is a word (`info`) or a filter (`olol=debug,olol::access=off`).
pub fn start(level: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::builder()
        .parse(level.to_lowercase())
        .map_err(|error| anyhow::anyhow!("'{level}' is no log level (error, warn, info, debug, trace): {error}"))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .finish();
    // A test or an embedder may have set one before.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

/// Raises the limit of open files as far as the system lets us: every stream needs two.
pub fn raise_open_files() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        if limit.current != limit.maximum && setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_err() {
            tracing::warn!(?limit, "the limit of open files could not be raised");
        }
    }
}
