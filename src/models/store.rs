//! The files of an Ollama's models: manifests by name, blobs by digest.
//!
//! Only read, never written. Whatever comes from outside is a name or a digest that was checked, so no path can lead out of
//! the folder; and a link in it that does is not followed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use olol_middleware::ModelName;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// The longest manifest that is taken: a model of a thousand layers has a quarter of this.
pub const LONGEST_MANIFEST: u64 = 1 << 20;
/// Layers of a model; more are in none.
const MOST_LAYERS: usize = 10_000;

/// Why a file of a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The name is none.
    #[error("'{0}' is no name of a model")]
    Name(String),
    /// The digest is none.
    #[error("'{0}' is no digest: sha256: and 64 hex digits")]
    Digest(String),
    /// It is not there.
    #[error("{0} is not there")]
    Missing(String),
    /// It is there, and another.
    #[error("{model} is there with the digest {found}, not {wanted}")]
    Another {
        /// The model.
        model: String,
        /// Its digest here.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// It is not what it should be.
    #[error("{what}: {why}")]
    Broken {
        /// What is broken.
        what: String,
        /// How.
        why: String,
    },
    /// It cannot be read.
    #[error("{what} cannot be read: {source}; the agent must run as a user who may read the models of its Ollama")]
    Unreadable {
        /// What cannot be read.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// The digest of a blob: SHA-256.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Digest(String);

impl Digest {
    /// Reads `sha256:` and 64 hex digits; also with a dash, or the digits alone.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let digits = text.strip_prefix("sha256:").or_else(|| text.strip_prefix("sha256-")).unwrap_or(text);
        if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let shown: String = text.chars().take(80).filter(|c| !c.is_control()).collect();
            return Err(StoreError::Digest(shown));
        }
        Ok(Self(digits.to_ascii_lowercase()))
    }

    /// That of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(hex(&Sha256::digest(bytes)))
    }

    /// The digits.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// Bytes as hex digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// A file that a model is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// What a model is made of: the bytes of its manifest, and what they name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Byte for byte: their digest is that of the model.
    pub bytes: Bytes,
    /// The files, each once.
    pub layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Written {
    #[serde(default)]
    config: Option<Part>,
    #[serde(default)]
    layers: Option<Vec<Part>>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    digest: String,
    #[serde(default)]
    size: u64,
}

impl Manifest {
    /// Reads a manifest.
    pub fn parse(bytes: Bytes) -> Result<Self, StoreError> {
        let broken = |why: String| StoreError::Broken { what: "the manifest".to_owned(), why };
        if bytes.len() as u64 > LONGEST_MANIFEST {
            return Err(broken(format!("it is longer than {LONGEST_MANIFEST} bytes")));
        }
        let written: Written = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
        let mut layers: Vec<Layer> = Vec::new();
        let parts = written.layers.unwrap_or_default().into_iter().chain(written.config);
        for part in parts.filter(|part| !part.digest.is_empty()) {
            let layer = Layer { digest: Digest::parse(&part.digest)?, size: part.size };
            if !layers.iter().any(|known| known.digest == layer.digest) {
                layers.push(layer);
            }
            if layers.len() > MOST_LAYERS {
                return Err(broken(format!("it names more than {MOST_LAYERS} files")));
            }
        }
        Ok(Self { bytes, layers })
    }

    /// Its digest: that of the model.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    /// One of its files.
    pub fn layer(&self, digest: &Digest) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.digest == *digest)
    }

    /// Bytes of all its files.
    pub fn size(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }
}

/// The folder of the models of one Ollama. Its functions wait for the disk: they are called beside the runtime.
#[derive(Clone, Debug)]
pub struct Store(PathBuf);

impl Store {
    /// The store in a folder: what `OLLAMA_MODELS` names.
    pub fn at(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// The manifest of a model, under the name by which its Ollama lists it; only with this digest, if one is given.
    pub fn manifest(&self, name: &str, digest: Option<&Digest>) -> Result<Manifest, StoreError> {
        let parts = ModelName::parts(name).ok_or_else(|| StoreError::Name(name.chars().take(80).collect()))?;
        let path = parts.iter().fold(self.0.join("manifests"), |path, part| path.join(part));
        let what = format!("the manifest of {name}");
        let mut bytes = Vec::new();
        let file = self.open(&path, "manifests", &what)?;
        let unreadable = |source| StoreError::Unreadable { what: what.clone(), source };
        file.take(LONGEST_MANIFEST + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        let manifest = Manifest::parse(bytes.into())?;
        match digest {
            Some(wanted) if *wanted != manifest.digest() => Err(StoreError::Another {
                model: name.to_owned(),
                found: manifest.digest().hex().to_owned(),
                wanted: wanted.hex().to_owned(),
            }),
            _ => Ok(manifest),
        }
    }

    /// A blob, from some byte on, and how long the whole of it is.
    pub fn blob(&self, digest: &Digest, offset: u64) -> Result<(File, u64), StoreError> {
        let path = self.0.join("blobs").join(format!("sha256-{}", digest.hex()));
        let what = format!("the blob {digest}");
        let mut file = self.open(&path, "blobs", &what)?;
        let unreadable = |source| StoreError::Unreadable { what: what.clone(), source };
        let length = file.metadata().map_err(unreadable)?.len();
        if offset > length {
            return Err(StoreError::Broken { what, why: format!("it has {length} bytes, and not {offset}") });
        }
        file.seek(SeekFrom::Start(offset)).map_err(unreadable)?;
        Ok((file, length))
    }

    /// Bytes that are still to come of these files. What Ollama has begun with is as long as the whole from the beginning on,
    /// so what counts of that is the room that it takes.
    pub fn lacks(&self, layers: &[Layer]) -> u64 {
        let blobs = self.0.join("blobs");
        let left = |layer: &Layer| {
            let name = format!("sha256-{}", layer.digest.hex());
            if blobs.join(&name).metadata().is_ok_and(|there| there.len() == layer.size) {
                return 0;
            }
            let begun = blobs.join(format!("{name}-partial")).metadata();
            layer.size.saturating_sub(begun.map_or(0, |begun| allocated(&begun)))
        };
        layers.iter().fold(0, |sum, layer| sum.saturating_add(left(layer)))
    }

    /// Bytes that the blobs take which Ollama has begun with, and not ended.
    pub fn begun(&self) -> u64 {
        let Ok(files) = std::fs::read_dir(self.0.join("blobs")) else { return 0 };
        let is_begun = |file: &std::fs::DirEntry| file.file_name().as_encoded_bytes().ends_with(b"-partial");
        let files = files.flatten().filter(is_begun).filter_map(|file| file.metadata().ok());
        files.fold(0, |sum, file| sum.saturating_add(allocated(&file)))
    }

    /// Opens a file that is below one of the store's folders, wherever that is.
    fn open(&self, path: &Path, below: &str, what: &str) -> Result<File, StoreError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => StoreError::Missing(what.to_owned()),
            _ => StoreError::Unreadable { what: what.to_owned(), source },
        };
        let (folder, real) = (self.0.join(below).canonicalize(), path.canonicalize());
        let (folder, real) = (folder.map_err(failed)?, real.map_err(failed)?);
        if !real.starts_with(&folder) || !real.is_file() {
            return Err(StoreError::Missing(what.to_owned()));
        }
        File::open(real).map_err(failed)
    }
}

/// Bytes that a file takes on its disk.
#[cfg(unix)]
fn allocated(file: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(file).saturating_mul(512)
}

#[cfg(not(unix))]
fn allocated(_file: &std::fs::Metadata) -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(letter: &str) -> String {
        format!("sha256:{}", letter.repeat(64))
    }

    /// A store with one model of two layers, of which the folder is returned, too.
    fn store() -> (tempfile::TempDir, Store, Manifest) {
        let folder = tempfile::tempdir().unwrap();
        let blob = Digest::of(b"weights");
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"digest":"{}","size":3}},"layers":[{{"digest":"{blob}","size":7}},{{"digest":"{blob}","size":7}}]}}"#,
            digest("a")
        );
        let manifests = folder.path().join("manifests/registry.ollama.ai/library/Tiny");
        std::fs::create_dir_all(&manifests).unwrap();
        std::fs::write(manifests.join("latest"), &text).unwrap();
        std::fs::create_dir_all(folder.path().join("blobs")).unwrap();
        std::fs::write(folder.path().join("blobs").join(format!("sha256-{}", blob.hex())), "weights").unwrap();
        let manifest = Manifest::parse(text.into()).unwrap();
        let store = Store::at(folder.path());
        (folder, store, manifest)
    }

    #[test]
    fn a_model_is_found_by_its_name_and_its_digest() {
        let (_folder, store, wanted) = store();
        assert_eq!(wanted.layers.len(), 2, "each file once");
        assert_eq!(wanted.size(), 10);
        assert_eq!(store.manifest("Tiny", None).unwrap(), wanted);
        assert_eq!(store.manifest("Tiny:latest", Some(&wanted.digest())).unwrap(), wanted);
        assert!(matches!(store.manifest("Tiny", Some(&Digest::of(b""))), Err(StoreError::Another { .. })));
        assert!(matches!(store.manifest("tiny:other", None), Err(StoreError::Missing(_))));
    }

    #[test]
    fn a_blob_is_read_from_any_byte_on() {
        let (_folder, store, _) = store();
        let (mut file, length) = store.blob(&Digest::of(b"weights"), 4).unwrap();
        let mut rest = String::new();
        file.read_to_string(&mut rest).unwrap();
        assert_eq!((rest.as_str(), length), ("hts", 7));
        assert!(store.blob(&Digest::of(b"weights"), 8).is_err());
        assert!(matches!(store.blob(&Digest::of(b"others"), 0), Err(StoreError::Missing(_))));
    }

    #[test]
    fn what_is_still_to_come_is_what_is_not_there() {
        let (folder, store, manifest) = store();
        assert_eq!(store.lacks(&manifest.layers), 3, "the weights are there");
        let layer = |digest: &str, size| Layer { digest: Digest::of(digest.as_bytes()), size };
        assert_eq!(store.lacks(&[layer("weights", 8)]), 8, "a file of another length is another");
        assert_eq!(store.lacks(&[layer("one", u64::MAX), layer("two", 5)]), u64::MAX);
        let begun = folder.path().join("blobs").join(format!("sha256-{}-partial", Digest::of(b"three").hex()));
        std::fs::File::create(begun).unwrap().set_len(1 << 30).unwrap();
        assert_eq!(store.lacks(&[layer("three", 1 << 30)]), 1 << 30, "it is only as long as it will be");
        assert_eq!(store.begun(), 0);
        let begun = folder.path().join("blobs").join(format!("sha256-{}-partial", Digest::of(b"four").hex()));
        std::fs::write(begun, vec![7; 1 << 20]).unwrap();
        assert_eq!(store.begun() + store.lacks(&[layer("four", 1 << 30)]), 1 << 30);
        #[cfg(unix)]
        assert!(store.begun() >= 1 << 20);
    }

    #[test]
    fn nothing_leads_out_of_the_store() {
        let (folder, store, _) = store();
        std::fs::write(folder.path().join("secret"), "{}").unwrap();
        for name in ["../secret", "../../secret:x", "a/../../../secret", "/etc/passwd", "tiny/..:..", "a\0b"] {
            assert!(matches!(store.manifest(name, None), Err(StoreError::Name(_))), "{name}");
        }
        for text in ["", "sha256:", "../secret", &digest("g"), &digest("a")[..70], &format!("{}/", digest("a"))] {
            assert!(Digest::parse(text).is_err(), "{text}");
        }
        assert_eq!(Digest::parse(&digest("A")).unwrap().to_string(), digest("a"));
        #[cfg(unix)]
        {
            let link = folder.path().join("blobs").join(format!("sha256-{}", "b".repeat(64)));
            std::os::unix::fs::symlink(folder.path().join("secret"), link).unwrap();
            let blob = store.blob(&Digest::parse(&digest("b")).unwrap(), 0);
            assert!(matches!(blob, Err(StoreError::Missing(_))));
        }
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        for text in ["", "7", r#"{"layers":[{"digest":"../../etc/passwd"}]}"#] {
            assert!(Manifest::parse(Bytes::copy_from_slice(text.as_bytes())).is_err(), "{text}");
        }
        let long = Bytes::from(vec![b' '; usize::try_from(LONGEST_MANIFEST).unwrap() + 1]);
        assert!(Manifest::parse(long).is_err());
    }
}
