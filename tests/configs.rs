//! Every file in `config/` is one that runs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::path::{Path, PathBuf};

use harness::{Cluster, Olol, Process};

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|ending| ending == "toml")).collect()
}

#[tokio::test]
async fn a_proxy_runs_with_each_file() {
    let files = files();
    assert!(files.len() > 1, "{files:?}");
    for file in files {
        let cluster = Cluster::of(2).await.all_have_loaded("tiny");
        let olol = Olol::from_file(&cluster, &file).await;
        assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world", "{}", file.display());
        assert_eq!(olol.get("/api/tags").await.names(), ["tiny:latest"]);
        cluster.server(0).dies();
        for _ in 0..4 {
            assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world", "{}", file.display());
        }
    }
}

#[tokio::test]
async fn the_check_finds_each_file_good() {
    for file in files() {
        let ended = Process::run(&["check", file.to_str().unwrap()]).await;
        let text = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success() && text.contains("is good"), "{text}{}", String::from_utf8_lossy(&ended.stderr));
    }
}

#[tokio::test]
async fn the_check_tells_the_stack_and_where_values_come_from() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("olol.toml");
    std::fs::write(&file, "[stack]\norder = [\"trace\", \"retry\"]\n[proxy]\nport = 1\n").unwrap();
    let file = file.to_str().unwrap();
    for arguments in [&["check", file][..], &["check", "--config", file]] {
        let ended = Process::run(&[arguments, &["--servers", "gpu1"]].concat()).await;
        let text = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert_eq!(ended.status.code(), Some(0), "{text}");
        let line = |begin: &str| {
            let found = text.lines().find(|line| line.trim_start().starts_with(begin));
            found.unwrap_or_else(|| panic!("{begin}: {text}")).to_owned()
        };
        assert!(line("1  trace").contains("what was asked") && line("2  retry").contains("another server"));
        assert!(line("-  model-route").contains("off"));
        assert!(line("proxy.port").ends_with(&format!("{file}:4")));
        assert!(line("proxy.servers").contains("[\"gpu1\"]") && line("proxy.servers").ends_with("flag --servers"));
        assert!(line("proxy.host").ends_with("default"));
        assert!(!text.contains('\u{1b}'), "no colours");
    }
    let ended = Process::run(&["check", file, "--json"]).await;
    let told: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(told["layers"][1]["layer"], "retry");
}

#[tokio::test]
async fn the_check_of_a_bad_file_fails_with_what_is_wrong() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[stack]\norder = [\"retry\", \"model-route\"]\n").unwrap();
    let ended = Process::run(&["check", file.path().to_str().unwrap()]).await;
    let error = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(1) && error.contains("line 2") && error.contains("must come first"), "{error}");
    assert!(ended.stdout.is_empty());
}
