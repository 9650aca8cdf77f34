//! The command line.

mod client;
#[cfg(feature = "engine")]
mod engine;
mod keys;
mod proxy;
mod server;
mod up;

use std::io::Write;

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
    /// Make, list and remove the keys of clients
    Keys(keys::Arguments),
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
            Command::Keys(arguments) => arguments.run(),
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

/// Prints a result, or a piece of one. Nobody reading any more is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

/// Says something that is not the result.
fn say(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The signals that ask us to stop. They count from the moment that this exists: one that comes while we start is not lost,
/// and does not kill.
struct Stop {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(windows)]
    interrupt: tokio::signal::windows::CtrlC,
}

impl Stop {
    fn listen() -> anyhow::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
        }
        #[cfg(windows)]
        Ok(Self { interrupt: tokio::signal::windows::ctrl_c()? })
    }

    /// Waits until somebody asks us to stop.
    async fn asked(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        #[cfg(windows)]
        self.interrupt.recv().await;
    }

    /// What `work` comes to, or nothing if somebody asks us to stop before.
    async fn unless_asked<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = work => Some(done),
            () = self.asked() => None,
        }
    }

    /// Lets `ending` take its time, unless somebody asks a second time: who presses Ctrl-C again means at once.
    async fn gently<T>(&mut self, ending: impl Future<Output = T>) -> Option<T> {
        tracing::info!("stopping: answers may finish, nothing new is taken; asked once more, all ends at once");
        self.unless_asked(ending).await
    }
}
