//! Tells when a file changes: by being written, renamed over, or reached by another link.
//!
//! Editors write a new file and rename it, Kubernetes exchanges a link next to the file's own; so its folder is watched, not
//! the file, and what counts is what stands in it. Where the system does not tell, as on some network disks, a look every
//! few seconds finds it out.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Silence after which a change is over: a file is often written in several steps.
const SETTLED: Duration = Duration::from_millis(100);
/// The longest that a change is waited for to be over.
const LONGEST: Duration = Duration::from_secs(1);
/// Time between two looks that nothing has called for.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Watches a file from now on, until the receiver is dropped: it has a change when the file has other contents, begins to be
/// there, or ends to be.
pub fn watch(path: &Path) -> watch::Receiver<()> {
    let (tell, changes) = watch::channel(());
    let (stir, stirs) = mpsc::channel(1);
    let mut folders = Folders::new(stir);
    folders.follow(path);
    let known = fingerprint(path);
    tokio::spawn(look(path.to_owned(), known, folders, stirs, tell));
    changes
}

async fn look(
    path: PathBuf,
    mut known: Option<u64>,
    mut folders: Folders,
    mut stirs: mpsc::Receiver<()>,
    tell: watch::Sender<()>,
) {
    loop {
        tokio::select! {
            () = tell.closed() => return,
            Some(()) = stirs.recv() => settle(&mut stirs).await,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let target = path.clone();
        let looking = tokio::task::spawn_blocking(move || {
            folders.follow(&target);
            (fingerprint(&target), folders)
        });
        let Ok((now, same)) = looking.await else { return };
        folders = same;
        if now != known {
            known = now;
            tell.send_replace(());
        }
    }
}

/// Waits until nothing stirs any more.
async fn settle(stirs: &mut mpsc::Receiver<()>) {
    let end = Instant::now() + LONGEST;
    while let Ok(Some(())) = tokio::time::timeout_at(end.min(Instant::now() + SETTLED), stirs.recv()).await {}
}

/// What stands for the contents of a file; `None` if it cannot be read.
fn fingerprint(path: &Path) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    hasher.write(&std::fs::read(path).ok()?);
    Some(hasher.finish())
}

/// The folders in which something may change a file: its own, and that of what it links to.
struct Folders {
    watcher: Option<RecommendedWatcher>,
    watched: HashSet<PathBuf>,
}

impl Folders {
    /// None yet. Something that stirs in one of them is told to `stir`.
    fn new(stir: mpsc::Sender<()>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.map_or(true, |event| changes(event.kind)) {
                // One that waits already stands for all.
                let _ = stir.try_send(());
            }
        });
        let watcher = watcher.inspect_err(Self::warn).ok();
        Self { watcher, watched: HashSet::new() }
    }

    /// Watches the folders of this file, and no others.
    fn follow(&mut self, path: &Path) {
        let Some(watcher) = &mut self.watcher else { return };
        // Of a folder that is not there yet, the nearest one that is.
        let folder = |path: &Path| {
            let there = path.ancestors().skip(1).find(|folder| folder.is_dir() && !folder.as_os_str().is_empty());
            there.map_or_else(|| PathBuf::from("."), Path::to_owned)
        };
        let mut wanted = HashSet::from([folder(path)]);
        wanted.extend(path.canonicalize().ok().as_deref().map(folder));
        for folder in self.watched.difference(&wanted) {
            let _ = watcher.unwatch(folder);
        }
        for folder in wanted.difference(&self.watched) {
            let _ = watcher.watch(folder, RecursiveMode::NonRecursive).inspect_err(Self::warn);
        }
        self.watched = wanted;
    }

    fn warn(error: &notify::Error) {
        tracing::warn!(%error, every_s = LOOK_EVERY.as_secs(), "the system does not tell of changed files: they are looked at");
    }
}

/// Whether an event may be one of a change. Reading is none: we do that ourselves.
pub(crate) fn changes(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    async fn changed(changes: &mut watch::Receiver<()>) {
        tokio::time::timeout(PATIENCE, changes.changed()).await.expect("a change in time").expect("a watcher");
    }

    #[tokio::test]
    async fn a_file_that_is_written_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut changes = watch(&path);
        for text in ["one", "two"] {
            std::fs::write(&path, text).unwrap();
            changed(&mut changes).await;
        }
        std::fs::remove_file(&path).unwrap();
        changed(&mut changes).await;
    }

    #[tokio::test]
    async fn a_file_that_is_renamed_over_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "one").unwrap();
        let mut changes = watch(&path);
        for text in ["two", "three"] {
            let new = folder.path().join("a.new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, &path).unwrap();
            changed(&mut changes).await;
        }
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_file_whose_folder_is_exchanged_has_changed() {
        // As Kubernetes does it.
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let put = |data: &str, text: &str| {
            std::fs::create_dir(at(data)).unwrap();
            std::fs::write(at(data).join("a"), text).unwrap();
            std::os::unix::fs::symlink(data, at("..new")).unwrap();
            std::fs::rename(at("..new"), at("..data")).unwrap();
        };
        put("..1", "one");
        std::os::unix::fs::symlink("..data/a", at("a")).unwrap();
        let mut changes = watch(&at("a"));
        for (data, text) in [("..2", "two"), ("..3", "three")] {
            put(data, text);
            changed(&mut changes).await;
        }
    }

    #[tokio::test]
    async fn what_leaves_the_contents_as_they_are_is_no_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "one").unwrap();
        let mut changes = watch(&path);
        std::fs::write(&path, "one").unwrap();
        std::fs::write(folder.path().join("b"), "another").unwrap();
        let waited = tokio::time::timeout(SETTLED * 3, changes.changed()).await;
        assert!(waited.is_err());
    }
}
