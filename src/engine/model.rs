//! A GGUF file as a model of Ollama's: its name, its identity, and what `/api/tags` and `/api/show` tell of it.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::model::LlamaModel;
use llama_cpp_4::model::params::LlamaModelParams;
use llama_cpp_4::quantize::LlamaFtype;
use olol_middleware::ModelName;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::log;

/// A file up to this size is hashed as a whole.
const HASHED_WHOLE: u64 = 64 << 20;
/// Of a larger file so many samples of this size are hashed.
const SAMPLES: u64 = 64;
const SAMPLE: usize = 64 << 10;

/// A model file, as it is known without loading its weights.
#[derive(Clone, Debug)]
pub(super) struct ModelFile {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Its name with tag: `olol-tiny:latest`.
    pub(super) name: String,
    /// What tells it from other models, 64 hexadecimal digits.
    pub(super) digest: String,
    /// Bytes on the disk.
    pub(super) size: u64,
    /// Time of its last change.
    pub(super) modified_at: jiff::Timestamp,
    /// What lists tell of it.
    pub(super) details: Details,
    /// Its metadata, typed as in the file, lists left out.
    info: Map<String, Value>,
    /// Its chat template, a Jinja text; empty if it has none.
    template: String,
}

/// What lists tell of a model, in Ollama's order.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Details {
    parent_model: &'static str,
    format: &'static str,
    family: String,
    families: [String; 1],
    parameter_size: String,
    quantization_level: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    context_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding_length: Option<u64>,
}

impl ModelFile {
    /// Reads what a file tells of itself. The error says what is wrong with it.
    pub(super) fn open(backend: &LlamaBackend, path: &Path) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
        let mut file = std::fs::File::open(path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(format!("{} is not a file", path.display()));
        }
        let digest = digest(&mut file, about.len()).map_err(failed)?;
        let parameters = LlamaModelParams::default().with_vocab_only(true);
        let model = LlamaModel::load_from_file(backend, path, &parameters).map_err(|error| {
            let why = log::take_complaints(&error.to_string());
            format!("{} is no GGUF file that llama.cpp can use: {why}", path.display())
        })?;
        let info = info(&model);
        let architecture = info.get("general.architecture").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        let number = |key: &str| info.get(&format!("{architecture}.{key}")).and_then(Value::as_u64);
        let details = Details {
            parent_model: "",
            format: "gguf",
            family: architecture.clone(),
            families: [architecture.clone()],
            parameter_size: human_number(model.n_params()),
            quantization_level: quantization(&info),
            context_length: number("context_length"),
            embedding_length: number("embedding_length"),
        };
        Ok(Self {
            path: path.to_owned(),
            name: name(path),
            digest,
            size: about.len(),
            modified_at: about.modified().unwrap_or(SystemTime::UNIX_EPOCH).try_into().unwrap_or_default(),
            details,
            info,
            template: model.chat_template(None).unwrap_or_default().to_owned(),
        })
    }

    /// Whether a client's name for a model means this one.
    pub(super) fn is_called(&self, name: &str) -> bool {
        ModelName::parse(name).is_some_and(|asked| asked.as_str() == self.name)
    }

    /// Context it was trained for, tokens.
    pub(super) fn trained_context(&self) -> Option<u32> {
        self.details.context_length.and_then(|length| u32::try_from(length).ok())
    }

    /// Its entry in `/api/tags`.
    pub(super) fn listed(&self) -> Listed<'_> {
        Listed {
            name: &self.name,
            model: &self.name,
            modified_at: self.modified_at.to_string(),
            size: self.size,
            digest: &self.digest,
            details: &self.details,
            capabilities: ["completion"],
        }
    }

    /// Its entry in `/api/ps`.
    pub(super) fn loaded(&self, expires_at: String, context_length: u32) -> Loaded<'_> {
        Loaded {
            name: &self.name,
            model: &self.name,
            size: self.size,
            digest: &self.digest,
            details: self.brief(),
            expires_at,
            size_vram: 0,
            context_length,
        }
    }

    /// The answer of `/api/show`.
    pub(super) fn shown(&self) -> Shown<'_> {
        let (name, file, template) = (&self.name, self.path.display(), &self.template);
        Shown {
            license: self.info.get("general.license").and_then(Value::as_str),
            modelfile: format!(
                "# Modelfile generated by \"olol\"\n# To build a new Modelfile based on this, replace FROM with:\n# FROM {name}\n\nFROM {file}\n"
            ),
            template,
            details: self.brief(),
            model_info: &self.info,
            capabilities: ["completion"],
            modified_at: self.modified_at.to_string(),
        }
    }

    /// The details without what only lists tell.
    fn brief(&self) -> Details {
        Details { context_length: None, embedding_length: None, ..self.details.clone() }
    }
}

/// An entry of `/api/tags`.
#[derive(Debug, Serialize)]
pub(super) struct Listed<'a> {
    name: &'a str,
    model: &'a str,
    modified_at: String,
    size: u64,
    digest: &'a str,
    details: &'a Details,
    capabilities: [&'static str; 1],
}

/// An entry of `/api/ps`.
#[derive(Debug, Serialize)]
pub(super) struct Loaded<'a> {
    name: &'a str,
    model: &'a str,
    size: u64,
    digest: &'a str,
    details: Details,
    expires_at: String,
    size_vram: u64,
    context_length: u32,
}

/// The answer of `/api/show`.
#[derive(Debug, Serialize)]
pub(super) struct Shown<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    license: Option<&'a str>,
    modelfile: String,
    template: &'a str,
    details: Details,
    model_info: &'a Map<String, Value>,
    capabilities: [&'static str; 1],
    modified_at: String,
}

/// The metadata of a model, as far as Ollama's `model_info` shows it: lists are emptied.
fn info(model: &LlamaModel) -> Map<String, Value> {
    let metadata = model.metadata().unwrap_or_default();
    let mut info: Map<String, Value> = metadata
        .into_iter()
        .filter(|(key, _)| key != "tokenizer.chat_template")
        .map(|(key, text)| (key, if text.starts_with('[') { Value::Null } else { typed(text) }))
        .collect();
    info.insert("general.parameter_count".to_owned(), json!(model.n_params()));
    info
}

/// The level that most of the weights have. llama.cpp itself knows it only once the weights are loaded.
fn quantization(info: &Map<String, Value>) -> String {
    let number = info.get("general.file_type").and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
    let known = number.and_then(|number| LlamaFtype::try_from(number).ok());
    known.map_or("unknown", LlamaFtype::name).to_owned()
}

/// A value that llama.cpp has turned into text, turned back.
fn typed(text: String) -> Value {
    if let Ok(number) = text.parse::<i64>() {
        json!(number)
    } else if let Some(number) = text.parse::<f64>().ok().filter(|number| number.is_finite()) {
        json!(number)
    } else if let Ok(yes) = text.parse::<bool>() {
        json!(yes)
    } else {
        Value::String(text)
    }
}

/// A model's name from the name of its file, as far as Ollama takes it.
fn name(path: &Path) -> String {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default();
    let fit: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || "_-.".contains(c) { c } else { '-' }).collect();
    let fit = fit.trim_start_matches(['-', '.']);
    let short = &fit[..fit.len().min(80)];
    format!("{}:latest", if short.is_empty() { "model" } else { short })
}

/// What tells a model from others: the hash of the file, or, since hashing tens of gigabytes at every start would take
/// minutes, of its length and samples from all over it. Equal files have equal digests on every machine.
fn digest(file: &mut std::fs::File, length: u64) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    if length <= HASHED_WHOLE {
        std::io::copy(file, &mut hash)?;
    } else {
        hash.update(length.to_le_bytes());
        let last = length - SAMPLE as u64;
        let mut sample = vec![0; SAMPLE];
        for at in 0..SAMPLES {
            file.seek(SeekFrom::Start(last / (SAMPLES - 1) * at))?;
            file.read_exact(&mut sample)?;
            hash.update(&sample);
        }
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// A number of parameters as Ollama writes it (`format.HumanNumber`).
fn human_number(count: u64) -> String {
    let scaled = |unit: f64, digits: usize, letter: &str| {
        #[expect(clippy::cast_precision_loss, reason = "no model has 2^52 parameters")]
        let number = count as f64 / unit;
        let digits = if number.fract() == 0.0 { 0 } else { digits };
        format!("{number:.digits$}{letter}")
    };
    match count {
        1_000_000_000.. => scaled(1e9, 1, "B"),
        1_000_000.. => scaled(1e6, 2, "M"),
        1_000.. => scaled(1e3, 0, "K"),
        _ => count.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_parameters_look_as_ollamas_do() {
        for (count, wanted) in [
            (999, "999"),
            (92_000, "92K"),
            (1_393_920, "1.39M"),
            (2_000_000, "2M"),
            (3_212_749_888, "3.2B"),
            (70_000_000_000, "70B"),
        ] {
            assert_eq!(human_number(count), wanted);
        }
    }

    #[test]
    fn a_file_gives_its_model_a_name_that_ollama_takes() {
        for (file, wanted) in [
            ("/m/Llama-3.2-1B-Q4_K_M.gguf", "llama-3.2-1b-q4_k_m:latest"),
            ("my model (2).gguf", "my-model--2-:latest"),
            ("-ä.gguf", "model:latest"),
        ] {
            assert_eq!(name(Path::new(file)), wanted);
            assert!(ModelName::parse(wanted).is_some());
        }
    }

    #[test]
    fn a_large_file_is_known_by_its_length_and_samples() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(HASHED_WHOLE + 1).unwrap();
        let first = digest(&mut file, HASHED_WHOLE + 1).unwrap();
        assert_eq!(first, digest(&mut file, HASHED_WHOLE + 1).unwrap());
        file.set_len(HASHED_WHOLE + 2).unwrap();
        assert_ne!(first, digest(&mut file, HASHED_WHOLE + 2).unwrap());
        assert_eq!(first.len(), 64);
    }

    #[test]
    fn metadata_has_its_types_back() {
        assert_eq!(typed("7".to_owned()), json!(7));
        assert_eq!(typed("0.5".to_owned()), json!(0.5));
        assert_eq!(typed("true".to_owned()), json!(true));
        assert_eq!(typed("nan".to_owned()), json!("nan"));
    }
}
