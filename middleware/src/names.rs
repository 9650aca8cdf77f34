//! Names of models and servers: parsed once at the edge, compared cheaply ever after.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use http::{HeaderName, HeaderValue};

/// Registry host that a name without one belongs to.
const DEFAULT_HOST: &str = "registry.ollama.ai";
/// Namespace that a name without one belongs to.
const DEFAULT_NAMESPACE: &str = "library";
/// Tag that a name without one means.
pub(crate) const DEFAULT_TAG: &str = "latest";

/// A model's canonical name: lower case, with its tag, without the parts that Ollama fills in by default.
///
/// `Llama3`, `llama3:latest` and `registry.ollama.ai/library/llama3` are the same model: `llama3:latest`. Only for looking
/// up: the bytes that a client sent go to the server unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelName(Arc<str>);

impl ModelName {
    /// Parses a name by the rules of Ollama's `types/model/name.go`; `None` if Ollama would refuse it.
    pub fn parse(text: &str) -> Option<Self> {
        if is_plain(text) {
            // Nearly every name: nothing to fill in but perhaps the tag, and nothing to take out.
            return Some(Self(if text.contains(':') { text.into() } else { [text, ":", DEFAULT_TAG].concat().into() }));
        }
        let [host, namespace, model, tag] = Self::parts(text)?;
        let mut name = String::with_capacity(text.len() + DEFAULT_TAG.len() + 1);
        let host_shown = !host.eq_ignore_ascii_case(DEFAULT_HOST);
        if host_shown {
            name.extend([host, "/"]);
        }
        if host_shown || !namespace.eq_ignore_ascii_case(DEFAULT_NAMESPACE) {
            name.extend([namespace, "/"]);
        }
        name.extend([model, ":", tag]);
        name.make_ascii_lowercase();
        Some(Self(name.into()))
    }

    /// The canonical text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the namespace of a model begins with that an agent is copying to its Ollama: the name of a copy that is not
    /// finished, which nobody is shown.
    pub const COPYING: &str = "olol-copy-";

    /// Whether a text names a copy that is not finished.
    pub fn is_unfinished(text: &str) -> bool {
        let namespace = text.strip_prefix("127.0.0.1:").and_then(|rest| rest.split_once('/'));
        namespace.is_some_and(|(_, rest)| rest.starts_with(Self::COPYING))
    }

    /// Host, namespace, model and tag of a name, with what is left out filled in, in the case in which it is written; `None`
    /// if Ollama would refuse it. None of them is empty, or more than one part of a path.
    pub fn parts(text: &str) -> Option<[&str; 4]> {
        let (rest, tag) = match (text.rfind(':'), text.rfind('/')) {
            (Some(colon), slash) if slash.is_none_or(|slash| colon > slash) => (&text[..colon], &text[colon + 1..]),
            _ => (text, DEFAULT_TAG),
        };
        let (rest, model) = cut_last(rest);
        let (rest, namespace) = rest.map_or((None, DEFAULT_NAMESPACE), cut_last);
        let host = rest.map_or(DEFAULT_HOST, |host| host.split_once("://").map_or(host, |(_, host)| host));
        let valid = part_is_valid(host, 350, b"_-.:")
            && part_is_valid(namespace, 80, b"_-")
            && part_is_valid(model, 80, b"_-.")
            && part_is_valid(tag, 80, b"_-.");
        valid.then_some([host, namespace, model, tag])
    }

    /// The tag alone.
    pub fn tag(&self) -> &str {
        self.0.rsplit_once(':').map_or(DEFAULT_TAG, |(_, tag)| tag)
    }
}

/// Whether a name is one short part, perhaps with a tag, in lower case.
fn is_plain(text: &str) -> bool {
    let mut colons = 0;
    let mut begins = true;
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'_' => begins = false,
            b'-' | b'.' if !begins => {}
            b':' if !begins && colons == 0 => {
                colons = 1;
                begins = true;
            }
            _ => return false,
        }
    }
    !begins && text.len() <= 80
}

/// Splits at the last slash: what is before it, if there is one, and what is behind it.
fn cut_last(text: &str) -> (Option<&str>, &str) {
    text.rsplit_once('/').map_or((None, text), |(rest, last)| (Some(rest), last))
}

/// Whether a part is neither empty nor too long, begins with a letter, a digit or `_`, and has no foreign characters.
fn part_is_valid(part: &str, longest: usize, marks: &[u8]) -> bool {
    let bytes = part.as_bytes();
    let Some(first) = bytes.first() else { return false };
    bytes.len() <= longest
        && (first.is_ascii_alphanumeric() || *first == b'_')
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || marks.contains(byte))
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for ModelName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The name of a server: what the operator calls it, else its address as configured.
#[derive(Clone, Debug)]
pub struct ServerId(Arc<Server>);

#[derive(Debug)]
struct Server {
    name: Arc<str>,
    /// What answers of it are marked with.
    header: HeaderValue,
    number: u64,
}

impl ServerId {
    /// The header that tells a client which server answered.
    pub const HEADER: HeaderName = HeaderName::from_static("x-olol-server");

    /// Names a server.
    pub fn new(name: &str) -> Self {
        let header = HeaderValue::from_str(name).unwrap_or(HeaderValue::from_static("?"));
        Self(Arc::new(Server { name: name.into(), header, number: rapidhash::v3::rapidhash_v3(name.as_bytes()) }))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0.name
    }

    /// The name as the value of a header.
    pub fn header(&self) -> HeaderValue {
        self.0.header.clone()
    }

    /// A number made of the name: the same in every process, whatever other servers there are.
    pub(crate) fn number(&self) -> u64 {
        self.0.number
    }

    /// The name for a metric's label, without copying it.
    pub(crate) fn shared(&self) -> Arc<str> {
        self.0.name.clone()
    }
}

impl PartialEq for ServerId {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.name == other.0.name
    }
}

impl Eq for ServerId {}

impl std::hash::Hash for ServerId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        // Equal names have equal numbers.
        state.write_u64(self.0.number);
    }
}

impl PartialOrd for ServerId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ServerId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.name.cmp(&other.0.name)
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(text: &str) -> Option<String> {
        ModelName::parse(text).map(|name| name.to_string())
    }

    #[test]
    fn names_for_one_model_are_one_name() {
        for text in [
            "Llama3",
            "llama3:latest",
            "library/llama3",
            "registry.ollama.ai/library/LLAMA3:Latest",
            "https://registry.ollama.ai/library/llama3",
        ] {
            assert_eq!(canonical(text).as_deref(), Some("llama3:latest"), "{text}");
        }
    }

    #[test]
    fn what_is_not_default_is_kept() {
        assert_eq!(canonical("ada/tiny").as_deref(), Some("ada/tiny:latest"));
        assert_eq!(canonical("hf.co/ada/tiny:Q4_K_M").as_deref(), Some("hf.co/ada/tiny:q4_k_m"));
        assert_eq!(canonical("127.0.0.1:5000/library/tiny").as_deref(), Some("127.0.0.1:5000/library/tiny:latest"));
    }

    #[test]
    fn a_copy_that_is_not_finished_is_known_by_its_name() {
        for (text, wanted) in [
            ("127.0.0.1:40000/olol-copy-0a1b/tiny:latest", true),
            ("127.0.0.1:40000/library/tiny:latest", false),
            ("olol-copy-0a1b/tiny", false),
            ("tiny", false),
        ] {
            assert_eq!(ModelName::is_unfinished(text), wanted, "{text}");
        }
    }

    #[test]
    fn the_parts_of_a_name_keep_their_case() {
        assert_eq!(ModelName::parts("Tiny"), Some(["registry.ollama.ai", "library", "Tiny", "latest"]));
        assert_eq!(ModelName::parts("hf.co/Ada/Tiny:Q4"), Some(["hf.co", "Ada", "Tiny", "Q4"]));
        for text in ["../x", "a/../b", "a/b/..", "a:..", "a/b/c/d/e", "", "a\\b", "a:b/c"] {
            assert_eq!(ModelName::parts(text), None, "{text}");
        }
    }

    #[test]
    fn what_ollama_refuses_is_refused() {
        for text in ["", ":", "a b", "tiny@sha256:00", "tiny:", "/tiny", "-tiny", "a/b/c/d/e f", "tiny:ä"] {
            assert_eq!(canonical(text), None, "{text:?}");
        }
        assert_eq!(canonical(&"x".repeat(81)), None);
    }
}
