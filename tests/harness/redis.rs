//! A real Redis or Valkey, and one who stands between it and a proxy and does what no store does on demand.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::patiently;

/// A store on loopback that keeps nothing on the disk, unless it is told to.
#[derive(Debug)]
pub struct Store {
    child: Option<Child>,
    port: u16,
    folder: TempDir,
    /// More of its options.
    options: Vec<String>,
}

impl Store {
    /// Starts one.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts one with more options. With `--tls-port` among them, its port is that.
    pub async fn start_with(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut store = Self { child: None, port: 0, folder, options };
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
        Self::toml_for(&format!("redis://127.0.0.1:{}", self.port))
    }

    /// The same with this address.
    pub fn toml_for(url: &str) -> String {
        // Slow machines are no lost stores.
        format!("[state]\nurl = \"{url}\"\ntimeout-ms = 5000\n")
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Has it do something, as whoever may do all.
    pub async fn does(&self, words: &[&str]) {
        let address = self.address();
        let client = redis::Client::open(format!("redis://{address}")).unwrap();
        let mut store = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(words[0]);
        for word in &words[1..] {
            command.arg(*word);
        }
        command.exec_async(&mut store).await.unwrap_or_else(|error| panic!("{words:?}: {error}"));
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
        let port = self.port.to_string();
        let is_tls = self.options.iter().any(|option| option == "--tls-cert-file");
        if is_tls {
            command.args(["--port", "0", "--tls-port", &port]);
        } else {
            command.args(["--port", &port]);
        }
        command
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .args(&self.options)
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

/// How one behaves who stands before a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Passes all on.
    Passes,
    /// Passes answers on when they are so old.
    Late(Duration),
    /// Takes what comes and says nothing.
    Silent,
    /// Says this to whatever comes.
    Babbles(&'static [u8]),
    /// Says this once to whatever comes first, and then that for ever, as fast as it is read.
    Floods(&'static [u8], &'static [u8]),
    /// Takes connections and closes them.
    HangsUp,
}

/// One who stands before a store.
#[derive(Debug)]
pub struct Middleman {
    address: SocketAddr,
    mood: watch::Sender<Mood>,
    _tasks: JoinSet<()>,
}

impl Middleman {
    /// Stands before a store.
    pub async fn before(store: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mood = watch::Sender::new(Mood::Passes);
        let moods = mood.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(talk(stream, store, moods.subscribe()));
            }
        });
        Self { address, mood, _tasks: tasks }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Is in another mood from now on; whoever talks with it now finds himself cut off only by what that does.
    pub fn is(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }
}

async fn talk(client: TcpStream, store: SocketAddr, mut moods: watch::Receiver<Mood>) {
    let store = TcpStream::connect(store).await.unwrap();
    let ((mut from, mut to), (mut answers, mut asks)) = (client.into_split(), store.into_split());
    let (mut asked, mut answer) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        let mood = *moods.borrow_and_update();
        if mood == Mood::HangsUp {
            return;
        }
        tokio::select! {
            _ = moods.changed() => {}
            read = from.read(&mut asked) => {
                let Some(length) = read.ok().filter(|length| *length > 0) else { return };
                let done = match mood {
                    Mood::Passes | Mood::Late(_) => asks.write_all(&asked[..length]).await,
                    Mood::Babbles(what) => to.write_all(what).await,
                    Mood::Floods(begins, goes_on) => flood(&mut to, begins, goes_on).await,
                    Mood::Silent | Mood::HangsUp => Ok(()),
                };
                if done.is_err() {
                    return;
                }
            }
            read = answers.read(&mut answer) => {
                let Some(length) = read.ok().filter(|length| *length > 0) else { return };
                if let Mood::Late(time) = mood {
                    tokio::time::sleep(time).await;
                }
                if matches!(mood, Mood::Passes | Mood::Late(_)) && to.write_all(&answer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn flood(to: &mut (impl AsyncWriteExt + Unpin), begins: &[u8], goes_on: &[u8]) -> std::io::Result<()> {
    to.write_all(begins).await?;
    let much = goes_on.repeat((64 << 10) / goes_on.len());
    loop {
        to.write_all(&much).await?;
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
