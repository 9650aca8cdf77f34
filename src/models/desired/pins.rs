//! What is wanted in passing: said to a running proxy, kept in a file of its own, so that the operator's file stays as it is.
//!
//! A pin of a model goes before `[[models]]` of the same name, until it is removed. One that wants no replica says that the
//! model is not wanted, whatever the file says: what somebody has deleted gets one, and does not come back by itself.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use olol_middleware::ModelName;
use serde::{Deserialize, Serialize};

use super::{MOST, Wanted};

/// The longest file that is read, bytes.
const LONGEST: u64 = 16 << 20;

/// Why a pin cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// There are as many as may be.
    #[error("{MOST} models are pinned: no other can be before one is unpinned")]
    Full,
    /// There is no place for the file.
    #[error("there is no folder for pins: set [sessions] dir, or HOME")]
    NoFolder,
    /// The file cannot be read or written.
    #[error("{path}: {what}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
    },
}

/// The pins, by model.
pub(super) type Pins = BTreeMap<ModelName, Wanted>;

/// Pins that outlive the process.
#[derive(Debug)]
pub(super) struct Store {
    path: Option<PathBuf>,
    pins: ArcSwap<Pins>,
    /// One change at a time.
    turn: Mutex<()>,
}

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Book {
    models: Vec<Wanted>,
}

impl Store {
    /// The pins in a file; one that is not there has none. What is no good is told, and stays as it is.
    pub(super) fn open(path: Option<PathBuf>) -> Result<Self, PinError> {
        let pins = match &path {
            Some(path) => read(path)?,
            None => Pins::new(),
        };
        Ok(Self { path, pins: ArcSwap::from_pointee(pins), turn: Mutex::default() })
    }

    /// All of them.
    pub(super) fn all(&self) -> Arc<Pins> {
        self.pins.load_full()
    }

    /// Pins a model, on the disk first.
    pub(super) fn pin(&self, wanted: Wanted) -> Result<(), PinError> {
        self.change(|pins| {
            if pins.len() >= MOST && !pins.contains_key(wanted.name.model()) {
                return Err(PinError::Full);
            }
            pins.insert(wanted.name.model().clone(), wanted);
            Ok(true)
        })
        .map(drop)
    }

    /// Removes a pin; false if there is none.
    pub(super) fn unpin(&self, model: &ModelName) -> Result<bool, PinError> {
        self.change(|pins| Ok(pins.remove(model).is_some()))
    }

    fn change(&self, change: impl FnOnce(&mut Pins) -> Result<bool, PinError>) -> Result<bool, PinError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pins = Pins::clone(&self.pins.load());
        if !change(&mut pins)? {
            return Ok(false);
        }
        let path = self.path.as_deref().ok_or(PinError::NoFolder)?;
        write(path, &pins).map_err(|error| PinError::File { path: path.to_owned(), what: error.to_string() })?;
        self.pins.store(Arc::new(pins));
        Ok(true)
    }
}

fn read(path: &Path) -> Result<Pins, PinError> {
    let wrong = |what: String| PinError::File { path: path.to_owned(), what };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Pins::new()),
        Ok(meta) if meta.len() > LONGEST => return Err(wrong("it is too long to be a file of pins".to_owned())),
        _ => {}
    }
    let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let book: Book = toml::from_str(&text)
        .map_err(|error| wrong(format!("is no file of pins; mend it, or remove it: {}", error.message())))?;
    Ok(book.models.into_iter().take(MOST).map(|wanted| (wanted.name.model().clone(), wanted)).collect())
}

/// Puts a whole new file in the place of the old one: a kill at any moment leaves either.
fn write(path: &Path, pins: &Pins) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)?;
    let book = Book { models: pins.values().cloned().collect() };
    let text = toml::to_string(&book).map_err(std::io::Error::other)?;
    let head = "# Written by `olol models pin` and `unpin`, for the proxy that reads it when it starts.\n\n";
    let mut file = tempfile::Builder::new().prefix(".models-").suffix(".toml").tempfile_in(folder)?;
    file.write_all(head.as_bytes())?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    #[cfg(unix)]
    std::fs::File::open(folder)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(text: &str) -> Wanted {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn pins_are_there_again_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/models.toml");
        let store = Store::open(Some(path.clone())).unwrap();
        assert!(store.all().is_empty() && !path.exists());
        let tiny = wanted("name = \"Tiny\"\nreplicas = \"all\"\nservers = [\"gpu*\"]\nkeep-loaded = 2");
        store.pin(tiny.clone()).unwrap();
        store.pin(wanted("name = \"gone\"\nreplicas = 0")).unwrap();
        let again = Store::open(Some(path.clone())).unwrap();
        assert_eq!(again.all(), store.all());
        assert_eq!(again.all()[tiny.name.model()], tiny);
        assert!(again.unpin(tiny.name.model()).unwrap());
        assert!(!again.unpin(tiny.name.model()).unwrap(), "it is gone already");
        assert_eq!(Store::open(Some(path)).unwrap().all().len(), 1);
        assert_eq!(std::fs::read_dir(folder.path().join("state")).unwrap().count(), 1, "nothing is left behind");
    }

    #[test]
    fn a_file_that_is_no_good_is_told_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("models.toml");
        std::fs::write(&path, "models = 1\n").unwrap();
        let error = Store::open(Some(path.clone())).unwrap_err().to_string();
        assert!(error.contains("is no file of pins; mend it, or remove it"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "models = 1\n");
    }
}
