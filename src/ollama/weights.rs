//! What models are made of, where that tells whether two names share a runner.
//!
//! Lists tell the digest of a model's manifest, which differs for the same weights with another template. Only `/api/show`
//! tells the weights, in the Modelfile that it writes; so it is asked for models that look alike, once for each manifest, and
//! what one server has told need not be asked of another: a manifest is the same wherever its digest is.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use olol_middleware::cluster::Model;
use olol_middleware::modelfile;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use super::few::{Few, Plain};
use super::state::MOST_CAPABILITIES;
use super::{Ask, Ollama};

/// The longest answer about one model, bytes: a vocabulary may be in it.
const LONGEST: usize = 64 << 20;
/// Models whose weights are the same differ in size by less than this, bytes: templates, licences, parameters.
const SLACK: u64 = 1 << 20;

/// Bytes of text that are remembered of one.
const LONGEST_MADE: usize = 16 << 10;
/// Architectures whose context is looked at.
const MOST_CONTEXTS: usize = 16;

/// Manifests that are remembered. When there are more, all are forgotten, and asked for again where they are needed.
const MOST: usize = 16_384;

/// What was found out about manifests, by their digests; shared by all servers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lore(Arc<Mutex<HashMap<String, Made>>>);

impl Lore {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Made>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, digest: &str) -> bool {
        self.lock().contains_key(digest)
    }

    fn learn(&self, digest: String, made: Made) {
        let mut known = self.lock();
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(digest, made);
    }
}

/// What is known of the models of one server.
#[derive(Debug, Default)]
pub(super) struct Weights {
    lore: Lore,
    /// Hashes of the digests of those about which it does not tell.
    silent: Mutex<HashSet<u64>>,
    /// The folder of the files, as it names it.
    folder: Mutex<Option<PathBuf>>,
}

/// What a model is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Made {
    weights: String,
    parameters: String,
    architecture: String,
    context_length: u32,
    capabilities: Vec<String>,
}

impl Made {
    /// Whether anything is known that is worth the room to remember it.
    fn is_known(&self) -> bool {
        let texts = [&self.weights, &self.parameters, &self.architecture];
        let length = texts.into_iter().chain(&self.capabilities).fold(0, |sum, text| sum + text.len());
        !self.weights.is_empty() && length <= LONGEST_MADE
    }
}

/// The answer of `/api/show`, as far as it is of use here.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Shown {
    modelfile: String,
    parameters: String,
    capabilities: Option<Few<String, MOST_CAPABILITIES>>,
    model_info: Option<Info>,
}

/// What is wanted of the facts about a model, of which there may be very many: its architecture, and its context.
#[derive(Debug, Default)]
struct Info {
    architecture: String,
    /// By the names of architectures.
    contexts: Vec<(String, u64)>,
}

impl<'de> Deserialize<'de> for Info {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Info;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("facts about a model")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut facts: A) -> Result<Info, A::Error> {
                let mut info = Info::default();
                while let Some(key) = facts.next_key::<String>()? {
                    if key == "general.architecture" {
                        if let Plain::Text(text) = facts.next_value()? {
                            info.architecture = text;
                        }
                    } else if let Some(of) = key.strip_suffix(".context_length")
                        && info.contexts.len() < MOST_CONTEXTS
                    {
                        if let Plain::Number(tokens) = facts.next_value()? {
                            info.contexts.push((of.to_owned(), tokens));
                        }
                    } else {
                        facts.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(info)
            }
        }

        from.deserialize_map(Reader)
    }
}

impl Info {
    /// The context of the architecture, tokens.
    fn context_length(&self) -> Option<u32> {
        let found = self.contexts.iter().find(|(of, _)| *of == self.architecture)?;
        found.1.try_into().ok()
    }
}

impl Weights {
    /// Nothing is known but what other servers have told.
    pub(super) fn new(lore: Lore) -> Self {
        Self { lore, ..Self::default() }
    }

    fn silent(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.folder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The models about which the server must be asked. What is gone is forgotten.
    fn unknown(&self, models: &[Model]) -> Vec<(String, String)> {
        let here: HashSet<u64> = models.iter().map(|model| hash(&model.digest)).collect();
        let mut silent = self.silent();
        silent.retain(|digest| here.contains(digest));
        let lore = self.lore.lock();
        let mut asked = HashSet::new();
        // Older Ollamas do not list what their models can do.
        let tells_less = |model: &&Model| model.capabilities.is_empty() && !model.digest.is_empty();
        let unknown = alike(models).into_iter().chain(models.iter().filter(tells_less));
        unknown
            .filter(|model| !silent.contains(&hash(&model.digest)) && !lore.contains_key(&model.digest))
            .filter(|model| asked.insert(model.digest.as_str()))
            .map(|model| (model.name.clone(), model.digest.clone()))
            .collect()
    }

    fn learn(&self, digest: String, shown: Option<(Made, Option<PathBuf>)>) {
        let Some((made, folder)) = shown else {
            self.silent().insert(hash(&digest));
            return;
        };
        self.lore.learn(digest, made);
        let mut known = self.folder();
        *known = known.take().or(folder);
    }

    /// Writes down what is known.
    fn fill(&self, models: &mut [Model]) {
        let lore = self.lore.lock();
        for model in models {
            if let Some(made) = lore.get(&model.digest) {
                model.weights.clone_from(&made.weights);
                model.parameters.clone_from(&made.parameters);
                model.architecture.clone_from(&made.architecture);
                if model.context_length == 0 {
                    model.context_length = made.context_length;
                }
                if model.capabilities.is_empty() {
                    model.capabilities.clone_from(&made.capabilities);
                }
            }
        }
    }
}

fn hash(digest: &str) -> u64 {
    rapidhash::v3::rapidhash_v3(digest.as_bytes())
}

impl Ollama {
    /// Finds out, as far as the caller's patience goes, which of these models have their weights in common. True if it went
    /// far enough.
    pub(crate) async fn look_into(&self, models: &mut [Model], patience: std::time::Duration) -> bool {
        let weights = &self.0.weights;
        let unknown = weights.unknown(models);
        let asking = async {
            for (name, digest) in unknown {
                // Another server may have told it by now.
                if weights.lore.has(&digest) {
                    continue;
                }
                let Some(answer) = self.show(&name).await else { return false };
                weights.learn(digest, answer);
            }
            true
        };
        // What was not told in time is asked for with the next report.
        let is_done = tokio::time::timeout(patience, asking).await.unwrap_or(false);
        weights.fill(models);
        is_done
    }

    /// The folder in which the server keeps the files of its models, as it names it; it is asked about this one, if it was
    /// asked about none so far.
    pub(crate) async fn folder(&self, model: &str) -> Option<PathBuf> {
        let known = self.0.weights.folder().clone();
        match known {
            Some(folder) => Some(folder),
            None => self.show(model).await??.1,
        }
    }

    /// What the server shows of a model; nothing if it did not answer.
    async fn show(&self, name: &str) -> Option<Option<(Made, Option<PathBuf>)>> {
        let ask = Ask { infers: false, ..Ask::post("/api/show", json!({ "model": name }).to_string()) };
        let reply = self.send(ask).await.ok()?;
        let is_shown = reply.status.is_success();
        let body = reply.body.collect(LONGEST).await.ok()?;
        let shown = is_shown.then(|| serde_json::from_slice::<Shown>(&body).ok()).flatten();
        Some(shown.and_then(|shown| {
            let info = shown.model_info.unwrap_or_default();
            let made = Made {
                weights: made_of(&shown.modelfile),
                parameters: parameters(&shown.parameters),
                context_length: info.context_length().unwrap_or(0),
                architecture: info.architecture,
                capabilities: shown.capabilities.unwrap_or_default().0,
            };
            made.is_known().then(|| (made, folder_of(&shown.modelfile)))
        }))
    }
}

/// The models that may have the weights of another: of the same kind, of nearly the same size, and yet not the same.
fn alike(models: &[Model]) -> Vec<&Model> {
    let mut kinds: HashMap<_, Vec<&Model>> = HashMap::new();
    for model in models.iter().filter(|model| model.size > 0 && !model.digest.is_empty()) {
        kinds.entry(model.kind()).or_default().push(model);
    }
    let is_alike = |one: &Model, other: &Model| one.digest != other.digest && one.size.abs_diff(other.size) < SLACK;
    let has_twin = |kind: &[&Model], model: &Model| kind.iter().any(|other| is_alike(model, other));
    kinds.values().flat_map(|kind| kind.iter().copied().filter(|model| has_twin(kind, model))).collect()
}

/// The digests of the files that a Modelfile names: weights, projectors and adapters.
fn made_of(modelfile: &str) -> String {
    let files = modelfile.lines().filter_map(|line| {
        let file = line.strip_prefix("FROM ").or_else(|| line.strip_prefix("ADAPTER "))?.trim();
        Some(file.rsplit_once("sha256-").map_or(file, |(_, digest)| digest))
    });
    files.collect::<Vec<_>>().join(",")
}

/// The folder of the file that a Modelfile is made from: that of the blobs.
fn folder_of(modelfile: &str) -> Option<PathBuf> {
    let file = modelfile.lines().find_map(|line| line.strip_prefix("FROM "))?;
    Some(Path::new(file.trim().trim_matches('"')).parent()?.to_owned())
}

/// The parameters of a model, which Ollama writes as lines of key and value, as a JSON object; a key that stands more than
/// once gets a list.
pub(crate) fn parameters(text: &str) -> String {
    let mut members = Map::new();
    for (key, value) in modelfile::parameters(text) {
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        match members.get_mut(key) {
            None => drop(members.insert(key.to_owned(), value)),
            Some(Value::Array(list)) => list.push(value),
            Some(first) => *first = json!([first.take(), value]),
        }
    }
    if members.is_empty() { String::new() } else { Value::Object(members).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, digest: &str, quantization: &str, size: u64) -> Model {
        let [name, digest, quantization] = [name, digest, quantization].map(str::to_owned);
        Model { name, digest, quantization, size, capabilities: vec!["completion".to_owned()], ..Model::default() }
    }

    #[test]
    fn only_models_that_look_alike_are_asked_about() {
        let models = [
            model("a", "1", "Q4_0", 4 << 30),
            model("a-with-template", "2", "Q4_0", (4 << 30) + 999),
            model("a-copy", "1", "Q4_0", 4 << 30),
            model("alone", "3", "Q8_0", 4 << 30),
            model("larger", "4", "Q4_0", 5 << 30),
        ];
        let weights = Weights::default();
        let asked: HashSet<_> = weights.unknown(&models).into_iter().map(|(_, digest)| digest).collect();
        assert_eq!(asked, HashSet::from(["1".to_owned(), "2".to_owned()]));
        weights.learn("1".to_owned(), None);
        assert_eq!(weights.unknown(&models), [("a-with-template".to_owned(), "2".to_owned())]);
        let old = [Model { capabilities: Vec::new(), ..models[3].clone() }];
        assert_eq!(Weights::default().unknown(&old), [("alone".to_owned(), "3".to_owned())]);
        assert!(weights.unknown(&models[3..]).is_empty());
        assert!(weights.silent().is_empty(), "what is gone is forgotten");
    }

    fn made(weights: &str) -> Made {
        let (weights, nothing) = (weights.to_owned(), String::new);
        Made { weights, parameters: nothing(), architecture: nothing(), context_length: 1, capabilities: Vec::new() }
    }

    #[test]
    fn what_one_server_has_told_is_not_asked_of_another() {
        let mut models = [model("a", "1", "Q4_0", 4 << 30), model("b", "2", "Q4_0", 4 << 30)];
        let lore = Lore::default();
        let [one, other] = [Weights::new(lore.clone()), Weights::new(lore)];
        one.learn("1".to_owned(), Some((made("w"), Some("/one".into()))));
        assert_eq!(other.unknown(&models), [("b".to_owned(), "2".to_owned())]);
        other.fill(&mut models);
        assert_eq!((models[0].weights.as_str(), other.folder().is_none()), ("w", true));
    }

    #[test]
    fn no_more_manifests_are_remembered_than_there_is_room_for() {
        let lore = Lore::default();
        for number in 0..MOST + 2 {
            lore.learn(number.to_string(), made("w"));
        }
        assert_eq!(lore.lock().len(), 2);
    }

    #[test]
    fn of_the_facts_about_a_model_only_those_are_read_that_are_wanted() {
        let facts = r#"{"general.architecture": "llama", "llama.context_length": 8, "a.context_length": [[[]]],
            "tokens": ["a", "b"], "b.context_length": 9}"#;
        let info: Info = serde_json::from_str(facts).unwrap();
        assert_eq!((info.architecture.as_str(), info.context_length()), ("llama", Some(8)));
        let many: Vec<String> = (0..1000).map(|number| format!("\"{number}.context_length\": 1, ")).collect();
        let many = many.concat();
        let info: Info = serde_json::from_str(&format!("{{{many} \"general.architecture\": {{}}}}")).unwrap();
        assert_eq!((info.contexts.len(), info.context_length()), (MOST_CONTEXTS, None));
    }

    #[test]
    fn what_is_too_long_to_remember_is_as_good_as_unknown() {
        assert!(made("w").is_known() && !made("").is_known());
        assert!(!made(&"w".repeat(LONGEST_MADE + 1)).is_known());
    }

    #[test]
    fn a_modelfile_names_its_weights() {
        let text = "# Modelfile generated by \"ollama show\"\n# FROM tiny:latest\n\nFROM /models/blobs/sha256-aa\nFROM \
                    /models/blobs/sha256-bb\nTEMPLATE {{ .Prompt }}\nADAPTER C:\\blobs\\sha256-cc\n";
        assert_eq!(made_of(text), "aa,bb,cc");
        assert_eq!(made_of("TEMPLATE x"), "");
    }

    #[test]
    fn parameters_are_read_as_ollama_writes_them() {
        let text =
            "num_ctx                        8192\nstop                           \"<|a|>\"\nstop   \"b \\\"c\\\"\"\n";
        let wanted = json!({"num_ctx": 8192, "stop": ["<|a|>", "b \"c\""]});
        assert_eq!(serde_json::from_str::<Value>(&parameters(text)).unwrap(), wanted);
        assert_eq!(parameters(""), "");
    }
}
