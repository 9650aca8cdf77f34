//! What is wanted of models, for whoever says or asks so.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use olol_middleware::ModelName;
use olol_middleware::instruments::Wish;
use tokio::sync::Notify;

use super::pins::{PinError, Pins, Store, Unsaid};
use super::plan::Standing;
use super::{KeepLoaded, Name, Replicas, Wanted};
use crate::reload::{Running, State as Configured};

/// What is wanted of models, and how far it is true.
#[derive(Clone, Debug)]
pub struct Desired(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    running: Arc<Running>,
    pub(super) pins: Store,
    standings: ArcSwap<Vec<Standing>>,
    /// Models that somebody has just asked for.
    asked: Mutex<HashSet<ModelName>>,
    stir: Notify,
    /// Something was said here that other proxies do not know.
    pub(super) said: Notify,
}

impl Desired {
    /// What the configuration that runs says, and the pins in a file, which may be shared with other proxies.
    pub fn open(running: Arc<Running>, pins: Option<PathBuf>, is_shared: bool) -> Result<Self, PinError> {
        let pins = Store::open(pins, is_shared)?;
        Ok(Self(Arc::new(Inner {
            running,
            pins,
            standings: ArcSwap::default(),
            asked: Mutex::default(),
            stir: Notify::new(),
            said: Notify::new(),
        })))
    }

    /// How all that is wanted stands.
    pub fn standings(&self) -> Arc<Vec<Standing>> {
        self.0.standings.load_full()
    }

    /// How far models are where they are wanted, for metrics.
    pub fn wishes(&self) -> Vec<Wish> {
        let wish = |standing: &Standing| Wish {
            model: standing.name.clone(),
            wanted: standing.wanted,
            held: standing.held.len(),
        };
        self.standings().iter().filter(|standing| standing.replicas != Replicas::Count(0)).map(wish).collect()
    }

    /// Wants a model, from now on and whatever the file says of it. Known on the disk when this returns.
    pub async fn pin(&self, wanted: Wanted) -> Result<(), PinError> {
        let (desired, model) = (self.clone(), wanted.name.model().clone());
        blocking(move || desired.0.pins.pin(wanted)).await?;
        self.0.said.notify_one();
        self.changed([model]);
        Ok(())
    }

    /// Wants a model no more than the file says; false if it was not pinned.
    pub async fn unpin(&self, model: &ModelName) -> Result<bool, PinError> {
        let (desired, name) = (self.clone(), model.clone());
        let was_pinned = blocking(move || desired.0.pins.unpin(&name)).await?;
        self.0.said.notify_one();
        self.changed([model.clone()]);
        Ok(was_pinned)
    }

    /// Takes over the pins that proxies share; `told`: what was told of those here.
    pub(super) async fn adopt(&self, there: Pins, told: Unsaid) {
        let desired = self.clone();
        match blocking(move || desired.0.pins.adopt(there, &told)).await {
            Ok(changed) if changed.is_empty() => {}
            Ok(changed) => self.changed(changed),
            Err(error) => tracing::warn!(%error, "pins of other proxies cannot be kept here"),
        }
    }

    /// What is wanted of these is another thing from now on.
    fn changed(&self, models: impl IntoIterator<Item = ModelName>) {
        self.asked().extend(models);
        self.0.stir.notify_one();
    }

    fn asked(&self) -> MutexGuard<'_, HashSet<ModelName>> {
        self.0.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration that runs.
    pub(super) fn running(&self) -> Arc<Configured> {
        self.0.running.state()
    }

    /// The pins.
    pub(super) fn pins(&self) -> Arc<Pins> {
        self.0.pins.all()
    }

    /// Waits until somebody has asked for something.
    pub(super) async fn is_asked(&self) {
        self.0.stir.notified().await;
    }

    /// The models that were asked for since the last time.
    pub(super) fn take_asked(&self) -> HashSet<ModelName> {
        std::mem::take(&mut self.asked())
    }

    /// Tells how all stands now.
    pub(super) fn stand(&self, standings: Vec<Standing>) {
        self.0.standings.store(Arc::new(standings));
    }

    /// A client has deleted a model: it does not come back by itself.
    pub(super) async fn deleted(&self, name: &str) {
        let Some(name) = Name::parse(name) else { return };
        let is_wanted = |(wanted, _): &(Wanted, _)| wanted.name == name && wanted.is_wanted();
        if !wanted(&self.running(), &self.pins()).iter().any(is_wanted) {
            return;
        }
        let model = name.model().clone();
        let none = Wanted { name, replicas: Replicas::Count(0), servers: Vec::new(), keep_loaded: KeepLoaded::No };
        match self.pin(none).await {
            Ok(()) => {
                tracing::warn!(%model, "a wanted model was deleted: it is not wanted any more, until it is pinned again");
            }
            Err(error) => tracing::error!(%model, %error, "a wanted model was deleted, and will be made again"),
        }
    }
}

/// Runs what touches the disk where that may take its time.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PinError> + Send + 'static,
) -> Result<T, PinError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| PinError::Broken(error.to_string()))?
}

/// All that is wanted, with who wants it: the file's models in its order, and those that are only pinned.
pub(super) fn wanted(running: &Configured, pins: &Pins) -> Vec<(Wanted, &'static str)> {
    let named = &running.config.models;
    let of_file = named.iter().map(|wanted| match pins.get(wanted.name.model()) {
        Some(pin) => (pin.clone(), "pin"),
        None => (wanted.clone(), "file"),
    });
    let in_file: HashSet<&ModelName> = named.iter().map(|wanted| wanted.name.model()).collect();
    let others = pins.iter().filter(|(model, _)| !in_file.contains(model)).map(|(_, pin)| (pin.clone(), "pin"));
    of_file.chain(others).collect()
}
