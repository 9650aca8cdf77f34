//! Tells when a file has changed: the keys of clients, the configuration.
//!
//! The folder of the file is watched, since editors put a new file in the place of the old one. What counts is what stands in
//! the file: whoever only opens or touches it changes nothing. Where nothing can be watched, or where changes are not told (a
//! folder that is not there yet, the file system of another machine), the file is looked at every few seconds instead.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// Changes that come within this time are one.
const PAUSE: Duration = Duration::from_millis(100);
/// Time between two looks when nobody tells of a change.
const LOOK: Duration = Duration::from_secs(3);

/// Watches one file.
pub struct Watch {
    path: PathBuf,
    /// What stood in it at the last look; `None`: it could not be read.
    seen: Option<Vec<u8>>,
    told: mpsc::Sender<()>,
    telling: mpsc::Receiver<()>,
    watcher: Option<notify::RecommendedWatcher>,
}

impl Watch {
    /// Watches from now on. Whoever reads the file after this misses no change of it.
    pub fn new(path: &Path) -> Self {
        let (told, telling) = mpsc::channel(1);
        let mut watch = Self { path: path.to_owned(), seen: None, told, telling, watcher: None };
        watch.begin();
        watch.seen = std::fs::read(path).ok();
        watch
    }

    /// Waits until something else stands in the file than before; also when it is gone, or can be read again.
    ///
    /// Who stops waiting and comes back misses nothing.
    pub async fn changed(&mut self) {
        loop {
            if tokio::time::timeout(LOOK, self.telling.recv()).await.is_ok() {
                tokio::time::sleep(PAUSE).await;
                while self.telling.try_recv().is_ok() {}
            }
            self.begin();
            let now = tokio::fs::read(&self.path).await.ok();
            if now != self.seen {
                self.seen = now;
                return;
            }
        }
    }

    /// Watches the folder, if it is there and that has not been done.
    fn begin(&mut self) {
        if self.watcher.is_some() {
            return;
        }
        let told = self.told.clone();
        let tell = move |event: notify::Result<notify::Event>| {
            // Our own reading is an access. One that is waiting to be heard is enough.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                let _ = told.try_send(());
            }
        };
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let begun = notify::recommended_watcher(tell).and_then(|mut watcher| {
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        self.watcher = begun.inspect_err(|error| tracing::debug!(%error, "a folder is not watched")).ok();
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("path", &self.path).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Long enough for any machine; every test ends earlier.
    async fn soon(watch: &mut Watch) -> bool {
        tokio::time::timeout(Duration::from_secs(20), watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn a_change_is_told_once_and_a_file_in_its_place_is_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("olol.toml");
        std::fs::write(&path, "1").unwrap();
        let mut watch = Watch::new(&path);
        std::fs::write(&path, "2").unwrap();
        assert!(soon(&mut watch).await);
        let other = folder.path().join("other");
        std::fs::write(&other, "3").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(soon(&mut watch).await);
        std::fs::remove_file(&path).unwrap();
        assert!(soon(&mut watch).await);
        std::fs::write(&path, "3").unwrap();
        assert!(soon(&mut watch).await);
    }

    #[tokio::test]
    async fn what_changes_nothing_is_not_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("olol.toml");
        std::fs::write(&path, "1").unwrap();
        let mut watch = Watch::new(&path);
        std::fs::write(&path, "1").unwrap();
        std::fs::write(folder.path().join("other"), "2").unwrap();
        let quiet = tokio::time::timeout(PAUSE * 5, watch.changed()).await;
        assert!(quiet.is_err());
        std::fs::write(&path, "2").unwrap();
        assert!(soon(&mut watch).await, "who stopped waiting misses nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_folder_that_comes_later_is_looked_into() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("later/olol.toml");
        let mut watch = Watch::new(&path);
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "1").unwrap();
        assert!(soon(&mut watch).await);
    }
}
