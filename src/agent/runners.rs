//! How many calls the runners of this machine's Ollama answer side by side, and with which context: read from their command
//! lines, since Ollama itself does not tell.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use olol_middleware::cluster::Loaded;
use serde_json::json;
use tokio::time::Instant;

use crate::ollama::{Ask, Ollama};

/// What the command line of a runner says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Runner {
    slots: u32,
    context: u32,
    pid: u32,
}

/// A look at all processes takes milliseconds: as long as the models in memory are the same, it is believed so long.
const BELIEVED: Duration = Duration::from_secs(10);
/// The same while not all runners were found, of models that are new in memory: theirs may be about to start.
const TRIED: Duration = Duration::from_secs(1);

/// Knows which weights belong to which model, and how its runner is.
#[derive(Debug, Default)]
pub(super) struct Runners {
    /// Digest of a model → name of the file with its weights.
    weights: HashMap<String, String>,
    /// Digest of a model whose weights the Ollama did not name → when it was asked.
    unnamed: HashMap<String, Instant>,
    running: HashMap<String, Runner>,
    looked: Option<Look>,
}

/// A look at the processes.
#[derive(Debug)]
struct Look {
    at: Instant,
    /// For which models: digests and contexts.
    models: Vec<(String, u32)>,
    /// Since when these are in memory.
    since: Instant,
}

impl Runners {
    /// Adds slots and context to models in memory, as far as their runners are found. False if a runner that is on this
    /// machine may still come.
    pub(super) async fn amend(&mut self, ollama: &Ollama, loaded: &mut [Loaded]) -> bool {
        let models: Vec<_> = loaded.iter().map(|model| (model.digest.clone(), model.context_length)).collect();
        let is_loaded = |digest: &String| models.iter().any(|(other, _)| other == digest);
        self.weights.retain(|digest, _| is_loaded(digest));
        // It may only have been busy: it is asked again.
        self.unnamed.retain(|digest, asked| is_loaded(digest) && asked.elapsed() < BELIEVED);
        if loaded.is_empty() {
            self.looked = None;
            return true;
        }
        let same = self.looked.as_ref().filter(|look| look.models == models);
        let is_found = loaded.iter().all(|model| self.of(model).is_some());
        let is_fresh = |look: &Look| {
            let believed = if is_found || look.since.elapsed() > BELIEVED { BELIEVED } else { TRIED };
            look.at.elapsed() < believed
        };
        if !same.is_some_and(is_fresh) {
            let at = Instant::now();
            let since = same.map_or(at, |look| look.since);
            let Ok(running) = tokio::task::spawn_blocking(|| find(Path::new("/proc"))).await else { return true };
            self.running = running;
            self.looked = Some(Look { at, models, since });
        }
        if self.running.is_empty() {
            return true;
        }
        for model in &mut *loaded {
            if !self.weights.contains_key(&model.digest) && !self.unnamed.contains_key(&model.digest) {
                match weights(ollama, &model.name).await {
                    Some(file) => drop(self.weights.insert(model.digest.clone(), file)),
                    None => drop(self.unnamed.insert(model.digest.clone(), Instant::now())),
                }
            }
            if let Some(runner) = self.of(model) {
                model.slots = runner.slots;
                if model.context_length == 0 && runner.slots != 0 {
                    model.context_length = runner.context / runner.slots;
                }
            }
        }
        loaded.iter().all(|model| model.slots > 0)
    }

    /// The processes of the runners that were found for these models.
    pub(super) fn pids(&self, loaded: &[Loaded]) -> Vec<u32> {
        loaded.iter().filter_map(|model| Some(self.of(model)?.pid)).collect()
    }

    fn of(&self, model: &Loaded) -> Option<Runner> {
        self.running.get(self.weights.get(&model.digest)?).copied()
    }
}

/// The file of a model's weights, as its Modelfile names it.
async fn weights(ollama: &Ollama, model: &str) -> Option<String> {
    let ask = Ask { infers: false, ..Ask::post("/api/show", json!({"model": model}).to_string()) };
    let body = ollama.send(ask).await.ok()?.body.collect(64 << 20).await.ok()?;
    let shown: serde_json::Value = serde_json::from_slice(&body).ok()?;
    let from = shown["modelfile"].as_str()?.lines().find_map(|line| line.strip_prefix("FROM "))?;
    file_name(from.trim().trim_matches('"'))
}

fn file_name(path: &str) -> Option<String> {
    Some(Path::new(path).file_name()?.to_str()?.to_owned())
}

/// The runners of this machine, by the file of their weights.
fn find(proc: &Path) -> HashMap<String, Runner> {
    let Ok(processes) = std::fs::read_dir(proc) else { return HashMap::new() };
    let runner = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let (file, runner) = read(&std::fs::read(entry.path().join("cmdline")).ok()?)?;
        Some((file, Runner { pid, ..runner }))
    };
    processes.flatten().filter_map(runner).collect()
}

/// Reads one command line, its arguments ended by zero bytes.
fn read(line: &[u8]) -> Option<(String, Runner)> {
    let arguments: Vec<&str> =
        line.split(|byte| *byte == 0).filter_map(|argument| std::str::from_utf8(argument).ok()).collect();
    let program = file_name(arguments.first()?)?;
    let is_runner = program.contains("llama-server")
        || (program.contains("ollama") && arguments.contains(&"runner"))
        // Our own engine answers one call at a time.
        || (program.contains("olol") && arguments.get(1) == Some(&"engine"));
    if !is_runner {
        return None;
    }
    let value = |names: &[&str]| {
        let at = arguments.iter().position(|argument| names.contains(argument))?;
        arguments.get(at + 1).copied()
    };
    let number = |names: &[&str]| value(names).and_then(|text| text.parse().ok()).unwrap_or(0);
    let file = file_name(value(&["--model", "-m"])?)?;
    let (slots, context) = (number(&["-np", "--parallel"]).max(1), number(&["-c", "--ctx-size"]));
    Some((file, Runner { slots, context, pid: 0 }))
}

#[cfg(test)]
mod tests {
    use olol_middleware::ServerId;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::ollama::Endpoint;

    /// The words as `/proc` has them, a NUL after each.
    fn line(words: &str) -> Vec<u8> {
        format!("{words} ").replace(' ', "\0").into_bytes()
    }

    #[test]
    fn a_command_line_tells_slots_and_context() {
        let new = line("/usr/lib/ollama/llama-server --model /models/blobs/sha256-aa --port 9 -c 8192 -np 4");
        assert_eq!(read(&new), Some(("sha256-aa".to_owned(), Runner { slots: 4, context: 8192, pid: 0 })));
        let older = line("/usr/bin/ollama runner --model /m/sha256-bb --ctx-size 2048 --parallel 2");
        assert_eq!(read(&older), Some(("sha256-bb".to_owned(), Runner { slots: 2, context: 2048, pid: 0 })));
        let own = line("/usr/bin/olol engine --model /tmp/olol-x/olol-tiny.gguf");
        assert_eq!(read(&own), Some(("olol-tiny.gguf".to_owned(), Runner { slots: 1, context: 0, pid: 0 })));
        assert_eq!(read(&line("/usr/bin/vim --model x")), None);
        assert_eq!(read(b""), None);
    }

    #[tokio::test]
    async fn an_ollama_that_did_not_name_the_weights_is_asked_again() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::parse(&listener.local_addr().unwrap().to_string(), 0).unwrap();
        let connect = Duration::from_secs(3);
        let ollama = Ollama::maybe_over_tls(ServerId::new("a"), endpoint, connect).unwrap();
        let answers = tokio::spawn(async move {
            let shown = r#"{"modelfile":"FROM /models/blobs/sha256-aa\n"}"#;
            for (status, body) in [("503 Service Unavailable", r#"{"error":"busy"}"#), ("200 OK", shown)] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 4096];
                let _ = stream.read(&mut asked).await.unwrap();
                let answer =
                    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let mut loaded = [Loaded { name: "tiny".to_owned(), digest: "d".to_owned(), ..Loaded::default() }];
        let mut runners = Runners::default();
        let mut slots = async |runners: &mut Runners| {
            // A look at the processes of a moment ago.
            let at = Instant::now();
            runners.running = HashMap::from([("sha256-aa".to_owned(), Runner { slots: 4, context: 8, pid: 1 })]);
            runners.looked = Some(Look { at, models: vec![("d".to_owned(), loaded[0].context_length)], since: at });
            runners.amend(&ollama, &mut loaded).await;
            loaded[0].slots
        };
        assert_eq!((slots(&mut runners).await, slots(&mut runners).await), (0, 0), "not at once");
        tokio::time::pause();
        tokio::time::advance(BELIEVED).await;
        tokio::time::resume();
        assert_eq!(slots(&mut runners).await, 4);
        answers.await.unwrap();
    }

    #[test]
    fn runners_are_found_among_processes() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, words) in [("12", "llama-server -m /b/sha256-aa -np 2"), ("self", "llama-server -m /b/x")] {
            std::fs::create_dir(proc.path().join(pid)).unwrap();
            std::fs::write(proc.path().join(pid).join("cmdline"), line(words)).unwrap();
        }
        assert_eq!(
            find(proc.path()),
            HashMap::from([("sha256-aa".to_owned(), Runner { slots: 2, context: 0, pid: 12 })])
        );
    }
}
