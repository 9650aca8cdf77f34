//! The built-in engine: llama.cpp as a small Ollama over a Unix socket, in a child process of the same binary.
//!
//! An agent treats it as one more Ollama. llama.cpp is used through `llama-cpp-4`: it has the RPC backend that models too
//! big for one box will need as a cargo feature, so that `cargo install` gives a whole engine too (`llama-cpp-sys-2` takes
//! it from the environment of the build only), and llama.cpp's own samplers and Jinja templates behind a safe API.

mod answer;
mod child;
mod keep_alive;
mod log;
mod model;
mod request;
mod runner;
mod stops;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use child::run as run_child;

/// The model that comes with OLOL: see `olol-tiny/` for what it was made from.
const OLOL_TINY: &[u8] = include_bytes!("engine/olol-tiny/olol-tiny.gguf");
/// What a child says when it can be asked.
const READY: &str = "ready";
/// Pauses between restarts of a child that ends early: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A child that lived this long was well.
const WELL_AFTER: Duration = Duration::from_secs(30);

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The socket, the model's file or the process could not be made.
    #[error("the built-in engine cannot start: {0}")]
    Start(#[from] std::io::Error),
    /// The model cannot be used.
    #[error("{0}")]
    Model(String),
}

/// How to start an engine.
#[derive(Clone, Debug)]
pub struct Start {
    /// The GGUF file to serve; `None`: olol-tiny.
    pub model: Option<PathBuf>,
    /// The `olol` binary to run it with.
    pub program: PathBuf,
}

impl Start {
    /// This binary with a model.
    pub fn of(model: Option<PathBuf>) -> std::io::Result<Self> {
        Ok(Self { model, program: std::env::current_exe()? })
    }
}

/// A running engine: its child is started again whenever it ends.
#[derive(Debug)]
pub struct Engine {
    socket: PathBuf,
    stop: CancellationToken,
    keeping: JoinHandle<()>,
    /// Process id of the child; 0 while there is none.
    process: Arc<AtomicU32>,
    // The socket, and olol-tiny; removed with the engine.
    _folder: TempDir,
}

impl Engine {
    /// Starts an engine, and waits until it can be asked.
    pub async fn start(start: Start) -> Result<Self, EngineError> {
        let folder = tempfile::Builder::new().prefix("olol-").tempdir()?;
        let model = if let Some(model) = start.model {
            model
        } else {
            let model = folder.path().join("olol-tiny.gguf");
            tokio::fs::write(&model, OLOL_TINY).await?;
            model
        };
        let socket = folder.path().join("engine.sock");
        let process = Arc::default();
        let listener = UnixListener::bind(&socket)?;
        let folder_path = folder.path().to_owned();
        let keeper =
            Keeper { program: start.program, model, folder: folder_path, listener, process: Arc::clone(&process) };
        let child = keeper.spawn().await?;
        let stop = CancellationToken::new();
        let keeping = tokio::spawn(keeper.keep(child, stop.clone()));
        Ok(Self { socket, stop, keeping, process, _folder: folder })
    }

    /// Where it answers: a Unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Process id of the child, if there is one now.
    pub fn process_id(&self) -> Option<u32> {
        Some(self.process.load(Ordering::Relaxed)).filter(|id| *id != 0)
    }

    /// Ends it.
    pub async fn stop(self) {
        self.stop.cancel();
        let _ = self.keeping.await;
    }
}

/// Keeps a child running.
struct Keeper {
    program: PathBuf,
    model: PathBuf,
    folder: PathBuf,
    /// Stays open between children, so that calls wait for the next one.
    listener: UnixListener,
    process: Arc<AtomicU32>,
}

impl Keeper {
    /// Starts a child, and waits for its first word.
    async fn spawn(&self) -> Result<Child, EngineError> {
        let socket = OwnedFd::from(self.listener.try_clone()?);
        let mut command = std::process::Command::new(&self.program);
        command
            .arg("engine")
            .arg("--model")
            .arg(&self.model)
            .arg("--folder")
            .arg(&self.folder)
            .stdin(Stdio::from(socket))
            .stdout(Stdio::piped())
            // llama.cpp would start a debugger when it aborts.
            .env("GGML_NO_BACKTRACE", "1")
            // Ctrl-C in a terminal is for the parent, which lets answers finish.
            .process_group(0);
        let mut child = Command::from(command).kill_on_drop(true).spawn()?;
        let Some(stdout) = child.stdout.take() else {
            return Err(EngineError::Model("the engine has no output".to_owned()));
        };
        match BufReader::new(stdout).lines().next_line().await? {
            Some(line) if line == READY => {
                self.process.store(child.id().unwrap_or(0), Ordering::Relaxed);
                Ok(child)
            }
            Some(why) => Err(EngineError::Model(why)),
            None => Err(EngineError::Model(format!("the engine ended before it was ready: {}", child.wait().await?))),
        }
    }

    async fn keep(self, mut child: Child, stop: CancellationToken) {
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            tokio::select! {
                () = stop.cancelled() => {
                    let _ = child.kill().await;
                    return;
                }
                ended = child.wait() => match ended {
                    Ok(status) => tracing::warn!(%status, "the engine ended; starting it again"),
                    Err(error) => tracing::warn!(%error, "the engine was lost; starting it again"),
                },
            }
            self.process.store(0, Ordering::Relaxed);
            if begun.elapsed() >= WELL_AFTER {
                pause = FIRST_PAUSE;
            }
            child = loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
                match self.spawn().await {
                    Ok(child) => break child,
                    Err(error) => tracing::error!(%error, "the engine could not be started again"),
                }
            };
        }
    }
}
