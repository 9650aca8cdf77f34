//! What servers say of themselves, kept so that what many of them say stands in memory once.
//!
//! A thousand servers have mostly the same models, and each tells all that is known of each of them. When a model was last
//! changed is a server's own; everything else is shared.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use rapidhash::RapidHashSet;

use super::{Loaded, Model};
use crate::names::ModelName;

/// So many models may be on the shelf that nobody has any more, before it is cleared.
const SPARE: usize = 256;

/// What a server said last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept {
    /// Version of its engine.
    pub version: String,
    /// Models on its disk.
    pub models: Arc<Vec<Held>>,
    /// Models in its memory.
    pub loaded: Vec<Loaded>,
}

impl Kept {
    /// Whether it is the same but for the times at which models go when they stay idle.
    pub(crate) fn is_alike(&self, other: &Self) -> bool {
        let is_alike =
            |(one, other): (&Loaded, &Loaded)| *one == Loaded { expires_at: one.expires_at.clone(), ..other.clone() };
        self.version == other.version
            && self.models == other.models
            && self.loaded.len() == other.loaded.len()
            && self.loaded.iter().zip(&other.loaded).all(is_alike)
    }
}

/// A model on a server's disk.
#[derive(Clone, Debug)]
pub struct Held {
    what: Arc<What>,
    /// RFC 3339 time of the last change there; that of the [`Model`] is empty.
    pub modified_at: Box<str>,
}

/// What is the same wherever it is.
#[derive(Debug)]
struct What {
    model: Model,
    canonical: Option<ModelName>,
}

impl Held {
    /// Its canonical name; `None` if what the server calls it is no name.
    pub fn canonical(&self) -> Option<&ModelName> {
        self.what.canonical.as_ref()
    }

    /// Whether it is this one.
    pub(crate) fn is(&self, name: &ModelName) -> bool {
        self.canonical() == Some(name)
    }

    /// The same number for all that say the same but for the time, and for no other as long as they live.
    pub(crate) fn number(&self) -> usize {
        Arc::as_ptr(&self.what).addr()
    }

    /// It as a server tells it.
    pub(crate) fn told(&self) -> Model {
        Model { modified_at: self.modified_at.to_string(), ..self.what.model.clone() }
    }
}

impl Deref for Held {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.what.model
    }
}

impl PartialEq for Held {
    /// What is equal is shared: the shelf sees to that.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.what, &other.what) && self.modified_at == other.modified_at
    }
}

impl Eq for Held {}

/// Every model that some server has, once.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    models: RapidHashSet<Shelved>,
    /// So many stay after the last clearing.
    stayed: usize,
}

#[derive(Debug)]
struct Shelved(Arc<What>);

impl Borrow<Model> for Shelved {
    fn borrow(&self) -> &Model {
        &self.0.model
    }
}

impl PartialEq for Shelved {
    fn eq(&self, other: &Self) -> bool {
        self.0.model == other.0.model
    }
}

impl Eq for Shelved {}

impl Hash for Shelved {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.model.hash(state);
    }
}

impl Shelf {
    /// The same, shared with all who said it before.
    pub(super) fn hold(&mut self, mut model: Model) -> Held {
        let modified_at = std::mem::take(&mut model.modified_at).into_boxed_str();
        if let Some(Shelved(what)) = self.models.get(&model) {
            return Held { what: what.clone(), modified_at };
        }
        if self.models.len() >= 2 * self.stayed + SPARE {
            self.models.retain(|Shelved(what)| Arc::strong_count(what) > 1);
            self.stayed = self.models.len();
        }
        let canonical = ModelName::parse(&model.name);
        let what = Arc::new(What { model, canonical });
        self.models.insert(Shelved(what.clone()));
        Held { what, modified_at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, modified_at: &str) -> Model {
        Model { name: name.to_owned(), modified_at: modified_at.to_owned(), ..Model::default() }
    }

    #[test]
    fn what_servers_say_alike_stands_once() {
        let mut shelf = Shelf::default();
        let (one, same) = (shelf.hold(model("Tiny", "1")), shelf.hold(model("Tiny", "2")));
        assert!(std::ptr::eq(&raw const *one, &raw const *same) && one.number() == same.number());
        assert_eq!((&*one.modified_at, &*same.modified_at), ("1", "2"));
        assert!(one != same && one == shelf.hold(model("Tiny", "1")));
        assert_eq!(one.told(), model("Tiny", "1"));
        let other = shelf.hold(Model { size: 1, ..model("Tiny", "1") });
        assert!(one.number() != other.number() && one.canonical() == other.canonical());
        assert!(one.is(&ModelName::parse("tiny:latest").unwrap()));
    }

    #[test]
    fn what_nobody_has_any_more_leaves_the_shelf() {
        let mut shelf = Shelf::default();
        let kept = shelf.hold(model("kept", ""));
        for number in 0..10 * SPARE {
            drop(shelf.hold(model(&number.to_string(), "")));
        }
        assert!(shelf.models.len() <= 2 * (SPARE + 1), "{}", shelf.models.len());
        assert_eq!(kept, shelf.hold(model("kept", "")));
    }
}
