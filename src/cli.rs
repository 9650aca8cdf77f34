//! The command line.

mod client;
#[cfg(feature = "engine")]
mod engine;
mod proxy;
mod server;
mod up;

use clap::{Parser, Subcommand};

/// Many Ollama servers behind one address that behaves exactly like one.
#[derive(Debug, Parser)]
#[command(name = "olol", version, about, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What is logged: error, warn, info, debug, trace, or a filter such as olol=debug,olol::access=off
    #[arg(long, global = true, env = "OLOL_LOG_LEVEL", default_value = "info", value_name = "LEVEL")]
    log_level: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything that one machine needs: a proxy, an agent, and the Ollama of this machine or the built-in engine
    Up(up::Arguments),
    /// Run the proxy: one address for many servers
    Proxy(proxy::Arguments),
    /// Run the agent beside an Ollama
    Server(server::Arguments),
    /// Ask a model and print what it says
    Client(client::Arguments),
    /// The process of the built-in engine
    #[cfg(feature = "engine")]
    #[command(hide = true)]
    Engine(engine::Arguments),
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<()> {
        crate::telemetry::start(&self.log_level)?;
        match self.command {
            Command::Up(arguments) => arguments.run(),
            Command::Proxy(arguments) => arguments.run(),
            Command::Server(arguments) => arguments.run(),
            Command::Client(arguments) => arguments.run(),
            #[cfg(feature = "engine")]
            Command::Engine(arguments) => arguments.run(),
        }
    }
}

/// A runtime with so many worker threads; 0: one a processor.
fn runtime(threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    crate::telemetry::raise_open_files();
    let mut builder = match threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    Ok(builder.enable_all().build()?)
}

/// Waits until somebody asks us to stop.
async fn stop_asked() -> anyhow::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => {}
            interrupted = tokio::signal::ctrl_c() => interrupted?,
        }
        Ok(())
    }
    #[cfg(not(unix))]
    Ok(tokio::signal::ctrl_c().await?)
}
