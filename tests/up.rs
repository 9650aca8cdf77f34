//! `olol up` and `olol client` as a newcomer meets them: the real program, its output, and how it ends.
#![cfg(feature = "engine")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

const OLOL: &str = env!("CARGO_BIN_EXE_olol");
/// So that the folder of whoever runs the tests is left alone.
const TOKEN: &str = "the-token-of-the-tests-and-of-nobody-else";
const QUESTION: &str = "What is a load balancer?";
const ANSWER: &str =
    "A load balancer spreads requests over several servers, so that no single server has too much work.\n";
/// Nothing here takes longer, however busy the machine is.
const LIMIT: Duration = Duration::from_secs(60);

/// A running `olol up` with the built-in engine, and what it printed.
struct Up {
    process: Child,
    screen: String,
    port: String,
}

impl Up {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(OLOL);
        command.env("OLOL_TOKEN", TOKEN);
        command.args(["up", "--embedded", "--port", "0", "--agent-port", "0"]).args(arguments);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = lines_of(process.stdout.take().unwrap());
        let mut screen = String::new();
        while !screen.contains("Ctrl-C") {
            screen.push_str(&lines.recv_timeout(LIMIT).expect("olol up says where it is"));
            screen.push('\n');
        }
        let port = screen.split_once("http://127.0.0.1:").unwrap().1.lines().next().unwrap().to_owned();
        Self { process, screen, port }
    }

    fn client(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(OLOL);
        command.args(["client", "--port", &self.port]).args(arguments).stdin(Stdio::null());
        command
    }

    /// Asks it to stop, and returns how it ended.
    fn stop(mut self) -> std::process::ExitStatus {
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        self.process.wait().unwrap()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The lines of an output, read by a thread of their own so that waiting for one can end.
fn lines_of(output: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    lines
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn output(command: &mut Command) -> (String, String, bool) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (text(&stdout), text(&stderr), status.success())
}

/// Ids of the engines that a process has started.
#[cfg(target_os = "linux")]
fn engines_of(parent: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|children| children.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

#[test]
fn up_shows_one_screen_answers_and_ends_with_its_engine() {
    let up = Up::start(&[]);
    assert!(up.screen.lines().count() <= 24 && up.screen.lines().all(|line| line.len() <= 200), "{}", up.screen);
    for wanted in ["built-in engine", "olol-tiny", "curl http://127.0.0.1:", "OLLAMA_HOST="] {
        assert!(up.screen.contains(wanted), "no {wanted:?} in {}", up.screen);
    }
    let (said, _, fine) = output(&mut up.client(&["--model", "olol-tiny", "--prompt", QUESTION]));
    assert!(fine && said.ends_with(".\n"), "{said}");
    #[cfg(target_os = "linux")]
    let engines = engines_of(up.process.id());
    let ended = up.stop();
    assert_eq!(ended.code(), Some(0));
    #[cfg(target_os = "linux")]
    for engine in engines {
        assert!(!std::path::Path::new(&format!("/proc/{engine}")).exists(), "engine {engine} is still there");
    }
}

#[test]
fn a_client_reads_a_pipe_and_tells_how_it_went() {
    let up = Up::start(&[]);
    let mut command = up.client(&["--prompt", "-", "--stats", "--async"]);
    let mut asking = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    asking.stdin.take().unwrap().write_all(QUESTION.as_bytes()).unwrap();
    let answer = asking.wait_with_output().unwrap();
    assert!(answer.status.success() && !answer.stdout.is_empty());
    let stats = text(&answer.stderr);
    assert!(stats.contains("tokens/s") && stats.contains("server local]"), "{stats}");
    let (_, refusal, fine) = output(&mut up.client(&["--model", "nosuch", "--prompt", "hi"]));
    assert!(!fine && refusal.contains("model 'nosuch' not found"), "{refusal}");
}

#[test]
fn a_client_without_a_server_says_what_to_do() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let (_, refusal, fine) =
        output(Command::new(OLOL).args(["client", "--port", &free, "--prompt", "hi"]).stdin(Stdio::null()));
    assert!(!fine && refusal.contains("no Ollama answers at 127.0.0.1:") && refusal.contains("olol up"), "{refusal}");
}

#[test]
fn a_file_that_is_no_model_ends_up_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let notes = folder.path().join("notes.gguf");
    std::fs::write(&notes, "not a model").unwrap();
    let (_, refusal, fine) = output(Command::new(OLOL).env("OLOL_TOKEN", TOKEN).args([
        "up",
        "--port",
        "0",
        "--model",
        notes.to_str().unwrap(),
    ]));
    assert!(!fine && refusal.contains("notes.gguf is no GGUF file"), "{refusal}");
    assert_eq!(refusal.matches("olol:").count(), 1, "{refusal}");
}

#[test]
fn a_file_of_ones_own_is_served_under_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("My-Model.gguf");
    let ours = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/engine/olol-tiny/olol-tiny.gguf");
    std::fs::copy(ours, &file).unwrap();
    let up = Up::start(&["--model", file.to_str().unwrap()]);
    assert!(up.screen.contains("my-model"), "{}", up.screen);
    let mut body = String::new();
    let mut stream = std::net::TcpStream::connect(format!("127.0.0.1:{}", up.port)).unwrap();
    let ask = format!(r#"{{"model":"my-model","prompt":"{QUESTION}","stream":false,"options":{{"temperature":0}}}}"#);
    write!(
        stream,
        "POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{ask}",
        ask.len()
    )
    .unwrap();
    stream.read_to_string(&mut body).unwrap();
    assert!(body.contains(ANSWER.trim_end()) && body.contains("X-Olol-Server: local"), "{body}");
}

#[cfg(target_os = "linux")]
#[test]
fn an_engine_whose_parent_was_killed_goes_too_and_tidies_up() {
    let mut up = Up::start(&[]);
    let engine = *engines_of(up.process.id()).first().unwrap();
    let line = std::fs::read(format!("/proc/{engine}/cmdline")).unwrap();
    let arguments: Vec<String> = line.split(|byte| *byte == 0).map(text).collect();
    let folder = arguments.iter().skip_while(|argument| *argument != "--folder").nth(1).unwrap();
    assert!(std::path::Path::new(folder).join("engine.sock").exists());
    up.process.kill().unwrap();
    up.process.wait().unwrap();
    let patience = tokio::time::Instant::now() + LIMIT;
    while std::path::Path::new(folder).exists() || std::path::Path::new(&format!("/proc/{engine}/exe")).exists() {
        assert!(tokio::time::Instant::now() < patience, "engine {engine} or {folder} is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}
