//! Whether processes of this machine may have begun or ended: an Ollama's models come and go with the processes of their
//! runners, so that as long as there is nothing new here, there is nothing new there. On Linux that costs a few microseconds.

use std::path::{Path, PathBuf};

/// The processes, as they were at the last look.
#[derive(Debug)]
pub(super) struct Processes {
    proc: PathBuf,
    /// The last process or thread that was begun.
    youngest: Option<String>,
    /// Those whose end matters.
    followed: Vec<u32>,
}

impl Processes {
    /// Those of this machine.
    pub(super) fn of_this_machine() -> Self {
        Self::in_folder(Path::new("/proc"))
    }

    fn in_folder(proc: &Path) -> Self {
        Self { proc: proc.to_owned(), youngest: None, followed: Vec::new() }
    }

    /// Follows these from now on.
    pub(super) fn follow(&mut self, pids: Vec<u32>) {
        self.followed = pids;
    }

    /// Whether one may have begun, or one that is followed has ended, since the last look; true where nobody can tell.
    pub(super) fn stir(&mut self) -> bool {
        let load = std::fs::read_to_string(self.proc.join("loadavg")).unwrap_or_default();
        let youngest = load.split_ascii_whitespace().nth(4).map(str::to_owned);
        let before = self.followed.len();
        self.followed.retain(|pid| self.proc.join(pid.to_string()).exists());
        let is_calm = youngest.is_some() && youngest == self.youngest && self.followed.len() == before;
        self.youngest = youngest;
        !is_calm
    }
}

/// The Ollamas of this machine whose processes are seen from here.
pub(super) fn ollamas() -> Vec<u32> {
    servers(Path::new("/proc"))
}

fn servers(proc: &Path) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(proc) else { return Vec::new() };
    let server = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0);
        let program = Path::new(std::str::from_utf8(words.next()?).ok()?).file_name()?;
        (program == "ollama" && words.any(|word| word == b"serve")).then_some(pid)
    };
    entries.flatten().filter_map(server).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_begins_or_ends_is_seen() {
        let proc = tempfile::tempdir().unwrap();
        let proc = proc.path();
        let mut processes = Processes::in_folder(proc);
        assert!(processes.stir() && processes.stir(), "nobody tells");
        let youngest = |pid: u32| std::fs::write(proc.join("loadavg"), format!("0.1 0.2 0.3 1/234 {pid}\n")).unwrap();
        youngest(7);
        std::fs::create_dir(proc.join("7")).unwrap();
        processes.follow(vec![7]);
        assert!(processes.stir());
        assert!(!processes.stir());
        youngest(8);
        assert!(processes.stir() && !processes.stir());
        std::fs::remove_dir(proc.join("7")).unwrap();
        assert!(processes.stir() && !processes.stir());
    }

    #[test]
    fn an_ollama_that_serves_is_found() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, line) in [("3", "/usr/bin/ollama\0run\0tiny\0"), ("4", "/usr/bin/ollama\0serve\0")] {
            std::fs::create_dir(proc.path().join(pid)).unwrap();
            std::fs::write(proc.path().join(pid).join("cmdline"), line).unwrap();
        }
        assert_eq!(servers(proc.path()), [4]);
    }
}
