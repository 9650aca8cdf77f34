//! Who asks: the keys of clients, and what each of them may do.
//!
//! A key is `olol_<id>_<secret>`. Its id finds it, and is no secret; what is kept of the whole is its SHA-256. A plain hash
//! is enough: 160 random bits cannot be guessed as a password can.

use std::collections::HashMap;
use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

use crate::error::Error;
use crate::names::{ModelName, ServerId};
use crate::pattern::Pattern;
use crate::rate_limit::Limits;
use crate::route::Route;
use crate::slots::Priority;

/// What every key begins with.
pub const PREFIX: &str = "olol_";
/// The headers in which a client may show its key.
pub const HEADERS: [HeaderName; 2] = [header::AUTHORIZATION, HeaderName::from_static("x-api-key")];
/// The longest text that is looked at as a key, bytes: nobody makes us hash more.
const LONGEST: usize = 256;

/// A client that has shown a key.
#[derive(Clone, Debug, Default)]
pub struct Key {
    /// The public part of the key: what it is found by.
    pub id: Arc<str>,
    /// What its owner is called: the only thing of a key that logs, labels and pages may tell.
    pub name: Arc<str>,
    /// The models that it may use; `None`: all.
    pub models: Option<Box<[Pattern]>>,
    /// What it may do with them.
    pub may: Rights,
    /// Whether it may use the proxy's own routes: `/metrics`, and what is below `/api/status/` and `/olol/`.
    pub admin: bool,
    /// How urgent its calls are.
    pub priority: Priority,
    /// Whether nothing may stand for the quantization of a model that it asks for.
    pub strict_quant: bool,
    /// Its own limits, before those of `[rate-limit]`.
    pub limits: Option<Limits>,
    /// When it ends.
    pub expires: Option<SystemTime>,
    /// What servers get as `Authorization` instead of what the client sent, by their names.
    pub outbound: HashMap<Box<str>, HeaderValue>,
}

impl Key {
    /// Whether it may use a model, by whatever name.
    pub fn may_use(&self, model: &str) -> bool {
        let Some(models) = &self.models else { return true };
        let name = ModelName::parse(model);
        models
            .iter()
            .any(|pattern| name.as_ref().map_or_else(|| pattern.matches(model), |name| pattern.matches_model(name)))
    }

    /// Whether it is over.
    pub fn has_expired(&self) -> bool {
        self.expires.is_some_and(|expires| expires <= SystemTime::now())
    }

    /// What a server gets as `Authorization` from this client.
    pub fn outbound(&self, server: &ServerId) -> Option<&HeaderValue> {
        if self.outbound.is_empty() { None } else { self.outbound.get(server.as_str()) }
    }
}

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights(u8);

impl Rights {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Ask models, and load and unload them.
    pub const INFER: Self = Self(1);
    /// See which models there are, and what they are like.
    pub const LIST: Self = Self(1 << 1);
    /// Fetch models from a registry.
    pub const PULL: Self = Self(1 << 2);
    /// Send models to a registry.
    pub const PUSH: Self = Self(1 << 3);
    /// Make models.
    pub const CREATE: Self = Self(1 << 4);
    /// Copy models.
    pub const COPY: Self = Self(1 << 5);
    /// Delete models.
    pub const DELETE: Self = Self(1 << 6);
    /// Use the account at ollama.com that a server is signed in with.
    pub const ACCOUNT: Self = Self(1 << 7);
    /// All that changes which models there are.
    pub const MANAGE: Self = Self(Self::PULL.0 | Self::PUSH.0 | Self::CREATE.0 | Self::COPY.0 | Self::DELETE.0);
    /// Everything that an Ollama can do.
    pub const ALL: Self = Self(u8::MAX);

    /// The words for them.
    const WORDS: [(&'static str, Self); 11] = [
        ("infer", Self::INFER),
        ("list", Self::LIST),
        ("pull", Self::PULL),
        ("push", Self::PUSH),
        ("create", Self::CREATE),
        ("copy", Self::COPY),
        ("delete", Self::DELETE),
        ("account", Self::ACCOUNT),
        ("manage", Self::MANAGE),
        ("all", Self::ALL),
        ("none", Self::NONE),
    ];

    /// What a route asks for; `None`: nothing but to be known.
    pub fn of(route: Route) -> Option<Self> {
        Some(match route {
            Route::Root | Route::Version => return None,
            Route::Status
            | Route::Tags
            | Route::Ps
            | Route::Show
            | Route::V1Models
            | Route::V1Model
            | Route::Recommendations => Self::LIST,
            Route::Pull => Self::PULL,
            Route::Push => Self::PUSH,
            Route::Create | Route::Blob => Self::CREATE,
            Route::Copy => Self::COPY,
            Route::Delete => Self::DELETE,
            Route::Me | Route::Signout | Route::UserKey => Self::ACCOUNT,
            Route::Generate
            | Route::Chat
            | Route::Embed
            | Route::Embeddings
            | Route::WebSearch
            | Route::WebFetch
            | Route::V1Chat
            | Route::V1Completions
            | Route::V1Embeddings
            | Route::V1Responses
            | Route::V1Audio
            | Route::V1Messages => Self::INFER,
        })
    }

    /// Whether all of these are among them.
    pub fn cover(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }

    /// These and those.
    #[must_use]
    pub fn and(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    /// Reads a word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(other, _)| *other == word).map(|(_, rights)| *rights)
    }
}

impl Default for Rights {
    fn default() -> Self {
        Self::ALL
    }
}

impl TryFrom<String> for Rights {
    type Error = String;

    fn try_from(word: String) -> Result<Self, String> {
        let words = || Self::WORDS.map(|(word, _)| word).join(", ");
        Self::from_word(&word).ok_or_else(|| format!("'{word}' is nothing that a key may do; say some of: {}", words()))
    }
}

impl<'de> Deserialize<'de> for Rights {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let word = String::deserialize(from)?;
        Self::try_from(word).map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((word, _)) = [("all", Self::ALL), ("none", Self::NONE)].iter().find(|(_, all)| self == all) {
            return f.write_str(word);
        }
        let single = Self::WORDS.iter().filter(|(_, right)| right.0.is_power_of_two() && self.cover(*right));
        for (at, (word, _)) in single.enumerate() {
            f.write_str(if at == 0 { "" } else { ", " })?;
            f.write_str(word)?;
        }
        Ok(())
    }
}

/// What is kept of a key: the SHA-256 of its whole text.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of the text of a key.
    pub fn of(text: &[u8]) -> Self {
        Self(Sha256::digest(text).into())
    }

    /// Whether it is that of this text. Takes as long for a near miss as for a far one.
    fn is_of(&self, text: &[u8]) -> bool {
        self.0.ct_eq(&Self::of(text).0).into()
    }
}

impl TryFrom<String> for Digest {
    type Error = &'static str;

    /// Reads 64 hexadecimal digits. The error does not say what stood there instead: it may be the key itself.
    fn try_from(text: String) -> Result<Self, Self::Error> {
        const WHY: &str = "must be 64 hexadecimal digits, the SHA-256 of the whole key; `olol keys add` writes them";
        let mut digest = [0; 32];
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(WHY);
        }
        for (byte, digits) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| WHY)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| WHY)?;
        }
        Ok(Self(digest))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('…')
    }
}

/// The keys that are known, found by their ids. Replaced as a whole when their file has changed.
#[derive(Debug, Default)]
pub struct Keys {
    known: ArcSwap<ById>,
    guard: AtomicU8,
    is_old: AtomicBool,
}

type ById = HashMap<Arc<str>, (Digest, Arc<Key>)>;

/// When the proxy's own routes ask for the key of an admin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Never: `auth` is not in the stack.
    Never,
    /// Once there are keys.
    OnceKeysExist,
    /// Always: nobody may do anything without a key.
    Always,
}

/// What a request shows.
#[derive(Clone, Debug)]
pub enum Shown {
    /// No key.
    Nothing,
    /// Something that is no key of ours: SDKs send what they are told, and that may be for the server behind us.
    Foreign,
    /// A key of ours that nobody knows, or with the wrong secret.
    Unknown,
    /// A key whose time is over.
    Expired(Arc<Key>),
    /// A good key.
    Known(Arc<Key>),
}

impl Keys {
    /// Knows these keys from now on, and no others.
    pub fn replace(&self, keys: impl IntoIterator<Item = (Digest, Key)>) {
        let by_id = |(digest, key): (Digest, Key)| (key.id.clone(), (digest, Arc::new(key)));
        self.known.store(Arc::new(keys.into_iter().map(by_id).collect()));
        self.is_old.store(false, Ordering::Relaxed);
    }

    /// Keeps what is known, although there should be something newer: it cannot be read.
    pub fn keep(&self) {
        self.is_old.store(true, Ordering::Relaxed);
    }

    /// Whether what is known is the newest that there is.
    pub fn are_current(&self) -> bool {
        !self.is_old.load(Ordering::Relaxed)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.known.load().len()
    }

    /// The key of somebody with this name.
    pub fn named(&self, name: &str) -> Option<Arc<Key>> {
        self.known.load().values().map(|(_, key)| key).find(|key| *key.name == *name).cloned()
    }

    /// Whether there is any.
    pub fn exist(&self) -> bool {
        self.count() > 0
    }

    /// Looks for a key in the headers of a request. Of several good ones the first counts; a bad one spoils it all.
    pub fn find(&self, headers: &HeaderMap) -> Shown {
        let mut shown = Shown::Nothing;
        for value in HEADERS.iter().flat_map(|name| headers.get_all(name)) {
            match (ours(value), &shown) {
                (None, Shown::Nothing) => shown = Shown::Foreign,
                (Some(text), Shown::Nothing | Shown::Foreign) => shown = self.known(text),
                (Some(text), Shown::Known(_)) => match self.known(text) {
                    Shown::Known(_) => {}
                    bad => shown = bad,
                },
                _ => {}
            }
        }
        shown
    }

    /// Who has this key.
    fn known(&self, text: &[u8]) -> Shown {
        let id = text[PREFIX.len()..].split(|byte| *byte == b'_').next().and_then(|id| std::str::from_utf8(id).ok());
        let known = self.known.load();
        match id.and_then(|id| known.get(id)) {
            Some((digest, key)) if text.len() <= LONGEST && digest.is_of(text) => {
                if key.has_expired() {
                    Shown::Expired(key.clone())
                } else {
                    Shown::Known(key.clone())
                }
            }
            _ => Shown::Unknown,
        }
    }

    /// Says when own routes ask for a key. For who builds the stack.
    pub fn guard(&self, guard: Guard) {
        self.guard.store(guard as u8, Ordering::Relaxed);
    }

    /// Who sends a request for something of its own: its key, or nobody in particular while no key is asked for.
    pub fn admit(&self, headers: &HeaderMap) -> Result<Option<Arc<Key>>, Error> {
        let guard = self.guard.load(Ordering::Relaxed);
        if guard == Guard::Never as u8 || (guard == Guard::OnceKeysExist as u8 && !self.exist()) {
            return Ok(None);
        }
        match self.find(headers) {
            Shown::Known(key) => Ok(Some(key)),
            bad => Err(bad.refusal()),
        }
    }

    /// Whether a request may use the proxy's own routes.
    pub fn admit_admin(&self, headers: &HeaderMap) -> Result<(), Error> {
        let guard = self.guard.load(Ordering::Relaxed);
        if guard == Guard::Never as u8 || (guard == Guard::OnceKeysExist as u8 && !self.exist()) {
            return Ok(());
        }
        let how = "send it as 'Authorization: Bearer olol_…'; `olol keys add NAME --admin` makes one";
        match self.find(headers) {
            Shown::Known(key) if key.admin => Ok(()),
            Shown::Known(key) => Err(Error::Forbidden(format!(
                "key '{}' may not see the proxy's own pages: they need an admin's key; {how}",
                key.name
            ))),
            Shown::Nothing | Shown::Foreign => {
                Err(Error::Unauthorized(format!("the proxy's own pages need an admin's key; {how}")))
            }
            bad @ (Shown::Unknown | Shown::Expired(_)) => Err(bad.refusal()),
        }
    }
}

impl Shown {
    /// Why a request that shows this is refused where a key is needed.
    pub(crate) fn refusal(&self) -> Error {
        Error::Unauthorized(match self {
            Self::Unknown => "this key is not known: it is mistyped or was removed; ask whoever runs this proxy for \
                              another (`olol keys list` tells which there are)"
                .to_owned(),
            Self::Expired(key) => format!(
                "key '{}' has expired: ask whoever runs this proxy for another (`olol keys add NAME` makes one)",
                key.name
            ),
            Self::Foreign => "a key of this proxy is needed, and what was sent is none: it begins with olol_; \
                              `olol keys add NAME` makes one"
                .to_owned(),
            Self::Nothing | Self::Known(_) => "a key is needed: send it as 'Authorization: Bearer olol_…' or \
                                               'x-api-key: olol_…'; `olol keys add NAME` makes one"
                .to_owned(),
        })
    }
}

/// The key of ours in the value of a header, whatever the scheme before it is called.
fn ours(value: &HeaderValue) -> Option<&[u8]> {
    let text = value.as_bytes().trim_ascii();
    let text = text.rsplit(u8::is_ascii_whitespace).next().unwrap_or(text);
    text.starts_with(PREFIX.as_bytes()).then_some(text)
}

/// Takes keys of ours out of the headers that a server will get, and leaves what is for the server.
pub fn strip(headers: &mut HeaderMap) {
    for name in &HEADERS {
        if headers.get_all(name).iter().any(|value| ours(value).is_some()) {
            let others: Vec<_> = headers.get_all(name).iter().filter(|value| ours(value).is_none()).cloned().collect();
            headers.remove(name);
            for value in others {
                headers.append(name, value);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A key and its text.
    pub(crate) fn key(name: &str) -> (Digest, Key, String) {
        let text = format!("{PREFIX}{name}1_{:040x}", 7);
        let key = Key { id: format!("{name}1").into(), name: name.into(), ..Key::default() };
        (Digest::of(text.as_bytes()), key, text)
    }

    fn headers<const N: usize>(list: [(&'static str, &str); N]) -> HeaderMap {
        let header = |(name, value): (&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        let mut headers = HeaderMap::new();
        for (name, value) in list.map(header) {
            headers.append(name, value);
        }
        headers
    }

    fn keys() -> (Keys, String) {
        let (digest, key, text) = key("ada");
        let keys = Keys::default();
        keys.replace([(digest, key)]);
        (keys, text)
    }

    #[test]
    fn a_key_is_found_in_either_header_and_whatever_the_case_of_its_scheme() {
        let (keys, text) = keys();
        for (name, value) in [
            ("authorization", format!("Bearer {text}")),
            ("authorization", format!("bearer  {text} ")),
            ("authorization", text.clone()),
            ("x-api-key", text.clone()),
        ] {
            let shown = keys.find(&headers([(name, &value)]));
            assert!(matches!(shown, Shown::Known(key) if &*key.name == "ada"), "{name}: {value}");
        }
    }

    #[test]
    fn what_is_nearly_a_key_is_none() {
        let (keys, text) = keys();
        for wrong in [
            "olol_",
            "olol_ada1",
            "olol_ada1_",
            "olol__",
            "olol_ada1_0",
            "olol_eve1_7",
            &text[..text.len() - 1],
            &format!("{text}0"),
            &text.replace("0007", "0008"),
            &format!("olol_ada1_{}", "0".repeat(1000)),
        ] {
            let shown = keys.find(&headers([("x-api-key", wrong)]));
            assert!(matches!(shown, Shown::Unknown), "{wrong}: {shown:?}");
        }
        assert!(matches!(keys.find(&headers([])), Shown::Nothing));
        for foreign in ["Bearer ollama", "Basic YTpi", "sk-olol_", ""] {
            assert!(matches!(keys.find(&headers([("authorization", foreign)])), Shown::Foreign), "{foreign}");
        }
    }

    #[test]
    fn of_two_keys_a_bad_one_spoils_it_and_a_foreign_one_does_not() {
        let (keys, text) = keys();
        let both = |one: &str, two: &str| keys.find(&headers([("authorization", one), ("x-api-key", two)]));
        assert!(matches!(both("Bearer ollama", &text), Shown::Known(_)));
        assert!(matches!(both(&format!("Bearer {text}"), "sk-1"), Shown::Known(_)));
        assert!(matches!(both(&format!("Bearer {text}"), "olol_x_y"), Shown::Unknown));
        assert!(matches!(both("Bearer olol_x_y", &text), Shown::Unknown));
    }

    #[test]
    fn a_key_ends_when_its_time_is_over() {
        let (digest, key, text) = key("ada");
        let keys = Keys::default();
        keys.replace([(digest, Key { expires: Some(SystemTime::UNIX_EPOCH), ..key })]);
        assert!(matches!(keys.find(&headers([("x-api-key", &text)])), Shown::Expired(_)));
    }

    #[test]
    fn servers_get_what_is_theirs_and_no_key_of_ours() {
        let (_, text) = keys();
        let mut sent = headers([("authorization", &text), ("authorization", "Basic x"), ("x-api-key", &text)]);
        strip(&mut sent);
        assert_eq!(sent, headers([("authorization", "Basic x")]));
        let mut sent = headers([("authorization", "Bearer ollama"), ("x-mine", "olol_1")]);
        strip(&mut sent);
        assert_eq!(sent.len(), 2);
    }

    #[test]
    fn own_pages_are_for_admins_once_there_are_keys() {
        let keys = Keys::default();
        let status = |keys: &Keys, text: &str| match keys.admit_admin(&headers([("x-api-key", text)])) {
            Ok(()) => 200,
            Err(error) => error.status().as_u16(),
        };
        assert_eq!(status(&keys, ""), 200);
        keys.guard(Guard::OnceKeysExist);
        assert_eq!(status(&keys, ""), 200);
        let (ada, eve) = (key("ada"), key("eve"));
        keys.replace([(ada.0, Key { admin: true, ..ada.1 }), (eve.0, eve.1)]);
        assert_eq!([&ada.2, &eve.2, "olol_x_y", ""].map(|text| status(&keys, text)), [200, 403, 401, 401]);
        keys.replace([]);
        keys.guard(Guard::Always);
        assert_eq!(status(&keys, ""), 401);
    }

    #[test]
    fn rights_are_words() {
        let rights = ["infer", "manage"].map(|word| Rights::from_word(word).unwrap());
        let both = rights[0].and(rights[1]);
        assert_eq!(both.to_string(), "infer, pull, push, create, copy, delete");
        assert!(both.cover(Rights::DELETE) && !both.cover(Rights::LIST) && Rights::ALL.cover(both));
        assert!(Rights::try_from("dance".to_owned()).unwrap_err().contains("infer, list, pull"));
        assert_eq!((Rights::ALL.to_string(), Rights::NONE.to_string()), ("all".to_owned(), "none".to_owned()));
    }

    #[test]
    fn a_digest_that_is_none_is_refused_without_repeating_it() {
        let digest = Digest::of(b"olol_a_b");
        assert!(Digest::try_from(digest.to_string()).unwrap().is_of(b"olol_a_b"));
        for text in ["olol_ada1_secret".to_owned(), "ä".repeat(32), "+1".repeat(32), "g".repeat(64)] {
            assert!(!Digest::try_from(text.clone()).unwrap_err().contains(&text), "{text}");
        }
    }
}
