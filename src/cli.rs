//! The command line.

mod at;
mod certs;
mod check;
mod client;
mod drain;
#[cfg(feature = "engine")]
mod engine;
mod explain;
mod flags;
mod keys;
mod models;
mod proxy;
mod server;
mod status;
mod token;
mod up;

use std::fmt;
use std::io::Write;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use http::{HeaderValue, header};
use olol_middleware::{Reply, ServerId};

use crate::agent::Agent;
use crate::discovery;
use crate::ollama::{Ask, Endpoint, Ollama};
use crate::proxy::Proxy;
use crate::reload::Trigger;
use crate::security::tls;
use flags::TlsFlags;

/// Many Ollama servers behind one address that behaves exactly like one.
#[derive(Debug, Parser)]
#[command(name = "olol", version, about, propagate_version = true, disable_help_subcommand = true)]
struct Cli {
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
    /// Check a configuration, and print the stack, every value, and where it comes from
    Check(check::Arguments),
    /// Ask a running proxy what it would do with a request, or what it did with one
    Explain(explain::Arguments),
    /// Show the servers, models or clients of a running proxy
    Status(status::Arguments),
    /// Show which models the servers of a running proxy have, pull, copy and delete them, and say which should be where
    Models(models::Arguments),
    /// Have a server of a running proxy finish what it has, and give it nothing new
    Drain(drain::Arguments),
    /// Let a server take calls again
    Undrain(drain::At),
    /// Make, list and remove the keys of clients
    Keys(keys::Arguments),
    /// Print the token that the machines of a cluster share
    Token(token::Arguments),
    /// Make a CA for the cluster, and certificates of it
    Certs(certs::Arguments),
    /// The process of the built-in engine
    #[cfg(feature = "engine")]
    #[command(hide = true)]
    Engine(engine::Arguments),
}

/// Runs the command that the arguments of this process say.
pub fn run() -> anyhow::Result<()> {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let _log = crate::telemetry::start(&cli.log_level)?;
    // What each flag was set by.
    let given = matches.subcommand().map_or(&matches, |(_, given)| given);
    match cli.command {
        Command::Up(arguments) => arguments.run(given),
        Command::Proxy(arguments) => arguments.run(given),
        Command::Server(arguments) => arguments.run(),
        Command::Client(arguments) => arguments.run(),
        Command::Check(arguments) => arguments.run(given),
        Command::Explain(arguments) => arguments.run(),
        Command::Status(arguments) => arguments.run(),
        Command::Models(arguments) => arguments.run(),
        Command::Drain(arguments) => arguments.run(),
        Command::Undrain(arguments) => arguments.run(),
        Command::Keys(arguments) => arguments.run(),
        Command::Token(arguments) => arguments.run(),
        Command::Certs(arguments) => arguments.run(),
        #[cfg(feature = "engine")]
        Command::Engine(arguments) => arguments.run(),
    }
}

/// A runtime with so many worker threads; 0: one for two processors. A thread relays more than any server answers, and what
/// the kernel does for it, and the server if it is here, need processors of their own.
fn runtime(threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    crate::telemetry::raise_open_files();
    let half = || std::thread::available_parallelism().map_or(1, |processors| processors.get().div_ceil(2));
    let mut builder = match if threads == 0 { half() } else { threads } {
        1 => tokio::runtime::Builder::new_current_thread(),
        threads => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
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

/// The signal that asks to read the configuration again. It counts from the moment that this exists, and kills no more.
struct Hangups(#[cfg(unix)] tokio::signal::unix::Signal);

impl Hangups {
    fn listen() -> anyhow::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self(signal(SignalKind::hangup())?))
        }
        #[cfg(windows)]
        Ok(Self())
    }

    /// Reloads a proxy whenever it is asked to; for ever.
    async fn reload(&mut self, proxy: &Proxy) {
        #[cfg(unix)]
        while self.0.recv().await.is_some() {
            // What is wrong stands in the log.
            let _ = proxy.reload(Trigger::Signal).await;
        }
        std::future::pending::<()>().await;
    }
}

/// Tells the local network of an agent, if it may. Where that cannot be done, the agent serves those who know where it is.
fn announce(agent: &Agent, config: &discovery::Config) -> Option<discovery::Announcement> {
    if !config.mdns {
        return None;
    }
    let announced = discovery::announce(agent.tells(), agent.address(), config);
    if announced.is_ok() && agent.address().ip().is_loopback() {
        tracing::info!(
            "only proxies on this machine find the agent: it listens on loopback; --host 0.0.0.0 serves other machines"
        );
    }
    announced
        .inspect_err(
            |error| tracing::warn!(%error, "the local network is not told of the agent; name it with --servers"),
        )
        .ok()
}

/// Whom a command asks.
#[derive(Clone, Copy, Debug)]
enum Whom {
    /// A proxy of ours.
    Proxy,
    /// A proxy, or any Ollama.
    Ollama,
}

impl fmt::Display for Whom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Proxy => "the proxy",
            Self::Ollama => "the proxy or the Ollama",
        })
    }
}

/// An Ollama, or a proxy; over TLS as the flags say.
fn reach(name: &str, endpoint: Endpoint, tls: &TlsFlags) -> anyhow::Result<Ollama> {
    let connector = if endpoint.is_tls() { Some(tls.connector()?) } else { None };
    Ok(Ollama::reached_by(ServerId::new(name), endpoint, connector, Duration::from_secs(5)))
}

/// Sends a call to it, which may be answered in whichever way.
async fn send(ollama: &Ollama, mut ask: Ask, whom: Whom) -> anyhow::Result<Reply> {
    let name = HeaderValue::from_static(concat!("olol/", env!("CARGO_PKG_VERSION")));
    ask.headers.entry(header::USER_AGENT).or_insert(name);
    ollama.send(ask).await.map_err(|error| {
        let reason = match error {
            olol_middleware::Error::Server { source, .. } => tls::told(source.to_string(), source.source()),
            other => other.to_string(),
        };
        // Who wants a certificate and sees none says so and closes: what comes first here is chance.
        let is_closed =
            ["writing a body", "reset by peer", "roken pipe", "closed"].iter().any(|end| reason.contains(end));
        let hint = if ollama.endpoint().is_tls() && is_closed && !reason.contains("--tls-cert") {
            "; if it takes only those who show a certificate of its CA: name yours in --tls-cert"
        } else {
            ""
        };
        let (nobody, start) = match whom {
            Whom::Proxy => ("no proxy", "`olol proxy` or `olol up`"),
            Whom::Ollama => ("no Ollama", "`olol up`"),
        };
        anyhow::anyhow!("{nobody} answers at {}: {reason}{hint} (is it running? {start} starts one)", ollama.endpoint())
    })
}
