//! A real Redis or Valkey.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::patiently;

/// A store on loopback that keeps nothing on the disk, unless it is told to.
#[derive(Debug)]
pub struct Store {
    child: Option<Child>,
    port: u16,
    folder: TempDir,
}

impl Store {
    /// Starts one.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Self { child: None, port: 0, folder };
        // Who has a port may lose it to another before the program listens there.
        for _ in 0..10 {
            store.port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            if store.runs().await {
                return store;
            }
        }
        panic!("the store does not start");
    }

    /// The table of a proxy that shares it.
    pub fn toml(&self) -> String {
        // Slow machines are no lost stores.
        format!("[state]\nurl = \"redis://127.0.0.1:{}\"\ntimeout-ms = 5000\n", self.port)
    }

    /// A connection to it.
    pub async fn connection(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}", self.port)).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    /// Waits until so many listen to what is told in it.
    pub async fn has_listeners(&self, count: i64) {
        let mut store = self.connection().await;
        patiently("somebody listens", async {
            loop {
                let asked = redis::cmd("PUBSUB").arg("NUMSUB").arg("olol:turns").query_async(&mut store).await;
                let (_, listeners): (String, i64) = asked.unwrap();
                if listeners >= count {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// It is killed, with all that it has in memory.
    pub async fn dies(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().await.unwrap();
    }

    /// It takes connections and answers nothing any more, or goes on.
    pub async fn freezes(&self, is_frozen: bool) {
        let id = self.child.as_ref().and_then(Child::id).unwrap().to_string();
        let signal = if is_frozen { "-STOP" } else { "-CONT" };
        assert!(Command::new("kill").args([signal, &id]).status().await.unwrap().success());
    }

    /// It runs again at the same address.
    pub async fn comes_back(&mut self) {
        assert!(self.runs().await, "the store does not start again");
    }

    /// Runs the program; false if it ends.
    async fn runs(&mut self) -> bool {
        let (program, libraries) = program();
        let mut command = Command::new(program);
        if let Some(libraries) = libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .args(["--dir", &self.folder.path().display().to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("the store cannot be run: {error}"));
        let answers = async {
            loop {
                if child.try_wait().unwrap().is_some() {
                    return false;
                }
                if TcpStream::connect(("127.0.0.1", self.port)).await.is_ok() {
                    return true;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let runs = patiently("the store listens", answers).await;
        self.child = runs.then_some(child);
        runs
    }
}

/// The program, and the folder of its libraries where both were unpacked.
fn program() -> (PathBuf, Option<PathBuf>) {
    if let Some(program) = std::env::var_os("OLOL_REDIS") {
        return (program.into(), None);
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    if let Some(root) = cache.map(|cache| cache.join("olol/redis"))
        && root.join("usr/bin/redis-server").exists()
    {
        let libraries = std::fs::read_dir(root.join("usr/lib")).unwrap().map(|entry| entry.unwrap().path());
        let libraries = libraries.into_iter().find(|path| has_libraries(path));
        return (root.join("usr/bin/redis-server"), libraries);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let named = ["valkey-server", "redis-server"];
    let found =
        std::env::split_paths(&path).flat_map(|folder| named.map(|name| folder.join(name))).find(|file| file.exists());
    let found = found.expect(
        "this test needs a Redis or a Valkey: `./dev test` unpacks the distribution's package; elsewhere install one, or name \
         its program with OLOL_REDIS",
    );
    (found, None)
}

fn has_libraries(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains(".so"))
}
