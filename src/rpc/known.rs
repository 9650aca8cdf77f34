//! What is known of models beside what Ollama's lists say: as this proxy has heard it of its servers, or as an agent knows it
//! of its Ollama.

use std::sync::Arc;

use olol_middleware::cluster::Model as Heard;
use olol_middleware::{Cluster, ModelName};
use olol_proto::v1::{LoadedModel, Model};

use super::Face;

/// Where it is known.
#[derive(Clone, Debug)]
pub(super) enum Known {
    /// To a proxy.
    Cluster(Arc<Cluster>),
    /// To an agent, by what it tells of itself.
    Itself,
}

impl Face {
    /// Fills in what the lists leave out.
    pub(super) fn complete(&self, models: &mut [Model], loaded: &mut [LoadedModel]) {
        for model in models {
            self.complete_one(model);
        }
        for loaded in loaded {
            if let Some(name) = ModelName::parse(&loaded.name) {
                loaded.slots = self.slots(&name);
            }
        }
    }

    /// The same of one model; also its digest and its size, if nothing says which one is meant.
    pub(super) fn complete_one(&self, model: &mut Model) {
        let Some(name) = ModelName::parse(&model.name) else { return };
        let Some(known) = self.known_of(&name, &model.digest) else { return };
        let fill = |text: &mut String, known: String| {
            if text.is_empty() {
                *text = known;
            }
        };
        if model.digest.is_empty() {
            model.size_bytes = known.size_bytes;
        }
        fill(&mut model.digest, known.digest);
        fill(&mut model.architecture, known.architecture);
        fill(&mut model.parameters_json, known.parameters_json);
        fill(&mut model.weights, known.weights);
        fill(&mut model.modified_at, known.modified_at);
        if model.context_length == 0 {
            model.context_length = known.context_length;
        }
        model.bits_per_weight = known.bits_per_weight;
    }

    /// A model of a digest; of none the one that is meant by its name.
    fn known_of(&self, name: &ModelName, digest: &str) -> Option<Model> {
        match &self.known {
            Known::Cluster(cluster) => {
                let snapshot = cluster.snapshot();
                let known = snapshot.known(name)?;
                let variant = match digest {
                    "" => known.usual()?,
                    digest => known.variants.iter().find(|variant| variant.digest() == digest)?,
                };
                Some(wire(variant.model()))
            }
            Known::Itself => {
                let told = self.about.as_ref()?.state.borrow().clone()?;
                let is_it = |model: &&Model| {
                    ModelName::parse(&model.name).as_ref() == Some(name)
                        && (digest.is_empty() || model.digest == digest)
                };
                told.models.iter().find(is_it).cloned()
            }
        }
    }

    /// How many calls the runner of a model answers side by side; 0: nobody has said so.
    fn slots(&self, name: &ModelName) -> u32 {
        match &self.known {
            Known::Cluster(cluster) => {
                let snapshot = cluster.snapshot();
                let loaded = snapshot.servers.iter().flat_map(|server| &server.report.loaded);
                let of_it = loaded.filter(|loaded| ModelName::parse(&loaded.name).as_ref() == Some(name));
                of_it.map(|loaded| loaded.slots).max().unwrap_or(0)
            }
            Known::Itself => {
                let told = self.about.as_ref().and_then(|about| about.state.borrow().clone());
                let loaded = told.iter().flat_map(|told| told.loaded.iter());
                let mut of_it = loaded.filter(|loaded| ModelName::parse(&loaded.name).as_ref() == Some(name));
                of_it.next().map_or(0, |loaded| loaded.slots)
            }
        }
    }
}

fn wire(heard: &Heard) -> Model {
    Model {
        digest: heard.digest.clone(),
        size_bytes: heard.size,
        architecture: heard.architecture().to_owned(),
        bits_per_weight: heard.bits_per_weight().unwrap_or(0.0),
        context_length: heard.context_length,
        parameters_json: heard.parameters.clone(),
        weights: heard.weights.clone(),
        ..Model::default()
    }
}
