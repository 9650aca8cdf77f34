//! What is wanted in passing: said to a running proxy, kept in a file of its own, so that the operator's file stays as it is.
//!
//! A pin of a model goes before `[[models]]` of the same name, until it is removed. One that wants no replica says that the
//! model is not wanted, whatever the file says: what somebody has deleted gets one, and does not come back by itself.
//!
//! Proxies that share a store share their pins (`shared`). The file then also knows what the store is not told yet.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use olol_middleware::ModelName;
use serde::{Deserialize, Serialize};

use super::{MOST, Wanted};
use crate::files;

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
    /// Whoever wrote it fell over.
    #[error("the pins could not be written: {0}")]
    Broken(String),
}

/// The pins, by model.
pub(super) type Pins = BTreeMap<ModelName, Wanted>;

/// Pins that outlive the process.
#[derive(Debug)]
pub(super) struct Store {
    path: Option<PathBuf>,
    pins: ArcSwap<Pins>,
    /// Whether others are told of changes.
    is_shared: bool,
    /// One change at a time.
    turn: Mutex<Line>,
}

/// How far the pins are those that proxies share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line {
    /// Whether they are, but for what is unsaid.
    is_in_line: bool,
    /// The models that were pinned or unpinned since, as far as the store was not told.
    unsaid: BTreeSet<ModelName>,
}

/// What the store may have to be told.
#[derive(Clone, Debug)]
pub(super) struct Unsaid {
    /// All pins.
    pub(super) pins: Arc<Pins>,
    /// The models that were pinned or unpinned.
    pub(super) models: BTreeSet<ModelName>,
    /// Whether all others are as they were in the store.
    pub(super) is_in_line: bool,
}

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Book {
    #[serde(default, skip_serializing_if = "is_false")]
    shared: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    unsaid: Vec<String>,
    models: Vec<Wanted>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_false(value: &bool) -> bool {
    !value
}

impl Store {
    /// The pins in a file; one that is not there has none. What is no good is told, and stays as it is.
    pub(super) fn open(path: Option<PathBuf>, is_shared: bool) -> Result<Self, PinError> {
        let (pins, line) = match &path {
            Some(path) => read(path)?,
            None => (Pins::new(), Line::default()),
        };
        Ok(Self { path, pins: ArcSwap::from_pointee(pins), is_shared, turn: Mutex::new(line) })
    }

    /// All of them.
    pub(super) fn all(&self) -> Arc<Pins> {
        self.pins.load_full()
    }

    /// Pins a model, on the disk first.
    pub(super) fn pin(&self, wanted: Wanted) -> Result<(), PinError> {
        let model = wanted.name.model().clone();
        self.change(model, |pins| {
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
        self.change(model.clone(), |pins| Ok(pins.remove(model).is_some()))
    }

    /// What the store may have to be told.
    pub(super) fn unsaid(&self) -> Unsaid {
        let line = self.turn();
        Unsaid { pins: self.all(), models: line.unsaid.clone(), is_in_line: line.is_in_line }
    }

    /// Takes over the pins that the store has, after it was told of some; what was said here in the meantime goes before them.
    /// The models that are pinned otherwise now.
    pub(super) fn adopt(&self, there: Pins, told: &Unsaid) -> Result<Vec<ModelName>, PinError> {
        let mut line = self.turn();
        let here = self.all();
        let is_told = |model: &ModelName| told.models.contains(model) && told.pins.get(model) == here.get(model);
        let mut now = Line { is_in_line: true, unsaid: line.unsaid.clone() };
        now.unsaid.retain(|model| !is_told(model));
        let mut pins = there;
        for model in &now.unsaid {
            match here.get(model) {
                Some(wanted) => drop(pins.insert(model.clone(), wanted.clone())),
                None => drop(pins.remove(model)),
            }
        }
        let all: BTreeSet<&ModelName> = here.keys().chain(pins.keys()).collect();
        let changed = all.into_iter().filter(|model| here.get(*model) != pins.get(*model)).cloned().collect::<Vec<_>>();
        if changed.is_empty() && now == *line {
            return Ok(changed);
        }
        if let Some(path) = &self.path {
            put(path, &pins, &now)?;
        }
        *line = now;
        self.pins.store(Arc::new(pins));
        Ok(changed)
    }

    fn change(
        &self,
        model: ModelName,
        change: impl FnOnce(&mut Pins) -> Result<bool, PinError>,
    ) -> Result<bool, PinError> {
        let mut line = self.turn();
        let mut pins = Pins::clone(&self.pins.load());
        if !change(&mut pins)? {
            return Ok(false);
        }
        let mut now = line.clone();
        if self.is_shared {
            now.unsaid.insert(model);
        } else {
            // Nobody keeps account of what other proxies would have to be told.
            now = Line::default();
        }
        let path = self.path.as_deref().ok_or(PinError::NoFolder)?;
        put(path, &pins, &now)?;
        *line = now;
        self.pins.store(Arc::new(pins));
        Ok(true)
    }

    fn turn(&self) -> MutexGuard<'_, Line> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &Path) -> Result<(Pins, Line), PinError> {
    let wrong = |what: String| PinError::File { path: path.to_owned(), what };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Pins::new(), Line::default())),
        Ok(meta) if meta.len() > LONGEST => return Err(wrong("it is too long to be a file of pins".to_owned())),
        _ => {}
    }
    let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let book: Book = toml::from_str(&text)
        .map_err(|error| wrong(format!("is no file of pins; mend it, or remove it: {}", error.message())))?;
    let unsaid = book.unsaid.iter().filter_map(|name| ModelName::parse(name)).collect();
    let pins = book.models.into_iter().take(MOST).map(|wanted| (wanted.name.model().clone(), wanted)).collect();
    Ok((pins, Line { is_in_line: book.shared, unsaid }))
}

fn put(path: &Path, pins: &Pins, line: &Line) -> Result<(), PinError> {
    write(path, pins, line).map_err(|error| PinError::File { path: path.to_owned(), what: error.to_string() })
}

/// Puts a whole new file in the place of the old one.
fn write(path: &Path, pins: &Pins, line: &Line) -> std::io::Result<()> {
    let unsaid = line.unsaid.iter().map(ToString::to_string).collect();
    let book = Book { shared: line.is_in_line, unsaid, models: pins.values().cloned().collect() };
    let text = toml::to_string(&book).map_err(std::io::Error::other)?;
    let head = "# Written by `olol models pin` and `unpin`, for the proxy that reads it when it starts.\n\n";
    files::replace(path, &format!("{head}{text}"))
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
        let store = Store::open(Some(path.clone()), false).unwrap();
        assert!(store.all().is_empty() && !path.exists());
        let tiny = wanted("name = \"Tiny\"\nreplicas = \"all\"\nservers = [\"gpu*\"]\nkeep-loaded = 2");
        store.pin(tiny.clone()).unwrap();
        store.pin(wanted("name = \"gone\"\nreplicas = 0")).unwrap();
        let again = Store::open(Some(path.clone()), false).unwrap();
        assert_eq!(again.all(), store.all());
        assert_eq!(again.all()[tiny.name.model()], tiny);
        assert!(again.unpin(tiny.name.model()).unwrap());
        assert!(!again.unpin(tiny.name.model()).unwrap(), "it is gone already");
        assert_eq!(Store::open(Some(path), false).unwrap().all().len(), 1);
        assert_eq!(std::fs::read_dir(folder.path().join("state")).unwrap().count(), 1, "nothing is left behind");
    }

    #[test]
    fn a_file_that_is_no_good_is_told_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("models.toml");
        std::fs::write(&path, "models = 1\n").unwrap();
        let error = Store::open(Some(path.clone()), false).unwrap_err().to_string();
        assert!(error.contains("is no file of pins; mend it, or remove it"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "models = 1\n");
    }

    #[test]
    fn what_the_store_is_not_told_yet_survives_a_restart_and_goes_before_what_it_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("models.toml");
        let open = || Store::open(Some(path.clone()), true).unwrap();
        let names = |store: &Store| store.all().keys().map(ToString::to_string).collect::<Vec<_>>();
        let there = |names: &[&str]| -> Pins {
            let of = |name: &&str| wanted(&format!("name = \"{name}\""));
            names.iter().map(of).map(|wanted| (wanted.name.model().clone(), wanted)).collect()
        };
        let store = open();
        store.pin(wanted("name = \"mine\"")).unwrap();
        let told = open().unsaid();
        assert!(!told.is_in_line && told.models.len() == 1);
        // Something is said while the store is told.
        store.pin(wanted("name = \"later\"")).unwrap();
        let changed = store.adopt(there(&["mine", "theirs"]), &told).unwrap();
        assert_eq!(changed, [ModelName::parse("theirs").unwrap()]);
        let store = open();
        assert_eq!(names(&store), ["later:latest", "mine:latest", "theirs:latest"]);
        let told = store.unsaid();
        assert!(told.is_in_line && told.models.iter().map(ModelName::as_str).eq(["later:latest"]));
        // Others have unpinned what was pinned here.
        store.adopt(there(&["later"]), &told).unwrap();
        assert_eq!((names(&open()), open().unsaid().models.len()), (vec!["later:latest".to_owned()], 0));
    }
}
